//! Joins image files (`vd`) to the storage controllers (`pdm`): every drive's medium is an image behind a queue with threads.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp};
use vbox_types::ByteSize;
use vd::{Format, Image, OpenMode, Queue};

use crate::config::MediumConfig;

/// Threads for each image. One keeps the order of a guest that expects it from a disk without queueing; more help on hosts with
/// slow storage.
const THREADS: usize = 2;

/// An opened image as controllers see it.
pub struct ImageDriver {
    queue: Queue,
}

impl ImageDriver {
    /// Opens the image that the settings name.
    pub fn open(medium: &MediumConfig) -> Result<Arc<Self>> {
        let path = &medium.path;
        let cannot = || format!("cannot open the medium \"{}\"", path.display());
        let mode = match medium {
            MediumConfig { read_only: true, .. } => OpenMode::ReadOnly,
            MediumConfig { shareable: true, .. } => OpenMode::Shareable,
            _ => OpenMode::ReadWrite,
        };
        let parents = medium.parents.iter().map(|(path, name)| Ok((path.clone(), format(path, name)?)));
        let parents = parents.collect::<Result<Vec<_>>>()?;
        let own = format(path, &medium.format)?;
        let image = match parents.is_empty() {
            true => Image::open(path, mode, own),
            false => vd::open_chain(&parents, OpenMode::ReadOnly)
                .and_then(|parent| Image::open_child(path, mode, own, parent)),
        };
        Ok(Arc::new(Self { queue: Queue::new(image.with_context(cannot)?, THREADS)? }))
    }

    /// Waits for what the guest asked for and makes all of it durable.
    pub fn settle(&self) -> Result<(), vd::Error> {
        self.queue.drain();
        if self.queue.image().is_read_only() { Ok(()) } else { self.queue.image().flush() }
    }
}

/// The format that is on record for a file; a file without one is looked at.
fn format(path: &Path, name: &str) -> Result<Format> {
    match Format::from_name(name) {
        Some(format) => Ok(format),
        None if name.is_empty() => {
            vd::probe(path).with_context(|| format!("cannot open the medium \"{}\"", path.display()))
        }
        None => anyhow::bail!(
            "the medium \"{}\" is of the format {name}, which is not known: convert it to VDI or a raw image",
            path.display()
        ),
    }
}

fn block_error(error: vd::Error) -> BlockError {
    tracing::warn!(target: "vd", "{:#}", anyhow::Error::new(error).context("a request of the guest failed"));
    BlockError::Io(std::io::Error::other("the image reported an error"))
}

impl BlockDriver for ImageDriver {
    fn size(&self) -> ByteSize {
        self.queue.image().size()
    }

    fn is_read_only(&self) -> bool {
        self.queue.image().is_read_only()
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        let op = match op {
            BlockOp::Read { offset, buffer } => vd::Op::Read { offset, buffer },
            BlockOp::Write { offset, buffer } => vd::Op::Write { offset, buffer },
            BlockOp::Flush => vd::Op::Flush,
            BlockOp::Discard { offset, len } => vd::Op::Discard { offset, len },
        };
        self.queue.submit(op, Box::new(|result| done(result.map_err(block_error))));
    }
}
