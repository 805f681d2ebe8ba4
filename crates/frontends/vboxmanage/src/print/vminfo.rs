//! `showvminfo`: everything about a machine, in VirtualBox 7.0's order and wording.

use main_api::enums::*;

use super::fmt::{Form, Page, grouped, timestamp};

/// A machine, as far as `showvminfo` and `list vms` tell of it.
#[derive(Clone, Debug)]
pub enum Vm {
    Accessible(Box<VmInfo>),
    Inaccessible { id: String, settings_file: String, error: String, details: String },
}

#[derive(Clone, Debug)]
pub struct VmInfo {
    pub name: String,
    pub groups: Vec<String>,
    /// The description of the guest's operating system, or its id if that is not known.
    pub os: String,
    pub id: String,
    pub settings_file: String,
    pub snapshot_folder: String,
    pub log_folder: String,
    pub hardware_uuid: String,
    pub memory: u32,
    pub page_fusion: bool,
    pub graphics: Graphics,
    pub cpu: Cpu,
    pub hpet: bool,
    pub chipset: ChipsetType,
    pub firmware: FirmwareType,
    pub bios: Bios,
    pub boot_order: Vec<DeviceType>,
    pub rtc_utc: bool,
    pub hw_virt: HwVirt,
    pub iommu: IommuType,
    pub paravirt: ParavirtProvider,
    pub effective_paravirt: ParavirtProvider,
    pub paravirt_debug: String,
    pub state: MachineState,
    /// Milliseconds since 1970 in UTC.
    pub state_since: i64,
    pub state_file: String,
    pub teleporter: Teleporter,
    pub tracing: Tracing,
    pub autostart_enabled: bool,
    pub autostart_delay: u32,
    pub default_frontend: String,
    pub priority: VMProcPriority,
    pub controllers: Vec<Controller>,
    pub nics: Vec<Option<Nic>>,
    pub pointing: PointingHIDType,
    pub keyboard: KeyboardHIDType,
    pub uarts: Vec<Option<Uart>>,
    pub lpts: Vec<Option<Lpt>>,
    pub audio: Audio,
    pub clipboard: ClipboardMode,
    pub drag_and_drop: DnDMode,
    /// Empty without a session.
    pub session_name: String,
    /// Whether a VM process serves a console.
    pub online: bool,
    pub video_mode: Option<VideoMode>,
    pub vrde: Option<Vrde>,
    pub usb_controllers: Vec<USBControllerType>,
    pub usb_filters: Vec<UsbFilter>,
    pub bandwidth_groups: Vec<BandwidthGroup>,
    pub shared_folders: Vec<SharedFolder>,
    pub recording: Recording,
    pub description: String,
    pub snapshots: Option<Snapshot>,
    pub memory_balloon: u32,
}

#[derive(Clone, Debug)]
pub struct Graphics {
    pub controller: GraphicsControllerType,
    pub vram: u32,
    pub monitors: u32,
    pub accelerate_3d: bool,
    pub accelerate_2d_video: bool,
}

#[derive(Clone, Debug)]
pub struct Cpu {
    pub count: u32,
    pub execution_cap: u32,
    pub profile: String,
    pub pae: bool,
    pub long_mode: bool,
    pub triple_fault_reset: bool,
    pub apic: bool,
    pub x2apic: bool,
    pub nested_hw_virt: bool,
    pub portability_level: u32,
    /// Leaf, sub-leaf, eax, ebx, ecx, edx.
    pub overrides: Vec<[u32; 6]>,
}

#[derive(Clone, Debug)]
pub struct Bios {
    pub boot_menu: BIOSBootMenuMode,
    pub acpi: bool,
    pub ioapic: bool,
    pub apic: APICMode,
    pub time_offset: i64,
    pub nvram_file: String,
}

#[derive(Clone, Debug)]
pub struct HwVirt {
    pub enabled: bool,
    pub nested_paging: bool,
    pub large_pages: bool,
    pub vpid: bool,
    pub unrestricted: bool,
    pub virt_vmsave: bool,
}

#[derive(Clone, Debug)]
pub struct Teleporter {
    pub enabled: bool,
    pub port: u32,
    pub address: String,
    pub password: String,
}

#[derive(Clone, Debug)]
pub struct Tracing {
    pub enabled: bool,
    pub allow_vm_access: bool,
    pub config: String,
}

#[derive(Clone, Debug)]
pub struct Controller {
    pub name: String,
    pub kind: StorageControllerType,
    pub instance: u32,
    pub max_ports: u32,
    pub ports: u32,
    pub devices_per_port: u32,
    pub bootable: bool,
    pub attachments: Vec<Attachment>,
}

#[derive(Clone, Debug)]
pub struct Attachment {
    pub port: i32,
    pub device: i32,
    pub kind: DeviceType,
    /// Location and UUID; `None` for an empty drive.
    pub medium: Option<(String, String)>,
    pub passthrough: bool,
    pub temp_eject: bool,
    pub ejected: bool,
    pub hot_pluggable: bool,
    pub non_rotational: bool,
    pub discard: bool,
}

#[derive(Clone, Debug)]
pub struct Nic {
    pub mac: String,
    pub attachment: NetworkAttachmentType,
    /// The interface, network or driver that the attachment names.
    pub attached_to: String,
    pub generic_properties: Vec<(String, String)>,
    pub nat: Option<Nat>,
    pub cable_connected: bool,
    pub trace: bool,
    pub trace_file: String,
    pub kind: NetworkAdapterType,
    pub line_speed: u32,
    pub boot_priority: u32,
    pub promisc: NetworkAdapterPromiscModePolicy,
    pub bandwidth_group: String,
}

#[derive(Clone, Debug)]
pub struct Nat {
    /// MTU, socket send and receive buffers, TCP send and receive windows; 0 for the default.
    pub settings: [u32; 5],
    /// As the Main API has them: `name,protocol,host ip,host port,guest ip,guest port`.
    pub redirects: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Uart {
    pub io_base: u32,
    pub irq: u32,
    pub mode: PortMode,
    pub server: bool,
    pub path: String,
    pub kind: UartType,
}

#[derive(Clone, Debug)]
pub struct Lpt {
    pub io_base: u32,
    pub irq: u32,
    pub path: String,
}

#[derive(Clone, Debug)]
pub struct Audio {
    pub enabled: bool,
    pub driver: AudioDriverType,
    pub controller: AudioControllerType,
    pub codec: AudioCodecType,
    pub output: bool,
    pub input: bool,
}

#[derive(Clone, Debug)]
pub struct VideoMode {
    pub width: u32,
    pub height: u32,
    pub bits_per_pixel: u32,
    pub origin: (i32, i32),
    pub status: GuestMonitorStatus,
}

#[derive(Clone, Debug)]
pub struct Vrde {
    pub ports: String,
    pub address: String,
    pub auth: AuthType,
    pub multi_connection: bool,
    pub reuse_connection: bool,
    pub video_channel: bool,
    pub video_channel_quality: String,
    pub properties: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
pub struct UsbFilter {
    pub active: bool,
    pub name: String,
    pub vendor_id: String,
    pub product_id: String,
    pub revision: String,
    pub manufacturer: String,
    pub product: String,
    pub remote: String,
    pub serial_number: String,
    pub masked_interfaces: u32,
}

#[derive(Clone, Debug)]
pub struct BandwidthGroup {
    pub name: String,
    pub kind: BandwidthGroupType,
    pub max_bytes_per_second: i64,
}

#[derive(Clone, Debug)]
pub struct SharedFolder {
    pub name: String,
    pub host_path: String,
    pub writable: bool,
    pub auto_mount: bool,
    pub auto_mount_point: String,
}

#[derive(Clone, Debug)]
pub struct Recording {
    pub enabled: bool,
    pub screens: Vec<RecordingScreen>,
}

#[derive(Clone, Debug)]
pub struct RecordingScreen {
    pub enabled: bool,
    pub id: u32,
    pub file: String,
    pub options: String,
    pub width: u32,
    pub height: u32,
    pub rate: u32,
    pub fps: u32,
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    pub name: String,
    pub id: String,
    pub description: String,
    pub current: bool,
    pub children: Vec<Snapshot>,
}

/// The line of `list vms`.
pub fn compact(vm: &Vm) -> String {
    match vm {
        Vm::Accessible(info) => compact_line(&info.name, &info.id),
        Vm::Inaccessible { id, .. } => compact_line("<inaccessible>", id),
    }
}

/// [`compact`] of a name and an id.
pub fn compact_line(name: &str, id: &str) -> String {
    format!("\"{name}\" {{{id}}}\n")
}

/// Everything about a machine.
pub fn show(vm: &Vm, form: Form) -> String {
    let mut page = Page::new(form);
    match vm {
        Vm::Accessible(info) => Writer { page: &mut page, info }.all(),
        Vm::Inaccessible { id, settings_file, error, details } if form == Form::Human => {
            page.line("Name:            <inaccessible!>");
            page.line(format!("UUID:            {id}"));
            page.line(format!("Config file:     {settings_file}"));
            page.line("Encryption:     disabled");
            page.line("Access error details:");
            page.line(error.trim_end());
            page.line(format!("Details: {details}"));
            page.line("");
        }
        Vm::Inaccessible { id, .. } => {
            page.line("name=\"<inaccessible>\"");
            page.quoted("UUID", id);
        }
    }
    page.text
}

/// The long name of a machine state.
pub fn state_name(state: MachineState) -> &'static str {
    use MachineState as S;
    match state {
        S::PoweredOff => "powered off",
        S::Stuck => "guru meditation",
        S::LiveSnapshotting => "live snapshotting",
        S::TeleportingPausedVM => "teleporting paused vm",
        S::TeleportingIn => "teleporting (incoming)",
        S::DeletingSnapshotOnline => "deleting snapshot live",
        S::DeletingSnapshotPaused => "deleting snapshot live paused",
        S::OnlineSnapshotting => "online snapshotting",
        S::RestoringSnapshot => "restoring snapshot",
        S::DeletingSnapshot => "deleting snapshot",
        S::SettingUp => "setting up",
        S::Snapshotting => "offline snapshotting",
        other => other.word(),
    }
}

fn controller_name(kind: StorageControllerType) -> &'static str {
    match kind {
        StorageControllerType::Null => "unknown",
        other => other.name(),
    }
}

fn paravirt_name(provider: ParavirtProvider) -> (&'static str, &'static str) {
    match provider {
        ParavirtProvider::None => ("none", "None"),
        ParavirtProvider::Default => ("default", "Default"),
        ParavirtProvider::Legacy => ("legacy", "Legacy"),
        ParavirtProvider::Minimal => ("minimal", "Minimal"),
        ParavirtProvider::HyperV => ("hyperv", "HyperV"),
        ParavirtProvider::KVM => ("kvm", "KVM"),
    }
}

/// The name of a network card's type, as `--nictype` takes it.
fn nic_type_name(kind: NetworkAdapterType) -> &'static str {
    use NetworkAdapterType as T;
    match kind {
        T::I82540EM => "82540EM",
        T::I82543GC => "82543GC",
        T::I82545EM => "82545EM",
        T::Virtio => "virtio",
        T::ELNK2 => "3C503",
        T::ELNK1 => "3C501",
        T::Null => "unknown",
        other => other.name(),
    }
}

struct Writer<'a> {
    page: &'a mut Page,
    info: &'a VmInfo,
}

impl Writer<'_> {
    fn all(&mut self) {
        self.general();
        self.processor();
        self.firmware();
        self.virtualization();
        self.state();
        self.services();
        self.storage();
        self.network();
        self.input();
        self.ports();
        self.sound();
        self.sharing();
        self.vrde();
        self.usb();
        self.bandwidth();
        self.folders();
        self.recording();
        self.tail();
    }

    fn general(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        page.string("name", "Name:", &info.name);
        page.string("encryption", "Encryption:", "disabled");
        page.string("groups", "Groups:", &info.groups.join(","));
        page.string("ostype", "Guest OS:", &info.os);
        page.string("UUID", "UUID:", &info.id);
        page.string("CfgFile", "Config file:", &info.settings_file);
        page.string("SnapFldr", "Snapshot folder:", &info.snapshot_folder);
        page.string("LogFldr", "Log folder:", &info.log_folder);
        page.string("hardwareuuid", "Hardware UUID:", &info.hardware_uuid);
        page.number("memory", "Memory size:", info.memory, "MB");
        page.switch("pagefusion", "Page Fusion:", info.page_fusion);
        page.number("vram", "VRAM size:", info.graphics.vram, "MB");
    }

    fn processor(&mut self) {
        let (page, info, cpu) = (&mut *self.page, self.info, &self.info.cpu);
        page.number("cpuexecutioncap", "CPU exec cap:", cpu.execution_cap, "%");
        page.switch("hpet", "HPET:", info.hpet);
        page.string("cpu-profile", "CPUProfile:", &cpu.profile);
        let chipset = match info.chipset {
            ChipsetType::Null => "invalid",
            ChipsetType::PIIX3 => "piix3",
            ChipsetType::ICH9 => "ich9",
        };
        page.string("chipset", "Chipset:", chipset);
        page.string("firmware", "Firmware:", info.firmware.name());
        page.number("cpus", "Number of CPUs:", cpu.count, "");
        page.switch("pae", "PAE:", cpu.pae);
        page.switch("longmode", "Long Mode:", cpu.long_mode);
        page.switch("triplefaultreset", "Triple Fault Reset:", cpu.triple_fault_reset);
        page.switch("apic", "APIC:", cpu.apic);
        page.switch("x2apic", "X2APIC:", cpu.x2apic);
        page.switch("nested-hw-virt", "Nested VT-x/AMD-V:", cpu.nested_hw_virt);
        page.number("cpuid-portability-level", "CPUID Portability Level:", cpu.portability_level, "");
        if page.is_machine() {
            for [leaf, subleaf, a, b, c, d] in &cpu.overrides {
                // VirtualBox forgets the end of the line here.
                page.line(format!("cpuid={leaf:08x},{subleaf:08x},{a:08x},{b:08x},{c:08x},{d:08x}"));
            }
        } else if cpu.overrides.is_empty() {
            page.label("CPUID overrides:", "None");
        } else {
            page.label("CPUID overrides:", "Leaf no.      EAX      EBX      ECX      EDX");
            for [leaf, subleaf, a, b, c, d] in &cpu.overrides {
                page.label("", &format!("{leaf:08x}/{subleaf:03x}  {a:08x} {b:08x} {c:08x} {d:08x}"));
            }
        }
    }

    fn firmware(&mut self) {
        let (page, info, bios) = (&mut *self.page, self.info, &self.info.bios);
        let menu = match bios.boot_menu {
            BIOSBootMenuMode::Disabled => ("disabled", "disabled"),
            BIOSBootMenuMode::MenuOnly => ("menuonly", "menu only"),
            BIOSBootMenuMode::MessageAndMenu => ("messageandmenu", "message and menu"),
        };
        page.word("bootmenu", "Boot menu mode:", menu);
        for (i, device) in (1..).zip(&info.boot_order) {
            let names = match device {
                DeviceType::Floppy => ("floppy", "Floppy"),
                DeviceType::DVD => ("dvd", "DVD"),
                DeviceType::HardDisk => ("disk", "HardDisk"),
                DeviceType::Network => ("net", "Network"),
                DeviceType::USB => ("usb", "USB"),
                DeviceType::SharedFolder => ("sharedfolder", "Shared Folder"),
                _ => ("none", "Not Assigned"),
            };
            page.word(&format!("boot{i}"), &format!("Boot Device {i}:"), names);
        }
        page.switch("acpi", "ACPI:", bios.acpi);
        page.switch("ioapic", "IOAPIC:", bios.ioapic);
        let apic = match bios.apic {
            APICMode::Disabled => ("disabled", "disabled"),
            APICMode::APIC => ("apic", "APIC"),
            APICMode::X2APIC => ("x2apic", "x2APIC"),
        };
        page.word("biosapic", "BIOS APIC mode:", apic);
        match page.form {
            Form::Machine => page.line(format!("biossystemtimeoffset={}", bios.time_offset)),
            Form::Human => page.label("Time offset:", &format!("{}ms", grouped(bios.time_offset))),
        }
        if !bios.nvram_file.is_empty() {
            page.string("NvramFile", "BIOS NVRAM File:", &bios.nvram_file);
        }
        page.choice("rtcuseutc", "RTC:", info.rtc_utc, "UTC", "local time");
    }

    fn virtualization(&mut self) {
        let (page, info, hw) = (&mut *self.page, self.info, &self.info.hw_virt);
        page.switch("hwvirtex", "Hardware Virtualization:", hw.enabled);
        page.switch("nestedpaging", "Nested Paging:", hw.nested_paging);
        page.switch("largepages", "Large Pages:", hw.large_pages);
        page.switch("vtxvpid", "VT-x VPID:", hw.vpid);
        page.switch("vtxux", "VT-x Unrestricted Exec.:", hw.unrestricted);
        page.switch("virtvmsavevmload", "AMD-V Virt. Vmsave/Vmload:", hw.virt_vmsave);
        let iommu = match info.iommu {
            IommuType::None => ("none", "None"),
            IommuType::Automatic => ("automatic", "Automatic"),
            IommuType::AMD => ("amd", "AMD"),
            IommuType::Intel => ("intel", "Intel"),
        };
        page.word("iommu", "IOMMU:", iommu);
        page.word("paravirtprovider", "Paravirt. Provider:", paravirt_name(info.paravirt));
        page.word(
            "effparavirtprovider",
            "Effective Paravirt. Prov.:",
            paravirt_name(info.effective_paravirt),
        );
        if !info.paravirt_debug.is_empty() {
            page.string("paravirtdebug", "Paravirt. Debug:", &info.paravirt_debug);
        }
    }

    fn state(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        let since = timestamp(info.state_since);
        if page.is_machine() {
            page.quoted("VMState", info.state.word());
            page.quoted("VMStateChangeTime", &since);
            if !info.state_file.is_empty() {
                page.quoted("VMStateFile", &info.state_file);
            }
        } else {
            page.label("State:", &format!("{} (since {since})", state_name(info.state)));
        }
        let graphics = match info.graphics.controller {
            GraphicsControllerType::Null => ("null", "Null"),
            GraphicsControllerType::VBoxVGA => ("vboxvga", "VBoxVGA"),
            GraphicsControllerType::VMSVGA => ("vmsvga", "VMSVGA"),
            GraphicsControllerType::VBoxSVGA => ("vboxsvga", "VBoxSVGA"),
        };
        page.word("graphicscontroller", "Graphics Controller:", graphics);
        page.number("monitorcount", "Monitor count:", info.graphics.monitors, "");
        page.switch("accelerate3d", "3D Acceleration:", info.graphics.accelerate_3d);
        page.switch("accelerate2dvideo", "2D Video Acceleration:", info.graphics.accelerate_2d_video);
    }

    fn services(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        page.switch("teleporterenabled", "Teleporter Enabled:", info.teleporter.enabled);
        page.number("teleporterport", "Teleporter Port:", info.teleporter.port, "");
        page.string("teleporteraddress", "Teleporter Address:", &info.teleporter.address);
        page.string("teleporterpassword", "Teleporter Password:", &info.teleporter.password);
        page.switch("tracing-enabled", "Tracing Enabled:", info.tracing.enabled);
        page.switch("tracing-allow-vm-access", "Allow Tracing to Access VM:", info.tracing.allow_vm_access);
        page.string("tracing-config", "Tracing Configuration:", &info.tracing.config);
        page.switch("autostart-enabled", "Autostart Enabled:", info.autostart_enabled);
        page.number("autostart-delay", "Autostart Delay:", info.autostart_delay, "");
        page.string("defaultfrontend", "Default Frontend:", &info.default_frontend);
        let priority = match info.priority {
            VMProcPriority::Flat => "flat",
            VMProcPriority::Low => "low",
            VMProcPriority::Normal => "normal",
            VMProcPriority::High => "high",
            VMProcPriority::Default | VMProcPriority::Invalid => "default",
        };
        page.string("vmprocpriority", "VM process priority:", priority);
    }

    fn storage(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        if page.is_machine() {
            for (i, c) in info.controllers.iter().enumerate() {
                page.quoted(&format!("storagecontrollername{i}"), &c.name);
                page.quoted(&format!("storagecontrollertype{i}"), controller_name(c.kind));
                page.quoted(&format!("storagecontrollerinstance{i}"), &c.instance.to_string());
                page.quoted(&format!("storagecontrollermaxportcount{i}"), &c.max_ports.to_string());
                page.quoted(&format!("storagecontrollerportcount{i}"), &c.ports.to_string());
                page.quoted(&format!("storagecontrollerbootable{i}"), if c.bootable { "on" } else { "off" });
            }
            for controller in &info.controllers {
                machine_attachments(page, controller);
            }
            return;
        }
        if info.controllers.is_empty() {
            page.label("Storage Controllers:", "<none>");
            return;
        }
        page.line("Storage Controllers:");
        for (i, c) in info.controllers.iter().enumerate() {
            page.line(format!(
                "#{i}: '{}', Type: {}, Instance: {}, Ports: {} (max {}), {}",
                c.name,
                controller_name(c.kind),
                c.instance,
                c.ports,
                c.max_ports,
                if c.bootable { "Bootable" } else { "Not bootable" }
            ));
            human_attachments(page, c);
        }
    }

    fn network(&mut self) {
        for (i, nic) in (1..).zip(&self.info.nics) {
            match nic {
                None if self.page.is_machine() => self.page.line(format!("nic{i}=\"none\"")),
                None => self.page.label(&format!("NIC {i}:"), "disabled"),
                Some(nic) if self.page.is_machine() => machine_nic(self.page, i, nic),
                Some(nic) => human_nic(self.page, i, nic),
            }
        }
    }

    fn input(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        let pointing = match info.pointing {
            PointingHIDType::None => ("none", "None"),
            PointingHIDType::PS2Mouse => ("ps2mouse", "PS/2 Mouse"),
            PointingHIDType::USBMouse => ("usbmouse", "USB Mouse"),
            PointingHIDType::USBTablet => ("usbtablet", "USB Tablet"),
            PointingHIDType::ComboMouse => ("combomouse", "USB Tablet and PS/2 Mouse"),
            PointingHIDType::USBMultiTouch => ("usbmultitouch", "USB Multi-Touch"),
            PointingHIDType::USBMultiTouchScreenPlusPad => ("unknown", "Unknown"),
        };
        page.word("hidpointing", "Pointing Device:", pointing);
        let keyboard = match info.keyboard {
            KeyboardHIDType::None => ("none", "None"),
            KeyboardHIDType::PS2Keyboard => ("ps2kbd", "PS/2 Keyboard"),
            KeyboardHIDType::USBKeyboard => ("usbkbd", "USB Keyboard"),
            KeyboardHIDType::ComboKeyboard => ("combokbd", "USB and PS/2 Keyboard"),
        };
        page.word("hidkeyboard", "Keyboard Device:", keyboard);
    }

    fn ports(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        for (i, uart) in (1..).zip(&info.uarts) {
            let Some(uart) = uart else {
                page.word(&format!("uart{i}"), &format!("UART {i}:"), ("off", "disabled"));
                continue;
            };
            show_uart(page, i, uart);
        }
        for (i, lpt) in (1..).zip(&info.lpts) {
            let Some(lpt) = lpt else {
                page.word(&format!("lpt{i}"), &format!("LPT {i}:"), ("off", "disabled"));
                continue;
            };
            if page.is_machine() {
                page.quoted(&format!("lpt{i}"), &format!("{:#06x},{}", lpt.io_base, lpt.irq));
                page.quoted(&format!("lptmode{i}"), &lpt.path);
            } else {
                let text = format!(
                    "I/O base: {:#06x}, IRQ: {}, attached to device '{}'",
                    lpt.io_base, lpt.irq, lpt.path
                );
                page.label(&format!("LPT {i}:"), &text);
            }
        }
    }

    fn sound(&mut self) {
        let (page, audio) = (&mut *self.page, &self.info.audio);
        use AudioDriverType as D;
        let driver = match audio.driver {
            D::Default => ("default", "Default"),
            D::Null => ("null", "Null"),
            D::OSS => ("oss", "OSS"),
            D::ALSA => ("alsa", "ALSA"),
            D::Pulse => ("pulse", "PulseAudio"),
            D::WinMM => ("winmm", "WINMM"),
            D::DirectSound => ("dsound", "DirectSound"),
            D::WAS => ("was", "Windows Audio Session (WAS)"),
            D::CoreAudio => ("coreaudio", "CoreAudio"),
            D::SolAudio => ("solaudio", "SolAudio"),
            D::MMPM => ("unknown", "Unknown"),
        };
        if page.is_machine() {
            page.quoted("audio", if audio.enabled { driver.0 } else { "none" });
        } else if audio.enabled {
            let codec = match audio.codec {
                AudioCodecType::Null => "Unknown",
                other => other.name(),
            };
            let text = format!(
                "enabled (Driver: {}, Controller: {}, Codec: {codec})",
                driver.1,
                audio.controller.name()
            );
            page.label("Audio:", &text);
        } else {
            page.label("Audio:", "disabled");
        }
        page.switch("audio_out", "Audio playback:", audio.output);
        page.switch("audio_in", "Audio capture:", audio.input);
    }

    fn sharing(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        let clipboard = match info.clipboard {
            ClipboardMode::Disabled => ("disabled", "disabled"),
            ClipboardMode::HostToGuest => ("hosttoguest", "HostToGuest"),
            ClipboardMode::GuestToHost => ("guesttohost", "GuestToHost"),
            ClipboardMode::Bidirectional => ("bidirectional", "Bidirectional"),
        };
        page.word("clipboard", "Clipboard Mode:", clipboard);
        let dnd = match info.drag_and_drop {
            DnDMode::Disabled => ("disabled", "disabled"),
            DnDMode::HostToGuest => ("hosttoguest", "HostToGuest"),
            DnDMode::GuestToHost => ("guesttohost", "GuestToHost"),
            DnDMode::Bidirectional => ("bidirectional", "Bidirectional"),
        };
        page.word("draganddrop", "Drag and drop Mode:", dnd);
        if !info.session_name.is_empty() {
            page.string("SessionName", "Session name:", &info.session_name);
        }
        if let Some(mode) = &info.video_mode {
            let VideoMode { width, height, bits_per_pixel, origin: (x, y), status } = mode;
            // The numbers of GuestMonitorStatus.
            let (number, name) = match status {
                GuestMonitorStatus::Disabled => (0, "disabled"),
                GuestMonitorStatus::Enabled => (1, "enabled"),
                GuestMonitorStatus::Blank => (2, "blank"),
            };
            if page.is_machine() {
                page.line(format!("VideoMode=\"{width},{height},{bits_per_pixel}\"@{x},{y} {number}"));
            } else {
                page.label("Video mode:", &format!("{width}x{height}x{bits_per_pixel} at {x},{y} {name}"));
            }
        }
    }

    fn vrde(&mut self) {
        let page = &mut *self.page;
        let Some(vrde) = &self.info.vrde else {
            page.word("vrde", "VRDE:", ("off", "disabled"));
            return;
        };
        let auth = match vrde.auth {
            AuthType::Null => "null",
            AuthType::External => "external",
            AuthType::Guest => "guest",
        };
        let on = |on: bool| if on { "on" } else { "off" };
        if page.is_machine() {
            page.line("vrde=\"on\"");
            page.line("vrdeport=-1");
            page.quoted("vrdeports", &vrde.ports);
            page.quoted("vrdeaddress", &vrde.address);
            page.quoted("vrdeauthtype", auth);
            page.quoted("vrdemulticon", on(vrde.multi_connection));
            page.quoted("vrdereusecon", on(vrde.reuse_connection));
            page.quoted("vrdevideochannel", on(vrde.video_channel));
            if vrde.video_channel {
                page.quoted("vrdevideochannelquality", &vrde.video_channel_quality);
            }
        } else {
            let address = if vrde.address.is_empty() { "0.0.0.0" } else { &vrde.address };
            let text = format!(
                "enabled (Address {address}, Ports {}, MultiConn: {}, ReuseSingleConn: {}, Authentication type: {auth})",
                vrde.ports,
                on(vrde.multi_connection),
                on(vrde.reuse_connection)
            );
            page.label("VRDE:", &text);
            let video = if vrde.video_channel {
                format!("enabled (Quality {})", vrde.video_channel_quality)
            } else {
                "disabled".to_owned()
            };
            page.label("Video redirection:", &video);
        }
        for (name, value) in &vrde.properties {
            let value = if value.is_empty() { "<not set>".to_owned() } else { format!("\"{value}\"") };
            if page.is_machine() {
                page.line(format!("vrdeproperty[{name}]={value}"));
            } else {
                page.line(format!("{:<28}: {name:<10} = {value}", "VRDE property"));
            }
        }
    }

    fn usb(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        let has = |kind| info.usb_controllers.contains(&kind);
        page.switch("usb", "OHCI USB:", has(USBControllerType::OHCI));
        page.switch("ehci", "EHCI USB:", has(USBControllerType::EHCI));
        page.switch("xhci", "xHCI USB:", has(USBControllerType::XHCI));
        if page.form == Form::Human {
            if info.usb_filters.is_empty() {
                page.label("USB Device Filters:", "<none>");
            } else {
                page.line("USB Device Filters:");
            }
        }
        for (i, filter) in info.usb_filters.iter().enumerate() {
            if page.form == Form::Human {
                page.label("Index:", &i.to_string());
            }
            let key = |what: &str| format!("USBFilter{what}{}", i + 1);
            page.choice(&key("Active"), "  Active:", filter.active, "yes", "no");
            page.string(&key("Name"), "  Name:", &filter.name);
            page.string(&key("VendorId"), "  VendorId:", &filter.vendor_id);
            page.string(&key("ProductId"), "  ProductId:", &filter.product_id);
            page.string(&key("Revision"), "  Revision:", &filter.revision);
            page.string(&key("Manufacturer"), "  Manufacturer:", &filter.manufacturer);
            page.string(&key("Product"), "  Product:", &filter.product);
            page.string(&key("Remote"), "  Remote:", &filter.remote);
            page.string(&key("SerialNumber"), "  Serial Number:", &filter.serial_number);
            if page.form == Form::Human && filter.masked_interfaces != 0 {
                page.label("Masked Interfaces:", &format!("{:#010x}", filter.masked_interfaces));
            }
        }
    }

    fn bandwidth(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        if info.online && page.form == Form::Human {
            page.label("Available remote USB devices:", "<none>");
            page.label("Currently attached USB devices:", "<none>");
        }
        if page.form == Form::Human {
            page.label("Bandwidth groups:", if info.bandwidth_groups.is_empty() { "<none>" } else { "" });
        }
        for (i, group) in info.bandwidth_groups.iter().enumerate() {
            page.line(bandwidth_line(i, group, page.is_machine()));
        }
    }

    fn folders(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        if page.is_machine() {
            for (i, folder) in (1..).zip(&info.shared_folders) {
                page.quoted(&format!("SharedFolderNameMachineMapping{i}"), &folder.name);
                page.quoted(&format!("SharedFolderPathMachineMapping{i}"), &folder.host_path);
            }
            return;
        }
        if info.shared_folders.is_empty() {
            page.label("Shared folders:", "<none>");
        } else {
            page.text.push_str(&format!("{:<28} \n\n", "Shared folders:"));
        }
        for folder in &info.shared_folders {
            let mut line = format!(
                "Name: '{}', Host path: '{}' (machine mapping), {}",
                folder.name,
                folder.host_path,
                if folder.writable { "writable" } else { "readonly" }
            );
            if folder.auto_mount {
                line.push_str(", auto-mount");
            }
            if !folder.auto_mount_point.is_empty() {
                line.push_str(&format!(", mount-point: '{}'", folder.auto_mount_point));
            }
            page.line(line);
        }
        if !info.shared_folders.is_empty() {
            page.line("");
        }
    }

    fn recording(&mut self) {
        let (page, recording) = (&mut *self.page, &self.info.recording);
        if self.info.online {
            page.choice("VRDEActiveConnection", "VRDE Connection:", false, "active", "not active");
            // The second equals sign is VirtualBox's.
            page.number("VRDEClients=", "Clients so far:", 0, "");
        }
        page.choice("recording_enabled", "Recording enabled:", recording.enabled, "yes", "no");
        page.number("recording_screens", "Recording screens:", recording.screens.len() as u32, "");
        for (i, screen) in recording.screens.iter().enumerate() {
            let heading = if page.is_machine() { format!("rec_screen{i}") } else { format!("Screen {i}:") };
            page.line(format!(" {heading}"));
            page.choice("rec_screen_enabled", "    Enabled:", screen.enabled, "yes", "no");
            page.number("rec_screen_id", "    ID:", screen.id, "");
            page.choice("rec_screen_video_enabled", "    Record video:", true, "yes", "no");
            page.choice("rec_screen_audio_enabled", "    Record audio:", false, "yes", "no");
            page.string("rec_screen_dest", "    Destination:", "File");
            page.string("rec_screen_dest_filename", "    File:", &screen.file);
            page.string("rec_screen_opts", "    Options:", &screen.options);
            let size = format!("{}x{}", screen.width, screen.height);
            page.string("rec_screen_video_res_xy", "    Video dimensions:", &size);
            page.number("rec_screen_video_rate_kbps", "    Video rate:", screen.rate, "kbps");
            page.number("rec_screen_video_fps", "    Video FPS:", screen.fps, "fps");
        }
    }

    fn tail(&mut self) {
        let (page, info) = (&mut *self.page, self.info);
        if !info.description.is_empty() {
            if page.is_machine() {
                page.quoted("description", &info.description);
            } else {
                page.line(format!("Description:\n{}", info.description));
            }
        }
        if let Some(root) = &info.snapshots {
            if page.form == Form::Human {
                page.line("* Snapshots:");
            }
            show_snapshot(page, root, "");
        }
        if page.form == Form::Human {
            page.line("* Guest:");
        }
        page.number("GuestMemoryBalloon", "Configured memory balloon:", info.memory_balloon, "MB");
        if info.online {
            page.number("GuestAdditionsRunLevel", "Additions run level:", 0, "");
            if page.form == Form::Human {
                page.label("Guest Facilities:", "<none>");
            }
        }
        if page.form == Form::Human {
            page.line("");
        }
    }
}

fn machine_attachments(page: &mut Page, controller: &Controller) {
    let name = &controller.name;
    let on = |on: bool| if on { "on" } else { "off" };
    for port in 0..controller.ports as i32 {
        for device in 0..controller.devices_per_port as i32 {
            let found = controller.attachments.iter().find(|a| a.port == port && a.device == device);
            let key = |tag: &str| format!("{name}{tag}-{port}-{device}");
            let Some(a) = found else {
                page.quoted_key(&key(""), "none");
                continue;
            };
            let Some((location, id)) = &a.medium else {
                page.quoted_key(&key(""), "emptydrive");
                if a.kind == DeviceType::DVD {
                    page.quoted_key(&key("-IsEjected"), on(a.ejected));
                }
                continue;
            };
            page.quoted_key(&key(""), location);
            page.quoted_key(&key("-ImageUUID"), id);
            if a.passthrough {
                page.quoted_key(&key("-dvdpassthrough"), "on");
            }
            if a.kind == DeviceType::DVD {
                page.quoted_key(&key("-tempeject"), on(a.temp_eject));
                page.quoted_key(&key("-IsEjected"), on(a.ejected));
            }
            // VirtualBox looks at the controller's name here, not at its bus.
            if name.eq_ignore_ascii_case("SATA") || name.eq_ignore_ascii_case("USB") {
                page.quoted_key(&key("-hot-pluggable"), on(a.hot_pluggable));
            }
            page.quoted_key(&key("-nonrotational"), on(a.non_rotational));
            page.quoted_key(&key("-discard"), on(a.discard));
        }
    }
}

fn human_attachments(page: &mut Page, controller: &Controller) {
    let mut attachments: Vec<&Attachment> = controller.attachments.iter().collect();
    attachments.sort_by_key(|a| (a.port, a.device));
    for a in attachments {
        let mut line = format!("  Port {}, Unit {}: ", a.port, a.device);
        let flags: &[(bool, &str)] = &[
            (a.passthrough && a.medium.is_some(), ", passthrough enabled"),
            (a.temp_eject, ", temp eject"),
            (a.ejected, ", ejected"),
            (a.hot_pluggable && a.medium.is_some(), ", hot-pluggable"),
            (a.non_rotational && a.medium.is_some(), ", non-rotational (SSD)"),
            (a.discard && a.medium.is_some(), ", discards unused blocks"),
        ];
        match &a.medium {
            Some((_, id)) => line.push_str(&format!("UUID: {id}")),
            None => line.push_str("Empty"),
        }
        for (_, text) in flags.iter().filter(|(set, _)| *set) {
            line.push_str(text);
        }
        page.line(line);
        if let Some((location, _)) = &a.medium {
            page.line(format!("    Location: \"{location}\""));
        }
    }
}

/// The values of a NAT engine with their defaults: VirtualBox shows 64 for the buffers and windows that are not set.
fn nat_values(settings: &[u32; 5]) -> [u32; 5] {
    let [mtu, rest @ ..] = *settings;
    let [a, b, c, d] = rest.map(|value| if value == 0 { 64 } else { value });
    [mtu, a, b, c, d]
}

/// The fields of a redirect, with the protocol as a word.
fn redirect(text: &str) -> Option<[&str; 6]> {
    let fields: Vec<&str> = text.splitn(6, ',').collect();
    let [name, protocol, host_ip, host_port, guest_ip, guest_port] = fields[..] else { return None };
    let protocol = match protocol {
        "0" => "udp",
        "1" => "tcp",
        _ => "unk",
    };
    Some([name, protocol, host_ip, host_port, guest_ip, guest_port])
}

fn machine_nic(page: &mut Page, number: u32, nic: &Nic) {
    use NetworkAttachmentType as A;
    let to = nic.attached_to.as_str();
    let (key, word) = match nic.attachment {
        A::Null => (None, "null"),
        A::NAT => (Some("natnet"), "nat"),
        A::Bridged => (Some("bridgeadapter"), "bridged"),
        A::Internal => (Some("intnet"), "intnet"),
        A::HostOnly => (Some("hostonlyadapter"), "hostonly"),
        A::Generic => (Some("generic"), "Generic"),
        A::NATNetwork => (Some("nat-network"), "natnetwork"),
        A::HostOnlyNetwork => (Some("hostonly-network"), "hostonlynetwork"),
        A::Cloud => (Some("cloud-network"), "cloudnetwork"),
    };
    if let Some(key) = key {
        let value = if nic.attachment == A::NAT && to.is_empty() { "nat" } else { to };
        page.quoted(&format!("{key}{number}"), value);
    }
    page.quoted(&format!("macaddress{number}"), &nic.mac);
    page.quoted(&format!("cableconnected{number}"), if nic.cable_connected { "on" } else { "off" });
    page.quoted(&format!("nic{number}"), word);
    page.quoted(&format!("nictype{number}"), nic_type_name(nic.kind));
    page.quoted(&format!("nicspeed{number}"), &nic.line_speed.to_string());
    let Some(nat) = &nic.nat else { return };
    let keys = ["mtu", "sockSnd", "sockRcv", "tcpWndSnd", "tcpWndRcv"];
    for (key, value) in keys.iter().zip(nat_values(&nat.settings)) {
        page.quoted(key, &value.to_string());
    }
    for (i, fields) in nat.redirects.iter().filter_map(|text| redirect(text)).enumerate() {
        page.quoted(&format!("Forwarding({i})"), &fields.join(","));
    }
}

fn human_nic(page: &mut Page, number: u32, nic: &Nic) {
    use NetworkAttachmentType as A;
    let to = &nic.attached_to;
    let attachment = match nic.attachment {
        A::Null => "none".to_owned(),
        A::NAT => "NAT".to_owned(),
        A::Bridged => format!("Bridged Interface '{to}'"),
        A::Internal => format!("Internal Network '{to}'"),
        A::HostOnly => format!("Host-only Interface '{to}'"),
        A::Generic => {
            let properties: Vec<String> =
                nic.generic_properties.iter().map(|(name, value)| format!("{name}='{value}'")).collect();
            format!("Generic '{to}' {{ {} }}", properties.join(", "))
        }
        A::NATNetwork => format!("NAT Network '{to}'"),
        A::HostOnlyNetwork => format!("Host Only Network '{to}'"),
        A::Cloud => format!("Cloud Network '{to}'"),
    };
    let on = |on: bool| if on { "on" } else { "off" };
    let or_none = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
    let promisc = match nic.promisc {
        NetworkAdapterPromiscModePolicy::Deny => "deny",
        NetworkAdapterPromiscModePolicy::AllowNetwork => "allow-vms",
        NetworkAdapterPromiscModePolicy::AllowAll => "allow-all",
    };
    let text = format!(
        "MAC: {}, Attachment: {attachment}, Cable connected: {}, Trace: {} (file: {}), Type: {}, \
         Reported speed: {} Mbps, Boot priority: {}, Promisc Policy: {promisc}, Bandwidth group: {}",
        nic.mac,
        on(nic.cable_connected),
        on(nic.trace),
        or_none(&nic.trace_file),
        nic_type_name(nic.kind),
        nic.line_speed / 1000,
        nic.boot_priority,
        or_none(&nic.bandwidth_group),
    );
    page.label(&format!("NIC {number}:"), &text);
    let Some(nat) = &nic.nat else { return };
    let [mtu, send, receive, window_send, window_receive] = nat_values(&nat.settings);
    page.line(format!(
        "NIC {number} Settings:  MTU: {mtu}, Socket (send: {send}, receive: {receive}), \
         TCP Window (send:{window_send}, receive: {window_receive})"
    ));
    for (i, fields) in nat.redirects.iter().filter_map(|text| redirect(text)).enumerate() {
        let [name, protocol, host_ip, host_port, guest_ip, guest_port] = fields;
        page.line(format!(
            "NIC {number} Rule({i}):   name = {name}, protocol = {protocol}, host ip = {host_ip}, \
             host port = {host_port}, guest ip = {guest_ip}, guest port = {guest_port}"
        ));
    }
}

fn show_uart(page: &mut Page, number: u32, uart: &Uart) {
    let kind = match uart.kind {
        UartType::U16450 => "16450",
        UartType::U16550A => "16550A",
        UartType::U16750 => "16750",
    };
    let path = &uart.path;
    if page.is_machine() {
        page.quoted(&format!("uart{number}"), &format!("{:#06x},{}", uart.io_base, uart.irq));
        let mode = match (uart.mode, uart.server) {
            (PortMode::Disconnected, _) => "disconnected".to_owned(),
            (PortMode::RawFile, _) => format!("file,{path}"),
            (PortMode::TCP, true) => format!("tcpserver,{path}"),
            (PortMode::TCP, false) => format!("tcpclient,{path}"),
            (PortMode::HostPipe, true) => format!("server,{path}"),
            (PortMode::HostPipe, false) => format!("client,{path}"),
            (PortMode::HostDevice, _) => path.clone(),
        };
        page.quoted(&format!("uartmode{number}"), &mode);
        page.quoted(&format!("uarttype{number}"), kind);
        return;
    }
    let role = if uart.server { "server" } else { "client" };
    let mode = match uart.mode {
        PortMode::Disconnected => "disconnected".to_owned(),
        PortMode::RawFile => format!("attached to raw file '{path}'"),
        PortMode::TCP => format!("attached to tcp ({role}) '{path}'"),
        PortMode::HostPipe => format!("attached to pipe ({role}) '{path}'"),
        PortMode::HostDevice => format!("attached to device '{path}'"),
    };
    let text = format!("I/O base: {:#06x}, IRQ: {}, {mode}, {kind}", uart.io_base, uart.irq);
    page.label(&format!("UART {number}:"), &text);
}

/// One bandwidth group.
pub fn bandwidth_line(i: usize, group: &BandwidthGroup, machine_readable: bool) -> String {
    let kind = group.kind.name();
    if machine_readable {
        let name = super::fmt::escape(&group.name);
        format!("BandwidthGroup{i}=\"{name}\",{kind},{}", group.max_bytes_per_second)
    } else {
        format!("#{i}: Name: '{}', Type: {kind}, Limit: {}", group.name, limit(group))
    }
}

/// A bandwidth in the largest unit that divides it; network groups in bits, too.
fn limit(group: &BandwidthGroup) -> String {
    let bytes = group.max_bytes_per_second;
    if bytes == 0 {
        return "none (disabled)".to_owned();
    }
    let units = [(1 << 30, "GiB/s"), (1 << 20, "MiB/s"), (1 << 10, "KiB/s"), (1, "bytes/s")];
    let (unit, name) = units.into_iter().find(|(unit, _)| bytes % unit == 0).unwrap_or((1, "bytes/s"));
    let in_bytes = format!("{} {name}", bytes / unit);
    if group.kind != BandwidthGroupType::Network || bytes % 125 != 0 {
        return in_bytes;
    }
    let kilobits = bytes / 125;
    let units = [(1_000_000, "Gbps"), (1000, "Mbps"), (1, "kbps")];
    let (unit, name) = units.into_iter().find(|(unit, _)| kilobits % unit == 0).unwrap_or((1, "kbps"));
    format!("{} {name} ({in_bytes})", kilobits / unit)
}

fn show_snapshot(page: &mut Page, snapshot: &Snapshot, prefix: &str) {
    let Snapshot { name, id, description, current, children } = snapshot;
    if page.is_machine() {
        page.quoted(&format!("SnapshotName{prefix}"), name);
        page.quoted(&format!("SnapshotUUID{prefix}"), id);
        if !description.is_empty() {
            page.quoted(&format!("SnapshotDescription{prefix}"), description);
        }
        if *current {
            page.quoted("CurrentSnapshotName", name);
            page.quoted("CurrentSnapshotUUID", id);
            page.quoted("CurrentSnapshotNode", &format!("SnapshotName{prefix}"));
        }
    } else {
        let mark = if *current { " *" } else { "" };
        page.line(format!("   {prefix}Name: {name} (UUID: {id}){mark}"));
        if description.contains('\n') {
            page.line(format!("   {prefix}Description:\n{description}"));
        } else if !description.is_empty() {
            page.line(format!("   {prefix}Description: {description}"));
        }
    }
    for (i, child) in (1..).zip(children) {
        let prefix = if page.is_machine() { format!("{prefix}-{i}") } else { format!("{prefix}   ") };
        show_snapshot(page, child, &prefix);
    }
}

#[cfg(test)]
mod tests;
