//! A medium in memory and an interrupt line that remembers, for the controllers' tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp};
use pdm::irq::{IrqLine, IrqPin, IrqSink};
use vbox_types::ByteSize;

/// A medium whose requests wait until the test lets them complete.
pub(crate) struct MemoryMedium {
    pub(crate) bytes: Mutex<Vec<u8>>,
    waiting: Mutex<Vec<(BlockOp, BlockDone)>>,
    pub(crate) read_only: bool,
    /// Every request fails.
    pub(crate) broken: AtomicBool,
    pub(crate) flushes: AtomicU32,
}

impl MemoryMedium {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Self::with(bytes, false)
    }

    pub(crate) fn with(bytes: Vec<u8>, read_only: bool) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            waiting: Mutex::default(),
            read_only,
            broken: AtomicBool::new(false),
            flushes: AtomicU32::new(0),
        })
    }

    /// Each sector filled with its own number.
    pub(crate) fn numbered(sectors: usize, size: usize) -> Arc<Self> {
        Self::new((0..sectors).flat_map(|n| vec![n as u8; size]).collect())
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Completes the oldest request; false if there is none.
    pub(crate) fn complete_one(&self) -> bool {
        let (op, done) = {
            let mut waiting = self.waiting.lock();
            if waiting.is_empty() {
                return false;
            }
            waiting.remove(0)
        };
        done(self.run(op));
        true
    }

    /// Completes requests, and those that follow from them, until none is left.
    pub(crate) fn complete_all(&self) {
        while self.complete_one() {}
    }

    fn run(&self, op: BlockOp) -> Result<Vec<u8>, BlockError> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(BlockError::Io(std::io::ErrorKind::Other.into()));
        }
        let mut bytes = self.bytes.lock();
        let size = bytes.len() as u64;
        let check = |offset: u64, len: u64| {
            if offset.checked_add(len).is_none_or(|end| end > size) {
                Err(BlockError::OutOfRange { offset, len, size })
            } else {
                Ok(offset as usize..(offset + len) as usize)
            }
        };
        match op {
            BlockOp::Read { offset, mut buffer } => {
                let range = check(offset, buffer.len() as u64)?;
                buffer.copy_from_slice(&bytes[range]);
                Ok(buffer)
            }
            BlockOp::Write { offset, buffer } => {
                if self.read_only {
                    return Err(BlockError::ReadOnly);
                }
                let range = check(offset, buffer.len() as u64)?;
                bytes[range].copy_from_slice(&buffer);
                Ok(buffer)
            }
            BlockOp::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
                Ok(Vec::new())
            }
            BlockOp::Discard { offset, len } => {
                let range = check(offset, len)?;
                bytes[range].fill(0);
                Ok(Vec::new())
            }
        }
    }
}

impl BlockDriver for MemoryMedium {
    fn size(&self) -> ByteSize {
        ByteSize(self.bytes.lock().len() as u64)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        self.waiting.lock().push((op, done));
    }
}

/// The level of an interrupt line and how often it rose.
#[derive(Default)]
pub(crate) struct Line {
    level: AtomicBool,
    rises: AtomicU32,
}

impl IrqSink for Line {
    fn set_level(&self, _pin: u32, level: bool) {
        self.level.store(level, Ordering::SeqCst);
        if level {
            self.rises.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Line {
    pub(crate) fn connect() -> (Arc<Self>, IrqLine) {
        let line = Arc::new(Self::default());
        let end = IrqPin::new(line.clone(), 0).line();
        (line, end)
    }

    pub(crate) fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    pub(crate) fn rises(&self) -> u32 {
        self.rises.load(Ordering::SeqCst)
    }
}

/// Holds a unit's format still: `bytes`, saved now, must be those of the golden file (hexadecimal, made when the version was
/// introduced). Another format needs another version, and a golden file of its own beside the old one.
pub(crate) fn assert_golden(bytes: &[u8], golden: &str) {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(text, golden.split_whitespace().collect::<String>());
}
