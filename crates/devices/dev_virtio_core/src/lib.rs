//! What every virtio device has in common: the split virtqueue and the PCI transport. Source: OASIS Virtual I/O Device (VIRTIO)
//! Version 1.2, sections 2 and 4.1.
//!
//! A device implements [`VirtioDevice`] and is plugged in as [`VirtioPci`], which is *transitional*: drivers of virtio 0.9.5 find
//! their registers in I/O ports, those of 1.0 and later in memory. Interrupts come by INTx or MSI-X.
//!
//! Registry crates for this (`virtio-queue`) want their own type of guest memory, which would put a second one beside `pgm`.
//!
//! Everything in a queue is the guest's word: chains are limited, and a queue that makes no sense stops until the driver resets the
//! device (DEVICE_NEEDS_RESET).

#![forbid(unsafe_code)]

mod pci;
mod queue;
#[cfg(test)]
mod tests;

pub use pci::{Transport, VENDOR, VirtioDevice, VirtioPci, Wiring};
pub use queue::{Chain, Queue, Region};

/// Bits of the features that belong to queues and transport.
pub mod feature {
    /// Legacy: the device tells when it has used up all buffers, whatever the driver's flags.
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// Legacy: buffers may be laid out in any way.
    pub const ANY_LAYOUT: u64 = 1 << 27;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Bits of the device status.
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
    pub const FAILED: u8 = 0x80;
}
