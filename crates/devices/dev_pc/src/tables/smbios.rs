//! SMBIOS structures (DMTF DSP0134, version 2.5), with VirtualBox's strings.
//!
//! Each string can be replaced as by VirtualBox's extra data `VBoxInternal/Devices/pcbios/0/Config/Dmi…`; the fields of [`Dmi`] carry those
//! names. The firmware gets the structures and an entry point without address and checksums, which it fills in.

use vbox_types::ByteSize;

use crate::memory_map;

/// Strings and numbers that an owner may set. An empty string is left out of its structure ("Not Specified").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dmi {
    pub bios_vendor: String,
    pub bios_version: String,
    pub bios_release_date: String,
    pub bios_release_major: u8,
    pub bios_release_minor: u8,
    pub bios_firmware_major: u8,
    pub bios_firmware_minor: u8,
    pub system_vendor: String,
    pub system_product: String,
    pub system_version: String,
    pub system_serial: String,
    pub system_sku: String,
    pub system_family: String,
    /// `None`: the machine's own.
    pub system_uuid: Option<[u8; 16]>,
    pub board_vendor: String,
    pub board_product: String,
    pub board_version: String,
    pub board_serial: String,
    pub board_asset_tag: String,
    pub board_loc_in_chass: String,
    pub board_board_type: u8,
    pub chassis_vendor: String,
    pub chassis_type: u8,
    pub chassis_version: String,
    pub chassis_serial: String,
    pub chassis_asset_tag: String,
    pub proc_manufacturer: String,
    pub proc_version: String,
    pub oem_vbox_ver: String,
    pub oem_vbox_rev: String,
}

impl Default for Dmi {
    fn default() -> Self {
        Self {
            bios_vendor: "innotek GmbH".into(),
            bios_version: "VirtualBox".into(),
            bios_release_date: "12/01/2006".into(),
            bios_release_major: 0,
            bios_release_minor: 0,
            bios_firmware_major: 0,
            bios_firmware_minor: 0,
            system_vendor: "innotek GmbH".into(),
            system_product: "VirtualBox".into(),
            system_version: "1.2".into(),
            system_serial: "0".into(),
            system_sku: String::new(),
            system_family: "Virtual Machine".into(),
            system_uuid: None,
            board_vendor: "Oracle Corporation".into(),
            board_product: "VirtualBox".into(),
            board_version: "1.2".into(),
            board_serial: "0".into(),
            board_asset_tag: String::new(),
            board_loc_in_chass: String::new(),
            // Motherboard.
            board_board_type: 0x0a,
            chassis_vendor: "Oracle Corporation".into(),
            // Other.
            chassis_type: 0x01,
            chassis_version: String::new(),
            chassis_serial: String::new(),
            chassis_asset_tag: String::new(),
            proc_manufacturer: "GenuineIntel".into(),
            proc_version: "Pentium(R) III".into(),
            oem_vbox_ver: String::new(),
            oem_vbox_rev: String::new(),
        }
    }
}

/// What the structures describe.
#[derive(Clone, Debug)]
pub struct SmbiosConfig {
    /// The machine's UUID in text order; the structure stores its first three fields little endian.
    pub uuid: [u8; 16],
    pub cpus: u32,
    /// CPUID leaf 1: EAX and EDX.
    pub processor_id: [u32; 2],
    /// Nominal clock in MHz.
    pub mhz: u16,
    pub ram: ByteSize,
    pub dmi: Dmi,
}

/// What the firmware gets.
#[derive(Clone, Debug)]
pub struct SmbiosFiles {
    pub anchor: Vec<u8>,
    pub tables: Vec<u8>,
}

/// Handles by which structures name each other.
mod handle {
    pub(super) const BIOS: u16 = 0x0000;
    pub(super) const SYSTEM: u16 = 0x0001;
    pub(super) const OEM: u16 = 0x0002;
    pub(super) const CHASSIS: u16 = 0x0003;
    pub(super) const BOOT: u16 = 0x0004;
    pub(super) const BOARD: u16 = 0x0008;
    pub(super) const PROCESSOR: u16 = 0x0400;
    pub(super) const MEMORY_ARRAY: u16 = 0x1000;
    pub(super) const MEMORY_DEVICE: u16 = 0x1100;
    pub(super) const MEMORY_ADDRESS: u16 = 0x1300;
    pub(super) const END: u16 = 0xfeff;
}

/// Strings longer than this are cut, as DSP0134 recommends.
const STRING_LIMIT: usize = 64;
/// "No error information".
const NO_ERROR_HANDLE: u16 = 0xfffe;
/// A memory device of version 2.5 tells at most 32 GiB; like real modules, ours are smaller.
const MODULE: u64 = 16 << 30;

/// A structure being written (6.1.2): formatted area, then its strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let mut bytes = vec![kind, 0];
        bytes.extend_from_slice(&handle.to_le_bytes());
        Self { bytes, strings: Vec::new() }
    }

    fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A string's number; 0 for an empty one. Bytes that would end the string set early are dropped.
    fn text(&mut self, text: &str) -> &mut Self {
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        let cut = (0..=text.len().min(STRING_LIMIT)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        if cut == 0 {
            return self.u8(0);
        }
        self.strings.push(text[..cut].to_owned());
        let number = self.strings.len() as u8;
        self.u8(number)
    }

    fn finish(&self, out: &mut Tables) {
        let start = out.bytes.len();
        out.bytes.extend_from_slice(&self.bytes);
        out.bytes[start + 1] = self.bytes.len() as u8;
        for text in &self.strings {
            out.bytes.extend_from_slice(text.as_bytes());
            out.bytes.push(0);
        }
        if self.strings.is_empty() {
            out.bytes.push(0);
        }
        out.bytes.push(0);
        out.count += 1;
        out.longest = out.longest.max(out.bytes.len() - start);
    }
}

#[derive(Default)]
struct Tables {
    bytes: Vec<u8>,
    count: u16,
    longest: usize,
}

/// The UUID as type 1 stores it: the first three fields little endian (7.2.1).
fn wire_uuid(text_order: [u8; 16]) -> [u8; 16] {
    let mut bytes = text_order;
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// Builds all structures.
pub fn build(config: &SmbiosConfig) -> SmbiosFiles {
    let mut out = Tables::default();
    machine(config, &mut out);
    processors(config, &mut out);
    memory(config, &mut out);
    // System boot information: no errors.
    Structure::new(32, handle::BOOT).raw(&[0; 7]).finish(&mut out);
    Structure::new(127, handle::END).finish(&mut out);
    SmbiosFiles { anchor: anchor(&out), tables: out.bytes }
}

/// Types 0, 1, 2, 3 and 11.
fn machine(config: &SmbiosConfig, out: &mut Tables) {
    let dmi = &config.dmi;
    Structure::new(0, handle::BIOS)
        .text(&dmi.bios_vendor)
        .text(&dmi.bios_version)
        .u16(0xe000)
        .text(&dmi.bios_release_date)
        // ROM size in units of 64 KiB less one.
        .u8(1)
        // ISA, PCI, boot from CD, selectable boot.
        .raw(&(1u64 << 4 | 1 << 7 | 1 << 15 | 1 << 16).to_le_bytes())
        // ACPI; "this describes a virtual machine".
        .raw(&[0x01, 0x10])
        .u8(dmi.bios_release_major)
        .u8(dmi.bios_release_minor)
        .u8(dmi.bios_firmware_major)
        .u8(dmi.bios_firmware_minor)
        .finish(out);
    Structure::new(1, handle::SYSTEM)
        .text(&dmi.system_vendor)
        .text(&dmi.system_product)
        .text(&dmi.system_version)
        .text(&dmi.system_serial)
        .raw(&wire_uuid(dmi.system_uuid.unwrap_or(config.uuid)))
        // Woken by the power switch.
        .u8(6)
        .text(&dmi.system_sku)
        .text(&dmi.system_family)
        .finish(out);
    Structure::new(2, handle::BOARD)
        .text(&dmi.board_vendor)
        .text(&dmi.board_product)
        .text(&dmi.board_version)
        .text(&dmi.board_serial)
        .text(&dmi.board_asset_tag)
        // A hosting board.
        .u8(1)
        .text(&dmi.board_loc_in_chass)
        .u16(handle::CHASSIS)
        .u8(dmi.board_board_type)
        .u8(0)
        .finish(out);
    Structure::new(3, handle::CHASSIS)
        .text(&dmi.chassis_vendor)
        .u8(dmi.chassis_type)
        .text(&dmi.chassis_version)
        .text(&dmi.chassis_serial)
        .text(&dmi.chassis_asset_tag)
        // Boot-up, power supply and thermal state: safe; security: none.
        .raw(&[3, 3, 3, 3])
        .u32(0)
        // Height, power cords, contained elements and the length of their records.
        .raw(&[0; 4])
        .finish(out);
    let mut oem = Structure::new(11, handle::OEM);
    let strings = [("vboxVer_", &dmi.oem_vbox_ver), ("vboxRev_", &dmi.oem_vbox_rev)]
        .map(|(name, v)| format!("{name}{v}"));
    // The count and the strings; they have no number bytes of their own.
    oem.u8(strings.len() as u8);
    oem.strings = strings.to_vec();
    oem.finish(out);
}

/// Type 4, one for each vCPU: each is a package of its own.
fn processors(config: &SmbiosConfig, out: &mut Tables) {
    const NO_CACHE: u16 = 0xffff;
    for cpu in 0..config.cpus as u16 {
        let [eax, edx] = config.processor_id;
        Structure::new(4, handle::PROCESSOR + cpu)
            .text(&format!("CPU {cpu}"))
            // Central processor of an unknown family.
            .u8(3)
            .u8(2)
            .text(&config.dmi.proc_manufacturer)
            .u32(eax)
            .u32(edx)
            .text(&config.dmi.proc_version)
            // Voltage unknown, external clock unknown, maximal and present speed.
            .u8(0)
            .u16(0)
            .u16(config.mhz)
            .u16(config.mhz)
            // Socket populated, enabled; upgrade: none.
            .u8(0x41)
            .u8(6)
            .u16(NO_CACHE)
            .u16(NO_CACHE)
            .u16(NO_CACHE)
            .raw(&[0; 3])
            // Cores, enabled cores, threads; 64-bit capable.
            .raw(&[1, 1, 1])
            .u16(1 << 2)
            .finish(out);
    }
}

/// Types 16, 17 and 19.
fn memory(config: &SmbiosConfig, out: &mut Tables) {
    const KIB: u64 = ByteSize::KIB;
    let ram = config.ram.0;
    let modules = ram.div_ceil(MODULE).clamp(1, 0x100);
    let kib = |bytes: u64| u32::try_from(bytes / KIB).unwrap_or(u32::MAX);
    Structure::new(16, handle::MEMORY_ARRAY)
        // On the board, system memory, no error correction.
        .raw(&[3, 3, 3])
        .u32(kib(ram).min(0x8000_0000))
        .u16(NO_ERROR_HANDLE)
        .u16(modules as u16)
        .finish(out);
    for module in 0..modules {
        let size = (ram - module * MODULE).min(MODULE);
        Structure::new(17, handle::MEMORY_DEVICE + module as u16)
            .u16(handle::MEMORY_ARRAY)
            .u16(NO_ERROR_HANDLE)
            .u16(64)
            .u16(64)
            .u16((size / ByteSize::MIB) as u16)
            // DIMM, no set.
            .u8(9)
            .u8(0)
            .text(&format!("DIMM {module}"))
            .text("")
            // RAM, "other" details, speed unknown.
            .u8(7)
            .u16(1 << 1)
            .u16(0)
            .raw(&[0; 4])
            .finish(out);
    }
    let (low, high) = memory_map::split_ram(config.ram);
    let ranges = [(0, low), (memory_map::HIGH_RAM.0, high)];
    for (i, (start, len)) in (0u16..).zip(ranges.into_iter().filter(|(_, len)| *len > 0)) {
        Structure::new(19, handle::MEMORY_ADDRESS + i)
            .u32(kib(start))
            .u32(kib(start + len - 1))
            .u16(handle::MEMORY_ARRAY)
            .u8(1)
            .finish(out);
    }
}

/// The entry point (5.2.1) without address and checksums.
fn anchor(tables: &Tables) -> Vec<u8> {
    const LENGTH: usize = 0x1f;
    let mut bytes = b"_SM_\0".to_vec();
    bytes.extend_from_slice(&[LENGTH as u8, 2, 5]);
    bytes.extend_from_slice(&(tables.longest as u16).to_le_bytes());
    bytes.extend_from_slice(&[0; 6]);
    bytes.extend_from_slice(b"_DMI_\0");
    bytes.extend_from_slice(&(tables.bytes.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&tables.count.to_le_bytes());
    bytes.push(0x25);
    debug_assert_eq!(bytes.len(), LENGTH);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> SmbiosConfig {
        SmbiosConfig {
            uuid: *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff",
            cpus: 2,
            processor_id: [0x6_0fb1, 0x178b_fbff],
            mhz: 2500,
            ram: ByteSize::mib(20 << 10),
            dmi: Dmi::default(),
        }
    }

    /// Type, formatted area and strings of every structure.
    fn parse(files: &SmbiosFiles) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut list = vec![];
        let mut rest = &files.tables[..];
        while !rest.is_empty() {
            let (area, mut tail) = rest.split_at(usize::from(rest[1]));
            let mut strings = vec![];
            while tail[0] != 0 {
                let end = tail.iter().position(|b| *b == 0).unwrap();
                strings.push(String::from_utf8(tail[..end].to_vec()).unwrap());
                tail = &tail[end + 1..];
            }
            rest = &tail[if strings.is_empty() { 2 } else { 1 }..];
            list.push((area[0], area.to_vec(), strings));
        }
        list
    }

    #[test]
    fn the_structures_are_those_of_a_pc_with_virtualbox_strings() {
        let files = build(&config());
        let list = parse(&files);
        let kinds: Vec<_> = list.iter().map(|s| s.0).collect();
        assert_eq!(kinds, [0, 1, 2, 3, 11, 4, 4, 16, 17, 17, 19, 19, 32, 127]);
        let lengths: Vec<_> = list.iter().map(|s| s.1.len()).collect();
        assert_eq!(lengths, [0x18, 0x1b, 0x0f, 0x15, 5, 0x28, 0x28, 0x0f, 0x1b, 0x1b, 0x0f, 0x0f, 0x0b, 4]);
        assert_eq!(list[0].2, ["innotek GmbH", "VirtualBox", "12/01/2006"]);
        assert_eq!(list[1].2, ["innotek GmbH", "VirtualBox", "1.2", "0", "Virtual Machine"]);
        assert_eq!(list[1].1[8..24], *b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
        assert_eq!(list[1].1[25..27], [0, 5], "an empty string has no number");
        assert_eq!(list[4].2, ["vboxVer_", "vboxRev_"]);
        assert_eq!(list[8].1[12..14], 0x4000u16.to_le_bytes());
        assert_eq!(list[9].1[12..14], 0x1000u16.to_le_bytes());
        assert_eq!(list[11].1[4..8], 0x40_0000u32.to_le_bytes());
    }

    #[test]
    fn the_anchor_tells_size_and_count() {
        let files = build(&config());
        assert_eq!(
            (files.anchor.len(), &files.anchor[..4], &files.anchor[16..21]),
            (31, &b"_SM_"[..], &b"_DMI_"[..])
        );
        assert_eq!(files.anchor[22..24], (files.tables.len() as u16).to_le_bytes());
        assert_eq!(files.anchor[28..30], 14u16.to_le_bytes());
    }

    #[test]
    fn an_owner_s_strings_replace_ours_and_cannot_break_the_structure() {
        let dmi = Dmi {
            system_vendor: "a\0b\n".into(),
            system_product: "ü".repeat(40),
            system_uuid: Some([7; 16]),
            ..Dmi::default()
        };
        let list = parse(&build(&SmbiosConfig { dmi, ..config() }));
        assert_eq!(list[1].2[0], "ab");
        assert_eq!(list[1].2[1], "ü".repeat(32));
        assert_eq!(list[1].1[8..24], [7; 16]);
    }
}
