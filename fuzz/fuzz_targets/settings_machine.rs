//! Machine settings files: whatever the bytes, no panic; a document that parses comes back byte for byte; settings
//! that are understood are written, read back and edited consistently.
#![no_main]

use libfuzzer_sys::fuzz_target;
use settings::{Document, MachineSettings};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut document) = Document::parse(bytes) else { return };
    assert_eq!(document.to_text().as_bytes(), bytes);
    let Ok((settings, version)) = MachineSettings::load(&document) else { return };
    assert!(!settings.apply(&mut document).unwrap().changed);

    // Unknown or odd content must not keep an edit from being read back.
    let mut edited = settings.clone();
    edited.aborted = !edited.aborted;
    edited.hardware.memory.ram_mb ^= 1;
    edited.hardware.bios.ioapic = !edited.hardware.bios.ioapic;
    edited.hardware.cpu.x2apic = false;
    edited.hardware.audio.enabled = !edited.hardware.audio.enabled;
    edited.extra_data.insert("fuzz".into(), "<&>".into());
    edited.hardware.usb.device_filters.pop();
    edited.hardware.storage_controllers.pop();
    edited.media_registry.hard_disks.pop();
    if edited.apply(&mut document).is_ok() {
        let again = Document::parse(document.to_text().as_bytes()).unwrap();
        let (read, now) = MachineSettings::load(&again).unwrap();
        assert!(now >= version);
        assert_eq!(read.aborted, edited.aborted);
        assert_eq!(read.hardware.memory, edited.hardware.memory);
        assert_eq!(read.hardware.bios, edited.hardware.bios);
        assert_eq!((read.uuid, &read.name), (edited.uuid, &edited.name));
        assert_eq!(read.extra_data, edited.extra_data);
        assert_eq!(read.media_registry, edited.media_registry);
        assert_eq!(read.groups, edited.groups);
        assert_eq!(read.hardware.storage_controllers, edited.hardware.storage_controllers);
        assert_eq!(read.hardware.usb, edited.hardware.usb);
        assert_eq!(read.hardware.audio, edited.hardware.audio);
        assert_eq!(read.hardware.cpu, edited.hardware.cpu);
    }
});
