//! Commands that make, register, start and show machines.

use std::path::PathBuf;

use uuid::Uuid;

use super::modifyvm::split_groups;
use super::{Request, operand};
use crate::getopt::{Item, Opt, Parser, Value, Want, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateVm {
    pub name: String,
    pub groups: Vec<String>,
    pub base_folder: String,
    pub os_type: String,
    pub uuid: Option<Uuid>,
    pub register: bool,
    pub default: bool,
    pub cipher: String,
    pub password_id: String,
    pub password: Option<PasswordSource>,
}

/// Where a password comes from: `-` asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PasswordSource {
    Terminal,
    File(PathBuf),
}

impl PasswordSource {
    fn new(text: String) -> Self {
        if text == "-" { Self::Terminal } else { Self::File(text.into()) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterVm {
    pub file: String,
    pub password: Option<PasswordSource>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnregisterVm {
    pub vm: String,
    pub delete: bool,
    /// Deletes removable media that only this machine uses, too.
    pub delete_all: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartVm {
    pub vms: Vec<String>,
    /// The session type, as the Main API takes it; empty for the machine's default.
    pub front_end: String,
    pub environment: Vec<String>,
    pub password_id: Option<String>,
    pub password: Option<PasswordSource>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShowVmInfo {
    pub vm: String,
    pub details: Details,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Details {
    Standard,
    Full,
    MachineReadable,
    /// The log file with this number instead.
    Log(u32),
}

pub fn createvm(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Name,
        Groups,
        Folder,
        OsType,
        Uuid,
        Register,
        Default,
        Cipher,
        PasswordId,
        Password,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["name"], 'n', Want::Text, Key::Name),
        short(&["groups"], 'g', Want::Text, Key::Groups),
        short(&["basefolder"], 'p', Want::Text, Key::Folder),
        short(&["ostype", "os-type"], 'o', Want::Text, Key::OsType),
        short(&["uuid"], 'u', Want::Uuid, Key::Uuid),
        short(&["register"], 'r', Want::Nothing, Key::Register),
        short(&["default"], 'd', Want::Nothing, Key::Default),
        short(&["cipher"], 'c', Want::Text, Key::Cipher),
        short(&["password-id"], 'i', Want::Text, Key::PasswordId),
        short(&["password"], 'w', Want::Text, Key::Password),
    ];
    let mut request = CreateVm::default();
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        let Item::Opt { key, value, .. } = item else {
            let Item::Word(word) = item else { continue };
            return Err(UsageError::invalid_parameter(&word));
        };
        match key {
            Key::Name => request.name = value.text(),
            Key::Groups => request.groups.extend(split_groups(&value.text())),
            Key::Folder => request.base_folder = value.text(),
            Key::OsType => request.os_type = value.text(),
            Key::Uuid => {
                if let Value::Uuid(uuid) = value {
                    request.uuid = Some(uuid);
                }
            }
            Key::Register => request.register = true,
            Key::Default => request.default = true,
            Key::Cipher => request.cipher = value.text(),
            Key::PasswordId => request.password_id = value.text(),
            Key::Password => request.password = Some(PasswordSource::new(value.text())),
        }
    }
    if request.name.is_empty() {
        return Err(UsageError::syntax("Parameter --name is required"));
    }
    Ok(Request::CreateVm(request))
}

pub fn registervm(words: &[String]) -> Parsed<Request> {
    static TABLE: &[Opt<()>] = &[short(&["password"], 'p', Want::Text, ())];
    let (mut file, mut password) = (None, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Opt { value, .. } => password = Some(PasswordSource::new(value.text())),
            Item::Word(word) => operand(&mut file, word)?,
        }
    }
    let file = file.ok_or_else(|| UsageError::syntax("Settings file name required"))?;
    Ok(Request::RegisterVm(RegisterVm { file, password }))
}

pub fn unregistervm(words: &[String]) -> Parsed<Request> {
    static TABLE: &[Opt<bool>] =
        &[short(&["delete"], 'd', Want::Nothing, false), short(&["delete-all"], 'a', Want::Nothing, true)];
    let (mut vm, mut delete, mut delete_all) = (None, false, false);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Opt { key: true, .. } => delete_all = true,
            Item::Opt { .. } => delete = true,
            Item::Word(word) => operand(&mut vm, word)?,
        }
    }
    let vm = vm.ok_or_else(|| UsageError::syntax("VM name required"))?;
    Ok(Request::UnregisterVm(UnregisterVm { vm, delete, delete_all }))
}

pub fn startvm(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Type,
        PutEnv,
        Password,
        PasswordId,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["type"], 't', Want::Text, Key::Type),
        short(&["putenv"], 'E', Want::Text, Key::PutEnv),
        short(&["password"], 'p', Want::Text, Key::Password),
        short(&["password-id"], 'i', Want::Text, Key::PasswordId),
    ];
    let mut request = StartVm {
        vms: Vec::new(),
        front_end: String::new(),
        environment: Vec::new(),
        password_id: None,
        password: None,
    };
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => request.vms.push(word),
            Item::Opt { key: Key::Type, value, .. } => {
                let text = value.text();
                let known = ["gui", "sdl", "headless", "separate", "capture", "emergencystop"];
                let known = known.iter().find(|name| name.eq_ignore_ascii_case(&text));
                request.front_end = known.map_or(text, |name| (*name).to_owned());
            }
            Item::Opt { key: Key::PutEnv, value, .. } => {
                let text = value.text();
                if text.contains('\n') {
                    return Err(UsageError::syntax(
                        "Parameter to option --putenv must not contain any newline character",
                    ));
                }
                request.environment.push(text);
            }
            Item::Opt { key: Key::Password, value, .. } => {
                request.password = Some(PasswordSource::new(value.text()));
            }
            Item::Opt { key: Key::PasswordId, value, .. } => request.password_id = Some(value.text()),
        }
    }
    if request.vms.is_empty() {
        return Err(UsageError::syntax("at least one VM name or uuid required"));
    }
    Ok(Request::StartVm(request))
}

pub fn showvminfo(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Details,
        MachineReadable,
        Log,
        Password,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["details"], 'D', Want::Nothing, Key::Details),
        short(&["machinereadable"], 'M', Want::Nothing, Key::MachineReadable),
        short(&["log"], 'l', Want::U32, Key::Log),
        // Encrypted machines are not opened, so that a password has nothing to do.
        short(&["password-id"], 'i', Want::Text, Key::Password),
        short(&["password"], 'w', Want::Text, Key::Password),
    ];
    let (mut vm, mut full, mut machine_readable, mut log) = (None, false, false, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => operand(&mut vm, word)?,
            Item::Opt { key: Key::Details, .. } => full = true,
            Item::Opt { key: Key::MachineReadable, .. } => machine_readable = true,
            Item::Opt { key: Key::Log, value, .. } => log = Some(value.u32()),
            Item::Opt { key: Key::Password, .. } => {}
        }
    }
    let vm = vm.ok_or_else(|| UsageError::syntax("VM name or UUID required"))?;
    let details = match log {
        Some(_) if full || machine_readable => return Err(UsageError::syntax("Option --log is exclusive")),
        Some(index) => Details::Log(index),
        None if machine_readable => Details::MachineReadable,
        None if full => Details::Full,
        None => Details::Standard,
    };
    Ok(Request::ShowVmInfo(ShowVmInfo { vm, details }))
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn createvm_takes_the_spellings_of_old_and_new_scripts() {
        let uuid = "12345678-9abc-4def-8123-456789abcdef";
        let expected = CreateVm {
            name: "x".into(),
            groups: vec!["/a".into(), "/b".into()],
            base_folder: "/vms".into(),
            os_type: "Debian_64".into(),
            uuid: Uuid::parse_str(uuid).ok(),
            register: true,
            default: true,
            ..CreateVm::default()
        };
        for line in [
            format!(
                "--name x --groups /a,/b --basefolder /vms --ostype Debian_64 --uuid {uuid} --register --default"
            ),
            format!(
                "-name x -groups=/a,/b -basefolder /vms -ostype Debian_64 -uuid {{{uuid}}} -register -default"
            ),
            format!("--default --register --uuid={uuid} --os-type=Debian_64 -p/vms -g /a,/b -n x"),
        ] {
            assert_eq!(createvm(&words(&line)), Ok(Request::CreateVm(expected.clone())), "{line}");
        }
    }

    #[test]
    fn createvm_without_a_name_is_a_syntax_error() {
        assert_eq!(createvm(&words("--register")), Err(UsageError::syntax("Parameter --name is required")));
        assert_eq!(createvm(&words("--name x stray")), Err(UsageError::syntax("Invalid parameter 'stray'")));
        assert_eq!(createvm(&words("--frob")), Err(UsageError::syntax("Unknown option: --frob")));
        assert_eq!(createvm(&words("--help")), Err(UsageError::Help));
    }

    #[test]
    fn unregistervm_takes_its_option_before_and_after_the_name() {
        for line in ["--delete vm", "vm --delete", "-delete vm", "vm -d"] {
            let expected = UnregisterVm { vm: "vm".into(), delete: true, delete_all: false };
            assert_eq!(unregistervm(&words(line)), Ok(Request::UnregisterVm(expected)), "{line}");
        }
        let Ok(Request::UnregisterVm(all)) = unregistervm(&words("vm --delete-all")) else { panic!() };
        assert!(all.delete_all && !all.delete);
        assert!(unregistervm(&words("one two")).is_err());
    }

    #[test]
    fn startvm_takes_several_machines_and_any_front_end() {
        let Ok(Request::StartVm(request)) = startvm(&words("a b --type HEADLESS --putenv A=1 -E B=2")) else {
            panic!()
        };
        assert_eq!(request.vms, ["a", "b"]);
        assert_eq!(request.front_end, "headless");
        assert_eq!(request.environment, ["A=1", "B=2"]);
        let Ok(Request::StartVm(request)) = startvm(&words("-type=MyOwn a")) else { panic!() };
        assert_eq!(request.front_end, "MyOwn");
        assert!(startvm(&words("--type gui")).is_err());
    }

    #[test]
    fn showvminfo_knows_its_four_forms() {
        for (line, details) in [
            ("vm", Details::Standard),
            ("--details vm", Details::Full),
            ("vm -details", Details::Full),
            ("--machinereadable vm", Details::MachineReadable),
            ("vm --machinereadable", Details::MachineReadable),
            ("vm --log 2", Details::Log(2)),
        ] {
            let expected = ShowVmInfo { vm: "vm".into(), details };
            assert_eq!(showvminfo(&words(line)), Ok(Request::ShowVmInfo(expected)), "{line}");
        }
        assert_eq!(
            showvminfo(&words("vm --log 0 --details")),
            Err(UsageError::syntax("Option --log is exclusive"))
        );
    }
}
