//! The contract between EM and an execution engine (interpreter, recompiler, KVM).
//!
//! * `run` owns the vCPU's state until EM has to decide. On every return and at every call into [`VmContext`]'s devices the
//!   state is architecturally exact: `rip` is that of the instruction at work, faults and callbacks happen between instructions.
//! * An engine never advances guest time and never chooses interrupts: EM takes the vector from the interrupt controller and has
//!   the engine deliver it ([`Engine::inject`]).
//! * `run` must return with [`Exit::Attention`] soon after (and before the next block of guest code once) an action that EM must act on is
//!   pending: INIT, SIPI, EM always; NMI unless blocked; INTERRUPT if RFLAGS.IF is set and no STI/MOV SS shadow holds it off.
//!   TLB_FLUSH and REMAP are the engine's own business: it drops its cached translations, then calls
//!   `VcpuLink::acknowledge_flush` with the epoch read *before* dropping them.
//! * While it holds cached host pointers in use the engine is "in guest" (`VcpuLink::enter_guest`); `run` returns outside.

use std::sync::Arc;

use cpum::{CpuState, VcpuLink};
use pdm::{InterruptController, Iom};
use pgm::Pgm;
use tm::Clock;
use vbox_types::{Hz, VcpuId};

/// What engines reach of the machine, shared by all vCPUs.
pub struct VmContext {
    pub pgm: Arc<Pgm>,
    pub iom: Arc<Iom>,
    pub irq: Arc<dyn InterruptController>,
    pub clock: Arc<Clock>,
    /// Rate of the guest's time-stamp counter.
    pub tsc_frequency: Hz,
    pub links: Vec<Arc<VcpuLink>>,
    /// What CPUID and the feature MSRs tell.
    pub cpuid: cpum::CpuidTable,
    /// What guests find that know they run on a hypervisor; `None` where it does not show.
    pub gim: Option<Arc<dyn Gim>>,
}

impl VmContext {
    /// The VM-wide time-stamp counter now; a vCPU's own is this plus `msr.tsc_offset`.
    pub fn tsc(&self) -> u64 {
        tm::ticks(self.clock.now(), self.tsc_frequency.0)
    }

    /// The link of a vCPU.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn link(&self, vcpu: VcpuId) -> &VcpuLink {
        &self.links[vcpu.index()]
    }
}

/// GIM, the guest interface manager, as engines see it: the registers and calls of a paravirtualization provider. Called on the vCPU's
/// own thread.
pub trait Gim: Send + Sync {
    /// RDMSR of a register that is neither the CPU's nor the APIC's. `None`: not one of the provider's; the engine raises #GP.
    fn read_msr(&self, vcpu: VcpuId, msr: u32) -> Option<u64>;
    /// WRMSR. False: not one of the provider's, or an invalid value; the engine raises #GP.
    fn write_msr(&self, cpu: &CpuState, msr: u32, value: u64) -> bool;
    /// VMCALL or VMMCALL, by whatever name the guest calls it: takes the arguments from the registers and leaves the result there. False:
    /// the provider takes no calls now; the engine raises #UD.
    fn hypercall(&self, cpu: &mut CpuState) -> bool;
    /// The vCPU's `tsc_offset` has changed: what guests compute time with must follow.
    fn tsc_moved(&self, cpu: &CpuState);
    /// The vCPU's thread is about to run guest code: what the guest is told of the time that others had its CPU.
    fn about_to_run(&self, vcpu: VcpuId);
}

/// An event for the engine to deliver through the guest's IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A maskable interrupt with the vector the controller gave.
    Interrupt(u8),
    Nmi,
}

/// Why `run` returned.
#[derive(Debug)]
pub enum Exit {
    /// HLT was executed; `activity` is `Halted` and `rip` past it.
    Halt,
    /// EM must look at the pending actions.
    Attention,
    /// A triple fault; `activity` is `Shutdown`.
    TripleFault,
    /// The engine cannot go on: the text tells why, for VBox.log and the user ("Guru Meditation").
    Fatal(String),
}

/// One vCPU's execution engine.
pub trait Engine: Send {
    /// The name that VBox.log shows.
    fn name(&self) -> &'static str;

    /// Runs guest code until EM has to decide.
    fn run(&mut self, cpu: &mut CpuState) -> Exit;

    /// Delivers an event as if it arrived between two instructions, waking the CPU from HLT. EM has checked that it may. A fault during
    /// delivery is delivered in turn; an error is what `run` would return (triple fault).
    fn inject(&mut self, cpu: &mut CpuState, event: Event) -> Result<(), Exit>;

    /// The state was changed from outside (reset, INIT, restored): drop everything derived from it.
    fn state_changed(&mut self, cpu: &CpuState);

    /// Brings all of `cpu` up to date. An engine may leave the state with the host's hypervisor while `run` comes and goes; then only
    /// `activity`, RFLAGS.IF, the interrupt shadow and the NMI block are true on its return, and EM calls this before it shows the state
    /// to anyone or changes it. Engines that work on `cpu` itself have nothing to do.
    fn complete(&mut self, _cpu: &mut CpuState) {}

    /// Takes what came up in [`Engine::complete`] and [`Engine::run`] would return next, for an engine that does not run again.
    fn take_deferred(&mut self) -> Option<Exit> {
        None
    }

    /// Whether the vCPU waits inside of [`Engine::run`], after HLT and for a start-up IPI, as it does where the host's hypervisor has the
    /// local APIC; EM then calls `run` in these activities, too.
    fn waits_itself(&self) -> bool {
        false
    }

    /// Counters for VBox.log and statistics, by name.
    fn statistics(&self) -> Vec<(&'static str, u64)>;
}
