//! NAT: one stack, one thread. The guest's frames come in through a bounded queue; frames for the guest wait in the stack's queue, and
//! while the guest takes none, the host's sockets are not read, so that the senders slow down instead of losing data.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use crate::large;
use crate::slirp::{self, Addresses, MAX_FRAME, Slirp};

/// The guest's MTU unless the configuration says otherwise.
const DEFAULT_MTU: u16 = 1500;
/// What comes before a packet in a frame.
const ETHERNET: usize = 14;
/// Frames from the guest that may wait.
const QUEUE: usize = 512;
/// Frames for the guest that may wait before the host's sockets are left alone.
const BACKLOG: usize = 64;
/// Frames for the guest beyond which its own frames, which cause answers, are left waiting too.
const BACKLOG_LIMIT: usize = 1024;

/// Why NAT or one of its rules does not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("\"{0}\" is not an IPv4 network like 10.0.2.0/24, with a prefix of 8 to 27 bits")]
    Network(String),
    #[error("libslirp refuses the network {0}")]
    Stack(Ipv4Addr),
    #[error("the NAT engine's thread cannot be started")]
    Thread(#[source] std::io::Error),
    #[error("a port-forwarding rule called \"{0}\" exists already")]
    Exists(String),
    #[error("there is no port-forwarding rule called \"{0}\"")]
    NoRule(String),
    #[error("port-forwarding rule \"{0}\": ports are 1 to 65535")]
    Port(String),
    #[error("port-forwarding rule \"{0}\" has an IPv4 and an IPv6 address")]
    Families(String),
    #[error("port-forwarding rule \"{name}\" cannot listen at {at}")]
    Listen { name: String, at: SocketAddr, source: std::io::Error },
    #[error("the NAT engine has ended")]
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// A port-forwarding rule: a port of the host that leads to one of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub name: String,
    pub protocol: Protocol,
    /// Unspecified for all addresses of the host.
    pub host: IpAddr,
    pub host_port: u16,
    /// The address that DHCP gives first, if `None`.
    pub guest: Option<IpAddr>,
    pub guest_port: u16,
}

/// What the router's TFTP server offers, and what DHCP says about booting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tftp {
    /// The folder whose files are served, for reading.
    pub folder: PathBuf,
    pub boot_file: String,
    /// The server that DHCP names in place of the router.
    pub next_server: Option<Ipv4Addr>,
}

/// A NAT network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatConfig {
    network: Ipv4Addr,
    prefix: u8,
    /// Bytes; 0 for the usual 1500.
    pub mtu: u16,
    /// The guest reaches the host's loopback interface through its gateway.
    pub host_loopback: bool,
    pub tftp: Tftp,
    /// The guest takes TCP packets that are longer than frames: [`Guest::receive_packet`].
    pub large: bool,
    /// Where the router of a network that machines share is. It serves no DHCP: the network has a server of its own.
    shared: Option<Shared4>,
    /// The IPv6 prefix, of 64 bits.
    pub ipv6: Option<Ipv6Addr>,
}

/// The addresses of a shared network's router.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shared4 {
    gateway: Ipv4Addr,
    /// The address that stands for the host's loopback interface.
    loopback: Option<Ipv4Addr>,
}

impl NatConfig {
    /// The network of the card in `slot` (from 0) as VirtualBox numbers them: 10.0.2.0/24 for the first.
    pub fn for_slot(slot: u8) -> Self {
        Self {
            network: Ipv4Addr::new(10, 0, slot.saturating_add(2), 0),
            prefix: 24,
            mtu: 0,
            host_loopback: false,
            tftp: Tftp::default(),
            large: false,
            shared: None,
            ipv6: None,
        }
    }

    /// A network that machines share, with the router at `gateway`, which is its name server too. `loopback` leads to the host's
    /// loopback interface.
    pub fn shared(
        network: Ipv4Addr,
        prefix: u8,
        gateway: Ipv4Addr,
        loopback: Option<Ipv4Addr>,
    ) -> Result<Self, Error> {
        if !(1..=30).contains(&prefix) {
            return Err(Error::Network(format!("{network}/{prefix}")));
        }
        let network = Ipv4Addr::from(u32::from(network) & mask(prefix));
        let host_loopback = loopback.is_some();
        let shared = Some(Shared4 { gateway, loopback });
        let tftp = Tftp::default();
        Ok(Self { network, prefix, mtu: 0, host_loopback, tftp, large: false, shared, ipv6: None })
    }

    /// The same in the network `cidr`, as `--natnet` takes it: address, slash, bits.
    pub fn with_network(self, cidr: &str) -> Result<Self, Error> {
        let parse = || {
            let (address, bits) = cidr.split_once('/')?;
            let address: Ipv4Addr = address.trim().parse().ok()?;
            // The router's and the guest's addresses, .2 to .15, must lie inside and below the broadcast address.
            let prefix: u8 = bits.trim().parse().ok().filter(|p| (8..=27).contains(p))?;
            Some((address, prefix))
        };
        let (address, prefix) = parse().ok_or_else(|| Error::Network(cidr.to_owned()))?;
        Ok(Self { network: Ipv4Addr::from(u32::from(address) & mask(prefix)), prefix, ..self })
    }

    fn host(&self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | number)
    }

    /// The router, which is also the DHCP server: number 2 of the network.
    pub fn gateway(&self) -> Ipv4Addr {
        self.host(2)
    }

    /// The name server: number 3. It asks the host's.
    pub fn dns(&self) -> Ipv4Addr {
        self.host(3)
    }

    /// What DHCP gives first: number 15.
    pub fn guest(&self) -> Ipv4Addr {
        self.host(15)
    }

    fn addresses(&self) -> Addresses {
        let (gateway, dns) = match &self.shared {
            // To libslirp, the gateway is the address that stands for the host; packets for elsewhere reach it by any.
            Some(shared) => (shared.loopback.unwrap_or(shared.gateway), shared.gateway),
            None => (self.gateway(), self.dns()),
        };
        Addresses {
            network: self.network,
            mask: Ipv4Addr::from(mask(self.prefix)),
            gateway,
            dns,
            guest: self.guest(),
            dhcp: self.shared.is_none(),
            ipv6: self.ipv6,
        }
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX << (32 - u32::from(prefix))
}

/// The guest's end. Called on the NAT thread with no lock held.
pub trait Guest: Send + Sync {
    /// A frame; false if there is no room, in which case it is offered again after [`Nat::resume`].
    fn receive(&self, frame: &[u8]) -> bool;
    /// As above for a TCP packet that would be several frames of `mss` bytes of data each. Called with [`NatConfig::large`] alone.
    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        let _ = (packet, mss);
        true
    }
    /// [`Nat::send`] has room again after it refused a frame.
    fn ready(&self);
}

enum Command {
    Add(Rule, SyncSender<Result<(), Error>>),
    Remove(String, SyncSender<Result<(), Error>>),
    Quit,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Vec<u8>>,
    commands: Vec<Command>,
    /// A frame was refused: tell the guest when there is room.
    refused: bool,
    /// The guest has room again.
    resumed: bool,
    /// The thread has been woken and has not looked yet.
    woken: bool,
    ended: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: OwnedFd,
}

impl Shared {
    fn change<R>(&self, change: impl FnOnce(&mut Queue) -> R) -> R {
        let mut queue = self.queue.lock();
        let result = change(&mut queue);
        if !std::mem::replace(&mut queue.woken, true) {
            // Fails only when the counter is full, and then the thread is awake.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        result
    }
}

/// A running NAT network; ends when dropped.
pub struct Nat {
    shared: Arc<Shared>,
    rules: Arc<Mutex<Vec<Rule>>>,
    thread: Option<JoinHandle<()>>,
}

impl Nat {
    /// Starts the network with `guest` in it.
    pub fn start(config: &NatConfig, guest: Arc<dyn Guest>) -> Result<Self, Error> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::Thread(e.into()))?;
        let shared = Arc::new(Shared { queue: Mutex::default(), wake });
        let rules = Arc::new(Mutex::new(Vec::new()));
        let (told, answer) = sync_channel(1);
        let engine_shared = shared.clone();
        let engine_rules = rules.clone();
        let engine_config = config.clone();
        let thread = std::thread::Builder::new()
            .name("nat".into())
            .spawn(move || {
                let config = engine_config;
                let mtu = if config.mtu == 0 { DEFAULT_MTU } else { config.mtu };
                let inner = if config.large { mtu.max(large::MTU) } else { mtu };
                let Some(slirp) = Slirp::new(&config.addresses(), inner.into(), config.host_loopback, &config.tftp) else {
                    let _ = told.send(Err(Error::Stack(config.network)));
                    return;
                };
                tracing::info!(target: "nat", "network {}/{}, libslirp {}", config.network, config.prefix, slirp::version());
                let _ = told.send(Ok(()));
                let guest_address = config.guest();
                Engine {
                    slirp,
                    shared: engine_shared,
                    rules: engine_rules,
                    guest,
                    guest_address,
                    blocked: false,
                    large: config.large,
                    mtu: mtu.into(),
                    sizes: large::Sizes::new(mtu),
                }
                .run();
            })
            .map_err(Error::Thread)?;
        answer.recv().unwrap_or(Err(Error::Ended))?;
        Ok(Self { shared, rules, thread: Some(thread) })
    }

    /// Queues a frame of the guest; gives it back if the queue is full. Never blocks for longer than the queue's lock.
    pub fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        if frame.len() > MAX_FRAME {
            return Ok(());
        }
        self.shared.change(|queue| {
            if queue.frames.len() >= QUEUE {
                queue.refused = true;
                return Err(frame);
            }
            queue.frames.push_back(frame);
            Ok(())
        })
    }

    /// The guest has room for frames again.
    pub fn resume(&self) {
        self.shared.change(|queue| queue.resumed = true);
    }

    /// The port-forwarding rules in force.
    pub fn rules(&self) -> Vec<Rule> {
        self.rules.lock().clone()
    }

    fn ask(&self, command: impl FnOnce(SyncSender<Result<(), Error>>) -> Command) -> Result<(), Error> {
        let (told, answer) = sync_channel(1);
        self.shared.change(|queue| {
            if !queue.ended {
                queue.commands.push(command(told));
            }
        });
        answer.recv().unwrap_or(Err(Error::Ended))
    }

    /// Starts to forward a port.
    pub fn add_rule(&self, rule: Rule) -> Result<(), Error> {
        self.ask(|told| Command::Add(rule, told))
    }

    /// Stops a forwarding; connections through it live on.
    pub fn remove_rule(&self, name: &str) -> Result<(), Error> {
        self.ask(|told| Command::Remove(name.to_owned(), told))
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.shared.change(|queue| queue.commands.push(Command::Quit));
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Engine {
    slirp: Slirp,
    shared: Arc<Shared>,
    rules: Arc<Mutex<Vec<Rule>>>,
    guest: Arc<dyn Guest>,
    guest_address: Ipv4Addr,
    /// The guest refused a frame and has not resumed.
    blocked: bool,
    /// The stack's packets may be larger than the guest's frames.
    large: bool,
    /// The longest packet of the guest's frames.
    mtu: usize,
    /// The segment sizes that the guest has named.
    sizes: large::Sizes,
}

impl Engine {
    fn run(mut self) {
        let mut full = false;
        loop {
            self.deliver();
            // Frames that were left in the queue need no other event.
            if !full || self.slirp.waiting() >= BACKLOG_LIMIT {
                self.slirp.wait(self.shared.wake.as_fd(), self.slirp.waiting() < BACKLOG);
            }
            full = self.slirp.waiting() >= BACKLOG_LIMIT;
            let (frames, commands, ready) = {
                let mut queue = self.shared.queue.lock();
                if std::mem::take(&mut queue.woken) {
                    let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
                }
                if std::mem::take(&mut queue.resumed) {
                    self.blocked = false;
                }
                let frames = if full { VecDeque::new() } else { std::mem::take(&mut queue.frames) };
                let ready = !full && std::mem::take(&mut queue.refused);
                (frames, std::mem::take(&mut queue.commands), ready)
            };
            for mut frame in frames {
                if self.large {
                    self.sizes.note(&mut frame);
                }
                self.slirp.input(&frame);
            }
            for command in commands {
                match command {
                    Command::Add(rule, told) => drop(told.send(self.add(rule))),
                    Command::Remove(name, told) => drop(told.send(self.remove(&name))),
                    Command::Quit => return self.end(),
                }
            }
            if ready {
                self.guest.ready();
            }
        }
    }

    fn end(self) {
        let mut queue = self.shared.queue.lock();
        queue.ended = true;
        queue.commands.clear();
    }

    /// Hands frames to the guest while it takes them.
    fn deliver(&mut self) {
        while !self.blocked {
            let Some(frame) = self.slirp.front() else { return };
            let size = if large::is_tcp(&frame) { self.sizes.of(&frame) } else { 0 };
            let longest = if size == 0 { self.mtu } else { large::HEADERS + usize::from(size) };
            let taken = if frame.len() <= ETHERNET + longest || !self.large {
                self.guest.receive(&frame)
            } else if size != 0 {
                self.guest.receive_packet(&frame, size)
            } else {
                // Others, and what has no use in pieces.
                let fragments = large::fragments(&frame, self.mtu).unwrap_or_default();
                fragments.into_iter().rev().for_each(|fragment| self.slirp.put_back(fragment));
                continue;
            };
            if !taken {
                self.slirp.put_back(frame);
                self.blocked = true;
            }
        }
    }

    fn add(&mut self, rule: Rule) -> Result<(), Error> {
        if rule.host_port == 0 || rule.guest_port == 0 {
            return Err(Error::Port(rule.name));
        }
        if self.rules.lock().iter().any(|r| r.name == rule.name) {
            return Err(Error::Exists(rule.name));
        }
        let guest = rule.guest.filter(|g| !g.is_unspecified()).unwrap_or(self.guest_address.into());
        if guest.is_ipv4() != rule.host.is_ipv4() {
            return Err(Error::Families(rule.name));
        }
        let at = SocketAddr::new(rule.host, rule.host_port);
        self.slirp
            .add_forward(rule.protocol == Protocol::Udp, at, SocketAddr::new(guest, rule.guest_port))
            .map_err(|source| Error::Listen { name: rule.name.clone(), at, source })?;
        self.rules.lock().push(rule);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), Error> {
        let mut rules = self.rules.lock();
        let at = rules.iter().position(|r| r.name == name).ok_or_else(|| Error::NoRule(name.to_owned()))?;
        let rule = rules.remove(at);
        self.slirp.remove_forward(rule.protocol == Protocol::Udp, SocketAddr::new(rule.host, rule.host_port));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
