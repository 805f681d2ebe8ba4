//! The header of a VDI file, version 1.1. All integers are little endian; UUIDs are stored with their first three
//! fields little endian. Source: VirtualBox `src/VBox/Storage/VDICore.h`.
//!
//! ```text
//! 0x000  text, 64 bytes            0x040  signature 0xbeda107f    0x044  version, major << 16 | minor
//! 0x048  header length from here   0x04c  type                    0x050  flags
//! 0x054  comment, 256 bytes        0x154  offset of block map     0x158  offset of data
//! 0x15c  legacy geometry, 4 × u32 (the last: bytes per sector)    0x16c  unused
//! 0x170  disk size u64             0x178  block size              0x17c  extra bytes in front of each block
//! 0x180  blocks                    0x184  blocks allocated
//! 0x188  UUID    0x198  modification UUID    0x1a8  parent UUID    0x1b8  parent's modification UUID
//! 0x1c8  logical geometry, 4 × u32 (only if the header length covers it)
//! ```

use uuid::Uuid;

pub(super) const SIGNATURE: u32 = 0xbeda_107f;
pub(super) const VERSION_1_1: u32 = 0x0001_0001;
/// Bytes from the start of the file to the end of the header that we write.
pub(super) const HEADER_END: usize = 0x1d8;
const TEXT: &[u8] = b"<<< Boxwood Virtual Disk Image >>>\n";
const SECTOR: u32 = 512;
/// Header lengths without and with the logical geometry.
const LEN_PLAIN: u32 = 0x180;
const LEN_GEOMETRY: u32 = 0x190;

/// Offset of the count of allocated blocks, the field that changes while the image is in use.
pub(super) const BLOCKS_ALLOCATED_AT: u64 = 0x184;
/// Offset of the modification UUID.
pub(super) const MODIFICATION_AT: u64 = 0x198;

/// Image types.
pub(super) mod kind {
    pub(crate) const DYNAMIC: u32 = 1;
    pub(crate) const FIXED: u32 = 2;
    pub(crate) const UNDO: u32 = 3;
    pub(crate) const DIFFERENCING: u32 = 4;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u32,
    pub(super) flags: u32,
    pub(super) comment: String,
    pub(super) map_offset: u32,
    pub(super) data_offset: u32,
    pub(super) disk_size: u64,
    pub(super) block_size: u32,
    pub(super) block_extra: u32,
    pub(super) blocks: u32,
    pub(super) blocks_allocated: u32,
    pub(super) uuid: Uuid,
    pub(super) modification: Uuid,
    pub(super) parent: Uuid,
    pub(super) parent_modification: Uuid,
}

fn u32_at(bytes: &[u8; HEADER_END], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn uuid_at(bytes: &[u8; HEADER_END], at: usize) -> Uuid {
    let mut raw = [0; 16];
    raw.copy_from_slice(&bytes[at..at + 16]);
    Uuid::from_bytes_le(raw)
}

/// Whether a file that starts with `head` is a VDI image.
pub(crate) fn is_vdi(head: &[u8]) -> bool {
    head.get(0x40..0x44) == Some(&SIGNATURE.to_le_bytes())
}

/// Why a header was refused: offset of the field and what is wrong with it.
pub(super) struct Refusal {
    pub(super) at: u64,
    pub(super) what: String,
    /// The header is sound but of a kind we do not know.
    pub(super) unsupported: bool,
}

impl Header {
    /// Reads the header's fields. Limits that concern the file's length are `Vdi::open`'s.
    pub(super) fn parse(bytes: &[u8; HEADER_END]) -> Result<Self, Refusal> {
        let damaged = |at: u64, what: String| Refusal { at, what, unsupported: false };
        let version = u32_at(bytes, 0x44);
        if version != VERSION_1_1 {
            let what = format!("VDI version {}.{} instead of 1.1", version >> 16, version & 0xffff);
            return Err(Refusal { at: 0x44, what, unsupported: true });
        }
        let len = u32_at(bytes, 0x48);
        if !(LEN_PLAIN..=0x400).contains(&len) {
            return Err(damaged(0x48, format!("header length 0x{len:x} is not between 0x180 and 0x400")));
        }
        let sector = u32_at(bytes, 0x168);
        if sector != SECTOR && sector != 0 {
            let what = format!("sectors of {sector} bytes instead of 512");
            return Err(Refusal { at: 0x168, what, unsupported: true });
        }
        let comment = &bytes[0x54..0x154];
        let comment = comment.split(|&b| b == 0).next().unwrap_or_default();
        let header = Self {
            kind: u32_at(bytes, 0x4c),
            flags: u32_at(bytes, 0x50),
            comment: String::from_utf8_lossy(comment).into_owned(),
            map_offset: u32_at(bytes, 0x154),
            data_offset: u32_at(bytes, 0x158),
            disk_size: u64::from(u32_at(bytes, 0x170)) | u64::from(u32_at(bytes, 0x174)) << 32,
            block_size: u32_at(bytes, 0x178),
            block_extra: u32_at(bytes, 0x17c),
            blocks: u32_at(bytes, 0x180),
            blocks_allocated: u32_at(bytes, 0x184),
            uuid: uuid_at(bytes, 0x188),
            modification: uuid_at(bytes, 0x198),
            parent: uuid_at(bytes, 0x1a8),
            parent_modification: uuid_at(bytes, 0x1b8),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Refusal> {
        let damaged = |at: u64, what: String| Err(Refusal { at, what, unsupported: false });
        if !(kind::DYNAMIC..=kind::DIFFERENCING).contains(&self.kind) {
            return damaged(0x4c, format!("unknown image type {}", self.kind));
        }
        if !self.block_size.is_power_of_two() || !(0x1000..=0x1000_0000).contains(&self.block_size) {
            return damaged(
                0x178,
                format!("block size 0x{:x} is not a power of two from 4 KiB to 256 MiB", self.block_size),
            );
        }
        if !self.block_extra.is_multiple_of(SECTOR) || self.block_extra > self.block_size {
            return damaged(0x17c, format!("0x{:x} extra bytes for each block", self.block_extra));
        }
        let needed = self.disk_size.div_ceil(u64::from(self.block_size));
        if u64::from(self.blocks) < needed {
            return damaged(
                0x180,
                format!("{} blocks do not hold the disk size of {} bytes", self.blocks, self.disk_size),
            );
        }
        if self.map_offset < HEADER_END as u32 - 16 || !self.map_offset.is_multiple_of(4) {
            return damaged(0x154, format!("block map at 0x{:x} lies in the header", self.map_offset));
        }
        let map_end = u64::from(self.map_offset) + 4 * u64::from(self.blocks);
        if u64::from(self.data_offset) < map_end {
            return damaged(
                0x158,
                format!(
                    "data at 0x{:x} starts before the block map's end at 0x{map_end:x}",
                    self.data_offset
                ),
            );
        }
        Ok(())
    }

    /// The header as bytes from the start of the file.
    pub(super) fn to_bytes(&self) -> [u8; HEADER_END] {
        let mut out = [0; HEADER_END];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, TEXT);
        put(0x40, &SIGNATURE.to_le_bytes());
        put(0x44, &VERSION_1_1.to_le_bytes());
        put(0x48, &LEN_GEOMETRY.to_le_bytes());
        put(0x4c, &self.kind.to_le_bytes());
        put(0x50, &self.flags.to_le_bytes());
        // 255 bytes and a terminator, cut between characters.
        let mut end = self.comment.len().min(255);
        while !self.comment.is_char_boundary(end) {
            end -= 1;
        }
        put(0x54, &self.comment.as_bytes()[..end]);
        put(0x154, &self.map_offset.to_le_bytes());
        put(0x158, &self.data_offset.to_le_bytes());
        put(0x168, &SECTOR.to_le_bytes());
        put(0x170, &self.disk_size.to_le_bytes());
        put(0x178, &self.block_size.to_le_bytes());
        put(0x17c, &self.block_extra.to_le_bytes());
        put(0x180, &self.blocks.to_le_bytes());
        put(0x184, &self.blocks_allocated.to_le_bytes());
        put(0x188, &self.uuid.to_bytes_le());
        put(0x198, &self.modification.to_bytes_le());
        put(0x1a8, &self.parent.to_bytes_le());
        put(0x1b8, &self.parent_modification.to_bytes_le());
        put(0x1d4, &SECTOR.to_le_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: kind::DYNAMIC,
            flags: 0,
            comment: "a disk".into(),
            map_offset: 0x10_0000,
            data_offset: 0x20_0000,
            disk_size: 5 << 20,
            block_size: 1 << 20,
            block_extra: 0,
            blocks: 5,
            blocks_allocated: 0,
            uuid: Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff),
            modification: Uuid::from_u128(2),
            parent: Uuid::nil(),
            parent_modification: Uuid::nil(),
        }
    }

    #[test]
    fn a_header_reads_back_as_written() {
        let bytes = header().to_bytes();
        assert!(is_vdi(&bytes));
        assert_eq!(Header::parse(&bytes).ok(), Some(header()));
        // Windows byte order of the first three fields.
        assert_eq!(bytes[0x188..0x190], [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]);
    }

    #[test]
    fn headers_that_contradict_themselves_are_refused_at_the_field() {
        let cases: [(&str, fn(&mut Header), u64); 6] = [
            ("type", |h| h.kind = 9, 0x4c),
            ("block size", |h| h.block_size = 0, 0x178),
            ("block size", |h| h.block_size = 3 << 20, 0x178),
            ("blocks", |h| h.blocks = 4, 0x180),
            ("map offset", |h| h.map_offset = 0x100, 0x154),
            ("data offset", |h| h.data_offset = h.map_offset, 0x158),
        ];
        for (name, spoil, at) in cases {
            let mut h = header();
            spoil(&mut h);
            assert_eq!(Header::parse(&h.to_bytes()).err().map(|r| r.at), Some(at), "{name}");
        }
    }
}
