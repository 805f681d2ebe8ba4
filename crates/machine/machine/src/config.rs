//! What a VM is made of: the settings that concern the VM process, checked and in the machine's own terms.
//!
//! [`MachineConfig::from_settings`] sorts the settings into three: what is honoured, what is not available yet and would change what
//! the guest finds (refused at start, every reason named), and what is not available but harmless (listed in VBox.log).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use gim::debug::DebugInterface;
use main_api::cpu_profiles::{CpuProfile, cpu_profile};
use settings::words as w;
use settings::{AttachedDevice, MachineSettings, MediaRegistry, Medium, SerialPort, StorageController};
use uuid::Uuid;
use vbox_types::{ByteSize, Hz, Port};

use crate::network::NicConfig;

/// The most vCPUs that the PIIX3 chipset's machine offers, VirtualBox's own limit for it.
pub const MAX_CPUS: u32 = 32;
/// The machine's overrides by extra data, named once for all places that read them.
mod overrides {
    /// Node of the execution manager.
    pub(super) const EM: &str = "EM";
    /// `hwvirt`, `native-api`, `interpreter` or `recompiler`: what `--vm-execution-engine` stores.
    pub(super) const ENGINE: &str = "ExecutionEngine";
    pub(super) const TRIPLE_FAULT_RESET: &str = "TripleFaultReset";
    /// Node of the time manager.
    pub(super) const TM: &str = "TM";
    pub(super) const TSC_RATE: &str = "TSCTicksPerSecond";
    /// Node of the Hyper-V provider.
    pub(super) const HYPERV: &str = "GIM/HyperV";
    pub(super) const VENDOR: &str = "VendorID";
    /// Node of the firmware, with the texts of the SMBIOS tables.
    pub(super) const PCBIOS: &str = "Devices/pcbios/0/Config";
}

/// The SMBIOS texts that users override, by VirtualBox's names (manual, "Configuring the BIOS DMI Information").
pub const DMI_NAMES: &[&str] = &[
    "DmiBIOSVendor",
    "DmiBIOSVersion",
    "DmiBIOSReleaseDate",
    "DmiSystemVendor",
    "DmiSystemProduct",
    "DmiSystemVersion",
    "DmiSystemSerial",
    "DmiSystemSKU",
    "DmiSystemFamily",
    "DmiSystemUuid",
    "DmiBoardVendor",
    "DmiBoardProduct",
    "DmiBoardVersion",
    "DmiBoardSerial",
    "DmiBoardAssetTag",
    "DmiBoardLocInChass",
    "DmiChassisVendor",
    "DmiChassisVersion",
    "DmiChassisSerial",
    "DmiChassisAssetTag",
    "DmiProcManufacturer",
    "DmiProcVersion",
    "DmiOEMVBoxVer",
    "DmiOEMVBoxRev",
];

/// What the settings say about hardware virtualization and against attacks by way of the CPU. KVM decides about most of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HwVirt {
    pub nested_paging: bool,
    pub vpid: bool,
    pub unrestricted_execution: bool,
    pub large_pages: bool,
    pub ibpb_on_vm_entry: bool,
    pub ibpb_on_vm_exit: bool,
    pub spec_ctrl: bool,
    pub l1d_flush_on_sched: bool,
    pub l1d_flush_on_vm_entry: bool,
    pub mds_clear_on_sched: bool,
    pub mds_clear_on_vm_entry: bool,
}

impl HwVirt {
    fn from_settings(cpu: &settings::Cpu) -> Self {
        Self {
            nested_paging: cpu.nested_paging,
            vpid: cpu.vpid,
            unrestricted_execution: cpu.unrestricted_execution,
            large_pages: cpu.large_pages,
            ibpb_on_vm_entry: cpu.ibpb_on_vm_entry,
            ibpb_on_vm_exit: cpu.ibpb_on_vm_exit,
            spec_ctrl: cpu.spec_ctrl,
            l1d_flush_on_sched: cpu.l1d_flush_on_sched,
            l1d_flush_on_vm_entry: cpu.l1d_flush_on_vm_entry,
            mds_clear_on_sched: cpu.mds_clear_on_sched,
            mds_clear_on_vm_entry: cpu.mds_clear_on_vm_entry,
        }
    }
}

/// Which engine the settings ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// KVM where it is usable, else the recompiler.
    #[default]
    Default,
    /// KVM, or no start.
    Kvm,
    /// Not KVM.
    Software,
    Interpreter,
    Recompiler,
}

/// What a serial port is joined to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UartMode {
    Disconnected,
    /// A file that gets what the guest sends.
    File(PathBuf),
    HostDevice(PathBuf),
    /// A local socket that we create, or connect to.
    PipeServer(PathBuf),
    PipeClient(PathBuf),
    TcpServer(u16),
    /// `host:port`.
    TcpClient(String),
}

/// A serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UartConfig {
    pub io_base: Port,
    pub irq: u8,
    pub mode: UartMode,
}

/// A drive's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveKind {
    Disk,
    Dvd,
    Floppy,
}

/// An image in a drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediumConfig {
    pub path: PathBuf,
    /// The registry's name of the format: `VDI`, `RAW` …; empty for "look".
    pub format: String,
    /// The images that a differencing one depends on, with their formats, the base first.
    pub parents: Vec<(PathBuf, String)>,
    /// The base is a disk of an iSCSI target: this one.
    pub target: Option<vd::Source>,
    pub read_only: bool,
    /// Other machines may write to it, too.
    pub shareable: bool,
    /// The host's page cache may keep what the machine reads and writes.
    pub host_cache: bool,
    pub uuid: Uuid,
    pub encryption: Option<Encryption>,
}

/// How the content of a medium, and of those that it depends on, is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// The id by which a password is given for it.
    pub key_id: String,
    /// VirtualBox's key store, in base64.
    pub key_store: String,
}

/// A drive on a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveConfig {
    pub kind: DriveKind,
    /// The name of its controller in the settings.
    pub controller: String,
    pub port: u8,
    pub device: u8,
    pub medium: Option<MediumConfig>,
    pub non_rotational: bool,
    /// Hand the guest's TRIM to the image.
    pub discard: bool,
    /// Where the controller can tell: the drive may come and go while the guest runs.
    pub hot_pluggable: bool,
    /// The BIOS may start from it.
    pub bootable: bool,
    /// The bandwidth group whose limit holds for it; empty for none.
    pub bandwidth_group: String,
}

/// A controller with a number of ports: AHCI, NVMe, virtio-blk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortsConfig {
    /// Ports that the guest finds.
    pub ports: u8,
    pub drives: Vec<DriveConfig>,
}

impl PortsConfig {
    fn new(controller: &StorageController, drives: Vec<DriveConfig>) -> Self {
        let most = u8::try_from(controller.bus().ports().1).unwrap_or(u8::MAX);
        Self { ports: u8::try_from(controller.port_count).unwrap_or(u8::MAX).clamp(1, most), drives }
    }
}

/// Which SCSI controller the guest finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ScsiModel {
    BusLogic,
    LsiLogic,
    LsiLogicSas,
    Virtio,
}

/// A SCSI controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScsiConfig {
    pub model: ScsiModel,
    /// Ports of a controller that has any number of them.
    pub ports: u32,
    pub drives: Vec<DriveConfig>,
}

/// Which IDE chip the guest finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdeModel {
    Piix3,
    Piix4,
    Ich6,
}

/// What a storage controller of the settings is built as.
enum Chip {
    Ide(IdeModel),
    Ahci,
    Nvme,
    VirtioBlk,
    Scsi(ScsiModel),
    Floppy,
}

/// A place to boot from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootDevice {
    None,
    Floppy,
    Dvd,
    Disk,
    Network,
}

/// Everything the VM process builds a machine from.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    pub name: String,
    /// The machine's folder, in which relative paths begin.
    pub folder: PathBuf,
    pub uuid: Uuid,
    pub ram: ByteSize,
    pub vram: ByteSize,
    pub cpus: u32,
    pub ioapic: bool,
    pub acpi: bool,
    pub hpet: bool,
    pub rtc_utc: bool,
    /// Milliseconds by which the guest's clock is ahead of the host's.
    pub time_offset_ms: i64,
    pub long_mode: bool,
    pub pae: bool,
    pub x2apic: bool,
    pub triple_fault_reset: bool,
    /// Rate of the time-stamp counter, where the user sets it.
    pub tsc: Option<Hz>,
    /// Overridden texts of the SMBIOS tables by VirtualBox's names (`DmiSystemVendor` …).
    pub dmi: Vec<(String, String)>,
    pub engine: EngineChoice,
    pub hw_virt: HwVirt,
    /// The guest has virtualization itself.
    pub nested_hw_virt: bool,
    /// The processor that the guest finds; `None` is the host's.
    pub cpu_profile: Option<&'static CpuProfile>,
    /// Where CPUs come and go while the machine runs: those that are there at the start, one bit each.
    pub hotplug: Option<u32>,
    /// Percent of time that guest code may run.
    pub execution_cap: u32,
    /// What the guest finds that knows it runs on a hypervisor.
    pub paravirt: gim::Provider,
    /// The signature that the Hyper-V provider shows.
    pub hyperv_vendor: [u8; 12],
    /// The kernel debugger that guests find by the Hyper-V provider.
    pub hyperv_debug: Option<HypervDebug>,
    pub boot_order: [BootDevice; 4],
    pub boot_menu: bool,
    pub uarts: Vec<UartConfig>,
    pub ide: Option<(IdeModel, Vec<DriveConfig>)>,
    pub ahci: Option<PortsConfig>,
    pub nvme: Option<PortsConfig>,
    /// A disk for each drive.
    pub virtio_blk: Option<PortsConfig>,
    /// At most one of each model.
    pub scsi: Vec<ScsiConfig>,
    pub floppies: Option<Vec<DriveConfig>>,
    /// Bytes per second of the bandwidth groups of disks, by name; 0 for no limit.
    pub disk_limits: BTreeMap<String, u64>,
    pub nics: Vec<NicConfig>,
    /// CPUID leaves that the settings override: leaf, subleaf, EAX, EBX, ECX, EDX.
    pub cpuid_overrides: Vec<[u32; 6]>,
    /// Set, but without effect yet, and harmless: one line each for VBox.log.
    pub notes: Vec<String>,
}

/// A kernel debugger for guests of the Hyper-V provider, by the options of `--paravirt-debug`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HypervDebug {
    /// Where it listens, by UDP.
    pub debugger: SocketAddr,
    pub interface: DebugInterface,
    /// The signature that the provider shows.
    vendor: [u8; 12],
}

impl HypervDebug {
    /// VirtualBox's options and defaults; `None` if they do not switch debugging on.
    fn parse(options: &str) -> Result<Option<Self>, String> {
        let (mut enabled, mut vendor) = (false, gim::hyperv_vendor());
        let (mut address, mut port) = (IpAddr::V4(Ipv4Addr::LOCALHOST), 50_000);
        let mut interface = DebugInterface { service: true, calls: false };
        for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').map_or((option, ""), |(k, v)| (k.trim(), v.trim()));
            let wrong = |what: &str| {
                format!("the Hyper-V debug option \"{key}\" in \"{options}\" (--paravirt-debug) {what}")
            };
            let flag = || match value {
                "0" => Ok(false),
                "1" => Ok(true),
                _ => Err(wrong("needs 0 or 1")),
            };
            match key {
                "enabled" => enabled = flag()?,
                "vendor" => {
                    vendor = value
                        .as_bytes()
                        .try_into()
                        .map_err(|_| wrong(&format!("has {} characters, and needs 12", value.len())))?;
                }
                "address" => {
                    address = value.parse().map_err(|_| wrong("needs an address like 127.0.0.1"))?;
                }
                "port" => port = value.parse().map_err(|_| wrong("needs a port's number"))?,
                "vsinterface" => interface.service = flag()?,
                "hypercallinterface" => interface.calls = flag()?,
                _ => {
                    return Err(wrong(
                        "is unknown; there are enabled, address, port, vendor, vsinterface and hypercallinterface",
                    ));
                }
            }
        }
        Ok(enabled.then_some(Self { debugger: (address, port).into(), interface, vendor }))
    }
}

/// The CPUs of a machine with hotplug, one bit each. The first is always there.
fn plugged(cpu: &settings::Cpu) -> u32 {
    let ids = cpu.plugged.iter().filter(|&&id| id < cpu.count.min(MAX_CPUS));
    ids.fold(1, |mask, id| mask | 1 << id)
}

impl MachineConfig {
    /// A machine with `ram` and one CPU and nothing attached, as tests build on.
    pub fn bare(name: &str, ram: ByteSize) -> Self {
        Self {
            name: name.to_owned(),
            folder: PathBuf::new(),
            uuid: Uuid::nil(),
            ram,
            vram: ByteSize::mib(16),
            cpus: 1,
            ioapic: true,
            acpi: true,
            hpet: false,
            rtc_utc: true,
            time_offset_ms: 0,
            long_mode: true,
            pae: true,
            x2apic: false,
            triple_fault_reset: false,
            tsc: None,
            dmi: Vec::new(),
            engine: EngineChoice::Default,
            hw_virt: HwVirt::default(),
            nested_hw_virt: false,
            cpu_profile: None,
            hotplug: None,
            execution_cap: 100,
            paravirt: gim::Provider::None,
            hyperv_vendor: gim::hyperv_vendor(),
            hyperv_debug: None,
            boot_order: [BootDevice::Floppy, BootDevice::Dvd, BootDevice::Disk, BootDevice::None],
            boot_menu: false,
            uarts: Vec::new(),
            ide: None,
            ahci: None,
            nvme: None,
            virtio_blk: None,
            scsi: Vec::new(),
            floppies: None,
            disk_limits: BTreeMap::new(),
            nics: Vec::new(),
            cpuid_overrides: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Takes over a machine's settings; `folder` is the machine's, for relative paths. On an error: every reason
    /// why the machine cannot start as it is set up.
    pub fn from_settings(m: &MachineSettings, folder: &Path) -> Result<Self, Vec<String>> {
        let hw = &m.hardware;
        let mut refused = Vec::new();
        let mut notes = Vec::new();
        let mut refuse = |wrong: bool, what: &str, mend: &str| {
            if wrong {
                refused.push(format!("{what} is not available yet: {mend}"));
            }
        };
        refuse(hw.chipset != w::Chipset::Piix3, "the ICH9 chipset", "use --chipset piix3");
        refuse(hw.firmware != w::Firmware::Bios, "EFI firmware", "use --firmware bios");
        refuse(hw.tpm.tpm_type != w::TpmType::None, "a trusted platform module", "use --tpm-type none");
        refuse(hw.iommu != w::Iommu::None, "an IOMMU", "use --iommu none");
        refuse(!hw.host_pci.is_empty(), "PCI passthrough", "detach the host's devices with --pci-detach");
        refuse(hw.cpu.count > MAX_CPUS, "more than 32 CPUs", "use --cpus 32 or less");
        refuse(!hw.bios.ioapic && hw.cpu.count > 1, "several CPUs without an I/O APIC", "use --ioapic on");
        refuse(
            hw.cpu.hotplug && !(hw.bios.acpi && hw.bios.ioapic),
            "CPUs that come and go without ACPI and an I/O APIC",
            "use --cpu-hotplug off, or --acpi on --ioapic on",
        );
        refuse(m.teleporter.enabled, "teleportation", "use --teleporter off");
        refuse(!m.state_file.is_empty(), "starting from a saved state", "discard it with discardstate");
        let cpu_profile = cpu_profile(&hw.cpu.profile);
        refuse(
            cpu_profile.is_none() && !matches!(hw.cpu.profile.as_str(), "" | "host"),
            &format!("the CPU profile \"{}\"", hw.cpu.profile),
            "use --cpu-profile host or a name of \"VBoxManage list cpu-profiles\"",
        );
        let mut engine = EngineChoice::Default;
        let tree = cfgm::Tree::from_extra_data(&m.extra_data);
        match tree.node(overrides::EM).string(overrides::ENGINE) {
            None | Some("" | "default") if hw.cpu.hw_virt => {}
            None | Some("" | "default") => engine = EngineChoice::Software,
            Some("hwvirt" | "native-api") => engine = EngineChoice::Kvm,
            Some("interpreter") => engine = EngineChoice::Interpreter,
            Some("recompiler") => engine = EngineChoice::Recompiler,
            Some(other) => refuse(
                true,
                &format!("the execution engine \"{other}\""),
                "use --vm-execution-engine default, hwvirt, native-api, interpreter or recompiler",
            ),
        }

        let mut ide: Option<(IdeModel, Vec<DriveConfig>)> = None;
        let (mut ahci, mut nvme, mut virtio_blk) = (None, None, None);
        let mut scsi: Vec<ScsiConfig> = Vec::new();
        let mut floppies = None;
        for controller in &hw.storage_controllers {
            let chip = match controller.controller_type {
                w::StorageControllerType::Piix3 => Chip::Ide(IdeModel::Piix3),
                w::StorageControllerType::Piix4 => Chip::Ide(IdeModel::Piix4),
                w::StorageControllerType::Ich6 => Chip::Ide(IdeModel::Ich6),
                w::StorageControllerType::IntelAhci => Chip::Ahci,
                w::StorageControllerType::Nvme => Chip::Nvme,
                w::StorageControllerType::VirtioBlk => Chip::VirtioBlk,
                w::StorageControllerType::BusLogic => Chip::Scsi(ScsiModel::BusLogic),
                w::StorageControllerType::LsiLogic => Chip::Scsi(ScsiModel::LsiLogic),
                w::StorageControllerType::LsiLogicSas => Chip::Scsi(ScsiModel::LsiLogicSas),
                w::StorageControllerType::VirtioScsi => Chip::Scsi(ScsiModel::Virtio),
                w::StorageControllerType::I82078 => Chip::Floppy,
                other => {
                    refuse(
                        true,
                        &format!("the storage controller type {} (\"{}\")", other.as_str(), controller.name),
                        "attach its media to a controller made with --add ide or --add sata",
                    );
                    continue;
                }
            };
            match (drives(controller, &m.media_registry, folder), chip) {
                (Ok(drives), Chip::Ide(model)) => ide = Some((model, drives)),
                (Ok(_), Chip::Ahci) if ahci.is_some() => refuse(
                    true,
                    &format!("a second AHCI controller (\"{}\")", controller.name),
                    "attach its media to the first",
                ),
                (Ok(drives), Chip::Ahci) => ahci = Some(PortsConfig::new(controller, drives)),
                (Ok(drives), Chip::Nvme) => nvme = Some(PortsConfig::new(controller, drives)),
                (Ok(drives), Chip::VirtioBlk) => virtio_blk = Some(PortsConfig::new(controller, drives)),
                (Ok(_), Chip::Scsi(model)) if scsi.iter().any(|other| other.model == model) => refuse(
                    true,
                    &format!(
                        "a second controller of the type {} (\"{}\")",
                        controller.controller_type.as_str(),
                        controller.name
                    ),
                    "attach its media to the first",
                ),
                (Ok(drives), Chip::Scsi(model)) => {
                    if model == ScsiModel::BusLogic && !drives.is_empty() {
                        notes.push(format!(
                            "the BIOS has no driver for BusLogic controllers: it cannot start from what is attached to \"{}\"",
                            controller.name
                        ));
                    }
                    scsi.push(ScsiConfig { model, ports: controller.port_count, drives });
                }
                (Ok(drives), Chip::Floppy) => floppies = Some(drives),
                (Err(why), _) => refuse(true, &why, "detach it"),
            }
        }

        let mut uarts = Vec::new();
        for port in hw.serial_ports.iter().filter(|p| p.enabled) {
            match uart(port, folder) {
                Ok(uart) => uarts.push(uart),
                Err(why) => refused.push(why),
            }
        }

        let mut wrong = Vec::new();
        let mut take = |value: Result<Option<u64>, cfgm::Error>| {
            value.unwrap_or_else(|e| {
                wrong.push(e.to_string());
                None
            })
        };
        let triple_fault_reset = take(tree.node(overrides::EM).integer(overrides::TRIPLE_FAULT_RESET));
        let tsc = take(tree.node(overrides::TM).integer(overrides::TSC_RATE));
        let dmi = DMI_NAMES
            .iter()
            .filter_map(|name| {
                let text = tree.node(overrides::PCBIOS).string(name)?;
                Some(((*name).to_owned(), text.to_owned()))
            })
            .collect();
        let hyperv_vendor = match tree.node(overrides::HYPERV).string(overrides::VENDOR).map(str::as_bytes) {
            None => None,
            Some(text) => {
                let vendor = <[u8; 12]>::try_from(text).ok();
                if vendor.is_none() {
                    refused.push(format!(
                        "the Hyper-V vendor in {}{}/{} has {} characters, and needs 12",
                        cfgm::PREFIX,
                        overrides::HYPERV,
                        overrides::VENDOR,
                        text.len()
                    ));
                }
                vendor
            }
        };
        let (mistakes, ignored) = tree.unused();
        refused.append(&mut wrong);
        refused.extend(mistakes.iter().map(cfgm::Error::to_string));
        notes.extend(
            ignored.iter().map(|key| format!("the extra-data key {key} concerns nothing this machine has")),
        );

        let mut debug = None;
        if m.effective_paravirt_provider() == w::ParavirtProvider::HyperV {
            match HypervDebug::parse(&hw.paravirt_debug) {
                Ok(found) => debug = found,
                Err(why) => refused.push(why),
            }
        }
        let mut nics = Vec::new();
        for nic in hw.network.iter().filter(|n| n.enabled) {
            match NicConfig::from_settings(m, nic, folder, &mut notes) {
                Ok(nic) => nics.extend(nic),
                Err(why) => refused.push(why),
            }
        }
        let mut note = |set: bool, text: &str| {
            if set {
                notes.push(text.to_owned());
            }
        };
        note(!hw.usb.controllers.is_empty(), "USB controllers are not available yet");
        note(
            !matches!(hw.pointing_hid, w::PointingHid::Ps2Mouse | w::PointingHid::None),
            "the pointing device is a PS/2 mouse: USB is not available yet",
        );
        note(
            !matches!(hw.keyboard_hid, w::KeyboardHid::Ps2Keyboard | w::KeyboardHid::None),
            "the keyboard is a PS/2 one: USB is not available yet",
        );
        note(hw.audio.enabled, "audio is not available yet");
        note(hw.remote_display.enabled, "the remote display is not available yet");
        note(hw.display.accelerate_3d, "3D acceleration is not available yet");
        note(hw.display.monitor_count > 1, "one monitor is available, the others are not yet");
        note(
            !matches!(hw.display.controller, w::GraphicsController::VBoxVga | w::GraphicsController::Null),
            "the graphics controller is VBoxVGA: VMware-compatible ones are not available yet",
        );
        note(!hw.shared_folders.is_empty(), "shared folders are not available yet");
        note(hw.parallel_ports.iter().any(|p| p.enabled), "parallel ports are not available yet");
        note(hw.memory_balloon_mb > 0, "the memory balloon is not available yet");
        note(m.recording.enabled, "recording is not available yet");
        let disk_groups = hw.bandwidth_groups.iter().filter(|g| g.group_type == w::BandwidthGroupType::Disk);

        if !refused.is_empty() {
            return Err(refused);
        }
        Ok(Self {
            name: m.name.clone(),
            folder: folder.to_owned(),
            uuid: hw.uuid.unwrap_or(m.uuid),
            ram: ByteSize::mib(hw.memory.ram_mb.into()),
            vram: ByteSize::mib(hw.display.vram_mb.into()),
            cpus: hw.cpu.count.max(1),
            ioapic: hw.bios.ioapic,
            acpi: hw.bios.acpi,
            hpet: hw.hpet,
            rtc_utc: hw.rtc_use_utc,
            time_offset_ms: hw.bios.time_offset,
            long_mode: hw.cpu.long_mode != settings::LongMode::Disabled,
            pae: hw.cpu.pae,
            x2apic: hw.cpu.x2apic,
            triple_fault_reset: triple_fault_reset.map_or(hw.cpu.triple_fault_reset, |v| v != 0),
            tsc: tsc.map(Hz),
            dmi,
            engine,
            hw_virt: HwVirt::from_settings(&hw.cpu),
            nested_hw_virt: hw.cpu.nested_hw_virt,
            cpu_profile,
            hotplug: hw.cpu.hotplug.then(|| plugged(&hw.cpu)),
            execution_cap: hw.cpu.execution_cap,
            paravirt: match m.effective_paravirt_provider() {
                w::ParavirtProvider::Minimal => gim::Provider::Minimal,
                w::ParavirtProvider::HyperV => gim::Provider::HyperV,
                w::ParavirtProvider::Kvm => gim::Provider::Kvm,
                _ => gim::Provider::None,
            },
            hyperv_vendor: hyperv_vendor.or(debug.map(|d| d.vendor)).unwrap_or(gim::hyperv_vendor()),
            hyperv_debug: debug,
            boot_order: hw.boot_order.map(|device| match device {
                w::BootDevice::None => BootDevice::None,
                w::BootDevice::Floppy => BootDevice::Floppy,
                w::BootDevice::Dvd => BootDevice::Dvd,
                w::BootDevice::HardDisk => BootDevice::Disk,
                w::BootDevice::Network => BootDevice::Network,
            }),
            boot_menu: hw.bios.boot_menu_mode != w::BootMenuMode::Disabled,
            uarts,
            ide,
            ahci,
            nvme,
            virtio_blk,
            scsi,
            floppies,
            disk_limits: disk_groups.map(|g| (g.name.clone(), g.max_bytes_per_sec)).collect(),
            nics,
            cpuid_overrides: hw
                .cpu
                .cpuid_leaves
                .iter()
                .map(|l| [l.index, l.subleaf, l.eax, l.ebx, l.ecx, l.edx])
                .collect(),
            notes,
        })
    }
}

/// The medium `id` with those above it in the registry, which are those that it depends on; the base first.
fn find_chain<'m>(media: &'m [Medium], id: Uuid, chain: &mut Vec<&'m Medium>) -> bool {
    media.iter().any(|medium| {
        chain.push(medium);
        let found = medium.uuid == id || find_chain(&medium.children, id, chain);
        if !found {
            chain.pop();
        }
        found
    })
}

fn drives(
    controller: &StorageController,
    registry: &MediaRegistry,
    folder: &Path,
) -> Result<Vec<DriveConfig>, String> {
    controller.attached.iter().map(|a| drive(controller, a, registry, folder)).collect()
}

fn drive(
    controller: &StorageController,
    a: &AttachedDevice,
    registry: &MediaRegistry,
    folder: &Path,
) -> Result<DriveConfig, String> {
    let place = format!("\"{}\" port {} device {}", controller.name, a.port, a.device);
    if a.host_drive.is_some() || a.pass_through {
        return Err(format!("the host's drive at {place}"));
    }
    let (kind, media) = match a.drive {
        w::DriveType::HardDisk => (DriveKind::Disk, &registry.hard_disks),
        w::DriveType::Dvd => (DriveKind::Dvd, &registry.dvd_images),
        w::DriveType::Floppy => (DriveKind::Floppy, &registry.floppy_images),
    };
    let medium = match a.image {
        None => None,
        Some(id) => {
            let mut chain = Vec::new();
            if !find_chain(media, id, &mut chain) {
                return Err(format!("the medium {{{id}}} at {place}, which is in no media registry and"));
            }
            // The base says it for the whole chain.
            let encryption = chain.first().and_then(|base| {
                Some(Encryption {
                    key_store: base.properties.get("CRYPT/KeyStore")?.clone(),
                    key_id: base.properties.get("CRYPT/KeyId").cloned().unwrap_or_default(),
                })
            });
            let is_target = |m: &Medium| vd::Format::from_name(&m.format) == Some(vd::Format::Iscsi);
            let target = match chain.first().filter(|base| is_target(base)) {
                None => None,
                Some(base) => {
                    let property = |name: &str| base.properties.get(name).map(String::as_str);
                    let source = vd::Source::iscsi(Path::new(&base.location), property);
                    Some(source.map_err(|e| format!("the disk at {place} ({:#})", anyhow::Error::new(e)))?)
                }
            };
            let file = |m: &&Medium| match is_target(m) {
                true => (PathBuf::from(&m.location), m.format.clone()),
                false => (folder.join(&m.location), m.format.clone()),
            };
            let mut files: Vec<_> = chain.iter().map(file).collect();
            let (path, format) = files.pop().unwrap_or_default();
            let of_type = |t| chain.last().is_some_and(|m| m.medium_type == t);
            Some(MediumConfig {
                path,
                format,
                parents: files,
                target,
                read_only: kind == DriveKind::Dvd || of_type(w::MediumType::Readonly),
                shareable: of_type(w::MediumType::Shareable),
                host_cache: controller.use_host_io_cache,
                uuid: id,
                encryption,
            })
        }
    };
    let small = |value: i32| u8::try_from(value).map_err(|_| format!("the drive at {place}"));
    Ok(DriveConfig {
        kind,
        controller: controller.name.clone(),
        port: small(a.port)?,
        device: small(a.device)?,
        medium,
        non_rotational: a.non_rotational,
        discard: a.discard,
        hot_pluggable: a.hot_pluggable,
        bootable: controller.bootable,
        bandwidth_group: a.bandwidth_group.clone(),
    })
}

fn uart(port: &SerialPort, folder: &Path) -> Result<UartConfig, String> {
    let number = port.slot + 1;
    let io_base = u16::try_from(port.io_base)
        .map_err(|_| format!("serial port {number} has the impossible I/O base 0x{:x}", port.io_base))?;
    let irq = u8::try_from(port.irq)
        .ok()
        .filter(|irq| *irq < 16)
        .ok_or_else(|| format!("serial port {number} has the impossible interrupt {}", port.irq))?;
    let path = || folder.join(&port.path);
    let mode = match port.mode {
        w::PortMode::Disconnected => UartMode::Disconnected,
        w::PortMode::RawFile => UartMode::File(path()),
        w::PortMode::HostDevice => UartMode::HostDevice(path()),
        w::PortMode::HostPipe if port.server => UartMode::PipeServer(path()),
        w::PortMode::HostPipe => UartMode::PipeClient(path()),
        w::PortMode::Tcp if port.server => UartMode::TcpServer(
            port.path
                .parse()
                .map_err(|_| format!("serial port {number}: \"{}\" is not a TCP port number", port.path))?,
        ),
        w::PortMode::Tcp => UartMode::TcpClient(port.path.clone()),
    };
    Ok(UartConfig { io_base: Port(io_base), irq, mode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvme_and_virtio_disks_come_with_their_ports_and_whether_the_bios_may_start_from_them() {
        let mut m = MachineSettings::default();
        let mut nvme = StorageController::new("NVMe", w::StorageBus::Pcie);
        nvme.port_count = 255;
        let mut blk = StorageController::new("Blk", w::StorageBus::VirtioBlk);
        (blk.port_count, blk.bootable) = (99, false);
        blk.attached = vec![AttachedDevice { drive: w::DriveType::Dvd, ..AttachedDevice::default() }];
        m.hardware.storage_controllers = vec![nvme, blk];
        let config = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap();
        let (nvme, blk) = (config.nvme.unwrap(), config.virtio_blk.unwrap());
        assert_eq!((nvme.ports, blk.ports), (255, 8));
        assert_eq!((blk.drives[0].bootable, blk.drives[0].controller.as_str()), (false, "Blk"));
    }

    #[test]
    fn everything_refused_is_named_with_its_mend() {
        let mut m = MachineSettings::default();
        m.hardware.chipset = w::Chipset::Ich9;
        m.hardware.firmware = w::Firmware::Efi;
        let reasons = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap_err();
        assert_eq!(reasons.len(), 2);
        assert!(reasons[0].contains("--chipset piix3") && reasons[1].contains("--firmware bios"));
    }

    #[test]
    fn a_cpu_profile_is_taken_by_its_name_and_refused_if_there_is_none_of_that_name() {
        let mut m = MachineSettings::default();
        m.hardware.cpu.profile = "Intel Core i7-6700K".into();
        let config = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap();
        assert_eq!(config.cpu_profile.unwrap().model, 94);
        m.hardware.cpu.profile = "Intel 80286".into();
        let reasons = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap_err();
        assert!(reasons[0].contains("80286") && reasons[0].contains("list cpu-profiles"));
    }

    #[test]
    fn a_sata_controller_comes_with_its_ports() {
        let mut m = MachineSettings::default();
        let mut sata = StorageController::new("SATA", w::StorageBus::Sata);
        sata.port_count = 4;
        sata.attached =
            vec![AttachedDevice { drive: w::DriveType::Dvd, port: 3, ..AttachedDevice::default() }];
        m.hardware.storage_controllers = vec![sata];
        let ahci = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap().ahci.unwrap();
        assert_eq!((ahci.ports, ahci.drives[0].port, ahci.drives[0].kind), (4, 3, DriveKind::Dvd));
    }

    #[test]
    fn an_encrypted_medium_comes_with_the_key_store_of_its_base() {
        let mut m = MachineSettings::default();
        let child = Medium { uuid: Uuid::from_u128(2), location: "b.vdi".into(), ..Medium::default() };
        let drive = AttachedDevice { image: Some(child.uuid), ..AttachedDevice::default() };
        let mut medium = Medium { uuid: Uuid::from_u128(1), location: "a.vdi".into(), ..Medium::default() };
        medium.children.push(child);
        let mut sata = StorageController::new("SATA", w::StorageBus::Sata);
        (sata.port_count, sata.attached) = (1, vec![drive]);
        m.hardware.storage_controllers = vec![sata];
        m.media_registry.hard_disks = vec![medium.clone()];
        let encryption = |m: &MachineSettings| {
            let ahci = MachineConfig::from_settings(m, Path::new("/vm")).unwrap().ahci.unwrap();
            ahci.drives[0].medium.clone().unwrap().encryption
        };
        assert_eq!(encryption(&m), None);
        medium.properties.insert("CRYPT/KeyStore".into(), "U0NORQ==".into());
        medium.properties.insert("CRYPT/KeyId".into(), "mine".into());
        m.media_registry.hard_disks = vec![medium];
        let wanted = Encryption { key_id: "mine".into(), key_store: "U0NORQ==".into() };
        assert_eq!(encryption(&m), Some(wanted));
    }

    #[test]
    fn scsi_controllers_come_once_of_each_type() {
        let mut m = MachineSettings::default();
        let mut sas = StorageController::new("SAS", w::StorageBus::Sas);
        sas.port_count = 12;
        let drive = AttachedDevice { drive: w::DriveType::Dvd, port: 11, ..AttachedDevice::default() };
        sas.attached = vec![drive];
        let scsi = StorageController::new("SCSI", w::StorageBus::Scsi);
        m.hardware.storage_controllers = vec![sas, scsi.clone()];
        let found = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap().scsi;
        assert_eq!(
            (found[0].model, found[0].ports, found[0].drives[0].port),
            (ScsiModel::LsiLogicSas, 12, 11)
        );
        assert_eq!(found[1].model, ScsiModel::LsiLogic);
        m.hardware.storage_controllers.push(StorageController { name: "other".into(), ..scsi });
        let reasons = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap_err();
        assert!(reasons[0].contains("a second controller of the type LsiLogic (\"other\")"), "{reasons:?}");
    }

    #[test]
    fn a_network_card_that_is_not_available_is_noted_and_does_not_stop_the_machine() {
        let mut m = MachineSettings::default();
        m.hardware.network[0].enabled = true;
        m.hardware.network[0].adapter_type = w::NetworkAdapterType::Ne2000;
        let config = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap();
        assert_eq!(config.notes.len(), 1);
    }

    #[test]
    fn debug_options_of_hyperv_are_virtualboxs() {
        let parse = HypervDebug::parse;
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("enabled=0,vendor=VBoxVBoxVBox"), Ok(None));
        let plain = parse("enabled=1").unwrap().unwrap();
        assert_eq!(
            (plain.debugger.to_string().as_str(), &plain.vendor),
            ("127.0.0.1:50000", b"Microsoft Hv")
        );
        assert_eq!(plain.interface, DebugInterface { service: true, calls: false });
        let all = "enabled=1,address=192.168.32.1,port=55000,vendor=VBoxVBoxVBox,vsinterface=0,hypercallinterface=1";
        let all = parse(all).unwrap().unwrap();
        assert_eq!((all.debugger.to_string().as_str(), &all.vendor), ("192.168.32.1:55000", b"VBoxVBoxVBox"));
        assert_eq!(all.interface, DebugInterface { service: false, calls: true });
        for (wrong, word) in [
            ("enabled=1,colour=red", "colour"),
            ("enabled=yes", "0 or 1"),
            ("vendor=short", "12"),
            ("port=70000", "number"),
            ("address=here", "127.0.0.1"),
        ] {
            assert!(
                parse(wrong).is_err_and(|text| text.contains(word) && text.contains("--paravirt-debug")),
                "{wrong}"
            );
        }
    }

    #[test]
    fn relative_paths_start_in_the_machine_folder() {
        let mut m = MachineSettings::default();
        let port = &mut m.hardware.serial_ports[0];
        (port.enabled, port.mode, port.path) = (true, w::PortMode::RawFile, "com1.log".into());
        let config = MachineConfig::from_settings(&m, Path::new("/vm")).unwrap();
        assert_eq!(config.uarts[0].mode, UartMode::File("/vm/com1.log".into()));
    }
}
