//! Reads that have to wait for the host's storage, through io_uring: many at once, without a thread for each.
//!
//! A ring has one thread of its own, which takes completions and calls whoever asked. Hosts may have no io_uring (old kernels,
//! `kernel.io_uring_disabled`, containers' system call filters): then there is no ring, and the queue's threads wait themselves.
#![allow(unsafe_code)] // The kernel writes into buffers by their addresses after the call has returned.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

use io_uring::{IoUring, opcode, types};
use parking_lot::Mutex;

/// Requests that the kernel holds at once. Its queue of completions is twice as long, so none is lost.
const ENTRIES: u32 = 128;
/// The number of the request that ends the thread.
const QUIT: u64 = u64::MAX;

/// Called with the buffer and how many bytes of it were filled by this read.
pub(crate) type ReadDone = Box<dyn FnOnce(Vec<u8>, io::Result<usize>) + Send>;

struct Pending {
    /// The kernel writes here until the completion arrives: neither moved out nor changed before.
    buffer: Vec<u8>,
    done: ReadDone,
}

struct Slots {
    pending: HashMap<u64, Pending>,
    next: u64,
}

struct Shared {
    ring: IoUring,
    /// Guards the submission queue, too.
    slots: Mutex<Slots>,
}

/// A ring at work. Dropped after the last read has completed; its thread ends then.
pub(crate) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ring {
    /// `None` where the host has no io_uring for us.
    pub(crate) fn start() -> Option<Self> {
        let ring = IoUring::new(ENTRIES)
            .inspect_err(
                |error| tracing::debug!(target: "vd", %error, "no io_uring: threads wait for storage"),
            )
            .ok()?;
        let slots = Mutex::new(Slots { pending: HashMap::new(), next: 0 });
        let shared = Arc::new(Shared { ring, slots });
        let own = shared.clone();
        let thread = std::thread::Builder::new().name("vd-ring".into()).spawn(move || own.reap()).ok()?;
        Some(Self { shared, thread: Some(thread) })
    }

    /// Whether this is the thread that calls whoever asked.
    pub(crate) fn is_thread(&self, thread: ThreadId) -> bool {
        self.thread.as_ref().is_some_and(|own| own.thread().id() == thread)
    }

    /// Reads into `buffer` from its byte `from` on, at file offset `at`. `fd` stays open until the completion. Gives buffer and
    /// callback back if the ring is full.
    pub(crate) fn read(
        &self,
        fd: BorrowedFd<'_>,
        at: u64,
        mut buffer: Vec<u8>,
        from: usize,
        done: ReadDone,
    ) -> Result<(), (Vec<u8>, ReadDone)> {
        let mut slots = self.shared.slots.lock();
        if slots.pending.len() >= ENTRIES as usize {
            return Err((buffer, done));
        }
        let number = slots.next;
        let rest = buffer.get_mut(from..).unwrap_or_default();
        let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(types::Fd(fd.as_raw_fd()), rest.as_mut_ptr(), len)
            .offset(at)
            .build()
            .user_data(number);
        // SAFETY: the lock is held, so nobody else uses the submission queue. Descriptor and buffer stay as they are until the
        // completion: the caller promises the first, `pending` keeps the second, whose bytes do not move with it.
        let queued = unsafe { self.shared.ring.submission_shared().push(&entry) }.is_ok();
        if !queued {
            return Err((buffer, done));
        }
        slots.next += 1;
        slots.pending.insert(number, Pending { buffer, done });
        // Should this fail, the entry stays in the queue, and the next call, or the thread's, submits it.
        let _ = self.shared.ring.submit();
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        {
            let _slots = self.shared.slots.lock();
            let entry = opcode::Nop::new().build().user_data(QUIT);
            // SAFETY: the lock is held; the entry names neither memory nor a descriptor.
            let queued = unsafe { self.shared.ring.submission_shared().push(&entry) }.is_ok();
            if !queued || self.shared.ring.submit().is_err() {
                tracing::error!(target: "vd", "the ring's thread cannot be ended");
                return;
            }
        }
        // A completion may hold the last reference: then its thread ends by itself.
        if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
            tracing::error!(target: "vd", "the ring's thread has panicked");
        }
    }
}

impl Shared {
    fn reap(&self) {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // What the kernel lacks (EBUSY, EAGAIN) comes with the completions that are taken below.
                Err(error) => {
                    tracing::debug!(target: "vd", %error, "waiting for the ring");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            loop {
                // SAFETY: this thread alone uses the completion queue.
                let entry = unsafe { self.ring.completion_shared() }.next();
                let Some(entry) = entry else { break };
                if entry.user_data() == QUIT {
                    return;
                }
                let Some(Pending { buffer, done }) = self.slots.lock().pending.remove(&entry.user_data())
                else {
                    continue;
                };
                done(buffer, count(entry.result()));
            }
        }
    }
}

fn count(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Only after a panic in a completion: the kernel may still write to these.
        for (_, pending) in self.slots.get_mut().pending.drain() {
            std::mem::forget(pending.buffer);
        }
    }
}
