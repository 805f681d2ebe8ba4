//! The processor that a machine shows instead of the host's (`--cpu-profile`): its identity and caches as CPUID tells them, and which of the
//! engine's features it has. What the profile's processor has and the engine or the host lacks stays away, as with VirtualBox.

use cpum::cpuid::{FeatureBit, Leaf, bit};
use main_api::cpu_profiles::{CpuProfile, Generation, Vendor};

/// Bytes of a cache line.
const LINE: u32 = 64;

/// Types in leaf 4.
const DATA: u32 = 1;
const CODE: u32 = 2;
const UNIFIED: u32 = 3;

/// What CPUID gives where the table of the VM's CPUs asks for the host's.
pub fn cpuid(profile: &CpuProfile, leaf: u32, subleaf: u32) -> Leaf {
    let text = |bytes: &[u8], at: usize| {
        let byte = |n: usize| bytes.get(at + n).copied().unwrap_or(0);
        u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
    };
    let vendor = |name: &[u8]| Leaf { eax: 0, ebx: text(name, 0), edx: text(name, 4), ecx: text(name, 8) };
    let amd = profile.vendor == Vendor::Amd;
    match leaf {
        0 if amd => vendor(b"AuthenticAMD"),
        0 => vendor(b"GenuineIntel"),
        0x8000_0000 if amd => vendor(b"AuthenticAMD"),
        1 => Leaf { eax: signature(profile), ..Leaf::default() },
        // One descriptor: "see leaf 4".
        2 if !amd => Leaf { eax: 0xff01, ..Leaf::default() },
        4 if !amd => cache(profile, subleaf),
        0x8000_001d if amd => cache(profile, subleaf),
        0x8000_0002..=0x8000_0004 => {
            let name = profile.full_name.as_bytes();
            let at = 16 * (leaf - 0x8000_0002) as usize;
            Leaf {
                eax: text(name, at),
                ebx: text(name, at + 4),
                ecx: text(name, at + 8),
                edx: text(name, at + 12),
            }
        }
        0x8000_0005 if amd => {
            // Size, ways, lines a tag, line size; for data and for code.
            let first = profile.caches[0] << 24 | WAYS[0] << 16 | 1 << 8 | LINE;
            Leaf { ecx: first, edx: first, ..Leaf::default() }
        }
        0x8000_0006 => {
            const EIGHT_WAYS: u32 = 6;
            const SIXTEEN_WAYS: u32 = 8;
            let [_, second, third] = profile.caches;
            let ecx = second << 16 | EIGHT_WAYS << 12 | 1 << 8 | LINE;
            let edx = if third == 0 { 0 } else { (third / 512) << 18 | SIXTEEN_WAYS << 12 | 1 << 8 | LINE };
            Leaf { ecx, edx: if amd { edx } else { 0 }, ..Leaf::default() }
        }
        _ => Leaf::default(),
    }
}

/// Ways of the caches of each level.
const WAYS: [u32; 3] = [8, 8, 16];

/// Family, model and stepping as leaf 1 has them.
fn signature(profile: &CpuProfile) -> u32 {
    let CpuProfile { family, model, stepping, .. } = *profile;
    stepping | (model & 0xf) << 4 | family.min(15) << 8 | (model >> 4) << 16 | family.saturating_sub(15) << 20
}

fn cache(profile: &CpuProfile, number: u32) -> Leaf {
    let (kind, level) = match number {
        0 => (DATA, 1),
        1 => (CODE, 1),
        2 => (UNIFIED, 2),
        3 => (UNIFIED, 3),
        _ => return Leaf::default(),
    };
    let (size, ways) = (profile.caches[level as usize - 1] * 1024, WAYS[level as usize - 1]);
    if size == 0 {
        return Leaf::default();
    }
    Leaf {
        eax: kind | level << 5 | 1 << 8,
        ebx: (ways - 1) << 22 | (LINE - 1),
        ecx: size / (LINE * ways) - 1,
        edx: 0,
    }
}

/// Whether the profile's processor has a feature. What concerns the virtual machine and no processor is never taken away.
pub fn has(profile: &CpuProfile, feature: FeatureBit) -> bool {
    use Generation as G;
    let since = |intel: Option<G>, amd: Option<G>| match profile.vendor {
        Vendor::Intel => intel.is_some_and(|first| profile.generation >= first),
        Vendor::Amd => amd.is_some_and(|first| profile.generation >= first),
    };
    match feature {
        bit::LM => since(Some(G::Prescott), Some(G::K8)),
        bit::SYSCALL => since(Some(G::Prescott), Some(G::K8)),
        bit::SSE3 => since(Some(G::Yonah), Some(G::K8WithSse3)),
        bit::CX16 => since(Some(G::Prescott), Some(G::K8WithSse3)),
        bit::LAHF64 => since(Some(G::Merom), Some(G::K8WithSse3)),
        bit::SSSE3 => since(Some(G::Merom), Some(G::Bulldozer)),
        bit::SSE41 => since(Some(G::Penryn), Some(G::Bulldozer)),
        bit::SSE42 | bit::PCLMULQDQ | bit::AES | bit::XSAVE | bit::AVX => {
            since(Some(G::SandyBridge), Some(G::Bulldozer))
        }
        bit::POPCNT => since(Some(G::SandyBridge), Some(G::K10)),
        bit::PCID => since(Some(G::SandyBridge), None),
        bit::XSAVEOPT => since(Some(G::SandyBridge), Some(G::Zen)),
        bit::RDTSCP => since(Some(G::SandyBridge), Some(G::K8WithSse3)),
        bit::F16C | bit::RDRAND | bit::FSGSBASE | bit::SMEP => since(Some(G::IvyBridge), Some(G::Zen)),
        bit::ERMS => since(Some(G::IvyBridge), None),
        bit::FMA | bit::MOVBE | bit::BMI1 | bit::BMI2 | bit::AVX2 | bit::RDSEED | bit::ADX | bit::SMAP => {
            since(Some(G::Broadwell), Some(G::Zen))
        }
        bit::INVPCID | bit::NO_FCS_FDS | bit::FDP_EXCPTN_ONLY => since(Some(G::Broadwell), None),
        bit::LZCNT => since(Some(G::Broadwell), Some(G::K10)),
        bit::PREFETCHW => since(Some(G::Broadwell), Some(G::K8)),
        bit::PAGE1GB => since(Some(G::Broadwell), Some(G::K10)),
        bit::CLFLUSHOPT | bit::XSAVEC | bit::XGETBV1 => since(Some(G::Skylake), Some(G::Zen)),
        bit::SHA | bit::CLZERO | bit::XSAVEERPTR => since(None, Some(G::Zen)),
        bit::MMXEXT => since(None, Some(G::K8)),
        bit::CR8_LEGACY | bit::CMP_LEGACY => since(None, Some(G::K8WithSse3)),
        bit::SSE4A => since(None, Some(G::K10)),
        bit::TOPOEXT => since(None, Some(G::Bulldozer)),
        bit::CLWB
        | bit::UMIP
        | bit::RDPID
        | bit::GFNI
        | bit::VAES
        | bit::VPCLMULQDQ
        | bit::FSRM
        | bit::AVX_VNNI
        | bit::WBNOINVD => false,
        // Up to SSE2 they all have everything; APIC modes, time and the hypervisor's bit are the machine's.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use main_api::cpu_profiles::{CPU_PROFILES, cpu_profile};

    use super::*;

    #[test]
    fn signatures_are_those_of_the_data_sheets() {
        for (name, wanted) in [
            ("Intel Core i7-6700K", 0x506e3),
            ("intel core i5-3570", 0x306a9),
            ("Intel Pentium 4 3.00GHz", 0xf43),
            ("AMD Ryzen 7 1800X Eight-Core", 0x80_0f11),
            ("AMD FX-8150 Eight-Core", 0x60_0f12),
        ] {
            assert_eq!(cpuid(cpu_profile(name).unwrap(), 1, 0).eax, wanted, "{name}");
        }
    }

    #[test]
    fn brand_strings_fit_and_caches_have_whole_sets() {
        for profile in CPU_PROFILES {
            assert!(profile.full_name.len() < 48, "{}", profile.name);
            for (level, (size, ways)) in profile.caches.iter().zip(WAYS).enumerate() {
                assert_eq!(size * 1024 % (LINE * ways), 0, "{} level {level}", profile.name);
            }
        }
    }

    #[test]
    fn generations_have_what_they_are_known_for() {
        let of = |name, feature| has(cpu_profile(name).unwrap(), feature);
        assert!(of("Intel Core i7-6700K", bit::AVX2) && of("Intel Core i7-6700K", bit::XSAVEC));
        assert!(of("Intel Core i7-2635QM", bit::AVX) && !of("Intel Core i7-2635QM", bit::RDRAND));
        assert!(
            !of("Intel Core Duo T2600 2.16GHz", bit::LM) && of("Intel Core Duo T2600 2.16GHz", bit::SSE3)
        );
        assert!(of("AMD Phenom II X6 1100T", bit::SSE4A) && !of("AMD Phenom II X6 1100T", bit::SSSE3));
        assert!(!of("AMD Athlon 64 3200+", bit::SSE3) && of("AMD Athlon 64 3200+", bit::HYPERVISOR));
    }
}
