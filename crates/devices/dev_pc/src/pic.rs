//! The pair of Intel 8259A programmable interrupt controllers, with the edge/level control registers of the
//! 82371SB (PIIX3).
//!
//! Sources: Intel 8259A datasheet (231468-003); 82371SB datasheet section 2.5.4 and 2.5.13 (ELCR).
//! Ports 0x20/0x21 (master), 0xa0/0xa1 (slave), 0x4d0/0x4d1 (ELCR).
//!
//! Deviations, which other virtual PCs share: an edge stays latched when its input drops before the acknowledge cycle;
//! the slave always sits on the master's input 2 whatever ICW1.SNGL and ICW3 say; ICW1.LTIM is ignored in favour of the
//! ELCR, as on the PIIX; the 8080 mode of ICW4 still gives 8086 vectors.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::{Device, ExtInt, Iom, IrqLine, IrqSink, PortIo, Width};
use vbox_types::Port;

/// The master's input that the slave's INT drives.
const CASCADE: u8 = 2;
/// Inputs whose trigger mode can be chosen: not 0–2 on the master, not 8 and 13 on the slave.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];

/// ICW1; D4 set tells it from the operation command words.
#[bitfield(u8)]
struct Icw1 {
    needs_icw4: bool,
    single: bool,
    interval4: bool,
    level_triggered: bool,
    #[bits(4)]
    _fixed: u8,
}

/// ICW4.
#[bitfield(u8)]
struct Icw4 {
    mode_8086: bool,
    auto_eoi: bool,
    #[bits(2)]
    buffer_mode: u8,
    special_fully_nested: bool,
    #[bits(3)]
    _reserved: u8,
}

/// OCW2; `rotate`, `specific` and `eoi` together choose one of eight commands.
#[bitfield(u8)]
struct Ocw2 {
    #[bits(3)]
    level: u8,
    #[bits(2)]
    _select: u8,
    eoi: bool,
    specific: bool,
    rotate: bool,
}

/// OCW3.
#[bitfield(u8)]
struct Ocw3 {
    read_isr: bool,
    read_enable: bool,
    poll: bool,
    #[bits(2)]
    _select: u8,
    special_mask: bool,
    special_mask_enable: bool,
    _reserved: bool,
}

/// Which initialization command word is awaited at the odd port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaiting {
    Nothing,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels at the inputs.
    lines: u8,
    /// Inputs that are level-triggered.
    elcr: u8,
    icw1: Icw1,
    /// Vector of input 0.
    base: u8,
    icw3: u8,
    icw4: Icw4,
    awaiting: Awaiting,
    /// The input with the lowest priority; the next one up has the highest.
    lowest: u8,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    read_isr: bool,
    /// The next read is a poll.
    poll: bool,
}

impl Chip {
    fn power_on() -> Self {
        Self {
            irr: 0,
            isr: 0,
            imr: 0,
            lines: 0,
            elcr: 0,
            icw1: Icw1::new(),
            base: 0,
            icw3: 0,
            icw4: Icw4::new(),
            awaiting: Awaiting::Nothing,
            lowest: 7,
            rotate_on_auto_eoi: false,
            special_mask: false,
            read_isr: false,
            poll: false,
        }
    }

    /// The first input set in `mask` in order of priority, and its rank (0 highest, 8 for none).
    fn rank(&self, mask: u8) -> (u8, u8) {
        for rank in 0..8 {
            let input = (self.lowest + 1 + rank) & 7;
            if mask & 1 << input != 0 {
                return (input, rank);
            }
        }
        (7, 8)
    }

    /// The input that INT stands for now. `cascade` are the requests of a slave, on the master.
    fn request(&self, cascade: bool) -> Option<u8> {
        let requests = (self.irr | u8::from(cascade) << CASCADE) & !self.imr;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.icw4.special_fully_nested() {
            in_service &= !(u8::from(cascade) << CASCADE);
        }
        let (input, rank) = self.rank(requests);
        (rank < self.rank(in_service).1).then_some(input)
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rising = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rising {
            self.irr |= bit;
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.icw4.auto_eoi() {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.icw1 = Icw1::from_bits(value);
            // The edge sense circuit is reset: edges are forgotten, levels are not.
            self.irr = self.lines & self.elcr;
            self.isr = 0;
            self.imr = 0;
            self.lowest = 7;
            self.special_mask = false;
            self.read_isr = false;
            self.poll = false;
            self.rotate_on_auto_eoi = false;
            if !self.icw1.needs_icw4() {
                self.icw4 = Icw4::new();
            }
            self.awaiting = Awaiting::Icw2;
        } else if value & 0x08 != 0 {
            let ocw3 = Ocw3::from_bits(value);
            self.poll = ocw3.poll();
            if ocw3.read_enable() {
                self.read_isr = ocw3.read_isr();
            }
            if ocw3.special_mask_enable() {
                self.special_mask = ocw3.special_mask();
            }
        } else {
            self.write_ocw2(Ocw2::from_bits(value));
        }
    }

    fn write_ocw2(&mut self, ocw2: Ocw2) {
        let level = ocw2.level();
        match (ocw2.rotate(), ocw2.specific(), ocw2.eoi()) {
            (rotate, specific, true) => {
                let ended = if specific {
                    Some(level)
                } else {
                    // In special mask mode a masked input's service bit is not ended by the non-specific command.
                    let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
                    let (input, rank) = self.rank(candidates);
                    (rank < 8).then_some(input)
                };
                if let Some(input) = ended {
                    self.isr &= !(1 << input);
                    if rotate {
                        self.lowest = input;
                    }
                }
            }
            (true, true, false) => self.lowest = level,
            (rotate, false, false) => self.rotate_on_auto_eoi = rotate,
            (false, true, false) => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.awaiting = match self.awaiting {
            Awaiting::Nothing => {
                self.imr = value;
                Awaiting::Nothing
            }
            Awaiting::Icw2 => {
                self.base = value & 0xf8;
                match (self.icw1.single(), self.icw1.needs_icw4()) {
                    (false, _) => Awaiting::Icw3,
                    (true, true) => Awaiting::Icw4,
                    (true, false) => Awaiting::Nothing,
                }
            }
            Awaiting::Icw3 => {
                self.icw3 = value;
                if self.icw1.needs_icw4() { Awaiting::Icw4 } else { Awaiting::Nothing }
            }
            Awaiting::Icw4 => {
                self.icw4 = Icw4::from_bits(value);
                Awaiting::Nothing
            }
        };
    }

    fn save(&self, out: &mut ssm::Writer) {
        let Self {
            irr,
            isr,
            imr,
            lines,
            elcr,
            icw1,
            base,
            icw3,
            icw4,
            awaiting,
            lowest,
            rotate_on_auto_eoi,
            special_mask,
            read_isr,
            poll,
        } = self;
        out.put_bytes(&[*irr, *isr, *imr, *lines, *elcr, icw1.into_bits(), *base, *icw3, icw4.into_bits()]);
        out.put_u8(*awaiting as u8);
        out.put_u8(*lowest);
        for flag in [rotate_on_auto_eoi, special_mask, read_isr, poll] {
            out.put_bool(*flag);
        }
    }

    fn load(input: &mut ssm::Reader<'_>) -> Result<Self, ssm::Error> {
        Ok(Self {
            irr: input.take_u8()?,
            isr: input.take_u8()?,
            imr: input.take_u8()?,
            lines: input.take_u8()?,
            elcr: input.take_u8()?,
            icw1: Icw1::from_bits(input.take_u8()?),
            base: input.take_u8()?,
            icw3: input.take_u8()?,
            icw4: Icw4::from_bits(input.take_u8()?),
            awaiting: match input.take_u8()? {
                0 => Awaiting::Nothing,
                1 => Awaiting::Icw2,
                2 => Awaiting::Icw3,
                3 => Awaiting::Icw4,
                other => return Err(input.invalid(format!("initialization step {other}"))),
            },
            lowest: match input.take_u8()? {
                input @ 0..=7 => input,
                other => return Err(input.invalid(format!("lowest-priority input {other}"))),
            },
            rotate_on_auto_eoi: input.take_bool()?,
            special_mask: input.take_bool()?,
            read_isr: input.take_bool()?,
            poll: input.take_bool()?,
        })
    }
}

/// Guest-visible state of the pair.
#[derive(Clone, Debug)]
pub struct State {
    master: Chip,
    slave: Chip,
}

impl State {
    pub fn power_on() -> Self {
        Self { master: Chip::power_on(), slave: Chip::power_on() }
    }

    fn slave_request(&self) -> Option<u8> {
        self.slave.request(false)
    }

    /// Level of the master's INT, the pair's INTR.
    pub fn intr(&self) -> bool {
        self.master.request(self.slave_request().is_some()).is_some()
    }

    /// Input `input` (0–15; 2 is the cascade and ignored) has the level `level`.
    pub fn set_line(&mut self, input: u8, level: bool) {
        match input {
            CASCADE => {}
            0..=7 => self.master.set_line(input, level),
            8..=15 => self.slave.set_line(input - 8, level),
            _ => {}
        }
    }

    /// An interrupt-acknowledge cycle: the vector.
    pub fn acknowledge(&mut self) -> u8 {
        let slave_request = self.slave_request();
        let Some(input) = self.master.request(slave_request.is_some()) else {
            return self.master.base | 7;
        };
        self.master.acknowledge(input);
        if input != CASCADE {
            return self.master.base | input;
        }
        match slave_request {
            Some(input) => {
                self.slave.acknowledge(input);
                self.slave.base | input
            }
            None => self.slave.base | 7,
        }
    }

    /// Reads a register of the pair.
    pub fn read(&mut self, port: Port) -> u8 {
        let cascade = self.slave_request().is_some();
        let (chip, cascade) = match port.0 {
            0x20 | 0x21 => (&mut self.master, cascade),
            0xa0 | 0xa1 => (&mut self.slave, false),
            0x4d0 => return self.master.elcr,
            0x4d1 => return self.slave.elcr,
            _ => return 0xff,
        };
        if chip.poll {
            chip.poll = false;
            return match chip.request(cascade) {
                Some(input) => {
                    chip.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        if port.0 & 1 != 0 {
            chip.imr
        } else if chip.read_isr {
            chip.isr
        } else {
            chip.irr | u8::from(cascade) << CASCADE
        }
    }

    /// Writes a register of the pair.
    pub fn write(&mut self, port: Port, value: u8) {
        match port.0 {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 | 0x4d1 => {
                let second = usize::from(port.0 & 1);
                let chip = if second == 0 { &mut self.master } else { &mut self.slave };
                chip.elcr = value & ELCR_MASK[second];
                chip.irr = chip.irr & !chip.elcr | chip.lines & chip.elcr;
            }
            _ => {}
        }
    }
}

/// The pair as a device.
pub struct Pic {
    intr_line: IrqLine,
    /// Copy of INTR that is read without the lock.
    intr: Arc<AtomicBool>,
    state: State,
    /// Acknowledge cycles so far.
    acknowledged: u64,
}

impl Pic {
    /// A pair with INTR unconnected.
    pub fn new() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            intr_line: IrqLine::unconnected(),
            intr: Arc::default(),
            state: State::power_on(),
            acknowledged: 0,
        }))
    }

    /// Connects INTR. Called once, when the machine is assembled.
    pub fn connect_intr(&mut self, line: IrqLine) {
        self.intr_line = line;
        self.sync();
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        for (first, count) in [(0x20, 2), (0xa0, 2), (0x4d0, 2)] {
            iom.register(Port(first), count, Width::Byte, this.clone());
        }
    }

    /// The pair's inputs 0–15.
    pub fn inputs(this: &Arc<Mutex<Self>>) -> Arc<dyn IrqSink> {
        Arc::new(Inputs(Arc::downgrade(this)))
    }

    /// The pair's output side.
    pub fn output(this: &Arc<Mutex<Self>>) -> Arc<dyn ExtInt> {
        Arc::new(Output { intr: this.lock().intr.clone(), pic: Arc::downgrade(this) })
    }

    fn sync(&mut self) {
        let intr = self.state.intr();
        if self.intr.swap(intr, Ordering::SeqCst) != intr {
            self.intr_line.set(intr);
        }
    }
}

struct Inputs(Weak<Mutex<Pic>>);

impl IrqSink for Inputs {
    fn set_level(&self, pin: u32, level: bool) {
        let (Some(pic), Ok(pin)) = (self.0.upgrade(), u8::try_from(pin)) else { return };
        let mut pic = pic.lock();
        pic.state.set_line(pin, level);
        pic.sync();
    }
}

struct Output {
    intr: Arc<AtomicBool>,
    pic: Weak<Mutex<Pic>>,
}

impl ExtInt for Output {
    fn is_pending(&self) -> bool {
        self.intr.load(Ordering::SeqCst)
    }

    fn acknowledge(&self) -> u8 {
        let Some(pic) = self.pic.upgrade() else { return 7 };
        let mut pic = pic.lock();
        let vector = pic.state.acknowledge();
        pic.acknowledged += 1;
        pic.sync();
        vector
    }
}

impl PortIo for Pic {
    fn port_read(&mut self, port: Port, _: Width) -> u32 {
        let value = self.state.read(port);
        self.sync();
        value.into()
    }

    fn port_write(&mut self, port: Port, _: Width, value: u32) {
        self.state.write(port, value as u8);
        self.sync();
    }
}

impl Device for Pic {
    fn reset(&mut self) {
        // The inputs are wires: they keep the level that the devices give them.
        let lines = [self.state.master.lines, self.state.slave.lines];
        self.state = State::power_on();
        self.state.master.lines = lines[0];
        self.state.slave.lines = lines[1];
        self.acknowledged = 0;
        self.sync();
    }
}

impl ssm::Saveable for Pic {
    fn unit_name(&self) -> &'static str {
        "i8259"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut ssm::Writer) {
        let State { master, slave } = &self.state;
        master.save(out);
        slave.save(out);
    }

    fn load(&mut self, mut input: ssm::Reader<'_>) -> Result<(), ssm::Error> {
        ssm::check_version(&input, self.unit_version())?;
        let state = State { master: Chip::load(&mut input)?, slave: Chip::load(&mut input)? };
        input.finish()?;
        self.state = state;
        self.sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both chips initialized as a BIOS does: vectors 0x08 and 0x70, everything unmasked.
    fn pair() -> State {
        let mut s = State::power_on();
        for (port, icws) in [(0x20, [0x11, 0x08, 0x04, 0x01]), (0xa0, [0x11, 0x70, 0x02, 0x01])] {
            s.write(Port(port), icws[0]);
            for icw in &icws[1..] {
                s.write(Port(port + 1), *icw);
            }
        }
        s
    }

    fn pulse(s: &mut State, input: u8) {
        s.set_line(input, true);
        s.set_line(input, false);
    }

    const COMMAND: Port = Port(0x20);
    const EOI: u8 = 0x20;

    #[test]
    fn the_highest_priority_is_served_first_and_blocks_the_lower_until_eoi() {
        let mut s = pair();
        pulse(&mut s, 5);
        pulse(&mut s, 3);
        assert_eq!(s.acknowledge(), 0x0b);
        assert!(!s.intr());
        pulse(&mut s, 1);
        assert_eq!(s.acknowledge(), 0x09);
        s.write(COMMAND, EOI);
        assert!(!s.intr(), "input 3 is still in service");
        s.write(COMMAND, EOI);
        assert_eq!(s.acknowledge(), 0x0d);
    }

    #[test]
    fn a_slave_input_needs_an_eoi_at_both_chips() {
        let mut s = pair();
        pulse(&mut s, 12);
        assert!(s.intr());
        assert_eq!(s.acknowledge(), 0x74);
        pulse(&mut s, 14);
        s.write(Port(0xa0), EOI);
        assert!(!s.intr(), "input 2 of the master is still in service");
        s.write(COMMAND, EOI);
        assert_eq!(s.acknowledge(), 0x76);
    }

    #[test]
    fn the_special_fully_nested_master_lets_a_better_slave_request_through() {
        let mut s = pair();
        s.write(COMMAND, 0x11);
        for icw in [0x08, 0x04, 0x11] {
            s.write(Port(0x21), icw);
        }
        pulse(&mut s, 12);
        assert_eq!(s.acknowledge(), 0x74);
        pulse(&mut s, 8);
        assert_eq!(s.acknowledge(), 0x70);
    }

    #[test]
    fn masked_inputs_stay_requested_and_do_not_interrupt() {
        let mut s = pair();
        s.write(Port(0x21), 0xff);
        pulse(&mut s, 4);
        assert!(!s.intr());
        s.write(COMMAND, 0x0a);
        assert_eq!(s.read(COMMAND), 0x10);
        assert_eq!(s.read(Port(0x21)), 0xff);
        s.write(Port(0x21), 0xef);
        assert_eq!(s.acknowledge(), 0x0c);
        s.write(COMMAND, 0x0b);
        assert_eq!(s.read(COMMAND), 0x10, "in service now");
    }

    #[test]
    fn an_acknowledge_without_a_request_is_spurious_and_takes_nothing_into_service() {
        let mut s = pair();
        assert_eq!(s.acknowledge(), 0x0f);
        s.write(COMMAND, 0x0b);
        assert_eq!(s.read(COMMAND), 0);
    }

    #[test]
    fn a_level_input_requests_again_while_it_is_high() {
        let mut s = pair();
        s.write(Port(0x4d1), 0xff);
        assert_eq!(s.read(Port(0x4d1)), 0xde, "inputs 8 and 13 are edge-triggered for ever");
        s.set_line(11, true);
        assert_eq!(s.acknowledge(), 0x73);
        s.write(Port(0xa0), EOI);
        s.write(COMMAND, EOI);
        assert!(s.intr());
        s.set_line(11, false);
        assert!(!s.intr());
    }

    #[test]
    fn an_edge_input_does_not_request_again_while_it_stays_high() {
        let mut s = pair();
        s.set_line(4, true);
        assert_eq!(s.acknowledge(), 0x0c);
        s.write(COMMAND, EOI);
        assert!(!s.intr());
    }

    #[test]
    fn rotation_makes_the_served_input_the_lowest() {
        let mut s = pair();
        pulse(&mut s, 4);
        s.acknowledge();
        s.write(COMMAND, 0xa0);
        pulse(&mut s, 4);
        pulse(&mut s, 6);
        assert_eq!(s.acknowledge(), 0x0e);
        s.write(COMMAND, 0x66);
        // Set priority: input 6 lowest, so 7 is the highest and 0 follows.
        s.write(COMMAND, 0xc6);
        pulse(&mut s, 0);
        pulse(&mut s, 7);
        assert_eq!(s.acknowledge(), 0x0f);
    }

    #[test]
    fn automatic_eoi_leaves_nothing_in_service() {
        let mut s = pair();
        s.write(COMMAND, 0x11);
        for icw in [0x08, 0x04, 0x03] {
            s.write(Port(0x21), icw);
        }
        pulse(&mut s, 1);
        assert_eq!(s.acknowledge(), 0x09);
        pulse(&mut s, 6);
        assert_eq!(s.acknowledge(), 0x0e);
        // Rotate in automatic EOI mode: 6 becomes the lowest.
        s.write(COMMAND, 0x80);
        pulse(&mut s, 6);
        assert_eq!(s.acknowledge(), 0x0e);
        pulse(&mut s, 6);
        pulse(&mut s, 7);
        assert_eq!(s.acknowledge(), 0x0f);
    }

    #[test]
    fn special_mask_mode_lets_lower_inputs_interrupt_a_masked_service() {
        let mut s = pair();
        pulse(&mut s, 3);
        s.acknowledge();
        pulse(&mut s, 6);
        assert!(!s.intr());
        s.write(Port(0x21), 0x08);
        s.write(COMMAND, 0x68);
        assert_eq!(s.acknowledge(), 0x0e);
        s.write(COMMAND, EOI);
        s.write(COMMAND, 0x0b);
        assert_eq!(s.read(COMMAND), 0x08, "the masked service is not ended by a non-specific EOI");
    }

    #[test]
    fn a_poll_acknowledges() {
        let mut s = pair();
        pulse(&mut s, 6);
        s.write(COMMAND, 0x0c);
        assert_eq!(s.read(COMMAND), 0x86);
        assert!(!s.intr());
        s.write(COMMAND, 0x0c);
        assert_eq!(s.read(COMMAND), 0);
    }

    #[test]
    fn initialization_forgets_edges() {
        let mut s = pair();
        pulse(&mut s, 1);
        s.write(COMMAND, 0x11);
        for icw in [0x20, 0x04, 0x01] {
            s.write(Port(0x21), icw);
        }
        assert!(!s.intr());
        pulse(&mut s, 1);
        assert_eq!(s.acknowledge(), 0x21);
    }

    #[derive(Default)]
    struct Level(AtomicBool);
    impl IrqSink for Level {
        fn set_level(&self, _: u32, level: bool) {
            self.0.store(level, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_device_drives_intr_through_its_line() {
        let level = Arc::new(Level::default());
        let pic = Pic::new();
        pic.lock().connect_intr(pdm::irq::IrqPin::new(level.clone(), 0).line());
        let iom = Iom::new();
        Pic::register(&pic, &iom);
        let output = Pic::output(&pic);
        Pic::inputs(&pic).set_level(1, true);
        assert!(output.is_pending() && level.0.load(Ordering::SeqCst));
        iom.write(Port(0x21), Width::Byte, 0xff);
        assert!(!output.is_pending() && !level.0.load(Ordering::SeqCst));
    }

    #[test]
    fn the_saved_state_comes_back_byte_for_byte() {
        let pic = Pic::new();
        pic.lock().state = pair();
        pic.lock().state.set_line(12, true);
        pic.lock().state.acknowledge();
        pic.lock().state.write(Port(0x20), 0x6b);
        crate::testing::assert_saved_state_survives(&pic, &Pic::new());
    }
}
