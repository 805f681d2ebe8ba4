use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use pdm::doorbell::{BellId, Doorbell, Place, Watcher};
use pdm::pci::{DevFn, PciBus};
use pdm::{Device, Iom, MmioDevice, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use ssm::{Reader, Saveable, Writer};
use vbox_types::{ByteSize, GuestPhys};

use super::controller::Out;
use super::spec::{admin, feature, io, reg, status};
use super::{Disk, Nvme, Wiring};
use crate::testing::{Line, MemoryMedium, assert_golden};

const ADMIN_SQ: u64 = 0x1000;
const ADMIN_CQ: u64 = 0x2000;
const IO_SQ: u64 = 0x3000;
const IO_CQ: u64 = 0x4000;
const DATA: u64 = 0x10_0000;
/// Entries of each queue.
const ENTRIES: u32 = 8;

/// A driver with one pair of I/O queues.
struct Driver {
    pgm: Arc<Pgm>,
    nvme: Arc<Mutex<Nvme>>,
    medium: Arc<MemoryMedium>,
    line: Arc<Line>,
    /// Tail of each submission queue; head and phase of each completion queue.
    tails: [u32; 2],
    heads: [(u32, bool); 2],
    next_cid: u16,
}

fn wire() -> (Arc<Pgm>, Arc<Mutex<Nvme>>, Arc<MemoryMedium>, Arc<Line>) {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize::mib(4)).unwrap());
    pgm.map(GuestPhys(0), 4 << 20, Layer::Ram, Backing::ram(ram, 0));
    let (line, irq) = Line::connect();
    let medium = MemoryMedium::numbered(2048, 512);
    let disk = Disk { medium: medium.clone(), uuid: [7; 16], discard: true };
    let nvme = Nvme::new(Wiring { pgm: pgm.clone(), irq }, vec![None, Some(disk)]);
    (pgm, nvme, medium, line)
}

/// A submission queue entry.
fn entry(opcode: u8, nsid: u32, prp: [u64; 2], dwords: [u32; 3]) -> [u8; 64] {
    let mut raw = [0; 64];
    raw[0] = opcode;
    raw[4..8].copy_from_slice(&nsid.to_le_bytes());
    raw[24..32].copy_from_slice(&prp[0].to_le_bytes());
    raw[32..40].copy_from_slice(&prp[1].to_le_bytes());
    for (at, dw) in [40, 44, 48].into_iter().zip(dwords) {
        raw[at..at + 4].copy_from_slice(&dw.to_le_bytes());
    }
    raw
}

impl Driver {
    /// A controller that is switched on.
    fn new() -> Self {
        let (pgm, nvme, medium, line) = wire();
        let driver = Self { pgm, nvme, medium, line, tails: [0; 2], heads: [(0, true); 2], next_cid: 100 };
        driver.enable();
        assert_eq!(driver.register(reg::CSTS), 1);
        driver
    }

    /// As above, with I/O queues.
    fn with_io() -> Self {
        let mut driver = Self::new();
        let size = (ENTRIES - 1) << 16 | 1;
        assert_eq!(driver.admin(admin::CREATE_CQ, IO_CQ, size, 3).0, 0);
        assert_eq!(driver.admin(admin::CREATE_SQ, IO_SQ, size, 1 << 16 | 1).0, 0);
        driver
    }

    fn enable(&self) {
        self.set(reg::AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        self.set(reg::ASQ, ADMIN_SQ as u32);
        self.nvme.lock().mmio_write(0, reg::ACQ, &ADMIN_CQ.to_le_bytes());
        self.set(reg::CC, 0x0046_0001);
    }

    fn set(&self, at: u64, value: u32) {
        self.nvme.lock().mmio_write(0, at, &value.to_le_bytes());
    }

    fn register(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.nvme.lock().mmio_read(0, at, &mut data);
        u32::from_le_bytes(data)
    }

    /// Gives a command without waiting; its identifier.
    fn submit(&mut self, queue: usize, mut raw: [u8; 64]) -> u16 {
        self.next_cid += 1;
        raw[2..4].copy_from_slice(&self.next_cid.to_le_bytes());
        let base = [ADMIN_SQ, IO_SQ][queue];
        self.pgm.write(GuestPhys(base + 64 * u64::from(self.tails[queue])), &raw);
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        self.set(0x1000 + 8 * queue as u64, self.tails[queue]);
        self.next_cid
    }

    /// Takes the next completion: command, status, first dword.
    fn completion(&mut self, queue: usize) -> Option<(u16, u16, u32)> {
        let base = [ADMIN_CQ, IO_CQ][queue];
        let (head, phase) = self.heads[queue];
        let mut raw = [0; 16];
        self.pgm.read(GuestPhys(base + 16 * u64::from(head)), &mut raw);
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        if (word(14) & 1 != 0) != phase {
            return None;
        }
        let next = (head + 1) % ENTRIES;
        self.heads[queue] = (next, phase ^ (next == 0));
        self.set(0x1004 + 8 * queue as u64, next);
        let dw0 = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        Some((word(12), word(14) >> 1 & 0x7ff, dw0))
    }

    /// Gives a command and lets the medium do all; status and first dword.
    fn run(&mut self, queue: usize, raw: [u8; 64]) -> (u16, u32) {
        let cid = self.submit(queue, raw);
        self.medium.complete_all();
        let (done, status, dw0) = self.completion(queue).expect("a completion");
        assert_eq!(done, cid);
        (status, dw0)
    }

    fn admin(&mut self, opcode: u8, prp: u64, dw10: u32, dw11: u32) -> (u16, u32) {
        self.run(0, entry(opcode, 0, [prp, 0], [dw10, dw11, 0]))
    }

    fn io(&mut self, opcode: u8, prp: [u64; 2], lba: u32, blocks: u32) -> u16 {
        self.run(1, entry(opcode, 2, prp, [lba, 0, blocks - 1])).0
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut data);
        data
    }
}

#[test]
fn the_registers_tell_what_the_controller_can() {
    let driver = Driver::new();
    let mut cap = [0; 8];
    driver.nvme.lock().mmio_read(0, reg::CAP, &mut cap);
    assert_eq!(u64::from_le_bytes(cap), 0x0040_0020_1401_03ff);
    assert_eq!(driver.register(reg::VS), 0x0001_0200);
    driver.set(reg::CC, 0);
    assert_eq!(driver.register(reg::CSTS), 0);
}

#[test]
fn a_configuration_that_makes_no_sense_is_a_fatal_error_until_it_is_taken_back() {
    for (at, value) in [(reg::AQA, 0), (reg::ASQ + 4, 0), (reg::CC, 0x0046_0580)] {
        let (_, nvme, ..) = wire();
        let set = |at: u64, value: u32| nvme.lock().mmio_write(0, at, &value.to_le_bytes());
        set(reg::AQA, 0x0007_0007);
        set(reg::ASQ, 0x1000);
        set(reg::ACQ, 0x2000);
        set(at, value);
        let cc = if at == reg::CC { value } else { 0x0046_0000 };
        set(reg::CC, cc | 1);
        let mut csts = [0];
        nvme.lock().mmio_read(0, reg::CSTS, &mut csts);
        // The address is fine.
        assert_eq!(csts[0], if at == reg::ASQ + 4 { 1 } else { 2 }, "0x{at:x}");
        set(reg::CC, 0);
        nvme.lock().mmio_read(0, reg::CSTS, &mut csts);
        assert_eq!(csts[0], 0);
    }
}

#[test]
fn identify_names_controller_and_namespaces() {
    let mut driver = Driver::new();
    assert_eq!(driver.admin(admin::IDENTIFY, DATA, 1, 0).0, 0);
    let controller = driver.bytes(DATA, 4096);
    assert_eq!(&controller[..4], [0xee, 0x80, 0xee, 0x80]);
    assert_eq!(&controller[4..44], b"VB1234-56789        ORCL-VBOX-NVME-VER12");
    assert_eq!((controller[77], controller[516], controller[525]), (7, 2, 1));
    assert_eq!(driver.admin(admin::IDENTIFY, DATA, 2, 0).0, 0);
    assert_eq!(driver.bytes(DATA, 8), [2, 0, 0, 0, 0, 0, 0, 0]);
    for (nsid, blocks) in [(1, 0u64), (2, 2048)] {
        assert_eq!(driver.run(0, entry(admin::IDENTIFY, nsid, [DATA, 0], [0; 3])).0, 0);
        assert_eq!(driver.bytes(DATA, 8), blocks.to_le_bytes());
    }
    let beyond = driver.run(0, entry(admin::IDENTIFY, 3, [DATA, 0], [0; 3])).0;
    assert_eq!(beyond, status::INVALID_NAMESPACE);
    assert_eq!(driver.admin(admin::IDENTIFY, DATA, 3, 0).0, status::INVALID_FIELD);
    // An odd place crosses a page: the second entry is needed.
    let split = [DATA + 0x800, DATA + 0x5000];
    assert_eq!(driver.run(0, entry(admin::IDENTIFY, 0, split, [1, 0, 0])).0, 0);
    assert_eq!(driver.bytes(DATA + 0x800, 4), [0xee, 0x80, 0xee, 0x80]);
    assert_eq!(driver.bytes(DATA + 0x5000, 2), 2500u16.to_le_bytes());
}

#[test]
fn blocks_are_written_and_read_through_page_lists() {
    let mut driver = Driver::with_io();
    // 5 pages from the middle of one on: six pieces, five of them in a list whose last entry leads to the next.
    let pages = [0x20, 0x31, 0x22, 0x39, 0x28].map(|page: u64| DATA + 0x1000 * page);
    let list = 0x8ff0;
    for (at, value) in [(list, pages[0]), (list + 8, 0xa000), (0xa000, pages[1]), (0xa008, pages[2])] {
        driver.pgm.write(GuestPhys(at), &value.to_le_bytes());
    }
    for (at, value) in [(0xa010, pages[3]), (0xa018, pages[4])] {
        driver.pgm.write(GuestPhys(at), &value.to_le_bytes());
    }
    let data: Vec<u8> = (0..5 * 4096u32).map(|i| (i % 251) as u8).collect();
    let pieces = std::iter::once((DATA + 0x200, 0xe00)).chain(pages.map(|p| (p, 0x1000)));
    let mut rest = &data[..];
    for (at, len) in pieces {
        let (head, tail) = rest.split_at(rest.len().min(len));
        driver.pgm.write(GuestPhys(at), head);
        rest = tail;
    }
    assert_eq!(driver.io(io::WRITE, [DATA + 0x200, list], 10, 40), 0);
    assert_eq!(driver.medium.bytes.lock()[5120..5120 + data.len()], data);
    assert_eq!(driver.io(io::READ, [DATA + 0x10_0000, DATA + 0x10_1000], 10, 9), 0);
    assert_eq!(driver.bytes(DATA + 0x10_0000, 9 * 512), data[..9 * 512]);
    assert!(driver.line.level() || driver.heads[1].0 > 0);
}

#[test]
fn commands_that_cannot_be_are_refused() {
    let mut driver = Driver::with_io();
    assert_eq!(driver.io(io::READ, [DATA, 0], 2047, 2), status::LBA_RANGE);
    assert_eq!(driver.io(io::READ, [DATA + 1, 0], 0, 1), status::PRP_OFFSET);
    assert_eq!(driver.io(io::READ, [DATA, DATA + 0x1200], 0, 16), status::PRP_OFFSET);
    assert_eq!(driver.io(io::READ, [DATA, 0], 0, 1025), status::INVALID_FIELD);
    assert_eq!(driver.io(0x7f, [DATA, 0], 0, 1), status::INVALID_OPCODE);
    let other = entry(io::READ, 1, [DATA, 0], [0; 3]);
    assert_eq!(driver.run(1, other).0, status::INVALID_NAMESPACE);
    // A list that only leads to itself.
    driver.pgm.write(GuestPhys(0x8ff8), &0x8ff8u64.to_le_bytes());
    assert_eq!(driver.io(io::READ, [DATA, 0x8ff8], 0, 100), status::PRP_OFFSET);
    assert_eq!(driver.admin(0x7f, 0, 0, 0).0, status::INVALID_OPCODE);
    assert_eq!(driver.admin(admin::CREATE_CQ, IO_CQ, 7 << 16 | 1, 3).0, status::INVALID_QUEUE);
    assert_eq!(driver.admin(admin::CREATE_CQ, IO_CQ, 2, 3).0, status::QUEUE_SIZE);
    assert_eq!(driver.admin(admin::CREATE_CQ, IO_CQ, 7 << 16 | 2, 17 << 16 | 3).0, status::INVALID_VECTOR);
    assert_eq!(driver.admin(admin::CREATE_SQ, IO_SQ, 7 << 16 | 2, 5 << 16 | 1).0, status::INVALID_CQ);
    assert_eq!(driver.admin(admin::DELETE_CQ, 0, 1, 0).0, status::QUEUE_DELETION);
    // All of it is in the error log, the last first.
    assert_eq!(driver.admin(admin::GET_LOG, DATA, 63 << 16 | 1, 0).0, 0);
    let log = driver.bytes(DATA, 64);
    assert_eq!(u16::from_le_bytes([log[12], log[13]]) >> 1, status::QUEUE_DELETION);
}

#[test]
fn a_flush_waits_for_the_medium_and_forced_writes_flush() {
    let mut driver = Driver::with_io();
    driver.submit(1, entry(io::FLUSH, 2, [0; 2], [0; 3]));
    assert!(driver.completion(1).is_none());
    driver.medium.complete_all();
    assert_eq!(driver.completion(1).map(|c| c.1), Some(0));
    assert_eq!(driver.medium.flushes.load(Ordering::Relaxed), 1);
    driver.run(1, entry(io::WRITE, 2, [DATA, 0], [0, 0, 1 << 30]));
    assert_eq!(driver.medium.flushes.load(Ordering::Relaxed), 2);
    assert_eq!(driver.io(io::WRITE, [DATA, 0], 0, 1), 0);
    assert_eq!(driver.medium.flushes.load(Ordering::Relaxed), 2);
    // Without its write cache the controller flushes every write.
    assert_eq!(driver.admin(admin::SET_FEATURES, 0, feature::WRITE_CACHE.into(), 0).0, 0);
    assert_eq!(driver.io(io::WRITE, [DATA, 0], 0, 1), 0);
    assert_eq!(driver.medium.flushes.load(Ordering::Relaxed), 3);
    assert_eq!(driver.run(1, entry(io::FLUSH, u32::MAX, [0; 2], [0; 3])).0, 0);
    assert_eq!(driver.medium.flushes.load(Ordering::Relaxed), 4);
}

#[test]
fn ranges_are_zeroed_and_deallocated() {
    let mut driver = Driver::with_io();
    assert_eq!(driver.io(io::WRITE_ZEROES, [0; 2], 100, 200), 0);
    let medium = driver.medium.clone();
    assert!(medium.bytes.lock()[100 * 512..300 * 512].iter().all(|b| *b == 0));
    assert_eq!(medium.bytes.lock()[300 * 512], 300u32 as u8);
    for (at, first, count) in [(0, 400u64, 3u32), (16, 410, 0), (32, 420, 1)] {
        driver.pgm.write(GuestPhys(DATA + at + 4), &count.to_le_bytes());
        driver.pgm.write(GuestPhys(DATA + at + 8), &first.to_le_bytes());
    }
    assert_eq!(driver.run(1, entry(io::DATASET, 2, [DATA, 0], [2, 4, 0])).0, 0);
    let sector = |n: usize| medium.bytes.lock()[n * 512];
    assert_eq!([399, 400, 402, 403, 420, 421].map(sector), [143, 0, 0, 147, 0, 165]);
    driver.pgm.write(GuestPhys(DATA + 8), &3000u64.to_le_bytes());
    assert_eq!(driver.run(1, entry(io::DATASET, 2, [DATA, 0], [2, 4, 0])).0, status::LBA_RANGE);
}

#[test]
fn a_failing_medium_fails_its_commands() {
    let mut driver = Driver::with_io();
    driver.medium.broken.store(true, Ordering::Relaxed);
    assert_eq!(driver.io(io::READ, [DATA, 0], 0, 1), status::READ_ERROR);
    assert_eq!(driver.io(io::WRITE, [DATA, 0], 0, 1), status::WRITE_FAULT);
    assert_eq!(driver.io(io::FLUSH, [0; 2], 0, 1), status::INTERNAL);
    assert_eq!(driver.admin(admin::GET_LOG, DATA, 127 << 16 | 2, 0).0, 0);
    assert_eq!(driver.bytes(DATA + 160, 1), [3]);
}

#[test]
fn a_full_completion_queue_holds_commands_up_and_loses_none() {
    let mut driver = Driver::with_io();
    let mut given = Vec::new();
    for _ in 0..ENTRIES - 1 {
        given.push(driver.submit(1, entry(io::FLUSH, 2, [0; 2], [0; 3])));
    }
    driver.medium.complete_all();
    // The queue is full; the submission queue has room again.
    for _ in 0..3 {
        given.push(driver.submit(1, entry(io::FLUSH, 2, [0; 2], [0; 3])));
        driver.medium.complete_all();
    }
    let mut done = Vec::new();
    while let Some((cid, ..)) = driver.completion(1) {
        done.push(cid);
        driver.medium.complete_all();
    }
    assert_eq!(done, given);
    assert!(!driver.line.level());
}

#[test]
fn the_pin_is_high_while_completions_wait_and_are_not_masked() {
    let mut driver = Driver::with_io();
    assert!(!driver.line.level());
    driver.submit(1, entry(io::FLUSH, 2, [0; 2], [0; 3]));
    driver.medium.complete_all();
    assert!(driver.line.level());
    driver.set(reg::INTMS, 1);
    assert!(!driver.line.level());
    assert_eq!(driver.register(reg::INTMC), 1);
    driver.set(reg::INTMC, 1);
    assert!(driver.line.level());
    driver.completion(1);
    assert!(!driver.line.level());
}

#[test]
fn deleting_a_queue_waits_for_its_commands() {
    let mut driver = Driver::with_io();
    driver.submit(1, entry(io::READ, 2, [DATA, 0], [0; 3]));
    driver.submit(0, entry(admin::DELETE_SQ, 0, [0; 2], [1, 0, 0]));
    assert!(driver.completion(0).is_none());
    driver.medium.complete_all();
    assert_eq!(driver.completion(1).map(|c| c.1), Some(0));
    assert_eq!(driver.completion(0).map(|c| c.1), Some(0));
    assert_eq!(driver.admin(admin::DELETE_CQ, 0, 1, 0).0, 0);
    assert_eq!(driver.admin(admin::DELETE_SQ, 0, 1, 0).0, status::INVALID_QUEUE);
}

#[test]
fn after_a_reset_the_controller_is_ready_once_old_writes_have_landed() {
    let mut driver = Driver::with_io();
    driver.submit(1, entry(io::WRITE, 2, [DATA, 0], [0; 3]));
    driver.set(reg::CC, 0);
    assert_eq!(driver.register(reg::CSTS), 0);
    assert!(!driver.nvme.lock().is_idle());
    driver.enable();
    assert_eq!(driver.register(reg::CSTS), 0);
    driver.medium.complete_all();
    assert_eq!(driver.register(reg::CSTS), 1);
    // Nobody hears of the old command.
    assert_eq!(driver.bytes(IO_CQ, 16), [0; 16]);
}

#[test]
fn shutting_down_flushes() {
    let driver = Driver::with_io();
    driver.set(reg::CC, 0x0046_4001);
    assert_eq!(driver.register(reg::CSTS), 1 | 1 << 2);
    driver.medium.complete_all();
    assert_eq!(driver.register(reg::CSTS), 1 | 2 << 2);
    assert_eq!(driver.medium.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn events_reach_requests_and_wait_for_their_log_and_requests_are_aborted() {
    let mut driver = Driver::new();
    let mut requests = Vec::new();
    for _ in 0..4 {
        requests.push(driver.submit(0, entry(admin::ASYNC_EVENT, 0, [0; 2], [0; 3])));
    }
    assert!(driver.completion(0).is_none());
    assert_eq!(driver.admin(admin::ASYNC_EVENT, 0, 0, 0).0, status::EVENT_LIMIT);
    // A doorbell that does not exist, twice: one event until the log was read.
    driver.set(0x1010, 1);
    driver.set(0x1010, 1);
    assert_eq!(driver.completion(0), Some((requests[0], 0, 0x0001_0000)));
    assert!(driver.completion(0).is_none());
    assert_eq!(driver.admin(admin::GET_LOG, DATA, 15 << 16 | 1, 0).0, 0);
    driver.set(0x1000, 99);
    assert_eq!(driver.completion(0), Some((requests[1], 0, 0x0001_0100)));
    let cid = driver.submit(0, entry(admin::ABORT, 0, [0; 2], [u32::from(requests[3]) << 16, 0, 0]));
    assert_eq!(driver.completion(0), Some((requests[3], status::ABORT_REQUESTED, 0)));
    assert_eq!(driver.completion(0), Some((cid, 0, 0)));
    assert_eq!(driver.admin(admin::ABORT, 0, 1, 0), (0, 1));
}

#[test]
fn features_keep_their_bits_and_the_number_of_queues_is_told() {
    let mut driver = Driver::new();
    assert_eq!(driver.admin(admin::SET_FEATURES, 0, feature::QUEUES.into(), 0x003f_003f), (0, 0x000f_000f));
    assert_eq!(driver.admin(admin::SET_FEATURES, 0, feature::EVENTS.into(), 0xffff).0, 0);
    assert_eq!(driver.admin(admin::GET_FEATURES, 0, feature::EVENTS.into(), 0), (0, 0xff));
    assert_eq!(driver.admin(admin::GET_FEATURES, 0, feature::WRITE_CACHE.into(), 0), (0, 1));
    let saved = 1 << 31 | u32::from(feature::EVENTS);
    assert_eq!(driver.admin(admin::SET_FEATURES, 0, saved, 1).0, status::NOT_SAVEABLE);
    assert_eq!(driver.admin(admin::GET_FEATURES, 0, 0x7f, 0).0, status::INVALID_FIELD);
    assert_eq!(driver.admin(admin::CREATE_CQ, IO_CQ, 7 << 16 | 1, 3).0, 0);
    let late = driver.admin(admin::SET_FEATURES, 0, feature::QUEUES.into(), 1).0;
    assert_eq!(late, status::SEQUENCE);
}

fn save(nvme: &Nvme) -> Vec<u8> {
    let mut out = Writer::new();
    nvme.save(&mut out);
    out.into_bytes()
}

#[test]
fn a_saved_controller_goes_on_where_it_was() {
    let mut driver = Driver::with_io();
    driver.submit(0, entry(admin::ASYNC_EVENT, 0, [0; 2], [0; 3]));
    driver.submit(1, entry(io::READ, 2, [DATA, 0], [5, 0, 0]));
    driver.medium.complete_all();
    let bytes = save(&driver.nvme.lock());
    assert_golden(&bytes, include_str!("../golden/nvme.v2.hex"));
    let (_, other, _, line) = wire();
    other.lock().load(Reader::new("nvme", 2, &bytes)).unwrap();
    assert_eq!(save(&other.lock()), bytes);
    assert!(line.level());
    for len in 0..bytes.len() {
        assert!(other.lock().load(Reader::new("nvme", 2, &bytes[..len])).is_err(), "{len}");
        assert_eq!(save(&other.lock()), bytes);
    }
    // Before there were doorbell buffers.
    let old: String = include_str!("../golden/nvme.v1.hex").split_whitespace().collect();
    let (pairs, _) = old.as_bytes().as_chunks::<2>();
    let old: Vec<u8> = pairs
        .iter()
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    let (_, from_old, ..) = wire();
    from_old.lock().load(Reader::new("nvme", 1, &old)).unwrap();
    assert_eq!(save(&from_old.lock()), bytes);
    // The driver works on with the restored controller.
    let medium = MemoryMedium::numbered(2048, 512);
    let disk = Disk { medium: medium.clone(), uuid: [7; 16], discard: true };
    let wiring = Wiring { pgm: driver.pgm.clone(), irq: Default::default() };
    let restored = Nvme::new(wiring, vec![None, Some(disk)]);
    restored.lock().load(Reader::new("nvme", 2, &bytes)).unwrap();
    (driver.nvme, driver.medium) = (restored, medium);
    assert_eq!(driver.completion(1).map(|c| c.1), Some(0));
    assert_eq!(driver.io(io::READ, [DATA, 0], 9, 1), 0);
    assert_eq!(driver.bytes(DATA, 4), [9; 4]);
    Device::reset(&mut *driver.nvme.lock());
    assert_eq!(driver.register(reg::CSTS), 0);
}

const BELLS: u64 = 0xc000;
const EVENTS: u64 = 0xd000;

/// How a driver uses doorbells in memory.
impl Driver {
    /// With I/O queues of 1 page whose doorbells are in memory; interrupts by the pin or not.
    fn with_buffers(uses_pin: bool) -> Self {
        let mut driver = Self::with_io();
        // Commands from before.
        assert_eq!(driver.run(1, entry(io::FLUSH, 2, [0; 2], [0; 3])).0, 0);
        driver.set_uses_pin(uses_pin);
        assert_eq!(driver.run(0, entry(admin::DOORBELL_BUFFERS, 0, [BELLS, EVENTS], [0; 3])).0, 0);
        driver
    }

    fn set_uses_pin(&self, uses_pin: bool) {
        let mut out = Out::default();
        self.nvme.lock().core.set_uses_pin(&self.pgm, uses_pin, &mut out);
    }

    fn word(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.bytes(at, 4).try_into().unwrap())
    }

    /// Moves a doorbell of queue 1 in memory and rings it if the controller wants that; whether it did. (Linux's `nvme_dbbuf_need_event`.)
    fn move_bell(&self, offset: u64, value: u32) -> bool {
        let old = self.word(BELLS + 8 + offset) as u16;
        self.pgm.write(GuestPhys(BELLS + 8 + offset), &value.to_le_bytes());
        let new = value as u16;
        let event = self.word(EVENTS + 8 + offset) as u16;
        let rings = new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        if rings {
            // The value does not matter.
            self.set(0x1008 + offset, 0x55);
        }
        rings
    }

    /// As [`Self::submit`].
    fn submit_in_memory(&mut self, mut raw: [u8; 64]) -> (u16, bool) {
        self.next_cid += 1;
        raw[2..4].copy_from_slice(&self.next_cid.to_le_bytes());
        self.pgm.write(GuestPhys(IO_SQ + 64 * u64::from(self.tails[1])), &raw);
        self.tails[1] = (self.tails[1] + 1) % ENTRIES;
        (self.next_cid, self.move_bell(0, self.tails[1]))
    }

    /// As [`Self::completion`]; the command and whether the queue's doorbell was rung.
    fn completion_in_memory(&mut self) -> Option<(u16, bool)> {
        let (head, phase) = self.heads[1];
        let raw = self.bytes(IO_CQ + 16 * u64::from(head), 16);
        if (raw[14] & 1 != 0) != phase {
            return None;
        }
        let next = (head + 1) % ENTRIES;
        self.heads[1] = (next, phase ^ (next == 0));
        Some((u16::from_le_bytes([raw[12], raw[13]]), self.move_bell(4, next)))
    }
}

#[test]
fn doorbells_in_memory_are_rung_only_while_the_controller_has_nothing_to_do() {
    let mut driver = Driver::with_buffers(false);
    assert_eq!((driver.word(BELLS + 8), driver.word(BELLS + 12)), (1, 1), "where the queues are");
    let flush = || entry(io::FLUSH, 2, [0; 2], [0; 3]);
    let mut rung = [0; 2];
    for _ in 0..5 * ENTRIES {
        let (given, tail) = driver.submit_in_memory(flush());
        driver.medium.complete_all();
        let (done, head) = driver.completion_in_memory().expect("a completion");
        assert_eq!(done, given);
        rung[0] += u32::from(tail);
        rung[1] += u32::from(head);
    }
    // Each command finds an empty queue. Of completions the controller need not hear but once a round.
    assert_eq!(rung[0], 5 * ENTRIES);
    assert!(rung[1] <= 6, "{rung:?}");

    // Commands that come while a full completion queue holds the controller up are found without a ring, and none is lost.
    let mut given: Vec<u16> = (0..ENTRIES - 1).map(|_| driver.submit_in_memory(flush()).0).collect();
    driver.medium.complete_all();
    let (mut done, mut silent) = (Vec::new(), 0);
    for _ in 0..10 {
        for _ in 0..4 {
            let (cid, rings) = driver.submit_in_memory(flush());
            given.push(cid);
            silent += u32::from(!rings);
            driver.medium.complete_all();
        }
        for _ in 0..4 {
            done.extend(driver.completion_in_memory().map(|c| c.0));
            driver.medium.complete_all();
        }
    }
    while let Some((cid, _)) = driver.completion_in_memory() {
        done.push(cid);
        driver.medium.complete_all();
    }
    assert_eq!(done, given);
    assert!(silent > 0);
}

#[test]
fn with_the_pin_every_head_is_rung_and_the_pin_falls() {
    let mut driver = Driver::with_buffers(true);
    for turn in 0..3 * ENTRIES {
        if turn == ENTRIES {
            driver.set_uses_pin(false);
            driver.set_uses_pin(true);
        }
        driver.submit_in_memory(entry(io::FLUSH, 2, [0; 2], [0; 3]));
        driver.medium.complete_all();
        // The admin queue's completions have all been taken.
        assert!(driver.line.level());
        assert!(driver.completion_in_memory().expect("a completion").1);
        assert!(!driver.line.level());
    }
}

#[test]
fn doorbell_buffers_that_cannot_be_and_values_beyond_the_queue_are_refused() {
    let mut driver = Driver::with_io();
    for places in [[0, EVENTS], [BELLS, 0], [BELLS + 8, EVENTS], [BELLS, EVENTS + 0x800]] {
        assert_eq!(driver.run(0, entry(admin::DOORBELL_BUFFERS, 0, places, [0; 3])).0, status::INVALID_FIELD);
    }
    let mut driver = Driver::with_buffers(false);
    let request = driver.submit(0, entry(admin::ASYNC_EVENT, 0, [0; 2], [0; 3]));
    driver.pgm.write(GuestPhys(BELLS + 8), &ENTRIES.to_le_bytes());
    driver.set(0x1008, 0);
    assert_eq!(driver.completion(0), Some((request, 0, 0x0001_0100)));
    // It goes on with the next good one.
    driver.pgm.write(GuestPhys(BELLS + 8), &driver.tails[1].to_le_bytes());
    driver.submit_in_memory(entry(io::FLUSH, 2, [0; 2], [0; 3]));
    driver.medium.complete_all();
    assert!(driver.completion_in_memory().is_some());
    // A head that makes no sense does not pass for room.
    driver.pgm.write(GuestPhys(BELLS + 12), &u32::MAX.to_le_bytes());
    driver.set(0x100c, 0);
    assert_eq!(driver.word(BELLS + 12), u32::MAX);
    // Buffers beyond memory are nothing but ones.
    assert_eq!(driver.run(0, entry(admin::DOORBELL_BUFFERS, 0, [1 << 40, 1 << 41], [0; 3])).0, 0);
    driver.set(0x1008, 1);
    driver.set(reg::CC, 0);
    driver.enable();
    assert_eq!(driver.register(reg::CSTS), 1);
}

#[test]
fn new_queues_begin_at_zero_whatever_the_buffers_hold() {
    let mut driver = Driver::with_buffers(false);
    assert_eq!(driver.admin(admin::DELETE_SQ, 0, 1, 0).0, 0);
    assert_eq!(driver.admin(admin::DELETE_CQ, 0, 1, 0).0, 0);
    driver.pgm.write(GuestPhys(BELLS + 8), &[5, 0, 0, 0, 6, 0, 0, 0]);
    let size = (ENTRIES - 1) << 16 | 1;
    assert_eq!(driver.admin(admin::CREATE_CQ, IO_CQ, size, 3).0, 0);
    assert_eq!(driver.admin(admin::CREATE_SQ, IO_SQ, size, 1 << 16 | 1).0, 0);
    assert_eq!(driver.bytes(BELLS + 8, 8), [0; 8]);
    (driver.tails[1], driver.heads[1]) = (0, (0, true));
    driver.pgm.write(GuestPhys(IO_CQ), &[0; 16 * ENTRIES as usize]);
    let (cid, rings) = driver.submit_in_memory(entry(io::FLUSH, 2, [0; 2], [0; 3]));
    driver.medium.complete_all();
    assert_eq!((rings, driver.completion_in_memory().map(|c| c.0)), (true, Some(cid)));
}

/// Remembers doorbells that are up.
#[derive(Default)]
struct Ear(Mutex<Vec<(BellId, Doorbell)>>);

impl Watcher for Ear {
    fn put_up(&self, id: BellId, doorbell: &Doorbell) {
        self.0.lock().push((id, doorbell.clone()));
    }
    fn take_down(&self, id: BellId) {
        self.0.lock().retain(|(own, _)| *own != id);
    }
}

#[test]
fn the_registers_are_doorbells_for_a_hypervisor_while_their_values_are_in_memory() {
    let mut driver = Driver::with_io();
    let iom = Iom::new();
    let bus = PciBus::new(iom.clone(), driver.pgm.clone());
    let at = DevFn::new(14, 0);
    Nvme::register(&driver.nvme, &bus, at);
    let ear = Arc::new(Ear::default());
    let watcher: Arc<dyn Watcher> = ear.clone();
    iom.doorbells().watch(&watcher);
    bus.config_write(at, 0x10, Width::Dword, 0xe000_0000);
    bus.config_write(at, 0x04, Width::Word, 6);
    assert_eq!(ear.0.lock().len(), 0);
    assert_eq!(driver.run(0, entry(admin::DOORBELL_BUFFERS, 0, [BELLS, EVENTS], [0; 3])).0, 0);
    let up = ear.0.lock().clone();
    assert_eq!(up.len(), 16);
    assert_eq!(up[0].1.place, Place::Memory(GuestPhys(0xe000_1008)));
    // A ring for which nobody reads the register.
    let raw = entry(io::READ, 2, [DATA, 0], [7, 0, 0]);
    driver.pgm.write(GuestPhys(IO_SQ), &raw);
    driver.pgm.write(GuestPhys(BELLS + 8), &1u32.to_le_bytes());
    let ring = || up[0].1.device.upgrade().unwrap().rung(up[0].1.number);
    ring();
    driver.medium.complete_all();
    assert_eq!(driver.bytes(DATA, 4), [7; 4]);
    // One that comes late means nothing.
    driver.set(reg::CC, 0);
    assert_eq!(ear.0.lock().len(), 0);
    ring();
    driver.enable();
    ring();
    assert_eq!(driver.register(reg::CSTS), 1);
}

#[test]
fn a_ring_that_nobody_heard_before_the_state_was_saved_is_not_lost() {
    let mut driver = Driver::with_buffers(false);
    driver.submit_in_memory(entry(io::FLUSH, 2, [0; 2], [0; 3]));
    driver.medium.complete_all();
    driver.completion_in_memory();
    let raw = entry(io::READ, 2, [DATA, 0], [9, 0, 0]);
    driver.pgm.write(GuestPhys(IO_SQ + 64 * u64::from(driver.tails[1])), &raw);
    driver.pgm.write(GuestPhys(BELLS + 8), &((driver.tails[1] + 1) % ENTRIES).to_le_bytes());
    let bytes = save(&driver.nvme.lock());
    let medium = MemoryMedium::numbered(2048, 512);
    let disk = Disk { medium: medium.clone(), uuid: [7; 16], discard: true };
    let wiring = Wiring { pgm: driver.pgm.clone(), irq: Default::default() };
    let restored = Nvme::new(wiring, vec![None, Some(disk)]);
    restored.lock().load(Reader::new("nvme", 2, &bytes)).unwrap();
    medium.complete_all();
    assert_eq!(driver.bytes(DATA, 4), [9; 4]);
}
