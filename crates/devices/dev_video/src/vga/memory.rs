//! The CPU's way into video memory through the window at 0xa0000.
//!
//! The four planes lie interleaved: the byte of plane *p* at plane address *a* is byte `4 a + p` of video memory, so that one
//! 32-bit word holds what the latches hold. With chained planes (mode 13h) the CPU's address is then the linear one, and
//! in odd/even mode (text) a character and its attribute share a word. Software that writes chained and reads unchained at the
//! same address sees other addresses than on an IBM VGA, which leaves gaps; other virtual VGAs have the same layout.

use pgm::HostMemory;

use super::state::{State, gr, sr};

/// One bit per plane to one byte per plane.
const fn expand(planes: u8) -> u32 {
    let mut word = 0;
    let mut plane = 0;
    while plane < 4 {
        if planes & 1 << plane != 0 {
            word |= 0xff << (8 * plane);
        }
        plane += 1;
    }
    word
}

const EXPAND: [u32; 16] = {
    let mut table = [0; 16];
    let mut planes = 0;
    while planes < 16 {
        table[planes] = expand(planes as u8);
        planes += 1;
    }
    table
};

fn planes(bits: u8) -> u32 {
    EXPAND[usize::from(bits & 0x0f)]
}

fn everywhere(byte: u8) -> u32 {
    u32::from(byte) * 0x0101_0101
}

fn load(vram: &HostMemory, word: u64) -> u32 {
    let mut bytes = [0; 4];
    vram.read(word * 4, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// What an address in the window reaches.
enum Place {
    Nothing,
    /// A byte of video memory (VBE modes of 8 bits per pixel and more).
    Linear(u64),
    /// A word of the planes; `plane` and the others in `planes` are selected by the address.
    Planar {
        word: u64,
        plane: u8,
        planes: u8,
    },
}

impl State {
    /// Decodes `offset` into the window 0xa0000–0xbffff.
    fn place(&self, offset: u64) -> Place {
        if self.vbe.is_enabled() && self.vbe.bpp != 4 {
            return if offset < 0x1_0000 {
                Place::Linear(u64::from(self.vbe.bank) << 16 | offset)
            } else {
                Place::Nothing
            };
        }
        if !self.misc.ram_enabled() {
            return Place::Nothing;
        }
        let offset = match self.gr[gr::MISC] >> 2 & 3 {
            0 => Some(offset),
            1 => (offset < 0x1_0000).then_some(offset),
            2 => offset.checked_sub(0x1_0000).filter(|&offset| offset < 0x8000),
            _ => offset.checked_sub(0x1_8000),
        };
        let Some(offset) = offset else { return Place::Nothing };
        let low = offset as u8;
        if self.is_chain4() {
            Place::Planar { word: offset >> 2, plane: low & 3, planes: 1 << (low & 3) }
        } else if self.gfx_mode().odd_even() {
            Place::Planar {
                word: offset >> 1,
                plane: (self.gr[gr::READ_MAP] & 2) | (low & 1),
                planes: 0b0101 << (low & 1),
            }
        } else {
            let bank = if self.vbe.is_enabled() { u64::from(self.vbe.bank) << 16 } else { 0 };
            Place::Planar { word: bank | (offset & 0xffff), plane: self.gr[gr::READ_MAP], planes: 0x0f }
        }
    }

    /// Reads a byte at `offset` into the window.
    pub(super) fn read_window(&mut self, vram: &HostMemory, offset: u64) -> u8 {
        match self.place(offset) {
            Place::Nothing => 0xff,
            Place::Linear(at) => {
                let mut byte = [0xff];
                vram.read(at, &mut byte);
                byte[0]
            }
            Place::Planar { word, plane, .. } => {
                self.latch = load(vram, word);
                if self.gfx_mode().compare() {
                    let care = planes(self.gr[gr::DONT_CARE]);
                    let differs = (self.latch ^ planes(self.gr[gr::COMPARE])) & care;
                    let [a, b, c, d] = differs.to_le_bytes();
                    !(a | b | c | d)
                } else {
                    self.latch.to_le_bytes()[usize::from(plane & 3)]
                }
            }
        }
    }

    /// Writes a byte at `offset` into the window.
    pub(super) fn write_window(&mut self, vram: &HostMemory, offset: u64, value: u8) {
        match self.place(offset) {
            Place::Nothing => {}
            Place::Linear(at) => {
                vram.write(at, &[value]);
            }
            Place::Planar { word, planes: selected, .. } => {
                let mask = selected & self.sr[sr::MAP_MASK] & 0x0f;
                if mask == 0 {
                    return;
                }
                let data = self.alu(value);
                let result = if mask == 0x0f {
                    data
                } else {
                    let mask = planes(mask);
                    (data & mask) | (load(vram, word) & !mask)
                };
                vram.write(word * 4, &result.to_le_bytes());
            }
        }
    }

    /// What the graphics controller makes of a byte written: one byte for each plane.
    fn alu(&self, value: u8) -> u32 {
        let rotated = value.rotate_right(u32::from(self.gr[gr::ROTATE] & 7));
        let mut bit_mask = everywhere(self.gr[gr::BIT_MASK]);
        let data = match self.gfx_mode().write_mode() {
            0 => {
                let fixed = planes(self.gr[gr::ENABLE_SET_RESET]);
                (everywhere(rotated) & !fixed) | (planes(self.gr[gr::SET_RESET]) & fixed)
            }
            1 => return self.latch,
            2 => planes(value),
            _ => {
                bit_mask &= everywhere(rotated);
                planes(self.gr[gr::SET_RESET])
            }
        };
        let data = match self.gr[gr::ROTATE] >> 3 & 3 {
            0 => data,
            1 => data & self.latch,
            2 => data | self.latch,
            _ => data ^ self.latch,
        };
        (data & bit_mask) | (self.latch & !bit_mask)
    }

    /// The byte of video memory that the first 64 KB of the window show one to one, if they do: the window can then be
    /// memory for the CPU.
    pub(super) fn direct_window(&self) -> Option<u64> {
        if self.vbe.is_enabled() {
            return (self.vbe.bpp != 4).then(|| u64::from(self.vbe.bank) << 16);
        }
        let plain = self.misc.ram_enabled()
            && self.is_chain4()
            && self.gr[gr::MISC] >> 2 & 3 == 1
            && self.sr[sr::MAP_MASK] & 0x0f == 0x0f
            && self.gfx_mode().write_mode() == 0
            && !self.gfx_mode().compare()
            && self.gr[gr::ROTATE] & 0x1f == 0
            && self.gr[gr::ENABLE_SET_RESET] & 0x0f == 0
            && self.gr[gr::BIT_MASK] == 0xff;
        plain.then_some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vbox_types::ByteSize;

    fn vga() -> (State, HostMemory) {
        let vram = HostMemory::new("test", ByteSize(1 << 20)).unwrap();
        let mut s = State::power_on(1 << 20);
        s.write(0x3c2, 0x03);
        // Planar graphics at 0xa0000, all planes, all bits.
        for (port, index, value) in [(0x3c4, 2, 0x0f), (0x3c4, 4, 0x06), (0x3ce, 6, 0x05), (0x3ce, 8, 0xff)] {
            s.write(port, index);
            s.write(port + 1, value);
        }
        (s, vram)
    }

    fn gr(s: &mut State, index: u8, value: u8) {
        s.write(0x3ce, index);
        s.write(0x3cf, value);
    }

    fn sr(s: &mut State, index: u8, value: u8) {
        s.write(0x3c4, index);
        s.write(0x3c5, value);
    }

    fn word(vram: &HostMemory, at: u64) -> [u8; 4] {
        load(vram, at).to_le_bytes()
    }

    #[test]
    fn write_mode_0_writes_the_enabled_planes() {
        let (mut s, vram) = vga();
        sr(&mut s, 2, 0x05);
        s.write_window(&vram, 0x10, 0xa5);
        assert_eq!(word(&vram, 0x10), [0xa5, 0, 0xa5, 0]);
    }

    #[test]
    fn set_reset_and_bit_mask_draw_a_pixel() {
        let (mut s, vram) = vga();
        s.write_window(&vram, 0, 0xff);
        gr(&mut s, 0, 0x09);
        gr(&mut s, 1, 0x0f);
        gr(&mut s, 8, 0x10);
        s.read_window(&vram, 0);
        s.write_window(&vram, 0, 0x00);
        assert_eq!(word(&vram, 0), [0xff, 0xef, 0xef, 0xff]);
    }

    #[test]
    fn rotate_and_logic_work_on_the_latches() {
        let (mut s, vram) = vga();
        s.write_window(&vram, 0, 0x0f);
        for (function, expected) in [(0x08, 0x03), (0x10, 0xcf), (0x18, 0xcc)] {
            gr(&mut s, 3, 0);
            s.write_window(&vram, 0, 0x0f);
            s.read_window(&vram, 0);
            // 0x0f rotated right by two is 0xc3.
            gr(&mut s, 3, function | 2);
            s.write_window(&vram, 0, 0x0f);
            assert_eq!(word(&vram, 0), [expected; 4], "function {function:#x}");
        }
    }

    #[test]
    fn write_mode_1_copies_latches() {
        let (mut s, vram) = vga();
        vram.write(0, &[1, 2, 3, 4]);
        s.read_window(&vram, 0);
        gr(&mut s, 5, 1);
        s.write_window(&vram, 9, 0xee);
        assert_eq!(word(&vram, 9), [1, 2, 3, 4]);
    }

    #[test]
    fn write_mode_2_takes_a_color() {
        let (mut s, vram) = vga();
        gr(&mut s, 5, 2);
        gr(&mut s, 8, 0x80);
        s.write_window(&vram, 0, 0x0a);
        assert_eq!(word(&vram, 0), [0, 0x80, 0, 0x80]);
    }

    #[test]
    fn write_mode_3_uses_the_byte_as_a_mask() {
        let (mut s, vram) = vga();
        gr(&mut s, 0, 0x03);
        gr(&mut s, 5, 3);
        gr(&mut s, 8, 0xf0);
        s.write_window(&vram, 0, 0x3c);
        assert_eq!(word(&vram, 0), [0x30, 0x30, 0, 0]);
    }

    #[test]
    fn read_mode_1_compares_the_planes_that_matter() {
        let (mut s, vram) = vga();
        vram.write(0, &[0b1100, 0b1010, 0, 0xff]);
        gr(&mut s, 5, 8);
        gr(&mut s, 2, 0x03);
        gr(&mut s, 7, 0x07);
        assert_eq!(s.read_window(&vram, 0), 0b1000);
        gr(&mut s, 5, 0);
        gr(&mut s, 4, 1);
        assert_eq!(s.read_window(&vram, 0), 0b1010);
    }

    #[test]
    fn text_mode_puts_characters_and_attributes_into_planes_0_and_1() {
        let (mut s, vram) = vga();
        sr(&mut s, 2, 0x03);
        gr(&mut s, 5, 0x10);
        gr(&mut s, 6, 0x0e);
        s.write_window(&vram, 0x1_8000 + 6, b'A');
        s.write_window(&vram, 0x1_8000 + 7, 0x07);
        assert_eq!(word(&vram, 3), [b'A', 7, 0, 0]);
        assert_eq!([s.read_window(&vram, 0x1_8006), s.read_window(&vram, 0x1_8007)], [b'A', 7]);
        assert_eq!(s.read_window(&vram, 0), 0xff, "0xa0000 is not decoded");
    }

    #[test]
    fn chained_planes_are_linear_and_can_be_mapped() {
        let (mut s, vram) = vga();
        sr(&mut s, 4, 0x0e);
        gr(&mut s, 5, 0x40);
        for i in 0..8 {
            s.write_window(&vram, i, i as u8 + 1);
        }
        assert_eq!([word(&vram, 0), word(&vram, 1)], [[1, 2, 3, 4], [5, 6, 7, 8]]);
        assert_eq!(s.direct_window(), Some(0));
        sr(&mut s, 2, 0x07);
        assert_eq!(s.direct_window(), None);
    }

    #[test]
    fn a_vbe_bank_moves_the_window() {
        let (mut s, vram) = vga();
        for (index, value) in [(1, 640), (2, 480), (3, 8), (4, 1), (5, 3)] {
            s.vbe.write(0x1ce, index);
            s.vbe.write(0x1cf, value);
        }
        s.write_window(&vram, 5, 0x77);
        let mut byte = [0];
        vram.read(0x3_0005, &mut byte);
        assert_eq!(byte, [0x77]);
        assert_eq!(s.direct_window(), Some(0x3_0000));
    }
}
