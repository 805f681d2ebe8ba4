//! CPUM, the CPU manager: a virtual CPU's architectural state ([`CpuState`]), the requests other threads make
//! of it ([`VcpuLink`]), and what CPUID and the MSRs tell.

pub mod link;
pub mod state;

pub use link::{ForcedActions, VcpuLink};
pub use state::{Activity, CpuState, Descriptor, Segment};
