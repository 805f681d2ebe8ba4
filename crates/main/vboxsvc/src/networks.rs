//! The networks that machines share: what each is to be by the settings, and the processes that they run in.
//!
//! A network's process (`VBoxIntNetSwitch`, crate `netstack`) is started when the first machine joins, or when it is started by hand, and
//! ends by itself. Networks have one name space, as VirtualBox's have: internal networks and NAT networks by their own names, host-only and
//! bridged ones by `HostInterfaceNetworking-` and the interface, host-only networks by `hostonly-`. A DHCP server serves the network that it
//! is named for.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use main_api::ipc;
use main_api::server::Peer;
use netstack::dhcp;
use netstack::protocol::{self, Client, ClientError, NatNetwork, Network, Reply, Request, Trunk};
use netstack::switch::Policy;
use netstack::{Mac, Protocol, Rule, host};
use settings::DhcpServer;
use vbox_types::ResultCode;

use crate::svc::{State, Svc};
use crate::vm::vm_of;

const INTERFACE_PREFIX: &str = "HostInterfaceNetworking-";
const HOST_ONLY_PREFIX: &str = "hostonly-";

/// The network of a host interface.
pub(crate) fn interface_network(name: &str) -> String {
    format!("{INTERFACE_PREFIX}{name}")
}

/// What was started by hand.
#[derive(Default)]
pub(crate) struct Started {
    /// Networks that stay without machines.
    pinned: HashSet<String>,
    /// Networks whose DHCP server was stopped by hand.
    dhcp_stopped: HashSet<String>,
    /// Networks whose router was stopped by hand.
    nat_stopped: HashSet<String>,
}

/// Whether a network is to stay without machines.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pin {
    /// As the process has it: an earlier service may have told it.
    Keep,
    Set(bool),
}

fn refused(network: &str, error: &ClientError) -> ApiError {
    use std::error::Error as _;
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    ApiError::new(ResultCode::HostError, format!("The network '{network}' cannot be used: {error}{cause}"))
}

impl Svc {
    /// What the network `name` is to be.
    fn wanted(&self, state: &State, name: &str) -> ApiResult<Network> {
        let global = &state.global.settings;
        let mut network = Network::internal(name);
        network.pinned = state.networks.pinned.contains(name);
        if let Some(interface) = name.strip_prefix(INTERFACE_PREFIX) {
            network.trunk = Some(match host::is_host_only(interface) {
                true => Trunk::HostOnly(interface.into()),
                false => Trunk::Bridged(interface.into()),
            });
        }
        let nat = global.nat_networks.iter().find(|n| n.network_name == name && n.enabled);
        if let Some(nat) = nat.filter(|_| !state.networks.nat_stopped.contains(name)) {
            network.nat = Some(nat_network(nat)?);
        }
        let server = global.dhcp_servers.iter().find(|s| s.network_name == name && s.enabled);
        if let Some(server) = server.filter(|_| !state.networks.dhcp_stopped.contains(name)) {
            network.dhcp = Some(self.dhcp_config(state, server)?);
        } else if let Some(own) = name.strip_prefix(HOST_ONLY_PREFIX) {
            let known = global.host_only_networks.iter().find(|n| n.name == own && n.enabled);
            if let Some(server) = known.and_then(host_only_server) {
                network.dhcp = Some(self.dhcp_config(state, &server)?);
            }
        }
        Ok(network)
    }

    /// Where the leases of a network are kept: the name of the file is VirtualBox's.
    pub(crate) fn leases_file(&self, network: &str) -> PathBuf {
        self.config_dir.join(format!("{}-Dhcpd.leases", file_name(network)))
    }

    fn dhcp_config(&self, state: &State, server: &DhcpServer) -> ApiResult<dhcp::Config> {
        let invalid = |what: &str, value: &str| {
            ApiError::invalid_arg(format!(
                "The DHCP server of the network '{}' has an invalid {what}: '{value}'",
                server.network_name
            ))
        };
        let address = |what: &str, text: &str| text.parse::<Ipv4Addr>().map_err(|_| invalid(what, text));
        let mut clients = Vec::new();
        for client in &server.individual {
            let mac = if client.mac_address.is_empty() {
                // A machine that is gone has no card to serve.
                match card_address(state, &client.vm_name, client.slot) {
                    Some(mac) => mac,
                    None => continue,
                }
            } else {
                client.mac_address.parse().map_err(|_| invalid("MAC address", &client.mac_address))?
            };
            let fixed = match client.fixed_address.as_str() {
                "" => None,
                text => Some(address("fixed address", text)?),
            };
            clients.push(dhcp::Client { mac, fixed, scope: scope(&client.config)? });
        }
        let mut groups = Vec::new();
        for group in &server.groups {
            let conditions = group.conditions.iter().filter_map(condition).collect();
            groups.push(dhcp::Group { name: group.name.clone(), conditions, scope: scope(&group.config)? });
        }
        Ok(dhcp::Config {
            address: address("server address", &server.ip_address)?,
            mask: address("netmask", &server.network_mask)?,
            lower: address("lower address", &server.lower_ip)?,
            upper: address("upper address", &server.upper_ip)?,
            leases: self.leases_file(&server.network_name),
            global: scope(&server.options)?,
            groups,
            clients,
        })
    }

    /// A connection to the process of the network, which is as `network` says then. Starts the process if it does not run.
    fn configured(&self, network: &Network, pin: Pin) -> ApiResult<Client> {
        let path = ipc::network_socket(&self.config_dir, &network.name)?;
        // Who finds a process that is about to end tries again; starting takes turns.
        let _one = self.starting_network.lock();
        let mut last = None;
        for _ in 0..3 {
            let client = match Client::connect(&path) {
                Ok(client) => client,
                Err(_) => {
                    self.start_process(network, &path)?;
                    Client::connect(&path).map_err(|e| refused(&network.name, &ClientError::Io(e)))?
                }
            };
            let mut network = network.clone();
            match (pin, client.ask(&Request::Status)) {
                (Pin::Set(on), _) => network.pinned = on,
                (Pin::Keep, Ok(Reply::Status(status))) => network.pinned |= status.network.pinned,
                (Pin::Keep, _) => {}
            }
            match client.ask(&Request::Configure(Box::new(network.clone()))) {
                Ok(Reply::Done { notes }) => {
                    for note in notes {
                        tracing::warn!(network = network.name, "{note}");
                    }
                    return Ok(client);
                }
                Ok(_) => last = Some(ClientError::Answer),
                Err(error @ ClientError::Refused(_)) => return Err(refused(&network.name, &error)),
                Err(error) => last = Some(error),
            }
        }
        Err(refused(&network.name, &last.unwrap_or(ClientError::Answer)))
    }

    fn start_process(&self, network: &Network, path: &std::path::Path) -> ApiResult<()> {
        let program = ipc::find_program("VBoxIntNetSwitch").ok_or_else(|| {
            ApiError::fail(
                "Cannot start a network: the program VBoxIntNetSwitch is neither beside VBoxSVC nor in PATH",
            )
        })?;
        let log = self.config_dir.join(format!("{}-Net.log", file_name(&network.name)));
        protocol::start(&program, &network.name, path, &log).map_err(|e| {
            ApiError::new(ResultCode::HostError, format!("Cannot start {}: {e}", program.display()))
        })
    }

    /// IVMProcessControl::openNetwork.
    pub(crate) fn open_network(
        &self,
        peer: &Peer,
        slot: u32,
        attachment: api::NetworkAttachmentType,
        name: &str,
        mac: &str,
        policy: api::NetworkAdapterPromiscModePolicy,
    ) -> ApiResult<OwnedFd> {
        use api::NetworkAttachmentType as A;
        let mac: Mac =
            mac.parse().map_err(|e: netstack::mac::MacError| ApiError::invalid_arg(e.to_string()))?;
        let policy = match policy {
            api::NetworkAdapterPromiscModePolicy::Deny => Policy::Deny,
            api::NetworkAdapterPromiscModePolicy::AllowNetwork => Policy::AllowNetwork,
            api::NetworkAdapterPromiscModePolicy::AllowAll => Policy::AllowAll,
        };
        if attachment == A::NATNetwork {
            if !self.network_runs(name) {
                // The first machine starts what was stopped before.
                self.set_stopped(name, false);
            }
            self.prepare_nat_network(name)?;
        }
        let (label, network) = {
            let state = self.state.lock();
            let machine = state.machine(vm_of(&state, peer)?)?;
            let global = &state.global.settings;
            let missing = |what: &str, list: &str| {
                ApiError::not_found(format!(
                    "Nonexistent {what}, name '{name}': \"VBoxManage list {list}\" shows those that exist"
                ))
            };
            let network = match attachment {
                A::Internal => name.to_owned(),
                A::HostOnly => {
                    host::interface(name).map_err(|_| missing("host networking interface", "hostonlyifs"))?;
                    interface_network(name)
                }
                A::Bridged => {
                    host::interface(name).map_err(|_| missing("host networking interface", "bridgedifs"))?;
                    interface_network(name)
                }
                A::NATNetwork => {
                    let known = global.nat_networks.iter().any(|n| n.network_name == name);
                    if !known {
                        return Err(missing("NAT network", "natnets"));
                    }
                    name.to_owned()
                }
                A::HostOnlyNetwork => {
                    let known = global.host_only_networks.iter().any(|n| n.name == name);
                    if !known {
                        return Err(missing("host-only network", "hostonlynets"));
                    }
                    format!("{HOST_ONLY_PREFIX}{name}")
                }
                A::Null | A::NAT | A::Generic | A::Cloud => {
                    return Err(ApiError::invalid_arg("This attachment has no network that machines share"));
                }
            };
            (format!("{}/{}", machine.display_name(), slot + 1), self.wanted(&state, &network)?)
        };
        let client = self.configured(&network, Pin::Keep)?;
        client.join(&protocol::Port { label, mac, policy }).map_err(|e| refused(&network.name, &e))
    }

    /// Tells a network that runs of changed settings.
    pub(crate) fn refresh_network(&self, name: &str) -> ApiResult<()> {
        self.apply(name, Pin::Keep)
    }

    fn apply(&self, name: &str, pin: Pin) -> ApiResult<()> {
        if !self.network_runs(name) {
            return Ok(());
        }
        let network = self.wanted(&self.state.lock(), name)?;
        self.configured(&network, pin).map(drop)
    }

    /// Whether a process serves the network.
    pub(crate) fn network_runs(&self, name: &str) -> bool {
        ipc::network_socket(&self.config_dir, name).is_ok_and(|path| Client::connect(&path).is_ok())
    }

    /// Whether the network's router is needed now.
    pub(crate) fn nat_runs(&self, name: &str) -> bool {
        let status = ipc::network_socket(&self.config_dir, name)
            .ok()
            .and_then(|path| Client::connect(&path).ok()?.ask(&Request::Status).ok());
        match status {
            Some(Reply::Status(s)) => s.network.nat.is_some() && (s.network.pinned || !s.ports.is_empty()),
            _ => false,
        }
    }

    /// Starts a network by hand: it stays until it is stopped.
    pub(crate) fn start_network(&self, name: &str) -> ApiResult<()> {
        self.set_stopped(name, false);
        let network = {
            let mut state = self.state.lock();
            state.networks.pinned.insert(name.to_owned());
            self.wanted(&state, name)?
        };
        self.configured(&network, Pin::Set(true)).map(drop).inspect_err(|_| {
            self.state.lock().networks.pinned.remove(name);
        })
    }

    /// Takes back [`Self::start_network`]: machines keep their cables, but DHCP server and router are gone.
    pub(crate) fn stop_network(&self, name: &str) -> ApiResult<()> {
        self.set_stopped(name, true);
        self.state.lock().networks.pinned.remove(name);
        self.apply(name, Pin::Set(false))
    }

    fn set_stopped(&self, name: &str, stopped: bool) {
        let mut state = self.state.lock();
        let Started { dhcp_stopped, nat_stopped, .. } = &mut state.networks;
        for set in [dhcp_stopped, nat_stopped] {
            match stopped {
                true => set.insert(name.to_owned()),
                false => set.remove(name),
            };
        }
    }

    /// Stops a network's DHCP server by hand. A NAT network goes on; another one was started for the server's sake.
    pub(crate) fn stop_dhcp(&self, name: &str) -> ApiResult<()> {
        let routed = self.state.lock().global.settings.nat_networks.iter().any(|n| n.network_name == name);
        if routed { self.set_dhcp_stopped(name, true) } else { self.stop_network(name) }
    }

    /// Takes a network's DHCP server away, or gives it back.
    pub(crate) fn set_dhcp_stopped(&self, name: &str, stopped: bool) -> ApiResult<()> {
        {
            let mut state = self.state.lock();
            match stopped {
                true => state.networks.dhcp_stopped.insert(name.to_owned()),
                false => state.networks.dhcp_stopped.remove(name),
            };
        }
        self.refresh_network(name)
    }

    /// Ends the process of the network, and waits for that; machines that are in it ask for it again.
    pub(crate) fn end_network(&self, name: &str) -> ApiResult<()> {
        let path = ipc::network_socket(&self.config_dir, name)?;
        let _one = self.starting_network.lock();
        let Ok(client) = Client::connect(&path) else { return Ok(()) };
        client.ask(&Request::Stop).map_err(|e| refused(name, &e))?;
        // Its socket goes last.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while path.exists() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(())
    }

    /// A NAT network with DHCP has a server in the settings from its first start on.
    pub(crate) fn prepare_nat_network(&self, name: &str) -> ApiResult<()> {
        let mut state = self.state.lock();
        let global = &state.global.settings;
        let Some(network) = global.nat_networks.iter().find(|n| n.network_name == name).cloned() else {
            return Ok(());
        };
        if !network.enabled || !network.need_dhcp {
            return Ok(());
        }
        let places = Places::of(&network)?;
        let known = global.dhcp_servers.iter().find(|s| s.network_name == name).cloned();
        let mut server = known.clone().unwrap_or_else(|| DhcpServer {
            network_name: name.into(),
            ip_address: places.dhcp.to_string(),
            network_mask: Ipv4Addr::from(places.mask).to_string(),
            lower_ip: places.lower.to_string(),
            upper_ip: places.upper.to_string(),
            enabled: true,
            ..DhcpServer::default()
        });
        let mut set = |code: i32, value: Option<String>| {
            let options = &mut server.options.options;
            match (options.iter_mut().find(|o| o.code == code), value) {
                (Some(option), Some(value)) => (option.value, option.encoding) = (value, 0),
                (Some(_), None) => options.retain(|o| o.code != code),
                (None, Some(value)) => {
                    options.push(settings::DhcpOption { code, value, encoding: 0 });
                    options.sort_by_key(|o| o.code);
                }
                (None, None) => {}
            }
        };
        set(3, Some(places.gateway.to_string()));
        set(6, name_servers(&network, &places));
        set(15, domain());
        if known.as_ref() == Some(&server) {
            return Ok(());
        }
        state.global.edit(|g| match g.dhcp_servers.iter_mut().find(|s| s.network_name == name) {
            Some(old) => *old = server,
            None => g.dhcp_servers.push(server),
        })
    }
}

/// A network's name as a part of a file's.
fn file_name(network: &str) -> String {
    network.chars().map(|c| if c == '/' || c == '\0' { '_' } else { c }).collect()
}

/// The address of a machine's card.
pub(crate) fn card_address(state: &State, machine: &str, slot: u32) -> Option<Mac> {
    let machine = state.find(machine).ok()?;
    machine.settings.hardware.network.get(slot as usize)?.mac_address.parse().ok()
}

/// Options and times as the server takes them.
fn scope(config: &settings::DhcpConfig) -> ApiResult<dhcp::Scope> {
    let numbers = |text: &str| {
        text.split([' ', ',']).filter_map(|part| part.trim().parse::<u8>().ok()).collect::<Vec<u8>>()
    };
    let mut options = std::collections::BTreeMap::new();
    for option in &config.options {
        let value = dhcp::options::encode(option.code, &option.value, option.encoding == 1)
            .map_err(|e| ApiError::invalid_arg(e.to_string()))?;
        if let Ok(code) = u8::try_from(option.code) {
            options.insert(code, value);
        }
    }
    Ok(dhcp::Scope {
        min_time: config.min_lease_time,
        default_time: config.default_lease_time,
        max_time: config.max_lease_time,
        forced: numbers(&config.forced_options),
        suppressed: numbers(&config.suppressed_options),
        options,
    })
}

fn condition(condition: &settings::DhcpCondition) -> Option<dhcp::Condition> {
    use dhcp::ConditionKind as K;
    let kinds =
        [K::Mac, K::MacWildcard, K::VendorClass, K::VendorClassWildcard, K::UserClass, K::UserClassWildcard];
    let kind = *kinds.get(usize::try_from(condition.condition_type).ok()?)?;
    Some(dhcp::Condition { inclusive: condition.inclusive, kind, value: condition.value.clone() })
}

/// A host-only network of macOS's kind: its own DHCP server has the first address of the range.
fn host_only_server(network: &settings::HostOnlyNetwork) -> Option<DhcpServer> {
    let lower: Ipv4Addr = network.ip_lower.parse().ok()?;
    let second = Ipv4Addr::from(u32::from(lower).checked_add(1)?);
    Some(DhcpServer {
        network_name: format!("{HOST_ONLY_PREFIX}{}", network.name),
        ip_address: network.ip_lower.clone(),
        network_mask: network.mask.clone(),
        lower_ip: second.to_string(),
        upper_ip: network.ip_upper.clone(),
        enabled: true,
        ..DhcpServer::default()
    })
}

/// Where things are in a NAT network: the first addresses that no loopback mapping has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) network: Ipv4Addr,
    pub(crate) prefix: u8,
    pub(crate) mask: u32,
    pub(crate) gateway: Ipv4Addr,
    dhcp: Ipv4Addr,
    lower: Ipv4Addr,
    upper: Ipv4Addr,
}

impl Places {
    pub(crate) fn of(network: &settings::NatNetwork) -> ApiResult<Self> {
        let (address, prefix) = parse_cidr(&network.network)?;
        let mask = u32::MAX << (32 - u32::from(prefix));
        let base = u32::from(address) & mask;
        let mut free = (1..!mask).filter(|n| !network.loopbacks.iter().any(|l| l.offset == *n));
        let mut next = || Ipv4Addr::from(base | free.next().unwrap_or(1));
        let gateway = next();
        let (dhcp, lower) = if network.need_dhcp { (next(), next()) } else { (gateway, gateway) };
        let upper = Ipv4Addr::from((base | !mask) - 1);
        Ok(Self { network: Ipv4Addr::from(base), prefix, mask, gateway, dhcp, lower, upper })
    }
}

/// A network in CIDR notation, as NAT networks take it.
pub(crate) fn parse_cidr(text: &str) -> ApiResult<(Ipv4Addr, u8)> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        Some((address.parse::<Ipv4Addr>().ok()?, prefix.parse::<u8>().ok().filter(|p| *p <= 32)?))
    };
    let (address, prefix) =
        parse().ok_or_else(|| ApiError::fail(format!("{text} is not a valid IPv4 CIDR notation")))?;
    if prefix > 30 {
        return Err(ApiError::fail(format!("{text} network is too small")));
    }
    if prefix == 0 {
        return Err(ApiError::fail(format!("{text} specifies zero prefix")));
    }
    Ok((address, prefix))
}

fn nat_network(network: &settings::NatNetwork) -> ApiResult<NatNetwork> {
    let places = Places::of(network)?;
    let mut rules = Vec::new();
    for (v6, rule) in
        network.rules4.iter().map(|r| (false, r)).chain(network.rules6.iter().map(|r| (true, r)))
    {
        let any = if v6 { IpAddr::from([0; 16]) } else { IpAddr::from([0; 4]) };
        let address = |text: &str| if text.is_empty() { Some(any) } else { text.parse::<IpAddr>().ok() };
        let (Some(host), Some(guest)) = (address(&rule.host_ip), address(&rule.guest_ip)) else {
            tracing::warn!(rule = rule.name, "a port-forwarding rule has no addresses and is left out");
            continue;
        };
        rules.push(Rule {
            // Names are of one family each.
            name: format!("{}{}", if v6 { "ipv6/" } else { "" }, rule.name),
            protocol: match rule.protocol {
                settings::NatProtocol::Tcp => Protocol::Tcp,
                settings::NatProtocol::Udp => Protocol::Udp,
            },
            host,
            host_port: rule.host_port,
            guest: Some(guest),
            guest_port: rule.guest_port,
        });
    }
    let base = u32::from(places.network);
    let loopback = |l: &settings::NatLoopback| {
        Some((l.address.parse::<IpAddr>().ok()?, Ipv4Addr::from(base.checked_add(l.offset)?)))
    };
    let ipv6 = network.ipv6_prefix.split('/').next().and_then(|p| p.parse().ok()).filter(|_| network.ipv6);
    Ok(NatNetwork {
        network: places.network,
        prefix: places.prefix,
        gateway: places.gateway,
        ipv6,
        ipv6_default_route: network.advertise_default_ipv6_route,
        rules,
        loopbacks: network.loopbacks.iter().filter_map(loopback).collect(),
    })
}

/// The host's name servers as machines reach them: those on the loopback interface by a mapping, or through the router.
fn name_servers(network: &settings::NatNetwork, places: &Places) -> Option<String> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let mut servers: Vec<String> = Vec::new();
    let mut unmapped = false;
    for line in text.lines().filter_map(|l| l.trim().strip_prefix("nameserver")) {
        let Ok(address) = line.trim().parse::<Ipv4Addr>() else { continue };
        let address = if address.is_unspecified() { Ipv4Addr::LOCALHOST } else { address };
        if !address.is_loopback() {
            servers.push(address.to_string());
            continue;
        }
        match network.loopbacks.iter().find(|l| l.address == address.to_string()) {
            Some(mapping) => {
                servers.push(Ipv4Addr::from(u32::from(places.network) | mapping.offset).to_string())
            }
            None => unmapped = true,
        }
    }
    if servers.is_empty() && unmapped {
        servers.push(places.gateway.to_string());
    }
    (!servers.is_empty()).then(|| servers.join(" "))
}

/// The host's domain.
fn domain() -> Option<String> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let line = text.lines().find_map(|l| {
        let l = l.trim();
        l.strip_prefix("domain ").or_else(|| l.strip_prefix("search "))
    })?;
    let name = line.split_whitespace().next()?;
    (!name.starts_with('.')).then(|| name.to_owned())
}

/// The prefix of a NAT network's IPv6 addresses that VirtualBox makes from its IPv4 ones.
pub(crate) fn ipv6_prefix(network: Ipv4Addr) -> String {
    let [_, high, low, _] = network.octets();
    let prefix = [0xfd17, 0x625c, 0xf037, u16::from_be_bytes([high, low]), 0, 0, 0, 0];
    format!("{}/64", std::net::Ipv6Addr::from(prefix))
}

/// Every internal network that a machine is plugged into.
pub(crate) fn internal_networks(state: &State) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for machine in state.order.iter().filter_map(|id| state.machines.get(id)) {
        let internal = machine.settings.hardware.network.iter().filter(|n| {
            n.enabled
                && n.attachment == settings::NetworkAttachment::Internal
                && !n.internal_network.is_empty()
        });
        names.extend(internal.map(|n| n.internal_network.clone()));
    }
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_a_nat_network_are_those_that_virtualbox_gives() {
        let mut network = settings::NatNetwork {
            network: "10.0.2.0/24".into(),
            loopbacks: vec![settings::NatLoopback { address: "127.0.0.1".into(), offset: 2 }],
            ..settings::NatNetwork::default()
        };
        let places = Places::of(&network).unwrap();
        let at = |n| Ipv4Addr::new(10, 0, 2, n);
        assert_eq!((places.gateway, places.dhcp, places.lower, places.upper), (at(1), at(3), at(4), at(254)));
        network.loopbacks.clear();
        let places = Places::of(&network).unwrap();
        assert_eq!((places.gateway, places.dhcp, places.lower), (at(1), at(2), at(3)));
        for wrong in ["", "10.0.2.0", "10.0.2.0/31", "10.0.2.0/0", "10.0.2.0/33"] {
            network.network = wrong.into();
            assert!(Places::of(&network).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ipv6_prefixes_are_virtualboxs() {
        assert_eq!(ipv6_prefix(Ipv4Addr::new(10, 0, 2, 0)), "fd17:625c:f037:2::/64");
        assert_eq!(ipv6_prefix(Ipv4Addr::new(10, 222, 173, 1)), "fd17:625c:f037:dead::/64");
    }
}
