//! AMD PCnet: the PCnet-PCI II (Am79C970A), the PCnet-FAST III (Am79C973) with its PHY, and the PCnet-ISA (Am79C960) as on an
//! NE2100. Sources: AMD 19436 (Am79C970A), AMD 21510 (Am79C973), AMD 16907 (Am79C960).
//!
//! 32 bytes of ports, which PCI cards have in memory too: 16 of address PROM, then RDP, RAP, RESET and BDP as words, or, after a
//! double word was written to RDP, as double words. The ISA card has fixed ports and an interrupt of the ISA bus.
//!
//! **Left out.** No external memory, no EEPROM behind BCR19, no wake-up, no look-ahead (CSR3, LAPPEN), no collisions. Polling
//! intervals (CSR46, CSR47) are not kept: while polling is on, the transmit ring is looked at every 2 ms, or, when nothing happened
//! for a while, every 16 ms. Whether bus mastering is on does not matter.
//!
//! **As VirtualBox.** Interrupt flags of CSR0 are cleared only after the guest has read them, which drivers of Windows XP need. The
//! PHY is at address 0. Otherwise than there, the link LED (BCR4) shows the link in its LEDOUT bit alone, by which Linux knows it.
//!
//! **Back-pressure.** A frame that finds too few descriptors waits in the back end; drivers give descriptors without a word, so
//! they are looked for with every access to RDP and by the timer. Nothing counts as missed.
//!
//! **Limits.** A frame has at most [`MAX_FRAME`] bytes; longer ones are dropped. One access moves [`TX_FRAMES`] frames.

mod saved;
mod spec;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{NetDriver, NetPort};
use pdm::iom::mmio_handler;
use pdm::irq::IrqLine;
use pdm::pci::{Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, Iom, MmioDevice, PortIo, Width};
use pgm::{Backing, Pgm};
use tm::{Nanos, Timer, TimerQueue, TimerTarget};
use vbox_types::{GuestPhys, Port};

use ether::checksum::crc32;
use spec::{Descriptor, Style, bcr, csr, dstat, extended, extended2, features, mode, status, terr};

/// Bytes of ports and of memory-mapped registers.
const WINDOW: u16 = 32;
/// Longest frame in bytes, its check sequence included.
const MAX_FRAME: usize = 4096;
/// Longest frame that the standard allows, with a VLAN tag and without its check sequence.
const LONGEST: usize = 1518;
/// Shortest frame without its check sequence.
const MIN_FRAME: usize = 60;
/// Most descriptors of a ring.
const MAX_RING: u16 = 512;
/// Frames that one call sends; the timer carries on.
const TX_FRAMES: usize = 128;
/// When the card goes on after so many: what the shortest frames take on a wire of 100 Mbit/s. A ring whose descriptors can only be
/// read never ends.
const TX_PAUSE: Nanos = TX_FRAMES as u64 * 6_720;

const TIMER_POLL: u32 = 0;
const TIMER_SOFTWARE: u32 = 1;
/// The time between two looks at the transmit ring, busy and idle.
const POLL: Nanos = 2_000_000;
const POLL_IDLE: Nanos = 16_000_000;
/// Looks without any event after which the card is idle.
const POLLS_BUSY: u8 = 50;
/// The software timer's unit.
const SOFTWARE_TICK: Nanos = 12_800;

/// Which card the guest finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// PCnet-PCI II.
    Am79C970A,
    /// PCnet-FAST III.
    Am79C973,
    /// PCnet-ISA.
    Am79C960,
}

impl Model {
    /// CSR88 and CSR89.
    const fn chip(self) -> (u16, u16) {
        match self {
            Self::Am79C970A => (0x1003, 0x0262),
            Self::Am79C973 => (0x5003, 0x0262),
            Self::Am79C960 => (0x3003, 0x0000),
        }
    }

    const fn is_pci(self) -> bool {
        !matches!(self, Self::Am79C960)
    }
}

/// PCI identity of the PCI cards.
pub const VENDOR: u16 = 0x1022;
pub const DEVICE: u16 = 0x2000;

/// What the card is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    pub irq: IrqLine,
}

/// One ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ring {
    base: u32,
    /// Number of descriptors.
    len: u16,
    /// Counts down from `len` to 1: the descriptor that is next.
    left: u16,
}

impl Ring {
    const POWER_ON: Self = Self { base: 0, len: 1, left: 1 };

    /// Address of the descriptor that is `ahead` places from the next one.
    fn at(&self, ahead: u16, size: u32) -> u32 {
        let len = u32::from(self.len.max(1));
        let index = (len - u32::from(self.left).clamp(1, len) + u32::from(ahead)) % len;
        self.base.wrapping_add(index * size)
    }

    fn advance(&mut self) {
        self.left = if self.left < 2 { self.len } else { self.left - 1 };
    }
}

/// What the guest can see.
#[derive(Clone, PartialEq, Eq)]
struct State {
    prom: [u8; 16],
    /// Register address pointer.
    rap: u8,
    csr: [u16; csr::COUNT],
    bcr: [u16; bcr::COUNT],
    /// The PHY's control register, as written.
    phy: u16,
    /// Flags of CSR0 that the guest has read.
    seen: u16,
    rx: Ring,
    tx: Ring,
    /// Bits 24 to 31 of addresses in the 16-bit style.
    upper: u32,
    /// The cable is plugged in.
    link: bool,
    /// When the software timer expires, if it runs.
    software: Option<Nanos>,
    /// Frames that the back end has not taken yet.
    pending: VecDeque<Vec<u8>>,
}

/// One card.
pub struct Pcnet {
    model: Model,
    mac: [u8; 6],
    wiring: Wiring,
    poll: Timer,
    software: Timer,
    driver: Option<Arc<dyn NetDriver>>,
    state: State,
    level: bool,
    /// A frame was refused for want of descriptors.
    starved: bool,
    /// Looks at the transmit ring since something happened.
    quiet: u8,
    /// When transmission goes on that stopped after [`TX_FRAMES`].
    more: Option<Nanos>,
}

struct CardPort(Weak<Mutex<Pcnet>>);

impl NetPort for CardPort {
    fn receive(&self, frame: &[u8]) -> bool {
        self.0.upgrade().is_none_or(|card| card.lock().receive(frame))
    }

    fn ready(&self) {
        if let Some(card) = self.0.upgrade() {
            card.lock().transmit();
        }
    }

    fn set_link(&self, up: bool) {
        if let Some(card) = self.0.upgrade() {
            let card = &mut *card.lock();
            card.state.link = up;
            card.resume();
        }
    }
}

impl State {
    /// As after power-on.
    fn power_on(model: Model, mac: [u8; 6], link: bool) -> Self {
        let mut prom = [0; 16];
        prom[..6].copy_from_slice(&mac);
        // What bus the card has; then, behind the checksum, the mark of NE2100 boards.
        prom[9] = if model.is_pci() { 0x11 } else { 0 };
        prom[14..].copy_from_slice(b"WW");
        let sum = prom.iter().fold(0u16, |sum, byte| sum + u16::from(*byte));
        prom[12..14].copy_from_slice(&sum.to_le_bytes());
        let mut state = Self {
            prom,
            rap: 0,
            csr: [0; csr::COUNT],
            bcr: [0; bcr::COUNT],
            phy: 0,
            seen: 0,
            rx: Ring::POWER_ON,
            tx: Ring::POWER_ON,
            upper: 0,
            link,
            software: None,
            pending: VecDeque::new(),
        };
        let registers = [
            (bcr::MSRDA, 0x0005),
            (bcr::MSWRA, 0x0005),
            (bcr::MC, 0x0002),
            (bcr::LNKST, 0x00c0),
            (bcr::LED1, 0x0084),
            (bcr::LED2, 0x0088),
            (bcr::LED3, 0x0090),
            (bcr::BSBC, 0x9001),
            (bcr::EECAS, 0x0002),
            (bcr::SWS, bcr::CSRPCNET),
            (bcr::PLAT, 0xff06),
            (bcr::STVAL, 0xffff),
            (bcr::MIICAS, bcr::XPHYANE),
        ];
        registers.into_iter().for_each(|(number, value)| state.bcr[number] = value);
        if model.is_pci() {
            let identity = [(bcr::PCIVID, VENDOR), (bcr::PCISVID, VENDOR), (bcr::PCISID, DEVICE)];
            identity.into_iter().for_each(|(number, value)| state.bcr[number] = value);
        }
        state.soft_reset(model);
        state
    }

    /// A reset by software: reading RESET. Bus configuration, PHY and timers stay.
    fn soft_reset(&mut self, model: Model) {
        let kept = self.csr[csr::MODE] & mode::KEPT;
        self.csr = [0; csr::COUNT];
        self.csr[csr::STATUS] = status::STOP;
        self.csr[csr::FEATURES] = features::POWER_ON;
        self.csr[csr::MODE] = kept;
        self.csr[csr::FIFO] = 0x1410;
        self.csr[csr::BUS_TIMEOUT] = 0x0200;
        (self.csr[csr::CHIP_LOW], self.csr[csr::CHIP_HIGH]) = model.chip();
        for (word, bytes) in self.csr[csr::PADR..].iter_mut().zip(self.prom[..6].as_chunks::<2>().0) {
            *word = u16::from_le_bytes(*bytes);
        }
        (self.rap, self.seen, self.upper) = (0, 0, 0);
        (self.rx, self.tx) = (Ring::POWER_ON, Ring::POWER_ON);
    }

    fn has(&self, bit: u16) -> bool {
        self.csr[csr::STATUS] & bit != 0
    }

    fn is_suspended(&self) -> bool {
        self.csr[csr::EXTENDED] & extended::SPND != 0
    }

    /// Whether registers that belong to the rings can be written.
    fn at_rest(&self) -> bool {
        self.has(status::STOP) || self.is_suspended()
    }

    fn style(&self) -> Style {
        Style::of(self.bcr[bcr::SWS])
    }

    fn is_dwio(&self) -> bool {
        self.bcr[bcr::BSBC] & bcr::DWIO != 0
    }

    fn loops(&self) -> bool {
        self.csr[csr::MODE] & mode::LOOP != 0
    }

    fn polls(&self) -> bool {
        self.has(status::TXON) && self.csr[csr::FEATURES] & features::DPOLL == 0
    }

    fn set_style(&mut self, value: u16) {
        let value = value & !(bcr::SSIZE32 | bcr::CSRPCNET);
        self.bcr[bcr::SWS] = match value & 0xff {
            1 => value | bcr::SSIZE32,
            2 | 3 => value | bcr::SSIZE32 | bcr::CSRPCNET,
            _ => value & !0xff | bcr::CSRPCNET,
        };
        self.find_upper();
    }

    /// Structures of the 16-bit style lie in the 16 MiB that IADR names.
    fn find_upper(&mut self) {
        self.upper = match self.style() {
            Style::Words => u32::from(self.csr[csr::IADR_HIGH] & 0xff00) << 16,
            Style::Dwords | Style::Reordered => 0,
        };
    }

    /// The initialization block (20 or 28 bytes).
    fn initialize(&mut self, block: &[u8; 28]) {
        let word = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
        let (address, filter, rings, lengths) = match self.style() {
            Style::Words => {
                let (rx, tx) = (dword(16), dword(20));
                (2, 8, [rx & 0xff_ffff | self.upper, tx & 0xff_ffff | self.upper], [rx >> 29, tx >> 29])
            }
            Style::Dwords | Style::Reordered => {
                let first = dword(0);
                (4, 12, [dword(20), dword(24)], [first >> 20 & 0xf, first >> 28])
            }
        };
        self.csr[csr::MODE] = word(0);
        for i in 0..3 {
            self.csr[csr::PADR + i] = word(address + 2 * i);
        }
        for i in 0..4 {
            self.csr[csr::LADRF + i] = word(filter + 2 * i);
        }
        self.csr[csr::RING_LENGTHS] = (lengths[1] << 12 | lengths[0] << 8) as u16;
        [self.rx, self.tx] = [0, 1].map(|i| {
            let len = (1 << lengths[i].min(9)).min(MAX_RING);
            Ring { base: rings[i], len, left: len }
        });
        self.csr[csr::STATUS] = self.csr[csr::STATUS] & !status::STOP | status::INIT | status::IDON;
    }

    fn start(&mut self) {
        let off = self.csr[csr::MODE];
        let mut value = self.csr[csr::STATUS] & !status::STOP | status::STRT;
        if off & mode::DTX == 0 {
            value |= status::TXON;
        }
        if off & mode::DRX == 0 {
            value |= status::RXON;
        }
        self.csr[csr::STATUS] = value;
    }

    fn stop(&mut self) {
        self.csr[csr::STATUS] = status::STOP;
        self.csr[csr::FEATURES] &= !features::STOPPED;
        self.csr[csr::EXTENDED] &= !extended::STOPPED;
    }

    /// Brings INTR up to date; the level of the interrupt line.
    fn interrupt(&mut self) -> bool {
        let [zero, mask, four, five, seven] =
            [csr::STATUS, csr::MASK, csr::FEATURES, csr::EXTENDED, csr::EXTENDED2].map(|i| self.csr[i]);
        let mut pending = zero & !mask & status::CAUSES != 0
            || four >> 1 & !four & features::MASKS != 0
            || five >> 1 & five & extended::ENABLES != 0
            || seven & extended2::STINTE != 0 && seven & extended2::STINT != 0;
        if four & features::UINTCMD != 0 {
            self.csr[csr::FEATURES] = four & !features::UINTCMD | features::UINT;
        }
        pending |= self.csr[csr::FEATURES] & features::UINT != 0;
        self.csr[csr::STATUS] = if pending { zero | status::INTR } else { zero & !status::INTR };
        pending && zero & status::IENA != 0
    }

    // Registers.

    fn read_csr(&mut self) -> u16 {
        let complement = |count: u16| count.wrapping_neg();
        match usize::from(self.rap) {
            csr::STATUS => {
                let value = self.csr[csr::STATUS];
                self.seen = value;
                if value & status::ERRORS != 0 { value | status::ERR } else { value }
            }
            16 => self.csr[csr::IADR_LOW],
            17 => self.csr[csr::IADR_HIGH],
            csr::BADR_LOW => self.rx.base as u16,
            csr::BADR_HIGH => (self.rx.base >> 16) as u16,
            csr::BADX_LOW => self.tx.base as u16,
            csr::BADX_HIGH => (self.tx.base >> 16) as u16,
            csr::STYLE => self.bcr[bcr::SWS],
            csr::RCVRC => complement(self.rx.left),
            csr::XMTRC => complement(self.tx.left),
            csr::RCVRL => complement(self.rx.len),
            csr::XMTRL => complement(self.tx.len),
            number => self.csr[number & (csr::COUNT - 1)],
        }
    }

    /// Writes a register other than CSR0.
    fn write_csr(&mut self, model: Model, number: usize, value: u16) {
        let half = |base: u32, high: bool| match high {
            false => base & 0xffff_0000 | u32::from(value),
            true => base & 0xffff | u32::from(value) << 16,
        };
        let count = value.wrapping_neg().clamp(1, MAX_RING);
        match number {
            16 | 17 => self.write_csr(model, number - 15, value),
            csr::MASK => self.csr[csr::MASK] = value,
            csr::FEATURES => {
                let flags = self.csr[csr::FEATURES] & !value & features::FLAGS;
                self.csr[csr::FEATURES] = value & !features::FLAGS | flags;
            }
            csr::EXTENDED => {
                let flags = self.csr[csr::EXTENDED] & !value & extended::FLAGS;
                self.csr[csr::EXTENDED] = value & !extended::FLAGS | flags;
            }
            csr::EXTENDED2 => {
                let flags = self.csr[csr::EXTENDED2] & !value & extended2::STINT;
                self.csr[csr::EXTENDED2] = value & extended2::STINTE | flags;
            }
            // Only at rest: what follows belongs to the rings.
            _ if !self.at_rest() => {}
            csr::IADR_HIGH => {
                self.csr[csr::IADR_HIGH] = if model.is_pci() { value } else { value & 0xff };
                self.find_upper();
            }
            csr::BADR_LOW => self.rx.base = half(self.rx.base, false),
            csr::BADR_HIGH => self.rx.base = half(self.rx.base, true),
            csr::BADX_LOW => self.tx.base = half(self.tx.base, false),
            csr::BADX_HIGH => self.tx.base = half(self.tx.base, true),
            csr::STYLE => self.write_bcr(bcr::SWS, value),
            csr::RCVRC => self.rx.left = count.min(self.rx.len),
            csr::XMTRC => self.tx.left = count.min(self.tx.len),
            csr::RCVRL => (self.rx.len, self.rx.left) = (count, count),
            csr::XMTRL => (self.tx.len, self.tx.left) = (count, count),
            csr::IADR_LOW | csr::LADRF..=csr::MODE | 18..=23 | 26..=29 | 32..=47 | csr::MISSC => {
                self.csr[number] = value;
            }
            _ => {}
        }
    }

    fn read_bcr(&self, model: Model) -> u16 {
        let number = usize::from(self.rap);
        match number {
            bcr::LNKST..=bcr::LED3 => {
                let value = self.bcr[number] & !bcr::LEDOUT;
                if self.link && value & bcr::LNKSTE != 0 { value | bcr::LEDOUT } else { value }
            }
            bcr::MIIMDR => {
                let address = self.bcr[bcr::MIIADDR];
                let there = model == Model::Am79C973 && address >> 5 & 0x1f == 0;
                if there { self.read_phy(address & 0x1f) } else { 0xffff }
            }
            _ => self.bcr.get(number).copied().unwrap_or(0),
        }
    }

    /// Writes a register other than STVAL.
    fn write_bcr(&mut self, number: usize, value: u16) {
        match number {
            bcr::SWS if self.at_rest() => self.set_style(value),
            bcr::MC
            | bcr::LNKST..=bcr::LED3
            | bcr::FDC
            | bcr::BSBC
            | bcr::EECAS
            | bcr::PLAT
            | bcr::STVAL
            | bcr::MIICAS
            | bcr::MIIADDR => self.bcr[number] = value,
            bcr::MIIMDR if self.bcr[bcr::MIIADDR] & 0x3ff == 0 => self.phy = value,
            _ => {}
        }
    }

    /// The PHY's registers (IEEE 802.3, clause 22); 18 is the Am79C874's diagnostic register.
    fn read_phy(&self, number: u16) -> u16 {
        const ISOLATE: u16 = 1 << 10;
        let control = self.bcr[bcr::MIICAS];
        // With DANAS the PHY negotiates by itself; else the MAC says what it wants.
        let wants = |bit: u16| control & bcr::DANAS != 0 || control & bit != 0;
        let (negotiates, full, fast) = (wants(bcr::XPHYANE), wants(bcr::XPHYFD), wants(bcr::XPHYSP));
        let isolated = self.phy & ISOLATE != 0;
        let link = self.link && !isolated;
        let when = |condition: bool, bits: u16| if condition { bits } else { 0 };
        match number {
            0 => {
                when(negotiates, 1 << 12) | when(fast, 1 << 13) | when(full, 1 << 8) | when(isolated, ISOLATE)
            }
            1 => {
                // 100 and 10 Mbit/s with full and half duplex, as far as they are not forced.
                let modes = match negotiates {
                    true => 0x7800,
                    false => {
                        when(full, 0x5000) & when(fast, 0x6000)
                            | when(!full, 0x2800) & when(fast, 0x6000)
                            | when(full, 0x5000) & when(!fast, 0x1800)
                            | when(!full, 0x2800) & when(!fast, 0x1800)
                    }
                };
                modes
                    | 0x0041
                    | when(negotiates, 1 << 3)
                    | when(negotiates && link, 1 << 5)
                    | when(link, 1 << 2)
            }
            2 => 0x0022,
            3 => 0x561b,
            4 => 0x01e1,
            5 => when(link, 0xc5e1),
            6 => when(link, 0x000d),
            18 => {
                when(link, 0x0300)
                    | when(link && (negotiates || fast), 1 << 10)
                    | when(link && (negotiates || full), 1 << 11)
            }
            _ => 0,
        }
    }

    /// The filter that lets a frame for `dst` in, as bits of its descriptor; `None` if none does.
    fn filter(&self, dst: [u8; 6]) -> Option<u16> {
        let control = self.csr[csr::MODE];
        if control & mode::PROM != 0 {
            return Some(0);
        }
        let word = |i: usize| u16::from_le_bytes([dst[2 * i], dst[2 * i + 1]]);
        if control & mode::DRCVPA == 0 && (0..3).all(|i| self.csr[csr::PADR + i] == word(i)) {
            return Some(dstat::PAM);
        }
        if dst == [0xff; 6] {
            return (control & mode::DRCVBC == 0).then_some(dstat::BAM);
        }
        let bit = (!crc32(&dst) >> 26) as usize;
        let hit = self.csr[csr::LADRF + bit / 16] >> (bit % 16) & 1 != 0;
        (dst[0] & 1 != 0 && hit).then_some(dstat::LAFM)
    }
}

impl Pcnet {
    /// Builds a card with the address `mac`. `cable`: it is plugged in.
    pub fn new(
        model: Model,
        mac: [u8; 6],
        cable: bool,
        wiring: Wiring,
        timers: &Arc<TimerQueue>,
    ) -> Arc<Mutex<Self>> {
        tm::with_timers(|me| Self {
            model,
            mac,
            wiring,
            poll: timers.create(me.clone(), TIMER_POLL),
            software: timers.create(me, TIMER_SOFTWARE),
            driver: None,
            state: State::power_on(model, mac, cable),
            level: false,
            starved: false,
            quiet: 0,
            more: None,
        })
    }

    /// Plugs a PCI card into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let revision = if this.lock().model == Model::Am79C973 { 0x40 } else { 0x16 };
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE,
            revision,
            class: [0x02, 0x00, 0x00],
            subsystem_vendor: VENDOR,
            subsystem: DEVICE,
            header_type: 0,
            interrupt_pin: 1,
        });
        space.set_u16(0x06, space.u16(0x06) | 0x0280);
        // Minimum grant and maximum latency.
        space.set_byte(0x3e, 0x06);
        space.set_byte(0x3f, 0xff);
        let ports = Bar::Io { size: WINDOW, widest: Width::Dword, handler: this.clone() };
        let registers = Bar::Memory {
            size: WINDOW.into(),
            prefetchable: false,
            wide: false,
            backing: Backing::mmio(mmio_handler(this, 0)),
        };
        bus.add(at, "pcnet", space, vec![(0, ports), (1, registers)], this.clone());
    }

    /// Plugs an ISA card in, with its ports from `base` on.
    pub fn register_isa(this: &Arc<Mutex<Self>>, iom: &Iom, base: Port) {
        iom.register(base, WINDOW, Width::Dword, this.clone());
    }

    /// Plugs the card into a network, or out of it. Gives the former one back, to be dropped without the card's lock: its end may
    /// wait for a thread that delivers a frame.
    pub fn connect(&mut self, driver: Option<Arc<dyn NetDriver>>) -> Option<Arc<dyn NetDriver>> {
        let before = std::mem::replace(&mut self.driver, driver);
        self.transmit();
        before
    }

    /// The card as the network sees it.
    pub fn port(this: &Arc<Mutex<Self>>) -> Arc<dyn NetPort> {
        Arc::new(CardPort(Arc::downgrade(this)))
    }

    /// Lets the back end offer a frame again that was refused, if the guest has given a descriptor since or receives no more.
    fn resume(&mut self) {
        if !self.starved {
            return;
        }
        if self.state.has(status::RXON) && !self.state.is_suspended() {
            let next = self.descriptor(self.state.rx.at(0, self.state.style().size()));
            if !next.is(dstat::OWN) {
                return;
            }
        }
        self.starved = false;
        if let Some(driver) = &self.driver {
            driver.resume();
        }
    }

    fn update_irq(&mut self) {
        let level = self.state.interrupt();
        if std::mem::replace(&mut self.level, level) != level {
            self.wiring.irq.set(level);
        }
    }

    /// Arms the timer that looks at the rings, if there is something to look for.
    fn update_poll(&mut self) {
        if let Some(at) = self.more {
            return self.poll.arm(at);
        }
        if !self.starved && (!self.state.polls() || self.state.is_suspended()) {
            return self.poll.disarm();
        }
        let interval = if self.starved || self.quiet < POLLS_BUSY { POLL } else { POLL_IDLE };
        self.poll.arm(self.poll.clock().now().saturating_add(interval));
    }

    // Descriptors.

    fn descriptor(&self, at: u32) -> Descriptor {
        let style = self.state.style();
        let mut raw = [0; 16];
        // The owner comes first: what the guest wrote before is seen then.
        let owner = if style == Style::Words { 3 } else { 7 };
        let size = style.size() as usize;
        self.wiring.pgm.read(GuestPhys(u64::from(at) + owner), &mut raw[..1]);
        let own = u16::from(raw[0]) << 8 & dstat::OWN;
        fence(Ordering::Acquire);
        self.wiring.pgm.read(GuestPhys(at.into()), &mut raw[..size]);
        let mut descriptor = Descriptor::from_bytes(style, &raw);
        descriptor.status = descriptor.status & !dstat::OWN | descriptor.status & own;
        if style == Style::Words {
            descriptor.address |= self.state.upper;
        }
        descriptor
    }

    /// Gives a descriptor of the receive ring back to the guest, with `status` and the message's length.
    fn give_received(&self, at: u32, d: &Descriptor, status: u16, len: u16) {
        let memory = &self.wiring.pgm;
        let at = u64::from(at);
        let status = d.status & !dstat::WRITTEN | status;
        match self.state.style() {
            Style::Words => {
                memory.write(GuestPhys(at + 6), &len.to_le_bytes());
                fence(Ordering::Release);
                memory.write(GuestPhys(at + 3), &[(status >> 8) as u8]);
            }
            style => {
                let message = if style == Style::Dwords { 8 } else { 0 };
                memory.write(GuestPhys(at + message), &u32::from(len).to_le_bytes());
                fence(Ordering::Release);
                memory.write(GuestPhys(at + 6), &status.to_le_bytes());
            }
        }
    }

    /// Gives a descriptor of the transmit ring back, with `errors` if there were some.
    fn give_sent(&self, at: u32, d: &Descriptor, errors: u16) {
        let memory = &self.wiring.pgm;
        let at = u64::from(at);
        let mut status = d.status & !(dstat::OWN | dstat::ERR);
        if errors != 0 {
            status |= dstat::ERR;
        }
        match self.state.style() {
            Style::Words => {
                memory.write(GuestPhys(at + 6), &errors.to_le_bytes());
                fence(Ordering::Release);
                memory.write(GuestPhys(at + 3), &[(status >> 8) as u8]);
            }
            style => {
                let message = if style == Style::Dwords { 8 } else { 0 };
                memory.write(GuestPhys(at + message + 2), &errors.to_le_bytes());
                fence(Ordering::Release);
                memory.write(GuestPhys(at + 6), &status.to_le_bytes());
            }
        }
    }

    // Transmission.

    /// Hands waiting frames to the back end; false if it has no room.
    fn flush(&mut self) -> bool {
        while let Some(frame) = self.state.pending.pop_front() {
            if let Some(driver) = &self.driver
                && let Err(frame) = driver.send(frame)
            {
                self.state.pending.push_front(frame);
                return false;
            }
        }
        true
    }

    /// Takes packets while there are any and the back end has room.
    fn transmit(&mut self) {
        if !self.flush() {
            return;
        }
        let mut turns = 0;
        while self.state.has(status::TXON) && !self.state.is_suspended() && self.take_packet() {
            self.quiet = 0;
            turns += 1;
            if !self.flush() || turns == TX_FRAMES {
                break;
            }
        }
        self.state.csr[csr::STATUS] &= !status::TDMD;
        self.update_irq();
        self.more = (turns == TX_FRAMES).then(|| self.poll.clock().now().saturating_add(TX_PAUSE));
        self.update_poll();
    }

    /// Takes the next packet of the transmit ring; false if none is ready.
    fn take_packet(&mut self) -> bool {
        const DXSUFLO: u16 = 1 << 6;
        let size = self.state.style().size();
        let mut parts: Vec<(u32, Descriptor)> = Vec::new();
        let complete = loop {
            let at = self.state.tx.at(parts.len() as u16, size);
            let part = self.descriptor(at);
            if !part.is(dstat::OWN) || !part.makes_sense() || parts.len() >= self.state.tx.len.into() {
                break false;
            }
            parts.push((at, part));
            // What begins no packet is given back alone.
            if part.is(dstat::ENP) || !parts[0].1.is(dstat::STP) {
                break true;
            }
        };
        let Some((last_at, last)) = parts.pop() else { return false };
        let first = parts.first().map_or(&last, |(_, part)| part);
        let begins = first.is(dstat::STP);
        // A whole frame in a buffer of no length: the driver of Windows NT 4 gives its first unused descriptor so, and wants it back.
        if begins && complete && parts.is_empty() && last.len() > MAX_FRAME - 4 {
            self.give_sent(last_at, &last, 0);
            return false;
        }
        let mut packet = Vec::new();
        let mut too_long = false;
        for (_, part) in parts.iter().chain([&(last_at, last)]) {
            let start = packet.len();
            too_long |= start + part.len() > MAX_FRAME - 4;
            if complete && begins && !too_long {
                packet.resize(start + part.len(), 0);
                self.wiring.pgm.read(GuestPhys(part.address.into()), &mut packet[start..]);
            }
        }
        self.state.csr[csr::FEATURES] |= features::TXSTRT;
        let errors = match (begins, complete) {
            (false, _) => 0,
            (true, true) if too_long => 0,
            (true, true) => self.send(packet),
            // The packet has no end: it is lost, and transmission stops if the guest wants that.
            (true, false) => {
                if self.state.csr[csr::MASK] & DXSUFLO == 0 {
                    self.state.csr[csr::STATUS] &= !status::TXON;
                }
                terr::BUFF | terr::UFLO
            }
        };
        for (at, part) in &parts {
            self.give_sent(*at, part, 0);
            self.state.tx.advance();
        }
        self.give_sent(last_at, &last, errors);
        self.state.tx.advance();
        let when = self.state.csr[csr::EXTENDED];
        let asked = when & extended::LTINTEN != 0 && last.is(dstat::LTINT);
        if begins && (when & extended::TOKINTD == 0 || asked || errors != 0) {
            self.report(status::TINT);
        }
        true
    }

    /// Sets flags of CSR0, which the guest has to read before it can clear them.
    fn report(&mut self, flags: u16) {
        self.state.csr[csr::STATUS] |= flags;
        self.state.seen &= !flags;
    }

    /// Sends a complete packet; the errors that its descriptor is to show.
    fn send(&mut self, mut packet: Vec<u8>) -> u16 {
        if packet.len() > LONGEST {
            self.report(status::BABL);
        }
        if self.state.loops() {
            let checked = self.state.csr[csr::MODE] & mode::DXMTFCS != 0;
            // What finds no descriptor is lost, as on the wire.
            self.deliver(&packet, !checked, true);
            return 0;
        }
        if !self.state.link {
            self.report(status::CERR);
            return terr::LCAR;
        }
        if packet.len() >= 14 {
            if packet.len() < MIN_FRAME {
                packet.resize(MIN_FRAME, 0);
            }
            self.state.pending.push_back(packet);
        }
        0
    }

    // Reception.

    /// A frame from the network; false if there are too few descriptors for it.
    fn receive(&mut self, frame: &[u8]) -> bool {
        if !self.state.link || self.state.loops() {
            return true;
        }
        let taken = self.deliver(frame, true, false);
        if !taken {
            self.starved = true;
        }
        self.update_irq();
        if !taken {
            self.update_poll();
        }
        taken
    }

    /// Puts a frame into the receive ring, with its check sequence if `checked`; false if there are too few descriptors.
    fn deliver(&mut self, frame: &[u8], checked: bool, looped: bool) -> bool {
        let state = &self.state;
        let Some(&dst) = frame.first_chunk::<6>() else { return true };
        if !state.has(status::RXON) || state.is_suspended() || frame.len() > MAX_FRAME - 4 {
            return true;
        }
        let Some(filter) = state.filter(dst) else { return true };
        let mut data = Vec::with_capacity(frame.len().max(MIN_FRAME) + 4);
        data.extend_from_slice(frame);
        // 802.3 frames say how long they are.
        let inner = frame.get(12..14).map_or(0xffff, |t| usize::from(u16::from_be_bytes([t[0], t[1]])));
        if state.csr[csr::FEATURES] & features::ASTRP_RCV != 0 && inner < 46 {
            data.truncate(14 + inner);
        } else {
            if !looped && data.len() < MIN_FRAME {
                data.resize(MIN_FRAME, 0);
            }
            if checked {
                data.extend_from_slice(&crc32(&data).to_le_bytes());
            }
        }

        // First find the descriptors, so that a frame is taken whole or not at all.
        let size = state.style().size();
        let mut taken = Vec::new();
        let mut room = 0;
        while room < data.len() {
            if taken.len() >= usize::from(state.rx.len) {
                // The whole ring is too small: the frame is lost.
                return true;
            }
            let at = state.rx.at(taken.len() as u16, size);
            let descriptor = self.descriptor(at);
            if !descriptor.is(dstat::OWN) || !descriptor.makes_sense() {
                return false;
            }
            room += descriptor.len();
            taken.push((at, descriptor));
        }
        let mut rest = data.as_slice();
        let mut first = dstat::STP;
        for (at, descriptor) in &taken {
            let (part, later) = rest.split_at(rest.len().min(descriptor.len()));
            self.wiring.pgm.write(GuestPhys(descriptor.address.into()), part);
            rest = later;
            let (last, len) = match rest.is_empty() {
                true => (dstat::ENP | filter, data.len() as u16),
                false => (0, 0),
            };
            self.give_received(*at, descriptor, first | last, len);
            first = 0;
            self.state.rx.advance();
        }
        self.quiet = 0;
        self.report(status::RINT);
        true
    }

    // Accesses.

    fn write_status(&mut self, value: u16) {
        let state = &mut self.state;
        let mut value = value;
        if value & 7 == 7 {
            value &= !(status::INIT | status::STRT);
        }
        let before = state.csr[csr::STATUS];
        let flags = before & status::FLAGS & !(value & state.seen);
        let kept = before & !(status::FLAGS | status::IENA | status::ERR);
        state.csr[csr::STATUS] = kept | flags | value & (status::IENA | status::TDMD);
        if value & status::STOP != 0 {
            state.stop();
        }
        if value & status::INIT != 0 && !state.has(status::INIT) {
            state.find_upper();
            let at = u64::from(state.csr[csr::IADR_HIGH]) << 16 | u64::from(state.csr[csr::IADR_LOW]);
            let mut block = [0; 28];
            self.wiring.pgm.read(GuestPhys(at), &mut block);
            state.initialize(&block);
            state.seen &= !status::IDON;
        }
        if value & status::STRT != 0 && !state.has(status::STRT) {
            state.start();
        }
        // Demanded, or due with polling on.
        if state.has(status::TDMD) || state.polls() {
            self.transmit();
        }
    }

    fn read_rdp(&mut self) -> u16 {
        self.resume();
        self.update_irq();
        self.state.read_csr()
    }

    fn write_rdp(&mut self, value: u16) {
        self.quiet = 0;
        match usize::from(self.state.rap) {
            csr::STATUS => self.write_status(value),
            number => self.state.write_csr(self.model, number, value),
        }
        self.resume();
        self.update_irq();
        self.update_poll();
    }

    fn write_bdp(&mut self, value: u16) {
        let number = usize::from(self.state.rap);
        self.state.write_bcr(number, value);
        if number == bcr::STVAL && self.model == Model::Am79C973 {
            self.start_software_timer();
        }
    }

    fn start_software_timer(&mut self) {
        let interval = SOFTWARE_TICK * Nanos::from(self.state.bcr[bcr::STVAL]);
        let now = self.software.clock().now();
        self.state.software = (interval != 0).then(|| now.saturating_add(interval));
        self.software.set(self.state.software);
    }

    fn reset_by_read(&mut self) {
        self.state.soft_reset(self.model);
        self.resume();
        self.update_irq();
        self.update_poll();
    }

    fn read_window(&mut self, offset: u16, width: Width) -> u32 {
        let dwio = self.state.is_dwio();
        match (offset, width) {
            (0..=15, Width::Byte) => self.state.prom[usize::from(offset & 15)].into(),
            (0..=15, _) if (width == Width::Dword) == dwio => {
                let mut bytes = [0; 4];
                let count = usize::from(width.bytes());
                for (byte, at) in bytes[..count].iter_mut().zip(offset..) {
                    *byte = self.state.prom[usize::from(at & 15)];
                }
                u32::from_le_bytes(bytes)
            }
            (0x10, Width::Word) if !dwio => self.read_rdp().into(),
            (0x12, Width::Word) if !dwio => self.state.rap.into(),
            (0x14, Width::Word | Width::Byte) if !dwio => {
                self.reset_by_read();
                0
            }
            (0x16, Width::Word) if !dwio => self.state.read_bcr(self.model).into(),
            (0x10, Width::Dword) if dwio => {
                let value = u32::from(self.read_rdp());
                // Both halves of the chip's number in one.
                let high = match usize::from(self.state.rap) {
                    csr::CHIP_LOW => self.state.csr[csr::CHIP_HIGH],
                    _ => 0,
                };
                u32::from(high) << 16 | value
            }
            (0x14, Width::Dword) if dwio => self.state.rap.into(),
            (0x18, Width::Dword) if dwio => {
                self.reset_by_read();
                0
            }
            (0x1c, Width::Dword) if dwio => self.state.read_bcr(self.model).into(),
            _ => width.ones(),
        }
    }

    fn write_window(&mut self, offset: u16, width: Width, value: u32) {
        let dwio = self.state.is_dwio();
        let word = value as u16;
        match (offset, width) {
            (0..=15, Width::Byte) if self.state.bcr[bcr::MC] & bcr::APROMWE != 0 => {
                self.state.prom[usize::from(offset & 15)] = value as u8;
            }
            (0x10, Width::Word) if !dwio => self.write_rdp(word),
            (0x12, Width::Word) if !dwio => self.state.rap = value as u8 & 0x7f,
            (0x16, Width::Word) if !dwio => self.write_bdp(word),
            (0x10, Width::Dword) if dwio => self.write_rdp(word),
            (0x14, Width::Dword) if dwio => self.state.rap = value as u8 & 0x7f,
            (0x1c, Width::Dword) if dwio => self.write_bdp(word),
            // The way to registers of 32 bits; back leads a reset of the machine.
            (0x10, Width::Dword) if self.model.is_pci() => self.state.bcr[bcr::BSBC] |= bcr::DWIO,
            _ => {}
        }
    }
}

impl PortIo for Pcnet {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        self.read_window(port.0 & (WINDOW - 1), width)
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        self.write_window(port.0 & (WINDOW - 1), width, value);
    }
}

impl MmioDevice for Pcnet {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        let value = match Width::from_bytes(data.len()) {
            Some(width) => self.read_window(offset as u16 & (WINDOW - 1), width),
            None => u32::MAX,
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().enumerate().for_each(|(i, byte)| *byte = bytes.get(i).copied().unwrap_or(0xff));
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        if let Some(width) = Width::from_bytes(data.len()) {
            let mut bytes = [0; 4];
            bytes[..data.len()].copy_from_slice(data);
            self.write_window(offset as u16 & (WINDOW - 1), width, u32::from_le_bytes(bytes));
        }
    }
}

impl PciDevice for Pcnet {
    fn config_written(&mut self, _offset: u8, _width: Width, _space: &mut ConfigSpace) {}
}

impl TimerTarget for Pcnet {
    fn timer_fired(&mut self, timer: u32, _now: Nanos) {
        match timer {
            TIMER_POLL => {
                self.quiet = self.quiet.saturating_add(1);
                self.resume();
                self.transmit();
            }
            _ => {
                self.state.csr[csr::EXTENDED2] |= extended2::STINT;
                self.update_irq();
                self.start_software_timer();
            }
        }
    }
}

impl Device for Pcnet {
    fn reset(&mut self) {
        self.state = State::power_on(self.model, self.mac, self.state.link);
        (self.quiet, self.more) = (0, None);
        self.poll.disarm();
        self.software.set(self.state.software);
        self.update_irq();
        // What waits for descriptors finds the receiver off, and goes.
        self.resume();
    }
}
