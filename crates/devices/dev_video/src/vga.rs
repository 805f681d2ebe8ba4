//! VirtualBox's VGA adapter (PCI 80ee:beef) with the Bochs VBE extension.
//!
//! Sources: IBM VGA Technical Reference; the FreeVGA project's register descriptions; Bochs "VBE Display Adapter" interface, version 5.
//!
//! | resource | use |
//! |---|---|
//! | ports 0x3b4–0x3b5, 0x3ba, 0x3c0–0x3cf, 0x3d4–0x3d5, 0x3da | VGA registers (the 0x3bx or 0x3dx half by Miscellaneous Output bit 0) |
//! | ports 0x1ce, 0x1cf, 0x1d0 | VBE index and data |
//! | memory 0xa0000–0xbffff | window into the planes |
//! | BAR 0 | video memory, linear |
//!
//! Left out: the VGA's own interrupt (no PC wires it), light pen, and VirtualBox's HGSMI channel: a guest driver that asks for the
//! DISPI id 0xbe00 and up finds an older adapter.

use std::sync::Arc;

use parking_lot::Mutex;
use pdm::connector::{DisplayPort, Frame};
use pdm::pci::{Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, Iom, MmioDevice, PortIo, Width};
use pgm::{Backing, HostMemory, Layer, Pgm};
use ssm::Saveable;
use tm::Clock;
use vbox_types::{ByteSize, GuestPhys, Port};

use crate::spec::{attr, crtc, dispi, gfx, seq};
use crate::{planar, render};

/// The legacy window.
pub const WINDOW: GuestPhys = GuestPhys(0xa_0000);
pub const WINDOW_SIZE: u64 = 0x2_0000;
/// Size limits of video memory.
pub const VRAM_MIN: ByteSize = ByteSize::mib(1);
pub const VRAM_MAX: ByteSize = ByteSize::mib(256);

/// Scan lines of a frame in the 70 Hz modes, shown and total, and the time of one in nanoseconds (31.469 kHz).
const LINES_SHOWN: u64 = 400;
const LINES_TOTAL: u64 = 449;
const LINE_NANOS: u64 = 31_778;
/// Part of a line in which the beam is on, in 1/100.
const LINE_ON: u64 = 80;
const PAGE: usize = 4096;

/// What the guest can see and change, video memory apart.
#[derive(Clone, PartialEq, Eq)]
pub struct State {
    pub(crate) misc_output: u8,
    pub(crate) feature: u8,
    pub(crate) seq_index: u8,
    pub(crate) seq: [u8; seq::COUNT],
    pub(crate) gfx_index: u8,
    pub(crate) gfx: [u8; gfx::COUNT],
    pub(crate) crtc_index: u8,
    pub(crate) crtc: [u8; crtc::COUNT],
    /// With the "screen on" bit.
    pub(crate) attr_index: u8,
    /// The next write to 0x3c0 is data.
    pub(crate) attr_data_next: bool,
    pub(crate) attr: [u8; attr::COUNT],
    pub(crate) dac: [[u8; 3]; 256],
    pub(crate) dac_mask: u8,
    pub(crate) dac_write: u8,
    pub(crate) dac_read: u8,
    /// Color component that the next access concerns.
    pub(crate) dac_component: u8,
    /// The last index written was for reading (port 0x3c7 tells).
    pub(crate) dac_reading: bool,
    /// The component values written so far.
    pub(crate) dac_pending: [u8; 3],
    /// The four planes' bytes of the last read.
    pub(crate) latch: u32,
    pub(crate) vbe_index: u16,
    pub(crate) vbe: [u16; dispi::COUNT],
}

impl State {
    /// After reset. Mode registers are zero until the video BIOS sets a mode.
    pub fn power_on() -> Self {
        let mut vbe = [0; dispi::COUNT];
        vbe[dispi::ID] = dispi::ID_LAST;
        Self {
            misc_output: 0,
            feature: 0,
            seq_index: 0,
            seq: [0; seq::COUNT],
            gfx_index: 0,
            gfx: [0; gfx::COUNT],
            crtc_index: 0,
            crtc: [0; crtc::COUNT],
            attr_index: 0,
            attr_data_next: false,
            attr: [0; attr::COUNT],
            dac: [[0; 3]; 256],
            dac_mask: 0xff,
            dac_write: 0,
            dac_read: 0,
            dac_component: 0,
            dac_reading: false,
            dac_pending: [0; 3],
            latch: 0,
            vbe_index: 0,
            vbe,
        }
    }

    /// Start of the bank that the 64 KiB window shows in VBE modes.
    pub(crate) fn bank_offset(&self) -> u64 {
        if self.vbe[dispi::ENABLE] & dispi::ENABLED != 0 { u64::from(self.vbe[dispi::BANK]) << 16 } else { 0 }
    }

    pub(crate) fn dac_is_8bit(&self) -> bool {
        self.vbe[dispi::ENABLE] & dispi::EIGHT_BIT_DAC != 0
    }

    /// Bytes from one line to the next in a VBE mode (plane bytes at 4 bits per pixel).
    pub(crate) fn vbe_pitch(&self) -> u32 {
        let width = u32::from(self.vbe[dispi::VIRT_WIDTH].max(self.vbe[dispi::XRES]));
        match self.vbe[dispi::BPP] {
            4 => width / 8,
            bpp => width * u32::from(bpp).div_ceil(8),
        }
    }

    /// Input Status 1: retrace and display-enable, from where the beam is at `now`.
    fn input_status_1(&self, now: u64) -> u8 {
        let line = now / LINE_NANOS % LINES_TOTAL;
        let retrace = (LINES_SHOWN + 12..LINES_SHOWN + 14).contains(&line);
        let dark = line >= LINES_SHOWN || now % LINE_NANOS * 100 / LINE_NANOS >= LINE_ON;
        u8::from(retrace) << 3 | u8::from(dark)
    }

    /// Reads a VGA register; `port` is in the color range.
    fn read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            0x3c0 => self.attr_index,
            0x3c1 => self.attr.get(usize::from(self.attr_index & 0x1f)).copied().unwrap_or(0),
            // Input Status 0: bit 4 tells a monitor is there.
            0x3c2 => 0x10,
            0x3c4 => self.seq_index,
            0x3c5 => self.seq.get(usize::from(self.seq_index)).copied().unwrap_or(0),
            0x3c6 => self.dac_mask,
            0x3c7 => {
                if self.dac_reading {
                    3
                } else {
                    0
                }
            }
            0x3c8 => self.dac_write,
            0x3c9 => {
                let value = self.dac[usize::from(self.dac_read)][usize::from(self.dac_component)];
                self.dac_component += 1;
                if self.dac_component == 3 {
                    self.dac_component = 0;
                    self.dac_read = self.dac_read.wrapping_add(1);
                }
                value
            }
            0x3ca => self.feature,
            0x3cc => self.misc_output,
            0x3ce => self.gfx_index,
            0x3cf => self.gfx.get(usize::from(self.gfx_index)).copied().unwrap_or(0),
            0x3d4 => self.crtc_index,
            0x3d5 => self.crtc.get(usize::from(self.crtc_index)).copied().unwrap_or(0),
            0x3da => {
                self.attr_data_next = false;
                self.input_status_1(now)
            }
            _ => 0xff,
        }
    }

    /// Writes a VGA register; `port` is in the color range.
    fn write(&mut self, port: u16, value: u8) {
        match port {
            0x3c0 => {
                if self.attr_data_next {
                    if let Some(r) = self.attr.get_mut(usize::from(self.attr_index & 0x1f)) {
                        *r = value;
                    }
                } else {
                    self.attr_index = value & 0x3f;
                }
                self.attr_data_next = !self.attr_data_next;
            }
            0x3c2 => self.misc_output = value,
            0x3c4 => self.seq_index = value & 7,
            0x3c5 => {
                const MASK: [u8; seq::COUNT] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e];
                let index = usize::from(self.seq_index);
                if let Some(r) = self.seq.get_mut(index) {
                    *r = value & MASK[index];
                }
            }
            0x3c6 => self.dac_mask = value,
            0x3c7 => (self.dac_read, self.dac_component, self.dac_reading) = (value, 0, true),
            0x3c8 => (self.dac_write, self.dac_component, self.dac_reading) = (value, 0, false),
            0x3c9 => {
                self.dac_pending[usize::from(self.dac_component)] = value;
                self.dac_component += 1;
                if self.dac_component == 3 {
                    self.dac_component = 0;
                    self.dac[usize::from(self.dac_write)] = self.dac_pending;
                    self.dac_write = self.dac_write.wrapping_add(1);
                }
            }
            0x3ce => self.gfx_index = value & 0x0f,
            0x3cf => {
                const MASK: [u8; gfx::COUNT] = [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff];
                let index = usize::from(self.gfx_index);
                if let Some(r) = self.gfx.get_mut(index) {
                    *r = value & MASK[index];
                }
            }
            0x3d4 => self.crtc_index = value,
            0x3d5 => {
                let index = usize::from(self.crtc_index);
                let protected = self.crtc[crtc::V_RETRACE_END] & 0x80 != 0 && index <= crtc::OVERFLOW;
                match self.crtc.get_mut(index) {
                    // Write protection spares the line-compare bit.
                    Some(r) if protected && index == crtc::OVERFLOW => *r = *r & !0x10 | value & 0x10,
                    Some(r) if !protected => *r = value,
                    _ => {}
                }
            }
            0x3da => self.feature = value,
            _ => {}
        }
    }

    fn vbe_read(&self, vram: u64) -> u16 {
        let caps = self.vbe[dispi::ENABLE] & dispi::GET_CAPS != 0;
        match usize::from(self.vbe_index) {
            dispi::XRES if caps => dispi::MAX_XRES,
            dispi::YRES if caps => dispi::MAX_YRES,
            dispi::BPP if caps => dispi::MAX_BPP,
            dispi::VIRT_HEIGHT => {
                let pitch = u64::from(self.vbe_pitch()).max(1);
                u16::try_from(vram / pitch).unwrap_or(u16::MAX)
            }
            dispi::VIDEO_MEMORY_64K => (vram >> 16) as u16,
            index => self.vbe.get(index).copied().unwrap_or(0),
        }
    }

    /// Writes a VBE register; true if video memory has to be cleared.
    fn vbe_write(&mut self, value: u16, vram: u64) -> bool {
        let enabled = self.vbe[dispi::ENABLE] & dispi::ENABLED != 0;
        match usize::from(self.vbe_index) {
            dispi::ID if (dispi::ID_FIRST..=dispi::ID_LAST).contains(&value) => self.vbe[dispi::ID] = value,
            dispi::XRES if value <= dispi::MAX_XRES => self.vbe[dispi::XRES] = value & !7,
            dispi::YRES if value <= dispi::MAX_YRES => self.vbe[dispi::YRES] = value,
            dispi::BPP if matches!(value, 0 | 4 | 8 | 15 | 16 | 24 | 32) => {
                self.vbe[dispi::BPP] = if value == 0 { 8 } else { value };
            }
            dispi::BANK if u64::from(value) << 16 < vram => self.vbe[dispi::BANK] = value,
            dispi::VIRT_WIDTH => self.vbe[dispi::VIRT_WIDTH] = value.max(self.vbe[dispi::XRES]) & !7,
            index @ (dispi::X_OFFSET | dispi::Y_OFFSET) => self.vbe[index] = value,
            dispi::ENABLE => {
                self.vbe[dispi::ENABLE] = value;
                if value & dispi::ENABLED != 0 && !enabled {
                    self.vbe_enter(vram);
                    return value & dispi::NO_CLEAR == 0;
                }
                if value & dispi::ENABLED == 0 {
                    self.vbe[dispi::BANK] = 0;
                }
            }
            _ => {}
        }
        false
    }

    /// A VBE mode was switched on: the window must show it as the guest's BIOS expects.
    fn vbe_enter(&mut self, vram: u64) {
        let r = &mut self.vbe;
        r[dispi::VIRT_WIDTH] = r[dispi::XRES];
        r[dispi::X_OFFSET] = 0;
        r[dispi::Y_OFFSET] = 0;
        r[dispi::BANK] = 0;
        // A mode that does not fit is shown as far as memory goes.
        if u64::from(self.vbe_pitch()) * u64::from(self.vbe[dispi::YRES]) > vram {
            tracing::warn!(target: "vga", "a VBE mode of {}x{}x{} exceeds the video memory of {vram} bytes",
                self.vbe[dispi::XRES], self.vbe[dispi::YRES], self.vbe[dispi::BPP]);
        }
        self.gfx[gfx::MISC] = self.gfx[gfx::MISC] & !0x0c | 0x05;
        self.crtc[crtc::MODE] |= 3;
        self.seq[seq::CLOCKING] &= !seq::SCREEN_OFF;
        self.attr_index |= attr::SCREEN_ON;
        if self.vbe[dispi::BPP] == 4 {
            self.seq[seq::MEMORY_MODE] &= !seq::CHAIN4;
            self.gfx[gfx::MODE] &= !(gfx::ODD_EVEN | 0x60);
        } else {
            self.seq[seq::MEMORY_MODE] |= seq::CHAIN4;
            self.seq[seq::MAP_MASK] = 0x0f;
            self.gfx[gfx::MODE] = self.gfx[gfx::MODE] & !0x60 | 0x40;
        }
    }
}

/// The adapter.
pub struct Vga {
    clock: Arc<Clock>,
    vram: Arc<HostMemory>,
    state: State,
}

impl Vga {
    /// `vram` is rounded up to a power of two within the limits.
    pub fn new(vram: ByteSize, clock: Arc<Clock>) -> std::io::Result<Arc<Mutex<Self>>> {
        let size = vram.0.clamp(VRAM_MIN.0, VRAM_MAX.0).next_power_of_two();
        let vram = Arc::new(HostMemory::new("vram", ByteSize(size))?);
        Ok(Arc::new(Mutex::new(Self { clock, vram, state: State::power_on() })))
    }

    /// The linear frame buffer's memory.
    pub fn vram(&self) -> &Arc<HostMemory> {
        &self.vram
    }

    /// Claims ports, window and the PCI function at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom, pgm: &Pgm, pci: &PciBus, at: DevFn) {
        for (first, count) in [(0x3b4, 2), (0x3ba, 1), (0x3c0, 16), (0x3d4, 2), (0x3da, 1)] {
            iom.register(Port(first), count, Width::Byte, this.clone());
        }
        iom.register(Port(0x1ce), 3, Width::Word, this.clone());
        let window = Backing::mmio(pdm::iom::mmio_handler(this, 0));
        pgm.map(WINDOW, WINDOW_SIZE, Layer::Chipset, window);
        let vram = this.lock().vram.clone();
        let space = ConfigSpace::new(&Identity {
            vendor: 0x80ee,
            device: 0xbeef,
            class: [0x03, 0x00, 0x00],
            ..Identity::default()
        });
        let bar =
            Bar::Memory { size: vram.len(), prefetchable: true, wide: false, backing: Backing::ram(vram, 0) };
        pci.add(at, "vga", space, vec![(0, bar)], this.clone());
    }

    /// The adapter as clients see it.
    pub fn display(this: &Arc<Mutex<Self>>) -> Arc<dyn DisplayPort> {
        Arc::new(Display(this.clone()))
    }
}

struct Display(Arc<Mutex<Vga>>);

impl DisplayPort for Display {
    fn frame(&self) -> Frame {
        let (state, vram, now) = {
            let vga = self.0.lock();
            (vga.state.clone(), vga.vram.clone(), vga.clock.now())
        };
        render::frame(&state, &vram, now / (LINE_NANOS * LINES_TOTAL))
    }

    fn text(&self) -> Option<Vec<Vec<u8>>> {
        let (state, vram) = {
            let vga = self.0.lock();
            (vga.state.clone(), vga.vram.clone())
        };
        render::characters(&state, &vram)
    }
}

impl PortIo for Vga {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        match port.0 {
            0x1ce => self.state.vbe_index.into(),
            0x1cf | 0x1d0 => self.state.vbe_read(self.vram.len()).into(),
            port => {
                let color = self.state.misc_output & 1 != 0;
                match (port & 0xff0, color) {
                    (0x3b0, true) | (0x3d0, false) => width.ones(),
                    (0x3b0, false) => self.state.read(port + 0x20, self.clock.now()).into(),
                    _ => self.state.read(port, self.clock.now()).into(),
                }
            }
        }
    }

    fn port_write(&mut self, port: Port, _width: Width, value: u32) {
        match port.0 {
            0x1ce => self.state.vbe_index = value as u16,
            0x1cf | 0x1d0 => {
                if self.state.vbe_write(value as u16, self.vram.len()) {
                    let zeros = [0; PAGE];
                    for page in 0..self.vram.len() / PAGE as u64 {
                        self.vram.write(page * PAGE as u64, &zeros);
                    }
                }
            }
            port => {
                let color = self.state.misc_output & 1 != 0;
                match (port & 0xff0, color) {
                    (0x3b0, true) | (0x3d0, false) => {}
                    (0x3b0, false) => self.state.write(port + 0x20, value as u8),
                    _ => self.state.write(port, value as u8),
                }
            }
        }
    }
}

impl MmioDevice for Vga {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = planar::read(&mut self.state, &self.vram, offset + i as u64);
        }
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            planar::write(&self.state, &self.vram, offset + i as u64, *byte);
        }
    }
}

impl PciDevice for Vga {
    fn config_written(&mut self, _: u8, _: Width, _: &mut ConfigSpace) {}
}

impl Device for Vga {
    fn reset(&mut self) {
        self.state = State::power_on();
    }
}

impl Saveable for Vga {
    fn unit_name(&self) -> &'static str {
        "vga"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State {
            misc_output,
            feature,
            seq_index,
            seq,
            gfx_index,
            gfx,
            crtc_index,
            crtc,
            attr_index,
            attr_data_next,
            attr,
            dac,
            dac_mask,
            dac_write,
            dac_read,
            dac_component,
            dac_reading,
            dac_pending,
            latch,
            vbe_index,
            vbe,
        } = &self.state;
        for byte in [misc_output, feature, seq_index, gfx_index, crtc_index, attr_index] {
            out.put_u8(*byte);
        }
        out.put_bytes(seq);
        out.put_bytes(gfx);
        out.put_bytes(crtc);
        out.put_bytes(attr);
        out.put_bool(*attr_data_next);
        out.put_bytes(dac.as_flattened());
        for byte in [dac_mask, dac_write, dac_read, dac_component] {
            out.put_u8(*byte);
        }
        out.put_bool(*dac_reading);
        out.put_bytes(dac_pending);
        out.put_u32(*latch);
        out.put_u16(*vbe_index);
        for word in vbe {
            out.put_u16(*word);
        }
        // Video memory: the pages that are not all zero.
        out.put_u64(self.vram.len());
        let mut page = [0; PAGE];
        for number in 0..self.vram.len() / PAGE as u64 {
            self.vram.read(number * PAGE as u64, &mut page);
            if page != [0; PAGE] {
                out.put_u32(number as u32);
                out.put_bytes(&page);
            }
        }
        out.put_u32(u32::MAX);
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let mut s = State::power_on();
        for byte in [
            &mut s.misc_output,
            &mut s.feature,
            &mut s.seq_index,
            &mut s.gfx_index,
            &mut s.crtc_index,
            &mut s.attr_index,
        ] {
            *byte = input.take_u8()?;
        }
        input.take_into(&mut s.seq)?;
        input.take_into(&mut s.gfx)?;
        input.take_into(&mut s.crtc)?;
        input.take_into(&mut s.attr)?;
        s.attr_data_next = input.take_bool()?;
        input.take_into(s.dac.as_flattened_mut())?;
        for byte in [&mut s.dac_mask, &mut s.dac_write, &mut s.dac_read, &mut s.dac_component] {
            *byte = input.take_u8()?;
        }
        s.dac_reading = input.take_bool()?;
        input.take_into(&mut s.dac_pending)?;
        s.latch = input.take_u32()?;
        s.vbe_index = input.take_u16()?;
        for word in &mut s.vbe {
            *word = input.take_u16()?;
        }
        if s.dac_component > 2 {
            return Err(input.invalid("the DAC's component counter is out of range"));
        }
        let size = input.take_u64()?;
        if size != self.vram.len() {
            return Err(input
                .invalid(format!("it has {size} bytes of video memory, the machine {}", self.vram.len())));
        }
        let mut pages = Vec::new();
        loop {
            let number = input.take_u32()?;
            if number == u32::MAX {
                break;
            }
            if u64::from(number) >= size / PAGE as u64 {
                return Err(input.invalid("a page lies outside the video memory"));
            }
            pages.push((number, input.take(PAGE)?));
        }
        input.finish()?;
        self.state = s;
        let mut next = pages.into_iter().peekable();
        for number in 0..size / PAGE as u64 {
            let at = number * PAGE as u64;
            match next.next_if(|(n, _)| u64::from(*n) == number) {
                Some((_, bytes)) => self.vram.write(at, bytes),
                None => self.vram.write(at, &[0; PAGE]),
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vga() -> Arc<Mutex<Vga>> {
        let vga = Vga::new(ByteSize::mib(8), Clock::manual()).unwrap();
        vga.lock().port_write(Port(0x3c2), Width::Byte, 1);
        vga
    }

    fn indexed(vga: &mut Vga, port: u16, index: u8, value: u8) {
        vga.port_write(Port(port), Width::Byte, index.into());
        vga.port_write(Port(port + 1), Width::Byte, value.into());
    }

    fn attribute(vga: &mut Vga, index: u8, value: u8) {
        vga.port_read(Port(0x3da), Width::Byte);
        vga.port_write(Port(0x3c0), Width::Byte, index.into());
        vga.port_write(Port(0x3c0), Width::Byte, value.into());
    }

    fn vbe(vga: &mut Vga, index: usize, value: u16) {
        vga.port_write(Port(0x1ce), Width::Word, index as u32);
        vga.port_write(Port(0x1cf), Width::Word, value.into());
    }

    /// 80x25 text with 9-dot cells, one glyph ('A' is a full block), white on black.
    fn text_mode(vga: &mut Vga) {
        indexed(vga, 0x3c4, 2, 4);
        indexed(vga, 0x3c4, 4, 6);
        indexed(vga, 0x3ce, 5, 0);
        indexed(vga, 0x3ce, 6, 4);
        indexed(vga, 0x3ce, 8, 0xff);
        for line in 0..16 {
            vga.mmio_write(0, 0x41 * 32 + line, &[0xff]);
        }
        indexed(vga, 0x3c4, 2, 3);
        indexed(vga, 0x3c4, 4, 2);
        indexed(vga, 0x3ce, 5, 0x10);
        indexed(vga, 0x3ce, 6, 0x0e);
        for (index, value) in
            [(1, 79), (0x12, 0x8f), (7, 2), (9, 0x4f), (0x13, 40), (0x18, 0xff), (0x0a, 0x20)]
        {
            indexed(vga, 0x3d4, index, value);
        }
        indexed(vga, 0x3d4, 7, 0x12);
        for color in 0..16 {
            attribute(vga, color, color);
        }
        vga.port_write(Port(0x3c8), Width::Byte, 7);
        for _ in 0..3 {
            vga.port_write(Port(0x3c9), Width::Byte, 0x2a);
        }
        vga.port_write(Port(0x3c0), Width::Byte, 0x20);
        vga.mmio_write(0, 0x1_8000, &[0x41, 0x07]);
    }

    #[test]
    fn a_text_screen_shows_its_characters() {
        let vga = vga();
        text_mode(&mut vga.lock());
        let display = Vga::display(&vga);
        let text = display.text().unwrap();
        assert_eq!((text.len(), text[0].len(), text[0][0]), (25, 80, 0x41));
        let frame = display.frame();
        assert_eq!((frame.width, frame.height), (720, 400));
        assert_eq!(frame.pixels[..4], [0xaa, 0xaa, 0xaa, 0]);
        // The ninth dot of 'A' is background.
        assert_eq!(frame.pixels[8 * 4..9 * 4], [0, 0, 0, 0]);
        assert_eq!(vga.lock().port_read(Port(0x3d5), Width::Byte), 0x12);
    }

    #[test]
    fn write_mode_0_sets_planes_through_the_bit_mask() {
        let vga = vga();
        let mut vga = vga.lock();
        indexed(&mut vga, 0x3c4, 2, 0x0f);
        indexed(&mut vga, 0x3ce, 6, 5);
        indexed(&mut vga, 0x3ce, 8, 0xff);
        vga.mmio_write(0, 10, &[0xff]);
        // Set/reset color 5 where the bit mask has ones; the latches keep the rest.
        indexed(&mut vga, 0x3ce, 0, 5);
        indexed(&mut vga, 0x3ce, 1, 0x0f);
        indexed(&mut vga, 0x3ce, 8, 0xf0);
        vga.mmio_read(0, 10, &mut [0]);
        vga.mmio_write(0, 10, &[0]);
        let mut planes = [0; 4];
        vga.vram.read(40, &mut planes);
        assert_eq!(planes, [0xff, 0x0f, 0xff, 0x0f]);
        // Read mode 1 finds color 5 in the upper half.
        indexed(&mut vga, 0x3ce, 2, 5);
        indexed(&mut vga, 0x3ce, 7, 0x0f);
        indexed(&mut vga, 0x3ce, 5, 8);
        let mut byte = [0];
        vga.mmio_read(0, 10, &mut byte);
        assert_eq!(byte, [0xf0]);
    }

    #[test]
    fn a_vbe_mode_is_drawn_from_linear_memory() {
        let vga = vga();
        {
            let mut vga = vga.lock();
            vbe(&mut vga, dispi::XRES, 640);
            vbe(&mut vga, dispi::YRES, 480);
            vbe(&mut vga, dispi::BPP, 32);
            vbe(&mut vga, dispi::ENABLE, 0x41);
            vga.vram.write(640 * 4, &[1, 2, 3, 9]);
        }
        let frame = Vga::display(&vga).frame();
        assert_eq!((frame.width, frame.height), (640, 480));
        assert_eq!(frame.pixels[640 * 4..641 * 4], [1, 2, 3, 0]);
        assert_eq!(Vga::display(&vga).text(), None);
    }

    #[test]
    fn the_vbe_extension_tells_its_limits() {
        let vga = vga();
        let mut vga = vga.lock();
        vbe(&mut vga, dispi::ENABLE, dispi::GET_CAPS);
        vga.port_write(Port(0x1ce), Width::Word, dispi::XRES as u32);
        assert_eq!(vga.port_read(Port(0x1cf), Width::Word), u32::from(dispi::MAX_XRES));
        vga.port_write(Port(0x1ce), Width::Word, dispi::VIDEO_MEMORY_64K as u32);
        assert_eq!(vga.port_read(Port(0x1cf), Width::Word), 8 * 16);
        vbe(&mut vga, dispi::ID, 0xbe00);
        assert_eq!(vga.port_read(Port(0x1cf), Width::Word), 0xb0c5);
    }

    #[test]
    fn the_beam_is_in_retrace_once_a_frame() {
        let state = State::power_on();
        let retrace = (0..LINES_TOTAL).filter(|l| state.input_status_1(l * LINE_NANOS) & 8 != 0).count();
        assert_eq!(retrace, 2);
    }

    #[test]
    fn a_saved_adapter_comes_back_equal() {
        let vga = vga();
        text_mode(&mut vga.lock());
        let save = |vga: &Vga| {
            let mut out = ssm::Writer::new();
            vga.save(&mut out);
            out.into_bytes()
        };
        let first = save(&vga.lock());
        let other = Vga::new(ByteSize::mib(8), Clock::manual()).unwrap();
        let mut other = other.lock();
        other.load(ssm::Reader::new("vga", 1, &first)).unwrap();
        assert!(other.state == vga.lock().state);
        assert_eq!(save(&other), first);
        assert!(other.load(ssm::Reader::new("vga", 1, &first[..100])).is_err());
    }
}
