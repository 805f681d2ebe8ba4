//! REM, the recompiler: translates guest code to host code of the same architecture and keeps it.
//!
//! * `plan` reads guest code and decides how each instruction is done, `groups` which memory accesses share a check, and `swap`
//!   which registers change places; `emit` makes host code of it with `asm`. What is only warm stays in one block with its branches;
//!   where code runs much, each way gets a copy, and pages are kept from one access to the next.
//! * `context` is the memory that generated code works on; `thunks` are the ways into and out of it; `slow` is what it calls when
//!   a memory access needs more than the TLB.
//! * `code` is the memory for host code; `cache` knows what was translated.
//! * `run` is the loop behind [`em::Engine`]. Everything that is not translated (system instructions, device registers,
//!   single-stepping) is done by the interpreter, whose TLB, page walks and event delivery are shared.
//!
//! Guest registers live in host registers (see `thunks`), arithmetic flags in RFLAGS, and the guest's vector and x87
//! state in the host's unit. Code is translated by physical page and does not depend on the linear address.

mod asm;
mod cache;
mod code;
mod context;
pub mod counter;
mod emit;
mod groups;
mod host;
mod plan;
mod run;
mod slow;
mod swap;
mod thunks;

pub use run::Rem;
