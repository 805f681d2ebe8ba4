//! Hardware task switches with 16- and 32-bit task state segments (Intel SDM volume 3, chapter 7).

use cpum::state::{cr0, cr4, gpr, rflags, seg};
use cpum::{CpuState, Descriptor, Segment};

use crate::core::Core;
use crate::segment::{self, Entry, error_code, is_null, system};
use crate::{Fault, Vector, debug};

/// What leads to a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    Jump,
    Call,
    Interrupt,
    Iret,
}

const BUSY: u64 = 2 << 40;

/// Reads and checks the descriptor of an available task state segment in the GDT.
pub(crate) fn read_tss(
    core: &mut Core,
    cpu: &CpuState,
    selector: u16,
    vector: Vector,
) -> Result<Entry, Fault> {
    let fault = Fault::new(vector, error_code(selector));
    if is_null(selector) || selector & 4 != 0 {
        return Err(fault);
    }
    let entry = segment::read_entry(core, cpu, selector, vector)?;
    if !entry.is_system() || !matches!(entry.kind(), system::TSS | system::TSS16) {
        return Err(fault);
    }
    Ok(entry)
}

/// IRET with NT set: back to the task in the link field.
pub(crate) fn iret(core: &mut Core, cpu: &mut CpuState) -> Result<(), Fault> {
    let link: u16 = core.read_system(cpu, cpu.tr.base & 0xffff_ffff)?;
    let fault = Fault::ts(error_code(link));
    if is_null(link) || link & 4 != 0 {
        return Err(fault);
    }
    let entry = segment::read_entry(core, cpu, link, Vector::Ts)?;
    if !entry.is_system() || !matches!(entry.kind(), system::TSS_BUSY | system::TSS16_BUSY) {
        return Err(fault);
    }
    switch(core, cpu, link, entry, Cause::Iret, cpu.rip, None)
}

/// The registers as a task state segment holds them.
#[derive(Default)]
struct Image {
    cr3: u64,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    debug: bool,
}

fn at(cpu: &CpuState, base: u64, offset: u64) -> u64 {
    segment::wrap(cpu, base.wrapping_add(offset))
}

fn read_image(core: &mut Core, cpu: &CpuState, base: u64, wide: bool) -> Result<Image, Fault> {
    let mut image = Image::default();
    if wide {
        image.cr3 = core.read_system::<u32>(cpu, at(cpu, base, 0x1c))?.into();
        image.rip = core.read_system::<u32>(cpu, at(cpu, base, 0x20))?.into();
        image.flags = core.read_system::<u32>(cpu, at(cpu, base, 0x24))?.into();
        for (i, r) in image.gpr.iter_mut().enumerate() {
            *r = core.read_system::<u32>(cpu, at(cpu, base, 0x28 + 4 * i as u64))?.into();
        }
        for (i, s) in image.selectors.iter_mut().enumerate() {
            *s = core.read_system(cpu, at(cpu, base, 0x48 + 4 * i as u64))?;
        }
        image.ldt = core.read_system(cpu, at(cpu, base, 0x60))?;
        image.debug = core.read_system::<u16>(cpu, at(cpu, base, 0x64))? & 1 != 0;
    } else {
        image.rip = core.read_system::<u16>(cpu, at(cpu, base, 0x0e))?.into();
        image.flags = core.read_system::<u16>(cpu, at(cpu, base, 0x10))?.into();
        for (i, r) in image.gpr.iter_mut().enumerate() {
            // The upper halves are undefined; ones, as the first processors leave them.
            *r = 0xffff_0000 | u64::from(core.read_system::<u16>(cpu, at(cpu, base, 0x12 + 2 * i as u64))?);
        }
        for (i, s) in image.selectors.iter_mut().take(4).enumerate() {
            *s = core.read_system(cpu, at(cpu, base, 0x22 + 2 * i as u64))?;
        }
        image.ldt = core.read_system(cpu, at(cpu, base, 0x2a))?;
    }
    Ok(image)
}

fn save_image(core: &mut Core, cpu: &CpuState, wide: bool, next: u64, flags: u64) -> Result<(), Fault> {
    let base = cpu.tr.base;
    if wide {
        core.write_system(cpu, at(cpu, base, 0x20), next as u32)?;
        core.write_system(cpu, at(cpu, base, 0x24), flags as u32)?;
        for i in 0..8 {
            core.write_system(cpu, at(cpu, base, 0x28 + 4 * i as u64), cpu.gpr[i] as u32)?;
        }
        for i in 0..6 {
            core.write_system(cpu, at(cpu, base, 0x48 + 4 * i as u64), cpu.seg[i].selector)?;
        }
    } else {
        core.write_system(cpu, at(cpu, base, 0x0e), next as u16)?;
        core.write_system(cpu, at(cpu, base, 0x10), flags as u16)?;
        for i in 0..8 {
            core.write_system(cpu, at(cpu, base, 0x12 + 2 * i as u64), cpu.gpr[i] as u16)?;
        }
        for i in 0..4 {
            core.write_system(cpu, at(cpu, base, 0x22 + 2 * i as u64), cpu.seg[i].selector)?;
        }
    }
    Ok(())
}

fn set_busy(core: &mut Core, cpu: &CpuState, selector: u16, busy: bool) -> Result<(), Fault> {
    let at = at(cpu, cpu.gdtr.base, u64::from(selector & !7) + 5);
    let byte: u8 = core.read_system(cpu, at)?;
    core.write_system(cpu, at, if busy { byte | 2 } else { byte & !2 })
}

/// Switches to the task of `entry`. `next` is where the old task goes on; `code` is pushed on the new task's stack.
pub(crate) fn switch(
    core: &mut Core,
    cpu: &mut CpuState,
    selector: u16,
    entry: Entry,
    cause: Cause,
    next: u64,
    code: Option<u16>,
) -> Result<(), Fault> {
    core.sync_flags(cpu);
    core.resync = true;
    let fault = error_code(selector);
    let wide = entry.kind() & 8 != 0;
    if !entry.present() {
        return Err(Fault::np(fault));
    }
    if entry.limit() < if wide { 0x67 } else { 0x2b } {
        return Err(Fault::ts(fault));
    }
    let base = entry.base();
    let new = read_image(core, cpu, base, wide)?;
    // Both tables and both segments must be writable before anything changes.
    let old_wide = cpu.tr.attr.kind() & 8 != 0;
    let old_flags = if cause == Cause::Iret { cpu.rflags & !rflags::NT } else { cpu.rflags };
    save_image(core, cpu, old_wide, next, old_flags)?;
    if matches!(cause, Cause::Jump | Cause::Iret) {
        set_busy(core, cpu, cpu.tr.selector, false)?;
    }
    if matches!(cause, Cause::Call | Cause::Interrupt) {
        core.write_system(cpu, at(cpu, base, 0), cpu.tr.selector)?;
    }
    if cause != Cause::Iret {
        set_busy(core, cpu, selector, true)?;
    }
    // From here on faults belong to the new task.
    let busy = Entry { raw: entry.raw | BUSY, ..entry };
    cpu.tr = busy.segment(selector);
    cpu.cr0 |= cr0::TS;
    let nested = matches!(cause, Cause::Call | Cause::Interrupt);
    let flag_mask = if wide { 0x003f_7fd5 } else { 0x7fd5 };
    cpu.rflags = new.flags & flag_mask | rflags::FIXED;
    if nested {
        cpu.rflags |= rflags::NT;
    }
    cpu.gpr[..8].copy_from_slice(&new.gpr);
    cpu.rip = new.rip;
    cpu.dr7 &= !0x155;
    if wide && cpu.cr0 & cr0::PG != 0 && cpu.cr3 != new.cr3 {
        if cpu.cr4 & cr4::PAE != 0 {
            segment::load_pdptes(core, cpu, new.cr3)?;
        }
        cpu.cr3 = new.cr3;
        core.flush_tlb(true);
    }
    for (s, &v) in new.selectors.iter().enumerate() {
        cpu.seg[s] = Segment { selector: v, ..segment::null(v) };
    }
    cpu.ldtr = Segment { selector: new.ldt, ..segment::null(new.ldt) };
    load_segments(core, cpu, &new)?;
    if let Some(code) = code {
        core.update_mode(cpu);
        let mut stack = crate::ops::data::Stack::of(cpu, false);
        stack.push_sized(core, cpu, if wide { 4 } else { 2 }, code.into())?;
        stack.commit(cpu);
    }
    if cpu.rip > cpu.seg[seg::CS].limit.into() {
        return Err(Fault::GP0);
    }
    if new.debug {
        core.breakpoints |= debug::BT;
    }
    core.resync = true;
    core.stop = true;
    Ok(())
}

fn load_segments(core: &mut Core, cpu: &mut CpuState, new: &Image) -> Result<(), Fault> {
    // Until SS is loaded, privilege is that of the new CS.
    let v86 = cpu.rflags & rflags::VM != 0;
    if !is_null(new.ldt) {
        let fault = Fault::ts(error_code(new.ldt));
        if new.ldt & 4 != 0 {
            return Err(fault);
        }
        let entry = segment::read_entry(core, cpu, new.ldt, Vector::Ts)?;
        if !entry.is_system() || entry.kind() != system::LDT || !entry.present() {
            return Err(fault);
        }
        cpu.ldtr = entry.segment(new.ldt);
    }
    if v86 {
        for (s, &v) in new.selectors.iter().enumerate() {
            segment::load_real(cpu, s, v);
        }
        return Ok(());
    }
    let cs = new.selectors[seg::CS];
    let cpl = (cs & 3) as u8;
    cpu.seg[seg::SS].attr = Descriptor::new().with_unusable(true).with_dpl(cpl);
    if is_null(cs) {
        return Err(Fault::ts(0));
    }
    let mut code = segment::read_entry(core, cpu, cs, Vector::Ts)?;
    let level = if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
    if !code.is_code() || !level {
        return Err(Fault::ts(error_code(cs)));
    }
    if !code.present() {
        return Err(Fault::np(error_code(cs)));
    }
    segment::mark_accessed(core, cpu, &mut code)?;
    cpu.seg[seg::CS] = code.segment(cs);
    let stack = segment::check_stack(core, cpu, new.selectors[seg::SS], cpl, Vector::Ts)?;
    cpu.seg[seg::SS] = stack;
    for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
        segment::load(core, cpu, s, new.selectors[s]).map_err(|f| match f.vector {
            Vector::Gp => Fault::ts(f.code),
            _ => f,
        })?;
    }
    debug_assert_eq!(cpu.gpr[gpr::RSP] >> 32, 0);
    Ok(())
}
