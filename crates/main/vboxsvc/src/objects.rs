//! Which object a path names, and which paths there are.

use main_api::idl::*;
use main_api::paths;
use main_api::types::Interface;
use settings::{MachineSettings, OsType, Snapshot};
use uuid::Uuid;

/// An object of the service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Object {
    Root,
    VirtualBox,
    EventSource,
    SystemProperties,
    Host,
    GuestOsType(&'static OsType),
    Medium(Uuid),
    Progress(u32),
    ProgressError(u32),
    Session(u32),
    Appliance(u32),
    /// One of a package's machines, by its place.
    SystemDescription(u32, usize),
    Machine(MachineRef, Part),
    /// By the name of its network.
    DhcpServer(String),
    DhcpConfig(String, DhcpScope),
    /// Server, group, place.
    DhcpCondition(String, String, usize),
    NatNetwork(String),
    HostOnlyNetwork(Uuid),
    HostInterface(String),
}

/// A level of a DHCP server's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DhcpScope {
    Global,
    Group(String),
    Client(String),
}

impl Object {
    /// The path of a network or of what belongs to one; `/` for any other object.
    pub(crate) fn network_path(&self) -> String {
        let dhcp = |name: &str| format!("{}/{}", paths::DHCP_SERVERS, paths::escape(name));
        match self {
            Self::DhcpServer(name) => dhcp(name),
            Self::DhcpConfig(name, DhcpScope::Global) => format!("{}/Global", dhcp(name)),
            Self::DhcpConfig(name, DhcpScope::Group(group)) => {
                format!("{}/Groups/{}", dhcp(name), paths::escape(group))
            }
            Self::DhcpConfig(name, DhcpScope::Client(key)) => {
                format!("{}/Clients/{}", dhcp(name), paths::escape(key))
            }
            Self::DhcpCondition(name, group, at) => {
                format!("{}/Groups/{}/{at}", dhcp(name), paths::escape(group))
            }
            Self::NatNetwork(name) => format!("{}/{}", paths::NAT_NETWORKS, paths::escape(name)),
            Self::HostOnlyNetwork(id) => format!("{}/{}", paths::HOST_ONLY_NETWORKS, uuid_element(*id)),
            Self::HostInterface(name) => format!("{}/{}", paths::HOST_INTERFACES, paths::escape(name)),
            _ => "/".into(),
        }
    }
}

/// By which way a machine is reached, and thereby which of its copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MachineRef {
    Registered(Uuid),
    Unregistered(Uuid),
    /// The machine that the session has locked.
    Session(u32),
}

impl MachineRef {
    pub(crate) fn path(self) -> String {
        match self {
            Self::Registered(id) => format!("{}/{}", paths::MACHINES, uuid_element(id)),
            Self::Unregistered(id) => format!("{}/{}", paths::UNREGISTERED, uuid_element(id)),
            Self::Session(number) => format!("{}/{number}/Machine", paths::SESSIONS),
        }
    }
}

/// A machine or one of the objects below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Machine,
    AccessError,
    NetworkAdapter(usize),
    NatEngine(usize),
    SerialPort(usize),
    ParallelPort(usize),
    AudioSettings,
    AudioAdapter,
    GraphicsAdapter,
    Bios,
    Vrde,
    UsbController(String),
    UsbFilters,
    UsbFilter(usize),
    StorageController(String),
    Attachment(String, i32, i32),
    SharedFolder(String),
    BandwidthControl,
    BandwidthGroup(String),
    Recording,
    RecordingScreen(usize),
    Tpm,
    GuestDebug,
    Nvram,
    Snapshot(Uuid),
}

/// A UUID as one element of a path.
pub(crate) fn uuid_element(id: Uuid) -> String {
    paths::escape(&id.to_string())
}

fn parse_uuid(element: &str) -> Option<Uuid> {
    Uuid::try_parse(&paths::unescape(element)?).ok()
}

pub(crate) fn medium_path(id: Uuid) -> String {
    format!("{}/{}", paths::MEDIA, uuid_element(id))
}

pub(crate) fn progress_path(number: u32) -> String {
    format!("{}/{number}", paths::PROGRESS)
}

/// The object that `path` names by its form; it need not exist.
pub(crate) fn parse(path: &str) -> Option<Object> {
    let rest = path.strip_prefix(paths::ROOT)?;
    let elements: Vec<&str> = rest.split('/').skip(1).collect();
    Some(match elements.as_slice() {
        [] => Object::Root,
        ["VirtualBox"] => Object::VirtualBox,
        ["VirtualBox", "EventSource"] => Object::EventSource,
        ["VirtualBox", "SystemProperties"] => Object::SystemProperties,
        ["VirtualBox", "Host"] => Object::Host,
        ["GuestOSTypes", id] => Object::GuestOsType(OsType::by_id(&paths::unescape(id)?)?),
        ["Media", id] => Object::Medium(parse_uuid(id)?),
        ["Progress", number] => Object::Progress(number.parse().ok()?),
        ["Progress", number, "ErrorInfo"] => Object::ProgressError(number.parse().ok()?),
        ["Appliances", number] => Object::Appliance(number.parse().ok()?),
        ["Appliances", number, index] => Object::SystemDescription(number.parse().ok()?, index.parse().ok()?),
        ["Sessions", number] => Object::Session(number.parse().ok()?),
        ["Sessions", number, "Machine", part @ ..] => {
            Object::Machine(MachineRef::Session(number.parse().ok()?), parse_part(part)?)
        }
        ["Machines", id, part @ ..] => {
            Object::Machine(MachineRef::Registered(parse_uuid(id)?), parse_part(part)?)
        }
        ["Unregistered", id, part @ ..] => {
            Object::Machine(MachineRef::Unregistered(parse_uuid(id)?), parse_part(part)?)
        }
        ["DHCPServers", name] => Object::DhcpServer(paths::unescape(name)?),
        ["DHCPServers", name, "Global"] => Object::DhcpConfig(paths::unescape(name)?, DhcpScope::Global),
        ["DHCPServers", name, "Groups", group] => {
            Object::DhcpConfig(paths::unescape(name)?, DhcpScope::Group(paths::unescape(group)?))
        }
        ["DHCPServers", name, "Clients", key] => {
            Object::DhcpConfig(paths::unescape(name)?, DhcpScope::Client(paths::unescape(key)?))
        }
        ["DHCPServers", name, "Groups", group, at] => {
            Object::DhcpCondition(paths::unescape(name)?, paths::unescape(group)?, at.parse().ok()?)
        }
        ["NATNetworks", name] => Object::NatNetwork(paths::unescape(name)?),
        ["HostOnlyNetworks", id] => Object::HostOnlyNetwork(parse_uuid(id)?),
        ["HostInterfaces", name] => Object::HostInterface(paths::unescape(name)?),
        _ => return None,
    })
}

fn parse_part(elements: &[&str]) -> Option<Part> {
    Some(match elements {
        [] => Part::Machine,
        ["AccessError"] => Part::AccessError,
        ["NetworkAdapters", slot] => Part::NetworkAdapter(slot.parse().ok()?),
        ["NetworkAdapters", slot, "NATEngine"] => Part::NatEngine(slot.parse().ok()?),
        ["SerialPorts", slot] => Part::SerialPort(slot.parse().ok()?),
        ["ParallelPorts", slot] => Part::ParallelPort(slot.parse().ok()?),
        ["AudioSettings"] => Part::AudioSettings,
        ["AudioSettings", "Adapter"] => Part::AudioAdapter,
        ["GraphicsAdapter"] => Part::GraphicsAdapter,
        ["BIOSSettings"] => Part::Bios,
        ["VRDEServer"] => Part::Vrde,
        ["USBControllers", name] => Part::UsbController(paths::unescape(name)?),
        ["USBDeviceFilters"] => Part::UsbFilters,
        ["USBDeviceFilters", index] => Part::UsbFilter(index.parse().ok()?),
        ["StorageControllers", name] => Part::StorageController(paths::unescape(name)?),
        ["MediumAttachments", name, port, device] => {
            Part::Attachment(paths::unescape(name)?, port.parse().ok()?, device.parse().ok()?)
        }
        ["SharedFolders", name] => Part::SharedFolder(paths::unescape(name)?),
        ["BandwidthControl"] => Part::BandwidthControl,
        ["BandwidthControl", name] => Part::BandwidthGroup(paths::unescape(name)?),
        ["RecordingSettings"] => Part::Recording,
        ["RecordingSettings", screen] => Part::RecordingScreen(screen.parse().ok()?),
        ["TrustedPlatformModule"] => Part::Tpm,
        ["GuestDebugControl"] => Part::GuestDebug,
        ["NvramStore"] => Part::Nvram,
        ["Snapshots", id] => Part::Snapshot(parse_uuid(id)?),
        _ => return None,
    })
}

impl Part {
    /// The path below the machine's, with its slash; empty for the machine itself.
    pub(crate) fn suffix(&self) -> String {
        match self {
            Self::Machine => String::new(),
            Self::AccessError => "/AccessError".into(),
            Self::NetworkAdapter(slot) => format!("/NetworkAdapters/{slot}"),
            Self::NatEngine(slot) => format!("/NetworkAdapters/{slot}/NATEngine"),
            Self::SerialPort(slot) => format!("/SerialPorts/{slot}"),
            Self::ParallelPort(slot) => format!("/ParallelPorts/{slot}"),
            Self::AudioSettings => "/AudioSettings".into(),
            Self::AudioAdapter => "/AudioSettings/Adapter".into(),
            Self::GraphicsAdapter => "/GraphicsAdapter".into(),
            Self::Bios => "/BIOSSettings".into(),
            Self::Vrde => "/VRDEServer".into(),
            Self::UsbController(name) => format!("/USBControllers/{}", paths::escape(name)),
            Self::UsbFilters => "/USBDeviceFilters".into(),
            Self::UsbFilter(index) => format!("/USBDeviceFilters/{index}"),
            Self::StorageController(name) => format!("/StorageControllers/{}", paths::escape(name)),
            Self::Attachment(name, port, device) => {
                format!("/MediumAttachments/{}/{port}/{device}", paths::escape(name))
            }
            Self::SharedFolder(name) => format!("/SharedFolders/{}", paths::escape(name)),
            Self::BandwidthControl => "/BandwidthControl".into(),
            Self::BandwidthGroup(name) => format!("/BandwidthControl/{}", paths::escape(name)),
            Self::Recording => "/RecordingSettings".into(),
            Self::RecordingScreen(screen) => format!("/RecordingSettings/{screen}"),
            Self::Tpm => "/TrustedPlatformModule".into(),
            Self::GuestDebug => "/GuestDebugControl".into(),
            Self::Nvram => "/NvramStore".into(),
            Self::Snapshot(id) => format!("/Snapshots/{}", uuid_element(*id)),
        }
    }

    pub(crate) fn interface(&self) -> &'static Interface {
        macro_rules! table {
            ($name:ident) => {{
                static TABLE: Interface = $name::INTERFACE;
                &TABLE
            }};
        }
        match self {
            Self::Machine => table!(IMachine),
            Self::AccessError => table!(IVirtualBoxErrorInfo),
            Self::NetworkAdapter(_) => table!(INetworkAdapter),
            Self::NatEngine(_) => table!(INATEngine),
            Self::SerialPort(_) => table!(ISerialPort),
            Self::ParallelPort(_) => table!(IParallelPort),
            Self::AudioSettings => table!(IAudioSettings),
            Self::AudioAdapter => table!(IAudioAdapter),
            Self::GraphicsAdapter => table!(IGraphicsAdapter),
            Self::Bios => table!(IBIOSSettings),
            Self::Vrde => table!(IVRDEServer),
            Self::UsbController(_) => table!(IUSBController),
            Self::UsbFilters => table!(IUSBDeviceFilters),
            Self::UsbFilter(_) => table!(IUSBDeviceFilter),
            Self::StorageController(_) => table!(IStorageController),
            Self::Attachment(..) => table!(IMediumAttachment),
            Self::SharedFolder(_) => table!(ISharedFolder),
            Self::BandwidthControl => table!(IBandwidthControl),
            Self::BandwidthGroup(_) => table!(IBandwidthGroup),
            Self::Recording => table!(IRecordingSettings),
            Self::RecordingScreen(_) => table!(IRecordingScreenSettings),
            Self::Tpm => table!(ITrustedPlatformModule),
            Self::GuestDebug => table!(IGuestDebugControl),
            Self::Nvram => table!(INvramStore),
            Self::Snapshot(_) => table!(ISnapshot),
        }
    }

    /// Whether the settings have this part.
    pub(crate) fn exists(&self, s: &MachineSettings) -> bool {
        let hw = &s.hardware;
        match self {
            Self::NetworkAdapter(slot) | Self::NatEngine(slot) => *slot < hw.network.len(),
            Self::SerialPort(slot) => *slot < hw.serial_ports.len(),
            Self::ParallelPort(slot) => *slot < hw.parallel_ports.len(),
            Self::UsbController(name) => hw.usb.controllers.iter().any(|c| c.name == *name),
            Self::UsbFilter(index) => *index < hw.usb.device_filters.len(),
            Self::StorageController(name) => hw.storage_controller(name).is_some(),
            Self::Attachment(name, port, device) => hw
                .storage_controller(name)
                .is_some_and(|c| c.attached.iter().any(|a| a.port == *port && a.device == *device)),
            Self::SharedFolder(name) => hw.shared_folders.iter().any(|f| f.name == *name),
            Self::BandwidthGroup(name) => hw.bandwidth_groups.iter().any(|g| g.name == *name),
            Self::RecordingScreen(screen) => *screen < s.recording.screens.len(),
            Self::Snapshot(id) => s.find_snapshot(*id).is_some(),
            Self::AccessError => false,
            Self::Machine
            | Self::AudioSettings
            | Self::AudioAdapter
            | Self::GraphicsAdapter
            | Self::Bios
            | Self::Vrde
            | Self::UsbFilters
            | Self::BandwidthControl
            | Self::Recording
            | Self::Tpm
            | Self::GuestDebug
            | Self::Nvram => true,
        }
    }
}

/// Every part of a machine except itself.
pub(crate) fn parts(s: &MachineSettings) -> Vec<Part> {
    let hw = &s.hardware;
    let mut all = vec![
        Part::AudioSettings,
        Part::AudioAdapter,
        Part::GraphicsAdapter,
        Part::Bios,
        Part::Vrde,
        Part::UsbFilters,
        Part::BandwidthControl,
        Part::Recording,
        Part::Tpm,
        Part::GuestDebug,
        Part::Nvram,
    ];
    for slot in 0..hw.network.len() {
        all.extend([Part::NetworkAdapter(slot), Part::NatEngine(slot)]);
    }
    all.extend((0..hw.serial_ports.len()).map(Part::SerialPort));
    all.extend((0..hw.parallel_ports.len()).map(Part::ParallelPort));
    all.extend(hw.usb.controllers.iter().map(|c| Part::UsbController(c.name.clone())));
    all.extend((0..hw.usb.device_filters.len()).map(Part::UsbFilter));
    for c in &hw.storage_controllers {
        all.push(Part::StorageController(c.name.clone()));
        all.extend(c.attached.iter().map(|a| Part::Attachment(c.name.clone(), a.port, a.device)));
    }
    all.extend(hw.shared_folders.iter().map(|f| Part::SharedFolder(f.name.clone())));
    all.extend(hw.bandwidth_groups.iter().map(|g| Part::BandwidthGroup(g.name.clone())));
    all.extend((0..s.recording.screens.len()).map(Part::RecordingScreen));
    all.extend(snapshots(s).into_iter().map(|snapshot| Part::Snapshot(snapshot.uuid)));
    all
}

/// Every snapshot, parents before children.
pub(crate) fn snapshots(s: &MachineSettings) -> Vec<&Snapshot> {
    let mut all: Vec<&Snapshot> = s.snapshot.as_deref().into_iter().collect();
    let mut next = 0;
    while next < all.len() {
        let children = &all[next].children;
        all.extend(children);
        next += 1;
    }
    all
}

/// The elements directly below `path` among the paths of `parts` of the machine at `base`.
pub(crate) fn children_of_machine(base: &str, path: &str, parts: &[Part]) -> Vec<String> {
    let Some(below) = path.strip_prefix(base) else { return Vec::new() };
    let prefix = format!("{below}/");
    let mut found: Vec<String> = Vec::new();
    for part in parts {
        let suffix = part.suffix();
        if let Some(element) = suffix.strip_prefix(&prefix).and_then(|r| r.split('/').next())
            && !found.iter().any(|f| f == element)
        {
            found.push(element.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_machine_is_found_by_its_own_path() {
        let mut s = MachineSettings::default();
        let hw = &mut s.hardware;
        hw.storage_controllers.push(settings::StorageController::new("IDE / 漢", settings::StorageBus::Ide));
        hw.storage_controllers[0].attached.push(settings::AttachedDevice { port: 1, ..Default::default() });
        hw.shared_folders.push(settings::SharedFolder { name: "a b".into(), ..Default::default() });
        hw.usb.controllers.push(settings::UsbController { name: "OHCI".into(), ..Default::default() });
        hw.usb.device_filters.push(settings::UsbDeviceFilter::default());
        hw.bandwidth_groups.push(settings::BandwidthGroup { name: "".into(), ..Default::default() });
        s.snapshot = Some(Box::new(Snapshot { uuid: Uuid::from_u128(7), ..Default::default() }));
        let machine = MachineRef::Registered(Uuid::from_u128(42));
        for part in parts(&s) {
            let path = format!("{}{}", machine.path(), part.suffix());
            assert!(part.exists(&s), "{part:?}");
            assert_eq!(parse(&path), Some(Object::Machine(machine, part)));
        }
    }

    #[test]
    fn children_lead_from_the_machine_to_each_part() {
        let s = MachineSettings::default();
        let all = parts(&s);
        let children = children_of_machine("/m", "/m", &all);
        assert!(children.contains(&"NetworkAdapters".to_owned()));
        assert_eq!(children_of_machine("/m", "/m/SerialPorts", &all), ["0", "1", "2", "3"]);
        assert_eq!(children_of_machine("/m", "/m/NetworkAdapters/3", &all), ["NATEngine"]);
    }
}
