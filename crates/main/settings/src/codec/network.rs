//! Network cards with everything that they are, or could be, plugged into.

use super::Walk;
use super::shared::{forwarding, string_map};
use crate::model::{Hardware, Nat, NetworkAdapter};
use crate::version::SettingsVersion as V;
use crate::words::{NetworkAdapterType, NetworkAttachment, PromiscPolicy, Word};
use crate::xml::{Archive, Outcome};

/// The attachments in the order in which those not in use are written.
const DISABLED_ORDER: [NetworkAttachment; 8] = [
    NetworkAttachment::Nat,
    NetworkAttachment::Bridged,
    NetworkAttachment::Internal,
    NetworkAttachment::HostOnly,
    NetworkAttachment::Generic,
    NetworkAttachment::NatNetwork,
    NetworkAttachment::Cloud,
    NetworkAttachment::HostOnlyNetwork,
];

impl Walk {
    /// The card in a slot that the file does not name: not there, of the kind that the guest OS type has
    /// drivers for.
    pub(super) fn unnamed_adapter(&self, slot: u32) -> NetworkAdapter {
        let mut adapter = NetworkAdapter::new(slot);
        adapter.adapter_type = match self.os {
            Some(os) => os.network_adapter(),
            None => self.default_adapter_type(),
        };
        adapter.nat.localhost_reachable = !self.since(V::V1_19);
        adapter
    }

    /// Whether a card need not be named. What the NAT engine of a card that is not there would reach is not
    /// kept: it has another default since version 1.19, which is no reason to name all cards when a file rises.
    fn is_unnamed(&self, adapter: &NetworkAdapter) -> bool {
        let mut unnamed = self.unnamed_adapter(adapter.slot);
        unnamed.nat.localhost_reachable = adapter.nat.localhost_reachable;
        *adapter == unnamed
    }

    /// The kind that a missing `type` stands for.
    fn default_adapter_type(&self) -> NetworkAdapterType {
        if self.since(V::V1_16) { NetworkAdapterType::Am79C973 } else { NetworkAdapterType::Am79C970A }
    }

    /// `<Network>`.
    pub(super) fn network(&mut self, archive: &mut Archive<'_>, hardware: &mut Hardware) -> Outcome {
        let reading = archive.reading();
        let mut named: Vec<NetworkAdapter> = Vec::new();
        if !reading {
            named = hardware.network.iter().filter(|n| !self.is_unnamed(n)).cloned().collect();
        }
        archive.child("Network", |a| a.list("Adapter", &mut named, |a, adapter| self.adapter(a, adapter)))?;
        if reading {
            hardware.network = (0..hardware.chipset.max_network_adapters() as u32)
                .map(|slot| self.unnamed_adapter(slot))
                .collect();
            let mut seen = [false; MAX_SLOTS];
            for adapter in named {
                let slot = adapter.slot as usize;
                if std::mem::replace(&mut seen[slot], true) {
                    return Err(archive.error(
                        format!(
                            "Invalid value {slot} in Network/Adapter/@slot attribute: value is not unique"
                        ),
                        "give each network card a slot of its own",
                    ));
                }
                for missing in hardware.network.len()..=slot {
                    hardware.network.push(self.unnamed_adapter(missing as u32));
                }
                hardware.network[slot] = adapter;
            }
        }
        Ok(())
    }

    fn adapter(&self, a: &mut Archive<'_>, n: &mut NetworkAdapter) -> Outcome {
        let since_5_1 = self.since(V::V1_16);
        if a.reading() {
            *n = NetworkAdapter::new(0);
            n.nat.localhost_reachable = !self.since(V::V1_19);
        }
        a.required("slot", &mut n.slot)?;
        if n.slot as usize >= MAX_SLOTS {
            return Err(a.error(
                format!("Invalid value {} in Network/Adapter/@slot attribute", n.slot),
                format!("write a number from 0 to {}", MAX_SLOTS - 1),
            ));
        }
        a.attribute("enabled", &mut n.enabled, false)?;
        a.attribute("MACAddress", &mut n.mac_address, String::new())?;
        a.attribute("cable", &mut n.cable_connected, since_5_1)?;
        a.attribute("speed", &mut n.line_speed, 0)?;
        a.attribute("bootPriority", &mut n.boot_priority, 0)?;
        a.attribute("trace", &mut n.trace_enabled, false)?;
        a.attribute("tracefile", &mut n.trace_file, String::new())?;
        a.attribute("bandwidthGroup", &mut n.bandwidth_group, String::new())?;
        a.attribute("promiscuousModePolicy", &mut n.promisc_policy, PromiscPolicy::Deny)?;
        a.attribute("type", &mut n.adapter_type, self.default_adapter_type())?;
        if let Archive::Read(element) = a {
            let mut disabled: Vec<_> = Vec::new();
            let mut active = Vec::new();
            for child in element.elements() {
                if child.name() == "DisabledModes" {
                    disabled.extend(child.elements());
                } else {
                    active.push(child);
                }
            }
            for child in disabled {
                self.read_attachment(&mut Archive::Read(child), child.name(), n)?;
            }
            for child in active {
                if let Some(attachment) = self.read_attachment(&mut Archive::Read(child), child.name(), n)? {
                    n.attachment = attachment;
                }
            }
            return Ok(());
        }
        a.child("DisabledModes", |a| {
            for attachment in DISABLED_ORDER {
                if attachment != n.attachment {
                    self.attachment(a, attachment, false, n)?;
                }
            }
            Ok(())
        })?;
        self.attachment(a, n.attachment, true, n)
    }

    /// Reads the parameters of the attachment that the element `name` stands for, if it stands for one.
    fn read_attachment(
        &self,
        a: &mut Archive<'_>,
        name: &str,
        n: &mut NetworkAdapter,
    ) -> Result<Option<NetworkAttachment>, crate::ContentError> {
        if name == "VDE" {
            n.generic_driver = "VDE".into();
            n.generic_properties.insert("network".into(), a.read("network")?.unwrap_or_default());
            return Ok(Some(NetworkAttachment::Generic));
        }
        let Some(attachment) = NetworkAttachment::from_word(name).filter(|a| *a != NetworkAttachment::Null)
        else {
            return Ok(None);
        };
        self.parameters(a, attachment, n)?;
        Ok(Some(attachment))
    }

    /// Writes the element of an attachment: always if it is in use, else if it has parameters.
    fn attachment(
        &self,
        a: &mut Archive<'_>,
        attachment: NetworkAttachment,
        active: bool,
        n: &mut NetworkAdapter,
    ) -> Outcome {
        if attachment == NetworkAttachment::Null {
            return Ok(());
        }
        let untouched = Nat { localhost_reachable: !self.since(V::V1_19), ..Nat::default() };
        if attachment == NetworkAttachment::Nat && !active && n.nat == untouched {
            return Ok(());
        }
        a.child_if(active, attachment.as_str(), |a| self.parameters(a, attachment, n))
    }

    fn parameters(
        &self,
        a: &mut Archive<'_>,
        attachment: NetworkAttachment,
        n: &mut NetworkAdapter,
    ) -> Outcome {
        use NetworkAttachment as At;
        let name = match attachment {
            At::Null => return Ok(()),
            At::Nat => return self.nat(a, &mut n.nat),
            At::Generic => {
                a.attribute("driver", &mut n.generic_driver, String::new())?;
                return string_map(a, "Property", &mut n.generic_properties);
            }
            At::Bridged => &mut n.bridged_interface,
            At::Internal => &mut n.internal_network,
            At::HostOnly => &mut n.host_only_interface,
            At::NatNetwork => &mut n.nat_network,
            At::Cloud => &mut n.cloud_network,
            At::HostOnlyNetwork => &mut n.host_only_network,
        };
        a.attribute("name", name, String::new())
    }

    fn nat(&self, a: &mut Archive<'_>, nat: &mut Nat) -> Outcome {
        a.attribute("network", &mut nat.network, String::new())?;
        a.attribute("hostip", &mut nat.bind_ip, String::new())?;
        a.attribute("mtu", &mut nat.mtu, 0)?;
        a.attribute("sockrcv", &mut nat.sock_rcv, 0)?;
        a.attribute("socksnd", &mut nat.sock_snd, 0)?;
        a.attribute("tcprcv", &mut nat.tcp_rcv, 0)?;
        a.attribute("tcpsnd", &mut nat.tcp_snd, 0)?;
        // Every VirtualBox reads a missing attribute as "true"; 7.0 writes "true" nevertheless.
        let write = !nat.localhost_reachable || self.since(V::V1_19);
        a.attribute_if(write, "localhost-reachable", &mut nat.localhost_reachable, true)?;
        a.child("DNS", |a| {
            a.attribute("pass-domain", &mut nat.dns_pass_domain, true)?;
            a.attribute("use-proxy", &mut nat.dns_proxy, false)?;
            a.attribute("use-host-resolver", &mut nat.dns_use_host_resolver, false)
        })?;
        a.child("Alias", |a| {
            a.attribute("logging", &mut nat.alias_log, false)?;
            a.attribute("proxy-only", &mut nat.alias_proxy_only, false)?;
            a.attribute("use-same-ports", &mut nat.alias_use_same_ports, false)
        })?;
        a.child("TFTP", |a| {
            a.attribute("prefix", &mut nat.tftp_prefix, String::new())?;
            a.attribute("boot-file", &mut nat.tftp_boot_file, String::new())?;
            a.attribute("next-server", &mut nat.tftp_next_server, String::new())
        })?;
        forwarding(a, &mut nat.rules)
    }
}

/// Slots of the chipset that has most.
const MAX_SLOTS: usize = 36;
