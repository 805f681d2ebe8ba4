//! Network cards: which of the settings' become real, and what joins them (`pdm`) to their networks (`netstack`).

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::{Context, Result};
use dev_net::e1000::{self, E1000};
use dev_net::virtio::{self, VirtioNet};
use netstack::{Guest, Nat, NatConfig, Protocol, Rule};
use parking_lot::Mutex;
use pdm::Device;
use pdm::connector::{NetDriver, NetPort};
use pdm::irq::IrqLine;
use pdm::pci::{DevFn, PciBus};
use pgm::Pgm;
use settings::NetworkAdapter;
use settings::words as w;

/// A card's network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// None: no cable is plugged in.
    Null,
    Nat {
        config: NatConfig,
        rules: Vec<Rule>,
    },
}

/// Which card the guest finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    E1000(e1000::Model),
    Virtio,
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
}

impl NicConfig {
    /// The card as the settings have it; `None` for one that is not available yet. `notes` gets what is left out.
    pub fn from_settings(nic: &NetworkAdapter, notes: &mut Vec<String>) -> Result<Option<Self>, String> {
        let number = nic.slot + 1;
        let mut note = |text: String| notes.push(format!("network adapter {number}: {text}"));
        let model = match nic.adapter_type {
            w::NetworkAdapterType::I82540EM => Model::E1000(e1000::Model::I82540Em),
            w::NetworkAdapterType::I82543GC => Model::E1000(e1000::Model::I82543Gc),
            w::NetworkAdapterType::I82545EM => Model::E1000(e1000::Model::I82545Em),
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
                if !nic.nat.tftp_prefix.is_empty() || !nic.nat.tftp_boot_file.is_empty() {
                    note("TFTP is not available yet".into());
                }
                Attachment::Nat { config, rules }
            }
            other => {
                note(format!(
                    "the attachment {} is not available yet: the guest finds no card",
                    other.as_str()
                ));
                return Ok(None);
            }
        };
        if nic.trace_enabled {
            note("its traffic cannot be recorded yet".into());
        }
        let slot = u8::try_from(nic.slot).map_err(|_| format!("network adapter {number} does not exist"))?;
        let mac = mac(&nic.mac_address).unwrap_or_else(|| {
            note("it has no MAC address in the settings".into());
            [0x08, 0x00, 0x27, 0, 0, slot]
        });
        let cable = nic.cable_connected && attachment != Attachment::Null;
        Ok(Some(Self { slot, model, mac, cable, attachment }))
    }

    /// Where VirtualBox has the card on the PCI bus of a PIIX3 machine; `None` for a ninth card.
    pub fn place(&self) -> Option<DevFn> {
        const DEVICES: [u8; 8] = [3, 8, 9, 10, 16, 17, 18, 19];
        DEVICES.get(usize::from(self.slot)).map(|device| DevFn::new(*device, 0))
    }
}

/// Twelve hexadecimal digits.
fn mac(text: &str) -> Option<[u8; 6]> {
    let value = u64::from_str_radix(text, 16).ok().filter(|_| text.len() == 12)?;
    value.to_be_bytes()[2..].try_into().ok()
}

fn forwarding(rule: &settings::NatRule, bind_ip: &str) -> Option<Rule> {
    let host = if rule.host_ip.is_empty() { bind_ip } else { &rule.host_ip };
    let host = if host.is_empty() { Ipv4Addr::UNSPECIFIED } else { host.parse().ok()? };
    let guest = if rule.guest_ip.is_empty() { None } else { Some(rule.guest_ip.parse().ok()?) };
    let protocol = match rule.protocol {
        w::NatProtocol::Tcp => Protocol::Tcp,
        w::NatProtocol::Udp => Protocol::Udp,
    };
    Some(Rule {
        name: rule.name.clone(),
        protocol,
        host,
        host_port: rule.host_port,
        guest,
        guest_port: rule.guest_port,
    })
}

struct GuestEnd(Arc<dyn NetPort>);

impl Guest for GuestEnd {
    fn receive(&self, frame: &[u8]) -> bool {
        self.0.receive(frame)
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
}

/// A card of one of the models.
#[derive(Clone)]
enum Card {
    E1000(Arc<Mutex<E1000>>),
    Virtio(Arc<Mutex<virtio::Card>>),
}

impl Card {
    fn port(&self) -> Arc<dyn NetPort> {
        match self {
            Self::E1000(card) => E1000::port(card),
            Self::Virtio(card) => VirtioNet::port(card),
        }
    }

    fn connect(&self, driver: Option<Arc<dyn NetDriver>>) -> Option<Arc<dyn NetDriver>> {
        match self {
            Self::E1000(card) => card.lock().connect(driver),
            Self::Virtio(card) => VirtioNet::connect(card, driver),
        }
    }
}

/// What cards are wired to.
pub struct Wiring<'a> {
    pub pgm: Arc<Pgm>,
    pub irq: IrqLine,
    pub timers: &'a Arc<tm::TimerQueue>,
    pub pci: &'a PciBus,
}

/// A card in a running machine.
pub struct Nic {
    pub slot: u8,
    card: Card,
    nat: Mutex<Option<Arc<Nat>>>,
    /// What the card's network is now.
    attachment: Mutex<Attachment>,
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
    pub fn build(
        config: &NicConfig,
        place: DevFn,
        wiring: Wiring<'_>,
    ) -> Result<(Self, Arc<Mutex<dyn Device>>)> {
        let Wiring { pgm, irq, timers, pci } = wiring;
        let (card, device): (_, Arc<Mutex<dyn Device>>) = match config.model {
            Model::E1000(model) => {
                let wiring = e1000::Wiring { pgm, irq };
                let card = E1000::new(model, config.mac, config.cable, wiring, timers);
                E1000::register(&card, pci, place);
                (Card::E1000(card.clone()), card)
            }
            Model::Virtio => {
                let card = VirtioNet::create(config.mac, config.cable, dev_virtio_core::Wiring { pgm, irq });
                virtio::Card::register(&card, pci, place);
                (Card::Virtio(card.clone()), card)
            }
        };
        let nic =
            Self { slot: config.slot, card, nat: Mutex::new(None), attachment: Mutex::new(Attachment::Null) };
        nic.attach(&config.attachment)?;
        Ok((nic, device))
    }

    /// Joins the card to a network, in place of the one it had.
    fn attach(&self, attachment: &Attachment) -> Result<()> {
        self.close();
        *self.attachment.lock() = Attachment::Null;
        let number = self.slot + 1;
        if let Attachment::Nat { config, rules } = attachment {
            let nat = Nat::start(config, Arc::new(GuestEnd(self.card.port())))
                .with_context(|| format!("network adapter {number}: NAT cannot start"))?;
            add_rules(&nat, number, rules);
            let nat = Arc::new(nat);
            let driver: Arc<dyn NetDriver> = Arc::new(NatDriver(nat.clone()));
            self.card.connect(Some(driver));
            *self.nat.lock() = Some(nat);
        }
        *self.attachment.lock() = attachment.clone();
        Ok(())
    }

    /// Takes over what of `config` can change while the machine runs: the network, its rules, and the cable.
    pub fn change(&self, config: &NicConfig) -> Result<()> {
        let before = self.attachment.lock().clone();
        match (&before, &config.attachment) {
            (Attachment::Nat { config: old, rules: had }, Attachment::Nat { config: new, rules })
                if old == new =>
            {
                let nat = self.nat.lock().clone();
                if let Some(nat) = nat {
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
        self.card.port().set_link(up);
    }

    /// Ends the card's network.
    pub fn close(&self) {
        let driver = self.card.connect(None);
        drop(driver);
        let nat = self.nat.lock().take();
        drop(nat);
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

    #[test]
    fn a_nat_card_has_the_second_network_and_the_second_place() {
        let mut notes = Vec::new();
        let nic = NicConfig::from_settings(&adapter(), &mut notes).unwrap().unwrap();
        assert_eq!(nic.mac, [0x08, 0x00, 0x27, 0xa1, 0xb2, 0xc3]);
        assert_eq!(nic.place(), Some(DevFn::new(8, 0)));
        let Attachment::Nat { config, rules } = nic.attachment else { panic!("not NAT") };
        assert_eq!((config.guest(), rules.len()), (Ipv4Addr::new(10, 0, 3, 15), 0));
        assert!(notes.is_empty());
    }

    #[test]
    fn other_cards_and_attachments_are_noted() {
        let mut notes = Vec::new();
        let pcnet = NetworkAdapter { adapter_type: w::NetworkAdapterType::Am79C973, ..adapter() };
        assert_eq!(NicConfig::from_settings(&pcnet, &mut notes), Ok(None));
        let bridged = NetworkAdapter { attachment: w::NetworkAttachment::Bridged, ..adapter() };
        assert_eq!(NicConfig::from_settings(&bridged, &mut notes), Ok(None));
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn a_card_that_is_not_attached_has_no_cable() {
        let nic = NetworkAdapter { attachment: w::NetworkAttachment::Null, ..adapter() };
        assert!(!NicConfig::from_settings(&nic, &mut Vec::new()).unwrap().unwrap().cable);
    }

    #[test]
    fn an_impossible_network_is_refused() {
        let mut nic = adapter();
        nic.nat.network = "10.0.2.0/31".into();
        assert!(NicConfig::from_settings(&nic, &mut Vec::new()).is_err());
    }
}
