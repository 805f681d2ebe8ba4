//! `modifymedium`, `clonemedium`, `mediumproperty`, `convertfromraw` and `mediumio`.

use super::medium::{MediumKind, kind_word, parse_variant};
use super::storage::MEDIUM_TYPES;
use super::{Request, operand};
use crate::getopt::{Item, Opt, Parser, Value, Want, opt, short};
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModifyMedium {
    pub kind: MediumKind,
    pub medium: String,
    /// `MediumType`.
    pub medium_type: Option<&'static str>,
    pub auto_reset: Option<bool>,
    pub properties: Vec<(String, String)>,
    pub compact: bool,
    /// In bytes; whether it was given in megabytes.
    pub resize: Option<(u64, bool)>,
    pub move_to: Option<String>,
    pub location: Option<String>,
    pub description: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneMedium {
    pub kind: MediumKind,
    pub source: String,
    pub target: String,
    /// Empty if not given.
    pub format: String,
    pub variant: Vec<&'static str>,
    pub existing: bool,
    /// In bytes.
    pub resize: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediumProperty {
    pub kind: MediumKind,
    pub medium: String,
    pub name: String,
    pub action: PropertyAction,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropertyAction {
    Set(String),
    Get,
    Delete,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertFromRaw {
    /// `stdin` stands for standard input.
    pub source: String,
    pub target: String,
    /// Bytes to take from standard input.
    pub size: Option<u64>,
    pub format: String,
    pub variant: Vec<&'static str>,
    pub uuid: Option<uuid::Uuid>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediumIo {
    pub kind: MediumKind,
    pub medium: String,
    pub password_file: Option<String>,
    pub action: IoAction,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoAction {
    FormatFat,
    Cat { hex: bool, offset: u64, size: u64, output: Option<String> },
    Stream { output: Option<String>, format: String, variant: Vec<&'static str> },
}

/// Passwords are names of files, or `-` for the terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncryptMedium {
    pub medium: String,
    pub new_password: Option<String>,
    pub old_password: Option<String>,
    /// Empty if not given.
    pub cipher: String,
    pub new_password_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckMediumPwd {
    pub medium: String,
    pub password: String,
}

fn megabytes(value: Value) -> Parsed<u64> {
    match value {
        Value::U64(megabytes) => megabytes
            .checked_mul(1 << 20)
            .ok_or_else(|| UsageError::syntax(format!("Invalid argument format: {megabytes}"))),
        _ => Ok(0),
    }
}

pub fn modifymedium(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Type,
        AutoReset,
        Property,
        Compact,
        Resize,
        ResizeByte,
        Move,
        Location,
        Description,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["type", "settype"], 't', Want::Text, Key::Type),
        short(&["autoreset"], 'z', Want::Text, Key::AutoReset),
        short(&["property"], 'p', Want::Text, Key::Property),
        short(&["compact"], 'c', Want::Nothing, Key::Compact),
        short(&["resize"], 'r', Want::U64, Key::Resize),
        short(&["resizebyte"], 'R', Want::U64, Key::ResizeByte),
        short(&["move"], 'm', Want::Text, Key::Move),
        short(&["setlocation"], 'l', Want::Text, Key::Location),
        short(&["description"], 'd', Want::Text, Key::Description),
    ];
    // Old scripts write these three without dashes.
    let old = ["settype", "autoreset", "compact"];
    let words: Vec<String> = words
        .iter()
        .map(|word| if old.contains(&word.as_str()) { format!("--{word}") } else { word.clone() })
        .collect();
    let (mut kind, mut medium) = (None, None);
    let mut request = ModifyMedium {
        kind: MediumKind::Disk,
        medium: String::new(),
        medium_type: None,
        auto_reset: None,
        properties: Vec::new(),
        compact: false,
        resize: None,
        move_to: None,
        location: None,
        description: None,
    };
    let mut any = false;
    let mut parser = Parser::new(&words, TABLE);
    while let Some(item) = parser.item()? {
        let (key, value) = match item {
            Item::Word(word) => {
                if !kind_word(&mut kind, &word)? {
                    operand(&mut medium, word)?;
                }
                continue;
            }
            Item::Opt { key, value, .. } => (key, value),
        };
        any = true;
        match key {
            Key::Type => {
                let text = value.text();
                let lower = text.to_ascii_lowercase();
                let found = MEDIUM_TYPES.iter().find(|(word, _)| *word == lower);
                let (_, name) =
                    found.ok_or_else(|| UsageError::argument(format!("Invalid medium type '{text}'")))?;
                request.medium_type = Some(name);
            }
            Key::AutoReset => {
                let text = value.text();
                let on = match text.to_ascii_lowercase().as_str() {
                    "on" | "yes" | "true" | "1" | "enable" | "enabled" => true,
                    "off" | "no" | "false" | "0" | "disable" | "disabled" => false,
                    _ => return Err(UsageError::argument(format!("Invalid autoreset parameter '{text}'"))),
                };
                request.auto_reset = Some(on);
            }
            Key::Property => {
                let text = value.text();
                let Some((name, value)) = text.split_once('=') else {
                    return Err(UsageError::argument(format!("Invalid --property argument '{text}'")));
                };
                request.properties.push((name.to_owned(), value.to_owned()));
            }
            Key::Compact => request.compact = true,
            Key::Resize => request.resize = Some((megabytes(value)?, true)),
            Key::ResizeByte => {
                let Value::U64(bytes) = value else { continue };
                request.resize = Some((bytes, false));
            }
            Key::Move => request.move_to = Some(value.text()),
            Key::Location => request.location = Some(value.text()),
            Key::Description => request.description = Some(value.text()),
        }
    }
    request.medium = medium.ok_or_else(|| UsageError::syntax("Medium name or UUID required"))?;
    if !any {
        return Err(UsageError::syntax("No operation specified"));
    }
    request.kind = kind.unwrap_or(MediumKind::Disk);
    Ok(Request::ModifyMedium(request))
}

pub fn clonemedium(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Format,
        Static,
        Existing,
        Variant,
        Resize,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["format"], 'o', Want::Text, Key::Format),
        short(&["static"], 'F', Want::Nothing, Key::Static),
        short(&["existing"], 'E', Want::Nothing, Key::Existing),
        short(&["variant"], 'm', Want::Text, Key::Variant),
        short(&["resize"], 'r', Want::U64, Key::Resize),
    ];
    let (mut kind, mut source, mut target) = (None, None, None);
    let (mut format, mut variant, mut existing, mut resize) = (String::new(), Vec::new(), false, None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => {
                if kind_word(&mut kind, &word)? {
                } else if source.is_none() {
                    source = Some(word);
                } else {
                    operand(&mut target, word)?;
                }
            }
            Item::Opt { key, value, .. } => match key {
                Key::Format => format = value.text(),
                Key::Static => parse_variant("fixed", &mut variant)?,
                Key::Existing => existing = true,
                Key::Variant => parse_variant(&value.text(), &mut variant)?,
                Key::Resize => resize = Some(megabytes(value)?),
            },
        }
    }
    let source =
        source.ok_or_else(|| UsageError::syntax("Mandatory UUID or input file parameter missing"))?;
    let target = target.ok_or_else(|| UsageError::syntax("Mandatory output file parameter missing"))?;
    if existing && (!format.is_empty() || !variant.is_empty()) {
        return Err(UsageError::syntax("Specified options which cannot be used with --existing"));
    }
    let kind = kind.unwrap_or(MediumKind::Disk);
    Ok(Request::CloneMedium(CloneMedium { kind, source, target, format, variant, existing, resize }))
}

pub fn mediumproperty(words: &[String]) -> Parsed<Request> {
    let kind = words.first().and_then(|word| match word.to_ascii_lowercase().as_str() {
        "disk" => Some(MediumKind::Disk),
        "dvd" => Some(MediumKind::Dvd),
        "floppy" => Some(MediumKind::Floppy),
        "--help" | "-h" => None,
        _ => None,
    });
    let words = if kind.is_some() { &words[1..] } else { words };
    let Some(action) = words.first() else { return Err(UsageError::syntax("Missing action")) };
    if matches!(action.as_str(), "--help" | "-h" | "-?") {
        return Err(UsageError::Help);
    }
    let wrong = || UsageError::syntax(format!("Invalid number of arguments given for action: {action}"));
    let parsed = match (action.to_ascii_lowercase().as_str(), words) {
        ("set", [_, _, _, value]) => PropertyAction::Set(value.clone()),
        ("get", [_, _, _]) => PropertyAction::Get,
        ("delete", [_, _, _]) => PropertyAction::Delete,
        ("set" | "get" | "delete", _) => return Err(wrong()),
        _ => return Err(UsageError::syntax(format!("Invalid action given: {action}"))),
    };
    Ok(Request::MediumProperty(MediumProperty {
        kind: kind.unwrap_or(MediumKind::Disk),
        medium: words[1].clone(),
        name: words[2].clone(),
        action: parsed,
    }))
}

pub fn convertfromraw(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        Format,
        Static,
        Variant,
        Uuid,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["format"], 'o', Want::Text, Key::Format),
        short(&["static"], 'F', Want::Nothing, Key::Static),
        short(&["variant"], 'm', Want::Text, Key::Variant),
        short(&["uuid"], 'u', Want::Text, Key::Uuid),
    ];
    let (mut source, mut target, mut size) = (None, None, None);
    let (mut format, mut variant, mut uuid) = ("VDI".to_owned(), Vec::new(), None);
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => {
                if source.is_none() {
                    source = Some(word);
                } else if target.is_none() {
                    target = Some(word);
                } else if source.as_deref() == Some("stdin") && size.is_none() {
                    let bytes: Option<u64> = word.parse().ok();
                    size = Some(bytes.ok_or_else(|| UsageError::invalid_parameter(&word))?);
                } else {
                    return Err(UsageError::invalid_parameter(&word));
                }
            }
            Item::Opt { key, value, .. } => match key {
                Key::Format => format = value.text(),
                Key::Static => parse_variant("fixed", &mut variant)?,
                Key::Variant => parse_variant(&value.text(), &mut variant)?,
                Key::Uuid => {
                    let text = value.text();
                    let bare = text.trim_start_matches('{').trim_end_matches('}');
                    let parsed = uuid::Uuid::try_parse(bare);
                    uuid = Some(parsed.map_err(|_| UsageError::syntax(format!("Invalid UUID '{text}'")))?);
                }
            },
        }
    }
    match (source, target) {
        (Some(source), Some(target)) if source != "stdin" || size.is_some() => {
            Ok(Request::ConvertFromRaw(ConvertFromRaw { source, target, size, format, variant, uuid }))
        }
        _ => Err(UsageError::syntax("Incorrect number of parameters")),
    }
}

pub fn mediumio(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy, PartialEq)]
    enum Key {
        Disk,
        Dvd,
        Floppy,
        Password,
        Quick,
        Hex,
        Offset,
        Output,
        Size,
        Format,
        Variant,
    }
    static COMMON: &[Opt<Key>] = &[
        opt(&["disk"], Want::Text, Key::Disk),
        opt(&["dvd"], Want::Text, Key::Dvd),
        opt(&["floppy"], Want::Text, Key::Floppy),
        opt(&["password-file"], Want::Text, Key::Password),
        short(&["quick"], 'q', Want::Nothing, Key::Quick),
        short(&["hex"], 'H', Want::Nothing, Key::Hex),
        short(&["offset"], 'o', Want::U64, Key::Offset),
        short(&["output"], 'O', Want::Text, Key::Output),
        short(&["size"], 's', Want::U64, Key::Size),
        short(&["format"], 'F', Want::Text, Key::Format),
        short(&["variant"], 'v', Want::Text, Key::Variant),
    ];
    let (mut place, mut password_file, mut action) = (None, None, None::<String>);
    let (mut hex, mut offset, mut size, mut output) = (false, 0, u64::MAX, None);
    let (mut format, mut variant) = (String::new(), Vec::new());
    let mut parser = Parser::new(words, COMMON);
    while let Some(item) = parser.item()? {
        let (key, name, value) = match item {
            Item::Word(word)
                if action.is_none() && ["formatfat", "cat", "stream"].contains(&word.as_str()) =>
            {
                action = Some(word);
                continue;
            }
            Item::Word(word) if action.is_none() => {
                return Err(UsageError::syntax(format!("Unknown subcommand: {word}")));
            }
            Item::Word(word) => return Err(UsageError::invalid_parameter(&word)),
            Item::Opt { key, name, value, .. } => (key, name, value),
        };
        let fits = match action.as_deref() {
            None => matches!(key, Key::Disk | Key::Dvd | Key::Floppy | Key::Password),
            Some("formatfat") => {
                !matches!(key, Key::Hex | Key::Offset | Key::Output | Key::Size | Key::Format | Key::Variant)
            }
            Some("cat") => !matches!(key, Key::Quick | Key::Format | Key::Variant),
            Some(_) => !matches!(key, Key::Quick | Key::Hex | Key::Offset | Key::Size),
        };
        if !fits {
            return Err(UsageError::syntax(format!("Unknown option: {name}")));
        }
        match (key, value) {
            (Key::Disk, value) => place = Some((MediumKind::Disk, value.text())),
            (Key::Dvd, value) => place = Some((MediumKind::Dvd, value.text())),
            (Key::Floppy, value) => place = Some((MediumKind::Floppy, value.text())),
            (Key::Password, value) => password_file = Some(value.text()),
            (Key::Hex, _) => hex = true,
            (Key::Offset, Value::U64(value)) => offset = value,
            (Key::Size, Value::U64(value)) => size = value,
            (Key::Output, value) => output = Some(value.text()),
            (Key::Format, value) => format = value.text(),
            (Key::Variant, value) => parse_variant(&value.text(), &mut variant)?,
            (Key::Quick | Key::Offset | Key::Size, _) => {}
        }
    }
    let action = match action.as_deref() {
        None => return Err(UsageError::syntax("No subcommand specified")),
        Some("formatfat") => IoAction::FormatFat,
        Some("cat") => IoAction::Cat { hex, offset, size, output },
        Some(_) => IoAction::Stream { output, format, variant },
    };
    let (kind, medium) = place.ok_or_else(|| UsageError::syntax("No medium specified!"))?;
    Ok(Request::MediumIo(MediumIo { kind, medium, password_file, action }))
}

pub fn encryptmedium(words: &[String]) -> Parsed<Request> {
    #[derive(Clone, Copy)]
    enum Key {
        New,
        Old,
        Cipher,
        Id,
    }
    static TABLE: &[Opt<Key>] = &[
        short(&["newpassword"], 'n', Want::Text, Key::New),
        short(&["oldpassword"], 'o', Want::Text, Key::Old),
        short(&["cipher"], 'c', Want::Text, Key::Cipher),
        short(&["newpasswordid"], 'i', Want::Text, Key::Id),
    ];
    let mut medium = None;
    let mut request = EncryptMedium::default();
    let mut parser = Parser::new(words, TABLE);
    while let Some(item) = parser.item()? {
        match item {
            Item::Word(word) => operand(&mut medium, word)?,
            Item::Opt { key: Key::New, value, .. } => request.new_password = Some(value.text()),
            Item::Opt { key: Key::Old, value, .. } => request.old_password = Some(value.text()),
            Item::Opt { key: Key::Cipher, value, .. } => request.cipher = value.text(),
            Item::Opt { key: Key::Id, value, .. } => request.new_password_id = value.text(),
        }
    }
    request.medium = medium.ok_or_else(|| UsageError::syntax("Disk name or UUID required"))?;
    if request.new_password.is_none() && request.old_password.is_none() {
        return Err(UsageError::syntax("No password specified"));
    }
    if request.new_password.is_some() == request.new_password_id.is_empty() {
        let text = "A new password must always have a valid identifier set at the same time";
        return Err(UsageError::syntax(text));
    }
    Ok(Request::EncryptMedium(request))
}

pub fn checkmediumpwd(words: &[String]) -> Parsed<Request> {
    match words {
        [word] if matches!(word.as_str(), "--help" | "-h" | "-?") => Err(UsageError::Help),
        [medium, password] => {
            Ok(Request::CheckMediumPwd(CheckMediumPwd { medium: medium.clone(), password: password.clone() }))
        }
        _ => Err(UsageError::syntax(format!("Invalid number of arguments: {}", words.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    fn modify(line: &str) -> ModifyMedium {
        match modifymedium(&words(line)) {
            Ok(Request::ModifyMedium(request)) => request,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn modifymedium_takes_old_and_new_spellings() {
        assert_eq!(modify("disk a.vdi --type writethrough").medium_type, Some("Writethrough"));
        assert_eq!(modify("a.vdi settype immutable").medium_type, Some("Immutable"));
        assert!(modify("a.vdi compact").compact && modify("--compact a.vdi").compact);
        assert_eq!(modify("a.vdi autoreset off").auto_reset, Some(false));
        assert_eq!(modify("a.vdi --resize 10").resize, Some((10 << 20, true)));
        assert_eq!(modify("a.vdi --resizebyte=10").resize, Some((10, false)));
        assert_eq!(modify("dvd a.iso --description x").kind, MediumKind::Dvd);
        for (line, text) in [
            ("--compact", "Medium name or UUID required"),
            ("a.vdi", "No operation specified"),
            ("a b --compact", "Invalid parameter 'b'"),
        ] {
            assert_eq!(modifymedium(&words(line)), Err(UsageError::syntax(text)), "{line}");
        }
        assert_eq!(
            modifymedium(&words("a.vdi --type soft")),
            Err(UsageError::argument("Invalid medium type 'soft'"))
        );
    }

    #[test]
    fn clonemedium_wants_two_names() {
        let expected = CloneMedium {
            kind: MediumKind::Disk,
            source: "a.vdi".into(),
            target: "b.vmdk".into(),
            format: "VMDK".into(),
            variant: vec!["VmdkStreamOptimized"],
            existing: false,
            resize: None,
        };
        assert_eq!(
            clonemedium(&words("disk a.vdi b.vmdk --format VMDK --variant Stream")),
            Ok(Request::CloneMedium(expected))
        );
        for (line, text) in [
            ("", "Mandatory UUID or input file parameter missing"),
            ("a", "Mandatory output file parameter missing"),
            ("a b c", "Invalid parameter 'c'"),
            ("a b --existing --format VDI", "Specified options which cannot be used with --existing"),
        ] {
            assert_eq!(clonemedium(&words(line)), Err(UsageError::syntax(text)), "{line}");
        }
    }

    #[test]
    fn mediumproperty_counts_its_words() {
        let expected = MediumProperty {
            kind: MediumKind::Disk,
            medium: "a.vdi".into(),
            name: "x".into(),
            action: PropertyAction::Set("y".into()),
        };
        assert_eq!(mediumproperty(&words("set a.vdi x y")), Ok(Request::MediumProperty(expected)));
        for (line, text) in [
            ("disk", "Missing action"),
            ("put a x", "Invalid action given: put"),
            ("dvd get a", "Invalid number of arguments given for action: get"),
        ] {
            assert_eq!(mediumproperty(&words(line)), Err(UsageError::syntax(text)), "{line}");
        }
    }

    #[test]
    fn convertfromraw_wants_a_size_for_standard_input() {
        let Ok(Request::ConvertFromRaw(request)) = convertfromraw(&words("stdin a.vmdk 1024 --format VMDK"))
        else {
            panic!("not parsed");
        };
        assert_eq!((request.size, request.format.as_str()), (Some(1024), "VMDK"));
        for line in ["stdin a.vmdk", "a.img", ""] {
            let expected = Err(UsageError::syntax("Incorrect number of parameters"));
            assert_eq!(convertfromraw(&words(line)), expected, "{line}");
        }
        assert_eq!(convertfromraw(&words("a.img a.vdi 7")), Err(UsageError::syntax("Invalid parameter '7'")));
    }

    #[test]
    fn encryptmedium_wants_passwords_with_their_id() {
        let Ok(Request::EncryptMedium(request)) = encryptmedium(&words(
            "a.vdi --newpassword=f --newpasswordid id --cipher AES-XTS256-PLAIN64 --oldpassword -",
        )) else {
            panic!("not parsed");
        };
        assert_eq!(
            (request.new_password.as_deref(), request.old_password.as_deref()),
            (Some("f"), Some("-"))
        );
        assert_eq!((request.cipher.as_str(), request.new_password_id.as_str()), ("AES-XTS256-PLAIN64", "id"));
        let unpaired = "A new password must always have a valid identifier set at the same time";
        for (line, text) in [
            ("--oldpassword f", "Disk name or UUID required"),
            ("a.vdi", "No password specified"),
            ("a.vdi --newpassword f", unpaired),
            ("a.vdi --oldpassword f --newpasswordid x", unpaired),
        ] {
            assert_eq!(encryptmedium(&words(line)), Err(UsageError::syntax(text)), "{line}");
        }
        assert_eq!(checkmediumpwd(&words("a")), Err(UsageError::syntax("Invalid number of arguments: 1")));
    }

    #[test]
    fn mediumio_has_options_for_each_subcommand() {
        let Ok(Request::MediumIo(request)) =
            mediumio(&words("--disk a.vdi cat --hex --offset 512 --size=16"))
        else {
            panic!("not parsed");
        };
        let expected = IoAction::Cat { hex: true, offset: 512, size: 16, output: None };
        assert_eq!((request.medium.as_str(), request.action), ("a.vdi", expected));
        for (line, text) in [
            ("--disk a.vdi", "No subcommand specified"),
            ("--disk a.vdi dog", "Unknown subcommand: dog"),
            ("cat", "No medium specified!"),
            ("--disk a.vdi stream --hex", "Unknown option: --hex"),
        ] {
            assert_eq!(mediumio(&words(line)), Err(UsageError::syntax(text)), "{line}");
        }
    }
}
