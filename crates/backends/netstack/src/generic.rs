//! Networks by VirtualBox's generic driver: UDP tunnels and VDE.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Why a generic network cannot be.
#[derive(Debug, thiserror::Error)]
pub enum GenericError {
    #[error("the generic network driver \"{0}\" is unknown: there are \"UDPTunnel\" and \"VDE\"")]
    Driver(String),
    #[error("a UDP tunnel needs the property \"{0}\": set it with --nic-property<N> {0}=…")]
    Missing(&'static str),
    #[error("a UDP tunnel's property \"{name}\" is a port from 1 to 65535, not \"{value}\"")]
    Port { name: &'static str, value: String },
    #[error("a UDP tunnel's destination \"{dest}\" cannot be found")]
    Destination { dest: String, source: io::Error },
    #[error("a UDP tunnel cannot use the local port {port}")]
    Local { port: u16, source: io::Error },
    #[error("the VDE switch at \"{}\" cannot be reached: start one with vde_switch -s {0}", path.display())]
    Vde { path: PathBuf, source: io::Error },
}

/// A generic network, as the settings have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Generic {
    /// Frames travel as UDP datagrams, one each, from the local port `source` to `dest`.
    UdpTunnel { dest: String, dest_port: u16, source_port: u16 },
    /// A switch of Virtual Distributed Ethernet; its directory.
    Vde { network: PathBuf },
}

impl Generic {
    /// From the driver's name and properties.
    pub fn new(driver: &str, properties: &BTreeMap<String, String>) -> Result<Self, GenericError> {
        let property = |name: &str| properties.get(name).map(String::as_str).filter(|v| !v.is_empty());
        let port = |name: &'static str, default: u16| match property(name) {
            None => Ok(default),
            Some(value) => {
                let port = value.parse().ok().filter(|port| *port != 0);
                port.ok_or_else(|| GenericError::Port { name, value: value.into() })
            }
        };
        match driver {
            "UDPTunnel" => Ok(Self::UdpTunnel {
                dest: property("dest").ok_or(GenericError::Missing("dest"))?.into(),
                dest_port: port("dport", 4444)?,
                source_port: port("sport", 4444)?,
            }),
            "VDE" => Ok(Self::Vde { network: property("network").unwrap_or("/run/vde.ctl").into() }),
            other => Err(GenericError::Driver(other.into())),
        }
    }

    /// A socket on which each message is a frame, and what must be kept as long as it is used.
    pub fn connect(&self) -> Result<(OwnedFd, Option<Plug>), GenericError> {
        match self {
            Self::UdpTunnel { dest, dest_port, source_port } => {
                Ok((udp_tunnel(dest, *dest_port, *source_port)?.into(), None))
            }
            Self::Vde { network } => {
                let (socket, plug) =
                    vde(network).map_err(|source| GenericError::Vde { path: network.clone(), source })?;
                Ok((socket.into(), Some(plug)))
            }
        }
    }
}

fn udp_tunnel(dest: &str, dest_port: u16, source_port: u16) -> Result<UdpSocket, GenericError> {
    let unknown = |source| GenericError::Destination { dest: dest.into(), source };
    let to = (dest, dest_port).to_socket_addrs().map_err(unknown)?.next();
    let to = to.ok_or_else(|| unknown(io::ErrorKind::NotFound.into()))?;
    let any: SocketAddr =
        if to.is_ipv4() { ([0, 0, 0, 0], source_port).into() } else { ([0; 16], source_port).into() };
    let failed = |source| GenericError::Local { port: source_port, source };
    let socket = UdpSocket::bind(any).map_err(failed)?;
    // Datagrams of others do not come in.
    socket.connect(to).map_err(failed)?;
    Ok(socket)
}

/// A plug in a VDE switch: pulled out when dropped.
#[derive(Debug)]
pub struct Plug {
    _control: UnixStream,
}

/// `vdeplug` protocol, version 3: a request on the switch's control socket names our data socket; the answer names the switch's.
fn vde(network: &Path) -> io::Result<(UnixDatagram, Plug)> {
    const MAGIC: u32 = 0xfeed_face;
    const VERSION: u32 = 3;
    const NEW_CONTROL: u32 = 0;
    /// `sockaddr_un`: family and path.
    const ADDRESS: usize = 110;
    /// An abstract name as long as can be: the switch uses all of the path, with the zeros at its end.
    const NAME: usize = ADDRESS - 3;
    static NEXT: AtomicU32 = AtomicU32::new(0);

    let mut control = UnixStream::connect(network.join("ctl"))?;
    control.set_read_timeout(Some(Duration::from_secs(5)))?;
    // An abstract name: nothing is left behind in the file system.
    let pid = std::process::id();
    let name = format!("boxwood-vde-{pid}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let mut name = name.into_bytes();
    name.resize(NAME, 0);
    let data = UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(&name)?)?;
    let family = rustix::net::AddressFamily::UNIX.as_raw().to_ne_bytes();
    let mut request = Vec::new();
    for word in [MAGIC, VERSION, NEW_CONTROL] {
        request.extend(word.to_ne_bytes());
    }
    request.extend(family);
    request.push(0);
    request.extend(name);
    request.resize(12 + ADDRESS, 0);
    request.extend(b"Boxwood\0");
    control.write_all(&request)?;
    let mut answer = [0; ADDRESS];
    let length = control.read(&mut answer)?;
    let address = answer.get(..length).and_then(|a| a.strip_prefix(&family)).filter(|path| !path.is_empty());
    let address = address
        .ok_or_else(|| io::Error::new(io::ErrorKind::ConnectionRefused, "the switch refused the plug"))?;
    match address {
        [0, rest @ ..] => {
            data.connect_addr(&UnixAddr::from_abstract_name(rest)?)?;
        }
        path => {
            let end = path.iter().position(|b| *b == 0).unwrap_or(path.len());
            data.connect(Path::new(std::ffi::OsStr::from_bytes(path.get(..end).unwrap_or_default())))?;
        }
    }
    Ok((data, Plug { _control: control }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn properties(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn drivers_and_their_properties_are_checked() {
        let tunnel = properties(&[("dest", "127.0.0.1"), ("sport", "10001"), ("dport", "10002")]);
        assert_eq!(
            Generic::new("UDPTunnel", &tunnel).unwrap(),
            Generic::UdpTunnel { dest: "127.0.0.1".into(), dest_port: 10002, source_port: 10001 }
        );
        assert!(matches!(Generic::new("UDPTunnel", &BTreeMap::new()), Err(GenericError::Missing("dest"))));
        let wrong = properties(&[("dest", "x"), ("sport", "0")]);
        assert!(matches!(Generic::new("UDPTunnel", &wrong), Err(GenericError::Port { name: "sport", .. })));
        assert!(matches!(Generic::new("Wire", &BTreeMap::new()), Err(GenericError::Driver(_))));
        let vde = properties(&[("network", "/tmp/vde.ctl")]);
        assert_eq!(Generic::new("VDE", &vde).unwrap(), Generic::Vde { network: "/tmp/vde.ctl".into() });
    }

    #[test]
    fn two_ends_of_a_tunnel_exchange_frames() {
        let free = || UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (a, b) = (free(), free());
        let one = udp_tunnel("127.0.0.1", b, a).unwrap();
        let two = udp_tunnel("localhost", a, b).or_else(|_| udp_tunnel("127.0.0.1", a, b)).unwrap();
        one.send(&[7; 60]).unwrap();
        let mut buffer = [0; 100];
        two.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(two.recv(&mut buffer).unwrap(), 60);
    }

    /// The switch's side, as `vde_switch` does it.
    #[test]
    fn a_plug_tells_the_vde_switch_its_socket_and_takes_the_switchs() {
        let dir = std::env::temp_dir().join(format!("boxwood-vde-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let control = UnixListener::bind(dir.join("ctl")).unwrap();
        let data = UnixDatagram::bind(dir.join("data")).unwrap();
        let path = dir.join("data");
        let switch = std::thread::spawn(move || {
            let (mut client, _) = control.accept().unwrap();
            let mut request = [0; 12 + 110];
            client.read_exact(&mut request).unwrap();
            assert_eq!(u32::from_ne_bytes(request[..4].try_into().unwrap()), 0xfeed_face);
            let name = &request[15..];
            let mut answer = vec![1, 0];
            answer.extend(path.as_os_str().as_bytes());
            answer.resize(110, 0);
            client.write_all(&answer).unwrap();
            let plug = UnixAddr::from_abstract_name(name).unwrap();
            let mut buffer = [0; 100];
            assert_eq!(data.recv(&mut buffer).unwrap(), 60);
            data.send_to_addr(&[5; 70], &plug).unwrap();
        });
        let (socket, _plug) = vde(&dir).unwrap();
        socket.send(&[1; 60]).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 70);
        switch.join().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(vde(&dir).is_err());
    }
}
