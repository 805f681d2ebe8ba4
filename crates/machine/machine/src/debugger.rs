//! A kernel debugger's connection: UDP to where the debugger listens (`VBoxManage modifyvm --paravirt-debug`).

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use gim::debug::Debugger;
use parking_lot::Mutex;
use rustix::net::Shutdown;

/// Datagrams that wait for the guest; what comes beyond them is lost, as UDP allows.
const MOST: usize = 64;
/// Bytes of the longest datagram that is taken.
const LONGEST: usize = 4096;

/// The connection to one debugger.
pub(crate) struct Connection {
    socket: Arc<UdpSocket>,
    coming: Mutex<VecDeque<Vec<u8>>>,
}

impl Connection {
    /// Datagrams go to `debugger`, and come from there only.
    pub(crate) fn open(debugger: SocketAddr) -> Result<Arc<Self>> {
        let from: SocketAddr = match debugger {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(from)
            .and_then(|socket| socket.connect(debugger).map(|()| socket))
            .with_context(|| format!("cannot reach the kernel debugger at {debugger} (--paravirt-debug)"))?;
        Ok(Arc::new(Self { socket: Arc::new(socket), coming: Mutex::default() }))
    }

    /// Has a thread take what the debugger sends, until the connection is dropped. `spoke` is called for each datagram.
    pub(crate) fn listen(self: &Arc<Self>, spoke: impl Fn() + Send + 'static) -> Result<()> {
        let (socket, connection) = (self.socket.clone(), Arc::downgrade(self));
        std::thread::Builder::new()
            .name("debugger".into())
            .spawn(move || take_in(&socket, &connection, spoke))
            .context("cannot start the thread of the kernel debugger's connection")?;
        Ok(())
    }
}

fn take_in(socket: &UdpSocket, connection: &Weak<Connection>, spoke: impl Fn()) {
    let mut datagram = [0; LONGEST];
    loop {
        let got = socket.recv(&mut datagram);
        // After the end of the connection nothing comes, at once.
        let Some(connection) = connection.upgrade() else { return };
        match got {
            Ok(0) => {}
            Ok(size) => {
                let mut coming = connection.coming.lock();
                if coming.len() < MOST {
                    coming.push_back(datagram[..size].to_vec());
                }
                drop(coming);
                spoke();
            }
            // Nobody listens there, or not yet.
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::Interrupted) => {}
            Err(error) => {
                tracing::error!(target: "gim", "the kernel debugger is not heard any more: {error}");
                return;
            }
        }
    }
}

impl Debugger for Connection {
    fn send(&self, payload: &[u8]) -> bool {
        let sent = match self.socket.send(payload) {
            // That is the answer to an earlier datagram.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => self.socket.send(payload),
            other => other,
        };
        sent.is_ok()
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.coming.lock().pop_front()
    }

    fn has_data(&self) -> bool {
        !self.coming.lock().is_empty()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Wakes the thread.
        let _ = rustix::net::shutdown(&*self.socket, Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn datagrams_go_both_ways_and_the_thread_ends_with_the_connection() {
        let debugger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        debugger.set_read_timeout(Some(PATIENCE)).unwrap();
        let connection = Connection::open(debugger.local_addr().unwrap()).unwrap();
        let (spoke, heard) = channel();
        connection.listen(move || spoke.send(()).unwrap()).unwrap();
        assert!(connection.send(b"hello"));
        let mut text = [0; 16];
        let (size, guest) = debugger.recv_from(&mut text).unwrap();
        assert_eq!(&text[..size], b"hello");
        for word in [&b"one"[..], b"", b"two"] {
            debugger.send_to(word, guest).unwrap();
        }
        for word in [b"one", b"two"] {
            heard.recv_timeout(PATIENCE).unwrap();
            assert_eq!(connection.receive().as_deref(), Some(&word[..]));
        }
        assert!(!connection.has_data() && connection.receive().is_none());
        drop(connection);
        // The thread drops the sender.
        assert!(
            heard.recv_timeout(PATIENCE).is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Disconnected)
        );
    }

    #[test]
    fn where_nobody_listens_yet_the_guest_can_go_on_trying() {
        let debugger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let place = debugger.local_addr().unwrap();
        drop(debugger);
        let connection = Connection::open(place).unwrap();
        let (spoke, heard) = channel();
        connection.listen(move || spoke.send(()).unwrap()).unwrap();
        for _ in 0..5 {
            assert!(connection.send(b"anyone?"));
        }
        let debugger = UdpSocket::bind(place).unwrap();
        debugger.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(connection.send(b"hello"));
        let mut text = [0; 16];
        let (_, guest) = debugger.recv_from(&mut text).unwrap();
        debugger.send_to(b"here", guest).unwrap();
        heard.recv_timeout(PATIENCE).unwrap();
        assert_eq!(connection.receive().as_deref(), Some(&b"here"[..]));
    }

    #[test]
    fn what_nobody_takes_is_not_kept_without_end() {
        let debugger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let connection = Connection::open(debugger.local_addr().unwrap()).unwrap();
        let (spoke, heard) = channel();
        connection.listen(move || spoke.send(()).unwrap()).unwrap();
        let guest = connection.socket.local_addr().unwrap();
        for _ in 0..MOST + 10 {
            debugger.send_to(b"flood", guest).unwrap();
            heard.recv_timeout(PATIENCE).unwrap();
        }
        assert_eq!(std::iter::from_fn(|| connection.receive()).count(), MOST);
    }
}
