//! `guestproperty`, `sharedfolder`, `discardstate` and `extpack`.

use super::Request;
use crate::getopt::{Item, Opt, Parser, Want, opt, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestProperty {
    Get { vm: String, name: String, verbose: bool },
    Set { vm: String, name: String, value: String, flags: Option<String> },
    Delete { vm: String, name: String },
    Enumerate(Enumerate),
    Wait { vm: String, patterns: String, timeout: Option<u32>, fail: bool },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enumerate {
    pub vm: String,
    pub patterns: String,
    pub old_format: bool,
    pub sort: bool,
    pub timestamp: bool,
    pub relative: bool,
    pub flags: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharedFolder {
    Add {
        vm: String,
        name: String,
        host_path: String,
        read_only: bool,
        transient: bool,
        automount: bool,
        mount_point: String,
    },
    Remove {
        vm: String,
        name: String,
        transient: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscardState {
    pub vm: String,
}

/// `extpack` with the words after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtPack {
    Install,
    Uninstall(String),
    Cleanup,
}

fn subcommand<'a>(words: &'a [String], command: &str) -> Parsed<(&'a str, &'a [String])> {
    match words.split_first() {
        Some((word, _)) if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?") => Err(UsageError::Help),
        Some((word, rest)) => Ok((word, rest)),
        None => Err(UsageError::syntax(format!("No sub-command specified for \"{command}\""))),
    }
}

fn incorrect<T>() -> Parsed<T> {
    Err(UsageError::syntax("Incorrect parameters"))
}

pub fn guestproperty(words: &[String]) -> Parsed<Request> {
    let (word, rest) = subcommand(words, "guestproperty")?;
    let request = match word {
        "get" => match rest {
            [vm, name] => GuestProperty::Get { vm: vm.clone(), name: name.clone(), verbose: false },
            [vm, name, verbose] if matches!(verbose.as_str(), "--verbose" | "-verbose") => {
                GuestProperty::Get { vm: vm.clone(), name: name.clone(), verbose: true }
            }
            _ => return incorrect(),
        },
        "set" => {
            let (vm, name, value, flags) = match rest {
                [vm, name] => (vm, name, String::new(), None),
                [vm, name, value] => (vm, name, value.clone(), None),
                [vm, name, value, word, flags] if matches!(word.as_str(), "--flags" | "-flags") => {
                    (vm, name, value.clone(), Some(flags.clone()))
                }
                _ => return incorrect(),
            };
            GuestProperty::Set { vm: vm.clone(), name: name.clone(), value, flags }
        }
        "delete" | "unset" => match rest {
            [vm, name] => GuestProperty::Delete { vm: vm.clone(), name: name.clone() },
            _ => return incorrect(),
        },
        "enumerate" | "enum" => enumerate(rest)?,
        "wait" => wait(rest)?,
        other => return Err(UsageError::syntax(format!("Unknown subcommand: {other}"))),
    };
    Ok(Request::GuestProperty(request))
}

fn enumerate(words: &[String]) -> Parsed<GuestProperty> {
    #[derive(Clone, Copy)]
    enum Key {
        Old,
        Sort(bool),
        Timestamp(bool),
        Relative(bool),
        Flags(bool),
        Patterns,
    }
    static TABLE: &[Opt<Key>] = &[
        opt(&["old-format"], Want::Nothing, Key::Old),
        opt(&["sort"], Want::Nothing, Key::Sort(true)),
        opt(&["unsort"], Want::Nothing, Key::Sort(false)),
        opt(&["timestamp", "ts"], Want::Nothing, Key::Timestamp(true)),
        opt(&["no-timestamp", "no-ts"], Want::Nothing, Key::Timestamp(false)),
        opt(&["absolute", "abs"], Want::Nothing, Key::Relative(false)),
        opt(&["relative", "rel"], Want::Nothing, Key::Relative(true)),
        opt(&["flags"], Want::Nothing, Key::Flags(true)),
        opt(&["no-flags"], Want::Nothing, Key::Flags(false)),
        opt(&["patterns"], Want::Text, Key::Patterns),
    ];
    let mut vm: Option<String> = None;
    let mut patterns: Vec<String> = Vec::new();
    let mut request = Enumerate {
        vm: String::new(),
        patterns: String::new(),
        old_format: false,
        sort: true,
        timestamp: true,
        relative: false,
        flags: true,
    };
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) if vm.is_none() => vm = Some(word),
            Item::Word(word) => patterns.push(word),
            Item::Opt { key, value, .. } => match key {
                Key::Old => request.old_format = true,
                Key::Sort(on) => request.sort = on,
                Key::Timestamp(on) => request.timestamp = on,
                Key::Relative(on) => request.relative = on,
                Key::Flags(on) => request.flags = on,
                Key::Patterns => patterns.push(value.text()),
            },
        }
    }
    request.vm = vm.ok_or_else(|| UsageError::syntax("No VM name or UUID was specified"))?;
    request.patterns = patterns.join(",");
    Ok(GuestProperty::Enumerate(request))
}

fn wait(words: &[String]) -> Parsed<GuestProperty> {
    #[derive(Clone, Copy)]
    enum Key {
        Timeout,
        Fail,
    }
    static TABLE: &[Opt<Key>] =
        &[opt(&["timeout"], Want::U32, Key::Timeout), opt(&["fail-on-timeout"], Want::Nothing, Key::Fail)];
    let (mut operands, mut timeout, mut fail) = (Vec::new(), None, false);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => operands.push(word),
            Item::Opt { key: Key::Timeout, value, .. } => timeout = Some(value.u32()),
            Item::Opt { key: Key::Fail, .. } => fail = true,
        }
    }
    match operands.as_slice() {
        [vm, patterns] => {
            Ok(GuestProperty::Wait { vm: vm.clone(), patterns: patterns.clone(), timeout, fail })
        }
        _ => incorrect(),
    }
}

pub fn sharedfolder(words: &[String]) -> Parsed<Request> {
    let (word, rest) = subcommand(words, "sharedfolder")?;
    #[derive(Clone, Copy)]
    enum Key {
        Name,
        HostPath,
        ReadOnly,
        Transient,
        AutoMount,
        MountPoint,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["name"], 'n', Want::Text, Key::Name),
        short(&["hostpath"], 'p', Want::Text, Key::HostPath),
        short(&["readonly"], 'r', Want::Nothing, Key::ReadOnly),
        short(&["transient"], 't', Want::Nothing, Key::Transient),
        short(&["automount"], 'a', Want::Nothing, Key::AutoMount),
        short(&["auto-mount-point"], 'm', Want::Text, Key::MountPoint),
    ];
    if !matches!(word, "add" | "remove") {
        return Err(UsageError::syntax(format!("Unknown subcommand: {word}")));
    }
    let (mut vm, mut name, mut path) = (None, None, None);
    let (mut read_only, mut transient, mut automount, mut mount_point) = (false, false, false, String::new());
    let mut parser = Parser::new(rest, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => super::operand(&mut vm, word)?,
            Item::Opt { key, value, .. } => match key {
                Key::Name => name = Some(value.text()),
                Key::HostPath => path = Some(value.text()),
                Key::ReadOnly => read_only = true,
                Key::Transient => transient = true,
                Key::AutoMount => automount = true,
                Key::MountPoint => mount_point = value.text(),
            },
        }
    }
    let vm = vm.ok_or_else(|| UsageError::syntax("No machine was specified"))?;
    let name = name.ok_or_else(|| UsageError::syntax("No shared folder name (--name) was specified"))?;
    Ok(Request::SharedFolder(match word {
        "add" => SharedFolder::Add {
            vm,
            name,
            host_path: path.ok_or_else(|| UsageError::syntax("No host path (--hostpath) was specified"))?,
            read_only,
            transient,
            automount,
            mount_point,
        },
        _ => SharedFolder::Remove { vm, name, transient },
    }))
}

pub fn discardstate(words: &[String]) -> Parsed<Request> {
    match words {
        [word] if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?") => Err(UsageError::Help),
        [vm] => Ok(Request::DiscardState(DiscardState { vm: vm.clone() })),
        _ => Err(UsageError::syntax("Incorrect number of parameters")),
    }
}

pub fn extpack(words: &[String]) -> Parsed<Request> {
    let (word, rest) = subcommand(words, "extpack")?;
    Ok(Request::ExtPack(match word {
        "install" => ExtPack::Install,
        "uninstall" => match rest.iter().find(|w| !w.starts_with('-')) {
            Some(name) => ExtPack::Uninstall(name.clone()),
            None => {
                return Err(UsageError::syntax("No extension pack name was given to \"extpack uninstall\""));
            }
        },
        "cleanup" => ExtPack::Cleanup,
        other => return Err(UsageError::syntax(format!("Unknown subcommand: {other}"))),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn guest_properties_have_five_verbs() {
        let parse = |line: &str| match guestproperty(&words(line)) {
            Ok(Request::GuestProperty(request)) => Ok(request),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        let (vm, name) = ("vm".to_owned(), "/a".to_owned());
        assert_eq!(
            parse("get vm /a --verbose"),
            Ok(GuestProperty::Get { vm: vm.clone(), name: name.clone(), verbose: true })
        );
        assert_eq!(
            parse("set vm /a b --flags TRANSIENT"),
            Ok(GuestProperty::Set {
                vm: vm.clone(),
                name: name.clone(),
                value: "b".into(),
                flags: Some("TRANSIENT".into())
            })
        );
        assert_eq!(parse("unset vm /a"), Ok(GuestProperty::Delete { vm: vm.clone(), name }));
        let Ok(GuestProperty::Enumerate(all)) = parse("enumerate vm --patterns /a* /b --no-flags") else {
            panic!()
        };
        assert_eq!((all.patterns.as_str(), all.flags, all.timestamp), ("/a*,/b", false, true));
        assert!(matches!(
            parse("wait vm /x --timeout 5 --fail-on-timeout"),
            Ok(GuestProperty::Wait { timeout: Some(5), fail: true, .. })
        ));
        assert!(parse("set vm").is_err());
        assert!(parse("frob").is_err());
    }

    #[test]
    fn shared_folders_need_name_and_path() {
        let line = "add vm --name vagrant --hostpath /tmp --transient --automount";
        assert!(matches!(
            sharedfolder(&words(line)),
            Ok(Request::SharedFolder(SharedFolder::Add {
                transient: true,
                automount: true,
                read_only: false,
                ..
            }))
        ));
        assert!(sharedfolder(&words("add vm --name x")).is_err());
        assert!(sharedfolder(&words("remove vm --name x")).is_ok());
        assert!(sharedfolder(&words("remove vm")).is_err());
    }
}
