//! The PCnet: whatever a guest does to its registers and rings, and whatever comes from the network, it neither panics nor hangs;
//! its state survives saving at any moment.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use dev_net::pcnet::{Model, Pcnet, Wiring};
use fuzz::{FuzzWire, Input, fuzz_memory, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, PortIo, Width};
use pgm::Pgm;
use tm::{Clock, TimerQueue};
use vbox_types::{ByteSize, GuestPhys, Port};

const MODELS: [Model; 4] = [Model::Am79C970A, Model::Am79C973, Model::Am79C960, Model::Am79C973];

fn card(pgm: &Arc<Pgm>, timers: &Arc<TimerQueue>, model: Model) -> Arc<Mutex<Pcnet>> {
    let wiring = Wiring { pgm: pgm.clone(), irq: Default::default() };
    Pcnet::new(model, [8, 0, 0x27, 1, 2, 3], true, wiring, timers)
}

/// Selects a register and writes it, whichever width the registers have.
fn write(card: &Mutex<Pcnet>, number: u8, value: u16, bus: bool) {
    let mut card = card.lock();
    let (word, dword) = if bus { (0x16, 0x1c) } else { (0x10, 0x10) };
    card.port_write(Port(0x12), Width::Word, number.into());
    card.port_write(Port(word), Width::Word, value.into());
    card.port_write(Port(0x14), Width::Dword, number.into());
    card.port_write(Port(dword), Width::Dword, value.into());
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let pgm = fuzz_memory(ByteSize(1 << 16));
    let timers = TimerQueue::new(Clock::manual());
    let model = MODELS[usize::from(input.byte() & 3)];
    let pcnet = card(&pgm, &timers, model);
    let wire = Arc::new(FuzzWire::default());
    pcnet.lock().connect(Some(wire.clone()));
    let port = Pcnet::port(&pcnet);
    while !input.is_empty() {
        let op = input.byte();
        match op & 7 {
            0 => write(&pcnet, input.byte(), input.word(), op & 8 != 0),
            // CSR0 is what most happens by.
            1 => write(&pcnet, 0, input.word(), false),
            2 => {
                let width = [Width::Byte, Width::Word, Width::Dword][usize::from(op >> 3) % 3];
                let at = Port(u16::from(input.byte() & 31));
                pcnet.lock().port_write(at, width, u32::from(input.word()));
            }
            3 => {
                let width = [Width::Byte, Width::Word, Width::Dword][usize::from(op >> 3) % 3];
                pcnet.lock().port_read(Port(u16::from(input.byte() & 31)), width);
            }
            4 => {
                let at = u64::from(input.word());
                pgm.write(GuestPhys(at), input.bytes(28));
            }
            5 => {
                let len = usize::from(input.word() % 5000);
                let mut frame = input.bytes(48).to_vec();
                frame.resize(len, 0x5a);
                port.receive(&frame);
            }
            6 => {
                timers.clock().advance(u64::from(input.word()) << 8);
                timers.fire_due();
            }
            _ => match op >> 3 & 7 {
                0 => pcnet.lock().reset(),
                1 => wire.full.store(input.byte() & 1 != 0, Ordering::Relaxed),
                2 => port.set_link(input.byte() & 1 != 0),
                3 => port.ready(),
                _ => save_and_restore(&mut *pcnet.lock(), &mut *card(&pgm, &timers, model).lock()),
            },
        }
    }
});
