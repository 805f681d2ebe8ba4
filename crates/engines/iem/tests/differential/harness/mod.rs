//! Differential testing: random user-mode instruction sequences, run by the interpreter and by the host's CPU, must agree in
//! registers, flags, memory, and in the exception that ends a sequence.
//!
//! Both sides use the same addresses: data at [`DATA`], code at [`CODE`]. Sequences end with INT3.
#![allow(dead_code, unreachable_pub)] // the test and the example use different parts

pub mod compare;
pub mod generate;
pub mod guest;
pub mod native;
pub mod session;

use cpum::state::XsaveArea;

/// Where sequences find their data; also reachable by a 32-bit displacement.
pub const DATA: u64 = 0x1000_0000;
/// Bytes of data that instructions may change.
pub const DATA_LEN: usize = 4 * 4096;
/// A page of constants after the data: indices for gathers.
pub const TABLE: u64 = DATA + DATA_LEN as u64;
pub const TABLE_LEN: usize = 4096;
/// Where sequences are loaded.
pub const CODE: u64 = 0x2000_0000;
pub const CODE_LEN: usize = 16 * 4096;

/// Linux's selectors of 64-bit user code and its stack.
pub const USER_CODE: u16 = 0x33;
pub const USER_STACK: u16 = 0x2b;

/// What a sequence starts from and leaves.
#[derive(Clone)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub xsave: XsaveArea,
}

/// How a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u8,
    pub code: u32,
    /// For page faults.
    pub address: u64,
}

#[derive(Clone)]
pub struct Outcome {
    pub state: State,
    pub trap: Trap,
    pub data: Vec<u8>,
}
