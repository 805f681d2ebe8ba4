//! Ways to the host's interfaces, in a network namespace: what the host's stack leaves to its cards comes out done, tags of VLANs stay on,
//! and frames reach the host.
#![allow(unsafe_code)] // setsockopt() with an option that the library has no name for

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use ether::checksum::{ones_sum, put, sum};
use netstack::host::{self, MAX_READ, Received, Way};

const GUEST: [u8; 6] = [8, 0, 0x27, 0, 0, 1];
const PORT: u16 = 7000;
/// A tag of priority 3 and VLAN 5, and one of a provider's VLAN around such.
const TAGS: [&[u8]; 2] = [&[0x81, 0, 0x60, 5], &[0x88, 0xa8, 0, 6, 0x81, 0, 0x60, 5]];

fn sh(script: &str) {
    let run = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(run.status.success(), "{script}: {}", String::from_utf8_lossy(&run.stderr));
}

/// Runs the test `name` again as root of a namespace of its own; false in there.
fn enter_namespace(name: &str) -> bool {
    const INSIDE: &str = "BOXWOOD_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let user: &[&str] =
        if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let mut unshare = Command::new("unshare");
    unshare.args(user).args(["--net", "--mount", "sh", "-c"]);
    if !unshare
        .args(["test -w /dev/net/tun && mount -t sysfs sysfs /sys"])
        .status()
        .is_ok_and(|s| s.success())
    {
        eprintln!("SKIPPED {name}: it needs a network namespace and /dev/net/tun");
        return true;
    }
    let mut unshare = Command::new("unshare");
    unshare.args(user).args([
        "--net",
        "--mount",
        "sh",
        "-c",
        "mount -t sysfs sysfs /sys && exec \"$0\" \"$@\"",
    ]);
    let run = unshare
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = [run.stdout, run.stderr].concat();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&text));
    true
}

/// A way, and frames that were read from it.
struct End {
    way: Way,
    read: RefCell<VecDeque<Vec<u8>>>,
}

impl End {
    fn new(way: Way) -> Self {
        rustix::io::ioctl_fionbio(&way, true).unwrap();
        Self { way, read: RefCell::default() }
    }

    /// The next frame that is wanted.
    fn wait_for(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (mut buffer, mut read) = (vec![0; MAX_READ], self.read.borrow_mut());
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(frame) = std::iter::from_fn(|| read.pop_front()).find(|frame| wanted(frame)) {
                return frame;
            }
            assert!(Instant::now() < end, "the frame did not come");
            match self.way.read(&mut buffer) {
                Ok(Received::Frame(frame)) => read.push_back(frame.to_vec()),
                Ok(Received::Cut(frames)) => read.extend(frames),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }
}

/// The host at its interface `name`, where it is 10.`net`.1.1; `way` leads to a guest.
struct Bench<'a> {
    way: End,
    name: &'a str,
    host: Ipv4Addr,
    guest: Ipv4Addr,
}

impl<'a> Bench<'a> {
    fn new(way: End, name: &'a str, net: u8) -> Self {
        sh(&format!(
            "ip addr add 10.{net}.1.1/24 dev {name}; ip link set {name} up
             ip neigh add 10.{net}.1.2 lladdr 08:00:27:00:00:01 dev {name}"
        ));
        Self { way, name, host: Ipv4Addr::new(10, net, 1, 1), guest: Ipv4Addr::new(10, net, 1, 2) }
    }

    /// The host sends datagrams to the guest, alone and many in one piece.
    fn host_sends(&self) {
        let socket = UdpSocket::bind((self.host, 0)).unwrap();
        for (size, total) in [(500, 500), (1200, 6001)] {
            let data: Vec<u8> = (0..total).map(|i| (i / 3) as u8).collect();
            set_segment(&socket, size);
            assert_eq!(socket.send_to(&data, (self.guest, PORT)).unwrap(), total);
            let (mut got, mut count) = (Vec::new(), 0);
            while got.len() < total {
                let frame =
                    self.way.wait_for(|f| f[..6] == GUEST && f.get(36..38) == Some(&PORT.to_be_bytes()));
                let (ip, udp) = (&frame[14..34], &frame[34..]);
                assert_eq!((frame[12..14].to_vec(), ones_sum(ip)), (vec![8, 0], 0xffff));
                assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len() + udp.len());
                assert_eq!(sum(udp, sum(&ip[12..], 17 + udp.len() as u32)), 0xffff);
                got.extend_from_slice(&udp[8..]);
                count += 1;
            }
            assert!(got == data, "{}: {size}", self.name);
            assert_eq!(count, total.div_ceil(size.into()), "{}: {size}", self.name);
        }
    }

    /// The guest sends a datagram to the host.
    fn guest_sends(&self) {
        let socket = UdpSocket::bind((self.host, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mac = std::fs::read_to_string(format!("/sys/class/net/{}/address", self.name)).unwrap();
        let mut frame: Vec<u8> = mac.trim().split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        frame.extend(GUEST);
        frame.extend([8, 0, 0x45, 0, 0, 48, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend(self.guest.octets());
        frame.extend(self.host.octets());
        let check = !ones_sum(&frame[14..34]);
        put(&mut frame, 24, check);
        let to = socket.local_addr().unwrap().port().to_be_bytes();
        frame.extend([0x1b, 0x58, to[0], to[1], 0, 28, 0, 0]);
        frame.extend([b'x'; 20]);
        self.way.way.write(&frame).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(socket.recv_from(&mut buffer).unwrap(), (20, (self.guest, PORT).into()));
        assert_eq!(buffer[..20], [b'x'; 20]);
    }

    /// Frames with tags go to another way into the network, and come from there, as they are.
    fn tags_stay(&self, far: &End) {
        const FAR: [u8; 6] = [2, 0, 0, 0, 0, 9];
        for tags in TAGS {
            for (from, to, src, dst) in [(&self.way, far, GUEST, FAR), (far, &self.way, FAR, GUEST)] {
                let frame = [&dst[..], &src, tags, &[0x88, 0xb5], &[7; 60]].concat();
                from.way.write(&frame).unwrap();
                let got = to.wait_for(|f| f[..6] == dst && f.ends_with(&[7; 60]));
                assert_eq!(got, frame, "{}", self.name);
            }
        }
    }
}

/// Has the kernel send what is written in datagrams of so many bytes.
fn set_segment(socket: &UdpSocket, size: u16) {
    let value = libc::c_int::from(size);
    // SAFETY: the option takes a number, which lives during the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn frames_on_the_way_to_and_from_the_host_are_whole() {
    if enter_namespace("frames_on_the_way_to_and_from_the_host_are_whole") {
        return;
    }
    sh("ip link set lo up; ip link add cable type veth peer name plug; ip link set cable up; ip link set plug up
        ip link add hub type bridge; ip link set hub up");
    let vboxnet = host::create_host_only().unwrap();
    sh(&format!("ip link set {vboxnet} up"));
    // Another way into each network: the cable's other end, a second port of the bridge, the host-only interface itself.
    for (way, far, name, net) in [
        (host::open_bridged("plug"), host::open_bridged("cable"), "cable", 90),
        (host::open_bridged("hub"), host::open_bridged("hub"), "hub", 91),
        (host::open_host_only(&vboxnet), host::open_bridged(&vboxnet), &*vboxnet, 92),
    ] {
        let (way, far) = (End::new(way.unwrap()), End::new(far.unwrap()));
        let bench = Bench::new(way, name, net);
        bench.tags_stay(&far);
        bench.host_sends();
        bench.guest_sends();
    }
    host::remove_host_only(&vboxnet).unwrap();
}
