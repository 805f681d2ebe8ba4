//! An Ethernet switch as VirtualBox's internal networks have it: which ports a frame goes to. No sockets, no clocks, no threads:
//! [`crate::process`] moves the frames.
//!
//! - A card's port gets what is sent to the card's own address and to groups. If its policy allows promiscuous mode it gets, besides,
//!   what is sent to others: of the network's own machines (`AllowNetwork`), or also of what comes in from the host (`AllowAll`). Whether
//!   the guest has switched its card to promiscuous mode is the card's affair: it drops what the guest does not want.
//! - Addresses behind a port that may be promiscuous (a bridge in a guest, nested machines) are learned from its frames, so that what is
//!   sent to them does not go to the host's network too.
//! - The trunk is the way to the host: it gets groups, its own addresses and those that no port is known to have.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::mac::Mac;

/// Addresses that are remembered behind one port; a guest that invents more loses its oldest.
const LEARNED_PER_PORT: usize = 256;
/// How long an address is remembered.
const LEARNED_TIME: Duration = Duration::from_secs(300);

/// Whether a machine's card may see others' frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    #[default]
    Deny,
    /// Those between machines of the network.
    AllowNetwork,
    /// All.
    AllowAll,
}

/// What is plugged into a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A machine's card.
    Card { mac: Mac, policy: Policy },
    /// A service of the network itself: what is sent to its address, and groups.
    Service { mac: Mac },
    /// The router of [`crate::nat`]: groups, and addresses of the ranges that libslirp makes its own from (52:55 and 52:56, and a part of an
    /// IP address).
    Router,
    /// The host's end, with any number of addresses behind it.
    Trunk,
}

/// A port's number. Numbers are not used again while the switch lives.
pub type PortId = u32;

struct Learned {
    port: PortId,
    seen: Instant,
}

/// The switch.
#[derive(Default)]
pub struct Switch {
    /// Few, and looked through for each frame.
    ports: Vec<(PortId, Role)>,
    learned: HashMap<Mac, Learned>,
    next: PortId,
}

impl Switch {
    pub fn add(&mut self, role: Role) -> PortId {
        let id = self.next;
        self.next += 1;
        self.ports.push((id, role));
        id
    }

    pub fn remove(&mut self, port: PortId) {
        self.ports.retain(|(id, _)| *id != port);
        self.learned.retain(|_, learned| learned.port != port);
    }

    /// Where `frame`, which came in at port `from`, goes: `to` is filled with the ports. `now` must not go backwards.
    pub fn route(&mut self, from: PortId, frame: &[u8], now: Instant, to: &mut Vec<PortId>) {
        to.clear();
        let (Some(destination), Some(source)) = (Mac::destination(frame), Mac::source(frame)) else { return };
        let Some((_, sender)) = self.ports.iter().find(|(id, _)| *id == from).copied() else { return };
        // A group is nobody's address.
        if source.is_group() {
            return;
        }
        self.learn(from, sender, source, now);
        let from_host = sender == Role::Trunk;
        if destination.is_group() {
            to.extend(self.ports.iter().map(|(id, _)| *id).filter(|id| *id != from));
            return;
        }
        let owner = self
            .ports
            .iter()
            .find(|(_, role)| matches!(role, Role::Card { mac, .. } | Role::Service { mac } if *mac == destination))
            .map(|(id, _)| *id);
        let router = || {
            let routed = matches!(destination.0, [0x52, 0x55 | 0x56, ..]);
            self.ports.iter().find(|(_, role)| routed && *role == Role::Router).map(|(id, _)| *id)
        };
        let learned = || {
            let known = self.learned.get(&destination)?;
            (now.saturating_duration_since(known.seen) < LEARNED_TIME).then_some(known.port)
        };
        let owner = owner.or_else(router).or_else(learned);
        for (id, role) in self.ports.iter().filter(|(id, _)| *id != from) {
            let wanted = Some(*id) == owner
                || match role {
                    Role::Card { policy: Policy::Deny, .. } | Role::Service { .. } | Role::Router => false,
                    Role::Card { policy: Policy::AllowNetwork, .. } => !from_host,
                    Role::Card { policy: Policy::AllowAll, .. } => true,
                    Role::Trunk => owner.is_none(),
                };
            if wanted {
                to.push(*id);
            }
        }
    }

    fn learn(&mut self, port: PortId, sender: Role, source: Mac, now: Instant) {
        let own = match sender {
            // What comes from the host is not learned: the trunk gets what nobody else has, and a host that repeats a machine's
            // address must not take its frames away.
            Role::Trunk | Role::Service { .. } | Role::Router | Role::Card { policy: Policy::Deny, .. } => {
                return;
            }
            Role::Card { mac, .. } => mac,
        };
        if source == own {
            return;
        }
        if let Some(known) = self.learned.get_mut(&source) {
            *known = Learned { port, seen: now };
            return;
        }
        let behind = || self.learned.iter().filter(|(_, learned)| learned.port == port);
        if behind().count() >= LEARNED_PER_PORT
            && let Some(oldest) = behind().min_by_key(|(_, learned)| learned.seen).map(|(mac, _)| *mac)
        {
            self.learned.remove(&oldest);
        }
        self.learned.insert(source, Learned { port, seen: now });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = Mac([8, 0, 0x27, 0, 0, 1]);
    const B: Mac = Mac([8, 0, 0x27, 0, 0, 2]);
    const NESTED: Mac = Mac([8, 0, 0x27, 0, 0, 0x99]);
    const HOST: Mac = Mac([2, 0, 0, 0, 0, 1]);

    fn frame(to: Mac, from: Mac) -> Vec<u8> {
        [&to.0[..], &from.0, &[8, 0], &[0; 46]].concat()
    }

    struct Net {
        switch: Switch,
        now: Instant,
    }

    impl Net {
        fn new() -> Self {
            Self { switch: Switch::default(), now: Instant::now() }
        }

        fn card(&mut self, mac: Mac, policy: Policy) -> PortId {
            self.switch.add(Role::Card { mac, policy })
        }

        fn send(&mut self, port: PortId, to: Mac, from: Mac) -> Vec<PortId> {
            let mut ports = Vec::new();
            self.switch.route(port, &frame(to, from), self.now, &mut ports);
            ports
        }
    }

    #[test]
    fn single_frames_go_to_their_owner_and_groups_to_all_but_the_sender() {
        let mut net = Net::new();
        let (a, b) = (net.card(A, Policy::Deny), net.card(B, Policy::Deny));
        let c = net.card(NESTED, Policy::Deny);
        assert_eq!(net.send(a, B, A), [b]);
        assert_eq!(net.send(a, Mac::BROADCAST, A), [b, c]);
        assert_eq!(net.send(a, Mac([1, 0, 0x5e, 0, 0, 1]), A), [b, c]);
        assert!(net.send(a, A, A).is_empty());
        assert!(net.send(a, HOST, A).is_empty(), "nobody has it and there is no trunk");
    }

    #[test]
    fn a_denied_card_sees_nothing_of_others_even_after_it_sent_from_another_address() {
        let mut net = Net::new();
        let (a, b) = (net.card(A, Policy::Deny), net.card(B, Policy::Deny));
        assert_eq!(net.send(b, Mac::BROADCAST, NESTED), [a]);
        assert!(net.send(a, NESTED, A).is_empty());
    }

    #[test]
    fn allowed_cards_see_others_frames_and_only_allow_all_sees_the_hosts() {
        let mut net = Net::new();
        let (a, b) = (net.card(A, Policy::Deny), net.card(B, Policy::Deny));
        let vms = net.card(Mac([8, 0, 0x27, 0, 0, 3]), Policy::AllowNetwork);
        let all = net.card(Mac([8, 0, 0x27, 0, 0, 4]), Policy::AllowAll);
        let trunk = net.switch.add(Role::Trunk);
        assert_eq!(net.send(a, B, A), [b, vms, all]);
        assert_eq!(net.send(trunk, B, HOST), [b, all]);
        assert_eq!(net.send(a, HOST, A), [vms, all, trunk]);
    }

    #[test]
    fn an_address_behind_an_allowed_card_is_learned_and_forgotten() {
        let mut net = Net::new();
        let a = net.card(A, Policy::Deny);
        let b = net.card(B, Policy::AllowAll);
        let trunk = net.switch.add(Role::Trunk);
        assert_eq!(net.send(a, NESTED, A), [b, trunk], "not known yet");
        assert_eq!(net.send(b, A, NESTED), [a]);
        assert_eq!(net.send(a, NESTED, A), [b], "known: the host need not see it");
        net.now += LEARNED_TIME;
        assert_eq!(net.send(a, NESTED, A), [b, trunk]);
        net.switch.remove(b);
        assert_eq!(net.send(a, NESTED, A), [trunk]);
    }

    #[test]
    fn a_machines_address_cannot_be_taken_by_learning_it_elsewhere() {
        let mut net = Net::new();
        let (a, b) = (net.card(A, Policy::Deny), net.card(B, Policy::AllowNetwork));
        let c = net.card(NESTED, Policy::Deny);
        net.send(b, Mac::BROADCAST, A);
        assert_eq!(net.send(c, A, NESTED), [a, b]);
    }

    #[test]
    fn a_router_has_every_address_of_its_ranges_but_a_cards() {
        let mut net = Net::new();
        let a = net.card(A, Policy::Deny);
        let router = net.switch.add(Role::Router);
        let trunk = net.switch.add(Role::Trunk);
        for to in [Mac([0x52, 0x55, 10, 0, 2, 1]), Mac([0x52, 0x56, 0, 0, 0, 2])] {
            assert_eq!(net.send(a, to, A), [router]);
        }
        assert_eq!(net.send(a, HOST, A), [trunk]);
        let own = Mac([0x52, 0x55, 10, 0, 2, 9]);
        let b = net.card(own, Policy::Deny);
        assert_eq!(net.send(a, own, A), [b]);
    }

    #[test]
    fn a_guest_that_invents_addresses_fills_only_its_own_share() {
        let mut net = Net::new();
        let a = net.card(A, Policy::AllowAll);
        for i in 0..10_000u32 {
            let [.., x, y] = i.to_be_bytes();
            net.send(a, B, Mac([2, 1, 0, 0, x, y]));
            net.now += Duration::from_millis(1);
        }
        assert_eq!(net.switch.learned.len(), LEARNED_PER_PORT);
    }

    #[test]
    fn frames_that_are_none_go_nowhere() {
        let mut net = Net::new();
        let a = net.card(A, Policy::Deny);
        net.card(B, Policy::AllowAll);
        let mut to = vec![7];
        net.switch.route(a, &[0xff; 13], net.now, &mut to);
        assert!(to.is_empty());
        assert!(net.send(a, B, Mac::BROADCAST).is_empty(), "a group as the source");
        assert!(net.send(99, B, A).is_empty(), "no such port");
    }
}
