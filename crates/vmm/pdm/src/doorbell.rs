//! Doorbells: registers whose writes do nothing but have a device look at its queues.
//!
//! A write to one is an ordinary access, which the device's shell takes on the vCPU's thread. A host's hypervisor can take it instead, without
//! an exit, and have another thread tell the device ([`Watcher`]). The guest then goes on before the device has looked, so that only registers
//! qualify whose value (beyond which queue it names) does not matter, and whose effects the guest learns by the queue itself. Virtio's are such:
//! they may be late, come twice, or come after a reset, where the device is not active and ignores them.
//!
//! [`crate::pci::PciBus`] puts a function's doorbells up and takes them down as it maps their BARs.

use std::collections::BTreeMap;
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

/// One doorbell.
#[derive(Clone)]
pub struct Doorbell {
    pub place: Place,
    /// Which of its doorbells it is to the device.
    pub number: u16,
    pub device: Weak<dyn Bell>,
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
        if let Some(watcher) = inner.watcher.as_ref().and_then(Weak::upgrade) {
            watcher.put_up(id, &doorbell);
        }
        inner.up.insert(id, doorbell);
        id
    }

    pub fn take_down(&self, id: BellId) {
        let mut inner = self.inner.lock();
        if inner.up.remove(&id).is_some()
            && let Some(watcher) = inner.watcher.as_ref().and_then(Weak::upgrade)
        {
            watcher.take_down(id);
        }
    }

    /// Has a watcher take the writes for as long as it lives, instead of the one before.
    pub fn watch(&self, watcher: &Arc<dyn Watcher>) {
        let mut inner = self.inner.lock();
        inner.watcher = Some(Arc::downgrade(watcher));
        for (id, doorbell) in &inner.up {
            watcher.put_up(*id, doorbell);
        }
    }
}
