//! The model-specific registers that KVM leaves to us: those of our APICs, of time, and of the paravirtualization provider.

use cpum::CpuState;
use em::VmContext;
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vbox_types::VcpuId;

use crate::probe::Apics;

pub(crate) const TSC: u32 = 0x10;
const WALL_CLOCK_OLD: u32 = 0x11;
pub(crate) const APIC_BASE: u32 = 0x1b;
pub(crate) const TSC_ADJUST: u32 = 0x3b;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
const HYPERV: u32 = 0x4000_0000;
const KVM: u32 = 0x4b56_4d00;

/// The last of [`KVM`]'s registers that is ours where KVM has the local APICs: wall clock, clock, asynchronous page faults.
const KVM_OURS: u32 = 3;
/// From here on to the end of the range they are ours again; steal time and the end of interrupts are KVM's.
pub(crate) const STEAL_TIME: u32 = KVM + 3;
pub(crate) const END_OF_INTERRUPT: u32 = KVM + 4;
const KVM_REST: u32 = KVM + 5;

/// Has KVM exit for these registers instead of answering itself. Without an APIC in the kernel it never answers for the APIC's own
/// (0x800–0x8ff): their accesses fail there, and failures come here too.
pub(crate) fn install_filter(vm: &VmFd, apics: Apics) -> Result<(), kvm_ioctls::Error> {
    // A clear bit denies the access, which is what exits.
    const NONE: &[u8] = &[0; 64];
    let both = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    let range = |flags, base, msr_count| MsrFilterRange { flags, base, msr_count, bitmap: NONE };
    let mut ranges = vec![
        // The counter itself is read at full speed.
        range(MsrFilterRangeFlags::WRITE, TSC, 1),
        range(both, WALL_CLOCK_OLD, 2),
        range(both, TSC_ADJUST, 1),
        range(both, MCG_CAP, 2),
        range(both, HYPERV, 0x200),
    ];
    match apics {
        Apics::Ours => {
            ranges.extend([range(both, APIC_BASE, 1), range(both, TSC_DEADLINE, 1), range(both, KVM, 0x100)])
        }
        Apics::Kernel => ranges.extend([range(both, KVM, KVM_OURS), range(both, KVM_REST, 0xf8)]),
    }
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
}

/// RDMSR; `None` faults.
pub(crate) fn read(ctx: &VmContext, cpu: &CpuState, msr: u32) -> Option<u64> {
    let id = VcpuId(cpu.id);
    match msr {
        APIC_BASE => Some(cpu.msr.apic_base),
        TSC_ADJUST => Some(cpu.msr.tsc_adjust),
        // No banks, so that there is nothing to report.
        MCG_CAP | MCG_STATUS => Some(0),
        TSC_DEADLINE => {
            let armed = ctx.irq.read_msr(id, TSC_DEADLINE)?;
            Some(if armed == 0 { 0 } else { armed.wrapping_add(cpu.msr.tsc_offset) })
        }
        0x800..=0x8ff => ctx.irq.read_msr(id, msr),
        _ => ctx.gim.as_ref().and_then(|gim| gim.read_msr(id, msr)).or_else(|| {
            tracing::debug!(target: "nem", "RDMSR {msr:#x} is unknown");
            None
        }),
    }
}

/// What a write leaves to do with KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// The vCPU's counter has another offset.
    Counter,
    /// IA32_APIC_BASE has changed.
    ApicBase,
}

/// WRMSR; `None` faults.
pub(crate) fn write(
    ctx: &VmContext,
    apics: Apics,
    cpu: &mut CpuState,
    msr: u32,
    value: u64,
) -> Option<After> {
    let id = VcpuId(cpu.id);
    let done = |ok: bool| ok.then_some(After::Nothing);
    match msr {
        TSC => {
            let offset = value.wrapping_sub(ctx.tsc());
            let moved = offset.wrapping_sub(cpu.msr.tsc_offset);
            cpu.msr.tsc_adjust = cpu.msr.tsc_adjust.wrapping_add(moved);
            move_counter(ctx, apics, cpu, offset);
            Some(After::Counter)
        }
        TSC_ADJUST => {
            let offset = cpu.msr.tsc_offset.wrapping_add(value.wrapping_sub(cpu.msr.tsc_adjust));
            cpu.msr.tsc_adjust = value;
            move_counter(ctx, apics, cpu, offset);
            Some(After::Counter)
        }
        APIC_BASE => {
            if !ctx.irq.set_apic_base(id, value) {
                return None;
            }
            cpu.msr.apic_base = value;
            Some(After::ApicBase)
        }
        MCG_STATUS => Some(After::Nothing),
        TSC_DEADLINE => {
            // Only an exact 0 disarms.
            let shared = if value == 0 { 0 } else { value.wrapping_sub(cpu.msr.tsc_offset).max(1) };
            done(ctx.irq.write_msr(id, TSC_DEADLINE, shared))
        }
        0x800..=0x8ff => done(ctx.irq.write_msr(id, msr, value)),
        _ => {
            let known = ctx.gim.as_ref().is_some_and(|gim| gim.write_msr(cpu, msr, value));
            if !known {
                tracing::debug!(target: "nem", "WRMSR {msr:#x} with {value:#x} is unknown");
            }
            done(known)
        }
    }
}

/// Gives the vCPU's counter another distance from the VM-wide one. An armed deadline stays at its counter value; KVM's APICs keep it so.
fn move_counter(ctx: &VmContext, apics: Apics, cpu: &mut CpuState, offset: u64) {
    let id = VcpuId(cpu.id);
    let armed = match apics {
        Apics::Ours => ctx.irq.read_msr(id, TSC_DEADLINE).filter(|&shared| shared != 0),
        Apics::Kernel => None,
    };
    let own = armed.map(|shared| shared.wrapping_add(cpu.msr.tsc_offset));
    cpu.msr.tsc_offset = offset;
    if let Some(own) = own {
        ctx.irq.write_msr(id, TSC_DEADLINE, own.wrapping_sub(offset).max(1));
    }
    if let Some(gim) = &ctx.gim {
        gim.tsc_moved(cpu);
    }
}
