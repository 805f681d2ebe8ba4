//! `VBoxManage` and the service together: a machine's life on disk.

mod common;

use std::fs;

use common::{Home, value};

#[test]
fn a_machine_is_made_configured_shown_and_deleted_without_a_trace() {
    let home = Home::new();
    let created = home.run(["createvm", "--name", "e2e vm", "--ostype", "Debian_64", "--register"]).ok();
    let lines: Vec<&str> = created.lines().collect();
    assert_eq!(lines[0], "Virtual machine 'e2e vm' is created and registered.");
    let id = lines[1].strip_prefix("UUID: ").unwrap();
    let file = home.path("vms/e2e vm/e2e vm.vbox");
    assert_eq!(lines[2], format!("Settings file: '{}'", file.display()));
    assert!(file.is_file());
    assert_eq!(home.manage("list vms").ok(), format!("\"e2e vm\" {{{id}}}\n"));

    let modify = "--memory 768 --cpus 2 --vram=20 --nic1 nat --nictype1 82540EM --natpf1 ssh,tcp,127.0.0.1,2222,,22 \
                  --uart1 0x3f8 4 --uartmode1 file /tmp/serial --boot1 dvd --rtcuseutc on --ioapic on --hpet on \
                  --audio none --macaddress1 0800273F1A2B";
    home.run(["modifyvm", "e2e vm"].into_iter().chain(modify.split_whitespace())).ok();
    home.run(["storagectl", id, "--name", "IDE Controller", "--add", "ide", "--controller", "PIIX4"]).ok();
    let disk = home.path("vms/e2e vm/disk.vdi");
    let disk = disk.to_str().unwrap();
    let made = home.run(["createmedium", "disk", "--filename", disk, "--size", "8", "--format", "VDI"]);
    assert!(made.stderr.starts_with("0%..."), "{made:?}");
    assert!(made.stderr.ends_with("100%\n"), "{made:?}");
    let medium = made.ok();
    let medium = medium.strip_prefix("Medium created. UUID: ").unwrap().trim();
    let attach = ["storageattach", id, "--storagectl", "IDE Controller", "--port", "0", "--device", "0"];
    home.run(attach.into_iter().chain(["--type", "hdd", "--medium", disk])).ok();
    let attach = ["storageattach", id, "--storagectl", "IDE Controller", "--port", "1", "--device", "0"];
    home.run(attach.into_iter().chain(["--type", "dvddrive", "--medium", "emptydrive"])).ok();

    let shown = home.run(["showvminfo", id, "--machinereadable"]);
    assert_eq!(shown.stderr, "");
    let shown = shown.ok();
    for (key, wanted) in [
        ("name", "e2e vm"),
        ("ostype", "Debian (64-bit)"),
        ("UUID", id),
        ("CfgFile", file.to_str().unwrap()),
        ("memory", "768"),
        ("cpus", "2"),
        ("vram", "20"),
        ("VMState", "poweroff"),
        ("boot1", "dvd"),
        ("hpet", "on"),
        ("audio", "none"),
        ("macaddress1", "0800273F1A2B"),
        ("nic1", "nat"),
        ("Forwarding(0)", "ssh,tcp,127.0.0.1,2222,,22"),
        ("uart1", "0x03f8,4"),
        ("uartmode1", "file,/tmp/serial"),
        ("storagecontrollername0", "IDE Controller"),
        ("storagecontrollertype0", "PIIX4"),
        ("\"IDE Controller-0-0\"", disk),
        ("\"IDE Controller-ImageUUID-0-0\"", medium),
        ("\"IDE Controller-1-0\"", "emptydrive"),
    ] {
        assert_eq!(value(&shown, key).as_deref(), Some(wanted), "{key}\n{shown}");
    }
    let plain = home.run(["showvminfo", id]).ok();
    assert!(plain.starts_with("Name:                        e2e vm\n"), "{plain}");
    let long = home.manage("list -l vms").ok();
    assert_eq!(long, plain);

    let disks = home.manage("list hdds").ok();
    assert!(disks.contains(&format!("Location:       {disk}\n")), "{disks}");
    let info = home.run(["showmediuminfo", disk]).ok();
    assert!(info.contains("Capacity:       8 MBytes\n"), "{info}");
    assert!(info.contains(&format!("In use by VMs:  e2e vm (UUID: {id})")), "{info}");

    home.run(["unregistervm", id, "--delete"]).ok();
    assert_eq!(home.manage("list vms").ok(), "");
    assert_eq!(home.manage("list hdds").ok(), "");
    let left: Vec<_> = fs::read_dir(home.path("vms")).unwrap().flatten().map(|entry| entry.path()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn an_unknown_machine_is_three_lines_and_status_1() {
    let home = Home::new();
    let ran = home.manage("showvminfo nope --machinereadable");
    assert_eq!(ran.stdout, "");
    let text = ran.fails(1);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0], "VBoxManage: error: Could not find a registered machine named 'nope'");
    assert_eq!(
        lines[1],
        "VBoxManage: error: Details: code VBOX_E_OBJECT_NOT_FOUND (0x80bb0001), component VirtualBoxWrap, interface \
         IVirtualBox, callee nsISupports"
    );
    assert!(lines[2].starts_with("VBoxManage: error: Context: \"FindMachine("), "{text}");
}

#[test]
fn a_change_that_is_refused_leaves_the_settings_as_they_were() {
    let home = Home::new();
    home.manage("createvm --name a --register").ok();
    let before = fs::read(home.path("vms/a/a.vbox")).unwrap();
    let error = home.manage("modifyvm a --memory 256 --cpus 1000000").fails(1);
    assert!(error.contains("VBoxManage: error: Details: code "), "{error}");
    assert_eq!(fs::read(home.path("vms/a/a.vbox")).unwrap(), before);
    assert_eq!(home.manage("modifyvm a --nic9 nat").fails(1), "VBoxManage: error: Invalid NIC number 9\n");
    assert_eq!(fs::read(home.path("vms/a/a.vbox")).unwrap(), before);
}

#[test]
fn a_second_machine_of_the_same_name_is_refused() {
    let home = Home::new();
    home.manage("createvm --name a --register").ok();
    let error = home.manage("createvm --name a --register").fails(1);
    assert!(error.contains("VBOX_E_FILE_ERROR") || error.contains("already exists"), "{error}");
    assert_eq!(home.manage("list vms").ok().lines().count(), 1);
}

#[test]
fn renaming_takes_folder_and_disks_along() {
    let home = Home::new();
    home.manage("createvm --name old --register").ok();
    home.manage("storagectl old --name SATA --add sata --portcount 1").ok();
    home.manage("createmedium --filename vms/old/d.vdi --size 1").ok();
    home.manage("storageattach old --storagectl SATA --port 0 --device 0 --type hdd --medium vms/old/d.vdi")
        .ok();
    home.manage("modifyvm old --name new").ok();
    let moved = home.path("vms/new/d.vdi");
    assert_eq!(home.value("new", "\"SATA-0-0\"").as_deref(), moved.to_str());
    assert_eq!(home.value("new", "CfgFile").as_deref(), home.path("vms/new/new.vbox").to_str());
    assert!(!home.path("vms/old").exists());
    home.manage("unregistervm new --delete").ok();
    assert!(!home.path("vms/new").exists());
}

#[test]
fn extra_data_come_back() {
    let home = Home::new();
    home.manage("createvm --name a --register").ok();
    assert_eq!(home.manage("getextradata a k/1").ok(), "No value set!\n");
    home.run(["setextradata", "a", "k/1", "some value"]).ok();
    home.run(["setextradata", "a", "k/2", "2"]).ok();
    assert_eq!(home.manage("getextradata a k/1").ok(), "Value: some value\n");
    assert_eq!(
        home.manage("getextradata a enumerate").ok(),
        "Key: k/1, Value: some value\nKey: k/2, Value: 2\n"
    );
    home.manage("setextradata a k/1").ok();
    assert_eq!(home.manage("getextradata a k/1").ok(), "No value set!\n");
    home.run(["setextradata", "global", "GUI/SuppressMessages", "all"]).ok();
    assert_eq!(home.manage("getextradata global GUI/SuppressMessages").ok(), "Value: all\n");
}

#[test]
fn registering_and_unregistering_keep_the_files() {
    let home = Home::new();
    home.manage("createvm --name a").ok();
    assert_eq!(home.manage("list vms").ok(), "");
    home.manage("registervm vms/a/a.vbox").ok();
    assert_eq!(home.manage("list vms").ok().lines().count(), 1);
    home.manage("unregistervm a").ok();
    assert_eq!(home.manage("list vms").ok(), "");
    assert!(home.path("vms/a/a.vbox").is_file());
}

#[test]
fn lists_leave_standard_error_empty() {
    let home = Home::new();
    home.manage("createvm --name b --register").ok();
    home.manage("createvm --name a --groups /g --register").ok();
    for what in [
        "vms",
        "runningvms",
        "ostypes",
        "systemproperties",
        "hostinfo",
        "hostcpuids",
        "hdds",
        "dvds",
        "floppies",
        "extpacks",
        "groups",
        "bridgedifs",
        "hostonlyifs",
        "dhcpservers",
        "natnets",
        "screenshotformats",
        "cpu-profiles",
        "hddbackends",
    ] {
        let ran = home.manage(&format!("list {what}"));
        assert_eq!(ran.stderr, "", "{what}");
        ran.ok();
    }
    let sorted = home.manage("list -s vms").ok();
    assert!(sorted.starts_with("\"a\"") && sorted.lines().count() == 2, "{sorted}");
    let properties = home.manage("list systemproperties").ok();
    let folder = format!("Default machine folder:          {}\n", home.path("vms").display());
    assert!(properties.contains(&folder), "{properties}");
    assert_eq!(home.manage("list runningvms").ok(), "");
    let groups = home.manage("list groups").ok();
    assert_eq!(groups, "\"/\"\n\"/g\"\n");
}

#[test]
fn what_needs_a_running_machine_says_that_it_is_not() {
    let home = Home::new();
    home.manage("createvm --name a --register").ok();
    assert_eq!(
        home.manage("controlvm a poweroff").fails(1),
        "VBoxManage: error: Machine 'a' is not currently running.\n"
    );
}
