//! What the interpreter can do, as CPUID tells it.
//!
//! This list and the instruction tables change together: a feature is here if and only if every instruction and register of it
//! works. Left out on purpose: VME, MONITOR, debug store, machine-check banks beyond the architectural minimum, TSX, VMX, SVM,
//! CET, protection keys, five-level paging, AVX-512, AMX, XSAVES, performance monitoring, speculation controls.

use cpum::cpuid::{FeatureBit, Leaf, bit};

use crate::unit::Features;

/// Done by the interpreter itself, on any host.
const INTERPRETED: &[FeatureBit] = &[
    bit::DE,
    bit::PSE,
    bit::TSC,
    bit::MSR,
    bit::PAE,
    bit::MCE,
    bit::CX8,
    bit::APIC,
    bit::SEP,
    bit::MTRR,
    bit::PGE,
    bit::MCA,
    bit::CMOV,
    bit::PAT,
    bit::PSE36,
    bit::CLFSH,
    bit::HTT,
    bit::CX16,
    bit::PCID,
    bit::X2APIC,
    bit::MOVBE,
    bit::POPCNT,
    bit::TSC_DEADLINE,
    bit::RDRAND,
    bit::HYPERVISOR,
    bit::FSGSBASE,
    bit::TSC_ADJUST,
    bit::BMI1,
    bit::SMEP,
    bit::BMI2,
    bit::ERMS,
    bit::INVPCID,
    bit::NO_FCS_FDS,
    bit::RDSEED,
    bit::ADX,
    bit::SMAP,
    bit::CLFLUSHOPT,
    bit::CLWB,
    bit::RDPID,
    bit::UMIP,
    bit::FSRM,
    bit::XGETBV1,
    bit::SYSCALL,
    bit::NX,
    bit::PAGE1GB,
    bit::RDTSCP,
    bit::LM,
    bit::LAHF64,
    bit::CMP_LEGACY,
    bit::LZCNT,
    bit::PREFETCHW,
    bit::TOPOEXT,
    bit::INVARIANT_TSC,
    bit::XSAVEERPTR,
];

/// Every feature that the engine has on this host: its own and those of the host's execution unit.
pub fn cpuid_features() -> Vec<FeatureBit> {
    let mut all = INTERPRETED.to_vec();
    all.extend(Features::host().bits());
    all.push(bit::ARCH_CAPABILITIES);
    all
}

/// The host's CPUID instruction, for `CpuidTable::build`.
pub fn host_cpuid(leaf: u32, subleaf: u32) -> Leaf {
    let value = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    Leaf { eax: value.eax, ebx: value.ebx, ecx: value.ecx, edx: value.edx }
}

#[cfg(test)]
mod tests {
    use cpum::cpuid::{Apic, Config, CpuidTable, Paravirt};
    use vbox_types::Hz;

    use super::*;

    #[test]
    fn the_table_of_this_host_announces_what_the_unit_executes() {
        let config = Config {
            vcpus: 2,
            tsc_frequency: Hz(2_000_000_000),
            apic_frequency: Hz(1_000_000_000),
            apic: Apic::X2Apic,
            pae: true,
            long_mode: true,
            paravirt: Paravirt::None,
            features: cpuid_features(),
            overrides: Vec::new(),
        };
        let table = CpuidTable::build(&config, &host_cpuid);
        assert!(table.has(bit::SSE2) && table.has(bit::XSAVE) && table.has(bit::LM));
        assert_eq!(Features::announced(&table), Features::host());
    }
}
