//! The enumerations of the settings files, each with the words that stand for its values in XML.

use std::fmt;

/// An enumeration whose values are words in a settings file.
pub trait Word: Copy + Eq + fmt::Debug + Default + 'static {
    /// Every value, in declaration order.
    const ALL: &'static [Self];

    /// The word as VirtualBox 7.0 writes it.
    fn as_str(self) -> &'static str;

    /// The value that `word` stands for: the exact word, an older spelling of it, or either in another case.
    fn from_word(word: &str) -> Option<Self>;
}

/// A word that stands for no value of the enumeration that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown {kind} '{word}'")]
pub struct UnknownWord {
    /// What kind of thing the word should have named.
    pub kind: &'static str,
    /// The word as found.
    pub word: String,
}

macro_rules! words {
    ($(
        $(#[$meta:meta])*
        $name:ident { $($(#[$vmeta:meta])* $variant:ident = $word:literal $(| $alias:literal)*),* $(,)? }
    )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$vmeta])* $variant,)* }

        impl $name {
            /// The word as VirtualBox 7.0 writes it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl Word for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)*];

            fn as_str(self) -> &'static str {
                self.as_str()
            }

            fn from_word(word: &str) -> Option<Self> {
                $(if word.eq_ignore_ascii_case($word) $(|| word.eq_ignore_ascii_case($alias))* {
                    return Some(Self::$variant);
                })*
                None
            }
        }

        impl std::str::FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                Self::from_word(word).ok_or_else(|| UnknownWord { kind: stringify!($name), word: word.to_owned() })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    )*};
}

words! {
    /// A medium's behaviour under snapshots (Main API `MediumType`).
    MediumType {
        #[default] Normal = "Normal",
        Immutable = "Immutable",
        Writethrough = "Writethrough",
        Shareable = "Shareable",
        Readonly = "Readonly",
        MultiAttach = "MultiAttach",
    }
    /// The priority of the VM's process.
    ProcessPriority {
        #[default] Default = "Default",
        Flat = "Flat",
        Low = "Low",
        Normal = "Normal",
        High = "High",
    }
    /// The firmware a machine starts from.
    Firmware {
        #[default] Bios = "BIOS" | "1",
        Efi = "EFI" | "2",
        Efi32 = "EFI32",
        Efi64 = "EFI64",
        EfiDual = "EFIDUAL",
    }
    /// The pointing device.
    PointingHid {
        None = "None",
        #[default] Ps2Mouse = "PS2Mouse",
        UsbMouse = "USBMouse",
        UsbTablet = "USBTablet",
        ComboMouse = "ComboMouse",
        UsbMultiTouch = "USBMultiTouch",
        UsbMultiTouchScreenPlusPad = "USBMTScreenPlusPad",
    }
    /// The keyboard.
    KeyboardHid {
        None = "None",
        #[default] Ps2Keyboard = "PS2Keyboard",
        UsbKeyboard = "USBKeyboard",
        ComboKeyboard = "ComboKeyboard",
    }
    /// The chipset.
    Chipset {
        #[default] Piix3 = "PIIX3",
        Ich9 = "ICH9",
    }
    /// The IOMMU.
    Iommu {
        #[default] None = "None",
        Automatic = "Automatic",
        Amd = "AMD",
        Intel = "Intel",
    }
    /// The paravirtualization interface shown to the guest.
    ParavirtProvider {
        None = "None",
        #[default] Default = "Default",
        Legacy = "Legacy",
        Minimal = "Minimal",
        HyperV = "HyperV",
        Kvm = "KVM",
    }
    /// A place in the boot order.
    BootDevice {
        #[default] None = "None",
        Floppy = "Floppy",
        Dvd = "DVD",
        HardDisk = "HardDisk",
        Network = "Network",
    }
    /// The graphics controller.
    GraphicsController {
        Null = "None",
        #[default] VBoxVga = "VBoxVGA",
        Vmsvga = "VMSVGA",
        VBoxSvga = "VBoxSVGA",
    }
    /// How clients of the remote display authenticate.
    AuthType {
        #[default] Null = "Null",
        External = "External",
        Guest = "Guest",
    }
    /// When the BIOS shows its boot menu.
    BootMenuMode {
        Disabled = "Disabled",
        MenuOnly = "MenuOnly",
        #[default] MessageAndMenu = "MessageAndMenu",
    }
    /// The APIC mode that the firmware sets up.
    ApicMode {
        Disabled = "Disabled",
        #[default] Apic = "APIC",
        X2Apic = "X2APIC",
    }
    /// The trusted platform module.
    TpmType {
        #[default] None = "None",
        V1_2 = "v1_2",
        V2_0 = "v2_0",
        Host = "Host",
        Swtpm = "Swtpm",
    }
    /// A USB controller's kind.
    UsbControllerType {
        #[default] Ohci = "OHCI",
        Ehci = "EHCI",
        Xhci = "XHCI",
    }
    /// What a global USB filter does with a device of the host.
    UsbFilterAction {
        #[default] Ignore = "Ignore",
        Hold = "Hold",
    }
    /// The network card shown to the guest.
    NetworkAdapterType {
        Am79C970A = "Am79C970A",
        #[default] Am79C973 = "Am79C973",
        Am79C960 = "Am79C960",
        I82540EM = "82540EM",
        I82543GC = "82543GC",
        I82545EM = "82545EM",
        Virtio = "virtio",
        Ne1000 = "NE1000",
        Ne2000 = "NE2000",
        Wd8003 = "WD8003",
        Wd8013 = "WD8013",
        Elnk2 = "3C503",
        Elnk1 = "3C501",
    }
    /// What a network card is plugged into. The word is the XML element's name.
    NetworkAttachment {
        #[default] Null = "Null",
        Nat = "NAT",
        Bridged = "BridgedInterface" | "HostInterface",
        Internal = "InternalNetwork",
        HostOnly = "HostOnlyInterface",
        Generic = "GenericInterface",
        NatNetwork = "NATNetwork",
        Cloud = "CloudNetwork",
        HostOnlyNetwork = "HostOnlyNetwork",
    }
    /// Which frames a network card may see in promiscuous mode.
    PromiscPolicy {
        #[default] Deny = "Deny",
        AllowNetwork = "AllowNetwork",
        AllowAll = "AllowAll",
    }
    /// What a serial port is connected to.
    PortMode {
        #[default] Disconnected = "Disconnected",
        HostPipe = "HostPipe",
        HostDevice = "HostDevice",
        RawFile = "RawFile",
        Tcp = "TCP",
    }
    /// The UART chip of a serial port.
    UartType {
        U16450 = "16450",
        #[default] U16550A = "16550A",
        U16750 = "16750",
    }
    /// The sound card shown to the guest.
    AudioController {
        #[default] Ac97 = "AC97",
        Sb16 = "SB16",
        Hda = "HDA",
    }
    /// The codec behind the sound card.
    AudioCodec {
        Null = "Null",
        Sb16 = "SB16",
        #[default] Stac9700 = "STAC9700",
        Ad1980 = "AD1980",
        Stac9221 = "STAC9221",
    }
    /// The host's sound system.
    AudioDriver {
        Null = "Null",
        #[default] Default = "Default",
        WinMm = "WinMM",
        DirectSound = "DirectSound" | "DSound",
        Was = "WAS",
        Alsa = "ALSA",
        Oss = "OSS",
        Pulse = "Pulse",
        CoreAudio = "CoreAudio",
        SolAudio = "SolAudio",
        Mmpm = "MMPM",
    }
    /// Directions in which a clipboard or drag and drop works.
    TransferMode {
        #[default] Disabled = "Disabled",
        HostToGuest = "HostToGuest",
        GuestToHost = "GuestToHost",
        Bidirectional = "Bidirectional",
    }
    /// What a bandwidth group limits.
    BandwidthGroupType {
        #[default] Disk = "Disk",
        Network = "Network",
    }
    /// A storage controller's chip.
    StorageControllerType {
        LsiLogic = "LsiLogic",
        BusLogic = "BusLogic",
        IntelAhci = "AHCI",
        #[default] Piix3 = "PIIX3",
        Piix4 = "PIIX4",
        Ich6 = "ICH6",
        I82078 = "I82078",
        LsiLogicSas = "LsiLogicSas",
        Usb = "USB",
        Nvme = "NVMe",
        VirtioScsi = "VirtioSCSI",
        VirtioBlk = "VirtioBlk",
    }
    /// A storage controller's bus, by the Main API's names (`StorageBus`).
    StorageBus {
        #[default] Ide = "IDE",
        Sata = "SATA",
        Scsi = "SCSI",
        Floppy = "Floppy",
        Sas = "SAS",
        Usb = "USB",
        Pcie = "PCIe",
        VirtioScsi = "VirtioSCSI",
        VirtioBlk = "VirtioBlk",
    }
    /// What kind of drive is attached to a storage controller.
    DriveType {
        #[default] HardDisk = "HardDisk",
        Dvd = "DVD",
        Floppy = "Floppy",
    }
    /// The guest debugger's protocol.
    GuestDebugProvider {
        #[default] None = "None",
        Gdb = "GDB",
        Kd = "KD",
    }
    /// The guest debugger's transport.
    GuestDebugIo {
        #[default] None = "None",
        Tcp = "TCP",
        Udp = "UDP",
        Ipc = "IPC",
    }
    /// How an autostarted machine is stopped at host shutdown.
    AutostopType {
        #[default] Disabled = "Disabled",
        SaveState = "SaveState",
        PowerOff = "PowerOff",
        AcpiShutdown = "AcpiShutdown",
    }
    /// The video codec of recordings.
    RecordingVideoCodec {
        None = "none",
        #[default] Vp8 = "VP8",
        Vp9 = "VP9",
        Av1 = "AV1",
        Mjpeg = "MJPEG",
        H262 = "H262",
        H264 = "H264",
        H265 = "H265",
        H266 = "H266",
        Other = "other",
    }
    /// The audio codec of recordings.
    RecordingAudioCodec {
        None = "none",
        WavPcm = "wav",
        Mp3 = "mp3",
        #[default] OggVorbis = "vorbis" | "ogg",
        Opus = "opus",
    }
    /// The protocol of a port forwarding rule; files hold its number.
    NatProtocol {
        Udp = "udp",
        #[default] Tcp = "tcp",
    }
    /// Whose proxy settings VirtualBox itself uses; files hold its number.
    ProxyMode {
        #[default] System = "System",
        NoProxy = "NoProxy",
        Manual = "Manual",
    }
}

impl StorageControllerType {
    /// The bus that the chip drives.
    pub const fn bus(self) -> StorageBus {
        match self {
            Self::LsiLogic | Self::BusLogic => StorageBus::Scsi,
            Self::IntelAhci => StorageBus::Sata,
            Self::Piix3 | Self::Piix4 | Self::Ich6 => StorageBus::Ide,
            Self::I82078 => StorageBus::Floppy,
            Self::LsiLogicSas => StorageBus::Sas,
            Self::Usb => StorageBus::Usb,
            Self::Nvme => StorageBus::Pcie,
            Self::VirtioScsi => StorageBus::VirtioScsi,
            Self::VirtioBlk => StorageBus::VirtioBlk,
        }
    }
}

impl StorageBus {
    /// The chip that a new controller on this bus gets, as `IMachine::addStorageController` chooses it.
    pub const fn default_controller(self) -> StorageControllerType {
        match self {
            Self::Ide => StorageControllerType::Piix4,
            Self::Sata => StorageControllerType::IntelAhci,
            Self::Scsi => StorageControllerType::LsiLogic,
            Self::Floppy => StorageControllerType::I82078,
            Self::Sas => StorageControllerType::LsiLogicSas,
            Self::Usb => StorageControllerType::Usb,
            Self::Pcie => StorageControllerType::Nvme,
            Self::VirtioScsi => StorageControllerType::VirtioScsi,
            Self::VirtioBlk => StorageControllerType::VirtioBlk,
        }
    }

    /// The ports that a new controller on this bus has, and the most it may have.
    pub const fn ports(self) -> (u32, u32) {
        match self {
            Self::Ide => (2, 2),
            Self::Sata => (30, 30),
            Self::Scsi => (16, 16),
            Self::Floppy => (1, 1),
            Self::Sas => (8, 255),
            Self::Usb => (8, 8),
            Self::Pcie => (1, 255),
            Self::VirtioScsi => (1, 256),
            Self::VirtioBlk => (1, 8),
        }
    }
}

impl AudioController {
    /// The codec that belongs to the card when a file names none.
    pub const fn default_codec(self) -> AudioCodec {
        match self {
            Self::Ac97 => AudioCodec::Stac9700,
            Self::Sb16 => AudioCodec::Sb16,
            Self::Hda => AudioCodec::Stac9221,
        }
    }
}

impl Chipset {
    /// How many network cards a machine with this chipset has.
    pub const fn max_network_adapters(self) -> usize {
        match self {
            Self::Piix3 => 8,
            Self::Ich9 => 36,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_back_as_the_value_that_wrote_them() {
        fn check<T: Word>() {
            for &value in T::ALL {
                assert_eq!(T::from_word(value.as_str()), Some(value));
                assert_eq!(T::from_word(&value.as_str().to_ascii_lowercase()), Some(value));
            }
        }
        check::<NetworkAdapterType>();
        check::<AudioDriver>();
        check::<StorageControllerType>();
        check::<RecordingAudioCodec>();
        check::<NetworkAttachment>();
    }

    #[test]
    fn an_unknown_word_is_named_in_the_error() {
        assert_eq!("Bochs".parse::<Chipset>().unwrap_err().to_string(), "unknown Chipset 'Bochs'");
    }
}
