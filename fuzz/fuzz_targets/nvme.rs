//! The NVMe controller: whatever a guest does to its registers, doorbells and queues, and in whatever order requests complete or fail, it
//! neither panics nor hangs; its state survives saving at any moment without requests under way.
#![no_main]

use std::sync::Arc;

use dev_storage::nvme::{Disk, Nvme, Wiring};
use fuzz::{FuzzMedium, Input, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::doorbell::BellDevice;
use pdm::{Device, MmioDevice};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys};

const RAM: u64 = 1 << 20;
/// Queue N: submissions from here on, 0x1000 each; completions behind them.
const SQS: u64 = 0x1_0000;
const CQS: u64 = 0x2_0000;
/// Doorbells in memory, and the controller's side of them.
const BELLS: u64 = 0x3_0000;
const ENTRIES: u32 = 8;
const QUEUES: u64 = 4;

fn controller(pgm: &Arc<Pgm>, media: &[Arc<FuzzMedium>; 2]) -> Arc<Mutex<Nvme>> {
    let disks = media.clone().map(|medium| Some(Disk { medium, uuid: [1; 16], discard: true }));
    let [first, second] = disks;
    Nvme::new(Wiring { pgm: pgm.clone(), irq: Default::default() }, vec![first, None, second])
}

fn enable(nvme: &Mutex<Nvme>) {
    let set = |at: u64, value: u32| nvme.lock().mmio_write(0, at, &value.to_le_bytes());
    set(0x14, 0);
    set(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
    set(0x28, SQS as u32);
    set(0x30, CQS as u32);
    set(0x14, 0x0046_0001);
}

fuzz_target!(|bytes: &[u8]| {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    let media = [FuzzMedium::new(3000 * 512, false), FuzzMedium::new(700 * 512, true)];
    let nvme = controller(&pgm, &media);
    enable(&nvme);
    let mut tails = [0u32; QUEUES as usize];

    let mut input = Input(bytes);
    while !input.is_empty() {
        match input.byte() % 8 {
            // A command: where things lie is mostly sensible, so that the fuzzer gets somewhere.
            0..=3 => {
                let queue = u64::from(input.byte()) % QUEUES;
                let tail = &mut tails[queue as usize];
                let mut raw = [0; 64];
                // The last one is that of the doorbell buffers.
                raw[0] = [input.byte() % 16, 0x7c][usize::from(input.byte() == 0xff)];
                raw[1] = if input.byte() == 0xff { input.byte() } else { 0 };
                raw[2] = input.byte();
                raw[4] = input.byte() % 5;
                raw[24..32].copy_from_slice(&(u64::from(input.word()) << 4).to_le_bytes());
                raw[32..40].copy_from_slice(&(u64::from(input.word()) << 4).to_le_bytes());
                let given = input.bytes(12);
                raw[40..40 + given.len()].copy_from_slice(given);
                if queue == 0 && matches!(raw[0], 1 | 5) {
                    let id = u64::from(raw[40] % 4);
                    let base = if raw[0] == 1 { SQS } else { CQS } + 0x1000 * id;
                    raw[24..32].copy_from_slice(&base.to_le_bytes());
                    raw[40..46].copy_from_slice(&[id as u8, 0, 7, 0, 3, 0]);
                }
                if queue == 0 && raw[0] == 0x7c && raw[2] & 1 == 0 {
                    raw[24..32].copy_from_slice(&BELLS.to_le_bytes());
                    raw[32..40].copy_from_slice(&(BELLS + 0x1000).to_le_bytes());
                }
                pgm.write(GuestPhys(SQS + 0x1000 * queue + 64 * u64::from(*tail)), &raw);
                *tail = (*tail + 1) % ENTRIES;
                pgm.write(GuestPhys(BELLS + 8 * queue), &tail.to_le_bytes());
                nvme.lock().mmio_write(0, 0x1000 + 8 * queue, &tail.to_le_bytes());
            }
            // The driver takes completions, or says so.
            4 => {
                let queue = u64::from(input.byte()) % (QUEUES + 2);
                let head = u32::from(input.byte() % 10);
                pgm.write(GuestPhys(BELLS + 4 + 8 * queue), &head.to_le_bytes());
                if input.byte() & 1 == 0 {
                    nvme.lock().mmio_write(0, 0x1004 + 8 * queue, &head.to_le_bytes());
                }
            }
            // Any register, in any width.
            5 => {
                let place = u64::from(input.word()) & 0x3fff;
                let place = if input.byte() & 1 == 0 { place % 0x40 } else { place };
                let len = usize::from(input.byte() % 8) + 1;
                let data = input.bytes(len);
                nvme.lock().mmio_write(0, place, data);
                let mut data = [0; 8];
                nvme.lock().mmio_read(0, place, &mut data[..len]);
            }
            6 => {
                let medium = &media[usize::from(input.byte() & 1)];
                medium.complete_one(input.byte() % 8 == 0);
            }
            _ => match input.byte() % 6 {
                0 => nvme.lock().reset(),
                1 => {
                    enable(&nvme);
                    tails = [0; QUEUES as usize];
                }
                // A list that the entries may point to.
                2 => {
                    let at = u64::from(input.word()) << 3;
                    let entries = input.bytes(64);
                    pgm.write(GuestPhys(at), entries);
                }
                _ => {
                    // What nobody has rung for would be found by the restored one.
                    (0..QUEUES as u16).for_each(|queue| nvme.lock().rung(queue));
                    media.iter().for_each(|m| m.complete_all());
                    let mut nvme = nvme.lock();
                    if nvme.is_idle() {
                        let fresh = controller(&pgm, &media);
                        save_and_restore(&mut *nvme, &mut *fresh.lock());
                        drop(nvme);
                        media.iter().for_each(|m| m.complete_all());
                    }
                }
            },
        }
    }
    media.iter().for_each(|m| m.complete_all());
});
