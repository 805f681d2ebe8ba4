//! Object paths.
//!
//! ```text
//! /org/virtualbox                          IClientSupport, IVMProcessControl
//! /org/virtualbox/VirtualBox               IVirtualBox          …/EventSource  …/SystemProperties  …/Host
//! /org/virtualbox/GuestOSTypes/<id>        IGuestOSType
//! /org/virtualbox/Media/<uuid>             IMedium
//! /org/virtualbox/Progress/<n>             IProgress            …/ErrorInfo
//! /org/virtualbox/Machines/<uuid>          a registered machine, read-only
//! /org/virtualbox/Unregistered/<uuid>      a machine that its creator has not registered yet
//! /org/virtualbox/Sessions/<n>             ISession             …/Machine  the machine that it has locked
//! /org/virtualbox/Appliances/<n>           IAppliance           …/<i>  IVirtualSystemDescription
//! /org/virtualbox/DHCPServers/<name>       IDHCPServer          …/Global …/Groups/<name>[/<i>] …/Clients/<key>
//! /org/virtualbox/NATNetworks/<name>       INATNetwork
//! /org/virtualbox/HostOnlyNetworks/<uuid>  IHostOnlyNetwork
//! /org/virtualbox/HostInterfaces/<name>    IHostNetworkInterface
//! /org/virtualbox/Console                  IConsole, in the VM process
//!     …/Keyboard …/Mouse …/Display …/Debugger …/Progress/<n>
//! ```
//!
//! Below a machine: `NetworkAdapters/<slot>[/NATEngine]`, `SerialPorts/<slot>`, `ParallelPorts/<slot>`,
//! `AudioSettings[/Adapter]`, `GraphicsAdapter`, `BIOSSettings`, `VRDEServer`, `USBControllers/<name>`,
//! `USBDeviceFilters[/<n>]`, `StorageControllers/<name>`, `MediumAttachments/<name>/<port>/<device>`,
//! `SharedFolders/<name>`, `BandwidthControl[/<name>]`, `RecordingSettings[/<screen>]`, `TrustedPlatformModule`,
//! `NvramStore`, `Snapshots/<uuid>`. Names and UUIDs are escaped by [`escape`]. Clients take paths from the API's
//! answers; only the fixed ones below are theirs to write.

pub const ROOT: &str = "/org/virtualbox";
pub const VIRTUAL_BOX: &str = "/org/virtualbox/VirtualBox";
pub const EVENT_SOURCE: &str = "/org/virtualbox/VirtualBox/EventSource";
pub const SYSTEM_PROPERTIES: &str = "/org/virtualbox/VirtualBox/SystemProperties";
pub const HOST: &str = "/org/virtualbox/VirtualBox/Host";
pub const GUEST_OS_TYPES: &str = "/org/virtualbox/GuestOSTypes";
pub const MEDIA: &str = "/org/virtualbox/Media";
pub const PROGRESS: &str = "/org/virtualbox/Progress";
pub const MACHINES: &str = "/org/virtualbox/Machines";
pub const UNREGISTERED: &str = "/org/virtualbox/Unregistered";
pub const SESSIONS: &str = "/org/virtualbox/Sessions";
pub const APPLIANCES: &str = "/org/virtualbox/Appliances";
pub const DHCP_SERVERS: &str = "/org/virtualbox/DHCPServers";
pub const NAT_NETWORKS: &str = "/org/virtualbox/NATNetworks";
pub const HOST_ONLY_NETWORKS: &str = "/org/virtualbox/HostOnlyNetworks";
pub const HOST_INTERFACES: &str = "/org/virtualbox/HostInterfaces";
pub const CONSOLE: &str = "/org/virtualbox/Console";

/// `text` as one element of an object path: letters and digits stand for themselves, every other byte becomes `_xx`,
/// and the empty text becomes `_`.
pub fn escape(text: &str) -> String {
    if text.is_empty() {
        return "_".into();
    }
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            out.push(byte as char);
        } else {
            out.push_str(&format!("_{byte:02x}"));
        }
    }
    out
}

/// The text that [`escape`] made `element` from, or `None` if it made no such element.
pub fn unescape(element: &str) -> Option<String> {
    if element == "_" {
        return Some(String::new());
    }
    let mut out = Vec::with_capacity(element.len());
    let mut bytes = element.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'_' {
            let high = (bytes.next()? as char).to_digit(16)?;
            let low = (bytes.next()? as char).to_digit(16)?;
            out.push((high * 16 + low) as u8);
        } else if byte.is_ascii_alphanumeric() {
            out.push(byte);
        } else {
            return None;
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unescape_undoes_escape() {
        for text in ["", "SATA", "IDE Controller", "a_b", "Größe/ 漢", "7c2c9f4e-0000-4000-8000-0123456789ab"]
        {
            assert_eq!(unescape(&escape(text)).as_deref(), Some(text));
            assert!(escape(text).bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
        }
    }

    #[test]
    fn elements_that_escape_never_makes_are_refused() {
        for element in ["a_", "a_4", "_zz", "a b", "_ff_fe"] {
            assert_eq!(unescape(element), None);
        }
    }
}
