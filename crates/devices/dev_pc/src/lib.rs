//! The chips every PC has: interrupt controllers, timer, clock, DMA, keyboard controller and serial ports.
//!
//! Each module holds one chip: a `State` that is a pure function of the values written and the time, and the device around it
//! that decodes ports and drives lines. `new` builds the device, `register` claims its ports.

pub mod acpi_pm;
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
}
