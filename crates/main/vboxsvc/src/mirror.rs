//! The Main API's enumerations beside those of the settings files.

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use settings as set;

/// A type of the settings model that stands for a type of the API.
pub(crate) trait Mirror<A>: Sized {
    fn to_api(&self) -> A;
    fn from_api(value: A) -> ApiResult<Self>;
}

macro_rules! same {
    ($($ty:ty)*) => {$(
        impl Mirror<$ty> for $ty {
            fn to_api(&self) -> $ty {
                self.clone()
            }

            fn from_api(value: $ty) -> ApiResult<Self> {
                Ok(value)
            }
        }
    )*};
}

same!(bool u16 u32 i32 i64 String Vec<String>);

macro_rules! mirrors {
    ($($set:ident, $api:ident { $($a:ident = $b:ident),* $(,)? })*) => {$(
        impl Mirror<api::$api> for set::$set {
            fn to_api(&self) -> api::$api {
                match self { $(set::$set::$a => api::$api::$b,)* }
            }

            #[allow(unreachable_patterns)]
            fn from_api(value: api::$api) -> ApiResult<Self> {
                match value {
                    $(api::$api::$b => Ok(set::$set::$a),)*
                    other => Err(ApiError::invalid_arg(format!("{other:?} is not possible here"))),
                }
            }
        }
    )*};
}

mirrors! {
    MediumType, MediumType {
        Normal = Normal, Immutable = Immutable, Writethrough = Writethrough, Shareable = Shareable, Readonly = Readonly,
        MultiAttach = MultiAttach,
    }
    ProcessPriority, VMProcPriority { Default = Default, Flat = Flat, Low = Low, Normal = Normal, High = High }
    Firmware, FirmwareType { Bios = BIOS, Efi = EFI, Efi32 = EFI32, Efi64 = EFI64, EfiDual = EFIDUAL }
    PointingHid, PointingHIDType {
        None = None, Ps2Mouse = PS2Mouse, UsbMouse = USBMouse, UsbTablet = USBTablet, ComboMouse = ComboMouse,
        UsbMultiTouch = USBMultiTouch, UsbMultiTouchScreenPlusPad = USBMultiTouchScreenPlusPad,
    }
    KeyboardHid, KeyboardHIDType {
        None = None, Ps2Keyboard = PS2Keyboard, UsbKeyboard = USBKeyboard, ComboKeyboard = ComboKeyboard,
    }
    Chipset, ChipsetType { Piix3 = PIIX3, Ich9 = ICH9 }
    Iommu, IommuType { None = None, Automatic = Automatic, Amd = AMD, Intel = Intel }
    ParavirtProvider, ParavirtProvider {
        None = None, Default = Default, Legacy = Legacy, Minimal = Minimal, HyperV = HyperV, Kvm = KVM,
    }
    BootDevice, DeviceType { None = Null, Floppy = Floppy, Dvd = DVD, HardDisk = HardDisk, Network = Network }
    GraphicsController, GraphicsControllerType { Null = Null, VBoxVga = VBoxVGA, Vmsvga = VMSVGA, VBoxSvga = VBoxSVGA }
    AuthType, AuthType { Null = Null, External = External, Guest = Guest }
    BootMenuMode, BIOSBootMenuMode { Disabled = Disabled, MenuOnly = MenuOnly, MessageAndMenu = MessageAndMenu }
    ApicMode, APICMode { Disabled = Disabled, Apic = APIC, X2Apic = X2APIC }
    GuestDebugProvider, GuestDebugProvider { None = None, Gdb = GDB, Kd = KD }
    GuestDebugIo, GuestDebugIoProvider { None = None, Tcp = TCP, Udp = UDP, Ipc = IPC }
    TpmType, TpmType { None = None, V1_2 = v1_2, V2_0 = v2_0, Host = Host, Swtpm = Swtpm }
    UsbControllerType, USBControllerType { Ohci = OHCI, Ehci = EHCI, Xhci = XHCI }
    NetworkAdapterType, NetworkAdapterType {
        Am79C970A = Am79C970A, Am79C973 = Am79C973, Am79C960 = Am79C960, I82540EM = I82540EM, I82543GC = I82543GC,
        I82545EM = I82545EM, Virtio = Virtio, Ne1000 = NE1000, Ne2000 = NE2000, Wd8003 = WD8003, Wd8013 = WD8013,
        Elnk2 = ELNK2, Elnk1 = ELNK1,
    }
    NetworkAttachment, NetworkAttachmentType {
        Null = Null, Nat = NAT, Bridged = Bridged, Internal = Internal, HostOnly = HostOnly, Generic = Generic,
        NatNetwork = NATNetwork, Cloud = Cloud, HostOnlyNetwork = HostOnlyNetwork,
    }
    PromiscPolicy, NetworkAdapterPromiscModePolicy { Deny = Deny, AllowNetwork = AllowNetwork, AllowAll = AllowAll }
    PortMode, PortMode {
        Disconnected = Disconnected, HostPipe = HostPipe, HostDevice = HostDevice, RawFile = RawFile, Tcp = TCP,
    }
    UartType, UartType { U16450 = U16450, U16550A = U16550A, U16750 = U16750 }
    AudioController, AudioControllerType { Ac97 = AC97, Sb16 = SB16, Hda = HDA }
    AudioCodec, AudioCodecType {
        Null = Null, Sb16 = SB16, Stac9700 = STAC9700, Ad1980 = AD1980, Stac9221 = STAC9221,
    }
    AudioDriver, AudioDriverType {
        Null = Null, Default = Default, WinMm = WinMM, DirectSound = DirectSound, Was = WAS, Alsa = ALSA, Oss = OSS,
        Pulse = Pulse, CoreAudio = CoreAudio, SolAudio = SolAudio, Mmpm = MMPM,
    }
    TransferMode, ClipboardMode {
        Disabled = Disabled, HostToGuest = HostToGuest, GuestToHost = GuestToHost, Bidirectional = Bidirectional,
    }
    TransferMode, DnDMode {
        Disabled = Disabled, HostToGuest = HostToGuest, GuestToHost = GuestToHost, Bidirectional = Bidirectional,
    }
    BandwidthGroupType, BandwidthGroupType { Disk = Disk, Network = Network }
    StorageControllerType, StorageControllerType {
        LsiLogic = LsiLogic, BusLogic = BusLogic, IntelAhci = IntelAhci, Piix3 = PIIX3, Piix4 = PIIX4, Ich6 = ICH6,
        I82078 = I82078, LsiLogicSas = LsiLogicSas, Usb = USB, Nvme = NVMe, VirtioScsi = VirtioSCSI,
        VirtioBlk = VirtioBlk,
    }
    StorageBus, StorageBus {
        Ide = IDE, Sata = SATA, Scsi = SCSI, Floppy = Floppy, Sas = SAS, Usb = USB, Pcie = PCIe, VirtioScsi = VirtioSCSI,
        VirtioBlk = VirtioBlk,
    }
    DriveType, DeviceType { HardDisk = HardDisk, Dvd = DVD, Floppy = Floppy }
    AutostopType, AutostopType {
        Disabled = Disabled, SaveState = SaveState, PowerOff = PowerOff, AcpiShutdown = AcpiShutdown,
    }
    NatProtocol, NATProtocol { Udp = UDP, Tcp = TCP }
}

impl Mirror<String> for set::ProxyMode {
    fn to_api(&self) -> String {
        self.as_str().to_owned()
    }

    fn from_api(value: String) -> ApiResult<Self> {
        value.parse().map_err(|e: set::UnknownWord| ApiError::invalid_arg(e.to_string()))
    }
}

impl Mirror<i64> for u64 {
    fn to_api(&self) -> i64 {
        i64::try_from(*self).unwrap_or(i64::MAX)
    }

    fn from_api(value: i64) -> ApiResult<Self> {
        u64::try_from(value)
            .map_err(|_| ApiError::invalid_arg(format!("The value {value} must not be negative")))
    }
}
