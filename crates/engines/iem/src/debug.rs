//! The debug registers: breakpoints on instructions, data and ports (Intel SDM volume 3, chapter 17.2).

use cpum::CpuState;
use cpum::state::cr4;

/// DR6: single step.
pub const BS: u64 = 1 << 14;
/// DR6: task switch.
pub const BT: u64 = 1 << 15;
/// DR6: debug-register access while DR7.GD was set.
pub const BD: u64 = 1 << 13;
/// DR7: general detect.
pub const GD: u64 = 1 << 13;
/// DR6 bits that read as one.
pub const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7 bit that reads as one.
pub const DR7_FIXED: u64 = 0x400;

fn enabled(cpu: &CpuState, n: usize) -> bool {
    cpu.dr7 >> (2 * n) & 3 != 0
}

fn kind(cpu: &CpuState, n: usize) -> u64 {
    cpu.dr7 >> (16 + 4 * n) & 3
}

fn len(cpu: &CpuState, n: usize) -> u64 {
    match cpu.dr7 >> (18 + 4 * n) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    }
}

/// Whether any breakpoint on data is on.
pub fn data_breakpoints(cpu: &CpuState) -> bool {
    cpu.dr7 & 0xff != 0 && (0..4).any(|n| enabled(cpu, n) && matches!(kind(cpu, n), 1 | 3))
}

/// Whether any breakpoint on instructions is on.
pub fn instruction_breakpoints(cpu: &CpuState) -> bool {
    cpu.dr7 & 0xff != 0 && (0..4).any(|n| enabled(cpu, n) && kind(cpu, n) == 0)
}

/// DR6 bits of breakpoints that an access of `size` bytes hits.
pub fn match_data(cpu: &CpuState, linear: u64, size: u64, write: bool) -> u64 {
    matches(cpu, linear, size, |k| k == 3 || write && k == 1)
}

/// DR6 bits of breakpoints that a port access hits.
pub fn match_io(cpu: &CpuState, port: u64, size: u64) -> u64 {
    if cpu.cr4 & cr4::DE == 0 || cpu.dr7 & 0xff == 0 {
        return 0;
    }
    matches(cpu, port, size, |k| k == 2)
}

/// DR6 bits of breakpoints on the instruction at `linear`.
pub fn match_instruction(cpu: &CpuState, linear: u64) -> u64 {
    (0..4)
        .filter(|&n| enabled(cpu, n) && kind(cpu, n) == 0 && cpu.dr[n] == linear)
        .fold(0, |bits, n| bits | 1 << n)
}

fn matches(cpu: &CpuState, at: u64, size: u64, wanted: impl Fn(u64) -> bool) -> u64 {
    let mut bits = 0;
    for n in 0..4 {
        if enabled(cpu, n) && wanted(kind(cpu, n)) {
            let len = len(cpu, n);
            let start = cpu.dr[n] & !(len - 1);
            if at < start.wrapping_add(len) && start < at.wrapping_add(size) {
                bits |= 1 << n;
            }
        }
    }
    bits
}
