//! Draws what the screen shows, from the registers and a copy of video memory.

use pdm::connector::Frame;
use pgm::HostMemory;

use crate::spec::{attr, crtc, dispi, gfx, seq};
use crate::vga::State;

/// Larger screens than the registers can describe sensibly are cut.
const MAX_SIDE: u32 = 4096;
/// Blink half-period of the cursor and of characters, in frames of 1/70 s.
const CURSOR_FRAMES: u64 = 16;
const TEXT_FRAMES: u64 = 32;

/// Geometry of the legacy modes, from the CRT controller.
struct Crtc {
    /// Character clocks per line.
    columns: u32,
    /// Scan lines shown.
    lines: u32,
    /// Rows of a character cell, or repetitions of a graphics line.
    cell_height: u32,
    doubled: bool,
    start: u32,
    /// Plane bytes from one row to the next.
    pitch: u32,
    line_compare: u32,
}

impl Crtc {
    fn new(state: &State) -> Self {
        let r = &state.crtc;
        let overflow = u32::from(r[crtc::OVERFLOW]);
        let max_scan = u32::from(r[crtc::MAX_SCAN]);
        Self {
            columns: u32::from(r[crtc::H_DISPLAY_END]) + 1,
            lines: (u32::from(r[crtc::V_DISPLAY_END]) | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1,
            cell_height: (max_scan & 0x1f) + 1,
            doubled: max_scan & 0x80 != 0,
            start: u32::from(r[crtc::START_HIGH]) << 8 | u32::from(r[crtc::START_LOW]),
            pitch: u32::from(r[crtc::OFFSET]) * 2,
            line_compare: u32::from(r[crtc::LINE_COMPARE]) | (overflow & 0x10) << 4 | (max_scan & 0x40) << 3,
        }
    }
}

fn black(width: u32, height: u32) -> Frame {
    Frame { width, height, pixels: vec![0; width as usize * height as usize * 4] }
}

fn copy(vram: &HostMemory, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len.min(vram.len()) as usize];
    vram.read(0, &mut bytes);
    bytes
}

/// The DAC's entry as blue, green, red, 0.
fn dac(state: &State, index: u8) -> [u8; 4] {
    let [r, g, b] = state.dac[usize::from(index & state.dac_mask)];
    let wide = |v: u8| {
        if state.dac_is_8bit() { v } else { (v & 0x3f) << 2 | (v & 0x3f) >> 4 }
    };
    [wide(b), wide(g), wide(r), 0]
}

/// The DAC's entry for a 4-bit color, through the attribute controller's palette.
fn palette(state: &State) -> [[u8; 4]; 16] {
    let select = state.attr[attr::COLOR_SELECT];
    std::array::from_fn(|i| {
        let v = state.attr[i];
        dac(
            state,
            if state.attr[attr::MODE] & attr::P54S != 0 {
                v & 0x0f | select << 4
            } else {
                v & 0x3f | (select & 0x0c) << 4
            },
        )
    })
}

/// Whether the screen is switched off.
fn is_blank(state: &State) -> bool {
    state.attr_index & attr::SCREEN_ON == 0 || state.seq[seq::CLOCKING] & seq::SCREEN_OFF != 0
}

pub(crate) fn frame(state: &State, vram: &HostMemory, frames: u64) -> Frame {
    if state.vbe[dispi::ENABLE] & dispi::ENABLED != 0 {
        return vbe(state, vram);
    }
    let c = Crtc::new(state);
    if state.gfx[gfx::MISC] & gfx::GRAPHICS != 0 {
        graphics(state, vram, &c)
    } else {
        text(state, vram, &c, frames)
    }
}

fn vbe(state: &State, vram: &HostMemory) -> Frame {
    let r = &state.vbe;
    let (width, height) = (u32::from(r[dispi::XRES]), u32::from(r[dispi::YRES]));
    let mut frame = black(width.clamp(1, MAX_SIDE), height.clamp(1, MAX_SIDE));
    if is_blank(state) {
        return frame;
    }
    let bpp = u32::from(r[dispi::BPP]);
    let pitch = state.vbe_pitch() as usize;
    let bytes = bpp.div_ceil(8) as usize;
    let (x0, y0) = (usize::from(r[dispi::X_OFFSET]), usize::from(r[dispi::Y_OFFSET]));
    let memory = copy(vram, (y0 as u64 + u64::from(frame.height)) * pitch as u64 * 4 + 65536);
    let colors = palette(state);
    for y in 0..frame.height as usize {
        let row = (y + y0) * pitch;
        for x in 0..frame.width as usize {
            let px = x + x0;
            let color = if bpp == 4 {
                let at = (row + px / 8) * 4;
                let mut index = 0;
                for plane in 0..4 {
                    index |= (memory.get(at + plane).copied().unwrap_or(0) >> (7 - px % 8) & 1) << plane;
                }
                colors[usize::from(index)]
            } else {
                let at = row + px * bytes;
                let Some(p) = memory.get(at..at + bytes) else { continue };
                match bpp {
                    8 => dac(state, p[0]),
                    15 | 16 => {
                        let v = u32::from(u16::from_le_bytes([p[0], p[1]]));
                        let five = |v: u32| ((v & 31) << 3 | (v & 31) >> 2) as u8;
                        if bpp == 15 {
                            [five(v), five(v >> 5), five(v >> 10), 0]
                        } else {
                            let g = v >> 5 & 63;
                            [five(v), (g << 2 | g >> 4) as u8, five(v >> 11), 0]
                        }
                    }
                    _ => [p[0], p[1], p[2], 0],
                }
            };
            let out = (y * frame.width as usize + x) * 4;
            frame.pixels[out..out + 4].copy_from_slice(&color);
        }
    }
    frame
}

fn graphics(state: &State, vram: &HostMemory, c: &Crtc) -> Frame {
    let shift = state.gfx[gfx::MODE] >> 5 & 3;
    let wide = shift >= 2;
    // In 256-color modes two character clocks make eight pixels.
    let width = (if wide { c.columns * 4 } else { c.columns * 8 }).clamp(1, MAX_SIDE);
    let mode = state.crtc[crtc::MODE];
    // CGA-compatible modes take address bits 13 and 14 from the row scan counter.
    let interleaved = mode & 3 != 3;
    let repeat = if interleaved { 1 } else { c.cell_height } * if c.doubled { 2 } else { 1 };
    let height = (c.lines / repeat).clamp(1, MAX_SIDE);
    let mut frame = black(width, height);
    if is_blank(state) {
        return frame;
    }
    let memory = copy(vram, 1 << 20);
    let byte = |at: u32| memory.get(at as usize & 0xf_ffff).copied().unwrap_or(0);
    let colors = palette(state);
    let enable = state.attr[attr::PLANE_ENABLE] & 0x0f;
    let chain4 = state.seq[seq::MEMORY_MODE] & seq::CHAIN4 != 0;
    let split = c.line_compare / repeat;
    for y in 0..height {
        let below = y > split;
        let (line, start) = if below { (y - split - 1, 0) } else { (y, c.start) };
        let panning = if below && state.attr[attr::MODE] & attr::PAN_SPLIT != 0 {
            0
        } else {
            u32::from(state.attr[attr::PANNING] & 0x0f)
        };
        let (row, scan) = if interleaved { (line / c.cell_height, line % c.cell_height) } else { (line, 0) };
        let mut base = start.wrapping_add(row * c.pitch);
        if mode & 1 == 0 {
            base = base & !0x2000 | (scan & 1) << 13;
        }
        if mode & 2 == 0 {
            base = base & !0x4000 | (scan & 2) << 13;
        }
        for x in 0..width {
            let color = if wide {
                let x = x + panning / 2;
                let at = if chain4 { start * 4 + row * c.pitch * 4 + x } else { base * 4 + x };
                dac(state, byte(at))
            } else if shift == 1 {
                let x = x + panning;
                let cell = base + x / 8;
                let data = byte(cell * 4 + x / 4 % 2);
                colors[usize::from(data >> (6 - 2 * (x % 4)) & 3)]
            } else {
                let x = x + panning;
                let cell = (base + x / 8) * 4;
                let bit = 7 - x % 8;
                let index = (0..4).map(|plane| (byte(cell + plane) >> bit & 1) << plane).sum::<u8>();
                colors[usize::from(index & enable)]
            };
            let out = (y as usize * width as usize + x as usize) * 4;
            frame.pixels[out..out + 4].copy_from_slice(&color);
        }
    }
    frame
}

fn text(state: &State, vram: &HostMemory, c: &Crtc, frames: u64) -> Frame {
    let cell_width = if state.seq[seq::CLOCKING] & seq::EIGHT_DOTS != 0 { 8 } else { 9 };
    let width = (c.columns * cell_width).clamp(1, MAX_SIDE);
    let height = (c.lines / if c.doubled { 2 } else { 1 }).clamp(1, MAX_SIDE);
    let mut frame = black(width, height);
    if is_blank(state) {
        return frame;
    }
    let memory = copy(vram, 1 << 18);
    let byte = |at: u32| memory.get(at as usize & 0x3_ffff).copied().unwrap_or(0);
    let colors = palette(state);
    let map = u32::from(state.seq[seq::CHARACTER_MAP]);
    // Attribute bit 3 chooses between the two fonts, if they differ.
    let fonts = [map >> 4 & 1 | map << 1 & 6, map >> 5 & 1 | map >> 1 & 6].map(|bank| bank * 8192);
    let cursor_at = u32::from(state.crtc[crtc::CURSOR_HIGH]) << 8 | u32::from(state.crtc[crtc::CURSOR_LOW]);
    let cursor_first = u32::from(state.crtc[crtc::CURSOR_START] & 0x1f);
    let cursor_last = u32::from(state.crtc[crtc::CURSOR_END] & 0x1f);
    let cursor_on = state.crtc[crtc::CURSOR_START] & 0x20 == 0 && (frames / CURSOR_FRAMES).is_multiple_of(2);
    let blink = state.attr[attr::MODE] & attr::BLINK != 0;
    let underline = u32::from(state.crtc[crtc::UNDERLINE] & 0x1f);
    let preset = u32::from(state.crtc[crtc::PRESET_ROW] & 0x1f);
    for y in 0..height {
        let below = y > c.line_compare;
        let (line, start) = if below { (y - c.line_compare - 1, 0) } else { (y + preset, c.start) };
        let (row, scan) = (line / c.cell_height, line % c.cell_height);
        for column in 0..c.columns {
            let at = start.wrapping_add(row * c.pitch).wrapping_add(column) & 0xffff;
            let (code, style) = (byte(at * 4), byte(at * 4 + 1));
            let font = fonts[usize::from(style >> 3 & 1)];
            let mut dots = byte((font + u32::from(code) * 32 + scan) * 4 + 2);
            let mut back = style >> 4;
            if blink {
                back &= 7;
                if style & 0x80 != 0 && frames / TEXT_FRAMES % 2 == 1 {
                    dots = 0;
                }
            }
            let fore = style & 0x0f;
            // The underline attribute of monochrome text: blue in color modes, where the line lies outside the cell.
            if fore & 7 == 1 && scan == underline && underline < c.cell_height {
                dots = 0xff;
            }
            if cursor_on && at == cursor_at && (cursor_first..=cursor_last).contains(&scan) {
                dots = 0xff;
            }
            let ninth = dots & 1 != 0
                && ((0xc0..=0xdf).contains(&code) && state.attr[attr::MODE] & attr::LINE_GRAPHICS != 0
                    || dots == 0xff && at == cursor_at && cursor_on);
            for dot in 0..cell_width {
                let x = column * cell_width + dot;
                if x >= width {
                    break;
                }
                let on = if dot == 8 { ninth } else { dots >> (7 - dot) & 1 != 0 };
                let color = colors[usize::from(if on { fore } else { back })];
                let out = (y as usize * width as usize + x as usize) * 4;
                frame.pixels[out..out + 4].copy_from_slice(&color);
            }
        }
    }
    frame
}

/// The characters of a text mode.
pub(crate) fn characters(state: &State, vram: &HostMemory) -> Option<Vec<Vec<u8>>> {
    if state.vbe[dispi::ENABLE] & dispi::ENABLED != 0 || state.gfx[gfx::MISC] & gfx::GRAPHICS != 0 {
        return None;
    }
    let c = Crtc::new(state);
    let memory = copy(vram, 1 << 18);
    let rows = (c.lines / c.cell_height).clamp(1, 128);
    let row = |row: u32| {
        (0..c.columns)
            .map(|column| memory[((c.start + row * c.pitch + column) & 0xffff) as usize * 4])
            .collect()
    };
    Some((0..rows).map(row).collect())
}
