//! Disks of iSCSI targets: an initiator (RFC 7143) over the host's TCP.
//!
//! [`Disk`] is such a disk as a file under an image. Its commands go to a thread (`link`) that has a session with the target
//! (`session`, after `login`) and makes another one when it loses that; up to 32 commands run at a time.
//!
//! **Left out**: digests (TCP has checksums; targets that insist are refused), several connections in a session, recovery inside a
//! session, discovery, SCSI reservations. VirtualBox switches the disk's write cache on; here the cache stays as it is, and
//! [`FileIo::sync`] has the target write it out.
//!
//! **A target is not trusted**: PDUs are limited by what was agreed on before anything is stored, data must be asked for and come in
//! order, and what does not fit ends the session.

mod link;
mod login;
mod pdu;
mod scsi;
mod session;
mod settings;
#[cfg(test)]
mod tests;
mod text;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use crate::file::{FileIo, write_zeros};
use link::{Facts, Inbox, Job, Link, PATIENCE};
use scsi::Verdict;
use session::{Command, Outcome};
use settings::MOST;
pub use settings::{SettingsError, Target};

/// Commands that a request becomes at a time.
const BATCH: usize = 32;
/// How often a command is given again that the disk puts off without saying for how long.
const MOST_TRIES: u32 = 16;

/// Why a session ended, or did not begin.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("it cannot be reached; check TargetAddress, and whether the target runs")]
    Connect(#[source] io::Error),
    #[error("the connection failed")]
    Io(#[source] io::Error),
    #[error("it closed the connection")]
    Closed,
    #[error("it has been silent for {0:?}")]
    Silent(Duration),
    #[error("it has not carried out a command for {0:?}")]
    Slow(Duration),
    #[error("it asked for another login")]
    Asked,
    #[error("it breaks the protocol: {0}")]
    Protocol(String),
    #[error("it refused the login (0x{class:02x}{detail:02x}): {}", refusal(*.class, *.detail))]
    Login { class: u8, detail: u8 },
    #[error("it wants a name and a secret; set InitiatorUsername and InitiatorSecret")]
    NoAccount,
    #[error("it did not prove that it knows the secret of TargetUsername")]
    NoProof,
    #[error("{0}")]
    Unfit(String),
}

impl Fault {
    fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }

    /// With its cause.
    fn text(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self} ({source})"),
            None => self.to_string(),
        }
    }
}

/// RFC 7143 11.13.5.
fn refusal(class: u8, detail: u8) -> &'static str {
    match (class, detail) {
        (2, 1) => "the name or the secret is wrong; check InitiatorUsername and InitiatorSecret",
        (2, 2) => "this initiator is not let in; allow it there, or set InitiatorName to one that is",
        (2, 3) => "it has no target of this name; check TargetName",
        (2, 4) => "the target was removed there",
        (2, 6) => "it has too many connections",
        (2, _) => "it does not like the request",
        (3, 1) => "the target is not in service there",
        (3, 2) => "it is out of resources",
        _ => "it has a fault",
    }
}

/// A disk of a target, opened.
pub(crate) struct Disk {
    target: Target,
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
    facts: Facts,
    /// Most blocks of one read and one write command.
    most_read: u32,
    most_write: u32,
    /// Held for writing while parts of blocks are written, which takes reading the whole block first.
    parts: RwLock<()>,
    /// The disk has no cache, or keeps it to itself.
    no_cache: AtomicBool,
    no_unmap: AtomicBool,
}

impl Disk {
    pub(crate) fn open(target: &Target, writable: bool) -> io::Result<Self> {
        let inbox = Inbox::new()?;
        let mut link = Link::new(target.clone(), inbox.clone());
        let (connection, facts) = link.attach().map_err(|fault| failure(target, &fault.text()))?;
        if writable && facts.read_only {
            return Err(failure(target, "the disk is write-protected; give the medium the type readonly"));
        }
        let thread = std::thread::Builder::new().name("iscsi".into()).spawn(move || link.run(connection))?;
        let blocks = |bytes: u32| (bytes / facts.capacity.block).max(1);
        Ok(Self {
            target: target.clone(),
            inbox,
            thread: Some(thread),
            facts,
            most_read: blocks(MOST),
            most_write: blocks(target.write_split),
            parts: RwLock::new(()),
            no_cache: AtomicBool::new(false),
            no_unmap: AtomicBool::new(facts.unmap == 0),
        })
    }

    fn block(&self) -> u64 {
        self.facts.capacity.block.into()
    }

    /// Carries commands out, at once. `None` stands for one that the disk does not know.
    fn execute(&self, commands: Vec<Command>) -> io::Result<Vec<Option<Outcome>>> {
        let start = Instant::now();
        let (reply, replies) = mpsc::channel();
        let submit = |number, command| {
            self.inbox.submit(Job { number, since: Instant::now(), reply: reply.clone() }, command);
        };
        let mut outcomes: Vec<Option<Outcome>> = vec![None; commands.len()];
        let mut tries = vec![0; commands.len()];
        let mut left = commands.len();
        let mut bad = None;
        for (number, command) in commands.into_iter().enumerate() {
            submit(number, command);
        }
        // All of them, whatever becomes of the first: none may be carried out after an error was reported.
        while left > 0 {
            let gone = || failure(&self.target, "its thread has ended");
            let (number, command, result) = replies.recv().map_err(|_| gone())?;
            let (outcome, verdict) = match result {
                Ok(outcome) => (Some(outcome.verdict()), Some(outcome)),
                Err(reason) => {
                    bad.get_or_insert_with(|| failure(&self.target, &reason));
                    (None, None)
                }
            };
            match (outcome, verdict) {
                (Some(Verdict::Again(pause)), _)
                    if bad.is_none()
                        && (tries[number] < MOST_TRIES || !pause.is_zero() && start.elapsed() < PATIENCE) =>
                {
                    tries[number] += 1;
                    std::thread::sleep(pause);
                    submit(number, command);
                    continue;
                }
                (Some(Verdict::Again(_)), _) => {
                    bad.get_or_insert_with(|| failure(&self.target, "it puts a command off again and again"));
                }
                (Some(Verdict::Bad(what)), _) => {
                    bad.get_or_insert_with(|| failure(&self.target, &what));
                }
                (Some(Verdict::Good), outcome) => outcomes[number] = outcome,
                (Some(Verdict::Unknown) | None, _) => {}
            }
            left -= 1;
        }
        bad.map_or(Ok(outcomes), Err)
    }

    /// Carries out commands that every disk knows.
    fn must(&self, commands: Vec<Command>) -> io::Result<Vec<Outcome>> {
        let outcomes = self.execute(commands)?.into_iter().collect::<Option<Vec<_>>>();
        outcomes.ok_or_else(|| failure(&self.target, "it does not know how to read or to write"))
    }

    /// Fills `out`, which has whole blocks.
    fn read_blocks(&self, first: u64, out: &mut [u8]) -> io::Result<()> {
        let block = self.block() as usize;
        let mut at = first;
        for batch in out.chunks_mut(BATCH * self.most_read as usize * block) {
            let mut commands = Vec::new();
            for piece in batch.chunks(self.most_read as usize * block) {
                let count = (piece.len() / block) as u32;
                commands.push(scsi::read(at, count, self.facts.capacity.block));
                at += u64::from(count);
            }
            let outcomes = self.must(commands)?;
            for (piece, outcome) in batch.chunks_mut(self.most_read as usize * block).zip(outcomes) {
                if outcome.data.len() != piece.len() {
                    return Err(failure(&self.target, "it has sent less than was asked for"));
                }
                piece.copy_from_slice(&outcome.data);
            }
        }
        Ok(())
    }

    /// Writes whole blocks.
    fn write_blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let block = self.block() as usize;
        let mut at = first;
        for batch in data.chunks(BATCH * self.most_write as usize * block) {
            let mut commands = Vec::new();
            for piece in batch.chunks(self.most_write as usize * block) {
                let count = (piece.len() / block) as u32;
                commands.push(scsi::write(at, count, piece.to_vec()));
                at += u64::from(count);
            }
            if self.must(commands)?.iter().any(|outcome| outcome.residual > 0) {
                return Err(failure(&self.target, "it has taken less than it was given"));
            }
        }
        Ok(())
    }

    /// The blocks in which the range lies: the first one and their bytes. The range must lie inside the disk.
    fn blocks_around(&self, offset: u64, len: usize) -> io::Result<(u64, usize)> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.facts.capacity.bytes());
        let end = end.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let first = offset / self.block();
        Ok((first, (end.next_multiple_of(self.block()) - first * self.block()) as usize))
    }
}

/// A failure of a target.
fn failure(target: &Target, what: &str) -> io::Error {
    io::Error::other(format!("{target:?}: {what}"))
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.inbox.close();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(target: "vd", "the thread of an iSCSI disk has panicked");
        }
    }
}

impl FileIo for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.facts.capacity.bytes())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inside = self.facts.capacity.bytes().saturating_sub(offset).min(out.len() as u64) as usize;
        let (out, outside) = out.split_at_mut(inside);
        outside.fill(0);
        if out.is_empty() {
            return Ok(());
        }
        let (first, len) = self.blocks_around(offset, out.len())?;
        if len == out.len() {
            return self.read_blocks(first, out);
        }
        let mut whole = vec![0; len];
        self.read_blocks(first, &mut whole)?;
        let skip = (offset - first * self.block()) as usize;
        out.copy_from_slice(&whole[skip..skip + out.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (first, len) = self.blocks_around(offset, data.len())?;
        if len == data.len() {
            let _whole = self.parts.read();
            return self.write_blocks(first, data);
        }
        let _part = self.parts.write();
        let block = self.block() as usize;
        let skip = (offset - first * self.block()) as usize;
        let mut whole = vec![0; len];
        // What stays of the first block and of the last one.
        self.read_blocks(first, &mut whole[..block])?;
        if len > block {
            let last = (len / block - 1) as u64;
            self.read_blocks(first + last, &mut whole[len - block..])?;
        }
        whole[skip..skip + data.len()].copy_from_slice(data);
        self.write_blocks(first, &whole)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self) -> io::Result<()> {
        if self.no_cache.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.execute(vec![scsi::synchronize_cache()])?.contains(&None) {
            tracing::info!(target: "vd", disk = ?self.target, "the disk does not know how to flush a cache");
            self.no_cache.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        write_zeros(self, offset, len)
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What the disk gives back reads as zeros, what it keeps reads as before.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let most = u64::from(self.facts.unmap);
        let end = (offset + len) / self.block();
        let mut at = offset.div_ceil(self.block());
        while at < end && !self.no_unmap.load(Ordering::Relaxed) {
            let count = (end - at).min(most);
            if self.execute(vec![scsi::unmap(at, count as u32)])?.contains(&None) {
                self.no_unmap.store(true, Ordering::Relaxed);
            }
            at += count;
        }
        Ok(())
    }
}

/// See [`crate::exercise_iscsi`].
///
/// The first byte: bit 0 has the target keep to the rules of the login; bit 1 has it agree to data without R2T; bit 2 takes the rest as
/// records of PDUs with right lengths and status numbers, instead of as the bytes that come.
pub(crate) fn exercise(input: &[u8]) {
    let Some((mode, input)) = input.split_first() else { return };
    let (entered, eager, records) = (mode & 1 != 0, mode & 2 != 0, mode & 4 != 0);
    let account = if entered { None } else { Some("name") };
    let property = |name: &str| match name {
        "TargetAddress" | "TargetName" => Some("fuzz"),
        "InitiatorUsername" | "InitiatorSecret" | "TargetUsername" | "TargetSecret" => account,
        _ => None,
    };
    let Ok(target) = Target::new(property) else { return };
    let mut bytes = Vec::new();
    let mut status = 0;
    if entered {
        // One answer for each stage.
        for stage in [0x81, 0x87] {
            let text: &[u8] = match eager {
                true => {
                    b"InitialR2T=No\0ImmediateData=Yes\0FirstBurstLength=1024\0MaxRecvDataSegmentLength=512\0"
                }
                false => b"",
            };
            let header =
                pdu::Header::new(pdu::response::LOGIN, stage).set_word::<24>(status).set_word::<32>(64);
            pdu::put(&mut bytes, header, if stage == 0x87 { text } else { b"" });
            status += 1;
        }
    }
    if records {
        put_records(&mut bytes, input, status);
    } else {
        bytes.extend_from_slice(input);
    }
    let wire = Box::new(link::Memory(bytes.into()));
    let Ok((mut connection, facts)) = link::attach_over(wire, &target) else { return };
    let block = facts.capacity.block;
    let commands = vec![
        scsi::read(0, 2, block),
        scsi::write(1, 4, vec![0x5a; 4 * block as usize]),
        scsi::unmap(0, 1),
        scsi::synchronize_cache(),
    ];
    for outcome in link::carry_out(&mut connection, commands).unwrap_or_default() {
        let _ = outcome.verdict();
    }
}

/// Makes PDUs of records: opcode, flags, status, tag, bytes of data, the words behind the sequence numbers (12 bytes), data.
fn put_records(bytes: &mut Vec<u8>, mut input: &[u8], mut status: u32) {
    const OPCODES: [u8; 8] = {
        use pdu::response::*;
        [NOP_IN, RESPONSE, LOGIN, DATA_IN, LOGOUT, R2T, ASYNC, REJECT]
    };
    while let Some(([opcode, flags, scsi_status, tag, len, words @ ..], rest)) =
        input.split_first_chunk::<17>()
    {
        let (data, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        input = rest;
        let opcode = OPCODES[usize::from(opcode % 8)];
        let tag = if *tag == 0xff { pdu::NO_TAG } else { u32::from(*tag) };
        let mut header =
            pdu::Header::new(opcode, *flags).set_tag(tag).set_word::<24>(status).set_word::<32>(64);
        (header.0[2], header.0[3]) = (scsi_status >> 7, scsi_status & 0x7f);
        header.0[36..].copy_from_slice(words);
        // What carries a status has its number.
        status += match opcode {
            pdu::response::R2T => 0,
            pdu::response::DATA_IN => u32::from(flags & 1),
            pdu::response::NOP_IN => u32::from(tag != pdu::NO_TAG),
            _ => 1,
        };
        pdu::put(bytes, header, data);
    }
}
