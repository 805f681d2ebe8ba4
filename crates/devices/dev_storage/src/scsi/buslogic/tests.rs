use pgm::Pgm;
use ssm::{Reader, Saveable, Writer};

use super::*;
use crate::scsi::tests::{cd_of, disk_of, memory};
use crate::testing::{Line, MemoryMedium, assert_golden};

const MAIL: u64 = 0x1_0000;
const CCB: u64 = 0x2_0000;
const SENSE: u64 = 0x3_0000;
const DATA: u64 = 0x10_0000;
const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0];

struct Rig {
    pgm: Arc<Pgm>,
    card: Arc<Mutex<BusLogic>>,
    irq: Arc<Line>,
    disk: Arc<MemoryMedium>,
}

/// A disk of numbered sectors at target 0, a CD at target 9; no mailboxes.
fn cold() -> Rig {
    let pgm = memory();
    let disk = MemoryMedium::numbered(5000, 512);
    let (irq, line) = Line::connect();
    let mut drives: Vec<Option<Drive>> = (0..TARGETS).map(|_| None).collect();
    drives[0] = Some(disk_of(&disk));
    drives[9] = Some(cd_of(&MemoryMedium::numbered(16, 2048)));
    let card = BusLogic::new(Wiring { pgm: pgm.clone(), irq: line, ejected: None }, drives);
    Rig { pgm, card, irq, disk }
}

/// With four mailboxes each way, of 32 bits.
fn rig() -> Rig {
    let r = cold();
    assert_eq!(r.ask(0x81, &[4, 0, 0, 1, 0]), []);
    r
}

impl Rig {
    fn get(&self, register: u16) -> u8 {
        self.card.lock().port_read(Port(0xd000 + register), Width::Byte) as u8
    }

    fn set(&self, register: u16, value: u8) {
        self.card.lock().port_write(Port(0xd000 + register), Width::Byte, value.into());
    }

    /// Gives an adapter command as drivers do it; its reply.
    fn ask(&self, operation: u8, parameters: &[u8]) -> Vec<u8> {
        assert_eq!(self.get(0) & 0x10, 0x10, "the adapter is not ready");
        self.set(1, operation);
        parameters.iter().for_each(|byte| self.set(1, *byte));
        let mut reply = Vec::new();
        while self.get(0) & 4 != 0 {
            reply.push(self.get(1));
        }
        assert_eq!(self.get(2), 0x84, "the command 0x{operation:x} has not ended");
        self.set(0, 0x20);
        assert_eq!(self.get(2), 0);
        reply
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut bytes);
        bytes
    }

    /// Writes block `n` and enters it into the outgoing mailbox `n`.
    fn enter(&self, n: u64, code: u8, target: u8, cdb: &[u8], direction: u8, len: u32, data: u64) {
        let mut block = vec![code, direction << 3, cdb.len() as u8, 18];
        block.extend_from_slice(&len.to_le_bytes());
        block.extend_from_slice(&(data as u32).to_le_bytes());
        block.extend_from_slice(&[0, 0, 0xee, 0xee, target, 0]);
        block.extend_from_slice(cdb);
        block.resize(36, 0);
        block.extend_from_slice(&(SENSE as u32).to_le_bytes());
        let at = CCB + 0x100 * n;
        self.pgm.write(GuestPhys(at), &block);
        self.mail(n, at, action::START);
    }

    fn mail(&self, n: u64, ccb: u64, action: u8) {
        let [a, b, c, d] = (ccb as u32).to_le_bytes();
        self.pgm.write(GuestPhys(MAIL + 8 * n), &[a, b, c, d, 0, 0, 0, action]);
    }

    fn kick(&self) {
        self.set(1, 0x02);
    }

    /// The incoming mailbox `n`: block, adapter and device status, code. It is free afterwards.
    fn incoming(&self, n: u64) -> (u64, u8, u8, u8) {
        let at = MAIL + 32 + 8 * n;
        let bytes = self.read(at, 8);
        self.pgm.write(GuestPhys(at + 7), &[0]);
        let ccb = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        (ccb.into(), bytes[4], bytes[5], bytes[7])
    }

    fn saved(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.card.lock().save(&mut out);
        out.into_bytes()
    }
}

#[test]
fn a_reset_shows_the_diagnosis_and_then_wants_mailboxes() {
    let r = rig();
    assert_eq!(r.get(0), 0x10);
    r.set(0, 0x80);
    assert_eq!((r.get(0), r.get(0)), (0x80, 0x30));
    assert_eq!(r.get(3), 0x80);
}

#[test]
fn the_adapter_tells_what_it_is() {
    let r = cold();
    assert_eq!(r.ask(0x04, &[]), b"AA50");
    assert_eq!([r.ask(0x84, &[]), r.ask(0x85, &[])].concat(), b"7B");
    assert_eq!(r.ask(0x8b, &[5]), b"958D ");
    assert_eq!(r.ask(0x0b, &[]), [0x40, 0, 7]);
    let extended = r.ask(0x8d, &[14]);
    assert_eq!((extended[0], &extended[2..4], &extended[10..14]), (b'E', &[0, 0x20][..], &b"07B\x09"[..]));
    assert_eq!(r.ask(0x0d, &[34]).len(), 34);
    assert_eq!(r.ask(0x24, &[]), [1, 2]);
    assert_eq!(r.ask(0x0a, &[]), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(r.ask(0x23, &[]), [0, 1, 0, 0, 0, 0, 0, 0]);
    let auto = r.ask(0x91, &[64, 64]);
    assert_eq!((auto.len(), &auto[..9], auto[14]), (64, &b"FA\x40958D  "[..], 7));
    assert_eq!(r.ask(0x1f, &[0x5a]), [0x5a]);
    // Options have as many bytes as the first says.
    assert_eq!(r.ask(0x21, &[2, 1, 1]), []);
}

#[test]
fn unknown_commands_are_invalid() {
    let r = cold();
    r.set(1, 0x83);
    assert_eq!((r.get(0) & 1, r.get(2)), (1, 0x84));
    r.set(0, 0x20);
    // No mailboxes at all.
    assert_eq!(r.ask(0x81, &[0, 0, 0, 1, 0]), []);
    assert_eq!(r.get(0), 0x31);
    // ISA ports: only off.
    r.set(1, 0x95);
    r.set(1, 6);
    assert_eq!((r.get(0), r.get(2)), (0x30, 0));
}

#[test]
fn a_read_ends_in_an_incoming_mailbox_with_an_interrupt() {
    let r = rig();
    r.enter(0, 0, 0, &READ, 1, 1024, DATA);
    r.kick();
    // The outgoing mailbox is free at once.
    assert_eq!((r.read(MAIL + 7, 1), r.irq.level()), (vec![0], false));
    r.disk.complete_all();
    assert_eq!((r.irq.level(), r.get(2)), (true, 0x81));
    assert_eq!(r.incoming(0), (CCB, 0, 0, 1));
    assert_eq!(r.read(CCB + 14, 2), [0, 0]);
    assert_eq!(r.read(DATA, 1024), [vec![7; 512], vec![8; 512]].concat());
    r.set(0, 0x20);
    assert!(!r.irq.level());
}

#[test]
fn lists_of_pieces_are_followed_and_what_was_not_moved_is_told() {
    let r = rig();
    let mut list = Vec::new();
    for (len, address) in [(512u32, DATA), (1024, DATA + 0x1000)] {
        list.extend_from_slice(&len.to_le_bytes());
        list.extend_from_slice(&(address as u32).to_le_bytes());
    }
    r.pgm.write(GuestPhys(0x4_0000), &list);
    r.enter(0, 4, 0, &READ, 1, 16, 0x4_0000);
    r.kick();
    r.disk.complete_all();
    assert_eq!(r.incoming(0).3, 1);
    assert_eq!((r.read(DATA, 512), r.read(DATA + 0x1000, 512)), (vec![7; 512], vec![8; 512]));
    assert_eq!(r.read(CCB + 4, 4), 512u32.to_le_bytes());
}

#[test]
fn writes_reach_the_medium_also_where_the_direction_is_open() {
    let r = rig();
    r.pgm.write(GuestPhys(DATA), &[0x11; 512]);
    r.enter(0, 0, 0, &[0x2a, 0, 0, 0, 0, 3, 0, 0, 1, 0], 2, 512, DATA);
    r.enter(1, 3, 0, &[0x2a, 0, 0, 0, 0, 4, 0, 0, 1, 0], 0, 512, DATA);
    r.kick();
    r.disk.complete_all();
    assert_eq!((r.incoming(0).3, r.incoming(1).3), (1, 1));
    let bytes = r.disk.bytes.lock();
    assert_eq!((bytes[3 * 512], bytes[4 * 512], bytes[5 * 512]), (0x11, 0x11, 5));
}

#[test]
fn failures_bring_sense_data() {
    let r = rig();
    r.enter(0, 0, 0, &[0xff, 0, 0, 0, 0, 0], 3, 0, 0);
    r.enter(1, 0, 5, &[0x00, 0, 0, 0, 0, 0], 3, 0, 0);
    r.enter(2, 9, 0, &[0x00, 0, 0, 0, 0, 0], 3, 0, 0);
    r.kick();
    assert_eq!(r.incoming(0), (CCB, 0, 2, 4));
    let sense = r.read(SENSE, 18);
    assert_eq!((sense[0], sense[2], sense[12]), (0x70, 5, 0x20));
    assert_eq!(r.incoming(1), (CCB + 0x100, adapter_status::SELECTION_TIMEOUT, 0, 4));
    // Three ends, one interrupt after the other.
    for _ in 0..2 {
        assert_eq!(r.get(2), 0x81);
        r.set(0, 0x20);
    }
    assert_eq!(r.get(2), 0);
}

#[test]
fn mailboxes_of_24_bits_work() {
    let r = cold();
    assert_eq!(r.ask(0x01, &[2, 1, 0, 0]), []);
    let mut block = vec![0, 0x08, 10, 14, 0, 4, 0, 0x10, 0, 0, 0, 0, 0, 0, 0xee, 0xee, 0, 0];
    block.extend_from_slice(&READ);
    r.pgm.write(GuestPhys(CCB), &block);
    r.pgm.write(GuestPhys(MAIL), &[1, 2, 0, 0]);
    r.kick();
    r.disk.complete_all();
    assert_eq!(r.read(MAIL + 8, 4), [1, 2, 0, 0]);
    assert_eq!((r.read(CCB + 14, 2), r.read(DATA, 1)), (vec![0, 0], vec![7]));
    // Sense data lie behind the command's block.
    block[18] = 0xff;
    r.pgm.write(GuestPhys(CCB), &block);
    r.pgm.write(GuestPhys(MAIL + 4), &[1, 2, 0, 0]);
    r.kick();
    assert_eq!(
        (r.read(MAIL + 12, 1), r.read(CCB + 28, 1), r.read(CCB + 30, 1)),
        (vec![4], vec![0x70], vec![5])
    );
}

#[test]
fn strict_round_robin_waits_for_the_next_mailbox_and_the_other_mode_does_not() {
    let r = rig();
    r.enter(2, 0, 0, &[0; 6], 3, 0, 0);
    r.kick();
    assert_eq!(r.incoming(0).3, 0);
    assert_eq!(r.ask(0x8f, &[0]), []);
    r.kick();
    assert_eq!(r.incoming(0).0, CCB + 0x200);
}

#[test]
fn ends_wait_for_a_free_incoming_mailbox() {
    let r = rig();
    for round in 0..2 {
        for n in 0..3 {
            r.enter((round * 3 + n) % 4, 0, 0, &[0; 6], 3, 0, 0);
        }
        r.kick();
    }
    // The fifth and sixth have no room.
    let first: Vec<u64> = (0..4).map(|n| r.incoming(n).0).collect();
    assert_eq!(first, [CCB, CCB + 0x100, CCB + 0x200, CCB + 0x300]);
    r.get(0);
    assert_eq!((r.incoming(0).0, r.incoming(1).0), (CCB, CCB + 0x100));
}

#[test]
fn commands_are_aborted_and_devices_reset() {
    let r = rig();
    r.enter(0, 0, 0, &READ, 1, 1024, DATA);
    r.enter(1, 0, 0, &READ, 1, 1024, DATA);
    r.mail(2, CCB, action::ABORT);
    r.mail(3, CCB, action::ABORT);
    r.kick();
    assert_eq!((r.incoming(0).3, r.incoming(1).3), (completion::ABORTED, completion::NOT_FOUND));
    r.enter(0, operation::DEVICE_RESET, 0, &[], 3, 0, 0);
    // Block 0 again, from mailbox 0.
    r.kick();
    assert_eq!(r.incoming(2), (CCB + 0x100, adapter_status::DEVICE_RESET, 0, 4));
    assert_eq!(r.incoming(3), (CCB, 0, 0, 1));
    r.disk.complete_all();
    assert_eq!(r.incoming(0).3, 0);
}

#[test]
fn outgoing_mailboxes_that_are_free_again_are_told_if_wanted() {
    let r = rig();
    r.set(1, 0x05);
    r.set(1, 1);
    r.enter(0, 0, 0, &READ, 1, 1024, DATA);
    r.kick();
    assert_eq!(r.get(2), 0x82);
}

#[test]
fn a_state_with_everything_in_it_survives() {
    let r = rig();
    for round in 0..2 {
        for n in 0..3 {
            r.enter((round * 3 + n) % 4, 0, 5, &[0; 6], 3, 0, 0);
        }
        r.kick();
    }
    r.set(1, 0x81);
    r.set(1, 8);
    let saved = r.saved();
    let other = cold();
    let load = |rig: &Rig, bytes: &[u8]| rig.card.lock().load(Reader::new("buslogic", 1, bytes));
    load(&other, &saved).unwrap();
    assert_eq!(other.saved(), saved);
    assert!(other.irq.level());
    let before = r.saved();
    for len in 0..saved.len() {
        assert!(load(&r, &saved[..len]).is_err());
    }
    assert_eq!(r.saved(), before);
}

#[test]
fn the_saved_format_is_that_of_version_1() {
    let r = rig();
    r.enter(0, 0, 5, &[0; 6], 3, 0, 0);
    r.kick();
    assert_golden(&r.saved(), include_str!("../../golden/buslogic.v1.hex"));
}
