//! Carrying out an import: images, then settings, then registration, machine after machine. When anything fails, everything
//! that was made goes again.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums::{DeviceType, ImportOptions, VirtualSystemDescriptionType as Type};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::{IEventSource, IProgress};
use main_api::progress::Progress;
use main_api::types::ObjRef;
use ovf::{Disk, DiskFormat, FileRef, Package, VirtualSystem};
use settings::{
    AttachedDevice, DriveType, MachineSettings, NetworkAttachment, OsType, StorageBus, StorageController,
    StorageControllerType, Timestamp, generate_mac_address,
};
use uuid::Uuid;
use vbox_types::{ByteSize, MachineState, ResultCode};

use crate::appliance::{Description, Entry, Made, adapter_kind, package_error, run};
use crate::attrs_machine::{check_groups, os_type};
use crate::images;
use crate::limits;
use crate::machines::{absolute, check_not_registered};
use crate::media::{Medium, open_error};
use crate::objects::Object;
use crate::store::MachineStore;
use crate::svc::{Context, Lock, Machine, Svc, now_ms};
use crate::view::gone;

/// IAppliance::importMachines.
pub(crate) fn start(c: &Context, options: Vec<ImportOptions>) -> ApiResult<ObjRef<IProgress>> {
    let Object::Appliance(number) = c.object else { return Err(gone()) };
    let (package, descriptions) = {
        let state = c.svc.state.lock();
        let appliance = state.appliances.get(&number).filter(|a| a.peer == c.peer.id).ok_or_else(gone)?;
        let package = appliance.package.clone().ok_or_else(|| {
            ApiError::fail(
                "Cannot import machines without reading it first (call read() before importMachines())",
            )
        })?;
        (package, appliance.descriptions.clone())
    };
    if descriptions.is_empty() {
        return Err(ApiError::fail("The appliance must be interpreted before it is imported"));
    }
    let disks = descriptions.iter().flat_map(|d| &d.entries).filter(|e| e.kind == Type::HardDiskImage);
    let steps = 1 + disks.count() + descriptions.len();
    let progress = Progress::new(
        format!("Importing appliance '{}'", package.path().display()),
        u32::try_from(steps).unwrap_or(1),
        true,
    );
    let svc = c.svc.clone();
    run(c, progress, move |progress| {
        let mut import = Import {
            svc: &svc,
            package: &package,
            options,
            progress,
            made: Made::default(),
            done: Vec::new(),
        };
        for (description, system) in descriptions.iter().zip(&package.envelope.systems) {
            import.machine(description, system)?;
        }
        let machines = std::mem::take(&mut import.done);
        std::mem::take(&mut import.made).keep();
        if let Some(appliance) = svc.state.lock().appliances.get_mut(&number) {
            appliance.machines = machines;
        }
        Ok(())
    })
}

struct Import<'a> {
    svc: &'a Arc<Svc>,
    package: &'a Package,
    options: Vec<ImportOptions>,
    progress: &'a Progress,
    made: Made,
    /// Machines that are registered already.
    done: Vec<Uuid>,
}

impl Drop for Import<'_> {
    /// Without success, what was registered is forgotten; `made` deletes the files afterwards.
    fn drop(&mut self) {
        let mut state = self.svc.state.lock();
        for id in self.done.drain(..).rev() {
            state.machines.remove(&id);
            state.order.retain(|m| *m != id);
            for medium in state.media.forget_owner(id) {
                state.media.remove(medium);
            }
            if let Err(error) = state.global.edit(|g| g.machines.retain(|e| e.uuid != id)) {
                tracing::error!(machine = %id, %error, "a machine of a failed import stays in the registry");
            }
            state.emit(IEventSource::OnMachineRegistered, (id.to_string(), false));
        }
    }
}

/// An image that is to be made.
struct Image<'a> {
    disk: &'a Disk,
    /// None for a disk that starts empty.
    file: Option<&'a FileRef>,
    dvd: bool,
    target: PathBuf,
    id: Uuid,
}

impl<'a> Import<'a> {
    fn machine(&mut self, d: &Description, system: &'a VirtualSystem) -> ApiResult<()> {
        let text = |kind| d.value(kind).unwrap_or_default().to_owned();
        let name = text(Type::Name);
        if name.is_empty() {
            return Err(ApiError::new(ResultCode::FileError, "Missing VM name"));
        }
        let group = text(Type::PrimaryGroup);
        let groups = check_groups(vec![group.clone()])?;
        let base = match d.changed(Type::BaseFolder) {
            Some(base) => base.to_owned(),
            None => String::new(),
        };
        let composed = self.svc.compose_filename(&name, &groups[0], "", &base)?;
        let file = match d.changed(Type::SettingsFile) {
            None => composed,
            // A bare name goes into the folder that the machine would have anyway.
            Some(given) if !given.starts_with('/') => {
                let mut file = composed.with_file_name(given);
                if file.extension().is_none() {
                    file.set_extension("vbox");
                }
                absolute(&file.display().to_string())?
            }
            Some(given) => absolute(given)?,
        };
        let folder = file.parent().map(Path::to_owned).unwrap_or_default();
        {
            let state = self.svc.state.lock();
            check_not_registered(&state, Uuid::nil(), &file)?;
            if let Some(other) = state.machines.values().find(|m| m.settings.name == name) {
                return Err(ApiError::new(
                    ResultCode::InvalidArg,
                    format!("Registered machine with UUID {{{}}} ('{name}') already exists", other.id),
                ));
            }
        }
        if file.exists() {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!("Machine settings file '{}' already exists", file.display()),
            ));
        }
        let os = os_type(&text(Type::OS))?;
        let id = Uuid::new_v4();
        let (mut settings, images) = match system.machine.as_deref() {
            Some(machine) => self.described(machine, d, &folder)?,
            None => self.generic(system, d, os, &folder)?,
        };
        settings.uuid = id;
        settings.name = name;
        settings.groups = groups;
        settings.os_type = os.id.to_owned();
        settings.description = match d.value(Type::Description) {
            Some(text) => text.to_owned(),
            None => settings.description,
        };
        settings.hardware.cpu.count =
            number(d, Type::CPU, "CPU count", 1, u64::from(limits::MAX_CPUS))? as u32;
        let memory = number(d, Type::Memory, "RAM size", 0, u64::MAX)? >> 20;
        let (least, most) = (u64::from(limits::MIN_RAM), u64::from(limits::MAX_RAM));
        if !(least..=most).contains(&memory) {
            return Err(ApiError::invalid_arg(format!(
                "Invalid RAM size: {memory} MB (must be in range [{least}, {most}] MB)"
            )));
        }
        settings.hardware.memory.ram_mb = memory as u32;
        settings.name_sync = true;
        settings.directory_includes_uuid = false;
        settings.last_state_change = Some(Timestamp::now());
        self.made.folder(&folder)?;
        for image in &images {
            self.image(image)?;
        }
        self.progress.next_operation(&format!("Registering machine '{}'", settings.name));
        self.register(id, &file, settings, &images)
    }

    /// The machine as VirtualBox's own part of the package has it.
    fn described(
        &self,
        machine: &MachineSettings,
        d: &Description,
        folder: &Path,
    ) -> ApiResult<(MachineSettings, Vec<Image<'a>>)> {
        let mut settings = machine.clone();
        // What belongs to the place the machine comes from.
        settings.media_registry = Default::default();
        settings.snapshot = None;
        settings.current_snapshot = None;
        settings.current_state_modified = true;
        settings.state_file.clear();
        settings.aborted = false;
        settings.snapshot_folder = "Snapshots".into();
        settings.teleporter = Default::default();
        for nic in &mut settings.hardware.network {
            let keep = self.options.contains(&ImportOptions::KeepAllMACs)
                || (self.options.contains(&ImportOptions::KeepNATMACs)
                    && nic.attachment == NetworkAttachment::Nat);
            if (!keep && !nic.mac_address.is_empty()) || (nic.enabled && nic.mac_address.is_empty()) {
                nic.mac_address = generate_mac_address();
            }
        }
        let wanted = |kind| d.entries.iter().any(|e| e.kind == kind && e.enabled);
        if !wanted(Type::SoundCard) {
            settings.hardware.audio.enabled = false;
        }
        if !wanted(Type::USBController) {
            settings.hardware.usb.controllers.clear();
        }
        let (dvd, floppy) = (wanted(Type::CDROM), wanted(Type::Floppy));
        let mut images: Vec<Image<'a>> = Vec::new();
        for controller in &mut settings.hardware.storage_controllers {
            let mut kept = Vec::new();
            for mut device in controller.attached.drain(..) {
                match device.drive {
                    DriveType::Dvd if !dvd => continue,
                    DriveType::Floppy if !floppy => continue,
                    _ => {}
                }
                device.host_drive = None;
                if let Some(old) = device.image {
                    let disk = self.package.envelope.disks.iter().find(|disk| disk.vbox_uuid == Some(old));
                    let entry = disk.and_then(|disk| {
                        let mut all = d.entries.iter().filter(|e| e.kind == Type::HardDiskImage);
                        all.find(|e| e.reference == disk.id)
                    });
                    match (disk, entry) {
                        (Some(_), Some(entry)) if !entry.enabled => continue,
                        (Some(disk), Some(entry)) => {
                            let image = self.plan(disk, entry, folder)?;
                            device.image = Some(image.id);
                            images.push(image);
                        }
                        _ if device.drive == DriveType::HardDisk => {
                            return Err(ApiError::new(
                                ResultCode::FileError,
                                format!(
                                    "<vbox:Machine> element in OVF contains a medium attachment for the disk image {old} \
                                     but the OVF describes no such image"
                                ),
                            ));
                        }
                        // Media for removable drives are not part of every package.
                        _ => device.image = None,
                    }
                }
                kept.push(device);
            }
            controller.attached = kept;
        }
        Ok((settings, images))
    }

    /// The machine as the portable part of the package has it.
    fn generic(
        &self,
        system: &VirtualSystem,
        d: &Description,
        os: &OsType,
        folder: &Path,
    ) -> ApiResult<(MachineSettings, Vec<Image<'a>>)> {
        let mut settings = MachineSettings::new_for(os, "", Uuid::nil());
        let hw = &mut settings.hardware;
        hw.bios.ioapic = os.recommended_ioapic() || d.value(Type::CPU).is_some_and(|c| c != "1");
        hw.display.controller = os.recommended_graphics();
        hw.display.vram_mb = os.recommended_vram_mb();
        hw.rtc_use_utc = os.recommended_rtc_use_utc();
        if let Some(card) = d.value(Type::SoundCard) {
            hw.audio.enabled = true;
            hw.audio.enabled_out = true;
            hw.audio.controller = match card {
                "1" => settings::AudioController::Sb16,
                "2" => settings::AudioController::Hda,
                _ => settings::AudioController::Ac97,
            };
        }
        if d.value(Type::USBController).is_some() {
            hw.usb.controllers.push(settings::UsbController {
                name: "OHCI".into(),
                controller_type: settings::UsbControllerType::Ohci,
            });
        }
        let cards: Vec<&Entry> =
            d.entries.iter().filter(|e| e.kind == Type::NetworkAdapter && e.enabled).collect();
        if cards.len() > hw.network.len() {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!(
                    "Too many network adapters: OVF requests {} network adapters, but VirtualBox only supports {}",
                    cards.len(),
                    hw.network.len()
                ),
            ));
        }
        hw.network[0].enabled = !cards.is_empty();
        for (nic, card) in hw.network.iter_mut().zip(&cards) {
            nic.enabled = true;
            nic.adapter_type = adapter_kind(&card.vbox).unwrap_or(nic.adapter_type);
            nic.mac_address = generate_mac_address();
            let mode = card.extra.rsplit("type=").next().unwrap_or_default().to_ascii_lowercase();
            nic.attachment = match mode.as_str() {
                "null" => NetworkAttachment::Null,
                "bridged" => NetworkAttachment::Bridged,
                "hostonly" => NetworkAttachment::HostOnly,
                "internal" => NetworkAttachment::Internal,
                "generic" => NetworkAttachment::Generic,
                "natnetwork" => NetworkAttachment::NatNetwork,
                _ => NetworkAttachment::Nat,
            };
        }
        let mut images = Vec::new();
        storage(&mut settings, d)?;
        for entry in d.entries.iter().filter(|e| e.kind == Type::HardDiskImage && e.enabled) {
            let Some(disk) = self.package.envelope.disk(&entry.reference) else { return Err(gone()) };
            let place = place(&entry.extra).ok_or_else(|| {
                ApiError::fail(format!("Target controller value invalid or missing: '{}'", entry.extra))
            })?;
            let (index, channel) = place;
            let controller = d.entries.get(index).ok_or_else(|| {
                ApiError::fail(format!(
                    "Failed to find storage controller '{index}' in the System Description list"
                ))
            })?;
            let image = self.plan(disk, entry, folder)?;
            let drive = if image.dvd { DriveType::Dvd } else { DriveType::HardDisk };
            let secondary = system.controllers.iter().any(|c| c.id == controller.reference && !c.primary);
            attach(&mut settings, controller.kind, channel, secondary, drive, Some(image.id))?;
            images.push(image);
        }
        removable(&mut settings, d)?;
        Ok((settings, images))
    }

    /// What becomes of a disk of the package.
    fn plan(&self, disk: &'a Disk, entry: &Entry, folder: &Path) -> ApiResult<Image<'a>> {
        let file = self.package.envelope.file_of(disk);
        if let Some(file) = file {
            self.package.size_of(file).map_err(|e| package_error(&e))?;
        }
        let dvd = disk.kind(file.map_or("", |f| &f.href)) == DiskFormat::Iso;
        let target = match entry.vbox.starts_with('/') {
            true => absolute(&entry.vbox)?,
            // A plain name, whatever the package calls its file.
            false => folder.join(entry.vbox.rsplit('/').next().unwrap_or_default()),
        };
        if target.file_name().is_none() || target == folder {
            return Err(ApiError::invalid_arg(format!("Invalid target path '{}'", entry.vbox)));
        }
        Ok(Image { disk, file, dvd, target, id: Uuid::new_v4() })
    }

    fn image(&mut self, image: &Image<'_>) -> ApiResult<()> {
        let source = image.file.map_or("", |f| f.href.as_str());
        self.progress.next_operation(&match image.file {
            Some(_) => format!("Importing virtual disk image '{source}'"),
            None => format!("Creating disk image '{}'", image.target.display()),
        });
        if image.target.exists() {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!(
                    "Could not create the imported medium '{}' (VERR_ALREADY_EXISTS)",
                    image.target.display()
                ),
            ));
        }
        if let Some(folder) = image.target.parent() {
            self.made.folder(folder)?;
        }
        let package = self.package;
        match image.file {
            None => self.empty(image),
            Some(file) if image.dvd => {
                let target = image.target.clone();
                self.unpack(file, &target, image.disk)
            }
            Some(file) => match package.plain_file(file).map_err(|e| package_error(&e))? {
                Some(path) => {
                    if package.has_manifest() {
                        let progress = self.progress;
                        package
                            .copy(file, &mut io::sink(), u64::MAX, &mut |done, all| {
                                step(progress, done, all, 0, 30)
                            })
                            .map_err(|e| package_error(&e))?;
                    }
                    self.convert(&path, image)
                }
                None => {
                    let mut packed = image.target.clone().into_os_string();
                    packed.push(".part");
                    let packed = PathBuf::from(packed);
                    self.unpack(file, &packed, image.disk)?;
                    let done = self.convert(&packed, image);
                    let _ = std::fs::remove_file(&packed);
                    done
                }
            },
        }
    }

    fn empty(&mut self, image: &Image<'_>) -> ApiResult<()> {
        let size = image.disk.capacity.filter(|c| *c > 0).ok_or_else(|| {
            ApiError::new(ResultCode::FileError, format!("The disk \"{}\" has no capacity", image.disk.id))
        })?;
        let options = vd::CreateOptions {
            format: target_format(&image.target)?,
            variant: vd::Variant::Dynamic,
            size: ByteSize(size.checked_next_multiple_of(512).unwrap_or(size)),
            uuid: Some(image.id),
            comment: String::new(),
        };
        self.made.file(&image.target);
        vd::create(&image.target, &options).map(drop).map_err(|e| images::create_error(&image.target, &e))
    }

    /// Takes a file out of the package.
    fn unpack(&mut self, file: &FileRef, target: &Path, disk: &Disk) -> ApiResult<()> {
        let mut out = File::options()
            .write(true)
            .create_new(true)
            .open(target)
            .map_err(|e| crate::machines::file_error("Could not create the file", target, &e))?;
        self.made.file(target);
        // What is compressed may claim to be anything.
        let limit = match (file.gzip, disk.capacity) {
            (false, _) => u64::MAX,
            (true, Some(capacity)) => capacity.saturating_mul(2).saturating_add(64 << 20),
            (true, None) => 2 << 40,
        };
        let progress = self.progress;
        self.package
            .copy(file, &mut out, limit, &mut |done, all| step(progress, done, all, 0, 30))
            .map_err(|e| package_error(&e))
    }

    fn convert(&mut self, source: &Path, image: &Image<'_>) -> ApiResult<()> {
        let format = target_format(&image.target)?;
        let fail = |e: &vd::Error| ApiError::new(ResultCode::FileError, open_error(source, e)).on("IMedium");
        // A descriptor in text could name any file of the host as an extent.
        match vd::files(source, vd::Format::Vmdk) {
            Ok(files) if files.iter().all(|f| f == source) => {}
            Ok(_) => {
                return Err(ApiError::new(
                    ResultCode::FileError,
                    format!(
                        "The image '{}' refers to other files, which images in packages must not do",
                        source.display()
                    ),
                ));
            }
            Err(error) => return Err(fail(&error)),
        }
        let opened =
            vd::Image::open(source, vd::OpenMode::ReadOnly, vd::Format::Vmdk).map_err(|e| fail(&e))?;
        let options = vd::CreateOptions {
            format,
            variant: vd::Variant::Dynamic,
            size: opened.size(),
            uuid: Some(image.id),
            comment: String::new(),
        };
        self.made.file(&image.target);
        let progress = self.progress;
        vd::clone(&opened, &image.target, &options, &mut |done, all| step(progress, done, all, 30, 100))
            .map(drop)
            .map_err(|e| match e {
                vd::Error::Cancelled { .. } => canceled(),
                e => images::create_error(&image.target, &e),
            })
    }

    fn register(
        &mut self,
        id: Uuid,
        file: &Path,
        mut settings: MachineSettings,
        images: &[Image<'_>],
    ) -> ApiResult<()> {
        let folder = file.parent().unwrap_or(Path::new("/"));
        let mut state = self.svc.state.lock();
        check_not_registered(&state, id, file)?;
        for image in images {
            let (kind, format) = match image.dvd {
                true => (DriveType::Dvd, vd::Format::Raw),
                false => (DriveType::HardDisk, target_format(&image.target)?),
            };
            let mut medium = Medium::new(image.id, kind, image.target.clone(), format.name());
            medium.registries.push(id);
            medium.refresh();
            state.media.insert(medium);
        }
        settings.media_registry = state.media.registry(id, folder, &Default::default(), false);
        // From here on `drop` undoes.
        self.done.push(id);
        let mut store = MachineStore::create(file);
        self.made.file(file);
        store.save(&settings)?;
        let entry = settings::MachineEntry { uuid: id, settings_file: file.display().to_string() };
        state.global.edit(|g| g.machines.push(entry))?;
        state.add_machine(Machine {
            id,
            file: file.to_owned(),
            settings: Arc::new(settings),
            store: Some(store),
            access_error: None,
            state: MachineState::PoweredOff,
            last_change: now_ms(),
            lock: Lock::None,
        });
        for image in images {
            let kind = if image.dvd { DeviceType::DVD } else { DeviceType::HardDisk };
            state.emit(IEventSource::OnMediumRegistered, (image.id.to_string(), kind, true));
        }
        state.emit(IEventSource::OnMachineRegistered, (id.to_string(), true));
        tracing::info!(machine = %id, file = %file.display(), "imported");
        Ok(())
    }
}

/// Tells a part of an operation's progress, from `from` to `to` per cent; whether to go on.
pub(crate) fn step(progress: &Progress, done: u64, all: u64, from: u64, to: u64) -> bool {
    let share = u128::from(done) * u128::from(to - from) / u128::from(all.max(1));
    progress.set(u32::try_from(u128::from(from) + share).unwrap_or(99), "");
    !progress.canceled()
}

pub(crate) fn canceled() -> ApiError {
    ApiError::new(ResultCode::Abort, "The operation was canceled")
}

fn number(d: &Description, kind: Type, what: &str, least: u64, most: u64) -> ApiResult<u64> {
    let text =
        d.value(kind).ok_or_else(|| ApiError::new(ResultCode::FileError, format!("{what} missing")))?;
    let value = text.trim().parse().ok().filter(|v| (least..=most).contains(v));
    value.ok_or_else(|| ApiError::invalid_arg(format!("Invalid {what}: '{text}'")))
}

fn target_format(path: &Path) -> ApiResult<vd::Format> {
    images::format_for(path).ok_or_else(|| {
        ApiError::fail(format!(
            "Could not find a valid medium format for the target disk '{}'",
            path.display()
        ))
    })
}

/// `controller=8;channel=0`
fn place(text: &str) -> Option<(usize, u32)> {
    let field = |key: &str| text.split(';').find_map(|f| f.trim().strip_prefix(key)?.strip_prefix('='));
    Some((field("controller")?.parse().ok()?, field("channel")?.parse().ok()?))
}

/// Name and bus of the controller that stands for a kind of entry.
fn controller_of(kind: Type) -> Option<(&'static str, StorageBus)> {
    Some(match kind {
        Type::HardDiskControllerIDE => ("IDE", StorageBus::Ide),
        Type::HardDiskControllerSATA => ("SATA", StorageBus::Sata),
        Type::HardDiskControllerSCSI => ("SCSI", StorageBus::Scsi),
        Type::HardDiskControllerSAS => ("SAS", StorageBus::Sas),
        Type::HardDiskControllerVirtioSCSI => ("VirtioSCSI", StorageBus::VirtioScsi),
        Type::HardDiskControllerNVMe => ("NVMe", StorageBus::Pcie),
        _ => return None,
    })
}

/// Adds the controllers.
fn storage(settings: &mut MachineSettings, d: &Description) -> ApiResult<()> {
    for entry in d.entries.iter().filter(|e| e.enabled) {
        let Some((name, bus)) = controller_of(entry.kind) else { continue };
        let count = d.entries.iter().filter(|e| e.kind == entry.kind && e.enabled).count();
        // The two channels of an IDE chip are two controllers in OVF.
        let most = if bus == StorageBus::Ide { 2 } else { 1 };
        if count > most {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!(
                    "Too many {name} controllers in OVF; import facility only supports {}",
                    ["", "one", "two"][most]
                ),
            ));
        }
        if settings.hardware.storage_controller(name).is_some() {
            continue;
        }
        let mut controller = StorageController::new(name, bus);
        controller.controller_type = match entry.vbox.to_ascii_lowercase().as_str() {
            "piix3" => StorageControllerType::Piix3,
            "ich6" => StorageControllerType::Ich6,
            "buslogic" => StorageControllerType::BusLogic,
            _ => controller.controller_type,
        };
        settings.hardware.storage_controllers.push(controller);
    }
    Ok(())
}

/// Puts a drive into its place on the controller of a kind.
fn attach(
    settings: &mut MachineSettings,
    kind: Type,
    channel: u32,
    secondary: bool,
    drive: DriveType,
    image: Option<Uuid>,
) -> ApiResult<()> {
    let found = controller_of(kind)
        .and_then(|(name, bus)| settings.hardware.storage_controller_mut(name).map(|c| (name, bus, c)));
    let Some((name, bus, controller)) = found else {
        return Err(ApiError::fail(format!("Invalid hard disk contoller type: '{kind:?}'")));
    };
    let (port, device) = match (bus, channel, secondary) {
        (StorageBus::Ide, 0 | 1, true) => (1, channel),
        (StorageBus::Ide, 0 | 1, false) => (0, channel),
        // Some products count through both channels.
        (StorageBus::Ide, 2 | 3, _) => (1, channel - 2),
        (StorageBus::Ide, ..) => {
            return Err(ApiError::invalid_arg(format!(
                "Invalid channel {channel} specified; IDE controllers support only 0, 1 or 2"
            )));
        }
        _ => (channel, 0),
    };
    let most = bus.ports().1;
    if port >= most {
        return Err(ApiError::invalid_arg(format!(
            "Illegal channel: '{channel}'.  For {name} controllers the valid values are 0 to {} (inclusive)",
            most - 1
        )));
    }
    let (port, device) = (port as i32, device as i32);
    if controller.attached.iter().any(|a| (a.port, a.device) == (port, device)) {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            format!(
                "Device of type '{drive:?}' already attached to the {name} controller at this port/channel ({channel}) location."
            ),
        ));
    }
    controller.port_count = controller.port_count.max(port as u32 + 1);
    controller.attached.push(AttachedDevice { drive, port, device, image, ..AttachedDevice::default() });
    controller.attached.sort_by_key(|a| (a.port, a.device));
    Ok(())
}

/// Adds the floppy and CD drives that hold nothing.
fn removable(settings: &mut MachineSettings, d: &Description) -> ApiResult<()> {
    if d.value(Type::Floppy).is_some() {
        let mut controller = StorageController::new("Floppy", StorageBus::Floppy);
        controller.attached.push(AttachedDevice { drive: DriveType::Floppy, ..AttachedDevice::default() });
        settings.hardware.storage_controllers.push(controller);
    }
    let all = &mut settings.hardware.storage_controllers;
    let has_drive = all.iter().any(|c| c.attached.iter().any(|a| a.drive == DriveType::Dvd));
    if d.value(Type::CDROM).is_none() || has_drive {
        return Ok(());
    }
    // The secondary master by custom, else the first free place.
    let places = |bus: StorageBus| -> Vec<(i32, i32)> {
        match bus {
            StorageBus::Ide => vec![(1, 0), (0, 1), (1, 1), (0, 0)],
            StorageBus::Sata => (0..30).map(|p| (p, 0)).collect(),
            _ => Vec::new(),
        }
    };
    if !all.iter().any(|c| matches!(c.bus(), StorageBus::Ide | StorageBus::Sata)) {
        all.push(StorageController::new("IDE", StorageBus::Ide));
    }
    for controller in all.iter_mut() {
        let free = places(controller.bus())
            .into_iter()
            .find(|place| !controller.attached.iter().any(|a| (a.port, a.device) == *place));
        if let Some((port, device)) = free {
            controller.port_count = controller.port_count.max(port as u32 + 1);
            controller.attached.push(AttachedDevice {
                drive: DriveType::Dvd,
                port,
                device,
                ..AttachedDevice::default()
            });
            controller.attached.sort_by_key(|a| (a.port, a.device));
            break;
        }
    }
    Ok(())
}
