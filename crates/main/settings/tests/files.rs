//! Settings files on a real disk.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use settings::*;

const V4_3: &[u8] = include_bytes!("samples/v4_3.vbox");
const V7_0: &[u8] = include_bytes!("samples/v7_0.vbox");

/// An empty directory of the test's own.
fn directory(test: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_change_is_saved_and_the_file_before_it_kept() {
    let directory = directory("saved");
    let path = directory.join("desk.vbox");
    fs::write(&path, V7_0).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let mut file = MachineFile::open(&path).unwrap();
    assert_eq!(file.save().unwrap(), Saved { written: false, backup: None });
    assert_eq!(names(&directory), ["desk.vbox"]);

    file.settings.hardware.memory.ram_mb = 1234;
    assert_eq!(file.save().unwrap(), Saved { written: true, backup: None });
    assert_eq!(names(&directory), ["desk.vbox", "desk.vbox-prev"]);
    assert_eq!(fs::read(directory.join("desk.vbox-prev")).unwrap(), V7_0);
    assert_eq!(MachineFile::open(&path).unwrap().settings, file.settings);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(file.save().unwrap(), Saved { written: false, backup: None });
}

#[test]
fn a_file_whose_version_rises_is_kept_in_its_old_one() {
    let directory = directory("backup");
    let path = directory.join("build.vbox");
    fs::write(&path, V4_3).unwrap();
    let mut file = MachineFile::open(&path).unwrap();
    file.settings.hardware.tpm.tpm_type = TpmType::V1_2;
    let backup = directory.join("build-1.14-linux.vbox");
    assert_eq!(file.save().unwrap(), Saved { written: true, backup: Some(backup.clone()) });
    assert_eq!(file.version(), SettingsVersion::V1_19);
    assert_eq!(file.save().unwrap(), Saved { written: false, backup: None });
    assert_eq!(fs::read(&backup).unwrap(), V4_3);

    // An old copy that is there already is older still, and stays.
    fs::write(&path, V4_3).unwrap();
    fs::write(&backup, "precious").unwrap();
    let mut file = MachineFile::open(&path).unwrap();
    file.settings.hardware.tpm.tpm_type = TpmType::V1_2;
    assert_eq!(file.save().unwrap().backup, None);
    assert_eq!(fs::read(&backup).unwrap(), b"precious");
}

#[test]
fn a_newer_file_is_refused_by_name_and_left_untouched() {
    let directory = directory("newer");
    let path = directory.join("future.vbox");
    let text = String::from_utf8(V7_0.to_vec()).unwrap().replace("1.19-linux", "2.1-linux");
    fs::write(&path, &text).unwrap();
    let error = MachineFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("future.vbox") && error.contains("2.1-linux"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    assert_eq!(names(&directory), ["future.vbox"]);
}

#[test]
fn a_broken_or_missing_file_is_reported_with_the_copy_that_may_replace_it() {
    let directory = directory("broken");
    let path = directory.join("x.vbox");
    assert!(!MachineFile::open(&path).unwrap_err().to_string().contains("-prev"));
    fs::write(directory.join("x.vbox-prev"), V7_0).unwrap();
    let missing = MachineFile::open(&path).unwrap_err().to_string();
    assert!(missing.contains("does not exist") && missing.contains("x.vbox-prev"), "{missing}");

    fs::write(&path, &V7_0[..1000]).unwrap();
    let broken = MachineFile::open(&path).unwrap_err().to_string();
    assert!(broken.starts_with(&format!("Error in {} (line ", path.display())), "{broken}");
    assert!(broken.contains("x.vbox-prev"), "{broken}");
    assert_eq!(fs::read(&path).unwrap(), &V7_0[..1000]);
}

#[test]
fn a_new_file_is_written_once_and_for_its_owner_only() {
    let directory = directory("new");
    let path = directory.join("VirtualBox.xml");
    let file = GlobalFile::create(&path, GlobalSettings::fresh()).unwrap();
    assert_eq!(file.version(), SettingsVersion::V1_12);
    assert_eq!(GlobalFile::open(&path).unwrap().settings, GlobalSettings::fresh());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = GlobalFile::create(&path, GlobalSettings::default()).unwrap_err();
    assert!(matches!(error, SettingsError::Io { action: "create", .. }), "{error}");
    assert_eq!(names(&directory), ["VirtualBox.xml"]);
}

#[test]
fn a_failed_save_leaves_the_file_and_a_later_one_succeeds() {
    let directory = directory("failed");
    let path = directory.join("x.vbox");
    fs::write(&path, V7_0).unwrap();
    let mut file = MachineFile::open(&path).unwrap();
    file.settings.description = "bell \u{7}".into();
    assert!(file.save().is_err());
    assert_eq!(fs::read(&path).unwrap(), V7_0);
    file.settings.description = "fine".into();
    assert!(file.save().unwrap().written);
    assert_eq!(MachineFile::open(&path).unwrap().settings.description, "fine");

    // A directory stands where the temporary file would go.
    fs::create_dir(directory.join("x.vbox-tmp")).unwrap();
    file.settings.description = "not yet".into();
    assert!(file.save().unwrap_err().to_string().contains("x.vbox-tmp"));
    fs::remove_dir(directory.join("x.vbox-tmp")).unwrap();
    assert!(file.save().unwrap().written);
    assert_eq!(MachineFile::open(&path).unwrap().settings.description, "not yet");
}

#[test]
fn a_file_behind_a_link_is_replaced_where_it_is() {
    let directory = directory("linked");
    let real = directory.join("real");
    fs::create_dir(&real).unwrap();
    fs::write(real.join("x.vbox"), V7_0).unwrap();
    let link = directory.join("x.vbox");
    symlink(real.join("x.vbox"), &link).unwrap();
    let mut file = MachineFile::open(&link).unwrap();
    file.settings.name = "renamed".into();
    file.save().unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(names(&directory), ["real", "x.vbox"]);
    assert_eq!(names(&real), ["x.vbox", "x.vbox-prev"]);
    assert_eq!(MachineFile::open(&link).unwrap().settings.name, "renamed");
}

#[test]
fn a_huge_file_is_refused_before_it_is_read() {
    let path = directory("huge").join("x.vbox");
    fs::File::create(&path).unwrap().set_len(65 << 20).unwrap();
    let error = MachineFile::open(&path).unwrap_err();
    assert!(matches!(error, SettingsError::TooLarge { size, .. } if size == 65 << 20), "{error}");
}

#[test]
fn other_kinds_of_files_are_told_apart() {
    let directory = directory("kinds");
    let machine = directory.join("x.vbox");
    fs::write(&machine, V7_0).unwrap();
    let error = GlobalFile::open(&machine).unwrap_err().to_string();
    assert!(error.contains("Required VirtualBox/Global element is missing"), "{error}");

    let encrypted = "<VirtualBox version='1.19-linux'><MachineEncrypted uuid='{0f1d2c3b-4a59-4687-8796-a5b4c3d2e1f0}'/></VirtualBox>";
    fs::write(&machine, encrypted).unwrap();
    let error = MachineFile::open(&machine).unwrap_err().to_string();
    assert!(error.contains("encrypted"), "{error}");
}
