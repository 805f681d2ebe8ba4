//! Local APICs of the host's hypervisor in the place of ours.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use pdm::{ApicRegisters, LocalApics, RemoteApics};
use vbox_types::VcpuId;

use crate::local::{Destination, Message};
use crate::spec::DeliveryMode;
use crate::{Apic, ioapic};

/// Where message-signalled interrupts are written.
const MESSAGES: u64 = 0xfee0_0000;
/// Bits of a message's address and data.
const LOGICAL: u64 = 1 << 2;
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;

/// A message in the form of a device's write: address and data. Messages without an address are told to one after the other.
pub(crate) fn encode(message: Message) -> (u64, u32) {
    let Message { mode, vector, level, destination } = message;
    let address = match destination {
        Destination::Address { id, logical, wide: _ } => {
            MESSAGES | u64::from(id & 0xff) << 12 | if logical { LOGICAL } else { 0 }
        }
        Destination::Me | Destination::All | Destination::Others => MESSAGES | 0xff << 12,
    };
    let trigger = if level { LEVEL | ASSERT } else { 0 };
    (address, u32::from(vector) | u32::from(mode.into_bits()) << 8 | trigger)
}

/// The APICs that stand in, and what they know of the I/O APIC.
pub(crate) struct Stand {
    apics: Arc<dyn RemoteApics>,
    routes: Mutex<Vec<(u64, u32)>>,
    early: Mutex<Option<Early>>,
}

/// What has come before all APICs that stand in had started from ours: they would not take it.
struct Early {
    /// vCPUs whose APICs have yet to start.
    waits_for: Vec<VcpuId>,
    messages: Vec<(u64, u32)>,
}

impl Stand {
    fn new(apics: Arc<dyn RemoteApics>, vcpus: usize) -> Self {
        let waits_for = (0..vcpus as u32).map(VcpuId).collect();
        let early = Mutex::new(Some(Early { waits_for, messages: Vec::new() }));
        Self { apics, routes: Mutex::default(), early }
    }

    pub(crate) fn send(&self, message: Message) -> bool {
        if matches!(message.mode, DeliveryMode::Smi | DeliveryMode::Reserved) {
            return false;
        }
        let (address, data) = encode(message);
        let mut early = self.early.lock();
        if let Some(early) = &mut *early {
            early.messages.push((address, data));
            return true;
        }
        drop(early);
        self.apics.send(address, data)
    }

    fn started(&self, vcpu: VcpuId) {
        let mut early = self.early.lock();
        let Some(waiting) = &mut *early else { return };
        waiting.waits_for.retain(|&other| other != vcpu);
        if waiting.waits_for.is_empty() {
            for (address, data) in waiting.messages.drain(..) {
                self.apics.send(address, data);
            }
            *early = None;
        }
    }
}

impl Apic {
    /// Who stands in for the local APICs.
    pub(crate) fn stand(&self) -> Option<Arc<Stand>> {
        self.remote.read().clone()
    }

    /// Requests and timers are seen to here, or not any more.
    fn sync_all(&self) {
        for local in &self.locals {
            let state = local.state.lock();
            self.sync(local, &state);
            self.arm(local, &state);
        }
    }

    /// Tells the remote APICs where the I/O APIC's inputs lead, if that has changed. Masks do not matter to them.
    pub(crate) fn tell_routes(&self, io: &ioapic::State) {
        let Some(stand) = self.stand() else { return };
        let routes: Vec<_> = io.messages().map(encode).collect();
        let mut known = stand.routes.lock();
        if *known != routes {
            stand.apics.set_routes(&routes);
            *known = routes;
        }
    }
}

impl LocalApics for Apic {
    fn lend(&self, remote: Arc<dyn RemoteApics>) {
        *self.remote.write() = Some(Arc::new(Stand::new(remote, self.locals.len())));
        self.tell_routes(&self.io.lock());
        self.sync_all();
    }

    fn take_back(&self) {
        *self.remote.write() = None;
        self.sync_all();
    }

    fn accept(&self, vcpu: VcpuId, vector: u8, level: bool) {
        if let Some(local) = self.locals.get(vcpu.index()) {
            let mut state = local.state.lock();
            state.accept(vector, level);
            self.sync(local, &state);
        }
    }

    fn export(&self, vcpu: VcpuId) -> (ApicRegisters, bool) {
        let Some(local) = self.locals.get(vcpu.index()) else {
            return (ApicRegisters { base: 0, deadline: 0, page: [0; ApicRegisters::PAGE] }, true);
        };
        let mut state = local.state.lock();
        let now = self.clock.now();
        state.timer_fired(now);
        let registers =
            ApicRegisters { base: state.base, deadline: state.tsc_deadline, page: state.export(now) };
        (registers, local.replaced.load(Ordering::SeqCst))
    }

    fn exported(&self, vcpu: VcpuId) {
        if let Some(local) = self.locals.get(vcpu.index()) {
            local.replaced.store(false, Ordering::SeqCst);
        }
        if let Some(stand) = self.stand() {
            stand.started(vcpu);
        }
    }

    fn import(&self, vcpu: VcpuId, registers: &ApicRegisters) {
        let Some(local) = self.locals.get(vcpu.index()) else { return };
        let ApicRegisters { base, deadline, page } = registers;
        let mut state = local.state.lock();
        let before = state.mmio_base();
        let expires = tm::deadline(*deadline, self.config.tsc_frequency.0);
        state.import(*base, page, (*deadline, expires), self.clock.now());
        self.sync(local, &state);
        if state.mmio_base() != before {
            drop(state);
            self.remap();
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.end_in_io_apic(vector);
    }
}
