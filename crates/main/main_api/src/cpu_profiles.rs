//! The processors that machines can show instead of the host's (`--cpu-profile`, `list cpu-profiles`): those of VirtualBox's database that
//! have 64-bit code or are of its last 32-bit generation. Older ones have no CPUID, and no engine here runs without.

/// Who made a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    Amd,
}

/// What a processor can do, by its family of designs. Each Intel one has what those before it have, each of AMD's likewise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    /// Pentium M, Core Duo: no 64-bit code.
    Yonah,
    Prescott,
    Merom,
    Penryn,
    SandyBridge,
    IvyBridge,
    Broadwell,
    Skylake,
    K8,
    K8WithSse3,
    K10,
    Bulldozer,
    Zen,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuProfile {
    pub name: &'static str,
    /// The brand string that CPUID gives.
    pub full_name: &'static str,
    pub vendor: Vendor,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    pub generation: Generation,
    /// KiB of the first-level data cache, the second-level cache and the third-level cache (0: none).
    pub caches: [u32; 3],
}

const fn intel(
    name: &'static str,
    full_name: &'static str,
    [family, model, stepping]: [u32; 3],
    generation: Generation,
    caches: [u32; 3],
) -> CpuProfile {
    CpuProfile { name, full_name, vendor: Vendor::Intel, family, model, stepping, generation, caches }
}

const fn amd(
    name: &'static str,
    full_name: &'static str,
    [family, model, stepping]: [u32; 3],
    generation: Generation,
    caches: [u32; 3],
) -> CpuProfile {
    CpuProfile { name, full_name, vendor: Vendor::Amd, family, model, stepping, generation, caches }
}

use Generation as G;

/// All of them, in VirtualBox's order.
pub const CPU_PROFILES: &[CpuProfile] = &[
    intel(
        "Intel Core i7-6700K",
        "Intel(R) Core(TM) i7-6700K CPU @ 4.00GHz",
        [6, 94, 3],
        G::Skylake,
        [32, 256, 8192],
    ),
    intel(
        "Intel Core i7-5600U",
        "Intel(R) Core(TM) i7-5600U CPU @ 2.60GHz",
        [6, 61, 4],
        G::Broadwell,
        [32, 256, 4096],
    ),
    intel(
        "Intel Core i7-3960X",
        "Intel(R) Core(TM) i7-3960X CPU @ 3.30GHz",
        [6, 45, 6],
        G::SandyBridge,
        [32, 256, 15360],
    ),
    intel(
        "Intel Core i5-3570",
        "Intel(R) Core(TM) i5-3570 CPU @ 3.40GHz",
        [6, 58, 9],
        G::IvyBridge,
        [32, 256, 6144],
    ),
    intel(
        "Intel Core i7-3820QM",
        "Intel(R) Core(TM) i7-3820QM CPU @ 2.70GHz",
        [6, 58, 9],
        G::IvyBridge,
        [32, 256, 8192],
    ),
    intel(
        "Intel Core i7-2635QM",
        "Intel(R) Core(TM) i7-2635QM CPU @ 2.00GHz",
        [6, 42, 7],
        G::SandyBridge,
        [32, 256, 6144],
    ),
    intel(
        "Intel Xeon X5482 3.20GHz",
        "Intel(R) Xeon(R) CPU           X5482  @ 3.20GHz",
        [6, 23, 6],
        G::Penryn,
        [32, 6144, 0],
    ),
    intel(
        "Intel Core2 X6800 2.93GHz",
        "Intel(R) Core(TM)2 CPU         X6800  @ 2.93GHz",
        [6, 15, 6],
        G::Merom,
        [32, 4096, 0],
    ),
    intel(
        "Intel Core2 T7600 2.33GHz",
        "Intel(R) Core(TM)2 CPU         T7600  @ 2.33GHz",
        [6, 15, 6],
        G::Merom,
        [32, 4096, 0],
    ),
    intel(
        "Intel Core Duo T2600 2.16GHz",
        "Genuine Intel(R) CPU           T2600  @ 2.16GHz",
        [6, 14, 8],
        G::Yonah,
        [32, 2048, 0],
    ),
    intel(
        "Intel Pentium 4 3.00GHz",
        "Intel(R) Pentium(R) 4 CPU 3.00GHz",
        [15, 4, 3],
        G::Prescott,
        [16, 2048, 0],
    ),
    amd(
        "AMD Ryzen 7 1800X Eight-Core",
        "AMD Ryzen 7 1800X Eight-Core Processor",
        [23, 1, 1],
        G::Zen,
        [32, 512, 8192],
    ),
    amd(
        "AMD FX-8150 Eight-Core",
        "AMD FX(tm)-8150 Eight-Core Processor",
        [21, 1, 2],
        G::Bulldozer,
        [16, 2048, 8192],
    ),
    amd(
        "AMD Phenom II X6 1100T",
        "AMD Phenom(tm) II X6 1100T Processor",
        [16, 10, 0],
        G::K10,
        [64, 512, 6144],
    ),
    amd(
        "Quad-Core AMD Opteron 2384",
        "Quad-Core AMD Opteron(tm) Processor 2384",
        [16, 4, 2],
        G::K10,
        [64, 512, 6144],
    ),
    amd(
        "AMD Athlon 64 X2 Dual Core 4200+",
        "AMD Athlon(tm) 64 X2 Dual Core Processor 4200+",
        [15, 75, 2],
        G::K8WithSse3,
        [64, 512, 0],
    ),
    amd("AMD Athlon 64 3200+", "AMD Athlon(tm) 64 Processor 3200+", [15, 4, 8], G::K8, [64, 1024, 0]),
];

/// The processor of a name; `None` for the host's own, and for names that are in no list.
pub fn cpu_profile(name: &str) -> Option<&'static CpuProfile> {
    CPU_PROFILES.iter().find(|p| p.name.eq_ignore_ascii_case(name))
}
