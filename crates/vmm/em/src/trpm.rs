//! TRPM, the trap manager: which event a vCPU takes next (Intel SDM volume 3, 6.9 and 6.7.1).

use cpum::state::rflags;
use cpum::{Activity, CpuState, ForcedActions, VcpuLink};
use pdm::InterruptController;
use vbox_types::VcpuId;

use crate::engine::Event;

/// Whether STI or MOV SS holds off interrupts before the instruction at RIP.
fn is_inhibited(cpu: &CpuState) -> bool {
    cpu.inhibit_rip == Some(cpu.rip)
}

/// The event to deliver before the next instruction, if any: NMI first, then a maskable interrupt. Takes it from its source.
pub(crate) fn next_event(
    cpu: &mut CpuState,
    link: &VcpuLink,
    irq: &dyn InterruptController,
) -> Option<Event> {
    if matches!(cpu.activity, Activity::WaitForSipi | Activity::Shutdown) {
        return None;
    }
    let pending = link.pending();
    if pending.contains(ForcedActions::NMI) && !cpu.nmi_blocked && !is_inhibited(cpu) {
        link.clear(ForcedActions::NMI);
        return Some(Event::Nmi);
    }
    if pending.contains(ForcedActions::INTERRUPT) && cpu.rflags & rflags::IF != 0 && !is_inhibited(cpu) {
        return irq.acknowledge(VcpuId(cpu.id)).map(Event::Interrupt);
    }
    None
}

/// The actions that end a wait in the vCPU's present activity.
pub(crate) fn wake_mask(cpu: &CpuState) -> ForcedActions {
    let always = ForcedActions::EM.union(ForcedActions::INIT);
    match cpu.activity {
        Activity::WaitForSipi => always.union(ForcedActions::SIPI),
        Activity::Shutdown => always,
        Activity::Running | Activity::Halted => {
            let mut mask = always;
            if !cpu.nmi_blocked {
                mask = mask.union(ForcedActions::NMI);
            }
            if cpu.rflags & rflags::IF != 0 {
                mask = mask.union(ForcedActions::INTERRUPT);
            }
            mask
        }
    }
}
