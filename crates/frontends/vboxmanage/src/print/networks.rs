//! What `list` and `natnetwork list` say of networks.

use super::fmt::timestamp;

/// A network interface of the host.
#[derive(Clone, Debug, Default)]
pub struct HostInterface {
    pub name: String,
    pub id: String,
    pub dhcp: bool,
    pub address: String,
    pub mask: String,
    pub ipv6_address: String,
    pub ipv6_length: u32,
    pub mac: String,
    pub medium: String,
    pub wireless: bool,
    pub status: String,
    pub network: String,
}

fn yes(on: bool) -> &'static str {
    if on { "Yes" } else { "No" }
}

fn enabled(on: bool) -> &'static str {
    if on { "Enabled" } else { "Disabled" }
}

pub fn host_interfaces(interfaces: &[HostInterface]) -> String {
    let block = |i: &HostInterface| {
        format!(
            "Name:            {}\nGUID:            {}\nDHCP:            {}\nIPAddress:       {}\nNetworkMask:     {}\n\
             IPV6Address:     {}\nIPV6NetworkMaskPrefixLength: {}\nHardwareAddress: {}\nMediumType:      {}\n\
             Wireless:        {}\nStatus:          {}\nVBoxNetworkName: {}\n\n",
            i.name,
            i.id,
            enabled(i.dhcp),
            i.address,
            i.mask,
            i.ipv6_address,
            i.ipv6_length,
            i.mac,
            i.medium,
            yes(i.wireless),
            i.status,
            i.network
        )
    };
    interfaces.iter().map(block).collect()
}

pub fn internal_networks(names: &[String]) -> String {
    names.iter().map(|name| format!("Name:        {name}\n")).collect()
}

/// A host-only network.
#[derive(Clone, Debug, Default)]
pub struct HostOnlyNetwork {
    pub name: String,
    pub id: String,
    pub enabled: bool,
    pub mask: String,
    pub lower: String,
    pub upper: String,
}

pub fn host_only_networks(networks: &[HostOnlyNetwork]) -> String {
    let block = |n: &HostOnlyNetwork| {
        format!(
            "Name:            {}\nGUID:            {}\n\nState:           {}\nNetworkMask:     {}\nLowerIP:         {}\n\
             UpperIP:         {}\nVBoxNetworkName: hostonly-{}\n\n",
            n.name,
            n.id,
            enabled(n.enabled),
            n.mask,
            n.lower,
            n.upper,
            n.name
        )
    };
    networks.iter().map(block).collect()
}

/// A NAT network.
#[derive(Clone, Debug, Default)]
pub struct NatNetwork {
    pub name: String,
    pub enabled: bool,
    pub network: String,
    pub gateway: String,
    pub dhcp: bool,
    pub ipv6: bool,
    pub ipv6_prefix: String,
    pub ipv6_default: bool,
    pub rules4: Vec<String>,
    pub rules6: Vec<String>,
    pub loopbacks: Vec<String>,
}

pub fn nat_networks(networks: &[NatNetwork], long: bool) -> String {
    let mut text = String::new();
    for n in networks {
        text.push_str(&format!("Name:         {}\n", n.name));
        if long {
            text.push_str(&format!("Enabled:      {}\n", yes(n.enabled)));
        }
        text.push_str(&format!(
            "Network:      {}\nGateway:      {}\nDHCP Server:  {}\nIPv6:         {}\nIPv6 Prefix:  {}\nIPv6 Default: {}\n",
            n.network,
            n.gateway,
            yes(n.dhcp),
            yes(n.ipv6),
            n.ipv6_prefix,
            yes(n.ipv6_default)
        ));
        if long {
            for (title, lines) in [
                ("Port-forwarding (ipv4)", &n.rules4),
                ("Port-forwarding (ipv6)", &n.rules6),
                ("loopback mappings (ipv4)", &n.loopbacks),
            ] {
                if !lines.is_empty() {
                    text.push_str(&format!("{title}\n"));
                }
                lines.iter().for_each(|line| text.push_str(&format!("        {line}\n")));
            }
        }
        text.push('\n');
    }
    text
}

/// `natnetwork list`.
pub fn nat_network_list(networks: &[NatNetwork]) -> String {
    let word = if networks.len() == 1 { "network" } else { "networks" };
    format!("NAT Networks:\n\n{}{} {word} found\n", nat_networks(networks, true), networks.len())
}

/// Options and times of a DHCP server at one level.
#[derive(Clone, Debug, Default)]
pub struct DhcpConfig {
    /// Minimal, default and maximal; 0 for the default.
    pub times: [u32; 3],
    pub forced: Vec<i32>,
    pub suppressed: Vec<i32>,
    /// Number, hexadecimal, value.
    pub options: Vec<(i32, bool, String)>,
}

/// A client of its own.
#[derive(Clone, Debug, Default)]
pub struct DhcpClient {
    /// Machine and slot, if it is named so.
    pub machine: Option<(String, u32)>,
    /// The address, or the name of the error why it is not known.
    pub mac: String,
    pub fixed: String,
    pub config: DhcpConfig,
}

/// A group: name, conditions as inclusive, kind (the Main API's name) and value, and configuration.
pub type DhcpGroup = (String, Vec<(bool, String, String)>, DhcpConfig);

/// A DHCP server.
#[derive(Clone, Debug, Default)]
pub struct DhcpServer {
    pub network: String,
    pub address: String,
    pub lower: String,
    pub upper: String,
    pub mask: String,
    pub enabled: bool,
    pub global: DhcpConfig,
    pub groups: Vec<DhcpGroup>,
    pub clients: Vec<DhcpClient>,
}

fn dhcp_config(config: &DhcpConfig) -> String {
    let mut text = String::new();
    let labels = ["minLeaseTime:     ", "defaultLeaseTime: ", "maxLeaseTime:     "];
    for (label, seconds) in labels.iter().zip(config.times) {
        match seconds {
            0 => text.push_str(&format!("    {label}default\n")),
            seconds => text.push_str(&format!("    {label}{seconds} sec\n")),
        }
    }
    for (label, numbers) in
        [("Forced options:   ", &config.forced), ("Suppressed opts.: ", &config.suppressed)]
    {
        let list: Vec<String> = numbers.iter().map(i32::to_string).collect();
        let list = if list.is_empty() { "None".to_owned() } else { list.join(", ") };
        text.push_str(&format!("    {label}{list}\n"));
    }
    if config.options.is_empty() {
        text.push_str("    DHCP options:     None\n");
    }
    for (number, hex, value) in &config.options {
        match hex {
            false => text.push_str(&format!("      {number:3}/legacy: {value}\n")),
            true => text.push_str(&format!("      {number:3}/hex:    {value}\n")),
        }
    }
    text
}

pub fn dhcp_servers(servers: &[DhcpServer]) -> String {
    let one = |s: &DhcpServer| {
        let mut text = format!(
            "NetworkName:    {}\nDhcpd IP:       {}\nLowerIPAddress: {}\nUpperIPAddress: {}\nNetworkMask:    {}\n\
             Enabled:        {}\nGlobal Configuration:\n{}",
            s.network,
            s.address,
            s.lower,
            s.upper,
            s.mask,
            yes(s.enabled),
            dhcp_config(&s.global)
        );
        if s.groups.is_empty() {
            text.push_str("Groups:               None\n");
        }
        for (name, conditions, config) in &s.groups {
            text.push_str(&format!("Group:                {name}\n"));
            if conditions.is_empty() {
                text.push_str("    Conditions:       None\n");
            }
            for (inclusive, kind, value) in conditions {
                let word = if *inclusive { "include" } else { "exclude" };
                let kind = match kind.as_str() {
                    "MAC" => "MAC       ",
                    "MACWildcard" => "MAC*      ",
                    "vendorClassID" => "VendorCID ",
                    "vendorClassIDWildcard" => "VendorCID*",
                    "userClassID" => "UserCID   ",
                    "userClassIDWildcard" => "UserCID*  ",
                    _ => "!UNKNOWN! ",
                };
                text.push_str(&format!("    Conditions:       {word} {kind} {value}\n"));
            }
            text.push_str(&dhcp_config(config));
        }
        if s.clients.is_empty() {
            text.push_str("Individual Configs:   None\n");
        }
        for client in &s.clients {
            match &client.machine {
                None => text.push_str(&format!("Individual Config:    MAC {}\n", client.mac)),
                Some((id, slot)) => text.push_str(&format!(
                    "Individual Config:    VM NIC: {id} slot {slot}, MAC {}\n",
                    client.mac
                )),
            }
            let fixed = if client.fixed.is_empty() { "dynamic" } else { &client.fixed };
            text.push_str(&format!("    Fixed Address:    {fixed}\n"));
            text.push_str(&dhcp_config(&client.config));
        }
        text
    };
    servers.iter().map(one).collect::<Vec<_>>().join("\n")
}

/// A lease, as `dhcpserver findlease` tells of it. Times are seconds since 1970.
pub fn lease(address: &str, mac: &str, state: &str, issued: i64, expire: i64, now: i64) -> String {
    let at = |seconds: i64| timestamp(seconds.saturating_mul(1000)).replace(".000000000Z", "Z");
    format!(
        "IP Address:  {address}\nMAC Address: {mac}\nState:       {state}\nIssued:      {} ({issued})\n\
         Expire:      {} ({expire})\nTTL:         {} sec, currently {} sec left\n",
        at(issued),
        at(expire),
        (expire - issued).max(0),
        (expire - now).max(0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::print::golden;

    #[test]
    fn networks_print_as_virtualboxs() {
        let mut text = host_interfaces(&[HostInterface {
            name: "vboxnet0".into(),
            id: "786f6276-656e-4074-8000-0a0027000000".into(),
            address: "192.168.56.1".into(),
            mask: "255.255.255.0".into(),
            mac: "0a:00:27:00:00:00".into(),
            medium: "Ethernet".into(),
            status: "Up".into(),
            network: "HostInterfaceNetworking-vboxnet0".into(),
            ..HostInterface::default()
        }]);
        text += &internal_networks(&["intnet".into(), "other".into()]);
        let config = DhcpConfig {
            times: [0, 600, 0],
            forced: vec![6, 15],
            options: vec![(1, false, "255.255.255.0".into()), (224, true, "0a:1b".into())],
            ..DhcpConfig::default()
        };
        text += &dhcp_servers(&[
            DhcpServer {
                network: "HostInterfaceNetworking-vboxnet0".into(),
                address: "192.168.56.100".into(),
                lower: "192.168.56.101".into(),
                upper: "192.168.56.254".into(),
                mask: "255.255.255.0".into(),
                enabled: true,
                global: config.clone(),
                groups: vec![(
                    "pxe".into(),
                    vec![(true, "vendorClassIDWildcard".into(), "PXEClient*".into())],
                    DhcpConfig::default(),
                )],
                clients: vec![DhcpClient {
                    machine: Some(("7c2c9f4e-0000-4000-8000-0123456789ab".into(), 1)),
                    mac: "08:00:27:01:02:03".into(),
                    fixed: "192.168.56.7".into(),
                    config,
                }],
            },
            DhcpServer { network: "intnet".into(), ..DhcpServer::default() },
        ]);
        text +=
            &host_only_networks(&[HostOnlyNetwork { name: "n".into(), enabled: true, ..Default::default() }]);
        let nat = NatNetwork {
            name: "NatNetwork".into(),
            enabled: true,
            network: "10.0.2.0/24".into(),
            gateway: "10.0.2.1".into(),
            dhcp: true,
            ipv6_prefix: "fd17:625c:f037:2::/64".into(),
            rules4: vec!["ssh:tcp:[]:1022:[10.0.2.5]:22".into()],
            loopbacks: vec!["127.0.0.1=2".into()],
            ..NatNetwork::default()
        };
        text += &nat_networks(std::slice::from_ref(&nat), false);
        text += &nat_network_list(&[nat]);
        text += &lease("10.0.2.4", "08:00:27:01:02:03", "acked", 1_700_000_000, 1_700_000_600, 1_700_000_100);
        golden("list-networks.txt", &text);
    }
}
