//! The National Semiconductor 16550A UART, as a PC's COM port.
//!
//! Source: National Semiconductor PC16550D datasheet (section numbers are its). Eight ports from the base; IRQ gated by
//! OUT2 as on every PC adapter.
//!
//! Bytes go to the back end at once, or at the programmed rate if pacing is asked for; received bytes come as fast as the
//! guest takes them. The word length does not mask data. Line errors never come from a back end (it has no line); in loopback
//! an overrun is reported as the chip does.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::connector::{CharDriver, CharPort};
use pdm::{Device, Iom, IrqLine, PortIo, Width};
use tm::{Nanos, Timer, TimerQueue, TimerTarget};
use vbox_types::Port;

/// Depth of both FIFOs.
const FIFO: usize = 16;
/// The clock's input: 1.8432 MHz, divided by 16 and the divisor.
const BAUD_BASE: u64 = 115_200;

/// Interrupt enable register (8.6.4).
#[bitfield(u8)]
struct Ier {
    received: bool,
    transmitter_empty: bool,
    line_status: bool,
    modem_status: bool,
    #[bits(4)]
    _zero: u8,
}

/// FIFO control register (8.6.6).
#[bitfield(u8)]
struct Fcr {
    enable: bool,
    reset_receiver: bool,
    reset_transmitter: bool,
    #[bits(3)]
    _unused: u8,
    #[bits(2)]
    trigger: u8,
}

/// Line control register (8.6.1).
#[bitfield(u8)]
struct Lcr {
    #[bits(2)]
    word_length: u8,
    stop_bits: bool,
    parity: bool,
    even: bool,
    stick: bool,
    set_break: bool,
    divisor_access: bool,
}

/// Modem control register (8.6.7).
#[bitfield(u8)]
struct Mcr {
    dtr: bool,
    rts: bool,
    out1: bool,
    out2: bool,
    loopback: bool,
    #[bits(3)]
    _zero: u8,
}

/// Line status register (8.6.3).
#[bitfield(u8)]
struct Lsr {
    data_ready: bool,
    overrun: bool,
    parity_error: bool,
    framing_error: bool,
    break_interrupt: bool,
    holding_empty: bool,
    transmitter_empty: bool,
    fifo_error: bool,
}

/// Modem status register (8.6.8).
#[bitfield(u8)]
struct Msr {
    delta_cts: bool,
    delta_dsr: bool,
    trailing_ri: bool,
    delta_dcd: bool,
    cts: bool,
    dsr: bool,
    ri: bool,
    dcd: bool,
}

/// Interrupt identification (8.6.5, table IV), in order of priority.
mod iir {
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const RECEIVED: u8 = 0x04;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const TRANSMITTER: u8 = 0x02;
    pub(super) const MODEM: u8 = 0x00;
    pub(super) const NONE: u8 = 0x01;
    pub(super) const FIFOS: u8 = 0xc0;
}

/// Guest-visible state.
#[derive(Clone, Debug)]
pub struct State {
    ier: Ier,
    fcr: Fcr,
    lcr: Lcr,
    mcr: Mcr,
    msr: Msr,
    /// The wires as the back end gives them, in the MSR's upper half.
    inputs: Msr,
    /// Error bits of the LSR.
    errors: Lsr,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    sending: VecDeque<u8>,
    /// A byte is in the shift register (only with pacing).
    shifting: bool,
    /// The "transmitter holding register empty" interrupt stands.
    transmitter_request: bool,
    /// The character timeout interrupt stands.
    timeout: bool,
}

impl State {
    pub fn power_on() -> Self {
        Self {
            ier: Ier::new(),
            fcr: Fcr::new(),
            lcr: Lcr::new(),
            mcr: Mcr::new(),
            msr: Msr::new(),
            inputs: Msr::new(),
            errors: Lsr::new(),
            scratch: 0,
            // The chip leaves it undefined; firmware expects 9600 baud.
            divisor: 12,
            received: VecDeque::new(),
            sending: VecDeque::new(),
            shifting: false,
            transmitter_request: false,
            timeout: false,
        }
    }

    fn depth(&self) -> usize {
        if self.fcr.enable() { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        if self.fcr.enable() { [1, 4, 8, 14][usize::from(self.fcr.trigger())] } else { 1 }
    }

    /// Bytes that the receiver can take from outside.
    fn room(&self) -> usize {
        if self.mcr.loopback() { 0 } else { self.depth().saturating_sub(self.received.len()) }
    }

    /// Time of one character on the line.
    fn character_time(&self) -> Nanos {
        let halves = 2 * (1 + 5 + u64::from(self.lcr.word_length()) + u64::from(self.lcr.parity()))
            + match (self.lcr.stop_bits(), self.lcr.word_length()) {
                (false, _) => 2,
                (true, 0) => 3,
                (true, _) => 4,
            };
        halves * 500_000_000 * u64::from(self.divisor.max(1)) / BAUD_BASE
    }

    fn lsr(&self) -> Lsr {
        self.errors
            .with_data_ready(!self.received.is_empty())
            .with_holding_empty(self.sending.is_empty())
            .with_transmitter_empty(self.sending.is_empty() && !self.shifting)
    }

    fn request(&self) -> u8 {
        let ier = self.ier;
        if ier.line_status() && self.errors.into_bits() & 0x1e != 0 {
            iir::LINE_STATUS
        } else if ier.received() && self.received.len() >= self.trigger() {
            iir::RECEIVED
        } else if ier.received() && self.timeout {
            iir::TIMEOUT
        } else if ier.transmitter_empty() && self.transmitter_request {
            iir::TRANSMITTER
        } else if ier.modem_status() && self.msr.into_bits() & 0x0f != 0 {
            iir::MODEM
        } else {
            iir::NONE
        }
    }

    /// Level of the interrupt line, behind the adapter's OUT2 gate.
    pub fn irq(&self) -> bool {
        self.mcr.out2() && self.request() != iir::NONE
    }

    /// The receiver holds bytes below its trigger level and should time out.
    fn wants_timeout(&self) -> bool {
        self.fcr.enable()
            && !self.timeout
            && !self.received.is_empty()
            && self.received.len() < self.trigger()
    }

    /// Takes bytes from outside; the caller has checked [`State::room`].
    fn receive(&mut self, data: &[u8]) {
        self.received.extend(data);
        self.timeout = false;
    }

    /// A byte comes round in loopback.
    fn loop_back(&mut self, byte: u8) {
        if self.received.len() < self.depth() {
            self.received.push_back(byte);
        } else {
            self.errors.set_overrun(true);
            if !self.fcr.enable() {
                self.received[0] = byte;
            }
        }
        self.timeout = false;
    }

    /// Recomputes the modem status from the wires, or in loopback from the outputs.
    fn update_modem(&mut self) {
        let old = self.msr;
        let wires = if self.mcr.loopback() {
            Msr::new()
                .with_cts(self.mcr.rts())
                .with_dsr(self.mcr.dtr())
                .with_ri(self.mcr.out1())
                .with_dcd(self.mcr.out2())
        } else {
            self.inputs
        };
        self.msr = wires
            .with_delta_cts(old.delta_cts() || old.cts() != wires.cts())
            .with_delta_dsr(old.delta_dsr() || old.dsr() != wires.dsr())
            .with_trailing_ri(old.trailing_ri() || old.ri() && !wires.ri())
            .with_delta_dcd(old.delta_dcd() || old.dcd() != wires.dcd());
    }

    /// Everything sent has left the FIFO.
    fn sent(&mut self) {
        self.transmitter_request = true;
    }

    /// Reads register `offset` (0–7).
    pub fn read(&mut self, offset: u16) -> u8 {
        match offset {
            0 | 1 if self.lcr.divisor_access() => self.divisor.to_le_bytes()[usize::from(offset)],
            0 => {
                self.timeout = false;
                self.received.pop_front().unwrap_or(0)
            }
            1 => self.ier.into_bits(),
            2 => {
                let request = self.request();
                if request == iir::TRANSMITTER {
                    self.transmitter_request = false;
                }
                request | if self.fcr.enable() { iir::FIFOS } else { 0 }
            }
            3 => self.lcr.into_bits(),
            4 => self.mcr.into_bits(),
            5 => {
                let lsr = self.lsr();
                self.errors = Lsr::new();
                lsr.into_bits()
            }
            6 => {
                let msr = self.msr;
                self.msr = Msr::from_bits(msr.into_bits() & 0xf0);
                msr.into_bits()
            }
            _ => self.scratch,
        }
    }

    /// Writes register `offset` (0–7).
    pub fn write(&mut self, offset: u16, value: u8) {
        match offset {
            0 | 1 if self.lcr.divisor_access() => {
                let mut bytes = self.divisor.to_le_bytes();
                bytes[usize::from(offset)] = value;
                self.divisor = u16::from_le_bytes(bytes);
            }
            0 => {
                self.transmitter_request = false;
                if self.sending.len() >= self.depth() {
                    // Written although not empty: the newest byte is overwritten.
                    self.sending.pop_back();
                }
                self.sending.push_back(value);
            }
            1 => {
                let before = self.ier.transmitter_empty();
                self.ier = Ier::from_bits(value & 0x0f);
                if !before && self.ier.transmitter_empty() && self.sending.is_empty() {
                    self.transmitter_request = true;
                }
            }
            2 => self.write_fcr(Fcr::from_bits(value)),
            3 => {
                let lcr = Lcr::from_bits(value);
                if self.mcr.loopback() && lcr.set_break() && !self.lcr.set_break() {
                    self.loop_back(0);
                    self.errors.set_break_interrupt(true);
                }
                self.lcr = lcr;
            }
            4 => {
                self.mcr = Mcr::from_bits(value & 0x1f);
                self.update_modem();
            }
            5 | 6 => {}
            _ => self.scratch = value,
        }
    }

    fn write_fcr(&mut self, fcr: Fcr) {
        // Changing the enable bit empties both FIFOs, and the other bits count only with it.
        let toggled = fcr.enable() != self.fcr.enable();
        if toggled || fcr.enable() && fcr.reset_receiver() {
            self.received.clear();
            self.errors = Lsr::new();
            self.timeout = false;
        }
        if (toggled || fcr.enable() && fcr.reset_transmitter()) && !self.sending.is_empty() {
            self.sending.clear();
            self.transmitter_request = true;
        }
        self.fcr = if fcr.enable() {
            fcr.with_reset_receiver(false).with_reset_transmitter(false)
        } else {
            Fcr::new()
        };
    }
}

/// Timer numbers.
const TIMEOUT: u32 = 0;
const SHIFT: u32 = 1;

/// The UART as a device.
pub struct Serial {
    base: Port,
    paced: bool,
    irq: IrqLine,
    timeout_timer: Timer,
    shift_timer: Timer,
    driver: Option<Arc<dyn CharDriver>>,
    wakers: Vec<Box<dyn FnOnce() + Send>>,
    state: State,
    /// When the receiver last moved, for the character timeout.
    moved: Nanos,
}

impl Serial {
    /// A UART at `base` that drives `irq`, without a back end: what it sends is lost, its modem inputs are low. `paced`
    /// lets it send at the rate the guest has programmed.
    pub fn new(base: Port, irq: IrqLine, timers: &Arc<TimerQueue>, paced: bool) -> Arc<Mutex<Self>> {
        tm::with_timers(|handler| Self {
            base,
            paced,
            irq,
            timeout_timer: timers.create(handler.clone(), TIMEOUT),
            shift_timer: timers.create(handler, SHIFT),
            driver: None,
            wakers: Vec::new(),
            state: State::power_on(),
            moved: 0,
        })
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        let base = this.lock().base;
        iom.register(base, 8, Width::Byte, this.clone());
    }

    /// The port as its back end sees it.
    pub fn port(this: &Arc<Mutex<Self>>) -> Arc<dyn CharPort> {
        Arc::new(Client(Arc::downgrade(this)))
    }

    /// Connects a back end, or takes it away. The modem inputs are high with one (until it says otherwise) and low without.
    pub fn connect(&mut self, driver: Option<Arc<dyn CharDriver>>) {
        let level = driver.is_some();
        self.driver = driver;
        self.state.inputs = Msr::new().with_cts(level).with_dsr(level).with_dcd(level);
        self.state.update_modem();
        self.tell_driver();
        self.pump();
        self.sync();
    }

    fn now(&self) -> Nanos {
        self.timeout_timer.clock().now()
    }

    fn tell_driver(&self) {
        if let Some(driver) = &self.driver {
            // In loopback the outputs are forced inactive.
            let connected = !self.state.mcr.loopback();
            driver.set_modem_control(connected && self.state.mcr.dtr(), connected && self.state.mcr.rts());
            driver.set_break(connected && self.state.lcr.set_break());
        }
    }

    /// Moves what is to be sent on its way.
    fn pump(&mut self) {
        while !self.state.sending.is_empty() && !self.state.shifting {
            let count = if self.paced { 1 } else { self.state.sending.len() };
            let bytes: Vec<u8> = self.state.sending.iter().copied().take(count).collect();
            let taken = if self.state.mcr.loopback() {
                bytes.iter().for_each(|&byte| self.state.loop_back(byte));
                self.moved = self.now();
                count
            } else {
                self.driver.as_ref().map_or(count, |driver| driver.write(&bytes).min(count))
            };
            if taken == 0 {
                return;
            }
            self.state.sending.drain(..taken);
            if self.paced {
                self.state.shifting = true;
                self.shift_timer.arm(self.now().saturating_add(self.state.character_time()));
            }
            if self.state.sending.is_empty() {
                self.state.sent();
            }
        }
    }

    fn sync(&mut self) {
        /// Slow rates do not hold the guest's input back longer than this.
        const LONGEST_TIMEOUT: Nanos = 50_000_000;
        self.irq.set(self.state.irq());
        self.timeout_timer.set(
            self.state
                .wants_timeout()
                .then(|| self.moved.saturating_add((4 * self.state.character_time()).min(LONGEST_TIMEOUT))),
        );
        if self.state.room() > 0 {
            self.wakers.drain(..).for_each(|wake| wake());
        }
    }
}

struct Client(Weak<Mutex<Serial>>);

impl CharPort for Client {
    fn receive(&self, data: &[u8]) -> usize {
        let Some(serial) = self.0.upgrade() else { return 0 };
        let mut serial = serial.lock();
        let count = data.len().min(serial.state.room());
        if count > 0 {
            serial.state.receive(&data[..count]);
            serial.moved = serial.now();
            serial.sync();
        }
        count
    }

    fn wait_writable(&self, wake: Box<dyn FnOnce() + Send>) {
        let Some(serial) = self.0.upgrade() else { return };
        let mut serial = serial.lock();
        if serial.state.room() > 0 {
            wake();
        } else {
            serial.wakers.push(wake);
        }
    }

    fn ready(&self) {
        let Some(serial) = self.0.upgrade() else { return };
        let mut serial = serial.lock();
        serial.pump();
        serial.sync();
    }

    fn set_modem_status(&self, dcd: bool, dsr: bool, cts: bool, ri: bool) {
        let Some(serial) = self.0.upgrade() else { return };
        let mut serial = serial.lock();
        serial.state.inputs = Msr::new().with_dcd(dcd).with_dsr(dsr).with_cts(cts).with_ri(ri);
        serial.state.update_modem();
        serial.sync();
    }
}

impl PortIo for Serial {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        let offset = port.0.wrapping_sub(self.base.0) & 7;
        let value = self.state.read(offset);
        if offset == 0 {
            self.moved = self.now();
        }
        self.sync();
        value.into()
    }

    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        let offset = port.0.wrapping_sub(self.base.0) & 7;
        let outputs = |state: &State| (state.mcr.into_bits() & 0x13, state.lcr.set_break());
        let before = outputs(&self.state);
        self.state.write(offset, value as u8);
        // The request drops with the write and comes back with the byte's departure: an edge for each.
        self.irq.set(self.state.irq());
        if outputs(&self.state) != before {
            self.tell_driver();
        }
        self.pump();
        self.sync();
    }
}

impl TimerTarget for Serial {
    fn timer_fired(&mut self, timer: u32, now: Nanos) {
        match timer {
            TIMEOUT => {
                if self.state.wants_timeout() && now > self.moved {
                    self.state.timeout = true;
                }
            }
            _ => {
                self.state.shifting = false;
                self.pump();
            }
        }
        self.sync();
    }
}

impl Device for Serial {
    fn reset(&mut self) {
        // The wires are the back end's.
        let inputs = self.state.inputs;
        self.state = State::power_on();
        self.state.inputs = inputs;
        self.state.msr = inputs;
        self.moved = 0;
        self.shift_timer.disarm();
        self.tell_driver();
        self.sync();
    }
}

impl ssm::Saveable for Serial {
    fn unit_name(&self) -> &'static str {
        "serial"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State {
            ier,
            fcr,
            lcr,
            mcr,
            msr,
            // The wires belong to the back end that is there after restoring.
            inputs: _,
            errors,
            scratch,
            divisor,
            received,
            sending,
            shifting,
            transmitter_request,
            timeout,
        } = &self.state;
        out.put_bytes(&[
            ier.into_bits(),
            fcr.into_bits(),
            lcr.into_bits(),
            mcr.into_bits(),
            msr.into_bits(),
            errors.into_bits(),
            *scratch,
        ]);
        out.put_u16(*divisor);
        for queue in [received, sending] {
            let bytes: Vec<u8> = queue.iter().copied().collect();
            out.put_blob(&bytes);
        }
        for flag in [shifting, transmitter_request, timeout] {
            out.put_bool(*flag);
        }
        out.put_u64(self.moved);
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let mut registers = [0; 7];
        input.take_into(&mut registers)?;
        let [ier, fcr, lcr, mcr, msr, errors, scratch] = registers;
        let divisor = input.take_u16()?;
        let received: VecDeque<u8> = input.take_blob(FIFO)?.iter().copied().collect();
        let sending = input.take_blob(FIFO)?.iter().copied().collect();
        let [shifting, transmitter_request, timeout] =
            [input.take_bool()?, input.take_bool()?, input.take_bool()?];
        let moved = input.take_u64()?;
        input.finish()?;
        self.state = State {
            ier: Ier::from_bits(ier),
            fcr: Fcr::from_bits(fcr),
            lcr: Lcr::from_bits(lcr),
            mcr: Mcr::from_bits(mcr),
            msr: Msr::from_bits(msr),
            inputs: self.state.inputs,
            errors: Lsr::from_bits(errors),
            scratch,
            divisor,
            received,
            sending,
            shifting: shifting && self.paced,
            transmitter_request,
            timeout,
        };
        self.moved = moved;
        self.tell_driver();
        if self.state.shifting {
            self.shift_timer.arm(self.now());
        }
        self.pump();
        self.sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tm::Clock;

    /// A back end that takes up to `room` bytes.
    struct Sink {
        bytes: Mutex<Vec<u8>>,
        room: AtomicUsize,
        control: Mutex<(bool, bool, bool)>,
    }
    impl CharDriver for Sink {
        fn write(&self, data: &[u8]) -> usize {
            let count = data.len().min(self.room.load(Ordering::SeqCst));
            self.room.fetch_sub(count, Ordering::SeqCst);
            self.bytes.lock().extend(&data[..count]);
            count
        }
        fn set_modem_control(&self, dtr: bool, rts: bool) {
            let mut control = self.control.lock();
            (control.0, control.1) = (dtr, rts);
        }
        fn set_break(&self, on: bool) {
            self.control.lock().2 = on;
        }
    }

    struct Bench {
        timers: Arc<TimerQueue>,
        device: Arc<Mutex<Serial>>,
        sink: Arc<Sink>,
        port: Arc<dyn CharPort>,
    }

    impl Bench {
        fn new(paced: bool) -> Self {
            let timers = TimerQueue::new(Clock::manual());
            let device = Serial::new(Port(0x3f8), IrqLine::unconnected(), &timers, paced);
            let sink = Arc::new(Sink {
                bytes: Mutex::default(),
                room: AtomicUsize::new(usize::MAX),
                control: Mutex::default(),
            });
            device.lock().connect(Some(sink.clone()));
            let port = Serial::port(&device);
            let bench = Self { timers, device, sink, port };
            bench.w(3, 0x83);
            bench.w(0, 1);
            bench.w(1, 0);
            bench.w(3, 0x03);
            bench.w(4, 0x0b);
            bench.r(6);
            bench
        }
        fn w(&self, offset: u16, value: u8) {
            self.device.lock().port_write(Port(0x3f8 + offset), Width::Byte, value.into());
        }
        fn r(&self, offset: u16) -> u8 {
            self.device.lock().port_read(Port(0x3f8 + offset), Width::Byte) as u8
        }
        fn irq(&self) -> bool {
            self.device.lock().state.irq()
        }
        fn pass(&self, time: Nanos) {
            self.timers.clock().advance(time);
            self.timers.fire_due();
        }
    }

    #[test]
    fn bytes_go_out_at_once_and_the_transmitter_asks_for_more() {
        let b = Bench::new(false);
        b.w(1, 0x02);
        assert!(b.irq());
        assert_eq!(b.r(2), 0x02);
        assert!(!b.irq(), "reading the identification answers the request");
        b.w(0, b'x');
        assert_eq!(*b.sink.bytes.lock(), b"x");
        assert_eq!(b.r(5), 0x60);
        assert!(b.irq());
    }

    #[test]
    fn a_full_back_end_holds_the_fifo_until_it_is_ready() {
        let b = Bench::new(false);
        b.w(2, 0x01);
        b.sink.room.store(2, Ordering::SeqCst);
        b"hello".iter().for_each(|&byte| b.w(0, byte));
        assert_eq!(*b.sink.bytes.lock(), b"he");
        assert_eq!(b.r(5) & 0x60, 0);
        b.sink.room.store(100, Ordering::SeqCst);
        b.port.ready();
        assert_eq!(*b.sink.bytes.lock(), b"hello");
        assert_eq!(b.r(5) & 0x60, 0x60);
    }

    #[test]
    fn the_receiver_interrupts_at_its_trigger_and_after_a_timeout_below_it() {
        let b = Bench::new(false);
        b.w(2, 0x81);
        b.w(1, 0x01);
        assert_eq!(b.port.receive(b"0123456"), 7);
        assert!(!b.irq());
        assert_eq!(b.port.receive(b"7"), 1);
        assert_eq!(b.r(2), 0xc4);
        assert_eq!(b.r(0), b'0');
        assert_eq!(b.r(2), 0xc1);
        // Four characters of ten bits at 115200 baud.
        b.pass(347_000);
        assert!(!b.irq());
        b.pass(1_000);
        assert_eq!(b.r(2), 0xcc);
        b.r(0);
        assert_eq!(b.r(2), 0xc1);
    }

    #[test]
    fn the_fifo_takes_sixteen_and_wakes_the_back_end_when_there_is_room() {
        let b = Bench::new(false);
        b.w(2, 0x01);
        assert_eq!(b.port.receive(&[7; 40]), 16);
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = woken.clone();
        b.port.wait_writable(Box::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        assert_eq!(woken.load(Ordering::SeqCst), 0);
        b.r(0);
        b.r(0);
        assert_eq!(woken.load(Ordering::SeqCst), 1);
        assert_eq!(b.port.receive(&[8; 40]), 2);
    }

    #[test]
    fn without_fifos_there_is_one_byte() {
        let b = Bench::new(false);
        assert_eq!(b.port.receive(b"ab"), 1);
        assert_eq!(b.r(2) & 0xc0, 0);
        assert_eq!([b.r(5) & 1, b.r(0), b.r(5) & 1], [1, b'a', 0]);
    }

    #[test]
    fn loopback_ties_outputs_to_inputs() {
        // Linux's autoconfig() and every self test do this.
        let b = Bench::new(false);
        b.w(4, 0x1a);
        assert_eq!(b.r(6) & 0xf0, 0x90);
        b.w(4, 0x15);
        assert_eq!(b.r(6) & 0xf0, 0x60);
        b.w(0, 0x5a);
        assert_eq!(b.r(0), 0x5a);
        assert!(b.sink.bytes.lock().is_empty());
        b.w(0, 1);
        b.w(0, 2);
        assert_eq!(b.r(5) & 0x03, 0x03, "overrun");
        assert_eq!([b.r(5) & 0x02, b.r(0)], [0, 2]);
        assert_eq!(b.port.receive(b"x"), 0);
    }

    #[test]
    fn modem_inputs_report_their_changes_once() {
        let b = Bench::new(false);
        b.w(1, 0x08);
        b.port.set_modem_status(false, true, true, true);
        assert!(b.irq());
        assert_eq!(b.r(2), 0x00);
        assert_eq!(b.r(6), 0x78);
        assert!(!b.irq());
        b.port.set_modem_status(false, true, true, false);
        assert_eq!(b.r(6), 0x34, "trailing edge of RI");
        b.w(4, 0x00);
        assert_eq!(*b.sink.control.lock(), (false, false, false));
        b.w(4, 0x03);
        b.w(3, 0x43);
        assert_eq!(*b.sink.control.lock(), (true, true, true));
    }

    #[test]
    fn out2_gates_the_interrupt() {
        let b = Bench::new(false);
        b.w(1, 0x01);
        b.port.receive(b"a");
        assert!(b.irq());
        b.w(4, 0x03);
        assert!(!b.irq());
    }

    #[test]
    fn pacing_sends_one_byte_per_character_time() {
        let b = Bench::new(true);
        b.w(2, 0x01);
        b"abc".iter().for_each(|&byte| b.w(0, byte));
        assert_eq!(*b.sink.bytes.lock(), b"a");
        b.pass(86_806);
        assert_eq!(*b.sink.bytes.lock(), b"ab");
        b.pass(86_806);
        assert_eq!(b.r(5) & 0x60, 0x20, "holding empty, still shifting");
        b.pass(86_806);
        assert_eq!(b.r(5) & 0x60, 0x60);
    }

    #[test]
    fn registers_hold_what_was_written() {
        let b = Bench::new(false);
        b.w(7, 0xa5);
        b.w(1, 0xff);
        b.w(4, 0xef);
        assert_eq!([b.r(7), b.r(1), b.r(4), b.r(3)], [0xa5, 0x0f, 0x0f, 0x03]);
        b.w(3, 0x83);
        assert_eq!([b.r(0), b.r(1)], [1, 0]);
    }

    #[test]
    fn the_saved_state_comes_back_byte_for_byte() {
        let b = Bench::new(false);
        b.w(2, 0xc1);
        b.w(1, 0x05);
        b.port.receive(b"pending");
        let other = Bench::new(false);
        other.device.lock().reset();
        crate::testing::assert_saved_state_survives(&b.device, &other.device);
    }
}
