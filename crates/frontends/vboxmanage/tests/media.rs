//! The commands for media, as scripts use them.

mod common;

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use common::{Home, finish};

/// What a line of the form `Label:   value` says.
fn field<'t>(text: &'t str, label: &str) -> &'t str {
    text.lines().find_map(|line| line.strip_prefix(label)).map(str::trim).unwrap_or_default()
}

/// The UUID at the end of a command's output.
fn id(text: &str) -> String {
    text.trim_end().rsplit(' ').next().unwrap_or_default().to_owned()
}

#[test]
fn images_of_every_format_are_made_shown_cloned_and_deleted() {
    let home = Home::new();
    for (format, file, variant, shown) in [
        ("VDI", "a.vdi", "Standard", "dynamic default"),
        ("VDI", "b.vdi", "Fixed", "fixed default"),
        ("VMDK", "a.vmdk", "Standard", "dynamic default"),
        ("VMDK", "b.vmdk", "Fixed", "fixed default"),
        ("VMDK", "c.vmdk", "Split2G", "dynamic split2G"),
        ("VMDK", "d.vmdk", "ESX,Fixed", "fixed ESX"),
        ("VHD", "a.vhd", "Standard", "dynamic default"),
        ("VHDX", "a.vhdx", "Standard", "dynamic default"),
        ("QCOW", "a.qcow", "Standard", "dynamic default"),
        ("Parallels", "a.hdd", "Standard", "dynamic default"),
    ] {
        let made = home.manage(&format!(
            "createmedium disk --filename {file} --size 8 --format {format} --variant {variant}"
        ));
        assert_eq!(made.stderr, "0%...10%...20%...30%...40%...50%...60%...70%...80%...90%...100%\n");
        let made = made.ok();
        assert!(made.starts_with("Medium created. UUID: "), "{made}");
        let info = home.manage(&format!("showmediuminfo disk {file}")).ok();
        assert_eq!(field(&info, "UUID:"), id(&made), "{file}");
        assert_eq!(field(&info, "Format variant:"), shown, "{file}");
        assert_eq!(field(&info, "Capacity:"), "8 MBytes", "{file}");
        let clone = home.manage(&format!("clonemedium {file} {file}.vdi --format VDI")).ok();
        assert!(clone.starts_with("Clone medium created in format 'VDI'. UUID: "), "{clone}");
        for file in [file.to_owned(), format!("{file}.vdi")] {
            home.manage(&format!("closemedium disk {file} --delete")).ok();
            assert!(!home.path(&file).exists());
        }
    }
    let left: Vec<_> = std::fs::read_dir(&home.dir).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains(".v")), "{left:?}");
    let refused = home.manage("createmedium --filename a.qed --size 8 --format QED");
    assert!(refused.fails(1).contains("Medium format 'QED' does not support dynamic storage creation"));
    let refused = home.manage("createmedium --filename a.qcow --size 8 --format QCOW --variant Fixed");
    assert!(refused.fails(1).contains("VBOX_E_NOT_SUPPORTED"));
}

#[test]
fn content_goes_in_and_comes_out() {
    let home = Home::new();
    let mut raw = vec![0u8; 3 << 20];
    raw[..5].copy_from_slice(b"first");
    raw[(2 << 20) + 7] = 9;
    std::fs::write(home.path("raw.img"), &raw).unwrap();
    let converted = home.manage("convertfromraw raw.img a.vdi");
    assert_eq!(
        converted.stderr,
        "Converting from raw image file=\"raw.img\" to file=\"a.vdi\"...\nCreating dynamic image with size 3145728 bytes (3MB)...\n"
    );
    let mut child = home.command(["convertfromraw", "stdin", "b.vmdk", "3145728", "--format", "VMDK"]);
    let mut child = child.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&raw).unwrap();
    finish(child).ok();
    home.manage("clonemedium a.vdi packed.vmdk --format VMDK --variant Stream").ok();
    for file in ["a.vdi", "b.vmdk", "packed.vmdk"] {
        home.manage(&format!("mediumio --disk={file} cat --output=out.img")).ok();
        assert!(std::fs::read(home.path("out.img")).unwrap() == raw, "{file}");
    }
    let dump = home.manage("mediumio --disk a.vdi cat --hex --size 16").ok();
    assert_eq!(dump, "000000000000: 66 69 72 73 74 00 00 00-00 00 00 00 00 00 00 00 first...........\n");
    home.manage("mediumio --disk a.vdi stream --format VMDK --variant Stream --output=s.vmdk").ok();
    home.manage("clonemedium s.vmdk again.img --format RAW --variant Fixed").ok();
    assert!(std::fs::read(home.path("again.img")).unwrap() == raw);
    home.manage("createmedium --filename into.vdi --size 4").ok();
    home.manage("clonemedium a.vdi into.vdi --existing").ok();
    home.manage("mediumio --disk into.vdi cat --output=out.img").ok();
    assert!(std::fs::read(home.path("out.img")).unwrap()[..raw.len()] == raw);
    home.manage("createmedium floppy --filename f.img --sizebyte 1474560 --variant Fixed,Formatted").ok();
    let boot = std::fs::read(home.path("f.img")).unwrap();
    assert_eq!((boot.len(), &boot[510..512], &boot[54..59]), (1_474_560, &[0x55, 0xaa][..], &b"FAT12"[..]));
}

#[test]
fn media_are_changed() {
    let home = Home::new();
    let made = id(&home.manage("createmedium --filename a.vdi --size 8").ok());
    home.manage("modifymedium a.vdi --resize 20").ok();
    home.manage("modifymedium a.vdi --description words").ok();
    home.manage("modifymedium a.vdi --type writethrough --property x=y").ok();
    home.manage("modifymedium a.vdi --compact").ok();
    assert_eq!(home.manage("mediumproperty get a.vdi x").ok(), "x=y\n");
    home.manage("mediumproperty disk set a.vdi x z").ok();
    assert_eq!(home.manage("mediumproperty get a.vdi x").ok(), "x=z\n");
    home.manage("mediumproperty delete a.vdi x").ok();
    home.manage("mediumproperty get a.vdi x").fails(1);
    let moved = home.manage("modifymedium a.vdi --move moved/").fails(1);
    assert!(moved.contains("VBOX_E_FILE_ERROR"), "{moved}");
    std::fs::create_dir(home.path("moved")).unwrap();
    let moved = home.manage("modifymedium a.vdi --move moved").ok();
    assert_eq!(moved, format!("Move medium with UUID {made} finished\n"));
    std::fs::rename(home.path("moved/a.vdi"), home.path("b.vdi")).unwrap();
    home.manage(&format!("modifymedium {made} --setlocation b.vdi")).ok();
    let info = home.manage("showmediuminfo b.vdi").ok();
    assert_eq!(field(&info, "Location:"), home.path("b.vdi").to_str().unwrap());
    assert_eq!(field(&info, "Type:"), "writethrough (base)".trim_end_matches(" (base)"));
    assert_eq!((field(&info, "Capacity:"), field(&info, "Description:")), ("20 MBytes", "words"));
    let shrunk = home.manage("modifymedium b.vdi --resize 10").fails(1);
    assert!(shrunk.contains("Shrinking is not yet supported for medium"), "{shrunk}");
    let meant = home.manage("modifymedium b.vdi --resize 99999999").fails(1);
    assert!(meant.contains("Attempt to resize the medium from 20.0 MB to 99999999.0 MB"), "{meant}");
}

#[test]
fn differencing_images_hang_in_the_registry_below_their_parents() {
    let home = Home::new();
    home.manage("createvm --name m --register").ok();
    home.manage("storagectl m --name SATA --add sata").ok();
    let base = id(&home.manage("createmedium --filename base.vdi --size 8").ok());
    let child = id(&home.manage("createmedium --filename child.vdi --diffparent base.vdi").ok());
    home.manage(&format!(
        "storageattach m --storagectl SATA --port 0 --device 0 --type hdd --medium {child}"
    ))
    .ok();
    let settings = std::fs::read_to_string(home.path("vms/m/m.vbox")).unwrap();
    let outer = settings.find(&base).unwrap();
    assert!(settings[outer..].contains(&child), "{settings}");
    let listed = home.manage("list hdds").ok();
    assert!(listed.contains(&format!("UUID:           {child}\nParent UUID:    {base}\n")), "{listed}");
    let info = home.manage("showmediuminfo child.vdi").ok();
    assert_eq!(field(&info, "Format variant:"), "differencing default");
    let busy = home.manage("closemedium base.vdi").fails(1);
    assert!(busy.contains("1 child media"), "{busy}");
    // The chain holds over the end of the service.
    for service in home.processes() {
        home.kill(&service);
    }
    let info = home.manage(&format!("showmediuminfo {child}")).ok();
    assert_eq!(field(&info, "Parent UUID:"), base);
}

/// VHDX has no UUIDs for images: a child that is named for the first time is known by its parent's data GUID.
#[test]
fn a_vhdx_child_finds_its_parent_among_the_known_media() {
    let home = Home::new();
    home.manage("createmedium --filename base.vhdx --size 8 --format VHDX").ok();
    home.manage("createmedium --filename child.vhdx --diffparent base.vhdx --format VHDX").ok();
    home.manage("closemedium child.vhdx").ok();
    home.manage("closemedium base.vhdx").ok();
    std::fs::rename(home.path("base.vhdx"), home.path("moved.vhdx")).unwrap();
    let lost = home.manage("showmediuminfo child.vhdx").fails(1);
    assert!(lost.contains("with the data GUID {") && lost.contains("open it first"), "{lost}");
    let base = home.manage("showmediuminfo moved.vhdx").ok();
    let child = home.manage("showmediuminfo child.vhdx").ok();
    assert_eq!(field(&child, "Parent UUID:"), field(&base, "UUID:"));
    home.manage("mediumio --disk child.vhdx cat --size 512 --output=out.img").ok();
}

#[test]
fn media_that_must_not_change_are_attached_through_differencing_images() {
    let home = Home::new();
    for vm in ["m", "n"] {
        home.manage(&format!("createvm --name {vm} --register")).ok();
        home.manage(&format!("storagectl {vm} --name SATA --add sata")).ok();
    }
    let base = id(&home.manage("createmedium --filename base.vdi --size 8").ok());
    home.manage("modifymedium base.vdi --type multiattach").ok();
    for vm in ["m", "n"] {
        home.manage(&format!("storageattach {vm} --storagectl SATA --port 0 --type hdd --medium base.vdi"))
            .ok();
        let info = home.manage(&format!("showvminfo {vm} --machinereadable")).ok();
        let prefix = format!("\"SATA-0-0\"=\"{}/{{", home.path(&format!("vms/{vm}/Snapshots")).display());
        assert!(info.lines().any(|line| line.starts_with(&prefix)), "{info}");
    }
    let info = home.manage(&format!("showmediuminfo {base}")).ok();
    assert_eq!(info.matches("Child UUIDs:").count(), 1);
    assert_eq!(field(&info, "Type:"), "multiattach");
    let refused = home.manage("modifymedium base.vdi --type normal").fails(1);
    assert!(refused.contains("VBOX_E_INVALID_OBJECT_STATE"), "{refused}");
}

#[test]
fn a_copy_of_an_image_gets_a_uuid_of_its_own() {
    let home = Home::new();
    home.manage("createvm --name m --register").ok();
    home.manage("storagectl m --name SATA --add sata --portcount 2").ok();
    home.manage("createmedium --filename a.vdi --size 8").ok();
    home.manage("storageattach m --storagectl SATA --port 0 --type hdd --medium a.vdi").ok();
    std::fs::copy(home.path("a.vdi"), home.path("b.vdi")).unwrap();
    let refused = home.manage("showmediuminfo b.vdi").fails(1);
    assert!(refused.contains("already exists"), "{refused}");
    let wanted = "11111111-2222-4333-8444-555555555555";
    home.manage(&format!(
        "storageattach m --storagectl SATA --port 1 --type hdd --medium b.vdi --setuuid {wanted}"
    ))
    .ok();
    let info = home.manage("showmediuminfo b.vdi").ok();
    assert_eq!(field(&info, "UUID:"), wanted);
    assert_eq!(field(&info, "State:"), "created");
    let bytes = std::fs::read(home.path("b.vdi")).unwrap();
    assert_eq!(bytes[0x188..0x18c], [0x11; 4]);
}

#[test]
fn every_backend_is_listed_with_what_it_can_do() {
    let home = Home::new();
    let listed = home.manage("list hddbackends").ok();
    assert!(listed.starts_with("Supported hard disk backends:\n\nBackend 0: id='VMDK' description='VMDK' capabilities=0x0a7f extensions='vmdk (HardDisk)' properties=("));
    for format in ["VDI", "VHD", "Parallels", "DMG", "QED", "QCOW", "VHDX", "RAW", "iSCSI"] {
        assert!(listed.contains(&format!(": id='{format}' ")), "{format}");
    }
    assert!(Path::new(&home.dir).is_dir());
}

/// The ways of `encryptmedium`, `checkmediumpwd` and what shows them; the content comes out with the password alone.
#[test]
fn media_are_encrypted_and_decrypted_with_passwords() {
    let home = Home::new();
    let mut raw = vec![0u8; 3 << 20];
    raw[..14].copy_from_slice(b"for your eyes ");
    std::fs::write(home.path("raw.img"), &raw).unwrap();
    for (file, password) in [("one", "first\nsecond line"), ("two", "other"), ("empty", "")] {
        std::fs::write(home.path(file), password).unwrap();
    }
    home.manage("convertfromraw raw.img a.vdi").ok();
    assert_eq!(field(&home.manage("showmediuminfo a.vdi").ok(), "Encryption:"), "disabled");
    let refused = home.manage("checkmediumpwd a.vdi one").fails(1);
    assert!(refused.contains("The image is not configured for encryption"), "{refused}");
    let bad = "encryptmedium a.vdi --newpassword one --newpasswordid id --cipher ROT13";
    assert!(home.manage(bad).fails(1).contains("The cipher 'ROT13' is not known"));
    let encrypt = "encryptmedium a.vdi --newpassword one --newpasswordid id --cipher AES-XTS256-PLAIN64";
    home.manage(encrypt).ok();
    let shows = |text: &[u8]| {
        std::fs::read(home.path("a.vdi")).unwrap().windows(text.len()).any(|window| window == text)
    };
    assert!(!shows(b"for your eyes "));
    let info = home.manage("showmediuminfo a.vdi").ok();
    assert_eq!(field(&info, "Encryption:"), "enabled");
    assert_eq!((field(&info, "Cipher:"), field(&info, "Password ID:")), ("AES-XTS256-PLAIN64", "id"));
    assert_eq!(home.manage("checkmediumpwd a.vdi one").ok(), "The given password is correct\n");
    let wrong = home.manage("checkmediumpwd a.vdi two").fails(1);
    assert!(wrong.contains("VBOX_E_PASSWORD_INCORRECT") && wrong.contains("The given password is incorrect"));
    assert!(home.manage("checkmediumpwd a.vdi empty").fails(1).contains("must not be empty"));
    // The key outlives the service: the medium is attached nowhere.
    let wait = std::time::Instant::now();
    while home.processes().iter().any(|p| p.name == "VBoxSVC") {
        assert!(wait.elapsed().as_secs() < 60, "VBoxSVC does not end");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(std::fs::read_to_string(home.path("config/VirtualBox.xml")).unwrap().contains("CRYPT/KeyStore"));
    home.manage("mediumio --disk a.vdi --password-file one cat --output=out.img").ok();
    assert!(std::fs::read(home.path("out.img")).unwrap() == raw);
    assert!(
        home.manage("mediumio --disk a.vdi cat").fails(1).contains("Password needed for encrypted medium")
    );
    home.manage("mediumio --disk a.vdi --password-file two cat --output=x").fails(1);
    assert!(home.manage(encrypt).fails(1).contains("VBOX_E_PASSWORD_INCORRECT"));
    let wrong = home.manage("encryptmedium a.vdi --oldpassword two").fails(1);
    assert!(wrong.contains("The password to decrypt the image is incorrect"), "{wrong}");
    // Another password, by which another key encrypts.
    let again = "encryptmedium a.vdi --oldpassword one --newpassword two --newpasswordid its --cipher AES-XTS128-PLAIN64";
    home.manage(again).ok();
    home.manage("checkmediumpwd a.vdi two").ok();
    assert_eq!(field(&home.manage("showmediuminfo a.vdi").ok(), "Password ID:"), "its");
    home.manage("encryptmedium a.vdi --oldpassword two").ok();
    assert!(shows(b"for your eyes "));
    let info = home.manage("showmediuminfo a.vdi").ok();
    assert_eq!(field(&info, "Encryption:"), "disabled");
    assert!(!info.contains("CRYPT/") && !info.contains("Boxwood/"), "{info}");
    home.manage("mediumio --disk a.vdi cat --output=out.img").ok();
    assert!(std::fs::read(home.path("out.img")).unwrap() == raw);
    let left: Vec<_> = std::fs::read_dir(&home.dir).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("recrypt")), "{left:?}");
}

/// Copies of encrypted disks are encrypted with the same key, also where blocks were never written and of several images; packages get the
/// content.
#[test]
fn encrypted_disks_are_cloned_as_they_are_and_exported_with_their_password() {
    let home = Home::new();
    // 20 MiB, of which the first, parts in the middle, and the last hold something.
    let mut raw = vec![0u8; 20 << 20];
    for at in [0, 7 << 20, (9 << 20) + 4096, (20 << 20) - 512] {
        raw[at..at + 512].fill(at as u8 | 1);
    }
    std::fs::write(home.path("raw.img"), &raw).unwrap();
    std::fs::write(home.path("pw"), "secret").unwrap();
    std::fs::write(home.path("bad"), "other").unwrap();
    for format in ["VDI", "VMDK", "VHD"] {
        let name = |stem: &str| format!("{stem}.{}", format.to_lowercase());
        let (disk, copy) = (name("disk"), name("copy"));
        home.manage(&format!("convertfromraw raw.img {disk} --format {format}")).ok();
        let encrypt =
            format!("encryptmedium {disk} --newpassword pw --newpasswordid id --cipher AES-XTS256-PLAIN64");
        home.manage(&encrypt).ok();
        home.manage(&format!("clonemedium {disk} {copy} --format {format}")).ok();
        let info = home.manage(&format!("showmediuminfo {copy}")).ok();
        assert_eq!((field(&info, "Encryption:"), field(&info, "Password ID:")), ("enabled", "id"));
        home.manage(&format!("checkmediumpwd {copy} bad")).fails(1);
        home.manage(&format!("mediumio --disk {copy} --password-file pw cat --output=out.img")).ok();
        assert!(std::fs::read(home.path("out.img")).unwrap() == raw, "{format}");
    }
    for other in ["x.vmdk --format VMDK", "x.vdi --variant Fixed", "x.img --format RAW"] {
        let refused = home.manage(&format!("clonemedium disk.vdi {other}")).fails(1);
        assert!(refused.contains("decrypt it first") && refused.contains("--format VDI"), "{refused}");
        assert!(!home.path(other.split(' ').next().unwrap()).exists());
    }
    let refused = home.manage("clonemedium disk.vdi copy.vdi --existing").fails(1);
    assert!(refused.contains("decrypt it first"), "{refused}");

    // A machine with it, of which a clone is made; the copy's key is its own: what becomes of the first does not concern it.
    home.manage("createvm --name one --register").ok();
    home.manage("storagectl one --name IDE --add ide").ok();
    home.manage("storageattach one --storagectl IDE --port 0 --device 0 --type hdd --medium disk.vdi").ok();
    home.manage("clonevm one --name two --register").ok();
    home.manage("encryptmedium disk.vdi --oldpassword pw --newpassword bad --newpasswordid new --cipher AES-XTS128-PLAIN64")
        .ok();
    let disk = home.value("two", "\"IDE-0-0\"").unwrap();
    home.manage(&format!("mediumio --disk {disk} --password-file pw cat --output=out.img")).ok();
    assert!(std::fs::read(home.path("out.img")).unwrap() == raw);

    // Out of the house it goes decrypted, for whoever has the password.
    let export = |password: &str, package: &str| {
        let mut child = home.command(["export", "two", "-o", package]).stdin(Stdio::piped()).spawn().unwrap();
        Write::write_all(&mut child.stdin.take().unwrap(), password.as_bytes()).unwrap();
        finish(child)
    };
    let wrong = export("other\n", "no.ova").fails(1);
    assert!(wrong.contains("VBOX_E_PASSWORD_INCORRECT"), "{wrong}");
    assert!(!home.path("no.ova").exists());
    let said = export("secret\n", "out.ova").ok();
    assert!(said.contains("Password ID id:") && said.contains("exported 1 machine"), "{said}");
    home.manage("import out.ova --vsys 0 --vmname three").ok();
    let disk = home.value("three", "\"IDE-0-0\"").unwrap();
    assert_eq!(field(&home.manage(&format!("showmediuminfo {disk}")).ok(), "Encryption:"), "disabled");
    home.manage(&format!("mediumio --disk {disk} cat --output=out.img")).ok();
    assert!(std::fs::read(home.path("out.img")).unwrap() == raw);
}

/// VBoxSVC is killed at chosen and at random moments while it encrypts: the disk opens as it was, or with the new password.
#[test]
fn a_service_killed_while_it_encrypts_loses_nothing() {
    let home = Home::new();
    let raw: Vec<u8> = (0..24u32 << 18).flat_map(|i| (i / 7).to_le_bytes()).collect();
    std::fs::write(home.path("raw.img"), &raw).unwrap();
    std::fs::write(home.path("pw"), "secret").unwrap();
    home.manage("convertfromraw raw.img a.vdi --static").ok();
    let mut encrypted = false;
    let (mut switched, mut stayed) = (0, 0);
    for round in 0..14u64 {
        let change = match encrypted {
            false => "encryptmedium a.vdi --newpassword pw --newpasswordid id --cipher AES-XTS128-PLAIN64",
            true => "encryptmedium a.vdi --oldpassword pw",
        };
        home.manage("showmediuminfo a.vdi").ok();
        let client = home.spawn(change.split(' '));
        std::thread::sleep(std::time::Duration::from_millis(150 + round * 130 % 1100));
        for process in home.processes().iter().filter(|p| p.name == "VBoxSVC") {
            home.kill(process);
        }
        finish(client);
        let now = field(&home.manage("showmediuminfo a.vdi").ok(), "Encryption:") == "enabled";
        if now == encrypted {
            stayed += 1
        } else {
            switched += 1
        }
        encrypted = now;
        let cat = match encrypted {
            false => "mediumio --disk a.vdi cat --output=out.img",
            true => "mediumio --disk a.vdi --password-file pw cat --output=out.img",
        };
        home.manage(cat).ok();
        assert!(std::fs::read(home.path("out.img")).unwrap() == raw, "round {round}, encrypted: {encrypted}");
    }
    eprintln!("{switched} changes were made, {stayed} were not");
}

/// Disks of iSCSI targets, here of one that is not there: what is on record of them, and what is said.
#[test]
fn disks_of_targets_are_attached_shown_and_closed() {
    let home = Home::new();
    home.manage("createvm --name m --register").ok();
    home.manage("storagectl m --name SATA --add sata").ok();
    std::fs::write(home.path("secret"), "open sesame\n").unwrap();
    // Nobody listens at the port that was just given back.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let attach = "storageattach m --storagectl SATA --port 0 --medium iscsi";
    assert!(
        home.manage(attach)
            .fails(1)
            .contains("Parameters --server and --target are required for iSCSI media")
    );
    let made = home
        .manage(&format!(
            "{attach} --server 127.0.0.1 --target iqn.2026-11.x:d --tport {port} --lun 3 --username me --passwordfile secret"
        ))
        .ok();
    assert!(made.starts_with("iSCSI disk created. UUID: "), "{made}");
    let id = id(&made);
    let location = "127.0.0.1|iqn.2026-11.x:d|3";
    let info = home.manage(&format!("showmediuminfo {id}")).ok();
    assert_eq!((field(&info, "UUID:"), field(&info, "State:")), (id.as_str(), "inaccessible"));
    assert_eq!((field(&info, "Location:"), field(&info, "Storage format:")), (location, "iSCSI"));
    let error = field(&info, "Access Error:");
    assert!(
        error.contains("Could not open the medium") && info.contains("iqn.2026-11.x:d at 127.0.0.1"),
        "{info}"
    );
    assert!(info.contains("cannot be reached") && info.contains("InitiatorUsername=me"), "{info}");
    assert!(info.contains("InitiatorSecret=(hidden)") && !info.contains("sesame"), "{info}");
    assert_eq!(field(&home.manage("list hdds").ok(), "Location:"), location);
    assert!(
        home.manage("showvminfo m --machinereadable").ok().contains(&format!("\"SATA-0-0\"=\"{location}\""))
    );
    // As VirtualBox writes it.
    let shown = home.manage("showvminfo m").ok();
    let settings = field(&shown, "Config file:").to_owned();
    let text = std::fs::read_to_string(&settings).unwrap();
    assert!(
        text.contains(&format!(
            "<HardDisk uuid=\"{{{id}}}\" location=\"{location}\" format=\"iSCSI\" type=\"Normal\">"
        )),
        "{text}"
    );
    for property in [
        format!("<Property name=\"TargetAddress\" value=\"127.0.0.1:{port}\"/>"),
        "<Property name=\"TargetName\" value=\"iqn.2026-11.x:d\"/>".into(),
        "<Property name=\"LUN\" value=\"3\"/>".into(),
        "<Property name=\"InitiatorSecret\" value=\"open sesame\"/>".into(),
    ] {
        assert!(text.contains(&property), "{property}");
    }
    // What only files have.
    let refused = home.manage(&format!("closemedium {id} --delete")).fails(1);
    assert!(
        refused.contains("Cannot delete storage") || refused.contains("does not support storage deletion"),
        "{refused}"
    );
    home.manage("storageattach m --storagectl SATA --port 0 --medium none").ok();
    let refused = home.manage(&format!("closemedium {id} --delete")).fails(1);
    assert!(refused.contains("Medium format 'iSCSI' does not support storage deletion"), "{refused}");
    let refused = home.manage(&format!("modifymedium {id} --resizebyte 104857600")).fails(1);
    assert!(refused.contains("iSCSI"), "{refused}");
    home.manage(&format!("closemedium {id}")).ok();
    assert_eq!(home.manage("list hdds").ok(), "");
    let made = home.manage(&format!("{attach} --server 127.0.0.1 --target t --intnet")).ok();
    let info = home.manage(&format!("showmediuminfo {}", self::id(&made))).ok();
    assert!(info.contains("only the host's own network is supported"), "{info}");
}
