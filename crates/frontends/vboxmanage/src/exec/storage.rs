//! Storage controllers and what is attached to them.

use main_api::enums::*;
use main_api::idl::*;
use main_api::{ApiError, ObjRef, Proxy};
use vbox_types::ResultCode;

use super::{Context, Done, Failure, Run, absolute, named};
use crate::getopt::parse_uuid;
use crate::parse::modifyvm::{OldMedium, OldStorage};
use crate::parse::storage::{Iscsi, MediumSpec, Password, StorageAttach, StorageCtl};
use crate::print;

/// Where a drive is: controller, port, device.
type Place<'a> = (&'a str, i32, i32);

impl Run<'_> {
    pub(super) fn storage_ctl(&mut self, request: StorageCtl) -> Done {
        let machine = self.find(&request.vm)?;
        let session = self
            .client
            .lock_machine(&machine, LockType::Write)
            .context(|| "LockMachine(a->session, LockType_Write)".to_owned())?;
        let machine = session.machine().context(|| "COMGETTER(Machine)".to_owned())?;
        let name = request.controller.as_str();
        if request.remove {
            machine
                .call(IMachine::RemoveStorageController, (name.to_owned(),))
                .context(|| format!("RemoveStorageController(Bstr(\"{name}\").raw())"))?;
        } else {
            change_controller(&machine, &request)?;
        }
        machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
        session.unlock().context(|| "UnlockMachine()".to_owned())
    }

    /// A medium by UUID or file.
    #[track_caller]
    pub(super) fn open_medium(
        &self,
        name: &str,
        kind: DeviceType,
        access: AccessMode,
        new_uuid: bool,
    ) -> Result<ObjRef<IMedium>, Failure> {
        let location = if parse_uuid(name).is_some() { name.to_owned() } else { absolute(name)? };
        self.client
            .virtual_box()
            .call(IVirtualBox::OpenMedium, (location.clone(), kind, access, new_uuid))
            .context(|| format!("OpenMedium(Bstr(\"{location}\").raw(), enmDevType, enmAccessMode)"))
    }

    pub(super) fn storage_attach(&mut self, request: StorageAttach) -> Done {
        let machine = self.find(&request.vm)?;
        let session = self
            .client
            .lock_machine(&machine, LockType::Shared)
            .context(|| "LockMachine(a->session, LockType_Shared)".to_owned())?;
        let machine = session.machine().context(|| "COMGETTER(Machine)".to_owned())?;
        let running = machine.read(IMachine::State).context(|| "COMGETTER(State)".to_owned())?.is_online();
        if running && request.passthrough.is_some() {
            return Err(Failure::Text(
                "Drive passthrough state cannot be changed while the VM is running".to_owned(),
            ));
        }
        if running && request.bandwidth_group.is_some() {
            return Err(Failure::Text(
                "Bandwidth group cannot be changed while the VM is running".to_owned(),
            ));
        }
        Attacher::new(self, &machine, running, &request)?.run()?;
        machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
        session.unlock().context(|| "UnlockMachine()".to_owned())
    }

    /// The storage options of `modifyvm`.
    pub(super) fn old_storage(&mut self, machine: &Proxy<IMachine>, step: OldStorage) -> Done {
        match step {
            OldStorage::Disk { controllers, port, device, medium } => {
                let (port, device) = (port as i32, device as i32);
                let Some(medium) = medium else {
                    // As VirtualBox: that nothing was there is no error for the IDE and SATA options.
                    let mut last = Ok(());
                    for controller in controllers {
                        last = machine.call(IMachine::DetachDevice, ((*controller).to_owned(), port, device));
                        if last.is_ok() {
                            break;
                        }
                    }
                    return if controllers.len() > 1 {
                        last.context(|| "DetachDevice()".to_owned())
                    } else {
                        Ok(())
                    };
                };
                let medium = self.open_medium(&medium, DeviceType::HardDisk, AccessMode::ReadWrite, false)?;
                let mut done = Ok(());
                for controller in controllers {
                    done = machine.call(
                        IMachine::AttachDevice,
                        ((*controller).to_owned(), port, device, DeviceType::HardDisk, medium.clone()),
                    );
                    if done.is_ok() {
                        break;
                    }
                }
                done.context(|| "AttachDevice()".to_owned())
            }
            OldStorage::ControllerType { controller, kind } => controller_of(machine, controller)?
                .write(IStorageController::ControllerType, named(kind)?)
                .context(|| format!("COMSETTER(ControllerType)(StorageControllerType_{kind})")),
            OldStorage::PortCount { controller, count } => controller_of(machine, controller)?
                .write(IStorageController::PortCount, count)
                .context(|| format!("COMSETTER(PortCount)({count})")),
            OldStorage::Add { controller, bus, kind } => {
                let added = machine
                    .call(IMachine::AddStorageController, (controller.to_owned(), named(bus)?))
                    .context(|| format!("AddStorageController({controller})"))?;
                machine
                    .at(added)
                    .write(IStorageController::ControllerType, named(kind)?)
                    .context(|| format!("COMSETTER(ControllerType)(StorageControllerType_{kind})"))
            }
            OldStorage::Remove { controllers } => {
                let mut done = Ok(());
                for controller in controllers {
                    done = machine.call(IMachine::RemoveStorageController, ((*controller).to_owned(),));
                    if done.is_ok() {
                        break;
                    }
                }
                done.context(|| "RemoveStorageController()".to_owned())
            }
            OldStorage::DvdPassthrough(on) => machine
                .call(IMachine::PassthroughDevice, ("IDE Controller".to_owned(), 1, 0, on))
                .context(|| format!("PassthroughDevice({on})")),
            OldStorage::Dvd(medium) => {
                self.old_mount(machine, ("IDE Controller", 1, 0), DeviceType::DVD, medium)
            }
            OldStorage::Floppy(None) => {
                let place = ("Floppy Controller", 0, 0);
                if attachment(machine, place)?.is_some() { detach(machine, place) } else { Ok(()) }
            }
            OldStorage::Floppy(Some(medium)) => {
                let place = ("Floppy Controller", 0, 0);
                if attachment(machine, place)?.is_none() {
                    attach_empty(machine, place, DeviceType::Floppy)?;
                }
                self.old_mount(machine, place, DeviceType::Floppy, medium)
            }
        }
    }

    fn old_mount(
        &mut self,
        machine: &Proxy<IMachine>,
        place: Place<'_>,
        kind: DeviceType,
        medium: OldMedium,
    ) -> Done {
        let medium = match medium {
            OldMedium::Empty => ObjRef::null(),
            OldMedium::HostDrive(drive) => return Err(host_drive(kind, &drive)),
            OldMedium::Image(name) => self.open_medium(&name, kind, access_for(kind), false)?,
        };
        mount(machine, place, medium, false)
    }
}

/// Drives of the host are not passed on: what to say.
fn host_drive(kind: DeviceType, drive: &str) -> Failure {
    let kind = if kind == DeviceType::DVD { "DVD" } else { "floppy" };
    Failure::Text(format!(
        "Invalid host {kind} drive name \"{drive}\": drives of the host are not supported in this version; \
         attach an image file instead"
    ))
}

fn access_for(kind: DeviceType) -> AccessMode {
    if kind == DeviceType::DVD { AccessMode::ReadOnly } else { AccessMode::ReadWrite }
}

fn controller_of(machine: &Proxy<IMachine>, name: &str) -> Result<Proxy<IStorageController>, Failure> {
    machine
        .call(IMachine::GetStorageControllerByName, (name.to_owned(),))
        .context(|| format!("GetStorageControllerByName(Bstr(\"{name}\").raw(), ctl.asOutParam())"))
        .map(|controller| machine.at(controller))
}

fn change_controller(machine: &Proxy<IMachine>, request: &StorageCtl) -> Done {
    let name = request.controller.as_str();
    if let Some(bus) = request.add {
        machine
            .call(IMachine::AddStorageController, (name.to_owned(), named(bus)?))
            .context(|| format!("AddStorageController(Bstr(\"{name}\").raw(), StorageBus_{bus})"))?;
    }
    let controller = || controller_of(machine, name);
    if let Some(kind) = request.kind {
        controller()?
            .write(IStorageController::ControllerType, named(kind)?)
            .context(|| format!("COMSETTER(ControllerType)(StorageControllerType_{kind})"))?;
    }
    if let Some(count) = request.port_count {
        controller()?
            .write(IStorageController::PortCount, count)
            .context(|| format!("COMSETTER(PortCount)({count})"))?;
    }
    if let Some(on) = request.host_io_cache {
        controller()?
            .write(IStorageController::UseHostIOCache, on)
            .context(|| format!("COMSETTER(UseHostIOCache)({on})"))?;
    }
    if let Some(on) = request.bootable {
        machine
            .call(IMachine::SetStorageControllerBootable, (name.to_owned(), on))
            .context(|| format!("SetStorageControllerBootable(Bstr(\"{name}\").raw(), {on})"))?;
    }
    if let Some(new) = &request.rename {
        controller()?
            .write(IStorageController::Name, new.clone())
            .context(|| format!("COMSETTER(Name)(Bstr(\"{new}\").raw())"))?;
    }
    Ok(())
}

/// The attachment at a place, if there is one.
fn attachment(
    machine: &Proxy<IMachine>,
    (controller, port, device): Place<'_>,
) -> Result<Option<Proxy<IMediumAttachment>>, Failure> {
    match machine.call(IMachine::GetMediumAttachment, (controller.to_owned(), port, device)) {
        Ok(attachment) => Ok(attachment.non_null().map(|attachment| machine.at(attachment))),
        Err(error) if error.is(ResultCode::ObjectNotFound) => Ok(None),
        Err(error) => Err(error).context(|| format!("GetMediumAttachment({controller}, {port}, {device})")),
    }
}

fn device_type_at(machine: &Proxy<IMachine>, place: Place<'_>) -> Result<Option<DeviceType>, Failure> {
    let Some(attachment) = attachment(machine, place)? else { return Ok(None) };
    attachment.read(IMediumAttachment::Type).context(|| "COMGETTER(Type)".to_owned()).map(Some)
}

fn try_detach(machine: &Proxy<IMachine>, (controller, port, device): Place<'_>) -> Result<(), ApiError> {
    machine.call(IMachine::DetachDevice, (controller.to_owned(), port, device))
}

fn detach(machine: &Proxy<IMachine>, place: Place<'_>) -> Done {
    let (controller, port, device) = place;
    try_detach(machine, place)
        .context(|| format!("DetachDevice(Bstr(\"{controller}\").raw(), {port}, {device})"))
}

fn attach_empty(machine: &Proxy<IMachine>, (controller, port, device): Place<'_>, kind: DeviceType) -> Done {
    machine
        .call(IMachine::AttachDeviceWithoutMedium, (controller.to_owned(), port, device, kind))
        .context(|| format!("AttachDeviceWithoutMedium(Bstr(\"{controller}\").raw(), {port}, {device})"))
}

fn mount(
    machine: &Proxy<IMachine>,
    (controller, port, device): Place<'_>,
    medium: ObjRef<IMedium>,
    force: bool,
) -> Done {
    machine
        .call(IMachine::MountMedium, (controller.to_owned(), port, device, medium, force))
        .context(|| format!("MountMedium(Bstr(\"{controller}\").raw(), {port}, {device})"))
}

/// One `storageattach`.
struct Attacher<'a, 'r> {
    run: &'a Run<'r>,
    machine: &'a Proxy<IMachine>,
    running: bool,
    request: &'a StorageAttach,
    controller: Proxy<IStorageController>,
    bus: StorageBus,
    /// What the bus can hold.
    kinds: Vec<DeviceType>,
    port: i32,
    device: i32,
}

impl<'a, 'r> Attacher<'a, 'r> {
    fn new(
        run: &'a Run<'r>,
        machine: &'a Proxy<IMachine>,
        running: bool,
        request: &'a StorageAttach,
    ) -> Result<Self, Failure> {
        let name = &request.controller;
        let controller = match machine.call(IMachine::GetStorageControllerByName, (name.clone(),)) {
            Ok(controller) => machine.at(controller),
            Err(error) if error.is(ResultCode::ObjectNotFound) => {
                return Err(Failure::Text(format!("Could not find a controller named '{name}'")));
            }
            Err(error) => return Err(error).context(|| format!("GetStorageControllerByName({name})")),
        };
        let bus = controller.read(IStorageController::Bus).context(|| "COMGETTER(Bus)".to_owned())?;
        let properties = run
            .client
            .virtual_box()
            .object(IVirtualBox::SystemProperties)
            .context(|| "COMGETTER(SystemProperties)".to_owned())?;
        let limit = |method, what: &str| {
            properties.call(method, (bus,)).context(|| format!("{what}(StorageBus_{})", bus.name()))
        };
        let place = |given: Option<u32>, method, what: &str| match given {
            Some(number) => i32::try_from(number)
                .map_err(|_| Failure::Text(format!("Invalid {} {number}", what.to_ascii_lowercase()))),
            None if limit(method, what)? == 1 => Ok(0),
            None => Err(Failure::Syntax(format!("{what} not specified"))),
        };
        let port = place(request.port, ISystemProperties::GetMaxPortCountForStorageBus, "Port")?;
        let device = place(request.device, ISystemProperties::GetMaxDevicesPerPortForStorageBus, "Device")?;
        let kinds = properties
            .call(ISystemProperties::GetDeviceTypesForStorageBus, (bus,))
            .context(|| format!("GetDeviceTypesForStorageBus(StorageBus_{})", bus.name()))?;
        Ok(Self { run, machine, running, request, controller, bus, kinds, port, device })
    }

    fn place(&self) -> Place<'a> {
        (&self.request.controller, self.port, self.device)
    }

    fn run(&self) -> Done {
        self.make_room()?;
        match &self.request.medium {
            Some(MediumSpec::None) => detach(self.machine, self.place())?,
            Some(MediumSpec::EmptyDrive) => self.empty_drive()?,
            medium => self.medium(medium.as_ref())?,
        }
        self.flags()
    }

    /// Gives a controller whose port count can grow as many ports as are needed.
    fn make_room(&self) -> Done {
        let read = |attribute| self.controller.read(attribute).context(|| "COMGETTER(PortCount)".to_owned());
        let (count, max) = (read(IStorageController::PortCount)?, read(IStorageController::MaxPortCount)?);
        let port = self.port as u32;
        if count == max || port < count || port >= max {
            return Ok(());
        }
        self.controller
            .write(IStorageController::PortCount, port + 1)
            .context(|| format!("COMSETTER(PortCount)({})", port + 1))
    }

    fn empty_drive(&self) -> Done {
        let place = self.place();
        let is_drive = |kind| matches!(kind, DeviceType::DVD | DeviceType::Floppy);
        if self.running {
            let (name, port, device) = place;
            return match device_type_at(self.machine, place)? {
                Some(kind) if is_drive(kind) => self
                    .machine
                    .call(
                        IMachine::UnmountMedium,
                        (name.to_owned(), port, device, self.request.force_unmount),
                    )
                    .context(|| format!("UnmountMedium({name}, {port}, {device})")),
                None if self.request.kind == Some("DVD") => {
                    attach_empty(self.machine, place, DeviceType::DVD)
                }
                _ => Err(Failure::Text(format!(
                    "No DVD/Floppy Drive attached to the controller '{name}' at the port: {port}, device: {device}"
                ))),
            };
        }
        if !self.kinds.iter().any(|kind| is_drive(*kind)) {
            let name = &self.request.controller;
            return Err(Failure::Text(format!(
                "The attachment is not supported by the storage controller '{name}'"
            )));
        }
        let kind = if self.bus == StorageBus::Floppy { DeviceType::Floppy } else { DeviceType::DVD };
        let _ = try_detach(self.machine, place);
        attach_empty(self.machine, place, kind)
    }

    /// The device type asked for, or the one that the controller or what is attached now suggests.
    fn device_type(&self, medium: Option<&MediumSpec>) -> Result<DeviceType, Failure> {
        if let Some(kind) = self.request.kind {
            return named(kind);
        }
        if self.bus == StorageBus::Floppy {
            return Ok(DeviceType::Floppy);
        }
        let attached = device_type_at(self.machine, self.place())?;
        let kind = match (attached, medium) {
            (Some(kind), None) => Some(kind),
            (_, Some(MediumSpec::Additions)) => Some(DeviceType::DVD),
            (_, Some(MediumSpec::Iscsi)) => Some(DeviceType::HardDisk),
            // What is attached tells, if the medium is one of that kind.
            (Some(kind @ (DeviceType::DVD | DeviceType::HardDisk)), Some(MediumSpec::Image(name))) => {
                self.run.open_medium(name, kind, access_for(kind), false).ok().map(|_| kind)
            }
            _ => None,
        };
        kind.ok_or_else(|| Failure::Text("Argument --type must be specified".to_owned()))
    }

    fn medium(&self, spec: Option<&MediumSpec>) -> Done {
        let request = self.request;
        let kind = self.device_type(spec)?;
        if !self.kinds.contains(&kind) {
            let name = &request.controller;
            return Err(Failure::Text(format!(
                "The given attachment is not supported by the storage controller '{name}'"
            )));
        }
        let Some(spec) = spec else {
            return match attachment(self.machine, self.place())? {
                Some(_) => Ok(()),
                None => Err(Failure::Text("Missing --medium argument".to_owned())),
            };
        };
        let mut medium = self.open(spec, kind)?;
        if request.set_uuid.is_some() || request.set_parent_uuid.is_some() {
            Run::set_ids(&medium, request.set_uuid.clone(), request.set_parent_uuid.clone())?;
            // Known by another UUID from now on.
            medium = match (spec, &request.set_uuid) {
                (MediumSpec::Iscsi, Some(id)) => self.open(&MediumSpec::Image(id.clone()), kind)?,
                (MediumSpec::Iscsi, None) => medium,
                _ => self.open(spec, kind)?,
            };
        }
        if let Some(name) = request.medium_type {
            let wanted = named(name)?;
            let now = medium.read(IMedium::Type).context(|| "COMGETTER(Type)".to_owned())?;
            if now != wanted {
                medium
                    .write(IMedium::Type, wanted)
                    .context(|| format!("COMSETTER(Type)(MediumType_{name})"))?;
            }
        }
        if let Some(comment) = request.comment.clone().filter(|comment| !comment.is_empty()) {
            medium
                .write(IMedium::Description, comment)
                .context(|| "COMSETTER(Description)(bstrComment.raw())".to_owned())?;
        }
        self.attach(kind, medium.reference())
    }

    fn open(&self, spec: &MediumSpec, kind: DeviceType) -> Result<Proxy<IMedium>, Failure> {
        let image;
        let name = match spec {
            MediumSpec::Image(name) => name,
            MediumSpec::Additions => {
                image = self
                    .run
                    .client
                    .virtual_box()
                    .object(IVirtualBox::SystemProperties)
                    .and_then(|properties| properties.read(ISystemProperties::DefaultAdditionsISO))
                    .context(|| "COMGETTER(DefaultAdditionsISO)".to_owned())?;
                if image.is_empty() {
                    return Err(Failure::Text("Cannot find the Guest Additions ISO image".to_owned()));
                }
                &image
            }
            MediumSpec::HostDrive(drive) => return Err(host_drive(kind, drive)),
            MediumSpec::Iscsi => return self.iscsi(kind),
            MediumSpec::None | MediumSpec::EmptyDrive => {
                return Err(Failure::Text("Missing --medium argument".to_owned()));
            }
        };
        let new_uuid = self.request.set_uuid.is_some();
        let medium = self.run.open_medium(name, kind, access_for(kind), new_uuid)?;
        Ok(self.machine.at(medium))
    }

    /// A new medium for the disk of a target.
    fn iscsi(&self, kind: DeviceType) -> Result<Proxy<IMedium>, Failure> {
        let Iscsi { server, target, port, lun, username, password, initiator, intnet } = &*self.request.iscsi;
        if server.is_empty() || target.is_empty() {
            return Err(Failure::Text(
                "Parameters --server and --target are required for iSCSI media".to_owned(),
            ));
        }
        if self.request.set_uuid.as_ref().is_some_and(String::is_empty) {
            return Err(Failure::Text("Parameter --setuuid must have a UUID for iSCSI media".to_owned()));
        }
        let location = match lun.as_str() {
            "" | "0" | "enc0" => format!("{server}|{target}"),
            lun => format!("{server}|{target}|{lun}"),
        };
        let password = match password {
            None => String::new(),
            Some(Password::Given(password)) => password.clone(),
            Some(Password::File(file)) => super::machine::read_password_file(file)?,
        };
        let medium = self
            .run
            .client
            .virtual_box()
            .call(
                IVirtualBox::CreateMedium,
                ("iSCSI".to_owned(), location.clone(), AccessMode::ReadWrite, kind),
            )
            .context(|| format!("CreateMedium(Bstr(\"{location}\").raw(), pMedium2Mount.asOutParam())"))?;
        let medium = self.machine.at(medium);
        let address = if port.is_empty() { server.clone() } else { format!("{server}:{port}") };
        let properties = [
            ("TargetAddress", address.as_str()),
            ("TargetName", target),
            ("LUN", lun),
            ("InitiatorUsername", username),
            ("InitiatorSecret", &password),
            ("InitiatorName", initiator),
            ("HostIPStack", if *intnet { "0" } else { "" }),
        ];
        let given = properties.into_iter().filter(|(_, value)| !value.is_empty());
        let given = given.map(|(name, value)| (name.to_owned(), value.to_owned())).unzip();
        medium.call(IMedium::SetProperties, given).context(|| {
            "SetProperties(ComSafeArrayAsInParam(names), ComSafeArrayAsInParam(values))".to_owned()
        })?;
        let id = medium.read(IMedium::Id).context(|| "COMGETTER(Id)(guid.asOutParam())".to_owned())?;
        print::stdout(&format!("iSCSI disk created. UUID: {id}\n"));
        Ok(medium)
    }

    fn attach(&self, kind: DeviceType, medium: ObjRef<IMedium>) -> Done {
        let place = self.place();
        if kind == DeviceType::HardDisk {
            let _ = try_detach(self.machine, place);
            let (name, port, device) = place;
            return self
                .machine
                .call(IMachine::AttachDevice, (name.to_owned(), port, device, kind, medium))
                .context(|| {
                    format!("AttachDevice(Bstr(\"{name}\").raw(), {port}, {device}, DeviceType_HardDisk, pMedium2Mount)")
                });
        }
        if !self.running {
            match device_type_at(self.machine, place)? {
                Some(now) if now == kind => {}
                Some(_) => {
                    let _ = try_detach(self.machine, place);
                    attach_empty(self.machine, place, kind)?;
                }
                None => attach_empty(self.machine, place, kind)?,
            }
        }
        mount(self.machine, place, medium, self.request.force_unmount)
    }

    fn flags(&self) -> Done {
        let (name, port, device) = self.place();
        let request = self.request;
        let flags = [
            (request.passthrough, IMachine::PassthroughDevice),
            (request.temp_eject, IMachine::TemporaryEjectDevice),
            (request.non_rotational, IMachine::NonRotationalDevice),
            (request.discard, IMachine::SetAutoDiscardForDevice),
            (request.hot_pluggable, IMachine::SetHotPluggableForDevice),
        ];
        let wanted = flags.iter().any(|(flag, _)| flag.is_some()) || request.bandwidth_group.is_some();
        if wanted && attachment(self.machine, self.place())?.is_none() {
            return Err(Failure::Text(format!(
                "Couldn't find the controller attachment for the controller '{name}'"
            )));
        }
        for (flag, method) in flags {
            let Some(on) = flag else { continue };
            self.machine
                .call(method, (name.to_owned(), port, device, on))
                .context(|| format!("{}(Bstr(\"{name}\").raw(), {port}, {device}, {on})", method.name))?;
        }
        let Some(group) = &request.bandwidth_group else { return Ok(()) };
        let group = if group.is_empty() {
            ObjRef::null()
        } else {
            self.machine
                .object(IMachine::BandwidthControl)
                .and_then(|control| control.call(IBandwidthControl::GetBandwidthGroup, (group.clone(),)))
                .context(|| format!("GetBandwidthGroup(Bstr(\"{group}\").raw(), bwGroup.asOutParam())"))?
        };
        self.machine
            .call(IMachine::SetBandwidthGroupForDevice, (name.to_owned(), port, device, group))
            .context(|| format!("SetBandwidthGroupForDevice(Bstr(\"{name}\").raw(), {port}, {device})"))
    }
}
