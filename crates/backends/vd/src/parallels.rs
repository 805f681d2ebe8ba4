//! Parallels disk images. All integers are little endian. Source: QEMU `docs/interop/parallels.txt`.
//!
//! ```text
//! 0  magic, 16 bytes   16 version 2   20 heads   24 cylinders   28 sectors in a cluster   32 words of the map
//! 36 disk size in sectors u64   44 in use   48 data from this sector on   52 flags   56 extension u64   64 map
//! ```
//!
//! A map word names a sector, in files with the magic "WithouFreSpacExt" a multiple of the cluster size; 0 is "not there".
//! New images have the other magic, which every program reads, and clusters of 1 MiB.

use std::io;
use std::ops::Range;
use std::path::Path;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Format, Layout, Place, Step, Variant};
use crate::units::{MapFault, UnitFormat, Units, words_from, words_to};

const SECTOR: u64 = 512;
const MAGIC: &[u8] = b"WithoutFreeSpace";
const MAGIC_EXTENDED: &[u8] = b"WithouFreSpacExt";
const MAP_AT: u64 = 64;
const NEW_CLUSTER: u64 = 2048;
/// Largest image that is made: map words name sectors.
const MAX_SIZE: u64 = 2 << 40;
const RESTORE: &str = "restore the file from a copy";

struct Header {
    /// Bytes of a cluster, and bytes that a map word counts.
    cluster: u64,
    scale: u64,
    words: u64,
    size: u64,
    data: u64,
}

fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: RESTORE }
}

fn read_header(file: &dyn FileIo, path: &Path) -> Result<Header, Error> {
    let mut raw = [0; 64];
    file.read_at(0, &mut raw).map_err(|e| Error::host("read from", path, e))?;
    let u32_at = |at: usize| u64::from(u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]));
    let extended = raw.starts_with(MAGIC_EXTENDED);
    if !extended && !raw.starts_with(MAGIC) {
        let what = "the signature at offset 0x0 is missing".into();
        return Err(Error::WrongFormat { path: path.to_owned(), format: Format::Parallels, what });
    }
    if u32_at(16) != 2 {
        let what = format!("Parallels image version {}", u32_at(16));
        return Err(Error::Unsupported { path: path.to_owned(), what });
    }
    let (sectors, words) = (u32_at(28), u32_at(32));
    if sectors == 0 || sectors > 1 << 19 {
        return Err(damaged(path, 28, format!("clusters of {sectors} sectors")));
    }
    // The old kind has 32 bits of size, whatever follows them.
    let size = u32_at(36) | if extended { u32_at(40) << 32 } else { 0 };
    if size.div_ceil(sectors) > words || size > 1 << 44 {
        return Err(damaged(path, 36, format!("a disk of {size} sectors in {words} clusters")));
    }
    let cluster = sectors * SECTOR;
    let scale = if extended { cluster } else { SECTOR };
    let data = (u32_at(48) * SECTOR).max(MAP_AT + 4 * words);
    Ok(Header { cluster, scale, words, size: size * SECTOR, data })
}

impl UnitFormat for Header {
    fn unit(&self) -> u64 {
        self.cluster
    }

    fn place(&self, word: u32) -> Place {
        if word == 0 { Place::Absent } else { Place::File(u64::from(word) * self.scale) }
    }

    fn storage(&self, word: u32) -> Range<u64> {
        let start = u64::from(word) * self.scale;
        start..start + self.cluster
    }

    fn word_from(&self, end: u64) -> Option<u32> {
        // Clusters stay aligned as other programs align them: from the start of the data on.
        u32::try_from(end.div_ceil(self.scale)).ok()
    }

    fn free_word(&self) -> u32 {
        0
    }

    fn write_words(&self, file: &dyn FileIo, first: u32, words: &[u32]) -> io::Result<()> {
        file.write_at(MAP_AT + 4 * u64::from(first), &words_to(words))
    }
}

fn facts(header: &Header) -> Facts {
    Facts::new(Variant::Dynamic, header.size)
}

pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    read_header(file, path).map(|header| facts(&header))
}

/// Writes a new image into an empty file; `Ok(false)` if it would be too large.
pub(crate) fn create(file: &dyn FileIo, size: u64) -> io::Result<bool> {
    if size >= MAX_SIZE {
        return Ok(false);
    }
    let sectors = size / SECTOR;
    let words = sectors.div_ceil(NEW_CLUSTER);
    let data = (MAP_AT + 4 * words).next_multiple_of(NEW_CLUSTER * SECTOR);
    let mut raw = [0; 64];
    let mut put = |at: usize, value: u64| raw[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    put(16, 2);
    put(20, 16);
    put(24, (sectors / (16 * 32)).max(1));
    put(28, NEW_CLUSTER);
    put(32, words);
    put(36, sectors);
    put(48, data / SECTOR);
    raw[..16].copy_from_slice(MAGIC);
    file.set_len(data)?;
    // The signature comes last: a file that was not finished is no image.
    file.sync()?;
    file.write_at(0, &raw)?;
    file.sync()?;
    Ok(true)
}

/// A Parallels image at work.
pub(crate) struct Parallels {
    units: Units<Header>,
}

impl Parallels {
    pub(crate) fn open(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let host = |e| Error::host("read from", path, e);
        let header = read_header(file, path)?;
        let file_len = file.len().map_err(host)?;
        if MAP_AT + 4 * header.words > file_len {
            let what = format!("the map of {} words reaches past the file's end", header.words);
            return Err(damaged(path, 32, what));
        }
        let mut bytes = vec![0; 4 * header.words as usize];
        file.read_at(MAP_AT, &mut bytes).map_err(host)?;
        let start = header.data;
        let units = Units::open(header, words_from(&bytes), start, file_len).map_err(|fault| {
            let (unit, what) = match fault {
                MapFault::Outside { unit, at } => {
                    (unit, format!("cluster {unit} at 0x{at:x} lies outside the data of the file"))
                }
                MapFault::Shared { unit, at } => {
                    (unit, format!("cluster {unit} shares its place at 0x{at:x} with another one"))
                }
            };
            damaged(path, MAP_AT + 4 * unit as u64, what)
        })?;
        Ok(Self { units })
    }
}

impl Layout for Parallels {
    fn facts(&self) -> Facts {
        facts(self.units.format())
    }

    fn map(&self, _file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        Ok(self.units.map(offset, len))
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        None
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, file: &dyn FileIo, offset: u64, _len: u64) -> io::Result<Begin<'_>> {
        self.units.begin(file, offset)
    }

    fn modified(&self, _file: &dyn FileIo) -> io::Result<()> {
        Ok(())
    }

    fn unpack(&self, _file: &dyn FileIo, _unit: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        self.units.flush(file)
    }

    fn is_dirty(&self) -> bool {
        self.units.is_dirty()
    }

    fn compact(&self, file: &dyn FileIo, child: bool, step: Step<'_>) -> io::Result<bool> {
        self.units.compact(file, child, step)?;
        Ok(true)
    }
}
