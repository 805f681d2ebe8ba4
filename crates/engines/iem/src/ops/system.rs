//! Instructions of the system: control, debug and descriptor-table registers, flags, far transfers, interrupts, halts.

use cpum::state::{cr0, cr4, efer, gpr, rflags, seg};
use cpum::{Activity, CpuState, Segment};
use em::Exit;
use std::sync::atomic::{Ordering, fence};

use super::data::{pop, push};
use crate::core::{Core, canonical};
use crate::event::{self, Source};
use crate::op::{Op, ea, linear_of, load, load_rm, reg, set_reg, step_over, store_rm};
use crate::segment::{self, is_null, system};
use crate::tlb::Cell;
use crate::{Fault, Vector, debug, msr, transfer};

/// #GP(0) above privilege level 0.
fn privileged(cpu: &CpuState) -> Result<(), Fault> {
    if cpu.cpl() == 0 { Ok(()) } else { Err(Fault::GP0) }
}

fn has(core: &Core, feature: cpum::cpuid::FeatureBit) -> bool {
    core.ctx.cpuid.has(feature)
}

use cpum::cpuid::bit;

pub(crate) fn undefined(_core: &mut Core, _cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    Err(Fault::UD)
}

/// VEX-encoded instructions do not exist in real and virtual-8086 mode.
pub(crate) fn protected_only(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let inner = op.full.as_ref().and_then(|f| f.inner).filter(|_| cpu.is_protected()).ok_or(Fault::UD)?;
    inner(core, cpu, op)
}

// ---- segment registers ----

/// Loads segment register `op.a` and, for SS, holds off interrupts for one instruction.
fn load_segment(core: &mut Core, cpu: &mut CpuState, op: &Op, s: usize, selector: u16) -> Result<(), Fault> {
    segment::load(core, cpu, s, selector)?;
    if s == seg::SS {
        shadow(core, cpu, op);
        core.no_trap = true;
    }
    Ok(())
}

fn shadow(core: &mut Core, cpu: &mut CpuState, op: &Op) {
    cpu.inhibit_rip = Some(cpu.rip.wrapping_add(op.len.into()));
    core.resync = true;
}

pub(crate) fn mov_to_seg(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let selector = load_rm::<u16>(core, cpu, op, op.b)?;
    load_segment(core, cpu, op, usize::from(op.a) % 6, selector)
}

pub(crate) fn pop_seg<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let before = cpu.gpr[gpr::RSP];
    let selector = pop::<T>(core, cpu, op.long())?.to_u64() as u16;
    let after = cpu.gpr[gpr::RSP];
    cpu.gpr[gpr::RSP] = before;
    load_segment(core, cpu, op, usize::from(op.a) % 6, selector)?;
    cpu.gpr[gpr::RSP] = after;
    Ok(())
}

/// LDS and relatives: `b` is the segment register.
pub(crate) fn load_pointer<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear_of(cpu, op, ea(cpu, op), T::BYTES as u64 + 2, false)?;
    let offset = core.read::<T>(cpu, at)?;
    let selector = core.read::<u16>(cpu, at.wrapping_add(T::BYTES as u64))?;
    segment::load(core, cpu, usize::from(op.b) % 6, selector)?;
    set_reg(cpu, op.a, offset);
    Ok(())
}

// ---- far transfers ----

/// JMP far, immediate pointer: selector in `disp`, offset in `imm`.
pub(crate) fn jmp_far(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    transfer::jump(core, cpu, op.disp as u16, op.imm, op.len)
}

pub(crate) fn call_far(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    transfer::call(core, cpu, op.disp as u16, op.imm, op.size, op.len)
}

fn far_pointer<T: Cell>(core: &mut Core, cpu: &CpuState, op: &Op) -> Result<(u16, u64), Fault> {
    let at = linear_of(cpu, op, ea(cpu, op), T::BYTES as u64 + 2, false)?;
    let offset = core.read::<T>(cpu, at)?.to_u64();
    Ok((core.read(cpu, at.wrapping_add(T::BYTES as u64))?, offset))
}

pub(crate) fn jmp_far_m<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (selector, offset) = far_pointer::<T>(core, cpu, op)?;
    transfer::jump(core, cpu, selector, offset, op.len)
}

pub(crate) fn call_far_m<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (selector, offset) = far_pointer::<T>(core, cpu, op)?;
    transfer::call(core, cpu, selector, offset, T::BYTES as u8, op.len)
}

pub(crate) fn ret_far(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    transfer::ret(core, cpu, op.size, op.imm)
}

pub(crate) fn iret(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    transfer::iret(core, cpu, op.size)
}

// ---- interrupts ----

fn next(cpu: &CpuState, op: &Op) -> u64 {
    let next = cpu.rip.wrapping_add(op.len.into());
    if op.long() { next } else { next & 0xffff_ffff }
}

/// INT n with the vector in `imm`.
pub(crate) fn int(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let next = next(cpu, op);
    event::software(core, cpu, op.imm as u8, Source::Software, next)
}

pub(crate) fn int3(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let next = next(cpu, op);
    event::software(core, cpu, Vector::Bp as u8, Source::Trap, next)
}

pub(crate) fn int1(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let next = next(cpu, op);
    event::software(core, cpu, Vector::Db as u8, Source::External, next)
}

pub(crate) fn into(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let next = next(cpu, op);
    if core.of(cpu) {
        event::software(core, cpu, Vector::Of as u8, Source::Trap, next)
    } else {
        step_over(cpu, op);
        Ok(())
    }
}

pub(crate) fn hlt(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    cpu.activity = Activity::Halted;
    core.exit = Some(Exit::Halt);
    core.stop = true;
    Ok(())
}

// ---- flags ----

/// #GP(0) in virtual-8086 mode below IOPL 3, for PUSHF and POPF.
fn check_v86(cpu: &CpuState) -> Result<(), Fault> {
    if cpu.rflags & rflags::VM != 0 && cpu.rflags & rflags::IOPL != rflags::IOPL {
        return Err(Fault::GP0);
    }
    Ok(())
}

pub(crate) fn pushf<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    check_v86(cpu)?;
    core.sync_flags(cpu);
    let v = cpu.rflags & !(rflags::VM | rflags::RF) | rflags::FIXED;
    push(core, cpu, op.long(), T::from_u64(v))
}

pub(crate) fn popf<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    use rflags::*;
    check_v86(cpu)?;
    core.sync_flags(cpu);
    let v = pop::<T>(core, cpu, op.long())?.to_u64();
    let mut mask = ARITH | TF | DF | NT;
    if T::BYTES > 2 {
        mask |= AC | ID;
    }
    let cpl = u64::from(cpu.cpl());
    if cpu.cr0 & cr0::PE == 0 || cpl == 0 {
        mask |= IOPL | IF;
    } else if cpl <= (cpu.rflags & IOPL) >> 12 {
        mask |= IF;
    }
    cpu.rflags = cpu.rflags & !(mask | RF) | v & mask | FIXED;
    Ok(())
}

fn check_interrupt_flag(cpu: &CpuState) -> Result<(), Fault> {
    let iopl = (cpu.rflags & rflags::IOPL) >> 12;
    if cpu.cr0 & cr0::PE != 0 && u64::from(cpu.cpl()) > iopl { Err(Fault::GP0) } else { Ok(()) }
}

pub(crate) fn cli(_core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    check_interrupt_flag(cpu)?;
    cpu.rflags &= !rflags::IF;
    Ok(())
}

pub(crate) fn sti(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    check_interrupt_flag(cpu)?;
    if cpu.rflags & rflags::IF == 0 {
        cpu.rflags |= rflags::IF;
        shadow(core, cpu, op);
    }
    Ok(())
}

/// STAC if `SET`, else CLAC.
pub(crate) fn access_flag<const SET: bool>(
    core: &mut Core,
    cpu: &mut CpuState,
    _op: &Op,
) -> Result<(), Fault> {
    if cpu.cpl() != 0 || !has(core, bit::SMAP) {
        return Err(Fault::UD);
    }
    if SET {
        cpu.rflags |= rflags::AC;
    } else {
        cpu.rflags &= !rflags::AC;
    }
    core.resync = true;
    Ok(())
}

// ---- control registers ----

pub(crate) fn mov_from_cr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let v = match op.b {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => core.ctx.irq.read_cr8(core.id),
        _ => return Err(Fault::UD),
    };
    set_reg(cpu, op.a, T::from_u64(v));
    Ok(())
}

pub(crate) fn mov_to_cr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let v = reg::<T>(cpu, op.b).to_u64();
    match op.a {
        0 => write_cr0(core, cpu, v)?,
        2 => cpu.cr2 = v,
        3 => write_cr3(core, cpu, v)?,
        4 => write_cr4(core, cpu, v)?,
        8 => {
            if v > 15 {
                return Err(Fault::GP0);
            }
            core.ctx.irq.write_cr8(core.id, v);
        }
        _ => return Err(Fault::UD),
    }
    core.resync = true;
    Ok(())
}

pub(crate) fn write_cr0(core: &mut Core, cpu: &mut CpuState, v: u64) -> Result<(), Fault> {
    use cr0::*;
    if v >> 32 != 0 || v & (PG | PE) == PG || v & (NW | CD) == NW {
        return Err(Fault::GP0);
    }
    let v = v & (PE | MP | EM | TS | NE | WP | AM | NW | CD | PG) | ET;
    let changed = v ^ cpu.cr0;
    let mut new_efer = cpu.msr.efer;
    if changed & PG != 0 {
        if v & PG != 0 {
            if cpu.msr.efer & efer::LME != 0 {
                if cpu.cr4 & cr4::PAE == 0 || cpu.seg[seg::CS].attr.long() {
                    return Err(Fault::GP0);
                }
                new_efer |= efer::LMA;
            }
        } else {
            if cpu.is_64bit() || cpu.cr4 & cr4::PCIDE != 0 {
                return Err(Fault::GP0);
            }
            new_efer &= !efer::LMA;
        }
    }
    if segment::uses_pdptes(v, cpu.cr4, new_efer) && changed & (PG | CD | NW) != 0 {
        segment::load_pdptes(core, cpu, cpu.cr3)?;
    }
    cpu.cr0 = v;
    cpu.msr.efer = new_efer;
    if changed & PE != 0 {
        mode_switched(cpu);
    }
    if changed & (PG | WP | PE) != 0 {
        core.flush_tlb(false);
    }
    Ok(())
}

/// Protected mode came or went: the stack segment's privilege is what CPL is read from, and real mode runs at 0.
fn mode_switched(cpu: &mut CpuState) {
    let attr = &mut cpu.seg[seg::SS].attr;
    *attr = attr.with_dpl(0);
}

/// CR3 bit 63: keep the translations of the new PCID.
const CR3_KEEP: u64 = 1 << 63;

fn write_cr3(core: &mut Core, cpu: &mut CpuState, v: u64) -> Result<(), Fault> {
    let spaces = cpu.cr4 & cr4::PCIDE != 0;
    let keep = v & CR3_KEEP != 0;
    let v = if spaces { v & !CR3_KEEP } else { v };
    if cpu.msr.efer & efer::LMA != 0 && v >> core.limits.phys_bits != 0 {
        return Err(Fault::GP0);
    }
    if segment::uses_pdptes(cpu.cr0, cpu.cr4, cpu.msr.efer) {
        segment::load_pdptes(core, cpu, v)?;
    }
    let old = std::mem::replace(&mut cpu.cr3, v);
    if spaces {
        core.change_space(old as u16 & 0xfff, v as u16 & 0xfff, keep);
    } else {
        core.flush_tlb(true);
    }
    Ok(())
}

/// The CR4 bits that the announced features allow.
fn cr4_allowed(core: &Core) -> u64 {
    let mut allowed = cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE;
    for (feature, mask) in [
        (bit::VME, cr4::VME | cr4::PVI),
        (bit::FXSR, cr4::OSFXSR),
        (bit::SSE, cr4::OSXMMEXCPT),
        (bit::UMIP, cr4::UMIP),
        (bit::FSGSBASE, cr4::FSGSBASE),
        (bit::PCID, cr4::PCIDE),
        (bit::XSAVE, cr4::OSXSAVE),
        (bit::SMEP, cr4::SMEP),
        (bit::SMAP, cr4::SMAP),
    ] {
        if has(core, feature) {
            allowed |= mask;
        }
    }
    allowed
}

fn write_cr4(core: &mut Core, cpu: &mut CpuState, v: u64) -> Result<(), Fault> {
    if v & !cr4_allowed(core) != 0 {
        return Err(Fault::GP0);
    }
    let changed = v ^ cpu.cr4;
    let long = cpu.msr.efer & efer::LMA != 0;
    if long && v & cr4::PAE == 0 {
        return Err(Fault::GP0);
    }
    if changed & v & cr4::PCIDE != 0 && (!long || cpu.cr3 & 0xfff != 0) {
        return Err(Fault::GP0);
    }
    let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
    if changed & paging != 0 {
        if segment::uses_pdptes(cpu.cr0, v, cpu.msr.efer) {
            segment::load_pdptes(core, cpu, cpu.cr3)?;
        }
        core.flush_tlb(false);
    }
    cpu.cr4 = v;
    core.resync = true;
    Ok(())
}

pub(crate) fn clts(_core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    cpu.cr0 &= !cr0::TS;
    Ok(())
}

pub(crate) fn lmsw(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let v = u64::from(load_rm::<u16>(core, cpu, op, op.a)?);
    // PE can be set but not cleared.
    let v = cpu.cr0 & !0xe | v & 0xf;
    write_cr0(core, cpu, v)
}

fn umip(cpu: &CpuState) -> Result<(), Fault> {
    if cpu.cr4 & cr4::UMIP != 0 && cpu.cpl() != 0 { Err(Fault::GP0) } else { Ok(()) }
}

pub(crate) fn smsw<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    umip(cpu)?;
    let v = cpu.cr0;
    if op.memory() {
        store_rm(core, cpu, op, op.a, v as u16)
    } else {
        store_rm(core, cpu, op, op.a, T::from_u64(v))
    }
}

pub(crate) fn invlpg(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let offset = ea(cpu, op);
    let base = if op.long() {
        if op.flags & crate::op::SEG_BASE != 0 { cpu.seg[usize::from(op.seg) % 6].base } else { 0 }
    } else {
        cpu.seg[usize::from(op.seg) % 6].base
    };
    let at = segment::wrap(cpu, base.wrapping_add(offset));
    core.flush_page(at);
    Ok(())
}

pub(crate) fn invpcid(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if !has(core, bit::INVPCID) {
        return Err(Fault::UD);
    }
    privileged(cpu)?;
    let kind = if op.long() { cpu.gpr[usize::from(op.a & 15)] } else { reg::<u32>(cpu, op.a).into() };
    let at = linear_of(cpu, op, ea(cpu, op), 16, false)?;
    let descriptor: u64 = core.read(cpu, at)?;
    let address: u64 = core.read(cpu, at.wrapping_add(8))?;
    let pcid = descriptor & 0xfff;
    if kind > 3 || descriptor >> 12 != 0 && kind < 2 {
        return Err(Fault::GP0);
    }
    if kind < 2 && cpu.cr4 & cr4::PCIDE == 0 && pcid != 0 || kind == 0 && !canonical(address) {
        return Err(Fault::GP0);
    }
    let current = cpu.cr4 & cr4::PCIDE == 0 || pcid == cpu.cr3 & 0xfff;
    match kind {
        0 if current => core.flush_page(address),
        1 if current => core.flush_tlb(true),
        0 | 1 => core.forget_spaces(Some(pcid as u16)),
        2 => core.flush_tlb(false),
        _ => {
            core.forget_spaces(None);
            core.flush_tlb(true);
        }
    }
    Ok(())
}

pub(crate) fn write_back(_core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    privileged(cpu)
}

/// CLFLUSH and relatives: a read as far as faults go.
pub(crate) fn cache_line(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    load::<u8>(core, cpu, op).map(|_| ())
}

pub(crate) fn full_fence(_core: &mut Core, _cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    fence(Ordering::SeqCst);
    Ok(())
}

/// PAUSE: whoever spins waits for another vCPU, which may be waiting for a host CPU itself.
pub(crate) fn pause(core: &mut Core, _cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    core.pauses = core.pauses.wrapping_add(1);
    if core.ctx.links.len() > 1 && core.pauses.is_multiple_of(PAUSES_PER_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
    Ok(())
}

/// Spins that give up the host CPU once.
const PAUSES_PER_YIELD: u32 = 256;

// ---- debug registers ----

fn debug_access(core: &mut Core, cpu: &mut CpuState, n: u8) -> Result<usize, Fault> {
    let n = match n {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(Fault::UD),
        4 | 5 => n + 2,
        0..=7 => n,
        _ => return Err(Fault::UD),
    };
    privileged(cpu)?;
    if cpu.dr7 & debug::GD != 0 {
        cpu.dr6 |= debug::BD;
        return Err(Fault::DB);
    }
    core.resync = true;
    Ok(n.into())
}

pub(crate) fn mov_from_dr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = match debug_access(core, cpu, op.b)? {
        6 => cpu.dr6,
        7 => cpu.dr7,
        n => cpu.dr[n & 3],
    };
    set_reg(cpu, op.a, T::from_u64(v));
    Ok(())
}

pub(crate) fn mov_to_dr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = reg::<T>(cpu, op.b).to_u64();
    let n = debug_access(core, cpu, op.a)?;
    match n {
        6 | 7 if v >> 32 != 0 => return Err(Fault::GP0),
        6 => cpu.dr6 = v & 0xe00f | debug::DR6_FIXED,
        7 => cpu.dr7 = v & 0xffff_2bff | debug::DR7_FIXED,
        n => cpu.dr[n & 3] = v,
    }
    Ok(())
}

// ---- descriptor tables ----

/// LGDT, or LIDT if `IDT`.
pub(crate) fn load_table<const IDT: bool>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let offset = ea(cpu, op);
    let size = if op.long() { 10 } else { 6 };
    let at = linear_of(cpu, op, offset, size, false)?;
    let limit: u16 = core.read(cpu, at)?;
    let base = if op.long() {
        core.read::<u64>(cpu, at.wrapping_add(2))?
    } else {
        let mask = if op.size == 2 { 0xff_ffff } else { 0xffff_ffff };
        u64::from(core.read::<u32>(cpu, at.wrapping_add(2))?) & mask
    };
    if op.long() && !canonical(base) {
        return Err(Fault::GP0);
    }
    let table = if IDT { &mut cpu.idtr } else { &mut cpu.gdtr };
    *table = cpum::state::TableRegister { base, limit };
    Ok(())
}

/// SGDT, or SIDT if `IDT`.
pub(crate) fn store_table<const IDT: bool>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    umip(cpu)?;
    let table = if IDT { cpu.idtr } else { cpu.gdtr };
    let size = if op.long() { 10 } else { 6 };
    let at = linear_of(cpu, op, ea(cpu, op), size, true)?;
    crate::GuestMemory::probe_write(core, cpu, at, size as u32)?;
    core.write(cpu, at, table.limit)?;
    if op.long() {
        core.write(cpu, at.wrapping_add(2), table.base)
    } else {
        core.write(cpu, at.wrapping_add(2), table.base as u32)
    }
}

/// SLDT, or STR if `TASK`.
pub(crate) fn store_selector<const TASK: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    if !cpu.is_protected() {
        return Err(Fault::UD);
    }
    umip(cpu)?;
    let v = if TASK { cpu.tr.selector } else { cpu.ldtr.selector };
    if op.memory() {
        store_rm(core, cpu, op, op.a, v)
    } else {
        set_reg(cpu, op.a, T::from_u64(v.into()));
        Ok(())
    }
}

/// LLDT, or LTR if `TASK`.
pub(crate) fn load_system<const TASK: bool>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    if !cpu.is_protected() {
        return Err(Fault::UD);
    }
    privileged(cpu)?;
    let selector = load_rm::<u16>(core, cpu, op, op.a)?;
    let code = segment::error_code(selector);
    if is_null(selector) {
        if TASK {
            return Err(Fault::GP0);
        }
        cpu.ldtr = Segment { selector, ..segment::null(selector) };
        return Ok(());
    }
    if selector & 4 != 0 {
        return Err(Fault::gp(code));
    }
    let entry = segment::read_entry(core, cpu, selector, Vector::Gp)?;
    let fits = if TASK {
        let long = cpu.msr.efer & efer::LMA != 0;
        entry.kind() == system::TSS || entry.kind() == system::TSS16 && !long
    } else {
        entry.kind() == system::LDT
    };
    if !entry.is_system() || !fits {
        return Err(Fault::gp(code));
    }
    if !entry.present() {
        return Err(Fault::np(code));
    }
    let mut loaded = entry.segment(selector);
    if cpu.msr.efer & efer::LMA != 0 {
        let upper = segment::read_upper(core, cpu, entry)?;
        loaded.base |= upper << 32;
        if upper >> 40 & 0x1f != 0 || !canonical(loaded.base) {
            return Err(Fault::gp(code));
        }
    }
    if TASK {
        let at = entry.at.wrapping_add(5);
        let byte: u8 = core.read_system(cpu, at)?;
        core.write_system(cpu, at, byte | 2)?;
        loaded.attr = loaded.attr.with_kind(loaded.attr.kind() | 2);
        cpu.tr = loaded;
    } else {
        cpu.ldtr = loaded;
    }
    Ok(())
}

/// The descriptor that LAR, LSL, VERR and VERW look at, if the selector can be used at this privilege.
fn visible(core: &mut Core, cpu: &CpuState, selector: u16) -> Result<Option<segment::Entry>, Fault> {
    if is_null(selector) {
        return Ok(None);
    }
    let entry = match segment::read_entry(core, cpu, selector, Vector::Gp) {
        Ok(entry) => entry,
        Err(f) if f.vector == Vector::Gp => return Ok(None),
        Err(f) => return Err(f),
    };
    let conforming = entry.is_code() && entry.is_conforming();
    let level = cpu.cpl().max((selector & 3) as u8);
    Ok((conforming || entry.dpl() >= level).then_some(entry))
}

fn set_zf(core: &mut Core, cpu: &mut CpuState, on: bool) {
    core.sync_flags(cpu);
    cpu.rflags = cpu.rflags & !rflags::ZF | if on { rflags::ZF } else { 0 };
}

/// LAR, or LSL if `LIMIT`.
pub(crate) fn look_up<const LIMIT: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    if !cpu.is_protected() {
        return Err(Fault::UD);
    }
    let selector = load_rm::<u16>(core, cpu, op, op.b)?;
    let long = cpu.msr.efer & efer::LMA != 0;
    let entry = visible(core, cpu, selector)?.filter(|e| {
        !e.is_system()
            || match e.kind() {
                system::LDT | system::TSS | system::TSS_BUSY => true,
                system::TSS16 | system::TSS16_BUSY => !long,
                system::CALL => !LIMIT,
                system::CALL16 | system::TASK_GATE => !LIMIT && !long,
                _ => false,
            }
    });
    if let Some(e) = entry {
        let v = if LIMIT { e.limit().into() } else { e.raw >> 32 & 0x00ff_ff00 };
        set_reg(cpu, op.a, T::from_u64(v));
    }
    set_zf(core, cpu, entry.is_some());
    Ok(())
}

/// VERR, or VERW if `WRITE`.
pub(crate) fn verify<const WRITE: bool>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if !cpu.is_protected() {
        return Err(Fault::UD);
    }
    let selector = load_rm::<u16>(core, cpu, op, op.a)?;
    let fits = visible(core, cpu, selector)?.is_some_and(|e| {
        !e.is_system() && if WRITE { e.is_writable_data() } else { !e.is_code() || e.kind() & 2 != 0 }
    });
    set_zf(core, cpu, fits);
    Ok(())
}

// ---- identification, time, randomness ----

pub(crate) fn cpuid_op(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let (leaf, subleaf) = (reg::<u32>(cpu, 0), reg::<u32>(cpu, 1));
    let r = core.ctx.cpuid.query(leaf, subleaf, cpu);
    for (n, v) in [(gpr::RAX, r.eax), (gpr::RBX, r.ebx), (gpr::RCX, r.ecx), (gpr::RDX, r.edx)] {
        cpu.gpr[n] = v.into();
    }
    Ok(())
}

fn set_pair(cpu: &mut CpuState, v: u64) {
    cpu.gpr[gpr::RAX] = v & 0xffff_ffff;
    cpu.gpr[gpr::RDX] = v >> 32;
}

/// RDTSC, or RDTSCP if `AUX`.
pub(crate) fn rdtsc<const AUX: bool>(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    if AUX && !has(core, bit::RDTSCP) {
        return Err(Fault::UD);
    }
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl() != 0 {
        return Err(Fault::GP0);
    }
    let v = msr::tsc(core, cpu);
    set_pair(cpu, v);
    if AUX {
        cpu.gpr[gpr::RCX] = cpu.msr.tsc_aux & 0xffff_ffff;
    }
    Ok(())
}

pub(crate) fn rdpid(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if !has(core, bit::RDPID) {
        return Err(Fault::UD);
    }
    set_reg(cpu, op.a, cpu.msr.tsc_aux & 0xffff_ffff);
    Ok(())
}

pub(crate) fn rdpmc(_core: &mut Core, _cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    Err(Fault::GP0)
}

pub(crate) fn rdmsr(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let v = msr::read(core, cpu, reg(cpu, 1))?;
    set_pair(cpu, v);
    Ok(())
}

pub(crate) fn wrmsr(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    let v = cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xffff_ffff;
    msr::write(core, cpu, reg(cpu, 1), v)
}

/// VMCALL and VMMCALL.
pub(crate) fn hypercall(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    let gim = core.ctx.gim.clone().ok_or(Fault::UD)?;
    if gim.hypercall(cpu) { Ok(()) } else { Err(Fault::UD) }
}

/// RDRAND, or RDSEED if `SEED`.
pub(crate) fn random<const SEED: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    if !has(core, if SEED { bit::RDSEED } else { bit::RDRAND }) {
        return Err(Fault::UD);
    }
    // A fresh hasher is keyed from the host's random source.
    use std::hash::{BuildHasher, Hasher};
    let v = std::collections::hash_map::RandomState::new().build_hasher().finish();
    set_reg(cpu, op.a, T::from_u64(v ^ v >> 32));
    core.sync_flags(cpu);
    cpu.rflags = cpu.rflags & !rflags::ARITH | rflags::CF;
    Ok(())
}

pub(crate) fn xgetbv(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    match reg::<u32>(cpu, 1) {
        0 => {}
        1 if core.ctx.cpuid.has(bit::XGETBV1) => {}
        _ => return Err(Fault::GP0),
    }
    // All enabled components count as in use.
    let v = cpu.xcr0;
    set_pair(cpu, v);
    Ok(())
}

pub(crate) fn xsetbv(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    privileged(cpu)?;
    let v = cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xffff_ffff;
    let supported = if has(core, bit::AVX) { 7 } else { 3 };
    if reg::<u32>(cpu, 1) != 0 || v & 1 == 0 || v & !supported != 0 || v & 6 == 4 {
        return Err(Fault::GP0);
    }
    cpu.xcr0 = v;
    Ok(())
}

// ---- fast system calls ----

fn flat(attr_kind: u8, dpl: u8, long: bool, big: bool) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        attr: cpum::Descriptor::new()
            .with_kind(attr_kind)
            .with_code_or_data(true)
            .with_present(true)
            .with_dpl(dpl)
            .with_long(long)
            .with_big(big)
            .with_granular(true),
        selector: 0,
    }
}

fn enter_flat(cpu: &mut CpuState, cs: u16, ss: u16, dpl: u8, long: bool) {
    (cpu.seg[seg::CS], cpu.seg[seg::SS]) = flat_pair(cs, ss, dpl, long);
}

/// The code and stack segments that SYSCALL and SYSRET load.
fn flat_pair(cs: u16, ss: u16, dpl: u8, long: bool) -> (Segment, Segment) {
    (
        Segment { selector: cs, ..flat(11, dpl, long, !long) },
        Segment { selector: ss, ..flat(3, dpl, false, true) },
    )
}

/// The code and stack segments of 64-bit SYSCALL with a value of STAR.
pub fn syscall_segments(star: u64) -> (Segment, Segment) {
    let cs = (star >> 32) as u16 & !3;
    flat_pair(cs, cs.wrapping_add(8), 0, true)
}

/// The same of SYSRET to 64-bit code.
pub fn sysret_segments(star: u64) -> (Segment, Segment) {
    let base = (star >> 48) as u16;
    flat_pair(base.wrapping_add(16) | 3, base.wrapping_add(8) | 3, 3, true)
}

pub(crate) fn syscall(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let long_mode = cpu.msr.efer & efer::LMA != 0;
    if cpu.msr.efer & efer::SCE == 0 || cpu.cr0 & cr0::PE == 0 {
        return Err(Fault::UD);
    }
    core.sync_flags(cpu);
    let star = cpu.msr.star;
    let cs = (star >> 32) as u16 & !3;
    let next = next(cpu, op);
    cpu.gpr[gpr::RCX] = next;
    if long_mode {
        cpu.gpr[11] = cpu.rflags & !rflags::RF;
        cpu.rip = if op.long() { cpu.msr.lstar } else { cpu.msr.cstar };
        cpu.rflags = cpu.rflags & !(cpu.msr.sfmask | rflags::RF) | rflags::FIXED;
    } else {
        cpu.rip = star & 0xffff_ffff;
        cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    }
    enter_flat(cpu, cs, cs.wrapping_add(8), 0, long_mode);
    Ok(())
}

pub(crate) fn sysret(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if cpu.msr.efer & efer::SCE == 0 {
        return Err(Fault::UD);
    }
    if !cpu.is_protected() || cpu.cpl() != 0 {
        return Err(Fault::GP0);
    }
    core.sync_flags(cpu);
    let base = (cpu.msr.star >> 48) as u16;
    let to_64 = op.size == 8;
    let rip = cpu.gpr[gpr::RCX];
    if to_64 && !canonical(rip) {
        return Err(Fault::GP0);
    }
    if cpu.msr.efer & efer::LMA != 0 {
        let keep = rflags::RF | rflags::VM;
        cpu.rflags = cpu.gpr[11] & 0x003f_7fd7 & !keep | rflags::FIXED;
    } else {
        cpu.rflags |= rflags::IF;
    }
    cpu.rip = if to_64 { rip } else { rip & 0xffff_ffff };
    let cs = (if to_64 { base.wrapping_add(16) } else { base }) | 3;
    enter_flat(cpu, cs, base.wrapping_add(8) | 3, 3, to_64);
    Ok(())
}

pub(crate) fn sysenter(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    if cpu.cr0 & cr0::PE == 0 || is_null(cpu.msr.sysenter_cs as u16) {
        return Err(Fault::GP0);
    }
    core.sync_flags(cpu);
    let long = cpu.msr.efer & efer::LMA != 0;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let cs = cpu.msr.sysenter_cs as u16 & !3;
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cpu.rip = cpu.msr.sysenter_eip & mask;
    cpu.gpr[gpr::RSP] = cpu.msr.sysenter_esp & mask;
    enter_flat(cpu, cs, cs.wrapping_add(8), 0, long);
    Ok(())
}

pub(crate) fn sysexit(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if !cpu.is_protected() || cpu.cpl() != 0 || is_null(cpu.msr.sysenter_cs as u16) {
        return Err(Fault::GP0);
    }
    core.sync_flags(cpu);
    let to_64 = op.size == 8;
    let base = cpu.msr.sysenter_cs as u16;
    let (rip, rsp) = (cpu.gpr[gpr::RDX], cpu.gpr[gpr::RCX]);
    if to_64 && !(canonical(rip) && canonical(rsp)) {
        return Err(Fault::GP0);
    }
    let mask = if to_64 { u64::MAX } else { 0xffff_ffff };
    cpu.rip = rip & mask;
    cpu.gpr[gpr::RSP] = rsp & mask;
    let (cs, ss) = if to_64 { (32, 40) } else { (16, 24) };
    enter_flat(cpu, base.wrapping_add(cs) | 3, base.wrapping_add(ss) | 3, 3, to_64);
    Ok(())
}

pub(crate) fn swapgs(_core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    privileged(cpu)?;
    std::mem::swap(&mut cpu.seg[seg::GS].base, &mut cpu.msr.kernel_gs_base);
    Ok(())
}

/// RDFSBASE, RDGSBASE: the segment is `b`.
pub(crate) fn read_base<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(Fault::UD);
    }
    let v = cpu.seg[usize::from(op.b) % 6].base;
    set_reg(cpu, op.a, T::from_u64(v));
    Ok(())
}

/// WRFSBASE, WRGSBASE.
pub(crate) fn write_base<T: Cell>(_core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(Fault::UD);
    }
    let v = reg::<T>(cpu, op.a).to_u64();
    if !canonical(v) {
        return Err(Fault::GP0);
    }
    cpu.seg[usize::from(op.b) % 6].base = v;
    Ok(())
}
