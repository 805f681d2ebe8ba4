//! The PCI bus: configuration space, base address registers and interrupt pins.
//!
//! The bus owns every function's 256 bytes of configuration space, sizes and moves BARs, and tells a device only what concerns it.
//! Access by mechanism 1 (ports 0xcf8/0xcfc) lives with the host bridge, which calls [`PciBus::config_read`] and
//! [`PciBus::config_write`]. Source: PCI Local Bus Specification 3.0, chapter 6.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use pgm::{Backing, Layer, MapHandle, Pgm};
use vbox_types::{GuestPhys, Port};

use crate::doorbell::{Bell, BellId, Doorbell, Doorbells, Gate, Place};
use crate::iom::{Iom, PortHandle, PortHandler, Width};
use crate::msix::{self, MsiSink, MsiX};

/// Offsets in configuration space.
pub mod reg {
    pub const COMMAND: u8 = 0x04;
    pub const STATUS: u8 = 0x06;
    pub const BAR0: u8 = 0x10;
    pub const ROM: u8 = 0x30;
    pub const INTERRUPT_LINE: u8 = 0x3c;
}

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus master enable.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// INTx disable.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// A function's place on bus 0: device number (5 bits) and function number (3 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(pub u8);

impl DevFn {
    /// # Panics
    /// In constant evaluation, for a device above 31 or a function above 7.
    pub const fn new(device: u8, function: u8) -> Self {
        assert!(device < 32 && function < 8);
        Self(device << 3 | function)
    }

    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

/// What lies behind a base address register.
pub enum Bar {
    /// I/O ports: called with absolute port numbers; `size` is a power of two.
    Io { size: u16, widest: Width, handler: Arc<dyn PortHandler> },
    /// Memory: `size` is a power of two of at least 16 bytes.
    Memory { size: u64, prefetchable: bool, wide: bool, backing: Backing },
}

/// A doorbell ([`crate::doorbell`]) in a BAR.
#[derive(Clone, Copy, Debug)]
pub struct BarBell {
    pub bar: usize,
    /// Bytes into the BAR.
    pub offset: u16,
    /// Which word rings it; in memory anything does.
    pub value: u16,
    pub number: u16,
}

/// The identification part of a function's configuration header.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class code: base class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
    /// 0x80 if the device has several functions.
    pub header_type: u8,
    /// 0 for none, 1 for INTA# to 4 for INTD#.
    pub interrupt_pin: u8,
}

/// The part of a PCI function that a device implements itself.
pub trait PciDevice: Send {
    /// `width` bytes at `offset` of configuration space were written; `space` has the new content, write masks applied.
    /// The device may change it (write-one-to-clear bits, read-only bits).
    fn config_written(&mut self, offset: u8, width: Width, space: &mut ConfigSpace);

    /// `width` bytes at `offset` of configuration space are going to be read, for devices that have registers there whose content
    /// is made at that moment.
    fn config_reading(&mut self, _offset: u8, _width: Width, _space: &mut ConfigSpace) {}

    /// A BAR was mapped at an address or unmapped, for devices that care.
    fn bar_mapped(&mut self, _bar: usize, _address: Option<u64>) {}
}

impl<D: PciDevice> PciHandler for Mutex<D> {
    fn config_written(&self, offset: u8, width: Width, space: &mut ConfigSpace) {
        self.lock().config_written(offset, width, space);
    }
    fn config_reading(&self, offset: u8, width: Width, space: &mut ConfigSpace) {
        self.lock().config_reading(offset, width, space);
    }
    fn bar_mapped(&self, bar: usize, address: Option<u64>) {
        self.lock().bar_mapped(bar, address);
    }
}

/// Object form of [`PciDevice`].
pub trait PciHandler: Send + Sync {
    fn config_written(&self, offset: u8, width: Width, space: &mut ConfigSpace);
    fn config_reading(&self, offset: u8, width: Width, space: &mut ConfigSpace);
    fn bar_mapped(&self, bar: usize, address: Option<u64>);
}

/// Configuration space of one function: values and which bits the guest can change.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    /// The MSI-X vectors, and where their capability lies.
    msix: Option<(u8, Arc<MsiX>)>,
}

impl ConfigSpace {
    pub fn new(id: &Identity) -> Self {
        let mut s = Self { bytes: [0; 256], writable: [0; 256], msix: None };
        s.set_u16(0x00, id.vendor);
        s.set_u16(0x02, id.device);
        s.bytes[0x08] = id.revision;
        s.bytes[0x09] = id.class[2];
        s.bytes[0x0a] = id.class[1];
        s.bytes[0x0b] = id.class[0];
        s.bytes[0x0e] = id.header_type;
        s.set_u16(0x2c, id.subsystem_vendor);
        s.set_u16(0x2e, id.subsystem);
        s.bytes[0x3d] = id.interrupt_pin;
        // Command: I/O, memory, bus master, parity, SERR, INTx disable. Cache line, latency timer, interrupt line.
        s.allow(reg::COMMAND, &[0x47, 0x05]);
        s.allow(0x0c, &[0xff, 0xff]);
        s.allow(reg::INTERRUPT_LINE, &[0xff]);
        s
    }

    /// Makes bits writable by the guest: one mask byte for each register byte from `offset` on.
    pub fn allow(&mut self, offset: u8, mask: &[u8]) {
        for (i, m) in mask.iter().enumerate() {
            if let Some(w) = self.writable.get_mut(usize::from(offset) + i) {
                *w = *m;
            }
        }
    }

    pub fn byte(&self, offset: u8) -> u8 {
        self.bytes[usize::from(offset)]
    }

    pub fn set_byte(&mut self, offset: u8, value: u8) {
        self.bytes[usize::from(offset)] = value;
    }

    pub fn u16(&self, offset: u8) -> u16 {
        u16::from_le_bytes([self.byte(offset), self.byte(offset.wrapping_add(1))])
    }

    pub fn set_u16(&mut self, offset: u8, value: u16) {
        for (i, b) in value.to_le_bytes().into_iter().enumerate() {
            self.set_byte(offset.wrapping_add(i as u8), b);
        }
    }

    pub fn u32(&self, offset: u8) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset.wrapping_add(2))) << 16
    }

    pub fn set_u32(&mut self, offset: u8, value: u32) {
        for (i, b) in value.to_le_bytes().into_iter().enumerate() {
            self.set_byte(offset.wrapping_add(i as u8), b);
        }
    }

    /// Appends a capability with the id `id` and `body` after its two-byte header at `offset`, in front of the list.
    pub fn add_capability(&mut self, offset: u8, id: u8, body: &[u8]) {
        self.set_byte(offset, id);
        self.set_byte(offset + 1, self.byte(0x34));
        for (i, b) in body.iter().enumerate() {
            self.set_byte(offset + 2 + i as u8, *b);
        }
        self.set_byte(0x34, offset);
        self.set_byte(reg::STATUS, self.byte(reg::STATUS) | 0x10);
    }

    /// Appends the MSI-X capability at `offset`; the table and the pending bits are in BAR `bar`, which is [`MsiX::bar`].
    pub fn add_msix(&mut self, offset: u8, bar: usize, msix: &Arc<MsiX>) {
        let control = msix.vectors() - 1;
        let mut body = control.to_le_bytes().to_vec();
        body.extend_from_slice(&(bar as u32).to_le_bytes());
        body.extend_from_slice(&(msix.pending_at() as u32 | bar as u32).to_le_bytes());
        self.add_capability(offset, 0x11, &body);
        self.allow(offset + 2, &msix::CONTROL_WRITABLE.to_le_bytes());
        self.msix = Some((offset, msix.clone()));
    }

    /// Tells the MSI-X vectors what message control says.
    fn sync_msix(&self) {
        if let Some((at, msix)) = &self.msix {
            msix.set_control(self.u16(at + 2));
        }
    }

    fn guest_write(&mut self, offset: u8, width: Width, value: u32) {
        for (i, b) in value.to_le_bytes().into_iter().take(width.bytes().into()).enumerate() {
            let Some(at) = usize::from(offset).checked_add(i).filter(|&at| at < 256) else { return };
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | b & mask;
        }
    }
}

enum Mapped {
    Ports(PortHandle),
    Memory(MapHandle),
}

struct Slot {
    bar: Bar,
    offset: u8,
    mapped: Option<(u64, Mapped)>,
    bells: Vec<BarBell>,
    /// Those that are up.
    rung: Vec<BellId>,
}

struct Function {
    name: &'static str,
    space: ConfigSpace,
    /// Configuration space as it is after reset.
    power_on: ConfigSpace,
    bars: BTreeMap<usize, Slot>,
    handler: Weak<dyn PciHandler>,
    /// The device behind the BARs' doorbells, and its switch for them.
    bell: Option<(Weak<dyn Bell>, Option<Arc<Gate>>)>,
    /// Keeps devices alive that nothing else holds.
    _keep: Arc<dyn PciHandler>,
}

/// PCI bus 0 of one VM.
pub struct PciBus {
    iom: Arc<Iom>,
    pgm: Arc<Pgm>,
    msi: OnceLock<Arc<dyn MsiSink>>,
    functions: Mutex<BTreeMap<DevFn, Arc<Mutex<Function>>>>,
}

impl PciBus {
    pub fn new(iom: Arc<Iom>, pgm: Arc<Pgm>) -> Arc<Self> {
        Arc::new(Self { iom, pgm, msi: OnceLock::new(), functions: Mutex::default() })
    }

    /// Says who takes message-signalled interrupts, once, before functions are plugged in.
    pub fn connect_msi(&self, sink: Arc<dyn MsiSink>) {
        let _ = self.msi.set(sink);
    }

    /// Plugs a function in. `bars` are by BAR number (6 is the expansion ROM, which must be [`Bar::Memory`]). Afterwards the space given back by
    /// `space` is its state after every reset.
    ///
    /// # Panics
    /// If the place is taken, which is a mistake in the machine's assembly.
    pub fn add(
        &self,
        at: DevFn,
        name: &'static str,
        mut space: ConfigSpace,
        bars: Vec<(usize, Bar)>,
        handler: Arc<dyn PciHandler>,
    ) {
        if let (Some((_, msix)), Some(sink)) = (&space.msix, self.msi.get()) {
            msix.connect(sink.clone());
        }
        let mut slots = BTreeMap::new();
        for (number, bar) in bars {
            let offset = if number == 6 { reg::ROM } else { reg::BAR0 + 4 * number as u8 };
            match &bar {
                Bar::Io { size, .. } => {
                    space.set_u32(offset, 1);
                    // All 32 bits: SeaBIOS takes upper bits that stay zero for a part of the size.
                    space.allow(offset, &(!(u32::from(*size) - 1)).to_le_bytes());
                }
                Bar::Memory { size, prefetchable, wide, .. } => {
                    let mask = !(size - 1);
                    if number == 6 {
                        space.allow(offset, &(mask as u32 | 1).to_le_bytes());
                    } else {
                        space.set_u32(offset, u32::from(*prefetchable) << 3 | u32::from(*wide) << 2);
                        space.allow(offset, &(mask as u32).to_le_bytes());
                        if *wide {
                            space.allow(offset + 4, &((mask >> 32) as u32).to_le_bytes());
                        }
                    }
                }
            }
            slots.insert(number, Slot { bar, offset, mapped: None, bells: Vec::new(), rung: Vec::new() });
        }
        let function = Function {
            name,
            power_on: space.clone(),
            space,
            bars: slots,
            handler: Arc::downgrade(&handler),
            bell: None,
            _keep: handler,
        };
        let before = self.functions.lock().insert(at, Arc::new(Mutex::new(function)));
        assert!(before.is_none(), "two functions at PCI {:02x}.{}", at.device(), at.function());
    }

    /// Some of the registers of the function at `at` are doorbells of `device`, always or while `gate` is open. To be called before its BARs
    /// are mapped.
    pub fn add_doorbells(
        &self,
        at: DevFn,
        bells: &[BarBell],
        device: Weak<dyn Bell>,
        gate: Option<Arc<Gate>>,
    ) {
        let Some(function) = self.function(at) else { return };
        let mut function = function.lock();
        function.bell = Some((device, gate));
        for bell in bells {
            if let Some(slot) = function.bars.get_mut(&bell.bar) {
                slot.bells.push(*bell);
            }
        }
    }

    /// Where the doorbells of the bus are.
    pub fn doorbells(&self) -> &Arc<Doorbells> {
        self.iom.doorbells()
    }

    fn function(&self, at: DevFn) -> Option<Arc<Mutex<Function>>> {
        self.functions.lock().get(&at).cloned()
    }

    /// Reads configuration space; ones where no function is.
    pub fn config_read(&self, at: DevFn, offset: u8, width: Width) -> u32 {
        let Some(function) = self.function(at) else { return width.ones() };
        let mut function = function.lock();
        let aligned = offset & !(width.bytes() as u8 - 1);
        if let Some(handler) = function.handler.upgrade() {
            handler.config_reading(aligned, width, &mut function.space);
        }
        let value = function.space.u32(aligned & 0xfc) >> (8 * (aligned & 3)) & width.ones();
        tracing::trace!(target: "pci", device = function.name, "read 0x{offset:02x} {width:?} 0x{value:x}");
        value
    }

    /// Writes configuration space and applies what follows from it.
    pub fn config_write(&self, at: DevFn, offset: u8, width: Width, value: u32) {
        let Some(function) = self.function(at) else { return };
        let mut function = function.lock();
        let offset = offset & !(width.bytes() as u8 - 1);
        tracing::trace!(target: "pci", device = function.name, "write 0x{offset:02x} {width:?} 0x{value:x}");
        function.space.guest_write(offset, width, value);
        function.space.sync_msix();
        if let Some(handler) = function.handler.upgrade() {
            handler.config_written(offset, width, &mut function.space);
        }
        self.update(&mut function);
    }

    /// Changes configuration space from the device's side (status bits); not to be called with the device's lock held.
    pub fn with_space<R>(&self, at: DevFn, change: impl FnOnce(&mut ConfigSpace) -> R) -> Option<R> {
        let function = self.function(at)?;
        let mut function = function.lock();
        let result = change(&mut function.space);
        self.update(&mut function);
        Some(result)
    }

    /// The functions present, with their names.
    pub fn list(&self) -> Vec<(DevFn, &'static str)> {
        self.functions.lock().iter().map(|(at, f)| (*at, f.lock().name)).collect()
    }

    /// Brings every function's configuration space to its state after reset, BARs unmapped.
    pub fn reset(&self) {
        let functions: Vec<_> = self.functions.lock().values().cloned().collect();
        for function in functions {
            let mut function = function.lock();
            function.space = function.power_on.clone();
            if let Some((_, msix)) = &function.space.msix {
                msix.reset();
            }
            self.update(&mut function);
        }
    }

    /// Writes the configuration spaces of all functions, and their MSI-X tables, into a saved state.
    pub fn save(&self, out: &mut ssm::Writer) {
        let functions = self.functions.lock();
        out.put_u32(functions.len() as u32);
        for (at, function) in functions.iter() {
            let ConfigSpace { bytes, writable: _, msix } = &function.lock().space;
            out.put_u8(at.0);
            out.put_bytes(bytes);
            if let Some((_, msix)) = msix {
                msix.save(out);
            }
        }
    }

    /// Takes back what [`PciBus::save`] wrote; the same functions must be plugged in.
    pub fn load(&self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        let functions: Vec<_> = self.functions.lock().iter().map(|(at, f)| (*at, f.clone())).collect();
        if input.take_u32()? as usize != functions.len() {
            return Err(input.invalid("the machine has other PCI functions than the saved state"));
        }
        let mut spaces = Vec::new();
        for (at, function) in &functions {
            if input.take_u8()? != at.0 {
                return Err(input.invalid("the machine has other PCI functions than the saved state"));
            }
            let mut bytes = [0; 256];
            input.take_into(&mut bytes)?;
            let mut space = function.lock().space.clone();
            if bytes[..4] != space.bytes[..4] {
                return Err(input.invalid("a PCI function's identity differs from the saved state"));
            }
            space.bytes = bytes;
            let vectors = match &space.msix {
                Some((_, msix)) => Some(msix.load(&mut input)?),
                None => None,
            };
            spaces.push((space, vectors));
        }
        input.finish()?;
        for ((_, function), (space, vectors)) in functions.iter().zip(spaces) {
            let mut function = function.lock();
            function.space = space;
            if let (Some((_, msix)), Some(vectors)) = (&function.space.msix, vectors) {
                msix.restore(vectors);
                function.space.sync_msix();
            }
            self.update(&mut function);
        }
        Ok(())
    }

    /// Maps and unmaps BARs as the space now says.
    fn update(&self, function: &mut Function) {
        let Function { space, bars, handler, bell, .. } = function;
        let command = space.u16(reg::COMMAND);
        for (number, slot) in bars {
            let raw = space.u32(slot.offset);
            let wanted = match &slot.bar {
                Bar::Io { size, .. } => {
                    let base = raw & !3;
                    (command & COMMAND_IO != 0 && base != 0 && base <= 0x1_0000 - u32::from(*size))
                        .then_some(u64::from(base))
                }
                Bar::Memory { size, wide, .. } => {
                    let mut base = u64::from(raw) & !(size - 1);
                    if *wide {
                        base |= u64::from(space.u32(slot.offset + 4)) << 32;
                    }
                    let enabled = *number != 6 || raw & 1 != 0;
                    // All ones is the sizing probe, zero is "not assigned".
                    (command & COMMAND_MEMORY != 0
                        && enabled
                        && base != 0
                        && base != u64::from(u32::MAX) & !(size - 1)
                        && base.checked_add(*size).is_some())
                    .then_some(base)
                }
            };
            if slot.mapped.as_ref().map(|m| m.0) == wanted {
                continue;
            }
            let doorbells = self.iom.doorbells();
            slot.rung.drain(..).for_each(|id| doorbells.take_down(id));
            match slot.mapped.take() {
                Some((_, Mapped::Ports(handle))) => self.iom.unregister(handle),
                Some((_, Mapped::Memory(handle))) => self.pgm.unmap(handle),
                None => {}
            }
            slot.mapped = wanted.map(|base| {
                let mapped = match &slot.bar {
                    Bar::Io { size, widest, handler } => {
                        Mapped::Ports(self.iom.register(Port(base as u16), *size, *widest, handler.clone()))
                    }
                    Bar::Memory { size, backing, .. } => {
                        Mapped::Memory(self.pgm.map(GuestPhys(base), *size, Layer::PciBar, backing.clone()))
                    }
                };
                (base, mapped)
            });
            if let (Some(base), Some((device, gate))) = (wanted, &*bell) {
                slot.rung.extend(slot.bells.iter().map(|bell| {
                    let place = match &slot.bar {
                        Bar::Io { .. } => {
                            Place::Port(Port((base as u16).wrapping_add(bell.offset)), bell.value)
                        }
                        Bar::Memory { .. } => Place::Memory(GuestPhys(base).wrapping_add(bell.offset.into())),
                    };
                    let (device, gate) = (device.clone(), gate.clone());
                    doorbells.put_up(Doorbell { place, number: bell.number, device, gate })
                }));
            }
            if let Some(handler) = handler.upgrade() {
                handler.bar_mapped(*number, wanted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doorbell::{BellDevice, Watcher};
    use crate::iom::PortIo;

    struct Nothing;
    impl PciDevice for Nothing {
        fn config_written(&mut self, _: u8, _: Width, _: &mut ConfigSpace) {}
    }
    impl PortIo for Nothing {
        fn port_read(&mut self, port: Port, _: Width) -> u32 {
            u32::from(port.0)
        }
        fn port_write(&mut self, _: Port, _: Width, _: u32) {}
    }

    fn bus_with_io_bar() -> (Arc<Iom>, Arc<PciBus>) {
        let iom = Iom::new();
        let bus = PciBus::new(iom.clone(), Pgm::new(vec![]));
        let device = Arc::new(Mutex::new(Nothing));
        let space = ConfigSpace::new(&Identity { vendor: 0x8086, device: 0x7010, ..Identity::default() });
        let bar = Bar::Io { size: 16, widest: Width::Dword, handler: device.clone() };
        bus.add(DevFn::new(1, 1), "test", space, vec![(4, bar)], device);
        (iom, bus)
    }

    #[test]
    fn a_bar_tells_its_size_and_moves_with_its_register() {
        let (iom, bus) = bus_with_io_bar();
        let at = DevFn::new(1, 1);
        bus.config_write(at, 0x20, Width::Dword, 0xffff_ffff);
        assert_eq!(bus.config_read(at, 0x20, Width::Dword), 0xffff_fff1);
        bus.config_write(at, 0x20, Width::Dword, 0xc000);
        assert_eq!(iom.read(Port(0xc000), Width::Byte), 0xff);
        bus.config_write(at, reg::COMMAND, Width::Word, COMMAND_IO.into());
        assert_eq!(iom.read(Port(0xc001), Width::Word), 0xc001);
        bus.config_write(at, 0x20, Width::Dword, 0xd000);
        assert_eq!(iom.read(Port(0xc000), Width::Word), 0xffff);
        assert_eq!(iom.read(Port(0xd000), Width::Word), 0xd000);
    }

    /// Where doorbells are up.
    #[derive(Default)]
    struct Up(Mutex<BTreeMap<BellId, (Place, u16)>>);
    impl Up {
        fn places(&self) -> Vec<(Place, u16)> {
            self.0.lock().values().copied().collect()
        }
    }
    impl Watcher for Up {
        fn put_up(&self, id: BellId, doorbell: &Doorbell) {
            self.0.lock().insert(id, (doorbell.place, doorbell.number));
        }
        fn take_down(&self, id: BellId) {
            self.0.lock().remove(&id);
        }
    }
    impl BellDevice for Nothing {
        fn rung(&mut self, _: u16) {}
    }

    #[test]
    fn doorbells_are_up_where_their_bar_is_and_a_later_watcher_hears_of_those_that_are() {
        let (iom, bus) = bus_with_io_bar();
        let at = DevFn::new(1, 1);
        let device: Arc<dyn Bell> = Arc::new(Mutex::new(Nothing));
        let bell = BarBell { bar: 4, offset: 4, value: 7, number: 2 };
        bus.add_doorbells(at, &[bell, BarBell { bar: 5, ..bell }], Arc::downgrade(&device), None);
        let up = Arc::new(Up::default());
        let watcher: Arc<dyn Watcher> = up.clone();
        iom.doorbells().watch(&watcher);
        bus.config_write(at, 0x20, Width::Dword, 0xc000);
        assert_eq!(up.places(), [], "the ports are not switched on");
        bus.config_write(at, reg::COMMAND, Width::Word, COMMAND_IO.into());
        assert_eq!(up.places(), [(Place::Port(Port(0xc004), 7), 2)]);
        bus.config_write(at, 0x20, Width::Dword, 0xd000);
        assert_eq!(up.places(), [(Place::Port(Port(0xd004), 7), 2)]);
        drop((watcher, up));
        let later = Arc::new(Up::default());
        let watcher: Arc<dyn Watcher> = later.clone();
        iom.doorbells().watch(&watcher);
        assert_eq!(later.places(), [(Place::Port(Port(0xd004), 7), 2)]);
        bus.reset();
        assert_eq!(later.places(), []);
    }

    #[test]
    fn doorbells_with_a_gate_are_up_while_it_is_open() {
        let (iom, bus) = bus_with_io_bar();
        let at = DevFn::new(1, 1);
        let device: Arc<dyn Bell> = Arc::new(Mutex::new(Nothing));
        let gate = Arc::new(Gate::default());
        let bell = BarBell { bar: 4, offset: 4, value: 7, number: 2 };
        bus.add_doorbells(at, &[bell], Arc::downgrade(&device), Some(gate.clone()));
        let up = Arc::new(Up::default());
        let watcher: Arc<dyn Watcher> = up.clone();
        iom.doorbells().watch(&watcher);
        bus.config_write(at, 0x20, Width::Dword, 0xc000);
        bus.config_write(at, reg::COMMAND, Width::Word, COMMAND_IO.into());
        assert_eq!(up.places(), []);
        iom.doorbells().set_gate(&gate, true);
        assert_eq!(up.places(), [(Place::Port(Port(0xc004), 7), 2)]);
        bus.config_write(at, 0x20, Width::Dword, 0xd000);
        assert_eq!(up.places(), [(Place::Port(Port(0xd004), 7), 2)]);
        iom.doorbells().set_gate(&Arc::new(Gate::default()), true);
        iom.doorbells().set_gate(&gate, false);
        assert_eq!(up.places(), []);
        drop((watcher, up));
        let later = Arc::new(Up::default());
        let watcher: Arc<dyn Watcher> = later.clone();
        iom.doorbells().watch(&watcher);
        assert_eq!(later.places(), []);
        iom.doorbells().set_gate(&gate, true);
        assert_eq!(later.places(), [(Place::Port(Port(0xd004), 7), 2)]);
        bus.reset();
        assert_eq!(later.places(), []);
    }

    #[test]
    fn an_empty_place_reads_ones_and_identity_cannot_be_written() {
        let (_iom, bus) = bus_with_io_bar();
        assert_eq!(bus.config_read(DevFn::new(9, 0), 0, Width::Dword), 0xffff_ffff);
        bus.config_write(DevFn::new(1, 1), 0, Width::Dword, 0);
        assert_eq!(bus.config_read(DevFn::new(1, 1), 0, Width::Dword), 0x7010_8086);
    }

    #[test]
    fn the_bus_state_survives_saving() {
        let (_iom, bus) = bus_with_io_bar();
        bus.config_write(DevFn::new(1, 1), 0x20, Width::Dword, 0xc000);
        let mut out = ssm::Writer::new();
        bus.save(&mut out);
        let bytes = out.into_bytes();
        let (_iom, other) = bus_with_io_bar();
        other.load(ssm::Reader::new("pci", 1, &bytes)).unwrap();
        assert_eq!(other.config_read(DevFn::new(1, 1), 0x20, Width::Dword), 0xc001);
    }
}
