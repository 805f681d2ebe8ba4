//! The high precision event timer of the ICH9: a 14.318 MHz counter with three comparators, at 0xfed00000.
//!
//! Source: IA-PC HPET specification 1.0a. Registers are 64 bits wide and take aligned accesses of 32 and 64 bits. Interrupts: with legacy
//! replacement timer 0 drives ISA interrupt 0 and timer 1 ISA interrupt 8 in place of the 8254 and the clock; else each timer drives the
//! I/O APIC input it selects, 20–23. Message-signalled interrupts are not offered.
//!
//! The counter is derived from virtual time by the exact ratio of its period. Deviations: a comparator that has been passed when it is written
//! fires at once (as in VirtualBox) and a one-shot timer fires once for each time its comparator is written, not at every wrap; periodic
//! interrupts that the host was too late for are given once, and none come faster than every 20 µs.

use std::sync::Arc;

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::iom::mmio_handler;
use pdm::{Device, IrqLine, MmioDevice};
use pgm::{Backing, Layer, Pgm};
use ssm::{Error, Reader, Saveable, Writer};
use tm::{Clock, Nanos, Timer, TimerQueue, TimerTarget};

use crate::memory_map;
use crate::piix3::Wiring;

/// Number of timers.
pub const TIMERS: usize = 3;
/// Femtoseconds in a tick: 14.318180 MHz.
const PERIOD_FS: u64 = 69_841_279;
const FS_PER_NS: u128 = 1_000_000;
/// Size of the register block.
const SIZE: u64 = 0x400;
/// General capabilities: revision 1, three timers, 64 bits, legacy replacement, vendor 8086, period.
pub const CAPABILITIES: u64 =
    0x01 | (TIMERS as u64 - 1) << 8 | 1 << 13 | 1 << 15 | 0x8086 << 16 | PERIOD_FS << 32;
/// I/O APIC inputs that a timer can select.
const FIRST_INPUT: u8 = 20;
const INPUTS: usize = 4;
const SHORTEST_PERIOD_TICKS: u64 = 286;

/// Register offsets.
mod reg {
    pub(super) const CAPABILITIES: u64 = 0x000;
    pub(super) const CONFIG: u64 = 0x010;
    pub(super) const STATUS: u64 = 0x020;
    pub(super) const COUNTER: u64 = 0x0f0;
    pub(super) const TIMER: u64 = 0x100;
    pub(super) const TIMER_SIZE: u64 = 0x20;
}

/// General configuration.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Config {
    enable: bool,
    legacy: bool,
    #[bits(62)]
    _r: u64,
}

/// A timer's configuration and capabilities.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct TimerConfig {
    _r0: bool,
    level: bool,
    interrupt: bool,
    periodic: bool,
    can_periodic: bool,
    is_64bit: bool,
    /// The next write to the comparator sets the accumulator of a periodic timer.
    set_value: bool,
    _r1: bool,
    force_32bit: bool,
    #[bits(5)]
    route: u8,
    fsb: bool,
    can_fsb: bool,
    _r2: u16,
    routes: u32,
}

impl TimerConfig {
    const WRITABLE: u64 = 0x3f4e & !(1 << 14);

    fn reset() -> Self {
        let routes = ((1 << INPUTS) - 1) << FIRST_INPUT;
        Self::new().with_can_periodic(true).with_is_64bit(true).with_routes(routes)
    }
}

/// Ticks that have passed at virtual time `now`.
fn ticks(now: Nanos) -> u64 {
    (u128::from(now) * FS_PER_NS / u128::from(PERIOD_FS)) as u64
}

/// The earliest time at which `tick` has been reached.
fn time_of(tick: u64) -> Nanos {
    u64::try_from((u128::from(tick) * u128::from(PERIOD_FS)).div_ceil(FS_PER_NS)).unwrap_or(u64::MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Comparator {
    config: TimerConfig,
    /// The counter value at which it fires next.
    value: u64,
    period: u64,
    /// It fires when `value` is reached; a one-shot timer is armed by writing its comparator.
    armed: bool,
}

impl Comparator {
    fn mask(&self) -> u64 {
        if self.config.force_32bit() { u32::MAX.into() } else { u64::MAX }
    }

    /// Ticks from `counter` until it fires; 0 if that has passed.
    fn ticks_left(&self, counter: u64) -> u64 {
        let left = self.value.wrapping_sub(counter) & self.mask();
        let passed = left > self.mask() >> 1;
        if passed { 0 } else { left }
    }

    /// Fires if it is due; true if it has.
    fn fire(&mut self, counter: u64) -> bool {
        if !self.armed || self.ticks_left(counter) > 0 {
            return false;
        }
        if self.config.periodic() && self.period != 0 {
            let late = counter.wrapping_sub(self.value) & self.mask();
            let ahead = if self.period < SHORTEST_PERIOD_TICKS { late + SHORTEST_PERIOD_TICKS } else { late };
            let periods = ahead / self.period + 1;
            self.value = self.value.wrapping_add(periods.wrapping_mul(self.period)) & self.mask();
        } else {
            self.armed = false;
        }
        true
    }
}

/// The guest-visible state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    config: Config,
    /// Interrupt status: one bit for each level-triggered timer.
    status: u64,
    /// The counter while it stands; what is to be added to the ticks of virtual time while it runs.
    counter: u64,
    timers: [Comparator; TIMERS],
}

/// Interrupts to give after an access: one bit for each timer that has fired.
pub type Fired = u8;

impl State {
    pub fn power_on() -> Self {
        let timer = Comparator { config: TimerConfig::reset(), value: u64::MAX, period: 0, armed: false };
        Self { config: Config::new(), status: 0, counter: 0, timers: [timer; TIMERS] }
    }

    fn now(&self, now: Nanos) -> u64 {
        if self.config.enable() { self.counter.wrapping_add(ticks(now)) } else { self.counter }
    }

    /// Brings the timers up to `now`; returns those that interrupt.
    pub fn update(&mut self, now: Nanos) -> Fired {
        if !self.config.enable() {
            return 0;
        }
        let counter = self.now(now);
        let mut fired = 0;
        for (i, timer) in self.timers.iter_mut().enumerate() {
            if timer.fire(counter) && timer.config.interrupt() {
                fired |= 1 << i;
                if timer.config.level() {
                    self.status |= 1 << i;
                }
            }
        }
        fired
    }

    /// When [`State::update`] has to be called next.
    pub fn deadline(&self, now: Nanos) -> Option<Nanos> {
        if !self.config.enable() {
            return None;
        }
        let counter = self.now(now);
        let waiting = self.timers.iter().filter(|t| t.armed && t.config.interrupt());
        let left = waiting.map(|t| t.ticks_left(counter)).min()?;
        Some(time_of(ticks(now).saturating_add(left)))
    }

    /// Whether the line of timer `i` is held high.
    fn level(&self, i: usize) -> bool {
        let config = self.timers[i].config;
        config.level() && config.interrupt() && self.config.enable() && self.status & 1 << i != 0
    }

    /// Reads the 64-bit register at `offset`, a multiple of 8.
    pub fn read(&self, offset: u64, now: Nanos) -> u64 {
        match offset {
            reg::CAPABILITIES => CAPABILITIES,
            reg::CONFIG => self.config.into_bits(),
            reg::STATUS => self.status,
            reg::COUNTER => self.now(now),
            _ => match self.timer(offset) {
                Some((i, 0x00)) => self.timers[i].config.into_bits(),
                Some((i, 0x08)) => self.timers[i].value,
                _ => 0,
            },
        }
    }

    /// The timer behind `offset`, and the offset into its registers.
    fn timer(&self, offset: u64) -> Option<(usize, u64)> {
        let at = offset.checked_sub(reg::TIMER)?;
        let i = (at / reg::TIMER_SIZE) as usize;
        (i < TIMERS).then_some((i, at % reg::TIMER_SIZE))
    }

    /// Writes those bits of the register at `offset` (a multiple of 8) that `mask` selects. The state must be up to date.
    pub fn write(&mut self, offset: u64, value: u64, mask: u64, now: Nanos) {
        let put = |old: u64| old & !mask | value & mask;
        match offset {
            reg::CONFIG => {
                let new = Config::from_bits(put(self.config.into_bits()) & 3);
                match (self.config.enable(), new.enable()) {
                    (false, true) => self.counter = self.counter.wrapping_sub(ticks(now)),
                    (true, false) => self.counter = self.now(now),
                    _ => {}
                }
                self.config = new;
            }
            reg::STATUS => self.status &= !(value & mask),
            reg::COUNTER if !self.config.enable() => self.counter = put(self.counter),
            _ => match self.timer(offset) {
                Some((i, 0x00)) => self.write_config(i, put),
                Some((i, 0x08)) => self.write_comparator(i, put, mask),
                _ => {}
            },
        }
    }

    fn write_config(&mut self, i: usize, put: impl Fn(u64) -> u64) {
        let timer = &mut self.timers[i];
        let old = timer.config.into_bits();
        let new = put(old) & TimerConfig::WRITABLE | old & !TimerConfig::WRITABLE;
        timer.config = TimerConfig::from_bits(new);
        timer.value &= timer.mask();
        timer.period &= timer.mask();
        if !timer.config.level() {
            self.status &= !(1 << i);
        }
    }

    fn write_comparator(&mut self, i: usize, put: impl Fn(u64) -> u64, mask: u64) {
        let timer = &mut self.timers[i];
        if timer.config.periodic() {
            // Software that sets both writes the accumulator first (with the bit set), then the period.
            if timer.config.set_value() {
                timer.value = put(timer.value) & timer.mask();
            }
            timer.period = put(timer.period) & timer.mask();
        } else {
            timer.value = put(timer.value) & timer.mask();
        }
        // A 64-bit value may come in two halves; the low one comes first.
        if mask >> 32 != 0 || timer.config.force_32bit() || mask == u64::from(u32::MAX) {
            timer.config.set_set_value(false);
        }
        timer.armed = true;
    }
}

/// The device.
pub struct Hpet {
    wiring: Arc<Wiring>,
    /// ISA interrupts 0 and 8 with legacy replacement.
    legacy: [IrqLine; 2],
    /// I/O APIC inputs 20–23, for each timer.
    inputs: [[IrqLine; INPUTS]; TIMERS],
    clock: Arc<Clock>,
    timer: Timer,
    state: State,
}

impl Hpet {
    pub fn new(wiring: &Arc<Wiring>, timers: &Arc<TimerQueue>) -> Arc<Mutex<Self>> {
        tm::with_timers(|handler| Self {
            wiring: wiring.clone(),
            legacy: [wiring.hpet_legacy(0), wiring.hpet_legacy(8)],
            inputs: std::array::from_fn(|_| std::array::from_fn(|i| wiring.io_apic(FIRST_INPUT + i as u8))),
            clock: timers.clock().clone(),
            timer: timers.create(handler, 0),
            state: State::power_on(),
        })
    }

    /// Gives the device its place in memory.
    pub fn register(this: &Arc<Mutex<Self>>, pgm: &Pgm) {
        pgm.map(memory_map::HPET, SIZE, Layer::Fixed, Backing::mmio(mmio_handler(this, 0)));
    }

    /// The line that timer `i` drives now.
    fn line(&self, i: usize) -> Option<&IrqLine> {
        if self.state.config.legacy() && i < self.legacy.len() {
            return Some(&self.legacy[i]);
        }
        let input = self.state.timers[i].config.route().checked_sub(FIRST_INPUT)?;
        self.inputs[i].get(usize::from(input))
    }

    /// Brings lines and timer in line with the state; `fired` are interrupts to give.
    fn sync(&mut self, fired: Fired, now: Nanos) {
        self.wiring.set_legacy_replacement(self.state.config.legacy());
        for i in 0..TIMERS {
            let level = self.state.level(i);
            let current = self.line(i);
            // A line that the timer has left is low.
            for line in self.inputs[i].iter().chain(self.legacy.get(i)) {
                if current.is_none_or(|c| !std::ptr::eq(c, line)) {
                    line.set(false);
                }
            }
            let Some(line) = current else { continue };
            if level {
                line.set(true);
            } else {
                line.set(false);
                if fired & 1 << i != 0 && !self.state.timers[i].config.level() {
                    line.pulse();
                }
            }
        }
        self.timer.set(self.state.deadline(now));
    }

    fn update(&mut self) -> (Fired, Nanos) {
        let now = self.clock.now();
        (self.state.update(now), now)
    }
}

impl MmioDevice for Hpet {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        let (fired, now) = self.update();
        if fired != 0 {
            self.sync(fired, now);
        }
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        if !aligned {
            data.fill(0xff);
            return;
        }
        let value = self.state.read(offset & !7, now) >> (8 * (offset & 7));
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        let (mut fired, now) = self.update();
        if matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64) {
            let mut bytes = [0; 8];
            bytes[..data.len()].copy_from_slice(data);
            let shift = 8 * (offset & 7);
            let mask = if data.len() == 8 { u64::MAX } else { u64::from(u32::MAX) << shift };
            self.state.write(offset & !7, u64::from_le_bytes(bytes) << shift, mask, now);
            fired |= self.state.update(now);
        }
        self.sync(fired, now);
    }
}

impl TimerTarget for Hpet {
    fn timer_fired(&mut self, _timer: u32, now: Nanos) {
        let fired = self.state.update(now);
        self.sync(fired, now);
    }
}

impl Saveable for Hpet {
    fn unit_name(&self) -> &'static str {
        "hpet"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut Writer) {
        let State { config, status, counter, timers } = &self.state;
        out.put_u64(config.into_bits());
        out.put_u64(*status);
        out.put_u64(*counter);
        for Comparator { config, value, period, armed } in timers {
            out.put_u64(config.into_bits());
            out.put_u64(*value);
            out.put_u64(*period);
            out.put_bool(*armed);
        }
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        let mut state = State::power_on();
        state.config = Config::from_bits(input.take_u64()?);
        state.status = input.take_u64()?;
        state.counter = input.take_u64()?;
        let mut sane = state.config.into_bits() & !3 == 0 && state.status >> TIMERS == 0;
        for timer in &mut state.timers {
            timer.config = TimerConfig::from_bits(input.take_u64()?);
            timer.value = input.take_u64()?;
            timer.period = input.take_u64()?;
            timer.armed = input.take_bool()?;
            let fixed = timer.config.into_bits() & !TimerConfig::WRITABLE;
            sane &= fixed == TimerConfig::reset().into_bits();
            sane &= (timer.value | timer.period) & !timer.mask() == 0 || timer.value == u64::MAX;
        }
        if !sane {
            return Err(input.invalid("a register has reserved bits set"));
        }
        input.finish()?;
        self.state = state;
        self.sync(0, self.clock.now());
        Ok(())
    }
}

impl Device for Hpet {
    fn reset(&mut self) {
        self.state = State::power_on();
        self.sync(0, self.clock.now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_golden, assert_saved_state_survives};
    use pdm::IrqSink;

    /// Counts rising edges and holds levels of all inputs.
    #[derive(Default)]
    struct Inputs(Mutex<[(u32, bool); 24]>);
    impl IrqSink for Inputs {
        fn set_level(&self, pin: u32, level: bool) {
            let (edges, held) = &mut self.0.lock()[pin as usize];
            *edges += u32::from(level && !*held);
            *held = level;
        }
    }

    struct Machine {
        apic: Arc<Inputs>,
        wiring: Arc<Wiring>,
        timers: Arc<TimerQueue>,
        device: Arc<Mutex<Hpet>>,
    }

    fn machine() -> Machine {
        let apic = Arc::new(Inputs::default());
        let wiring = Wiring::new(Arc::new(Inputs::default()), Some(apic.clone()));
        let timers = TimerQueue::new(Clock::manual());
        let device = Hpet::new(&wiring, &timers);
        Machine { apic, wiring, timers, device }
    }

    impl Machine {
        fn read(&self, offset: u64) -> u64 {
            let mut data = [0; 8];
            self.device.lock().mmio_read(0, offset, &mut data);
            u64::from_le_bytes(data)
        }

        fn write(&self, offset: u64, value: u64) {
            self.device.lock().mmio_write(0, offset, &value.to_le_bytes());
        }

        fn write32(&self, offset: u64, value: u32) {
            self.device.lock().mmio_write(0, offset, &value.to_le_bytes());
        }

        /// Moves time to the moment at which the counter, running since time 0 from 0, shows `tick`.
        fn run_to(&self, tick: u64) {
            let clock = self.timers.clock();
            clock.advance(time_of(tick) - clock.now());
            self.timers.fire_due();
        }

        fn edges(&self, input: usize) -> u32 {
            self.apic.0.lock()[input].0
        }

        fn held(&self, input: usize) -> bool {
            self.apic.0.lock()[input].1
        }
    }

    #[test]
    fn the_capabilities_are_those_of_the_chip() {
        let m = machine();
        assert_eq!(m.read(reg::CAPABILITIES), 0x0429_b17f_8086_a201);
        assert_eq!(m.read(reg::TIMER), 0x00f0_0000_0000_0030);
        m.write(reg::TIMER, u64::MAX);
        assert_eq!(m.read(reg::TIMER), 0x00f0_0000_0000_3f7e);
        let mut half = [0; 4];
        m.device.lock().mmio_read(0, 4, &mut half);
        assert_eq!(u32::from_le_bytes(half), PERIOD_FS as u32);
        m.device.lock().mmio_read(0, 2, &mut half);
        assert_eq!(half, [0xff; 4], "unaligned");
    }

    #[test]
    fn the_counter_is_exact_and_stands_while_halted() {
        let m = machine();
        m.timers.clock().advance(12_345);
        assert_eq!(m.read(reg::COUNTER), 0);
        m.write(reg::COUNTER, 1000);
        m.write(reg::CONFIG, 1);
        m.timers.clock().advance(3_600_000_000_000);
        let run = ticks(3_600_000_012_345) - ticks(12_345);
        assert_eq!(m.read(reg::COUNTER), 1000 + run);
        m.write(reg::COUNTER, 0);
        m.write(reg::CONFIG, 0);
        m.timers.clock().advance(1_000_000);
        assert_eq!(m.read(reg::COUNTER), 1000 + run, "not writable while it runs");
    }

    #[test]
    fn a_one_shot_timer_interrupts_once_at_its_comparator() {
        let m = machine();
        m.write(reg::CONFIG, 1);
        m.write(reg::TIMER + 0x20, 21 << 9 | 1 << 2);
        m.write(reg::TIMER + 0x28, 1000);
        m.run_to(999);
        assert_eq!(m.edges(21), 0);
        m.run_to(1000);
        m.run_to(5000);
        assert_eq!((m.edges(21), m.held(21)), (1, false));
        m.write32(reg::TIMER + 0x28, 4000);
        assert_eq!(m.edges(21), 2, "a comparator in the past fires at once");
    }

    #[test]
    fn a_level_triggered_timer_holds_its_line_until_the_status_is_cleared() {
        let m = machine();
        m.write(reg::CONFIG, 1);
        m.write(reg::TIMER + 0x40, 22 << 9 | 1 << 2 | 1 << 1);
        m.write(reg::TIMER + 0x48, 1000);
        m.run_to(1000);
        assert!(m.held(22) && m.read(reg::STATUS) == 4);
        m.write(reg::STATUS, 3);
        assert!(m.held(22));
        m.write(reg::STATUS, 4);
        assert!(!m.held(22));
    }

    #[test]
    fn a_periodic_timer_with_legacy_replacement_takes_the_place_of_the_8254() {
        let m = machine();
        let pit = m.wiring.isa(0);
        pit.pulse();
        assert_eq!(m.edges(2), 1);
        m.write(reg::CONFIG, 3);
        pit.set(true);
        assert_eq!(m.edges(2), 1, "the 8254 is cut off");
        // As Linux does: periodic with the accumulator first, then the period.
        m.write32(reg::TIMER, 1 << 2 | 1 << 3 | 1 << 6 | 1 << 8);
        m.write32(reg::TIMER + 8, 14_318);
        m.write32(reg::TIMER + 8, 14_318);
        assert_eq!(m.read(reg::TIMER) & 1 << 6, 0);
        for period in 1..=100 {
            m.run_to(period * 14_318 - 1);
            assert_eq!(m.edges(2) as u64, period);
            m.run_to(period * 14_318);
            assert_eq!(m.edges(2) as u64, period + 1);
        }
        m.run_to(104 * 14_318 + 1);
        assert_eq!(m.edges(2), 102, "missed periods are joined");
        m.run_to(105 * 14_318);
        assert_eq!(m.edges(2), 103, "and the phase is kept");
        m.write(reg::CONFIG, 1);
        assert!(m.held(2), "the 8254 is connected again");
    }

    #[test]
    fn a_saved_timer_goes_on() {
        let (one, other) = (machine(), machine());
        one.write(reg::CONFIG, 1);
        one.write(reg::TIMER + 0x20, 21 << 9 | 1 << 2);
        one.write(reg::TIMER + 0x28, 1000);
        assert_golden(&one.device, include_str!("golden/hpet.v1.hex"));
        assert_saved_state_survives(&one.device, &other.device);
        other.run_to(1000);
        assert_eq!(other.edges(21), 1);
        other.device.lock().reset();
        assert_eq!(other.read(reg::CONFIG), 0);
    }

    #[test]
    fn any_access_is_harmless() {
        let m = machine();
        let mut seed = 7u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let r = seed >> 17;
            let len = [1, 2, 4, 8][(r & 3) as usize];
            let offset = (r >> 2) % (SIZE - 8);
            if r >> 16 & 1 == 0 {
                m.device.lock().mmio_read(0, offset, &mut vec![0; len]);
            } else {
                m.device.lock().mmio_write(0, offset & !7, &seed.to_le_bytes()[..len]);
            }
            if r >> 20 & 7 == 0 {
                m.timers.clock().advance(r & 0xf_ffff);
                m.timers.fire_due();
            }
        }
    }
}
