//! Networks that machines share: whatever the bytes, the DHCP server does not panic and gives out only addresses of its own, once each;
//! files of leases are read back as they were written; requests to a network's process survive being written; the switch sends no frame
//! back, or twice to the same port.
#![no_main]

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use netstack::Mac;
use netstack::dhcp::{self, Client, Config, LeaseState, Leases, Scope, Server};
use netstack::protocol::{Reply, Request};
use netstack::switch::{Policy, Role, Switch};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

fn config() -> Config {
    Config {
        address: SERVER,
        mask: Ipv4Addr::new(255, 255, 255, 0),
        lower: Ipv4Addr::new(10, 0, 0, 1),
        upper: Ipv4Addr::new(10, 0, 0, 8),
        leases: Default::default(),
        global: Scope {
            options: [(6, vec![1; 255]), (66, vec![b'a'; 200]), (67, vec![b'b'; 200])].into(),
            ..Scope::default()
        },
        groups: Vec::new(),
        clients: vec![Client {
            mac: Mac([2; 6]),
            fixed: Some(Ipv4Addr::new(10, 0, 0, 5)),
            scope: Scope::default(),
        }],
    }
}

/// The payload in a frame that reaches the server.
fn wrapped(payload: &[u8]) -> Vec<u8> {
    let total = (28 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = ip.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [&[0, 68, 0, 67][..], &((8 + payload.len()) as u16).to_be_bytes(), &[0, 0]].concat();
    [&[0xff; 6][..], &[2; 6], &[8, 0], &ip, &udp, payload].concat()
}

fn serve(bytes: &[u8]) {
    let mut server = Server::new(config(), Mac([8, 0, 0x27, 0, 0, 1]), Leases::default()).unwrap();
    let mut now = 1_700_000_000;
    let mut rest = bytes;
    while let [how, length, tail @ ..] = rest {
        let (part, tail) = tail.split_at(tail.len().min(usize::from(*length) * 3));
        rest = tail;
        now += i64::from(how >> 2) * 20;
        let frame = match how & 3 {
            0 => part.to_vec(),
            1 => wrapped(part),
            // A head that is right, and options by the fuzzer.
            _ => {
                let mut bootp = vec![0; 240];
                bootp[..3].copy_from_slice(&[1, 1, 6]);
                bootp[28..34].copy_from_slice(&[2, 2, 2, 2, 2, how & 4]);
                bootp[236..].copy_from_slice(&[99, 130, 83, 99]);
                bootp.extend(part);
                wrapped(&bootp)
            }
        };
        if let Some(answer) = server.receive(&frame, now) {
            assert!(answer.len() >= 42 && answer.len() <= 1514, "{}", answer.len());
        }
        let leases = server.leases().all();
        let mut addresses = HashSet::new();
        for lease in leases {
            assert!(addresses.insert(lease.address));
            assert!(lease.address != SERVER && lease.address != Ipv4Addr::new(10, 0, 0, 5));
            assert!((2..=8).contains(&lease.address.octets()[3]));
            assert!(lease.state >= LeaseState::Free);
        }
    }
}

fn route(bytes: &[u8]) {
    let mut switch = Switch::default();
    let mut now = Instant::now();
    let mut ports = Vec::new();
    let mut to = Vec::new();
    for chunk in bytes.chunks(16) {
        match chunk {
            [0, kind, mac @ ..] if ports.len() < 16 => {
                let mac = Mac(mac.first_chunk().copied().unwrap_or_default());
                let role = match kind % 5 {
                    0 => Role::Card { mac, policy: Policy::Deny },
                    1 => Role::Card { mac, policy: Policy::AllowNetwork },
                    2 => Role::Card { mac, policy: Policy::AllowAll },
                    3 => Role::Router,
                    _ => Role::Trunk,
                };
                ports.push(switch.add(role));
            }
            [1, which, ..] if !ports.is_empty() => {
                let port = ports.remove(usize::from(*which) % ports.len());
                switch.remove(port);
            }
            [which, seconds, frame @ ..] if !ports.is_empty() => {
                now += Duration::from_secs(u64::from(*seconds));
                let from = ports[usize::from(*which) % ports.len()];
                switch.route(from, frame, now, &mut to);
                let unique: HashSet<_> = to.iter().collect();
                assert_eq!(unique.len(), to.len());
                assert!(!to.contains(&from) && to.iter().all(|port| ports.contains(port)));
            }
            _ => {}
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, rest)) = bytes.split_first() else { return };
    match kind % 5 {
        0 => serve(rest),
        1 => route(rest),
        2 => {
            let Ok(text) = std::str::from_utf8(rest) else { return };
            let Some(leases) = Leases::parse(text) else { return };
            assert_eq!(Leases::parse(&leases.text()).unwrap(), leases);
        }
        3 => {
            let Some((code, text)) = rest.split_first() else { return };
            let Ok(text) = std::str::from_utf8(text) else { return };
            for hex in [false, true] {
                if let Ok(value) = dhcp::options::encode(i32::from(*code), text, hex) {
                    assert!(value.len() <= 255);
                }
            }
        }
        _ => {
            if let Ok(request) = serde_json::from_slice::<Request>(rest) {
                let text = serde_json::to_vec(&request).unwrap();
                assert_eq!(serde_json::from_slice::<Request>(&text).unwrap(), request);
            }
            let _ = serde_json::from_slice::<Reply>(rest);
        }
    }
});
