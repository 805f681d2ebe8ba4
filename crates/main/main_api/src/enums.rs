//! The Main API's enumerations. On D-Bus and in SOAP a value is its name.

use zbus::zvariant::Value;

use crate::error::{ApiError, ApiResult};
use crate::types::{ApiType, Ty};

/// An enumeration of the Main API.
pub trait ApiEnum: Copy + Sized + 'static {
    /// The IDL name of the type.
    const TYPE_NAME: &'static str;
    /// Every value, in the order of the IDL.
    const ALL: &'static [Self];

    fn name(self) -> &'static str;

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|v| v.name() == name)
    }
}

macro_rules! api_enums {
    ($($(#[$doc:meta])* $name:ident { $($value:ident),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
            #[allow(non_camel_case_types)]
            pub enum $name { $($value,)* }

            impl ApiEnum for $name {
                const TYPE_NAME: &'static str = stringify!($name);
                const ALL: &'static [Self] = &[$(Self::$value,)*];

                fn name(self) -> &'static str {
                    match self { $(Self::$value => stringify!($value),)* }
                }
            }

            api_enum_type!($name);
        )*

        /// Every enumeration with the names of its values, for generated documents and bindings.
        pub fn all() -> Vec<(&'static str, Vec<&'static str>)> {
            vec![$((stringify!($name), vec![$(stringify!($value)),*]),)*]
        }
    };
}

macro_rules! api_enum_type {
    ($name:ty) => {
        impl ApiType for $name {
            const TY: Ty = Ty::Enum(<$name as ApiEnum>::TYPE_NAME);

            fn into_value(self) -> Value<'static> {
                Value::Str(ApiEnum::name(self).into())
            }

            fn from_value(value: Value<'static>) -> ApiResult<Self> {
                let text = String::from_value(value)?;
                <$name as ApiEnum>::from_name(&text).ok_or_else(|| {
                    ApiError::invalid_arg(format!(
                        "'{text}' is not a value of {}",
                        <$name as ApiEnum>::TYPE_NAME
                    ))
                })
            }
        }
    };
}

pub use vbox_types::MachineState;

const MACHINE_STATES: [MachineState; 24] = {
    let mut all = [MachineState::Null; 24];
    let mut i = 0;
    while i < 24 {
        all[i] = match i {
            1 => MachineState::PoweredOff,
            2 => MachineState::Saved,
            3 => MachineState::Teleported,
            4 => MachineState::Aborted,
            5 => MachineState::AbortedSaved,
            6 => MachineState::Running,
            7 => MachineState::Paused,
            8 => MachineState::Stuck,
            9 => MachineState::Teleporting,
            10 => MachineState::LiveSnapshotting,
            11 => MachineState::Starting,
            12 => MachineState::Stopping,
            13 => MachineState::Saving,
            14 => MachineState::Restoring,
            15 => MachineState::TeleportingPausedVM,
            16 => MachineState::TeleportingIn,
            17 => MachineState::DeletingSnapshotOnline,
            18 => MachineState::DeletingSnapshotPaused,
            19 => MachineState::OnlineSnapshotting,
            20 => MachineState::RestoringSnapshot,
            21 => MachineState::DeletingSnapshot,
            22 => MachineState::SettingUp,
            23 => MachineState::Snapshotting,
            _ => MachineState::Null,
        };
        i += 1;
    }
    all
};

impl ApiEnum for MachineState {
    const TYPE_NAME: &'static str = "MachineState";
    const ALL: &'static [Self] = &MACHINE_STATES;

    fn name(self) -> &'static str {
        MachineState::name(self)
    }
}

api_enum_type!(MachineState);

api_enums! {
    SessionState { Null, Unlocked, Locked, Spawning, Unlocking }
    SessionType { Null, WriteLock, Remote, Shared }
    LockType { Null, Shared, Write, VM }
    CleanupMode { UnregisterOnly, DetachAllReturnNone, DetachAllReturnHardDisksOnly, Full, DetachAllReturnHardDisksAndVMRemovable }
    CloneMode { MachineState, MachineAndChildStates, AllStates }
    AccessMode { ReadOnly, ReadWrite }
    DeviceType { Null, Floppy, DVD, HardDisk, Network, USB, SharedFolder, Graphics3D, End }
    StorageBus { Null, IDE, SATA, SCSI, Floppy, SAS, USB, PCIe, VirtioSCSI, VirtioBlk }
    StorageControllerType { Null, LsiLogic, BusLogic, IntelAhci, PIIX3, PIIX4, ICH6, I82078, LsiLogicSas, USB, NVMe, VirtioSCSI, VirtioBlk }
    MediumState { NotCreated, Created, LockedRead, LockedWrite, Inaccessible, Creating, Deleting }
    MediumType { Normal, Immutable, Writethrough, Shareable, Readonly, MultiAttach }
    MediumVariant { Standard, VmdkSplit2G, VmdkRawDisk, VmdkStreamOptimized, VmdkESX, VdiZeroExpand, Fixed, Diff, Formatted, NoCreateDir }
    NetworkAttachmentType { Null, NAT, Bridged, Internal, HostOnly, Generic, NATNetwork, Cloud, HostOnlyNetwork }
    NetworkAdapterType { Null, Am79C970A, Am79C973, I82540EM, I82543GC, I82545EM, Virtio, Am79C960, NE2000, NE1000, WD8013, WD8003, ELNK2, ELNK1 }
    NetworkAdapterPromiscModePolicy { Deny, AllowNetwork, AllowAll }
    NATProtocol { UDP, TCP }
    HostNetworkInterfaceMediumType { Unknown, Ethernet, PPP, SLIP }
    HostNetworkInterfaceStatus { Unknown, Up, Down }
    HostNetworkInterfaceType { Bridged, HostOnly }
    DHCPConfigScope { Global, Group, MachineNIC, MAC }
    DHCPOptionEncoding { Normal, Hex }
    DHCPGroupConditionType { MAC, MACWildcard, vendorClassID, vendorClassIDWildcard, userClassID, userClassIDWildcard }
    PortMode { Disconnected, HostPipe, HostDevice, RawFile, TCP }
    UartType { U16450, U16550A, U16750 }
    AudioDriverType { Default, Null, OSS, ALSA, Pulse, WinMM, DirectSound, WAS, CoreAudio, MMPM, SolAudio }
    AudioControllerType { AC97, SB16, HDA }
    AudioCodecType { Null, SB16, STAC9700, AD1980, STAC9221 }
    GraphicsControllerType { Null, VBoxVGA, VMSVGA, VBoxSVGA }
    FirmwareType { BIOS, EFI, EFI32, EFI64, EFIDUAL }
    ChipsetType { Null, PIIX3, ICH9 }
    IommuType { None, Automatic, AMD, Intel }
    TpmType { None, v1_2, v2_0, Host, Swtpm }
    BIOSBootMenuMode { Disabled, MenuOnly, MessageAndMenu }
    APICMode { Disabled, APIC, X2APIC }
    PointingHIDType { None, PS2Mouse, USBMouse, USBTablet, ComboMouse, USBMultiTouch, USBMultiTouchScreenPlusPad }
    KeyboardHIDType { None, PS2Keyboard, USBKeyboard, ComboKeyboard }
    ClipboardMode { Disabled, HostToGuest, GuestToHost, Bidirectional }
    DnDMode { Disabled, HostToGuest, GuestToHost, Bidirectional }
    ParavirtProvider { None, Default, Legacy, Minimal, HyperV, KVM }
    CPUPropertyType { Null, PAE, LongMode, TripleFaultReset, APIC, X2APIC, IBPBOnVMExit, IBPBOnVMEntry, HWVirt, SpecCtrl, SpecCtrlByHost, L1DFlushOnEMTScheduling, L1DFlushOnVMEntry, MDSClearOnEMTScheduling, MDSClearOnVMEntry }
    HWVirtExPropertyType { Null, Enabled, VPID, NestedPaging, UnrestrictedExecution, LargePages, Force, UseNativeApi, VirtVmsaveVmload }
    USBControllerType { Null, OHCI, EHCI, XHCI, Last }
    USBDeviceFilterAction { Null, Ignore, Hold }
    BandwidthGroupType { Null, Disk, Network }
    AuthType { Null, External, Guest }
    AutostopType { Disabled, SaveState, PowerOff, AcpiShutdown }
    VMProcPriority { Invalid, Default, Flat, Low, Normal, High }
    GuestDebugProvider { None, Native, GDB, KD }
    GuestDebugIoProvider { None, TCP, UDP, IPC }
    VMExecutionEngine { NotSet, Emulated, HwVirt, NativeApi, Interpreter, Recompiler }
    ProcessorFeature { HWVirtEx, PAE, LongMode, NestedPaging, UnrestrictedGuest, NestedHWVirt, VirtVmsaveVmload }
    GuestMonitorStatus { Disabled, Enabled, Blank }
    BitmapFormat { Opaque, BGR, BGR0, BGRA, RGBA, PNG, JPEG }
    Scope { Global, Machine, Session }
    ProcessPriority { Invalid, Default }
    VirtualSystemDescriptionType { Ignore, OS, Name, Product, Vendor, Version, ProductUrl, VendorUrl, Description, License, Miscellaneous, CPU, Memory, HardDiskControllerIDE, HardDiskControllerSATA, HardDiskControllerSCSI, HardDiskControllerSAS, HardDiskImage, Floppy, CDROM, NetworkAdapter, USBController, SoundCard, SettingsFile, BaseFolder, PrimaryGroup, HardDiskControllerVirtioSCSI, HardDiskControllerNVMe }
    ImportOptions { KeepAllMACs, KeepNATMACs, ImportToVDI }
    ExportOptions { CreateManifest, ExportDVDImages, StripAllMACs, StripAllNonNATMACs }
    CloneOptions { Link, KeepAllMACs, KeepNATMACs, KeepDiskNames, KeepHwUUIDs }
    RecordingVideoCodec { None, MJPEG, H262, H264, H265, H266, VP8, VP9, AV1, Other }
    RecordingAudioCodec { None, WavPCM, MP3, Opus, Vorbis, Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_state_is_found_by_its_name() {
        for (number, state) in MachineState::ALL.iter().enumerate() {
            assert_eq!(*state as usize, number);
            assert_eq!(<MachineState as ApiEnum>::from_name(state.name()), Some(*state));
        }
    }
}
