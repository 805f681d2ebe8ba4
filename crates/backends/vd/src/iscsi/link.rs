//! The way to a target: a connection with its session, and the thread that keeps one up.
//!
//! A connection that is lost is made anew, and what was not answered is given to the target again. It is given in a session that
//! *reinstates* the lost one (the same initiator name and ISID, RFC 7143 6.3.5): the target ends what the old session had before it
//! lets the new one in, so no write of the old one comes late. What stays without an answer for [`PATIENCE`] fails.

use std::collections::VecDeque;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::Fault;
use super::login::{Login, Step};
use super::pdu::{self, HEADER};
use super::scsi::{self, Capacity, Verdict};
use super::session::{Command, Outcome, Session};
use super::settings::{MOST, Target};

/// How long a command waits for a target that is away.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// How long the target may take for one command while it answers to pings, in timeouts.
const SLOW: u32 = 6;
/// Between attempts to connect.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long the target gets to confirm that we leave.
const FAREWELL: Duration = Duration::from_secs(2);
/// A target that does not take what we have to say is not listened to.
const MOST_BACKLOG: usize = 16 << 20;
/// A PDU with all that may belong to it, and room to read ahead.
const INPUT: usize = HEADER + 255 * 4 + MOST as usize + 65536;
const MOST_REDIRECTIONS: u32 = 4;

/// A byte stream to the target. Reading and writing do not wait.
pub(super) trait Wire: Send {
    /// Waits until there is something to read, room to write, news for the thread, or it is time.
    fn wait(&mut self, read: bool, write: bool, until: Option<Instant>) -> io::Result<()>;
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

struct Tcp {
    stream: TcpStream,
    inbox: Arc<Inbox>,
}

impl Wire for Tcp {
    fn wait(&mut self, read: bool, write: bool, until: Option<Instant>) -> io::Result<()> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, read);
        wanted.set(PollFlags::OUT, write);
        self.inbox.wait(Some(PollFd::new(&self.stream, wanted)), until)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut self.stream, buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut self.stream, bytes)
    }
}

/// What a target sends, known beforehand; for fuzzing.
pub(super) struct Memory(pub(super) VecDeque<u8>);

impl Wire for Memory {
    fn wait(&mut self, _read: bool, _write: bool, _until: Option<Instant>) -> io::Result<()> {
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut self.0, buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}

/// Connects to the first address of the host that answers. Also what we are called where nobody has given us a name.
fn connect(
    host: &str,
    port: u16,
    timeout: Duration,
    inbox: &Arc<Inbox>,
) -> Result<(Box<dyn Wire>, String), Fault> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs().map_err(Fault::Connect)? {
        let connected = TcpStream::connect_timeout(&address, timeout).and_then(|stream| {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            // A connection that nobody uses is told to be alive, so that what is between does not forget it.
            rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
            let own = format!("iqn.2009-08.com.sun.virtualbox.initiator:01:{}", stream.local_addr()?.ip());
            Ok((Box::new(Tcp { stream, inbox: inbox.clone() }) as Box<dyn Wire>, own))
        });
        match connected {
            Ok(connected) => return Ok(connected),
            Err(error) => last = error,
        }
    }
    Err(Fault::Connect(last))
}

/// A command on its way, and who waits for it.
pub(super) struct Job {
    /// Which of the waiter's commands it is.
    pub(super) number: usize,
    pub(super) since: Instant,
    pub(super) reply: Sender<Reply>,
}

/// A command that has come to its end, or the reason why it has not.
pub(super) type Reply = (usize, Command, Result<Outcome, Arc<str>>);

impl Job {
    fn reply(self, command: Command, result: Result<Outcome, Arc<str>>) {
        // Who does not wait any more does not want to know.
        let _ = self.reply.send((self.number, command, result));
    }
}

/// What the thread is told.
pub(super) struct Inbox {
    news: Mutex<News>,
    wake: OwnedFd,
}

#[derive(Default)]
struct News {
    jobs: VecDeque<(Job, Command)>,
    closing: bool,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self { news: Mutex::default(), wake }))
    }

    fn wake(&self) {
        // It fails only where it is full, and then it wakes, too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn submit(&self, job: Job, command: Command) {
        self.news.lock().jobs.push_back((job, command));
        self.wake();
    }

    pub(super) fn close(&self) {
        self.news.lock().closing = true;
        self.wake();
    }

    fn wait(&self, other: Option<PollFd<'_>>, until: Option<Instant>) -> io::Result<()> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let own = PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN);
        let polled = match other {
            Some(other) => poll(&mut [own, other], left.as_ref()),
            None => poll(&mut [own], left.as_ref()),
        };
        match polled {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        Ok(())
    }
}

/// What is known of the disk behind a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) capacity: Capacity,
    pub(super) read_only: bool,
    /// Most blocks of one UNMAP; 0 without.
    pub(super) unmap: u32,
    /// The disk was reset since we were there last.
    reset: bool,
}

/// A connection in the full-feature phase.
pub(super) struct Connection<T> {
    wire: Box<dyn Wire>,
    session: Session<Option<T>>,
    input: Input,
    timeout: Duration,
    /// When the last bytes came, or the first command after a rest was given.
    heard: Instant,
    pinged: Instant,
}

/// Bytes that have come and are not yet a PDU.
struct Input {
    bytes: Box<[u8]>,
    filled: usize,
}

impl Input {
    fn new() -> Self {
        Self { bytes: vec![0; INPUT].into_boxed_slice(), filled: 0 }
    }

    /// Reads what there is. Whether there was something.
    fn fill(&mut self, wire: &mut dyn Wire) -> Result<bool, Fault> {
        match wire.read(&mut self.bytes[self.filled..]) {
            Ok(0) => Err(Fault::Closed),
            Ok(count) => {
                self.filled += count;
                Ok(true)
            }
            Err(error) if is_transient(&error) => Ok(false),
            Err(error) => Err(Fault::Io(error)),
        }
    }

    /// Hands whole PDUs to `take`, until it does not want another one.
    fn each(&mut self, mut take: impl FnMut(&pdu::Pdu<'_>) -> Result<bool, Fault>) -> Result<(), Fault> {
        let mut at = 0;
        let mut more = true;
        while more && let Some((pdu, len)) = pdu::take(&self.bytes[at..self.filled], MOST as usize)? {
            at += len;
            more = take(&pdu)?;
        }
        self.bytes.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Writes what the wire takes now; how much.
fn flush(wire: &mut dyn Wire, bytes: &[u8]) -> Result<usize, Fault> {
    let mut done = 0;
    while done < bytes.len() {
        match wire.write(&bytes[done..]) {
            Ok(0) => return Err(Fault::Closed),
            Ok(count) => done += count,
            Err(error) if is_transient(&error) => break,
            Err(error) => return Err(Fault::Io(error)),
        }
    }
    Ok(done)
}

/// What a login leads to.
enum Entry<T> {
    In(Box<Connection<T>>),
    Moved(String, u16),
}

impl<T> Connection<T> {
    /// Logs in.
    fn enter(
        mut wire: Box<dyn Wire>,
        target: &Target,
        isid: [u8; 6],
        initiator: String,
    ) -> Result<Entry<T>, Fault> {
        let until = Instant::now() + target.timeout;
        let mut login = Login::new(target, isid, initiator).challenge()?;
        let mut input = Input::new();
        let mut out = login.start();
        let mut step = None;
        loop {
            let count = flush(&mut *wire, &out)?;
            out.drain(..count);
            if Instant::now() >= until {
                return Err(Fault::Silent(target.timeout));
            }
            wire.wait(true, !out.is_empty(), Some(until)).map_err(Fault::Io)?;
            input.fill(&mut *wire)?;
            input.each(|pdu| {
                step = Some(login.answer(pdu)?);
                Ok(false)
            })?;
            match step.take() {
                None => {}
                Some(Step::Send(request)) => out.extend(request),
                Some(Step::Moved(host, port)) => return Ok(Entry::Moved(host, port)),
                Some(Step::Done(agreed)) => {
                    let now = Instant::now();
                    let session = Session::new(agreed, target.lun);
                    let timeout = target.timeout;
                    let entered = Self { wire, session, input, timeout, heard: now, pinged: now };
                    return Ok(Entry::In(Box::new(entered)));
                }
            }
        }
    }

    fn submit(&mut self, ticket: Option<T>, command: Command) {
        let now = Instant::now();
        if self.session.is_idle() {
            self.heard = now;
        }
        self.session.submit(ticket, command, now);
    }

    /// Sends what is to be sent, waits for something to happen, and takes what has come.
    fn pump(&mut self, until: Option<Instant>) -> Result<(), Fault> {
        let count = flush(&mut *self.wire, self.session.output())?;
        self.session.sent(count);
        let backlog = self.session.output().len();
        let listen = backlog < MOST_BACKLOG;
        self.wire.wait(listen, backlog > 0, until).map_err(Fault::Io)?;
        if listen && self.input.fill(&mut *self.wire)? {
            let now = Instant::now();
            self.heard = now;
            let session = &mut self.session;
            self.input.each(|pdu| session.receive(pdu, now).map(|()| true))?;
        }
        Ok(())
    }

    /// Whether the target still lives, as far as something is expected of it; when to look again.
    fn check_life(&mut self) -> Result<Option<Instant>, Fault> {
        let now = Instant::now();
        let slow = self.timeout * SLOW;
        let Some(oldest) = self.session.oldest() else {
            // A window that does not open is looked at like a command that runs.
            let waiting = !self.session.is_idle();
            return if waiting && now >= self.heard + slow {
                Err(Fault::Silent(slow))
            } else {
                Ok(waiting.then(|| self.heard + slow))
            };
        };
        if now >= oldest + slow {
            return Err(Fault::Slow(slow));
        }
        if now >= self.heard.max(self.pinged) + self.timeout {
            if self.session.is_pinging() && self.heard <= self.pinged {
                return Err(Fault::Silent(self.timeout * 2));
            }
            self.session.ping();
            self.pinged = now;
        }
        Ok(Some((self.heard.max(self.pinged) + self.timeout).min(oldest + slow)))
    }

    /// Carries out a command of our own, on a connection that has no others.
    fn ask(&mut self, command: Command) -> Result<Outcome, Fault> {
        let until = Instant::now() + self.timeout;
        self.submit(None, command);
        loop {
            if let Some((_, _, outcome)) = self.session.finished().pop() {
                return Ok(outcome);
            }
            if Instant::now() >= until {
                return Err(Fault::Silent(self.timeout));
            }
            self.pump(Some(until))?;
        }
    }

    /// As [`Connection::ask`], again and again while that may help. `None` if the target does not know the command.
    fn ask_for(&mut self, command: &Command, reset: &mut bool) -> Result<Option<Vec<u8>>, Fault> {
        let until = Instant::now() + self.timeout;
        loop {
            let outcome = self.ask(command.clone())?;
            *reset |= outcome.is_reset();
            match outcome.verdict() {
                Verdict::Good => return Ok(Some(outcome.data)),
                Verdict::Unknown => return Ok(None),
                Verdict::Bad(what) => return Err(Fault::Unfit(what)),
                Verdict::Again(pause) if Instant::now() < until => std::thread::sleep(pause),
                Verdict::Again(_) => return Err(Fault::Unfit("the disk does not become ready".into())),
            }
        }
    }

    /// Looks at the disk.
    pub(super) fn examine(&mut self) -> Result<Facts, Fault> {
        let mut reset = false;
        let inquiry = self.ask_for(&scsi::inquiry(None), &mut reset)?.unwrap_or_default();
        match inquiry.first() {
            Some(0) => {}
            Some(kind) if kind >> 5 != 0 => {
                return Err(Fault::Unfit("it has no such LUN; set LUN to one that it has".into()));
            }
            Some(kind) => {
                return Err(Fault::Unfit(format!(
                    "its LUN is not a disk but a device of the type 0x{kind:02x}"
                )));
            }
            None => return Err(Fault::protocol("it does not say what its LUN is")),
        }
        self.ask_for(&scsi::test_unit_ready(), &mut reset)?;
        let capacity = match self.ask_for(&scsi::read_capacity_16(), &mut reset)? {
            Some(data) => Capacity::parse_16(&data),
            None => self
                .ask_for(&scsi::read_capacity_10(), &mut reset)?
                .and_then(|data| Capacity::parse_10(&data)),
        };
        let capacity = capacity.ok_or_else(|| Fault::Unfit("its disk's size cannot be used".into()))?;
        // Byte 2, bit 7 tells that the disk is write-protected. Not all disks have mode parameters.
        let mode = self.ask_for(&scsi::mode_sense(), &mut reset)?.unwrap_or_default();
        let read_only = mode.get(2).is_some_and(|flags| flags & 0x80 != 0);
        let mut unmap = 0;
        if capacity.thin {
            let provisioning = self.ask_for(&scsi::inquiry(Some(0xb2)), &mut reset)?.unwrap_or_default();
            if scsi::has_unmap(&provisioning) {
                let limits = self.ask_for(&scsi::inquiry(Some(0xb0)), &mut reset)?.unwrap_or_default();
                unmap = scsi::unmap_limit(&limits);
            }
        }
        Ok(Facts { capacity, read_only, unmap, reset })
    }

    /// Closes the connection; what has not ended.
    fn end(self) -> Vec<(Option<T>, Command)> {
        self.session.end()
    }

    /// Leaves in good order, if the target lets us.
    fn leave(mut self) {
        let until = Instant::now() + FAREWELL;
        self.session.log_out();
        while !self.session.is_logged_out() && Instant::now() < until {
            if self.pump(Some(until)).is_err() {
                return;
            }
        }
    }
}

/// The thread's own.
pub(super) struct Link {
    target: Target,
    isid: [u8; 6],
    inbox: Arc<Inbox>,
    /// Commands that no session has.
    waiting: VecDeque<(Job, Command)>,
    facts: Option<Facts>,
    /// Why there is no connection.
    reason: Arc<str>,
    /// Nothing is waited for any more until the target is back.
    given_up: bool,
    pause: Duration,
}

impl Link {
    pub(super) fn new(target: Target, inbox: Arc<Inbox>) -> Self {
        // Of the type "random", with our own number for this disk: nobody else may have the same.
        let random = uuid::Uuid::new_v4().into_bytes();
        let isid = [0x80, random[0], random[1], random[2], random[3], random[4]];
        Self {
            target,
            isid,
            inbox,
            waiting: VecDeque::new(),
            facts: None,
            reason: "".into(),
            given_up: false,
            pause: Duration::ZERO,
        }
    }

    /// Connects, logs in, and looks whether the disk is there; from the second time on, whether it is as it was.
    pub(super) fn attach(&mut self) -> Result<(Box<Connection<Job>>, Facts), Fault> {
        let target = &self.target;
        let (mut host, mut port) = (target.host.clone(), target.port);
        for _ in 0..=MOST_REDIRECTIONS {
            let (wire, own) = connect(&host, port, target.timeout, &self.inbox)?;
            let initiator = target.initiator.clone().unwrap_or(own);
            match Connection::enter(wire, target, self.isid, initiator)? {
                Entry::Moved(to, at) => (host, port) = (to, at),
                Entry::In(mut connection) => {
                    let facts = connection.examine()?;
                    if self.facts.is_some_and(|before| before.capacity != facts.capacity) {
                        return Err(Fault::Unfit("its disk has another size than before".into()));
                    }
                    self.facts = Some(facts);
                    return Ok((connection, facts));
                }
            }
        }
        Err(Fault::protocol("it sends us from one place to the next"))
    }

    /// Carries out what comes in, from an attached connection on, until the disk is closed.
    pub(super) fn run(mut self, connection: Box<Connection<Job>>) {
        let mut connection = Some(connection);
        while let Some(mut current) = connection.take() {
            for (job, command) in self.waiting.drain(..) {
                current.submit(Some(job), command);
            }
            let served = self.serve(&mut current);
            self.reply(&mut current);
            match served {
                Ok(()) => return current.leave(),
                Err(fault) => self.lost(&fault),
            }
            let left = current.end().into_iter();
            self.waiting.extend(left.filter_map(|(job, command)| job.map(|job| (job, command))));
            connection = self.reattach();
        }
    }

    fn lost(&mut self, fault: &Fault) {
        let fault = fault.text();
        tracing::warn!(target: "vd", disk = ?self.target, %fault, "lost the connection");
        self.reason = fault.into();
    }

    /// Takes in what the thread was told. Whether it is to end.
    fn collect(&mut self) -> bool {
        let mut news = self.inbox.news.lock();
        self.waiting.append(&mut news.jobs);
        news.closing
    }

    /// Tells about commands that have ended.
    fn reply(&mut self, connection: &mut Connection<Job>) {
        for (job, command, outcome) in connection.session.finished() {
            self.pause = Duration::ZERO;
            if let Some(job) = job {
                job.reply(command, Ok(outcome));
            }
        }
    }

    fn serve(&mut self, connection: &mut Connection<Job>) -> Result<(), Fault> {
        loop {
            let closing = self.collect();
            for (job, command) in self.waiting.drain(..) {
                connection.submit(Some(job), command);
            }
            if closing && connection.session.is_idle() {
                return Ok(());
            }
            let until = connection.check_life()?;
            connection.pump(until)?;
            self.reply(connection);
        }
    }

    /// Makes a connection as soon as there is something to do; `None` when the disk is closed.
    fn reattach(&mut self) -> Option<Box<Connection<Job>>> {
        loop {
            if self.collect() {
                self.fail(Duration::ZERO);
                return None;
            }
            if self.waiting.is_empty() {
                self.wait(None);
                continue;
            }
            // Also a target that lets us in each time and then drops us must not keep commands for ever.
            self.fail(PATIENCE);
            if self.pause > Duration::ZERO {
                self.wait(Some(Instant::now() + self.pause));
            }
            self.pause = (self.pause * 2).clamp(PAUSES.0, PAUSES.1);
            if self.waiting.is_empty() {
                continue;
            }
            match self.attach() {
                Ok((connection, facts)) => {
                    tracing::info!(target: "vd", disk = ?self.target, commands = self.waiting.len(), "connected again");
                    if facts.reset {
                        tracing::warn!(target: "vd", disk = ?self.target, "the target was reset; what it had in a volatile cache may be lost");
                    }
                    self.given_up = false;
                    return Some(connection);
                }
                Err(fault) => {
                    tracing::debug!(target: "vd", disk = ?self.target, fault = %fault.text(), "cannot connect again");
                    self.reason = fault.text().into();
                    if self.given_up {
                        self.fail(Duration::ZERO);
                    }
                }
            }
        }
    }

    fn wait(&self, until: Option<Instant>) {
        if let Err(error) = self.inbox.wait(None, until) {
            tracing::error!(target: "vd", %error, "cannot wait for commands");
            std::thread::sleep(PAUSES.1);
        }
    }

    /// Gives up commands that have waited so long.
    fn fail(&mut self, patience: Duration) {
        let reason = &self.reason;
        let mut left = VecDeque::new();
        for (job, command) in self.waiting.drain(..) {
            if job.since.elapsed() < patience {
                left.push_back((job, command));
                continue;
            }
            if !self.given_up && patience > Duration::ZERO {
                tracing::error!(target: "vd", disk = ?self.target, %reason, "the target does not come back; requests fail from now on");
                self.given_up = true;
            }
            job.reply(command, Err(reason.clone()));
        }
        self.waiting = left;
    }
}

/// Logs in over a wire and examines the disk; for fuzzing.
pub(super) fn attach_over<T>(
    wire: Box<dyn Wire>,
    target: &Target,
) -> Result<(Box<Connection<T>>, Facts), Fault> {
    match Connection::enter(
        wire,
        target,
        [0x80, 0, 0, 0, 0, 0],
        "iqn.2009-08.com.sun.virtualbox.initiator".into(),
    )? {
        Entry::In(mut connection) => connection.examine().map(|facts| (connection, facts)),
        Entry::Moved(..) => Err(Fault::Closed),
    }
}

/// Carries commands out over a connection until it ends or all is done; for fuzzing.
pub(super) fn carry_out(
    connection: &mut Connection<()>,
    commands: Vec<Command>,
) -> Result<Vec<Outcome>, Fault> {
    let count = commands.len();
    for command in commands {
        connection.submit(Some(()), command);
    }
    let mut outcomes = Vec::new();
    while outcomes.len() < count {
        let until = connection.check_life()?;
        connection.pump(until)?;
        outcomes.extend(connection.session.finished().into_iter().map(|(_, _, outcome)| outcome));
    }
    Ok(outcomes)
}
