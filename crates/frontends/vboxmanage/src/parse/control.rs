//! `controlvm`: a machine, a verb, and the verb's words.

use super::Request;
use super::modifyvm::{
    Change, DIRECTIONS, MAX_NICS, MAX_SERIAL_PORTS, NIC_ATTACHMENTS, Object, PRIORITIES, PROMISC, Scalar,
    UART_MODES, lookup, parse_nat_rule,
};
use crate::getopt;
use crate::usage::{Parsed, UsageError};

#[derive(Clone, Debug, PartialEq)]
pub struct ControlVm {
    pub vm: String,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Pause,
    Resume,
    Reset,
    PowerOff,
    AcpiPowerButton,
    AcpiSleepButton,
    KeyboardPutScancodes(Vec<u8>),
    KeyboardPutStrings(Vec<String>),
    KeyboardPutFile(String),
    ScreenshotPng {
        file: String,
        screen: u32,
    },
    VideoModeHint(VideoModeHint),
    /// The password is the name of a file, or `-` for the terminal.
    AddEncPassword {
        id: String,
        password: String,
        remove_on_suspend: bool,
    },
    RemoveEncPassword(String),
    RemoveAllEncPasswords,
    /// Settings that may change while the machine runs. The adapter, where there is one, must be enabled.
    Change {
        changes: Vec<Change>,
        enabled_nic: Option<u32>,
    },
    /// A verb of VirtualBox that nothing stands behind yet.
    Unavailable(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VideoModeHint {
    pub width: u32,
    pub height: u32,
    pub bits_per_pixel: u32,
    pub screen: u32,
    pub enabled: bool,
    pub origin: Option<(i32, i32)>,
}

/// Verbs that are known and refused.
const UNAVAILABLE: &[&str] = &[
    "savestate",
    "reboot",
    "shutdown",
    "vrde",
    "vrdp",
    "vrdeport",
    "vrdpport",
    "vrdevideochannelquality",
    "vrdpvideochannelquality",
    "vrdeproperty",
    "usbattach",
    "usbdetach",
    "setscreenlayout",
    "setcredentials",
    "guestmemoryballoon",
    "teleport",
    "recording",
    "videocap",
    "webcam",
    "clipboard filetransfers",
];

pub fn controlvm(words: &[String]) -> Parsed<Request> {
    if matches!(words, [word] if matches!(word.as_str(), "--help" | "-help" | "-h" | "-?")) {
        return Err(UsageError::Help);
    }
    let [vm, verb, rest @ ..] = words else { return Err(UsageError::syntax("Not enough parameters.")) };
    Ok(Request::ControlVm(ControlVm { vm: vm.clone(), action: action(verb, rest)? }))
}

fn action(verb: &str, rest: &[String]) -> Parsed<Action> {
    Ok(match verb {
        "pause" => Action::Pause,
        // "--type" is what VirtualBox 4 let scripts say here; there is nothing to choose.
        "resume" => Action::Resume,
        "reset" => Action::Reset,
        "poweroff" => Action::PowerOff,
        "acpipowerbutton" => Action::AcpiPowerButton,
        "acpisleepbutton" => Action::AcpiSleepButton,
        "keyboardputscancode" => Action::KeyboardPutScancodes(scancodes(verb, rest)?),
        "keyboardputstring" if rest.is_empty() => {
            return Err(missing_argument(verb, " Expected ASCII string(s)."));
        }
        "keyboardputstring" => Action::KeyboardPutStrings(rest.to_vec()),
        "keyboardputfile" => Action::KeyboardPutFile(argument(verb, rest)?.to_owned()),
        "screenshotpng" => screenshot(rest)?,
        "setvideomodehint" => video_mode_hint(rest)?,
        "addencpassword" => {
            let (id, password, suspend) = match rest {
                [id, password] => (id, password, "no"),
                [id, password, option, word] if option == "--removeonsuspend" => {
                    (id, password, word.as_str())
                }
                [_, _, _, _] => return Err(UsageError::syntax("Invalid parameters.")),
                _ => return Err(UsageError::syntax("Incorrect number of parameters.")),
            };
            let remove_on_suspend = match suspend {
                "yes" => true,
                "no" => false,
                _ => return Err(UsageError::syntax("Invalid parameters.")),
            };
            Action::AddEncPassword { id: id.clone(), password: password.clone(), remove_on_suspend }
        }
        "removeencpassword" => match rest {
            [id] => Action::RemoveEncPassword(id.clone()),
            _ => return Err(UsageError::syntax("Incorrect number of parameters.")),
        },
        "removeallencpasswords" => Action::RemoveAllEncPasswords,
        "plugcpu" | "unplugcpu" => {
            let cpu = number(argument(verb, rest)?, 32, "CPU")?;
            settings(if verb == "plugcpu" { Change::HotPlugCpu(cpu) } else { Change::HotUnplugCpu(cpu) })
        }
        "cpuexecutioncap" => {
            let text = argument(verb, rest)?;
            let cap = number(text, 100, "ExecutionCap")?;
            settings(Change::Set {
                object: Object::Machine,
                attribute: "CPUExecutionCap",
                value: Scalar::U32(cap),
            })
        }
        "audioin" | "audioout" => {
            let on = switch(argument(verb, rest)?).ok_or_else(|| invalid_value(rest))?;
            let attribute = if verb == "audioin" { "EnabledIn" } else { "EnabledOut" };
            settings(Change::Set { object: Object::AudioAdapter, attribute, value: Scalar::Bool(on) })
        }
        "clipboard" => clipboard(verb, rest)?,
        "draganddrop" => {
            let text = argument(verb, rest)?;
            let mode = exact(DIRECTIONS, text)
                .ok_or_else(|| UsageError::syntax(format!("Invalid '{verb}' argument '{text}'.")))?;
            settings(Change::Set { object: Object::Machine, attribute: "DnDMode", value: Scalar::Enum(mode) })
        }
        "vm-process-priority" => {
            let text = argument(verb, rest)?;
            let priority = lookup(PRIORITIES, text)
                .ok_or_else(|| UsageError::failure(format!("Invalid vm-process-priority '{text}'")))?;
            settings(Change::Set {
                object: Object::Machine,
                attribute: "VMProcessPriority",
                value: Scalar::Enum(priority),
            })
        }
        "autostart-enabled" => {
            let on = switch(argument(verb, rest)?).ok_or_else(|| invalid_value(rest))?;
            settings(Change::Set {
                object: Object::Machine,
                attribute: "AutostartEnabled",
                value: Scalar::Bool(on),
            })
        }
        "autostart-delay" => {
            let text = argument(verb, rest)?;
            let delay = getopt::unsigned(text)
                .and_then(|value| value.try_into().ok())
                .ok_or_else(|| invalid_value(rest))?;
            settings(Change::Set {
                object: Object::Machine,
                attribute: "AutostartDelay",
                value: Scalar::U32(delay),
            })
        }
        _ => {
            if let Some(action) = indexed(verb, rest)? {
                return Ok(action);
            }
            match UNAVAILABLE.iter().find(|name| **name == verb) {
                Some(name) => Action::Unavailable(name),
                None => return Err(UsageError::syntax(format!("Invalid parameter '{verb}'"))),
            }
        }
    })
}

/// Verbs that carry a number. Longer names come first, since some begin with others.
fn indexed(verb: &str, rest: &[String]) -> Parsed<Option<Action>> {
    type Make = fn(&str, u32, &[String]) -> Parsed<Vec<Change>>;
    const VERBS: &[(&str, Make)] = &[
        ("setlinkstate", |verb, nic, rest| {
            let on = argument(verb, rest)?;
            let on = switch(on).ok_or_else(|| UsageError::syntax(format!("Invalid link state '{on}'.")))?;
            Ok(vec![set(nic, "CableConnected", Scalar::Bool(on))])
        }),
        ("nictracefile", |verb, nic, rest| {
            Ok(vec![set(nic, "TraceFile", Scalar::Text(argument(verb, rest)?.to_owned()))])
        }),
        ("nictrace", |verb, nic, rest| {
            let on = argument(verb, rest)?;
            let on = switch(on)
                .ok_or_else(|| UsageError::syntax(format!("Invalid nictrace{} argument '{on}'.", nic + 1)))?;
            Ok(vec![set(nic, "TraceEnabled", Scalar::Bool(on))])
        }),
        ("nicproperty", |verb, nic, rest| {
            let text = argument(verb, rest)?;
            let (name, value) = text.split_once('=').ok_or_else(|| {
                UsageError::syntax(format!("Invalid nicproperty{} argument '{text}'.", nic + 1))
            })?;
            Ok(vec![Change::NicProperty { nic, name: name.to_owned(), value: value.to_owned() }])
        }),
        ("nicpromisc", |verb, nic, rest| {
            let text = argument(verb, rest)?;
            let policy = exact(PROMISC, text)
                .ok_or_else(|| UsageError::syntax(format!("Unknown promiscuous mode policy '{text}'.")))?;
            Ok(vec![set(nic, "PromiscModePolicy", Scalar::Enum(policy))])
        }),
        ("nic", nic),
        ("natpf", |verb, nic, rest| {
            let text = argument(verb, rest)?;
            if text == "delete" {
                let name = rest.get(1).ok_or_else(|| missing_argument(verb, ""))?.clone();
                return Ok(vec![Change::NatRemoveRule { nic, name }]);
            }
            let rule = parse_nat_rule(text, nic + 1)?
                .ok_or_else(|| UsageError::syntax(format!("Missing or invalid argument to '{verb}'")))?;
            Ok(vec![Change::NatAddRule { nic, rule }])
        }),
    ];
    if let Some(suffix) = verb.strip_prefix("changeuartmode") {
        let port = number(suffix, MAX_SERIAL_PORTS, "UART")? - 1;
        return Ok(Some(Action::Change { changes: uart_mode(verb, port, rest)?, enabled_nic: None }));
    }
    for (name, make) in VERBS {
        let Some(suffix) = verb.strip_prefix(name) else { continue };
        let nic = number(suffix, MAX_NICS, "NIC")? - 1;
        let enabled_nic = if name.starts_with("nic") { Some(nic) } else { None };
        return Ok(Some(Action::Change { changes: make(verb, nic, rest)?, enabled_nic }));
    }
    Ok(None)
}

fn nic(verb: &str, nic: u32, rest: &[String]) -> Parsed<Vec<Change>> {
    let text = argument(verb, rest)?;
    let attachment = exact(NIC_ATTACHMENTS, text)
        .ok_or_else(|| UsageError::syntax(format!("Invalid type '{text}' specfied for NIC {}.", nic + 1)))?;
    let attribute = match attachment {
        "Bridged" => Some("BridgedInterface"),
        "Internal" => Some("InternalNetwork"),
        "HostOnly" => Some("HostOnlyInterface"),
        "HostOnlyNetwork" => Some("HostOnlyNetwork"),
        "Generic" => Some("GenericDriver"),
        "NATNetwork" => Some("NATNetwork"),
        "Cloud" => Some("CloudNetwork"),
        _ => None,
    };
    let mut changes = Vec::new();
    if let Some(attribute) = attribute {
        let name = rest.get(1).ok_or_else(|| missing_argument(text, ""))?;
        changes.push(set(nic, attribute, Scalar::Text(name.clone())));
    }
    changes.push(Change::NicAttachment { nic, attachment: Some(attachment) });
    Ok(changes)
}

fn uart_mode(verb: &str, port: u32, rest: &[String]) -> Parsed<Vec<Change>> {
    let object = Object::SerialPort(port);
    let set = |attribute, value| Change::Set { object, attribute, value };
    let word = argument(verb, rest)?;
    if word == "disconnected" {
        return Ok(vec![set("HostMode", Scalar::Enum("Disconnected"))]);
    }
    let Some((_, mode, server)) = UART_MODES.iter().find(|(name, ..)| *name == word) else {
        return Ok(vec![
            set("Path", Scalar::Text(word.to_owned())),
            set("HostMode", Scalar::Enum("HostDevice")),
        ]);
    };
    let path = rest.get(1).ok_or_else(|| missing_argument(word, ""))?;
    // The path first, so that the new mode finds it.
    let mut changes = vec![set("Path", Scalar::Text(path.clone()))];
    if let Some(server) = server {
        changes.push(set("Server", Scalar::Bool(*server)));
    }
    changes.push(set("HostMode", Scalar::Enum(mode)));
    Ok(changes)
}

fn clipboard(verb: &str, rest: &[String]) -> Parsed<Action> {
    let what = rest.first().ok_or_else(|| UsageError::argument(format!("Missing argument to '{verb}'.")))?;
    match what.as_str() {
        "mode" => {
            let text = rest.get(1).ok_or_else(|| missing_argument(&format!("{verb} {what}"), ""))?;
            let mode = exact(DIRECTIONS, text)
                .ok_or_else(|| UsageError::syntax(format!("Invalid '{verb} {what}' argument '{text}'.")))?;
            Ok(settings(Change::Set {
                object: Object::Machine,
                attribute: "ClipboardMode",
                value: Scalar::Enum(mode),
            }))
        }
        "filetransfers" => Ok(Action::Unavailable("clipboard filetransfers")),
        _ => Err(UsageError::argument(format!("Invalid '{verb}' argument '{what}'."))),
    }
}

/// Hexadecimal bytes; several may stand in one word.
fn scancodes(verb: &str, rest: &[String]) -> Parsed<Vec<u8>> {
    let mut codes = Vec::new();
    for word in rest.iter().flat_map(|word| word.split_ascii_whitespace()) {
        let valid = word.len() == 2 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u8::from_str_radix(word, 16) {
            Ok(code) if valid => codes.push(code),
            _ => return Err(UsageError::failure(format!("'{word}' is not a hex byte!"))),
        }
    }
    if codes.is_empty() {
        return Err(missing_argument(verb, " Expected IBM PC AT set 2 keyboard scancode(s)."));
    }
    Ok(codes)
}

fn screenshot(rest: &[String]) -> Parsed<Action> {
    let (file, screen) = match rest {
        [file] => (file, 0),
        [file, screen] => {
            let bad = || UsageError::syntax(format!("Error parsing display number '{screen}'."));
            (file, getopt::unsigned(screen).and_then(|value| value.try_into().ok()).ok_or_else(bad)?)
        }
        _ => return Err(UsageError::syntax("Incorrect number of parameters.")),
    };
    Ok(Action::ScreenshotPng { file: file.clone(), screen })
}

fn video_mode_hint(rest: &[String]) -> Parsed<Action> {
    if !matches!(rest.len(), 3 | 4 | 5 | 7) {
        return Err(UsageError::syntax("Incorrect number of parameters."));
    }
    let number = |at: usize| -> Parsed<u32> {
        let Some(text) = rest.get(at) else { return Ok(0) };
        getopt::unsigned(text)
            .and_then(|value| value.try_into().ok())
            .ok_or_else(|| UsageError::syntax(format!("Invalid value '{text}'.")))
    };
    let enabled = match rest.get(4).map(|text| text.as_str()) {
        None => true,
        Some(text) => {
            switch(text).ok_or_else(|| UsageError::syntax("Either \"yes\" or \"no\" is expected."))?
        }
    };
    let origin = match (rest.get(5), rest.get(6)) {
        (Some(x), Some(y)) => match (x.parse(), y.parse()) {
            (Ok(x), Ok(y)) => Some((x, y)),
            _ => return Err(UsageError::syntax(format!("Invalid value '{x} {y}'."))),
        },
        _ => None,
    };
    Ok(Action::VideoModeHint(VideoModeHint {
        width: number(0)?,
        height: number(1)?,
        bits_per_pixel: number(2)?,
        screen: number(3)?,
        enabled,
        origin,
    }))
}

fn settings(change: Change) -> Action {
    Action::Change { changes: vec![change], enabled_nic: None }
}

fn set(nic: u32, attribute: &'static str, value: Scalar) -> Change {
    Change::Set { object: Object::Nic(nic), attribute, value }
}

/// [`lookup`] for words that `controlvm` wants in lower case.
fn exact(words: &[(&'static str, &'static str)], word: &str) -> Option<&'static str> {
    words.iter().find(|(name, _)| *name == word).map(|(_, value)| *value)
}

/// `on`, `yes`, `off` or `no`.
fn switch(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "yes" => Some(true),
        "off" | "no" => Some(false),
        _ => None,
    }
}

fn number(text: &str, max: u32, what: &str) -> Parsed<u32> {
    text.parse()
        .ok()
        .filter(|number| (1..=max).contains(number))
        .ok_or_else(|| UsageError::failure(format!("Invalid {what} number '{text}'.")))
}

fn argument<'a>(verb: &str, rest: &'a [String]) -> Parsed<&'a str> {
    rest.first().map(String::as_str).ok_or_else(|| missing_argument(verb, ""))
}

fn missing_argument(verb: &str, more: &str) -> UsageError {
    UsageError::syntax(format!("Missing argument to '{verb}'.{more}"))
}

fn invalid_value(rest: &[String]) -> UsageError {
    UsageError::syntax(format!("Invalid value '{}'.", rest.first().map_or("", |text| text.as_str())))
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    fn act(line: &str) -> Action {
        match controlvm(&words(&format!("vm {line}"))) {
            Ok(Request::ControlVm(ControlVm { vm, action })) => {
                assert_eq!(vm, "vm");
                action
            }
            other => panic!("{line}: {other:?}"),
        }
    }

    fn refusal(line: &str) -> UsageError {
        controlvm(&words(&format!("vm {line}"))).unwrap_err()
    }

    #[test]
    fn scancodes_come_as_words_or_in_one_word() {
        let expected = Action::KeyboardPutScancodes(vec![0x1e, 0x9e, 0xe0]);
        assert_eq!(act("keyboardputscancode 1e 9E e0"), expected);
        let one = ["vm", "keyboardputscancode", "1e 9e e0"].map(str::to_owned);
        assert_eq!(controlvm(&one), Ok(Request::ControlVm(ControlVm { vm: "vm".into(), action: expected })));
        assert_eq!(refusal("keyboardputscancode 1e 9"), UsageError::failure("'9' is not a hex byte!"));
        assert!(matches!(refusal("keyboardputscancode"), UsageError::Syntax(_)));
    }

    #[test]
    fn plain_verbs_are_known() {
        for (word, expected) in [
            ("pause", Action::Pause),
            ("resume --type headless", Action::Resume),
            ("reset", Action::Reset),
            ("poweroff", Action::PowerOff),
            ("acpipowerbutton", Action::AcpiPowerButton),
            ("acpisleepbutton", Action::AcpiSleepButton),
            ("screenshotpng a.png", Action::ScreenshotPng { file: "a.png".into(), screen: 0 }),
            ("screenshotpng a.png 1", Action::ScreenshotPng { file: "a.png".into(), screen: 1 }),
            ("savestate", Action::Unavailable("savestate")),
        ] {
            assert_eq!(act(word), expected, "{word}");
        }
        assert_eq!(refusal("dance"), UsageError::syntax("Invalid parameter 'dance'"));
        assert_eq!(controlvm(&words("vm")), Err(UsageError::syntax("Not enough parameters.")));
    }

    #[test]
    fn verbs_with_a_number_find_their_longest_name() {
        let Action::Change { changes, enabled_nic } = act("nictracefile2 /t") else { panic!() };
        assert_eq!(changes, [set(1, "TraceFile", Scalar::Text("/t".into()))]);
        assert_eq!(enabled_nic, Some(1));
        let Action::Change { changes, .. } = act("nic1 bridged eth0") else { panic!() };
        assert_eq!(changes.len(), 2);
        let Action::Change { changes, enabled_nic } = act("setlinkstate3 off") else { panic!() };
        assert_eq!(changes, [set(2, "CableConnected", Scalar::Bool(false))]);
        assert_eq!(enabled_nic, None);
        let Action::Change { changes, .. } = act("natpf1 delete ssh") else { panic!() };
        assert_eq!(changes, [Change::NatRemoveRule { nic: 0, name: "ssh".into() }]);
        assert_eq!(refusal("nic0 nat"), UsageError::failure("Invalid NIC number '0'."));
        let Action::Change { changes, .. } = act("changeuartmode1 server /tmp/p") else { panic!() };
        assert_eq!(changes.len(), 3);
    }
}
