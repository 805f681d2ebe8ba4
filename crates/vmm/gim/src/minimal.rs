//! The minimal provider: the leaf with frequencies that VMware defined, for guests such as macOS that cannot measure them.

use cpum::cpuid::Entry;
use vbox_types::Hz;

use crate::{HYPERVISOR, Setup, leaf};

/// The leaf with the frequencies, in kHz.
pub(crate) const TIMING: u32 = HYPERVISOR + 0x10;

pub(crate) fn leaves(setup: &Setup) -> Vec<Entry> {
    let khz = |frequency: Hz| u32::try_from((frequency.0 + 500) / 1000).unwrap_or(u32::MAX);
    vec![
        leaf(HYPERVISOR, TIMING, 0, 0, 0),
        leaf(TIMING, khz(setup.tsc_frequency), khz(setup.apic_frequency), 0, 0),
    ]
}
