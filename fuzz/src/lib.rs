//! What several targets share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp, NetDriver};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys};

/// Hands out a fuzzer's bytes; zeros when they are used up.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// At most `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(count.min(self.0.len()));
        self.0 = tail;
        head
    }
}

/// A medium in memory whose requests complete when the fuzzer says so.
pub struct FuzzMedium {
    bytes: Mutex<Vec<u8>>,
    waiting: Mutex<Vec<(BlockOp, BlockDone)>>,
    read_only: bool,
}

impl FuzzMedium {
    pub fn new(size: usize, read_only: bool) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(vec![0x5a; size]), waiting: Mutex::default(), read_only })
    }

    /// Completes the oldest request; false if there is none.
    pub fn complete_one(&self, fail: bool) -> bool {
        let (op, done) = {
            let mut waiting = self.waiting.lock();
            if waiting.is_empty() {
                return false;
            }
            waiting.remove(0)
        };
        done(if fail { Err(BlockError::NoMedium) } else { self.run(op) });
        true
    }

    pub fn complete_all(&self) {
        while self.complete_one(false) {}
    }

    fn run(&self, op: BlockOp) -> Result<Vec<u8>, BlockError> {
        let mut bytes = self.bytes.lock();
        let size = bytes.len() as u64;
        let check = |offset: u64, len: u64| match offset.checked_add(len) {
            Some(end) if end <= size => Ok(offset as usize..end as usize),
            _ => Err(BlockError::OutOfRange { offset, len, size }),
        };
        match op {
            BlockOp::Read { offset, mut buffer } => {
                let range = check(offset, buffer.len() as u64)?;
                buffer.copy_from_slice(&bytes[range]);
                Ok(buffer)
            }
            BlockOp::Write { offset, buffer } => {
                let range = check(offset, buffer.len() as u64)?;
                bytes[range].copy_from_slice(&buffer);
                Ok(buffer)
            }
            BlockOp::Flush => Ok(Vec::new()),
            BlockOp::Discard { offset, len } => check(offset, len).map(|_| Vec::new()),
        }
    }
}

impl BlockDriver for FuzzMedium {
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

/// A network that swallows frames while it is not full.
#[derive(Default)]
pub struct FuzzWire {
    pub full: AtomicBool,
}

impl NetDriver for FuzzWire {
    fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        if self.full.load(Ordering::Relaxed) { Err(frame) } else { Ok(()) }
    }

    fn resume(&self) {}
}

/// A guest's memory, from address 0 on.
pub fn fuzz_memory(size: ByteSize) -> Arc<Pgm> {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", size).unwrap());
    pgm.map(GuestPhys(0), size.0, Layer::Ram, Backing::ram(ram, 0));
    pgm
}

/// Saves `device`, loads the result into `fresh` and saves again: both must be equal.
pub fn save_and_restore<D: ssm::Saveable>(device: &mut D, fresh: &mut D) {
    let save = |d: &D| {
        let mut out = ssm::Writer::new();
        d.save(&mut out);
        out.into_bytes()
    };
    let first = save(device);
    let reader = ssm::Reader::new(device.unit_name(), device.unit_version(), &first);
    fresh.load(reader).expect("a saved state loads");
    assert!(save(fresh) == first, "save, restore, save differ");
}
