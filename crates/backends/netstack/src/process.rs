//! The process of one network: a switch that machines are plugged into, with the network's services and its way to the host.
//!
//! One thread moves the frames, between sockets without waiting: who is slow loses frames, nobody else. NAT has a thread of its own
//! ([`crate::nat`]). The process ends when no machine has been in the network for a while, unless it is pinned. Whoever kills it breaks the
//! cables, no more: the machines' links ask the service for another ([`crate::link`]), and leases are in their file.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use crate::dhcp::{Leases, Server};
use crate::host::{self, HostError, MAX_READ, Received, Way};
use crate::link::MAX_FRAME;
use crate::mac::Mac;
use crate::nat::{Guest, Nat, NatConfig};
use crate::protocol::{MAX_MESSAGE, NatNetwork, Network, Reply, Request, Status, Trunk};
use crate::switch::{PortId, Role, Switch};

/// How long a network without machines stays.
pub const LINGER: Duration = Duration::from_secs(5);
/// Frames that may wait for a slow port.
const QUEUE: usize = 512;
/// Frames of one port that are passed on before the others' turn.
const BATCH: usize = 64;
/// Connections there can be: more than machines have cards, and a bound on what a mistake costs.
const CONNECTIONS: usize = 1024;

/// A connection to the process.
struct Connection {
    socket: OwnedFd,
    /// It is a machine's cable.
    port: Option<Port>,
    dead: bool,
}

struct Port {
    id: PortId,
    label: String,
    queue: VecDeque<Vec<u8>>,
}

struct TrunkPort {
    id: PortId,
    config: Trunk,
    way: Way,
}

struct DhcpPort {
    id: PortId,
    server: Server,
}

struct NatPort {
    id: PortId,
    config: NatNetwork,
    nat: Nat,
    outside: Arc<Outside>,
}

/// What NAT has for the network.
struct Outside {
    queue: Mutex<VecDeque<Vec<u8>>>,
    wake: OwnedFd,
    /// Router advertisements offer no way to everywhere.
    no_default_route: bool,
}

impl Guest for Outside {
    fn receive(&self, frame: &[u8]) -> bool {
        let mut queue = self.queue.lock();
        if queue.len() >= QUEUE {
            return false;
        }
        let mut frame = frame.to_vec();
        if self.no_default_route {
            without_default_route(&mut frame);
        }
        queue.push_back(frame);
        drop(queue);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        true
    }

    /// Frames that found no room were dropped: the machines' own protocols repeat them.
    fn ready(&self) {}
}

/// Sets the lifetime as a default router in a router advertisement to zero (RFC 4861, section 4.2), and its checksum right.
fn without_default_route(frame: &mut [u8]) {
    const TYPE: usize = 14 + 40;
    let advertisement = frame.get(12..14) == Some(&[0x86, 0xdd])
        && frame.get(20) == Some(&58)
        && frame.get(TYPE) == Some(&134);
    let Some(message) = frame.get_mut(TYPE..).filter(|m| advertisement && m.len() >= 16) else { return };
    let word = |m: &[u8], at: usize| u32::from(u16::from_be_bytes([m[at], m[at + 1]]));
    // The sum without the old word: RFC 1624.
    let sum = (word(message, 2) ^ 0xffff) + (word(message, 6) ^ 0xffff);
    let folded = (sum & 0xffff) + (sum >> 16);
    let [.., high, low] = (!folded).to_be_bytes();
    message[2..4].copy_from_slice(&[high, low]);
    message[6..8].fill(0);
}

/// A network's process.
pub struct Process {
    listener: OwnedFd,
    network: Network,
    switch: Switch,
    connections: Vec<Connection>,
    trunk: Option<TrunkPort>,
    dhcp: Option<DhcpPort>,
    nat: Option<NatPort>,
    wake: OwnedFd,
    /// Since when no machine is there.
    alone: Instant,
    linger: Duration,
    stop: bool,
    frames: u64,
    dropped: u64,
    targets: Vec<PortId>,
}

impl Process {
    /// `listener` is a listening socket of type `SOCK_SEQPACKET`.
    pub fn new(listener: OwnedFd, name: &str, linger: Duration) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        Ok(Self {
            listener,
            network: Network::internal(name),
            switch: Switch::default(),
            connections: Vec::new(),
            trunk: None,
            dhcp: None,
            nat: None,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            alone: Instant::now(),
            linger,
            stop: false,
            frames: 0,
            dropped: 0,
            targets: Vec::new(),
        })
    }

    /// Serves the network until nobody needs it.
    pub fn run(mut self) {
        let mut buffer = vec![0; MAX_MESSAGE.max(MAX_FRAME).max(MAX_READ)];
        while !self.stop {
            let left =
                if self.in_use() { None } else { Some(self.linger.saturating_sub(self.alone.elapsed())) };
            if left == Some(Duration::ZERO) {
                break;
            }
            self.turn(left, &mut buffer);
            self.bury();
        }
        self.save_leases();
        tracing::info!(target: "net", "network \"{}\" ends", self.network.name);
    }

    fn in_use(&self) -> bool {
        self.network.pinned || self.connections.iter().any(|c| c.port.is_some())
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self, limit: Option<Duration>, buffer: &mut [u8]) {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
        ];
        if let Some(trunk) = &self.trunk {
            fds.push(PollFd::from_borrowed_fd(trunk.way.as_fd(), PollFlags::IN));
        }
        let first = fds.len();
        for connection in &self.connections {
            let mut wanted = PollFlags::IN;
            wanted.set(PollFlags::OUT, connection.port.as_ref().is_some_and(|p| !p.queue.is_empty()));
            fds.push(PollFd::from_borrowed_fd(connection.socket.as_fd(), wanted));
        }
        let limit =
            limit.map(|d| Timespec { tv_sec: d.as_secs().cast_signed(), tv_nsec: d.subsec_nanos().into() });
        if let Err(error) = poll(&mut fds, limit.as_ref()) {
            if error != Errno::INTR {
                tracing::error!(target: "net", "poll: {error}");
                std::thread::sleep(Duration::from_millis(100));
            }
            return;
        }
        let seen: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        let now = Instant::now();
        if seen.get(1).is_some_and(|f| !f.is_empty()) {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            self.read_nat(now);
        }
        if first == 3 && seen.get(2).is_some_and(|f| !f.is_empty()) {
            self.read_trunk(buffer, now);
        }
        for (at, flags) in seen.iter().skip(first).enumerate() {
            if flags.contains(PollFlags::OUT) {
                self.flush(at);
            }
            if flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                self.read_connection(at, buffer, now);
            }
        }
        if seen.first().is_some_and(|f| !f.is_empty()) {
            self.accept();
        }
        self.save_leases();
    }

    fn accept(&mut self) {
        match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                let own = rustix::process::geteuid();
                let peer = rustix::net::sockopt::socket_peercred(&socket).map(|c| c.uid);
                if peer == Ok(own) && self.connections.len() < CONNECTIONS {
                    self.connections.push(Connection { socket, port: None, dead: false });
                } else {
                    tracing::warn!(target: "net", "a connection is refused: peer {peer:?}");
                }
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                tracing::error!(target: "net", "accept: {error}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    /// Removes connections that ended.
    fn bury(&mut self) {
        let was_used = self.in_use();
        let switch = &mut self.switch;
        self.connections.retain(|connection| {
            if let Some(port) = connection.port.as_ref().filter(|_| connection.dead) {
                switch.remove(port.id);
                tracing::info!(target: "net", "{} leaves", port.label);
            }
            !connection.dead
        });
        if was_used && !self.in_use() {
            self.alone = Instant::now();
        }
    }

    fn read_connection(&mut self, at: usize, buffer: &mut [u8], now: Instant) {
        for _ in 0..BATCH {
            let Some(connection) = self.connections.get_mut(at).filter(|c| !c.dead) else { return };
            let port = connection.port.as_ref().map(|p| p.id);
            match recv(&connection.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => connection.dead = true,
                Ok((length, whole)) => {
                    // A message longer than the buffer is none of ours.
                    let message = buffer.get(..length).filter(|_| whole <= length).unwrap_or_default();
                    match port {
                        Some(id) => self.forward(id, message, now),
                        None => self.request(at, message),
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(_) => connection.dead = true,
            }
        }
    }

    fn read_trunk(&mut self, buffer: &mut [u8], now: Instant) {
        for _ in 0..BATCH {
            let Some(trunk) = &self.trunk else { return };
            let id = trunk.id;
            match trunk.way.read(&mut *buffer) {
                Err(Errno::AGAIN | Errno::INTR | Errno::NETDOWN) => return,
                Ok(Received::Frame(frame)) => self.forward(id, frame, now),
                Ok(Received::Cut(frames)) => frames.iter().for_each(|frame| self.forward(id, frame, now)),
                Err(error) => {
                    tracing::warn!(target: "net", "the way to the host is gone: {error}");
                    self.switch.remove(id);
                    self.trunk = None;
                    return;
                }
            }
        }
    }

    fn read_nat(&mut self, now: Instant) {
        let Some(nat) = &self.nat else { return };
        let (id, outside) = (nat.id, nat.outside.clone());
        let frames = std::mem::take(&mut *outside.queue.lock());
        if frames.is_empty() {
            return;
        }
        for frame in frames {
            self.forward(id, &frame, now);
        }
        if let Some(nat) = &self.nat {
            nat.nat.resume();
        }
    }

    /// Passes a frame on.
    fn forward(&mut self, from: PortId, frame: &[u8], now: Instant) {
        let mut targets = std::mem::take(&mut self.targets);
        self.switch.route(from, frame, now, &mut targets);
        for target in &targets {
            self.deliver(*target, frame, now);
        }
        self.targets = targets;
        self.frames += 1;
    }

    fn deliver(&mut self, to: PortId, frame: &[u8], now: Instant) {
        if let Some(dhcp) = self.dhcp.as_mut().filter(|d| d.id == to) {
            let Some(answer) = dhcp.server.receive(frame, unix_time()) else { return };
            let from = dhcp.id;
            // The list of targets is in use: an answer is routed with one of its own.
            let mut targets = Vec::new();
            self.switch.route(from, &answer, now, &mut targets);
            for target in targets {
                self.deliver(target, &answer, now);
            }
        } else if let Some(nat) = self.nat.as_ref().filter(|n| n.id == to) {
            if nat.nat.send(frame.to_vec()).is_err() {
                self.dropped += 1;
            }
        } else if let Some(trunk) = self.trunk.as_ref().filter(|t| t.id == to) {
            if trunk.way.write(frame).is_err() {
                self.dropped += 1;
            }
        } else if let Some(connection) =
            self.connections.iter_mut().find(|c| c.port.as_ref().is_some_and(|p| p.id == to))
        {
            let Connection { socket, port: Some(port), dead } = connection else { return };
            if port.queue.is_empty() {
                match send(&*socket, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(_) => return,
                    Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => {}
                    Err(_) => {
                        *dead = true;
                        return;
                    }
                }
            }
            if port.queue.len() < QUEUE {
                port.queue.push_back(frame.to_vec());
            } else {
                self.dropped += 1;
            }
        }
    }

    /// Sends what waits for a port.
    fn flush(&mut self, at: usize) {
        let Some(Connection { socket, port: Some(port), dead }) = self.connections.get_mut(at) else {
            return;
        };
        while let Some(frame) = port.queue.front() {
            match send(&*socket, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => drop(port.queue.pop_front()),
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => return,
                Err(_) => {
                    *dead = true;
                    return;
                }
            }
        }
    }

    fn request(&mut self, at: usize, message: &[u8]) {
        let reply = match serde_json::from_slice(message) {
            Ok(Request::Configure(network)) => match self.configure(*network) {
                Ok(notes) => Reply::Done { notes },
                Err(error) => Reply::Refused(error),
            },
            Ok(Request::Join(port)) => {
                // The answer goes first: what follows on the connection are frames.
                if !self.reply(at, &Reply::Done { notes: Vec::new() }) {
                    return;
                }
                tracing::info!(target: "net", "{} joins with {}, {:?}", port.label, port.mac, port.policy);
                let id = self.switch.add(Role::Card { mac: port.mac, policy: port.policy });
                if let Some(connection) = self.connections.get_mut(at) {
                    connection.port = Some(Port { id, label: port.label, queue: VecDeque::new() });
                }
                return;
            }
            Ok(Request::Status) => Reply::Status(Box::new(self.status())),
            Ok(Request::Stop) => {
                self.stop = true;
                Reply::Done { notes: Vec::new() }
            }
            Err(error) => Reply::Refused(format!("the request is not understood: {error}")),
        };
        self.reply(at, &reply);
    }

    fn reply(&mut self, at: usize, reply: &Reply) -> bool {
        let Some(connection) = self.connections.get_mut(at) else { return false };
        let text = serde_json::to_vec(reply).unwrap_or_default();
        connection.dead |=
            send(&connection.socket, &text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_err();
        !connection.dead
    }

    fn status(&self) -> Status {
        Status {
            pid: std::process::id(),
            network: self.network.clone(),
            ports: self.connections.iter().filter_map(|c| c.port.as_ref()).map(|p| p.label.clone()).collect(),
            frames: self.frames,
            dropped: self.dropped,
        }
    }

    /// Makes the network what it is to be; what is as it was goes on undisturbed. Returns what does not work though the network does.
    fn configure(&mut self, network: Network) -> Result<Vec<String>, String> {
        let mut notes = Vec::new();
        if self.trunk.as_ref().map(|t| &t.config) != network.trunk.as_ref() {
            let opened = network.trunk.clone().map(|config| open_trunk(&config).map(|way| (config, way)));
            let opened = opened.transpose().map_err(|e| describe(&e))?;
            if let Some(old) = self.trunk.take() {
                self.switch.remove(old.id);
            }
            self.trunk =
                opened.map(|(config, way)| TrunkPort { id: self.switch.add(Role::Trunk), config, way });
        }
        match (&mut self.dhcp, network.dhcp.clone()) {
            (Some(dhcp), Some(config)) if *dhcp.server.config() == config => {}
            (Some(dhcp), Some(config)) if dhcp.server.config().leases == config.leases => {
                dhcp.server.reconfigure(config).map_err(|e| format!("DHCP server: {e}"))?;
            }
            (_, Some(config)) => {
                let leases = Leases::load(&config.leases).unwrap_or_else(|e| {
                    notes.push(format!("DHCP server: {}; it begins without leases", describe(&e)));
                    Leases::default()
                });
                let mac = Mac::derived(&format!("{}/dhcp", network.name));
                let server = Server::new(config, mac, leases).map_err(|e| format!("DHCP server: {e}"))?;
                if let Some(old) = self.dhcp.take() {
                    self.switch.remove(old.id);
                }
                self.dhcp = Some(DhcpPort { id: self.switch.add(Role::Service { mac }), server });
            }
            (_, None) => {
                self.save_leases();
                if let Some(old) = self.dhcp.take() {
                    self.switch.remove(old.id);
                }
            }
        }
        self.configure_nat(network.nat.clone(), &mut notes)?;
        if self.network != network {
            tracing::info!(target: "net", "network \"{}\" is configured", network.name);
        }
        if self.network.pinned && !network.pinned {
            self.alone = Instant::now();
        }
        self.network = network;
        for note in &notes {
            tracing::warn!(target: "net", "{note}");
        }
        Ok(notes)
    }

    fn configure_nat(&mut self, wanted: Option<NatNetwork>, notes: &mut Vec<String>) -> Result<(), String> {
        let Some(wanted) = wanted else {
            if let Some(old) = self.nat.take() {
                self.switch.remove(old.id);
            }
            return Ok(());
        };
        let same = |a: &NatNetwork, b: &NatNetwork| *a == NatNetwork { rules: a.rules.clone(), ..b.clone() };
        if self.nat.as_ref().is_none_or(|nat| !same(&nat.config, &wanted)) {
            if let Some(old) = self.nat.take() {
                self.switch.remove(old.id);
            }
            let (nat, outside) = self.start_nat(&wanted, notes)?;
            let id = self.switch.add(Role::Router);
            let config = NatNetwork { rules: Vec::new(), ..wanted.clone() };
            self.nat = Some(NatPort { id, config, nat, outside });
        }
        let Some(port) = &mut self.nat else { return Ok(()) };
        for rule in port.config.rules.iter().filter(|r| !wanted.rules.contains(r)) {
            // One that never came to be is not there.
            let _ = port.nat.remove_rule(&rule.name);
        }
        for rule in wanted.rules.iter().filter(|r| !port.config.rules.contains(r)) {
            if let Err(error) = port.nat.add_rule(rule.clone()) {
                notes.push(describe(&error));
            }
        }
        port.config = wanted;
        Ok(())
    }

    fn start_nat(&self, wanted: &NatNetwork, notes: &mut Vec<String>) -> Result<(Nat, Arc<Outside>), String> {
        // libslirp has one address that stands for the host's own.
        let local = |(host, _): &&(IpAddr, Ipv4Addr)| *host == IpAddr::V4(Ipv4Addr::LOCALHOST);
        let loopback = wanted.loopbacks.iter().find(local).map(|(_, address)| *address);
        for (host, address) in wanted.loopbacks.iter().filter(|l| !local(l)) {
            notes.push(format!(
                "the loopback mapping {host} to {address} is not available: only 127.0.0.1 can be mapped"
            ));
        }
        let mut config = NatConfig::shared(wanted.network, wanted.prefix, wanted.gateway, loopback)
            .map_err(|e| describe(&e))?;
        config.ipv6 = wanted.ipv6;
        let wake = self.wake.try_clone().map_err(|e| e.to_string())?;
        let no_default_route = !wanted.ipv6_default_route;
        let outside = Arc::new(Outside { queue: Mutex::default(), wake, no_default_route });
        let nat = Nat::start(&config, outside.clone()).map_err(|e| describe(&e))?;
        Ok((nat, outside))
    }

    fn save_leases(&mut self) {
        let Some(dhcp) = self.dhcp.as_mut() else { return };
        if dhcp.server.take_changed()
            && let Err(error) = dhcp.server.leases().save(&dhcp.server.config().leases)
        {
            tracing::error!(target: "dhcp", "{}", describe(&error));
        }
    }
}

fn open_trunk(trunk: &Trunk) -> Result<Way, HostError> {
    let way = match trunk {
        Trunk::HostOnly(name) => host::open_host_only(name)?,
        Trunk::Bridged(name) => host::open_bridged(name)?,
    };
    rustix::io::ioctl_fionbio(&way, true).map_err(|e| HostError::Other {
        what: "the way to the host cannot be used".into(),
        source: e.into(),
    })?;
    Ok(way)
}

/// An error with its causes.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(" ({error})"));
        cause = error.source();
    }
    text
}

fn unix_time() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs().cast_signed())
}
