//! Memory for stubs.
#![allow(unsafe_code)] // maps code memory and calls what was written there

use std::ptr::NonNull;

use cpum::CpuState;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::stub::{Frame, Stub};

/// A bounded, append-only buffer of machine code, mapped twice: written through one mapping, executed through the other.
pub(super) struct CodeMemory {
    write: NonNull<u8>,
    execute: NonNull<u8>,
    len: usize,
    used: usize,
}

// SAFETY: both mappings belong to this object alone.
unsafe impl Send for CodeMemory {}

/// The calling convention of stubs: state, operand bytes, two unused, frame.
type Entry = extern "sysv64" fn(*mut CpuState, *mut u8, u64, u64, *mut Frame);

impl CodeMemory {
    pub(super) fn new(len: usize) -> std::io::Result<Self> {
        let fd = memfd_create("iem-unit", MemfdFlags::CLOEXEC)?;
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
        Ok(Self { write, execute, len, used: 0 })
    }

    /// Adds a stub and returns its offset, or `None` if it does not fit.
    pub(super) fn append(&mut self, code: &[u8]) -> Option<u32> {
        let at = self.used.next_multiple_of(16);
        let end = at.checked_add(code.len()).filter(|&end| end <= self.len)?;
        // SAFETY: `at..end` lies inside the mapping, which is written only here, under `&mut self`.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(at), code.len()) };
        self.used = end;
        u32::try_from(at).ok()
    }

    /// Forgets all stubs.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    /// Runs a stub on the guest's state. `mem` must hold the stub's operand.
    #[inline]
    pub(super) fn call(&self, stub: &Stub, cpu: &mut CpuState, mem: &mut [u8], frame: &mut Frame) {
        assert!(mem.len() >= usize::from(stub.size) && (stub.entry as usize) < self.used);
        // SAFETY: `entry` is the offset of a complete stub that `stub::build` made and `append` placed (stubs and code are dropped
        // together). Its code reads and writes nothing but the CPU state, the frame, and `stub.size` bytes at `mem`, and
        // changes no register that the calling convention preserves.
        unsafe {
            let entry: Entry = std::mem::transmute(self.execute.as_ptr().add(stub.entry as usize));
            entry(cpu, mem.as_mut_ptr(), 0, 0, frame);
        }
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; stubs run only under a borrow of `self`.
        unsafe {
            let _ = munmap(self.write.as_ptr().cast(), self.len);
            let _ = munmap(self.execute.as_ptr().cast(), self.len);
        }
    }
}
