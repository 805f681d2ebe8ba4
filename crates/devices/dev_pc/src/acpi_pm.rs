//! The power management function of the Intel 82371AB ("PIIX4") at PCI 00:07.0: ACPI fixed hardware, APM ports and SMBus.
//!
//! Sources: Intel 82371AB datasheet (290562), chapter 7; ACPI 6.4, section 4.8. Ports: 64 at PMBASE (configuration 0x40, enabled by
//! bit 0 of 0x80), 16 at SMBHSTBASE (0x90, enabled by bit 0 of 0xd2), APM control and status 0xb2/0xb3. The SCI is ISA interrupt 9, level.
//!
//! The power and sleep buttons are fixed hardware; general-purpose events 0–15 have inputs for other devices ([`AcpiPm::events`]). Sleep type 0 is S5, as SeaBIOS and the datasheet have it and our DSDT says; other sleep
//! types do nothing. 0xf1 to port 0xb2 turns ACPI mode on, 0xf0 off. The timer runs at 3.579545 MHz from power-on,
//! 32 bits wide (VirtualBox) or 24 (the real chip).
//! Left out: SMM — DEVACTB's APMC_EN reads as set, so that SeaBIOS takes the SMI handler for installed (`src/fw/smm.c`);
//! device monitors, throttling and clock control are plain storage; nothing answers on the SMBus.
//! VirtualBox places its power management block at 0x4000.

use std::sync::{Arc, Weak};

use bitfield_struct::bitfield;
use parking_lot::Mutex;
use pdm::connector::{SystemControl, SystemRequest};
use pdm::iom::PortHandle;
use pdm::irq::IrqPin;
use pdm::pci::{ConfigSpace, DevFn, Identity, PciBus, PciDevice, reg};
use pdm::{Device, Iom, IrqLine, IrqSink, PortIo, Width};
use ssm::{Error, Reader, Saveable, Writer};
use tm::{Clock, Nanos, Timer, TimerQueue, TimerTarget};
use vbox_types::Port;

/// The function's place on the bus.
pub const PLACE: DevFn = DevFn::new(7, 0);
/// The ISA interrupt of the SCI.
pub const SCI_IRQ: u8 = 9;
/// The port that turns ACPI mode on and off, with the values that do; the FADT tells them.
pub const SMI_COMMAND: u16 = 0xb2;
pub const ACPI_ENABLE: u8 = 0xf1;
pub const ACPI_DISABLE: u8 = 0xf0;
/// The sleep type of S5 for the DSDT.
pub const S5_TYPE: u8 = 0;
/// Rate of the power management timer.
pub const TIMER_HZ: u64 = 3_579_545;

const PM_PORTS: u16 = 64;
const SMBUS_PORTS: u16 = 16;

/// Offsets into the power management block.
mod pm {
    pub(super) const STATUS: u16 = 0x00;
    pub(super) const ENABLE: u16 = 0x02;
    pub(super) const CONTROL: u16 = 0x04;
    pub(super) const TIMER: u16 = 0x08;
    pub(super) const GP_STATUS: u16 = 0x0c;
    pub(super) const GP_ENABLE: u16 = 0x0e;
    pub(super) const PROCESSOR: u16 = 0x10;
    pub(super) const GLOBAL_STATUS: u16 = 0x18;
    pub(super) const DEVICE_STATUS: u16 = 0x1c;
    pub(super) const GLOBAL_ENABLE: u16 = 0x20;
    pub(super) const GLOBAL_CONTROL: u16 = 0x28;
    pub(super) const DEVICE_CONTROL: u16 = 0x2c;
    pub(super) const GP_OUTPUT: u16 = 0x34;
}

/// Configuration registers.
mod config {
    pub(super) const PM_BASE: u8 = 0x40;
    pub(super) const DEVICE_B: u8 = 0x58;
    pub(super) const PM_ENABLE: u8 = 0x80;
    pub(super) const SMBUS_BASE: u8 = 0x90;
    pub(super) const SMBUS_CONFIG: u8 = 0xd2;
}

/// PMSTS and PMEN.
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
struct Events {
    timer: bool,
    #[bits(3)]
    _r0: u8,
    bus_master: bool,
    global: bool,
    #[bits(2)]
    _r1: u8,
    power_button: bool,
    sleep_button: bool,
    rtc: bool,
    #[bits(4)]
    _r2: u8,
    wake: bool,
}

const STATUS_BITS: u16 = 0x8731;
const ENABLE_BITS: u16 = 0x0721;

/// PMCNTRL.
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
struct Control {
    sci_enable: bool,
    bus_master_reload: bool,
    global_release: bool,
    #[bits(7)]
    _r0: u8,
    #[bits(3)]
    sleep_type: u8,
    /// Write only.
    sleep: bool,
    #[bits(2)]
    _r1: u8,
}

const CONTROL_BITS: u16 = 0x1c03;

/// SMBus host status: "device error", set when nobody answers.
const SMBUS_DEVICE_ERROR: u8 = 1 << 2;
/// SMBus host control: start.
const SMBUS_START: u8 = 1 << 6;

/// The guest-visible state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    status: Events,
    enable: Events,
    control: Control,
    gp_status: u16,
    gp_enable: u16,
    /// Levels at the inputs of the general-purpose events.
    gp_levels: u16,
    /// Processor control, global status, device status, global enable, global control, device control, outputs: storage.
    processor: u32,
    global_status: u16,
    device_status: u32,
    global_enable: u16,
    global_control: u32,
    device_control: u32,
    gp_output: u32,
    /// Ports 0xb2 and 0xb3.
    apm: [u8; 2],
    smbus: [u8; SMBUS_PORTS as usize],
    /// How often the timer's top bit had changed when that was last looked at.
    toggles: u64,
    /// The guest has cleared the power button's status since it was pressed last.
    button_handled: bool,
}

/// The part of a written value that falls on a register: `(value, mask)` in the register's own bits.
fn lane(register: u16, size: u16, offset: u16, width: Width, value: u32) -> Option<(u32, u32)> {
    let (mut data, mut mask) = (0, 0);
    for (i, byte) in value.to_le_bytes().into_iter().enumerate().take(width.bytes().into()) {
        let at = (offset + i as u16).wrapping_sub(register);
        if at < size {
            data |= u32::from(byte) << (8 * at);
            mask |= 0xff << (8 * at);
        }
    }
    (mask != 0).then_some((data, mask))
}

impl State {
    /// The state after power-on at time `now`. `bits` is the timer's width.
    pub fn power_on(now: Nanos, bits: u32) -> Self {
        Self {
            status: Events::new(),
            enable: Events::new(),
            control: Control::new(),
            gp_status: 0,
            gp_enable: 0,
            gp_levels: 0,
            processor: 0,
            global_status: 0,
            device_status: 0,
            global_enable: 0,
            global_control: 0,
            device_control: 0,
            gp_output: 0,
            apm: [0; 2],
            smbus: [0; SMBUS_PORTS as usize],
            toggles: tm::ticks(now, TIMER_HZ) >> (bits - 1),
            button_handled: false,
        }
    }

    /// Notes a change of the timer's top bit up to `now`.
    pub fn update(&mut self, now: Nanos, bits: u32) {
        let toggles = tm::ticks(now, TIMER_HZ) >> (bits - 1);
        if toggles != self.toggles {
            self.toggles = toggles;
            self.status.set_timer(true);
        }
    }

    /// When [`State::update`] has to be called next.
    pub fn deadline(&self, bits: u32) -> Option<Nanos> {
        let wanted = self.enable.timer() && !self.status.timer();
        wanted.then(|| tm::deadline((self.toggles + 1) << (bits - 1), TIMER_HZ))
    }

    /// Level of the SCI.
    pub fn sci(&self) -> bool {
        let fixed = self.status.into_bits() & self.enable.into_bits() & ENABLE_BITS != 0;
        self.control.sci_enable() && (fixed || self.gp_status & self.gp_enable != 0)
    }

    fn register(&self, offset: u16, now: Nanos, bits: u32) -> (u16, u32) {
        match offset {
            0x00..=0x01 => (pm::STATUS, self.status.into_bits().into()),
            0x02..=0x03 => (pm::ENABLE, self.enable.into_bits().into()),
            0x04..=0x05 => (pm::CONTROL, self.control.into_bits().into()),
            0x08..=0x0b => (pm::TIMER, (tm::ticks(now, TIMER_HZ) & ((1 << bits) - 1)) as u32),
            0x0c..=0x0d => (pm::GP_STATUS, self.gp_status.into()),
            0x0e..=0x0f => (pm::GP_ENABLE, self.gp_enable.into()),
            0x10..=0x13 => (pm::PROCESSOR, self.processor),
            0x18..=0x19 => (pm::GLOBAL_STATUS, self.global_status.into()),
            0x1c..=0x1f => (pm::DEVICE_STATUS, self.device_status),
            0x20..=0x21 => (pm::GLOBAL_ENABLE, self.global_enable.into()),
            0x28..=0x2b => (pm::GLOBAL_CONTROL, self.global_control),
            0x2c..=0x2f => (pm::DEVICE_CONTROL, self.device_control),
            0x34..=0x37 => (pm::GP_OUTPUT, self.gp_output),
            // Reserved ports, processor levels and inputs read as zero.
            _ => (offset, 0),
        }
    }

    /// Reads `width` at `offset` of the block.
    pub fn read(&self, offset: u16, width: Width, now: Nanos, bits: u32) -> u32 {
        let mut value = 0;
        for i in 0..width.bytes() {
            let (start, register) = self.register(offset + i, now, bits);
            let byte = register >> (8 * (offset + i - start)) & 0xff;
            value |= byte << (8 * i);
        }
        value
    }

    /// Writes `width` at `offset` of the block; returns what the guest asks of the machine.
    pub fn write(&mut self, offset: u16, width: Width, value: u32) -> Option<SystemRequest> {
        let on = |register, size| lane(register, size, offset, width, value);
        let set16 = |target: &mut u16, (data, mask): (u32, u32)| {
            *target = *target & !(mask as u16) | data as u16;
        };
        let set32 = |target: &mut u32, (data, mask): (u32, u32)| *target = *target & !mask | data;
        if let Some((data, _)) = on(pm::STATUS, 2) {
            let clear = Events::from_bits(data as u16);
            self.button_handled |= clear.power_button() && self.status.power_button();
            self.status = Events::from_bits(self.status.into_bits() & !clear.into_bits());
        }
        if let Some((data, mask)) = on(pm::ENABLE, 2) {
            let kept = self.enable.into_bits() & !mask as u16;
            self.enable = Events::from_bits(kept | data as u16 & ENABLE_BITS);
        }
        if let Some(part) = on(pm::GP_STATUS, 2) {
            self.gp_status = self.gp_status & !(part.0 as u16) | self.gp_levels;
        }
        if let Some(part) = on(pm::GP_ENABLE, 2) {
            set16(&mut self.gp_enable, part);
        }
        if let Some(part) = on(pm::PROCESSOR, 4) {
            set32(&mut self.processor, part);
        }
        if let Some(part) = on(pm::GLOBAL_STATUS, 2) {
            self.global_status &= !(part.0 as u16);
        }
        if let Some(part) = on(pm::DEVICE_STATUS, 4) {
            self.device_status &= !part.0;
        }
        if let Some(part) = on(pm::GLOBAL_ENABLE, 2) {
            set16(&mut self.global_enable, part);
        }
        if let Some(part) = on(pm::GLOBAL_CONTROL, 4) {
            set32(&mut self.global_control, part);
        }
        if let Some(part) = on(pm::DEVICE_CONTROL, 4) {
            set32(&mut self.device_control, part);
        }
        if let Some(part) = on(pm::GP_OUTPUT, 4) {
            set32(&mut self.gp_output, part);
        }
        let (data, mask) = on(pm::CONTROL, 2)?;
        let old = self.control.into_bits();
        let new = Control::from_bits(old & !mask as u16 | data as u16);
        // SCI_EN belongs to the firmware interface on real hardware, but operating systems may write it back as read.
        self.control = Control::from_bits(new.into_bits() & CONTROL_BITS);
        (new.sleep() && new.sleep_type() == S5_TYPE).then_some(SystemRequest::PowerOff)
    }

    fn write_apm(&mut self, port: u16, value: u8) {
        self.apm[usize::from(port & 1)] = value;
        if port == SMI_COMMAND {
            match value {
                ACPI_ENABLE => self.control.set_sci_enable(true),
                ACPI_DISABLE => self.control.set_sci_enable(false),
                _ => {}
            }
        }
    }

    fn write_smbus(&mut self, offset: usize, value: u8) {
        match offset {
            // Status registers: write one to clear.
            0 => self.smbus[0] &= !(value & 0x1e),
            1 => self.smbus[1] &= !(value & 0x3c),
            2 => {
                self.smbus[2] = value & 0x1f;
                if value & SMBUS_START != 0 {
                    self.smbus[0] |= SMBUS_DEVICE_ERROR;
                }
            }
            _ => {
                if let Some(register) = self.smbus.get_mut(offset) {
                    *register = value;
                }
            }
        }
    }

    /// The input of a general-purpose event has a new level. A high input keeps the event's status set.
    pub fn set_event(&mut self, number: u32, level: bool) {
        let bit = 1u16.checked_shl(number).unwrap_or(0);
        if level {
            self.gp_levels |= bit;
            self.gp_status |= bit;
        } else {
            self.gp_levels &= !bit;
        }
    }

    /// The power button was pressed.
    pub fn press_power_button(&mut self) {
        self.status.set_power_button(true);
        self.button_handled = false;
    }

    /// The sleep button was pressed.
    pub fn press_sleep_button(&mut self) {
        self.status.set_sleep_button(true);
    }
}

/// Where the port blocks are, if they are enabled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Places {
    pm: Option<u16>,
    smbus: Option<u16>,
}

/// The device.
pub struct AcpiPm {
    timer_bits: u32,
    this: Weak<Mutex<Self>>,
    iom: Weak<Iom>,
    sci: IrqLine,
    control: Arc<dyn SystemControl>,
    clock: Arc<Clock>,
    timer: Timer,
    state: State,
    places: Places,
    handles: [Option<PortHandle>; 2],
}

impl AcpiPm {
    /// `sci` is the line of ISA interrupt [`SCI_IRQ`]. `wide_timer`: 32 bits instead of 24; the FADT must agree.
    pub fn new(
        iom: &Arc<Iom>,
        sci: IrqLine,
        control: Arc<dyn SystemControl>,
        timers: &Arc<TimerQueue>,
        wide_timer: bool,
    ) -> Arc<Mutex<Self>> {
        let timer_bits = if wide_timer { 32 } else { 24 };
        let clock = timers.clock().clone();
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            Mutex::new(Self {
                timer_bits,
                this: this.clone(),
                iom: Arc::downgrade(iom),
                sci,
                control,
                timer: timers.create(this.clone(), 0),
                state: State::power_on(clock.now(), timer_bits),
                clock,
                places: Places::default(),
                handles: [None; 2],
            })
        })
    }

    /// Plugs the function into the bus and claims the APM ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom, bus: &PciBus) {
        iom.register(Port(SMI_COMMAND), 2, Width::Byte, this.clone());
        let id = Identity {
            vendor: 0x8086,
            device: 0x7113,
            revision: 0x03,
            class: [0x06, 0x80, 0x00],
            interrupt_pin: 1,
            ..Identity::default()
        };
        let mut space = ConfigSpace::new(&id);
        space.allow(reg::COMMAND, &[0x01, 0x00]);
        space.set_u16(reg::STATUS, 0x0280);
        space.set_byte(reg::INTERRUPT_LINE, SCI_IRQ);
        space.set_u32(config::PM_BASE, 1);
        space.allow(config::PM_BASE, &[0xc0, 0xff]);
        // Count and device activity registers: storage, with APMC_EN set and fixed.
        space.allow(0x44, &[0xff; 0x14]);
        space.set_u32(config::DEVICE_B, 1 << 25);
        space.allow(config::DEVICE_B, &[0xff, 0xff, 0xff, 0xfd]);
        space.allow(0x5c, &[0xff; 0x20]);
        space.allow(config::PM_ENABLE, &[0x01]);
        space.set_u32(config::SMBUS_BASE, 1);
        space.allow(config::SMBUS_BASE, &[0xf0, 0xff]);
        space.allow(config::SMBUS_CONFIG, &[0x0f, 0xff, 0xff, 0xff]);
        bus.add(PLACE, "acpi", space, vec![], this.clone());
    }

    /// A line to the input of a general-purpose event.
    pub fn events(this: &Arc<Mutex<Self>>, number: u32) -> IrqLine {
        IrqPin::new(Arc::new(Inputs(Arc::downgrade(this))), number).line()
    }

    /// The user presses the power button.
    pub fn press_power_button(&mut self) {
        self.state.press_power_button();
        self.sync();
    }

    /// The user presses the sleep button.
    pub fn press_sleep_button(&mut self) {
        self.state.press_sleep_button();
        self.sync();
    }

    /// Whether the guest has taken notice of the latest press of the power button.
    pub fn power_button_handled(&self) -> bool {
        self.state.button_handled
    }

    /// Whether the guest has entered ACPI mode.
    pub fn is_acpi_mode(&self) -> bool {
        self.state.control.sci_enable()
    }

    fn sync(&mut self) {
        self.sci.set(self.state.sci());
        self.timer.set(self.state.deadline(self.timer_bits));
    }

    fn set_places(&mut self, places: Places) {
        let (Some(iom), Some(this)) = (self.iom.upgrade(), self.this.upgrade()) else { return };
        if places == self.places {
            return;
        }
        self.places = places;
        for handle in self.handles.iter_mut().filter_map(Option::take) {
            iom.unregister(handle);
        }
        self.handles = [
            places.pm.map(|at| iom.register(Port(at), PM_PORTS, Width::Dword, this.clone())),
            places.smbus.map(|at| iom.register(Port(at), SMBUS_PORTS, Width::Byte, this.clone())),
        ];
    }

    /// The offset of `port` in a block of `count` ports at `base`.
    fn offset(port: Port, base: Option<u16>, count: u16) -> Option<u16> {
        port.0.checked_sub(base?).filter(|&offset| offset < count)
    }
}

/// The inputs of the general-purpose events.
struct Inputs(Weak<Mutex<AcpiPm>>);

impl IrqSink for Inputs {
    fn set_level(&self, pin: u32, level: bool) {
        if let Some(device) = self.0.upgrade() {
            let mut device = device.lock();
            device.state.set_event(pin, level);
            device.sync();
        }
    }
}

impl PciDevice for AcpiPm {
    fn config_written(&mut self, _offset: u8, _width: Width, space: &mut ConfigSpace) {
        let place = |base: u8, enable: u8, mask: u16| {
            let at = space.u16(base) & mask;
            (space.byte(enable) & 1 != 0 && at != 0).then_some(at)
        };
        self.set_places(Places {
            pm: place(config::PM_BASE, config::PM_ENABLE, 0xffc0),
            smbus: place(config::SMBUS_BASE, config::SMBUS_CONFIG, 0xfff0),
        });
    }
}

impl PortIo for AcpiPm {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        if let Some(offset) = Self::offset(port, self.places.pm, PM_PORTS) {
            let now = self.clock.now();
            self.state.update(now, self.timer_bits);
            return self.state.read(offset, width, now, self.timer_bits);
        }
        if let Some(offset) = Self::offset(port, self.places.smbus, SMBUS_PORTS) {
            return self.state.smbus[usize::from(offset)].into();
        }
        match port.0 {
            SMI_COMMAND | 0xb3 => self.state.apm[usize::from(port.0 & 1)].into(),
            _ => width.ones(),
        }
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        if let Some(offset) = Self::offset(port, self.places.pm, PM_PORTS) {
            self.state.update(self.clock.now(), self.timer_bits);
            if let Some(request) = self.state.write(offset, width, value) {
                self.control.request(request);
            }
            self.sync();
        } else if let Some(offset) = Self::offset(port, self.places.smbus, SMBUS_PORTS) {
            self.state.write_smbus(offset.into(), value as u8);
        } else if matches!(port.0, SMI_COMMAND | 0xb3) {
            self.state.write_apm(port.0, value as u8);
            self.sync();
        }
    }
}

impl TimerTarget for AcpiPm {
    fn timer_fired(&mut self, _timer: u32, now: Nanos) {
        self.state.update(now, self.timer_bits);
        self.sync();
    }
}

impl Saveable for AcpiPm {
    fn unit_name(&self) -> &'static str {
        "acpi"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut Writer) {
        let State {
            status,
            enable,
            control,
            gp_status,
            gp_enable,
            // The wires', not the chip's.
            gp_levels: _,
            processor,
            global_status,
            device_status,
            global_enable,
            global_control,
            device_control,
            gp_output,
            apm,
            smbus,
            toggles,
            button_handled,
        } = &self.state;
        let Places { pm, smbus: smbus_place } = self.places;
        for value in [
            status.into_bits(),
            enable.into_bits(),
            control.into_bits(),
            *gp_status,
            *gp_enable,
            *global_status,
            *global_enable,
            // Zero is no place: the bus does not map a block there.
            pm.unwrap_or(0),
            smbus_place.unwrap_or(0),
        ] {
            out.put_u16(value);
        }
        for value in [processor, device_status, global_control, device_control, gp_output] {
            out.put_u32(*value);
        }
        out.put_bytes(apm);
        out.put_bytes(smbus);
        out.put_u64(*toggles);
        out.put_bool(*button_handled);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        let mut words = [0; 9];
        for word in &mut words {
            *word = input.take_u16()?;
        }
        let [status, enable, control, gp_status, gp_enable, global_status, global_enable, pm, smbus_place] =
            words;
        let mut doubles = [0; 5];
        for double in &mut doubles {
            *double = input.take_u32()?;
        }
        let [processor, device_status, global_control, device_control, gp_output] = doubles;
        let mut apm = [0; 2];
        input.take_into(&mut apm)?;
        let mut smbus = [0; SMBUS_PORTS as usize];
        input.take_into(&mut smbus)?;
        let toggles = input.take_u64()?;
        let button_handled = input.take_bool()?;
        let stray = status & !STATUS_BITS
            | enable & !ENABLE_BITS
            | control & !CONTROL_BITS
            | pm & 0x3f
            | smbus_place & 0xf;
        if stray != 0 || toggles > u64::MAX >> (self.timer_bits - 1) {
            return Err(input.invalid("a register has reserved bits set"));
        }
        input.finish()?;
        self.state = State {
            status: Events::from_bits(status),
            enable: Events::from_bits(enable),
            control: Control::from_bits(control),
            gp_status,
            gp_enable,
            gp_levels: self.state.gp_levels,
            processor,
            global_status,
            device_status,
            global_enable,
            global_control,
            device_control,
            gp_output,
            apm,
            smbus,
            toggles,
            button_handled,
        };
        let some = |at: u16| (at != 0).then_some(at);
        self.set_places(Places { pm: some(pm), smbus: some(smbus_place) });
        self.sync();
        Ok(())
    }
}

impl Device for AcpiPm {
    fn reset(&mut self) {
        self.set_places(Places::default());
        let gp_levels = self.state.gp_levels;
        self.state = State { gp_levels, ..State::power_on(self.clock.now(), self.timer_bits) };
        self.sync();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_golden, assert_saved_state_survives};
    use pdm::IrqSink;
    use pdm::irq::IrqPin;
    use pgm::Pgm;

    #[derive(Default)]
    struct Wires {
        level: Mutex<bool>,
        requests: Mutex<Vec<SystemRequest>>,
    }
    impl IrqSink for Wires {
        fn set_level(&self, _: u32, level: bool) {
            *self.level.lock() = level;
        }
    }
    impl SystemControl for Wires {
        fn request(&self, request: SystemRequest) {
            self.requests.lock().push(request);
        }
    }

    struct Machine {
        iom: Arc<Iom>,
        bus: Arc<PciBus>,
        timers: Arc<TimerQueue>,
        wires: Arc<Wires>,
        device: Arc<Mutex<AcpiPm>>,
    }

    fn machine() -> Machine {
        let iom = Iom::new();
        let bus = PciBus::new(iom.clone(), Pgm::new(vec![]));
        let timers = TimerQueue::new(Clock::manual());
        let wires = Arc::new(Wires::default());
        let sci = IrqPin::new(wires.clone(), 9).line();
        let device = AcpiPm::new(&iom, sci, wires.clone(), &timers, true);
        AcpiPm::register(&device, &iom, &bus);
        Machine { iom, bus, timers, wires, device }
    }

    /// As SeaBIOS sets the chip up.
    fn running() -> Machine {
        let m = machine();
        m.bus.config_write(PLACE, config::PM_BASE, Width::Dword, 0x601);
        m.bus.config_write(PLACE, config::PM_ENABLE, Width::Byte, 1);
        m.bus.config_write(PLACE, config::SMBUS_BASE, Width::Dword, 0x701);
        m.bus.config_write(PLACE, config::SMBUS_CONFIG, Width::Byte, 9);
        m
    }

    impl Machine {
        fn read(&self, offset: u16, width: Width) -> u32 {
            self.iom.read(Port(0x600 + offset), width)
        }

        fn write(&self, offset: u16, width: Width, value: u32) {
            self.iom.write(Port(0x600 + offset), width, value);
        }

        fn sci(&self) -> bool {
            *self.wires.level.lock()
        }
    }

    #[test]
    fn the_block_appears_where_the_firmware_puts_it() {
        let m = machine();
        assert_eq!(m.read(pm::TIMER, Width::Dword), u32::MAX);
        let m = running();
        assert_eq!(m.read(pm::TIMER, Width::Dword), 0);
        assert_eq!(m.bus.config_read(PLACE, config::PM_BASE, Width::Dword), 0x601);
        m.bus.config_write(PLACE, config::PM_BASE, Width::Dword, 0x4000);
        assert_eq!(m.read(pm::TIMER, Width::Dword), u32::MAX);
        assert_eq!(m.iom.read(Port(0x4008), Width::Dword), 0);
    }

    #[test]
    fn the_timer_is_exact() {
        let m = running();
        m.timers.clock().advance(3_600_000_000_000);
        let expected = 3_579_545u64 * 3600;
        assert_eq!(m.read(pm::TIMER, Width::Dword), expected as u32);
        assert_eq!(m.read(pm::TIMER + 1, Width::Word), (expected as u32) >> 8 & 0xffff);
    }

    #[test]
    fn the_timer_interrupts_when_its_top_bit_changes() {
        let m = running();
        m.iom.write(Port(SMI_COMMAND), Width::Byte, ACPI_ENABLE.into());
        m.write(pm::ENABLE, Width::Word, 1);
        m.timers.clock().advance(tm::deadline(1 << 31, TIMER_HZ) - 1);
        m.timers.fire_due();
        assert!(!m.sci());
        m.timers.clock().advance(1);
        m.timers.fire_due();
        assert!(m.sci());
        m.write(pm::STATUS, Width::Word, 1);
        assert!(!m.sci());
    }

    #[test]
    fn the_power_button_raises_the_sci_until_it_is_acknowledged() {
        let m = running();
        m.device.lock().press_power_button();
        m.write(pm::ENABLE, Width::Word, 0x100);
        assert!(!m.sci(), "not in ACPI mode");
        m.iom.write(Port(SMI_COMMAND), Width::Byte, ACPI_ENABLE.into());
        assert!(m.sci() && m.device.lock().is_acpi_mode());
        assert_eq!(m.read(pm::CONTROL, Width::Word), 1);
        m.write(pm::STATUS, Width::Byte, 0xff);
        assert!(m.sci() && !m.device.lock().power_button_handled(), "that was the low byte");
        m.write(pm::STATUS + 1, Width::Byte, 0x01);
        assert!(!m.sci() && m.device.lock().power_button_handled());
        m.iom.write(Port(SMI_COMMAND), Width::Byte, ACPI_DISABLE.into());
        assert!(!m.device.lock().is_acpi_mode());
    }

    #[test]
    fn an_event_stays_set_while_its_input_is_high_and_interrupts_where_it_is_enabled() {
        let m = running();
        let line = AcpiPm::events(&m.device, 1);
        m.iom.write(Port(SMI_COMMAND), Width::Byte, ACPI_ENABLE.into());
        line.set(true);
        assert_eq!(m.read(pm::GP_STATUS, Width::Word), 0b10);
        assert!(!m.sci());
        m.write(pm::GP_ENABLE, Width::Word, 0b10);
        assert!(m.sci());
        m.write(pm::GP_STATUS, Width::Word, 0b10);
        assert!(m.sci(), "the input is high");
        line.set(false);
        assert!(m.sci(), "the status is the guest's to clear");
        m.write(pm::GP_STATUS, Width::Word, 0b10);
        assert!(!m.sci());
    }

    #[test]
    fn the_sleep_type_of_s5_turns_the_machine_off() {
        let m = running();
        m.write(pm::CONTROL, Width::Word, 0x2401);
        assert!(m.wires.requests.lock().is_empty(), "S1 is not offered");
        m.write(pm::CONTROL, Width::Word, 0x2001 | u32::from(S5_TYPE) << 10);
        assert_eq!(*m.wires.requests.lock(), [SystemRequest::PowerOff]);
        assert_eq!(m.read(pm::CONTROL, Width::Word), 0x0001, "SLP_EN reads as zero");
    }

    #[test]
    fn seabios_finds_the_smi_handler_installed_and_cannot_unset_it() {
        let m = running();
        m.bus.config_write(PLACE, config::DEVICE_B, Width::Dword, 0);
        assert_eq!(m.bus.config_read(PLACE, config::DEVICE_B, Width::Dword), 1 << 25);
    }

    #[test]
    fn nothing_answers_on_the_smbus() {
        let m = running();
        m.iom.write(Port(0x704), Width::Byte, 0xa1);
        m.iom.write(Port(0x702), Width::Byte, 0x48);
        assert_eq!(m.iom.read(Port(0x700), Width::Byte), SMBUS_DEVICE_ERROR.into());
        assert_eq!(m.iom.read(Port(0x702), Width::Byte), 0x08);
        m.iom.write(Port(0x700), Width::Byte, 0x1e);
        assert_eq!(m.iom.read(Port(0x700), Width::Byte), 0);
    }

    #[test]
    fn a_saved_device_comes_back_at_its_ports_with_its_interrupt() {
        let (one, other) = (running(), machine());
        one.iom.write(Port(SMI_COMMAND), Width::Byte, ACPI_ENABLE.into());
        one.write(pm::ENABLE, Width::Word, 0x100);
        one.device.lock().press_power_button();
        assert_golden(&one.device, include_str!("golden/acpi_pm.v1.hex"));
        assert_saved_state_survives(&one.device, &other.device);
        assert!(other.sci());
        assert_eq!(other.read(pm::ENABLE, Width::Word), 0x100);
        other.device.lock().reset();
        assert!(!other.sci());
        assert_eq!(other.read(pm::ENABLE, Width::Word), 0xffff);
    }
}
