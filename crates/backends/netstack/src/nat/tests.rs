use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::*;

/// A guest that keeps what it gets, up to a limit.
struct Keeper {
    frames: Mutex<Vec<Vec<u8>>>,
    limit: usize,
}

impl Guest for Keeper {
    fn receive(&self, frame: &[u8]) -> bool {
        let mut frames = self.frames.lock();
        let room = frames.len() < self.limit;
        if room {
            frames.push(frame.to_vec());
        }
        room
    }

    fn ready(&self) {}
}

fn network(limit: usize) -> (Nat, Arc<Keeper>) {
    let keeper = Arc::new(Keeper { frames: Mutex::default(), limit });
    let nat = Nat::start(&NatConfig::for_slot(0), keeper.clone()).unwrap();
    (nat, keeper)
}

fn wait_for(keeper: &Keeper, what: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        if let Some(frame) = keeper.frames.lock().iter().find(|f| what(f)) {
            return Some(frame.clone());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

const MAC: [u8; 6] = [0x08, 0x00, 0x27, 1, 2, 3];

/// Who has `target`? Asked by 10.0.2.15.
fn arp_request(target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0]);
    frame.extend(target);
    frame.resize(60, 0);
    frame
}

/// A datagram, broadcast on the wire.
fn datagram(from: ([u8; 4], u16), to: ([u8; 4], u16), data: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend((28 + data.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend([from.0, to.0].concat());
    let sum: u32 = ip.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(from.1.to_be_bytes());
    frame.extend(to.1.to_be_bytes());
    frame.extend((8 + data.len() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(data);
    frame
}

fn dhcp_discover() -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78, 0, 0, 0x80, 0];
    bootp.resize(28, 0);
    bootp.extend(MAC);
    bootp.resize(236, 0);
    bootp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    bootp.resize(300, 0);
    datagram(([0; 4], 68), ([255; 4], 67), &bootp)
}

fn rule(name: &str, protocol: Protocol, host_port: u16) -> Rule {
    Rule {
        name: name.into(),
        protocol,
        host: Ipv4Addr::LOCALHOST.into(),
        host_port,
        guest: None,
        guest_port: 22,
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn dhcp_gives_the_first_card_10_0_2_15() {
    let (nat, keeper) = network(usize::MAX);
    nat.send(dhcp_discover()).unwrap();
    let offer = wait_for(&keeper, is_offer).expect("an offer");
    assert_eq!(offer[42 + 16..42 + 20], [10, 0, 2, 15]);
}

fn is_offer(f: &[u8]) -> bool {
    f.len() > 282 && f[23] == 17 && f[34..36] == [0, 67]
}

/// A folder that goes when the test ends.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A NAT whose TFTP server has the file `loader`.
fn boot_network(test: &str, next_server: Option<Ipv4Addr>) -> (Nat, Arc<Keeper>, Folder) {
    let folder = Folder(std::env::temp_dir().join(format!("boxwood-nat-{test}-{}", std::process::id())));
    std::fs::create_dir_all(folder.0.join("tftp")).unwrap();
    std::fs::write(folder.0.join("secret"), b"not for guests").unwrap();
    std::fs::write(folder.0.join("tftp/loader"), [b'x'; 700]).unwrap();
    let keeper = Arc::new(Keeper { frames: Mutex::default(), limit: usize::MAX });
    let tftp = Tftp { folder: folder.0.join("tftp"), boot_file: "loader".into(), next_server };
    let config = NatConfig { tftp, ..NatConfig::for_slot(0) };
    (Nat::start(&config, keeper.clone()).unwrap(), keeper, folder)
}

#[test]
fn dhcp_names_the_boot_file_and_the_server_to_get_it_from() {
    for (wanted, named) in [(None, [10, 0, 2, 2]), (Some(Ipv4Addr::new(192, 0, 2, 9)), [192, 0, 2, 9])] {
        let (nat, keeper, _folder) = boot_network("dhcp", wanted);
        nat.send(dhcp_discover()).unwrap();
        let offer = wait_for(&keeper, is_offer).expect("an offer");
        assert_eq!(offer[42 + 20..42 + 24], named);
        assert_eq!(&offer[42 + 108..42 + 115], b"loader\0");
    }
}

#[test]
fn tftp_serves_files_of_its_folder_and_no_others() {
    let (nat, keeper, _folder) = boot_network("tftp", None);
    let ask = |name: &str, port: u16| {
        let request = [b"\0\x01", name.as_bytes(), b"\0octet\0"].concat();
        nat.send(datagram(([10, 0, 2, 15], port), ([10, 0, 2, 2], 69), &request)).unwrap();
        let to = port.to_be_bytes();
        let reply = wait_for(&keeper, |f| f.len() > 46 && f[23] == 17 && f[36..38] == to);
        reply.expect("an answer")[42..].to_vec()
    };
    nat.send(arp_request([10, 0, 2, 2])).unwrap();
    let first = ask("loader", 2000);
    assert_eq!((&first[..4], first.len(), first[4]), (b"\0\x03\0\x01".as_slice(), 516, b'x'));
    for (i, wrong) in ["../secret", "/../secret", "sub/../../secret", "missing"].into_iter().enumerate() {
        assert_eq!(ask(wrong, 3000 + i as u16)[..2], [0, 5], "{wrong}");
    }
}

#[test]
fn a_guest_without_room_gets_the_frame_after_it_resumes() {
    let (nat, keeper) = network(1);
    nat.send(arp_request([10, 0, 2, 2])).unwrap();
    nat.send(arp_request([10, 0, 2, 3])).unwrap();
    let answers = |from: u8| move |f: &[u8]| f[12..14] == [8, 6] && f[21] == 2 && f[31] == from;
    assert!(wait_for(&keeper, answers(2)).is_some());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(keeper.frames.lock().len(), 1);
    keeper.frames.lock().clear();
    nat.resume();
    assert!(wait_for(&keeper, answers(3)).is_some());
}

#[test]
fn a_forwarded_port_leads_to_the_guest_until_the_rule_goes() {
    let (nat, keeper) = network(usize::MAX);
    let port = free_port();
    nat.add_rule(rule("ssh", Protocol::Tcp, port)).unwrap();
    assert_eq!(nat.rules(), [rule("ssh", Protocol::Tcp, port)]);
    nat.send(arp_request([10, 0, 2, 2])).unwrap();
    let connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // A SYN for port 22 of 10.0.2.15.
    let syn = |f: &[u8]| f.len() >= 54 && f[23] == 6 && f[30..34] == [10, 0, 2, 15] && f[36..38] == [0, 22];
    assert!(wait_for(&keeper, syn).is_some());
    drop(connection);
    nat.remove_rule("ssh").unwrap();
    assert!(nat.rules().is_empty());
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn connections_wait_for_a_guest_that_boots() {
    let (nat, keeper) = network(usize::MAX);
    let port = free_port();
    nat.add_rule(rule("ssh", Protocol::Tcp, port)).unwrap();
    let _connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let for_guest = |f: &[u8]| f.len() >= 54 && f[12..14] == [8, 0] && f[30..34] == [10, 0, 2, 15];
    let question = |f: &[u8]| f[12..14] == [8, 6] && f[21] == 1 && f[38..42] == [10, 0, 2, 15];
    assert!(wait_for(&keeper, question).is_some(), "the guest is asked for");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!keeper.frames.lock().iter().any(|f| for_guest(f)), "but for that it is left alone");
    let asked = Instant::now();
    nat.send(arp_request([10, 0, 2, 2])).unwrap();
    assert!(wait_for(&keeper, for_guest).is_some());
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
fn wrong_rules_are_refused_with_their_reason() {
    let (nat, _) = network(usize::MAX);
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = nat.add_rule(rule("a", Protocol::Udp, taken.local_addr().unwrap().port()));
    assert!(matches!(udp, Err(Error::Listen { .. })), "{udp:?}");
    let tcp = nat.add_rule(rule("b", Protocol::Tcp, listener.local_addr().unwrap().port()));
    assert!(matches!(tcp, Err(Error::Listen { .. })), "{tcp:?}");
    assert!(matches!(nat.add_rule(rule("c", Protocol::Tcp, 0)), Err(Error::Port(_))));
    let port = free_port();
    nat.add_rule(rule("d", Protocol::Tcp, port)).unwrap();
    assert!(matches!(nat.add_rule(rule("d", Protocol::Tcp, port)), Err(Error::Exists(_))));
    assert!(matches!(nat.remove_rule("e"), Err(Error::NoRule(_))));
}

#[test]
fn networks_are_those_that_hold_the_routers_addresses() {
    let base = || NatConfig::for_slot(1);
    assert_eq!(base().guest(), Ipv4Addr::new(10, 0, 3, 15));
    assert_eq!(base().with_network("192.168.7.9/24").unwrap().gateway(), Ipv4Addr::new(192, 168, 7, 2));
    for wrong in ["", "10.0.2.0", "10.0.2.0/28", "10.0.2.0/33", "10.0.2/24", "10.0.2.0/0"] {
        assert!(base().with_network(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_full_queue_gives_the_frame_back() {
    let keeper = Arc::new(Keeper { frames: Mutex::default(), limit: 0 });
    let nat = Nat::start(&NatConfig::for_slot(0), keeper).unwrap();
    let mut refused = false;
    // With nobody taking answers the stack's backlog fills, then the queue.
    for _ in 0..100_000 {
        if nat.send(arp_request([10, 0, 2, 2])).is_err() {
            refused = true;
            break;
        }
    }
    assert!(refused);
}

/// A guest that takes packets, and a thing to answer them with.
struct Taker {
    keeper: Keeper,
    packets: Mutex<Vec<(usize, u16)>>,
}

impl Guest for Taker {
    fn receive(&self, frame: &[u8]) -> bool {
        self.keeper.receive(frame)
    }

    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        self.packets.lock().push((packet.len(), mss));
        self.keeper.receive(packet)
    }

    fn ready(&self) {}
}

/// Answers a segment that came from the router: acknowledges `bytes` of it.
fn answer(segment: &[u8], flags: u8, bytes: u32, options: &[u8]) -> Vec<u8> {
    let number = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
    let mut tcp = [&segment[36..38], &segment[34..36]].concat();
    tcp.extend(if flags & 2 != 0 { 1000u32 } else { number(42) }.to_be_bytes());
    tcp.extend(number(38).wrapping_add(bytes).to_be_bytes());
    tcp.extend([((20 + options.len()) * 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(options);
    let pseudo = [&segment[30..34], &segment[26..30], &[0, 6, 0, tcp.len() as u8]].concat();
    let sum = ether::checksum::ones_sum(&[pseudo, tcp.clone()].concat());
    ether::checksum::put(&mut tcp, 16, !sum);
    let to: [u8; 4] = segment[26..30].try_into().unwrap();
    let mut frame = datagram(([10, 0, 2, 15], 0), (to, 0), &vec![0; tcp.len() - 8]);
    frame[23] = 6;
    frame[24..26].fill(0);
    let sum = ether::checksum::ones_sum(&frame[14..34]);
    ether::checksum::put(&mut frame, 24, !sum);
    frame.splice(34.., tcp);
    frame
}

#[test]
fn data_of_a_connection_comes_in_packets_larger_than_frames() {
    let keeper = Keeper { frames: Mutex::default(), limit: usize::MAX };
    let taker = Arc::new(Taker { keeper, packets: Mutex::default() });
    let config = NatConfig { large: true, ..NatConfig::for_slot(0) };
    let nat = Nat::start(&config, taker.clone()).unwrap();
    let port = free_port();
    nat.add_rule(rule("ssh", Protocol::Tcp, port)).unwrap();
    nat.send(arp_request([10, 0, 2, 2])).unwrap();
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let from_router = |f: &[u8]| f.len() >= 54 && f[23] == 6 && f[36..38] == [0, 22];
    let syn = wait_for(&taker.keeper, from_router).unwrap();
    nat.send(answer(&syn, 0x12, 1, &[2, 4, 0x05, 0x78])).unwrap();
    std::io::Write::write_all(&mut connection, &[7; 20_000]).unwrap();
    let data = wait_for(&taker.keeper, |f| from_router(f) && f.len() > 1514).expect("a large packet");
    assert!(data[54..].iter().all(|byte| *byte == 7));
    assert_eq!(taker.packets.lock()[0].1, 1400);
}
