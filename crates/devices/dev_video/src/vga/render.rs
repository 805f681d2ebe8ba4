//! Draws the screen from the registers and video memory, as the CRT controller and the attribute controller would.
//!
//! A picture has the dots that the monitor gets: a mode that doubles its scan lines or its pixels (320x200 in 256 colors) comes
//! out in full size. Sources: as for [`super::state`].

use pdm::connector::Frame;
use pgm::HostMemory;
use tm::Nanos;

use super::state::{State, ar, cr, sr};

/// Plane addresses have 16 bits.
const PLANE_WORDS: u32 = 0x1_0000;
/// Plane 2 holds fonts: 32 bytes for each of 256 characters.
const FONT_BYTES: u32 = 32;

/// The part of video memory that legacy modes show.
struct Planes(Vec<u8>);

impl Planes {
    fn read(vram: &HostMemory) -> Self {
        let mut bytes = vec![0; PLANE_WORDS as usize * 4];
        vram.read(0, &mut bytes);
        Self(bytes)
    }

    /// The four planes' bytes at plane address `at`.
    fn word(&self, at: u32) -> [u8; 4] {
        let at = (at % PLANE_WORDS) as usize * 4;
        [self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]]
    }
}

/// A pixel in memory order: blue, green, red, unused.
type Pixel = [u8; 4];

const BLACK: Pixel = [0; 4];

/// One scan line's place in memory.
#[derive(Clone, Copy)]
struct Line {
    /// Address of the first character or byte.
    address: u32,
    /// Row inside the character cell.
    row: u32,
    /// Dots to shift to the left.
    pan: u32,
}

impl State {
    /// Draws the screen as of `now`.
    pub(super) fn draw(&self, vram: &HostMemory, now: Nanos) -> Frame {
        if self.vbe.is_enabled() {
            return self.draw_vbe(vram);
        }
        let columns = u32::from(self.cr[cr::H_END]) + 1;
        let height = self.v_display();
        let stretch = if self.clocking().half_clock() { 2 } else { 1 };
        let dots = columns * self.dots();
        let width = dots * stretch;
        if self.is_blank() {
            return Frame { width, height, pixels: vec![0; (width * height * 4) as usize] };
        }
        let planes = Planes::read(vram);
        let palette = Palette::new(self);
        let blink = Blink::at(now);
        let mut pixels = Vec::with_capacity((width * height * 4) as usize);
        let mut row = Vec::with_capacity(dots as usize + 16);
        for line in self.lines(height) {
            row.clear();
            if self.is_graphics() {
                self.draw_graphics(&planes, &palette, line, columns, &mut row);
            } else {
                self.draw_text(&planes, &palette, line, columns, blink, &mut row);
            }
            let pan = (line.pan as usize).min(row.len());
            row.drain(..pan);
            row.resize(dots as usize, BLACK);
            for pixel in &row {
                for _ in 0..stretch {
                    pixels.extend_from_slice(pixel);
                }
            }
        }
        Frame { width, height, pixels }
    }

    /// Runs the CRT controller's address counters down the screen.
    fn lines(&self, height: u32) -> Vec<Line> {
        let max_scan = u32::from(self.cr[cr::MAX_SCAN] & 0x1f);
        let repeat = if self.cr[cr::MAX_SCAN] & 0x80 != 0 { 2 } else { 1 };
        let step = u32::from(self.cr[cr::OFFSET]) * 2;
        let start = u32::from(self.cr[cr::START_HIGH]) << 8 | u32::from(self.cr[cr::START_LOW]);
        let byte_pan = u32::from(self.cr[cr::PRESET_ROW] >> 5 & 3);
        let mut pan = self.pan_dots();
        let mut base = start + byte_pan;
        let mut row = u32::from(self.cr[cr::PRESET_ROW] & 0x1f).min(max_scan);
        let mut repeated = 0;
        let split = self.line_compare();
        let mut lines = Vec::with_capacity(height as usize);
        for y in 0..height {
            lines.push(Line { address: self.interleave(base, row), row, pan });
            if y == split {
                // The screen below the split starts at address zero.
                base = 0;
                row = 0;
                repeated = 0;
                if self.attr_mode().pan_top_only() {
                    pan = 0;
                }
                continue;
            }
            repeated += 1;
            if repeated == repeat {
                repeated = 0;
                row += 1;
                if row > max_scan {
                    row = 0;
                    base += step;
                }
            }
        }
        lines
    }

    /// The address of a scan line in modes that take address bits from the row counter (CGA and Hercules layouts).
    fn interleave(&self, base: u32, row: u32) -> u32 {
        let mode = self.cr[cr::MODE];
        if !self.is_graphics() || mode & 3 == 3 {
            return base;
        }
        let mut address = base;
        if mode & 1 == 0 {
            // A 0x2000 of the CPU is half of that per plane with chained odd and even planes (word mode).
            let bit = if mode & 0x40 != 0 { 13 } else { 12 };
            address = (address & !(1 << bit)) | (row & 1) << bit;
        }
        if mode & 2 == 0 {
            address = (address & !(1 << 14)) | (row >> 1 & 1) << 14;
        }
        address
    }

    /// Horizontal panning in dots.
    fn pan_dots(&self) -> u32 {
        let value = u32::from(self.ar[ar::PANNING] & 0x0f);
        if self.is_graphics() && self.gfx_mode().shift_256() {
            value & 7
        } else if self.dots() == 9 {
            // 8 is no shift, 0–7 shift by one to eight.
            if value >= 8 { 0 } else { value + 1 }
        } else {
            value & 7
        }
    }

    fn draw_graphics(
        &self,
        planes: &Planes,
        palette: &Palette,
        line: Line,
        columns: u32,
        row: &mut Vec<Pixel>,
    ) {
        let mode = self.gfx_mode();
        let enable = self.ar[ar::PLANE_ENABLE] & 0x0f;
        // One column more than shown, for panning.
        for column in 0..=columns {
            let word = planes.word(line.address.wrapping_add(column));
            if mode.shift_256() {
                // Four pixels of two dots.
                for byte in word {
                    let pixel = palette.dac(byte);
                    row.extend([pixel, pixel]);
                }
            } else if mode.shift_interleaved() {
                for pair in 0..2 {
                    for shift in [6, 4, 2, 0] {
                        let color = (word[pair] >> shift & 3) | (word[pair + 2] >> shift & 3) << 2;
                        row.push(palette.attribute(color & enable));
                    }
                }
            } else {
                for bit in (0..8).rev() {
                    row.push(palette.attribute(planar(word, bit) & enable));
                }
            }
        }
    }

    fn draw_text(
        &self,
        planes: &Planes,
        palette: &Palette,
        line: Line,
        columns: u32,
        blink: Blink,
        row: &mut Vec<Pixel>,
    ) {
        let mode = self.attr_mode();
        let nine = self.dots() == 9;
        let fonts = self.fonts();
        let cursor = self.cursor_address().filter(|_| blink.cursor && self.is_cursor_row(line.row));
        for column in 0..=columns {
            let address = line.address.wrapping_add(column) % PLANE_WORDS;
            let [character, attribute, ..] = planes.word(address);
            let font = fonts[usize::from(attribute >> 3 & 1)];
            let glyph = font + u32::from(character) * FONT_BYTES + line.row;
            let mut bits = u32::from(planes.word(glyph)[2]) << 1;
            if mode.line_graphics() && (0xc0..=0xdf).contains(&character) {
                bits |= bits >> 1 & 1;
            }
            if mode.mono() && attribute & 7 == 1 && line.row == u32::from(self.cr[cr::UNDERLINE] & 0x1f) {
                bits = 0x1ff;
            }
            let mut background = attribute >> 4;
            if mode.blink() {
                if background & 8 != 0 && !blink.characters {
                    bits = 0;
                }
                background &= 7;
            }
            if cursor == Some(address) {
                bits = 0x1ff;
            }
            let colors = [palette.attribute(background), palette.attribute(attribute & 0x0f)];
            for dot in 0..if nine { 9 } else { 8 } {
                row.push(colors[(bits >> (8 - dot) & 1) as usize]);
            }
        }
    }

    /// Plane addresses of the fonts for attribute bit 3 clear and set.
    fn fonts(&self) -> [u32; 2] {
        let select = u32::from(self.sr[sr::FONTS]);
        let at = |low: u32, high: u32| low << 14 | high << 13;
        [at(select & 3, select >> 4 & 1), at(select >> 2 & 3, select >> 5 & 1)]
    }

    fn cursor_address(&self) -> Option<u32> {
        (self.cr[cr::CURSOR_START] & 0x20 == 0).then(|| {
            (u32::from(self.cr[cr::CURSOR_HIGH]) << 8 | u32::from(self.cr[cr::CURSOR_LOW])) % PLANE_WORDS
        })
    }

    fn is_cursor_row(&self, row: u32) -> bool {
        let start = u32::from(self.cr[cr::CURSOR_START] & 0x1f);
        let end = u32::from(self.cr[cr::CURSOR_END] & 0x1f);
        (start..=end).contains(&row)
    }

    /// The characters on the screen in a text mode.
    pub(super) fn text(&self, vram: &HostMemory) -> Option<Vec<Vec<u8>>> {
        if self.vbe.is_enabled() || self.is_graphics() || self.is_blank() {
            return None;
        }
        let planes = Planes::read(vram);
        let columns = u32::from(self.cr[cr::H_END]) + 1;
        let mut rows: Vec<Vec<u8>> = Vec::new();
        let mut last = None;
        for line in self.lines(self.v_display()) {
            // A row of characters starts where the address changes or the row counter starts over.
            if last.is_some_and(|(address, row)| address == line.address && line.row >= row) {
                last = Some((line.address, line.row));
                continue;
            }
            last = Some((line.address, line.row));
            rows.push((0..columns).map(|column| planes.word(line.address + column)[0]).collect());
        }
        Some(rows)
    }

    fn draw_vbe(&self, vram: &HostMemory) -> Frame {
        let vbe = &self.vbe;
        let (width, height) = (u32::from(vbe.x_res), u32::from(vbe.y_res));
        if self.is_blank() {
            return Frame { width, height, pixels: vec![0; width as usize * height as usize * 4] };
        }
        let palette = Palette::new(self);
        let pitch = vbe.pitch();
        let mut pixels = Vec::with_capacity((width as usize) * (height as usize) * 4);
        let bytes_per_row = match vbe.bpp {
            // Eight pixels are a word of the four planes; one more for an offset inside a word.
            4 => (width as usize / 8 + 1) * 4,
            15 => width as usize * 2,
            bpp => width as usize * usize::from(bpp / 8),
        };
        let mut row = vec![0; bytes_per_row];
        for y in 0..u64::from(height) {
            let x = u64::from(vbe.x_offset);
            let left = match vbe.bpp {
                4 => x / 8 * 4,
                15 => x * 2,
                bpp => x * u64::from(bpp / 8),
            };
            let at = (y + u64::from(vbe.y_offset)) * pitch + left;
            // The last row may reach past the end of memory by the spare word.
            let there = vram.len().saturating_sub(at).min(bytes_per_row as u64) as usize;
            row.fill(0);
            vram.read(at, &mut row[..there]);
            match vbe.bpp {
                4 => {
                    let first = usize::from(vbe.x_offset % 8);
                    for dot in first..first + width as usize {
                        let at = dot / 8 * 4;
                        let word = [row[at], row[at + 1], row[at + 2], row[at + 3]];
                        pixels.extend(palette.attribute(planar(word, 7 - (dot % 8) as u32)));
                    }
                }
                8 => row.iter().for_each(|&index| pixels.extend(palette.dac(index))),
                15 => {
                    for pair in row.chunks_exact(2) {
                        let raw = u16::from_le_bytes([pair[0], pair[1]]);
                        pixels.extend([widen(raw, 5), widen(raw >> 5, 5), widen(raw >> 10, 5), 0]);
                    }
                }
                16 => {
                    for pair in row.chunks_exact(2) {
                        let raw = u16::from_le_bytes([pair[0], pair[1]]);
                        pixels.extend([widen(raw, 5), widen(raw >> 5, 6), widen(raw >> 11, 5), 0]);
                    }
                }
                24 => row.chunks_exact(3).for_each(|bgr| pixels.extend([bgr[0], bgr[1], bgr[2], 0])),
                _ => row.chunks_exact(4).for_each(|bgrx| pixels.extend([bgrx[0], bgrx[1], bgrx[2], 0])),
            }
        }
        Frame { width, height, pixels }
    }
}

/// The 4-bit color at bit `bit` of the four planes.
fn planar(word: [u8; 4], bit: u32) -> u8 {
    (0..4).map(|plane| (word[plane] >> bit & 1) << plane).sum()
}

/// The lowest `bits` bits of `raw`, spread over eight.
fn widen(raw: u16, bits: u32) -> u8 {
    let value = raw & ((1 << bits) - 1);
    (value << (8 - bits) | value >> (2 * bits - 8)) as u8
}

/// What blinks is visible or not.
#[derive(Clone, Copy)]
struct Blink {
    cursor: bool,
    characters: bool,
}

impl Blink {
    /// The cursor blinks every 16 frames, characters every 32.
    fn at(now: Nanos) -> Self {
        let frame = State::frame_number(now);
        Self { cursor: (frame / 8).is_multiple_of(2), characters: (frame / 16).is_multiple_of(2) }
    }
}

/// All colors, looked up once for a picture.
struct Palette {
    dac: [Pixel; 256],
    attributes: [Pixel; 16],
}

impl Palette {
    fn new(state: &State) -> Self {
        let eight_bits = state.vbe.is_dac_8bit();
        let color = |index: u8| {
            let at = usize::from(index & state.dac_mask) * 3;
            let component = |at: usize| {
                let value = state.dac[at];
                if eight_bits { value } else { (value & 0x3f) << 2 | (value & 0x3f) >> 4 }
            };
            [component(at + 2), component(at + 1), component(at), 0]
        };
        let select = state.ar[ar::COLOR_SELECT];
        let attribute = |index: usize| {
            let value = state.ar[index];
            if state.attr_mode().color_256() && state.is_graphics() {
                color(value & 0x0f)
            } else if state.attr_mode().select_54() {
                color((value & 0x0f) | (select & 0x0f) << 4)
            } else {
                color((value & 0x3f) | (select & 0x0c) << 4)
            }
        };
        Self {
            dac: std::array::from_fn(|index| color(index as u8)),
            attributes: std::array::from_fn(attribute),
        }
    }

    fn dac(&self, index: u8) -> Pixel {
        self.dac[usize::from(index)]
    }

    fn attribute(&self, index: u8) -> Pixel {
        self.attributes[usize::from(index & 0x0f)]
    }
}
