//! Networks beyond a machine.

use main_api::client::Attributes;
use main_api::enums::*;
use main_api::idl::*;
use main_api::{ApiResult, ObjRef, Proxy};

use super::{Context, Done, Failure, Run, named};
use crate::parse::networks::{
    DhcpAction, DhcpChange, DhcpScope, DhcpServer, DhcpSettings, Forward, HostOnlyIf, HostOnlyNet,
    HostOnlyNetSettings, IpSetting, NatNetwork, NatSettings, Which,
};
use crate::print::networks as print;

impl Run<'_> {
    fn host_proxy(&self) -> Result<Proxy<IHost>, Failure> {
        let vbox = self.client.virtual_box();
        vbox.object(IVirtualBox::Host).context(|| "COMGETTER(Host)(host.asOutParam())".to_owned())
    }

    fn host_interface(&self, name: &str) -> Result<Proxy<IHostNetworkInterface>, Failure> {
        let host = self.host_proxy()?;
        let found = host.call(IHost::FindHostNetworkInterfaceByName, (name.to_owned(),)).context(|| {
            format!("FindHostNetworkInterfaceByName(Bstr(\"{name}\").raw(), hif.asOutParam())")
        })?;
        Ok(self.client.at(found))
    }

    pub(super) fn host_only_if(&mut self, request: HostOnlyIf) -> Done {
        match request {
            HostOnlyIf::Create { machine_readable } => {
                let host = self.host_proxy()?;
                let context =
                    || "CreateHostOnlyNetworkInterface(hif.asOutParam(), progress.asOutParam())".to_owned();
                let (interface, progress) =
                    host.call(IHost::CreateHostOnlyNetworkInterface, ()).context(context)?;
                let progress = self.client.at(progress);
                if machine_readable {
                    progress.wait(|_| ()).context(context)?;
                } else {
                    self.finish(&progress, &context(), "Failed to create the host-only adapter")?;
                }
                let name = self
                    .client
                    .at(interface)
                    .read(IHostNetworkInterface::Name)
                    .context(|| "COMGETTER(Name)(bstrName.asOutParam())".to_owned())?;
                match machine_readable {
                    true => self.print(&name),
                    false => self.print(&format!("Interface '{name}' was successfully created\n")),
                }
            }
            HostOnlyIf::Remove { name } => {
                let interface = self.host_interface(&name)?;
                let id = interface.read(IHostNetworkInterface::Id).context(|| "COMGETTER(Id)".to_owned())?;
                let context =
                    || "RemoveHostOnlyNetworkInterface(guid.raw(), progress.asOutParam())".to_owned();
                let progress =
                    self.host_proxy()?.call(IHost::RemoveHostOnlyNetworkInterface, (id,)).context(context)?;
                let progress = self.client.at(progress);
                self.finish(&progress, &context(), "Failed to remove the host-only adapter")
            }
            HostOnlyIf::IpConfig { name, setting } => {
                type I = IHostNetworkInterface;
                let interface = self.host_interface(&name)?;
                match setting {
                    IpSetting::Dhcp => interface
                        .call(I::EnableDynamicIPConfig, ())
                        .context(|| "EnableDynamicIPConfig()".to_owned()),
                    IpSetting::V4 { address, mask } => {
                        interface.call(I::EnableStaticIPConfig, (address, mask)).context(|| {
                            "EnableStaticIPConfig(Bstr(pszIp).raw(), Bstr(pszNetmask).raw())".to_owned()
                        })
                    }
                    IpSetting::V6 { address, length } => {
                        interface.call(I::EnableStaticIPConfigV6, (address, length)).context(|| {
                            "EnableStaticIPConfigV6(Bstr(pszIpv6).raw(), (ULONG)uNetmasklengthv6)".to_owned()
                        })
                    }
                }
            }
        }
    }

    pub(super) fn host_only_net(&mut self, request: HostOnlyNet) -> Done {
        let vbox = self.client.virtual_box();
        let find = |name: Option<&String>, id: Option<&String>| match (name, id) {
            (Some(name), _) => vbox
                .call(IVirtualBox::FindHostOnlyNetworkByName, (name.clone(),))
                .context(|| format!("FindHostOnlyNetworkByName({name})")),
            (None, id) => {
                let id = id.cloned().unwrap_or_default();
                vbox.call(IVirtualBox::FindHostOnlyNetworkById, (id.clone(),))
                    .context(|| format!("FindHostOnlyNetworkById({id})"))
            }
        };
        match request {
            HostOnlyNet::Add(settings) => {
                let name = settings.name.clone().unwrap_or_default();
                let network = vbox
                    .call(IVirtualBox::CreateHostOnlyNetwork, (name.clone(),))
                    .context(|| format!("CreateHostOnlyNetwork({name})"))?;
                set_host_only(&self.client.at(network), HostOnlyNetSettings { name: None, ..settings })
            }
            HostOnlyNet::Modify(settings) => {
                let network = find(settings.name.as_ref(), settings.id.as_ref())?;
                // What found it is not changed.
                let settings = match settings.name {
                    Some(_) => HostOnlyNetSettings { name: None, ..settings },
                    None => HostOnlyNetSettings { id: None, ..settings },
                };
                set_host_only(&self.client.at(network), settings)
            }
            HostOnlyNet::Remove { name, id } => {
                let network = find(name.as_ref(), id.as_ref())?;
                vbox.call(IVirtualBox::RemoveHostOnlyNetwork, (network,))
                    .context(|| "RemoveHostOnlyNetwork(hostOnlyNetwork)".to_owned())
            }
        }
    }

    /// The network that a DHCP server is named for.
    fn dhcp_network(&self, which: &Which) -> Result<String, Failure> {
        match which {
            Which::Network(name) => Ok(name.clone()),
            Which::Interface(name) => {
                let host = self.host_proxy()?;
                let found = host.call(IHost::FindHostNetworkInterfaceByName, (name.clone(),));
                let found = found.map_err(|_| Failure::Text(format!("Could not find interface '{name}'")))?;
                self.client
                    .at(found)
                    .read(IHostNetworkInterface::NetworkName)
                    .context(|| "COMGETTER(NetworkName)".to_owned())
            }
        }
    }

    pub(super) fn dhcp_server(&mut self, request: DhcpServer) -> Done {
        let DhcpServer { which, action } = request;
        // A server can outlive its interface.
        let network = match (&which, &action) {
            (Which::Interface(name), DhcpAction::Remove) => {
                self.dhcp_network(&which).unwrap_or_else(|_| format!("HostInterfaceNetworking-{name}"))
            }
            _ => self.dhcp_network(&which)?,
        };
        let vbox = self.client.virtual_box();
        let found = vbox.call(IVirtualBox::FindDHCPServerByNetworkName, (network.clone(),));
        let server = match (found, &action) {
            (Ok(_), DhcpAction::Add(_)) => return Err(Failure::Text("DHCP server already exists".into())),
            (Ok(server), _) => server,
            (Err(_), DhcpAction::Add(_)) => {
                vbox.call(IVirtualBox::CreateDHCPServer, (network.clone(),)).context(|| {
                    "CreateDHCPServer(NetName.mutableRaw(), ptrDHCPServer.asOutParam())".to_owned()
                })?
            }
            (Err(_), DhcpAction::Modify(_)) => {
                return Err(Failure::Text("DHCP server does not exist".into()));
            }
            (Err(_), _) => {
                return Err(Failure::Text(match which {
                    Which::Network(name) => format!("Failed to find DHCP server for network '{name}'"),
                    Which::Interface(name) => format!(
                        "Failed to find DHCP server for host-only interface '{name}' (network '{network}')"
                    ),
                }));
            }
        };
        type S = IDHCPServer;
        let proxy: Proxy<IDHCPServer> = self.client.at(server.clone());
        match action {
            DhcpAction::Add(settings) => {
                let done = self.set_dhcp(&proxy, settings);
                if done.is_err() {
                    // Half a server is none.
                    let _ = vbox.call(IVirtualBox::RemoveDHCPServer, (server,));
                }
                done
            }
            DhcpAction::Modify(settings) => self.set_dhcp(&proxy, settings),
            DhcpAction::Remove => vbox
                .call(IVirtualBox::RemoveDHCPServer, (server,))
                .context(|| "RemoveDHCPServer(ptrDHCPServer)".to_owned()),
            DhcpAction::Start => {
                let trunk = network.strip_prefix("HostInterfaceNetworking-").unwrap_or_default().to_owned();
                let kind = if trunk.is_empty() { "whatever" } else { "netflt" };
                proxy
                    .call(S::Start, (trunk, kind.to_owned()))
                    .context(|| "Start(strTrunkName.raw(), strTrunkType.raw())".to_owned())
            }
            DhcpAction::Restart => proxy.call(S::Restart, ()).context(|| "Restart()".to_owned()),
            DhcpAction::Stop => proxy.call(S::Stop, ()).context(|| "Stop()".to_owned()),
            DhcpAction::FindLease { mac } => {
                let (address, state, issued, expire) = proxy
                    .call(S::FindLeaseByMAC, (mac.clone(), 0))
                    .context(|| format!("FindLeaseByMAC(Bstr(\"{mac}\").raw(), 0)"))?;
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let now = now.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
                self.print(&print::lease(&address, &mac, &state, issued, expire, now))
            }
        }
    }

    fn set_dhcp(&self, server: &Proxy<IDHCPServer>, settings: DhcpSettings) -> Done {
        type S = IDHCPServer;
        let DhcpSettings { address, mask, lower, upper, enabled, changes } = settings;
        if [&address, &mask, &lower, &upper].iter().any(|value| value.is_some()) {
            let now = server.attributes().context(|| "COMGETTER(IPAddress)".to_owned())?;
            let or = |given: Option<String>, attr| match given {
                Some(given) => Ok(given),
                None => now.read(attr).context(|| "COMGETTER(IPAddress)".to_owned()),
            };
            let (address, mask) = (or(address, S::IPAddress)?, or(mask, S::NetworkMask)?);
            let (lower, upper) = (or(lower, S::LowerIP)?, or(upper, S::UpperIP)?);
            let what = format!("({address}, {mask}, {lower}, {upper})");
            server
                .call(S::SetConfiguration, (address, mask, lower, upper))
                .context(|| format!("SetConfiguration{what}"))?;
        }
        if let Some(on) = enabled {
            server.write(S::Enabled, on).context(|| "COMSETTER(Enabled)".to_owned())?;
        }
        for (scope, change) in changes {
            let (kind, name, slot) = match scope {
                DhcpScope::Global => (DHCPConfigScope::Global, String::new(), 0),
                DhcpScope::Group(name) => (DHCPConfigScope::Group, name, 0),
                DhcpScope::Mac(mac) => (DHCPConfigScope::MAC, mac, 0),
                DhcpScope::Vm(name, slot) => (DHCPConfigScope::MachineNIC, name, slot),
            };
            let config = server
                .call(S::GetConfig, (kind, name, slot, true))
                .context(|| "GetConfig(m_enmScope, Bstr(m_pszName).raw(), m_uSlot, TRUE)".to_owned())?;
            self.change_dhcp(&config, change)?;
        }
        Ok(())
    }

    fn change_dhcp(&self, config: &ObjRef<IDHCPConfig>, change: DhcpChange) -> Done {
        type C = IDHCPConfig;
        let proxy: Proxy<IDHCPConfig> = self.client.at(config.clone());
        let group = || -> Proxy<IDHCPGroupConfig> { self.client.at(ObjRef::new(config.path())) };
        let said = |what: &str| what.to_owned();
        match change {
            DhcpChange::SetOption { option, value, hex } => {
                let encoding = if hex { DHCPOptionEncoding::Hex } else { DHCPOptionEncoding::Normal };
                let what = format!("SetOption((DHCPOption_T){option}, {})", encoding.name());
                proxy.call(C::SetOption, (option, encoding, value)).context(|| what)
            }
            DhcpChange::RemoveOption(option) => {
                proxy.call(C::RemoveOption, (option,)).context(|| format!("RemoveOption({option})"))
            }
            DhcpChange::RemoveAllOptions => {
                proxy.call(C::RemoveAllOptions, ()).context(|| said("RemoveAllOptions()"))
            }
            DhcpChange::List { option, forced, add } => {
                let attr = if forced { C::ForcedOptions } else { C::SuppressedOptions };
                let mut list = proxy.read(attr).context(|| said("COMGETTER(ForcedOptions)"))?;
                list.retain(|o| *o != option);
                if add {
                    list.push(option);
                }
                let attr = if forced { C::ForcedOptions } else { C::SuppressedOptions };
                proxy.write(attr, list).context(|| said("COMSETTER(ForcedOptions)"))
            }
            DhcpChange::MinLeaseTime(time) => {
                proxy.write(C::MinLeaseTime, time).context(|| said("COMSETTER(MinLeaseTime)"))
            }
            DhcpChange::DefaultLeaseTime(time) => {
                proxy.write(C::DefaultLeaseTime, time).context(|| said("COMSETTER(DefaultLeaseTime)"))
            }
            DhcpChange::MaxLeaseTime(time) => {
                proxy.write(C::MaxLeaseTime, time).context(|| said("COMSETTER(MaxLeaseTime)"))
            }
            DhcpChange::RemoveConfig => proxy.call(C::Remove, ()).context(|| said("Remove()")),
            DhcpChange::FixedAddress(address) => {
                let client: Proxy<IDHCPIndividualConfig> = self.client.at(ObjRef::new(config.path()));
                client
                    .write(IDHCPIndividualConfig::FixedAddress, address)
                    .context(|| said("COMSETTER(FixedAddress)"))
            }
            DhcpChange::AddCondition { kind, inclusive, value } => group()
                .call(IDHCPGroupConfig::AddCondition, (inclusive, named(kind)?, value))
                .map(drop)
                .context(|| said("AddCondition()")),
            DhcpChange::RemoveCondition { kind, value } => {
                let conditions =
                    group().read(IDHCPGroupConfig::Conditions).context(|| said("COMGETTER(Conditions)"))?;
                let mut found = false;
                // From the back: removing one moves those behind it.
                for condition in conditions.into_iter().rev() {
                    let condition = self.client.at(condition);
                    let all = condition.attributes().context(|| said("COMGETTER(Type)"))?;
                    let its_kind = all.read(IDHCPGroupCondition::Type).context(|| said("COMGETTER(Type)"))?;
                    let its_value =
                        all.read(IDHCPGroupCondition::Value).context(|| said("COMGETTER(Value)"))?;
                    if its_kind.name() == kind && its_value == value {
                        condition.call(IDHCPGroupCondition::Remove, ()).context(|| said("Remove()"))?;
                        found = true;
                    }
                }
                if found {
                    return Ok(());
                }
                Err(Failure::Text(format!(
                    "Could not find any condition of type {kind} with value '{value}' to delete"
                )))
            }
            DhcpChange::RemoveAllConditions => group()
                .call(IDHCPGroupConfig::RemoveAllConditions, ())
                .context(|| said("RemoveAllConditions()")),
        }
    }

    pub(super) fn nat_network(&mut self, request: NatNetwork) -> Done {
        let vbox = self.client.virtual_box();
        let find = |name: &String| vbox.call(IVirtualBox::FindNATNetworkByName, (name.clone(),));
        let existing = |name: &String| {
            find(name).map_err(|_| Failure::Text("NATNetwork server does not exist".to_owned()))
        };
        type N = INATNetwork;
        match request {
            NatNetwork::Add(settings) => {
                if find(&settings.name).is_ok() {
                    return Err(Failure::Text("NATNetwork server already exists".into()));
                }
                let network = vbox
                    .call(IVirtualBox::CreateNATNetwork, (settings.name.clone(),))
                    .context(|| "CreateNATNetwork(NetName.raw(), net.asOutParam())".to_owned())?;
                let done = set_nat(&self.client.at(network.clone()), settings);
                if done.is_err() {
                    let _ = vbox.call(IVirtualBox::RemoveNATNetwork, (network,));
                }
                done
            }
            NatNetwork::Modify(settings) => {
                let network = existing(&settings.name)?;
                set_nat(&self.client.at(network), settings)
            }
            NatNetwork::Remove { name } => vbox
                .call(IVirtualBox::RemoveNATNetwork, (existing(&name)?,))
                .context(|| "RemoveNATNetwork(net)".to_owned()),
            NatNetwork::Start { name } => {
                self.client.at(existing(&name)?).call(N::Start, ()).context(|| "Start()".to_owned())
            }
            NatNetwork::Stop { name } => {
                self.client.at(existing(&name)?).call(N::Stop, ()).context(|| "Stop()".to_owned())
            }
            NatNetwork::List { pattern } => {
                let mut networks = self.nat_networks().context(|| "COMGETTER(NATNetworks)".to_owned())?;
                if let Some(pattern) = pattern {
                    networks.retain(|n| matches_pattern(&pattern, &n.name));
                }
                self.print(&print::nat_network_list(&networks))
            }
        }
    }

    pub(super) fn nat_networks(&self) -> ApiResult<Vec<print::NatNetwork>> {
        type N = INATNetwork;
        let networks = self.client.virtual_box().read(IVirtualBox::NATNetworks)?;
        let read = |network: ObjRef<INATNetwork>| -> ApiResult<print::NatNetwork> {
            let all = self.client.at(network).attributes()?;
            Ok(print::NatNetwork {
                name: all.read(N::NetworkName)?,
                enabled: all.read(N::Enabled)?,
                network: all.read(N::Network)?,
                gateway: all.read(N::Gateway)?,
                dhcp: all.read(N::NeedDhcpServer)?,
                ipv6: all.read(N::IPv6Enabled)?,
                ipv6_prefix: all.read(N::IPv6Prefix)?,
                ipv6_default: all.read(N::AdvertiseDefaultIPv6RouteEnabled)?,
                rules4: all.read(N::PortForwardRules4)?,
                rules6: all.read(N::PortForwardRules6)?,
                loopbacks: all.read(N::LocalMappings)?,
            })
        };
        networks.into_iter().map(read).collect()
    }

    pub(super) fn host_interfaces(
        &self,
        kind: HostNetworkInterfaceType,
    ) -> ApiResult<Vec<print::HostInterface>> {
        type I = IHostNetworkInterface;
        let host = self.client.virtual_box().object(IVirtualBox::Host)?;
        let found = host.call(IHost::FindHostNetworkInterfacesOfType, (kind,))?;
        let read = |interface: ObjRef<I>| -> ApiResult<print::HostInterface> {
            let all = self.client.at(interface).attributes()?;
            Ok(print::HostInterface {
                name: all.read(I::Name)?,
                id: all.read(I::Id)?,
                dhcp: all.read(I::DHCPEnabled)?,
                address: all.read(I::IPAddress)?,
                mask: all.read(I::NetworkMask)?,
                ipv6_address: all.read(I::IPV6Address)?,
                ipv6_length: all.read(I::IPV6NetworkMaskPrefixLength)?,
                mac: all.read(I::HardwareAddress)?,
                medium: all.read(I::MediumType)?.name().to_owned(),
                wireless: all.read(I::Wireless)?,
                status: all.read(I::Status)?.name().to_owned(),
                network: all.read(I::NetworkName)?,
            })
        };
        found.into_iter().map(read).collect()
    }

    pub(super) fn host_only_networks(&self) -> ApiResult<Vec<print::HostOnlyNetwork>> {
        type H = IHostOnlyNetwork;
        let networks = self.client.virtual_box().read(IVirtualBox::HostOnlyNetworks)?;
        let read = |network: ObjRef<H>| -> ApiResult<print::HostOnlyNetwork> {
            let all = self.client.at(network).attributes()?;
            Ok(print::HostOnlyNetwork {
                name: all.read(H::NetworkName)?,
                id: all.read(H::Id)?,
                enabled: all.read(H::Enabled)?,
                mask: all.read(H::NetworkMask)?,
                lower: all.read(H::LowerIP)?,
                upper: all.read(H::UpperIP)?,
            })
        };
        networks.into_iter().map(read).collect()
    }

    pub(super) fn dhcp_servers(&self) -> ApiResult<Vec<print::DhcpServer>> {
        type S = IDHCPServer;
        let servers = self.client.virtual_box().read(IVirtualBox::DHCPServers)?;
        let read = |server: ObjRef<S>| -> ApiResult<print::DhcpServer> {
            let all = self.client.at(server).attributes()?;
            let mut groups = Vec::new();
            for group in all.read(S::GroupConfigs)? {
                let config = self.dhcp_config(group.path())?;
                let proxy = self.client.at(group);
                let mut conditions = Vec::new();
                for condition in proxy.read(IDHCPGroupConfig::Conditions)? {
                    type C = IDHCPGroupCondition;
                    let all = self.client.at(condition).attributes()?;
                    let kind = all.read(C::Type)?.name().to_owned();
                    conditions.push((all.read(C::Inclusive)?, kind, all.read(C::Value)?));
                }
                groups.push((proxy.read(IDHCPGroupConfig::Name)?, conditions, config));
            }
            let mut clients = Vec::new();
            for client in all.read(S::IndividualConfigs)? {
                type I = IDHCPIndividualConfig;
                let config = self.dhcp_config(client.path())?;
                let proxy = self.client.at(client);
                let machine = proxy.read(I::MachineId)?;
                clients.push(print::DhcpClient {
                    machine: if machine.is_empty() { None } else { Some((machine, proxy.read(I::Slot)?)) },
                    mac: proxy.read(I::MACAddress).unwrap_or_else(|error| error.code_name()),
                    fixed: proxy.read(I::FixedAddress)?,
                    config,
                });
            }
            Ok(print::DhcpServer {
                network: all.read(S::NetworkName)?,
                address: all.read(S::IPAddress)?,
                lower: all.read(S::LowerIP)?,
                upper: all.read(S::UpperIP)?,
                mask: all.read(S::NetworkMask)?,
                enabled: all.read(S::Enabled)?,
                global: self.dhcp_config(all.read(S::GlobalConfig)?.path())?,
                groups,
                clients,
            })
        };
        servers.into_iter().map(read).collect()
    }

    fn dhcp_config(&self, path: &str) -> ApiResult<print::DhcpConfig> {
        type C = IDHCPConfig;
        let config: Proxy<IDHCPConfig> = self.client.at(ObjRef::new(path));
        let all: Attributes<IDHCPConfig> = config.attributes()?;
        let (numbers, encodings, values) = config.call(C::GetAllOptions, ())?;
        let options = numbers.into_iter().zip(encodings).zip(values);
        Ok(print::DhcpConfig {
            times: [all.read(C::MinLeaseTime)?, all.read(C::DefaultLeaseTime)?, all.read(C::MaxLeaseTime)?],
            forced: all.read(C::ForcedOptions)?,
            suppressed: all.read(C::SuppressedOptions)?,
            options: options
                .map(|((number, encoding), value)| (number, encoding == DHCPOptionEncoding::Hex, value))
                .collect(),
        })
    }
}

fn set_host_only(network: &Proxy<IHostOnlyNetwork>, settings: HostOnlyNetSettings) -> Done {
    type H = IHostOnlyNetwork;
    let HostOnlyNetSettings { id, name, mask, lower, upper, enabled } = settings;
    let texts = [
        (mask, H::NetworkMask),
        (lower, H::LowerIP),
        (upper, H::UpperIP),
        (name, H::NetworkName),
        (id, H::Id),
    ];
    // The network is found by its identifier: that changes last.
    if let Some(on) = enabled {
        network.write(H::Enabled, on).context(|| "COMSETTER(Enabled)".to_owned())?;
    }
    for (value, attr) in texts {
        if let Some(value) = value {
            network.write(attr, value).context(|| "COMSETTER(NetworkMask)".to_owned())?;
        }
    }
    Ok(())
}

fn set_nat(network: &Proxy<INATNetwork>, settings: NatSettings) -> Done {
    type N = INATNetwork;
    let said = |what: &'static str| move || what.to_owned();
    let NatSettings {
        name: _,
        network: cidr,
        enabled,
        dhcp,
        ipv6,
        ipv6_prefix,
        ipv6_default,
        forwards,
        loopbacks,
    } = settings;
    if let Some(cidr) = cidr {
        network.write(N::Network, cidr).context(said("COMSETTER(Network)"))?;
    }
    if let Some(on) = dhcp {
        network.write(N::NeedDhcpServer, on).context(said("COMSETTER(NeedDhcpServer)"))?;
    }
    // Off before the prefix, on after it.
    if ipv6 == Some(false) {
        network.write(N::IPv6Enabled, false).context(said("COMSETTER(IPv6Enabled)"))?;
    }
    if let Some(prefix) = ipv6_prefix {
        network.write(N::IPv6Prefix, prefix).context(said("COMSETTER(IPv6Prefix)"))?;
    }
    if ipv6 == Some(true) {
        network.write(N::IPv6Enabled, true).context(said("COMSETTER(IPv6Enabled)"))?;
    }
    if let Some(on) = ipv6_default {
        network
            .write(N::AdvertiseDefaultIPv6RouteEnabled, on)
            .context(said("COMSETTER(AdvertiseDefaultIPv6RouteEnabled)"))?;
    }
    let (removed, added): (Vec<_>, Vec<_>) =
        forwards.into_iter().partition(|f| matches!(f, Forward::Remove { .. }));
    for forward in removed.into_iter().chain(added) {
        match forward {
            Forward::Remove { ipv6, name } => network
                .call(N::RemovePortForwardRule, (ipv6, name))
                .context(said("RemovePortForwardRule()"))?,
            Forward::Add { ipv6, name, tcp, host, host_port, guest, guest_port } => {
                let protocol = if tcp { NATProtocol::TCP } else { NATProtocol::UDP };
                network
                    .call(N::AddPortForwardRule, (ipv6, name, protocol, host, host_port, guest, guest_port))
                    .context(said("AddPortForwardRule()"))?;
            }
        }
    }
    for (address, offset) in loopbacks {
        network.call(N::AddLocalMapping, (address, offset)).context(said("AddLocalMapping()"))?;
    }
    if let Some(on) = enabled {
        network.write(N::Enabled, on).context(said("COMSETTER(Enabled)"))?;
    }
    Ok(())
}

/// `*` and `?` as in VirtualBox's simple patterns.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    match pattern.chars().next() {
        None => text.is_empty(),
        Some('*') => {
            let rest = &pattern[1..];
            text.char_indices()
                .map(|(at, _)| at)
                .chain([text.len()])
                .any(|at| matches_pattern(rest, &text[at..]))
        }
        Some(c) => text.chars().next().is_some_and(|t| {
            (c == '?' || c == t) && matches_pattern(&pattern[c.len_utf8()..], &text[t.len_utf8()..])
        }),
    }
}
