//! What the image formats cost: the same load as `qemu-img bench`, through [`vd::Queue`] as controllers use it.
//!
//! ```text
//! vd_bench bench FORMAT FILE [--write] [--uncached] [--depth N] [--size BYTES] [--step BYTES] [--count N] [--flush-interval N] [--threads N]
//! vd_bench create FORMAT FILE BYTES
//! vd_bench clone FORMAT FILE FORMAT NEW_FILE
//! ```
//!
//! `bench` prints the seconds from the first request to the last completion, opening and closing left out, as `qemu-img bench`
//! does: request number *n* is for byte *n* × step, modulo the image's size, and each completion submits the next request.
//! `tools/vd-bench` runs both beside each other.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vbox_types::ByteSize;
use vd::{CreateOptions, Format, Image, Op, OpenMode, Queue, Variant};

struct Load {
    queue: Queue,
    write: bool,
    len: usize,
    step: u64,
    count: u64,
    flush_interval: u64,
    next: AtomicU64,
    done: AtomicU64,
    finished: mpsc::Sender<Result<()>>,
}

impl Load {
    /// Submits the next request, if there is one left. `buffer` is one that has come back.
    fn submit(self: &Arc<Self>, mut buffer: Vec<u8>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number >= self.count {
            return;
        }
        let size = self.queue.image().size().0;
        let span = size - size % self.len as u64;
        let mut offset = number * self.step % span;
        if offset + self.len as u64 > size {
            offset = 0;
        }
        buffer.resize(self.len, 0x5a);
        let op = match self.write {
            true => Op::Write { offset, buffer },
            false => Op::Read { offset, buffer },
        };
        let load = self.clone();
        self.queue.submit(op, Box::new(move |result| load.completed(result)));
    }

    fn completed(self: Arc<Self>, result: Result<Vec<u8>, vd::Error>) {
        let buffer = match result {
            Ok(buffer) => buffer,
            Err(error) => {
                let _ = self.finished.send(Err(error.into()));
                return;
            }
        };
        let done = self.done.fetch_add(1, Ordering::AcqRel) + 1;
        if done == self.count {
            let _ = self.finished.send(Ok(()));
        } else if self.flush_interval > 0 && done.is_multiple_of(self.flush_interval) {
            let load = self.clone();
            self.queue.submit(Op::Flush, Box::new(move |_| load.submit(buffer)));
        } else {
            self.submit(buffer);
        }
    }
}

fn bench(format: Format, path: &Path, options: &[String]) -> Result<()> {
    let (mut write, mut depth, mut len, mut step, mut count) = (false, 64u64, 4096u64, None, 75_000);
    let (mut flush_interval, mut threads, mut cached) = (0, 2, true);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        match option.as_str() {
            "--write" => write = true,
            "--uncached" => cached = false,
            _ => {}
        }
        if matches!(option.as_str(), "--write" | "--uncached") {
            continue;
        }
        let value: u64 = options.next().context("a value is missing")?.parse()?;
        match option.as_str() {
            "--depth" => depth = value,
            "--size" => len = value,
            "--step" => step = Some(value),
            "--count" => count = value,
            "--flush-interval" => flush_interval = value,
            "--threads" => threads = value as usize,
            _ => bail!("unknown option {option}"),
        }
    }
    let mode = if write { OpenMode::ReadWrite } else { OpenMode::ReadOnly };
    let image = Image::open(path, mode, format)?;
    image.set_cached(cached);
    let queue = Queue::new(image, threads)?;
    let (finished, wait) = mpsc::channel();
    let load = Arc::new(Load {
        queue,
        write,
        len: len as usize,
        step: step.unwrap_or(len),
        count,
        flush_interval,
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        finished,
    });
    let buffers: Vec<Vec<u8>> = (0..depth).map(|_| vec![0x5a; len as usize]).collect();
    let start = Instant::now();
    for buffer in buffers {
        load.submit(buffer);
    }
    wait.recv()??;
    let seconds = start.elapsed().as_secs_f64();
    load.queue.drain();
    load.queue.image().flush()?;
    println!("{seconds:.4}");
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let format = |name: &str| {
        let name = if name == "qcow2" { "qcow" } else { name };
        Format::from_name(name).with_context(|| format!("unknown format {name}"))
    };
    let options = |format, size| CreateOptions {
        format,
        variant: Variant::Dynamic,
        size,
        uuid: None,
        comment: String::new(),
    };
    match &args[..] {
        [verb, kind, path, rest @ ..] if verb == "bench" => bench(format(kind)?, path.as_ref(), rest),
        [verb, kind, path, size] if verb == "create" => {
            vd::create(path.as_ref(), &options(format(kind)?, ByteSize(size.parse()?)))?;
            Ok(())
        }
        [verb, kind, path, new_kind, new] if verb == "clone" => {
            let start = Instant::now();
            let source = Image::open(path.as_ref(), OpenMode::ReadOnly, format(kind)?)?;
            let new_options = options(format(new_kind)?, source.size());
            vd::clone(&source, new.as_ref(), &new_options, &mut |_, _| true)?;
            println!("{:.4}", start.elapsed().as_secs_f64());
            Ok(())
        }
        _ => bail!("see the head of examples/vd_bench.rs for the arguments"),
    }
}
