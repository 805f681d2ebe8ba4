//! Lists, extra data and global properties.

use main_api::enums::*;
use main_api::idl::*;
use main_api::types::Attr;
use main_api::{ApiResult, ObjRef, Proxy};

use super::machine::MachineRef;
use super::{Context, Done, Failure, Run};
use crate::parse::global::{GetExtraData, List, ListKind, PropertyValue, Scope, SetExtraData, SetProperty};
use crate::print::fmt::Form;
use crate::print::list::{BusLimits, HostInfo, OsType, SystemProperties};
use crate::print::{self, vminfo};

impl Run<'_> {
    pub(super) fn list(&mut self, request: List) -> Done {
        let mut failed = false;
        for (i, what) in request.what.iter().enumerate() {
            if request.multiple {
                let gap = if i > 0 { "\n" } else { "" };
                self.print(&format!("{gap}[{}]\n", what.word()))?;
            }
            let listed = self.list_one(*what, &request).context(|| format!("list {}", what.word()));
            match listed.and_then(|text| self.print(&text)) {
                Ok(()) => {}
                Err(failure) => {
                    self.report(failure);
                    failed = true;
                }
            }
        }
        if failed { Err(Failure::Silent) } else { Ok(()) }
    }

    fn list_one(&mut self, what: ListKind, request: &List) -> ApiResult<String> {
        let vbox = self.client.virtual_box();
        Ok(match what {
            ListKind::Vms => {
                let machines = vbox.read(IVirtualBox::Machines)?;
                self.list_machines(machines, request.long, request.sorted)?
            }
            ListKind::RunningVms => {
                let machines = vbox.read(IVirtualBox::Machines)?;
                let states = vbox.call(IVirtualBox::GetMachineStates, (machines.clone(),))?;
                let running = machines.into_iter().zip(states).filter(|(_, state)| is_running(*state));
                self.list_machines(
                    running.map(|(machine, _)| machine).collect(),
                    request.long,
                    request.sorted,
                )?
            }
            ListKind::OsTypes => print::list::os_types(&self.os_types()?),
            ListKind::HostInfo => print::list::host_info(&self.host_info()?),
            ListKind::HostCpuIds => print::list::cpu_ids(&self.cpu_ids()?),
            ListKind::SystemProperties => print::list::system_properties(&self.system_properties()?),
            ListKind::Hdds => {
                if request.long {
                    let media = vbox.read(IVirtualBox::HardDisks)?;
                    let mut text = String::new();
                    self.media(&media, Some(&print::medium::Parent::Base), &mut text)?;
                    text
                } else {
                    self.short_media(DeviceType::HardDisk)?
                }
            }
            ListKind::Dvds if request.long => self.images(vbox.read(IVirtualBox::DVDImages)?)?,
            ListKind::Dvds => self.short_media(DeviceType::DVD)?,
            ListKind::Floppies if request.long => self.images(vbox.read(IVirtualBox::FloppyImages)?)?,
            ListKind::Floppies => self.short_media(DeviceType::Floppy)?,
            ListKind::Groups => print::list::groups(&vbox.read(IVirtualBox::MachineGroups)?),
            ListKind::ExtPacks => print::list::ext_packs(),
            ListKind::ScreenshotFormats => {
                let properties = vbox.object(IVirtualBox::SystemProperties)?;
                let formats = properties.read(ISystemProperties::ScreenShotFormats)?;
                let names: Vec<&str> = formats.iter().map(|format| format.name()).collect();
                print::list::screenshot_formats(&names)
            }
            ListKind::CpuProfiles => print::list::cpu_profiles(request.long),
            ListKind::HddBackends => print::list::hdd_backends(),
            ListKind::InternalNetworks => {
                print::networks::internal_networks(&vbox.read(IVirtualBox::InternalNetworks)?)
            }
            ListKind::BridgedInterfaces => {
                print::networks::host_interfaces(&self.host_interfaces(HostNetworkInterfaceType::Bridged)?)
            }
            ListKind::HostOnlyInterfaces => {
                print::networks::host_interfaces(&self.host_interfaces(HostNetworkInterfaceType::HostOnly)?)
            }
            ListKind::HostOnlyNetworks => print::networks::host_only_networks(&self.host_only_networks()?),
            ListKind::NatNetworks => {
                let mut networks = self.nat_networks()?;
                if request.sorted {
                    networks.sort_by(|a, b| a.name.cmp(&b.name));
                }
                print::networks::nat_networks(&networks, request.long)
            }
            ListKind::DhcpServers => print::networks::dhcp_servers(&self.dhcp_servers()?),
            // Of these there are none: their parts of VirtualBox are not there yet.
            ListKind::HostDvds
            | ListKind::HostFloppies
            | ListKind::CloudNetworks
            | ListKind::UsbHost
            | ListKind::UsbFilters
            | ListKind::Updates
            | ListKind::Webcams
            | ListKind::CloudProviders
            | ListKind::CloudProfiles
            | ListKind::HostDrives => String::new(),
        })
    }

    fn list_machines(&self, machines: Vec<MachineRef>, long: bool, sorted: bool) -> ApiResult<String> {
        let values = self.client.read_many(&machines, &["Name", "Id", "Accessible"])?;
        let mut lines = Vec::new();
        for (machine, values) in machines.into_iter().zip(values) {
            // A machine that was unregistered in between has no attributes any more.
            let Ok(id) = values.read(IMachine::Id) else { continue };
            let accessible = values.read(IMachine::Accessible).unwrap_or(false);
            let name = values.read(IMachine::Name).ok().filter(|_| accessible);
            lines.push((name.unwrap_or_else(|| "<inaccessible>".to_owned()), id, machine));
        }
        if sorted {
            lines.sort_by(|a, b| a.0.cmp(&b.0));
        }
        let mut text = String::new();
        for (name, id, machine) in lines {
            if long {
                let vm = self.vm_info(&self.client.at(machine), false)?;
                text.push_str(&vminfo::show(&vm, Form::Human));
            } else {
                text.push_str(&vminfo::compact_line(&name, &id));
            }
        }
        Ok(text)
    }

    fn images(&self, media: Vec<ObjRef<IMedium>>) -> ApiResult<String> {
        let mut text = String::new();
        self.media(&media, None, &mut text)?;
        Ok(text)
    }

    fn os_types(&self) -> ApiResult<Vec<OsType>> {
        use IGuestOSType as T;
        let types = self.client.virtual_box().read(IVirtualBox::GuestOSTypes)?;
        let wanted = ["Id", "Description", "FamilyId", "FamilyDescription", "Is64Bit"];
        let values = self.client.read_many(&types, &wanted)?;
        let read = |t: &main_api::client::Attributes<T>| -> ApiResult<OsType> {
            Ok(OsType {
                id: t.read(T::Id)?,
                description: t.read(T::Description)?,
                family_id: t.read(T::FamilyId)?,
                family_description: t.read(T::FamilyDescription)?,
                is_64_bit: t.read(T::Is64Bit)?,
            })
        };
        values.iter().map(read).collect()
    }

    fn host(&self) -> ApiResult<Proxy<IHost>> {
        self.client.virtual_box().object(IVirtualBox::Host)
    }

    fn host_info(&self) -> ApiResult<HostInfo> {
        const FEATURES: &[(ProcessorFeature, &str)] = &[
            (ProcessorFeature::HWVirtEx, "HW virtualization"),
            (ProcessorFeature::PAE, "PAE"),
            (ProcessorFeature::LongMode, "long mode"),
            (ProcessorFeature::NestedPaging, "nested paging"),
            (ProcessorFeature::UnrestrictedGuest, "unrestricted guest"),
            (ProcessorFeature::NestedHWVirt, "nested HW virtualization"),
            (ProcessorFeature::VirtVmsaveVmload, "virt. vmsave/vmload"),
        ];
        let host = self.host()?;
        let all = host.attributes()?;
        let processors = all.read(IHost::ProcessorCount)?;
        let mut features = Vec::new();
        for (feature, name) in FEATURES {
            features.push((*name, host.call(IHost::GetProcessorFeature, (*feature,))?));
        }
        let mut each_processor = Vec::new();
        for cpu in 0..processors {
            each_processor.push((
                host.call(IHost::GetProcessorSpeed, (cpu,))?,
                host.call(IHost::GetProcessorDescription, (cpu,))?,
            ));
        }
        Ok(HostInfo {
            utc_time: all.read(IHost::UTCTime)?,
            online_processors: all.read(IHost::ProcessorOnlineCount)?,
            processors,
            online_cores: all.read(IHost::ProcessorOnlineCoreCount)?,
            cores: all.read(IHost::ProcessorCoreCount)?,
            features,
            each_processor,
            memory: all.read(IHost::MemorySize)?,
            memory_available: all.read(IHost::MemoryAvailable)?,
            operating_system: all.read(IHost::OperatingSystem)?,
            os_version: all.read(IHost::OSVersion)?,
            engine: host.call(IHost::GetExecutionEngine, ())?,
        })
    }

    fn cpu_ids(&self) -> ApiResult<Vec<[u32; 5]>> {
        let host = self.host()?;
        let mut leaves = Vec::new();
        for first in [0x0000_0000, 0x8000_0000, 0xc000_0000_u32] {
            let (last, ..) = host.call(IHost::GetProcessorCPUIDLeaf, (0, first, 0))?;
            // A range that does not exist answers with something out of it.
            if !(first..=first + 0x7f).contains(&last) {
                continue;
            }
            for leaf in first..=last {
                let (a, b, c, d) = host.call(IHost::GetProcessorCPUIDLeaf, (0, leaf, 0))?;
                leaves.push([leaf, a, b, c, d]);
            }
        }
        Ok(leaves)
    }

    fn system_properties(&self) -> ApiResult<SystemProperties> {
        use ISystemProperties as S;
        let vbox = self.client.virtual_box();
        let properties = vbox.object(IVirtualBox::SystemProperties)?;
        let all = properties.attributes()?;
        let bus = |bus| -> ApiResult<BusLimits> {
            Ok(BusLimits {
                piix3: properties.call(S::GetMaxInstancesOfStorageBus, (ChipsetType::PIIX3, bus))?,
                ich9: properties.call(S::GetMaxInstancesOfStorageBus, (ChipsetType::ICH9, bus))?,
                ports: properties.call(S::GetMaxPortCountForStorageBus, (bus,))?,
                devices_per_port: properties.call(S::GetMaxDevicesPerPortForStorageBus, (bus,))?,
            })
        };
        Ok(SystemProperties {
            api_version: vbox.read(IVirtualBox::APIVersion)?,
            ram: (all.read(S::MinGuestRAM)?, all.read(S::MaxGuestRAM)?),
            vram: (all.read(S::MinGuestVRAM)?, all.read(S::MaxGuestVRAM)?),
            max_monitors: all.read(S::MaxGuestMonitors)?,
            cpus: (all.read(S::MinGuestCPUCount)?, all.read(S::MaxGuestCPUCount)?),
            max_disk: all.read(S::InfoVDSize)?,
            serial_ports: all.read(S::SerialPortCount)?,
            parallel_ports: all.read(S::ParallelPortCount)?,
            boot_positions: all.read(S::MaxBootPosition)?,
            nics_piix3: properties.call(S::GetMaxNetworkAdapters, (ChipsetType::PIIX3,))?,
            nics_ich9: properties.call(S::GetMaxNetworkAdapters, (ChipsetType::ICH9,))?,
            ide: bus(StorageBus::IDE)?,
            sata: bus(StorageBus::SATA)?,
            scsi: bus(StorageBus::SCSI)?,
            sas: bus(StorageBus::SAS)?,
            nvme: bus(StorageBus::PCIe)?,
            virtio_scsi: bus(StorageBus::VirtioSCSI)?,
            floppy: bus(StorageBus::Floppy)?,
            machine_folder: all.read(S::DefaultMachineFolder)?,
            raw_mode: all.read(S::RawModeSupported)?,
            exclusive_hw_virt: all.read(S::ExclusiveHwVirt)?,
            disk_format: all.read(S::DefaultHardDiskFormat)?,
            vrde_auth_library: all.read(S::VRDEAuthLibrary)?,
            web_auth_library: all.read(S::WebServiceAuthLibrary)?,
            vrde_ext_pack: all.read(S::DefaultVRDEExtPack)?,
            log_history_count: all.read(S::LogHistoryCount)?,
            default_frontend: all.read(S::DefaultFrontend)?,
            audio_driver: all.read(S::DefaultAudioDriver)?,
            autostart_path: all.read(S::AutostartDatabasePath)?,
            additions_iso: all.read(S::DefaultAdditionsISO)?,
            logging_level: all.read(S::LoggingLevel)?,
            proxy_mode: all.read(S::ProxyMode)?,
            proxy_url: all.read(S::ProxyURL)?,
            language: all.read(S::LanguageId)?,
        })
    }

    pub(super) fn get_extra_data(&mut self, request: GetExtraData) -> Done {
        let vbox = self.client.virtual_box();
        let machine = match &request.scope {
            Scope::Global => None,
            Scope::Machine(name) => Some(self.find(name)?),
        };
        let value = |key: &str| {
            let key = key.to_owned();
            match &machine {
                None => vbox.call(IVirtualBox::GetExtraData, (key,)),
                Some(machine) => machine.call(IMachine::GetExtraData, (key,)),
            }
        };
        let mut text = String::new();
        match &request.key {
            Some(key) => {
                let value = value(key)
                    .context(|| format!("GetExtraData(Bstr(\"{key}\").raw(), value.asOutParam())"))?;
                text =
                    if value.is_empty() { "No value set!\n".to_owned() } else { format!("Value: {value}\n") };
            }
            None => {
                let keys = match &machine {
                    None => vbox.call(IVirtualBox::GetExtraDataKeys, ()),
                    Some(machine) => machine.call(IMachine::GetExtraDataKeys, ()),
                };
                for key in keys.context(|| "GetExtraDataKeys(ComSafeArrayAsOutParam(aKeys))".to_owned())? {
                    let value = value(&key).context(|| format!("GetExtraData(Bstr(\"{key}\").raw())"))?;
                    text.push_str(&format!("Key: {key}, Value: {value}\n"));
                }
            }
        }
        self.print(&text)
    }

    pub(super) fn set_extra_data(&mut self, request: SetExtraData) -> Done {
        let SetExtraData { scope, key, value } = request;
        let context = format!("SetExtraData(Bstr(\"{key}\").raw(), Bstr(\"{value}\").raw())");
        match scope {
            Scope::Global => {
                self.client.virtual_box().call(IVirtualBox::SetExtraData, (key, value)).context(|| context)
            }
            Scope::Machine(name) => {
                let machine = self.find(&name)?;
                let session = self
                    .client
                    .lock_machine(&machine, LockType::Shared)
                    .context(|| "LockMachine(a->session, LockType_Shared)".to_owned())?;
                let machine = session.machine().context(|| "COMGETTER(Machine)".to_owned())?;
                machine.call(IMachine::SetExtraData, (key, value)).context(|| context)?;
                session.unlock().context(|| "UnlockMachine()".to_owned())
            }
        }
    }

    pub(super) fn set_property(&mut self, request: SetProperty) -> Done {
        let SetProperty { attribute, value } = request;
        let properties = self
            .client
            .virtual_box()
            .object(IVirtualBox::SystemProperties)
            .context(|| "COMGETTER(SystemProperties)".to_owned())?;
        let done = match value {
            PropertyValue::Text(text) if attribute == "DefaultMachineFolder" && !text.is_empty() => {
                let folder = super::absolute(&text)?;
                properties.write(Attr::new(attribute), folder)
            }
            PropertyValue::Text(text) => properties.write(Attr::new(attribute), text),
            PropertyValue::Bool(on) => properties.write(Attr::new(attribute), on),
            PropertyValue::U32(number) => properties.write(Attr::new(attribute), number),
        };
        done.context(|| format!("COMSETTER({attribute})"))
    }
}

/// Whether `list runningvms` shows a machine in this state.
fn is_running(state: MachineState) -> bool {
    use MachineState as S;
    matches!(state, S::Running | S::Teleporting | S::LiveSnapshotting | S::Paused | S::TeleportingPausedVM)
}
