//! What the VM process learns from its host: time, time zone, processor.

use std::time::{SystemTime, UNIX_EPOCH};

use cpum::CpuidTable;
use cpum::cpuid::{Apic, Config, FeatureBit, Leaf, bit};
use dev_pc::rtc::WallClock;
use vbox_types::Hz;

use crate::config::{HypervDebug, MachineConfig};
use crate::engine::Backend;
use crate::profile;

/// The local APIC timers count nanoseconds.
const APIC_TIMER: u64 = 1_000_000_000;

/// Taken where the host does not tell its CPU's rate.
const FALLBACK: Hz = Hz(2_000_000_000);

fn cpuinfo() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// A field of the first processor in `/proc/cpuinfo`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// The rate of the guest's time-stamp counter: about that of the host's CPU, in whole megahertz. The counter itself is derived
/// from virtual time, so it is exact whatever the rate.
pub fn tsc_frequency() -> Hz {
    rate(&cpuinfo()).unwrap_or(FALLBACK)
}

fn rate(cpuinfo: &str) -> Option<Hz> {
    let megahertz: f64 = field(cpuinfo, "cpu MHz")?.parse().ok()?;
    (100.0..20_000.0).contains(&megahertz).then(|| Hz(megahertz.round() as u64 * 1_000_000))
}

/// Coordinated universal time for the guest: the host's, plus the offset from the settings; in nanoseconds since 1970.
pub fn utc(config: &MachineConfig) -> impl Fn() -> i64 + Send + Sync + 'static {
    let offset_ms = config.time_offset_ms;
    move || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanos = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        nanos.saturating_add(offset_ms.saturating_mul(1_000_000))
    }
}

/// The guest's wall clock: the host's time in UTC or in the host's zone, plus the offset from the settings.
pub fn wall_clock(config: &MachineConfig) -> WallClock {
    let (utc, in_utc) = (utc(config), config.rtc_utc);
    Box::new(move || {
        let zone = if in_utc { 0 } else { i64::from(jiff::Zoned::now().offset().seconds()) };
        utc().saturating_add(zone * 1_000_000_000)
    })
}

/// Nanoseconds for which the calling thread could run and had no CPU.
pub fn stolen() -> u64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// What the paravirtualization provider is set up with.
pub fn gim_setup(config: &MachineConfig, tsc: Hz, backend: &Backend) -> gim::Setup {
    gim::Setup {
        provider: config.paravirt,
        vcpus: config.cpus,
        tsc_frequency: tsc,
        apic_frequency: Hz(APIC_TIMER),
        x2apic: config.x2apic,
        hypercalls: backend.has_hypercalls(),
        kvm: backend.kvm_features(config.ioapic),
        stable_counter: backend.has_stable_counter(),
        hyperv_vendor: config.hyperv_vendor,
        debug: hyperv_debug(config).map(|debug| gim::debug::DebugInterface {
            // The host's KVM answers calls itself.
            calls: debug.interface.calls && backend.has_hypercalls(),
            ..debug.interface
        }),
    }
}

/// The kernel debugger that the guest finds. Guests look for one with Microsoft's own hypervisor only.
pub fn hyperv_debug(config: &MachineConfig) -> Option<HypervDebug> {
    config.hyperv_debug.filter(|_| config.hyperv_vendor == gim::hyperv_vendor())
}

/// What CPUID tells in this machine: the host's processor or the profile's, with those of its features that the engine has.
pub fn cpuid(
    config: &MachineConfig,
    setup: &gim::Setup,
    mut features: Vec<FeatureBit>,
    nested: Option<nem_kvm::Nested>,
) -> CpuidTable {
    let apic = match (config.ioapic, config.x2apic) {
        (false, _) => Apic::None,
        (true, false) => Apic::Apic,
        (true, true) => Apic::X2Apic,
    };
    // Linux prefers an invariant counter to any paravirtual clock.
    features.retain(|&f| f != bit::INVARIANT_TSC || !config.paravirt.has_clock());
    features.retain(|&f| config.cpu_profile.is_none_or(|shown| profile::has(shown, f)));
    features.extend(nested.map(|nested| nested.feature));
    let wanted = Config {
        vcpus: config.cpus,
        tsc_frequency: setup.tsc_frequency,
        apic_frequency: Hz(APIC_TIMER),
        apic,
        pae: config.pae,
        long_mode: config.long_mode,
        paravirt: setup.cpuid(),
        features,
        overrides: config.cpuid_overrides.clone(),
    };
    let mut table = match config.cpu_profile {
        None => CpuidTable::build(&wanted, &iem::features::host_cpuid),
        Some(shown) => CpuidTable::build(&wanted, &|leaf, subleaf| profile::cpuid(shown, leaf, subleaf)),
    };
    // A profile of another vendor does not show it, and settings may replace the leaf.
    if let Some(nem_kvm::Nested { feature, leaf: Some(leaf), .. }) = nested
        && table.has(feature)
        && table.raw(leaf.leaf, 0) == Leaf::default()
    {
        table.entries.push(leaf);
    }
    table
}

/// Whether the guest finds CPUs of AMD's kind.
pub fn is_amd(cpuid: &CpuidTable) -> bool {
    let vendor = cpuid.raw(0, 0).ebx;
    [*b"Auth", *b"Hygo"].map(u32::from_le_bytes).contains(&vendor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_hosts_in_whole_megahertz() {
        assert_eq!(rate("processor\t: 0\ncpu MHz\t\t: 2594.106\n"), Some(Hz(2_594_000_000)));
        assert_eq!(rate("cpu MHz : 0.000"), None);
    }
}
