//! Media registries, extra data, USB filters and port forwarding, which both kinds of file hold.

use super::Walk;
use crate::model::{MediaRegistry, Medium, NatRule, StringMap, UsbDeviceFilter};
use crate::words::{MediumType, NatProtocol, UsbFilterAction};
use crate::xml::{Archive, Outcome};

/// Differencing images below each other that VirtualBox accepts.
const MEDIUM_DEPTH_MAX: usize = 300;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    HardDisk,
    Dvd,
    Floppy,
}

/// All children called `item`, each with a name and a value.
pub(super) fn string_map(archive: &mut Archive<'_>, item: &str, map: &mut StringMap) -> Outcome {
    let mut pairs: Vec<(String, String)> = std::mem::take(map).into_iter().collect();
    archive.list(item, &mut pairs, |a, (name, value)| {
        a.required("name", name)?;
        a.required("value", value)
    })?;
    map.extend(pairs);
    Ok(())
}

/// All `<Forwarding>` children. The file has a number for the protocol.
pub(super) fn forwarding(archive: &mut Archive<'_>, rules: &mut Vec<NatRule>) -> Outcome {
    if !archive.reading() {
        rules.sort_by(|a, b| a.name.cmp(&b.name));
    }
    archive.list("Forwarding", rules, |a, rule| {
        a.attribute("name", &mut rule.name, String::new())?;
        a.numbered("proto", &mut rule.protocol, NatProtocol::Tcp)?;
        a.attribute("hostip", &mut rule.host_ip, String::new())?;
        a.attribute("hostport", &mut rule.host_port, 0)?;
        a.attribute("guestip", &mut rule.guest_ip, String::new())?;
        a.attribute("guestport", &mut rule.guest_port, 0)
    })
}

/// All `<DeviceFilter>` children, those of the host or those of a machine.
pub(super) fn usb_filters(
    archive: &mut Archive<'_>,
    filters: &mut Vec<UsbDeviceFilter>,
    host: bool,
) -> Outcome {
    archive.list("DeviceFilter", filters, |a, filter| {
        a.required("name", &mut filter.name)?;
        a.required("active", &mut filter.active)?;
        a.attribute("vendorId", &mut filter.vendor_id, String::new())?;
        a.attribute("productId", &mut filter.product_id, String::new())?;
        a.attribute("revision", &mut filter.revision, String::new())?;
        a.attribute("manufacturer", &mut filter.manufacturer, String::new())?;
        a.attribute("product", &mut filter.product, String::new())?;
        a.attribute("serialNumber", &mut filter.serial_number, String::new())?;
        a.attribute("port", &mut filter.port, String::new())?;
        if host {
            a.always("action", &mut filter.action, UsbFilterAction::Ignore)
        } else {
            a.attribute("remote", &mut filter.remote, String::new())?;
            a.attribute("maskedInterfaces", &mut filter.masked_interfaces, 0)
        }
    })
}

impl Walk {
    /// `<MediaRegistry>`.
    pub(super) fn media_registry(
        &mut self,
        archive: &mut Archive<'_>,
        registry: &mut MediaRegistry,
    ) -> Outcome {
        archive.child("MediaRegistry", |a| {
            let mut media = |container: &str, item: &str, kind: Kind, list: &mut Vec<Medium>| {
                a.child(container, |a| a.list(item, list, |a, m| medium(a, m, kind, 1)))
            };
            media("HardDisks", "HardDisk", Kind::HardDisk, &mut registry.hard_disks)?;
            media("DVDImages", "Image", Kind::Dvd, &mut registry.dvd_images)?;
            media("FloppyImages", "Image", Kind::Floppy, &mut registry.floppy_images)
        })
    }
}

fn medium(a: &mut Archive<'_>, medium: &mut Medium, kind: Kind, depth: usize) -> Outcome {
    if depth > MEDIUM_DEPTH_MAX {
        return Err(a.error(
            format!("Maximum medium tree depth of {MEDIUM_DEPTH_MAX} exceeded"),
            "merge some of the differencing images",
        ));
    }
    a.required("uuid", &mut medium.uuid)?;
    a.required("location", &mut medium.location)?;
    if kind == Kind::HardDisk {
        a.required("format", &mut medium.format)?;
        a.attribute("autoReset", &mut medium.auto_reset, false)?;
        a.attribute_if(depth == 1, "type", &mut medium.medium_type, MediumType::Normal)?;
    } else {
        let raw = medium.format.eq_ignore_ascii_case("RAW");
        a.attribute_if(!raw, "format", &mut medium.format, "RAW".into())?;
        if a.reading() {
            medium.medium_type =
                if kind == Kind::Dvd { MediumType::Readonly } else { MediumType::Writethrough };
        }
    }
    if !a.reading() || a.has_child("Description") {
        a.text_child("Description", &mut medium.description)?;
    } else {
        medium.description = a.read("Description")?.unwrap_or_default();
    }
    string_map(a, "Property", &mut medium.properties)?;
    if kind == Kind::HardDisk {
        a.list("HardDisk", &mut medium.children, |a, child| self::medium(a, child, kind, depth + 1))?;
    }
    Ok(())
}
