//! The AHCI controller: whatever a guest does to its registers and command lists, and in whatever order requests complete, fail or
//! drives change, it neither panics nor hangs; its state survives saving at any moment without requests under way.
#![no_main]

use std::sync::Arc;

use dev_storage::ahci::{Ahci, PortSetup, Wiring};
use dev_storage::ide::{CdIdentity, DiskIdentity, Drive};
use fuzz::{FuzzMedium, Input, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::{Device, MmioDevice};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys};

const RAM: u64 = 1 << 20;
const LIST: u64 = 0x1_0000;
const TABLES: u64 = 0x2_0000;

struct Media {
    disk: Arc<FuzzMedium>,
    cd: Arc<FuzzMedium>,
}

fn disk(media: &Media) -> Drive {
    let identity = DiskIdentity { discard: true, ..DiskIdentity::virtualbox(1, 2) };
    Drive::Disk { identity, medium: media.disk.clone() }
}

fn controller(pgm: &Arc<Pgm>, media: &Media) -> Arc<Mutex<Ahci>> {
    let wiring = Wiring { pgm: pgm.clone(), irq: Default::default(), ejected: None };
    let cd = Drive::Cd { identity: CdIdentity::virtualbox_ahci(1), medium: Some(media.cd.clone()) };
    let drives = [Some(disk(media)), Some(cd), None];
    let setup = drives.map(|drive| PortSetup { drive, hot_pluggable: true });
    Ahci::new(wiring, setup.into())
}

fuzz_target!(|bytes: &[u8]| {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    let media = Media { disk: FuzzMedium::new(3000 * 512, false), cd: FuzzMedium::new(700 * 2048, true) };
    let ahci = controller(&pgm, &media);
    let mut port_two = false;
    let set = |at: u64, value: u32| ahci.lock().mmio_write(0, at, &value.to_le_bytes());
    for port in 0..3 {
        let at = 0x100 + 0x80 * port;
        set(at, (LIST + 0x400 * port) as u32);
        set(at + 8, 0x8000);
        set(at + 0x18, 0x17);
        set(at + 0x14, !0);
    }
    set(4, 2);

    let mut input = Input(bytes);
    while !input.is_empty() {
        let port = u64::from(input.byte() % 3);
        let at = 0x100 + 0x80 * port;
        match input.byte() % 10 {
            // A command: flags and length of table, task file, packet, descriptors.
            0..=3 => {
                let slot = u64::from(input.byte() % 32);
                let table = TABLES + 0x800 * slot;
                let mut header = [0; 16];
                header[..4].copy_from_slice(&[5, 0, input.byte() % 8, u8::from(input.byte() == 0xff)]);
                header[8..].copy_from_slice(&table.to_le_bytes());
                pgm.write(GuestPhys(LIST + 0x400 * port + 32 * slot), &header);
                let mut cfis = [0; 20];
                cfis[..2].copy_from_slice(&[0x27, 0x80]);
                let given = input.bytes(14);
                cfis[2..2 + given.len()].copy_from_slice(given);
                if matches!(cfis[2], 0x60 | 0x61) {
                    cfis[12] = (slot as u8) << 3;
                    set(at + 0x34, 1 << slot);
                }
                pgm.write(GuestPhys(table), &cfis);
                pgm.write(GuestPhys(table + 0x40), input.bytes(12));
                for entry in 0..4u64 {
                    let mut prd = [0; 16];
                    prd[..4].copy_from_slice(&(u32::from(input.word()) << 4).to_le_bytes());
                    prd[12..14].copy_from_slice(&input.word().to_le_bytes());
                    pgm.write(GuestPhys(table + 0x80 + 16 * entry), &prd);
                }
                set(at + 0x38, 1 << slot);
            }
            // Any register, in any width.
            4 => {
                let place = if input.byte() & 1 == 0 { at } else { 0 } + u64::from(input.byte() % 0x40);
                let len = usize::from(input.byte() % 8) + 1;
                let data = input.bytes(len);
                ahci.lock().mmio_write(0, place, data);
            }
            5 => {
                let mut data = [0; 8];
                ahci.lock().mmio_read(0, u64::from(input.word()) & 0x1fff, &mut data);
            }
            // Restart of the command list, link reset.
            6 => {
                let register = if input.byte() & 1 == 0 { 0x18 } else { 0x2c };
                set(at + register, 0x16);
                set(at + register, 0x17);
                set(at + 0x2c, 1);
                set(at + 0x2c, 0);
            }
            7 => {
                media.disk.complete_one(input.byte() % 8 == 0);
            }
            8 => {
                media.cd.complete_one(input.byte() % 8 == 0);
            }
            _ => match input.byte() % 6 {
                0 => ahci.lock().reset(),
                1 => {
                    let medium = (input.byte() & 1 != 0).then(|| FuzzMedium::new(64 * 2048, true) as _);
                    let _ = ahci.lock().set_medium(1, medium, input.byte() & 1 != 0);
                }
                2 => port_two |= ahci.lock().attach(2, disk(&media)).is_ok(),
                3 => {
                    port_two = false;
                    let _ = ahci.lock().detach(2);
                }
                _ => {
                    media.disk.complete_all();
                    media.cd.complete_all();
                    let mut ahci = ahci.lock();
                    if ahci.is_idle() {
                        let fresh = controller(&pgm, &media);
                        if port_two {
                            let _ = fresh.lock().attach(2, disk(&media));
                        }
                        save_and_restore(&mut *ahci, &mut *fresh.lock());
                    }
                }
            },
        }
    }
    media.disk.complete_all();
    media.cd.complete_all();
});
