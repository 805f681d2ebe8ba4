//! Headers of QCOW (version 1) and QCOW2 (versions 2 and 3). All integers are big endian. Source: QEMU
//! `docs/interop/qcow2.txt`; for version 1 the layout that QEMU's `block/qcow.c` documents.
//!
//! ```text
//! version 1:      0 magic "QFI\xfb"  4 version  8 backing name u64  16 its length  20 mtime  24 size u64
//!                 32 cluster bits u8  33 second table's bits u8  36 encryption  40 first table u64
//! versions 2, 3:  8 backing name u64  16 its length  20 cluster bits  24 size u64  32 encryption
//!                 36 first table's length  40 first table u64  48 refcount table u64  56 its clusters
//!                 60 snapshots  64 snapshot table u64
//! version 3:      72 incompatible features u64  80 compatible u64  88 self-clearing u64  96 refcount order  100 header length
//!                 104 compression u8
//! ```

use std::path::Path;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Facts, Format, Variant};

pub(super) const MAGIC: &[u8] = b"QFI\xfb";
/// Largest first table: as much as QEMU takes.
const MAX_FIRST: u64 = 32 << 20;
/// Largest refcount table.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Incompatible features: refcounts may be wrong; the image is known to be damaged.
pub(super) const DIRTY: u64 = 1;
pub(super) const CORRUPT: u64 = 2;
/// Incompatible feature: clusters are compressed in another way than by deflate.
const COMPRESSION: u64 = 1 << 3;
/// Of a word of the first table: the offset.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    /// Words of a second table.
    pub(super) second_entries: u64,
    pub(super) first: u64,
    pub(super) first_entries: u64,
    pub(super) refcounts: u64,
    /// In clusters.
    pub(super) refcounts_len: u64,
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    pub(super) incompatible: u64,
    /// Compressed clusters are zstd frames, not deflate streams.
    pub(super) zstd: bool,
    pub(super) backing: Option<String>,
}

fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: "restore the file from a copy" }
}

impl Header {
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn read(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let host = |e| Error::host("read from", path, e);
        let mut raw = [0; 112];
        file.read_at(0, &mut raw).map_err(host)?;
        if !raw.starts_with(MAGIC) {
            let what = "the signature at offset 0x0 is missing".into();
            return Err(Error::WrongFormat { path: path.to_owned(), format: Format::Qcow, what });
        }
        let file_len = file.len().map_err(host)?;
        let u32_at = |at: usize| u32::from_be_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        let version = u32_at(4);
        let size = u64_at(24);
        let (cluster_bits, second_bits, encryption) = match version {
            1 => (u32::from(raw[32]), u32::from(raw[33]), u32_at(36)),
            2 | 3 => (u32_at(20), u32_at(20).wrapping_sub(3), u32_at(32)),
            _ => return Err(Error::unsupported(path, format!("QCOW version {version}"))),
        };
        if !(9..=21).contains(&cluster_bits) || !(6..=18).contains(&second_bits) {
            let what = format!("clusters of 2^{cluster_bits} bytes, tables of 2^{second_bits} words");
            return Err(damaged(path, if version == 1 { 32 } else { 20 }, what));
        }
        if encryption != 0 {
            return Err(Error::unsupported(path, "encrypted QCOW images"));
        }
        if size > 1 << 56 || !size.is_multiple_of(512) {
            return Err(damaged(path, 24, format!("an image size of {size} bytes")));
        }
        let second_entries = 1u64 << second_bits;
        let needed = size.div_ceil(second_entries << cluster_bits);
        let (first, first_entries) = match version {
            1 => (u64_at(40), needed),
            _ => (u64_at(40), u64::from(u32_at(36))),
        };
        if first_entries < needed || first_entries * 8 > MAX_FIRST {
            let what = format!("a first table of {first_entries} words for {needed}");
            return Err(damaged(path, 36, what));
        }
        let within = |at: u64, len: u64| at.checked_add(len).is_some_and(|end| end <= file_len);
        if first_entries > 0 && !within(first, first_entries * 8) {
            return Err(damaged(
                path,
                40,
                format!("the first table at 0x{first:x} lies past the file's end"),
            ));
        }
        let mut header = Self {
            version,
            cluster_bits,
            size,
            second_entries,
            first,
            first_entries,
            refcounts: 0,
            refcounts_len: 0,
            refcount_order: 4,
            snapshots: 0,
            incompatible: 0,
            zstd: false,
            backing: None,
        };
        if version > 1 {
            header.refcounts = u64_at(48);
            header.refcounts_len = u32_at(56).into();
            header.snapshots = u32_at(60);
            let len = header.refcounts_len << cluster_bits;
            if !header.refcounts.is_multiple_of(header.cluster())
                || header.refcounts == 0
                || len > MAX_REFCOUNT_TABLE
                || !within(header.refcounts, len)
            {
                let what = format!("the refcount table at 0x{:x} lies outside the file", header.refcounts);
                return Err(damaged(path, 48, what));
            }
        }
        if version == 3 {
            header.incompatible = u64_at(72);
            header.refcount_order = u32_at(96);
            if header.refcount_order > 6 {
                return Err(damaged(path, 96, format!("refcounts of 2^{} bits", header.refcount_order)));
            }
            let names = [(1 << 2, "an external data file"), (1 << 4, "extended tables")];
            if let Some((_, name)) = names.iter().find(|(bit, _)| header.incompatible & bit != 0) {
                return Err(Error::unsupported(path, format!("QCOW2 images with {name}")));
            }
            if header.incompatible & !(DIRTY | CORRUPT | COMPRESSION) != 0 {
                let what = format!("QCOW2 features 0x{:x}", header.incompatible);
                return Err(Error::unsupported(path, what));
            }
            if header.incompatible & COMPRESSION != 0 {
                // The field lies in the header if that is long enough.
                let kind = if u32_at(100) > 104 { raw[104] } else { 0 };
                header.zstd = match kind {
                    1 => true,
                    0 => return Err(damaged(path, 104, "no kind of compression".into())),
                    other => {
                        return Err(Error::unsupported(path, format!("QCOW2 compression number {other}")));
                    }
                };
            }
        }
        let (at, len) = (u64_at(8), u64::from(u32_at(16)));
        if at != 0 && len > 0 {
            if len > 1023 || !within(at, len) {
                return Err(damaged(path, 8, "the name of the backing file lies outside the header".into()));
            }
            let mut name = vec![0; len as usize];
            file.read_at(at, &mut name).map_err(host)?;
            header.backing = Some(String::from_utf8_lossy(&name).into_owned());
        }
        Ok(header)
    }

    pub(super) fn facts(&self) -> Facts {
        let variant = if self.backing.is_some() { Variant::Differencing } else { Variant::Dynamic };
        Facts { parent_hint: self.backing.clone(), ..Facts::new(variant, self.size) }
    }
}
