//! The legacy memory window at 0xa0000–0xbffff: planes, latches and write modes (IBM VGA Technical Reference, "Graphics Controller").
//!
//! Video memory interleaves the planes: byte `4 * offset + plane`. So a read of the four latches is one 32-bit word, and in
//! chained modes the guest's address is the byte's address.

use pgm::HostMemory;

use crate::spec::{gfx, seq};
use crate::vga::State;

/// Every byte of a word: the plane mask as byte mask.
fn spread(mask: u8) -> u32 {
    (0..4).map(|plane| if mask & 1 << plane != 0 { 0xff << (8 * plane) } else { 0 }).sum()
}

/// Where an address of the window lands: the offset within the window that MISC selects, or `None` outside it.
fn window_offset(state: &State, address: u64) -> Option<u64> {
    let address = address & 0x1_ffff;
    match state.gfx[gfx::MISC] >> 2 & 3 {
        0 => Some(address),
        1 => (address < 0x1_0000).then(|| address + state.bank_offset()),
        2 => (0x1_0000..0x1_8000).contains(&address).then(|| address - 0x1_0000),
        _ => (address >= 0x1_8000).then(|| address - 0x1_8000),
    }
}

fn word(vram: &HostMemory, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    vram.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// A guest's read of one byte, `address` bytes after 0xa0000.
pub(crate) fn read(state: &mut State, vram: &HostMemory, address: u64) -> u8 {
    let Some(at) = window_offset(state, address) else { return 0xff };
    if state.seq[seq::MEMORY_MODE] & seq::CHAIN4 != 0 {
        let mut byte = [0xff];
        vram.read(at, &mut byte);
        return byte[0];
    }
    if state.gfx[gfx::MODE] & gfx::ODD_EVEN != 0 {
        let plane = u64::from(state.gfx[gfx::READ_MAP] & 2) | at & 1;
        let mut byte = [0xff];
        vram.read((at & !1) << 1 | plane, &mut byte);
        return byte[0];
    }
    state.latch = word(vram, at * 4);
    if state.gfx[gfx::MODE] & 8 == 0 {
        return (state.latch >> (8 * (state.gfx[gfx::READ_MAP] & 3))) as u8;
    }
    // Read mode 1: a bit is set where all planes that matter have the compared color.
    let care = spread(state.gfx[gfx::COLOR_DONT_CARE]);
    let differs = (state.latch ^ spread(state.gfx[gfx::COLOR_COMPARE])) & care;
    let any = differs | differs >> 16;
    !((any | any >> 8) as u8)
}

/// A guest's write of one byte, `address` bytes after 0xa0000.
pub(crate) fn write(state: &State, vram: &HostMemory, address: u64, value: u8) {
    let Some(at) = window_offset(state, address) else { return };
    let map_mask = state.seq[seq::MAP_MASK];
    if state.seq[seq::MEMORY_MODE] & seq::CHAIN4 != 0 {
        if map_mask & 1 << (at & 3) != 0 {
            vram.write(at, &[value]);
        }
        return;
    }
    if state.gfx[gfx::MODE] & gfx::ODD_EVEN != 0 {
        for plane in [at & 1, at & 1 | 2] {
            if map_mask & 1 << plane != 0 {
                vram.write((at & !1) << 1 | plane, &[value]);
            }
        }
        return;
    }
    let rotate = u32::from(state.gfx[gfx::DATA_ROTATE] & 7);
    let set_reset = spread(state.gfx[gfx::SET_RESET]);
    let mut bit_mask = state.gfx[gfx::BIT_MASK];
    let data = match state.gfx[gfx::MODE] & 3 {
        0 => {
            let rotated = u32::from(value.rotate_right(rotate)) * 0x0101_0101;
            let enable = spread(state.gfx[gfx::ENABLE_SET_RESET]);
            rotated & !enable | set_reset & enable
        }
        1 => {
            let mask = spread(map_mask);
            let merged = word(vram, at * 4) & !mask | state.latch & mask;
            vram.write(at * 4, &merged.to_le_bytes());
            return;
        }
        2 => spread(value),
        _ => {
            bit_mask &= value.rotate_right(rotate);
            set_reset
        }
    };
    let data = match state.gfx[gfx::DATA_ROTATE] >> 3 & 3 {
        0 => data,
        1 => data & state.latch,
        2 => data | state.latch,
        _ => data ^ state.latch,
    };
    let bits = u32::from(bit_mask) * 0x0101_0101;
    let data = data & bits | state.latch & !bits;
    let mask = spread(map_mask);
    let merged = if mask == u32::MAX { data } else { word(vram, at * 4) & !mask | data & mask };
    vram.write(at * 4, &merged.to_le_bytes());
}
