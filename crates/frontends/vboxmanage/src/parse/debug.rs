//! `debugvm`: looking into a running machine.

use super::Request;
use crate::getopt::{Item, Opt, Parser, Want, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugVm {
    pub vm: String,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Statistics {
        reset: bool,
        descriptions: bool,
        pattern: String,
    },
    /// Names as the user spells them; `all` for every register.
    GetRegisters {
        cpu: u32,
        names: Vec<String>,
    },
    SetRegisters {
        cpu: u32,
        values: Vec<(String, String)>,
    },
    Info {
        name: String,
        args: String,
    },
    InjectNmi,
    /// Part of VirtualBox that nothing stands behind yet.
    Unavailable(&'static str),
}

/// Subcommands that are known and refused.
const UNAVAILABLE: &[&str] = &[
    "dumpvmcore",
    "guestsample",
    "log",
    "logdest",
    "logflags",
    "osdetect",
    "osdmesg",
    "osinfo",
    "show",
    "stack",
];

pub fn debugvm(words: &[String]) -> Parsed<Request> {
    let (vm, subcommand, rest) = match words {
        [word, ..] if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?") => {
            return Err(UsageError::Help);
        }
        [vm, subcommand, rest @ ..] => (vm.clone(), subcommand.as_str(), rest),
        _ => return Err(UsageError::syntax("No subcommand specified")),
    };
    let action = match subcommand {
        "statistics" => statistics(rest)?,
        "getregisters" => {
            let (cpu, names) = with_cpu(rest)?;
            if names.is_empty() {
                return Err(UsageError::syntax(
                    "The getregisters sub-command takes at least one register name",
                ));
            }
            Action::GetRegisters { cpu, names }
        }
        "setregisters" => set_registers(rest)?,
        "info" => match rest {
            [name] => Action::Info { name: name.clone(), args: String::new() },
            [name, args] => Action::Info { name: name.clone(), args: args.clone() },
            [] => return Err(UsageError::syntax("Must specify info item to display")),
            [_, _, word, ..] => return Err(UsageError::syntax(format!("Too many arguments: {word}"))),
        },
        "injectnmi" => match rest {
            [] => Action::InjectNmi,
            [word, ..] => return Err(UsageError::syntax(format!("Too many arguments: {word}"))),
        },
        word => match UNAVAILABLE.iter().find(|name| **name == word) {
            Some(name) => Action::Unavailable(name),
            None => return Err(UsageError::syntax(format!("Unknown subcommand: {word}"))),
        },
    };
    Ok(Request::DebugVm(DebugVm { vm, action }))
}

fn statistics(words: &[String]) -> Parsed<Action> {
    #[derive(Clone, Copy)]
    enum Key {
        Descriptions,
        Pattern,
        Reset,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["descriptions"], 'd', Want::Nothing, Key::Descriptions),
        short(&["pattern"], 'p', Want::Text, Key::Pattern),
        short(&["reset"], 'r', Want::Nothing, Key::Reset),
    ];
    let (mut reset, mut descriptions, mut pattern) = (false, false, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => return Err(UsageError::invalid_parameter(&word)),
            Item::Opt { key: Key::Descriptions, .. } => descriptions = true,
            Item::Opt { key: Key::Reset, .. } => reset = true,
            Item::Opt { key: Key::Pattern, value, .. } => {
                if pattern.replace(value.text()).is_some() {
                    return Err(UsageError::syntax("Multiple --pattern options are not permitted"));
                }
            }
        }
    }
    if reset && descriptions {
        return Err(UsageError::syntax("The --reset and --descriptions options does not mix"));
    }
    Ok(Action::Statistics { reset, descriptions, pattern: pattern.unwrap_or_default() })
}

/// `--cpu`, and the other words.
fn with_cpu(words: &[String]) -> Parsed<(u32, Vec<String>)> {
    static TABLE: &[Opt<()>] = &[short(&["cpu"], 'c', Want::U32, ())];
    let (mut cpu, mut rest) = (0, Vec::new());
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => rest.push(word),
            Item::Opt { value, .. } => cpu = value.u32(),
        }
    }
    Ok((cpu, rest))
}

fn set_registers(words: &[String]) -> Parsed<Action> {
    let (cpu, words) = with_cpu(words)?;
    let mut values = Vec::new();
    for word in words {
        match word.split_once('=') {
            None => {
                return Err(UsageError::syntax(format!(
                    "setregisters expects input on the form 'register=value' got '{word}'"
                )));
            }
            Some(("", _)) => {
                return Err(UsageError::syntax(format!(
                    "The setregisters sub-command takes a register name and a value: '{word}'"
                )));
            }
            Some((name, value)) => values.push((name.to_owned(), value.to_owned())),
        }
    }
    if values.is_empty() {
        return Err(UsageError::syntax("The setregisters sub-command takes at least one register name"));
    }
    Ok(Action::SetRegisters { cpu, values })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::words;

    fn action(line: &str) -> Parsed<Action> {
        match debugvm(&words(line))? {
            Request::DebugVm(DebugVm { vm, action }) => {
                assert_eq!(vm, "x");
                Ok(action)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn statistics_take_a_pattern_and_reset_or_descriptions() {
        assert_eq!(
            action("x statistics"),
            Ok(Action::Statistics { reset: false, descriptions: false, pattern: String::new() })
        );
        assert_eq!(
            action("x statistics --pattern=/EM/* --descriptions"),
            Ok(Action::Statistics { reset: false, descriptions: true, pattern: "/EM/*".into() })
        );
        assert_eq!(
            action("x statistics -r -p /EM/*"),
            Ok(Action::Statistics { reset: true, descriptions: false, pattern: "/EM/*".into() })
        );
        for line in
            ["x statistics --reset --descriptions", "x statistics --pattern a --pattern b", "x statistics a"]
        {
            assert!(matches!(action(line), Err(UsageError::Syntax(_))), "{line}");
        }
    }

    #[test]
    fn registers_are_named_or_assigned() {
        assert_eq!(
            action("x getregisters --cpu 1 rip ALL"),
            Ok(Action::GetRegisters { cpu: 1, names: vec!["rip".into(), "ALL".into()] })
        );
        assert_eq!(
            action("x setregisters rax=0x10 rbx=3"),
            Ok(Action::SetRegisters {
                cpu: 0,
                values: vec![("rax".into(), "0x10".into()), ("rbx".into(), "3".into())]
            })
        );
        for line in
            ["x getregisters", "x setregisters", "x setregisters rax", "x setregisters =1", "x", "x nothing"]
        {
            assert!(matches!(action(line), Err(UsageError::Syntax(_))), "{line}");
        }
        assert_eq!(action("x osdetect"), Ok(Action::Unavailable("osdetect")));
    }
}
