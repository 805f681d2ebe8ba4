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
/// How long power-off waits for a receiver to take what the guest sent last.
const DRAIN_TIME: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Queue {
    data: VecDeque<u8>,
    /// The port was refused bytes and wants to hear when there is room.
    refused: bool,
    /// The writer has taken bytes that are not written yet.
    writing: bool,
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

    /// Writes out what is queued (for a limited time), hangs up, and removes the socket.
    pub fn close(&self) {
        let mut queue = self.shared.queue.lock();
        let limit = Instant::now() + DRAIN_TIME;
        while !queue.data.is_empty() || queue.writing {
            if self.shared.changed.wait_until(&mut queue, limit).timed_out() {
                break;
            }
        }
        queue.closed = true;
        drop(queue);
        self.shared.changed.notify_all();
        if let Some(peer) = self.shared.peer.lock().take() {
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
                    return;
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
                write_all(&peer, &chunk);
            }
            let mut queue = self.queue.lock();
            queue.writing = false;
            let wake = std::mem::take(&mut queue.refused);
            drop(queue);
            self.changed.notify_all();
            if wake && let Some(port) = self.port() {
                port.ready();
            }
        }
    }
}

fn write_all(fd: &impl AsFd, mut data: &[u8]) {
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(count) => data = &data[count..],
            Err(rustix::io::Errno::INTR) => {}
            // The reader notices that the peer is gone; a full disk loses output, as a cut line does.
            Err(error) => {
                tracing::warn!(target: "serial", %error, lost = data.len(), "serial output was lost");
                return;
            }
        }
    }
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
