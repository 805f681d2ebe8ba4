//! IOM, the I/O manager: finds the device behind a port, and gives devices their memory-mapped registers.

use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use pgm::MmioHandler;
use vbox_types::{Port, VcpuId};

use crate::doorbell::Doorbells;

/// The width of a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Width {
    Byte = 1,
    Word = 2,
    Dword = 4,
}

impl Width {
    /// The width in bytes.
    pub const fn bytes(self) -> u16 {
        self as u16
    }

    /// All ones of this width: what an open bus gives.
    pub const fn ones(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => 0xffff_ffff,
        }
    }

    /// The width of `bytes` bytes: 1, 2 or 4.
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            _ => None,
        }
    }
}

/// The widest access a device decodes itself; the bus splits wider ones into this width at ascending ports, as ISA bridges
/// do.
pub type IsaWidth = Width;

/// A device with I/O ports.
pub trait PortIo: Send {
    /// Reads `width` at `port` (an absolute port number inside a range the device was registered for). Bits above the
    /// width are ignored. An access the chip does not decode gives all ones.
    fn port_read(&mut self, port: Port, width: Width) -> u32;

    /// Writes `width` at `port`; `value` has no bits above the width. An access the chip does not decode is lost.
    fn port_write(&mut self, port: Port, width: Width, value: u32);

    /// Reads `out.len()` bytes from `port`, `width` at a time (INS). Devices with a data port override it for speed;
    /// the effect must be that of single reads.
    fn port_read_string(&mut self, port: Port, width: Width, out: &mut [u8]) {
        for item in out.chunks_mut(width.bytes() as usize) {
            let value = self.port_read(port, width).to_le_bytes();
            item.copy_from_slice(&value[..item.len()]);
        }
    }

    /// Writes `data` to `port`, `width` at a time (OUTS).
    fn port_write_string(&mut self, port: Port, width: Width, data: &[u8]) {
        for item in data.chunks(width.bytes() as usize) {
            let mut value = [0; 4];
            value[..item.len()].copy_from_slice(item);
            self.port_write(port, width, u32::from_le_bytes(value));
        }
    }
}

/// Object form of [`PortIo`], implemented by `Mutex<D>`; also for things that need no lock.
pub trait PortHandler: Send + Sync {
    fn read(&self, port: Port, width: Width) -> u32;
    fn write(&self, port: Port, width: Width, value: u32);
    fn read_string(&self, port: Port, width: Width, out: &mut [u8]);
    fn write_string(&self, port: Port, width: Width, data: &[u8]);
}

impl<D: PortIo> PortHandler for Mutex<D> {
    fn read(&self, port: Port, width: Width) -> u32 {
        self.lock().port_read(port, width)
    }

    fn write(&self, port: Port, width: Width, value: u32) {
        self.lock().port_write(port, width, value);
    }

    fn read_string(&self, port: Port, width: Width, out: &mut [u8]) {
        self.lock().port_read_string(port, width, out);
    }

    fn write_string(&self, port: Port, width: Width, data: &[u8]) {
        self.lock().port_write_string(port, width, data);
    }
}

/// A device with memory-mapped registers. `region` is the number given to [`mmio_handler`].
pub trait MmioDevice: Send {
    /// Fills `data` (1 to 8 bytes) from `offset` bytes into the region. What the chip does not decode reads as ones.
    fn mmio_read(&mut self, region: u32, offset: u64, data: &mut [u8]);
    /// Takes `data` (1 to 8 bytes) at `offset` bytes into the region.
    fn mmio_write(&mut self, region: u32, offset: u64, data: &[u8]);
}

struct MmioShell<D> {
    device: Arc<Mutex<D>>,
    region: u32,
}

impl<D: MmioDevice> MmioHandler for MmioShell<D> {
    fn mmio_read(&self, _vcpu: VcpuId, offset: u64, data: &mut [u8]) {
        self.device.lock().mmio_read(self.region, offset, data);
    }

    fn mmio_write(&self, _vcpu: VcpuId, offset: u64, data: &[u8]) {
        self.device.lock().mmio_write(self.region, offset, data);
    }
}

/// The handler through which `pgm` reaches region number `region` of a device.
pub fn mmio_handler<D: MmioDevice + 'static>(device: &Arc<Mutex<D>>, region: u32) -> Arc<dyn MmioHandler> {
    Arc::new(MmioShell { device: device.clone(), region })
}

/// Names a registered port range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortHandle(u64);

#[derive(Clone)]
struct PortRange {
    id: u64,
    first: u16,
    /// Last port of the range.
    last: u16,
    widest: Width,
    handler: Arc<dyn PortHandler>,
}

/// The I/O port space of one VM.
pub struct Iom {
    ranges: ArcSwap<Vec<PortRange>>,
    /// For each port the index into `ranges` plus one, or zero: one load to find a device.
    table: ArcSwap<Box<[u16]>>,
    change: Mutex<u64>,
    doorbells: Arc<Doorbells>,
}

impl Iom {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            ranges: ArcSwap::from_pointee(Vec::new()),
            table: ArcSwap::from_pointee(vec![0; 0x1_0000].into_boxed_slice()),
            change: Mutex::new(0),
            doorbells: Arc::default(),
        })
    }

    /// The registers among ports and memory whose writes an engine may take by itself.
    pub fn doorbells(&self) -> &Arc<Doorbells> {
        &self.doorbells
    }

    /// Gives `count` ports from `first` on to `handler`. Accesses wider than `widest` are split. The latest
    /// registration wins where ranges overlap.
    pub fn register(
        &self,
        first: Port,
        count: u16,
        widest: Width,
        handler: Arc<dyn PortHandler>,
    ) -> PortHandle {
        let mut id = self.change.lock();
        *id += 1;
        let mut ranges = Vec::clone(&self.ranges.load());
        let last = first.0.saturating_add(count.max(1) - 1);
        ranges.push(PortRange { id: *id, first: first.0, last, widest, handler });
        self.publish(ranges);
        PortHandle(*id)
    }

    /// Takes a range back.
    pub fn unregister(&self, handle: PortHandle) {
        let _change = self.change.lock();
        let mut ranges = Vec::clone(&self.ranges.load());
        ranges.retain(|r| r.id != handle.0);
        self.publish(ranges);
    }

    fn publish(&self, ranges: Vec<PortRange>) {
        let mut table = vec![0u16; 0x1_0000].into_boxed_slice();
        for (index, range) in ranges.iter().enumerate() {
            table[usize::from(range.first)..=usize::from(range.last)].fill(index as u16 + 1);
        }
        // Readers take the table first and then the ranges; an index that does not fit is checked below.
        self.ranges.store(Arc::new(ranges));
        self.table.store(Arc::new(table));
    }

    fn find(&self, port: Port) -> Option<PortRange> {
        let index = self.table.load()[usize::from(port.0)];
        let ranges = self.ranges.load();
        let range = ranges.get(usize::from(index.checked_sub(1)?))?;
        (range.first <= port.0 && port.0 <= range.last).then(|| range.clone())
    }

    /// IN: reads `width` at `port`; all ones where no device is.
    pub fn read(&self, port: Port, width: Width) -> u32 {
        let Some(range) = self.find(port) else {
            tracing::trace!(target: "iom", %port, ?width, "read of an unclaimed port");
            return width.ones();
        };
        if width <= range.widest {
            return range.handler.read(port, width) & width.ones();
        }
        let step = range.widest.bytes();
        let mut value = 0;
        for (i, at) in (0..width.bytes()).step_by(step.into()).enumerate() {
            let part = self.read(Port(port.0.wrapping_add(at)), range.widest);
            value |= part << (8 * step as u32 * i as u32);
        }
        value
    }

    /// OUT: writes `width` at `port`; lost where no device is.
    pub fn write(&self, port: Port, width: Width, value: u32) {
        let value = value & width.ones();
        let Some(range) = self.find(port) else {
            tracing::trace!(target: "iom", %port, ?width, value, "write to an unclaimed port");
            return;
        };
        if width <= range.widest {
            range.handler.write(port, width, value);
            return;
        }
        let step = range.widest.bytes();
        for (i, at) in (0..width.bytes()).step_by(step.into()).enumerate() {
            let part = value >> (8 * step as u32 * i as u32);
            self.write(Port(port.0.wrapping_add(at)), range.widest, part & range.widest.ones());
        }
    }

    /// INS: fills `out` from `port`, `width` at a time, in one go.
    pub fn read_string(&self, port: Port, width: Width, out: &mut [u8]) {
        match self.find(port) {
            Some(range) if width <= range.widest => range.handler.read_string(port, width, out),
            _ => {
                for item in out.chunks_mut(width.bytes().into()) {
                    let value = self.read(port, width).to_le_bytes();
                    item.copy_from_slice(&value[..item.len()]);
                }
            }
        }
    }

    /// OUTS: writes `data` to `port`, `width` at a time, in one go.
    pub fn write_string(&self, port: Port, width: Width, data: &[u8]) {
        match self.find(port) {
            Some(range) if width <= range.widest => range.handler.write_string(port, width, data),
            _ => {
                for item in data.chunks(width.bytes().into()) {
                    let mut value = [0; 4];
                    value[..item.len()].copy_from_slice(item);
                    self.write(port, width, u32::from_le_bytes(value));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Log(Vec<(u16, Width, u32)>);
    impl PortIo for Log {
        fn port_read(&mut self, port: Port, _width: Width) -> u32 {
            u32::from(port.0)
        }
        fn port_write(&mut self, port: Port, width: Width, value: u32) {
            self.0.push((port.0, width, value));
        }
    }

    #[test]
    fn wide_accesses_to_a_byte_device_are_split_upwards() {
        let iom = Iom::new();
        let log = Arc::new(Mutex::new(Log(vec![])));
        iom.register(Port(0x40), 4, Width::Byte, log.clone());
        iom.write(Port(0x42), Width::Dword, 0x4433_2211);
        assert_eq!(log.lock().0, [(0x42, Width::Byte, 0x11), (0x43, Width::Byte, 0x22)]);
        assert_eq!(iom.read(Port(0x43), Width::Word), 0xff43);
    }

    #[test]
    fn unclaimed_ports_read_ones_and_freed_ranges_are_unclaimed() {
        let iom = Iom::new();
        let handle = iom.register(Port(0x80), 1, Width::Byte, Arc::new(Mutex::new(Log(vec![]))));
        assert_eq!(iom.read(Port(0x80), Width::Byte), 0x80);
        iom.unregister(handle);
        assert_eq!(iom.read(Port(0x80), Width::Byte), 0xff);
        assert_eq!(iom.read(Port(0xffff), Width::Dword), 0xffff_ffff);
    }
}
