//! The Intel 8254 programmable interval timer, and port 0x61 (system control port B) that belongs to its speaker
//! channel.
//!
//! Sources: Intel 8254 datasheet (231164-005); 82371SB (PIIX3) datasheet section 2.5.3.2 for port 0x61.
//! Ports 0x40–0x43 and 0x61. Channel 0 drives IRQ 0, channel 1 the refresh toggle, channel 2 the speaker.
//!
//! Counters are not counted: each is a function of the ticks that have passed since it was loaded. The sub-tick
//! synchronisation of the datasheet is kept where a guest can see it (a count is loaded at the tick after it was written).
//! Deviations: the IRQ line shows rising edges of channel 0's output only, as an edge-triggered input does not see more;
//! edges that the host was too late for are given once; the speaker makes no sound.

use std::sync::Arc;

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::{Device, Iom, IrqLine, PortIo, Width};
use tm::{Clock, Nanos, Timer, TimerQueue, TimerTarget};
use vbox_types::Port;

/// Frequency of the counters' clock: 14.31818 MHz / 12.
pub const HZ: u64 = 1_193_182;

/// Half a period of the refresh toggle of port 0x61, in ticks (15.085 µs).
const REFRESH_TICKS: i64 = 18;

/// The control word of a channel (port 0x43).
#[bitfield(u8)]
struct Control {
    bcd: bool,
    #[bits(3)]
    mode: u8,
    #[bits(2)]
    access: u8,
    #[bits(2)]
    select: u8,
}

/// The read-back command; the latch bits are active low.
#[bitfield(u8)]
struct ReadBack {
    _zero: bool,
    #[bits(3)]
    channels: u8,
    no_status: bool,
    no_count: bool,
    #[bits(2)]
    _select: u8,
}

/// System control port B.
#[bitfield(u8)]
struct PortB {
    timer2_gate: bool,
    speaker: bool,
    #[bits(2)]
    nmi_enables: u8,
    refresh: bool,
    timer2_out: bool,
    #[bits(2)]
    nmi_status: u8,
}

/// Which bytes of a count are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    Both = 3,
}

/// What a counter does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Mode set, no count written yet, or a one-shot not yet triggered.
    Waiting,
    /// Counting since tick `since` (which lies in the future until the count is loaded).
    Counting { since: i64 },
    /// Stopped by the gate after `done` ticks.
    Stopped { done: i64 },
}

#[derive(Clone, Debug)]
struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// The count that is being counted, 1–65536 (10000 in BCD).
    count: i64,
    /// A count written, to be loaded at the next trigger or period.
    next: Option<i64>,
    phase: Phase,
    /// Low byte of a 16-bit count being written.
    write_low: Option<u8>,
    /// The next byte read is the high one.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn power_on(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            gate,
            count: 0x1_0000,
            next: None,
            phase: Phase::Waiting,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn modulus(&self) -> i64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Ticks counted at `now`, `None` before anything is counted.
    fn done(&self, now: i64) -> Option<i64> {
        match self.phase {
            Phase::Waiting => None,
            Phase::Counting { since } => (now >= since).then(|| now - since),
            Phase::Stopped { done } => Some(done),
        }
    }

    /// Ticks of mode 3's high half.
    fn high_half(count: i64) -> i64 {
        (count + 1) / 2
    }

    /// Loads a waiting count of a periodic mode if the period (mode 3: half period) it waits for has ended.
    fn settle(&mut self, now: i64) {
        let (Some(next), Phase::Counting { since }) = (self.next, self.phase) else { return };
        if !self.is_periodic() || self.load_at(now).is_none_or(|at| at > now) {
            return;
        }
        let at = self.load_at(now).unwrap_or(since);
        // In mode 3 the end of the high half starts the low half of the new count.
        let high_ended =
            self.mode == 3 && (at - since).rem_euclid(self.count) == Self::high_half(self.count) % self.count;
        self.phase =
            Phase::Counting { since: if high_ended && self.count > 1 { at - Self::high_half(next) } else { at } };
        self.count = next;
        self.next = None;
    }

    /// When a waiting count of a periodic mode is loaded, as of the tick it was noticed at: kept in `load_tick`.
    fn load_at(&self, _now: i64) -> Option<i64> {
        None
    }
}
