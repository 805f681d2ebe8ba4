//! The board's own devices — APICs, host bridge, ISA bridge, power management, HPET, fw_cfg — through their ports, memory, MSRs and
//! interrupt lines: whatever the guest does, no panic and no deadlock; and what is saved then, loaded into a fresh board and saved
//! again, is the same to the byte.
#![no_main]

use std::sync::Arc;

use cpum::VcpuLink;
use dev_apic::{Apic, ApicConfig};
use dev_pc::{
    acpi_pm::AcpiPm, fw_cfg::FwCfg, hpet::Hpet, i440fx::I440Fx, pic::Pic, piix3::Piix3, piix3::Wiring,
};
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use pdm::connector::{SystemControl, SystemRequest};
use pdm::pci::{DevFn, PciBus};
use pdm::{Device, InterruptController, Iom, IrqLine, Width};
use pgm::{Backing, HostMemory, Layer, MmioHandler, Pgm, Target};
use tm::{Clock, TimerQueue};
use vbox_types::{ByteSize, GuestPhys, Hz, Port, VcpuId};

const CPUS: u32 = 2;
const RAM: u64 = 1 << 20;

struct Ignore;
impl SystemControl for Ignore {
    fn request(&self, _: SystemRequest) {}
}

struct Board {
    iom: Arc<Iom>,
    pgm: Arc<Pgm>,
    bus: Arc<PciBus>,
    timers: Arc<TimerQueue>,
    apic: Arc<Apic>,
    lines: Vec<IrqLine>,
    devices: Vec<Arc<Mutex<dyn Device>>>,
}

impl Board {
    fn new() -> Self {
        let links: Vec<_> = (0..CPUS).map(|_| Arc::new(VcpuLink::default())).collect();
        let timers = TimerQueue::new(Clock::manual());
        let (iom, pgm) = (Iom::new(), Pgm::new(links.clone()));
        let bus = PciBus::new(iom.clone(), pgm.clone());
        let ram = Arc::new(HostMemory::new("ram", ByteSize(RAM)).unwrap());
        pgm.map(GuestPhys(0), RAM, Layer::Ram, Backing::ram(ram.clone(), 0));
        let bios = Arc::new(HostMemory::new("bios", ByteSize(0x2_0000)).unwrap());
        let config =
            ApicConfig { local_apic: true, x2apic: true, io_apic: true, tsc_frequency: Hz(2_000_000_000) };
        let apic = Apic::new(config, &links, &timers);
        let pic = Pic::new();
        Pic::register(&pic, &iom);
        pic.lock().connect_intr(apic.intr_line());
        apic.connect_pic(Pic::output(&pic));
        apic.register(&pgm);
        let wiring = Wiring::new(Pic::inputs(&pic), apic.io_apic());
        let bridge = I440Fx::new(&bus, &pgm, ram, bios);
        I440Fx::register(&bridge, &iom, &bus);
        let piix3 = Piix3::new(wiring.clone(), Arc::new(Ignore));
        Piix3::register(&piix3, &iom, &bus);
        let acpi = AcpiPm::new(&iom, wiring.isa(9), Arc::new(Ignore), &timers, true);
        AcpiPm::register(&acpi, &iom, &bus);
        let hpet = Hpet::new(&wiring, &timers);
        Hpet::register(&hpet, &pgm);
        let fw_cfg = FwCfg::new(&pgm);
        FwCfg::register(&fw_cfg, &iom);
        fw_cfg.lock().add_machine(CPUS as u16, ByteSize(RAM));
        let mut lines: Vec<_> = (0..16).map(|irq| wiring.isa(irq)).collect();
        lines.extend((1..5).map(|pin| wiring.intx(DevFn::new(pin + 1, 0), pin)));
        let mut devices: Vec<Arc<Mutex<dyn Device>>> = vec![pic, bridge, piix3, acpi, hpet, fw_cfg];
        devices.extend(apic.devices());
        Self { iom, pgm, bus, timers, apic, lines, devices }
    }

    fn page(&self, at: u64) -> Option<(Arc<dyn MmioHandler>, u64)> {
        match self.pgm.resolve(GuestPhys(at)).write {
            Target::Mmio { handler, offset } => Some((handler, offset)),
            _ => None,
        }
    }

    fn save(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut bus = ssm::Writer::new();
        self.bus.save(&mut bus);
        let mut units = vec![("pci", bus.into_bytes())];
        for device in &self.devices {
            let mut out = ssm::Writer::new();
            let device = device.lock();
            device.save(&mut out);
            units.push((device.unit_name(), out.into_bytes()));
        }
        units
    }

    fn load(&self, units: &[(&'static str, Vec<u8>)]) {
        self.bus.load(ssm::Reader::new("pci", 1, &units[0].1)).unwrap();
        for (device, (name, bytes)) in self.devices.iter().zip(&units[1..]) {
            device.lock().load(ssm::Reader::new(name, 1, bytes)).unwrap();
        }
    }
}

/// Ports worth hitting.
const PORTS: [u16; 24] = [
    0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0xb2, 0xb3, 0xcf8, 0xcf9, 0xcfc, 0xcfd, 0xcfe, 0xcff, 0x510, 0x511,
    0x514, 0x518, 0x600, 0x602, 0x604, 0x60c, 0x700, 0x702,
];

fuzz_target!(|bytes: &[u8]| {
    let board = Board::new();
    for op in bytes.chunks_exact(12) {
        let value = u64::from_le_bytes(op[4..12].try_into().unwrap());
        let selector = u16::from_le_bytes([op[2], op[3]]);
        let width = [Width::Byte, Width::Word, Width::Dword][usize::from(op[1] % 3)];
        let count = [1, 2, 4, 8][usize::from(op[1] % 4)];
        let cpu = VcpuId(u32::from(op[1] >> 7));
        let port = match PORTS.get(usize::from(selector & 0x1f)) {
            Some(port) if selector < 0x8000 => Port(*port),
            _ => Port(selector),
        };
        // A select of a PCI register, so that data accesses mean something.
        let fixed = [0xfec0_0000u64, 0xfed0_0000, 0xfee0_0000][usize::from(op[1] >> 2) % 3];
        let at = fixed + u64::from(selector % 0xff9);
        match op[0] % 12 {
            0 => {
                board.iom.read(port, width);
            }
            1 | 2 => board.iom.write(port, width, value as u32),
            3 => {
                let devfn = [0, 8, 0x38][usize::from(op[1]) % 3];
                board.iom.write(
                    Port(0xcf8),
                    Width::Dword,
                    0x8000_0000 | devfn << 8 | u32::from(selector & 0xfc),
                );
                board.iom.write(Port(0xcfc + (selector & 3)), width, value as u32);
            }
            4 => {
                if let Some((page, offset)) = board.page(at) {
                    page.mmio_read(cpu, offset, &mut vec![0; count]);
                }
            }
            5 | 6 => {
                if let Some((page, offset)) = board.page(at) {
                    page.mmio_write(cpu, offset & !3, &value.to_le_bytes()[..count]);
                }
            }
            7 => {
                board.apic.read_msr(cpu, 0x800 | u32::from(selector & 0xff));
                board.apic.write_msr(cpu, 0x800 | u32::from(selector & 0xff), value);
            }
            8 => {
                board.apic.write_msr(cpu, 0x6e0, value);
                board.apic.set_apic_base(cpu, 0xfee0_0000 | value & 0xd00);
            }
            9 => {
                if let Some(line) = board.lines.get(usize::from(selector % 24)) {
                    line.set(value & 1 != 0);
                }
            }
            10 => {
                board.apic.write_cr8(cpu, value & 0xf);
                board.apic.acknowledge(cpu);
            }
            _ => {
                board.timers.clock().advance(value & 0xff_ffff);
                board.timers.fire_due();
            }
        }
    }
    let units = board.save();
    let other = Board::new();
    other.timers.clock().advance(board.timers.clock().now());
    other.load(&units);
    assert_eq!(other.save(), units);
});
