//! Writing machines as a package: every disk as a stream-optimized VMDK image, the descriptor, and a manifest if wanted.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums::{ExportOptions, VirtualSystemDescriptionType as Type};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::IProgress;
use main_api::progress::Progress;
use main_api::types::ObjRef;
use ovf::{Algorithm, Archive, OvfVersion, Product, System, SystemDisk};
use settings::{DriveType, MachineSettings, NetworkAttachment};
use uuid::Uuid;
use vbox_types::ResultCode;
use vd::Dek;

use crate::appliance::{Description, Made, adapter_number, package_error, run};
use crate::calls_machine::target;
use crate::encryption::{self, Locked};
use crate::images::{self, Chain, Reading};
use crate::import::{canceled, step};
use crate::machines::{absolute, file_error};
use crate::objects::Object;
use crate::svc::{Context, Svc};
use crate::view::gone;

/// IMachine::exportTo: the index of the new description.
pub(crate) fn add_machine(c: &Context, appliance: u32) -> ApiResult<usize> {
    let (reference, _) = target(c)?;
    let mut state = c.svc.state.lock();
    let machine = state.resolve(c.peer.id, reference)?;
    if let Some(error) = &machine.access_error {
        return Err(error.clone());
    }
    if machine.state.is_online() {
        return Err(ApiError::new(
            ResultCode::InvalidVmState,
            format!("The machine '{}' must be powered off to be exported", machine.display_name()),
        ));
    }
    let (id, settings) = (machine.id, machine.settings.clone());
    let mut d = Description { machine: Some(id), ..Description::default() };
    d.add(Type::OS, "", &ovf::cim_of(&settings.os_type).to_string(), &settings.os_type, "");
    d.add(Type::Name, "", "", &settings.name, "");
    if !settings.description.is_empty() {
        d.add(Type::Description, "", "", &settings.description, "");
    }
    d.add(Type::CPU, "", "", &settings.hardware.cpu.count.to_string(), "");
    d.add(Type::Memory, "", "", &(u64::from(settings.hardware.memory.ram_mb) << 20).to_string(), "");
    for nic in settings.hardware.network.iter().filter(|n| n.enabled) {
        d.add(Type::NetworkAdapter, "", "", &adapter_number(nic.adapter_type).to_string(), "");
    }
    let own =
        state.appliances.get_mut(&appliance).filter(|a| a.peer == c.peer.id && !a.busy).ok_or_else(gone)?;
    own.descriptions.push(d);
    Ok(own.descriptions.len() - 1)
}

/// IAppliance::write.
pub(crate) fn start(
    c: &Context,
    format: &str,
    options: Vec<ExportOptions>,
    path: &str,
) -> ApiResult<ObjRef<IProgress>> {
    let Object::Appliance(number) = c.object else { return Err(gone()) };
    let lower = path.to_ascii_lowercase();
    if !lower.ends_with(".ovf") && !lower.ends_with(".ova") {
        return Err(ApiError::new(ResultCode::FileError, "Appliance file must have .ovf or .ova extension"));
    }
    let version = match format {
        "ovf-0.9" => OvfVersion::V0_9,
        "ovf-1.0" => OvfVersion::V1_0,
        "ovf-2.0" => OvfVersion::V2_0,
        other => {
            return Err(ApiError::new(
                ResultCode::FileError,
                format!("Invalid format \"{other}\" specified"),
            ));
        }
    };
    let path = absolute(path)?;
    let (descriptions, passwords) = {
        let state = c.svc.state.lock();
        let appliance = state.appliances.get(&number).filter(|a| a.peer == c.peer.id).ok_or_else(gone)?;
        (appliance.descriptions.clone(), appliance.passwords.clone())
    };
    if descriptions.is_empty() || descriptions.iter().any(|d| d.machine.is_none()) {
        return Err(ApiError::fail("There are no machines to export"));
    }
    let jobs = plan(&c.svc, &descriptions, &passwords, &options, &path)?;
    let images = jobs.iter().map(|j| j.images.len()).sum::<usize>();
    let progress = Progress::new(
        format!("Exporting appliance '{}'", path.display()),
        u32::try_from(images + 1).unwrap_or(1),
        true,
    );
    let manifest = options.contains(&ExportOptions::CreateManifest).then_some(match version {
        OvfVersion::V2_0 => Algorithm::Sha256,
        _ => Algorithm::Sha1,
    });
    run(c, progress, move |progress| write(&path, version, manifest, jobs, progress))
}

/// The encrypted media that an export would read, by the ids of their passwords.
pub(crate) fn encrypted(c: &Context) -> ApiResult<BTreeMap<String, Vec<Uuid>>> {
    let Object::Appliance(number) = c.object else { return Err(gone()) };
    let state = c.svc.state.lock();
    let appliance = state.appliances.get(&number).filter(|a| a.peer == c.peer.id).ok_or_else(gone)?;
    let mut found = BTreeMap::<_, Vec<Uuid>>::new();
    for machine in appliance.descriptions.iter().filter_map(|d| d.machine) {
        let hardware = &state.machine(machine)?.settings.hardware;
        let devices = hardware.storage_controllers.iter().flat_map(|controller| &controller.attached);
        for id in devices.filter(|d| d.drive == DriveType::HardDisk).filter_map(|d| d.image) {
            if let Some((_, key_id)) = encryption::settings(&state.media, id) {
                found.entry(key_id).or_default().push(id);
            }
        }
    }
    Ok(found)
}

/// A machine to write.
struct Job {
    product: Product,
    settings: MachineSettings,
    images: Vec<ImageJob>,
    /// While this lives, no VM writes to the images.
    _reading: Reading,
}

struct ImageJob {
    chain: Chain,
    /// If it is encrypted.
    key: Option<Locked>,
    disk: SystemDisk,
}

fn plan(
    svc: &Arc<Svc>,
    descriptions: &[Description],
    passwords: &BTreeMap<String, String>,
    options: &[ExportOptions],
    path: &Path,
) -> ApiResult<Vec<Job>> {
    let base = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let mut jobs = Vec::new();
    let mut number = 0;
    let mut guard = svc.state.lock();
    let state = &mut *guard;
    for d in descriptions {
        // Texts that a client adds come after those that the machine has.
        let text = |kind| {
            let all = d.entries.iter().rev().filter(|e| e.enabled);
            all.into_iter().find(|e| e.kind == kind).map(|e| e.vbox.clone()).unwrap_or_default()
        };
        let machine = state.machine(d.machine.ok_or_else(gone)?)?;
        let (online, display) = (machine.state.is_online(), machine.display_name());
        if online {
            return Err(ApiError::new(
                ResultCode::InvalidVmState,
                format!("The machine '{display}' must be powered off to be exported"),
            ));
        }
        let mut settings = (*machine.settings).clone();
        settings.name = text(Type::Name);
        settings.media_registry = Default::default();
        settings.snapshot = None;
        settings.current_snapshot = None;
        settings.state_file.clear();
        settings.aborted = false;
        for nic in &mut settings.hardware.network {
            let strip = options.contains(&ExportOptions::StripAllMACs)
                || (options.contains(&ExportOptions::StripAllNonNATMACs)
                    && nic.attachment != NetworkAttachment::Nat);
            if strip {
                nic.mac_address.clear();
            }
        }
        let mut images = Vec::new();
        let mut media: Vec<Uuid> = Vec::new();
        for controller in &mut settings.hardware.storage_controllers {
            for device in &mut controller.attached {
                let Some(old) = device.image else { continue };
                let dvd = device.drive == DriveType::Dvd;
                let wanted = match device.drive {
                    DriveType::HardDisk => true,
                    DriveType::Dvd => options.contains(&ExportOptions::ExportDVDImages),
                    DriveType::Floppy => false,
                };
                if !wanted {
                    device.image = None;
                    continue;
                }
                let medium = state.media.medium_mut(old)?;
                medium.refresh();
                if !medium.last_error.is_empty() {
                    return Err(ApiError::new(ResultCode::FileError, medium.last_error.clone()).on("IMedium"));
                }
                let capacity = medium.info.as_ref().map_or(0, |i| i.logical_size);
                number += 1;
                let id = Uuid::new_v4();
                device.image = Some(id);
                media.push(old);
                let extension = if dvd { "iso" } else { "vmdk" };
                images.push(ImageJob {
                    chain: state.media.images(old)?,
                    key: Locked::of(&state.media, old, passwords)?,
                    disk: SystemDisk {
                        file: format!("{base}-disk{number:03}.{extension}"),
                        file_size: 0,
                        capacity,
                        uuid: id,
                        controller: controller.name.clone(),
                        port: device.port,
                        device: device.device,
                        dvd,
                    },
                });
            }
        }
        let product = Product {
            name: settings.name.clone(),
            product: text(Type::Product),
            product_url: text(Type::ProductUrl),
            vendor: text(Type::Vendor),
            vendor_url: text(Type::VendorUrl),
            version: text(Type::Version),
            description: text(Type::Description),
            license: text(Type::License),
        };
        let reading = Reading::start(svc, state, &media);
        match reading {
            Ok(reading) => jobs.push(Job { product, settings, images, _reading: reading }),
            Err(error) => {
                // The jobs' own marks need the lock.
                drop(guard);
                return Err(error);
            }
        }
    }
    Ok(jobs)
}

fn write(
    path: &Path,
    version: OvfVersion,
    manifest: Option<Algorithm>,
    jobs: Vec<Job>,
    progress: &Progress,
) -> ApiResult<()> {
    let names = jobs.iter().flat_map(|j| &j.images).map(|i| path.with_file_name(&i.disk.file));
    let is_folder = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("ovf"));
    let names: Vec<PathBuf> = if is_folder { names.collect() } else { Vec::new() };
    if let Some(there) = std::iter::once(path.to_owned()).chain(names).find(|p| p.exists()) {
        return Err(ApiError::new(
            ResultCode::FileError,
            format!("Could not create the output file '{}' (VERR_ALREADY_EXISTS)", there.display()),
        ));
    }
    let mut made = Made::default();
    let mut systems = Vec::new();
    let mut parts: Vec<(String, PathBuf)> = Vec::new();
    let mut reading = Vec::new();
    let keys = jobs.iter().flat_map(|j| &j.images).map(|i| i.key.as_ref().map(Locked::unlock).transpose());
    let mut keys = keys.collect::<ApiResult<Vec<_>>>()?.into_iter();
    for job in jobs {
        let mut disks = Vec::new();
        for image in job.images {
            let mut disk = image.disk;
            progress.next_operation(&format!("Exporting to disk image '{}'", disk.file));
            let mut part = path.with_file_name(&disk.file).into_os_string();
            part.push(".part");
            let part = PathBuf::from(part);
            disk.file_size =
                image_file(&mut made, &image.chain, keys.next().flatten().as_ref(), &disk, &part, progress)?;
            parts.push((disk.file.clone(), part));
            disks.push(disk);
        }
        systems.push(System { product: job.product, settings: job.settings, disks });
        reading.push(job._reading);
    }
    progress.next_operation("Writing the package");
    let text = ovf::write(version, &systems).map_err(|e| package_error(&e))?;
    let mut archive = Archive::create(path, manifest).map_err(|e| package_error(&e))?;
    let goes_on = |_: u64| !progress.canceled();
    let written = archive
        .add(&Archive::descriptor_name(path), text.as_bytes(), text.len() as u64, &mut { goes_on })
        .and_then(|()| {
            parts.iter().try_for_each(|(name, part)| archive.add_file(name, part, &mut { goes_on }))
        })
        .and_then(|()| archive.finish());
    written.map_err(|e| if progress.canceled() { canceled() } else { package_error(&e) })
}

/// Writes one image to `part`; its size.
fn image_file(
    made: &mut Made,
    chain: &Chain,
    key: Option<&Dek>,
    disk: &SystemDisk,
    part: &Path,
    progress: &Progress,
) -> ApiResult<u64> {
    let fail = |what: &str, e: &dyn std::fmt::Display| file_error(what, part, e);
    let mut out = File::options()
        .write(true)
        .create_new(true)
        .open(part)
        .map_err(|e| fail("Could not create the file", &e))?;
    made.file(part);
    if disk.dvd {
        let source = &chain.last().ok_or_else(gone)?.path;
        let mut file = File::open(source).map_err(|e| file_error("Could not open the medium", source, &e))?;
        std::io::copy(&mut file, &mut out).map_err(|e| fail("Could not write the file", &e))?;
    } else {
        let source = images::open(chain)?;
        source.set_key(key);
        vd::write_stream_optimized(&source, &mut out, &disk.file, disk.uuid, &mut |done, all| {
            step(progress, done, all, 0, 99)
        })
        .map_err(|e| match e {
            vd::Error::Cancelled { .. } => canceled(),
            e => images::create_error(part, &e),
        })?;
    }
    out.sync_all().map_err(|e| fail("Could not write the file", &e))?;
    out.metadata().map(|m| m.len()).map_err(|e| fail("Could not look at the file", &e))
}
