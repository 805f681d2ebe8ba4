//! NAT networks.

use std::net::{IpAddr, Ipv4Addr};

use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::{CallTable, ReadTable, WriteTable};
use main_api::types::ObjRef;
use settings::{NatNetwork, NatRule};
use vbox_types::ResultCode;

use super::{check_name, not_found};
use crate::mirror::Mirror;
use crate::networks::{self, Places, parse_cidr};
use crate::objects::{self, Object};
use crate::svc::Context;
use crate::view::gone;

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

pub(super) fn reads(t: &mut ReadTable<Context>) {
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

pub(super) fn writes(t: &mut WriteTable<Context>) {
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

pub(super) fn calls(t: &mut CallTable<Context>) {
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
