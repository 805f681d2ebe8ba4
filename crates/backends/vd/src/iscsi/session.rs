//! The full-feature phase of a session (RFC 7143): commands, data, and what a target says in between. Pure: takes PDUs, makes PDUs; the
//! time, where it matters, is given.
//!
//! A session has one connection and no recovery inside it (error recovery level 0): what goes wrong ends the session, and what was not
//! answered is given to the next one ([`Session::end`]).

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use super::Fault;
use super::login::Agreed;
use super::pdu::{self, FINAL, Header, IMMEDIATE, NO_TAG, Pdu, before, request, response};

/// Commands that the target has at a time, whatever it allows.
const MOST_RUNNING: usize = 32;
/// Sense data beyond this are of no interest.
const MOST_SENSE: usize = 252;
/// Flags of commands and of their ends.
const READ: u8 = 0x40;
const WRITE: u8 = 0x20;
const SIMPLE: u8 = 1;
const UNDERFLOW: u8 = 0x02;
const STATUS: u8 = 0x01;

/// What a command moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Data {
    None,
    /// At most so many bytes.
    In(usize),
    Out(Vec<u8>),
}

/// A SCSI command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) cdb: [u8; 16],
    pub(super) data: Data,
}

/// How a command ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// SAM's status.
    pub(super) status: u8,
    pub(super) sense: Vec<u8>,
    /// What was read.
    pub(super) data: Vec<u8>,
    /// Bytes by which the target had less to move than was asked for.
    pub(super) residual: u32,
}

struct Task<T> {
    ticket: T,
    command: Command,
    since: Instant,
    received: Vec<u8>,
    /// Number of the next Data-In.
    data_sn: u32,
    /// Bytes given to the target.
    sent: usize,
}

/// A session, in which each command carries a `T` of whoever gave it.
pub(super) struct Session<T> {
    agreed: Agreed,
    lun: u64,
    cmd_sn: u32,
    next_tag: u32,
    waiting: VecDeque<(T, Command)>,
    running: BTreeMap<u32, Task<T>>,
    finished: Vec<(T, Command, Outcome)>,
    /// Tag of a ping that has no answer yet.
    ping: Option<u32>,
    logged_out: bool,
    out: Vec<u8>,
    out_at: usize,
}

impl<T> Session<T> {
    pub(super) fn new(agreed: Agreed, lun: u64) -> Self {
        Self {
            cmd_sn: agreed.cmd_sn,
            agreed,
            lun,
            next_tag: 2,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            finished: Vec::new(),
            ping: None,
            logged_out: false,
            out: Vec::new(),
            out_at: 0,
        }
    }

    pub(super) fn submit(&mut self, ticket: T, command: Command, now: Instant) {
        self.waiting.push_back((ticket, command));
        self.issue(now);
    }

    /// Gives the target as many commands as it allows.
    fn issue(&mut self, now: Instant) {
        while self.running.len() < MOST_RUNNING
            && !before(self.agreed.max_cmd_sn, self.cmd_sn)
            && let Some((ticket, command)) = self.waiting.pop_front()
        {
            let tag = self.tag();
            let mut task = Task { ticket, command, since: now, received: Vec::new(), data_sn: 0, sent: 0 };
            self.send_command(tag, &mut task);
            self.running.insert(tag, task);
            self.cmd_sn = self.cmd_sn.wrapping_add(1);
        }
    }

    fn tag(&mut self) -> u32 {
        loop {
            let tag = self.next_tag;
            self.next_tag = tag.wrapping_add(1);
            if tag != NO_TAG && !self.running.contains_key(&tag) {
                return tag;
            }
        }
    }

    fn send_command(&mut self, tag: u32, task: &mut Task<T>) {
        let (direction, len) = match &task.command.data {
            Data::None => (0, 0),
            Data::In(len) => (READ, *len),
            Data::Out(data) => (WRITE, data.len()),
        };
        let data = match &task.command.data {
            Data::Out(data) => data.as_slice(),
            _ => &[],
        };
        let unasked = data.len().min(self.agreed.first_burst as usize);
        let immediate =
            if self.agreed.immediate_data { unasked.min(self.agreed.send_data as usize) } else { 0 };
        let more = !self.agreed.initial_r2t && immediate < unasked;
        let last = if more { 0 } else { FINAL };
        let mut header = Header::new(request::COMMAND, last | direction | SIMPLE)
            .set_lun(self.lun)
            .set_tag(tag)
            .set_word::<20>(len as u32)
            .set_word::<24>(self.cmd_sn)
            .set_word::<28>(self.agreed.exp_stat_sn);
        header.0[32..].copy_from_slice(&task.command.cdb);
        pdu::put(&mut self.out, header, &data[..immediate]);
        task.sent = immediate;
        if more {
            self.send_data(tag, NO_TAG, &data[..unasked], immediate);
            task.sent = unasked;
        }
    }

    /// Sends `data` from byte `at` on in Data-Out PDUs.
    fn send_data(&mut self, tag: u32, transfer: u32, data: &[u8], mut at: usize) {
        let mut number = 0;
        while at < data.len() {
            let end = data.len().min(at + self.agreed.send_data as usize);
            let last = if end == data.len() { FINAL } else { 0 };
            let header = Header::new(request::DATA_OUT, last)
                .set_lun(self.lun)
                .set_tag(tag)
                .set_word::<20>(transfer)
                .set_word::<28>(self.agreed.exp_stat_sn)
                .set_word::<36>(number)
                .set_word::<40>(at as u32);
            pdu::put(&mut self.out, header, &data[at..end]);
            (at, number) = (end, number.wrapping_add(1));
        }
    }

    /// Takes a PDU.
    pub(super) fn receive(&mut self, pdu: &Pdu<'_>, now: Instant) -> Result<(), Fault> {
        let header = &pdu.header;
        match header.opcode() {
            response::RESPONSE => {
                self.count_status(header)?;
                self.response(pdu)?;
            }
            response::DATA_IN => self.data_in(pdu)?,
            response::R2T => self.ready(header)?,
            response::NOP_IN => self.nop_in(pdu)?,
            response::ASYNC => {
                self.count_status(header)?;
                // What SCSI has to say comes with the next command, too.
                if matches!(header.0[36], 1..=5) {
                    return Err(Fault::Asked);
                }
            }
            response::REJECT => {
                self.count_status(header)?;
                // Nothing but a ping can be done without.
                let ping = pdu.data.first().is_some_and(|opcode| opcode & 0x3f == request::NOP_OUT);
                if !ping {
                    return Err(Fault::protocol(format!(
                        "it rejected a request for the reason 0x{:02x}",
                        header.0[2]
                    )));
                }
                self.ping = None;
            }
            response::LOGOUT => {
                self.count_status(header)?;
                self.logged_out = true;
            }
            opcode => return Err(Fault::protocol(format!("it sends the opcode 0x{opcode:02x}"))),
        }
        self.count_commands(header);
        self.issue(now);
        Ok(())
    }

    /// Every status has the number that follows the one before; a gap means that one was lost.
    fn count_status(&mut self, header: &Header) -> Result<(), Fault> {
        let number = header.word::<24>();
        if number != self.agreed.exp_stat_sn {
            let expected = self.agreed.exp_stat_sn;
            return Err(Fault::protocol(format!("its status number is {number} where {expected} follows")));
        }
        self.agreed.exp_stat_sn = number.wrapping_add(1);
        Ok(())
    }

    /// The window of commands moves on, never back (RFC 7143 4.2.2.1).
    fn count_commands(&mut self, header: &Header) {
        let (expected, most) = (header.word::<28>(), header.word::<32>());
        if !before(most, expected.wrapping_sub(1)) && before(self.agreed.max_cmd_sn, most) {
            self.agreed.max_cmd_sn = most;
        }
    }

    fn task(&mut self, header: &Header) -> Result<&mut Task<T>, Fault> {
        let tag = header.tag();
        self.running
            .get_mut(&tag)
            .ok_or_else(|| Fault::protocol(format!("it speaks of the unknown task 0x{tag:x}")))
    }

    fn response(&mut self, pdu: &Pdu<'_>) -> Result<(), Fault> {
        if pdu.header.0[2] != 0 {
            return Err(Fault::protocol(format!(
                "it could not carry a command out (0x{:02x})",
                pdu.header.0[2]
            )));
        }
        let sense = match pdu.data {
            [high, low, sense @ ..] => {
                let len = usize::from(u16::from_be_bytes([*high, *low]));
                sense.get(..len.min(MOST_SENSE)).unwrap_or(sense).to_vec()
            }
            _ => Vec::new(),
        };
        self.finish(&pdu.header, sense)
    }

    fn data_in(&mut self, pdu: &Pdu<'_>) -> Result<(), Fault> {
        let header = &pdu.header;
        let task = self.task(header)?;
        let Data::In(most) = task.command.data else {
            return Err(Fault::protocol("it sends data that nobody asked for"));
        };
        let (number, offset) = (header.word::<36>(), header.word::<40>() as usize);
        if number != task.data_sn || offset != task.received.len() || pdu.data.len() > most - offset {
            return Err(Fault::protocol(format!(
                "it sends {} bytes for byte {offset} out of their order",
                pdu.data.len()
            )));
        }
        task.data_sn = number.wrapping_add(1);
        if offset == 0 {
            // Limited by the command, not by what the target says.
            task.received.reserve_exact(most);
        }
        task.received.extend_from_slice(pdu.data);
        if header.flags() & STATUS != 0 {
            self.count_status(header)?;
            self.finish(header, Vec::new())?;
        }
        Ok(())
    }

    fn finish(&mut self, header: &Header, sense: Vec<u8>) -> Result<(), Fault> {
        self.task(header)?;
        let Some(task) = self.running.remove(&header.tag()) else { return Ok(()) };
        let status = header.0[3];
        if let (0, Data::Out(data)) = (status, &task.command.data)
            && task.sent < data.len()
        {
            // The command goes into the next session.
            self.running.insert(header.tag(), task);
            return Err(Fault::protocol("it reports a write as done without having taken all of its data"));
        }
        let residual = if header.flags() & UNDERFLOW != 0 { header.word::<44>() } else { 0 };
        let outcome = Outcome { status, sense, data: task.received, residual };
        self.finished.push((task.ticket, task.command, outcome));
        Ok(())
    }

    /// The target asks for data of a write.
    fn ready(&mut self, header: &Header) -> Result<(), Fault> {
        let (tag, transfer) = (header.tag(), header.word::<20>());
        let (at, len) = (header.word::<40>() as usize, header.word::<44>() as usize);
        let max_burst = self.agreed.max_burst as usize;
        let task = self.task(header)?;
        let Data::Out(data) = &mut task.command.data else {
            return Err(Fault::protocol("it asks for data of a command that has none"));
        };
        if transfer == NO_TAG
            || len == 0
            || len > max_burst
            || at.checked_add(len).is_none_or(|end| end > data.len())
        {
            return Err(Fault::protocol(format!("it asks for {len} bytes from byte {at} on of a write")));
        }
        task.sent += len;
        // Out of the task for the moment, because sending takes the session.
        let data = std::mem::take(data);
        self.send_data(tag, transfer, &data[..at + len], at);
        if let Some(Task { command: Command { data: Data::Out(place), .. }, .. }) = self.running.get_mut(&tag)
        {
            *place = data;
        }
        Ok(())
    }

    fn nop_in(&mut self, pdu: &Pdu<'_>) -> Result<(), Fault> {
        let header = &pdu.header;
        if header.tag() != NO_TAG {
            self.count_status(header)?;
            self.ping = self.ping.filter(|ping| *ping != header.tag());
        }
        let transfer = header.word::<20>();
        if transfer != NO_TAG {
            let lun = u64::from(header.word::<8>()) << 32 | u64::from(header.word::<12>());
            let answer =
                self.immediate(request::NOP_OUT, FINAL, NO_TAG).set_lun(lun).set_word::<20>(transfer);
            let data = &pdu.data[..pdu.data.len().min(self.agreed.send_data as usize)];
            pdu::put(&mut self.out, answer, data);
        }
        Ok(())
    }

    /// A request beside the numbered ones.
    fn immediate(&self, opcode: u8, flags: u8, tag: u32) -> Header {
        Header::new(IMMEDIATE | opcode, flags)
            .set_tag(tag)
            .set_word::<24>(self.cmd_sn)
            .set_word::<28>(self.agreed.exp_stat_sn)
    }

    /// Asks for a sign of life.
    pub(super) fn ping(&mut self) {
        let tag = self.tag();
        self.ping = Some(tag);
        let header = self.immediate(request::NOP_OUT, FINAL, tag).set_word::<20>(NO_TAG);
        pdu::put(&mut self.out, header, &[]);
    }

    /// Whether a ping waits for its answer.
    pub(super) fn is_pinging(&self) -> bool {
        self.ping.is_some()
    }

    /// Closes the session in good order.
    pub(super) fn log_out(&mut self) {
        let tag = self.tag();
        let header = self.immediate(request::LOGOUT, FINAL, tag);
        pdu::put(&mut self.out, header, &[]);
    }

    pub(super) fn is_logged_out(&self) -> bool {
        self.logged_out
    }

    /// What is to be sent.
    pub(super) fn output(&self) -> &[u8] {
        &self.out[self.out_at..]
    }

    pub(super) fn sent(&mut self, count: usize) {
        self.out_at = (self.out_at + count).min(self.out.len());
        if self.out_at == self.out.len() {
            self.out.clear();
            self.out_at = 0;
        }
    }

    /// Commands that have ended since the last call.
    pub(super) fn finished(&mut self) -> Vec<(T, Command, Outcome)> {
        std::mem::take(&mut self.finished)
    }

    /// When the oldest command that runs was given to the target.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.running.values().map(|task| task.since).min()
    }

    /// Whether nothing is expected of the target.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// What has not ended, in the order in which it was given.
    pub(super) fn end(self) -> Vec<(T, Command)> {
        let running = self.running.into_values().map(|task| (task.ticket, task.command));
        running.chain(self.waiting).collect()
    }
}
