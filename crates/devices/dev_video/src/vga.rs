//! VirtualBox's VGA adapter (PCI 80ee:beef): a register-compatible IBM VGA with the Bochs VBE interface and a linear frame
//! buffer.
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem"; Bochs VBE interface as in [`vbe`].
//! Ports 0x3b4/0x3b5, 0x3ba, 0x3c0–0x3cf, 0x3d4/0x3d5, 0x3da; 0x1ce–0x1d0. Memory window 0xa0000–0xbffff; BAR 0 is
//! video memory. No interrupt.
//!
//! Left out: the vertical retrace interrupt, light pen, and VirtualBox's host interfaces (HGSMI, VBVA).

mod memory;
mod render;
mod state;
mod vbe;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{DisplayPort, Frame};
use pdm::iom::mmio_handler;
use pdm::pci::{Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, Iom, MmioDevice, PortIo, Width};
use pgm::{Backing, HostMemory, Layer, MapHandle, PAGE_SIZE, Pgm};
use tm::Clock;
use vbox_types::{ByteSize, GuestPhys, Port};

use state::State;

/// PCI vendor and device id.
pub const VENDOR: u16 = 0x80ee;
pub const DEVICE: u16 = 0xbeef;

const WINDOW: GuestPhys = GuestPhys(0xa_0000);
const WINDOW_SIZE: u64 = 0x2_0000;
/// The part of the window that can be memory.
const DIRECT_SIZE: u64 = 0x1_0000;

const MIB: u64 = 1 << 20;
/// Sizes of video memory that the machine's settings allow, as rounded by [`vram_size`].
const SMALLEST: u64 = 8 * MIB;
const LARGEST: u64 = 256 * MIB;

/// The size of video memory for a setting: a power of two from 8 to 256 MB that holds it.
pub fn vram_size(wanted: ByteSize) -> ByteSize {
    ByteSize(wanted.0.clamp(SMALLEST, LARGEST).next_power_of_two())
}

/// The adapter as a device.
pub struct Vga {
    vram: Arc<HostMemory>,
    clock: Arc<Clock>,
    /// Where the windows lie, once the device is registered. It holds the device, not the other way round.
    pgm: Weak<Pgm>,
    /// The window as memory, laid over the one with registers, and what it shows.
    direct: Option<(MapHandle, u64)>,
    state: State,
}

impl Vga {
    /// An adapter with `vram` bytes of video memory, rounded by [`vram_size`].
    pub fn new(vram: ByteSize, clock: Arc<Clock>) -> std::io::Result<Arc<Mutex<Self>>> {
        let vram = Arc::new(HostMemory::new("vram", vram_size(vram))?);
        let state = State::power_on(vram.len());
        Ok(Arc::new(Mutex::new(Self { vram, clock, pgm: Weak::new(), direct: None, state })))
    }

    /// Claims ports and the memory window, and plugs the adapter in at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom, pgm: &Arc<Pgm>, bus: &PciBus, at: DevFn) {
        for (first, count) in [(0x3b4, 2), (0x3ba, 1), (0x3c0, 16), (0x3d4, 2), (0x3da, 1)] {
            iom.register(Port(first), count, Width::Byte, this.clone());
        }
        iom.register(Port(0x1ce), 3, Width::Word, this.clone());
        let vram = {
            let mut vga = this.lock();
            vga.pgm = Arc::downgrade(pgm);
            vga.vram.clone()
        };
        pgm.map(WINDOW, WINDOW_SIZE, Layer::Chipset, Backing::posted(mmio_handler(this, 0)));
        let space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE,
            class: [0x03, 0x00, 0x00],
            ..Identity::default()
        });
        let bar =
            Bar::Memory { size: vram.len(), prefetchable: true, wide: false, backing: Backing::ram(vram, 0) };
        bus.add(at, "vga", space, vec![(0, bar)], this.clone());
    }

    /// The screen as clients see it.
    pub fn display(this: &Arc<Mutex<Self>>) -> Arc<dyn DisplayPort> {
        Arc::new(Screen(Arc::downgrade(this)))
    }

    /// Video memory.
    pub fn vram(&self) -> &Arc<HostMemory> {
        &self.vram
    }

    /// Lets the CPU at memory through the window where that shows it one to one.
    fn sync(&mut self) {
        let Some(pgm) = self.pgm.upgrade() else { return };
        let wanted = self.state.direct_window().filter(|&offset| offset + DIRECT_SIZE <= self.vram.len());
        let backing = |offset| Backing::ram(self.vram.clone(), offset);
        match (self.direct, wanted) {
            (Some((_, shown)), Some(wanted)) if shown == wanted => {}
            (Some((handle, _)), Some(wanted)) => {
                pgm.set_backing(handle, backing(wanted));
                self.direct = Some((handle, wanted));
            }
            (Some((handle, _)), None) => {
                pgm.unmap(handle);
                self.direct = None;
            }
            (None, Some(wanted)) => {
                let handle = pgm.map(WINDOW, DIRECT_SIZE, Layer::Chipset, backing(wanted));
                self.direct = Some((handle, wanted));
            }
            (None, None) => {}
        }
    }

    fn write_vbe(&mut self, port: u16, value: u16) {
        let effects = self.state.vbe.write(port, value);
        if effects.entered {
            self.state.unblank();
        }
        if let Some(len) = effects.clear {
            const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
            for at in (0..len).step_by(ZEROS.len()) {
                let count = (len - at).min(PAGE_SIZE) as usize;
                self.vram.write(at, &ZEROS[..count]);
            }
        }
        if let Some(eight_bits) = effects.dac {
            for byte in &mut self.state.dac {
                *byte = if eight_bits { *byte << 2 } else { *byte >> 2 };
            }
        }
    }

    /// Whether a port write can change what the window shows.
    fn may_remap(port: u16) -> bool {
        matches!(port, 0x3c2 | 0x3c5 | 0x3cf | 0x1cf | 0x1d0)
    }
}

struct Screen(Weak<Mutex<Vga>>);

impl Screen {
    /// The registers and the memory as they are now; drawing then holds no lock.
    fn snapshot(&self) -> Option<(State, Arc<HostMemory>, u64)> {
        let vga = self.0.upgrade()?;
        let pgm = vga.lock().pgm.upgrade();
        if let Some(pgm) = pgm {
            pgm.take_posted();
        }
        let vga = vga.lock();
        Some((vga.state.clone(), vga.vram.clone(), vga.clock.now()))
    }
}

impl DisplayPort for Screen {
    fn frame(&self) -> Frame {
        match self.snapshot() {
            Some((state, vram, now)) => state.draw(&vram, now),
            None => Frame { width: 0, height: 0, pixels: Vec::new() },
        }
    }

    fn text(&self) -> Option<Vec<Vec<u8>>> {
        let (state, vram, _) = self.snapshot()?;
        state.text(&vram)
    }
}

impl PortIo for Vga {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        match (port.0, width) {
            (0x1ce..=0x1d0, _) => self.state.vbe.read(port.0).into(),
            (port, Width::Byte) => self.state.read(port, self.clock.now()).into(),
            _ => width.ones(),
        }
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        match (port.0, width) {
            (0x1ce..=0x1d0, _) => self.write_vbe(port.0, value as u16),
            (port, Width::Byte) => self.state.write(port, value as u8),
            _ => {}
        }
        if Self::may_remap(port.0) {
            self.sync();
        }
    }
}

impl MmioDevice for Vga {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.state.read_window(&self.vram, at);
        }
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            self.state.write_window(&self.vram, at, byte);
        }
    }
}

impl PciDevice for Vga {
    fn config_written(&mut self, _offset: u8, _width: Width, _space: &mut ConfigSpace) {}
}

impl Device for Vga {
    /// Video memory keeps its content, as memory does.
    fn reset(&mut self) {
        self.state = State::power_on(self.vram.len());
        self.sync();
    }
}

impl ssm::Saveable for Vga {
    fn unit_name(&self) -> &'static str {
        "vga"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    /// Video memory is saved as the pages that are not zero.
    fn save(&self, out: &mut ssm::Writer) {
        self.state.save(out);
        out.put_u64(self.vram.len());
        let mut page = [0; PAGE_SIZE as usize];
        let pages = self.vram.len() / PAGE_SIZE;
        let is_used = |page: &[u8]| page.iter().any(|&byte| byte != 0);
        let used = (0..pages)
            .filter(|number| self.vram.read(number * PAGE_SIZE, &mut page) && is_used(&page))
            .collect::<Vec<_>>();
        out.put_u32(used.len() as u32);
        for number in used {
            self.vram.read(number * PAGE_SIZE, &mut page);
            out.put_u32(number as u32);
            out.put_bytes(&page);
        }
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let state = State::load(&mut input, self.vram.len())?;
        let size = input.take_u64()?;
        if size != self.vram.len() {
            return Err(input.invalid(format!("{size} bytes of video memory, not {}", self.vram.len())));
        }
        let pages = self.vram.len() / PAGE_SIZE;
        let count = u64::from(input.take_u32()?);
        if count > pages {
            return Err(input.invalid(format!("{count} pages of video memory")));
        }
        let mut used = Vec::new();
        let mut next = 0;
        for _ in 0..count {
            let number = u64::from(input.take_u32()?);
            if number < next || number >= pages {
                return Err(input.invalid(format!("video memory page {number}")));
            }
            next = number + 1;
            used.push((number, input.take(PAGE_SIZE as usize)?));
        }
        input.finish()?;
        self.state = state;
        let mut used = used.into_iter().peekable();
        for number in 0..pages {
            let content = used.next_if(|&(used, _)| used == number);
            self.vram.write(number * PAGE_SIZE, content.map_or(&[0; PAGE_SIZE as usize], |(_, bytes)| bytes));
        }
        self.sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
