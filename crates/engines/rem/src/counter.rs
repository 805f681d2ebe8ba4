//! The host's time-stamp counter as the source of virtual time, so that guests read it without leaving generated code.
//!
//! Its rate is measured against the host's monotonic clock. Each end of the measurement is a reading of the clock between two readings of the
//! counter; how far these are apart bounds its error, and the measurement goes on until both errors together are within [`TOLERANCE`] of
//! its length. A guest's clock drifts by no more than that from the host's, and by what the host's own clock is slewed afterwards.
#![allow(unsafe_code)] // reads the counter

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the rate is measured at least, and at most where the host is too busy for a clean reading.
const SPAN: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_millis(500);
/// Error of the rate, in parts per billion, with which the measurement is good enough.
const TOLERANCE: u128 = 4_000;
/// Readings of which the closest counts.
const READINGS: u32 = 32;

/// The counter now.
pub fn read() -> u64 {
    // SAFETY: every processor of this architecture has the instruction; Linux does not forbid it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The counter and the time at about the same moment.
#[derive(Clone, Copy)]
struct Reading {
    counter: u64,
    time: Instant,
    /// How many ticks the two are apart at most.
    error: u64,
}

impl Reading {
    /// The closest of some readings.
    fn take() -> Self {
        let one = || {
            let before = read();
            let time = Instant::now();
            let width = read().wrapping_sub(before);
            Self { counter: before.wrapping_add(width / 2), time, error: width / 2 + 1 }
        };
        (1..READINGS).map(|_| one()).fold(one(), |best, new| if new.error < best.error { new } else { best })
    }

    /// Ticks per second since `start`, and the error of that in parts per billion.
    fn rate_since(&self, start: &Self) -> (u64, u128) {
        let ticks = u128::from(self.counter.wrapping_sub(start.counter));
        let nanos = self.time.duration_since(start.time).as_nanos().max(1);
        let error = u128::from(self.error + start.error) * 1_000_000_000 / ticks.max(1);
        (u64::try_from(ticks * 1_000_000_000 / nanos).unwrap_or(0), error)
    }
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
    let start = Reading::take();
    loop {
        std::thread::sleep(SPAN);
        let end = Reading::take();
        let (hz, error) = end.rate_since(&start);
        if error <= TOLERANCE || end.time.duration_since(start.time) >= LONGEST {
            tracing::debug!(target: "tm", "the host's time-stamp counter has {hz} Hz, within {error} ppb");
            return Some(hz).filter(|&hz| hz > 100_000_000);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_rate_holds_over_a_longer_time() {
        let Some(hz) = rate() else { return };
        let start = Reading::take();
        std::thread::sleep(Duration::from_millis(100));
        let (later, error) = Reading::take().rate_since(&start);
        // Both measurements' errors, and what the kernel slews its clock at most meanwhile.
        let allowed = TOLERANCE + error + 500_000;
        let apart = u128::from(later.abs_diff(hz)) * 1_000_000_000 / u128::from(hz);
        assert!(apart < allowed, "{apart} ppb of {allowed}");
    }

    #[test]
    fn the_error_of_a_rate_is_that_of_both_ends_over_its_length() {
        let time = Instant::now();
        let start = Reading { counter: 1000, time, error: 50 };
        let end = Reading { counter: 1000 + 20_000_000, time: time + Duration::from_millis(10), error: 30 };
        assert_eq!(end.rate_since(&start), (2_000_000_000, 4_000));
    }
}
