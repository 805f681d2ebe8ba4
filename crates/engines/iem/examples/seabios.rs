//! Runs SeaBIOS without devices and prints its debug port, to exercise the interpreter. Argument: the image.
use std::sync::Arc;
use std::time::Instant;

use cpum::{CpuState, ForcedActions};
use em::Engine;
use iem::testing::Board;
use parking_lot::Mutex;
use pdm::{PortIo, Width};
use pgm::{Backing, HostMemory, Layer};
use vbox_types::{ByteSize, GuestPhys, Port};

struct DebugPort;
impl PortIo for DebugPort {
    fn port_read(&mut self, _: Port, _: Width) -> u32 {
        0xe9
    }
    fn port_write(&mut self, _: Port, _: Width, value: u32) {
        use std::io::Write;
        let _ = std::io::stdout().write_all(&[value as u8]);
        let _ = std::io::stdout().flush();
    }
}

/// A host bridge (i440FX) by its identity alone; everything else on the bus is absent.
struct Bridge {
    address: u32,
    space: [u32; 64],
}
impl PortIo for Bridge {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        let shift = 8 * u32::from(port.0 & 3);
        match port.0 {
            0xcf8..=0xcfb => self.address >> shift,
            _ if self.address & 0xffff00 == 0 => self.space[(self.address as usize & 0xff) / 4] >> shift,
            _ => u32::MAX,
        }
    }
    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        let shift = 8 * u32::from(port.0 & 3);
        let slot = match port.0 {
            0xcf8..=0xcfb => &mut self.address,
            _ if self.address & 0xffff00 == 0 => &mut self.space[(self.address as usize & 0xff) / 4],
            _ => return,
        };
        *slot = *slot & !(width.ones() << shift) | value << shift;
    }
}

fn main() {
    let path = std::env::args().nth(1).unwrap_or_else(|| "/usr/share/seabios/bios-256k.bin".into());
    let seconds = std::env::args().nth(2).and_then(|s| s.parse().ok()).unwrap_or(5);
    let image = std::fs::read(&path).expect("BIOS image");
    let board = Board::new(1, 64 << 20);
    let rom = Arc::new(HostMemory::new("bios", ByteSize(image.len() as u64)).expect("memory"));
    rom.write(0, &image);
    let len = image.len() as u64;
    board.pgm.map(GuestPhys((1 << 32) - len), len, Layer::Rom, Backing::rom(rom.clone(), 0));
    board.pgm.load(GuestPhys(0xe0000), &image[image.len() - 0x20000..]).expect("RAM");
    board.iom.register(Port(0x402), 1, Width::Byte, Arc::new(Mutex::new(DebugPort)));
    let mut bridge = Bridge { address: 0, space: [0; 64] };
    bridge.space[0] = 0x1237_8086;
    bridge.space[2] = 0x0600_0000;
    bridge.space[11] = 0x1100_1af4;
    board.iom.register(Port(0xcf8), 8, Width::Dword, Arc::new(Mutex::new(bridge)));
    board.ctx.clock.start();
    let mut cpu = CpuState::reset(0);
    let mut iem = board.engine(0);
    let link = board.ctx.links[0].clone();
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(seconds));
        link.raise(ForcedActions::EM);
    });
    let start = Instant::now();
    let exit = iem.run(&mut cpu);
    let time = start.elapsed();
    println!("\n{exit:?} at {:#x}:{:#x} after {time:?}", cpu.seg[1].selector, cpu.rip);
    println!("{:x?}", cpu.gpr);
    for (name, value) in iem.statistics() {
        println!("{name}: {value}");
    }
    let n = iem.statistics()[0].1;
    println!("{:.1} MIPS", n as f64 / time.as_secs_f64() / 1e6);
}
