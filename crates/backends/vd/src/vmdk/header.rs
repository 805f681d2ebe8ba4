//! The binary header of a sparse extent, its directories and grain tables.
//!
//! ```text
//! 0  magic "KDMV"   4  version   8  flags   12 capacity u64   20 grain size u64   28 descriptor offset u64
//! 36 descriptor size u64   44 table entries u32   48 second directory u64   56 directory u64   64 overhead u64
//! 72 unclean u8   73 "\n \r\n"   77 compression u16                      (sizes and offsets in sectors of 512 bytes)
//! ```

use std::io;
use std::ops::Range;
use std::path::Path;

use super::descriptor::Descriptor;
use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Format, Place};
use crate::units::{MapFault, UnitFormat, Units, words_from, words_to};

pub(super) const SECTOR: u64 = 512;
pub(super) const MAGIC: &[u8] = b"KDMV";
/// Entries of a grain table, fixed by all makers.
pub(super) const TABLE_ENTRIES: u32 = 512;
/// Sectors of a grain table.
pub(super) const TABLE_SECTORS: u64 = TABLE_ENTRIES as u64 * 4 / SECTOR;
pub(super) const GRAIN_SECTORS: u64 = 128;
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;
/// Most bytes of a descriptor that are read.
pub(super) const MAX_DESCRIPTOR: u64 = 1 << 20;
/// Most grains whose table entries we load: 4 TiB in grains of 64 KiB.
pub(super) const MAX_GRAINS: u64 = 1 << 26;
/// Header flag: a table entry of 1 means a grain of zeros.
pub(super) const FLAG_ZERO_GRAINS: u32 = 1 << 2;
pub(super) const FLAG_COMPRESSED: u32 = 1 << 16;
/// Bytes of a compressed grain's marker.
pub(super) const MARKER: usize = 12;
pub(super) const RESTORE: &str = "restore the file from a copy";

/// The fields of the binary header that matter.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) flags: u32,
    pub(super) capacity: u64,
    pub(super) grain: u64,
    pub(super) descriptor: Range<u64>,
    pub(super) second_directory: u64,
    pub(super) directory: u64,
    pub(super) overhead: u64,
    pub(super) compressed: bool,
}

/// How grains are found: the map of [`Units`] is all tables one after the other.
pub(super) struct Tables {
    pub(super) header: Header,
    /// File offset of each table, of the primary and of the second copy (none if 0).
    tables: Vec<[u64; 2]>,
}

impl UnitFormat for Tables {
    fn unit(&self) -> u64 {
        self.header.grain * SECTOR
    }

    fn place(&self, word: u32) -> Place {
        match word {
            0 => Place::Absent,
            1 if self.header.flags & FLAG_ZERO_GRAINS != 0 => Place::Zero,
            word => Place::File(u64::from(word) * SECTOR),
        }
    }

    fn storage(&self, word: u32) -> Range<u64> {
        let start = u64::from(word) * SECTOR;
        start..start + self.unit()
    }

    fn word_from(&self, end: u64) -> Option<u32> {
        u32::try_from(end.div_ceil(self.unit()).checked_mul(self.header.grain)?).ok()
    }

    fn free_word(&self) -> u32 {
        0
    }

    fn zero_word(&self) -> Option<u32> {
        (self.header.flags & FLAG_ZERO_GRAINS != 0).then_some(1)
    }

    fn write_words(&self, file: &dyn FileIo, first: u32, words: &[u32]) -> io::Result<()> {
        let mut unit = first;
        let mut rest = words;
        while !rest.is_empty() {
            let (table, entry) = (unit / TABLE_ENTRIES, unit % TABLE_ENTRIES);
            let (now, later) = rest.split_at(rest.len().min((TABLE_ENTRIES - entry) as usize));
            // The second copy first: one of both is whole at any moment.
            for &offset in self.tables[table as usize].iter().rev().filter(|&&offset| offset != 0) {
                file.write_at(offset + 4 * u64::from(entry), &words_to(now))?;
            }
            unit += now.len() as u32;
            rest = later;
        }
        Ok(())
    }
}

pub(super) fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: RESTORE }
}

pub(super) fn read_header(file: &dyn FileIo, path: &Path) -> Result<(Header, Descriptor), Error> {
    let host = |e| Error::host("read from", path, e);
    let mut raw = [0; 512];
    file.read_at(0, &mut raw).map_err(host)?;
    if raw.starts_with(b"COWD") {
        return Err(Error::unsupported(path, "sparse VMDK extents of VMware ESX"));
    }
    if !raw.starts_with(MAGIC) {
        return Err(Error::WrongFormat {
            path: path.to_owned(),
            format: Format::Vmdk,
            what: "the signature at offset 0x0 is missing".into(),
        });
    }
    let file_len = file.len().map_err(host)?;
    let at_end = raw[56..64] == [0xff; 8];
    let text_place: [u8; 16] = raw[28..44].try_into().unwrap_or_default();
    if at_end {
        let footer = file_len.saturating_sub(2 * SECTOR);
        file.read_at(footer, &mut raw).map_err(host)?;
        if !raw.starts_with(MAGIC) {
            return Err(damaged(path, footer, "the footer of a stream-optimized image is missing".into()));
        }
        // The descriptor is told by the header at the start alone.
        raw[28..44].copy_from_slice(&text_place);
    }
    let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let (version, flags) = (u32_at(4), u32_at(8));
    if !(1..=3).contains(&version) {
        return Err(Error::unsupported(path, format!("VMDK version {version}")));
    }
    let compressed = flags & FLAG_COMPRESSED != 0;
    if compressed && u16::from_le_bytes([raw[77], raw[78]]) != 1 {
        return Err(Error::unsupported(path, "VMDK images compressed otherwise than by deflate"));
    }
    if u32_at(44) != TABLE_ENTRIES {
        return Err(damaged(path, 44, format!("{} entries in a grain table instead of 512", u32_at(44))));
    }
    let (capacity, grain) = (u64_at(12), u64_at(20));
    if !grain.is_power_of_two() || !(8..=0x8000).contains(&grain) {
        return Err(damaged(path, 20, format!("grain size of {grain} sectors")));
    }
    let sectors = |at: usize, count: u64| -> Result<u64, Error> {
        let offset = u64_at(at);
        match offset.checked_add(count).and_then(|end| end.checked_mul(SECTOR)) {
            Some(end) if end <= file_len => Ok(offset * SECTOR),
            _ => Err(damaged(path, at as u64, format!("sector {offset} lies past the file's end"))),
        }
    };
    if capacity.div_ceil(grain) > MAX_GRAINS {
        return Err(Error::unsupported(path, format!("a disk of {capacity} sectors in grains of {grain}")));
    }
    let directory_sectors = (capacity.div_ceil(grain).div_ceil(TABLE_ENTRIES.into()) * 4).div_ceil(SECTOR);
    let descriptor_sectors = u64_at(36);
    if descriptor_sectors > MAX_DESCRIPTOR / SECTOR {
        return Err(damaged(path, 36, format!("a descriptor of {descriptor_sectors} sectors")));
    }
    let start = sectors(28, descriptor_sectors)?;
    let header = Header {
        flags,
        capacity,
        grain,
        descriptor: start..start + descriptor_sectors * SECTOR,
        second_directory: if u64_at(48) == 0 { 0 } else { sectors(48, directory_sectors)? },
        directory: sectors(56, directory_sectors)?,
        // Nothing is written to compressed images, and their makers count differently.
        overhead: if compressed { 0 } else { sectors(64, 0)? },
        compressed,
    };
    let mut text = vec![0; (header.descriptor.end - start) as usize];
    file.read_at(start, &mut text).map_err(host)?;
    Ok((header, Descriptor::parse(&text)))
}

/// File offsets of the grain tables (both copies), and their words one after the other.
pub(super) fn load_tables(
    file: &dyn FileIo,
    path: &Path,
    header: &Header,
    file_len: u64,
) -> Result<(Vec<[u64; 2]>, Vec<u32>), Error> {
    let host = |e| Error::host("read from", path, e);
    let grains = header.capacity.div_ceil(header.grain);
    let count = grains.div_ceil(TABLE_ENTRIES.into()) as usize;
    let directory = |at: u64| -> Result<Vec<u32>, Error> {
        let mut bytes = vec![0; 4 * count];
        if at != 0 {
            file.read_at(at, &mut bytes).map_err(host)?;
        }
        Ok(words_from(&bytes))
    };
    let (first, second) = (directory(header.directory)?, directory(header.second_directory)?);
    // Tables apart from one another bound what is loaded by the file's size.
    let mut places: Vec<u32> = first.iter().chain(&second).copied().filter(|&s| s != 0).collect();
    places.sort_unstable();
    if let Some(pair) = places.windows(2).find(|p| u64::from(p[1] - p[0]) < TABLE_SECTORS) {
        let what = format!("two grain tables share sector {}", pair[1]);
        return Err(damaged(path, header.directory, what));
    }
    if let Some(&last) = places.last()
        && (u64::from(last) + TABLE_SECTORS) * SECTOR > file_len
    {
        let what = format!("a grain table at sector {last} lies past the file's end");
        return Err(damaged(path, header.directory, what));
    }
    let mut tables = Vec::with_capacity(count);
    let mut words = Vec::new();
    let mut table = [0; TABLE_ENTRIES as usize * 4];
    for (index, (&a, &b)) in first.iter().zip(&second).enumerate() {
        tables.push([u64::from(a) * SECTOR, u64::from(b) * SECTOR]);
        if a != 0 {
            file.read_at(u64::from(a) * SECTOR, &mut table).map_err(host)?;
        } else if header.compressed {
            // A stream without a grain in a table's range leaves the table out.
            table.fill(0);
        } else {
            return Err(Error::unsupported(path, format!("VMDK images without grain table {index}")));
        }
        words.extend(words_from(&table));
    }
    words.truncate(grains as usize);
    Ok((tables, words))
}

/// Checks and takes the grains of an uncompressed extent.
pub(super) fn open_units(file: &dyn FileIo, path: &Path, header: Header) -> Result<Units<Tables>, Error> {
    let host = |e| Error::host("read from", path, e);
    let file_len = file.len().map_err(host)?;
    let (tables, words) = load_tables(file, path, &header, file_len)?;
    // Grains lie behind everything that finds them.
    let tables_end = tables.iter().flatten().max().map_or(0, |at| at + TABLE_SECTORS * SECTOR);
    let start = header.overhead.max(header.descriptor.end).max(tables_end);
    let offsets: Vec<u64> = tables.iter().map(|t| t[0]).collect();
    Units::open(Tables { header, tables }, words, start, file_len).map_err(|fault| {
        let (unit, what) = match fault {
            MapFault::Outside { unit, at } => {
                (unit, format!("grain {unit} at 0x{at:x} lies outside the data of the file"))
            }
            MapFault::Shared { unit, at } => {
                (unit, format!("grain {unit} shares its place at 0x{at:x} with another one"))
            }
        };
        let (table, entry) = (unit / TABLE_ENTRIES as usize, unit % TABLE_ENTRIES as usize);
        damaged(path, offsets[table] + 4 * entry as u64, what)
    })
}

/// Writes a new, empty sparse extent of `capacity` sectors into an empty file; `Ok(false)` if it would be too large.
pub(super) fn create_sparse(file: &dyn FileIo, capacity: u64, descriptor: Option<&str>) -> io::Result<bool> {
    let grains = capacity.div_ceil(GRAIN_SECTORS);
    if grains > MAX_GRAINS {
        return Ok(false);
    }
    let descriptor_sectors = if descriptor.is_some() { DESCRIPTOR_SECTORS } else { 0 };
    let tables = grains.div_ceil(TABLE_ENTRIES.into());
    let directory_sectors = (4 * tables).div_ceil(SECTOR);
    let copy_sectors = directory_sectors + tables * TABLE_SECTORS;
    let second = 1 + descriptor_sectors;
    let first = second + copy_sectors;
    let overhead = (first + copy_sectors).next_multiple_of(GRAIN_SECTORS);
    file.set_len(overhead * SECTOR)?;
    for directory in [second, first] {
        let words: Vec<u32> =
            (0..tables).map(|i| (directory + directory_sectors + i * TABLE_SECTORS) as u32).collect();
        file.write_at(directory * SECTOR, &words_to(&words))?;
    }
    if let Some(text) = descriptor {
        let text = text.as_bytes();
        file.write_at(SECTOR, &text[..text.len().min((DESCRIPTOR_SECTORS * SECTOR) as usize)])?;
    }
    // The signature comes last: a file that was not finished is no image.
    file.sync()?;
    let raw = NewHeader {
        version: 1,
        // Line ends can be tested; the second directory is in use.
        flags: 3,
        capacity,
        descriptor_sectors,
        second,
        first,
        overhead,
        compression: 0,
    };
    file.write_at(0, &raw.to_bytes())?;
    file.sync()?;
    Ok(true)
}

/// A header to be written; offsets in sectors.
pub(super) struct NewHeader {
    pub(super) version: u32,
    pub(super) flags: u32,
    pub(super) capacity: u64,
    /// From sector 1 on.
    pub(super) descriptor_sectors: u64,
    pub(super) second: u64,
    pub(super) first: u64,
    pub(super) overhead: u64,
    pub(super) compression: u16,
}

impl NewHeader {
    pub(super) fn to_bytes(&self) -> [u8; 512] {
        let mut raw = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &GRAIN_SECTORS.to_le_bytes());
        put(28, &u64::from(self.descriptor_sectors != 0).to_le_bytes());
        put(36, &self.descriptor_sectors.to_le_bytes());
        put(44, &TABLE_ENTRIES.to_le_bytes());
        put(48, &self.second.to_le_bytes());
        put(56, &self.first.to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        put(73, b"\n \r\n");
        put(77, &self.compression.to_le_bytes());
        raw
    }
}
