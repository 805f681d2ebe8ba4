//! Stream-optimized images: each grain is compressed behind a marker (first sector u64, size u32); tables follow the grains they
//! name, and the directory that counts is the one of the footer, the last sector but one. They are read at will, and
//! written once from start to end, so that the target may be a pipe or a place in an archive.

use std::io::{self, Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use super::descriptor::{Descriptor, NewVmdk, new_descriptor};
use super::header::{
    DESCRIPTOR_SECTORS, FLAG_ZERO_GRAINS, GRAIN_SECTORS, Header, MARKER, MAX_GRAINS, NewHeader, SECTOR,
    TABLE_ENTRIES, TABLE_SECTORS, load_tables,
};
use super::{facts, plain_name};
use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Layout, Place, Variant};
use crate::units::words_to;

/// Bytes of a grain.
pub(crate) const GRAIN: usize = (GRAIN_SECTORS * SECTOR) as usize;
/// Header flags: line ends can be tested; grains are compressed; there are markers.
const FLAGS: u32 = 1 | 1 << 16 | 1 << 17;
/// Directory offset in the header: see the footer.
const AT_END: u64 = u64::MAX;

/// Kinds of markers in front of metadata.
mod marker {
    pub(super) const END: u32 = 0;
    pub(super) const TABLE: u32 = 1;
    pub(super) const DIRECTORY: u32 = 2;
    pub(super) const FOOTER: u32 = 3;
}

/// Writes a stream-optimized image.
pub(crate) struct StreamWriter<'a> {
    out: &'a mut dyn Write,
    /// Sectors written so far.
    at: u64,
    header: NewHeader,
    grains: u64,
    /// Table number that is being filled, and its words.
    table: u64,
    words: Vec<u32>,
    directory: Vec<u32>,
}

impl<'a> StreamWriter<'a> {
    /// Writes header and descriptor; `None` if the image would be too large. `path` names the image in its descriptor.
    pub(crate) fn new(out: &'a mut dyn Write, path: &Path, new: &NewVmdk) -> io::Result<Option<Self>> {
        let capacity = new.size / SECTOR;
        let grains = capacity.div_ceil(GRAIN_SECTORS);
        if grains > MAX_GRAINS {
            return Ok(None);
        }
        let header = NewHeader {
            version: 3,
            flags: FLAGS,
            capacity,
            descriptor_sectors: DESCRIPTOR_SECTORS,
            second: 0,
            first: AT_END,
            overhead: GRAIN_SECTORS,
            compression: 1,
        };
        let line = format!("RW {capacity} SPARSE \"{}\"", plain_name(path));
        let mut text = new_descriptor(new, &[line]).into_bytes();
        text.truncate((DESCRIPTOR_SECTORS * SECTOR) as usize);
        let mut start = header.to_bytes().to_vec();
        start.extend_from_slice(&text);
        start.resize((GRAIN_SECTORS * SECTOR) as usize, 0);
        out.write_all(&start)?;
        let tables = grains.div_ceil(TABLE_ENTRIES.into()) as usize;
        Ok(Some(Self {
            out,
            at: GRAIN_SECTORS,
            header,
            grains,
            table: 0,
            words: vec![0; TABLE_ENTRIES as usize],
            directory: vec![0; tables],
        }))
    }

    /// Appends a grain compressed by [`pack`]. Grains come in rising order; those left out read as zeros.
    pub(crate) fn grain(&mut self, number: u64, packed: &[u8]) -> io::Result<()> {
        let table = number / u64::from(TABLE_ENTRIES);
        if number >= self.grains || table < self.table {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if table != self.table {
            self.end_table()?;
            self.table = table;
        }
        let sector = u32::try_from(self.at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = (number * GRAIN_SECTORS).to_le_bytes().to_vec();
        bytes.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        bytes.extend_from_slice(packed);
        self.sectors(bytes)?;
        self.words[(number % u64::from(TABLE_ENTRIES)) as usize] = sector;
        Ok(())
    }

    /// Writes what is left: tables, directory, footer, end. The number of bytes written altogether.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.end_table()?;
        let directory = words_to(&self.directory);
        self.marker((directory.len() as u64).div_ceil(SECTOR), marker::DIRECTORY)?;
        self.header.first = self.at;
        self.sectors(directory)?;
        self.marker(1, marker::FOOTER)?;
        self.sectors(self.header.to_bytes().to_vec())?;
        self.marker(0, marker::END)?;
        self.out.flush()?;
        Ok(self.at * SECTOR)
    }

    fn end_table(&mut self) -> io::Result<()> {
        if self.words.iter().all(|&word| word == 0) {
            return Ok(());
        }
        self.marker(TABLE_SECTORS, marker::TABLE)?;
        let sector = u32::try_from(self.at).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.directory[self.table as usize] = sector;
        self.sectors(words_to(&self.words))?;
        self.words.fill(0);
        Ok(())
    }

    fn marker(&mut self, sectors: u64, kind: u32) -> io::Result<()> {
        let mut bytes = sectors.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_le_bytes());
        self.sectors(bytes)
    }

    /// Writes whole sectors, the last one filled up with zeros.
    fn sectors(&mut self, mut bytes: Vec<u8>) -> io::Result<()> {
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        self.out.write_all(&bytes)?;
        self.at += bytes.len() as u64 / SECTOR;
        Ok(())
    }
}

/// Compresses a grain.
pub(crate) fn pack(grain: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::with_capacity(GRAIN / 2), Compression::default());
    encoder.write_all(grain)?;
    encoder.finish()
}

/// A stream-optimized image: read-only.
struct Packed {
    header: Header,
    descriptor: Descriptor,
    words: Vec<u32>,
}

pub(super) fn open(
    file: &dyn FileIo,
    path: &Path,
    header: Header,
    descriptor: Descriptor,
) -> Result<Box<dyn Layout>, Error> {
    let file_len = file.len().map_err(|e| Error::host("read from", path, e))?;
    let (_, words) = load_tables(file, path, &header, file_len)?;
    Ok(Box::new(Packed { header, descriptor, words }))
}

impl Packed {
    /// Bytes of a grain.
    fn unit(&self) -> u64 {
        self.header.grain * SECTOR
    }
}

impl Layout for Packed {
    fn facts(&self) -> Facts {
        let facts = facts(&self.descriptor, self.header.capacity * SECTOR);
        Facts { variant: Variant::StreamOptimized, ..facts }
    }

    fn map(&self, _file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        let unit = self.unit();
        let within = offset % unit;
        let place = match self.words.get((offset / unit) as usize) {
            None | Some(0) => Place::Absent,
            Some(1) if self.header.flags & FLAG_ZERO_GRAINS != 0 => Place::Zero,
            Some(&sector) => Place::Packed { unit: u64::from(sector) * SECTOR, skip: within },
        };
        Ok(Extent { place, len: len.min(unit - within) })
    }

    fn unpack(&self, file: &dyn FileIo, at: u64) -> io::Result<Vec<u8>> {
        let mut marker = [0; MARKER];
        file.read_at(at, &mut marker)?;
        let size = u64::from(u32::from_le_bytes([marker[8], marker[9], marker[10], marker[11]]));
        let unit = self.unit();
        // Deflate makes data that it cannot compress only a little larger.
        if size > 2 * unit || at + MARKER as u64 + size > file.len()? {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the size in a grain's marker is wrong"));
        }
        let mut packed = vec![0; size as usize];
        file.read_at(at + MARKER as u64, &mut packed)?;
        let mut out = Vec::new();
        flate2::read::ZlibDecoder::new(&packed[..]).take(unit).read_to_end(&mut out)?;
        Ok(out)
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        Some("writing to a compressed image; clone it to another variant")
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn begin(&self, _file: &dyn FileIo, _offset: u64, _len: u64) -> io::Result<Begin<'_>> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn modified(&self, _file: &dyn FileIo) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self, _file: &dyn FileIo) -> io::Result<()> {
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        false
    }
}
