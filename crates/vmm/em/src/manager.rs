//! Runs the vCPUs, one thread each, and brings them together for pause, reset and power-off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cpum::{Activity, CpuState, ForcedActions};
use parking_lot::{Condvar, Mutex, MutexGuard};
use pdm::connector::{SystemControl, SystemRequest};
use tm::TimerQueue;
use vbox_types::VcpuId;

use crate::engine::{Engine, Exit, VmContext};
use crate::trpm;

/// What the machine does when EM asks. Called on a vCPU's thread while every vCPU is stopped and no lock of EM is held.
pub trait MachineHooks: Send + Sync {
    /// Brings every device to its state after reset.
    fn reset_devices(&self);
    /// The run state has changed. The text says why where the guest cannot go on.
    fn state_changed(&self, state: RunState, why: Option<&str>);
}

/// What the vCPUs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    Running,
    Paused,
    /// The guest cannot go on ("Guru Meditation"); its state can be looked at.
    Stuck,
    /// The vCPU threads have ended.
    PoweredOff,
}

struct Control {
    wanted: RunState,
    /// A machine reset is to be done at the next meeting.
    reset: bool,
    /// Counts resets, so that every vCPU notices.
    resets: u64,
    /// vCPUs that have stopped.
    parked: usize,
    /// The last vCPU to stop is at work on what the meeting was for.
    busy: bool,
    /// vCPUs whose threads have ended.
    ended: usize,
    why: Option<String>,
    /// The vCPUs have used up their share of this period.
    resting: bool,
    /// The thread that shares out time runs.
    capped: bool,
    /// When virtual time was stopped by a pause.
    stopped: Option<Instant>,
}

/// The period of which [`Em::set_execution_cap`] gives the vCPUs a share.
const CAP_PERIOD: Duration = Duration::from_millis(50);

struct Vcpu {
    state: CpuState,
    engine: Box<dyn Engine>,
}

/// How long a visitor waits before it asks a vCPU to come out of the guest once more.
const VISIT_PATIENCE: Duration = Duration::from_millis(2);

/// The execution manager of one VM.
pub struct Em {
    context: Arc<VmContext>,
    vcpus: Vec<Mutex<Vcpu>>,
    control: Mutex<Control>,
    changed: Condvar,
    timers: Arc<TimerQueue>,
    hooks: Mutex<Option<Arc<dyn MachineHooks>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    triple_fault_resets: AtomicBool,
    /// Percent of time that guest code may run.
    cap: AtomicU32,
    /// Which vCPUs the machine has now.
    present: Box<[AtomicBool]>,
}

/// IA32_APIC_BASE: the local APIC is on.
const APIC_ON: u64 = 1 << 11;

impl Em {
    /// `engines` has one engine for each vCPU of the context. Nothing runs before [`Em::power_on`].
    pub fn new(context: Arc<VmContext>, engines: Vec<Box<dyn Engine>>, timers: Arc<TimerQueue>) -> Arc<Self> {
        let present = engines.iter().map(|_| AtomicBool::new(true)).collect();
        let vcpus = engines
            .into_iter()
            .enumerate()
            .map(|(id, engine)| Mutex::new(Vcpu { state: CpuState::reset(id as u32), engine }))
            .collect();
        Arc::new(Self {
            context,
            vcpus,
            control: Mutex::new(Control {
                wanted: RunState::Paused,
                reset: false,
                resets: 0,
                parked: 0,
                busy: false,
                ended: 0,
                why: None,
                resting: false,
                capped: false,
                stopped: None,
            }),
            changed: Condvar::new(),
            timers,
            hooks: Mutex::new(None),
            threads: Mutex::default(),
            triple_fault_resets: AtomicBool::new(false),
            cap: AtomicU32::new(100),
            present,
        })
    }

    /// Takes a vCPU out of the machine or puts it in, in its state after reset. One that is not there waits for a start-up message that its
    /// local APIC, which is off, does not take. Not to be called on a vCPU's thread; no effect on the first vCPU.
    pub fn set_present(&self, vcpu: VcpuId, present: bool) {
        let Some(is_present) = self.present.get(vcpu.index()).filter(|_| vcpu.index() > 0) else { return };
        let mut guard = self.visit(vcpu.index());
        if is_present.swap(present, Ordering::SeqCst) == present {
            return;
        }
        let Vcpu { state, engine } = &mut *guard;
        engine.complete(state);
        *state = self.first_state(vcpu.index());
        let link = &self.context.links[vcpu.index()];
        link.clear(ForcedActions::NMI.union(ForcedActions::INIT).union(ForcedActions::SIPI));
        self.context.irq.init_reset(vcpu);
        self.context.irq.set_apic_base(vcpu, state.msr.apic_base);
        engine.state_changed(state);
        drop(guard);
        // The engine takes the new state over at its next entry.
        link.raise(ForcedActions::EM);
    }

    /// Whether the machine has the vCPU now.
    pub fn is_present(&self, vcpu: VcpuId) -> bool {
        self.present.get(vcpu.index()).is_some_and(|present| present.load(Ordering::SeqCst))
    }

    /// The local APICs have been reset, which switches them on: switches those of vCPUs off that are not there.
    pub fn switch_absent_off(&self) {
        for index in (0..self.present.len()).filter(|&index| !self.present[index].load(Ordering::SeqCst)) {
            let base = self.first_state(index).msr.apic_base;
            self.context.irq.set_apic_base(VcpuId(index as u32), base);
        }
    }

    /// A vCPU's state after reset.
    fn first_state(&self, index: usize) -> CpuState {
        let mut state = CpuState::reset(index as u32);
        if !self.present[index].load(Ordering::SeqCst) {
            state.msr.apic_base &= !APIC_ON;
        }
        state
    }

    /// Whether a triple fault resets the machine, as on hardware, instead of stopping it for the user to look at.
    pub fn set_triple_fault_reset(&self, reset: bool) {
        self.triple_fault_resets.store(reset, Ordering::Relaxed);
    }

    /// Lets guest code run for `percent` (1 to 100) of the time; virtual time goes on meanwhile, as on a CPU that others use too.
    pub fn set_execution_cap(self: &Arc<Self>, percent: u32) -> std::io::Result<()> {
        let percent = percent.clamp(1, 100);
        self.cap.store(percent, Ordering::Relaxed);
        let mut control = self.control.lock();
        if percent < 100 && !control.capped {
            let em = self.clone();
            std::thread::Builder::new().name("em-cap".into()).spawn(move || em.share_time())?;
            control.capped = true;
        }
        Ok(())
    }

    /// Has the vCPUs rest for a part of every period, until there is no cap any more or the machine is off.
    fn share_time(&self) {
        let mut control = self.control.lock();
        loop {
            let share = CAP_PERIOD * self.cap.load(Ordering::Relaxed) / 100;
            if share >= CAP_PERIOD || control.wanted == RunState::PoweredOff {
                break;
            }
            self.sleep(&mut control, share);
            control.resting = true;
            self.summon();
            self.sleep(&mut control, CAP_PERIOD - share);
            control.resting = false;
            self.changed.notify_all();
        }
        control.resting = false;
        control.capped = false;
        self.changed.notify_all();
    }

    /// Waits for `time`, or until the machine is off.
    fn sleep(&self, control: &mut MutexGuard<'_, Control>, time: Duration) {
        let end = Instant::now() + time;
        while control.wanted != RunState::PoweredOff && !self.changed.wait_until(control, end).timed_out() {}
    }

    /// Starts the vCPU and timer threads, with the vCPUs paused. Call once.
    pub fn power_on(self: &Arc<Self>, hooks: Arc<dyn MachineHooks>) -> std::io::Result<()> {
        *self.hooks.lock() = Some(hooks);
        let mut threads = self.threads.lock();
        let timers = self.timers.clone();
        threads.push(std::thread::Builder::new().name("tm".into()).spawn(move || timers.run())?);
        for index in 0..self.vcpus.len() {
            self.context.links[index].raise(ForcedActions::EM);
            let em = self.clone();
            let body = move || em.vcpu_thread(index);
            threads.push(std::thread::Builder::new().name(format!("em-{index}")).spawn(body)?);
        }
        Ok(())
    }

    pub fn state(&self) -> RunState {
        self.control.lock().wanted
    }

    /// Lets the vCPUs run; no effect unless paused.
    pub fn resume(&self) {
        let mut control = self.control.lock();
        if control.wanted != RunState::Paused {
            return;
        }
        while control.busy {
            self.changed.wait(&mut control);
        }
        control.wanted = RunState::Running;
        self.context.clock.start();
        if let Some(stopped) = control.stopped.take() {
            let stood = stopped.elapsed().as_micros();
            tracing::info!(target: "tm", "virtual time goes on after it stood still for {stood} us");
        }
        self.timers.poke();
        self.changed.notify_all();
        drop(control);
        self.notify(RunState::Running, None);
    }

    /// Stops the vCPUs and virtual time; returns when they have stopped. No effect unless running.
    pub fn pause(&self) {
        let mut control = self.control.lock();
        if control.wanted != RunState::Running {
            return;
        }
        control.wanted = RunState::Paused;
        self.summon();
        while (control.parked < self.vcpus.len() || control.busy) && control.wanted == RunState::Paused {
            self.changed.wait(&mut control);
        }
        if control.wanted == RunState::Paused {
            self.context.clock.stop();
            control.stopped = Some(Instant::now());
            drop(control);
            self.notify(RunState::Paused, None);
        }
    }

    /// Resets the machine at once, whatever the guest does; a paused machine is reset and stays paused.
    pub fn reset(&self) {
        let mut control = self.control.lock();
        if control.wanted == RunState::PoweredOff {
            return;
        }
        control.reset = true;
        self.changed.notify_all();
        self.summon();
    }

    /// Ends the vCPU threads, without the guest's help.
    pub fn power_off(&self) {
        let mut control = self.control.lock();
        if control.wanted != RunState::PoweredOff {
            control.wanted = RunState::PoweredOff;
            self.changed.notify_all();
            self.summon();
        }
    }

    /// Waits until the machine is off and its threads have ended. Not to be called from a vCPU thread.
    pub fn wait_for_power_off(&self) {
        let mut control = self.control.lock();
        while control.ended < self.vcpus.len() {
            self.changed.wait(&mut control);
        }
        drop(control);
        self.context.clock.stop();
        self.timers.quit();
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
    }

    /// Has other engines go on with the guest where it is, made by `make` while all vCPUs are stopped; virtual time goes on. If that fails the
    /// old ones go on. Where an old one cannot give a vCPU's state the guest cannot go on anywhere: the machine is stuck then. Old and new
    /// engines may not both be the host's hypervisor's. Not to be called on a vCPU's thread.
    pub fn change_engines<E>(
        &self,
        make: impl FnOnce(&Arc<VmContext>, &Arc<TimerQueue>) -> Result<Vec<Box<dyn Engine>>, E>,
    ) -> Result<(), E> {
        let mut control = self.control.lock();
        while control.busy {
            self.changed.wait(&mut control);
        }
        control.busy = true;
        self.summon();
        while control.parked + control.ended < self.vcpus.len() {
            self.changed.wait(&mut control);
        }
        let mut failure = None;
        let result = MutexGuard::unlocked(&mut control, || {
            let mut vcpus: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.lock()).collect();
            for (index, Vcpu { state, engine }) in vcpus.iter_mut().map(|vcpu| &mut **vcpu).enumerate() {
                engine.complete(state);
                failure =
                    failure.take().or_else(|| engine.take_deferred().map(|exit| why(index, state, exit)));
                engine.state_changed(state);
            }
            let engines = make(&self.context, &self.timers)?;
            for (index, (vcpu, new)) in vcpus.iter_mut().zip(engines).enumerate() {
                let Vcpu { state, engine } = &mut **vcpu;
                let mut old = std::mem::replace(engine, new);
                if old.waits_itself() {
                    if let Some(apics) = self.context.irq.local_apics() {
                        apics.take_back();
                    }
                    // What has come to it meanwhile.
                    old.complete(state);
                    failure =
                        failure.take().or_else(|| old.take_deferred().map(|exit| why(index, state, exit)));
                }
                engine.state_changed(state);
            }
            Ok(())
        });
        // Before the vCPUs go on. A machine that is off, or stuck already, stays so.
        if let Some(why) = failure
            && matches!(control.wanted, RunState::Running | RunState::Paused)
        {
            tracing::error!(target: "em", "{why}");
            control.wanted = RunState::Stuck;
            control.why = Some(why);
        }
        control.busy = false;
        self.changed.notify_all();
        result
    }

    /// Looks at a stopped vCPU's state; `None` while it runs.
    pub fn with_state<R>(&self, vcpu: VcpuId, look: impl FnOnce(&mut CpuState) -> R) -> Option<R> {
        let mut vcpu = self.vcpus.get(vcpu.index())?.try_lock()?;
        let Vcpu { state, engine } = &mut *vcpu;
        engine.complete(state);
        let result = look(state);
        engine.state_changed(state);
        Some(result)
    }

    /// Sends a non-maskable interrupt to every vCPU.
    pub fn inject_nmi(&self) {
        for link in &self.context.links {
            link.raise(ForcedActions::NMI);
        }
    }

    /// Every vCPU's engine's counters, as of now: a vCPU that runs comes out of the guest for a moment.
    pub fn statistics(&self) -> Vec<Vec<(&'static str, u64)>> {
        (0..self.vcpus.len()).map(|index| self.visit(index).engine.statistics()).collect()
    }

    /// Looks at a vCPU's state between two stretches of guest code, whatever it does. `None`: there is no such vCPU.
    pub fn look_at<R>(&self, vcpu: VcpuId, look: impl FnOnce(&CpuState) -> R) -> Option<R> {
        (vcpu.index() < self.vcpus.len()).then(|| look(&self.visit(vcpu.index()).state))
    }

    /// Changes a vCPU's state between two stretches of guest code. `None`: there is no such vCPU.
    pub fn change_state<R>(&self, vcpu: VcpuId, change: impl FnOnce(&mut CpuState) -> R) -> Option<R> {
        (vcpu.index() < self.vcpus.len()).then(|| {
            let mut vcpu = self.visit(vcpu.index());
            let result = change(&mut vcpu.state);
            let Vcpu { state, engine } = &mut *vcpu;
            engine.state_changed(state);
            result
        })
    }

    /// The vCPU, when it is out of the guest.
    fn visit(&self, index: usize) -> MutexGuard<'_, Vcpu> {
        loop {
            // Its thread holds the lock while it runs the guest. It may take the lock again before we are awake.
            if let Some(vcpu) = self.vcpus[index].try_lock_for(VISIT_PATIENCE) {
                return vcpu;
            }
            self.context.links[index].raise(ForcedActions::EM);
        }
    }

    /// Has every vCPU call [`Em::meet`] soon.
    fn summon(&self) {
        for link in &self.context.links {
            link.raise(ForcedActions::EM);
        }
    }

    fn notify(&self, state: RunState, why: Option<&str>) {
        let hooks = self.hooks.lock().clone();
        if let Some(hooks) = hooks {
            hooks.state_changed(state, why);
        }
    }

    /// The guest cannot go on: stops everything and tells why.
    fn stuck(&self, why: String) {
        let mut control = self.control.lock();
        if control.wanted == RunState::Running {
            tracing::error!(target: "em", "{why}");
            control.wanted = RunState::Stuck;
            control.why = Some(why);
            self.summon();
        }
    }

    fn vcpu_thread(&self, index: usize) {
        let link = &*self.context.links[index];
        let mut resets = 0;
        loop {
            if link.pending().contains(ForcedActions::EM) && !self.meet(index, &mut resets) {
                break;
            }
            let mut vcpu = self.vcpus[index].lock();
            let Vcpu { state, engine } = &mut *vcpu;
            let signals = link.take(ForcedActions::INIT);
            if !signals.is_empty() {
                engine.complete(state);
                self.init(state);
                engine.state_changed(state);
            }
            // A kick ends HLT even with interrupts off: waiters for a spin lock sleep like that.
            if state.activity == Activity::Halted && link.take_kick() {
                state.activity = Activity::Running;
            }
            if link.pending().contains(ForcedActions::SIPI) {
                link.clear(ForcedActions::SIPI);
                if state.activity == Activity::WaitForSipi {
                    engine.complete(state);
                    start_up(state, link.sipi_vector());
                    engine.state_changed(state);
                    tracing::info!(target: "em", "vCPU {index} started at 0x{:x}", state.seg[1].base);
                }
            }
            let result = match trpm::next_event(state, link, &*self.context.irq) {
                Some(event) => engine.inject(state, event),
                None => Ok(()),
            };
            let exit = match result {
                Err(exit) => exit,
                Ok(()) if state.activity == Activity::Running => {
                    if let Some(gim) = &self.context.gim {
                        gim.about_to_run(VcpuId(state.id));
                    }
                    engine.run(state)
                }
                Ok(()) if engine.waits_itself() && state.activity != Activity::Shutdown => engine.run(state),
                Ok(()) => {
                    let mask = trpm::wake_mask(state);
                    drop(vcpu);
                    link.wait(mask, None);
                    continue;
                }
            };
            match exit {
                Exit::Halt | Exit::Attention => {}
                Exit::TripleFault if self.triple_fault_resets.load(Ordering::Relaxed) => {
                    tracing::info!(target: "em", "vCPU {index} met a triple fault: the machine is reset");
                    drop(vcpu);
                    self.reset();
                }
                exit => {
                    if matches!(exit, Exit::TripleFault) {
                        engine.complete(state);
                    }
                    let why = why(index, state, exit);
                    drop(vcpu);
                    self.stuck(why);
                }
            }
        }
        let mut control = self.control.lock();
        control.ended += 1;
        let last = control.ended == self.vcpus.len();
        drop(control);
        if last {
            self.notify(RunState::PoweredOff, None);
        }
        // Waiters must find the state told before they go on.
        let _control = self.control.lock();
        self.changed.notify_all();
    }

    /// Stops here until the machine runs again; false when it is off. The last vCPU to arrive does what the meeting is for.
    fn meet(&self, index: usize, resets: &mut u64) -> bool {
        let link = &self.context.links[index];
        let mut control = self.control.lock();
        link.clear(ForcedActions::EM);
        control.parked += 1;
        self.changed.notify_all();
        loop {
            if control.wanted == RunState::PoweredOff {
                control.parked -= 1;
                return false;
            }
            if control.busy {
                self.changed.wait(&mut control);
                continue;
            }
            if control.parked == self.vcpus.len() {
                if control.reset {
                    self.do_reset(&mut control);
                    continue;
                }
                if let Some(why) = control.why.take() {
                    self.context.clock.stop();
                    MutexGuard::unlocked(&mut control, || self.notify(RunState::Stuck, Some(&why)));
                    continue;
                }
            }
            if control.wanted == RunState::Running && !control.reset && !control.resting {
                break;
            }
            self.changed.wait(&mut control);
        }
        control.parked -= 1;
        if *resets != control.resets {
            *resets = control.resets;
            let mut vcpu = self.vcpus[index].lock();
            let Vcpu { state, engine } = &mut *vcpu;
            *state = self.first_state(index);
            engine.state_changed(state);
        }
        true
    }

    fn do_reset(&self, control: &mut MutexGuard<'_, Control>) {
        control.busy = true;
        MutexGuard::unlocked(control, || {
            for link in &self.context.links {
                link.clear(
                    ForcedActions::INTERRUPT
                        .union(ForcedActions::NMI)
                        .union(ForcedActions::INIT)
                        .union(ForcedActions::SIPI),
                );
            }
            let hooks = self.hooks.lock().clone();
            if let Some(hooks) = hooks {
                hooks.reset_devices();
            }
            self.context.pgm.set_a20(true);
            self.context.pgm.shoot_down_all();
            tracing::info!(target: "em", "the machine was reset");
        });
        control.busy = false;
        control.reset = false;
        control.resets += 1;
        if control.wanted == RunState::Stuck {
            control.wanted = RunState::Running;
            self.context.clock.start();
            self.timers.poke();
        }
        self.changed.notify_all();
    }

    /// INIT (Intel SDM volume 3, table 9-1): like reset, but the caches, the x87/SSE state and most MSRs stay.
    fn init(&self, state: &mut CpuState) {
        let old = state.clone();
        *state = CpuState::reset(old.id);
        state.xsave = old.xsave;
        state.msr.apic_base = old.msr.apic_base;
        state.msr.mtrr_def_type = old.msr.mtrr_def_type;
        state.msr.mtrr_fixed = old.msr.mtrr_fixed;
        state.msr.mtrr_variable = old.msr.mtrr_variable;
        state.msr.tsc_offset = old.msr.tsc_offset;
        state.msr.tsc_adjust = old.msr.tsc_adjust;
        state.msr.pat = old.msr.pat;
        if old.msr.apic_base & 0x100 == 0 {
            state.activity = Activity::WaitForSipi;
        }
        self.context.irq.init_reset(VcpuId(old.id));
    }
}

/// Why the guest cannot go on after such an exit.
fn why(index: usize, state: &CpuState, exit: Exit) -> String {
    match exit {
        Exit::Fatal(why) => format!("vCPU {index}: {why}"),
        _ => {
            let cs = state.seg[cpum::state::seg::CS].selector;
            format!("vCPU {index} met a triple fault at CS 0x{cs:04x} RIP 0x{:x}", state.rip)
        }
    }
}

/// Start-up IPI: real mode at page `vector` (Intel SDM volume 3, 8.4.4).
fn start_up(state: &mut CpuState, vector: u8) {
    let cs = &mut state.seg[cpum::state::seg::CS];
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    state.rip = 0;
    state.activity = Activity::Running;
}

impl SystemControl for Em {
    fn request(&self, request: SystemRequest) {
        tracing::info!(target: "em", "the guest asks for {request:?}");
        match request {
            SystemRequest::Reset => self.reset(),
            SystemRequest::PowerOff => self.power_off(),
            SystemRequest::Suspend => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use cpum::{CpuidTable, VcpuLink};
    use pdm::{InterruptController, Iom};
    use pgm::Pgm;
    use tm::Clock;
    use vbox_types::Hz;

    use super::*;
    use crate::engine::Event;

    struct NoInterrupts;
    impl InterruptController for NoInterrupts {
        fn is_pending(&self, _: VcpuId) -> bool {
            false
        }
        fn acknowledge(&self, _: VcpuId) -> Option<u8> {
            None
        }
        fn read_cr8(&self, _: VcpuId) -> u64 {
            0
        }
        fn write_cr8(&self, _: VcpuId, _: u64) {}
        fn set_apic_base(&self, _: VcpuId, _: u64) -> bool {
            true
        }
        fn read_msr(&self, _: VcpuId, _: u32) -> Option<u64> {
            None
        }
        fn write_msr(&self, _: VcpuId, _: u32, _: u64) -> bool {
            false
        }
        fn init_reset(&self, _: VcpuId) {}
        fn local_apics(&self) -> Option<&dyn pdm::LocalApics> {
            None
        }
    }

    /// Spins like a guest loop; stops on request.
    struct Spin {
        link: Arc<VcpuLink>,
        rounds: Arc<AtomicU64>,
        fail_at: u64,
    }

    /// As above, but its state cannot be had.
    struct Lost(Spin);
    impl Engine for Lost {
        fn name(&self) -> &'static str {
            "lost"
        }
        fn run(&mut self, cpu: &mut CpuState) -> Exit {
            self.0.run(cpu)
        }
        fn inject(&mut self, _: &mut CpuState, _: Event) -> Result<(), Exit> {
            Ok(())
        }
        fn state_changed(&mut self, _: &CpuState) {}
        fn take_deferred(&mut self) -> Option<Exit> {
            Some(Exit::Fatal("no state".into()))
        }
        fn statistics(&self) -> Vec<(&'static str, u64)> {
            Vec::new()
        }
    }
    impl Engine for Spin {
        fn name(&self) -> &'static str {
            "spin"
        }
        fn run(&mut self, cpu: &mut CpuState) -> Exit {
            while self.link.pending().is_empty() {
                cpu.gpr[0] += 1;
                if self.rounds.fetch_add(1, Ordering::SeqCst) + 1 == self.fail_at {
                    return Exit::TripleFault;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            Exit::Attention
        }
        fn inject(&mut self, _: &mut CpuState, _: Event) -> Result<(), Exit> {
            Ok(())
        }
        fn state_changed(&mut self, _: &CpuState) {}
        fn statistics(&self) -> Vec<(&'static str, u64)> {
            vec![("rounds", self.rounds.load(Ordering::SeqCst))]
        }
    }

    #[derive(Default)]
    struct Hooks {
        resets: AtomicU64,
        states: Mutex<Vec<RunState>>,
        why: Mutex<Option<String>>,
    }
    impl MachineHooks for Hooks {
        fn reset_devices(&self) {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }
        fn state_changed(&self, state: RunState, why: Option<&str>) {
            if let Some(why) = why {
                *self.why.lock() = Some(why.to_owned());
            }
            self.states.lock().push(state);
        }
    }

    fn vm(cpus: usize, fail_at: u64) -> (Arc<Em>, Arc<Hooks>, Arc<AtomicU64>) {
        let links: Vec<_> = (0..cpus).map(|_| Arc::new(VcpuLink::default())).collect();
        let clock = Clock::new();
        let rounds = Arc::new(AtomicU64::new(0));
        let engines = links
            .iter()
            .map(|link| {
                Box::new(Spin { link: link.clone(), rounds: rounds.clone(), fail_at }) as Box<dyn Engine>
            })
            .collect();
        let context = Arc::new(VmContext {
            pgm: Pgm::new(links.clone()),
            iom: Iom::new(),
            irq: Arc::new(NoInterrupts),
            clock: clock.clone(),
            tsc_frequency: Hz(1_000_000_000),
            links,
            cpuid: CpuidTable::default(),
            gim: None,
        });
        let em = Em::new(context, engines, TimerQueue::new(clock));
        let hooks = Arc::new(Hooks::default());
        em.power_on(hooks.clone()).unwrap();
        (em, hooks, rounds)
    }

    fn wait_for(what: impl Fn() -> bool) {
        for _ in 0..20_000 {
            if what() {
                return;
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        panic!("the expected state was not reached");
    }

    #[test]
    fn a_paused_machine_stands_still_and_goes_on() {
        let (em, hooks, rounds) = vm(2, u64::MAX);
        em.resume();
        wait_for(|| rounds.load(Ordering::SeqCst) > 2);
        em.pause();
        let (then, time) = (rounds.load(Ordering::SeqCst), em.context.clock.now());
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!((rounds.load(Ordering::SeqCst), em.context.clock.now()), (then, time));
        em.resume();
        wait_for(|| rounds.load(Ordering::SeqCst) > then);
        em.power_off();
        em.wait_for_power_off();
        use RunState as S;
        assert_eq!(*hooks.states.lock(), [S::Running, S::Paused, S::Running, S::PoweredOff]);
    }

    #[test]
    fn counters_and_state_of_a_running_vcpu_can_be_read() {
        let (em, _, rounds) = vm(2, u64::MAX);
        em.resume();
        wait_for(|| rounds.load(Ordering::SeqCst) > 2);
        let statistics = em.statistics();
        assert_eq!(statistics.len(), 2);
        assert!(statistics[0][0].1 > 2);
        assert!(em.look_at(VcpuId(0), |s| s.gpr[0]).unwrap() > 0);
        em.change_state(VcpuId(0), |s| s.gpr[0] = 1 << 40).unwrap();
        assert!(em.look_at(VcpuId(0), |s| s.gpr[0]).unwrap() >= 1 << 40);
        assert!(em.look_at(VcpuId(2), |_| ()).is_none());
        assert_eq!(em.state(), RunState::Running);
        em.power_off();
        em.wait_for_power_off();
    }

    #[test]
    fn other_engines_go_on_where_the_first_stopped_and_stay_if_there_are_none() {
        let (em, hooks, rounds) = vm(2, u64::MAX);
        em.resume();
        wait_for(|| rounds.load(Ordering::SeqCst) > 2);
        assert_eq!(em.change_engines(|_, _| Err("none")), Err("none"));
        let then = rounds.load(Ordering::SeqCst);
        wait_for(|| rounds.load(Ordering::SeqCst) > then + 2);
        let later = Arc::new(AtomicU64::new(0));
        let mut before = 0;
        em.change_engines(|context, _| {
            before = rounds.load(Ordering::SeqCst);
            let engine = |link: &Arc<VcpuLink>| {
                Box::new(Spin { link: link.clone(), rounds: later.clone(), fail_at: u64::MAX })
                    as Box<dyn Engine>
            };
            Ok::<_, ()>(context.links.iter().map(engine).collect())
        })
        .unwrap();
        wait_for(|| later.load(Ordering::SeqCst) > 2);
        assert_eq!(rounds.load(Ordering::SeqCst), before, "the first engines run no more");
        let counted: u64 = (0..2).map(|id| em.look_at(VcpuId(id), |s| s.gpr[0]).unwrap()).sum();
        assert!(counted > before, "the state went along");
        em.pause();
        em.change_engines(|context, _| {
            let engine = |link: &Arc<VcpuLink>| {
                Box::new(Spin { link: link.clone(), rounds: rounds.clone(), fail_at: u64::MAX })
                    as Box<dyn Engine>
            };
            Ok::<_, ()>(context.links.iter().map(engine).collect())
        })
        .unwrap();
        assert_eq!(em.state(), RunState::Paused);
        em.power_off();
        em.wait_for_power_off();
        use RunState as S;
        assert_eq!(*hooks.states.lock(), [S::Running, S::Paused, S::PoweredOff]);
    }

    #[test]
    fn a_vcpu_whose_state_an_engine_does_not_give_up_ends_the_machine_with_its_reason_in_any_state() {
        for paused in [false, true] {
            let (em, hooks, rounds) = vm(2, u64::MAX);
            em.resume();
            let spin =
                |link: &Arc<VcpuLink>| Spin { link: link.clone(), rounds: rounds.clone(), fail_at: u64::MAX };
            em.change_engines(|context, _| {
                Ok::<_, ()>(
                    context.links.iter().map(|link| Box::new(Lost(spin(link))) as Box<dyn Engine>).collect(),
                )
            })
            .unwrap();
            if paused {
                em.pause();
            }
            em.change_engines(|context, _| {
                Ok::<_, ()>(
                    context.links.iter().map(|link| Box::new(spin(link)) as Box<dyn Engine>).collect(),
                )
            })
            .unwrap();
            wait_for(|| hooks.states.lock().contains(&RunState::Stuck));
            assert_eq!(em.state(), RunState::Stuck);
            assert_eq!(hooks.why.lock().as_deref(), Some("vCPU 0: no state"));
            em.power_off();
            em.wait_for_power_off();
        }
    }

    #[test]
    fn a_reset_restarts_every_vcpu_once() {
        let (em, hooks, rounds) = vm(2, u64::MAX);
        em.resume();
        wait_for(|| rounds.load(Ordering::SeqCst) > 2);
        em.request(SystemRequest::Reset);
        wait_for(|| hooks.resets.load(Ordering::SeqCst) == 1);
        em.pause();
        let started: Vec<_> = (0..2).map(|id| em.with_state(VcpuId(id), |s| s.activity).unwrap()).collect();
        assert_eq!(started, [Activity::Running, Activity::WaitForSipi]);
        assert_eq!(hooks.resets.load(Ordering::SeqCst), 1);
        em.power_off();
        em.wait_for_power_off();
    }

    #[test]
    fn a_vcpu_that_is_not_there_has_its_apic_off_also_after_a_reset_and_comes_back_as_after_one() {
        let (em, hooks, rounds) = vm(2, u64::MAX);
        let second = VcpuId(1);
        let (off, on) = (0xfee0_0000, 0xfee0_0800);
        em.set_present(second, false);
        em.set_present(VcpuId(0), false);
        assert_eq!(
            (em.is_present(VcpuId(0)), em.is_present(second), em.is_present(VcpuId(2))),
            (true, false, false)
        );
        em.resume();
        wait_for(|| rounds.load(Ordering::SeqCst) > 2);
        let look = || em.look_at(second, |s| (s.msr.apic_base, s.activity)).unwrap();
        assert_eq!(look(), (off, Activity::WaitForSipi));
        em.reset();
        wait_for(|| hooks.resets.load(Ordering::SeqCst) == 1 && em.control.lock().parked == 0);
        assert_eq!(look(), (off, Activity::WaitForSipi));
        em.change_state(second, |s| s.gpr[3] = 5).unwrap();
        em.set_present(second, true);
        assert_eq!(look(), (on, Activity::WaitForSipi));
        assert_eq!(em.look_at(second, |s| s.gpr[3]), Some(0));
        em.power_off();
        em.wait_for_power_off();
    }

    #[test]
    fn a_capped_machine_runs_pauses_and_powers_off() {
        let (em, hooks, rounds) = vm(2, u64::MAX);
        em.set_execution_cap(10).unwrap();
        em.resume();
        wait_for(|| em.control.lock().resting && em.control.lock().parked == 2);
        let then = rounds.load(Ordering::SeqCst);
        wait_for(|| rounds.load(Ordering::SeqCst) > then + 2);
        em.pause();
        em.resume();
        em.set_execution_cap(100).unwrap();
        wait_for(|| !em.control.lock().capped);
        let then = rounds.load(Ordering::SeqCst);
        wait_for(|| rounds.load(Ordering::SeqCst) > then + 2);
        em.set_execution_cap(50).unwrap();
        em.power_off();
        em.wait_for_power_off();
        assert_eq!(hooks.states.lock().last(), Some(&RunState::PoweredOff));
    }

    #[test]
    fn a_triple_fault_stops_the_machine_and_says_where() {
        let (em, hooks, _) = vm(1, 3);
        em.resume();
        wait_for(|| hooks.states.lock().contains(&RunState::Stuck));
        assert_eq!(em.state(), RunState::Stuck);
        em.power_off();
        em.wait_for_power_off();
    }
}
