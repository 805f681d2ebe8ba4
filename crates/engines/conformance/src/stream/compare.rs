//! Finds what differs between two outcomes.

use cpum::CpuState;
use cpum::state::XsaveArea;
use cpum::state::{rflags, seg};

use super::guest::Outcome;
use super::mode::{DATA, Mode, PROGRAM, REGISTERS, STACK, STACK_TOP};
use super::monitor::has_error_code;
use super::program::Assembled;
use crate::allowance::Allowance;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Bits of a page's entry.
const ACCESSED: u8 = 1 << 5;
const DIRTY: u8 = 1 << 6;

/// What may differ.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tolerance {
    /// The arithmetic flags in the images that faults push: an engine need not keep those that nothing reads before they are
    /// written again, as long as going on after the fault computes the same.
    pub flags_at_faults: bool,
    /// The frames' places on the stack, the log, and the memory they leave: for runs with interrupts of their own.
    pub frames: bool,
    pub allowance: Allowance,
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
            word & !(loose as u32) & tolerance.allowance.pushed_flags()
        };
        loop {
            let (x, y) = (record(mode, &a.log[at..]), record(mode, &b.log[at.min(b.log.len())..]));
            let len = x.len().max(1);
            let text = |r: &[u32]| {
                let mut words = r.to_vec();
                if let Some(word) = flags_word(mode).and_then(|n| words.get_mut(n)) {
                    *word = flags(*word, r[ip_word(mode)]);
                }
                let whole = Record { mode, words: r };
                if whole.error().is_some() {
                    words[1] &= tolerance.allowance.error_code(&whole, assembled);
                }
                describe(mode, &words)
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
        let mut other = b.cpu.clone();
        if tolerance.allowance.kvm && mode == Mode::Real {
            let kind = a.cpu.seg[seg::CS].attr.kind();
            other.seg[seg::CS].attr.set_kind(kind);
        }
        if !tolerance.allowance.stack_segment(mode) {
            other.seg[seg::SS] = a.cpu.seg[seg::SS];
        }
        state(&a.cpu, &other, &mut differ);
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
    let (entry, kvm) = (if wide { 8 } else { 4 }, tolerance.allowance.kvm);
    let settled = |tables: &[u8]| {
        let mut tables = tables.to_vec();
        for bytes in tables.chunks_exact_mut(entry) {
            let page = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) & !0xfff;
            let dirty = if kvm && u64::from(page) == REGISTERS { DIRTY } else { 0 };
            bytes[0] &= !(ACCESSED | dirty);
        }
        tables
    };
    memory("page tables", super::mode::TABLES, &settled(&a.tables), &settled(&b.tables), &mut differ);
    list
}

/// An offset in CS from the 32 bits that the log has.
fn full(mode: Mode, ip: u32) -> u64 {
    if mode.bits() == 64 { mode.linear() & !0xffff_ffff | u64::from(ip) } else { ip.into() }
}

/// What a handler has recorded of an exception.
pub struct Record<'a> {
    mode: Mode,
    words: &'a [u32],
}

impl Record<'_> {
    pub fn vector(&self) -> u8 {
        self.words.first().map_or(0, |w| *w as u8)
    }

    /// The error code, if the exception has one and the mode's handlers record it.
    pub fn error(&self) -> Option<u32> {
        let has = self.mode != Mode::Real && has_error_code(self.vector());
        self.words.get(1).copied().filter(|_| has)
    }

    /// Whether an operand of `size` bytes around CR2 lies in two pages.
    pub fn crosses(&self, size: usize) -> bool {
        let place = match self.mode.monitor_bits() {
            16 => return false,
            32 if self.mode.user() => 7,
            32 => 5,
            _ => 8,
        };
        let address = self.words.get(place).map_or(0, |w| *w as usize & 0xfff);
        // The first byte of the second page, or near the end of the first.
        address == 0 && size > 1 || address + size > 0x1000
    }

    /// Offset in CS of the instruction that a fault is about.
    pub fn ip(&self) -> u64 {
        full(self.mode, self.words.get(ip_word(self.mode)).copied().unwrap_or(0))
    }
}

/// The records of a log.
pub fn records(mode: Mode, log: &[u32]) -> impl Iterator<Item = Record<'_>> {
    let mut rest = log;
    std::iter::from_fn(move || {
        let words = record(mode, rest);
        rest = &rest[words.len()..];
        (!words.is_empty()).then_some(Record { mode, words })
    })
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
