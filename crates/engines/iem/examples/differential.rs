//! Runs random instruction sequences on the interpreter and on the host's CPU and compares what they leave.
//!
//! `cargo run --release -p iem --example differential -- [--instructions N] [--seed N] [--focus all|integer|vector|x87]
//! [--failures N]`. The seed is printed; a failing sequence is printed minimised. Exit status 1 if anything differs.

#[path = "../tests/differential/harness/mod.rs"]
mod harness;

use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use harness::generate::{Focus, Generator};

fn main() -> ExitCode {
    let mut instructions = 1_000_000;
    let mut seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let mut focus = Focus::All;
    let mut most = 20;
    let mut arguments = std::env::args().skip(1);
    while let Some(option) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        let number = value.parse::<u64>().ok();
        match (option.as_str(), number, value.as_str()) {
            ("--instructions", Some(n), _) => instructions = n as usize,
            ("--seed", Some(n), _) => seed = n,
            ("--failures", Some(n), _) => most = n as usize,
            ("--focus", _, "all") => focus = Focus::All,
            ("--focus", _, "integer") => focus = Focus::Integer,
            ("--focus", _, "vector") => focus = Focus::Vector,
            ("--focus", _, "x87") => focus = Focus::X87,
            _ => {
                eprintln!("unknown option or value: {option} {value}");
                return ExitCode::from(2);
            }
        }
    }
    println!("seed {seed}, {instructions} instructions, focus {focus:?}");
    let [integer, sse, avx, x87, mmx] = Generator::new(seed, focus).sizes();
    println!("forms: {integer} integer, {sse} SSE, {avx} AVX, {x87} x87, {mmx} MMX");
    let start = Instant::now();
    let report = harness::session::run(seed, instructions, focus, most);
    for (kind, (text, count)) in &report.failures {
        println!("\n{kind} ({count} times)\n{text}");
    }
    println!(
        "{} instructions in {} sequences ({} executed, with register set-up), {:.1} s; ended by vector: {:?}; {} kinds of differences",
        report.instructions,
        report.sequences,
        report.reached,
        start.elapsed().as_secs_f64(),
        report.traps,
        report.failures.len()
    );
    if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
