//! Packages of machines: whatever the bytes of a descriptor, a manifest or an archive, no panic; no file outside the package is
//! named; a manifest that is understood is written and read back as it was. What kind of file it is, its first byte says.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use ovf::{Envelope, Manifest, Package};

fuzz_target!(|bytes: &[u8]| {
    match bytes.first() {
        Some(b'<') => {
            let Ok(envelope) = Envelope::parse("x.ovf", bytes) else { return };
            for disk in &envelope.disks {
                let file = envelope.file_of(disk).map_or("", |f| f.href.as_str());
                let _ = disk.kind(file);
            }
            for system in &envelope.systems {
                let _ = ovf::os_type_of(system.cim_os, &system.os_description);
            }
        }
        Some(b'S') => {
            let Ok(manifest) = Manifest::parse("x.mf", bytes) else { return };
            assert_eq!(Manifest::parse("x.mf", manifest.to_text().as_bytes()).unwrap(), manifest);
        }
        _ => {
            let path = Path::new("/dev/shm").join(format!("fuzz-{}.ova", std::process::id()));
            std::fs::write(&path, bytes).unwrap();
            let Ok(package) = Package::open(&path) else { return };
            for file in package.envelope.files.iter().filter(|f| !f.href.is_empty()).take(16) {
                let plain = |c| matches!(c, Component::Normal(_) | Component::CurDir);
                assert!(Path::new(&file.href).components().all(plain));
                let _ = package.copy(file, &mut std::io::sink(), 1 << 20, &mut |_, _| true);
            }
        }
    }
});
