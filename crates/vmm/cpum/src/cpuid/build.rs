//! The table of a VM's CPUs.
//!
//! Identity (vendor, family, model, brand string, cache geometry) is the host's, as with VirtualBox's CPU profile "host".
//! Features are only those that the engine says it has. Topology is one package with one core per vCPU.

use vbox_types::Hz;

use super::{CpuidTable, Entry, FeatureBit, Leaf, XSAVE_AVX, XSAVE_LEGACY, bit};

/// Physical address bits of a guest CPU: 1 TiB.
const PHYSICAL_BITS: u32 = 40;
/// Linear address bits: four-level paging.
const LINEAR_BITS: u32 = 48;
/// Kind of a level in leaf 0xB.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// What kind of local APIC the VM has (`VBoxManage modifyvm --apic`, `--x2apic`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apic {
    None,
    Apic,
    X2Apic,
}

/// The interface a guest may use to work better with its hypervisor (`VBoxManage modifyvm --paravirtprovider`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Paravirt {
    /// The hypervisor does not show.
    None,
    /// The hypervisor bit, and these leaves from 0x40000000 on.
    Shown(Vec<Entry>),
}

/// What decides the table besides the host's identity.
#[derive(Clone, Debug)]
pub struct Config {
    pub vcpus: u32,
    pub tsc_frequency: Hz,
    /// Rate at which the local APIC's timer counts before its divider.
    pub apic_frequency: Hz,
    pub apic: Apic,
    /// Physical address extension (`--pae`).
    pub pae: bool,
    /// 64-bit guests (`--long-mode`).
    pub long_mode: bool,
    pub paravirt: Paravirt,
    /// All that the engine implements on this host.
    pub features: Vec<FeatureBit>,
    /// Leaves replaced at the end: leaf, sub-leaf, EAX, EBX, ECX, EDX (`--cpuid-set`).
    pub overrides: Vec<[u32; 6]>,
}

impl CpuidTable {
    /// Builds the table; `host` is the host's CPUID instruction.
    pub fn build(config: &Config, host: &dyn Fn(u32, u32) -> Leaf) -> Self {
        let mut builder = Builder { config, host, amd: is_amd(&host(0, 0)), entries: Vec::new() };
        builder.basic();
        builder.extended();
        builder.hypervisor();
        builder.features();
        builder.mirror();
        builder.overrides();
        Self { entries: builder.entries }
    }
}

fn is_amd(leaf0: &Leaf) -> bool {
    [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")].contains(&leaf0.ebx)
}

struct Builder<'a> {
    config: &'a Config,
    host: &'a dyn Fn(u32, u32) -> Leaf,
    amd: bool,
    entries: Vec<Entry>,
}

impl Builder<'_> {
    fn put(&mut self, leaf: u32, subleaf: Option<u32>, value: Leaf) {
        self.entries.push(Entry { leaf, subleaf, value });
    }

    fn announces(&self, feature: FeatureBit) -> bool {
        self.config.features.contains(&feature) && !self.switched_off(feature)
    }

    /// Features that settings take away.
    fn switched_off(&self, feature: FeatureBit) -> bool {
        let config = self.config;
        (config.apic == Apic::None && [bit::APIC, bit::TSC_DEADLINE].contains(&feature))
            || (config.apic != Apic::X2Apic && feature == bit::X2APIC)
            || (!config.pae && !config.long_mode && [bit::PAE, bit::NX].contains(&feature))
            || (!config.long_mode
                && [bit::LM, bit::LAHF64, bit::CX16, bit::PCID, bit::PAGE1GB, bit::FSGSBASE]
                    .contains(&feature))
            || (config.paravirt == Paravirt::None && feature == bit::HYPERVISOR)
            || (config.vcpus < 2 && [bit::HTT, bit::CMP_LEGACY].contains(&feature))
            || (!self.amd
                && [bit::CMP_LEGACY, bit::TOPOEXT, bit::CR8_LEGACY, bit::SSE4A, bit::MMXEXT, bit::SVM]
                    .contains(&feature))
            || (self.amd && [bit::ARCH_CAPABILITIES, bit::VMX].contains(&feature))
            || (!self.amd && [bit::CLZERO, bit::XSAVEERPTR].contains(&feature))
    }

    fn basic(&mut self) {
        let config = self.config;
        let id = (self.host)(0, 0);
        let xsave = self.announces(bit::XSAVE);
        let max = if self.amd { 0xd } else { 0x16 };
        self.put(0, None, Leaf { eax: max, ..id });
        let cores = config.vcpus.clamp(1, 255);
        let line = 8 << 8; // CLFLUSH: 64 bytes
        let logical = if cores > 1 { cores << 16 } else { 0 };
        self.put(1, None, Leaf { eax: (self.host)(1, 0).eax, ebx: logical | line, ..Leaf::default() });
        if !self.amd {
            self.put(2, None, (self.host)(2, 0));
            self.caches(4, cores);
            // APIC timer keeps running in deep sleep states.
            self.put(6, None, Leaf { eax: 1 << 2, ..Leaf::default() });
        }
        let last = u32::from(self.announces(bit::AVX_VNNI));
        self.put(7, Some(0), Leaf { eax: last, ..Leaf::default() });
        self.put(7, Some(1), Leaf::default());
        let bits = id_bits(cores);
        self.put(0xb, Some(0), Leaf { eax: 0, ebx: 1, ecx: LEVEL_SMT << 8, edx: 0 });
        self.put(0xb, Some(1), Leaf { eax: bits, ebx: cores, ecx: LEVEL_CORE << 8, edx: 0 });
        self.put(0xb, None, Leaf::default());
        if xsave {
            let avx = self.announces(bit::AVX);
            let (components, size) = if avx { (7, XSAVE_AVX) } else { (3, XSAVE_LEGACY) };
            self.put(0xd, Some(0), Leaf { eax: components, ebx: XSAVE_LEGACY, ecx: size, edx: 0 });
            self.put(0xd, Some(1), Leaf::default());
            if avx {
                self.put(
                    0xd,
                    Some(2),
                    Leaf { eax: XSAVE_AVX - XSAVE_LEGACY, ebx: XSAVE_LEGACY, ..Leaf::default() },
                );
            }
        }
        if !self.amd {
            let (tsc, crystal) = (config.tsc_frequency.0, config.apic_frequency.0);
            // Linux multiplies the crystal's rate in kHz by the numerator, in 32 bits.
            let most = u64::from(u32::MAX) / (crystal / 1000).max(1);
            let (numerator, denominator) = ratio(tsc, crystal, most);
            let told = u128::from(numerator) * u128::from(crystal);
            let exact = u128::from(denominator) * u128::from(tsc);
            // Guests that do not find the ratio measure the rate, which is better than a wrong one.
            if let (Ok(numerator), Ok(denominator), Ok(crystal)) =
                (u32::try_from(numerator), u32::try_from(denominator), u32::try_from(crystal))
                && told.abs_diff(exact) * 1_000_000 <= exact
            {
                self.put(0x15, None, Leaf { eax: denominator, ebx: numerator, ecx: crystal, edx: 0 });
            }
            let mhz = u32::try_from(tsc / 1_000_000).unwrap_or(u32::MAX) & 0xffff;
            let bus = u32::try_from(crystal / 1_000_000).unwrap_or(u32::MAX) & 0xffff;
            self.put(0x16, None, Leaf { eax: mhz, ebx: mhz, ecx: bus, edx: 0 });
        }
    }

    /// Cache geometry as the host tells it, shared as in the VM: the last level by all cores, the rest by none.
    fn caches(&mut self, leaf: u32, cores: u32) {
        for subleaf in 0..8 {
            let mut value = (self.host)(leaf, subleaf);
            let kind = value.eax & 0x1f;
            if kind == 0 {
                break;
            }
            let level = value.eax >> 5 & 7;
            let sharing = if level >= 3 { cores - 1 } else { 0 };
            value.eax = (value.eax & 0x3fff) | sharing << 14;
            if !self.amd {
                value.eax |= (cores - 1).min(63) << 26;
            }
            self.put(leaf, Some(subleaf), value);
        }
        self.put(leaf, None, Leaf::default());
    }

    fn extended(&mut self) {
        let cores = self.config.vcpus.clamp(1, 255);
        let id = (self.host)(0x8000_0000, 0);
        let max = if self.amd { 0x8000_001e } else { 0x8000_0008 };
        self.put(0x8000_0000, None, Leaf { eax: max, ebx: id.ebx, ecx: id.ecx, edx: id.edx });
        let package = if self.amd { (self.host)(0x8000_0001, 0).ebx & 0xf000_0000 } else { 0 };
        let signature = if self.amd { (self.host)(1, 0).eax } else { 0 };
        self.put(0x8000_0001, None, Leaf { eax: signature, ebx: package, ..Leaf::default() });
        for leaf in 0x8000_0002..=0x8000_0006 {
            self.put(leaf, None, (self.host)(leaf, 0));
        }
        self.put(0x8000_0007, None, Leaf::default());
        let counts = if self.amd { id_bits(cores) << 12 | (cores - 1) } else { 0 };
        self.put(
            0x8000_0008,
            None,
            Leaf { eax: LINEAR_BITS << 8 | PHYSICAL_BITS, ecx: counts, ..Leaf::default() },
        );
        if self.amd {
            self.caches(0x8000_001d, cores);
            self.put(0x8000_001e, None, Leaf::default());
        }
    }

    fn hypervisor(&mut self) {
        if let Paravirt::Shown(leaves) = &self.config.paravirt {
            self.entries.extend_from_slice(leaves);
        }
    }

    fn features(&mut self) {
        for &feature in &self.config.features {
            if self.announces(feature)
                && let Some(entry) = self
                    .entries
                    .iter_mut()
                    .find(|e| e.leaf == feature.leaf && e.subleaf.is_none_or(|s| s == feature.subleaf))
            {
                *entry.value.register_mut(feature.register) |= 1 << feature.bit;
            }
        }
    }

    /// AMD repeats most of leaf 1 EDX in leaf 0x80000001.
    fn mirror(&mut self) {
        if !self.amd {
            return;
        }
        let Some(edx) = self.entries.iter().find(|e| e.leaf == 1).map(|e| e.value.edx) else { return };
        if let Some(entry) = self.entries.iter_mut().find(|e| e.leaf == 0x8000_0001) {
            entry.value.edx |= edx & 0x0183_f3ff;
        }
    }

    fn overrides(&mut self) {
        for &[leaf, subleaf, eax, ebx, ecx, edx] in &self.config.overrides {
            let value = Leaf { eax, ebx, ecx, edx };
            match self.entries.iter_mut().find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf)) {
                Some(entry) => entry.value = value,
                None => self.put(leaf, (subleaf != 0).then_some(subleaf), value),
            }
        }
    }
}

/// Bits of the APIC id that number the cores.
fn id_bits(cores: u32) -> u32 {
    cores.max(1).next_power_of_two().trailing_zeros()
}

/// The ratio `a / b` in lowest terms if its numerator is at most `most`, else the last of its continued fraction's approximations for which
/// that holds. Zero over one if there is none.
fn ratio(a: u64, b: u64, most: u64) -> (u64, u64) {
    let (mut a, mut b) = (a, b);
    let (mut before, mut last) = ((0u64, 1u64), (1u64, 0u64));
    while b != 0 {
        let part = a / b;
        let next = |x: u64, y: u64| part.checked_mul(y).and_then(|p| p.checked_add(x));
        let (Some(numerator), Some(denominator)) = (next(before.0, last.0), next(before.1, last.1)) else {
            break;
        };
        if numerator > most {
            break;
        }
        (before, last) = (last, (numerator, denominator));
        (a, b) = (b, a % b);
    }
    if last.1 == 0 { (0, 1) } else { last }
}
