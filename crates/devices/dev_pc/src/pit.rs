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
    /// No count written since the mode was set, or a triggered mode that was not triggered yet.
    Waiting,
    /// Counting since tick `since`; it lies in the future until the count is loaded.
    Counting { since: i64 },
    /// Stopped by the gate after `done` ticks.
    Stopped { done: i64 },
}

/// A count that was written and waits to be loaded: at tick `at`, or at the next trigger if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Waiting {
    count: i64,
    at: Option<i64>,
}

#[derive(Clone, Debug)]
struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// The count in use, 1–65536 (10000 in BCD).
    count: i64,
    /// A count was written since the mode was set.
    written: bool,
    next: Option<Waiting>,
    phase: Phase,
    /// Low byte of a 16-bit count being written.
    write_low: Option<u8>,
    /// The next byte read is the high one.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// The tick up to which output edges have been reported.
    seen: i64,
}

impl Channel {
    fn power_on(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            gate,
            count: 0x1_0000,
            written: false,
            next: None,
            phase: Phase::Waiting,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
            seen: 0,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Ticks counted at `now`; `None` before the count is loaded.
    fn done(&self, now: i64) -> Option<i64> {
        match self.phase {
            Phase::Waiting => None,
            Phase::Counting { since } => (now >= since).then(|| now - since),
            Phase::Stopped { done } => Some(done),
        }
    }

    /// Ticks of mode 3's high half: the longer one of an odd count.
    fn high_half(count: i64) -> i64 {
        (count + 1) / 2
    }

    fn out(&self, now: i64) -> bool {
        let Some(done) = self.done(now) else { return self.mode != 0 };
        let stopped = matches!(self.phase, Phase::Stopped { .. });
        match self.mode {
            0 | 1 => done >= self.count,
            2 => stopped || self.count == 1 || done % self.count != self.count - 1,
            3 => stopped || done % self.count < Self::high_half(self.count),
            _ => done != self.count,
        }
    }

    /// The counter's value, binary or BCD as it is read.
    fn value(&self, now: i64) -> u16 {
        let done = self.done(now).unwrap_or(0);
        let value = match self.mode {
            2 => self.count - done % self.count,
            3 => {
                let at = done % self.count;
                let half = Self::high_half(self.count);
                (self.count & !1) - 2 * if at < half { at } else { at - half }
            }
            _ => self.count - done,
        };
        if self.bcd { to_bcd(value.rem_euclid(10_000) as u16) } else { value as u16 }
    }

    fn status(&self, now: i64) -> u8 {
        let unloaded = !self.written
            || self.next.is_some()
            || matches!(self.phase, Phase::Counting { since } if now < since);
        u8::from(self.out(now)) << 7
            | u8::from(unloaded) << 6
            | (self.access as u8) << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    /// The tick of a one-shot mode's rising edge.
    fn shot(&self, since: i64) -> i64 {
        since + self.count + i64::from(self.mode >= 4)
    }

    /// Rising edges of the output after `from` up to and including `to`, with the count in use.
    fn rises(&self, from: i64, to: i64) -> u64 {
        let Phase::Counting { since } = self.phase else { return 0 };
        if self.is_periodic() {
            let periods = |at: i64| (at - since).max(0) / self.count;
            (periods(to) - periods(from)).max(0) as u64
        } else {
            let shot = self.shot(since);
            u64::from(from < shot && shot <= to)
        }
    }

    /// Brings the channel to tick `now`: the rising edges of its output meanwhile.
    fn advance(&mut self, now: i64) -> u64 {
        let mut edges = 0;
        if let Some(Waiting { count, at: Some(at) }) = self.next
            && at <= now
        {
            edges += self.rises(self.seen, at);
            self.seen = self.seen.max(at);
            if let Phase::Counting { since } = self.phase {
                // In mode 3 a count may come in at the end of the high half; the low half is then its first.
                let in_low_half = self.mode == 3 && (at - since).rem_euclid(self.count) != 0;
                self.phase =
                    Phase::Counting { since: if in_low_half { at - Self::high_half(count) } else { at } };
            }
            self.count = count;
            self.next = None;
        }
        edges += self.rises(self.seen, now);
        self.seen = self.seen.max(now);
        edges
    }

    /// The next tick after `now` at which [`Channel::advance`] has something to report or to do.
    fn next_event(&self, now: i64) -> Option<i64> {
        let Phase::Counting { since } = self.phase else { return None };
        let rise = if self.is_periodic() {
            Some(since + ((now - since).max(0) / self.count + 1) * self.count)
        } else {
            Some(self.shot(since)).filter(|&shot| shot > now)
        };
        let load = self.next.and_then(|next| next.at);
        rise.into_iter().chain(load).min()
    }

    fn control(&mut self, control: Control) {
        self.mode = match control.mode() {
            mode @ 0..=5 => mode,
            mode => mode & 3,
        };
        self.bcd = control.bcd();
        self.access = match control.access() {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        self.written = false;
        self.next = None;
        self.phase = Phase::Waiting;
        self.write_low = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn write(&mut self, value: u8, now: i64) {
        let raw = match (self.access, self.write_low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (Access::Both, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counter and sets the output low.
                    self.phase = Phase::Waiting;
                }
                return;
            }
        };
        let raw = if self.bcd { from_bcd(raw) } else { raw };
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = if raw == 0 { modulus } else { i64::from(raw) };
        self.written = true;
        match self.phase {
            _ if self.is_triggered() => self.next = Some(Waiting { count, at: None }),
            Phase::Counting { since } if self.is_periodic() && since <= now => {
                let into = (now - since) % self.count;
                let period = now - into;
                let half = Self::high_half(self.count);
                let at = if self.mode == 3 && into < half { period + half } else { period + self.count };
                self.next = Some(Waiting { count, at: Some(at) });
            }
            Phase::Stopped { .. } if self.is_periodic() => self.next = Some(Waiting { count, at: None }),
            _ => {
                self.count = count;
                self.next = None;
                self.phase =
                    if self.gate { Phase::Counting { since: now + 1 } } else { Phase::Stopped { done: 0 } };
            }
        }
    }

    fn set_gate(&mut self, gate: bool, now: i64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        if self.is_triggered() || self.is_periodic() {
            if gate && self.written {
                if let Some(next) = self.next.take() {
                    self.count = next.count;
                }
                self.phase = Phase::Counting { since: now + 1 };
            } else if !gate && self.is_periodic() && self.phase != Phase::Waiting {
                self.phase = Phase::Stopped { done: self.done(now).unwrap_or(0) };
                if let Some(next) = &mut self.next {
                    next.at = None;
                }
            }
        } else {
            self.phase = match self.phase {
                Phase::Stopped { done } if gate => Phase::Counting { since: now - done },
                Phase::Counting { .. } if !gate => Phase::Stopped { done: self.done(now).unwrap_or(0) },
                phase => phase,
            };
        }
    }

    fn latch_count(&mut self, now: i64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
        }
    }

    fn read(&mut self, now: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched_count.unwrap_or_else(|| self.value(now));
        let high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.read_high = !self.read_high;
                !self.read_high
            }
        };
        if self.access != Access::Both || high {
            self.latched_count = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    fn save(&self, out: &mut ssm::Writer) {
        let Self {
            mode,
            bcd,
            access,
            gate,
            count,
            written,
            next,
            phase,
            write_low,
            read_high,
            latched_count,
            latched_status,
            seen,
        } = self;
        out.put_bytes(&[*mode, *access as u8]);
        for flag in [bcd, gate, written, read_high] {
            out.put_bool(*flag);
        }
        out.put_u32(*count as u32);
        let (kind, at, waiting) = match next {
            None => (0, 0, 0),
            Some(Waiting { count, at: None }) => (1, 0, *count),
            Some(Waiting { count, at: Some(at) }) => (2, *at, *count),
        };
        out.put_u8(kind);
        out.put_u64(at as u64);
        out.put_u32(waiting as u32);
        let (kind, tick) = match phase {
            Phase::Waiting => (0, 0),
            Phase::Counting { since } => (1, *since),
            Phase::Stopped { done } => (2, *done),
        };
        out.put_u8(kind);
        out.put_u64(tick as u64);
        for byte in [write_low, latched_status] {
            out.put_bool(byte.is_some());
            out.put_u8(byte.unwrap_or(0));
        }
        out.put_bool(latched_count.is_some());
        out.put_u16(latched_count.unwrap_or(0));
        out.put_u64(*seen as u64);
    }

    fn load(input: &mut ssm::Reader<'_>) -> Result<Self, ssm::Error> {
        /// Ticks stay far below this for as long as nanoseconds fit 64 bits.
        const FAR: i64 = 1 << 60;
        fn tick(input: &mut ssm::Reader<'_>) -> Result<i64, ssm::Error> {
            let value = input.take_u64()? as i64;
            if (-FAR..FAR).contains(&value) { Ok(value) } else { Err(input.invalid(format!("tick {value}"))) }
        }
        fn count(input: &mut ssm::Reader<'_>, lowest: i64) -> Result<i64, ssm::Error> {
            let value = i64::from(input.take_u32()?);
            if (lowest..=0x1_0000).contains(&value) {
                Ok(value)
            } else {
                Err(input.invalid(format!("count {value}")))
            }
        }
        fn byte(input: &mut ssm::Reader<'_>) -> Result<Option<u8>, ssm::Error> {
            let some = input.take_bool()?;
            let value = input.take_u8()?;
            Ok(some.then_some(value))
        }
        let mode = input.take_u8()?;
        if mode > 5 {
            return Err(input.invalid(format!("mode {mode}")));
        }
        let access = match input.take_u8()? {
            1 => Access::Low,
            2 => Access::High,
            3 => Access::Both,
            other => return Err(input.invalid(format!("access {other}"))),
        };
        let [bcd, gate, written, read_high] =
            [input.take_bool()?, input.take_bool()?, input.take_bool()?, input.take_bool()?];
        let in_use = count(input, 1)?;
        let (kind, at, waiting) = (input.take_u8()?, tick(input)?, count(input, 0)?);
        let next = match (kind, waiting) {
            (0, _) => None,
            (1, 1..) => Some(Waiting { count: waiting, at: None }),
            (2, 1..) => Some(Waiting { count: waiting, at: Some(at) }),
            _ => return Err(input.invalid(format!("waiting count {waiting} of kind {kind}"))),
        };
        let phase = match (input.take_u8()?, tick(input)?) {
            (0, _) => Phase::Waiting,
            (1, since) => Phase::Counting { since },
            (2, done @ 0..) => Phase::Stopped { done },
            (kind, _) => return Err(input.invalid(format!("phase {kind}"))),
        };
        let (write_low, latched_status) = (byte(input)?, byte(input)?);
        let (is_latched, latched) = (input.take_bool()?, input.take_u16()?);
        Ok(Self {
            mode,
            bcd,
            access,
            gate,
            count: in_use,
            written,
            next,
            phase,
            write_low,
            read_high,
            latched_count: is_latched.then_some(latched),
            latched_status,
            seen: tick(input)?,
        })
    }
}

fn to_bcd(value: u16) -> u16 {
    (value % 10) | ((value / 10 % 10) << 4) | (value / 100 % 10) << 8 | (value / 1000 % 10) << 12
}

/// The value of four BCD digits; digits above nine count as they are weighted.
fn from_bcd(raw: u16) -> u16 {
    (0..4).rev().fold(0, |value, digit| value * 10 + (raw >> (4 * digit) & 0xf)) % 10_000
}

/// Guest-visible state.
#[derive(Clone, Debug)]
pub struct State {
    channels: [Channel; 3],
    /// Bits 0–3 of port 0x61 as written.
    port_b: PortB,
}

impl State {
    pub fn power_on() -> Self {
        Self {
            channels: [Channel::power_on(true), Channel::power_on(true), Channel::power_on(false)],
            port_b: PortB::new(),
        }
    }

    /// Reads a port at tick `now`.
    pub fn read(&mut self, port: Port, now: i64) -> u8 {
        match port.0 {
            0x40..=0x42 => {
                let channel = &mut self.channels[usize::from(port.0 - 0x40)];
                channel.advance(now);
                channel.read(now)
            }
            0x61 => {
                self.channels[2].advance(now);
                self.port_b
                    .with_refresh((now / REFRESH_TICKS) & 1 != 0)
                    .with_timer2_out(self.channels[2].out(now))
                    .into_bits()
            }
            _ => 0xff,
        }
    }

    /// Writes a port at tick `now`; channel 0 must have been advanced to it.
    pub fn write(&mut self, port: Port, value: u8, now: i64) {
        match port.0 {
            0x40..=0x42 => {
                let channel = &mut self.channels[usize::from(port.0 - 0x40)];
                channel.advance(now);
                channel.write(value, now);
            }
            0x43 => self.command(value, now),
            0x61 => {
                self.port_b = PortB::from_bits(value & 0x0f);
                self.channels[2].advance(now);
                self.channels[2].set_gate(self.port_b.timer2_gate(), now);
            }
            _ => {}
        }
    }

    fn command(&mut self, value: u8, now: i64) {
        let control = Control::from_bits(value);
        if control.select() == 3 {
            let read_back = ReadBack::from_bits(value);
            for (index, channel) in self.channels.iter_mut().enumerate() {
                if read_back.channels() & 1 << index == 0 {
                    continue;
                }
                channel.advance(now);
                if !read_back.no_count() {
                    channel.latch_count(now);
                }
                if !read_back.no_status() && channel.latched_status.is_none() {
                    channel.latched_status = Some(channel.status(now));
                }
            }
            return;
        }
        let channel = &mut self.channels[usize::from(control.select())];
        channel.advance(now);
        if control.access() == 0 {
            channel.latch_count(now);
        } else {
            channel.control(control);
        }
    }
}

/// The timer as a device.
pub struct Pit {
    irq: IrqLine,
    timer: Timer,
    state: State,
    /// IRQ 0 edges given so far.
    interrupts: u64,
}

impl Pit {
    /// A timer whose channel 0 drives `irq` (IRQ 0).
    pub fn new(irq: IrqLine, timers: &Arc<TimerQueue>) -> Arc<Mutex<Self>> {
        tm::with_timers(|handler| Self {
            irq,
            timer: timers.create(handler, 0),
            state: State::power_on(),
            interrupts: 0,
        })
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        iom.register(Port(0x40), 4, Width::Byte, this.clone());
        iom.register(Port(0x61), 1, Width::Byte, this.clone());
    }

    fn clock(&self) -> &Clock {
        self.timer.clock()
    }

    fn now(&self) -> i64 {
        tick_at(self.clock().now())
    }

    /// Gives edges up to `now` to the interrupt line.
    fn advance(&mut self, now: i64) {
        if self.state.channels[0].advance(now) > 0 {
            self.edge();
        }
    }

    fn edge(&mut self) {
        self.interrupts += 1;
        self.irq.set(false);
        self.irq.set(true);
    }

    fn arm(&self, now: i64) {
        /// A guest that asks for more interrupts than this is served at this rate: one in 50 µs.
        const FASTEST: i64 = 60;
        let deadline = self.state.channels[0].next_event(now).map(|tick| {
            let tick = if self.state.channels[0].is_periodic() { tick.max(now + FASTEST) } else { tick };
            tm::deadline(tick.max(0) as u64, HZ)
        });
        self.timer.set(deadline);
    }
}

fn tick_at(now: Nanos) -> i64 {
    tm::ticks(now, HZ) as i64
}

impl PortIo for Pit {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        let now = self.now();
        self.advance(now);
        self.state.read(port, now).into()
    }

    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        let now = self.now();
        self.advance(now);
        let before = self.state.channels[0].out(now);
        self.state.write(port, value as u8, now);
        let after = self.state.channels[0].out(now);
        if after && !before {
            self.edge();
        } else if !after {
            self.irq.set(false);
        }
        self.arm(now);
    }
}

impl TimerTarget for Pit {
    fn timer_fired(&mut self, _: u32, now: Nanos) {
        let now = tick_at(now);
        self.advance(now);
        self.arm(now);
    }
}

impl Device for Pit {
    fn reset(&mut self) {
        self.state = State::power_on();
        self.interrupts = 0;
        self.irq.set(false);
        self.arm(self.now());
    }
}

impl ssm::Saveable for Pit {
    fn unit_name(&self) -> &'static str {
        "i8254"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State { channels, port_b } = &self.state;
        for channel in channels {
            channel.save(out);
        }
        out.put_u8(port_b.into_bits());
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let channels = [Channel::load(&mut input)?, Channel::load(&mut input)?, Channel::load(&mut input)?];
        let port_b = PortB::from_bits(input.take_u8()? & 0x0f);
        input.finish()?;
        self.state = State { channels, port_b };
        let now = self.now();
        self.irq.set(self.state.channels[0].out(now));
        self.arm(now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: Port = Port(0x43);

    fn program(s: &mut State, channel: u8, mode: u8, count: u16, now: i64) {
        s.write(CONTROL, channel << 6 | 0x30 | mode << 1, now);
        let port = Port(0x40 + u16::from(channel));
        s.write(port, count as u8, now);
        s.write(port, (count >> 8) as u8, now);
    }

    fn latched(s: &mut State, channel: u8, now: i64) -> u16 {
        let port = Port(0x40 + u16::from(channel));
        s.write(CONTROL, channel << 6, now);
        u16::from(s.read(port, now)) | u16::from(s.read(port, now)) << 8
    }

    /// Rising edges of channel 0 after tick `from`, up to `to`.
    fn edges(s: &State, from: i64, to: i64) -> Vec<i64> {
        let mut s = s.clone();
        s.channels[0].advance(from);
        (from + 1..=to).filter(|&at| s.channels[0].advance(at) == 1).collect()
    }

    #[test]
    fn mode_0_raises_its_output_once_n_plus_1_ticks_after_the_count() {
        let mut s = State::power_on();
        program(&mut s, 0, 0, 5, 100);
        assert!(!s.channels[0].out(105) && s.channels[0].out(106));
        assert_eq!(edges(&s, 100, 300), [106]);
        assert_eq!(latched(&mut s, 0, 103), 3);
        assert_eq!(latched(&mut s, 0, 107), 0xffff, "it counts on past zero");
    }

    #[test]
    fn mode_2_is_low_for_the_last_tick_of_each_period() {
        let mut s = State::power_on();
        program(&mut s, 0, 2, 4, 0);
        let out: Vec<_> = (1..9).map(|at| s.channels[0].out(at)).collect();
        assert_eq!(out, [true, true, true, false, true, true, true, false]);
        assert_eq!(edges(&s, 0, 14), [5, 9, 13]);
        assert_eq!((1..6).map(|at| latched(&mut s, 0, at)).collect::<Vec<_>>(), [4, 3, 2, 1, 4]);
    }

    #[test]
    fn mode_3_divides_odd_counts_into_a_longer_high_half() {
        let mut s = State::power_on();
        program(&mut s, 0, 3, 5, 0);
        let out: Vec<_> = (1..6).map(|at| s.channels[0].out(at)).collect();
        assert_eq!(out, [true, true, true, false, false]);
        assert_eq!(edges(&s, 0, 12), [6, 11]);
    }

    #[test]
    fn mode_3_counts_by_two() {
        let mut s = State::power_on();
        program(&mut s, 0, 3, 6, 0);
        assert_eq!((1..8).map(|at| latched(&mut s, 0, at)).collect::<Vec<_>>(), [6, 4, 2, 6, 4, 2, 6]);
    }

    #[test]
    fn a_new_count_in_mode_2_takes_over_at_the_end_of_the_period() {
        let mut s = State::power_on();
        program(&mut s, 0, 2, 10, 0);
        s.write(Port(0x40), 4, 3);
        s.write(Port(0x40), 0, 3);
        assert_eq!(edges(&s, 3, 24), [11, 15, 19, 23]);
    }

    #[test]
    fn a_new_count_in_mode_3_takes_over_at_the_end_of_the_half_period() {
        let mut s = State::power_on();
        program(&mut s, 0, 3, 10, 0);
        s.write(Port(0x40), 4, 3);
        s.write(Port(0x40), 0, 3);
        // High until 6, then a low half of two ticks.
        assert_eq!(edges(&s, 3, 17), [8, 12, 16]);
    }

    #[test]
    fn mode_4_strobes_low_for_one_tick() {
        let mut s = State::power_on();
        program(&mut s, 0, 4, 3, 0);
        assert_eq!(
            (1..7).map(|at| s.channels[0].out(at)).collect::<Vec<_>>(),
            [true, true, true, false, true, true]
        );
        assert_eq!(edges(&s, 0, 100), [5]);
    }

    #[test]
    fn mode_1_is_started_and_restarted_by_the_gate() {
        let mut s = State::power_on();
        program(&mut s, 2, 1, 4, 0);
        assert!(s.channels[2].out(50));
        s.write(Port(0x61), 1, 100);
        assert!(!s.channels[2].out(101) && !s.channels[2].out(104) && s.channels[2].out(105));
        s.write(Port(0x61), 0, 103);
        s.write(Port(0x61), 1, 103);
        assert!(!s.channels[2].out(107) && s.channels[2].out(108));
    }

    #[test]
    fn the_gate_holds_mode_0_as_delay_loops_expect() {
        // Linux calibrates the TSC with channel 2 in mode 0, watching bit 5 of port 0x61.
        let mut s = State::power_on();
        s.write(Port(0x61), 0, 0);
        program(&mut s, 2, 0, 1000, 0);
        assert_eq!(s.read(Port(0x61), 5000) & 0x20, 0);
        s.write(Port(0x61), 1, 5000);
        assert_eq!(s.read(Port(0x61), 5999) & 0x20, 0);
        assert_eq!(s.read(Port(0x61), 6000) & 0x21, 0x21);
    }

    #[test]
    fn read_back_latches_status_before_count() {
        let mut s = State::power_on();
        program(&mut s, 0, 2, 100, 0);
        s.write(CONTROL, 0xc2, 11);
        assert_eq!(s.read(Port(0x40), 20), 0xb4, "output high, count loaded, 16 bits, mode 2");
        assert_eq!([s.read(Port(0x40), 30), s.read(Port(0x40), 40)], [90, 0]);
        s.write(CONTROL, 0x34, 50);
        s.write(CONTROL, 0xe2, 50);
        assert_eq!(s.read(Port(0x40), 50) & 0x40, 0x40, "no count loaded yet");
    }

    #[test]
    fn a_latched_count_holds_until_it_is_read() {
        let mut s = State::power_on();
        program(&mut s, 0, 2, 0, 0);
        s.write(CONTROL, 0, 0x101);
        s.write(CONTROL, 0, 0x201);
        assert_eq!(s.read(Port(0x40), 0x301), 0);
        assert_eq!(s.read(Port(0x40), 0x302), 0xff);
        assert_eq!(latched(&mut s, 0, 0x301), 0xfd00);
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut s = State::power_on();
        s.write(CONTROL, 0x35, 0);
        s.write(Port(0x40), 0x00, 0);
        s.write(Port(0x40), 0x10, 0);
        assert_eq!(latched(&mut s, 0, 2), 0x0999);
        assert_eq!(edges(&s, 0, 1500), [1001]);
    }

    #[test]
    fn half_a_day_of_ticks_at_the_bios_rate_is_exact() {
        let timers = TimerQueue::new(Clock::manual());
        let pit = Pit::new(IrqLine::unconnected(), &timers);
        {
            let mut pit = pit.lock();
            for (port, value) in [(0x43, 0x36), (0x40, 0), (0x40, 0)] {
                pit.port_write(Port(port), Width::Byte, value);
            }
        }
        let mut fired = 0;
        let hour = 3600 * 1_000_000_000;
        while let Some(next) = timers.fire_due() {
            if next > hour {
                break;
            }
            timers.clock().advance(next - timers.clock().now());
            fired += 1;
        }
        assert_eq!(fired, (3600 * HZ - 1) / 0x1_0000);
        assert_eq!(pit.lock().interrupts, fired);
    }

    #[test]
    fn the_saved_state_comes_back_byte_for_byte() {
        let timers = TimerQueue::new(Clock::manual());
        let pit = || Pit::new(IrqLine::unconnected(), &timers);
        let one = pit();
        program(&mut one.lock().state, 0, 3, 1234, 17);
        program(&mut one.lock().state, 0, 3, 99, 20);
        one.lock().state.write(Port(0x40), 7, 20);
        one.lock().state.write(CONTROL, 0xce, 21);
        crate::testing::assert_saved_state_survives(&one, &pit());
    }
}
