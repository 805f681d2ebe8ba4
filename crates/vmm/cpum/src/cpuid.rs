//! What CPUID answers.

/// The four registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
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

impl CpuidTable {
    /// The stored answer, before anything dynamic: the exact leaf, or zeros.
    pub fn raw(&self, leaf: u32, subleaf: u32) -> Leaf {
        self.entries
            .iter()
            .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
            .map_or_else(Leaf::default, |e| e.value)
    }
}
