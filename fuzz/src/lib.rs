//! What several targets share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dev_storage::ide::{CdIdentity, DiskIdentity, Drive};
use dev_storage::scsi::Controller;
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

/// A guest's memory, a disk and a disc, for controllers.
pub struct Rig {
    pub pgm: Arc<Pgm>,
    pub disk: Arc<FuzzMedium>,
    pub cd: Arc<FuzzMedium>,
}

impl Rig {
    /// With a mebibyte of memory.
    pub fn new() -> Self {
        let pgm = fuzz_memory(ByteSize::mib(1));
        Self { pgm, disk: FuzzMedium::new(3000 * 512, false), cd: FuzzMedium::new(700 * 2048, true) }
    }

    pub fn disk_drive(&self) -> Drive {
        let identity = DiskIdentity { discard: true, ..DiskIdentity::virtualbox(1, 2) };
        Drive::Disk { identity, medium: self.disk.clone() }
    }

    /// The disk at target 0, the CD drive at target 1, `places` in all.
    pub fn drives(&self, places: usize) -> Vec<Option<Drive>> {
        let mut drives: Vec<Option<Drive>> = (0..places).map(|_| None).collect();
        let identity = CdIdentity::virtualbox_ahci(1);
        drives[0] = Some(self.disk_drive());
        drives[1] = Some(Drive::Cd { identity, medium: Some(self.cd.clone()) });
        drives
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.pgm.write(GuestPhys(at), bytes);
    }

    /// A command descriptor block: often one of a disk or disc, with an address that is often there.
    pub fn cdb(input: &mut Input<'_>) -> [u8; 16] {
        const USUAL: [u8; 20] = [
            0x00, 0x03, 0x12, 0x1a, 0x28, 0x2a, 0x2f, 0x35, 0x41, 0x42, 0x43, 0x46, 0x4a, 0x55, 0x5a, 0x88,
            0x8a, 0x93, 0x9e, 0xbe,
        ];
        let mut cdb = [0; 16];
        let choice = input.byte();
        let given = input.bytes(15);
        cdb[1..1 + given.len()].copy_from_slice(given);
        cdb[0] = if choice < 200 { USUAL[usize::from(choice) % USUAL.len()] } else { input.byte() };
        if choice & 1 == 0 {
            // Small addresses and lengths.
            cdb[2..5].fill(0);
            cdb[6..9].fill(0);
        }
        cdb
    }

    /// What may happen to any SCSI controller: its media answer, drives and discs change.
    pub fn happen<C: Controller + ?Sized>(&self, controller: &Mutex<C>, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 | 1 => {
                self.disk.complete_one(input.byte() % 8 == 0);
            }
            2 => {
                self.cd.complete_one(input.byte() % 8 == 0);
            }
            3 => self.complete_all(),
            4 => {
                let medium = (input.byte() & 1 != 0).then(|| FuzzMedium::new(64 * 2048, true) as _);
                let _ = controller.lock().set_medium(1, medium, input.byte() & 1 != 0);
            }
            5 => {
                let _ = controller.lock().attach(2, self.disk_drive());
            }
            6 => {
                let _ = controller.lock().detach(2);
            }
            _ => {
                // The disk is put back at once, so that there is something to do.
                let _ = controller.lock().detach(0);
                let _ = controller.lock().attach(0, self.disk_drive());
            }
        }
    }

    pub fn complete_all(&self) {
        self.disk.complete_all();
        self.cd.complete_all();
    }
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
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

/// An image in few bytes, so that changes hit what matters: its length (4 bytes, little endian), then pieces of it: offset (4),
/// length (2), bytes. What no piece covers is zeros. `examples/vd_corpus.rs` of `vd` writes such files.
pub fn image(format: vd::Format, bytes: &[u8]) {
    let mut input = Input(bytes);
    let long = |input: &mut Input<'_>| u64::from(input.word()) | u64::from(input.word()) << 16;
    let len = long(&mut input).min(64 << 20);
    let mut pieces = Vec::new();
    while !input.is_empty() {
        let at = long(&mut input);
        let count = input.word();
        pieces.push((at, input.bytes(count.into())));
    }
    vd::exercise(format, len, &pieces);
}
