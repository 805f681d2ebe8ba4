//! A network's process as a whole: the real program, machines' cables, its services, and its death.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use netstack::dhcp;
use netstack::protocol::{self, Client, NatNetwork, Network, Port, Reply, Request, Status, Trunk};
use netstack::switch::Policy;
use netstack::{Mac, Protocol, Rule};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, recv, send};

const A: Mac = Mac([8, 0, 0x27, 0, 0, 1]);
const B: Mac = Mac([8, 0, 0x27, 0, 0, 2]);

struct Net {
    dir: PathBuf,
}

impl Net {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("boxwood-net-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("net")
    }

    fn start(&self) {
        let program = Path::new(env!("CARGO_BIN_EXE_VBoxIntNetSwitch"));
        protocol::start(program, "net", &self.socket(), &self.dir.join("log")).unwrap();
    }

    fn configure(&self, network: &Network) -> Result<Vec<String>, protocol::ClientError> {
        match Client::connect(&self.socket()).unwrap().ask(&Request::Configure(Box::new(network.clone())))? {
            Reply::Done { notes } => Ok(notes),
            other => panic!("{other:?}"),
        }
    }

    fn join(&self, mac: Mac, policy: Policy) -> OwnedFd {
        let port = Port { label: mac.to_string(), mac, policy };
        let cable = Client::connect(&self.socket()).unwrap().join(&port).unwrap();
        set_socket_timeout(&cable, Timeout::Recv, Some(Duration::from_secs(5))).unwrap();
        cable
    }

    fn status(&self) -> Status {
        match Client::connect(&self.socket()).unwrap().ask(&Request::Status).unwrap() {
            Reply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    fn stop(&self) {
        if let Ok(client) = Client::connect(&self.socket()) {
            let _ = client.ask(&Request::Stop);
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn frame(to: Mac, from: Mac, mark: u8) -> Vec<u8> {
    [&to.0[..], &from.0, &[0x88, 0xb5], &[mark; 46]].concat()
}

fn send_to(cable: &OwnedFd, frame: &[u8]) {
    send(cable, frame, SendFlags::NOSIGNAL).unwrap();
}

/// The next frame that `wanted` takes; `None` after five seconds without any.
fn next(cable: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 0x1_0000];
    loop {
        match recv(cable, &mut buffer[..], RecvFlags::empty()) {
            Ok((0, _)) | Err(_) => return None,
            Ok((length, _)) if wanted(&buffer[..length]) => return Some(buffer[..length].to_vec()),
            Ok(_) => {}
        }
    }
}

#[test]
fn machines_exchange_frames_and_a_slow_one_loses_only_its_own() {
    let net = Net::new("frames");
    net.start();
    let (a, b) = (net.join(A, Policy::Deny), net.join(B, Policy::Deny));
    let slow_mac = Mac([8, 0, 0x27, 0, 0, 3]);
    let _slow = net.join(slow_mac, Policy::Deny);
    send_to(&a, &frame(B, A, 1));
    assert_eq!(next(&b, |_| true).unwrap(), frame(B, A, 1));
    // More than socket and queue hold, to one who never reads.
    for _ in 0..5000 {
        send_to(&a, &frame(slow_mac, A, 2));
    }
    send_to(&a, &frame(B, A, 3));
    assert_eq!(next(&b, |_| true).unwrap(), frame(B, A, 3));
    let status = net.status();
    assert_eq!(status.ports.len(), 3);
    assert!(status.dropped > 0, "{status:?}");
}

#[test]
fn a_killed_process_can_be_started_again_at_once() {
    let net = Net::new("kill");
    net.start();
    let a = net.join(A, Policy::Deny);
    let pid = net.status().pid;
    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert_eq!(next(&a, |_| true), None, "the cable is dead");
    net.start();
    let (a, b) = (net.join(A, Policy::Deny), net.join(B, Policy::Deny));
    send_to(&b, &frame(A, B, 9));
    assert_eq!(next(&a, |_| true).unwrap(), frame(A, B, 9));
}

#[test]
fn a_network_without_machines_ends_unless_it_is_pinned() {
    let net = Net::new("end");
    let program = env!("CARGO_BIN_EXE_VBoxIntNetSwitch");
    let mut child = Command::new(program)
        .args(["--network", "net", "--linger", "300", "--socket"])
        .arg(net.socket())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let there = || Client::connect(&net.socket()).is_ok();
    let wait = |wanted: bool| {
        let end = Instant::now() + Duration::from_secs(10);
        while there() != wanted && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(there(), wanted);
    };
    wait(true);
    net.configure(&Network { pinned: true, ..Network::internal("net") }).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    assert!(there());
    net.configure(&Network::internal("net")).unwrap();
    wait(false);
    assert!(child.wait().unwrap().success());
    assert!(!net.socket().exists());
}

fn nat_network(rules: Vec<Rule>) -> Network {
    let at = |n| Ipv4Addr::new(10, 0, 9, n);
    Network {
        dhcp: Some(dhcp::Config {
            address: at(3),
            mask: Ipv4Addr::new(255, 255, 255, 0),
            lower: at(4),
            upper: at(254),
            leases: std::env::temp_dir().join(format!("boxwood-nat-{}.leases", std::process::id())),
            global: dhcp::Scope { options: [(3, at(1).octets().to_vec())].into(), ..dhcp::Scope::default() },
            groups: Vec::new(),
            clients: Vec::new(),
        }),
        nat: Some(NatNetwork {
            network: at(0),
            prefix: 24,
            gateway: at(1),
            ipv6: None,
            ipv6_default_route: false,
            rules,
            loopbacks: vec![(Ipv4Addr::LOCALHOST.into(), at(2))],
        }),
        ..Network::internal("net")
    }
}

fn discover(mac: Mac) -> Vec<u8> {
    let mut bootp = vec![0; 240];
    bootp[..3].copy_from_slice(&[1, 1, 6]);
    bootp[28..34].copy_from_slice(&mac.0);
    bootp[236..].copy_from_slice(&[99, 130, 83, 99]);
    bootp.extend([53, 1, 1, 255]);
    bootp.resize(300, 0);
    let mut ip = vec![0x45, 0];
    ip.extend((28 + bootp.len() as u16).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum: u32 = ip.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [&[0, 68, 0, 67][..], &(8 + bootp.len() as u16).to_be_bytes(), &[0, 0]].concat();
    [&Mac::BROADCAST.0[..], &mac.0, &[8, 0], &ip, &udp, &bootp].concat()
}

fn arp(mac: Mac, from: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = [&Mac::BROADCAST.0[..], &mac.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac.0, &from].concat();
    frame.extend([0; 6]);
    frame.extend(target);
    frame.resize(60, 0);
    frame
}

/// An offer for `mac`: the address, and who sent it.
fn offer(frame: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    if frame.len() < 282 || frame[23] != 17 || frame[34..36] != [0, 67] {
        return None;
    }
    let at = |at: usize| -> [u8; 4] { frame[at..at + 4].try_into().unwrap() };
    Some((at(42 + 16).into(), at(26).into()))
}

#[test]
fn a_nat_network_gives_addresses_by_its_own_server_and_routes_for_all() {
    let net = Net::new("nat");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    net.start();
    let forward = Rule {
        name: "web".into(),
        protocol: Protocol::Tcp,
        host: Ipv4Addr::LOCALHOST.into(),
        host_port: port,
        guest: Some(Ipv4Addr::new(10, 0, 9, 5).into()),
        guest_port: 80,
    };
    let network = nat_network(vec![forward]);
    assert_eq!(net.configure(&network).unwrap(), Vec::<String>::new());
    let (a, b) = (net.join(A, Policy::Deny), net.join(B, Policy::Deny));
    for (cable, mac, wanted) in [(&a, A, 4), (&b, B, 5)] {
        send_to(cable, &discover(mac));
        let got = offer(&next(cable, |f| offer(f).is_some()).unwrap()).unwrap();
        assert_eq!(got, (Ipv4Addr::new(10, 0, 9, wanted), Ipv4Addr::new(10, 0, 9, 3)));
    }
    // The router has its own address and the one that stands for the host.
    for target in [[10, 0, 9, 1], [10, 0, 9, 2]] {
        send_to(&a, &arp(A, [10, 0, 9, 4], target));
        let answer = next(&a, |f| f[12..14] == [8, 6] && f[21] == 2 && f[28..32] == target).unwrap();
        assert_eq!(answer[..6], A.0);
    }
    // A connection to the host's port arrives at the second machine as soon as the router knows it.
    send_to(&b, &arp(B, [10, 0, 9, 5], [10, 0, 9, 1]));
    let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let syn = |f: &[u8]| f.len() >= 54 && f[23] == 6 && f[30..34] == [10, 0, 9, 5] && f[36..38] == [0, 80];
    assert!(next(&b, syn).is_some());
    // Without the rule nothing listens; the network goes on.
    net.configure(&nat_network(Vec::new())).unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    send_to(&a, &frame(B, A, 7));
    assert!(next(&b, |f| f[14] == 7).is_some());
    let _ = std::fs::remove_file(network.dhcp.unwrap().leases);
}

#[test]
fn what_cannot_be_is_refused_and_the_network_stays_as_it_was() {
    let net = Net::new("refused");
    net.start();
    let trunk = Some(Trunk::Bridged("no-such-interface".into()));
    let error = net.configure(&Network { trunk, ..Network::internal("net") }).unwrap_err();
    assert!(error.to_string().contains("no-such-interface"), "{error}");
    assert_eq!(net.status().network, Network::internal("net"));
    let client = Client::connect(&net.socket()).unwrap();
    let garbage = |bytes: &[u8]| {
        // The protocol is text: what is none is refused, and the connection lives on.
        let raw = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::connect(&raw, &rustix::net::SocketAddrUnix::new(net.socket()).unwrap()).unwrap();
        send(&raw, bytes, SendFlags::NOSIGNAL).unwrap();
        let mut buffer = vec![0; 4096];
        let (length, _) = recv(&raw, &mut buffer[..], RecvFlags::empty()).unwrap();
        serde_json::from_slice::<Reply>(&buffer[..length]).unwrap()
    };
    for bytes in [&b"{"[..], b"\xff\xff", b"{\"Join\":{}}", b"[]"] {
        assert!(matches!(garbage(bytes), Reply::Refused(_)));
    }
    assert!(matches!(client.ask(&Request::Status), Ok(Reply::Status(_))));
}
