//! A card's end of a network that is reached by a socket on which each message is a frame: a switch's process, a UDP tunnel, VDE.
//!
//! Frames of the guest are written at once, without waiting; when the socket has no room the card keeps its frame until there is. Frames for
//! the guest are read by a thread, and not read while the guest has no room for them, so that they wait, and are dropped, at the other end.
//!
//! When the other end goes, frames of the guest go nowhere, as with a cable into a dead switch, and the thread asks for a new socket until it
//! gets one.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::nat::Guest;

/// The longest frame that is passed on.
pub const MAX_FRAME: usize = 0x1_0000;
/// Frames that are read before the thread looks whether there is something else to do.
const BATCH: usize = 64;
/// How often a new socket is asked for.
const RECONNECT: Duration = Duration::from_millis(500);

/// Gets a new socket in place of one that is dead; `None` if there is none now. Called on the link's thread.
pub type Reconnect = Box<dyn Fn() -> Option<OwnedFd> + Send>;

/// Why a link cannot be.
#[derive(Debug, thiserror::Error)]
#[error("the network's thread cannot be started")]
pub struct LinkError(#[source] std::io::Error);

#[derive(Default)]
struct State {
    /// The socket; `None` while the other end is gone.
    socket: Option<Arc<OwnedFd>>,
    /// A frame was given back: tell the guest when there is room.
    refused: bool,
    /// The guest has room again.
    resumed: bool,
    quit: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: OwnedFd,
}

impl Shared {
    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// A link; ends when dropped.
pub struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Joins `guest` to what is at the other end of `socket`.
    pub fn start(
        socket: OwnedFd,
        guest: Arc<dyn Guest>,
        reconnect: Option<Reconnect>,
    ) -> Result<Self, LinkError> {
        let failed = |e: Errno| LinkError(e.into());
        rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let state = State { socket: Some(Arc::new(socket)), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake });
        let engine = Engine { shared: shared.clone(), guest, reconnect, pending: None };
        let thread =
            std::thread::Builder::new().name("net".into()).spawn(move || engine.run()).map_err(LinkError)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Sends a frame of the guest; gives it back if there is no room.
    pub fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        let mut state = self.shared.state.lock();
        let Some(socket) = state.socket.clone().filter(|_| frame.len() <= MAX_FRAME) else { return Ok(()) };
        match send(&socket, &frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::AGAIN | Errno::NOBUFS) => {
                state.refused = true;
                drop(state);
                self.shared.wake();
                Err(frame)
            }
            // A dead end is seen by the thread; a frame that the other end cannot take is lost, as on a cable.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// The guest has room for frames again.
    pub fn resume(&self) {
        self.shared.state.lock().resumed = true;
        self.shared.wake();
    }

    /// Whether the other end is there.
    pub fn is_connected(&self) -> bool {
        self.shared.state.lock().socket.is_some()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.state.lock().quit = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Engine {
    shared: Arc<Shared>,
    guest: Arc<dyn Guest>,
    reconnect: Option<Reconnect>,
    /// A frame that the guest had no room for.
    pending: Option<Vec<u8>>,
}

impl Engine {
    fn run(mut self) {
        let mut buffer = vec![0; MAX_FRAME];
        let mut tried = Instant::now();
        loop {
            let (socket, refused) = {
                let mut state = self.shared.state.lock();
                if state.quit {
                    return;
                }
                if std::mem::take(&mut state.resumed)
                    && let Some(frame) = self.pending.take()
                {
                    drop(state);
                    self.offer(frame);
                    continue;
                }
                (state.socket.clone(), state.refused)
            };
            let Some(socket) = socket else {
                // The guest's frames go nowhere now: it need not keep them.
                self.let_go();
                self.sleep(RECONNECT.saturating_sub(tried.elapsed()));
                if tried.elapsed() >= RECONNECT {
                    tried = Instant::now();
                    self.find_another();
                }
                continue;
            };
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, self.pending.is_none());
            wanted.set(PollFlags::OUT, refused);
            let mut fds = [
                PollFd::from_borrowed_fd(socket.as_fd(), wanted),
                PollFd::from_borrowed_fd(self.shared.wake.as_fd(), PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err_and(|e| e != Errno::INTR) {
                std::thread::sleep(RECONNECT);
            }
            let (seen, woken) = (fds[0].revents(), !fds[1].revents().is_empty());
            if woken {
                let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
            }
            if seen.contains(PollFlags::OUT) {
                self.let_go();
            }
            let dead = if seen.contains(PollFlags::IN) {
                self.receive(&socket, &mut buffer)
            } else {
                // A datagram socket shows errors of earlier frames so; they are read off.
                seen.contains(PollFlags::ERR) && self.receive(&socket, &mut buffer)
                    || seen.contains(PollFlags::HUP) && self.pending.is_none()
            };
            if dead || seen.contains(PollFlags::NVAL) {
                tracing::warn!(target: "net", "the network's other end (descriptor {}) is gone", socket.as_raw_fd());
                self.shared.state.lock().socket = None;
                if self.reconnect.is_some() {
                    tried = Instant::now().checked_sub(RECONNECT).unwrap_or(tried);
                }
            } else if seen.contains(PollFlags::HUP) {
                // The last frames wait for the guest: no need to look again at once.
                self.sleep(RECONNECT);
            }
        }
    }

    /// Waits, at most for `limit`, until there is something to do.
    fn sleep(&self, limit: Duration) {
        let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(self.shared.wake.as_fd(), PollFlags::IN)];
        if poll(&mut fds, Some(&limit)).is_ok_and(|n| n > 0) {
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
        }
    }

    /// Tells the guest that there is room, if it waits for that.
    fn let_go(&self) {
        if std::mem::take(&mut self.shared.state.lock().refused) {
            self.guest.ready();
        }
    }

    fn find_another(&self) {
        let Some(socket) = self.reconnect.as_ref().and_then(|reconnect| reconnect()) else { return };
        if rustix::io::ioctl_fionbio(&socket, true).is_ok() {
            tracing::info!(target: "net", "the network is back");
            self.shared.state.lock().socket = Some(Arc::new(socket));
        }
    }

    fn offer(&mut self, frame: Vec<u8>) {
        if !self.guest.receive(&frame) {
            self.pending = Some(frame);
        }
    }

    /// Reads frames for the guest; true if the other end is gone.
    fn receive(&mut self, socket: &OwnedFd, buffer: &mut [u8]) -> bool {
        for _ in 0..BATCH {
            if self.pending.is_some() {
                return false;
            }
            match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
                // The end of a connection; an empty datagram says nothing, and is none of a switch's.
                Ok((0, _)) => {
                    return rustix::net::sockopt::socket_type(socket)
                        == Ok(rustix::net::SocketType::SEQPACKET);
                }
                Ok((length, _)) => {
                    if let Some(frame) = buffer.get(..length)
                        && !self.guest.receive(frame)
                    {
                        self.pending = Some(frame.to_vec());
                    }
                }
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                // Nobody listens at the other end of a tunnel: that may change.
                Err(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::MSGSIZE) => {}
                Err(_) => return true,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[derive(Default)]
    struct Card {
        frames: Mutex<Vec<Vec<u8>>>,
        full: AtomicBool,
        readies: AtomicUsize,
    }

    impl Guest for Card {
        fn receive(&self, frame: &[u8]) -> bool {
            if self.full.load(Ordering::SeqCst) {
                return false;
            }
            self.frames.lock().push(frame.to_vec());
            true
        }

        fn ready(&self) {
            self.readies.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn wait(what: impl Fn() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        while !what() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        what()
    }

    #[test]
    fn frames_pass_both_ways_and_wait_for_a_guest_without_room() {
        let (own, other) = pair();
        let card = Arc::new(Card::default());
        let link = Link::start(own, card.clone(), None).unwrap();
        link.send(vec![1; 60]).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(recv(&other, &mut buffer, RecvFlags::empty()).unwrap().0, 60);
        card.full.store(true, Ordering::SeqCst);
        for n in 0..10 {
            send(&other, &[n; 60], SendFlags::empty()).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        card.full.store(false, Ordering::SeqCst);
        link.resume();
        assert!(wait(|| card.frames.lock().len() == 10));
        assert!(card.frames.lock().iter().enumerate().all(|(n, f)| *f == vec![n as u8; 60]), "in order");
    }

    #[test]
    fn a_full_socket_gives_the_frame_back_and_tells_when_there_is_room() {
        let (own, other) = pair();
        let card = Arc::new(Card::default());
        let link = Link::start(own, card.clone(), None).unwrap();
        let mut sent = 0;
        while link.send(vec![0; 1500]).is_ok() {
            sent += 1;
        }
        assert_eq!(card.readies.load(Ordering::SeqCst), 0);
        let mut buffer = [0; 2000];
        for _ in 0..sent {
            recv(&other, &mut buffer, RecvFlags::empty()).unwrap();
        }
        assert!(wait(|| card.readies.load(Ordering::SeqCst) == 1));
    }

    #[test]
    fn a_link_whose_other_end_died_takes_a_new_one() {
        let (own, other) = pair();
        let (second_own, second_other) = pair();
        let card = Arc::new(Card::default());
        let spare = Mutex::new(Some(second_own));
        let link = Link::start(own, card.clone(), Some(Box::new(move || spare.lock().take()))).unwrap();
        drop(other);
        assert!(wait(|| {
            link.send(vec![7; 60]).unwrap();
            let mut buffer = [0; 100];
            recv(&second_other, &mut buffer, RecvFlags::DONTWAIT).is_ok_and(|(n, _)| n == 60)
        }));
        send(&second_other, &[9; 60], SendFlags::empty()).unwrap();
        assert!(wait(|| card.frames.lock().len() == 1));
    }

    #[test]
    fn a_link_without_another_end_swallows_frames_and_ends_at_once() {
        let (own, other) = pair();
        let link = Link::start(own, Arc::new(Card::default()), None).unwrap();
        drop(other);
        assert!(wait(|| !link.is_connected()));
        assert_eq!(link.send(vec![0; 60]), Ok(()));
    }
}
