//! DHCP servers, their configurations and conditions.

use std::net::Ipv4Addr;

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::{CallTable, ReadTable, WriteTable};
use main_api::types::ObjRef;
use netstack::{Mac, dhcp};
use settings::{DhcpCondition, DhcpConfig, DhcpGroup, DhcpIndividual, DhcpOption, DhcpServer};
use uuid::Uuid;
use vbox_types::ResultCode;

use super::{capital, check_name, not_found};
use crate::networks::card_address;
use crate::objects::{self, DhcpScope, Object};
use crate::svc::{Context, State};
use crate::view::gone;

/// Number of the option whose value is the server's netmask.
const SUBNET_MASK: i32 = 1;

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

pub(super) fn reads(t: &mut ReadTable<Context>) {
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

pub(super) fn writes(t: &mut WriteTable<Context>) {
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

pub(super) fn calls(t: &mut CallTable<Context>) {
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
