//! `list`, extra data and global properties.

use super::Request;
use crate::getopt::{self, Item, Opt, Parser, Want, on_off, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    pub what: Vec<ListKind>,
    pub long: bool,
    pub sorted: bool,
    /// Prints a heading before each list.
    pub multiple: bool,
}

macro_rules! list_kinds {
    ($($variant:ident: $($word:literal)|+;)*) => {
        /// What `list` can list.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ListKind { $($variant,)* }

        impl ListKind {
            pub const WORDS: &'static [(&'static str, Self)] = &[$($(($word, Self::$variant),)+)*];

            /// The preferred word.
            pub fn word(self) -> &'static str {
                Self::WORDS.iter().find(|(_, kind)| *kind == self).map_or("", |(word, _)| word)
            }
        }
    };
}

list_kinds! {
    Vms: "vms";
    RunningVms: "runningvms";
    OsTypes: "ostypes";
    HostDvds: "hostdvds";
    HostFloppies: "hostfloppies";
    InternalNetworks: "intnets";
    BridgedInterfaces: "bridgedifs" | "hostifs";
    HostOnlyInterfaces: "hostonlyifs";
    HostOnlyNetworks: "hostonlynets";
    CloudNetworks: "cloudnets";
    NatNetworks: "natnets" | "natnetworks";
    HostInfo: "hostinfo";
    HostCpuIds: "hostcpuids";
    HddBackends: "hddbackends";
    Hdds: "hdds";
    Dvds: "dvds";
    Floppies: "floppies";
    UsbHost: "usbhost";
    UsbFilters: "usbfilters";
    SystemProperties: "systemproperties";
    Updates: "updates";
    DhcpServers: "dhcpservers";
    ExtPacks: "extpacks";
    Groups: "groups";
    Webcams: "webcams";
    ScreenshotFormats: "screenshotformats";
    CloudProviders: "cloudproviders";
    CloudProfiles: "cloudprofiles";
    CpuProfiles: "cpu-profiles";
    HostDrives: "hostdrives";
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Global,
    Machine(String),
}

impl Scope {
    fn new(word: &str) -> Self {
        if word == "global" { Self::Global } else { Self::Machine(word.to_owned()) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetExtraData {
    pub scope: Scope,
    /// `None` lists every key.
    pub key: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetExtraData {
    pub scope: Scope,
    pub key: String,
    /// Empty deletes the key.
    pub value: String,
}

/// A global property as an attribute of ISystemProperties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetProperty {
    pub attribute: &'static str,
    pub value: PropertyValue,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropertyValue {
    Text(String),
    Bool(bool),
    U32(u32),
}

pub fn list(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Long,
        Multiple,
        Sorted,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["long"], 'l', Want::Nothing, Key::Long),
        short(&["multiple"], 'm', Want::Nothing, Key::Multiple),
        short(&["sorted"], 's', Want::Nothing, Key::Sorted),
    ];
    let mut request = List { what: Vec::new(), long: false, sorted: false, multiple: false };
    let mut words: Vec<String> = words.to_vec();
    // Ansible gives the settings password to "list" instead of to VBoxManage; no settings need it.
    if let Some(at) = words.iter().position(|word| word == "--settingspwfile" || word == "--settingspw") {
        words.drain(at..words.len().min(at + 2));
    }
    let mut parser = Parser::new(&words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Opt { key: Key::Long, .. } => request.long = true,
            Item::Opt { key: Key::Multiple, .. } => request.multiple = true,
            Item::Opt { key: Key::Sorted, .. } => request.sorted = true,
            Item::Word(word) => match ListKind::WORDS.iter().find(|(name, _)| *name == word) {
                Some((_, kind)) => request.what.push(*kind),
                None => return Err(UsageError::syntax(format!("Unknown subcommand \"{word}\"."))),
            },
        }
    }
    match request.what.last() {
        None => return Err(UsageError::syntax("Missing subcommand for \"list\" command.")),
        // Without --multiple, the last word counts.
        Some(last) if !request.multiple => request.what = vec![*last],
        Some(_) => {}
    }
    Ok(Request::List(request))
}

pub fn getextradata(words: &[String]) -> Parsed<Request> {
    help_wanted(words)?;
    let (scope, key) = match words {
        [scope] => (scope, None),
        [scope, key] if key == "enumerate" => (scope, None),
        [scope, key] => (scope, Some(key.clone())),
        _ => return Err(UsageError::syntax("Incorrect number of parameters")),
    };
    Ok(Request::GetExtraData(GetExtraData { scope: Scope::new(scope), key }))
}

pub fn setextradata(words: &[String]) -> Parsed<Request> {
    help_wanted(words)?;
    let (scope, key, value) = match words {
        [scope, key] => (scope, key, String::new()),
        [scope, key, value] => (scope, key, value.clone()),
        [_, _, _, _, ..] => return Err(UsageError::syntax("Too many parameters")),
        _ => return Err(UsageError::syntax("Not enough parameters")),
    };
    Ok(Request::SetExtraData(SetExtraData { scope: Scope::new(scope), key: key.clone(), value }))
}

/// Property, attribute, and the word that stands for the default.
const TEXT_PROPERTIES: &[(&str, &str, Option<&str>)] = &[
    ("machinefolder", "DefaultMachineFolder", Some("default")),
    ("vrdeauthlibrary", "VRDEAuthLibrary", Some("default")),
    ("vrdpauthlibrary", "VRDEAuthLibrary", Some("default")),
    ("websrvauthlibrary", "WebServiceAuthLibrary", Some("default")),
    ("vrdeextpack", "DefaultVRDEExtPack", Some("null")),
    ("autostartdbpath", "AutostartDatabasePath", Some("null")),
    ("defaultfrontend", "DefaultFrontend", Some("default")),
    ("logginglevel", "LoggingLevel", Some("default")),
    ("proxyurl", "ProxyURL", None),
    ("language", "LanguageId", None),
];

pub fn setproperty(words: &[String]) -> Parsed<Request> {
    help_wanted(words)?;
    let [name, text] = words else { return Err(UsageError::syntax("Incorrect number of parameters")) };
    let request = |attribute, value| Ok(Request::SetProperty(SetProperty { attribute, value }));
    if let Some((_, attribute, default)) = TEXT_PROPERTIES.iter().find(|(known, ..)| known == name) {
        let text = if *default == Some(text.as_str()) { String::new() } else { text.clone() };
        return request(attribute, PropertyValue::Text(text));
    }
    match name.as_str() {
        "hwvirtexclusive" => {
            let on = on_off(text)
                .ok_or_else(|| UsageError::argument(format!("Invalid hwvirtexclusive argument '{text}'")))?;
            request("ExclusiveHwVirt", PropertyValue::Bool(on))
        }
        "loghistorycount" => {
            let count = getopt::unsigned(text)
                .and_then(|value| value.try_into().ok())
                .ok_or_else(|| UsageError::argument(format!("Error parsing Log history count '{text}'")))?;
            request("LogHistoryCount", PropertyValue::U32(count))
        }
        "proxymode" => {
            let mode = match text.to_ascii_lowercase().as_str() {
                "system" => "System",
                "noproxy" => "NoProxy",
                "manual" => "Manual",
                _ => return Err(UsageError::argument(format!("Unknown proxy mode: '{text}'"))),
            };
            request("ProxyMode", PropertyValue::Text(mode.to_owned()))
        }
        _ => Err(UsageError::syntax(format!("Invalid parameter '{name}'"))),
    }
}

/// Commands without options know these words only where nothing else could be meant.
fn help_wanted(words: &[String]) -> Parsed<()> {
    match words {
        [word] if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?") => Err(UsageError::Help),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn list_takes_its_options_on_either_side() {
        for line in ["-l vms", "vms --long", "list-is-gone vms -l"] {
            let parsed = list(&words(line));
            if line.starts_with("list") {
                assert_eq!(parsed, Err(UsageError::syntax("Unknown subcommand \"list-is-gone\".")));
                continue;
            }
            let expected = List { what: vec![ListKind::Vms], long: true, sorted: false, multiple: false };
            assert_eq!(parsed, Ok(Request::List(expected)), "{line}");
        }
        assert!(matches!(list(&words("-s")), Err(UsageError::Syntax(_))));
        assert!(list(&words("-l vms --settingspwfile /f")).is_ok());
    }

    #[test]
    fn every_word_of_list_is_known() {
        for (word, kind) in ListKind::WORDS {
            let Ok(Request::List(request)) = list(&words(word)) else { panic!("{word}") };
            assert_eq!(request.what, [*kind]);
        }
        let Ok(Request::List(request)) = list(&words("-m vms groups")) else { panic!() };
        assert_eq!(request.what, [ListKind::Vms, ListKind::Groups]);
    }

    #[test]
    fn extra_data_of_global_is_not_a_machines() {
        let expected = GetExtraData { scope: Scope::Global, key: None };
        assert_eq!(getextradata(&words("global enumerate")), Ok(Request::GetExtraData(expected.clone())));
        assert_eq!(getextradata(&words("global")), Ok(Request::GetExtraData(expected)));
        let expected =
            SetExtraData { scope: Scope::Machine("vm".into()), key: "a/b".into(), value: "c".into() };
        assert_eq!(setextradata(&words("vm a/b c")), Ok(Request::SetExtraData(expected)));
        let Ok(Request::SetExtraData(delete)) = setextradata(&words("vm a/b")) else { panic!() };
        assert_eq!(delete.value, "");
        assert!(setextradata(&words("vm a b c")).is_err());
    }

    #[test]
    fn properties_become_attributes() {
        for (line, attribute, value) in [
            ("machinefolder /m", "DefaultMachineFolder", PropertyValue::Text("/m".into())),
            ("machinefolder default", "DefaultMachineFolder", PropertyValue::Text(String::new())),
            ("hwvirtexclusive off", "ExclusiveHwVirt", PropertyValue::Bool(false)),
            ("loghistorycount 5", "LogHistoryCount", PropertyValue::U32(5)),
            ("proxymode noproxy", "ProxyMode", PropertyValue::Text("NoProxy".into())),
        ] {
            let expected = SetProperty { attribute, value };
            assert_eq!(setproperty(&words(line)), Ok(Request::SetProperty(expected)), "{line}");
        }
        assert_eq!(setproperty(&words("nope 1")), Err(UsageError::syntax("Invalid parameter 'nope'")));
        assert_eq!(
            setproperty(&words("machinefolder")),
            Err(UsageError::syntax("Incorrect number of parameters"))
        );
    }
}
