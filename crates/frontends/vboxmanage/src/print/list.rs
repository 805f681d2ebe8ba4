//! The lists of `VBoxManage list` that are not machines or media.

use main_api::cpu_profiles::CPU_PROFILES;
use main_api::enums::AudioDriverType;

use super::fmt::timestamp;

/// A guest operating system type.
#[derive(Clone, Debug)]
pub struct OsType {
    pub id: String,
    pub description: String,
    pub family_id: String,
    pub family_description: String,
    pub is_64_bit: bool,
}

pub fn os_types(types: &[OsType]) -> String {
    let mut text = String::new();
    for t in types {
        text.push_str(&format!(
            "ID:          {}\nDescription: {}\nFamily ID:   {}\nFamily Desc: {}\n64 bit:      {}\n\n",
            t.id, t.description, t.family_id, t.family_description, t.is_64_bit
        ));
    }
    text
}

/// The host, as `list hostinfo` tells of it.
#[derive(Clone, Debug)]
pub struct HostInfo {
    /// Milliseconds since 1970 in UTC.
    pub utc_time: i64,
    pub online_processors: u32,
    pub processors: u32,
    pub online_cores: u32,
    pub cores: u32,
    /// Name and whether the processors have it.
    pub features: Vec<(&'static str, bool)>,
    /// Speed in MHz, 0 if unknown, and description.
    pub each_processor: Vec<(u32, String)>,
    pub memory: u32,
    pub memory_available: u32,
    pub operating_system: String,
    pub os_version: String,
    /// A sentence on what guest code runs on.
    pub engine: String,
}

pub fn host_info(host: &HostInfo) -> String {
    let mut text = format!(
        "Host Information:\n\nHost time: {}\nProcessor online count: {}\nProcessor count: {}\n\
         Processor online core count: {}\nProcessor core count: {}\n",
        timestamp(host.utc_time),
        host.online_processors,
        host.processors,
        host.online_cores,
        host.cores
    );
    for (name, supported) in &host.features {
        text.push_str(&format!("Processor supports {name}: {}\n", if *supported { "yes" } else { "no" }));
    }
    for (i, (speed, description)) in host.each_processor.iter().enumerate() {
        match speed {
            0 => text.push_str(&format!("Processor#{i} speed: unknown\n")),
            speed => text.push_str(&format!("Processor#{i} speed: {speed} MHz\n")),
        }
        text.push_str(&format!("Processor#{i} description: {description}\n"));
    }
    text.push_str(&format!(
        "Memory size: {} MByte\nMemory available: {} MByte\nOperating system: {}\nOperating system version: {}\n\
         Execution engine: {}\n",
        host.memory, host.memory_available, host.operating_system, host.os_version, host.engine
    ));
    text
}

/// Leaf, eax, ebx, ecx, edx.
pub fn cpu_ids(leaves: &[[u32; 5]]) -> String {
    let mut text = "Host CPUIDs:\n\nLeaf no.  EAX      EBX      ECX      EDX\n".to_owned();
    for [leaf, a, b, c, d] in leaves {
        text.push_str(&format!("{leaf:08x}  {a:08x} {b:08x} {c:08x} {d:08x}\n"));
    }
    text
}

/// How many controllers of a bus there can be, and how many things on them.
#[derive(Clone, Copy, Debug, Default)]
pub struct BusLimits {
    pub piix3: u32,
    pub ich9: u32,
    pub ports: u32,
    pub devices_per_port: u32,
}

/// What `list systemproperties` tells.
#[derive(Clone, Debug)]
pub struct SystemProperties {
    pub api_version: String,
    pub ram: (u32, u32),
    pub vram: (u32, u32),
    pub max_monitors: u32,
    pub cpus: (u32, u32),
    pub max_disk: i64,
    pub serial_ports: u32,
    pub parallel_ports: u32,
    pub boot_positions: u32,
    pub nics_piix3: u32,
    pub nics_ich9: u32,
    pub ide: BusLimits,
    pub sata: BusLimits,
    pub scsi: BusLimits,
    pub sas: BusLimits,
    pub nvme: BusLimits,
    pub virtio_scsi: BusLimits,
    pub floppy: BusLimits,
    pub machine_folder: String,
    pub raw_mode: bool,
    pub exclusive_hw_virt: bool,
    pub disk_format: String,
    pub vrde_auth_library: String,
    pub web_auth_library: String,
    pub vrde_ext_pack: String,
    pub log_history_count: u32,
    pub default_frontend: String,
    pub audio_driver: AudioDriverType,
    pub autostart_path: String,
    pub additions_iso: String,
    pub logging_level: String,
    pub proxy_mode: String,
    pub proxy_url: String,
    pub language: String,
}

pub fn system_properties(p: &SystemProperties) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| text.push_str(&format!("{label:<33}{value}\n"));
    line("API version:", p.api_version.clone());
    line("Minimum guest RAM size:", format!("{} Megabytes", p.ram.0));
    line("Maximum guest RAM size:", format!("{} Megabytes", p.ram.1));
    line("Minimum video RAM size:", format!("{} Megabytes", p.vram.0));
    line("Maximum video RAM size:", format!("{} Megabytes", p.vram.1));
    line("Maximum guest monitor count:", p.max_monitors.to_string());
    line("Minimum guest CPU count:", p.cpus.0.to_string());
    line("Maximum guest CPU count:", p.cpus.1.to_string());
    line("Virtual disk limit (info):", format!("{} Bytes", p.max_disk));
    line("Maximum Serial Port count:", p.serial_ports.to_string());
    line("Maximum Parallel Port count:", p.parallel_ports.to_string());
    line("Maximum Boot Position:", p.boot_positions.to_string());
    // The labels from here on have VirtualBox's uneven columns.
    line("Maximum PIIX3 Network Adapter count:   ", p.nics_piix3.to_string());
    line("Maximum ICH9 Network Adapter count:   ", p.nics_ich9.to_string());
    for (name, bus) in [("IDE", p.ide), ("SATA", p.sata), ("SCSI", p.scsi)] {
        line(&format!("Maximum PIIX3 {name} Controllers:"), bus.piix3.to_string());
        line(&format!("Maximum ICH9 {name} Controllers:"), bus.ich9.to_string());
        line(&format!("Maximum {name} Port count:"), bus.ports.to_string());
        line(&format!("Maximum Devices per {name} Port:"), bus.devices_per_port.to_string());
    }
    for (name, bus) in [("SAS", p.sas), ("NVMe", p.nvme), ("virtio-scsi", p.virtio_scsi)] {
        let pad = if name == "virtio-scsi" { ["  ", "   ", "         ", "   "] } else { ["", "", "", ""] };
        line(&format!("Maximum {name} PIIX3 Controllers:{}", pad[0]), bus.piix3.to_string());
        line(&format!("Maximum {name} ICH9 Controllers:{}", pad[1]), bus.ich9.to_string());
        line(&format!("Maximum {name} Port count:{}", pad[2]), bus.ports.to_string());
        line(&format!("Maximum Devices per {name} Port:{}", pad[3]), bus.devices_per_port.to_string());
    }
    line("Maximum PIIX3 Floppy Controllers:", p.floppy.piix3.to_string());
    line("Maximum ICH9 Floppy Controllers:", p.floppy.ich9.to_string());
    line("Maximum Floppy Port count:", p.floppy.ports.to_string());
    line("Maximum Devices per Floppy Port:", p.floppy.devices_per_port.to_string());
    line("Default machine folder:", p.machine_folder.clone());
    line("Raw-mode Supported:", if p.raw_mode { "yes" } else { "no" }.to_owned());
    line("Exclusive HW virtualization use:", if p.exclusive_hw_virt { "on" } else { "off" }.to_owned());
    line("Default hard disk format:", p.disk_format.clone());
    line("VRDE auth library:", p.vrde_auth_library.clone());
    line("Webservice auth. library:", p.web_auth_library.clone());
    line("Remote desktop ExtPack:", p.vrde_ext_pack.clone());
    line("VM encryption ExtPack:", String::new());
    line("Log history count:", p.log_history_count.to_string());
    line("Default frontend:", p.default_frontend.clone());
    let audio = match p.audio_driver {
        AudioDriverType::Default => "Default",
        AudioDriverType::Null => "Null",
        AudioDriverType::OSS => "OSS",
        AudioDriverType::ALSA => "ALSA",
        AudioDriverType::Pulse => "PulseAudio",
        AudioDriverType::WinMM => "WinMM",
        AudioDriverType::DirectSound => "DirectSound",
        AudioDriverType::WAS => "Windows Audio Session",
        AudioDriverType::CoreAudio => "CoreAudio",
        AudioDriverType::SolAudio => "SolAudio",
        AudioDriverType::MMPM => "MMPM",
    };
    line("Default audio driver:", audio.to_owned());
    line("Autostart database path:", p.autostart_path.clone());
    line("Default Guest Additions ISO:", p.additions_iso.clone());
    line("Logging Level:", p.logging_level.clone());
    line("Proxy Mode:", p.proxy_mode.clone());
    line("Proxy URL:", p.proxy_url.clone());
    line("User language:", p.language.clone());
    text
}

pub fn groups(groups: &[String]) -> String {
    groups.iter().map(|group| format!("\"{group}\"\n")).collect()
}

pub fn ext_packs() -> String {
    "Extension Packs: 0\n".to_owned()
}

/// `FourCC` codes of the formats, as VirtualBox numbers them.
pub fn screenshot_formats(names: &[&str]) -> String {
    let mut text = format!("Supported {} screen shot formats:\n", names.len());
    for name in names {
        let mut code = [b' '; 4];
        for (to, from) in code.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let number = u32::from_le_bytes(code);
        let shown = String::from_utf8_lossy(&code).into_owned();
        text.push_str(&format!("    BitmapFormat_{shown} (0x{number:08X})\n"));
    }
    text
}

/// The formats that images can have. The capability bits are VirtualBox's.
pub fn hdd_backends() -> String {
    const BACKENDS: &[(&str, &str, u32, &str)] = &[
        ("VMDK", "VMDK", 0xa7f, "vmdk (HardDisk)"),
        ("VDI", "VDI", 0xe77, "vdi (HardDisk)"),
        ("VHD", "VHD", 0xa77, "vhd (HardDisk)"),
        ("Parallels", "Parallels", 0x264, "hdd (HardDisk)"),
        ("DMG", "DMG", 0x240, "dmg (DVD)"),
        ("QED", "QED", 0x240, "qed (HardDisk)"),
        ("QCOW", "QCOW", 0x274, "qcow (HardDisk),qcow2 (HardDisk)"),
        ("VHDX", "VHDX", 0x266, "vhdx (HardDisk)"),
        (
            "RAW",
            "RAW",
            0x262,
            "iso (DVD),cdr (DVD),img (Floppy),ima (Floppy),dsk (Floppy),flp (Floppy),vfd (Floppy)",
        ),
    ];
    const TARGET: &[(&str, &str, u32, &str)] = &[
        ("TargetName", "string", 1, ""),
        ("LUN", "string", 1, "0"),
        ("TargetAddress", "string", 1, ""),
        ("InitiatorName", "string", 0, ""),
        ("InitiatorUsername", "string", 0, ""),
        ("InitiatorSecret", "byte", 4, ""),
        ("TargetUsername", "string", 2, ""),
        ("TargetSecret", "byte", 6, ""),
        ("WriteSplit", "int", 2, "262144"),
        ("Timeout", "int", 2, "10000"),
        ("HostIPStack", "int", 2, "1"),
        ("DumpMalformedPackets", "int", 2, "0"),
    ];
    let properties = TARGET.iter().map(|(name, kind, flags, default)| {
        format!("\n  name='{name}' desc='' type={kind} flags={flags:#04x} default='{default}'")
    });
    let mut text = "Supported hard disk backends:\n\n".to_owned();
    for (i, (id, name, capabilities, extensions)) in BACKENDS.iter().enumerate() {
        text.push_str(&format!(
            "Backend {i}: id='{id}' description='{name}' capabilities={capabilities:#06x} \
             extensions='{extensions}' properties=()\n"
        ));
    }
    text.push_str(&format!(
        "Backend {}: id='iSCSI' description='iSCSI' capabilities=0x01a0 extensions='' properties=({})\n",
        BACKENDS.len(),
        properties.collect::<Vec<_>>().join(", ")
    ));
    text
}

pub fn cpu_profiles(long: bool) -> String {
    let mut text = String::new();
    let profiles = CPU_PROFILES.iter().map(|p| (p.name, p.full_name));
    for (number, (name, full_name)) in std::iter::once(("host", "host")).chain(profiles).enumerate() {
        text += &if long {
            format!(
                "CPU Profile #{number:02}:\n  Architecture: AMD64\n  Name:         {name}\n  Full Name:    {full_name}\n"
            )
        } else {
            format!("#{number}: {name} [AMD64]\n")
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::print::golden;

    #[test]
    fn system_properties_print_as_virtualboxs() {
        let bus = BusLimits { piix3: 1, ich9: 2, ports: 3, devices_per_port: 4 };
        let properties = SystemProperties {
            api_version: "7_0".into(),
            ram: (4, 2_097_152),
            vram: (0, 256),
            max_monitors: 64,
            cpus: (1, 64),
            max_disk: 2_199_022_206_976,
            serial_ports: 4,
            parallel_ports: 2,
            boot_positions: 4,
            nics_piix3: 8,
            nics_ich9: 36,
            ide: bus,
            sata: bus,
            scsi: bus,
            sas: bus,
            nvme: bus,
            virtio_scsi: bus,
            floppy: bus,
            machine_folder: "/home/u/VirtualBox VMs".into(),
            raw_mode: false,
            exclusive_hw_virt: true,
            disk_format: "VDI".into(),
            vrde_auth_library: "VBoxAuth".into(),
            web_auth_library: "VBoxAuth".into(),
            vrde_ext_pack: String::new(),
            log_history_count: 3,
            default_frontend: String::new(),
            audio_driver: AudioDriverType::Pulse,
            autostart_path: String::new(),
            additions_iso: String::new(),
            logging_level: "all".into(),
            proxy_mode: "System".into(),
            proxy_url: String::new(),
            language: "C".into(),
        };
        golden("list-systemproperties.txt", &system_properties(&properties));
    }

    #[test]
    fn the_other_lists_print_as_virtualboxs() {
        let mut text = os_types(&[OsType {
            id: "Debian_64".into(),
            description: "Debian (64-bit)".into(),
            family_id: "Linux".into(),
            family_description: "Linux".into(),
            is_64_bit: true,
        }]);
        text += &host_info(&HostInfo {
            utc_time: 1_700_000_000_000,
            online_processors: 2,
            processors: 2,
            online_cores: 1,
            cores: 1,
            features: vec![("HW virtualization", false), ("PAE", true)],
            each_processor: vec![(2400, "AMD EPYC".into()), (0, "AMD EPYC".into())],
            memory: 4096,
            memory_available: 1024,
            operating_system: "Linux".into(),
            os_version: "6.1.0".into(),
            engine: "KVM (AMD-V, nested paging on)".into(),
        });
        text += &cpu_ids(&[[0, 1, 2, 3, 4]]);
        text += &groups(&["/".into(), "/a".into()]);
        text += &ext_packs();
        text += &screenshot_formats(&["BGR0", "PNG"]);
        text += &cpu_profiles(false);
        golden("list-others.txt", &text);
    }
}
