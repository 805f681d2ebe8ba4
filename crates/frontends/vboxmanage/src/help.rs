//! The help: for each command a line saying what it does, its synopsis, and a description.

use crate::getopt::Want;
use crate::parse::COMMANDS;
use crate::parse::modifyvm::{Action, ROWS, Row};

/// Width of the synopsis, in columns.
const WIDTH: usize = 80;

struct Topic {
    name: &'static str,
    brief: &'static str,
    /// Without `VBoxManage` and the command. Each word of a line may be wrapped onto the next one.
    synopsis: &'static [&'static str],
    description: &'static str,
}

const VM: &str = "<uuid | vmname>";

static TOPICS: &[Topic] = &[
    Topic {
        name: "list",
        brief: "view system information and VM configuration details",
        synopsis: &[
            "[--long] [--sorted] <bridgedifs | cloudnets | cloudprofiles | cloudproviders | cpu-profiles | \
             dhcpservers | dvds | extpacks | floppies | groups | hddbackends | hdds | hostcpuids | hostdrives | \
             hostdvds | hostfloppies | hostinfo | hostonlyifs | hostonlynets | intnets | natnets | ostypes | \
             runningvms | screenshotformats | systemproperties | usbfilters | usbhost | vms | webcams>",
        ],
        description: "Prints the named list. --long (-l) prints all details of each item, --sorted (-s) sorts \
                      machines by name.",
    },
    Topic {
        name: "showvminfo",
        brief: "show configuration information or log file contents for a virtual machine",
        synopsis: &["VM [--details] [--machinereadable]", "VM <--log=index>"],
        description: "Prints the settings and the state of a machine. --machinereadable prints one key=value pair \
                      for each line, with text in double quotes. --log prints the log file with the given number \
                      instead, 0 for the newest.",
    },
    Topic {
        name: "registervm",
        brief: "register a virtual machine",
        synopsis: &["<filename> [--password file]"],
        description: "Makes the machine of an existing settings file (.vbox) known.",
    },
    Topic {
        name: "clonevm",
        brief: "create a clone of an existing virtual machine",
        synopsis: &[
            "VM [--basefolder=basefolder] [--groups=group,...] [--mode=machine | --mode=machineandchildren | --mode=all] \
             [--name=name] [--options=option,...] [--register] [--snapshot=snapshot-name] [--uuid=uuid]",
        ],
        description: "Makes a machine with copies of the disks of another one, which must be off. Options: KeepAllMACs, \
                      KeepNATMACs, KeepDiskNames, KeepHwUUIDs. --register makes the clone known at once.",
    },
    Topic {
        name: "unregistervm",
        brief: "unregister a virtual machine",
        synopsis: &["VM [--delete] [--delete-all]"],
        description: "Makes a machine unknown. --delete also deletes its settings, logs, saved state and the hard disks \
                      that no other machine uses; --delete-all deletes its DVD and floppy images, too.",
    },
    Topic {
        name: "createvm",
        brief: "create a new virtual machine",
        synopsis: &[
            "<--name=name> [--basefolder=basefolder] [--default] [--groups=group-ID,...] [--ostype=ostype] \
             [--register] [--uuid=uuid] [--cipher=cipher] [--password-id=password-id] [--password=file]",
        ],
        description: "Creates a settings file. --register makes the machine known at once, --default gives it the \
                      devices that suit the guest's operating system (see \"list ostypes\").",
    },
    Topic {
        name: "modifyvm",
        brief: "change settings for a virtual machine that is stopped",
        synopsis: &[],
        description: "Changes take effect together: if one is refused, none is stored. Options whose names end in a \
                      number N belong to one of several devices, counted from 1.",
    },
    Topic {
        name: "startvm",
        brief: "start a virtual machine",
        synopsis: &[
            "VM... [--putenv=name[=value]] [--type=<gui | headless | separate | emergencystop>] [--password=file] \
             [--password-id=password-id]",
        ],
        description: "Starts machines that are powered off, saved or aborted. --type names the front end; \
                      emergencystop ends the process of a machine that does not respond.",
    },
    Topic {
        name: "controlvm",
        brief: "change state and settings for a running virtual machine",
        synopsis: &[
            "VM pause",
            "VM resume",
            "VM reset",
            "VM poweroff",
            "VM acpipowerbutton",
            "VM acpisleepbutton",
            "VM keyboardputscancode <hex> [hex...]",
            "VM keyboardputstring <string> [string...]",
            "VM keyboardputfile <filename>",
            "VM screenshotpng <filename> [display]",
            "VM addencpassword <id> <password-file | -> [--removeonsuspend <yes | no>]",
            "VM removeencpassword <id>",
            "VM removeallencpasswords",
            "VM setvideomodehint <xres> <yres> <bpp> [display [enabled:yes | no [x-origin y-origin]]]",
            "VM setlinkstateN <on | off>",
            "VM nicN <null | nat | bridged | intnet | hostonly | generic | natnetwork> [device-name]",
            "VM nictraceN <on | off>",
            "VM nictracefileN <filename>",
            "VM nicpropertyN <prop-name=prop-value>",
            "VM nicpromiscN <deny | allow-vms | allow-all>",
            "VM natpfN <[rulename],tcp | udp,[host-IP],hostport,[guest-IP],guestport>",
            "VM natpfN delete <rulename>",
            "VM audioin <on | off>",
            "VM audioout <on | off>",
            "VM clipboard mode <disabled | hosttoguest | guesttohost | bidirectional>",
            "VM draganddrop <disabled | hosttoguest | guesttohost | bidirectional>",
            "VM cpuexecutioncap <num>",
            "VM plugcpu <num>",
            "VM unplugcpu <num>",
            "VM vm-process-priority <default | flat | low | normal | high>",
            "VM changeuartmodeN <disconnected | server pipe-name | client pipe-name | tcpserver port | \
             tcpclient hostname:port | file filename | device-name>",
            "VM autostart-enabled <on | off>",
            "VM autostart-delay <seconds>",
        ],
        description: "Scan codes are hexadecimal bytes of set 1; 80 added to a code releases its key. Strings are \
                      typed on a US keyboard.",
    },
    Topic {
        name: "storagectl",
        brief: "manage a storage controller",
        synopsis: &[
            "VM <--name=controller-name> [--add=<floppy | ide | pcie | sas | sata | scsi | usb | virtio>] \
             [--controller=<BusLogic | I82078 | ICH6 | IntelAhci | LSILogic | LSILogicSAS | NVMe | PIIX3 | PIIX4 | \
             USB | VirtIO>] [--bootable=<on | off>] [--hostiocache=<on | off>] [--portcount=count] [--remove] \
             [--rename=new-controller-name]",
        ],
        description: "Adds, changes or removes the storage controller with the given name. --remove detaches what is \
                      connected to it.",
    },
    Topic {
        name: "storageattach",
        brief: "attach, remove, and modify storage media used by a virtual machine",
        synopsis: &[
            "VM <--storagectl=name> [--bandwidthgroup=<name | none>] [--comment=text] [--device=number] \
             [--discard=<on | off>] [--forceunmount] [--hotpluggable=<on | off>] \
             [--medium=<none | emptydrive | additions | uuid | filename | host:drive | iscsi>] \
             [--mtype=<normal | writethrough | immutable | shareable | readonly | multiattach>] \
             [--nonrotational=<on | off>] [--passthrough=<on | off>] [--port=number] [--setparentuuid=uuid] \
             [--setuuid=uuid] [--tempeject=<on | off>] [--type=<dvddrive | fdd | hdd>] [--server=host] \
             [--target=name] [--tport=port] [--lun=number] [--encodedlun=number] [--username=name] \
             [--password=password | --passwordfile=file] [--initiator=name] [--intnet]",
        ],
        description: "Connects a medium to a port of a controller. --medium none takes away what is there, emptydrive \
                      leaves a drive without a medium; iscsi stands for the disk of a target that --server, --target and the \
                      options behind them name. A running machine can only change DVDs and floppies.",
    },
    Topic {
        name: "createmedium",
        brief: "create a new medium",
        synopsis: &["[disk | dvd | floppy] <--filename=filename> [--size=megabytes | --sizebyte=bytes] \
             [--diffparent=<UUID | filename>] [--format=<VDI | RAW>] [--variant=<Standard,Fixed>] \
             [--property name=value]... [--property-file name=/path/to/file/with/value]..."],
        description: "Creates an image, a VDI unless another format is named, which grows with its content unless the \
                      variant is Fixed.",
    },
    Topic {
        name: "encryptmedium",
        brief: "manage the encryption of a medium",
        synopsis: &["<uuid | filename> [--newpassword=<filename | ->] [--oldpassword=<filename | ->] \
             [--cipher=<AES-XTS128-PLAIN64 | AES-XTS256-PLAIN64>] [--newpasswordid=password-ID]"],
        description: "Encrypts an image with a new password and a cipher, encrypts it anew if the old password is given, too, \
                      or decrypts it with the old password alone. Passwords are the first lines of files, - asks for one.",
    },
    Topic {
        name: "checkmediumpwd",
        brief: "check the encryption password of a medium",
        synopsis: &["<uuid | filename> <password-file | ->"],
        description: "Tells whether the password fits an encrypted image.",
    },
    Topic {
        name: "closemedium",
        brief: "remove a hard disk, DVD, or floppy image from the media registry",
        synopsis: &["[disk | dvd | floppy] <uuid | filename> [--delete]"],
        description: "Makes an image unknown that no machine uses. --delete deletes the file, too.",
    },
    Topic {
        name: "showmediuminfo",
        brief: "show information about a medium",
        synopsis: &["[disk | dvd | floppy] <uuid | filename>"],
        description: "Prints what is known of an image.",
    },
    Topic {
        name: "modifymedium",
        brief: "change the characteristics of an existing disk image",
        synopsis: &[
            "[disk | dvd | floppy] <uuid | filename> [--autoreset=<on | off>] [--compact] [--description=text] \
             [--move=pathname] [--property=name=[value]] [--resize=megabytes] [--resizebyte=bytes] \
             [--setlocation=pathname] \
             [--type=<normal | writethrough | immutable | shareable | readonly | multiattach>]",
        ],
        description: "--compact gives storage that holds zeros back to the host. --resize makes the disk larger. --move moves \
                      the file, --setlocation says where it was moved to.",
    },
    Topic {
        name: "clonemedium",
        brief: "create a clone of a medium",
        synopsis: &["[disk | dvd | floppy] <uuid | source-medium> <uuid | target-medium> [--existing] \
             [--format=<VDI | VMDK | VHD | VHDX | QCOW | Parallels | RAW>] [--resize=megabytes] \
             [--variant=<Standard | Fixed | Split2G | Stream | ESX>[,...]]"],
        description: "Copies what a medium shows, with all it depends on, into a new image or, with --existing, into one that \
                      is there.",
    },
    Topic {
        name: "mediumproperty",
        brief: "manage medium properties",
        synopsis: &[
            "[disk | dvd | floppy] set <uuid | filename> <property-name> <property-value>",
            "[disk | dvd | floppy] get <uuid | filename> <property-name>",
            "[disk | dvd | floppy] delete <uuid | filename> <property-name>",
        ],
        description: "Sets, prints or deletes a property of an image.",
    },
    Topic {
        name: "mediumio",
        brief: "medium content access",
        synopsis: &[
            "<--disk=uuid|filename | --dvd=uuid|filename | --floppy=uuid|filename> formatfat [--quick]",
            "<--disk=uuid|filename | --dvd=uuid|filename | --floppy=uuid|filename> cat [--hex] [--offset=byte-offset] \
             [--size=bytes] [--output=-|filename]",
            "<--disk=uuid|filename | --dvd=uuid|filename | --floppy=uuid|filename> stream [--format=VMDK] \
             [--variant=Stream] [--output=-|filename]",
        ],
        description: "Formats a medium with a FAT file system, prints its content, or writes it as an image that is \
                      compressed and can be read from start to end.",
    },
    Topic {
        name: "convertfromraw",
        brief: "convert a raw disk image to a virtual disk image",
        synopsis: &[
            "<inputfile> <outputfile> [--format=<VDI | VMDK | VHD | VHDX | QCOW | Parallels | RAW>] [--uuid=uuid] \
             [--variant=<Standard | Fixed | Split2G | Stream | ESX>[,...]]",
            "stdin <outputfile> <bytes> [--format=<VDI | VMDK | VHD | VHDX | QCOW | Parallels | RAW>] [--uuid=uuid] \
             [--variant=<Standard | Fixed | Split2G | ESX>[,...]]",
        ],
        description: "Makes an image of the sectors in a file or on standard input.",
    },
    Topic {
        name: "getextradata",
        brief: "view keyword values that are associated with a virtual machine or configuration",
        synopsis: &["<global | uuid | vmname> <keyword | enumerate>"],
        description: "Prints the value of a keyword, or all keywords with their values.",
    },
    Topic {
        name: "setextradata",
        brief: "set a keyword value that is associated with a virtual machine or configuration",
        synopsis: &["<global | uuid | vmname> <keyword> [value]"],
        description: "Sets the value of a keyword; deletes the keyword if there is no value.",
    },
    Topic {
        name: "setproperty",
        brief: "change global settings",
        synopsis: &["<property-name> <property-value>"],
        description: "Properties: autostartdbpath, defaultfrontend, hwvirtexclusive, language, logginglevel, \
                      loghistorycount, machinefolder, proxymode, proxyurl, vrdeauthlibrary, vrdeextpack, \
                      websrvauthlibrary. The value \"default\" (\"null\" for autostartdbpath and vrdeextpack) takes a \
                      setting back.",
    },
    Topic {
        name: "discardstate",
        brief: "discard the saved state of a virtual machine",
        synopsis: &["VM"],
        description: "Throws away a machine's saved state, as if its power had been cut.",
    },
    Topic {
        name: "sharedfolder",
        brief: "add and remove shared folders",
        synopsis: &[
            "add VM <--name=name> <--hostpath=hostpath> [--readonly] [--transient] [--automount] \
             [--auto-mount-point=path]",
            "remove VM <--name=name> [--transient]",
        ],
        description: "Keeps which folders of the host a machine's guest may mount.",
    },
    Topic {
        name: "guestproperty",
        brief: "manage virtual machine guest properties",
        synopsis: &[
            "get VM <property-name> [--verbose]",
            "set VM <property-name> [property-value [--flags=flags]]",
            "unset VM <property-name>",
            "enumerate VM [--no-timestamp] [--no-flags] [--relative] [--old-format] [patterns...]",
            "wait VM <patterns> [--timeout=milliseconds] [--fail-on-timeout]",
        ],
        description: "Reads and changes the named texts that host and guest share. Patterns have \"*\" and \"?\". Flags: \
                      TRANSIENT, RDONLYGUEST, RDONLYHOST, READONLY, TRANSRESET.",
    },
    Topic {
        name: "debugvm",
        brief: "introspection and guest debugging",
        synopsis: &[
            "VM getregisters [--cpu=id] <register-name | all>...",
            "VM info <item> [args...]",
            "VM injectnmi",
            "VM setregisters [--cpu=id] <register-name=value>...",
            "VM statistics [--reset] [--descriptions] [--pattern=pattern]",
        ],
        description: "Shows and changes what a running machine's virtual CPUs hold and counts what they do. Patterns for statistics \
                      have \"*\" and \"?\"; \"|\" separates several. \"info help\" lists the items.",
    },
    Topic {
        name: "import",
        brief: "import a virtual appliance in OVF format and create virtual machines",
        synopsis: &[
            "<ovfname | ovaname> [--dry-run] [--options=<KeepAllMACs | KeepNATMACs | ImportToVDI>] [--vsys=n] \
             [--ostype=ostype] [--vmname=name] [--settingsfile=file] [--basefolder=folder] [--group=group] \
             [--memory=MB] [--cpus=n] [--description=text] [--eula=<show | accept>] [--unit=n] [--ignore] \
             [--scsitype=<BusLogic | LsiLogic>] [--disk=path] [--controller=index] [--port=n]",
        ],
        description: "Makes machines out of a package. --dry-run only shows what would be made. Options from --ostype on change \
                      the machine that the --vsys before them numbers, those from --ignore on the unit that --unit numbers.",
    },
    Topic {
        name: "export",
        brief: "export one or more virtual machines to a virtual appliance",
        synopsis: &["VM... <--output=name> [--legacy09 | --ovf09 | --ovf10 | --ovf20] [--manifest] \
             [--options=<manifest | iso | nomacs | nomacsbutnat>...] [--vsys=n] [--vmname=name] [--product=text] \
             [--producturl=text] [--vendor=text] [--vendorurl=text] [--version=text] [--description=text] [--eula=text] \
             [--eulafile=file]"],
        description: "Writes machines that are off as a package: a descriptor with its disk images beside it (.ovf), or all in one \
                      file (.ova). Options from --vmname on are about the machine that the --vsys before them numbers.",
    },
    Topic {
        name: "bandwidthctl",
        brief: "manage bandwidth groups",
        synopsis: &[
            "VM add <name> <--limit=limit[k|m|g|K|M|G]> <--type=disk|network>",
            "VM list [--machinereadable]",
            "VM remove <name>",
            "VM set <name> <--limit=limit[k|m|g|K|M|G]>",
        ],
        description: "Limits what disks or network cards that share a group may move. The units k, m and g mean bits per second by \
                      thousands, K, M and G bytes per second by 1024; without a unit the limit is in megabytes per second; 0 is none. \
                      For network cards it is what the guest sends that is limited.",
    },
    Topic {
        name: "extpack",
        brief: "extension package management",
        synopsis: &["install [--replace] <tarball>", "uninstall [--force] <name>", "cleanup"],
        description: "No extension packs can be installed; \"list extpacks\" shows none.",
    },
    Topic {
        name: "hostonlyif",
        brief: "manage host-only network interfaces",
        synopsis: &[
            "ipconfig <ifname> [--dhcp | --ip=IPv4-address [--netmask=IPv4-netmask] | \
             --ipv6=IPv6-address [--netmasklengthv6=length]]",
            "create",
            "remove <ifname>",
        ],
        description: "A host-only interface is one of the host (vboxnet0 …) that machines and the host share. Creating \
                      and setting up one needs the capability cap_net_admin for the program VBoxNetAdpCtl.",
    },
    Topic {
        name: "hostonlynet",
        brief: "host only network management",
        synopsis: &[
            "add <--name=netname> [--id=netid] <--netmask=mask> <--lower-ip=address> <--upper-ip=address> \
             [--enable | --disable]",
            "modify <--name=netname | --id=netid> [--lower-ip=address] [--upper-ip=address] [--netmask=mask] \
             [--enable | --disable]",
            "remove <--name=netname | --id=netid>",
        ],
        description: "A host-only network joins machines, which get addresses of its range.",
    },
    Topic {
        name: "dhcpserver",
        brief: "DHCP server management",
        synopsis: &[
            "add <--network=netname | --interface=ifname> <--server-ip=address> <--netmask=mask> <--lower-ip=address> \
             <--upper-ip=address> [--enable | --disable] \
             [[--global] [--set-opt=dhcp-opt-no value...] [--set-opt-hex=dhcp-opt-no hexstring...] \
             [--force-opt=dhcp-opt-no...] [--suppress-opt=dhcp-opt-no...] [--min-lease-time=seconds] \
             [--default-lease-time=seconds] [--max-lease-time=seconds]] \
             [--group=name [--incl-mac=address...] [--excl-mac=address...] [--incl-mac-wild=pattern...] \
             [--excl-mac-wild=pattern...] [--incl-vendor=string...] [--excl-vendor=string...] \
             [--incl-vendor-wild=pattern...] [--excl-vendor-wild=pattern...] [--incl-user=string...] \
             [--excl-user=string...] [--incl-user-wild=pattern...] [--excl-user-wild=pattern...] ...] \
             [--vm=name|uuid [--nic=1-N] [--fixed-address=address] ...] \
             [--mac-address=address [--fixed-address=address] ...]",
            "modify <--network=netname | --interface=ifname> [the options of add] [--del-opt=dhcp-opt-no...] \
             [--unforce-opt=dhcp-opt-no...] [--unsuppress-opt=dhcp-opt-no...] [--zap-options] [--remove-config] \
             [--del-mac=address...] [--del-mac-wild=pattern...] [--del-vendor=string...] \
             [--del-vendor-wild=pattern...] [--del-user=string...] [--del-user-wild=pattern...] [--zap-conditions]",
            "remove <--network=netname | --interface=ifname>",
            "start <--network=netname | --interface=ifname>",
            "restart <--network=netname | --interface=ifname>",
            "stop <--network=netname | --interface=ifname>",
            "findlease <--network=netname | --interface=ifname> <--mac-address=mac>",
        ],
        description: "DHCP servers for internal, host-only and NAT networks. Options are numbers of RFC 2132 or names \
                      like DomainNameServers; they are for all clients, a group, a machine's adapter or a hardware \
                      address, whichever was named before.",
    },
    Topic {
        name: "natnetwork",
        brief: "create, modify, remove and list NAT networks",
        synopsis: &[
            "add [--disable | --enable] <--netname=name> <--network=network> [--dhcp=on|off] [--ipv6=on|off] \
             [--ipv6-default=on|off] [--ipv6-prefix=prefix] [--loopback-4=rule] [--port-forward-4=rule] \
             [--port-forward-6=rule]",
            "list [filter-pattern]",
            "modify [--dhcp=on|off] [--disable | --enable] <--netname=name> <--network=network> [--ipv6=on|off] \
             [--ipv6-default=on|off] [--ipv6-prefix=prefix] [--loopback-4=rule] [--port-forward-4=rule] \
             [--port-forward-6=rule]",
            "remove <--netname=name>",
            "start <--netname=name>",
            "stop <--netname=name>",
        ],
        description: "A NAT network is shared by machines behind one router. A rule is \
                      name:tcp|udp:[host ip]:host port:[guest ip]:guest port, or \"delete name\"; a loopback rule is \
                      127.0.0.1=offset, or \"delete 127.0.0.1\".",
    },
];

fn find(name: &str) -> Option<&'static Topic> {
    TOPICS.iter().find(|topic| topic.name == name)
}

/// The synopsis of one command.
pub fn usage(topic: &str) -> String {
    let Some(topic) = find(topic) else { return overview() };
    let mut brief = topic.brief.to_owned();
    brief[..1].make_ascii_uppercase();
    format!("Usage - {brief}:\n\n{}", synopsis(topic))
}

/// Synopsis and description.
pub fn full(topic: &str) -> String {
    let Some(found) = find(topic) else {
        return format!(
            "The command '{topic}' is not available in this version of {}.\n",
            crate::print::PRODUCT
        );
    };
    format!("{}\n{}", usage(topic), wrap(found.description, "  ", "  "))
}

/// The synopses of all commands and the options that stand before a command.
pub fn overview() -> String {
    let mut text = "Usage - Command-line management interface:\n\n".to_owned();
    for line in [
        "[-V | --version] [--dump-build-type] [-q | --nologo] [-d | --detailed-progress] [--settingspw=password] \
         [--settingspwfile=pw-file] [@response-file] [[help] subcommand]",
        "help [subcommand]",
        "commands",
    ] {
        text.push_str(&wrap(&format!("VBoxManage {line}"), "  ", "      "));
    }
    for topic in TOPICS {
        text.push('\n');
        text.push_str(&synopsis(topic));
    }
    text
}

/// What `VBoxManage commands` prints.
pub fn command_names() -> String {
    let mut text = "commands:\n".to_owned();
    let mut last = "";
    for command in COMMANDS.iter().filter(|command| command.parse.is_some()) {
        // Old names of a command follow its present one.
        if command.topic != last {
            text.push_str(&format!("    {}\n", command.name));
        }
        last = command.topic;
    }
    text
}

fn synopsis(topic: &Topic) -> String {
    let command = format!("VBoxManage {}", topic.name);
    if topic.name == "modifyvm" {
        let options: Vec<String> = ROWS.iter().map(option).collect();
        return wrap(&format!("{command} {VM} {}", options.join(" ")), "  ", "      ");
    }
    let line = |line: &&str| {
        let line = match line.strip_prefix("VM") {
            Some(rest) => format!("{VM}{rest}"),
            None => (*line).to_owned(),
        };
        wrap(&format!("{command} {line}"), "  ", "      ")
    };
    topic.synopsis.iter().map(line).collect()
}

/// A row of `modifyvm`'s table as the synopsis shows it.
fn option(row: &Row) -> String {
    let name = row.names.first().copied().unwrap_or_default();
    let index = if row.indexed { "N" } else { "" };
    let value = match (row.action, row.want) {
        (_, Want::Nothing) => return format!("[--{name}{index}]"),
        (_, Want::OnOff) => "<on | off>".to_owned(),
        (Action::Words(_, _, words), _) => {
            let mut shown: Vec<&str> = Vec::new();
            let mut values: Vec<&str> = Vec::new();
            for (word, value) in words {
                // The first word for a value is the one to teach.
                if !values.contains(value) {
                    values.push(value);
                    shown.push(word);
                }
            }
            format!("<{}>", shown.join(" | "))
        }
        (Action::TextOr(_, _, word), _) => format!("<{word} | text>"),
        _ => special_value(name, row.want).to_owned(),
    };
    format!("[--{name}{index}={value}]")
}

fn special_value(name: &str, want: Want) -> &'static str {
    match name {
        "boot" => "<none | floppy | dvd | disk | net>",
        "cpuid-set" => "leaf[:subleaf] eax ebx ecx edx",
        "cpuid-remove" => "leaf[:subleaf]",
        "groups" => "group[,group...]",
        "icon-file" => "filename",
        "os-type" => "OS-type",
        "memory" | "vram" | "guest-memory-balloon" => "size-in-MB",
        "nic-type" => "<Am79C970A | Am79C973 | 82540EM | 82543GC | 82545EM | virtio>",
        "nic-promisc" => "<deny | allow-vms | allow-all>",
        "nic" => "<none | null | nat | bridged | intnet | hostonly | generic | natnetwork>",
        "nat-settings" => "[mtu],[socksnd],[sockrcv],[tcpsnd],[tcprcv]",
        "nat-pf" => "<[rule-name],tcp | udp,[host-IP],hostport,[guest-IP],guestport | delete rule-name>",
        "nat-alias-mode" => "<default | [log],[proxyonly],[sameports]>",
        "nic-property" | "vrde-property" => "name=value",
        "mouse" => "<ps2 | usb | usbtablet | usbmultitouch | usbmtscreenpluspad | none>",
        "keyboard" => "<ps2 | usb | none>",
        "uart" | "lpt" => "<off | IO-base IRQ>",
        "uart-mode" => {
            "<disconnected | server pipe | client pipe | tcpserver port | tcpclient hostname:port | file filename | \
             device-name>"
        }
        "uart-type" => "<16450 | 16550A | 16750>",
        "audio" => "<none | default | null | oss | alsa | pulse>",
        "clipboard-file-transfers" => "<enabled | disabled>",
        "vrde-port" => "<default | port>",
        "usb-rename" => "old-name new-name",
        "teleporter-password-file" | "recording-file" => "filename",
        "chipset" => "<ich9 | piix3>",
        "recording-screens" => "<all | none | screen-ID[,screen-ID...]>",
        "recording-video-res" => "widthxheight",
        "vm-execution-engine" => "<default | hwvirt | native-api | interpreter | recompiler>",
        "autostop-type" => "<disabled | savestate | poweroff | acpishutdown>",
        "pci-attach" => "host-PCI-address[@guest-PCI-address]",
        "pci-detach" => "host-PCI-address",
        "hda" | "hdb" | "hdd" | "sata-port" | "scsi-port" | "dvd" | "floppy" => "<none | uuid | filename>",
        "sata" | "scsi" | "dvd-pass-through" => "<on | off>",
        "hardware-uuid" => "UUID",
        _ => match want {
            Want::Text => "text",
            _ => "number",
        },
    }
}

/// Breaks `text` between words outside of brackets, unless a bracket alone is longer than a line.
fn wrap(text: &str, first: &str, rest: &str) -> String {
    let mut out = String::new();
    let mut line = first.to_owned();
    let mut empty = true;
    for piece in pieces(text, WIDTH - rest.len()) {
        if !empty && line.chars().count() + 1 + piece.chars().count() > WIDTH {
            out.push_str(line.trim_end());
            out.push('\n');
            line = rest.to_owned();
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(piece);
        empty = false;
    }
    out.push_str(line.trim_end());
    out.push('\n');
    out
}

/// The parts of `text` between which a line may be broken.
fn pieces(text: &str, limit: usize) -> Vec<&str> {
    let mut all = Vec::new();
    let (mut depth, mut start) = (0_usize, 0);
    for (at, c) in text.char_indices() {
        match c {
            '[' | '<' => depth += 1,
            ']' | '>' => depth = depth.saturating_sub(1),
            ' ' if depth == 0 => {
                all.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    all.push(&text[start..]);
    all.into_iter()
        .flat_map(|piece| if piece.len() > limit { piece.split(' ').collect() } else { vec![piece] })
        .filter(|piece| !piece.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_works_has_help_and_the_other_way_round() {
        for command in COMMANDS {
            assert_eq!(command.parse.is_some(), find(command.topic).is_some(), "{}", command.name);
        }
        for topic in TOPICS {
            assert!(COMMANDS.iter().any(|command| command.name == topic.name), "{}", topic.name);
        }
    }

    #[test]
    fn lines_fit_the_terminal() {
        for line in overview().lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        for topic in TOPICS {
            // The heading is one line, as VirtualBox's.
            assert!(
                full(topic.name).lines().skip(1).all(|line| line.chars().count() <= WIDTH),
                "{}",
                topic.name
            );
        }
    }

    #[test]
    fn a_synopsis_reads_as_virtualboxs() {
        assert_eq!(
            usage("unregistervm"),
            "Usage - Unregister a virtual machine:\n\n  \
             VBoxManage unregistervm <uuid | vmname> [--delete] [--delete-all]\n"
        );
        assert_eq!(
            usage("createvm").lines().nth(3),
            Some("      [--groups=group-ID,...] [--ostype=ostype] [--register] [--uuid=uuid]")
        );
    }

    #[test]
    fn the_synopsis_of_modifyvm_shows_every_option() {
        let text = usage("modifyvm");
        for row in ROWS {
            assert!(text.contains(&format!("--{}", row.names[0])), "{}", row.names[0]);
        }
        assert!(text.contains("[--firmware=<bios | efi | efi32 | efi64 | efidual>]"));
        assert!(text.contains("[--nicN=<none | null | nat"));
    }
}
