//! Machines in and out of packages, and copies of machines: with real images, and nothing left behind when it fails.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use common::*;
use main_api::enums::*;
use main_api::idl::*;
use main_api::types::ObjRef;
use main_api::{ApiResult, Client, Proxy};
use vbox_types::ResultCode;

/// A machine called "a" with a small disk that holds a pattern.
fn machine_with_disk(home: &Home, client: &Client) -> Proxy<IMachine> {
    let machine = create(client, "a");
    let vbox = client.virtual_box();
    let location = home.dir.join("vms/a/a.vdi");
    let args = ("VDI".into(), location.display().to_string(), AccessMode::ReadWrite, DeviceType::HardDisk);
    let medium = client.at(vbox.call(IVirtualBox::CreateMedium, args).unwrap());
    let made = medium.call(IMedium::CreateBaseStorage, (4 << 20, vec![])).unwrap();
    client.at(made).wait(|_| {}).unwrap();
    let image = vd::Image::open(&location, vd::OpenMode::ReadWrite, vd::Format::Vdi).unwrap();
    image.write(1 << 20, &pattern()).unwrap();
    image.flush().unwrap();
    drop(image);
    let session = client.lock_machine(&machine, LockType::Write).unwrap();
    let changed = session.machine().unwrap();
    changed.call(IMachine::AddStorageController, ("SATA Controller".into(), StorageBus::SATA)).unwrap();
    let place = ("SATA Controller".into(), 0, 0, DeviceType::HardDisk, medium.reference());
    changed.call(IMachine::AttachDevice, place).unwrap();
    changed.write(IMachine::MemorySize, 333).unwrap();
    changed.call(IMachine::SaveSettings, ()).unwrap();
    drop(session);
    client.find_machine("a").unwrap()
}

/// Data that does not compress away, so that damage to it shows.
fn pattern() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..0x1_0000).map(|_| next()).collect()
}

fn disk_of(machine: &Proxy<IMachine>) -> PathBuf {
    let attachments = machine.read(IMachine::MediumAttachments).unwrap();
    let medium = machine.at(attachments[0].clone()).object(IMediumAttachment::Medium).unwrap();
    medium.read(IMedium::Location).unwrap().into()
}

fn check_disk(path: &Path, format: vd::Format) {
    let image = vd::Image::open(path, vd::OpenMode::ReadOnly, format).unwrap();
    assert_eq!(image.size().0, 4 << 20);
    let mut found = vec![0; 0x1_0000];
    image.read(1 << 20, &mut found).unwrap();
    assert!(found == pattern(), "the disk's content has changed");
}

fn export(client: &Client, machine: &Proxy<IMachine>, path: &Path) -> ApiResult<()> {
    let appliance = client.at(client.virtual_box().call(IVirtualBox::CreateAppliance, ())?);
    let path = path.display().to_string();
    machine.call(IMachine::ExportTo, (appliance.reference(), path.clone()))?;
    let options = vec![ExportOptions::CreateManifest];
    let progress = appliance.call(IAppliance::Write, ("ovf-2.0".into(), options, path))?;
    client.at(progress).wait(|_| {})
}

fn import(client: &Client, path: &Path) -> ApiResult<Vec<String>> {
    let appliance = client.at(client.virtual_box().call(IVirtualBox::CreateAppliance, ())?);
    let read = appliance.call(IAppliance::Read, (path.display().to_string(),))?;
    client.at(read).wait(|_| {})?;
    appliance.call(IAppliance::Interpret, ())?;
    let progress = appliance.call(IAppliance::ImportMachines, (vec![],))?;
    client.at(progress).wait(|_| {})?;
    appliance.read(IAppliance::Machines)
}

/// Every file and folder below `dir`.
fn tree(dir: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(tree(&path));
        }
        all.insert(path);
    }
    all
}

fn names(client: &Client) -> Vec<String> {
    let machines = client.virtual_box().read(IVirtualBox::Machines).unwrap();
    machines.into_iter().map(|m: ObjRef<IMachine>| client.at(m).read(IMachine::Name).unwrap()).collect()
}

#[test]
fn an_exported_machine_is_imported_with_the_same_hardware_and_content() {
    let home = Home::new("package");
    let client = home.client();
    let machine = machine_with_disk(&home, &client);
    for name in ["p.ova", "q.ovf"] {
        let path = home.dir.join(name);
        export(&client, &machine, &path).unwrap();
        let [id] = import(&client, &path).unwrap().try_into().unwrap();
        let imported = client.find_machine(&id).unwrap();
        assert!(imported.read(IMachine::Name).unwrap().starts_with("a_"));
        assert_eq!(imported.read(IMachine::MemorySize).unwrap(), 333);
        assert_eq!(imported.read(IMachine::OSTypeId).unwrap(), "Debian_64");
        check_disk(&disk_of(&imported), vd::Format::Vmdk);
        // A package that is there is not written over.
        let again = export(&client, &machine, &path).unwrap_err();
        assert!(again.is(ResultCode::FileError) && again.text.contains("VERR_ALREADY_EXISTS"), "{again}");
    }
    assert_eq!(names(&client), ["a", "a_1", "a_2"]);
}

#[test]
fn damaged_packages_are_refused_and_leave_nothing_behind() {
    let home = Home::new("damaged");
    let client = home.client();
    let machine = machine_with_disk(&home, &client);
    let path = home.dir.join("p.ova");
    export(&client, &machine, &path).unwrap();
    let good = fs::read(&path).unwrap();
    let before = tree(&home.dir.join("vms"));
    let at = |what: &[u8]| good.windows(what.len()).position(|w| w == what).unwrap();
    // A byte of the disk's image, in the middle of what does not compress; the manifest; the descriptor; the archive cut short.
    let image = at(b"KDMV");
    let damages: [(&str, usize, ResultCode); 3] = [
        ("image", image + 0x1_4000, ResultCode::IprtError),
        ("manifest", at(b"SHA256 (") + 2, ResultCode::IprtError),
        ("descriptor", at(b"333 MB"), ResultCode::IprtError),
    ];
    for (what, offset, code) in damages {
        let mut bad = good.clone();
        bad[offset] ^= 1;
        fs::write(&path, &bad).unwrap();
        let error = import(&client, &path).unwrap_err();
        assert!(error.is(code), "{what}: {} {error}", error.code_name());
        assert_eq!(tree(&home.dir.join("vms")), before, "{what}");
    }
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    assert!(import(&client, &path).is_err());
    // Names that lead out of the package.
    let climbing = home.dir.join("c.ovf");
    let text = r#"<Envelope xmlns:ovf="o"><References><File ovf:id="f" ovf:href="../../../etc/passwd"/></References></Envelope>"#;
    fs::write(&climbing, text).unwrap();
    assert!(import(&client, &climbing).unwrap_err().is(ResultCode::FileError));
    assert!(import(&client, &home.dir.join("x.zip")).unwrap_err().is(ResultCode::FileError));
    assert_eq!(tree(&home.dir.join("vms")), before);
    assert_eq!(names(&client), ["a"]);
}

#[test]
fn a_clone_has_its_own_disks_and_addresses() {
    let home = Home::new("clone");
    let client = home.client();
    let machine = machine_with_disk(&home, &client);
    let vbox = client.virtual_box();
    let none = String::new;
    let args = (none(), "b".to_owned(), vec![], none(), none(), none(), none(), none());
    let target = vbox.call(IVirtualBox::CreateMachine, args).unwrap();
    let progress =
        machine.call(IMachine::CloneTo, (target.clone(), CloneMode::MachineState, vec![])).unwrap();
    client.at(progress).wait(|_| {}).unwrap();
    vbox.call(IVirtualBox::RegisterMachine, (target,)).unwrap();
    let clone = client.find_machine("b").unwrap();
    let disk = disk_of(&clone);
    assert_eq!(disk, home.dir.join("vms/b/b-disk1.vdi"));
    check_disk(&disk, vd::Format::Vdi);
    let mac = |m: &Proxy<IMachine>| {
        let adapters = m.read(IMachine::NetworkAdapters).unwrap();
        m.at(adapters[0].clone()).read(INetworkAdapter::MACAddress).unwrap()
    };
    assert_ne!(mac(&machine), mac(&clone));
    assert_eq!(clone.read(IMachine::MemorySize).unwrap(), 333);
    assert_ne!(clone.read(IMachine::HardwareUUID).unwrap(), machine.read(IMachine::HardwareUUID).unwrap());
}

#[test]
fn guest_properties_are_kept_with_their_flags() {
    let home = Home::new("properties");
    let client = home.client();
    let machine = create(&client, "a");
    let session = client.lock_machine(&machine, LockType::Shared).unwrap();
    let locked = session.machine().unwrap();
    let set = |name: &str, value: &str, flags: &str| {
        locked.call(IMachine::SetGuestProperty, (name.into(), value.into(), flags.into()))
    };
    set("/b", "2", "").unwrap();
    set("/a", "1", "rdonlyhost").unwrap();
    assert!(set("/a", "3", "").unwrap_err().is(ResultCode::AccessDenied));
    assert!(set("/c", "3", "nonsense").unwrap_err().is(ResultCode::InvalidArg));
    locked.call(IMachine::DeleteGuestProperty, ("/b".into(),)).unwrap();
    let (value, time, flags) = machine.call(IMachine::GetGuestProperty, ("/a".into(),)).unwrap();
    assert_eq!((value.as_str(), flags.as_str()), ("1", "RDONLYHOST"));
    assert!(time > 0);
    let (names, ..) = machine.call(IMachine::EnumerateGuestProperties, ("/*".into(),)).unwrap();
    assert_eq!(names, ["/a"]);
}

/// Not a test: what runs as VBoxHeadless.
#[test]
#[ignore = "the fake VM process of the other tests"]
fn fake_vm_process() {
    fake_vm();
}
