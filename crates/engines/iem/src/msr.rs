//! Model-specific registers (Intel SDM volume 4).

use cpum::CpuState;
use cpum::cpuid::bit;
use cpum::state::{cr0, efer, seg};

use crate::core::{Core, canonical};
use crate::{Fault, capabilities};

/// Numbers of the registers served here.
mod number {
    pub(super) const P5_MC_ADDR: u32 = 0x0;
    pub(super) const P5_MC_TYPE: u32 = 0x1;
    pub(super) const TSC: u32 = 0x10;
    pub(super) const PLATFORM_ID: u32 = 0x17;
    pub(super) const APIC_BASE: u32 = 0x1b;
    pub(super) const FEATURE_CONTROL: u32 = 0x3a;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const BIOS_UPDT_TRIG: u32 = 0x79;
    pub(super) const BIOS_SIGN_ID: u32 = 0x8b;
    pub(super) const MTRRCAP: u32 = 0xfe;
    pub(super) const ARCH_CAPABILITIES: u32 = 0x10a;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MCG_CAP: u32 = 0x179;
    pub(super) const MCG_STATUS: u32 = 0x17a;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const DEBUGCTL: u32 = 0x1d9;
    pub(super) const MTRR_PHYS_BASE0: u32 = 0x200;
    pub(super) const MTRR_FIX64K: u32 = 0x250;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const TSC_DEADLINE: u32 = 0x6e0;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    pub(super) const AMD_SYSCFG: u32 = 0xc001_0010;
    pub(super) const AMD_HWCR: u32 = 0xc001_0015;
    pub(super) const AMD_INT_PENDING: u32 = 0xc001_0055;
    pub(super) const AMD_NB_CFG: u32 = 0xc001_001f;
    pub(super) const AMD_LS_CFG: u32 = 0xc001_1020;
    pub(super) const AMD_DE_CFG: u32 = 0xc001_1029;
}
use number::*;

/// MTRRCAP: eight variable ranges, fixed ranges, write-combining.
const MTRR_CAPABILITIES: u64 = 8 | 1 << 8 | 1 << 10;
/// HWCR: the TSC runs at the P0 frequency.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// DE_CFG: LFENCE serialises.
const DE_CFG_LFENCE: u64 = 1 << 1;

/// Index of a fixed-range MTRR in the CPU state's array.
fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        MTRR_FIX64K => Some(0),
        0x258 | 0x259 => Some(1 + (msr - 0x258) as usize),
        0x268..=0x26f => Some(3 + (msr - 0x268) as usize),
        _ => None,
    }
}

/// The vCPU's time-stamp counter.
pub(crate) fn tsc(core: &Core, cpu: &CpuState) -> u64 {
    core.ctx.tsc().wrapping_add(cpu.msr.tsc_offset)
}

/// The armed deadline in the vCPU's own counter, 0 for none. The interrupt controller keeps it in the VM-wide one.
fn deadline(core: &Core, cpu: &CpuState) -> Option<u64> {
    let armed = core.ctx.irq.read_msr(core.id, TSC_DEADLINE)?;
    Some(if armed == 0 { 0 } else { armed.wrapping_add(cpu.msr.tsc_offset) })
}

/// Arms the deadline, given in the vCPU's own counter; 0 disarms.
fn set_deadline(core: &Core, cpu: &CpuState, own: u64) -> bool {
    // Only an exact 0 disarms: a deadline that falls on the VM-wide zero has passed long ago.
    let shared = if own == 0 { 0 } else { own.wrapping_sub(cpu.msr.tsc_offset).max(1) };
    core.ctx.irq.write_msr(core.id, TSC_DEADLINE, shared)
}

/// Gives the vCPU's counter another distance from the VM-wide one. An armed deadline stays at its counter value.
fn move_tsc(core: &Core, cpu: &mut CpuState, offset: u64) {
    let armed = deadline(core, cpu).filter(|&own| own != 0);
    cpu.msr.tsc_offset = offset;
    if let Some(own) = armed {
        set_deadline(core, cpu, own);
    }
    if let Some(gim) = &core.ctx.gim {
        gim.tsc_moved(cpu);
    }
}

pub(crate) fn read(core: &mut Core, cpu: &CpuState, msr: u32) -> Result<u64, Fault> {
    let amd = is_amd(core);
    let m = &cpu.msr;
    Ok(match msr {
        TSC => tsc(core, cpu),
        APIC_BASE => m.apic_base,
        TSC_ADJUST if core.ctx.cpuid.has(bit::TSC_ADJUST) => m.tsc_adjust,
        BIOS_SIGN_ID => microcode(core),
        P5_MC_ADDR | P5_MC_TYPE | PLATFORM_ID | MCG_CAP | MCG_STATUS | DEBUGCTL => 0,
        // Locked, with nothing enabled.
        FEATURE_CONTROL if !amd => 1,
        ARCH_CAPABILITIES if core.ctx.cpuid.has(bit::ARCH_CAPABILITIES) => capabilities::get(),
        MTRRCAP => MTRR_CAPABILITIES,
        SYSENTER_CS => m.sysenter_cs,
        SYSENTER_ESP => m.sysenter_esp,
        SYSENTER_EIP => m.sysenter_eip,
        MISC_ENABLE => m.misc_enable,
        MTRR_PHYS_BASE0..=0x20f => m.mtrr_variable[(msr - MTRR_PHYS_BASE0) as usize],
        PAT => m.pat,
        MTRR_DEF_TYPE => m.mtrr_def_type,
        TSC_DEADLINE => deadline(core, cpu).ok_or(Fault::GP0)?,
        0x800..=0x8ff => core.ctx.irq.read_msr(core.id, msr).ok_or(Fault::GP0)?,
        EFER => m.efer,
        STAR => m.star,
        LSTAR => m.lstar,
        CSTAR => m.cstar,
        SFMASK => m.sfmask,
        FS_BASE => cpu.seg[seg::FS].base,
        GS_BASE => cpu.seg[seg::GS].base,
        KERNEL_GS_BASE => m.kernel_gs_base,
        TSC_AUX => m.tsc_aux,
        AMD_SYSCFG | AMD_NB_CFG | AMD_INT_PENDING | AMD_LS_CFG if amd => 0,
        AMD_HWCR if amd => HWCR_TSC_FREQ_SEL,
        AMD_DE_CFG if amd => DE_CFG_LFENCE,
        _ => match fixed_mtrr(msr) {
            Some(n) => m.mtrr_fixed[n],
            None => match core.ctx.gim.as_ref().and_then(|gim| gim.read_msr(core.id, msr)) {
                Some(v) => v,
                None => {
                    tracing::debug!(target: "iem", "RDMSR {msr:#x} is unknown");
                    return Err(Fault::GP0);
                }
            },
        },
    })
}

pub(crate) fn write(core: &mut Core, cpu: &mut CpuState, msr: u32, v: u64) -> Result<(), Fault> {
    let amd = is_amd(core);
    match msr {
        TSC => {
            let offset = v.wrapping_sub(core.ctx.tsc());
            cpu.msr.tsc_adjust = cpu.msr.tsc_adjust.wrapping_add(offset.wrapping_sub(cpu.msr.tsc_offset));
            move_tsc(core, cpu, offset);
        }
        TSC_ADJUST if core.ctx.cpuid.has(bit::TSC_ADJUST) => {
            let offset = cpu.msr.tsc_offset.wrapping_add(v.wrapping_sub(cpu.msr.tsc_adjust));
            cpu.msr.tsc_adjust = v;
            move_tsc(core, cpu, offset);
        }
        APIC_BASE => {
            if !core.ctx.irq.set_apic_base(core.id, v) {
                return Err(Fault::GP0);
            }
            cpu.msr.apic_base = v;
        }
        // Microcode cannot be loaded; software takes the unchanged revision for an answer.
        BIOS_UPDT_TRIG | BIOS_SIGN_ID | P5_MC_ADDR | P5_MC_TYPE | MCG_STATUS | DEBUGCTL => {}
        SYSENTER_CS => cpu.msr.sysenter_cs = v & 0xffff,
        SYSENTER_ESP => cpu.msr.sysenter_esp = canonical_or_fault(v)?,
        SYSENTER_EIP => cpu.msr.sysenter_eip = canonical_or_fault(v)?,
        MISC_ENABLE => cpu.msr.misc_enable = v,
        MTRR_PHYS_BASE0..=0x20f => cpu.msr.mtrr_variable[(msr - MTRR_PHYS_BASE0) as usize] = v,
        PAT => {
            // Types 2, 3 and above 7 are reserved.
            if v.to_le_bytes().iter().any(|&t| t > 7 || t == 2 || t == 3) {
                return Err(Fault::GP0);
            }
            cpu.msr.pat = v;
        }
        MTRR_DEF_TYPE => {
            if v & !0xcff != 0 {
                return Err(Fault::GP0);
            }
            cpu.msr.mtrr_def_type = v;
        }
        TSC_DEADLINE => {
            if !set_deadline(core, cpu, v) {
                return Err(Fault::GP0);
            }
        }
        0x800..=0x8ff => {
            if !core.ctx.irq.write_msr(core.id, msr, v) {
                return Err(Fault::GP0);
            }
        }
        EFER => write_efer(core, cpu, v)?,
        STAR => cpu.msr.star = v,
        LSTAR => cpu.msr.lstar = canonical_or_fault(v)?,
        CSTAR => cpu.msr.cstar = canonical_or_fault(v)?,
        SFMASK => cpu.msr.sfmask = v & 0xffff_ffff,
        FS_BASE => cpu.seg[seg::FS].base = canonical_or_fault(v)?,
        GS_BASE => cpu.seg[seg::GS].base = canonical_or_fault(v)?,
        KERNEL_GS_BASE => cpu.msr.kernel_gs_base = canonical_or_fault(v)?,
        TSC_AUX => cpu.msr.tsc_aux = v & 0xffff_ffff,
        AMD_SYSCFG | AMD_NB_CFG | AMD_INT_PENDING | AMD_LS_CFG | AMD_HWCR | AMD_DE_CFG if amd => {}
        _ => match fixed_mtrr(msr) {
            Some(n) => cpu.msr.mtrr_fixed[n] = v,
            None => {
                if !core.ctx.gim.as_ref().is_some_and(|gim| gim.write_msr(cpu, msr, v)) {
                    tracing::debug!(target: "iem", "WRMSR {msr:#x} with {v:#x} is unknown");
                    return Err(Fault::GP0);
                }
            }
        },
    }
    core.stop = true;
    core.resync = true;
    Ok(())
}

fn canonical_or_fault(v: u64) -> Result<u64, Fault> {
    if canonical(v) { Ok(v) } else { Err(Fault::GP0) }
}

fn write_efer(core: &mut Core, cpu: &mut CpuState, v: u64) -> Result<(), Fault> {
    let mut allowed = efer::LMA;
    for (feature, mask) in [(bit::SYSCALL, efer::SCE), (bit::LM, efer::LME), (bit::NX, efer::NXE)] {
        if core.ctx.cpuid.has(feature) {
            allowed |= mask;
        }
    }
    let changed = v ^ cpu.msr.efer;
    if v & !allowed != 0 || changed & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return Err(Fault::GP0);
    }
    cpu.msr.efer = v & !efer::LMA | cpu.msr.efer & efer::LMA;
    if changed & efer::NXE != 0 {
        core.flush_tlb(false);
    }
    Ok(())
}

fn is_amd(core: &Core) -> bool {
    // "cAMD" ends the vendor string.
    core.ctx.cpuid.raw(0, 0).ecx == u32::from_le_bytes(*b"cAMD")
}

/// The microcode revision: AMD reports it in the low half, Intel in the high one. High enough for what guests compare it with.
fn microcode(core: &Core) -> u64 {
    if is_amd(core) { 0x0a20_1000 } else { 0xffff_ffff << 32 }
}
