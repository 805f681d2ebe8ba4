//! Settings files as VirtualBox 3.1 to 7.0 write them, with content of other programs and people in them: they
//! are understood, come back byte for byte, and an edit changes only what it should.

use settings::*;

const MACHINES: [(&str, &[u8]); 5] = [
    ("3.1", include_bytes!("samples/v3_1.vbox")),
    ("4.3", include_bytes!("samples/v4_3.vbox")),
    ("5.2", include_bytes!("samples/v5_2.vbox")),
    ("6.1", include_bytes!("samples/v6_1.vbox")),
    ("7.0", include_bytes!("samples/v7_0.vbox")),
];

const GLOBALS: [(&str, &[u8]); 2] = [
    ("4.1", include_bytes!("samples/VirtualBox.xml")),
    ("7.0", include_bytes!("samples/VirtualBox_7_0.xml")),
];

fn document(bytes: &[u8]) -> Document {
    Document::parse(bytes).unwrap()
}

fn sample(name: &str) -> (Document, MachineSettings) {
    let (_, bytes) = MACHINES.iter().find(|(n, _)| *n == name).unwrap();
    let document = document(bytes);
    let settings = MachineSettings::load(&document).unwrap().0;
    (document, settings)
}

/// The lines that `edit` takes out of the sample and puts into it.
fn changed_lines(name: &str, edit: impl FnOnce(&mut MachineSettings)) -> (Vec<String>, Vec<String>) {
    let (mut document, mut settings) = sample(name);
    let before = document.to_text();
    edit(&mut settings);
    settings.apply(&mut document).unwrap();
    let after = document.to_text();
    let (mut read_back, _) = MachineSettings::load(&Document::parse(after.as_bytes()).unwrap()).unwrap();
    normalize(&mut read_back);
    normalize(&mut settings);
    assert_eq!(read_back, settings);
    differing(&before, &after)
}

/// Takes out network cards that are not there: what they would be differs between versions.
fn normalize(settings: &mut MachineSettings) {
    let fresh = |n: &NetworkAdapter| {
        !n.enabled && n.mac_address.is_empty() && n.attachment == NetworkAttachment::Null
    };
    settings.hardware.network.retain(|n| !fresh(n));
    let mut snapshots: Vec<&mut Snapshot> = settings.snapshot.as_deref_mut().into_iter().collect();
    while let Some(snapshot) = snapshots.pop() {
        snapshot.hardware.network.retain(|n| !fresh(n));
        snapshots.extend(&mut snapshot.children);
    }
}

/// Lines that stand in only one of two texts, without the white space around them.
fn differing(before: &str, after: &str) -> (Vec<String>, Vec<String>) {
    let old: Vec<&str> = before.lines().collect();
    let new: Vec<&str> = after.lines().collect();
    // Longest common subsequence.
    let mut length = vec![vec![0u32; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            length[i][j] = if old[i] == new[j] {
                length[i + 1][j + 1] + 1
            } else {
                length[i + 1][j].max(length[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let (mut removed, mut added) = (Vec::new(), Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && length[i + 1][j] >= length[i][j + 1]) {
            removed.push(old[i].trim().to_owned());
            i += 1;
        } else {
            added.push(new[j].trim().to_owned());
            j += 1;
        }
    }
    (removed, added)
}

fn lines(removed: &[&str], added: &[&str]) -> (Vec<String>, Vec<String>) {
    let own = |lines: &[&str]| lines.iter().map(|&l| l.to_owned()).collect();
    (own(removed), own(added))
}

#[test]
fn samples_come_back_byte_for_byte() {
    for (name, bytes) in MACHINES {
        let mut document = document(bytes);
        let (settings, version) = MachineSettings::load(&document).unwrap_or_else(|e| panic!("{name}: {e}"));
        let applied = settings.apply(&mut document).unwrap();
        assert_eq!(applied, Applied { changed: false, from: version, to: version });
        assert_eq!(document.to_text().as_bytes(), bytes, "{name}");
    }
    for (name, bytes) in GLOBALS {
        let mut document = document(bytes);
        let (settings, _) = GlobalSettings::load(&document).unwrap_or_else(|e| panic!("{name}: {e}"));
        settings.apply(&mut document).unwrap();
        assert_eq!(document.to_text().as_bytes(), bytes, "{name}");
    }
}

#[test]
fn what_is_written_anew_is_read_as_the_same_settings() {
    for (name, _) in MACHINES {
        let (_, settings) = sample(name);
        let again = settings.to_document().unwrap();
        let (mut read, _) = MachineSettings::load(&document(again.to_text().as_bytes())).unwrap();
        let mut settings = settings;
        normalize(&mut settings);
        normalize(&mut read);
        assert_eq!(read, settings, "{name}");
    }
    for (name, bytes) in GLOBALS {
        let (settings, _) = GlobalSettings::load(&document(bytes)).unwrap();
        let again = settings.to_document().unwrap();
        assert_eq!(GlobalSettings::load(&again).unwrap().0, settings, "{name}");
    }
}

#[test]
fn version_3_1_is_understood() {
    let (_, m) = sample("3.1");
    let h = &m.hardware;
    assert_eq!((h.memory.ram_mb, h.cpu.long_mode, h.cpu.pae), (384, LongMode::Legacy, false));
    assert_eq!(h.boot_order, [BootDevice::Dvd, BootDevice::HardDisk, BootDevice::None, BootDevice::None]);
    assert_eq!(h.remote_display.properties["TCP/Ports"], "3390");
    assert_eq!(h.remote_display.properties["TCP/Address"], "127.0.0.1");
    assert_eq!(h.bios.time_offset, -3_600_000);
    assert!(h.usb.has(UsbControllerType::Ohci) && !h.usb.has(UsbControllerType::Ehci));
    assert_eq!(h.usb.device_filters[0].vendor_id, "0951");
    assert_eq!(h.network[1].attachment, NetworkAttachment::Bridged);
    assert_eq!(h.network[1].bridged_interface, "eth0");
    assert_eq!(h.paravirt_provider, ParavirtProvider::Legacy);
    assert_eq!(h.storage_controllers[0].attached[1].host_drive.as_deref(), Some("/dev/scd0"));
}

#[test]
fn version_4_3_is_understood() {
    let (_, m) = sample("4.3");
    assert_eq!(m.name, "build & test");
    assert_eq!(m.description, "Builds <everything>\nevery night.");
    assert_eq!(m.groups, ["/work", "/nightly"]);
    let disk = &m.media_registry.hard_disks[0];
    assert!(disk.children[0].auto_reset && disk.children[0].properties["vendor/color"] == "blue");
    assert_eq!(m.media_registry.dvd_images[0].medium_type, MediumType::Readonly);
    assert_eq!(m.extra_data["VBoxInternal/Devices/pcbios/0/Config/DmiSystemVendor"], "string:\"ACME\"");
    let snapshot = m.find_snapshot(m.current_snapshot.unwrap()).unwrap();
    assert_eq!((snapshot.name.as_str(), snapshot.hardware.memory.ram_mb), ("tools", 1024));
    assert!(!snapshot.state_file.is_empty());
    let h = &m.hardware;
    assert_eq!(h.cpu.cpuid_leaves[0].ecx, 2_147_483_647);
    assert_eq!(m.recording.screens[0].width, 1280);
    let nat = &h.network[0].nat;
    assert_eq!((nat.network.as_str(), nat.mtu, nat.dns_proxy), ("10.9.0.0/16", 1400, true));
    assert_eq!(
        (nat.rules[0].name.as_str(), nat.rules[0].host_port, nat.rules[1].guest_port),
        ("ssh", 2222, 80)
    );
    assert_eq!(
        (h.network[0].bridged_interface.as_str(), h.network[0].nat_network.as_str()),
        ("eth0", "NatNetwork")
    );
    assert_eq!(h.network[1].generic_properties["dport"], "10002");
    assert_eq!((h.serial_ports[0].mode, h.serial_ports[0].server), (PortMode::HostPipe, true));
    assert_eq!(h.parallel_ports[1].path, "/dev/parport0");
    assert_eq!((h.audio.driver, h.audio.codec), (AudioDriver::Pulse, AudioCodec::Stac9221));
    assert!(h.rtc_use_utc && h.emulated_usb_card_reader);
    assert_eq!(h.bandwidth_groups[1].max_bytes_per_sec, 1000);
    assert_eq!(h.host_pci[0].host_address, 768);
    let sata = h.storage_controller("SATA").unwrap();
    assert!(sata.attached[0].discard && sata.attached[0].hot_pluggable && sata.attached[1].temp_eject);
}

#[test]
fn version_5_2_of_windows_is_understood() {
    let (_, m) = sample("5.2");
    assert_eq!(m.name, "Büro");
    assert_eq!(m.state_file, "Snapshots/{c0de0000-52aa-4c0b-8a07-52520000aa99}.sav");
    assert!(m.aborted && !m.current_state_modified);
    let h = &m.hardware;
    assert_eq!((h.memory.ram_mb, h.firmware, h.chipset), (4096, Firmware::Efi, Chipset::Ich9));
    assert_eq!(h.cpu.plugged, [0, 1]);
    assert!(h.cpu.x2apic && h.cpu.apic && h.cpu.spec_ctrl && h.cpu.ibpb_on_vm_entry);
    assert_eq!((h.network.len(), h.network[12].cable_connected), (36, false));
    assert_eq!(h.network[12].bridged_interface, "Intel(R) Ethernet \"LAN\"");
    assert!(h.audio.enabled && !h.audio.enabled_in && h.audio.enabled_out);
    assert_eq!(h.serial_ports[1].path, "localhost:4000");
    assert!(!h.remote_display.enabled);
}

#[test]
fn version_6_1_and_7_0_are_understood() {
    let (_, m) = sample("6.1");
    assert_eq!(
        (m.process_priority, m.autostart.autostop),
        (ProcessPriority::High, AutostopType::AcpiShutdown)
    );
    assert!(!m.name_sync && m.directory_includes_uuid && m.debugging.tracing_enabled && m.teleporter.enabled);
    let h = &m.hardware;
    assert!(!h.cpu.apic && !h.cpu.hw_virt && h.cpu.nested_hw_virt && !h.cpu.l1d_flush_on_sched);
    assert_eq!((h.cpu.profile.as_str(), h.bios.logo_display_time), ("Intel Core i7-6700K", 1500));
    assert_eq!(h.network[1].attachment, NetworkAttachment::Cloud);
    assert_eq!((h.serial_ports[2].uart_type, h.serial_ports[2].mode), (UartType::U16750, PortMode::RawFile));
    assert_eq!((h.default_frontend.as_str(), h.io_cache.size_mb), ("headless", 16));
    assert_eq!(h.storage_controllers[1].instance, 1);

    let (_, m) = sample("7.0");
    assert_eq!((m.hardware.tpm.tpm_type, m.hardware.iommu), (TpmType::V2_0, Iommu::Automatic));
    assert_eq!(m.hardware.audio.driver, AudioDriver::Default);
    assert_eq!(m.hardware.network[1].attachment, NetworkAttachment::HostOnlyNetwork);
    assert!(m.hardware.network[2].nat.localhost_reachable);
    assert_eq!((m.recording.screens.len(), m.recording.screens[0].audio_hz), (2, 48000));
    assert_eq!(m.debugging.guest_debug_port, 1234);
}

#[test]
fn the_installations_settings_are_understood() {
    let (g, _) = GlobalSettings::load(&document(GLOBALS[1].1)).unwrap();
    assert_eq!(g.machines[0].settings_file, "/home/ann/VirtualBox VMs/build & test/build & test.vbox");
    assert_eq!(
        (g.system_properties.proxy_mode, g.system_properties.log_history_count),
        (ProxyMode::Manual, 5)
    );
    let dhcp = &g.dhcp_servers[1];
    assert_eq!((dhcp.options.max_lease_time, dhcp.options.options[1].encoding), (6000, 1));
    assert_eq!(
        (dhcp.groups[0].conditions[1].inclusive, dhcp.individual[1].vm_name.as_str()),
        (false, "router")
    );
    assert_eq!(g.nat_networks[0].rules6[0].protocol, NatProtocol::Udp);
    assert_eq!(g.usb_device_filters[0].action, UsbFilterAction::Hold);
    assert_eq!(g.usb_device_sources[0].properties["port"], "3240");
}

#[test]
fn an_attribute_changes_alone() {
    assert_eq!(
        changed_lines("7.0", |m| m.hardware.memory.ram_mb = 4096),
        lines(&["<Memory RAMSize=\"8192\"/>"], &["<Memory RAMSize=\"4096\"/>"])
    );
    assert_eq!(
        changed_lines("4.3", |m| m.hardware.network[0].cable_connected = false),
        lines(
            &[
                "<Adapter slot=\"0\" enabled=\"true\" MACAddress=\"080027A1B2C3\" cable=\"true\" speed=\"0\" type=\"82540EM\">"
            ],
            &[
                "<Adapter slot=\"0\" enabled=\"true\" MACAddress=\"080027A1B2C3\" speed=\"0\" type=\"82540EM\">"
            ]
        )
    );
}

#[test]
fn list_items_come_and_go_alone() {
    assert_eq!(
        changed_lines("7.0", |m| {
            m.extra_data.insert("A first".into(), "1".into());
        }),
        lines(&[], &["<ExtraDataItem name=\"A first\" value=\"1\"/>"])
    );
    assert_eq!(
        changed_lines("4.3", |m| {
            m.hardware.guest_properties.remove(0);
        }),
        lines(
            &[
                "<GuestProperty name=\"/VirtualBox/GuestAdd/Version\" value=\"4.3.10\" timestamp=\"1399049000000000000\" flags=\"\"/>"
            ],
            &[]
        )
    );
    assert_eq!(
        changed_lines("4.3", |m| {
            m.hardware.network[0].nat.rules.remove(0);
        }),
        lines(
            &[
                "<Forwarding name=\"ssh\" proto=\"1\" hostip=\"127.0.0.1\" hostport=\"2222\" guestport=\"22\"/>"
            ],
            &[]
        )
    );
}

#[test]
fn changing_an_attachment_keeps_the_parameters_of_the_old_one() {
    let internal = "<InternalNetwork name=\"dmz\"/>";
    assert_eq!(
        changed_lines("6.1", |m| m.hardware.network[0].attachment = NetworkAttachment::HostOnly),
        lines(&[internal], &["<DisabledModes>", internal, "</DisabledModes>", "<HostOnlyInterface/>"])
    );
}

#[test]
fn an_unknown_element_beside_a_removed_setting_stays() {
    let (removed, added) = changed_lines("4.3", |m| m.hardware.bios.ioapic = false);
    assert_eq!((removed, added), lines(&["<IOAPIC enabled=\"true\"/>"], &[]));
}

#[test]
fn a_file_keeps_its_version_as_long_as_that_can_say_it() {
    for (name, _) in MACHINES.iter().filter(|(name, _)| *name != "3.1") {
        let (mut document, mut settings) = sample(name);
        settings.hardware.memory.ram_mb += 1;
        let applied = settings.apply(&mut document).unwrap();
        assert!(applied.changed && applied.to == applied.from, "{name}: {applied:?}");
    }
    for (_, bytes) in GLOBALS {
        let mut document = document(bytes);
        let (mut settings, version) = GlobalSettings::load(&document).unwrap();
        settings.machines.clear();
        assert_eq!(settings.apply(&mut document).unwrap().to, version);
    }
}

#[test]
fn a_file_rises_to_the_lowest_version_that_can_say_it() {
    let to = |name: &str, edit: fn(&mut MachineSettings)| {
        let (mut document, mut settings) = sample(name);
        edit(&mut settings);
        let applied = settings.apply(&mut document).unwrap();
        let (mut read, version) =
            MachineSettings::load(&Document::parse(document.to_text().as_bytes()).unwrap()).unwrap();
        assert_eq!(version, applied.to);
        normalize(&mut read);
        normalize(&mut settings);
        assert_eq!(read, settings, "{name} to {version}");
        version
    };
    assert_eq!(to("3.1", |m| m.hardware.memory.ram_mb = 1), SettingsVersion::V1_10);
    assert_eq!(to("3.1", |m| m.hardware.chipset = Chipset::Piix3), SettingsVersion::V1_9);
    assert_eq!(to("3.1", |m| m.hardware.audio.controller = AudioController::Hda), SettingsVersion::V1_11);
    assert_eq!(to("3.1", |m| m.hardware.emulated_usb_card_reader = true), SettingsVersion::V1_12);
    assert_eq!(to("3.1", |m| m.groups = vec!["/x".into()]), SettingsVersion::V1_13);
    assert_eq!(to("3.1", |m| m.hardware.cpu.long_mode = LongMode::Disabled), SettingsVersion::V1_14);
    assert_eq!(to("3.1", |m| m.hardware.paravirt_provider = ParavirtProvider::Kvm), SettingsVersion::V1_15);
    assert_eq!(to("4.3", |m| m.hardware.cpu.x2apic = true), SettingsVersion::V1_16);
    assert_eq!(to("4.3", |m| m.hardware.cpu.nested_hw_virt = true), SettingsVersion::V1_17);
    assert_eq!(to("4.3", |m| m.hardware.nvram.path = "x.nvram".into()), SettingsVersion::V1_18);
    assert_eq!(to("4.3", |m| m.hardware.audio.driver = AudioDriver::Default), SettingsVersion::V1_19);
    assert_eq!(to("5.2", |m| m.hardware.tpm.tpm_type = TpmType::V2_0), SettingsVersion::V1_19);
    assert_eq!(to("6.1", |m| m.hardware.iommu = Iommu::Amd), SettingsVersion::V1_19);
}

#[test]
fn video_capture_is_read_and_changed_where_it_stands() {
    let in_hardware = String::from_utf8(MACHINES[3].1.to_vec()).unwrap();
    let capture = "<VideoCapture screens=\"1\" file=\".\" fps=\"25\"/>";
    let outside = in_hardware
        .replace(capture, "")
        .replace("</Autostart>", "")
        .replace("<Autostart", &format!("{capture}<Autostart"));
    for text in [in_hardware, outside] {
        let mut document = document(text.as_bytes());
        let (mut settings, version) = MachineSettings::load(&document).unwrap();
        assert_eq!(settings.recording.screens[0].file, ".");
        settings.recording.screens[0].fps = 30;
        let applied = settings.apply(&mut document).unwrap();
        assert_eq!((applied.changed, applied.to), (true, version));
        assert_eq!(document.to_text(), text.replace("fps=\"25\"", "fps=\"30\""));
    }
}

#[test]
fn a_rise_adds_nothing_but_what_changed_and_other_defaults() {
    assert_eq!(
        changed_lines("6.1", |m| m.hardware.iommu = Iommu::Amd),
        lines(
            &[
                "<VirtualBox xmlns=\"http://www.virtualbox.org/\" version=\"1.18-linux\">",
                "<VideoCapture screens=\"1\" file=\".\" fps=\"25\"/>",
            ],
            &[
                "<VirtualBox xmlns=\"http://www.virtualbox.org/\" version=\"1.19-linux\">",
                "<Iommu type=\"AMD\"/>",
                // The engines of cards plugged in elsewhere could reach the host, which is no default any more.
                "<DisabledModes>",
                "<NAT localhost-reachable=\"true\"/>",
                "</DisabledModes>",
                "<NAT localhost-reachable=\"true\"/>",
                "<GuestDebug provider=\"None\" io=\"None\" address=\"\" port=\"0\"/>",
                "<Recording screens=\"1\">",
                "<Screen id=\"0\" enabled=\"true\" featuresEnabled=\"video\" options=\"vc_enabled=true,ac_enabled=false,ac_profile=med\" dest=\"1\" file=\".\" videoCodec=\"VP8\" fps=\"25\" audioCodec=\"vorbis\"/>",
                "</Recording>",
            ]
        )
    );
}

#[test]
fn unknown_content_survives_a_rise_of_the_version() {
    let (mut document, mut settings) = sample("4.3");
    settings.hardware.cpu.nested_hw_virt = true;
    settings.apply(&mut document).unwrap();
    let text = document.to_text();
    for kept in [
        "vendorAttribute=\"kept\"",
        "<VendorBios secret=\"42\"/>",
        "storageExtra=\"kept\"",
        "snapshotExtra=\"kept\"",
    ] {
        assert!(text.contains(kept), "{kept}\n{text}");
    }
    assert!(text.contains("version=\"1.17-linux\""));
    let hardware = text.rfind("</Hardware>").unwrap();
    assert!(text.rfind("<StorageControllers>").unwrap() < hardware, "{text}");
}

#[test]
fn a_newer_file_is_refused_by_name() {
    let text = String::from_utf8(MACHINES[4].1.to_vec()).unwrap().replace("1.19-linux", "1.20-linux");
    let error = MachineSettings::load(&document(text.as_bytes())).unwrap_err();
    assert_eq!(error, LoadError::Newer("1.20-linux".into()));
    assert!(error.to_string().contains("1.20-linux"));
}

#[test]
fn mistakes_are_told_with_place_and_mend() {
    let wrong = |from: &str, to: &str| {
        let text = String::from_utf8(MACHINES[4].1.to_vec()).unwrap();
        assert!(text.contains(from), "{from}");
        MachineSettings::load(&document(text.replacen(from, to, 1).as_bytes())).unwrap_err().to_string()
    };
    assert_eq!(
        wrong("Iommu type=\"Automatic\"", "Iommu type=\"Q\""),
        "(line 20, column 7) -- Invalid value 'Q' in Iommu/@type attribute; write one of None, Automatic, AMD, Intel"
    );
    assert!(wrong("RAMSize=\"8192\"", "RAMSize=\"lots\"").contains("line 17"));
    assert!(wrong(" RAMSize=\"8192\"", "").contains("Required Memory/@RAMSize attribute is missing"));
    assert!(wrong("slot=\"1\"", "slot=\"0\"").contains("not unique"));
    assert!(wrong("slot=\"1\"", "slot=\"36\"").contains("from 0 to 35"));
    assert!(wrong("version=\"1.19-linux\"", "").contains("VirtualBox/@version"));
    assert!(wrong("version=\"1.19-linux\"", "version=\"x\"").contains("'x'"));
    assert!(wrong("version=\"1.19-linux\"", "version=\"1.3-linux\"").contains("older than 1.7"));
}
