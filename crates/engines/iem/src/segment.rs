//! Descriptors and segment registers (Intel SDM volume 3, chapters 3.4 and 5).

use cpum::state::{cr0, efer, rflags, seg};
use cpum::{CpuState, Descriptor, Segment};

use crate::core::Core;
use crate::{Fault, Vector};

/// A descriptor of the GDT or LDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) raw: u64,
    /// Linear address it was read from.
    pub(crate) at: u64,
}

/// System descriptor types.
pub(crate) mod system {
    pub(crate) const TSS16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT16: u8 = 6;
    pub(crate) const TRAP16: u8 = 7;
    pub(crate) const TSS: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL: u8 = 12;
    pub(crate) const INTERRUPT: u8 = 14;
    pub(crate) const TRAP: u8 = 15;
}

impl Entry {
    pub(crate) fn attr(self) -> Descriptor {
        Descriptor::from_bits((self.raw >> 40) as u32 & 0xffff)
    }

    pub(crate) fn kind(self) -> u8 {
        self.attr().kind()
    }

    pub(crate) fn is_code(self) -> bool {
        self.attr().code_or_data() && self.kind() & 8 != 0
    }

    pub(crate) fn is_conforming(self) -> bool {
        self.kind() & 4 != 0
    }

    pub(crate) fn is_writable_data(self) -> bool {
        self.attr().code_or_data() && self.kind() & 0xa == 2
    }

    pub(crate) fn present(self) -> bool {
        self.attr().present()
    }

    pub(crate) fn dpl(self) -> u8 {
        self.attr().dpl()
    }

    pub(crate) fn is_system(self) -> bool {
        !self.attr().code_or_data()
    }

    pub(crate) fn base(self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }

    pub(crate) fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attr().granular() { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register that results from loading it.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector }
    }

    // Gates.
    pub(crate) fn gate_selector(self) -> u16 {
        (self.raw >> 16) as u16
    }

    pub(crate) fn gate_offset(self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000
    }

    pub(crate) fn gate_count(self) -> u8 {
        (self.raw >> 32) as u8 & 31
    }
}

/// A null selector names no segment.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// The error code for a selector.
pub(crate) fn error_code(selector: u16) -> u16 {
    selector & !3
}

/// Reads the descriptor that `selector` names; beyond its table is a fault with `vector`.
pub(crate) fn read_entry(
    core: &mut Core,
    cpu: &CpuState,
    selector: u16,
    vector: Vector,
) -> Result<Entry, Fault> {
    let fault = Fault::new(vector, error_code(selector));
    let offset = u64::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        if cpu.ldtr.attr.unusable() || is_null(cpu.ldtr.selector) {
            return Err(fault);
        }
        (cpu.ldtr.base, u64::from(cpu.ldtr.limit))
    } else {
        (cpu.gdtr.base, u64::from(cpu.gdtr.limit))
    };
    if offset + 7 > limit {
        return Err(fault);
    }
    let at = wrap(cpu, base.wrapping_add(offset));
    Ok(Entry { raw: core.read_system(cpu, at)?, at })
}

/// Reads the upper half of a 16-byte system descriptor in long mode.
pub(crate) fn read_upper(core: &mut Core, cpu: &CpuState, entry: Entry) -> Result<u64, Fault> {
    core.read_system(cpu, entry.at.wrapping_add(8))
}

/// Cuts a linear address to 32 bits outside long mode.
pub(crate) fn wrap(cpu: &CpuState, linear: u64) -> u64 {
    if cpu.msr.efer & efer::LMA != 0 { linear } else { linear & 0xffff_ffff }
}

/// Sets the accessed bit of a code or data descriptor in its table.
pub(crate) fn mark_accessed(core: &mut Core, cpu: &CpuState, entry: &mut Entry) -> Result<(), Fault> {
    if entry.kind() & 1 == 0 {
        entry.raw |= 1 << 40;
        let at = entry.at.wrapping_add(5);
        let byte: u8 = core.read_system(cpu, at)?;
        core.write_system(cpu, at, byte | 1)?;
    }
    Ok(())
}

/// The linear address of `offset` in `segment`, checked for a stack access of `size` bytes.
pub(crate) fn stack_linear(segment: &Segment, offset: u64, size: u64, fault: Fault) -> Result<u64, Fault> {
    let last = offset + (size - 1);
    let limit = u64::from(segment.limit);
    let inside = if segment.attr.kind() & 0xc == 4 {
        let top = if segment.attr.big() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    };
    if inside { Ok(segment.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(fault) }
}

/// What a segment register holds after a null selector was loaded.
pub(crate) fn null(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, attr: Descriptor::new().with_unusable(true), selector }
}

/// A null SS of 64-bit code at privilege `cpl`.
pub(crate) fn null_stack(selector: u16, cpl: u8) -> Segment {
    let mut s = null(selector);
    s.attr = s.attr.with_dpl(cpl);
    s
}

/// Loads a segment register in real or virtual-8086 mode.
pub(crate) fn load_real(cpu: &mut CpuState, s: usize, selector: u16) {
    let v86 = cpu.rflags & rflags::VM != 0;
    let r = &mut cpu.seg[s];
    r.selector = selector;
    r.base = u64::from(selector) << 4;
    // Real mode keeps limit and size, which is what "unreal mode" lives on.
    let attr = r.attr.with_kind(3).with_code_or_data(true).with_present(true).with_unusable(false);
    if v86 {
        r.limit = 0xffff;
        r.attr = attr.with_dpl(3).with_big(false).with_long(false).with_granular(false);
    } else {
        r.attr = attr.with_dpl(0);
    }
}

/// Loads ES, SS, DS, FS or GS as MOV and POP do.
pub(crate) fn load(core: &mut Core, cpu: &mut CpuState, s: usize, selector: u16) -> Result<(), Fault> {
    if !cpu.is_protected() {
        load_real(cpu, s, selector);
        return Ok(());
    }
    let cpl = cpu.cpl();
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        if s == seg::SS {
            if !cpu.is_64bit() || cpl == 3 || rpl != cpl {
                return Err(Fault::GP0);
            }
            cpu.seg[s] = null_stack(selector, cpl);
        } else {
            cpu.seg[s] = null(selector);
        }
        return Ok(());
    }
    let code = error_code(selector);
    let mut entry = read_entry(core, cpu, selector, Vector::Gp)?;
    if s == seg::SS {
        if rpl != cpl || entry.dpl() != cpl || !entry.is_writable_data() {
            return Err(Fault::gp(code));
        }
        if !entry.present() {
            return Err(Fault::ss(code));
        }
    } else {
        // Data or readable code.
        if entry.is_system() || entry.kind() & 0xa == 8 {
            return Err(Fault::gp(code));
        }
        let conforming = entry.is_code() && entry.is_conforming();
        if !conforming && entry.dpl() < cpl.max(rpl) {
            return Err(Fault::gp(code));
        }
        if !entry.present() {
            return Err(Fault::np(code));
        }
    }
    mark_accessed(core, cpu, &mut entry)?;
    cpu.seg[s] = entry.segment(selector);
    Ok(())
}

/// Checks the stack segment of another privilege level `cpl` and gives it with its table entry marked. `vector` is #TS for
/// stacks from a task state segment, #GP for those that returns pop.
pub(crate) fn check_stack(
    core: &mut Core,
    cpu: &CpuState,
    selector: u16,
    cpl: u8,
    vector: Vector,
) -> Result<Segment, Fault> {
    let fault = Fault::new(vector, error_code(selector));
    if is_null(selector) {
        return Err(Fault::new(vector, 0));
    }
    let mut entry = read_entry(core, cpu, selector, vector)?;
    if (selector & 3) as u8 != cpl || entry.dpl() != cpl || !entry.is_writable_data() {
        return Err(fault);
    }
    if !entry.present() {
        return Err(Fault::ss(error_code(selector)));
    }
    mark_accessed(core, cpu, &mut entry)?;
    Ok(entry.segment(selector))
}

/// After a return to an outer level, data segments that the outer level must not use become null.
pub(crate) fn drop_inner_segments(cpu: &mut CpuState, cpl: u8) {
    for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let r = &cpu.seg[s];
        let conforming = r.attr.kind() & 0xc == 0xc;
        if !r.attr.unusable() && r.attr.code_or_data() && !conforming && r.attr.dpl() < cpl {
            cpu.seg[s] = null(0);
        }
    }
}

/// The inner stack of the current task for privilege `cpl` in 16- and 32-bit task state segments: SS and (E)SP.
pub(crate) fn task_stack(core: &mut Core, cpu: &CpuState, cpl: u8) -> Result<(u16, u64), Fault> {
    let fault = Fault::ts(error_code(cpu.tr.selector));
    let wide = cpu.tr.attr.kind() & 8 != 0;
    let offset = if wide { 4 + 8 * u64::from(cpl) } else { 2 + 4 * u64::from(cpl) };
    let end = offset + if wide { 5 } else { 3 };
    if end > cpu.tr.limit.into() {
        return Err(fault);
    }
    let at = cpu.tr.base.wrapping_add(offset);
    if wide {
        let sp: u32 = core.read_system(cpu, wrap(cpu, at))?;
        Ok((core.read_system(cpu, wrap(cpu, at.wrapping_add(4)))?, sp.into()))
    } else {
        let sp: u16 = core.read_system(cpu, wrap(cpu, at))?;
        Ok((core.read_system(cpu, wrap(cpu, at.wrapping_add(2)))?, sp.into()))
    }
}

/// A stack pointer from the 64-bit task state segment: of privilege `cpl` (0 to 2), or of interrupt stack `ist` (1 to 7).
pub(crate) fn task_stack_64(core: &mut Core, cpu: &CpuState, cpl: u8, ist: u8) -> Result<u64, Fault> {
    let offset = if ist == 0 { 4 + 8 * u64::from(cpl) } else { 0x24 + 8 * u64::from(ist - 1) };
    if offset + 7 > cpu.tr.limit.into() {
        return Err(Fault::ts(error_code(cpu.tr.selector)));
    }
    core.read_system(cpu, cpu.tr.base.wrapping_add(offset))
}

/// Loads the PAE page-directory pointers that CR3 names; a reserved bit is #GP(0).
pub(crate) fn load_pdptes(core: &mut Core, cpu: &mut CpuState, cr3: u64) -> Result<(), Fault> {
    let mut bytes = [0; 32];
    core.phys_read(cr3 & 0xffff_ffe0, &mut bytes);
    let mut entries = [0; 4];
    for (e, b) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
        *e = b.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        // Bits 1, 2 and 5 to 8 and those above the address width are reserved in present entries.
        if *e & 1 != 0 && *e & (0x1e6 | !0 << core.limits.phys_bits) != 0 {
            return Err(Fault::GP0);
        }
    }
    cpu.pdpte = entries;
    Ok(())
}

/// PAE paging outside long mode, whose pointers are registers.
pub(crate) fn uses_pdptes(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cpum::state::cr4::PAE != 0 && efer & efer::LMA == 0
}
