//! VDI, VirtualBox's own image format: a header, a map with one 32-bit word for each block, then the blocks in the
//! order in which they were first written.
//!
//! **What we write.** Version 1.1, map and data aligned to 1 MiB, blocks of 1 MiB, as VirtualBox does.
//!
//! **Order of writes.** A new block's content is written first. Its map word and the header's count go to the file with the
//! next flush, after the data have been made durable, and are made durable before the flush returns. So the map in the file
//! never names a block that does not exist. The header's count is only a hint: the next free block follows from the map.
//!
//! Blocks never move while an image is open, so readers take no lock: a map word changes once, from "nowhere" to its
//! place, after the content is there.

mod header;
#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;
use vbox_types::ByteSize;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Allocation, Begin, Extent, Facts, Format, Layout, Place, Variant};
pub(crate) use header::is_vdi;
use header::{BLOCKS_ALLOCATED_AT, HEADER_END, Header, MODIFICATION_AT, kind};

/// Map word: not in this image.
const FREE: u32 = u32::MAX;
/// Map word: reads as zeros.
const ZERO: u32 = u32::MAX - 1;

const BLOCK_SIZE: u32 = 1 << 20;
const ALIGN: u64 = 1 << 20;
/// Most words of a map that we load: 64 TiB in blocks of 1 MiB.
const MAX_BLOCKS: u32 = 1 << 26;

const RESTORE: &str = "restore the file from a copy";

pub(crate) struct Vdi {
    header: Header,
    /// The map; word `i` tells where virtual block `i` lies.
    map: Box<[AtomicU32]>,
    alloc: Mutex<Alloc>,
    flush: Mutex<FlushState>,
    dirty: AtomicBool,
}

struct Alloc {
    /// The first block number in the file that no map word names.
    next: u32,
    /// Length of the file as far as we wrote it.
    file_len: u64,
    /// Virtual block numbers whose map words are not in the file yet.
    pending: Vec<u32>,
    modification: Uuid,
}

#[derive(Default)]
struct FlushState {
    /// The host lost data it had accepted: nothing can be promised any more.
    failed: bool,
}

fn damaged(path: &Path, offset: u64, what: String, mend: &'static str) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend }
}

fn read_header(file: &dyn FileIo, path: &Path) -> Result<Header, Error> {
    let mut bytes = [0; HEADER_END];
    file.read_at(0, &mut bytes).map_err(|e| Error::host("read from", path, e))?;
    if !is_vdi(&bytes) {
        return Err(Error::WrongFormat {
            path: path.to_owned(),
            format: Format::Vdi,
            what: "the signature at offset 0x40 is missing".into(),
        });
    }
    Header::parse(&bytes).map_err(|refusal| {
        if refusal.unsupported {
            Error::Unsupported { path: path.to_owned(), what: refusal.what }
        } else {
            damaged(path, refusal.at, refusal.what, RESTORE)
        }
    })
}

fn some(uuid: Uuid) -> Option<Uuid> {
    (!uuid.is_nil()).then_some(uuid)
}

fn facts(header: &Header) -> Facts {
    Facts {
        variant: match header.kind {
            kind::FIXED => Variant::Fixed,
            kind::UNDO | kind::DIFFERENCING => Variant::Differencing,
            _ => Variant::Dynamic,
        },
        size: ByteSize(header.disk_size),
        uuid: some(header.uuid),
        modification: some(header.modification),
        parent: some(header.parent),
        parent_modification: some(header.parent_modification),
        comment: header.comment.clone(),
    }
}

/// The facts in a VDI file's header, without its map.
pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    read_header(file, path).map(|h| facts(&h))
}

/// What a new VDI file is to be.
pub(crate) struct NewVdi {
    pub(crate) variant: Variant,
    pub(crate) size: u64,
    pub(crate) uuid: Uuid,
    /// UUID and modification UUID of the parent.
    pub(crate) parent: Option<(Uuid, Uuid)>,
    pub(crate) comment: String,
}

/// Writes a new image into an empty file. `progress` is called with bytes done and to do.
pub(crate) fn create(file: &dyn FileIo, new: &NewVdi) -> Result<(), CreateError> {
    let blocks = new.size.div_ceil(BLOCK_SIZE.into());
    let Some(blocks) = u32::try_from(blocks).ok().filter(|&b| b <= MAX_BLOCKS) else {
        return Err(CreateError::TooLarge);
    };
    let map_offset = ALIGN;
    let data_offset = (map_offset + 4 * u64::from(blocks)).next_multiple_of(ALIGN);
    let fixed = new.variant == Variant::Fixed;
    let (parent, parent_modification) = new.parent.unwrap_or_default();
    let header = Header {
        kind: match new.variant {
            Variant::Dynamic => kind::DYNAMIC,
            Variant::Fixed => kind::FIXED,
            Variant::Differencing => kind::DIFFERENCING,
        },
        flags: 0,
        comment: new.comment.clone(),
        map_offset: map_offset as u32,
        data_offset: u32::try_from(data_offset).map_err(|_| CreateError::TooLarge)?,
        disk_size: new.size,
        block_size: BLOCK_SIZE,
        block_extra: 0,
        blocks,
        blocks_allocated: if fixed { blocks } else { 0 },
        uuid: new.uuid,
        modification: Uuid::new_v4(),
        parent,
        parent_modification,
    };
    if fixed {
        file.reserve(0, data_offset + u64::from(blocks) * u64::from(BLOCK_SIZE))
            .map_err(CreateError::Host)?;
    } else {
        file.set_len(data_offset).map_err(CreateError::Host)?;
    }
    let mut words = Vec::with_capacity(1 << 20);
    let mut first = 0;
    while first < blocks {
        let end = blocks.min(first + (1 << 18));
        words.clear();
        for block in first..end {
            words.extend_from_slice(&if fixed { block } else { FREE }.to_le_bytes());
        }
        file.write_at(map_offset + 4 * u64::from(first), &words).map_err(CreateError::Host)?;
        first = end;
    }
    // The signature comes last: a file that was not finished is no image.
    file.sync().map_err(CreateError::Host)?;
    file.write_at(0, &header.to_bytes()).map_err(CreateError::Host)?;
    file.sync().map_err(CreateError::Host)
}

/// Why [`create`] failed.
pub(crate) enum CreateError {
    TooLarge,
    Host(io::Error),
}

impl Vdi {
    /// Reads and checks header and map.
    pub(crate) fn open(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let header = read_header(file, path)?;
        let host = |e| Error::host("read from", path, e);
        let file_len = file.len().map_err(host)?;
        let map_offset = u64::from(header.map_offset);
        let map_len = 4 * u64::from(header.blocks);
        // The file's size bounds what is allocated below.
        if map_offset + map_len > file_len {
            let what =
                format!("the block map of {map_len} bytes reaches past the file's end at 0x{file_len:x}");
            return Err(damaged(path, map_offset, what, RESTORE));
        }
        if header.blocks > MAX_BLOCKS {
            let what = format!("a block map of {} words, more than {MAX_BLOCKS}", header.blocks);
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        let mut bytes = vec![0; map_len as usize];
        file.read_at(map_offset, &mut bytes).map_err(host)?;
        let words = bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));

        let stride = u64::from(header.block_size) + u64::from(header.block_extra);
        let in_file = file_len.saturating_sub(header.data_offset.into()).div_ceil(stride);
        // Blocks that nothing names may lie between, but not arbitrarily many: this bounds the bitmap.
        let limit = in_file.min(64 * u64::from(header.blocks) + 4096);
        let mut seen = vec![0u64; (limit as usize).div_ceil(64)];
        let mut next = 0;
        for (index, word) in words.clone().enumerate().filter(|&(_, w)| w < ZERO) {
            let at = map_offset + 4 * index as u64;
            if u64::from(word) >= in_file {
                let what = format!(
                    "block {index} should lie at 0x{:x}, past the file's end at 0x{file_len:x}",
                    u64::from(header.data_offset) + u64::from(word) * stride
                );
                return Err(damaged(path, at, what, RESTORE));
            }
            if u64::from(word) >= limit {
                let what =
                    format!("block {index} lies at block {word} of the file, behind mostly unused space");
                return Err(damaged(path, at, what, RESTORE));
            }
            let (slot, bit) = ((word / 64) as usize, 1 << (word % 64));
            if seen[slot] & bit != 0 {
                let what = format!("block {index} shares block {word} of the file with another one");
                return Err(damaged(path, at, what, RESTORE));
            }
            seen[slot] |= bit;
            next = next.max(word + 1);
        }
        let map = words.map(AtomicU32::new).collect();
        let modification = header.modification;
        Ok(Self {
            header,
            map,
            alloc: Mutex::new(Alloc { next, file_len, pending: Vec::new(), modification }),
            flush: Mutex::default(),
            dirty: AtomicBool::new(false),
        })
    }

    fn block_offset(&self, word: u32) -> u64 {
        let stride = u64::from(self.header.block_size) + u64::from(self.header.block_extra);
        u64::from(self.header.data_offset) + u64::from(word) * stride + u64::from(self.header.block_extra)
    }

    fn write_pending(&self, file: &dyn FileIo, pending: &mut [u32], count: u32) -> io::Result<()> {
        pending.sort_unstable();
        for run in pending.chunk_by(|a, b| a + 1 == *b) {
            let mut words = Vec::with_capacity(4 * run.len());
            for &block in run {
                words.extend_from_slice(&self.map[block as usize].load(Ordering::Acquire).to_le_bytes());
            }
            file.write_at(u64::from(self.header.map_offset) + 4 * u64::from(run[0]), &words)?;
        }
        file.write_at(BLOCKS_ALLOCATED_AT, &count.to_le_bytes())
    }
}

impl Layout for Vdi {
    fn facts(&self) -> Facts {
        Facts { modification: some(self.alloc.lock().modification), ..facts(&self.header) }
    }

    fn map(&self, offset: u64, len: u64) -> Extent {
        let size = u64::from(self.header.block_size);
        let within = offset % size;
        let len = len.min(size - within);
        let word = self.map.get((offset / size) as usize).map_or(FREE, |w| w.load(Ordering::Acquire));
        let place = match word {
            FREE => Place::Absent,
            ZERO => Place::Zero,
            word => Place::File(self.block_offset(word) + within),
        };
        Extent { place, len }
    }

    fn begin(&self, file: &dyn FileIo, offset: u64) -> io::Result<Begin<'_>> {
        let size = u64::from(self.header.block_size);
        let block = (offset / size) as u32;
        let mut alloc = self.alloc.lock();
        if self.map[block as usize].load(Ordering::Acquire) < ZERO {
            return Ok(Begin::Mapped);
        }
        let word = alloc.next;
        if word >= ZERO {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let file_offset = self.block_offset(word);
        let end = file_offset + size;
        if alloc.file_len < end {
            file.set_len(end)?;
        }
        let start = file_offset - u64::from(self.header.block_extra);
        if alloc.file_len > start {
            // Left behind by a write that was not finished.
            file.zero(start, alloc.file_len.min(end) - start)?;
        }
        alloc.file_len = alloc.file_len.max(end);
        Ok(Begin::Allocated(Box::new(NewBlock { vdi: self, alloc, block, word })))
    }

    fn modified(&self, file: &dyn FileIo) -> io::Result<()> {
        let uuid = Uuid::new_v4();
        file.write_at(MODIFICATION_AT, &uuid.to_bytes_le())?;
        self.alloc.lock().modification = uuid;
        Ok(())
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        let mut state = self.flush.lock();
        if state.failed {
            return Err(io::Error::other("an earlier flush failed"));
        }
        let (mut pending, count) = {
            let mut alloc = self.alloc.lock();
            self.dirty.store(false, Ordering::Release);
            (std::mem::take(&mut alloc.pending), alloc.next)
        };
        let result = file.sync().and_then(|()| {
            if pending.is_empty() {
                return Ok(());
            }
            self.write_pending(file, &mut pending, count)?;
            file.sync()
        });
        state.failed = result.is_err();
        result
    }

    fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }
}

/// A block at the end of the file that no map word names yet. Holds the allocation lock, so the next one waits.
struct NewBlock<'a> {
    vdi: &'a Vdi,
    alloc: MutexGuard<'a, Alloc>,
    block: u32,
    word: u32,
}

impl Allocation for NewBlock<'_> {
    fn start(&self) -> u64 {
        u64::from(self.block) * u64::from(self.vdi.header.block_size)
    }

    fn len(&self) -> u64 {
        self.vdi.header.block_size.into()
    }

    fn file_offset(&self) -> u64 {
        self.vdi.block_offset(self.word)
    }

    fn commit(mut self: Box<Self>) {
        self.alloc.next = self.word + 1;
        self.alloc.pending.push(self.block);
        self.vdi.dirty.store(true, Ordering::Release);
        self.vdi.map[self.block as usize].store(self.word, Ordering::Release);
    }
}
