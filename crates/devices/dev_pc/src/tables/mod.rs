//! What the firmware hands to operating systems about the machine: ACPI tables ([`acpi`], [`dsdt`]) and SMBIOS structures ([`smbios`]).
//!
//! They are built here and travel through fw_cfg. Addresses in ACPI tables are not known before the firmware has placed them, so a
//! script ([`Loader`]) tells it what to allocate, which pointers to relocate and which checksums to compute (QEMU
//! `docs/specs/fw_cfg.rst`; SeaBIOS `src/fw/romfile_loader.c`). MP tables are made by SeaBIOS itself.

pub mod acpi;
pub mod dsdt;
pub mod smbios;

use crate::fw_cfg::FwCfg;

/// Where the firmware allocates a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Zone {
    /// High memory, reserved as ACPI data.
    High = 1,
    /// 0xf0000–0xfffff, where operating systems look for the root pointer.
    FSegment = 2,
}

/// Size of one command of the script.
const ENTRY_SIZE: usize = 128;
const NAME_SIZE: usize = 56;

/// The script for the firmware: entries of 128 bytes, a 32-bit command and its arguments, little endian.
#[derive(Clone, Debug, Default)]
pub struct Loader {
    script: Vec<u8>,
}

impl Loader {
    fn entry(&mut self, command: u32, names: &[&str], rest: &[u8]) {
        let start = self.script.len();
        self.script.extend_from_slice(&command.to_le_bytes());
        for name in names {
            let mut field = [0; NAME_SIZE];
            field[..name.len()].copy_from_slice(name.as_bytes());
            self.script.extend_from_slice(&field);
        }
        self.script.extend_from_slice(rest);
        self.script.resize(start + ENTRY_SIZE, 0);
    }

    /// Loads `file` into memory aligned to `align`, a power of two.
    pub fn allocate(&mut self, file: &str, align: u32, zone: Zone) {
        let mut rest = align.to_le_bytes().to_vec();
        rest.push(zone as u8);
        self.entry(1, &[file], &rest);
    }

    /// Adds the address of `target` to the `size` bytes at `offset` of `file`.
    pub fn add_pointer(&mut self, file: &str, target: &str, offset: u32, size: u8) {
        let mut rest = offset.to_le_bytes().to_vec();
        rest.push(size);
        self.entry(2, &[file, target], &rest);
    }

    /// Makes the bytes `start..start + len` of `file` sum up to zero by the byte at `offset`, which must be zero so far.
    pub fn add_checksum(&mut self, file: &str, offset: u32, start: u32, len: u32) {
        let rest = [offset, start, len].map(u32::to_le_bytes);
        self.entry(3, &[file], rest.as_flattened());
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.script
    }
}

/// Puts the ACPI tables for `config` into fw_cfg.
pub fn add_acpi(fw_cfg: &mut FwCfg, config: &acpi::AcpiConfig) {
    let files = acpi::build(config);
    fw_cfg.add_file(acpi::RSDP_FILE, files.rsdp);
    fw_cfg.add_file(acpi::TABLES_FILE, files.tables);
    fw_cfg.add_file("etc/table-loader", files.loader.into_bytes());
}

/// Puts the SMBIOS structures for `config` into fw_cfg.
pub fn add_smbios(fw_cfg: &mut FwCfg, config: &smbios::SmbiosConfig) {
    let files = smbios::build(config);
    fw_cfg.add_file("etc/smbios/smbios-anchor", files.anchor);
    fw_cfg.add_file("etc/smbios/smbios-tables", files.tables);
}

/// Sum of all bytes, which is zero for a table with a right checksum.
#[cfg(test)]
fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
