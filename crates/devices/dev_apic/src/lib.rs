//! The interrupt controllers of an SMP PC: a local APIC for each vCPU and one 82093AA I/O APIC.
//!
//! Together they are the machine's [`InterruptController`]. Local APICs: Intel SDM volume 3, chapter 10, xAPIC in the page at
//! IA32_APIC_BASE (0xfee00000 after reset) and x2APIC by MSRs; see [`local`]. I/O APIC: at 0xfec00000; see [`ioapic`].
//!
//! # Assembly
//!
//! ```text
//! let apic = Apic::new(config, links, &timers);   // before the 8259 pair
//! let pic  = …(INTR line = apic.intr_line());
//! apic.connect_pic(pic's ExtInt);
//! apic.register(&pgm);                            // local APIC page, I/O APIC page
//! apic.io_apic()                                  // Option<Arc<dyn IrqSink>>: inputs 0–23
//! apic.devices()                                  // the units to reset and save
//! ```
//!
//! On a machine without I/O APIC (`--ioapic off`) the 8259 pair alone serves the bootstrap processor; with `local_apic: false` it reaches the
//! CPU directly and IA32_APIC_BASE reads as disabled.
//!
//! # Time-stamp counter
//!
//! IA32_TSC_DEADLINE is in ticks of the VM-wide counter (`em::VmContext::tsc`): an engine subtracts the vCPU's own TSC offset before it calls
//! `write_msr` with a value other than 0, and adds it after `read_msr`.
//!
//! # Remote APICs
//!
//! An engine may run guests on local APICs of the host's hypervisor ([`LocalApics`], implemented in [`remote`]). The I/O APIC then sends its
//! messages there, the 8259 pair's requests still come through here, and the states here are what was last taken from there.
//!
//! # Locks
//!
//! One lock for each local APIC, one for the I/O APIC. The order is device → I/O APIC → local APIC → timer queue and vCPU link. What a local APIC
//! asks of others (inter-processor interrupts, EOI broadcasts, the 8259's acknowledge cycle) happens after its lock was released,
//! so no two local APICs are ever locked together.

pub mod ioapic;
pub mod local;
mod remote;
mod saved;
pub mod spec;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use cpum::{ForcedActions, VcpuLink};
use parking_lot::{Mutex, RwLock};
use pdm::irq::IrqPin;
use pdm::msix::MsiSink;
use pdm::{Device, ExtInt, InterruptController, IrqLine, IrqSink, LocalApics};
use pgm::{Backing, Layer, MapHandle, MmioHandler, PAGE_SIZE, Pgm};
use tm::{Clock, Nanos, Timer, TimerHandler, TimerQueue};
use vbox_types::{GuestPhys, Hz, VcpuId};

use local::{Acknowledge, Destination, Effects, Message, Signal};
use spec::DeliveryMode;

/// Where the local APICs' page lies after reset.
pub const LOCAL_BASE: GuestPhys = GuestPhys(0xfee0_0000);
/// Where the I/O APIC lies.
pub const IO_BASE: GuestPhys = GuestPhys(0xfec0_0000);

/// What the machine has.
#[derive(Clone, Debug)]
pub struct ApicConfig {
    /// Whether the CPUs have local APICs at all.
    pub local_apic: bool,
    /// Whether IA32_APIC_BASE may select x2APIC mode.
    pub x2apic: bool,
    pub io_apic: bool,
    /// Rate of the VM-wide time-stamp counter.
    pub tsc_frequency: Hz,
}

struct Local {
    state: Mutex<local::State>,
    /// The state was replaced (reset, loaded) since a remote APIC was given it.
    replaced: AtomicBool,
    link: Arc<VcpuLink>,
    timer: Timer,
}

/// All interrupt controllers but the 8259 pair.
pub struct Apic {
    config: ApicConfig,
    locals: Box<[Local]>,
    io: Mutex<ioapic::State>,
    pic: OnceLock<Arc<dyn ExtInt>>,
    clock: Arc<Clock>,
    this: Weak<Self>,
    pages: Mutex<Pages>,
    /// Breaks ties in lowest-priority delivery, so that equals take turns.
    turn: AtomicU32,
    /// Stand in for the local APICs, with the routes that they know.
    remote: RwLock<Option<Arc<remote::Stand>>>,
}

/// Where the local APICs' page is mapped besides its place after reset.
#[derive(Default)]
struct Pages {
    pgm: Weak<Pgm>,
    moved: Vec<(u64, MapHandle)>,
}

impl Apic {
    /// The controllers for the vCPUs behind `links`, in their state after power-on.
    pub fn new(config: ApicConfig, links: &[Arc<VcpuLink>], timers: &Arc<TimerQueue>) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| {
            let locals = links
                .iter()
                .zip(0u32..)
                .map(|(link, id)| Local {
                    state: Mutex::new(local::State::new(id, config.local_apic)),
                    replaced: AtomicBool::new(true),
                    link: link.clone(),
                    timer: timers.create(this.clone(), id),
                })
                .collect();
            Self {
                config,
                locals,
                io: Mutex::default(),
                pic: OnceLock::new(),
                clock: timers.clock().clone(),
                this: this.clone(),
                pages: Mutex::default(),
                turn: AtomicU32::new(0),
                remote: RwLock::new(None),
            }
        })
    }

    /// Gives the controllers their pages in guest physical space. Call once.
    pub fn register(self: &Arc<Self>, pgm: &Arc<Pgm>) {
        if self.config.local_apic {
            pgm.map(LOCAL_BASE, PAGE_SIZE, Layer::Fixed, self.local_page(LOCAL_BASE.0));
        }
        if self.config.io_apic {
            let backing = Backing::mmio(Arc::new(IoPage(self.clone())));
            pgm.map(IO_BASE, ioapic::MMIO_SIZE, Layer::Fixed, backing);
        }
        self.pages.lock().pgm = Arc::downgrade(pgm);
    }

    /// Connects the 8259 pair, once.
    pub fn connect_pic(&self, pic: Arc<dyn ExtInt>) {
        let _ = self.pic.set(pic);
    }

    /// The line for the 8259 pair's INTR: LINT0 of the bootstrap processor.
    pub fn intr_line(self: &Arc<Self>) -> IrqLine {
        IrqPin::new(Arc::new(Lint(self.clone())), 0).line()
    }

    /// The I/O APIC's inputs.
    pub fn io_apic(self: &Arc<Self>) -> Option<Arc<dyn IrqSink>> {
        self.config.io_apic.then(|| Arc::new(IoInputs(self.clone())) as Arc<dyn IrqSink>)
    }

    /// The units that are reset and saved: local APICs, and the I/O APIC if there is one.
    pub fn devices(self: &Arc<Self>) -> Vec<Arc<Mutex<dyn Device>>> {
        let mut list: Vec<Arc<Mutex<dyn Device>>> =
            vec![Arc::new(Mutex::new(saved::LocalApics(self.clone())))];
        if self.config.io_apic {
            list.push(Arc::new(Mutex::new(saved::IoApic(self.clone()))));
        }
        list
    }

    /// A non-maskable interrupt from outside (`debugvm injectnmi`): LINT1 of every CPU.
    pub fn inject_nmi(&self) {
        for local in &self.locals {
            let signal = local.state.lock().pulse_lint1();
            self.sync(local, &local.state.lock());
            if signal == Signal::Nmi {
                local.link.raise(ForcedActions::NMI);
            }
        }
    }

    fn local_page(self: &Arc<Self>, base: u64) -> Backing {
        Backing::mmio(Arc::new(LocalPage { apic: self.clone(), base }))
    }

    /// Brings the vCPU's interrupt request in line with its APIC.
    fn sync(&self, local: &Local, state: &local::State) {
        if self.wants(state) {
            local.link.raise(ForcedActions::INTERRUPT);
        } else if local.link.pending().contains(ForcedActions::INTERRUPT) {
            local.link.clear(ForcedActions::INTERRUPT);
        }
    }

    fn is_lent(&self) -> bool {
        self.remote.read().is_some()
    }

    /// Whether the vCPU has to come for an interrupt: remote APICs see to their own.
    fn wants(&self, state: &local::State) -> bool {
        if self.is_lent() { state.external() } else { state.has_interrupt() }
    }

    /// Has the timer thread come when the APIC's timer is due; remote APICs have their own timers.
    fn arm(&self, local: &Local, state: &local::State) {
        local.timer.set(state.deadline().filter(|_| !self.is_lent()));
    }

    /// Runs `change` on a vCPU's APIC and applies what follows, outside its lock where others are concerned.
    fn change<R>(
        &self,
        vcpu: VcpuId,
        change: impl FnOnce(&mut local::State, Nanos) -> (R, Effects),
    ) -> Option<R> {
        let local = self.locals.get(vcpu.index())?;
        let (result, effects) = {
            let mut state = local.state.lock();
            let before = state.deadline();
            let (result, effects) = change(&mut state, self.clock.now());
            self.sync(local, &state);
            if state.deadline() != before {
                self.arm(local, &state);
            }
            (result, effects)
        };
        if let Some(vector) = effects.eoi {
            self.end_in_io_apic(vector);
        }
        if let Some(message) = effects.ipi {
            self.deliver(Some(vcpu.index()), message);
        }
        Some(result)
    }

    fn end_in_io_apic(&self, vector: u8) {
        self.io.lock().end_of_interrupt(vector, &mut |message| self.deliver(None, message));
    }

    /// Gives a message to the APICs it is meant for; true if one took it. `from` is the sender of an inter-processor interrupt. No local
    /// APIC's lock may be held.
    fn deliver(&self, from: Option<usize>, message: Message) -> bool {
        let count = self.locals.len();
        // The 8259 pair, which an ExtINT message is about, is on this side.
        if let Some(stand) = self.stand()
            && message.mode != DeliveryMode::ExtInt
        {
            let one = |at: usize| stand.send(Message { destination: Destination::of(at as u32), ..message });
            return match message.destination {
                Destination::Address { .. } => stand.send(message),
                Destination::Me => from.is_some_and(one),
                Destination::All => (0..count).fold(false, |taken, at| taken | one(at)),
                Destination::Others => {
                    (0..count).filter(|at| from != Some(*at)).fold(false, |taken, at| taken | one(at))
                }
            };
        }
        if message.mode == DeliveryMode::LowestPriority {
            return self.deliver_lowest(from, message);
        }
        match message.destination {
            Destination::Me => from.is_some_and(|at| self.deliver_to(at, message)),
            Destination::Address { id, logical: false, wide } if id != 0xff && (!wide || id != u32::MAX) => {
                (id as usize) < count && self.deliver_to(id as usize, message)
            }
            _ => {
                let mut taken = false;
                for at in 0..count {
                    if self.is_meant(at, from, message.destination) {
                        taken |= self.deliver_to(at, message);
                    }
                }
                taken
            }
        }
    }

    fn is_meant(&self, at: usize, from: Option<usize>, destination: Destination) -> bool {
        let state = self.locals[at].state.lock();
        match destination {
            Destination::Address { id, logical, wide } => state.is_addressed(id, logical, wide),
            Destination::Me => from == Some(at),
            Destination::All => state.is_enabled(),
            Destination::Others => from != Some(at) && state.is_enabled(),
        }
    }

    fn deliver_lowest(&self, from: Option<usize>, message: Message) -> bool {
        let count = self.locals.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed) as usize % count.max(1);
        let mut targets: Vec<(u8, usize)> = (0..count)
            .map(|i| (first + i) % count)
            .filter(|&at| self.is_meant(at, from, message.destination))
            .map(|at| (self.locals[at].state.lock().arbitration_priority(), at))
            .collect();
        targets.sort_by_key(|(priority, _)| *priority);
        targets.iter().any(|&(_, at)| self.deliver_to(at, message))
    }

    /// Gives a message to one APIC; false if that does not take it.
    fn deliver_to(&self, at: usize, message: Message) -> bool {
        let local = &self.locals[at];
        let mut state = local.state.lock();
        if !state.is_enabled() {
            return false;
        }
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                let taken = state.accept(message.vector, message.level);
                self.sync(local, &state);
                return taken;
            }
            DeliveryMode::ExtInt => {
                state.accept_extint();
                self.sync(local, &state);
            }
            DeliveryMode::Nmi => local.link.raise(ForcedActions::NMI),
            DeliveryMode::Init => local.link.raise(ForcedActions::INIT),
            DeliveryMode::StartUp => local.link.raise_sipi(message.vector),
            DeliveryMode::Smi | DeliveryMode::Reserved => return false,
        }
        true
    }

    /// Maps the register page where the local APICs now say it is.
    fn remap(&self) {
        let mut pages = self.pages.lock();
        let (Some(pgm), Some(this)) = (pages.pgm.upgrade(), self.this.upgrade()) else { return };
        let mut wanted: Vec<u64> = self.locals.iter().filter_map(|l| l.state.lock().mmio_base()).collect();
        wanted.retain(|&base| base != LOCAL_BASE.0);
        wanted.sort_unstable();
        wanted.dedup();
        pages.moved.retain(|&(base, handle)| {
            let keep = wanted.contains(&base);
            if !keep {
                pgm.unmap(handle);
            }
            keep
        });
        for base in wanted {
            if pages.moved.iter().all(|&(b, _)| b != base) {
                let handle = pgm.map(GuestPhys(base), PAGE_SIZE, Layer::Fixed, this.local_page(base));
                pages.moved.push((base, handle));
            }
        }
    }

    fn reset_locals(&self) {
        for local in &self.locals {
            let mut state = local.state.lock();
            state.reset(self.config.local_apic);
            local.replaced.store(true, Ordering::SeqCst);
            self.sync(local, &state);
            self.arm(local, &state);
        }
        self.remap();
    }
}

impl InterruptController for Apic {
    fn is_pending(&self, vcpu: VcpuId) -> bool {
        self.locals.get(vcpu.index()).is_some_and(|local| self.wants(&local.state.lock()))
    }

    fn acknowledge(&self, vcpu: VcpuId) -> Option<u8> {
        let local = self.locals.get(vcpu.index())?;
        let mut state = local.state.lock();
        let found = if self.is_lent() { state.acknowledge_external() } else { state.acknowledge() };
        self.sync(local, &state);
        drop(state);
        match found {
            Acknowledge::Nothing => None,
            Acknowledge::Vector(vector) => Some(vector),
            Acknowledge::External => Some(self.pic.get()?.acknowledge()),
        }
    }

    fn read_cr8(&self, vcpu: VcpuId) -> u64 {
        self.locals.get(vcpu.index()).map_or(0, |local| u64::from(local.state.lock().tpr >> 4))
    }

    fn write_cr8(&self, vcpu: VcpuId, value: u64) {
        self.change(vcpu, |state, _| {
            state.tpr = (value as u8 & 0xf) << 4;
            ((), Effects::default())
        });
    }

    fn set_apic_base(&self, vcpu: VcpuId, value: u64) -> bool {
        if !self.config.local_apic || (value & spec::base::X2APIC != 0 && !self.config.x2apic) {
            return false;
        }
        let result = self.change(vcpu, |state, _| {
            let before = state.mmio_base();
            (state.set_base(value).map(|()| state.mmio_base() != before), Effects::default())
        });
        if result == Some(Ok(true)) {
            self.remap();
        }
        matches!(result, Some(Ok(_)))
    }

    fn read_msr(&self, vcpu: VcpuId, msr: u32) -> Option<u64> {
        self.change(vcpu, |state, now| (state.read_msr(msr, now).ok(), Effects::default())).flatten()
    }

    fn write_msr(&self, vcpu: VcpuId, msr: u32, value: u64) -> bool {
        let hz = self.config.tsc_frequency.0;
        let done = self.change(vcpu, |state, now| {
            match state.write_msr(msr, value, now, |tsc| tm::deadline(tsc, hz)) {
                Ok(effects) => (true, effects),
                Err(local::Illegal) => (false, Effects::default()),
            }
        });
        done == Some(true)
    }

    fn init_reset(&self, vcpu: VcpuId) {
        self.change(vcpu, |state, _| {
            state.init();
            ((), Effects::default())
        });
    }

    fn local_apics(&self) -> Option<&dyn LocalApics> {
        self.config.local_apic.then_some(self as &dyn LocalApics)
    }
}

impl MsiSink for Apic {
    /// SDM volume 3, 10.11.
    fn send(&self, address: u64, data: u32) {
        // Other addresses are memory, which no device interrupts by.
        if address >> 20 != LOCAL_BASE.0 >> 20 {
            return;
        }
        let message = Message {
            mode: DeliveryMode::from_bits((data >> 8) as u8),
            vector: data as u8,
            level: data & 1 << 15 != 0,
            destination: Destination::Address {
                id: (address >> 12) as u32 & 0xff,
                logical: address & 1 << 2 != 0,
                wide: false,
            },
        };
        self.deliver(None, message);
    }
}

impl TimerHandler for Apic {
    fn timer_fired(&self, timer: u32, now: Nanos) {
        let Some(local) = self.locals.get(timer as usize) else { return };
        let mut state = local.state.lock();
        if self.is_lent() {
            return;
        }
        state.timer_fired(now);
        self.sync(local, &state);
        // The queue has disarmed the timer.
        self.arm(local, &state);
    }
}

/// The local APICs' register page at `base`: each vCPU sees its own.
struct LocalPage {
    apic: Arc<Apic>,
    base: u64,
}

impl LocalPage {
    /// Whether the vCPU's registers are here; another vCPU may have moved its own here.
    fn shows(&self, state: &local::State) -> bool {
        state.mmio_base() == Some(self.base)
    }
}

impl MmioHandler for LocalPage {
    fn mmio_read(&self, vcpu: VcpuId, offset: u64, data: &mut [u8]) {
        self.apic.change(vcpu, |state, now| {
            if self.shows(state) {
                state.mmio_read(offset as u32, data, now);
            } else {
                data.fill(0xff);
            }
            ((), Effects::default())
        });
    }

    fn mmio_write(&self, vcpu: VcpuId, offset: u64, data: &[u8]) {
        self.apic.change(vcpu, |state, now| {
            let effects = if self.shows(state) {
                state.mmio_write(offset as u32, data, now)
            } else {
                Effects::default()
            };
            ((), effects)
        });
    }
}

struct IoPage(Arc<Apic>);

impl MmioHandler for IoPage {
    fn mmio_read(&self, _vcpu: VcpuId, offset: u64, data: &mut [u8]) {
        self.0.io.lock().mmio_read(offset, data);
    }

    fn mmio_write(&self, _vcpu: VcpuId, offset: u64, data: &[u8]) {
        let apic = &self.0;
        let mut io = apic.io.lock();
        io.mmio_write(offset, data, &mut |message| apic.deliver(None, message));
        apic.tell_routes(&io);
    }
}

struct IoInputs(Arc<Apic>);

impl IrqSink for IoInputs {
    fn set_level(&self, pin: u32, level: bool) {
        let apic = &self.0;
        apic.io.lock().set_level(pin as usize, level, &mut |message| apic.deliver(None, message));
    }
}

/// LINT0 of the bootstrap processor.
struct Lint(Arc<Apic>);

impl IrqSink for Lint {
    fn set_level(&self, pin: u32, level: bool) {
        let Some(local) = self.0.locals.first() else { return };
        let mut state = local.state.lock();
        let signal = state.set_lint(pin as usize & 1, level);
        self.0.sync(local, &state);
        drop(state);
        if signal == Signal::Nmi {
            local.link.raise(ForcedActions::NMI);
        }
    }
}
