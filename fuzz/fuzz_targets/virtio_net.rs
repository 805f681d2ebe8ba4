//! The virtio network card: whatever a guest does to its registers, queues and control commands, and whatever comes from the
//! network, it neither panics nor hangs; its state survives saving at any moment.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dev_net::virtio::{Card, VirtioNet};
use dev_virtio_core::Wiring;
use fuzz::{FuzzWire, Input, fuzz_memory, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, MmioDevice, PortIo, Width};
use pgm::Pgm;
use vbox_types::{ByteSize, GuestPhys, Port};

/// Where the queues' tables and rings lie.
const QUEUES: u64 = 0x1000;

fn card(pgm: &Arc<Pgm>) -> Arc<Mutex<Card>> {
    VirtioNet::create([8, 0, 0x27, 1, 2, 3], true, Wiring { pgm: pgm.clone(), irq: Default::default() })
}

/// Goes the way of a driver of virtio 1.0 up to DRIVER_OK.
fn start(card: &Mutex<Card>, features: u64) {
    let mut card = card.lock();
    let mut write = |at: u64, data: &[u8]| card.mmio_write(0, at, data);
    write(20, &[0]);
    write(20, &[3]);
    for half in 0..2u32 {
        write(8, &half.to_le_bytes());
        write(12, &((features | 1 << 32) >> (32 * half)).to_le_bytes()[..4]);
    }
    write(20, &[11]);
    for queue in 0..3u16 {
        let base = QUEUES + 0x2000 * u64::from(queue);
        write(22, &queue.to_le_bytes());
        write(24, &16u16.to_le_bytes());
        write(32, &base.to_le_bytes());
        write(40, &(base + 0x800).to_le_bytes());
        write(48, &(base + 0x1000).to_le_bytes());
        write(28, &[1, 0]);
    }
    write(20, &[15]);
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let pgm = fuzz_memory(ByteSize(1 << 16));
    let net = card(&pgm);
    let wire = Arc::new(FuzzWire::default());
    VirtioNet::connect(&net, Some(wire.clone()));
    let port = VirtioNet::port(&net);
    while !input.is_empty() {
        let op = input.byte();
        match op & 7 {
            0 => {
                let features = u64::from(input.word()) | u64::from(input.word()) << 16;
                start(&net, features);
            }
            // A descriptor of a queue, and a chain that begins with it.
            1 => {
                let queue = u64::from(op >> 3) % 3;
                let base = QUEUES + 0x2000 * queue;
                let head = input.byte() & 15;
                let mut descriptor = u64::from(input.word()).to_le_bytes().to_vec();
                descriptor.extend(u32::from(input.word() & 0x7ff).to_le_bytes());
                descriptor.extend(u16::from(input.byte() & 7).to_le_bytes());
                descriptor.extend(u16::from(input.byte() & 31).to_le_bytes());
                pgm.write(GuestPhys(base + 16 * u64::from(head)), &descriptor);
                let mut index = [0; 2];
                pgm.read(GuestPhys(base + 0x802), &mut index);
                let index = u16::from_le_bytes(index);
                pgm.write(GuestPhys(base + 0x804 + 2 * u64::from(index & 15)), &[head, 0]);
                pgm.write(GuestPhys(base + 0x802), &index.wrapping_add(1).to_le_bytes());
                if op & 0x80 != 0 {
                    net.lock().mmio_write(0, 0x3000 + 4 * queue, &[0, 0]);
                }
            }
            2 => {
                let at = u64::from(input.word() & 0x3fff);
                let len = [1, 2, 4, 8][usize::from(op >> 3 & 3)];
                net.lock().mmio_write(0, at, &u64::from(input.word()).to_le_bytes()[..len]);
            }
            3 => {
                let width = [Width::Byte, Width::Word, Width::Dword][usize::from(op >> 3) % 3];
                let at = Port(u16::from(input.byte() & 63));
                match op & 0x80 {
                    0 => drop(net.lock().port_read(at, width)),
                    _ => net.lock().port_write(at, width, input.word().into()),
                }
                net.lock().mmio_read(0, u64::from(input.word() & 0x3fff), &mut [0; 4]);
            }
            4 => {
                let at = u64::from(input.word());
                pgm.write(GuestPhys(at), input.bytes(32));
            }
            5 => {
                let len = usize::from(input.word() % 5000);
                let mut frame = input.bytes(48).to_vec();
                frame.resize(len, 0x5a);
                port.receive(&frame);
            }
            _ => match op >> 3 & 7 {
                0 => net.lock().reset(),
                1 => wire.full.store(input.byte() & 1 != 0, Ordering::Relaxed),
                2 => port.set_link(input.byte() & 1 != 0),
                3 => port.ready(),
                _ => save_and_restore(&mut *net.lock(), &mut *card(&pgm).lock()),
            },
        }
    }
});
