//! Back ends of serial ports: raw file, local socket ("host pipe", server or client), TCP (server or client), host device.
//!
//! What the guest sends goes through a bounded queue to a writer thread; a full queue holds the guest back, as a slow
//! line does. What arrives is offered to the port by a reader thread, which waits while the port's FIFO is full. A server with nobody
//! connected drops what the guest sends.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use parking_lot::{Condvar, Mutex};
use pdm::connector::{CharDriver, CharPort};

use crate::config::UartMode;

/// Bytes that may wait for a slow receiver.
const QUEUE_LIMIT: usize = 64 * 1024;
/// Bytes written at once: what a slow receiver takes shows in steps of this.
const WRITE_SIZE: usize = 4096;
/// How long power-off waits for a receiver that takes nothing of what the guest sent last.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How long power-off waits for a receiver that is slow.
const DRAIN_TIME: Duration = Duration::from_secs(10);
/// How long power-off waits for a peer to hang up in turn. While it may still send, hanging up for good could cost it the output's end:
/// TCP resets a connection that is closed with input unread.
const LINGER: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Queue {
    data: VecDeque<u8>,
    /// The port was refused bytes and wants to hear when there is room.
    refused: bool,
    /// The writer has taken bytes that are not written yet, or has the port hand over what it was refused.
    writing: bool,
    /// Counts what was written, so that a slow receiver can be told from one that takes nothing.
    written: u64,
    /// The peer may still send.
    reading: bool,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    port: OnceLock<Arc<dyn CharPort>>,
    /// Whoever is connected now.
    peer: Mutex<Option<Arc<OwnedFd>>>,
}

/// A serial port's back end.
pub struct CharBackend {
    shared: Arc<Shared>,
    /// Removed when the back end closes.
    socket_path: Option<PathBuf>,
}

enum Endpoint {
    File(File),
    Stream(OwnedFd),
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl CharBackend {
    /// Opens what `mode` names; `None` for a disconnected port.
    pub fn open(mode: &UartMode) -> Result<Option<Arc<Self>>> {
        let mut socket_path = None;
        let endpoint = match mode {
            UartMode::Disconnected => return Ok(None),
            UartMode::File(path) => Endpoint::File(
                File::create(path)
                    .with_context(|| format!("cannot create the serial port's file \"{}\"", path.display()))?,
            ),
            UartMode::HostDevice(path) => Endpoint::Stream(
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(path)
                    .with_context(|| format!("cannot open the host's serial device \"{}\"", path.display()))?
                    .into(),
            ),
            UartMode::PipeServer(path) => {
                socket_path = Some(path.clone());
                Endpoint::Unix(listen_unix(path)?)
            }
            UartMode::PipeClient(path) => Endpoint::Stream(
                UnixStream::connect(path)
                    .with_context(|| {
                        format!(
                            "cannot connect to the serial port's socket \"{}\": start what listens there first, or use \
                             --uart-mode server",
                            path.display()
                        )
                    })?
                    .into(),
            ),
            UartMode::TcpServer(port) => Endpoint::Tcp(
                TcpListener::bind(("0.0.0.0", *port))
                    .with_context(|| format!("cannot listen at TCP port {port} for the serial port"))?,
            ),
            UartMode::TcpClient(address) => Endpoint::Stream(
                TcpStream::connect(address.as_str())
                    .with_context(|| format!("cannot connect the serial port to {address}"))?
                    .into(),
            ),
        };
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            port: OnceLock::new(),
            peer: Mutex::new(None),
        });
        let name = |what: &str| std::thread::Builder::new().name(format!("serial-{what}"));
        match endpoint {
            Endpoint::File(file) => *shared.peer.lock() = Some(Arc::new(file.into())),
            Endpoint::Stream(fd) => {
                let fd = Arc::new(fd);
                *shared.peer.lock() = Some(fd.clone());
                let shared = shared.clone();
                name("reader").spawn(move || shared.read_from(&fd))?;
            }
            Endpoint::Unix(listener) => {
                let shared = shared.clone();
                name("accept").spawn(move || {
                    shared.serve(|| listener.accept().map(|(stream, _)| OwnedFd::from(stream)));
                })?;
            }
            Endpoint::Tcp(listener) => {
                let shared = shared.clone();
                name("accept").spawn(move || {
                    shared.serve(|| {
                        let (stream, _) = listener.accept()?;
                        stream.set_nodelay(true)?;
                        Ok(OwnedFd::from(stream))
                    });
                })?;
            }
        }
        let writer = shared.clone();
        name("writer").spawn(move || writer.write_out())?;
        Ok(Some(Arc::new(Self { shared, socket_path })))
    }

    /// Joins the back end to its port. Bytes that arrive before are kept by the kernel.
    pub fn attach(&self, port: Arc<dyn CharPort>) {
        let _ = self.shared.port.set(port);
        let connected = self.shared.peer.lock().is_some();
        self.shared.tell_modem(connected);
    }

    /// Writes out what the guest has sent, also what waits in the port's own FIFO, hangs up, and removes the socket. A receiver that is
    /// slow or takes nothing is waited for for a limited time.
    pub fn close(&self) {
        let mut queue = self.shared.queue.lock();
        let end = Instant::now() + DRAIN_TIME;
        while !queue.data.is_empty() || queue.writing {
            let written = queue.written;
            let limit = end.min(Instant::now() + DRAIN_PATIENCE);
            let mut late = false;
            while !late && queue.written == written && (!queue.data.is_empty() || queue.writing) {
                late = self.shared.changed.wait_until(&mut queue, limit).timed_out();
            }
            if late {
                let lost = queue.data.len();
                tracing::warn!(target: "serial", lost, "the receiver of the serial port's output took too long: its end is lost");
                break;
            }
        }
        queue.closed = true;
        drop(queue);
        self.shared.changed.notify_all();
        let peer = self.shared.peer.lock().take();
        if let Some(peer) = peer
            && rustix::net::shutdown(&peer, rustix::net::Shutdown::Write).is_ok()
        {
            let limit = Instant::now() + LINGER;
            let mut queue = self.shared.queue.lock();
            while queue.reading && !self.shared.changed.wait_until(&mut queue, limit).timed_out() {}
            drop(queue);
            let _ = rustix::net::shutdown(&peer, rustix::net::Shutdown::Both);
        }
        if let Some(path) = &self.socket_path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for CharBackend {
    fn drop(&mut self) {
        self.close();
    }
}

/// Listens at `path`, replacing a socket that a dead process left.
fn listen_unix(path: &Path) -> Result<UnixListener> {
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            bail!("the serial port's socket \"{}\" exists and is something else; remove it", path.display());
        }
        if UnixStream::connect(path).is_ok() {
            bail!("another process listens at the serial port's socket \"{}\"", path.display());
        }
        std::fs::remove_file(path)
            .with_context(|| format!("cannot replace the stale socket \"{}\"", path.display()))?;
    }
    UnixListener::bind(path)
        .with_context(|| format!("cannot listen at the serial port's socket \"{}\"", path.display()))
}

impl Shared {
    fn port(&self) -> Option<&Arc<dyn CharPort>> {
        self.port.get()
    }

    fn tell_modem(&self, connected: bool) {
        if let Some(port) = self.port() {
            port.set_modem_status(connected, true, true, false);
        }
    }

    fn is_closed(&self) -> bool {
        self.queue.lock().closed
    }

    fn serve(&self, accept: impl Fn() -> io::Result<OwnedFd>) {
        while !self.is_closed() {
            match accept() {
                Ok(fd) => {
                    let fd = Arc::new(fd);
                    *self.peer.lock() = Some(fd.clone());
                    if self.is_closed() {
                        return;
                    }
                    self.tell_modem(true);
                    self.changed.notify_all();
                    self.read_from(&fd);
                    *self.peer.lock() = None;
                    self.tell_modem(false);
                }
                Err(error) => {
                    tracing::warn!(target: "serial", %error, "cannot accept a connection");
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
        }
    }

    /// Hands what arrives to the port until the peer hangs up.
    fn read_from(&self, fd: &OwnedFd) {
        self.queue.lock().reading = true;
        self.read_to_end(fd);
        self.queue.lock().reading = false;
        self.changed.notify_all();
    }

    fn read_to_end(&self, fd: &OwnedFd) {
        let mut buffer = [0; 4096];
        loop {
            let count = match rustix::io::read(fd, &mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            };
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                if self.is_closed() {
                    // Nobody is there to take it, but it must not stay unread.
                    break;
                }
                let Some(port) = self.port() else {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                };
                let taken = port.receive(rest);
                rest = &rest[taken..];
                if !rest.is_empty() {
                    let (sender, receiver) = std::sync::mpsc::channel();
                    port.wait_writable(Box::new(move || {
                        let _ = sender.send(());
                    }));
                    // A guest that never reads must not keep this thread from noticing power-off.
                    let _ = receiver.recv_timeout(Duration::from_millis(500));
                }
            }
        }
    }

    fn write_out(&self) {
        loop {
            let mut queue = self.queue.lock();
            while queue.data.is_empty() {
                if queue.closed {
                    return;
                }
                self.changed.wait(&mut queue);
            }
            let chunk: Vec<u8> = queue.data.drain(..).collect();
            queue.writing = true;
            drop(queue);
            let peer = self.peer.lock().clone();
            if let Some(peer) = peer {
                for piece in chunk.chunks(WRITE_SIZE) {
                    if !write_all(&peer, piece) {
                        break;
                    }
                    self.queue.lock().written += 1;
                    self.changed.notify_all();
                }
            }
            // The port may hold the output's end: it counts as being written until it was taken over.
            let wake = std::mem::take(&mut self.queue.lock().refused);
            if wake && let Some(port) = self.port() {
                port.ready();
            }
            self.queue.lock().writing = false;
            self.changed.notify_all();
        }
    }
}

/// False if nothing more can be written.
fn write_all(fd: &impl AsFd, mut data: &[u8]) -> bool {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(count) => data = &data[count..],
            Err(rustix::io::Errno::INTR) => {}
            // The reader notices that the peer is gone; a full disk loses output, as a cut line does.
            Err(error) => {
                tracing::warn!(target: "serial", %error, lost = data.len(), "serial output was lost");
                return false;
            }
        }
    }
    true
}

impl CharDriver for CharBackend {
    fn write(&self, data: &[u8]) -> usize {
        let mut queue = self.shared.queue.lock();
        let room = QUEUE_LIMIT - queue.data.len().min(QUEUE_LIMIT);
        let taken = data.len().min(room);
        queue.data.extend(&data[..taken]);
        queue.refused |= taken < data.len();
        drop(queue);
        self.shared.changed.notify_all();
        taken
    }

    fn set_modem_control(&self, _dtr: bool, _rts: bool) {}

    fn set_break(&self, _on: bool) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[derive(Default)]
    struct Port(Mutex<Vec<u8>>);
    impl CharPort for Port {
        fn receive(&self, data: &[u8]) -> usize {
            // One byte at a time: the back end has to bring the rest again.
            self.0.lock().push(data[0]);
            1
        }
        fn wait_writable(&self, wake: Box<dyn FnOnce() + Send>) {
            wake();
        }
        fn ready(&self) {}
        fn set_modem_status(&self, _: bool, _: bool, _: bool, _: bool) {}
    }

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("boxwood-serial-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_server_carries_bytes_both_ways_and_leaves_no_socket() {
        let path = temporary("server");
        let backend = CharBackend::open(&UartMode::PipeServer(path.clone())).unwrap().unwrap();
        let port = Arc::new(Port::default());
        backend.attach(port.clone());
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"ls").unwrap();
        while port.0.lock().len() < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(*port.0.lock(), b"ls");
        assert_eq!(backend.write(b"ok"), 2);
        let mut answer = [0; 2];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ok");
        drop(backend);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_refused() {
        let path = temporary("stale");
        drop(UnixListener::bind(&path).unwrap());
        let first = CharBackend::open(&UartMode::PipeServer(path.clone())).unwrap().unwrap();
        assert!(CharBackend::open(&UartMode::PipeServer(path.clone())).is_err());
        drop(first);
    }

    /// A port whose guest has more to send than the back end takes at once, and is gone.
    struct Sender {
        rest: Mutex<Vec<u8>>,
        backend: std::sync::Weak<CharBackend>,
    }
    impl Sender {
        /// Sends what the back end takes, as a UART at power-off: from inside `ready` only.
        fn start(backend: &Arc<CharBackend>, data: &[u8]) {
            let port = Arc::new(Self { rest: Mutex::new(data.to_vec()), backend: Arc::downgrade(backend) });
            backend.attach(port.clone());
            port.ready();
        }
    }
    impl CharPort for Sender {
        fn receive(&self, _: &[u8]) -> usize {
            0
        }
        fn wait_writable(&self, _: Box<dyn FnOnce() + Send>) {}
        fn ready(&self) {
            let mut rest = self.rest.lock();
            if let Some(backend) = self.backend.upgrade() {
                let taken = backend.write(&rest);
                rest.drain(..taken);
            }
        }
        fn set_modem_status(&self, _: bool, _: bool, _: bool, _: bool) {}
    }

    fn output(len: usize) -> Vec<u8> {
        (0..len).map(|n| (n / 251) as u8 ^ n as u8).collect()
    }

    /// A reader that takes its time at first and sends what nobody reads.
    fn read_late(mut stream: impl Read + Write + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
        std::thread::spawn(move || {
            stream.write_all(b"typed ahead").unwrap();
            std::thread::sleep(Duration::from_millis(300));
            let mut all = Vec::new();
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                all.extend(&buffer[..count]);
            }
            all
        })
    }

    #[test]
    fn every_byte_arrives_though_the_queue_was_full_when_the_machine_went_off() {
        let sent = output(3 * QUEUE_LIMIT + 16);
        let wait = |backend: &CharBackend| {
            while backend.shared.peer.lock().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        // File.
        let path = temporary("much");
        let backend = CharBackend::open(&UartMode::File(path.clone())).unwrap().unwrap();
        Sender::start(&backend, &sent);
        backend.close();
        assert!(std::fs::read(&path).unwrap() == sent, "file");
        std::fs::remove_file(&path).unwrap();
        // Socket, as server and as client.
        let path = temporary("much-server");
        let backend = CharBackend::open(&UartMode::PipeServer(path.clone())).unwrap().unwrap();
        let reader = read_late(UnixStream::connect(&path).unwrap());
        wait(&backend);
        Sender::start(&backend, &sent);
        backend.close();
        assert!(reader.join().unwrap() == sent, "server");
        let path = temporary("much-client");
        let listener = UnixListener::bind(&path).unwrap();
        let backend = CharBackend::open(&UartMode::PipeClient(path.clone())).unwrap().unwrap();
        let reader = read_late(listener.accept().unwrap().0);
        Sender::start(&backend, &sent);
        backend.close();
        assert!(reader.join().unwrap() == sent, "client");
        std::fs::remove_file(&path).unwrap();
        // TCP.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let backend = CharBackend::open(&UartMode::TcpClient(address)).unwrap().unwrap();
        let reader = read_late(listener.accept().unwrap().0);
        Sender::start(&backend, &sent);
        backend.close();
        assert!(reader.join().unwrap() == sent, "TCP client");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let backend = CharBackend::open(&UartMode::TcpServer(port)).unwrap().unwrap();
        let reader = read_late(TcpStream::connect(("127.0.0.1", port)).unwrap());
        wait(&backend);
        Sender::start(&backend, &sent);
        backend.close();
        assert!(reader.join().unwrap() == sent, "TCP server");
    }

    #[test]
    fn a_receiver_that_takes_nothing_does_not_hold_power_off_for_long() {
        let path = temporary("deaf");
        let backend = CharBackend::open(&UartMode::PipeServer(path.clone())).unwrap().unwrap();
        let peer = UnixStream::connect(&path).unwrap();
        while backend.shared.peer.lock().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Sender::start(&backend, &output(1 << 20));
        let began = Instant::now();
        backend.close();
        assert!(began.elapsed() < DRAIN_TIME, "{:?}", began.elapsed());
        drop(peer);
    }

    #[test]
    fn a_file_holds_everything_sent_before_closing() {
        let path = temporary("file");
        let backend = CharBackend::open(&UartMode::File(path.clone())).unwrap().unwrap();
        assert_eq!(backend.write(&[b'x'; 1000]), 1000);
        backend.close();
        assert_eq!(std::fs::read(&path).unwrap().len(), 1000);
        std::fs::remove_file(&path).unwrap();
    }
}
