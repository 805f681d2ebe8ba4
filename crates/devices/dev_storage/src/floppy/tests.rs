use std::sync::Arc;

use parking_lot::Mutex;
use pdm::dma::{DmaOutcome, IsaDma};
use pdm::iom::Iom;
use pdm::{Device, Width};
use ssm::{Reader, Saveable, Writer};
use vbox_types::Port;

use super::{DriveType, Floppy, FloppyDrive, NoDrive, Wiring};
use crate::testing::{Line, MemoryMedium, assert_golden};

/// A DMA channel over a buffer: so many bytes until terminal count.
#[derive(Default)]
struct Channel(Mutex<(Vec<u8>, usize)>);

impl Channel {
    fn program(&self, data: Vec<u8>) {
        *self.0.lock() = (data, 0);
    }

    fn step(&self, want: usize, mut each: impl FnMut(&mut [u8])) -> DmaOutcome {
        let (memory, pos) = &mut *self.0.lock();
        let bytes = want.min(memory.len() - *pos);
        each(&mut memory[*pos..*pos + bytes]);
        *pos += bytes;
        DmaOutcome { bytes, terminal_count: *pos == memory.len() && bytes > 0 }
    }
}

impl IsaDma for Channel {
    fn write_memory(&self, channel: u8, data: &[u8]) -> DmaOutcome {
        assert_eq!(channel, 2);
        self.step(data.len(), |memory| memory.copy_from_slice(&data[..memory.len()]))
    }

    fn read_memory(&self, channel: u8, data: &mut [u8]) -> DmaOutcome {
        assert_eq!(channel, 2);
        self.step(data.len(), |memory| data[..memory.len()].copy_from_slice(memory))
    }
}

struct Rig {
    iom: Arc<Iom>,
    floppy: Arc<Mutex<Floppy>>,
    medium: Arc<MemoryMedium>,
    dma: Arc<Channel>,
    irq: Arc<Line>,
}

fn rig_with(medium: Arc<MemoryMedium>) -> Rig {
    let iom = Iom::new();
    let dma = Arc::new(Channel::default());
    let (irq, line) = Line::connect();
    let drive = FloppyDrive { drive_type: DriveType::Mb1_44, medium: Some(medium.clone()) };
    let floppy = Floppy::new(Wiring { irq: line, dma: dma.clone() }, [Some(drive), None]);
    Floppy::register(&floppy, &iom);
    let r = Rig { iom, floppy, medium, dma, irq };
    r.out(0x3f7, 0);
    r
}

/// A 1.44 MB medium of numbered sectors.
fn rig() -> Rig {
    rig_with(MemoryMedium::numbered(2880, 512))
}

impl Rig {
    fn out(&self, port: u16, value: u8) {
        self.iom.write(Port(port), Width::Byte, value.into());
    }

    fn inb(&self, port: u16) -> u8 {
        self.iom.read(Port(port), Width::Byte) as u8
    }

    fn command(&self, bytes: &[u8]) {
        for byte in bytes {
            assert_eq!(self.inb(0x3f4) & 0xc0, 0x80, "ready for a command byte");
            self.out(0x3f5, *byte);
        }
        self.medium.complete_all();
    }

    fn result(&self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.inb(0x3f4) & 0xd0 == 0xd0 {
            out.push(self.inb(0x3f5));
        }
        assert_eq!(self.inb(0x3f4), 0x80);
        out
    }

    fn ask(&self, bytes: &[u8]) -> Vec<u8> {
        self.command(bytes);
        self.result()
    }

    fn seek(&self, track: u8) {
        self.command(&[0x0f, 0, track]);
        assert_eq!(self.ask(&[8]), [0x20, track]);
    }

    fn save(&self) -> Vec<u8> {
        let mut out = Writer::new();
        self.floppy.lock().save(&mut out);
        out.into_bytes()
    }

    fn memory(&self) -> Vec<u8> {
        self.dma.0.lock().0.clone()
    }
}

/// The number that fills a sector.
fn number(c: u32, h: u32, s: u32) -> u8 {
    ((c * 2 + h) * 18 + s - 1) as u8
}

#[test]
fn leaving_reset_interrupts_and_tells_of_four_drives() {
    let r = rig();
    r.out(0x3f2, 0x00);
    assert_eq!(r.inb(0x3f4), 0);
    assert!(!r.irq.level());
    r.out(0x3f2, 0x0c);
    assert!(r.irq.level());
    for drive in 0..4 {
        assert_eq!(r.ask(&[8]), [0xc0 | drive, 0]);
        assert!(!r.irq.level());
    }
    assert_eq!(r.ask(&[8]), [0x80]);
}

#[test]
fn linux_finds_a_82078() {
    let r = rig();
    assert_eq!(r.ask(&[0x0e]).len(), 10);
    assert_eq!(r.ask(&[0x13, 0, 0x1a, 0]), []);
    assert_eq!(r.ask(&[0x12, 0]), []);
    assert_eq!(r.ask(&[0x14]), [0]);
    assert_eq!(r.ask(&[0x94]), [0x10]);
    assert_eq!(r.ask(&[0x18])[0] >> 5, 2);
    assert_eq!(r.ask(&[0x10]), [0x90]);
    assert_eq!(r.ask(&[0x2e]).len(), 16);
    assert_eq!(r.ask(&[0x1f]), [0x80]);
}

#[test]
fn recalibrate_and_seek_are_reported_by_sense_interrupt() {
    let r = rig();
    r.seek(40);
    assert_eq!(r.ask(&[4, 0]), [0x28]);
    r.command(&[7, 0]);
    assert!(r.irq.level());
    assert_eq!(r.ask(&[8]), [0x20, 0]);
    assert_eq!(r.ask(&[4, 4]), [0x3c]);
    // No drive: no track 0 signal.
    r.command(&[7, 1]);
    assert_eq!(r.ask(&[8]), [0x71, 0]);
}

#[test]
fn a_dma_read_ends_at_terminal_count_and_tells_the_next_sector() {
    let r = rig();
    r.seek(3);
    r.dma.program(vec![0; 1024]);
    let result = r.ask(&[0xe6, 4, 3, 1, 17, 2, 18, 0x1b, 0xff]);
    // Head 1's last sector was read with multi-track: the next is on the next cylinder.
    assert_eq!(result, [0x00, 0, 0, 4, 0, 1, 2]);
    let memory = r.memory();
    assert_eq!((memory[0], memory[1023]), (number(3, 1, 17), number(3, 1, 18)));
    assert!(!r.irq.level());
}

#[test]
fn multi_track_goes_on_with_head_1() {
    let r = rig();
    r.dma.program(vec![0; 36 * 512]);
    let result = r.ask(&[0xe6, 0, 0, 0, 1, 2, 18, 0x1b, 0xff]);
    assert_eq!(result, [0, 0, 0, 1, 0, 1, 2]);
    let memory = r.memory();
    assert!((0..36).all(|s| memory[s * 512] == s as u8));
}

#[test]
fn without_terminal_count_the_end_of_the_cylinder_is_an_error() {
    let r = rig();
    r.dma.program(vec![0; 36 * 512]);
    let result = r.ask(&[0x46, 0, 0, 0, 18, 2, 18, 0x1b, 0xff]);
    assert_eq!(result, [0x40, 0x80, 0, 1, 0, 1, 2]);
}

#[test]
fn a_masked_channel_is_an_overrun() {
    let r = rig();
    r.dma.program(vec![]);
    assert_eq!(r.ask(&[0x46, 0, 0, 0, 1, 2, 18, 0x1b, 0xff])[..2], [0x40, 0x10]);
}

#[test]
fn a_dma_write_changes_only_what_was_given() {
    let r = rig();
    r.seek(1);
    r.dma.program(vec![0xaa; 700]);
    let result = r.ask(&[0xc5, 0, 1, 0, 5, 2, 18, 0x1b, 0xff]);
    assert_eq!(result, [0, 0, 0, 1, 0, 7, 2]);
    let bytes = r.medium.bytes.lock();
    let at = (36 + 4) * 512;
    assert_eq!(bytes[at..at + 700], [0xaa; 700]);
    assert_eq!(bytes[at + 700..at + 1024], [0; 324]);
    assert_eq!(bytes[at + 1024], number(1, 0, 7));
}

#[test]
fn programmed_io_moves_a_track_and_ends_at_its_end() {
    let r = rig();
    r.command(&[3, 0xdf, 3]);
    r.command(&[0x46, 0, 0, 0, 17, 2, 18, 0x1b, 0xff]);
    assert!(r.irq.level());
    let mut data = Vec::new();
    while r.inb(0x3f4) & 0x20 != 0 {
        assert_eq!(r.inb(0x3f4), 0xf0);
        data.push(r.inb(0x3f5));
    }
    assert_eq!(data, [vec![16; 512], vec![17; 512]].concat());
    assert_eq!(r.result(), [0x40, 0x80, 0, 1, 0, 1, 2]);
    r.command(&[0x45, 0, 0, 0, 18, 2, 18, 0x1b, 0xff]);
    for _ in 0..512 {
        assert_eq!(r.inb(0x3f4), 0xb0);
        r.out(0x3f5, 0x99);
    }
    r.medium.complete_all();
    assert_eq!(r.result()[..2], [0x40, 0x80]);
    assert_eq!(r.medium.bytes.lock()[17 * 512..18 * 512], [0x99; 512]);
}

#[test]
fn format_fills_the_track() {
    let r = rig();
    r.seek(2);
    r.dma.program(vec![0; 18 * 4]);
    let result = r.ask(&[0x4d, 4, 2, 18, 0x50, 0xf6]);
    assert_eq!(result[..3], [4, 0, 0]);
    let bytes = r.medium.bytes.lock();
    let at = (2 * 36 + 18) * 512;
    assert!(bytes[at..at + 18 * 512].iter().all(|&b| b == 0xf6));
    assert_eq!((bytes[at - 1], bytes[at + 18 * 512]), (number(2, 0, 18), number(3, 0, 1)));
}

#[test]
fn the_wrong_rate_finds_no_address_mark() {
    let r = rig_with(MemoryMedium::numbered(1440, 512));
    assert_eq!(r.ask(&[0x4a, 0])[..2], [0x40, 1]);
    r.out(0x3f7, 2);
    assert_eq!(r.ask(&[0x4a, 0]), [0, 0, 0, 0, 0, 1, 2]);
    r.dma.program(vec![0; 512]);
    // This medium has nine sectors on a track.
    assert_eq!(r.ask(&[0x46, 0, 0, 0, 10, 2, 18, 0x1b, 0xff])[..2], [0x40, 4]);
}

#[test]
fn transfers_need_the_right_cylinder_unless_seeks_are_implied() {
    let r = rig();
    r.dma.program(vec![0; 512]);
    let read = [0x46, 0, 7, 0, 1, 2, 18, 0x1b, 0xff];
    assert_eq!(r.ask(&read)[..3], [0x40, 4, 0x10]);
    r.command(&[0x13, 0, 0x50, 0]);
    assert_eq!(r.ask(&read)[..3], [0, 0, 0]);
    assert_eq!(r.memory()[0], number(7, 0, 1));
    assert_eq!(r.ask(&[0x46, 0, 80, 0, 1, 2, 18, 0x1b, 0xff])[..2], [0x40, 4]);
}

#[test]
fn a_write_protected_medium_refuses() {
    let r = rig_with(MemoryMedium::with(vec![0; 1_474_560], true));
    assert_eq!(r.ask(&[4, 0]), [0x78]);
    r.dma.program(vec![0; 512]);
    assert_eq!(r.ask(&[0x45, 0, 0, 0, 1, 2, 18, 0x1b, 0xff])[..2], [0x40, 2]);
}

#[test]
fn verify_ends_well_after_its_sectors() {
    let r = rig();
    assert_eq!(r.ask(&[0x56, 0x80, 0, 0, 1, 2, 18, 0x1b, 5]), [0, 0, 0, 0, 0, 6, 2]);
    assert_eq!(r.ask(&[0x56, 0, 0, 0, 1, 2, 18, 0x1b, 0xff])[..3], [0, 0, 0]);
}

#[test]
fn the_change_line_falls_with_the_next_step() {
    let r = rig();
    r.out(0x3f2, 0x1c);
    assert_eq!(r.inb(0x3f7), 0x80);
    r.seek(1);
    assert_eq!(r.inb(0x3f7), 0);
    r.floppy.lock().set_medium(0, None).unwrap();
    r.seek(2);
    assert_eq!(r.inb(0x3f7), 0x80);
    r.dma.program(vec![0; 512]);
    assert_eq!(r.ask(&[0x46, 0, 2, 0, 1, 2, 18, 0x1b, 0xff])[..2], [0x40, 1]);
    r.floppy.lock().set_medium(0, Some(r.medium.clone())).unwrap();
    assert_eq!(r.inb(0x3f7), 0x80);
    r.seek(0);
    assert_eq!(r.inb(0x3f7), 0);
    assert_eq!(r.floppy.lock().set_medium(1, None), Err(NoDrive(1)));
}

#[test]
fn a_medium_that_fails_is_a_data_error_and_a_reset_drops_answers() {
    let r = rig();
    for byte in [0x46, 0, 0, 0, 1, 2, 18, 0x1b, 0xff] {
        r.out(0x3f5, byte);
    }
    assert_eq!(r.inb(0x3f4), 0x10);
    r.floppy.lock().reset();
    r.medium.complete_all();
    assert_eq!((r.inb(0x3f4), r.irq.level()), (0x80, false));
    r.out(0x3f7, 0);
    r.medium.broken.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(r.ask(&[0x46, 0, 0, 0, 1, 2, 18, 0x1b, 0xff])[..3], [0x40, 0x20, 0x20]);
}

#[test]
fn a_restored_controller_goes_on_where_the_saved_one_stood() {
    let r = rig();
    r.command(&[3, 0xdf, 3]);
    r.command(&[0x46, 0, 0, 0, 18, 2, 18, 0x1b, 0xff]);
    for _ in 0..100 {
        r.inb(0x3f5);
    }
    let saved = r.save();
    let other = rig();
    other.floppy.lock().load(Reader::new("i82078", 1, &saved)).unwrap();
    assert_eq!(other.save(), saved);
    for _ in 100..512 {
        assert_eq!(other.inb(0x3f5), 17);
    }
    assert_eq!(other.result().len(), 7);
    for bit in 0..saved.len().min(120) * 8 {
        let mut spoilt = saved.clone();
        spoilt[bit / 8] ^= 1 << (bit % 8);
        let victim = rig();
        if victim.floppy.lock().load(Reader::new("i82078", 1, &spoilt)).is_ok() {
            for _ in 0..600 {
                victim.inb(0x3f5);
                victim.out(0x3f5, 0);
                victim.medium.complete_all();
            }
        }
    }
}

#[test]
fn the_saved_state_keeps_its_format() {
    let r = rig();
    r.seek(7);
    r.command(&[0x4a, 4]);
    let saved = r.save();
    assert_golden(&saved, include_str!("../golden/i82078.v1.hex"));
    let other = rig();
    other.floppy.lock().load(Reader::new("i82078", 1, &saved)).unwrap();
    assert_eq!(other.result(), [4, 0, 0, 7, 1, 1, 2]);
}

#[test]
fn every_command_byte_is_taken_without_harm() {
    for first in 0..=255u8 {
        for fill in [0, 1, 2, 0x7f, 0xff] {
            let r = rig();
            r.dma.program(vec![0; 5000]);
            r.out(0x3f5, first);
            for _ in 0..40 {
                r.out(0x3f5, fill);
                r.medium.complete_all();
                r.inb(0x3f5);
            }
        }
    }
}
