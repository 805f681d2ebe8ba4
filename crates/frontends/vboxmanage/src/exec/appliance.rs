//! Machines in and out of packages, and copies of machines.

use std::collections::HashSet;
use std::panic::Location;

use main_api::enums::{CloneOptions, VirtualSystemDescriptionType as Type};
use main_api::idl::*;
use main_api::{ObjRef, Proxy};

use super::{Context, Done, Failure, Run, absolute};
use crate::parse::appliance::{CloneVm, Export, ExportField, Import, ImportField, SystemChange};
use crate::print::appliance::{DiskChange, Entry, entry};

/// Limits that `import` names.
const CPUS: std::ops::RangeInclusive<u32> = 1..=64;

fn syntax(text: impl Into<String>) -> Failure {
    Failure::Syntax(text.into())
}

impl Run<'_> {
    pub(super) fn import(&mut self, request: Import) -> Done {
        self.detailed_progress |= request.detailed_progress;
        let vbox = self.client.virtual_box();
        let appliance = vbox
            .call(IVirtualBox::CreateAppliance, ())
            .context(|| "CreateAppliance(pAppliance.asOutParam())".to_owned())?;
        let appliance = self.client.at(appliance);
        let path = absolute(&request.file)?;
        let progress = appliance
            .call(IAppliance::Read, (path.clone(),))
            .context(|| "Read(Bstr(pszAbsFilePath).raw(), progressRead.asOutParam())".to_owned())?;
        let progress = self.client.at(progress);
        self.finish(&progress, "Read(progressRead)", "Appliance read failed")?;
        self.stderr.put(&format!("Interpreting {path}...\n"));
        let interpreted = appliance.call(IAppliance::Interpret, ());
        for warning in appliance.call(IAppliance::GetWarnings, ()).unwrap_or_default() {
            self.stderr.put(&format!("VBoxManage: warning: {warning}\n"));
        }
        interpreted.context(|| "Interpret()".to_owned())?;
        self.stderr.put("OK.\n");
        let disks = appliance.read(IAppliance::Disks).context(|| "COMGETTER(Disks)".to_owned())?;
        if !disks.is_empty() {
            let lines: String = disks.iter().map(|disk| format!("  {disk}\n")).collect();
            self.print(&format!("Disks:\n{lines}\n"))?;
        }
        let systems = appliance
            .read(IAppliance::VirtualSystemDescriptions)
            .context(|| "COMGETTER(VirtualSystemDescriptions)".to_owned())?;
        if let Some(change) = request.changes.iter().find(|c| c.system as usize >= systems.len()) {
            return Err(syntax(format!(
                "Invalid index {} with -vsys option; the OVF contains only {} virtual system(s).",
                change.system,
                systems.len()
            )));
        }
        let mut licenses = 0;
        for (number, system) in systems.iter().enumerate() {
            licenses += self.describe(number, system, &request)?;
        }
        match licenses {
            0 => {}
            1 => {
                self.stderr.error("Cannot import until the license agreement listed above is accepted.");
            }
            n => {
                self.stderr.error(&format!(
                    "Cannot import until the {n} license agreements listed above are accepted."
                ));
            }
        }
        if licenses > 0 || request.dry_run || systems.is_empty() {
            return Ok(());
        }
        let progress = appliance
            .call(IAppliance::ImportMachines, (request.options,))
            .context(|| "ImportMachines(ComSafeArrayAsInParam(options), progress.asOutParam())".to_owned())?;
        let progress = self.client.at(progress);
        self.finish(&progress, "ImportMachines(progress)", "Appliance import failed")?;
        self.print("Successfully imported the appliance.\n")
    }

    /// Prints what would become of one machine and tells the service what shall. Gives the number of license agreements that
    /// are not accepted.
    fn describe(
        &mut self,
        number: usize,
        system: &ObjRef<IVirtualSystemDescription>,
        request: &Import,
    ) -> Result<u32, Failure> {
        let system: Proxy<IVirtualSystemDescription> = self.client.at(system.clone());
        let (types, _refs, ovf, vbox, extra) = system
            .call(IVirtualSystemDescription::GetDescription, ())
            .context(|| "GetDescription()".to_owned())?;
        let own: Vec<&SystemChange> =
            request.changes.iter().filter(|c| c.system as usize == number).collect();
        // The last word counts, as in VirtualBox.
        let given = |what: ImportField| own.iter().rev().find(|c| c.what == what).map(|c| c.value.clone());
        let ignored: HashSet<u32> = own
            .iter()
            .filter_map(|c| if let ImportField::Ignore(unit) = c.what { Some(unit) } else { None })
            .collect();
        let mut text = format!("Virtual system {number}:\n");
        let mut licenses = 0;
        let mut enabled = vec![true; types.len()];
        let (mut values, mut extras) = (vbox.clone(), extra.clone());
        for (i, kind) in types.iter().enumerate() {
            let unit = u32::try_from(i).unwrap_or(u32::MAX);
            let mut shown = Entry {
                unit,
                system: number,
                kind: *kind,
                ovf: &ovf[i],
                value: vbox[i].clone(),
                extra: extra[i].clone(),
                changed: false,
                ignored: ignored.contains(&unit),
                disk: DiskChange::default(),
            };
            let simple = match kind {
                Type::OS => Some(ImportField::OsType),
                Type::Name => Some(ImportField::Name),
                Type::Description => Some(ImportField::Description),
                Type::SettingsFile => Some(ImportField::SettingsFile),
                Type::BaseFolder => Some(ImportField::BaseFolder),
                Type::PrimaryGroup => Some(ImportField::Group),
                Type::HardDiskControllerSCSI => Some(ImportField::ScsiType(unit)),
                _ => None,
            };
            if let Some(value) = simple.and_then(given) {
                shown.value = value;
                shown.changed = true;
            }
            match kind {
                Type::BaseFolder if shown.changed => shown.value = absolute(&shown.value)?,
                Type::CPU => {
                    if let Some(cpus) = given(ImportField::Cpus) {
                        if !cpus.parse().is_ok_and(|n| CPUS.contains(&n)) {
                            return Err(syntax(format!(
                                "Argument to --cpus option must be a number greater than {} and less than {}.",
                                CPUS.start() - 1,
                                CPUS.end() + 1
                            )));
                        }
                        (shown.value, shown.changed) = (cpus, true);
                    }
                }
                Type::Memory => {
                    if let Some(memory) = given(ImportField::Memory) {
                        let bytes = memory.parse::<u32>().map(|mb| u64::from(mb) << 20).map_err(|_| {
                            syntax("Argument to --memory option must be a non-negative number.")
                        })?;
                        (shown.value, shown.changed) = (bytes.to_string(), true);
                    }
                }
                Type::License => {
                    licenses += 1;
                    match given(ImportField::Eula).as_deref() {
                        None => {}
                        Some("show") => shown.changed = true,
                        Some("accept") => {
                            licenses -= 1;
                            shown.ignored = true;
                        }
                        Some(_) => {
                            return Err(syntax("Argument to --eula must be either \"show\" or \"accept\"."));
                        }
                    }
                }
                Type::HardDiskImage if !shown.ignored => self.disk(&mut shown, &types, request, &given)?,
                _ => {}
            }
            // A license that is accepted goes along.
            enabled[i] = !shown.ignored || *kind == Type::License;
            text += &entry(&shown);
            values[i] = shown.value;
            extras[i] = shown.extra;
        }
        self.print(&text)?;
        if !request.dry_run {
            system
                .call(IVirtualSystemDescription::SetFinalValues, (enabled, values, extras))
                .context(|| "SetFinalValues()".to_owned())?;
        }
        Ok(licenses)
    }

    /// Where a disk goes.
    fn disk(
        &self,
        shown: &mut Entry<'_>,
        types: &[Type],
        request: &Import,
        given: &impl Fn(ImportField) -> Option<String>,
    ) -> Done {
        let to_vdi = request.options.contains(&main_api::enums::ImportOptions::ImportToVDI);
        if let Some(path) = given(ImportField::Disk(shown.unit)) {
            if to_vdi {
                return Err(syntax(
                    "Option --ImportToVDI can not be used together with a manually set target path.",
                ));
            }
            shown.value = absolute(&path)?;
            shown.disk.path = true;
        } else if to_vdi && !shown.value.to_ascii_lowercase().ends_with(".iso") {
            let stem = shown.value.rsplit_once('.').map_or(shown.value.as_str(), |(stem, _)| stem);
            shown.value = format!("{stem}.vdi");
        }
        let field = |key: &str| {
            let value = shown.extra.split(';').find_map(|f| f.strip_prefix(key)?.strip_prefix('='));
            value.and_then(|v| v.parse::<u32>().ok())
        };
        let (Some(old_controller), Some(old_port)) = (field("controller"), field("channel")) else {
            return Err(Failure::Text(format!(
                "Failed to extract controller value from ExtraConfig: '{}'",
                shown.extra
            )));
        };
        let number = |what: &str, text: Option<String>| match text {
            None => Ok(None),
            Some(text) => match text.parse::<u32>() {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(syntax(format!("Invalid {what} value: '{text}'"))),
            },
        };
        let controller = number("controller", given(ImportField::Controller(shown.unit)))?;
        let port = number("port", given(ImportField::Port(shown.unit)))?;
        if let Some(index) = controller
            && !types.get(index as usize).is_some_and(|t| is_controller(*t))
        {
            return Err(syntax(format!("Invalid storage controller specified: {index}")));
        }
        (shown.disk.controller, shown.disk.port) = (controller.is_some(), port.is_some());
        if controller.is_some() || port.is_some() {
            let new = (controller.unwrap_or(old_controller), port.unwrap_or(old_port));
            if new == (old_controller, old_port) {
                return Err(syntax(format!(
                    "Device already attached to controller {} at this port ({}) location.",
                    new.0, new.1
                )));
            }
            shown.extra = format!("controller={};channel={}", new.0, new.1);
        }
        Ok(())
    }

    pub(super) fn export(&mut self, request: Export) -> Done {
        let vbox = self.client.virtual_box();
        let path = absolute(&request.output)?;
        let machines = request.vms.iter().map(|vm| self.find(vm)).collect::<Result<Vec<_>, _>>()?;
        let appliance = vbox
            .call(IVirtualBox::CreateAppliance, ())
            .context(|| "CreateAppliance(pAppliance.asOutParam())".to_owned())?;
        let appliance = self.client.at(appliance);
        for (number, machine) in machines.iter().enumerate() {
            let description = machine
                .call(IMachine::ExportTo, (appliance.reference(), path.clone()))
                .context(|| "ExportTo(pAppliance, strOutputFile, pVSD.asOutParam())".to_owned())?;
            let description: Proxy<IVirtualSystemDescription> = self.client.at(description);
            for (_, field, text) in request.texts.iter().filter(|(system, ..)| *system as usize == number) {
                let (kind, text) = match field {
                    ExportField::Name => (Type::Name, text.clone()),
                    ExportField::Product => (Type::Product, text.clone()),
                    ExportField::ProductUrl => (Type::ProductUrl, text.clone()),
                    ExportField::Vendor => (Type::Vendor, text.clone()),
                    ExportField::VendorUrl => (Type::VendorUrl, text.clone()),
                    ExportField::Version => (Type::Version, text.clone()),
                    ExportField::Description => (Type::Description, text.clone()),
                    ExportField::Eula => (Type::License, text.clone()),
                    ExportField::EulaFile => (Type::License, license(text)?),
                };
                description
                    .call(IVirtualSystemDescription::AddDescription, (kind, text, String::new()))
                    .context(|| "AddDescription()".to_owned())?;
            }
        }
        let ids = appliance
            .call(IAppliance::GetPasswordIds, ())
            .context(|| "GetPasswordIds(ComSafeArrayAsOutParam(aIdentifiers))".to_owned())?;
        if !ids.is_empty() {
            self.print("Enter the passwords for the following identifiers to export the appliance:\n")?;
            let read = |id: &String| {
                Ok(super::machine::read_password("-", &format!("Password ID {id}:"))?.to_string())
            };
            let passwords = ids.iter().map(read).collect::<Result<Vec<_>, Failure>>()?;
            appliance.call(IAppliance::AddPasswords, (ids, passwords)).context(|| {
                "AddPasswords(ComSafeArrayAsInParam(aIdentifiers), ComSafeArrayAsInParam(aPasswords))"
                    .to_owned()
            })?;
        }
        let progress = appliance
            .call(IAppliance::Write, (request.format.to_owned(), request.options, path))
            .context(|| "Write()".to_owned())?;
        let progress = self.client.at(progress);
        self.finish(&progress, "Write(progress)", "Appliance write failed")?;
        self.print(&format!("Successfully exported {} machine(s).\n", machines.len()))
    }

    pub(super) fn clone_vm(&mut self, request: CloneVm) -> Done {
        let vbox = self.client.virtual_box();
        let source = self.find(&request.vm)?;
        if request.snapshot.is_some() || request.options.contains(&CloneOptions::Link) {
            return Err(super::not_available("A clone of a snapshot"));
        }
        let name = match request.name.as_str() {
            "" => {
                let name = source.read(IMachine::Name).context(|| "COMGETTER(Name)".to_owned())?;
                format!("{name} Clone")
            }
            name => name.to_owned(),
        };
        let flags = request.uuid.map(|uuid| format!("UUID={uuid}")).unwrap_or_default();
        let group = request.groups.first().cloned().unwrap_or_default();
        let folder =
            if request.base_folder.is_empty() { String::new() } else { absolute(&request.base_folder)? };
        let file = vbox
            .call(IVirtualBox::ComposeMachineFilename, (name.clone(), group, flags.clone(), folder))
            .context(|| format!("ComposeMachineFilename({name})"))?;
        let (none, os) = (String::new(), String::new());
        let clone = vbox
            .call(
                IVirtualBox::CreateMachine,
                (file, name.clone(), request.groups, os, flags, none.clone(), none.clone(), none),
            )
            .context(|| format!("CreateMachine({name})"))?;
        let progress = source
            .call(IMachine::CloneTo, (clone.clone(), request.mode, request.options))
            .context(|| "CloneTo(trgMachine, mode, options, progress.asOutParam())".to_owned())?;
        let progress = self.client.at(progress);
        let location = Location::caller();
        self.watch(&progress).map_err(|error| {
            self.stderr.error("Clone VM failed");
            Failure::Api { error, context: "CloneTo(progress)".to_owned(), location }
        })?;
        if request.register {
            vbox.call(IVirtualBox::RegisterMachine, (clone,))
                .context(|| "RegisterMachine(trgMachine)".to_owned())?;
        }
        self.print(&format!("Machine has been successfully cloned as \"{name}\"\n"))
    }
}

fn is_controller(kind: Type) -> bool {
    matches!(
        kind,
        Type::HardDiskControllerIDE
            | Type::HardDiskControllerSATA
            | Type::HardDiskControllerSCSI
            | Type::HardDiskControllerSAS
            | Type::HardDiskControllerVirtioSCSI
            | Type::HardDiskControllerNVMe
    )
}

/// A license agreement out of a file.
fn license(file: &str) -> Result<String, Failure> {
    let failed = |e: &dyn std::fmt::Display| {
        Failure::Text(format!(
            "Cannot read license file \"{file}\" which should be included in the virtual system ({e})"
        ))
    };
    let size = std::fs::metadata(file).map_err(|e| failed(&e))?.len();
    if size > 1 << 20 {
        return Err(failed(&"it is larger than a megabyte"));
    }
    std::fs::read_to_string(file).map_err(|e| failed(&e))
}
