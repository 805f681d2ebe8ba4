//! The static ACPI tables (ACPI 6.4, chapter 5): RSDP, RSDT, XSDT, FADT, FACS, MADT, HPET.
//!
//! OEM id and table ids are those of VirtualBox. The FADT is of revision 3 (ACPI 2.0), which every operating system since Windows XP
//! reads; the RSDT is there for older ones and for SeaBIOS.

use crate::acpi_pm;
use crate::memory_map::{HPET, IO_APIC, LOCAL_APIC, PM_BASE};
use crate::tables::{Loader, Zone, dsdt};

/// The fw_cfg file with the root pointer.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// The fw_cfg file with all other tables.
pub const TABLES_FILE: &str = "etc/acpi/tables";

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct AcpiConfig {
    /// vCPUs with local APIC ids from 0 on, with those that may come later.
    pub cpus: u32,
    /// Where CPUs come and go ([`crate::cpu_hotplug`]): those that are there, one bit each.
    pub hotplug: Option<u32>,
    pub io_apic: bool,
    pub hpet: bool,
    /// The power management timer has 32 bits.
    pub wide_timer: bool,
    /// First address past low RAM: PCI memory may lie from there on.
    pub low_ram_end: u64,
    /// Serial ports: first I/O port and ISA interrupt, in the order of COM1 to COM4.
    pub serial: Vec<(u16, u8)>,
    pub floppy: bool,
}

/// What the firmware gets.
#[derive(Clone, Debug)]
pub struct AcpiFiles {
    pub rsdp: Vec<u8>,
    pub tables: Vec<u8>,
    pub loader: Loader,
}

const OEM_ID: [u8; 6] = *b"VBOX  ";
const CREATOR: [u8; 4] = *b"BXWD";

/// Length of the header that all tables but RSDP and FACS share (5.2.6).
const HEADER: usize = 36;
const LENGTH_AT: usize = 4;
const CHECKSUM_AT: u32 = 9;

/// A table being written. Its length and checksum are put in when it is added to the file.
struct Table(Vec<u8>);

impl Table {
    fn new(signature: [u8; 4], revision: u8, id: [u8; 8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&signature);
        bytes.extend_from_slice(&[0; 4]);
        bytes.push(revision);
        bytes.push(0);
        bytes.extend_from_slice(&OEM_ID);
        bytes.extend_from_slice(&id);
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&CREATOR);
        bytes.extend_from_slice(&1u32.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER);
        Self(bytes)
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// A generic address structure (5.2.3.2): a block of `bits` in I/O space. Port 0 stands for "not there".
    fn io(self, port: u16, bits: u8) -> Self {
        if port == 0 {
            return self.u32(0).u64(0);
        }
        self.u8(1).u8(bits).u8(0).u8(bits.min(32).ilog2() as u8 - 2).u64(port.into())
    }

    /// A generic address structure: 64 bits of memory.
    fn memory(self, address: u64) -> Self {
        self.u8(0).u8(64).u8(0).u8(0).u64(address)
    }
}

/// The tables file and its script.
struct File {
    bytes: Vec<u8>,
    loader: Loader,
}

impl File {
    /// Appends a table; `pointers` are offsets in it of 32-bit (4) or 64-bit (8) pointers into this file. Returns its offset.
    fn add(&mut self, table: Table, pointers: &[(u32, u8)]) -> u32 {
        let Table(mut table) = table;
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let at = self.bytes.len() as u32;
        let len = table.len() as u32;
        table[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(&table);
        for &(offset, size) in pointers {
            self.loader.add_pointer(TABLES_FILE, TABLES_FILE, at + offset, size);
        }
        self.loader.add_checksum(TABLES_FILE, at + CHECKSUM_AT, at, len);
        at
    }
}

/// Builds all tables.
pub fn build(config: &AcpiConfig) -> AcpiFiles {
    let mut file = File { bytes: Vec::new(), loader: Loader::default() };
    file.loader.allocate(RSDP_FILE, 16, Zone::FSegment);
    file.loader.allocate(TABLES_FILE, 64, Zone::High);

    // The FACS is aligned to 64 bytes by being first.
    let facs_at = file.bytes.len() as u32;
    file.bytes.extend_from_slice(&facs());
    let mut definition = Table::new(*b"DSDT", 2, *b"VBOXDSDT");
    definition.0.extend_from_slice(&dsdt::build(config));
    let dsdt_at = file.add(definition, &[]);

    let mut list = vec![file.add(
        fadt(config, facs_at, dsdt_at),
        // FIRMWARE_CTRL, DSDT, X_DSDT.
        &[(36, 4), (40, 4), (140, 8)],
    )];
    if config.io_apic {
        list.push(file.add(madt(config), &[]));
    }
    if config.hpet {
        list.push(file.add(hpet(), &[]));
    }

    let mut rsdt = Table::new(*b"RSDT", 1, *b"VBOXRSDT");
    let mut xsdt = Table::new(*b"XSDT", 1, *b"VBOXXSDT");
    let (mut narrow, mut wide) = (Vec::new(), Vec::new());
    for (i, &at) in (0u32..).zip(&list) {
        rsdt = rsdt.u32(at);
        xsdt = xsdt.u64(at.into());
        narrow.push((HEADER as u32 + 4 * i, 4));
        wide.push((HEADER as u32 + 8 * i, 8));
    }
    let rsdt_at = file.add(rsdt, &narrow);
    let xsdt_at = file.add(xsdt, &wide);

    let rsdp = rsdp(rsdt_at, xsdt_at);
    file.loader.add_pointer(RSDP_FILE, TABLES_FILE, 16, 4);
    file.loader.add_pointer(RSDP_FILE, TABLES_FILE, 24, 8);
    file.loader.add_checksum(RSDP_FILE, 8, 0, 20);
    file.loader.add_checksum(RSDP_FILE, 32, 0, 36);
    AcpiFiles { rsdp, tables: file.bytes, loader: file.loader }
}

/// Root System Description Pointer (5.2.5.3), revision 2.
fn rsdp(rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut bytes = b"RSD PTR \0".to_vec();
    bytes.extend_from_slice(&OEM_ID);
    bytes.push(2);
    bytes.extend_from_slice(&rsdt.to_le_bytes());
    bytes.extend_from_slice(&36u32.to_le_bytes());
    bytes.extend_from_slice(&u64::from(xsdt).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

/// Firmware ACPI Control Structure (5.2.10), version 1.
fn facs() -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4] = 64;
    bytes[32] = 1;
    bytes
}

/// Fixed ACPI Description Table (5.2.9), revision 3.
fn fadt(config: &AcpiConfig, facs: u32, dsdt: u32) -> Table {
    /// Preferred profile: desktop.
    const PROFILE: u8 = 1;
    /// C2 and C3 are not supported.
    const NO_C_STATE: u16 = 0x0fff;
    /// Legacy devices and an 8042 are there.
    const BOOT_FLAGS: u16 = 0b11;
    const WBINVD: u32 = 1 << 0;
    const PROC_C1: u32 = 1 << 2;
    /// The clock cannot wake the machine through the fixed registers.
    const FIX_RTC: u32 = 1 << 6;
    const TIMER_32: u32 = 1 << 8;
    const RESET_REGISTER: u32 = 1 << 10;
    // Bits 4 and 5 clear: power and sleep button are fixed hardware.
    let flags = WBINVD | PROC_C1 | FIX_RTC | RESET_REGISTER | if config.wide_timer { TIMER_32 } else { 0 };
    let block = |offset: u16| u32::from(PM_BASE + offset);
    let table = Table::new(*b"FACP", 3, *b"VBOXFACP")
        .u32(facs)
        .u32(dsdt)
        .u8(0)
        .u8(PROFILE)
        .u16(acpi_pm::SCI_IRQ.into())
        .u32(acpi_pm::SMI_COMMAND.into())
        .u8(acpi_pm::ACPI_ENABLE)
        .u8(acpi_pm::ACPI_DISABLE)
        .u16(0)
        .u32(block(0x00))
        .u32(0)
        .u32(block(0x04))
        .u32(0)
        .u32(0)
        .u32(block(0x08))
        .u32(block(0x0c))
        .u32(0)
        // Lengths: PM1 event, PM1 control, PM2 control, timer, GPE0, GPE1; GPE1 base; C-state control.
        .u8(4)
        .u8(2)
        .u8(0)
        .u8(4)
        .u8(4)
        .u8(0)
        .u8(0)
        .u8(0)
        .u16(NO_C_STATE)
        .u16(NO_C_STATE)
        // Cache flush size and stride, duty cycle offset and width, day and month alarm.
        .u16(0)
        .u16(0)
        .u8(0)
        .u8(0)
        .u8(0)
        .u8(0)
        // The century byte in CMOS.
        .u8(0x32)
        .u16(BOOT_FLAGS)
        .u8(0)
        .u32(flags)
        // Reset register and its value.
        .io(0xcf9, 8)
        .u8(0x06)
        .u8(0)
        .u16(0);
    debug_assert_eq!(table.0.len(), 132);
    table
        .u64(0)
        .u64(dsdt.into())
        .io(PM_BASE, 32)
        .io(0, 0)
        .io(PM_BASE + 0x04, 16)
        .io(0, 0)
        .io(0, 0)
        .io(PM_BASE + 0x08, 32)
        .io(PM_BASE + 0x0c, 32)
        .io(0, 0)
}

/// Multiple APIC Description Table (5.2.12).
fn madt(config: &AcpiConfig) -> Table {
    /// The machine has an 8259 pair too.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    /// Interrupt flags: active high, level-triggered.
    const HIGH_LEVEL: u16 = 0b1101;
    let mut table = Table::new(*b"APIC", 2, *b"VBOXAPIC").u32(LOCAL_APIC.0 as u32).u32(PCAT_COMPAT);
    for cpu in 0..config.cpus {
        let there = config.hotplug.is_none_or(|present| present & 1 << cpu != 0);
        // Type 0: processor local APIC.
        table = table.u8(0).u8(8).u8(cpu as u8).u8(cpu as u8).u32(if there { ENABLED } else { 0 });
    }
    // Type 1: I/O APIC, id 0 as in SeaBIOS's MP table, inputs from 0 on.
    table = table.u8(1).u8(12).u8(0).u8(0).u32(IO_APIC.0 as u32).u32(0);
    // Type 2: interrupt source overrides for the timer and the SCI.
    table = table.u8(2).u8(10).u8(0).u8(0).u32(2).u16(0);
    table = table.u8(2).u8(10).u8(0).u8(acpi_pm::SCI_IRQ).u32(acpi_pm::SCI_IRQ.into()).u16(HIGH_LEVEL);
    // Type 4: LINT1 of all processors is NMI.
    table.u8(4).u8(6).u8(0xff).u16(0).u8(1)
}

/// HPET description table (IA-PC HPET specification 1.0a, 3.2.4).
fn hpet() -> Table {
    Table::new(*b"HPET", 1, *b"VBOXHPET")
        .u32(crate::hpet::CAPABILITIES as u32)
        .memory(HPET.0)
        .u8(0)
        // The shortest period that loses no tick, in ticks.
        .u16(128)
        .u8(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tables::sum;

    pub(crate) fn config() -> AcpiConfig {
        AcpiConfig {
            cpus: 4,
            hotplug: None,
            io_apic: true,
            hpet: true,
            wide_timer: true,
            low_ram_end: 0x2000_0000,
            serial: vec![(0x3f8, 4), (0x2f8, 3)],
            floppy: true,
        }
    }

    /// Does what the firmware does, with the tables placed at `base` and the root pointer at `root`.
    pub(crate) fn load(files: &AcpiFiles, root: u64, base: u64) -> (Vec<u8>, Vec<u8>) {
        let (mut rsdp, mut tables) = (files.rsdp.clone(), files.tables.clone());
        let script = files.loader.clone().into_bytes();
        assert_eq!(script.len() % ENTRY, 0);
        const ENTRY: usize = 128;
        for entry in script.chunks(ENTRY) {
            let name = |at: usize| {
                let text = &entry[at..at + 56];
                std::str::from_utf8(&text[..text.iter().position(|b| *b == 0).unwrap()]).unwrap()
            };
            let number = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap()) as usize;
            let is_rsdp = name(4) == RSDP_FILE;
            assert!(is_rsdp || name(4) == TABLES_FILE);
            let file = if is_rsdp { &mut rsdp } else { &mut tables };
            match number(0) {
                1 => assert!(base.is_multiple_of(number(60) as u64)),
                2 => {
                    let target = if name(60) == RSDP_FILE { root } else { base };
                    let (at, size) = (number(116), usize::from(entry[120]));
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(&file[at..at + size]);
                    let value = (u64::from_le_bytes(value) + target).to_le_bytes();
                    file[at..at + size].copy_from_slice(&value[..size]);
                }
                3 => {
                    let (at, start, len) = (number(60), number(64), number(68));
                    assert_eq!(file[at], 0);
                    file[at] = file[at].wrapping_sub(sum(&file[start..start + len]));
                }
                other => panic!("command {other}"),
            }
        }
        (rsdp, tables)
    }

    /// The table at guest address `at`, checked.
    fn table(tables: &[u8], base: u64, at: u64) -> &[u8] {
        let at = (at - base) as usize;
        let len = u32::from_le_bytes(tables[at + 4..at + 8].try_into().unwrap()) as usize;
        let table = &tables[at..at + len];
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
        table
    }

    fn u32_at(bytes: &[u8], at: usize) -> u64 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()).into()
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_loaded_tables_are_linked_and_summed() {
        const BASE: u64 = 0x1ffe_0000;
        let (rsdp, tables) = load(&build(&config()), 0xf_5000, BASE);
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let rsdt = table(&tables, BASE, u32_at(&rsdp, 16));
        let xsdt = table(&tables, BASE, u64_at(&rsdp, 24));
        let mut names = vec![];
        for i in 0..(rsdt.len() - HEADER) / 4 {
            let at = u32_at(rsdt, HEADER + 4 * i);
            assert_eq!(at, u64_at(xsdt, HEADER + 8 * i));
            names.push(&table(&tables, BASE, at)[..4]);
        }
        assert_eq!(names, [b"FACP", b"APIC", b"HPET"]);
        let fadt = table(&tables, BASE, u32_at(rsdt, HEADER));
        assert_eq!(fadt.len(), 244);
        let facs = (u32_at(fadt, 36) - BASE) as usize;
        assert_eq!((&tables[facs..facs + 4], facs % 64), (&b"FACS"[..], 0));
        assert_eq!(u32_at(fadt, 40), u64_at(fadt, 140));
        assert_eq!(&table(&tables, BASE, u32_at(fadt, 40))[..4], b"DSDT");
        assert_eq!(fadt[116..129], *b"\x01\x08\x00\x01\xf9\x0c\0\0\0\0\0\0\x06");
        assert_eq!(fadt[208..220], *b"\x01\x20\x00\x03\x08\x06\0\0\0\0\0\0");
    }

    #[test]
    fn processors_that_may_come_later_are_in_the_madt_and_not_enabled() {
        let Table(madt) = madt(&AcpiConfig { hotplug: Some(0b101), ..config() });
        let flags = (0..4).map(|cpu| madt[HEADER + 8 + 8 * cpu + 4]).collect::<Vec<_>>();
        assert_eq!(flags, [1, 0, 1, 0]);
    }

    #[test]
    fn the_madt_has_every_cpu_the_io_apic_and_the_overrides() {
        let Table(madt) = madt(&AcpiConfig { cpus: 32, ..config() });
        let mut at = HEADER + 8;
        let mut kinds = vec![];
        while at < madt.len() {
            kinds.push(madt[at]);
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(at, madt.len());
        assert_eq!(kinds, [vec![0; 32], vec![1, 2, 2, 4]].concat());
    }

    #[test]
    fn without_an_io_apic_there_is_no_madt() {
        let files = build(&AcpiConfig { cpus: 1, io_apic: false, hpet: false, ..config() });
        let has = |id: &[u8; 8]| files.tables.windows(8).any(|w| w == id);
        assert!(has(b"VBOXFACP") && !has(b"VBOXAPIC") && !has(b"VBOXHPET"));
    }
}
