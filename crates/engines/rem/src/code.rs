//! Memory for translated code: mapped twice, written through one mapping and executed through the other.
#![allow(unsafe_code)] // maps code memory and copies code into it

use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// A bounded buffer with two ends: what runs often grows from the first half's start, what runs seldom from the second's.
pub(crate) struct CodeBuffer {
    write: NonNull<u8>,
    execute: NonNull<u8>,
    len: usize,
    hot: usize,
    cold: usize,
    /// How far the memory of both halves is there already.
    ready: [usize; 2],
}

// SAFETY: both mappings belong to this object alone.
unsafe impl Send for CodeBuffer {}

impl CodeBuffer {
    pub(crate) fn new(len: usize) -> std::io::Result<Self> {
        let fd = memfd_create("rem-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        let map = |protection| {
            // SAFETY: a fresh shared mapping of our own memfd at an address of the kernel's choice.
            let at = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &fd, 0)? };
            NonNull::new(at.cast::<u8>()).ok_or_else(|| std::io::Error::other("mmap returned null"))
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        let execute = match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(execute) => execute,
            Err(error) => {
                // SAFETY: unmaps what was mapped above and has not been handed out.
                let _ = unsafe { munmap(write.as_ptr().cast(), len) };
                return Err(error);
            }
        };
        Ok(Self { write, execute, len, hot: 0, cold: len / 2, ready: [0, len / 2] })
    }

    /// Address at which the first byte is executed.
    pub(crate) fn base(&self) -> u64 {
        self.execute.as_ptr().expose_provenance() as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Offsets at which the next hot and cold code will stand.
    pub(crate) fn next(&self) -> (usize, usize) {
        (self.hot, self.cold)
    }

    pub(crate) fn used(&self) -> usize {
        self.hot + self.cold - self.len / 2
    }

    /// Whether that much hot and cold code still fits.
    pub(crate) fn fits(&self, hot: usize, cold: usize) -> bool {
        self.hot + hot <= self.len / 2 && self.cold + cold <= self.len
    }

    /// Places code where [`CodeBuffer::next`] said.
    pub(crate) fn append(&mut self, hot: &[u8], cold: &[u8]) {
        assert!(self.fits(hot.len(), cold.len()));
        self.prepare(0, self.hot + hot.len(), self.len / 2);
        self.prepare(1, self.cold + cold.len(), self.len);
        self.put(self.hot, hot);
        self.put(self.cold, cold);
        self.hot = (self.hot + hot.len()).next_multiple_of(16).min(self.len / 2);
        self.cold = (self.cold + cold.len()).min(self.len);
    }

    /// Has memory at hand up to `end`: page by page it would cost two faults each.
    fn prepare(&mut self, half: usize, end: usize, limit: usize) {
        const STEP: usize = 256 << 10;
        let from = self.ready[half];
        if end <= from || limit - from < STEP {
            return;
        }
        self.ready[half] = from + STEP;
        for (mapping, advice) in
            [(self.write, Advice::LinuxPopulateWrite), (self.execute, Advice::LinuxPopulateRead)]
        {
            // SAFETY: the range lies inside the mapping, and what it holds does not change. Where the kernel does not know the
            // advice (before 5.14) faults do it.
            let _ = unsafe { madvise(mapping.as_ptr().add(from).cast(), STEP, advice) };
        }
    }

    /// Overwrites placed code.
    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len));
        // SAFETY: the range lies inside the mapping, which is written only here, under `&mut self`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.as_ptr().add(at), bytes.len()) };
    }

    /// Aims the 32-bit displacement at `site` at `target`, both offsets in the buffer.
    pub(crate) fn aim(&mut self, site: usize, target: usize) {
        let distance = target as i64 - (site as i64 + 4);
        self.put(site, &(distance as i32).to_le_bytes());
    }

    /// Forgets everything from `keep_hot` and `keep_cold` on.
    pub(crate) fn truncate(&mut self, keep_hot: usize, keep_cold: usize) {
        self.hot = keep_hot;
        self.cold = keep_cold;
    }
}

impl Drop for CodeBuffer {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; code runs only under a borrow of `self`.
        unsafe {
            let _ = munmap(self.write.as_ptr().cast(), self.len);
            let _ = munmap(self.execute.as_ptr().cast(), self.len);
        }
    }
}
