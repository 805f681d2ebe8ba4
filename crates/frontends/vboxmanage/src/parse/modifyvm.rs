//! `modifyvm`: one table row for each option, which says how the option is spelt, what it takes and which
//! attribute of the Main API it sets.
//!
//! Every option of VirtualBox 7.0 is here, in its present and its run-together spelling, the options of 7.1 that
//! have a meaning for the settings of 7.0, and the old storage options that 7.0 still takes. The parser turns a
//! command line into a list of [`Change`]s, in order; nothing is looked up.

use crate::getopt::{self, Item, Opt, Parser, Value, Want};
use crate::usage::{Parsed, UsageError};

mod rows;
mod special;

pub use rows::ROWS;
pub use special::{DIRECTIONS, NIC_ATTACHMENTS, PRIORITIES, PROMISC, UART_MODES, split_groups, strip_host};

/// Greatest NIC number that any chipset offers (ICH9); the machine's own limit is checked when it is known.
pub const MAX_NICS: u32 = 36;
/// Serial and parallel ports.
pub const MAX_SERIAL_PORTS: u32 = 4;
pub const MAX_PARALLEL_PORTS: u32 = 2;

/// `modifyvm` as asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct ModifyVm {
    pub vm: String,
    pub changes: Vec<Change>,
}

/// The object that an attribute belongs to. Numbers count from 0, as the Main API's do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    Machine,
    GraphicsAdapter,
    BiosSettings,
    TrustedPlatformModule,
    AudioAdapter,
    VrdeServer,
    GuestDebugControl,
    RecordingSettings,
    /// Each screen of the recording settings.
    RecordingScreens,
    Nic(u32),
    NatEngine(u32),
    SerialPort(u32),
    ParallelPort(u32),
}

/// A value for an attribute; enumerations by the Main API's value name.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    Bool(bool),
    U32(u32),
    I64(i64),
    Text(String),
    Texts(Vec<String>),
    Enum(&'static str),
}

/// One step of a change.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Set {
        object: Object,
        attribute: &'static str,
        value: Scalar,
    },
    CpuProperty {
        property: &'static str,
        on: bool,
    },
    HwVirtProperty {
        property: &'static str,
        on: bool,
    },
    SetCpuidLeaf {
        leaf: u32,
        subleaf: u32,
        registers: [u32; 4],
    },
    RemoveCpuidLeaf {
        leaf: u32,
        subleaf: u32,
    },
    RemoveAllCpuidLeaves,
    HotPlugCpu(u32),
    HotUnplugCpu(u32),
    /// `position` counts from 1.
    BootOrder {
        position: u32,
        device: &'static str,
    },
    /// A file of at most 256 KiB.
    Icon(String),
    /// `None` disables the adapter; otherwise a `NetworkAttachmentType`.
    NicAttachment {
        nic: u32,
        attachment: Option<&'static str>,
    },
    NicProperty {
        nic: u32,
        name: String,
        value: String,
    },
    /// MTU, socket send and receive buffers, TCP send and receive windows.
    NatSettings {
        nic: u32,
        values: [u32; 5],
    },
    NatAddRule {
        nic: u32,
        rule: NatRule,
    },
    NatRemoveRule {
        nic: u32,
        name: String,
    },
    /// A USB pointing device or keyboard needs a controller: adds OHCI if the machine has neither OHCI nor xHCI.
    NeedUsb,
    UsbController {
        kind: &'static str,
        name: &'static str,
        on: bool,
    },
    UsbRename {
        old: String,
        new: String,
    },
    /// ICH9 works with an I/O APIC only.
    NeedIoApic,
    VrdeProperty {
        name: String,
        value: String,
    },
    TeleporterPasswordFile(String),
    RecordingScreens(Screens),
    RecordingFile(String),
    PciAttach {
        host: i32,
        guest: i32,
    },
    PciDetach {
        host: i32,
    },
    ExtraData {
        key: String,
        value: String,
    },
    Storage(OldStorage),
}

/// A port forwarding rule. Empty addresses mean any host address and the guest's DHCP address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatRule {
    pub name: String,
    /// `NATProtocol`.
    pub protocol: &'static str,
    pub host_ip: String,
    pub host_port: u16,
    pub guest_ip: String,
    pub guest_port: u16,
}

/// Which screens to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Screens {
    All,
    None,
    Only(Vec<u32>),
}

/// The storage options that `storagectl` and `storageattach` replaced. They act on controllers with fixed names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OldStorage {
    /// `None` detaches.
    Disk {
        controllers: &'static [&'static str],
        port: u32,
        device: u32,
        medium: Option<String>,
    },
    ControllerType {
        controller: &'static str,
        kind: &'static str,
    },
    PortCount {
        controller: &'static str,
        count: u32,
    },
    Add {
        controller: &'static str,
        bus: &'static str,
        kind: &'static str,
    },
    Remove {
        controllers: &'static [&'static str],
    },
    DvdPassthrough(bool),
    Dvd(OldMedium),
    /// `None` removes the drive.
    Floppy(Option<OldMedium>),
}

/// A removable medium in the old spelling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OldMedium {
    Empty,
    HostDrive(String),
    Image(String),
}

/// How an option's value becomes changes.
#[derive(Clone, Copy)]
pub enum Action {
    /// Sets an attribute to the value as it is.
    Set(Target, &'static str),
    /// Sets an attribute to the enumeration value that stands beside the word.
    Words(Target, &'static str, &'static [(&'static str, &'static str)]),
    /// Sets a text attribute; this word stands for the empty text.
    TextOr(Target, &'static str, &'static str),
    Cpu(&'static str),
    HwVirt(&'static str),
    Vrde(&'static str),
    Usb(&'static str, &'static str),
    Special(fn(&mut Context<'_, '_>) -> Parsed<()>),
}

/// [`Object`] without its number, which is the option's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Machine,
    GraphicsAdapter,
    BiosSettings,
    TrustedPlatformModule,
    AudioAdapter,
    VrdeServer,
    GuestDebugControl,
    RecordingSettings,
    RecordingScreens,
    Nic,
    NatEngine,
    ParallelPort,
}

/// A row of the table. `names` are long spellings, the preferred one first.
#[derive(Clone, Copy)]
pub struct Row {
    pub names: &'static [&'static str],
    pub want: Want,
    pub indexed: bool,
    pub action: Action,
}

/// What a special row works with.
pub struct Context<'p, 'w> {
    /// The option as the user wrote it, without index.
    pub name: String,
    pub index: u32,
    pub value: Value,
    pub changes: &'p mut Vec<Change>,
    parser: &'p mut Parser<'w, usize>,
}

impl Context<'_, '_> {
    fn push(&mut self, change: Change) {
        self.changes.push(change);
    }

    fn set(&mut self, object: Object, attribute: &'static str, value: Scalar) {
        self.changes.push(Change::Set { object, attribute, value });
    }

    fn text(&self) -> &str {
        match &self.value {
            Value::Text(text) => text,
            _ => "",
        }
    }

    /// A further word that belongs to the option.
    fn more(&mut self, want: Want) -> Parsed<Value> {
        self.parser.fetch(&self.name, want).map_err(|_| self.bad_argument())
    }

    fn bad_argument(&self) -> UsageError {
        UsageError::syntax(format!("Missing or invalid argument to '{}'", self.name))
    }

    fn invalid(&self) -> UsageError {
        UsageError::failure(format!("Invalid {} argument '{}'", self.name, self.text()))
    }

    /// The NIC's slot, counted from 0.
    fn nic(&self) -> Parsed<u32> {
        number(self.index, MAX_NICS, "NIC")
    }
}

/// Checks a number that counts from 1 and makes it count from 0.
fn number(index: u32, max: u32, what: &str) -> Parsed<u32> {
    if (1..=max).contains(&index) {
        Ok(index - 1)
    } else {
        Err(UsageError::failure(format!("Invalid {what} number {index}")))
    }
}

fn object(target: Target, index: u32) -> Parsed<Object> {
    Ok(match target {
        Target::Machine => Object::Machine,
        Target::GraphicsAdapter => Object::GraphicsAdapter,
        Target::BiosSettings => Object::BiosSettings,
        Target::TrustedPlatformModule => Object::TrustedPlatformModule,
        Target::AudioAdapter => Object::AudioAdapter,
        Target::VrdeServer => Object::VrdeServer,
        Target::GuestDebugControl => Object::GuestDebugControl,
        Target::RecordingSettings => Object::RecordingSettings,
        Target::RecordingScreens => Object::RecordingScreens,
        Target::Nic => Object::Nic(number(index, MAX_NICS, "NIC")?),
        Target::NatEngine => Object::NatEngine(number(index, MAX_NICS, "NIC")?),
        Target::ParallelPort => Object::ParallelPort(number(index, MAX_PARALLEL_PORTS, "LPT")?),
    })
}

/// The enumeration value beside `word`, in any case.
pub fn lookup(words: &[(&'static str, &'static str)], word: &str) -> Option<&'static str> {
    words.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, value)| *value)
}

/// Parses everything after `modifyvm`.
pub fn parse(words: &[String]) -> Parsed<ModifyVm> {
    if matches!(words, [word] if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?")) {
        return Err(UsageError::Help);
    }
    if words.len() < 2 {
        return Err(UsageError::syntax("Not enough parameters"));
    }
    let table: Vec<Opt<usize>> = ROWS
        .iter()
        .enumerate()
        .map(|(key, row)| Opt { names: row.names, short: None, want: row.want, indexed: row.indexed, key })
        .collect();
    // The first word is the machine, even if it looks like an option of no table.
    let (mut vm, rest) = match words.split_first() {
        Some((first, rest)) if !first.starts_with('-') => (Some(first.clone()), rest),
        _ => (None, words),
    };
    let mut changes = Vec::new();
    let mut parser = Parser::new(rest, &table);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) if vm.is_none() => vm = Some(word),
            Item::Word(word) => return Err(UsageError::invalid_parameter(&word)),
            Item::Opt { key, name, index, value } => {
                let Some(row) = ROWS.get(key) else { continue };
                let index = index.unwrap_or_default();
                let mut context = Context { name, index, value, changes: &mut changes, parser: &mut parser };
                apply(row, &mut context)?;
            }
        }
    }
    match vm {
        Some(vm) => Ok(ModifyVm { vm, changes }),
        None => Err(UsageError::syntax("VM name or UUID required")),
    }
}

fn apply(row: &Row, context: &mut Context<'_, '_>) -> Parsed<()> {
    match row.action {
        Action::Set(target, attribute) => {
            let object = object(target, context.index)?;
            let value = match context.value.clone() {
                Value::Bool(value) => Scalar::Bool(value),
                Value::U32(value) => Scalar::U32(value),
                Value::I64(value) => Scalar::I64(value),
                Value::Text(value) => Scalar::Text(value),
                _ => return Err(context.bad_argument()),
            };
            context.set(object, attribute, value);
        }
        Action::Words(target, attribute, words) => {
            let object = object(target, context.index)?;
            let value = lookup(words, context.text()).ok_or_else(|| context.invalid())?;
            context.set(object, attribute, Scalar::Enum(value));
        }
        Action::TextOr(target, attribute, empty) => {
            let object = object(target, context.index)?;
            let text = context.text();
            let text = if text.eq_ignore_ascii_case(empty) { String::new() } else { text.to_owned() };
            context.set(object, attribute, Scalar::Text(text));
        }
        Action::Cpu(property) => {
            let on = context.value == Value::Bool(true);
            context.push(Change::CpuProperty { property, on });
        }
        Action::HwVirt(property) => {
            let on = context.value == Value::Bool(true);
            context.push(Change::HwVirtProperty { property, on });
        }
        Action::Vrde(name) => {
            let value = match &context.value {
                Value::Bool(value) => value.to_string(),
                _ => context.text().to_owned(),
            };
            context.push(Change::VrdeProperty { name: name.to_owned(), value });
        }
        Action::Usb(kind, name) => {
            let on = context.value == Value::Bool(true);
            context.push(Change::UsbController { kind, name, on });
        }
        Action::Special(run) => run(context)?,
    }
    Ok(())
}

/// `name,tcp|udp,hostip,hostport,guestip,guestport`
pub fn parse_nat_rule(text: &str, nic: u32) -> Parsed<Option<NatRule>> {
    let fields: Vec<&str> = text.split(',').map(str::trim).collect();
    let [name, protocol, host_ip, host_port, guest_ip, guest_port] = fields[..] else { return Ok(None) };
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "udp" => "UDP",
        "tcp" => "TCP",
        _ => {
            return Err(UsageError::failure(format!("Invalid proto '{text}' specified for NIC {nic}")));
        }
    };
    let port = |field: &str| {
        if field.is_empty() {
            return Ok(0);
        }
        getopt::unsigned(field)
            .and_then(|value| u16::try_from(value).ok())
            .ok_or_else(|| UsageError::failure(format!("Invalid port '{field}' specified for NIC {nic}")))
    };
    Ok(Some(NatRule {
        name: name.to_owned(),
        protocol,
        host_ip: host_ip.to_owned(),
        host_port: port(host_port)?,
        guest_ip: guest_ip.to_owned(),
        guest_port: port(guest_port)?,
    }))
}

#[cfg(test)]
mod tests;
