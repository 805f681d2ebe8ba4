//! The LsiLogic SCSI and SAS controllers: whatever a guest writes into registers, message frames and lists, and in whatever order
//! requests complete, fail or drives change, they neither panic nor hang; their state survives saving whenever no command is under way.
#![no_main]

use std::sync::Arc;

use dev_storage::scsi::Controller;
use dev_storage::scsi::mpt::{Model, Mpt, Wiring};
use fuzz::{Input, Rig, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, MmioDevice};

const FRAMES: u64 = 0x1_0000;
const REPLIES: u32 = 0x2_0000;

fn controller(rig: &Rig, model: Model) -> Arc<Mutex<Mpt>> {
    let places = if model == Model::Spi { Model::SPI_TARGETS } else { 8 };
    let wiring = Wiring { pgm: rig.pgm.clone(), irq: Default::default(), ejected: None };
    Mpt::new(model, wiring, rig.drives(places))
}

fuzz_target!(|bytes: &[u8]| {
    let rig = Rig::new();
    let mut input = Input(bytes);
    let model = if input.byte() & 1 == 0 { Model::Spi } else { Model::Sas };
    let mpt = controller(&rig, model);
    let set = |at: u64, value: u32| mpt.lock().mmio_write(0, at, &value.to_le_bytes());
    let start = || {
        set(0, 0x42 << 24 | 6 << 16);
        [0x0200_0004u32, 0x0001_1000, 0xaa, 128, 0, 0].iter().for_each(|word| set(0, *word));
        for n in 0..8 {
            set(0x44, REPLIES + 0x100 * n);
        }
    };
    start();
    while !input.is_empty() {
        match input.byte() % 12 {
            // A SCSI command with a list that is mostly sound.
            0..=3 => {
                let n = u64::from(input.byte() % 32);
                let mut frame =
                    vec![input.byte() % 4, u8::from(input.byte() == 0xff), input.byte() % 20, 0, 16, 18];
                frame.extend_from_slice(&[0, 0, n as u8, 0, 0, 0]);
                frame.extend_from_slice(&[0, u8::from(input.byte() == 0xff), 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                frame.push(input.byte() & 3);
                frame.extend_from_slice(&Rig::cdb(&mut input));
                frame.extend_from_slice(&u32::from(input.word()).to_le_bytes());
                frame.extend_from_slice(&0x3_0000u32.to_le_bytes());
                for _ in 0..input.byte() % 4 {
                    let flags =
                        [0xd1, 0x10, 0x90, 0x12, 0x30, 0x32, input.byte()][usize::from(input.byte() % 7)];
                    let [low, high] = input.word().to_le_bytes();
                    frame.extend_from_slice(&[low, high, input.byte() & 1, flags]);
                    frame.extend_from_slice(&(u32::from(input.word()) << 4).to_le_bytes());
                }
                frame.extend_from_slice(&[0, 1, 0, 0xd1, 0, 0, 8, 0]);
                rig.write(FRAMES + 0x100 * n, &frame);
                set(0x40, (FRAMES + 0x100 * n) as u32);
            }
            // Any message.
            4 | 5 => {
                let frame = input.bytes(52);
                rig.write(FRAMES, frame);
                set(0x40, FRAMES as u32);
            }
            // A message through the doorbell.
            6 => {
                let words = u32::from(input.byte() % 15);
                set(0, 0x42 << 24 | words << 16);
                for _ in 0..words {
                    set(0, u32::from(input.word()) | u32::from(input.word()) << 16);
                }
                for _ in 0..input.byte() {
                    let mut data = [0; 4];
                    mpt.lock().mmio_read(0, 0, &mut data);
                    set(0x30, 0);
                }
            }
            // Any register.
            7 => {
                let at = u64::from(input.byte() & 0x7f);
                let len = usize::from(input.byte() % 8) + 1;
                mpt.lock().mmio_write(0, at, input.bytes(len));
            }
            // Replies, whose frames are given back.
            8 => {
                let mut data = [0; 4];
                mpt.lock().mmio_read(0, 0x44, &mut data);
                let entry = u32::from_le_bytes(data);
                if entry >> 31 == 1 && entry != !0 {
                    set(0x44, entry << 1);
                }
            }
            9 => start(),
            10 => rig.happen(&*mpt, &mut input),
            _ => match input.byte() % 4 {
                0 => mpt.lock().reset(),
                1 => set(0, 0x40 << 24),
                _ => {
                    rig.complete_all();
                    let third = mpt.lock().detach(2).is_ok();
                    let mut mpt = mpt.lock();
                    if third && mpt.is_idle() {
                        save_and_restore(&mut *mpt, &mut *controller(&rig, model).lock());
                    }
                }
            },
        }
    }
    rig.complete_all();
});
