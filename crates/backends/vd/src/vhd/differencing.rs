//! Which sectors of a differencing image's blocks are its own.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use parking_lot::Mutex;

use super::{SECTOR, Table};
use crate::file::FileIo;
use crate::format::{Allocation, Begin, Extent, Place};
use crate::units::Units;

/// The bits of one block's sectors, highest bit of a byte first.
struct Bitmap(Box<[AtomicU8]>);

impl Bitmap {
    fn bit(&self, sector: u64) -> bool {
        let byte = self.0.get((sector / 8) as usize).map_or(0, |b| b.load(Ordering::Acquire));
        byte & 0x80 >> (sector % 8) != 0
    }

    fn set(&self, sector: u64) {
        if let Some(byte) = self.0.get((sector / 8) as usize) {
            byte.fetch_or(0x80 >> (sector % 8), Ordering::AcqRel);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|b| b.load(Ordering::Acquire)).collect()
    }
}

/// The bitmaps of a differencing image, read when their block is first used.
pub(super) struct Bitmaps {
    /// Bytes of a block and of its bitmap.
    block: u64,
    len: u64,
    loaded: Mutex<HashMap<u64, Arc<Bitmap>>>,
    /// Blocks whose bitmaps in the file are older than those here, and where those lie.
    pending: Mutex<BTreeSet<(u64, u64)>>,
    failed: AtomicBool,
}

impl Bitmaps {
    pub(super) fn new(block: u64, len: u64) -> Self {
        Self {
            block,
            len,
            loaded: Mutex::default(),
            pending: Mutex::default(),
            failed: AtomicBool::new(false),
        }
    }

    /// The bitmap of the block whose data start at file offset `data`.
    fn load(&self, file: &dyn FileIo, block: u64, data: u64) -> io::Result<Arc<Bitmap>> {
        let mut loaded = self.loaded.lock();
        if let Some(bitmap) = loaded.get(&block) {
            return Ok(bitmap.clone());
        }
        let mut bytes = vec![0; self.len as usize];
        file.read_at(data - self.len, &mut bytes)?;
        let bitmap = Arc::new(Bitmap(bytes.into_iter().map(AtomicU8::new).collect()));
        loaded.insert(block, bitmap.clone());
        Ok(bitmap)
    }

    pub(super) fn map(
        &self,
        file: &dyn FileIo,
        units: &Units<Table>,
        offset: u64,
        len: u64,
    ) -> io::Result<Extent> {
        let extent = units.map(offset, len);
        let Place::File(at) = extent.place else { return Ok(extent) };
        let within = offset % self.block;
        let bitmap = self.load(file, offset / self.block, at - within)?;
        let own = bitmap.bit(within / SECTOR);
        let mut end = (within / SECTOR + 1) * SECTOR;
        while end < within + extent.len && bitmap.bit(end / SECTOR) == own {
            end += SECTOR;
        }
        let len = extent.len.min(end - within);
        Ok(Extent { place: if own { Place::File(at) } else { Place::Absent }, len })
    }

    pub(super) fn begin<'a>(
        &'a self,
        file: &dyn FileIo,
        units: &'a Units<Table>,
        offset: u64,
        len: u64,
    ) -> io::Result<Begin<'a>> {
        // A new block starts without sectors of its own: its bitmap is zeros, as its storage.
        if let Begin::Allocated(block) = units.begin(file, offset)? {
            block.commit();
        }
        let within = offset % self.block;
        let Place::File(at) = units.map(offset - within, 1).place else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let number = offset / self.block;
        let bitmap = self.load(file, number, at)?;
        let first = within / SECTOR;
        let count = (within + len).min(self.block).div_ceil(SECTOR) - first;
        let sectors = Sectors { bitmaps: self, bitmap, number, data: at, first, count };
        Ok(Begin::Allocated(Box::new(sectors)))
    }

    /// Makes sectors written so far durable, then writes the bitmaps that name them.
    pub(super) fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        let pending = std::mem::take(&mut *self.pending.lock());
        if pending.is_empty() {
            return Ok(());
        }
        // As they are now: bits that are set while data are made durable wait for the next time.
        let loaded = self.loaded.lock();
        let now: Vec<(u64, Vec<u8>)> =
            pending.into_iter().filter_map(|(block, at)| Some((at, loaded.get(&block)?.bytes()))).collect();
        drop(loaded);
        let result =
            file.sync().and_then(|()| now.iter().try_for_each(|(at, bytes)| file.write_at(*at, bytes)));
        self.failed.store(result.is_err(), Ordering::Release);
        result
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.pending.lock().is_empty()
    }
}

/// Sectors of a block that are about to be the image's own.
struct Sectors<'a> {
    bitmaps: &'a Bitmaps,
    bitmap: Arc<Bitmap>,
    /// Number of the block, and where its data lie.
    number: u64,
    data: u64,
    first: u64,
    count: u64,
}

impl Allocation for Sectors<'_> {
    fn start(&self) -> u64 {
        self.number * self.bitmaps.block + self.first * SECTOR
    }

    fn len(&self) -> u64 {
        self.count * SECTOR
    }

    fn file_offset(&self) -> u64 {
        self.data + self.first * SECTOR
    }

    fn commit(self: Box<Self>) {
        for sector in self.first..self.first + self.count {
            self.bitmap.set(sector);
        }
        self.bitmaps.pending.lock().insert((self.number, self.data - self.bitmaps.len));
    }
}
