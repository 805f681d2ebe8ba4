//! `hostonlyif`, `hostonlynet`, `dhcpserver` and `natnetwork`.

use super::{Request, operand};
use crate::getopt::{GetOptError, Item, Opt, Parser, Value, Want, opt, short, unsigned};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostOnlyIf {
    Create { machine_readable: bool },
    Remove { name: String },
    IpConfig { name: String, setting: IpSetting },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IpSetting {
    Dhcp,
    V4 { address: String, mask: String },
    V6 { address: String, length: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostOnlyNet {
    Add(HostOnlyNetSettings),
    Modify(HostOnlyNetSettings),
    Remove { name: Option<String>, id: Option<String> },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostOnlyNetSettings {
    pub id: Option<String>,
    pub name: Option<String>,
    pub mask: Option<String>,
    pub lower: Option<String>,
    pub upper: Option<String>,
    pub enabled: Option<bool>,
}

/// Which DHCP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    Network(String),
    Interface(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DhcpServer {
    pub which: Which,
    pub action: DhcpAction,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DhcpAction {
    Add(DhcpSettings),
    Modify(DhcpSettings),
    Remove,
    Start,
    Restart,
    Stop,
    FindLease { mac: String },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpSettings {
    pub address: Option<String>,
    pub mask: Option<String>,
    pub lower: Option<String>,
    pub upper: Option<String>,
    pub enabled: Option<bool>,
    /// In the order of the command line.
    pub changes: Vec<(DhcpScope, DhcpChange)>,
}

/// What a change is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DhcpScope {
    Global,
    Group(String),
    Mac(String),
    /// The slot counts from 0.
    Vm(String, u32),
}

/// The conditions, by their words in the options; the name is the Main API's.
const CONDITIONS: [(&str, &str); 6] = [
    ("mac", "MAC"),
    ("mac-wild", "MACWildcard"),
    ("vendor", "vendorClassID"),
    ("vendor-wild", "vendorClassIDWildcard"),
    ("user", "userClassID"),
    ("user-wild", "userClassIDWildcard"),
];

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DhcpChange {
    SetOption {
        option: i32,
        value: String,
        hex: bool,
    },
    RemoveOption(i32),
    /// On the list of forced options, or of suppressed ones; put there, or taken away.
    List {
        option: i32,
        forced: bool,
        add: bool,
    },
    RemoveAllOptions,
    MinLeaseTime(u32),
    DefaultLeaseTime(u32),
    MaxLeaseTime(u32),
    RemoveConfig,
    FixedAddress(String),
    /// Inclusive or not.
    AddCondition {
        kind: &'static str,
        inclusive: bool,
        value: String,
    },
    RemoveCondition {
        kind: &'static str,
        value: String,
    },
    RemoveAllConditions,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NatNetwork {
    Add(NatSettings),
    Modify(NatSettings),
    Remove { name: String },
    Start { name: String },
    Stop { name: String },
    List { pattern: Option<String> },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatSettings {
    pub name: String,
    pub network: Option<String>,
    pub enabled: Option<bool>,
    pub dhcp: Option<bool>,
    pub ipv6: Option<bool>,
    pub ipv6_prefix: Option<String>,
    pub ipv6_default: Option<bool>,
    pub forwards: Vec<Forward>,
    /// Address and offset; offset 0 removes the mapping.
    pub loopbacks: Vec<(String, i32)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forward {
    Add { ipv6: bool, name: String, tcp: bool, host: String, host_port: u16, guest: String, guest_port: u16 },
    Remove { ipv6: bool, name: String },
}

fn subcommand<'a>(words: &'a [String], known: &[&str]) -> Parsed<(&'a str, &'a [String])> {
    let Some((first, rest)) = words.split_first() else {
        return Err(UsageError::syntax("No sub-command specified"));
    };
    if matches!(first.as_str(), "--help" | "-help" | "-h" | "-?") {
        return Err(UsageError::Help);
    }
    if known.contains(&first.as_str()) {
        Ok((first, rest))
    } else {
        Err(UsageError::syntax(format!("Unknown sub-command '{first}'")))
    }
}

pub fn hostonlyif(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        MachineReadable,
        Dhcp,
        Ip,
        Mask,
        Ipv6,
        Length,
    }
    static CREATE: &[Opt<Key>] = &[short(&["machinereadable"], 'M', Want::Nothing, Key::MachineReadable)];
    static IPCONFIG: &[Opt<Key>] = &[
        short(&["dhcp"], 'd', Want::Nothing, Key::Dhcp),
        short(&["ip"], 'a', Want::Text, Key::Ip),
        short(&["netmask"], 'm', Want::Text, Key::Mask),
        short(&["ipv6"], 'b', Want::Text, Key::Ipv6),
        short(&["netmasklengthv6"], 'l', Want::U32, Key::Length),
    ];
    let (command, rest) = subcommand(words, &["create", "remove", "ipconfig"])?;
    let table = match command {
        "create" => CREATE,
        "ipconfig" => IPCONFIG,
        _ => &[],
    };
    let mut name = None;
    let (mut machine_readable, mut dhcp, mut length) = (false, false, None);
    let (mut ip, mut mask, mut ipv6) = (None, None, None);
    let mut parser = Parser::new(rest, table);
    while let Some(item) = parser.item()? {
        match item {
            Item::Opt { key: Key::MachineReadable, .. } => machine_readable = true,
            Item::Opt { key: Key::Dhcp, .. } => dhcp = true,
            Item::Opt { key: Key::Ip, value, .. } => ip = Some(value.text()),
            Item::Opt { key: Key::Mask, value, .. } => mask = Some(value.text()),
            Item::Opt { key: Key::Ipv6, value, .. } => ipv6 = Some(value.text()),
            Item::Opt { key: Key::Length, value, .. } => length = Some(value.u32()),
            Item::Word(word) if command == "create" => return Err(UsageError::invalid_parameter(&word)),
            Item::Word(_) if name.is_some() => {
                return Err(UsageError::syntax("Only one interface name can be specified"));
            }
            Item::Word(word) => name = Some(word),
        }
    }
    if command == "create" {
        return Ok(Request::HostOnlyIf(HostOnlyIf::Create { machine_readable }));
    }
    let name = name.ok_or_else(|| UsageError::syntax("No interface name was specified"))?;
    if command == "remove" {
        return Ok(Request::HostOnlyIf(HostOnlyIf::Remove { name }));
    }
    let v6 = ipv6.is_some() || length.is_some();
    if dhcp && (v6 || ip.is_some() || mask.is_some()) {
        return Err(UsageError::syntax(
            "You can not use --dhcp with static ip configuration parameters: --ip, --netmask, --ipv6 and --netmasklengthv6.",
        ));
    }
    if (ip.is_some() || mask.is_some()) && v6 {
        return Err(UsageError::syntax(
            "You can not use ipv4 configuration (--ip and --netmask) with ipv6 (--ipv6 and --netmasklengthv6) simultaneously.",
        ));
    }
    let setting = match (dhcp, ip, ipv6) {
        (true, ..) => IpSetting::Dhcp,
        (_, Some(address), _) => {
            IpSetting::V4 { address, mask: mask.unwrap_or_else(|| "255.255.255.0".to_owned()) }
        }
        (.., Some(address)) => IpSetting::V6 { address, length: length.unwrap_or(64) },
        _ => return Err(UsageError::syntax("Neither -dhcp nor -ip nor -ipv6 was specfified")),
    };
    Ok(Request::HostOnlyIf(HostOnlyIf::IpConfig { name, setting }))
}

pub fn hostonlynet(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Id,
        Name,
        Mask,
        Lower,
        Upper,
        Enable,
        Disable,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["id"], 'i', Want::Text, Key::Id),
        short(&["name"], 'n', Want::Text, Key::Name),
        short(&["netmask"], 'm', Want::Text, Key::Mask),
        short(&["lower-ip", "lowerip"], 'l', Want::Text, Key::Lower),
        short(&["upper-ip", "upperip"], 'u', Want::Text, Key::Upper),
        short(&["enable"], 'e', Want::Nothing, Key::Enable),
        short(&["disable"], 'd', Want::Nothing, Key::Disable),
    ];
    let (command, rest) = subcommand(words, &["add", "modify", "remove"])?;
    let mut settings = HostOnlyNetSettings::default();
    let mut parser = Parser::new(rest, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Opt { key: Key::Id, value, .. } => settings.id = Some(value.text()),
            Item::Opt { key: Key::Name, value, .. } => settings.name = Some(value.text()),
            Item::Opt { key: Key::Mask, value, .. } => settings.mask = Some(value.text()),
            Item::Opt { key: Key::Lower, value, .. } => settings.lower = Some(value.text()),
            Item::Opt { key: Key::Upper, value, .. } => settings.upper = Some(value.text()),
            Item::Opt { key: Key::Enable, .. } => settings.enabled = Some(true),
            Item::Opt { key: Key::Disable, .. } => settings.enabled = Some(false),
            Item::Word(word) => return Err(UsageError::invalid_parameter(&word)),
        }
    }
    let missing = |what: &str| UsageError::argument(format!("The --{what} parameter must be specified"));
    Ok(Request::HostOnlyNet(match command {
        "add" => {
            settings.name.as_ref().ok_or_else(|| missing("name"))?;
            settings.mask.as_ref().ok_or_else(|| missing("netmask"))?;
            settings.lower.as_ref().ok_or_else(|| missing("lower-ip"))?;
            settings.upper.as_ref().ok_or_else(|| missing("upper-ip"))?;
            HostOnlyNet::Add(settings)
        }
        _ if settings.name.is_none() && settings.id.is_none() => {
            return Err(UsageError::argument("Either --name or --id must be specified"));
        }
        "modify" => HostOnlyNet::Modify(settings),
        _ => HostOnlyNet::Remove { name: settings.name, id: settings.id },
    }))
}

#[derive(Clone, Copy)]
enum DhcpKey {
    Network,
    Interface,
    Address,
    Mask,
    Lower,
    Upper,
    Enable,
    Disable,
    Global,
    Group,
    Mac,
    Vm,
    Nic,
    SetOpt,
    SetOptHex,
    DelOpt,
    List { forced: bool, add: bool },
    ZapOptions,
    MinTime,
    DefaultTime,
    MaxTime,
    RemoveConfig,
    Fixed,
    Include(usize),
    Exclude(usize),
    DeleteCondition(usize),
    ZapConditions,
    Id,
    Value,
    Remove,
    Ignored,
}

/// `--incl-mac` and its like.
macro_rules! conditions {
    ($($word:literal = $index:literal),*) => {
        [$(
            opt(&[concat!("incl-", $word)], Want::Text, DhcpKey::Include($index)),
            opt(&[concat!("excl-", $word)], Want::Text, DhcpKey::Exclude($index)),
            opt(&[concat!("del-", $word)], Want::Text, DhcpKey::DeleteCondition($index)),
        )*]
    };
}

const DHCP_COMMON: [Opt<DhcpKey>; 2] = [
    opt(&["network", "netname"], Want::Text, DhcpKey::Network),
    opt(&["interface", "ifname"], Want::Text, DhcpKey::Interface),
];

const DHCP_LEASE: [Opt<DhcpKey>; 3] =
    [DHCP_COMMON[0], DHCP_COMMON[1], short(&["mac-address"], 'm', Want::Text, DhcpKey::Mac)];

static DHCP_SETTINGS: &[Opt<DhcpKey>] = &[
    DHCP_COMMON[0],
    DHCP_COMMON[1],
    short(&["server-ip", "ip"], 'a', Want::Text, DhcpKey::Address),
    short(&["netmask"], 'm', Want::Text, DhcpKey::Mask),
    short(&["lower-ip", "lowerip"], 'l', Want::Text, DhcpKey::Lower),
    short(&["upper-ip", "upperip"], 'u', Want::Text, DhcpKey::Upper),
    short(&["enable"], 'e', Want::Nothing, DhcpKey::Enable),
    short(&["disable"], 'd', Want::Nothing, DhcpKey::Disable),
    short(&["global"], 'g', Want::Nothing, DhcpKey::Global),
    short(&["group"], 'G', Want::Text, DhcpKey::Group),
    short(&["mac-address"], 'E', Want::Text, DhcpKey::Mac),
    short(&["vm"], 'M', Want::Text, DhcpKey::Vm),
    short(&["nic"], 'n', Want::U32, DhcpKey::Nic),
    short(&["set-opt"], 's', Want::Text, DhcpKey::SetOpt),
    short(&["set-opt-hex"], 'x', Want::Text, DhcpKey::SetOptHex),
    short(&["del-opt"], 'D', Want::Text, DhcpKey::DelOpt),
    opt(&["force-opt"], Want::Text, DhcpKey::List { forced: true, add: true }),
    opt(&["unforce-opt"], Want::Text, DhcpKey::List { forced: true, add: false }),
    opt(&["suppress-opt"], Want::Text, DhcpKey::List { forced: false, add: true }),
    opt(&["unsuppress-opt"], Want::Text, DhcpKey::List { forced: false, add: false }),
    opt(&["zap-options"], Want::Nothing, DhcpKey::ZapOptions),
    short(&["min-lease-time"], 'q', Want::U32, DhcpKey::MinTime),
    short(&["default-lease-time"], 'L', Want::U32, DhcpKey::DefaultTime),
    short(&["max-lease-time"], 'Q', Want::U32, DhcpKey::MaxTime),
    short(&["remove-config"], 'R', Want::Nothing, DhcpKey::RemoveConfig),
    short(&["fixed-address"], 'f', Want::Text, DhcpKey::Fixed),
    opt(&["zap-conditions"], Want::Nothing, DhcpKey::ZapConditions),
    short(&["id"], 'i', Want::Text, DhcpKey::Id),
    short(&["value"], 'p', Want::Text, DhcpKey::Value),
    short(&["remove"], 'r', Want::Nothing, DhcpKey::Remove),
    short(&["options"], 'o', Want::Nothing, DhcpKey::Ignored),
];

const DHCP_CONDITIONS: [Opt<DhcpKey>; 18] =
    conditions!("mac-wild" = 1, "mac" = 0, "vendor-wild" = 3, "vendor" = 2, "user-wild" = 5, "user" = 4);

/// An option by number or name.
fn option_number(text: &str) -> Parsed<i32> {
    let number = unsigned(text).and_then(|n| u8::try_from(n).ok()).or_else(|| option_by_name(text));
    number.map(i32::from).ok_or_else(|| UsageError::from(GetOptError::BadFormat(text.to_owned())))
}

fn option_by_name(text: &str) -> Option<u8> {
    /// The names that people use, in the order of their numbers from 1 on (the Main API's `DHCPOption`).
    const NAMES: [&str; 49] = [
        "SubnetMask",
        "TimeOffset",
        "Routers",
        "TimeServers",
        "NameServers",
        "DomainNameServers",
        "LogServers",
        "CookieServers",
        "LPRServers",
        "ImpressServers",
        "ResourseLocationServers",
        "HostName",
        "BootFileSize",
        "MeritDumpFile",
        "DomainName",
        "SwapServer",
        "RootPath",
        "ExtensionPath",
        "IPForwarding",
        "OptNonLocalSourceRouting",
        "PolicyFilter",
        "MaxDgramReassemblySize",
        "DefaultIPTTL",
        "PathMTUAgingTimeout",
        "PathMTUPlateauTable",
        "InterfaceMTU",
        "AllSubnetsAreLocal",
        "BroadcastAddress",
        "PerformMaskDiscovery",
        "MaskSupplier",
        "PerformRouterDiscovery",
        "RouterSolicitationAddress",
        "StaticRoute",
        "TrailerEncapsulation",
        "ARPCacheTimeout",
        "EthernetEncapsulation",
        "TCPDefaultTTL",
        "TCPKeepaliveInterval",
        "TCPKeepaliveGarbage",
        "NISDomain",
        "NISServers",
        "NTPServers",
        "VendorSpecificInfo",
        "NetBIOSNameServers",
        "NetBIOSDatagramServers",
        "NetBIOSNodeType",
        "NetBIOSScope",
        "XWindowsFontServers",
        "XWindowsDisplayManager",
    ];
    const OTHERS: [(&str, u8); 3] = [("TFTPServerName", 66), ("BootfileName", 67), ("DomainSearch", 119)];
    let at = NAMES.iter().position(|name| name.eq_ignore_ascii_case(text));
    at.and_then(|at| u8::try_from(at + 1).ok()).or_else(|| {
        OTHERS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)).map(|(_, number)| *number)
    })
}

/// Bytes with colons between them, or two digits each.
fn is_hex(text: &str) -> bool {
    let hex = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
    match text.contains(':') {
        true => text.split(':').all(|part| hex(part) && part.len() <= 2),
        false => hex(text) && text.len().is_multiple_of(2),
    }
}

fn mac_address(text: &str) -> Parsed<String> {
    let digits: String = text.chars().filter(|c| !matches!(c, ':' | '-')).collect();
    if digits.len() != 12 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(UsageError::from(GetOptError::BadFormat(text.to_owned())));
    }
    let pairs: Vec<String> =
        (0..6).filter_map(|at| digits.get(2 * at..2 * at + 2)).map(str::to_ascii_lowercase).collect();
    Ok(pairs.join(":"))
}

pub fn dhcpserver(words: &[String]) -> Parsed<Request> {
    // Options may stand before the sub-command.
    let mut which = None;
    let mut rest = words;
    let command = loop {
        match rest {
            [name, tail @ ..] if name.starts_with('-') => {
                let inline = name.contains(['=', ':']);
                let taken = if inline { 1 } else { 2.min(rest.len()) };
                let mut parser = Parser::new(&rest[..taken], &DHCP_COMMON);
                while let Some(Item::Opt { key, value, .. }) = parser.item()? {
                    select(&mut which, key, value)?;
                }
                rest = if inline { tail } else { &rest[taken..] };
            }
            _ => {
                let known = ["add", "modify", "remove", "start", "restart", "stop", "findlease"];
                let (command, tail) = subcommand(rest, &known)?;
                rest = tail;
                break command;
            }
        }
    };
    let adding = command == "add";
    let table: Vec<Opt<DhcpKey>> = match command {
        "add" | "modify" => DHCP_SETTINGS.iter().chain(&DHCP_CONDITIONS).copied().collect(),
        "findlease" => DHCP_LEASE.to_vec(),
        _ => DHCP_COMMON.to_vec(),
    };
    let mut settings = DhcpSettings::default();
    let mut mac = None;
    let mut scope = DhcpScope::Global;
    let mut pending: Option<i32> = None;
    let mut parser = Parser::new(rest, &table);
    while let Some(item) = parser.item()? {
        let (key, name, value) = match item {
            Item::Opt { key, name, value, .. } => (key, name, value),
            Item::Word(word) => return Err(UsageError::invalid_parameter(&word)),
        };
        let only_modify = || match adding {
            true => Err(UsageError::syntax(format!("{name} does not apply to the 'add' subcommand"))),
            false => Ok(()),
        };
        let group = || match &scope {
            DhcpScope::Group(_) => Ok(()),
            _ => Err(UsageError::syntax("A group must be selected to perform condition alterations.")),
        };
        let condition = |index: usize| CONDITIONS.get(index).map_or("", |(_, kind)| kind);
        let mut change = |change: DhcpChange| settings.changes.push((scope.clone(), change));
        match key {
            DhcpKey::Network | DhcpKey::Interface => select(&mut which, key, value)?,
            DhcpKey::Address => settings.address = Some(value.text()),
            DhcpKey::Mask => settings.mask = Some(value.text()),
            DhcpKey::Lower => settings.lower = Some(value.text()),
            DhcpKey::Upper => settings.upper = Some(value.text()),
            DhcpKey::Enable => settings.enabled = Some(true),
            DhcpKey::Disable => settings.enabled = Some(false),
            DhcpKey::Global => scope = DhcpScope::Global,
            DhcpKey::Group => {
                let name = value.text();
                if name.is_empty() {
                    return Err(UsageError::syntax("Group name cannot be empty"));
                }
                scope = DhcpScope::Group(name);
            }
            DhcpKey::Mac if command == "findlease" => mac = Some(mac_address(&value.text())?),
            DhcpKey::Mac => scope = DhcpScope::Mac(mac_address(&value.text())?),
            DhcpKey::Vm => scope = DhcpScope::Vm(value.text(), 0),
            DhcpKey::Nic => {
                let DhcpScope::Vm(vm, _) = &scope else {
                    return Err(UsageError::syntax(
                        "--nic option requires a --vm preceeding selecting the VM it should apply to",
                    ));
                };
                let number = value.u32();
                let slot = number
                    .checked_sub(1)
                    .ok_or_else(|| UsageError::syntax(format!("invalid NIC number: {number}")))?;
                scope = DhcpScope::Vm(vm.clone(), slot);
            }
            DhcpKey::SetOpt | DhcpKey::SetOptHex => {
                let hex = matches!(key, DhcpKey::SetOptHex);
                let option = option_number(&value.text())?;
                let value = parser.fetch(&name, Want::Text)?.text();
                if hex && !is_hex(&value) {
                    return Err(UsageError::argument(format!(
                        "Malformed hex string given to --set-opt-hex {option}: {value}"
                    )));
                }
                settings.changes.push((scope.clone(), DhcpChange::SetOption { option, value, hex }));
            }
            DhcpKey::DelOpt => {
                only_modify()?;
                change(DhcpChange::RemoveOption(option_number(&value.text())?));
            }
            DhcpKey::List { forced, add } => {
                if !add {
                    only_modify()?;
                }
                change(DhcpChange::List { option: option_number(&value.text())?, forced, add });
            }
            DhcpKey::ZapOptions => {
                only_modify()?;
                change(DhcpChange::RemoveAllOptions);
            }
            DhcpKey::MinTime => change(DhcpChange::MinLeaseTime(value.u32())),
            DhcpKey::DefaultTime => change(DhcpChange::DefaultLeaseTime(value.u32())),
            DhcpKey::MaxTime => change(DhcpChange::MaxLeaseTime(value.u32())),
            DhcpKey::RemoveConfig => {
                only_modify()?;
                if scope == DhcpScope::Global {
                    return Err(UsageError::syntax("--remove-config cannot be applied to the global config"));
                }
                change(DhcpChange::RemoveConfig);
                scope = DhcpScope::Global;
            }
            DhcpKey::Fixed => {
                if !matches!(scope, DhcpScope::Mac(_) | DhcpScope::Vm(..)) {
                    return Err(UsageError::syntax(
                        "--fixed-address can only be applied to a VM NIC or an MAC address",
                    ));
                }
                change(DhcpChange::FixedAddress(value.text()));
            }
            DhcpKey::Include(index) | DhcpKey::Exclude(index) | DhcpKey::DeleteCondition(index) => {
                group()?;
                let value = value.text();
                if value.is_empty() {
                    return Err(UsageError::syntax("Condition value cannot be empty"));
                }
                let kind = condition(index);
                change(match key {
                    DhcpKey::DeleteCondition(_) => DhcpChange::RemoveCondition { kind, value },
                    _ => {
                        let inclusive = matches!(key, DhcpKey::Include(_));
                        DhcpChange::AddCondition { kind, inclusive, value }
                    }
                });
            }
            DhcpKey::ZapConditions => {
                if !matches!(scope, DhcpScope::Group(_)) {
                    return Err(UsageError::syntax("--zap-conditions can only be with a group selected"));
                }
                change(DhcpChange::RemoveAllConditions);
            }
            DhcpKey::Id => pending = Some(option_number(&value.text())?),
            DhcpKey::Value => {
                let option =
                    pending.take().ok_or_else(|| UsageError::syntax("--value without --id=dhcp-opt-no"))?;
                change(DhcpChange::SetOption { option, value: value.text(), hex: false });
            }
            DhcpKey::Remove => {
                only_modify()?;
                let option =
                    pending.take().ok_or_else(|| UsageError::syntax("--remove without --id=dhcp-opt-no"))?;
                change(DhcpChange::RemoveOption(option));
            }
            DhcpKey::Ignored => {}
        }
    }
    let unnamed = "You need to specify either --network or --interface to identify the DHCP server";
    if command == "findlease" && mac.is_none() {
        return Err(UsageError::syntax("You need to specify a MAC address too look for"));
    }
    let which = which.ok_or_else(|| UsageError::syntax(unnamed))?;
    if adding {
        for (value, option) in [
            (&settings.address, "ip"),
            (&settings.mask, "netmask"),
            (&settings.lower, "lowerip"),
            (&settings.upper, "upperip"),
        ] {
            if value.is_none() {
                return Err(UsageError::syntax(format!("Missing required option: --{option}")));
            }
        }
    }
    let action = match command {
        "add" => DhcpAction::Add(settings),
        "modify" => DhcpAction::Modify(settings),
        "remove" => DhcpAction::Remove,
        "start" => DhcpAction::Start,
        "restart" => DhcpAction::Restart,
        "stop" => DhcpAction::Stop,
        _ => DhcpAction::FindLease { mac: mac.unwrap_or_default() },
    };
    Ok(Request::DhcpServer(DhcpServer { which, action }))
}

fn select(which: &mut Option<Which>, key: DhcpKey, value: Value) -> Parsed<()> {
    let new = match (key, &which) {
        (DhcpKey::Network, Some(Which::Interface(_))) => {
            return Err(UsageError::syntax("Either --network or --interface, not both"));
        }
        (DhcpKey::Interface, Some(Which::Network(_))) => {
            return Err(UsageError::syntax("Either --interface or --network, not both"));
        }
        (DhcpKey::Interface, _) => Which::Interface(value.text()),
        _ => Which::Network(value.text()),
    };
    *which = Some(new);
    Ok(())
}

/// `on`, `off` and the other words that VirtualBox takes for them.
fn switch(text: &str) -> Parsed<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "y" | "yes" | "true" | "on" | "enable" => Ok(true),
        "0" | "n" | "no" | "false" | "off" | "disable" => Ok(false),
        _ => Err(UsageError::from(GetOptError::BadFormat(text.to_owned()))),
    }
}

pub fn natnetwork(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Name,
        Network,
        Dhcp,
        Ipv6,
        Ipv6Default,
        Ipv6Prefix,
        Enable,
        Disable,
        Forward { ipv6: bool },
        Loopback4,
        Loopback6,
    }
    const NAME: [Opt<Key>; 1] = [short(&["netname"], 't', Want::Text, Key::Name)];
    static TABLE: &[Opt<Key>] = &[
        NAME[0],
        short(&["ipv4-prefix", "network"], 'n', Want::Text, Key::Network),
        short(&["dhcp"], 'h', Want::Text, Key::Dhcp),
        opt(&["ipv6-default"], Want::Text, Key::Ipv6Default),
        opt(&["ipv6-prefix"], Want::Text, Key::Ipv6Prefix),
        short(&["ipv6-enable", "ipv6"], '6', Want::Text, Key::Ipv6),
        short(&["enable"], 'e', Want::Nothing, Key::Enable),
        short(&["disable"], 'd', Want::Nothing, Key::Disable),
        short(&["port-forward-4"], 'p', Want::Text, Key::Forward { ipv6: false }),
        short(&["port-forward-6"], 'P', Want::Text, Key::Forward { ipv6: true }),
        short(&["loopback-4"], 'l', Want::Text, Key::Loopback4),
        short(&["loopback-6"], 'L', Want::Text, Key::Loopback6),
    ];
    let (command, rest) = subcommand(words, &["add", "modify", "remove", "start", "stop", "list"])?;
    if command == "list" {
        let mut pattern = None;
        for word in rest {
            operand(&mut pattern, word.clone())?;
        }
        return Ok(Request::NatNetwork(NatNetwork::List { pattern }));
    }
    let changing = matches!(command, "add" | "modify");
    let mut settings = NatSettings::default();
    let mut parser = Parser::new(rest, if changing { TABLE } else { &NAME });
    while let Some(item) = parser.item()? {
        let (key, name, value) = match item {
            Item::Opt { key, name, value, .. } => (key, name, value),
            Item::Word(word) => return Err(UsageError::invalid_parameter(&word)),
        };
        let delete_only_on_modify = |what: &str| match command {
            "modify" => Ok(()),
            _ => Err(UsageError::syntax(format!("{what} can be deleted by 'modify' only"))),
        };
        match key {
            Key::Name => settings.name = value.text(),
            Key::Network => settings.network = Some(value.text()),
            Key::Dhcp => settings.dhcp = Some(switch(&value.text())?),
            Key::Ipv6 => settings.ipv6 = Some(switch(&value.text())?),
            Key::Ipv6Default => settings.ipv6_default = Some(switch(&value.text())?),
            Key::Ipv6Prefix => settings.ipv6_prefix = Some(value.text()),
            Key::Enable | Key::Disable if settings.enabled.is_some() => {
                return Err(UsageError::syntax("You can specify either --enable or --disable once."));
            }
            Key::Enable => settings.enabled = Some(true),
            Key::Disable => settings.enabled = Some(false),
            Key::Forward { ipv6 } => {
                let text = value.text();
                settings.forwards.push(if text == "delete" {
                    delete_only_on_modify("Port-forward rules")?;
                    Forward::Remove { ipv6, name: parser.fetch(&name, Want::Text)?.text() }
                } else {
                    forward(&text, ipv6)
                        .ok_or_else(|| UsageError::syntax(format!("Invalid port-forward rule {text}")))?
                });
            }
            Key::Loopback4 => {
                let text = value.text();
                if text == "delete" {
                    delete_only_on_modify("Loopback mappings")?;
                    settings.loopbacks.push((parser.fetch(&name, Want::Text)?.text(), 0));
                } else {
                    let mapping = text.split_once('=').and_then(|(address, offset)| {
                        Some((address.to_owned(), offset.parse().ok().filter(|o| *o > 0)?))
                    });
                    let invalid = || UsageError::argument("invalid loopback string");
                    settings.loopbacks.push(mapping.ok_or_else(invalid)?);
                }
            }
            Key::Loopback6 => {
                return Err(UsageError::failure("The host's IPv6 loopback address cannot be mapped"));
            }
        }
    }
    if settings.name.is_empty() {
        return Err(UsageError::syntax("You need to specify the --netname option"));
    }
    if command == "add" && settings.network.is_none() {
        return Err(UsageError::syntax("You need to specify the --network option"));
    }
    let name = settings.name.clone();
    Ok(Request::NatNetwork(match command {
        "add" => NatNetwork::Add(settings),
        "modify" => NatNetwork::Modify(settings),
        "remove" => NatNetwork::Remove { name },
        "start" => NatNetwork::Start { name },
        _ => NatNetwork::Stop { name },
    }))
}

/// `name:tcp|udp:[host ip]:host port:[guest ip]:guest port`; the host's address may be left out.
fn forward(text: &str, ipv6: bool) -> Option<Forward> {
    let (name, rest) = text.split_once(':')?;
    let (protocol, rest) = rest.split_once(':')?;
    let tcp = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => true,
        "udp" => false,
        _ => return None,
    };
    let address = |text: &str| {
        let ok = text.is_empty() || text.parse::<std::net::IpAddr>().is_ok_and(|a| a.is_ipv6() == ipv6);
        ok.then(|| text.to_owned())
    };
    let (host, rest) = rest.strip_prefix('[')?.split_once("]:")?;
    let (host_port, rest) = rest.split_once(':')?;
    let (guest, guest_port) = rest.strip_prefix('[')?.split_once("]:")?;
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
    let guest = address(guest).filter(|g| !g.is_empty())?;
    let (host_port, guest_port) = (port(host_port)?, port(guest_port)?);
    Some(Forward::Add {
        ipv6,
        name: name.to_owned(),
        tcp,
        host: address(host)?,
        host_port,
        guest,
        guest_port,
    })
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn hostonlyif_takes_what_vagrant_gives() {
        let create = Request::HostOnlyIf(HostOnlyIf::Create { machine_readable: false });
        assert_eq!(hostonlyif(&words("create")), Ok(create));
        let ipconfig = |line: &str| match hostonlyif(&words(line)) {
            Ok(Request::HostOnlyIf(HostOnlyIf::IpConfig { name, setting })) => (name, setting),
            other => panic!("{line}: {other:?}"),
        };
        let v4 = IpSetting::V4 { address: "192.168.56.1".into(), mask: "255.255.255.0".into() };
        let line = "ipconfig vboxnet0 --ip 192.168.56.1 --netmask 255.255.255.0";
        assert_eq!(ipconfig(line), ("vboxnet0".into(), v4.clone()));
        assert_eq!(ipconfig("ipconfig -ip 192.168.56.1 vboxnet0"), ("vboxnet0".into(), v4));
        let v6 = IpSetting::V6 { address: "fe80::1".into(), length: 48 };
        assert_eq!(ipconfig("ipconfig vboxnet0 --ipv6 fe80::1 --netmasklengthv6 48").1, v6);
        for line in
            ["ipconfig vboxnet0", "ipconfig vboxnet0 --dhcp --ip 1.1.1.1", "remove", "create x", "nonsense"]
        {
            assert!(matches!(hostonlyif(&words(line)), Err(UsageError::Syntax(_))), "{line}");
        }
    }

    fn dhcp(line: &str) -> DhcpServer {
        match dhcpserver(&words(line)) {
            Ok(Request::DhcpServer(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn dhcpserver_add_takes_what_vagrant_gives() {
        let line = "add --ifname vboxnet0 --ip 192.168.56.2 --netmask 255.255.255.0 --lowerip 192.168.56.3 \
                    --upperip 192.168.56.254 --enable";
        let request = dhcp(line);
        assert_eq!(request.which, Which::Interface("vboxnet0".into()));
        let DhcpAction::Add(settings) = request.action else { panic!() };
        assert_eq!(settings.address.as_deref(), Some("192.168.56.2"));
        assert_eq!((settings.enabled, settings.changes.len()), (Some(true), 0));
        assert_eq!(
            dhcpserver(&words("add --netname n --ip 1.1.1.1 --netmask 255.0.0.0 --lowerip 1.1.1.2")),
            Err(UsageError::syntax("Missing required option: --upperip"))
        );
    }

    #[test]
    fn changes_belong_to_the_scope_before_them() {
        let request = dhcp(
            "modify --network n --set-opt 6 1.1.1.1 --group g --incl-mac-wild 08:00:27:* --excl-mac 080027000001 \
             --vm box --nic 2 --fixed-address 10.0.0.9 --mac-address 08-00-27-00-00-02 --suppress-opt DomainName \
             --global --max-lease-time 60",
        );
        let DhcpAction::Modify(settings) = request.action else { panic!() };
        let group = || DhcpScope::Group("g".into());
        let expected = [
            (DhcpScope::Global, DhcpChange::SetOption { option: 6, value: "1.1.1.1".into(), hex: false }),
            (
                group(),
                DhcpChange::AddCondition { kind: "MACWildcard", inclusive: true, value: "08:00:27:*".into() },
            ),
            (
                group(),
                DhcpChange::AddCondition { kind: "MAC", inclusive: false, value: "080027000001".into() },
            ),
            (DhcpScope::Vm("box".into(), 1), DhcpChange::FixedAddress("10.0.0.9".into())),
            (
                DhcpScope::Mac("08:00:27:00:00:02".into()),
                DhcpChange::List { option: 15, forced: false, add: true },
            ),
            (DhcpScope::Global, DhcpChange::MaxLeaseTime(60)),
        ];
        assert_eq!(settings.changes, expected);
    }

    #[test]
    fn dhcpserver_refuses_what_makes_no_sense() {
        for line in [
            "modify --set-opt 6 1.1.1.1",
            "modify --network n --interface i",
            "modify --network n --nic 1",
            "modify --network n --fixed-address 1.1.1.1",
            "modify --network n --incl-mac 080027000001",
            "modify --network n --remove-config",
            "modify --network n --set-opt 256 x",
            "modify --network n --value x",
            "findlease --network n",
            "findlease --network n --mac-address 0800",
            "add --network n --ip 1.1.1.1 --netmask 255.0.0.0 --lowerip 1.1.1.2 --upperip 1.1.1.3 --del-opt 6",
            "start",
            "",
        ] {
            assert!(matches!(dhcpserver(&words(line)), Err(UsageError::Syntax(_))), "{line}");
        }
        let lease = dhcp("--network=n findlease --mac-address=080027A1B2C3");
        assert_eq!(lease.action, DhcpAction::FindLease { mac: "08:00:27:a1:b2:c3".into() });
    }

    #[test]
    fn natnetwork_takes_rules_and_mappings() {
        let line = "modify --netname net --dhcp off --ipv6 on --port-forward-4 ssh:tcp:[]:1022:[10.0.2.5]:22 \
                    --port-forward-6 delete web --loopback-4 127.0.0.1=6 --loopback-4 delete 127.0.0.2";
        let Ok(Request::NatNetwork(NatNetwork::Modify(settings))) = natnetwork(&words(line)) else {
            panic!()
        };
        assert_eq!((settings.dhcp, settings.ipv6), (Some(false), Some(true)));
        let ssh = Forward::Add {
            ipv6: false,
            name: "ssh".into(),
            tcp: true,
            host: String::new(),
            host_port: 1022,
            guest: "10.0.2.5".into(),
            guest_port: 22,
        };
        assert_eq!(settings.forwards, [ssh, Forward::Remove { ipv6: true, name: "web".into() }]);
        assert_eq!(settings.loopbacks, [("127.0.0.1".into(), 6), ("127.0.0.2".into(), 0)]);
        for line in [
            "add --netname n",
            "add --network 10.0.2.0/24",
            "add --netname n --network 10.0.2.0/24 --port-forward-4 delete x",
            "modify --netname n --port-forward-4 ssh:tcp:[]:0:[10.0.2.5]:22",
            "modify --netname n --port-forward-4 ssh:tcp:[]:22:[fd00::1]:22",
            "start",
        ] {
            assert!(matches!(natnetwork(&words(line)), Err(UsageError::Syntax(_))), "{line}");
        }
    }
}
