//! dev_apic
