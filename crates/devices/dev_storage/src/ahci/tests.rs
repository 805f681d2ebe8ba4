use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use pdm::connector::BlockDriver;
use pdm::{Device, MmioDevice};
use pgm::{Backing, HostMemory, Layer, Pgm};
use ssm::{Reader, Saveable, Writer};
use vbox_types::{ByteSize, GuestPhys};

use super::{Ahci, PortError, PortSetup, Wiring};
use crate::ide::{CdIdentity, DiskIdentity, Drive};
use crate::testing::{Line, MemoryMedium, assert_golden};

const RAM: u64 = 4 << 20;
/// Command list, received FISes and command tables of port `p`.
const LIST: u64 = 0x1_0000;
const FISES: u64 = 0x2_0000;
const TABLES: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

const IS: u64 = 0x10;
const IE: u64 = 0x14;
const CMD: u64 = 0x18;
const TFD: u64 = 0x20;
const SIG: u64 = 0x24;
const SSTS: u64 = 0x28;
const SCTL: u64 = 0x2c;
const SERR: u64 = 0x30;
const SACT: u64 = 0x34;
const CI: u64 = 0x38;

const DHRS: u32 = 1;
const PSS: u32 = 2;
const SDBS: u32 = 8;
const TFES: u32 = 1 << 30;

struct Rig {
    pgm: Arc<Pgm>,
    ahci: Arc<Mutex<Ahci>>,
    irq: Arc<Line>,
    disk: Arc<MemoryMedium>,
    cd: Arc<MemoryMedium>,
}

/// A disk of 5000 numbered sectors at port 0, a CD of 64 numbered sectors at port 1, nothing at port 2. Both drives started.
fn rig() -> Rig {
    let r = cold_rig();
    r.set(4, 2);
    for port in 0..2 {
        r.start(port);
    }
    r
}

fn cold_rig() -> Rig {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    let disk = MemoryMedium::numbered(5000, 512);
    let cd = MemoryMedium::numbered(64, 2048);
    let (irq, line) = Line::connect();
    let wiring = Wiring { pgm: pgm.clone(), irq: line, ejected: None };
    let identity = DiskIdentity { discard: true, ..DiskIdentity::virtualbox(0x1234_5678, 0x9abc_def0) };
    let setup = vec![
        PortSetup { drive: Some(Drive::Disk { identity, medium: disk.clone() }), hot_pluggable: false },
        PortSetup {
            drive: Some(Drive::Cd { identity: CdIdentity::virtualbox_ahci(1), medium: Some(cd.clone()) }),
            hot_pluggable: false,
        },
        PortSetup { drive: None, hot_pluggable: true },
    ];
    Rig { pgm, ahci: Ahci::new(wiring, setup), irq, disk, cd }
}

fn fpdma(code: u8, slot: u8, lba: u32, count: u16) -> [u8; 20] {
    let [l0, l1, l2, l3] = lba.to_le_bytes();
    let [c0, c1] = count.to_le_bytes();
    [0x27, 0x80, code, c0, l0, l1, l2, 0x40, l3, 0, 0, c1, slot << 3, 0, 0, 0, 0, 0, 0, 0]
}

/// A command with a 48-bit address.
fn ext(code: u8, lba: u32, count: u16) -> [u8; 20] {
    let [l0, l1, l2, l3] = lba.to_le_bytes();
    let [c0, c1] = count.to_le_bytes();
    [0x27, 0x80, code, 0, l0, l1, l2, 0x40, l3, 0, 0, 0, c0, c1, 0, 0, 0, 0, 0, 0]
}

impl Rig {
    fn reg(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.ahci.lock().mmio_read(0, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&self, at: u64, value: u32) {
        self.ahci.lock().mmio_write(0, at, &value.to_le_bytes());
    }

    fn px(&self, port: u64, register: u64) -> u32 {
        self.reg(0x100 + 0x80 * port + register)
    }

    fn set_px(&self, port: u64, register: u64, value: u32) {
        self.set(0x100 + 0x80 * port + register, value);
    }

    fn start(&self, port: u64) {
        self.set_px(port, 0x00, (LIST + 0x400 * port) as u32);
        self.set_px(port, 0x08, (FISES + 0x100 * port) as u32);
        self.set_px(port, CMD, 0x16);
        self.set_px(port, SERR, !0);
        self.set_px(port, IS, !0);
        self.set_px(port, IE, 0x7dc0_007f);
        self.set_px(port, CMD, 0x17);
    }

    /// Writes a command into a slot.
    fn command(&self, port: u64, slot: u64, cfis: &[u8], packet: &[u8], prds: &[(u64, u32)]) {
        let table = TABLES + 0x8000 * port + 0x400 * slot;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&(5 | (prds.len() as u32) << 16).to_le_bytes());
        header[8..].copy_from_slice(&table.to_le_bytes());
        self.pgm.write(GuestPhys(LIST + 0x400 * port + 32 * slot), &header);
        self.pgm.write(GuestPhys(table), cfis);
        self.pgm.write(GuestPhys(table + 0x40), packet);
        for (i, (address, len)) in prds.iter().enumerate() {
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&address.to_le_bytes());
            entry[12..].copy_from_slice(&(len - 1).to_le_bytes());
            self.pgm.write(GuestPhys(table + 0x80 + 16 * i as u64), &entry);
        }
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut out);
        out
    }

    /// Bytes transferred, as the header of a slot tells.
    fn moved(&self, port: u64, slot: u64) -> u32 {
        u32::from_le_bytes(self.memory(LIST + 0x400 * port + 32 * slot + 4, 4).try_into().unwrap())
    }

    fn packet(&self, packet: &[u8], len: u32) {
        let mut cfis = [0; 20];
        cfis[..4].copy_from_slice(&[0x27, 0x80, 0xa0, 1]);
        self.command(1, 0, &cfis, packet, &[(DATA, len)]);
        self.set_px(1, CI, 1);
        self.cd.complete_all();
    }

    fn save(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.ahci.lock().save(&mut out);
        out.into_bytes()
    }
}

#[test]
fn the_registers_tell_what_virtualbox_tells_but_for_staggered_spin_up() {
    let r = cold_rig();
    assert_eq!(r.reg(0x00), 0xc024_1f02, "64-bit, NCQ, AHCI only, 3 Gb/s, 32 slots, 3 ports");
    assert_eq!((r.reg(0x04), r.reg(0x0c), r.reg(0x10)), (0x8000_0000, 7, 0x0001_0100));
    assert_eq!((r.px(0, SSTS), r.px(0, SIG)), (0x123, 0x0000_0101));
    assert_eq!((r.px(1, SSTS), r.px(1, SIG)), (0x123, 0xeb14_0101));
    assert_eq!((r.px(2, SSTS), r.px(2, SIG), r.px(2, TFD)), (0, 0xffff_ffff, 0x7f));
    assert_eq!(
        (r.px(1, CMD) & 1 << 18, r.px(2, CMD) & 1 << 18),
        (0, 1 << 18),
        "only port 2 is hot-pluggable"
    );
    assert_eq!(r.px(3, SSTS), 0);
    r.set_px(0, CMD, 0);
    assert_eq!(r.px(0, CMD) & 2, 2, "drives spin");
}

#[test]
fn the_signature_arrives_when_fises_are_received() {
    let r = cold_rig();
    r.set_px(1, 0x08, FISES as u32);
    assert_eq!(r.memory(FISES + 0x40, 1), [0]);
    r.set_px(1, CMD, 0x16);
    assert_eq!(r.memory(FISES + 0x40, 8), [0x34, 0, 0, 1, 1, 0x14, 0xeb, 0]);
    assert_eq!(r.px(1, CMD) & 0x4000, 0x4000, "FR");
}

#[test]
fn identify_comes_by_pio_with_the_words_of_serial_ata() {
    let r = rig();
    r.command(0, 3, &ext(0xec, 0, 0), &[], &[(DATA, 512)]);
    r.set_px(0, CI, 8);
    assert_eq!((r.px(0, CI), r.px(0, IS), r.px(0, TFD)), (0, PSS, 0x50));
    assert!(r.irq.level());
    let data = r.memory(DATA, 512);
    let word = |n: usize| u16::from_le_bytes([data[2 * n], data[2 * n + 1]]);
    assert_eq!((word(75), word(76), word(93)), (31, 0x0106, 0));
    assert_eq!(data[54..68], *b"BVXOH RADDSI K", "\"VBOX HARDDISK\", bytes swapped");
    assert_eq!(r.moved(0, 3), 512);
    let setup = r.memory(FISES + 0x20, 20);
    assert_eq!((setup[0], setup[2], setup[15], setup[16], setup[17]), (0x5f, 0x58, 0x50, 0, 2));
    r.set_px(0, IS, PSS);
    r.set(8, 1);
    assert!(!r.irq.level());
}

#[test]
fn a_dma_read_is_scattered_and_waits_for_the_medium() {
    let r = rig();
    r.command(0, 0, &ext(0x25, 7, 3), &[], &[(DATA, 700), (DATA + 0x1000, 836)]);
    r.set_px(0, CI, 1);
    assert_eq!((r.px(0, CI), r.px(0, TFD), r.px(0, IS)), (1, 0x80, 0));
    r.disk.complete_all();
    assert_eq!((r.px(0, CI), r.px(0, TFD), r.px(0, IS)), (0, 0x50, DHRS));
    assert_eq!(r.memory(DATA, 512), [7; 512]);
    assert_eq!(r.memory(DATA + 512, 188), [8; 188]);
    assert_eq!(r.memory(DATA + 0x1000 + 324, 512), [9; 512]);
    assert_eq!(r.moved(0, 0), 1536);
}

#[test]
fn a_dma_write_gathers_and_a_flush_reaches_the_medium() {
    let r = rig();
    r.pgm.write(GuestPhys(DATA), &[0xab; 1024]);
    r.command(0, 0, &ext(0x35, 10, 2), &[], &[(DATA, 1024)]);
    r.command(0, 1, &ext(0xea, 0, 0), &[], &[]);
    r.set_px(0, CI, 3);
    r.disk.complete_all();
    assert_eq!(r.px(0, CI), 0);
    assert_eq!(r.disk.bytes.lock()[5120..6144], [0xab; 1024]);
    assert_eq!(r.disk.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn queued_commands_run_side_by_side() {
    let r = rig();
    r.command(0, 0, &fpdma(0x60, 0, 100, 2), &[], &[(DATA, 1024)]);
    r.pgm.write(GuestPhys(DATA + 0x1000), &[0xcd; 512]);
    r.command(0, 5, &fpdma(0x61, 5, 200, 1), &[], &[(DATA + 0x1000, 512)]);
    r.set_px(0, SACT, 0x21);
    r.set_px(0, CI, 0x21);
    assert_eq!((r.px(0, CI), r.px(0, SACT), r.disk.waiting()), (0, 0x21, 2));
    r.disk.complete_one();
    assert_eq!((r.px(0, SACT), r.px(0, IS)), (0x20, SDBS));
    assert_eq!(r.memory(FISES + 0x58, 8), [0xa1, 0x40, 0x50, 0, 1, 0, 0, 0]);
    assert_eq!(r.memory(DATA, 512), [100; 512]);
    r.disk.complete_one();
    assert_eq!(r.px(0, SACT), 0);
    assert_eq!(r.disk.bytes.lock()[200 * 512..201 * 512], [0xcd; 512]);
}

#[test]
fn a_long_queued_read_comes_in_pieces_to_the_right_places() {
    let r = rig();
    r.command(0, 0, &fpdma(0x60, 0, 1, 2500), &[], &[(DATA, 1024), (DATA + 1024, 2500 * 512 - 1024)]);
    r.set_px(0, SACT, 1);
    r.set_px(0, CI, 1);
    r.disk.complete_all();
    assert_eq!(r.px(0, SACT), 0);
    let expected: Vec<u8> = (1..2501usize).flat_map(|n| [n as u8; 512]).collect();
    assert!(r.memory(DATA, 2500 * 512) == expected);
}

#[test]
fn a_queued_write_with_fua_flushes_before_it_ends() {
    let r = rig();
    let mut cfis = fpdma(0x61, 0, 3, 1);
    cfis[7] |= 0x80;
    r.command(0, 0, &cfis, &[], &[(DATA, 512)]);
    r.set_px(0, SACT, 1);
    r.set_px(0, CI, 1);
    r.disk.complete_one();
    assert_eq!((r.px(0, SACT), r.disk.waiting()), (1, 1));
    r.disk.complete_one();
    assert_eq!((r.px(0, SACT), r.disk.flushes.load(Ordering::Relaxed)), (0, 1));
}

#[test]
fn a_failed_queued_command_stops_the_list_and_the_log_names_it() {
    let r = rig();
    r.command(0, 2, &fpdma(0x60, 2, 10, 1), &[], &[(DATA, 512)]);
    r.command(0, 9, &fpdma(0x60, 9, 4999, 2), &[], &[(DATA, 1024)]);
    r.set_px(0, SACT, 1 << 2 | 1 << 9);
    r.set_px(0, CI, 1 << 2);
    r.set_px(0, CI, 1 << 9);
    assert_eq!((r.px(0, IS) & (TFES | SDBS), r.px(0, TFD)), (TFES | SDBS, 0x1051), "IDNF");
    assert_eq!(r.px(0, SACT), 1 << 2 | 1 << 9, "neither has ended");
    r.disk.complete_all();
    assert_eq!(r.memory(DATA, 512), [0; 512], "the other command was given up");
    // Recovery: restart the list, read log 0x10.
    r.set_px(0, IS, !0);
    r.set_px(0, CMD, 0x16);
    r.set_px(0, CMD, 0x17);
    assert_eq!((r.px(0, SACT), r.px(0, CMD) & 0x8001), (0, 0x8001));
    r.command(0, 0, &ext(0x2f, 0x10, 1), &[], &[(DATA, 512)]);
    r.set_px(0, CI, 1);
    let log = r.memory(DATA, 512);
    assert_eq!(log[..8], [9, 0, 0x51, 0x10, 0x87, 0x13, 0, 0x40]);
    assert_eq!(log.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0);
    // It is told once.
    r.set_px(0, CI, 1);
    assert_eq!(r.memory(DATA, 1), [0x80]);
}

#[test]
fn a_broken_medium_is_an_uncorrectable_error_and_the_next_command_waits_for_a_restart() {
    let r = rig();
    r.disk.broken.store(true, Ordering::Relaxed);
    r.command(0, 0, &ext(0x25, 5, 1), &[], &[(DATA, 512)]);
    r.command(0, 1, &ext(0xec, 0, 0), &[], &[(DATA, 512)]);
    r.set_px(0, CI, 3);
    r.disk.complete_all();
    assert_eq!((r.px(0, CI), r.px(0, TFD), r.px(0, IS)), (3, 0x4051, TFES | DHRS));
    assert_eq!(r.memory(FISES + 0x40, 5), [0x34, 0x40, 0x51, 0x40, 5]);
    r.set_px(0, CMD, 0x16);
    assert_eq!((r.px(0, CI), r.px(0, CMD) & 0x8000), (0, 0));
    r.set_px(0, CMD, 0x17);
    r.set_px(0, CI, 2);
    assert_eq!((r.px(0, CI), r.px(0, TFD)), (0, 0x50));
}

#[test]
fn a_reset_drops_the_answer_under_way_and_the_next_request_waits_for_it() {
    let r = rig();
    r.pgm.write(GuestPhys(DATA), &[1; 512]);
    r.command(0, 0, &ext(0x35, 0, 1), &[], &[(DATA, 512)]);
    r.set_px(0, CI, 1);
    r.set_px(0, SCTL, 0x301);
    assert_eq!((r.px(0, SSTS), r.px(0, SIG), r.px(0, CI)), (0, 0xffff_ffff, 0));
    r.set_px(0, SCTL, 0x300);
    assert_eq!((r.px(0, SSTS), r.px(0, SIG), r.px(0, SERR)), (0x123, 0x101, 1 << 26));
    assert_eq!(r.px(0, IS) & 0x40, 0x40, "the connect change shows");
    r.set_px(0, SERR, !0);
    assert_eq!(r.px(0, IS) & 0x40, 0);
    r.pgm.write(GuestPhys(DATA), &[2; 512]);
    r.set_px(0, CI, 1);
    assert_eq!(r.disk.waiting(), 1, "the new write waits for the abandoned one");
    r.disk.complete_one();
    assert_eq!((r.px(0, CI), r.disk.waiting()), (1, 1));
    r.disk.complete_one();
    assert_eq!((r.px(0, CI), r.disk.bytes.lock()[0]), (0, 2));
}

#[test]
fn software_reset_leaves_the_signature() {
    let r = rig();
    let mut cfis = [0; 20];
    cfis[0] = 0x27;
    for control in [4, 0] {
        cfis[15] = control;
        r.command(1, 0, &cfis, &[], &[]);
        r.set_px(1, CI, 1);
        assert_eq!(r.px(1, CI), 0);
    }
    assert_eq!((r.px(1, SIG), r.px(1, TFD) & 0x88), (0xeb14_0101, 0));
}

#[test]
fn tables_that_are_too_short_lose_nothing_else() {
    let r = rig();
    r.command(0, 0, &ext(0x25, 0, 2), &[], &[(DATA, 512)]);
    r.set_px(0, CI, 1);
    r.disk.complete_all();
    assert_eq!((r.px(0, CI), r.px(0, IS) & 1 << 24, r.moved(0, 0)), (0, 1 << 24, 512), "overflow");
    r.command(0, 0, &ext(0x35, 0, 2), &[], &[(DATA, 512)]);
    r.set_px(0, CI, 1);
    assert_eq!((r.px(0, TFD) & 0x401, r.disk.waiting()), (0x401, 0), "a short write is aborted");
}

#[test]
fn an_unknown_fis_stops_the_port() {
    let r = rig();
    r.command(0, 0, &[0x46; 20], &[], &[]);
    r.set_px(0, CI, 1);
    assert_eq!((r.px(0, IS) & 1 << 27, r.px(0, CI)), (1 << 27, 1));
}

#[test]
fn trim_discards_the_ranges() {
    let r = rig();
    let mut range = [0; 512];
    range[..8].copy_from_slice(&(20u64 | 2 << 48).to_le_bytes());
    r.pgm.write(GuestPhys(DATA), &range);
    let mut cfis = ext(0x06, 0, 1);
    cfis[3] = 1;
    r.command(0, 0, &cfis, &[], &[(DATA, 512)]);
    r.set_px(0, CI, 1);
    r.disk.complete_all();
    assert_eq!((r.px(0, CI), r.px(0, TFD)), (0, 0x50));
    assert_eq!(r.disk.bytes.lock()[20 * 512..22 * 512], [0; 1024]);
    assert_eq!(r.disk.bytes.lock()[22 * 512], 22);
}

#[test]
fn packets_read_the_disc_and_leave_sense() {
    let r = rig();
    r.packet(&[0x28, 0, 0, 0, 0, 7, 0, 0, 2, 0, 0, 0], 4096);
    assert_eq!((r.px(1, CI), r.px(1, IS), r.px(1, TFD)), (0, DHRS, 0x50));
    assert_eq!(r.memory(DATA, 2048), [7; 2048]);
    assert_eq!(r.memory(DATA + 2048, 2048), [8; 2048]);
    r.packet(&[0x28, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], 2048);
    assert_eq!((r.px(1, CI), r.px(1, TFD)), (1, 0x5451), "illegal request");
    r.set_px(1, CMD, 0x16);
    r.set_px(1, CMD, 0x17);
    r.packet(&[3, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0], 18);
    let sense = r.memory(DATA, 18);
    assert_eq!((sense[2], sense[12]), (5, 0x21));
}

#[test]
fn a_drive_that_is_plugged_in_is_announced() {
    let r = rig();
    r.start(2);
    let medium = MemoryMedium::numbered(10, 512);
    let drive = |m: &Arc<MemoryMedium>| Drive::Disk {
        identity: DiskIdentity::virtualbox(1, 2),
        medium: m.clone() as Arc<dyn BlockDriver>,
    };
    r.ahci.lock().attach(2, drive(&medium)).unwrap();
    assert_eq!((r.px(2, SSTS), r.px(2, IS)), (0x123, 1 << 22 | 1 << 6));
    assert_eq!((r.reg(8), r.irq.level()), (4, true));
    assert_eq!(r.ahci.lock().attach(2, drive(&medium)), Err(PortError::Taken(2)));
    r.set_px(2, SERR, !0);
    r.command(2, 0, &ext(0x25, 3, 1), &[], &[(DATA, 512)]);
    r.set_px(2, CI, 1);
    r.ahci.lock().detach(2).unwrap();
    medium.complete_all();
    assert_eq!((r.px(2, SSTS), r.px(2, IS) & 1 << 22, r.px(2, CI)), (0, 1 << 22, 0));
    assert_eq!(r.memory(DATA, 1), [0], "a drive that has gone moves no data");
}

#[test]
fn a_locked_disc_stays_and_a_changed_one_is_announced() {
    let r = rig();
    r.packet(&[0x1e, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], 2);
    assert_eq!(r.ahci.lock().set_medium(1, None, false), Err(PortError::Locked));
    assert_eq!(r.ahci.lock().set_medium(0, None, false), Err(PortError::NoDrive(0)));
    r.ahci.lock().set_medium(1, Some(MemoryMedium::numbered(8, 2048)), true).unwrap();
    r.packet(&[0; 12], 2);
    assert_eq!(r.px(1, TFD), 0x6451, "unit attention");
}

#[test]
fn narrow_writes_change_their_bytes_only() {
    let r = cold_rig();
    r.set_px(0, IE, 0x4000_0001);
    r.ahci.lock().mmio_write(0, 0x100 + IE + 3, &[0x7c]);
    assert_eq!(r.px(0, IE), 0x7c00_0001);
    let list = 0x1_2345_6400u64;
    r.ahci.lock().mmio_write(0, 0x100, &list.to_le_bytes());
    let mut bytes = [0; 8];
    r.ahci.lock().mmio_read(0, 0x100, &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), list);
}

#[test]
fn a_restored_controller_goes_on_where_the_saved_one_stood() {
    let r = rig();
    r.command(0, 9, &fpdma(0x60, 9, 4999, 2), &[], &[(DATA, 1024)]);
    r.set_px(0, SACT, 1 << 9);
    r.set_px(0, CI, 1 << 9);
    let saved = r.save();
    assert_golden(&saved, include_str!("../golden/ahci.v1.hex"));
    let other = cold_rig();
    other.ahci.lock().load(Reader::new("ahci", 1, &saved)).unwrap();
    assert_eq!(other.save(), saved);
    assert!(other.irq.level());
    other.set_px(0, CMD, 0x16);
    other.set_px(0, CMD, 0x17);
    other.command(0, 0, &ext(0x2f, 0x10, 1), &[], &[(DATA, 512)]);
    other.set_px(0, CI, 1);
    assert_eq!(other.memory(DATA, 1), [9]);
    other.ahci.lock().reset();
    assert!(!other.irq.level());
}

#[test]
fn spoilt_states_are_refused_and_change_nothing() {
    let r = rig();
    let saved = r.save();
    let other = cold_rig();
    let before = other.save();
    for cut in [0, 1, 50, saved.len() - 1] {
        assert!(other.ahci.lock().load(Reader::new("ahci", 1, &saved[..cut])).is_err());
    }
    assert!(other.ahci.lock().load(Reader::new("ahci", 2, &saved)).is_err());
    assert_eq!(other.save(), before);
    // Whatever a bit flip makes of it, using the result must not panic.
    let victim = cold_rig();
    for bit in 0..300 * 8 {
        let mut spoilt = saved.clone();
        spoilt[bit / 8] ^= 1 << (bit % 8);
        if victim.ahci.lock().load(Reader::new("ahci", 1, &spoilt)).is_ok() {
            victim.set_px(0, CI, 0xff);
            victim.disk.complete_all();
            victim.ahci.lock().reset();
        }
    }
}
