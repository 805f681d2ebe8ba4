//! The BusLogic adapter: whatever a guest writes into registers, mailboxes and command blocks, and in whatever order requests complete,
//! fail or drives change, it neither panics nor hangs; its state survives saving whenever no command is under way.
#![no_main]

use std::sync::Arc;

use dev_storage::scsi::Controller;
use dev_storage::scsi::buslogic::{BusLogic, TARGETS};
use dev_storage::scsi::mpt::Wiring;
use fuzz::{Input, Rig, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, PortIo, Width};
use vbox_types::Port;

const MAIL: u64 = 0x1_0000;
const BLOCKS: u64 = 0x2_0000;

fn controller(rig: &Rig) -> Arc<Mutex<BusLogic>> {
    let wiring = Wiring { pgm: rig.pgm.clone(), irq: Default::default(), ejected: None };
    BusLogic::new(wiring, rig.drives(TARGETS))
}

fuzz_target!(|bytes: &[u8]| {
    let rig = Rig::new();
    let card = controller(&rig);
    let set = |at: u16, value: u8| card.lock().port_write(Port(0xd000 + at), Width::Byte, value.into());
    let start = |old: bool| {
        set(0, 0x40);
        let words: &[u8] = if old { &[0x01, 8, 1, 0, 0] } else { &[0x81, 8, 0, 0, 1, 0] };
        words.iter().for_each(|byte| set(1, *byte));
        set(0, 0x20);
    };
    start(false);
    let mut input = Input(bytes);
    while !input.is_empty() {
        match input.byte() % 12 {
            // A command in a block of either format.
            0..=4 => {
                let n = u64::from(input.byte() % 8);
                let at = BLOCKS + 0x100 * n;
                let kind = [0, 2, 3, 4, 0x81, input.byte()][usize::from(input.byte() % 6)];
                let direction = (input.byte() & 3) << 3;
                let [low, high] = input.word().to_le_bytes();
                let address = (u32::from(input.word()) << 4).to_le_bytes();
                let old = input.byte() & 3 == 0;
                let target = input.byte() % 4;
                let mut block = vec![kind, direction, 12, input.byte() % 20];
                if old {
                    block[1] |= target << 5;
                    block.extend_from_slice(&[
                        0, high, low, address[2], address[1], address[0], 0, 0, 0, 0, 0, 0, 0, 0,
                    ]);
                } else {
                    block.extend_from_slice(&[low, high, 0, 0]);
                    block.extend_from_slice(&address);
                    block.extend_from_slice(&[0, 0, 0, 0, target, u8::from(input.byte() == 0xff)]);
                }
                block.extend_from_slice(&Rig::cdb(&mut input)[..12]);
                block.resize(36, 0);
                block.extend_from_slice(&0x3_0000u32.to_le_bytes());
                rig.write(at, &block);
                let action = [1, 1, 1, 2, input.byte()][usize::from(input.byte() % 5)];
                let [a, b, c, d] = (at as u32).to_le_bytes();
                let slot = u64::from(input.byte() % 8);
                if old {
                    rig.write(MAIL + 4 * slot, &[action, c, b, a]);
                } else {
                    rig.write(MAIL + 8 * slot, &[a, b, c, d, 0, 0, 0, action]);
                }
                set(1, 2);
            }
            // A list of pieces.
            5 => rig.write(u64::from(input.word()) << 4, input.bytes(16)),
            // Any adapter command.
            6 => {
                let count = input.byte() % 8;
                set(1, input.byte());
                for _ in 0..count {
                    set(1, input.byte());
                }
                for _ in 0..input.byte() {
                    card.lock().port_read(Port(0xd001), Width::Byte);
                }
            }
            7 => set(u16::from(input.byte() & 3), input.byte()),
            8 => {
                card.lock().port_read(Port(0xd000 + u16::from(input.byte() & 3)), Width::Byte);
                set(0, 0x20);
            }
            // The guest has read its mail.
            9 => rig.write(MAIL + 32, &[0; 96]),
            10 => rig.happen(&*card, &mut input),
            _ => match input.byte() % 4 {
                0 => card.lock().reset(),
                1 => start(input.byte() & 1 != 0),
                _ => {
                    rig.complete_all();
                    let third = card.lock().detach(2).is_ok();
                    let mut card = card.lock();
                    if third && card.is_idle() {
                        save_and_restore(&mut *card, &mut *controller(&rig).lock());
                    }
                }
            },
        }
    }
    rig.complete_all();
});
