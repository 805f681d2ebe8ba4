//! The host's network interfaces: what there is, host-only interfaces (tap devices), and the descriptors by which a network's frames reach
//! them. Some of this needs the capability `CAP_NET_ADMIN` or `CAP_NET_RAW`; errors name it.
#![allow(unsafe_code)] // ioctl() with the kernel's structures, packet sockets, getifaddrs()

use std::ffi::CStr;
use std::fs;
use std::io::{self, IoSlice};
use std::mem::zeroed;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use libc::{c_int, c_ulong, c_void};
use rustix::io::Errno;

use crate::mac::Mac;

/// How host-only interfaces are called, followed by a number.
pub const HOST_ONLY: &str = "vboxnet";
/// Host-only interfaces there can be.
const MOST_HOST_ONLY: u32 = 128;

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("the host has no network interface \"{0}\"")]
    Missing(String),
    #[error("\"{0}\" is no name of a host-only interface like vboxnet0")]
    Name(String),
    #[error(
        "{what}: that needs the capability {capability}; run as root, or allow it to the program with \
         \"setcap {capability}+ep {program}\""
    )]
    Capability { what: String, capability: &'static str, program: String },
    #[error("{what}: /dev/net/tun is missing: load the kernel module tun (\"modprobe tun\")")]
    NoTun { what: String },
    #[error("{what}")]
    Other { what: String, source: io::Error },
}

/// Turns a system call's failure into one that names what is missing.
fn failed(what: String, capability: &'static str, source: io::Error) -> HostError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let program =
                std::env::current_exe().map_or_else(|_| "PROGRAM".into(), |p| p.display().to_string());
            HostError::Capability { what, capability, program }
        }
        _ => HostError::Other { what, source },
    }
}

const ADMIN: &str = "cap_net_admin";
const RAW: &str = "cap_net_raw";

/// An interface of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub mac: Mac,
    pub ipv4: Option<(Ipv4Addr, Ipv4Addr)>,
    /// The address that reaches farthest, and the length of its prefix.
    pub ipv6: Option<(Ipv6Addr, u32)>,
    pub up: bool,
    pub wireless: bool,
    pub host_only: bool,
}

impl Interface {
    /// The identifier that VirtualBox makes from name and address on Linux hosts.
    pub fn id(&self) -> uuid::Uuid {
        let mut bytes = [0; 16];
        for (to, from) in bytes.iter_mut().zip(self.name.bytes().take(8)) {
            *to = from;
        }
        // The first three fields are little-endian numbers; version and variant take bits of the name.
        let version = u16::from_le_bytes([bytes[6], bytes[7]]) & 0x0fff | 0x4000;
        let [a, b, c, d, e, f] = self.mac.0;
        uuid::Uuid::from_fields(
            u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            u16::from_le_bytes([bytes[4], bytes[5]]),
            version,
            &[0x80, 0, a, b, c, d, e, f],
        )
    }
}

/// Whether `name` is one of a host-only interface.
pub fn is_host_only(name: &str) -> bool {
    name.strip_prefix(HOST_ONLY).is_some_and(|n| {
        n.parse::<u32>().is_ok_and(|n| n < MOST_HOST_ONLY)
            && !n.starts_with('+')
            && (n == "0" || !n.starts_with('0'))
    })
}

/// The Ethernet interfaces of the host, in the order of their numbers.
pub fn interfaces() -> Vec<Interface> {
    let mut all: Vec<(u32, Interface)> = Vec::new();
    for entry in fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let read =
            |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default().trim().to_owned();
        // ARPHRD_ETHER: neither loopback nor tunnels.
        if read("type") != "1" {
            continue;
        }
        let flags = u32::from_str_radix(read("flags").trim_start_matches("0x"), 16).unwrap_or(0);
        let path = entry.path();
        let interface = Interface {
            mac: read("address").parse().unwrap_or_default(),
            up: flags & libc::IFF_UP.cast_unsigned() != 0,
            wireless: path.join("wireless").exists() || path.join("phy80211").exists(),
            host_only: is_host_only(&name),
            name,
            ..Interface::default()
        };
        all.push((read("ifindex").parse().unwrap_or(u32::MAX), interface));
    }
    all.sort_by_key(|(index, _)| *index);
    let mut all: Vec<Interface> = all.into_iter().map(|(_, interface)| interface).collect();
    add_addresses(&mut all);
    all
}

/// The interface called `name`.
pub fn interface(name: &str) -> Result<Interface, HostError> {
    interfaces().into_iter().find(|i| i.name == name).ok_or_else(|| HostError::Missing(name.into()))
}

fn add_addresses(interfaces: &mut [Interface]) {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the call stores a list that it owns, or fails.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return;
    }
    let mut next = list;
    while !next.is_null() {
        // SAFETY: an element of the list, which lives until freeifaddrs() below.
        let entry = unsafe { &*next };
        next = entry.ifa_next;
        if entry.ifa_addr.is_null() || entry.ifa_netmask.is_null() || entry.ifa_name.is_null() {
            continue;
        }
        // SAFETY: a zero-terminated name.
        let name = unsafe { CStr::from_ptr(entry.ifa_name) }.to_string_lossy();
        let Some(interface) = interfaces.iter_mut().find(|i| i.name == name) else { continue };
        // SAFETY: not null; every address begins with its family.
        match c_int::from(unsafe { (*entry.ifa_addr).sa_family }) {
            libc::AF_INET if interface.ipv4.is_none() => {
                let address = |at: *mut libc::sockaddr| {
                    // SAFETY: of the family AF_INET, as checked; a mask has its address's family.
                    let raw = unsafe { at.cast::<libc::sockaddr_in>().read_unaligned() };
                    Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes())
                };
                interface.ipv4 = Some((address(entry.ifa_addr), address(entry.ifa_netmask)));
            }
            libc::AF_INET6 => {
                let address = |at: *mut libc::sockaddr| {
                    // SAFETY: of the family AF_INET6, as checked.
                    let raw = unsafe { at.cast::<libc::sockaddr_in6>().read_unaligned() };
                    Ipv6Addr::from(raw.sin6_addr.s6_addr)
                };
                let (new, mask) = (address(entry.ifa_addr), address(entry.ifa_netmask));
                if interface
                    .ipv6
                    .is_none_or(|(old, _)| old.is_unicast_link_local() && !new.is_unicast_link_local())
                {
                    interface.ipv6 = Some((new, mask.to_bits().leading_ones()));
                }
            }
            _ => {}
        }
    }
    // SAFETY: the list that getifaddrs() gave.
    unsafe { libc::freeifaddrs(list) };
}

/// `struct ifreq` with what is needed of its union.
#[repr(C)]
struct IfReq<T> {
    name: [libc::c_char; libc::IFNAMSIZ],
    value: T,
    _rest: [u8; 24],
}

impl<T> IfReq<T> {
    fn new(name: &str, value: T) -> Self {
        let mut request = Self { name: [0; libc::IFNAMSIZ], value, _rest: [0; 24] };
        for (to, from) in request.name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
            *to = from.cast_signed();
        }
        request
    }
}

/// An ioctl whose argument is a structure.
fn ioctl<T>(fd: &impl AsRawFd, request: c_ulong, argument: &mut T) -> io::Result<()> {
    let argument: *mut c_void = std::ptr::from_mut(argument).cast();
    // SAFETY: the descriptor is open; each request below is given the structure that it is defined with, or one that is larger.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn control_socket(family: c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens the tap device `name`, making it if it is not there.
fn open_tap(name: &str, what: &str) -> Result<OwnedFd, HostError> {
    let file = match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(file) => file,
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) =>
        {
            return Err(HostError::NoTun { what: what.into() });
        }
        Err(error) => return Err(failed(what.into(), ADMIN, error)),
    };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    ioctl(&file, libc::TUNSETIFF, &mut IfReq::new(name, flags)).map_err(|e| failed(what.into(), ADMIN, e))?;
    Ok(file.into())
}

/// Brings an interface up or down.
fn set_up(name: &str, up: bool) -> io::Result<()> {
    let socket = control_socket(libc::AF_INET)?;
    let mut request = IfReq::new(name, 0 as libc::c_short);
    ioctl(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    let flag = libc::IFF_UP as libc::c_short;
    let wanted = if up { request.value | flag } else { request.value & !flag };
    if wanted != request.value {
        request.value = wanted;
        ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)?;
    }
    Ok(())
}

/// Makes a host-only interface and returns its name. It lasts until it is removed or the host restarts, and belongs to the user who asked.
pub fn create_host_only() -> Result<String, HostError> {
    let taken = |n: &u32| Path::new("/sys/class/net").join(format!("{HOST_ONLY}{n}")).exists();
    let number = (0..MOST_HOST_ONLY).find(|n| !taken(n)).unwrap_or(0);
    let name = format!("{HOST_ONLY}{number}");
    let what = format!("the host-only interface {name} cannot be created");
    let fail = |e| failed(what.clone(), ADMIN, e);
    let tap = open_tap(&name, &what)?;
    // SAFETY: getuid() only returns a number.
    let user: c_ulong = unsafe { libc::getuid() }.into();
    // SAFETY: an open tap device; both requests take a number.
    let set = |request, value: c_ulong| match unsafe { libc::ioctl(tap.as_raw_fd(), request, value) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    set(libc::TUNSETOWNER, user).map_err(fail)?;
    // SAFETY: an address of plain bytes, for which zeros are valid.
    let mut address: libc::sockaddr = unsafe { zeroed() };
    address.sa_family = libc::ARPHRD_ETHER;
    let [.., high, low] = number.to_be_bytes();
    for (to, from) in address.sa_data.iter_mut().zip([0x0a, 0x00, 0x27, 0x00, high, low]) {
        *to = i8::from_ne_bytes([from]);
    }
    ioctl(&tap, libc::SIOCSIFHWADDR, &mut IfReq::new(&name, address)).map_err(fail)?;
    set(libc::TUNSETPERSIST, 1).map_err(fail)?;
    Ok(name)
}

/// Removes a host-only interface.
pub fn remove_host_only(name: &str) -> Result<(), HostError> {
    check_host_only(name)?;
    let what = format!("the host-only interface {name} cannot be removed");
    let tap = open_tap(name, &what)?;
    // SAFETY: an open tap device; the request takes a number.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 0) } < 0 {
        return Err(failed(what, ADMIN, io::Error::last_os_error()));
    }
    Ok(())
}

fn check_host_only(name: &str) -> Result<(), HostError> {
    if !is_host_only(name) {
        return Err(HostError::Name(name.into()));
    }
    if !Path::new("/sys/class/net").join(name).exists() {
        return Err(HostError::Missing(name.into()));
    }
    Ok(())
}

/// Gives a host-only interface an IPv4 address and brings it up. The unspecified address takes its address away.
pub fn set_ipv4(name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> Result<(), HostError> {
    check_host_only(name)?;
    let what = format!("the address of the host-only interface {name} cannot be set");
    let fail = |e| failed(what.clone(), ADMIN, e);
    let raw = |address: Ipv4Addr| {
        // SAFETY: an address of plain bytes, for which zeros are valid.
        let mut raw: libc::sockaddr_in = unsafe { zeroed() };
        raw.sin_family = libc::AF_INET as libc::sa_family_t;
        raw.sin_addr.s_addr = u32::from_ne_bytes(address.octets());
        raw
    };
    let socket = control_socket(libc::AF_INET).map_err(fail)?;
    ioctl(&socket, libc::SIOCSIFADDR, &mut IfReq::new(name, raw(address))).map_err(fail)?;
    if !address.is_unspecified() {
        ioctl(&socket, libc::SIOCSIFNETMASK, &mut IfReq::new(name, raw(mask))).map_err(fail)?;
    }
    set_up(name, true).map_err(fail)
}

/// Gives a host-only interface one more IPv6 address and brings it up.
pub fn set_ipv6(name: &str, address: Ipv6Addr, prefix: u32) -> Result<(), HostError> {
    /// `struct in6_ifreq`.
    #[repr(C)]
    struct Request {
        address: [u8; 16],
        prefix: u32,
        index: c_int,
    }
    check_host_only(name)?;
    let what = format!("the IPv6 address of the host-only interface {name} cannot be set");
    let fail = |e| failed(what.clone(), ADMIN, e);
    let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).map_err(fail)?;
    let index = index.trim().parse().unwrap_or(0);
    set_up(name, true).map_err(fail)?;
    let socket = control_socket(libc::AF_INET6).map_err(fail)?;
    let mut request = Request { address: address.octets(), prefix, index };
    match ioctl(&socket, libc::SIOCSIFADDR, &mut request) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map_err(fail),
    }
}

/// A network's way to the host.
#[derive(Debug)]
pub enum Way {
    /// A tap device: frames as they are.
    Tap(OwnedFd),
    /// A packet socket: frames with a `virtio_net_hdr` before them, by which the host tells what it has left to its card, and with their
    /// VLAN tag beside them.
    Packet(OwnedFd),
}

/// What came in from the host.
#[derive(Debug)]
pub enum Received<'a> {
    Frame(&'a [u8]),
    /// A packet that the host has put together from several frames, or has not yet cut; nothing, if it is of an unknown kind (Linux before
    /// 6.2 has no word for UDP's).
    Cut(Vec<Vec<u8>>),
}

/// `struct virtio_net_hdr` (virtio 1.0, section 5.1.6), in the host's byte order.
const OFFLOAD_LEN: usize = 10;
/// The longest that is read from a [`Way`].
pub const MAX_READ: usize = 0x1_0000 + 18 + OFFLOAD_LEN;

impl Way {
    /// Reads without waiting. `buffer` has [`MAX_READ`] bytes.
    pub fn read<'a>(&self, buffer: &'a mut [u8]) -> Result<Received<'a>, Errno> {
        match self {
            Self::Tap(fd) => {
                let length = rustix::io::read(fd, &mut *buffer)?;
                Ok(Received::Frame(buffer.get(..length).unwrap_or_default()))
            }
            Self::Packet(fd) => {
                let (length, tag) = match receive(fd, buffer) {
                    // The kernel cannot describe what the next packet has left undone, and has dropped it.
                    Err(Errno::INVAL) => return Ok(Received::Cut(Vec::new())),
                    other => other?,
                };
                Ok(finish(buffer.get_mut(..length).unwrap_or_default(), tag))
            }
        }
    }

    /// Sends a frame without waiting.
    pub fn write(&self, frame: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Tap(fd) => rustix::io::write(fd, frame).map(drop),
            Self::Packet(fd) => {
                rustix::io::writev(fd, &[IoSlice::new(&[0; OFFLOAD_LEN]), IoSlice::new(frame)]).map(drop)
            }
        }
    }
}

impl AsFd for Way {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(fd) | Self::Packet(fd) => fd.as_fd(),
        }
    }
}

/// Bytes of a VLAN tag, and where it goes.
const TAG_LEN: usize = 4;
const TAG_AT: usize = 12;

/// Reads from a packet socket: the length, and the VLAN tag that the kernel has taken out of the frame.
fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> Result<(usize, Option<[u8; TAG_LEN]>), Errno> {
    /// `struct tpacket_auxdata` (`linux/if_packet.h`).
    #[repr(C)]
    struct AuxData {
        status: u32,
        _len: u32,
        _snap_len: u32,
        _mac: u16,
        _net: u16,
        tci: u16,
        tpid: u16,
    }
    const VLAN_VALID: u32 = 1 << 4;
    const TPID_VALID: u32 = 1 << 6;
    /// Room for one control message, aligned as its header wants it.
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control([0; 64]);
    // SAFETY: pointers and numbers, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = ((&raw mut control).cast(), size_of::<Control>());
    // SAFETY: the message names one buffer, and one for control messages, which live during the call.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    let Ok(length) = usize::try_from(length) else {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    };
    // SAFETY: the kernel has filled in the message.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    if header.is_null() {
        return Ok((length, None));
    }
    // SAFETY: not null, so it is in the control buffer, whole.
    let kind = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
    if kind != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return Ok((length, None));
    }
    // SAFETY: messages of this type have this content, in the control buffer.
    let data = unsafe { libc::CMSG_DATA(header).cast::<AuxData>().read_unaligned() };
    let tag = (data.status & VLAN_VALID != 0).then(|| {
        let tpid = if data.status & TPID_VALID != 0 { data.tpid } else { libc::ETH_P_8021Q as u16 };
        let ([a, b], [c, d]) = (tpid.to_be_bytes(), data.tci.to_be_bytes());
        [a, b, c, d]
    });
    Ok((length, tag))
}

/// Does what the host has left to its card, with a `virtio_net_hdr` and the frame behind it, and puts the VLAN tag back.
fn finish(packet: &mut [u8], tag: Option<[u8; TAG_LEN]>) -> Received<'_> {
    const NEEDS_CSUM: u8 = 1;
    const GSO_NONE: u8 = 0;
    const GSO_TCP4: u8 = 1;
    const GSO_TCP6: u8 = 4;
    const GSO_UDP_L4: u8 = 5;
    const GSO_ECN: u8 = 0x80;
    let lost = Received::Cut(Vec::new());
    let Some((offload, frame)) = packet.split_first_chunk_mut::<OFFLOAD_LEN>() else { return lost };
    let [flags, gso, _, _, size @ .., start0, start1, offset0, offset1] = *offload;
    let word = |bytes| usize::from(u16::from_ne_bytes(bytes));
    // Counted without the tag.
    let (size, start, offset) = (word(size), word([start0, start1]), word([offset0, offset1]));
    let cut = match gso & !GSO_ECN {
        GSO_NONE => {
            if flags & NEEDS_CSUM != 0 {
                // A frame that ends before its checksum is nothing that the host sends.
                ether::offload::checksum(frame, start, offset);
            }
            let at = match tag {
                Some(tag) if frame.len() >= TAG_AT => {
                    // The addresses move to where the header was.
                    let at = OFFLOAD_LEN - TAG_LEN;
                    packet.copy_within(OFFLOAD_LEN..OFFLOAD_LEN + TAG_AT, at);
                    packet[at + TAG_AT..OFFLOAD_LEN + TAG_AT].copy_from_slice(&tag);
                    at
                }
                _ => OFFLOAD_LEN,
            };
            return Received::Frame(packet.get(at..).unwrap_or_default());
        }
        GSO_TCP4 | GSO_TCP6 => ether::offload::segment(frame, start, size),
        GSO_UDP_L4 => ether::offload::datagrams(frame, start, size),
        _ => None,
    };
    let Some(mut frames) = cut else { return lost };
    if let Some(tag) = tag {
        frames.iter_mut().for_each(|frame| drop(frame.splice(TAG_AT..TAG_AT, tag)));
    }
    Received::Cut(frames)
}

/// The way to a host-only interface.
pub fn open_host_only(name: &str) -> Result<Way, HostError> {
    check_host_only(name)?;
    let what = format!("the host-only interface {name} cannot be used");
    let tap = open_tap(name, &what)?;
    set_up(name, true).map_err(|e| failed(what, ADMIN, e))?;
    Ok(Way::Tap(tap))
}

/// A way to the network that the host's interface `name` is in. On a bridge a tap device is added to it, so that the host itself can be
/// reached; elsewhere a packet socket sends and receives on the interface, past the host.
pub fn open_bridged(name: &str) -> Result<Way, HostError> {
    let path = Path::new("/sys/class/net").join(name);
    if name.is_empty() || name.contains('/') || !path.exists() {
        return Err(HostError::Missing(name.into()));
    }
    let what = format!("the host's interface {name} cannot be bridged to");
    if path.join("bridge").is_dir() {
        let tap = open_tap("boxtap%d", &what)?;
        let fail = |e| failed(what.clone(), ADMIN, e);
        let mut request = IfReq::new("", 0 as libc::c_short);
        ioctl(&tap, libc::TUNGETIFF as c_ulong, &mut request).map_err(fail)?;
        let tap_name: String =
            request.name.iter().take_while(|c| **c != 0).map(|c| char::from(c.cast_unsigned())).collect();
        let index: c_int = fs::read_to_string(format!("/sys/class/net/{tap_name}/ifindex"))
            .map_err(fail)?
            .trim()
            .parse()
            .unwrap_or(0);
        let socket = control_socket(libc::AF_INET).map_err(fail)?;
        /// Add an interface to a bridge (`linux/sockios.h`).
        const SIOCBRADDIF: c_ulong = 0x89a2;
        ioctl(&socket, SIOCBRADDIF, &mut IfReq::new(name, index)).map_err(fail)?;
        set_up(&tap_name, true).map_err(fail)?;
        return Ok(Way::Tap(tap));
    }
    packet_socket(name, &path).map(Way::Packet).map_err(|e| failed(what, RAW, e))
}

fn packet_socket(name: &str, path: &Path) -> io::Result<OwnedFd> {
    let index: c_int = fs::read_to_string(path.join("ifindex"))?
        .trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{name} has no number")))?;
    let every = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that nobody else has.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let set = |option: c_int, value: *const c_void, length: usize| {
        // SAFETY: `value` points to `length` bytes that live during the call.
        let done = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, value, length as libc::socklen_t)
        };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    let on: c_int = 1;
    // Frames that this host sends, ours among them, do not come back.
    set(libc::PACKET_IGNORE_OUTGOING, (&raw const on).cast(), size_of::<c_int>())?;
    // Local senders leave checksums to a card, and packets come in put together from several frames.
    set(libc::PACKET_VNET_HDR, (&raw const on).cast(), size_of::<c_int>())?;
    // VLAN tags are taken out of frames before they come here.
    set(libc::PACKET_AUXDATA, (&raw const on).cast(), size_of::<c_int>())?;
    // SAFETY: plain numbers, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every;
    address.sll_ifindex = index;
    // SAFETY: the address is of the socket's family and lives during the call.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain numbers, for which zeros are valid.
    let mut membership: libc::packet_mreq = unsafe { zeroed() };
    membership.mr_ifindex = index;
    membership.mr_type = libc::PACKET_MR_PROMISC as u16;
    set(libc::PACKET_ADD_MEMBERSHIP, (&raw const membership).cast(), size_of::<libc::packet_mreq>())?;
    Ok(socket)
}

/// The networks in which host-only interfaces may have addresses: `/etc/vbox/networks.conf`, or VirtualBox's default.
pub fn is_allowed_host_only_address(address: std::net::IpAddr) -> bool {
    allowed(fs::read_to_string("/etc/vbox/networks.conf").ok().as_deref(), address)
}

fn allowed(conf: Option<&str>, address: std::net::IpAddr) -> bool {
    use std::net::IpAddr;
    const DEFAULT: &str = "* 192.168.56.0/21\n* fe80::/64\n";
    let inside = |cidr: &str| {
        let (network, prefix) = cidr.split_once('/')?;
        let prefix: u32 = prefix.parse().ok()?;
        Some(match (network.parse().ok()?, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) if prefix <= 32 => {
                let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
                u32::from(network) & mask == u32::from(address) & mask
            }
            (IpAddr::V6(network), IpAddr::V6(address)) if prefix <= 128 => {
                let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            _ => false,
        })
    };
    let lines = conf.unwrap_or(DEFAULT).lines().filter_map(|line| line.trim().strip_prefix('*'));
    lines.flat_map(str::split_whitespace).any(|cidr| inside(cidr).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identifier_is_the_one_that_virtualbox_makes() {
        let mac = Mac([0x0a, 0, 0x27, 0, 0, 0]);
        let vboxnet0 = Interface { name: "vboxnet0".into(), mac, ..Interface::default() };
        assert_eq!(vboxnet0.id().to_string(), "786f6276-656e-4074-8000-0a0027000000");
        let eth0 = Interface { name: "eth0".into(), mac: Mac([1, 2, 3, 4, 5, 6]), ..Interface::default() };
        assert_eq!(eth0.id().to_string(), "30687465-0000-4000-8000-010203040506");
    }

    #[test]
    fn host_only_interfaces_are_known_by_name() {
        for (name, expected) in [
            ("vboxnet0", true),
            ("vboxnet127", true),
            ("vboxnet128", false),
            ("vboxnet", false),
            ("vboxnet01", false),
            ("vboxnet+1", false),
            ("eth0", false),
        ] {
            assert_eq!(is_host_only(name), expected, "{name}");
        }
    }

    #[test]
    fn addresses_are_allowed_in_the_default_range_or_the_files() {
        let ask = |conf, address: &str| allowed(conf, address.parse().unwrap());
        assert!(ask(None, "192.168.56.1") && ask(None, "192.168.63.255") && !ask(None, "192.168.64.1"));
        assert!(!ask(None, "10.0.0.1") && ask(None, "fe80::1") && !ask(None, "fd00::1"));
        let conf = Some("# ours\n* 10.0.0.0/8 192.168.0.0/16\n* 2001::/64\n");
        assert!(
            ask(conf, "10.9.9.9")
                && ask(conf, "192.168.64.1")
                && ask(conf, "2001::5")
                && !ask(conf, "11.0.0.1")
        );
        assert!(ask(Some("* 0.0.0.0/0 ::/0"), "8.8.8.8"));
        assert!(!ask(Some(""), "192.168.56.1"));
    }

    /// A TCP packet with no checksum but the pseudo header's, behind what the kernel says of it.
    fn left_to_the_card(data: usize, gso: u8, size: u16) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((40 + data as u16).to_be_bytes());
        frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = !ether::checksum::ones_sum(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        let pseudo = ether::checksum::sum(&frame[26..34], 6 + 20 + data as u32) as u16;
        frame.extend([0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 0xff, 0xff]);
        frame.extend(pseudo.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend((0..data).map(|i| i as u8));
        let mut packet = vec![0; OFFLOAD_LEN];
        (packet[0], packet[1]) = (1, gso);
        for (at, value) in [(4, size), (6, 34), (8, 16)] {
            packet[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        }
        packet.extend(frame);
        packet
    }

    fn is_right(frame: &[u8]) -> bool {
        let pseudo = ether::checksum::sum(&frame[26..34], 6 + (frame.len() - 34) as u32);
        ether::checksum::sum(&frame[34..], pseudo) == 0xffff
    }

    const TAG: [u8; 4] = [0x81, 0, 0x60, 5];

    fn without_tag(frame: &[u8]) -> Vec<u8> {
        assert_eq!(frame[12..16], TAG);
        [&frame[..12], &frame[16..]].concat()
    }

    #[test]
    fn what_the_host_left_to_its_card_is_done() {
        let mut packet = left_to_the_card(101, 0, 0);
        let before = packet[OFFLOAD_LEN..].to_vec();
        assert!(!is_right(&before));
        let Received::Frame(done) = finish(&mut packet, None) else { panic!("cut") };
        assert!(is_right(done));
        let done = done.to_vec();
        let mut packet = left_to_the_card(101, 0, 0);
        let Received::Frame(tagged) = finish(&mut packet, Some(TAG)) else { panic!("cut") };
        assert_eq!(without_tag(tagged), done);
        for tag in [None, Some(TAG)] {
            let mut packet = left_to_the_card(5000, 1, 1448);
            let Received::Cut(frames) = finish(&mut packet, tag) else { panic!("not cut") };
            let frames: Vec<_> =
                frames.iter().map(|f| if tag.is_some() { without_tag(f) } else { f.clone() }).collect();
            let lengths: Vec<_> = frames.iter().map(Vec::len).collect();
            assert_eq!(lengths, [1502, 1502, 1502, 54 + 5000 - 3 * 1448]);
            assert!(frames.iter().all(|f| is_right(f)));
        }
        // A kind that is unknown, or does not fit, is lost.
        for mut packet in [left_to_the_card(500, 3, 100), left_to_the_card(0, 1, 0), vec![0; 5]] {
            assert!(matches!(finish(&mut packet, Some(TAG)), Received::Cut(frames) if frames.is_empty()));
        }
        for len in 0..16 {
            assert!(matches!(finish(&mut vec![0; OFFLOAD_LEN + len], Some(TAG)), Received::Frame(_)));
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        assert!(
            matches!(open_bridged("no-such-interface"), Err(HostError::Missing(name)) if name == "no-such-interface")
        );
        assert!(matches!(open_bridged("../net"), Err(HostError::Missing(_))));
        assert!(matches!(remove_host_only("eth0"), Err(HostError::Name(_))));
        assert!(matches!(open_host_only("vboxnet127"), Err(HostError::Missing(_))));
    }
}
