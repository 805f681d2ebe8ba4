//! `VirtualBox.xml`: whatever the bytes, no panic; a document that parses comes back byte for byte; settings that
//! are understood are edited consistently.
#![no_main]

use libfuzzer_sys::fuzz_target;
use settings::{Document, GlobalSettings, MachineEntry};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut document) = Document::parse(bytes) else { return };
    assert_eq!(document.to_text().as_bytes(), bytes);
    let Ok((mut settings, _)) = GlobalSettings::load(&document) else { return };
    assert!(!settings.apply(&mut document).unwrap().changed);

    let uuid = "0f1d2c3b-4a59-4687-8796-a5b4c3d2e1f0".parse().unwrap();
    settings.machines.insert(0, MachineEntry { uuid, settings_file: "/vm/fuzz.vbox".into() });
    settings.system_properties.log_history_count ^= 1;
    if settings.apply(&mut document).is_ok() {
        let again = Document::parse(document.to_text().as_bytes()).unwrap();
        let (read, _) = GlobalSettings::load(&again).unwrap();
        assert_eq!(read.system_properties, settings.system_properties);
        assert_eq!(read.machines.len(), settings.machines.len());
    }
});
