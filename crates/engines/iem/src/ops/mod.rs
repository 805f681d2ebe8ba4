//! What operations do, by group.

pub(crate) mod alu;
pub(crate) mod bits;
pub(crate) mod data;
pub(crate) mod flow;
pub(crate) mod io;
pub(crate) mod shift;
pub(crate) mod string;
pub(crate) mod system;
pub(crate) mod units;
