//! The API of DHCP servers, NAT networks, host-only networks and the host's interfaces.

use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::Arc;

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::progress::Progress;
use main_api::server::{CallTable, ReadTable, WriteTable};
use main_api::types::ObjRef;
use main_api::{ipc, paths};
use netstack::host::{self, Interface};
use netstack::{Mac, dhcp};
use settings::{
    DhcpCondition, DhcpConfig, DhcpGroup, DhcpIndividual, DhcpOption, DhcpServer, NatNetwork, NatRule,
};
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::calls::spawn;
use crate::mirror::Mirror;
use crate::networks::{self, Places, card_address, interface_network, internal_networks, parse_cidr};
use crate::objects::{self, DhcpScope, Object, uuid_element};
use crate::svc::{Context, State};
use crate::view::gone;

/// Number of the option whose value is the server's netmask.
const SUBNET_MASK: i32 = 1;

pub(crate) fn reads(t: &mut ReadTable<Context>) {
    t.add(IVirtualBox::DHCPServers, |c| {
        let state = c.svc.state.lock();
        let servers = &state.global.settings.dhcp_servers;
        servers
            .iter()
            .map(|s| ObjRef::new(Object::DhcpServer(s.network_name.clone()).network_path()))
            .collect()
    })
    .add(IVirtualBox::NATNetworks, |c| {
        let state = c.svc.state.lock();
        let networks = &state.global.settings.nat_networks;
        networks
            .iter()
            .map(|n| ObjRef::new(Object::NatNetwork(n.network_name.clone()).network_path()))
            .collect()
    })
    .add(IVirtualBox::HostOnlyNetworks, |c| {
        let state = c.svc.state.lock();
        let networks = &state.global.settings.host_only_networks;
        networks.iter().map(|n| ObjRef::new(Object::HostOnlyNetwork(n.uuid).network_path())).collect()
    })
    .add(IVirtualBox::InternalNetworks, |c| internal_networks(&c.svc.state.lock()))
    .add(IVirtualBox::GenericNetworkDrivers, |c| {
        let state = c.svc.state.lock();
        let cards = state.machines.values().flat_map(|m| &m.settings.hardware.network);
        let mut names: Vec<String> =
            cards.filter(|n| !n.generic_driver.is_empty()).map(|n| n.generic_driver.clone()).collect();
        names.sort();
        names.dedup();
        names
    })
    .add(IHost::NetworkInterfaces, |_| host::interfaces().iter().map(interface_ref).collect());
    dhcp_reads(t);
    nat_reads(t);
    type H = IHostOnlyNetwork;
    t.add_fallible(H::NetworkName, |c| host_only(c, |n| n.name.clone()))
        .add_fallible(H::Enabled, |c| host_only(c, |n| n.enabled))
        .add_fallible(H::NetworkMask, |c| host_only(c, |n| n.mask.clone()))
        .add_fallible(H::LowerIP, |c| host_only(c, |n| n.ip_lower.clone()))
        .add_fallible(H::UpperIP, |c| host_only(c, |n| n.ip_upper.clone()))
        .add_fallible(H::Id, |c| host_only(c, |n| n.uuid.to_string()));
    type I = IHostNetworkInterface;
    t.add_fallible(I::Name, |c| interface(c, |i| i.name.clone()))
        .add_fallible(I::ShortName, |c| interface(c, |i| i.name.clone()))
        .add_fallible(I::Id, |c| interface(c, |i| i.id().to_string()))
        .add_fallible(I::NetworkName, |c| interface(c, |i| interface_network(&i.name)))
        .add_fallible(I::DHCPEnabled, |c| interface(c, |_| false))
        .add_fallible(I::IPAddress, |c| {
            interface(c, |i| i.ipv4.map_or(Ipv4Addr::UNSPECIFIED, |(address, _)| address).to_string())
        })
        .add_fallible(I::NetworkMask, |c| {
            interface(c, |i| i.ipv4.map_or(Ipv4Addr::UNSPECIFIED, |(_, mask)| mask).to_string())
        })
        .add_fallible(I::IPV6Supported, |c| {
            interface(c, |i| std::path::Path::new(&format!("/proc/sys/net/ipv6/conf/{}", i.name)).exists())
        })
        .add_fallible(I::IPV6Address, |c| {
            interface(c, |i| i.ipv6.map_or_else(String::new, |(address, _)| address.to_string()))
        })
        .add_fallible(I::IPV6NetworkMaskPrefixLength, |c| {
            interface(c, |i| i.ipv6.map_or(0, |(_, length)| length))
        })
        .add_fallible(I::HardwareAddress, |c| interface(c, |i| i.mac.to_string()))
        .add_fallible(I::MediumType, |c| interface(c, |_| api::HostNetworkInterfaceMediumType::Ethernet))
        .add_fallible(I::Status, |c| {
            interface(c, |i| match i.up {
                true => api::HostNetworkInterfaceStatus::Up,
                false => api::HostNetworkInterfaceStatus::Down,
            })
        })
        .add_fallible(I::InterfaceType, |c| interface(c, interface_type))
        .add_fallible(I::Wireless, |c| interface(c, |i| i.wireless));
}

fn interface_type(interface: &Interface) -> api::HostNetworkInterfaceType {
    match interface.host_only {
        true => api::HostNetworkInterfaceType::HostOnly,
        false => api::HostNetworkInterfaceType::Bridged,
    }
}

fn interface_ref(interface: &Interface) -> ObjRef<IHostNetworkInterface> {
    ObjRef::new(Object::HostInterface(interface.name.clone()).network_path())
}

fn interface<T>(c: &Context, read: impl FnOnce(&Interface) -> T) -> ApiResult<T> {
    let Object::HostInterface(name) = &c.object else { return Err(gone()) };
    host::interface(name).map(|i| read(&i)).map_err(|_| gone())
}

fn host_only<T>(c: &Context, read: impl FnOnce(&settings::HostOnlyNetwork) -> T) -> ApiResult<T> {
    let Object::HostOnlyNetwork(id) = c.object else { return Err(gone()) };
    let state = c.svc.state.lock();
    state.global.settings.host_only_networks.iter().find(|n| n.uuid == id).map(read).ok_or_else(gone)
}

/// The DHCP server that the object is, or belongs to.
fn server_name(c: &Context) -> ApiResult<String> {
    match &c.object {
        Object::DhcpServer(name) | Object::DhcpConfig(name, _) | Object::DhcpCondition(name, ..) => {
            Ok(name.clone())
        }
        _ => Err(gone()),
    }
}

fn server<T>(c: &Context, read: impl FnOnce(&DhcpServer) -> T) -> ApiResult<T> {
    let name = server_name(c)?;
    let state = c.svc.state.lock();
    state.global.settings.dhcp_servers.iter().find(|s| s.network_name == name).map(read).ok_or_else(gone)
}

/// Changes the DHCP server: settings first, then the one that runs.
fn edit_server<T>(c: &Context, change: impl FnOnce(&mut DhcpServer, &State) -> ApiResult<T>) -> ApiResult<T> {
    let name = server_name(c)?;
    let result = {
        let mut state = c.svc.state.lock();
        let servers = &state.global.settings.dhcp_servers;
        let mut server = servers.iter().find(|s| s.network_name == name).cloned().ok_or_else(gone)?;
        let result = change(&mut server, &state)?;
        state.global.edit(|g| {
            if let Some(old) = g.dhcp_servers.iter_mut().find(|s| s.network_name == name) {
                *old = server;
            }
        })?;
        result
    };
    c.svc.refresh_network(&name)?;
    Ok(result)
}

/// The name by which a client's configuration is found.
pub(crate) fn client_key(client: &DhcpIndividual) -> String {
    if client.mac_address.is_empty() {
        format!("{}/{}", client.vm_name, client.slot)
    } else {
        client.mac_address.to_ascii_lowercase()
    }
}

/// The part of a server's settings that `scope` names.
pub(crate) fn config_of<'a>(server: &'a DhcpServer, scope: &DhcpScope) -> Option<&'a DhcpConfig> {
    match scope {
        DhcpScope::Global => Some(&server.options),
        DhcpScope::Group(name) => server.groups.iter().find(|g| g.name == *name).map(|g| &g.config),
        DhcpScope::Client(key) => server.individual.iter().find(|i| client_key(i) == *key).map(|i| &i.config),
    }
}

fn config_mut<'a>(server: &'a mut DhcpServer, scope: &DhcpScope) -> Option<&'a mut DhcpConfig> {
    match scope {
        DhcpScope::Global => Some(&mut server.options),
        DhcpScope::Group(name) => server.groups.iter_mut().find(|g| g.name == *name).map(|g| &mut g.config),
        DhcpScope::Client(key) => {
            server.individual.iter_mut().find(|i| client_key(i) == *key).map(|i| &mut i.config)
        }
    }
}

fn scope_of(c: &Context) -> ApiResult<DhcpScope> {
    match &c.object {
        Object::DhcpConfig(_, scope) => Ok(scope.clone()),
        _ => Err(gone()),
    }
}

fn config<T>(c: &Context, read: impl FnOnce(&DhcpConfig) -> T) -> ApiResult<T> {
    let scope = scope_of(c)?;
    server(c, |s| config_of(s, &scope).map(read))?.ok_or_else(gone)
}

fn edit_config<T>(c: &Context, change: impl FnOnce(&mut DhcpConfig) -> ApiResult<T>) -> ApiResult<T> {
    let scope = scope_of(c)?;
    edit_server(c, |s, _| change(config_mut(s, &scope).ok_or_else(gone)?))
}

fn client<T>(c: &Context, read: impl FnOnce(&DhcpIndividual) -> T) -> ApiResult<T> {
    let DhcpScope::Client(key) = scope_of(c)? else { return Err(gone()) };
    server(c, |s| s.individual.iter().find(|i| client_key(i) == key).map(read))?.ok_or_else(gone)
}

fn condition<T>(c: &Context, read: impl FnOnce(&DhcpCondition) -> T) -> ApiResult<T> {
    let Object::DhcpCondition(_, group, at) = &c.object else { return Err(gone()) };
    let found = |s: &DhcpServer| {
        s.groups.iter().find(|g| g.name == *group).and_then(|g| g.conditions.get(*at)).map(read)
    };
    server(c, found)?.ok_or_else(gone)
}

fn edit_condition(c: &Context, change: impl FnOnce(&mut DhcpCondition) -> ApiResult<()>) -> ApiResult<()> {
    let Object::DhcpCondition(_, group, at) = c.object.clone() else { return Err(gone()) };
    edit_server(c, |s, _| {
        let group = s.groups.iter_mut().find(|g| g.name == group);
        change(group.and_then(|g| g.conditions.get_mut(at)).ok_or_else(gone)?)
    })
}

fn numbers(text: &str) -> Vec<i32> {
    text.split([' ', ',']).filter_map(|part| part.trim().parse().ok()).collect()
}

fn number_text(numbers: &[i32]) -> ApiResult<String> {
    if let Some(wrong) = numbers.iter().find(|n| !(1..=254).contains(*n)) {
        return Err(ApiError::invalid_arg(format!("Invalid DHCP option: {wrong}")));
    }
    Ok(numbers.iter().map(i32::to_string).collect::<Vec<_>>().join(" "))
}

fn condition_type(number: i32) -> api::DHCPGroupConditionType {
    use main_api::enums::ApiEnum as _;
    let all = api::DHCPGroupConditionType::ALL;
    usize::try_from(number).ok().and_then(|n| all.get(n)).copied().unwrap_or(api::DHCPGroupConditionType::MAC)
}

fn dhcp_reads(t: &mut ReadTable<Context>) {
    type S = IDHCPServer;
    t.add_fallible(S::Enabled, |c| server(c, |s| s.enabled))
        .add_fallible(S::IPAddress, |c| server(c, |s| s.ip_address.clone()))
        .add_fallible(S::NetworkMask, |c| server(c, |s| s.network_mask.clone()))
        .add_fallible(S::NetworkName, |c| server(c, |s| s.network_name.clone()))
        .add_fallible(S::LowerIP, |c| server(c, |s| s.lower_ip.clone()))
        .add_fallible(S::UpperIP, |c| server(c, |s| s.upper_ip.clone()))
        .add_fallible(S::GlobalConfig, |c| {
            server(c, |s| {
                ObjRef::new(Object::DhcpConfig(s.network_name.clone(), DhcpScope::Global).network_path())
            })
        })
        .add_fallible(S::GroupConfigs, |c| {
            let path = |s: &DhcpServer, g: &DhcpGroup| {
                Object::DhcpConfig(s.network_name.clone(), DhcpScope::Group(g.name.clone())).network_path()
            };
            server(c, |s| s.groups.iter().map(|g| ObjRef::new(path(s, g))).collect())
        })
        .add_fallible(S::IndividualConfigs, |c| {
            let path = |s: &DhcpServer, i: &DhcpIndividual| {
                Object::DhcpConfig(s.network_name.clone(), DhcpScope::Client(client_key(i))).network_path()
            };
            server(c, |s| s.individual.iter().map(|i| ObjRef::new(path(s, i))).collect())
        });
    type C = IDHCPConfig;
    t.add_fallible(C::Scope, |c| {
        Ok(match scope_of(c)? {
            DhcpScope::Global => api::DHCPConfigScope::Global,
            DhcpScope::Group(_) => api::DHCPConfigScope::Group,
            DhcpScope::Client(_) => match client(c, |i| i.mac_address.is_empty())? {
                true => api::DHCPConfigScope::MachineNIC,
                false => api::DHCPConfigScope::MAC,
            },
        })
    })
    .add_fallible(C::MinLeaseTime, |c| config(c, |d| d.min_lease_time))
    .add_fallible(C::DefaultLeaseTime, |c| config(c, |d| d.default_lease_time))
    .add_fallible(C::MaxLeaseTime, |c| config(c, |d| d.max_lease_time))
    .add_fallible(C::ForcedOptions, |c| config(c, |d| numbers(&d.forced_options)))
    .add_fallible(C::SuppressedOptions, |c| config(c, |d| numbers(&d.suppressed_options)));
    t.add_fallible(IDHCPGroupConfig::Name, |c| match scope_of(c)? {
        DhcpScope::Group(name) => Ok(name),
        _ => Err(gone()),
    })
    .add_fallible(IDHCPGroupConfig::Conditions, |c| {
        let DhcpScope::Group(group) = scope_of(c)? else { return Err(gone()) };
        let count = server(c, |s| s.groups.iter().find(|g| g.name == group).map(|g| g.conditions.len()))?;
        let name = server_name(c)?;
        let path = |at| Object::DhcpCondition(name.clone(), group.clone(), at).network_path();
        Ok((0..count.ok_or_else(gone)?).map(|at| ObjRef::new(path(at))).collect())
    });
    t.add_fallible(IDHCPGroupCondition::Inclusive, |c| condition(c, |d| d.inclusive))
        .add_fallible(IDHCPGroupCondition::Type, |c| condition(c, |d| condition_type(d.condition_type)))
        .add_fallible(IDHCPGroupCondition::Value, |c| condition(c, |d| d.value.clone()));
    type N = IDHCPIndividualConfig;
    t.add_fallible(N::MACAddress, |c| {
        let own = client(c, Clone::clone)?;
        if !own.mac_address.is_empty() {
            return Ok(own.mac_address);
        }
        let state = c.svc.state.lock();
        card_address(&state, &own.vm_name, own.slot).map(|m| m.to_string()).ok_or_else(|| {
            ApiError::not_found(format!(
                "The machine '{}' has no network adapter {}",
                own.vm_name,
                own.slot + 1
            ))
        })
    })
    .add_fallible(N::MachineId, |c| client(c, |i| i.vm_name.clone()))
    .add_fallible(N::Slot, |c| client(c, |i| i.slot))
    .add_fallible(N::FixedAddress, |c| client(c, |i| i.fixed_address.clone()));
}

fn network_name(c: &Context) -> ApiResult<String> {
    match &c.object {
        Object::NatNetwork(name) => Ok(name.clone()),
        _ => Err(gone()),
    }
}

fn nat<T>(c: &Context, read: impl FnOnce(&NatNetwork) -> T) -> ApiResult<T> {
    let name = network_name(c)?;
    let state = c.svc.state.lock();
    state.global.settings.nat_networks.iter().find(|n| n.network_name == name).map(read).ok_or_else(gone)
}

/// Changes a NAT network. Of one that runs only what `at_run_time` says.
fn edit_nat(
    c: &Context,
    at_run_time: bool,
    change: impl FnOnce(&mut NatNetwork) -> ApiResult<()>,
) -> ApiResult<()> {
    let name = network_name(c)?;
    if !at_run_time && c.svc.nat_runs(&name) {
        return Err(ApiError::fail("Unable to change settings while NATNetwork instance is running"));
    }
    {
        let mut state = c.svc.state.lock();
        let networks = &state.global.settings.nat_networks;
        let mut network = networks.iter().find(|n| n.network_name == name).cloned().ok_or_else(gone)?;
        change(&mut network)?;
        state.global.edit(|g| {
            if let Some(old) = g.nat_networks.iter_mut().find(|n| n.network_name == name) {
                *old = network;
            }
        })?;
    }
    c.svc.refresh_network(&name)
}

fn rule_text(rule: &NatRule) -> String {
    let protocol = match rule.protocol {
        settings::NatProtocol::Tcp => "tcp",
        settings::NatProtocol::Udp => "udp",
    };
    format!(
        "{}:{protocol}:[{}]:{}:[{}]:{}",
        rule.name, rule.host_ip, rule.host_port, rule.guest_ip, rule.guest_port
    )
}

fn nat_reads(t: &mut ReadTable<Context>) {
    type N = INATNetwork;
    t.add_fallible(N::NetworkName, |c| nat(c, |n| n.network_name.clone()))
        .add_fallible(N::Enabled, |c| nat(c, |n| n.enabled))
        .add_fallible(N::Network, |c| nat(c, |n| n.network.clone()))
        .add_fallible(N::Gateway, |c| {
            nat(c, |n| Places::of(n).map_or_else(|_| String::new(), |p| p.gateway.to_string()))
        })
        .add_fallible(N::IPv6Enabled, |c| nat(c, |n| n.ipv6))
        .add_fallible(N::IPv6Prefix, |c| nat(c, |n| n.ipv6_prefix.clone()))
        .add_fallible(N::AdvertiseDefaultIPv6RouteEnabled, |c| nat(c, |n| n.advertise_default_ipv6_route))
        .add_fallible(N::NeedDhcpServer, |c| nat(c, |n| n.need_dhcp))
        .add_fallible(N::LocalMappings, |c| {
            nat(c, |n| n.loopbacks.iter().map(|l| format!("{}={}", l.address, l.offset)).collect())
        })
        .add_fallible(N::LoopbackIp6, |c| nat(c, |_| 0))
        .add_fallible(N::PortForwardRules4, |c| nat(c, |n| n.rules4.iter().map(rule_text).collect()))
        .add_fallible(N::PortForwardRules6, |c| nat(c, |n| n.rules6.iter().map(rule_text).collect()));
}

pub(crate) fn writes(t: &mut WriteTable<Context>) {
    t.add(IDHCPServer::Enabled, |c: &mut Context, on| {
        edit_server(c, |s, _| {
            s.enabled = on;
            Ok(())
        })
    });
    macro_rules! times {
        ($($attr:path => $field:ident;)*) => {$(
            t.add($attr, |c: &mut Context, seconds: u32| {
                edit_config(c, |d| {
                    d.$field = seconds;
                    Ok(())
                })
            });
        )*};
    }
    type C = IDHCPConfig;
    times! {
        C::MinLeaseTime => min_lease_time;
        C::DefaultLeaseTime => default_lease_time;
        C::MaxLeaseTime => max_lease_time;
    }
    t.add(C::ForcedOptions, |c: &mut Context, options: Vec<i32>| {
        let text = number_text(&options)?;
        edit_config(c, |d| {
            d.forced_options = text;
            Ok(())
        })
    })
    .add(C::SuppressedOptions, |c: &mut Context, options: Vec<i32>| {
        let text = number_text(&options)?;
        edit_config(c, |d| {
            d.suppressed_options = text;
            Ok(())
        })
    })
    .add(IDHCPGroupConfig::Name, |c: &mut Context, name: String| {
        let DhcpScope::Group(old) = scope_of(c)? else { return Err(gone()) };
        edit_server(c, |s, _| {
            if name.is_empty() || s.groups.iter().any(|g| g.name == name && g.name != old) {
                return Err(ApiError::invalid_arg(format!("A group cannot be called '{name}'")));
            }
            s.groups.iter_mut().find(|g| g.name == old).ok_or_else(gone)?.name = name;
            Ok(())
        })
    })
    .add(IDHCPGroupCondition::Inclusive, |c: &mut Context, on| {
        edit_condition(c, |d| {
            d.inclusive = on;
            Ok(())
        })
    })
    .add(IDHCPGroupCondition::Type, |c: &mut Context, kind: api::DHCPGroupConditionType| {
        edit_condition(c, |d| {
            check_condition(kind, &d.value)?;
            d.condition_type = kind as i32;
            Ok(())
        })
    })
    .add(IDHCPGroupCondition::Value, |c: &mut Context, value: String| {
        edit_condition(c, |d| {
            check_condition(condition_type(d.condition_type), &value)?;
            d.value = value;
            Ok(())
        })
    })
    .add(IDHCPIndividualConfig::FixedAddress, |c: &mut Context, text: String| {
        let DhcpScope::Client(key) = scope_of(c)? else { return Err(gone()) };
        edit_server(c, |s, _| {
            if !text.is_empty() {
                check_fixed(s, &text)?;
            }
            s.individual.iter_mut().find(|i| client_key(i) == key).ok_or_else(gone)?.fixed_address = text;
            Ok(())
        })
    });
    nat_writes(t);
    type H = IHostOnlyNetwork;
    macro_rules! host_only_writes {
        ($($attr:path, $ty:ty => |$n:ident, $value:ident| $body:expr;)*) => {$(
            t.add($attr, |c: &mut Context, $value: $ty| {
                let Object::HostOnlyNetwork(id) = c.object else { return Err(gone()) };
                let name = {
                    let mut state = c.svc.state.lock();
                    let networks = &state.global.settings.host_only_networks;
                    let mut changed = networks.iter().find(|n| n.uuid == id).cloned().ok_or_else(gone)?;
                    let $n = &mut changed;
                    $body;
                    let name = changed.name.clone();
                    state.global.edit(|g| {
                        if let Some(old) = g.host_only_networks.iter_mut().find(|n| n.uuid == id) {
                            *old = changed;
                        }
                    })?;
                    name
                };
                c.svc.refresh_network(&format!("hostonly-{name}"))
            });
        )*};
    }
    host_only_writes! {
        H::NetworkName, String => |n, value| n.name = value;
        H::Enabled, bool => |n, value| n.enabled = value;
        H::NetworkMask, String => |n, value| n.mask = ipv4("network mask", &value)?;
        H::LowerIP, String => |n, value| n.ip_lower = ipv4("lower address", &value)?;
        H::UpperIP, String => |n, value| n.ip_upper = ipv4("upper address", &value)?;
        H::Id, String => |n, value| {
            n.uuid = Uuid::try_parse(&value).map_err(|_| ApiError::invalid_arg(format!("Invalid UUID '{value}'")))?;
        };
    }
}

fn ipv4(what: &str, text: &str) -> ApiResult<String> {
    let parsed = text.parse::<Ipv4Addr>();
    parsed.map(|a| a.to_string()).map_err(|_| ApiError::invalid_arg(format!("Invalid {what}: {text}")))
}

fn check_fixed(server: &DhcpServer, text: &str) -> ApiResult<()> {
    let invalid = || {
        ApiError::invalid_arg(format!(
            "The fixed address '{text}' is no address of the network of the DHCP server, {} with mask {}",
            server.ip_address, server.network_mask
        ))
    };
    let address = text.parse::<Ipv4Addr>().map_err(|_| invalid())?;
    let (Ok(own), Ok(mask)) =
        (server.ip_address.parse::<Ipv4Addr>(), server.network_mask.parse::<Ipv4Addr>())
    else {
        return Ok(());
    };
    let host = u32::from(address) & !u32::from(mask);
    let same = (u32::from(address) ^ u32::from(own)) & u32::from(mask) == 0;
    if same && address != own && host != 0 && host != !u32::from(mask) { Ok(()) } else { Err(invalid()) }
}

fn check_condition(kind: api::DHCPGroupConditionType, value: &str) -> ApiResult<()> {
    if kind == api::DHCPGroupConditionType::MAC && value.parse::<Mac>().is_err() {
        return Err(ApiError::invalid_arg(format!("Not a valid MAC address: {value}")));
    }
    if value.is_empty() {
        return Err(ApiError::invalid_arg("The value of a condition cannot be empty"));
    }
    Ok(())
}

fn nat_writes(t: &mut WriteTable<Context>) {
    type N = INATNetwork;
    t.add(N::NetworkName, |c: &mut Context, name: String| {
        if name.is_empty() {
            return Err(ApiError::invalid_arg("Network name cannot be empty"));
        }
        let taken = c.svc.state.lock().global.settings.nat_networks.iter().any(|n| n.network_name == name);
        if taken && network_name(c)? != name {
            return Err(ApiError::invalid_arg(format!("NAT network '{name}' exists already")));
        }
        edit_nat(c, false, |n| {
            n.network_name = name;
            Ok(())
        })
    })
    .add(N::Enabled, |c: &mut Context, on| {
        edit_nat(c, true, |n| {
            n.enabled = on;
            Ok(())
        })
    })
    .add(N::Network, |c: &mut Context, text: String| {
        let (address, prefix) = parse_cidr(&text)?;
        let mask = u32::MAX << (32 - u32::from(prefix));
        if u32::from(address) & !mask != 0 {
            return Err(ApiError::fail(format!(
                "{text}: the specified address is longer than the specified prefix"
            )));
        }
        let cidr = format!("{address}/{prefix}");
        if nat(c, |n| n.network == cidr)? {
            return Ok(());
        }
        edit_nat(c, false, |n| {
            // Forwarded ports follow their machines into the new network.
            if let Ok((old, old_prefix)) = parse_cidr(&n.network) {
                let old_mask = u32::MAX << (32 - u32::from(old_prefix));
                for rule in &mut n.rules4 {
                    let Ok(guest) = rule.guest_ip.parse::<Ipv4Addr>() else { continue };
                    let host = u32::from(guest) & !old_mask;
                    if u32::from(guest) & old_mask == u32::from(old) & old_mask && host & mask == 0 {
                        rule.guest_ip = Ipv4Addr::from(u32::from(address) | host).to_string();
                    }
                }
            }
            n.network = cidr;
            Ok(())
        })
    })
    .add(N::IPv6Enabled, |c: &mut Context, on: bool| {
        if nat(c, |n| n.ipv6 == on)? {
            return Ok(());
        }
        edit_nat(c, false, |n| {
            if on && n.ipv6_prefix.is_empty() {
                n.ipv6_prefix = networks::ipv6_prefix(parse_cidr(&n.network)?.0);
            }
            n.ipv6 = on;
            Ok(())
        })
    })
    .add(N::IPv6Prefix, |c: &mut Context, text: String| {
        let prefix = ipv6_prefix(text.trim())?;
        if nat(c, |n| n.ipv6_prefix == prefix)? {
            return Ok(());
        }
        edit_nat(c, false, |n| {
            if prefix.is_empty() && n.ipv6 {
                return Err(ApiError::fail("Setting an empty IPv6 prefix when IPv6 is enabled"));
            }
            if n.rules6.is_empty() {
                n.ipv6_prefix = prefix;
            }
            Ok(())
        })
    })
    .add(N::AdvertiseDefaultIPv6RouteEnabled, |c: &mut Context, on: bool| {
        if nat(c, |n| n.advertise_default_ipv6_route == on)? {
            return Ok(());
        }
        edit_nat(c, false, |n| {
            n.advertise_default_ipv6_route = on;
            Ok(())
        })
    })
    .add(N::NeedDhcpServer, |c: &mut Context, on: bool| {
        if nat(c, |n| n.need_dhcp == on)? {
            return Ok(());
        }
        edit_nat(c, false, |n| {
            n.need_dhcp = on;
            Ok(())
        })
    })
    .add(N::LoopbackIp6, |_: &mut Context, offset: i32| match offset {
        0 => Ok(()),
        _ => {
            Err(ApiError::new(ResultCode::NotSupported, "The host's IPv6 loopback address cannot be mapped"))
        }
    });
}

/// An IPv6 prefix in the form in which it is kept.
fn ipv6_prefix(text: &str) -> ApiResult<String> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let (address, length) = text.split_once('/').unwrap_or((text, "64"));
    let address: std::net::Ipv6Addr =
        address.parse().map_err(|_| ApiError::invalid_arg(format!("{text} is not a valid IPv6 prefix")))?;
    if length != "64" {
        return Err(ApiError::invalid_arg(format!("Invalid IPv6 prefix length {length}, must be 64")));
    }
    let first = address.octets()[0];
    if first & 0xe0 != 0x20 && first & 0xfe != 0xfc {
        return Err(ApiError::invalid_arg(format!("IPv6 prefix {address} is not unicast")));
    }
    if address.to_bits() & u128::from(u64::MAX) != 0 {
        let text = format!("Non-zero bits in the interface ID part of the IPv6 prefix {address}/64");
        return Err(ApiError::invalid_arg(text));
    }
    Ok(format!("{address}/64"))
}

pub(crate) fn calls(t: &mut CallTable<Context>) {
    t.add(IVMProcessControl::OpenNetwork, |c, (slot, attachment, name, mac, policy)| {
        c.svc.open_network(&c.peer, slot, attachment, &name, &mac, policy).map(Into::into)
    });
    dhcp_calls(t);
    nat_calls(t);
    host_calls(t);
    t.add(IVirtualBox::CreateHostOnlyNetwork, |c, (name,)| {
        check_name(&name)?;
        let mut state = c.svc.state.lock();
        if state.global.settings.host_only_networks.iter().any(|n| n.name == name) {
            return Err(ApiError::invalid_arg(format!("Host-only network '{name}' exists already")));
        }
        let uuid = Uuid::new_v4();
        let network = settings::HostOnlyNetwork { uuid, name, enabled: true, ..Default::default() };
        state.global.edit(|g| g.host_only_networks.push(network))?;
        Ok(ObjRef::new(Object::HostOnlyNetwork(uuid).network_path()))
    })
    .add(IVirtualBox::FindHostOnlyNetworkByName, |c, (name,)| {
        let state = c.svc.state.lock();
        let found = state.global.settings.host_only_networks.iter().find(|n| n.name == name);
        let found = found.ok_or_else(|| not_found("host-only network", &name))?;
        Ok(ObjRef::new(Object::HostOnlyNetwork(found.uuid).network_path()))
    })
    .add(IVirtualBox::FindHostOnlyNetworkById, |c, (id,)| {
        let state = c.svc.state.lock();
        let found = state.global.settings.host_only_networks.iter().find(|n| n.uuid.to_string() == id);
        let found = found.ok_or_else(|| not_found("host-only network", &id))?;
        Ok(ObjRef::new(Object::HostOnlyNetwork(found.uuid).network_path()))
    })
    .add(IVirtualBox::RemoveHostOnlyNetwork, |c, (network,)| {
        let Some(Object::HostOnlyNetwork(id)) = objects::parse(network.path()) else {
            return Err(ApiError::invalid_arg("Argument aNetwork is invalid (must not be NULL)"));
        };
        c.svc.state.lock().global.edit(|g| g.host_only_networks.retain(|n| n.uuid != id))
    });
}

fn not_found(what: &str, name: &str) -> ApiError {
    ApiError::not_found(format!("Could not find a {what} named '{name}'"))
}

fn check_name(name: &str) -> ApiResult<()> {
    if name.is_empty() || name.len() > 200 || name.chars().any(|c| c.is_control()) {
        return Err(ApiError::invalid_arg(
            "A network's name must not be empty, long or contain control characters",
        ));
    }
    Ok(())
}

fn dhcp_calls(t: &mut CallTable<Context>) {
    t.add(IVirtualBox::CreateDHCPServer, |c, (name,)| {
        check_name(&name)?;
        let mut state = c.svc.state.lock();
        if state.global.settings.dhcp_servers.iter().any(|s| s.network_name == name) {
            return Err(ApiError::invalid_arg(format!("DHCP server '{name}' already exists")));
        }
        let server = DhcpServer {
            network_name: name.clone(),
            ip_address: "0.0.0.0".into(),
            network_mask: "0.0.0.0".into(),
            lower_ip: "0.0.0.0".into(),
            upper_ip: "0.0.0.0".into(),
            ..DhcpServer::default()
        };
        state.global.edit(|g| g.dhcp_servers.push(server))?;
        Ok(ObjRef::new(Object::DhcpServer(name).network_path()))
    })
    .add(IVirtualBox::FindDHCPServerByNetworkName, |c, (name,)| {
        let state = c.svc.state.lock();
        if !state.global.settings.dhcp_servers.iter().any(|s| s.network_name == name) {
            return Err(not_found("DHCP server", &name));
        }
        Ok(ObjRef::new(Object::DhcpServer(name).network_path()))
    })
    .add(IVirtualBox::RemoveDHCPServer, |c, (server,)| {
        let Some(Object::DhcpServer(name)) = objects::parse(server.path()) else {
            return Err(ApiError::invalid_arg("Argument aServer is invalid (must not be NULL)"));
        };
        c.svc.state.lock().global.edit(|g| g.dhcp_servers.retain(|s| s.network_name != name))?;
        c.svc.stop_dhcp(&name)?;
        // A later server of this name is another one.
        c.svc.set_dhcp_stopped(&name, false)
    });
    type S = IDHCPServer;
    t.add(S::SetConfiguration, |c, (address, mask, lower, upper)| {
        let invalid = |what: &str, text: &str| ApiError::invalid_arg(format!("Invalid {what}: {text}"));
        let parse = |what: &str, text: &str| text.parse::<Ipv4Addr>().map_err(|_| invalid(what, text));
        let check = dhcp::Config {
            address: parse("server address", &address)?,
            mask: parse("netmask", &mask)?,
            lower: parse("range lower address", &lower)?,
            upper: parse("range upper address", &upper)?,
            leases: Default::default(),
            global: Default::default(),
            groups: Vec::new(),
            clients: Vec::new(),
        };
        check.check().map_err(|e| ApiError::invalid_arg(capital(&e.to_string())))?;
        edit_server(c, |s, _| {
            (s.ip_address, s.network_mask, s.lower_ip, s.upper_ip) = (address, mask, lower, upper);
            Ok(())
        })
    })
    .add(S::Start, |c, (_trunk, _kind)| {
        let name = server_name(c)?;
        if !server(c, |s| s.enabled)? {
            return Ok(());
        }
        c.svc.start_network(&name)
    })
    .add(S::Stop, |c, ()| c.svc.stop_dhcp(&server_name(c)?))
    .add(S::Restart, |c, ()| {
        let name = server_name(c)?;
        if !c.svc.network_runs(&name) {
            return Err(ApiError::fail(format!("The DHCP server of the network '{name}' is not running")));
        }
        c.svc.set_dhcp_stopped(&name, true)?;
        c.svc.set_dhcp_stopped(&name, false)
    })
    .add(S::FindLeaseByMAC, |c, (mac, kind)| {
        if kind != 0 {
            return Err(ApiError::invalid_arg("flags must be zero (not 0x1)"));
        }
        let name = server_name(c)?;
        let mac: Mac =
            mac.parse().map_err(|_| ApiError::invalid_arg(format!("Invalid MAC address: {mac}")))?;
        let leases = dhcp::Leases::load(&c.svc.leases_file(&name))
            .map_err(|e| ApiError::new(ResultCode::FileError, e.to_string()))?;
        let lease = leases
            .of_card(mac)
            .ok_or_else(|| ApiError::not_found(format!("Could not find a lease for {mac}")))?;
        // The file says what was when it was written.
        let over = lease.state == dhcp::LeaseState::Acked && lease.expires() * 1000 < crate::svc::now_ms();
        let state = if over { "expired" } else { lease.state.name() };
        Ok((lease.address.to_string(), state.to_owned(), lease.issued, lease.expires()))
    })
    .add(S::GetConfig, |c, (scope, name, slot, may_add)| get_config(c, scope, &name, slot, may_add));
    type C = IDHCPConfig;
    t.add(C::SetOption, |c, (code, encoding, value)| {
        let hex = encoding == api::DHCPOptionEncoding::Hex;
        if code == SUBNET_MASK {
            let is_global = scope_of(c)? == DhcpScope::Global;
            let mask: Ipv4Addr = value
                .parse()
                .map_err(|_| ApiError::invalid_arg(format!("Invalid value '{value}' for the netmask")))?;
            if hex || !is_global {
                return Err(ApiError::invalid_arg("The netmask is one address, for all clients"));
            }
            return edit_server(c, |s, _| {
                s.network_mask = mask.to_string();
                Ok(())
            });
        }
        dhcp::options::encode(code, &value, hex).map_err(|e| ApiError::invalid_arg(e.to_string()))?;
        edit_config(c, |d| {
            let encoding = i32::from(hex);
            match d.options.iter_mut().find(|o| o.code == code) {
                Some(option) => (option.value, option.encoding) = (value, encoding),
                None => d.options.push(DhcpOption { code, value, encoding }),
            }
            d.options.sort_by_key(|o| o.code);
            Ok(())
        })
    })
    .add(C::RemoveOption, |c, (code,)| {
        edit_config(c, |d| {
            let before = d.options.len();
            d.options.retain(|o| o.code != code);
            if d.options.len() == before {
                return Err(ApiError::not_found(format!("DHCP option {code} is not set")));
            }
            Ok(())
        })
    })
    .add(C::RemoveAllOptions, |c, ()| {
        edit_config(c, |d| {
            d.options.clear();
            Ok(())
        })
    })
    .add(C::GetOption, |c, (code,)| {
        config(c, |d| d.options.iter().find(|o| o.code == code).map(|o| (o.value.clone(), encoding(o))))?
            .ok_or_else(|| ApiError::not_found(format!("DHCP option {code} is not set")))
    })
    .add(C::GetAllOptions, |c, ()| {
        let netmask = match scope_of(c)? {
            DhcpScope::Global => Some(server(c, |s| s.network_mask.clone())?),
            _ => None,
        };
        let mask = netmask.map(|value| DhcpOption { code: SUBNET_MASK, value, encoding: 0 });
        let all: Vec<DhcpOption> = mask.into_iter().chain(config(c, |d| d.options.clone())?).collect();
        Ok((
            all.iter().map(|o| o.code).collect(),
            all.iter().map(encoding).collect(),
            all.iter().map(|o| o.value.clone()).collect(),
        ))
    })
    .add(C::Remove, |c, ()| {
        let scope = scope_of(c)?;
        edit_server(c, |s, _| match &scope {
            DhcpScope::Global => {
                Err(ApiError::new(ResultCode::AccessDenied, "Cannot delete the global config"))
            }
            DhcpScope::Group(name) => {
                s.groups.retain(|g| g.name != *name);
                Ok(())
            }
            DhcpScope::Client(key) => {
                s.individual.retain(|i| client_key(i) != *key);
                Ok(())
            }
        })
    });
    t.add(IDHCPGroupConfig::AddCondition, |c, (inclusive, kind, value)| {
        check_condition(kind, &value)?;
        let DhcpScope::Group(group) = scope_of(c)? else { return Err(gone()) };
        let at = edit_server(c, |s, _| {
            let group = s.groups.iter_mut().find(|g| g.name == group).ok_or_else(gone)?;
            group.conditions.push(DhcpCondition { inclusive, condition_type: kind as i32, value });
            Ok(group.conditions.len() - 1)
        })?;
        Ok(ObjRef::new(Object::DhcpCondition(server_name(c)?, group, at).network_path()))
    })
    .add(IDHCPGroupConfig::RemoveAllConditions, |c, ()| {
        let DhcpScope::Group(group) = scope_of(c)? else { return Err(gone()) };
        edit_server(c, |s, _| {
            s.groups.iter_mut().find(|g| g.name == group).ok_or_else(gone)?.conditions.clear();
            Ok(())
        })
    })
    .add(IDHCPGroupCondition::Remove, |c, ()| {
        let Object::DhcpCondition(_, group, at) = c.object.clone() else { return Err(gone()) };
        edit_server(c, |s, _| {
            let group = s.groups.iter_mut().find(|g| g.name == group).ok_or_else(gone)?;
            if at >= group.conditions.len() {
                return Err(gone());
            }
            group.conditions.remove(at);
            Ok(())
        })
    });
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().collect::<String>() + chars.as_str())
}

fn encoding(option: &DhcpOption) -> api::DHCPOptionEncoding {
    if option.encoding == 1 { api::DHCPOptionEncoding::Hex } else { api::DHCPOptionEncoding::Normal }
}

fn get_config(
    c: &Context,
    scope: api::DHCPConfigScope,
    name: &str,
    slot: u32,
    may_add: bool,
) -> ApiResult<ObjRef<IDHCPConfig>> {
    use api::DHCPConfigScope as S;
    let missing = |what: &str| ApiError::not_found(format!("Could not find {what} named '{name}'"));
    let found = |scope: DhcpScope| -> ApiResult<ObjRef<IDHCPConfig>> {
        Ok(ObjRef::new(Object::DhcpConfig(server_name(c)?, scope).network_path()))
    };
    let new_client = match scope {
        S::Global => return found(DhcpScope::Global),
        S::Group => {
            if name.is_empty() {
                return Err(ApiError::invalid_arg("Group name cannot be empty"));
            }
            let wanted = DhcpScope::Group(name.into());
            if !server(c, |s| config_of(s, &wanted).is_some())? {
                if !may_add {
                    return Err(missing("a group"));
                }
                edit_server(c, |s, _| {
                    s.groups.push(DhcpGroup { name: name.into(), ..DhcpGroup::default() });
                    Ok(())
                })?;
            }
            return found(wanted);
        }
        S::MAC => {
            let mac: Mac =
                name.parse().map_err(|_| ApiError::invalid_arg(format!("Invalid MAC address: {name}")))?;
            DhcpIndividual { mac_address: mac.to_string(), ..DhcpIndividual::default() }
        }
        S::MachineNIC => {
            if slot > 32 {
                let text = format!("NIC slot number ({slot}) is out of range (0..32)");
                return Err(ApiError::invalid_arg(text));
            }
            let id = match Uuid::try_parse(name) {
                Ok(id) => id,
                Err(_) => c.svc.state.lock().find(name)?.id,
            };
            DhcpIndividual { vm_name: id.to_string(), slot, ..DhcpIndividual::default() }
        }
    };
    let wanted = DhcpScope::Client(client_key(&new_client));
    if !server(c, |s| config_of(s, &wanted).is_some())? {
        if !may_add {
            return Err(missing("a configuration"));
        }
        edit_server(c, |s, _| {
            s.individual.push(new_client);
            Ok(())
        })?;
    }
    found(wanted)
}

fn nat_calls(t: &mut CallTable<Context>) {
    t.add(IVirtualBox::CreateNATNetwork, |c, (name,)| {
        check_name(&name)?;
        let mut state = c.svc.state.lock();
        if state.global.settings.nat_networks.iter().any(|n| n.network_name == name) {
            return Err(ApiError::invalid_arg(format!("NAT network '{name}' already exists")));
        }
        let network = NatNetwork {
            network_name: name.clone(),
            network: "10.0.2.0/24".into(),
            ipv6_prefix: networks::ipv6_prefix(Ipv4Addr::new(10, 0, 2, 0)),
            loopbacks: vec![settings::NatLoopback { address: "127.0.0.1".into(), offset: 2 }],
            ..NatNetwork::default()
        };
        state.global.edit(|g| g.nat_networks.push(network))?;
        Ok(ObjRef::new(Object::NatNetwork(name).network_path()))
    })
    .add(IVirtualBox::FindNATNetworkByName, |c, (name,)| {
        let state = c.svc.state.lock();
        if !state.global.settings.nat_networks.iter().any(|n| n.network_name == name) {
            return Err(not_found("NAT network", &name));
        }
        Ok(ObjRef::new(Object::NatNetwork(name).network_path()))
    })
    .add(IVirtualBox::RemoveNATNetwork, |c, (network,)| {
        let Some(Object::NatNetwork(name)) = objects::parse(network.path()) else {
            return Err(ApiError::invalid_arg("Argument aNetwork is invalid (must not be NULL)"));
        };
        c.svc.state.lock().global.edit(|g| g.nat_networks.retain(|n| n.network_name != name))?;
        c.svc.stop_network(&name)
    });
    type N = INATNetwork;
    t.add(N::AddLocalMapping, |c, (address, offset)| {
        let is_loopback = address.parse::<IpAddr>().is_ok_and(|a| a.is_loopback());
        let offset = u32::try_from(offset).ok().filter(|_| is_loopback);
        let offset = offset.ok_or_else(|| {
            ApiError::invalid_arg(format!(
                "A loopback mapping is a loopback address and an offset, not '{address}'"
            ))
        })?;
        edit_nat(c, false, |n| {
            if offset == 0 {
                n.loopbacks.retain(|l| l.address != address);
                return Ok(());
            }
            if n.loopbacks.iter().any(|l| l.offset == offset && l.address != address) {
                return Err(ApiError::invalid_arg(format!("The offset {offset} is mapped already")));
            }
            match n.loopbacks.iter_mut().find(|l| l.address == address) {
                Some(mapping) => mapping.offset = offset,
                None => n.loopbacks.push(settings::NatLoopback { address, offset }),
            }
            Ok(())
        })
    })
    .add(N::AddPortForwardRule, |c, (ipv6, name, protocol, host_ip, host_port, guest_ip, guest_port)| {
        let protocol = settings::NatProtocol::from_api(protocol)?;
        let word = match protocol {
            settings::NatProtocol::Tcp => "tcp",
            settings::NatProtocol::Udp => "udp",
        };
        let name = match name.as_str() {
            "" => format!("{word}_[{host_ip}]%{host_port}_[{guest_ip}]%{guest_port}"),
            _ => name,
        };
        for (what, text) in [("host", &host_ip), ("guest", &guest_ip)] {
            let fits = text.parse::<IpAddr>().is_ok_and(|a| a.is_ipv6() == ipv6);
            if !(fits || text.is_empty() && what == "host") {
                return Err(ApiError::invalid_arg(format!(
                    "Invalid {what} address '{text}' of the rule '{name}'"
                )));
            }
        }
        edit_nat(c, true, |n| {
            let rules = if ipv6 { &mut n.rules6 } else { &mut n.rules4 };
            if rules.iter().any(|r| r.name == name) {
                return Err(ApiError::invalid_arg("A NAT rule of this name already exists"));
            }
            if rules
                .iter()
                .any(|r| r.host_ip == host_ip && r.host_port == host_port && r.protocol == protocol)
            {
                let text = "A NAT rule for this host port and this host IP already exists";
                return Err(ApiError::invalid_arg(text));
            }
            rules.push(NatRule { name, protocol, host_ip, host_port, guest_ip, guest_port });
            rules.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(())
        })
    })
    .add(N::RemovePortForwardRule, |c, (ipv6, name)| {
        edit_nat(c, true, |n| {
            let rules = if ipv6 { &mut n.rules6 } else { &mut n.rules4 };
            let before = rules.len();
            rules.retain(|r| r.name != name);
            if rules.len() == before {
                return Err(ApiError::invalid_arg(format!("There is no NAT rule named '{name}'")));
            }
            Ok(())
        })
    })
    .add(N::Start, |c, ()| {
        let name = network_name(c)?;
        if !nat(c, |n| n.enabled)? {
            return Ok(());
        }
        c.svc.prepare_nat_network(&name)?;
        c.svc.start_network(&name)
    })
    .add(N::Stop, |c, ()| c.svc.stop_network(&network_name(c)?));
}

fn host_calls(t: &mut CallTable<Context>) {
    t.add(IHost::CreateHostOnlyNetworkInterface, |c, ()| {
        let name = adapter_control(&["add"])?;
        let name = name.trim().to_owned();
        // VirtualBox gives each a network of its own.
        let number: u8 = name.trim_start_matches(host::HOST_ONLY).parse().unwrap_or(0);
        let address = Ipv4Addr::new(192, 168, 56u8.saturating_add(number), 1);
        if host::is_allowed_host_only_address(address.into()) {
            adapter_control(&[&name, &address.to_string(), "netmask", "255.255.255.0"])?;
        }
        let progress = finished(c, "Creating host only network interface")?;
        Ok((ObjRef::new(Object::HostInterface(name).network_path()), progress))
    })
    .add(IHost::RemoveHostOnlyNetworkInterface, |c, (id,)| {
        let found = host::interfaces().into_iter().find(|i| i.id().to_string() == id);
        let found = found.filter(|i| i.host_only).ok_or_else(|| {
            ApiError::not_found(format!("Host network interface with UUID {{{id}}} does not exist"))
        })?;
        c.svc.end_network(&interface_network(&found.name))?;
        adapter_control(&[&found.name, "remove"])?;
        finished(c, "Removing host only network interface")
    })
    .add(IHost::FindHostNetworkInterfaceByName, |_, (name,)| {
        host::interface(&name).map(|i| interface_ref(&i)).map_err(|_| {
            ApiError::invalid_arg(format!("The host network interface named '{name}' could not be found"))
        })
    })
    .add(IHost::FindHostNetworkInterfaceById, |_, (id,)| {
        let found = host::interfaces().into_iter().find(|i| i.id().to_string() == id);
        found.map(|i| interface_ref(&i)).ok_or_else(|| {
            ApiError::invalid_arg(format!(
                "The host network interface with the given GUID {{{id}}} could not be found"
            ))
        })
    })
    .add(IHost::FindHostNetworkInterfacesOfType, |_, (kind,)| {
        let all = host::interfaces();
        Ok(all.iter().filter(|i| interface_type(i) == kind).map(interface_ref).collect())
    });
    type I = IHostNetworkInterface;
    t.add(I::EnableStaticIPConfig, |c, (address, mask)| {
        let name = host_only_name(c)?;
        let ip: Ipv4Addr =
            address.parse().map_err(|_| ApiError::invalid_arg(format!("Invalid IP address: {address}")))?;
        let netmask = mask.parse::<Ipv4Addr>().ok().map(u32::from);
        let netmask = netmask.filter(|m| m.leading_ones() + m.trailing_zeros() == 32 && *m != 0);
        netmask.ok_or_else(|| ApiError::invalid_arg(format!("Invalid network mask: {mask}")))?;
        allowed(ip.into())?;
        adapter_control(&[&name, &address, "netmask", &mask])?;
        remember(c, &name, &[("IPAddress", &address), ("IPNetMask", &mask)])
    })
    .add(I::EnableStaticIPConfigV6, |c, (address, length)| {
        let name = host_only_name(c)?;
        let ip: std::net::Ipv6Addr =
            address.parse().map_err(|_| ApiError::invalid_arg(format!("Invalid IPv6 address: {address}")))?;
        if length > 128 {
            return Err(ApiError::invalid_arg(format!("Invalid prefix length: {length}")));
        }
        allowed(ip.into())?;
        adapter_control(&[&name, &format!("{address}/{length}")])?;
        remember(c, &name, &[("IPV6Address", &address), ("IPV6NetMask", &length.to_string())])
    })
    .add(I::EnableDynamicIPConfig, |c, ()| {
        let name = host_only_name(c)?;
        let text = format!("The host-only interface '{name}' cannot be configured by DHCP on this host");
        Err(ApiError::new(ResultCode::NotImpl, text))
    });
}

fn allowed(address: IpAddr) -> ApiResult<()> {
    if host::is_allowed_host_only_address(address) {
        return Ok(());
    }
    Err(ApiError::new(
        ResultCode::AccessDenied,
        format!(
            "The address {address} is outside of the networks that /etc/vbox/networks.conf allows (by default 192.168.56.0/21 and fe80::/64)"
        ),
    ))
}

fn host_only_name(c: &Context) -> ApiResult<String> {
    let found = interface(c, Clone::clone)?;
    if !found.host_only {
        return Err(ApiError::new(
            ResultCode::InvalidObjectState,
            format!("'{}' is not a host-only interface", found.name),
        ));
    }
    Ok(found.name)
}

/// Where VirtualBox keeps an interface's addresses.
fn remember(c: &Context, name: &str, values: &[(&str, &str)]) -> ApiResult<()> {
    c.svc.state.lock().global.edit(|g| {
        for (key, value) in values {
            g.extra_data.insert(format!("HostOnly/{name}/{key}"), (*value).to_owned());
        }
    })
}

/// Runs the program that may change interfaces; what it printed.
fn adapter_control(args: &[&str]) -> ApiResult<String> {
    let program = ipc::find_program("VBoxNetAdpCtl")
        .ok_or_else(|| ApiError::fail("The program VBoxNetAdpCtl is neither beside VBoxSVC nor in PATH"))?;
    let output = Command::new(&program).args(args).stdin(Stdio::null()).output().map_err(|e| {
        ApiError::new(ResultCode::HostError, format!("Cannot start {}: {e}", program.display()))
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().trim_start_matches("VBoxNetAdpCtl: error: ");
    Err(ApiError::new(ResultCode::HostError, capital(text)))
}

/// An operation that is done already.
fn finished(c: &Context, description: &str) -> ApiResult<ObjRef<IProgress>> {
    let progress = Arc::new(Progress::new(description, 1, false));
    let path = c.svc.state.lock().add_progress(progress.clone());
    let svc = c.svc.clone();
    spawn("progress", move || {
        progress.complete(Ok(()));
        svc.wake_main();
    })?;
    Ok(ObjRef::new(path))
}

/// Methods that wait for a network's process.
pub(crate) fn may_block(interface: &str, method: &str) -> bool {
    let networks = ["IDHCPServer", "IDHCPConfig", "IDHCPGroupConfig", "IDHCPGroupCondition", "INATNetwork"];
    interface == "IVMProcessControl" && method == "OpenNetwork"
        || networks.contains(&interface)
        || interface == "IHostNetworkInterface"
        || interface == "IHost" && method.contains("HostOnlyNetworkInterface")
        || interface == "IVirtualBox" && matches!(method, "RemoveDHCPServer" | "RemoveNATNetwork")
}

/// The elements below the paths of this file's objects.
pub(crate) fn children(state: &State, path: &str) -> Option<Vec<String>> {
    let global = &state.global.settings;
    let escape = |name: &String| paths::escape(name);
    Some(match path {
        paths::DHCP_SERVERS => global.dhcp_servers.iter().map(|s| escape(&s.network_name)).collect(),
        paths::NAT_NETWORKS => global.nat_networks.iter().map(|n| escape(&n.network_name)).collect(),
        paths::HOST_ONLY_NETWORKS => global.host_only_networks.iter().map(|n| uuid_element(n.uuid)).collect(),
        paths::HOST_INTERFACES => host::interfaces().iter().map(|i| escape(&i.name)).collect(),
        _ => {
            let rest = path.strip_prefix(paths::DHCP_SERVERS)?.strip_prefix('/')?;
            let elements: Vec<&str> = rest.split('/').collect();
            let name = paths::unescape(elements.first()?)?;
            let server = global.dhcp_servers.iter().find(|s| s.network_name == name)?;
            match elements.get(1..)? {
                [] => vec!["Global".into(), "Groups".into(), "Clients".into()],
                ["Groups"] => server.groups.iter().map(|g| escape(&g.name)).collect(),
                ["Clients"] => server.individual.iter().map(|i| paths::escape(&client_key(i))).collect(),
                ["Groups", group] => {
                    let group = paths::unescape(group)?;
                    let count = server.groups.iter().find(|g| g.name == group)?.conditions.len();
                    (0..count).map(|at| at.to_string()).collect()
                }
                _ => return None,
            }
        }
    })
}
