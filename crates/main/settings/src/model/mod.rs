//! What settings files say, as typed values. The defaults here are those of VirtualBox 7.0's settings
//! version 1.19; what an older version means by a missing element is said in the codecs.

mod global;
mod hardware;
mod machine;
mod shared;

pub use global::*;
pub use hardware::*;
pub use machine::*;
pub use shared::*;
