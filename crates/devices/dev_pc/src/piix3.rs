//! The ISA bridge of the Intel 82371SB ("PIIX3") at PCI 00:01.0, and all interrupt wiring of the board.
//!
//! Source: Intel 82371SB datasheet (290550). PIRQ route control registers 0x60–0x63, reset control register at port 0xcf9. The
//! IDE function is a device of its own; the edge/level control registers belong to the 8259 pair.
//!
//! # Interrupt wiring ([`Wiring`])
//!
//! * ISA interrupt *n* reaches input *n* of the 8259 pair and of the I/O APIC; ISA 0 (the timer) reaches I/O APIC input 2, as the ACPI and MP
//!   tables' override says.
//! * Pin *p* (0 is INTA#) of the PCI device in slot *s* is PIRQ `(p + s - 1) mod 4`, which the route control registers lead to an ISA
//!   interrupt — with SeaBIOS 10, 10, 11, 11 — and with it to that I/O APIC input. The MP table of SeaBIOS and the ACPI link devices describe this.
//! * The same pin also is I/O APIC input `16 + (p + s) mod 8`, as in VirtualBox; the ACPI _PRT for APIC mode describes this.
//!
//! * The HPET drives I/O APIC inputs 20–23, shared with PCI; with legacy replacement it takes ISA interrupts 0 and 8 from the timer and the clock.
//!
//! Both PCI ways are wired at once. A guest uses one and leaves the other masked. VirtualBox switches between them when the guest calls _PIC.

use std::sync::Arc;

use parking_lot::Mutex;
use pdm::connector::{SystemControl, SystemRequest};
use pdm::irq::IrqPin;
use pdm::pci::{ConfigSpace, DevFn, Identity, PciBus, PciDevice, reg};
use pdm::{Device, Iom, IrqLine, IrqSink, PortIo, Width};
use ssm::{Error, Reader, Saveable, Writer};
use vbox_types::Port;

/// The bridge's place on the bus; the IDE controller is function 1 of the same device.
pub const PLACE: DevFn = DevFn::new(1, 0);

const ISA_IRQS: usize = 16;
const PIRQS: usize = 4;
const PIRQ_ROUTE: u8 = 0x60;
/// A route register after reset: not routed.
const ROUTE_RESET: u8 = 0x80;
const RESET_CONTROL: Port = Port(0xcf9);
/// Reset control: "reset CPU" does it on its rising edge.
const RESET_CPU: u8 = 1 << 2;
/// Reset control: bits that are kept.
const RESET_WRITABLE: u8 = 0x06;

/// Interrupts that a PIRQ can be routed to (82371SB, 2.2.8).
const ROUTABLE: u16 = 0b1101_1110_1111_1000;

/// The PIRQ (0–3) of a PCI pin (0 is INTA#).
pub const fn pirq(slot: u8, pin: u8) -> usize {
    (pin as usize + slot as usize + 3) % PIRQS
}

/// The I/O APIC input of a PCI pin in APIC mode.
pub const fn apic_input(slot: u8, pin: u8) -> u32 {
    16 + (pin as u32 + slot as u32) % 8
}

/// Leads an ISA interrupt to both controllers.
struct Isa {
    pic: Arc<dyn IrqSink>,
    io_apic: Option<Arc<dyn IrqSink>>,
}

impl IrqSink for Isa {
    fn set_level(&self, pin: u32, level: bool) {
        // Input 2 of the 8259 pair is the cascade; no device drives it.
        if pin != 2 {
            self.pic.set_level(pin, level);
        }
        if let Some(io_apic) = &self.io_apic {
            match pin {
                0 => io_apic.set_level(2, level),
                2 => {}
                _ => io_apic.set_level(pin, level),
            }
        }
    }
}

/// Where the PCI interrupt pins lead. A slot's four pins are four different PIRQs and four different I/O APIC inputs, so one bit for each
/// slot tells them all.
struct Router {
    /// For each PIRQ the slots that assert it.
    asserted: [u32; PIRQS],
    /// The same for the eight I/O APIC inputs.
    apic_asserted: [u32; 8],
    routes: [u8; PIRQS],
    /// `lines[pirq][irq]`.
    lines: Vec<Vec<IrqLine>>,
}

impl Router {
    fn drive(&self, pirq: usize) {
        let high = self.asserted[pirq] != 0;
        let route = self.routes[pirq];
        let target = usize::from(route & 0xf);
        let target = (route & 0x80 == 0 && ROUTABLE & 1 << target != 0).then_some(target);
        // Leave the old interrupt before asserting the new one.
        for (irq, line) in self.lines[pirq].iter().enumerate() {
            if Some(irq) != target {
                line.set(false);
            }
        }
        if let Some(irq) = target {
            self.lines[pirq][irq].set(high);
        }
    }
}

/// The PCI side of the wiring. Its inputs are slot times four plus pin.
struct Pci {
    router: Mutex<Router>,
    /// Lines to I/O APIC inputs 16–23.
    inputs: Vec<IrqLine>,
}

/// The I/O APIC inputs that no ISA interrupt reaches.
struct HighInputs(Option<Arc<dyn IrqSink>>);

impl IrqSink for HighInputs {
    fn set_level(&self, pin: u32, level: bool) {
        if let Some(io_apic) = &self.0 {
            io_apic.set_level(pin, level);
        }
    }
}

/// Cuts the timer or the clock off its ISA interrupt while the HPET replaces it.
struct Gate {
    line: IrqLine,
    /// The device's level, and whether the gate is shut.
    state: Mutex<(bool, bool)>,
}

impl IrqSink for Gate {
    fn set_level(&self, _pin: u32, level: bool) {
        let mut state = self.state.lock();
        state.0 = level;
        self.line.set(state.0 && !state.1);
    }
}

impl Gate {
    fn new(pin: &Arc<IrqPin>) -> Arc<Self> {
        Arc::new(Self { line: pin.line(), state: Mutex::new((false, false)) })
    }

    fn shut(&self, shut: bool) {
        let mut state = self.state.lock();
        state.1 = shut;
        self.line.set(state.0 && !state.1);
    }
}

fn set_bit(word: &mut u32, bit: u8, level: bool) {
    if level {
        *word |= 1 << bit;
    } else {
        *word &= !(1 << bit);
    }
}

impl IrqSink for Pci {
    fn set_level(&self, index: u32, level: bool) {
        let (slot, pin) = ((index / 4) as u8, (index % 4) as u8);
        let mut router = self.router.lock();
        let number = pirq(slot, pin);
        set_bit(&mut router.asserted[number], slot, level);
        router.drive(number);
        let input = (apic_input(slot, pin) - 16) as usize;
        let word = &mut router.apic_asserted[input];
        set_bit(word, slot, level);
        self.inputs[input].set(*word != 0);
    }
}

/// The interrupt lines of the board: see the module's documentation. Locks: a device's lock comes first, then the wiring's, then those of the
/// controllers.
pub struct Wiring {
    isa: Vec<Arc<IrqPin>>,
    /// In front of ISA interrupts 0 and 8.
    gates: [(Arc<Gate>, Arc<IrqPin>); 2],
    /// I/O APIC inputs 16–23.
    inputs: Vec<Arc<IrqPin>>,
    pci: Arc<Pci>,
    pci_pins: Vec<Arc<IrqPin>>,
}

impl Wiring {
    /// Wires the board to the inputs of the 8259 pair and of the I/O APIC, if there is one.
    pub fn new(pic: Arc<dyn IrqSink>, io_apic: Option<Arc<dyn IrqSink>>) -> Arc<Self> {
        let sink = Arc::new(Isa { pic, io_apic: io_apic.clone() });
        let isa: Vec<_> = (0..ISA_IRQS as u32).map(|irq| IrqPin::new(sink.clone(), irq)).collect();
        let lines = (0..PIRQS).map(|_| isa.iter().map(IrqPin::line).collect()).collect();
        let router =
            Router { asserted: [0; PIRQS], apic_asserted: [0; 8], routes: [ROUTE_RESET; PIRQS], lines };
        let high = Arc::new(HighInputs(io_apic));
        let inputs: Vec<_> = (16..24).map(|input| IrqPin::new(high.clone(), input)).collect();
        let lines = inputs.iter().map(IrqPin::line).collect();
        let pci = Arc::new(Pci { router: Mutex::new(router), inputs: lines });
        let pci_pins = (0..128).map(|index| IrqPin::new(pci.clone(), index)).collect();
        let gates = [0, 8].map(|irq: usize| {
            let gate = Gate::new(&isa[irq]);
            (gate.clone(), IrqPin::new(gate, 0))
        });
        Arc::new(Self { isa, gates, inputs, pci, pci_pins })
    }

    /// A line to ISA interrupt `irq`.
    ///
    /// # Panics
    /// For an interrupt above 15, which is a mistake in the machine's assembly.
    pub fn isa(&self, irq: u8) -> IrqLine {
        match irq {
            0 => self.gates[0].1.line(),
            8 => self.gates[1].1.line(),
            _ => self.isa[usize::from(irq)].line(),
        }
    }

    /// A line to I/O APIC input 16–23, shared with PCI.
    ///
    /// # Panics
    /// For another input, which is a mistake in the machine's assembly.
    pub fn io_apic(&self, input: u8) -> IrqLine {
        self.inputs[usize::from(input) - 16].line()
    }

    /// The HPET's own line to ISA interrupt 0 or 8, used while it replaces the timer and the clock.
    pub fn hpet_legacy(&self, irq: u8) -> IrqLine {
        self.isa[usize::from(irq)].line()
    }

    /// Whether the HPET replaces the timer and the clock, which are cut off then.
    pub fn set_legacy_replacement(&self, on: bool) {
        for (gate, _) in &self.gates {
            gate.shut(on);
        }
    }

    /// The line of a PCI function's interrupt pin: 1 for INTA# to 4 for INTD#, as in its configuration space.
    ///
    /// # Panics
    /// For another pin, which is a mistake in the machine's assembly.
    pub fn intx(&self, at: DevFn, pin: u8) -> IrqLine {
        assert!((1..=4).contains(&pin), "PCI pin {pin}");
        self.pci_pins[usize::from(at.device()) * 4 + usize::from(pin) - 1].line()
    }

    fn set_routes(&self, routes: [u8; PIRQS]) {
        let mut router = self.pci.router.lock();
        if router.routes != routes {
            router.routes = routes;
            (0..PIRQS).for_each(|pirq| router.drive(pirq));
        }
    }

    fn routes(&self) -> [u8; PIRQS] {
        self.pci.router.lock().routes
    }
}

/// The ISA bridge.
pub struct Piix3 {
    wiring: Arc<Wiring>,
    control: Arc<dyn SystemControl>,
    reset_control: u8,
}

impl Piix3 {
    pub fn new(wiring: Arc<Wiring>, control: Arc<dyn SystemControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { wiring, control, reset_control: 0 }))
    }

    /// Plugs the bridge into the bus and claims the reset port. After the host bridge, whose 32-bit port 0xcf8 surrounds it.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom, bus: &PciBus) {
        iom.register(RESET_CONTROL, 1, Width::Byte, this.clone());
        let id = Identity {
            vendor: 0x8086,
            device: 0x7000,
            class: [0x06, 0x01, 0x00],
            header_type: 0x80,
            ..Identity::default()
        };
        let mut space = ConfigSpace::new(&id);
        space.allow(reg::COMMAND, &[0x08, 0x01]);
        space.set_u16(reg::COMMAND, 0x0007);
        space.set_u16(reg::STATUS, 0x0200);
        // Reset values and writable bits of 82371SB, section 2.2: recovery timing, X-bus select, routes, top of memory, DMA,
        // interrupt routing of the motherboard device, chip select, SMI control and events.
        for (offset, value, mask) in [
            (0x4c, 0x4d, 0xff),
            (0x4e, 0x03, 0xff),
            (0x4f, 0x00, 0x01),
            (0x60, ROUTE_RESET, 0x8f),
            (0x61, ROUTE_RESET, 0x8f),
            (0x62, ROUTE_RESET, 0x8f),
            (0x63, ROUTE_RESET, 0x8f),
            (0x69, 0x02, 0xfe),
            (0x6a, 0x00, 0x15),
            (0x70, ROUTE_RESET, 0xef),
            (0x76, 0x0c, 0x8f),
            (0x77, 0x0c, 0x8f),
            (0x78, 0x02, 0xff),
            (0x79, 0x00, 0xff),
            (0x80, 0x00, 0x7f),
            (0x82, 0x00, 0x0f),
            (0xa0, 0x08, 0x1f),
            (0xa2, 0x00, 0xff),
            (0xa3, 0x00, 0x01),
            (0xa8, 0x0f, 0xff),
        ] {
            space.set_byte(offset, value);
            space.allow(offset, &[mask]);
        }
        bus.add(PLACE, "piix3", space, vec![], this.clone());
    }
}

impl PciDevice for Piix3 {
    fn config_written(&mut self, _offset: u8, _width: Width, space: &mut ConfigSpace) {
        self.wiring.set_routes([0, 1, 2, 3].map(|i| space.byte(PIRQ_ROUTE + i)));
    }
}

impl PortIo for Piix3 {
    fn port_read(&mut self, _port: Port, _width: Width) -> u32 {
        self.reset_control.into()
    }

    fn port_write(&mut self, _port: Port, _width: Width, value: u32) {
        let value = value as u8;
        let rising = value & !self.reset_control & RESET_CPU != 0;
        self.reset_control = value & RESET_WRITABLE;
        if rising {
            self.control.request(SystemRequest::Reset);
        }
    }
}

impl Saveable for Piix3 {
    fn unit_name(&self) -> &'static str {
        "piix3"
    }

    fn unit_version(&self) -> u32 {
        1
    }

    /// Levels of the PCI pins are not saved: devices set their lines again when they are loaded.
    fn save(&self, out: &mut Writer) {
        let Self { wiring, control: _, reset_control } = self;
        out.put_bytes(&wiring.routes());
        out.put_u8(*reset_control);
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, 1)?;
        let mut routes = [0; PIRQS];
        input.take_into(&mut routes)?;
        let reset_control = input.take_u8()? & RESET_WRITABLE;
        input.finish()?;
        self.wiring.set_routes(routes);
        self.reset_control = reset_control;
        Ok(())
    }
}

impl Device for Piix3 {
    fn reset(&mut self) {
        self.wiring.set_routes([ROUTE_RESET; PIRQS]);
        self.reset_control = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_golden, assert_saved_state_survives};
    use pgm::Pgm;

    #[derive(Default)]
    struct Levels(Mutex<u32>);
    impl IrqSink for Levels {
        fn set_level(&self, pin: u32, level: bool) {
            set_bit(&mut self.0.lock(), pin as u8, level);
        }
    }

    #[derive(Default)]
    struct Requests(Mutex<Vec<SystemRequest>>);
    impl SystemControl for Requests {
        fn request(&self, request: SystemRequest) {
            self.0.lock().push(request);
        }
    }

    struct Board {
        pic: Arc<Levels>,
        apic: Arc<Levels>,
        wiring: Arc<Wiring>,
        requests: Arc<Requests>,
        bridge: Arc<Mutex<Piix3>>,
        iom: Arc<Iom>,
        bus: Arc<PciBus>,
    }

    fn board() -> Board {
        let (pic, apic) = (Arc::new(Levels::default()), Arc::new(Levels::default()));
        let wiring = Wiring::new(pic.clone(), Some(apic.clone()));
        let requests = Arc::new(Requests::default());
        let bridge = Piix3::new(wiring.clone(), requests.clone());
        let iom = Iom::new();
        let bus = PciBus::new(iom.clone(), Pgm::new(vec![]));
        Piix3::register(&bridge, &iom, &bus);
        Board { pic, apic, wiring, requests, bridge, iom, bus }
    }

    impl Board {
        fn route(&self, pirq: u8, value: u32) {
            self.bus.config_write(PLACE, PIRQ_ROUTE + pirq, Width::Byte, value);
        }

        fn levels(&self) -> (u32, u32) {
            (*self.pic.0.lock(), *self.apic.0.lock())
        }
    }

    #[test]
    fn isa_interrupts_reach_both_controllers_and_the_timer_is_input_two() {
        let board = board();
        board.wiring.isa(4).set(true);
        assert_eq!(board.levels(), (1 << 4, 1 << 4));
        board.wiring.isa(4).set(false);
        board.wiring.isa(0).set(true);
        assert_eq!(board.levels(), (1 << 4 | 1, 1 << 4 | 1 << 2), "another line keeps interrupt 4");
    }

    #[test]
    fn a_pci_pin_goes_where_its_route_register_says() {
        let board = board();
        // Slot 3 INTA# is PIRQ C and input 19.
        let line = board.wiring.intx(DevFn::new(3, 0), 1);
        assert_eq!((pirq(3, 0), apic_input(3, 0)), (2, 19));
        line.set(true);
        assert_eq!(board.levels(), (0, 1 << 19), "not routed after reset");
        board.route(2, 11);
        assert_eq!(board.levels(), (1 << 11, 1 << 11 | 1 << 19));
        board.route(2, 10);
        assert_eq!(board.levels(), (1 << 10, 1 << 10 | 1 << 19));
        board.route(2, 2);
        assert_eq!(board.levels(), (0, 1 << 19), "interrupt 2 is reserved");
        board.route(2, 10);
        line.set(false);
        assert_eq!(board.levels(), (0, 0));
    }

    #[test]
    fn slots_share_a_pirq_until_the_last_lets_go() {
        let board = board();
        board.route(0, 10);
        let lines = [DevFn::new(1, 0), DevFn::new(1, 1), DevFn::new(5, 0)].map(|at| board.wiring.intx(at, 1));
        for line in &lines {
            line.set(true);
        }
        for line in &lines {
            assert_eq!(board.pic.0.lock().to_owned(), 1 << 10);
            line.set(false);
        }
        assert_eq!(board.levels(), (0, 0));
    }

    #[test]
    fn the_reset_port_resets_on_the_rising_edge() {
        let board = board();
        board.iom.write(RESET_CONTROL, Width::Byte, 0x02);
        assert!(board.requests.0.lock().is_empty());
        board.iom.write(RESET_CONTROL, Width::Byte, 0x06);
        board.iom.write(RESET_CONTROL, Width::Byte, 0x06);
        assert_eq!(*board.requests.0.lock(), [SystemRequest::Reset]);
        assert_eq!(board.iom.read(RESET_CONTROL, Width::Byte), 0x06);
    }

    #[test]
    fn a_saved_bridge_comes_back_with_its_routes() {
        let (one, other) = (board(), board());
        one.route(2, 11);
        other.wiring.intx(DevFn::new(3, 0), 1).set(true);
        assert_golden(&one.bridge, include_str!("golden/piix3.v1.hex"));
        assert_saved_state_survives(&one.bridge, &other.bridge);
        assert_eq!(other.pic.0.lock().to_owned(), 1 << 11);
        other.bridge.lock().reset();
        assert_eq!(other.pic.0.lock().to_owned(), 0);
    }
}
