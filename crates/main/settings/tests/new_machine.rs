//! What a machine's file looks like when the machine is created.

use settings::{Document, MachineSettings, OsType, SettingsVersion, Timestamp};
use uuid::Uuid;

fn fresh(os: &str) -> MachineSettings {
    let uuid = Uuid::try_parse("0f1d2c3b-4a59-4687-8796-a5b4c3d2e1f0").unwrap();
    let mut machine = MachineSettings::new_for(OsType::find(os).unwrap(), "Fresh", uuid);
    machine.last_state_change = Some(Timestamp(1_700_000_000));
    machine.hardware.network[0].mac_address = "080027AABBCC".into();
    machine
}

#[test]
fn a_fresh_debian_machine_is_written_as_its_golden_file() {
    let text = fresh("Debian_64").to_document().unwrap().to_text();
    assert_eq!(text, include_str!("golden/fresh_debian_64.vbox"));
}

#[test]
fn a_debian_machine_with_defaults_is_written_as_its_golden_file() {
    let mut machine = fresh("Debian_64");
    machine.apply_os_defaults(OsType::find("Debian_64").unwrap());
    let text = machine.to_document().unwrap().to_text();
    assert_eq!(text, include_str!("golden/default_debian_64.vbox"));
}

#[test]
fn every_os_types_machine_is_read_as_it_was_written() {
    for os in OsType::all() {
        for with_defaults in [false, true] {
            let mut machine = fresh(os.id);
            if with_defaults {
                machine.apply_os_defaults(os);
            }
            let document = machine.to_document().unwrap();
            let (read, version) = MachineSettings::load(&document).unwrap();
            assert_eq!(read, machine, "{}", os.id);
            assert_eq!(version, SettingsVersion::V1_19);
            let again = Document::parse(document.to_text().as_bytes()).unwrap();
            assert_eq!(MachineSettings::load(&again).unwrap().0, machine, "{}", os.id);
        }
    }
}
