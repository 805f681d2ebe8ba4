//! The run loop of a vCPU.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use cpum::state::rflags;
use cpum::{Activity, CpuState, ForcedActions, VcpuLink};
use em::{Engine, Event, Exit, VmContext};
use kvm_bindings::CpuId;
use kvm_ioctls::{Cap, Error, VcpuExit, VcpuFd, VmFd};
use parking_lot::Mutex;
use pdm::Width;
use pdm::doorbell::{BellId, Doorbell, Watcher};
use pgm::{Backlog, HostMemory, PAGE_SIZE, Pgm, Target};
use tm::Anchor;
use vbox_types::{GuestPhys, Port, VcpuId};

use crate::apic::Lent;
use crate::doorbells::Listener;
use crate::msr::{self, After};
use crate::probe;
use crate::probe::Apics;
use crate::slots::Slots;
use crate::state::{self, Delivery};
use crate::sys::{self, Ring, RunPage};

/// KVM's internal error for an instruction that it cannot emulate.
const EMULATION: u32 = 1;
/// Instructions that are interpreted in a row at most, where KVM fails again and again.
const MOST_INTERPRETED: u32 = 64;
/// So many exits later a failure has nothing to do with the one before.
const APART: u64 = 64;

/// What all vCPUs share.
pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    slots: Mutex<Slots>,
    apics: Apics,
    /// The host's counter is to be relied on.
    stable: bool,
    /// Where KVM leaves writes that it held back, if it does; locked by who makes them.
    ring: Option<(Ring, Mutex<()>)>,
    listener: Listener,
}

impl Watcher for Machine {
    fn put_up(&self, id: BellId, doorbell: &Doorbell) {
        self.listener.put_up(&self.vm, id, doorbell);
    }

    fn take_down(&self, id: BellId) {
        self.listener.take_down(&self.vm, id);
    }
}

impl Backlog for Machine {
    fn take_posted(&self, pgm: &Pgm) {
        let Some((ring, lock)) = &self.ring else { return };
        if ring.is_empty() {
            return;
        }
        // Who finds writes at work by another thread waits until they are made.
        let _guard = lock.lock();
        while let Some((address, data, len)) = ring.oldest() {
            write(pgm, VcpuId(0), address, &data[..len]);
            ring.advance();
        }
    }

    fn collect_dirty(&self, memory: &HostMemory) {
        if let Err(error) = self.slots.lock().collect_dirty(&self.vm, memory) {
            tracing::error!(target: "nem", "KVM does not tell which pages of {} were written: {error}", memory.name());
            // Better too many than one too few.
            for page in 0..memory.len() / PAGE_SIZE {
                memory.mark_dirty(page);
            }
        }
    }

    fn forget_dirty(&self, memory: &HostMemory) {
        if let Err(error) = self.slots.lock().forget_dirty(&self.vm, memory) {
            tracing::warn!(target: "nem", "KVM goes on noting the pages of {} that are written: {error}", memory.name());
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nobody can ask KVM any more.
        self.slots.lock().mark_logged();
    }
}

/// Through which other threads fetch a vCPU out of guest code.
struct Gate {
    page: RunPage,
    /// The thread is about to enter guest code or in it.
    running: AtomicBool,
    thread: AtomicI32,
}

impl Gate {
    fn fetch(&self) {
        // First the flag, for a thread that has yet to enter; then the signal, for one that has.
        self.page.set_immediate_exit(true);
        if self.running.load(Ordering::SeqCst) {
            sys::send_signal(self.thread.load(Ordering::SeqCst));
        }
    }
}

#[derive(Clone, Copy, Default)]
struct Stats {
    exits: u64,
    port: u64,
    mmio: u64,
    halt: u64,
    msr: u64,
    window: u64,
    fetched: u64,
    settled: u64,
    interrupts: u64,
    ended: u64,
    interpreted: u64,
    delivered: u64,
}

/// One vCPU under KVM.
struct Vcpu {
    fd: VcpuFd,
    gate: Arc<Gate>,
    machine: Arc<Machine>,
    ctx: Arc<VmContext>,
    id: VcpuId,
    link: Arc<VcpuLink>,
    /// KVM has the state; else `CpuState` has.
    with_kvm: bool,
    /// KVM has the local APIC, too.
    lent: Option<Lent>,
    /// The guest has virtualization itself.
    nested: bool,
    /// IA32_TSC_DEADLINE in the vCPU's own ticks, for KVM when the counter has its offset.
    deadline: Option<u64>,
    /// The last exit is completed by the next entry: the registers are not those of an instruction boundary yet.
    unfinished: bool,
    /// What the counter's offset was computed from.
    anchor: Option<Anchor>,
    /// What came up while the state was being completed.
    deferred: Option<Exit>,
    /// Instructions that the interpreter does when KVM fails next, and the count of exits when it failed last.
    burst: (u32, u64),
    stats: Stats,
}

pub(crate) fn engines(
    vm: VmFd,
    apics: Apics,
    stable: bool,
    ctx: &Arc<VmContext>,
) -> io::Result<Vec<Box<dyn Engine>>> {
    sys::install_signal();
    let mut descriptors = Vec::new();
    for id in 0..ctx.links.len() {
        descriptors.push(vm.create_vcpu(id as u64)?);
    }
    let ring = match descriptors.first() {
        Some(first) if vm.check_extension(Cap::CoalescedMmio) => Some((Ring::new(first)?, Mutex::default())),
        _ => None,
    };
    let listener = Listener::new()?;
    let machine = Arc::new(Machine { vm, slots: Mutex::default(), apics, stable, ring, listener });
    let backlog: Arc<dyn Backlog> = machine.clone();
    let mut list: Vec<Box<dyn Engine>> = Vec::new();
    for ((fd, link), id) in descriptors.into_iter().zip(&ctx.links).zip(0..) {
        let entries = probe::cpuid_entries(&ctx.cpuid, &CpuState::reset(id));
        let entries = CpuId::from_entries(&entries).map_err(|_| io::Error::other("too many CPUID leaves"))?;
        fd.set_cpuid2(&entries)?;
        let page = RunPage::new(&fd)?;
        let gate = Arc::new(Gate { page, running: AtomicBool::new(false), thread: AtomicI32::new(0) });
        let notified = gate.clone();
        link.set_notifier(Box::new(move || notified.fetch()));
        list.push(Box::new(Vcpu {
            fd,
            gate,
            machine: machine.clone(),
            ctx: ctx.clone(),
            id: VcpuId(id),
            link: link.clone(),
            with_kvm: false,
            lent: (apics == Apics::Kernel).then(Lent::new),
            nested: state::has_nested(&ctx.cpuid),
            deadline: None,
            unfinished: false,
            anchor: None,
            deferred: None,
            burst: (1, 0),
            stats: Stats::default(),
        }));
    }
    // Nothing fails from here on.
    if apics == Apics::Kernel
        && let Some(local) = ctx.irq.local_apics()
    {
        local.lend(machine.clone());
    }
    ctx.pgm.set_backlog(Arc::downgrade(&backlog));
    let watcher: Arc<dyn Watcher> = machine.clone();
    ctx.iom.doorbells().watch(&watcher);
    Ok(list)
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.link.clear_notifier();
    }
}

/// What one stay in the guest led to.
enum Outcome {
    /// Go in again.
    Again,
    /// The thread was fetched.
    Fetched,
    /// The single step was done.
    Stepped,
    /// KVM had to emulate the next instruction, and cannot.
    Unemulated,
    Exit(Exit),
}

fn fatal(what: &str, error: impl std::fmt::Display) -> Exit {
    Exit::Fatal(format!("KVM cannot {what}: {error}"))
}

impl Vcpu {
    /// Gives KVM the state if it lies in `cpu`, and the counter its offset if virtual time was stopped or moved.
    fn load(&mut self, cpu: &mut CpuState) -> Result<(), Exit> {
        if !self.with_kvm {
            if self.unfinished {
                // What KVM still has to do for the last exit must not fall on the new state.
                self.settle(&mut cpu.clone());
                self.deferred = None;
            }
            let cr8 = self.ctx.irq.read_cr8(self.id);
            state::push(&self.fd, cpu, &self.ctx.cpuid, cr8)
                .map_err(|e| fatal("take the vCPU's state", e))?;
            if let Some(lent) = &mut self.lent {
                let deadline = lent
                    .push(&self.fd, &self.ctx, cpu)
                    .map_err(|e| fatal("take the vCPU's interrupt controller", e))?;
                self.deadline = Some(deadline);
            }
            self.with_kvm = true;
            self.anchor = None;
            // So that it tells whether interrupts can be delivered.
            self.settle(cpu);
        }
        if self.lent.is_some() && cpu.activity != Activity::Shutdown {
            // What it waits for is known in KVM from here on.
            cpu.activity = Activity::Running;
        }
        let anchor = self.ctx.clock.anchor();
        if anchor.is_some() && anchor != self.anchor {
            self.set_counter(cpu)?;
            self.anchor = anchor;
        }
        Ok(())
    }

    fn set_counter(&mut self, cpu: &CpuState) -> Result<(), Exit> {
        let Some(anchor) = self.ctx.clock.anchor() else { return Ok(()) };
        let distance = if self.machine.stable {
            tm::ticks(anchor.time, self.ctx.tsc_frequency.0).wrapping_sub(anchor.counter)
        } else {
            self.distance()
        };
        let offset = distance.wrapping_add(cpu.msr.tsc_offset);
        sys::set_tsc_offset(&self.fd, offset).map_err(|e| fatal("set the time-stamp counter", e))?;
        if self.lent.is_some() {
            // KVM's timer goes by the offset that there was when it was armed.
            let deadline = match self.deadline.take() {
                Some(deadline) => Ok(deadline),
                None => state::msr(&self.fd, msr::TSC_DEADLINE),
            };
            deadline
                .and_then(|deadline| state::set_msr(&self.fd, msr::TSC_DEADLINE, deadline))
                .map_err(|e| fatal("arm the timer", e))?;
        }
        Ok(())
    }

    /// How far the VM-wide counter is ahead of the host's now. Of several readings the one counts that took least: the thread may lose its
    /// CPU between the two clocks.
    fn distance(&self) -> u64 {
        let readings = (0..8).map(|_| {
            let before = sys::rdtsc();
            let shared = self.ctx.tsc();
            let took = sys::rdtsc().wrapping_sub(before);
            (took, shared.wrapping_sub(before.wrapping_add(took / 2)))
        });
        readings.min().map_or(0, |(_, distance)| distance)
    }

    /// Has KVM finish the last exit and look at the state, without running guest code.
    fn settle(&mut self, cpu: &mut CpuState) {
        self.stats.settled += 1;
        loop {
            self.gate.page.set_immediate_exit(true);
            match self.stay(cpu) {
                // An access in several parts, or a repeated one.
                Outcome::Again if self.unfinished => {}
                Outcome::Exit(exit) => {
                    self.deferred = Some(exit);
                    return;
                }
                _ => return,
            }
        }
    }

    /// Whether the guest would take an interrupt now.
    fn is_ready(&mut self) -> bool {
        let run = self.fd.get_kvm_run();
        run.if_flag != 0 && run.ready_for_interrupt_injection != 0
    }

    /// What EM needs to know of the state, without fetching it.
    fn outline(&mut self, cpu: &mut CpuState) {
        // A running vCPU that cannot take an interrupt at once asks for the window itself.
        let ready = match cpu.activity {
            Activity::Running => self.is_ready(),
            _ => self.fd.get_kvm_run().if_flag != 0,
        };
        cpu.rflags = cpu.rflags & !rflags::IF | if ready { rflags::IF } else { 0 };
        cpu.inhibit_rip = None;
        // KVM holds back NMIs itself.
        cpu.nmi_blocked = false;
    }

    /// Looks at what other threads want; gives the exit if EM must act.
    fn attend(&mut self, cpu: &mut CpuState, pending: ForcedActions) -> Option<Exit> {
        let flush = ForcedActions::TLB_FLUSH.union(ForcedActions::REMAP);
        if pending.intersects(flush) {
            let epoch = self.ctx.pgm.epoch();
            self.link.clear(flush);
            if let Err(error) = self.update_slots() {
                return Some(fatal("map the guest's memory", error));
            }
            self.link.acknowledge_flush(epoch);
        }
        let always = ForcedActions::INIT.union(ForcedActions::SIPI).union(ForcedActions::EM);
        let interrupt = pending.contains(ForcedActions::INTERRUPT);
        if !pending.intersects(always.union(ForcedActions::NMI)) && !interrupt {
            return None;
        }
        // An interrupt that has to wait for its window is not worth an entry of its own.
        if self.unfinished && (!interrupt || pending.intersects(always) || self.is_ready()) {
            self.settle(cpu);
            if let Some(exit) = self.deferred.take() {
                return Some(exit);
            }
        }
        if pending.intersects(always.union(ForcedActions::NMI)) || self.is_ready() {
            self.outline(cpu);
            return Some(Exit::Attention);
        }
        None
    }

    fn update_slots(&self) -> Result<(), Error> {
        let Machine { vm, slots, ring, .. } = &*self.machine;
        slots.lock().update(vm, &self.ctx.pgm, ring.is_some())
    }

    /// Runs guest code until KVM returns, and does what it returned for.
    fn stay(&mut self, cpu: &mut CpuState) -> Outcome {
        let Self { fd, ctx, id, gate, stats, unfinished, lent, machine, .. } = self;
        let cr8 = match lent {
            None => ctx.irq.read_cr8(*id),
            Some(_) => 0,
        };
        if lent.is_none() {
            fd.get_kvm_run().cr8 = cr8;
        }
        stats.exits += 1;
        let mut after = After::Nothing;
        *unfinished = false;
        let result = fd.run();
        // What the guest did before comes before what it does now.
        machine.take_posted(&ctx.pgm);
        let outcome = match result {
            Ok(VcpuExit::IoOut(port, data)) => {
                stats.port += 1;
                *unfinished = true;
                if let Some(width) = Width::from_bytes(gate.page.port_access_size().into()) {
                    if data.len() > width.bytes().into() {
                        ctx.iom.write_string(Port(port), width, data);
                    } else {
                        let mut value = [0; 4];
                        value[..data.len()].copy_from_slice(data);
                        ctx.iom.write(Port(port), width, u32::from_le_bytes(value));
                    }
                }
                Outcome::Again
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                stats.port += 1;
                *unfinished = true;
                match Width::from_bytes(gate.page.port_access_size().into()) {
                    Some(width) if data.len() > width.bytes().into() => {
                        ctx.iom.read_string(Port(port), width, data);
                    }
                    Some(width) => {
                        let value = ctx.iom.read(Port(port), width).to_le_bytes();
                        data.copy_from_slice(&value[..data.len()]);
                    }
                    None => data.fill(0xff),
                }
                Outcome::Again
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                stats.mmio += 1;
                *unfinished = true;
                read(&ctx.pgm, *id, address, data);
                Outcome::Again
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                stats.mmio += 1;
                *unfinished = true;
                write(&ctx.pgm, *id, address, data);
                Outcome::Again
            }
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                stats.msr += 1;
                *unfinished = true;
                match msr::read(ctx, cpu, exit.index) {
                    Some(value) => (*exit.data, *exit.error) = (value, 0),
                    None => *exit.error = 1,
                }
                Outcome::Again
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                stats.msr += 1;
                *unfinished = true;
                match msr::write(ctx, machine.apics, cpu, exit.index, exit.data) {
                    Some(todo) => (after, *exit.error) = (todo, 0),
                    None => *exit.error = 1,
                }
                Outcome::Again
            }
            Ok(VcpuExit::Hlt) => {
                stats.halt += 1;
                cpu.activity = Activity::Halted;
                Outcome::Exit(Exit::Halt)
            }
            Ok(VcpuExit::IrqWindowOpen) => {
                stats.window += 1;
                Outcome::Again
            }
            Ok(VcpuExit::IoapicEoi(vector)) => {
                stats.ended += 1;
                if let Some(apics) = ctx.irq.local_apics() {
                    apics.end_of_interrupt(vector);
                }
                Outcome::Again
            }
            Ok(VcpuExit::SetTpr) => Outcome::Again,
            Ok(VcpuExit::Intr) => Outcome::Fetched,
            Ok(VcpuExit::Debug(_)) => Outcome::Stepped,
            Ok(VcpuExit::Shutdown) => {
                cpu.activity = Activity::Shutdown;
                Outcome::Exit(Exit::TripleFault)
            }
            Ok(VcpuExit::FailEntry(reason, _)) => Outcome::Exit(Exit::Fatal(format!(
                "the CPU refuses to enter guest code, reason {reason:#x}: its state is none that the hardware can run"
            ))),
            Ok(VcpuExit::InternalError) if gate.page.internal_error().0 == EMULATION => Outcome::Unemulated,
            Ok(VcpuExit::InternalError) => {
                let (code, data) = gate.page.internal_error();
                Outcome::Exit(Exit::Fatal(format!(
                    "KVM cannot go on: internal error {code} ({}), data {data:x?}",
                    internal_error(code)
                )))
            }
            Ok(other) => Outcome::Exit(Exit::Fatal(format!("KVM returned for an unknown reason: {other:?}"))),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                stats.fetched += 1;
                Outcome::Fetched
            }
            Err(error) => Outcome::Exit(fatal("run the vCPU", error)),
        };
        // The guest writes CR8 without an exit.
        if lent.is_none() {
            let now = fd.get_kvm_run().cr8;
            if now != cr8 {
                ctx.irq.write_cr8(*id, now);
            }
        }
        match self.finish(cpu, after) {
            Ok(()) => outcome,
            Err(exit) => Outcome::Exit(exit),
        }
    }

    /// What a register write leaves to do.
    fn finish(&mut self, cpu: &mut CpuState, after: After) -> Result<(), Exit> {
        match after {
            After::Nothing => Ok(()),
            After::Counter => self.set_counter(cpu),
            After::ApicBase => {
                self.settle(cpu);
                let set = self.fd.get_sregs().and_then(|mut sregs| {
                    sregs.apic_base = cpu.msr.apic_base;
                    // What is about to be delivered is not to be queued twice.
                    sregs.interrupt_bitmap = [0; 4];
                    self.fd.set_sregs(&sregs)
                });
                set.map_err(|e| fatal("move the APIC", e))
            }
        }
    }

    /// Whether the vCPU is in a virtual machine of the guest's own.
    fn is_nested(&self) -> Result<bool, Error> {
        if self.nested { state::is_nested(&self.fd) } else { Ok(false) }
    }

    /// Has the interpreter do what KVM cannot: registers in memory that are reached by instructions of SSE or AVX, for one, and on old CPUs of
    /// Intel's anything in real mode. An error is what `run` returns.
    fn interpret(&mut self, cpu: &mut CpuState) -> Result<(), Exit> {
        let (burst, last) = self.burst;
        let again = self.stats.exits - last < APART;
        let count = if again { (burst * 2).min(MOST_INTERPRETED) } else { 1 };
        self.burst = (count, self.stats.exits);
        // The interpreter knows nothing of how that one's memory lies in the guest's.
        if self.is_nested().map_err(|e| fatal("tell what the vCPU runs", e))? {
            return Err(Exit::Fatal(
                "KVM met an instruction that it cannot emulate in a virtual machine of the guest's own"
                    .into(),
            ));
        }
        self.complete(cpu);
        if let Some(exit) = self.deferred.take() {
            return Err(exit);
        }
        // A new one each time: what guest code writes under KVM does not reach the interpreter's caches.
        let mut iem = iem::Iem::new(self.ctx.clone(), self.id)
            .map_err(|e| fatal("have an instruction interpreted", e))?;
        let mut result = Ok(());
        for _ in 0..count {
            self.stats.interpreted += 1;
            if let Some(exit) = iem.run_instruction(cpu) {
                result = Err(exit);
                break;
            }
            if cpu.activity != Activity::Running || !self.link.pending().is_empty() {
                break;
            }
        }
        self.with_kvm = false;
        // The interpreter has taken requests to look at the memory map anew.
        self.update_slots().map_err(|e| fatal("map the guest's memory", e))?;
        // HLT waits where this engine waits.
        match result {
            Err(Exit::Halt) if self.lent.is_some() => self.load(cpu),
            Err(exit) => Err(exit),
            Ok(()) => self.load(cpu),
        }
    }

    /// Takes the state from KVM, and tells what the vCPU waits for if KVM has its APIC. What is on its way to the vCPU, for which the state has
    /// no place, the interpreter brings into the guest; KVM then has the state no more.
    fn take(&mut self, cpu: &mut CpuState) -> Result<Option<u32>, Error> {
        if self.unfinished {
            self.settle(cpu);
        }
        // For a guest's own virtual machine it stays with KVM.
        let (delivery, nmi_waits) =
            if self.is_nested()? { (None, false) } else { state::take_delivery(&self.fd)? };
        if nmi_waits {
            self.link.raise(ForcedActions::NMI);
        }
        let waits = self.lent.as_ref().map(|_| self.fd.get_mp_state()).transpose()?;
        state::take(&self.fd, cpu, &self.ctx.cpuid, &self.ctx.pgm)?;
        if let Some(delivery) = delivery {
            self.stats.delivered += 1;
            self.with_kvm = false;
            let mut iem = iem::Iem::new(self.ctx.clone(), self.id).map_err(|_| Error::new(libc::ENOMEM))?;
            let result = match delivery {
                Delivery::Interrupt(vector) => iem.inject(cpu, Event::Interrupt(vector)),
                Delivery::Nmi => iem.inject(cpu, Event::Nmi),
                Delivery::Exception(number, code) => match iem::Vector::of(number) {
                    Some(vector) => iem.deliver_exception(cpu, iem::Fault::new(vector, code as u16)),
                    None => Err(fatal("deliver an exception", format!("there is none with vector {number}"))),
                },
            };
            if let Err(exit) = result {
                self.deferred = Some(exit);
            }
        }
        Ok(waits.map(|waits| waits.mp_state))
    }
}

impl Engine for Vcpu {
    fn name(&self) -> &'static str {
        "KVM"
    }

    fn run(&mut self, cpu: &mut CpuState) -> Exit {
        if let Some(exit) = self.deferred.take() {
            return exit;
        }
        self.gate.thread.store(sys::thread_id(), Ordering::SeqCst);
        // The first entry finds memory even if nobody has asked for a flush.
        if let Err(error) = self.update_slots() {
            return fatal("map the guest's memory", error);
        }
        if let Err(exit) = self.load(cpu) {
            return exit;
        }
        if let Some(exit) = self.deferred.take() {
            return exit;
        }
        loop {
            let pending = self.link.pending();
            if !pending.is_empty()
                && let Some(exit) = self.attend(cpu, pending)
            {
                return exit;
            }
            let held_back = pending.contains(ForcedActions::INTERRUPT);
            self.fd.get_kvm_run().request_interrupt_window = held_back.into();
            // Whoever raises an action from here on either shows in the second look or makes the entry return.
            self.gate.running.store(true, Ordering::SeqCst);
            self.gate.page.take_immediate_exit();
            let settled = ForcedActions::TLB_FLUSH.union(ForcedActions::REMAP).0;
            let outcome =
                if self.link.pending().0 == pending.0 & !settled { self.stay(cpu) } else { Outcome::Again };
            self.gate.running.store(false, Ordering::SeqCst);
            if matches!(outcome, Outcome::Unemulated) {
                match self.interpret(cpu) {
                    Ok(()) => continue,
                    Err(exit) => return exit,
                }
            }
            if let Outcome::Exit(exit) = outcome {
                if !matches!(exit, Exit::Fatal(_)) {
                    self.outline(cpu);
                }
                return exit;
            }
        }
    }

    fn inject(&mut self, cpu: &mut CpuState, event: Event) -> Result<(), Exit> {
        self.load(cpu)?;
        cpu.activity = Activity::Running;
        self.stats.interrupts += 1;
        match event {
            Event::Interrupt(vector) => {
                // The next one has to wait until KVM has delivered this.
                self.fd.get_kvm_run().ready_for_interrupt_injection = 0;
                let nested = self.is_nested().map_err(|e| fatal("tell what the vCPU runs", e))?;
                let delivered = match &self.lent {
                    // KVM would keep it to itself until it can deliver it, and tell nobody. A virtual machine of the guest's own is left
                    // by KVM alone.
                    Some(_) if !nested => state::deliver(&self.fd, vector).map_err(io::Error::from),
                    _ => sys::interrupt(&self.fd, vector),
                };
                delivered.map_err(|e| fatal("deliver an interrupt", e))
            }
            Event::Nmi => self.fd.nmi().map_err(|e| fatal("deliver an NMI", e)),
        }
    }

    fn state_changed(&mut self, _cpu: &CpuState) {
        self.with_kvm = false;
        // What KVM failed to do is not undone by another state.
        self.deferred.take_if(|exit| !matches!(exit, Exit::Fatal(_)));
    }

    fn take_deferred(&mut self) -> Option<Exit> {
        self.deferred.take()
    }

    fn complete(&mut self, cpu: &mut CpuState) {
        if !self.with_kvm {
            if let Some(lent) = &mut self.lent
                && let Err(error) = lent.refresh(&self.fd, &self.ctx, cpu)
            {
                self.deferred = Some(fatal("give the vCPU's interrupt controller", error));
            }
            return;
        }
        let activity = cpu.activity;
        let mut taken = self.take(cpu);
        if self.deferred.is_none() {
            cpu.activity = activity;
        }
        if let (Ok(Some(waits)), Some(lent)) = (&taken, &mut self.lent) {
            taken = lent.take(&self.fd, &self.ctx, cpu, *waits).map(|()| None);
        }
        if let Err(error) = taken {
            self.deferred = Some(fatal("give the vCPU's state", error));
        }
    }

    fn waits_itself(&self) -> bool {
        self.lent.is_some()
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let Stats {
            exits,
            port,
            mmio,
            halt,
            msr,
            window,
            fetched,
            settled,
            interrupts,
            ended,
            interpreted,
            delivered,
        } = self.stats;
        vec![
            ("exits", exits),
            ("port", port),
            ("mmio", mmio),
            ("halt", halt),
            ("msr", msr),
            ("window", window),
            ("fetched", fetched),
            ("settled", settled),
            ("interrupts", interrupts),
            ("ended", ended),
            ("interpreted", interpreted),
            ("delivered by the interpreter", delivered),
        ]
    }
}

/// What KVM's documentation calls its internal errors.
fn internal_error(code: u32) -> &'static str {
    match code {
        1 => "an instruction that it cannot emulate",
        2 => "an event during the delivery of another",
        3 => "a delivery event",
        4 => "an unexpected exit",
        _ => "unknown",
    }
}

/// Reads what lies at `address`: registers, or memory that is in no slot.
fn read(pgm: &Pgm, vcpu: VcpuId, address: u64, data: &mut [u8]) {
    let mut done = 0;
    while done < data.len() {
        let view = pgm.resolve(GuestPhys(address.wrapping_add(done as u64)));
        let count = view.len.clamp(1, (data.len() - done) as u64) as usize;
        let part = &mut data[done..done + count];
        match view.read {
            Target::Mmio { handler, offset } => handler.mmio_read(vcpu, offset, part),
            Target::Memory { memory, offset } if memory.read(offset, part) => {}
            _ => part.fill(0xff),
        }
        done += count;
    }
}

fn write(pgm: &Pgm, vcpu: VcpuId, address: u64, data: &[u8]) {
    let mut done = 0;
    while done < data.len() {
        let view = pgm.resolve(GuestPhys(address.wrapping_add(done as u64)));
        let count = view.len.clamp(1, (data.len() - done) as u64) as usize;
        let part = &data[done..done + count];
        match view.write {
            Target::Mmio { handler, offset } => handler.mmio_write(vcpu, offset, part),
            Target::Memory { memory, offset } => {
                memory.write(offset, part);
            }
            Target::Open => {}
        }
        done += count;
    }
}
