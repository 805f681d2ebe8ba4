//! EM, the execution manager: what an engine is ([`Engine`]), what it may call ([`VmContext`]), and the loop that runs every vCPU
//! on one ([`Em`]). TRPM, the trap manager, is the part of the loop that chooses what to inject.

pub mod engine;
mod manager;
mod trpm;

pub use engine::{Engine, Event, Exit, Gim, VmContext};
pub use manager::{Em, MachineHooks, RunState};
