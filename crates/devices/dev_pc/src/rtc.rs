//! The Motorola MC146818 real-time clock with its CMOS memory, as in the 82371SB (PIIX3): two banks of 128 bytes.
//!
//! Sources: Motorola MC146818A datasheet; 82371SB datasheet section 2.5.5. Ports 0x70/0x71 (index, data; bit 7 of the index
//! masks NMI) and 0x72/0x73 (upper bank). Drives IRQ 8, which stays high until register C is read.
//!
//! The clock runs on virtual time from the host's time at power-on: a paused VM's clock stands still, as in VirtualBox.
//! Left out: daylight saving (DSE), the square wave output and the oscillator selections other than 32.768 kHz.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::{Device, Iom, IrqLine, PortIo, Width};
use tm::{Nanos, Timer, TimerQueue, TimerTarget};
use vbox_types::{ByteSize, Port};

/// Register numbers.
mod reg {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const SECONDS_ALARM: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const MINUTES_ALARM: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const HOURS_ALARM: u8 = 0x05;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    /// Century, by the IBM AT convention; a PS/2 has it at 0x37.
    pub(super) const CENTURY: u8 = 0x32;
    pub(super) const CENTURY_PS2: u8 = 0x37;
}

#[bitfield(u8)]
struct RegA {
    #[bits(4)]
    rate: u8,
    #[bits(3)]
    divider: u8,
    update_in_progress: bool,
}

#[bitfield(u8)]
struct RegB {
    daylight: bool,
    hours_24: bool,
    binary: bool,
    square_wave: bool,
    update_enable: bool,
    alarm_enable: bool,
    periodic_enable: bool,
    set: bool,
}

#[bitfield(u8)]
struct RegC {
    #[bits(4)]
    _zero: u8,
    update: bool,
    alarm: bool,
    periodic: bool,
    request: bool,
}

const SECOND: i128 = 1_000_000_000;
/// No guest can set its clock farther from 1970 than this, about 30,000 years.
const FARTHEST: i128 = 1_000_000_000_000 * SECOND;
/// UIP goes up this long before an update and falls with it (datasheet figure 14: tBUC 244 µs).
const UPDATE_WARNING: i128 = 244_000;
/// The time base of periodic interrupts, in Hz.
const BASE_HZ: u64 = 32_768;
/// Value of the alarm bytes' top bits that means "any".
const DONT_CARE: u8 = 0xc0;

/// A date of the proleptic Gregorian calendar with the time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: i64,
    /// 1–12.
    month: i64,
    /// 1–31.
    day: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Calendar {
    /// Civil time of `seconds` since 1970-01-01.
    fn from_seconds(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days from a 1 March in eras of 400 years; a year's days before month m are (153 m + 2) / 5.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let m = (5 * day_of_year + 2) / 153;
        let month = if m < 10 { m + 3 } else { m - 9 };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * m + 2) / 5 + 1,
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    /// Seconds since 1970-01-01. Fields out of range carry over.
    fn to_seconds(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * ((self.month + 9) % 12) + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + self.hour * 3600 + self.minute * 60 + self.second
    }
}

/// Where the clock stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// It runs: nanoseconds since 1970 are virtual time plus this.
    Running { offset: i128 },
    /// Updates are inhibited (SET, or the divider held in reset): the time bytes hold the time.
    Held,
}

/// Guest-visible state.
#[derive(Clone, Debug)]
pub struct State {
    /// Both banks. Time bytes are current only while the clock is held.
    bytes: [u8; 256],
    index: u8,
    upper_index: u8,
    nmi_masked: bool,
    run: Run,
    /// Days by which the guest's weekday differs from the date's.
    weekday_shift: u8,
    /// Virtual time up to which flags have been collected.
    seen: Nanos,
    flags: RegC,
}

impl State {
    /// The clock at `wall` nanoseconds since 1970, in the guest's zone, at virtual time `now`.
    pub fn power_on(wall: i64, now: Nanos) -> Self {
        let mut state = Self {
            bytes: [0; 256],
            index: 0,
            upper_index: 0,
            nmi_masked: false,
            run: Run::Running { offset: i128::from(wall) - i128::from(now) },
            weekday_shift: 0,
            seen: now,
            flags: RegC::new(),
        };
        state.bytes[usize::from(reg::A)] = RegA::new().with_divider(2).with_rate(6).into_bits();
        state.bytes[usize::from(reg::B)] = RegB::new().with_hours_24(true).into_bits();
        state
    }

    fn a(&self) -> RegA {
        RegA::from_bits(self.bytes[usize::from(reg::A)])
    }

    fn b(&self) -> RegB {
        RegB::from_bits(self.bytes[usize::from(reg::B)])
    }

    /// Nanoseconds since 1970 on the guest's clock, while it runs.
    fn wall(&self, now: Nanos) -> Option<i128> {
        match self.run {
            Run::Running { offset } => Some(offset + i128::from(now)),
            Run::Held => None,
        }
    }

    /// Seconds since 1970 on the guest's clock, while it runs.
    fn second(&self, now: Nanos) -> Option<i64> {
        self.wall(now).map(|wall| wall.div_euclid(SECOND) as i64)
    }

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.b().binary() { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> i64 {
        i64::from(if self.b().binary() { byte } else { (byte >> 4) * 10 + (byte & 0xf) })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.b().hours_24() {
            self.encode(hour)
        } else {
            let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
            self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
        }
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.b().hours_24() {
            self.decode(byte)
        } else {
            self.decode(byte & 0x7f) % 12 + if byte & 0x80 != 0 { 12 } else { 0 }
        }
    }

    /// Writes the time at `seconds` into the time bytes.
    fn store_time(&mut self, seconds: i64) {
        let c = Calendar::from_seconds(seconds);
        let weekday = (seconds.div_euclid(86_400) + 4 + i64::from(self.weekday_shift)).rem_euclid(7) + 1;
        for (at, value) in [
            (reg::SECONDS, self.encode(c.second)),
            (reg::MINUTES, self.encode(c.minute)),
            (reg::HOURS, self.encode_hour(c.hour)),
            (reg::WEEKDAY, self.encode(weekday)),
            (reg::DAY, self.encode(c.day)),
            (reg::MONTH, self.encode(c.month)),
            (reg::YEAR, self.encode(c.year)),
            (reg::CENTURY, bcd(c.year.div_euclid(100))),
            (reg::CENTURY_PS2, bcd(c.year.div_euclid(100))),
        ] {
            self.bytes[usize::from(at)] = value;
        }
    }

    /// The time in the time bytes, as seconds since 1970.
    fn load_time(&mut self) -> i64 {
        let at = |register: u8| self.bytes[usize::from(register)];
        let century = at(reg::CENTURY);
        let century = i64::from(century >> 4) * 10 + i64::from(century & 0xf);
        let seconds = Calendar {
            year: century * 100 + self.decode(at(reg::YEAR)),
            month: self.decode(at(reg::MONTH)).clamp(1, 12),
            day: self.decode(at(reg::DAY)),
            hour: self.decode_hour(at(reg::HOURS)),
            minute: self.decode(at(reg::MINUTES)),
            second: self.decode(at(reg::SECONDS)),
        }
        .to_seconds();
        let natural = (seconds.div_euclid(86_400) + 4).rem_euclid(7) + 1;
        self.weekday_shift = (self.decode(at(reg::WEEKDAY)) - natural).rem_euclid(7) as u8;
        seconds
    }

    /// Seconds of the next alarm after second `after`.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let at = |register: u8| self.bytes[usize::from(register)];
        let field = |byte: u8, value: i64| (byte & DONT_CARE != DONT_CARE).then_some(value);
        let hour = field(at(reg::HOURS_ALARM), self.decode_hour(at(reg::HOURS_ALARM)));
        let minute = field(at(reg::MINUTES_ALARM), self.decode(at(reg::MINUTES_ALARM)));
        let second = field(at(reg::SECONDS_ALARM), self.decode(at(reg::SECONDS_ALARM)));
        let other = |wanted: Option<i64>, is: i64| wanted.is_some_and(|wanted| wanted != is);
        let mut t = after + 1;
        // At most 24 hours, 60 minutes and 60 seconds are stepped over, each at most twice.
        for _ in 0..300 {
            if other(hour, t.rem_euclid(86_400) / 3600) {
                t += 3600 - t.rem_euclid(3600);
            } else if other(minute, t.rem_euclid(3600) / 60) {
                t += 60 - t.rem_euclid(60);
            } else if other(second, t.rem_euclid(60)) {
                t += 1;
            } else {
                return Some(t);
            }
        }
        None
    }

    /// Ticks of the time base in one period of the periodic interrupt.
    fn period(&self) -> Option<u64> {
        match self.a().rate() {
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn is_divider_held(&self) -> bool {
        self.a().divider() & 6 == 6
    }

    /// Collects the flags of what has happened since the last time.
    fn advance(&mut self, now: Nanos) {
        let seen = self.seen;
        self.seen = now.max(seen);
        if let (Some(before), Some(after)) = (self.second(seen), self.second(now)) {
            if after > before {
                self.flags.set_update(true);
                if self.next_alarm(before).is_some_and(|alarm| alarm <= after) {
                    self.flags.set_alarm(true);
                }
            }
        }
        if let Some(period) = self.period().filter(|_| !self.is_divider_held())
            && tm::ticks(now, BASE_HZ) / period > tm::ticks(seen, BASE_HZ) / period
        {
            self.flags.set_periodic(true);
        }
        self.flags.set_request(self.enabled_flags() != 0);
    }

    fn enabled_flags(&self) -> u8 {
        self.flags.into_bits() & self.b().into_bits() & 0x70
    }

    /// Level of the interrupt output.
    pub fn irq(&self) -> bool {
        self.flags.request()
    }

    /// Virtual time at which an enabled flag that is not up goes up.
    fn next_event(&self, now: Nanos) -> Option<Nanos> {
        let (b, flags) = (self.b(), self.flags);
        let at_second = |second: i64| match self.run {
            Run::Running { offset } => u64::try_from(i128::from(second) * SECOND - offset).ok(),
            Run::Held => None,
        };
        let this = self.second(now);
        let update =
            this.filter(|_| b.update_enable() && !flags.update()).and_then(|second| at_second(second + 1));
        let alarm = this
            .filter(|_| b.alarm_enable() && !flags.alarm())
            .and_then(|second| self.next_alarm(second))
            .and_then(at_second);
        let periodic = self
            .period()
            .filter(|_| b.periodic_enable() && !flags.periodic() && !self.is_divider_held())
            .map(|period| tm::deadline((tm::ticks(now, BASE_HZ) / period + 1) * period, BASE_HZ));
        [update, alarm, periodic].into_iter().flatten().min()
    }

    fn read_register(&mut self, at: u8, now: Nanos) -> u8 {
        self.advance(now);
        match at {
            reg::SECONDS
            | reg::MINUTES
            | reg::HOURS
            | reg::WEEKDAY..=reg::YEAR
            | reg::CENTURY
            | reg::CENTURY_PS2 => {
                if let Some(second) = self.second(now) {
                    self.store_time(second);
                }
                self.bytes[usize::from(at)]
            }
            reg::A => {
                let soon =
                    self.wall(now).is_some_and(|wall| SECOND - wall.rem_euclid(SECOND) <= UPDATE_WARNING);
                self.a().with_update_in_progress(soon).into_bits()
            }
            reg::C => std::mem::take(&mut self.flags).into_bits(),
            // Valid RAM and time: the battery is good.
            reg::D => 0x80,
            _ => self.bytes[usize::from(at)],
        }
    }

    fn write_register(&mut self, at: u8, value: u8, now: Nanos) {
        self.advance(now);
        match at {
            reg::SECONDS
            | reg::MINUTES
            | reg::HOURS
            | reg::WEEKDAY..=reg::YEAR
            | reg::CENTURY
            | reg::CENTURY_PS2 => {
                let wall = self.wall(now);
                if let Some(second) = self.second(now) {
                    self.store_time(second);
                }
                self.bytes[usize::from(at)] = value;
                if at == reg::CENTURY || at == reg::CENTURY_PS2 {
                    self.bytes[usize::from(reg::CENTURY)] = value;
                    self.bytes[usize::from(reg::CENTURY_PS2)] = value;
                }
                if let Some(wall) = wall {
                    let fraction = wall.rem_euclid(SECOND);
                    self.run_from(fraction, now);
                }
            }
            reg::A => {
                let was_held = self.is_divider_held();
                let fraction = self.wall(now).map(|wall| wall.rem_euclid(SECOND));
                self.bytes[usize::from(at)] =
                    RegA::from_bits(value).with_update_in_progress(false).into_bits();
                // The first update comes half a second after the divider is released.
                let fraction = if was_held { SECOND / 2 } else { fraction.unwrap_or(0) };
                self.hold_or_run(fraction, now);
            }
            reg::B => {
                let fraction =
                    self.wall(now).map_or(i128::from(now) % SECOND, |wall| wall.rem_euclid(SECOND));
                if let Some(second) = self.second(now) {
                    self.store_time(second);
                }
                let mut b = RegB::from_bits(value);
                if b.set() {
                    b.set_update_enable(false);
                }
                let format_changed = {
                    let old = self.b();
                    old.binary() != b.binary() || old.hours_24() != b.hours_24()
                };
                self.bytes[usize::from(at)] = b.into_bits();
                if let Some(second) = self.second(now).filter(|_| format_changed) {
                    // A running clock goes on counting in the new format.
                    self.store_time(second);
                }
                self.hold_or_run(fraction, now);
            }
            reg::C | reg::D => {}
            _ => self.bytes[usize::from(at)] = value,
        }
        self.flags.set_request(self.enabled_flags() != 0);
    }

    /// Holds or runs the clock as SET and the divider now say. A clock that starts again is `fraction` into the second.
    fn hold_or_run(&mut self, fraction: i128, now: Nanos) {
        let hold = self.b().set() || self.is_divider_held();
        match (self.second(now), hold) {
            (Some(second), true) => {
                self.store_time(second);
                self.run = Run::Held;
            }
            (None, false) => self.run_from(fraction, now),
            _ => {}
        }
    }

    /// Runs from the time in the time bytes.
    fn run_from(&mut self, fraction: i128, now: Nanos) {
        let wall = i128::from(self.load_time()) * SECOND + fraction;
        self.run = Run::Running { offset: wall - i128::from(now) };
    }

    /// Reads a port.
    pub fn read(&mut self, port: Port, now: Nanos) -> u8 {
        match port.0 {
            0x71 => self.read_register(self.index, now),
            0x72 => self.upper_index,
            0x73 => self.bytes[usize::from(self.upper_index | 0x80)],
            _ => 0xff,
        }
    }

    /// Writes a port.
    pub fn write(&mut self, port: Port, value: u8, now: Nanos) {
        match port.0 {
            0x70 => {
                self.index = value & 0x7f;
                self.nmi_masked = value & 0x80 != 0;
            }
            0x71 => self.write_register(self.index, value, now),
            0x72 => self.upper_index = value & 0x7f,
            0x73 => self.bytes[usize::from(self.upper_index | 0x80)] = value,
            _ => {}
        }
    }
}

fn bcd(value: i64) -> u8 {
    let value = value.rem_euclid(100) as u8;
    ((value / 10) << 4) | (value % 10)
}

/// What the firmware tries to boot from, numbered as SeaBIOS reads it from CMOS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum BootDevice {
    #[default]
    None = 0,
    Floppy = 1,
    Disk = 2,
    Optical = 3,
    Network = 4,
}

/// What the machine's assembly puts into CMOS for the firmware.
#[derive(Clone, Debug, Default)]
pub struct CmosSetup {
    /// RAM below 4 GiB, from address 0.
    pub low_memory: ByteSize,
    /// RAM from 4 GiB on.
    pub high_memory: ByteSize,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Boot order, first to third.
    pub boot: [BootDevice; 3],
    /// CMOS type bytes of the floppy drives A and B (4 is 1.44 MB), 0 where there is none.
    pub floppies: [u8; 2],
}

/// Where the number of CPUs less one is, for the BIOS to wait for.
pub const CPUS: u8 = 0x5f;

impl CmosSetup {
    /// The bytes and where they go. Layout: IBM AT for 0x0e–0x33; 0x34–0x3f and 0x5b–0x5f as Bochs, QEMU and VirtualBox
    /// hand them to their BIOSes (SeaBIOS `src/fw/paravirt.c`, `src/hw/rtc.h`).
    fn bytes(&self) -> Vec<(u8, u8)> {
        const MIB: u64 = 1 << 20;
        let low = self.low_memory.0;
        let extended = ((low.saturating_sub(MIB)) >> 10).min(0xffff) as u16;
        let above_16 = (low.saturating_sub(16 * MIB) >> 16).min(0xffff) as u16;
        let high = (self.high_memory.0 >> 16).min(0xff_ffff) as u32;
        let floppies = self.floppies.iter().filter(|&&kind| kind != 0).count() as u8;
        let [first, second, third] = self.boot.map(|device| device as u8);
        // FPU, PS/2 mouse, and bits 0, 6–7 for the drives present.
        let equipment = 0x06 | if floppies > 0 { 1 | (floppies - 1) << 6 } else { 0 };
        let mut bytes = vec![
            (0x10, self.floppies[0] << 4 | self.floppies[1] & 0xf),
            (0x14, equipment),
            (0x15, 0x80),
            (0x16, 0x02),
        ];
        for (at, value) in [(0x17, extended), (0x30, extended), (0x34, above_16)] {
            bytes.push((at, value as u8));
            bytes.push((at + 1, (value >> 8) as u8));
        }
        bytes.extend([
            (0x38, third << 4),
            (0x3d, second << 4 | first),
            (0x5b, high as u8),
            (0x5c, (high >> 8) as u8),
            (0x5d, (high >> 16) as u8),
            (CPUS, self.cpus.saturating_sub(1)),
        ]);
        bytes
    }
}

/// Gives the host's time in nanoseconds since 1970 in the guest's zone (UTC or local, as the machine's settings say).
pub type WallClock = Box<dyn Fn() -> i64 + Send>;

/// The clock as a device.
pub struct Rtc {
    irq: IrqLine,
    timer: Timer,
    /// Copy of the NMI mask that is read without the lock.
    nmi_masked: Arc<AtomicBool>,
    state: State,
}

impl Rtc {
    /// A clock that drives `irq` (IRQ 8) and shows the time that `wall_clock` gives now.
    pub fn new(
        irq: IrqLine,
        timers: &Arc<TimerQueue>,
        wall_clock: &WallClock,
        setup: &CmosSetup,
    ) -> Arc<Mutex<Self>> {
        let mut state = State::power_on(wall_clock(), timers.clock().now());
        for (at, value) in setup.bytes() {
            state.bytes[usize::from(at)] = value;
        }
        let sum: u16 = state.bytes[0x10..0x2e].iter().map(|&byte| u16::from(byte)).sum();
        [state.bytes[0x2e], state.bytes[0x2f]] = sum.to_be_bytes();
        tm::with_timers(|handler| Self {
            irq,
            timer: timers.create(handler, 0),
            nmi_masked: Arc::default(),
            state,
        })
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        iom.register(Port(0x70), 4, Width::Byte, this.clone());
    }

    /// Whether the guest masks NMI (bit 7 of port 0x70), to be read at any time.
    pub fn nmi_mask(&self) -> Arc<AtomicBool> {
        self.nmi_masked.clone()
    }

    /// A byte of CMOS (0x80 and up is the upper bank), without side effects. Time bytes may be old.
    pub fn cmos(&self, at: u8) -> u8 {
        self.state.bytes[usize::from(at)]
    }

    /// Sets a byte of CMOS beyond the clock's registers: what the machine tells its BIOS.
    pub fn set_cmos(&mut self, at: u8, value: u8) {
        if at > reg::D {
            self.state.bytes[usize::from(at)] = value;
        }
    }

    fn now(&self) -> Nanos {
        self.timer.clock().now()
    }

    fn sync(&mut self, now: Nanos) {
        self.irq.set(self.state.irq());
        self.timer.set(self.state.next_event(now));
        self.nmi_masked.store(self.state.nmi_masked, Ordering::SeqCst);
    }
}

impl PortIo for Rtc {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        let now = self.now();
        let value = self.state.read(port, now);
        self.sync(now);
        value.into()
    }

    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        let now = self.now();
        self.state.write(port, value as u8, now);
        self.sync(now);
    }
}

impl TimerTarget for Rtc {
    fn timer_fired(&mut self, _: u32, now: Nanos) {
        self.state.advance(now);
        self.sync(now);
    }
}

impl Device for Rtc {
    /// The battery keeps time and memory; a reset clears the interrupt enables and flags (datasheet, RESET pin).
    fn reset(&mut self) {
        let now = self.now();
        let State { bytes, index, upper_index, nmi_masked, run: _, weekday_shift: _, seen, flags } =
            &mut self.state;
        let b = &mut bytes[usize::from(reg::B)];
        *b = RegB::from_bits(*b)
            .with_periodic_enable(false)
            .with_alarm_enable(false)
            .with_update_enable(false)
            .with_square_wave(false)
            .into_bits();
        *index = 0;
        *upper_index = 0;
        *nmi_masked = false;
        *seen = now;
        *flags = RegC::new();
        self.sync(now);
    }
}

impl ssm::Saveable for Rtc {
    fn unit_name(&self) -> &'static str {
        "mc146818"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State { bytes, index, upper_index, nmi_masked, run, weekday_shift, seen, flags } = &self.state;
        out.put_bytes(bytes);
        out.put_bytes(&[*index, *upper_index, *weekday_shift, flags.into_bits()]);
        out.put_bool(*nmi_masked);
        let (running, offset) = match run {
            Run::Running { offset } => (true, *offset),
            Run::Held => (false, 0),
        };
        out.put_bool(running);
        out.put_bytes(&offset.to_le_bytes());
        out.put_u64(*seen);
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let mut bytes = [0; 256];
        input.take_into(&mut bytes)?;
        let [index, upper_index, weekday_shift, flags] =
            [input.take_u8()?, input.take_u8()?, input.take_u8()?, input.take_u8()?];
        if index > 0x7f || upper_index > 0x7f || weekday_shift > 6 {
            return Err(input
                .invalid(format!("indexes {index:#x} and {upper_index:#x}, weekday shift {weekday_shift}")));
        }
        let nmi_masked = input.take_bool()?;
        let running = input.take_bool()?;
        let mut offset = [0; 16];
        input.take_into(&mut offset)?;
        let offset = i128::from_le_bytes(offset);
        if offset.unsigned_abs() > FARTHEST.unsigned_abs() {
            return Err(input.invalid(format!("clock offset of {offset} ns")));
        }
        let seen = input.take_u64()?;
        input.finish()?;
        let run = if running { Run::Running { offset } } else { Run::Held };
        self.state = State {
            bytes,
            index,
            upper_index,
            nmi_masked,
            run,
            weekday_shift,
            seen,
            flags: RegC::from_bits(flags),
        };
        self.sync(self.now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tm::Clock;

    /// 2024-02-28 23:59:58 UTC, a Wednesday.
    const WALL: i64 = 1_709_164_798 * SECOND as i64;
    const S: Nanos = SECOND as Nanos;

    fn rd(s: &mut State, at: u8, now: Nanos) -> u8 {
        s.write(Port(0x70), at, now);
        s.read(Port(0x71), now)
    }

    fn wr(s: &mut State, at: u8, value: u8, now: Nanos) {
        s.write(Port(0x70), at, now);
        s.write(Port(0x71), value, now);
    }

    fn time(s: &mut State, now: Nanos) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|at| rd(s, at, now))
    }

    #[test]
    fn dates_convert_both_ways() {
        for seconds in [0, -1, 951_782_399, 951_782_400, 1_709_164_798, 4_107_542_399, -2_208_988_800] {
            assert_eq!(Calendar::from_seconds(seconds).to_seconds(), seconds);
        }
        let leap = Calendar { year: 2000, month: 2, day: 29, hour: 0, minute: 0, second: 0 };
        assert_eq!(Calendar::from_seconds(951_782_400), leap);
    }

    #[test]
    fn the_time_runs_over_a_leap_day() {
        let mut s = State::power_on(WALL, 5 * S);
        assert_eq!(time(&mut s, 5 * S), [0x20, 0x24, 2, 0x28, 4, 0x23, 0x59, 0x58]);
        assert_eq!(time(&mut s, 7 * S), [0x20, 0x24, 2, 0x29, 5, 0, 0, 0]);
    }

    #[test]
    fn binary_and_twelve_hour_formats_are_followed() {
        let mut s = State::power_on(WALL, 0);
        wr(&mut s, 0x0b, 0x04, 0);
        assert_eq!([rd(&mut s, 4, 0), rd(&mut s, 2, 0)], [0x80 | 11, 59]);
        assert_eq!(rd(&mut s, 4, 2 * S), 12, "midnight is 12 AM");
    }

    #[test]
    fn a_guest_sets_the_time_under_set() {
        let mut s = State::power_on(WALL, 0);
        wr(&mut s, 0x0b, 0x82, 0);
        for (at, value) in
            [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (6, 6), (4, 0x23), (2, 0x59), (0, 0x59)]
        {
            wr(&mut s, at, value, S);
        }
        assert_eq!(time(&mut s, 60 * S)[7], 0x59, "held");
        wr(&mut s, 0x0b, 0x02, 60 * S);
        assert_eq!(time(&mut s, 61 * S), [0x20, 0, 1, 1, 7, 0, 0, 0]);
    }

    #[test]
    fn the_first_update_comes_half_a_second_after_the_divider_is_released() {
        let mut s = State::power_on(WALL, 0);
        wr(&mut s, 0x0a, 0x70, S / 4);
        wr(&mut s, 0x0a, 0x26, 10 * S);
        assert_eq!(rd(&mut s, 0, 10 * S + S / 2 - 1), 0x58);
        assert_eq!(rd(&mut s, 0, 10 * S + S / 2), 0x59);
    }

    #[test]
    fn update_in_progress_warns_before_the_second() {
        let mut s = State::power_on(WALL, 0);
        assert_eq!(rd(&mut s, 0x0a, S / 2), 0x26);
        assert_eq!(rd(&mut s, 0x0a, S - 100_000), 0xa6);
        assert_eq!(rd(&mut s, 0x0a, S), 0x26);
    }

    #[test]
    fn an_alarm_raises_the_line_until_c_is_read() {
        let mut s = State::power_on(WALL, 0);
        for (at, value) in [(1, 0x05), (3, 0xff), (5, 0xc0)] {
            wr(&mut s, at, value, 0);
        }
        wr(&mut s, 0x0b, 0x22, 0);
        assert_eq!(s.next_event(0), Some(7 * S), "23:59:58 to 00:00:05");
        s.advance(7 * S);
        assert!(s.irq());
        assert_eq!(rd(&mut s, 0x0c, 7 * S) & 0xb0, 0xb0);
        assert!(!s.irq());
        assert_eq!(rd(&mut s, 0x0c, 7 * S), 0);
    }

    #[test]
    fn an_impossible_alarm_never_comes() {
        let mut s = State::power_on(WALL, 0);
        wr(&mut s, 5, 0x77, 0);
        wr(&mut s, 0x0b, 0x22, 0);
        assert_eq!(s.next_event(0), None);
    }

    #[test]
    fn periodic_interrupts_keep_their_rate() {
        let mut s = State::power_on(WALL, 0);
        wr(&mut s, 0x0b, 0x42, 0);
        let (mut now, mut count) = (0, 0);
        while let Some(next) = s.next_event(now).filter(|&next| next <= 10 * S) {
            now = next;
            s.advance(now);
            assert_eq!(rd(&mut s, 0x0c, now) & 0xc0, 0xc0);
            count += 1;
        }
        assert_eq!(count, 10 * 1024);
    }

    #[test]
    fn flags_rise_without_interrupts_when_disabled() {
        let mut s = State::power_on(WALL, 0);
        assert_eq!(rd(&mut s, 0x0c, S), 0x50);
        assert_eq!(s.next_event(S), None);
    }

    fn device() -> Arc<Mutex<Rtc>> {
        let wall: WallClock = Box::new(|| WALL);
        let setup = CmosSetup {
            low_memory: ByteSize(512 << 20),
            high_memory: ByteSize(1 << 30),
            cpus: 4,
            boot: [BootDevice::Optical, BootDevice::Disk, BootDevice::Network],
            floppies: [4, 0],
        };
        Rtc::new(IrqLine::unconnected(), &TimerQueue::new(Clock::manual()), &wall, &setup)
    }

    #[test]
    fn the_firmware_finds_memory_boot_order_and_a_good_checksum() {
        let rtc = device();
        let iom = Iom::new();
        Rtc::register(&rtc, &iom);
        let byte = |at: u8| {
            iom.write(Port(0x70), Width::Byte, at.into());
            iom.read(Port(0x71), Width::Byte)
        };
        assert_eq!([byte(0x34), byte(0x35)], [0, 0x1f], "496 MB above 16 MB in 64 KB units");
        assert_eq!([byte(0x5b), byte(0x5c), byte(0x5d), byte(0x5f)], [0, 0x40, 0, 3]);
        assert_eq!([byte(0x3d), byte(0x38)], [0x23, 0x40]);
        let sum: u32 = (0x10..0x2e).map(byte).sum();
        assert_eq!(byte(0x2e) << 8 | byte(0x2f), sum);
        let mask = rtc.lock().nmi_mask();
        assert!(!mask.load(Ordering::SeqCst));
        assert_eq!(byte(0x80 | 0x14), 0x07, "bit 7 is the NMI mask, not part of the index");
        assert!(mask.load(Ordering::SeqCst));
    }

    #[test]
    fn reset_keeps_time_and_memory() {
        let rtc = device();
        let mut rtc = rtc.lock();
        wr(&mut rtc.state, 0x0b, 0x72, 0);
        wr(&mut rtc.state, 0x40, 0x5a, 0);
        rtc.reset();
        assert_eq!(rtc.state.b().into_bits(), 0x02);
        assert_eq!(rtc.cmos(0x40), 0x5a);
        assert_eq!(rd(&mut rtc.state, 0, 0), 0x58);
    }

    #[test]
    fn the_saved_state_comes_back_byte_for_byte() {
        let one = device();
        for (port, value) in [(0x70, 0x8b), (0x71, 0x82), (0x70, 0x00), (0x71, 0x11), (0x72, 5), (0x73, 9)] {
            one.lock().port_write(Port(port), Width::Byte, value);
        }
        crate::testing::assert_saved_state_survives(&one, &device());
    }
}
