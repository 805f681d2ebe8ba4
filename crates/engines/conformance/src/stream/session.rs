//! Many cases, and failures made small.

use std::collections::BTreeMap;

use cpum::cpuid::FeatureBit;

use super::compare::{self, Tolerance, differences};
use super::generate::{Focus, Generator};
use super::guest::{Disturbance, Guest, HANGS, Outcome};
use super::mode::Mode;
use super::program::{Assembled, Case, Item};
use crate::allowance::Allowance;
use crate::board::Kind;

/// What to run.
#[derive(Clone)]
pub struct Session {
    pub mode: Mode,
    pub engines: [Kind; 2],
    pub seed: u64,
    pub instructions: u64,
    pub focus: Focus,
    pub tolerance: Tolerance,
    pub disturbance: Disturbance,
    /// Features that the second side's CPUID lacks: a difference on purpose.
    pub hidden: Vec<FeatureBit>,
    /// Kinds of failures after which to stop.
    pub most: usize,
}

#[derive(Default)]
pub struct Report {
    /// Instructions of the programs, each counted once.
    pub instructions: u64,
    pub cases: u64,
    /// Exceptions by vector, on the first side.
    pub exceptions: BTreeMap<u8, u64>,
    /// Runs that were disturbed.
    pub disturbed: u64,
    /// Programs that did not end as they should, on both sides alike, and the last such end.
    pub lost: (u64, String),
    /// Programs whose differences are excused ([`Allowance::excuse`]), by reason.
    pub excused: BTreeMap<&'static str, u64>,
    /// Failures as text, by the instructions involved; how often each came up.
    pub failures: BTreeMap<String, (String, u64)>,
    pub statistics: Vec<(&'static str, u64)>,
}

impl Session {
    pub fn new(mode: Mode, engines: [Kind; 2], seed: u64, instructions: u64) -> Self {
        Self {
            mode,
            engines,
            seed,
            instructions,
            focus: Focus::All,
            tolerance: Tolerance {
                flags_at_faults: engines.contains(&Kind::Recompiler),
                allowance: Allowance::of(&engines),
                ..Tolerance::default()
            },
            disturbance: Disturbance::None,
            hidden: Vec::new(),
            most: 10,
        }
    }

    fn guests(&self) -> [Guest; 2] {
        let lacks: Vec<FeatureBit> = self.engines.iter().flat_map(|engine| engine.lacks()).collect();
        let a = Guest::new(self.mode, self.engines[0], &lacks);
        let mut b = Guest::new(self.mode, self.engines[1], &[self.hidden.as_slice(), &lacks].concat());
        match self.disturbance {
            Disturbance::None => {}
            Disturbance::Interrupts => b.disturb(self.disturbance, &[]),
            Disturbance::Switches => b.disturb(self.disturbance, &[self.engines[0]]),
        }
        [a, b]
    }

    fn check(
        &self,
        guests: &mut [Guest; 2],
        case: &Case,
        assembled: &Assembled,
        mut report: Option<&mut Report>,
    ) -> Vec<String> {
        let [a, b] = guests;
        let x = a.run(&case.start, assembled);
        let y = b.run(&case.start, assembled);
        let excuse = self.tolerance.allowance.excuse(self.mode, assembled, &x);
        let hangs = |o: &Outcome| o.end.as_ref().is_err_and(|e| e.starts_with(HANGS));
        let lost = hangs(&x) && hangs(&y);
        if let Some(report) = report.as_deref_mut() {
            if let Err(end) = &x.end {
                let last = compare::last(self.mode, &x.log);
                report.lost =
                    (report.lost.0 + 1, format!("{end}, after {last}\n{}", listing(case, assembled)));
            }
            for vector in vectors(self.mode, &x.log) {
                *report.exceptions.entry(vector).or_default() += 1;
            }
        }
        // Where both were stopped for taking too long, they stand anywhere.
        let found = if lost { Vec::new() } else { differences(self.mode, assembled, &x, &y, self.tolerance) };
        if let Some(why) = excuse.filter(|_| !found.is_empty()) {
            if let Some(report) = report {
                *report.excused.entry(why).or_default() += 1;
            }
            // The second side may have destroyed anything.
            *guests = self.guests();
            return Vec::new();
        }
        found
    }

    /// Runs cases until the instructions are used up or enough has failed.
    pub fn run(&self) -> Report {
        let mut report = Report::default();
        let allowance = self.tolerance.allowance;
        let mut generator = Generator::new(self.mode, self.seed, self.focus, allowance);
        let mut guests = self.guests();
        let mut history: Vec<Case> = Vec::new();
        while report.instructions < self.instructions && report.failures.len() < self.most {
            let case = generator.case(allowance.groups());
            let Some(assembled) = case.assemble() else { continue };
            report.instructions += assembled.placed.len() as u64;
            report.cases += 1;
            let lost = report.lost.0;
            let found = self.check(&mut guests, &case, &assembled, Some(&mut report));
            if report.lost.0 != lost && found.is_empty() {
                // It may have destroyed the monitor.
                report.lost.1 += &format!(" (case {})", report.cases);
                guests = self.guests();
                history.clear();
                continue;
            }
            if found.is_empty() {
                history.push(case);
                if history.len() > 64 {
                    history.remove(0);
                }
                continue;
            }
            let (kind, text) = self.explain(&case, &history, report.cases, &found);
            report.failures.entry(kind).or_insert((text, 0)).1 += 1;
            report.disturbed += guests[1].disturbed;
            guests = self.guests();
            history.clear();
        }
        report.disturbed += guests[1].disturbed;
        report.statistics = guests[1].statistics();
        report
    }

    /// Makes a failing case small and describes it.
    fn explain(&self, case: &Case, history: &[Case], number: u64, found: &[String]) -> (String, String) {
        let fails = |case: &Case| {
            let Some(assembled) = case.assemble() else { return false };
            let mut guests = self.guests();
            let tries = if self.disturbance == Disturbance::None { 1 } else { 8 };
            (0..tries).any(|_| !self.check(&mut guests, case, &assembled, None).is_empty())
        };
        let alone = fails(case);
        let small = if alone { minimise(case, fails) } else { case.clone() };
        let Some(assembled) = small.assemble() else { return (String::new(), String::new()) };
        let mut text = format!("case {number} of seed {} in {:?}", self.seed, self.mode);
        if !alone {
            text += &format!(
                "; not on fresh machines: {} cases ran before it on these{}",
                history.len(),
                if history.is_empty() { ", so it is not reproducible" } else { "" }
            );
        }
        let found = if alone {
            let mut guests = self.guests();
            let again = self.check(&mut guests, &small, &assembled, None);
            if again.is_empty() { found.to_vec() } else { again }
        } else {
            found.to_vec()
        };
        text += &format!("\n{}  {}\n", listing(&small, &assembled), found.join("\n  "));
        let kind = if alone {
            small
                .groups
                .iter()
                .flat_map(|g| &g.items)
                .filter_map(|i| match i {
                    Item::Insn(i) | Item::Patch(i, ..) => Some(format!("{:?}", i.code())),
                    Item::Branch(code, _) => Some(format!("{code:?}")),
                    _ => None,
                })
                .collect::<Vec<_>>()
                .join(" ")
        } else {
            format!("case {number}")
        };
        (kind, text)
    }
}

fn vectors(mode: Mode, log: &[u32]) -> Vec<u8> {
    let fixed = match mode.monitor_bits() {
        16 => 4,
        32 if mode.user() => 8,
        32 => 6,
        _ => 9,
    };
    let mut list = Vec::new();
    let mut at = 0;
    while let Some(word) = log.get(at) {
        let vector = *word as u8;
        list.push(vector);
        at += fixed + usize::from(matches!(vector, 1 | 3 | 4 | 0x80));
    }
    list
}

/// The program as text, with the registers it starts from.
pub fn listing(case: &Case, assembled: &Assembled) -> String {
    let mut text = String::new();
    for placed in &assembled.placed {
        text += &format!("  {:#x}: {}\n", placed.ip, placed.insn);
    }
    let names = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"];
    for (n, value) in case.start.gpr.iter().enumerate() {
        match names.get(n) {
            Some(name) => text += &format!("  {name}={value:#x}"),
            None => text += &format!("  r{n}={value:#x}"),
        }
    }
    let x = &case.start.xsave.0;
    let half = |at: usize| u16::from_le_bytes([x[at], x[at + 1]]);
    text += &format!(
        "\n  flags={:#x} mxcsr={:#x} fcw={:#x} rounds={}\n",
        case.start.rflags,
        half(24),
        half(0),
        case.start.rounds
    );
    text
}

/// Removes groups, then single instructions, as long as `fails` stays true.
fn minimise(case: &Case, fails: impl Fn(&Case) -> bool) -> Case {
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
            break;
        }
        chunk = chunk.div_ceil(2).max(1);
    }
    for g in 0..best.groups.len() {
        let mut i = 0;
        while i < best.groups[g].items.len() {
            let mut attempt = best.clone();
            // Marks and counters hold loops together.
            if matches!(attempt.groups[g].items[i], Item::Insn(_) | Item::Define) {
                attempt.groups[g].items.remove(i);
                if fails(&attempt) {
                    best = attempt;
                    continue;
                }
            }
            i += 1;
        }
    }
    let mut attempt = best.clone();
    for function in &mut attempt.functions {
        function.items.clear();
    }
    if fails(&attempt) {
        best = attempt;
    }
    for rounds in [1, 2, 3, 5] {
        if rounds < best.start.rounds {
            let mut attempt = best.clone();
            attempt.start.rounds = rounds;
            if fails(&attempt) {
                best = attempt;
                break;
            }
        }
    }
    best
}
