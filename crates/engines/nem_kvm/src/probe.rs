//! Whether this host's KVM is usable, and what it offers.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::LazyLock;

use cpum::CpuidTable;
use cpum::cpuid::{Entry, FeatureBit, Leaf, OutputRegister, bit};
use em::{Engine, VmContext};
use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use tm::Clock;
use vbox_types::Hz;

use crate::{msr, sys, vcpu};

/// The only version of KVM's interface there ever was since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Where Intel's virtual 8086 mode for real-mode guests keeps its pages: below the largest firmware image.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// CPUID's leaf about AMD-V.
const SVM_LEAF: u32 = 0x8000_000a;

/// Why guests cannot run on VT-x or AMD-V here. Its text is one clause that says what to do about it.
#[derive(Debug)]
pub enum Unusable {
    /// The CPU shows neither VT-x nor AMD-V; `kvm` tells whether there is a /dev/kvm all the same.
    NoHardware {
        kvm: bool,
    },
    /// The CPU has it, but there is no /dev/kvm.
    NoDevice {
        feature: &'static str,
        module: &'static str,
    },
    /// The CPU has it, but the kernel found it switched off, and locked so.
    OffInFirmware {
        feature: &'static str,
    },
    NoPermission,
    /// Somebody else has the CPU's virtualization extension.
    Busy,
    /// The kernel's KVM lacks something.
    TooOld {
        lacks: String,
    },
    Failed {
        what: &'static str,
        why: String,
    },
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHardware { kvm: true } => f.write_str(
                "the host's CPU shows neither VT-x nor AMD-V, so that its /dev/kvm emulates instructions in software; switch \
                 VT-x/AMD-V on in the firmware, or nested virtualization in the hypervisor below",
            ),
            Self::NoHardware { kvm: false } => f.write_str(
                "the host's CPU shows neither VT-x nor AMD-V; switch it on in the firmware, or nested virtualization in the \
                 hypervisor below",
            ),
            Self::NoDevice { feature, module } => write!(
                f,
                "there is no /dev/kvm although the CPU has {feature}; load the kernel module with \"modprobe {module}\", and if that \
                 fails, switch {feature} on in the firmware"
            ),
            Self::OffInFirmware { feature } => write!(
                f,
                "the CPU has {feature}, but the firmware keeps it off; switch it on in the firmware's setup (often called \
                 virtualization technology or SVM mode) and switch the host off and on"
            ),
            Self::NoPermission => {
                f.write_str("/dev/kvm may not be opened; add yourself to the group kvm and log in again")
            }
            Self::Busy => f.write_str(
                "another hypervisor holds the CPU's virtualization extension; end it or unload its kernel module",
            ),
            Self::TooOld { lacks } => {
                write!(f, "the kernel's KVM lacks {lacks}; Linux 5.16 or newer is needed")
            }
            Self::Failed { what, why } => write!(f, "KVM fails to {what}: {why}"),
        }
    }
}

impl std::error::Error for Unusable {}

/// Where a machine's local APICs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Apics {
    /// In KVM, with the I/O APIC, PIC and PIT in our device models ("split irqchip").
    Kernel,
    /// All in our device models.
    Ours,
}

/// A host whose KVM is usable.
pub struct Host {
    kvm: Kvm,
    tsc: Hz,
    stable: bool,
    supported: CpuId,
    local_apics: bool,
}

impl Host {
    /// Opens KVM and makes a VM, for a moment, to see whether it works.
    pub fn probe() -> Result<Self, Unusable> {
        let hardware = Signs::here().hardware()?;
        let kvm = Kvm::new().map_err(|error| opening(error.errno(), hardware))?;
        if kvm.get_api_version() != API_VERSION {
            return Err(Unusable::TooOld { lacks: "the stable interface".into() });
        }
        let needed = [
            (Cap::UserMemory, "guest memory of user processes"),
            (Cap::ReadonlyMem, "read-only memory"),
            (Cap::UserNmi, "NMI injection"),
            (Cap::ImmediateExit, "immediate exits"),
            (Cap::VcpuEvents, "vCPU events"),
            (Cap::Debugregs, "debug registers"),
            (Cap::Xsave, "XSAVE state"),
            (Cap::SetTssAddr, "a place for its pages"),
        ];
        let mut lacks: Vec<&str> =
            needed.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, what)| *what).collect();
        if kvm.check_extension_raw(KVM_CAP_X86_USER_SPACE_MSR.into()) == 0 {
            lacks.push("model-specific registers in user processes");
        }
        if !lacks.is_empty() {
            return Err(Unusable::TooOld { lacks: lacks.join(", ") });
        }
        let vm = make_vm(&kvm, Apics::Ours)?;
        let first = make_vcpu(&vm, 0)?;
        let khz = first.get_tsc_khz().map_err(|error| failed("tell the counter's rate", error))?;
        if !sys::has_tsc_offset(&first) {
            return Err(Unusable::TooOld { lacks: "offsets of the time-stamp counter".into() });
        }
        // A kernel that finds the counter unreliable takes it off this list.
        let sources = "/sys/devices/system/clocksource/clocksource0/available_clocksource";
        let stable = std::fs::read_to_string(sources)
            .is_ok_and(|text| text.split_whitespace().any(|name| name == "tsc"));
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| failed("tell its CPUID", error))?;
        let local_apics =
            kvm.check_extension(Cap::SplitIrqchip) && kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { kvm, tsc: Hz(u64::from(khz) * 1000), stable, supported, local_apics })
    }

    /// The rate of the guest's time-stamp counter, which is the host's.
    pub fn tsc_frequency(&self) -> Hz {
        self.tsc
    }

    /// Whether the time-stamp counter runs evenly, and alike on all CPUs.
    pub fn has_stable_counter(&self) -> bool {
        self.stable
    }

    /// A clock for the VM that goes with the guest's time-stamp counter.
    pub fn clock(&self) -> Arc<Clock> {
        if self.stable {
            Clock::from_counter(self.tsc.0, Box::new(sys::rdtsc))
        } else {
            Clock::from_counter(1_000_000_000, Box::new(sys::monotonic_raw))
        }
    }

    /// Those of `wanted` that guests have here: what the host's CPU and KVM do, and what our own devices and this engine do.
    pub fn features(&self, wanted: &[FeatureBit]) -> Vec<FeatureBit> {
        const OURS: &[FeatureBit] = &[
            bit::APIC,
            bit::X2APIC,
            bit::TSC_DEADLINE,
            bit::TSC_ADJUST,
            bit::HYPERVISOR,
            bit::HTT,
            bit::CMP_LEGACY,
            bit::TOPOEXT,
        ];
        let has = |f: FeatureBit| match f {
            bit::INVARIANT_TSC => self.stable && supports(&self.supported, f),
            _ => OURS.contains(&f) || supports(&self.supported, f),
        };
        wanted.iter().copied().filter(|f| has(*f)).collect()
    }

    /// What guests find that are to have virtualization themselves, or why they cannot and what to do about it.
    pub fn nested(&self) -> Result<Nested, String> {
        let offered = [(bit::SVM, Hardware::Amd), (bit::VMX, Hardware::Intel)]
            .into_iter()
            .find(|(feature, _)| supports(&self.supported, *feature));
        let Some((feature, hardware)) = offered else {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            return Err(no_nested(hardware(&cpuinfo)));
        };
        if !self.local_apics {
            return Err("KVM has no local APICs here, which guests' own virtual machines need".into());
        }
        let leaf = (hardware == Hardware::Amd)
            .then(|| self.supported.as_slice().iter().find(|e| e.function == SVM_LEAF))
            .flatten()
            .map(|e| Entry {
                leaf: SVM_LEAF,
                subleaf: None,
                value: Leaf { eax: e.eax, ebx: e.ebx, ecx: e.ecx, edx: e.edx },
            });
        Ok(Nested { name: hardware.feature(), feature, leaf })
    }

    /// What KVM uses of the hardware, for VBox.log.
    pub fn describe(&self) -> String {
        let yes = |module: &str, name: &str| {
            let path = format!("/sys/module/{module}/parameters/{name}");
            std::fs::read_to_string(path).is_ok_and(|text| matches!(text.trim(), "Y" | "1"))
        };
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let word = |on: bool| if on { "on" } else { "off" };
        match hardware(&cpuinfo) {
            Some(Hardware::Intel) => format!(
                "VT-x, nested paging {}, VPID {}, unrestricted guest {}",
                word(yes("kvm_intel", "ept")),
                word(yes("kvm_intel", "vpid")),
                word(yes("kvm_intel", "unrestricted_guest"))
            ),
            _ => format!("AMD-V, nested paging {}", word(yes("kvm_amd", "npt"))),
        }
    }

    /// Which parts of KVM's own paravirtualization guests can have: those that KVM sees to itself, for machines with local APICs.
    pub fn paravirt(&self) -> Paravirt {
        const STEAL_TIME: u32 = 1 << 5;
        const PV_EOI: u32 = 1 << 6;
        const PV_UNHALT: u32 = 1 << 7;
        let leaf = self.supported.as_slice().iter().find(|e| e.function == 0x4000_0001);
        let has = |bit| self.local_apics && leaf.is_some_and(|e| e.eax & bit != 0);
        Paravirt { kick: has(PV_UNHALT), end_of_interrupt: has(PV_EOI), steal_time: has(STEAL_TIME) }
    }

    /// One engine for each vCPU of `context`.
    pub fn engines(self, context: &Arc<VmContext>) -> io::Result<Vec<Box<dyn Engine>>> {
        let apics = match context.irq.local_apics() {
            Some(_) if self.local_apics => Apics::Kernel,
            _ => Apics::Ours,
        };
        let vm = make_vm(&self.kvm, apics).map_err(io::Error::other)?;
        vcpu::engines(vm, apics, self.stable, context)
    }
}

/// Virtualization for guests. See [`Host::nested`].
#[derive(Clone, Copy, Debug)]
pub struct Nested {
    /// "VT-x" or "AMD-V".
    pub name: &'static str,
    pub feature: FeatureBit,
    /// The leaf that tells what it comprises, where there is one.
    pub leaf: Option<Entry>,
}

/// Why KVM does not offer guests virtualization.
fn no_nested(hardware: Option<Hardware>) -> String {
    let module = hardware.unwrap_or(Hardware::Amd).module();
    format!(
        "this host's KVM does not offer it to guests; load its module anew with \"modprobe -r {module}; modprobe {module} nested=1\""
    )
}

/// What KVM does for guests that know it. See [`Host::paravirt`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paravirt {
    /// A hypercall ends another vCPU's HLT.
    pub kick: bool,
    /// An interrupt ends by a bit in memory.
    pub end_of_interrupt: bool,
    /// A vCPU learns for how long it did not get a CPU.
    pub steal_time: bool,
}

/// A VM without vCPUs, and with what vCPUs need to exist before them.
fn make_vm(kvm: &Kvm, apics: Apics) -> Result<VmFd, Unusable> {
    let vm = kvm.create_vm().map_err(|error| making("make a virtual machine", error))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        .and_then(|()| vm.set_tss_address(TSS_ADDRESS))
        .map_err(|error| failed("reserve its pages", error))?;
    let reasons = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
    enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, reasons.into())
        .and_then(|()| msr::install_filter(&vm, apics))
        .map_err(|error| failed("pass on model-specific registers", error))?;
    if kvm.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
        // Else KVM raises #UD in the guest for what it cannot emulate, in user mode without a word to us.
        enable(&vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
            .map_err(|error| failed("tell of instructions that it cannot emulate", error))?;
    }
    if apics == Apics::Kernel {
        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, sys::ROUTES.into())
            .map_err(|error| failed("make local APICs", error))?;
    }
    Ok(vm)
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() })
}

fn make_vcpu(vm: &VmFd, id: u64) -> Result<VcpuFd, Unusable> {
    vm.create_vcpu(id).map_err(|error| making("make a virtual CPU", error))
}

fn supports(cpuid: &CpuId, feature: FeatureBit) -> bool {
    let entry = cpuid.as_slice().iter().find(|e| e.function == feature.leaf && e.index == feature.subleaf);
    let value = entry.map_or(0, |e| match feature.register {
        OutputRegister::Eax => e.eax,
        OutputRegister::Ebx => e.ebx,
        OutputRegister::Ecx => e.ecx,
        OutputRegister::Edx => e.edx,
    });
    value >> feature.bit & 1 != 0
}

/// The entries that KVM gets for vCPU `cpu`: what depends on the vCPU is put in.
pub(crate) fn cpuid_entries(table: &CpuidTable, cpu: &cpum::CpuState) -> Vec<kvm_bindings::kvm_cpuid_entry2> {
    let has_subleaves = |leaf| table.entries.iter().any(|e| e.leaf == leaf && e.subleaf.is_some());
    table
        .entries
        .iter()
        // A leaf's answer for all other sub-leaves is zeros, as KVM gives them itself.
        .filter(|e| e.subleaf.is_some() || !has_subleaves(e.leaf))
        .map(|e| {
            let value = table.query(e.leaf, e.subleaf.unwrap_or(0), cpu);
            kvm_bindings::kvm_cpuid_entry2 {
                function: e.leaf,
                index: e.subleaf.unwrap_or(0),
                flags: if e.subleaf.is_some() { kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
                eax: value.eax,
                ebx: value.ebx,
                ecx: value.ecx,
                edx: value.edx,
                ..Default::default()
            }
        })
        .collect()
}

/// Whether the host's CPU is one that QEMU emulates, as in `tools/kvm-test`, with the AMD-V that it emulates: some of what KVM relies on is
/// not there.
pub fn on_emulated_cpu() -> bool {
    const HYPERVISOR: u32 = 1 << 31;
    // Where a hypervisor is below, CPUID costs a thousand times what it does elsewhere.
    static FOUND: LazyLock<bool> = LazyLock::new(|| {
        iem::host_cpuid(1, 0).ecx & HYPERVISOR != 0 && is_tcg(iem::host_cpuid(0x4000_0000, 0))
    });
    *FOUND
}

fn is_tcg(leaf: Leaf) -> bool {
    [leaf.ebx, leaf.ecx, leaf.edx]
        == [u32::from_le_bytes(*b"TCGT"), u32::from_le_bytes(*b"CGTC"), u32::from_le_bytes(*b"GTCG")]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hardware {
    Intel,
    Amd,
}

impl Hardware {
    fn feature(self) -> &'static str {
        match self {
            Self::Intel => "VT-x",
            Self::Amd => "AMD-V",
        }
    }

    fn module(self) -> &'static str {
        match self {
            Self::Intel => "kvm_intel",
            Self::Amd => "kvm_amd",
        }
    }
}

/// What tells of the host before KVM is opened.
struct Signs {
    /// `/proc/cpuinfo`: what the kernel uses.
    cpuinfo: String,
    /// What the CPU itself shows.
    cpuid: Option<Hardware>,
    /// There is a /dev/kvm.
    device: bool,
}

impl Signs {
    fn here() -> Self {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        let cpuid = if iem::host_cpuid(1, 0).ecx & VMX != 0 {
            Some(Hardware::Intel)
        } else if iem::host_cpuid(0x8000_0001, 0).ecx & SVM != 0 {
            Some(Hardware::Amd)
        } else {
            None
        };
        Self {
            cpuinfo: std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default(),
            cpuid,
            device: Path::new("/dev/kvm").exists(),
        }
    }

    /// The hardware that KVM may use.
    fn hardware(&self) -> Result<Hardware, Unusable> {
        match (hardware(&self.cpuinfo), self.cpuid) {
            (Some(hardware), _) => Ok(hardware),
            // The kernel takes the flag back where the firmware has locked the extension off.
            (None, Some(has)) => Err(Unusable::OffInFirmware { feature: has.feature() }),
            (None, None) => Err(Unusable::NoHardware { kvm: self.device }),
        }
    }
}

/// What the host's CPU has, as `/proc/cpuinfo` tells.
fn hardware(cpuinfo: &str) -> Option<Hardware> {
    let line =
        cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == "flags"))?;
    let mut words = line.split_whitespace();
    words.find_map(|word| match word {
        "vmx" => Some(Hardware::Intel),
        "svm" => Some(Hardware::Amd),
        _ => None,
    })
}

/// What an error on opening /dev/kvm means.
fn opening(errno: i32, hardware: Hardware) -> Unusable {
    match errno {
        libc::EACCES | libc::EPERM => Unusable::NoPermission,
        libc::EBUSY => Unusable::Busy,
        libc::ENOENT | libc::ENXIO | libc::ENODEV => {
            Unusable::NoDevice { feature: hardware.feature(), module: hardware.module() }
        }
        other => {
            Unusable::Failed { what: "open /dev/kvm", why: io::Error::from_raw_os_error(other).to_string() }
        }
    }
}

/// What an error on making a VM or a vCPU means, for which KVM switches the extension on.
fn making(what: &'static str, error: kvm_ioctls::Error) -> Unusable {
    match error.errno() {
        libc::EBUSY => Unusable::Busy,
        _ => failed(what, error),
    }
}

fn failed(what: &'static str, error: kvm_ioctls::Error) -> Unusable {
    Unusable::Failed { what, why: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_hardware_is_read_from_the_flags_alone() {
        assert_eq!(hardware("model name\t: svm vmx\nflags\t\t: fpu sse\n"), None);
        assert_eq!(hardware("flags\t\t: fpu svm lm\n"), Some(Hardware::Amd));
        assert_eq!(hardware("flags\t\t: fpu vmx lm\n"), Some(Hardware::Intel));
    }

    #[test]
    fn a_kvm_without_nesting_is_told_how_to_offer_it() {
        assert!(no_nested(Some(Hardware::Intel)).contains("modprobe kvm_intel nested=1"));
        assert!(no_nested(Some(Hardware::Amd)).contains("modprobe -r kvm_amd"));
    }

    #[test]
    fn every_state_of_a_host_is_told_in_one_clause_with_its_mend() {
        let signs = |flags: &str, cpuid, device| Signs {
            cpuinfo: format!("flags\t\t: fpu {flags}\n"),
            cpuid,
            device,
        };
        let before = |signs: Signs| signs.hardware().expect_err("not usable").to_string();
        let busy = || kvm_ioctls::Error::new(libc::EBUSY);
        for (state, text, mends) in [
            ("no extension", before(signs("sse", None, false)), ["shows neither", "nested virtualization"]),
            (
                "software KVM",
                before(signs("sse", None, true)),
                ["emulates instructions", "nested virtualization"],
            ),
            (
                "VT-x off",
                before(signs("sse", Some(Hardware::Intel), false)),
                ["has VT-x", "firmware's setup"],
            ),
            ("AMD-V off", before(signs("sse", Some(Hardware::Amd), true)), ["has AMD-V", "firmware's setup"]),
            (
                "no module",
                opening(libc::ENOENT, Hardware::Amd).to_string(),
                ["no /dev/kvm", "modprobe kvm_amd"],
            ),
            (
                "module off",
                opening(libc::ENXIO, Hardware::Intel).to_string(),
                ["no /dev/kvm", "modprobe kvm_intel"],
            ),
            (
                "permission",
                opening(libc::EACCES, Hardware::Amd).to_string(),
                ["may not be opened", "group kvm"],
            ),
            ("taken", opening(libc::EBUSY, Hardware::Amd).to_string(), ["another hypervisor", "end it"]),
            (
                "taken later",
                making("make a virtual machine", busy()).to_string(),
                ["another hypervisor", "end it"],
            ),
            (
                "old",
                Unusable::TooOld { lacks: "immediate exits".into() }.to_string(),
                ["lacks immediate exits", "Linux 5.16"],
            ),
            (
                "unknown",
                opening(libc::EIO, Hardware::Amd).to_string(),
                ["open /dev/kvm", "Input/output error"],
            ),
        ] {
            for mend in mends {
                assert!(text.contains(mend), "{state}: {text}");
            }
            assert!(!text.contains(". ") && !text.ends_with('.'), "{state}: {text}");
        }
        assert!(matches!(signs("svm", Some(Hardware::Amd), false).hardware(), Ok(Hardware::Amd)));
    }
}
