//! Media: every image that a registered machine or a client has named, and who uses it.
//!
//! As in VirtualBox 4 and later, a medium is on record in the settings file of the machine to which it was first
//! attached; one that is attached nowhere is known until the service ends, unless `VirtualBox.xml` lists it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use settings::{self as set, DriveType, MachineSettings, MediaRegistry, StringMap};
use uuid::Uuid;
use vbox_types::ResultCode;

/// What is known of a medium from its file.
#[derive(Clone, Debug)]
pub(crate) struct Info {
    pub(crate) logical_size: u64,
    pub(crate) size: u64,
    pub(crate) variant: vd::Variant,
}

/// A medium.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    pub(crate) id: Uuid,
    pub(crate) kind: DriveType,
    /// Absolute; of a target, what VirtualBox calls it (`HOST|TARGET` or `HOST|TARGET|LUN`).
    pub(crate) location: PathBuf,
    /// As settings files write it.
    pub(crate) format: String,
    pub(crate) medium_type: set::MediumType,
    pub(crate) description: String,
    pub(crate) auto_reset: bool,
    pub(crate) properties: StringMap,
    pub(crate) parent: Option<Uuid>,
    /// Machines in whose settings files the medium is on record; nil for `VirtualBox.xml`.
    pub(crate) registries: Vec<Uuid>,
    /// Whether the file is there.
    pub(crate) phase: Phase,
    /// No longer listed: known only to the client that unregistered its machine and may want to delete it.
    pub(crate) closed: bool,
    /// From the file, when it was last looked at.
    pub(crate) info: Option<Info>,
    pub(crate) last_error: String,
    /// Machines whose VMs have it open, and whether for writing.
    pub(crate) users: BTreeMap<Uuid, bool>,
    /// Operations that read it, and whether one writes it.
    pub(crate) readers: u32,
    pub(crate) writer: bool,
}

/// What an operation does with a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Read,
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    NotCreated,
    Creating,
    There,
}

impl Medium {
    pub(crate) fn new(id: Uuid, kind: DriveType, location: PathBuf, format: &str) -> Self {
        Self {
            id,
            kind,
            location,
            format: format.to_owned(),
            medium_type: match kind {
                DriveType::HardDisk => set::MediumType::Normal,
                // VirtualBox shows these two so, whatever the file says.
                DriveType::Dvd | DriveType::Floppy => set::MediumType::Writethrough,
            },
            description: String::new(),
            auto_reset: false,
            properties: StringMap::new(),
            parent: None,
            registries: Vec::new(),
            phase: Phase::There,
            closed: false,
            info: None,
            last_error: String::new(),
            users: BTreeMap::new(),
            readers: 0,
            writer: false,
        }
    }

    /// Whether an operation on its file may begin.
    fn check(&self, task: Task) -> ApiResult<()> {
        let name = self.location.display();
        let writing = self.writer || self.users.values().any(|writes| *writes);
        let problem = match self.phase {
            Phase::NotCreated => format!("Storage for the medium '{name}' is not created yet"),
            Phase::Creating => format!("Storage for the medium '{name}' is being created"),
            Phase::There if writing => format!("Medium '{name}' is locked for writing by another task"),
            Phase::There if task == Task::Write && (self.readers > 0 || !self.users.is_empty()) => {
                format!("Medium '{name}' is locked for reading by another task")
            }
            Phase::There => return Ok(()),
        };
        Err(ApiError::new(ResultCode::InvalidObjectState, problem).on("IMedium"))
    }

    /// Whether it is a file. A disk of a target is none, and looking at it takes as long as the network does.
    pub(crate) fn is_file(&self) -> bool {
        vd::Format::from_name(&self.format) != Some(vd::Format::Iscsi)
    }

    /// Looks at the file. Targets are looked at by [`Medium::looking`] alone, without the state's lock.
    pub(crate) fn refresh(&mut self) {
        if self.phase == Phase::There && self.is_file() {
            let seen = self.looking()();
            self.saw(seen);
        }
    }

    /// What tells how the medium is, which may take a while.
    pub(crate) fn looking(
        &self,
    ) -> impl FnOnce() -> Result<vd::MediumInfo, vd::Error> + Send + 'static + use<> {
        let (location, format) = (self.location.clone(), vd::Format::from_name(&self.format));
        let source = (!self.is_file()).then(|| self.target());
        move || match source {
            Some(target) => target?.info(),
            None => vd::info(&location, format),
        }
    }

    fn target(&self) -> Result<vd::Source, vd::Error> {
        vd::Source::iscsi(&self.location, |name| self.properties.get(name).map(String::as_str))
    }

    /// What has to be opened for its content.
    fn source(&self) -> ApiResult<vd::Source> {
        let location = self.location.display();
        let format = vd::Format::from_name(&self.format).ok_or_else(|| {
            ApiError::new(
                ResultCode::NotSupported,
                format!("Medium '{location}' is of the unknown format '{}'", self.format),
            )
        })?;
        if self.is_file() {
            return Ok((self.location.clone(), format).into());
        }
        self.target()
            .map_err(|e| ApiError::new(ResultCode::InvalidArg, open_error(&self.location, &e)).on("IMedium"))
    }

    /// Takes in what was seen in the file.
    pub(crate) fn saw(&mut self, seen: Result<vd::MediumInfo, vd::Error>) {
        match seen {
            Ok(info) => {
                self.info = Some(Info {
                    logical_size: info.logical_size.0,
                    size: info.size_on_disk.0,
                    variant: info.variant,
                });
                self.last_error.clear();
                if let (Some(found), true) = (info.uuid, self.kind == DriveType::HardDisk)
                    && found != self.id
                {
                    self.last_error = format!(
                        "UUID {{{found}}} of the medium '{}' does not match the value {{{}}} stored in the media registry",
                        self.location.display(),
                        self.id
                    );
                }
            }
            Err(error) => self.last_error = open_error(&self.location, &error),
        }
    }

    pub(crate) fn state(&self) -> api::MediumState {
        match self.phase {
            Phase::NotCreated => api::MediumState::NotCreated,
            Phase::Creating => api::MediumState::Creating,
            Phase::There if self.writer || self.users.values().any(|writes| *writes) => {
                api::MediumState::LockedWrite
            }
            Phase::There if self.readers > 0 || !self.users.is_empty() => api::MediumState::LockedRead,
            Phase::There if !self.last_error.is_empty() || self.info.is_none() => {
                api::MediumState::Inaccessible
            }
            Phase::There => api::MediumState::Created,
        }
    }

    pub(crate) fn name(&self) -> String {
        if !self.is_file() {
            return self.location.display().to_string();
        }
        self.location.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// VirtualBox's text for a medium that cannot be opened, with the reason.
pub(crate) fn open_error(location: &Path, error: &vd::Error) -> String {
    use std::error::Error as _;
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    format!("Could not open the medium '{}'.\n{error}{cause}", location.display())
}

/// Every medium.
#[derive(Default)]
pub(crate) struct MediaPool {
    media: BTreeMap<Uuid, Medium>,
    by_location: HashMap<(DriveType, PathBuf), Uuid>,
}

/// How a settings file writes the format of a medium it does not say.
fn default_format(kind: DriveType) -> &'static str {
    match kind {
        DriveType::HardDisk => "VDI",
        DriveType::Dvd | DriveType::Floppy => "RAW",
    }
}

impl MediaPool {
    pub(crate) fn find(&self, id: Uuid) -> Option<&Medium> {
        self.media.get(&id)
    }

    pub(crate) fn medium(&self, id: Uuid) -> ApiResult<&Medium> {
        self.media.get(&id).ok_or_else(|| {
            ApiError::not_found(format!("Could not find a medium with UUID {{{id}}} in the media registry"))
        })
    }

    pub(crate) fn medium_mut(&mut self, id: Uuid) -> ApiResult<&mut Medium> {
        self.media.get_mut(&id).ok_or_else(|| {
            ApiError::not_found(format!("Could not find a medium with UUID {{{id}}} in the media registry"))
        })
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = Uuid> + '_ {
        self.media.keys().copied()
    }

    /// The base media of a kind, in the order of their locations.
    pub(crate) fn of_kind(&self, kind: DriveType) -> Vec<Uuid> {
        let mut found: Vec<&Medium> =
            self.media.values().filter(|m| m.kind == kind && m.parent.is_none() && !m.closed).collect();
        found.sort_by(|a, b| a.location.cmp(&b.location));
        found.into_iter().map(|m| m.id).collect()
    }

    /// All media of a kind, children behind their parents, otherwise in the order of their locations.
    pub(crate) fn tree_of_kind(&self, kind: DriveType) -> Vec<Uuid> {
        let mut children: HashMap<Uuid, Vec<Uuid>> = HashMap::new();
        for medium in self.media.values() {
            if let Some(parent) = medium.parent {
                children.entry(parent).or_default().push(medium.id);
            }
        }
        let mut open = self.of_kind(kind);
        open.reverse();
        let mut out = Vec::new();
        while let Some(id) = open.pop() {
            out.push(id);
            // Taken out, so that nothing comes twice, whatever the files say.
            open.extend(children.remove(&id).unwrap_or_default().into_iter().rev());
        }
        out
    }

    pub(crate) fn at_location(&self, kind: DriveType, location: &Path) -> Option<Uuid> {
        self.by_location.get(&(kind, location.to_owned())).copied()
    }

    pub(crate) fn children(&self, id: Uuid) -> Vec<Uuid> {
        self.media.values().filter(|m| m.parent == Some(id)).map(|m| m.id).collect()
    }

    /// The medium with all below it, the base first.
    pub(crate) fn chain(&self, id: Uuid) -> ApiResult<Vec<Uuid>> {
        let mut chain = vec![id];
        let mut parent = self.medium(id)?.parent;
        while let Some(id) = parent {
            // Loaded registries are trees; a UUID that a file was given later could close a circle.
            if chain.contains(&id) {
                return Err(ApiError::fail(format!("Medium {{{id}}} is its own ancestor")));
            }
            chain.push(id);
            parent = self.medium(id)?.parent;
        }
        chain.reverse();
        Ok(chain)
    }

    /// The images of [`Self::chain`].
    pub(crate) fn images(&self, id: Uuid) -> ApiResult<Vec<vd::Source>> {
        self.chain(id)?.into_iter().map(|id| self.medium(id)?.source()).collect()
    }

    /// Marks media for an operation, all or none.
    pub(crate) fn begin(&mut self, tasks: &[(Uuid, Task)]) -> ApiResult<()> {
        for (id, task) in tasks {
            self.medium(*id)?.check(*task)?;
            crate::encryption::check(self, *id)?;
        }
        for (id, task) in tasks {
            let medium = self.medium_mut(*id)?;
            match task {
                Task::Read => medium.readers += 1,
                Task::Write => medium.writer = true,
            }
        }
        Ok(())
    }

    /// Clears the marks again.
    pub(crate) fn end(&mut self, tasks: &[(Uuid, Task)]) {
        for (id, task) in tasks {
            if let Some(medium) = self.media.get_mut(id) {
                match task {
                    Task::Read => medium.readers = medium.readers.saturating_sub(1),
                    Task::Write => medium.writer = false,
                }
            }
        }
    }

    pub(crate) fn insert(&mut self, medium: Medium) {
        self.by_location.insert((medium.kind, medium.location.clone()), medium.id);
        self.media.insert(medium.id, medium);
    }

    pub(crate) fn remove(&mut self, id: Uuid) -> Option<Medium> {
        let medium = self.media.remove(&id)?;
        let key = (medium.kind, medium.location.clone());
        if self.by_location.get(&key) == Some(&id) {
            self.by_location.remove(&key);
        }
        Some(medium)
    }

    pub(crate) fn relocate(&mut self, id: Uuid, location: PathBuf) {
        if let Some(mut medium) = self.remove(id) {
            medium.location = location;
            self.insert(medium);
        }
    }

    /// Takes in what a settings file has on record. `owner` is the machine, or nil; `folder` is what relative locations
    /// are relative to.
    pub(crate) fn load(&mut self, registry: &MediaRegistry, owner: Uuid, folder: &Path) {
        let kinds = [
            (DriveType::HardDisk, &registry.hard_disks),
            (DriveType::Dvd, &registry.dvd_images),
            (DriveType::Floppy, &registry.floppy_images),
        ];
        for (kind, list) in kinds {
            for medium in list {
                self.load_one(medium, kind, None, owner, folder);
            }
        }
    }

    fn load_one(
        &mut self,
        stored: &set::Medium,
        kind: DriveType,
        parent: Option<Uuid>,
        owner: Uuid,
        folder: &Path,
    ) {
        if let Some(known) = self.media.get_mut(&stored.uuid) {
            if !known.registries.contains(&owner) {
                known.registries.push(owner);
            }
        } else {
            let format = if stored.format.is_empty() { default_format(kind) } else { &stored.format };
            let mut medium = Medium::new(stored.uuid, kind, PathBuf::from(&stored.location), format);
            if medium.is_file() {
                medium.location = folder.join(&stored.location);
            }
            if kind == DriveType::HardDisk {
                medium.medium_type = stored.medium_type;
            }
            medium.description = stored.description.clone();
            medium.auto_reset = stored.auto_reset;
            medium.properties = stored.properties.clone();
            medium.parent = parent;
            medium.registries.push(owner);
            self.insert(medium);
        }
        for child in &stored.children {
            self.load_one(child, kind, Some(stored.uuid), owner, folder);
        }
    }

    /// What belongs into the settings file of `owner` (nil for `VirtualBox.xml`), in the order in which the media were
    /// on record before, new ones last. Locations inside `folder` are relative to it, all if `absolute` is not set.
    pub(crate) fn registry(
        &self,
        owner: Uuid,
        folder: &Path,
        before: &MediaRegistry,
        absolute: bool,
    ) -> MediaRegistry {
        let list = |kind: DriveType, before: &[set::Medium]| -> Vec<set::Medium> {
            let owned = |m: &&Medium| {
                m.kind == kind
                    && m.parent.is_none()
                    && m.registries.first() == Some(&owner)
                    && m.phase != Phase::NotCreated
            };
            let mut ids: Vec<Uuid> = self.media.values().filter(owned).map(|m| m.id).collect();
            let place = |id: &Uuid| before.iter().position(|m| m.uuid == *id).unwrap_or(usize::MAX);
            ids.sort_by_key(place);
            ids.iter().filter_map(|id| self.stored(*id, folder, absolute)).collect()
        };
        MediaRegistry {
            hard_disks: list(DriveType::HardDisk, &before.hard_disks),
            dvd_images: list(DriveType::Dvd, &before.dvd_images),
            floppy_images: list(DriveType::Floppy, &before.floppy_images),
        }
    }

    fn stored(&self, id: Uuid, folder: &Path, absolute: bool) -> Option<set::Medium> {
        let medium = self.media.get(&id)?;
        let location = match medium.location.strip_prefix(folder) {
            Ok(relative) if !absolute => relative,
            _ => &medium.location,
        };
        Some(set::Medium {
            uuid: medium.id,
            location: location.display().to_string(),
            description: medium.description.clone(),
            format: medium.format.clone(),
            auto_reset: medium.auto_reset,
            medium_type: if medium.kind == DriveType::HardDisk {
                medium.medium_type
            } else {
                set::MediumType::Normal
            },
            properties: medium.properties.clone(),
            children: self
                .children(id)
                .into_iter()
                .filter_map(|c| self.stored(c, folder, absolute))
                .collect(),
        })
    }

    /// Every medium that the settings attach, with whether a VM writes to it.
    pub(crate) fn attached(&self, settings: &MachineSettings) -> Vec<(Uuid, bool)> {
        let controllers = settings.hardware.storage_controllers.iter();
        let devices = controllers.flat_map(|c| c.attached.iter());
        devices
            .filter_map(|a| {
                let writes = match a.drive {
                    DriveType::HardDisk => {
                        let kind = self.media.get(&a.image?).map(|m| m.medium_type);
                        !matches!(kind, Some(set::MediumType::Readonly))
                    }
                    DriveType::Floppy => true,
                    DriveType::Dvd => false,
                };
                Some((a.image?, writes))
            })
            .collect()
    }

    /// Marks the media of a starting VM as in use; refuses if another VM uses one in a way that excludes it.
    pub(crate) fn lock_for(&mut self, machine: Uuid, settings: &MachineSettings) -> ApiResult<()> {
        let wanted = self.attached(settings);
        for (id, writes) in &wanted {
            let Some(medium) = self.media.get(id) else { continue };
            crate::encryption::check(self, *id)?;
            let conflict = medium.users.iter().any(|(user, other_writes)| {
                *user != machine
                    && (*writes || *other_writes)
                    && medium.medium_type != set::MediumType::Shareable
            });
            if conflict || medium.writer || *writes && medium.readers > 0 {
                let writing = medium.writer || medium.users.values().any(|w| *w);
                let kind = if writing { "writing" } else { "reading" };
                return Err(ApiError::new(
                    ResultCode::InvalidObjectState,
                    format!("Medium '{}' is already locked for {kind}", medium.location.display()),
                )
                .on("IMedium"));
            }
        }
        for (id, writes) in wanted {
            if let Some(medium) = self.media.get_mut(&id) {
                *medium.users.entry(machine).or_default() |= writes;
                // The base of a differencing image is read.
                let mut parent = medium.parent;
                while let Some(base) = parent.and_then(|p| self.media.get_mut(&p)) {
                    base.users.entry(machine).or_default();
                    parent = base.parent;
                }
            }
        }
        Ok(())
    }

    /// The VM of `machine` has ended.
    pub(crate) fn unlock_for(&mut self, machine: Uuid) {
        for medium in self.media.values_mut() {
            medium.users.remove(&machine);
        }
    }

    /// The machine's settings file no longer counts. Returns the media that are on record nowhere now.
    pub(crate) fn forget_owner(&mut self, machine: Uuid) -> Vec<Uuid> {
        let mut orphans = Vec::new();
        for medium in self.media.values_mut().filter(|m| m.registries.contains(&machine)) {
            medium.registries.retain(|r| *r != machine);
            if medium.registries.is_empty() {
                orphans.push(medium.id);
            }
        }
        orphans
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool_with(location: &str) -> (MediaPool, Uuid) {
        let mut pool = MediaPool::default();
        let id = Uuid::from_u128(5);
        let mut medium = Medium::new(id, DriveType::HardDisk, location.into(), "VDI");
        medium.registries.push(Uuid::from_u128(1));
        pool.insert(medium);
        (pool, id)
    }

    fn machine_with(id: Uuid) -> MachineSettings {
        let mut s = MachineSettings::default();
        let mut c = set::StorageController::new("SATA", set::StorageBus::Sata);
        c.attached.push(set::AttachedDevice { image: Some(id), ..Default::default() });
        s.hardware.storage_controllers.push(c);
        s
    }

    #[test]
    fn a_registry_comes_back_as_it_was_loaded() {
        let (pool, _) = pool_with("/vm/a/disk.vdi");
        let owner = Uuid::from_u128(1);
        let stored = pool.registry(owner, Path::new("/vm/a"), &MediaRegistry::default(), false);
        assert_eq!(stored.hard_disks[0].location, "disk.vdi");
        let mut again = MediaPool::default();
        again.load(&stored, owner, Path::new("/vm/a"));
        assert_eq!(again.registry(owner, Path::new("/vm/a"), &stored, false), stored);
        let absolute = again.registry(owner, Path::new("/vm/a"), &stored, true);
        assert_eq!(absolute.hard_disks[0].location, "/vm/a/disk.vdi");
        assert!(again.registry(Uuid::nil(), Path::new("/"), &stored, false).is_empty());
    }

    #[test]
    fn two_machines_cannot_write_to_one_disk_at_the_same_time() {
        let (mut pool, id) = pool_with("/d.vdi");
        let settings = machine_with(id);
        pool.lock_for(Uuid::from_u128(1), &settings).unwrap();
        let error = pool.lock_for(Uuid::from_u128(2), &settings).unwrap_err();
        assert!(error.is(ResultCode::InvalidObjectState));
        pool.unlock_for(Uuid::from_u128(1));
        pool.lock_for(Uuid::from_u128(2), &settings).unwrap();
    }
}
