//! FXSAVE and XSAVE images (Intel SDM volume 1, 10.5 and chapter 13).

use cpum::CpuState;
use cpum::state::{XsaveArea, gpr};
use iced_x86::{Instruction, Mnemonic};

use super::{MXCSR_DEFAULT, MXCSR_MASK, area, mxcsr, set_mxcsr, set_u16, set_u64, u16_at, u64_at, x87};
use crate::decode::effective_segment;
use crate::{Fault, GuestMemory};

/// State components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// XCOMP_BV: the image is compacted.
const COMPACT: u64 = 1 << 63;
/// Legacy region and header.
const HEADER_END: usize = 576;

/// The MXCSR in an image.
pub(super) fn image_mxcsr(image: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&image[area::MXCSR..area::MXCSR + 4]);
    u32::from_le_bytes(bytes)
}

/// End of the XMM registers that exist in the mode.
pub(super) fn xmm_end(long: bool) -> usize {
    if long { area::XMM_END } else { area::XMM + 8 * 16 }
}

/// Writes the x87 part of an image. Without `wide`, pointers are 32 bits and their selectors zero.
pub(super) fn store_x87(state: &XsaveArea, wide: bool, image: &mut [u8]) {
    image[..area::MXCSR].copy_from_slice(&state.0[..area::MXCSR]);
    image[area::FTW + 1] = 0;
    if !wide {
        image[area::FIP + 4..area::FDP].fill(0);
        image[area::FDP + 4..area::MXCSR].fill(0);
    }
    image[area::ST..area::XMM].copy_from_slice(&state.0[area::ST..area::XMM]);
}

/// Writes MXCSR and its mask.
pub(super) fn store_mxcsr(state: &XsaveArea, image: &mut [u8]) {
    image[area::MXCSR..area::MXCSR_MASK].copy_from_slice(&mxcsr(state).to_le_bytes());
    image[area::MXCSR_MASK..area::ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

/// Reads the x87 part of an image.
pub(super) fn load_x87(state: &mut XsaveArea, wide: bool, image: &[u8]) {
    state.0[area::FSW..area::MXCSR].copy_from_slice(&image[area::FSW..area::MXCSR]);
    state.0[area::FTW + 1] = 0;
    let opcode = u16_at(state, area::FOP) & 0x7ff;
    set_u16(state, area::FOP, opcode);
    if !wide {
        state.0[area::FIP + 4..area::FDP].fill(0);
        state.0[area::FDP + 4..area::MXCSR].fill(0);
    }
    for slot in (area::ST..area::XMM).step_by(16) {
        state.0[slot..slot + 10].copy_from_slice(&image[slot..slot + 10]);
        state.0[slot + 10..slot + 16].fill(0);
    }
    x87::set_control(state, u16::from_le_bytes([image[0], image[1]]));
}

fn init_x87(state: &mut XsaveArea) {
    x87::init(state);
    state.0[area::ST..area::XMM].fill(0);
}

/// XINUSE: the components that are not in their initial state.
pub fn in_use(state: &XsaveArea) -> u64 {
    let zero = |range: std::ops::Range<usize>| state.0[range].iter().all(|&b| b == 0);
    let x87 =
        u16_at(state, area::FCW) != 0x37f || !zero(area::FSW..area::MXCSR) || !zero(area::ST..area::XMM);
    let sse = !zero(area::XMM..area::XMM_END);
    let avx = !zero(area::YMM..area::YMM + 256);
    (if x87 { X87 } else { 0 }) | (if sse { SSE } else { 0 }) | (if avx { AVX } else { 0 })
}

pub(super) fn execute(
    insn: &Instruction,
    cpu: &mut CpuState,
    memory: &mut dyn GuestMemory,
    offset: u64,
) -> Result<(), Fault> {
    use Mnemonic::*;
    let wide = matches!(insn.mnemonic(), Xsave64 | Xsaveopt64 | Xsavec64 | Xrstor64);
    let requested = (cpu.gpr[gpr::RDX] << 32) | (cpu.gpr[gpr::RAX] & 0xffff_ffff);
    let components = requested & cpu.xcr0 & (X87 | SSE | AVX);
    let segment = effective_segment(insn, cpu.is_64bit()).number() & 7;
    let restore = matches!(insn.mnemonic(), Xrstor | Xrstor64);
    let size = if components & AVX != 0 && !restore { XsaveArea::SIZE } else { HEADER_END };
    let linear = memory.linear(cpu, segment, offset, size as u32, !restore)?;
    if linear & 63 != 0 {
        return Err(Fault::GP0);
    }
    match insn.mnemonic() {
        Xrstor | Xrstor64 => load(cpu, memory, linear, components, wide),
        Xsavec | Xsavec64 => store(cpu, memory, linear, size, components, wide, Form::Compact),
        Xsaveopt | Xsaveopt64 => store(cpu, memory, linear, size, components, wide, Form::Optimised),
        _ => store(cpu, memory, linear, size, components, wide, Form::Plain),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Plain,
    Optimised,
    Compact,
}

fn store(
    cpu: &mut CpuState,
    memory: &mut dyn GuestMemory,
    linear: u64,
    size: usize,
    components: u64,
    wide: bool,
    form: Form,
) -> Result<(), Fault> {
    memory.probe_write(cpu, linear, size as u32)?;
    let state = &cpu.xsave;
    let long = cpu.is_64bit();
    let mut used = in_use(state);
    if form == Form::Compact && mxcsr(state) != MXCSR_DEFAULT {
        used |= SSE;
    }
    let written = if form == Form::Plain { components } else { components & used };
    let mut image = [0; HEADER_END];
    if written & X87 != 0 {
        store_x87(state, wide, &mut image);
        memory.write_bytes(cpu, linear, &image[..area::MXCSR])?;
        memory.write_bytes(cpu, linear + area::ST as u64, &image[area::ST..area::XMM])?;
    }
    let with_mxcsr = if form == Form::Compact { written & SSE != 0 } else { components & (SSE | AVX) != 0 };
    if with_mxcsr {
        store_mxcsr(state, &mut image);
        memory.write_bytes(cpu, linear + area::MXCSR as u64, &image[area::MXCSR..area::ST])?;
    }
    if written & SSE != 0 {
        memory.write_bytes(cpu, linear + area::XMM as u64, &state.0[area::XMM..xmm_end(long)])?;
    }
    if written & AVX != 0 {
        let count = if long { 16 } else { 8 };
        memory.write_bytes(cpu, linear + area::YMM as u64, &state.0[area::YMM..area::YMM + 16 * count])?;
    }
    let mut header = [0; 16];
    memory.read_bytes(cpu, linear + area::XSTATE_BV as u64, &mut header[..8])?;
    let mut old = [0; 8];
    old.copy_from_slice(&header[..8]);
    let old = if form == Form::Compact { 0 } else { u64::from_le_bytes(old) };
    header[..8].copy_from_slice(&((old & !components) | (used & components)).to_le_bytes());
    header[8..].copy_from_slice(&(components | COMPACT).to_le_bytes());
    let len = if form == Form::Compact { 16 } else { 8 };
    memory.write_bytes(cpu, linear + area::XSTATE_BV as u64, &header[..len])
}

fn load(
    cpu: &mut CpuState,
    memory: &mut dyn GuestMemory,
    linear: u64,
    components: u64,
    wide: bool,
) -> Result<(), Fault> {
    let mut image = [0; XsaveArea::SIZE];
    memory.read_bytes(cpu, linear, &mut image[..HEADER_END])?;
    let word = |at: usize| -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&image[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (present, layout) = (word(area::XSTATE_BV), word(area::XCOMP_BV));
    let compact = layout & COMPACT != 0;
    let valid = if compact {
        layout & !COMPACT & !cpu.xcr0 == 0
            && present & !layout == 0
            && image[528..HEADER_END].iter().all(|&b| b == 0)
    } else {
        present & !cpu.xcr0 == 0 && image[520..536].iter().all(|&b| b == 0)
    };
    if !valid {
        return Err(Fault::GP0);
    }
    let loaded = components & present;
    let long = cpu.is_64bit();
    let count = if long { 16 } else { 8 };
    if loaded & AVX != 0 {
        let (start, end) = (area::YMM, area::YMM + 16 * count);
        memory.read_bytes(cpu, linear + start as u64, &mut image[start..end])?;
    }
    let new_mxcsr = if compact {
        match (components & SSE != 0, loaded & SSE != 0) {
            (true, true) => Some(image_mxcsr(&image)),
            (true, false) => Some(MXCSR_DEFAULT),
            _ => None,
        }
    } else {
        (components & (SSE | AVX) != 0).then(|| image_mxcsr(&image))
    };
    if new_mxcsr.is_some_and(|value| value & !MXCSR_MASK != 0) {
        return Err(Fault::GP0);
    }
    let state = &mut cpu.xsave;
    if let Some(value) = new_mxcsr {
        set_mxcsr(state, value);
    }
    if components & X87 != 0 {
        if loaded & X87 != 0 { load_x87(state, wide, &image) } else { init_x87(state) }
    }
    if components & SSE != 0 {
        let range = area::XMM..xmm_end(long);
        if loaded & SSE != 0 {
            state.0[range.clone()].copy_from_slice(&image[range])
        } else {
            state.0[range].fill(0)
        }
    }
    if components & AVX != 0 {
        let range = area::YMM..area::YMM + 16 * count;
        if loaded & AVX != 0 {
            state.0[range.clone()].copy_from_slice(&image[range])
        } else {
            state.0[range].fill(0)
        }
        let header = u64_at(state, area::XSTATE_BV) | AVX;
        set_u64(state, area::XSTATE_BV, header);
    }
    Ok(())
}
