//! Port forwarding under load: a guest whose TCP/IP is another implementation (smoltcp) serves connections that are opened and closed at
//! random; every byte is checked, and no descriptor may be left.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use netstack::{Guest, Nat, NatConfig, Protocol, Rule};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as NetInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

/// Sockets that wait for connections: more than are opened at once, because smoltcp has no queue of connections beside them.
const BACKLOG: usize = 1100;

/// Frames for the guest.
#[derive(Default)]
struct Wire {
    frames: Mutex<VecDeque<Vec<u8>>>,
    refused: AtomicBool,
}

impl Guest for Wire {
    fn receive(&self, frame: &[u8]) -> bool {
        let mut frames = self.frames.lock().unwrap();
        let room = frames.len() < 1024;
        if room {
            frames.push_back(frame.to_vec());
        } else {
            self.refused.store(true, Ordering::SeqCst);
        }
        room
    }

    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        let mut frames = self.frames.lock().unwrap();
        let room = frames.len() < 1024;
        if room {
            frames.extend(ether::offload::frames(packet, mss).unwrap());
        } else {
            self.refused.store(true, Ordering::SeqCst);
        }
        room
    }

    fn ready(&self) {}
}

/// The guest's card.
struct Card {
    wire: Arc<Wire>,
    nat: Arc<Nat>,
}

struct Rx(Vec<u8>);
struct Tx(Arc<Nat>);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Tx {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        // A full queue loses the frame, as a cable would; TCP sends it again.
        let _ = self.0.send(frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx;

    fn receive(&mut self, _: NetInstant) -> Option<(Rx, Tx)> {
        let frame = self.wire.frames.lock().unwrap().pop_front();
        if frame.is_none() && self.wire.refused.swap(false, Ordering::SeqCst) {
            self.nat.resume();
        }
        frame.map(|frame| (Rx(frame), Tx(self.nat.clone())))
    }

    fn transmit(&mut self, _: NetInstant) -> Option<Tx> {
        Some(Tx(self.nat.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

fn listener(sockets: &mut SocketSet<'_>) -> SocketHandle {
    let buffer = || tcp::SocketBuffer::new(vec![0; 8192]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.listen(80).unwrap();
    sockets.add(socket)
}

/// Sends every byte back, plus one, until its peer has no more.
fn guest(mut card: Card, stop: &AtomicBool) {
    let mac = EthernetAddress([8, 0, 0x27, 1, 2, 3]);
    let start = Instant::now();
    let now = || NetInstant::from_micros(start.elapsed().as_micros() as i64);
    let mut iface = Interface::new(Config::new(HardwareAddress::Ethernet(mac)), &mut card, now());
    iface.update_ip_addrs(|list| list.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).unwrap());
    iface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 2, 2)).unwrap();
    let mut sockets = SocketSet::new(Vec::new());
    let mut waiting: Vec<SocketHandle> = (0..BACKLOG).map(|_| listener(&mut sockets)).collect();
    let mut active: Vec<SocketHandle> = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        iface.poll(now(), &mut card, &mut sockets);
        let mut idle = true;
        let (taken, rest): (Vec<_>, Vec<_>) = waiting
            .drain(..)
            .partition(|handle| sockets.get::<tcp::Socket<'_>>(*handle).state() != tcp::State::Listen);
        waiting = rest;
        waiting.extend((0..taken.len()).map(|_| listener(&mut sockets)));
        active.extend(taken);
        active.retain(|handle| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(*handle);
            while socket.can_recv() && socket.can_send() {
                let room = socket.send_capacity() - socket.send_queue();
                let data = socket.recv(|data| {
                    let count = data.len().min(room);
                    (count, data[..count].iter().map(|b| b.wrapping_add(1)).collect::<Vec<_>>())
                });
                match data {
                    Ok(data) if !data.is_empty() => {
                        idle = false;
                        assert_eq!(socket.send_slice(&data), Ok(data.len()));
                    }
                    _ => break,
                }
            }
            if !socket.may_recv() && socket.recv_queue() == 0 && socket.may_send() {
                socket.close();
            }
            if socket.state() == tcp::State::Closed || socket.state() == tcp::State::TimeWait {
                sockets.remove(*handle);
                return false;
            }
            true
        });
        if idle && card.wire.frames.lock().unwrap().is_empty() {
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}

/// A stream of numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// One connection: sends, compares, and ends in one of the ways that there are.
fn converse(to: SocketAddr, numbers: &mut Numbers, opened: Option<&Barrier>) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(120))).unwrap();
    if let Some(all) = opened {
        all.wait();
    }
    for _ in 0..1 + numbers.next(3) {
        let sent: Vec<u8> = (0..1 + numbers.next(6000)).map(|_| numbers.next(256) as u8).collect();
        stream.write_all(&sent).unwrap();
        let mut got = vec![0; sent.len()];
        stream.read_exact(&mut got).unwrap();
        assert!(got.iter().zip(&sent).all(|(got, sent)| *got == sent.wrapping_add(1)));
    }
    match numbers.next(3) {
        0 => {
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "the end comes back");
        }
        // With an answer on its way.
        1 => drop(stream.write_all(&[1; 100])),
        _ => {}
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A stack with a guest behind it that serves a port of the host.
struct Served {
    to: SocketAddr,
    wire: Arc<Wire>,
    stop: Arc<AtomicBool>,
    guest: std::thread::JoinHandle<()>,
    nat: Arc<Nat>,
}

/// `large`: packets of the stack are cut for the guest, as in machines.
fn served(large: bool) -> Served {
    let wire = Arc::new(Wire::default());
    let mut config = NatConfig::for_slot(0);
    config.large = large;
    let nat = Arc::new(Nat::start(&config, wire.clone()).unwrap());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    nat.add_rule(Rule {
        name: "web".into(),
        protocol: Protocol::Tcp,
        host: Ipv4Addr::LOCALHOST.into(),
        host_port: port,
        guest: None,
        guest_port: 80,
    })
    .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (card, guest_stop) = (Card { wire: wire.clone(), nat: nat.clone() }, stop.clone());
    let guest = std::thread::spawn(move || guest(card, &guest_stop));
    Served { to: SocketAddr::from((Ipv4Addr::LOCALHOST, port)), wire, stop, guest, nat }
}

/// `parallel` connections at once to begin with, each followed by `rounds` more. `large` as in [`served`].
fn storm(parallel: usize, rounds: usize, large: bool) {
    let Served { to, stop, guest, nat: _nat, .. } = served(large);
    converse(to, &mut Numbers(99), None);
    let before = descriptors();
    let all_open = Arc::new(Barrier::new(parallel));
    let done = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..parallel)
        .map(|client| {
            let (all_open, done) = (all_open.clone(), done.clone());
            let client = move || {
                let mut numbers = Numbers(client as u64 + 1);
                converse(to, &mut numbers, Some(&all_open));
                for _ in 0..rounds {
                    std::thread::sleep(Duration::from_millis(numbers.next(50)));
                    converse(to, &mut numbers, None);
                }
                done.fetch_add(1, Ordering::SeqCst);
            };
            std::thread::Builder::new().stack_size(128 << 10).spawn(client).unwrap()
        })
        .collect();
    let failed = clients.into_iter().filter_map(|client| client.join().err()).count();
    assert_eq!((failed, done.load(Ordering::SeqCst)), (0, parallel));
    // Connections that were broken off are noticed by their next packets.
    let end = Instant::now() + Duration::from_secs(90);
    while descriptors() > before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = descriptors();
    assert!(after <= before, "{before} descriptors before, {after} after");
    converse(to, &mut Numbers(7), None);
    stop.store(true, Ordering::SeqCst);
    guest.join().unwrap();
}

/// Bytes sent that the peer's host has not acknowledged.
#[allow(unsafe_code)] // std and rustix do not show TCP_INFO
fn unacknowledged(stream: &TcpStream) -> u32 {
    use std::os::fd::AsRawFd;
    // SAFETY: zero is a valid value of each field.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &mut len,
        )
    };
    assert_eq!(result, 0);
    info.tcpi_unacked
}

/// A program that writes in pieces (Vagrant's SSH) has its next piece sent only after that.
#[test]
fn what_the_guest_does_not_answer_is_acknowledged_by_the_host() {
    let Served { to, wire, stop, guest, nat: _nat } = served(false);
    let mut stream = TcpStream::connect(to).unwrap();
    // After some questions and answers the host delays acknowledgments, to send them with the answers.
    for round in 0..50 {
        stream.write_all(&[round]).unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    guest.join().unwrap();
    let data = |frame: &Vec<u8>| frame.len() > 54 && frame[23] == 6 && frame.ends_with(b"\xa5\xa5\xa5\xa5");
    stream.write_all(&[0xa5; 8]).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    while !wire.frames.lock().unwrap().iter().any(data) {
        assert!(Instant::now() < end, "the guest gets the data");
        std::thread::yield_now();
    }
    assert_eq!(unacknowledged(&stream), 0);
}

#[test]
fn forwarded_connections_carry_their_data_and_leave_nothing() {
    storm(40, 2, false);
    storm(40, 2, true);
}

/// The heavy form: `cargo test -p netstack --test forwarding -- --ignored`.
#[test]
#[ignore = "takes a minute; tools/test-heavy runs it"]
fn a_thousand_parallel_connections_at_random() {
    storm(1000, 3, true);
}
