//! The E1000: whatever a guest does to its registers and rings, and whatever comes from the network, it neither panics nor hangs;
//! its state survives saving at any moment.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dev_net::e1000::{E1000, Model, Wiring};
use fuzz::{FuzzWire, Input, fuzz_memory, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, MmioDevice};
use pgm::Pgm;
use tm::{Clock, TimerQueue};
use vbox_types::{ByteSize, GuestPhys};

/// Registers that matter most.
const REGISTERS: [u32; 32] = [
    0x0, 0x10, 0x14, 0x20, 0xc0, 0xc4, 0xc8, 0xd0, 0xd8, 0x100, 0x400, 0x2800, 0x2804, 0x2808, 0x2810,
    0x2818, 0x3800, 0x3804, 0x3808, 0x3810, 0x3818, 0x5000, 0x5200, 0x5400, 0x5404, 0x5600, 0x38, 0x4074,
    0x4080, 0x40c0, 0x8, 0x5820,
];

fn card(pgm: &Arc<Pgm>, timers: &Arc<TimerQueue>, model: Model) -> Arc<Mutex<E1000>> {
    let wiring = Wiring { pgm: pgm.clone(), irq: Default::default() };
    E1000::new(model, [8, 0, 0x27, 1, 2, 3], true, wiring, timers)
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let pgm = fuzz_memory(ByteSize(1 << 16));
    let timers = TimerQueue::new(Clock::manual());
    let model = if input.byte() & 1 == 0 { Model::I82540Em } else { Model::I82543Gc };
    let e1000 = card(&pgm, &timers, model);
    let wire = Arc::new(FuzzWire::default());
    e1000.lock().connect(Some(wire.clone()));
    let port = E1000::port(&e1000);
    while !input.is_empty() {
        let op = input.byte();
        let register = u64::from(REGISTERS[usize::from(op >> 3)]);
        match op & 7 {
            0 | 1 => {
                let value = u32::from(input.word()) | u32::from(input.word()) << 16;
                e1000.lock().mmio_write(0, register, &value.to_le_bytes());
            }
            2 => e1000.lock().mmio_write(0, register, &u32::from(input.byte()).to_le_bytes()),
            3 => e1000.lock().mmio_read(0, register, &mut [0; 4]),
            4 => {
                let at = u64::from(input.word());
                pgm.write(GuestPhys(at), input.bytes(16));
            }
            5 => {
                let len = usize::from(input.word() % 4096);
                let mut frame = input.bytes(48).to_vec();
                frame.resize(len, 0x5a);
                port.receive(&frame);
            }
            6 => {
                timers.clock().advance(u64::from(input.word()) << 8);
                timers.fire_due();
            }
            _ => match op >> 3 & 7 {
                0 => e1000.lock().reset(),
                1 => wire.full.store(input.byte() & 1 != 0, Ordering::Relaxed),
                2 => port.set_link(input.byte() & 1 != 0),
                3 => port.ready(),
                _ => save_and_restore(&mut *e1000.lock(), &mut *card(&pgm, &timers, model).lock()),
            },
        }
    }
});
