//! Moves, extensions, exchanges and the stack.

use cpum::CpuState;
use cpum::state::{gpr, seg};

use super::flow::condition;
use crate::Fault;
use crate::core::Core;

use crate::op::{Op, ea, linear, load, load_rm, reg, set_reg, store, store_rm};
use crate::tlb::Cell;

pub(crate) fn mov_rr<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<T>(cpu, op.b);
    set_reg(cpu, op.a, v);
    Ok(())
}

pub(crate) fn mov_ri<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    set_reg(cpu, op.a, T::from_u64(op.imm));
    Ok(())
}

pub(crate) fn mov_rm<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load::<T>(core, cpu, op)?;
    set_reg(cpu, op.a, v);
    Ok(())
}

pub(crate) fn mov_mr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<T>(cpu, op.b);
    store(core, cpu, op, v)
}

pub(crate) fn mov_mi<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    store(core, cpu, op, T::from_u64(op.imm))
}

/// MOVZX from `S` to the register of `T`.
pub(crate) fn movzx_r<S: Cell, T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<S>(cpu, op.b);
    set_reg(cpu, op.a, T::from_u64(v.to_u64()));
    Ok(())
}

pub(crate) fn movzx_m<S: Cell, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load::<S>(core, cpu, op)?;
    set_reg(cpu, op.a, T::from_u64(v.to_u64()));
    Ok(())
}

pub(crate) fn movsx_r<S: Cell, T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<S>(cpu, op.b);
    set_reg(cpu, op.a, T::from_u64(v.sext()));
    Ok(())
}

pub(crate) fn movsx_m<S: Cell, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load::<S>(core, cpu, op)?;
    set_reg(cpu, op.a, T::from_u64(v.sext()));
    Ok(())
}

pub(crate) fn lea<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = ea(cpu, op);
    set_reg(cpu, op.a, T::from_u64(at));
    Ok(())
}

pub(crate) fn nop(_core: &mut Core, _cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    Ok(())
}

pub(crate) fn xchg_rr<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (a, b) = (reg::<T>(cpu, op.a), reg::<T>(cpu, op.b));
    set_reg(cpu, op.a, b);
    set_reg(cpu, op.b, a);
    Ok(())
}

/// XCHG with memory is always locked.
pub(crate) fn xchg_mr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    let v = reg::<T>(cpu, op.b);
    let old = core.atomic(cpu, at, |_| v)?;
    set_reg(cpu, op.b, old);
    Ok(())
}

pub(crate) fn bswap<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<T>(cpu, op.a).to_u64().swap_bytes() >> (64 - T::BITS);
    // With a 16-bit operand the result is undefined; processors give zero.
    set_reg(cpu, op.a, T::from_u64(if T::BYTES == 2 { 0 } else { v }));
    Ok(())
}

pub(crate) fn movbe_load<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load::<T>(core, cpu, op)?.to_u64().swap_bytes() >> (64 - T::BITS);
    set_reg(cpu, op.a, T::from_u64(v));
    Ok(())
}

pub(crate) fn movbe_store<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<T>(cpu, op.b).to_u64().swap_bytes() >> (64 - T::BITS);
    store(core, cpu, op, T::from_u64(v))
}

/// CBW, CWDE, CDQE: `T` is the result.
pub(crate) fn sign_extend_a<T: Cell>(_core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let half = 64 - T::BITS / 2;
    let v = (cpu.gpr[gpr::RAX] << half) as i64 >> half;
    set_reg(cpu, 0, T::from_u64(v as u64));
    Ok(())
}

/// CWD, CDQ, CQO: `T` is the half.
pub(crate) fn sign_extend_d<T: Cell>(_core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let v = (reg::<T>(cpu, 0).sext() as i64 >> 63) as u64;
    set_reg(cpu, 2, T::from_u64(v));
    Ok(())
}

pub(crate) fn cmov_r<const CC: u8, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let v = reg::<T>(cpu, if condition::<CC>(core, cpu) { op.b } else { op.a });
    set_reg(cpu, op.a, v);
    Ok(())
}

pub(crate) fn cmov_m<const CC: u8, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let loaded = load::<T>(core, cpu, op)?;
    let v = if condition::<CC>(core, cpu) { loaded } else { reg::<T>(cpu, op.a) };
    set_reg(cpu, op.a, v);
    Ok(())
}

pub(crate) fn setcc<const CC: u8>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = u8::from(condition::<CC>(core, cpu));
    store_rm(core, cpu, op, op.a, v)
}

pub(crate) fn xlat(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let mask = crate::ops::string::address_mask(op);
    let offset = cpu.gpr[gpr::RBX].wrapping_add(cpu.gpr[gpr::RAX] & 0xff) & mask;
    let at = crate::op::linear_of(cpu, op, offset, 1, false)?;
    let v = core.read::<u8>(cpu, at)?;
    set_reg(cpu, 0, v);
    Ok(())
}

// ---- stack ----

/// The mask of the stack pointer's used bits outside 64-bit code.
#[inline(always)]
pub(crate) fn stack_mask(cpu: &CpuState) -> u64 {
    if cpu.seg[seg::SS].attr.big() { 0xffff_ffff } else { 0xffff }
}

/// A stack in motion: pushes and pops become visible in RSP by [`Stack::commit`].
#[derive(Clone, Copy)]
pub(crate) struct Stack {
    pub(crate) sp: u64,
    mask: u64,
    long: bool,
}

impl Stack {
    #[inline(always)]
    pub(crate) fn of(cpu: &CpuState, long: bool) -> Self {
        let mask = if long { u64::MAX } else { stack_mask(cpu) };
        Self { sp: cpu.gpr[gpr::RSP] & mask, mask, long }
    }

    #[inline(always)]
    fn linear(self, cpu: &CpuState, size: u64, write: bool) -> Result<u64, Fault> {
        if self.long { Ok(self.sp) } else { Core::legacy_linear(cpu, seg::SS, self.sp, size, write) }
    }

    #[inline(always)]
    pub(crate) fn push<T: Cell>(&mut self, core: &mut Core, cpu: &CpuState, value: T) -> Result<(), Fault> {
        self.sp = self.sp.wrapping_sub(T::BYTES as u64) & self.mask;
        let at = self.linear(cpu, T::BYTES as u64, true)?;
        core.write(cpu, at, value)
    }

    #[inline(always)]
    pub(crate) fn pop<T: Cell>(&mut self, core: &mut Core, cpu: &CpuState) -> Result<T, Fault> {
        let at = self.linear(cpu, T::BYTES as u64, false)?;
        let v = core.read(cpu, at)?;
        self.sp = self.sp.wrapping_add(T::BYTES as u64) & self.mask;
        Ok(v)
    }

    /// Pushes with an operand size given in bytes.
    pub(crate) fn push_sized(
        &mut self,
        core: &mut Core,
        cpu: &CpuState,
        size: u8,
        value: u64,
    ) -> Result<(), Fault> {
        match size {
            2 => self.push(core, cpu, value as u16),
            4 => self.push(core, cpu, value as u32),
            _ => self.push(core, cpu, value),
        }
    }

    pub(crate) fn pop_sized(&mut self, core: &mut Core, cpu: &CpuState, size: u8) -> Result<u64, Fault> {
        Ok(match size {
            2 => self.pop::<u16>(core, cpu)?.into(),
            4 => self.pop::<u32>(core, cpu)?.into(),
            _ => self.pop::<u64>(core, cpu)?,
        })
    }

    pub(crate) fn skip(&mut self, bytes: u64) {
        self.sp = self.sp.wrapping_add(bytes) & self.mask;
    }

    #[inline(always)]
    pub(crate) fn commit(self, cpu: &mut CpuState) {
        cpu.gpr[gpr::RSP] = cpu.gpr[gpr::RSP] & !self.mask | self.sp;
    }
}

#[inline(always)]
pub(crate) fn push<T: Cell>(core: &mut Core, cpu: &mut CpuState, long: bool, value: T) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu, long);
    stack.push(core, cpu, value)?;
    stack.commit(cpu);
    Ok(())
}

#[inline(always)]
pub(crate) fn pop<T: Cell>(core: &mut Core, cpu: &mut CpuState, long: bool) -> Result<T, Fault> {
    let mut stack = Stack::of(cpu, long);
    let v = stack.pop(core, cpu)?;
    stack.commit(cpu);
    Ok(v)
}

pub(crate) fn push_r<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<T>(cpu, op.a);
    push(core, cpu, op.long(), v)
}

pub(crate) fn push_i<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    push(core, cpu, op.long(), T::from_u64(op.imm))
}

pub(crate) fn push_m<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load::<T>(core, cpu, op)?;
    push(core, cpu, op.long(), v)
}

pub(crate) fn push_seg<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let selector = cpu.seg[usize::from(op.a) % 6].selector;
    if T::BYTES == 4 {
        // Only the low word is written, the slot is a doubleword.
        let mut stack = Stack::of(cpu, false);
        stack.sp = stack.sp.wrapping_sub(4) & stack_mask(cpu);
        let at = stack.linear(cpu, 2, true)?;
        core.write(cpu, at, selector)?;
        stack.commit(cpu);
        return Ok(());
    }
    push(core, cpu, op.long(), T::from_u64(selector.into()))
}

pub(crate) fn pop_r<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = pop::<T>(core, cpu, op.long())?;
    set_reg(cpu, op.a, v);
    Ok(())
}

/// POP to memory: the address is computed with the stack pointer after the pop.
pub(crate) fn pop_m<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let before = cpu.gpr[gpr::RSP];
    let v = pop::<T>(core, cpu, op.long())?;
    let result = store(core, cpu, op, v);
    if result.is_err() {
        cpu.gpr[gpr::RSP] = before;
    }
    result
}

pub(crate) fn pusha<T: Cell>(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu, false);
    // The lowest slot is probed first, so that a fault leaves nothing half done.
    let mut probe = stack;
    probe.skip((T::BYTES as u64 * 8).wrapping_neg());
    let at = probe.linear(cpu, T::BYTES as u64, true)?;
    crate::GuestMemory::probe_write(core, cpu, at, T::BYTES as u32)?;
    for r in 0..8 {
        stack.push(core, cpu, reg::<T>(cpu, r))?;
    }
    stack.commit(cpu);
    Ok(())
}

pub(crate) fn popa<T: Cell>(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu, false);
    let mut values = [T::from_u64(0); 8];
    for r in (0..8).rev() {
        values[r] = stack.pop(core, cpu)?;
    }
    for (r, v) in values.into_iter().enumerate() {
        if r != gpr::RSP {
            set_reg(cpu, r as u8, v);
        }
    }
    stack.commit(cpu);
    Ok(())
}

/// ENTER: `imm` is the frame size, `scale` the nesting level.
pub(crate) fn enter<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (size, level) = (op.imm, op.scale & 31);
    let mut stack = Stack::of(cpu, op.long());
    let mask = stack.mask;
    stack.push(core, cpu, reg::<T>(cpu, gpr::RBP as u8))?;
    let frame = stack.sp;
    if level > 0 {
        let mut outer = cpu.gpr[gpr::RBP] & mask;
        for _ in 1..level {
            outer = outer.wrapping_sub(T::BYTES as u64) & mask;
            let link = Stack { sp: outer, ..stack }.pop::<T>(core, cpu)?;
            stack.push(core, cpu, link)?;
        }
        stack.push(core, cpu, T::from_u64(frame))?;
    }
    stack.skip(size.wrapping_neg());
    // The new top must be writable, or the instruction faults.
    let at = stack.linear(cpu, T::BYTES as u64, true)?;
    crate::GuestMemory::probe_write(core, cpu, at, T::BYTES as u32)?;
    set_reg(cpu, gpr::RBP as u8, T::from_u64(frame));
    stack.commit(cpu);
    Ok(())
}

pub(crate) fn leave<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu, op.long());
    stack.sp = cpu.gpr[gpr::RBP] & stack.mask;
    let v = stack.pop::<T>(core, cpu)?;
    stack.commit(cpu);
    set_reg(cpu, gpr::RBP as u8, v);
    Ok(())
}

/// MOV register/memory, segment register: memory gets a word, a register the zero-extended selector.
pub(crate) fn mov_from_seg<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let selector = cpu.seg[usize::from(op.b) % 6].selector;
    if op.memory() {
        store(core, cpu, op, selector)
    } else {
        set_reg(cpu, op.a, T::from_u64(selector.into()));
        Ok(())
    }
}

pub(crate) fn bound<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = crate::op::linear_of(cpu, op, ea(cpu, op), 2 * T::BYTES as u64, false)?;
    let low = core.read::<T>(cpu, at)?.sext() as i64;
    let high = core.read::<T>(cpu, at.wrapping_add(T::BYTES as u64))?.sext() as i64;
    let index = reg::<T>(cpu, op.a).sext() as i64;
    if index < low || index > high { Err(Fault::BR) } else { Ok(()) }
}

/// ARPL.
pub(crate) fn arpl(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    use cpum::state::rflags::ZF;
    if !cpu.is_protected() {
        return Err(Fault::UD);
    }
    let rpl = reg::<u16>(cpu, op.b) & 3;
    let old = load_rm::<u16>(core, cpu, op, op.a)?;
    core.sync_flags(cpu);
    if old & 3 < rpl {
        store_rm(core, cpu, op, op.a, old & !3 | rpl)?;
        cpu.rflags |= ZF;
    } else {
        cpu.rflags &= !ZF;
    }
    Ok(())
}
