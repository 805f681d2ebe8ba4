//! Delivery of exceptions and interrupts through the IDT in all modes (Intel SDM volume 3, chapter 6).

use cpum::state::{cr0, efer, gpr, rflags, seg};
use cpum::{Activity, CpuState};
use em::Exit;

use crate::core::{Core, canonical};
use crate::segment::{self, error_code, is_null, system};
use crate::transfer::Frame;
use crate::{Fault, Vector, debug, task};

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception that the instruction raised; RIP is at it.
    Exception,
    /// INT n: subject to the gate's privilege.
    Software,
    /// INT3, INTO: subject to the gate's privilege, but not to the virtual-8086 check.
    Trap,
    /// INT1, an interrupt, or an NMI.
    External,
}

impl Source {
    fn checks_privilege(self) -> bool {
        matches!(self, Self::Software | Self::Trap)
    }

    /// The EXT bit of error codes raised during delivery.
    fn ext(self) -> u16 {
        u16::from(!self.checks_privilege())
    }
}

/// The class of an exception for double faults (Intel SDM volume 3, table 6-5).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

fn class(vector: Vector) -> Class {
    match vector {
        Vector::De | Vector::Ts | Vector::Np | Vector::Ss | Vector::Gp => Class::Contributory,
        Vector::Pf => Class::PageFault,
        _ => Class::Benign,
    }
}

/// Delivers an exception, and whatever that raises in turn; an error is a triple fault.
pub(crate) fn raise(core: &mut Core, cpu: &mut CpuState, fault: Fault) -> Result<(), Exit> {
    core.stats.exceptions += 1;
    core.sync_flags(cpu);
    let mut current = fault;
    loop {
        prepare(core, cpu, current);
        let code = current.vector.has_error_code().then_some(current.code);
        let next = cpu.rip;
        let Err(second) = deliver(core, cpu, current.vector as u8, code, Source::Exception, next) else {
            return Ok(());
        };
        current = combine(cpu, current.vector, second)?;
    }
}

/// What a fault during the delivery of `first` becomes.
fn combine(cpu: &mut CpuState, first: Vector, second: Fault) -> Result<Fault, Exit> {
    if first == Vector::Df {
        tracing::info!(target: "iem", rip = cpu.rip, ?second, "triple fault");
        cpu.activity = Activity::Shutdown;
        return Err(Exit::TripleFault);
    }
    let (a, b) = (class(first), class(second.vector));
    let double = match a {
        Class::Benign => false,
        Class::Contributory => b == Class::Contributory,
        Class::PageFault => b != Class::Benign,
    };
    Ok(if double { Fault::new(Vector::Df, 0) } else { second })
}

/// Effects that an exception has before delivery.
fn prepare(core: &mut Core, cpu: &mut CpuState, fault: Fault) {
    match fault.vector {
        Vector::Pf => cpu.cr2 = core.fault_address,
        Vector::Db => cpu.dr7 &= !debug::GD,
        _ => {}
    }
}

/// Delivers an interrupt or NMI between two instructions.
pub(crate) fn interrupt(core: &mut Core, cpu: &mut CpuState, vector: u8) -> Result<(), Exit> {
    core.stats.interrupts += 1;
    core.sync_flags(cpu);
    let next = cpu.rip;
    match deliver(core, cpu, vector, None, Source::External, next) {
        Ok(()) => Ok(()),
        // A fault while an interrupt is delivered is served like any other; the interrupt counts as benign.
        Err(fault) => raise(core, cpu, fault),
    }
}

/// Delivers a debug trap after an instruction.
pub(crate) fn debug_trap(core: &mut Core, cpu: &mut CpuState, dr6: u64) -> Result<(), Exit> {
    cpu.dr6 |= dr6;
    raise(core, cpu, Fault::DB)
}

/// INT n, INT3, INTO, INT1: goes to the handler with `next` as return address, or faults.
pub(crate) fn software(
    core: &mut Core,
    cpu: &mut CpuState,
    vector: u8,
    source: Source,
    next: u64,
) -> Result<(), Fault> {
    core.sync_flags(cpu);
    if source == Source::Software && cpu.rflags & rflags::VM != 0 && cpu.rflags & rflags::IOPL != rflags::IOPL
    {
        return Err(Fault::GP0);
    }
    deliver(core, cpu, vector, None, source, next)
}

/// The flags image that an event pushes.
fn flags_image(cpu: &CpuState, vector: u8, source: Source) -> u64 {
    // Faults restart their instruction, without hitting its breakpoint again; #DB traps and #BP, #OF are no faults.
    let resumes = source == Source::Exception && vector != Vector::Db as u8 && vector != Vector::Df as u8;
    cpu.rflags | rflags::FIXED | if resumes { rflags::RF } else { 0 }
}

fn deliver(
    core: &mut Core,
    cpu: &mut CpuState,
    vector: u8,
    code: Option<u16>,
    source: Source,
    next: u64,
) -> Result<(), Fault> {
    core.resync = true;
    core.noncanonical = false;
    let result = if cpu.cr0 & cr0::PE == 0 {
        deliver_real(core, cpu, vector, next)
    } else if cpu.msr.efer & efer::LMA != 0 {
        deliver_long(core, cpu, vector, code, source, next)
    } else {
        deliver_protected(core, cpu, vector, code, source, next)
    };
    if result.is_ok() {
        cpu.inhibit_rip = None;
        core.no_trap = true;
        if cpu.activity == Activity::Halted {
            cpu.activity = Activity::Running;
        }
    }
    result
}

fn deliver_real(core: &mut Core, cpu: &mut CpuState, vector: u8, next: u64) -> Result<(), Fault> {
    let at = u64::from(vector) * 4;
    if at + 3 > cpu.idtr.limit.into() {
        return Err(Fault::new(Vector::Gp, 0));
    }
    let entry: u32 = core.read_system(cpu, segment::wrap(cpu, cpu.idtr.base.wrapping_add(at)))?;
    let mut stack = crate::ops::data::Stack::of(cpu, false);
    stack.push(core, cpu, cpu.rflags as u16 | rflags::FIXED as u16)?;
    stack.push(core, cpu, cpu.seg[seg::CS].selector)?;
    stack.push(core, cpu, next as u16)?;
    stack.commit(cpu);
    segment::load_real(cpu, seg::CS, (entry >> 16) as u16);
    cpu.rip = u64::from(entry & 0xffff);
    cpu.rflags &= !(rflags::IF | rflags::TF | rflags::RF | rflags::AC);
    Ok(())
}

/// The error code that names an IDT entry.
fn idt_code(vector: u8, source: Source) -> u16 {
    u16::from(vector) << 3 | 2 | source.ext()
}

/// Flags that delivery clears: IF only by interrupt gates.
fn enter_flags(cpu: &mut CpuState, interrupt_gate: bool) {
    cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    if interrupt_gate {
        cpu.rflags &= !rflags::IF;
    }
}

fn deliver_long(
    core: &mut Core,
    cpu: &mut CpuState,
    vector: u8,
    code: Option<u16>,
    source: Source,
    next: u64,
) -> Result<(), Fault> {
    let gate_fault = idt_code(vector, source);
    let at = u64::from(vector) * 16;
    if at + 15 > cpu.idtr.limit.into() {
        return Err(Fault::gp(gate_fault));
    }
    let low: u64 = core.read_system(cpu, cpu.idtr.base.wrapping_add(at))?;
    let high: u64 = core.read_system(cpu, cpu.idtr.base.wrapping_add(at + 8))?;
    let gate = segment::Entry { raw: low, at: 0 };
    if !gate.is_system() || !matches!(gate.kind(), system::INTERRUPT | system::TRAP) {
        return Err(Fault::gp(gate_fault));
    }
    let cpl = cpu.cpl();
    if source.checks_privilege() && gate.dpl() < cpl {
        return Err(Fault::gp(gate_fault));
    }
    if !gate.present() {
        return Err(Fault::np(gate_fault));
    }
    let ist = (low >> 32) as u8 & 7;
    let target = gate.gate_offset() | high << 32;
    let (mut entry, inner) = handler_segment(core, cpu, gate.gate_selector(), source)?;
    if !entry.attr().long() || entry.attr().big() {
        return Err(Fault::gp(error_code(gate.gate_selector()) | source.ext()));
    }
    let changes = inner < cpl;
    let sp = if ist != 0 || changes {
        let sp = segment::task_stack_64(core, cpu, inner, ist).map_err(|f| with_ext(f, source))?;
        if !canonical(sp) {
            return Err(Fault::ss(source.ext()));
        }
        sp
    } else {
        cpu.gpr[gpr::RSP]
    };
    let mut frame = Frame::long(sp & !15, inner);
    if !changes {
        frame = frame.with_segment(cpu.seg[seg::SS]);
    }
    let values = [
        u64::from(cpu.seg[seg::SS].selector),
        cpu.gpr[gpr::RSP],
        flags_image(cpu, vector, source),
        u64::from(cpu.seg[seg::CS].selector),
        next,
    ];
    for v in values {
        frame.push(core, cpu, 8, v)?;
    }
    if let Some(code) = code {
        frame.push(core, cpu, 8, code.into())?;
    }
    if !canonical(target) {
        return Err(Fault::gp(source.ext()));
    }
    segment::mark_accessed(core, cpu, &mut entry)?;
    frame.commit(cpu);
    cpu.seg[seg::CS] = entry.segment(gate.gate_selector() & !3 | u16::from(inner));
    cpu.rip = target;
    enter_flags(cpu, gate.kind() == system::INTERRUPT);
    Ok(())
}

fn with_ext(fault: Fault, source: Source) -> Fault {
    Fault::new(fault.vector, fault.code | source.ext())
}

/// Checks the handler's code segment; gives it and the privilege it runs at.
fn handler_segment(
    core: &mut Core,
    cpu: &CpuState,
    selector: u16,
    source: Source,
) -> Result<(segment::Entry, u8), Fault> {
    if is_null(selector) {
        return Err(Fault::gp(source.ext()));
    }
    let code = error_code(selector) | source.ext();
    let entry = segment::read_entry(core, cpu, selector, Vector::Gp).map_err(|f| match f.vector {
        Vector::Gp => with_ext(f, source),
        _ => f,
    })?;
    let cpl = cpu.cpl();
    if !entry.is_code() || entry.dpl() > cpl {
        return Err(Fault::gp(code));
    }
    if !entry.present() {
        return Err(Fault::np(code));
    }
    Ok((entry, if entry.is_conforming() { cpl } else { entry.dpl() }))
}

fn deliver_protected(
    core: &mut Core,
    cpu: &mut CpuState,
    vector: u8,
    code: Option<u16>,
    source: Source,
    next: u64,
) -> Result<(), Fault> {
    let gate_fault = idt_code(vector, source);
    let at = u64::from(vector) * 8;
    if at + 7 > cpu.idtr.limit.into() {
        return Err(Fault::gp(gate_fault));
    }
    let raw: u64 = core.read_system(cpu, segment::wrap(cpu, cpu.idtr.base.wrapping_add(at)))?;
    let gate = segment::Entry { raw, at: 0 };
    let kind = gate.kind();
    let known = matches!(
        kind,
        system::TASK_GATE | system::INTERRUPT16 | system::TRAP16 | system::INTERRUPT | system::TRAP
    );
    if !gate.is_system() || !known {
        return Err(Fault::gp(gate_fault));
    }
    let cpl = cpu.cpl();
    if source.checks_privilege() && gate.dpl() < cpl {
        return Err(Fault::gp(gate_fault));
    }
    if !gate.present() {
        return Err(Fault::np(gate_fault));
    }
    if kind == system::TASK_GATE {
        let selector = gate.gate_selector();
        let entry = task::read_tss(core, cpu, selector, Vector::Gp).map_err(|f| with_ext(f, source))?;
        let image = flags_image(cpu, vector, source);
        cpu.rflags = image;
        return task::switch(core, cpu, selector, entry, task::Cause::Interrupt, next, code);
    }
    let size: u8 = if kind & 8 != 0 { 4 } else { 2 };
    let target = gate.gate_offset() & if size == 4 { 0xffff_ffff } else { 0xffff };
    let selector = gate.gate_selector();
    let (mut entry, inner) = handler_segment(core, cpu, selector, source)?;
    let v86 = cpu.rflags & rflags::VM != 0;
    if v86 && inner != 0 {
        return Err(Fault::gp(error_code(selector) | source.ext()));
    }
    let image = flags_image(cpu, vector, source);
    let mut frame;
    if inner < cpl {
        let (ss, sp) = segment::task_stack(core, cpu, inner).map_err(|f| with_ext(f, source))?;
        let ss = segment::check_stack(core, cpu, ss, inner, Vector::Ts).map_err(|f| match f.vector {
            Vector::Ts | Vector::Ss => with_ext(f, source),
            _ => f,
        })?;
        frame = Frame::legacy(ss, sp, inner, Fault::ss(error_code(ss.selector) | source.ext()));
        if v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                frame.push(core, cpu, size, cpu.seg[s].selector.into())?;
            }
        }
        frame.push(core, cpu, size, cpu.seg[seg::SS].selector.into())?;
        frame.push(core, cpu, size, cpu.gpr[gpr::RSP])?;
    } else {
        frame = Frame::legacy(cpu.seg[seg::SS], cpu.gpr[gpr::RSP], cpl, Fault::ss(source.ext()));
    }
    frame.push(core, cpu, size, image)?;
    frame.push(core, cpu, size, cpu.seg[seg::CS].selector.into())?;
    frame.push(core, cpu, size, next)?;
    if let Some(code) = code {
        frame.push(core, cpu, size, code.into())?;
    }
    if target > entry.limit().into() {
        return Err(Fault::gp(source.ext()));
    }
    segment::mark_accessed(core, cpu, &mut entry)?;
    enter_flags(cpu, kind & 1 == 0);
    frame.commit(cpu);
    if v86 {
        for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
            cpu.seg[s] = segment::null(0);
        }
    }
    cpu.seg[seg::CS] = entry.segment(selector & !3 | u16::from(inner));
    cpu.rip = target;
    Ok(())
}
