//! The DSDT: the machine's devices in ACPI machine language.
//!
//! ```text
//! \_S0, \_S5        sleep states of `acpi_pm`
//! \_PR.Cnnn         processors; where they come and go, with methods that read `cpu_hotplug`'s registers
//! \_SB.CPHP, CPUS   those registers, and whether a processor is there
//! \_GPE._L01        tells the operating system of processors that have come or are to go
//! \_PIC, \PICM      0 while the 8259 pair is used, 1 in APIC mode
//! \_SB.PCI0         root bridge: windows, _PRT
//! \_SB.PCI0.ISA     PIIX3 with the ISA devices
//! \_SB.LNKA–LNKD    PIRQ route registers of the PIIX3
//! \_SB.HPET         if there is one
//! ```
//!
//! The _PRT follows the wiring of [`crate::piix3`]: link devices with the 8259 pair, I/O APIC inputs 16–23 in APIC mode.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, CreateDWordField, Device, EISAName, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Or, Package, PackageBuilder,
    Path, ResourceTemplate, Return, Scope, ShiftRight, Store,
};
use acpi_tables::{Aml, AmlSink};

use crate::acpi_pm::S5_TYPE;
use crate::cpu_hotplug;
use crate::memory_map::{HPET, IO_APIC, LOCAL_APIC, PCI_WINDOW_END, PM_BASE, SMBUS_BASE};
use crate::piix3::{apic_input, pirq};
use crate::tables::acpi::AcpiConfig;

/// Interrupts that the link devices offer.
const LINK_IRQS: [u32; 3] = [5, 10, 11];

/// Bytes that the crate has no type for.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// IRQ descriptor without flags: edge, active high, exclusive (6.4.2.1).
fn irq(number: u8) -> Raw {
    let mask = (1u16 << number).to_le_bytes();
    Raw(vec![0x22, mask[0], mask[1]])
}

/// DMA descriptor: compatibility mode, 8 bits (6.4.2.2).
fn dma8(channel: u8) -> Raw {
    Raw(vec![0x2a, 1 << channel, 0])
}

/// DMA descriptor for the cascade: 16 bits.
fn dma16(channel: u8) -> Raw {
    Raw(vec![0x2a, 1 << channel, 0x02])
}

/// Extended interrupt descriptor with several choices: consumer, level, active high, shared (6.4.3.6).
fn interrupts(numbers: &[u32]) -> Raw {
    let mut bytes = vec![0x89];
    bytes.extend_from_slice(&(2 + 4 * numbers.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&[0b1001, numbers.len() as u8]);
    numbers.iter().for_each(|n| bytes.extend_from_slice(&n.to_le_bytes()));
    Raw(bytes)
}

fn ports(first: u16, count: u8) -> IO {
    IO::new(first, first, 1, count)
}

/// The encoded length of a package of `len` bytes without the encoding itself (20.2.4).
fn package_length(len: usize) -> Vec<u8> {
    match len + 1 {
        total @ 0..=0x3f => vec![total as u8],
        _ => {
            // Two bytes carry lengths to 4095: a processor's methods take some hundred.
            let total = len + 2;
            vec![0x40 | total as u8 & 0xf, (total >> 4) as u8]
        }
    }
}

fn processor_name(id: u8) -> String {
    format!("C{id:03}")
}

/// A processor object (ACPI 5.1, 19.5.98). Newer systems take devices instead, but Windows before 8 knows only these.
fn processor(id: u8, hotplug: bool) -> Raw {
    let mut body = processor_name(id).into_bytes();
    body.extend_from_slice(&[id, 0, 0, 0, 0, 0]);
    if hotplug {
        body.extend_from_slice(&processor_methods(id).0);
    }
    let mut bytes = vec![0x5b, 0x83];
    bytes.extend(package_length(body.len()));
    bytes.extend_from_slice(&body);
    Raw(bytes)
}

/// _STA, _MAT (5.2.12.2: as the MADT has it) and, but for the bootstrap processor, _EJ0.
fn processor_methods(id: u8) -> Raw {
    let status = MethodCall::new(Path::new("\\_SB_.CPUS"), vec![&id]);
    let entry = |flags: u8| BufferData::new(vec![0, 8, id, id, flags, 0, 0, 0]);
    let mut out = Vec::new();
    Method::new(
        "_STA".into(),
        0,
        false,
        vec![&If::new(&status, vec![&Return::new(&0xfu8)]), &Return::new(&0u8)],
    )
    .to_aml_bytes(&mut out);
    Method::new(
        "_MAT".into(),
        0,
        false,
        vec![&If::new(&status, vec![&Return::new(&entry(1))]), &Return::new(&entry(0))],
    )
    .to_aml_bytes(&mut out);
    if id > 0 {
        let register = Path::new("\\_SB_.CPLG");
        let let_go = Store::new(&register, &id);
        Method::new("_EJ0".into(), 1, false, vec![&let_go]).to_aml_bytes(&mut out);
    }
    Raw(out)
}

/// The registers of [`cpu_hotplug`], the method that looks whether a processor is there, and the event's.
fn hotplug(cpus: u32) -> Raw {
    let field = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    let region =
        OpRegion::new("CPHP".into(), OpRegionSpace::SystemIO, &cpu_hotplug::BASE, &cpu_hotplug::PORTS);
    let fields = Field::new(
        "CPHP".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![field(b"CPPR"), field(b"CPCO"), field(b"CPTG"), field(b"CPLG")],
    );
    let (one, shown) = (1u8, Local(0));
    let (there, answer) = (Path::new("CPPR"), Return::new(&shown));
    let shifted = ShiftRight::new(&shown, &there, &Arg(0));
    let bit = And::new(&shown, &shown, &one);
    let is_there = Method::new("CPUS".into(), 1, false, vec![&shifted, &bit, &answer]);
    let mut out = Vec::new();
    Scope::new("\\_SB_".into(), vec![&region, &fields, &is_there]).to_aml_bytes(&mut out);
    // Device check and eject request (5.6.6).
    let mut steps: Vec<Raw> = Vec::new();
    for (register, what) in [("\\_SB_.CPCO", 1u8), ("\\_SB_.CPTG", 3)] {
        let register = Path::new(register);
        steps.push(raw(&Store::new(&shown, &register)));
        // Those noticed; what comes meanwhile keeps the event up.
        steps.push(raw(&Store::new(&register, &shown)));
        for id in 1..cpus.min(32) {
            let mask: u32 = 1 << id;
            let object = Path::new(&format!("\\_PR_.{}", processor_name(id as u8)));
            let notify = Notify::new(&object, &what);
            steps.push(raw(&If::new(&And::new(&Local(1), &shown, &mask), vec![&notify])));
        }
    }
    let children = steps.iter().map(|step| step as &dyn Aml).collect();
    let name = format!("_L{:02X}", cpu_hotplug::EVENT);
    let event = Method::new(Path::new(&name), 0, true, children);
    Scope::new("\\_GPE".into(), vec![&event]).to_aml_bytes(&mut out);
    Raw(out)
}

/// A package of small integers.
fn numbers(values: &[u32]) -> PackageBuilder {
    let mut package = PackageBuilder::new();
    values.iter().for_each(|value| package.add_element(value));
    package
}

/// An ISA device with an id and fixed resources.
fn isa_device(name: &str, id: &str, uid: Option<u8>, resources: Vec<&dyn Aml>) -> Raw {
    let id = EISAName::new(id);
    let (id, uid) = (Name::new("_HID".into(), &id), uid.map(|uid| Name::new("_UID".into(), &uid)));
    let crs = ResourceTemplate::new(resources);
    let crs = Name::new("_CRS".into(), &crs);
    let mut children: Vec<&dyn Aml> = vec![&id];
    children.extend(uid.iter().map(|uid| uid as &dyn Aml));
    children.push(&crs);
    raw(&Device::new(name.into(), children))
}

fn raw(item: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    item.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

/// The whole definition block without its table header.
pub fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut out = Vec::new();
    // SLP_TYP for PM1a and PM1b, two reserved. "Working" is 5 in the PIIX4.
    Name::new("\\_S0_".into(), &numbers(&[5, 5, 0, 0])).to_aml_bytes(&mut out);
    Name::new("\\_S5_".into(), &numbers(&[S5_TYPE.into(), S5_TYPE.into(), 0, 0])).to_aml_bytes(&mut out);
    Name::new("\\PICM".into(), &0u8).to_aml_bytes(&mut out);
    let picm = Path::new("\\PICM");
    Method::new("\\_PIC".into(), 1, false, vec![&Store::new(&picm, &Arg(0))]).to_aml_bytes(&mut out);
    let dynamic = config.hotplug.is_some();
    if dynamic {
        hotplug(config.cpus).to_aml_bytes(&mut out);
    }
    let processors: Vec<Raw> = (0..config.cpus).map(|id| processor(id as u8, dynamic)).collect();
    Scope::new("\\_PR_".into(), processors.iter().map(|p| p as &dyn Aml).collect()).to_aml_bytes(&mut out);
    let pci = root_bridge(config);
    let links: Vec<Raw> = (0..4).map(link).collect();
    let hpet = hpet();
    let mut children: Vec<&dyn Aml> = vec![&pci];
    children.extend(links.iter().map(|l| l as &dyn Aml));
    if config.hpet {
        children.push(&hpet);
    }
    Scope::new("\\_SB_".into(), children).to_aml_bytes(&mut out);
    out
}

/// `\_SB.PCI0`.
fn root_bridge(config: &AcpiConfig) -> Raw {
    let hid = EISAName::new("PNP0A03");
    let low = u32::try_from(config.low_ram_end).unwrap_or(u32::MAX).clamp(0x10_0000, 0xf000_0000);
    let crs = raw(&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, 255),
        &IO::new(0xcf8, 0xcf8, 1, 8),
        &AddressSpace::new_io(0u16, 0xcf7, None),
        &AddressSpace::new_io(0xd00u16, 0xffff, None),
        &AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0xa_0000u32, 0xb_ffff, None),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            low,
            PCI_WINDOW_END as u32 - 1,
            None,
        ),
    ]));
    raw(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &hid),
            &Name::new("_ADR".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &crs),
            &Name::new("PRTP".into(), &routes(|slot, pin| Route::Link(pirq(slot, pin)))),
            &Name::new("PRTA".into(), &routes(|slot, pin| Route::Input(apic_input(slot, pin)))),
            &Method::new(
                "_PRT".into(),
                0,
                false,
                vec![
                    &If::new(&Path::new("\\PICM"), vec![&Return::new(&Path::new("PRTA"))]),
                    &Return::new(&Path::new("PRTP")),
                ],
            ),
            &isa_bridge(config),
        ],
    ))
}

/// Where a PCI pin leads.
enum Route {
    Link(usize),
    Input(u32),
}

/// A routing package for the pins of slots 1–31 (6.2.13).
fn routes(route: impl Fn(u8, u8) -> Route) -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 1..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(slot) << 16 | 0xffff;
            match route(slot, pin) {
                Route::Link(number) => {
                    let link = Path::new(&format!("LNK{}", (b'A' + number as u8) as char));
                    table.add_element(&Package::new(vec![&address, &pin, &link, &0u8]));
                }
                Route::Input(input) => {
                    table.add_element(&Package::new(vec![&address, &pin, &0u8, &input]));
                }
            }
        }
    }
    table
}

/// `\_SB.LNKx` for PIRQ `number`.
fn link(number: usize) -> Raw {
    let letter = (b'A' + number as u8) as char;
    let hid = EISAName::new("PNP0C0F");
    let register = Path::new(&format!("\\_SB_.PCI0.ISA_.PRQ{letter}"));
    let disabled = And::new(&Local(0), &register, &0x80u8);
    let current = raw(&ResourceTemplate::new(vec![&Interrupt::new(true, false, false, true, 0)]));
    let irqw = Path::new("IRQW");
    raw(&Device::new(
        Path::new(&format!("LNK{letter}")),
        vec![
            &Name::new("_HID".into(), &hid),
            &Name::new("_UID".into(), &(number as u8 + 1)),
            &Name::new("_PRS".into(), &ResourceTemplate::new(vec![&interrupts(&LINK_IRQS)])),
            &Name::new("CRSB".into(), &current),
            &Method::new(
                "_STA".into(),
                0,
                false,
                vec![&disabled, &If::new(&Local(0), vec![&Return::new(&0x9u8)]), &Return::new(&0xbu8)],
            ),
            &Method::new("_DIS".into(), 0, false, vec![&Or::new(&register, &register, &0x80u8)]),
            // The interrupt number is at byte 5 of the descriptor; 0 while the pin is not routed.
            &Method::new(
                "_CRS".into(),
                0,
                true,
                vec![
                    &CreateDWordField::new(&irqw, &Path::new("CRSB"), &5u8),
                    &disabled,
                    &Store::new(&irqw, &0u8),
                    &If::new(&Equal::new(&Local(0), &0u8), vec![&And::new(&irqw, &register, &0x0fu8)]),
                    &Return::new(&Path::new("CRSB")),
                ],
            ),
            &Method::new(
                "_SRS".into(),
                1,
                true,
                vec![&CreateDWordField::new(&irqw, &Arg(0), &5u8), &Store::new(&register, &irqw)],
            ),
        ],
    ))
}

/// `\_SB.PCI0.ISA` with what hangs on it.
fn isa_bridge(config: &AcpiConfig) -> Raw {
    let field = |letter: u8| FieldEntry::Named([b'P', b'R', b'Q', letter], 8);
    let region = OpRegion::new("P40C".into(), OpRegionSpace::PCIConfig, &0x60u8, &0x04u8);
    let fields = Field::new(
        "P40C".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![field(b'A'), field(b'B'), field(b'C'), field(b'D')],
    );
    let mut devices = vec![
        isa_device("PIC_", "PNP0000", None, vec![&ports(0x20, 2), &ports(0xa0, 2), &irq(2)]),
        isa_device(
            "DMAC",
            "PNP0200",
            None,
            vec![&ports(0x00, 0x20), &ports(0x81, 0x0f), &ports(0xc0, 0x20), &dma16(4)],
        ),
        isa_device("RTC_", "PNP0B00", None, vec![&ports(0x70, 2), &irq(8)]),
        isa_device("TIMR", "PNP0100", None, vec![&ports(0x40, 4), &irq(0)]),
        isa_device("SPKR", "PNP0800", None, vec![&ports(0x61, 1)]),
        isa_device("FPU_", "PNP0C04", None, vec![&ports(0xf0, 1), &irq(13)]),
        isa_device("KBD_", "PNP0303", None, vec![&ports(0x60, 1), &ports(0x64, 1), &irq(1)]),
        isa_device("MOU_", "PNP0F03", None, vec![&irq(12)]),
        motherboard(config.hotplug.is_some()),
    ];
    let (low, dir, line, channel) = (ports(0x3f0, 6), ports(0x3f7, 1), irq(6), dma8(2));
    if config.floppy {
        // Port 0x3f6 is the IDE controller's.
        let resources: Vec<&dyn Aml> = vec![&low, &dir, &line, &channel];
        devices.push(isa_device("FDC0", "PNP0700", None, resources));
    }
    for (number, &(first, line)) in (1u8..).zip(config.serial.iter().take(9)) {
        let name = format!("COM{number}");
        devices.push(isa_device(&name, "PNP0501", Some(number), vec![&ports(first, 8), &irq(line)]));
    }
    let address = Name::new("_ADR".into(), &0x0001_0000u32);
    let mut children: Vec<&dyn Aml> = vec![&address, &region, &fields];
    children.extend(devices.iter().map(|d| d as &dyn Aml));
    raw(&Device::new("ISA_".into(), children))
}

/// Ports and memory that no other device names, so that nobody puts something else there.
fn motherboard(hotplug: bool) -> Raw {
    let (post, fast_a20, apm, edge) = (ports(0x80, 1), ports(0x92, 1), ports(0xb2, 2), ports(0x4d0, 2));
    let (fw_cfg, pm, smbus) = (ports(0x510, 12), ports(PM_BASE, 0x40), ports(SMBUS_BASE, 0x10));
    let cpus = ports(cpu_hotplug::BASE, cpu_hotplug::PORTS as u8);
    let io_apic = Memory32Fixed::new(true, IO_APIC.0 as u32, 0x1000);
    let local_apic = Memory32Fixed::new(true, LOCAL_APIC.0 as u32, 0x1000);
    let mut resources: Vec<&dyn Aml> =
        vec![&post, &fast_a20, &apm, &edge, &fw_cfg, &pm, &smbus, &io_apic, &local_apic];
    if hotplug {
        resources.push(&cpus);
    }
    isa_device("MBRD", "PNP0C02", None, resources)
}

/// `\_SB.HPET`.
fn hpet() -> Raw {
    isa_device("HPET", "PNP0103", None, vec![&Memory32Fixed::new(false, HPET.0 as u32, 0x400)])
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::tables::acpi::{self, tests::config};

    #[test]
    fn irq_descriptors_have_one_bit_for_their_number() {
        assert_eq!(irq(12).0, [0x22, 0x00, 0x10]);
        assert_eq!(interrupts(&[5, 10]).0, [0x89, 10, 0, 9, 2, 5, 0, 0, 0, 10, 0, 0, 0]);
    }

    #[test]
    fn the_routing_tables_cover_every_pin_of_every_slot() {
        for table in [routes(|_, _| Route::Input(16)), routes(|_, _| Route::Link(0))] {
            // PackageOp, a length of one to four bytes (its first two bits tell), the number of elements.
            let bytes = raw(&table).0;
            assert_eq!((bytes[0], bytes[2 + usize::from(bytes[1] >> 6)]), (0x12, 31 * 4));
        }
    }

    /// Disassembles the tables with `iasl` (package acpica-tools), and compiles them again.
    #[test]
    fn iasl_disassembles_and_recompiles_the_tables() {
        recompile("static", &config(), &["Processor (C003", "Device (COM2)", "Device (HPET)", "Name (\\_S5"]);
    }

    #[test]
    fn iasl_disassembles_and_recompiles_the_tables_of_a_machine_whose_cpus_come_and_go() {
        let config = AcpiConfig { cpus: 32, hotplug: Some(0b101), ..config() };
        let expected = [
            "Method (CPUS, 1",
            "If (\\_SB.CPUS (0x1F))",
            "Method (_EJ0, 1",
            "Method (_L01",
            "Notify (\\_PR.C001, 0x03)",
            "Notify (\\_PR.C031, One)",
        ];
        recompile("hotplug", &config, &expected);
    }

    fn recompile(name: &str, config: &AcpiConfig, expected: &[&str]) {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("SKIPPED: iasl is not installed (package acpica-tools)");
            return;
        }
        let dir = std::env::temp_dir().join(format!("boxwood-dsdt-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (_, tables) = acpi::tests::load(&acpi::build(config), 0xf_0000, 0);
        let mut at = 64;
        while at + 36 <= tables.len() {
            let len = u32::from_le_bytes(tables[at + 4..at + 8].try_into().unwrap()) as usize;
            let name = String::from_utf8_lossy(&tables[at..at + 4]).to_lowercase();
            std::fs::write(dir.join(format!("{name}.aml")), &tables[at..at + len]).unwrap();
            let run = |args: &[&str]| {
                let out = Command::new("iasl").args(args).current_dir(&dir).output().unwrap();
                let text = [out.stdout, out.stderr].concat();
                let text = String::from_utf8_lossy(&text).into_owned();
                assert!(out.status.success(), "iasl {args:?}: {text}");
                text
            };
            run(&["-d", &format!("{name}.aml")]);
            let text = run(&["-ve", &format!("{name}.dsl")]);
            assert!(!text.contains(" error ") && !text.contains("Error "), "{text}");
            at = (at + len).next_multiple_of(8);
        }
        let text = std::fs::read_to_string(dir.join("dsdt.dsl")).unwrap();
        for expected in expected {
            assert!(text.contains(expected), "{expected}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
