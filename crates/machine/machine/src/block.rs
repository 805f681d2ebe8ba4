//! Joins image files (`vd`) to the storage controllers (`pdm`): every drive's medium is an image behind a queue with threads.

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
        let format = match Format::from_name(&medium.format) {
            Some(format) => format,
            None if medium.format.is_empty() => {
                vd::probe(path).with_context(|| format!("cannot open the medium \"{}\"", path.display()))?
            }
            None => anyhow::bail!(
                "the medium \"{}\" is of the format {}, which is not available yet: convert it to VDI or a raw image",
                path.display(),
                medium.format
            ),
        };
        let mode = if medium.read_only { OpenMode::ReadOnly } else { OpenMode::ReadWrite };
        let image = Image::open(path, mode, format)
            .with_context(|| format!("cannot open the medium \"{}\"", path.display()))?;
        Ok(Arc::new(Self { queue: Queue::new(image, THREADS)? }))
    }

    /// Waits for what the guest asked for and makes all of it durable.
    pub fn settle(&self) -> Result<(), vd::Error> {
        self.queue.drain();
        if self.queue.image().is_read_only() { Ok(()) } else { self.queue.image().flush() }
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
