//! Enters a Linux bzImage by its 32-bit boot protocol on a board with a serial port's transmitter and nothing else, to exercise
//! the interpreter up to where the kernel wants a timer. Arguments: image, seconds, initrd (or `-`), command line.
use std::sync::Arc;
use std::time::Instant;

use cpum::state::{cr0, seg};
use cpum::{CpuState, ForcedActions, Segment};
use em::Engine;
use iem::testing::{Board, descriptor, flat};
use parking_lot::Mutex;
use pdm::{PortIo, Width};
use pgm::PAGE_SIZE;
use vbox_types::{GuestPhys, Port};

struct Serial;
impl PortIo for Serial {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        // Line status: transmitter empty. Interrupt identification: none.
        match port.0 & 7 {
            5 => 0x60,
            2 => 1,
            _ => 0,
        }
    }
    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        use std::io::Write;
        if port.0 & 7 == 0 {
            let _ = std::io::stdout().write_all(&[value as u8]);
        }
    }
}

const RAM: u64 = 512 << 20;
const PARAMS: u64 = 0x10000;
const COMMAND_LINE: u64 = 0x20000;
const GDT: u64 = 0x30000;
const KERNEL: u64 = 0x10_0000;
const INITRD: u64 = 0x1000_0000;

fn main() {
    let mut args = std::env::args().skip(1);
    let image = std::fs::read(args.next().expect("kernel image")).expect("kernel image");
    let seconds = args.next().and_then(|s| s.parse().ok()).unwrap_or(20);
    let initrd = args.next().filter(|p| p != "-").map(|p| std::fs::read(p).expect("initrd"));
    let line = args.next().unwrap_or_else(|| {
        "earlyprintk=serial,ttyS0,115200 console=ttyS0 nokaslr panic=-1 lpj=1000000 noapic nolapic acpi=off".into()
    });
    let board = Board::new(1, RAM);
    let put = |at: u64, bytes: &[u8]| board.pgm.load(GuestPhys(at), bytes).expect("RAM");
    // The set-up header starts at 0x1f1; the protected-mode part follows the set-up sectors.
    let sectors = u64::from(image[0x1f1]).max(4);
    let setup = ((sectors + 1) * 512) as usize;
    let mut params = vec![0u8; PAGE_SIZE as usize];
    let header_end = 0x202 + usize::from(image[0x201]);
    params[0x1f1..header_end].copy_from_slice(&image[0x1f1..header_end]);
    params[0x210] = 0xff;
    params[0x211] |= 1;
    params[0x228..0x22c].copy_from_slice(&(COMMAND_LINE as u32).to_le_bytes());
    if let Some(initrd) = &initrd {
        put(INITRD, initrd);
        params[0x218..0x21c].copy_from_slice(&(INITRD as u32).to_le_bytes());
        params[0x21c..0x220].copy_from_slice(&(initrd.len() as u32).to_le_bytes());
    }
    for (n, (start, len, kind)) in
        [(0u64, 0x9fc00u64, 1u32), (0x10_0000, RAM - 0x10_0000, 1)].into_iter().enumerate()
    {
        let at = 0x2d0 + 20 * n;
        params[at..at + 8].copy_from_slice(&start.to_le_bytes());
        params[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
        params[at + 16..at + 20].copy_from_slice(&kind.to_le_bytes());
        params[0x1e8] = n as u8 + 1;
    }
    put(PARAMS, &params);
    put(COMMAND_LINE, line.as_bytes());
    put(KERNEL, &image[setup..]);
    put(GDT + 0x10, &descriptor(0, 0xfffff, 0x9b, 0xc).to_le_bytes());
    put(GDT + 0x18, &descriptor(0, 0xfffff, 0x93, 0xc).to_le_bytes());
    board.iom.register(Port(0x3f8), 8, Width::Byte, Arc::new(Mutex::new(Serial)));
    board.ctx.clock.start();
    let mut cpu = CpuState::reset(0);
    cpu.cr0 = cr0::PE | cr0::ET;
    for s in 0..6 {
        let (kind, selector) = if s == seg::CS { (11, 0x10) } else { (3, 0x18) };
        cpu.seg[s] = Segment { selector, ..flat(kind, 0, false) };
    }
    cpu.gdtr = cpum::state::TableRegister { base: GDT, limit: 0x1f };
    cpu.rip = KERNEL;
    cpu.gpr[6] = PARAMS;
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
    println!(
        "gpr {:x?} rflags {:x} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x}",
        cpu.gpr, cpu.rflags, cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4
    );
    let mut bytes = [0; 96];
    let around = cpu.rip.wrapping_sub(48);
    if iem::GuestMemory::read_bytes(iem.core(), &cpu, around, &mut bytes).is_ok() {
        println!("code at {around:#x}: {}", bytes.iter().map(|b| format!("{b:02x} ")).collect::<String>());
    }
    for (name, value) in iem.statistics() {
        println!("{name}: {value}");
    }
    println!("{:.1} MIPS", iem.statistics()[0].1 as f64 / time.as_secs_f64() / 1e6);
}
