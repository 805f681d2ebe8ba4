//! IA32_ARCH_CAPABILITIES: attacks that the guest's kernel need not defend itself against (Intel SDM volume 4, table 2-2, MSR 0x10a).
//!
//! Where a defence would have to empty buffers of the host's CPU, only the host can do it, and it says whether it must: the guest is told
//! of what the host is not affected by. Defences against Meltdown keep the kernel's pages out of the user's page tables, which no CPU
//! reads while an engine in software runs the guest: they would cost a change of address space at every system call for nothing.

use std::path::Path;
use std::sync::OnceLock;

/// Rights are checked before an address is formed.
const RDCL_NO: u64 = 1 << 0;
/// What Linux calls an attack, and the bits that say a CPU is safe from it.
const ATTACKS: [(&str, u64); 7] = [
    ("spec_store_bypass", 1 << 4),
    ("mds", 1 << 5),
    ("itlb_multihit", 1 << 6),
    ("tsx_async_abort", 1 << 8),
    ("mmio_stale_data", 1 << 13 | 1 << 14 | 1 << 15),
    ("gather_data_sampling", 1 << 26),
    ("reg_file_data_sampling", 1 << 27),
];

/// The register's value on this host.
pub(crate) fn get() -> u64 {
    static VALUE: OnceLock<u64> = OnceLock::new();
    *VALUE.get_or_init(|| {
        let folder = Path::new("/sys/devices/system/cpu/vulnerabilities");
        value(|attack| std::fs::read_to_string(folder.join(attack)).ok())
    })
}

/// The value, from what the host's Linux says of an attack.
fn value(told: impl Fn(&str) -> Option<String>) -> u64 {
    let safe = |attack: &str| told(attack).is_some_and(|text| text.trim() == "Not affected");
    ATTACKS.iter().filter(|(attack, _)| safe(attack)).fold(RDCL_NO, |all, (_, bits)| all | bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_host_is_not_affected_by_is_announced() {
        assert_eq!(value(|_| None), RDCL_NO);
        let told = |attack: &str| match attack {
            "mds" => Some("Not affected\n".to_owned()),
            "mmio_stale_data" => Some("Mitigation: Clear CPU buffers; SMT vulnerable\n".to_owned()),
            _ => Some("Vulnerable\n".to_owned()),
        };
        assert_eq!(value(told), RDCL_NO | 1 << 5);
        assert_eq!(value(|_| Some("Not affected".to_owned())), 0x0c00_e171);
    }
}
