use super::super::words;
use super::*;
use main_api::idl;
use main_api::types::Ty;

fn changes(line: &str) -> Vec<Change> {
    match parse(&words(&format!("vm {line}"))) {
        Ok(request) => {
            assert_eq!(request.vm, "vm");
            request.changes
        }
        Err(error) => panic!("{line}: {error:?}"),
    }
}

fn refusal(line: &str) -> UsageError {
    match parse(&words(&format!("vm {line}"))) {
        Err(error) => error,
        Ok(request) => panic!("{line}: {request:?}"),
    }
}

/// Words that each special row accepts.
fn special_value(name: &str) -> &'static str {
    match name {
        "boot" => "dvd",
        "cpuid-set" => "80000002:1 1 2 3 0x4",
        "cpuid-remove" => "80000002",
        "nic-property" | "vrde-property" => "a=b=c",
        "nic-type" => "82540em",
        "nic-boot-prio" | "plug-cpu" | "unplug-cpu" | "sata-port-count" | "testing-cfg-dword" => "1",
        "nic-promisc" => "allow-vms",
        "nic" => "nat",
        "nat-settings" => "1500,128,128,0,0",
        "nat-pf" => "ssh,tcp,127.0.0.1,2222,,22",
        "nat-alias-mode" => "log,sameports",
        "mouse" => "usbtablet",
        "keyboard" => "usb",
        "uart-mode" => "server /tmp/pipe",
        "uart-type" => "16550A",
        "uart" | "lpt" => "0x3f8 4",
        "audio" => "none",
        "clipboard-file-transfers" => "enabled",
        "usb-rename" => "OHCI USB",
        "chipset" => "ich9",
        "recording-screens" => "0,1",
        "recording-video-res" => "800x600",
        "autostop-type" => "savestate",
        "vm-execution-engine" => "interpreter",
        "pci-attach" => "01:02.3@00:04.0",
        "pci-detach" => "01:02.3",
        "idec-ontroller" => "PIIX4",
        "scsi-type" => "LsiLogic",
        "sata" | "scsi" | "dvd-pass-through" | "testing-enabled" | "testing-mmio" => "on",
        "cpuid-remove-all" => "",
        _ => "word",
    }
}

fn value(row: &Row) -> &'static str {
    match (row.action, row.want) {
        (Action::Special(_), _) => special_value(row.names[0]),
        (Action::Words(_, _, words), _) => words[0].0,
        (_, Want::OnOff) => "on",
        (_, Want::U32) => "12",
        (_, Want::I64) => "-3600000",
        _ => "word",
    }
}

#[test]
fn every_option_parses_the_same_in_every_spelling() {
    for row in ROWS {
        let index = if row.indexed { "1" } else { "" };
        let value = value(row);
        let (first, rest) = value.split_once(' ').unwrap_or((value, ""));
        let expected = changes(&format!("--{}{index} {value}", row.names[0]));
        assert!(!expected.is_empty(), "{}", row.names[0]);
        for name in row.names {
            assert_eq!(changes(&format!("--{name}{index} {value}")), expected, "{name}");
            assert_eq!(changes(&format!("-{name}{index} {value}")), expected, "{name}");
            if row.want != Want::Nothing {
                assert_eq!(changes(&format!("--{name}{index}={first} {rest}")), expected, "{name}");
                assert_eq!(changes(&format!("--{name}{index}:{first} {rest}")), expected, "{name}");
            }
        }
    }
}

#[test]
fn no_spelling_belongs_to_two_options() {
    let mut seen = std::collections::HashSet::new();
    for name in ROWS.iter().flat_map(|row| row.names) {
        assert!(seen.insert(name), "{name}");
    }
}

/// The attribute's row in the interface tables.
fn described(target: Target, attribute: &str) -> Option<&'static main_api::types::AttrDesc> {
    let interface = match target {
        Target::Machine => "IMachine",
        Target::GraphicsAdapter => "IGraphicsAdapter",
        Target::BiosSettings => "IBIOSSettings",
        Target::TrustedPlatformModule => "ITrustedPlatformModule",
        Target::AudioAdapter => "IAudioAdapter",
        Target::VrdeServer => "IVRDEServer",
        Target::GuestDebugControl => "IGuestDebugControl",
        Target::RecordingSettings => "IRecordingSettings",
        Target::RecordingScreens => "IRecordingScreenSettings",
        Target::Nic => "INetworkAdapter",
        Target::NatEngine => "INATEngine",
        Target::ParallelPort => "IParallelPort",
    };
    idl::by_name(interface)?.attribute(attribute)
}

#[test]
fn every_attribute_of_the_table_exists_with_its_type_and_can_be_written() {
    for row in ROWS {
        let (target, attribute, expected) = match (row.action, row.want) {
            (Action::Set(target, attribute), Want::OnOff) => (target, attribute, Ty::Bool),
            (Action::Set(target, attribute), Want::U32) => (target, attribute, Ty::ULong),
            (Action::Set(target, attribute), Want::I64) => (target, attribute, Ty::LongLong),
            (Action::Set(target, attribute) | Action::TextOr(target, attribute, _), _) => {
                (target, attribute, Ty::Str)
            }
            (Action::Words(target, attribute, words), _) => {
                let found = described(target, attribute).unwrap_or_else(|| panic!("{attribute}"));
                let Ty::Enum(name) = found.ty else { panic!("{attribute} is no enumeration") };
                let all = main_api::enums::all();
                let (_, values) = all.iter().find(|(known, _)| *known == name).unwrap();
                for (_, value) in words {
                    assert!(values.contains(value), "{name} has no {value}");
                }
                assert!(found.writable, "{attribute}");
                continue;
            }
            _ => continue,
        };
        let found = described(target, attribute).unwrap_or_else(|| panic!("{target:?} has no {attribute}"));
        assert_eq!(found.ty, expected, "{attribute}");
        assert!(found.writable, "{attribute}");
    }
}

#[test]
fn several_changes_keep_their_order() {
    let all = changes("--memory 512 --natpf1 delete ssh --natpf1 ssh,tcp,,2222,,22 --nic2 none --cpus=4");
    assert_eq!(
        all,
        [
            Change::Set { object: Object::Machine, attribute: "MemorySize", value: Scalar::U32(512) },
            Change::NatRemoveRule { nic: 0, name: "ssh".into() },
            Change::NatAddRule {
                nic: 0,
                rule: NatRule {
                    name: "ssh".into(),
                    protocol: "TCP",
                    host_ip: String::new(),
                    host_port: 2222,
                    guest_ip: String::new(),
                    guest_port: 22,
                },
            },
            Change::NicAttachment { nic: 1, attachment: None },
            Change::Set { object: Object::Machine, attribute: "CPUCount", value: Scalar::U32(4) },
        ]
    );
}

#[test]
fn the_machine_may_stand_behind_the_options() {
    assert_eq!(parse(&words("--memory 512 vm")).unwrap().vm, "vm");
    assert_eq!(parse(&words("vm --memory 512 other")), Err(UsageError::invalid_parameter("other")));
    assert_eq!(parse(&words("vm")), Err(UsageError::syntax("Not enough parameters")));
}

#[test]
fn words_are_taken_in_any_case() {
    assert_eq!(changes("--firmware EFI64"), changes("--firmware efi64"));
    assert_eq!(changes("--nic1 NAT"), changes("--nic1 nat"));
    assert_eq!(changes("--hpet ON"), changes("--hpet on"));
    assert_eq!(changes("--macaddress1 AUTO"), changes("--macaddress1 auto"));
}

#[test]
fn words_that_mean_nothing_at_all_empty_the_text() {
    for (line, attribute) in [
        ("--bridgeadapter1 none", "BridgedInterface"),
        ("--macaddress1 auto", "MACAddress"),
        ("--natnet1 default", "Network"),
        ("--snapshotfolder default", "SnapshotFolder"),
        ("--defaultfrontend default", "DefaultFrontend"),
        ("--vrdeauthlibrary default", "AuthLibrary"),
    ] {
        let [Change::Set { attribute: found, value, .. }] = &changes(line)[..] else { panic!("{line}") };
        assert_eq!((*found, value), (attribute, &Scalar::Text(String::new())), "{line}");
    }
}

#[test]
fn a_serial_port_takes_its_words() {
    let port = Object::SerialPort(0);
    let set = |attribute, value| Change::Set { object: port, attribute, value };
    assert_eq!(
        changes("--uart1 0x3f8 4 --uartmode1 file /tmp/f"),
        [
            set("IRQ", Scalar::U32(4)),
            set("IOAddress", Scalar::U32(0x3f8)),
            set("Enabled", Scalar::Bool(true)),
            set("Path", Scalar::Text("/tmp/f".into())),
            set("HostMode", Scalar::Enum("RawFile")),
        ]
    );
    assert_eq!(changes("--uart1 off"), [set("Enabled", Scalar::Bool(false))]);
    assert_eq!(
        changes("--uart-mode1 tcpserver 2023"),
        [
            set("Path", Scalar::Text("2023".into())),
            set("HostMode", Scalar::Enum("TCP")),
            set("Server", Scalar::Bool(true)),
        ]
    );
    assert_eq!(
        changes("--uartmode1 /dev/ttyS0"),
        [set("Path", Scalar::Text("/dev/ttyS0".into())), set("HostMode", Scalar::Enum("HostDevice"))]
    );
    assert_eq!(
        refusal("--uartmode1 server"),
        UsageError::syntax("Missing or invalid argument to '--uartmode'")
    );
    assert_eq!(refusal("--uart5 0x3f8 4"), UsageError::failure("Invalid UART number 5"));
}

#[test]
fn usb_input_devices_ask_for_a_controller() {
    assert!(changes("--mouse usbtablet").contains(&Change::NeedUsb));
    assert!(!changes("--mouse ps2").contains(&Change::NeedUsb));
    assert!(changes("--keyboard usb").contains(&Change::NeedUsb));
}

#[test]
fn refusals_are_worded_as_virtualboxs() {
    for (line, error) in [
        ("--frob 1", UsageError::syntax("Unknown option: --frob")),
        ("--memory lots", UsageError::syntax("Invalid argument format: lots")),
        ("--hpet maybe", UsageError::syntax("Unknown option: maybe")),
        ("--firmware uefi", UsageError::failure("Invalid --firmware argument 'uefi'")),
        ("--nic0 nat", UsageError::failure("Invalid NIC number 0")),
        ("--nic1 wifi", UsageError::failure("Invalid type 'wifi' specfied for NIC 1")),
        ("--nictype1 x", UsageError::failure("Invalid NIC type 'x' specified for NIC 1")),
        ("--boot1 usb", UsageError::argument("Invalid boot device 'usb'")),
        ("--natpf1 delete", UsageError::syntax("Not enough parameters")),
        ("--natpf1 a,b", UsageError::syntax("Missing or invalid argument to '--natpf'")),
        ("--chipset q35", UsageError::failure("Invalid --chipset argument 'q35' (valid: piix3,ich9)")),
        (
            "--testing-cfg-dword12 1",
            UsageError::failure("--testing-cfg-dword index 12 is out of range: 0 thru 9"),
        ),
    ] {
        assert_eq!(refusal(line), error, "{line}");
    }
}
