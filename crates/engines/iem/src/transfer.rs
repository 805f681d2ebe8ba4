//! Far jumps, calls and returns, and IRET (Intel SDM volume 3, 5.8; volume 2, the instructions' pages).

use cpum::state::{cr0, efer, gpr, rflags, seg};
use cpum::{CpuState, Segment};

use crate::core::{Core, canonical};
use crate::ops::data::{Stack, stack_mask};
use crate::segment::{self, Entry, error_code, is_null, system};
use crate::{Fault, Vector, task};

fn long_mode(cpu: &CpuState) -> bool {
    cpu.msr.efer & efer::LMA != 0
}

/// Checks an instruction pointer against the code segment it goes into.
fn check_target(cpu: &CpuState, entry: Entry, offset: u64) -> Result<(), Fault> {
    let inside = if long_mode(cpu) && entry.attr().long() {
        canonical(offset)
    } else {
        offset <= entry.limit().into()
    };
    if inside { Ok(()) } else { Err(Fault::GP0) }
}

/// Checks a code segment that is reached directly (not by a gate) by jump or call.
fn check_direct(cpu: &CpuState, selector: u16, entry: Entry) -> Result<(), Fault> {
    let code = error_code(selector);
    let (cpl, rpl) = (cpu.cpl(), (selector & 3) as u8);
    let allowed = if entry.is_conforming() { entry.dpl() <= cpl } else { rpl <= cpl && entry.dpl() == cpl };
    if !allowed || long_mode(cpu) && entry.attr().long() && entry.attr().big() {
        return Err(Fault::gp(code));
    }
    if !entry.present() {
        return Err(Fault::np(code));
    }
    Ok(())
}

/// The CS register for `entry` at privilege `cpl`.
fn code_segment(entry: Entry, selector: u16, cpl: u8) -> Segment {
    entry.segment(selector & !3 | u16::from(cpl))
}

/// Sets CS and the privilege that goes with it. In this state privilege is SS's DPL, so SS must be set before.
fn enter(cpu: &mut CpuState, cs: Segment, rip: u64) {
    cpu.seg[seg::CS] = cs;
    cpu.rip = rip;
}

/// JMP far to `selector:offset`, cut to the operand size by the caller.
pub(crate) fn jump(
    core: &mut Core,
    cpu: &mut CpuState,
    selector: u16,
    offset: u64,
    len: u8,
) -> Result<(), Fault> {
    if !cpu.is_protected() {
        if offset > cpu.seg[seg::CS].limit.into() {
            return Err(Fault::GP0);
        }
        segment::load_real(cpu, seg::CS, selector);
        cpu.rip = offset;
        return Ok(());
    }
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let mut entry = segment::read_entry(core, cpu, selector, Vector::Gp)?;
    if entry.is_code() {
        check_direct(cpu, selector, entry)?;
        check_target(cpu, entry, offset)?;
        segment::mark_accessed(core, cpu, &mut entry)?;
        let cpl = cpu.cpl();
        enter(cpu, code_segment(entry, selector, cpl), offset);
        return Ok(());
    }
    let code = error_code(selector);
    if !entry.is_system() {
        return Err(Fault::gp(code));
    }
    let rpl = (selector & 3) as u8;
    match entry.kind() {
        system::CALL | system::CALL16 if !(long_mode(cpu) && entry.kind() == system::CALL16) => {
            let (target, mut entry, offset) = gate_target(core, cpu, selector, entry)?;
            let cpl = cpu.cpl();
            let allowed = if entry.is_conforming() { entry.dpl() <= cpl } else { entry.dpl() == cpl };
            if !allowed {
                return Err(Fault::gp(error_code(target)));
            }
            if !entry.present() {
                return Err(Fault::np(error_code(target)));
            }
            check_target(cpu, entry, offset)?;
            segment::mark_accessed(core, cpu, &mut entry)?;
            enter(cpu, code_segment(entry, target, cpl), offset);
            Ok(())
        }
        system::TSS | system::TSS16 if !long_mode(cpu) => {
            if entry.dpl() < cpu.cpl().max(rpl) {
                return Err(Fault::gp(code));
            }
            let next = cpu.rip.wrapping_add(len.into());
            task::switch(core, cpu, selector, entry, task::Cause::Jump, next, None)
        }
        system::TASK_GATE if !long_mode(cpu) => {
            let (target, entry) = task_gate(core, cpu, selector, entry)?;
            let next = cpu.rip.wrapping_add(len.into());
            task::switch(core, cpu, target, entry, task::Cause::Jump, next, None)
        }
        _ => Err(Fault::gp(code)),
    }
}

/// Follows a task gate reached by jump or call.
fn task_gate(core: &mut Core, cpu: &CpuState, selector: u16, gate: Entry) -> Result<(u16, Entry), Fault> {
    let code = error_code(selector);
    if gate.dpl() < cpu.cpl().max((selector & 3) as u8) {
        return Err(Fault::gp(code));
    }
    if !gate.present() {
        return Err(Fault::np(code));
    }
    let target = gate.gate_selector();
    Ok((target, task::read_tss(core, cpu, target, Vector::Gp)?))
}

/// Checks a call gate and its target's descriptor; gives the target's selector, descriptor and offset.
fn gate_target(
    core: &mut Core,
    cpu: &CpuState,
    selector: u16,
    gate: Entry,
) -> Result<(u16, Entry, u64), Fault> {
    let code = error_code(selector);
    if gate.dpl() < cpu.cpl().max((selector & 3) as u8) {
        return Err(Fault::gp(code));
    }
    if !gate.present() {
        return Err(Fault::np(code));
    }
    let target = gate.gate_selector();
    if is_null(target) {
        return Err(Fault::GP0);
    }
    let mut offset = gate.gate_offset();
    if gate.kind() == system::CALL16 {
        offset &= 0xffff;
    }
    if long_mode(cpu) {
        let upper = segment::read_upper(core, cpu, gate)?;
        // The type field of the upper half must be zero.
        if upper >> 40 & 0x1f != 0 {
            return Err(Fault::gp(code));
        }
        offset |= upper << 32;
    }
    let entry = segment::read_entry(core, cpu, target, Vector::Gp)?;
    let bad_size = long_mode(cpu) && (!entry.attr().long() || entry.attr().big());
    if !entry.is_code() || entry.dpl() > cpu.cpl() || bad_size {
        return Err(Fault::gp(error_code(target)));
    }
    Ok((target, entry, offset))
}

/// CALL far.
pub(crate) fn call(
    core: &mut Core,
    cpu: &mut CpuState,
    selector: u16,
    offset: u64,
    size: u8,
    len: u8,
) -> Result<(), Fault> {
    let next = cpu.rip.wrapping_add(len.into());
    let long = cpu.is_64bit();
    if !cpu.is_protected() {
        if offset > cpu.seg[seg::CS].limit.into() {
            return Err(Fault::GP0);
        }
        let mut stack = Stack::of(cpu, false);
        stack.push_sized(core, cpu, size, cpu.seg[seg::CS].selector.into())?;
        stack.push_sized(core, cpu, size, next)?;
        stack.commit(cpu);
        segment::load_real(cpu, seg::CS, selector);
        cpu.rip = offset;
        return Ok(());
    }
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let mut entry = segment::read_entry(core, cpu, selector, Vector::Gp)?;
    let cpl = cpu.cpl();
    if entry.is_code() {
        check_direct(cpu, selector, entry)?;
        check_target(cpu, entry, offset)?;
        let mut stack = Stack::of(cpu, long);
        stack.push_sized(core, cpu, size, cpu.seg[seg::CS].selector.into())?;
        stack.push_sized(core, cpu, size, next)?;
        segment::mark_accessed(core, cpu, &mut entry)?;
        stack.commit(cpu);
        enter(cpu, code_segment(entry, selector, cpl), offset);
        return Ok(());
    }
    let code = error_code(selector);
    let rpl = (selector & 3) as u8;
    if !entry.is_system() {
        return Err(Fault::gp(code));
    }
    match entry.kind() {
        system::CALL | system::CALL16 if !(long_mode(cpu) && entry.kind() == system::CALL16) => {
            call_gate(core, cpu, selector, entry, next)
        }
        system::TSS | system::TSS16 if !long_mode(cpu) => {
            if entry.dpl() < cpl.max(rpl) {
                return Err(Fault::gp(code));
            }
            task::switch(core, cpu, selector, entry, task::Cause::Call, next, None)
        }
        system::TASK_GATE if !long_mode(cpu) => {
            let (target, entry) = task_gate(core, cpu, selector, entry)?;
            task::switch(core, cpu, target, entry, task::Cause::Call, next, None)
        }
        _ => Err(Fault::gp(code)),
    }
}

fn call_gate(
    core: &mut Core,
    cpu: &mut CpuState,
    selector: u16,
    gate: Entry,
    next: u64,
) -> Result<(), Fault> {
    let (target, mut entry, offset) = gate_target(core, cpu, selector, gate)?;
    if !entry.present() {
        return Err(Fault::np(error_code(target)));
    }
    let cpl = cpu.cpl();
    let size: u8 = if long_mode(cpu) {
        8
    } else if gate.kind() == system::CALL16 {
        2
    } else {
        4
    };
    let old_cs = cpu.seg[seg::CS].selector;
    if entry.is_conforming() || entry.dpl() == cpl {
        check_target(cpu, entry, offset)?;
        let mut stack = Stack::of(cpu, long_mode(cpu));
        stack.push_sized(core, cpu, size, old_cs.into())?;
        stack.push_sized(core, cpu, size, next)?;
        segment::mark_accessed(core, cpu, &mut entry)?;
        stack.commit(cpu);
        enter(cpu, code_segment(entry, target, cpl), offset);
        return Ok(());
    }
    // To an inner level, on its own stack.
    let inner = entry.dpl();
    let (old_ss, old_sp) = (cpu.seg[seg::SS].selector, cpu.gpr[gpr::RSP]);
    let mut frame;
    if long_mode(cpu) {
        let sp = segment::task_stack_64(core, cpu, inner, 0)?;
        if !canonical(sp) {
            return Err(Fault::SS0);
        }
        frame = Frame::long(sp, inner);
    } else {
        let (ss, sp) = segment::task_stack(core, cpu, inner)?;
        let ss = segment::check_stack(core, cpu, ss, inner, Vector::Ts)?;
        frame = Frame::legacy(ss, sp, inner, Fault::ss(error_code(ss.selector)));
    }
    let mut parameters = Vec::new();
    if !long_mode(cpu) {
        let mut outer = Stack::of(cpu, false);
        for _ in 0..gate.gate_count() {
            parameters.push(outer.pop_sized(core, cpu, size)?);
        }
    }
    frame.push(core, cpu, size, old_ss.into())?;
    frame.push(core, cpu, size, old_sp)?;
    for &p in parameters.iter().rev() {
        frame.push(core, cpu, size, p)?;
    }
    frame.push(core, cpu, size, old_cs.into())?;
    frame.push(core, cpu, size, next)?;
    check_target(cpu, entry, offset)?;
    segment::mark_accessed(core, cpu, &mut entry)?;
    frame.commit(cpu);
    enter(cpu, code_segment(entry, target, inner), offset);
    Ok(())
}

/// A stack being built for another privilege level (or the same) before the switch to it.
pub(crate) struct Frame {
    ss: Segment,
    sp: u64,
    mask: u64,
    long: bool,
    cpl: u8,
    fault: Fault,
}

impl Frame {
    /// A stack of 64-bit code with a null SS.
    pub(crate) fn long(sp: u64, cpl: u8) -> Self {
        Self {
            ss: segment::null_stack(cpl.into(), cpl),
            sp,
            mask: u64::MAX,
            long: true,
            cpl,
            fault: Fault::SS0,
        }
    }

    pub(crate) fn legacy(ss: Segment, sp: u64, cpl: u8, fault: Fault) -> Self {
        let mask = if ss.attr.big() { 0xffff_ffff } else { 0xffff };
        Self { ss, sp: sp & mask, mask, long: false, cpl, fault }
    }

    /// Keeps the current SS in 64-bit code.
    pub(crate) fn with_segment(mut self, ss: Segment) -> Self {
        self.ss = ss;
        self
    }

    pub(crate) fn push(
        &mut self,
        core: &mut Core,
        cpu: &CpuState,
        size: u8,
        value: u64,
    ) -> Result<(), Fault> {
        self.sp = self.sp.wrapping_sub(size.into()) & self.mask;
        let at = if self.long {
            self.sp
        } else {
            segment::stack_linear(&self.ss, self.sp, size.into(), self.fault)?
        };
        let system = self.cpl != 3;
        match (size, system) {
            (2, true) => core.write_system(cpu, at, value as u16),
            (4, true) => core.write_system(cpu, at, value as u32),
            (_, true) => core.write_system(cpu, at, value),
            (2, false) => core.write(cpu, at, value as u16),
            (4, false) => core.write(cpu, at, value as u32),
            (_, false) => core.write(cpu, at, value),
        }
        .map_err(|f| if core.noncanonical && f == Fault::GP0 { Fault::SS0 } else { f })
    }

    /// Makes it the stack.
    pub(crate) fn commit(self, cpu: &mut CpuState) {
        cpu.seg[seg::SS] = self.ss;
        cpu.gpr[gpr::RSP] = cpu.gpr[gpr::RSP] & !self.mask | self.sp;
    }
}

/// RET far, releasing `release` bytes of parameters.
pub(crate) fn ret(core: &mut Core, cpu: &mut CpuState, size: u8, release: u64) -> Result<(), Fault> {
    let mut stack = Stack::of(cpu, cpu.is_64bit());
    let rip = stack.pop_sized(core, cpu, size)?;
    let selector = stack.pop_sized(core, cpu, size)? as u16;
    if !cpu.is_protected() {
        if rip > cpu.seg[seg::CS].limit.into() {
            return Err(Fault::GP0);
        }
        stack.skip(release);
        stack.commit(cpu);
        segment::load_real(cpu, seg::CS, selector);
        cpu.rip = rip;
        return Ok(());
    }
    let mut entry = return_target(core, cpu, selector)?;
    check_target(cpu, entry, rip)?;
    let (cpl, rpl) = (cpu.cpl(), (selector & 3) as u8);
    stack.skip(release);
    if rpl == cpl {
        segment::mark_accessed(core, cpu, &mut entry)?;
        stack.commit(cpu);
        enter(cpu, code_segment(entry, selector, rpl), rip);
        return Ok(());
    }
    let sp = stack.pop_sized(core, cpu, size)?;
    let ss = stack.pop_sized(core, cpu, size)? as u16;
    let ss = outer_stack(core, cpu, ss, rpl, entry)?;
    segment::mark_accessed(core, cpu, &mut entry)?;
    set_outer_stack(cpu, entry, ss, sp);
    let mut outer = Stack::of(cpu, long_mode(cpu) && entry.attr().long());
    outer.skip(release);
    outer.commit(cpu);
    enter(cpu, code_segment(entry, selector, rpl), rip);
    segment::drop_inner_segments(cpu, rpl);
    Ok(())
}

/// Checks the code segment that a return goes to.
fn return_target(core: &mut Core, cpu: &CpuState, selector: u16) -> Result<Entry, Fault> {
    let code = error_code(selector);
    if is_null(selector) {
        return Err(Fault::GP0);
    }
    let entry = segment::read_entry(core, cpu, selector, Vector::Gp)?;
    let rpl = (selector & 3) as u8;
    let level = if entry.is_conforming() { entry.dpl() <= rpl } else { entry.dpl() == rpl };
    let bad_size = long_mode(cpu) && entry.attr().long() && entry.attr().big();
    if !entry.is_code() || rpl < cpu.cpl() || !level || bad_size {
        return Err(Fault::gp(code));
    }
    if !entry.present() {
        return Err(Fault::np(code));
    }
    Ok(entry)
}

/// Checks the SS that a return to privilege `cpl` pops; null is allowed for 64-bit code below 3.
fn outer_stack(core: &mut Core, cpu: &CpuState, ss: u16, cpl: u8, cs: Entry) -> Result<Segment, Fault> {
    if is_null(ss) && long_mode(cpu) && cs.attr().long() && cpl != 3 && (ss & 3) as u8 == cpl {
        return Ok(segment::null_stack(ss, cpl));
    }
    segment::check_stack(core, cpu, ss, cpl, Vector::Gp)
}

fn set_outer_stack(cpu: &mut CpuState, cs: Entry, ss: Segment, sp: u64) {
    cpu.seg[seg::SS] = ss;
    if long_mode(cpu) && cs.attr().long() {
        cpu.gpr[gpr::RSP] = sp;
    } else {
        let mask = stack_mask(cpu);
        cpu.gpr[gpr::RSP] = cpu.gpr[gpr::RSP] & !mask | sp & mask;
    }
}

/// Flags that IRET restores with operand size `size` at privilege `cpl`.
fn iret_flags(cpu: &CpuState, popped: u64, size: u8, cpl: u8) -> u64 {
    use rflags::*;
    let mut mask = ARITH | TF | DF | NT;
    if size > 2 {
        mask |= RF | AC | ID;
    }
    let iopl = (cpu.rflags & IOPL) >> 12;
    if u64::from(cpl) <= iopl {
        mask |= IF;
    }
    if cpl == 0 {
        mask |= IOPL;
        if size > 2 {
            mask |= VIF | VIP;
        }
    }
    cpu.rflags & !mask & !VM | popped & mask | FIXED
}

/// IRET with operand size `size`.
pub(crate) fn iret(core: &mut Core, cpu: &mut CpuState, size: u8) -> Result<(), Fault> {
    core.sync_flags(cpu);
    iret_inner(core, cpu, size)?;
    cpu.nmi_blocked = false;
    Ok(())
}

fn iret_inner(core: &mut Core, cpu: &mut CpuState, size: u8) -> Result<(), Fault> {
    use rflags::*;
    if cpu.cr0 & cr0::PE == 0 || cpu.rflags & VM != 0 {
        let v86 = cpu.rflags & VM != 0;
        if v86 && cpu.rflags & IOPL != IOPL {
            return Err(Fault::GP0);
        }
        let mut stack = Stack::of(cpu, false);
        let rip = stack.pop_sized(core, cpu, size)?;
        let cs = stack.pop_sized(core, cpu, size)? as u16;
        let flags = stack.pop_sized(core, cpu, size)?;
        if rip > cpu.seg[seg::CS].limit.into() {
            return Err(Fault::GP0);
        }
        stack.commit(cpu);
        segment::load_real(cpu, seg::CS, cs);
        cpu.rip = rip;
        let mut mask = ARITH | TF | IF | DF | NT;
        if !v86 {
            mask |= IOPL;
        }
        if size > 2 {
            mask |= RF | AC | ID;
        }
        cpu.rflags = cpu.rflags & !mask | flags & mask | FIXED;
        return Ok(());
    }
    if cpu.rflags & NT != 0 {
        if long_mode(cpu) {
            return Err(Fault::GP0);
        }
        return task::iret(core, cpu);
    }
    let cpl = cpu.cpl();
    let mut stack = Stack::of(cpu, cpu.is_64bit());
    let rip = stack.pop_sized(core, cpu, size)?;
    let selector = stack.pop_sized(core, cpu, size)? as u16;
    let flags = stack.pop_sized(core, cpu, size)?;
    if flags & VM != 0 && cpl == 0 && size == 4 && !long_mode(cpu) {
        return to_v86(core, cpu, stack, rip, selector, flags);
    }
    let mut entry = return_target(core, cpu, selector)?;
    check_target(cpu, entry, rip)?;
    let rpl = (selector & 3) as u8;
    // 64-bit code pops the stack always.
    let new_stack = if rpl != cpl || cpu.is_64bit() {
        let sp = stack.pop_sized(core, cpu, size)?;
        let ss = stack.pop_sized(core, cpu, size)? as u16;
        Some((outer_stack(core, cpu, ss, rpl, entry)?, sp))
    } else {
        None
    };
    segment::mark_accessed(core, cpu, &mut entry)?;
    cpu.rflags = iret_flags(cpu, flags, size, cpl);
    match new_stack {
        Some((ss, sp)) => set_outer_stack(cpu, entry, ss, sp),
        None => stack.commit(cpu),
    }
    enter(cpu, code_segment(entry, selector, rpl), rip);
    if rpl != cpl {
        segment::drop_inner_segments(cpu, rpl);
    }
    Ok(())
}

fn to_v86(
    core: &mut Core,
    cpu: &mut CpuState,
    mut stack: Stack,
    rip: u64,
    cs: u16,
    flags: u64,
) -> Result<(), Fault> {
    let mut values = [0; 6];
    for v in &mut values {
        *v = stack.pop_sized(core, cpu, 4)?;
    }
    let [sp, ss, es, ds, fs, gs] = values;
    if rip > 0xffff {
        return Err(Fault::GP0);
    }
    let mask = rflags::ARITH
        | rflags::TF
        | rflags::IF
        | rflags::DF
        | rflags::IOPL
        | rflags::NT
        | rflags::RF
        | rflags::VM
        | rflags::AC
        | rflags::VIF
        | rflags::VIP
        | rflags::ID;
    cpu.rflags = flags & mask | rflags::FIXED;
    for (s, v) in
        [(seg::CS, cs.into()), (seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)]
    {
        segment::load_real(cpu, s, v as u16);
    }
    cpu.gpr[gpr::RSP] = sp & 0xffff_ffff;
    cpu.rip = rip;
    Ok(())
}
