//! A sample of the differential test; `cargo run --release -p iem --example differential` is the heavy one.

mod harness;

use harness::generate::Focus;

#[test]
fn random_sequences_agree_with_the_host() {
    let report = harness::session::run(0x0b0c, 40_000, Focus::All, 3);
    for (kind, (text, count)) in &report.failures {
        println!("{kind} ({count} times)\n{text}\n");
    }
    assert!(report.failures.is_empty());
    // The sequences must mostly run to their end for the test to mean anything.
    let ended = report.traps.get(&3).copied().unwrap_or(0);
    assert!(ended * 10 > report.sequences * 6, "{:?}", report.traps);
}
