//! Options of `modifyvm` that are more than one attribute: they take further words, stand for several steps, or
//! answer a bad word in their own way.

use super::{
    Change, Context, Object, OldMedium, OldStorage, Scalar, Screens, lookup, number, parse_nat_rule,
};
use super::{MAX_PARALLEL_PORTS, MAX_SERIAL_PORTS};
use crate::getopt::{self, Value, Want};
use crate::usage::{Parsed, UsageError};

pub(super) const AUDIO_DRIVERS: &[(&str, &str)] = &[
    ("none", "Null"),
    ("null", "Null"),
    ("default", "Default"),
    ("oss", "OSS"),
    ("alsa", "ALSA"),
    ("pulse", "Pulse"),
];

pub const DIRECTIONS: &[(&str, &str)] = &[
    ("disabled", "Disabled"),
    ("hosttoguest", "HostToGuest"),
    ("guesttohost", "GuestToHost"),
    ("bidirectional", "Bidirectional"),
];

pub const PRIORITIES: &[(&str, &str)] =
    &[("default", "Default"), ("flat", "Flat"), ("low", "Low"), ("normal", "Normal"), ("high", "High")];

const NIC_TYPES: &[(&str, &str)] = &[
    ("Am79C970A", "Am79C970A"),
    ("Am79C973", "Am79C973"),
    ("Am79C960", "Am79C960"),
    ("82540EM", "I82540EM"),
    ("82543GC", "I82543GC"),
    ("82545EM", "I82545EM"),
    ("virtio", "Virtio"),
    ("NE1000", "NE1000"),
    ("NE2000", "NE2000"),
    ("WD8003", "WD8003"),
    ("WD8013", "WD8013"),
    ("3C503", "ELNK2"),
    ("3C501", "ELNK1"),
];

/// What `--nicN` and `controlvm nicN` know.
pub const NIC_ATTACHMENTS: &[(&str, &str)] = &[
    ("null", "Null"),
    ("nat", "NAT"),
    ("bridged", "Bridged"),
    ("hostif", "Bridged"),
    ("intnet", "Internal"),
    ("hostonly", "HostOnly"),
    ("hostonlynet", "HostOnlyNetwork"),
    ("generic", "Generic"),
    ("natnetwork", "NATNetwork"),
    ("cloud", "Cloud"),
];

/// The policies of `--nicpromiscN` and `controlvm nicpromiscN`.
pub const PROMISC: &[(&str, &str)] = &[
    ("deny", "Deny"),
    ("allow-vms", "AllowNetwork"),
    ("allow-network", "AllowNetwork"),
    ("allow-all", "AllowAll"),
];

/// Serial port modes that take a path: word, `PortMode`, and whether we are the server where that is a question.
pub const UART_MODES: &[(&str, &str, Option<bool>)] = &[
    ("server", "HostPipe", Some(true)),
    ("client", "HostPipe", Some(false)),
    ("tcpserver", "TCP", Some(true)),
    ("tcpclient", "TCP", Some(false)),
    ("file", "RawFile", None),
];

type Ctx<'a, 'p, 'w> = &'a mut Context<'p, 'w>;

pub(super) fn groups(context: Ctx) -> Parsed<()> {
    let groups = split_groups(context.text());
    context.set(Object::Machine, "Groups", Scalar::Texts(groups));
    Ok(())
}

/// A list of groups; an empty one stands for the root group.
pub fn split_groups(text: &str) -> Vec<String> {
    text.split(',').map(str::to_owned).collect()
}

pub(super) fn icon(context: Ctx) -> Parsed<()> {
    let file = context.text().to_owned();
    context.push(Change::Icon(file));
    Ok(())
}

pub(super) fn cpuid_set(context: Ctx) -> Parsed<()> {
    let Value::Pair(leaf, subleaf) = context.value else { return Err(context.bad_argument()) };
    let mut registers = [0; 4];
    for register in &mut registers {
        *register = context.more(Want::Hex32)?.u32();
    }
    context.push(Change::SetCpuidLeaf { leaf, subleaf, registers });
    Ok(())
}

pub(super) fn cpuid_remove(context: Ctx) -> Parsed<()> {
    let Value::Pair(leaf, subleaf) = context.value else { return Err(context.bad_argument()) };
    context.push(Change::RemoveCpuidLeaf { leaf, subleaf });
    Ok(())
}

pub(super) fn cpuid_remove_all(context: Ctx) -> Parsed<()> {
    context.push(Change::RemoveAllCpuidLeaves);
    Ok(())
}

pub(super) fn plug_cpu(context: Ctx) -> Parsed<()> {
    let cpu = context.value.clone().u32();
    context.push(Change::HotPlugCpu(cpu));
    Ok(())
}

pub(super) fn unplug_cpu(context: Ctx) -> Parsed<()> {
    let cpu = context.value.clone().u32();
    context.push(Change::HotUnplugCpu(cpu));
    Ok(())
}

pub(super) fn boot(context: Ctx) -> Parsed<()> {
    const DEVICES: &[(&str, &str)] =
        &[("none", "Null"), ("floppy", "Floppy"), ("dvd", "DVD"), ("disk", "HardDisk"), ("net", "Network")];
    let Some(device) = lookup(DEVICES, context.text()) else {
        return Err(UsageError::argument(format!("Invalid boot device '{}'", context.text())));
    };
    let position = context.index;
    context.push(Change::BootOrder { position, device });
    Ok(())
}

fn unless_none(text: &str) -> Option<String> {
    if text.eq_ignore_ascii_case("none") { None } else { Some(text.to_owned()) }
}

fn old_disk(context: Ctx, controllers: &'static [&'static str], port: u32, device: u32) -> Parsed<()> {
    let medium = unless_none(context.text());
    context.push(Change::Storage(OldStorage::Disk { controllers, port, device, medium }));
    Ok(())
}

pub(super) fn hda(context: Ctx) -> Parsed<()> {
    old_disk(context, &["IDE Controller"], 0, 0)
}

pub(super) fn hdb(context: Ctx) -> Parsed<()> {
    old_disk(context, &["IDE Controller"], 0, 1)
}

pub(super) fn hdd(context: Ctx) -> Parsed<()> {
    old_disk(context, &["IDE Controller"], 1, 1)
}

pub(super) fn sata_port(context: Ctx) -> Parsed<()> {
    let port = context.index;
    old_disk(context, &["SATA"], port, 0)
}

pub(super) fn scsi_port(context: Ctx) -> Parsed<()> {
    let port = context.index;
    old_disk(context, &["LsiLogic", "BusLogic"], port, 0)
}

pub(super) fn ide_controller(context: Ctx) -> Parsed<()> {
    const KINDS: &[(&str, &str)] = &[("PIIX3", "PIIX3"), ("PIIX4", "PIIX4"), ("ICH6", "ICH6")];
    let kind = lookup(KINDS, context.text()).ok_or_else(|| context.invalid())?;
    context.push(Change::Storage(OldStorage::ControllerType { controller: "IDE Controller", kind }));
    Ok(())
}

pub(super) fn sata_port_count(context: Ctx) -> Parsed<()> {
    let count = context.value.clone().u32();
    if count > 0 {
        context.push(Change::Storage(OldStorage::PortCount { controller: "SATA", count }));
    }
    Ok(())
}

/// `on`, `enable`, `off` or `disable`.
fn enable(context: &Context) -> Parsed<bool> {
    match context.text().to_ascii_lowercase().as_str() {
        "on" | "enable" => Ok(true),
        "off" | "disable" => Ok(false),
        text => Err(UsageError::argument(format!("Invalid {} argument '{text}'", context.name))),
    }
}

pub(super) fn sata(context: Ctx) -> Parsed<()> {
    let step = if enable(context)? {
        OldStorage::Add { controller: "SATA", bus: "SATA", kind: "IntelAhci" }
    } else {
        OldStorage::Remove { controllers: &["SATA"] }
    };
    context.push(Change::Storage(step));
    Ok(())
}

const SCSI: &[&str] = &["BusLogic", "LsiLogic"];

pub(super) fn scsi(context: Ctx) -> Parsed<()> {
    let step = if enable(context)? {
        OldStorage::Add { controller: "BusLogic", bus: "SCSI", kind: "BusLogic" }
    } else {
        OldStorage::Remove { controllers: SCSI }
    };
    context.push(Change::Storage(step));
    Ok(())
}

pub(super) fn scsi_type(context: Ctx) -> Parsed<()> {
    let kind = match context.text().to_ascii_lowercase().as_str() {
        "lsilogic" => "LsiLogic",
        "buslogic" => "BusLogic",
        text => return Err(UsageError::argument(format!("Invalid {} argument '{text}'", context.name))),
    };
    context.push(Change::Storage(OldStorage::Remove { controllers: SCSI }));
    context.push(Change::Storage(OldStorage::Add { controller: kind, bus: "SCSI", kind }));
    Ok(())
}

pub(super) fn dvd_passthrough(context: Ctx) -> Parsed<()> {
    let on = context.text().eq_ignore_ascii_case("on");
    context.push(Change::Storage(OldStorage::DvdPassthrough(on)));
    Ok(())
}

fn old_medium(text: &str) -> OldMedium {
    if text.eq_ignore_ascii_case("none") || text.eq_ignore_ascii_case("empty") {
        OldMedium::Empty
    } else if let Some(drive) = strip_host(text) {
        OldMedium::HostDrive(drive.to_owned())
    } else {
        OldMedium::Image(text.to_owned())
    }
}

/// The drive in `host:drive`.
pub fn strip_host(text: &str) -> Option<&str> {
    match text.split_at_checked(5) {
        Some((prefix, drive)) if prefix.eq_ignore_ascii_case("host:") => Some(drive),
        _ => None,
    }
}

pub(super) fn dvd(context: Ctx) -> Parsed<()> {
    let medium = old_medium(context.text());
    context.push(Change::Storage(OldStorage::Dvd(medium)));
    Ok(())
}

pub(super) fn floppy(context: Ctx) -> Parsed<()> {
    let text = context.text();
    let medium = if text.eq_ignore_ascii_case("disabled") { None } else { Some(old_medium(text)) };
    context.push(Change::Storage(OldStorage::Floppy(medium)));
    Ok(())
}

pub(super) fn nic_property(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    let text = context.text();
    let Some((name, value)) = text.split_once('=') else {
        let index = context.index;
        return Err(UsageError::failure(format!("Invalid --nicproperty{index} argument '{text}'")));
    };
    let (name, value) = (name.to_owned(), value.to_owned());
    context.push(Change::NicProperty { nic, name, value });
    Ok(())
}

pub(super) fn nic_type(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    let Some(kind) = lookup(NIC_TYPES, context.text()) else {
        let (text, index) = (context.text(), context.index);
        return Err(UsageError::failure(format!("Invalid NIC type '{text}' specified for NIC {index}")));
    };
    context.set(Object::Nic(nic), "AdapterType", Scalar::Enum(kind));
    Ok(())
}

pub(super) fn nic_boot_prio(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    let priority = context.value.clone().u32();
    // The PXE ROM takes a list of at most four cards.
    if priority > 4 {
        let index = context.index;
        return Err(UsageError::failure(format!(
            "Invalid boot priority '{priority}' specfied for NIC {index}"
        )));
    }
    context.set(Object::Nic(nic), "BootPriority", Scalar::U32(priority));
    Ok(())
}

pub(super) fn nic_promisc(context: Ctx) -> Parsed<()> {
    let Some(policy) = lookup(PROMISC, context.text()) else {
        return Err(UsageError::failure(format!("Unknown promiscuous mode policy '{}'", context.text())));
    };
    let nic = context.nic()?;
    context.set(Object::Nic(nic), "PromiscModePolicy", Scalar::Enum(policy));
    Ok(())
}

pub(super) fn nic(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    let text = context.text();
    let attachment = if text.eq_ignore_ascii_case("none") {
        None
    } else {
        let index = context.index;
        let unknown = || UsageError::failure(format!("Invalid type '{text}' specfied for NIC {index}"));
        Some(lookup(NIC_ATTACHMENTS, text).ok_or_else(unknown)?)
    };
    context.push(Change::NicAttachment { nic, attachment });
    Ok(())
}

pub(super) fn nat_settings(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    let fields: Vec<&str> = context.text().split(',').map(str::trim).collect();
    if fields.len() != 5 {
        return Err(context.bad_argument());
    }
    let mut values = [0; 5];
    for (value, field) in values.iter_mut().zip(fields) {
        if !field.is_empty() {
            *value = getopt::unsigned(field)
                .and_then(|number| number.try_into().ok())
                .ok_or_else(|| context.bad_argument())?;
        }
    }
    context.push(Change::NatSettings { nic, values });
    Ok(())
}

pub(super) fn nat_pf(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    if context.text() == "delete" {
        let name = context.more(Want::Text).map_err(|_| UsageError::syntax("Not enough parameters"))?.text();
        context.push(Change::NatRemoveRule { nic, name });
    } else if let Some(name) = context.text().strip_prefix("delete=") {
        // As the manual writes it.
        let name = name.to_owned();
        context.push(Change::NatRemoveRule { nic, name });
    } else {
        let rule = parse_nat_rule(context.text(), context.index)?.ok_or_else(|| context.bad_argument())?;
        context.push(Change::NatAddRule { nic, rule });
    }
    Ok(())
}

pub(super) fn nat_alias_mode(context: Ctx) -> Parsed<()> {
    let nic = context.nic()?;
    let (mut log, mut proxy_only, mut same_ports) = (false, false, false);
    for word in context.text().split(',') {
        match word {
            "default" => (log, proxy_only, same_ports) = (false, false, false),
            "log" => log = true,
            "proxyonly" => proxy_only = true,
            "sameports" => same_ports = true,
            _ => return Err(context.invalid()),
        }
    }
    context.set(Object::NatEngine(nic), "AliasLog", Scalar::Bool(log));
    context.set(Object::NatEngine(nic), "AliasProxyOnly", Scalar::Bool(proxy_only));
    context.set(Object::NatEngine(nic), "AliasUseSamePorts", Scalar::Bool(same_ports));
    Ok(())
}

pub(super) fn mouse(context: Ctx) -> Parsed<()> {
    const DEVICES: &[(&str, &str)] = &[
        ("ps2", "PS2Mouse"),
        ("usb", "USBMouse"),
        ("usbtablet", "USBTablet"),
        ("usbmultitouch", "USBMultiTouch"),
        ("usbmtscreenpluspad", "USBMultiTouchScreenPlusPad"),
        ("none", "None"),
    ];
    let Some(device) = lookup(DEVICES, context.text()) else {
        let text = context.text();
        return Err(UsageError::failure(format!("Invalid type '{text}' specfied for pointing device")));
    };
    context.set(Object::Machine, "PointingHIDType", Scalar::Enum(device));
    if device.starts_with("USB") {
        context.push(Change::NeedUsb);
    }
    Ok(())
}

pub(super) fn keyboard(context: Ctx) -> Parsed<()> {
    const DEVICES: &[(&str, &str)] = &[("ps2", "PS2Keyboard"), ("usb", "USBKeyboard"), ("none", "None")];
    let Some(device) = lookup(DEVICES, context.text()) else {
        return Err(UsageError::failure(format!("Invalid type '{}' specfied for keyboard", context.text())));
    };
    context.set(Object::Machine, "KeyboardHIDType", Scalar::Enum(device));
    if device.starts_with("USB") {
        context.push(Change::NeedUsb);
    }
    Ok(())
}

pub(super) fn uart_mode(context: Ctx) -> Parsed<()> {
    let port = Object::SerialPort(number(context.index, MAX_SERIAL_PORTS, "UART")?);
    let word = context.text().to_owned();
    if word.eq_ignore_ascii_case("disconnected") {
        context.set(port, "HostMode", Scalar::Enum("Disconnected"));
        return Ok(());
    }
    let known = UART_MODES.iter().find(|(name, ..)| name.eq_ignore_ascii_case(&word));
    let Some((_, mode, server)) = known else {
        context.set(port, "Path", Scalar::Text(word));
        context.set(port, "HostMode", Scalar::Enum("HostDevice"));
        return Ok(());
    };
    let path = context.more(Want::Text)?.text();
    context.set(port, "Path", Scalar::Text(path));
    context.set(port, "HostMode", Scalar::Enum(mode));
    if let Some(server) = server {
        context.set(port, "Server", Scalar::Bool(*server));
    }
    Ok(())
}

pub(super) fn uart_type(context: Ctx) -> Parsed<()> {
    const KINDS: &[(&str, &str)] = &[("16450", "U16450"), ("16550A", "U16550A"), ("16750", "U16750")];
    let port = Object::SerialPort(number(context.index, MAX_SERIAL_PORTS, "UART")?);
    let Some(kind) = lookup(KINDS, context.text()) else {
        return Err(UsageError::syntax(format!("Invalid argument to '{}'", context.name)));
    };
    context.set(port, "UartType", Scalar::Enum(kind));
    Ok(())
}

/// `off`, or I/O base and IRQ.
fn port(context: Ctx, port: Object, what: &str) -> Parsed<()> {
    let base = context.text().to_owned();
    if base.eq_ignore_ascii_case("off") || base.eq_ignore_ascii_case("disable") {
        context.set(port, "Enabled", Scalar::Bool(false));
        return Ok(());
    }
    let irq = context.more(Want::U32)?.u32();
    let io_base = getopt::unsigned(&base)
        .and_then(|value| u32::try_from(value).ok())
        .filter(|value| *value != 0)
        .ok_or_else(|| UsageError::argument(format!("Error parsing {what} I/O base '{base}'")))?;
    context.set(port, "IRQ", Scalar::U32(irq));
    context.set(port, "IOAddress", Scalar::U32(io_base));
    context.set(port, "Enabled", Scalar::Bool(true));
    Ok(())
}

pub(super) fn uart(context: Ctx) -> Parsed<()> {
    let object = Object::SerialPort(number(context.index, MAX_SERIAL_PORTS, "UART")?);
    port(context, object, "UART")
}

pub(super) fn lpt(context: Ctx) -> Parsed<()> {
    let object = Object::ParallelPort(number(context.index, MAX_PARALLEL_PORTS, "LPT")?);
    port(context, object, "LPT")
}

/// The option that `--audio-driver` and `--audio-enabled` replaced.
pub(super) fn audio(context: Ctx) -> Parsed<()> {
    let driver = lookup(AUDIO_DRIVERS, context.text()).ok_or_else(|| context.invalid())?;
    let enabled = !context.text().eq_ignore_ascii_case("none");
    context.set(Object::AudioAdapter, "AudioDriver", Scalar::Enum(driver));
    context.set(Object::AudioAdapter, "Enabled", Scalar::Bool(enabled));
    Ok(())
}

pub(super) fn clipboard_file_transfers(context: Ctx) -> Parsed<()> {
    let on = match context.text().to_ascii_lowercase().as_str() {
        "enabled" | "on" => true,
        "disabled" | "off" => false,
        _ => return Err(context.invalid()),
    };
    context.set(Object::Machine, "ClipboardFileTransfersEnabled", Scalar::Bool(on));
    Ok(())
}

pub(super) fn vrde_property(context: Ctx) -> Parsed<()> {
    let Some((name, value)) = context.text().split_once('=') else { return Err(context.invalid()) };
    let (name, value) = (name.to_owned(), value.to_owned());
    context.push(Change::VrdeProperty { name, value });
    Ok(())
}

pub(super) fn vrde_port(context: Ctx) -> Parsed<()> {
    let text = context.text();
    let value = if text.eq_ignore_ascii_case("default") { "0".to_owned() } else { text.to_owned() };
    context.push(Change::VrdeProperty { name: "TCP/Ports".to_owned(), value });
    Ok(())
}

pub(super) fn usb_rename(context: Ctx) -> Parsed<()> {
    let old = context.text().to_owned();
    let new = context.more(Want::Text)?.text();
    context.push(Change::UsbRename { old, new });
    Ok(())
}

pub(super) fn teleporter_password_file(context: Ctx) -> Parsed<()> {
    let file = context.text().to_owned();
    context.push(Change::TeleporterPasswordFile(file));
    Ok(())
}

pub(super) fn chipset(context: Ctx) -> Parsed<()> {
    let text = context.text();
    let Some(chipset) = lookup(&[("piix3", "PIIX3"), ("ich9", "ICH9")], text) else {
        return Err(UsageError::failure(format!("Invalid --chipset argument '{text}' (valid: piix3,ich9)")));
    };
    context.set(Object::Machine, "ChipsetType", Scalar::Enum(chipset));
    if chipset == "ICH9" {
        context.push(Change::NeedIoApic);
    }
    Ok(())
}

pub(super) fn recording_screens(context: Ctx) -> Parsed<()> {
    let text = context.text();
    let screens = if text.eq_ignore_ascii_case("all") {
        Screens::All
    } else if text.eq_ignore_ascii_case("none") {
        Screens::None
    } else {
        let ids: Option<Vec<u32>> =
            text.split(',').map(|id| getopt::unsigned(id.trim())?.try_into().ok()).collect();
        Screens::Only(ids.ok_or_else(|| UsageError::failure("Invalid list of screens specified"))?)
    };
    context.push(Change::RecordingScreens(screens));
    Ok(())
}

/// A relative name is the client's, so that execution makes it absolute.
pub(super) fn recording_file(context: Ctx) -> Parsed<()> {
    let file = context.text().to_owned();
    context.push(Change::RecordingFile(file));
    Ok(())
}

pub(super) fn recording_resolution(context: Ctx) -> Parsed<()> {
    let parsed = context.text().split_once('x').and_then(|(width, height)| {
        let number = |text: &str| u32::try_from(getopt::unsigned(text)?).ok();
        Some((number(width)?, number(height)?))
    });
    let Some((width, height)) = parsed else {
        let text = context.text();
        return Err(UsageError::failure(format!(
            "Error parsing video resolution '{text}' (expected <width>x<height>)"
        )));
    };
    context.set(Object::RecordingScreens, "VideoWidth", Scalar::U32(width));
    context.set(Object::RecordingScreens, "VideoHeight", Scalar::U32(height));
    Ok(())
}

pub(super) fn autostop_type(context: Ctx) -> Parsed<()> {
    const KINDS: &[(&str, &str)] = &[
        ("disabled", "Disabled"),
        ("savestate", "SaveState"),
        ("poweroff", "PowerOff"),
        ("acpishutdown", "AcpiShutdown"),
    ];
    let text = context.text();
    let Some(kind) = lookup(KINDS, text) else {
        return Err(UsageError::failure(format!(
            "Invalid --autostop-type argument '{text}' (valid: disabled, savestate, poweroff, acpishutdown)"
        )));
    };
    context.set(Object::Machine, "AutostopType", Scalar::Enum(kind));
    Ok(())
}

/// `bus:device.function`, all hexadecimal, packed as the Main API does.
fn pci_address(text: &str) -> Option<i32> {
    let (bus, rest) = text.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let byte = |text: &str| u8::from_str_radix(text, 16).ok();
    let (bus, device, function) = (byte(bus)?, byte(device)?, byte(function)?);
    if device > 0x1f || function > 7 {
        return None;
    }
    Some(i32::from(bus) << 8 | i32::from(device) << 3 | i32::from(function))
}

pub(super) fn pci_attach(context: Ctx) -> Parsed<()> {
    let text = context.text();
    let (host, guest) = text.split_once('@').unwrap_or((text, text));
    let (Some(host), Some(guest)) = (pci_address(host), pci_address(guest)) else {
        return Err(UsageError::failure(format!(
            "Invalid --pciattach argument '{text}' (valid: 'HB:HD.HF@GB:GD.GF' or just 'HB:HD.HF')"
        )));
    };
    context.push(Change::PciAttach { host, guest });
    Ok(())
}

pub(super) fn pci_detach(context: Ctx) -> Parsed<()> {
    let text = context.text();
    let Some(host) = pci_address(text) else {
        return Err(UsageError::failure(format!(
            "Invalid --pcidetach argument '{text}' (valid: 'HB:HD.HF')"
        )));
    };
    context.push(Change::PciDetach { host });
    Ok(())
}

const TESTING: &str = "VBoxInternal/Devices/VMMDev/0/Config/Testing";

fn testing(context: Ctx, what: &str) -> Parsed<()> {
    let value = if context.value == Value::Bool(true) { "1" } else { "" };
    context.push(Change::ExtraData { key: format!("{TESTING}{what}"), value: value.to_owned() });
    Ok(())
}

pub(super) fn testing_enabled(context: Ctx) -> Parsed<()> {
    testing(context, "Enabled")
}

pub(super) fn testing_mmio(context: Ctx) -> Parsed<()> {
    testing(context, "MMIO")
}

pub(super) fn testing_cfg_dword(context: Ctx) -> Parsed<()> {
    let index = context.index;
    if index > 9 {
        return Err(UsageError::failure(format!(
            "--testing-cfg-dword index {index} is out of range: 0 thru 9"
        )));
    }
    let value = context.value.clone().u32().to_string();
    context.push(Change::ExtraData { key: format!("{TESTING}CfgDword{index}"), value });
    Ok(())
}

/// Settings files of 7.0 have no place for the engine, so that it goes where the VM process's overrides are.
pub(super) fn execution_engine(context: Ctx) -> Parsed<()> {
    const ENGINES: &[(&str, &str)] = &[
        ("default", ""),
        ("hwvirt", "hwvirt"),
        ("hm", "hwvirt"),
        ("native-api", "native-api"),
        ("nem", "native-api"),
        ("interpreter", "interpreter"),
        ("iem", "interpreter"),
        ("recompiler", "recompiler"),
    ];
    let text = context.text();
    let Some(value) = lookup(ENGINES, text) else {
        return Err(UsageError::failure(format!("Invalid --vm-execution-engine '{text}'")));
    };
    let key = "VBoxInternal/EM/ExecutionEngine".to_owned();
    context.push(Change::ExtraData { key, value: value.to_owned() });
    Ok(())
}
