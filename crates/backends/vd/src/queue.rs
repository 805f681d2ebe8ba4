//! Requests that run beside the caller, for callers that must not wait.
//!
//! Requests may complete in any order. A flush covers the requests whose completion was called before the flush was
//! submitted. Completions run on the queue's threads, never inside [`Queue::submit`].
//!
//! **How requests run.** A few threads take requests. What the host has in memory they copy at once; a read that would wait for
//! storage goes to a [`Ring`] and the thread goes on. Small requests are left to as few threads as will do: waking a thread costs
//! more than copying a page. Where the host has no ring, reads wait on the threads. The host's file systems carry out one write to a
//! file at a time, so that one thread does all that wait, and those that follow each other in the file at once.

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
/// Bytes that are written at once if several requests follow each other.
const TOGETHER: u64 = 256 << 10;

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

/// Requests of one kind, in the order of their numbers, and the sum of their costs.
#[derive(Default)]
struct Waiting {
    requests: VecDeque<(u64, Op, Done)>,
    cost: u64,
}

impl Waiting {
    fn push(&mut self, number: u64, op: Op, done: Done) {
        self.cost += op.cost();
        self.requests.push_back((number, op, done));
    }

    fn first(&self) -> Option<u64> {
        self.requests.front().map(|first| first.0)
    }

    fn pop(&mut self) -> Option<(Op, Done)> {
        let (_, op, done) = self.requests.pop_front()?;
        self.cost -= op.cost();
        Some((op, done))
    }
}

struct State {
    requests: Waiting,
    /// Those that one thread carries out at a time, and whether one does.
    writes: Waiting,
    writing: bool,
    /// Requests so far.
    number: u64,
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

/// What a thread does next.
enum Job {
    One(Op, Done),
    /// Writes that follow each other: offset of the first, and buffers.
    Writes(u64, Vec<Vec<u8>>, Vec<Done>),
}

impl State {
    fn is_empty(&self) -> bool {
        self.requests.requests.is_empty() && self.writes.requests.is_empty()
    }

    /// Cost of what a thread could take.
    fn cost(&self) -> u64 {
        self.requests.cost + if self.writing { 0 } else { self.writes.cost }
    }

    /// The oldest request, or writes, that can be started.
    fn take(&mut self) -> Option<Job> {
        let write = self.writes.first().filter(|_| !self.writing);
        let first = self.requests.first();
        if write.is_none_or(|write| first.is_some_and(|first| first < write)) {
            let (op, done) = self.requests.pop()?;
            self.running += 1;
            return Some(Job::One(op, done));
        }
        let (mut buffers, mut dones, mut start, mut len) = (Vec::new(), Vec::new(), 0, 0);
        while let Some((_, Op::Write { offset, buffer }, _)) = self.writes.requests.front() {
            if !buffers.is_empty() && (*offset != start + len || len + buffer.len() as u64 > TOGETHER) {
                break;
            }
            let Some((Op::Write { offset, buffer }, done)) = self.writes.pop() else { break };
            if buffers.is_empty() {
                start = offset;
            }
            len += buffer.len() as u64;
            buffers.push(buffer);
            dones.push(done);
        }
        self.writing = true;
        self.running += dones.len();
        Some(Job::Writes(start, buffers, dones))
    }
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
                requests: Waiting::default(),
                writes: Waiting::default(),
                writing: false,
                number: 0,
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
        let number = state.number;
        state.number += 1;
        if matches!(op, Op::Write { .. }) && self.shared.image.writes_in_turns() {
            state.writes.push(number, op, done);
        } else {
            state.requests.push(number, op, done);
        }
        self.shared.wake(state);
    }

    /// Waits until nothing is queued or running. Not to be called from a completion.
    pub fn drain(&self) {
        let mut state = self.shared.state.lock();
        while state.running > 0 || !state.is_empty() {
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
        let cost = state.cost();
        let wake = state.idle > 0 && cost > 0 && (state.working == 0 || cost > ENOUGH * state.working);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    fn work(self: Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.take() {
                state.working += 1;
                self.wake(state);
                state = match job {
                    Job::Writes(offset, buffers, dones) => self.write(offset, buffers, dones),
                    Job::One(op, done) => match self.fast(op, done) {
                        Fast::Done(result, done) => {
                            done(result);
                            self.completed(1)
                        }
                        Fast::Later => self.state.lock(),
                        Fast::Waits(op, done) => {
                            done(self.waits(|| self.run(op)));
                            self.completed(1)
                        }
                    },
                };
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

    fn completed(&self, count: usize) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        state.running -= count;
        if state.settle_at.is_none() && self.image.is_dirty() {
            state.settle_at = Some(Instant::now() + self.settle);
        }
        if state.running == 0 && state.is_empty() {
            self.drained.notify_all();
            if state.closing {
                self.work.notify_all();
            }
        }
        state
    }

    /// Carries out writes that follow each other.
    fn write(&self, start: u64, buffers: Vec<Vec<u8>>, dones: Vec<Done>) -> MutexGuard<'_, State> {
        let count = dones.len();
        let results = self.waits(|| {
            let together = buffers.len() > 1 && self.image.write_together(start, &buffers);
            let mut offset = start;
            let write = |buffer: Vec<u8>| {
                let at = offset;
                offset += buffer.len() as u64;
                let result = if together { Ok(()) } else { self.image.write(at, &buffer) };
                result.map(|()| buffer)
            };
            buffers.into_iter().map(write).collect::<Vec<_>>()
        });
        for (result, done) in results.into_iter().zip(dones) {
            done(result);
        }
        let mut state = self.completed(count);
        state.writing = false;
        state
    }

    /// Does what may keep the thread waiting.
    fn waits<T>(&self, what: impl FnOnce() -> T) -> T {
        let mut state = self.state.lock();
        state.working -= 1;
        self.wake(state);
        let result = what();
        self.state.lock().working += 1;
        result
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
            drop(shared.completed(1));
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
    fn writes_that_follow_each_other_land_where_they_belong() {
        let path = std::env::temp_dir().join(format!("vd-together-{}", std::process::id()));
        std::fs::write(&path, crate::vdi::tests::small_image(64)).unwrap();
        let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
        assert!(image.writes_in_turns());
        let mut expected = vec![0; image.size().0 as usize];
        let queue = Queue::new(image, 2).unwrap();
        // Two rounds: into blocks that are new, and into those that are there. Rows of several requests, and jumps.
        for round in 0..2u64 {
            let (mut at, mut number) = (0, 0u64);
            while at + 9000 < expected.len() {
                let len = 512 * (1 + number as usize % 16);
                let buffer = vec![(number % 250 + 1 + round) as u8; len];
                expected[at..at + len].copy_from_slice(&buffer);
                let done = |result: Result<Vec<u8>, Error>| assert!(result.is_ok());
                queue.submit(Op::Write { offset: at as u64, buffer }, Box::new(done));
                at += len + if number % 7 == 6 { 1024 } else { 0 };
                number += 1;
            }
            queue.drain();
            let mut found = vec![0; expected.len()];
            queue.image().read(0, &mut found).unwrap();
            assert!(found == expected, "round {round}");
        }
        drop(queue);
        std::fs::remove_file(&path).unwrap();
    }

    /// Bytes of a file that lie in the host's page cache, as fincore tells.
    fn resident(path: &Path) -> usize {
        let fincore = std::process::Command::new("fincore")
            .args(["--bytes", "--noheadings", "--output", "RES"])
            .arg(path)
            .output()
            .unwrap();
        String::from_utf8(fincore.stdout).unwrap().trim().parse().unwrap()
    }

    #[test]
    fn the_host_keeps_nothing_of_a_disk_that_it_is_not_to_cache() {
        const SIZE: usize = 160 << 20;
        let path = std::env::temp_dir().join(format!("vd-uncached-{}", std::process::id()));
        std::fs::write(&path, vec![1; SIZE]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        if resident(&path) > 0 {
            eprintln!("SKIPPED: the file system keeps all its files in memory");
            std::fs::remove_file(&path).unwrap();
            return;
        }
        for (cached, write) in [(false, false), (false, true), (true, false), (true, true)] {
            let image = Image::open(&path, OpenMode::ReadWrite, Format::Raw).unwrap();
            image.set_cached(cached);
            let queue = Queue::new(image, 2).unwrap();
            for at in (0..SIZE as u64).step_by(1 << 20) {
                let (offset, buffer) = (at, vec![2; 1 << 20]);
                let op = if write { Op::Write { offset, buffer } } else { Op::Read { offset, buffer } };
                queue.submit(op, Box::new(|result| assert!(result.is_ok())));
                queue.drain();
            }
            if !write {
                let most = if cached { SIZE } else { 80 << 20 };
                assert!(resident(&path) <= most, "reading left {} MiB", resident(&path) >> 20);
            }
            queue.submit(Op::Flush, Box::new(|result| assert!(result.is_ok())));
            queue.drain();
            let left = resident(&path);
            assert_eq!(left > SIZE / 2, cached, "cached {cached}, write {write}: {} MiB", left >> 20);
        }
        std::fs::remove_file(&path).unwrap();
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
