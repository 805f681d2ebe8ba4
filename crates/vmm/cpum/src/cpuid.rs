//! What CPUID answers.
//!
//! [`CpuidTable::build`] makes the table of a VM from the host's identity, the features its engine has and the VM's settings;
//! [`CpuidTable::query`] is the instruction.

pub mod bit;
mod build;

pub use build::{Apic, Config, Paravirt};

use crate::CpuState;
use crate::state::cr4;

/// The four registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// A feature flag's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureBit {
    pub leaf: u32,
    pub subleaf: u32,
    pub register: OutputRegister,
    pub bit: u32,
}

/// One of the registers that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Leaf {
    /// The value of one register.
    pub fn register(&self, register: OutputRegister) -> u32 {
        match register {
            OutputRegister::Eax => self.eax,
            OutputRegister::Ebx => self.ebx,
            OutputRegister::Ecx => self.ecx,
            OutputRegister::Edx => self.edx,
        }
    }

    fn register_mut(&mut self, register: OutputRegister) -> &mut u32 {
        match register {
            OutputRegister::Eax => &mut self.eax,
            OutputRegister::Ebx => &mut self.ebx,
            OutputRegister::Ecx => &mut self.ecx,
            OutputRegister::Edx => &mut self.edx,
        }
    }
}

/// One entry of a [`CpuidTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub leaf: u32,
    /// `None` where the leaf ignores ECX.
    pub subleaf: Option<u32>,
    pub value: Leaf,
}

/// All leaves of a VM's CPUs, as of the machine's settings and the engine's abilities. What depends on the vCPU or its control
/// registers (initial APIC id, OSXSAVE, XSAVE size) is put in by [`CpuidTable::query`].
#[derive(Clone, Debug, Default)]
pub struct CpuidTable {
    pub entries: Vec<Entry>,
}

/// XSAVE area up to the end of the header.
const XSAVE_LEGACY: u32 = 576;
/// XSAVE area with AVX.
const XSAVE_AVX: u32 = 832;
/// XCR0 bit of the AVX state.
const XCR0_AVX: u64 = 4;
/// IA32_APIC_BASE: the APIC is enabled.
const APIC_ENABLED: u64 = 1 << 11;
/// First leaf of the hypervisor's and of AMD's range.
const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;

impl CpuidTable {
    /// Whether a feature is announced.
    pub fn has(&self, feature: FeatureBit) -> bool {
        self.raw(feature.leaf, feature.subleaf).register(feature.register) >> feature.bit & 1 != 0
    }

    /// The stored answer, before anything dynamic: the exact leaf, or zeros.
    pub fn raw(&self, leaf: u32, subleaf: u32) -> Leaf {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map_or_else(Leaf::default, |e| e.value)
    }

    /// What CPUID returns on a vCPU for EAX and ECX.
    pub fn query(&self, leaf: u32, subleaf: u32, cpu: &CpuState) -> Leaf {
        let leaf = self.effective(leaf);
        let mut value = self.raw(leaf, subleaf);
        let apic = cpu.msr.apic_base & APIC_ENABLED != 0;
        match leaf {
            1 => {
                value.ebx = (value.ebx & 0x00ff_ffff) | cpu.id << 24;
                if cpu.cr4 & cr4::OSXSAVE != 0 {
                    value.ecx |= 1 << bit::OSXSAVE.bit;
                }
                if !apic {
                    value.edx &= !(1 << bit::APIC.bit);
                }
            }
            0xb if self.has_leaf(0xb) => {
                // Levels past the last still tell the level asked for and the x2APIC id.
                value.ecx = (value.ecx & !0xff) | (subleaf & 0xff);
                value.edx = cpu.id;
            }
            // The size for what is enabled now; in sub-leaf 1 that of the compacted form, which is the same with one extension.
            0xd if subleaf < 2 && value != Leaf::default() => {
                value.ebx = if cpu.xcr0 & XCR0_AVX != 0 { XSAVE_AVX } else { XSAVE_LEGACY };
            }
            0x8000_0001 if !apic => value.edx &= !(1 << bit::APIC.bit),
            0x8000_001e if self.has_leaf(leaf) => {
                value.eax = cpu.id;
                value.ebx = (value.ebx & !0xff) | (cpu.id & 0xff);
            }
            _ => {}
        }
        value
    }

    fn has_leaf(&self, leaf: u32) -> bool {
        self.entries.iter().any(|e| e.leaf == leaf)
    }

    /// The leaf that answers: Intel CPUs take the highest basic leaf for one that is out of range, AMD's return zeros.
    fn effective(&self, leaf: u32) -> u32 {
        let base = self.raw(0, 0);
        let limit = match leaf {
            HYPERVISOR..=0x4fff_ffff if self.has_leaf(HYPERVISOR) => return leaf,
            EXTENDED.. => self.raw(EXTENDED, 0).eax,
            _ => base.eax,
        };
        if leaf > limit && base.ebx == u32::from_le_bytes(*b"Genu") { base.eax } else { leaf }
    }
}

#[cfg(test)]
mod tests;
