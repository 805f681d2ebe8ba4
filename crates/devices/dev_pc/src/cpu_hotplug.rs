//! CPUs that come and go while the machine runs, as ACPI has it: registers that the DSDT's processor objects read, and a general-purpose
//! event ([`crate::acpi_pm`]) that has the guest run the methods which tell its operating system.
//!
//! Source: ACPI 6.4, sections 5.6.6 (device object notifications), 6.3 (_STA, _EJ0) and 8.4 (processors). 16 ports at [`BASE`], 32 bits each,
//! one bit for each CPU: 0 which CPUs are there (read only); 4 which have come, 8 which are to go (both: a one written clears); 12 lets a CPU
//! go (write only, its number). As in VirtualBox, event 1 tells of changes, and a CPU that is to go stays until the guest has let it go.
//! VirtualBox has other registers in other places: each machine's DSDT knows its own.

use parking_lot::Mutex;
use std::sync::Arc;

use pdm::{Device, Iom, IrqLine, PortIo, Width};
use ssm::{Error, Reader, Saveable, Writer};
use vbox_types::Port;

/// First port.
pub const BASE: u16 = 0xaf00;
/// Ports that are decoded.
pub const PORTS: u16 = 16;
/// The general-purpose event that is raised.
pub const EVENT: u32 = 1;

/// Offsets of the registers.
mod reg {
    pub(super) const PRESENT: u16 = 0;
    pub(super) const COME: u16 = 4;
    pub(super) const TO_GO: u16 = 8;
    pub(super) const LET_GO: u16 = 12;
}

/// The guest-visible state: one bit for each CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    present: u32,
    come: u32,
    to_go: u32,
    /// CPUs that the guest has let go and that are still there.
    let_go: u32,
}

impl State {
    fn read(&self, offset: u16) -> u32 {
        match offset {
            reg::PRESENT => self.present,
            reg::COME => self.come,
            reg::TO_GO => self.to_go,
            _ => 0,
        }
    }

    fn write(&mut self, offset: u16, value: u32) {
        match offset {
            reg::COME => self.come &= !value,
            reg::TO_GO => self.to_go &= !value,
            // The bootstrap processor stays.
            reg::LET_GO if (1..32).contains(&value) => self.let_go |= 1 << value & self.present,
            _ => {}
        }
    }

    /// Level of the event.
    fn event(&self) -> bool {
        self.come | self.to_go != 0
    }
}

/// The device.
pub struct CpuHotplug {
    event: IrqLine,
    state: State,
}

impl CpuHotplug {
    /// With the CPUs of the bit mask `present`; `event` is [`EVENT`]'s line.
    pub fn new(event: IrqLine, present: u32) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { event, state: State { present, ..State::default() } }))
    }

    /// Claims the ports.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        iom.register(Port(BASE), PORTS, Width::Dword, this.clone());
    }

    /// Which CPUs are there.
    pub fn present(&self) -> u32 {
        self.state.present
    }

    /// A CPU has come. It can already be started.
    pub fn plug(&mut self, cpu: u32) {
        self.state.present |= 1 << cpu;
        self.state.come |= 1 << cpu;
        self.state.let_go &= !(1 << cpu);
        self.sync();
    }

    /// Asks the guest to let a CPU go.
    pub fn ask(&mut self, cpu: u32) {
        self.state.let_go &= !(1 << cpu);
        self.state.to_go |= 1 << cpu;
        self.sync();
    }

    /// Whether the guest has let the CPU go since it was asked.
    pub fn is_let_go(&self, cpu: u32) -> bool {
        self.state.let_go & 1 << cpu != 0
    }

    /// The CPU has gone.
    pub fn unplug(&mut self, cpu: u32) {
        let keep = !(1 << cpu);
        let State { present, come, to_go, let_go } = &mut self.state;
        for word in [present, come, to_go, let_go] {
            *word &= keep;
        }
        self.sync();
    }

    fn sync(&self) {
        self.event.set(self.state.event());
    }
}

impl PortIo for CpuHotplug {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        match width {
            Width::Dword => self.state.read(port.0 - BASE),
            _ => width.ones(),
        }
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        if width == Width::Dword {
            self.state.write(port.0 - BASE, value);
            self.sync();
        }
    }
}

impl Device for CpuHotplug {
    /// CPUs stay; what the guest has not heard of it learns at its start.
    fn reset(&mut self) {
        let State { present: _, come, to_go, let_go } = &mut self.state;
        (*come, *to_go, *let_go) = (0, 0, 0);
        self.sync();
    }
}

impl Saveable for CpuHotplug {
    fn unit_name(&self) -> &'static str {
        "cpu-hotplug"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    fn save(&self, out: &mut Writer) {
        let State { present, come, to_go, let_go } = &self.state;
        for word in [present, come, to_go, let_go] {
            out.put_u32(*word);
        }
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        let mut words = [0; 4];
        for word in &mut words {
            *word = input.take_u32()?;
        }
        let [present, come, to_go, let_go] = words;
        // Which CPUs the machine has is settled before its devices are loaded.
        if present != self.state.present {
            return Err(input.invalid(format!("CPUs {present:#x}, not {:#x}", self.state.present)));
        }
        if (come | to_go | let_go) & !present != 0 || let_go & 1 != 0 {
            return Err(input.invalid("an event of a CPU that is not there"));
        }
        input.finish()?;
        self.state = State { present, come, to_go, let_go };
        self.sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use pdm::IrqSink;
    use pdm::irq::IrqPin;

    use super::*;
    use crate::testing::{assert_golden, assert_saved_state_survives};

    #[derive(Default)]
    struct Event(AtomicBool);
    impl IrqSink for Event {
        fn set_level(&self, _: u32, level: bool) {
            self.0.store(level, Ordering::SeqCst);
        }
    }

    struct Machine {
        iom: Arc<Iom>,
        event: Arc<Event>,
        device: Arc<Mutex<CpuHotplug>>,
    }

    fn machine() -> Machine {
        let (iom, event) = (Iom::new(), Arc::new(Event::default()));
        let device = CpuHotplug::new(IrqPin::new(event.clone(), EVENT).line(), 0b11);
        CpuHotplug::register(&device, &iom);
        Machine { iom, event, device }
    }

    impl Machine {
        fn read(&self, offset: u16) -> u32 {
            self.iom.read(Port(BASE + offset), Width::Dword)
        }

        fn write(&self, offset: u16, value: u32) {
            self.iom.write(Port(BASE + offset), Width::Dword, value);
        }

        fn event(&self) -> bool {
            self.event.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn a_cpu_that_comes_is_there_and_raises_the_event_until_the_guest_has_noticed() {
        let m = machine();
        m.device.lock().plug(3);
        assert_eq!((m.read(reg::PRESENT), m.read(reg::COME), m.event()), (0b1011, 0b1000, true));
        m.write(reg::COME, 0b0001);
        assert!(m.event());
        m.write(reg::COME, 0b1000);
        assert_eq!((m.read(reg::COME), m.event()), (0, false));
        m.write(reg::PRESENT, 0);
        assert_eq!(m.read(reg::PRESENT), 0b1011);
    }

    #[test]
    fn a_cpu_stays_until_the_guest_lets_it_go_after_it_was_asked() {
        let m = machine();
        m.write(reg::LET_GO, 1);
        m.device.lock().ask(1);
        assert!(!m.device.lock().is_let_go(1), "that was before");
        assert_eq!((m.read(reg::TO_GO), m.event()), (0b10, true));
        m.write(reg::TO_GO, 0b10);
        assert!(!m.event() && !m.device.lock().is_let_go(1));
        for nonsense in [0, 2, 31, 32, u32::MAX] {
            m.write(reg::LET_GO, nonsense);
            assert!((0..32).all(|cpu| !m.device.lock().is_let_go(cpu)), "{nonsense}");
        }
        m.write(reg::LET_GO, 1);
        assert!(m.device.lock().is_let_go(1));
        assert_eq!(m.read(reg::PRESENT), 0b11);
        m.device.lock().unplug(1);
        assert_eq!((m.read(reg::PRESENT), m.device.lock().is_let_go(1)), (0b01, false));
    }

    #[test]
    fn a_reset_keeps_the_cpus_and_forgets_what_was_to_be_told() {
        let m = machine();
        m.device.lock().plug(2);
        m.device.lock().ask(1);
        m.device.lock().reset();
        assert_eq!((m.read(reg::PRESENT), m.read(reg::COME), m.read(reg::TO_GO)), (0b111, 0, 0));
        assert!(!m.event());
    }

    #[test]
    fn what_is_to_be_told_survives_in_a_saved_state_and_other_cpus_are_refused() {
        let (one, other) = (machine(), machine());
        one.device.lock().ask(1);
        assert_golden(&one.device, include_str!("golden/cpu_hotplug.v1.hex"));
        assert_saved_state_survives(&one.device, &other.device);
        assert!(other.event());
        let mut out = Writer::new();
        one.device.lock().save(&mut out);
        let (bytes, third) = (out.into_bytes(), machine());
        third.device.lock().plug(2);
        assert!(third.device.lock().load(Reader::new("cpu-hotplug", 1, &bytes)).is_err());
    }
}
