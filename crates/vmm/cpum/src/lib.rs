//! CPUM, the CPU manager: a virtual CPU's architectural state ([`CpuState`]), the requests other threads make
//! of it ([`VcpuLink`]), and what CPUID and the MSRs tell.

pub mod cpuid;
pub mod link;
pub mod state;

pub use cpuid::CpuidTable;
pub use link::{ForcedActions, VcpuLink};
pub use state::{Activity, CpuState, Descriptor, Segment};
