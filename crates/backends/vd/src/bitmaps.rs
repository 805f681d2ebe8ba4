//! Which sectors of a differencing image's blocks are its own, for formats that keep a bit for each.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use parking_lot::Mutex;

use crate::file::FileIo;
use crate::format::{Allocation, Begin};

/// Which bit of a byte stands for the first of eight sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    Highest,
    Lowest,
}

/// The bits of one block's sectors.
struct Bitmap(Box<[AtomicU8]>);

impl Bitmap {
    fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|b| b.load(Ordering::Acquire)).collect()
    }
}

/// The bitmaps of a differencing image, read when their block is first used.
pub(crate) struct Bitmaps {
    /// Bytes of a block, of a sector and of a block's bitmap.
    block: u64,
    sector: u64,
    len: u64,
    first: First,
    loaded: Mutex<HashMap<u64, Arc<Bitmap>>>,
    /// Blocks whose bitmaps in the file are older than those here, and where those lie.
    pending: Mutex<BTreeSet<(u64, u64)>>,
    failed: AtomicBool,
}

impl Bitmaps {
    pub(crate) fn new(block: u64, sector: u64, len: u64, first: First) -> Self {
        Self {
            block,
            sector,
            len,
            first,
            loaded: Mutex::default(),
            pending: Mutex::default(),
            failed: AtomicBool::new(false),
        }
    }

    fn mask(&self, sector: u64) -> u8 {
        match self.first {
            First::Highest => 0x80 >> (sector % 8),
            First::Lowest => 1 << (sector % 8),
        }
    }

    fn bit(&self, bitmap: &Bitmap, sector: u64) -> bool {
        let byte = bitmap.0.get((sector / 8) as usize).map_or(0, |b| b.load(Ordering::Acquire));
        byte & self.mask(sector) != 0
    }

    /// The bitmap of the block, which lies at file offset `at`.
    fn load(&self, file: &dyn FileIo, block: u64, at: u64) -> io::Result<Arc<Bitmap>> {
        let mut loaded = self.loaded.lock();
        if let Some(bitmap) = loaded.get(&block) {
            return Ok(bitmap.clone());
        }
        let mut bytes = vec![0; self.len as usize];
        file.read_at(at, &mut bytes)?;
        let bitmap = Arc::new(Bitmap(bytes.into_iter().map(AtomicU8::new).collect()));
        loaded.insert(block, bitmap.clone());
        Ok(bitmap)
    }

    /// Whether the sector at `within` of a block is the image's own, and for how many of the `len` bytes from there on that holds.
    /// The block's bitmap lies at `at`.
    pub(crate) fn run(
        &self,
        file: &dyn FileIo,
        block: u64,
        at: u64,
        within: u64,
        len: u64,
    ) -> io::Result<(bool, u64)> {
        let bitmap = self.load(file, block, at)?;
        let own = self.bit(&bitmap, within / self.sector);
        let mut end = (within / self.sector + 1) * self.sector;
        while end < within + len && self.bit(&bitmap, end / self.sector) == own {
            end += self.sector;
        }
        Ok((own, len.min(end - within)))
    }

    /// Begins to make the sectors of `len` bytes at `within` of a block its own. The block's data lie at `data`.
    pub(crate) fn begin(
        &self,
        file: &dyn FileIo,
        block: u64,
        at: u64,
        data: u64,
        within: u64,
        len: u64,
    ) -> io::Result<Begin<'_>> {
        let bitmap = self.load(file, block, at)?;
        let first = within / self.sector;
        let count = (within + len).min(self.block).div_ceil(self.sector) - first;
        Ok(Begin::Allocated(Box::new(Sectors {
            bitmaps: self,
            bitmap,
            number: block,
            at,
            data,
            first,
            count,
        })))
    }

    /// Makes sectors written so far durable, then writes the bitmaps that name them.
    pub(crate) fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
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

    pub(crate) fn is_dirty(&self) -> bool {
        !self.pending.lock().is_empty()
    }
}

/// Sectors of a block that are about to be the image's own.
struct Sectors<'a> {
    bitmaps: &'a Bitmaps,
    bitmap: Arc<Bitmap>,
    /// Number of the block, and where its bitmap and its data lie.
    number: u64,
    at: u64,
    data: u64,
    first: u64,
    count: u64,
}

impl Allocation for Sectors<'_> {
    fn start(&self) -> u64 {
        self.number * self.bitmaps.block + self.first * self.bitmaps.sector
    }

    fn len(&self) -> u64 {
        self.count * self.bitmaps.sector
    }

    fn file_offset(&self) -> u64 {
        self.data + self.first * self.bitmaps.sector
    }

    fn commit(self: Box<Self>) {
        for sector in self.first..self.first + self.count {
            if let Some(byte) = self.bitmap.0.get((sector / 8) as usize) {
                byte.fetch_or(self.bitmaps.mask(sector), Ordering::AcqRel);
            }
        }
        self.bitmaps.pending.lock().insert((self.number, self.at));
    }
}
