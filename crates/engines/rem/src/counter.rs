//! The host's time-stamp counter as the source of virtual time, so that guests read it without leaving generated code.
#![allow(unsafe_code)] // reads the counter

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the rate is measured.
const SPAN: Duration = Duration::from_millis(20);

/// The counter now.
pub fn read() -> u64 {
    // SAFETY: every processor of this architecture has the instruction; Linux does not forbid it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The counter and the time at about the same moment: the closest of some readings.
fn pair() -> (u64, Instant) {
    let mut best = (u64::MAX, 0, Instant::now());
    for _ in 0..8 {
        let before = read();
        let now = Instant::now();
        let after = read();
        if after.wrapping_sub(before) < best.0 {
            best = (after.wrapping_sub(before), before + after.wrapping_sub(before) / 2, now);
        }
    }
    (best.1, best.2)
}

/// The counter's rate in ticks per second, measured once against the host's clock; `None` if it does not run at a steady rate or
/// the host's kernel does not trust it to be the same on all CPUs.
pub fn rate() -> Option<u64> {
    static RATE: OnceLock<Option<u64>> = OnceLock::new();
    *RATE.get_or_init(measure)
}

fn measure() -> Option<u64> {
    const INVARIANT: u32 = 1 << 8;
    let steady = iem::host_cpuid(0x8000_0000, 0).eax >= 0x8000_0007
        && iem::host_cpuid(0x8000_0007, 0).edx & INVARIANT != 0;
    let source =
        std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/available_clocksource").ok()?;
    if !steady || !source.split_whitespace().any(|s| s == "tsc") {
        return None;
    }
    let (from, start) = pair();
    std::thread::sleep(SPAN);
    let (to, end) = pair();
    let nanos = end.duration_since(start).as_nanos();
    u64::try_from(u128::from(to.wrapping_sub(from)) * 1_000_000_000 / nanos.max(1))
        .ok()
        .filter(|&hz| hz > 100_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_rate_holds_over_a_longer_time() {
        let Some(hz) = rate() else { return };
        let (from, start) = pair();
        std::thread::sleep(Duration::from_millis(100));
        let (to, end) = pair();
        let expected = end.duration_since(start).as_secs_f64() * hz as f64;
        assert!(((to - from) as f64 / expected - 1.0).abs() < 1e-3);
    }
}
