//! The virtio-scsi controller: whatever a guest puts into its queues, and in whatever order requests complete, fail or drives change,
//! it neither panics nor hangs; its state survives saving whenever no command is under way.
#![no_main]

use std::sync::Arc;

use dev_storage::scsi::Controller;
use dev_storage::scsi::virtio::{VirtioScsi, VirtioScsiPci};
use fuzz::{Input, Rig, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, MmioDevice};

const RINGS: u64 = 0x1_0000;
const REQUESTS: u64 = 0x2_0000;
const QUEUES: usize = 6;

fn controller(rig: &Rig) -> Arc<Mutex<VirtioScsiPci>> {
    let wiring = dev_virtio_core::Wiring { pgm: rig.pgm.clone(), irq: Default::default() };
    VirtioScsi::create(wiring, rig.drives(8), None)
}

struct Driver<'r> {
    rig: &'r Rig,
    card: Arc<Mutex<VirtioScsiPci>>,
    given: [u16; QUEUES],
}

impl Driver<'_> {
    fn set(&self, at: u64, bytes: &[u8]) {
        self.card.lock().mmio_write(0, at, bytes);
    }

    fn start(&mut self, features: u8) {
        self.set(20, &[0]);
        self.rig.write(RINGS, &[0; 0x6000]);
        self.given = [0; QUEUES];
        self.set(20, &[3]);
        // Hot-plug and changes; event index or not; virtio 1.0.
        let low = 6u32 | u32::from(features & 1) << 29 | 1 << 28;
        for (half, value) in [(0u32, low), (1, 1)] {
            self.set(8, &half.to_le_bytes());
            self.set(12, &value.to_le_bytes());
        }
        self.set(20, &[11]);
        for queue in 0..QUEUES as u16 {
            self.set(22, &queue.to_le_bytes());
            let base = RINGS + 0x1000 * u64::from(queue);
            self.set(32, &base.to_le_bytes());
            self.set(40, &(base + 0x800).to_le_bytes());
            self.set(48, &(base + 0xa00).to_le_bytes());
            self.set(28, &[1, 0]);
        }
        self.set(20, &[15]);
    }

    fn give(&mut self, queue: usize, regions: &[(u64, u32, bool)]) {
        let base = RINGS + 0x1000 * queue as u64;
        let size = if queue < 2 { 64 } else { 128 };
        let index = self.given[queue];
        let head = index.wrapping_mul(4) % size;
        for (i, (address, len, write)) in regions.iter().enumerate() {
            let last = i + 1 == regions.len();
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&(u16::from(!last) | u16::from(*write) << 1).to_le_bytes());
            bytes.extend_from_slice(&(head + i as u16 + 1).to_le_bytes());
            self.rig.write(base + 16 * u64::from(head + i as u16), &bytes);
        }
        self.rig.write(base + 0x804 + 2 * u64::from(index % size), &head.to_le_bytes());
        self.given[queue] = index.wrapping_add(1);
        self.rig.write(base + 0x802, &self.given[queue].to_le_bytes());
        self.set(0x3000 + 4 * queue as u64, &[queue as u8, 0]);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let rig = Rig::new();
    let mut driver = Driver { rig: &rig, card: controller(&rig), given: [0; QUEUES] };
    driver.start(0);
    let mut input = Input(bytes);
    while !input.is_empty() {
        match input.byte() % 11 {
            // A command.
            0..=4 => {
                let n = u64::from(input.byte() % 16);
                let at = REQUESTS + 0x400 * n;
                let mut request = vec![1, input.byte() % 4, 0x40, u8::from(input.byte() == 0xff), 0, 0, 0, 0];
                request.extend_from_slice(&n.to_le_bytes());
                request.extend_from_slice(&[0; 3]);
                request.extend_from_slice(&Rig::cdb(&mut input));
                request.resize(51, 0);
                rig.write(at, &request);
                let queue = 2 + usize::from(input.byte() % 4);
                let (data, len) = (u64::from(input.word()) << 4, u32::from(input.word()));
                let head = if input.byte() == 0xff { input.byte().into() } else { 51 };
                let answer = (at + 0x200, if input.byte() == 0xff { input.byte().into() } else { 108 }, true);
                match input.byte() % 3 {
                    0 => driver.give(queue, &[(at, head, false), answer]),
                    1 => driver.give(queue, &[(at, head, false), (data, len, false), answer]),
                    _ => driver.give(queue, &[(at, head, false), answer, (data, len, true)]),
                }
            }
            // Task management, a buffer for events, anything.
            5 => {
                let mut request =
                    vec![input.byte() % 3, 0, 0, 0, input.byte() % 9, 0, 0, 0, 1, input.byte() % 4];
                request.resize(16, 0);
                request.push(input.byte() % 16);
                request.resize(24, 0);
                rig.write(REQUESTS + 0x8000, &request);
                driver.give(0, &[(REQUESTS + 0x8000, 24, false), (REQUESTS + 0x8100, 5, true)]);
            }
            6 => driver.give(1, &[(REQUESTS + 0x8200, u32::from(input.byte() % 20), true)]),
            7 => {
                let at = u64::from(input.word()) & 0x3fff;
                let len = usize::from(input.byte() % 8) + 1;
                driver.set(at, input.bytes(len));
            }
            8 => rig.write(RINGS + u64::from(input.word()) % 0x6000, input.bytes(4)),
            9 => rig.happen(&*driver.card, &mut input),
            _ => match input.byte() % 4 {
                0 => driver.card.lock().reset(),
                1 => driver.start(input.byte()),
                _ => {
                    rig.complete_all();
                    let third = driver.card.lock().detach(2).is_ok();
                    let mut card = driver.card.lock();
                    if third && card.is_idle() {
                        save_and_restore(&mut *card, &mut *controller(&rig).lock());
                    }
                }
            },
        }
    }
    rig.complete_all();
});
