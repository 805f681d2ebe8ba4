//! VirtualBox's limits, by the names of ISystemProperties.

use settings::{Chipset, StorageBus};

/// In MB.
pub(crate) const MIN_RAM: u32 = 4;
/// In MB: 2 TB.
pub(crate) const MAX_RAM: u32 = 2 * 1024 * 1024;
/// In MB.
pub(crate) const MIN_VRAM: u32 = 0;
/// In MB.
pub(crate) const MAX_VRAM: u32 = 256;
pub(crate) const MIN_CPUS: u32 = 1;
pub(crate) const MAX_CPUS: u32 = 64;
pub(crate) const MAX_MONITORS: u32 = 64;
pub(crate) const SERIAL_PORTS: u32 = 4;
pub(crate) const PARALLEL_PORTS: u32 = 2;
pub(crate) const BOOT_POSITIONS: u32 = 4;

/// Devices that one port of the bus takes.
pub(crate) fn max_devices_per_port(bus: StorageBus) -> u32 {
    match bus {
        StorageBus::Ide | StorageBus::Floppy => 2,
        _ => 1,
    }
}

pub(crate) fn min_ports(bus: StorageBus) -> u32 {
    match bus {
        StorageBus::Sata
        | StorageBus::Sas
        | StorageBus::Pcie
        | StorageBus::VirtioScsi
        | StorageBus::VirtioBlk
        | StorageBus::Floppy => 1,
        StorageBus::Ide => 2,
        StorageBus::Scsi => 16,
        StorageBus::Usb => 8,
    }
}

pub(crate) fn max_ports(bus: StorageBus) -> u32 {
    bus.ports().1
}

/// Controllers of the bus that a machine may have.
pub(crate) fn max_instances(chipset: Chipset, bus: StorageBus) -> u32 {
    let many = if chipset == Chipset::Ich9 { 8 } else { 1 };
    match bus {
        StorageBus::Sata | StorageBus::Scsi | StorageBus::Sas | StorageBus::Pcie | StorageBus::VirtioScsi => {
            many
        }
        StorageBus::Ide | StorageBus::Floppy | StorageBus::Usb | StorageBus::VirtioBlk => 1,
    }
}

/// Controllers of each kind that a machine may have, with any chipset.
pub(crate) const MAX_USB_CONTROLLERS_OF_A_KIND: u32 = 1;
