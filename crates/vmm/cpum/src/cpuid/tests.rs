use vbox_types::Hz;

use super::*;

/// A host that has everything; vendor by name.
fn host(vendor: [&'static [u8; 4]; 3]) -> impl Fn(u32, u32) -> Leaf {
    move |leaf, subleaf| match leaf {
        0 | 0x8000_0000 => Leaf {
            eax: leaf + 0x20,
            ebx: u32::from_le_bytes(*vendor[0]),
            ecx: u32::from_le_bytes(*vendor[2]),
            edx: u32::from_le_bytes(*vendor[1]),
        },
        1 => Leaf { eax: 0x00a2_0f12, ebx: 0x1234_5678, ecx: u32::MAX, edx: u32::MAX },
        // Two first-level caches, a second and a third level, shared by 16 threads.
        4 | 0x8000_001d => match subleaf {
            0..4 => Leaf { eax: 15 << 14 | (subleaf.max(1)) << 5 | 1, ebx: 63, ecx: 63, edx: 0 },
            _ => Leaf::default(),
        },
        0x8000_0002..=0x8000_0004 => Leaf { eax: 0x2054_5345, ..Leaf::default() },
        _ => Leaf { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX },
    }
}

const AMD: [&[u8; 4]; 3] = [b"Auth", b"enti", b"cAMD"];
const INTEL: [&[u8; 4]; 3] = [b"Genu", b"ineI", b"ntel"];

fn config(vcpus: u32) -> Config {
    Config {
        vcpus,
        tsc_frequency: Hz(2_400_000_000),
        apic_frequency: Hz(1_000_000_000),
        apic: Apic::X2Apic,
        pae: true,
        long_mode: true,
        paravirt: Paravirt::None,
        features: vec![
            bit::FPU,
            bit::PAE,
            bit::APIC,
            bit::X2APIC,
            bit::HTT,
            bit::XSAVE,
            bit::AVX,
            bit::AVX2,
            bit::XSAVEC,
            bit::LM,
            bit::NX,
            bit::CMP_LEGACY,
            bit::TOPOEXT,
            bit::HYPERVISOR,
        ],
        overrides: Vec::new(),
    }
}

#[test]
fn only_features_of_the_engine_are_announced() {
    let table = CpuidTable::build(&config(2), &host(AMD));
    let features = table.raw(1, 0);
    assert_eq!(features.ecx, 1 << 21 | 1 << 26 | 1 << 28);
    assert_eq!(features.edx, 1 | 1 << 6 | 1 << 9 | 1 << 28);
    assert_eq!(table.raw(7, 0).ebx, 1 << 5);
    assert_eq!((table.raw(7, 0).ecx, table.raw(7, 0).edx), (0, 0));
    assert!(!table.has(bit::HYPERVISOR));
    // AMD's copy of leaf 1 EDX leaves out bit 28.
    assert_eq!(table.raw(0x8000_0001, 0).edx, 1 | 1 << 6 | 1 << 9 | 1 << 20 | 1 << 29);
}

#[test]
fn identity_is_the_hosts() {
    let table = CpuidTable::build(&config(1), &host(AMD));
    assert_eq!(table.raw(0, 0).ebx, u32::from_le_bytes(*b"Auth"));
    assert_eq!(table.raw(1, 0).eax, 0x00a2_0f12);
    assert_eq!(table.raw(0x8000_0002, 0).eax, 0x2054_5345);
    assert_eq!(table.raw(0x8000_0008, 0).eax, 0x3028);
}

#[test]
fn each_vcpu_is_a_core_of_one_package() {
    let table = CpuidTable::build(&config(6), &host(AMD));
    let cpu = CpuState::reset(5);
    assert_eq!(table.query(1, 0, &cpu).ebx >> 16, 5 << 8 | 6);
    assert_eq!(table.query(0xb, 0, &cpu), Leaf { eax: 0, ebx: 1, ecx: 0x100, edx: 5 });
    assert_eq!(table.query(0xb, 1, &cpu), Leaf { eax: 3, ebx: 6, ecx: 0x201, edx: 5 });
    assert_eq!(table.query(0xb, 2, &cpu), Leaf { eax: 0, ebx: 0, ecx: 2, edx: 5 });
    assert_eq!(table.query(0x8000_0008, 0, &cpu).ecx, 3 << 12 | 5);
    assert_eq!(table.query(0x8000_001e, 0, &cpu), Leaf { eax: 5, ebx: 5, ecx: 0, edx: 0 });
    assert_eq!(table.raw(0x8000_001d, 3).eax >> 14, 5, "the third level is shared by all");
    assert_eq!(table.raw(0x8000_001d, 2).eax >> 14, 0, "the second by none");
    let intel = CpuidTable::build(&config(6), &host(INTEL));
    assert_eq!(intel.raw(4, 3).eax >> 14, 5 << 12 | 5);
    assert!(!intel.has(bit::CMP_LEGACY));
}

#[test]
fn a_single_vcpu_has_no_siblings() {
    let table = CpuidTable::build(&config(1), &host(AMD));
    assert!(!table.has(bit::HTT) && !table.has(bit::CMP_LEGACY));
    assert_eq!(table.raw(0xb, 1).eax, 0);
}

#[test]
fn control_registers_show_through() {
    let table = CpuidTable::build(&config(1), &host(AMD));
    let mut cpu = CpuState::reset(0);
    assert_eq!(table.query(1, 0, &cpu).ecx >> 27 & 1, 0);
    assert_eq!(table.query(0xd, 0, &cpu), Leaf { eax: 7, ebx: 576, ecx: 832, edx: 0 });
    cpu.cr4 |= cr4::OSXSAVE;
    cpu.xcr0 = 7;
    assert_eq!(table.query(1, 0, &cpu).ecx >> 27 & 1, 1);
    assert_eq!(table.query(0xd, 0, &cpu).ebx, 832);
    assert_eq!(table.query(0xd, 1, &cpu), Leaf { eax: 2, ebx: 832, ecx: 0, edx: 0 });
    assert_eq!(table.query(0xd, 2, &cpu), Leaf { eax: 256, ebx: 576, ecx: 0, edx: 0 });
    assert_eq!(table.query(0xd, 3, &cpu), Leaf::default());
    cpu.msr.apic_base &= !APIC_ENABLED;
    assert_eq!(table.query(1, 0, &cpu).edx >> 9 & 1, 0);
    assert_eq!(table.query(0x8000_0001, 0, &cpu).edx >> 9 & 1, 0);
}

#[test]
fn leaves_out_of_range_answer_as_the_vendor_does() {
    let cpu = CpuState::reset(0);
    let amd = CpuidTable::build(&config(1), &host(AMD));
    assert_eq!(amd.query(0x1234, 0, &cpu), Leaf::default());
    let intel = CpuidTable::build(&config(1), &host(INTEL));
    assert_eq!(intel.query(0x1234, 0, &cpu), intel.raw(0x16, 0));
    assert_eq!(intel.query(0x8000_0099, 0, &cpu), intel.raw(0x16, 0));
    assert_eq!(intel.raw(0x16, 0).eax, 2400);
}

#[test]
fn tsc_ratio_of_intel_is_exact() {
    let table = CpuidTable::build(&config(1), &host(INTEL));
    assert_eq!(table.raw(0x15, 0), Leaf { eax: 5, ebx: 12, ecx: 1_000_000_000, edx: 0 });
}

#[test]
fn tsc_ratio_of_intel_fits_linuxs_arithmetic_whatever_the_rate() {
    // A rate as it is measured has no factor in common with the crystal's.
    for tsc in [2_599_998_186, 2_599_998_043, 1_999_999_999, 3_700_000_001, 999_999_937, 2_000_300_000] {
        let config = Config { tsc_frequency: Hz(tsc), apic_frequency: Hz(1_000_000_000), ..config(1) };
        let leaf = CpuidTable::build(&config, &host(INTEL)).raw(0x15, 0);
        if leaf == Leaf::default() {
            // Left out, since no ratio comes near enough.
            assert_eq!(tsc, 2_000_300_000);
            continue;
        }
        let kilohertz = (leaf.ecx / 1000).checked_mul(leaf.ebx).expect("32 bits") / leaf.eax;
        let error = (f64::from(kilohertz) * 1000.0 / tsc as f64 - 1.0).abs();
        assert!(error < 2e-6, "{tsc}: {leaf:?} {error}");
    }
}

#[test]
fn settings_take_features_away() {
    let config = Config { apic: Apic::None, pae: false, long_mode: false, ..config(1) };
    let table = CpuidTable::build(&config, &host(AMD));
    for feature in [bit::APIC, bit::X2APIC, bit::PAE, bit::LM, bit::NX] {
        assert!(!table.has(feature), "{feature:?}");
    }
}

#[test]
fn a_paravirtual_provider_shows_its_leaves_and_the_hypervisor_bit() {
    let cpu = CpuState::reset(0);
    let build = |paravirt| CpuidTable::build(&Config { paravirt, ..config(1) }, &host(INTEL));
    let value = Leaf { eax: 0x4000_0001, ebx: 1, ecx: 2, edx: 3 };
    let shown = build(Paravirt::Shown(vec![Entry { leaf: 0x4000_0000, subleaf: None, value }]));
    assert!(shown.has(bit::HYPERVISOR));
    assert_eq!(shown.query(0x4000_0000, 0, &cpu), value);
    assert_eq!(shown.query(0x4000_0005, 0, &cpu), Leaf::default());
    assert!(!build(Paravirt::None).has(bit::HYPERVISOR));
}

#[test]
fn overrides_replace_whole_leaves_but_not_what_is_dynamic() {
    let overrides =
        vec![[1, 0, 0x633, 0, 0, 0x200], [7, 0, 0, 0, 0, 0], [0xd, 2, 1, 2, 3, 4], [0x21, 0, 9, 9, 9, 9]];
    let table = CpuidTable::build(&Config { overrides, ..config(1) }, &host(AMD));
    let cpu = CpuState::reset(3);
    assert_eq!(table.query(1, 0, &cpu), Leaf { eax: 0x633, ebx: 3 << 24, ecx: 0, edx: 0x200 });
    assert!(!table.has(bit::AVX2));
    assert_eq!(table.raw(0xd, 2), Leaf { eax: 1, ebx: 2, ecx: 3, edx: 4 });
    assert_eq!(table.raw(0xd, 0).eax, 7);
    assert_eq!(table.raw(0x21, 0).eax, 9);
}
