//! VHD images of the types fixed and dynamic. All integers are big endian. Source: Microsoft "Virtual Hard Disk Image Format
//! Specification" 1.0; VirtualBox `src/VBox/Storage/VHD.cpp` for the byte order of UUIDs.
//!
//! A fixed image is the disk's bytes with a footer of 512 bytes. A dynamic one starts with a copy of the footer and a header,
//! then the block allocation table; each block has a bitmap of its written sectors in front, and the footer follows
//! the last block. Should a power cut have hit while the footer moved, the copy at the start serves.
//!
//! In an image without a parent, sectors of a block in the file count as written whatever its bitmap says, as with other
//! implementations; before a block is written its bitmap is filled. In a differencing image the bitmap tells which sectors of a
//! block are its own; the others are the parent's. A sector's bit goes to the file after the sector has become durable.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::bitmaps::{Bitmaps, First};
use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Format, Ids, Layout, NewParent, Place, Step, Variant, sums_agree};
use crate::units::{MapFault, UnitFormat, Units};

const SECTOR: u64 = 512;
const FOOTER: usize = 512;
const HEADER: usize = 1024;
const COOKIE: &[u8] = b"conectix";
const HEADER_COOKIE: &[u8] = b"cxsparse";
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
const FREE: u32 = u32::MAX;
const BLOCK: u32 = 2 << 20;
/// The format's limit.
const MAX_SIZE: u64 = 2040 << 30;
/// Seconds from the Unix epoch to the format's, 1 January 2000.
const EPOCH: u64 = 946_684_800;
const RESTORE: &str = "restore the file from a copy";

/// The ones' complement of the sum of all bytes but the checksum's own.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum: u32 = bytes.iter().map(|&b| u32::from(b)).sum();
    let own: u32 = bytes[at..at + 4].iter().map(|&b| u32::from(b)).sum();
    !(sum - own)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Cylinders, heads and sectors by the specification's appendix.
fn geometry(size: u64) -> [u8; 4] {
    let total = (size / SECTOR).min(65535 * 16 * 255);
    let (cylinder_heads, heads, sectors) = if total >= 65535 * 16 * 63 {
        (total / 255, 16, 255)
    } else {
        let mut sectors = 17;
        let mut cylinder_heads = total / sectors;
        let mut heads = cylinder_heads.div_ceil(1024).max(4);
        if cylinder_heads >= heads * 1024 || heads > 16 {
            (sectors, heads) = (31, 16);
            cylinder_heads = total / sectors;
        }
        if cylinder_heads >= heads * 1024 {
            (sectors, heads) = (63, 16);
            cylinder_heads = total / sectors;
        }
        (cylinder_heads, heads, sectors)
    };
    let [high, low] = ((cylinder_heads / heads) as u16).to_be_bytes();
    [high, low, heads as u8, sectors as u8]
}

fn new_footer(kind: u32, size: u64, uuid: Uuid) -> [u8; FOOTER] {
    let mut out = [0; FOOTER];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, COOKIE);
    put(8, &2u32.to_be_bytes());
    put(12, &0x0001_0000u32.to_be_bytes());
    put(16, &if kind == FIXED { u64::MAX } else { FOOTER as u64 }.to_be_bytes());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    put(24, &(now.saturating_sub(EPOCH) as u32).to_be_bytes());
    put(28, b"bxwd");
    put(32, &0x0001_0000u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &size.to_be_bytes());
    put(48, &size.to_be_bytes());
    put(56, &geometry(size));
    put(60, &kind.to_be_bytes());
    put(68, &uuid.to_bytes_le());
    let sum = checksum(&out, 64);
    out[64..68].copy_from_slice(&sum.to_be_bytes());
    out
}

/// What the footer says.
#[derive(Clone)]
struct Footer {
    raw: [u8; FOOTER],
    kind: u32,
    size: u64,
}

impl Footer {
    /// The footer at `at`, if there is a sound one.
    fn read(file: &dyn FileIo, at: u64) -> io::Result<Option<Self>> {
        let mut raw = [0; FOOTER];
        file.read_at(at, &mut raw)?;
        let sound = raw.starts_with(COOKIE) && sums_agree(be32(&raw, 64), checksum(&raw, 64));
        Ok(sound.then(|| Self { kind: be32(&raw, 60), size: be64(&raw, 48), raw }))
    }

    fn facts(&self) -> Facts {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.raw[68..84]);
        let variant = match self.kind {
            FIXED => Variant::Fixed,
            DIFFERENCING => Variant::Differencing,
            _ => Variant::Dynamic,
        };
        Facts {
            uuid: Some(Uuid::from_bytes_le(uuid)).filter(|u| !u.is_nil()),
            ..Facts::new(variant, self.size)
        }
    }
}

fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: RESTORE }
}

fn read_footer(file: &dyn FileIo, path: &Path) -> Result<(Footer, u64), Error> {
    let host = |e| Error::host("read from", path, e);
    let len = file.len().map_err(host)?;
    let at_end = match len.checked_sub(FOOTER as u64) {
        Some(at) => Footer::read(file, at).map_err(host)?,
        None => None,
    };
    let footer = match at_end {
        Some(footer) => Some(footer),
        None => Footer::read(file, 0).map_err(host)?.filter(|f| f.kind != FIXED),
    };
    let footer = footer.ok_or_else(|| Error::WrongFormat {
        path: path.to_owned(),
        format: Format::Vhd,
        what: "there is no sound footer at its end, nor a copy at its start".into(),
    })?;
    if footer.size > MAX_SIZE || !footer.size.is_multiple_of(SECTOR) {
        return Err(damaged(path, 48, format!("a disk size of {} bytes", footer.size)));
    }
    Ok((footer, len))
}

/// The facts in a VHD file's footer.
pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    let (footer, file_len) = read_footer(file, path)?;
    let facts = footer.facts();
    if footer.kind != DIFFERENCING {
        return Ok(facts);
    }
    let (_, header) = read_header(file, path, &footer, file_len)?;
    Ok(Facts { parent: parent_uuid(&header), parent_hint: parent_name(&header), ..facts })
}

fn parent_uuid(header: &[u8; HEADER]) -> Option<Uuid> {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&header[40..56]);
    Some(Uuid::from_bytes_le(uuid)).filter(|u| !u.is_nil())
}

/// The parent's name in the header, UTF-16.
fn parent_name(header: &[u8; HEADER]) -> Option<String> {
    let units = header[64..576].chunks_exact(2).map(|u| u16::from_be_bytes([u[0], u[1]]));
    let name: String =
        char::decode_utf16(units.take_while(|&u| u != 0)).map(|c| c.unwrap_or('\u{fffd}')).collect();
    (!name.is_empty()).then_some(name)
}

/// How blocks of a dynamic image are found.
struct Table {
    footer: Footer,
    offset: u64,
    block: u64,
    /// Bytes of the bitmap in front of each block.
    bitmap: u64,
}

impl UnitFormat for Table {
    fn unit(&self) -> u64 {
        self.block
    }

    fn place(&self, word: u32) -> Place {
        if word == FREE { Place::Absent } else { Place::File(u64::from(word) * SECTOR + self.bitmap) }
    }

    fn storage(&self, word: u32) -> Range<u64> {
        let start = u64::from(word) * SECTOR;
        start..start + self.bitmap + self.block
    }

    fn word_from(&self, end: u64) -> Option<u32> {
        u32::try_from(end.div_ceil(SECTOR)).ok().filter(|&word| word != FREE)
    }

    fn free_word(&self) -> u32 {
        FREE
    }

    fn tail(&self) -> u64 {
        FOOTER as u64
    }

    fn prepare(&self, file: &dyn FileIo, word: u32) -> io::Result<()> {
        if self.footer.kind == DIFFERENCING {
            return Ok(());
        }
        file.write_at(u64::from(word) * SECTOR, &vec![0xff; self.bitmap as usize])
    }

    fn write_words(&self, file: &dyn FileIo, first: u32, words: &[u32]) -> io::Result<()> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        file.write_at(self.offset + 4 * u64::from(first), &bytes)
    }

    fn write_end(&self, file: &dyn FileIo, end: u64) -> io::Result<()> {
        file.write_at(end, &self.footer.raw)
    }
}

struct Dynamic {
    units: Units<Table>,
    /// Blocks whose bitmaps are known to be full.
    full: Box<[AtomicBool]>,
    /// Of differencing images.
    bitmaps: Option<Bitmaps>,
    parent: Option<Uuid>,
    parent_hint: Option<String>,
}

/// A VHD image at work.
pub(crate) struct Vhd {
    footer: Footer,
    /// `None` for fixed images.
    dynamic: Option<Dynamic>,
}

impl Vhd {
    pub(crate) fn open(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let (footer, file_len) = read_footer(file, path)?;
        match footer.kind {
            FIXED if footer.size > file_len - FOOTER as u64 => {
                let what = format!("the disk of {} bytes reaches past the file's end", footer.size);
                Err(damaged(path, file_len - FOOTER as u64 + 48, what))
            }
            FIXED => Ok(Self { footer, dynamic: None }),
            DYNAMIC | DIFFERENCING => {
                let dynamic = open_dynamic(file, path, &footer, file_len)?;
                Ok(Self { footer, dynamic: Some(dynamic) })
            }
            other => Err(damaged(path, 60, format!("unknown disk type {other}"))),
        }
    }
}

/// The header of a dynamic image, and where it lies.
fn read_header(
    file: &dyn FileIo,
    path: &Path,
    footer: &Footer,
    file_len: u64,
) -> Result<(u64, [u8; HEADER]), Error> {
    let host = |e| Error::host("read from", path, e);
    let header_at = be64(&footer.raw, 16);
    if header_at.checked_add(HEADER as u64).is_none_or(|end| end > file_len) {
        return Err(damaged(path, 16, format!("the header at 0x{header_at:x} lies past the file's end")));
    }
    let mut header = [0; HEADER];
    file.read_at(header_at, &mut header).map_err(host)?;
    if !header.starts_with(HEADER_COOKIE) || !sums_agree(be32(&header, 36), checksum(&header, 36)) {
        return Err(damaged(path, header_at, "the header's signature or checksum is wrong".into()));
    }
    Ok((header_at, header))
}

fn open_dynamic(file: &dyn FileIo, path: &Path, footer: &Footer, file_len: u64) -> Result<Dynamic, Error> {
    let host = |e| Error::host("read from", path, e);
    let (header_at, header) = read_header(file, path, footer, file_len)?;
    let (offset, entries, block) = (be64(&header, 16), be32(&header, 28), be32(&header, 32));
    if !block.is_power_of_two() || !(0x1000..=0x1000_0000).contains(&block) {
        return Err(damaged(path, header_at + 32, format!("block size 0x{block:x}")));
    }
    let block = u64::from(block);
    if u64::from(entries) < footer.size.div_ceil(block) {
        let what = format!("{entries} blocks do not hold the disk size of {} bytes", footer.size);
        return Err(damaged(path, header_at + 28, what));
    }
    let table_len = 4 * u64::from(entries);
    let Some(table_end) = offset.checked_add(table_len).filter(|&end| end <= file_len) else {
        let what =
            format!("the block table of {table_len} bytes reaches past the file's end at 0x{file_len:x}");
        return Err(damaged(path, header_at + 16, what));
    };
    let mut bytes = vec![0; table_len as usize];
    file.read_at(offset, &mut bytes).map_err(host)?;
    let words: Vec<u32> = bytes.chunks_exact(4).map(|w| be32(w, 0)).collect();
    let count = words.len();
    let table = Table {
        footer: footer.clone(),
        offset,
        block,
        bitmap: (block / SECTOR / 8).next_multiple_of(SECTOR),
    };
    let first = table_end.max(header_at + HEADER as u64).next_multiple_of(SECTOR);
    let units = Units::open(table, words, first, file_len).map_err(|fault| {
        let (unit, what) = match fault {
            MapFault::Outside { unit, at } => {
                (unit, format!("block {unit} at 0x{at:x} lies outside the data of the file"))
            }
            MapFault::Shared { unit, at } => {
                (unit, format!("block {unit} shares its place at 0x{at:x} with another one"))
            }
        };
        damaged(path, offset + 4 * unit as u64, what)
    })?;
    let child = footer.kind == DIFFERENCING;
    Ok(Dynamic {
        bitmaps: child.then(|| Bitmaps::new(block, SECTOR, units.format().bitmap, First::Highest)),
        units,
        full: (0..count).map(|_| AtomicBool::new(false)).collect(),
        parent: if child { parent_uuid(&header) } else { None },
        parent_hint: if child { parent_name(&header) } else { None },
    })
}

/// Writes a new image of `size` bytes into an empty file; `Ok(false)` if it would be too large.
pub(crate) fn create(
    file: &dyn FileIo,
    variant: Variant,
    size: u64,
    uuid: Uuid,
    parent: Option<&NewParent>,
) -> io::Result<bool> {
    if size > MAX_SIZE {
        return Ok(false);
    }
    if variant.is_fixed() {
        file.reserve(0, size + FOOTER as u64)?;
        file.write_at(size, &new_footer(FIXED, size, uuid))?;
        file.sync()?;
        return Ok(true);
    }
    let entries = size.div_ceil(BLOCK.into());
    let table_at = (FOOTER + HEADER) as u64;
    let table_end = (table_at + 4 * entries).next_multiple_of(SECTOR);
    let mut header = [0; HEADER];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, HEADER_COOKIE);
    put(8, &u64::MAX.to_be_bytes());
    put(16, &table_at.to_be_bytes());
    put(24, &0x0001_0000u32.to_be_bytes());
    put(28, &(entries as u32).to_be_bytes());
    put(32, &BLOCK.to_be_bytes());
    let mut end = table_end;
    if let Some(parent) = parent {
        put(40, &parent.uuid.to_bytes_le());
        let name = parent.path.file_name().unwrap_or_default().to_string_lossy();
        let units: Vec<u16> = name.encode_utf16().take(255).collect();
        let bytes: Vec<u8> = units.iter().flat_map(|u| u.to_be_bytes()).collect();
        put(64, &bytes);
        // One locator: the name relative to this file, UTF-16 little endian, in a sector of its own.
        let relative: Vec<u8> = units.iter().flat_map(|u| u.to_le_bytes()).collect();
        put(576, b"W2ru");
        put(580, &(SECTOR as u32).to_be_bytes());
        put(584, &(relative.len() as u32).to_be_bytes());
        put(592, &end.to_be_bytes());
        let mut sector = relative;
        sector.resize(SECTOR as usize, 0);
        file.write_at(end, &sector)?;
        end += SECTOR;
    }
    let sum = checksum(&header, 36);
    header[36..40].copy_from_slice(&sum.to_be_bytes());
    let footer = new_footer(if parent.is_some() { DIFFERENCING } else { DYNAMIC }, size, uuid);
    file.write_at(table_at, &vec![0xff; (table_end - table_at) as usize])?;
    file.write_at(FOOTER as u64, &header)?;
    file.write_at(end, &footer)?;
    // The copy at the start comes last: a file that was not finished is no image.
    file.sync()?;
    file.write_at(0, &footer)?;
    file.sync()?;
    Ok(true)
}

impl Layout for Vhd {
    fn facts(&self) -> Facts {
        let facts = self.footer.facts();
        match &self.dynamic {
            Some(d) => Facts { parent: d.parent, parent_hint: d.parent_hint.clone(), ..facts },
            None => facts,
        }
    }

    fn map(&self, file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        match &self.dynamic {
            Some(Dynamic { units, bitmaps: Some(bitmaps), .. }) => {
                let extent = units.map(offset, len);
                let Place::File(at) = extent.place else { return Ok(extent) };
                let Table { block, bitmap, .. } = units.format();
                let within = offset % block;
                let len = extent.len.min(block - within);
                let (own, len) = bitmaps.run(file, offset / block, at - within - bitmap, within, len)?;
                Ok(Extent { place: if own { Place::File(at) } else { Place::Absent }, len })
            }
            Some(dynamic) => Ok(dynamic.units.map(offset, len)),
            None => Ok(Extent { place: Place::File(offset), len }),
        }
    }

    fn before_write(&self, file: &dyn FileIo, offset: u64) -> io::Result<()> {
        let Some(dynamic) = self.dynamic.as_ref().filter(|d| d.bitmaps.is_none()) else { return Ok(()) };
        let table = dynamic.units.format();
        let block = offset / table.block;
        let full = &dynamic.full[block as usize];
        if !full.load(Ordering::Acquire) {
            if let Place::File(at) = dynamic.units.map(block * table.block, 1).place {
                file.write_at(at - table.bitmap, &vec![0xff; table.bitmap as usize])?;
            }
            full.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn begin(&self, file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Begin<'_>> {
        match &self.dynamic {
            Some(Dynamic { units, bitmaps: Some(bitmaps), .. }) => {
                // A new block starts without sectors of its own: its bitmap is zeros, as its storage.
                if let Begin::Allocated(block) = units.begin(file, offset)? {
                    block.commit();
                }
                let Table { block, bitmap, .. } = units.format();
                let within = offset % block;
                let Place::File(data) = units.map(offset - within, 1).place else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                bitmaps.begin(file, offset / block, data - bitmap, data, within, len)
            }
            Some(dynamic) => dynamic.units.begin(file, offset),
            None => Ok(Begin::Mapped),
        }
    }

    /// The format has no modification UUID.
    fn modified(&self, _file: &dyn FileIo) -> io::Result<()> {
        Ok(())
    }

    fn unpack(&self, _file: &dyn FileIo, _at: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        None
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        match &self.dynamic {
            Some(dynamic) => {
                if let Some(bitmaps) = &dynamic.bitmaps {
                    bitmaps.flush(file)?;
                }
                dynamic.units.flush(file)
            }
            None => file.sync(),
        }
    }

    fn compact(&self, file: &dyn FileIo, child: bool, step: Step<'_>) -> io::Result<bool> {
        match &self.dynamic {
            Some(Dynamic { units, bitmaps: None, .. }) => {
                units.compact(file, child, step)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn set_ids(&self, file: &dyn FileIo, ids: &Ids) -> io::Result<bool> {
        if ids.parent.is_some() && self.dynamic.as_ref().is_none_or(|d| d.bitmaps.is_none()) {
            return Ok(false);
        }
        if let Some(uuid) = ids.uuid {
            let mut footer = self.footer.raw;
            footer[68..84].copy_from_slice(&uuid.to_bytes_le());
            let sum = checksum(&footer, 64);
            footer[64..68].copy_from_slice(&sum.to_be_bytes());
            file.write_at(file.len()? - FOOTER as u64, &footer)?;
            if self.dynamic.is_some() {
                file.write_at(0, &footer)?;
            }
        }
        if let Some(parent) = ids.parent {
            let at = be64(&self.footer.raw, 16);
            let mut header = [0; HEADER];
            file.read_at(at, &mut header)?;
            header[40..56].copy_from_slice(&parent.to_bytes_le());
            let sum = checksum(&header, 36);
            header[36..40].copy_from_slice(&sum.to_be_bytes());
            file.write_at(at, &header)?;
        }
        // The format knows no modification UUIDs.
        Ok(true)
    }

    fn is_dirty(&self) -> bool {
        self.dynamic
            .as_ref()
            .is_some_and(|d| d.units.is_dirty() || d.bitmaps.as_ref().is_some_and(Bitmaps::is_dirty))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::MemoryFile;

    #[test]
    fn geometries_follow_the_specification() {
        // 504 MiB and 127 GiB as Virtual PC makes them.
        assert_eq!(geometry(504 << 20), [0x04, 0x00, 16, 63]);
        assert_eq!(geometry(136_899_993_600), [0xff, 0xff, 16, 255]);
    }

    #[test]
    fn a_lost_footer_is_replaced_by_the_copy_at_the_start() {
        let file = MemoryFile::default();
        create(&file, Variant::Dynamic, 8 << 20, Uuid::from_u128(5), None).unwrap();
        let len = file.len().unwrap();
        file.write_at(len - 512, &[0xff; 512]).unwrap();
        let vhd = Vhd::open(&file, Path::new("t")).ok().unwrap();
        assert_eq!(vhd.facts().uuid, Some(Uuid::from_u128(5)));
        file.write_at(100, &[1]).unwrap();
        assert!(Vhd::open(&file, Path::new("t")).is_err(), "its checksum is wrong");
    }
}
