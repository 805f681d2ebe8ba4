//! What a machine is like when it is created.

use uuid::Uuid;

use crate::model::*;
use crate::ostypes::OsType;
use crate::words::*;

/// The first three bytes of the MAC addresses that VirtualBox gives out.
const MAC_PREFIX: &str = "080027";

/// A new MAC address: twelve hexadecimal digits, the first half VirtualBox's own.
pub fn generate_mac_address() -> String {
    // The last bytes of a random UUID are random in all their bits.
    let random = *Uuid::new_v4().as_bytes();
    format!("{MAC_PREFIX}{:02X}{:02X}{:02X}", random[13], random[14], random[15])
}

impl MachineSettings {
    /// The machine that `IVirtualBox::createMachine` makes: what its guest OS type cannot do without is set, all
    /// else is at its general default. The first network card is there and plugged into NAT.
    pub fn new_for(os: &OsType, name: &str, uuid: Uuid) -> Self {
        let mut machine = Self {
            uuid,
            name: name.to_owned(),
            os_type: os.id.to_owned(),
            snapshot_folder: "Snapshots".into(),
            last_state_change: Some(Timestamp::now()),
            ..Self::default()
        };
        let hardware = &mut machine.hardware;
        hardware.firmware = os.recommended_firmware();
        hardware.cpu.long_mode = if os.is_64bit() { LongMode::Enabled } else { LongMode::Disabled };
        hardware.cpu.x2apic = os.recommended_x2apic();
        hardware.cpu.large_pages = true;
        hardware.bios.ioapic = os.recommended_ioapic();
        hardware.bios.smbios_uuid_little_endian = true;
        hardware.bios.auto_serial_num_gen = true;
        hardware.tpm.tpm_type = os.recommended_tpm();
        for port in &mut hardware.serial_ports {
            port.enabled = port.slot < os.serial_ports();
        }
        for adapter in &mut hardware.network {
            adapter.adapter_type = os.network_adapter();
        }
        let first = &mut hardware.network[0];
        first.enabled = true;
        first.attachment = NetworkAttachment::Nat;
        first.mac_address = generate_mac_address();
        if os.id == "VBoxBS_64" {
            machine
                .extra_data
                .insert("VBoxInternal/Devices/VMMDev/0/Config/TestingEnabled".into(), "1".into());
        }
        machine
    }

    /// Everything that the machine's guest OS type recommends, as `IMachine::applyDefaults` sets it
    /// (`createvm --default`). Storage controllers and USB are added to what there is.
    pub fn apply_os_defaults(&mut self, os: &OsType) {
        let hardware = &mut self.hardware;
        hardware.cpu.long_mode = if os.is_64bit() { LongMode::Enabled } else { LongMode::Disabled };
        hardware.cpu.x2apic = os.recommended_x2apic();
        hardware.cpu.apic = true;
        hardware.cpu.hw_virt = true;
        hardware.cpu.count = os.recommended_cpus();
        hardware.cpu.pae = os.recommended_pae();
        hardware.cpu.triple_fault_reset = os.recommended_tf_reset();
        hardware.bios.ioapic = os.recommended_ioapic();
        hardware.memory.ram_mb = os.recommended_ram_mb();
        hardware.display.controller = os.recommended_graphics();
        hardware.display.vram_mb = os.recommended_vram_mb();
        hardware.display.accelerate_2d_video = false;
        hardware.display.accelerate_3d = false;
        hardware.firmware = os.recommended_firmware();
        hardware.hpet = os.recommended_hpet();
        hardware.rtc_use_utc = os.recommended_rtc_use_utc();
        hardware.change_chipset(os.recommended_chipset());
        hardware.iommu = Iommu::None;
        hardware.tpm.tpm_type = os.recommended_tpm();
        hardware.audio.controller = os.audio_controller();
        hardware.audio.codec = os.audio_codec();
        hardware.audio.enabled = true;
        hardware.audio.enabled_out = true;
        self.recording = Recording::default();
        for adapter in &mut self.hardware.network {
            adapter.adapter_type = os.network_adapter();
        }
        self.add_recommended_storage(os);
        self.add_recommended_usb(os);
    }

    fn add_recommended_storage(&mut self, os: &OsType) {
        let controllers = &mut self.hardware.storage_controllers;
        let mut add = |kind: StorageControllerType, ports: Option<u32>| {
            let bus = kind.bus();
            let name = controller_name(bus);
            if controllers.iter().all(|c| c.name != name) {
                let mut controller = StorageController::new(name, bus);
                controller.controller_type = kind;
                controller.port_count = ports.unwrap_or(controller.port_count);
                controllers.push(controller);
            }
        };
        let (dvd, disk) = (os.dvd_controller(), os.hard_disk_controller());
        let separate = dvd != disk && dvd.bus() != disk.bus();
        // Windows and OS X take long over many ports.
        let ports = |kind| (kind == StorageControllerType::IntelAhci).then_some(if separate { 1 } else { 2 });
        if os.recommended_floppy() {
            add(StorageControllerType::I82078, None);
        }
        add(dvd, ports(dvd));
        if separate {
            add(disk, ports(disk));
        }
    }

    fn add_recommended_usb(&mut self, os: &OsType) {
        let hardware = &mut self.hardware;
        let mut add = |kind: UsbControllerType| {
            if !hardware.usb.has(kind) {
                hardware
                    .usb
                    .controllers
                    .push(UsbController { name: kind.as_str().into(), controller_type: kind });
            }
        };
        let mut ohci = true;
        if os.recommended_usb3() {
            // An xHCI controller serves what OHCI serves.
            add(UsbControllerType::Xhci);
        } else if os.recommended_usb() {
            add(UsbControllerType::Ohci);
            add(UsbControllerType::Ehci);
        } else {
            ohci = false;
        }
        if (os.recommended_usb_hid() || os.recommended_usb_tablet()) && !ohci {
            add(UsbControllerType::Ohci);
        }
        if os.recommended_usb_hid() {
            hardware.keyboard_hid = KeyboardHid::UsbKeyboard;
            hardware.pointing_hid = PointingHid::UsbMouse;
        }
        if os.recommended_usb_tablet() {
            hardware.pointing_hid = PointingHid::UsbTablet;
        }
    }
}

/// The name that clients without wishes give a controller.
fn controller_name(bus: StorageBus) -> &'static str {
    match bus {
        StorageBus::Ide => "IDE",
        StorageBus::Sata => "SATA",
        StorageBus::Scsi => "SCSI",
        StorageBus::Floppy => "Floppy",
        StorageBus::Sas => "SAS",
        StorageBus::Usb => "USB",
        StorageBus::Pcie => "PCIe",
        StorageBus::VirtioScsi => "VirtIO",
        StorageBus::VirtioBlk => "VirtIO Block",
    }
}
