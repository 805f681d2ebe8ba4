//! The API of DHCP servers, NAT networks, host-only networks and the host's interfaces.

mod dhcp;
mod interfaces;
mod nat;

pub(crate) use dhcp::config_of;

use std::net::Ipv4Addr;
use std::sync::Arc;

use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::paths;
use main_api::progress::Progress;
use main_api::server::{CallTable, ReadTable, WriteTable};
use main_api::types::ObjRef;
use netstack::host;

use crate::calls::spawn;
use crate::networks::internal_networks;
use crate::objects::{Object, uuid_element};
use crate::svc::{Context, State};

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
    .add(IHost::NetworkInterfaces, |_| host::interfaces().iter().map(interfaces::interface_ref).collect());
    dhcp::reads(t);
    nat::reads(t);
    interfaces::reads(t);
}

pub(crate) fn writes(t: &mut WriteTable<Context>) {
    dhcp::writes(t);
    nat::writes(t);
    interfaces::writes(t);
}

pub(crate) fn calls(t: &mut CallTable<Context>) {
    t.add(IVMProcessControl::OpenNetwork, |c, (slot, attachment, name, mac, policy)| {
        c.svc.open_network(&c.peer, slot, attachment, &name, &mac, policy).map(Into::into)
    });
    dhcp::calls(t);
    nat::calls(t);
    interfaces::calls(t);
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

fn ipv4(what: &str, text: &str) -> ApiResult<String> {
    let parsed = text.parse::<Ipv4Addr>();
    parsed.map(|a| a.to_string()).map_err(|_| ApiError::invalid_arg(format!("Invalid {what}: {text}")))
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().collect::<String>() + chars.as_str())
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
                ["Clients"] => {
                    server.individual.iter().map(|i| paths::escape(&dhcp::client_key(i))).collect()
                }
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
