use super::*;
use crate::print::golden;

fn plain() -> VmInfo {
    VmInfo {
        name: "Debian".into(),
        groups: vec!["/".into()],
        os: "Debian (64-bit)".into(),
        id: "6f2cf5d8-1c7a-4b9b-8a0e-2d2f4a1f1c11".into(),
        settings_file: "/vms/Debian/Debian.vbox".into(),
        snapshot_folder: "/vms/Debian/Snapshots".into(),
        log_folder: "/vms/Debian/Logs".into(),
        hardware_uuid: "6f2cf5d8-1c7a-4b9b-8a0e-2d2f4a1f1c11".into(),
        memory: 1024,
        page_fusion: false,
        graphics: Graphics {
            controller: GraphicsControllerType::VMSVGA,
            vram: 16,
            monitors: 1,
            accelerate_3d: false,
            accelerate_2d_video: false,
        },
        cpu: Cpu {
            count: 1,
            execution_cap: 100,
            profile: "host".into(),
            pae: false,
            long_mode: true,
            triple_fault_reset: false,
            apic: true,
            x2apic: true,
            nested_hw_virt: false,
            portability_level: 0,
            overrides: Vec::new(),
        },
        hpet: false,
        chipset: ChipsetType::PIIX3,
        firmware: FirmwareType::BIOS,
        bios: Bios {
            boot_menu: BIOSBootMenuMode::MessageAndMenu,
            acpi: true,
            ioapic: true,
            apic: APICMode::APIC,
            time_offset: 0,
            nvram_file: "/vms/Debian/Debian.nvram".into(),
        },
        boot_order: vec![DeviceType::Floppy, DeviceType::DVD, DeviceType::HardDisk, DeviceType::Null],
        rtc_utc: true,
        hw_virt: HwVirt {
            enabled: true,
            nested_paging: true,
            large_pages: false,
            vpid: true,
            unrestricted: true,
            virt_vmsave: true,
        },
        iommu: IommuType::None,
        paravirt: ParavirtProvider::Default,
        effective_paravirt: ParavirtProvider::KVM,
        paravirt_debug: String::new(),
        state: MachineState::PoweredOff,
        state_since: 1_700_000_000_123,
        state_file: String::new(),
        teleporter: Teleporter { enabled: false, port: 0, address: String::new(), password: String::new() },
        tracing: Tracing { enabled: false, allow_vm_access: false, config: String::new() },
        autostart_enabled: false,
        autostart_delay: 0,
        default_frontend: String::new(),
        priority: VMProcPriority::Default,
        controllers: Vec::new(),
        nics: vec![None; 8],
        pointing: PointingHIDType::PS2Mouse,
        keyboard: KeyboardHIDType::PS2Keyboard,
        uarts: vec![None; 4],
        lpts: vec![None; 2],
        audio: Audio {
            enabled: false,
            driver: AudioDriverType::Default,
            controller: AudioControllerType::AC97,
            codec: AudioCodecType::STAC9700,
            output: false,
            input: false,
        },
        clipboard: ClipboardMode::Disabled,
        drag_and_drop: DnDMode::Disabled,
        session_name: String::new(),
        online: false,
        video_mode: None,
        vrde: None,
        usb_controllers: Vec::new(),
        usb_filters: Vec::new(),
        bandwidth_groups: Vec::new(),
        shared_folders: Vec::new(),
        recording: Recording {
            enabled: false,
            screens: vec![RecordingScreen {
                enabled: true,
                id: 0,
                file: "/vms/Debian/Debian-screen0.webm".into(),
                options: String::new(),
                width: 1024,
                height: 768,
                rate: 512,
                fps: 25,
            }],
        },
        description: String::new(),
        snapshots: None,
        memory_balloon: 0,
    }
}

fn attachment(port: i32, device: i32, kind: DeviceType, medium: Option<&str>) -> Attachment {
    Attachment {
        port,
        device,
        kind,
        medium: medium.map(|file| (file.to_owned(), "11111111-2222-4333-8444-555555555555".to_owned())),
        passthrough: false,
        temp_eject: false,
        ejected: false,
        hot_pluggable: false,
        non_rotational: false,
        discard: false,
    }
}

fn nic(attachment: NetworkAttachmentType, attached_to: &str) -> Nic {
    Nic {
        mac: "0800273F1A2B".into(),
        attachment,
        attached_to: attached_to.into(),
        generic_properties: Vec::new(),
        nat: None,
        cable_connected: true,
        trace: false,
        trace_file: String::new(),
        kind: NetworkAdapterType::I82540EM,
        line_speed: 0,
        boot_priority: 0,
        promisc: NetworkAdapterPromiscModePolicy::Deny,
        bandwidth_group: String::new(),
    }
}

/// A machine with something in every part.
fn full() -> VmInfo {
    let mut info = plain();
    info.name = "a \"quoted\" \\ name".into();
    info.groups = vec!["/a".into(), "/b/c".into()];
    info.state = MachineState::Running;
    info.session_name = "headless".into();
    info.online = true;
    info.video_mode = Some(VideoMode {
        width: 720,
        height: 400,
        bits_per_pixel: 0,
        origin: (0, 0),
        status: GuestMonitorStatus::Enabled,
    });
    info.state_file = "/vms/x.sav".into();
    info.cpu.overrides = vec![[0x8000_0002, u32::MAX, 1, 2, 3, 4]];
    info.bios.time_offset = -3_600_000;
    info.paravirt_debug = "enabled=1".into();
    info.controllers = vec![
        Controller {
            name: "IDE".into(),
            kind: StorageControllerType::PIIX4,
            instance: 0,
            max_ports: 2,
            ports: 2,
            devices_per_port: 2,
            bootable: true,
            attachments: vec![
                attachment(0, 0, DeviceType::HardDisk, Some("/vms/d.vdi")),
                attachment(1, 0, DeviceType::DVD, None),
                attachment(1, 1, DeviceType::DVD, Some("/iso/a.iso")),
            ],
        },
        Controller {
            name: "SATA".into(),
            kind: StorageControllerType::IntelAhci,
            instance: 0,
            max_ports: 30,
            ports: 1,
            devices_per_port: 1,
            bootable: false,
            attachments: vec![Attachment {
                hot_pluggable: true,
                non_rotational: true,
                discard: true,
                ..attachment(0, 0, DeviceType::HardDisk, Some("/vms/e.vdi"))
            }],
        },
    ];
    let nat = Nat {
        settings: [0, 128, 0, 0, 0],
        redirects: vec!["ssh,1,127.0.0.1,2222,,22".into(), "tftp,0,,69,10.0.2.15,69".into()],
    };
    info.nics = vec![
        Some(Nic { nat: Some(nat), ..nic(NetworkAttachmentType::NAT, "") }),
        Some(nic(NetworkAttachmentType::Bridged, "eth0")),
        Some(nic(NetworkAttachmentType::Internal, "intnet")),
        Some(nic(NetworkAttachmentType::HostOnly, "vboxnet0")),
        Some(Nic {
            generic_properties: vec![("dest".into(), "10.0.0.1".into()), ("dport".into(), "1".into())],
            ..nic(NetworkAttachmentType::Generic, "UDPTunnel")
        }),
        Some(nic(NetworkAttachmentType::NATNetwork, "NatNetwork")),
        Some(nic(NetworkAttachmentType::Null, "")),
        None,
    ];
    let uart = |mode, server, path: &str| {
        Some(Uart { io_base: 0x3f8, irq: 4, mode, server, path: path.into(), kind: UartType::U16550A })
    };
    info.uarts = vec![
        uart(PortMode::RawFile, false, "/tmp/f"),
        uart(PortMode::HostPipe, true, "/tmp/p"),
        uart(PortMode::TCP, false, "h:1"),
        uart(PortMode::Disconnected, false, ""),
    ];
    info.lpts = vec![Some(Lpt { io_base: 0x378, irq: 7, path: "/dev/parport0".into() }), None];
    info.audio.enabled = true;
    info.vrde = Some(Vrde {
        ports: "5900-5910".into(),
        address: String::new(),
        auth: AuthType::Null,
        multi_connection: false,
        reuse_connection: true,
        video_channel: true,
        video_channel_quality: "75".into(),
        properties: vec![("TCP/Ports".into(), "5900-5910".into()), ("Security/Method".into(), String::new())],
    });
    info.usb_controllers = vec![USBControllerType::OHCI, USBControllerType::EHCI];
    info.usb_filters = vec![UsbFilter {
        active: true,
        name: "stick".into(),
        vendor_id: "abcd".into(),
        product_id: String::new(),
        revision: String::new(),
        manufacturer: String::new(),
        product: String::new(),
        remote: "0".into(),
        serial_number: String::new(),
        masked_interfaces: 1,
    }];
    let group = |name: &str, kind, max_bytes_per_second| BandwidthGroup {
        name: name.into(),
        kind,
        max_bytes_per_second,
    };
    info.bandwidth_groups = vec![
        group("d", BandwidthGroupType::Disk, 20 << 20),
        group("n", BandwidthGroupType::Network, 12_500_000),
        group("o", BandwidthGroupType::Network, 0),
    ];
    info.shared_folders = vec![SharedFolder {
        name: "vagrant".into(),
        host_path: "/home/u/box".into(),
        writable: true,
        auto_mount: true,
        auto_mount_point: "/vagrant".into(),
    }];
    info.description = "two\nlines".into();
    let leaf = |name: &str, current| Snapshot {
        name: name.into(),
        id: "99999999-2222-4333-8444-555555555555".into(),
        description: String::new(),
        current,
        children: Vec::new(),
    };
    info.snapshots = Some(Snapshot {
        description: "the first".into(),
        children: vec![leaf("b", false), leaf("c", true)],
        ..leaf("a", false)
    });
    info
}

#[test]
fn a_new_machine_prints_as_virtualboxs() {
    let vm = Vm::Accessible(Box::new(plain()));
    golden("showvminfo-plain.txt", &show(&vm, Form::Human));
    golden("showvminfo-plain-machinereadable.txt", &show(&vm, Form::Machine));
    assert_eq!(compact(&vm), "\"Debian\" {6f2cf5d8-1c7a-4b9b-8a0e-2d2f4a1f1c11}\n");
}

#[test]
fn a_machine_with_everything_prints_as_virtualboxs() {
    let vm = Vm::Accessible(Box::new(full()));
    golden("showvminfo-full.txt", &show(&vm, Form::Human));
    golden("showvminfo-full-machinereadable.txt", &show(&vm, Form::Machine));
}

#[test]
fn an_inaccessible_machine_says_why() {
    let vm = Vm::Inaccessible {
        id: "6f2cf5d8-1c7a-4b9b-8a0e-2d2f4a1f1c11".into(),
        settings_file: "/vms/gone.vbox".into(),
        error: "Could not open the settings file".into(),
        details: "code VBOX_E_FILE_ERROR (0x80bb0004), component MachineWrap, interface IMachine".into(),
    };
    golden("showvminfo-inaccessible.txt", &show(&vm, Form::Human));
    assert_eq!(
        show(&vm, Form::Machine),
        "name=\"<inaccessible>\"\nUUID=\"6f2cf5d8-1c7a-4b9b-8a0e-2d2f4a1f1c11\"\n"
    );
    assert_eq!(compact(&vm), "\"<inaccessible>\" {6f2cf5d8-1c7a-4b9b-8a0e-2d2f4a1f1c11}\n");
}

#[test]
fn lines_that_clients_split_at_the_colon_do_not_start_with_name_by_accident() {
    // Ansible takes a line that starts with "Name" and has no comma for the next machine.
    let text = show(&Vm::Accessible(Box::new(full())), Form::Human);
    let names = text.lines().filter(|line| line.starts_with("Name") && !line.contains(','));
    assert_eq!(names.count(), 1);
}

#[test]
fn forwardings_stand_between_their_nic_and_the_next() {
    let text = show(&Vm::Accessible(Box::new(full())), Form::Machine);
    let at = |needle: &str| text.lines().position(|line| line.starts_with(needle)).unwrap();
    assert!(at("nic1=") < at("Forwarding(0)") && at("Forwarding(1)") < at("bridgeadapter2"));
    assert!(text.contains("Forwarding(0)=\"ssh,tcp,127.0.0.1,2222,,22\"\n"));
}
