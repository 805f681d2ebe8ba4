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
use crate::machines::record_media;
use crate::media::Phase;
use crate::mirror::Mirror;
use crate::objects::{Part, medium_path};
use crate::svc::{Context, Lock, State, Svc};
use crate::view::{View, gone};

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
        StorageBus::Pcie | StorageBus::VirtioBlk => kind == DriveType::HardDisk,
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
    edit_storage(c, false, |state, v, running| {
        let controller = find(v, &name)?;
        if running {
            check_hot_plug(controller)?;
        }
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
            hot_pluggable: running || controller.bus() == StorageBus::Usb,
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

/// Puts a medium into a drive, or takes it out.
fn change_medium(
    c: &Context,
    name: &str,
    port: i32,
    device: i32,
    medium: Option<Uuid>,
    force: bool,
) -> ApiResult<()> {
    edit_storage(c, force, |state, v, _| {
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
        (drive.image, drive.host_drive, drive.ejected) = (medium, None, false);
        Ok(())
    })
}

/// Changes the drives of a machine. If it runs, its VM carries the change out, else nothing is changed. `change` is told
/// whether it runs.
fn edit_storage<T>(
    c: &Context,
    force: bool,
    change: impl FnOnce(&mut State, &mut View, bool) -> ApiResult<T>,
) -> ApiResult<T> {
    let (reference, _) = target(c)?;
    let (before, id, vm) = {
        let mut state = c.svc.state.lock();
        let id = state.resolve(c.peer.id, reference)?.id;
        match state.machine_mut(id) {
            Ok(machine) => {
                let vm = machine.vm().and_then(|vm| vm.peer.clone());
                let vm = vm.filter(|_| machine.state.is_online());
                match &machine.lock {
                    Lock::Held(held) => (held.copy.clone(), id, vm),
                    _ => (machine.settings.clone(), id, None),
                }
            }
            // Not registered: it cannot run.
            Err(_) => (Default::default(), id, None),
        }
    };
    let Some(vm) = vm else { return edit(c, |state, v| change(state, v, false)) };
    let result = edit_when(c, true, |state, v| change(state, v, true))?;
    let mut recorded = Vec::new();
    let text = {
        let mut state = c.svc.state.lock();
        let Lock::Held(held) = &state.machine(id)?.lock else { return Err(gone()) };
        let copy = held.copy.clone();
        let folder = state.machine(id)?.folder().display().to_string();
        recorded.extend(record_media(&mut state, id, &copy));
        // The new media are the VM's before it opens them.
        state.media.unlock_for(id);
        let locked = state.media.lock_for(id, &copy);
        locked.and_then(|()| Ok((c.svc.effective(&state, id, &copy)?, folder)))
    };
    let done = text.and_then(|(text, folder)| {
        vm.call(main_api::paths::ROOT, IVMProcess::StorageChange, (force, text, folder))
    });
    if let Err(error) = done {
        let mut state = c.svc.state.lock();
        if let Lock::Held(held) = &mut state.machine_mut(id)?.lock {
            // Only the drives: other changes since then stay.
            let controllers = before.hardware.storage_controllers.clone();
            std::sync::Arc::make_mut(&mut held.copy).hardware.storage_controllers = controllers;
        }
        for medium in recorded {
            if let Ok(medium) = state.media.medium_mut(medium) {
                medium.registries.clear();
            }
        }
        state.media.unlock_for(id);
        if let Err(error) = state.media.lock_for(id, &before) {
            tracing::error!(machine = %id, %error, "media of a running VM");
        }
        return Err(error.on("IMachine"));
    }
    Ok(result)
}

/// What cannot be done while the machine runs.
fn check_hot_plug(controller: &StorageController) -> ApiResult<()> {
    if controller.bus() == StorageBus::Sata {
        return Ok(());
    }
    Err(ApiError::new(
        ResultCode::InvalidVmState,
        format!("Controller '{}' does not support hot-plugging", controller.name),
    ))
}

fn attachments(t: &mut CallTable<Context>) {
    t.add(IMachine::AttachDevice, |c, (name, port, device, kind, medium)| {
        attach(c, name, port, device, kind, medium_id(&medium)?)
    })
    .add(IMachine::AttachDeviceWithoutMedium, |c, (name, port, device, kind)| {
        attach(c, name, port, device, kind, None)
    })
    .add(IMachine::DetachDevice, |c, (name, port, device)| {
        edit_storage(c, false, |_, v, running| {
            let hot_pluggable = attached(v, &name, port, device)?.hot_pluggable;
            if running {
                check_hot_plug(find(v, &name)?)?;
                if !hot_pluggable {
                    return Err(ApiError::new(
                        ResultCode::InvalidVmState,
                        format!(
                            "The device slot {device} on port {port} of controller '{name}' does not support hot-plugging"
                        ),
                    ));
                }
            }
            find_mut(v, &name)?.attached.retain(|a| a.port != port || a.device != device);
            Ok(())
        })
    })
    .add(IMachine::MountMedium, |c, (name, port, device, medium, force)| {
        change_medium(c, &name, port, device, medium_id(&medium)?, force)
    })
    .add(IMachine::UnmountMedium, |c, (name, port, device, force)| {
        change_medium(c, &name, port, device, None, force)
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
