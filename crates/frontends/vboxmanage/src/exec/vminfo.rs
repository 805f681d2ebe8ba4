//! Gathers what `showvminfo` shows.

use std::sync::mpsc;
use std::time::Duration;

use main_api::enums::*;
use main_api::idl::*;
use main_api::{ApiError, ApiResult, Client, ObjRef, Proxy, Tree};
use vbox_types::ResultCode;

use super::Run;
use crate::print::vminfo::*;

/// How long a VM process may take to tell its screen's size. The answer is a courtesy; a VM that is busy or stuck
/// must not make `showvminfo` late.
const CONSOLE_LIMIT: Duration = Duration::from_millis(500);
/// No settings file overrides more CPUID leaves than this.
const MAX_CPUID_OVERRIDES: u32 = 4096;

impl Run<'_> {
    /// Everything about a machine; with `live`, also what its VM process tells.
    pub(super) fn vm_info(&self, machine: &Proxy<IMachine>, live: bool) -> ApiResult<Vm> {
        // What has changed at a running machine without being saved is known to its sessions alone.
        let running = live && machine.read(IMachine::State).is_ok_and(MachineState::is_online);
        let session = if running { self.client.lock_machine(machine, LockType::Shared).ok() } else { None };
        // A machine that ends meanwhile takes its sessions' objects along; what is registered stays.
        if let Some(in_session) = session.as_ref().and_then(|session| session.machine().ok())
            && let Ok(vm) = self.gather(&in_session, &machine.reference(), live)
        {
            return Ok(vm);
        }
        self.gather(machine, &machine.reference(), live)
    }

    /// What `machine` says: the machine that is `registered`, or a session's.
    fn gather(&self, machine: &Proxy<IMachine>, registered: &ObjRef<IMachine>, live: bool) -> ApiResult<Vm> {
        let tree = machine.tree()?;
        let this = machine.reference();
        if !tree.read(&this, IMachine::Accessible)? {
            return self.inaccessible(machine, &tree);
        }
        let mut info = Gather { client: &self.client, machine, tree: &tree, this: &this }.info()?;
        if live && info.state == MachineState::Running {
            info.video_mode = video_mode(&self.client, registered);
        }
        Ok(Vm::Accessible(Box::new(info)))
    }

    fn inaccessible(&self, machine: &Proxy<IMachine>, tree: &Tree) -> ApiResult<Vm> {
        let this = machine.reference();
        let error = tree.read(&this, IMachine::AccessError).ok().and_then(|reference| reference.non_null());
        let (text, details) = match error {
            Some(reference) => {
                let info = self.client.at(reference).attributes()?;
                let error = ApiError {
                    code: info.read(IVirtualBoxErrorInfo::ResultCode)? as u32,
                    text: info.read(IVirtualBoxErrorInfo::Text)?,
                    component: info.read(IVirtualBoxErrorInfo::Component)?,
                    interface: info.read(IVirtualBoxErrorInfo::InterfaceID)?,
                };
                (error.text.clone(), error.details())
            }
            None => (String::new(), String::new()),
        };
        Ok(Vm::Inaccessible {
            id: tree.read(&this, IMachine::Id)?,
            settings_file: tree.read(&this, IMachine::SettingsFilePath).unwrap_or_default(),
            error: text,
            details,
        })
    }
}

/// The first screen's size, if the VM process tells it soon.
fn video_mode(client: &Client, machine: &ObjRef<IMachine>) -> Option<VideoMode> {
    let (client, machine) = (client.clone(), machine.clone());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let ask = || -> ApiResult<VideoMode> {
            let session = client.lock_machine(&client.at(machine), LockType::Shared)?;
            let console = session.console()?;
            let display = console.object(IConsole::Display)?;
            let (width, height, bits_per_pixel, x, y, status) =
                display.call(IDisplay::GetScreenResolution, (0,))?;
            Ok(VideoMode { width, height, bits_per_pixel, origin: (x, y), status })
        };
        let _ = sender.send(ask());
    });
    receiver.recv_timeout(CONSOLE_LIMIT).ok()?.ok()
}

struct Gather<'a> {
    client: &'a Client,
    machine: &'a Proxy<IMachine>,
    tree: &'a Tree,
    this: &'a ObjRef<IMachine>,
}

impl Gather<'_> {
    fn get<T: main_api::types::ApiType>(&self, attr: main_api::types::Attr<IMachine, T>) -> ApiResult<T> {
        self.tree.read(self.this, attr)
    }

    fn cpu_property(&self, property: CPUPropertyType) -> ApiResult<bool> {
        self.machine.call(IMachine::GetCPUProperty, (property,))
    }

    fn hw_virt(&self, property: HWVirtExPropertyType) -> ApiResult<bool> {
        self.machine.call(IMachine::GetHWVirtExProperty, (property,))
    }

    fn info(&self) -> ApiResult<VmInfo> {
        let os_type = self.get(IMachine::OSTypeId)?;
        let os = self
            .client
            .virtual_box()
            .call(IVirtualBox::GetGuestOSType, (os_type.clone(),))
            .and_then(|reference| self.client.at(reference).read(IGuestOSType::Description))
            .unwrap_or(os_type);
        let state = self.get(IMachine::State)?;
        let session = self.get(IMachine::SessionState)?;
        Ok(VmInfo {
            name: self.get(IMachine::Name)?,
            groups: self.get(IMachine::Groups)?,
            os,
            id: self.get(IMachine::Id)?,
            settings_file: self.get(IMachine::SettingsFilePath)?,
            snapshot_folder: self.get(IMachine::SnapshotFolder)?,
            log_folder: self.get(IMachine::LogFolder)?,
            hardware_uuid: self.get(IMachine::HardwareUUID)?,
            memory: self.get(IMachine::MemorySize)?,
            page_fusion: self.get(IMachine::PageFusionEnabled)?,
            graphics: self.graphics()?,
            cpu: self.cpu()?,
            hpet: self.get(IMachine::HPETEnabled)?,
            chipset: self.get(IMachine::ChipsetType)?,
            firmware: self.get(IMachine::FirmwareType)?,
            bios: self.bios()?,
            boot_order: self.get(IMachine::BootOrder)?,
            rtc_utc: self.get(IMachine::RTCUseUTC)?,
            hw_virt: HwVirt {
                enabled: self.hw_virt(HWVirtExPropertyType::Enabled)?,
                nested_paging: self.hw_virt(HWVirtExPropertyType::NestedPaging)?,
                large_pages: self.hw_virt(HWVirtExPropertyType::LargePages)?,
                vpid: self.hw_virt(HWVirtExPropertyType::VPID)?,
                unrestricted: self.hw_virt(HWVirtExPropertyType::UnrestrictedExecution)?,
                virt_vmsave: self.hw_virt(HWVirtExPropertyType::VirtVmsaveVmload)?,
            },
            iommu: self.get(IMachine::IommuType)?,
            paravirt: self.get(IMachine::ParavirtProvider)?,
            effective_paravirt: self.machine.call(IMachine::GetEffectiveParavirtProvider, ())?,
            paravirt_debug: self.get(IMachine::ParavirtDebug)?,
            state,
            state_since: self.get(IMachine::LastStateChange)?,
            state_file: self.get(IMachine::StateFilePath)?,
            teleporter: Teleporter {
                enabled: self.get(IMachine::TeleporterEnabled)?,
                port: self.get(IMachine::TeleporterPort)?,
                address: self.get(IMachine::TeleporterAddress)?,
                password: self.get(IMachine::TeleporterPassword)?,
            },
            tracing: Tracing {
                enabled: self.get(IMachine::TracingEnabled)?,
                allow_vm_access: self.get(IMachine::AllowTracingToAccessVM)?,
                config: self.get(IMachine::TracingConfig)?,
            },
            autostart_enabled: self.get(IMachine::AutostartEnabled)?,
            autostart_delay: self.get(IMachine::AutostartDelay)?,
            default_frontend: self.get(IMachine::DefaultFrontend)?,
            priority: self.get(IMachine::VMProcessPriority)?,
            controllers: self.controllers()?,
            nics: self.nics()?,
            pointing: self.get(IMachine::PointingHIDType)?,
            keyboard: self.get(IMachine::KeyboardHIDType)?,
            uarts: self.uarts()?,
            lpts: self.lpts()?,
            audio: self.audio()?,
            clipboard: self.get(IMachine::ClipboardMode)?,
            drag_and_drop: self.get(IMachine::DnDMode)?,
            session_name: match session {
                SessionState::Unlocked => String::new(),
                _ => self.get(IMachine::SessionName)?,
            },
            online: state.is_online(),
            video_mode: None,
            vrde: self.vrde()?,
            usb_controllers: self.usb_controllers()?,
            usb_filters: self.usb_filters()?,
            bandwidth_groups: self.bandwidth_groups()?,
            shared_folders: self.shared_folders()?,
            recording: self.recording()?,
            description: self.get(IMachine::Description)?,
            snapshots: self.snapshots()?,
            memory_balloon: self.get(IMachine::MemoryBalloonSize)?,
        })
    }

    fn graphics(&self) -> ApiResult<Graphics> {
        let adapter = self.get(IMachine::GraphicsAdapter)?;
        Ok(Graphics {
            controller: self.tree.read(&adapter, IGraphicsAdapter::GraphicsControllerType)?,
            vram: self.tree.read(&adapter, IGraphicsAdapter::VRAMSize)?,
            monitors: self.tree.read(&adapter, IGraphicsAdapter::MonitorCount)?,
            accelerate_3d: self.tree.read(&adapter, IGraphicsAdapter::Accelerate3DEnabled)?,
            accelerate_2d_video: self.tree.read(&adapter, IGraphicsAdapter::Accelerate2DVideoEnabled)?,
        })
    }

    fn cpu(&self) -> ApiResult<Cpu> {
        let mut overrides = Vec::new();
        for ordinal in 0..MAX_CPUID_OVERRIDES {
            match self.machine.call(IMachine::GetCPUIDLeafByOrdinal, (ordinal,)) {
                Ok((leaf, subleaf, a, b, c, d)) => overrides.push([leaf, subleaf, a, b, c, d]),
                Err(error) if error.is(ResultCode::InvalidArg) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Cpu {
            count: self.get(IMachine::CPUCount)?,
            execution_cap: self.get(IMachine::CPUExecutionCap)?,
            profile: self.get(IMachine::CPUProfile)?,
            pae: self.cpu_property(CPUPropertyType::PAE)?,
            long_mode: self.cpu_property(CPUPropertyType::LongMode)?,
            triple_fault_reset: self.cpu_property(CPUPropertyType::TripleFaultReset)?,
            apic: self.cpu_property(CPUPropertyType::APIC)?,
            x2apic: self.cpu_property(CPUPropertyType::X2APIC)?,
            nested_hw_virt: self.cpu_property(CPUPropertyType::HWVirt)?,
            portability_level: self.get(IMachine::CPUIDPortabilityLevel)?,
            overrides,
        })
    }

    fn bios(&self) -> ApiResult<Bios> {
        let bios = self.get(IMachine::BIOSSettings)?;
        let nvram = self.get(IMachine::NonVolatileStore)?;
        Ok(Bios {
            boot_menu: self.tree.read(&bios, IBIOSSettings::BootMenuMode)?,
            acpi: self.tree.read(&bios, IBIOSSettings::ACPIEnabled)?,
            ioapic: self.tree.read(&bios, IBIOSSettings::IOAPICEnabled)?,
            apic: self.tree.read(&bios, IBIOSSettings::APICMode)?,
            time_offset: self.tree.read(&bios, IBIOSSettings::TimeOffset)?,
            nvram_file: self.tree.read(&nvram, INvramStore::NonVolatileStorageFile)?,
        })
    }

    fn controllers(&self) -> ApiResult<Vec<Controller>> {
        let attachments = self.get(IMachine::MediumAttachments)?;
        let mut media: Vec<ObjRef<IMedium>> = Vec::new();
        for attachment in &attachments {
            media.push(self.tree.read(attachment, IMediumAttachment::Medium)?);
        }
        let known: Vec<ObjRef<IMedium>> = media.iter().filter(|medium| !medium.is_null()).cloned().collect();
        let values =
            if known.is_empty() { Vec::new() } else { self.client.read_many(&known, &["Location", "Id"])? };
        let mut shown: Vec<(String, Attachment)> = Vec::new();
        for (attachment, medium) in attachments.iter().zip(&media) {
            let at = known.iter().position(|reference| reference == medium);
            let medium = match at.and_then(|at| values.get(at)) {
                Some(values) => Some((values.read(IMedium::Location)?, values.read(IMedium::Id)?)),
                None => None,
            };
            shown.push((
                self.tree.read(attachment, IMediumAttachment::Controller)?,
                Attachment {
                    port: self.tree.read(attachment, IMediumAttachment::Port)?,
                    device: self.tree.read(attachment, IMediumAttachment::Device)?,
                    kind: self.tree.read(attachment, IMediumAttachment::Type)?,
                    medium,
                    passthrough: self.tree.read(attachment, IMediumAttachment::Passthrough)?,
                    temp_eject: self.tree.read(attachment, IMediumAttachment::TemporaryEject)?,
                    ejected: self.tree.read(attachment, IMediumAttachment::IsEjected)?,
                    hot_pluggable: self.tree.read(attachment, IMediumAttachment::HotPluggable)?,
                    non_rotational: self.tree.read(attachment, IMediumAttachment::NonRotational)?,
                    discard: self.tree.read(attachment, IMediumAttachment::Discard)?,
                },
            ));
        }
        let mut controllers = Vec::new();
        for c in self.get(IMachine::StorageControllers)? {
            let name = self.tree.read(&c, IStorageController::Name)?;
            controllers.push(Controller {
                kind: self.tree.read(&c, IStorageController::ControllerType)?,
                instance: self.tree.read(&c, IStorageController::Instance)?,
                max_ports: self.tree.read(&c, IStorageController::MaxPortCount)?,
                ports: self.tree.read(&c, IStorageController::PortCount)?,
                devices_per_port: self.tree.read(&c, IStorageController::MaxDevicesPerPortCount)?,
                bootable: self.tree.read(&c, IStorageController::Bootable)?,
                attachments: shown.iter().filter(|(of, _)| *of == name).map(|(_, a)| a.clone()).collect(),
                name,
            });
        }
        Ok(controllers)
    }

    fn nics(&self) -> ApiResult<Vec<Option<Nic>>> {
        self.get(IMachine::NetworkAdapters)?.iter().map(|nic| self.nic(nic)).collect()
    }

    fn nic(&self, nic: &ObjRef<INetworkAdapter>) -> ApiResult<Option<Nic>> {
        use INetworkAdapter as N;
        use NetworkAttachmentType as A;
        if !self.tree.read(nic, N::Enabled)? {
            return Ok(None);
        }
        let attachment = self.tree.read(nic, N::AttachmentType)?;
        let mut nat = None;
        let attached_to = match attachment {
            A::Null => String::new(),
            A::NAT => {
                let engine = self.tree.read(nic, N::NATEngine)?;
                let (mtu, a, b, c, d) =
                    self.client.at(engine.clone()).call(INATEngine::GetNetworkSettings, ())?;
                nat = Some(Nat {
                    settings: [mtu, a, b, c, d],
                    redirects: self.tree.read(&engine, INATEngine::Redirects)?,
                });
                self.tree.read(&engine, INATEngine::Network)?
            }
            A::Bridged => self.tree.read(nic, N::BridgedInterface)?,
            A::Internal => self.tree.read(nic, N::InternalNetwork)?,
            A::HostOnly => self.tree.read(nic, N::HostOnlyInterface)?,
            A::Generic => self.tree.read(nic, N::GenericDriver)?,
            A::NATNetwork => self.tree.read(nic, N::NATNetwork)?,
            A::Cloud => self.tree.read(nic, N::CloudNetwork)?,
            A::HostOnlyNetwork => self.tree.read(nic, N::HostOnlyNetwork)?,
        };
        let generic_properties = if attachment == A::Generic {
            let (names, values) = self.client.at(nic.clone()).call(N::GetProperties, ())?;
            names.into_iter().zip(values).collect()
        } else {
            Vec::new()
        };
        Ok(Some(Nic {
            mac: self.tree.read(nic, N::MACAddress)?,
            attachment,
            attached_to,
            generic_properties,
            nat,
            cable_connected: self.tree.read(nic, N::CableConnected)?,
            trace: self.tree.read(nic, N::TraceEnabled)?,
            trace_file: self.tree.read(nic, N::TraceFile)?,
            kind: self.tree.read(nic, N::AdapterType)?,
            line_speed: self.tree.read(nic, N::LineSpeed)?,
            boot_priority: self.tree.read(nic, N::BootPriority)?,
            promisc: self.tree.read(nic, N::PromiscModePolicy)?,
            bandwidth_group: self.tree.read(nic, N::BandwidthGroup)?,
        }))
    }

    fn uarts(&self) -> ApiResult<Vec<Option<Uart>>> {
        let read = |port: &ObjRef<ISerialPort>| -> ApiResult<Option<Uart>> {
            if !self.tree.read(port, ISerialPort::Enabled)? {
                return Ok(None);
            }
            Ok(Some(Uart {
                io_base: self.tree.read(port, ISerialPort::IOAddress)?,
                irq: self.tree.read(port, ISerialPort::IRQ)?,
                mode: self.tree.read(port, ISerialPort::HostMode)?,
                server: self.tree.read(port, ISerialPort::Server)?,
                path: self.tree.read(port, ISerialPort::Path)?,
                kind: self.tree.read(port, ISerialPort::UartType)?,
            }))
        };
        self.get(IMachine::SerialPorts)?.iter().map(read).collect()
    }

    fn lpts(&self) -> ApiResult<Vec<Option<Lpt>>> {
        let read = |port: &ObjRef<IParallelPort>| -> ApiResult<Option<Lpt>> {
            if !self.tree.read(port, IParallelPort::Enabled)? {
                return Ok(None);
            }
            Ok(Some(Lpt {
                io_base: self.tree.read(port, IParallelPort::IOAddress)?,
                irq: self.tree.read(port, IParallelPort::IRQ)?,
                path: self.tree.read(port, IParallelPort::Path)?,
            }))
        };
        self.get(IMachine::ParallelPorts)?.iter().map(read).collect()
    }

    fn audio(&self) -> ApiResult<Audio> {
        let settings = self.get(IMachine::AudioSettings)?;
        let adapter = self.tree.read(&settings, IAudioSettings::Adapter)?;
        Ok(Audio {
            enabled: self.tree.read(&adapter, IAudioAdapter::Enabled)?,
            driver: self.tree.read(&adapter, IAudioAdapter::AudioDriver)?,
            controller: self.tree.read(&adapter, IAudioAdapter::AudioController)?,
            codec: self.tree.read(&adapter, IAudioAdapter::AudioCodec)?,
            output: self.tree.read(&adapter, IAudioAdapter::EnabledOut)?,
            input: self.tree.read(&adapter, IAudioAdapter::EnabledIn)?,
        })
    }

    fn vrde(&self) -> ApiResult<Option<Vrde>> {
        let server = self.get(IMachine::VRDEServer)?;
        if !self.tree.read(&server, IVRDEServer::Enabled)? {
            return Ok(None);
        }
        let proxy = self.client.at(server.clone());
        let property = |name: &str| proxy.call(IVRDEServer::GetVRDEProperty, (name.to_owned(),));
        let channel = property("VideoChannel/Enabled")?;
        let mut properties = Vec::new();
        for name in self.tree.read(&server, IVRDEServer::VRDEProperties)? {
            let value = property(&name)?;
            properties.push((name, value));
        }
        Ok(Some(Vrde {
            ports: property("TCP/Ports")?,
            address: property("TCP/Address")?,
            auth: self.tree.read(&server, IVRDEServer::AuthType)?,
            multi_connection: self.tree.read(&server, IVRDEServer::AllowMultiConnection)?,
            reuse_connection: self.tree.read(&server, IVRDEServer::ReuseSingleConnection)?,
            video_channel: channel == "1" || channel.eq_ignore_ascii_case("true"),
            video_channel_quality: property("VideoChannel/Quality")?,
            properties,
        }))
    }

    fn usb_controllers(&self) -> ApiResult<Vec<USBControllerType>> {
        let controllers = self.get(IMachine::USBControllers)?;
        controllers.iter().map(|controller| self.tree.read(controller, IUSBController::Type)).collect()
    }

    fn usb_filters(&self) -> ApiResult<Vec<UsbFilter>> {
        use IUSBDeviceFilter as F;
        let filters = self.get(IMachine::USBDeviceFilters)?;
        let read = |filter: &ObjRef<F>| -> ApiResult<UsbFilter> {
            Ok(UsbFilter {
                active: self.tree.read(filter, F::Active)?,
                name: self.tree.read(filter, F::Name)?,
                vendor_id: self.tree.read(filter, F::VendorId)?,
                product_id: self.tree.read(filter, F::ProductId)?,
                revision: self.tree.read(filter, F::Revision)?,
                manufacturer: self.tree.read(filter, F::Manufacturer)?,
                product: self.tree.read(filter, F::Product)?,
                remote: self.tree.read(filter, F::Remote)?,
                serial_number: self.tree.read(filter, F::SerialNumber)?,
                masked_interfaces: self.tree.read(filter, F::MaskedInterfaces)?,
            })
        };
        self.tree.read(&filters, IUSBDeviceFilters::DeviceFilters)?.iter().map(read).collect()
    }

    fn bandwidth_groups(&self) -> ApiResult<Vec<BandwidthGroup>> {
        let control = self.get(IMachine::BandwidthControl)?;
        if self.tree.read(&control, IBandwidthControl::NumGroups)? == 0 {
            return Ok(Vec::new());
        }
        let groups = self.client.at(control).call(IBandwidthControl::GetAllBandwidthGroups, ())?;
        let read = |group: &ObjRef<IBandwidthGroup>| -> ApiResult<BandwidthGroup> {
            Ok(BandwidthGroup {
                name: self.tree.read(group, IBandwidthGroup::Name)?,
                kind: self.tree.read(group, IBandwidthGroup::Type)?,
                max_bytes_per_second: self.tree.read(group, IBandwidthGroup::MaxBytesPerSec)?,
            })
        };
        groups.iter().map(read).collect()
    }

    fn shared_folders(&self) -> ApiResult<Vec<SharedFolder>> {
        let read = |folder: &ObjRef<ISharedFolder>| -> ApiResult<SharedFolder> {
            Ok(SharedFolder {
                name: self.tree.read(folder, ISharedFolder::Name)?,
                host_path: self.tree.read(folder, ISharedFolder::HostPath)?,
                writable: self.tree.read(folder, ISharedFolder::Writable)?,
                auto_mount: self.tree.read(folder, ISharedFolder::AutoMount)?,
                auto_mount_point: self.tree.read(folder, ISharedFolder::AutoMountPoint)?,
            })
        };
        self.get(IMachine::SharedFolders)?.iter().map(read).collect()
    }

    fn recording(&self) -> ApiResult<Recording> {
        use IRecordingScreenSettings as S;
        let settings = self.get(IMachine::RecordingSettings)?;
        let read = |screen: &ObjRef<S>| -> ApiResult<RecordingScreen> {
            Ok(RecordingScreen {
                enabled: self.tree.read(screen, S::Enabled)?,
                id: self.tree.read(screen, S::Id)?,
                file: self.tree.read(screen, S::Filename)?,
                options: self.tree.read(screen, S::Options)?,
                width: self.tree.read(screen, S::VideoWidth)?,
                height: self.tree.read(screen, S::VideoHeight)?,
                rate: self.tree.read(screen, S::VideoRate)?,
                fps: self.tree.read(screen, S::VideoFPS)?,
            })
        };
        let screens = self.tree.read(&settings, IRecordingSettings::Screens)?;
        Ok(Recording {
            enabled: self.tree.read(&settings, IRecordingSettings::Enabled)?,
            screens: screens.iter().map(read).collect::<ApiResult<_>>()?,
        })
    }

    /// The tree of snapshots, found by walking up from the current one.
    fn snapshots(&self) -> ApiResult<Option<Snapshot>> {
        let current = self.get(IMachine::CurrentSnapshot)?;
        let Some(mut root) = current.clone().non_null() else { return Ok(None) };
        while let Some(parent) = self.tree.read(&root, ISnapshot::Parent)?.non_null() {
            root = parent;
        }
        self.snapshot(&root, &current).map(Some)
    }

    fn snapshot(&self, snapshot: &ObjRef<ISnapshot>, current: &ObjRef<ISnapshot>) -> ApiResult<Snapshot> {
        let children = self.tree.read(snapshot, ISnapshot::Children)?;
        Ok(Snapshot {
            name: self.tree.read(snapshot, ISnapshot::Name)?,
            id: self.tree.read(snapshot, ISnapshot::Id)?,
            description: self.tree.read(snapshot, ISnapshot::Description)?,
            current: snapshot == current,
            children: children.iter().map(|child| self.snapshot(child, current)).collect::<ApiResult<_>>()?,
        })
    }
}
