//! String instructions. Repeated forms work on pieces of pages and are interruptible between pieces: RIP stays and the registers
//! tell how far they came.

use cpum::CpuState;
use cpum::state::{gpr, rflags, seg};

use crate::Fault;
use crate::core::Core;
use crate::flags::{self, Int};
use crate::op::{LONG, Op, REP, REPNE, linear_of, reg, set_reg, step_over};
use crate::paging::Kind;
use crate::tlb::Cell;
use crate::unit::is_amd;

/// Elements done one by one before interrupts are looked at.
const BURST: u64 = 1024;

/// The mask of an operation's addresses.
#[inline(always)]
pub(crate) fn address_mask(op: &Op) -> u64 {
    match op.address_size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Writes a register at address size: 16 bits keep the rest, 32 bits clear the upper half.
#[inline(always)]
pub(crate) fn set_masked(cpu: &mut CpuState, r: usize, mask: u64, value: u64) {
    cpu.gpr[r] = if mask == 0xffff { cpu.gpr[r] & !0xffff | value & 0xffff } else { value & mask };
}

#[inline(always)]
fn step<T: Int>(cpu: &CpuState) -> u64 {
    if cpu.rflags & rflags::DF != 0 { (T::BYTES as u64).wrapping_neg() } else { T::BYTES as u64 }
}

#[inline(always)]
fn source<T: Int>(cpu: &CpuState, op: &Op, count: u64) -> Result<u64, Fault> {
    linear_of(cpu, op, cpu.gpr[gpr::RSI] & address_mask(op), T::BYTES as u64 * count, false)
}

#[inline(always)]
fn destination<T: Int>(cpu: &CpuState, op: &Op, count: u64, write: bool) -> Result<u64, Fault> {
    destination_at(cpu, op, cpu.gpr[gpr::RDI] & address_mask(op), T::BYTES as u64 * count, write)
}

/// The destination is in ES always.
#[inline(always)]
fn destination_at(cpu: &CpuState, op: &Op, offset: u64, bytes: u64, write: bool) -> Result<u64, Fault> {
    if op.flags & LONG != 0 { Ok(offset) } else { Core::legacy_linear(cpu, seg::ES, offset, bytes, write) }
}

#[inline(always)]
fn advance(cpu: &mut CpuState, r: usize, mask: u64, by: u64) {
    let value = cpu.gpr[r].wrapping_add(by);
    set_masked(cpu, r, mask, value);
}

/// Runs a repeated instruction: `piece` does between one and the given number of elements and tells how many; false ends the
/// repetition. It must advance the index registers itself.
#[inline(always)]
fn repeat(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
    mut piece: impl FnMut(&mut Core, &mut CpuState, u64) -> Result<(u64, bool), Fault>,
) -> Result<(), Fault> {
    let mask = address_mask(op);
    let mut budget = if core.special { 1 } else { BURST };
    loop {
        let count = cpu.gpr[gpr::RCX] & mask;
        if count == 0 {
            step_over(cpu, op);
            return Ok(());
        }
        if budget == 0 {
            return Ok(());
        }
        let (done, more) = piece(core, cpu, if core.special { 1 } else { count })?;
        set_masked(cpu, gpr::RCX, mask, count - done);
        if !more || count == done {
            step_over(cpu, op);
            return Ok(());
        }
        budget -= 1;
        if done > 1 || core.stop {
            return Ok(());
        }
    }
}

/// Elements that fit before `offset` wraps at the address size, and before `linear` leaves its page.
#[inline(always)]
fn fit<T: Int>(op: &Op, offset: u64, linear: u64) -> u64 {
    let page = (0x1000 - (linear & 0xfff)) / T::BYTES as u64;
    if op.address_size == 8 {
        return page;
    }
    let mask = address_mask(op);
    page.min((mask - (offset & mask) + 1) / T::BYTES as u64)
}

/// The same downwards; none if the first element reaches into the next page.
#[inline(always)]
fn fit_down<T: Int>(op: &Op, offset: u64, linear: u64) -> u64 {
    let (size, at) = (T::BYTES as u64, linear & 0xfff);
    if at + size > 0x1000 { 0 } else { (at / size).min((offset & address_mask(op)) / size) + 1 }
}

fn movs_one<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let from = source::<T>(cpu, op, 1)?;
    let to = destination::<T>(cpu, op, 1, true)?;
    let v = core.read::<T>(cpu, from)?;
    core.write(cpu, to, v)?;
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RSI, mask, by);
    advance(cpu, gpr::RDI, mask, by);
    Ok(())
}

pub(crate) fn movs<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    movs_one::<T>(core, cpu, op)
}

pub(crate) fn rep_movs<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    repeat(core, cpu, op, |core, cpu, count| {
        if let Some(n) = movs_piece::<T>(core, cpu, op, count)? {
            return Ok((n, true));
        }
        movs_one::<T>(core, cpu, op)?;
        Ok((1, true))
    })
}

fn movs_piece<T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
    count: u64,
) -> Result<Option<u64>, Fault> {
    if count < 4 {
        return Ok(None);
    }
    let down = cpu.rflags & rflags::DF != 0;
    let from = source::<T>(cpu, op, 1)?;
    let to = destination::<T>(cpu, op, 1, true)?;
    let fit = if down { fit_down::<T> } else { fit::<T> };
    let n = count.min(fit(op, cpu.gpr[gpr::RSI], from)).min(fit(op, cpu.gpr[gpr::RDI], to));
    if n < 4 {
        return Ok(None);
    }
    if down {
        return movs_down::<T>(core, cpu, op, from, to, n);
    }
    if source::<T>(cpu, op, n).is_err() || destination::<T>(cpu, op, n, true).is_err() {
        return Ok(None);
    }
    let Some((src, src_at)) = core.page_piece(cpu, from, Kind::Read)? else { return Ok(None) };
    let Some((dst, dst_at)) = core.page_piece(cpu, to, Kind::Write)? else { return Ok(None) };
    let bytes = n * T::BYTES as u64;
    core.frames.copy(dst, dst_at, src, src_at, bytes, T::BYTES as u64);
    core.note_write(dst, dst_at, bytes);
    let mask = address_mask(op);
    advance(cpu, gpr::RSI, mask, bytes);
    advance(cpu, gpr::RDI, mask, bytes);
    Ok(Some(n))
}

/// A piece with the direction flag set: `n` elements, the highest ones at `from` and `to`.
fn movs_down<T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
    from: u64,
    to: u64,
    n: u64,
) -> Result<Option<u64>, Fault> {
    let bytes = n * T::BYTES as u64;
    let back = bytes - T::BYTES as u64;
    let mask = address_mask(op);
    let lowest = |r: usize| (cpu.gpr[r] & mask).wrapping_sub(back);
    if linear_of(cpu, op, lowest(gpr::RSI), bytes, false).is_err()
        || destination_at(cpu, op, lowest(gpr::RDI), bytes, true).is_err()
    {
        return Ok(None);
    }
    let Some((src, src_at)) = core.page_piece(cpu, from, Kind::Read)? else { return Ok(None) };
    let Some((dst, dst_at)) = core.page_piece(cpu, to, Kind::Write)? else { return Ok(None) };
    core.frames.copy_down(dst, dst_at - back, src, src_at - back, bytes, T::BYTES as u64);
    core.note_write(dst, dst_at - back, bytes);
    advance(cpu, gpr::RSI, mask, bytes.wrapping_neg());
    advance(cpu, gpr::RDI, mask, bytes.wrapping_neg());
    Ok(Some(n))
}

fn stos_one<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let to = destination::<T>(cpu, op, 1, true)?;
    let v = reg::<T>(cpu, 0);
    core.write(cpu, to, v)?;
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RDI, mask, by);
    Ok(())
}

pub(crate) fn stos<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    stos_one::<T>(core, cpu, op)
}

pub(crate) fn rep_stos<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    repeat(core, cpu, op, |core, cpu, count| {
        if count >= 4 && cpu.rflags & rflags::DF == 0 {
            let to = destination::<T>(cpu, op, 1, true)?;
            let n = count.min(fit::<T>(op, cpu.gpr[gpr::RDI], to));
            if n >= 4
                && destination::<T>(cpu, op, n, true).is_ok()
                && let Some((frame, at)) = core.page_piece(cpu, to, Kind::Write)?
            {
                core.frames.fill(frame, at, reg::<T>(cpu, 0), n);
                core.note_write(frame, at, n * T::BYTES as u64);
                advance(cpu, gpr::RDI, address_mask(op), n * T::BYTES as u64);
                return Ok((n, true));
            }
        }
        stos_one::<T>(core, cpu, op)?;
        Ok((1, true))
    })
}

pub(crate) fn lods<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let from = source::<T>(cpu, op, 1)?;
    let v = core.read::<T>(cpu, from)?;
    set_reg(cpu, 0, v);
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RSI, mask, by);
    Ok(())
}

pub(crate) fn rep_lods<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    repeat(core, cpu, op, |core, cpu, _| lods::<T>(core, cpu, op).map(|()| (1, true)))
}

pub(crate) fn scas<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let to = destination::<T>(cpu, op, 1, false)?;
    let v = core.read::<T>(cpu, to)?;
    core.set_flags(flags::sub(reg::<T>(cpu, 0), v, false).1);
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RDI, mask, by);
    Ok(())
}

pub(crate) fn cmps<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let from = source::<T>(cpu, op, 1)?;
    let to = destination::<T>(cpu, op, 1, false)?;
    // Where both fault, Intel's CPUs tell of the destination.
    let (a, b) = if is_amd() {
        (core.read::<T>(cpu, from)?, core.read::<T>(cpu, to)?)
    } else {
        let b = core.read::<T>(cpu, to)?;
        (core.read::<T>(cpu, from)?, b)
    };
    core.set_flags(flags::sub(a, b, false).1);
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RSI, mask, by);
    advance(cpu, gpr::RDI, mask, by);
    Ok(())
}

/// Whether REPE or REPNE goes on after a comparison.
#[inline(always)]
fn goes_on(core: &Core, cpu: &CpuState, op: &Op) -> bool {
    core.zf(cpu) == (op.flags & REPNE == 0)
}

/// Runs a repeated comparison. If it faults, Intel's CPUs leave the flags as they were when it began (SDM volume 2, "CMPS" and
/// "SCAS" under "REP"); AMD's have those of the last comparison.
#[inline(always)]
fn repeat_comparison(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
    compare: impl Fn(&mut Core, &mut CpuState, &Op) -> Result<(), Fault>,
) -> Result<(), Fault> {
    core.sync_flags(cpu);
    let before = cpu.rflags;
    let result = repeat(core, cpu, op, |core, cpu, _| {
        compare(core, cpu, op)?;
        Ok((1, goes_on(core, cpu, op)))
    });
    if result.is_err() && !is_amd() {
        core.sync_flags(cpu);
        cpu.rflags = before;
    }
    result
}

pub(crate) fn rep_scas<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    repeat_comparison(core, cpu, op, scas::<T>)
}

pub(crate) fn rep_cmps<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    repeat_comparison(core, cpu, op, cmps::<T>)
}

fn ins_one<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, port: u16) -> Result<(), Fault> {
    let to = destination::<T>(cpu, op, 1, true)?;
    // The device must not be read if the destination faults.
    crate::GuestMemory::probe_write(core, cpu, to, T::BYTES as u32)?;
    let v = super::io::port_read(core, port, T::BYTES);
    core.write(cpu, to, T::from_u64(v.into()))?;
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RDI, mask, by);
    Ok(())
}

pub(crate) fn ins<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let port = cpu.gpr[gpr::RDX] as u16;
    super::io::check(core, cpu, port, T::BYTES)?;
    if op.flags & (REP | REPNE) == 0 {
        ins_one::<T>(core, cpu, op, port)?;
        step_over(cpu, op);
        return Ok(());
    }
    repeat(core, cpu, op, |core, cpu, count| {
        if count > 1 && cpu.rflags & rflags::DF == 0 {
            let to = destination::<T>(cpu, op, 1, true)?;
            let n = count.min(fit::<T>(op, cpu.gpr[gpr::RDI], to));
            if n > 1
                && destination::<T>(cpu, op, n, true).is_ok()
                && let Some((frame, at)) = core.page_piece(cpu, to, Kind::Write)?
            {
                let mut buffer = [0; 4096];
                let bytes = (n * T::BYTES as u64) as usize;
                super::io::port_read_string(core, port, T::BYTES, &mut buffer[..bytes]);
                core.frames.write_bytes(frame, at, &buffer[..bytes]);
                core.note_write(frame, at, bytes as u64);
                advance(cpu, gpr::RDI, address_mask(op), bytes as u64);
                return Ok((n, true));
            }
        }
        ins_one::<T>(core, cpu, op, port)?;
        Ok((1, true))
    })
}

fn outs_one<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, port: u16) -> Result<(), Fault> {
    let from = source::<T>(cpu, op, 1)?;
    let v = core.read::<T>(cpu, from)?;
    super::io::port_write(core, port, T::BYTES, v.to_u64() as u32);
    let (mask, by) = (address_mask(op), step::<T>(cpu));
    advance(cpu, gpr::RSI, mask, by);
    Ok(())
}

pub(crate) fn outs<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let port = cpu.gpr[gpr::RDX] as u16;
    super::io::check(core, cpu, port, T::BYTES)?;
    if op.flags & (REP | REPNE) == 0 {
        outs_one::<T>(core, cpu, op, port)?;
        step_over(cpu, op);
        return Ok(());
    }
    repeat(core, cpu, op, |core, cpu, count| {
        if count > 1 && cpu.rflags & rflags::DF == 0 {
            let from = source::<T>(cpu, op, 1)?;
            let n = count.min(fit::<T>(op, cpu.gpr[gpr::RSI], from));
            if n > 1
                && source::<T>(cpu, op, n).is_ok()
                && let Some((frame, at)) = core.page_piece(cpu, from, Kind::Read)?
            {
                let mut buffer = [0; 4096];
                let bytes = (n * T::BYTES as u64) as usize;
                core.frames.read_bytes(frame, at, &mut buffer[..bytes]);
                super::io::port_write_string(core, port, T::BYTES, &buffer[..bytes]);
                advance(cpu, gpr::RSI, address_mask(op), bytes as u64);
                return Ok((n, true));
            }
        }
        outs_one::<T>(core, cpu, op, port)?;
        Ok((1, true))
    })
}
