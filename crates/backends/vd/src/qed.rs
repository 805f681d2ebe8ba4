//! QED images, for reading. All integers are little endian. Source: QEMU `docs/interop/qed_spec.rst`.
//!
//! ```text
//! 0 magic "QED\0"   4 cluster size   8 table size in clusters   12 header size in clusters   16 features u64
//! 24 compatible features u64   32 self-clearing features u64   40 first table u64   48 image size u64
//! 56 offset of the backing file's name   60 its length
//! ```

use std::io;
use std::path::Path;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Format, Layout, Place, Variant};
use crate::two_level::{Order, TwoLevel, invalid};

const BACKING: u64 = 1;
/// The image was not closed; its tables are sound unless it was written across a crash of the host.
const CHECK_NEEDED: u64 = 2;
const NO_PROBE: u64 = 4;
/// A table word for a cluster of zeros.
const ZERO: u64 = 1;

struct Header {
    cluster: u64,
    /// Bytes of a table.
    table: u64,
    first: u64,
    size: u64,
    backing: Option<String>,
}

fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: "restore the file from a copy" }
}

fn read_header(file: &dyn FileIo, path: &Path) -> Result<Header, Error> {
    let host = |e| Error::host("read from", path, e);
    let mut raw = [0; 64];
    file.read_at(0, &mut raw).map_err(host)?;
    let u32_at = |at: usize| u64::from(u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]));
    let u64_at = |at: usize| u32_at(at) | u32_at(at + 4) << 32;
    if &raw[..4] != b"QED\0" {
        let what = "the signature at offset 0x0 is missing".into();
        return Err(Error::WrongFormat { path: path.to_owned(), format: Format::Qed, what });
    }
    let (cluster, tables, headers, features) = (u32_at(4), u32_at(8), u32_at(12), u64_at(16));
    if features & !(BACKING | CHECK_NEEDED | NO_PROBE) != 0 {
        let what = format!("QED features 0x{features:x}");
        return Err(Error::Unsupported { path: path.to_owned(), what });
    }
    if !cluster.is_power_of_two() || !(1 << 12..=1 << 26).contains(&cluster) {
        return Err(damaged(path, 4, format!("cluster size 0x{cluster:x}")));
    }
    if !tables.is_power_of_two() || tables > 16 {
        return Err(damaged(path, 8, format!("tables of {tables} clusters")));
    }
    let header =
        Header { cluster, table: tables * cluster, first: u64_at(40), size: u64_at(48), backing: None };
    let words = header.table / 8;
    let most = words.saturating_mul(words).saturating_mul(cluster);
    if header.size > most || !header.size.is_multiple_of(512) {
        return Err(damaged(path, 48, format!("an image size of {} bytes", header.size)));
    }
    let file_len = file.len().map_err(host)?;
    if !header.first.is_multiple_of(cluster)
        || header.first.checked_add(header.table).is_none_or(|end| end > file_len)
    {
        return Err(damaged(
            path,
            40,
            format!("the first table at 0x{:x} lies past the file's end", header.first),
        ));
    }
    if features & BACKING == 0 {
        return Ok(header);
    }
    let (at, len) = (u32_at(56), u32_at(60));
    if len > 1023 || at + len > headers.saturating_mul(cluster) {
        return Err(damaged(path, 56, "the name of the backing file lies outside the header".into()));
    }
    let mut name = vec![0; len as usize];
    file.read_at(at, &mut name).map_err(host)?;
    Ok(Header { backing: Some(String::from_utf8_lossy(&name).into_owned()), ..header })
}

fn facts(header: &Header) -> Facts {
    let variant = if header.backing.is_some() { Variant::Differencing } else { Variant::Dynamic };
    Facts { parent_hint: header.backing.clone(), ..Facts::new(variant, header.size) }
}

pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    read_header(file, path).map(|header| facts(&header))
}

/// A QED image at work.
pub(crate) struct Qed {
    header: Header,
    tables: TwoLevel,
    file_len: u64,
}

impl Qed {
    pub(crate) fn open(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let host = |e| Error::host("read from", path, e);
        let header = read_header(file, path)?;
        let mut first = vec![0; header.table as usize];
        file.read_at(header.first, &mut first).map_err(host)?;
        let tables = TwoLevel::new(Order::Little, header.table / 8, u64::MAX, Order::Little.words(&first));
        Ok(Self { header, tables, file_len: file.len().map_err(host)? })
    }
}

impl Layout for Qed {
    fn facts(&self) -> Facts {
        facts(&self.header)
    }

    fn map(&self, file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        let cluster = self.header.cluster;
        let (word, _) = self.tables.word(file, offset / cluster)?;
        let within = offset % cluster;
        let place = match word {
            0 => Place::Absent,
            ZERO => Place::Zero,
            at if at.is_multiple_of(cluster) && at < self.file_len => Place::File(at + within),
            at => return Err(invalid(format!("a cluster at 0x{at:x} lies outside the file"))),
        };
        Ok(Extent { place, len: len.min(cluster - within) })
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        Some("writing to QED images; clone it to VDI or QCOW2")
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

    fn unpack(&self, _file: &dyn FileIo, _at: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self, _file: &dyn FileIo) -> io::Result<()> {
        Ok(())
    }

    fn is_dirty(&self) -> bool {
        false
    }
}
