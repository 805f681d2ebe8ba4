//! Storage controllers and what is attached to them.

use super::Walk;
use crate::model::{AttachedDevice, Hardware, StorageController};
use crate::version::SettingsVersion as V;
use crate::words::{DriveType, StorageControllerType};
use crate::xml::{Archive, Outcome};

impl Walk {
    /// `<StorageControllers>`: below the machine before version 1.17, since then below its hardware.
    pub(super) fn storage(&mut self, archive: &mut Archive<'_>, hardware: &mut Hardware) -> Outcome {
        let mut controllers = std::mem::take(&mut hardware.storage_controllers);
        if archive.reading() {
            let mut more = Vec::new();
            archive.child("StorageControllers", |a| {
                a.list("StorageController", &mut more, |a, c| self.controller(a, c))
            })?;
            controllers.append(&mut more);
        } else {
            // Before version 1.9 floppy drives did not stand here.
            let mut written: Vec<_> = controllers
                .iter()
                .filter(|c| self.since(V::V1_9) || c.controller_type != StorageControllerType::I82078)
                .cloned()
                .collect();
            archive.child("StorageControllers", |a| {
                a.list("StorageController", &mut written, |a, c| self.controller(a, c))
            })?;
        }
        hardware.storage_controllers = controllers;
        Ok(())
    }

    fn controller(&self, a: &mut Archive<'_>, c: &mut StorageController) -> Outcome {
        a.required("name", &mut c.name)?;
        if a.reading() && !self.since(V::V1_9) {
            let long = match c.name.as_str() {
                "IDE" | "SATA" | "SCSI" => format!("{} Controller", c.name),
                _ => std::mem::take(&mut c.name),
            };
            c.name = long;
        }
        controller_type(a, &mut c.controller_type)?;
        a.always("PortCount", &mut c.port_count, 2)?;
        a.attribute("Instance", &mut c.instance, 0)?;
        a.attribute_if(self.since(V::V1_10), "useHostIOCache", &mut c.use_host_io_cache, true)?;
        a.attribute_if(self.since(V::V1_11), "Bootable", &mut c.bootable, true)?;
        if c.controller_type == StorageControllerType::IntelAhci {
            // Which ports stand in for legacy IDE; fixed since VirtualBox 4.3.
            for (port, place) in
                ["IDE0Master", "IDE0Slave", "IDE1Master", "IDE1Slave"].into_iter().enumerate()
            {
                a.write(&format!("{place}EmulationPort"), &(port as u32));
            }
        }
        let kind = c.controller_type;
        if a.reading() || self.since(V::V1_9) {
            a.list("AttachedDevice", &mut c.attached, |a, d| self.attached_device(a, d, kind))
        } else {
            let mut disks: Vec<_> =
                c.attached.iter().filter(|d| d.drive == DriveType::HardDisk).cloned().collect();
            a.list("AttachedDevice", &mut disks, |a, d| self.attached_device(a, d, kind))
        }
    }

    fn attached_device(
        &self,
        a: &mut Archive<'_>,
        d: &mut AttachedDevice,
        kind: StorageControllerType,
    ) -> Outcome {
        if a.reading() {
            d.drive = a.read("type")?.ok_or_else(|| {
                a.error(
                    "Required AttachedDevice/@type attribute is missing",
                    "write one of HardDisk, DVD, Floppy",
                )
            })?;
        }
        match d.drive {
            DriveType::HardDisk => {
                a.attribute("nonrotational", &mut d.non_rotational, false)?;
                a.attribute("discard", &mut d.discard, false)?;
            }
            DriveType::Dvd => {
                a.always("passthrough", &mut d.pass_through, false)?;
                a.attribute("tempeject", &mut d.temp_eject, false)?;
            }
            DriveType::Floppy => {}
        }
        a.write("type", &d.drive);
        if self.since(V::V1_15) {
            a.always("hotpluggable", &mut d.hot_pluggable, false)?;
        } else if a.reading() {
            d.hot_pluggable = kind == StorageControllerType::IntelAhci;
        }
        a.required("port", &mut d.port)?;
        a.required("device", &mut d.device)?;
        a.attribute("bandwidthGroup", &mut d.bandwidth_group, String::new())?;
        medium(a, d)?;
        if d.drive == DriveType::HardDisk && d.image.is_none() && a.reading() {
            return Err(a.error(
                "Required AttachedDevice/Image element is missing",
                "attach an image or remove the element",
            ));
        }
        Ok(())
    }

    /// `<DVDDrive>` and `<FloppyDrive>`, which stood below the hardware before version 1.9.
    pub(super) fn drives_before_1_9(&self, a: &mut Archive<'_>, hardware: &mut Hardware) -> Outcome {
        let find = |hardware: &Hardware, drive| {
            hardware.storage_controllers.iter().flat_map(|c| &c.attached).find(|d| d.drive == drive).cloned()
        };
        let mut dvd = find(hardware, DriveType::Dvd).unwrap_or_default();
        let mut floppy = find(hardware, DriveType::Floppy);
        a.presence("DVDDrive", true, |a| {
            a.always("passthrough", &mut dvd.pass_through, false)?;
            medium(a, &mut dvd)
        })?;
        let mut enabled = floppy.is_some();
        let mut in_floppy = floppy.take().unwrap_or_default();
        a.presence("FloppyDrive", true, |a| {
            a.always("enabled", &mut enabled, true)?;
            medium(a, &mut in_floppy)
        })?;
        if !a.reading() {
            return Ok(());
        }
        if a.has_child("DVDDrive") {
            let ide = hardware.storage_controllers.iter_mut().find(|c| c.bus() == crate::StorageBus::Ide);
            if let Some(ide) = ide {
                ide.attached.push(AttachedDevice { drive: DriveType::Dvd, port: 1, device: 0, ..dvd });
            }
        }
        if a.has_child("FloppyDrive") && enabled {
            let mut controller = StorageController::new("Floppy Controller", crate::StorageBus::Floppy);
            controller.attached.push(AttachedDevice { drive: DriveType::Floppy, ..in_floppy });
            hardware.storage_controllers.push(controller);
        }
        Ok(())
    }
}

/// What is in the drive.
fn medium(a: &mut Archive<'_>, d: &mut AttachedDevice) -> Outcome {
    a.presence("Image", d.image.is_some(), |a| {
        let mut uuid = d.image.unwrap_or_default();
        a.required("uuid", &mut uuid)?;
        d.image = Some(uuid);
        Ok(())
    })?;
    a.presence("HostDrive", d.host_drive.is_some() && d.image.is_none(), |a| {
        let mut source = d.host_drive.take().unwrap_or_default();
        a.required("src", &mut source)?;
        d.host_drive = Some(source);
        Ok(())
    })
}

/// A controller's type. VirtualBox has no virtio-blk: its files show it as the virtio controller that VirtualBox has, with which the
/// same guests find the same disks, and an attribute that VirtualBox passes over says what it is here.
fn controller_type(a: &mut Archive<'_>, kind: &mut StorageControllerType) -> Outcome {
    let is_blk = *kind == StorageControllerType::VirtioBlk;
    let mut shown = if is_blk { StorageControllerType::VirtioScsi } else { *kind };
    let mut model = if is_blk { kind.as_str().to_owned() } else { String::new() };
    a.required("type", &mut shown)?;
    a.attribute("model", &mut model, String::new())?;
    if a.reading() {
        let is_blk =
            shown == StorageControllerType::VirtioScsi && model == StorageControllerType::VirtioBlk.as_str();
        *kind = if is_blk { StorageControllerType::VirtioBlk } else { shown };
    }
    Ok(())
}
