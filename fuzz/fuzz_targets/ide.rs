//! The IDE controller: whatever a guest does to its ports, its descriptor tables and in whatever order requests complete,
//! fail or media change, it neither panics nor hangs; its state survives saving at any moment without requests under way.
#![no_main]

use std::sync::Arc;

use dev_storage::ide::{CdIdentity, DiskIdentity, Drive, Ide, Model, Wiring};
use fuzz::{FuzzMedium, Input, save_and_restore};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::pci::{DevFn, PciBus, reg};
use pdm::{Device, Iom, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use vbox_types::{ByteSize, GuestPhys, Port};

const BM: u16 = 0xc000;
const RAM: u64 = 1 << 20;

struct Media {
    disk: Arc<FuzzMedium>,
    cd: Arc<FuzzMedium>,
}

fn controller(pgm: &Arc<Pgm>, media: &Media) -> Arc<Mutex<Ide>> {
    let wiring = Wiring { pgm: pgm.clone(), irqs: Default::default(), ejected: None };
    let identity = DiskIdentity { discard: true, ..DiskIdentity::virtualbox(1, 2) };
    let disk = Drive::Disk { identity, medium: media.disk.clone() };
    let cd = Drive::Cd { identity: CdIdentity::virtualbox(1), medium: Some(media.cd.clone()) };
    Ide::new(Model::Piix3, wiring, [Some(disk), Some(cd), None, None])
}

fuzz_target!(|bytes: &[u8]| {
    let pgm = Pgm::new(vec![]);
    let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
    pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram, 0));
    let media = Media { disk: FuzzMedium::new(3000 * 512, false), cd: FuzzMedium::new(700 * 2048, true) };
    let ide = controller(&pgm, &media);
    let iom = Iom::new();
    let bus = PciBus::new(iom.clone(), pgm.clone());
    Ide::register(&ide, &iom, &bus, DevFn::new(1, 1));
    bus.config_write(DevFn::new(1, 1), reg::BAR0 + 16, Width::Dword, BM.into());
    bus.config_write(DevFn::new(1, 1), reg::COMMAND, Width::Word, 5);

    let mut input = Input(bytes);
    while !input.is_empty() {
        let width = [Width::Byte, Width::Word, Width::Dword][usize::from(input.byte() % 3)];
        match input.byte() % 13 {
            0 => iom.write(Port(0x1f0 + u16::from(input.byte() % 8)), width, input.word().into()),
            1 => {
                iom.read(Port(0x1f0 + u16::from(input.byte() % 8)), width);
            }
            2 => iom.write(Port(0x3f6), Width::Byte, input.byte().into()),
            // A whole task file and a command.
            3 => {
                for port in [0x1f6, 0x1f1, 0x1f2, 0x1f3, 0x1f4, 0x1f5, 0x1f2, 0x1f3, 0x1f7] {
                    iom.write(Port(port), Width::Byte, input.byte().into());
                }
            }
            // A packet.
            4 => {
                iom.write(Port(0x1f6), Width::Byte, 0x10);
                iom.write(Port(0x1f1), Width::Byte, u32::from(input.byte() & 1));
                iom.write(Port(0x1f4), Width::Byte, input.byte().into());
                iom.write(Port(0x1f5), Width::Byte, input.byte().into());
                iom.write(Port(0x1f7), Width::Byte, 0xa0);
                let mut packet = [0; 12];
                let given = input.bytes(12);
                packet[..given.len()].copy_from_slice(given);
                iom.write_string(Port(0x1f0), Width::Word, &packet);
            }
            5 => {
                let mut out = vec![0; usize::from(input.word())];
                iom.read_string(Port(0x1f0), width, &mut out);
            }
            6 => iom.write_string(Port(0x1f0), width, &vec![input.byte(); usize::from(input.word())]),
            7 => iom.write(Port(BM + u16::from(input.byte() % 16)), width, input.word().into()),
            8 => {
                iom.read(Port(BM + u16::from(input.byte() % 16)), width);
            }
            // A descriptor table, and the bus master on it.
            9 => {
                pgm.write(GuestPhys(0x1000), input.bytes(64));
                iom.write(Port(BM + 4), Width::Dword, 0x1000);
                iom.write(Port(BM), Width::Byte, u32::from(input.byte() & 9));
            }
            10 => {
                media.disk.complete_one(input.byte() % 8 == 0);
            }
            11 => {
                media.cd.complete_one(input.byte() % 8 == 0);
            }
            _ => match input.byte() % 4 {
                0 => ide.lock().reset(),
                1 => {
                    let medium = (input.byte() & 1 != 0).then(|| FuzzMedium::new(64 * 2048, true) as _);
                    let _ = ide.lock().set_medium(0, 1, medium, input.byte() & 1 != 0);
                }
                _ => {
                    media.disk.complete_all();
                    media.cd.complete_all();
                    let mut ide = ide.lock();
                    if ide.is_idle() {
                        save_and_restore(&mut *ide, &mut *controller(&pgm, &media).lock());
                    }
                }
            },
        }
    }
    media.disk.complete_all();
    media.cd.complete_all();
});
