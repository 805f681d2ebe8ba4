//! The IDE controller on a real image with its threads: a small driver does what an operating system's does, waiting for
//! interrupts, and what it wrote must come back, also after the image was closed and opened by others.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use dev_storage::ide::{DiskIdentity, Drive, Ide, Model, Wiring};
use parking_lot::{Condvar, Mutex};
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp};
use pdm::irq::{IrqPin, IrqSink};
use pdm::pci::{DevFn, PciBus, reg};
use pdm::{Iom, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys, Port};
use vd::{CreateOptions, Format, Image, Op, OpenMode, Queue, Variant};

const BM: u16 = 0xc000;
const TABLE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;

struct OnQueue(Queue);

impl BlockDriver for OnQueue {
    fn size(&self) -> ByteSize {
        self.0.image().size()
    }

    fn is_read_only(&self) -> bool {
        self.0.image().is_read_only()
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        let op = match op {
            BlockOp::Read { offset, buffer } => Op::Read { offset, buffer },
            BlockOp::Write { offset, buffer } => Op::Write { offset, buffer },
            BlockOp::Flush => Op::Flush,
            BlockOp::Discard { offset, len } => Op::Discard { offset, len },
        };
        let failed = |e: vd::Error| BlockError::Io(std::io::Error::other(e.to_string()));
        self.0.submit(op, Box::new(move |result| done(result.map_err(failed))));
    }
}

/// Lets the driver sleep until the line rises.
#[derive(Default)]
struct Line {
    rises: Mutex<u32>,
    rose: Condvar,
}

impl IrqSink for Line {
    fn set_level(&self, _pin: u32, level: bool) {
        if level {
            *self.rises.lock() += 1;
            self.rose.notify_all();
        }
    }
}

struct Driver {
    iom: Arc<Iom>,
    pgm: Arc<Pgm>,
    line: Arc<Line>,
    seen: u32,
}

impl Driver {
    fn out(&self, port: u16, value: u8) {
        self.iom.write(Port(port), Width::Byte, value.into());
    }

    /// Sleeps until the next interrupt; returns the status, which must be without errors.
    fn wait(&mut self) -> u8 {
        let mut rises = self.line.rises.lock();
        while *rises == self.seen {
            let timed_out = self.line.rose.wait_for(&mut rises, Duration::from_secs(20)).timed_out();
            assert!(!timed_out, "no interrupt");
        }
        self.seen += 1;
        drop(rises);
        let status = self.iom.read(Port(0x1f7), Width::Byte) as u8;
        assert_eq!(status & 0xa1, 0, "busy, fault or error: {status:#x}");
        status
    }

    /// A command with a 48-bit address.
    fn command(&self, command: u8, sector: u64, count: u16) {
        let s = sector.to_le_bytes();
        let c = count.to_le_bytes();
        let writes = [(2, c[1]), (2, c[0]), (3, s[3]), (4, s[4]), (5, s[5]), (3, s[0]), (4, s[1]), (5, s[2])];
        self.out(0x1f6, 0xe0);
        for (register, value) in writes {
            self.out(0x1f0 + register, value);
        }
        self.out(0x1f7, command);
    }

    fn dma(&mut self, write: bool, sector: u64, count: u16) {
        // Pieces of at most 64 KiB, none across a 64 KiB boundary.
        let len = u64::from(count) * 512;
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(0x1_0000);
            let mut entry = [0; 8];
            entry[..4].copy_from_slice(&((DATA + at) as u32).to_le_bytes());
            entry[4..6].copy_from_slice(&(piece as u16).to_le_bytes());
            at += piece;
            entry[7] = if at == len { 0x80 } else { 0 };
            self.pgm.write(GuestPhys(TABLE + (at - piece) / 0x1_0000 * 8), &entry);
        }
        self.iom.write(Port(BM + 4), Width::Dword, TABLE as u32);
        self.out(BM + 2, 6);
        self.command(if write { 0x35 } else { 0x25 }, sector, count);
        self.out(BM, if write { 1 } else { 9 });
        self.wait();
        assert_eq!(self.iom.read(Port(BM + 2), Width::Byte) & 7, 4);
        self.out(BM, 0);
    }

    fn pio_read(&mut self, sector: u64, count: u16) -> Vec<u8> {
        self.command(0x24, sector, count);
        let mut data = vec![0; usize::from(count) * 512];
        for block in data.chunks_mut(512) {
            assert_eq!(self.wait() & 8, 8);
            self.iom.read_string(Port(0x1f0), Width::Dword, block);
        }
        data
    }

    fn pio_write(&mut self, sector: u64, data: &[u8]) {
        self.command(0x34, sector, (data.len() / 512) as u16);
        for block in data.chunks(512) {
            self.iom.write_string(Port(0x1f0), Width::Dword, block);
            self.wait();
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

struct File(PathBuf);

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn run(format: Format) {
    let name = format!("ide-on-{}-{}", format.name(), std::process::id());
    let file = File(std::env::temp_dir().join(name));
    let size = 24 << 20;
    let options = CreateOptions {
        format,
        variant: Variant::Dynamic,
        size: ByteSize(size),
        uuid: None,
        comment: String::new(),
    };
    vd::create(&file.0, &options).unwrap();

    let mut model = vec![0; size as usize];
    let mut random = Random(42);
    for _session in 0..2 {
        let image = Image::open(&file.0, OpenMode::ReadWrite, format).unwrap();
        let medium = Arc::new(OnQueue(Queue::new(image, 3).unwrap()));
        let iom = Iom::new();
        let pgm = Pgm::new(vec![]);
        let ram = Arc::new(HostMemory::new("ram", ByteSize::mib(4)).unwrap());
        pgm.map(GuestPhys(0), 4 << 20, Layer::Ram, Backing::ram(ram, 0));
        let bus = PciBus::new(iom.clone(), pgm.clone());
        let line = Arc::new(Line::default());
        let irq = IrqPin::new(line.clone(), 14).line();
        let wiring = Wiring { pgm: pgm.clone(), irqs: [irq, Default::default()], ejected: None };
        let disk = Drive::Disk { identity: DiskIdentity::virtualbox(1, 2), medium: medium.clone() };
        let ide = Ide::new(Model::Piix4, wiring, [Some(disk), None, None, None]);
        Ide::register(&ide, &iom, &bus, DevFn::new(1, 1));
        bus.config_write(DevFn::new(1, 1), reg::BAR0 + 16, Width::Dword, BM.into());
        bus.config_write(DevFn::new(1, 1), reg::COMMAND, Width::Word, 5);
        let mut driver = Driver { iom, pgm, line, seen: 0 };

        for _ in 0..300 {
            let sector = random.below(size / 512);
            let count = ((1 + random.below(4000)) >> random.below(8)).clamp(1, size / 512 - sector);
            let range = (sector * 512) as usize..((sector + count) * 512) as usize;
            match random.below(10) {
                0..=3 => {
                    model[range.clone()].fill(random.below(256) as u8);
                    driver.pgm.write(GuestPhys(DATA), &model[range]);
                    driver.dma(true, sector, count as u16);
                }
                4..=6 => {
                    driver.dma(false, sector, count as u16);
                    let mut data = vec![0; range.len()];
                    driver.pgm.read(GuestPhys(DATA), &mut data);
                    assert!(data == model[range], "{format}: DMA read of {count} at {sector}");
                }
                7 => {
                    let data = driver.pio_read(sector, count.min(64) as u16);
                    assert!(data == model[range][..data.len()], "{format}: PIO read at {sector}");
                }
                8 => {
                    let len = range.len().min(64 * 512);
                    let range = range.start..range.start + len;
                    model[range.clone()].fill(random.below(256) as u8);
                    driver.pio_write(sector, &model[range]);
                }
                _ => {
                    driver.command(0xea, 0, 0);
                    driver.wait();
                }
            }
        }
        assert!(ide.lock().is_idle());
    }

    let image = Image::open(&file.0, OpenMode::ReadOnly, format).unwrap();
    let mut all = vec![1; size as usize];
    image.read(0, &mut all).unwrap();
    assert!(all == model, "{format}: the image differs from what was written");
    match Command::new("qemu-img").args(["check", "-f", &format.name().to_lowercase()]).arg(&file.0).output()
    {
        Ok(out) => assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout)),
        Err(error) => eprintln!("SKIPPED: qemu-img cannot run ({error}); install the package qemu-utils"),
    }
}

#[test]
fn a_driver_gets_back_from_a_vdi_what_it_wrote() {
    run(Format::Vdi);
}

#[test]
fn a_driver_gets_back_from_a_vmdk_what_it_wrote() {
    run(Format::Vmdk);
}
