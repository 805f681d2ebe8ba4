//! IEM, the interpreter: executes guest instructions one by one on the state in [`cpum::CpuState`]. It is the semantic
//! reference of every other engine.
//!
//! * `decode` turns `iced-x86` instructions into compact operations, kept in decoded blocks (`block`) by physical address.
//! * `core` is one vCPU's engine state and the memory access path over `tlb`; `paging` walks page tables.
//! * `ops` executes operations; `flags` has the arithmetic as pure functions.
//! * `segment`, `transfer`, `event` and `task` are protection: descriptors, far transfers, exceptions and interrupts, task
//!   switches. `msr` and `debug` are the registers of those names.
//! * [`unit`] executes x87, MMX, SSE and AVX instructions on the host's own unit.
//! * `engine` is the run loop behind [`em::Engine`].

mod block;
mod capabilities;
pub mod core;
pub mod debug;
mod decode;
pub mod engine;
mod event;
pub mod fault;
pub mod features;
pub mod flags;
pub mod memory;
mod msr;
mod op;
mod ops;
pub mod paging;
mod segment;
mod task;
#[doc(hidden)]
pub mod testing;
pub mod tlb;
mod transfer;
pub mod unit;

pub use block::Source;
pub use engine::{Iem, mark};
pub use fault::{Fault, Vector};
pub use features::{cpuid_features, host_cpuid};
pub use memory::GuestMemory;
pub use ops::system::{syscall_segments, sysret_segments};
