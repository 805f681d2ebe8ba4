//! NAT: whatever a guest sends, requests to the router's DHCP and TFTP servers among it, the engine neither panics nor hangs, and
//! what it delivers has the length that was agreed. Run it in a network namespace of its own (`unshare -rn`), so that nothing that
//! the guest asks for leaves the host.
#![no_main]

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ether::checksum::{ones_sum, put};
use fuzz::Input;
use libfuzzer_sys::fuzz_target;
use netstack::{Guest, Nat, NatConfig, Tftp};

#[derive(Default)]
struct Counter {
    answers: AtomicU64,
}

impl Guest for Counter {
    fn receive(&self, frame: &[u8]) -> bool {
        assert!(frame.len() <= 1514, "a frame of {} bytes", frame.len());
        if frame.get(12..14) == Some(&[8, 6]) {
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        assert!(packet.len() > 1514 && mss >= 64);
        true
    }

    fn ready(&self) {}
}

struct Network {
    nat: Nat,
    counter: Arc<Counter>,
}

fn network() -> &'static Network {
    static NETWORK: OnceLock<Network> = OnceLock::new();
    NETWORK.get_or_init(|| {
        let folder = std::env::temp_dir().join("boxwood-fuzz-tftp");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("loader"), [b'x'; 5000]).unwrap();
        let tftp = Tftp { folder, boot_file: "loader".into(), next_server: Some(Ipv4Addr::new(10, 0, 2, 9)) };
        let counter = Arc::new(Counter::default());
        let mut config = NatConfig::for_slot(0);
        (config.tftp, config.large) = (tftp, true);
        Network { nat: Nat::start(&config, counter.clone()).unwrap(), counter }
    })
}

/// A frame around `data`: broadcast, from the guest.
fn frame(kind: [u8; 2], data: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &[8, 0, 0x27, 1, 2, 3], &kind, data].concat()
}

fn ip(protocol: u8, to: [u8; 4], data: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + data.len() as u16).to_be_bytes());
    header.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15]);
    header.extend(to);
    let sum = ones_sum(&header);
    put(&mut header, 10, !sum);
    header.extend(data);
    frame([8, 0], &header)
}

fn udp(from: u16, to: ([u8; 4], u16), data: &[u8]) -> Vec<u8> {
    let mut datagram = from.to_be_bytes().to_vec();
    datagram.extend(to.1.to_be_bytes());
    datagram.extend((8 + data.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(data);
    ip(17, to.0, &datagram)
}

fn tcp(header: &[u8]) -> Vec<u8> {
    let mut segment = header.to_vec();
    segment.resize(segment.len().max(20), 0);
    segment[16..18].fill(0);
    let to = [10, 0, 2, 2];
    let pseudo = [&[10, 0, 2, 15][..], &to, &[0, 6], &(segment.len() as u16).to_be_bytes()[..]].concat();
    let sum = ones_sum(&[pseudo, segment.clone()].concat());
    put(&mut segment, 16, !sum);
    ip(6, to, &segment)
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let Network { nat, counter } = network();
    while !input.is_empty() {
        let op = input.byte();
        let len = usize::from(input.byte());
        let data = input.bytes(len);
        let frame = match op % 8 {
            0 => data.to_vec(),
            1 => frame([8, op], data),
            2 => ip(op >> 3, [10, 0, 2, 2], data),
            3 => tcp(data),
            // BOOTP: a request with the guest's options.
            4 => {
                let mut bootp = vec![1, 1, 6, 0];
                bootp.resize(28, op);
                bootp.extend([8, 0, 0x27, 1, 2, 3]);
                bootp.resize(236, 0);
                bootp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1 + (op >> 3 & 3)]);
                bootp.extend(data);
                bootp.push(255);
                udp(68, ([255; 4], 67), &bootp)
            }
            5 => udp(2000 + u16::from(op), ([10, 0, 2, 2], 69), &[&[0, op >> 3 & 7], data].concat()),
            6 => udp(2000, ([10, 0, 2, 2], 69), &[b"\0\x01loader\0octet\0", data].concat()),
            _ => udp(u16::from(op), ([10, 0, 2, 3], 53), data),
        };
        // A full queue loses the frame.
        let _ = nat.send(frame);
    }
    // The engine has taken everything when it answers this; a queue that is full for ever is a hang.
    let before = counter.answers.load(Ordering::Relaxed);
    let mut request = vec![0, 1, 8, 0, 6, 4, 0, 1, 8, 0, 0x27, 1, 2, 3, 10, 0, 2, 15];
    request.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    request.resize(46, 0);
    let end = Instant::now() + Duration::from_secs(5);
    while nat.send(frame([8, 6], &request)).is_err() || counter.answers.load(Ordering::Relaxed) == before {
        assert!(Instant::now() < end, "no answer");
        std::thread::sleep(Duration::from_micros(50));
    }
});
