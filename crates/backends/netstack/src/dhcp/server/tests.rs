use std::collections::BTreeMap;
use std::path::PathBuf;

use super::super::{Client, Group};
use super::*;

const SERVER: Ipv4Addr = Ipv4Addr::new(192, 168, 56, 100);
const LOWER: Ipv4Addr = Ipv4Addr::new(192, 168, 56, 101);
const NOW: i64 = 1_700_000_000;

fn config() -> Config {
    Config {
        address: SERVER,
        mask: Ipv4Addr::new(255, 255, 255, 0),
        lower: LOWER,
        upper: Ipv4Addr::new(192, 168, 56, 103),
        leases: PathBuf::new(),
        global: Scope {
            options: [(3, vec![192, 168, 56, 1]), (15, b"test".to_vec())].into(),
            ..Scope::default()
        },
        groups: Vec::new(),
        clients: Vec::new(),
    }
}

fn server(config: Config) -> Server {
    Server::new(config, Mac::derived("net"), Leases::default()).unwrap()
}

fn card(n: u8) -> Mac {
    Mac([8, 0, 0x27, 0, 0, n])
}

/// A client's message in its frame.
fn message(mac: Mac, kind: Kind, client: Ipv4Addr, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bootp = vec![0; 240];
    bootp[..3].copy_from_slice(&[1, 1, 6]);
    bootp[4..8].copy_from_slice(&[1, 2, 3, 4]);
    bootp[12..16].copy_from_slice(&client.octets());
    bootp[28..34].copy_from_slice(&mac.0);
    bootp[236..].copy_from_slice(&[99, 130, 83, 99]);
    bootp.extend([53, 1, kind as u8]);
    for (code, value) in options {
        bootp.extend([*code, value.len() as u8]);
        bootp.extend(*value);
    }
    bootp.push(255);
    let mut frame = packet::dhcp((mac, client), (Mac::BROADCAST, Ipv4Addr::BROADCAST), &bootp);
    // The helper sends from server to client: turn the ports.
    frame[34..38].copy_from_slice(&[0, 68, 0, 67]);
    frame
}

/// An answer: kind, address, options, destination.
#[derive(Debug)]
struct Got {
    kind: u8,
    yours: Ipv4Addr,
    options: BTreeMap<u8, Vec<u8>>,
    to: Mac,
}

fn parse(frame: &[u8]) -> Got {
    let bootp = &frame[42..];
    assert_eq!((frame[12..14] == [8, 0], bootp[0], &bootp[4..8]), (true, 2, &[1, 2, 3, 4][..]));
    let mut options = BTreeMap::new();
    let mut at = 240;
    while bootp[at] != 255 {
        let length = usize::from(bootp[at + 1]);
        options.insert(bootp[at], bootp[at + 2..at + 2 + length].to_vec());
        at += 2 + length;
    }
    let yours: [u8; 4] = bootp[16..20].try_into().unwrap();
    Got { kind: options[&53][0], yours: yours.into(), options, to: Mac::destination(frame).unwrap() }
}

fn ask(server: &mut Server, mac: Mac, kind: Kind, options: &[(u8, &[u8])], now: i64) -> Option<Got> {
    server.receive(&message(mac, kind, Ipv4Addr::UNSPECIFIED, options), now).map(|f| parse(&f))
}

/// Discover and request; the address.
fn obtain(server: &mut Server, mac: Mac, now: i64) -> Option<Ipv4Addr> {
    let offer = ask(server, mac, Kind::Discover, &[], now)?;
    let (address, from) = (offer.yours.octets(), SERVER.octets());
    let ack = ask(server, mac, Kind::Request, &[(50, &address), (54, &from)], now)?;
    (ack.kind == Kind::Ack as u8).then_some(ack.yours)
}

#[test]
fn clients_get_addresses_in_turn_and_keep_theirs() {
    let mut server = server(config());
    assert_eq!(obtain(&mut server, card(1), NOW), Some(LOWER));
    assert_eq!(obtain(&mut server, card(2), NOW), Some(Ipv4Addr::new(192, 168, 56, 102)));
    assert_eq!(obtain(&mut server, card(1), NOW + 10), Some(LOWER));
    assert!(server.take_changed());
    assert_eq!(server.leases().of_card(card(2)).unwrap().state, LeaseState::Acked);
}

#[test]
fn a_full_range_gives_nothing_until_a_lease_is_over() {
    let mut server = server(config());
    for n in 1..=3 {
        assert!(obtain(&mut server, card(n), NOW).is_some());
    }
    assert_eq!(obtain(&mut server, card(4), NOW), None);
    assert_eq!(obtain(&mut server, card(4), NOW + 601), Some(LOWER), "the oldest one");
    assert_eq!(obtain(&mut server, card(1), NOW + 601), Some(Ipv4Addr::new(192, 168, 56, 102)));
}

#[test]
fn released_addresses_are_given_to_others() {
    let mut server = server(config());
    for n in 1..=3 {
        obtain(&mut server, card(n), NOW);
    }
    server.receive(&message(card(2), Kind::Release, Ipv4Addr::new(192, 168, 56, 102), &[]), NOW);
    assert_eq!(obtain(&mut server, card(4), NOW), Some(Ipv4Addr::new(192, 168, 56, 102)));
}

#[test]
fn a_declined_address_is_left_alone_for_a_while() {
    let mut server = server(config());
    obtain(&mut server, card(1), NOW);
    ask(&mut server, card(1), Kind::Decline, &[(50, &LOWER.octets())], NOW);
    assert_eq!(obtain(&mut server, card(1), NOW), Some(Ipv4Addr::new(192, 168, 56, 102)));
    assert_eq!(obtain(&mut server, card(2), NOW + DECLINED), Some(LOWER));
}

#[test]
fn a_request_for_what_cannot_be_had_is_refused_to_all() {
    let mut server = server(config());
    obtain(&mut server, card(1), NOW);
    for address in [LOWER, Ipv4Addr::new(10, 0, 0, 1), SERVER] {
        let nak = ask(&mut server, card(2), Kind::Request, &[(50, &address.octets())], NOW).unwrap();
        assert_eq!(
            (nak.kind, nak.to, nak.yours),
            (Kind::Nak as u8, Mac::BROADCAST, Ipv4Addr::UNSPECIFIED),
            "{address}"
        );
    }
    // Another server's client.
    assert!(
        ask(&mut server, card(2), Kind::Request, &[(50, &LOWER.octets()), (54, &[1, 1, 1, 1])], NOW)
            .is_none()
    );
}

#[test]
fn a_fixed_address_is_its_clients_even_outside_the_range() {
    let fixed = Ipv4Addr::new(192, 168, 56, 7);
    let clients = vec![
        Client { mac: card(9), fixed: Some(fixed), scope: Scope::default() },
        Client { mac: card(8), fixed: Some(LOWER), scope: Scope::default() },
    ];
    let mut server = server(Config { clients, ..config() });
    assert_eq!(
        obtain(&mut server, card(1), NOW),
        Some(Ipv4Addr::new(192, 168, 56, 102)),
        "the first is reserved"
    );
    assert_eq!(obtain(&mut server, card(9), NOW), Some(fixed));
    assert_eq!(obtain(&mut server, card(8), NOW), Some(LOWER));
    let nak = ask(&mut server, card(1), Kind::Request, &[(50, &fixed.octets())], NOW).unwrap();
    assert_eq!(nak.kind, Kind::Nak as u8);
}

#[test]
fn options_come_from_the_closest_level_and_only_when_asked_for_or_forced() {
    let mut config = config();
    config.global.options.insert(6, vec![1, 1, 1, 1]);
    config.groups.push(Group {
        name: "g".into(),
        conditions: vec![
            Condition { inclusive: true, kind: ConditionKind::MacWildcard, value: "08:00:27:*".into() },
            Condition { inclusive: false, kind: ConditionKind::Mac, value: "080027000002".into() },
        ],
        scope: Scope { options: [(6, vec![2, 2, 2, 2])].into(), forced: vec![15], ..Scope::default() },
    });
    config.clients.push(Client {
        mac: card(3),
        fixed: None,
        scope: Scope { suppressed: vec![6], ..Scope::default() },
    });
    let mut server = server(config);
    let asked: &[(u8, &[u8])] = &[(55, &[1, 3, 6])];
    let one = ask(&mut server, card(1), Kind::Discover, asked, NOW).unwrap().options;
    assert_eq!(
        (&one[&6], &one[&15], &one[&1]),
        (&vec![2, 2, 2, 2], &b"test".to_vec(), &vec![255, 255, 255, 0])
    );
    let two = ask(&mut server, card(2), Kind::Discover, asked, NOW).unwrap().options;
    assert_eq!((&two[&6], two.get(&15)), (&vec![1, 1, 1, 1], None));
    let three = ask(&mut server, card(3), Kind::Discover, asked, NOW).unwrap().options;
    assert_eq!(three.get(&6), None);
    let all = ask(&mut server, card(2), Kind::Discover, &[], NOW).unwrap().options;
    assert_eq!((&all[&3], &all[&15]), (&vec![192, 168, 56, 1], &b"test".to_vec()));
}

#[test]
fn lease_times_stay_within_the_limits_of_the_closest_level() {
    let mut config = config();
    config.global = Scope { min_time: 60, default_time: 120, max_time: 3600, ..Scope::default() };
    config.clients.push(Client {
        mac: card(2),
        fixed: None,
        scope: Scope { default_time: 90, ..Scope::default() },
    });
    let mut server = server(config);
    let mut time = |mac, asked: Option<u32>| {
        let asked = asked.map(u32::to_be_bytes);
        let options: Vec<(u8, &[u8])> = asked.iter().map(|a| (51, &a[..])).collect();
        let offer = ask(&mut server, mac, Kind::Discover, &options, NOW).unwrap();
        u32::from_be_bytes(offer.options[&51].as_slice().try_into().unwrap())
    };
    assert_eq!(time(card(1), None), 120);
    assert_eq!(time(card(1), Some(5)), 60);
    assert_eq!(time(card(1), Some(u32::MAX)), 3600);
    assert_eq!(time(card(1), Some(600)), 600);
    assert_eq!(time(card(2), None), 90);
}

#[test]
fn the_client_identifier_counts_before_the_card() {
    let mut server = server(config());
    let one = ask(&mut server, card(1), Kind::Discover, &[(61, b"\x00one")], NOW).unwrap().yours;
    let two = ask(&mut server, card(1), Kind::Discover, &[(61, b"\x00two")], NOW).unwrap().yours;
    assert_ne!(one, two);
    assert_eq!(ask(&mut server, card(5), Kind::Discover, &[(61, b"\x00one")], NOW).unwrap().yours, one);
}

#[test]
fn the_server_answers_arp_and_pings() {
    let mut server = server(config());
    let mut arp = [&Mac::BROADCAST.0[..], &card(1).0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &card(1).0].concat();
    arp.extend([192, 168, 56, 101, 0, 0, 0, 0, 0, 0]);
    arp.extend(SERVER.octets());
    let answer = server.receive(&arp, NOW).unwrap();
    assert_eq!(
        (&answer[..6], &answer[22..32]),
        (&card(1).0[..], &[server.mac().0.as_slice(), &SERVER.octets()].concat()[..])
    );
    arp[41] = 99;
    assert_eq!(server.receive(&arp, NOW), None);
}

#[test]
fn a_new_configuration_keeps_the_leases_that_fit() {
    let mut server = server(config());
    for n in 1..=3 {
        obtain(&mut server, card(n), NOW);
    }
    server.reconfigure(Config { upper: Ipv4Addr::new(192, 168, 56, 102), ..config() }).unwrap();
    assert_eq!(server.leases().all().len(), 2);
    let wrong = Config { upper: Ipv4Addr::new(192, 168, 57, 1), ..config() };
    assert!(matches!(server.reconfigure(wrong), Err(ConfigError::Range(..))));
    for mask in [Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(255, 0, 255, 0)] {
        assert!(Config { mask, ..config() }.check().is_err());
    }
}

#[test]
fn cut_messages_are_not_answered() {
    let mut server = server(config());
    let whole = message(card(1), Kind::Discover, Ipv4Addr::UNSPECIFIED, &[(55, &[1, 3])]);
    for length in 0..whole.len() - 1 {
        assert_eq!(server.receive(&whole[..length], NOW), None, "{length}");
    }
    assert!(server.receive(&whole, NOW).is_some());
}
