//! Requests that run beside the caller, for callers that must not wait.
//!
//! Requests may complete in any order. A flush covers the requests whose completion was called before the flush was
//! submitted. Completions run on the queue's threads, never inside [`Queue::submit`].
//!
//! **How requests run.** A few threads take requests. What the host has in memory they copy at once; a read that would wait for
//! storage goes to a [`Ring`] and the thread goes on. Small requests are left to as few threads as will do: waking a thread costs
//! more than copying a page. Where the host has no ring, reads wait on the threads.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::io::ReadWriteFlags;

use crate::error::Error;
use crate::file::Located;
use crate::image::Image;
use crate::ring::Ring;

/// New blocks that no flush covered are made part of the file after this time, so that a killed process loses little.
const SETTLE: Duration = Duration::from_secs(5);
/// How much waits for a running thread before another one is woken, in units of [`Op::cost`].
const ENOUGH: u64 = 8;

/// A request. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Op {
    /// Fill `buffer` from `offset` on.
    Read { offset: u64, buffer: Vec<u8> },
    /// Write `buffer` at `offset`.
    Write { offset: u64, buffer: Vec<u8> },
    /// Make every write completed so far durable.
    Flush,
    /// The range's content is not needed any more.
    Discard { offset: u64, len: u64 },
}

impl Op {
    /// About how long it takes, where a page's copy is 1.
    fn cost(&self) -> u64 {
        match self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => 1 + buffer.len() as u64 / 16384,
            Self::Flush | Self::Discard { .. } => ENOUGH,
        }
    }
}

/// Called once with the request's buffer (empty where it had none).
pub type Done = Box<dyn FnOnce(Result<Vec<u8>, Error>) + Send>;

struct State {
    requests: VecDeque<(Op, Done)>,
    /// Sum of their costs.
    cost: u64,
    /// Requests that were taken and have not completed.
    running: usize,
    /// Threads that will look at the queue very soon: they are not in a request that may keep them waiting.
    working: u64,
    /// Threads that wait for work.
    idle: usize,
    closing: bool,
    /// When to flush new blocks that no flush covered.
    settle_at: Option<Instant>,
}

struct Shared {
    image: Image,
    ring: Option<Ring>,
    settle: Duration,
    state: Mutex<State>,
    work: Condvar,
    drained: Condvar,
}

/// An image with threads that work on it. Dropping it finishes what was submitted and flushes; dropped by a completion, that
/// happens a little later.
pub struct Queue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Queue {
    /// Starts `threads` threads (at least one) on `image`.
    pub fn new(image: Image, threads: usize) -> std::io::Result<Self> {
        Self::start(image, threads, SETTLE, Ring::start())
    }

    fn start(image: Image, threads: usize, settle: Duration, ring: Option<Ring>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            image,
            ring,
            settle,
            state: Mutex::new(State {
                requests: VecDeque::new(),
                cost: 0,
                running: 0,
                working: 0,
                idle: 0,
                closing: false,
                settle_at: None,
            }),
            work: Condvar::new(),
            drained: Condvar::new(),
        });
        let mut queue = Self { shared: shared.clone(), threads: Vec::new() };
        for _ in 0..threads.max(1) {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("vd".into()).spawn(move || shared.work())?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }

    /// The image under the queue.
    pub fn image(&self) -> &Image {
        &self.shared.image
    }

    /// Queues a request.
    pub fn submit(&self, op: Op, done: Done) {
        let mut state = self.shared.state.lock();
        state.cost += op.cost();
        state.requests.push_back((op, done));
        self.shared.wake(state);
    }

    /// Waits until nothing is queued or running. Not to be called from a completion.
    pub fn drain(&self) {
        let mut state = self.shared.state.lock();
        while state.running > 0 || !state.requests.is_empty() {
            self.shared.drained.wait(&mut state);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_all();
        let own = std::thread::current().id();
        let ring = self.shared.ring.as_ref().is_some_and(|ring| ring.is_thread(own));
        if ring || self.threads.iter().any(|thread| thread.thread().id() == own) {
            // A completion holds the last reference. The threads wait for it, so it cannot wait for them.
            return;
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(target: "vd", "a disk thread has panicked");
            }
        }
    }
}

impl Shared {
    /// Wakes a thread if those that run are not enough for what is queued.
    fn wake(&self, state: MutexGuard<'_, State>) {
        let wake = state.idle > 0
            && !state.requests.is_empty()
            && (state.working == 0 || state.cost > ENOUGH * state.working);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    fn work(self: Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            if let Some((op, done)) = state.requests.pop_front() {
                state.cost -= op.cost();
                state.running += 1;
                state.working += 1;
                self.wake(state);
                let fast = self.fast(op, done);
                if let Fast::Waits(op, done) = fast {
                    state = self.state.lock();
                    state.working -= 1;
                    self.wake(state);
                    let result = self.run(op);
                    self.state.lock().working += 1;
                    done(result);
                    state = self.state.lock();
                    self.completed(&mut state);
                } else if let Fast::Done(result, done) = fast {
                    done(result);
                    state = self.state.lock();
                    self.completed(&mut state);
                } else {
                    state = self.state.lock();
                }
                state.working -= 1;
                continue;
            }
            // What a thread has given to the ring ends with the thread.
            if state.closing && state.running == 0 {
                return;
            }
            match state.settle_at {
                Some(at) if at <= Instant::now() => {
                    state.settle_at = None;
                    drop(state);
                    if self.image.is_dirty()
                        && let Err(error) = self.image.flush()
                    {
                        tracing::error!(target: "vd", %error, "new blocks could not be recorded");
                    }
                    state = self.state.lock();
                    continue;
                }
                settle_at => {
                    state.idle += 1;
                    match settle_at {
                        Some(at) => {
                            self.work.wait_until(&mut state, at);
                        }
                        None => self.work.wait(&mut state),
                    }
                    state.idle -= 1;
                }
            }
        }
    }

    fn completed(&self, state: &mut State) {
        state.running -= 1;
        if state.settle_at.is_none() && self.image.is_dirty() {
            state.settle_at = Some(Instant::now() + self.settle);
        }
        if state.running == 0 && state.requests.is_empty() {
            self.drained.notify_all();
            if state.closing {
                self.work.notify_all();
            }
        }
    }

    /// Carries a request out that does not keep the thread waiting.
    fn fast(self: &Arc<Self>, op: Op, done: Done) -> Fast {
        let Some(ring) = &self.ring else { return Fast::Waits(op, done) };
        let Op::Read { offset, mut buffer } = op else { return Fast::Waits(op, done) };
        let Some(Located { fd, at }) = self.image.locate(offset, buffer.len() as u64) else {
            return Fast::Waits(Op::Read { offset, buffer }, done);
        };
        let have = read_cached(fd, at, &mut buffer);
        if have == buffer.len() {
            return Fast::Done(Ok(buffer), done);
        }
        let shared = self.clone();
        let after = move |mut buffer: Vec<u8>, count: std::io::Result<usize>| {
            let have = have + count.unwrap_or(0);
            // What the ring did not do, for whatever reason, is done here, or its error told by that.
            let result = match buffer.get_mut(have..) {
                Some(rest) if !rest.is_empty() => shared.image.read(offset + have as u64, rest),
                _ => Ok(()),
            };
            done(result.map(|()| buffer));
            shared.completed(&mut shared.state.lock());
        };
        if let Err((buffer, after)) = ring.read(fd, at + have as u64, buffer, have, Box::new(after)) {
            after(buffer, Ok(0));
        }
        Fast::Later
    }

    /// Carries a request out.
    fn run(&self, op: Op) -> Result<Vec<u8>, Error> {
        match op {
            Op::Read { offset, mut buffer } => self.image.read(offset, &mut buffer).map(|()| buffer),
            Op::Write { offset, buffer } => self.image.write(offset, &buffer).map(|()| buffer),
            Op::Flush => self.image.flush().map(|()| Vec::new()),
            Op::Discard { offset, len } => self.image.discard(offset, len).map(|()| Vec::new()),
        }
    }
}

/// What became of a request.
enum Fast {
    Done(Result<Vec<u8>, Error>, Done),
    /// It completes later.
    Later,
    /// It may keep the thread waiting, and has not been started.
    Waits(Op, Done),
}

/// Fills the start of `out` with what the host has in memory; how many bytes.
fn read_cached(fd: BorrowedFd<'_>, at: u64, out: &mut [u8]) -> usize {
    let mut have = 0;
    while have < out.len() {
        let rest = &mut [IoSliceMut::new(&mut out[have..])];
        match rustix::io::preadv2(fd, rest, at + have as u64, ReadWriteFlags::NOWAIT) {
            Ok(count) if count > 0 => have += count,
            // Not in memory, or not to be told, or past the end: no matter here.
            _ => break,
        }
    }
    have
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::file::MemoryFile;
    use crate::format::Format;
    use crate::image::OpenMode;

    #[test]
    fn a_killed_process_keeps_what_it_wrote_some_seconds_before() {
        let file = Arc::new(MemoryFile::new(&crate::vdi::tests::small_image(8)));
        let open = |file: Arc<MemoryFile>| {
            Image::from_file(Box::new(file), Path::new("t"), OpenMode::ReadWrite, Format::Vdi, None).unwrap()
        };
        let queue = Queue::start(open(file.clone()), 2, Duration::from_millis(30), None).unwrap();
        queue.submit(Op::Write { offset: 8192, buffer: vec![7; 512] }, Box::new(|r| assert!(r.is_ok())));
        queue.drain();
        let written = || {
            let mut out = [0; 512];
            open(Arc::new(MemoryFile::new(&file.bytes.lock()))).read(8192, &mut out).unwrap();
            out == [7; 512]
        };
        let end = Instant::now() + Duration::from_secs(10);
        while !written() {
            assert!(Instant::now() < end, "the new block was never recorded");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!queue.image().is_dirty());
    }

    /// Written, then read through the queue in pieces that lie in one block, in two, and nowhere.
    fn reads_come_back_right(ring: Option<Ring>) {
        let path = std::env::temp_dir().join(format!("vd-queue-{}-{}", std::process::id(), ring.is_some()));
        std::fs::write(&path, crate::vdi::tests::small_image(64)).unwrap();
        let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
        let content: Vec<u8> = (0..image.size().0 / 2).map(|i| (i / 512 % 251) as u8 + 1).collect();
        image.write(0, &content).unwrap();
        image.flush().unwrap();
        let size = image.size().0;
        let queue = Queue::start(image, 2, SETTLE, ring).unwrap();
        // Out of the host's memory, so that reads have to wait for storage.
        let file = std::fs::File::open(&path).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        for number in 0..200u64 {
            let (offset, len) = (number * 2560 % (size - 9000), 512 * (1 + number as usize % 16));
            let (count, content) = (count.clone(), content.clone());
            let done = move |result: Result<Vec<u8>, Error>| {
                let buffer = result.unwrap();
                let expected =
                    (offset as usize..offset as usize + len).map(|i| content.get(i).copied().unwrap_or(0));
                if buffer.iter().copied().eq(expected) {
                    count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
            };
            queue.submit(Op::Read { offset, buffer: vec![0xee; len] }, Box::new(done));
        }
        drop(queue);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(count.load(std::sync::atomic::Ordering::SeqCst), 200);
    }

    #[test]
    fn reads_come_back_right_without_a_ring() {
        reads_come_back_right(None);
    }

    #[test]
    fn reads_come_back_right_through_a_ring() {
        match Ring::start() {
            None => eprintln!("SKIPPED: the host has no io_uring"),
            ring => reads_come_back_right(ring),
        }
    }

    #[test]
    fn a_queue_that_its_last_completion_drops_ends() {
        let open = || {
            let file = MemoryFile::new(&crate::vdi::tests::small_image(8));
            Image::from_file(Box::new(file), Path::new("t"), OpenMode::ReadWrite, Format::Vdi, None).unwrap()
        };
        let queue = Arc::new(Queue::new(open(), 3).unwrap());
        let (tell, wait) = std::sync::mpsc::channel();
        let own = queue.clone();
        queue.submit(
            Op::Read { offset: 0, buffer: vec![0; 512] },
            Box::new(move |result| {
                drop(own);
                tell.send(result.is_ok()).unwrap();
            }),
        );
        drop(queue);
        assert_eq!(wait.recv_timeout(Duration::from_secs(10)), Ok(true));
    }
}
