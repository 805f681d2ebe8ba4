//! Finds what differs between two outcomes.

use cpum::CpuState;
use cpum::state::XsaveArea;
use cpum::state::rflags;

use super::guest::Outcome;
use super::mode::{DATA, Mode, PROGRAM, STACK, STACK_TOP};
use super::monitor::has_error_code;
use super::program::Assembled;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// What may differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// The arithmetic flags in the images that faults push: an engine need not keep those that nothing reads before they are
    /// written again, as long as going on after the fault computes the same.
    pub flags_at_faults: bool,
    /// The frames' places on the stack, the log, and the memory they leave: for runs with interrupts of their own.
    pub frames: bool,
}

/// What differs, one line each; empty if the sides agree.
pub fn differences(
    mode: Mode,
    assembled: &Assembled,
    a: &Outcome,
    b: &Outcome,
    tolerance: Tolerance,
) -> Vec<String> {
    let mut list = Vec::new();
    let mut differ = |what: &str, a: String, b: String| {
        if a != b {
            list.push(format!("{what}: {a} | {b}"));
        }
    };
    let end = |o: &Outcome| o.end.clone().err().unwrap_or_else(|| "the end".into());
    differ("end", end(a), end(b));
    if a.log != b.log {
        let mut at = 0;
        let mut number = 0;
        let flags = |word: u32, ip: u32| {
            let loose = if tolerance.flags_at_faults {
                rflags::ARITH
            } else {
                assembled.undefined_at(full(mode, ip))
            };
            word & !(loose as u32)
        };
        loop {
            let (x, y) = (record(mode, &a.log[at..]), record(mode, &b.log[at.min(b.log.len())..]));
            let len = x.len().max(1);
            let text = |r: &[u32]| {
                let r: Vec<_> = r
                    .iter()
                    .enumerate()
                    .map(|(n, w)| if Some(n) == flags_word(mode) { flags(*w, r[ip_word(mode)]) } else { *w })
                    .collect();
                describe(mode, &r)
            };
            let (p, q) = (text(x), text(y));
            if p != q {
                differ(&format!("exception {number}"), p, q);
                break;
            }
            at += len;
            number += 1;
            if x.is_empty() {
                break;
            }
        }
    }
    if a.accesses != b.accesses {
        let n = a.accesses.iter().zip(&b.accesses).take_while(|(x, y)| x == y).count();
        let text = |o: &Outcome| match o.accesses.get(n) {
            Some((kind, place, value)) => format!("kind {kind:#x} at {place:#x} value {value:#x}"),
            None => "none".into(),
        };
        differ(&format!("device access {n}"), text(a), text(b));
    }
    if a.end.is_ok() && b.end.is_ok() {
        state(&a.cpu, &b.cpu, &mut differ);
    }
    memory("program", PROGRAM, &a.program, &b.program, &mut differ);
    memory("data", DATA, &a.data, &b.data, &mut differ);
    if !mode.shares_stack() {
        // Below the pointer the frames of exceptions that were taken on it would differ; there are none.
        memory("stack", STACK, &a.stack, &b.stack, &mut differ);
    } else {
        let len = (STACK_TOP - STACK) as usize;
        memory("stack", STACK, &a.stack[..0x200], &b.stack[..0x200], &mut differ);
        memory("stack", STACK_TOP, &a.stack[len..], &b.stack[len..], &mut differ);
    }
    // A processor may set the accessed bit of a page that an instruction would have touched if it had not faulted otherwise.
    let wide = mode != Mode::Paged32;
    let settled = |tables: &[u8]| {
        let entry = if wide { 8 } else { 4 };
        tables
            .iter()
            .enumerate()
            .map(|(n, b)| if n % entry == 0 { b & !0x20 } else { *b })
            .collect::<Vec<_>>()
    };
    memory("page tables", super::mode::TABLES, &settled(&a.tables), &settled(&b.tables), &mut differ);
    list
}

/// An offset in CS from the 32 bits that the log has.
fn full(mode: Mode, ip: u32) -> u64 {
    if mode.bits() == 64 { mode.linear() & !0xffff_ffff | u64::from(ip) } else { ip.into() }
}

/// Where the handlers of a mode put RFLAGS and RIP in a record.
fn flags_word(mode: Mode) -> Option<usize> {
    match mode.monitor_bits() {
        16 => Some(3),
        32 => Some(4),
        _ => Some(5),
    }
}

fn ip_word(mode: Mode) -> usize {
    if mode.monitor_bits() == 16 { 1 } else { 2 }
}

/// The first record of a log.
fn record(mode: Mode, log: &[u32]) -> &[u32] {
    let Some(vector) = log.first() else { return &[] };
    let fixed = match mode.monitor_bits() {
        16 => 4,
        32 if mode.user() => 8,
        32 => 6,
        _ => 9,
    };
    let trap = matches!(*vector as u8, 1 | 3 | 4 | 0x80);
    let len = fixed + usize::from(trap);
    &log[..len.min(log.len())]
}

/// The last record of a log.
pub(super) fn last(mode: Mode, log: &[u32]) -> String {
    let mut rest = log;
    loop {
        let first = record(mode, rest);
        if rest.len() <= first.len() {
            return describe(mode, first);
        }
        rest = &rest[first.len()..];
    }
}

fn describe(mode: Mode, record: &[u32]) -> String {
    if record.is_empty() {
        return "none".into();
    }
    let names: &[&str] = match mode.monitor_bits() {
        16 => &["vector", "ip", "cs", "flags", "dr6"],
        32 if mode.user() => &["vector", "error", "eip", "cs", "flags", "esp", "ss", "cr2", "dr6"],
        32 => &["vector", "error", "eip", "cs", "flags", "cr2", "dr6"],
        _ => &["vector", "error", "rip", "rip high", "cs", "flags", "rsp", "ss", "cr2", "dr6"],
    };
    let error = has_error_code(record[0] as u8);
    names
        .iter()
        .zip(record)
        .filter(|(n, _)| error || **n != "error")
        .map(|(n, v)| if *n == "vector" { format!("{n} {}", v & 0xff) } else { format!("{n} {v:#x}") })
        .collect::<Vec<_>>()
        .join(" ")
}

fn memory(name: &str, at: u64, a: &[u8], b: &[u8], differ: &mut impl FnMut(&str, String, String)) {
    if a != b {
        let n = a.iter().zip(b).position(|(x, y)| x != y).unwrap_or(0);
        let line = n & !15;
        let text = |m: &[u8]| m[line..(line + 16).min(m.len())].iter().map(|b| format!("{b:02x}")).collect();
        differ(&format!("{name} {:#x}", at + line as u64), text(a), text(b));
    }
}

/// Compares the registers of two states that both halted in the same handler.
pub fn state(a: &CpuState, b: &CpuState, differ: &mut impl FnMut(&str, String, String)) {
    let hex = |value: u64| format!("{value:#x}");
    for (i, name) in NAMES.iter().enumerate() {
        differ(name, hex(a.gpr[i]), hex(b.gpr[i]));
    }
    differ("rip", hex(a.rip), hex(b.rip));
    // Interrupt gates clear some; the arithmetic flags are what the program left, all defined but AF.
    let mask = !rflags::AF;
    differ("rflags", hex(a.rflags & mask), hex(b.rflags & mask));
    for (n, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
        differ(name, format!("{:x?}", a.seg[n]), format!("{:x?}", b.seg[n]));
    }
    differ("ldtr", format!("{:x?}", a.ldtr), format!("{:x?}", b.ldtr));
    differ("tr", format!("{:x?}", a.tr), format!("{:x?}", b.tr));
    differ("gdtr, idtr", format!("{:x?} {:x?}", a.gdtr, a.idtr), format!("{:x?} {:x?}", b.gdtr, b.idtr));
    for (name, x, y) in [
        ("cr0", a.cr0, b.cr0),
        ("cr2", a.cr2, b.cr2),
        ("cr3", a.cr3, b.cr3),
        ("cr4", a.cr4, b.cr4),
        ("dr6", a.dr6, b.dr6),
        ("dr7", a.dr7, b.dr7),
        ("xcr0", a.xcr0, b.xcr0),
    ] {
        differ(name, hex(x), hex(y));
    }
    differ("dr", format!("{:x?}", a.dr), format!("{:x?}", b.dr));
    differ("pdpte", format!("{:x?}", a.pdpte), format!("{:x?}", b.pdpte));
    differ("msr", format!("{:x?}", a.msr), format!("{:x?}", b.msr));
    differ("activity", format!("{:?}", a.activity), format!("{:?}", b.activity));
    unit(&a.xsave, &b.xsave, differ);
}

fn unit(a: &XsaveArea, b: &XsaveArea, differ: &mut impl FnMut(&str, String, String)) {
    let (a, b) = (&a.0, &b.0);
    let bytes = |area: &[u8], start: usize, len: usize| -> String {
        area[start..start + len].iter().rev().map(|b| format!("{b:02x}")).collect()
    };
    let mut field =
        |what: &str, start: usize, len: usize| differ(what, bytes(a, start, len), bytes(b, start, len));
    field("fcw", 0, 2);
    field("fsw", 2, 2);
    field("ftw", 4, 1);
    // AMD's CPUs keep the pointers of an instruction with an unmasked exception only.
    if b[2] & 0x80 != 0 {
        field("fop", 6, 2);
        field("fip", 8, 8);
        field("fdp", 16, 8);
    }
    field("mxcsr", 24, 4);
    for i in 0..8 {
        field(&format!("st{i}"), 32 + 16 * i, 10);
    }
    for i in 0..16 {
        field(&format!("xmm{i}"), 160 + 16 * i, 16);
    }
    // What the header does not name holds its initial value.
    let high = |area: &[u8], i: usize| {
        if area[512] & 4 != 0 { bytes(area, 576 + 16 * i, 16) } else { "00".repeat(16) }
    };
    for i in 0..16 {
        differ(&format!("ymm{i} high"), high(a, i), high(b, i));
    }
}
