//! Host memory that guests see.
#![allow(unsafe_code)] // maps memory and copies to and from it while vCPUs run

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use cpum::VcpuLink;
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vbox_types::ByteSize;

/// The size of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes of a page that one bit of [`CodePage::granules`] stands for.
const GRANULE: u64 = PAGE_SIZE / 64;

/// What engines have decoded from one page.
#[derive(Default)]
pub struct CodePage {
    /// One bit for every 64 bytes from which code was decoded.
    granules: AtomicU64,
    /// Counts the writes that hit such bytes. Decoded code is valid while this stands where it stood.
    generation: AtomicU32,
}

impl CodePage {
    /// The write count that decoded code remembers and compares.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The counter itself, for generated code that compares it.
    pub fn generation_word(&self) -> &AtomicU32 {
        &self.generation
    }

    /// Whether any code was decoded from the page, so that writes must be traced.
    #[inline]
    pub fn has_code(&self) -> bool {
        self.granules.load(Ordering::SeqCst) != 0
    }

    /// Marks bytes `start..end` of the page (offsets within it) as decoded; true if the page had no code before, in which case
    /// the caller must shoot down writable translations of the page before it reads the bytes.
    pub fn mark(&self, start: u64, end: u64) -> bool {
        self.granules.fetch_or(granule_mask(start, end), Ordering::SeqCst) == 0
    }

    /// Whether code was decoded from bytes `start..end` of the page.
    pub fn hits(&self, start: u64, end: u64) -> bool {
        let granules = self.granules.load(Ordering::SeqCst);
        granules != 0 && granules & granule_mask(start, end) != 0
    }

    fn written(&self, start: u64, end: u64) -> bool {
        let hit = self.hits(start, end);
        if hit {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        hit
    }
}

/// The latest pages whose decoded code was overwritten, in all memories of the process, for engines that have such code in use
/// without looking at its [`CodePage`] each time.
///
/// vCPUs in guest code that looks at nothing but its kick word are kicked, so that they notice soon.
pub struct CodeWrites {
    count: AtomicU64,
    ring: [AtomicU64; Self::KEPT],
    /// Held while a page is noted; the vCPUs to kick.
    links: Mutex<Vec<Weak<VcpuLink>>>,
}

static CODE_WRITES: CodeWrites = CodeWrites {
    count: AtomicU64::new(0),
    ring: [const { AtomicU64::new(0) }; CodeWrites::KEPT],
    links: Mutex::new(Vec::new()),
};

impl CodeWrites {
    const KEPT: usize = 1024;
    /// Writes of up to this many bytes count as stores of one instruction.
    const STORE: u64 = 64;
    /// Bit of a noted page address: it was such a store.
    const STORED: u64 = 1;

    /// The process's record.
    pub fn get() -> &'static Self {
        &CODE_WRITES
    }

    /// How many there were so far.
    #[inline]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Notes a page. vCPUs need no kick where the code itself has not changed.
    fn note(&self, page: u64, kick: bool) {
        let links = self.links.lock();
        let count = self.count.load(Ordering::Relaxed);
        self.ring[count as usize % Self::KEPT].store(page, Ordering::Relaxed);
        self.count.store(count + 1, Ordering::Release);
        for link in links.iter().filter(|_| kick).filter_map(Weak::upgrade) {
            link.kick_word().store(1, Ordering::SeqCst);
        }
    }

    /// Has these vCPUs kicked, too, whenever code is overwritten from here on.
    pub(crate) fn kick(&self, links: &[Arc<VcpuLink>]) {
        let mut all = self.links.lock();
        all.retain(|link| link.strong_count() > 0);
        all.extend(links.iter().map(Arc::downgrade));
    }

    /// Gives the host addresses of the pages noted after the first `seen`, each with whether the write was a store of one instruction,
    /// and what to say next time; `None` if some are forgotten.
    pub fn since(&self, seen: &mut u64) -> Option<Vec<(u64, bool)>> {
        let _guard = self.links.lock();
        let count = self.count.load(Ordering::Relaxed);
        let from = std::mem::replace(seen, count);
        (count - from <= Self::KEPT as u64).then(|| {
            (from..count)
                .map(|n| self.ring[n as usize % Self::KEPT].load(Ordering::Relaxed))
                .map(|noted| (noted & !Self::STORED, noted & Self::STORED != 0))
                .collect()
        })
    }
}

fn granule_mask(start: u64, end: u64) -> u64 {
    debug_assert!(start < end && end <= PAGE_SIZE);
    let first = start / GRANULE;
    let last = (end - 1) / GRANULE;
    (u64::MAX >> (63 - (last - first))) << first
}

/// A piece of memory shared with the guest. Guest CPUs change it at any time, so it is only ever copied from
/// and to, never borrowed.
pub struct HostMemory {
    name: &'static str,
    base: NonNull<u8>,
    len: u64,
    fd: OwnedFd,
    dirty: Box<[AtomicU64]>,
    code: Box<[CodePage]>,
}

// SAFETY: the mapping is plain memory that lives as long as the object; all access goes through copies of
// plain bytes, and concurrent guest access is part of its contract.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Maps `size` zeroed bytes (rounded up to whole pages). `name` shows up in the host's memory maps.
    pub fn new(name: &'static str, size: ByteSize) -> std::io::Result<Self> {
        let len = size.0.div_ceil(PAGE_SIZE).max(1) * PAGE_SIZE;
        let host_len = usize::try_from(len).map_err(std::io::Error::other)?;
        let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len)?;
        let base = map_aligned(&fd, host_len)?;
        let pages = host_len / PAGE_SIZE as usize;
        Ok(Self {
            name,
            base,
            len,
            fd,
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            code: (0..pages).map(|_| CodePage::default()).collect(),
        })
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Asks the host for pages of 2 MiB behind this memory, as far as it has them. Fails where the host's kernel does not know such pages.
    pub fn advise_large_pages(&self) -> std::io::Result<()> {
        // SAFETY: advice about our own mapping, whose contents it leaves alone.
        unsafe { madvise(self.base().cast(), self.len as usize, Advice::LinuxHugepage)? }
        Ok(())
    }

    /// Size in bytes, a multiple of [`PAGE_SIZE`].
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    /// The memfd, for whoever maps the same memory elsewhere (KVM, a display client).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The host address of the first byte. Valid for `len()` bytes as long as `self` lives.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Copies bytes out; false (and `out` untouched) if the range is not inside.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        if !self.contains(offset, out.len() as u64) {
            return false;
        }
        // SAFETY: the range was checked against the mapping; `out` is ours and does not overlap guest memory.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset as usize), out.as_mut_ptr(), out.len());
        }
        true
    }

    /// Copies bytes in, marks them dirty and invalidates code decoded from them; false if the range is not inside.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        if !self.contains(offset, data.len() as u64) {
            return false;
        }
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.base().add(offset as usize), data.len());
        }
        self.note_write(offset, data.len() as u64);
        true
    }

    /// Records that `len` bytes at `offset` were changed through a pointer: dirty bits and decoded code.
    pub fn note_write(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let page = at / PAGE_SIZE;
            let stop = end.min((page + 1) * PAGE_SIZE);
            self.mark_dirty(page);
            if let Some(code) = self.code.get(page as usize)
                && code.written(at % PAGE_SIZE, stop - page * PAGE_SIZE)
            {
                let stored = if len <= CodeWrites::STORE { CodeWrites::STORED } else { 0 };
                CODE_WRITES.note(self.page_address(page) | stored, true);
            }
            at = stop;
        }
    }

    /// Marks page number `page` as changed since the last [`HostMemory::take_dirty`]. Engines call it when they
    /// hand out a writable translation.
    pub fn mark_dirty(&self, page: u64) {
        if let Some(word) = self.dirty.get((page / 64) as usize) {
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// Returns and clears the dirty bits, 64 pages to a word. Before the result can be trusted, writable
    /// translations must be dropped: use `Pgm::take_dirty`.
    pub(crate) fn take_dirty(&self) -> Vec<u64> {
        self.dirty.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect()
    }

    /// The code record of page number `page`.
    #[inline]
    pub fn code_page(&self, page: u64) -> Option<&CodePage> {
        self.code.get(page as usize)
    }

    /// Declares everything decoded from page number `page` invalid, and lets it be written directly until code is decoded from
    /// it again.
    pub fn forget_code(&self, page: u64) {
        if let Some(code) = self.code.get(page as usize) {
            code.granules.store(0, Ordering::SeqCst);
            code.generation.fetch_add(1, Ordering::AcqRel);
            CODE_WRITES.note(self.page_address(page), false);
        }
    }

    fn page_address(&self, page: u64) -> u64 {
        self.base.as_ptr().addr() as u64 + page * PAGE_SIZE
    }

    fn contains(&self, offset: u64, len: u64) -> bool {
        offset <= self.len && len <= self.len - offset
    }
}

/// Size and alignment of a large page.
const LARGE_PAGE: usize = 2 << 20;

/// Maps the whole of a memfd, at a multiple of a large page if it is as large as one.
fn map_aligned(fd: &OwnedFd, len: usize) -> std::io::Result<NonNull<u8>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let base = if len < LARGE_PAGE {
        // SAFETY: a fresh shared mapping of our own memfd at an address of the kernel's choice.
        unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, fd, 0)? }
    } else {
        let room = len + LARGE_PAGE;
        // SAFETY: reserves fresh address space, in which the memfd is put below.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), MapFlags::PRIVATE)? };
        let before = start.addr().next_multiple_of(LARGE_PAGE) - start.addr();
        let end = before + len.next_multiple_of(PAGE_SIZE as usize);
        // SAFETY: the range lies within what was just reserved, `before` being less than a large page; the rest of that is given back.
        unsafe {
            let base = start.byte_add(before);
            let mapped = mmap(base, len, access, MapFlags::SHARED | MapFlags::FIXED, fd, 0);
            if mapped.is_err() {
                let _ = munmap(start, room);
            }
            mapped?;
            if before > 0 {
                let _ = munmap(start, before);
            }
            if end < room {
                let _ = munmap(start.byte_add(end), room - end);
            }
            base
        }
    };
    NonNull::new(base.cast()).ok_or_else(|| std::io::Error::other("mmap returned null"))
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; nobody can hold a pointer past the object's life.
        let _ = unsafe { munmap(self.base().cast(), self.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_large_page_or_more_begins_at_one_and_all_of_it_is_there() {
        for len in [LARGE_PAGE as u64, 5 << 20, (4 << 20) + PAGE_SIZE] {
            let memory = HostMemory::new("large", ByteSize(len)).unwrap();
            assert_eq!(memory.base() as usize % LARGE_PAGE, 0);
            assert!(memory.write(0, &[1]) && memory.write(len - 1, &[2]));
            let mut last = [0];
            assert!(memory.read(len - 1, &mut last) && last == [2] && !memory.read(len, &mut last));
        }
    }

    #[test]
    fn bytes_come_back_and_the_page_is_dirty() {
        let mem = HostMemory::new("test", ByteSize(3 * PAGE_SIZE)).unwrap();
        assert!(mem.write(PAGE_SIZE - 1, &[1, 2]));
        let mut out = [0; 2];
        assert!(mem.read(PAGE_SIZE - 1, &mut out));
        assert_eq!(out, [1, 2]);
        assert_eq!(mem.take_dirty(), [0b11]);
        assert_eq!(mem.take_dirty(), [0]);
    }

    #[test]
    fn ranges_past_the_end_are_refused() {
        let mem = HostMemory::new("test", ByteSize(PAGE_SIZE)).unwrap();
        assert!(!mem.write(PAGE_SIZE - 1, &[1, 2]));
        assert!(!mem.read(u64::MAX, &mut [0; 2]));
    }

    #[test]
    fn only_writes_to_decoded_bytes_change_the_generation() {
        let mem = HostMemory::new("test", ByteSize(PAGE_SIZE)).unwrap();
        let page = mem.code_page(0).unwrap();
        assert!(page.mark(64, 70));
        assert!(!page.mark(70, 80));
        let before = page.generation();
        mem.write(0, &[0; 64]);
        mem.write(128, &[0; 64]);
        assert_eq!(page.generation(), before);
        mem.write(60, &[0; 8]);
        assert_ne!(page.generation(), before);
    }

    #[test]
    fn the_whole_page_is_one_full_mask() {
        assert_eq!(granule_mask(0, PAGE_SIZE), u64::MAX);
        assert_eq!(granule_mask(PAGE_SIZE - 1, PAGE_SIZE), 1 << 63);
        assert_eq!(granule_mask(63, 65), 3);
    }
}
