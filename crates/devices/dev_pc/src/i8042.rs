//! The Intel 8042 keyboard controller of the IBM AT and PS/2, with a keyboard and a mouse, and port 0x92 (system control
//! port A).
//!
//! Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller"; 82371SB (PIIX3)
//! datasheet section 2.5.6 for port 0x92. Ports 0x60, 0x64 and 0x92. IRQ 1 and IRQ 12 follow the output buffer.
//!
//! Bytes travel at once; there is no serial line time. Left out: the password commands (no password is installed) and
//! the diagnostic dump. The A20 gate is one for both ports, open after reset as VirtualBox has it.

use std::sync::{Arc, Weak};

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::connector::{KeyboardPort, MousePort, SystemControl, SystemRequest};
use pdm::{Device, Iom, IrqLine, PortIo, Width};
use pgm::Pgm;
use vbox_types::Port;

use crate::ps2::keyboard::{Keyboard, translate};
use crate::ps2::mouse::Mouse;

/// The status register (port 0x64).
#[bitfield(u8)]
struct Status {
    output_full: bool,
    input_full: bool,
    system: bool,
    /// The last byte written was a command.
    command: bool,
    unlocked: bool,
    from_mouse: bool,
    timeout: bool,
    parity: bool,
}

/// The command byte, byte 0 of the controller's RAM.
#[bitfield(u8)]
struct CommandByte {
    keyboard_interrupt: bool,
    mouse_interrupt: bool,
    system: bool,
    _override: bool,
    keyboard_disabled: bool,
    mouse_disabled: bool,
    translate: bool,
    _zero: bool,
}

/// The output port (P2).
#[bitfield(u8)]
struct OutputPort {
    /// Low resets the machine.
    not_reset: bool,
    a20: bool,
    #[bits(2)]
    _unused: u8,
    keyboard_full: bool,
    mouse_full: bool,
    #[bits(2)]
    lines: u8,
}

/// Where a byte in the output buffer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Controller,
    Keyboard,
    Mouse,
}

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub a20: Option<bool>,
    pub reset: bool,
}

/// Guest-visible state of the controller and its two devices.
#[derive(Clone, Debug)]
pub struct State {
    keyboard: Keyboard,
    mouse: Mouse,
    ram: [u8; 32],
    output: Option<(u8, Source)>,
    /// An answer that waits for the output buffer.
    answer: Option<(u8, Source)>,
    /// What port 0x60 gives when the output buffer is empty.
    last: u8,
    /// A command that awaits its data byte at port 0x60.
    command: Option<u8>,
    last_was_command: bool,
    /// The next byte of the keyboard is a break code (translation saw 0xf0).
    break_code: bool,
}

impl State {
    pub fn power_on() -> Self {
        let mut ram = [0; 32];
        ram[0] = CommandByte::new().with_keyboard_interrupt(true).with_mouse_interrupt(true).into_bits();
        Self {
            keyboard: Keyboard::power_on(),
            mouse: Mouse::power_on(),
            ram,
            output: None,
            answer: None,
            last: 0,
            command: None,
            last_was_command: true,
            break_code: false,
        }
    }

    fn command_byte(&self) -> CommandByte {
        CommandByte::from_bits(self.ram[0])
    }

    fn change(&mut self, change: impl FnOnce(CommandByte) -> CommandByte) {
        self.ram[0] = change(self.command_byte()).into_bits();
    }

    fn source(&self) -> Option<Source> {
        self.output.map(|(_, source)| source)
    }

    /// Levels of IRQ 1 and IRQ 12.
    pub fn irqs(&self) -> (bool, bool) {
        let command_byte = self.command_byte();
        let source = self.source();
        (
            command_byte.keyboard_interrupt() && source.is_some_and(|source| source != Source::Mouse),
            command_byte.mouse_interrupt() && source == Some(Source::Mouse),
        )
    }

    /// Moves the next waiting byte into the output buffer if that is empty.
    pub fn refill(&mut self) {
        if self.output.is_none() {
            self.output = self.answer.take();
        }
        if self.output.is_none() && !self.command_byte().keyboard_disabled() {
            while let Some(byte) = self.keyboard.pop() {
                if !self.command_byte().translate() {
                    self.output = Some((byte, Source::Keyboard));
                } else if byte == 0xf0 {
                    self.break_code = true;
                    continue;
                } else {
                    let is_break = std::mem::take(&mut self.break_code);
                    self.output = Some((translate(byte) | u8::from(is_break) << 7, Source::Keyboard));
                }
                break;
            }
        }
        if self.output.is_none() && !self.command_byte().mouse_disabled() {
            self.output = self.mouse.pop().map(|byte| (byte, Source::Mouse));
        }
    }

    fn respond(&mut self, byte: u8) {
        self.answer = Some((byte, Source::Controller));
    }

    /// Reads a port. `a20` is the gate's state.
    pub fn read(&mut self, port: Port, a20: bool) -> u8 {
        match port.0 {
            0x60 => {
                if let Some((byte, _)) = self.output.take() {
                    self.last = byte;
                }
                self.last
            }
            0x64 => Status::new()
                .with_output_full(self.output.is_some())
                .with_system(self.command_byte().system())
                .with_command(self.last_was_command)
                .with_unlocked(true)
                .with_from_mouse(self.source() == Some(Source::Mouse))
                .into_bits(),
            0x92 => u8::from(a20) << 1,
            _ => 0xff,
        }
    }

    /// Writes a port. `a20` is the gate's state.
    pub fn write(&mut self, port: Port, value: u8, a20: bool) -> Effects {
        match port.0 {
            0x60 => {
                self.last_was_command = false;
                return self.write_data(value);
            }
            0x64 => {
                self.last_was_command = true;
                return self.write_command(value, a20);
            }
            0x92 => return Effects { a20: Some(value & 2 != 0), reset: value & 1 != 0 },
            _ => {}
        }
        Effects::default()
    }

    fn write_command(&mut self, command: u8, a20: bool) -> Effects {
        let mut effects = Effects::default();
        self.command = None;
        match command {
            0x20..=0x3f => self.respond(self.ram[usize::from(command & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(command),
            // No password is installed.
            0xa4 => self.respond(0xf1),
            0xa7 => self.change(|byte| byte.with_mouse_disabled(true)),
            0xa8 => self.change(|byte| byte.with_mouse_disabled(false)),
            0xa9 | 0xab => self.respond(0x00),
            0xaa => {
                self.change(|byte| byte.with_system(true));
                self.respond(0x55);
            }
            0xad => self.change(|byte| byte.with_keyboard_disabled(true)),
            0xae => self.change(|byte| byte.with_keyboard_disabled(false)),
            // The input port: keyboard not locked.
            0xc0 => self.respond(0x80),
            0xd0 => {
                let source = self.source();
                let port = OutputPort::new()
                    .with_not_reset(true)
                    .with_a20(a20)
                    .with_keyboard_full(source.is_some_and(|source| source != Source::Mouse))
                    .with_mouse_full(source == Some(Source::Mouse))
                    .with_lines(3);
                self.respond(port.into_bits());
            }
            0xdd => effects.a20 = Some(false),
            0xdf => effects.a20 = Some(true),
            0xe0 => self.respond(0x00),
            // Pulses output port bits that are zero in the command; bit 0 is the reset line.
            0xf0..=0xff => effects.reset = command & 1 == 0,
            _ => {}
        }
        effects
    }

    fn write_data(&mut self, value: u8) -> Effects {
        match self.command.take() {
            Some(command @ 0x60..=0x7f) => self.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                let port = OutputPort::from_bits(value);
                return Effects { a20: Some(port.a20()), reset: !port.not_reset() };
            }
            Some(0xd2) => self.answer = Some((value, Source::Keyboard)),
            Some(0xd3) => self.answer = Some((value, Source::Mouse)),
            // Sending opens the device's line again.
            Some(0xd4) => {
                self.change(|byte| byte.with_mouse_disabled(false));
                self.mouse.command(value);
            }
            _ => {
                self.change(|byte| byte.with_keyboard_disabled(false));
                self.keyboard.command(value);
            }
        }
        Effects::default()
    }
}

/// The controller as a device.
pub struct I8042 {
    irq1: IrqLine,
    irq12: IrqLine,
    pgm: Arc<Pgm>,
    system: Arc<dyn SystemControl>,
    state: State,
}

impl I8042 {
    /// A controller that drives `irq1` and `irq12`, the A20 gate of `pgm`, and resets through `system`.
    pub fn new(
        irq1: IrqLine,
        irq12: IrqLine,
        pgm: Arc<Pgm>,
        system: Arc<dyn SystemControl>,
    ) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { irq1, irq12, pgm, system, state: State::power_on() }))
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        for port in [0x60, 0x64, 0x92] {
            iom.register(Port(port), 1, Width::Byte, this.clone());
        }
    }

    /// The keyboard as clients see it.
    pub fn keyboard(this: &Arc<Mutex<Self>>) -> Arc<dyn KeyboardPort> {
        Arc::new(Client(Arc::downgrade(this)))
    }

    /// The mouse as clients see it.
    pub fn mouse(this: &Arc<Mutex<Self>>) -> Arc<dyn MousePort> {
        Arc::new(Client(Arc::downgrade(this)))
    }

    fn sync(&mut self) {
        self.state.refill();
        let (irq1, irq12) = self.state.irqs();
        self.irq1.set(irq1);
        self.irq12.set(irq12);
    }
}

struct Client(Weak<Mutex<I8042>>);

impl KeyboardPort for Client {
    fn put_scancodes(&self, codes: &[u8]) -> usize {
        let Some(device) = self.0.upgrade() else { return 0 };
        let mut device = device.lock();
        let taken = device.state.keyboard.put(codes);
        device.sync();
        taken
    }

    fn leds(&self) -> (bool, bool, bool) {
        self.0.upgrade().map_or((false, false, false), |device| device.lock().state.keyboard.leds())
    }
}

impl MousePort for Client {
    fn put_event(&self, dx: i32, dy: i32, dz: i32, buttons: u8) {
        let Some(device) = self.0.upgrade() else { return };
        let mut device = device.lock();
        device.state.mouse.put(dx, dy, dz, buttons);
        device.sync();
    }
}

impl PortIo for I8042 {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        let value = self.state.read(port, self.pgm.a20());
        if port.0 == 0x60 {
            // The lines drop with the buffer's emptying, so that the next byte makes an edge.
            self.irq1.set(false);
            self.irq12.set(false);
            self.sync();
        }
        value.into()
    }

    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        let effects = self.state.write(port, value as u8, self.pgm.a20());
        self.sync();
        if let Some(a20) = effects.a20 {
            self.pgm.set_a20(a20);
        }
        if effects.reset {
            self.system.request(SystemRequest::Reset);
        }
    }
}

impl Device for I8042 {
    fn reset(&mut self) {
        self.state = State::power_on();
        self.pgm.set_a20(true);
        self.sync();
    }
}

impl ssm::Saveable for I8042 {
    fn unit_name(&self) -> &'static str {
        "i8042"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State { keyboard, mouse, ram, output, answer, last, command, last_was_command, break_code } =
            &self.state;
        out.put_bool(self.pgm.a20());
        keyboard.save(out);
        mouse.save(out);
        out.put_bytes(ram);
        for slot in [output, answer] {
            let (byte, source) = match slot {
                None => (0, 0),
                Some((byte, source)) => (*byte, *source as u8 + 1),
            };
            out.put_bytes(&[source, byte]);
        }
        out.put_u8(*last);
        out.put_bool(command.is_some());
        out.put_u8(command.unwrap_or(0));
        out.put_bool(*last_was_command);
        out.put_bool(*break_code);
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        fn slot(input: &mut ssm::Reader<'_>) -> Result<Option<(u8, Source)>, ssm::Error> {
            let source = match input.take_u8()? {
                0 => None,
                1 => Some(Source::Controller),
                2 => Some(Source::Keyboard),
                3 => Some(Source::Mouse),
                other => return Err(input.invalid(format!("output buffer source {other}"))),
            };
            let byte = input.take_u8()?;
            Ok(source.map(|source| (byte, source)))
        }
        ssm::check_version(&input, self.unit_version())?;
        let a20 = input.take_bool()?;
        let (keyboard, mouse) = (Keyboard::load(&mut input)?, Mouse::load(&mut input)?);
        let mut ram = [0; 32];
        input.take_into(&mut ram)?;
        let (output, answer) = (slot(&mut input)?, slot(&mut input)?);
        let last = input.take_u8()?;
        let (has_command, command) = (input.take_bool()?, input.take_u8()?);
        let (last_was_command, break_code) = (input.take_bool()?, input.take_bool()?);
        input.finish()?;
        self.state = State {
            keyboard,
            mouse,
            ram,
            output,
            answer,
            last,
            command: has_command.then_some(command),
            last_was_command,
            break_code,
        };
        self.pgm.set_a20(a20);
        self.sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pdm::irq::{IrqPin, IrqSink};

    #[derive(Default)]
    struct Machine {
        requests: Mutex<Vec<SystemRequest>>,
        edges: Mutex<Vec<(u32, bool)>>,
    }
    impl SystemControl for Machine {
        fn request(&self, request: SystemRequest) {
            self.requests.lock().push(request);
        }
    }
    impl IrqSink for Machine {
        fn set_level(&self, pin: u32, level: bool) {
            self.edges.lock().push((pin, level));
        }
    }

    struct Bench {
        machine: Arc<Machine>,
        pgm: Arc<Pgm>,
        iom: Arc<Iom>,
        device: Arc<Mutex<I8042>>,
    }

    impl Bench {
        fn new() -> Self {
            let (machine, pgm, iom) = (Arc::new(Machine::default()), Pgm::new(vec![]), Iom::new());
            let line = |pin| IrqPin::new(machine.clone(), pin).line();
            let device = I8042::new(line(1), line(12), pgm.clone(), machine.clone());
            I8042::register(&device, &iom);
            Self { machine, pgm, iom, device }
        }

        fn out(&self, port: u16, values: &[u8]) {
            for &value in values {
                self.iom.write(Port(port), Width::Byte, value.into());
            }
        }

        fn inb(&self, port: u16) -> u8 {
            self.iom.read(Port(port), Width::Byte) as u8
        }

        /// Reads until the output buffer is empty: bytes, and whether the mouse sent them.
        fn drain(&self) -> Vec<(u8, bool)> {
            let mut bytes = Vec::new();
            loop {
                let status = self.inb(0x64);
                if status & 1 == 0 {
                    return bytes;
                }
                bytes.push((self.inb(0x60), status & 0x20 != 0));
            }
        }

        fn command_byte(&self, value: u8) {
            self.out(0x64, &[0x60]);
            self.out(0x60, &[value]);
        }
    }

    #[test]
    fn the_firmware_start_up_sequence_works() {
        // What SeaBIOS's ps2port.c does.
        let b = Bench::new();
        b.out(0x64, &[0xad]);
        b.out(0x64, &[0xa7]);
        assert_eq!(b.drain(), []);
        b.out(0x64, &[0xaa]);
        assert_eq!(b.drain(), [(0x55, false)]);
        b.out(0x64, &[0xab]);
        assert_eq!(b.drain(), [(0x00, false)]);
        b.command_byte(0x61);
        b.out(0x60, &[0xff]);
        assert_eq!(b.drain(), [(0xfa, false), (0xaa, false)]);
        b.out(0x60, &[0xf5]);
        b.out(0x60, &[0xf0]);
        b.out(0x60, &[0x02]);
        b.out(0x60, &[0xf4]);
        assert_eq!(b.drain().len(), 4);
        b.out(0x64, &[0x20]);
        assert_eq!(b.drain(), [(0x61, false)]);
    }

    #[test]
    fn a_translating_controller_gives_set_1_and_raises_an_edge_per_byte() {
        let b = Bench::new();
        b.command_byte(0x41);
        let keyboard = I8042::keyboard(&b.device);
        let codes = [0xe0, 0x48, 0xe0, 0xc8];
        assert_eq!(keyboard.put_scancodes(&codes), 4);
        let bytes: Vec<u8> = b.drain().into_iter().map(|(byte, _)| byte).collect();
        assert_eq!(bytes, codes);
        let rises = b.machine.edges.lock().iter().filter(|&&edge| edge == (1, true)).count();
        assert_eq!(rises, 4);
    }

    #[test]
    fn without_translation_the_guest_sees_set_2() {
        let b = Bench::new();
        b.command_byte(0x00);
        I8042::keyboard(&b.device).put_scancodes(&[0x9e]);
        assert_eq!(b.drain(), [(0xf0, false), (0x1c, false)]);
        assert_eq!(*b.machine.edges.lock(), []);
    }

    #[test]
    fn a_disabled_keyboard_line_holds_the_byte_back() {
        let b = Bench::new();
        b.command_byte(0x50);
        I8042::keyboard(&b.device).put_scancodes(&[0x1e]);
        assert_eq!(b.drain(), []);
        b.out(0x64, &[0xae]);
        assert_eq!(b.drain(), [(0x1e, false)]);
    }

    #[test]
    fn the_mouse_is_reached_through_d4_and_uses_irq_12() {
        let b = Bench::new();
        b.command_byte(0x43);
        b.out(0x64, &[0xd4]);
        b.out(0x60, &[0xf4]);
        assert_eq!(b.drain(), [(0xfa, true)]);
        I8042::mouse(&b.device).put_event(1, -2, 0, 1);
        assert!(b.machine.edges.lock().contains(&(12, true)));
        assert_eq!(b.drain(), [(0x09, true), (1, true), (2, true)]);
    }

    #[test]
    fn the_aux_loopback_command_reports_from_the_mouse() {
        // Linux tests the port with 0xd3 before it believes in it.
        let b = Bench::new();
        b.out(0x64, &[0xd3]);
        b.out(0x60, &[0x5a]);
        assert_eq!(b.drain(), [(0x5a, true)]);
    }

    #[test]
    fn the_a20_gate_has_three_switches() {
        let b = Bench::new();
        b.out(0x64, &[0xd1]);
        b.out(0x60, &[0xdd]);
        assert!(!b.pgm.a20());
        b.out(0x92, &[0x02]);
        assert!(b.pgm.a20());
        b.out(0x64, &[0xdd]);
        assert_eq!(b.inb(0x92), 0);
        b.out(0x64, &[0xd0]);
        assert_eq!(b.drain()[0].0 & 0x02, 0);
        b.out(0x64, &[0xdf]);
        assert!(b.pgm.a20());
        assert!(b.machine.requests.lock().is_empty());
    }

    #[test]
    fn reset_is_asked_for_by_pulse_and_fast_reset() {
        let b = Bench::new();
        b.out(0x64, &[0xfe, 0xff]);
        b.out(0x92, &[0x03]);
        assert_eq!(*b.machine.requests.lock(), [SystemRequest::Reset; 2]);
    }

    #[test]
    fn the_saved_state_comes_back_byte_for_byte() {
        let b = Bench::new();
        b.out(0x64, &[0xd4]);
        b.out(0x60, &[0xf4]);
        I8042::mouse(&b.device).put_event(700, -2, 0, 1);
        I8042::keyboard(&b.device).put_scancodes(&[0x1e, 0x9e, 0xe0]);
        b.out(0x64, &[0x20]);
        b.out(0x64, &[0xd1]);
        crate::testing::assert_saved_state_survives(&b.device, &Bench::new().device);
    }
}
