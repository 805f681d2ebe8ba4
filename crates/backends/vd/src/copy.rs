//! Content from one image to another.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;

use parking_lot::Mutex;
use uuid::Uuid;
use vbox_types::ByteSize;

use crate::create::{CreateOptions, create};
use crate::error::Error;
use crate::format::Variant;
use crate::image::{Image, MediumInfo, OpenMode, is_zero};
use crate::vmdk::{NewVmdk, StreamWriter};

/// Bytes that are moved at a time.
const PIECE: u64 = 4 << 20;
/// Bytes that a thread copies at a time: they stay in its core's cache from reading to writing.
const COPY_PIECE: u64 = 1 << 20;
/// Bytes between two flushes while copying.
const FLUSH_EACH: u64 = 128 << 20;
/// Runs of zeros of this many bytes are not copied to a new image.
const ZERO_UNIT: usize = 32 << 10;
/// Bytes of a grain of stream-optimized images.
const GRAIN: u64 = crate::vmdk::GRAIN as u64;

/// Told now and then how many bytes of how many are done; `false` stops the operation with [`Error::Cancelled`].
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

fn step(progress: Progress<'_>, image: &Image, done: u64) -> Result<(), Error> {
    if progress(done, image.size().0) {
        Ok(())
    } else {
        Err(Error::Cancelled { path: image.path().to_owned() })
    }
}

/// Makes `target` hold what `source` shows. Where `target` is larger, the rest stays; where it is smaller, the source is cut.
///
/// Several threads move pieces, and one makes what was moved durable meanwhile, so that host's storage works from the start.
pub fn copy(source: &Image, target: &Image, progress: Progress<'_>) -> Result<(), Error> {
    let size = source.size().0.min(target.size().0);
    // What a new image, or its parent, holds needs no second look; a target that is in use may hold anything.
    let fresh = target.next_data(0, size)?.is_none();
    if !fresh {
        clear(source, target, size)?;
    }
    let work = Pieces { source, size, next: Mutex::new(Ok(0)) };
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let moved = AtomicU64::new(0);
    let done = std::thread::scope(|scope| -> Result<(), Error> {
        let (tell, told) = mpsc::channel::<Result<u64, Error>>();
        let (flush, to_flush) = mpsc::channel::<()>();
        for _ in 0..threads {
            let (tell, flush, work, moved) = (tell.clone(), flush.clone(), &work, &moved);
            scope.spawn(move || {
                let mut buffer = vec![0; COPY_PIECE.min(size) as usize];
                while let Some(range) = work.take().transpose() {
                    let step = range.and_then(|range| {
                        let piece = &mut buffer[..(range.end - range.start) as usize];
                        source.read(range.start, piece)?;
                        write_piece(target, range.start, piece, fresh)?;
                        let before = moved.fetch_add(piece.len() as u64, Ordering::Relaxed);
                        if before / FLUSH_EACH != (before + piece.len() as u64) / FLUSH_EACH {
                            let _ = flush.send(());
                        }
                        Ok(range.end)
                    });
                    let failed = step.is_err();
                    if tell.send(step).is_err() || failed {
                        break;
                    }
                }
            });
        }
        drop((tell, flush));
        scope.spawn(move || {
            while to_flush.recv().is_ok() {
                // All that have been asked for so far are one.
                while to_flush.try_recv().is_ok() {}
                // A failure is remembered by the image, and told by the last flush.
                let _ = target.flush();
            }
        });
        let mut furthest = 0;
        for step in told {
            furthest = furthest.max(step.inspect_err(|_| work.stop())?);
            if !progress(furthest.min(source.size().0), source.size().0) {
                work.stop();
                return Err(Error::Cancelled { path: source.path().to_owned() });
            }
        }
        Ok(())
    });
    done?;
    target.flush()?;
    step(progress, source, source.size().0)
}

/// The stretches of an image that may hold something, handed out one after the other to several threads.
struct Pieces<'a> {
    source: &'a Image,
    size: u64,
    /// Where the next one is looked for; an error once there is no more to be handed out.
    next: Mutex<Result<u64, ()>>,
}

impl Pieces<'_> {
    fn take(&self) -> Result<Option<Range<u64>>, Error> {
        let mut next = self.next.lock();
        let Ok(at) = *next else { return Ok(None) };
        // Whatever goes wrong, nobody else has to run into it, too.
        *next = Err(());
        let Some(range) = self.source.next_data(at, self.size)? else { return Ok(None) };
        // Pieces end at multiples of their size, so that two threads seldom fill one block of the target.
        let end = range.end.min((range.start / COPY_PIECE + 1) * COPY_PIECE);
        *next = Ok(end);
        Ok(Some(range.start..end))
    }

    fn stop(&self) {
        *self.next.lock() = Err(());
    }
}

/// Writes a piece; onto a target that holds nothing, zeros are left out.
fn write_piece(target: &Image, start: u64, piece: &[u8], fresh: bool) -> Result<(), Error> {
    if !fresh {
        return target.write(start, piece);
    }
    let mut at = 0;
    for run in piece.chunks(ZERO_UNIT).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len = run.iter().map(|chunk| chunk.len()).sum::<usize>();
        if !is_zero(run[0]) {
            target.write(start + at as u64, &piece[at..at + len])?;
        }
        at += len;
    }
    Ok(())
}

/// Writes zeros over what `target` holds where `source` holds nothing.
fn clear(source: &Image, target: &Image, size: u64) -> Result<(), Error> {
    let zeros = vec![0; PIECE.min(size) as usize];
    let mut at = 0;
    while at < size {
        let next = source.next_data(at, size)?;
        let start = next.as_ref().map_or(size, |r| r.start);
        while let Some(stale) = target.next_data(at, start)? {
            let count = (stale.end - stale.start).min(zeros.len() as u64);
            target.write(stale.start, &zeros[..count as usize])?;
            at = stale.start + count;
        }
        at = next.map_or(size, |r| r.end);
    }
    Ok(())
}

/// Creates a new image that holds what `source` shows, parents included. `options.size` may be larger than the source.
pub fn clone(
    source: &Image,
    path: &Path,
    options: &CreateOptions,
    progress: Progress<'_>,
) -> Result<MediumInfo, Error> {
    if options.variant == Variant::StreamOptimized {
        let new = CreateOptions { variant: Variant::Fixed, format: crate::Format::Raw, ..options.clone() };
        // An empty file of ours, in place of which the stream is written.
        create(path, &new)?;
        let done = std::fs::OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(path)
            .map_err(|e| Error::host("open", path, e))
            .and_then(|mut file| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
                write_stream_optimized(source, &mut file, &name, uuid, progress)?;
                file.sync_all().map_err(|e| Error::host("write to", path, e))
            });
        return finish(path, options, done);
    }
    create(path, options)?;
    let done = Image::open(path, OpenMode::ReadWrite, options.format)
        .and_then(|target| copy(source, &target, progress));
    finish(path, options, done)
}

/// As [`clone`], of an encrypted image whose key is not at hand: what is stored is taken over as it is. What nothing is stored for reads as
/// zeros and is not encrypted, so the new image must not hold zeros for it: it grows, and has blocks no larger than the source's.
pub fn clone_encrypted(
    source: &Image,
    path: &Path,
    options: &CreateOptions,
    progress: Progress<'_>,
) -> Result<MediumInfo, Error> {
    create(path, options)?;
    let done = Image::open(path, OpenMode::ReadWrite, options.format).and_then(|target| {
        copy(source, &target, progress)?;
        if holds_more(&target, source)? {
            let what = "parts of blocks that are encrypted while others were never written; clone to the source's own format, with a \
                        size that grows, or decrypt the source first";
            return Err(Error::unsupported(path, what));
        }
        Ok(())
    });
    finish(path, options, done)
}

/// Whether `image` holds something where `source` holds nothing.
fn holds_more(image: &Image, source: &Image) -> Result<bool, Error> {
    let mut at = 0;
    while let Some(own) = image.next_own(at)? {
        at = own.start;
        while at < own.end {
            match source.next_data(at, own.end)? {
                Some(data) if data.start == at => at = data.end,
                _ => return Ok(true),
            }
        }
    }
    Ok(false)
}

fn finish(path: &Path, options: &CreateOptions, done: Result<(), Error>) -> Result<MediumInfo, Error> {
    match done {
        Ok(()) => crate::info(path, Some(options.format)),
        Err(error) => {
            // A part of a copy is of no use to anyone.
            let _ = crate::delete(path, options.format);
            Err(error)
        }
    }
}

/// Writes what `source` shows as a stream-optimized VMDK image, from start to end, to a file, pipe or archive. `name` is the file's
/// name in the descriptor. Returns the number of bytes written.
pub fn write_stream_optimized(
    source: &Image,
    out: &mut dyn Write,
    name: &str,
    uuid: Uuid,
    progress: Progress<'_>,
) -> Result<u64, Error> {
    let size = source.size();
    let host = |e| Error::host("write the stream-optimized copy", name, e);
    let new = NewVmdk {
        variant: Variant::StreamOptimized,
        size: size.0,
        uuid,
        parent: None,
        comment: String::new(),
    };
    let Some(mut writer) = StreamWriter::new(out, Path::new(name), &new).map_err(host)? else {
        return Err(too_large(size));
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    let mut at = 0;
    while let Some(range) = source.next_data(at, size.0)? {
        step(progress, source, range.start)?;
        let first = range.start / GRAIN;
        let end = range.end.div_ceil(GRAIN).min(first + PIECE / GRAIN);
        for (number, packed) in pack_grains(source, first, end, threads)? {
            writer.grain(number, &packed).map_err(host)?;
        }
        at = end * GRAIN;
    }
    let len = writer.finish().map_err(host)?;
    step(progress, source, size.0)?;
    Ok(len)
}

fn too_large(size: ByteSize) -> Error {
    Error::BadSize { format: crate::Format::Vmdk, size: size.0, why: "the limit is 4 TiB" }
}

/// Reads and compresses the grains `first..end` that hold something else than zeros.
fn pack_grains(source: &Image, first: u64, end: u64, threads: usize) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    let start = first * GRAIN;
    let mut data = vec![0; ((end - first) * GRAIN) as usize];
    let inside = (source.size().0 - start).min(data.len() as u64) as usize;
    source.read(start, &mut data[..inside])?;
    let grains: Vec<(u64, &[u8])> = (first..).zip(data.chunks(GRAIN as usize)).collect();
    let share = grains.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let work: Vec<_> = grains
            .chunks(share)
            .map(|part| {
                scope.spawn(move || -> std::io::Result<Vec<(u64, Vec<u8>)>> {
                    let full = part.iter().filter(|(_, grain)| !is_zero(grain));
                    full.map(|(number, grain)| Ok((*number, crate::vmdk::pack(grain)?))).collect()
                })
            })
            .collect();
        let mut out = Vec::new();
        for thread in work {
            let part = thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread has panicked")));
            out.extend(part.map_err(|e| Error::host("compress data of", source.path(), e))?);
        }
        Ok(out)
    })
}
