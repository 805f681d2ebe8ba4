//! What `import` shows of a package's machines.

use std::fmt::Write as _;

use main_api::enums::VirtualSystemDescriptionType as Type;

/// One entry.
#[derive(Clone, Debug)]
pub struct Entry<'a> {
    pub unit: u32,
    pub system: usize,
    pub kind: Type,
    pub ovf: &'a str,
    pub value: String,
    pub extra: String,
    /// The value is the user's.
    pub changed: bool,
    /// Switched off; of a license: accepted.
    pub ignored: bool,
    pub disk: DiskChange,
}

/// What of a disk the user has chosen.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskChange {
    pub path: bool,
    pub controller: bool,
    pub port: bool,
}

/// The lines of an entry; empty for kinds that are not shown.
pub fn entry(e: &Entry<'_>) -> String {
    let (n, sys, value, ovf) = (e.unit, e.system, e.value.as_str(), e.ovf);
    let named = |what: &str, option: &str, word: &str| match e.changed {
        true => format!("{n:2}: {what} specified with --{option}: \"{value}\"\n"),
        false => {
            format!(
                "{n:2}: Suggested {what} \"{value}\"\n    (change with \"--vsys {sys} --{option} <{word}>\")\n"
            )
        }
    };
    // Something that can be left out.
    let optional = |text: String| match e.ignored {
        true => format!("{n:2}: {text} -- disabled\n"),
        false => format!("{n:2}: {text}\n    (disable with \"--vsys {sys} --unit {n} --ignore\")\n"),
    };
    let ignored = |what: &str| format!("{n:2}: {what} (ignored): {value}\n");
    let controller = |bus: &str| optional(format!("{bus} controller, type {value}"));
    match e.kind {
        Type::OS if e.changed => format!("{n:2}: OS type specified with --ostype: \"{value}\"\n"),
        Type::OS => format!(
            "{n:2}: Suggested OS type: \"{value}\"\n    (change with \"--vsys {sys} --ostype <type>\"; use \"list ostypes\" to list all possible values)\n"
        ),
        Type::Name => named("VM name", "vmname", "name"),
        Type::PrimaryGroup => named("VM group", "group", "group"),
        Type::SettingsFile => named("VM settings file name", "settingsfile", "filename"),
        Type::BaseFolder => named("VM base folder", "basefolder", "path"),
        Type::Product => ignored("Product"),
        Type::ProductUrl => ignored("ProductUrl"),
        Type::Vendor => ignored("Vendor"),
        Type::VendorUrl => ignored("VendorUrl"),
        Type::Version => ignored("Version"),
        Type::Description if e.changed => {
            format!("{n:2}: Description specified with --description: \"{value}\"\n")
        }
        Type::Description => {
            format!(
                "{n:2}: Description \"{value}\"\n    (change with \"--vsys {sys} --description <desc>\")\n"
            )
        }
        Type::License if e.ignored => format!("{n:2}: End-user license agreement (accepted)\n"),
        Type::License if e.changed => format!(
            "{n:2}: End-user license agreement\n    (accept with \"--vsys {sys} --eula accept\"):\n\n{value}\n\n"
        ),
        Type::License => format!(
            "{n:2}: End-user license agreement\n    (display with \"--vsys {sys} --eula show\";\n    accept with \"--vsys {sys} --eula accept\")\n"
        ),
        Type::CPU if e.changed => format!("{n:2}: No. of CPUs specified with --cpus: {value}\n"),
        Type::CPU => {
            format!("{n:2}: Number of CPUs: {value}\n    (change with \"--vsys {sys} --cpus <n>\")\n")
        }
        Type::Memory => {
            let mb = value.parse::<u64>().unwrap_or(0) >> 20;
            match e.changed {
                true => format!("{n:2}: Guest memory specified with --memory: {mb} MB\n"),
                false => {
                    format!(
                        "{n:2}: Guest memory: {mb} MB\n    (change with \"--vsys {sys} --memory <MB>\")\n"
                    )
                }
            }
        }
        Type::HardDiskControllerIDE => controller("IDE"),
        Type::HardDiskControllerSATA => controller("SATA"),
        Type::HardDiskControllerSAS => controller("SAS"),
        Type::HardDiskControllerVirtioSCSI => controller("VirtioSCSI"),
        Type::HardDiskControllerNVMe => controller("NVMe"),
        Type::HardDiskControllerSCSI if e.ignored => controller("SCSI"),
        Type::HardDiskControllerSCSI if e.changed => {
            format!("{n:2}: SCSI controller, type set with --unit {n} --scsitype: \"{value}\"\n")
        }
        Type::HardDiskControllerSCSI => format!(
            "{n:2}: SCSI controller, type {value}\n    (change with \"--vsys {sys} --unit {n} --scsitype {{BusLogic|LsiLogic}}\";\n    disable with \"--vsys {sys} --unit {n} --ignore\")\n"
        ),
        Type::HardDiskImage if e.ignored => {
            format!("{n:2}: Hard disk image: source image={ovf} -- disabled\n")
        }
        Type::HardDiskImage => disk(e),
        Type::CDROM => optional("CD-ROM".into()),
        Type::Floppy => optional("Floppy".into()),
        Type::USBController => optional("USB controller".into()),
        Type::SoundCard if e.ignored => format!("{n:2}: Sound card \"{ovf}\" -- disabled\n"),
        Type::SoundCard => {
            optional(format!("Sound card (appliance expects \"{ovf}\", can change on import)"))
        }
        Type::NetworkAdapter => {
            format!("{n:2}: Network adapter: orig {ovf}, config {value}, extra {}\n", e.extra)
        }
        Type::Ignore | Type::Miscellaneous => String::new(),
    }
}

fn disk(e: &Entry<'_>) -> String {
    let (n, sys) = (e.unit, e.system);
    let chosen: Vec<&str> =
        [("--disk", e.disk.path), ("--controller", e.disk.controller), ("--port", e.disk.port)]
            .iter()
            .filter(|(_, on)| *on)
            .map(|(option, _)| *option)
            .collect();
    let with =
        if chosen.is_empty() { String::new() } else { format!(" specified with {}", chosen.join(" and ")) };
    let mut text = format!(
        "{n:2}: Hard disk image{with}: source image={}, target path={}, {}\n",
        e.ovf, e.value, e.extra
    );
    let mut hints = Vec::new();
    if !e.disk.path {
        hints.push(format!("change target path with \"--vsys {sys} --unit {n} --disk path\""));
    }
    if !e.disk.controller {
        hints.push(format!("change controller with \"--vsys {sys} --unit {n} --controller <index>\""));
    }
    if !e.disk.port {
        hints.push(format!("change controller port with \"--vsys {sys} --unit {n} --port <n>\""));
    }
    if chosen.is_empty() {
        hints.push(format!("disable with \"--vsys {sys} --unit {n} --ignore\""));
    }
    if !hints.is_empty() {
        let _ = writeln!(text, "    ({})", hints.join(";\n    "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(kind: Type, value: &str) -> Entry<'_> {
        Entry {
            unit: 9,
            system: 0,
            kind,
            ovf: "box-disk001.vmdk",
            value: value.into(),
            extra: "controller=8;channel=0".into(),
            changed: false,
            ignored: false,
            disk: DiskChange::default(),
        }
    }

    #[test]
    fn the_lines_that_vagrant_looks_for_are_there() {
        assert!(entry(&shown(Type::Name, "debian12")).starts_with(" 9: Suggested VM name \"debian12\"\n"));
        let file = entry(&shown(Type::SettingsFile, "/v/d/d.vbox"));
        assert!(file.starts_with(" 9: Suggested VM settings file name \"/v/d/d.vbox\"\n"));
        let disk = entry(&shown(Type::HardDiskImage, "box-disk001.vmdk"));
        assert!(disk.starts_with(
            " 9: Hard disk image: source image=box-disk001.vmdk, target path=box-disk001.vmdk, controller=8;channel=0\n"
        ));
        assert_eq!(disk.lines().next().unwrap().matches(',').count(), 2);
    }

    #[test]
    fn what_is_left_out_is_shown_as_disabled() {
        let mut usb = shown(Type::USBController, "");
        usb.ignored = true;
        assert_eq!(entry(&usb), " 9: USB controller -- disabled\n");
        let mut disk = shown(Type::HardDiskImage, "/x.vmdk");
        disk.disk = DiskChange { path: true, controller: false, port: true };
        assert!(entry(&disk).starts_with(" 9: Hard disk image specified with --disk and --port: "));
    }
}
