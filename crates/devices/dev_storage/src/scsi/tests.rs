use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys};

use super::bus::{Bus, Command, Done, status};
use super::sense::Sense;
use super::sg::SgList;
use super::unit::Cdb;
use super::{EjectSink, TargetError};
use crate::ide::{CdIdentity, DiskIdentity, Drive};
use crate::testing::MemoryMedium;

const RAM: u64 = 4 << 20;
const DATA: u64 = 0x10_0000;

pub(super) fn memory() -> Arc<Pgm> {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    pgm
}

pub(super) fn disk_of(medium: &Arc<MemoryMedium>) -> Drive {
    let identity = DiskIdentity { discard: true, ..DiskIdentity::virtualbox(0x1234_5678, 0x9abc_def0) };
    Drive::Disk { identity, medium: medium.clone() }
}

pub(super) fn cd_of(medium: &Arc<MemoryMedium>) -> Drive {
    Drive::Cd { identity: CdIdentity::virtualbox_ahci(1), medium: Some(medium.clone()) }
}

#[derive(Default)]
struct Ejected(Mutex<Vec<usize>>);

impl EjectSink for Ejected {
    fn ejected(&self, target: usize) {
        self.0.lock().push(target);
    }
}

/// A disk of 5000 numbered sectors at target 0, a CD of 64 at target 1, nothing at target 2.
struct Rig {
    pgm: Arc<Pgm>,
    bus: Arc<Mutex<Bus<u32>>>,
    disk: Arc<MemoryMedium>,
    cd: Arc<MemoryMedium>,
    ejected: Arc<Ejected>,
}

fn rig() -> Rig {
    rig_with(MemoryMedium::numbered(5000, 512))
}

fn rig_with(disk: Arc<MemoryMedium>) -> Rig {
    let pgm = memory();
    let cd = MemoryMedium::numbered(64, 2048);
    let ejected = Arc::new(Ejected::default());
    let (p, d, c, e) = (pgm.clone(), disk.clone(), cd.clone(), ejected.clone());
    let bus = Arc::new_cyclic(|me: &std::sync::Weak<Mutex<Bus<u32>>>| {
        let me = me.clone();
        let answer = move |number, result| me.upgrade().unwrap().lock().answered(number, result);
        Mutex::new(Bus::new(p, vec![Some(disk_of(&d)), Some(cd_of(&c)), None], Some(e), Arc::new(answer)))
    });
    Rig { pgm, bus, disk, cd, ejected }
}

fn cdb(bytes: &[u8]) -> Cdb {
    let mut cdb = [0; 16];
    cdb[..bytes.len()].copy_from_slice(bytes);
    cdb
}

impl Rig {
    /// Hands a command in with `out` bytes at DATA for the target, or room for `into` there.
    fn submit(&self, target: usize, bytes: &[u8], out: u32, into: u32, tag: u32) {
        let list = |len| {
            let mut list = SgList::default();
            list.push(DATA, len);
            list
        };
        let command = Command { target, lun: 0, cdb: cdb(bytes), out: list(out), into: list(into), tag };
        assert!(self.bus.lock().command(command).is_ok());
    }

    fn done(&self) -> Option<Done<u32>> {
        self.bus.lock().take_done()
    }

    fn run(&self, target: usize, bytes: &[u8], out: u32, into: u32) -> Done<u32> {
        self.submit(target, bytes, out, into, 0);
        self.disk.complete_all();
        self.cd.complete_all();
        self.done().unwrap()
    }

    /// The data that a command gives.
    fn data(&self, target: usize, bytes: &[u8], room: u32) -> Vec<u8> {
        let done = self.run(target, bytes, 0, room);
        assert_eq!((done.status, done.sense), (status::GOOD, Sense::NONE));
        self.read(done.moved as usize)
    }

    fn sense(&self, target: usize, bytes: &[u8], out: u32, into: u32) -> Sense {
        let done = self.run(target, bytes, out, into);
        assert_eq!(done.status, status::CHECK_CONDITION);
        done.sense
    }

    fn good(&self, target: usize, bytes: &[u8], out: u32) -> u64 {
        let done = self.run(target, bytes, out, 0);
        assert_eq!((done.status, done.sense), (status::GOOD, Sense::NONE));
        done.moved
    }

    fn read(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pgm.read(GuestPhys(DATA), &mut bytes);
        bytes
    }

    fn write(&self, bytes: &[u8]) {
        self.pgm.write(GuestPhys(DATA), bytes);
    }
}

#[test]
fn inquiry_tells_virtualboxs_strings() {
    let r = rig();
    let disk = r.data(0, &[0x12, 0, 0, 0, 255], 255);
    assert_eq!(disk, b"\x00\x00\x05\x02\x1f\x00\x00\x02VBOX    HARDDISK        1.0 ");
    let cd = r.data(1, &[0x12, 0, 0, 0, 36], 36);
    assert_eq!(cd, b"\x05\x80\x05\x02\x1f\x00\x00\x02VBOX    CD-ROM          1.0 ");
}

#[test]
fn vital_product_data_are_there() {
    let r = rig();
    let page = |n| r.data(0, &[0x12, 1, n, 0, 255], 255);
    assert_eq!(page(0x00), [0, 0, 0, 6, 0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2]);
    assert_eq!(page(0x80), b"\x00\x80\x00\x13VB12345678-9abcdef0");
    assert_eq!(&page(0x83)[4..], b"\x02\x01\x00\x2bVBOX    HARDDISK        VB12345678-9abcdef0");
    let limits = page(0xb0);
    assert_eq!((limits.len(), &limits[20..28]), (64, &[0, 0x40, 0, 0, 0, 0, 1, 0][..]));
    assert_eq!(page(0xb1)[5], 0);
    assert_eq!(page(0xb2), [0, 0xb2, 0, 4, 0, 0xe0, 2, 0]);
    assert_eq!(r.data(1, &[0x12, 1, 0, 0, 255], 255), [5, 0, 0, 3, 0x00, 0x80, 0x83]);
    assert_eq!(r.sense(1, &[0x12, 1, 0xb0, 0, 255], 0, 255), Sense::INVALID_FIELD);
    assert_eq!(r.sense(0, &[0x12, 0, 0x80, 0, 255], 0, 255), Sense::INVALID_FIELD);
}

#[test]
fn capacity_is_told_in_both_lengths() {
    let r = rig();
    assert_eq!(r.data(0, &[0x25], 8), [0, 0, 0x13, 0x87, 0, 0, 2, 0]);
    let long = r.data(0, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32], 32);
    assert_eq!((&long[..12], long[14]), (&[0, 0, 0, 0, 0, 0, 0x13, 0x87, 0, 0, 2, 0][..], 0x80));
    assert_eq!(r.data(1, &[0x25], 8), [0, 0, 0, 63, 0, 0, 8, 0]);
}

#[test]
fn reads_of_every_length_give_the_same_sectors() {
    let r = rig();
    for command in [
        &[0x08, 0, 0, 7, 2][..],
        &[0x28, 0, 0, 0, 0, 7, 0, 0, 2],
        &[0xa8, 0, 0, 0, 0, 7, 0, 0, 0, 2],
        &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 2],
    ] {
        let data = r.data(0, command, 4096);
        assert_eq!((data.len(), data[0], data[1023]), (1024, 7, 8), "{command:x?}");
    }
    // A count of 0 is 256 in the six-byte command, nothing in the others.
    assert_eq!(r.data(0, &[0x08, 0, 0, 0, 0], 1 << 20).len(), 256 * 512);
    assert_eq!(r.run(0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 0], 0, 512).moved, 0);
}

#[test]
fn a_long_read_goes_in_pieces_and_ends_with_the_room_for_it() {
    let r = rig();
    let done = r.run(0, &[0xa8, 0, 0, 0, 0, 0, 0, 0, 0x13, 0x88], 0, 3 << 20);
    assert_eq!((done.status, done.moved), (status::GOOD, 5000 * 512));
    assert_eq!(r.read(5000 * 512), *r.disk.bytes.lock());
    // More asked for than there is room: what fits.
    assert_eq!(r.run(0, &[0x28, 0, 0, 0, 0, 1, 0, 0, 200], 0, 700).moved, 700);
    assert_eq!(r.read(700)[511..513], [1, 2]);
}

#[test]
fn writes_of_every_length_reach_the_medium() {
    let r = rig();
    for (n, command) in [
        &[0x0a, 0, 0, 9, 1][..],
        &[0x2a, 0, 0, 0, 0, 9, 0, 0, 1],
        &[0xaa, 0, 0, 0, 0, 9, 0, 0, 0, 1],
        &[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1],
        &[0x2e, 0, 0, 0, 0, 9, 0, 0, 1],
    ]
    .into_iter()
    .enumerate()
    {
        r.write(&[0xa0 + n as u8; 512]);
        assert_eq!(r.good(0, command, 512), 512);
        let bytes = r.disk.bytes.lock();
        assert_eq!(
            (bytes[9 * 512 - 1], bytes[9 * 512], bytes[10 * 512 - 1], bytes[10 * 512]),
            (8, 0xa0 + n as u8, 0xa0 + n as u8, 10)
        );
    }
    // WRITE AND VERIFY only was durable.
    assert_eq!(r.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn what_lies_outside_the_disk_is_refused_before_anything_is_asked() {
    let r = rig();
    assert_eq!(r.sense(0, &[0x28, 0, 0, 0, 0x13, 0x87, 0, 0, 2], 0, 1024), Sense::OUT_OF_RANGE);
    assert_eq!(
        r.sense(0, &[0x88, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 2], 0, 1024),
        Sense::OUT_OF_RANGE
    );
    assert_eq!(r.sense(0, &[0x2a, 0, 0, 0, 0x13, 0x88, 0, 0, 1], 512, 0), Sense::OUT_OF_RANGE);
    // Fewer data than the command speaks of.
    assert_eq!(r.sense(0, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 2], 512, 0), Sense::INVALID_FIELD);
    assert_eq!(r.disk.waiting(), 0);
}

#[test]
fn force_unit_access_and_a_disabled_cache_make_writes_durable() {
    let r = rig();
    let flushes = || r.disk.flushes.load(Ordering::Relaxed);
    r.good(0, &[0x2a, 8, 0, 0, 0, 0, 0, 0, 1], 512);
    assert_eq!(flushes(), 1);
    r.good(0, &[0x35], 0);
    assert_eq!(flushes(), 2);
    r.good(0, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1], 512);
    assert_eq!(flushes(), 2);
    // MODE SELECT of the caching page without write cache flushes, and so does every write from then on.
    let mut list = vec![0, 0, 0, 0, 8, 18];
    list.resize(24, 0);
    r.write(&list);
    r.good(0, &[0x15, 0x10, 0, 0, 24], 24);
    assert_eq!(flushes(), 3);
    assert_eq!(r.data(0, &[0x1a, 8, 8, 0, 255], 255)[6], 0);
    r.good(0, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1], 512);
    assert_eq!(flushes(), 4);
}

#[test]
fn mode_pages_are_told_and_only_the_write_cache_changes() {
    let r = rig();
    let all = r.data(0, &[0x1a, 0, 0x3f, 0, 255], 255);
    assert_eq!(
        (usize::from(all[0]) + 1, &all[2..4], &all[4..12]),
        (all.len(), &[0x10, 8][..], &[0, 0, 0x13, 0x88, 0, 0, 2, 0][..])
    );
    let long = r.data(0, &[0x5a, 0x10, 8, 0, 0, 0, 0, 0, 255], 255);
    assert_eq!((&long[..8], long[24], long[26]), (&[0, 42, 0, 0x10, 1, 0, 0, 16][..], 8, 4));
    // Which bits can be changed.
    assert_eq!(r.data(0, &[0x1a, 8, 0x48, 0, 255], 255)[4..7], [8, 18, 4]);
    assert_eq!(r.data(0, &[0x1a, 8, 0x4a, 0, 255], 255)[4..8], [10, 10, 0, 0]);
    assert_eq!(r.sense(0, &[0x1a, 8, 0xff, 0, 255], 0, 255), Sense::SAVING_NOT_SUPPORTED);
    let mut list = vec![0, 0, 0, 0, 8, 18, 1];
    list.resize(24, 0);
    r.write(&list);
    assert_eq!(r.sense(0, &[0x15, 0x10, 0, 0, 24], 24, 0), Sense::INVALID_PARAMETER);
    assert_eq!(r.sense(0, &[0x15, 0x10, 0, 0, 20], 20, 0), Sense::PARAMETER_LIST_LENGTH);
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let r = rig_with(MemoryMedium::with(vec![0; 512 * 100], true));
    assert_eq!(r.data(0, &[0x1a, 8, 0x3f, 0, 255], 255)[2], 0x90);
    for command in [
        &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1][..],
        &[0x41, 0, 0, 0, 0, 0, 0, 0, 1],
        &[0x42, 0, 0, 0, 0, 0, 0, 0, 24],
    ] {
        assert_eq!(r.sense(0, command, 512, 0), Sense::WRITE_PROTECTED, "{command:x?}");
    }
    r.good(0, &[0x35], 0);
}

#[test]
fn verify_compares_with_the_hosts_data() {
    let r = rig();
    r.good(0, &[0x2f, 0, 0, 0, 0, 3, 0, 0, 2], 0);
    r.write(&[vec![3; 512], vec![4; 512]].concat());
    assert_eq!(r.good(0, &[0x2f, 2, 0, 0, 0, 3, 0, 0, 2], 1024), 1024);
    r.write(&[9; 512]);
    assert_eq!(r.sense(0, &[0x2f, 2, 0, 0, 0, 3, 0, 0, 2], 1024, 0), Sense::MISCOMPARE);
}

#[test]
fn ranges_are_given_up_and_filled() {
    let r = rig();
    let mut list = vec![0, 38, 0, 32, 0, 0, 0, 0];
    for (first, count) in [(2u64, 3u32), (100, 1)] {
        list.extend_from_slice(&first.to_be_bytes());
        list.extend_from_slice(&count.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    r.write(&list);
    r.good(0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 40], 40);
    let byte = |sector: usize| r.disk.bytes.lock()[sector * 512];
    assert_eq!([1, 2, 4, 5, 99, 100, 101].map(byte), [1, 0, 0, 5, 99, 0, 101]);
    // A range beyond the end: nothing is given up.
    list[16..20].copy_from_slice(&5000u32.to_be_bytes());
    r.write(&list);
    assert_eq!(r.sense(0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 40], 40, 0), Sense::OUT_OF_RANGE);
    r.write(&[0x77; 512]);
    r.good(0, &[0x93, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0x0f, 0xa0], 512);
    assert_eq!([9, 10, 4009, 4010].map(byte), [9, 0x77, 0x77, 4010u32 as u8]);
    // With the bit that gives them up.
    r.good(0, &[0x93, 8, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 2], 512);
    assert_eq!([19, 20, 21, 22].map(byte), [0x77, 0, 0, 0x77]);
    assert_eq!(r.sense(0, &[0x41, 0, 0, 0, 0, 10, 0, 0, 0], 512, 0), Sense::INVALID_FIELD);
}

#[test]
fn failures_of_the_medium_are_told_and_remembered() {
    let r = rig();
    r.disk.broken.store(true, Ordering::Relaxed);
    assert_eq!(r.sense(0, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1], 0, 512), Sense::READ_ERROR);
    // INQUIRY leaves the sense data alone, REQUEST SENSE takes them.
    r.data(0, &[0x12, 0, 0, 0, 36], 36);
    let sense = r.data(0, &[0x03, 0, 0, 0, 18], 18);
    assert_eq!((sense.len(), sense[0], sense[2], sense[12]), (18, 0x70, 3, 0x11));
    assert_eq!(r.data(0, &[0x03, 1, 0, 0, 18], 18), [0x72, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(r.sense(0, &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1], 512, 0), Sense::WRITE_ERROR);
    assert_eq!(r.sense(0, &[0xff], 0, 0), Sense::INVALID_COMMAND);
}

#[test]
fn commands_run_side_by_side_and_end_as_the_medium_answers() {
    let r = rig();
    r.submit(0, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1], 0, 512, 10);
    r.submit(0, &[0x28, 0, 0, 0, 0, 2, 0, 0, 1], 0, 512, 11);
    r.submit(0, &[0x00], 0, 0, 12);
    assert_eq!(r.disk.waiting(), 2);
    assert_eq!(r.done().unwrap().tag, 12);
    r.disk.complete_all();
    assert_eq!([r.done().unwrap().tag, r.done().unwrap().tag], [10, 11]);
    assert!(r.bus.lock().is_idle());
}

#[test]
fn an_aborted_command_never_ends_and_later_ones_wait_for_its_request() {
    let r = rig();
    r.write(&[0xee; 512]);
    r.submit(0, &[0x2a, 0, 0, 0, 0, 5, 0, 0, 1], 512, 0, 1);
    assert_eq!(r.bus.lock().abort(|_, tag| *tag == 1), [1]);
    r.submit(0, &[0x28, 0, 0, 0, 0, 5, 0, 0, 1], 0, 512, 2);
    // The read has not been asked for: the abandoned write is still on its way.
    assert_eq!((r.disk.waiting(), r.bus.lock().is_idle()), (1, false));
    r.disk.complete_all();
    assert_eq!(r.done().unwrap().tag, 2);
    assert_eq!(r.read(1), [0xee]);
    assert!(r.done().is_none() && r.bus.lock().is_idle());
}

#[test]
fn a_reset_ends_commands_and_is_told_once() {
    let r = rig();
    r.submit(0, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1], 0, 512, 1);
    assert_eq!(r.bus.lock().reset(Some(0)), [1]);
    r.disk.complete_all();
    assert_eq!(r.sense(0, &[0x00], 0, 0), Sense::RESET);
    r.good(0, &[0x00], 0);
    // The other target was not reset.
    r.good(1, &[0x00], 0);
}

#[test]
fn units_that_are_not_there_say_so() {
    let r = rig();
    let mut list = SgList::default();
    list.push(DATA, 36);
    let command = |bytes: &[u8], lun| Command {
        target: 0,
        lun,
        cdb: cdb(bytes),
        out: SgList::default(),
        into: list.clone(),
        tag: 0,
    };
    assert!(r.bus.lock().command(command(&[0x12, 0, 0, 0, 36], 3)).is_ok());
    assert_eq!((r.done().unwrap().status, r.read(1)[0]), (status::GOOD, 0x7f));
    assert!(r.bus.lock().command(command(&[0x00], 3)).is_ok());
    assert_eq!(r.done().unwrap().sense, Sense::NO_SUCH_UNIT);
    assert_eq!(
        r.data(0, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64], 64),
        [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    // No target at all: the controller has to answer.
    assert!(r.bus.lock().command(Command { target: 2, ..command(&[0x00], 0) }).is_err());
}

#[test]
fn discs_are_read_changed_locked_and_ejected() {
    let r = rig();
    let data = r.data(1, &[0x28, 0, 0, 0, 0, 3, 0, 0, 2], 8192);
    assert_eq!((data.len(), data[0], data[4095]), (4096, 3, 4));
    // Whole sectors, with a header of their own.
    let raw = r.data(1, &[0xbe, 0, 0, 0, 0, 3, 0, 0, 1, 0xf8], 8192);
    assert_eq!(
        (raw.len(), &raw[..4], raw[16], raw[2063], raw[2064]),
        (2352, &[0, 255, 255, 255][..], 3, 3, 0)
    );
    assert_eq!(r.sense(1, &[0x28, 0, 0, 0, 0, 63, 0, 0, 2], 0, 4096), Sense::OUT_OF_RANGE);
    // Locked: neither host nor guest gets it out; the guest hears of the host's wish.
    r.good(1, &[0x1e, 0, 0, 0, 1], 0);
    assert_eq!(r.bus.lock().set_medium(1, None, false), Err(TargetError::Locked));
    assert_eq!(r.data(1, &[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8], 8)[4], 1);
    assert_eq!(r.sense(1, &[0x1b, 0, 0, 0, 2], 0, 0), Sense::REMOVAL_PREVENTED);
    r.good(1, &[0x1e], 0);
    // Another disc is told of once.
    let other = MemoryMedium::numbered(10, 2048);
    r.bus.lock().set_medium(1, Some(other), false).unwrap();
    assert_eq!(r.sense(1, &[0x00], 0, 0), Sense::MEDIUM_CHANGED);
    assert_eq!(r.data(1, &[0x25], 8)[..4], [0, 0, 0, 9]);
    // The guest ejects it.
    r.good(1, &[0x1b, 0, 0, 0, 2], 0);
    assert_eq!(*r.ejected.0.lock(), [1]);
    assert_eq!(r.sense(1, &[0x00], 0, 0), Sense::TRAY_OPEN);
}

#[test]
fn drives_come_and_go() {
    let r = rig();
    assert_eq!(r.bus.lock().attach(0, disk_of(&r.disk)), Err(TargetError::Taken(0)));
    assert_eq!(r.bus.lock().attach(3, disk_of(&r.disk)), Err(TargetError::NoTarget(3)));
    r.bus.lock().attach(2, disk_of(&r.disk)).unwrap();
    r.submit(2, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1], 0, 512, 7);
    assert_eq!(r.bus.lock().detach(2), Ok(vec![7]));
    assert!(!r.bus.lock().is_present(2));
    // Another drive in its place does not wait for the former one's request.
    r.bus.lock().attach(2, disk_of(&r.disk)).unwrap();
    r.submit(2, &[0x28, 0, 0, 0, 0, 1, 0, 0, 1], 0, 512, 8);
    assert_eq!(r.disk.waiting(), 2);
    r.disk.complete_all();
    assert_eq!(r.done().unwrap().tag, 8);
    assert_eq!(r.bus.lock().set_medium(2, None, true), Err(TargetError::NoDrive(2)));
}
