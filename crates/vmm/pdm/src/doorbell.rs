//! Doorbells: registers whose writes do nothing but have a device look at its queues.
//!
//! A write to one is an ordinary access, which the device's shell takes on the vCPU's thread. A host's hypervisor can take it instead, without
//! an exit, and have another thread tell the device ([`Watcher`]). The guest then goes on before the device has looked, so that only registers
//! qualify whose value (beyond which queue it names) does not matter, and whose effects the guest learns by the queue itself. Virtio's are such:
//! they may be late, come twice, or come after a reset, where the device is not active and ignores them.
//!
//! Some registers are such at times only: those that a guest has agreed with the device to keep in memory, too. They have a [`Gate`].
//!
//! [`crate::pci::PciBus`] puts a function's doorbells up and takes them down as it maps their BARs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use vbox_types::{GuestPhys, Port};

/// A device with doorbells.
pub trait BellDevice: Send {
    /// The doorbell with this number was rung, once or more often. Called on a thread of the watcher's.
    fn rung(&mut self, number: u16);
}

/// Object form of [`BellDevice`].
pub trait Bell: Send + Sync {
    fn rung(&self, number: u16);
}

impl<D: BellDevice> Bell for Mutex<D> {
    fn rung(&self, number: u16) {
        self.lock().rung(number);
    }
}

/// Where a doorbell is, and what rings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Writing this word to the port.
    Port(Port, u16),
    /// Writing anything to registers at this address.
    Memory(GuestPhys),
}

/// Whether registers are doorbells now: the device's switch ([`Doorbells::set_gate`]). Shut at first.
#[derive(Default)]
pub struct Gate(AtomicBool);

/// One doorbell.
#[derive(Clone)]
pub struct Doorbell {
    pub place: Place,
    /// Which of its doorbells it is to the device.
    pub number: u16,
    pub device: Weak<dyn Bell>,
    /// `None` if it always is one.
    pub gate: Option<Arc<Gate>>,
}

impl Doorbell {
    fn is_open(&self) -> bool {
        self.gate.as_ref().is_none_or(|gate| gate.0.load(Ordering::Relaxed))
    }
}

/// Names a doorbell that is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BellId(pub u64);

/// Who takes the writes to doorbells. Its methods are called with the registry locked and may not call back into it; devices may be locked.
pub trait Watcher: Send + Sync {
    /// From here on the watcher may take writes at the doorbell's place. What it does not take goes the ordinary way.
    fn put_up(&self, id: BellId, doorbell: &Doorbell);
    /// The watcher takes no more writes there; what it has taken still reaches the device.
    fn take_down(&self, id: BellId);
}

#[derive(Default)]
struct Inner {
    next: u64,
    up: BTreeMap<BellId, Doorbell>,
    watcher: Option<Weak<dyn Watcher>>,
}

impl Inner {
    fn watcher(&self) -> Option<Arc<dyn Watcher>> {
        self.watcher.as_ref().and_then(Weak::upgrade)
    }
}

/// The doorbells of one VM that are up.
#[derive(Default)]
pub struct Doorbells {
    inner: Mutex<Inner>,
}

impl Doorbells {
    pub fn put_up(&self, doorbell: Doorbell) -> BellId {
        let mut inner = self.inner.lock();
        let id = BellId(inner.next);
        inner.next += 1;
        if doorbell.is_open()
            && let Some(watcher) = inner.watcher()
        {
            watcher.put_up(id, &doorbell);
        }
        inner.up.insert(id, doorbell);
        id
    }

    pub fn take_down(&self, id: BellId) {
        let mut inner = self.inner.lock();
        if inner.up.remove(&id).is_some_and(|doorbell| doorbell.is_open())
            && let Some(watcher) = inner.watcher()
        {
            watcher.take_down(id);
        }
    }

    /// Has a watcher take the writes for as long as it lives, instead of the one before.
    pub fn watch(&self, watcher: &Arc<dyn Watcher>) {
        let mut inner = self.inner.lock();
        inner.watcher = Some(Arc::downgrade(watcher));
        for (id, doorbell) in inner.up.iter().filter(|(_, doorbell)| doorbell.is_open()) {
            watcher.put_up(*id, doorbell);
        }
    }

    /// From here on the doorbells with this gate are such, or are not. The device may be locked.
    pub fn set_gate(&self, gate: &Arc<Gate>, open: bool) {
        let inner = self.inner.lock();
        if gate.0.swap(open, Ordering::Relaxed) == open {
            return;
        }
        let Some(watcher) = inner.watcher() else { return };
        let behind = |doorbell: &Doorbell| doorbell.gate.as_ref().is_some_and(|own| Arc::ptr_eq(own, gate));
        for (id, doorbell) in inner.up.iter().filter(|(_, doorbell)| behind(doorbell)) {
            if open {
                watcher.put_up(*id, doorbell);
            } else {
                watcher.take_down(*id);
            }
        }
    }
}
