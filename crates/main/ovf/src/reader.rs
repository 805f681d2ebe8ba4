//! Descriptors out of XML. Names are compared without their prefixes, because every product chooses its own.

use settings::xml::{Document, Element};
use uuid::Uuid;

use crate::envelope::*;
use crate::error::Error;
use crate::machine::{self, local};

/// More of anything in one descriptor is taken for damage.
const MAX_ITEMS: usize = 1024;

fn children<'a>(element: &'a Element, name: &'a str) -> impl Iterator<Item = &'a Element> {
    element.elements().filter(move |e| local(e.name()) == name)
}

fn child<'a>(element: &'a Element, name: &'a str) -> Option<&'a Element> {
    children(element, name).next()
}

/// The text of a child element; empty without one.
fn text(element: &Element, name: &str) -> String {
    child(element, name).map(|e| e.text().trim().to_owned()).unwrap_or_default()
}

/// An attribute by its name without prefix.
fn attribute(element: &Element, name: &str) -> Option<String> {
    element.attributes().iter().find(|a| local(a.name()) == name).map(|a| a.value().into_owned())
}

/// Bytes in a unit as DSP0004 spells it (`byte * 2^20`), or as older descriptors do; `None` for one that is not known.
fn unit(text: &str) -> Option<u64> {
    let plain: String = text.chars().filter(|c| !c.is_whitespace()).collect::<String>().to_ascii_lowercase();
    Some(match plain.as_str() {
        "" | "byte" | "bytes" => 1,
        "kb" | "kilobyte" | "kilobytes" => 1 << 10,
        "mb" | "megabyte" | "megabytes" => 1 << 20,
        "gb" | "gigabyte" | "gigabytes" => 1 << 30,
        "tb" | "terabyte" | "terabytes" => 1 << 40,
        power => {
            let (base, exponent) = power.strip_prefix("byte*")?.split_once('^')?;
            base.parse::<u64>().ok()?.checked_pow(exponent.parse().ok()?)?
        }
    })
}

impl Envelope {
    /// Reads a descriptor. `name` is for errors.
    pub fn parse(name: &str, bytes: &[u8]) -> Result<Self, Error> {
        let xml_error = |text: String| Error::Xml { name: name.to_owned(), text };
        let document = Document::parse(bytes).map_err(|e| xml_error(e.to_string()))?;
        let root = document.root();
        if local(root.name()) != "Envelope" {
            return Err(xml_error("Root element in OVF file must be \"Envelope\".".into()));
        }
        let mut envelope = Self::default();
        for references in children(root, "References") {
            for file in children(references, "File") {
                envelope.files.push(file_ref(file).map_err(xml_error)?);
            }
        }
        envelope.contents(name, root)?;
        let count = envelope.files.len().max(envelope.disks.len()).max(envelope.systems.len());
        if count > MAX_ITEMS {
            return Err(xml_error(format!("{count} entries are more than the {MAX_ITEMS} that are read")));
        }
        Ok(envelope)
    }

    fn contents(&mut self, name: &str, parent: &Element) -> Result<(), Error> {
        for element in parent.elements() {
            // 0.9 has "Section" and "Content" elements that say in xsi:type what they are.
            let kind = attribute(element, "type").unwrap_or_default();
            match (local(element.name()), local(&kind)) {
                ("DiskSection", _) | ("Section", "DiskSection_Type") => {
                    for disk in children(element, "Disk") {
                        self.disks.push(
                            read_disk(disk).map_err(|text| Error::Xml { name: name.to_owned(), text })?,
                        );
                    }
                }
                ("VirtualSystem", _) | ("Content", "VirtualSystem_Type") => {
                    self.systems.push(system(name, element)?);
                }
                ("VirtualSystemCollection", _) | ("Content", "VirtualSystemCollection_Type") => {
                    self.contents(name, element)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn file_ref(file: &Element) -> Result<FileRef, String> {
    Ok(FileRef {
        id: attribute(file, "id").ok_or("Missing id in <File> element")?,
        href: attribute(file, "href").unwrap_or_default(),
        size: attribute(file, "size").and_then(|s| s.parse().ok()),
        gzip: match attribute(file, "compression").as_deref() {
            None | Some("" | "identity") => false,
            Some("gzip") => true,
            Some(other) => return Err(format!("Unknown compression \"{other}\" in <File> element")),
        },
    })
}

fn read_disk(disk: &Element) -> Result<Disk, String> {
    let id = attribute(disk, "diskId").ok_or("Missing diskId in <Disk> element")?;
    let capacity = attribute(disk, "capacity").and_then(|s| s.trim().parse::<u64>().ok());
    let scale = attribute(disk, "capacityAllocationUnits");
    let scale = match &scale {
        None => 1,
        Some(text) => unit(text).ok_or_else(|| format!("Unknown unit \"{text}\" of disk \"{id}\""))?,
    };
    let capacity = capacity
        .map(|c| c.checked_mul(scale).ok_or_else(|| format!("Capacity of disk \"{id}\" is too large")))
        .transpose()?;
    Ok(Disk {
        capacity,
        file_ref: attribute(disk, "fileRef").filter(|f| !f.is_empty()),
        format: attribute(disk, "format").unwrap_or_default(),
        vbox_uuid: disk
            .attributes()
            .iter()
            .find(|a| a.name() == "vbox:uuid")
            .and_then(|a| Uuid::try_parse(a.value().trim_matches(['{', '}'])).ok()),
        id,
    })
}

fn system(name: &str, element: &Element) -> Result<VirtualSystem, Error> {
    let mut system = VirtualSystem {
        name: child(element, "Name")
            .map(|e| e.text().trim().to_owned())
            .filter(|n| !n.is_empty())
            .or_else(|| attribute(element, "id"))
            .unwrap_or_default(),
        ..VirtualSystem::default()
    };
    for section in element.elements() {
        let kind = attribute(section, "type").unwrap_or_default();
        let word = match local(section.name()) {
            "Section" => local(&kind).strip_suffix("_Type").unwrap_or_default(),
            other => other,
        };
        match word {
            "EulaSection" => system.license = text(section, "License"),
            "ProductSection" => {
                system.product = text(section, "Product");
                system.vendor = text(section, "Vendor");
                system.version = text(section, "Version");
                system.product_url = text(section, "ProductUrl");
                system.vendor_url = text(section, "VendorUrl");
            }
            "AnnotationSection" => system.description = text(section, "Annotation"),
            "OperatingSystemSection" => {
                system.cim_os = attribute(section, "id").and_then(|i| i.trim().parse().ok()).unwrap_or(0);
                for e in section.elements() {
                    match e.name() {
                        "vbox:OSType" => system.vbox_os_type = e.text().trim().to_owned(),
                        n if local(n) == "Description" => system.os_description = e.text().trim().to_owned(),
                        _ => {}
                    }
                }
            }
            "VirtualHardwareSection" => hardware(name, section, &mut system)?,
            "Machine" => system.machine = Some(Box::new(machine::read(name, section)?)),
            _ => {}
        }
    }
    Ok(system)
}

/// An item of the hardware section.
struct Item {
    id: String,
    kind: u32,
    sub_type: String,
    parent: String,
    address: String,
    address_on_parent: String,
    host_resource: String,
    connection: String,
    units: String,
    quantity: u64,
}

fn hardware(name: &str, section: &Element, system: &mut VirtualSystem) -> Result<(), Error> {
    if let Some(about) = child(section, "System") {
        system.system_type = text(about, "VirtualSystemType");
    }
    let words = ["Item", "StorageItem", "EthernetPortItem"];
    let items: Vec<Item> =
        section.elements().filter(|e| words.contains(&local(e.name()))).map(item).collect();
    let error = |text: String| Error::Xml { name: name.to_owned(), text };
    if items.len() > MAX_ITEMS {
        return Err(error(format!("{} items are more than the {MAX_ITEMS} that are read", items.len())));
    }
    // Controllers first: disks refer to them from before and from after.
    for item in &items {
        let mut add = |kind, primary| {
            let controller =
                Controller { id: item.id.clone(), kind, sub_type: item.sub_type.clone(), primary };
            system.controllers.push(controller);
        };
        let sub_type = item.sub_type.to_ascii_lowercase();
        match (item.kind, sub_type.as_str()) {
            // Citrix counts the channels of the one controller by address.
            (5, _) => add(ControllerKind::Ide, item.address.trim() != "1"),
            (6, "lsilogicsas") => add(ControllerKind::Sas, true),
            (6, "virtioscsi") => add(ControllerKind::VirtioScsi, true),
            (6, _) => add(ControllerKind::Scsi, true),
            (20, "lsilogicsas") => add(ControllerKind::Sas, true),
            (20, "virtioscsi") => add(ControllerKind::VirtioScsi, true),
            (20, s) if s.contains("nvm") => add(ControllerKind::Nvme, true),
            (20, s) if s.is_empty() || s.contains("ahci") || s.contains("sata") => {
                add(ControllerKind::Sata, true)
            }
            (20, other) => {
                return Err(error(format!(
                    "Host resource of type \"Other Storage Device (20)\" is supported with SATA AHCI, NVMe or \
                     virtio-scsi controllers only, not with \"{other}\""
                )));
            }
            _ => {}
        }
    }
    for item in &items {
        match item.kind {
            3 => system.cpus = u32::try_from(item.quantity).unwrap_or(u32::MAX),
            4 => {
                let unit = if item.units.is_empty() { Some(1 << 20) } else { unit(&item.units) };
                let unit = unit.ok_or_else(|| {
                    error(format!(
                        "Invalid allocation unit \"{}\" specified with memory size item",
                        item.units
                    ))
                })?;
                system.memory = item
                    .quantity
                    .checked_mul(unit)
                    .ok_or_else(|| error("Memory size is too large".into()))?;
            }
            10 => system
                .adapters
                .push(Adapter { sub_type: item.sub_type.clone(), network: item.connection.clone() }),
            14 => system.floppy = true,
            // A drive with an image is a drive like a disk's.
            15 | 16 if item.host_resource.is_empty() => system.cdrom = true,
            15..=17 => {
                if item.kind != 17 {
                    system.cdrom = true;
                }
                if item.host_resource.is_empty() {
                    continue;
                }
                // "ovf:/disk/vmdisk1", "/disk/vmdisk1", "disk/vmdisk1"
                let disk = item.host_resource.rsplit('/').next().unwrap_or_default().to_owned();
                if !system.controllers.iter().any(|c| c.id == item.parent) {
                    return Err(error(format!(
                        "Hard disk item with instance ID {} specifies invalid parent {}",
                        item.id, item.parent
                    )));
                }
                let address = item.address_on_parent.trim();
                let address = if address.is_empty() { Ok(0) } else { address.parse() };
                let address = address.map_err(|_| {
                    error(format!("Hard disk item with instance ID {} has no valid AddressOnParent", item.id))
                })?;
                system.drives.push(Drive { disk, controller: item.parent.clone(), address });
            }
            23 => system.usb = true,
            35 => {
                let word = if item.sub_type.is_empty() { "ensoniq1371" } else { &item.sub_type };
                system.sound = word.to_owned();
            }
            _ => {}
        }
    }
    Ok(())
}

fn item(element: &Element) -> Item {
    let mut id = text(element, "InstanceID");
    if id.is_empty() {
        id = text(element, "InstanceId");
    }
    Item {
        id,
        kind: text(element, "ResourceType").parse().unwrap_or(0),
        sub_type: text(element, "ResourceSubType"),
        parent: text(element, "Parent"),
        address: text(element, "Address"),
        address_on_parent: text(element, "AddressOnParent"),
        host_resource: text(element, "HostResource"),
        connection: text(element, "Connection"),
        units: text(element, "AllocationUnits"),
        quantity: text(element, "VirtualQuantity").parse().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After the example of DSP0243 1.0, with the spellings of several products.
    const SAMPLE: &str = r#"<?xml version="1.0"?>
<ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="r" xmlns:vssd="v">
 <ovf:References><ovf:File ovf:id="f1" ovf:href="disk.vmdk" ovf:size="1024"/></ovf:References>
 <ovf:DiskSection><ovf:Info/>
  <ovf:Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^30"
   ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  <ovf:Disk ovf:diskId="d2" ovf:capacity="1048576"/>
 </ovf:DiskSection>
 <ovf:VirtualSystem ovf:id="vm"><ovf:Info/><ovf:Name>A &amp; B</ovf:Name>
  <ovf:OperatingSystemSection ovf:id="96"><ovf:Info/></ovf:OperatingSystemSection>
  <ovf:VirtualHardwareSection><ovf:Info/>
   <ovf:System><vssd:VirtualSystemType>vmx-07</vssd:VirtualSystemType></ovf:System>
   <ovf:Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></ovf:Item>
   <ovf:Item><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>256</rasd:VirtualQuantity><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits></ovf:Item>
   <ovf:Item><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceType>17</rasd:ResourceType><rasd:Parent>3</rasd:Parent><rasd:AddressOnParent>1</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/d1</rasd:HostResource></ovf:Item>
   <ovf:Item><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>6</rasd:ResourceType><rasd:ResourceSubType>lsilogic</rasd:ResourceSubType></ovf:Item>
   <ovf:Item><rasd:InstanceID>6</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType><rasd:ResourceSubType>E1000</rasd:ResourceSubType><rasd:Connection>VM Network</rasd:Connection></ovf:Item>
  </ovf:VirtualHardwareSection>
 </ovf:VirtualSystem>
</ovf:Envelope>"#;

    #[test]
    fn a_descriptor_of_version_1_is_read() {
        let envelope = Envelope::parse("x.ovf", SAMPLE.as_bytes()).unwrap();
        let disk = envelope.disk("d1").unwrap();
        assert_eq!(disk.capacity, Some(8 << 30));
        assert_eq!(envelope.file_of(disk).unwrap().href, "disk.vmdk");
        assert_eq!(disk.kind("disk.vmdk"), DiskFormat::Vmdk);
        assert!(envelope.file_of(envelope.disk("d2").unwrap()).is_none());
        let system = &envelope.systems[0];
        assert_eq!((system.name.as_str(), system.cim_os, system.cpus), ("A & B", 96, 2));
        assert_eq!((system.memory, system.system_type.as_str()), (256 << 20, "vmx-07"));
        assert_eq!(system.controllers[0].kind, ControllerKind::Scsi);
        assert_eq!(system.drives, [Drive { disk: "d1".into(), controller: "3".into(), address: 1 }]);
        assert_eq!(system.adapters[0].network, "VM Network");
    }

    #[test]
    fn a_descriptor_of_version_0_9_is_read() {
        let text = r#"<Envelope xmlns="http://www.vmware.com/schema/ovf/1/envelope" xmlns:xsi="x" xmlns:ovf="o" xmlns:rasd="r">
 <References><File ovf:id="file1" ovf:href="a.vmdk"/></References>
 <Section xsi:type="ovf:DiskSection_Type"><Disk ovf:capacity="1024" ovf:diskId="1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/specifications/vmdk.html#sparse"/></Section>
 <Content ovf:id="old" xsi:type="ovf:VirtualSystem_Type">
  <Section ovf:id="100" xsi:type="ovf:OperatingSystemSection_Type"><Description>Linux 2.6</Description></Section>
  <Section xsi:type="ovf:VirtualHardwareSection_Type">
   <Item><rasd:InstanceId>3</rasd:InstanceId><rasd:ResourceType>5</rasd:ResourceType></Item>
   <Item><rasd:InstanceId>4</rasd:InstanceId><rasd:ResourceType>17</rasd:ResourceType><rasd:Parent>3</rasd:Parent><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>disk/1</rasd:HostResource></Item>
  </Section>
 </Content>
</Envelope>"#;
        let envelope = Envelope::parse("x.ovf", text.as_bytes()).unwrap();
        assert_eq!(envelope.systems[0].name, "old");
        assert_eq!(envelope.systems[0].cim_os, 100);
        assert_eq!(envelope.systems[0].controllers[0].kind, ControllerKind::Ide);
        assert_eq!(envelope.systems[0].drives[0].disk, "1");
    }

    #[test]
    fn nonsense_is_refused() {
        let wrong_parent = SAMPLE.replace("<rasd:Parent>3<", "<rasd:Parent>77<");
        let wrong_unit =
            SAMPLE.replace("<rasd:AllocationUnits>byte * 2^20<", "<rasd:AllocationUnits>hogsheads<");
        let huge = SAMPLE.replace("ovf:capacity=\"8\"", "ovf:capacity=\"18446744073709551615\"");
        for text in [wrong_parent.as_str(), &wrong_unit, &huge, "<VirtualBox/>", "<Envelope>", ""] {
            assert!(matches!(Envelope::parse("x.ovf", text.as_bytes()), Err(Error::Xml { .. })), "{text}");
        }
    }
}
