//! Laws of editing, held against many combinations of edits of every sample: what was set is what is read back,
//! undoing an edit brings the old settings back, and content that is not ours survives.

use settings::*;
use uuid::Uuid;

const SAMPLES: [&[u8]; 5] = [
    include_bytes!("samples/v3_1.vbox"),
    include_bytes!("samples/v4_3.vbox"),
    include_bytes!("samples/v5_2.vbox"),
    include_bytes!("samples/v6_1.vbox"),
    include_bytes!("samples/v7_0.vbox"),
];

/// A generator of numbers that are the same in every run (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn flag(&mut self) -> bool {
        self.next() & 1 == 1
    }

    fn word<T: Word>(&mut self) -> T {
        T::ALL[self.below(T::ALL.len())]
    }

    fn text(&mut self) -> String {
        const TEXTS: [&str; 7] =
            ["", "plain", "with space", "<&>\"'", "zwei\nZeilen\tund mehr", "Größe €", "/a/path with/ü.img"];
        TEXTS[self.below(TEXTS.len())].to_owned()
    }

    fn some_text(&mut self) -> String {
        format!("{}{}", self.text(), self.below(100))
    }

    fn uuid(&mut self) -> Uuid {
        Uuid::from_u64_pair(self.next() | 1, self.next())
    }
}

type Edit = fn(&mut MachineSettings, &mut Random);

/// Edits that clients make. Each leaves settings that files can express.
const EDITS: &[Edit] = &[
    |m, r| m.name = r.some_text(),
    |m, r| m.description = r.text().trim().to_owned(),
    |m, r| m.os_type = ["Debian_64", "Windows11_64", "OS2Warp4", "Unheard_of"][r.below(4)].to_owned(),
    |m, r| m.state_file = r.text(),
    |m, r| m.current_state_modified = r.flag(),
    |m, r| m.last_state_change = Some(Timestamp(r.below(1 << 31) as i64)),
    |m, r| m.aborted = r.flag(),
    |m, r| m.process_priority = r.word(),
    |m, r| m.icon = r.text(),
    |m, r| m.name_sync = r.flag(),
    |m, r| {
        m.groups = (0..r.below(3)).map(|n| format!("/g{n}")).collect();
        if m.groups.is_empty() {
            m.groups.push("/".into());
        }
    },
    |m, r| {
        let value = r.text();
        m.extra_data.insert(r.some_text(), value);
    },
    |m, r| {
        let at = r.below(3);
        if let Some(key) = m.extra_data.keys().nth(at).cloned() {
            m.extra_data.remove(&key);
        }
    },
    |m, r| {
        let medium = Medium {
            uuid: r.uuid(),
            location: r.some_text(),
            format: "VDI".into(),
            medium_type: r.word(),
            description: r.some_text(),
            ..Medium::default()
        };
        m.media_registry.hard_disks.push(medium);
    },
    |m, r| {
        let child =
            Medium { uuid: r.uuid(), location: r.some_text(), format: "VMDK".into(), ..Medium::default() };
        if let Some(disk) = m.media_registry.hard_disks.first_mut() {
            disk.children.push(child);
        }
    },
    |m, r| {
        let at = r.below(2);
        if at < m.media_registry.hard_disks.len() {
            m.media_registry.hard_disks.remove(at);
        }
    },
    |m, r| {
        let image = Medium {
            uuid: r.uuid(),
            location: r.some_text(),
            format: "RAW".into(),
            medium_type: MediumType::Readonly,
            ..Medium::default()
        };
        m.media_registry.dvd_images.push(image);
    },
    |m, r| m.hardware.uuid = r.flag().then(|| r.uuid()),
    |m, r| m.hardware.cpu.count = 1 + r.below(8) as u32,
    |m, r| m.hardware.cpu.execution_cap = 1 + r.below(100) as u32,
    |m, r| {
        m.hardware.cpu.hotplug = r.flag();
        m.hardware.cpu.plugged =
            if m.hardware.cpu.hotplug { (0..r.below(4) as u32).collect() } else { vec![] };
    },
    |m, r| m.hardware.cpu.pae = r.flag(),
    |m, r| m.hardware.cpu.hw_virt = r.flag(),
    |m, r| m.hardware.cpu.nested_paging = r.flag(),
    |m, r| m.hardware.cpu.large_pages = r.flag(),
    |m, r| m.hardware.cpu.long_mode = if r.flag() { LongMode::Enabled } else { LongMode::Disabled },
    |m, r| {
        m.hardware.cpu.x2apic = r.flag();
        m.hardware.cpu.apic = m.hardware.cpu.x2apic || r.flag();
    },
    |m, r| m.hardware.cpu.spec_ctrl = r.flag(),
    |m, r| m.hardware.cpu.mds_clear_on_sched = r.flag(),
    |m, r| m.hardware.cpu.nested_hw_virt = r.flag(),
    |m, r| {
        m.hardware.cpu.cpuid_leaves.push(CpuIdLeaf {
            index: r.below(1 << 30) as u32,
            eax: u32::MAX,
            ..CpuIdLeaf::default()
        })
    },
    |m, r| m.hardware.memory.ram_mb = 4 + r.below(1 << 20) as u32,
    |m, r| m.hardware.firmware = r.word(),
    |m, r| m.hardware.pointing_hid = r.word(),
    |m, r| m.hardware.hpet = r.flag(),
    |m, r| m.hardware.paravirt_provider = r.word(),
    |m, r| m.hardware.iommu = r.word(),
    |m, r| m.hardware.boot_order = [r.word(), r.word(), r.word(), r.word()],
    |m, r| m.hardware.display.controller = r.word(),
    |m, r| m.hardware.display.vram_mb = r.below(257) as u32,
    |m, r| m.hardware.display.accelerate_3d = r.flag(),
    |m, r| m.hardware.remote_display.enabled = r.flag(),
    |m, r| {
        let value = r.some_text();
        m.hardware.remote_display.properties.insert("TCP/Ports".into(), value);
    },
    |m, r| m.hardware.remote_display.auth_type = r.word(),
    |m, r| m.hardware.bios.acpi = r.flag(),
    |m, r| m.hardware.bios.ioapic = r.flag(),
    |m, r| m.hardware.bios.logo_display_time = r.below(3) as u32 * 1000,
    |m, r| m.hardware.bios.boot_menu_mode = r.word(),
    |m, r| m.hardware.bios.time_offset = r.below(2000) as i64 - 1000,
    |m, r| m.hardware.nvram.path = r.text(),
    |m, r| m.hardware.tpm.tpm_type = r.word(),
    |m, r| {
        let controller_type = r.word();
        m.hardware.usb.controllers.push(UsbController { name: r.some_text(), controller_type });
    },
    |m, _| m.hardware.usb.controllers.clear(),
    |m, r| {
        m.hardware.usb.device_filters.push(UsbDeviceFilter {
            name: r.text(),
            active: r.flag(),
            ..UsbDeviceFilter::default()
        })
    },
    |m, _| {
        m.hardware.usb.device_filters.pop();
    },
    |m, r| {
        let slot = r.below(8);
        let adapter = &mut m.hardware.network[slot];
        adapter.enabled = r.flag();
        adapter.mac_address = "080027012345".into();
        adapter.attachment = r.word();
        adapter.adapter_type = r.word();
        adapter.cable_connected = r.flag();
    },
    |m, r| {
        let slot = r.below(4);
        let adapter = &mut m.hardware.network[slot];
        adapter.mac_address = "080027543210".into();
        adapter.bridged_interface = r.text();
        adapter.internal_network = r.text();
        adapter.generic_driver = r.text();
        adapter.nat_network = r.text();
    },
    |m, r| {
        let slot = r.below(4);
        let adapter = &mut m.hardware.network[slot];
        adapter.mac_address = "080027999999".into();
        adapter.attachment = NetworkAttachment::Nat;
        adapter.nat.localhost_reachable = r.flag();
        adapter.nat.dns_proxy = r.flag();
        adapter.nat.mtu = r.below(9000) as u32;
        let rule = NatRule {
            name: format!("zz{}", adapter.nat.rules.len()),
            protocol: r.word(),
            host_port: 1 + r.below(65535) as u16,
            guest_port: 22,
            ..NatRule::default()
        };
        adapter.nat.rules.push(rule);
    },
    |m, r| {
        let slot = r.below(4);
        let port = &mut m.hardware.serial_ports[slot];
        *port = SerialPort::new(slot as u32);
        port.enabled = r.flag();
        port.mode = r.word();
        if port.mode != PortMode::Disconnected {
            port.path = r.some_text();
        }
        port.uart_type = r.word();
    },
    |m, r| m.hardware.parallel_ports[1].enabled = r.flag(),
    |m, r| {
        m.hardware.audio.controller = r.word();
        m.hardware.audio.codec = m.hardware.audio.controller.default_codec();
    },
    |m, r| m.hardware.audio.driver = r.word(),
    |m, r| m.hardware.audio.enabled_out = r.flag(),
    |m, r| m.hardware.rtc_use_utc = r.flag(),
    |m, r| {
        m.hardware.shared_folders.push(SharedFolder {
            name: r.some_text(),
            host_path: r.some_text(),
            writable: r.flag(),
            ..SharedFolder::default()
        });
    },
    |m, _| m.hardware.shared_folders.reverse(),
    |m, r| m.hardware.clipboard_mode = r.word(),
    |m, r| m.hardware.drag_and_drop_mode = r.word(),
    |m, r| m.hardware.io_cache.size_mb = r.below(64) as u32,
    |m, r| {
        let name = r.some_text();
        let group_type = r.word();
        m.hardware.bandwidth_groups.push(BandwidthGroup {
            name,
            group_type,
            max_bytes_per_sec: r.next() >> 20,
        });
    },
    |m, r| m.hardware.default_frontend = r.text(),
    |m, r| m.hardware.memory_balloon_mb = r.below(3) as u32 * 64,
    |m, r| {
        let property =
            GuestProperty { name: r.some_text(), value: r.text(), timestamp: r.next(), flags: String::new() };
        m.hardware.guest_properties.push(property);
    },
    |m, r| {
        let bus = r.word();
        let name = r.some_text();
        if m.hardware.storage_controller(&name).is_none() {
            m.hardware.storage_controllers.push(StorageController::new(&name, bus));
        }
    },
    |m, r| {
        let device = AttachedDevice {
            drive: DriveType::Dvd,
            port: 1 + r.below(3) as i32,
            pass_through: r.flag(),
            image: r.flag().then(|| r.uuid()),
            ..AttachedDevice::default()
        };
        if let Some(controller) = m.hardware.storage_controllers.first_mut() {
            controller.attached.retain(|d| d.port != device.port);
            controller.attached.push(device);
        }
    },
    |m, r| {
        let at = r.below(2);
        if at < m.hardware.storage_controllers.len() {
            m.hardware.storage_controllers.remove(at);
        }
    },
    |m, r| {
        let mut hardware = Box::new(m.hardware.clone());
        hardware.memory.ram_mb = r.below(4096) as u32;
        let snapshot = Snapshot {
            uuid: r.uuid(),
            name: r.some_text(),
            timestamp: Timestamp(1_600_000_000),
            hardware,
            ..Snapshot::default()
        };
        m.current_snapshot = Some(snapshot.uuid);
        match &mut m.snapshot {
            Some(first) => first.children.push(snapshot),
            none => *none = Some(Box::new(snapshot)),
        }
    },
    |m, _| {
        m.snapshot = None;
        m.current_snapshot = None;
    },
    |m, r| m.autostart.delay = r.below(3) as u32,
    |m, r| m.debugging.tracing_enabled = r.flag(),
    |m, r| m.recording.enabled = r.flag(),
    |m, r| m.recording.screens[0].file = r.text(),
];

fn read(text: &str) -> MachineSettings {
    MachineSettings::load(&Document::parse(text.as_bytes()).unwrap())
        .unwrap_or_else(|e| panic!("{e}\n{text}"))
        .0
}

/// Takes out what means the same in any form: cards that are not there, and whether their NAT engine, which is
/// not there either, would reach the host.
fn comparable(mut settings: MachineSettings) -> MachineSettings {
    fn tidy(hardware: &mut Hardware) {
        hardware
            .network
            .retain(|n| n.enabled || !n.mac_address.is_empty() || n.attachment != NetworkAttachment::Null);
        for adapter in &mut hardware.network {
            adapter.nat.rules.sort_by(|a, b| a.name.cmp(&b.name));
        }
    }
    tidy(&mut settings.hardware);
    let mut snapshots: Vec<&mut Snapshot> = settings.snapshot.as_deref_mut().into_iter().collect();
    while let Some(snapshot) = snapshots.pop() {
        tidy(&mut snapshot.hardware);
        snapshots.extend(&mut snapshot.children);
    }
    settings
}

#[test]
fn every_edit_alone_is_read_back_and_can_be_undone() {
    for (sample, bytes) in SAMPLES.iter().enumerate() {
        for (number, edit) in EDITS.iter().enumerate() {
            let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ number as u64);
            let mut document = Document::parse(bytes).unwrap();
            let original = MachineSettings::load(&document).unwrap().0;
            let mut settings = original.clone();
            edit(&mut settings, &mut random);
            settings.apply(&mut document).unwrap();
            let text = document.to_text();
            assert_eq!(
                comparable(read(&text)),
                comparable(settings),
                "edit {number} of sample {sample}\n{text}"
            );

            original.apply(&mut document).unwrap();
            let text = document.to_text();
            assert_eq!(
                comparable(read(&text)),
                comparable(original),
                "undone edit {number} of {sample}\n{text}"
            );
        }
    }
}

#[test]
fn any_edits_one_after_another_are_read_back_and_leave_what_is_not_ours() {
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..150 {
        let bytes = SAMPLES[round % SAMPLES.len()];
        let mut document = Document::parse(bytes).unwrap();
        for _ in 0..4 {
            let mut settings = MachineSettings::load(&document).unwrap().0;
            for _ in 0..random.below(12) {
                EDITS[random.below(EDITS.len())](&mut settings, &mut random);
            }
            settings.apply(&mut document).unwrap();
            let text = document.to_text();
            assert_eq!(comparable(read(&text)), comparable(settings), "round {round}\n{text}");
            document = Document::parse(text.as_bytes()).unwrap();
        }
        let text = document.to_text();
        for kept in [
            "vendorAttribute=\"kept\"",
            "<VendorBios",
            "<Unknown><Nested",
            "<FutureFlag",
            "<VendorSection",
            "<!--",
        ] {
            if std::str::from_utf8(bytes).unwrap().contains(kept) {
                assert!(text.contains(kept), "{kept} in round {round}\n{text}");
            }
        }
    }
}

#[test]
fn applying_what_was_read_changes_nothing_after_any_edits() {
    let mut random = Random(0xfeed_beef_cafe_0001);
    for round in 0..100 {
        let mut document = Document::parse(SAMPLES[round % SAMPLES.len()]).unwrap();
        let mut settings = MachineSettings::load(&document).unwrap().0;
        for _ in 0..10 {
            EDITS[random.below(EDITS.len())](&mut settings, &mut random);
        }
        settings.apply(&mut document).unwrap();
        let text = document.to_text();
        let mut again = Document::parse(text.as_bytes()).unwrap();
        let applied = read(&text).apply(&mut again).unwrap();
        assert!(!applied.changed && again.to_text() == text, "round {round}");
    }
}

#[test]
fn deep_snapshots_and_media_fit_a_small_stack() {
    let work = || {
        let mut document = Document::parse(SAMPLES[4]).unwrap();
        let mut settings = MachineSettings::load(&document).unwrap().0;
        let mut random = Random(7);
        let mut snapshot = Snapshot { uuid: random.uuid(), name: "leaf".into(), ..Snapshot::default() };
        settings.current_snapshot = Some(snapshot.uuid);
        for depth in 1..250 {
            let children = vec![snapshot];
            snapshot = Snapshot {
                uuid: random.uuid(),
                name: format!("at {depth}"),
                children,
                ..Snapshot::default()
            };
        }
        settings.snapshot = Some(Box::new(snapshot));
        let mut medium = Medium {
            uuid: random.uuid(),
            format: "VDI".into(),
            location: "leaf".into(),
            ..Medium::default()
        };
        for _ in 1..300 {
            let children = vec![medium];
            medium = Medium {
                uuid: random.uuid(),
                format: "VDI".into(),
                location: "x".into(),
                children,
                ..Medium::default()
            };
        }
        settings.media_registry.hard_disks.push(medium);
        settings.apply(&mut document).unwrap();
        let read_back = read(&document.to_text());
        assert_eq!(read_back.snapshot, settings.snapshot);

        let deeper = Snapshot {
            uuid: random.uuid(),
            children: vec![*settings.snapshot.take().unwrap()],
            ..Snapshot::default()
        };
        settings.snapshot = Some(Box::new(deeper));
        assert!(
            settings.apply(&mut document).unwrap_err().to_string().contains("snapshot tree depth of 250")
        );
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(work).unwrap().join().unwrap();
}

#[test]
fn values_that_xml_cannot_hold_are_refused_and_the_document_stays() {
    let mut document = Document::parse(SAMPLES[4]).unwrap();
    let mut settings = MachineSettings::load(&document).unwrap().0;
    settings.name = "bell\u{7}".into();
    let error = settings.apply(&mut document).unwrap_err().to_string();
    assert!(error.contains("Machine/@name") && error.contains("U+0007"), "{error}");
    assert_eq!(document.to_text().as_bytes(), SAMPLES[4]);
}

#[test]
fn edits_of_long_lists_take_time_in_proportion() {
    let mut random = Random(99);
    let mut global = GlobalSettings::fresh();
    let mut document = global.to_document().unwrap();
    let mut entries = |count: usize| -> Vec<MachineEntry> {
        (0..count).map(|_| MachineEntry { uuid: random.uuid(), settings_file: "/vm/x.vbox".into() }).collect()
    };
    global.machines = entries(6000);
    let start = std::time::Instant::now();
    global.apply(&mut document).unwrap();
    let kept: Vec<_> = global.machines.drain(..).step_by(2).collect();
    global.machines = kept;
    global.apply(&mut document).unwrap();
    global.machines.splice(1000..2000, entries(500));
    global.apply(&mut document).unwrap();
    let spent = start.elapsed();
    assert_eq!(GlobalSettings::load(&document).unwrap().0, global);
    assert!(spent.as_secs() < 20, "{spent:?}");
}

#[test]
fn virtualbox_finds_its_own_virtio_controller_where_virtio_blk_is_stored() {
    let mut document = Document::parse(SAMPLES[4]).unwrap();
    let mut settings = MachineSettings::load(&document).unwrap().0;
    settings.hardware.storage_controllers.push(StorageController::new("Fast", StorageBus::VirtioBlk));
    settings.apply(&mut document).unwrap();
    let text = document.to_text();
    let line = text.lines().find(|line| line.contains("name=\"Fast\"")).unwrap();
    assert!(line.contains("type=\"VirtioSCSI\"") && line.contains("model=\"VirtioBlk\""), "{line}");
    assert_eq!(read(&text).hardware.storage_controller("Fast").unwrap().bus(), StorageBus::VirtioBlk);
    // As VirtualBox writes the file when it has been at it.
    let theirs = text.replace(" model=\"VirtioBlk\"", "");
    assert_eq!(read(&theirs).hardware.storage_controller("Fast").unwrap().bus(), StorageBus::VirtioScsi);
}
