//! The virtual hardware of a machine or of a snapshot.

use uuid::Uuid;

use super::shared::{NatRule, StringMap, UsbDeviceFilter};
use crate::words::*;

/// Everything under `<Hardware>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// Hardware version, "2" since VirtualBox 3.0.
    pub version: String,
    /// The UUID shown to the guest, if it is not the machine's own.
    pub uuid: Option<Uuid>,
    pub cpu: Cpu,
    pub memory: Memory,
    pub firmware: Firmware,
    pub pointing_hid: PointingHid,
    pub keyboard_hid: KeyboardHid,
    pub hpet: bool,
    pub chipset: Chipset,
    pub paravirt_provider: ParavirtProvider,
    pub paravirt_debug: String,
    pub iommu: Iommu,
    /// First to try comes first.
    pub boot_order: [BootDevice; 4],
    pub display: Display,
    pub remote_display: RemoteDisplay,
    pub bios: Bios,
    pub nvram: Nvram,
    pub tpm: Tpm,
    pub usb: Usb,
    /// All slots that the chipset offers, index and `slot` agreeing.
    pub network: Vec<NetworkAdapter>,
    pub serial_ports: [SerialPort; 4],
    pub parallel_ports: [ParallelPort; 2],
    pub audio: Audio,
    /// The real-time clock tells UTC instead of local time. VirtualBox keeps this with the machine, not
    /// with its snapshots, though the file has it here.
    pub rtc_use_utc: bool,
    pub shared_folders: Vec<SharedFolder>,
    pub clipboard_mode: TransferMode,
    pub clipboard_file_transfers: bool,
    pub drag_and_drop_mode: TransferMode,
    pub io_cache: IoCache,
    pub bandwidth_groups: Vec<BandwidthGroup>,
    pub host_pci: Vec<HostPciDevice>,
    pub emulated_usb_card_reader: bool,
    /// Front end for `startvm` without `--type`; empty for the installation's default.
    pub default_frontend: String,
    /// Megabytes that the balloon takes from the guest.
    pub memory_balloon_mb: u32,
    pub guest_properties: Vec<GuestProperty>,
    pub storage_controllers: Vec<StorageController>,
}

impl Default for Hardware {
    fn default() -> Self {
        Self {
            version: "2".into(),
            uuid: None,
            cpu: Cpu::default(),
            memory: Memory::default(),
            firmware: Firmware::default(),
            pointing_hid: PointingHid::default(),
            keyboard_hid: KeyboardHid::default(),
            hpet: false,
            chipset: Chipset::default(),
            paravirt_provider: ParavirtProvider::default(),
            paravirt_debug: String::new(),
            iommu: Iommu::default(),
            boot_order: Self::DEFAULT_BOOT_ORDER,
            display: Display::default(),
            remote_display: RemoteDisplay::default(),
            bios: Bios::default(),
            nvram: Nvram::default(),
            tpm: Tpm::default(),
            usb: Usb::default(),
            network: NetworkAdapter::slots(Chipset::Piix3),
            serial_ports: SerialPort::slots(),
            parallel_ports: ParallelPort::slots(),
            audio: Audio::default(),
            rtc_use_utc: false,
            shared_folders: Vec::new(),
            clipboard_mode: TransferMode::default(),
            clipboard_file_transfers: false,
            drag_and_drop_mode: TransferMode::default(),
            io_cache: IoCache::default(),
            bandwidth_groups: Vec::new(),
            host_pci: Vec::new(),
            emulated_usb_card_reader: false,
            default_frontend: String::new(),
            memory_balloon_mb: 0,
            guest_properties: Vec::new(),
            storage_controllers: Vec::new(),
        }
    }
}

impl Hardware {
    /// The boot order that files leave out.
    pub const DEFAULT_BOOT_ORDER: [BootDevice; 4] =
        [BootDevice::Floppy, BootDevice::Dvd, BootDevice::HardDisk, BootDevice::None];

    /// The storage controller called `name`.
    pub fn storage_controller(&self, name: &str) -> Option<&StorageController> {
        self.storage_controllers.iter().find(|c| c.name == name)
    }

    /// The storage controller called `name`.
    pub fn storage_controller_mut(&mut self, name: &str) -> Option<&mut StorageController> {
        self.storage_controllers.iter_mut().find(|c| c.name == name)
    }

    /// Sets the chipset and gives the machine the network slots that it has.
    pub fn change_chipset(&mut self, chipset: Chipset) {
        self.chipset = chipset;
        self.network.truncate(chipset.max_network_adapters());
        for slot in self.network.len()..chipset.max_network_adapters() {
            self.network.push(NetworkAdapter::new(slot as u32));
        }
    }
}

/// Whether 64-bit guests see long mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongMode {
    #[default]
    Enabled,
    Disabled,
    /// Files before version 1.14 did not say; VirtualBox then goes by the guest OS type.
    Legacy,
}

/// `<CPU>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    pub count: u32,
    pub hotplug: bool,
    /// Per cent of a host CPU's time that each virtual CPU may use.
    pub execution_cap: u32,
    pub portability_level: u32,
    /// Name of a CPU profile, `host` for the host's own.
    pub profile: String,
    pub hw_virt: bool,
    pub nested_paging: bool,
    pub vpid: bool,
    pub unrestricted_execution: bool,
    pub pae: bool,
    pub ibpb_on_vm_exit: bool,
    pub ibpb_on_vm_entry: bool,
    pub spec_ctrl: bool,
    pub spec_ctrl_by_host: bool,
    pub l1d_flush_on_sched: bool,
    pub l1d_flush_on_vm_entry: bool,
    pub mds_clear_on_sched: bool,
    pub mds_clear_on_vm_entry: bool,
    pub nested_hw_virt: bool,
    pub virt_vmsave_vmload: bool,
    pub long_mode: LongMode,
    pub triple_fault_reset: bool,
    pub apic: bool,
    pub x2apic: bool,
    pub large_pages: bool,
    pub hw_virt_force: bool,
    pub use_native_api: bool,
    /// Ids of the CPUs plugged in; only kept with `hotplug`.
    pub plugged: Vec<u32>,
    /// CPUID leaves that override the profile's.
    pub cpuid_leaves: Vec<CpuIdLeaf>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self {
            count: 1,
            hotplug: false,
            execution_cap: 100,
            portability_level: 0,
            profile: "host".into(),
            hw_virt: true,
            nested_paging: true,
            vpid: true,
            unrestricted_execution: true,
            pae: true,
            ibpb_on_vm_exit: false,
            ibpb_on_vm_entry: false,
            spec_ctrl: false,
            spec_ctrl_by_host: false,
            l1d_flush_on_sched: true,
            l1d_flush_on_vm_entry: false,
            mds_clear_on_sched: true,
            mds_clear_on_vm_entry: false,
            nested_hw_virt: false,
            virt_vmsave_vmload: true,
            long_mode: LongMode::Enabled,
            triple_fault_reset: false,
            apic: true,
            x2apic: false,
            // Files that do not say mean "off" on a Linux host; machines are created with "on".
            large_pages: false,
            hw_virt_force: false,
            use_native_api: false,
            plugged: Vec::new(),
            cpuid_leaves: Vec::new(),
        }
    }
}

/// A CPUID leaf that overrides the profile's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuIdLeaf {
    pub index: u32,
    pub subleaf: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// `<Memory>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// RAM in megabytes.
    pub ram_mb: u32,
    pub page_fusion: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self { ram_mb: 128, page_fusion: false }
    }
}

/// `<Display>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Display {
    pub controller: GraphicsController,
    /// Video RAM in megabytes.
    pub vram_mb: u32,
    pub monitor_count: u32,
    pub accelerate_3d: bool,
    pub accelerate_2d_video: bool,
}

impl Default for Display {
    fn default() -> Self {
        Self {
            controller: GraphicsController::default(),
            vram_mb: 8,
            monitor_count: 1,
            accelerate_3d: false,
            accelerate_2d_video: false,
        }
    }
}

/// `<RemoteDisplay>`: the VRDE server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteDisplay {
    pub enabled: bool,
    pub auth_type: AuthType,
    /// Milliseconds.
    pub auth_timeout: u32,
    pub auth_library: String,
    pub allow_multi_connection: bool,
    pub reuse_single_connection: bool,
    /// Extension pack that provides the server; empty for the default one.
    pub ext_pack: String,
    /// `TCP/Ports`, `TCP/Address`, `VideoChannel/Enabled` …
    pub properties: StringMap,
}

impl Default for RemoteDisplay {
    fn default() -> Self {
        Self {
            enabled: false,
            auth_type: AuthType::default(),
            auth_timeout: 5000,
            auth_library: String::new(),
            allow_multi_connection: false,
            reuse_single_connection: false,
            ext_pack: String::new(),
            properties: StringMap::new(),
        }
    }
}

/// `<BIOS>`, without the NVRAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bios {
    pub acpi: bool,
    pub ioapic: bool,
    pub apic_mode: ApicMode,
    pub logo_fade_in: bool,
    pub logo_fade_out: bool,
    /// Milliseconds.
    pub logo_display_time: u32,
    pub logo_image_path: String,
    pub boot_menu_mode: BootMenuMode,
    /// Milliseconds by which the guest's clock is ahead of the host's.
    pub time_offset: i64,
    pub pxe_debug: bool,
    /// Files that do not say mean "no"; machines are created with "yes".
    pub smbios_uuid_little_endian: bool,
    /// Number the disks' serials and the like automatically; as above for files that do not say.
    pub auto_serial_num_gen: bool,
}

impl Default for Bios {
    fn default() -> Self {
        Self {
            acpi: true,
            ioapic: false,
            apic_mode: ApicMode::default(),
            logo_fade_in: true,
            logo_fade_out: true,
            logo_display_time: 0,
            logo_image_path: String::new(),
            boot_menu_mode: BootMenuMode::default(),
            time_offset: 0,
            pxe_debug: false,
            smbios_uuid_little_endian: false,
            auto_serial_num_gen: false,
        }
    }
}

/// The file that keeps the firmware's variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nvram {
    pub path: String,
    pub key_id: String,
    pub key_store: String,
}

/// `<TrustedPlatformModule>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tpm {
    pub tpm_type: TpmType,
    pub location: String,
}

/// USB controllers and the filters that choose devices of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usb {
    pub controllers: Vec<UsbController>,
    pub device_filters: Vec<UsbDeviceFilter>,
}

impl Usb {
    /// Whether a controller of this kind is present.
    pub fn has(&self, kind: UsbControllerType) -> bool {
        self.controllers.iter().any(|c| c.controller_type == kind)
    }
}

/// A USB controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UsbController {
    pub name: String,
    pub controller_type: UsbControllerType,
}

/// The NAT engine of a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nat {
    /// Network in CIDR notation; empty for `10.0.<slot + 2>.0/24`.
    pub network: String,
    pub bind_ip: String,
    /// Bytes; 0 for the engine's default, as for the four buffer sizes (kilobytes).
    pub mtu: u32,
    pub sock_rcv: u32,
    pub sock_snd: u32,
    pub tcp_rcv: u32,
    pub tcp_snd: u32,
    pub tftp_prefix: String,
    pub tftp_boot_file: String,
    pub tftp_next_server: String,
    pub dns_pass_domain: bool,
    pub dns_proxy: bool,
    pub dns_use_host_resolver: bool,
    pub alias_log: bool,
    pub alias_proxy_only: bool,
    pub alias_use_same_ports: bool,
    /// The guest reaches the host's loopback through the gateway address. Not kept for cards that are not
    /// there: neither enabled nor attached, without MAC address. Files that do not say are read as
    /// "yes" by every VirtualBox, though 7.0 leaves the attribute out when it means "no"; "no" is
    /// therefore always written.
    pub localhost_reachable: bool,
    /// In the order of their names.
    pub rules: Vec<NatRule>,
}

impl Default for Nat {
    fn default() -> Self {
        Self {
            network: String::new(),
            bind_ip: String::new(),
            mtu: 0,
            sock_rcv: 0,
            sock_snd: 0,
            tcp_rcv: 0,
            tcp_snd: 0,
            tftp_prefix: String::new(),
            tftp_boot_file: String::new(),
            tftp_next_server: String::new(),
            dns_pass_domain: true,
            dns_proxy: false,
            dns_use_host_resolver: false,
            alias_log: false,
            alias_proxy_only: false,
            alias_use_same_ports: false,
            localhost_reachable: true,
            rules: Vec::new(),
        }
    }
}

/// A network card. The parameters of attachments not in use are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkAdapter {
    pub slot: u32,
    pub adapter_type: NetworkAdapterType,
    pub enabled: bool,
    /// Twelve hexadecimal digits without separators; empty for one not yet generated.
    pub mac_address: String,
    pub cable_connected: bool,
    /// Kilobits per second; 0 for the card's default.
    pub line_speed: u32,
    pub promisc_policy: PromiscPolicy,
    pub trace_enabled: bool,
    pub trace_file: String,
    pub attachment: NetworkAttachment,
    pub nat: Nat,
    pub bridged_interface: String,
    pub host_only_interface: String,
    pub host_only_network: String,
    pub internal_network: String,
    pub generic_driver: String,
    pub generic_properties: StringMap,
    pub nat_network: String,
    pub cloud_network: String,
    /// 1 to 4 from highest to lowest; 0 for lowest.
    pub boot_priority: u32,
    pub bandwidth_group: String,
}

impl Default for NetworkAdapter {
    fn default() -> Self {
        Self::new(0)
    }
}

impl NetworkAdapter {
    /// The card in `slot` as a file means it that does not name it.
    pub fn new(slot: u32) -> Self {
        Self {
            slot,
            adapter_type: NetworkAdapterType::default(),
            enabled: false,
            mac_address: String::new(),
            cable_connected: true,
            line_speed: 0,
            promisc_policy: PromiscPolicy::default(),
            trace_enabled: false,
            trace_file: String::new(),
            attachment: NetworkAttachment::default(),
            nat: Nat { localhost_reachable: false, ..Nat::default() },
            bridged_interface: String::new(),
            host_only_interface: String::new(),
            host_only_network: String::new(),
            internal_network: String::new(),
            generic_driver: String::new(),
            generic_properties: StringMap::new(),
            nat_network: String::new(),
            cloud_network: String::new(),
            boot_priority: 0,
            bandwidth_group: String::new(),
        }
    }

    /// All slots of a machine with `chipset`.
    pub fn slots(chipset: Chipset) -> Vec<Self> {
        (0..chipset.max_network_adapters() as u32).map(Self::new).collect()
    }
}

/// A serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SerialPort {
    pub slot: u32,
    pub enabled: bool,
    pub io_base: u32,
    pub irq: u32,
    pub mode: PortMode,
    /// Host file, device, pipe or `host:port`, by `mode`.
    pub path: String,
    /// Pipe and TCP: the VM creates the end point instead of connecting to it.
    pub server: bool,
    pub uart_type: UartType,
}

impl SerialPort {
    /// The I/O base and interrupt of COM1 to COM4.
    pub const RESOURCES: [(u32, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

    /// The disabled port in `slot`, with the resources that PCs give it.
    pub fn new(slot: u32) -> Self {
        let (io_base, irq) = Self::RESOURCES[slot as usize % 4];
        Self { slot, io_base, irq, ..Self::default() }
    }

    /// All four ports.
    pub fn slots() -> [Self; 4] {
        std::array::from_fn(|slot| Self::new(slot as u32))
    }
}

/// A parallel port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParallelPort {
    pub slot: u32,
    pub enabled: bool,
    pub io_base: u32,
    pub irq: u32,
    pub path: String,
}

impl ParallelPort {
    /// The I/O base and interrupt of LPT1 and LPT2.
    pub const RESOURCES: [(u32, u32); 2] = [(0x378, 7), (0x278, 5)];

    /// The disabled port in `slot`, with the resources that PCs give it.
    pub fn new(slot: u32) -> Self {
        let (io_base, irq) = Self::RESOURCES[slot as usize % 2];
        Self { slot, io_base, irq, ..Self::default() }
    }

    /// Both ports.
    pub fn slots() -> [Self; 2] {
        std::array::from_fn(|slot| Self::new(slot as u32))
    }
}

/// `<AudioAdapter>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audio {
    pub enabled: bool,
    pub enabled_in: bool,
    pub enabled_out: bool,
    pub controller: AudioController,
    pub codec: AudioCodec,
    pub driver: AudioDriver,
    pub properties: StringMap,
}

/// A folder of the host that the guest may mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedFolder {
    pub name: String,
    pub host_path: String,
    pub writable: bool,
    pub auto_mount: bool,
    pub auto_mount_point: String,
}

/// `<IoCache>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoCache {
    pub enabled: bool,
    /// Megabytes.
    pub size_mb: u32,
}

impl Default for IoCache {
    fn default() -> Self {
        Self { enabled: true, size_mb: 5 }
    }
}

/// A limit shared by several disks or network cards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BandwidthGroup {
    pub name: String,
    pub group_type: BandwidthGroupType,
    pub max_bytes_per_sec: u64,
}

/// A PCI device of the host given to the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPciDevice {
    pub host_address: u32,
    pub guest_address: u32,
    pub name: String,
}

/// A guest property that outlives the VM process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestProperty {
    pub name: String,
    pub value: String,
    /// Nanoseconds since 1970.
    pub timestamp: u64,
    /// Words such as `TRANSIENT, RDONLYGUEST`.
    pub flags: String,
}

/// A storage controller with what is attached to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StorageController {
    pub name: String,
    pub controller_type: StorageControllerType,
    pub port_count: u32,
    /// Number among the controllers of the same kind.
    pub instance: u32,
    pub use_host_io_cache: bool,
    pub bootable: bool,
    pub attached: Vec<AttachedDevice>,
}

impl StorageController {
    /// A new controller on `bus`, as `IMachine::addStorageController` makes it.
    pub fn new(name: &str, bus: StorageBus) -> Self {
        Self {
            name: name.to_owned(),
            controller_type: bus.default_controller(),
            port_count: bus.ports().0,
            instance: 0,
            use_host_io_cache: matches!(bus, StorageBus::Ide | StorageBus::Floppy),
            bootable: true,
            attached: Vec::new(),
        }
    }

    /// The bus that the controller's chip drives.
    pub fn bus(&self) -> StorageBus {
        self.controller_type.bus()
    }
}

/// A drive, and the medium in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachedDevice {
    pub drive: DriveType,
    pub port: i32,
    pub device: i32,
    /// Image in the drive, by its UUID in a media registry. Always there for hard disks.
    pub image: Option<Uuid>,
    /// Drive of the host, for DVD and floppy drives.
    pub host_drive: Option<String>,
    pub pass_through: bool,
    pub temp_eject: bool,
    /// The guest of the running machine has ejected the medium. In no file.
    pub ejected: bool,
    pub non_rotational: bool,
    pub discard: bool,
    pub hot_pluggable: bool,
    pub bandwidth_group: String,
}
