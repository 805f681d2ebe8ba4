//! Applies the changes of `modifyvm`, in order, to a machine that is locked for writing.

use std::fs::File;
use std::io::Read;

use main_api::enums::*;
use main_api::idl::*;
use main_api::types::{ApiType, Attr, InterfaceType};
use main_api::{ApiError, ObjRef, Proxy};

use super::machine::read_password_file;
use super::{Context, Done, Failure, Run, absolute, named, not_available};
use crate::parse::modifyvm::{Change, ModifyVm, NatRule, Object, Scalar, Screens};

impl Run<'_> {
    pub(super) fn modify_vm(&mut self, request: ModifyVm) -> Done {
        let machine = self.find(&request.vm)?;
        let session = self
            .client
            .lock_machine(&machine, LockType::Write)
            .context(|| "LockMachine(a->session, LockType_Write)".to_owned())?;
        let machine = session.machine().context(|| "COMGETTER(Machine)".to_owned())?;
        for change in request.changes {
            self.apply(&machine, change)?;
        }
        machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
        session.unlock().context(|| "UnlockMachine()".to_owned())
    }

    /// Carries out one change on a machine that may be changed.
    pub(super) fn apply(&mut self, machine: &Proxy<IMachine>, change: Change) -> Done {
        match change {
            Change::Set { object, attribute, value } => set(machine, object, attribute, &value),
            Change::CpuProperty { property, on } => machine
                .call(IMachine::SetCPUProperty, (named(property)?, on))
                .context(|| format!("SetCPUProperty(CPUPropertyType_{property}, {on})")),
            Change::HwVirtProperty { property, on } => machine
                .call(IMachine::SetHWVirtExProperty, (named(property)?, on))
                .context(|| format!("SetHWVirtExProperty(HWVirtExPropertyType_{property}, {on})")),
            Change::SetCpuidLeaf { leaf, subleaf, registers: [a, b, c, d] } => machine
                .call(IMachine::SetCPUIDLeaf, (leaf, subleaf, a, b, c, d))
                .context(|| format!("SetCPUIDLeaf({leaf:#x}, {subleaf:#x})")),
            Change::RemoveCpuidLeaf { leaf, subleaf } => machine
                .call(IMachine::RemoveCPUIDLeaf, (leaf, subleaf))
                .context(|| format!("RemoveCPUIDLeaf({leaf:#x}, {subleaf:#x})")),
            Change::RemoveAllCpuidLeaves => machine
                .call(IMachine::RemoveAllCPUIDLeaves, ())
                .context(|| "RemoveAllCPUIDLeaves()".to_owned()),
            Change::HotPlugCpu(cpu) => {
                machine.call(IMachine::HotPlugCPU, (cpu,)).context(|| format!("HotPlugCPU({cpu})"))
            }
            Change::HotUnplugCpu(cpu) => {
                machine.call(IMachine::HotUnplugCPU, (cpu,)).context(|| format!("HotUnplugCPU({cpu})"))
            }
            Change::BootOrder { position, device } => machine
                .call(IMachine::SetBootOrder, (position, named(device)?))
                .context(|| format!("SetBootOrder({position}, DeviceType_{device})")),
            Change::Icon(file) => {
                let icon = base64(&read_icon(&file)?);
                machine.write(IMachine::Icon, icon).context(|| "COMSETTER(Icon)".to_owned())
            }
            Change::NicAttachment { nic, attachment } => attach_nic(&self::nic(machine, nic)?, attachment),
            Change::NicProperty { nic, name, value } => self::nic(machine, nic)?
                .call(INetworkAdapter::SetProperty, (name.clone(), value))
                .context(|| format!("SetProperty({name})")),
            Change::NatSettings { nic, values: [mtu, a, b, c, d] } => nat(machine, nic)?
                .call(INATEngine::SetNetworkSettings, (mtu, a, b, c, d))
                .context(|| "SetNetworkSettings()".to_owned()),
            Change::NatAddRule { nic, rule } => {
                let NatRule { name, protocol, host_ip, host_port, guest_ip, guest_port } = rule;
                let context = format!("AddRedirect({name})");
                nat(machine, nic)?
                    .call(
                        INATEngine::AddRedirect,
                        (name, named(protocol)?, host_ip, host_port, guest_ip, guest_port),
                    )
                    .context(|| context)
            }
            Change::NatRemoveRule { nic, name } => nat(machine, nic)?
                .call(INATEngine::RemoveRedirect, (name.clone(),))
                .context(|| format!("RemoveRedirect(Bstr(\"{name}\").raw())")),
            Change::NeedUsb => need_usb(machine),
            Change::UsbController { kind, name, on } => usb_controller(machine, named(kind)?, name, on),
            Change::UsbRename { old, new } => usb_rename(machine, &old, &new),
            Change::NeedIoApic => {
                let bios = bios(machine)?;
                let on = bios
                    .read(IBIOSSettings::IOAPICEnabled)
                    .context(|| "COMGETTER(IOAPICEnabled)".to_owned())?;
                if on {
                    return Ok(());
                }
                self.stderr.put("*** I/O APIC must be enabled for ICH9, enabling. ***\n");
                bios.write(IBIOSSettings::IOAPICEnabled, true)
                    .context(|| "COMSETTER(IOAPICEnabled)(TRUE)".to_owned())
            }
            Change::VrdeProperty { name, value } => vrde(machine)?
                .call(IVRDEServer::SetVRDEProperty, (name.clone(), value))
                .context(|| format!("SetVRDEProperty({name})")),
            Change::TeleporterPasswordFile(file) => {
                let password = read_password_file(&file)?;
                machine
                    .write(IMachine::TeleporterPassword, password)
                    .context(|| "COMSETTER(TeleporterPassword)".to_owned())
            }
            Change::RecordingScreens(screens) => recording_screens(machine, &screens),
            Change::RecordingFile(file) => {
                let file = if file.is_empty() { file } else { absolute(&file)? };
                set(machine, Object::RecordingScreens, "Filename", &Scalar::Text(file))
            }
            Change::PciAttach { .. } | Change::PciDetach { .. } => {
                Err(not_available("The pass-through of PCI devices"))
            }
            Change::ExtraData { key, value } => machine
                .call(IMachine::SetExtraData, (key.clone(), value))
                .context(|| format!("SetExtraData({key})")),
            Change::Storage(step) => self.old_storage(machine, step),
        }
    }
}

/// Writes an attribute of a part of the machine.
fn set(machine: &Proxy<IMachine>, object: Object, attribute: &'static str, value: &Scalar) -> Done {
    match object {
        Object::Machine => write(machine, attribute, value),
        Object::GraphicsAdapter => write(&part(machine, IMachine::GraphicsAdapter)?, attribute, value),
        Object::BiosSettings => write(&bios(machine)?, attribute, value),
        Object::TrustedPlatformModule => {
            write(&part(machine, IMachine::TrustedPlatformModule)?, attribute, value)
        }
        Object::AudioAdapter => {
            let settings = part(machine, IMachine::AudioSettings)?;
            write(&part(&settings, IAudioSettings::Adapter)?, attribute, value)
        }
        Object::VrdeServer => write(&vrde(machine)?, attribute, value),
        Object::GuestDebugControl => write(&part(machine, IMachine::GuestDebugControl)?, attribute, value),
        Object::RecordingSettings => write(&part(machine, IMachine::RecordingSettings)?, attribute, value),
        Object::RecordingScreens => {
            for screen in screens(machine)? {
                write(&screen, attribute, value)?;
            }
            Ok(())
        }
        Object::Nic(slot) => write(&nic(machine, slot)?, attribute, value),
        Object::NatEngine(slot) => write(&nat(machine, slot)?, attribute, value),
        Object::SerialPort(slot) => {
            let port = machine
                .call(IMachine::GetSerialPort, (slot,))
                .context(|| format!("GetSerialPort({slot}, uart.asOutParam())"))?;
            write(&machine.at(port), attribute, value)
        }
        Object::ParallelPort(slot) => {
            let port = machine
                .call(IMachine::GetParallelPort, (slot,))
                .context(|| format!("GetParallelPort({slot}, lpt.asOutParam())"))?;
            write(&machine.at(port), attribute, value)
        }
    }
}

/// Writes an attribute that a table names. Enumerations travel as the names of their values.
fn write<I: InterfaceType>(object: &Proxy<I>, attribute: &'static str, value: &Scalar) -> Done {
    let known = by_name(I::NAME).and_then(|interface| interface.attribute(attribute));
    if known.is_none() {
        return Err(not_available(&format!("The setting {attribute}")));
    }
    fn put<I: InterfaceType, T: ApiType>(
        object: &Proxy<I>,
        attribute: &'static str,
        value: T,
    ) -> Result<(), ApiError> {
        object.write(Attr::new(attribute), value)
    }
    let done = match value {
        Scalar::Bool(value) => put(object, attribute, *value),
        Scalar::U32(value) => put(object, attribute, *value),
        Scalar::I64(value) => put(object, attribute, *value),
        Scalar::Text(value) => put(object, attribute, value.clone()),
        Scalar::Texts(value) => put(object, attribute, value.clone()),
        Scalar::Enum(value) => put(object, attribute, (*value).to_owned()),
    };
    done.context(|| match value {
        Scalar::Bool(value) => format!("COMSETTER({attribute})({value})"),
        Scalar::U32(value) => format!("COMSETTER({attribute})({value})"),
        Scalar::I64(value) => format!("COMSETTER({attribute})({value})"),
        Scalar::Text(value) => format!("COMSETTER({attribute})(Bstr(\"{value}\").raw())"),
        Scalar::Texts(value) => format!("COMSETTER({attribute})({})", value.join(",")),
        Scalar::Enum(value) => format!("COMSETTER({attribute})({value})"),
    })
}

fn part<I: InterfaceType, J: InterfaceType>(
    object: &Proxy<I>,
    attribute: Attr<I, ObjRef<J>>,
) -> Result<Proxy<J>, Failure> {
    object.object(attribute).context(|| format!("COMGETTER({})", attribute.name))
}

fn bios(machine: &Proxy<IMachine>) -> Result<Proxy<IBIOSSettings>, Failure> {
    part(machine, IMachine::BIOSSettings)
}

fn vrde(machine: &Proxy<IMachine>) -> Result<Proxy<IVRDEServer>, Failure> {
    part(machine, IMachine::VRDEServer)
}

/// The network adapter in `slot`, which the chipset must have.
pub(super) fn nic(machine: &Proxy<IMachine>, slot: u32) -> Result<Proxy<INetworkAdapter>, Failure> {
    let adapters =
        machine.read(IMachine::NetworkAdapters).context(|| "COMGETTER(NetworkAdapters)".to_owned())?;
    match adapters.into_iter().nth(slot as usize) {
        Some(adapter) => Ok(machine.at(adapter)),
        None => Err(Failure::Text(format!("Invalid NIC number {}", slot + 1))),
    }
}

fn nat(machine: &Proxy<IMachine>, slot: u32) -> Result<Proxy<INATEngine>, Failure> {
    part(&nic(machine, slot)?, INetworkAdapter::NATEngine)
}

fn attach_nic(nic: &Proxy<INetworkAdapter>, attachment: Option<&'static str>) -> Done {
    // A saved machine may get another attachment, but its adapter may not be switched, not even to what it is.
    let enabled = nic.read(INetworkAdapter::Enabled).context(|| "COMGETTER(Enabled)".to_owned())?;
    let wanted = attachment.is_some();
    if enabled != wanted {
        nic.write(INetworkAdapter::Enabled, wanted).context(|| format!("COMSETTER(Enabled)({wanted})"))?;
    }
    let Some(attachment) = attachment else { return Ok(()) };
    nic.write(INetworkAdapter::AttachmentType, named(attachment)?)
        .context(|| format!("COMSETTER(AttachmentType)(NetworkAttachmentType_{attachment})"))
}

fn usb_count(machine: &Proxy<IMachine>, kind: USBControllerType) -> Result<u32, Failure> {
    machine
        .call(IMachine::GetUSBControllerCountByType, (kind,))
        .context(|| format!("GetUSBControllerCountByType(USBControllerType_{})", kind.name()))
}

fn add_usb(machine: &Proxy<IMachine>, kind: USBControllerType, name: &str) -> Done {
    machine
        .call(IMachine::AddUSBController, (name.to_owned(), kind))
        .context(|| format!("AddUSBController({name})"))
        .map(|_| ())
}

fn need_usb(machine: &Proxy<IMachine>) -> Done {
    if usb_count(machine, USBControllerType::OHCI)? + usb_count(machine, USBControllerType::XHCI)? > 0 {
        return Ok(());
    }
    add_usb(machine, USBControllerType::OHCI, "OHCI")
}

fn usb_controllers(machine: &Proxy<IMachine>) -> Result<Vec<Proxy<IUSBController>>, Failure> {
    let all = machine.read(IMachine::USBControllers).context(|| "COMGETTER(USBControllers)".to_owned())?;
    Ok(all.into_iter().map(|controller| machine.at(controller)).collect())
}

fn usb_controller(machine: &Proxy<IMachine>, kind: USBControllerType, name: &str, on: bool) -> Done {
    let count = usb_count(machine, kind)?;
    if on {
        return if count == 0 { add_usb(machine, kind, name) } else { Ok(()) };
    }
    if count == 0 {
        return Ok(());
    }
    for controller in usb_controllers(machine)? {
        if controller.read(IUSBController::Type).context(|| "COMGETTER(Type)".to_owned())? == kind {
            let name = controller.read(IUSBController::Name).context(|| "COMGETTER(Name)".to_owned())?;
            machine
                .call(IMachine::RemoveUSBController, (name.clone(),))
                .context(|| format!("RemoveUSBController({name})"))?;
        }
    }
    Ok(())
}

fn usb_rename(machine: &Proxy<IMachine>, old: &str, new: &str) -> Done {
    for controller in usb_controllers(machine)? {
        if controller.read(IUSBController::Name).context(|| "COMGETTER(Name)".to_owned())? == old {
            return controller
                .write(IUSBController::Name, new.to_owned())
                .context(|| format!("COMSETTER(Name)({new})"));
        }
    }
    Err(Failure::Text("Invalid --usbrename parameters, nothing renamed".to_owned()))
}

fn screens(machine: &Proxy<IMachine>) -> Result<Vec<Proxy<IRecordingScreenSettings>>, Failure> {
    let settings = part(machine, IMachine::RecordingSettings)?;
    let all = settings.read(IRecordingSettings::Screens).context(|| "COMGETTER(Screens)".to_owned())?;
    Ok(all.into_iter().map(|screen| machine.at(screen)).collect())
}

fn recording_screens(machine: &Proxy<IMachine>, wanted: &Screens) -> Done {
    let all = screens(machine)?;
    if let Screens::Only(ids) = wanted {
        if ids.iter().any(|id| *id as usize >= all.len()) {
            return Err(Failure::Text("Invalid list of screens specified".to_owned()));
        }
    }
    for (i, screen) in all.iter().enumerate() {
        let on = match wanted {
            Screens::All => true,
            Screens::None => false,
            Screens::Only(ids) => ids.contains(&(i as u32)),
        };
        screen
            .write(IRecordingScreenSettings::Enabled, on)
            .context(|| format!("COMSETTER(Enabled)({on})"))?;
    }
    Ok(())
}

/// Reads an icon: a file of at most 256 KiB.
fn read_icon(name: &str) -> Result<Vec<u8>, Failure> {
    const LIMIT: u64 = 256 << 10;
    let file =
        File::open(name).map_err(|error| Failure::Text(format!("Cannot open file \"{name}\": {error}")))?;
    let mut icon = Vec::new();
    file.take(LIMIT + 1)
        .read_to_end(&mut icon)
        .map_err(|error| Failure::Text(format!("Cannot read contents of file \"{name}\": {error}")))?;
    if icon.len() as u64 > LIMIT {
        return Err(Failure::Text(format!("File \"{name}\" is bigger than 256KByte")));
    }
    Ok(icon)
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group =
            chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let at = (group >> (18 - 6 * digit)) as usize & 0x3f;
            text.push(if digit <= chunk.len() { ALPHABET[at] as char } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_to_groups_of_four() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
