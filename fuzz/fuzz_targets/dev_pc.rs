//! The 8259 pair, 8254, MC146818, 8237 pair, 8042 with keyboard and mouse, and 16550A: whatever a guest and clients do to
//! them in whatever order, no panic and no endless loop; every state saves and loads to itself.
#![no_main]

mod driver;

use std::sync::Arc;

use dev_pc::dma::Dma;
use dev_pc::i8042::I8042;
use dev_pc::pic::Pic;
use dev_pc::pit::Pit;
use dev_pc::rtc::{CmosSetup, Rtc, WallClock};
use dev_pc::serial::Serial;
use driver::{Bench, Bytes};
use libfuzzer_sys::fuzz_target;
use pdm::connector::{CharDriver, SystemControl, SystemRequest};
use pdm::irq::IrqPin;
use pgm::{Backing, HostMemory, Layer};
use vbox_types::{ByteSize, GuestPhys, Port};

struct Nobody;
impl SystemControl for Nobody {
    fn request(&self, _: SystemRequest) {}
}

/// Takes an odd number of bytes at most.
struct Narrow;
impl CharDriver for Narrow {
    fn write(&self, data: &[u8]) -> usize {
        data.len().min(3) * usize::from(data.first().is_none_or(|&byte| byte & 1 == 0))
    }
    fn set_modem_control(&self, _: bool, _: bool) {}
    fn set_break(&self, _: bool) {}
}

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = Bytes::new(bytes);
    let mut bench = Bench::new();
    let ram = Arc::new(HostMemory::new("fuzz", ByteSize(1 << 16)).unwrap());
    bench.pgm.map(GuestPhys(0), 1 << 16, Layer::Ram, Backing::ram(ram, 0));

    let pic = Pic::new();
    Pic::register(&pic, &bench.iom);
    let output = Pic::output(&pic);
    let line = |pin| IrqPin::new(Pic::inputs(&pic), pin).line();
    let pit = Pit::new(line(0), &bench.timers);
    Pit::register(&pit, &bench.iom);
    let wall: WallClock = Box::new(|| 1_700_000_000_000_000_000);
    let rtc = Rtc::new(line(8), &bench.timers, &wall, &CmosSetup::default());
    Rtc::register(&rtc, &bench.iom);
    let dma = Dma::new(bench.pgm.clone());
    Dma::register(&dma, &bench.iom);
    let channels = Dma::channels(&dma);
    let i8042 = I8042::new(line(1), line(12), bench.pgm.clone(), Arc::new(Nobody));
    I8042::register(&i8042, &bench.iom);
    let (keyboard, mouse) = (I8042::keyboard(&i8042), I8042::mouse(&i8042));
    let serial = Serial::new(Port(0x3f8), line(4), &bench.timers, bytes.u8() & 1 != 0);
    Serial::register(&serial, &bench.iom);
    serial.lock().connect(Some(Arc::new(Narrow)));
    let port = Serial::port(&serial);

    bench.devices = vec![pic, pit, rtc, dma, i8042, serial];
    bench.ports = vec![
        (0x20, 2),
        (0xa0, 2),
        (0x4d0, 2),
        (0x40, 4),
        (0x61, 1),
        (0x70, 4),
        (0x00, 0x10),
        (0x80, 0x10),
        (0xc0, 0x20),
        (0x60, 1),
        (0x64, 1),
        (0x92, 1),
        (0x3f8, 8),
    ];
    let mut special = |op: u8, bytes: &mut Bytes<'_>| match op & 7 {
        0 => {
            if output.is_pending() {
                output.acknowledge();
            }
        }
        1 => {
            output.acknowledge();
        }
        2 => {
            keyboard.put_scancodes(&[bytes.u8(), bytes.u8(), bytes.u8()]);
            keyboard.leds();
        }
        3 => mouse.put_event(
            bytes.u32() as i32,
            i32::from(bytes.u16() as i16),
            i32::from(bytes.u8() as i8),
            bytes.u8(),
        ),
        4 => {
            port.receive(&[bytes.u8(); 20][..usize::from(bytes.u8() % 20)]);
            port.wait_writable(Box::new(|| {}));
            port.ready();
        }
        5 => {
            let bits = bytes.u8();
            port.set_modem_status(bits & 1 != 0, bits & 2 != 0, bits & 4 != 0, bits & 8 != 0);
        }
        6 => {
            channels.write_memory(bytes.u8(), &[bytes.u8(); 600][..usize::from(bytes.u8()) * 2]);
        }
        _ => {
            channels.read_memory(bytes.u8(), &mut [0; 600][..usize::from(bytes.u8()) * 2]);
        }
    };
    while !bytes.is_empty() {
        bench.step(&mut bytes, &mut special);
    }
});
