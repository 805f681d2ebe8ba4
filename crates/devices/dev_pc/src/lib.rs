//! The chips every PC has: interrupt controllers, timer, clock, DMA, keyboard controller and serial ports.
//!
//! Each module holds one chip: a `State` that is a pure function of the values written and the time, and the device around it
//! that decodes ports and drives lines. `new` builds the device, `register` claims its ports.
//!
//! # Assembly of the board
//!
//! The order follows from who needs whom. `apic` is a `dev_apic::Apic`, `control` is EM.
//!
//! ```text
//! let pic = Pic::new();                         Pic::register(&pic, &iom);
//! pic.lock().connect_intr(apic.intr_line());    apic.connect_pic(Pic::output(&pic));    apic.register(&pgm);
//! let wiring = Wiring::new(Pic::inputs(&pic), apic.io_apic());      // all interrupt lines from here on
//! let bridge = I440Fx::new(&bus, &pgm, ram, bios);                  I440Fx::register(&bridge, &iom, &bus);
//! let piix3 = Piix3::new(wiring.clone(), control.clone());          Piix3::register(&piix3, &iom, &bus);
//! let acpi = AcpiPm::new(&iom, wiring.isa(9), control, &timers, true);   AcpiPm::register(&acpi, &iom, &bus);
//! let cpus = CpuHotplug::new(AcpiPm::events(&acpi, EVENT), present);     CpuHotplug::register(&cpus, &iom);   // if configured
//! let hpet = Hpet::new(&wiring, &timers);       Hpet::register(&hpet, &pgm);            // if configured
//! let pit = Pit::new(wiring.isa(0), &timers);   …                                       // ISA devices: wiring.isa(irq)
//! let nic = …(wiring.intx(devfn, 1));                                                   // PCI devices
//! let fw_cfg = FwCfg::new(&pgm);                FwCfg::register(&fw_cfg, &iom);
//! fw_cfg.lock().add_machine(cpus, ram); …add_boot(…); tables::add_acpi(…); tables::add_smbios(…);
//! ```
//!
//! The machine maps RAM from address 0 (up to [`memory_map::LOW_RAM_LIMIT`], the rest at [`memory_map::HIGH_RAM`]) in `Layer::Ram` and the
//! BIOS image in `Layer::Rom` so that it ends at 4 GiB; the host bridge shows the image's end below 1 MiB by itself. At reset, devices may be
//! reset in any order, and [`pdm::pci::PciBus::reset`] comes with them. Saved units may be loaded in any order after a reset.

pub mod acpi_pm;
pub mod cpu_hotplug;
pub mod dma;
pub mod fw_cfg;
pub mod hpet;
pub mod i440fx;
pub mod i8042;
pub mod memory_map;
pub mod pic;
pub mod piix3;
pub mod pit;
pub mod ps2;
pub mod rtc;
pub mod serial;
pub mod tables;

#[cfg(test)]
mod testing {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use ssm::Saveable;

    /// Saves `one`, loads that into `other`, and expects the same bytes again; a shortened state is refused and leaves
    /// `other` as it was.
    pub(crate) fn assert_saved_state_survives<D: Saveable>(one: &Arc<Mutex<D>>, other: &Arc<Mutex<D>>) {
        let save = |device: &Arc<Mutex<D>>| {
            let mut out = ssm::Writer::new();
            device.lock().save(&mut out);
            out.into_bytes()
        };
        let bytes = save(one);
        let fresh = save(other);
        assert_ne!(bytes, fresh, "the test must save something else than the state after reset");
        let short = ssm::Reader::new("test", 1, &bytes[..bytes.len() - 1]);
        assert!(other.lock().load(short).is_err());
        assert_eq!(save(other), fresh);
        other.lock().load(ssm::Reader::new("test", 1, &bytes)).unwrap();
        assert_eq!(save(other), bytes);
        let newer = ssm::Reader::new("test", other.lock().unit_version() + 1, &bytes);
        assert!(matches!(other.lock().load(newer), Err(ssm::Error::Newer { .. })));
    }

    /// Holds a unit's format still: `one` must save the bytes of the golden file (hexadecimal, made when the version was
    /// introduced). Another format needs another version, and a golden file of its own beside the old one.
    pub(crate) fn assert_golden<D: Saveable>(one: &Arc<Mutex<D>>, golden: &str) {
        let mut out = ssm::Writer::new();
        let one = one.lock();
        one.save(&mut out);
        let text: String = out.into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let golden: String = golden.split_whitespace().collect();
        assert_eq!(text, golden, "golden file of {} version {}", one.unit_name(), one.unit_version());
    }
}
