//! Runs random programs in every mode on two engines in lockstep and prints what differs, made small.
//!
//! `cargo run --release -p conformance --example lockstep -- [--engines A,B] [--mode MODE|all] [--instructions N] [--seed N]
//! [--focus all|integer|vector|x87] [--failures N] [--disturb none|interrupts|switches] [--exact-flags]`. `--instructions` counts those of
//! the programs, once for each program. The seed is printed. Exit status 1 if anything differs.

use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use conformance::Kind;
use conformance::stream::generate::Focus;
use conformance::stream::{Disturbance, Mode, Session};

fn main() -> ExitCode {
    let mut instructions = 1_000_000;
    let mut seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let mut modes = Mode::ALL.to_vec();
    let mut template = Session::new(
        Mode::User64,
        [Kind::Interpreter, *Kind::ALL.last().unwrap_or(&Kind::Interpreter)],
        0,
        0,
    );
    let mut exact = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        if option == "--exact-flags" {
            exact = true;
            continue;
        }
        let value = arguments.next().unwrap_or_default();
        let number = value.parse::<u64>().ok();
        let understood = match option.as_str() {
            "--instructions" => number.map(|n| instructions = n),
            "--seed" => number.map(|n| seed = n),
            "--failures" => number.map(|n| template.most = n as usize),
            "--focus" => Focus::parse(&value).map(|f| template.focus = f),
            "--mode" if value == "all" => Some(()),
            "--mode" => Mode::parse(&value).map(|m| modes = vec![m]),
            "--disturb" => match value.as_str() {
                "none" => Some(Disturbance::None),
                "interrupts" => Some(Disturbance::Interrupts),
                "switches" => Some(Disturbance::Switches),
                _ => None,
            }
            .map(|d| template.disturbance = d),
            "--engines" => value
                .split_once(',')
                .and_then(|(a, b)| Some([Kind::parse(a)?, Kind::parse(b)?]))
                .map(|e| template.engines = e),
            _ => None,
        };
        if understood.is_none() {
            eprintln!("unknown option or value: {option} {value}");
            return ExitCode::from(2);
        }
    }
    println!("seed {seed}, {instructions} instructions, {:?}", template.engines);
    let fresh = Session::new(Mode::User64, template.engines, 0, 0);
    template.tolerance = fresh.tolerance;
    template.tolerance.flags_at_faults &= !exact;
    modes.retain(|m| template.disturbance.fits(*m) && template.tolerance.allowance.mode(*m));
    let each = instructions / modes.len().max(1) as u64;
    let mut failed = false;
    for mode in modes {
        let session = Session { mode, seed, instructions: each, ..template.clone() };
        let start = Instant::now();
        let report = session.run();
        for (kind, (text, count)) in &report.failures {
            println!("\n{kind} ({count} times)\n{text}");
        }
        println!(
            "{mode:?}: {} instructions in {} programs, {:.1} s; exceptions {:?}; {} times disturbed; {} lost {}; excused {:?}; {} kinds of differences",
            report.instructions,
            report.cases,
            start.elapsed().as_secs_f64(),
            report.exceptions,
            report.disturbed,
            report.lost.0,
            report.lost.1,
            report.excused,
            report.failures.len()
        );
        failed |= !report.failures.is_empty();
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
