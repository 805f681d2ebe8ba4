//! The installation: what `VirtualBox.xml` describes.

use uuid::Uuid;

use super::shared::{MediaRegistry, NatRule, StringMap, UsbDeviceFilter};
use crate::words::ProxyMode;

/// Everything that `VirtualBox.xml` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GlobalSettings {
    pub extra_data: StringMap,
    pub machines: Vec<MachineEntry>,
    /// Media registered with no machine; VirtualBox 3.2 and older had all media here.
    pub media_registry: MediaRegistry,
    pub dhcp_servers: Vec<DhcpServer>,
    pub nat_networks: Vec<NatNetwork>,
    pub host_only_networks: Vec<HostOnlyNetwork>,
    pub cloud_networks: Vec<CloudNetwork>,
    pub system_properties: SystemProperties,
    pub usb_device_filters: Vec<UsbDeviceFilter>,
    pub usb_device_sources: Vec<UsbDeviceSource>,
}

/// A registered machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineEntry {
    pub uuid: Uuid,
    /// Path of the settings file, absolute or relative to the configuration directory.
    pub settings_file: String,
}

/// Defaults and limits of the installation. Empty strings stand for VirtualBox's own default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemProperties {
    pub default_machine_folder: String,
    pub default_hard_disk_format: String,
    pub vrde_auth_library: String,
    pub web_service_auth_library: String,
    pub default_vrde_ext_pack: String,
    pub default_crypto_ext_pack: String,
    pub autostart_database_path: String,
    pub default_frontend: String,
    pub logging_level: String,
    pub proxy_url: String,
    pub proxy_mode: ProxyMode,
    /// Old logs kept beside the current one.
    pub log_history_count: u32,
    pub exclusive_hw_virt: bool,
    pub language_id: String,
}

impl Default for SystemProperties {
    fn default() -> Self {
        Self {
            default_machine_folder: String::new(),
            default_hard_disk_format: String::new(),
            vrde_auth_library: String::new(),
            web_service_auth_library: String::new(),
            default_vrde_ext_pack: String::new(),
            default_crypto_ext_pack: String::new(),
            autostart_database_path: String::new(),
            default_frontend: String::new(),
            logging_level: String::new(),
            proxy_url: String::new(),
            proxy_mode: ProxyMode::System,
            log_history_count: 3,
            exclusive_hw_virt: true,
            language_id: String::new(),
        }
    }
}

/// A DHCP server for a host-only, internal or NAT network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpServer {
    pub network_name: String,
    pub ip_address: String,
    pub network_mask: String,
    pub lower_ip: String,
    pub upper_ip: String,
    pub enabled: bool,
    /// Options for all clients; the subnet mask is `network_mask`.
    pub options: DhcpConfig,
    pub groups: Vec<DhcpGroup>,
    pub individual: Vec<DhcpIndividual>,
}

impl DhcpServer {
    /// The server that a fresh installation has for its first host-only interface.
    pub fn host_only_default() -> Self {
        Self {
            network_name: "HostInterfaceNetworking-vboxnet0".into(),
            ip_address: "192.168.56.100".into(),
            network_mask: "255.255.255.0".into(),
            lower_ip: "192.168.56.101".into(),
            upper_ip: "192.168.56.254".into(),
            enabled: true,
            ..Self::default()
        }
    }
}

/// Options and lease times. Times are seconds; 0 inherits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpConfig {
    pub min_lease_time: u32,
    pub default_lease_time: u32,
    pub max_lease_time: u32,
    pub forced_options: String,
    pub suppressed_options: String,
    pub options: Vec<DhcpOption>,
}

/// A DHCP option.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpOption {
    /// The option's number in RFC 2132.
    pub code: i32,
    pub value: String,
    /// 0 for text as the option's type wants it, 1 for hexadecimal bytes.
    pub encoding: i32,
}

/// Clients that match conditions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpGroup {
    pub name: String,
    pub config: DhcpConfig,
    pub conditions: Vec<DhcpCondition>,
}

/// What makes a client a member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DhcpCondition {
    pub inclusive: bool,
    /// Main API number (`DHCPGroupConditionType`).
    pub condition_type: i32,
    pub value: String,
}

impl Default for DhcpCondition {
    fn default() -> Self {
        Self { inclusive: true, condition_type: 0, value: String::new() }
    }
}

/// One client, named by its MAC address or by machine and slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpIndividual {
    pub mac_address: String,
    pub vm_name: String,
    pub slot: u32,
    pub fixed_address: String,
    pub config: DhcpConfig,
}

/// A NAT network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatNetwork {
    pub network_name: String,
    /// CIDR notation.
    pub network: String,
    pub ipv6: bool,
    pub ipv6_prefix: String,
    pub advertise_default_ipv6_route: bool,
    pub need_dhcp: bool,
    pub enabled: bool,
    pub rules4: Vec<NatRule>,
    pub rules6: Vec<NatRule>,
    pub loopbacks: Vec<NatLoopback>,
}

impl Default for NatNetwork {
    fn default() -> Self {
        Self {
            network_name: String::new(),
            network: String::new(),
            ipv6: false,
            ipv6_prefix: String::new(),
            advertise_default_ipv6_route: false,
            need_dhcp: true,
            enabled: true,
            rules4: Vec::new(),
            rules6: Vec::new(),
            loopbacks: Vec::new(),
        }
    }
}

/// A loopback address of the host that a NAT network shows at an offset into its own range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatLoopback {
    pub address: String,
    pub offset: u32,
}

/// A host-only network as macOS hosts have them; kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostOnlyNetwork {
    pub uuid: Uuid,
    pub name: String,
    pub mask: String,
    pub ip_lower: String,
    pub ip_upper: String,
    pub enabled: bool,
}

/// A network of a cloud provider; kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloudNetwork {
    pub name: String,
    pub provider: String,
    pub profile: String,
    pub id: String,
    pub enabled: bool,
}

/// A source of USB devices other than the host itself; kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsbDeviceSource {
    pub name: String,
    pub backend: String,
    pub address: String,
    pub properties: StringMap,
}
