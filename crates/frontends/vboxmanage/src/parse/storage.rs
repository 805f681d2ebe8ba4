//! `storagectl` and `storageattach`.

use super::modifyvm::{lookup, strip_host};
use super::{Request, operand};
use crate::getopt::{Item, Opt, Parser, Want, on_off, opt, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StorageCtl {
    pub vm: String,
    pub controller: String,
    pub remove: bool,
    /// `StorageBus`.
    pub add: Option<&'static str>,
    /// `StorageControllerType`.
    pub kind: Option<&'static str>,
    pub port_count: Option<u32>,
    pub host_io_cache: Option<bool>,
    pub bootable: Option<bool>,
    pub rename: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageAttach {
    pub vm: String,
    pub controller: String,
    pub port: Option<u32>,
    pub device: Option<u32>,
    /// `DeviceType`.
    pub kind: Option<&'static str>,
    pub medium: Option<MediumSpec>,
    /// `MediumType`.
    pub medium_type: Option<&'static str>,
    pub passthrough: Option<bool>,
    pub temp_eject: Option<bool>,
    pub non_rotational: Option<bool>,
    pub discard: Option<bool>,
    pub hot_pluggable: Option<bool>,
    /// Empty for no group.
    pub bandwidth_group: Option<String>,
    pub force_unmount: bool,
    pub comment: Option<String>,
    pub set_uuid: Option<String>,
    pub set_parent_uuid: Option<String>,
    pub iscsi: Box<Iscsi>,
}

/// The options of `--medium iscsi`, empty where not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Iscsi {
    pub server: String,
    pub target: String,
    pub port: String,
    pub lun: String,
    pub username: String,
    pub password: Option<Password>,
    pub initiator: String,
    pub intnet: bool,
}

/// A password on the command line, or the file that has it.
#[derive(Clone, PartialEq, Eq)]
pub enum Password {
    Given(String),
    File(String),
}

/// Passwords stay out of messages.
impl std::fmt::Debug for Iscsi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Iscsi({}, {})", self.server, self.target)
    }
}

/// What `--medium` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediumSpec {
    /// Takes whatever is there away.
    None,
    EmptyDrive,
    Additions,
    HostDrive(String),
    /// What the other options say.
    Iscsi,
    /// A UUID or a file.
    Image(String),
}

impl MediumSpec {
    fn new(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "none" => Self::None,
            "emptydrive" => Self::EmptyDrive,
            "additions" => Self::Additions,
            "iscsi" => Self::Iscsi,
            _ => match strip_host(text) {
                Some(drive) => Self::HostDrive(drive.to_owned()),
                None => Self::Image(text.to_owned()),
            },
        }
    }
}

const BUSES: &[(&str, &str)] = &[
    ("ide", "IDE"),
    ("sata", "SATA"),
    ("scsi", "SCSI"),
    ("floppy", "Floppy"),
    ("sas", "SAS"),
    ("usb", "USB"),
    ("pcie", "PCIe"),
    ("virtio-scsi", "VirtioSCSI"),
    ("virtio", "VirtioSCSI"),
    ("virtio-blk", "VirtioBlk"),
];

const CONTROLLERS: &[(&str, &str)] = &[
    ("lsilogic", "LsiLogic"),
    ("buslogic", "BusLogic"),
    ("intelahci", "IntelAhci"),
    ("piix3", "PIIX3"),
    ("piix4", "PIIX4"),
    ("ich6", "ICH6"),
    ("i82078", "I82078"),
    ("lsilogicsas", "LsiLogicSas"),
    ("usb", "USB"),
    ("nvme", "NVMe"),
    ("virtio-scsi", "VirtioSCSI"),
    ("virtio", "VirtioSCSI"),
    ("virtio-blk", "VirtioBlk"),
];

/// The words of `--mtype`.
pub(super) const MEDIUM_TYPES: &[(&str, &str)] = &[
    ("normal", "Normal"),
    ("immutable", "Immutable"),
    ("writethrough", "Writethrough"),
    ("shareable", "Shareable"),
    ("readonly", "Readonly"),
    ("multiattach", "MultiAttach"),
];

/// A switch of these commands: a bad word is reported without the synopsis.
fn switch(name: &str, text: &str) -> Parsed<bool> {
    on_off(text).ok_or_else(|| UsageError::failure(format!("Invalid {name} argument '{text}'")))
}

pub fn storagectl(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Name,
        Add,
        Controller,
        PortCount,
        Remove,
        Rename,
        HostIoCache,
        Bootable,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["name"], 'n', Want::Text, Key::Name),
        short(&["add"], 'a', Want::Text, Key::Add),
        short(&["controller"], 'c', Want::Text, Key::Controller),
        // "sataportcount" is what it was called before 4.3.
        short(&["portcount", "sataportcount"], 'p', Want::U32, Key::PortCount),
        short(&["remove"], 'r', Want::Nothing, Key::Remove),
        short(&["rename"], 'R', Want::Text, Key::Rename),
        short(&["hostiocache"], 'i', Want::Text, Key::HostIoCache),
        short(&["bootable"], 'b', Want::Text, Key::Bootable),
    ];
    let mut request = StorageCtl::default();
    let (mut vm, mut controller) = (None, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, value, name) = match item {
            Item::Word(word) => {
                operand(&mut vm, word)?;
                continue;
            }
            Item::Opt { key, value, name, .. } => (key, value, name),
        };
        match key {
            Key::Name => controller = Some(value.text()),
            Key::Add => {
                let text = value.text();
                let unknown = || UsageError::failure(format!("Invalid --add argument '{text}'"));
                request.add = Some(lookup(BUSES, &text).ok_or_else(unknown)?);
            }
            Key::Controller => {
                let text = value.text();
                // VirtualBox names another option here.
                let unknown = || UsageError::failure(format!("Invalid --type argument '{text}'"));
                request.kind = Some(lookup(CONTROLLERS, &text).ok_or_else(unknown)?);
            }
            Key::PortCount => request.port_count = Some(value.u32()),
            Key::Remove => request.remove = true,
            Key::Rename => request.rename = Some(value.text()),
            Key::HostIoCache => request.host_io_cache = Some(switch(&name, &value.text())?),
            Key::Bootable => request.bootable = Some(switch(&name, &value.text())?),
        }
    }
    request.vm = vm.ok_or_else(|| UsageError::syntax("Too few parameters"))?;
    request.controller =
        controller.ok_or_else(|| UsageError::syntax("Storage controller name not specified"))?;
    let changes = request.remove
        || request.add.is_some()
        || request.kind.is_some()
        || request.port_count.is_some()
        || request.host_io_cache.is_some()
        || request.bootable.is_some()
        || request.rename.is_some();
    if !changes {
        return Err(UsageError::syntax("Too few parameters"));
    }
    Ok(Request::StorageCtl(request))
}

pub fn storageattach(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Controller,
        Port,
        Device,
        Type,
        Medium,
        MediumType,
        Passthrough,
        TempEject,
        NonRotational,
        Discard,
        HotPluggable,
        BandwidthGroup,
        ForceUnmount,
        Comment,
        SetUuid,
        SetParentUuid,
        Server,
        Target,
        TargetPort,
        Lun,
        EncodedLun,
        Username,
        Password,
        PasswordFile,
        Initiator,
        Intnet,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["storagectl"], 's', Want::Text, Key::Controller),
        short(&["port"], 'p', Want::U32, Key::Port),
        short(&["device"], 'd', Want::U32, Key::Device),
        short(&["type"], 't', Want::Text, Key::Type),
        short(&["medium"], 'm', Want::Text, Key::Medium),
        short(&["mtype"], 'M', Want::Text, Key::MediumType),
        short(&["passthrough"], 'h', Want::Text, Key::Passthrough),
        short(&["tempeject"], 'e', Want::Text, Key::TempEject),
        short(&["nonrotational"], 'n', Want::Text, Key::NonRotational),
        short(&["discard"], 'u', Want::Text, Key::Discard),
        short(&["hotpluggable"], 'o', Want::Text, Key::HotPluggable),
        short(&["bandwidthgroup"], 'b', Want::Text, Key::BandwidthGroup),
        short(&["forceunmount"], 'f', Want::Nothing, Key::ForceUnmount),
        short(&["comment"], 'C', Want::Text, Key::Comment),
        short(&["setuuid"], 'q', Want::Text, Key::SetUuid),
        short(&["setparentuuid"], 'Q', Want::Text, Key::SetParentUuid),
        short(&["server"], 'S', Want::Text, Key::Server),
        short(&["target"], 'T', Want::Text, Key::Target),
        short(&["tport"], 'P', Want::Text, Key::TargetPort),
        short(&["lun"], 'L', Want::Text, Key::Lun),
        short(&["encodedlun"], 'E', Want::Text, Key::EncodedLun),
        short(&["username"], 'U', Want::Text, Key::Username),
        short(&["password"], 'W', Want::Text, Key::Password),
        short(&["passwordfile"], 'w', Want::Text, Key::PasswordFile),
        short(&["initiator"], 'N', Want::Text, Key::Initiator),
        opt(&["intnet"], Want::Nothing, Key::Intnet),
    ];
    let mut request = StorageAttach {
        vm: String::new(),
        controller: String::new(),
        port: None,
        device: None,
        kind: None,
        medium: None,
        medium_type: None,
        passthrough: None,
        temp_eject: None,
        non_rotational: None,
        discard: None,
        hot_pluggable: None,
        bandwidth_group: None,
        force_unmount: false,
        comment: None,
        set_uuid: None,
        set_parent_uuid: None,
        iscsi: Box::default(),
    };
    let (mut vm, mut controller) = (None, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, value, name) = match item {
            Item::Word(word) => {
                operand(&mut vm, word)?;
                continue;
            }
            Item::Opt { key, value, name, .. } => (key, value, name),
        };
        match key {
            Key::Controller => controller = Some(value.text()),
            Key::Port => request.port = Some(value.u32()),
            Key::Device => request.device = Some(value.u32()),
            Key::Type => {
                const KINDS: &[(&str, &str)] = &[("hdd", "HardDisk"), ("fdd", "Floppy"), ("dvddrive", "DVD")];
                let text = value.text();
                let unknown = || UsageError::argument(format!("Invalid --type argument '{text}'"));
                request.kind = Some(lookup(KINDS, &text).ok_or_else(unknown)?);
            }
            Key::Medium => request.medium = Some(MediumSpec::new(&value.text())),
            Key::MediumType => {
                let text = value.text();
                let unknown = || UsageError::argument(format!("Invalid medium type '{text}'"));
                request.medium_type = Some(lookup(MEDIUM_TYPES, &text).ok_or_else(unknown)?);
            }
            Key::Passthrough => request.passthrough = Some(switch(&name, &value.text())?),
            Key::TempEject => request.temp_eject = Some(switch(&name, &value.text())?),
            Key::NonRotational => request.non_rotational = Some(switch(&name, &value.text())?),
            Key::Discard => request.discard = Some(switch(&name, &value.text())?),
            Key::HotPluggable => request.hot_pluggable = Some(switch(&name, &value.text())?),
            Key::BandwidthGroup => {
                let text = value.text();
                let none = text.eq_ignore_ascii_case("none");
                request.bandwidth_group = Some(if none { String::new() } else { text });
            }
            Key::ForceUnmount => request.force_unmount = true,
            Key::Comment => request.comment = Some(value.text()),
            Key::SetUuid => request.set_uuid = Some(value.text()),
            Key::SetParentUuid => request.set_parent_uuid = Some(value.text()),
            Key::Server => request.iscsi.server = value.text(),
            Key::Target => request.iscsi.target = value.text(),
            Key::TargetPort => request.iscsi.port = value.text(),
            Key::Lun => request.iscsi.lun = value.text(),
            Key::EncodedLun => request.iscsi.lun = format!("enc{}", value.text()),
            Key::Username => request.iscsi.username = value.text(),
            Key::Password => request.iscsi.password = Some(Password::Given(value.text())),
            Key::PasswordFile => request.iscsi.password = Some(Password::File(value.text())),
            Key::Initiator => request.iscsi.initiator = value.text(),
            Key::Intnet => request.iscsi.intnet = true,
        }
    }
    request.controller =
        controller.ok_or_else(|| UsageError::syntax("Storage controller name not specified"))?;
    request.vm = vm.ok_or_else(|| UsageError::syntax("VM name or UUID required"))?;
    Ok(Request::StorageAttach(request))
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    fn ctl(line: &str) -> StorageCtl {
        match storagectl(&words(line)) {
            Ok(Request::StorageCtl(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn attach(line: &str) -> StorageAttach {
        match storageattach(&words(line)) {
            Ok(Request::StorageAttach(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn storagectl_knows_every_bus_and_controller() {
        for (word, bus) in BUSES {
            assert_eq!(ctl(&format!("vm --name c --add {word}")).add, Some(*bus));
        }
        for (word, kind) in CONTROLLERS {
            assert_eq!(ctl(&format!("vm --name c --add scsi --controller {word}")).kind, Some(*kind));
        }
        let request = ctl(
            "vm --name=c --add=sata --controller IntelAHCI --portcount 4 --hostiocache on --bootable=off",
        );
        assert_eq!(
            (request.port_count, request.host_io_cache, request.bootable),
            (Some(4), Some(true), Some(false))
        );
        assert!(ctl("vm --name c --remove").remove);
        assert_eq!(ctl("vm --name c --rename d").rename.as_deref(), Some("d"));
    }

    #[test]
    fn storagectl_names_what_is_wrong() {
        assert_eq!(storagectl(&words("vm --name c")), Err(UsageError::syntax("Too few parameters")));
        assert_eq!(
            storagectl(&words("vm --add ide --bootable on")),
            Err(UsageError::syntax("Storage controller name not specified"))
        );
        assert_eq!(
            storagectl(&words("vm --name c --add isa")),
            Err(UsageError::failure("Invalid --add argument 'isa'"))
        );
        assert_eq!(
            storagectl(&words("vm --name c --hostiocache maybe")),
            Err(UsageError::failure("Invalid --hostiocache argument 'maybe'"))
        );
    }

    #[test]
    fn storageattach_tells_the_kinds_of_media_apart() {
        for (word, medium) in [
            ("none", MediumSpec::None),
            ("emptydrive", MediumSpec::EmptyDrive),
            ("additions", MediumSpec::Additions),
            ("host:/dev/sr0", MediumSpec::HostDrive("/dev/sr0".into())),
            ("iSCSI", MediumSpec::Iscsi),
            ("a.iso", MediumSpec::Image("a.iso".into())),
        ] {
            assert_eq!(attach(&format!("vm --storagectl c --medium {word}")).medium, Some(medium), "{word}");
        }
    }

    #[test]
    fn storageattach_takes_every_option() {
        let request = attach(
            "vm --storagectl c --port 1 --device 0 --type hdd --medium d.vdi --mtype immutable \
             --nonrotational on --discard off --hotpluggable on --tempeject off --passthrough on \
             --bandwidthgroup none --forceunmount --comment text --setuuid u --setparentuuid p",
        );
        assert_eq!((request.port, request.device), (Some(1), Some(0)));
        assert_eq!((request.kind, request.medium_type), (Some("HardDisk"), Some("Immutable")));
        assert_eq!((request.non_rotational, request.discard), (Some(true), Some(false)));
        assert_eq!((request.hot_pluggable, request.temp_eject), (Some(true), Some(false)));
        assert_eq!(request.passthrough, Some(true));
        assert_eq!(request.bandwidth_group.as_deref(), Some(""));
        assert!(request.force_unmount);
        assert_eq!(request.comment.as_deref(), Some("text"));
        assert_eq!(request.set_uuid.as_deref(), Some("u"));
        assert_eq!(request.set_parent_uuid.as_deref(), Some("p"));
        let target = attach(
            "vm --storagectl c --medium iscsi --server h --target iqn.x --tport 9 --encodedlun 7 --username u \
             --password hush --initiator me --intnet",
        );
        let expected = Iscsi {
            server: "h".into(),
            target: "iqn.x".into(),
            port: "9".into(),
            lun: "enc7".into(),
            username: "u".into(),
            password: Some(Password::Given("hush".into())),
            initiator: "me".into(),
            intnet: true,
        };
        assert_eq!(*target.iscsi, expected);
        assert!(!format!("{target:?}").contains("hush"));
        assert_eq!(
            *attach("vm --storagectl c --lun 3 --passwordfile f").iscsi,
            Iscsi { lun: "3".into(), password: Some(Password::File("f".into())), ..Iscsi::default() }
        );
        assert_eq!(
            storageattach(&words("vm --storagectl c --type tape")),
            Err(UsageError::argument("Invalid --type argument 'tape'"))
        );
        assert_eq!(
            storageattach(&words("vm --port 0")),
            Err(UsageError::syntax("Storage controller name not specified"))
        );
    }
}
