//! Samples of the lockstep of random programs; the example `lockstep` runs as many as one likes.

use conformance::Kind;
use conformance::stream::{Disturbance, Mode, Report, Session};

/// Instructions for each mode.
const SAMPLE: u64 = 8_000;

fn failures(report: &Report) -> String {
    report.failures.values().map(|(text, _)| text.as_str()).collect::<Vec<_>>().join("\n")
}

fn run_all(disturbance: Disturbance, seed: u64) {
    for engine in Kind::ALL {
        for mode in Mode::ALL.into_iter().filter(|m| disturbance.fits(*m)) {
            let mut session = Session::new(mode, [Kind::Interpreter, *engine], seed, SAMPLE);
            session.disturbance = disturbance;
            let report = session.run();
            assert!(report.failures.is_empty(), "{mode:?} on {engine:?}\n{}", failures(&report));
            assert_eq!(report.lost.0, 0, "programs that did not end in {mode:?}: {}", report.lost.1);
            // The programs must have come through most of what handlers see.
            assert!(report.exceptions.len() >= 6, "{mode:?}: {:?}", report.exceptions);
        }
    }
}

#[test]
fn random_programs_leave_the_same_state_on_every_engine_in_every_mode() {
    run_all(Disturbance::None, 11);
}

#[test]
fn interrupts_at_any_time_change_nothing_that_a_program_computes() {
    run_all(Disturbance::Interrupts, 12);
}

#[test]
fn a_program_goes_on_where_another_engine_left_it() {
    run_all(Disturbance::Switches, 13);
}

#[test]
fn a_difference_planted_on_one_side_is_found_and_made_small() {
    let mut session = Session::new(Mode::User64, [Kind::Interpreter; 2], 5, 40_000);
    session.hidden = vec![cpum::cpuid::bit::BMI1];
    session.most = 1;
    let report = session.run();
    let (kind, (text, _)) = report.failures.first_key_value().expect("a difference");
    let forms = ["Andn", "Bextr", "Blsi", "Blsr", "Blsmsk", "Tzcnt"];
    assert!(forms.iter().any(|f| kind.contains(f)), "{kind}\n{text}");
    // A handful of instructions at most, with what prepares them.
    assert!(kind.split(' ').count() <= 6, "{kind}\n{text}");
}
