use ssm::{Reader, Saveable, Writer};

use super::*;
use crate::scsi::tests::{cd_of, disk_of, memory};
use crate::testing::{Line, MemoryMedium, assert_golden};

const FRAMES: u64 = 0x1_0000;
const REPLIES: u64 = 0x2_0000;
const SENSE: u64 = 0x3_0000;
const PAGE: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;

struct Rig {
    pgm: Arc<Pgm>,
    mpt: Arc<Mutex<Mpt>>,
    irq: Arc<Line>,
    disk: Arc<MemoryMedium>,
}

fn cold(model: Model) -> Rig {
    let pgm = memory();
    let disk = MemoryMedium::numbered(5000, 512);
    let (irq, line) = Line::connect();
    let places = if model == Model::Spi { 16 } else { 8 };
    let mut drives: Vec<Option<Drive>> = (0..places).map(|_| None).collect();
    drives[0] = Some(disk_of(&disk));
    drives[2] = Some(cd_of(&MemoryMedium::numbered(16, 2048)));
    let mpt = Mpt::new(model, Wiring { pgm: pgm.clone(), irq: line, ejected: None }, drives);
    Rig { pgm, mpt, irq, disk }
}

/// Operational, with interrupts on, four frames for replies of 128 bytes.
fn rig(model: Model) -> Rig {
    let r = cold(model);
    let init = [0x0200_0004u32, 0x0001_1000, 0xaa, 128, 0, 0];
    assert_eq!(r.handshake(&init)[7], 0);
    r.set(reg::INTERRUPT_STATUS, 0);
    r.set(reg::INTERRUPT_MASK, interrupt::DOORBELL);
    for n in 0..4 {
        r.set(reg::REPLY_QUEUE, (REPLIES + 0x100 * n) as u32);
    }
    r
}

impl Rig {
    fn get(&self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.mpt.lock().mmio_read(REGION_REGISTERS, register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&self, register: u32, value: u32) {
        self.mpt.lock().mmio_write(REGION_REGISTERS, register.into(), &value.to_le_bytes());
    }

    /// A message through the doorbell as drivers do it; the half-words of its reply.
    fn handshake(&self, words: &[u32]) -> Vec<u16> {
        self.set(reg::INTERRUPT_STATUS, 0);
        self.set(reg::DOORBELL, 0x42 << 24 | (words.len() as u32) << 16);
        assert_eq!(self.get(reg::INTERRUPT_STATUS) & 1, 1);
        assert!(Doorbell::from(self.get(reg::DOORBELL)).active());
        self.set(reg::INTERRUPT_STATUS, 0);
        words.iter().for_each(|word| self.set(reg::DOORBELL, *word));
        let mut halves = Vec::new();
        let half = || {
            assert_eq!(self.get(reg::INTERRUPT_STATUS) & 1, 1);
            let half = self.get(reg::DOORBELL) as u16;
            self.set(reg::INTERRUPT_STATUS, 0);
            half
        };
        halves.push(half());
        halves.push(half());
        // The length in words is in the third byte.
        for _ in 2..2 * usize::from(halves[1] & 0xff) {
            halves.push(half());
        }
        assert!(!Doorbell::from(self.get(reg::DOORBELL)).active());
        self.set(reg::INTERRUPT_STATUS, 0);
        assert_eq!(self.get(reg::INTERRUPT_STATUS) & 1, 0);
        halves
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut bytes);
        bytes
    }

    fn post(&self, n: u64, frame: &[u8]) {
        self.pgm.write(GuestPhys(FRAMES + 0x100 * n), frame);
        self.set(reg::REQUEST_QUEUE, (FRAMES + 0x100 * n) as u32);
    }

    /// A SCSI I/O request of context `n`; `direction` 1 writes, 2 reads. `sgl` follows.
    fn io(&self, n: u8, target: u8, cdb: &[u8], direction: u8, len: u32, chain: u8, sgl: &[u8]) {
        let mut frame = vec![target, 0, chain, 0, cdb.len() as u8, 32, 0, 0, n, 0, 0, 0];
        frame.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, direction]);
        frame.extend_from_slice(cdb);
        frame.resize(40, 0);
        frame.extend_from_slice(&len.to_le_bytes());
        frame.extend_from_slice(&(SENSE as u32).to_le_bytes());
        frame.extend_from_slice(sgl);
        self.post(n.into(), &frame);
    }

    fn simple(&self, n: u8, target: u8, cdb: &[u8], direction: u8, len: u32) {
        self.io(n, target, cdb, direction, len, 0, &element(0xd1, len, DATA));
    }

    /// The reply frame that the next entry of the queue names, which is given back.
    fn reply(&self) -> Vec<u8> {
        let entry = self.get(reg::REPLY_QUEUE);
        assert_eq!(entry >> 31, 1, "a context, 0x{entry:x}");
        let frame = entry << 1;
        let bytes = self.read(frame.into(), 128);
        self.set(reg::REPLY_QUEUE, frame);
        bytes
    }

    fn status_of(reply: &[u8]) -> u16 {
        u16::from_le_bytes([reply[14], reply[15]])
    }

    /// Reads a page of configuration.
    fn page(&self, kind: u8, extended: u8, number: u8, address: u32) -> Result<Vec<u8>, u16> {
        let mut frame = vec![1, 0, 0, 4, 0, 0, extended, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        frame.extend_from_slice(&[0, 0, number, kind]);
        frame.extend_from_slice(&address.to_le_bytes());
        frame.extend_from_slice(&element(0xd1, 512, PAGE));
        self.post(60, &frame);
        let reply = self.reply();
        match Self::status_of(&reply) {
            0 if kind == 0x0f => {
                Ok(self.read(PAGE, 4 * usize::from(u16::from_le_bytes([reply[4], reply[5]]))))
            }
            0 => Ok(self.read(PAGE, 4 * usize::from(reply[21]))),
            status => Err(status),
        }
    }

    fn saved(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.mpt.lock().save(&mut out);
        out.into_bytes()
    }
}

/// A 32-bit element of a list.
fn element(flags: u8, len: u32, address: u64) -> Vec<u8> {
    let mut bytes = (u32::from(flags) << 24 | len).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(address as u32).to_le_bytes());
    bytes
}

#[test]
fn the_doorbell_tells_state_and_facts() {
    let r = cold(Model::Spi);
    assert_eq!(r.get(reg::DOORBELL) >> 28, 1);
    let facts = r.handshake(&[0x0300_0000, 0, 5]);
    assert_eq!((facts.len(), facts[0], facts[1], facts[4]), (30, 0x0102, 0x030f, 5));
    assert_eq!((facts[12], facts[13], facts[18]), (1023, 32, 1023));
    let port = r.handshake(&[0x0500_0000, 0, 6]);
    assert_eq!((port[10] >> 8, port[11], port[12], port[13]), (1, 16, 7, 9));
    let sas = cold(Model::Sas).handshake(&[0x0500_0000, 0, 6]);
    assert_eq!((sas[10] >> 8, sas[11]), (0x30, 8));
    let r = rig(Model::Spi);
    assert_eq!(r.get(reg::DOORBELL) >> 28, 2);
    r.set(reg::DOORBELL, 0x40 << 24);
    assert_eq!(r.get(reg::DOORBELL) >> 28, 1);
}

#[test]
fn the_diagnostic_register_takes_a_reset_only_after_its_keys() {
    let r = rig(Model::Spi);
    r.set(reg::HOST_DIAGNOSTIC, 4);
    assert_eq!((r.get(reg::HOST_DIAGNOSTIC), r.get(reg::DOORBELL) >> 28), (0, 2));
    for key in [0xff, 4, 0xb, 2, 7, 0xd] {
        r.set(reg::WRITE_SEQUENCE, key);
    }
    assert_eq!(r.get(reg::HOST_DIAGNOSTIC), 0x80);
    r.set(reg::HOST_DIAGNOSTIC, 4);
    assert_eq!(r.get(reg::DOORBELL) >> 28, 1);
}

#[test]
fn a_command_that_goes_well_ends_as_its_context() {
    let r = rig(Model::Spi);
    r.simple(3, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 2], 2, 1024);
    assert!(!r.irq.level());
    assert_eq!(r.get(reg::REPLY_QUEUE), !0);
    r.disk.complete_all();
    assert!(r.irq.level());
    assert_eq!(r.get(reg::REPLY_QUEUE), 3);
    assert!(!r.irq.level());
    assert_eq!(r.read(DATA, 1024), [vec![7; 512], vec![8; 512]].concat());
}

#[test]
fn frames_lie_at_multiples_of_four() {
    let r = rig(Model::Spi);
    let mut frame = vec![0, 0, 0, 0, 6, 0, 0, 0, 5, 0, 0, 0];
    frame.resize(48, 0);
    r.pgm.write(GuestPhys(FRAMES + 4), &frame);
    // With the bits that say how much to fetch early.
    r.set(reg::REQUEST_QUEUE, FRAMES as u32 + 4 + 3);
    assert_eq!(r.get(reg::REPLY_QUEUE), 5);
}

#[test]
fn lists_have_chains_and_addresses_of_64_bits() {
    let r = rig(Model::Spi);
    // In the frame: a simple element, then, at word 14 of the frame, the chain to a segment with two wide elements, the second
    // being a chain again.
    let mut list = element(0x90, 512, DATA);
    list.extend_from_slice(&[32, 0, 3, 0x32]);
    list.extend_from_slice(&0x5_0000u64.to_le_bytes());
    let mut segment = (0x9200_0000u32 | 256).to_le_bytes().to_vec();
    segment.extend_from_slice(&(DATA + 0x1000).to_le_bytes());
    segment.extend_from_slice(&element(0x30, 8, 0x5_1000));
    r.pgm.write(GuestPhys(0x5_0000), &segment);
    r.pgm.write(GuestPhys(0x5_1000), &element(0xd1, 256, DATA + 0x2000));
    r.io(1, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 2], 2, 1024, 14, &list);
    r.disk.complete_all();
    assert_eq!(r.get(reg::REPLY_QUEUE), 1);
    assert_eq!(
        (r.read(DATA, 512), r.read(DATA + 0x1000, 256), r.read(DATA + 0x2000, 256)),
        (vec![7; 512], vec![8; 256], vec![8; 256])
    );
}

#[test]
fn a_list_without_end_is_refused() {
    let r = rig(Model::Spi);
    // A chain to itself.
    r.pgm.write(GuestPhys(0x5_0000), &element(0x30, 8, 0x5_0000));
    r.io(1, 0, &[0x28, 0, 0, 0, 0, 7, 0, 0, 1], 2, 512, 0, &element(0x30, 8, 0x5_0000));
    assert_eq!(Rig::status_of(&r.reply()), ioc_status::INVALID_SGL);
}

#[test]
fn writes_reach_the_medium() {
    let r = rig(Model::Sas);
    r.pgm.write(GuestPhys(DATA), &[0xcd; 512]);
    r.simple(1, 0, &[0x2a, 0, 0, 0, 0, 9, 0, 0, 1], 1, 512);
    r.disk.complete_all();
    assert_eq!(r.get(reg::REPLY_QUEUE), 1);
    assert_eq!(r.disk.bytes.lock()[9 * 512], 0xcd);
}

#[test]
fn failures_come_as_frames_with_sense_data_and_count() {
    let r = rig(Model::Spi);
    r.simple(7, 0, &[0xff], 2, 64);
    let reply = r.reply();
    assert_eq!((reply[2], reply[3], reply[8], reply[12], reply[13]), (8, 0, 7, 2, 1));
    assert_eq!(Rig::status_of(&reply), ioc_status::DATA_UNDERRUN);
    let sense = r.read(SENSE, 18);
    assert_eq!((sense[0], sense[2], sense[12]), (0x70, 5, 0x20));
    // Fewer data than there is room for.
    r.simple(8, 0, &[0x12, 0, 0, 0, 255], 2, 255);
    let reply = r.reply();
    assert_eq!((reply[12], Rig::status_of(&reply), reply[20]), (0, ioc_status::DATA_UNDERRUN, 36));
    r.simple(9, 5, &[0x00], 0, 0);
    assert_eq!(Rig::status_of(&r.reply()), ioc_status::DEVICE_NOT_THERE);
    r.simple(9, 16, &[0x00], 0, 0);
    assert_eq!(Rig::status_of(&r.reply()), ioc_status::INVALID_TARGET);
}

#[test]
fn replies_wait_for_frames() {
    let r = rig(Model::Spi);
    for n in 0..6 {
        r.simple(n, 5, &[0x00], 0, 0);
    }
    let mut contexts = Vec::new();
    for _ in 0..6 {
        contexts.push(r.reply()[8]);
    }
    assert_eq!(contexts, [0, 1, 2, 3, 4, 5]);
    assert_eq!(r.get(reg::REPLY_QUEUE), !0);
}

#[test]
fn task_management_ends_commands_whichever_way_it_comes() {
    let r = rig(Model::Spi);
    let read = [0x28, 0, 0, 0, 0, 7, 0, 0, 1];
    r.simple(1, 0, &read, 2, 512);
    r.simple(2, 0, &read, 2, 512);
    let mut abort = vec![0, 0, 0, 1, 0, task::ABORT_TASK, 0, 0, 0x55, 0, 0, 0];
    abort.resize(48, 0);
    abort.extend_from_slice(&1u32.to_le_bytes());
    r.post(10, &abort);
    let (ended, done) = (r.reply(), r.reply());
    assert_eq!((ended[8], Rig::status_of(&ended), ended[13]), (1, ioc_status::TASK_TERMINATED, 0x0c));
    assert_eq!((done[3], done[5], done[8], done[20]), (1, task::ABORT_TASK, 0x55, 1));
    // A reset of the target, through the doorbell; its reply comes through the queue all the same.
    let mut words = vec![0x0100_0000u32, u32::from(task::TARGET_RESET) << 8, 0x66];
    words.resize(13, 0);
    r.set(reg::DOORBELL, 0x42 << 24 | 13 << 16);
    r.set(reg::INTERRUPT_STATUS, 0);
    words.iter().for_each(|word| r.set(reg::DOORBELL, *word));
    assert!(!Doorbell::from(r.get(reg::DOORBELL)).active());
    let (ended, done) = (r.reply(), r.reply());
    assert_eq!((ended[8], done[8], done[20]), (2, 0x66, 1));
    r.disk.complete_all();
    assert_eq!(r.get(reg::REPLY_QUEUE), !0);
    r.simple(3, 0, &[0x00], 0, 0);
    assert_eq!((r.reply()[12], r.read(SENSE, 13)[12]), (2, 0x29));
}

#[test]
fn pages_of_the_parallel_controller() {
    let r = rig(Model::Spi);
    let page = r.page(9, 0, 0, 0).unwrap();
    assert_eq!((page.len(), &page[..4], &page[4..19]), (76, &[0, 19, 0, 0x39][..], &b"VBox MPT Fusion"[..]));
    assert_eq!(r.page(3, 0, 0, 0).unwrap()[..4], [2, 3, 0, 3]);
    let settings = r.page(3, 0, 2, 0).unwrap();
    assert_eq!((settings.len(), settings[8], &settings[12..16]), (76, 0x37, &[10, 8, 0x2f, 0][..]));
    assert_eq!(r.page(9, 0, 9, 0), Err(ioc_status::CONFIG_INVALID_PAGE));
    assert_eq!(r.page(4, 0, 0, 16), Err(ioc_status::CONFIG_INVALID_PAGE));
    // Parameters that the driver asks for are agreed upon.
    let mut frame = vec![2, 0, 0, 4, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 4, 1, 4, 2, 0, 0, 0];
    frame.extend_from_slice(&element(0xd5, 16, PAGE));
    r.pgm.write(GuestPhys(PAGE), &[5, 4, 1, 0x14, 0x34, 0x12, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0]);
    r.post(60, &frame);
    assert_eq!(Rig::status_of(&r.reply()), 0);
    assert_eq!(r.page(4, 0, 0, 2).unwrap()[4..8], [0x34, 0x12, 0, 0x20]);
    // A page that nobody may write.
    frame[22..24].copy_from_slice(&[0, 9]);
    r.post(60, &frame);
    assert_eq!(Rig::status_of(&r.reply()), ioc_status::CONFIG_CANT_COMMIT);
}

#[test]
fn pages_of_the_sas_controller() {
    let r = rig(Model::Sas);
    let unit = r.page(0x0f, 0x10, 0, 0).unwrap();
    assert_eq!((unit.len(), unit[12]), (16 + 8 * 16, 8));
    // The phy of the disk: rate, attached handle, own handle; one without a drive.
    assert_eq!((unit[16 + 3], unit[16 + 8], unit[16 + 10]), (9, 9, 1));
    assert_eq!((unit[32 + 3], unit[32 + 8], unit[32 + 10]), (2, 0, 2));
    // Devices one after the other: eight ends of the controller, then the drives.
    let mut handles = Vec::new();
    let mut handle = 0xffff;
    while let Ok(page) = r.page(0x0f, 0x12, 0, handle) {
        handle = u16::from_le_bytes([page[24], page[25]]).into();
        handles.push(handle);
    }
    assert_eq!(handles, [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]);
    let device = r.page(0x0f, 0x12, 0, 2 << 28 | 11).unwrap();
    assert_eq!((device.len(), &device[12..20], device[26]), (36, &[2, 6, 5, 4, 3, 2, 1, 0x50][..], 2));
    assert_eq!(r.page(0x0f, 0x12, 0, 1 << 28 | 2), Ok(device));
    let phy = r.page(0x0f, 0x13, 0, 0).unwrap();
    assert_eq!((phy.len(), phy[8], phy[20]), (36, 1, 9));
    assert_eq!(r.page(0x0f, 0x13, 0, 8), Err(ioc_status::CONFIG_INVALID_PAGE));
    assert_eq!(r.page(3, 0, 0, 0), Err(ioc_status::CONFIG_INVALID_PAGE));
}

#[test]
fn sas_drives_that_come_and_go_are_told() {
    let r = rig(Model::Sas);
    r.post(0, &[1, 0, 0, 7, 0, 0, 0, 0, 0x44, 0, 0, 0]);
    assert_eq!((r.reply()[20], r.mpt.lock().state.events), (0x0a, Some(0x44)));
    r.mpt.lock().attach(4, disk_of(&r.disk)).unwrap();
    let event = r.reply();
    assert_eq!((event[3], event[7], event[8], event[20]), (7, 0x80, 0x44, 0x0f));
    assert_eq!((event[28], event[30], event[34]), (4, event::ADDED, 13));
    r.simple(1, 4, &[0x28, 0, 0, 0, 0, 7, 0, 0, 1], 2, 512);
    r.mpt.lock().detach(4).unwrap();
    assert_eq!(Rig::status_of(&r.reply()), ioc_status::DEVICE_NOT_THERE);
    assert_eq!(r.reply()[30], event::NOT_RESPONDING);
}

#[test]
fn ports_and_memory_show_the_same_registers() {
    let r = rig(Model::Spi);
    let mut mpt = r.mpt.lock();
    assert_eq!(mpt.port_read(Port(0xd000), Width::Dword) >> 28, 2);
    assert_eq!(mpt.port_read(Port(0xd003), Width::Byte) >> 4, 2);
    mpt.port_write(Port(0xd034), Width::Dword, 1);
    assert_eq!(mpt.port_read(Port(0xd034), Width::Word), 1);
    let mut diagnostic = [0xff; 4];
    mpt.mmio_read(REGION_DIAGNOSTIC, 0, &mut diagnostic);
    assert_eq!(diagnostic, [0; 4]);
}

#[test]
fn too_many_frames_make_a_fault_that_a_reset_mends() {
    let r = rig(Model::Spi);
    for _ in 0..REPLY_FRAMES {
        r.set(reg::REPLY_QUEUE, REPLIES as u32);
    }
    assert_eq!((r.get(reg::DOORBELL) >> 28, r.get(reg::DOORBELL) as u16), (4, FAULT_RESOURCES));
    r.set(reg::DOORBELL, 0x40 << 24);
    assert_eq!(r.get(reg::DOORBELL) >> 28, 1);
}

#[test]
fn a_state_with_everything_in_it_survives() {
    let r = rig(Model::Sas);
    for n in 0..6 {
        r.simple(n, 5, &[0x00], 0, 0);
    }
    r.set(reg::WRITE_SEQUENCE, 4);
    r.set(reg::DOORBELL, 0x42 << 24 | 3 << 16);
    r.set(reg::DOORBELL, 0x0300_0000);
    let saved = r.saved();
    let other = cold(Model::Sas);
    let load = |rig: &Rig, bytes: &[u8]| rig.mpt.lock().load(Reader::new("lsilogicsas", 1, bytes));
    load(&other, &saved).unwrap();
    assert_eq!(other.saved(), saved);
    assert!(other.irq.level());
    // The message that had begun goes on.
    other.set(reg::DOORBELL, 0);
    other.set(reg::DOORBELL, 5);
    assert_eq!(other.get(reg::DOORBELL) as u16, 0x0105);
    // Cut anywhere, it is refused and changes nothing.
    let before = r.saved();
    for len in 0..saved.len() {
        assert!(load(&r, &saved[..len]).is_err());
    }
    assert_eq!(r.saved(), before);
}

#[test]
fn the_saved_format_is_that_of_version_1() {
    let r = rig(Model::Spi);
    r.simple(1, 5, &[0x00], 0, 0);
    assert_golden(&r.saved(), include_str!("../../golden/lsilogicscsi.v1.hex"));
}
