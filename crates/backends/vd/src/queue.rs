//! Requests that run on threads, for callers that must not wait.
//!
//! Requests may complete in any order. A flush covers the requests whose completion was called before the flush was
//! submitted. Completions run on the queue's threads, never inside [`Queue::submit`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::Error;
use crate::image::Image;

/// New blocks that no flush covered are made part of the file after this time, so that a killed process loses little.
const SETTLE: Duration = Duration::from_secs(5);

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

/// Called once with the request's buffer (empty where it had none).
pub type Done = Box<dyn FnOnce(Result<Vec<u8>, Error>) + Send>;

struct State {
    requests: VecDeque<(Op, Done)>,
    running: usize,
    closing: bool,
    /// When to flush new blocks that no flush covered.
    settle_at: Option<Instant>,
}

struct Shared {
    image: Image,
    settle: Duration,
    state: Mutex<State>,
    work: Condvar,
    idle: Condvar,
}

/// An image with threads that work on it. Dropping it finishes what was submitted and flushes.
pub struct Queue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Queue {
    /// Starts `threads` threads (at least one) on `image`.
    pub fn new(image: Image, threads: usize) -> std::io::Result<Self> {
        Self::start(image, threads, SETTLE)
    }

    fn start(image: Image, threads: usize, settle: Duration) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            image,
            settle,
            state: Mutex::new(State {
                requests: VecDeque::new(),
                running: 0,
                closing: false,
                settle_at: None,
            }),
            work: Condvar::new(),
            idle: Condvar::new(),
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
        self.shared.state.lock().requests.push_back((op, done));
        self.shared.work.notify_one();
    }

    /// Waits until nothing is queued or running. Not to be called from a completion.
    pub fn drain(&self) {
        let mut state = self.shared.state.lock();
        while state.running > 0 || !state.requests.is_empty() {
            self.shared.idle.wait(&mut state);
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // A completion may hold the last reference: then its thread ends by itself.
            if thread.thread().id() != own && thread.join().is_err() {
                tracing::error!(target: "vd", "a disk thread has panicked");
            }
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some((op, done)) = state.requests.pop_front() {
                state.running += 1;
                drop(state);
                done(self.run(op));
                state = self.state.lock();
                state.running -= 1;
                if state.settle_at.is_none() && self.image.is_dirty() {
                    state.settle_at = Some(Instant::now() + self.settle);
                }
                if state.running == 0 && state.requests.is_empty() {
                    self.idle.notify_all();
                }
                continue;
            }
            if state.closing {
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
                }
                Some(at) => {
                    self.work.wait_until(&mut state, at);
                }
                None => self.work.wait(&mut state),
            }
        }
    }

    fn run(&self, op: Op) -> Result<Vec<u8>, Error> {
        match op {
            Op::Read { offset, mut buffer } => self.image.read(offset, &mut buffer).map(|()| buffer),
            Op::Write { offset, buffer } => self.image.write(offset, &buffer).map(|()| buffer),
            Op::Flush => self.image.flush().map(|()| Vec::new()),
            Op::Discard { offset, len } => self.image.discard(offset, len).map(|()| Vec::new()),
        }
    }
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
        let queue = Queue::start(open(file.clone()), 2, Duration::from_millis(30)).unwrap();
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
}
