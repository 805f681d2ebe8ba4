//! Apple disk images (UDIF), for reading. All integers are big endian. There is no public specification; source: VirtualBox
//! `src/VBox/Storage/DMG.cpp`, QEMU `block/dmg.c`.
//!
//! The last 512 bytes are a trailer with the signature "koly": start and length of an XML property list (at 216), and the number of
//! sectors (at 492). The list's "blkx" array holds, in base64, tables ("mish"): first sector (8), data offset (24), number of
//! chunks (200), then chunks of 40 bytes: kind, comment, first sector, sectors, file offset, length.
//!
//! Chunks of zeros, plain ones and ones packed by zlib are read; bzip2, LZFSE, LZMA and ADC are refused by name.

use std::io::{self, Read};
use std::path::Path;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Format, Layout, Place, Variant};

const SECTOR: u64 = 512;
const TRAILER: u64 = 512;
const MAX_LIST: u64 = 64 << 20;
/// Most sectors of one packed chunk.
const MAX_CHUNK: u64 = 1 << 17;
const RESTORE: &str = "fetch the file again";

mod kind {
    pub(super) const ZERO: u32 = 0;
    pub(super) const PLAIN: u32 = 1;
    pub(super) const IGNORED: u32 = 2;
    pub(super) const ZLIB: u32 = 0x8000_0005;
    pub(super) const COMMENT: u32 = 0x7fff_fffe;
    pub(super) const END: u32 = 0xffff_ffff;
}

struct Chunk {
    start: u64,
    end: u64,
    /// File offset and length.
    at: u64,
    len: u64,
    packed: bool,
}

/// A disk image at work.
pub(crate) struct Dmg {
    size: u64,
    /// By their places; what lies between them is zeros.
    chunks: Vec<Chunk>,
}

fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: RESTORE }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

fn read_trailer(file: &dyn FileIo, path: &Path) -> Result<([u8; TRAILER as usize], u64), Error> {
    let host = |e| Error::host("read from", path, e);
    let mut raw = [0; TRAILER as usize];
    let at = file.len().map_err(host)?.saturating_sub(TRAILER);
    file.read_at(at, &mut raw).map_err(host)?;
    if !raw.starts_with(b"koly") {
        let what = "the signature in the last 512 bytes is missing".into();
        return Err(Error::WrongFormat { path: path.to_owned(), format: Format::Dmg, what });
    }
    if be64(&raw, 492) > 1 << 44 {
        return Err(damaged(path, at + 492, format!("{} sectors", be64(&raw, 492))));
    }
    Ok((raw, at))
}

pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    let (trailer, _) = read_trailer(file, path)?;
    Ok(Facts::new(Variant::Dynamic, be64(&trailer, 492) * SECTOR))
}

/// What stands between tags in base64.
fn base64(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for c in text.bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => continue,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    out
}

impl Dmg {
    pub(crate) fn open(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let host = |e| Error::host("read from", path, e);
        let (trailer, trailer_at) = read_trailer(file, path)?;
        let size = be64(&trailer, 492) * SECTOR;
        let (list_at, list_len) = (be64(&trailer, 216), be64(&trailer, 224));
        if list_len > MAX_LIST || list_at.checked_add(list_len).is_none_or(|end| end > trailer_at) {
            return Err(damaged(path, trailer_at + 216, "the property list lies outside the file".into()));
        }
        let mut list = vec![0; list_len as usize];
        file.read_at(list_at, &mut list).map_err(host)?;
        let list = String::from_utf8_lossy(&list);
        let tables = list.split_once("<key>blkx</key>").map_or("", |(_, rest)| rest);
        let tables = tables.split_once("</array>").map_or(tables, |(inside, _)| inside);
        let mut chunks = Vec::new();
        let data = be64(&trailer, 24);
        for table in tables.split("<data>").skip(1) {
            let table = base64(table.split("</data>").next().unwrap_or_default());
            read_table(&table, data, trailer_at, path, &mut chunks)?;
        }
        chunks.sort_by_key(|chunk| chunk.start);
        if let Some(pair) = chunks.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(damaged(path, list_at, format!("two chunks for byte 0x{:x}", pair[1].start)));
        }
        chunks.retain(|chunk| chunk.start < size);
        Ok(Self { size, chunks })
    }
}

fn read_table(
    table: &[u8],
    data: u64,
    limit: u64,
    path: &Path,
    chunks: &mut Vec<Chunk>,
) -> Result<(), Error> {
    let bad = |what: String| damaged(path, limit, what);
    if !table.starts_with(b"mish") {
        return Err(bad("a table of chunks without its signature".into()));
    }
    let (first, count) = (be64(table, 8), be32(table, 200) as usize);
    for chunk in table.get(204..).unwrap_or_default().chunks_exact(40).take(count) {
        let packed = match be32(chunk, 0) {
            kind::PLAIN => false,
            kind::ZLIB => true,
            kind::ZERO | kind::IGNORED | kind::COMMENT => continue,
            kind::END => break,
            other => {
                let name = match other {
                    0x8000_0004 => "ADC",
                    0x8000_0006 => "bzip2",
                    0x8000_0007 => "LZFSE",
                    0x8000_0008 => "LZMA",
                    _ => "a method that is not known",
                };
                let what = format!("chunks compressed by {name}; convert it with qemu-img or dmg2img");
                return Err(Error::Unsupported { path: path.to_owned(), what });
            }
        };
        let sectors = be64(chunk, 16);
        let start = be64(chunk, 8).checked_add(first).filter(|&s| s < 1 << 45);
        let (Some(start), true) = (start, sectors < 1 << 45) else {
            return Err(bad("a chunk lies outside the disk".into()));
        };
        let len = be64(chunk, 32);
        let at = be64(chunk, 24).checked_add(data);
        let Some(at) = at.filter(|at| at.checked_add(len).is_some_and(|end| end <= limit)) else {
            return Err(bad(format!("the chunk for sector {start} lies outside the file")));
        };
        if packed && (sectors > MAX_CHUNK || len > 2 * MAX_CHUNK * SECTOR) {
            return Err(bad(format!("a packed chunk of {sectors} sectors")));
        }
        if sectors > 0 {
            let (start, end) = (start * SECTOR, (start + sectors) * SECTOR);
            // What a plain chunk lacks is zeros.
            let end = if packed { end } else { end.min(start + len) };
            chunks.push(Chunk { start, end, at, len, packed });
        }
    }
    Ok(())
}

impl Layout for Dmg {
    fn facts(&self) -> Facts {
        Facts::new(Variant::Dynamic, self.size)
    }

    fn map(&self, _file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        let index = self.chunks.partition_point(|chunk| chunk.end <= offset);
        Ok(match self.chunks.get(index) {
            Some(chunk) if chunk.start <= offset => {
                let skip = offset - chunk.start;
                let place = match chunk.packed {
                    true => Place::Packed { unit: index as u64 + 1, skip },
                    false => Place::File(chunk.at + skip),
                };
                Extent { place, len: len.min(chunk.end - offset) }
            }
            Some(chunk) => Extent { place: Place::Zero, len: len.min(chunk.start - offset) },
            None => Extent { place: Place::Zero, len },
        })
    }

    /// The unit's number is that of its chunk, counted from 1.
    fn unpack(&self, file: &dyn FileIo, unit: u64) -> io::Result<Vec<u8>> {
        let chunk = self.chunks.get(unit as usize - 1).ok_or(io::ErrorKind::InvalidInput)?;
        let mut packed = vec![0; chunk.len as usize];
        file.read_at(chunk.at, &mut packed)?;
        let mut out = Vec::new();
        flate2::read::ZlibDecoder::new(&packed[..]).take(chunk.end - chunk.start).read_to_end(&mut out)?;
        Ok(out)
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        Some("writing to Apple disk images; clone it to VDI")
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

#[cfg(test)]
pub(crate) mod sample;

#[cfg(test)]
mod tests {
    use super::sample::sample;
    use super::*;
    use crate::file::MemoryFile;
    use crate::image::{Image, OpenMode};

    fn open(bytes: &[u8]) -> Result<Image, Error> {
        let file = Box::new(MemoryFile::new(bytes));
        Image::from_file(file, Path::new("a.dmg"), OpenMode::ReadOnly, Format::Dmg, None)
    }

    #[test]
    fn plain_packed_and_missing_chunks_read_as_they_should() {
        let (file, model) = sample(kind::ZLIB);
        let image = open(&file).unwrap();
        let mut out = vec![1; model.len()];
        image.read(0, &mut out).unwrap();
        assert_eq!(out, model);
        let mut out = [1; 600];
        image.read(5 * 512 + 3, &mut out).unwrap();
        assert_eq!(out[..], model[5 * 512 + 3..5 * 512 + 603]);
    }

    #[test]
    fn other_compressions_are_named() {
        let error = open(&sample(0x8000_0006).0).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("bzip2")));
    }
}
