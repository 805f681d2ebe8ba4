//! `bandwidthctl`.

use main_api::enums::BandwidthGroupType;

use super::Request;
use crate::getopt::{Item, Opt, Parser, Want, opt, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BandwidthCtl {
    pub vm: String,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Limits are in bytes per second; 0 for none.
    Add {
        name: String,
        kind: BandwidthGroupType,
        limit: i64,
    },
    Set {
        name: String,
        limit: i64,
    },
    Remove {
        name: String,
    },
    List {
        machine_readable: bool,
    },
}

/// A limit: lower-case units are bits per second by thousands, upper-case ones bytes by 1024; a bare number is megabytes.
fn limit(text: &str) -> Parsed<i64> {
    let wrong =
        |why: &str| UsageError::syntax(format!("Invalid bandwidth limit specification \"{text}\": {why}"));
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "k" => 125,
        "m" => 125_000,
        "g" => 125_000_000,
        "K" => 1 << 10,
        "" | "M" => 1 << 20,
        "G" => 1 << 30,
        _ if text.starts_with('-') => return Err(wrong("the limit must not be negative")),
        _ => return Err(wrong("units are k, m, g (bits per second) and K, M, G (bytes per second)")),
    };
    number
        .parse::<i64>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| wrong("it is no number, or too large"))
}

pub fn bandwidthctl(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Type,
        Limit,
        MachineReadable,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["type"], 't', Want::Text, Key::Type),
        short(&["limit"], 'l', Want::Text, Key::Limit),
        opt(&["machinereadable"], Want::Nothing, Key::MachineReadable),
    ];
    let (mut operands, mut kind, mut most, mut machine_readable) = (Vec::new(), None, None, false);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => operands.push(word),
            Item::Opt { key: Key::MachineReadable, .. } => machine_readable = true,
            Item::Opt { key: Key::Limit, value, .. } => most = Some(limit(&value.text())?),
            Item::Opt { key: Key::Type, value, .. } => {
                kind = Some(match value.text().to_ascii_lowercase().as_str() {
                    "disk" => BandwidthGroupType::Disk,
                    "network" => BandwidthGroupType::Network,
                    other => {
                        return Err(UsageError::syntax(format!("Invalid bandwidth group type \"{other}\"")));
                    }
                });
            }
        }
    }
    let mut operands = operands.into_iter();
    let vm = operands.next().ok_or_else(|| UsageError::syntax("Too few parameters"))?;
    let word = operands.next().ok_or_else(|| UsageError::syntax("Too few parameters"))?;
    let mut name =
        || operands.next().ok_or_else(|| UsageError::syntax("No bandwidth group name was specified"));
    let no_limit = || UsageError::syntax("No bandwidth limit (--limit) was specified");
    let action = match word.as_str() {
        "add" => Action::Add {
            name: name()?,
            kind: kind.ok_or_else(|| UsageError::syntax("No bandwidth group type (--type) was specified"))?,
            limit: most.ok_or_else(no_limit)?,
        },
        "set" => Action::Set { name: name()?, limit: most.ok_or_else(no_limit)? },
        "remove" => Action::Remove { name: name()? },
        "list" => Action::List { machine_readable },
        other => return Err(UsageError::syntax(format!("Unknown subcommand: {other}"))),
    };
    match operands.next() {
        Some(word) => Err(UsageError::invalid_parameter(&word)),
        None => Ok(Request::BandwidthCtl(BandwidthCtl { vm, action })),
    }
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    fn action(line: &str) -> Parsed<Action> {
        match bandwidthctl(&words(line))? {
            Request::BandwidthCtl(request) => Ok(request.action),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn limits_have_units_of_bits_and_of_bytes() {
        for (text, bytes) in [
            ("20", 20 << 20),
            ("80k", 10_000),
            ("20m", 2_500_000),
            ("1g", 125_000_000),
            ("5K", 5120),
            ("2G", 2 << 30),
            ("0", 0),
        ] {
            assert_eq!(
                action(&format!("vm set g --limit {text}")).unwrap(),
                Action::Set { name: "g".into(), limit: bytes }
            );
        }
        for text in ["", "-1", "1x", "1kk", "k", "99999999999G"] {
            assert!(limit(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_missing_or_too_much_is_refused() {
        let add = Action::Add { name: "n".into(), kind: BandwidthGroupType::Network, limit: 125 };
        assert_eq!(action("vm add n --type network --limit 1k").unwrap(), add);
        assert_eq!(action("vm list --machinereadable").unwrap(), Action::List { machine_readable: true });
        for line in [
            "",
            "vm",
            "vm add n --limit 1k",
            "vm add n --type network",
            "vm add --type disk --limit 1",
            "vm set n",
            "vm remove",
            "vm grow n",
            "vm list n",
            "vm add n --type tape --limit 1",
        ] {
            assert!(action(line).is_err(), "{line}");
        }
    }
}
