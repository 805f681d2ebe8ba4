//! What the cards' tests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;
use pdm::connector::NetDriver;
use pdm::irq::{IrqLine, IrqPin, IrqSink};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys};

pub(crate) const MAC: [u8; 6] = [0x08, 0x00, 0x27, 0x12, 0x34, 0x56];

/// The far end of an interrupt line.
#[derive(Default)]
pub(crate) struct Line {
    pub(crate) level: AtomicBool,
    pub(crate) rises: AtomicU32,
}

impl Line {
    /// The end, and the card's.
    pub(crate) fn pair() -> (Arc<Self>, IrqLine) {
        let line = Arc::new(Self::default());
        let irq = IrqPin::new(line.clone(), 0).line();
        (line, irq)
    }
}

impl IrqSink for Line {
    fn set_level(&self, _pin: u32, level: bool) {
        self.level.store(level, Ordering::SeqCst);
        self.rises.fetch_add(u32::from(level), Ordering::SeqCst);
    }
}

/// A network that keeps the guest's frames, as many as it has room for.
pub(crate) struct Wire {
    pub(crate) frames: Mutex<Vec<Vec<u8>>>,
    pub(crate) room: AtomicU32,
    pub(crate) resumed: AtomicU32,
    /// It takes TCP packets whole.
    pub(crate) whole: AtomicBool,
}

impl Wire {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            frames: Mutex::default(),
            room: AtomicU32::new(u32::MAX),
            resumed: AtomicU32::new(0),
            whole: AtomicBool::new(false),
        })
    }
}

impl NetDriver for Wire {
    fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        if self.room.load(Ordering::SeqCst) == 0 {
            return Err(frame);
        }
        self.room.fetch_sub(1, Ordering::SeqCst);
        self.frames.lock().push(frame);
        Ok(())
    }

    fn resume(&self) {
        self.resumed.fetch_add(1, Ordering::SeqCst);
    }

    fn takes_packets(&self) -> bool {
        self.whole.load(Ordering::SeqCst)
    }
}

/// A machine with so much memory.
pub(crate) fn memory(size: ByteSize) -> Arc<Pgm> {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("test", size).unwrap());
    pgm.map(GuestPhys(0), size.0, Layer::Ram, Backing::ram(ram, 0));
    pgm
}

/// A frame with `len` bytes.
pub(crate) fn frame_to(dst: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = dst.to_vec();
    frame.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame.extend((frame.len()..len).map(|i| i as u8));
    frame
}
