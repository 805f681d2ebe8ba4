//! The methods of IMachine that concern storage controllers and what is attached to them.

use main_api::enums::DeviceType;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::CallTable;
use main_api::types::ObjRef;
use settings::{self as set, AttachedDevice, DriveType, StorageBus, StorageController};
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::attrs_machine::bus_word;
use crate::calls::medium_id;
use crate::calls_machine::{edit, edit_when, look, target};
use crate::calls_media;
use crate::limits;
use crate::media::Phase;
use crate::mirror::Mirror;
use crate::objects::{Part, medium_path};
use crate::svc::{Context, State, Svc};
use crate::view::View;

pub(crate) fn add(t: &mut CallTable<Context>) {
    controllers(t);
    attachments(t);
    flags(t);
}

fn no_controller(name: &str) -> ApiError {
    ApiError::not_found(format!("Could not find a storage controller named '{name}'"))
}

fn find<'v>(v: &'v View, name: &str) -> ApiResult<&'v StorageController> {
    v.settings.hardware.storage_controller(name).ok_or_else(|| no_controller(name))
}

fn find_mut<'v>(v: &'v mut View, name: &str) -> ApiResult<&'v mut StorageController> {
    v.edit().hardware.storage_controller_mut(name).ok_or_else(|| no_controller(name))
}

fn controllers(t: &mut CallTable<Context>) {
    t.add(IMachine::AddStorageController, |c, (name, bus)| {
        let bus = StorageBus::from_api(bus)?;
        if name.is_empty() {
            return Err(ApiError::invalid_arg("The name of a storage controller must not be empty"));
        }
        edit(c, |_, v| {
            let chipset = v.settings.hardware.chipset;
            let controllers = &mut v.edit().hardware.storage_controllers;
            if controllers.iter().any(|c| c.name == name) {
                return Err(ApiError::new(
                    ResultCode::ObjectInUse,
                    format!("Storage controller named '{name}' already exists"),
                ));
            }
            let of_bus: Vec<u32> =
                controllers.iter().filter(|c| c.bus() == bus).map(|c| c.instance).collect();
            if of_bus.len() >= limits::max_instances(chipset, bus) as usize {
                return Err(ApiError::invalid_arg(format!(
                    "Too many storage controllers of the type {}: the chipset allows {}",
                    bus_word(bus),
                    limits::max_instances(chipset, bus)
                )));
            }
            let mut controller = StorageController::new(&name, bus);
            controller.instance = (0..).find(|i| !of_bus.contains(i)).unwrap_or(0);
            // One controller of each bus is bootable: the first.
            controller.bootable = of_bus.is_empty();
            controllers.push(controller);
            Ok(v.object(Part::StorageController(name)))
        })
    })
    .add(IMachine::GetStorageControllerByName, |c, (name,)| {
        look(c, |v| find(v, &name).map(|c| v.object(Part::StorageController(c.name.clone()))))
    })
    .add(IMachine::GetStorageControllerByInstance, |c, (bus, instance)| {
        let bus = StorageBus::from_api(bus)?;
        look(c, |v| {
            let mut all = v.settings.hardware.storage_controllers.iter();
            let found = all.find(|c| c.bus() == bus && c.instance == instance);
            found.map(|c| v.object(Part::StorageController(c.name.clone()))).ok_or_else(|| {
                ApiError::not_found(format!(
                    "Could not find a storage controller with instance number '{instance}'"
                ))
            })
        })
    })
    .add(IMachine::RemoveStorageController, |c, (name,)| {
        edit(c, |_, v| {
            find(v, &name)?;
            v.edit().hardware.storage_controllers.retain(|c| c.name != name);
            Ok(())
        })
    })
    .add(IMachine::SetStorageControllerBootable, |c, (name, bootable)| {
        edit(c, |_, v| {
            let bus = find(v, &name)?.bus();
            for c in v.edit().hardware.storage_controllers.iter_mut().filter(|c| c.bus() == bus) {
                c.bootable = bootable && c.name == name;
            }
            Ok(())
        })
    });
}

/// Checks that the controller has the slot.
fn check_slot(controller: &StorageController, port: i32, device: i32) -> ApiResult<()> {
    let ports = i64::from(controller.port_count);
    let devices = i64::from(limits::max_devices_per_port(controller.bus()));
    if (0..ports).contains(&i64::from(port)) && (0..devices).contains(&i64::from(device)) {
        return Ok(());
    }
    Err(ApiError::invalid_arg(format!(
        "The port and/or device parameter are out of range: port={port} (must be in range [0, {}]), device={device} \
         (must be in range [0, {}])",
        ports - 1,
        devices - 1
    )))
}

/// What may be attached to a bus.
fn check_kind(controller: &StorageController, kind: DriveType) -> ApiResult<()> {
    let fits = match controller.bus() {
        StorageBus::Floppy => kind == DriveType::Floppy,
        StorageBus::Pcie => kind == DriveType::HardDisk,
        _ => kind != DriveType::Floppy,
    };
    if fits {
        return Ok(());
    }
    Err(ApiError::invalid_arg(format!(
        "The given device type is not supported by the storage controller '{}' ({})",
        controller.name,
        bus_word(controller.bus())
    )))
}

fn slot_taken(name: &str, port: i32, device: i32) -> ApiError {
    ApiError::new(
        ResultCode::ObjectInUse,
        format!(
            "Device is already attached to port {port}, device {device} of controller '{name}' of this virtual machine"
        ),
    )
}

fn nothing_attached(name: &str, port: i32, device: i32) -> ApiError {
    ApiError::not_found(format!(
        "No storage device attached to device slot {device} on port {port} of controller '{name}'"
    ))
}

fn attached<'v>(v: &'v mut View, name: &str, port: i32, device: i32) -> ApiResult<&'v mut AttachedDevice> {
    let all = &mut find_mut(v, name)?.attached;
    all.iter_mut()
        .find(|a| a.port == port && a.device == device)
        .ok_or_else(|| nothing_attached(name, port, device))
}

/// The medium, if it can be put into a drive of this kind.
fn check_medium(state: &State, id: Uuid, kind: DriveType) -> ApiResult<()> {
    let medium = state.media.medium(id)?;
    if medium.kind != kind {
        return Err(ApiError::invalid_arg(format!(
            "Medium '{}' cannot be attached as a device of the type {}",
            medium.location.display(),
            set::Word::as_str(kind)
        )));
    }
    if medium.phase != Phase::There {
        return Err(ApiError::new(
            ResultCode::InvalidObjectState,
            format!(
                "Medium '{}' is not accessible: its storage unit is not created yet",
                medium.location.display()
            ),
        ));
    }
    Ok(())
}

fn attach(
    c: &Context,
    name: String,
    port: i32,
    device: i32,
    kind: DeviceType,
    medium: Option<Uuid>,
) -> ApiResult<()> {
    let drive = DriveType::from_api(kind)
        .map_err(|_| ApiError::invalid_arg(format!("Invalid device type: {kind:?}")))?;
    if !is_registered(c)? {
        return Err(ApiError::new(
            ResultCode::InvalidObjectState,
            "Cannot attach storage devices to an unregistered machine",
        ));
    }
    let svc = c.svc.clone();
    edit(c, |state, v| {
        let controller = find(v, &name)?;
        check_slot(controller, port, device)?;
        check_kind(controller, drive)?;
        if controller.attached.iter().any(|a| a.port == port && a.device == device) {
            return Err(slot_taken(&name, port, device));
        }
        match medium {
            Some(id) => {
                check_medium(state, id, drive)?;
                let all = v.settings.hardware.storage_controllers.iter().flat_map(|c| c.attached.iter());
                // A DVD may be in two drives, a disk may not.
                if drive == DriveType::HardDisk && all.into_iter().any(|a| a.image == Some(id)) {
                    let location = state.media.medium(id)?.location.display().to_string();
                    return Err(ApiError::new(
                        ResultCode::ObjectInUse,
                        format!("Medium '{location}' is already attached to this virtual machine"),
                    ));
                }
            }
            None if drive == DriveType::HardDisk => {
                return Err(ApiError::invalid_arg("A hard disk cannot be attached without a medium"));
            }
            None => {}
        }
        let medium = match medium.filter(|_| drive == DriveType::HardDisk) {
            Some(id) => Some(to_write(&svc, state, v, id)?),
            None => medium,
        };
        let controller = find_mut(v, &name)?;
        controller.attached.push(AttachedDevice {
            drive,
            port,
            device,
            image: medium,
            // SATA and USB ports take plugs while the machine runs.
            hot_pluggable: controller.bus() == StorageBus::Usb,
            ..Default::default()
        });
        controller.attached.sort_by_key(|a| (a.port, a.device));
        Ok(())
    })
}

/// The medium that the machine writes to when `id` is attached: a new differencing image where `id` must not be changed.
fn to_write(svc: &Svc, state: &mut State, v: &View, id: Uuid) -> ApiResult<Uuid> {
    let medium = state.media.medium(id)?;
    let indirect = match medium.medium_type {
        set::MediumType::Immutable | set::MediumType::MultiAttach => medium.parent.is_none(),
        set::MediumType::Normal => !state.media.children(id).is_empty(),
        set::MediumType::Writethrough | set::MediumType::Shareable | set::MediumType::Readonly => false,
    };
    if !indirect {
        return Ok(id);
    }
    let folder = v.machine_folder();
    let snapshots = match v.settings.snapshot_folder.as_str() {
        "" => "Snapshots",
        folder => folder,
    };
    calls_media::implicit_diff(svc, state, id, &folder.join(snapshots))
}

fn is_registered(c: &Context) -> ApiResult<bool> {
    let (reference, _) = target(c)?;
    let state = c.svc.state.lock();
    let id = state.resolve(c.peer.id, reference)?.id;
    Ok(state.machines.contains_key(&id))
}

/// Puts a medium into a drive of a machine that is off, where there is no guest whose lock would have to be forced.
fn change_medium(c: &Context, name: &str, port: i32, device: i32, medium: Option<Uuid>) -> ApiResult<()> {
    edit(c, |state, v| {
        let drive = attached(v, name, port, device)?;
        if drive.drive == DriveType::HardDisk {
            return Err(ApiError::invalid_arg(format!(
                "The device at port {port}, device {device} of controller '{name}' is a hard disk, whose medium cannot be changed"
            )));
        }
        if let Some(id) = medium {
            let kind = drive.drive;
            check_medium(state, id, kind)?;
        }
        let drive = attached(v, name, port, device)?;
        drive.image = medium;
        drive.host_drive = None;
        Ok(())
    })
}

fn attachments(t: &mut CallTable<Context>) {
    t.add(IMachine::AttachDevice, |c, (name, port, device, kind, medium)| {
        attach(c, name, port, device, kind, medium_id(&medium)?)
    })
    .add(IMachine::AttachDeviceWithoutMedium, |c, (name, port, device, kind)| {
        attach(c, name, port, device, kind, None)
    })
    .add(IMachine::DetachDevice, |c, (name, port, device)| {
        edit(c, |_, v| {
            attached(v, &name, port, device)?;
            find_mut(v, &name)?.attached.retain(|a| a.port != port || a.device != device);
            Ok(())
        })
    })
    .add(IMachine::MountMedium, |c, (name, port, device, medium, _force)| {
        change_medium(c, &name, port, device, medium_id(&medium)?)
    })
    .add(IMachine::UnmountMedium, |c, (name, port, device, _force)| {
        change_medium(c, &name, port, device, None)
    })
    .add(IMachine::GetMedium, |c, (name, port, device)| {
        look(c, |v| {
            let image = attached(&mut v.clone(), &name, port, device)?.image;
            Ok(image.map_or_else(ObjRef::null, |id| ObjRef::new(medium_path(id))))
        })
    })
    .add(IMachine::GetMediumAttachment, |c, (name, port, device)| {
        look(c, |v| {
            attached(&mut v.clone(), &name, port, device)?;
            Ok(v.object(Part::Attachment(name, port, device)))
        })
    })
    .add(IMachine::GetMediumAttachmentsOfController, |c, (name,)| {
        look(c, |v| {
            let all = find(v, &name)?.attached.iter();
            Ok(all.map(|a| v.object(Part::Attachment(name.clone(), a.port, a.device))).collect())
        })
    });
}

fn flags(t: &mut CallTable<Context>) {
    t.add(IMachine::PassthroughDevice, |c, (name, port, device, on)| {
        edit(c, |_, v| {
            let a = attached(v, &name, port, device)?;
            if a.drive != DriveType::Dvd {
                return Err(ApiError::invalid_arg(
                    "Setting passthrough rejected as the device is no DVD drive",
                ));
            }
            a.pass_through = on;
            Ok(())
        })
    })
    .add(IMachine::TemporaryEjectDevice, |c, (name, port, device, on)| {
        edit_when(c, true, |_, v| {
            let a = attached(v, &name, port, device)?;
            if a.drive != DriveType::Dvd {
                return Err(ApiError::invalid_arg(
                    "Setting temporary eject flag rejected as the device is no DVD drive",
                ));
            }
            a.temp_eject = on;
            Ok(())
        })
    })
    .add(IMachine::NonRotationalDevice, |c, (name, port, device, on)| {
        edit(c, |_, v| {
            let a = attached(v, &name, port, device)?;
            if a.drive != DriveType::HardDisk {
                return Err(ApiError::invalid_arg(
                    "Setting the non-rotational medium flag rejected as the device is no hard disk",
                ));
            }
            a.non_rotational = on;
            Ok(())
        })
    })
    .add(IMachine::SetAutoDiscardForDevice, |c, (name, port, device, on)| {
        edit(c, |_, v| {
            let a = attached(v, &name, port, device)?;
            if a.drive != DriveType::HardDisk {
                return Err(ApiError::invalid_arg(
                    "Setting the discard medium flag rejected as the device is no hard disk",
                ));
            }
            a.discard = on;
            Ok(())
        })
    })
    .add(IMachine::SetHotPluggableForDevice, |c, (name, port, device, on)| {
        edit(c, |_, v| {
            let bus = find(v, &name)?.bus();
            if !matches!(bus, StorageBus::Sata | StorageBus::Usb) {
                return Err(ApiError::invalid_arg(format!(
                    "Controller '{name}' does not support changing the hot-pluggable device flag"
                )));
            }
            attached(v, &name, port, device)?.hot_pluggable = on;
            Ok(())
        })
    })
    .add(IMachine::SetBandwidthGroupForDevice, |c, (name, port, device, group)| {
        let group = match crate::objects::parse(group.path()) {
            Some(crate::objects::Object::Machine(_, Part::BandwidthGroup(name))) => name,
            _ if group.is_null() => String::new(),
            _ => return Err(ApiError::invalid_arg("Argument aBandwidthGroup is invalid")),
        };
        edit(c, |_, v| {
            attached(v, &name, port, device)?.bandwidth_group = group;
            Ok(())
        })
    });
}
