//! The x87 status: pending exceptions, tags, pointers, and the switch to MMX.

use cpum::CpuState;
use cpum::state::{XsaveArea, rflags};

use super::stub::Stub;
use super::{area, set_u16, set_u64, u16_at};
use crate::Fault;

/// Exception flags of the status word, and as masks those of the control word.
const EXCEPTIONS: u16 = 0x3f;
/// Status word: error summary and busy.
const SUMMARY: u16 = 0x8080;
/// Status word: condition codes and stack fault stay, TOP is bits 11 to 13.
const TOP_SHIFT: u16 = 11;
const TOP: u16 = 7 << TOP_SHIFT;

/// #MF if an unmasked x87 exception is pending.
pub(super) fn pending(area: &XsaveArea) -> Result<(), Fault> {
    if u16_at(area, area::FSW) & !u16_at(area, area::FCW) & EXCEPTIONS != 0 { Err(Fault::MF) } else { Ok(()) }
}

/// Makes the error summary agree with flags and masks.
pub(super) fn update_summary(area: &mut XsaveArea) {
    let status = u16_at(area, area::FSW);
    let summary = if status & !u16_at(area, area::FCW) & EXCEPTIONS != 0 { SUMMARY } else { 0 };
    set_u16(area, area::FSW, (status & !SUMMARY) | summary);
}

/// FNINIT. Register contents stay.
pub(super) fn init(area: &mut XsaveArea) {
    set_top(area, 0);
    set_u16(area, area::FCW, 0x37f);
    set_u16(area, area::FSW, 0);
    set_u16(area, area::FTW, 0);
    set_u16(area, area::FOP, 0);
    set_u64(area, area::FIP, 0);
    set_u64(area, area::FDP, 0);
}

/// FNCLEX.
pub(super) fn clear_exceptions(area: &mut XsaveArea) {
    let status = u16_at(area, area::FSW);
    // Flags, stack fault, summary and busy (SDM volume 2, FCLEX).
    set_u16(area, area::FSW, status & 0x7f00);
}

/// FLDCW: bits 6 reads as one, 7 and 13–15 as zero.
pub(super) fn set_control(area: &mut XsaveArea, control: u16) {
    set_u16(area, area::FCW, (control & 0x1f7f) | 0x40);
    update_summary(area);
}

pub(super) fn top(area: &XsaveArea) -> usize {
    usize::from((u16_at(area, area::FSW) & TOP) >> TOP_SHIFT)
}

/// Changes TOP and nothing else: the image's slots follow the physical registers.
fn set_top(area: &mut XsaveArea, new: usize) {
    let old = top(area);
    if new != old {
        // Slot i held physical register (old + i) mod 8.
        area.0[area::ST..area::XMM].rotate_left(16 * ((new + 8 - old) % 8));
        let status = u16_at(area, area::FSW) & !TOP;
        set_u16(area, area::FSW, status | (new as u16) << TOP_SHIFT);
    }
}

/// Puts ST(0) at physical register 0 without moving register contents, as every MMX instruction does, and marks all
/// registers as used.
pub(super) fn enter_mmx(cpu: &mut CpuState) {
    let area = &mut cpu.xsave;
    set_top(area, 0);
    set_u16(area, area::FTW, 0xff);
}

/// Records instruction and operand address of a non-control instruction.
pub(super) fn note_pointers(cpu: &mut CpuState, stub: &Stub, offset: u64) {
    let flat = cpu.is_protected();
    let long = cpu.is_64bit();
    let pointer = |segment: usize, offset: u64| {
        if long {
            offset
        } else if flat {
            offset & 0xffff_ffff
        } else {
            cpu.seg[segment].base.wrapping_add(offset) & 0xffff_ffff
        }
    };
    let fip = pointer(cpum::state::seg::CS, cpu.rip);
    let fdp = stub.segment.map(|segment| pointer(usize::from(segment).min(5), offset));
    let area = &mut cpu.xsave;
    set_u16(area, area::FOP, stub.fop);
    set_u64(area, area::FIP, fip);
    if let Some(fdp) = fdp {
        set_u64(area, area::FDP, fdp);
    }
}

/// The layout of FSTENV and FSAVE images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// 32-bit fields.
    pub(super) wide: bool,
    /// Real and virtual-8086 mode: linear addresses and the opcode.
    pub(super) real: bool,
}

impl Format {
    pub(super) fn new(cpu: &CpuState, wide: bool) -> Self {
        Self { wide, real: cpu.cr0 & cpum::state::cr0::PE == 0 || cpu.rflags & rflags::VM != 0 }
    }

    /// Bytes of the environment.
    pub(super) fn len(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

/// Writes the environment (SDM volume 1, figures 8-9 to 8-12). `out` has at least `format.len()` bytes.
pub(super) fn store_environment(area: &XsaveArea, format: Format, out: &mut [u8]) {
    let fip = super::u64_at(area, area::FIP) as u32;
    let fdp = super::u64_at(area, area::FDP) as u32;
    let fop = u32::from(u16_at(area, area::FOP) & 0x7ff);
    let (control, status, tags) = (u16_at(area, area::FCW), u16_at(area, area::FSW), full_tags(area));
    if format.wide {
        let pad = |value: u16| 0xffff_0000 | u32::from(value);
        let fields = if format.real {
            [
                pad(control),
                pad(status),
                pad(tags),
                pad(fip as u16),
                (fip >> 16) << 12 | fop,
                pad(fdp as u16),
                (fdp >> 16) << 12,
            ]
        } else {
            [pad(control), pad(status), pad(tags), fip, fop << 16, fdp, 0xffff_0000]
        };
        for (bytes, field) in out.chunks_exact_mut(4).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
    } else {
        let fields = if format.real {
            [
                control,
                status,
                tags,
                fip as u16,
                ((fip >> 16 & 0xf) << 12 | fop) as u16,
                fdp as u16,
                ((fdp >> 16 & 0xf) << 12) as u16,
            ]
        } else {
            [control, status, tags, fip as u16, 0, fdp as u16, 0]
        };
        for (bytes, field) in out.chunks_exact_mut(2).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
    }
}

/// Reads an environment back; the counterpart of [`store_environment`].
pub(super) fn load_environment(area: &mut XsaveArea, format: Format, image: &[u8]) {
    let field = |i: usize| -> u32 {
        if format.wide {
            u32::from_le_bytes([image[4 * i], image[4 * i + 1], image[4 * i + 2], image[4 * i + 3]])
        } else {
            u32::from(u16::from_le_bytes([image[2 * i], image[2 * i + 1]]))
        }
    };
    let (control, status, tags) = (field(0) as u16, field(1) as u16, field(2) as u16);
    let (fip, fop, fdp) = match (format.wide, format.real) {
        (_, true) => (
            (field(3) & 0xffff) | (field(4) >> 12 << 16),
            field(4) & 0x7ff,
            (field(5) & 0xffff) | (field(6) >> 12 << 16),
        ),
        (true, false) => (field(3), field(4) >> 16 & 0x7ff, field(5)),
        (false, false) => (field(3), 0, field(5)),
    };
    set_top(area, usize::from((status & TOP) >> TOP_SHIFT));
    set_u16(area, area::FSW, status);
    set_u16(area, area::FOP, fop as u16);
    set_u64(area, area::FIP, u64::from(fip));
    set_u64(area, area::FDP, u64::from(fdp));
    let used = (0..8).filter(|i| tags >> (2 * i) & 3 != 3).fold(0, |used, i| used | 1 << i);
    set_u16(area, area::FTW, used);
    set_control(area, control);
}

/// The 16-bit tag word, from the register contents (SDM volume 1, 8.1.7 and table 10-3).
fn full_tags(area: &XsaveArea) -> u16 {
    let used = u16_at(area, area::FTW);
    let top = top(area);
    (0..8).fold(0, |tags, physical: usize| {
        let tag = if used & (1 << physical) == 0 {
            3
        } else {
            let slot = area::ST + 16 * ((physical + 8 - top) % 8);
            let mantissa = super::u64_at(area, slot);
            let exponent = u16_at(area, slot + 8) & 0x7fff;
            match (exponent, mantissa) {
                (0, 0) => 1,
                (0 | 0x7fff, _) => 2,
                (_, mantissa) if mantissa >> 63 == 0 => 2,
                _ => 0,
            }
        };
        tags | tag << (2 * physical)
    })
}

/// Writes ST(0) to ST(7), ten bytes each.
pub(super) fn store_registers(area: &XsaveArea, out: &mut [u8]) {
    for (i, bytes) in out.chunks_exact_mut(10).take(8).enumerate() {
        bytes.copy_from_slice(&area.0[area::ST + 16 * i..area::ST + 16 * i + 10]);
    }
}

/// Reads ST(0) to ST(7).
pub(super) fn load_registers(area: &mut XsaveArea, image: &[u8]) {
    for (i, bytes) in image.chunks_exact(10).take(8).enumerate() {
        let slot = area::ST + 16 * i;
        area.0[slot..slot + 10].copy_from_slice(bytes);
        area.0[slot + 10..slot + 16].fill(0);
    }
}
