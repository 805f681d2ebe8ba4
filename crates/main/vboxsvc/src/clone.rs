//! IMachine::cloneTo: a machine with copies of its disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums::{CloneMode, CloneOptions, DeviceType};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::{IEventSource, IMachine, IProgress};
use main_api::progress::Progress;
use main_api::types::ObjRef;
use settings::{DriveType, MediumType, NetworkAttachment, Timestamp, generate_mac_address};
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::appliance::Made;
use crate::calls::{machine_ref, spawn};
use crate::calls_machine::target;
use crate::encryption::Carried;
use crate::images::{self, Chain, Reading};
use crate::import::{canceled, step};
use crate::machines::sanitize;
use crate::media::Medium;
use crate::svc::{Context, Svc};
use crate::view::gone;

struct Copy {
    chain: Chain,
    target: PathBuf,
    format: vd::Format,
    id: Uuid,
    /// What it takes over from an encrypted medium.
    carried: Option<Carried>,
}

pub(crate) fn start(
    c: &Context,
    clone: &ObjRef<IMachine>,
    mode: CloneMode,
    options: &[CloneOptions],
) -> ApiResult<ObjRef<IProgress>> {
    let not_supported = |text: &str| Err(ApiError::new(ResultCode::NotSupported, text));
    if options.contains(&CloneOptions::Link) {
        return not_supported("Linked clones need a snapshot of the source machine");
    }
    let (source, _) = target(c)?;
    let clone = machine_ref(clone)?;
    let mut state = c.svc.state.lock();
    let machine = state.resolve(c.peer.id, source)?;
    if let Some(error) = &machine.access_error {
        return Err(error.clone());
    }
    if machine.state.is_online() {
        return Err(ApiError::new(
            ResultCode::InvalidVmState,
            "Cannot clone a machine that is running: power it off first",
        ));
    }
    let from = machine.settings.clone();
    if mode != CloneMode::MachineState && from.snapshot.is_some() {
        return not_supported(
            "Snapshots cannot be cloned: use the mode \"machine\" for the machine's current state",
        );
    }
    let new = state.resolve(c.peer.id, clone)?;
    let id = new.id;
    if state.machines.contains_key(&id) {
        return Err(ApiError::invalid_arg("The target of a clone must not be registered yet"));
    }
    let (folder, fresh) = (new.folder().to_owned(), new.settings.clone());
    let mut settings = (*from).clone();
    settings.uuid = id;
    settings.name = fresh.name.clone();
    settings.groups = fresh.groups.clone();
    settings.name_sync = fresh.name_sync;
    settings.directory_includes_uuid = fresh.directory_includes_uuid;
    settings.media_registry = Default::default();
    settings.snapshot = None;
    settings.current_snapshot = None;
    settings.current_state_modified = true;
    settings.state_file.clear();
    settings.aborted = false;
    settings.snapshot_folder = "Snapshots".into();
    settings.last_state_change = Some(Timestamp::now());
    if options.contains(&CloneOptions::KeepHwUUIDs) {
        settings.hardware.uuid = Some(from.hardware.uuid.unwrap_or(from.uuid));
    } else {
        settings.hardware.uuid = None;
    }
    for nic in &mut settings.hardware.network {
        let keep = options.contains(&CloneOptions::KeepAllMACs)
            || (options.contains(&CloneOptions::KeepNATMACs) && nic.attachment == NetworkAttachment::Nat);
        if !keep && !nic.mac_address.is_empty() {
            nic.mac_address = generate_mac_address();
        }
    }
    let mut copies: Vec<Copy> = Vec::new();
    let mut read = Vec::new();
    for controller in &mut settings.hardware.storage_controllers {
        for device in controller.attached.iter_mut().filter(|d| d.drive == DriveType::HardDisk) {
            let Some(old) = device.image else { continue };
            let medium = state.media.medium(old)?;
            // Media that are shared by their nature are shared with the clone, too.
            if matches!(medium.medium_type, MediumType::Shareable | MediumType::Readonly) {
                continue;
            }
            let format = vd::Format::from_name(&medium.format)
                .filter(|f| vd::can_create(*f, vd::Variant::Dynamic))
                .unwrap_or(vd::Format::Vdi);
            let name = match options.contains(&CloneOptions::KeepDiskNames) {
                true => {
                    medium.location.with_extension(images::extension(format)).file_name().map(PathBuf::from)
                }
                false => Some(PathBuf::from(format!(
                    "{}-disk{}.{}",
                    sanitize(&settings.name),
                    copies.len() + 1,
                    images::extension(format)
                ))),
            };
            let mut target = folder.join(name.ok_or_else(gone)?);
            for number in 1.. {
                if !target.exists() && copies.iter().all(|c| c.target != target) {
                    break;
                }
                target.set_file_name(format!(
                    "{}-disk{}_{number}.{}",
                    sanitize(&settings.name),
                    copies.len() + 1,
                    images::extension(format)
                ));
            }
            let id = Uuid::new_v4();
            device.image = Some(id);
            read.push(old);
            let carried = Carried::of(&state.media, old, format, true)?;
            copies.push(Copy { chain: state.media.images(old)?, target, format, id, carried });
        }
    }
    let reading = Reading::start(&c.svc, &mut state, &read)?;
    let progress =
        Arc::new(Progress::new("Cloning Machine", u32::try_from(copies.len()).unwrap_or(0) + 2, true));
    let path = state.add_progress(progress.clone());
    drop(state);
    let (svc, peer) = (c.svc.clone(), c.peer.id);
    spawn("clone", move || {
        let outcome = copy_all(&copies, &folder, &progress).and_then(|made| {
            progress.next_operation("Saving the machine");
            commit(&svc, peer, id, settings, &copies)?;
            made.keep();
            Ok(())
        });
        drop(reading);
        progress.complete(outcome.map_err(|e| e.on("IMachine")));
        svc.wake_main();
    })?;
    Ok(ObjRef::new(path))
}

fn copy_all(copies: &[Copy], folder: &Path, progress: &Progress) -> ApiResult<Made> {
    let mut made = Made::default();
    made.folder(folder)?;
    for copy in copies {
        let source = images::open(&copy.chain)?;
        progress.next_operation(&format!("Cloning Disk '{}' ...", copy.target.display()));
        made.file(&copy.target);
        let options = vd::CreateOptions {
            format: copy.format,
            variant: vd::Variant::Dynamic,
            size: source.size(),
            uuid: Some(copy.id),
            comment: String::new(),
        };
        let clone = if copy.carried.is_some() { vd::clone_encrypted } else { vd::clone };
        clone(&source, &copy.target, &options, &mut |done, all| step(progress, done, all, 0, 99)).map_err(
            |e| match e {
                vd::Error::Cancelled { .. } => canceled(),
                e => images::create_error(&copy.target, &e),
            },
        )?;
    }
    Ok(made)
}

/// The clone becomes its creator's unregistered machine, saved.
fn commit(
    svc: &Arc<Svc>,
    peer: u64,
    id: Uuid,
    mut settings: settings::MachineSettings,
    copies: &[Copy],
) -> ApiResult<()> {
    let mut state = svc.state.lock();
    let (owner, new) = state.unregistered.get(&id).ok_or_else(gone)?;
    if *owner != peer {
        return Err(gone());
    }
    let folder = new.folder().to_owned();
    for copy in copies {
        let mut medium = Medium::new(copy.id, DriveType::HardDisk, copy.target.clone(), copy.format.name());
        medium.registries.push(id);
        medium.refresh();
        if let Some(carried) = &copy.carried {
            carried.put(&mut medium);
        }
        state.media.insert(medium);
    }
    settings.media_registry = state.media.registry(id, &folder, &Default::default(), false);
    let (_, new) = state.unregistered.get_mut(&id).ok_or_else(gone)?;
    let saved = new.store.as_mut().ok_or_else(gone)?.save(&settings);
    if let Err(error) = saved {
        for copy in copies {
            state.media.remove(copy.id);
        }
        return Err(error);
    }
    new.settings = Arc::new(settings);
    for copy in copies {
        state.emit(IEventSource::OnMediumRegistered, (copy.id.to_string(), DeviceType::HardDisk, true));
    }
    Ok(())
}
