//! The VGA's registers: sequencer, graphics controller, CRT controller, attribute controller and DAC.
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem". Indexes and bits are named as there.

use bitfield_struct::bitfield;
use tm::Nanos;

use super::vbe::Vbe;

/// Miscellaneous output register.
#[bitfield(u8)]
pub(super) struct Misc {
    /// CRTC at 0x3d4 (color) instead of 0x3b4 (monochrome).
    pub(super) color: bool,
    pub(super) ram_enabled: bool,
    #[bits(2)]
    pub(super) clock: u8,
    _unused: bool,
    pub(super) page: bool,
    #[bits(2)]
    pub(super) polarity: u8,
}

/// Sequencer register 1.
#[bitfield(u8)]
pub(super) struct Clocking {
    /// Characters are 8 dots wide, not 9.
    pub(super) eight_dots: bool,
    _unused: bool,
    #[bits(1)]
    _shift_load: u8,
    /// Every dot is two wide.
    pub(super) half_clock: bool,
    _shift4: bool,
    pub(super) screen_off: bool,
    #[bits(2)]
    _zero: u8,
}

/// Graphics controller register 5.
#[bitfield(u8)]
pub(super) struct GfxMode {
    #[bits(2)]
    pub(super) write_mode: u8,
    _test: bool,
    /// Read mode 1: color compare.
    pub(super) compare: bool,
    pub(super) odd_even: bool,
    /// Two bits per pixel from pairs of planes (CGA).
    pub(super) shift_interleaved: bool,
    pub(super) shift_256: bool,
    _zero: bool,
}

/// Attribute controller register 0x10.
#[bitfield(u8)]
pub(super) struct AttrMode {
    pub(super) graphics: bool,
    pub(super) mono: bool,
    /// The ninth dot of characters 0xc0–0xdf repeats the eighth.
    pub(super) line_graphics: bool,
    pub(super) blink: bool,
    _zero: bool,
    /// Panning ends at the line compare.
    pub(super) pan_top_only: bool,
    pub(super) color_256: bool,
    /// Palette bits 4 and 5 come from the color select register.
    pub(super) select_54: bool,
}

/// Sequencer indexes.
pub(super) mod sr {
    pub(crate) const CLOCKING: usize = 1;
    pub(crate) const MAP_MASK: usize = 2;
    pub(crate) const FONTS: usize = 3;
    pub(crate) const MEMORY_MODE: usize = 4;
    /// Memory mode: consecutive addresses go to consecutive planes.
    pub(crate) const CHAIN4: u8 = 1 << 3;
}

/// Graphics controller indexes.
pub(super) mod gr {
    pub(crate) const SET_RESET: usize = 0;
    pub(crate) const ENABLE_SET_RESET: usize = 1;
    pub(crate) const COMPARE: usize = 2;
    pub(crate) const ROTATE: usize = 3;
    pub(crate) const READ_MAP: usize = 4;
    pub(crate) const MODE: usize = 5;
    pub(crate) const MISC: usize = 6;
    pub(crate) const DONT_CARE: usize = 7;
    pub(crate) const BIT_MASK: usize = 8;
}

/// CRT controller indexes.
pub(super) mod cr {
    pub(crate) const H_TOTAL: usize = 0x00;
    pub(crate) const H_END: usize = 0x01;
    pub(crate) const V_TOTAL: usize = 0x06;
    pub(crate) const OVERFLOW: usize = 0x07;
    pub(crate) const PRESET_ROW: usize = 0x08;
    pub(crate) const MAX_SCAN: usize = 0x09;
    pub(crate) const CURSOR_START: usize = 0x0a;
    pub(crate) const CURSOR_END: usize = 0x0b;
    pub(crate) const START_HIGH: usize = 0x0c;
    pub(crate) const START_LOW: usize = 0x0d;
    pub(crate) const CURSOR_HIGH: usize = 0x0e;
    pub(crate) const CURSOR_LOW: usize = 0x0f;
    pub(crate) const V_SYNC_START: usize = 0x10;
    pub(crate) const V_SYNC_END: usize = 0x11;
    pub(crate) const V_END: usize = 0x12;
    pub(crate) const OFFSET: usize = 0x13;
    pub(crate) const UNDERLINE: usize = 0x14;
    pub(crate) const MODE: usize = 0x17;
    pub(crate) const LINE_COMPARE: usize = 0x18;
}

/// Attribute controller indexes after the 16 palette registers.
pub(super) mod ar {
    pub(crate) const MODE: usize = 0x10;
    pub(crate) const OVERSCAN: usize = 0x11;
    pub(crate) const PLANE_ENABLE: usize = 0x12;
    pub(crate) const PANNING: usize = 0x13;
    pub(crate) const COLOR_SELECT: usize = 0x14;
}

/// Attribute index: the palette belongs to the screen, not to the CPU.
const PALETTE_ON: u8 = 1 << 5;

/// Guest-visible state without the video memory.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) misc: Misc,
    pub(super) feature: u8,
    pub(super) enabled: u8,
    pub(super) sr_index: u8,
    pub(super) sr: [u8; 8],
    pub(super) gr_index: u8,
    pub(super) gr: [u8; 16],
    pub(super) cr_index: u8,
    pub(super) cr: [u8; 32],
    pub(super) ar_index: u8,
    pub(super) ar: [u8; 32],
    /// The next write to port 0x3c0 is data.
    pub(super) ar_data: bool,
    pub(super) dac: [u8; 768],
    pub(super) dac_mask: u8,
    pub(super) dac_read_index: u8,
    pub(super) dac_write_index: u8,
    /// 0 red, 1 green, 2 blue.
    pub(super) dac_component: u8,
    pub(super) dac_latch: [u8; 2],
    /// What port 0x3c7 reads: 3 while reading, 0 while writing.
    pub(super) dac_state: u8,
    /// One byte per plane, as the last read left them.
    pub(super) latch: u32,
    pub(super) vbe: Vbe,
}

/// Masks of the bits that exist in the sequencer and graphics controller registers.
const SR_MASK: [u8; 8] = [0x03, 0x3d, 0x0f, 0x3f, 0x0e, 0, 0, 0xff];
const GR_MASK: [u8; 16] = [0x0f, 0x0f, 0x0f, 0x1f, 0x03, 0x7b, 0x0f, 0x0f, 0xff, 0, 0, 0, 0, 0, 0, 0];

/// When the beam is where.
struct Raster {
    line: u64,
    in_display: bool,
}

impl State {
    /// The state after reset; `vram` is the size of video memory in bytes.
    pub(super) fn power_on(vram: u64) -> Self {
        Self {
            misc: Misc::new(),
            feature: 0,
            enabled: 1,
            sr_index: 0,
            sr: [0; 8],
            gr_index: 0,
            gr: [0; 16],
            cr_index: 0,
            cr: [0; 32],
            ar_index: 0,
            ar: [0; 32],
            ar_data: false,
            dac: [0; 768],
            dac_mask: 0xff,
            dac_read_index: 0,
            dac_write_index: 0,
            dac_component: 0,
            dac_latch: [0; 2],
            dac_state: 0,
            latch: 0,
            vbe: Vbe::power_on(vram),
        }
    }

    pub(super) fn clocking(&self) -> Clocking {
        Clocking::from_bits(self.sr[sr::CLOCKING])
    }

    pub(super) fn gfx_mode(&self) -> GfxMode {
        GfxMode::from_bits(self.gr[gr::MODE])
    }

    pub(super) fn attr_mode(&self) -> AttrMode {
        AttrMode::from_bits(self.ar[ar::MODE])
    }

    pub(super) fn is_graphics(&self) -> bool {
        self.gr[gr::MISC] & 1 != 0
    }

    pub(super) fn is_chain4(&self) -> bool {
        self.sr[sr::MEMORY_MODE] & sr::CHAIN4 != 0
    }

    /// Whether the screen is switched off.
    pub(super) fn is_blank(&self) -> bool {
        self.clocking().screen_off() || self.ar_index & PALETTE_ON == 0
    }

    /// Switches the screen on, as entering a VBE mode does.
    pub(super) fn unblank(&mut self) {
        self.sr[sr::CLOCKING] = self.clocking().with_screen_off(false).into_bits();
        self.ar_index |= PALETTE_ON;
    }

    /// Scan lines shown.
    pub(super) fn v_display(&self) -> u32 {
        let overflow = u32::from(self.cr[cr::OVERFLOW]);
        (u32::from(self.cr[cr::V_END]) | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1
    }

    /// The scan line after which display memory starts over at address zero.
    pub(super) fn line_compare(&self) -> u32 {
        u32::from(self.cr[cr::LINE_COMPARE])
            | (u32::from(self.cr[cr::OVERFLOW]) & 0x10) << 4
            | (u32::from(self.cr[cr::MAX_SCAN]) & 0x40) << 3
    }

    /// Dots of one character column.
    pub(super) fn dots(&self) -> u32 {
        if self.clocking().eight_dots() || self.is_graphics() { 8 } else { 9 }
    }

    /// Where the beam is at `now`, by the programmed timing.
    fn raster(&self, now: Nanos) -> Raster {
        let dots = if self.clocking().eight_dots() { 8 } else { 9 };
        let clock = if self.misc.clock() & 1 != 0 { 28_322_000 } else { 25_175_000 };
        let clock = if self.clocking().half_clock() { clock / 2 } else { clock };
        let overflow = u64::from(self.cr[cr::OVERFLOW]);
        let line_dots = (u64::from(self.cr[cr::H_TOTAL]) + 5) * dots;
        let lines = u64::from(self.cr[cr::V_TOTAL]) | (overflow & 0x01) << 8 | (overflow & 0x20) << 4;
        let lines = lines + 2;
        let dot = tm::ticks(now, clock);
        let line = dot / line_dots % lines;
        let shown_dots = (u64::from(self.cr[cr::H_END]) + 1) * dots;
        Raster { line, in_display: line < u64::from(self.v_display()) && dot % line_dots < shown_dots }
    }

    /// Input status register 1: bit 0 while nothing is displayed, bit 3 during vertical retrace.
    fn status1(&self, now: Nanos) -> u8 {
        let raster = self.raster(now);
        let overflow = u64::from(self.cr[cr::OVERFLOW]);
        let start = u64::from(self.cr[cr::V_SYNC_START]) | (overflow & 0x04) << 6 | (overflow & 0x80) << 2;
        // The end register gives the low four bits of the line at which retrace ends.
        let length = (u64::from(self.cr[cr::V_SYNC_END] & 0x0f).wrapping_sub(start) & 0x0f).max(1);
        let in_retrace = (start..start + length).contains(&raster.line);
        u8::from(!raster.in_display) | u8::from(in_retrace) << 3
    }

    /// The number of the frame being shown, for blinking.
    pub(super) fn frame_number(now: Nanos) -> u64 {
        tm::ticks(now, 60)
    }

    /// Whether `port` is the CRTC's or status 1 at the address that is not selected.
    fn is_other_base(&self, port: u16) -> bool {
        match port {
            0x3b4 | 0x3b5 | 0x3ba => self.misc.color(),
            0x3d4 | 0x3d5 | 0x3da => !self.misc.color(),
            _ => false,
        }
    }

    /// Reads a VGA port.
    pub(super) fn read(&mut self, port: u16, now: Nanos) -> u8 {
        if self.is_other_base(port) {
            return 0xff;
        }
        match port {
            0x3c0 => self.ar_index,
            0x3c1 => self.ar[usize::from(self.ar_index & 0x1f)],
            // Input status 0: the switch that senses a color monitor.
            0x3c2 => 0x10,
            0x3c3 => self.enabled,
            0x3c4 => self.sr_index,
            0x3c5 => self.sr.get(usize::from(self.sr_index)).copied().unwrap_or(0),
            0x3c6 => self.dac_mask,
            0x3c7 => self.dac_state,
            0x3c8 => self.dac_write_index,
            0x3c9 => {
                let at = usize::from(self.dac_read_index) * 3 + usize::from(self.dac_component);
                self.dac_component += 1;
                if self.dac_component == 3 {
                    self.dac_component = 0;
                    self.dac_read_index = self.dac_read_index.wrapping_add(1);
                }
                self.dac[at]
            }
            0x3ca => self.feature,
            0x3cc => self.misc.into_bits(),
            0x3ce => self.gr_index,
            0x3cf => self.gr.get(usize::from(self.gr_index)).copied().unwrap_or(0),
            0x3b4 | 0x3d4 => self.cr_index,
            0x3b5 | 0x3d5 => self.cr.get(usize::from(self.cr_index)).copied().unwrap_or(0),
            0x3ba | 0x3da => {
                self.ar_data = false;
                self.status1(now)
            }
            _ => 0xff,
        }
    }

    /// Writes a VGA port.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        if self.is_other_base(port) {
            return;
        }
        match port {
            0x3c0 => {
                if self.ar_data {
                    let index = usize::from(self.ar_index & 0x1f);
                    // While the palette belongs to the screen, the CPU cannot change it.
                    if index >= 16 || self.ar_index & PALETTE_ON == 0 {
                        self.ar[index] = match index {
                            0..=15 => value & 0x3f,
                            ar::MODE => value & !0x10,
                            ar::OVERSCAN => value,
                            ar::PLANE_ENABLE => value & 0x3f,
                            ar::PANNING | ar::COLOR_SELECT => value & 0x0f,
                            _ => 0,
                        };
                    }
                } else {
                    self.ar_index = value & 0x3f;
                }
                self.ar_data = !self.ar_data;
            }
            0x3c2 => self.misc = Misc::from_bits(value),
            0x3c3 => self.enabled = value & 1,
            0x3c4 => self.sr_index = value & 7,
            0x3c5 => {
                let index = usize::from(self.sr_index & 7);
                self.sr[index] = value & SR_MASK[index];
            }
            0x3c6 => self.dac_mask = value,
            0x3c7 => {
                self.dac_read_index = value;
                self.dac_component = 0;
                self.dac_state = 3;
            }
            0x3c8 => {
                self.dac_write_index = value;
                self.dac_component = 0;
                self.dac_state = 0;
            }
            0x3c9 => {
                let value = if self.vbe.is_dac_8bit() { value } else { value & 0x3f };
                if let Some(slot) = self.dac_latch.get_mut(usize::from(self.dac_component)) {
                    *slot = value;
                    self.dac_component += 1;
                } else {
                    let at = usize::from(self.dac_write_index) * 3;
                    self.dac[at..at + 3].copy_from_slice(&[self.dac_latch[0], self.dac_latch[1], value]);
                    self.dac_component = 0;
                    self.dac_write_index = self.dac_write_index.wrapping_add(1);
                }
            }
            0x3ce => self.gr_index = value & 0x0f,
            0x3cf => {
                let index = usize::from(self.gr_index & 0x0f);
                self.gr[index] = value & GR_MASK[index];
            }
            0x3b4 | 0x3d4 => self.cr_index = value & 0x1f,
            0x3b5 | 0x3d5 => self.write_crtc(value),
            0x3ba | 0x3da => self.feature = value & 0x10,
            _ => {}
        }
    }

    fn write_crtc(&mut self, value: u8) {
        let index = usize::from(self.cr_index & 0x1f);
        let protected = self.cr[cr::V_SYNC_END] & 0x80 != 0;
        if protected && index == cr::OVERFLOW {
            // Only the line compare's bit is not protected.
            self.cr[index] = (self.cr[index] & !0x10) | (value & 0x10);
        } else if !(protected && index < cr::OVERFLOW) && index <= cr::LINE_COMPARE {
            self.cr[index] = value;
        }
    }

    pub(super) fn save(&self, out: &mut ssm::Writer) {
        let Self {
            misc,
            feature,
            enabled,
            sr_index,
            sr,
            gr_index,
            gr,
            cr_index,
            cr,
            ar_index,
            ar,
            ar_data,
            dac,
            dac_mask,
            dac_read_index,
            dac_write_index,
            dac_component,
            dac_latch,
            dac_state,
            latch,
            vbe,
        } = self;
        out.put_bytes(&[misc.into_bits(), *feature, *enabled, *sr_index, *gr_index, *cr_index, *ar_index]);
        out.put_bytes(sr);
        out.put_bytes(gr);
        out.put_bytes(cr);
        out.put_bytes(ar);
        out.put_bool(*ar_data);
        out.put_bytes(dac);
        out.put_bytes(&[*dac_mask, *dac_read_index, *dac_write_index, *dac_component, *dac_state]);
        out.put_bytes(dac_latch);
        out.put_u32(*latch);
        vbe.save(out);
    }

    pub(super) fn load(input: &mut ssm::Reader<'_>, vram: u64) -> Result<Self, ssm::Error> {
        let mut state = Self::power_on(vram);
        state.misc = Misc::from_bits(input.take_u8()?);
        state.feature = input.take_u8()?;
        state.enabled = input.take_u8()?;
        state.sr_index = input.take_u8()? & 7;
        state.gr_index = input.take_u8()? & 0x0f;
        state.cr_index = input.take_u8()? & 0x1f;
        state.ar_index = input.take_u8()? & 0x3f;
        input.take_into(&mut state.sr)?;
        input.take_into(&mut state.gr)?;
        input.take_into(&mut state.cr)?;
        input.take_into(&mut state.ar)?;
        state.ar_data = input.take_bool()?;
        input.take_into(&mut state.dac)?;
        state.dac_mask = input.take_u8()?;
        state.dac_read_index = input.take_u8()?;
        state.dac_write_index = input.take_u8()?;
        state.dac_component = input.take_u8()?;
        if state.dac_component > 2 {
            return Err(input.invalid(format!("color component {}", state.dac_component)));
        }
        state.dac_state = input.take_u8()?;
        input.take_into(&mut state.dac_latch)?;
        state.latch = input.take_u32()?;
        state.vbe = Vbe::load(input, vram)?;
        Ok(state)
    }
}
