//! Masked moves and gathers, element by element, so that masked-off elements do not fault and a gather that faults keeps
//! what it has got.

use cpum::CpuState;
use cpum::state::{XsaveArea, gpr};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{area, set_u64, u64_at, vector_number, x87};
use crate::decode::effective_segment;
use crate::{Fault, GuestMemory};

type Vector = [u8; 32];

fn vector(state: &XsaveArea, n: usize) -> Vector {
    let mut value = [0; 32];
    value[..16].copy_from_slice(&state.0[area::XMM + 16 * n..area::XMM + 16 * (n + 1)]);
    value[16..].copy_from_slice(&state.0[area::YMM + 16 * n..area::YMM + 16 * (n + 1)]);
    value
}

/// Writes a register as VEX instructions do: all 256 bits.
fn set_vector(state: &mut XsaveArea, n: usize, value: &Vector) {
    state.0[area::XMM + 16 * n..area::XMM + 16 * (n + 1)].copy_from_slice(&value[..16]);
    state.0[area::YMM + 16 * n..area::YMM + 16 * (n + 1)].copy_from_slice(&value[16..]);
    let header = u64_at(state, area::XSTATE_BV) | 4;
    set_u64(state, area::XSTATE_BV, header);
}

/// Executes the instruction; `offset` is the memory operand's offset in its segment, ignored by gathers and by
/// instructions that address through rDI.
pub(super) fn execute(
    insn: &Instruction,
    cpu: &mut CpuState,
    memory: &mut dyn GuestMemory,
    offset: u64,
) -> Result<(), Fault> {
    use Mnemonic::*;
    if insn.is_vsib() {
        return gather(insn, cpu, memory);
    }
    match insn.mnemonic() {
        Maskmovq | Maskmovdqu | Vmaskmovdqu => masked_bytes(insn, cpu, memory),
        Vmaskmovps | Vpmaskmovd => masked(insn, cpu, memory, offset, 4),
        Vmaskmovpd | Vpmaskmovq => masked(insn, cpu, memory, offset, 8),
        _ => Err(Fault::UD),
    }
}

fn segment(insn: &Instruction, cpu: &CpuState) -> usize {
    effective_segment(insn, cpu.is_64bit()).number() & 7
}

/// Writes the chosen elements of `data`, after probing all of them.
fn write_chosen(
    cpu: &CpuState,
    memory: &mut dyn GuestMemory,
    segment: usize,
    offset: impl Fn(usize) -> u64,
    data: &[u8],
    element: usize,
    chosen: impl Fn(usize) -> bool,
) -> Result<(), Fault> {
    let count = data.len() / element;
    for i in (0..count).filter(|&i| chosen(i)) {
        let linear = memory.linear(cpu, segment, offset(i), element as u32, true)?;
        memory.probe_write(cpu, linear, element as u32)?;
    }
    for i in (0..count).filter(|&i| chosen(i)) {
        let linear = memory.linear(cpu, segment, offset(i), element as u32, true)?;
        memory.write_bytes(cpu, linear, &data[i * element..(i + 1) * element])?;
    }
    Ok(())
}

/// MASKMOVQ and MASKMOVDQU.
fn masked_bytes(insn: &Instruction, cpu: &mut CpuState, memory: &mut dyn GuestMemory) -> Result<(), Fault> {
    let base = cpu.gpr[gpr::RDI];
    let wrap = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let mmx = insn.mnemonic() == Mnemonic::Maskmovq;
    let (data, mask, len) = if mmx {
        let top = x87::top(&cpu.xsave);
        let value = |register: Register| {
            let mut bytes = [0; 32];
            let slot = area::ST + 16 * ((register.number() + 8 - top) % 8);
            bytes[..8].copy_from_slice(&cpu.xsave.0[slot..slot + 8]);
            bytes
        };
        (value(insn.op1_register()), value(insn.op2_register()), 8)
    } else {
        let value = |register| vector_number(register).map(|n| vector(&cpu.xsave, n)).ok_or(Fault::UD);
        (value(insn.op1_register())?, value(insn.op2_register())?, 16)
    };
    let offset = |i: usize| base.wrapping_add(i as u64) & wrap;
    write_chosen(cpu, memory, segment(insn, cpu), offset, &data[..len], 1, |i| mask[i] & 0x80 != 0)?;
    if mmx {
        x87::enter_mmx(cpu);
    }
    Ok(())
}

/// VMASKMOV and VPMASKMOV, loads and stores.
fn masked(
    insn: &Instruction,
    cpu: &mut CpuState,
    memory: &mut dyn GuestMemory,
    offset: u64,
    element: usize,
) -> Result<(), Fault> {
    let number = |i| vector_number(insn.op_register(i)).ok_or(Fault::UD);
    let mask = vector(&cpu.xsave, number(1)?);
    let len = insn.memory_size().size();
    let chosen = |i: usize| mask[(i + 1) * element - 1] & 0x80 != 0;
    let at = |i: usize| offset.wrapping_add((i * element) as u64);
    if insn.op0_kind() == OpKind::Memory {
        let data = vector(&cpu.xsave, number(2)?);
        return write_chosen(cpu, memory, segment(insn, cpu), at, &data[..len], element, chosen);
    }
    let mut value = [0; 32];
    for i in (0..len / element).filter(|&i| chosen(i)) {
        let linear = memory.linear(cpu, segment(insn, cpu), at(i), element as u32, false)?;
        memory.read_bytes(cpu, linear, &mut value[i * element..(i + 1) * element])?;
    }
    set_vector(&mut cpu.xsave, number(0)?, &value);
    Ok(())
}

/// Data and index size in bytes.
fn gather_sizes(code: Code) -> Option<(usize, usize)> {
    use Mnemonic::*;
    Some(match code.mnemonic() {
        Vpgatherdd | Vgatherdps => (4, 4),
        Vpgatherdq | Vgatherdpd => (8, 4),
        Vpgatherqd | Vgatherqps => (4, 8),
        Vpgatherqq | Vgatherqpd => (8, 8),
        _ => return None,
    })
}

fn gather(insn: &Instruction, cpu: &mut CpuState, memory: &mut dyn GuestMemory) -> Result<(), Fault> {
    let (data, index) = gather_sizes(insn.code()).ok_or(Fault::UD)?;
    let register = |register| vector_number(register).ok_or(Fault::UD);
    let (target, mask, indices) =
        (register(insn.op0_register())?, register(insn.op2_register())?, register(insn.memory_index())?);
    if target == mask || target == indices || mask == indices {
        return Err(Fault::UD);
    }
    // Elements: as many as the wider of data and index fill the instruction's vector length.
    let long = insn.op0_register().is_ymm() || insn.memory_index().is_ymm();
    let count = (if long { 32 } else { 16 }) / data.max(index);
    let base = match insn.memory_base() {
        Register::None => 0,
        base => cpu.gpr[base.full_register().number()],
    };
    let narrow = match insn.memory_base() {
        Register::None => insn.memory_displ_size() != 8,
        base => base.is_gpr32(),
    };
    let index_values = vector(&cpu.xsave, indices);
    let mut value = vector(&cpu.xsave, target);
    let mut left = vector(&cpu.xsave, mask);
    let mut outcome = Ok(());
    for i in 0..count {
        let bytes = i * data..(i + 1) * data;
        if left[bytes.end - 1] & 0x80 != 0 {
            let at = &index_values[i * index..(i + 1) * index];
            let at = if index == 4 {
                i64::from(i32::from_le_bytes([at[0], at[1], at[2], at[3]]))
            } else {
                i64::from_le_bytes([at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]])
            };
            let mut offset = base
                .wrapping_add((at as u64).wrapping_mul(u64::from(insn.memory_index_scale())))
                .wrapping_add(insn.memory_displacement64());
            if narrow {
                offset &= 0xffff_ffff;
            }
            outcome = memory
                .linear(cpu, segment(insn, cpu), offset, data as u32, false)
                .and_then(|linear| memory.read_bytes(cpu, linear, &mut value[bytes.clone()]));
            if outcome.is_err() {
                break;
            }
        }
        left[bytes].fill(0);
    }
    if outcome.is_ok() {
        value[count * data..].fill(0);
        left = [0; 32];
    }
    set_vector(&mut cpu.xsave, target, &value);
    set_vector(&mut cpu.xsave, mask, &left);
    outcome
}
