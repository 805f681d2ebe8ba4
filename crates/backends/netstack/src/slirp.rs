//! A thin binding to libslirp 4 (user-mode TCP/IP, package `libslirp-dev`), as far as NAT needs it. Layouts and contracts are
//! those of `libslirp.h`, configuration version 4.
#![allow(unsafe_code)] // a C library, its callbacks, and poll() on the descriptors it names

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::nat::Tftp;
use libc::{in_addr, in6_addr, size_t, ssize_t};

/// The longest frame that is passed on to libslirp, in bytes.
pub(crate) const MAX_FRAME: usize = 14 + 0xffff;

const CONFIG_VERSION: u32 = 4;
/// Connections that may wait at a forwarded port; the system's own limit holds, too.
const BACKLOG: c_int = 1024;

#[repr(C)]
struct RawSlirp {
    _opaque: [u8; 0],
}

#[repr(C)]
struct RawConfig {
    version: u32,
    restricted: c_int,
    in_enabled: bool,
    vnetwork: in_addr,
    vnetmask: in_addr,
    vhost: in_addr,
    in6_enabled: bool,
    vprefix_addr6: in6_addr,
    vprefix_len: u8,
    vhost6: in6_addr,
    vhostname: *const c_char,
    tftp_server_name: *const c_char,
    tftp_path: *const c_char,
    bootfile: *const c_char,
    vdhcp_start: in_addr,
    vnameserver: in_addr,
    vnameserver6: in6_addr,
    vdnssearch: *const *const c_char,
    vdomainname: *const c_char,
    if_mtu: size_t,
    if_mru: size_t,
    disable_host_loopback: bool,
    enable_emu: bool,
    outbound_addr: *const c_void,
    outbound_addr6: *const c_void,
    disable_dns: bool,
    disable_dhcp: bool,
}

type TimerCb = Option<unsafe extern "C" fn(*mut c_void)>;

#[repr(C)]
struct RawCallbacks {
    send_packet: extern "C" fn(*const c_void, size_t, *mut c_void) -> ssize_t,
    guest_error: extern "C" fn(*const c_char, *mut c_void),
    clock_get_ns: extern "C" fn(*mut c_void) -> i64,
    timer_new: extern "C" fn(TimerCb, *mut c_void, *mut c_void) -> *mut c_void,
    timer_free: extern "C" fn(*mut c_void, *mut c_void),
    timer_mod: extern "C" fn(*mut c_void, i64, *mut c_void),
    register_poll_fd: extern "C" fn(c_int, *mut c_void),
    unregister_poll_fd: extern "C" fn(c_int, *mut c_void),
    notify: extern "C" fn(*mut c_void),
    init_completed: extern "C" fn(*mut RawSlirp, *mut c_void),
    timer_new_opaque: extern "C" fn(c_int, *mut c_void, *mut c_void) -> *mut c_void,
}

#[link(name = "slirp")]
unsafe extern "C" {
    fn slirp_new(
        config: *const RawConfig,
        callbacks: *const RawCallbacks,
        opaque: *mut c_void,
    ) -> *mut RawSlirp;
    fn slirp_cleanup(slirp: *mut RawSlirp);
    fn slirp_pollfds_fill(
        slirp: *mut RawSlirp,
        timeout: *mut u32,
        add: extern "C" fn(c_int, c_int, *mut c_void) -> c_int,
        opaque: *mut c_void,
    );
    fn slirp_pollfds_poll(
        slirp: *mut RawSlirp,
        error: c_int,
        revents: extern "C" fn(c_int, *mut c_void) -> c_int,
        opaque: *mut c_void,
    );
    fn slirp_input(slirp: *mut RawSlirp, packet: *const u8, len: c_int);
    fn slirp_handle_timer(slirp: *mut RawSlirp, id: c_int, cb_opaque: *mut c_void);
    fn slirp_add_hostfwd(
        slirp: *mut RawSlirp,
        udp: c_int,
        host: in_addr,
        host_port: c_int,
        guest: in_addr,
        guest_port: c_int,
    ) -> c_int;
    fn slirp_remove_hostfwd(slirp: *mut RawSlirp, udp: c_int, host: in_addr, host_port: c_int) -> c_int;
    fn slirp_add_hostxfwd(
        slirp: *mut RawSlirp,
        host: *const libc::sockaddr,
        host_len: libc::socklen_t,
        guest: *const libc::sockaddr,
        guest_len: libc::socklen_t,
        flags: c_int,
    ) -> c_int;
    fn slirp_remove_hostxfwd(
        slirp: *mut RawSlirp,
        host: *const libc::sockaddr,
        host_len: libc::socklen_t,
        flags: c_int,
    ) -> c_int;
    fn slirp_version_string() -> *const c_char;
}

/// One of libslirp's timers; `None` as deadline while it rests.
struct Timer {
    id: c_int,
    cb_opaque: *mut c_void,
    /// Milliseconds on the context's clock.
    deadline: Option<i64>,
}

/// Lets DHCP name another server to boot from: libslirp names its gateway always. Changes the field `siaddr` of DHCP replies and takes
/// the UDP checksum away, which IPv4 allows. Other frames stay as they are.
fn name_next_server(frame: &mut [u8], server: Ipv4Addr) {
    const ETHERNET: usize = 14;
    const UDP: u8 = 17;
    const SIADDR: usize = 20;
    let Some(ip) = frame.get(ETHERNET..).filter(|_| frame[12..14] == [8, 0]) else { return };
    let header = usize::from(ip.first().copied().unwrap_or(0) & 0xf) * 4;
    let Some(udp) = ip.get(header..header + 8).filter(|_| header >= 20) else { return };
    if ip[9] != UDP || udp[..4] != [0, 67, 0, 68] {
        return;
    }
    let udp = ETHERNET + header;
    if let Some(field) = frame.get_mut(udp + 8 + SIADDR..udp + 8 + SIADDR + 4) {
        field.copy_from_slice(&server.octets());
        frame[udp + 6..udp + 8].fill(0);
    }
}

/// Whether a frame says that its sender has an IPv4 address.
fn has_address(frame: &[u8]) -> bool {
    let sender = match frame.get(12..14) {
        Some([8, 6]) => frame.get(28..32),
        Some([8, 0]) => frame.get(26..30),
        _ => None,
    };
    sender.is_some_and(|address| address != [0; 4])
}

/// The router's question who has an address.
fn arp_request(router: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut mac = vec![0x52, 0x55];
    mac.extend(router.octets());
    let mut frame = vec![0xff; 6];
    frame.extend(&mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(&mac);
    frame.extend(router.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame.resize(60, 0);
    frame
}

/// Forwarded TCP connections wait in the host's queue while the guest does not answer. libslirp takes them and goes on asking a guest that
/// boots at ever longer intervals, of which clients see seconds.
struct Gate {
    router: Ipv4Addr,
    /// When the guest last sent something from an address.
    heard: Option<Instant>,
    /// When to ask for it again.
    next: Option<Instant>,
    /// The sockets that listen for it, and where they lead.
    listeners: Vec<c_int>,
    guests: Vec<Ipv4Addr>,
}

impl Gate {
    /// A guest that was silent for this long is asked first.
    const SILENCE: Duration = Duration::from_secs(1);
    const INTERVAL: Duration = Duration::from_millis(50);

    fn is_shut(&self) -> bool {
        !self.listeners.is_empty() && self.heard.is_none_or(|at| at.elapsed() > Self::SILENCE)
    }

    /// Leaves out the listening sockets until the guest may be asked again; how long that is, in milliseconds.
    fn mask(&self, fds: &mut [libc::pollfd]) -> Option<u32> {
        let left = self.next?.checked_duration_since(Instant::now())?;
        for fd in fds.iter_mut().filter(|fd| self.listeners.contains(&fd.fd)) {
            fd.fd = -1;
        }
        u32::try_from(left.as_millis()).ok().map(|millis| millis + 1)
    }

    /// Takes back what was seen on the listening sockets; whether a connection waits.
    fn hold(&mut self, fds: &mut [libc::pollfd]) -> bool {
        let mut waits = false;
        for fd in fds.iter_mut().filter(|fd| self.listeners.contains(&fd.fd)) {
            waits |= std::mem::take(&mut fd.revents) != 0;
        }
        if waits {
            self.next = Some(Instant::now() + Self::INTERVAL);
        }
        waits
    }
}

/// What the callbacks work on. They run inside calls to libslirp, on the thread of the [`Slirp`].
struct Context {
    origin: Instant,
    /// Frames for the guest.
    out: RefCell<VecDeque<Vec<u8>>>,
    timers: RefCell<Vec<Option<Timer>>>,
    notified: Cell<bool>,
    next_server: Option<Ipv4Addr>,
}

impl Context {
    fn millis(&self) -> i64 {
        i64::try_from(self.origin.elapsed().as_millis()).unwrap_or(i64::MAX)
    }
}

/// The context behind a callback's opaque pointer.
///
/// # Safety
/// `opaque` must be the pointer given to `slirp_new` by [`Slirp::new`], whose context lives as long as the library's object.
unsafe fn context<'a>(opaque: *mut c_void) -> &'a Context {
    // SAFETY: by this function's contract; only shared references to the context exist.
    unsafe { &*opaque.cast::<Context>() }
}

extern "C" fn send_packet(data: *const c_void, len: size_t, opaque: *mut c_void) -> ssize_t {
    // SAFETY: libslirp passes our opaque pointer and a buffer of `len` readable bytes.
    let (context, mut frame) =
        unsafe { (context(opaque), std::slice::from_raw_parts(data.cast::<u8>(), len).to_vec()) };
    if let Some(server) = context.next_server {
        name_next_server(&mut frame, server);
    }
    context.out.borrow_mut().push_back(frame);
    len.cast_signed()
}

extern "C" fn guest_error(message: *const c_char, _opaque: *mut c_void) {
    // SAFETY: libslirp passes a zero-terminated text that lives during the call.
    let message = unsafe { CStr::from_ptr(message) };
    tracing::debug!(target: "nat", "the guest's traffic: {}", message.to_string_lossy());
}

extern "C" fn clock_get_ns(opaque: *mut c_void) -> i64 {
    // SAFETY: libslirp passes our opaque pointer.
    let context = unsafe { context(opaque) };
    i64::try_from(context.origin.elapsed().as_nanos()).unwrap_or(i64::MAX)
}

/// Not called: configuration version 4 uses [`timer_new_opaque`].
extern "C" fn timer_new(_: TimerCb, _: *mut c_void, _: *mut c_void) -> *mut c_void {
    std::ptr::null_mut()
}

/// Timers are known to libslirp by their index plus one.
extern "C" fn timer_new_opaque(id: c_int, cb_opaque: *mut c_void, opaque: *mut c_void) -> *mut c_void {
    // SAFETY: libslirp passes our opaque pointer.
    let context = unsafe { context(opaque) };
    let mut timers = context.timers.borrow_mut();
    timers.push(Some(Timer { id, cb_opaque, deadline: None }));
    std::ptr::without_provenance_mut(timers.len())
}

extern "C" fn timer_free(timer: *mut c_void, opaque: *mut c_void) {
    // SAFETY: libslirp passes our opaque pointer.
    let context = unsafe { context(opaque) };
    if let Some(slot) = context.timers.borrow_mut().get_mut(timer.addr().wrapping_sub(1)) {
        *slot = None;
    }
}

extern "C" fn timer_mod(timer: *mut c_void, millis: i64, opaque: *mut c_void) {
    // SAFETY: libslirp passes our opaque pointer.
    let context = unsafe { context(opaque) };
    if let Some(Some(timer)) = context.timers.borrow_mut().get_mut(timer.addr().wrapping_sub(1)) {
        timer.deadline = Some(millis);
    }
}

extern "C" fn poll_fd(_: c_int, _: *mut c_void) {}

extern "C" fn notify(opaque: *mut c_void) {
    // SAFETY: libslirp passes our opaque pointer.
    unsafe { context(opaque) }.notified.set(true);
}

extern "C" fn init_completed(_: *mut RawSlirp, _: *mut c_void) {}

static CALLBACKS: RawCallbacks = RawCallbacks {
    send_packet,
    guest_error,
    clock_get_ns,
    timer_new,
    timer_free,
    timer_mod,
    register_poll_fd: poll_fd,
    unregister_poll_fd: poll_fd,
    notify,
    init_completed,
    timer_new_opaque,
};

/// Has the host acknowledge what its peers sent at once. A program that writes little by little (Nagle's algorithm) would otherwise wait
/// for the delayed acknowledgment, 40 ms, before each piece that the guest does not answer by itself.
fn acknowledge(fds: &[libc::pollfd]) {
    for entry in fds.iter().filter(|entry| entry.revents & libc::POLLIN != 0) {
        // SAFETY: libslirp named the descriptor just now, and nothing has closed it since.
        let socket = unsafe { BorrowedFd::borrow_raw(entry.fd) };
        // Sockets of other protocols refuse it.
        let _ = rustix::net::sockopt::set_tcp_quickack(socket, true);
    }
}

/// libslirp's event bits and poll()'s, pair by pair.
const EVENTS: [(c_int, i16); 5] = [
    (1 << 0, libc::POLLIN),
    (1 << 1, libc::POLLOUT),
    (1 << 2, libc::POLLPRI),
    (1 << 3, libc::POLLERR),
    (1 << 4, libc::POLLHUP),
];

extern "C" fn add_poll(fd: c_int, events: c_int, opaque: *mut c_void) -> c_int {
    // SAFETY: `opaque` is the list that `Slirp::wait` passes; it is borrowed by nobody else during the call.
    let list = unsafe { &mut *opaque.cast::<Vec<libc::pollfd>>() };
    let wanted = EVENTS.iter().filter(|(slirp, _)| events & slirp != 0).fold(0, |all, (_, poll)| all | poll);
    list.push(libc::pollfd { fd, events: wanted, revents: 0 });
    c_int::try_from(list.len() - 1).unwrap_or(-1)
}

extern "C" fn revents(index: c_int, opaque: *mut c_void) -> c_int {
    // SAFETY: `opaque` is the list that `Slirp::wait` passes; it is not changed during the call.
    let list = unsafe { &*opaque.cast::<Vec<libc::pollfd>>() };
    let seen = usize::try_from(index).ok().and_then(|i| list.get(i)).map_or(0, |fd| fd.revents);
    EVENTS.iter().filter(|(_, poll)| seen & poll != 0).fold(0, |all, (slirp, _)| all | slirp)
}

fn raw(address: Ipv4Addr) -> in_addr {
    in_addr { s_addr: u32::from_ne_bytes(address.octets()) }
}

/// The version of the library.
pub(crate) fn version() -> String {
    // SAFETY: the library returns a static text.
    unsafe { CStr::from_ptr(slirp_version_string()) }.to_string_lossy().into_owned()
}

/// The addresses of one network.
pub(crate) struct Addresses {
    pub(crate) network: Ipv4Addr,
    pub(crate) mask: Ipv4Addr,
    pub(crate) gateway: Ipv4Addr,
    pub(crate) dns: Ipv4Addr,
    pub(crate) guest: Ipv4Addr,
    pub(crate) dhcp: bool,
    /// A prefix of 64 bits, where the gateway is number 2 and the name server number 3.
    pub(crate) ipv6: Option<Ipv6Addr>,
}

fn raw6(address: Ipv6Addr) -> in6_addr {
    in6_addr { s6_addr: address.octets() }
}

fn socket_address6(address: SocketAddrV6) -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: address.port().to_be(),
        sin6_flowinfo: 0,
        sin6_addr: raw6(*address.ip()),
        sin6_scope_id: address.scope_id(),
    }
}

const IN6_LEN: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;

/// `slirp_*_hostxfwd`: the flag for UDP, and the one for a socket that takes no IPv4.
fn forward_flags(udp: bool) -> c_int {
    c_int::from(udp) | 2
}

/// One TCP/IP stack. Used by one thread only, as the raw pointer in it ensures.
pub(crate) struct Slirp {
    slirp: NonNull<RawSlirp>,
    /// Made by `Box::into_raw`; freed after the stack.
    context: NonNull<Context>,
    fds: Vec<libc::pollfd>,
    gate: Gate,
    _one_thread: PhantomData<*mut ()>,
}

impl Slirp {
    /// Starts a stack; `None` if the library refuses the configuration. `mtu` in bytes, 0 for the library's own.
    pub(crate) fn new(at: &Addresses, mtu: usize, host_loopback: bool, tftp: &Tftp) -> Option<Self> {
        let context = Box::new(Context {
            origin: Instant::now(),
            out: RefCell::default(),
            timers: RefCell::default(),
            notified: Cell::new(false),
            next_server: tftp.next_server,
        });
        // A text with a zero byte in it names no file.
        let text = |bytes: &[u8]| CString::new(bytes).unwrap_or_default();
        let (folder, boot_file) = (text(tftp.folder.as_os_str().as_bytes()), text(tftp.boot_file.as_bytes()));
        let or_null = |text: &CString| if text.is_empty() { std::ptr::null() } else { text.as_ptr() };
        let context = NonNull::from(Box::leak(context));
        let in_prefix = |number: u128| {
            at.ipv6.map_or(in6_addr { s6_addr: [0; 16] }, |prefix| {
                raw6(Ipv6Addr::from_bits(prefix.to_bits() & !u128::from(u64::MAX) | number))
            })
        };
        let config = RawConfig {
            version: CONFIG_VERSION,
            restricted: 0,
            in_enabled: true,
            vnetwork: raw(at.network),
            vnetmask: raw(at.mask),
            vhost: raw(at.gateway),
            in6_enabled: at.ipv6.is_some(),
            vprefix_addr6: in_prefix(0),
            vprefix_len: 64,
            vhost6: in_prefix(2),
            vhostname: std::ptr::null(),
            tftp_server_name: std::ptr::null(),
            tftp_path: or_null(&folder),
            bootfile: or_null(&boot_file),
            vdhcp_start: raw(at.guest),
            vnameserver: raw(at.dns),
            vnameserver6: in_prefix(3),
            vdnssearch: std::ptr::null(),
            vdomainname: std::ptr::null(),
            if_mtu: mtu,
            if_mru: mtu,
            disable_host_loopback: !host_loopback,
            enable_emu: false,
            outbound_addr: std::ptr::null(),
            outbound_addr6: std::ptr::null(),
            disable_dns: false,
            disable_dhcp: !at.dhcp,
        };
        // SAFETY: the configuration is valid and copied, its texts too; callbacks are static; the context outlives the stack (see `Drop`).
        let slirp = unsafe { slirp_new(&config, &CALLBACKS, context.as_ptr().cast()) };
        match NonNull::new(slirp) {
            Some(slirp) => {
                let (listeners, guests) = (Vec::new(), Vec::new());
                let gate = Gate { router: at.gateway, heard: None, next: None, listeners, guests };
                Some(Self { slirp, context, fds: Vec::new(), gate, _one_thread: PhantomData })
            }
            None => {
                // SAFETY: made by `Box::leak` above; the library did not keep it.
                drop(unsafe { Box::from_raw(context.as_ptr()) });
                None
            }
        }
    }

    fn context(&self) -> &Context {
        // SAFETY: valid until `drop`; only shared references are ever made.
        unsafe { self.context.as_ref() }
    }

    /// A frame from the guest.
    pub(crate) fn input(&mut self, frame: &[u8]) {
        let Ok(len) = c_int::try_from(frame.len()) else { return };
        if has_address(frame) {
            self.gate.heard = Some(Instant::now());
        }
        if frame.len() <= MAX_FRAME {
            // SAFETY: the stack is alive; the buffer has `len` bytes, which the library copies.
            unsafe { slirp_input(self.slirp.as_ptr(), frame.as_ptr(), len) };
        }
    }

    /// The oldest frame for the guest that waits.
    pub(crate) fn front(&self) -> Option<Vec<u8>> {
        self.context().out.borrow_mut().pop_front()
    }

    /// Puts back what [`Slirp::front`] took.
    pub(crate) fn put_back(&self, frame: Vec<u8>) {
        self.context().out.borrow_mut().push_front(frame);
    }

    pub(crate) fn waiting(&self) -> usize {
        self.context().out.borrow().len()
    }

    /// Sleeps until `wake` is readable, or, if `sockets`, something happens on one of the stack's sockets or timers; handles the latter.
    pub(crate) fn wait(&mut self, wake: BorrowedFd<'_>, sockets: bool) {
        let mut timeout = u32::MAX;
        self.fds.clear();
        self.fds.push(libc::pollfd { fd: wake.as_raw_fd(), events: libc::POLLIN, revents: 0 });
        let list: *mut c_void = (&raw mut self.fds).cast();
        if sockets {
            // SAFETY: the stack is alive; `list` is what `add_poll` expects.
            unsafe { slirp_pollfds_fill(self.slirp.as_ptr(), &mut timeout, add_poll, list) };
            let now = self.context().millis();
            for timer in self.context().timers.borrow().iter().flatten() {
                if let Some(deadline) = timer.deadline {
                    timeout =
                        timeout.min(u32::try_from(deadline.saturating_sub(now).max(0)).unwrap_or(u32::MAX));
                }
            }
        }
        let shut = sockets && self.gate.is_shut();
        if shut && let Some(left) = self.gate.mask(&mut self.fds) {
            timeout = timeout.min(left);
        }
        if self.context().notified.take() {
            timeout = 0;
        }
        let millis = c_int::try_from(timeout).unwrap_or(-1);
        let count = self.fds.len() as libc::nfds_t;
        // SAFETY: the list has `count` elements, and every descriptor is open: `wake` is borrowed, the others are the stack's own.
        let result = unsafe { libc::poll(self.fds.as_mut_ptr(), count, millis) };
        if shut && self.gate.hold(&mut self.fds) && self.waiting() == 0 {
            let questions = self.gate.guests.iter().map(|&guest| arp_request(self.gate.router, guest));
            self.context().out.borrow_mut().extend(questions);
        }
        if sockets {
            acknowledge(&self.fds[1..]);
            let failed = c_int::from(result < 0);
            let list: *mut c_void = (&raw mut self.fds).cast();
            // SAFETY: as above.
            unsafe { slirp_pollfds_poll(self.slirp.as_ptr(), failed, revents, list) };
            self.fire_timers();
        }
    }

    fn fire_timers(&mut self) {
        let now = self.context().millis();
        let mut due = Vec::new();
        for timer in self.context().timers.borrow_mut().iter_mut().flatten() {
            if timer.deadline.is_some_and(|deadline| deadline <= now) {
                timer.deadline = None;
                due.push((timer.id, timer.cb_opaque));
            }
        }
        for (id, cb_opaque) in due {
            // SAFETY: the stack is alive; the pair is what the library gave for this timer.
            unsafe { slirp_handle_timer(self.slirp.as_ptr(), id, cb_opaque) };
        }
    }

    /// Listens at a port of the host for the guest. Both addresses are of one family.
    pub(crate) fn add_forward(
        &mut self,
        udp: bool,
        host: SocketAddr,
        guest: SocketAddr,
    ) -> std::io::Result<()> {
        let slirp = self.slirp.as_ptr();
        let result = match (host, guest) {
            (SocketAddr::V4(host), SocketAddr::V4(guest)) => {
                let (at, to) = (raw(*host.ip()), raw(*guest.ip()));
                // SAFETY: the stack is alive.
                unsafe {
                    slirp_add_hostfwd(slirp, udp.into(), at, host.port().into(), to, guest.port().into())
                }
            }
            (SocketAddr::V6(host), SocketAddr::V6(guest)) => {
                let (at, to) = (socket_address6(host), socket_address6(guest));
                let (at, to) = ((&raw const at).cast(), (&raw const to).cast());
                // SAFETY: the stack is alive; both addresses live during the call, which copies them.
                unsafe { slirp_add_hostxfwd(slirp, at, IN6_LEN, to, IN6_LEN, forward_flags(udp)) }
            }
            _ => return Err(std::io::ErrorKind::InvalidInput.into()),
        };
        if result < 0 {
            return Err(std::io::Error::last_os_error());
        }
        if !udp {
            if let SocketAddr::V4(guest) = guest
                && !self.gate.guests.contains(guest.ip())
            {
                self.gate.guests.push(*guest.ip());
            }
            self.find_listeners();
        }
        Ok(())
    }

    /// Has listening sockets take bursts of connections: libslirp asks for one that waits, and those beyond it would stall until
    /// their peers send again. Those for IPv4 are the gate's.
    fn find_listeners(&mut self) {
        self.gate.listeners.clear();
        let mut list: Vec<libc::pollfd> = Vec::new();
        let mut timeout = 0;
        // SAFETY: the stack is alive; the list lives during the call, as `add_poll` wants it.
        unsafe { slirp_pollfds_fill(self.slirp.as_ptr(), &mut timeout, add_poll, (&raw mut list).cast()) };
        for entry in list {
            // SAFETY: libslirp named the descriptor just now, and nothing has closed it since.
            let socket = unsafe { BorrowedFd::borrow_raw(entry.fd) };
            if rustix::net::sockopt::socket_acceptconn(socket) == Ok(true) {
                let _ = rustix::net::listen(socket, BACKLOG);
                if rustix::net::sockopt::socket_domain(socket) == Ok(rustix::net::AddressFamily::INET) {
                    self.gate.listeners.push(entry.fd);
                }
            }
        }
    }

    /// Takes back what [`Slirp::add_forward`] did; false if there was no such port.
    pub(crate) fn remove_forward(&mut self, udp: bool, host: SocketAddr) -> bool {
        let slirp = self.slirp.as_ptr();
        let removed = match host {
            // SAFETY: the stack is alive.
            SocketAddr::V4(host) => unsafe {
                slirp_remove_hostfwd(slirp, udp.into(), raw(*host.ip()), host.port().into()) >= 0
            },
            SocketAddr::V6(host) => {
                let at = socket_address6(host);
                // SAFETY: the stack is alive; the address lives during the call.
                unsafe {
                    slirp_remove_hostxfwd(slirp, (&raw const at).cast(), IN6_LEN, forward_flags(udp)) >= 0
                }
            }
        };
        self.find_listeners();
        removed
    }
}

impl Drop for Slirp {
    fn drop(&mut self) {
        // SAFETY: made by `slirp_new` and `Box::leak`, each released once; callbacks end with the stack.
        unsafe {
            slirp_cleanup(self.slirp.as_ptr());
            drop(Box::from_raw(self.context.as_ptr()));
        }
    }
}
