//! The NVMe controller as VirtualBox has it (80ee:4e56): NVM Express 1.2 with a namespace for each port, 16 pairs of I/O queues,
//! interrupts by INTA# or MSI-X. Source: NVM Express 1.2.
//!
//! Registers and doorbells are behind BAR 0, the MSI-X table behind BAR 4. Of the optional commands there are dataset management
//! (deallocate) and write zeroes, and, unlike VirtualBox's, the doorbell buffers of NVM Express 1.3 (section 5.7): a guest that uses them
//! keeps its doorbells in memory and rings them only while the controller has nothing to do, and the register's value does not matter, so
//! that a host's hypervisor can take the write ([`pdm::doorbell`]).
//!
//! **Left out.** Firmware update, formatting, namespace management, reservations, metadata, fused commands, scatter-gather lists, the
//! controller memory buffer, plain MSI: the capabilities do not show them. Commands that are with a medium are not aborted.
//!
//! **Asynchrony.** Commands run side by side and complete when their medium has answered. A controller reset drops commands under way;
//! the controller becomes ready again when the media have answered them, so that an abandoned write cannot overtake a later one.
//!
//! **Saved state.** Saving requires that all requests have completed (the machine stops the vCPUs and drains its media first).

mod controller;
mod identify;
mod prp;
mod saved;
mod spec;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{BlockDriver, BlockError};
use pdm::doorbell::{Bell, BellDevice, Doorbells, Gate};
use pdm::iom::mmio_handler;
use pdm::irq::IrqLine;
use pdm::msix::MsiX;
use pdm::pci::{self, Bar, BarBell, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, MmioDevice, Width};
use pgm::{Backing, Pgm};

use controller::{Ask, Controller, Out, Shape};
use spec::{BAR_SIZE, DOORBELLS, IO_QUEUES, SECTOR};

const VENDOR: u16 = 0x80ee;
const DEVICE: u16 = 0x4e56;
/// Most namespaces, as VirtualBox has ports.
pub const MAX_PORTS: usize = 255;
const MSIX_CAPABILITY: u8 = 0x80;
const MSIX_BAR: usize = 4;

/// A port's disk.
pub struct Disk {
    pub medium: Arc<dyn BlockDriver>,
    /// Tells namespaces apart.
    pub uuid: [u8; 16],
    /// Hand deallocated ranges to the medium.
    pub discard: bool,
}

/// What the controller is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    /// INTA# of the controller's slot.
    pub irq: IrqLine,
}

/// One NVMe controller.
pub struct Nvme {
    wiring: Wiring,
    msix: Arc<MsiX>,
    me: Weak<Mutex<Self>>,
    /// By port.
    media: Vec<Option<Arc<dyn BlockDriver>>>,
    core: Controller,
    intx_disabled: bool,
    /// Where the doorbells of the I/O queues are put up, and whether they are such now.
    doorbells: Option<Arc<Doorbells>>,
    gate: Arc<Gate>,
}

impl Nvme {
    /// Builds a controller with its ports.
    ///
    /// # Panics
    /// Unless there are 1 to 255 ports.
    pub fn new(wiring: Wiring, disks: Vec<Option<Disk>>) -> Arc<Mutex<Self>> {
        assert!((1..=MAX_PORTS).contains(&disks.len()), "{} NVMe ports", disks.len());
        let shape = |disk: &Disk| Shape {
            blocks: disk.medium.size().0 / SECTOR,
            read_only: disk.medium.is_read_only(),
            discard: disk.discard,
            uuid: disk.uuid,
        };
        let shapes = disks.iter().map(|disk| disk.as_ref().map(shape)).collect();
        let media = disks.into_iter().map(|disk| disk.map(|disk| disk.medium)).collect();
        Arc::new_cyclic(|me| {
            Mutex::new(Self {
                wiring,
                msix: MsiX::new(IO_QUEUES + 1),
                me: me.clone(),
                media,
                core: Controller::new(shapes),
                intx_disabled: false,
                doorbells: None,
                gate: Arc::default(),
            })
        })
    }

    /// Plugs the controller into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, bus: &PciBus, at: DevFn) {
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE,
            // Non-volatile memory with NVMe registers.
            class: [0x01, 0x08, 0x02],
            subsystem_vendor: VENDOR,
            subsystem: DEVICE,
            interrupt_pin: 1,
            ..Identity::default()
        });
        // Power management: nothing but D0.
        space.add_capability(0x70, 0x01, &[0x03, 0x00, 0, 0, 0, 0]);
        let msix = this.lock().msix.clone();
        space.add_msix(MSIX_CAPABILITY, MSIX_BAR, &msix);
        let backing = Backing::mmio(mmio_handler(this, 0));
        let registers = Bar::Memory { size: BAR_SIZE, prefetchable: false, wide: true, backing };
        bus.add(at, "nvme", space, vec![(0, registers), (MSIX_BAR, msix.bar())], this.clone());
        let bell =
            |queue: u16| BarBell { bar: 0, offset: DOORBELLS as u16 + 8 * queue, value: 0, number: queue };
        let bells: Vec<_> = (1..=IO_QUEUES).map(bell).collect();
        let device: Arc<dyn Bell> = this.clone();
        let mut own = this.lock();
        own.doorbells = Some(bus.doorbells().clone());
        bus.add_doorbells(at, &bells, Arc::downgrade(&device), Some(own.gate.clone()));
    }

    /// Whether no request is with a medium.
    pub fn is_idle(&self) -> bool {
        self.core.is_idle()
    }

    /// Hands requests to the media, and interrupts.
    fn apply(&mut self, out: Out) {
        let Out { asks, vectors } = out;
        for Ask { command, generation, namespace, op } in asks {
            // Only namespaces with media are asked.
            let Some(medium) = self.media.get(namespace).and_then(Option::as_ref) else { continue };
            let me = self.me.clone();
            medium.submit(
                op,
                Box::new(move |result| {
                    if let Some(me) = me.upgrade() {
                        me.lock().answered(command, generation, result);
                    }
                }),
            );
        }
        if self.msix.is_enabled() {
            vectors.into_iter().for_each(|vector| self.msix.notify(vector));
        }
        self.sync_pin();
        self.sync_gate();
    }

    /// The registers are doorbells while their values are in memory.
    fn sync_gate(&self) {
        if let Some(doorbells) = &self.doorbells {
            doorbells.set_gate(&self.gate, self.core.state.buffers.is_some());
        }
    }

    fn sync_pin(&self) {
        self.wiring.irq.set(!self.intx_disabled && !self.msix.is_enabled() && self.core.state.pin());
    }

    fn answered(&mut self, command: u64, generation: u64, result: Result<Vec<u8>, BlockError>) {
        if let Err(error) = &result {
            tracing::warn!(target: "nvme", %error, "the medium failed a request");
        }
        let mut out = Out::default();
        self.core.answered(&self.wiring.pgm, command, generation, result.map_err(|_| ()), &mut out);
        self.apply(out);
    }
}

impl MmioDevice for Nvme {
    fn mmio_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) {
        self.core.read(offset, data);
    }

    fn mmio_write(&mut self, _region: u32, offset: u64, data: &[u8]) {
        let mut out = Out::default();
        self.core.write(&self.wiring.pgm, offset, data, &mut out);
        self.apply(out);
    }
}

impl PciDevice for Nvme {
    fn config_written(&mut self, _offset: u8, _width: Width, space: &mut ConfigSpace) {
        self.intx_disabled = space.u16(pci::reg::COMMAND) & pci::COMMAND_INTX_DISABLE != 0;
        // MSI-X may have been switched on or off.
        let mut out = Out::default();
        self.core.set_uses_pin(&self.wiring.pgm, !self.msix.is_enabled(), &mut out);
        self.apply(out);
    }
}

impl Device for Nvme {
    fn reset(&mut self) {
        self.core.reset();
        self.intx_disabled = false;
        self.sync_pin();
        self.sync_gate();
    }
}

impl BellDevice for Nvme {
    fn rung(&mut self, queue: u16) {
        let mut out = Out::default();
        self.core.rung(&self.wiring.pgm, queue, &mut out);
        self.apply(out);
    }
}
