//! The Intel 82441FX host bridge ("i440FX", PMC) at PCI 00:00.0: configuration mechanism 1 and the shadow RAM switches.
//!
//! Source: Intel 82441FX datasheet (290549). Ports 0xcf8 (CONFADD, 32-bit accesses only) and 0xcfc–0xcff (CONFDATA).
//! Subsystem 1af4:1100, by which SeaBIOS recognises the platform with fw_cfg (SeaBIOS `src/fw/paravirt.c`).
//!
//! PAM registers (0x59–0x5f): bit 0 (4) of each nibble sends reads to RAM, bit 1 (5) writes; else they go to PCI, where reads of
//! 0xe0000–0xfffff find the end of the BIOS image and everything else is open.
//! Left out: SMM. SMRAM (0x72) keeps what is written but for D_OPEN: the video window at 0xa0000 is never RAM. DRAM timing
//! and row registers are plain storage. VirtualBox's own host bridge has no PAM registers; its BIOS area is always RAM.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::iom::PortHandler;
use pdm::pci::{ConfigSpace, DevFn, Identity, PciBus, PciDevice, reg};
use pdm::{Device, Iom, Width};
use pgm::{Backing, HostMemory, Layer, MapHandle, Pgm, Target};
use ssm::{Error, Reader, Saveable, Writer};
use vbox_types::{GuestPhys, Port};

use crate::memory_map::{ONE_MIB, OPTION_ROMS};

/// The bridge's place on the bus.
pub const PLACE: DevFn = DevFn::new(0, 0);

const PAM0: u8 = 0x59;
const PAM_COUNT: usize = 7;
const SMRAM: u8 = 0x72;
/// SMRAM after reset: the SMM segment's base is 0xa0000.
const SMRAM_RESET: u8 = 0x02;
/// Writable bits of SMRAM: all but D_OPEN and the fixed base.
const SMRAM_WRITABLE: u8 = 0x38;

/// What a PAM field switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    /// Index into the PAM registers.
    register: usize,
    shift: u32,
    start: u64,
    len: u64,
}

/// The thirteen switched areas: one of 64 KiB, twelve of 16 KiB (82441FX, table 4).
fn areas() -> impl Iterator<Item = Area> {
    let bios = Area { register: 0, shift: 4, start: 0xf_0000, len: 0x1_0000 };
    let rest = (0..12u8).map(|i| Area {
        register: 1 + usize::from(i / 2),
        shift: u32::from(i % 2) * 4,
        start: OPTION_ROMS.0 + u64::from(i) * 0x4000,
        len: 0x4000,
    });
    std::iter::once(bios).chain(rest)
}

/// What the guest sees of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Switch {
    read_ram: bool,
    write_ram: bool,
}

impl Area {
    fn switch(&self, pam: &[u8; PAM_COUNT]) -> Switch {
        let field = pam[self.register] >> self.shift;
        Switch { read_ram: field & 1 != 0, write_ram: field & 2 != 0 }
    }
}

/// Configuration mechanism 1 (PCI 3.0, 3.2.2.3.2). Lock-free: a function's own lock guards its registers.
struct ConfigPorts {
    address: AtomicU32,
    bus: Weak<PciBus>,
}

const ADDRESS_PORT: Port = Port(0xcf8);
const DATA_PORT: Port = Port(0xcfc);
/// CONFADD: enable, bus, device, function, register. The other bits read as zero.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

impl ConfigPorts {
    /// The function and register offset that a data access at `port` reaches on bus 0.
    fn target(&self, port: Port) -> Option<(Arc<PciBus>, DevFn, u8)> {
        let address = self.address.load(Ordering::Acquire);
        let enabled = address & 1 << 31 != 0;
        let bus = address >> 16 & 0xff;
        if !enabled || bus != 0 {
            return None;
        }
        let offset = (address & 0xfc) as u8 | (port.0 & 3) as u8;
        Some((self.bus.upgrade()?, DevFn((address >> 8) as u8), offset))
    }
}

impl PortHandler for ConfigPorts {
    fn read(&self, port: Port, width: Width) -> u32 {
        if port.0 < DATA_PORT.0 {
            let whole = port == ADDRESS_PORT && width == Width::Dword;
            return if whole { self.address.load(Ordering::Acquire) } else { width.ones() };
        }
        let Some((bus, at, offset)) = self.target(port) else { return width.ones() };
        // An access may lie anywhere in the four ports; the bus takes aligned ones only.
        if u16::from(offset) % width.bytes() == 0 {
            return bus.config_read(at, offset, width);
        }
        let mut value = 0;
        for i in 0..width.bytes() as u8 {
            let byte = match (offset & 3) + i {
                0..=3 => bus.config_read(at, offset + i, Width::Byte),
                _ => 0xff,
            };
            value |= byte << (8 * i);
        }
        value
    }

    fn write(&self, port: Port, width: Width, value: u32) {
        if port.0 < DATA_PORT.0 {
            if port == ADDRESS_PORT && width == Width::Dword {
                self.address.store(value & ADDRESS_WRITABLE, Ordering::Release);
            }
            return;
        }
        let Some((bus, at, offset)) = self.target(port) else { return };
        if u16::from(offset) % width.bytes() == 0 {
            bus.config_write(at, offset, width, value);
            return;
        }
        for (i, byte) in (0..width.bytes() as u8).zip(value.to_le_bytes()) {
            if (offset & 3) + i < 4 {
                bus.config_write(at, offset + i, Width::Byte, byte.into());
            }
        }
    }

    fn read_string(&self, port: Port, width: Width, out: &mut [u8]) {
        for item in out.chunks_mut(width.bytes().into()) {
            let value = self.read(port, width).to_le_bytes();
            item.copy_from_slice(&value[..item.len()]);
        }
    }

    fn write_string(&self, port: Port, width: Width, data: &[u8]) {
        for item in data.chunks(width.bytes().into()) {
            let mut value = [0; 4];
            value[..item.len()].copy_from_slice(item);
            self.write(port, width, u32::from_le_bytes(value));
        }
    }
}

/// The host bridge.
pub struct I440Fx {
    ram: Arc<HostMemory>,
    bios: Arc<HostMemory>,
    pgm: Arc<Pgm>,
    ports: Arc<ConfigPorts>,
    windows: Vec<(Area, MapHandle)>,
    /// The PAM registers, as configuration space has them.
    pam: [u8; PAM_COUNT],
}

impl I440Fx {
    /// `ram` is the machine's RAM, its offset 0 at guest address 0. `bios` is the firmware image, as mapped below 4 GiB; the last
    /// 128 KiB of it show at 0xe0000–0xfffff while the PAM registers say so, and after reset.
    pub fn new(
        bus: &Arc<PciBus>,
        pgm: &Arc<Pgm>,
        ram: Arc<HostMemory>,
        bios: Arc<HostMemory>,
    ) -> Arc<Mutex<Self>> {
        let ports = Arc::new(ConfigPorts { address: AtomicU32::new(0), bus: Arc::downgrade(bus) });
        let mut bridge =
            Self { ram, bios, pgm: pgm.clone(), ports, windows: Vec::new(), pam: [0; PAM_COUNT] };
        for area in areas() {
            let backing = bridge.backing(area, area.switch(&bridge.pam));
            let handle = pgm.map(GuestPhys(area.start), area.len, Layer::Chipset, backing);
            bridge.windows.push((area, handle));
        }
        Arc::new(Mutex::new(bridge))
    }

    /// Claims the configuration ports and plugs the bridge into the bus.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom, bus: &PciBus) {
        let ports = this.lock().ports.clone();
        iom.register(ADDRESS_PORT, 4, Width::Dword, ports.clone());
        iom.register(DATA_PORT, 4, Width::Dword, ports);
        let id = Identity {
            vendor: 0x8086,
            device: 0x1237,
            revision: 0x02,
            class: [0x06, 0x00, 0x00],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            ..Identity::default()
        };
        let mut space = ConfigSpace::new(&id);
        // Memory and bus master are always on; status: medium DEVSEL timing.
        space.allow(reg::COMMAND, &[0x40, 0x01]);
        space.set_u16(reg::COMMAND, 0x0006);
        space.set_u16(reg::STATUS, 0x0280);
        // PMC configuration, DRAM control and timing, row boundaries: storage.
        space.allow(0x50, &[0xff; 9]);
        space.allow(PAM0, &[0x33; PAM_COUNT]);
        space.allow(0x60, &[0xff; 8]);
        space.set_byte(SMRAM, SMRAM_RESET);
        space.allow(SMRAM, &[SMRAM_WRITABLE]);
        bus.add(PLACE, "i440fx", space, vec![], this.clone());
    }

    fn backing(&self, area: Area, switch: Switch) -> Backing {
        let ram = Target::Memory { memory: self.ram.clone(), offset: area.start };
        // The BIOS image ends where the first megabyte ends; only its last 128 KiB are decoded there.
        let rom = (self.bios.len() + area.start).checked_sub(ONE_MIB).filter(|_| area.start >= 0xe_0000);
        let bus = match rom {
            Some(offset) => Target::Memory { memory: self.bios.clone(), offset },
            None => Target::Open,
        };
        Backing {
            read: if switch.read_ram { ram.clone() } else { bus },
            write: if switch.write_ram { ram } else { Target::Open },
            posted: false,
        }
    }

    fn set_pam(&mut self, pam: [u8; PAM_COUNT]) {
        let old = std::mem::replace(&mut self.pam, pam);
        for &(area, handle) in &self.windows {
            let switch = area.switch(&pam);
            if switch != area.switch(&old) {
                self.pgm.set_backing(handle, self.backing(area, switch));
            }
        }
    }
}

impl PciDevice for I440Fx {
    fn config_written(&mut self, _offset: u8, _width: Width, space: &mut ConfigSpace) {
        let mut pam = [0; PAM_COUNT];
        for (value, offset) in pam.iter_mut().zip(PAM0..) {
            *value = space.byte(offset);
        }
        self.set_pam(pam);
    }
}

impl Saveable for I440Fx {
    fn unit_name(&self) -> &'static str {
        "i440fx"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut Writer) {
        let Self { ram: _, bios: _, pgm: _, ports, windows: _, pam } = self;
        out.put_u32(ports.address.load(Ordering::Acquire));
        out.put_bytes(pam);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        let address = input.take_u32()? & ADDRESS_WRITABLE;
        let mut pam = [0; PAM_COUNT];
        input.take_into(&mut pam)?;
        if pam.iter().any(|value| value & !0x33 != 0) {
            return Err(input.invalid("a PAM register has reserved bits set"));
        }
        input.finish()?;
        self.ports.address.store(address, Ordering::Release);
        self.set_pam(pam);
        Ok(())
    }
}

impl Device for I440Fx {
    fn reset(&mut self) {
        self.ports.address.store(0, Ordering::Release);
        self.set_pam([0; PAM_COUNT]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_golden, assert_saved_state_survives};
    use vbox_types::ByteSize;

    struct Pc {
        iom: Arc<Iom>,
        pgm: Arc<Pgm>,
        _bus: Arc<PciBus>,
        bridge: Arc<Mutex<I440Fx>>,
    }

    fn pc() -> Pc {
        let iom = Iom::new();
        let pgm = Pgm::new(vec![]);
        let bus = PciBus::new(iom.clone(), pgm.clone());
        let ram = Arc::new(HostMemory::new("ram", ByteSize::mib(2)).unwrap());
        pgm.map(GuestPhys(0), ram.len(), Layer::Ram, Backing::ram(ram.clone(), 0));
        let bios = Arc::new(HostMemory::new("bios", ByteSize(0x4_0000)).unwrap());
        bios.write(0, &[0xb1; 0x4_0000]);
        bios.write(0x4_0000 - 0x10, &[0xea; 0x10]);
        let bridge = I440Fx::new(&bus, &pgm, ram, bios);
        I440Fx::register(&bridge, &iom, &bus);
        Pc { iom, pgm, _bus: bus, bridge }
    }

    impl Pc {
        fn select(&self, register: u8) {
            self.iom.write(ADDRESS_PORT, Width::Dword, 0x8000_0000 | u32::from(register & 0xfc));
        }

        fn set_register(&self, register: u8, value: u8) {
            self.select(register);
            self.iom.write(Port(DATA_PORT.0 + u16::from(register & 3)), Width::Byte, value.into());
        }

        fn byte(&self, at: u64) -> u8 {
            let mut out = [0];
            self.pgm.read(GuestPhys(at), &mut out);
            out[0]
        }
    }

    #[test]
    fn the_bridge_is_recognised_through_mechanism_1() {
        let pc = pc();
        assert_eq!(pc.iom.read(DATA_PORT, Width::Dword), u32::MAX, "disabled");
        pc.select(0);
        assert_eq!(pc.iom.read(DATA_PORT, Width::Dword), 0x1237_8086);
        assert_eq!(pc.iom.read(Port(0xcfe), Width::Word), 0x1237);
        assert_eq!(pc.iom.read(Port(0xcfd), Width::Word), 0x3780, "unaligned");
        assert_eq!(pc.iom.read(Port(0xcff), Width::Word), 0xff12, "past the last port");
        pc.select(0x2c);
        assert_eq!(pc.iom.read(DATA_PORT, Width::Dword), 0x1100_1af4);
        assert_eq!(pc.iom.read(ADDRESS_PORT, Width::Dword), 0x8000_002c);
        pc.iom.write(ADDRESS_PORT, Width::Dword, 0x8001_0000);
        assert_eq!(pc.iom.read(DATA_PORT, Width::Dword), u32::MAX, "there is no bus 1");
        pc.iom.write(ADDRESS_PORT, Width::Word, 0);
        assert_eq!(pc.iom.read(ADDRESS_PORT, Width::Dword), 0x8001_0000, "32-bit accesses only");
    }

    #[test]
    fn pam_switches_reads_and_writes_of_an_area_separately() {
        let pc = pc();
        assert_eq!(pc.byte(0xf_fff0), 0xea);
        assert_eq!(pc.byte(0xe_0000), 0xb1);
        assert_eq!(pc.byte(0xc_0000), 0xff);
        pc.pgm.write(GuestPhys(0xf_fff0), &[1]);
        assert_eq!(pc.byte(0xf_fff0), 0xea);
        pc.set_register(0x59, 0x20);
        pc.pgm.write(GuestPhys(0xf_fff0), &[2]);
        assert_eq!(pc.byte(0xf_fff0), 0xea, "written through to RAM, still read from ROM");
        pc.set_register(0x59, 0x10);
        pc.pgm.write(GuestPhys(0xf_fff0), &[3]);
        assert_eq!(pc.byte(0xf_fff0), 2, "shadowed and write-protected");
        pc.set_register(0x5a, 0x03);
        pc.pgm.write(GuestPhys(0xc_3fff), &[4, 5]);
        assert_eq!((pc.byte(0xc_3fff), pc.byte(0xc_4000)), (4, 0xff));
        pc.set_register(0x5f, 0x30);
        pc.pgm.write(GuestPhys(0xe_c000), &[6]);
        assert_eq!((pc.byte(0xe_c000), pc.byte(0xe_8000)), (6, 0xb1));
    }

    #[test]
    fn reset_brings_the_bios_back() {
        let pc = pc();
        pc.set_register(0x59, 0x30);
        assert_eq!(pc.byte(0xf_fff0), 0);
        pc.bridge.lock().reset();
        assert_eq!(pc.byte(0xf_fff0), 0xea);
    }

    #[test]
    fn the_video_window_is_never_opened_as_smram() {
        let pc = pc();
        pc.set_register(SMRAM, 0x4a);
        pc.select(SMRAM);
        assert_eq!(pc.iom.read(Port(0xcfe), Width::Byte), 0x0a);
    }

    #[test]
    fn the_areas_cover_the_upper_quarter_of_the_first_megabyte_once() {
        let mut list: Vec<_> = areas().map(|a| (a.start, a.len)).collect();
        list.sort_unstable();
        let mut at = 0xc_0000;
        for (start, len) in list {
            assert_eq!(start, at);
            at += len;
        }
        assert_eq!(at, ONE_MIB);
    }

    #[test]
    fn a_saved_bridge_comes_back_with_its_shadow() {
        let (one, other) = (pc(), pc());
        one.set_register(0x59, 0x30);
        assert_golden(&one.bridge, include_str!("golden/i440fx.v1.hex"));
        assert_saved_state_survives(&one.bridge, &other.bridge);
        assert_eq!(other.byte(0xf_fff0), 0);
    }
}
