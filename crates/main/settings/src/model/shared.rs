//! What machine files and `VirtualBox.xml` have in common: media, extra data, USB filters, NAT rules.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::words::{MediumType, NatProtocol, UsbFilterAction};

/// Named strings in the order of their names, which is how VirtualBox writes them.
pub type StringMap = BTreeMap<String, String>;

/// A registered medium. Locations are kept as the file has them: absolute, or relative to the machine folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Medium {
    pub uuid: Uuid,
    pub location: String,
    pub description: String,
    /// Format of the image (`VDI`, `VMDK`, …); `RAW` for DVD and floppy images unless said otherwise.
    pub format: String,
    /// Differencing images of immutable parents are emptied at each start.
    pub auto_reset: bool,
    /// Meaningful for base media only; differencing images are `Normal`.
    pub medium_type: MediumType,
    /// Format-specific properties (iSCSI targets, encryption).
    pub properties: StringMap,
    /// Differencing images on top of this one; hard disks only.
    pub children: Vec<Medium>,
}

/// The media that a machine, or the whole installation, knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MediaRegistry {
    pub hard_disks: Vec<Medium>,
    pub dvd_images: Vec<Medium>,
    pub floppy_images: Vec<Medium>,
}

impl MediaRegistry {
    /// Whether nothing is registered.
    pub fn is_empty(&self) -> bool {
        self.hard_disks.is_empty() && self.dvd_images.is_empty() && self.floppy_images.is_empty()
    }

    /// The medium `uuid` of any kind, at any depth of differencing.
    pub fn find(&self, uuid: Uuid) -> Option<&Medium> {
        let mut queue: Vec<&Medium> =
            self.hard_disks.iter().chain(&self.dvd_images).chain(&self.floppy_images).collect();
        while let Some(medium) = queue.pop() {
            if medium.uuid == uuid {
                return Some(medium);
            }
            queue.extend(&medium.children);
        }
        None
    }
}

/// A rule that decides which USB devices of the host are taken. Empty strings match everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsbDeviceFilter {
    pub name: String,
    pub active: bool,
    /// Four hexadecimal digits.
    pub vendor_id: String,
    /// Four hexadecimal digits.
    pub product_id: String,
    /// Four hexadecimal digits, binary coded decimal.
    pub revision: String,
    pub manufacturer: String,
    pub product: String,
    pub serial_number: String,
    pub port: String,
    /// Only for the filters of the host, in `VirtualBox.xml`.
    pub action: UsbFilterAction,
    /// `yes`, `no` or empty; only for the filters of a machine.
    pub remote: String,
    /// Bits of interfaces to hide from the guest; only for the filters of a machine.
    pub masked_interfaces: u32,
}

/// A port forwarding rule of a NAT engine or NAT network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatRule {
    pub name: String,
    pub protocol: NatProtocol,
    /// Empty for all addresses of the host.
    pub host_ip: String,
    pub host_port: u16,
    /// Empty for the guest's first address.
    pub guest_ip: String,
    pub guest_port: u16,
}
