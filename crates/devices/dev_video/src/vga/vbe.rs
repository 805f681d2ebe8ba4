//! The Bochs VBE "DISPI" interface: ports 0x1ce (index) and 0x1cf or 0x1d0 (data), as the SeaBIOS video BIOS and operating
//! systems' drivers for Bochs, QEMU and VirtualBox adapters use it.
//!
//! Source: Bochs `bochs/iodev/display/vga.h` and its document "VBE Display API", interface versions 0xb0c0–0xb0c5.
//! VirtualBox's own interface ids (0xbe00 and up: HGSMI, VBVA) are not offered, so its guest driver leaves the adapter alone.

/// Register numbers.
mod index {
    pub(super) const ID: u16 = 0;
    pub(super) const X_RES: u16 = 1;
    pub(super) const Y_RES: u16 = 2;
    pub(super) const BPP: u16 = 3;
    pub(super) const ENABLE: u16 = 4;
    pub(super) const BANK: u16 = 5;
    pub(super) const VIRT_WIDTH: u16 = 6;
    pub(super) const VIRT_HEIGHT: u16 = 7;
    pub(super) const X_OFFSET: u16 = 8;
    pub(super) const Y_OFFSET: u16 = 9;
    pub(super) const MEMORY_64K: u16 = 10;
}

/// Bits of the enable register.
pub(super) const ENABLED: u16 = 0x01;
const GET_CAPS: u16 = 0x02;
const DAC_8BIT: u16 = 0x20;
const NO_CLEAR: u16 = 0x80;
/// Bits that are kept (0x40 is "linear frame buffer", which always is there).
const ENABLE_KEPT: u16 = ENABLED | GET_CAPS | DAC_8BIT | 0x40 | NO_CLEAR;

const MAX_X: u16 = 8192;
const MAX_Y: u16 = 8192;
const MAX_BPP: u16 = 32;
const ID_FIRST: u16 = 0xb0c0;
const ID_LAST: u16 = 0xb0c5;

/// What a write asks of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// A mode was entered.
    pub(super) entered: bool,
    /// This many bytes of video memory from its start are to be zeroed: a mode was set.
    pub(super) clear: Option<u64>,
    /// The DAC's width changed to 8 bits (true) or 6 bits.
    pub(super) dac: Option<bool>,
}

/// The registers.
#[derive(Clone, Debug)]
pub(super) struct Vbe {
    memory: u64,
    index: u16,
    id: u16,
    pub(super) x_res: u16,
    pub(super) y_res: u16,
    pub(super) bpp: u16,
    enable: u16,
    pub(super) bank: u16,
    pub(super) virt_width: u16,
    virt_height: u16,
    pub(super) x_offset: u16,
    pub(super) y_offset: u16,
}

impl Vbe {
    pub(super) fn power_on(memory: u64) -> Self {
        Self {
            memory,
            index: 0,
            id: ID_LAST,
            x_res: 0,
            y_res: 0,
            bpp: 8,
            enable: 0,
            bank: 0,
            virt_width: 0,
            virt_height: 0,
            x_offset: 0,
            y_offset: 0,
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enable & ENABLED != 0
    }

    pub(super) fn is_dac_8bit(&self) -> bool {
        self.enable & DAC_8BIT != 0
    }

    /// Bytes from one row to the next; for 4 bits per pixel, bytes in all four planes together.
    pub(super) fn pitch(&self) -> u64 {
        let width = u64::from(self.virt_width);
        match self.bpp {
            4 => width / 2,
            15 => width * 2,
            bpp => width * u64::from(bpp / 8),
        }
    }

    pub(super) fn read(&self, port: u16) -> u16 {
        if port == 0x1ce {
            return self.index;
        }
        let caps = self.enable & GET_CAPS != 0;
        match self.index {
            index::ID => self.id,
            index::X_RES if caps => MAX_X,
            index::Y_RES if caps => MAX_Y,
            index::BPP if caps => MAX_BPP,
            index::X_RES => self.x_res,
            index::Y_RES => self.y_res,
            index::BPP => self.bpp,
            index::ENABLE => self.enable,
            index::BANK => self.bank,
            index::VIRT_WIDTH => self.virt_width,
            index::VIRT_HEIGHT => self.virt_height,
            index::X_OFFSET => self.x_offset,
            index::Y_OFFSET => self.y_offset,
            index::MEMORY_64K => (self.memory >> 16).min(0xffff) as u16,
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, port: u16, value: u16) -> Effects {
        let mut effects = Effects::default();
        if port == 0x1ce {
            self.index = value;
            return effects;
        }
        match self.index {
            index::ID if (ID_FIRST..=ID_LAST).contains(&value) => {
                self.id = value;
            }
            // The mode can be set while it is off only.
            index::X_RES if !self.is_enabled() && (1..=MAX_X).contains(&value) => self.x_res = value & !7,
            index::Y_RES if !self.is_enabled() && (1..=MAX_Y).contains(&value) => self.y_res = value,
            index::BPP if !self.is_enabled() => {
                let bpp = if value == 0 { 8 } else { value };
                if matches!(bpp, 4 | 8 | 15 | 16 | 24 | 32) {
                    self.bpp = bpp;
                }
            }
            index::ENABLE => {
                let was_8bit = self.is_dac_8bit();
                let was_enabled = self.is_enabled();
                self.enable = value & ENABLE_KEPT;
                if self.is_enabled() && !was_enabled && !self.set_mode() {
                    self.enable &= !ENABLED;
                }
                effects.entered = self.is_enabled() && !was_enabled;
                if effects.entered && value & NO_CLEAR == 0 {
                    effects.clear = Some((self.pitch() * u64::from(self.y_res)).min(self.memory));
                }
                if !self.is_enabled() {
                    self.bank = 0;
                }
                if self.is_dac_8bit() != was_8bit {
                    effects.dac = Some(self.is_dac_8bit());
                }
            }
            index::BANK => {
                // Four planes lie side by side: a bank of 64 KB is 256 KB of memory then.
                let banks = (self.memory >> if self.bpp == 4 { 18 } else { 16 }) as u16;
                self.bank = value & banks.wrapping_sub(1);
            }
            index::VIRT_WIDTH => {
                let old = self.virt_width;
                self.virt_width = value.max(self.x_res) & !7;
                if self.pitch() * u64::from(self.y_res) > self.memory {
                    self.virt_width = old;
                }
                self.fit();
            }
            index::X_OFFSET => {
                self.x_offset = value;
                self.fit();
            }
            index::Y_OFFSET => {
                self.y_offset = value;
                self.fit();
            }
            _ => {}
        }
        effects
    }

    /// Enters the mode that is set up; false if it does not fit the memory.
    fn set_mode(&mut self) -> bool {
        self.virt_width = self.x_res;
        if self.x_res == 0 || self.y_res == 0 || self.pitch() * u64::from(self.y_res) > self.memory {
            return false;
        }
        self.x_offset = 0;
        self.y_offset = 0;
        self.bank = 0;
        self.fit();
        true
    }

    /// Brings the virtual height and the offsets to what the memory holds.
    fn fit(&mut self) {
        let rows = self.memory.checked_div(self.pitch()).unwrap_or(0);
        self.virt_height = rows.min(0xffff) as u16;
        self.x_offset = self.x_offset.min(self.virt_width.saturating_sub(self.x_res));
        self.y_offset = self.y_offset.min(self.virt_height.saturating_sub(self.y_res));
    }

    pub(super) fn save(&self, out: &mut ssm::Writer) {
        let Self {
            memory: _,
            index,
            id,
            x_res,
            y_res,
            bpp,
            enable,
            bank,
            virt_width,
            virt_height,
            x_offset,
            y_offset,
        } = self;
        for word in [index, id, x_res, y_res, bpp, enable, bank, virt_width, virt_height, x_offset, y_offset]
        {
            out.put_u16(*word);
        }
    }

    pub(super) fn load(input: &mut ssm::Reader<'_>, memory: u64) -> Result<Self, ssm::Error> {
        let vbe = Self {
            memory,
            index: input.take_u16()?,
            id: input.take_u16()?,
            x_res: input.take_u16()?,
            y_res: input.take_u16()?,
            bpp: input.take_u16()?,
            enable: input.take_u16()? & ENABLE_KEPT,
            bank: input.take_u16()?,
            virt_width: input.take_u16()?,
            virt_height: input.take_u16()?,
            x_offset: input.take_u16()?,
            y_offset: input.take_u16()?,
        };
        let mode = format!(
            "mode {}x{}x{} of width {}, bank {}",
            vbe.x_res, vbe.y_res, vbe.bpp, vbe.virt_width, vbe.bank
        );
        let is_good = vbe.x_res <= MAX_X
            && vbe.y_res <= MAX_Y
            && matches!(vbe.bpp, 4 | 8 | 15 | 16 | 24 | 32)
            && vbe.x_res <= vbe.virt_width.max(if vbe.is_enabled() { 0 } else { MAX_X })
            && (!vbe.is_enabled() || vbe.pitch() * u64::from(vbe.y_res) <= memory)
            && u64::from(vbe.bank) << 16 < memory;
        if is_good { Ok(vbe) } else { Err(input.invalid(mode)) }
    }
}
