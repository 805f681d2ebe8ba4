//! Network cards: which of the settings' become real, and what joins them (`pdm`) to their networks (`netstack`).

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use anyhow::{Context, Result, bail};
use dev_net::e1000::{self, E1000};
use dev_net::pcnet::{self, Pcnet};
use dev_net::virtio::{self, VirtioNet};
use main_api::enums::{NetworkAdapterPromiscModePolicy, NetworkAttachmentType};
use main_api::vm_process::VmProcess;
use netstack::generic::{Generic, Plug};
use netstack::link::{Link, Reconnect};
use netstack::{Guest, Nat, NatConfig, Protocol, Rule, Tftp};
use parking_lot::Mutex;
use pdm::connector::{NetDriver, NetPort};
use pdm::pci::{DevFn, PciBus};
use pdm::{Device, Iom};
use pgm::Pgm;
use settings::words as w;
use settings::{MachineSettings, NetworkAdapter};
use vbox_types::Port;

use crate::limit::Limits;
use crate::wire::{Wire, WireConfig};

/// Base port and interrupt of each ISA card: those of the NE2100.
const ISA_PLACES: [(u16, u8); 4] = [(0x300, 3), (0x320, 5), (0x340, 9), (0x360, 4)];

/// A card's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// None: no cable is plugged in.
    Null,
    Nat {
        config: NatConfig,
        rules: Vec<Rule>,
    },
    /// A network that machines share, in a process of its own.
    Shared(SharedNetwork),
    /// A tunnel or a foreign switch.
    Generic(Generic),
}

/// A network that machines share, as the service finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedNetwork {
    pub kind: NetworkAttachmentType,
    /// The network's, or the host interface's.
    pub name: String,
    pub policy: NetworkAdapterPromiscModePolicy,
}

/// Where shared networks come from.
pub trait Networks: Send + Sync {
    /// A cable into the network for the card in `slot` (from 0): a socket on which each message is a frame.
    fn open(&self, slot: u8, mac: [u8; 6], network: &SharedNetwork) -> Result<OwnedFd>;
}

impl Networks for VmProcess {
    fn open(&self, slot: u8, mac: [u8; 6], network: &SharedNetwork) -> Result<OwnedFd> {
        let mac = netstack::Mac(mac).to_string();
        Ok(self.open_network(slot.into(), network.kind, &network.name, &mac, network.policy)?)
    }
}

/// Which card the guest finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    E1000(e1000::Model),
    Pcnet(pcnet::Model),
    Virtio,
}

/// A card's boot ROM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootRom {
    /// The image in package `ipxe-qemu`.
    pub image: &'static str,
    pub vendor: u16,
    pub device: u16,
}

impl Model {
    /// The boot ROM; the ISA card has none.
    pub fn boot_rom(self) -> Option<BootRom> {
        let (image, vendor, device) = match self {
            Self::E1000(model) => ("pxe-e1000.rom", e1000::VENDOR, model.device_id()),
            Self::Pcnet(pcnet::Model::Am79C960) => return None,
            Self::Pcnet(_) => ("pxe-pcnet.rom", pcnet::VENDOR, pcnet::DEVICE),
            Self::Virtio => ("pxe-virtio.rom", virtio::VENDOR, virtio::DEVICE),
        };
        Some(BootRom { image, vendor, device })
    }
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// Counts from 0.
    pub slot: u8,
    pub model: Model,
    pub mac: [u8; 6],
    pub cable: bool,
    pub attachment: Attachment,
    pub wire: WireConfig,
    /// 1 to 4 from highest to lowest; 0 for lowest.
    pub boot_priority: u32,
}

impl NicConfig {
    /// The card `nic` of the machine `m` as the settings have it; `None` for one that is not available yet. `folder` is the
    /// machine's, for relative paths. `notes` gets what is left out.
    pub fn from_settings(
        m: &MachineSettings,
        nic: &NetworkAdapter,
        folder: &Path,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>, String> {
        let number = nic.slot + 1;
        let mut note = |text: String| notes.push(format!("network adapter {number}: {text}"));
        let model = match nic.adapter_type {
            w::NetworkAdapterType::I82540EM => Model::E1000(e1000::Model::I82540Em),
            w::NetworkAdapterType::I82543GC => Model::E1000(e1000::Model::I82543Gc),
            w::NetworkAdapterType::I82545EM => Model::E1000(e1000::Model::I82545Em),
            w::NetworkAdapterType::Am79C970A => Model::Pcnet(pcnet::Model::Am79C970A),
            w::NetworkAdapterType::Am79C973 => Model::Pcnet(pcnet::Model::Am79C973),
            w::NetworkAdapterType::Am79C960 => Model::Pcnet(pcnet::Model::Am79C960),
            w::NetworkAdapterType::Virtio => Model::Virtio,
            other => {
                note(format!("the card {} is not available yet: the guest finds none", other.as_str()));
                return Ok(None);
            }
        };
        let attachment = match nic.attachment {
            w::NetworkAttachment::Null => Attachment::Null,
            w::NetworkAttachment::Nat => {
                let mut config =
                    u8::try_from(nic.slot).map(NatConfig::for_slot).unwrap_or(NatConfig::for_slot(0));
                if !nic.nat.network.is_empty() {
                    config = config
                        .with_network(&nic.nat.network)
                        .map_err(|e| format!("network adapter {number}: {e}"))?;
                }
                config.mtu = u16::try_from(nic.nat.mtu).unwrap_or(0);
                config.host_loopback = nic.nat.localhost_reachable;
                let mut rules = Vec::new();
                for rule in &nic.nat.rules {
                    match forwarding(rule, &nic.nat.bind_ip) {
                        Some(rule) => rules.push(rule),
                        None => note(format!(
                            "the port-forwarding rule \"{}\" has no IPv4 addresses and is left out",
                            rule.name
                        )),
                    }
                }
                config.large = true;
                config.tftp =
                    tftp(&m.name, &nic.nat).map_err(|e| format!("network adapter {number}: {e}"))?;
                Attachment::Nat { config, rules }
            }
            w::NetworkAttachment::Internal => {
                let name = if nic.internal_network.is_empty() { "intnet" } else { &nic.internal_network };
                shared(nic, NetworkAttachmentType::Internal, name)
            }
            w::NetworkAttachment::HostOnly => {
                shared(nic, NetworkAttachmentType::HostOnly, &nic.host_only_interface)
            }
            w::NetworkAttachment::Bridged => {
                shared(nic, NetworkAttachmentType::Bridged, &nic.bridged_interface)
            }
            w::NetworkAttachment::NatNetwork => {
                shared(nic, NetworkAttachmentType::NATNetwork, &nic.nat_network)
            }
            w::NetworkAttachment::HostOnlyNetwork => {
                shared(nic, NetworkAttachmentType::HostOnlyNetwork, &nic.host_only_network)
            }
            w::NetworkAttachment::Generic => {
                let generic = Generic::new(&nic.generic_driver, &nic.generic_properties);
                Attachment::Generic(generic.map_err(|e| format!("network adapter {number}: {e}"))?)
            }
            w::NetworkAttachment::Cloud => {
                note("the attachment Cloud is not available: the guest finds no card".into());
                return Ok(None);
            }
        };
        let groups = &m.hardware.bandwidth_groups;
        let group = groups
            .iter()
            .find(|g| g.name == nic.bandwidth_group && g.group_type == w::BandwidthGroupType::Network);
        if group.is_none() && !nic.bandwidth_group.is_empty() {
            note(format!("there is no network bandwidth group called \"{}\"", nic.bandwidth_group));
        }
        let wire = WireConfig {
            trace: nic.trace_enabled.then(|| trace_file(nic, folder)),
            group: group.map(|g| (g.name.clone(), g.max_bytes_per_sec)),
            promiscuous: nic.promisc_policy != w::PromiscPolicy::Deny,
        };
        let slot = u8::try_from(nic.slot).map_err(|_| format!("network adapter {number} does not exist"))?;
        let mac = mac(&nic.mac_address).unwrap_or_else(|| {
            note("it has no MAC address in the settings".into());
            [0x08, 0x00, 0x27, 0, 0, slot]
        });
        let cable = nic.cable_connected && attachment != Attachment::Null;
        let boot_priority = nic.boot_priority;
        Ok(Some(Self { slot, model, mac, cable, attachment, wire, boot_priority }))
    }

    /// Where VirtualBox has the card on the PCI bus of a PIIX3 machine; `None` for a ninth card.
    pub fn place(&self) -> Option<DevFn> {
        const DEVICES: [u8; 8] = [3, 8, 9, 10, 16, 17, 18, 19];
        DEVICES.get(usize::from(self.slot)).map(|device| DevFn::new(*device, 0))
    }
}

/// What NAT's TFTP server offers: by default, as with VirtualBox, the file named after the machine in the folder `TFTP` of the
/// configuration directory.
fn tftp(machine: &str, nat: &settings::Nat) -> Result<Tftp, String> {
    let config = settings::paths::Environment::of_process().config_directory().unwrap_or_default();
    let prefix = if nat.tftp_prefix.is_empty() { "TFTP" } else { &nat.tftp_prefix };
    let boot_file = match nat.tftp_boot_file.as_str() {
        "" => format!("{machine}.pxe"),
        file => file.to_owned(),
    };
    let next_server = match nat.tftp_next_server.as_str() {
        "" => None,
        text => {
            let address =
                text.parse().map_err(|_| format!("the TFTP server \"{text}\" is no IPv4 address"))?;
            Some(address)
        }
    };
    Ok(Tftp { folder: config.join(prefix), boot_file, next_server })
}

/// Where the card's traffic is recorded.
fn trace_file(nic: &NetworkAdapter, folder: &Path) -> PathBuf {
    match nic.trace_file.as_str() {
        "" => folder.join("Logs").join(format!("VBox-{:x}-nic{}.pcap", std::process::id(), nic.slot + 1)),
        file => folder.join(file),
    }
}

fn shared(nic: &NetworkAdapter, kind: NetworkAttachmentType, name: &str) -> Attachment {
    let policy = match nic.promisc_policy {
        w::PromiscPolicy::Deny => NetworkAdapterPromiscModePolicy::Deny,
        w::PromiscPolicy::AllowNetwork => NetworkAdapterPromiscModePolicy::AllowNetwork,
        w::PromiscPolicy::AllowAll => NetworkAdapterPromiscModePolicy::AllowAll,
    };
    Attachment::Shared(SharedNetwork { kind, name: name.to_owned(), policy })
}

/// Twelve hexadecimal digits.
fn mac(text: &str) -> Option<[u8; 6]> {
    let value = u64::from_str_radix(text, 16).ok().filter(|_| text.len() == 12)?;
    value.to_be_bytes()[2..].try_into().ok()
}

fn forwarding(rule: &settings::NatRule, bind_ip: &str) -> Option<Rule> {
    let host = if rule.host_ip.is_empty() { bind_ip } else { &rule.host_ip };
    let v4 = |text: &str| text.parse::<Ipv4Addr>().ok();
    let host = if host.is_empty() { Ipv4Addr::UNSPECIFIED } else { v4(host)? };
    let guest = if rule.guest_ip.is_empty() { None } else { Some(v4(&rule.guest_ip)?.into()) };
    let protocol = match rule.protocol {
        w::NatProtocol::Tcp => Protocol::Tcp,
        w::NatProtocol::Udp => Protocol::Udp,
    };
    Some(Rule {
        name: rule.name.clone(),
        protocol,
        host: host.into(),
        host_port: rule.host_port,
        guest,
        guest_port: rule.guest_port,
    })
}

/// The cards of a machine, in the order in which the BIOS is to boot from them.
pub fn boot_order(nics: &[NicConfig]) -> Vec<&NicConfig> {
    let mut nics: Vec<_> = nics.iter().filter(|nic| nic.model.boot_rom().is_some()).collect();
    nics.sort_by_key(|nic| if nic.boot_priority == 0 { u32::MAX } else { nic.boot_priority });
    nics
}

struct GuestEnd(Arc<dyn NetPort>);

impl Guest for GuestEnd {
    fn receive(&self, frame: &[u8]) -> bool {
        self.0.receive(frame)
    }

    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        self.0.receive_packet(packet, mss)
    }

    fn ready(&self) {
        self.0.ready();
    }
}

struct NatDriver(Arc<Nat>);

impl NetDriver for NatDriver {
    fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        self.0.send(frame)
    }

    fn resume(&self) {
        self.0.resume();
    }

    fn takes_packets(&self) -> bool {
        true
    }
}

struct LinkDriver(Arc<Link>);

impl NetDriver for LinkDriver {
    fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        self.0.send(frame)
    }

    fn resume(&self) {
        self.0.resume();
    }
}

/// A card's network while it runs. Ends when dropped.
#[derive(Clone)]
enum Network {
    Nat(Arc<Nat>),
    Link { _link: Arc<Link>, _plug: Arc<Option<Plug>> },
}

/// A card of one of the models.
#[derive(Clone)]
enum Card {
    E1000(Arc<Mutex<E1000>>),
    Pcnet(Arc<Mutex<Pcnet>>),
    Virtio(Arc<Mutex<virtio::Card>>),
}

impl Card {
    fn port(&self) -> Arc<dyn NetPort> {
        match self {
            Self::E1000(card) => E1000::port(card),
            Self::Pcnet(card) => Pcnet::port(card),
            Self::Virtio(card) => VirtioNet::port(card),
        }
    }

    fn connect(&self, driver: Option<Arc<dyn NetDriver>>) -> Option<Arc<dyn NetDriver>> {
        match self {
            Self::E1000(card) => card.lock().connect(driver),
            Self::Pcnet(card) => card.lock().connect(driver),
            Self::Virtio(card) => VirtioNet::connect(card, driver),
        }
    }
}

/// What cards are wired to.
pub struct Wiring<'a> {
    pub pgm: &'a Arc<Pgm>,
    pub iom: &'a Iom,
    pub irqs: &'a dev_pc::piix3::Wiring,
    pub timers: &'a Arc<tm::TimerQueue>,
    pub limits: &'a Arc<Limits>,
    pub pci: &'a PciBus,
}

/// Builds all cards of a machine. The second list has them as devices.
pub fn build(configs: &[NicConfig], wiring: &Wiring<'_>) -> Result<(Vec<Nic>, Vec<Arc<Mutex<dyn Device>>>)> {
    let mut isa = ISA_PLACES.into_iter();
    let mut built = (Vec::new(), Vec::new());
    for config in configs {
        let number = config.slot + 1;
        let place = match (config.model, config.place()) {
            (Model::Pcnet(pcnet::Model::Am79C960), _) => match isa.next() {
                Some((base, irq)) => Place::Isa(Port(base), irq),
                None => bail!("network adapter {number}: there is no place for more than four ISA cards"),
            },
            (_, Some(place)) => Place::Pci(place),
            (_, None) => bail!("network adapter {number} does not exist: there are eight"),
        };
        let (nic, device) = Nic::build(config, place, wiring)?;
        built.0.push(nic);
        built.1.push(device);
    }
    Ok(built)
}

/// Where a card is plugged in.
#[derive(Clone, Copy)]
enum Place {
    Pci(DevFn),
    /// Base port and interrupt.
    Isa(Port, u8),
}

/// A card in a running machine.
pub struct Nic {
    pub slot: u8,
    mac: [u8; 6],
    card: Card,
    wire: Arc<Wire>,
    network: Mutex<Option<Network>>,
    /// What the card's network is now.
    attachment: Mutex<Attachment>,
    networks: Mutex<Option<Weak<dyn Networks>>>,
}

/// Adds rules to a NAT. A port that cannot be forwarded does not stop the machine: the log names it.
fn add_rules<'a>(nat: &Nat, number: u8, rules: impl IntoIterator<Item = &'a Rule>) {
    for rule in rules {
        if let Err(error) = nat.add_rule(rule.clone()) {
            tracing::warn!(
                target: "nat",
                "network adapter {number}: {:#}",
                anyhow::Error::new(error).context("a port is not forwarded")
            );
        }
    }
}

impl Nic {
    /// Builds the card, plugs it into the machine at `place`, and starts its network.
    fn build(
        config: &NicConfig,
        place: Place,
        wiring: &Wiring<'_>,
    ) -> Result<(Self, Arc<Mutex<dyn Device>>)> {
        let Wiring { pgm, iom, irqs, timers, limits, pci } = *wiring;
        let pgm = pgm.clone();
        let irq = match place {
            Place::Pci(place) => irqs.intx(place, 1),
            Place::Isa(_, irq) => irqs.isa(irq),
        };
        let (mac, cable) = (config.mac, config.cable);
        let (card, device): (_, Arc<Mutex<dyn Device>>) = match (config.model, place) {
            (Model::E1000(model), Place::Pci(place)) => {
                let card = E1000::new(model, mac, cable, e1000::Wiring { pgm, irq }, timers);
                E1000::register(&card, pci, place);
                (Card::E1000(card.clone()), card)
            }
            (Model::Pcnet(model), place) => {
                let card = Pcnet::new(model, mac, cable, pcnet::Wiring { pgm, irq }, timers);
                match place {
                    Place::Pci(place) => Pcnet::register(&card, pci, place),
                    Place::Isa(base, _) => Pcnet::register_isa(&card, iom, base),
                }
                (Card::Pcnet(card.clone()), card)
            }
            (Model::Virtio, Place::Pci(place)) => {
                let card = VirtioNet::create(mac, cable, dev_virtio_core::Wiring { pgm, irq });
                virtio::Card::register(&card, pci, place);
                (Card::Virtio(card.clone()), card)
            }
            (model, Place::Isa(..)) => bail!("network adapter {}: {model:?} is no ISA card", config.slot + 1),
        };
        let wire = Wire::new(card.port(), mac, &config.wire, limits)
            .with_context(|| format!("network adapter {}", config.slot + 1))?;
        let nic = Self {
            slot: config.slot,
            mac,
            card,
            wire,
            network: Mutex::new(None),
            attachment: Mutex::new(Attachment::Null),
            networks: Mutex::new(None),
        };
        match &config.attachment {
            // Joined when it is known where such networks come from.
            Attachment::Shared(_) => *nic.attachment.lock() = config.attachment.clone(),
            attachment => nic.attach(attachment)?,
        }
        Ok((nic, device))
    }

    /// Tells where shared networks come from, and joins the card's.
    pub fn connect_networks(&self, networks: &Arc<dyn Networks>) -> Result<()> {
        *self.networks.lock() = Some(Arc::downgrade(networks));
        let attachment = self.attachment.lock().clone();
        match attachment {
            Attachment::Shared(_) => self.attach(&attachment),
            _ => Ok(()),
        }
    }

    /// Joins the card to what is at the other end of `socket`.
    fn link(&self, socket: OwnedFd, reconnect: Option<Reconnect>, plug: Option<Plug>) -> Result<()> {
        let link = Arc::new(Link::start(socket, Arc::new(GuestEnd(self.wire.clone())), reconnect)?);
        let driver: Arc<dyn NetDriver> = Arc::new(LinkDriver(link.clone()));
        self.card.connect(Some(self.wire.driver(driver)));
        *self.network.lock() = Some(Network::Link { _link: link, _plug: Arc::new(plug) });
        Ok(())
    }

    fn join(&self, network: &SharedNetwork) -> Result<()> {
        let (slot, mac, wanted) = (self.slot, self.mac, network.clone());
        let networks = self.networks.lock().clone().context("there is no service to find networks by")?;
        let open = move || networks.upgrade().context("the machine ends")?.open(slot, mac, &wanted);
        let socket = open()?;
        let again = move || match open() {
            Ok(socket) => Some(socket),
            Err(error) => {
                tracing::debug!(target: "net", "network adapter {}: {error:#}", slot + 1);
                None
            }
        };
        self.link(socket, Some(Box::new(again)), None)
    }

    /// Joins the card to a network, in place of the one it had.
    fn attach(&self, attachment: &Attachment) -> Result<()> {
        self.close();
        *self.attachment.lock() = Attachment::Null;
        let number = self.slot + 1;
        match attachment {
            Attachment::Null => {}
            Attachment::Nat { config, rules } => {
                let nat = Nat::start(config, Arc::new(GuestEnd(self.wire.clone())))
                    .with_context(|| format!("network adapter {number}: NAT cannot start"))?;
                add_rules(&nat, number, rules);
                let nat = Arc::new(nat);
                let driver: Arc<dyn NetDriver> = Arc::new(NatDriver(nat.clone()));
                self.card.connect(Some(self.wire.driver(driver)));
                *self.network.lock() = Some(Network::Nat(nat));
            }
            Attachment::Shared(network) => {
                self.join(network).with_context(|| format!("network adapter {number}"))?;
            }
            Attachment::Generic(generic) => {
                let (socket, plug) =
                    generic.connect().with_context(|| format!("network adapter {number}"))?;
                self.link(socket, None, plug)?;
            }
        }
        *self.attachment.lock() = attachment.clone();
        Ok(())
    }

    /// Takes over what of `config` can change while the machine runs: the network, its rules, the cable, and what the wire does.
    pub fn change(&self, config: &NicConfig) -> Result<()> {
        self.wire.change(&config.wire)?;
        let before = self.attachment.lock().clone();
        match (&before, &config.attachment) {
            (Attachment::Nat { config: old, rules: had }, Attachment::Nat { config: new, rules })
                if old == new =>
            {
                let network = self.network.lock().clone();
                if let Some(Network::Nat(nat)) = network {
                    for rule in had.iter().filter(|r| !rules.contains(r)) {
                        // One that never came to be is not there.
                        let _ = nat.remove_rule(&rule.name);
                    }
                    add_rules(&nat, self.slot + 1, rules.iter().filter(|r| !had.contains(r)));
                }
                *self.attachment.lock() = config.attachment.clone();
            }
            (old, new) if old == new => {}
            _ => {
                // The guest learns of another network as of another cable.
                self.set_link(false);
                self.attach(&config.attachment)?;
            }
        }
        self.set_link(config.cable);
        Ok(())
    }

    /// Plugs the cable in or pulls it out.
    pub fn set_link(&self, up: bool) {
        self.wire.set_link(up);
    }

    /// Ends the card's network.
    pub fn close(&self) {
        let driver = self.card.connect(None);
        drop(driver);
        let network = self.network.lock().take();
        drop(network);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter() -> NetworkAdapter {
        NetworkAdapter {
            adapter_type: w::NetworkAdapterType::I82540EM,
            attachment: w::NetworkAttachment::Nat,
            mac_address: "080027A1B2C3".into(),
            enabled: true,
            ..NetworkAdapter::new(1)
        }
    }

    fn config(nic: &NetworkAdapter, notes: &mut Vec<String>) -> Result<Option<NicConfig>, String> {
        let mut m = MachineSettings { name: "box".into(), ..MachineSettings::default() };
        m.hardware.bandwidth_groups = vec![settings::BandwidthGroup {
            name: "slow".into(),
            group_type: w::BandwidthGroupType::Network,
            max_bytes_per_sec: 1000,
        }];
        NicConfig::from_settings(&m, nic, Path::new("/vm"), notes)
    }

    #[test]
    fn a_nat_card_has_the_second_network_and_the_second_place() {
        let mut notes = Vec::new();
        let nic = config(&adapter(), &mut notes).unwrap().unwrap();
        assert_eq!(nic.mac, [0x08, 0x00, 0x27, 0xa1, 0xb2, 0xc3]);
        assert_eq!(nic.place(), Some(DevFn::new(8, 0)));
        let Attachment::Nat { config, rules } = nic.attachment else { panic!("not NAT") };
        assert_eq!((config.guest(), rules.len()), (Ipv4Addr::new(10, 0, 3, 15), 0));
        assert!(notes.is_empty());
    }

    #[test]
    fn other_cards_and_attachments_are_noted() {
        let mut notes = Vec::new();
        let old = NetworkAdapter { adapter_type: w::NetworkAdapterType::Ne2000, ..adapter() };
        assert_eq!(config(&old, &mut notes), Ok(None));
        let cloud = NetworkAdapter { attachment: w::NetworkAttachment::Cloud, ..adapter() };
        assert_eq!(config(&cloud, &mut notes), Ok(None));
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn shared_networks_are_named_by_their_attachment() {
        let internal = NetworkAdapter {
            attachment: w::NetworkAttachment::Internal,
            promisc_policy: w::PromiscPolicy::AllowNetwork,
            ..adapter()
        };
        let nic = config(&internal, &mut Vec::new()).unwrap().unwrap();
        let expected = SharedNetwork {
            kind: NetworkAttachmentType::Internal,
            name: "intnet".into(),
            policy: NetworkAdapterPromiscModePolicy::AllowNetwork,
        };
        assert_eq!(nic.attachment, Attachment::Shared(expected));
        let generic = NetworkAdapter {
            attachment: w::NetworkAttachment::Generic,
            generic_driver: "UDPTunnel".into(),
            ..adapter()
        };
        let error = config(&generic, &mut Vec::new()).unwrap_err();
        assert!(error.contains("\"dest\""), "{error}");
    }

    #[test]
    fn a_card_that_is_not_attached_has_no_cable() {
        let nic = NetworkAdapter { attachment: w::NetworkAttachment::Null, ..adapter() };
        assert!(!config(&nic, &mut Vec::new()).unwrap().unwrap().cable);
    }

    #[test]
    fn an_impossible_network_is_refused() {
        let mut nic = adapter();
        nic.nat.network = "10.0.2.0/31".into();
        assert!(config(&nic, &mut Vec::new()).is_err());
    }

    #[test]
    fn the_boot_file_is_named_after_the_machine_unless_the_user_says_otherwise() {
        let tftp = |nic: &NetworkAdapter| match config(nic, &mut Vec::new()).unwrap().unwrap().attachment {
            Attachment::Nat { config, .. } => config.tftp,
            _ => panic!("not NAT"),
        };
        let mut nic = adapter();
        let found = tftp(&nic);
        assert!(found.folder.ends_with("TFTP"));
        assert_eq!((found.boot_file.as_str(), found.next_server), ("box.pxe", None));
        nic.nat.tftp_prefix = "/srv/tftp".into();
        nic.nat.tftp_boot_file = "pxelinux.0".into();
        nic.nat.tftp_next_server = "10.0.2.7".into();
        let expected = Tftp {
            folder: "/srv/tftp".into(),
            boot_file: "pxelinux.0".into(),
            next_server: Some(Ipv4Addr::new(10, 0, 2, 7)),
        };
        assert_eq!(tftp(&nic), expected);
        nic.nat.tftp_next_server = "somewhere".into();
        assert!(config(&nic, &mut Vec::new()).is_err());
    }

    #[test]
    fn the_wire_records_limits_and_filters_as_the_settings_say() {
        let mut nic = NetworkAdapter { bandwidth_group: "slow".into(), ..adapter() };
        (nic.trace_enabled, nic.trace_file) = (true, "t.pcap".into());
        let wire = config(&nic, &mut Vec::new()).unwrap().unwrap().wire;
        assert_eq!(wire.trace, Some("/vm/t.pcap".into()));
        assert_eq!((wire.group, wire.promiscuous), (Some(("slow".into(), 1000)), false));
        nic.bandwidth_group = "gone".into();
        let mut notes = Vec::new();
        config(&nic, &mut notes).unwrap();
        assert_eq!(notes.len(), 1);
    }

    #[test]
    fn cards_boot_by_priority_and_isa_cards_do_not() {
        let card = |slot: u32, priority, adapter_type| {
            let nic = NetworkAdapter { slot, boot_priority: priority, adapter_type, ..adapter() };
            config(&nic, &mut Vec::new()).unwrap().unwrap()
        };
        use w::NetworkAdapterType as T;
        let nics = [
            card(0, 0, T::I82540EM),
            card(1, 2, T::Virtio),
            card(2, 1, T::Am79C970A),
            card(3, 1, T::Am79C960),
        ];
        let order: Vec<u8> = boot_order(&nics).iter().map(|nic| nic.slot).collect();
        assert_eq!(order, [2, 1, 0]);
    }
}
