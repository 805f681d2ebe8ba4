//! The attributes of IMachine and of its snapshots.

use std::path::{Path, PathBuf};

use main_api::enums::SessionState;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::{ReadTable, WriteTable};
use main_api::types::ObjRef;
use settings as set;
use settings::Word;
use uuid::Uuid;

use crate::limits;
use crate::mirror::Mirror;
use crate::objects::{Part, snapshots};
use crate::view::{View, gone, in_range};

macro_rules! fields {
    ($r:ident, $w:ident; $($attr:path => $($field:ident).+;)*) => {$(
        $r.add($attr, |v: &View| Mirror::to_api(&v.settings.$($field).+));
        $w.add($attr, |v: &mut View, value| {
            v.edit().$($field).+ = Mirror::from_api(value)?;
            Ok(())
        });
    )*};
}

pub(crate) fn add(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w;
        IMachine::Description => description;
        IMachine::Icon => icon;
        IMachine::CPUHotPlugEnabled => hardware.cpu.hotplug;
        IMachine::CPUProfile => hardware.cpu.profile;
        IMachine::PageFusionEnabled => hardware.memory.page_fusion;
        IMachine::FirmwareType => hardware.firmware;
        IMachine::PointingHIDType => hardware.pointing_hid;
        IMachine::KeyboardHIDType => hardware.keyboard_hid;
        IMachine::HPETEnabled => hardware.hpet;
        IMachine::IommuType => hardware.iommu;
        IMachine::EmulatedUSBCardReaderEnabled => hardware.emulated_usb_card_reader;
        IMachine::ClipboardMode => hardware.clipboard_mode;
        IMachine::ClipboardFileTransfersEnabled => hardware.clipboard_file_transfers;
        IMachine::DnDMode => hardware.drag_and_drop_mode;
        IMachine::TeleporterEnabled => teleporter.enabled;
        IMachine::TeleporterAddress => teleporter.address;
        IMachine::TeleporterPassword => teleporter.password;
        IMachine::ParavirtProvider => hardware.paravirt_provider;
        IMachine::ParavirtDebug => hardware.paravirt_debug;
        IMachine::RTCUseUTC => hardware.rtc_use_utc;
        IMachine::IOCacheEnabled => hardware.io_cache.enabled;
        IMachine::IOCacheSize => hardware.io_cache.size_mb;
        IMachine::TracingEnabled => debugging.tracing_enabled;
        IMachine::TracingConfig => debugging.tracing_config;
        IMachine::AllowTracingToAccessVM => debugging.allow_tracing_to_access_vm;
        IMachine::AutostartEnabled => autostart.enabled;
        IMachine::AutostartDelay => autostart.delay;
        IMachine::AutostopType => autostart.autostop;
        IMachine::DefaultFrontend => hardware.default_frontend;
        IMachine::VMProcessPriority => process_priority;
    }
    identity(r, w);
    processor_and_memory(r, w);
    state(r);
    references(r);
    folders(r, w);
    snapshot_attributes(r);
}

fn identity(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    r.add(IMachine::Accessible, |v| v.meta.access_error.is_none())
        .add(IMachine::AccessError, |v| match &v.meta.access_error {
            Some(_) => v.object(Part::AccessError),
            None => ObjRef::null(),
        })
        .add(IMachine::Name, |v| v.settings.name.clone())
        .add(IMachine::Id, |v| v.settings.uuid.to_string())
        .add(IMachine::Groups, |v| v.settings.groups.clone())
        .add(IMachine::OSTypeId, |v| v.settings.os_type.clone())
        .add(IMachine::HardwareVersion, |v| v.settings.hardware.version.clone())
        .add(IMachine::HardwareUUID, |v| v.settings.hardware.uuid.unwrap_or(v.settings.uuid).to_string());
    w.add(IMachine::Name, |v: &mut View, name: String| {
        if name.is_empty() {
            return Err(ApiError::invalid_arg("The machine name must not be empty"));
        }
        v.edit().name = name;
        Ok(())
    })
    .add(IMachine::Groups, |v: &mut View, groups| {
        v.edit().groups = check_groups(groups)?;
        Ok(())
    })
    .add(IMachine::OSTypeId, |v: &mut View, id: String| {
        v.edit().os_type = os_type(&id)?.id.to_owned();
        Ok(())
    })
    .add(IMachine::HardwareVersion, |v: &mut View, version: String| {
        if version != "1" && version != "2" {
            return Err(ApiError::invalid_arg(format!("Invalid hardware version: {version}")));
        }
        v.edit().hardware.version = version;
        Ok(())
    })
    .add(IMachine::HardwareUUID, |v: &mut View, text: String| {
        let id = Uuid::try_parse(&text)
            .map_err(|_| ApiError::invalid_arg(format!("Invalid hardware UUID: {text}")))?;
        let own = v.settings.uuid;
        v.edit().hardware.uuid = (id != own && !id.is_nil()).then_some(id);
        Ok(())
    });
}

/// The guest OS type with the id or description `name`.
pub(crate) fn os_type(name: &str) -> ApiResult<&'static set::OsType> {
    set::OsType::find(name).ok_or_else(|| ApiError::invalid_arg(format!("Guest OS type '{name}' is invalid")))
}

/// Checks machine groups and brings them into VirtualBox's form; no groups mean the root group.
pub(crate) fn check_groups(groups: Vec<String>) -> ApiResult<Vec<String>> {
    let mut checked: Vec<String> = Vec::new();
    for group in groups {
        let group = if group.is_empty() { "/".to_owned() } else { group };
        let rest = group.strip_prefix('/');
        let elements_fit = rest
            .is_some_and(|r| r.is_empty() || r.split('/').all(|e| !e.is_empty() && e != "." && e != ".."));
        if !elements_fit || group.contains(|c: char| c.is_control()) {
            return Err(ApiError::invalid_arg(format!("Invalid group name '{group}'")));
        }
        if !checked.contains(&group) {
            checked.push(group);
        }
    }
    if checked.is_empty() {
        checked.push("/".into());
    }
    Ok(checked)
}

fn processor_and_memory(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    r.add(IMachine::CPUCount, |v| v.settings.hardware.cpu.count)
        .add(IMachine::CPUExecutionCap, |v| v.settings.hardware.cpu.execution_cap)
        .add(IMachine::CPUIDPortabilityLevel, |v| v.settings.hardware.cpu.portability_level)
        .add(IMachine::MemorySize, |v| v.settings.hardware.memory.ram_mb)
        .add(IMachine::MemoryBalloonSize, |v| v.settings.hardware.memory_balloon_mb)
        .add(IMachine::ChipsetType, |v| v.settings.hardware.chipset.to_api())
        .add(IMachine::TeleporterPort, |v| v.settings.teleporter.port)
        .add(IMachine::BootOrder, |v| v.settings.hardware.boot_order.iter().map(Mirror::to_api).collect());
    w.add(IMachine::CPUCount, |v: &mut View, count| {
        let count = in_range("virtual CPU count", count, limits::MIN_CPUS, limits::MAX_CPUS, "")?;
        let cpu = &mut v.edit().hardware.cpu;
        if cpu.hotplug && cpu.plugged.iter().any(|&id| id >= count) {
            return Err(ApiError::invalid_arg(format!(
                "Trying to reduce the number of virtual CPUs to {count} while a CPU beyond it is attached"
            )));
        }
        cpu.count = count;
        Ok(())
    })
    .add(IMachine::CPUExecutionCap, |v: &mut View, cap| {
        v.edit().hardware.cpu.execution_cap = in_range("CPU execution cap value", cap, 1, 100, "")?;
        Ok(())
    })
    .add(IMachine::CPUIDPortabilityLevel, |v: &mut View, level| {
        v.edit().hardware.cpu.portability_level = in_range("CPUID portability level", level, 0, 3, "")?;
        Ok(())
    })
    .add(IMachine::MemorySize, |v: &mut View, size| {
        v.edit().hardware.memory.ram_mb =
            in_range("RAM size", size, limits::MIN_RAM, limits::MAX_RAM, " MB")?;
        Ok(())
    })
    .add(IMachine::MemoryBalloonSize, |v: &mut View, size| {
        let max = v.settings.hardware.memory.ram_mb * 3 / 4;
        v.edit().hardware.memory_balloon_mb = in_range("memory balloon size", size, 0, max, " MB")?;
        Ok(())
    })
    .add(IMachine::ChipsetType, |v: &mut View, chipset| {
        let chipset = set::Chipset::from_api(chipset)?;
        v.edit().hardware.change_chipset(chipset);
        Ok(())
    })
    .add(IMachine::TeleporterPort, |v: &mut View, port| {
        v.edit().teleporter.port = in_range("teleporter port", port, 0, 65535, "")?;
        Ok(())
    });
}

fn state(r: &mut ReadTable<View>) {
    r.add(IMachine::SettingsFilePath, |v| v.meta.settings_file.display().to_string())
        .add(IMachine::SettingsAuxFilePath, |_| String::new())
        .add(IMachine::SettingsModified, |v| v.meta.modified)
        .add(IMachine::SessionState, |v| v.meta.session_state)
        .add(IMachine::SessionName, |v| v.meta.session_name.clone())
        .add(IMachine::SessionPID, |v| {
            if v.meta.session_state == SessionState::Unlocked { 0 } else { v.meta.session_pid }
        })
        .add(IMachine::State, |v| v.meta.state)
        .add(IMachine::LastStateChange, |v| v.meta.last_state_change)
        .add(IMachine::StateFilePath, |v| {
            if v.settings.state_file.is_empty() {
                return String::new();
            }
            v.machine_folder().join(&v.settings.state_file).display().to_string()
        })
        .add(IMachine::LogFolder, |v| log_folder(&v.meta.settings_file).display().to_string())
        .add(IMachine::CurrentStateModified, |v| v.settings.current_state_modified);
}

/// Where a machine's logs are.
pub(crate) fn log_folder(settings_file: &Path) -> PathBuf {
    settings_file.parent().unwrap_or(Path::new("/")).join("Logs")
}

fn references(r: &mut ReadTable<View>) {
    macro_rules! parts {
        ($($attr:path => $part:expr;)*) => {$( r.add($attr, |v: &View| v.object($part)); )*};
    }
    parts! {
        IMachine::GraphicsAdapter => Part::GraphicsAdapter;
        IMachine::BIOSSettings => Part::Bios;
        IMachine::TrustedPlatformModule => Part::Tpm;
        IMachine::GuestDebugControl => Part::GuestDebug;
        IMachine::NonVolatileStore => Part::Nvram;
        IMachine::RecordingSettings => Part::Recording;
        IMachine::VRDEServer => Part::Vrde;
        IMachine::USBDeviceFilters => Part::UsbFilters;
        IMachine::AudioSettings => Part::AudioSettings;
        IMachine::BandwidthControl => Part::BandwidthControl;
    }
    r.add(IMachine::MediumAttachments, |v| {
        let controllers = v.settings.hardware.storage_controllers.iter();
        let of = |c: &set::StorageController| -> Vec<_> {
            c.attached.iter().map(|a| v.object(Part::Attachment(c.name.clone(), a.port, a.device))).collect()
        };
        controllers.flat_map(of).collect()
    })
    .add(IMachine::USBControllers, |v| {
        let controllers = v.settings.hardware.usb.controllers.iter();
        controllers.map(|c| v.object(Part::UsbController(c.name.clone()))).collect()
    })
    .add(IMachine::StorageControllers, |v| {
        let controllers = v.settings.hardware.storage_controllers.iter();
        controllers.map(|c| v.object(Part::StorageController(c.name.clone()))).collect()
    })
    .add(IMachine::SharedFolders, |v| {
        v.settings
            .hardware
            .shared_folders
            .iter()
            .map(|f| v.object(Part::SharedFolder(f.name.clone())))
            .collect()
    })
    .add(IMachine::NetworkAdapters, |v| {
        (0..v.settings.hardware.network.len()).map(|i| v.object(Part::NetworkAdapter(i))).collect()
    })
    .add(IMachine::SerialPorts, |v| {
        (0..v.settings.hardware.serial_ports.len()).map(|i| v.object(Part::SerialPort(i))).collect()
    })
    .add(IMachine::ParallelPorts, |v| {
        (0..v.settings.hardware.parallel_ports.len()).map(|i| v.object(Part::ParallelPort(i))).collect()
    })
    .add(IMachine::CurrentSnapshot, |v| match v.settings.current_snapshot {
        Some(id) => v.object(Part::Snapshot(id)),
        None => ObjRef::null(),
    })
    .add(IMachine::SnapshotCount, |v| snapshots(&v.settings).len() as u32);
}

fn folders(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    r.add(IMachine::SnapshotFolder, |v| {
        let folder = &v.settings.snapshot_folder;
        let folder = if folder.is_empty() { "Snapshots" } else { folder };
        v.machine_folder().join(folder).display().to_string()
    });
    w.add(IMachine::SnapshotFolder, |v: &mut View, folder: String| {
        if v.settings.snapshot.is_some() {
            return Err(ApiError::new(
                vbox_types::ResultCode::InvalidObjectState,
                "The snapshot folder of a machine with snapshots cannot be changed (please delete all snapshots first)",
            ));
        }
        // Inside the machine folder the setting is kept relative, so that it follows the machine.
        let relative = Path::new(&folder).strip_prefix(v.machine_folder()).ok().map(|p| p.display().to_string());
        let folder = relative.unwrap_or(folder);
        v.edit().snapshot_folder = if folder.is_empty() { "Snapshots".into() } else { folder };
        Ok(())
    });
}

fn snapshot(v: &View) -> ApiResult<&set::Snapshot> {
    match v.part {
        Part::Snapshot(id) => v.settings.find_snapshot(id).ok_or_else(gone),
        _ => Err(gone()),
    }
}

fn snapshot_attributes(r: &mut ReadTable<View>) {
    r.add_fallible(ISnapshot::Id, |v| snapshot(v).map(|s| s.uuid.to_string()))
        .add_fallible(ISnapshot::Name, |v| snapshot(v).map(|s| s.name.clone()))
        .add_fallible(ISnapshot::Description, |v| snapshot(v).map(|s| s.description.clone()))
        .add_fallible(ISnapshot::TimeStamp, |v| snapshot(v).map(|s| s.timestamp.0.saturating_mul(1000)))
        .add_fallible(ISnapshot::Online, |v| snapshot(v).map(|s| !s.state_file.is_empty()))
        .add_fallible(ISnapshot::Parent, |v| {
            let id = snapshot(v)?.uuid;
            let all = snapshots(&v.settings);
            let parent = all.iter().find(|s| s.children.iter().any(|c| c.uuid == id));
            Ok(parent.map_or_else(ObjRef::null, |p| v.object(Part::Snapshot(p.uuid))))
        })
        .add_fallible(ISnapshot::Children, |v| {
            Ok(snapshot(v)?.children.iter().map(|c| v.object(Part::Snapshot(c.uuid))).collect())
        });
    // The error object of a machine that cannot be used.
    let error = |v: &View| v.meta.access_error.clone().ok_or_else(gone);
    r.add_fallible(IVirtualBoxErrorInfo::ResultCode, move |v| Ok(error(v)?.code as i32))
        .add_fallible(IVirtualBoxErrorInfo::InterfaceID, move |v| Ok(error(v)?.interface))
        .add_fallible(IVirtualBoxErrorInfo::Component, move |v| Ok(error(v)?.component))
        .add_fallible(IVirtualBoxErrorInfo::Text, move |v| Ok(error(v)?.text))
        .add(IVirtualBoxErrorInfo::Next, |_| ObjRef::null());
}

/// Which attributes can be written while the VM runs. Everything else waits for power-off.
pub(crate) fn writable_at_run_time(interface: &str, attr: &str) -> bool {
    matches!(
        (interface, attr),
        (
            "IMachine",
            "Description"
                | "Groups"
                | "CPUExecutionCap"
                | "MemoryBalloonSize"
                | "ClipboardMode"
                | "ClipboardFileTransfersEnabled"
                | "DnDMode"
                | "DefaultFrontend"
                | "VMProcessPriority"
                | "AutostartEnabled"
                | "AutostartDelay"
                | "AutostopType"
        ) | (
            "INetworkAdapter",
            "AttachmentType"
                | "BridgedInterface"
                | "HostOnlyInterface"
                | "HostOnlyNetwork"
                | "InternalNetwork"
                | "NATNetwork"
                | "GenericDriver"
                | "CableConnected"
                | "PromiscModePolicy"
                | "TraceEnabled"
                | "TraceFile"
                | "BandwidthGroup"
        ) | ("IVRDEServer", _)
            | ("IRecordingSettings" | "IRecordingScreenSettings", _)
            | ("IBandwidthGroup", "MaxBytesPerSec")
            | ("ISharedFolder", _)
            | ("ISerialPort", "HostMode" | "Path" | "Server")
    )
}

/// The word that VirtualBox's texts use for a bus.
pub(crate) fn bus_word(bus: set::StorageBus) -> &'static str {
    Word::as_str(bus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_checked() {
        assert_eq!(check_groups(vec![]).unwrap(), ["/"]);
        assert_eq!(check_groups(vec!["/a/b".into(), "/a/b".into()]).unwrap(), ["/a/b"]);
        for bad in ["a", "/a/", "//a", "/../x", "/a\n"] {
            assert!(check_groups(vec![bad.into()]).is_err(), "{bad}");
        }
    }
}
