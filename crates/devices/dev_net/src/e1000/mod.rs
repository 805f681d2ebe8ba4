//! Intel PRO/1000: the 82540EM, 82543GC and 82545EM with their copper PHY. Source: Intel 317453 (PCI/PCI-X Family of Gigabit
//! Ethernet Controllers Software Developer's Manual).
//!
//! BAR 0 is 128 KiB of registers, BAR 2 the eight ports (IOADDR, IODATA) that lead to them.
//!
//! **Left out.** Delay timers (RDTR, RADV, TIDV, TADV) keep what is written: descriptors are reported at once, and interrupt
//! throttling (ITR) does the moderating. No wake-up, no flow-control frames, no descriptor thresholds, no writable EEPROM.
//!
//! **Back-pressure.** A frame that finds too few descriptors waits in the back end until the guest gives more; transmission stops
//! while the back end's queue is full.
//!
//! **Limits.** A packet to be segmented has at most 64 KiB and its header, a segment at least 64 bytes; what is beyond is
//! dropped. One access to a register moves [`TX_BYTES`] at most; the timer thread carries on.

mod packet;
mod saved;
mod serial;
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
use pdm::{Device, MmioDevice, PortIo, Width};
use pgm::{Backing, Pgm};
use tm::{Nanos, Timer, TimerQueue, TimerTarget};
use vbox_types::{GuestPhys, Port};

use serial::{Asked, EEPROM_WORDS, Management, Microwire, eecd};
use spec::{Context, KEPT, TxDescriptor, cause, ctrl, dcmd, popts, rctl, reg, rxcsum, rxs, status, tctl};

/// Size of the register window.
const WINDOW: u64 = 0x2_0000;
/// Longest frame in bytes: that of the largest receive buffer.
const MAX_FRAME: usize = 16384 - 4;
/// Longest packet that is gathered.
const MAX_PACKET: usize = 0x1_0000 + 256;
/// Descriptors and bytes that one call moves.
const TX_DESCRIPTORS: usize = 1024;
const TX_BYTES: usize = 1 << 20;
/// Shortest frame without its check sequence.
const MIN_FRAME: usize = 60;

const TIMER_ITR: u32 = 0;
const TIMER_TX: u32 = 1;
/// ITR counts in units of 256 ns.
const ITR_UNIT: Nanos = 256;

/// Which card the guest finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// PRO/1000 MT Desktop.
    I82540Em,
    /// PRO/1000 T Server.
    I82543Gc,
    /// PRO/1000 MT Server.
    I82545Em,
}

pub const VENDOR: u16 = 0x8086;

impl Model {
    /// The PCI device id.
    pub const fn device_id(self) -> u16 {
        match self {
            Self::I82540Em => 0x100e,
            Self::I82543Gc => 0x1004,
            Self::I82545Em => 0x100f,
        }
    }

    /// Subsystem vendor and device, VirtualBox's.
    const fn subsystem(self) -> (u16, u16) {
        match self {
            Self::I82540Em => (0x8086, 0x001e),
            Self::I82543Gc => (0x8086, 0x1004),
            Self::I82545Em => (0x15ad, 0x0750),
        }
    }

    /// Low half of the PHY's identifier: an M88E1000 before the 82544, an M88E1011 since.
    const fn phy_id(self) -> u16 {
        match self {
            Self::I82543Gc => 0x0c50,
            Self::I82540Em | Self::I82545Em => 0x0c20,
        }
    }
}

/// What the card is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    pub irq: IrqLine,
}

/// How the packet under way is to be sent, from its first descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sending {
    started: bool,
    segmented: bool,
    options: u8,
    /// The packet is too long, or makes no sense: it is dropped at its end.
    dropped: bool,
}

/// What the guest can see.
#[derive(Clone, PartialEq, Eq)]
struct State {
    /// Registers by their offset divided by four, tables and statistics among them.
    regs: Box<[u32]>,
    icr: u32,
    ims: u32,
    /// The cable is plugged in.
    link: bool,
    phy: [u16; 32],
    microwire: Microwire,
    management: Management,
    io_address: u32,
    /// Contexts for checksums and for segmentation.
    contexts: [Context; 2],
    sending: Sending,
    packet: Vec<u8>,
    /// Frames that the back end has not taken yet.
    pending: VecDeque<Vec<u8>>,
    /// Virtual time before which no interrupt is raised.
    quiet_until: Nanos,
}

/// One card.
pub struct E1000 {
    model: Model,
    mac: [u8; 6],
    eeprom: [u16; EEPROM_WORDS],
    wiring: Wiring,
    itr: Timer,
    tx: Timer,
    driver: Option<Arc<dyn NetDriver>>,
    state: State,
    level: bool,
    /// A frame was refused for want of descriptors.
    starved: bool,
}

struct CardPort(Weak<Mutex<E1000>>);

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
            card.lock().set_link(up);
        }
    }
}

impl State {
    fn reg(&self, offset: u32) -> u32 {
        self.regs.get((offset / 4) as usize).copied().unwrap_or(0)
    }

    fn set(&mut self, offset: u32, value: u32) {
        if let Some(slot) = self.regs.get_mut((offset / 4) as usize) {
            *slot = value;
        }
    }

    /// Adds to a statistics register, which stops at its highest value.
    fn count(&mut self, offset: u32, by: usize) {
        self.set(offset, self.reg(offset).saturating_add(by as u32));
    }

    /// Adds to a pair of statistics registers.
    fn count_wide(&mut self, offset: u32, by: usize) {
        let value = u64::from(self.reg(offset + 4)) << 32 | u64::from(self.reg(offset));
        let value = value.saturating_add(by as u64);
        self.set(offset, value as u32);
        self.set(offset + 4, (value >> 32) as u32);
    }

    /// Counts a frame that came in or went out.
    fn count_frame(&mut self, dst: &[u8], len: usize, good: [u32; 3], octets: [u32; 2]) {
        let [all, multicast, broadcast] = good;
        self.count(all, 1);
        if dst == [0xff; 6] {
            self.count(broadcast, 1);
        } else if dst[0] & 1 != 0 {
            self.count(multicast, 1);
        }
        octets.into_iter().for_each(|at| self.count_wide(at, len + 4));
    }

    /// The registers as after a reset of the card, which leaves cable and PHY alone.
    fn power_on(mac: [u8; 6], link: bool, phy: [u16; 32]) -> Self {
        let mut state = Self {
            regs: vec![0; (reg::END / 4) as usize].into(),
            icr: 0,
            ims: 0,
            link,
            phy,
            microwire: Microwire::default(),
            management: Management::default(),
            io_address: 0,
            contexts: [Context::default(); 2],
            sending: Sending::default(),
            packet: Vec::new(),
            pending: VecDeque::new(),
            quiet_until: 0,
        };
        state.set(reg::CTRL, ctrl::FD | ctrl::SLU | ctrl::SPEED_1000);
        state.set(reg::PBA, 0x0010_0030);
        state.set(reg::VET, 0x8100);
        state.set(reg::LEDCTL, 0x0706_0302);
        state.set(reg::MANC, 1 << 13);
        state.set(reg::RA, u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]));
        state.set(reg::RA + 4, u32::from(mac[4]) | u32::from(mac[5]) << 8 | 1 << 31);
        state
    }

    /// Whether a frame for `dst` passes the address filters (section 3.2.1).
    fn wants(&self, dst: [u8; 6]) -> bool {
        let control = self.reg(reg::RCTL);
        if dst == [0xff; 6] && control & rctl::BAM != 0 {
            return true;
        }
        let group = dst[0] & 1 != 0;
        if control & if group { rctl::MPE } else { rctl::UPE } != 0 {
            return true;
        }
        let low = u32::from_le_bytes([dst[0], dst[1], dst[2], dst[3]]);
        let high = u32::from(dst[4]) | u32::from(dst[5]) << 8;
        let exact = (0..16).any(|i| {
            let entry = self.reg(reg::RA + 8 * i + 4);
            // Valid, and compared with the destination.
            entry >> 31 != 0
                && entry >> 16 & 3 == 0
                && entry & 0xffff == high
                && self.reg(reg::RA + 8 * i) == low
        });
        if exact || !group {
            return exact;
        }
        let shift = [4, 3, 2, 0][(control >> 12 & 3) as usize];
        let hash = (high >> shift) & 0xfff;
        self.reg(reg::MTA + 4 * (hash >> 5)) >> (hash & 31) & 1 != 0
    }

    fn wants_vlan(&self, tag: u16) -> bool {
        let id = u32::from(tag & 0xfff);
        self.reg(reg::RCTL) & rctl::VFE == 0 || self.reg(reg::VFTA + 4 * (id >> 5)) >> (id & 31) & 1 != 0
    }

    /// Base, number of descriptors, head and tail of a ring whose registers start at `base` (RDBAL or TDBAL); `None` if they
    /// make no ring.
    fn ring(&self, base: u32) -> Option<(u64, u32, u32, u32)> {
        let at = u64::from(self.reg(base + 4)) << 32 | u64::from(self.reg(base));
        let count = self.reg(base + 8) / 16;
        let (head, tail) = (self.reg(base + 0x10), self.reg(base + 0x18));
        (head < count && tail < count).then_some((at, count, head, tail))
    }
}

impl E1000 {
    /// Builds a card with the address `mac`. `cable`: it is plugged in.
    pub fn new(
        model: Model,
        mac: [u8; 6],
        cable: bool,
        wiring: Wiring,
        timers: &Arc<TimerQueue>,
    ) -> Arc<Mutex<Self>> {
        let (subsystem_vendor, subsystem) = model.subsystem();
        tm::with_timers(|me| Self {
            model,
            mac,
            eeprom: serial::eeprom(mac, model.device_id(), subsystem_vendor, subsystem),
            wiring,
            itr: timers.create(me.clone(), TIMER_ITR),
            tx: timers.create(me, TIMER_TX),
            driver: None,
            state: State::power_on(mac, cable, phy_power_on(model)),
            level: false,
            starved: false,
        })
    }

    /// Plugs the card into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let model = this.lock().model;
        let (subsystem_vendor, subsystem) = model.subsystem();
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: model.device_id(),
            revision: 2,
            class: [0x02, 0x00, 0x00],
            subsystem_vendor,
            subsystem,
            header_type: 0,
            interrupt_pin: 1,
        });
        space.set_byte(0x3e, 0xff);
        // Power management 1.1: D0 and D3 without wake-up.
        space.add_capability(0xdc, 0x01, &[0x22, 0x00, 0, 0, 0, 0]);
        space.allow(0xe0, &[0x03]);
        let registers = Bar::Memory {
            size: WINDOW,
            prefetchable: false,
            wide: false,
            backing: Backing::mmio(mmio_handler(this, 0)),
        };
        let ports = Bar::Io { size: 8, widest: Width::Dword, handler: this.clone() };
        bus.add(at, "e1000", space, vec![(0, registers), (2, ports)], this.clone());
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

    fn set_link(&mut self, up: bool) {
        if self.state.link != up {
            self.state.link = up;
            self.raise(cause::LSC);
            self.resume();
        }
    }

    /// Raises interrupt causes.
    fn raise(&mut self, causes: u32) {
        self.state.icr |= causes & cause::ALL;
        self.update_irq();
    }

    fn update_irq(&mut self) {
        let wanted = self.state.icr & self.state.ims != 0;
        if !wanted {
            self.itr.disarm();
            if std::mem::take(&mut self.level) {
                self.wiring.irq.set(false);
            }
        } else if !self.level {
            let now = self.itr.clock().now();
            if now < self.state.quiet_until {
                self.itr.arm(self.state.quiet_until);
                return;
            }
            let interval = Nanos::from(self.state.reg(reg::ITR)) * ITR_UNIT;
            self.state.quiet_until = now.saturating_add(interval);
            self.level = true;
            self.wiring.irq.set(true);
        }
    }

    /// Lets the back end offer a frame again that was refused.
    fn resume(&mut self) {
        if std::mem::take(&mut self.starved)
            && let Some(driver) = &self.driver
        {
            driver.resume();
        }
    }

    /// A reset by software: everything but cable, PHY and the first address.
    fn soft_reset(&mut self) {
        self.state = State::power_on(self.mac, self.state.link, self.state.phy);
        self.tx.disarm();
        self.update_irq();
        self.resume();
    }

    // Registers.

    fn read_register(&mut self, offset: u32) -> u32 {
        match offset {
            reg::CTRL | reg::CTRL_DUP => {
                let value = self.state.reg(reg::CTRL);
                if value & ctrl::MDIO_DIR == 0 && self.model == Model::I82543Gc {
                    let bit = if self.state.management.level { ctrl::MDIO } else { 0 };
                    value & !ctrl::MDIO | bit
                } else {
                    value
                }
            }
            reg::STATUS => {
                let link = if self.state.link { status::LU } else { 0 };
                status::FD | status::SPEED_1000 | status::ASDV_1000 | link
            }
            reg::EECD => {
                let value = self.state.reg(reg::EECD);
                let mut read = value & !eecd::DO | eecd::PRES;
                if value & eecd::REQ != 0 {
                    read |= eecd::GNT;
                }
                if self.state.microwire.output(&self.eeprom) {
                    read |= eecd::DO;
                }
                read
            }
            reg::ICR => {
                let value = std::mem::take(&mut self.state.icr);
                self.update_irq();
                value
            }
            reg::ICS | reg::IMC => 0,
            reg::IMS => self.state.ims,
            reg::STATS..reg::STATS_END => {
                let value = self.state.reg(offset);
                self.state.set(offset, 0);
                value
            }
            _ => self.state.reg(offset),
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::CTRL | reg::CTRL_DUP => return self.write_ctrl(value),
            reg::ICR => {
                self.state.icr &= !value;
                return self.update_irq();
            }
            reg::ICS => return self.raise(value),
            reg::IMS => {
                self.state.ims |= value & cause::ALL;
                return self.update_irq();
            }
            reg::IMC => {
                self.state.ims &= !value;
                return self.update_irq();
            }
            reg::MDIC => return self.write_mdic(value),
            reg::MTA..0x5400 | reg::RA..0x5480 | reg::VFTA..0x5800 => return self.state.set(offset, value),
            _ => {}
        }
        let Some((_, mask)) = KEPT.iter().find(|(at, _)| *at == offset) else {
            tracing::trace!(target: "e1000", "write 0x{value:08x} to 0x{offset:05x}, which is not kept");
            return;
        };
        let before = self.state.reg(offset);
        self.state.set(offset, value & mask);
        match offset {
            reg::EECD => self.state.microwire.step(before, value),
            reg::EERD => {
                // Start: done at once.
                let word = self.eeprom.get((value >> 8 & 0xff) as usize).copied().unwrap_or(0);
                if value & 1 != 0 {
                    self.state.set(reg::EERD, u32::from(word) << 16 | value & 0xff00 | 1 << 4);
                }
            }
            reg::RCTL | reg::RDT | reg::RDH | reg::RDLEN => self.resume(),
            reg::TDT | reg::TCTL => self.transmit(),
            _ => {}
        }
    }

    fn write_ctrl(&mut self, value: u32) {
        let before = self.state.reg(reg::CTRL);
        if value & ctrl::RST != 0 {
            return self.soft_reset();
        }
        self.state.set(reg::CTRL, value & !ctrl::PHY_RST);
        if value & ctrl::PHY_RST != 0 {
            self.state.phy = phy_power_on(self.model);
        }
        if self.model == Model::I82543Gc && value & !before & ctrl::MDC != 0 {
            // A line that nobody drives is high.
            let bit = value & ctrl::MDIO_DIR == 0 || value & ctrl::MDIO != 0;
            match self.state.management.clock(bit) {
                Asked::Nothing => {}
                Asked::Read(register) => self.state.management.data = self.read_phy(register),
                Asked::Write(register, data) => self.write_phy(register, data),
            }
        }
        if value & !before & ctrl::SLU != 0 {
            self.raise(cause::LSC);
        }
    }

    /// MDI control: PHY 1 answers, others do not.
    fn write_mdic(&mut self, value: u32) {
        const READY: u32 = 1 << 28;
        const ERROR: u32 = 1 << 30;
        let register = (value >> 16) as u8 & 0x1f;
        let answer = match (value >> 21 & 0x1f, value >> 26 & 3) {
            (1, 1) => {
                self.write_phy(register, value as u16);
                value & 0x0fff_ffff
            }
            (1, 2) => value & 0x0fff_0000 | u32::from(self.read_phy(register)),
            _ => value & 0x0fff_ffff | ERROR,
        };
        self.state.set(reg::MDIC, answer | READY | value & 1 << 29);
        if value >> 29 & 1 != 0 {
            self.raise(cause::MDAC);
        }
    }

    fn read_phy(&self, register: u8) -> u16 {
        let value = self.state.phy[usize::from(register & 31)];
        match register {
            // Status: link, auto-negotiation complete.
            1 if self.state.link => value | 0x0024,
            // PHY-specific status: 1000 Mbit/s, full duplex, resolved, link.
            17 if self.state.link => value | 0xac00,
            // The partner's abilities are known while it is there.
            5 | 10 if !self.state.link => 0,
            _ => value,
        }
    }

    fn write_phy(&mut self, register: u8, value: u16) {
        match register {
            0 => {
                if value & 0x8000 != 0 {
                    self.state.phy = phy_power_on(self.model);
                } else {
                    self.state.phy[0] = value & !0x0200;
                }
                // Reset and restart of the auto-negotiation end with a link.
                if value & 0x8200 != 0 {
                    self.raise(cause::LSC);
                }
            }
            4 | 7 | 9 | 16 | 18 | 20..=31 => self.state.phy[usize::from(register)] = value,
            _ => {}
        }
    }

    // Transmission (section 3.3).

    /// Hands waiting frames to the back end; false if it has no room.
    fn flush(&mut self) -> bool {
        while let Some(frame) = self.state.pending.pop_front() {
            let len = frame.len();
            let Some(dst) = frame.first_chunk::<6>().copied() else { continue };
            if self.state.reg(reg::RCTL) & rctl::LBM != 0 || self.state.phy[0] & 0x4000 != 0 {
                // What finds no descriptor is lost, as on the wire.
                self.receive(&frame);
                self.starved = false;
            } else if self.state.link
                && let Some(driver) = &self.driver
                && let Err(frame) = driver.send(frame)
            {
                self.state.pending.push_front(frame);
                return false;
            }
            let kinds = [reg::GPTC, reg::MPTC, reg::BPTC];
            self.state.count_frame(&dst, len, kinds, [reg::GOTCL, reg::TOTL]);
            self.state.count(reg::TPT, 1);
        }
        true
    }

    /// Takes descriptors while there are any and the back end has room.
    fn transmit(&mut self) {
        let mut causes = 0;
        let mut bytes = TX_BYTES;
        let mut carry_on = false;
        for turn in 0.. {
            if !self.flush() || self.state.reg(reg::TCTL) & tctl::EN == 0 {
                break;
            }
            let Some((base, count, head, tail)) = self.state.ring(reg::TDBAL) else { break };
            if head == tail {
                if turn > 0 {
                    causes |= cause::TXQE;
                }
                break;
            }
            if turn >= TX_DESCRIPTORS || bytes == 0 {
                carry_on = true;
                break;
            }
            let address = GuestPhys(base.wrapping_add(u64::from(head) * 16));
            let mut raw = [0; 16];
            self.wiring.pgm.read(address, &mut raw);
            let descriptor = TxDescriptor::from_bytes(raw);
            bytes = bytes.saturating_sub(descriptor.length());
            if self.descriptor(descriptor) {
                // Report status: descriptor done.
                let done = (descriptor.1 >> 32) as u32 | 1;
                self.wiring.pgm.write(GuestPhys(address.0.wrapping_add(12)), &done.to_le_bytes());
                causes |= cause::TXDW;
            }
            fence(Ordering::Release);
            self.state.set(reg::TDH, (head + 1) % count);
        }
        if carry_on {
            self.tx.arm(self.tx.clock().now());
        }
        if causes != 0 {
            self.raise(causes);
        }
    }

    /// Takes one descriptor; true if its status is to be reported.
    fn descriptor(&mut self, d: TxDescriptor) -> bool {
        let command = d.command();
        let report = command & (dcmd::RS | dcmd::RPS) != 0;
        let segmented = command & dcmd::TSE != 0;
        if d.is_extended() {
            match d.extended_type() {
                0 => {
                    self.state.contexts[usize::from(segmented)] = Context { words: [d.0, d.1] };
                    if segmented {
                        self.state.count(reg::TSCTC, 1);
                    }
                    return report;
                }
                1 => {}
                _ => return report,
            }
        }
        let sending = &mut self.state.sending;
        if !sending.started {
            let extended = d.is_extended();
            *sending = Sending {
                started: true,
                segmented: extended && segmented,
                options: if extended { d.byte_13() } else { 0 },
                dropped: false,
            };
        }
        let start = self.state.packet.len();
        let len = d.length();
        let limit = if sending.segmented { MAX_PACKET } else { MAX_FRAME };
        if start + len > limit {
            sending.dropped = true;
        } else if !sending.dropped {
            self.state.packet.resize(start + len, 0);
            self.wiring.pgm.read(GuestPhys(d.0), &mut self.state.packet[start..]);
        }
        if command & dcmd::EOP != 0 {
            self.finish_packet(d);
        }
        report
    }

    /// The packet is complete with descriptor `last`: frames are made of it.
    fn finish_packet(&mut self, last: TxDescriptor) {
        let Sending { segmented, options, dropped, .. } = std::mem::take(&mut self.state.sending);
        let mut packet = std::mem::take(&mut self.state.packet);
        if dropped || packet.len() < 14 {
            return;
        }
        let command = last.command();
        let tagged = command & dcmd::VLE != 0 && self.state.reg(reg::CTRL) & ctrl::VME != 0;
        let mut frames = if segmented {
            self.segment(&packet, options, tagged)
        } else {
            if last.is_extended() {
                packet::offload(&mut packet, &self.state.contexts[0], options);
            } else if command & dcmd::IC != 0 {
                let (start, at) = (last.byte_13().into(), last.checksum_offset().into());
                packet::insert_checksum(&mut packet, start, at, 0, false);
            }
            vec![packet]
        };
        for frame in &mut frames {
            if tagged {
                packet::insert_tag(frame, self.state.reg(reg::VET) as u16, last.special());
            }
            if frame.len() < MIN_FRAME {
                frame.resize(MIN_FRAME, 0);
            }
        }
        self.state.pending.extend(frames);
    }

    /// The frames of a packet that is to be segmented: one, where the network takes packets whole.
    fn segment(&self, packet: &[u8], options: u8, tagged: bool) -> Vec<Vec<u8>> {
        let context = &self.state.contexts[1];
        let frames = |mss: usize| packet::segment(packet, context, options, mss).unwrap_or_default();
        let takes = self.driver.as_ref().is_some_and(|driver| driver.takes_packets());
        let complete = popts::IXSM | popts::TXSM;
        if takes && !tagged && options & complete == complete && context.is_tcp() && context.is_ipv4() {
            let whole = frames(packet.len().max(MAX_FRAME));
            if whole.iter().all(|frame| ether::offload::is_whole(frame)) {
                return whole;
            }
        }
        frames(context.mss())
    }

    // Reception (section 3.2).

    /// A frame from the network; false if there are too few descriptors for it.
    fn receive(&mut self, frame: &[u8]) -> bool {
        let control = self.state.reg(reg::RCTL);
        let Some(&dst) = frame.first_chunk::<6>() else { return true };
        let ether_type = self.state.reg(reg::VET) as u16;
        let tag = packet::tag(frame, ether_type);
        let longest = if control & rctl::LPE != 0 { MAX_FRAME } else { 1518 };
        if control & rctl::EN == 0
            || !self.state.link
            || !(14..=longest).contains(&frame.len())
            || !self.state.wants(dst)
            || tag.is_some_and(|tag| !self.state.wants_vlan(tag))
        {
            return true;
        }
        let size = rctl::buffer_size(control);
        let strip = tag.is_some() && self.state.reg(reg::CTRL) & ctrl::VME != 0;
        let mut data = Vec::with_capacity(frame.len().max(MIN_FRAME) + 4);
        data.extend_from_slice(frame);
        if strip {
            data.drain(12..16);
        }
        if data.len() < MIN_FRAME {
            data.resize(MIN_FRAME, 0);
        }
        if control & rctl::SECRC == 0 {
            data.extend_from_slice(&ether::checksum::crc32(&data).to_le_bytes());
        }
        let room = self.state.ring(reg::RDBAL).filter(|&(_, count, head, tail)| {
            let free = (tail + count - head) % count;
            free as usize >= data.len().div_ceil(size)
        });
        let Some((base, count, mut head, tail)) = room else {
            self.starved = true;
            return false;
        };

        let (mut flags, mut errors) = (rxs::DD, 0);
        let enabled = self.state.reg(reg::RXCSUM);
        let (ip, transport) = if strip || tag.is_none() { packet::verify(&data) } else { (None, None) };
        let mut checked = false;
        for (bit, seen, wrong, result) in
            [(rxcsum::IPOFL, rxs::IPCS, rxs::IPE, ip), (rxcsum::TUOFL, rxs::TCPCS, rxs::TCPE, transport)]
        {
            if let Some(right) = result.filter(|_| enabled & bit != 0) {
                checked = true;
                flags |= seen;
                errors |= if right { 0 } else { wrong };
            }
        }
        if !checked {
            flags |= rxs::IXSM;
        }
        if strip {
            flags |= rxs::VP;
        }
        if dst[0] & 1 != 0 && dst != [0xff; 6] {
            flags |= rxs::PIF;
        }
        let start = (enabled & 0xff) as usize;
        let sum = data.get(start..frame.len().min(data.len())).map_or(0, ether::checksum::ones_sum);
        let special = tag.filter(|_| strip).unwrap_or(0);

        let mut parts = data.chunks(size).peekable();
        while let Some(part) = parts.next() {
            let at = base.wrapping_add(u64::from(head) * 16);
            let mut raw = [0; 8];
            self.wiring.pgm.read(GuestPhys(at), &mut raw);
            self.wiring.pgm.write(GuestPhys(u64::from_le_bytes(raw)), part);
            let end = if parts.peek().is_none() { rxs::EOP } else { 0 };
            let mut lengths = [0; 4];
            lengths[..2].copy_from_slice(&(part.len() as u16).to_le_bytes());
            lengths[2..].copy_from_slice(&sum.to_le_bytes());
            self.wiring.pgm.write(GuestPhys(at.wrapping_add(8)), &lengths);
            // The guest looks at the status first: it comes last.
            fence(Ordering::Release);
            let [low, high] = special.to_le_bytes();
            self.wiring.pgm.write(GuestPhys(at.wrapping_add(12)), &[flags | end, errors, low, high]);
            head = (head + 1) % count;
        }
        self.state.set(reg::RDH, head);
        let kinds = [reg::GPRC, reg::MPRC, reg::BPRC];
        self.state.count_frame(&dst, frame.len(), kinds, [reg::GORCL, reg::TORL]);
        self.state.count(reg::TPR, 1);
        let free = (tail + count - head) % count;
        let low = free <= count >> ((control >> 8 & 3) + 1);
        self.raise(cause::RXT0 | if low { cause::RXDMT0 } else { 0 });
        true
    }
}

/// The PHY's registers after its reset.
fn phy_power_on(model: Model) -> [u16; 32] {
    let mut phy = [0; 32];
    // Auto-negotiation, full duplex, 1000 Mbit/s.
    phy[0] = 0x1140;
    phy[1] = 0x7949;
    phy[2] = 0x0141;
    phy[3] = model.phy_id();
    phy[4] = 0x0de1;
    phy[5] = 0xcde1;
    phy[6] = 0x0001;
    phy[9] = 0x0e00;
    phy[10] = 0x3c00;
    phy[15] = 0x3000;
    phy[16] = 0x0068;
    phy[20] = 0x0d60;
    phy
}

impl MmioDevice for E1000 {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        let mut at = offset as u32;
        let mut rest = data;
        while !rest.is_empty() {
            let skip = (at & 3) as usize;
            let len = rest.len().min(4 - skip);
            let value = self.read_register(at & !3).to_le_bytes();
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(&value[skip..skip + len]);
            rest = later;
            at = at.wrapping_add(len as u32);
        }
    }

    /// Only whole registers can be written.
    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        if offset & 3 != 0 {
            return;
        }
        let (words, _) = data.as_chunks::<4>();
        for (i, word) in words.iter().enumerate() {
            self.write_register(offset as u32 + 4 * i as u32, u32::from_le_bytes(*word));
        }
    }
}

/// IOADDR and IODATA (section 13.2.2).
impl PortIo for E1000 {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        match (port.0 & 7, width) {
            (0, Width::Dword) => self.state.io_address,
            (4, Width::Dword) => self.read_register(self.state.io_address & !3),
            _ => width.ones(),
        }
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        match (port.0 & 7, width) {
            (0, Width::Dword) => self.state.io_address = value,
            (4, Width::Dword) => self.write_register(self.state.io_address & !3, value),
            _ => {}
        }
    }
}

impl PciDevice for E1000 {
    fn config_written(&mut self, _offset: u8, _width: Width, _space: &mut ConfigSpace) {}
}

impl TimerTarget for E1000 {
    fn timer_fired(&mut self, timer: u32, _now: Nanos) {
        match timer {
            TIMER_ITR => self.update_irq(),
            _ => self.transmit(),
        }
    }
}

impl Device for E1000 {
    fn reset(&mut self) {
        self.state.phy = phy_power_on(self.model);
        self.soft_reset();
    }
}
