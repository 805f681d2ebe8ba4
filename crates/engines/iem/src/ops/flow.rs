//! Near jumps, calls and returns, and conditions.

use cpum::CpuState;
use cpum::state::{gpr, seg};

use super::data::{Stack, push};
use crate::Fault;
use crate::core::{Core, canonical};
use crate::op::{Op, load_rm, reg, set_reg, step_over};
use crate::tlb::Cell;

/// Whether the condition with encoding `CC` (the low four bits of the opcode) holds.
#[inline(always)]
pub(crate) fn condition<const CC: u8>(core: &Core, cpu: &CpuState) -> bool {
    let holds = match CC >> 1 {
        0 => core.of(cpu),
        1 => core.cf(cpu),
        2 => core.zf(cpu),
        3 => core.cf(cpu) | core.zf(cpu),
        4 => core.sf(cpu),
        5 => core.pf(cpu),
        6 => core.sf(cpu) != core.of(cpu),
        _ => core.zf(cpu) | (core.sf(cpu) != core.of(cpu)),
    };
    holds != (CC & 1 != 0)
}

/// Goes to `target`, cut to the operand size, if it is a valid instruction address.
#[inline(always)]
pub(crate) fn go(cpu: &mut CpuState, op: &Op, target: u64) -> Result<(), Fault> {
    if op.long() {
        if !canonical(target) {
            return Err(Fault::GP0);
        }
        cpu.rip = target;
    } else {
        let target = target & if op.size == 2 { 0xffff } else { 0xffff_ffff };
        if target > cpu.seg[seg::CS].limit.into() {
            return Err(Fault::GP0);
        }
        cpu.rip = target;
    }
    Ok(())
}

#[inline(always)]
fn relative(cpu: &CpuState, op: &Op) -> u64 {
    cpu.rip.wrapping_add(op.imm)
}

pub(crate) fn jmp(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let target = relative(cpu, op);
    go(cpu, op, target)
}

pub(crate) fn jcc<const CC: u8>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if condition::<CC>(core, cpu) {
        let target = relative(cpu, op);
        go(cpu, op, target)
    } else {
        step_over(cpu, op);
        Ok(())
    }
}

/// JCXZ, JECXZ, JRCXZ.
pub(crate) fn jcxz(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if cpu.gpr[gpr::RCX] & super::string::address_mask(op) == 0 {
        let target = relative(cpu, op);
        go(cpu, op, target)
    } else {
        step_over(cpu, op);
        Ok(())
    }
}

/// LOOP (0), LOOPE (1), LOOPNE (2).
pub(crate) fn loops<const HOW: u8>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let mask = super::string::address_mask(op);
    let count = (cpu.gpr[gpr::RCX] & mask).wrapping_sub(1) & mask;
    let more = count != 0
        && match HOW {
            0 => true,
            1 => core.zf(cpu),
            _ => !core.zf(cpu),
        };
    if more {
        let target = relative(cpu, op);
        go(cpu, op, target)?;
    } else {
        step_over(cpu, op);
    }
    super::string::set_masked(cpu, gpr::RCX, mask, count);
    Ok(())
}

pub(crate) fn jmp_rm<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let target = load_rm::<T>(core, cpu, op, op.a)?.to_u64();
    go(cpu, op, target)
}

#[inline(always)]
fn call<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, target: u64) -> Result<(), Fault> {
    let (rip, rsp) = (cpu.rip, cpu.gpr[gpr::RSP]);
    push(core, cpu, op.long(), T::from_u64(rip.wrapping_add(op.len.into())))?;
    let result = go(cpu, op, target);
    if result.is_err() {
        cpu.gpr[gpr::RSP] = rsp;
    }
    result
}

pub(crate) fn call_rel<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let target = relative(cpu, op);
    call::<T>(core, cpu, op, target)
}

pub(crate) fn call_rm<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let target = load_rm::<T>(core, cpu, op, op.a)?.to_u64();
    call::<T>(core, cpu, op, target)
}

/// RET, with the number of bytes to release in `imm`.
pub(crate) fn ret<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu, op.long());
    let target = stack.pop::<T>(core, cpu)?.to_u64();
    go(cpu, op, target)?;
    stack.skip(op.imm);
    stack.commit(cpu);
    Ok(())
}

/// SALC (undocumented): AL becomes all ones if CF is set.
pub(crate) fn salc(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let v = if core.cf(cpu) { 0xff } else { 0 };
    set_reg::<u8>(cpu, 0, v);
    Ok(())
}

/// LAHF.
pub(crate) fn lahf(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    core.sync_flags(cpu);
    let flags = cpu.rflags as u8 & 0xd5 | 2;
    set_reg::<u8>(cpu, 0x80, flags);
    Ok(())
}

/// SAHF.
pub(crate) fn sahf(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    core.sync_flags(cpu);
    let ah: u8 = reg(cpu, 0x80);
    cpu.rflags = cpu.rflags & !0xd5 | u64::from(ah & 0xd5);
    Ok(())
}

/// Sets (1), clears (0) or complements (2) the flag in `imm`.
pub(crate) fn change_flag<const HOW: u8>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    core.sync_flags(cpu);
    match HOW {
        0 => cpu.rflags &= !op.imm,
        1 => cpu.rflags |= op.imm,
        _ => cpu.rflags ^= op.imm,
    }
    Ok(())
}
