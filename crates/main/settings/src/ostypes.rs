//! Guest OS types: what VirtualBox 7.0 knows of each and recommends for it.
//!
//! `createvm --ostype` takes an id or a description; settings files hold the id. A recommendation takes
//! effect in two steps: a few (IOAPIC, long mode, x2APIC, firmware, TPM, network card) when the machine is
//! created, all others only when a client asks for them (`createvm --default`).

use crate::words::{
    AudioCodec as C, AudioController as A, Chipset, Firmware, GraphicsController as G,
    NetworkAdapterType as N, ParavirtProvider, StorageControllerType as S, TpmType,
};

/// A family of guest OS types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OsFamily {
    Other,
    Windows,
    Linux,
    Solaris,
    Bsd,
    Os2,
    MacOs,
}

impl OsFamily {
    /// The family's id.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Other => "Other",
            Self::Windows => "Windows",
            Self::Linux => "Linux",
            Self::Solaris => "Solaris",
            Self::Bsd => "BSD",
            Self::Os2 => "OS2",
            Self::MacOs => "MacOS",
        }
    }

    /// The family's name for people.
    pub const fn description(self) -> &'static str {
        match self {
            Self::Other => "Other",
            Self::Windows => "Microsoft Windows",
            Self::Linux => "Linux",
            Self::Solaris => "Solaris",
            Self::Bsd => "BSD",
            Self::Os2 => "IBM OS/2",
            Self::MacOs => "Mac OS X",
        }
    }
}

/// The devices that a guest OS type's drivers are known to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Profile {
    graphics: G,
    network: N,
    serial_ports: u32,
    dvd: S,
    hard_disk: S,
    chipset: Chipset,
    audio: A,
    codec: C,
}

/// A guest OS type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OsType {
    /// What settings files hold, such as `Debian_64`.
    pub id: &'static str,
    pub family: OsFamily,
    /// What people read, such as `Debian (64-bit)`.
    pub description: &'static str,
    hints: u32,
    ram_mb: u32,
    vram_mb: u32,
    disk_mb: u64,
    profile: Profile,
}

const NONE: u32 = 0;
const X64: u32 = 1 << 0;
const HWVIRT: u32 = 1 << 1;
const IOAPIC: u32 = 1 << 2;
const EFI: u32 = 1 << 3;
const PAE: u32 = 1 << 4;
const USB_HID: u32 = 1 << 5;
const HPET: u32 = 1 << 6;
const TABLET: u32 = 1 << 7;
const UTC: u32 = 1 << 8;
const FLOPPY: u32 = 1 << 9;
const NO_USB: u32 = 1 << 10;
const TF_RESET: u32 = 1 << 11;
const USB3: u32 = 1 << 12;
const X2APIC: u32 = 1 << 13;
const SECURE_BOOT: u32 = 1 << 14;
const TPM2: u32 = 1 << 15;
const WDDM: u32 = 1 << 16;
const TWO_CPUS: u32 = 1 << 17;

// Sets that many types share.
const BITS64: u32 = X64 | HWVIRT | IOAPIC;
const LINUX_32: u32 = UTC | PAE | X2APIC;
const LINUX_64: u32 = LINUX_32 | BITS64;
const LINUX_TABLET_32: u32 = UTC | TABLET | X2APIC | PAE;
const LINUX_TABLET_64: u32 = UTC | TABLET | X2APIC | BITS64;
const MAC: u32 = HWVIRT | IOAPIC | EFI | PAE | USB_HID | HPET | TABLET | UTC;

const fn profile(
    graphics: G,
    network: N,
    serial_ports: u32,
    dvd: S,
    hard_disk: S,
    chipset: Chipset,
    audio: A,
    codec: C,
) -> Profile {
    Profile { graphics, network, serial_ports, dvd, hard_disk, chipset, audio, codec }
}

const fn os(
    id: &'static str,
    family: OsFamily,
    description: &'static str,
    hints: u32,
    ram_mb: u32,
    vram_mb: u32,
    disk_mb: u64,
    profile: Profile,
) -> OsType {
    OsType { id, family, description, hints, ram_mb, vram_mb, disk_mb, profile }
}

impl OsType {
    /// Every type, in the order in which `VBoxManage list ostypes` prints them.
    pub fn all() -> &'static [OsType] {
        OS_TYPES
    }

    /// The type with this id, in any case.
    pub fn by_id(id: &str) -> Option<&'static OsType> {
        OS_TYPES.iter().find(|os| os.id.eq_ignore_ascii_case(id))
    }

    /// The type that `--ostype` names: by id, else by description.
    pub fn find(name: &str) -> Option<&'static OsType> {
        Self::by_id(name).or_else(|| OS_TYPES.iter().find(|os| os.description.eq_ignore_ascii_case(name)))
    }

    const fn hint(&self, bit: u32) -> bool {
        self.hints & bit != 0
    }

    /// The paravirtualization provider that suits the guest: VirtualBox's choice for `--paravirt-provider default`.
    pub fn paravirt_provider(&self) -> ParavirtProvider {
        // Too old to know a hypervisor, or of no known age.
        const WITHOUT: [&str; 16] = [
            "Windows31",
            "Windows95",
            "Windows98",
            "WindowsMe",
            "WindowsNT3x",
            "WindowsNT4",
            "Windows2000",
            "WindowsXP",
            "WindowsXP_64",
            "Windows2003",
            "Windows2003_64",
            "WindowsNT",
            "WindowsNT_64",
            "Linux22",
            "Linux24",
            "Linux24_64",
        ];
        match self.family {
            _ if WITHOUT.contains(&self.id) => ParavirtProvider::None,
            OsFamily::Windows => ParavirtProvider::HyperV,
            OsFamily::Linux => ParavirtProvider::Kvm,
            OsFamily::MacOs => ParavirtProvider::Minimal,
            _ => ParavirtProvider::None,
        }
    }

    pub const fn is_64bit(&self) -> bool {
        self.hint(X64)
    }

    pub const fn recommended_ioapic(&self) -> bool {
        self.hint(IOAPIC)
    }

    pub const fn recommended_hw_virt(&self) -> bool {
        self.hint(HWVIRT)
    }

    pub const fn recommended_pae(&self) -> bool {
        self.hint(PAE)
    }

    pub const fn recommended_x2apic(&self) -> bool {
        self.hint(X2APIC)
    }

    pub const fn recommended_hpet(&self) -> bool {
        self.hint(HPET)
    }

    pub const fn recommended_rtc_use_utc(&self) -> bool {
        self.hint(UTC)
    }

    pub const fn recommended_floppy(&self) -> bool {
        self.hint(FLOPPY)
    }

    pub const fn recommended_usb(&self) -> bool {
        !self.hint(NO_USB)
    }

    pub const fn recommended_usb3(&self) -> bool {
        self.hint(USB3)
    }

    /// USB keyboard and mouse instead of PS/2.
    pub const fn recommended_usb_hid(&self) -> bool {
        self.hint(USB_HID)
    }

    pub const fn recommended_usb_tablet(&self) -> bool {
        self.hint(TABLET)
    }

    /// Reset instead of stopping at a triple fault.
    pub const fn recommended_tf_reset(&self) -> bool {
        self.hint(TF_RESET)
    }

    pub const fn recommended_secure_boot(&self) -> bool {
        self.hint(SECURE_BOOT)
    }

    /// The guest has a WDDM display driver.
    pub const fn recommended_wddm_graphics(&self) -> bool {
        self.hint(WDDM)
    }

    pub const fn recommended_firmware(&self) -> Firmware {
        if self.hint(EFI) { Firmware::Efi } else { Firmware::Bios }
    }

    pub const fn recommended_tpm(&self) -> TpmType {
        if self.hint(TPM2) { TpmType::V2_0 } else { TpmType::None }
    }

    pub const fn recommended_cpus(&self) -> u32 {
        if self.hint(TWO_CPUS) { 2 } else { 1 }
    }

    /// Megabytes.
    pub const fn recommended_ram_mb(&self) -> u32 {
        self.ram_mb
    }

    /// Megabytes.
    pub const fn recommended_vram_mb(&self) -> u32 {
        self.vram_mb
    }

    /// Bytes.
    pub const fn recommended_disk_size(&self) -> u64 {
        self.disk_mb << 20
    }

    pub const fn recommended_graphics(&self) -> G {
        self.profile.graphics
    }

    pub const fn network_adapter(&self) -> N {
        self.profile.network
    }

    /// How many serial ports, from the first on, are enabled at creation.
    pub const fn serial_ports(&self) -> u32 {
        self.profile.serial_ports
    }

    pub const fn dvd_controller(&self) -> S {
        self.profile.dvd
    }

    pub const fn hard_disk_controller(&self) -> S {
        self.profile.hard_disk
    }

    pub const fn recommended_chipset(&self) -> Chipset {
        self.profile.chipset
    }

    pub const fn audio_controller(&self) -> A {
        self.profile.audio
    }

    pub const fn audio_codec(&self) -> C {
        self.profile.codec
    }
}

const PLAIN: Profile =
    profile(G::VBoxVga, N::Am79C973, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);
const PLAIN_SB16: Profile =
    profile(G::VBoxVga, N::Am79C973, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Sb16, C::Sb16);
const NT3: Profile =
    profile(G::VBoxVga, N::Am79C973, 0, S::BusLogic, S::BusLogic, Chipset::Piix3, A::Sb16, C::Sb16);
const XP: Profile =
    profile(G::VBoxVga, N::I82543GC, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);
const XP_PRO1000: Profile =
    profile(G::VBoxVga, N::I82540EM, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);
const SERVER2003: Profile =
    profile(G::VBoxVga, N::I82540EM, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Hda, C::Stac9221);
const MODERN_WINDOWS: Profile =
    profile(G::VBoxSvga, N::I82540EM, 0, S::IntelAhci, S::IntelAhci, Chipset::Piix3, A::Hda, C::Stac9221);
const LINUX_OLD: Profile =
    profile(G::Vmsvga, N::Am79C973, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Ad1980);
const LINUX24_64: Profile =
    profile(G::Vmsvga, N::I82540EM, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Ad1980);
const LINUX: Profile =
    profile(G::Vmsvga, N::I82540EM, 0, S::Piix4, S::IntelAhci, Chipset::Piix3, A::Ac97, C::Ad1980);
const SOLARIS_SATA: Profile =
    profile(G::VBoxVga, N::I82540EM, 0, S::IntelAhci, S::IntelAhci, Chipset::Piix3, A::Ac97, C::Stac9700);
const SOLARIS11: Profile =
    profile(G::Vmsvga, N::I82540EM, 0, S::IntelAhci, S::IntelAhci, Chipset::Piix3, A::Ac97, C::Stac9700);
const BSD: Profile =
    profile(G::Vmsvga, N::I82540EM, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);
const OS2_SB16: Profile =
    profile(G::VBoxVga, N::Am79C973, 1, S::Piix4, S::Piix4, Chipset::Piix3, A::Sb16, C::Sb16);
const OS2_AC97: Profile =
    profile(G::VBoxVga, N::Am79C973, 1, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);
const OS2_PRO1000: Profile =
    profile(G::VBoxVga, N::I82540EM, 1, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);
const MACOS: Profile =
    profile(G::VBoxVga, N::I82545EM, 0, S::IntelAhci, S::IntelAhci, Chipset::Ich9, A::Hda, C::Stac9221);
const JROCKIT: Profile =
    profile(G::VBoxVga, N::I82545EM, 0, S::Piix4, S::BusLogic, Chipset::Piix3, A::Ac97, C::Stac9700);
const BOOTSECTOR: Profile =
    profile(G::VBoxVga, N::I82545EM, 0, S::Piix4, S::Piix4, Chipset::Piix3, A::Ac97, C::Stac9700);

/// The table, in the order in which `VBoxManage list ostypes` prints it.
#[rustfmt::skip]
static OS_TYPES: &[OsType] = &[
    os("Other", OsFamily::Other, "Other/Unknown", NONE, 64, 4, 2048, PLAIN),
    os("Other_64", OsFamily::Other, "Other/Unknown (64-bit)", BITS64 | PAE, 64, 4, 2048, PLAIN),
    os("Windows31", OsFamily::Windows, "Windows 3.1", FLOPPY, 32, 4, 1024, PLAIN_SB16),
    os("Windows95", OsFamily::Windows, "Windows 95", FLOPPY, 64, 4, 2048, PLAIN_SB16),
    os("Windows98", OsFamily::Windows, "Windows 98", FLOPPY, 64, 4, 2048, PLAIN_SB16),
    os("WindowsMe", OsFamily::Windows, "Windows ME", TABLET | FLOPPY, 128, 4, 4096, PLAIN),
    os("WindowsNT3x", OsFamily::Windows, "Windows NT 3.x", FLOPPY | NO_USB, 64, 8, 1024, NT3),
    os("WindowsNT4", OsFamily::Windows, "Windows NT 4", NO_USB, 128, 16, 2048, PLAIN_SB16),
    os("Windows2000", OsFamily::Windows, "Windows 2000", TABLET, 168, 16, 4096, PLAIN),
    os("WindowsXP", OsFamily::Windows, "Windows XP (32-bit)", TABLET, 192, 16, 10240, XP),
    os("WindowsXP_64", OsFamily::Windows, "Windows XP (64-bit)", BITS64 | TABLET, 512, 16, 10240, XP_PRO1000),
    os("Windows2003", OsFamily::Windows, "Windows 2003 (32-bit)", TABLET, 512, 16, 20480, XP),
    os("Windows2003_64", OsFamily::Windows, "Windows 2003 (64-bit)", BITS64 | TABLET, 512, 16, 20480, SERVER2003),
    os("WindowsVista", OsFamily::Windows, "Windows Vista (32-bit)", TABLET | WDDM, 512, 16, 25600, MODERN_WINDOWS),
    os("WindowsVista_64", OsFamily::Windows, "Windows Vista (64-bit)", BITS64 | TABLET | WDDM, 512, 16, 25600, MODERN_WINDOWS),
    os("Windows2008", OsFamily::Windows, "Windows 2008 (32-bit)", TABLET | WDDM, 1024, 16, 32768, MODERN_WINDOWS),
    os("Windows2008_64", OsFamily::Windows, "Windows 2008 (64-bit)", BITS64 | TABLET | WDDM, 2048, 16, 32768, MODERN_WINDOWS),
    os("Windows7", OsFamily::Windows, "Windows 7 (32-bit)", TABLET | WDDM, 1024, 16, 32768, MODERN_WINDOWS),
    os("Windows7_64", OsFamily::Windows, "Windows 7 (64-bit)", BITS64 | TABLET | WDDM, 2048, 16, 32768, MODERN_WINDOWS),
    os("Windows8", OsFamily::Windows, "Windows 8 (32-bit)", HWVIRT | IOAPIC | PAE | TABLET | USB3 | WDDM, 1024, 128, 40960, MODERN_WINDOWS),
    os("Windows8_64", OsFamily::Windows, "Windows 8 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 40960, MODERN_WINDOWS),
    os("Windows81", OsFamily::Windows, "Windows 8.1 (32-bit)", HWVIRT | IOAPIC | PAE | TABLET | USB3 | WDDM, 1024, 128, 40960, MODERN_WINDOWS),
    os("Windows81_64", OsFamily::Windows, "Windows 8.1 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 40960, MODERN_WINDOWS),
    os("Windows2012_64", OsFamily::Windows, "Windows 2012 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 51200, MODERN_WINDOWS),
    os("Windows10", OsFamily::Windows, "Windows 10 (32-bit)", HWVIRT | IOAPIC | PAE | TABLET | USB3 | WDDM, 1024, 128, 51200, MODERN_WINDOWS),
    os("Windows10_64", OsFamily::Windows, "Windows 10 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 51200, MODERN_WINDOWS),
    os("Windows2016_64", OsFamily::Windows, "Windows 2016 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 51200, MODERN_WINDOWS),
    os("Windows2019_64", OsFamily::Windows, "Windows 2019 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 51200, MODERN_WINDOWS),
    os("Windows11_64", OsFamily::Windows, "Windows 11 (64-bit)", BITS64 | EFI | TABLET | USB3 | SECURE_BOOT | TPM2 | WDDM | TWO_CPUS, 4096, 128, 81920, MODERN_WINDOWS),
    os("Windows2022_64", OsFamily::Windows, "Windows 2022 (64-bit)", BITS64 | TABLET | USB3 | WDDM, 2048, 128, 51200, MODERN_WINDOWS),
    os("WindowsNT", OsFamily::Windows, "Other Windows (32-bit)", NONE, 512, 16, 20480, PLAIN),
    os("WindowsNT_64", OsFamily::Windows, "Other Windows (64-bit)", BITS64 | PAE | TABLET, 512, 16, 20480, XP_PRO1000),
    os("Linux22", OsFamily::Linux, "Linux 2.2 (32-bit)", PAE | UTC, 64, 4, 2048, LINUX_OLD),
    os("Linux24", OsFamily::Linux, "Linux 2.4 (32-bit)", PAE | UTC, 128, 16, 2048, LINUX_OLD),
    os("Linux24_64", OsFamily::Linux, "Linux 2.4 (64-bit)", BITS64 | UTC, 1024, 16, 4096, LINUX24_64),
    os("Linux26", OsFamily::Linux, "Linux 2.6 / 3.x / 4.x / 5.x (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Linux26_64", OsFamily::Linux, "Linux 2.6 / 3.x / 4.x / 5.x (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("ArchLinux", OsFamily::Linux, "Arch Linux (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("ArchLinux_64", OsFamily::Linux, "Arch Linux (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("Debian", OsFamily::Linux, "Debian (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian_64", OsFamily::Linux, "Debian (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Debian31", OsFamily::Linux, "Debian 3.1 Sarge (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Debian4", OsFamily::Linux, "Debian 4.0 Etch (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Debian4_64", OsFamily::Linux, "Debian 4.0 Etch (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("Debian5", OsFamily::Linux, "Debian 5.0 Lenny (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Debian5_64", OsFamily::Linux, "Debian 5.0 Lenny (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("Debian6", OsFamily::Linux, "Debian 6.0 Squeeze (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Debian6_64", OsFamily::Linux, "Debian 6.0 Squeeze (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("Debian7", OsFamily::Linux, "Debian 7 Wheezy (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian7_64", OsFamily::Linux, "Debian 7 Wheezy (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Debian8", OsFamily::Linux, "Debian 8 Jessie (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian8_64", OsFamily::Linux, "Debian 8 Jessie (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Debian9", OsFamily::Linux, "Debian 9 Stretch (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian9_64", OsFamily::Linux, "Debian 9 Stretch (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Debian10", OsFamily::Linux, "Debian 10 Buster (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian10_64", OsFamily::Linux, "Debian 10 Buster (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Debian11", OsFamily::Linux, "Debian 11 Bullseye (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian11_64", OsFamily::Linux, "Debian 11 Bullseye (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Debian12", OsFamily::Linux, "Debian 12 Bookworm (32-bit)", LINUX_TABLET_32, 2048, 16, 20480, LINUX),
    os("Debian12_64", OsFamily::Linux, "Debian 12 Bookworm (64-bit)", LINUX_TABLET_64, 2048, 16, 20480, LINUX),
    os("Fedora", OsFamily::Linux, "Fedora (32-bit)", LINUX_TABLET_32, 2048, 16, 15360, LINUX),
    os("Fedora_64", OsFamily::Linux, "Fedora (64-bit)", LINUX_TABLET_64, 2048, 16, 15360, LINUX),
    os("Gentoo", OsFamily::Linux, "Gentoo (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Gentoo_64", OsFamily::Linux, "Gentoo (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("Mandriva", OsFamily::Linux, "Mandriva (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("Mandriva_64", OsFamily::Linux, "Mandriva (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("OpenMandriva_Lx", OsFamily::Linux, "OpenMandriva Lx (32-bit)", LINUX_TABLET_32, 2048, 16, 10240, LINUX),
    os("OpenMandriva_Lx_64", OsFamily::Linux, "OpenMandriva Lx (64-bit)", LINUX_TABLET_64, 2048, 16, 10240, LINUX),
    os("PCLinuxOS", OsFamily::Linux, "PCLinuxOS / PCLOS (32-bit)", LINUX_TABLET_32, 2048, 16, 10240, LINUX),
    os("PCLinuxOS_64", OsFamily::Linux, "PCLinuxOS / PCLOS (64-bit)", LINUX_TABLET_64, 2048, 16, 10240, LINUX),
    os("Mageia", OsFamily::Linux, "Mageia (32-bit)", LINUX_TABLET_32, 2048, 16, 10240, LINUX),
    os("Mageia_64", OsFamily::Linux, "Mageia (64-bit)", LINUX_TABLET_64, 2048, 16, 10240, LINUX),
    os("Oracle", OsFamily::Linux, "Oracle Linux (32-bit)", LINUX_32, 2048, 16, 20480, LINUX),
    os("Oracle_64", OsFamily::Linux, "Oracle Linux (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("Oracle4", OsFamily::Linux, "Oracle Linux 4.x (32-bit)", LINUX_32, 1024, 16, 8192, LINUX),
    os("Oracle4_64", OsFamily::Linux, "Oracle Linux 4.x (64-bit)", LINUX_64, 1024, 16, 8192, LINUX),
    os("Oracle5", OsFamily::Linux, "Oracle Linux 5.x (32-bit)", LINUX_32, 1024, 16, 8192, LINUX),
    os("Oracle5_64", OsFamily::Linux, "Oracle Linux 5.x (64-bit)", LINUX_64, 1024, 16, 8192, LINUX),
    os("Oracle6", OsFamily::Linux, "Oracle Linux 6.x (32-bit)", LINUX_32, 2048, 16, 10240, LINUX),
    os("Oracle6_64", OsFamily::Linux, "Oracle Linux 6.x (64-bit)", LINUX_64, 2048, 16, 10240, LINUX),
    os("Oracle7_64", OsFamily::Linux, "Oracle Linux 7.x (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("Oracle8_64", OsFamily::Linux, "Oracle Linux 8.x (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("Oracle9_64", OsFamily::Linux, "Oracle Linux 9.x (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("RedHat", OsFamily::Linux, "Red Hat (32-bit)", LINUX_32, 2048, 16, 20480, LINUX),
    os("RedHat_64", OsFamily::Linux, "Red Hat (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("RedHat3", OsFamily::Linux, "Red Hat 3.x (32-bit)", LINUX_32, 1024, 16, 8192, LINUX),
    os("RedHat3_64", OsFamily::Linux, "Red Hat 3.x (64-bit)", LINUX_64, 1024, 16, 8192, LINUX),
    os("RedHat4", OsFamily::Linux, "Red Hat 4.x (32-bit)", LINUX_32, 1024, 16, 8192, LINUX),
    os("RedHat4_64", OsFamily::Linux, "Red Hat 4.x (64-bit)", LINUX_64, 1024, 16, 8192, LINUX),
    os("RedHat5", OsFamily::Linux, "Red Hat 5.x (32-bit)", LINUX_32, 1024, 16, 8192, LINUX),
    os("RedHat5_64", OsFamily::Linux, "Red Hat 5.x (64-bit)", LINUX_64, 1024, 16, 8192, LINUX),
    os("RedHat6", OsFamily::Linux, "Red Hat 6.x (32-bit)", LINUX_32, 1024, 16, 10240, LINUX),
    os("RedHat6_64", OsFamily::Linux, "Red Hat 6.x (64-bit)", LINUX_64, 1024, 16, 10240, LINUX),
    os("RedHat7_64", OsFamily::Linux, "Red Hat 7.x (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("RedHat8_64", OsFamily::Linux, "Red Hat 8.x (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("RedHat9_64", OsFamily::Linux, "Red Hat 9.x (64-bit)", LINUX_64, 2048, 16, 20480, LINUX),
    os("OpenSUSE", OsFamily::Linux, "openSUSE (32-bit)", LINUX_TABLET_32, 1024, 16, 8192, LINUX),
    os("OpenSUSE_64", OsFamily::Linux, "openSUSE (64-bit)", LINUX_TABLET_64, 1024, 16, 8192, LINUX),
    os("OpenSUSE_Leap_64", OsFamily::Linux, "openSUSE Leap (64-bit)", LINUX_TABLET_64, 2048, 16, 8192, LINUX),
    os("OpenSUSE_Tumbleweed", OsFamily::Linux, "openSUSE Tumbleweed (32-bit)", LINUX_TABLET_32, 2048, 16, 8192, LINUX),
    os("OpenSUSE_Tumbleweed_64", OsFamily::Linux, "openSUSE Tumbleweed (64-bit)", LINUX_TABLET_64, 2048, 16, 8192, LINUX),
    os("SUSE_LE", OsFamily::Linux, "SUSE Linux Enterprise (32-bit)", LINUX_TABLET_32, 2048, 16, 8192, LINUX),
    os("SUSE_LE_64", OsFamily::Linux, "SUSE Linux Enterprise (64-bit)", LINUX_TABLET_64, 2048, 16, 8192, LINUX),
    os("Turbolinux", OsFamily::Linux, "Turbolinux (32-bit)", LINUX_TABLET_32, 384, 16, 8192, LINUX),
    os("Turbolinux_64", OsFamily::Linux, "Turbolinux (64-bit)", LINUX_TABLET_64, 384, 16, 8192, LINUX),
    os("Ubuntu", OsFamily::Linux, "Ubuntu (32-bit)", LINUX_TABLET_32, 2048, 16, 25600, LINUX),
    os("Ubuntu_64", OsFamily::Linux, "Ubuntu (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu10_LTS", OsFamily::Linux, "Ubuntu 10.04 LTS (Lucid Lynx) (32-bit)", LINUX_TABLET_32, 256, 16, 3072, LINUX),
    os("Ubuntu10_LTS_64", OsFamily::Linux, "Ubuntu 10.04 LTS (Lucid Lynx) (64-bit)", LINUX_TABLET_64, 256, 16, 3072, LINUX),
    os("Ubuntu10", OsFamily::Linux, "Ubuntu 10.10 (Maverick Meerkat) (32-bit)", LINUX_TABLET_32, 256, 16, 3072, LINUX),
    os("Ubuntu10_64", OsFamily::Linux, "Ubuntu 10.10 (Maverick Meerkat) (64-bit)", LINUX_TABLET_64, 256, 16, 3072, LINUX),
    os("Ubuntu11", OsFamily::Linux, "Ubuntu 11.04 (Natty Narwhal) / 11.10 (Oneiric Ocelot) (32-bit)", LINUX_TABLET_32, 384, 16, 5120, LINUX),
    os("Ubuntu11_64", OsFamily::Linux, "Ubuntu 11.04 (Natty Narwhal) / 11.10 (Oneiric Ocelot) (64-bit)", LINUX_TABLET_64, 384, 16, 5120, LINUX),
    os("Ubuntu12_LTS", OsFamily::Linux, "Ubuntu 12.04 LTS (Precise Pangolin) (32-bit)", LINUX_TABLET_32, 768, 16, 5120, LINUX),
    os("Ubuntu12_LTS_64", OsFamily::Linux, "Ubuntu 12.04 LTS (Precise Pangolin) (64-bit)", LINUX_TABLET_64, 768, 16, 5120, LINUX),
    os("Ubuntu12", OsFamily::Linux, "Ubuntu 12.10 (Quantal Quetzal) (32-bit)", LINUX_TABLET_32, 768, 16, 5120, LINUX),
    os("Ubuntu12_64", OsFamily::Linux, "Ubuntu 12.10 (Quantal Quetzal) (64-bit)", LINUX_TABLET_64, 768, 16, 5120, LINUX),
    os("Ubuntu13", OsFamily::Linux, "Ubuntu 13.04 (Raring Ringtail) / 13.10 (Saucy Salamander) (32-bit)", LINUX_TABLET_32, 768, 16, 5120, LINUX),
    os("Ubuntu13_64", OsFamily::Linux, "Ubuntu 13.04 (Raring Ringtail) / 13.10 (Saucy Salamander) (64-bit)", LINUX_TABLET_64, 768, 16, 5120, LINUX),
    os("Ubuntu14_LTS", OsFamily::Linux, "Ubuntu 14.04 LTS (Trusty Tahr) (32-bit)", LINUX_TABLET_32, 1536, 16, 7168, LINUX),
    os("Ubuntu14_LTS_64", OsFamily::Linux, "Ubuntu 14.04 LTS (Trusty Tahr) (64-bit)", LINUX_TABLET_64, 1536, 16, 7168, LINUX),
    os("Ubuntu14", OsFamily::Linux, "Ubuntu 14.10 (Utopic Unicorn) (32-bit)", LINUX_TABLET_32, 1536, 16, 7168, LINUX),
    os("Ubuntu14_64", OsFamily::Linux, "Ubuntu 14.10 (Utopic Unicorn) (64-bit)", LINUX_TABLET_64, 1536, 16, 7168, LINUX),
    os("Ubuntu15", OsFamily::Linux, "Ubuntu 15.04 (Vivid Vervet) / 15.10 (Wily Werewolf) (32-bit)", LINUX_TABLET_32, 1536, 16, 7168, LINUX),
    os("Ubuntu15_64", OsFamily::Linux, "Ubuntu 15.04 (Vivid Vervet) / 15.10 (Wily Werewolf) (64-bit)", LINUX_TABLET_64, 1536, 16, 7168, LINUX),
    os("Ubuntu16_LTS", OsFamily::Linux, "Ubuntu 16.04 LTS (Xenial Xerus) (32-bit)", LINUX_TABLET_32, 1536, 16, 10240, LINUX),
    os("Ubuntu16_LTS_64", OsFamily::Linux, "Ubuntu 16.04 LTS (Xenial Xerus) (64-bit)", LINUX_TABLET_64, 1536, 16, 10240, LINUX),
    os("Ubuntu16", OsFamily::Linux, "Ubuntu 16.10 (Yakkety Yak) (32-bit)", LINUX_TABLET_32, 1536, 16, 10240, LINUX),
    os("Ubuntu16_64", OsFamily::Linux, "Ubuntu 16.10 (Yakkety Yak) (64-bit)", LINUX_TABLET_64, 1536, 16, 10240, LINUX),
    os("Ubuntu17", OsFamily::Linux, "Ubuntu 17.04 (Zesty Zapus) / 17.10 (Artful Aardvark) (32-bit)", LINUX_TABLET_32, 1536, 16, 10240, LINUX),
    os("Ubuntu17_64", OsFamily::Linux, "Ubuntu 17.04 (Zesty Zapus) / 17.10 (Artful Aardvark) (64-bit)", LINUX_TABLET_64, 1536, 16, 10240, LINUX),
    os("Ubuntu18_LTS", OsFamily::Linux, "Ubuntu 18.04 LTS (Bionic Beaver) (32-bit)", LINUX_TABLET_32, 2048, 16, 25600, LINUX),
    os("Ubuntu18_LTS_64", OsFamily::Linux, "Ubuntu 18.04 LTS (Bionic Beaver) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu18", OsFamily::Linux, "Ubuntu 18.10 (Cosmic Cuttlefish) (32-bit)", LINUX_TABLET_32, 2048, 16, 25600, LINUX),
    os("Ubuntu18_64", OsFamily::Linux, "Ubuntu 18.10 (Cosmic Cuttlefish) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu19", OsFamily::Linux, "Ubuntu 19.04 (Disco Dingo) / 19.10 (Eoan Ermine) (32-bit)", LINUX_TABLET_32, 2048, 16, 25600, LINUX),
    os("Ubuntu19_64", OsFamily::Linux, "Ubuntu 19.04 (Disco Dingo) / 19.10 (Eoan Ermine) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu20_LTS_64", OsFamily::Linux, "Ubuntu 20.04 LTS (Focal Fossa) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu20_64", OsFamily::Linux, "Ubuntu 20.10 (Groovy Gorilla) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu21_64", OsFamily::Linux, "Ubuntu 21.04 (Hirsute Hippo) / 21.10 (Impish Indri) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu22_LTS_64", OsFamily::Linux, "Ubuntu 22.04 LTS (Jammy Jellyfish) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu22_64", OsFamily::Linux, "Ubuntu 22.10 (Kinetic Kudu) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Ubuntu23_64", OsFamily::Linux, "Ubuntu 23.04 (Lunar Lobster) (64-bit)", LINUX_TABLET_64, 2048, 16, 25600, LINUX),
    os("Lubuntu", OsFamily::Linux, "Lubuntu (32-bit)", LINUX_TABLET_32, 1024, 16, 10240, LINUX),
    os("Lubuntu_64", OsFamily::Linux, "Lubuntu (64-bit)", LINUX_TABLET_64, 1024, 16, 10240, LINUX),
    os("Xubuntu", OsFamily::Linux, "Xubuntu (32-bit)", LINUX_TABLET_32, 1024, 16, 10240, LINUX),
    os("Xubuntu_64", OsFamily::Linux, "Xubuntu (64-bit)", LINUX_TABLET_64, 1024, 16, 10240, LINUX),
    os("Xandros", OsFamily::Linux, "Xandros (32-bit)", LINUX_32, 1024, 16, 8192, LINUX),
    os("Xandros_64", OsFamily::Linux, "Xandros (64-bit)", BITS64 | UTC | X2APIC, 1024, 16, 8192, LINUX),
    os("Linux", OsFamily::Linux, "Other Linux (32-bit)", LINUX_TABLET_32, 256, 16, 8192, LINUX),
    os("Linux_64", OsFamily::Linux, "Other Linux (64-bit)", LINUX_64, 512, 16, 8192, LINUX),
    os("Solaris", OsFamily::Solaris, "Oracle Solaris 10 5/09 and earlier (32-bit)", NONE, 1024, 16, 32768, XP_PRO1000),
    os("Solaris_64", OsFamily::Solaris, "Oracle Solaris 10 5/09 and earlier (64-bit)", BITS64, 2048, 16, 32768, XP_PRO1000),
    os("Solaris10U8_or_later", OsFamily::Solaris, "Oracle Solaris 10 10/09 and later (32-bit)", TABLET, 1024, 16, 32768, SOLARIS_SATA),
    os("Solaris10U8_or_later_64", OsFamily::Solaris, "Oracle Solaris 10 10/09 and later (64-bit)", BITS64 | TABLET, 2048, 16, 32768, SOLARIS_SATA),
    os("Solaris11_64", OsFamily::Solaris, "Oracle Solaris 11 (64-bit)", BITS64 | TABLET | UTC, 4096, 16, 32768, SOLARIS11),
    os("OpenSolaris", OsFamily::Solaris, "OpenSolaris / Illumos / OpenIndiana (32-bit)", TABLET, 1024, 16, 32768, SOLARIS_SATA),
    os("OpenSolaris_64", OsFamily::Solaris, "OpenSolaris / Illumos / OpenIndiana (64-bit)", BITS64 | TABLET, 2048, 16, 32768, SOLARIS_SATA),
    os("FreeBSD", OsFamily::Bsd, "FreeBSD (32-bit)", NONE, 1024, 16, 2048, BSD),
    os("FreeBSD_64", OsFamily::Bsd, "FreeBSD (64-bit)", BITS64, 1024, 16, 16384, BSD),
    os("OpenBSD", OsFamily::Bsd, "OpenBSD (32-bit)", HWVIRT, 1024, 16, 16384, BSD),
    os("OpenBSD_64", OsFamily::Bsd, "OpenBSD (64-bit)", BITS64, 1024, 16, 16384, BSD),
    os("NetBSD", OsFamily::Bsd, "NetBSD (32-bit)", UTC, 1024, 16, 16384, BSD),
    os("NetBSD_64", OsFamily::Bsd, "NetBSD (64-bit)", BITS64 | UTC, 1024, 16, 16384, BSD),
    os("OS21x", OsFamily::Os2, "OS/2 1.x", FLOPPY | NO_USB | TF_RESET, 8, 4, 500, OS2_SB16),
    os("OS2Warp3", OsFamily::Os2, "OS/2 Warp 3", HWVIRT | FLOPPY, 48, 4, 1024, OS2_SB16),
    os("OS2Warp4", OsFamily::Os2, "OS/2 Warp 4", HWVIRT | FLOPPY, 64, 4, 2048, OS2_SB16),
    os("OS2Warp45", OsFamily::Os2, "OS/2 Warp 4.5", HWVIRT | FLOPPY, 128, 4, 2048, OS2_SB16),
    os("OS2eCS", OsFamily::Os2, "eComStation", HWVIRT | FLOPPY, 256, 4, 2048, OS2_AC97),
    os("OS2ArcaOS", OsFamily::Os2, "ArcaOS", HWVIRT | FLOPPY, 1024, 4, 2048, OS2_PRO1000),
    os("OS2", OsFamily::Os2, "Other OS/2", HWVIRT | FLOPPY | NO_USB, 96, 4, 2048, OS2_SB16),
    os("MacOS", OsFamily::MacOs, "Mac OS X (32-bit)", MAC, 2048, 16, 20480, MACOS),
    os("MacOS_64", OsFamily::MacOs, "Mac OS X (64-bit)", MAC | X64, 2048, 16, 20480, MACOS),
    os("MacOS106", OsFamily::MacOs, "Mac OS X 10.6 Snow Leopard (32-bit)", MAC, 2048, 16, 20480, MACOS),
    os("MacOS106_64", OsFamily::MacOs, "Mac OS X 10.6 Snow Leopard (64-bit)", MAC | X64, 2048, 16, 20480, MACOS),
    os("MacOS107_64", OsFamily::MacOs, "Mac OS X 10.7 Lion (64-bit)", MAC | X64, 2048, 16, 20480, MACOS),
    os("MacOS108_64", OsFamily::MacOs, "Mac OS X 10.8 Mountain Lion (64-bit)", MAC | X64, 2048, 16, 20480, MACOS),
    os("MacOS109_64", OsFamily::MacOs, "Mac OS X 10.9 Mavericks (64-bit)", MAC | X64, 2048, 16, 25600, MACOS),
    os("MacOS1010_64", OsFamily::MacOs, "Mac OS X 10.10 Yosemite (64-bit)", MAC | X64, 2048, 16, 25600, MACOS),
    os("MacOS1011_64", OsFamily::MacOs, "Mac OS X 10.11 El Capitan (64-bit)", MAC | X64, 2048, 16, 30720, MACOS),
    os("MacOS1012_64", OsFamily::MacOs, "macOS 10.12 Sierra (64-bit)", MAC | X64, 2048, 16, 30720, MACOS),
    os("MacOS1013_64", OsFamily::MacOs, "macOS 10.13 High Sierra (64-bit)", MAC | X64, 2048, 16, 30720, MACOS),
    os("DOS", OsFamily::Other, "DOS", FLOPPY | NO_USB, 32, 4, 500, OS2_SB16),
    os("Netware", OsFamily::Other, "Netware", HWVIRT | FLOPPY | NO_USB, 512, 4, 4096, PLAIN),
    os("L4", OsFamily::Other, "L4", NONE, 64, 4, 2048, PLAIN),
    os("QNX", OsFamily::Other, "QNX", HWVIRT, 512, 4, 4096, PLAIN),
    os("JRockitVE", OsFamily::Other, "JRockitVE", HWVIRT | IOAPIC | PAE, 1024, 4, 8192, JROCKIT),
    os("VBoxBS_64", OsFamily::Other, "VirtualBox Bootsector Test (64-bit)", BITS64 | PAE | FLOPPY, 128, 4, 0, BOOTSECTOR),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_found_by_id_and_by_description() {
        let debian = OsType::find("Debian_64").unwrap();
        assert_eq!(debian.description, "Debian (64-bit)");
        assert_eq!(OsType::find("debian (64-BIT)"), Some(debian));
        assert!(debian.is_64bit() && debian.recommended_ioapic() && debian.recommended_x2apic());
        assert_eq!(debian.recommended_disk_size(), 20 << 30);
        assert_eq!(OsType::find("Minix"), None);
    }

    #[test]
    fn the_paravirtualization_provider_goes_by_the_guest() {
        let provider = |id| OsType::by_id(id).unwrap().paravirt_provider();
        assert_eq!(provider("Windows11_64"), ParavirtProvider::HyperV);
        assert_eq!(provider("WindowsXP"), ParavirtProvider::None);
        assert_eq!(provider("Debian_64"), ParavirtProvider::Kvm);
        assert_eq!(provider("Linux24"), ParavirtProvider::None);
        assert_eq!(provider("MacOS_64"), ParavirtProvider::Minimal);
        assert_eq!(provider("FreeBSD_64"), ParavirtProvider::None);
    }

    #[test]
    fn ids_and_descriptions_are_unique_and_64_bit_ids_say_so() {
        let distinct = |name: fn(&OsType) -> String| {
            OsType::all().iter().map(name).collect::<std::collections::HashSet<_>>().len()
        };
        assert_eq!(distinct(|os| os.id.to_ascii_lowercase()), OsType::all().len());
        assert_eq!(distinct(|os| os.description.to_ascii_lowercase()), OsType::all().len());
        for os in OsType::all() {
            assert_eq!(os.is_64bit(), os.id.ends_with("_64"), "{}", os.id);
        }
    }

    #[test]
    fn every_64_bit_type_asks_for_what_long_mode_needs() {
        for os in OsType::all().iter().filter(|os| os.is_64bit()) {
            assert!(os.recommended_ioapic() && os.recommended_hw_virt(), "{}", os.id);
        }
    }
}
