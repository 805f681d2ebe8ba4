//! The service's own objects: IVirtualBox, properties, host, progress, events, sessions.

use zbus::zvariant::OwnedFd;

use super::{
    IAppliance, IConsole, IDHCPServer, IHostNetworkInterface, IHostOnlyNetwork, IMachine, IMedium,
    INATNetwork, interface,
};
use crate::enums::*;
use crate::types::ObjRef;

interface! {
    /// What a client needs of the service beyond the Main API. At [`crate::paths::ROOT`].
    IClientSupport {
        methods {
            /// An ISession of this connection. It and its lock end with the connection.
            CreateSession() -> (session: ObjRef<ISession>);
            /// Ends a session object before the connection ends.
            DropSession(session: ObjRef<ISession>) -> ();
            /// Writes one line to the service's log, so that a client's doings can be told from it.
            Log(text: String) -> ();
            /// What `list` shows of every medium of a kind, each behind its parent, in one call: there may be thousands. The files are
            /// looked at as by [`IMedium::RefreshState`]. The lists have one element for each medium; base media have no parent's id.
            ListMedia(kind: DeviceType) -> (
                ids: Vec<String>, parents: Vec<String>, states: Vec<MediumState>, types: Vec<MediumType>,
                locations: Vec<String>, formats: Vec<String>, logicalSizes: Vec<i64>, encrypted: Vec<bool>);
        }
    }
}

interface! {
    /// What a VM process calls. At [`crate::paths::ROOT`].
    IVMProcessControl {
        methods {
            /// Makes the caller the VM process of a machine: it was started for that, or the machine has no session, or it
            /// was the machine's VM process with an earlier service. The caller must hold the machine's liveness lock
            /// (see [`crate::liveness`]). Returns the machine's id, its settings file, its effective settings as the text
            /// of a `.vbox` file (locations of media absolute) and its log folder.
            RegisterVM(nameOrId: String, state: MachineState) -> (
                id: String, settingsFile: String, settings: String, logFolder: String);
            /// Tells the machine's state. An error belongs to `Stuck`, `Aborted` and to `PoweredOff` after a failed start.
            SetState(state: MachineState, errorCode: u32, errorText: String, errorComponent: String, errorInterface: String) -> ();
            /// The guest has ejected the medium of a drive.
            MediumEjected(controller: String, port: i32, device: i32) -> ();
            /// Something has happened to the machine that its user should know: see [`IEventSource::OnRuntimeError`].
            RuntimeError(fatal: bool, errorId: String, message: String) -> ();
            /// Tells how far the start (or another long operation of the VM) has come.
            SetProgress(percent: u32, operation: String) -> ();
            /// Records an extra-data value of the machine at run time.
            SetExtraData(key: String, value: String) -> ();
            /// A cable into a network that machines share: a socket of type SOCK_SEQPACKET on which each message is an Ethernet
            /// frame. `name` is the network's or the host interface's. When it breaks, the VM process asks again.
            OpenNetwork(slot: u32, attachmentType: NetworkAttachmentType, name: String, macAddress: String,
                promiscModePolicy: NetworkAdapterPromiscModePolicy) -> (connection: OwnedFd);
        }
    }
}

interface! {
    /// What the service calls in a VM process. At [`crate::paths::ROOT`] of the VM process.
    IVMProcess {
        methods {
            /// Serves a console client on the descriptor, one end of a socket pair.
            AddConsoleClient(connection: OwnedFd) -> ();
            /// Drives or media have changed at run time. `settings` is the text of a `.vbox` file with every medium that is
            /// attached, `folder` what its relative locations are relative to. `force` takes media out that the guest has locked.
            StorageChange(force: bool, settings: String, folder: String) -> ();
            /// A network adapter's settings have changed at run time. `settings` is the text of a `.vbox` file.
            NetworkAdapterChange(slot: u32, settings: String) -> ();
            /// What a bandwidth group may have has changed at run time; 0 is no limit.
            BandwidthGroupChange(group: String, bytes_per_second: u64) -> ();
            /// A virtual CPU comes or, when the guest has let it go, goes.
            CPUChange(cpu: u32, plugged: bool) -> ();
            /// Percent of time that guest code may run.
            CPUExecutionCapChange(cap: u32) -> ();
        }
    }
}

interface! {
    /// The root of the Main API. At [`crate::paths::VIRTUAL_BOX`].
    IVirtualBox {
        attributes {
            Version: String, r;
            VersionNormalized: String, r;
            Revision: u32, r;
            PackageType: String, r;
            APIVersion: String, r;
            APIRevision: i64, r;
            HomeFolder: String, r;
            SettingsFilePath: String, r;
            Host: ObjRef<IHost>, r;
            SystemProperties: ObjRef<ISystemProperties>, r;
            Machines: Vec<ObjRef<IMachine>>, r;
            MachineGroups: Vec<String>, r;
            HardDisks: Vec<ObjRef<IMedium>>, r;
            DVDImages: Vec<ObjRef<IMedium>>, r;
            FloppyImages: Vec<ObjRef<IMedium>>, r;
            ProgressOperations: Vec<ObjRef<IProgress>>, r;
            GuestOSTypes: Vec<ObjRef<IGuestOSType>>, r;
            EventSource: ObjRef<IEventSource>, r;
            DHCPServers: Vec<ObjRef<IDHCPServer>>, r;
            NATNetworks: Vec<ObjRef<INATNetwork>>, r;
            HostOnlyNetworks: Vec<ObjRef<IHostOnlyNetwork>>, r;
            InternalNetworks: Vec<String>, r;
            GenericNetworkDrivers: Vec<String>, r;
        }
        methods {
            ComposeMachineFilename(name: String, group: String, createFlags: String, baseFolder: String) -> (file: String);
            CreateMachine(settingsFile: String, name: String, groups: Vec<String>, osTypeId: String, flags: String,
                cipher: String, passwordId: String, password: String) -> (machine: ObjRef<IMachine>);
            OpenMachine(settingsFile: String, password: String) -> (machine: ObjRef<IMachine>);
            RegisterMachine(machine: ObjRef<IMachine>) -> ();
            FindMachine(nameOrId: String) -> (machine: ObjRef<IMachine>);
            GetMachinesByGroups(groups: Vec<String>) -> (machines: Vec<ObjRef<IMachine>>);
            GetMachineStates(machines: Vec<ObjRef<IMachine>>) -> (states: Vec<MachineState>);
            CreateMedium(format: String, location: String, accessMode: AccessMode, deviceType: DeviceType) -> (medium: ObjRef<IMedium>);
            OpenMedium(location: String, deviceType: DeviceType, accessMode: AccessMode, forceNewUuid: bool) -> (medium: ObjRef<IMedium>);
            CreateAppliance() -> (appliance: ObjRef<IAppliance>);
            GetGuestOSType(id: String) -> (ostype: ObjRef<IGuestOSType>);
            GetExtraDataKeys() -> (keys: Vec<String>);
            GetExtraData(key: String) -> (value: String);
            SetExtraData(key: String, value: String) -> ();
            CreateDHCPServer(name: String) -> (server: ObjRef<IDHCPServer>);
            FindDHCPServerByNetworkName(name: String) -> (server: ObjRef<IDHCPServer>);
            RemoveDHCPServer(server: ObjRef<IDHCPServer>) -> ();
            CreateNATNetwork(networkName: String) -> (network: ObjRef<INATNetwork>);
            FindNATNetworkByName(networkName: String) -> (network: ObjRef<INATNetwork>);
            RemoveNATNetwork(network: ObjRef<INATNetwork>) -> ();
            CreateHostOnlyNetwork(networkName: String) -> (network: ObjRef<IHostOnlyNetwork>);
            FindHostOnlyNetworkByName(networkName: String) -> (network: ObjRef<IHostOnlyNetwork>);
            FindHostOnlyNetworkById(id: String) -> (network: ObjRef<IHostOnlyNetwork>);
            RemoveHostOnlyNetwork(network: ObjRef<IHostOnlyNetwork>) -> ();
        }
    }
}

interface! {
    /// Limits, defaults and the global settings of `VirtualBox.xml`.
    ISystemProperties {
        attributes {
            MinGuestRAM: u32, r;
            MaxGuestRAM: u32, r;
            MinGuestVRAM: u32, r;
            MaxGuestVRAM: u32, r;
            MinGuestCPUCount: u32, r;
            MaxGuestCPUCount: u32, r;
            MaxGuestMonitors: u32, r;
            InfoVDSize: i64, r;
            SerialPortCount: u32, r;
            ParallelPortCount: u32, r;
            MaxBootPosition: u32, r;
            RawModeSupported: bool, r;
            ExclusiveHwVirt: bool, rw;
            DefaultMachineFolder: String, rw;
            LoggingLevel: String, rw;
            DefaultHardDiskFormat: String, rw;
            FreeDiskSpaceWarning: i64, r;
            FreeDiskSpacePercentWarning: u32, r;
            FreeDiskSpaceError: i64, r;
            FreeDiskSpacePercentError: u32, r;
            VRDEAuthLibrary: String, rw;
            WebServiceAuthLibrary: String, rw;
            DefaultVRDEExtPack: String, rw;
            LogHistoryCount: u32, rw;
            DefaultAudioDriver: AudioDriverType, r;
            AutostartDatabasePath: String, rw;
            DefaultAdditionsISO: String, rw;
            DefaultFrontend: String, rw;
            ScreenShotFormats: Vec<BitmapFormat>, r;
            ProxyMode: String, rw;
            ProxyURL: String, rw;
            LanguageId: String, rw;
            SupportedParavirtProviders: Vec<ParavirtProvider>, r;
        }
        methods {
            GetMaxNetworkAdapters(chipset: ChipsetType) -> (count: u32);
            GetMaxDevicesPerPortForStorageBus(bus: StorageBus) -> (count: u32);
            GetMinPortCountForStorageBus(bus: StorageBus) -> (count: u32);
            GetMaxPortCountForStorageBus(bus: StorageBus) -> (count: u32);
            GetMaxInstancesOfStorageBus(chipset: ChipsetType, bus: StorageBus) -> (count: u32);
            GetDeviceTypesForStorageBus(bus: StorageBus) -> (types: Vec<DeviceType>);
            GetStorageBusForStorageControllerType(storageControllerType: StorageControllerType) -> (bus: StorageBus);
            GetStorageControllerTypesForStorageBus(bus: StorageBus) -> (types: Vec<StorageControllerType>);
            GetMaxInstancesOfUSBControllerType(chipset: ChipsetType, usbType: USBControllerType) -> (count: u32);
            GetDefaultIoCacheSettingForStorageController(storageControllerType: StorageControllerType) -> (enabled: bool);
        }
    }
}

interface! {
    /// The host computer.
    IHost {
        attributes {
            ProcessorCount: u32, r;
            ProcessorOnlineCount: u32, r;
            ProcessorCoreCount: u32, r;
            ProcessorOnlineCoreCount: u32, r;
            /// In MB.
            MemorySize: u32, r;
            /// In MB.
            MemoryAvailable: u32, r;
            OperatingSystem: String, r;
            OSVersion: String, r;
            /// Milliseconds since 1970 in UTC.
            UTCTime: i64, r;
            Acceleration3DAvailable: bool, r;
            NetworkInterfaces: Vec<ObjRef<IHostNetworkInterface>>, r;
        }
        methods {
            CreateHostOnlyNetworkInterface() -> (hostInterface: ObjRef<IHostNetworkInterface>, progress: ObjRef<IProgress>);
            RemoveHostOnlyNetworkInterface(id: String) -> (progress: ObjRef<IProgress>);
            FindHostNetworkInterfaceByName(name: String) -> (networkInterface: ObjRef<IHostNetworkInterface>);
            FindHostNetworkInterfaceById(id: String) -> (networkInterface: ObjRef<IHostNetworkInterface>);
            FindHostNetworkInterfacesOfType(interfaceType: HostNetworkInterfaceType) -> (
                networkInterfaces: Vec<ObjRef<IHostNetworkInterface>>);
            GetProcessorSpeed(cpuId: u32) -> (speed: u32);
            GetProcessorFeature(feature: ProcessorFeature) -> (supported: bool);
            GetProcessorDescription(cpuId: u32) -> (description: String);
            /// What guest code runs on by default, and why: a sentence for people. Not in VirtualBox's interface.
            GetExecutionEngine() -> (description: String);
            GetProcessorCPUIDLeaf(cpuId: u32, leaf: u32, subLeaf: u32) -> (eax: u32, ebx: u32, ecx: u32, edx: u32);
        }
    }
}

interface! {
    /// What VirtualBox knows of a guest operating system, and what it recommends for it.
    IGuestOSType {
        attributes {
            FamilyId: String, r;
            FamilyDescription: String, r;
            Id: String, r;
            Description: String, r;
            Is64Bit: bool, r;
            RecommendedIOAPIC: bool, r;
            RecommendedVirtEx: bool, r;
            RecommendedRAM: u32, r;
            RecommendedGraphicsController: GraphicsControllerType, r;
            RecommendedVRAM: u32, r;
            Recommended2DVideoAcceleration: bool, r;
            Recommended3DAcceleration: bool, r;
            /// In bytes.
            RecommendedHDD: i64, r;
            AdapterType: NetworkAdapterType, r;
            RecommendedPAE: bool, r;
            RecommendedDVDStorageController: StorageControllerType, r;
            RecommendedDVDStorageBus: StorageBus, r;
            RecommendedHDStorageController: StorageControllerType, r;
            RecommendedHDStorageBus: StorageBus, r;
            RecommendedFirmware: FirmwareType, r;
            RecommendedUSBHID: bool, r;
            RecommendedHPET: bool, r;
            RecommendedUSBTablet: bool, r;
            RecommendedRTCUseUTC: bool, r;
            RecommendedChipset: ChipsetType, r;
            RecommendedIommuType: IommuType, r;
            RecommendedAudioController: AudioControllerType, r;
            RecommendedAudioCodec: AudioCodecType, r;
            RecommendedFloppy: bool, r;
            RecommendedUSB: bool, r;
            RecommendedUSB3: bool, r;
            RecommendedTFReset: bool, r;
            RecommendedX2APIC: bool, r;
            RecommendedCPUCount: u32, r;
            RecommendedTpm: TpmType, r;
            RecommendedSecureBoot: bool, r;
            RecommendedWDDMGraphics: bool, r;
        }
    }
}

interface! {
    /// A long operation. The object lives for half a minute after the operation's end, or as long as its connection.
    IProgress {
        attributes {
            Id: String, r;
            Description: String, r;
            Cancelable: bool, r;
            Percent: u32, r;
            /// Seconds, or -1 when that is not known.
            TimeRemaining: i32, r;
            Completed: bool, r;
            Canceled: bool, r;
            /// The HRESULT; 0 for success. Legal once completed.
            ResultCode: i32, r;
            /// Null after success.
            ErrorInfo: ObjRef<IVirtualBoxErrorInfo>, r;
            OperationCount: u32, r;
            Operation: u32, r;
            OperationDescription: String, r;
            OperationPercent: u32, r;
        }
        methods {
            /// Returns when the operation has ended or the time (milliseconds, -1 for no limit) is over.
            WaitForCompletion(timeout: i32) -> ();
            Cancel() -> ();
        }
    }
}

interface! {
    /// The error of an operation.
    IVirtualBoxErrorInfo {
        attributes {
            ResultCode: i32, r;
            InterfaceID: String, r;
            Component: String, r;
            Text: String, r;
            Next: ObjRef<IVirtualBoxErrorInfo>, r;
        }
    }
}

interface! {
    /// Where events come from. A connection gets signals from the moment of `RegisterListener`.
    IEventSource {
        methods {
            RegisterListener() -> ();
            UnregisterListener() -> ();
        }
        signals {
            OnMachineStateChanged(machineId: String, state: MachineState);
            OnMachineDataChanged(machineId: String, temporary: bool);
            OnMachineRegistered(machineId: String, registered: bool);
            OnSessionStateChanged(machineId: String, state: SessionState);
            OnExtraDataChanged(machineId: String, key: String, value: String);
            OnMediumRegistered(mediumId: String, mediumType: DeviceType, registered: bool);
            OnGuestPropertyChanged(machineId: String, name: String, value: String, flags: String, fWasDeleted: bool);
            /// Something has happened to a running machine that its user should know ("IRuntimeErrorEvent"). `fatal`: it cannot go on.
            /// Clients tell the kinds apart by `id`, which is one of [`crate::runtime_error`]'s; `message` is for people.
            OnRuntimeError(machineId: String, fatal: bool, id: String, message: String);
        }
    }
}

interface! {
    /// A client's session: at most one machine is locked through it.
    ISession {
        attributes {
            State: SessionState, r;
            Type: SessionType, r;
            Name: String, rw;
            Machine: ObjRef<IMachine>, r;
        }
        methods {
            UnlockMachine() -> ();
            /// A connection to the VM process, where [`crate::paths::CONSOLE`] and its children live. Stands for the
            /// IDL's attribute `console`.
            OpenConsole() -> (connection: OwnedFd, console: ObjRef<IConsole>);
        }
    }
}
