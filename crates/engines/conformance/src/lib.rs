//! Tests that hold for every execution engine behind [`em::Engine`], from one body.
//!
//! * [`board`] is the machine: RAM, a clock that stands still, a port and a page of device registers that record what reaches them.
//! * [`stream`] runs random programs in every mode on two engines in lockstep and compares everything the architecture
//!   defines.
//! * [`windows`] compares an engine with the interpreter on pieces of what a real machine runs.
//! * [`kernels`] are small guest programs whose speed says what an engine's parts cost.
//! * [`allowance`] is what may differ under KVM, and why.
//! * `random` is the seedable source of it all.
#![forbid(unsafe_code)]

pub mod allowance;
pub mod board;
pub mod kernels;
pub mod random;
pub mod stream;
pub mod windows;

pub use allowance::Allowance;
pub use board::{Board, Kind};
