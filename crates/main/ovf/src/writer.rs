//! Descriptors out of machines' settings.

use std::fmt::Write as _;

use settings::{
    MachineSettings, NetworkAdapterType, NetworkAttachment, OsType, StorageBus, StorageControllerType,
};
use uuid::Uuid;

use crate::cim::cim_of;
use crate::error::Error;
use crate::machine;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OvfVersion {
    V0_9,
    #[default]
    V1_0,
    V2_0,
}

/// Texts about a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Product {
    pub name: String,
    pub product: String,
    pub product_url: String,
    pub vendor: String,
    pub vendor_url: String,
    pub version: String,
    pub description: String,
    pub license: String,
}

/// An image of a machine, in the order of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemDisk {
    /// Name in the package.
    pub file: String,
    /// Bytes in the package.
    pub file_size: u64,
    /// Bytes that a guest sees.
    pub capacity: u64,
    /// The UUID of the image in the package.
    pub uuid: Uuid,
    /// Where it is attached.
    pub controller: String,
    pub port: i32,
    pub device: i32,
    pub dvd: bool,
}

/// A machine to describe. The settings are already what shall be in the package: images by the UUIDs of `disks`.
#[derive(Clone, Debug)]
pub struct System {
    pub product: Product,
    pub settings: MachineSettings,
    pub disks: Vec<SystemDisk>,
}

fn escape(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).fold(
        String::with_capacity(text.len()),
        |mut out, c| {
            match c {
                '&' => out.push_str("&amp;"),
                '<' => out.push_str("&lt;"),
                '>' => out.push_str("&gt;"),
                '"' => out.push_str("&quot;"),
                c => out.push(c),
            }
            out
        },
    )
}

/// Lines with their depth.
struct Text {
    out: String,
    depth: usize,
}

impl Text {
    fn line(&mut self, line: &str) {
        let _ = writeln!(self.out, "{:width$}{line}", "", width = self.depth * 2);
    }

    fn open(&mut self, tag: &str) {
        self.line(&format!("<{tag}>"));
        self.depth += 1;
    }

    fn close(&mut self, name: &str) {
        self.depth -= 1;
        self.line(&format!("</{name}>"));
    }

    fn element(&mut self, name: &str, text: &str) {
        self.line(&format!("<{name}>{}</{name}>", escape(text)));
    }
}

/// The text of a descriptor.
pub fn write(version: OvfVersion, systems: &[System]) -> Result<String, Error> {
    let mut t = Text { out: "<?xml version=\"1.0\"?>\n".into(), depth: 0 };
    let old = version == OvfVersion::V0_9;
    let (number, envelope) = match version {
        OvfVersion::V0_9 => ("0.9", "http://www.vmware.com/schema/ovf/1/envelope"),
        OvfVersion::V1_0 => ("1.0", "http://schemas.dmtf.org/ovf/envelope/1"),
        OvfVersion::V2_0 => ("2.0", "http://schemas.dmtf.org/ovf/envelope/2"),
    };
    let mut name_spaces = format!("xmlns=\"{envelope}\" xmlns:ovf=\"{envelope}\"");
    for (prefix, uri) in [
        ("rasd", "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"),
        ("vssd", "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"),
        ("xsi", "http://www.w3.org/2001/XMLSchema-instance"),
        ("vbox", "http://www.virtualbox.org/ovf/machine"),
    ] {
        let _ = write!(name_spaces, " xmlns:{prefix}=\"{uri}\"");
    }
    if version == OvfVersion::V2_0 {
        for (prefix, class) in
            [("epasd", "CIM_EthernetPortAllocationSettingData"), ("sasd", "CIM_StorageAllocationSettingData")]
        {
            let _ = write!(
                name_spaces,
                " xmlns:{prefix}=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/{class}.xsd\""
            );
        }
    }
    t.open(&format!("Envelope ovf:version=\"{number}\" xml:lang=\"en-US\" {name_spaces}"));
    let disks = || systems.iter().flat_map(|s| &s.disks).enumerate();
    match disks().next() {
        None => t.line("<References/>"),
        Some(_) => {
            t.open("References");
            for (i, disk) in disks() {
                t.line(&format!(
                    "<File ovf:id=\"file{}\" ovf:href=\"{}\" ovf:size=\"{}\"/>",
                    i + 1,
                    escape(&disk.file),
                    disk.file_size
                ));
            }
            t.close("References");
        }
    }
    section(&mut t, old, "DiskSection", "", "List of the virtual disks used in the package", |t| {
        for (i, disk) in disks() {
            let number = i + 1;
            let format = match (disk.dvd, old) {
                (true, _) => "http://www.ecma-international.org/publications/standards/Ecma-119.htm",
                (false, true) => "http://www.vmware.com/specifications/vmdk.html#sparse",
                (false, false) => "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized",
            };
            t.line(&format!(
                "<Disk ovf:capacity=\"{}\" ovf:diskId=\"vmdisk{number}\" ovf:fileRef=\"file{number}\" ovf:format=\"{format}\" vbox:uuid=\"{}\"/>",
                disk.capacity, disk.uuid
            ));
        }
        Ok(())
    })?;
    section(&mut t, old, "NetworkSection", "", "Logical networks used in the package", |t| {
        let mut names: Vec<&str> = systems
            .iter()
            .flat_map(|s| {
                s.settings.hardware.network.iter().filter(|n| n.enabled).map(|n| network_name(n.attachment))
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            t.open(&format!("Network ovf:name=\"{name}\""));
            t.element("Description", "Logical network used by this appliance.");
            t.close("Network");
        }
        Ok(())
    })?;
    let collection = systems.len() > 1;
    let (collection_tag, collection_end) = match old {
        true => ("Content ovf:id=\"\" xsi:type=\"ovf:VirtualSystemCollection_Type\"", "Content"),
        false => ("VirtualSystemCollection ovf:id=\"\"", "VirtualSystemCollection"),
    };
    if collection {
        t.open(collection_tag);
        t.element("Info", "Group of virtual systems");
    }
    let mut first = 1;
    for system in systems {
        write_system(&mut t, version, system, first)?;
        first += system.disks.len();
    }
    if collection {
        t.close(collection_end);
    }
    t.close("Envelope");
    Ok(t.out)
}

fn network_name(attachment: NetworkAttachment) -> &'static str {
    match attachment {
        NetworkAttachment::Nat => "NAT",
        NetworkAttachment::Bridged => "Bridged",
        NetworkAttachment::Internal => "Internal",
        NetworkAttachment::HostOnly => "HostOnly",
        NetworkAttachment::Generic => "Generic",
        NetworkAttachment::NatNetwork => "NATNetwork",
        NetworkAttachment::HostOnlyNetwork => "HostOnlyNetwork",
        NetworkAttachment::Cloud => "Cloud",
        NetworkAttachment::Null => "Null",
    }
}

/// A section in the spelling of the version.
fn section(
    t: &mut Text,
    old: bool,
    kind: &str,
    attributes: &str,
    info: &str,
    content: impl FnOnce(&mut Text) -> Result<(), Error>,
) -> Result<(), Error> {
    let name = if old { "Section" } else { kind };
    match old {
        true => t.open(&format!("Section{attributes} xsi:type=\"ovf:{kind}_Type\"")),
        false => t.open(&format!("{kind}{attributes}")),
    }
    t.element("Info", info);
    content(t)?;
    t.close(name);
    Ok(())
}

fn write_system(t: &mut Text, version: OvfVersion, system: &System, first_disk: usize) -> Result<(), Error> {
    let old = version == OvfVersion::V0_9;
    let (p, s) = (&system.product, &system.settings);
    let name = escape(&p.name);
    let end = if old { "Content" } else { "VirtualSystem" };
    match old {
        true => t.open(&format!("Content ovf:id=\"{name}\" xsi:type=\"ovf:VirtualSystem_Type\"")),
        false => t.open(&format!("VirtualSystem ovf:id=\"{name}\"")),
    }
    t.element("Info", "A virtual machine");
    let about = [
        ("Product", &p.product),
        ("Vendor", &p.vendor),
        ("Version", &p.version),
        ("ProductUrl", &p.product_url),
        ("VendorUrl", &p.vendor_url),
    ];
    if about.iter().any(|(_, text)| !text.is_empty()) {
        section(t, old, "ProductSection", "", "Meta-information about the installed software", |t| {
            about.iter().filter(|(_, text)| !text.is_empty()).for_each(|(tag, text)| t.element(tag, text));
            Ok(())
        })?;
    }
    if !p.description.is_empty() {
        section(t, old, "AnnotationSection", "", "A human-readable annotation", |t| {
            t.element("Annotation", &p.description);
            Ok(())
        })?;
    }
    if !p.license.is_empty() {
        section(
            t,
            old,
            "EulaSection",
            " ovf:required=\"false\"",
            "License agreement for the virtual system",
            |t| {
                t.element("License", &p.license);
                Ok(())
            },
        )?;
    }
    let cim = cim_of(&s.os_type);
    let id = format!(" ovf:id=\"{cim}\"");
    section(t, old, "OperatingSystemSection", &id, "The kind of installed guest operating system", |t| {
        let os = OsType::by_id(&s.os_type).map_or(s.os_type.as_str(), |os| os.id);
        t.element("Description", os);
        t.line(&format!("<vbox:OSType ovf:required=\"false\">{}</vbox:OSType>", escape(&s.os_type)));
        Ok(())
    })?;
    section(
        t,
        old,
        "VirtualHardwareSection",
        "",
        "Virtual hardware requirements for a virtual machine",
        |t| {
            hardware(t, version, system, first_disk);
            Ok(())
        },
    )?;
    let machine = machine::write(s)?.to_text();
    t.line(&machine);
    t.close(end);
    Ok(())
}

/// The fields of an item; empty ones are left out.
#[derive(Default)]
struct Item<'a> {
    address: Option<String>,
    address_on_parent: Option<String>,
    automatic: Option<bool>,
    caption: String,
    connection: &'a str,
    description: &'a str,
    host_resource: Option<String>,
    parent: Option<usize>,
    sub_type: &'a str,
    kind: u32,
    units: &'a str,
    quantity: Option<u64>,
}

fn hardware(t: &mut Text, version: OvfVersion, system: &System, first_disk: usize) {
    let old = version == OvfVersion::V0_9;
    let hw = &system.settings.hardware;
    let id_word = if old { "InstanceId" } else { "InstanceID" };
    t.open("System");
    t.element("vssd:ElementName", "Virtual Hardware Family");
    t.element(&format!("vssd:{id_word}"), "0");
    t.element("vssd:VirtualSystemIdentifier", &system.product.name);
    t.element("vssd:VirtualSystemType", "virtualbox-2.2");
    t.close("System");
    let mut last_id = 0;
    let mut item = |item: Item<'_>| -> usize {
        last_id += 1;
        let (tag, prefix) = match (version, item.kind) {
            (OvfVersion::V2_0, 10) => ("EthernetPortItem", "epasd"),
            (OvfVersion::V2_0, 15 | 17) => ("StorageItem", "sasd"),
            _ => ("Item", "rasd"),
        };
        t.open(tag);
        let mut put = |name: &str, value: &str| {
            if !value.is_empty() {
                t.element(&format!("{prefix}:{name}"), value);
            }
        };
        // The elements of a CIM class come in the order of the alphabet.
        put("Address", item.address.as_deref().unwrap_or_default());
        put("AddressOnParent", item.address_on_parent.as_deref().unwrap_or_default());
        put("AllocationUnits", item.units);
        put("AutomaticAllocation", item.automatic.map_or("", |on| if on { "true" } else { "false" }));
        put("Caption", &item.caption);
        put("Connection", item.connection);
        put("Description", item.description);
        put("ElementName", &item.caption);
        put("HostResource", item.host_resource.as_deref().unwrap_or_default());
        put(id_word, &last_id.to_string());
        put("Parent", &item.parent.map(|p| p.to_string()).unwrap_or_default());
        put("ResourceSubType", item.sub_type);
        put("ResourceType", &item.kind.to_string());
        put("VirtualQuantity", &item.quantity.map(|q| q.to_string()).unwrap_or_default());
        t.close(tag);
        last_id
    };
    item(Item {
        caption: format!("{} virtual CPU", hw.cpu.count),
        description: "Number of virtual CPUs",
        kind: 3,
        quantity: Some(hw.cpu.count.into()),
        ..Item::default()
    });
    item(Item {
        caption: format!("{} MB of memory", hw.memory.ram_mb),
        description: "Memory Size",
        units: "MegaBytes",
        kind: 4,
        quantity: Some(hw.memory.ram_mb.into()),
        ..Item::default()
    });
    // Name, and the items' ids by port: the two channels of IDE are controllers of their own.
    let mut controllers: Vec<(&str, StorageBus, [usize; 2])> = Vec::new();
    for (number, c) in hw.storage_controllers.iter().enumerate() {
        let bus = c.bus();
        let (kind, sub_type, description) = match (bus, c.controller_type) {
            (StorageBus::Ide, StorageControllerType::Piix3) => (5, "PIIX3", "IDE Controller"),
            (StorageBus::Ide, StorageControllerType::Ich6) => (5, "ICH6", "IDE Controller"),
            (StorageBus::Ide, _) => (5, "PIIX4", "IDE Controller"),
            (StorageBus::Sata, _) => (20, "AHCI", "SATA Controller"),
            (StorageBus::Scsi, StorageControllerType::BusLogic) => (6, "BusLogic", "SCSI Controller"),
            (StorageBus::Scsi, _) => (6, "lsilogic", "SCSI Controller"),
            (StorageBus::Sas, _) => (6, "lsilogicsas", "SAS Controller"),
            (StorageBus::VirtioScsi | StorageBus::VirtioBlk, _) => {
                (20, "VirtioSCSI", "VirtioSCSI Controller")
            }
            (StorageBus::Pcie, _) => (20, "NVMe", "NVMe Controller"),
            _ => continue,
        };
        let word = description.split(' ').next().unwrap_or_default().to_ascii_lowercase();
        let mut add = |address: usize| {
            item(Item {
                address: Some(address.to_string()),
                caption: format!("{word}Controller{}", number + address),
                description,
                sub_type,
                kind,
                ..Item::default()
            })
        };
        let first = add(0);
        let second = if bus == StorageBus::Ide { add(1) } else { first };
        controllers.push((&c.name, bus, [first, second]));
    }
    for controller in &hw.usb.controllers {
        let ehci = controller.controller_type == settings::UsbControllerType::Ehci;
        item(Item {
            address: Some("0".into()),
            caption: "usb".into(),
            description: if ehci { "USB 2.0 Controller" } else { "USB Controller" },
            kind: 23,
            ..Item::default()
        });
    }
    for (i, disk) in system.disks.iter().enumerate() {
        let Some((_, bus, ids)) = controllers.iter().find(|(name, ..)| *name == disk.controller) else {
            continue;
        };
        let ide = *bus == StorageBus::Ide;
        let parent = ids[usize::from(ide && disk.port == 1)];
        let address = if ide { disk.device } else { disk.port };
        item(Item {
            address_on_parent: Some(address.to_string()),
            caption: if disk.dvd { format!("cdrom{}", i + 1) } else { format!("disk{}", i + 1) },
            description: if disk.dvd { "CD-ROM Drive" } else { "Disk Image" },
            host_resource: Some(format!("/disk/vmdisk{}", first_disk + i)),
            parent: Some(parent),
            automatic: disk.dvd.then_some(true),
            kind: if disk.dvd { 15 } else { 17 },
            ..Item::default()
        });
    }
    for nic in hw.network.iter().filter(|n| n.enabled) {
        let sub_type = match nic.adapter_type {
            NetworkAdapterType::I82540EM | NetworkAdapterType::I82543GC | NetworkAdapterType::I82545EM => {
                "E1000"
            }
            NetworkAdapterType::Virtio => "virtio-net",
            _ => "PCNet32",
        };
        let network = network_name(nic.attachment);
        item(Item {
            automatic: Some(nic.cable_connected),
            caption: format!("Ethernet adapter on '{network}'"),
            connection: network,
            sub_type,
            kind: 10,
            ..Item::default()
        });
    }
    if hw.audio.enabled {
        item(Item {
            address_on_parent: Some("3".into()),
            automatic: Some(false),
            caption: "sound".into(),
            description: "Sound Card",
            sub_type: "ensoniq1371",
            kind: 35,
            ..Item::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use settings::{AttachedDevice, DriveType, StorageController};

    use super::*;
    use crate::envelope::{ControllerKind, Envelope};

    fn system() -> System {
        let uuid = Uuid::from_u128(0x1234);
        let os = OsType::by_id("Debian_64").unwrap();
        let mut settings = MachineSettings::new_for(os, "a <b>", Uuid::from_u128(7));
        settings.hardware.memory.ram_mb = 700;
        let mut sata = StorageController::new("SATA Controller", StorageBus::Sata);
        sata.attached.push(AttachedDevice {
            drive: DriveType::HardDisk,
            image: Some(uuid),
            ..AttachedDevice::default()
        });
        settings.hardware.storage_controllers.push(sata);
        System {
            product: Product { name: "a <b>".into(), license: "all & sundry".into(), ..Product::default() },
            settings,
            disks: vec![SystemDisk {
                file: "box-disk001.vmdk".into(),
                file_size: 10,
                capacity: 1 << 30,
                uuid,
                controller: "SATA Controller".into(),
                port: 0,
                device: 0,
                dvd: false,
            }],
        }
    }

    #[test]
    fn a_machine_comes_back_from_every_version() {
        let system = system();
        for version in [OvfVersion::V0_9, OvfVersion::V1_0, OvfVersion::V2_0] {
            let text = write(version, std::slice::from_ref(&system)).unwrap();
            let envelope =
                Envelope::parse("x.ovf", text.as_bytes()).unwrap_or_else(|e| panic!("{e}\n{text}"));
            let read = &envelope.systems[0];
            assert_eq!(read.name, "a <b>", "{version:?}");
            assert_eq!(read.license, "all & sundry");
            assert_eq!((read.cim_os, read.vbox_os_type.as_str()), (96, "Debian_64"));
            assert_eq!((read.cpus, read.memory), (1, 700 << 20));
            assert_eq!(read.controllers[0].kind, ControllerKind::Sata);
            assert_eq!(read.drives[0].disk, "vmdisk1");
            assert_eq!(read.adapters[0].network, "NAT");
            assert_eq!(envelope.disks[0].vbox_uuid, Some(Uuid::from_u128(0x1234)));
            assert_eq!(envelope.files[0].href, "box-disk001.vmdk");
            let machine = read.machine.as_deref().unwrap();
            assert_eq!(machine.hardware.storage_controllers, system.settings.hardware.storage_controllers);
            assert_eq!(machine.hardware.network, system.settings.hardware.network);
        }
    }

    #[test]
    fn several_machines_are_a_collection() {
        let text = write(OvfVersion::V1_0, &[system(), system()]).unwrap();
        let envelope = Envelope::parse("x.ovf", text.as_bytes()).unwrap();
        assert_eq!(envelope.systems.len(), 2);
        assert_eq!(envelope.systems[1].drives[0].disk, "vmdisk2");
    }
}
