//! Host-only networks and the host's interfaces.

use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::ipc;
use main_api::server::{CallTable, ReadTable, WriteTable};
use main_api::types::ObjRef;
use netstack::host::{self, Interface};
use uuid::Uuid;
use vbox_types::ResultCode;

use super::{capital, check_name, finished, ipv4, not_found};
use crate::networks::interface_network;
use crate::objects::{self, Object};
use crate::svc::Context;
use crate::view::gone;

pub(super) fn reads(t: &mut ReadTable<Context>) {
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

pub(super) fn interface_ref(interface: &Interface) -> ObjRef<IHostNetworkInterface> {
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

pub(super) fn writes(t: &mut WriteTable<Context>) {
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

pub(super) fn calls(t: &mut CallTable<Context>) {
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
