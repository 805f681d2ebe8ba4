//! What is said to a network's process. Its socket is of type `SOCK_SEQPACKET`, each message one packet.
//!
//! A connection begins with a [`Request`] in JSON, which is answered by a [`Reply`] in JSON; any number of them follow each other. After a
//! [`Request::Join`] that was granted, the connection is a port of the switch: each message is an Ethernet frame, in either direction,
//! until either side closes it. Who asks is the service, which hands the connection on to a machine's process; frames are all that the
//! machine can send then.

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send,
    socket_with,
};
use serde::{Deserialize, Serialize};

use crate::dhcp;
use crate::mac::Mac;
use crate::nat::Rule;
use crate::switch::Policy;

/// The longest request or reply.
pub const MAX_MESSAGE: usize = 128 << 10;

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub name: String,
    /// It stays when no machine is in it.
    pub pinned: bool,
    pub trunk: Option<Trunk>,
    pub dhcp: Option<dhcp::Config>,
    pub nat: Option<NatNetwork>,
}

impl Network {
    /// A network with nothing in it but machines.
    pub fn internal(name: &str) -> Self {
        Self { name: name.into(), pinned: false, trunk: None, dhcp: None, nat: None }
    }
}

/// The network's way to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trunk {
    /// A host-only interface (a tap device) of this name.
    HostOnly(String),
    /// An interface of the host, to whose network the machines are bridged.
    Bridged(String),
}

/// A router to the outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatNetwork {
    pub network: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Ipv4Addr,
    /// The IPv6 prefix of 64 bits, if the network has IPv6.
    pub ipv6: Option<Ipv6Addr>,
    /// The router offers itself as the way to everywhere in IPv6.
    pub ipv6_default_route: bool,
    pub rules: Vec<Rule>,
    /// Loopback addresses of the host and the addresses that stand for them.
    pub loopbacks: Vec<(IpAddr, Ipv4Addr)>,
}

/// A machine's card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// For the log.
    pub label: String,
    pub mac: Mac,
    pub policy: Policy,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The network is to be so from now on.
    Configure(Box<Network>),
    /// Makes the connection a port.
    Join(Port),
    Status,
    /// Ends the process; machines' connections break.
    Stop,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done. What could not be done of it, though the network works, is said in the notes.
    Done {
        notes: Vec<String>,
    },
    Refused(String),
    Status(Box<Status>),
}

/// What goes on in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    pub network: Network,
    /// Labels of the machines' cards.
    pub ports: Vec<String>,
    /// Frames that were passed on, and those that were dropped because their receiver had no room.
    pub frames: u64,
    pub dropped: u64,
}

/// Why a network's process does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the network's process cannot be reached")]
    Io(#[from] std::io::Error),
    #[error("the answer of the network's process is not understood")]
    Answer,
    #[error("{0}")]
    Refused(String),
}

/// A connection to a network's process.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Connects to the process at `path`, if one is there.
    pub fn connect(path: &Path) -> std::io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let peer = rustix::net::sockopt::socket_peercred(&socket)?.uid;
        if peer != rustix::process::geteuid() {
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        // Starting NAT or opening a tap device takes milliseconds; a process that does not answer is stuck.
        set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT))?;
        Ok(Self { socket })
    }

    /// Asks for something; the notes of what does not work, or a status.
    pub fn ask(&self, request: &Request) -> Result<Reply, ClientError> {
        let text = serde_json::to_vec(request).map_err(std::io::Error::from)?;
        send(&self.socket, &text, SendFlags::NOSIGNAL).map_err(std::io::Error::from)?;
        let mut buffer = vec![0; MAX_MESSAGE];
        let (length, _) =
            recv(&self.socket, &mut buffer[..], RecvFlags::empty()).map_err(std::io::Error::from)?;
        match serde_json::from_slice(buffer.get(..length).unwrap_or_default()) {
            Ok(Reply::Refused(why)) => Err(ClientError::Refused(why)),
            Ok(reply) => Ok(reply),
            Err(_) if length == 0 => Err(ClientError::Io(std::io::ErrorKind::ConnectionReset.into())),
            Err(_) => Err(ClientError::Answer),
        }
    }

    /// Makes the connection a port.
    pub fn join(self, port: &Port) -> Result<OwnedFd, ClientError> {
        self.ask(&Request::Join(port.clone()))?;
        set_socket_timeout(&self.socket, Timeout::Recv, None).map_err(std::io::Error::from)?;
        Ok(self.socket)
    }
}

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Starts the process of the network `name` and waits until it can be reached at `socket`.
pub fn start(program: &Path, name: &str, socket: &Path, log: &Path) -> std::io::Result<()> {
    let mut child = Command::new(program)
        .args(["--network", name, "--socket"])
        .arg(socket)
        .arg("--log")
        .arg(log)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(4096)).read_line(&mut line)?;
    }
    match line.trim_end() {
        "ready" => {
            // Somebody has to wait for it, so that nothing is left of it when it ends.
            std::thread::Builder::new().name("network".into()).spawn(move || drop(child.wait()))?;
            Ok(())
        }
        why => {
            let _ = child.wait();
            Err(std::io::Error::other(format!("it did not start: {}", why.trim_start_matches("error: "))))
        }
    }
}
