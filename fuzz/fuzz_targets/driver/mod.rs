//! Drives devices through their registers: bytes become port and memory accesses, the passing of time, resets and saved
//! states.

use std::sync::Arc;

use parking_lot::Mutex;
use pdm::{Device, Iom, Width};
use pgm::{Pgm, Target};
use ssm::{Reader, Writer};
use tm::{Clock, TimerQueue};
use vbox_types::{GuestPhys, Port, VcpuId};

/// A byte string that gives zeros after its end.
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }
}

/// A device with the name of its unit for messages.
pub type Handle = Arc<Mutex<dyn Device>>;

/// A machine of the devices under test.
pub struct Bench {
    pub clock: Arc<Clock>,
    pub timers: Arc<TimerQueue>,
    pub iom: Arc<Iom>,
    pub pgm: Arc<Pgm>,
    pub devices: Vec<Handle>,
    /// Port ranges that accesses go to: first port and number.
    pub ports: Vec<(u16, u16)>,
    /// Memory ranges that accesses go to: address and size.
    pub memory: Vec<(u64, u64)>,
}

impl Bench {
    pub fn new() -> Self {
        let clock = Clock::manual();
        Self {
            timers: TimerQueue::new(clock.clone()),
            clock,
            iom: Iom::new(),
            pgm: Pgm::new(vec![]),
            devices: Vec::new(),
            ports: Vec::new(),
            memory: Vec::new(),
        }
    }

    fn port(&self, bytes: &mut Bytes<'_>) -> Port {
        let choice = usize::from(bytes.u8());
        let total: usize = self.ports.iter().map(|range| usize::from(range.1)).sum();
        let mut rest = choice % total.max(1);
        for &(first, count) in &self.ports {
            if rest < usize::from(count) {
                return Port(first + rest as u16);
            }
            rest -= usize::from(count);
        }
        Port(0x80)
    }

    fn address(&self, bytes: &mut Bytes<'_>) -> Option<GuestPhys> {
        let choice = usize::from(bytes.u8());
        let offset = u64::from(bytes.u32());
        let (start, size) = *self.memory.get(choice % self.memory.len().max(1))?;
        Some(GuestPhys(start + offset % size))
    }

    /// Performs one operation that every bench has; `special` performs those above.
    pub fn step(&mut self, bytes: &mut Bytes<'_>, special: &mut dyn FnMut(u8, &mut Bytes<'_>)) {
        let op = bytes.u8();
        let width = match op >> 6 {
            0 => Width::Byte,
            1 => Width::Word,
            _ => Width::Dword,
        };
        match op & 0x0f {
            0..=2 => {
                let port = self.port(bytes);
                self.iom.read(port, width);
            }
            3..=6 => {
                let port = self.port(bytes);
                let value = if width == Width::Byte { bytes.u8().into() } else { bytes.u32() };
                self.iom.write(port, width, value);
            }
            7 | 8 => {
                let Some(address) = self.address(bytes) else { return };
                let mut data = [0xa5; 8];
                let view = self.pgm.resolve(address);
                let len = (1usize << (op >> 6)).min(view.len as usize);
                if op & 0x0f == 7 {
                    match view.read {
                        Target::Mmio { handler, offset } => {
                            handler.mmio_read(VcpuId(0), offset, &mut data[..len]);
                        }
                        _ => self.pgm.read(address, &mut data[..len]),
                    }
                } else {
                    data[0] = bytes.u8();
                    match view.write {
                        Target::Mmio { handler, offset } => {
                            handler.mmio_write(VcpuId(0), offset, &data[..len]);
                        }
                        _ => self.pgm.write(address, &data[..len]),
                    }
                }
            }
            9 | 10 => {
                // From nanoseconds to minutes.
                let step = u64::from(bytes.u16()) << (bytes.u8() % 22);
                self.clock.advance(step);
                self.timers.fire_due();
            }
            11 => {
                if bytes.u8() & 0x1f == 0 {
                    self.devices.iter().for_each(|device| device.lock().reset());
                }
            }
            12 => self.save_and_load(bytes),
            _ => special(op >> 4, bytes),
        }
    }

    /// Saves a device, damages a byte of it or not, and loads it again.
    fn save_and_load(&mut self, bytes: &mut Bytes<'_>) {
        let index = usize::from(bytes.u8()) % self.devices.len().max(1);
        let Some(device) = self.devices.get(index) else { return };
        let mut device = device.lock();
        let (name, version) = (device.unit_name(), device.unit_version());
        let before = save(&*device);
        let mut damaged = before.clone();
        let at = usize::from(bytes.u16());
        let with = bytes.u8();
        if let Some(byte) = damaged.get_mut(at) {
            *byte ^= with;
        }
        match device.load(Reader::new(name, version, &damaged)) {
            Ok(()) if damaged == before => assert_eq!(save(&*device), before, "{name}: save, load, save"),
            Ok(()) => {}
            Err(error) => {
                assert!(damaged != before, "{name} refuses its own state: {error}");
                assert_eq!(save(&*device), before, "{name}: a failed load changed the device");
            }
        }
    }
}

fn save(device: &dyn Device) -> Vec<u8> {
    let mut out = Writer::new();
    device.save(&mut out);
    out.into_bytes()
}
