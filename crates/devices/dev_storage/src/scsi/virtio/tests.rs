use dev_virtio_core::feature;
use pdm::{Device, MmioDevice};
use pgm::Pgm;
use ssm::Saveable;
use vbox_types::GuestPhys;

use super::*;
use crate::scsi::tests::{cd_of, disk_of, memory};
use crate::testing::{Line, MemoryMedium};

/// Table, available and used ring of each queue.
const RINGS: u64 = 0x1_0000;
const REQUEST: u64 = 0x8_0000;
const ANSWER: u64 = 0x8_1000;
const DATA: u64 = 0x9_0000;
const EVENT: u64 = 0x8_8000;

struct Rig {
    card: Arc<Mutex<VirtioScsiPci>>,
    pgm: Arc<Pgm>,
    irq: Arc<Line>,
    disk: Arc<MemoryMedium>,
    given: [u16; 6],
}

/// A disk of numbered sectors at target 0, a CD at target 5, 8 targets in all; the driver has taken all features.
fn rig() -> Rig {
    let r = cold();
    let features = feature::VERSION_1 | bit::HOTPLUG | bit::CHANGE;
    r.write(20, &[3]);
    for half in 0..2u32 {
        r.write(8, &half.to_le_bytes());
        r.write(12, &((features >> (32 * half)) as u32).to_le_bytes());
    }
    r.write(20, &[11]);
    for queue in 0..6u16 {
        r.write(22, &queue.to_le_bytes());
        let base = RINGS + 0x1000 * u64::from(queue);
        r.write(32, &base.to_le_bytes());
        r.write(40, &(base + 0x800).to_le_bytes());
        r.write(48, &(base + 0xa00).to_le_bytes());
        r.write(28, &[1, 0]);
    }
    r.write(20, &[15]);
    r
}

fn cold() -> Rig {
    let pgm = memory();
    let disk = MemoryMedium::numbered(5000, 512);
    let (irq, line) = Line::connect();
    let mut drives: Vec<Option<Drive>> = (0..8).map(|_| None).collect();
    drives[0] = Some(disk_of(&disk));
    drives[5] = Some(cd_of(&MemoryMedium::numbered(16, 2048)));
    let card = VirtioScsi::create(Wiring { pgm: pgm.clone(), irq: line }, drives, None);
    Rig { card, pgm, irq, disk, given: [0; 6] }
}

impl Rig {
    fn write(&self, at: u64, bytes: &[u8]) {
        self.card.lock().mmio_write(0, at, bytes);
    }

    fn give(&mut self, queue: usize, regions: &[(u64, u32, bool)]) {
        let base = RINGS + 0x1000 * queue as u64;
        let index = self.given[queue];
        let size = QUEUES[queue];
        let head = (index * 4) % size;
        for (i, (address, len, write)) in regions.iter().enumerate() {
            let last = i + 1 == regions.len();
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&(u16::from(!last) | u16::from(*write) << 1).to_le_bytes());
            bytes.extend_from_slice(&(head + i as u16 + 1).to_le_bytes());
            self.pgm.write(GuestPhys(base + 16 * u64::from(head + i as u16)), &bytes);
        }
        self.pgm.write(GuestPhys(base + 0x804 + 2 * u64::from(index % size)), &head.to_le_bytes());
        self.given[queue] += 1;
        self.pgm.write(GuestPhys(base + 0x802), &self.given[queue].to_le_bytes());
        self.write(0x3000 + 4 * queue as u64, &[queue as u8, 0]);
    }

    fn used(&self, queue: usize) -> u16 {
        let mut bytes = [0; 2];
        self.pgm.read(GuestPhys(RINGS + 0x1000 * queue as u64 + 0xa02), &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut bytes);
        bytes
    }

    /// Gives a command with number `n`, its answer lying at ANSWER + n pages, and data in or out.
    fn command(&mut self, queue: usize, n: u64, target: u8, cdb: &[u8], out: u32, into: u32) {
        let mut request = vec![1, target, 0x40, 0, 0, 0, 0, 0];
        request.extend_from_slice(&n.to_le_bytes());
        request.extend_from_slice(&[0; 3]);
        request.extend_from_slice(cdb);
        request.resize(51, 0);
        let at = REQUEST + 0x100 * n;
        self.pgm.write(GuestPhys(at), &request);
        let mut regions = vec![(at, 51, false)];
        if out > 0 {
            regions.push((DATA, out, false));
        }
        regions.push((ANSWER + 0x100 * n, 108, true));
        if into > 0 {
            regions.push((DATA, into, true));
        }
        self.give(queue, &regions);
    }

    /// Residual, status and response of answer `n`, and its sense data.
    fn answer(&self, n: u64) -> (u32, u8, u8, Vec<u8>) {
        let bytes = self.read(ANSWER + 0x100 * n, 108);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        (word(4), bytes[10], bytes[11], bytes[12..12 + word(0) as usize].to_vec())
    }

    fn manage(&mut self, subtype: u32, target: u8, tag: u64) -> u8 {
        let mut request = vec![0; 4];
        request.extend_from_slice(&subtype.to_le_bytes());
        request.extend_from_slice(&[1, target, 0, 0, 0, 0, 0, 0]);
        request.extend_from_slice(&tag.to_le_bytes());
        self.pgm.write(GuestPhys(REQUEST + 0xf00), &request);
        self.give(CONTROL, &[(REQUEST + 0xf00, 24, false), (ANSWER + 0xf00, 1, true)]);
        self.read(ANSWER + 0xf00, 1)[0]
    }

    fn saved(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.card.lock().save(&mut out);
        out.into_bytes()
    }
}

#[test]
fn the_configuration_tells_queues_and_targets() {
    let r = rig();
    let config = r.card.lock().device.config();
    assert_eq!(config.len(), 36);
    assert_eq!((config[0], &config[28..36]), (4, &[0, 0, 7, 0, 0, 0, 0, 0][..]));
    // Sizes change within limits.
    r.write(0x2014, &32u32.to_le_bytes());
    r.write(0x2018, &0xffffu32.to_le_bytes());
    let card = r.card.lock();
    assert_eq!((card.device.sense_size, card.device.cdb_size), (32, 32));
}

#[test]
fn a_read_comes_back_with_an_interrupt() {
    let mut r = rig();
    r.command(2, 0, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 2], 0, 1024);
    assert_eq!(r.used(2), 0);
    r.disk.complete_all();
    assert_eq!((r.used(2), r.irq.level()), (1, true));
    assert_eq!(r.answer(0), (0, 0, 0, vec![]));
    assert_eq!(r.read(DATA, 1024), [vec![7; 512], vec![8; 512]].concat());
}

#[test]
fn queues_work_side_by_side_and_writes_reach_the_medium() {
    let mut r = rig();
    r.pgm.write(GuestPhys(DATA), &[0xab; 512]);
    r.command(3, 0, 0, &[0x2a, 0, 0, 0, 0, 1, 0, 0, 1], 512, 0);
    r.command(5, 1, 5, &[0x25], 0, 8);
    assert_eq!((r.used(3), r.used(5)), (0, 1));
    r.disk.complete_all();
    assert_eq!((r.used(3), r.answer(0).2), (1, 0));
    assert_eq!(r.disk.bytes.lock()[512], 0xab);
}

#[test]
fn failures_bring_their_sense_data_and_what_was_not_moved() {
    let mut r = rig();
    r.command(2, 0, 0, &[0xff], 0, 64);
    let (residual, status, response, sense) = r.answer(0);
    assert_eq!((residual, status, response, sense.len()), (64, 2, 0, 18));
    assert_eq!((sense[0], sense[2], sense[12]), (0x70, 5, 0x20));
    r.command(2, 1, 0, &[0x12, 0, 0, 0, 36], 0, 96);
    assert_eq!(r.answer(1), (60, 0, 0, vec![]));
    // No such target, and an address of another form.
    r.command(2, 2, 3, &[0x00], 0, 0);
    assert_eq!(r.answer(2).2, response::BAD_TARGET);
    r.command(2, 3, 200, &[0x00], 0, 0);
    assert_eq!(r.answer(3).2, response::BAD_TARGET);
}

#[test]
fn task_management_ends_commands() {
    let mut r = rig();
    for n in 0..3 {
        r.command(2, n, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 1], 0, 512);
    }
    assert_eq!(r.manage(task::QUERY_TASK, 0, 1), response::SUCCEEDED);
    assert_eq!(r.manage(task::ABORT_TASK, 0, 1), response::OK);
    assert_eq!((r.used(2), r.answer(1).2), (1, response::ABORTED));
    assert_eq!(r.manage(task::QUERY_TASK, 0, 1), response::OK);
    assert_eq!(r.manage(task::UNIT_RESET, 0, 0), response::OK);
    assert_eq!((r.used(2), r.answer(0).2, r.answer(2).2), (3, response::RESET, response::RESET));
    assert_eq!(r.manage(task::UNIT_RESET, 3, 0), response::BAD_TARGET);
    assert_eq!(r.manage(99, 0, 0), response::REJECTED);
    r.disk.complete_all();
    // What the medium answers to abandoned requests changes nothing; the next command hears of the reset.
    r.command(2, 3, 0, &[0x00], 0, 0);
    assert_eq!(r.answer(3).3[12], 0x29);
}

#[test]
fn hot_plug_is_told_by_events_and_missed_ones_are_owned_up_to() {
    let mut r = rig();
    // No buffer: the event is lost.
    r.card.lock().attach(3, disk_of(&r.disk.clone())).unwrap();
    r.give(EVENTS, &[(EVENT, 16, true)]);
    assert_eq!((r.used(EVENTS), r.read(EVENT, 4)), (1, vec![0, 0, 0, 0x80]));
    r.give(EVENTS, &[(EVENT, 16, true)]);
    r.card.lock().detach(3).unwrap();
    assert_eq!(r.read(EVENT, 16), [1, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    r.give(EVENTS, &[(EVENT, 16, true)]);
    r.card.lock().attach(3, disk_of(&r.disk.clone())).unwrap();
    assert_eq!(r.read(EVENT, 16), [1, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    r.give(EVENTS, &[(EVENT, 16, true)]);
    r.card.lock().set_medium(5, None, false).unwrap();
    assert_eq!(r.read(EVENT, 16), [3, 0, 0, 0, 1, 5, 0, 0, 0, 0, 0, 0, 0x28, 0, 0, 0]);
}

#[test]
fn commands_to_a_drive_that_is_pulled_out_end() {
    let mut r = rig();
    r.command(2, 0, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 1], 0, 512);
    r.card.lock().detach(0).unwrap();
    assert_eq!((r.used(2), r.answer(0).2), (1, response::BAD_TARGET));
    r.disk.complete_all();
    assert!(r.card.lock().is_idle());
}

#[test]
fn chains_that_are_no_commands_come_back_empty() {
    let mut r = rig();
    r.give(2, &[(REQUEST, 20, false), (ANSWER, 108, true)]);
    r.give(2, &[(REQUEST, 51, false), (ANSWER, 20, true)]);
    assert_eq!(r.used(2), 2);
}

#[test]
fn a_reset_drops_what_is_under_way() {
    let mut r = rig();
    r.command(2, 0, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 1], 0, 512);
    r.card.lock().reset();
    r.disk.complete_all();
    assert_eq!((r.used(2), r.card.lock().is_idle()), (0, true));
}

#[test]
fn the_state_survives_and_another_machines_is_refused() {
    let mut r = rig();
    r.write(0x2014, &64u32.to_le_bytes());
    r.command(2, 0, 0, &[0xff], 0, 0);
    let saved = r.saved();
    let other = cold();
    let load = |rig: &Rig, bytes: &[u8]| rig.card.lock().load(Reader::new("virtio-scsi", 1, bytes));
    load(&other, &saved).unwrap();
    assert_eq!(other.saved(), saved);
    other.card.lock().detach(0).unwrap();
    let before = other.saved();
    assert!(load(&other, &saved).is_err());
    assert_eq!(other.saved(), before);
}
