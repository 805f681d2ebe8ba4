//! Interrupt lines from devices to interrupt controllers, and the controllers' face towards EM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vbox_types::VcpuId;

/// An input side for interrupt lines: an interrupt controller, or a bridge that routes to one.
pub trait IrqSink: Send + Sync {
    /// Input `pin` has the level `level` now. Called on every change, from any thread, possibly with the device's lock held.
    fn set_level(&self, pin: u32, level: bool);
}

/// One input pin that several devices may share (wired OR).
pub struct IrqPin {
    sink: Arc<dyn IrqSink>,
    pin: u32,
    /// One bit per line handed out; the pin is high while any is set.
    levels: AtomicU64,
    lines: AtomicU64,
}

impl IrqPin {
    pub fn new(sink: Arc<dyn IrqSink>, pin: u32) -> Arc<Self> {
        Arc::new(Self { sink, pin, levels: AtomicU64::new(0), lines: AtomicU64::new(0) })
    }

    /// A new line to this pin, low.
    ///
    /// # Panics
    /// After 64 lines, which no machine assembles.
    pub fn line(self: &Arc<Self>) -> IrqLine {
        let bit = self.lines.fetch_add(1, Ordering::Relaxed);
        assert!(bit < 64, "more than 64 devices on interrupt pin {}", self.pin);
        IrqLine { pin: Some((self.clone(), 1 << bit)) }
    }
}

/// A device's end of an interrupt line: the right to set one line's level, nothing more.
#[derive(Clone, Default)]
pub struct IrqLine {
    pin: Option<(Arc<IrqPin>, u64)>,
}

impl IrqLine {
    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        Self::default()
    }

    /// Sets the line's level.
    pub fn set(&self, level: bool) {
        let Some((pin, bit)) = &self.pin else { return };
        let before = if level {
            pin.levels.fetch_or(*bit, Ordering::SeqCst)
        } else {
            pin.levels.fetch_and(!bit, Ordering::SeqCst)
        };
        let after = if level { before | bit } else { before & !bit };
        if (before != 0) != (after != 0) {
            pin.sink.set_level(pin.pin, after != 0);
        }
    }

    /// Low, high, low: an edge for edge-triggered inputs.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// The 8259 pair as the interrupt logic behind its INTR pin sees it: a local APIC whose LINT0 is in ExtINT mode, or the
/// CPU itself while the APIC is off. Changes of INTR are told through an [`IrqLine`] of that logic's own.
pub trait ExtInt: Send + Sync {
    /// Level of INTR. Takes no lock.
    fn is_pending(&self) -> bool;

    /// Interrupt-acknowledge cycle: takes the highest-priority request into service and gives its vector. If the request has
    /// gone, it is the spurious vector (input 7 of the chip that was asked). Takes the 8259's lock and sets the INTR line from
    /// inside it: not to be called with a lock held that the line's sink takes.
    fn acknowledge(&self) -> u8;
}

/// The interrupt controllers as a vCPU sees them: its local APIC, with the 8259 pair behind it. EM and the engines call it on the
/// vCPU's own thread.
pub trait InterruptController: Send + Sync {
    /// Whether [`InterruptController::acknowledge`] would deliver a vector now.
    fn is_pending(&self, vcpu: VcpuId) -> bool;

    /// Interrupt-acknowledge cycle: takes the highest-priority deliverable vector into service. When none is left for the vCPU,
    /// its `ForcedActions::INTERRUPT` is cleared.
    fn acknowledge(&self, vcpu: VcpuId) -> Option<u8>;

    /// CR8, the task-priority class (0–15).
    fn read_cr8(&self, vcpu: VcpuId) -> u64;
    fn write_cr8(&self, vcpu: VcpuId, value: u64);

    /// IA32_APIC_BASE as set by WRMSR; false if the value is invalid (#GP).
    fn set_apic_base(&self, vcpu: VcpuId, value: u64) -> bool;

    /// x2APIC MSRs 0x800–0x8ff and IA32_TSC_DEADLINE (0x6e0): `None` where reading faults. The deadline is in ticks of the VM-wide
    /// time-stamp counter here: the engine adds the vCPU's own offset when it reads a value other than 0, and subtracts it when it
    /// writes one.
    fn read_msr(&self, vcpu: VcpuId, msr: u32) -> Option<u64>;
    /// As above for writing; false where it faults.
    fn write_msr(&self, vcpu: VcpuId, msr: u32, value: u64) -> bool;

    /// The vCPU was reset by INIT: its local APIC goes to its INIT state.
    fn init_reset(&self, vcpu: VcpuId);

    /// The local APICs, if there are any that the host's hypervisor may take over.
    fn local_apics(&self) -> Option<&dyn LocalApics>;
}

/// Local APICs of the host's hypervisor, one for each vCPU, which answer the guest's accesses and deliver interrupts without us.
pub trait RemoteApics: Send + Sync {
    /// A message-signalled interrupt (Intel SDM volume 3, 10.11); false if no APIC took it.
    fn send(&self, address: u64, data: u32) -> bool;

    /// The I/O APIC's inputs as message-signalled interrupts: address and data of each. The ends of those that are level-triggered are to
    /// be told by [`LocalApics::end_of_interrupt`].
    fn set_routes(&self, routes: &[(u64, u32)]);
}

/// A local APIC's registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApicRegisters {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// IA32_TSC_DEADLINE in ticks of the VM-wide time-stamp counter; 0 is disarmed.
    pub deadline: u64,
    /// The register page as far as it is used, as the xAPIC shows it.
    pub page: [u8; Self::PAGE],
}

impl ApicRegisters {
    /// Bytes of the page that have registers.
    pub const PAGE: usize = 0x400;
}

/// The machine's local APICs while others stand in for them. From [`LocalApics::lend`] on, messages go to the remote APICs, and these
/// here only keep what was last taken from there; LINT0, at which the 8259 pair is, stays here.
pub trait LocalApics: Send + Sync {
    /// Has `remote` stand in for the local APICs.
    fn lend(&self, remote: Arc<dyn RemoteApics>);

    /// Nobody stands in for the local APICs any more. Each has been imported; messages that come from here on stay here.
    fn take_back(&self);

    /// A fixed interrupt that had reached the vCPU's remote APIC after it was imported.
    fn accept(&self, vcpu: VcpuId, vector: u8, level: bool);

    /// What the vCPU's remote APIC is to start from, and whether that replaces all that has reached it meanwhile (the machine was reset, or a
    /// state loaded).
    fn export(&self, vcpu: VcpuId) -> (ApicRegisters, bool);

    /// The vCPU's remote APIC has started from what was exported.
    fn exported(&self, vcpu: VcpuId);

    /// Takes back what the vCPU's remote APIC holds.
    fn import(&self, vcpu: VcpuId, registers: &ApicRegisters);

    /// A remote APIC has ended a level-triggered interrupt.
    fn end_of_interrupt(&self, vector: u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);
    impl IrqSink for Log {
        fn set_level(&self, pin: u32, level: bool) {
            self.0.lock().unwrap().push((pin, level));
        }
    }

    #[test]
    fn a_shared_pin_stays_high_until_the_last_line_drops() {
        let log = Arc::new(Log::default());
        let pin = IrqPin::new(log.clone(), 11);
        let (a, b) = (pin.line(), pin.line());
        a.set(true);
        b.set(true);
        a.set(false);
        b.set(false);
        b.set(false);
        assert_eq!(*log.0.lock().unwrap(), [(11, true), (11, false)]);
    }
}
