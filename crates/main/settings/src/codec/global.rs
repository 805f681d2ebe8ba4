//! `<Global>`: the installation.

use super::Walk;
use super::shared::{forwarding, string_map, usb_filters};
use crate::model::*;
use crate::version::SettingsVersion as V;
use crate::words::ProxyMode;
use crate::xml::{Archive, Outcome};

/// Number of the DHCP option whose value stands in the server's `networkMask`.
const SUBNET_MASK: i32 = 1;

impl Walk {
    /// `<Global>`.
    pub(super) fn global(&mut self, a: &mut Archive<'_>, g: &mut GlobalSettings) -> Outcome {
        a.child("ExtraData", |a| string_map(a, "ExtraDataItem", &mut g.extra_data))?;
        a.child_if(true, "MachineRegistry", |a| {
            a.list("MachineEntry", &mut g.machines, |a, entry| {
                a.required("uuid", &mut entry.uuid)?;
                a.required("src", &mut entry.settings_file)
            })
        })?;
        self.media_registry(a, &mut g.media_registry)?;
        a.child_if(true, "NetserviceRegistry", |a| {
            a.child_if(true, "DHCPServers", |a| a.list("DHCPServer", &mut g.dhcp_servers, dhcp_server))?;
            a.child("NATNetworks", |a| a.list("NATNetwork", &mut g.nat_networks, nat_network))?;
            a.child("HostOnlyNetworks", |a| {
                a.list("HostOnlyNetwork", &mut g.host_only_networks, |a, n| {
                    a.required("name", &mut n.name)?;
                    a.required("mask", &mut n.mask)?;
                    a.required("ipLower", &mut n.ip_lower)?;
                    a.required("ipUpper", &mut n.ip_upper)?;
                    a.required("id", &mut n.uuid)?;
                    a.digit("enabled", &mut n.enabled)
                })
            })?;
            a.child("CloudNetworks", |a| {
                a.list("CloudNetwork", &mut g.cloud_networks, |a, n| {
                    a.required("name", &mut n.name)?;
                    a.required("provider", &mut n.provider)?;
                    a.required("profile", &mut n.profile)?;
                    a.required("id", &mut n.id)?;
                    a.digit("enabled", &mut n.enabled)
                })
            })
        })?;
        a.child_if(true, "SystemProperties", |a| self.system_properties(a, &mut g.system_properties))?;
        a.child_if(true, "USBDeviceFilters", |a| usb_filters(a, &mut g.usb_device_filters, true))?;
        a.child("USBDeviceSources", |a| {
            a.list("USBDeviceSource", &mut g.usb_device_sources, |a, source| {
                a.required("name", &mut source.name)?;
                a.required("backend", &mut source.backend)?;
                a.required("address", &mut source.address)?;
                string_map(a, "Property", &mut source.properties)
            })
        })
    }

    fn system_properties(&mut self, a: &mut Archive<'_>, p: &mut SystemProperties) -> Outcome {
        let no_text = String::new;
        a.attribute("defaultMachineFolder", &mut p.default_machine_folder, no_text())?;
        a.attribute("LoggingLevel", &mut p.logging_level, no_text())?;
        a.attribute("defaultHardDiskFormat", &mut p.default_hard_disk_format, no_text())?;
        let auth_library = if self.since(V::V1_11) { "VRDEAuthLibrary" } else { "remoteDisplayAuthLibrary" };
        a.attribute(auth_library, &mut p.vrde_auth_library, no_text())?;
        a.attribute("webServiceAuthLibrary", &mut p.web_service_auth_library, no_text())?;
        a.attribute("defaultVRDEExtPack", &mut p.default_vrde_ext_pack, no_text())?;
        a.attribute("defaultCryptoExtPack", &mut p.default_crypto_ext_pack, no_text())?;
        a.always("LogHistoryCount", &mut p.log_history_count, 3)?;
        a.attribute("autostartDatabasePath", &mut p.autostart_database_path, no_text())?;
        a.attribute("defaultFrontend", &mut p.default_frontend, no_text())?;
        a.attribute("proxyUrl", &mut p.proxy_url, no_text())?;
        a.numbered("proxyMode", &mut p.proxy_mode, ProxyMode::System)?;
        a.always("exclusiveHwVirt", &mut p.exclusive_hw_virt, true)?;
        a.attribute("LanguageId", &mut p.language_id, no_text())
    }
}

fn dhcp_server(a: &mut Archive<'_>, s: &mut DhcpServer) -> Outcome {
    a.required("networkName", &mut s.network_name)?;
    a.required("IPAddress", &mut s.ip_address)?;
    a.required("networkMask", &mut s.network_mask)?;
    a.required("lowerIP", &mut s.lower_ip)?;
    a.required("upperIP", &mut s.upper_ip)?;
    a.digit("enabled", &mut s.enabled)?;
    a.child("Options", |a| {
        dhcp_config(a, &mut s.options)?;
        s.options.options.retain(|option| option.code != SUBNET_MASK);
        Ok(())
    })?;
    a.list("Group", &mut s.groups, |a, group| {
        a.required("name", &mut group.name)?;
        dhcp_config(a, &mut group.config)?;
        a.list("Condition", &mut group.conditions, |a, condition| {
            a.always("inclusive", &mut condition.inclusive, true)?;
            a.always("type", &mut condition.condition_type, 0)?;
            a.always("value", &mut condition.value, String::new())
        })
    })?;
    a.list("Config", &mut s.individual, |a, client| {
        a.attribute("MACAddress", &mut client.mac_address, String::new())?;
        a.attribute("vm-name", &mut client.vm_name, String::new())?;
        let write = client.slot != 0 || !client.vm_name.is_empty();
        a.attribute_if(write, "slot", &mut client.slot, 0)?;
        a.attribute("fixedAddress", &mut client.fixed_address, String::new())?;
        dhcp_config(a, &mut client.config)
    })
}

fn dhcp_config(a: &mut Archive<'_>, c: &mut DhcpConfig) -> Outcome {
    a.attribute("secMinLeaseTime", &mut c.min_lease_time, 0)?;
    a.attribute("secDefaultLeaseTime", &mut c.default_lease_time, 0)?;
    a.attribute("secMaxLeaseTime", &mut c.max_lease_time, 0)?;
    a.attribute("forcedOptions", &mut c.forced_options, String::new())?;
    a.attribute("suppressedOptions", &mut c.suppressed_options, String::new())?;
    a.list("Option", &mut c.options, |a, option| {
        a.required("name", &mut option.code)?;
        a.always("value", &mut option.value, String::new())?;
        a.attribute("encoding", &mut option.encoding, 0)
    })
}

fn nat_network(a: &mut Archive<'_>, n: &mut NatNetwork) -> Outcome {
    a.required("networkName", &mut n.network_name)?;
    a.required("network", &mut n.network)?;
    a.digit("ipv6", &mut n.ipv6)?;
    a.required("ipv6prefix", &mut n.ipv6_prefix)?;
    a.digit("advertiseDefaultIPv6Route", &mut n.advertise_default_ipv6_route)?;
    a.digit("needDhcp", &mut n.need_dhcp)?;
    a.digit("enabled", &mut n.enabled)?;
    a.child("PortForwarding4", |a| forwarding(a, &mut n.rules4))?;
    a.child("PortForwarding6", |a| forwarding(a, &mut n.rules6))?;
    a.child("Mappings", |a| {
        a.list("Loopback4", &mut n.loopbacks, |a, loopback| {
            a.required("address", &mut loopback.address)?;
            a.always("offset", &mut loopback.offset, 0)
        })
    })
}
