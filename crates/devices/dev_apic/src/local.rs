//! The local APIC's state and behaviour (Intel SDM volume 3, chapter 10), without locks, clocks or wires.
//!
//! [`State`] takes what was written and the virtual time, and returns what follows for others ([`Effects`]): an
//! inter-processor interrupt to send, an end of interrupt to tell the I/O APIC. Whoever calls a method that changes the state
//! afterwards brings the vCPU's interrupt request ([`State::has_interrupt`]) and the timer ([`State::deadline`]) up to date.
//!
//! The timer counts at 1 GHz, so that its ticks are nanoseconds of virtual time.
//! Left out: SMI delivery (accepted and dropped), CMCI, suppression of EOI broadcasts, the arbitration bus.

use pdm::ApicRegisters;
use tm::Nanos;

use crate::spec::{
    DeliveryMode, ICR_LOW_WRITABLE, Icr, LOCAL_VERSION, Lvt, MSR_TSC_DEADLINE, MSR_X2APIC_FIRST,
    MSR_X2APIC_LAST, Shorthand, TimerMode, base, error, reg, svr,
};

/// Periodic interrupts do not come faster than this; hardware cannot take them faster either, and the timer thread must live.
const SHORTEST_PERIOD: Nanos = 20_000;

/// Index into [`State::lvt`].
mod lvt {
    pub(super) const TIMER: usize = 0;
    pub(super) const LINT0: usize = 3;
    pub(super) const LINT1: usize = 4;
    pub(super) const ERROR: usize = 5;
}

/// Bits of each LVT entry that can be written.
const LVT_WRITABLE: [u32; 6] = [0x700ff, 0x107ff, 0x107ff, 0x1a7ff, 0x1a7ff, 0x100ff];
const LVT_MASKED: u32 = 1 << 16;

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vectors(pub(crate) [u64; 4]);

/// Registers of 32 vectors each in ISR, TMR and IRR.
const VECTOR_WORDS: u32 = 8;

impl Vectors {
    fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] & 1 << (vector & 63) != 0
    }

    /// The member with the highest priority.
    fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        Some((index as u32 * 64 + word.ilog2()) as u8)
    }

    fn set_word(&mut self, index: u32, value: u32) {
        let (word, shift) = (&mut self.0[((index / 2) & 3) as usize], 32 * (index & 1));
        *word = *word & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }

    /// Register number `index` (0–7) of 32 vectors.
    fn word(&self, index: u32) -> u32 {
        (self.0[((index / 2) & 3) as usize] >> (32 * (index & 1))) as u32
    }
}

/// An interrupt on its way to one or more local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub mode: DeliveryMode,
    pub vector: u8,
    pub level: bool,
    pub destination: Destination,
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Physical or logical, 8 bits wide (xAPIC, I/O APIC, MSI) or 32 bits wide (x2APIC).
    Address {
        id: u32,
        logical: bool,
        wide: bool,
    },
    Me,
    All,
    Others,
}

impl Destination {
    /// The APIC with an id.
    pub(crate) const fn of(id: u32) -> Self {
        Self::Address { id, logical: false, wide: false }
    }
}

/// What a register access asks of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Send this inter-processor interrupt.
    pub ipi: Option<Message>,
    /// Tell the I/O APIC that this level-triggered vector has ended.
    pub eoi: Option<u8>,
}

/// What an interrupt-acknowledge cycle finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledge {
    /// Nothing to deliver.
    Nothing,
    /// A vector of this APIC, now in service.
    Vector(u8),
    /// The 8259 pair has to give the vector.
    External,
}

/// What a signal to the APIC means for the CPU, beyond its interrupt request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Nothing more.
    None,
    Nmi,
}

/// The access is not allowed: #GP for MSRs, an error status bit for MMIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal;

/// One local APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Fixed: the initial APIC id.
    pub(crate) id: u32,
    /// IA32_APIC_BASE.
    pub(crate) base: u64,
    pub(crate) tpr: u8,
    /// Logical destination in xAPIC mode: 8 bits.
    pub(crate) ldr: u8,
    /// Destination format: 0xf for flat, 0 for cluster.
    pub(crate) dfr: u8,
    pub(crate) svr: u32,
    /// Error status as last latched by a write, and errors since.
    pub(crate) esr: u32,
    pub(crate) errors: u32,
    pub(crate) icr: Icr,
    pub(crate) lvt: [Lvt; 6],
    pub(crate) initial_count: u32,
    pub(crate) divide: u8,
    /// When the timer reaches zero next; `None` if it stands.
    pub(crate) expires: Option<Nanos>,
    /// IA32_TSC_DEADLINE in ticks of the VM's TSC; 0 is disarmed.
    pub(crate) tsc_deadline: u64,
    pub(crate) irr: Vectors,
    pub(crate) isr: Vectors,
    pub(crate) tmr: Vectors,
    /// Levels at the LINT pins.
    pub(crate) lint: [bool; 2],
    /// An ExtINT message was received and not yet acknowledged.
    pub(crate) extint: bool,
}

impl State {
    /// The state after power-on. `present` is false on a machine whose local APICs are turned off for good.
    pub fn new(id: u32, present: bool) -> Self {
        let mut state = Self {
            id,
            base: 0,
            tpr: 0,
            ldr: 0,
            dfr: 0xf,
            svr: svr::RESET,
            esr: 0,
            errors: 0,
            icr: Icr::new(),
            lvt: [Lvt::from_bits(LVT_MASKED); 6],
            initial_count: 0,
            divide: 0,
            expires: None,
            tsc_deadline: 0,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            lint: [false; 2],
            extint: false,
        };
        state.reset(present);
        state
    }

    /// RESET: as INIT, and the base register too. The levels at the pins are the wires' and stay. LINT0 of the bootstrap processor is open for the 8259 pair, as the BIOS
    /// of a PC expects (and VirtualBox does).
    pub fn reset(&mut self, present: bool) {
        self.init();
        let bsp = self.id == 0;
        self.base = 0xfee0_0000 | if present { base::ENABLE } else { 0 } | if bsp { base::BSP } else { 0 };
        if bsp {
            self.lvt[lvt::LINT0] = Lvt::new().with_mode(DeliveryMode::ExtInt);
        }
    }

    /// INIT (10.4.7.3): everything but the id, the base register and the levels at the pins.
    pub fn init(&mut self) {
        let Self {
            id: _,
            base: _,
            tpr,
            ldr,
            dfr,
            svr: spurious,
            esr,
            errors,
            icr,
            lvt,
            initial_count,
            divide,
            expires,
            tsc_deadline,
            irr,
            isr,
            tmr,
            lint: _,
            extint,
        } = self;
        *tpr = 0;
        *ldr = 0;
        *dfr = 0xf;
        *spurious = svr::RESET;
        *esr = 0;
        *errors = 0;
        *icr = Icr::new();
        *lvt = [Lvt::from_bits(LVT_MASKED); 6];
        *initial_count = 0;
        *divide = 0;
        *expires = None;
        *tsc_deadline = 0;
        *irr = Vectors::default();
        *isr = Vectors::default();
        *tmr = Vectors::default();
        *extint = false;
    }

    pub fn is_enabled(&self) -> bool {
        self.base & base::ENABLE != 0
    }

    pub fn is_x2apic(&self) -> bool {
        self.base & base::X2APIC != 0
    }

    /// Where the registers lie in memory, if they do.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.base & base::ADDRESS)
    }

    fn is_software_enabled(&self) -> bool {
        self.svr & svr::ENABLE != 0
    }

    /// Writes IA32_APIC_BASE; refuses the transitions of table 10-5 and figure 10-27 that fault.
    pub fn set_base(&mut self, value: u64) -> Result<(), Illegal> {
        if value & !(base::ADDRESS | base::ENABLE | base::X2APIC | base::BSP) != 0 {
            return Err(Illegal);
        }
        let (on, wide) = (value & base::ENABLE != 0, value & base::X2APIC != 0);
        match (self.is_enabled(), self.is_x2apic(), on, wide) {
            (_, _, false, true) => return Err(Illegal),
            // Back from x2APIC mode only by way of "off".
            (true, true, true, false) => return Err(Illegal),
            // From "off" into xAPIC mode first.
            (false, _, true, true) => return Err(Illegal),
            _ => {}
        }
        if self.is_enabled() && !on {
            self.init();
        }
        if wide && !self.is_x2apic() {
            self.icr = Icr::new();
        }
        self.base = value;
        Ok(())
    }

    /// Processor priority (10.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The vector that would be delivered now.
    fn deliverable(&self) -> Option<u8> {
        if !self.is_enabled() {
            return None;
        }
        self.irr.highest().filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// Whether the 8259 pair's request gets through.
    pub fn external(&self) -> bool {
        let entry = self.lvt[lvt::LINT0];
        let open = !self.is_enabled() || !entry.masked() && entry.mode() == DeliveryMode::ExtInt;
        self.lint[0] && open || self.extint
    }

    /// Whether the CPU's interrupt request is active.
    pub fn has_interrupt(&self) -> bool {
        self.external() || self.deliverable().is_some()
    }

    /// Interrupt-acknowledge cycle.
    pub fn acknowledge(&mut self) -> Acknowledge {
        if let Some(vector) = self.deliverable() {
            self.irr.remove(vector);
            self.isr.insert(vector);
            return Acknowledge::Vector(vector);
        }
        self.acknowledge_external()
    }

    /// As above where only the 8259 pair is asked.
    pub fn acknowledge_external(&mut self) -> Acknowledge {
        if self.external() {
            self.extint = false;
            return Acknowledge::External;
        }
        Acknowledge::Nothing
    }

    /// Takes a vector into the request register; false if the APIC does not accept it.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.is_enabled() || !self.is_software_enabled() {
            return false;
        }
        if vector < 16 {
            self.raise_error(error::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        self.irr.insert(vector);
        true
    }

    /// An ExtINT message was received.
    pub fn accept_extint(&mut self) {
        self.extint = true;
    }

    fn raise_error(&mut self, bit: u32) {
        self.errors |= bit;
        let entry = self.lvt[lvt::ERROR];
        // An illegal vector in the error entry itself must not recurse.
        if !entry.masked() && entry.vector() >= 16 {
            self.accept(entry.vector(), false);
        }
    }

    /// Whether a message's destination address means this APIC (10.6.2).
    pub fn is_addressed(&self, id: u32, logical: bool, wide: bool) -> bool {
        if !self.is_enabled() {
            return false;
        }
        if !logical {
            return id == self.id || id == if wide { u32::MAX } else { 0xff };
        }
        if wide && id == u32::MAX {
            return true;
        }
        if self.is_x2apic() {
            let own = self.x2apic_ldr();
            return id >> 16 == own >> 16 && id & own & 0xffff != 0;
        }
        let id = id as u8;
        if self.dfr == 0xf {
            id & self.ldr != 0
        } else {
            (id >> 4 == self.ldr >> 4 || id >> 4 == 0xf) && id & self.ldr & 0xf != 0
        }
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.id & !0xf) << 12 | 1 << (self.id & 0xf)
    }

    /// What lowest-priority delivery compares: the processor priority.
    pub fn arbitration_priority(&self) -> u8 {
        let pending = self.irr.highest().unwrap_or(0);
        let in_service = self.isr.highest().unwrap_or(0);
        let highest = pending.max(in_service);
        if self.tpr >> 4 >= highest >> 4 { self.tpr } else { highest & 0xf0 }
    }

    /// Sets the level at LINT `pin` (0 or 1).
    pub fn set_lint(&mut self, pin: usize, level: bool) -> Signal {
        let rising = level && !self.lint[pin];
        self.lint[pin] = level;
        if !rising {
            return Signal::None;
        }
        if !self.is_enabled() {
            return if pin == 1 { Signal::Nmi } else { Signal::None };
        }
        let entry = self.lvt[lvt::LINT0 + pin];
        match entry.mode() {
            _ if entry.masked() => Signal::None,
            DeliveryMode::Fixed => {
                self.accept(entry.vector(), entry.level());
                Signal::None
            }
            DeliveryMode::Nmi => Signal::Nmi,
            // ExtINT is looked at in `external`; INIT and SMI through a pin are not used on a PC.
            _ => Signal::None,
        }
    }

    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.remove(vector);
        if !self.tmr.contains(vector) {
            return None;
        }
        for pin in 0..2 {
            if self.lvt[lvt::LINT0 + pin].vector() == vector {
                self.repeat_level(pin);
            }
        }
        Some(vector)
    }

    fn timer_mode(&self) -> TimerMode {
        self.lvt[lvt::TIMER].timer_mode()
    }

    /// Nanoseconds for one count, as a shift: 0 for "divide by 1" to 7 for "by 128".
    fn shift(&self) -> u32 {
        let code = u32::from(self.divide & 3 | (self.divide & 8) >> 1);
        (code + 1) & 7
    }

    /// Nanoseconds for the whole initial count, at least 1.
    fn period(&self) -> Nanos {
        (u64::from(self.initial_count) << self.shift()).max(1)
    }

    /// When [`State::timer_fired`] wants to be called; never while it would have no effect.
    pub fn deadline(&self) -> Option<Nanos> {
        self.expires.filter(|_| !self.lvt[lvt::TIMER].masked())
    }

    /// Brings the timer up to `now`: delivers what has become due.
    pub fn timer_fired(&mut self, now: Nanos) {
        let Some(due) = self.expires.filter(|&due| due <= now) else { return };
        match self.timer_mode() {
            TimerMode::Periodic => {
                let period = self.period();
                let earliest =
                    if period < SHORTEST_PERIOD { now.saturating_add(SHORTEST_PERIOD) } else { now };
                let periods = (earliest - due) / period + 1;
                self.expires = due.checked_add(periods.saturating_mul(period));
            }
            _ => {
                self.expires = None;
                self.tsc_deadline = 0;
            }
        }
        let entry = self.lvt[lvt::TIMER];
        if !entry.masked() {
            self.accept(entry.vector(), false);
        }
    }

    fn current_count(&self, now: Nanos) -> u32 {
        let left = match (self.timer_mode(), self.expires) {
            (TimerMode::OneShot, Some(expires)) => expires.saturating_sub(now),
            (TimerMode::Periodic, Some(expires)) => {
                let period = self.period();
                let left =
                    if expires > now { (expires - now) % period } else { period - (now - expires) % period };
                if left == 0 { period } else { left }
            }
            _ => 0,
        };
        left.div_ceil(1 << self.shift()) as u32
    }

    fn start_timer(&mut self, count: u32, now: Nanos) {
        if self.timer_mode() == TimerMode::TscDeadline {
            return;
        }
        self.initial_count = count;
        let length = u64::from(count) << self.shift();
        self.expires = (count != 0).then(|| now.saturating_add(length));
    }

    fn set_divide(&mut self, value: u8, now: Nanos) {
        self.timer_fired(now);
        let left = u64::from(self.current_count(now));
        self.divide = value & 0xb;
        if self.expires.is_some() && self.timer_mode() != TimerMode::TscDeadline {
            self.expires = Some(now.saturating_add(left << self.shift()));
        }
    }

    fn set_lvt(&mut self, index: usize, value: u32, now: Nanos) {
        let mut entry = Lvt::from_bits(value & LVT_WRITABLE[index]);
        if !self.is_software_enabled() {
            entry.set_masked(true);
        }
        if index == lvt::TIMER {
            self.timer_fired(now);
            let deadline = |mode| mode == TimerMode::TscDeadline;
            if deadline(self.timer_mode()) != deadline(entry.timer_mode()) {
                self.expires = None;
                self.tsc_deadline = 0;
            }
        }
        self.lvt[index] = entry;
        if matches!(index, lvt::LINT0 | lvt::LINT1) && self.lint[index - lvt::LINT0] {
            self.repeat_level(index - lvt::LINT0);
        }
    }

    /// Requests a level-triggered LINT pin's vector again while the pin is held.
    fn repeat_level(&mut self, pin: usize) {
        let entry = self.lvt[lvt::LINT0 + pin];
        if self.lint[pin] && entry.level() && !entry.masked() && entry.mode() == DeliveryMode::Fixed {
            self.accept(entry.vector(), true);
        }
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & svr::WRITABLE;
        if !self.is_software_enabled() {
            for entry in &mut self.lvt {
                entry.set_masked(true);
            }
        }
    }

    /// The message that a written ICR sends (10.6.1).
    fn send(&mut self) -> Option<Message> {
        let icr = self.icr;
        let fixed = matches!(icr.mode(), DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        if fixed && icr.vector() < 16 {
            self.raise_error(error::SEND_ILLEGAL_VECTOR);
            return None;
        }
        // "INIT level de-assert" only synchronised arbitration ids.
        if icr.mode() == DeliveryMode::Init && icr.level() && !icr.assert() {
            return None;
        }
        let wide = self.is_x2apic();
        let destination = match icr.shorthand() {
            Shorthand::None => Destination::Address {
                id: if wide { icr.destination() } else { icr.destination() >> 24 },
                logical: icr.logical(),
                wide,
            },
            Shorthand::Me => Destination::Me,
            Shorthand::All => Destination::All,
            Shorthand::Others => Destination::Others,
        };
        Some(Message { mode: icr.mode(), vector: icr.vector(), level: false, destination })
    }

    /// Reads the register at `offset` (a multiple of 16), as xAPIC or x2APIC shows it.
    pub fn read(&self, offset: u32, now: Nanos) -> Result<u32, Illegal> {
        let wide = self.is_x2apic();
        Ok(match offset {
            reg::ID if wide => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => LOCAL_VERSION,
            reg::TPR => self.tpr.into(),
            reg::APR if !wide => self.arbitration_priority().into(),
            reg::PPR => self.ppr().into(),
            reg::EOI | reg::RRD if !wide => 0,
            reg::LDR if wide => self.x2apic_ldr(),
            reg::LDR => u32::from(self.ldr) << 24,
            reg::DFR if !wide => u32::from(self.dfr) << 28 | 0x0fff_ffff,
            reg::SVR => self.svr,
            reg::ISR..=0x170 => self.isr.word((offset - reg::ISR) >> 4),
            reg::TMR..=0x1f0 => self.tmr.word((offset - reg::TMR) >> 4),
            reg::IRR..=0x270 => self.irr.word((offset - reg::IRR) >> 4),
            reg::ESR => self.esr,
            reg::ICR_LOW => self.icr.into_bits() as u32,
            reg::ICR_HIGH if !wide => self.icr.destination(),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                self.lvt[((offset - reg::LVT_TIMER) >> 4) as usize].into_bits()
            }
            reg::INITIAL_COUNT => self.initial_count,
            reg::CURRENT_COUNT => self.current_count(now),
            reg::DIVIDE => self.divide.into(),
            _ => return Err(Illegal),
        })
    }

    /// Writes the register at `offset` (a multiple of 16).
    pub fn write(&mut self, offset: u32, value: u32, now: Nanos) -> Result<Effects, Illegal> {
        let wide = self.is_x2apic();
        let mut effects = Effects::default();
        match offset {
            reg::TPR => self.tpr = value as u8,
            reg::EOI => effects.eoi = self.end_of_interrupt(),
            // Writable on no APIC that has 8-bit ids; the write is lost.
            reg::ID if !wide => {}
            reg::LDR if !wide => self.ldr = (value >> 24) as u8,
            reg::DFR if !wide => self.dfr = (value >> 28) as u8,
            reg::SVR => self.set_svr(value),
            reg::ESR => {
                self.esr = self.errors;
                self.errors = 0;
            }
            reg::ICR_LOW => {
                let high = u64::from(self.icr.destination()) << 32;
                self.icr = Icr::from_bits(high | u64::from(value & ICR_LOW_WRITABLE));
                effects.ipi = self.send();
            }
            reg::ICR_HIGH if !wide => self.icr.set_destination(value & 0xff00_0000),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                self.set_lvt(((offset - reg::LVT_TIMER) >> 4) as usize, value, now);
            }
            reg::INITIAL_COUNT => self.start_timer(value, now),
            reg::DIVIDE => self.set_divide(value as u8, now),
            _ => return Err(Illegal),
        }
        Ok(effects)
    }

    /// A register access through the page. `offset` is the offset of the first byte.
    pub fn mmio_read(&mut self, offset: u32, data: &mut [u8], now: Nanos) {
        data.fill(0);
        let (register, byte) = (offset & 0xff0, (offset & 0xf) as usize);
        // Registers are 32 bits wide, 16 bytes apart; what lies between is undefined and reads as zero.
        let Some(bytes) = 4usize.checked_sub(byte).filter(|&n| n > 0) else { return };
        match self.read(register, now) {
            Ok(value) => {
                for (out, from) in data.iter_mut().zip(&value.to_le_bytes()[byte..]).take(bytes) {
                    *out = *from;
                }
            }
            Err(Illegal) => self.raise_error(error::ILLEGAL_REGISTER),
        }
    }

    /// Writes must be of 32 bits (10.4.1); others are lost.
    pub fn mmio_write(&mut self, offset: u32, data: &[u8], now: Nanos) -> Effects {
        let Some(value) = data.first_chunk().filter(|_| offset & 0xf == 0) else { return Effects::default() };
        match self.write(offset & 0xff0, u32::from_le_bytes(*value), now) {
            Ok(effects) => effects,
            Err(Illegal) => {
                self.raise_error(error::ILLEGAL_REGISTER);
                Effects::default()
            }
        }
    }

    /// Reads an x2APIC MSR (table 10-6) or the TSC deadline.
    pub fn read_msr(&self, msr: u32, now: Nanos) -> Result<u64, Illegal> {
        if msr == MSR_TSC_DEADLINE {
            return Ok(self.tsc_deadline);
        }
        let offset = self.x2apic_register(msr)?;
        match offset {
            reg::ICR_LOW => Ok(self.icr.into_bits()),
            _ => self.read(offset, now).map(u64::from),
        }
    }

    /// Writes an x2APIC MSR or the TSC deadline. `to_time` turns a value of the VM's TSC into virtual time.
    pub fn write_msr(
        &mut self,
        msr: u32,
        value: u64,
        now: Nanos,
        to_time: impl FnOnce(u64) -> Nanos,
    ) -> Result<Effects, Illegal> {
        if msr == MSR_TSC_DEADLINE {
            if self.timer_mode() == TimerMode::TscDeadline {
                self.tsc_deadline = value;
                self.expires = (value != 0).then(|| to_time(value));
                self.timer_fired(now);
            }
            return Ok(Effects::default());
        }
        let offset = self.x2apic_register(msr)?;
        if offset == reg::ICR_LOW {
            if value as u32 & !ICR_LOW_WRITABLE != 0 {
                return Err(Illegal);
            }
            self.icr = Icr::from_bits(value);
            return Ok(Effects { ipi: self.send(), eoi: None });
        }
        let low = u32::try_from(value).map_err(|_| Illegal)?;
        let allowed = match offset {
            reg::EOI | reg::ESR => 0,
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::SVR => svr::WRITABLE,
            reg::DIVIDE => 0xb,
            reg::INITIAL_COUNT => u32::MAX,
            // Status bits of LVT entries are read-only, and reserved bits fault.
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                LVT_WRITABLE[((offset - reg::LVT_TIMER) >> 4) as usize] | 1 << 12 | 1 << 14
            }
            _ => return Err(Illegal),
        };
        if low & !allowed != 0 {
            return Err(Illegal);
        }
        if offset == reg::SELF_IPI {
            if low < 16 {
                self.raise_error(error::SEND_ILLEGAL_VECTOR);
            } else {
                self.accept(low as u8, false);
            }
            return Ok(Effects::default());
        }
        self.write(offset, low, now)
    }

    fn x2apic_register(&self, msr: u32) -> Result<u32, Illegal> {
        if self.is_enabled() && self.is_x2apic() && (MSR_X2APIC_FIRST..=MSR_X2APIC_LAST).contains(&msr) {
            Ok((msr - MSR_X2APIC_FIRST) << 4)
        } else {
            Err(Illegal)
        }
    }

    /// The registers as the xAPIC's page shows them, in whichever mode the APIC is.
    pub fn export(&self, now: Nanos) -> [u8; ApicRegisters::PAGE] {
        let mut page = [0; ApicRegisters::PAGE];
        let mut put = |offset: u32, value: u32| {
            page[offset as usize..offset as usize + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(reg::ID, self.id << 24);
        put(reg::VERSION, LOCAL_VERSION);
        put(reg::TPR, self.tpr.into());
        put(reg::LDR, if self.is_x2apic() { self.x2apic_ldr() } else { u32::from(self.ldr) << 24 });
        put(reg::DFR, u32::from(self.dfr) << 28 | 0x0fff_ffff);
        put(reg::SVR, self.svr);
        for index in 0..VECTOR_WORDS {
            put(reg::ISR + 16 * index, self.isr.word(index));
            put(reg::TMR + 16 * index, self.tmr.word(index));
            put(reg::IRR + 16 * index, self.irr.word(index));
        }
        put(reg::ESR, self.esr);
        put(reg::ICR_LOW, self.icr.into_bits() as u32);
        put(reg::ICR_HIGH, self.icr.destination());
        for (entry, offset) in self.lvt.iter().zip((reg::LVT_TIMER..).step_by(16)) {
            put(offset, entry.into_bits());
        }
        // An initial count with a one-shot timer that stands would start it again over there.
        let count = self.current_count(now);
        let stands = self.timer_mode() == TimerMode::OneShot && count == 0;
        put(reg::INITIAL_COUNT, if stands { 0 } else { self.initial_count });
        put(reg::CURRENT_COUNT, count);
        put(reg::DIVIDE, self.divide.into());
        page
    }

    /// Takes over `base` and the registers of a page as [`State::export`] writes it, and the deadline with the time it stands for.
    pub fn import(
        &mut self,
        base: u64,
        page: &[u8; ApicRegisters::PAGE],
        (tsc_deadline, expires): (u64, Nanos),
        now: Nanos,
    ) {
        let word = |offset: u32| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&page[offset as usize..offset as usize + 4]);
            u32::from_le_bytes(bytes)
        };
        let Self {
            id: _,
            base: own_base,
            tpr,
            ldr,
            dfr,
            svr,
            esr,
            errors: _,
            icr,
            lvt,
            initial_count,
            divide,
            expires: own_expires,
            tsc_deadline: own_deadline,
            irr,
            isr,
            tmr,
            // The pins are on this side.
            lint: _,
            extint: _,
        } = self;
        *own_base = base;
        *tpr = word(reg::TPR) as u8;
        if base & base::X2APIC == 0 {
            *ldr = (word(reg::LDR) >> 24) as u8;
        }
        *dfr = (word(reg::DFR) >> 28) as u8;
        *svr = word(reg::SVR) & svr::WRITABLE;
        *esr = word(reg::ESR);
        *icr = Icr::from_bits(
            u64::from(word(reg::ICR_HIGH)) << 32 | u64::from(word(reg::ICR_LOW) & ICR_LOW_WRITABLE),
        );
        for ((entry, writable), offset) in
            lvt.iter_mut().zip(LVT_WRITABLE).zip((reg::LVT_TIMER..).step_by(16))
        {
            *entry = Lvt::from_bits(word(offset) & (writable | LVT_MASKED));
        }
        for index in 0..VECTOR_WORDS {
            isr.set_word(index, word(reg::ISR + 16 * index));
            tmr.set_word(index, word(reg::TMR + 16 * index));
            irr.set_word(index, word(reg::IRR + 16 * index));
        }
        *initial_count = word(reg::INITIAL_COUNT);
        *divide = word(reg::DIVIDE) as u8 & 0xb;
        *own_deadline = tsc_deadline;
        *own_expires = (tsc_deadline != 0).then_some(expires);
        let count = u64::from(word(reg::CURRENT_COUNT));
        match self.timer_mode() {
            TimerMode::TscDeadline => {}
            TimerMode::Periodic if self.initial_count != 0 => {
                let left = if count == 0 { self.period() } else { count << self.shift() };
                self.expires = Some(now.saturating_add(left));
            }
            _ => self.expires = (count != 0).then(|| now.saturating_add(count << self.shift())),
        }
    }

    /// What LINT1 means now for an NMI from the host or the chipset.
    pub fn pulse_lint1(&mut self) -> Signal {
        let signal = self.set_lint(1, true);
        self.set_lint(1, false);
        signal
    }
}
