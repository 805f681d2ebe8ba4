use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use pdm::iom::Iom;
use pdm::pci::{DevFn, PciBus, reg};
use pdm::{Device, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use ssm::{Reader, Saveable, Writer};
use vbox_types::{ByteSize, GuestPhys, Port};

use super::{CdIdentity, DiskIdentity, Drive, Ide, MediumError, Model, Wiring};
use crate::testing::{Line, MemoryMedium, assert_golden};

const BM: u16 = 0xc000;
const DRQ: u8 = 0x08;
const READY: u8 = 0x50;
const BSY: u8 = 0x80;

struct Rig {
    iom: Arc<Iom>,
    pgm: Arc<Pgm>,
    ide: Arc<Mutex<Ide>>,
    irq: Arc<Line>,
    disk: Arc<MemoryMedium>,
    cd: Arc<MemoryMedium>,
}

/// A disk of 1000 numbered sectors as primary master, a CD of 64 numbered sectors as primary slave.
fn rig() -> Rig {
    let iom = Iom::new();
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize::mib(4)).unwrap());
    pgm.map(GuestPhys(0), 4 << 20, Layer::Ram, Backing::ram(ram, 0));
    let bus = PciBus::new(iom.clone(), pgm.clone());
    let disk = MemoryMedium::numbered(1000, 512);
    let cd = MemoryMedium::numbered(64, 2048);
    let (irq, line) = Line::connect();
    let wiring = Wiring { pgm: pgm.clone(), irqs: [line, Default::default()], ejected: None };
    let identity = DiskIdentity { discard: true, ..DiskIdentity::virtualbox(0x1234_5678, 0x9abc_def0) };
    let drives = [
        Some(Drive::Disk { identity, medium: disk.clone() }),
        Some(Drive::Cd { identity: CdIdentity::virtualbox(1), medium: Some(cd.clone()) }),
        None,
        None,
    ];
    let ide = Ide::new(Model::Piix3, wiring, drives);
    let at = DevFn::new(1, 1);
    Ide::register(&ide, &iom, &bus, at);
    bus.config_write(at, reg::BAR0 + 16, Width::Dword, BM.into());
    bus.config_write(at, reg::COMMAND, Width::Word, 5);
    Rig { iom, pgm, ide, irq, disk, cd }
}

impl Rig {
    fn out(&self, port: u16, value: u8) {
        self.iom.write(Port(port), Width::Byte, value.into());
    }

    fn inb(&self, port: u16) -> u8 {
        self.iom.read(Port(port), Width::Byte) as u8
    }

    fn status(&self) -> u8 {
        self.inb(0x1f7)
    }

    /// An LBA28 command to the disk.
    fn lba28(&self, command: u8, sector: u32, count: u8) {
        let [low, mid, high, top] = sector.to_le_bytes();
        self.out(0x1f6, 0xe0 | top);
        self.out(0x1f2, count);
        self.out(0x1f3, low);
        self.out(0x1f4, mid);
        self.out(0x1f5, high);
        self.out(0x1f7, command);
    }

    fn words_in(&self, len: usize) -> Vec<u8> {
        let mut out = vec![0xaa; len];
        self.iom.read_string(Port(0x1f0), Width::Word, &mut out);
        out
    }

    fn words_out(&self, data: &[u8]) {
        self.iom.write_string(Port(0x1f0), Width::Word, data);
    }

    /// Sends a packet to the CD drive.
    fn packet(&self, packet: &[u8], limit: u16, dma: bool) {
        self.out(0x1f6, 0x10);
        self.out(0x1f1, dma.into());
        self.out(0x1f4, limit as u8);
        self.out(0x1f5, (limit >> 8) as u8);
        self.out(0x1f7, 0xa0);
        assert_eq!((self.status(), self.inb(0x1f2)), (READY | DRQ, 1), "the drive takes a packet");
        let mut bytes = [0; 12];
        bytes[..packet.len()].copy_from_slice(packet);
        self.words_out(&bytes);
    }

    /// Sends a packet whose answer comes by PIO in one block; returns the answer.
    fn packet_reply(&self, packet: &[u8]) -> Vec<u8> {
        self.packet(packet, 0xfffe, false);
        let status = self.status();
        if status & DRQ == 0 {
            return Vec::new();
        }
        assert_eq!(self.inb(0x1f2), 2);
        let len = usize::from(self.inb(0x1f4)) | usize::from(self.inb(0x1f5)) << 8;
        let mut data = self.words_in(len.next_multiple_of(2));
        data.truncate(len);
        assert_eq!((self.status(), self.inb(0x1f2)), (READY, 3), "the packet command has ended");
        data
    }

    /// Sense key and code of the packet command before; zeros if it went well.
    fn sense(&self) -> (u8, u8) {
        let sense = self.packet_reply(&[3, 0, 0, 0, 18]);
        (sense[2], sense[12])
    }

    fn prd(&self, table: u64, entries: &[(u32, u16, bool)]) {
        for (i, (address, count, last)) in entries.iter().enumerate() {
            let mut entry = [0; 8];
            entry[..4].copy_from_slice(&address.to_le_bytes());
            entry[4..6].copy_from_slice(&count.to_le_bytes());
            entry[7] = u8::from(*last) << 7;
            self.pgm.write(GuestPhys(table + 8 * i as u64), &entry);
        }
        self.iom.write(Port(BM + 4), Width::Dword, table as u32);
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.pgm.read(GuestPhys(at), &mut out);
        out
    }

    fn save(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.ide.lock().save(&mut out);
        out.into_bytes()
    }
}

fn word(data: &[u8], n: usize) -> u16 {
    u16::from_le_bytes([data[2 * n], data[2 * n + 1]])
}

fn text(data: &[u8], word: usize, words: usize) -> String {
    let field = &data[2 * word..2 * (word + words)];
    field.chunks(2).flat_map(|p| [p[1] as char, p[0] as char]).collect()
}

#[test]
fn identify_tells_what_virtualbox_tells() {
    let r = rig();
    r.lba28(0xec, 0, 0);
    assert_eq!(r.status(), READY | DRQ);
    let d = r.words_in(512);
    assert_eq!(r.status(), READY);
    assert_eq!(text(&d, 27, 20).trim_end(), "VBOX HARDDISK");
    assert_eq!(text(&d, 10, 10).trim_end(), "VB12345678-9abcdef0");
    assert_eq!(text(&d, 23, 4).trim_end(), "1.0");
    assert_eq!((word(&d, 60), word(&d, 61), word(&d, 100)), (1000, 0, 1000));
    assert_eq!(word(&d, 83) & 0xc000, 0x4000);
}

#[test]
fn an_absent_drive_reads_zero() {
    let r = rig();
    r.out(0x176, 0xa0);
    r.out(0x172, 0x55);
    assert_eq!((r.inb(0x172), r.inb(0x177), r.inb(0x376)), (0, 0, 0));
}

#[test]
fn both_kinds_leave_their_signature_after_software_reset() {
    let r = rig();
    r.out(0x3f6, 4);
    assert_eq!(r.inb(0x3f6), BSY);
    r.out(0x3f6, 0);
    assert_eq!([r.inb(0x1f1), r.inb(0x1f2), r.inb(0x1f3), r.inb(0x1f4), r.inb(0x1f5)], [1, 1, 1, 0, 0]);
    assert_eq!(r.status(), READY);
    r.out(0x1f6, 0x10);
    assert_eq!([r.inb(0x1f2), r.inb(0x1f3), r.inb(0x1f4), r.inb(0x1f5)], [1, 1, 0x14, 0xeb]);
    assert_eq!(r.status(), 0);
}

#[test]
fn a_pio_read_interrupts_for_each_sector_and_is_busy_until_the_medium_answers() {
    let r = rig();
    r.lba28(0x20, 5, 3);
    assert_eq!(r.status(), BSY);
    assert!(!r.irq.level());
    r.disk.complete_all();
    for n in 5..8 {
        assert!(r.irq.level());
        assert_eq!(r.status(), READY | DRQ);
        assert!(!r.irq.level());
        assert_eq!(r.words_in(512), [n; 512]);
    }
    assert_eq!(r.status(), READY);
    assert_eq!((r.irq.rises(), r.inb(0x1f2), r.inb(0x1f3)), (3, 0, 7));
}

#[test]
fn read_multiple_interrupts_for_each_block() {
    let r = rig();
    r.lba28(0xc4, 0, 1);
    assert_eq!((r.status(), r.inb(0x1f1)), (READY | 1, 4), "aborted before SET MULTIPLE");
    r.lba28(0xc6, 0, 16);
    r.status();
    r.lba28(0xc4, 0, 40);
    let before = r.irq.rises();
    r.disk.complete_all();
    for (first, count) in [(0, 16), (16, 16), (32, 8)] {
        assert_eq!(r.status(), READY | DRQ);
        let data = r.words_in(count * 512);
        assert_eq!((data[0], data[count * 512 - 1]), (first, first + count as u8 - 1));
    }
    assert_eq!(r.status(), READY);
    assert_eq!(r.irq.rises() - before, 3);
}

#[test]
fn a_count_of_zero_is_256_sectors_and_long_reads_come_in_pieces() {
    let r = rig();
    r.lba28(0x20, 100, 0);
    r.disk.complete_all();
    let data = r.words_in(256 * 512);
    assert_eq!((data[0], data[255 * 512]), (100, 99));
    assert_eq!(r.status(), READY);
    // 48 bits: 600 sectors.
    for (port, before, now) in [(0x1f2, 2, 0x58), (0x1f3, 0, 10), (0x1f4, 0, 0), (0x1f5, 0, 0)] {
        r.out(port, before);
        r.out(port, now);
    }
    r.out(0x1f6, 0x40);
    r.out(0x1f7, 0x24);
    let mut sector = 0;
    while sector < 600 {
        r.disk.complete_all();
        assert_eq!(r.status(), READY | DRQ);
        assert_eq!(r.words_in(512), [(10 + sector) as u8; 512]);
        sector += 1;
    }
    assert_eq!(r.status(), READY);
    r.out(0x3f6, 0x80);
    assert_eq!(r.inb(0x1f3), 0);
}

#[test]
fn cylinder_addresses_use_the_translation_that_was_set() {
    let r = rig();
    r.out(0x1f6, 0xa3);
    r.out(0x1f2, 17);
    r.out(0x1f7, 0x91);
    // Cylinder 2, head 1, sector 5 with 4 heads and 17 sectors: (2*4+1)*17+4.
    r.out(0x1f6, 0xa1);
    r.out(0x1f2, 1);
    r.out(0x1f3, 5);
    r.out(0x1f4, 2);
    r.out(0x1f5, 0);
    r.out(0x1f7, 0x20);
    r.disk.complete_all();
    assert_eq!(r.words_in(2), [157, 157]);
}

#[test]
fn a_pio_write_reaches_the_medium_before_the_last_interrupt() {
    let r = rig();
    r.lba28(0x30, 9, 2);
    assert_eq!((r.status(), r.irq.level()), (READY | DRQ, false), "no interrupt for the first block");
    r.words_out(&[0x11; 512]);
    assert_eq!((r.irq.level(), r.status()), (true, READY | DRQ));
    r.words_out(&[0x22; 512]);
    assert_eq!((r.irq.level(), r.status()), (false, BSY));
    r.disk.complete_all();
    assert_eq!((r.irq.level(), r.status()), (true, READY));
    let bytes = r.disk.bytes.lock();
    assert_eq!((bytes[9 * 512], bytes[10 * 512], bytes[11 * 512]), (0x11, 0x22, 11));
}

#[test]
fn addresses_outside_the_disk_and_unknown_commands_are_errors() {
    let r = rig();
    r.lba28(0x20, 999, 2);
    assert_eq!((r.status(), r.inb(0x1f1)), (READY | 1, 0x10));
    r.lba28(0x20, 0x0fff_ffff, 0);
    assert_eq!((r.status(), r.inb(0x1f1)), (READY | 1, 0x10));
    r.lba28(0xb0, 0, 1);
    assert_eq!((r.status(), r.inb(0x1f1)), (READY | 1, 4));
    r.disk.broken.store(true, Ordering::Relaxed);
    r.lba28(0x20, 77, 2);
    r.disk.complete_all();
    assert_eq!((r.status(), r.inb(0x1f1), r.inb(0x1f3)), (READY | 1, 0x40, 77));
    assert_eq!(r.disk.waiting(), 0);
}

#[test]
fn a_read_only_disk_aborts_writes() {
    let medium = MemoryMedium::with(vec![0; 512 * 10], true);
    let pgm = Pgm::new(vec![]);
    let wiring = Wiring { pgm, irqs: Default::default(), ejected: None };
    let identity = DiskIdentity::virtualbox(1, 2);
    let ide = Ide::new(Model::Piix4, wiring, [Some(Drive::Disk { identity, medium }), None, None, None]);
    let iom = Iom::new();
    let bus = PciBus::new(iom.clone(), Pgm::new(vec![]));
    Ide::register(&ide, &iom, &bus, DevFn::new(1, 1));
    iom.write(Port(0x1f6), Width::Byte, 0xe0);
    iom.write(Port(0x1f2), Width::Byte, 1);
    iom.write(Port(0x1f7), Width::Byte, 0x30);
    assert_eq!(iom.read(Port(0x1f7), Width::Byte), 0x51);
}

#[test]
fn a_dma_read_is_scattered_over_the_table() {
    let r = rig();
    r.prd(0x1000, &[(0x2000, 512, false), (0x10_0000, 1024, true)]);
    r.lba28(0xc8, 20, 3);
    r.disk.complete_all();
    assert!(!r.irq.level(), "waits for the bus master");
    r.out(BM, 9);
    assert!(r.irq.level());
    assert_eq!(r.inb(BM + 2), 4);
    assert_eq!(r.status(), READY);
    assert_eq!(r.memory(0x2000, 513), [vec![20; 512], vec![0]].concat());
    assert_eq!(r.memory(0x10_0000, 1024), [vec![21; 512], vec![22; 512]].concat());
    r.out(BM + 2, 4);
    r.out(BM, 0);
    assert_eq!((r.inb(BM + 2), r.irq.rises()), (0, 1));
}

#[test]
fn a_dma_started_before_its_command_completes_with_the_medium() {
    let r = rig();
    r.prd(0x1000, &[(0x2000, 0, true)]);
    r.out(BM, 9);
    assert_eq!(r.inb(BM + 2), 1);
    r.lba28(0xc8, 0, 8);
    assert_eq!(r.status(), BSY);
    r.disk.complete_all();
    // The table was larger than the transfer: the bus master stays active.
    assert_eq!((r.irq.level(), r.inb(BM + 2)), (true, 5));
    assert_eq!(r.memory(0x2000 + 7 * 512, 512), [7; 512]);
}

#[test]
fn a_dma_write_gathers_and_flush_waits_for_the_medium() {
    let r = rig();
    r.pgm.write(GuestPhys(0x2000), &[0x77; 1024]);
    r.prd(0x1000, &[(0x2000, 1022, false), (0x23fe, 2, true)]);
    r.lba28(0xca, 30, 2);
    assert_eq!(r.disk.waiting(), 0);
    r.out(BM, 1);
    assert_eq!((r.disk.waiting(), r.status()), (1, BSY));
    r.disk.complete_all();
    assert_eq!((r.status(), r.inb(BM + 2)), (READY, 4));
    assert_eq!(r.disk.bytes.lock()[30 * 512..32 * 512], [0x77; 1024]);
    r.lba28(0xe7, 0, 0);
    assert_eq!(r.status(), BSY);
    r.disk.complete_all();
    assert_eq!((r.status(), r.disk.flushes.load(Ordering::Relaxed)), (READY, 1));
}

#[test]
fn a_table_that_is_too_short_stops_without_an_interrupt() {
    let r = rig();
    r.prd(0x1000, &[(0x2000, 512, true)]);
    r.lba28(0xc8, 0, 2);
    r.disk.complete_all();
    r.out(BM, 9);
    assert_eq!((r.inb(BM + 2), r.irq.level(), r.status()), (0, false, READY));
}

#[test]
fn a_table_without_an_end_is_not_walked_for_ever() {
    let r = rig();
    // 8192 entries of two bytes; the disk gives more.
    for i in 0..8192u64 {
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&0x8_0000u32.to_le_bytes());
        entry[4] = 2;
        r.pgm.write(GuestPhys(0x1_0000 + 8 * i), &entry);
    }
    r.iom.write(Port(BM + 4), Width::Dword, 0x1_0000);
    r.lba28(0xc8, 0, 0);
    r.disk.complete_all();
    r.out(BM, 9);
    assert_eq!((r.inb(BM + 2), r.status()), (0, READY));
}

#[test]
fn trim_discards_the_ranges() {
    let r = rig();
    let mut list = [0; 512];
    list[..8].copy_from_slice(&(40u64 | 2 << 48).to_le_bytes());
    list[8..16].copy_from_slice(&(50u64 | 1 << 48).to_le_bytes());
    r.pgm.write(GuestPhys(0x2000), &list);
    r.prd(0x1000, &[(0x2000, 512, true)]);
    r.out(0x1f1, 1);
    r.out(0x1f2, 0);
    r.lba28(0x06, 0, 1);
    r.out(BM, 1);
    r.disk.complete_all();
    assert_eq!(r.status(), READY);
    let bytes = r.disk.bytes.lock();
    assert_eq!([39, 40, 41, 42, 50].map(|s: usize| bytes[s * 512]), [39, 0, 0, 42, 0]);
}

#[test]
fn a_reset_drops_the_answer_under_way_and_the_next_request_waits_for_it() {
    let r = rig();
    r.lba28(0x20, 1, 1);
    r.out(0x3f6, 4);
    r.out(0x3f6, 0);
    assert_eq!(r.status(), READY);
    r.lba28(0x20, 2, 1);
    assert_eq!(r.disk.waiting(), 1, "the old request is still under way");
    assert!(r.disk.complete_one());
    assert_eq!(r.status(), BSY);
    r.disk.complete_all();
    assert_eq!(r.words_in(512), [2; 512]);
    r.lba28(0x20, 3, 1);
    r.ide.lock().reset();
    r.disk.complete_all();
    assert_eq!((r.status(), r.irq.level()), (READY, false));
}

#[test]
fn nien_keeps_the_line_low() {
    let r = rig();
    r.out(0x3f6, 2);
    r.lba28(0xec, 0, 0);
    assert!(!r.irq.level());
    r.out(0x3f6, 0);
    assert!(r.irq.level());
}

#[test]
fn the_cd_drive_identifies_itself() {
    let r = rig();
    r.out(0x1f6, 0x10);
    r.out(0x1f7, 0xec);
    assert_eq!((r.status() & 1, r.inb(0x1f1), r.inb(0x1f4), r.inb(0x1f5)), (1, 4, 0x14, 0xeb));
    r.out(0x1f7, 0xa1);
    assert_eq!(r.status(), READY | DRQ);
    let d = r.words_in(512);
    assert_eq!((word(&d, 0), text(&d, 27, 20).trim_end()), (0x85c0, "VBOX CD-ROM"));
    let inquiry = r.packet_reply(&[0x12, 0, 0, 0, 36]);
    assert_eq!(&inquiry[..2], [5, 0x80]);
    assert_eq!(&inquiry[8..], b"VBOX    CD-ROM          1.0 ");
}

#[test]
fn a_packet_read_by_pio_keeps_to_the_byte_count_limit() {
    let r = rig();
    let before = r.irq.rises();
    r.packet(&[0x28, 0, 0, 0, 0, 7, 0, 0, 2], 0x0c00, false);
    r.cd.complete_all();
    let mut data = Vec::new();
    for expected in [0xc00, 0x400] {
        assert_eq!((r.status(), r.inb(0x1f2)), (READY | DRQ, 2));
        let len = usize::from(r.inb(0x1f4)) | usize::from(r.inb(0x1f5)) << 8;
        assert_eq!(len, expected);
        data.extend(r.words_in(len));
    }
    assert_eq!((r.status(), r.inb(0x1f2)), (READY, 3));
    assert_eq!(data, [vec![7; 2048], vec![8; 2048]].concat());
    assert_eq!(r.irq.rises() - before, 3);
}

#[test]
fn a_packet_read_by_dma_takes_one_interrupt() {
    let r = rig();
    let before = r.irq.rises();
    r.prd(0x1000, &[(0x4000, 0x8000, true)]);
    r.packet(&[0xa8, 0, 0, 0, 0, 3, 0, 0, 0, 16], 0, true);
    r.out(BM, 9);
    r.cd.complete_all();
    assert_eq!((r.irq.rises() - before, r.status(), r.inb(BM + 2)), (1, READY, 4));
    assert_eq!(r.memory(0x4000 + 15 * 2048, 2048), [18; 2048]);
}

#[test]
fn capacity_toc_and_configuration_describe_the_disc() {
    let r = rig();
    assert_eq!(r.packet_reply(&[0x25]), [0, 0, 0, 63, 0, 0, 8, 0]);
    let toc = r.packet_reply(&[0x43, 0, 0, 0, 0, 0, 0, 0, 255]);
    assert_eq!(toc, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x16, 0xaa, 0, 0, 0, 0, 64]);
    let toc = r.packet_reply(&[0x43, 2, 0, 0, 0, 0, 0xaa, 0, 255]);
    assert_eq!(toc, [0, 10, 1, 1, 0, 0x16, 0xaa, 0, 0, 0, 2, 64]);
    let sessions = r.packet_reply(&[0x43, 0, 1, 0, 0, 0, 0, 0, 12]);
    assert_eq!(sessions, [0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0]);
    assert_eq!(r.packet_reply(&[0x43, 2, 2, 0, 0, 0, 0, 0, 255]).len(), 48);
    let features = r.packet_reply(&[0x46, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(features[6..8], [0, 8], "profile CD-ROM");
    assert_eq!(features.len(), 4 + usize::from(features[3]));
    let page = r.packet_reply(&[0x5a, 0, 0x2a, 0, 0, 0, 0, 0, 255]);
    assert_eq!((page[1], page[8], page.len()), (28, 0x2a, 30));
    assert_eq!(r.packet_reply(&[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 8]).len(), 8);
    let event = r.packet_reply(&[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8]);
    assert_eq!(event, [0, 6, 4, 0x10, 0, 2, 0, 0]);
    assert_eq!(r.packet_reply(&[0x51, 0, 0, 0, 0, 0, 0, 0, 34])[..3], [0, 32, 0x0e]);
    assert_eq!(r.packet_reply(&[0xad, 0, 0, 0, 0, 0, 0, 0, 0, 20]), []);
    assert_eq!(r.sense(), (5, 0x30));
}

#[test]
fn whole_sectors_carry_sync_and_address() {
    let r = rig();
    r.packet(&[0xbe, 0, 0, 0, 0, 10, 0, 0, 1, 0xf8], 0xfffe, false);
    r.cd.complete_all();
    assert_eq!(r.status(), READY | DRQ);
    let data = r.words_in(2352);
    assert_eq!(data[..16], [0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 2, 0x10, 1]);
    assert_eq!(data[16..2064], [10; 2048]);
}

#[test]
fn bad_packets_leave_sense() {
    let r = rig();
    assert_eq!(r.packet_reply(&[0xff]), []);
    assert_eq!((r.status() & 1, r.inb(0x1f1), r.inb(0x1f2)), (1, 0x54, 3));
    assert_eq!(r.sense(), (5, 0x20));
    assert_eq!(r.sense(), (0, 0), "sense is told once");
    assert_eq!(r.packet_reply(&[0x28, 0, 0, 0, 0, 63, 0, 0, 2]), []);
    assert_eq!(r.sense(), (5, 0x21));
    r.packet(&[0x28, 0, 0, 0, 0, 1, 0, 0, 1], 2048, false);
    r.cd.broken.store(true, Ordering::Relaxed);
    r.cd.complete_all();
    assert_eq!(r.status() & 1, 1);
    assert_eq!(r.sense(), (3, 0x11));
}

#[test]
fn a_changed_disc_is_announced_and_a_locked_one_stays() {
    let r = rig();
    let other = MemoryMedium::numbered(8, 2048);
    r.ide.lock().set_medium(0, 1, None, false).unwrap();
    assert_eq!((r.packet_reply(&[0]), r.sense()), (vec![], (2, 0x3a)));
    assert_eq!(r.packet_reply(&[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8])[4..6], [3, 0]);
    r.ide.lock().set_medium(0, 1, Some(other), false).unwrap();
    assert_eq!((r.packet_reply(&[0]), r.sense()), (vec![], (6, 0x28)));
    assert_eq!((r.packet_reply(&[0]), r.sense()), (vec![], (0, 0)));
    assert_eq!(r.packet_reply(&[0x25])[3], 7);
    r.packet_reply(&[0x1e, 0, 0, 0, 1]);
    assert_eq!(r.ide.lock().set_medium(0, 1, None, false), Err(MediumError::Locked));
    assert_eq!(r.packet_reply(&[0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8])[4..6], [1, 2]);
    assert_eq!((r.packet_reply(&[0x1b, 0, 0, 0, 2]), r.sense()), (vec![], (5, 0x53)));
    r.ide.lock().set_medium(0, 1, None, true).unwrap();
    assert_eq!(r.ide.lock().set_medium(0, 0, None, true), Err(MediumError::NoDrive(0, 0)));
}

#[test]
fn a_guest_that_ejects_lets_go_of_the_disc() {
    let r = rig();
    r.packet_reply(&[0x1b, 0, 0, 0, 2]);
    assert_eq!((r.packet_reply(&[0x25]), r.sense()), (vec![], (2, 0x3a)));
    // Neither the controller nor anything in it holds the medium any more.
    assert_eq!(Arc::strong_count(&r.cd), 1);
}

#[test]
fn string_input_equals_single_reads() {
    let (a, b) = (rig(), rig());
    for r in [&a, &b] {
        r.packet(&[0x28, 0, 0, 0, 0, 1, 0, 0, 3], 1023, false);
        r.cd.complete_all();
    }
    let mut all = vec![0; 6144];
    a.iom.read_string(Port(0x1f0), Width::Word, &mut all);
    let single: Vec<u8> =
        (0..3072).flat_map(|_| (b.iom.read(Port(0x1f0), Width::Word) as u16).to_le_bytes()).collect();
    assert_eq!(all, single);
    assert_eq!(a.status(), b.status());
}

#[test]
fn a_restored_controller_goes_on_where_the_saved_one_stood() {
    let r = rig();
    r.lba28(0x20, 5, 2);
    r.disk.complete_all();
    r.words_in(100);
    let saved = r.save();
    let other = rig();
    other.ide.lock().load(Reader::new("piix3ide", 1, &saved)).unwrap();
    assert_eq!(other.save(), saved);
    assert!(other.irq.level());
    assert_eq!(other.words_in(412), [5; 412]);
    assert_eq!(other.words_in(512), [6; 512]);
    assert_eq!(other.status(), READY);
}

#[test]
fn a_short_packet_answer_that_waits_for_dma_can_be_saved() {
    let r = rig();
    r.packet(&[0x25], 0, true);
    let saved = r.save();
    assert_golden(&saved, include_str!("../golden/piix3ide.v1.hex"));
    let other = rig();
    other.ide.lock().load(Reader::new("piix3ide", 1, &saved)).unwrap();
    other.prd(0x1000, &[(0x2000, 8, true)]);
    other.out(BM, 9);
    assert_eq!(other.memory(0x2000, 8), [0, 0, 0, 63, 0, 0, 8, 0]);
}

#[test]
fn spoilt_states_are_refused_and_change_nothing() {
    let r = rig();
    r.packet(&[0x28, 0, 0, 0, 0, 7, 0, 0, 2], 0x0c00, false);
    r.cd.complete_all();
    let saved = r.save();
    let other = rig();
    let before = other.save();
    for cut in [0, 1, 50, saved.len() - 1] {
        assert!(other.ide.lock().load(Reader::new("piix3ide", 1, &saved[..cut])).is_err());
    }
    assert!(other.ide.lock().load(Reader::new("piix3ide", 2, &saved)).is_err());
    assert_eq!(other.save(), before);
    // Whatever a bit flip makes of it, using the result must not panic.
    for bit in 0..200 * 8 {
        let mut spoilt = saved.clone();
        spoilt[bit / 8] ^= 1 << (bit % 8);
        let victim = rig();
        if victim.ide.lock().load(Reader::new("piix3ide", 1, &spoilt)).is_ok() {
            victim.words_in(5000);
            victim.words_out(&[0; 600]);
            victim.out(BM, 9);
            victim.disk.complete_all();
            victim.cd.complete_all();
        }
    }
}
