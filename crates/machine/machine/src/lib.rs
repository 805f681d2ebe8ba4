//! The VM process: everything between the settings of a machine and a guest that runs.
//!
//! [`config`] turns settings into what the machine is made of; [`machine`] builds it from devices, engines and back ends; [`console`]
//! is what clients can do with it while it runs.

mod bios_log;
mod bios_mends;
pub mod block;
pub mod config;
pub mod console;
pub mod cpus;
mod debugger;
pub mod engine;
pub mod firmware;
pub mod host;
pub mod hwvirt;
pub mod keys;
pub mod limit;
pub mod log;
pub mod machine;
pub mod network;
pub mod option_rom;
pub mod profile;
pub mod registers;
pub mod screenshot;
pub mod serial;
pub mod stam;
pub mod storage;
pub mod wire;
