//! Machines as a whole: registry, creation, saving, renaming, removal.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use main_api::enums::CleanupMode;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::{IEventSource, IMachine, IMedium, IProgress};
use main_api::progress::Progress;
use main_api::server::Peer;
use main_api::types::ObjRef;
use settings::{DriveType, MachineEntry, MachineSettings, Timestamp};
use uuid::Uuid;
use vbox_types::{MachineState, ResultCode};

use crate::attrs_machine::{check_groups, log_folder, os_type};
use crate::objects::{MachineRef, medium_path};
use crate::store::{GlobalStore, MachineStore};
use crate::svc::{Lock, Machine, State, Svc, now_ms};
use crate::view::gone;

/// Note of a rename in progress, in the configuration directory: the machine's id, old and new settings file, a line each.
const RENAME_NOTE: &str = "VBoxSVC-rename";

pub(crate) fn file_error(what: &str, path: &Path, error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ResultCode::FileError, format!("{what} '{}' ({error})", path.display()))
}

impl Machine {
    /// A machine whose settings come from a file.
    pub(crate) fn load(id: Uuid, file: PathBuf) -> Self {
        let mut machine = Self {
            id,
            settings: Arc::new(MachineSettings { uuid: id, ..Default::default() }),
            store: None,
            access_error: None,
            state: MachineState::PoweredOff,
            last_change: now_ms(),
            lock: Lock::None,
            file,
        };
        match MachineStore::open(&machine.file) {
            Ok((store, settings)) if id.is_nil() || settings.uuid == id => {
                machine.id = settings.uuid;
                machine.state = match (settings.state_file.is_empty(), settings.aborted) {
                    (true, true) => MachineState::Aborted,
                    (true, false) => MachineState::PoweredOff,
                    (false, true) => MachineState::AbortedSaved,
                    (false, false) => MachineState::Saved,
                };
                if let Some(Timestamp(seconds)) = settings.last_state_change {
                    machine.last_change = seconds.saturating_mul(1000);
                }
                machine.settings = Arc::new(settings);
                machine.store = Some(store);
            }
            Ok((_, settings)) => {
                machine.access_error = Some(
                    ApiError::fail(format!(
                        "Machine UUID {{{}}} in '{}' doesn't match its UUID {{{id}}} in the registry file",
                        settings.uuid,
                        machine.file.display()
                    ))
                    .on("IMachine"),
                );
            }
            Err(error) => machine.access_error = Some(error.on("IMachine")),
        }
        machine
    }

    /// The machine folder.
    pub(crate) fn folder(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }
}

impl State {
    /// Reads `VirtualBox.xml` and every machine that it names.
    pub(crate) fn load(config_dir: &Path) -> ApiResult<Self> {
        let mut state = Self::new(GlobalStore::open(config_dir)?);
        state.finish_rename(config_dir)?;
        let registry = state.global.settings.media_registry.clone();
        state.media.load(&registry, Uuid::nil(), config_dir);
        crate::encryption::finish_switches(&mut state.media);
        for entry in state.global.settings.machines.clone() {
            let machine = Machine::load(entry.uuid, config_dir.join(&entry.settings_file));
            if let Some(error) = &machine.access_error {
                tracing::warn!(machine = %entry.uuid, file = entry.settings_file, %error, "machine is inaccessible");
            }
            state.add_machine(machine);
        }
        Ok(state)
    }

    pub(crate) fn add_machine(&mut self, machine: Machine) {
        let folder = machine.folder().to_owned();
        self.media.load(&machine.settings.media_registry, machine.id, &folder);
        crate::encryption::finish_switches(&mut self.media);
        if !self.order.contains(&machine.id) {
            self.order.push(machine.id);
        }
        self.machines.insert(machine.id, machine);
    }

    /// The registered machine with this name or id.
    pub(crate) fn find(&self, name_or_id: &str) -> ApiResult<&Machine> {
        let plain = name_or_id.trim_start_matches('{').trim_end_matches('}');
        if let Ok(id) = Uuid::try_parse(plain) {
            return self.machine(id);
        }
        let named = self.order.iter().filter_map(|id| self.machines.get(id));
        named.into_iter().find(|m| m.access_error.is_none() && m.settings.name == name_or_id).ok_or_else(
            || ApiError::not_found(format!("Could not find a registered machine named '{name_or_id}'")),
        )
    }

    /// Looks again at a machine whose settings file could not be used.
    pub(crate) fn retry(&mut self, peer: u64, reference: MachineRef) {
        let Ok(machine) = self.resolve(peer, reference) else { return };
        if machine.access_error.is_none() || !self.machines.contains_key(&machine.id) {
            return;
        }
        let again = Machine::load(machine.id, machine.file.clone());
        if again.access_error.is_none() {
            tracing::info!(machine = %again.id, "machine is accessible again");
        }
        self.add_machine(again);
    }

    /// Finishes a rename that the service was killed in.
    fn finish_rename(&mut self, config_dir: &Path) -> ApiResult<()> {
        let note = config_dir.join(RENAME_NOTE);
        let Ok(text) = fs::read_to_string(&note) else { return Ok(()) };
        let lines: Vec<&str> = text.lines().collect();
        if let [id, old, new] = lines.as_slice()
            && let Ok(id) = Uuid::try_parse(id)
        {
            tracing::warn!(machine = %id, old, new, "finishing a rename that was interrupted");
            if let Err(error) = move_machine_files(Path::new(old), Path::new(new)) {
                tracing::error!(machine = %id, %error, "the rename cannot be finished");
            }
            let there = if Path::new(new).exists() { new } else { old };
            self.global.edit(|settings| {
                for entry in settings.machines.iter_mut().filter(|e| e.uuid == id) {
                    entry.settings_file = (*there).to_owned();
                }
            })?;
        }
        let _ = fs::remove_file(&note);
        Ok(())
    }
}

/// Moves a machine's folder and the files in it that are named after the settings file. What is moved already stays.
fn move_machine_files(old: &Path, new: &Path) -> ApiResult<()> {
    let (Some(old_dir), Some(new_dir)) = (old.parent(), new.parent()) else { return Ok(()) };
    if old_dir != new_dir && old_dir.exists() && !new_dir.exists() {
        if let Some(parent) = new_dir.parent() {
            fs::create_dir_all(parent)
                .map_err(|e| file_error("Could not create the directory", parent, &e))?;
        }
        fs::rename(old_dir, new_dir).map_err(|e| {
            file_error(&format!("Could not rename the directory '{}' to", old_dir.display()), new_dir, &e)
        })?;
        sync_dir(new_dir.parent());
    }
    let (Some(old_name), Some(new_name)) = (old.file_name(), new.file_name()) else { return Ok(()) };
    for suffix in ["", "-prev"] {
        let with = |name: &std::ffi::OsStr| {
            let mut name = name.to_owned();
            name.push(suffix);
            new_dir.join(name)
        };
        rename_if_there(&with(old_name), &with(new_name))?;
    }
    let nvram = |file: &std::ffi::OsStr| new_dir.join(file).with_extension("nvram");
    rename_if_there(&nvram(old_name), &nvram(new_name))?;
    sync_dir(Some(new_dir));
    Ok(())
}

fn rename_if_there(from: &Path, to: &Path) -> ApiResult<()> {
    if from == to || !from.exists() || to.exists() {
        return Ok(());
    }
    fs::rename(from, to)
        .map_err(|e| file_error(&format!("Could not rename the file '{}' to", from.display()), to, &e))
}

fn sync_dir(dir: Option<&Path>) {
    if let Some(dir) = dir
        && let Ok(file) = fs::File::open(dir)
    {
        // A directory that cannot be synchronized (some network file systems) is none the worse for it.
        let _ = file.sync_all();
    }
}

/// `name` as a file name: what file systems or shells give a meaning becomes an underscore.
pub(crate) fn sanitize(name: &str) -> String {
    let kept = |c: char| if c.is_control() || "/\\:*?\"<>|`".contains(c) { '_' } else { c };
    let mut text: String = name.chars().map(kept).collect();
    if text.starts_with('.') {
        text.replace_range(..1, "_");
    }
    while text.ends_with([' ', '.']) {
        text.pop();
        text.push('_');
    }
    text
}

/// The options that `createMachine` takes as text: `UUID=…,forceOverwrite=1,directoryIncludesUUID=1`.
#[derive(Default)]
struct CreateFlags {
    id: Option<Uuid>,
    overwrite: bool,
    folder_with_id: bool,
}

impl CreateFlags {
    fn parse(text: &str) -> ApiResult<Self> {
        let mut flags = Self::default();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, "1"));
            match key {
                "UUID" => {
                    let id = Uuid::try_parse(value).map_err(|_| {
                        ApiError::invalid_arg(format!("Invalid UUID in the creation flags: {value}"))
                    })?;
                    flags.id = Some(id);
                }
                "forceOverwrite" => flags.overwrite = value == "1",
                "directoryIncludesUUID" => flags.folder_with_id = value == "1",
                other => return Err(ApiError::invalid_arg(format!("Unknown creation flag '{other}'"))),
            }
        }
        Ok(flags)
    }
}

impl Svc {
    /// IVirtualBox::composeMachineFilename.
    pub(crate) fn compose_filename(
        &self,
        name: &str,
        group: &str,
        flags: &str,
        base: &str,
    ) -> ApiResult<PathBuf> {
        let state = self.state.lock();
        let flags = CreateFlags::parse(flags)?;
        if name.is_empty() {
            return Err(ApiError::invalid_arg("The machine name must not be empty"));
        }
        let base = match base {
            "" => state.global.default_machine_folder(),
            given => PathBuf::from(given),
        };
        let mut dir = base;
        for element in group.split('/').filter(|e| !e.is_empty()) {
            dir.push(sanitize(element));
        }
        let name = sanitize(name);
        match flags.id.filter(|_| flags.folder_with_id) {
            Some(id) => dir.push(format!("{name} {id}")),
            None => dir.push(&name),
        }
        Ok(dir.join(format!("{name}.vbox")))
    }

    /// IVirtualBox::createMachine. Nothing is written before the client saves the machine.
    pub(crate) fn create_machine(
        &self,
        peer: &Peer,
        file: &str,
        name: &str,
        groups: Vec<String>,
        os: &str,
        flags: &str,
    ) -> ApiResult<ObjRef<IMachine>> {
        let groups = check_groups(groups)?;
        let parsed = CreateFlags::parse(flags)?;
        let file = match file {
            "" => self.compose_filename(name, &groups[0], flags, "")?,
            given => absolute(given)?,
        };
        if name.is_empty() {
            return Err(ApiError::invalid_arg("The machine name must not be empty"));
        }
        let os = os_type(if os.is_empty() { "Other" } else { os })?;
        let mut state = self.state.lock();
        let id = parsed.id.unwrap_or_else(Uuid::new_v4);
        check_not_registered(&state, id, &file)?;
        if file.exists() && !parsed.overwrite {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!("Machine settings file '{}' already exists", file.display()),
            )
            .on("IMachine"));
        }
        let mut settings = MachineSettings::new_for(os, name, id);
        settings.groups = groups;
        settings.directory_includes_uuid = parsed.folder_with_id;
        settings.name_sync = folder_is_named(&file, &settings);
        let machine = Machine {
            id,
            store: Some(MachineStore::create(&file)),
            file,
            settings: Arc::new(settings),
            access_error: None,
            state: MachineState::PoweredOff,
            last_change: now_ms(),
            lock: Lock::None,
        };
        state.unregistered.insert(id, (peer.id, machine));
        Ok(ObjRef::new(MachineRef::Unregistered(id).path()))
    }

    /// IVirtualBox::openMachine.
    pub(crate) fn open_machine(&self, peer: &Peer, file: &str) -> ApiResult<ObjRef<IMachine>> {
        let file = absolute(file)?;
        let machine = Machine::load(Uuid::nil(), file);
        if let Some(error) = machine.access_error {
            return Err(error);
        }
        let id = machine.id;
        self.state.lock().unregistered.insert(id, (peer.id, machine));
        Ok(ObjRef::new(MachineRef::Unregistered(id).path()))
    }

    /// IVirtualBox::registerMachine.
    pub(crate) fn register_machine(&self, peer: &Peer, id: Uuid) -> ApiResult<()> {
        let mut state = self.state.lock();
        let (_, machine) =
            state.unregistered.get(&id).filter(|(owner, _)| *owner == peer.id).ok_or_else(gone)?;
        check_not_registered(&state, id, &machine.file)?;
        if !machine.file.exists() {
            return Err(ApiError::new(
                ResultCode::InvalidObjectState,
                format!("The machine '{}' must be saved before it is registered", machine.display_name()),
            ));
        }
        if let Some(other) = state.machines.values().find(|m| m.settings.name == machine.settings.name) {
            return Err(ApiError::new(
                ResultCode::InvalidArg,
                format!(
                    "Registered machine with UUID {{{}}} ('{}') already exists",
                    other.id, other.settings.name
                ),
            ));
        }
        let entry = MachineEntry { uuid: id, settings_file: machine.file.display().to_string() };
        state.global.edit(|settings| settings.machines.push(entry))?;
        let Some((_, machine)) = state.unregistered.remove(&id) else { return Err(gone()) };
        tracing::info!(machine = %id, name = machine.settings.name, "registered");
        state.add_machine(machine);
        state.emit(IEventSource::OnMachineRegistered, (id.to_string(), true));
        Ok(())
    }

    /// IMachine::saveSettings.
    pub(crate) fn save_settings(&self, peer: &Peer, reference: MachineRef) -> ApiResult<()> {
        let mut state = self.state.lock();
        state.check_mutable(peer.id, reference, true)?;
        let id = state.resolve(peer.id, reference)?.id;
        if !state.machines.contains_key(&id) {
            return self.save_unregistered(&mut state, id);
        }
        let machine = state.machine(id)?;
        let Lock::Held(held) = &machine.lock else { return Err(gone()) };
        let wanted = held.copy.clone();
        if wanted.name != machine.settings.name {
            if let Some(other) =
                state.machines.values().find(|m| m.id != id && m.settings.name == wanted.name)
            {
                return Err(ApiError::new(
                    ResultCode::FileError,
                    format!(
                        "Could not rename the machine to '{}': a registered machine {{{}}} has this name already \
                         (VERR_ALREADY_EXISTS)",
                        wanted.name, other.id
                    ),
                ));
            }
            self.rename(&mut state, id, &wanted)?;
        }
        self.commit(&mut state, id, wanted)?;
        state.emit(IEventSource::OnMachineDataChanged, (id.to_string(), false));
        Ok(())
    }

    fn save_unregistered(&self, state: &mut State, id: Uuid) -> ApiResult<()> {
        let (_, machine) = state.unregistered.get_mut(&id).ok_or_else(gone)?;
        let mut settings = (*machine.settings).clone();
        settings.last_state_change.get_or_insert_with(Timestamp::now);
        machine.store.as_mut().ok_or_else(gone)?.save(&settings)?;
        machine.settings = Arc::new(settings);
        Ok(())
    }

    /// Writes settings to the machine's file and makes them the committed ones; a lock's copy becomes equal to them.
    fn commit(&self, state: &mut State, id: Uuid, settings: Arc<MachineSettings>) -> ApiResult<()> {
        let complete = Arc::new(complete(state, id, &settings)?);
        let machine = state.machine_mut(id)?;
        machine.store.as_mut().ok_or_else(gone)?.save(&complete)?;
        machine.settings = complete.clone();
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = complete;
        }
        Ok(())
    }

    /// Writes the machine's state and its time to its file, with the committed settings; a lock's changes stay unsaved.
    pub(crate) fn store_state(&self, state: &mut State, id: Uuid) -> ApiResult<()> {
        let machine = state.machine(id)?;
        let aborted = matches!(machine.state, MachineState::Aborted | MachineState::AbortedSaved);
        let last = Some(Timestamp(machine.last_change.div_euclid(1000)));
        let settings = machine.settings.clone();
        let update = |s: &MachineSettings| {
            let mut s = s.clone();
            s.aborted = aborted;
            s.last_state_change = last;
            Arc::new(s)
        };
        let settings = Arc::new(complete(state, id, &update(&settings))?);
        let machine = state.machine_mut(id)?;
        machine.store.as_mut().ok_or_else(gone)?.save(&settings)?;
        machine.settings = settings;
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = update(&held.copy);
        }
        Ok(())
    }

    /// The guest of a running machine has ejected a medium. Other changes that are not saved stay so.
    pub(crate) fn eject_medium(
        &self,
        state: &mut State,
        id: Uuid,
        controller: &str,
        port: i32,
        device: i32,
    ) -> ApiResult<()> {
        let place = |s: &MachineSettings| {
            let mut s = s.clone();
            let attached = &mut s.hardware.storage_controller_mut(controller)?.attached;
            let drive = attached
                .iter_mut()
                .find(|a| a.port == port && a.device == device && a.drive != DriveType::HardDisk)?;
            (drive.image, drive.host_drive, drive.ejected) = (None, None, true);
            let temporary = drive.temp_eject;
            Some((Arc::new(s), temporary))
        };
        let Lock::Held(held) = &state.machine(id)?.lock else { return Err(gone()) };
        let (copy, temporary) = place(&held.copy).ok_or_else(|| {
            ApiError::not_found(format!(
                "No removable drive at port {port}, device {device} of controller '{controller}'"
            ))
        })?;
        let committed = place(&state.machine(id)?.settings).filter(|_| !temporary);
        let committed = match committed {
            Some((settings, _)) => Some(Arc::new(complete(state, id, &settings)?)),
            None => None,
        };
        state.media.unlock_for(id);
        if let Err(error) = state.media.lock_for(id, &copy) {
            tracing::error!(machine = %id, %error, "media of a running VM");
        }
        let machine = state.machine_mut(id)?;
        if let Some(settings) = committed {
            machine.store.as_mut().ok_or_else(gone)?.save(&settings)?;
            machine.settings = settings;
        }
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = copy;
        }
        state.emit(IEventSource::OnMachineDataChanged, (id.to_string(), temporary));
        Ok(())
    }

    /// Moves the machine's files to where its new name puts them, if the folder is named after it.
    fn rename(&self, state: &mut State, id: Uuid, wanted: &MachineSettings) -> ApiResult<()> {
        let machine = state.machine(id)?;
        let old = machine.file.clone();
        if !machine.settings.name_sync || !folder_is_named(&old, &machine.settings) {
            return Ok(());
        }
        let Some(new) = renamed_file(&old, wanted) else { return Ok(()) };
        if new == old {
            return Ok(());
        }
        let (Some(old_dir), Some(new_dir)) = (old.parent(), new.parent()) else { return Ok(()) };
        if new_dir != old_dir && new_dir.exists() {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!(
                    "Could not rename the directory '{}' to '{}' to save the settings file (VERR_ALREADY_EXISTS)",
                    old_dir.display(),
                    new_dir.display()
                ),
            ));
        }
        let note = self.config_dir.join(RENAME_NOTE);
        let lines = format!("{id}\n{}\n{}\n", old.display(), new.display());
        write_note(&note, &lines).map_err(|e| file_error("Could not write", &note, &e))?;
        let moved = move_machine_files(&old, &new).and_then(|()| {
            state.global.edit(|settings| {
                for entry in settings.machines.iter_mut().filter(|e| e.uuid == id) {
                    entry.settings_file = new.display().to_string();
                }
            })
        });
        if let Err(error) = moved {
            // Back to how it was, as far as that goes.
            let _ = move_machine_files(&new, &old);
            let _ = fs::remove_file(&note);
            return Err(error);
        }
        let _ = fs::remove_file(&note);
        let inside: Vec<Uuid> = state.media.ids().collect();
        for medium in inside {
            if let Ok(m) = state.media.medium(medium)
                && let Ok(rest) = m.location.strip_prefix(old_dir)
            {
                let location = new_dir.join(rest);
                state.media.relocate(medium, location);
            }
        }
        let machine = state.machine_mut(id)?;
        machine.file = new.clone();
        if let Some(store) = &mut machine.store {
            store.moved_to(&new);
        }
        tracing::info!(machine = %id, from = %old.display(), to = %new.display(), "machine renamed");
        Ok(())
    }

    /// IMachine::unregister.
    pub(crate) fn unregister(
        &self,
        peer: &Peer,
        id: Uuid,
        mode: CleanupMode,
    ) -> ApiResult<Vec<ObjRef<IMedium>>> {
        let mut state = self.state.lock();
        self.wait_for(&mut state, std::time::Duration::from_secs(10), |s| {
            s.machines.get(&id).is_none_or(|m| m.session_state() != main_api::enums::SessionState::Unlocking)
        });
        let machine = state.machine(id)?;
        if !matches!(machine.lock, Lock::None) {
            return Err(ApiError::new(
                ResultCode::InvalidObjectState,
                format!("Cannot unregister the machine '{}' while it is locked", machine.display_name()),
            ));
        }
        let mut settings = (*machine.settings).clone();
        let mut detached: Vec<(Uuid, DriveType)> = Vec::new();
        if mode != CleanupMode::UnregisterOnly && machine.access_error.is_none() {
            for controller in &mut settings.hardware.storage_controllers {
                let media = controller.attached.iter().filter_map(|a| a.image.map(|id| (id, a.drive)));
                detached.extend(media);
                controller.attached.retain(|a| a.image.is_none());
            }
        }
        state.global.edit(|global| global.machines.retain(|e| e.uuid != id))?;
        let mut machine = state.machines.remove(&id).ok_or_else(gone)?;
        state.order.retain(|m| *m != id);
        let mut returned = Vec::new();
        if !detached.is_empty() {
            // The media stay known for the caller, who may want to delete them.
            for (medium, kind) in detached {
                let wanted = match mode {
                    CleanupMode::Full => true,
                    CleanupMode::DetachAllReturnHardDisksOnly => kind == DriveType::HardDisk,
                    CleanupMode::DetachAllReturnHardDisksAndVMRemovable => {
                        kind == DriveType::HardDisk
                            || state
                                .media
                                .medium(medium)
                                .is_ok_and(|m| m.location.starts_with(machine.folder()))
                    }
                    CleanupMode::DetachAllReturnNone | CleanupMode::UnregisterOnly => false,
                };
                if wanted && users_of(&state, medium).is_empty() {
                    returned.push(medium);
                }
            }
            settings.media_registry = Default::default();
            if let Some(store) = &mut machine.store {
                store.save(&settings)?;
            }
            machine.settings = Arc::new(settings);
        }
        self.close_media_of(&mut state, id, &returned);
        tracing::info!(machine = %id, name = machine.settings.name, "unregistered");
        state.unregistered.insert(id, (peer.id, machine));
        state.emit(IEventSource::OnMachineRegistered, (id.to_string(), false));
        Ok(returned.into_iter().map(|medium| ObjRef::new(medium_path(medium))).collect())
    }

    /// IMachine::deleteConfig: deletes the media given, then the machine's own files.
    pub(crate) fn delete_config(
        self: &Arc<Self>,
        peer: &Peer,
        reference: MachineRef,
        media: Vec<Uuid>,
    ) -> ApiResult<ObjRef<IProgress>> {
        let mut state = self.state.lock();
        let machine = state.resolve(peer.id, reference)?;
        if state.machines.contains_key(&machine.id) {
            return Err(ApiError::new(
                ResultCode::InvalidVmState,
                format!("Cannot delete settings of a registered machine '{}'", machine.display_name()),
            ));
        }
        let (id, file, settings) = (machine.id, machine.file.clone(), machine.settings.clone());
        let progress = Arc::new(Progress::new(
            format!("Deleting '{}'", machine.display_name()),
            u32::try_from(media.len()).unwrap_or(0) + 1,
            false,
        ));
        let path = state.add_progress(progress.clone());
        let svc = self.clone();
        let work = move || {
            for medium in media {
                let location = svc.state.lock().media.find(medium).map(|m| m.location.display().to_string());
                progress.next_operation(&format!("Deleting '{}'", location.unwrap_or_default()));
                if let Err(error) = svc.delete_medium_now(medium) {
                    progress.complete(Err(error));
                    return;
                }
            }
            let outcome = delete_machine_files(&file, &settings);
            let mut state = svc.state.lock();
            if outcome.is_ok() {
                state.unregistered.remove(&id);
            }
            drop(state);
            progress.complete(outcome);
            svc.wake_main();
        };
        std::thread::Builder::new()
            .name("delete-config".into())
            .spawn(work)
            .map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))?;
        Ok(ObjRef::new(path))
    }

    /// The settings that a VM starts with: those on file, locations of media absolute, every medium that is attached on record.
    pub(crate) fn effective_settings(&self, state: &State, id: Uuid) -> ApiResult<String> {
        self.effective(state, id, &state.machine(id)?.settings)
    }

    /// As [`Self::effective_settings`], of other settings than those on file.
    pub(crate) fn effective(&self, state: &State, id: Uuid, settings: &MachineSettings) -> ApiResult<String> {
        let machine = state.machine(id)?;
        let mut settings = settings.clone();
        let mut registry = state.media.registry(id, machine.folder(), &settings.media_registry, true);
        // Media that are on record with another machine are attached here all the same.
        for (medium, _) in state.media.attached(&settings) {
            if registry.find(medium).is_none() {
                let owner = state.media.medium(medium)?.registries.first().copied().unwrap_or_default();
                let theirs = state.media.registry(owner, machine.folder(), &Default::default(), true);
                registry.hard_disks.extend(theirs.hard_disks.into_iter().filter(|m| holds(m, medium)));
                registry.dvd_images.extend(theirs.dvd_images.into_iter().filter(|m| m.uuid == medium));
                registry.floppy_images.extend(theirs.floppy_images.into_iter().filter(|m| m.uuid == medium));
            }
        }
        settings.media_registry = registry;
        crate::store::machine_text(&settings)
    }

    /// IMachine::discardSavedState.
    pub(crate) fn discard_saved_state(
        &self,
        peer: &Peer,
        reference: MachineRef,
        remove_file: bool,
    ) -> ApiResult<()> {
        let mut state = self.state.lock();
        let id = state.resolve(peer.id, reference)?.id;
        let machine = state.machine_mut(id)?;
        if !matches!(machine.state, MachineState::Saved | MachineState::AbortedSaved) {
            return Err(ApiError::new(
                ResultCode::InvalidVmState,
                format!(
                    "Cannot delete the machine state as the machine is not in the saved state (state is {})",
                    machine.state.name()
                ),
            ));
        }
        if !matches!(machine.lock, Lock::Held(_)) {
            return Err(gone());
        }
        let file = machine.folder().join(&machine.settings.state_file);
        let without = |s: &MachineSettings| {
            let mut s = s.clone();
            s.state_file.clear();
            s.aborted = false;
            Arc::new(s)
        };
        // A snapshot may keep the very file.
        let shared = crate::objects::snapshots(&machine.settings)
            .into_iter()
            .any(|s| s.state_file == machine.settings.state_file);
        machine.settings = without(&machine.settings);
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = without(&held.copy);
        }
        machine.state = MachineState::PoweredOff;
        machine.last_change = now_ms();
        self.store_state(&mut state, id)?;
        if remove_file && !shared {
            let _ = fs::remove_file(&file);
        }
        state.emit(IEventSource::OnMachineStateChanged, (id.to_string(), MachineState::PoweredOff));
        Ok(())
    }

    /// The machine's VM process, if it runs and can be reached, with the settings that hold for it now.
    pub(crate) fn running_vm(
        &self,
        peer: u64,
        reference: MachineRef,
    ) -> ApiResult<Option<(Peer, Arc<MachineSettings>)>> {
        let mut state = self.state.lock();
        let id = state.resolve(peer, reference)?.id;
        let Ok(machine) = state.machine_mut(id) else { return Ok(None) };
        let Lock::Held(held) = &machine.lock else { return Ok(None) };
        let settings = held.copy.clone();
        Ok(machine.vm().and_then(|vm| vm.peer.clone()).map(|vm| (vm, settings)))
    }

    /// Tells a running VM what has changed in its settings: a network adapter, a bandwidth group, or the attribute of that name.
    pub(crate) fn tell_vm(
        &self,
        peer: u64,
        reference: MachineRef,
        part: &crate::objects::Part,
        attribute: &str,
    ) -> ApiResult<()> {
        use crate::objects::Part;
        use main_api::idl::{IMachine, IVMProcess};
        use main_api::paths::ROOT;
        match part {
            Part::NetworkAdapter(slot) | Part::NatEngine(slot) => {
                let Some((vm, settings)) = self.running_vm(peer, reference)? else { return Ok(()) };
                let text = crate::store::machine_text(&settings)?;
                let slot = u32::try_from(*slot).unwrap_or(u32::MAX);
                vm.call(ROOT, IVMProcess::NetworkAdapterChange, (slot, text))
            }
            Part::BandwidthGroup(name) => {
                let Some((vm, settings)) = self.running_vm(peer, reference)? else { return Ok(()) };
                let groups = &settings.hardware.bandwidth_groups;
                let Some(group) = groups.iter().find(|g| g.name == *name) else { return Ok(()) };
                vm.call(ROOT, IVMProcess::BandwidthGroupChange, (name.clone(), group.max_bytes_per_sec))
            }
            Part::Machine if attribute == IMachine::CPUExecutionCap.name => {
                let Some((vm, settings)) = self.running_vm(peer, reference)? else { return Ok(()) };
                vm.call(ROOT, IVMProcess::CPUExecutionCapChange, (settings.hardware.cpu.execution_cap,))
            }
            _ => Ok(()),
        }
    }

    /// Stores an extra-data value at once, as IMachine::setExtraData does with or without a session.
    pub(crate) fn set_machine_extra_data(
        &self,
        state: &mut State,
        id: Uuid,
        key: &str,
        value: &str,
    ) -> ApiResult<()> {
        let set = |s: &MachineSettings| {
            let mut s = s.clone();
            match value {
                "" => s.extra_data.remove(key),
                _ => s.extra_data.insert(key.to_owned(), value.to_owned()),
            };
            Arc::new(s)
        };
        let machine = state.machine_mut(id)?;
        let updated = set(&machine.settings);
        machine.store.as_mut().ok_or_else(gone)?.save(&updated)?;
        machine.settings = updated;
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = set(&held.copy);
        }
        state.emit(IEventSource::OnExtraDataChanged, (id.to_string(), key.to_owned(), value.to_owned()));
        Ok(())
    }

    /// The machine is registered no more. A medium that was on record only in its file goes on record with another machine
    /// that attaches it, or is closed; those in `keep` stay known to the client that may want to delete them.
    fn close_media_of(&self, state: &mut State, machine: Uuid, keep: &[Uuid]) {
        for medium in state.media.forget_owner(machine) {
            if let Some(user) = users_of(state, medium).first().copied() {
                if let Ok(medium) = state.media.medium_mut(medium) {
                    medium.registries.push(user);
                }
                if let Err(error) = self.store_state(state, user) {
                    tracing::error!(machine = %user, %medium, %error, "cannot take over a medium");
                }
            } else if keep.contains(&medium) {
                if let Ok(medium) = state.media.medium_mut(medium) {
                    medium.closed = true;
                }
            } else {
                state.media.remove(medium);
            }
        }
    }
}

/// Whether `medium` is `id` or has it below.
fn holds(medium: &settings::Medium, id: Uuid) -> bool {
    medium.uuid == id || medium.children.iter().any(|c| holds(c, id))
}

/// The machines that attach the medium, in their committed settings or in a lock's copy.
pub(crate) fn users_of(state: &State, medium: Uuid) -> Vec<Uuid> {
    let attaches = |s: &MachineSettings| {
        s.hardware.storage_controllers.iter().any(|c| c.attached.iter().any(|a| a.image == Some(medium)))
    };
    let uses =
        |m: &&Machine| attaches(&m.settings) || matches!(&m.lock, Lock::Held(held) if attaches(&held.copy));
    state.machines.values().filter(uses).map(|m| m.id).collect()
}

/// A medium goes on record with the first machine that attaches it. Those that were on record nowhere until now.
pub(crate) fn record_media(state: &mut State, id: Uuid, settings: &MachineSettings) -> Vec<Uuid> {
    let mut recorded = Vec::new();
    for (medium, _) in state.media.attached(settings) {
        for medium in state.media.chain(medium).unwrap_or_default() {
            if let Ok(medium) = state.media.medium_mut(medium)
                && medium.registries.is_empty()
            {
                medium.registries.push(id);
                medium.closed = false;
                recorded.push(medium.id);
            }
        }
    }
    recorded
}

/// `settings` with the media that belong into the machine's file and its state.
fn complete(state: &mut State, id: Uuid, settings: &MachineSettings) -> ApiResult<MachineSettings> {
    record_media(state, id, settings);
    let machine = state.machine(id)?;
    let mut settings = settings.clone();
    settings.media_registry = state.media.registry(id, machine.folder(), &settings.media_registry, false);
    settings.last_state_change = Some(Timestamp(machine.last_change.div_euclid(1000)));
    settings.aborted = matches!(machine.state, MachineState::Aborted | MachineState::AbortedSaved);
    Ok(settings)
}

pub(crate) fn absolute(path: &str) -> ApiResult<PathBuf> {
    let path = Path::new(path);
    if !path.is_absolute() {
        return Err(ApiError::new(
            ResultCode::FileError,
            format!("The path '{}' is not absolute", path.display()),
        ));
    }
    // "." and ".." go; symbolic links stay what the user called them.
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            other => clean.push(other),
        }
    }
    Ok(clean)
}

pub(crate) fn check_not_registered(state: &State, id: Uuid, file: &Path) -> ApiResult<()> {
    match state.machines.values().find(|m| m.id == id || m.file == file) {
        None => Ok(()),
        Some(other) => Err(ApiError::new(
            ResultCode::InvalidArg,
            format!(
                "Registered machine with UUID {{{}}} ('{}') already exists",
                other.id,
                other.file.display()
            ),
        )),
    }
}

/// What a folder of a machine is called.
fn folder_name(settings: &MachineSettings) -> String {
    let name = sanitize(&settings.name);
    if settings.directory_includes_uuid { format!("{name} {}", settings.uuid) } else { name }
}

fn folder_is_named(file: &Path, settings: &MachineSettings) -> bool {
    let folder = file.parent().and_then(Path::file_name);
    folder.is_some_and(|f| f == folder_name(settings).as_str())
}

/// Where the settings file lies after a rename.
fn renamed_file(old: &Path, wanted: &MachineSettings) -> Option<PathBuf> {
    let base = old.parent()?.parent()?;
    Some(base.join(folder_name(wanted)).join(format!("{}.vbox", sanitize(&wanted.name))))
}

fn write_note(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Deletes what VirtualBox made for a machine; its folders only if nothing else is in them.
fn delete_machine_files(file: &Path, settings: &MachineSettings) -> ApiResult<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let delete = |path: &Path| match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("Could not delete the file", path, &error))
        }
        _ => Ok(()),
    };
    let mut prev = file.as_os_str().to_owned();
    prev.push("-prev");
    delete(file)?;
    delete(Path::new(&prev))?;
    let _ = fs::remove_file(file.with_extension("nvram"));
    if !settings.state_file.is_empty() {
        let _ = fs::remove_file(folder.join(&settings.state_file));
    }
    let logs = log_folder(file);
    for entry in fs::read_dir(&logs).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("VBox") && name.contains(".log") {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(&logs);
    let snapshots = if settings.snapshot_folder.is_empty() { "Snapshots" } else { &settings.snapshot_folder };
    let _ = fs::remove_dir(folder.join(snapshots));
    let _ = fs::remove_dir(folder);
    Ok(())
}

/// The VM that knew which drives the guest has ejected is gone.
pub(crate) fn forget_ejects(settings: &mut Arc<MachineSettings>) {
    let controllers = &settings.hardware.storage_controllers;
    if controllers.iter().flat_map(|c| &c.attached).any(|a| a.ejected) {
        let controllers = &mut Arc::make_mut(settings).hardware.storage_controllers;
        controllers.iter_mut().flat_map(|c| &mut c.attached).for_each(|a| a.ejected = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        assert_eq!(sanitize("My VM"), "My VM");
        assert_eq!(sanitize("a/b:c"), "a_b_c");
        assert_eq!(sanitize(".hidden"), "_hidden");
        assert_eq!(sanitize("x. "), "x._");
        assert_eq!(sanitize(".."), "__");
    }

    #[test]
    fn a_machine_keeps_a_folder_that_is_not_named_after_it() {
        let s = MachineSettings { name: "a".into(), ..Default::default() };
        assert!(folder_is_named(Path::new("/vms/a/a.vbox"), &s));
        assert!(!folder_is_named(Path::new("/vms/other/a.vbox"), &s));
        let wanted = MachineSettings { name: "b".into(), ..Default::default() };
        assert_eq!(renamed_file(Path::new("/vms/a/a.vbox"), &wanted).unwrap(), Path::new("/vms/b/b.vbox"));
    }

    #[test]
    fn relative_paths_are_refused_and_dots_resolved() {
        assert!(absolute("a.vdi").is_err());
        assert_eq!(absolute("/a/./b/../c").unwrap(), Path::new("/a/c"));
    }
}
