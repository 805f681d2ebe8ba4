//! NEM, native execution, on Linux: guest code runs on the host's CPU through KVM.
//!
//! * [`Host::probe`] says whether this host's KVM is usable, and if not, why and what to do about it ([`Unusable`]).
//! * [`Host::engines`] gives one [`em::Engine`] per vCPU. The local APICs are KVM's ([`apic`]), so that timer interrupts, inter-processor
//!   interrupts and HLT stay in the kernel; I/O APIC, PIC, PIT, RTC and HPET are our device models ("split irqchip"): their state is what is
//!   saved, virtual time stands still for them, and nothing that guests do often reaches them. On a machine without local APICs
//!   (`--ioapic off`) all controllers are ours, and EM chooses the interrupts as it does with the other engines.
//! * Memory slots follow `pgm`'s layout ([`slots`]). What is not in a slot — device registers, writes to ROM, ranges that are no whole
//!   pages — comes back as an exit and is looked up in `pgm`.
//! * A vCPU's state stays with KVM while it runs; `Engine::complete` fetches it ([`state`]).
//! * The time-stamp counter is the host's plus an offset, and virtual time is computed from it ([`Host::clock`]), so that both agree to the
//!   tick. Where the host's counter is not to be relied on, KVM makes the guest's follow the host's raw monotonic clock, and so does virtual
//!   time; the vCPUs' counters then differ a little ([`Host::has_stable_counter`]).
//! * Notifications of virtio devices ([`pdm::doorbell`]) are heard by KVM, and a thread tells the device ([`doorbells`]).
//! * Guests can have virtualization themselves ([`Host::nested`]). What they make of it stays with KVM: such a machine's state cannot be taken
//!   elsewhere.
//! * Writes that may be late ([`pgm::Backing::posted`]) are collected by KVM, and pages that guests write are noted by it for those who ask
//!   ([`pgm::Backlog`]).
//!
//! Not reached by KVM, as with every hypervisor on it: the A20 gate (guests see it open).

mod apic;
mod doorbells;
mod msr;
mod probe;
mod slots;
mod state;
mod sys;
mod vcpu;

pub use probe::{Host, Nested, Paravirt, Unusable, on_emulated_cpu};
