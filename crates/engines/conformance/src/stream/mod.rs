//! Random programs on two engines in lockstep.
//!
//! A case is a program of groups of instructions with the registers and data it starts from. Before each group the program
//! notes where the next one starts; a fault's handler records vector, error code, frame and CR2 on a port and goes on there. The
//! program is run several times over, so that engines that translate only what is run often do so, and ends in an
//! interrupt whose handler halts. Both sides then must agree on every register, flag, record, device access and byte of memory.
//!
//! * `mode` is the machine's layout in each mode, `monitor` the handlers in it.
//! * `program` holds a program and assembles it; `generate` makes one up.
//! * `guest` runs it on one engine; `compare` finds differences; `session` runs many and makes failures small.

pub mod compare;
pub mod generate;
mod groups;
pub mod guest;
pub mod mode;
mod monitor;
pub mod program;
pub mod session;

pub use guest::{Disturbance, Guest};
pub use mode::Mode;
pub use session::{Report, Session};
