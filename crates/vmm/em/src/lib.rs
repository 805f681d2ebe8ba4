//! EM, the execution manager: what an engine is ([`Engine`]), what it may call ([`VmContext`]), and the loop that runs a vCPU
//! on one.

pub mod engine;

pub use engine::{Engine, Event, Exit, VmContext};
