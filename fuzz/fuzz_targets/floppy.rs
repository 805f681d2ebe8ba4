//! The floppy controller: whatever a guest does to its ports and its DMA channel, it neither panics nor hangs; its state
//! survives saving at any moment without requests under way.
#![no_main]

use std::sync::Arc;

use dev_storage::floppy::{DriveType, Floppy, FloppyDrive, Wiring};
use fuzz::{FuzzMedium, Input, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::dma::{DmaOutcome, IsaDma};
use pdm::{Device, Iom, Width};
use vbox_types::Port;

/// A channel that moves so many bytes until terminal count.
#[derive(Default)]
struct Channel(Mutex<usize>);

impl Channel {
    fn step(&self, want: usize) -> DmaOutcome {
        let mut left = self.0.lock();
        let bytes = want.min(*left);
        *left -= bytes;
        DmaOutcome { bytes, terminal_count: *left == 0 && bytes > 0 }
    }
}

impl IsaDma for Channel {
    fn write_memory(&self, _channel: u8, data: &[u8]) -> DmaOutcome {
        self.step(data.len())
    }

    fn read_memory(&self, _channel: u8, data: &mut [u8]) -> DmaOutcome {
        data.fill(0x77);
        self.step(data.len())
    }
}

fn controller(dma: &Arc<Channel>, medium: &Arc<FuzzMedium>) -> Arc<Mutex<Floppy>> {
    let drive = FloppyDrive { drive_type: DriveType::Mb2_88, medium: Some(medium.clone()) };
    let wiring = Wiring { irq: Default::default(), dma: dma.clone() };
    Floppy::new(wiring, [Some(drive), None])
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let size = [163_840, 368_640, 737_280, 1_228_800, 1_474_560, 2_949_120, 100_000, 5_000_000];
    let medium = FuzzMedium::new(size[usize::from(input.byte() % 8)], input.byte() % 8 == 0);
    let dma = Arc::new(Channel::default());
    let floppy = controller(&dma, &medium);
    let iom = Iom::new();
    Floppy::register(&floppy, &iom);
    let out = |port: u16, value: u8| iom.write(Port(port), Width::Byte, value.into());
    while !input.is_empty() {
        match input.byte() % 9 {
            0 => out(0x3f0 + u16::from(input.byte() % 8), input.byte()),
            1 => {
                iom.read(Port(0x3f0 + u16::from(input.byte() % 8)), Width::Byte);
            }
            // A command in one piece.
            2 | 3 => {
                let len = usize::from(input.byte() % 10);
                for byte in input.bytes(len) {
                    out(0x3f5, *byte);
                }
            }
            4 => {
                medium.complete_one(input.byte() % 8 == 0);
            }
            5 => *dma.0.lock() = input.word().into(),
            6 => {
                for _ in 0..input.word() {
                    iom.read(Port(0x3f5), Width::Byte);
                }
            }
            7 => {
                let value = input.byte();
                for _ in 0..input.word() {
                    out(0x3f5, value);
                }
            }
            _ => match input.byte() % 4 {
                0 => floppy.lock().reset(),
                1 => {
                    let other = (input.byte() & 1 != 0).then(|| FuzzMedium::new(737_280, false) as _);
                    floppy.lock().set_medium(0, other).unwrap();
                }
                _ => {
                    medium.complete_all();
                    let mut floppy = floppy.lock();
                    if floppy.is_idle() {
                        save_and_restore(&mut *floppy, &mut *controller(&dma, &medium).lock());
                    }
                }
            },
        }
    }
    medium.complete_all();
});
