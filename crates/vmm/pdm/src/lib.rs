//! PDM, the pluggable device manager: what a device is, and everything it is wired to.
//!
//! A device is a struct behind one `Mutex`. It implements [`Device`] (reset and saved state, always) and the
//! access traits for what it has: [`PortIo`], [`MmioDevice`], [`pci::PciDevice`], [`tm::TimerTarget`]. Whoever
//! assembles the machine registers the `Arc<Mutex<D>>` with [`iom::Iom`], `pgm` and [`pci::PciBus`].
//!
//! **Locks.** A device's methods run with its own lock held. From there it may set its IRQ lines, arm timers, access guest memory and
//! hand requests to connectors. These never call back into the device synchronously, so the order device → interrupt
//! controller → vCPU link is the only one. A device never takes another device's lock in any other way.
//!
//! **Connectors** ([`connector`]) are where devices meet back ends and clients.

pub mod connector;
pub mod dma;
pub mod doorbell;
pub mod iom;
pub mod irq;
pub mod msix;
pub mod pci;

pub use iom::{Iom, IsaWidth, MmioDevice, PortIo, Width};
pub use irq::{ApicRegisters, ExtInt, InterruptController, IrqLine, IrqSink, LocalApics, RemoteApics};

/// What every device is.
pub trait Device: ssm::Saveable + Send {
    /// Brings the guest-visible state to its value after power-on or a system reset. Called at construction of the machine
    /// and at every reset, with all vCPUs stopped. Outstanding requests to connectors are dropped or awaited by the
    /// device itself.
    fn reset(&mut self);
}
