//! Packages (IAppliance) and what they say of machines (IVirtualSystemDescription). An import goes in three steps: read the
//! package, interpret it to lists of entries that the client may change, and carry it out (`import`). An export collects
//! machines (`IMachine::exportTo`) and writes them (`export`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums::VirtualSystemDescriptionType as Type;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::progress::Progress;
use main_api::server::{CallTable, ReadTable};
use main_api::types::ObjRef;
use ovf::{ControllerKind, DiskFormat, Envelope, Package, VirtualSystem};
use settings::{DriveType, NetworkAdapterType, NetworkAttachment, OsType};
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::calls::spawn;
use crate::limits;
use crate::machines::{absolute, file_error};
use crate::objects::{self, Object};
use crate::svc::{Context, State};
use crate::view::gone;
use crate::{export, import};

/// Packages that one client may have open.
const MAX_APPLIANCES: usize = 64;

/// A package.
pub(crate) struct Appliance {
    /// The client that made it.
    pub(crate) peer: u64,
    pub(crate) path: String,
    pub(crate) package: Option<Arc<Package>>,
    pub(crate) descriptions: Vec<Description>,
    pub(crate) warnings: Vec<String>,
    pub(crate) machines: Vec<Uuid>,
    /// Passwords of encrypted media, by their ids.
    pub(crate) passwords: BTreeMap<String, String>,
    /// An operation is at work with it.
    pub(crate) busy: bool,
}

/// One machine of a package.
#[derive(Clone, Default)]
pub(crate) struct Description {
    pub(crate) entries: Vec<Entry>,
    /// The machine that an export is of.
    pub(crate) machine: Option<Uuid>,
}

#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) kind: Type,
    pub(crate) reference: String,
    pub(crate) ovf: String,
    pub(crate) vbox: String,
    /// What `vbox` was before the client changed it.
    pub(crate) suggested: String,
    pub(crate) extra: String,
    pub(crate) enabled: bool,
}

impl Description {
    pub(crate) fn add(&mut self, kind: Type, reference: &str, ovf: &str, vbox: &str, extra: &str) {
        self.entries.push(Entry {
            kind,
            reference: reference.to_owned(),
            ovf: ovf.to_owned(),
            vbox: vbox.to_owned(),
            suggested: vbox.to_owned(),
            extra: extra.to_owned(),
            enabled: true,
        });
    }

    /// The value of the first entry of the kind, if the client has changed it.
    pub(crate) fn changed(&self, kind: Type) -> Option<&str> {
        let entry = self.entries.iter().find(|e| e.kind == kind && e.enabled)?;
        (entry.vbox != entry.suggested).then_some(&entry.vbox)
    }

    /// The value of the first entry of the kind that is not switched off.
    pub(crate) fn value(&self, kind: Type) -> Option<&str> {
        self.entries.iter().find(|e| e.kind == kind && e.enabled).map(|e| e.vbox.as_str())
    }
}

/// VirtualBox's code for what is wrong with a package.
pub(crate) fn package_error(error: &ovf::Error) -> ApiError {
    use std::error::Error as _;
    let code = match error {
        ovf::Error::Digest(_) | ovf::Error::Host { .. } | ovf::Error::Manifest { .. } => {
            ResultCode::IprtError
        }
        _ => ResultCode::FileError,
    };
    let mut text = error.to_string();
    if let Some(first) = text.get(..1) {
        text = first.to_uppercase() + &text[1..];
    }
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    ApiError::new(code, format!("{text}{cause}")).on("IAppliance")
}

impl State {
    fn appliance(&self, c: &Context) -> ApiResult<(u32, &Appliance)> {
        let (Object::Appliance(number) | Object::SystemDescription(number, _)) = c.object else {
            return Err(gone());
        };
        let found = self.appliances.get(&number).filter(|a| a.peer == c.peer.id);
        found.map(|a| (number, a)).ok_or_else(gone)
    }

    fn appliance_mut(&mut self, c: &Context) -> ApiResult<&mut Appliance> {
        let number = self.appliance(c)?.0;
        let appliance = self.appliances.get_mut(&number).ok_or_else(gone)?;
        if appliance.busy {
            return Err(ApiError::new(ResultCode::AccessDenied, "The appliance is busy"));
        }
        Ok(appliance)
    }
}

fn description(c: &Context) -> ApiResult<Description> {
    let Object::SystemDescription(_, index) = c.object else { return Err(gone()) };
    let state = c.svc.state.lock();
    let (_, appliance) = state.appliance(c)?;
    appliance.descriptions.get(index).cloned().ok_or_else(gone)
}

fn description_ref(number: u32, index: usize) -> ObjRef<IVirtualSystemDescription> {
    ObjRef::new(format!("{}/{number}/{index}", main_api::paths::APPLIANCES))
}

pub(crate) fn reads(t: &mut ReadTable<Context>) {
    t.add_fallible(IAppliance::Path, |c| Ok(c.svc.state.lock().appliance(c)?.1.path.clone()))
        .add_fallible(IAppliance::Disks, |c| {
            let state = c.svc.state.lock();
            let Some(package) = state.appliance(c)?.1.package.clone() else { return Ok(Vec::new()) };
            Ok(disk_lines(&package.envelope))
        })
        .add_fallible(IAppliance::VirtualSystemDescriptions, |c| {
            let state = c.svc.state.lock();
            let (number, appliance) = state.appliance(c)?;
            Ok((0..appliance.descriptions.len()).map(|i| description_ref(number, i)).collect())
        })
        .add_fallible(IAppliance::Machines, |c| {
            Ok(c.svc.state.lock().appliance(c)?.1.machines.iter().map(Uuid::to_string).collect())
        })
        .add_fallible(IVirtualSystemDescription::Count, |c| {
            Ok(u32::try_from(description(c)?.entries.len()).unwrap_or(u32::MAX))
        });
}

/// As VirtualBox has them: tab-separated id, sizes, format, name, and the file twice.
fn disk_lines(envelope: &Envelope) -> Vec<String> {
    let line = |disk: &ovf::Disk| {
        let file = envelope.file_of(disk);
        let href = file.map_or("", |f| f.href.as_str());
        let size = file.and_then(|f| f.size).map_or_else(|| "-1".to_owned(), |s| s.to_string());
        let capacity = disk.capacity.map_or_else(|| "-1".to_owned(), |c| c.to_string());
        let gzip = if file.is_some_and(|f| f.gzip) { "gzip" } else { "" };
        format!("{}\t{capacity}\t-1\t{}\t{href}\t{size}\t-1\t{gzip}", disk.id, disk.format)
    };
    envelope.disks.iter().map(line).collect()
}

pub(crate) fn calls(t: &mut CallTable<Context>) {
    t.add(IVirtualBox::CreateAppliance, |c, ()| {
        let mut state = c.svc.state.lock();
        if state.appliances.values().filter(|a| a.peer == c.peer.id).count() >= MAX_APPLIANCES {
            return Err(ApiError::new(ResultCode::MaximumReached, "Too many appliances are open"));
        }
        let number = state.next_appliance;
        state.next_appliance += 1;
        let appliance = Appliance {
            peer: c.peer.id,
            path: String::new(),
            package: None,
            descriptions: Vec::new(),
            warnings: Vec::new(),
            machines: Vec::new(),
            passwords: BTreeMap::new(),
            busy: false,
        };
        state.appliances.insert(number, appliance);
        Ok(ObjRef::new(format!("{}/{number}", main_api::paths::APPLIANCES)))
    })
    .add(IAppliance::Read, |c, (file,)| read(c, &file))
    .add(IAppliance::Interpret, |c, ()| interpret(c))
    .add(IAppliance::GetWarnings, |c, ()| Ok(c.svc.state.lock().appliance(c)?.1.warnings.clone()))
    .add(IAppliance::GetPasswordIds, |c, ()| Ok(export::encrypted(c)?.into_keys().collect()))
    .add(IAppliance::GetMediumIdsForPasswordId, |c, (id,)| {
        let media = export::encrypted(c)?.remove(&id).unwrap_or_default();
        Ok(media.iter().map(Uuid::to_string).collect())
    })
    .add(IAppliance::AddPasswords, |c, (ids, passwords)| {
        if ids.len() != passwords.len() {
            let text = format!("There are {} passwords for {} identifiers", passwords.len(), ids.len());
            return Err(ApiError::invalid_arg(text));
        }
        c.svc.state.lock().appliance_mut(c)?.passwords.extend(ids.into_iter().zip(passwords));
        Ok(())
    })
    .add(IAppliance::ImportMachines, |c, (options,)| import::start(c, options))
    .add(IAppliance::Write, |c, (format, options, path)| export::start(c, &format, options, &path))
    .add(IMachine::ExportTo, |c, (appliance, _location)| {
        let Some(Object::Appliance(number)) = objects::parse(appliance.path()) else {
            return Err(ApiError::invalid_arg("Argument aAppliance is invalid (must not be NULL)"));
        };
        let index = export::add_machine(c, number)?;
        Ok(description_ref(number, index))
    })
    .add(IVirtualSystemDescription::GetDescription, |c, ()| {
        let entries = description(c)?.entries;
        let texts = |of: fn(&Entry) -> &String| entries.iter().map(|e| of(e).clone()).collect();
        Ok((
            entries.iter().map(|e| e.kind).collect(),
            texts(|e| &e.reference),
            texts(|e| &e.ovf),
            texts(|e| &e.vbox),
            texts(|e| &e.extra),
        ))
    })
    .add(IVirtualSystemDescription::SetFinalValues, |c, (enabled, values, extras)| {
        let Object::SystemDescription(_, index) = c.object else { return Err(gone()) };
        let mut state = c.svc.state.lock();
        let entries = &mut state.appliance_mut(c)?.descriptions.get_mut(index).ok_or_else(gone)?.entries;
        let count = entries.len();
        if [enabled.len(), values.len(), extras.len()] != [count; 3] {
            return Err(ApiError::invalid_arg(format!(
                "There must be a value for each of the {count} entries"
            )));
        }
        for (entry, ((on, value), extra)) in
            entries.iter_mut().zip(enabled.into_iter().zip(values).zip(extras))
        {
            (entry.enabled, entry.vbox, entry.extra) = (on, value, extra);
        }
        Ok(())
    })
    .add(IVirtualSystemDescription::AddDescription, |c, (kind, value, extra)| {
        let Object::SystemDescription(_, index) = c.object else { return Err(gone()) };
        let mut state = c.svc.state.lock();
        let description = state.appliance_mut(c)?.descriptions.get_mut(index).ok_or_else(gone)?;
        if description.entries.len() >= 4096 {
            return Err(ApiError::new(ResultCode::MaximumReached, "The description has too many entries"));
        }
        description.add(kind, "", &value, &value, &extra);
        Ok(())
    });
}

/// Runs `work` on the context's appliance on a thread; the appliance is busy meanwhile.
pub(crate) fn run(
    c: &Context,
    progress: Progress,
    work: impl FnOnce(&Progress) -> ApiResult<()> + Send + 'static,
) -> ApiResult<ObjRef<IProgress>> {
    let mut state = c.svc.state.lock();
    let number = state.appliance(c)?.0;
    state.appliance_mut(c)?.busy = true;
    let progress = Arc::new(progress);
    let path = state.add_progress(progress.clone());
    drop(state);
    let svc = c.svc.clone();
    let started = spawn("appliance", move || {
        let outcome = work(&progress);
        if let Some(appliance) = svc.state.lock().appliances.get_mut(&number) {
            appliance.busy = false;
        }
        progress.complete(outcome.map_err(|e| e.on("IAppliance")));
        svc.wake_main();
    });
    if started.is_err()
        && let Some(appliance) = c.svc.state.lock().appliances.get_mut(&number)
    {
        appliance.busy = false;
    }
    started.map(|()| ObjRef::new(path))
}

fn read(c: &Context, file: &str) -> ApiResult<ObjRef<IProgress>> {
    let lower = file.to_ascii_lowercase();
    if !lower.ends_with(".ovf") && !lower.ends_with(".ova") {
        return Err(package_error(&ovf::Error::Extension));
    }
    let path = absolute(file)?;
    let Object::Appliance(number) = c.object else { return Err(gone()) };
    let svc = c.svc.clone();
    let progress = Progress::new(format!("Reading appliance '{}'", path.display()), 1, false);
    run(c, progress, move |_| {
        let package = Package::open(&path).map_err(|e| package_error(&e))?;
        let mut state = svc.state.lock();
        let appliance = state.appliances.get_mut(&number).ok_or_else(gone)?;
        appliance.path = path.display().to_string();
        appliance.package = Some(Arc::new(package));
        appliance.descriptions.clear();
        appliance.warnings.clear();
        Ok(())
    })
}

fn interpret(c: &Context) -> ApiResult<()> {
    let package = c.svc.state.lock().appliance_mut(c)?.package.clone();
    let package = package.ok_or_else(|| {
        ApiError::fail("Cannot interpret appliance without reading it first (call read() before interpret())")
    })?;
    let mut descriptions = Vec::new();
    let mut warnings = Vec::new();
    let mut names = Vec::new();
    for system in &package.envelope.systems {
        let described = Interpreter { c, envelope: &package.envelope, system, warnings: &mut warnings };
        descriptions.push(described.run(&mut names)?);
    }
    let mut state = c.svc.state.lock();
    let appliance = state.appliance_mut(c)?;
    appliance.descriptions = descriptions;
    appliance.warnings = warnings;
    Ok(())
}

/// `name`, or with `_1`, `_2` … the first that `taken` does not know. The number goes before an extension.
fn unique(name: &str, extension: bool, taken: impl Fn(&str) -> bool) -> String {
    if !taken(name) {
        return name.to_owned();
    }
    let (stem, end) = match name.rsplit_once('.').filter(|_| extension) {
        Some((stem, end)) => (stem, format!(".{end}")),
        None => (name, String::new()),
    };
    (1u32..).map(|i| format!("{stem}_{i}{end}")).find(|n| !taken(n)).unwrap_or_default()
}

/// The numbers by which VirtualBox shows network cards here.
const ADAPTERS: [(NetworkAdapterType, u32); 7] = [
    (NetworkAdapterType::Am79C970A, 1),
    (NetworkAdapterType::Am79C973, 2),
    (NetworkAdapterType::I82540EM, 3),
    (NetworkAdapterType::I82543GC, 4),
    (NetworkAdapterType::I82545EM, 5),
    (NetworkAdapterType::Virtio, 6),
    (NetworkAdapterType::Am79C960, 7),
];

pub(crate) fn adapter_number(kind: NetworkAdapterType) -> u32 {
    ADAPTERS.iter().find(|(k, _)| *k == kind).map_or(0, |(_, n)| *n)
}

pub(crate) fn adapter_kind(number: &str) -> Option<NetworkAdapterType> {
    let number: u32 = number.parse().ok()?;
    ADAPTERS.iter().find(|(_, n)| *n == number).map(|(k, _)| *k)
}

fn attachment_word(attachment: NetworkAttachment) -> &'static str {
    match attachment {
        NetworkAttachment::Null => "Null",
        NetworkAttachment::Nat => "NAT",
        NetworkAttachment::Bridged => "Bridged",
        NetworkAttachment::Internal => "Internal",
        NetworkAttachment::HostOnly => "HostOnly",
        NetworkAttachment::HostOnlyNetwork => "HostOnlyNetwork",
        NetworkAttachment::Generic => "Generic",
        NetworkAttachment::NatNetwork => "NATNetwork",
        NetworkAttachment::Cloud => "Cloud",
    }
}

struct Interpreter<'a> {
    c: &'a Context,
    envelope: &'a Envelope,
    system: &'a VirtualSystem,
    warnings: &'a mut Vec<String>,
}

impl Interpreter<'_> {
    /// The entries of one machine, in VirtualBox's order: clients name them by their numbers.
    fn run(self, names: &mut Vec<String>) -> ApiResult<Description> {
        let (system, machine) = (self.system, self.system.machine.as_deref());
        let mut d = Description::default();
        let os = match (machine, system.vbox_os_type.as_str()) {
            (Some(m), _) if !m.os_type.is_empty() => m.os_type.clone(),
            (_, given) if !given.is_empty() => given.to_owned(),
            _ => ovf::os_type_of(system.cim_os, &system.os_description).to_owned(),
        };
        d.add(Type::OS, "", &system.cim_os.to_string(), &os, "");
        let name = machine.map(|m| m.name.as_str()).filter(|n| !n.is_empty()).unwrap_or(&system.name);
        let name = if name.is_empty() { &os } else { name };
        let name = {
            let state = self.c.svc.state.lock();
            unique(name, false, |n| {
                names.iter().any(|taken| taken == n) || state.machines.values().any(|m| m.settings.name == n)
            })
        };
        names.push(name.clone());
        d.add(Type::Name, "", &system.name, &name, "");
        let group = machine.and_then(|m| m.groups.first().cloned()).unwrap_or_else(|| "/".into());
        d.add(Type::PrimaryGroup, "", "", &group, "");
        let file = self.c.svc.compose_filename(&name, &group, "", "")?;
        d.add(Type::SettingsFile, "", "", &file.display().to_string(), "");
        let base = self.c.svc.state.lock().global.default_machine_folder();
        d.add(Type::BaseFolder, "", "", &base.display().to_string(), "");
        for (kind, text) in [
            (Type::Product, &system.product),
            (Type::Vendor, &system.vendor),
            (Type::Version, &system.version),
            (Type::ProductUrl, &system.product_url),
            (Type::VendorUrl, &system.vendor_url),
            (Type::Description, &system.description),
            (Type::License, &system.license),
        ] {
            if !text.is_empty() {
                d.add(kind, "", text, text, "");
            }
        }
        let os = OsType::by_id(&os);
        let (cpus, memory) = self.size(os);
        d.add(Type::CPU, "", &system.cpus.to_string(), &cpus.to_string(), "");
        d.add(Type::Memory, "", &system.memory.to_string(), &memory.to_string(), "");
        let controller = |kind| match kind {
            settings::AudioController::Ac97 => "0",
            settings::AudioController::Sb16 => "1",
            settings::AudioController::Hda => "2",
        };
        match machine {
            Some(m) if m.hardware.audio.enabled => {
                d.add(Type::SoundCard, "", "", controller(m.hardware.audio.controller), "");
            }
            Some(_) => {}
            None if !system.sound.is_empty() => d.add(Type::SoundCard, "", &system.sound, "0", ""),
            None => {}
        }
        if machine.is_some_and(|m| !m.hardware.usb.controllers.is_empty()) || system.usb {
            d.add(Type::USBController, "", "", "", "");
        }
        self.network(&mut d, os);
        let has = |drive| {
            machine.is_some_and(|m| {
                let mut attached = m.hardware.storage_controllers.iter().flat_map(|c| &c.attached);
                attached.any(|a| a.drive == drive)
            })
        };
        if has(DriveType::Floppy) || (machine.is_none() && system.floppy) {
            d.add(Type::Floppy, "", "", "", "");
        }
        if has(DriveType::Dvd) || (machine.is_none() && system.cdrom) {
            d.add(Type::CDROM, "", "", "", "");
        }
        let controllers = self.controllers(&mut d);
        let folder = file.parent().map(Path::to_owned).unwrap_or_default();
        self.drives(&mut d, &controllers, &folder)?;
        Ok(d)
    }

    /// CPUs and bytes of memory.
    fn size(&self, os: Option<&OsType>) -> (u32, u64) {
        let (system, machine) = (self.system, self.system.machine.as_deref());
        let cpus = machine.map(|m| m.hardware.cpu.count).filter(|c| *c > 0).unwrap_or(system.cpus).max(1);
        let memory = machine.map(|m| u64::from(m.hardware.memory.ram_mb) << 20).filter(|m| *m > 0);
        let recommended = u64::from(os.map_or(1024, OsType::recommended_ram_mb)) << 20;
        let memory = match memory.unwrap_or(system.memory) {
            0 => recommended,
            given => given.clamp(u64::from(limits::MIN_RAM) << 20, u64::from(limits::MAX_RAM) << 20),
        };
        (cpus.min(limits::MAX_CPUS), memory)
    }

    fn network(&self, d: &mut Description, os: Option<&OsType>) {
        if let Some(machine) = self.system.machine.as_deref() {
            for nic in machine.hardware.network.iter().filter(|n| n.enabled) {
                let mode = attachment_word(nic.attachment);
                let extra = format!("slot={};type={mode}", nic.slot);
                d.add(Type::NetworkAdapter, "", mode, &adapter_number(nic.adapter_type).to_string(), &extra);
            }
            return;
        }
        use NetworkAdapterType as N;
        let usual = os.map_or(N::I82540EM, OsType::network_adapter);
        for adapter in self.system.adapters.iter().take(settings::Chipset::Piix3.max_network_adapters()) {
            let known = ["Null", "NAT", "Bridged", "Internal", "HostOnly", "Generic"];
            let known = known.into_iter().find(|k| k.eq_ignore_ascii_case(&adapter.network));
            let ours = self.system.system_type.to_ascii_lowercase().contains("virtualbox");
            let is_e1000 = matches!(usual, N::I82540EM | N::I82543GC | N::I82545EM);
            let kind = match adapter.sub_type.to_ascii_lowercase().as_str() {
                "pcnet32" if matches!(usual, N::Am79C970A | N::Am79C973) => usual,
                "pcnet32" => N::Am79C970A,
                "e1000" if ours && is_e1000 => usual,
                "e1000" if ours => N::I82540EM,
                // VMware's card; "E10000" is a slip of VirtualCenter 3.5.
                "e1000" | "e10000" => N::I82545EM,
                "virtionet" | "virtio-net" | "3" => N::Virtio,
                _ => usual,
            };
            let extra = format!("type={}", known.unwrap_or("Bridged"));
            d.add(Type::NetworkAdapter, "", &adapter.network, &adapter_number(kind).to_string(), &extra);
        }
    }

    /// Adds the controllers; gives for each InstanceID the number of its entry.
    fn controllers(&self, d: &mut Description) -> BTreeMap<String, usize> {
        let mut found = BTreeMap::new();
        for controller in &self.system.controllers {
            let (kind, word) = match (controller.kind, controller.sub_type.to_ascii_lowercase().as_str()) {
                (ControllerKind::Ide, "piix3") => (Type::HardDiskControllerIDE, "PIIX3"),
                (ControllerKind::Ide, "ich6") => (Type::HardDiskControllerIDE, "ICH6"),
                (ControllerKind::Ide, _) => (Type::HardDiskControllerIDE, "PIIX4"),
                (ControllerKind::Sata, _) => (Type::HardDiskControllerSATA, "AHCI"),
                (ControllerKind::Scsi, "buslogic") => (Type::HardDiskControllerSCSI, "BusLogic"),
                (ControllerKind::Scsi, _) => (Type::HardDiskControllerSCSI, "LsiLogic"),
                (ControllerKind::Sas, _) => (Type::HardDiskControllerSAS, "LsiLogicSas"),
                (ControllerKind::VirtioScsi, _) => (Type::HardDiskControllerVirtioSCSI, "VirtioSCSI"),
                (ControllerKind::Nvme, _) => (Type::HardDiskControllerNVMe, "NVMe"),
            };
            if found.contains_key(&controller.id) {
                continue;
            }
            found.insert(controller.id.clone(), d.entries.len());
            d.add(kind, &controller.id, &controller.sub_type, word, "");
        }
        found
    }

    fn drives(
        self,
        d: &mut Description,
        controllers: &BTreeMap<String, usize>,
        folder: &Path,
    ) -> ApiResult<()> {
        let mut targets: Vec<String> = Vec::new();
        for drive in &self.system.drives {
            let Some(disk) = self.envelope.disk(&drive.disk) else {
                self.warnings.push(format!(
                    "Virtual appliance \"{}\" refers to the disk \"{}\", which the package does not have",
                    self.system.name, drive.disk
                ));
                continue;
            };
            let file = self.envelope.file_of(disk);
            let href = file.map_or("", |f| f.href.as_str());
            let extension = match disk.kind(href) {
                DiskFormat::Vmdk => "vmdk",
                DiskFormat::Iso => "iso",
                DiskFormat::Unknown => {
                    return Err(ApiError::new(
                        ResultCode::FileError,
                        format!(
                            "Unsupported format for virtual disk image {href} in OVF: \"{}\"",
                            disk.format
                        ),
                    ));
                }
            };
            let mut name = match href.rsplit('/').next() {
                Some(name) if !name.is_empty() => name.to_owned(),
                _ => format!("{}.{extension}", disk.id),
            };
            if file.is_some_and(|f| f.gzip) {
                name = name.strip_suffix(".gz").map(str::to_owned).unwrap_or(name);
            }
            let name = unique(&name, true, |n| targets.iter().any(|t| t == n) || folder.join(n).exists());
            targets.push(name.clone());
            let Some(controller) = controllers.get(&drive.controller) else {
                return Err(ApiError::fail(format!(
                    "Cannot find storage controller with OVF instance ID \"{}\" to which medium \"{href}\" should be attached",
                    drive.controller
                )));
            };
            let extra = format!("controller={controller};channel={}", drive.address);
            d.add(Type::HardDiskImage, &disk.id, href, &name, &extra);
        }
        Ok(())
    }
}

/// Folders and files that an operation has made, which go again unless it succeeds.
#[derive(Default)]
pub(crate) struct Made {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Made {
    /// Creates the folder and those above it that are missing.
    pub(crate) fn folder(&mut self, folder: &Path) -> ApiResult<()> {
        let missing: Vec<&Path> = folder.ancestors().take_while(|f| !f.exists()).collect();
        for f in missing.into_iter().rev() {
            std::fs::create_dir(f).map_err(|e| file_error("Could not create the directory", f, &e))?;
            self.folders.push(f.to_owned());
        }
        Ok(())
    }

    /// The file is about to be made.
    pub(crate) fn file(&mut self, path: &Path) {
        self.files.push(path.to_owned());
    }

    /// Everything stays.
    pub(crate) fn keep(mut self) {
        self.files.clear();
        self.folders.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for file in self.files.iter().rev() {
            let _ = std::fs::remove_file(file);
        }
        for folder in self.folders.iter().rev() {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_taken_get_numbers() {
        assert_eq!(unique("a", false, |_| false), "a");
        assert_eq!(unique("a", false, |n| n == "a" || n == "a_1"), "a_2");
        assert_eq!(unique("d.x.vmdk", true, |n| n == "d.x.vmdk"), "d.x_1.vmdk");
    }

    #[test]
    fn what_a_failed_operation_made_goes_again() {
        let base = std::env::temp_dir().join(format!("made-{}", std::process::id()));
        let mut made = Made::default();
        made.folder(&base.join("a/b")).unwrap();
        made.file(&base.join("a/b/f"));
        std::fs::write(base.join("a/b/f"), "x").unwrap();
        drop(made);
        assert!(!base.exists());
    }
}
