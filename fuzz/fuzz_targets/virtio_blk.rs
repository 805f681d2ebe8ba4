//! The virtio disk: whatever a guest does to its registers and queues, and in whatever order requests complete or fail, it neither panics nor
//! hangs; its state survives saving at any moment without requests under way.
#![no_main]

use std::sync::Arc;

use dev_storage::virtio_blk::{Card, Disk, VirtioBlk};
use dev_virtio_core::Wiring;
use fuzz::{FuzzMedium, Input, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, MmioDevice, PortIo, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys, Port};

const RAM: u64 = 1 << 20;
/// Queue N: 0x4000 bytes from here on, for descriptors, available ring and used ring.
const QUEUES: u64 = 0x1_0000;

fn card(pgm: &Arc<Pgm>, medium: &Arc<FuzzMedium>) -> Arc<Mutex<Card>> {
    let disk = Disk { medium: medium.clone(), serial: "VB".into(), discard: true };
    VirtioBlk::create(disk, Wiring { pgm: pgm.clone(), irq: Default::default() })
}

fn start(card: &Mutex<Card>, features: u32) {
    let mut card = card.lock();
    let mut write = |at: u64, data: &[u8]| card.mmio_write(0, at, data);
    write(20, &[0]);
    write(20, &[3]);
    for (half, value) in [(0u32, features), (1, 1)] {
        write(8, &half.to_le_bytes());
        write(12, &value.to_le_bytes());
    }
    write(20, &[11]);
    for queue in 0..4u16 {
        write(22, &queue.to_le_bytes());
        let base = QUEUES + 0x4000 * u64::from(queue);
        for (at, value) in [(32, base), (40, base + 0x2000), (48, base + 0x3000)] {
            write(at, &value.to_le_bytes());
        }
        write(28, &[1, 0]);
    }
    write(20, &[15]);
}

fuzz_target!(|bytes: &[u8]| {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    let mut input = Input(bytes);
    let medium = FuzzMedium::new(3000 * 512, input.byte() & 7 == 7);
    let blk = card(&pgm, &medium);
    start(&blk, u32::from(input.word()));
    let mut given = [0u16; 4];

    while !input.is_empty() {
        match input.byte() % 8 {
            // A request: header, descriptors, available ring, notification.
            0..=3 => {
                let queue = usize::from(input.byte() % 4);
                let base = QUEUES + 0x4000 * queue as u64;
                let first = input.byte() % 32;
                let mut header = [0; 16];
                header[0] = input.byte() % 16;
                header[8..10].copy_from_slice(&(input.word() % 4096).to_le_bytes());
                pgm.write(GuestPhys(0x8000 + 16 * u64::from(first)), &header);
                let count = input.byte() % 6 + 1;
                for i in 0..count {
                    let (at, len) = match i {
                        0 => (0x8000 + 16 * u64::from(first), 16),
                        _ => (u64::from(input.word()), u32::from(input.word()) << (input.byte() % 4)),
                    };
                    let len = if i + 1 == count { 1 } else { len };
                    let flags =
                        u8::from(i + 1 < count) | input.byte() & 2 | if input.byte() == 9 { 4 } else { 0 };
                    let mut raw = at.to_le_bytes().to_vec();
                    raw.extend_from_slice(&len.to_le_bytes());
                    raw.extend_from_slice(&[flags, 0, first + i + 1, 0]);
                    pgm.write(GuestPhys(base + 16 * u64::from(first + i)), &raw);
                }
                let at = base + 0x2004 + 2 * u64::from(given[queue] % 256);
                pgm.write(GuestPhys(at), &u16::from(first).to_le_bytes());
                given[queue] = given[queue].wrapping_add(1);
                pgm.write(GuestPhys(base + 0x2002), &given[queue].to_le_bytes());
                blk.lock().mmio_write(0, 0x3000 + 4 * queue as u64, &[0, 0]);
            }
            // Any register, in any width, both ways.
            4 => {
                let place = u64::from(input.word()) & 0x3fff;
                let place = if input.byte() & 1 == 0 { place % 0x40 } else { place };
                let len = usize::from(input.byte() % 8) + 1;
                let data = input.bytes(len);
                blk.lock().mmio_write(0, place, data);
                let mut data = [0; 8];
                blk.lock().mmio_read(0, place, &mut data[..len]);
            }
            5 => {
                let port = Port(0xc000 + u16::from(input.byte() % 64));
                let width = [Width::Byte, Width::Word, Width::Dword][usize::from(input.byte() % 3)];
                let value = u32::from(input.word());
                blk.lock().port_write(port, width, value & width.ones());
                blk.lock().port_read(port, width);
            }
            6 => {
                medium.complete_one(input.byte() % 8 == 0);
            }
            _ => match input.byte() % 4 {
                0 => blk.lock().reset(),
                1 => {
                    medium.complete_all();
                    pgm.write(GuestPhys(QUEUES), &[0; 0x1_0000]);
                    given = [0; 4];
                    start(&blk, u32::from(input.word()));
                }
                _ => {
                    medium.complete_all();
                    let mut blk = blk.lock();
                    if blk.device.is_idle() {
                        let fresh = card(&pgm, &medium);
                        save_and_restore(&mut *blk, &mut *fresh.lock());
                    }
                }
            },
        }
    }
    medium.complete_all();
});
