//! IMachine and its snapshots.

use super::*;
use crate::enums::*;
use crate::types::ObjRef;

interface! {
    /// A virtual machine. A registered machine's object is read-only; a session's object ([`ISession::Machine`]) and
    /// that of a machine not registered yet can be changed, and keep changes to themselves until `SaveSettings`.
    IMachine {
        attributes {
            Accessible: bool, r;
            AccessError: ObjRef<IVirtualBoxErrorInfo>, r;
            Name: String, rw;
            Description: String, rw;
            Id: String, r;
            /// The icon's file as base64; empty without one. The IDL's type is octet[].
            Icon: String, rw;
            Groups: Vec<String>, rw;
            OSTypeId: String, rw;
            HardwareVersion: String, rw;
            HardwareUUID: String, rw;
            CPUCount: u32, rw;
            CPUHotPlugEnabled: bool, rw;
            CPUExecutionCap: u32, rw;
            CPUIDPortabilityLevel: u32, rw;
            CPUProfile: String, rw;
            /// In MB.
            MemorySize: u32, rw;
            /// In MB.
            MemoryBalloonSize: u32, rw;
            PageFusionEnabled: bool, rw;
            GraphicsAdapter: ObjRef<IGraphicsAdapter>, r;
            BIOSSettings: ObjRef<IBIOSSettings>, r;
            TrustedPlatformModule: ObjRef<ITrustedPlatformModule>, r;
            NonVolatileStore: ObjRef<INvramStore>, r;
            RecordingSettings: ObjRef<IRecordingSettings>, r;
            FirmwareType: FirmwareType, rw;
            PointingHIDType: PointingHIDType, rw;
            KeyboardHIDType: KeyboardHIDType, rw;
            HPETEnabled: bool, rw;
            ChipsetType: ChipsetType, rw;
            IommuType: IommuType, rw;
            SnapshotFolder: String, rw;
            VRDEServer: ObjRef<IVRDEServer>, r;
            EmulatedUSBCardReaderEnabled: bool, rw;
            MediumAttachments: Vec<ObjRef<IMediumAttachment>>, r;
            USBControllers: Vec<ObjRef<IUSBController>>, r;
            USBDeviceFilters: ObjRef<IUSBDeviceFilters>, r;
            AudioSettings: ObjRef<IAudioSettings>, r;
            StorageControllers: Vec<ObjRef<IStorageController>>, r;
            SettingsFilePath: String, r;
            SettingsAuxFilePath: String, r;
            SettingsModified: bool, r;
            SessionState: SessionState, r;
            SessionName: String, r;
            SessionPID: u32, r;
            State: MachineState, r;
            /// Milliseconds since 1970 in UTC.
            LastStateChange: i64, r;
            StateFilePath: String, r;
            LogFolder: String, r;
            CurrentSnapshot: ObjRef<ISnapshot>, r;
            SnapshotCount: u32, r;
            CurrentStateModified: bool, r;
            SharedFolders: Vec<ObjRef<ISharedFolder>>, r;
            ClipboardMode: ClipboardMode, rw;
            ClipboardFileTransfersEnabled: bool, rw;
            DnDMode: DnDMode, rw;
            TeleporterEnabled: bool, rw;
            TeleporterPort: u32, rw;
            TeleporterAddress: String, rw;
            TeleporterPassword: String, rw;
            ParavirtProvider: ParavirtProvider, rw;
            ParavirtDebug: String, rw;
            RTCUseUTC: bool, rw;
            IOCacheEnabled: bool, rw;
            IOCacheSize: u32, rw;
            BandwidthControl: ObjRef<IBandwidthControl>, r;
            GuestDebugControl: ObjRef<IGuestDebugControl>, r;
            TracingEnabled: bool, rw;
            TracingConfig: String, rw;
            AllowTracingToAccessVM: bool, rw;
            AutostartEnabled: bool, rw;
            AutostartDelay: u32, rw;
            AutostopType: AutostopType, rw;
            DefaultFrontend: String, rw;
            VMProcessPriority: VMProcPriority, rw;
            /// Not of the IDL: the network adapters of every slot of the chipset, in the order of slots.
            NetworkAdapters: Vec<ObjRef<INetworkAdapter>>, r;
            /// Not of the IDL: the four serial ports.
            SerialPorts: Vec<ObjRef<ISerialPort>>, r;
            /// Not of the IDL: the two parallel ports.
            ParallelPorts: Vec<ObjRef<IParallelPort>>, r;
            /// Not of the IDL: the boot order of every position.
            BootOrder: Vec<DeviceType>, r;
        }
        methods {
            LockMachine(session: ObjRef<ISession>, lockType: LockType) -> ();
            LaunchVMProcess(session: ObjRef<ISession>, name: String, environmentChanges: Vec<String>) -> (progress: ObjRef<IProgress>);
            SetBootOrder(position: u32, device: DeviceType) -> ();
            GetBootOrder(position: u32) -> (device: DeviceType);
            AttachDevice(name: String, controllerPort: i32, device: i32, deviceType: DeviceType, medium: ObjRef<IMedium>) -> ();
            AttachDeviceWithoutMedium(name: String, controllerPort: i32, device: i32, deviceType: DeviceType) -> ();
            DetachDevice(name: String, controllerPort: i32, device: i32) -> ();
            PassthroughDevice(name: String, controllerPort: i32, device: i32, passthrough: bool) -> ();
            TemporaryEjectDevice(name: String, controllerPort: i32, device: i32, temporaryEject: bool) -> ();
            NonRotationalDevice(name: String, controllerPort: i32, device: i32, nonRotational: bool) -> ();
            SetAutoDiscardForDevice(name: String, controllerPort: i32, device: i32, discard: bool) -> ();
            SetHotPluggableForDevice(name: String, controllerPort: i32, device: i32, hotPluggable: bool) -> ();
            SetBandwidthGroupForDevice(name: String, controllerPort: i32, device: i32, bandwidthGroup: ObjRef<IBandwidthGroup>) -> ();
            MountMedium(name: String, controllerPort: i32, device: i32, medium: ObjRef<IMedium>, force: bool) -> ();
            UnmountMedium(name: String, controllerPort: i32, device: i32, force: bool) -> ();
            GetMedium(name: String, controllerPort: i32, device: i32) -> (medium: ObjRef<IMedium>);
            GetMediumAttachmentsOfController(name: String) -> (attachments: Vec<ObjRef<IMediumAttachment>>);
            GetMediumAttachment(name: String, controllerPort: i32, device: i32) -> (attachment: ObjRef<IMediumAttachment>);
            GetNetworkAdapter(slot: u32) -> (adapter: ObjRef<INetworkAdapter>);
            AddStorageController(name: String, connectionType: StorageBus) -> (controller: ObjRef<IStorageController>);
            GetStorageControllerByName(name: String) -> (controller: ObjRef<IStorageController>);
            GetStorageControllerByInstance(connectionType: StorageBus, instance: u32) -> (controller: ObjRef<IStorageController>);
            RemoveStorageController(name: String) -> ();
            SetStorageControllerBootable(name: String, bootable: bool) -> ();
            AddUSBController(name: String, controllerType: USBControllerType) -> (controller: ObjRef<IUSBController>);
            RemoveUSBController(name: String) -> ();
            GetUSBControllerByName(name: String) -> (controller: ObjRef<IUSBController>);
            GetUSBControllerCountByType(controllerType: USBControllerType) -> (count: u32);
            GetSerialPort(slot: u32) -> (port: ObjRef<ISerialPort>);
            GetParallelPort(slot: u32) -> (port: ObjRef<IParallelPort>);
            GetExtraDataKeys() -> (keys: Vec<String>);
            GetExtraData(key: String) -> (value: String);
            SetExtraData(key: String, value: String) -> ();
            GetCPUProperty(property: CPUPropertyType) -> (value: bool);
            SetCPUProperty(property: CPUPropertyType, value: bool) -> ();
            /// Every leaf that the settings override: leaf, sub-leaf, eax, ebx, ecx, edx of the entry at `ordinal`.
            GetCPUIDLeafByOrdinal(ordinal: u32) -> (idx: u32, idxSub: u32, eax: u32, ebx: u32, ecx: u32, edx: u32);
            SetCPUIDLeaf(idx: u32, idxSub: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> ();
            RemoveCPUIDLeaf(idx: u32, idxSub: u32) -> ();
            RemoveAllCPUIDLeaves() -> ();
            GetHWVirtExProperty(property: HWVirtExPropertyType) -> (value: bool);
            SetHWVirtExProperty(property: HWVirtExPropertyType, value: bool) -> ();
            GetEffectiveParavirtProvider() -> (provider: ParavirtProvider);
            HotPlugCPU(cpu: u32) -> ();
            HotUnplugCPU(cpu: u32) -> ();
            GetCPUStatus(cpu: u32) -> (attached: bool);
            SaveSettings() -> ();
            DiscardSettings() -> ();
            ApplyDefaults(flags: String) -> ();
            Unregister(cleanupMode: CleanupMode) -> (media: Vec<ObjRef<IMedium>>);
            DeleteConfig(media: Vec<ObjRef<IMedium>>) -> (progress: ObjRef<IProgress>);
            CreateSharedFolder(name: String, hostPath: String, writable: bool, automount: bool, autoMountPoint: String) -> ();
            RemoveSharedFolder(name: String) -> ();
            QueryLogFilename(idx: u32) -> (filename: String);
            /// An unknown name has an empty value.
            GetGuestProperty(name: String) -> (value: String, timestamp: i64, flags: String);
            /// Stored at once. An empty value deletes the property.
            SetGuestProperty(property: String, value: String, flags: String) -> ();
            SetGuestPropertyValue(property: String, value: String) -> ();
            DeleteGuestProperty(name: String) -> ();
            /// `patterns` are separated by `|` or a comma, with `*` and `?`; empty for every property.
            EnumerateGuestProperties(patterns: String) -> (names: Vec<String>, values: Vec<String>, timestamps: Vec<i64>,
                flags: Vec<String>);
            DiscardSavedState(fRemoveFile: bool) -> ();
            /// Makes `target`, which its creator has not registered yet, a copy of this machine.
            CloneTo(target: ObjRef<IMachine>, mode: CloneMode, options: Vec<CloneOptions>) -> (progress: ObjRef<IProgress>);
            ExportTo(appliance: ObjRef<IAppliance>, location: String) -> (description: ObjRef<IVirtualSystemDescription>);
        }
    }
}

interface! {
    /// A snapshot. Read-only: snapshots are listed as the settings file has them.
    ISnapshot {
        attributes {
            Id: String, r;
            Name: String, r;
            Description: String, r;
            /// Milliseconds since 1970 in UTC.
            TimeStamp: i64, r;
            Online: bool, r;
            Parent: ObjRef<ISnapshot>, r;
            Children: Vec<ObjRef<ISnapshot>>, r;
        }
    }
}
