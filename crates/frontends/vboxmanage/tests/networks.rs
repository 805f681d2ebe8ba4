//! Networks from the command line to their settings and processes.

mod common;

use std::fs;

use common::{Home, programs};

fn home() -> Home {
    assert!(
        programs().join("VBoxIntNetSwitch").is_file(),
        "VBoxIntNetSwitch is not built: run `cargo build -p netstack` (a build of the workspace does it)"
    );
    Home::new()
}

#[test]
fn a_dhcp_server_is_made_changed_shown_and_removed() {
    let home = home();
    home.manage(
        "dhcpserver add --netname lan --ip 10.5.0.2 --netmask 255.255.255.0 --lowerip 10.5.0.10 --upperip 10.5.0.20 --enable",
    )
    .ok();
    let twice = "dhcpserver add --netname lan --ip 10.5.0.2 --netmask 255.255.255.0 --lowerip 10.5.0.10 --upperip 10.5.0.20";
    // Vagrant compares the whole text.
    assert_eq!(home.manage(twice).fails(1), "VBoxManage: error: DHCP server already exists\n");
    home.manage(
        "dhcpserver modify --network lan --set-opt 6 10.5.0.1 --set-opt-hex 224 0a:1b --default-lease-time 120 \
         --group pxe --incl-vendor-wild PXEClient* --set-opt BootfileName a.0 --mac-address 080027A1B2C3 \
         --fixed-address 10.5.0.7 --force-opt 6",
    )
    .ok();
    let listed = home.manage("list dhcpservers").ok();
    let own = listed.split("\n\n").find(|block| block.starts_with("NetworkName:    lan\n")).unwrap();
    for line in [
        "Dhcpd IP:       10.5.0.2",
        "LowerIPAddress: 10.5.0.10",
        "NetworkMask:    255.255.255.0",
        "Enabled:        Yes",
        "    defaultLeaseTime: 120 sec",
        "        1/legacy: 255.255.255.0",
        "        6/legacy: 10.5.0.1",
        "      224/hex:    0a:1b",
        "Group:                pxe",
        "    Conditions:       include VendorCID* PXEClient*",
        "       67/legacy: a.0",
        "Individual Config:    MAC 08:00:27:a1:b2:c3",
        "    Fixed Address:    10.5.0.7",
        "    Forced options:   6",
    ] {
        assert!(own.lines().any(|l| l == line), "{line}\n{own}");
    }
    let xml = fs::read_to_string(home.path("config/VirtualBox.xml")).unwrap();
    for part in [
        "networkName=\"lan\" IPAddress=\"10.5.0.2\" networkMask=\"255.255.255.0\" lowerIP=\"10.5.0.10\" upperIP=\"10.5.0.20\" enabled=\"1\"",
        "<Config MACAddress=\"08:00:27:a1:b2:c3\" fixedAddress=\"10.5.0.7\"",
        "<Group name=\"pxe\">",
    ] {
        assert!(xml.contains(part), "{part}\n{xml}");
    }
    for wrong in [
        "dhcpserver modify --network lan --lowerip 10.6.0.1",
        "dhcpserver modify --network lan --set-opt 6 nonsense",
        "dhcpserver modify --network lan --mac-address 080027A1B2C3 --fixed-address 10.6.0.1",
        "dhcpserver restart --network lan",
        "dhcpserver findlease --network lan --mac-address 080027000001",
        "dhcpserver remove --network other",
    ] {
        home.manage(wrong).fails(1);
    }
    home.manage("dhcpserver start --network lan").ok();
    home.manage("dhcpserver restart --network lan").ok();
    home.manage("dhcpserver stop --network lan").ok();
    home.manage("dhcpserver modify --network lan --group pxe --remove-config").ok();
    assert!(!home.manage("list dhcpservers").ok().contains("pxe"));
    home.manage("dhcpserver remove --network lan").ok();
    assert!(!home.manage("list dhcpservers").ok().contains("lan"));
}

#[test]
fn a_nat_network_is_made_started_changed_and_removed() {
    let home = home();
    home.manage("natnetwork add --netname net --network 10.6.0.0/24 --port-forward-4 ssh:tcp:[127.0.0.1]:0:[10.6.0.5]:22")
        .fails(2);
    home.manage("natnetwork add --netname net --network 10.6.0.0/24").ok();
    assert_eq!(
        home.manage("list natnets").ok(),
        "Name:         net\nNetwork:      10.6.0.0/24\nGateway:      10.6.0.1\nDHCP Server:  Yes\nIPv6:         No\n\
         IPv6 Prefix:  fd17:625c:f037:2::/64\nIPv6 Default: No\n\n"
    );
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    home.manage("natnetwork start --netname net").ok();
    // The first start gives it a DHCP server, as VirtualBox does.
    let servers = home.manage("list dhcpservers").ok();
    assert!(
        servers.contains("NetworkName:    net\nDhcpd IP:       10.6.0.3\nLowerIPAddress: 10.6.0.4\n"),
        "{servers}"
    );
    assert!(servers.contains("3/legacy: 10.6.0.1"), "{servers}");
    let busy = home.manage("natnetwork modify --netname net --network 10.7.0.0/24").fails(1);
    assert!(busy.contains("while NATNetwork instance is running"), "{busy}");
    home.manage(&format!(
        "natnetwork modify --netname net --port-forward-4 web:tcp:[127.0.0.1]:{port}:[10.6.0.5]:80"
    ))
    .ok();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "the rule is in force at once");
    home.manage("natnetwork modify --netname net --port-forward-4 delete web").ok();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    home.manage("natnetwork stop --netname net").ok();
    home.manage("natnetwork modify --netname net --network 10.7.0.0/24 --dhcp off --loopback-4 127.0.0.1=9")
        .ok();
    let listed = home.manage("natnetwork list n*").ok();
    assert!(listed.contains("Network:      10.7.0.0/24\n"), "{listed}");
    assert!(listed.contains("loopback mappings (ipv4)\n        127.0.0.1=9\n"), "{listed}");
    assert!(listed.ends_with("1 network found\n"), "{listed}");
    home.manage("natnetwork remove --netname net").ok();
    assert_eq!(home.manage("list natnets").ok(), "");
    let gone = home.manage("natnetwork start --netname net").fails(1);
    assert_eq!(gone, "VBoxManage: error: NATNetwork server does not exist\n");
}

#[test]
fn host_interfaces_and_internal_networks_are_listed() {
    let home = home();
    for line in ["list hostonlyifs", "list bridgedifs", "list intnets", "list hostonlynets"] {
        let ran = home.manage(line);
        assert_eq!(ran.stderr, "", "{line}");
        ran.ok();
    }
    home.manage("createvm --name a --register").ok();
    home.manage("modifyvm a --nic1 intnet --intnet1 lan --nic2 intnet").ok();
    assert_eq!(home.manage("list intnets").ok(), "Name:        intnet\nName:        lan\n");
    let missing = home.manage("hostonlyif remove vboxnet99").fails(1);
    assert!(missing.contains("The host network interface named 'vboxnet99' could not be found"), "{missing}");
    home.manage(
        "hostonlynet add --name n --netmask 255.255.255.0 --lower-ip 192.168.60.1 --upper-ip 192.168.60.9",
    )
    .ok();
    let listed = home.manage("list hostonlynets").ok();
    assert!(
        listed.contains(
            "State:           Enabled\nNetworkMask:     255.255.255.0\nLowerIP:         192.168.60.1\n"
        ),
        "{listed}"
    );
    home.manage("hostonlynet modify --name n --upper-ip 192.168.60.20 --disable").ok();
    assert!(home.manage("list hostonlynets").ok().contains("UpperIP:         192.168.60.20\n"));
    home.manage("hostonlynet remove --name n").ok();
    assert_eq!(home.manage("list hostonlynets").ok(), "");
}

#[test]
fn a_card_that_is_enabled_without_an_address_gets_one() {
    let home = home();
    let mut addresses = Vec::new();
    for name in ["a", "b"] {
        home.manage(&format!("createvm --name {name} --register")).ok();
        home.manage(&format!("unregistervm {name}")).ok();
        // As in files that leave out what a disabled card has.
        let file = home.path(&format!("vms/{name}/{name}.vbox"));
        let text = fs::read_to_string(&file).unwrap();
        let mut parts = text.split(" MACAddress=\"");
        let mut kept = parts.next().unwrap().to_owned();
        // Twelve digits and a quote.
        parts.for_each(|part| kept.push_str(&part[13..]));
        fs::write(&file, kept).unwrap();
        home.manage(&format!("registervm {}", file.display())).ok();
        home.manage(&format!("modifyvm {name} --nic2 intnet")).ok();
        let info = home.manage(&format!("showvminfo {name} --machinereadable")).ok();
        let address = info.lines().find_map(|line| line.strip_prefix("macaddress2=\"")).unwrap().to_owned();
        assert!(address.starts_with("080027") && address.len() == 13, "{address}");
        addresses.push(address);
    }
    assert_ne!(addresses[0], addresses[1]);
}
