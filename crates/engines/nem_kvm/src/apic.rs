//! KVM's local APICs in the place of the machine's own.

use cpum::{Activity, CpuState};
use em::VmContext;
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state, kvm_mp_state, kvm_msi,
};
use kvm_ioctls::{Error, VcpuFd};
use pdm::{ApicRegisters, RemoteApics};
use vbox_types::VcpuId;

use crate::vcpu::Machine;
use crate::{msr, state, sys};

type Page = [u8; ApicRegisters::PAGE];

/// Where the sets of vectors begin in the page: eight registers each, 16 bytes apart.
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const WORDS: usize = 8;

impl RemoteApics for Machine {
    fn send(&self, address: u64, data: u32) -> bool {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        match self.vm.signal_msi(message) {
            Ok(taken) => taken > 0,
            Err(error) => {
                tracing::debug!(target: "nem", "KVM does not take the message {data:#x} to {address:#x}: {error}");
                false
            }
        }
    }

    fn set_routes(&self, routes: &[(u64, u32)]) {
        if let Err(error) = sys::set_routes(&self.vm, routes) {
            tracing::error!(target: "nem", "KVM does not take the I/O APIC's routes: {error}");
        }
    }
}

fn word(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

fn put_word(page: &mut Page, at: usize, value: u32) {
    page[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Adds to `page` the requests that `now` has and `taken`, which `page` was made from, does not.
fn merge(page: &mut Page, taken: &Page, now: &Page) {
    for at in (0..WORDS).map(|n| 16 * n) {
        let new = word(now, IRR + at) & !word(taken, IRR + at);
        put_word(page, IRR + at, word(page, IRR + at) | new);
        put_word(page, TMR + at, word(page, TMR + at) & !new | word(now, TMR + at) & new);
    }
}

/// The requests that `now` has and `taken` has not: the vectors, and whether they are level-triggered.
fn arrived(taken: &Page, now: &Page) -> Vec<(u8, bool)> {
    let is_set = |page: &Page, set: usize, vector: u8| {
        word(page, set + 16 * usize::from(vector / 32)) >> (vector % 32) & 1 != 0
    };
    let new = |vector: &u8| is_set(now, IRR, *vector) && !is_set(taken, IRR, *vector);
    (0..=u8::MAX).filter(new).map(|vector| (vector, is_set(now, TMR, vector))).collect()
}

fn read(vcpu: &VcpuFd) -> Result<Page, Error> {
    Ok(vcpu.get_lapic()?.regs.map(|byte| byte as u8))
}

/// The vCPU's APIC and what it waits for, as KVM had them when they were taken last.
pub(crate) struct Lent {
    taken: Page,
}

impl Lent {
    pub(crate) fn new() -> Self {
        Self { taken: [0; ApicRegisters::PAGE] }
    }

    /// Gives KVM the vCPU's APIC. IA32_APIC_BASE is there already; the deadline, in the vCPU's own ticks, is returned, for when the counter
    /// has its offset. What the vCPU waits for goes along.
    pub(crate) fn push(&mut self, vcpu: &VcpuFd, ctx: &VmContext, cpu: &CpuState) -> Result<u64, Error> {
        let Some(apics) = ctx.irq.local_apics() else { return Ok(0) };
        let (mut registers, replaced) = apics.export(VcpuId(cpu.id));
        if !replaced {
            // Messages reach KVM's APIC even while the state is here.
            merge(&mut registers.page, &self.taken, &read(vcpu)?);
        }
        vcpu.set_lapic(&kvm_lapic_state { regs: registers.page.map(|byte| byte as _) })?;
        apics.exported(VcpuId(cpu.id));
        let mp_state = match cpu.activity {
            Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
            Activity::Halted => KVM_MP_STATE_HALTED,
            Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
        };
        vcpu.set_mp_state(kvm_mp_state { mp_state })?;
        if let Some(gim) = &ctx.gim {
            for number in [msr::STEAL_TIME, msr::END_OF_INTERRUPT] {
                if let Some(value) = gim.read_msr(VcpuId(cpu.id), number) {
                    state::set_msr(vcpu, number, value)?;
                }
            }
        }
        Ok(match registers.deadline {
            0 => 0,
            deadline => deadline.wrapping_add(cpu.msr.tsc_offset),
        })
    }

    /// Takes the APIC and what the vCPU waits for back. `mp_state` was asked for before the registers were: KVM then acts on INIT and start-up
    /// messages, which change them.
    pub(crate) fn take(
        &mut self,
        vcpu: &VcpuFd,
        ctx: &VmContext,
        cpu: &mut CpuState,
        mp_state: u32,
    ) -> Result<(), Error> {
        let Some(apics) = ctx.irq.local_apics() else { return Ok(()) };
        if cpu.activity != Activity::Shutdown {
            cpu.activity = match mp_state {
                KVM_MP_STATE_HALTED => Activity::Halted,
                KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
                    Activity::WaitForSipi
                }
                _ => Activity::Running,
            };
        }
        let deadline = match state::msr(vcpu, msr::TSC_DEADLINE)? {
            0 => 0,
            own => own.wrapping_sub(cpu.msr.tsc_offset).max(1),
        };
        self.taken = read(vcpu)?;
        cpu.msr.apic_base = vcpu.get_sregs()?.apic_base;
        apics.import(VcpuId(cpu.id), &ApicRegisters { base: cpu.msr.apic_base, deadline, page: self.taken });
        if let Some(gim) = &ctx.gim {
            for number in [msr::STEAL_TIME, msr::END_OF_INTERRUPT] {
                if gim.read_msr(VcpuId(cpu.id), number).is_some() {
                    gim.write_msr(cpu, number, state::msr(vcpu, number)?);
                }
            }
        }
        Ok(())
    }

    /// Has the requests that have come since the state was taken show in the machine's own APIC.
    pub(crate) fn refresh(&mut self, vcpu: &VcpuFd, ctx: &VmContext, cpu: &CpuState) -> Result<(), Error> {
        let Some(apics) = ctx.irq.local_apics() else { return Ok(()) };
        let now = read(vcpu)?;
        if !apics.export(VcpuId(cpu.id)).1 {
            for (vector, level) in arrived(&self.taken, &now) {
                apics.accept(VcpuId(cpu.id), vector, level);
            }
        }
        self.taken = now;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_meanwhile_is_added_with_its_trigger_and_what_was_served_here_stays_gone() {
        let mut taken = [0; ApicRegisters::PAGE];
        put_word(&mut taken, IRR + 0x10, 0b0011);
        let mut now = taken;
        put_word(&mut now, IRR + 0x10, 0b0111);
        put_word(&mut now, TMR + 0x10, 0b0100);
        // Another engine has served vector 32 and has one of its own.
        let mut page = taken;
        put_word(&mut page, IRR + 0x10, 0b1010);
        put_word(&mut page, TMR + 0x10, 0b1000);
        merge(&mut page, &taken, &now);
        assert_eq!((word(&page, IRR + 0x10), word(&page, TMR + 0x10)), (0b1110, 0b1100));
        assert_eq!(arrived(&taken, &now), [(34, true)]);
    }
}
