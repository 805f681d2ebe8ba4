//! The host computer, from `/proc`, `/sys` and the CPUID instruction.

use std::collections::HashSet;
use std::fs;
use std::process::{Command, Stdio};

/// What `/proc/cpuinfo` says of each CPU that is online.
pub(crate) struct Cpus {
    pub(crate) online: u32,
    pub(crate) cores: u32,
    text: String,
}

impl Cpus {
    pub(crate) fn read() -> Self {
        let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mut online = 0;
        let mut cores = HashSet::new();
        for cpu in text.split("\n\n").filter(|b| !b.trim().is_empty()) {
            online += 1;
            cores.insert((field(cpu, "physical id"), field(cpu, "core id")));
        }
        Self { online: online.max(1), cores: (cores.len() as u32).max(1), text }
    }

    fn cpu(&self, index: u32) -> Option<&str> {
        self.text.split("\n\n").filter(|b| !b.trim().is_empty()).nth(index as usize)
    }

    /// MHz as the CPU runs now.
    pub(crate) fn speed(&self, index: u32) -> u32 {
        let text = self.cpu(index).and_then(|c| field(c, "cpu MHz"));
        text.and_then(|t| t.parse::<f64>().ok()).map_or(0, |mhz| mhz as u32)
    }

    pub(crate) fn description(&self, index: u32) -> String {
        self.cpu(index).and_then(|c| field(c, "model name")).unwrap_or_default()
    }

    pub(crate) fn has_flag(&self, flag: &str) -> bool {
        let flags = self.cpu(0).and_then(|c| field(c, "flags")).unwrap_or_default();
        flags.split_whitespace().any(|f| f == flag)
    }
}

fn field(block: &str, name: &str) -> Option<String> {
    block.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// CPUs that the kernel could bring online.
pub(crate) fn present_cpus(online: u32) -> u32 {
    let text = fs::read_to_string("/sys/devices/system/cpu/present").unwrap_or_default();
    count_list(text.trim()).unwrap_or(online).max(online)
}

/// The number of elements of a kernel list such as `0-3,8`.
fn count_list(text: &str) -> Option<u32> {
    let mut count = 0u32;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

/// Total and available memory in MB.
pub(crate) fn memory() -> (u32, u32) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mb = |name: &str| {
        let kb =
            field(&text, name).and_then(|v| v.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()));
        u32::try_from(kb.unwrap_or(0) / 1024).unwrap_or(u32::MAX)
    };
    (mb("MemTotal"), mb("MemAvailable"))
}

/// Name and release of the kernel.
pub(crate) fn system() -> (String, String) {
    let uname = rustix::system::uname();
    (uname.sysname().to_string_lossy().into_owned(), uname.release().to_string_lossy().into_owned())
}

/// What guest code runs on here by default, and why, as the VM process tells: it is the one that looks.
pub(crate) fn execution_engine() -> Option<String> {
    let program = main_api::ipc::find_program("VBoxHeadless")?;
    let run = Command::new(program).arg("--describe-engine").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8(run.stdout).ok()?;
    (run.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// Whether KVM gives guests hardware virtualization of their own.
pub(crate) fn offers_nesting() -> bool {
    ["kvm_amd", "kvm_intel"].iter().any(|module| {
        let value = fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).unwrap_or_default();
        matches!(value.trim(), "1" | "Y")
    })
}

/// A leaf of the CPUID instruction: eax, ebx, ecx, edx.
pub(crate) fn cpuid(leaf: u32, sub_leaf: u32) -> (u32, u32, u32, u32) {
    #[cfg(target_arch = "x86_64")]
    {
        let r = std::arch::x86_64::__cpuid_count(leaf, sub_leaf);
        (r.eax, r.ebx, r.ecx, r.edx)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (leaf, sub_leaf);
        (0, 0, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_lists_are_counted() {
        assert_eq!(count_list("0-3"), Some(4));
        assert_eq!(count_list("0,2-3,8"), Some(4));
        assert_eq!(count_list(""), None);
        assert_eq!(count_list("3-0"), None);
    }

    #[test]
    fn this_host_has_a_processor_and_memory() {
        assert!(Cpus::read().online >= 1);
        assert!(memory().0 > 0);
    }
}
