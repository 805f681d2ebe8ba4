//! Every setting that `modifyvm` can write comes back from `showvminfo`, through the service and the settings file.

mod common;

use common::{Home, value};

/// Option and value, and what `showvminfo --machinereadable` shows for it.
const SETTINGS: &[(&str, &str, &str)] = &[
    ("--description=words", "description", "words"),
    ("--ostype=Windows10_64", "ostype", "Windows 10 (64-bit)"),
    ("--groups=/x,/y", "groups", "/x,/y"),
    ("--memory=300", "memory", "300"),
    ("--page-fusion=on", "pagefusion", "on"),
    ("--vram=33", "vram", "33"),
    ("--firmware=efi64", "firmware", "EFI64"),
    ("--acpi=off", "acpi", "off"),
    ("--ioapic=on", "ioapic", "on"),
    ("--pae=on", "pae", "on"),
    ("--long-mode=off", "longmode", "off"),
    ("--cpuid-portability-level=2", "cpuid-portability-level", "2"),
    ("--triple-fault-reset=on", "triplefaultreset", "on"),
    ("--x2apic=off", "x2apic", "off"),
    ("--apic=off", "apic", "off"),
    ("--paravirt-provider=minimal", "paravirtprovider", "minimal"),
    ("--paravirt-debug=enabled=1", "paravirtdebug", "enabled=1"),
    ("--hwvirtex=off", "hwvirtex", "off"),
    ("--nested-paging=off", "nestedpaging", "off"),
    ("--large-pages=on", "largepages", "on"),
    ("--vtx-vpid=off", "vtxvpid", "off"),
    ("--vtx-ux=off", "vtxux", "off"),
    ("--virt-vmsave-vmload=off", "virtvmsavevmload", "off"),
    ("--nested-hw-virt=on", "nested-hw-virt", "on"),
    ("--cpus=3", "cpus", "3"),
    ("--cpu-profile=Intel 8086", "cpu-profile", "Intel 8086"),
    ("--cpu-execution-cap=50", "cpuexecutioncap", "50"),
    ("--rtc-use-utc=on", "rtcuseutc", "on"),
    ("--graphicscontroller=vboxsvga", "graphicscontroller", "vboxsvga"),
    ("--monitor-count=2", "monitorcount", "2"),
    ("--accelerate-3d=on", "accelerate3d", "on"),
    ("--bios-boot-menu=menuonly", "bootmenu", "menuonly"),
    ("--bios-system-time-offset=-1000", "biossystemtimeoffset", "-1000"),
    ("--bios-apic=x2apic", "biosapic", "x2apic"),
    ("--boot3=net", "boot3", "net"),
    // Of keys that each NAT adapter has, the first is looked at.
    ("--nic1=null", "nic1", "null"),
    ("--nic2=intnet", "nic2", "intnet"),
    ("--intnet2=other", "intnet2", "other"),
    ("--nic-type2=virtio", "nictype2", "virtio"),
    ("--nic-speed2=1000", "nicspeed2", "1000"),
    ("--cable-connected2=off", "cableconnected2", "off"),
    ("--mac-address2=0800270A0B0C", "macaddress2", "0800270A0B0C"),
    ("--nic3=bridged", "nic3", "bridged"),
    ("--bridge-adapter3=eth7", "bridgeadapter3", "eth7"),
    ("--nic4=hostonly", "nic4", "hostonly"),
    ("--host-only-adapter4=vboxnet0", "hostonlyadapter4", "vboxnet0"),
    ("--nic5=natnetwork", "nic5", "natnetwork"),
    ("--nat-network5=net", "nat-network5", "net"),
    ("--nic6=generic", "nic6", "Generic"),
    ("--nic-generic-drv6=UDPTunnel", "generic6", "UDPTunnel"),
    ("--nic7=nat", "nic7", "nat"),
    ("--nat-net7=10.9.0.0/16", "natnet7", "10.9.0.0/16"),
    ("--nat-settings7=1400,1,2,3,4", "mtu", "1400"),
    ("--nat-pf7=r,udp,,1,,2", "Forwarding(0)", "r,udp,,1,,2"),
    ("--nic8=null", "nic8", "null"),
    ("--mouse=usbtablet", "hidpointing", "usbtablet"),
    ("--keyboard=usb", "hidkeyboard", "usbkbd"),
    ("--audio-driver=null", "audio", "null"),
    ("--audio-enabled=on", "audio", "null"),
    ("--audio-in=on", "audio_in", "on"),
    ("--audio-out=on", "audio_out", "on"),
    ("--clipboard-mode=bidirectional", "clipboard", "bidirectional"),
    ("--drag-and-drop=hosttoguest", "draganddrop", "hosttoguest"),
    ("--vrde=on", "vrde", "on"),
    ("--vrde-port=5000-5010", "vrdeports", "5000-5010"),
    ("--vrde-address=127.0.0.1", "vrdeaddress", "127.0.0.1"),
    ("--vrde-auth-type=external", "vrdeauthtype", "external"),
    ("--vrde-multi-con=on", "vrdemulticon", "on"),
    ("--usb-xhci=on", "xhci", "on"),
    ("--usb-ohci=on", "usb", "on"),
    ("--guest-memory-balloon=10", "GuestMemoryBalloon", "10"),
    ("--teleporter=on", "teleporterenabled", "on"),
    ("--teleporter-port=6000", "teleporterport", "6000"),
    ("--teleporter-address=h", "teleporteraddress", "h"),
    ("--tracing-enabled=on", "tracing-enabled", "on"),
    ("--tracing-config=c", "tracing-config", "c"),
    ("--tracing-allow-vm-access=on", "tracing-allow-vm-access", "on"),
    (
        "--hardware-uuid=11111111-2222-4333-8444-555555555555",
        "hardwareuuid",
        "11111111-2222-4333-8444-555555555555",
    ),
    ("--hpet=on", "hpet", "on"),
    ("--chipset=ich9", "chipset", "ich9"),
    ("--iommu=amd", "iommu", "amd"),
    ("--autostart-enabled=on", "autostart-enabled", "on"),
    ("--autostart-delay=7", "autostart-delay", "7"),
    ("--default-frontend=headless", "defaultfrontend", "headless"),
    ("--vm-process-priority=high", "vmprocpriority", "high"),
    ("--recording=on", "recording_enabled", "on"),
    ("--recording-video-fps=10", "rec_screen_video_fps", "10"),
    ("--recording-video-res=640x480", "rec_screen_video_res_xy", "640x480"),
];

#[test]
fn every_setting_comes_back_also_from_a_new_service() {
    let home = Home::new();
    home.manage("createvm --name a --ostype Linux_64 --register").ok();
    let check = |home: &Home| {
        let text = home.manage("showvminfo a --machinereadable").ok();
        for (option, key, wanted) in SETTINGS {
            assert_eq!(value(&text, key).as_deref(), Some(*wanted), "{option}");
        }
    };
    home.run(["modifyvm", "a"].into_iter().chain(SETTINGS.iter().map(|(option, ..)| *option))).ok();
    check(&home);
    // A service that starts anew has only the file to go by.
    for process in home.processes() {
        home.kill(&process);
    }
    check(&home);
}

#[test]
fn settings_that_are_not_shown_are_in_the_file() {
    let home = Home::new();
    home.manage("createvm --name a --register").ok();
    std::fs::write(home.path("icon.png"), b"foobar").unwrap();
    let words = "modifyvm a --icon-file icon.png --guest-debug-provider gdb --guest-debug-io-provider tcp \
                 --guest-debug-address 127.0.0.1 --guest-debug-port 1234 --vm-execution-engine interpreter \
                 --bios-pxe-debug on --nat-localhostreachable1 on --nat-alias-mode1 log,sameports --iocache-size 8";
    home.run(words.split_whitespace()).ok();
    let file = std::fs::read_to_string(home.path("vms/a/a.vbox")).unwrap();
    for wanted in [
        "Zm9vYmFy",
        "provider=\"GDB\"",
        "port=\"1234\"",
        "name=\"VBoxInternal/EM/ExecutionEngine\" value=\"interpreter\"",
        "PXEDebug",
        "localhost-reachable=\"true\"",
        "logging=\"true\"",
    ] {
        assert!(file.contains(wanted), "{wanted}\n{file}");
    }
    home.manage("modifyvm a --vm-execution-engine default").ok();
    assert_eq!(home.manage("getextradata a VBoxInternal/EM/ExecutionEngine").ok(), "No value set!\n");
}
