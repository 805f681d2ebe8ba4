//! The controller's behaviour: registers, queues and commands. Nothing here waits or locks: requests for media are handed out in
//! [`Out`], and answers come back by [`Controller::answered`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{Ordering, fence};

use pdm::connector::BlockOp;
use pgm::Pgm;
use vbox_types::GuestPhys;

use super::identify;
use super::prp::{self, Region};
use super::spec::{
    CQ_ENTRY, Cc, Csts, DOORBELLS, ERROR_ENTRIES, EVENT_REQUESTS, IO_QUEUES, MAX_ADMIN_ENTRIES, MAX_ENTRIES,
    MAX_PAGE_SHIFT, MAX_TRANSFER, SECTOR, SQ_ENTRY, Sqe, VERSION, admin, feature, io, reg, shutdown, status,
};
use crate::pieces::{PIECE, zero_piece};

/// Bytes that commands under way may hold; more stay in their queues.
const MAX_BUFFERED: usize = 32 << 20;
/// Commands under way at once.
const MAX_COMMANDS: usize = 1024;
/// Kinds of asynchronous events.
const EVENT_ERROR: u8 = 0;
/// An error event's cause: a doorbell that does not exist, a value that it cannot take.
const BAD_DOORBELL: u8 = 0;
const BAD_DOORBELL_VALUE: u8 = 1;
/// The error log's page.
const ERROR_LOG: u8 = 1;

/// What of a namespace concerns the protocol.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) blocks: u64,
    pub(super) read_only: bool,
    pub(super) discard: bool,
    pub(super) uuid: [u8; 16],
}

/// A request for a namespace's medium.
pub(super) struct Ask {
    pub(super) command: u64,
    pub(super) generation: u64,
    /// Counts from 0.
    pub(super) namespace: usize,
    pub(super) op: BlockOp,
}

/// What follows from a step.
#[derive(Default)]
pub(super) struct Out {
    pub(super) asks: Vec<Ask>,
    /// Interrupt vectors that have something new.
    pub(super) vectors: Vec<u16>,
}

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sq {
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) cq: u16,
    pub(super) head: u32,
    pub(super) tail: u32,
    /// The guest rings when it has more; until then there is nothing to look for.
    pub(super) rings: bool,
}

/// Where the guest keeps its doorbells in memory, and the controller the values from which on it wants them rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffers {
    pub(super) doorbells: u64,
    pub(super) events: u64,
}

/// A doorbell's place in both buffers.
#[derive(Clone, Copy)]
enum Bell {
    Tail(u16),
    Head(u16),
}

impl Bell {
    fn offset(self) -> u64 {
        match self {
            Self::Tail(queue) => 8 * u64::from(queue),
            Self::Head(queue) => 8 * u64::from(queue) + 4,
        }
    }
}

impl Buffers {
    fn doorbell(self, pgm: &Pgm, bell: Bell) -> u32 {
        let mut value = [0; 4];
        pgm.read(GuestPhys(self.doorbells).wrapping_add(bell.offset()), &mut value);
        u32::from_le_bytes(value)
    }

    /// Has the guest ring when it moves the doorbell beyond `value`. What it has moved before it saw that is to be looked for after.
    fn ask(self, pgm: &Pgm, bell: Bell, value: u32) {
        pgm.write(GuestPhys(self.events).wrapping_add(bell.offset()), &value.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// A queue is new: both sides begin at 0.
    fn begin(self, pgm: &Pgm, bell: Bell, value: u32) {
        pgm.write(GuestPhys(self.doorbells).wrapping_add(bell.offset()), &value.to_le_bytes());
        self.ask(pgm, bell, value);
    }
}

/// A completion that waits for room in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Completion {
    pub(super) dw0: u32,
    pub(super) sq: u16,
    pub(super) cid: u16,
    pub(super) status: u16,
}

/// A completion queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cq {
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) head: u32,
    pub(super) tail: u32,
    pub(super) phase: bool,
    pub(super) interrupts: bool,
    pub(super) vector: u16,
    pub(super) waiting: VecDeque<Completion>,
}

impl Cq {
    /// Entries that can be written.
    fn room(&self) -> u32 {
        (self.head + self.entries - self.tail - 1) % self.entries
    }
}

/// An entry of the error log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ErrorEntry {
    pub(super) count: u64,
    pub(super) sq: u16,
    pub(super) cid: u16,
    pub(super) status: u16,
    pub(super) lba: u64,
    pub(super) nsid: u32,
}

/// What the SMART log counts since power-on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) blocks_read: u64,
    pub(super) blocks_written: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) media_errors: u64,
}

/// Guest-visible state. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) intms: u32,
    pub(super) cc: Cc,
    pub(super) csts: Csts,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
    /// By [`feature::KEPT`].
    pub(super) features: [u32; 8],
    /// Queue 0 is the admin queue.
    pub(super) sqs: Vec<Option<Sq>>,
    pub(super) cqs: Vec<Option<Cq>>,
    /// Of the I/O queues' doorbells, if the guest has given any.
    pub(super) buffers: Option<Buffers>,
    /// Command identifiers of outstanding asynchronous event requests.
    pub(super) event_requests: VecDeque<u16>,
    /// Events that nobody has asked for yet, as the completion's dword.
    pub(super) events: VecDeque<u32>,
    /// Kinds of events, one bit each, that wait for their log to be read.
    pub(super) events_masked: u8,
    pub(super) errors: VecDeque<ErrorEntry>,
    pub(super) error_count: u64,
    pub(super) counters: Counters,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            intms: 0,
            cc: Cc::new(),
            csts: Csts::new(),
            aqa: 0,
            asq: 0,
            acq: 0,
            features: feature::RESET,
            sqs: vec![None; usize::from(IO_QUEUES) + 1],
            cqs: vec![None; usize::from(IO_QUEUES) + 1],
            buffers: None,
            event_requests: VecDeque::new(),
            events: VecDeque::new(),
            events_masked: 0,
            errors: VecDeque::new(),
            error_count: 0,
            counters: Counters::default(),
        }
    }

    fn feature(&self, id: u8) -> u32 {
        feature::KEPT.iter().position(|f| *f == id).map_or(0, |at| self.features[at])
    }

    /// Bytes of a memory page.
    fn page(&self) -> u64 {
        4096 << self.cc.mps().min(MAX_PAGE_SHIFT)
    }

    fn sq(&self, id: u32) -> Option<&Sq> {
        self.sqs.get(id as usize).and_then(Option::as_ref)
    }

    fn cq(&self, id: u32) -> Option<&Cq> {
        self.cqs.get(id as usize).and_then(Option::as_ref)
    }

    /// The level of the interrupt pin: a queue with interrupts has entries that the guest has not taken.
    pub(super) fn pin(&self) -> bool {
        self.cqs.iter().flatten().any(|cq| {
            cq.interrupts && cq.head != cq.tail && (cq.vector > 31 || self.intms & 1 << cq.vector == 0)
        })
    }
}

/// Who gets to know of a command's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Guest {
        sq: u16,
        cid: u16,
        nsid: u32,
        lba: u64,
    },
    /// The controller itself, which shuts down.
    Shutdown,
}

/// A part of a command for the medium.
enum Step {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8> },
    Zero { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
    Flush,
}

/// A command under way: one step after the other.
struct Command {
    owner: Owner,
    /// Where what is read goes.
    regions: Vec<Region>,
    steps: VecDeque<(usize, Step)>,
    /// What it counts towards [`MAX_BUFFERED`].
    bytes: usize,
    /// The present step writes.
    writes: bool,
}

/// One controller.
pub(super) struct Controller {
    pub(super) state: State,
    /// By namespace id less one.
    pub(super) namespaces: Vec<Option<Shape>>,
    commands: BTreeMap<u64, Command>,
    next: u64,
    buffered: usize,
    /// Requests whose commands a reset has dropped.
    stale: usize,
    generation: u64,
    /// Submission queues that go when their last command ends, with the commands that want it.
    deleting: BTreeMap<u16, u16>,
    /// The guest has interrupts by the pin, which falls when it moves the heads of completion queues.
    uses_pin: bool,
}

impl Controller {
    pub(super) fn new(namespaces: Vec<Option<Shape>>) -> Self {
        Self {
            state: State::new(),
            namespaces,
            commands: BTreeMap::new(),
            next: 0,
            buffered: 0,
            stale: 0,
            generation: 0,
            deleting: BTreeMap::new(),
            uses_pin: true,
        }
    }

    /// Whether no request is with a medium.
    pub(super) fn is_idle(&self) -> bool {
        self.commands.is_empty() && self.stale == 0
    }

    /// Power-on: everything but what media still have to answer.
    pub(super) fn reset(&mut self) {
        self.drop_commands();
        self.state = State::new();
    }

    fn drop_commands(&mut self) {
        self.stale += self.commands.len();
        self.commands.clear();
        self.deleting.clear();
        self.buffered = 0;
        self.generation += 1;
    }

    // Registers.

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, out) in (offset..).zip(data.iter_mut()) {
            *out = (self.register(at & !3) >> (8 * (at & 3))) as u8;
        }
    }

    /// The dword at `offset`. Doorbells and interrupt masks read as what they stand for.
    fn register(&self, offset: u64) -> u32 {
        let State { intms, cc, csts, aqa, asq, acq, .. } = &self.state;
        let half = |value: u64| (value >> (8 * (offset & 4))) as u32;
        match offset & !7 {
            reg::CAP => half(reg::CAPABILITIES),
            reg::ASQ => half(*asq),
            reg::ACQ => half(*acq),
            _ => match offset {
                reg::VS => VERSION,
                reg::INTMS | reg::INTMC => *intms,
                reg::CC => (*cc).into(),
                reg::CSTS => (*csts).into(),
                reg::AQA => *aqa,
                _ => 0,
            },
        }
    }

    pub(super) fn write(&mut self, pgm: &Pgm, offset: u64, data: &[u8], out: &mut Out) {
        if offset >= DOORBELLS {
            if let Ok(value) = <[u8; 4]>::try_from(data) {
                self.doorbell(pgm, offset - DOORBELLS, u32::from_le_bytes(value), out);
            }
            return;
        }
        // Dwords, or qwords of two.
        if offset.is_multiple_of(4) && data.len().is_multiple_of(4) {
            let (dwords, _) = data.as_chunks::<4>();
            for (at, dword) in (offset..).step_by(4).zip(dwords) {
                self.write_register(pgm, at, u32::from_le_bytes(*dword), out);
            }
        }
    }

    fn write_register(&mut self, pgm: &Pgm, offset: u64, value: u32, out: &mut Out) {
        let state = &mut self.state;
        let half = |old: u64| match offset & 4 {
            0 => old & !0xffff_ffff | u64::from(value & !0xfff),
            _ => old & 0xffff_ffff | u64::from(value) << 32,
        };
        match offset {
            reg::INTMS => state.intms |= value,
            reg::INTMC => state.intms &= !value,
            reg::CC => self.configure(pgm, value.into(), out),
            reg::AQA => state.aqa = value & 0x0fff_0fff,
            _ if offset & !7 == reg::ASQ => state.asq = half(state.asq),
            _ if offset & !7 == reg::ACQ => state.acq = half(state.acq),
            _ => {}
        }
    }

    fn configure(&mut self, pgm: &Pgm, new: Cc, out: &mut Out) {
        let old = std::mem::replace(&mut self.state.cc, new);
        if old.en() && !new.en() {
            self.controller_reset();
        } else if new.en() && !old.en() {
            self.state.csts = Csts::new();
            self.enable();
        }
        if new.shn() != 0 && old.shn() == 0 {
            self.shut_down(out);
        } else if new.shn() == 0 && old.shn() != 0 {
            self.state.csts.set_shst(0);
        }
        self.run(pgm, out);
    }

    /// CC.EN was cleared: queues and commands go, the admin queue's registers stay.
    fn controller_reset(&mut self) {
        self.drop_commands();
        let fresh = State::new();
        let State { intms, csts, features, sqs, cqs, buffers, event_requests, events, events_masked, .. } =
            &mut self.state;
        (*intms, *csts, *features) = (0, fresh.csts, fresh.features);
        (*sqs, *cqs, *buffers) = (fresh.sqs, fresh.cqs, None);
        event_requests.clear();
        events.clear();
        *events_masked = 0;
    }

    /// Makes the controller ready, once the media have answered everything from before a reset: an abandoned write must not overtake
    /// a later one.
    fn enable(&mut self) {
        let state = &mut self.state;
        if !state.cc.en() || state.csts.rdy() || state.csts.cfs() || self.stale > 0 {
            return;
        }
        let (sq, cq) = ((state.aqa & 0xfff) + 1, (state.aqa >> 16 & 0xfff) + 1);
        let page = state.page();
        if sq < 2
            || cq < 2
            || sq > MAX_ADMIN_ENTRIES
            || cq > MAX_ADMIN_ENTRIES
            || state.cc.mps() > MAX_PAGE_SHIFT
            || state.cc.css() != 0
            || state.cc.ams() != 0
            || !state.asq.is_multiple_of(page)
            || !state.acq.is_multiple_of(page)
        {
            state.csts.set_cfs(true);
            return;
        }
        state.sqs[0] = Some(Sq { base: state.asq, entries: sq, cq: 0, head: 0, tail: 0, rings: false });
        state.cqs[0] = Some(Cq {
            base: state.acq,
            entries: cq,
            head: 0,
            tail: 0,
            phase: true,
            interrupts: true,
            vector: 0,
            waiting: VecDeque::new(),
        });
        state.csts.set_rdy(true);
    }

    /// The guest is about to power off: what was written becomes durable first.
    fn shut_down(&mut self, out: &mut Out) {
        self.state.csts.set_shst(shutdown::UNDER_WAY);
        let steps = self.flushes();
        if steps.is_empty() {
            self.state.csts.set_shst(shutdown::COMPLETE);
            return;
        }
        self.start(Owner::Shutdown, Vec::new(), steps, 0, out);
    }

    /// A flush of every namespace.
    fn flushes(&self) -> VecDeque<(usize, Step)> {
        let present = self.namespaces.iter().enumerate().filter(|(_, shape)| shape.is_some());
        present.map(|(at, _)| (at, Step::Flush)).collect()
    }

    fn doorbell(&mut self, pgm: &Pgm, offset: u64, value: u32, out: &mut Out) {
        if !self.state.csts.rdy() || !offset.is_multiple_of(4) {
            return;
        }
        let queue = (offset / 8) as usize;
        if let Some(buffers) = self.state.buffers.filter(|_| queue != 0) {
            // The value is in the buffer, too, and newer there.
            if offset.is_multiple_of(8) {
                self.rung(pgm, queue as u16, out);
            } else {
                self.take_head(pgm, buffers, queue as u16, out);
                self.post_waiting(pgm, queue as u16, out);
                self.run(pgm, out);
            }
            return;
        }
        if offset.is_multiple_of(8) {
            match self.state.sqs.get_mut(queue).and_then(Option::as_mut) {
                Some(sq) if value < sq.entries => sq.tail = value,
                Some(_) => self.event(pgm, EVENT_ERROR, BAD_DOORBELL_VALUE, ERROR_LOG, out),
                None => self.event(pgm, EVENT_ERROR, BAD_DOORBELL, ERROR_LOG, out),
            }
        } else {
            match self.state.cqs.get_mut(queue).and_then(Option::as_mut) {
                Some(cq) if value < cq.entries => {
                    cq.head = value;
                    self.post_waiting(pgm, queue as u16, out);
                }
                Some(_) => self.event(pgm, EVENT_ERROR, BAD_DOORBELL_VALUE, ERROR_LOG, out),
                None => self.event(pgm, EVENT_ERROR, BAD_DOORBELL, ERROR_LOG, out),
            }
        }
        self.run(pgm, out);
    }

    // Doorbells in memory. The guest writes a doorbell's value to its buffer, and then rings it, that is, writes the register, only if the
    // value from which on the controller wants to hear of it is among those it has just passed.

    /// A submission queue's doorbell was rung. Its value does not matter.
    pub(super) fn rung(&mut self, pgm: &Pgm, queue: u16, out: &mut Out) {
        if let Some(Some(sq)) = self.state.sqs.get_mut(usize::from(queue)) {
            sq.rings = false;
        }
        if self.state.buffers.is_some() {
            self.run(pgm, out);
        }
    }

    /// Goes on from a saved state. A ring that nobody had heard when it was taken is not part of it, but what it was about is in memory.
    pub(super) fn resume(&mut self, pgm: &Pgm, out: &mut Out) {
        if let Some(buffers) = self.state.buffers {
            for (sq, queue) in self.state.sqs.iter_mut().zip(0..).skip(1) {
                if let Some(sq) = sq {
                    let tail = buffers.doorbell(pgm, Bell::Tail(queue));
                    sq.rings &= tail == sq.tail || tail >= sq.entries;
                }
            }
        }
        self.run(pgm, out);
    }

    /// Looks for more in a queue that was empty, and has the guest ring if there is nothing.
    fn look(&mut self, pgm: &Pgm, queue: u16, out: &mut Out) {
        let Some(buffers) = self.state.buffers.filter(|_| queue != 0) else { return };
        for asked in [false, true] {
            let Some(Some(sq)) = self.state.sqs.get_mut(usize::from(queue)) else { return };
            if sq.rings {
                return;
            }
            let tail = buffers.doorbell(pgm, Bell::Tail(queue));
            if tail >= sq.entries {
                sq.rings = true;
                return self.event(pgm, EVENT_ERROR, BAD_DOORBELL_VALUE, ERROR_LOG, out);
            }
            if tail != sq.tail {
                sq.tail = tail;
                return;
            }
            if asked {
                sq.rings = true;
            } else {
                buffers.ask(pgm, Bell::Tail(queue), tail);
            }
        }
    }

    /// Learns how far the guest has emptied a completion queue.
    fn take_head(&mut self, pgm: &Pgm, buffers: Buffers, queue: u16, out: &mut Out) {
        // Again after having asked to be told: it may have gone on in between.
        for _ in 0..2 {
            let Some(Some(cq)) = self.state.cqs.get_mut(usize::from(queue)) else { return };
            let head = buffers.doorbell(pgm, Bell::Head(queue));
            if head >= cq.entries {
                return self.event(pgm, EVENT_ERROR, BAD_DOORBELL_VALUE, ERROR_LOG, out);
            }
            cq.head = head;
            if !self.uses_pin && cq.waiting.is_empty() {
                // There is room; it need not ring before it comes round again.
                return buffers.ask(pgm, Bell::Head(queue), head.wrapping_sub(1) & 0xffff);
            }
            buffers.ask(pgm, Bell::Head(queue), head);
        }
    }

    /// Whether interrupts go by the pin has changed.
    pub(super) fn set_uses_pin(&mut self, pgm: &Pgm, uses_pin: bool, out: &mut Out) {
        if std::mem::replace(&mut self.uses_pin, uses_pin) == uses_pin {
            return;
        }
        if let Some(buffers) = self.state.buffers {
            (1..=IO_QUEUES).for_each(|queue| self.take_head(pgm, buffers, queue, out));
        }
    }

    fn set_buffers(&mut self, pgm: &Pgm, sqe: Sqe) -> Result<(), u16> {
        let page = self.state.page();
        if [sqe.prp1, sqe.prp2].iter().any(|place| *place == 0 || !place.is_multiple_of(page)) {
            return Err(status::INVALID_FIELD);
        }
        let buffers = Buffers { doorbells: sqe.prp1, events: sqe.prp2 };
        self.state.buffers = Some(buffers);
        tracing::info!(target: "nvme", "the guest keeps the doorbells of its queues in memory");
        for queue in 1..=IO_QUEUES {
            if let Some(Some(sq)) = self.state.sqs.get_mut(usize::from(queue)) {
                sq.rings = false;
                buffers.begin(pgm, Bell::Tail(queue), sq.tail);
            }
            if let Some(Some(cq)) = self.state.cqs.get(usize::from(queue)) {
                buffers.begin(pgm, Bell::Head(queue), cq.head);
            }
        }
        Ok(())
    }

    // Queues.

    /// Takes commands out of the queues until they are empty or enough is under way.
    pub(super) fn run(&mut self, pgm: &Pgm, out: &mut Out) {
        if !self.state.csts.rdy() {
            return;
        }
        let mut more = true;
        while more {
            more = false;
            for queue in 0..self.state.sqs.len() as u16 {
                if self.commands.len() >= MAX_COMMANDS || self.buffered >= MAX_BUFFERED {
                    return;
                }
                if self.deleting.contains_key(&queue) {
                    continue;
                }
                let Some(sqe) = self.fetch(pgm, queue, out) else { continue };
                more = true;
                match queue {
                    0 => self.admin(pgm, sqe, out),
                    _ => self.io(pgm, queue, sqe, out),
                }
            }
        }
    }

    fn fetch(&mut self, pgm: &Pgm, queue: u16, out: &mut Out) -> Option<Sqe> {
        let Sq { cq, head, tail, .. } = *self.state.sq(queue.into())?;
        if head == tail {
            self.look(pgm, queue, out);
        }
        // A full completion queue holds its submission queues up.
        if self.state.cq(cq.into()).is_none_or(|cq| !cq.waiting.is_empty()) {
            return None;
        }
        let sq = self.state.sqs[usize::from(queue)].as_mut()?;
        if sq.head == sq.tail {
            return None;
        }
        // The entry was written before the doorbell.
        fence(Ordering::SeqCst);
        let mut raw = [0; SQ_ENTRY as usize];
        pgm.read(GuestPhys(sq.base).wrapping_add(SQ_ENTRY * u64::from(sq.head)), &mut raw);
        sq.head = (sq.head + 1) % sq.entries;
        Some(Sqe::parse(&raw))
    }

    /// Queues a completion.
    fn complete(&mut self, pgm: &Pgm, sq: u16, cid: u16, status: u16, dw0: u32, out: &mut Out) {
        let Some(cq) = self.state.sq(sq.into()).map(|sq| sq.cq) else { return };
        let Some(Some(queue)) = self.state.cqs.get_mut(usize::from(cq)) else { return };
        queue.waiting.push_back(Completion { dw0, sq, cid, status });
        self.post_waiting(pgm, cq, out);
    }

    fn post_waiting(&mut self, pgm: &Pgm, queue: u16, out: &mut Out) {
        if let Some(buffers) = self.state.buffers.filter(|_| queue != 0)
            && self.state.cq(queue.into()).is_some_and(|cq| cq.room() < cq.waiting.len() as u32)
        {
            // Full only as far as is known.
            self.take_head(pgm, buffers, queue, out);
        }
        let State { sqs, cqs, .. } = &mut self.state;
        let Some(Some(cq)) = cqs.get_mut(usize::from(queue)) else { return };
        let mut posted = false;
        while cq.room() > 0
            && let Some(Completion { dw0, sq, cid, status }) = cq.waiting.pop_front()
        {
            let head = sqs.get(usize::from(sq)).and_then(Option::as_ref).map_or(0, |sq| sq.head);
            let mut entry = [0; CQ_ENTRY as usize];
            entry[..4].copy_from_slice(&dw0.to_le_bytes());
            entry[8..10].copy_from_slice(&(head as u16).to_le_bytes());
            entry[10..12].copy_from_slice(&sq.to_le_bytes());
            entry[12..14].copy_from_slice(&cid.to_le_bytes());
            entry[14..].copy_from_slice(&(status << 1 | u16::from(cq.phase)).to_le_bytes());
            let at = GuestPhys(cq.base).wrapping_add(CQ_ENTRY * u64::from(cq.tail));
            // The phase bit last: the guest may be looking.
            pgm.write(at, &entry[..12]);
            fence(Ordering::SeqCst);
            pgm.write(at.wrapping_add(12), &entry[12..]);
            cq.tail = (cq.tail + 1) % cq.entries;
            cq.phase ^= cq.tail == 0;
            posted = true;
        }
        if posted && cq.interrupts {
            out.vectors.push(cq.vector);
        }
    }

    /// Ends a guest's command; a failure goes into the error log.
    fn finish(&mut self, pgm: &Pgm, owner: Owner, status: u16, out: &mut Out) {
        match owner {
            Owner::Shutdown => self.state.csts.set_shst(shutdown::COMPLETE),
            Owner::Guest { sq, cid, nsid, lba } => {
                if status != status::SUCCESS {
                    self.log_error(sq, cid, status, nsid, lba);
                }
                self.complete(pgm, sq, cid, status, 0, out);
            }
        }
    }

    fn log_error(&mut self, sq: u16, cid: u16, status: u16, nsid: u32, lba: u64) {
        let State { errors, error_count, .. } = &mut self.state;
        *error_count += 1;
        errors.truncate(ERROR_ENTRIES - 1);
        errors.push_front(ErrorEntry { count: *error_count, sq, cid, status, lba, nsid });
    }

    /// Tells the guest of an event, now or when it asks.
    fn event(&mut self, pgm: &Pgm, kind: u8, info: u8, log: u8, out: &mut Out) {
        if kind == EVENT_ERROR {
            self.log_error(0xffff, 0xffff, 0, 0, 0);
        }
        let state = &mut self.state;
        if state.events_masked & 1 << kind != 0 {
            return;
        }
        state.events_masked |= 1 << kind;
        state.events.push_back(u32::from(kind) | u32::from(info) << 8 | u32::from(log) << 16);
        self.post_events(pgm, out);
    }

    fn post_events(&mut self, pgm: &Pgm, out: &mut Out) {
        while !self.state.events.is_empty()
            && let Some(cid) = self.state.event_requests.pop_front()
        {
            let dw0 = self.state.events.pop_front().unwrap_or(0);
            self.complete(pgm, 0, cid, status::SUCCESS, dw0, out);
        }
    }

    // Admin commands.

    fn admin(&mut self, pgm: &Pgm, sqe: Sqe, out: &mut Out) {
        let result = match sqe.opcode {
            _ if sqe.flags & 0xc3 != 0 => Err(status::INVALID_FIELD),
            admin::DELETE_SQ => match self.delete_sq(sqe) {
                // It answers when the last command has ended.
                Ok(()) => return self.finish_deletions(pgm, out),
                Err(status) => Err(status),
            },
            admin::CREATE_SQ => self.create_sq(pgm, sqe).map(|()| 0),
            admin::GET_LOG => self.get_log(pgm, sqe).map(|()| 0),
            admin::DELETE_CQ => self.delete_cq(sqe).map(|()| 0),
            admin::CREATE_CQ => self.create_cq(pgm, sqe).map(|()| 0),
            admin::IDENTIFY => self.identify(pgm, sqe).map(|()| 0),
            admin::ABORT => Ok(self.abort(pgm, sqe, out)),
            admin::SET_FEATURES => self.set_feature(sqe),
            admin::GET_FEATURES => self.get_feature(sqe),
            admin::DOORBELL_BUFFERS => self.set_buffers(pgm, sqe).map(|()| 0),
            admin::ASYNC_EVENT => {
                if self.state.event_requests.len() < EVENT_REQUESTS {
                    self.state.event_requests.push_back(sqe.cid);
                    return self.post_events(pgm, out);
                }
                Err(status::EVENT_LIMIT)
            }
            _ => Err(status::INVALID_OPCODE),
        };
        let (status, dw0) = match result {
            Ok(dw0) => (status::SUCCESS, dw0),
            Err(status) => {
                self.log_error(0, sqe.cid, status, sqe.nsid, 0);
                (status | status::DO_NOT_RETRY, 0)
            }
        };
        self.complete(pgm, 0, sqe.cid, status, dw0, out);
    }

    /// Checks what creating queues of both kinds has in common: number, size, place.
    fn new_queue(&self, sqe: Sqe, taken: bool) -> Result<(u16, u32), u16> {
        let (id, entries) = (sqe.dw10 as u16, (sqe.dw10 >> 16) + 1);
        if id == 0 || id > IO_QUEUES || taken {
            return Err(status::INVALID_QUEUE);
        }
        if !(2..=MAX_ENTRIES).contains(&entries) {
            return Err(status::QUEUE_SIZE);
        }
        if sqe.dw11 & 1 == 0 {
            // Queues in pieces are not offered.
            return Err(status::INVALID_FIELD);
        }
        if sqe.prp1 == 0 || !sqe.prp1.is_multiple_of(self.state.page()) {
            return Err(status::PRP_OFFSET);
        }
        Ok((id, entries))
    }

    fn create_cq(&mut self, pgm: &Pgm, sqe: Sqe) -> Result<(), u16> {
        let (id, entries) = self.new_queue(sqe, self.state.cq(sqe.dw10 & 0xffff).is_some())?;
        let vector = (sqe.dw11 >> 16) as u16;
        if vector > IO_QUEUES {
            return Err(status::INVALID_VECTOR);
        }
        self.state.cqs[usize::from(id)] = Some(Cq {
            base: sqe.prp1,
            entries,
            head: 0,
            tail: 0,
            phase: true,
            interrupts: sqe.dw11 & 2 != 0,
            vector,
            waiting: VecDeque::new(),
        });
        if let Some(buffers) = self.state.buffers {
            buffers.begin(pgm, Bell::Head(id), 0);
        }
        Ok(())
    }

    fn create_sq(&mut self, pgm: &Pgm, sqe: Sqe) -> Result<(), u16> {
        let (id, entries) = self.new_queue(sqe, self.state.sq(sqe.dw10 & 0xffff).is_some())?;
        let cq = (sqe.dw11 >> 16) as u16;
        if cq == 0 || self.state.cq(cq.into()).is_none() {
            return Err(status::INVALID_CQ);
        }
        self.state.sqs[usize::from(id)] =
            Some(Sq { base: sqe.prp1, entries, cq, head: 0, tail: 0, rings: false });
        if let Some(buffers) = self.state.buffers {
            buffers.begin(pgm, Bell::Tail(id), 0);
        }
        Ok(())
    }

    fn delete_cq(&mut self, sqe: Sqe) -> Result<(), u16> {
        let id = sqe.dw10 as u16;
        if id == 0 || self.state.cq(id.into()).is_none() {
            return Err(status::INVALID_QUEUE);
        }
        if self.state.sqs.iter().flatten().any(|sq| sq.cq == id) {
            return Err(status::QUEUE_DELETION);
        }
        self.state.cqs[usize::from(id)] = None;
        Ok(())
    }

    fn delete_sq(&mut self, sqe: Sqe) -> Result<(), u16> {
        let id = sqe.dw10 as u16;
        if id == 0 || self.state.sq(id.into()).is_none() || self.deleting.contains_key(&id) {
            return Err(status::INVALID_QUEUE);
        }
        self.deleting.insert(id, sqe.cid);
        Ok(())
    }

    /// Removes submission queues that are to go and have no commands under way.
    fn finish_deletions(&mut self, pgm: &Pgm, out: &mut Out) {
        let busy = |commands: &BTreeMap<u64, Command>, id: u16| {
            commands.values().any(|c| matches!(c.owner, Owner::Guest { sq, .. } if sq == id))
        };
        let done: Vec<_> = self
            .deleting
            .iter()
            .filter(|(id, _)| !busy(&self.commands, **id))
            .map(|(a, b)| (*a, *b))
            .collect();
        for (id, cid) in done {
            self.deleting.remove(&id);
            self.state.sqs[usize::from(id)] = None;
            self.complete(pgm, 0, cid, status::SUCCESS, 0, out);
        }
    }

    /// Bit 0 of the result: the command was not aborted, because it is with the medium or has ended.
    fn abort(&mut self, pgm: &Pgm, sqe: Sqe, out: &mut Out) -> u32 {
        let (queue, cid) = (sqe.dw10 as u16, (sqe.dw10 >> 16) as u16);
        let requests = &mut self.state.event_requests;
        match requests.iter().position(|r| *r == cid) {
            Some(at) if queue == 0 => {
                requests.remove(at);
                self.complete(pgm, 0, cid, status::ABORT_REQUESTED, 0, out);
                0
            }
            _ => 1,
        }
    }

    fn set_feature(&mut self, sqe: Sqe) -> Result<u32, u16> {
        if sqe.dw10 & 1 << 31 != 0 {
            return Err(status::NOT_SAVEABLE);
        }
        let id = sqe.dw10 as u8;
        match id {
            feature::QUEUES => {
                if sqe.dw11 & 0xffff == 0xffff || sqe.dw11 >> 16 == 0xffff {
                    return Err(status::INVALID_FIELD);
                }
                let used = self.state.cqs.iter().skip(1).flatten().next().is_some();
                if used { Err(status::SEQUENCE) } else { Ok(queues()) }
            }
            feature::VECTOR if sqe.dw11 & 0xffff > IO_QUEUES.into() => Err(status::INVALID_FIELD),
            // Nothing is coalesced.
            feature::VECTOR => Ok(0),
            _ => {
                let at = feature::KEPT.iter().position(|f| *f == id).ok_or(status::INVALID_FIELD)?;
                let value = sqe.dw11 & feature::BITS[at];
                // There is one power state.
                if id == feature::POWER && value != 0 {
                    return Err(status::INVALID_FIELD);
                }
                self.state.features[at] = value;
                Ok(0)
            }
        }
    }

    fn get_feature(&self, sqe: Sqe) -> Result<u32, u16> {
        match sqe.dw10 as u8 {
            feature::QUEUES => Ok(queues()),
            feature::VECTOR if sqe.dw11 & 0xffff > IO_QUEUES.into() => Err(status::INVALID_FIELD),
            feature::VECTOR => Ok(sqe.dw11 & 0xffff | 1 << 16),
            id if feature::KEPT.contains(&id) => Ok(self.state.feature(id)),
            _ => Err(status::INVALID_FIELD),
        }
    }

    fn answer(&self, pgm: &Pgm, sqe: Sqe, data: &[u8]) -> Result<(), u16> {
        let regions = prp::walk(pgm, sqe.prp1, sqe.prp2, data.len(), self.state.page())
            .map_err(|prp::BadOffset| status::PRP_OFFSET)?;
        prp::scatter(pgm, &regions, data);
        Ok(())
    }

    fn identify(&self, pgm: &Pgm, sqe: Sqe) -> Result<(), u16> {
        let data = match sqe.dw10 as u8 {
            0 => {
                let at = (sqe.nsid as usize).wrapping_sub(1);
                match self.namespaces.get(at) {
                    Some(Some(shape)) => identify::namespace(shape),
                    // One that is not there is all zeros.
                    Some(None) => identify::empty(),
                    None => return Err(status::INVALID_NAMESPACE),
                }
            }
            1 => identify::controller(self.namespaces.len() as u32),
            2 => {
                if sqe.nsid >= 0xffff_fffe {
                    return Err(status::INVALID_NAMESPACE);
                }
                let present = self.namespaces.iter().zip(1..).filter(|(shape, _)| shape.is_some());
                identify::list(present.map(|(_, id)| id).filter(|id| *id > sqe.nsid))
            }
            _ => return Err(status::INVALID_FIELD),
        };
        self.answer(pgm, sqe, &data)
    }

    fn get_log(&mut self, pgm: &Pgm, sqe: Sqe) -> Result<(), u16> {
        let len = ((sqe.dw10 >> 16 & 0xfff) as usize + 1) * 4;
        let state = &mut self.state;
        let mut log = match sqe.dw10 as u8 {
            ERROR_LOG => {
                state.events_masked &= !(1 << EVENT_ERROR);
                identify::error_log(&state.errors)
            }
            2 => identify::health_log(&state.counters, state.error_count),
            3 => identify::firmware_log(),
            _ => return Err(status::INVALID_LOG),
        };
        log.resize(len, 0);
        self.answer(pgm, sqe, &log)
    }

    // Commands of I/O queues.

    fn io(&mut self, pgm: &Pgm, queue: u16, sqe: Sqe, out: &mut Out) {
        let lba = if matches!(sqe.opcode, io::FLUSH | io::DATASET) { 0 } else { sqe.blocks().0 };
        let owner = Owner::Guest { sq: queue, cid: sqe.cid, nsid: sqe.nsid, lba };
        match self.plan(pgm, sqe) {
            Ok((regions, steps, bytes)) => self.start(owner, regions, steps, bytes, out),
            Err(status) => return self.finish(pgm, owner, status | status::DO_NOT_RETRY, out),
        }
        // One without steps has ended already.
        self.reap(pgm, out);
    }

    /// The memory, the steps, and the bytes of a command.
    #[expect(clippy::type_complexity, reason = "three parts of one plan, taken apart at once")]
    fn plan(&mut self, pgm: &Pgm, sqe: Sqe) -> Result<(Vec<Region>, VecDeque<(usize, Step)>, usize), u16> {
        if sqe.flags & 0xc3 != 0 {
            // Fused commands and scatter-gather lists are not offered.
            return Err(status::INVALID_FIELD);
        }
        if sqe.opcode == io::FLUSH && sqe.nsid == u32::MAX {
            return Ok((Vec::new(), self.flushes(), 0));
        }
        let at = (sqe.nsid as usize).wrapping_sub(1);
        let Some(Some(shape)) = self.namespaces.get(at) else { return Err(status::INVALID_NAMESPACE) };
        let shape = shape.clone();
        let page = self.state.page();
        let cached = self.state.feature(feature::WRITE_CACHE) != 0;
        let walk =
            |len| prp::walk(pgm, sqe.prp1, sqe.prp2, len, page).map_err(|prp::BadOffset| status::PRP_OFFSET);
        let range = || {
            let (first, count) = sqe.blocks();
            match first.checked_add(count) {
                Some(end) if end <= shape.blocks => Ok((first * SECTOR, count * SECTOR)),
                _ => Err(status::LBA_RANGE),
            }
        };
        let writable = || if shape.read_only { Err(status::READ_ONLY) } else { Ok(()) };
        let counters = &mut self.state.counters;
        let mut steps = VecDeque::new();
        match sqe.opcode {
            io::FLUSH => steps.push_back((at, Step::Flush)),
            io::READ => {
                let (offset, len) = range()?;
                let len = transfer(len)?;
                let regions = walk(len)?;
                steps.push_back((at, Step::Read { offset, len }));
                counters.reads += 1;
                counters.blocks_read += len as u64 / SECTOR;
                return Ok((regions, steps, len));
            }
            io::WRITE => {
                let (offset, len) = range()?;
                let len = transfer(len)?;
                writable()?;
                let data = prp::gather(pgm, &walk(len)?);
                steps.push_back((at, Step::Write { offset, data }));
                if sqe.fua() || !cached {
                    steps.push_back((at, Step::Flush));
                }
                counters.writes += 1;
                counters.blocks_written += len as u64 / SECTOR;
                return Ok((Vec::new(), steps, len));
            }
            io::WRITE_ZEROES => {
                let (offset, len) = range()?;
                writable()?;
                steps.push_back((at, Step::Zero { offset, len }));
                if sqe.fua() || !cached {
                    steps.push_back((at, Step::Flush));
                }
                return Ok((Vec::new(), steps, PIECE.min(len as usize)));
            }
            io::DATASET => {
                let count = (sqe.dw10 & 0xff) as usize + 1;
                let data = prp::gather(pgm, &walk(16 * count)?);
                // Other hints than "deallocate" have no effect.
                if sqe.dw11 & 4 != 0 {
                    writable()?;
                    let (ranges, _) = data.as_chunks::<16>();
                    for range in ranges {
                        let [_, _, _, _, l0, l1, l2, l3, s0, s1, s2, s3, s4, s5, s6, s7] = *range;
                        let len = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
                        let first = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
                        if first.checked_add(len).is_none_or(|end| end > shape.blocks) {
                            return Err(status::LBA_RANGE);
                        }
                        if len > 0 && shape.discard {
                            let (offset, len) = (first * SECTOR, len * SECTOR);
                            steps.push_back((at, Step::Discard { offset, len }));
                        }
                    }
                }
            }
            _ => return Err(status::INVALID_OPCODE),
        }
        Ok((Vec::new(), steps, 0))
    }

    fn start(
        &mut self,
        owner: Owner,
        regions: Vec<Region>,
        steps: VecDeque<(usize, Step)>,
        bytes: usize,
        out: &mut Out,
    ) {
        self.next += 1;
        self.buffered += bytes;
        self.commands.insert(self.next, Command { owner, regions, steps, bytes, writes: false });
        self.advance(self.next, out);
    }

    /// Hands out a command's next step; false if there is none left.
    fn advance(&mut self, id: u64, out: &mut Out) -> bool {
        let Some(command) = self.commands.get_mut(&id) else { return false };
        let Some((namespace, step)) = command.steps.pop_front() else { return false };
        command.writes = !matches!(step, Step::Read { .. } | Step::Flush);
        let op = match step {
            Step::Read { offset, len } => BlockOp::Read { offset, buffer: vec![0; len] },
            Step::Write { offset, data } => BlockOp::Write { offset, buffer: data },
            Step::Discard { offset, len } => BlockOp::Discard { offset, len },
            Step::Flush => BlockOp::Flush,
            Step::Zero { offset, len } => {
                let (op, done) = zero_piece(offset, len);
                if done < len {
                    let (offset, len) = (offset + done, len - done);
                    command.steps.push_front((namespace, Step::Zero { offset, len }));
                }
                op
            }
        };
        out.asks.push(Ask { command: id, generation: self.generation, namespace, op });
        true
    }

    /// Ends commands that had no step to begin with.
    fn reap(&mut self, pgm: &Pgm, out: &mut Out) {
        let id = self.next;
        if self.commands.contains_key(&id) && !out.asks.iter().any(|ask| ask.command == id) {
            self.end(pgm, id, status::SUCCESS, out);
        }
    }

    fn end(&mut self, pgm: &Pgm, id: u64, status: u16, out: &mut Out) {
        if let Some(command) = self.commands.remove(&id) {
            self.buffered = self.buffered.saturating_sub(command.bytes);
            self.finish(pgm, command.owner, status, out);
            self.finish_deletions(pgm, out);
        }
    }

    /// A medium has answered. `Err` is a failure of the medium.
    pub(super) fn answered(
        &mut self,
        pgm: &Pgm,
        id: u64,
        generation: u64,
        result: Result<Vec<u8>, ()>,
        out: &mut Out,
    ) {
        if generation != self.generation {
            self.stale = self.stale.saturating_sub(1);
            self.enable();
            return;
        }
        let Some(command) = self.commands.get(&id) else { return };
        match result {
            Ok(data) => {
                if !command.regions.is_empty() {
                    prp::scatter(pgm, &command.regions, &data);
                }
                if !self.advance(id, out) {
                    self.end(pgm, id, status::SUCCESS, out);
                }
            }
            Err(()) => {
                let status = match (command.writes, command.regions.is_empty()) {
                    (true, _) => status::WRITE_FAULT,
                    (false, false) => status::READ_ERROR,
                    (false, true) => status::INTERNAL,
                };
                self.state.counters.media_errors += 1;
                self.end(pgm, id, status, out);
            }
        }
        self.run(pgm, out);
    }
}

/// The number of queues of each kind, as the feature tells it.
fn queues() -> u32 {
    u32::from(IO_QUEUES - 1) << 16 | u32::from(IO_QUEUES - 1)
}

/// A transfer's length, if the controller takes as much at once.
fn transfer(len: u64) -> Result<usize, u16> {
    usize::try_from(len).ok().filter(|len| *len <= MAX_TRANSFER).ok_or(status::INVALID_FIELD)
}
