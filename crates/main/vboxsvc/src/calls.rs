//! The methods of the objects that are no part of a machine, and the table of all methods.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::progress::Progress;
use main_api::server::CallTable;
use main_api::types::ObjRef;
use settings::{Chipset, DriveType, OsType, StorageBus, StorageControllerType, Word};
use uuid::Uuid;
use vbox_types::{ByteSize, ResultCode};

use crate::attrs_global::{machine_state, os_type_ref, with_medium};
use crate::host::{self, Cpus};
use crate::limits;
use crate::machines::{absolute, users_of};
use crate::media::{Medium, Phase, Task, open_error};
use crate::mirror::Mirror;
use crate::objects::{self, MachineRef, Object, Part, medium_path};
use crate::svc::{Context, State, Svc};
use crate::view::gone;
use crate::{
    appliance, calls_machine, calls_media, calls_networks, calls_storage, encryption, guest_properties,
};

pub(crate) fn table() -> CallTable<Context> {
    let mut t = CallTable::default();
    service(&mut t);
    virtual_box(&mut t);
    system_properties(&mut t);
    host_computer(&mut t);
    media(&mut t);
    calls_machine::add(&mut t);
    calls_media::add(&mut t);
    encryption::add(&mut t);
    calls_networks::calls(&mut t);
    calls_storage::add(&mut t);
    appliance::calls(&mut t);
    guest_properties::add(&mut t);
    t
}

/// Methods that wait for other processes, or for a disk.
pub(crate) fn may_block(interface: &str, method: &str) -> bool {
    matches!(
        (interface, method),
        ("IProgress", "WaitForCompletion")
            | (
                "IMachine",
                "AttachDevice"
                    | "AttachDeviceWithoutMedium"
                    | "DetachDevice"
                    | "MountMedium"
                    | "UnmountMedium"
            )
            | ("IMachine", "LockMachine" | "LaunchVMProcess" | "Unregister")
            | ("ISession", "OpenConsole")
            | ("IMedium", "CheckEncryptionPassword" | "RefreshState")
    ) || calls_networks::may_block(interface, method)
}

/// Methods by which a network adapter's settings change, which a running VM wants to know.
pub(crate) fn changes_adapter(interface: &str, method: &str) -> bool {
    matches!(
        (interface, method),
        ("INATEngine", "AddRedirect" | "RemoveRedirect") | ("INetworkAdapter", "SetProperty")
    )
}

type MediaList = (
    Vec<String>,
    Vec<String>,
    Vec<api::MediumState>,
    Vec<api::MediumType>,
    Vec<String>,
    Vec<String>,
    Vec<i64>,
    Vec<bool>,
);

fn list_media(c: &Context, kind: DriveType) -> ApiResult<MediaList> {
    let media: Vec<_> = {
        let state = c.svc.state.lock();
        let media = state.media.tree_of_kind(kind);
        let found = media.into_iter().filter_map(|id| state.media.find(id));
        // A list does not wait for a network where something is known.
        let looking =
            |m: &Medium| (m.is_file() || m.info.is_none() && m.last_error.is_empty()).then(|| m.looking());
        found.map(|m| (m.id, m.location.clone(), looking(m))).collect()
    };
    // Thousands of files take their time: nobody else waits for that.
    let seen: Vec<_> =
        media.into_iter().map(|(id, location, look)| (id, location, look.map(|look| look()))).collect();
    let mut state = c.svc.state.lock();
    let mut list = MediaList::default();
    for (id, location, seen) in seen {
        // One that was closed, or moved, in between is as it is now.
        let encrypted = encryption::settings(&state.media, id).is_some();
        let Ok(medium) = state.media.medium_mut(id) else { continue };
        if let Some(seen) = seen.filter(|_| medium.location == location && medium.phase == Phase::There) {
            medium.saw(seen);
        }
        list.0.push(id.to_string());
        list.1.push(medium.parent.map(|p| p.to_string()).unwrap_or_default());
        list.2.push(medium.state());
        list.3.push(medium.medium_type.to_api());
        list.4.push(medium.location.display().to_string());
        list.5.push(medium.format.clone());
        list.6.push(medium.info.as_ref().map_or(0, |i| i.logical_size.to_api()));
        list.7.push(encrypted);
    }
    Ok(list)
}

fn service(t: &mut CallTable<Context>) {
    t.add(IClientSupport::CreateSession, |c, ()| {
        let number = c.svc.state.lock().add_session(&c.peer);
        Ok(ObjRef::new(format!("{}/{number}", main_api::paths::SESSIONS)))
    })
    .add(IClientSupport::DropSession, |c, (session,)| {
        c.svc.drop_session(&c.peer, session_number(&session)?);
        Ok(())
    })
    .add(IClientSupport::Log, |c, (text,)| {
        let text: String = text.chars().take(500).collect();
        tracing::info!(target: "client", pid = c.peer.pid, "{}", text.escape_debug());
        Ok(())
    })
    .add(IClientSupport::ListMedia, |c, (kind,)| list_media(c, drive_type(kind)?))
    .add(IEventSource::RegisterListener, |c, ()| c.svc.state.lock().listen(&c.peer))
    .add(IEventSource::UnregisterListener, |c, ()| {
        c.svc.state.lock().stop_listening(c.peer.id);
        Ok(())
    })
    .add(ISession::UnlockMachine, |c, ()| c.svc.unlock_session(own_session(c)?))
    .add(ISession::OpenConsole, |c, ()| c.svc.open_console(own_session(c)?))
    .add(IVMProcessControl::RegisterVM, |c, (machine, state)| {
        let id = c.svc.state.lock().find(&machine)?.id;
        c.svc.register_vm(&c.peer, id, state)
    })
    .add(IVMProcessControl::SetState, |c, (state, code, text, component, interface)| {
        let error = (code != 0).then_some(ApiError { code, text, component, interface });
        c.svc.vm_state(&c.peer, state, error)
    })
    .add(IVMProcessControl::SetProgress, |c, (percent, operation)| {
        c.svc.vm_progress(&c.peer, percent, &operation)
    })
    .add(IVMProcessControl::SetExtraData, |c, (key, value)| c.svc.vm_extra_data(&c.peer, &key, &value))
    .add(IVMProcessControl::RuntimeError, |c, (fatal, id, message)| {
        c.svc.vm_runtime_error(&c.peer, fatal, id, message)
    })
    .add(IVMProcessControl::MediumEjected, |c, (controller, port, device)| {
        c.svc.vm_medium_ejected(&c.peer, &controller, port, device)
    });
}

fn own_session(c: &Context) -> ApiResult<u32> {
    match c.object {
        Object::Session(number) => Ok(number),
        _ => Err(gone()),
    }
}

pub(crate) fn session_number(session: &ObjRef<ISession>) -> ApiResult<u32> {
    match objects::parse(session.path()) {
        Some(Object::Session(number)) => Ok(number),
        _ => Err(ApiError::invalid_arg("Argument aSession is invalid (must not be NULL)")),
    }
}

/// The machine that an argument refers to.
pub(crate) fn machine_ref(machine: &ObjRef<IMachine>) -> ApiResult<MachineRef> {
    match objects::parse(machine.path()) {
        Some(Object::Machine(reference, Part::Machine)) => Ok(reference),
        _ => Err(ApiError::invalid_arg("Argument aMachine is invalid (must not be NULL)")),
    }
}

/// The medium that an argument refers to; `None` for null.
pub(crate) fn medium_id(medium: &ObjRef<IMedium>) -> ApiResult<Option<Uuid>> {
    if medium.is_null() {
        return Ok(None);
    }
    match objects::parse(medium.path()) {
        Some(Object::Medium(id)) => Ok(Some(id)),
        _ => Err(ApiError::invalid_arg("Argument aMedium is invalid")),
    }
}

fn registered(id: Uuid) -> ObjRef<IMachine> {
    ObjRef::new(MachineRef::Registered(id).path())
}

fn virtual_box(t: &mut CallTable<Context>) {
    t.add(IVirtualBox::ComposeMachineFilename, |c, (name, group, flags, base)| {
        Ok(c.svc.compose_filename(&name, &group, &flags, &base)?.display().to_string())
    })
    .add(IVirtualBox::CreateMachine, |c, (file, name, groups, os, flags, cipher, _password_id, _password)| {
        if !cipher.is_empty() {
            return Err(ApiError::new(ResultCode::NotSupported, "Encrypted machines are not supported"));
        }
        c.svc.create_machine(&c.peer, &file, &name, groups, &os, &flags)
    })
    .add(IVirtualBox::OpenMachine, |c, (file, _password)| c.svc.open_machine(&c.peer, &file))
    .add(IVirtualBox::RegisterMachine, |c, (machine,)| {
        let reference = machine_ref(&machine)?;
        let id = c.svc.state.lock().resolve(c.peer.id, reference)?.id;
        c.svc.register_machine(&c.peer, id)
    })
    .add(IVirtualBox::FindMachine, |c, (name,)| Ok(registered(c.svc.state.lock().find(&name)?.id)))
    .add(IVirtualBox::GetMachinesByGroups, |c, (groups,)| {
        let state = c.svc.state.lock();
        let in_group = |id: &&Uuid| {
            state.machines.get(*id).is_some_and(|m| m.settings.groups.iter().any(|g| groups.contains(g)))
        };
        Ok(state.order.iter().filter(in_group).map(|id| registered(*id)).collect())
    })
    .add(IVirtualBox::GetMachineStates, |c, (machines,)| {
        Ok(machines.iter().map(|m| machine_state(c, m)).collect())
    })
    .add(IVirtualBox::CreateMedium, |c, (format, location, _mode, kind)| {
        create_medium(&c.svc, &format, &location, kind)
    })
    .add(IVirtualBox::OpenMedium, |c, (location, kind, _mode, new_uuid)| {
        open_medium(&c.svc, &location, kind, new_uuid)
    })
    .add(IVirtualBox::GetGuestOSType, |_, (id,)| match OsType::by_id(&id) {
        Some(os) => Ok(os_type_ref(os)),
        None => Err(ApiError::not_found(format!("'{id}' is not a valid Guest OS type"))),
    })
    .add(IVirtualBox::GetExtraDataKeys, |c, ()| {
        Ok(c.svc.state.lock().global.settings.extra_data.keys().cloned().collect())
    })
    .add(IVirtualBox::GetExtraData, |c, (key,)| {
        Ok(c.svc.state.lock().global.settings.extra_data.get(&key).cloned().unwrap_or_default())
    })
    .add(IVirtualBox::SetExtraData, |c, (key, value)| {
        check_key(&key)?;
        let mut state = c.svc.state.lock();
        state.global.edit(|g| {
            match value.as_str() {
                "" => g.extra_data.remove(&key),
                _ => g.extra_data.insert(key.clone(), value.clone()),
            };
        })?;
        state.emit(IEventSource::OnExtraDataChanged, (Uuid::nil().to_string(), key, value));
        Ok(())
    });
}

/// Extra-data keys are names in a settings file.
pub(crate) fn check_key(key: &str) -> ApiResult<()> {
    if key.is_empty() || key.contains(|c: char| c.is_control()) {
        return Err(ApiError::invalid_arg(
            "Control characters are not allowed in a key, which must not be empty",
        ));
    }
    Ok(())
}

fn drive_type(kind: api::DeviceType) -> ApiResult<DriveType> {
    DriveType::from_api(kind)
        .map_err(|_| ApiError::invalid_arg("Device type must be HardDisk, DVD or Floppy"))
}

fn open_medium(
    svc: &Svc,
    location: &str,
    kind: api::DeviceType,
    new_uuid: bool,
) -> ApiResult<ObjRef<IMedium>> {
    let kind = drive_type(kind)?;
    let mut state = svc.state.lock();
    // A medium on record can be named by its UUID.
    let plain = location.trim_start_matches('{').trim_end_matches('}');
    if let Ok(id) = Uuid::try_parse(plain) {
        let known = state.media.medium(id)?;
        if known.kind != kind {
            return Err(ApiError::not_found(format!(
                "Could not find a medium of this type with UUID {{{id}}}"
            )));
        }
        return Ok(ObjRef::new(medium_path(id)));
    }
    let location = absolute(location)?;
    if let Some(id) = state.media.at_location(kind, &location) {
        state.media.medium_mut(id)?.closed = false;
        return Ok(ObjRef::new(medium_path(id)));
    }
    let file_error = |e: vd::Error| {
        let code = match e {
            vd::Error::Host { .. } => ResultCode::FileError,
            _ => ResultCode::IprtError,
        };
        ApiError::new(code, open_error(&location, &e)).on("IMedium")
    };
    // The only place where a format is guessed: the user names the file for the first time.
    let format = match kind {
        DriveType::HardDisk => vd::probe(&location).map_err(file_error)?,
        DriveType::Dvd | DriveType::Floppy => vd::Format::Raw,
    };
    let info = vd::info(&location, Some(format)).map_err(file_error)?;
    let id = match info.uuid {
        Some(id) if !new_uuid && !id.is_nil() => id,
        _ => Uuid::new_v4(),
    };
    if let Some(known) = state.media.find(id) {
        return Err(ApiError::new(
            ResultCode::InvalidArg,
            format!(
                "Cannot register the hard disk '{}' {{{id}}} because a hard disk '{}' with UUID {{{id}}} already exists",
                location.display(),
                known.location.display()
            ),
        ));
    }
    let parent = match kind {
        DriveType::HardDisk => parent_of(&state, &location, format, &info)?,
        DriveType::Dvd | DriveType::Floppy => None,
    };
    if new_uuid && info.uuid.is_some() {
        // The file gets it too, else it would not match the registry the next time.
        let ids = vd::Ids { uuid: Some(id), ..vd::Ids::default() };
        vd::set_ids(&location, format, &ids).map_err(file_error)?;
    }
    let mut medium = Medium::new(id, kind, location, format.name());
    medium.parent = parent;
    medium.refresh();
    state.media.insert(medium);
    let api_kind = kind.to_api();
    state.emit(IEventSource::OnMediumRegistered, (id.to_string(), api_kind, true));
    Ok(ObjRef::new(medium_path(id)))
}

/// The parent of a differencing image, which has to be in the registry: by its UUID, or, of formats without UUIDs, by the
/// name in the file.
fn parent_of(
    state: &State,
    location: &Path,
    format: vd::Format,
    info: &vd::MediumInfo,
) -> ApiResult<Option<Uuid>> {
    if info.variant != vd::Variant::Differencing {
        return Ok(None);
    }
    if let Some(parent) = info.parent_uuid.filter(|p| !p.is_nil()) {
        if state.media.find(parent).is_some() {
            return Ok(Some(parent));
        }
        return Err(ApiError::not_found(format!(
            "Parent medium with UUID {{{parent}}} of the medium '{}' is not found in the media registry",
            location.display()
        )));
    }
    if format == vd::Format::Vhdx {
        // These know their parent by what identifies its content.
        let wanted = info.parent_modification_uuid;
        let is_parent = |id: &Uuid| {
            state.media.find(*id).is_some_and(|m| {
                m.format == vd::Format::Vhdx.name()
                    && vd::info(&m.location, Some(format)).is_ok_and(|i| i.modification_uuid == wanted)
            })
        };
        let found = state.media.tree_of_kind(DriveType::HardDisk).into_iter().find(is_parent);
        return found.filter(|_| wanted.is_some()).map(Some).ok_or_else(|| {
            ApiError::not_found(format!(
                "The parent medium, with the data GUID {{{}}}, of the medium '{}' is not found in the media registry: open it first",
                wanted.unwrap_or_default(),
                location.display()
            ))
        });
    }
    let hint = info.parent_hint.as_deref().unwrap_or_default();
    let named = location.parent().unwrap_or(Path::new("/")).join(hint);
    let parent = absolute(&named.display().to_string())
        .ok()
        .and_then(|named| state.media.at_location(DriveType::HardDisk, &named));
    parent.map(Some).ok_or_else(|| {
        ApiError::not_found(format!(
            "Parent medium '{hint}' of the medium '{}' is not found in the media registry: open it first",
            location.display()
        ))
    })
}

fn create_medium(
    svc: &Svc,
    format: &str,
    location: &str,
    kind: api::DeviceType,
) -> ApiResult<ObjRef<IMedium>> {
    let kind = drive_type(kind)?;
    let mut state = svc.state.lock();
    let format = match format {
        "" => {
            let stored = &state.global.settings.system_properties.default_hard_disk_format;
            if stored.is_empty() { "VDI".to_owned() } else { stored.clone() }
        }
        given => given.to_owned(),
    };
    let known = vd::Format::from_name(&format)
        .ok_or_else(|| ApiError::invalid_arg(format!("Invalid medium storage format '{format}'")))?;
    let target = known == vd::Format::Iscsi;
    if target && kind != DriveType::HardDisk {
        return Err(ApiError::invalid_arg("A disk of an iSCSI target cannot be a DVD or a floppy"));
    }
    let location = if target {
        PathBuf::from(location)
    } else if location.starts_with('/') {
        absolute(location)?
    } else {
        state.global.default_machine_folder().join(location)
    };
    if let Some(id) = state.media.at_location(kind, &location) {
        // A client that gave up before it created the storage leaves nothing that counts.
        if state.media.medium(id)?.phase == Phase::NotCreated {
            state.media.remove(id);
        }
    }
    if let Some(id) = state.media.at_location(kind, &location) {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            format!("A medium '{}' with UUID {{{id}}} is in the media registry already", location.display()),
        ));
    }
    let id = Uuid::new_v4();
    let mut medium = Medium::new(id, kind, location, known.name());
    // The disk of a target is there without us.
    medium.phase = if target { Phase::There } else { Phase::NotCreated };
    state.media.insert(medium);
    if target {
        state.emit(IEventSource::OnMediumRegistered, (id.to_string(), kind.to_api(), true));
    }
    Ok(ObjRef::new(medium_path(id)))
}

fn media(t: &mut CallTable<Context>) {
    t.add(IMedium::Close, |c, ()| close_medium(c))
        .add(IMedium::RefreshState, |c, ()| {
            // Nobody waits for the network of a target meanwhile.
            let look = with_medium(c, |m| (m.phase == Phase::There).then(|| m.looking()))?;
            let seen = look.map(|look| look());
            with_medium(c, |m| {
                if let Some(seen) = seen.filter(|_| m.phase == Phase::There) {
                    m.saw(seen);
                }
                m.state()
            })
        })
        .add(IMedium::GetSnapshotIds, |c, (machine,)| {
            let Object::Medium(id) = c.object else { return Err(gone()) };
            let state = c.svc.state.lock();
            let machine =
                Uuid::try_parse(&machine).map_err(|_| ApiError::invalid_arg("Invalid machine UUID"))?;
            Ok(snapshot_ids(&state, machine, id))
        })
        .add(IMedium::GetProperty, |c, (name,)| {
            with_medium(c, |m| m.properties.get(&name).cloned())?
                .ok_or_else(|| ApiError::not_found(format!("Property '{name}' does not exist")))
        })
        .add(IMedium::SetProperty, |c, (name, value)| {
            check_key(&name)?;
            with_medium(c, |m| {
                match value.as_str() {
                    "" => m.properties.remove(&name),
                    _ => m.properties.insert(name, value),
                };
            })?;
            save_medium(c)
        })
        .add(IMedium::GetProperties, |c, (_names,)| {
            with_medium(c, |m| {
                (m.properties.keys().cloned().collect(), m.properties.values().cloned().collect())
            })
        })
        .add(IMedium::CreateBaseStorage, |c, (size, variant)| create_storage(c, size, &variant))
        .add(IMedium::DeleteStorage, |c, ()| delete_storage(c));
}

/// The snapshots of a machine in which the medium is attached, the machine's own id first for its current state.
fn snapshot_ids(state: &State, machine: Uuid, medium: Uuid) -> Vec<String> {
    let Ok(m) = state.machine(machine) else { return Vec::new() };
    let attaches = |h: &settings::Hardware| {
        h.storage_controllers.iter().any(|c| c.attached.iter().any(|a| a.image == Some(medium)))
    };
    let current = attaches(&m.settings.hardware).then_some(machine);
    let snapshots = objects::snapshots(&m.settings);
    let in_snapshots = snapshots.into_iter().filter(|s| attaches(&s.hardware)).map(|s| s.uuid);
    current.into_iter().chain(in_snapshots).map(|id| id.to_string()).collect()
}

fn in_use(medium: &Medium, users: usize) -> ApiError {
    ApiError::new(
        ResultCode::ObjectInUse,
        format!(
            "Medium '{}' cannot be closed because it is still attached to {users} virtual machines",
            medium.location.display()
        ),
    )
}

fn close_medium(c: &Context) -> ApiResult<()> {
    let Object::Medium(id) = c.object else { return Err(gone()) };
    let mut state = c.svc.state.lock();
    let users = users_of(&state, id).len();
    let children = state.media.children(id).len();
    let medium = state.media.medium(id)?;
    if users > 0 {
        return Err(in_use(medium, users));
    }
    if children > 0 {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            format!(
                "Cannot close medium '{}' because it has {children} child media",
                medium.location.display()
            ),
        ));
    }
    let owners = medium.registries.clone();
    let kind = medium.kind.to_api();
    state.media.remove(id);
    save_registries(&c.svc, &mut state, &owners)?;
    state.emit(IEventSource::OnMediumRegistered, (id.to_string(), kind, false));
    Ok(())
}

/// Writes the settings files in which a changed medium is on record.
pub(crate) fn save_registries(svc: &Svc, state: &mut State, owners: &[Uuid]) -> ApiResult<()> {
    for owner in owners {
        if owner.is_nil() {
            let before = state.global.settings.media_registry.clone();
            let registry = state.media.registry(Uuid::nil(), &svc.config_dir, &before, false);
            state.global.edit(|g| g.media_registry = registry)?;
        } else if state.machines.contains_key(owner) {
            svc.store_state(state, *owner)?;
        }
    }
    Ok(())
}

/// Writes the settings files in which the context's medium is on record.
pub(crate) fn save_medium(c: &Context) -> ApiResult<()> {
    let Object::Medium(id) = c.object else { return Err(gone()) };
    let mut state = c.svc.state.lock();
    let owners = state.media.medium(id)?.registries.clone();
    save_registries(&c.svc, &mut state, &owners)
}

/// IMedium::location: where the file is looked for from now on. The file itself is not moved.
pub(crate) fn move_medium(c: &Context, location: &str) -> ApiResult<()> {
    let Object::Medium(id) = c.object else { return Err(gone()) };
    let location = absolute(location)?;
    {
        let mut state = c.svc.state.lock();
        let medium = state.media.medium(id)?;
        if !medium.is_file() {
            return Err(ApiError::new(
                ResultCode::NotSupported,
                format!(
                    "Medium '{}' is no file: change its properties TargetAddress and TargetName instead",
                    medium.location.display()
                ),
            )
            .on("IMedium"));
        }
        if !medium.users.is_empty() {
            return Err(ApiError::new(
                ResultCode::InvalidObjectState,
                format!("Medium '{}' is in use", medium.location.display()),
            ));
        }
        state.media.relocate(id, location);
        state.media.medium_mut(id)?.refresh();
    }
    save_medium(c)
}

fn create_storage(c: &Context, size: i64, variant: &[api::MediumVariant]) -> ApiResult<ObjRef<IProgress>> {
    let Object::Medium(id) = c.object else { return Err(gone()) };
    let mut state = c.svc.state.lock();
    let medium = state.media.medium_mut(id)?;
    if medium.phase != Phase::NotCreated {
        return Err(ApiError::new(
            ResultCode::InvalidObjectState,
            format!("Storage for the medium '{}' is already created", medium.location.display()),
        ));
    }
    let format = vd::Format::from_name(&medium.format).ok_or_else(gone)?;
    let raw_disk = raw_disk(medium, format, variant)?;
    let size = match raw_disk {
        // The disk's own size counts.
        Some(_) => 0,
        None => u64::try_from(size)
            .ok()
            .filter(|s| *s > 0)
            .ok_or_else(|| ApiError::invalid_arg("The medium size must be greater than zero"))?,
    };
    let layout = match raw_disk {
        Some(_) => vd::Variant::Fixed,
        None => calls_media::creatable(format, variant)?,
    };
    let kind = medium.kind.to_api();
    let formatted = variant.contains(&api::MediumVariant::Formatted);
    let options = vd::CreateOptions {
        format,
        variant: layout,
        // Guests see whole sectors.
        size: ByteSize(size.next_multiple_of(512)),
        uuid: Some(id),
        comment: String::new(),
    };
    medium.phase = Phase::Creating;
    let location = medium.location.clone();
    let no_directory = variant.contains(&api::MediumVariant::NoCreateDir);
    let progress = Arc::new(Progress::new(
        format!("Creating base medium storage unit '{}'", location.display()),
        1,
        false,
    ));
    let path = state.add_progress(progress.clone());
    drop(state);
    let svc = c.svc.clone();
    spawn("create-medium", move || {
        let outcome = create_file(&location, &options, raw_disk.as_deref(), no_directory)
            .and_then(|()| if formatted { format_fat(&location, format) } else { Ok(()) });
        let mut state = svc.state.lock();
        if let Ok(medium) = state.media.medium_mut(id) {
            match &outcome {
                Ok(()) => {
                    medium.phase = Phase::There;
                    medium.refresh();
                }
                Err(_) => medium.phase = Phase::NotCreated,
            }
        }
        match &outcome {
            Ok(()) => {
                state.emit(IEventSource::OnMediumRegistered, (id.to_string(), kind, true));
            }
            Err(_) => {
                state.media.remove(id);
            }
        }
        drop(state);
        progress.complete(outcome);
        svc.wake_main();
    })?;
    Ok(ObjRef::new(path))
}

/// Writes a FAT file system into a new image.
fn format_fat(location: &Path, format: vd::Format) -> ApiResult<()> {
    let image = vd::Image::open(location, vd::OpenMode::ReadWrite, format);
    image.and_then(|image| vd::format_fat(&image)).map_err(|e| {
        let text = format!("Could not format the medium '{}'.\n{e}", location.display());
        ApiError::new(ResultCode::FileError, text).on("IMedium")
    })
}

/// The host's disk that a new medium is to stand for, if it is to be one of that kind.
fn raw_disk(
    medium: &Medium,
    format: vd::Format,
    variant: &[api::MediumVariant],
) -> ApiResult<Option<PathBuf>> {
    if !variant.contains(&api::MediumVariant::VmdkRawDisk) {
        return Ok(None);
    }
    if format != vd::Format::Vmdk {
        let text = format!("Medium format '{format}' does not support raw disk access; use VMDK");
        return Err(ApiError::new(ResultCode::NotSupported, text).on("IMedium"));
    }
    match medium.properties.get("RawDrive") {
        Some(disk) if disk.starts_with('/') => Ok(Some(disk.into())),
        Some(disk) => Err(ApiError::invalid_arg(format!(
            "The property RawDrive has to be an absolute path, not '{disk}'"
        ))),
        None => Err(ApiError::invalid_arg(
            "The property RawDrive is missing: it names the disk, as in '--property RawDrive=/dev/sdb'",
        )),
    }
}

fn create_file(
    location: &Path,
    options: &vd::CreateOptions,
    raw_disk: Option<&Path>,
    no_directory: bool,
) -> ApiResult<()> {
    let failed = |text: String| {
        ApiError::new(
            ResultCode::FileError,
            format!("Could not create the medium storage unit '{}'.\n{text}", location.display()),
        )
        .on("IMedium")
    };
    if let Some(folder) = location.parent()
        && !no_directory
    {
        std::fs::create_dir_all(folder).map_err(|e| failed(e.to_string()))?;
    }
    let created = match raw_disk {
        Some(disk) => vd::create_raw_disk(location, disk, options.uuid),
        None => vd::create(location, options),
    };
    created.map(drop).map_err(|e| {
        use std::error::Error as _;
        let already = if matches!(e, vd::Error::Exists { .. }) { " (VERR_ALREADY_EXISTS)" } else { "" };
        failed(format!("{e}{}{already}", e.source().map(|s| format!(" ({s})")).unwrap_or_default()))
    })
}

pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> ApiResult<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))
}

fn delete_storage(c: &Context) -> ApiResult<ObjRef<IProgress>> {
    let Object::Medium(id) = c.object else { return Err(gone()) };
    let mut state = c.svc.state.lock();
    let users = users_of(&state, id).len();
    let medium = state.media.medium(id)?;
    if users > 0 {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            format!(
                "Cannot delete storage: medium '{}' is still attached to the following {users} virtual machine(s)",
                medium.location.display()
            ),
        ));
    }
    if !medium.is_file() {
        let text = format!("Medium format '{}' does not support storage deletion", medium.format);
        return Err(ApiError::new(ResultCode::NotSupported, text).on("IMedium"));
    }
    let description = format!("Deleting medium storage unit '{}'", medium.location.display());
    let progress = Arc::new(Progress::new(description, 1, false));
    let path = state.add_progress(progress.clone());
    drop(state);
    let svc = c.svc.clone();
    spawn("delete-medium", move || {
        progress.complete(svc.delete_medium_now(id));
        svc.wake_main();
    })?;
    Ok(ObjRef::new(path))
}

impl Svc {
    /// Deletes a medium's file and forgets the medium.
    pub(crate) fn delete_medium_now(&self, id: Uuid) -> ApiResult<()> {
        let mut state = self.state.lock();
        if !users_of(&state, id).is_empty() || !state.media.children(id).is_empty() {
            let medium = state.media.medium(id)?;
            return Err(in_use(medium, users_of(&state, id).len()));
        }
        // Nobody reads or writes it.
        let task = [(id, Task::Write)];
        state.media.begin(&task)?;
        state.media.end(&task);
        let medium = state.media.medium(id)?;
        let (location, owners, kind) = (medium.location.clone(), medium.registries.clone(), medium.kind);
        let format = vd::Format::from_name(&medium.format).unwrap_or(vd::Format::Raw);
        match vd::delete(&location, format) {
            Err(vd::Error::Host { path, source, .. }) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(crate::machines::file_error(
                    "Could not delete the medium storage unit",
                    &path,
                    &source,
                )
                .on("IMedium"));
            }
            _ => {}
        }
        state.media.remove(id);
        save_registries(self, &mut state, &owners)?;
        state.emit(IEventSource::OnMediumRegistered, (id.to_string(), kind.to_api(), false));
        Ok(())
    }
}

fn system_properties(t: &mut CallTable<Context>) {
    type P = ISystemProperties;
    t.add(P::GetMaxNetworkAdapters, |_, (chipset,)| {
        Ok(Chipset::from_api(chipset)?.max_network_adapters() as u32)
    })
    .add(P::GetMaxDevicesPerPortForStorageBus, |_, (bus,)| {
        Ok(limits::max_devices_per_port(StorageBus::from_api(bus)?))
    })
    .add(P::GetMinPortCountForStorageBus, |_, (bus,)| Ok(limits::min_ports(StorageBus::from_api(bus)?)))
    .add(P::GetMaxPortCountForStorageBus, |_, (bus,)| Ok(limits::max_ports(StorageBus::from_api(bus)?)))
    .add(P::GetMaxInstancesOfStorageBus, |_, (chipset, bus)| {
        Ok(limits::max_instances(Chipset::from_api(chipset)?, StorageBus::from_api(bus)?))
    })
    .add(P::GetDeviceTypesForStorageBus, |_, (bus,)| {
        Ok(match StorageBus::from_api(bus)? {
            StorageBus::Floppy => vec![api::DeviceType::Floppy],
            StorageBus::Pcie | StorageBus::VirtioBlk => vec![api::DeviceType::HardDisk],
            _ => vec![api::DeviceType::DVD, api::DeviceType::HardDisk],
        })
    })
    .add(P::GetStorageBusForStorageControllerType, |_, (kind,)| {
        Ok(StorageControllerType::from_api(kind)?.bus().to_api())
    })
    .add(P::GetStorageControllerTypesForStorageBus, |_, (bus,)| {
        let bus = StorageBus::from_api(bus)?;
        Ok(StorageControllerType::ALL.iter().filter(|t| t.bus() == bus).map(Mirror::to_api).collect())
    })
    .add(P::GetMaxInstancesOfUSBControllerType, |_, (_chipset, _kind)| {
        Ok(limits::MAX_USB_CONTROLLERS_OF_A_KIND)
    })
    .add(P::GetDefaultIoCacheSettingForStorageController, |_, (kind,)| {
        Ok(matches!(StorageControllerType::from_api(kind)?.bus(), StorageBus::Ide | StorageBus::Floppy))
    });
}

fn host_computer(t: &mut CallTable<Context>) {
    t.add(IHost::GetProcessorSpeed, |_, (cpu,)| Ok(Cpus::read().speed(cpu)))
        .add(IHost::GetProcessorDescription, |_, (cpu,)| Ok(Cpus::read().description(cpu)))
        .add(IHost::GetExecutionEngine, |_, ()| {
            Ok(host::execution_engine().unwrap_or_else(|| "unknown: VBoxHeadless cannot be run".into()))
        })
        .add(IHost::GetProcessorFeature, |_, (feature,)| {
            let cpus = Cpus::read();
            let usable = Path::new("/dev/kvm").exists();
            Ok(match feature {
                api::ProcessorFeature::HWVirtEx => usable && (cpus.has_flag("vmx") || cpus.has_flag("svm")),
                api::ProcessorFeature::PAE => cpus.has_flag("pae"),
                api::ProcessorFeature::LongMode => cpus.has_flag("lm"),
                api::ProcessorFeature::NestedPaging => {
                    usable && (cpus.has_flag("ept") || cpus.has_flag("npt"))
                }
                api::ProcessorFeature::UnrestrictedGuest => {
                    usable && (cpus.has_flag("ept") || cpus.has_flag("svm"))
                }
                api::ProcessorFeature::NestedHWVirt => {
                    usable && (cpus.has_flag("vmx") || cpus.has_flag("svm")) && host::offers_nesting()
                }
                api::ProcessorFeature::VirtVmsaveVmload => false,
            })
        })
        .add(IHost::GetProcessorCPUIDLeaf, |_, (_cpu, leaf, sub_leaf)| Ok(host::cpuid(leaf, sub_leaf)));
}
