//! The word through which the rest of the VM reaches a vCPU (VirtualBox: forced actions, `VMCPU_FF_*`), and
//! the sleep of a halted vCPU.
//!
//! Any thread may raise actions at any time. The engine polls [`VcpuLink::pending`] at block boundaries and
//! acts on what is its own (TLB flush) or returns to EM. A halted vCPU sleeps in [`VcpuLink::wait`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, RwLock};

/// A set of actions, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForcedActions(pub u32);

impl ForcedActions {
    /// The interrupt controller may have an interrupt; ask it with `acknowledge`. Level: stays set until the
    /// controller says that nothing is left.
    pub const INTERRUPT: Self = Self(1 << 0);
    /// A non-maskable interrupt is pending.
    pub const NMI: Self = Self(1 << 1);
    /// INIT was received.
    pub const INIT: Self = Self(1 << 2);
    /// A start-up IPI was received; its vector is in [`VcpuLink::sipi_vector`].
    pub const SIPI: Self = Self(1 << 3);
    /// Drop all cached translations before the next guest memory access.
    pub const TLB_FLUSH: Self = Self(1 << 4);
    /// EM wants the vCPU thread: pause, reset, power-off, state access.
    pub const EM: Self = Self(1 << 5);
    /// A20, the memory map or CPUID changed.
    pub const REMAP: Self = Self(1 << 6);

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The side of a vCPU that other threads see. Shared by reference counting.
#[derive(Default)]
pub struct VcpuLink {
    actions: AtomicU32,
    /// Set with every action raised; see [`VcpuLink::kick_word`].
    kick: AtomicU32,
    sipi_vector: AtomicU8,
    /// Another vCPU asked that HLT end; see [`VcpuLink::kick`].
    kicked: AtomicBool,
    /// Whether the engine may hold translations in use; see `pgm::Pgm::shoot_down`.
    in_guest: AtomicBool,
    /// The shoot-down epoch whose flush the engine has carried out.
    flushed_epoch: AtomicU64,
    /// Fetches the vCPU's thread out of guest code that polls nothing; see [`VcpuLink::set_notifier`].
    notifier: RwLock<Option<Box<dyn Fn() + Send + Sync>>>,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl VcpuLink {
    /// Raises actions and wakes the vCPU if it sleeps.
    pub fn raise(&self, actions: ForcedActions) {
        let before = self.actions.fetch_or(actions.0, Ordering::SeqCst);
        self.kick.store(1, Ordering::SeqCst);
        if before & actions.0 != actions.0 {
            if let Some(notify) = &*self.notifier.read() {
                notify();
            }
            let _guard = self.sleep.lock();
            self.wake.notify_all();
        }
    }

    /// Has `notify` called, on any thread, after an action was raised: for an engine whose guest code does not look at
    /// [`VcpuLink::pending`].
    pub fn set_notifier(&self, notify: Box<dyn Fn() + Send + Sync>) {
        *self.notifier.write() = Some(notify);
    }

    /// The engine that asked to be notified runs the vCPU no more.
    pub fn clear_notifier(&self) {
        *self.notifier.write() = None;
    }

    /// Takes actions back. Whoever clears [`ForcedActions::INTERRUPT`] must re-check the controller afterwards.
    pub fn clear(&self, actions: ForcedActions) {
        self.actions.fetch_and(!actions.0, Ordering::SeqCst);
    }

    /// Clears `actions` and tells which of them were raised.
    pub fn take(&self, actions: ForcedActions) -> ForcedActions {
        ForcedActions(self.actions.fetch_and(!actions.0, Ordering::SeqCst) & actions.0)
    }

    /// What is raised now: one load, for the engine's poll.
    #[inline]
    pub fn pending(&self) -> ForcedActions {
        ForcedActions(self.actions.load(Ordering::Acquire))
    }

    /// All that is raised, for generated code that looks whether anything is before it lets interrupts in.
    pub fn actions_word(&self) -> &AtomicU32 {
        &self.actions
    }

    /// A word that is not zero if actions were raised since [`VcpuLink::clear_kick`], for generated code that polls it. Unlike the
    /// actions, which stay until they are served, it tells only what is new.
    pub fn kick_word(&self) -> &AtomicU32 {
        &self.kick
    }

    /// Clears the word; [`VcpuLink::pending`] must be looked at after this.
    #[inline]
    pub fn clear_kick(&self) {
        self.kick.store(0, Ordering::SeqCst);
    }

    /// Delivers a start-up IPI.
    pub fn raise_sipi(&self, vector: u8) {
        self.sipi_vector.store(vector, Ordering::Release);
        self.raise(ForcedActions::SIPI);
    }

    pub fn sipi_vector(&self) -> u8 {
        self.sipi_vector.load(Ordering::Acquire)
    }

    /// Ends the vCPU's HLT, or the next one if it is not halted, whatever its interrupt flag says: paravirtual spin locks.
    pub fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        // EM looks at kicks when its thread comes by.
        self.raise(ForcedActions::EM);
    }

    /// Takes a kick, if there was one.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until one of `mask` is raised or `timeout` has passed.
    pub fn wait(&self, mask: ForcedActions, timeout: Option<Duration>) {
        let mut guard = self.sleep.lock();
        while !self.pending().intersects(mask) {
            match timeout {
                None => self.wake.wait(&mut guard),
                Some(timeout) => {
                    self.wake.wait_for(&mut guard, timeout);
                    return;
                }
            }
        }
    }

    /// Says that the engine is about to run guest code and use cached translations. The engine must look at
    /// [`VcpuLink::pending`] after this and before the first access.
    pub fn enter_guest(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    /// Says that the engine uses no cached translation until the next [`VcpuLink::enter_guest`].
    pub fn leave_guest(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    pub fn is_in_guest(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst)
    }

    /// Says that every translation older than `epoch` is gone.
    pub fn acknowledge_flush(&self, epoch: u64) {
        self.flushed_epoch.store(epoch, Ordering::SeqCst);
    }

    pub fn flushed_epoch(&self) -> u64 {
        self.flushed_epoch.load(Ordering::SeqCst)
    }
}
