//! Compares what both sides left.

use cpum::state::rflags;

use super::Outcome;
use super::generate::{Assembled, Case};
use iced_x86::{Mnemonic, OpKind};

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Vectors whose error code and address are compared.
const PAGE_FAULT: u8 = 14;
const SIMD_ERROR: u8 = 19;

/// What differs, one line each; empty if the sides agree. Left is the interpreter.
pub fn differences(assembled: &Assembled, iem: &Outcome, host: &Outcome) -> Vec<String> {
    let undefined = assembled.undefined_at(host.state.rip);
    let mut list = Vec::new();
    let mut differ = |what: String, a: String, b: String| {
        if a != b {
            list.push(format!("{what}: iem {a}, host {b}"));
        }
    };
    let hex = |value: u64| format!("{value:#x}");
    differ("trap".into(), format!("{}", iem.trap.vector), format!("{}", host.trap.vector));
    if host.trap.vector == PAGE_FAULT {
        // Linux says "present" of all kernel addresses.
        let hidden = u32::from(host.trap.address >> 63 != 0);
        let code = |outcome: &Outcome| hex(u64::from(outcome.trap.code | hidden));
        differ("page fault code".into(), code(iem), code(host));
        // Intel's CPUs tell the last byte of a masked move that crosses into the missing page, whichever element is there.
        let masked = assembled.placed.iter().any(|p| {
            use Mnemonic::*;
            p.ip == host.state.rip
                && matches!(p.insn.mnemonic(), Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
        });
        let exact = if masked { !0xfff } else { !0 };
        differ("page fault address".into(), hex(iem.trap.address & exact), hex(host.trap.address & exact));
    }
    differ("rip".into(), hex(iem.state.rip), hex(host.state.rip));
    let system = rflags::DF | rflags::IF | rflags::IOPL;
    let mask = (rflags::ARITH | system) & !undefined;
    differ("flags".into(), hex(iem.state.rflags & mask), hex(host.state.rflags & mask));
    for (i, name) in NAMES.iter().enumerate() {
        differ((*name).into(), hex(iem.state.gpr[i]), hex(host.state.gpr[i]));
    }
    let (a, b) = (&iem.state.xsave.0, &host.state.xsave.0);
    let bytes = |area: &[u8], start: usize, len: usize| -> String {
        area[start..start + len].iter().rev().map(|b| format!("{b:02x}")).collect()
    };
    let mut field =
        |what: String, start: usize, len: usize| differ(what, bytes(a, start, len), bytes(b, start, len));
    field("fcw".into(), 0, 2);
    field("fsw".into(), 2, 2);
    field("ftw".into(), 4, 1);
    // AMD's CPUs keep the pointers of an instruction with an unmasked exception only.
    if b[2] & 0x80 != 0 {
        field("fop".into(), 6, 2);
        field("fip".into(), 8, 8);
        // Undefined after an instruction without memory operand (Intel SDM volume 1, 8.1.8); Intel's CPUs also forget it when such
        // an instruction finds the exception.
        let has_memory = |ip: u64| {
            let placed = assembled.placed.iter().find(|p| p.ip == ip);
            placed.is_some_and(|p| p.insn.op_kinds().any(|kind| kind == OpKind::Memory))
        };
        let mut culprit = [0; 8];
        culprit.copy_from_slice(&b[8..16]);
        if has_memory(host.state.rip) && has_memory(u64::from_le_bytes(culprit)) {
            field("fdp".into(), 16, 8);
        }
    }
    // PE is not exact after an unmasked overflow or underflow, nor any flag of a dot product; see the unit's documentation.
    let dot_product = assembled.placed.iter().any(|p| {
        use Mnemonic::*;
        p.ip == host.state.rip && matches!(p.insn.mnemonic(), Dpps | Dppd | Vdpps | Vdppd)
    });
    if host.trap.vector != SIMD_ERROR || !dot_product && (b[24] & 0x18 == 0 || a[24] | 0x20 != b[24] | 0x20) {
        field("mxcsr".into(), 24, 4);
    }
    for i in 0..8 {
        field(format!("st{i}"), 32 + 16 * i, 10);
    }
    for i in 0..16 {
        field(format!("xmm{i}"), 160 + 16 * i, 16);
        field(format!("ymm{i} high"), 576 + 16 * i, 16);
    }
    if iem.data != host.data {
        let at = iem.data.iter().zip(&host.data).position(|(a, b)| a != b).unwrap_or(0);
        let line = at & !15;
        differ(format!("data+{line:#x}"), bytes(&iem.data, line, 16), bytes(&host.data, line, 16));
    }
    list
}

/// The sequence as text, with what is needed to read a difference.
pub fn listing(case: &Case, assembled: &Assembled) -> String {
    let mut text = String::new();
    for placed in &assembled.placed {
        text += &format!("  {:#x}: {}\n", placed.ip, placed.insn);
    }
    let start = &case.start;
    for (name, value) in NAMES.iter().zip(start.gpr) {
        text += &format!("  {name}={value:#x}");
    }
    let half = |at: usize| u16::from_le_bytes([start.xsave.0[at], start.xsave.0[at + 1]]);
    text += &format!(
        "\n  flags={:#x} mxcsr={:#x} fcw={:#x} fsw={:#x} ftw={:#x}\n",
        start.rflags,
        half(24),
        half(0),
        half(2),
        half(4)
    );
    text
}

/// Removes groups as long as `fails` stays true.
pub fn minimise(case: &Case, mut fails: impl FnMut(&Case) -> bool) -> Case {
    let mut best = case.clone();
    let mut chunk = best.groups.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        let mut removed = false;
        while start < best.groups.len() && best.groups.len() > 1 {
            let mut attempt = best.clone();
            let end = (start + chunk).min(attempt.groups.len());
            attempt.groups.drain(start..end);
            if !attempt.groups.is_empty() && fails(&attempt) {
                best = attempt;
                removed = true;
            } else {
                start = end;
            }
        }
        if chunk == 1 && !removed {
            return best;
        }
        chunk = chunk.div_ceil(2).max(1);
    }
}
