//! A run of many cases.

use std::collections::BTreeMap;

use super::compare::{differences, listing, minimise};
use super::generate::{Case, Focus, Generator};
use super::guest::Guest;
use super::native::Native;

/// Instructions in a sequence.
const SEQUENCE: usize = 20;

pub struct Report {
    /// Instructions under test in the sequences.
    pub instructions: usize,
    /// Instructions up to where sequences ended, with those that prepare registers.
    pub reached: usize,
    pub sequences: usize,
    /// How often sequences ended with each vector.
    pub traps: BTreeMap<u8, usize>,
    /// Minimised failures as text, by the forms involved; one text for each and how often it came up.
    pub failures: BTreeMap<String, (String, usize)>,
}

/// Runs sequences until `instructions` have been generated or `most` kinds of failures were found.
pub fn run(seed: u64, instructions: usize, focus: Focus, most: usize) -> Report {
    let mut native = Native::new();
    let mut guest = Guest::new();
    let mut generator = Generator::new(seed, focus);
    let mut report = Report {
        instructions: 0,
        reached: 0,
        sequences: 0,
        traps: BTreeMap::new(),
        failures: BTreeMap::new(),
    };
    while report.instructions < instructions && report.failures.len() < most {
        let case = generator.case(SEQUENCE);
        report.instructions += case.groups.len();
        report.sequences += 1;
        let mut try_it = |case: &Case| {
            let assembled = case.assemble();
            let iem = guest.run(case, &assembled);
            let host = native.run(&case.start, &assembled.bytes, &case.data, &case.table);
            let differences = differences(&assembled, &iem, &host);
            (assembled, host, differences)
        };
        let (assembled, host, found) = try_it(&case);
        report.reached += assembled.reached(host.state.rip);
        *report.traps.entry(host.trap.vector).or_default() += 1;
        if found.is_empty() {
            continue;
        }
        let small = minimise(&case, |case| !try_it(case).2.is_empty());
        let (assembled, _, found) = try_it(&small);
        let kind = small.groups.iter().map(|g| format!("{:?}", g.insn.code())).collect::<Vec<_>>().join(" ");
        let text = format!("{}  {}", listing(&small, &assembled), found.join("\n  "));
        report.failures.entry(kind).or_insert((text, 0)).1 += 1;
    }
    report
}
