//! The paravirtual SCSI controller (virtio-scsi). Source: OASIS Virtual I/O Device (VIRTIO) Version 1.2, section 5.6.
//!
//! Queue 0 takes task management, queue 1 has buffers for events, the others take commands. Each of up to 256 targets is a drive with
//! one unit. Drives that come and go while the guest runs, and discs that are changed, are told by events.
//!
//! **Left out**: transfers both ways in one command, protection information; the features do not show them. Asynchronous
//! notifications of media are taken note of as events, not by subscription.
//!
//! **Saved state**: see [`crate::scsi`].

#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock, Weak};

use dev_virtio_core::{Chain, Transport, VirtioDevice, VirtioPci, Wiring};
use parking_lot::Mutex;
use pdm::connector::{BlockError, Medium};
use ssm::{Error, Reader, Writer};

use super::bus::{Bus, Command, Done};
use super::sense::{FIXED, Sense};
use super::sg::SgList;
use super::{Controller, EjectSink, TargetError};
use crate::ide::Drive;

/// Feature bits.
mod bit {
    pub(super) const HOTPLUG: u64 = 1 << 1;
    pub(super) const CHANGE: u64 = 1 << 2;
}

const CONTROL: usize = 0;
const EVENTS: usize = 1;
const FIRST_COMMANDS: usize = 2;
/// Control, events, and four queues of commands.
const QUEUES: &[u16] = &[64, 64, 128, 128, 128, 128];

/// Pieces of memory in one command at most, as told.
const SEG_MAX: u32 = 126;
/// Sectors in one command at most, as told.
const MAX_SECTORS: u32 = 0xffff;
const COMMANDS_PER_UNIT: u32 = 128;
const EVENT_SIZE: u32 = 16;
/// Sizes of sense data and command descriptor blocks until the driver sets others.
const SENSE_SIZE: u32 = 96;
const CDB_SIZE: u32 = 32;
/// The greatest that the driver may set.
const MAX_SENSE: u32 = 252;
const MAX_CDB: u32 = 260;
/// Bytes of a command before its descriptor block, and of an answer before its sense data.
const COMMAND_HEAD: usize = 19;
const ANSWER_HEAD: usize = 12;

/// Answers to commands and to task management.
mod response {
    pub(super) const OK: u8 = 0;
    pub(super) const ABORTED: u8 = 2;
    pub(super) const BAD_TARGET: u8 = 3;
    pub(super) const RESET: u8 = 4;
    pub(super) const FAILURE: u8 = 9;
    pub(super) const SUCCEEDED: u8 = 10;
    pub(super) const REJECTED: u8 = 11;
    pub(super) const INCORRECT_LUN: u8 = 12;
}

/// Task management.
mod task {
    pub(super) const ABORT_TASK: u32 = 0;
    pub(super) const ABORT_TASK_SET: u32 = 1;
    pub(super) const CLEAR_ACA: u32 = 2;
    pub(super) const CLEAR_TASK_SET: u32 = 3;
    pub(super) const NEXUS_RESET: u32 = 4;
    pub(super) const UNIT_RESET: u32 = 5;
    pub(super) const QUERY_TASK: u32 = 6;
    pub(super) const QUERY_TASK_SET: u32 = 7;
}

/// Events.
mod event {
    pub(super) const NONE: u32 = 0;
    pub(super) const TRANSPORT_RESET: u32 = 1;
    pub(super) const PARAMETER_CHANGE: u32 = 3;
    /// Events before were lost for want of buffers.
    pub(super) const MISSED: u32 = 1 << 31;
    /// Reasons of a transport reset.
    pub(super) const RESCAN: u32 = 1;
    pub(super) const REMOVED: u32 = 2;
    /// Why parameters have changed: the medium, as a sense code (ASC 0x28).
    pub(super) const MEDIUM: u32 = 0x28;
}

/// What a command is known by: the chain that it came in.
struct Task {
    queue: usize,
    chain: Chain,
    tag: u64,
    /// Bytes of data that the guest expects to be moved.
    data: u64,
}

/// The controller behind its transport.
pub struct VirtioScsi {
    bus: Bus<Task>,
    // What the guest can see.
    sense_size: u32,
    cdb_size: u32,
    missed: bool,
}

/// A controller in a machine.
pub type VirtioScsiPci = VirtioPci<VirtioScsi>;

impl VirtioScsi {
    /// Most targets of a controller.
    pub const TARGETS: usize = 256;

    /// Builds a controller with its drives.
    ///
    /// # Panics
    /// Unless there are 1 to 256 places for drives.
    pub fn create(
        wiring: Wiring,
        drives: Vec<Option<Drive>>,
        ejected: Option<Arc<dyn EjectSink>>,
    ) -> Arc<Mutex<VirtioScsiPci>> {
        assert!((1..=Self::TARGETS).contains(&drives.len()), "{} targets", drives.len());
        let me: Arc<OnceLock<Weak<Mutex<VirtioScsiPci>>>> = Arc::default();
        let answer = {
            let me = me.clone();
            move |number, result: Result<Vec<u8>, BlockError>| {
                if let Some(card) = me.get().and_then(Weak::upgrade) {
                    let card = &mut *card.lock();
                    card.device.bus.answered(number, result);
                    card.device.finish(&mut card.transport);
                }
            }
        };
        let bus = Bus::new(wiring.pgm.clone(), drives, ejected, Arc::new(answer));
        let device = Self { bus, sense_size: SENSE_SIZE, cdb_size: CDB_SIZE, missed: false };
        let card = VirtioPci::new(device, wiring);
        // Nobody else has set it.
        let _ = me.set(Arc::downgrade(&card));
        card
    }

    /// Takes commands until none waits.
    fn take_commands(&mut self, queue: usize, transport: &mut Transport) {
        loop {
            let Some((queued, memory)) = transport.queue(queue) else { return };
            queued.want_notifications(memory, false);
            while let Some(chain) = transport.queue(queue).and_then(|(queue, memory)| queue.pop(memory)) {
                self.take_command(queue, chain, transport);
            }
            let Some((queued, memory)) = transport.queue(queue) else { return };
            queued.want_notifications(memory, true);
            if !queued.has_chain(memory) {
                break;
            }
        }
        self.finish(transport);
        transport.publish(queue);
    }

    fn take_command(&mut self, queue: usize, chain: Chain, transport: &mut Transport) {
        let head = COMMAND_HEAD + self.cdb_size as usize;
        let room = ANSWER_HEAD + self.sense_size as usize;
        let whole = read_start(&chain, self.bus.memory(), head);
        let Some(request) = whole.filter(|_| chain.writable_len() >= room) else {
            // No command, or no room to answer it.
            return give_back(transport, queue, &chain, 0);
        };
        let out = tail(&chain.readable, head);
        let into = tail(&chain.writable, room);
        let mut cdb = [0; 16];
        let len = cdb.len().min(self.cdb_size as usize);
        cdb[..len].copy_from_slice(&request[COMMAND_HEAD..COMMAND_HEAD + len]);
        let tag = u64::from_le_bytes(std::array::from_fn(|i| request[8 + i]));
        let data = out.len() + into.len();
        let both = out.len() > 0 && into.len() > 0;
        let task = Task { queue, chain, tag, data };
        let place = place(std::array::from_fn(|i| request[i]));
        let (Some((target, lun)), false) = (place, both) else {
            let answer = if both { response::FAILURE } else { response::BAD_TARGET };
            return self.refuse(task, answer, transport);
        };
        let command = Command { target, lun, cdb, out, into, tag: task };
        if let Err(command) = self.bus.command(command) {
            self.refuse(command.tag, response::BAD_TARGET, transport);
        }
    }

    /// Answers a command that no unit carried out.
    fn refuse(&self, task: Task, answer: u8, transport: &mut Transport) {
        self.answer(&task, answer, 0, Sense::NONE, 0, transport);
    }

    fn answer(
        &self,
        task: &Task,
        answer: u8,
        status: u8,
        sense: Sense,
        moved: u64,
        transport: &mut Transport,
    ) {
        let sensed = if sense == Sense::NONE { 0 } else { FIXED.min(self.sense_size as usize) };
        let residual = u32::try_from(task.data.saturating_sub(moved)).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(ANSWER_HEAD + sensed);
        bytes.extend_from_slice(&(sensed as u32).to_le_bytes());
        bytes.extend_from_slice(&residual.to_le_bytes());
        bytes.extend_from_slice(&[0, 0, status, answer]);
        bytes.extend_from_slice(&sense.fixed()[..sensed]);
        task.chain.scatter(self.bus.memory(), 0, &bytes);
        let written = ANSWER_HEAD as u64 + u64::from(self.sense_size) + moved;
        give_back(transport, task.queue, &task.chain, u32::try_from(written).unwrap_or(u32::MAX));
    }

    /// Answers commands that have ended.
    fn finish(&mut self, transport: &mut Transport) {
        let mut queues = 0u32;
        while let Some(Done { tag: task, status, sense, moved }) = self.bus.take_done() {
            queues |= 1 << task.queue;
            self.answer(&task, response::OK, status, sense, moved, transport);
        }
        publish(queues, transport);
    }

    /// Answers commands that were ended by force.
    fn end(&mut self, tasks: Vec<Task>, answer: u8, transport: &mut Transport) {
        let mut queues = 0u32;
        for task in tasks {
            queues |= 1 << task.queue;
            self.refuse(task, answer, transport);
        }
        publish(queues, transport);
    }

    fn take_control(&mut self, transport: &mut Transport) {
        while let Some(chain) = transport.queue(CONTROL).and_then(|(queue, memory)| queue.pop(memory)) {
            let kind = read_start(&chain, self.bus.memory(), 4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            let written = match kind {
                Some(0) => {
                    let answer = match read_start(&chain, self.bus.memory(), 24) {
                        Some(request) => self.manage(&request, transport),
                        None => response::FAILURE,
                    };
                    chain.scatter(self.bus.memory(), 0, &[answer])
                }
                // Asynchronous notifications: none of the classes are offered.
                Some(1 | 2) => chain.scatter(self.bus.memory(), 0, &[0, 0, 0, 0, response::OK]),
                _ => 0,
            };
            give_back(transport, CONTROL, &chain, written as u32);
        }
        transport.publish(CONTROL);
    }

    fn manage(&mut self, request: &[u8], transport: &mut Transport) -> u8 {
        let subtype = u32::from_le_bytes([request[4], request[5], request[6], request[7]]);
        let tag = u64::from_le_bytes(std::array::from_fn(|i| request[16 + i]));
        let place = place(std::array::from_fn(|i| request[8 + i]));
        let Some((target, lun)) = place.filter(|(target, _)| self.bus.is_present(*target)) else {
            return response::BAD_TARGET;
        };
        if lun != 0 {
            return response::INCORRECT_LUN;
        }
        match subtype {
            task::ABORT_TASK => {
                let ended = self.bus.abort(|at, task| at == target && task.tag == tag);
                self.end(ended, response::ABORTED, transport);
                response::OK
            }
            task::ABORT_TASK_SET | task::CLEAR_TASK_SET => {
                let ended = self.bus.abort(|at, _| at == target);
                self.end(ended, response::ABORTED, transport);
                response::OK
            }
            task::NEXUS_RESET | task::UNIT_RESET => {
                let ended = self.bus.reset(Some(target));
                self.end(ended, response::RESET, transport);
                response::OK
            }
            task::CLEAR_ACA => response::OK,
            task::QUERY_TASK if self.bus.has(|at, task| at == target && task.tag == tag) => {
                response::SUCCEEDED
            }
            task::QUERY_TASK_SET if self.bus.has(|at, _| at == target) => response::SUCCEEDED,
            task::QUERY_TASK | task::QUERY_TASK_SET => response::OK,
            _ => response::REJECTED,
        }
    }

    /// Tells the guest of an event, or that it has missed one.
    fn tell(&mut self, feature: u64, event: u32, target: usize, reason: u32, transport: &mut Transport) {
        if !transport.is_active() || !transport.has(feature) {
            return;
        }
        let missed = if self.missed { event::MISSED } else { 0 };
        let mut bytes = (event | missed).to_le_bytes().to_vec();
        bytes.extend_from_slice(&[1, target as u8, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&reason.to_le_bytes());
        let chain = transport.queue(EVENTS).and_then(|(queue, memory)| queue.pop(memory));
        let Some(chain) = chain else {
            self.missed = true;
            return;
        };
        self.missed = false;
        let written = chain.scatter(self.bus.memory(), 0, &bytes);
        give_back(transport, EVENTS, &chain, written as u32);
        transport.publish(EVENTS);
    }
}

/// The first `count` bytes that the device reads; none if there are not as many.
fn read_start(chain: &Chain, memory: &pgm::Pgm, count: usize) -> Option<Vec<u8>> {
    let list = tail(&chain.readable, 0);
    let mut bytes = vec![0; count];
    (list.read(memory, 0, &mut bytes) == count).then_some(bytes)
}

/// What of the regions lies behind `skip` bytes.
fn tail(regions: &[dev_virtio_core::Region], skip: usize) -> SgList {
    let mut list = SgList::default();
    let mut skip = u32::try_from(skip).unwrap_or(u32::MAX);
    for region in regions {
        let cut = skip.min(region.len);
        skip -= cut;
        list.push(region.address.wrapping_add(cut.into()), region.len - cut);
    }
    list
}

fn give_back(transport: &mut Transport, queue: usize, chain: &Chain, written: u32) {
    if let Some((queue, memory)) = transport.queue(queue) {
        queue.push(memory, chain.head, written);
    }
}

fn publish(queues: u32, transport: &mut Transport) {
    (0..QUEUES.len()).filter(|queue| queues & 1 << queue != 0).for_each(|queue| transport.publish(queue));
}

/// Target and unit of an address.
fn place(lun: [u8; 8]) -> Option<(usize, u64)> {
    match lun {
        [1, target, high, low, ..] => {
            let unit = u16::from_be_bytes([high, low]);
            // Peripheral or flat addressing.
            let unit = if unit & 0xc000 == 0x4000 { unit & 0x3fff } else { unit };
            Some((target.into(), unit.into()))
        }
        _ => None,
    }
}

impl VirtioDevice for VirtioScsi {
    fn name(&self) -> &'static str {
        "virtio-scsi"
    }

    fn id(&self) -> u16 {
        8
    }

    fn class(&self) -> [u8; 3] {
        [0x01, 0x00, 0x00]
    }

    fn features(&self) -> u64 {
        bit::HOTPLUG | bit::CHANGE
    }

    fn queues(&self) -> &'static [u16] {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        let words = [
            (QUEUES.len() - FIRST_COMMANDS) as u32,
            SEG_MAX,
            MAX_SECTORS,
            COMMANDS_PER_UNIT,
            EVENT_SIZE,
            self.sense_size,
            self.cdb_size,
            // Greatest channel and target.
            (self.bus.places() as u32 - 1) << 16,
            // Greatest unit.
            0,
        ];
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    fn config_written(&mut self, offset: usize, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            20 if value <= MAX_SENSE => self.sense_size = value,
            24 if value <= MAX_CDB => self.cdb_size = value,
            _ => {}
        }
    }

    fn activate(&mut self, transport: &mut Transport) {
        for queue in 0..QUEUES.len() {
            self.notified(queue, transport);
        }
    }

    fn notified(&mut self, queue: usize, transport: &mut Transport) {
        match queue {
            CONTROL => self.take_control(transport),
            EVENTS if self.missed => self.tell(0, event::NONE, 0, 0, transport),
            EVENTS => {}
            _ => self.take_commands(queue, transport),
        }
    }

    fn reset(&mut self, _transport: &mut Transport) {
        self.bus.power_on();
        (self.sense_size, self.cdb_size, self.missed) = (SENSE_SIZE, CDB_SIZE, false);
    }

    fn save(&self, out: &mut Writer) {
        let Self { bus, sense_size, cdb_size, missed } = self;
        out.put_u32(*sense_size);
        out.put_u32(*cdb_size);
        out.put_bool(*missed);
        bus.save(out);
    }

    fn load(&mut self, input: &mut Reader<'_>) -> Result<(), Error> {
        let (sense_size, cdb_size, missed) = (input.take_u32()?, input.take_u32()?, input.take_bool()?);
        if sense_size > MAX_SENSE || cdb_size > MAX_CDB {
            return Err(input.invalid("size of commands or sense data"));
        }
        let targets = self.bus.load(input)?;
        self.bus.restore(targets);
        (self.sense_size, self.cdb_size, self.missed) = (sense_size, cdb_size, missed);
        Ok(())
    }
}

impl Controller for VirtioScsiPci {
    fn set_medium(&mut self, target: usize, medium: Medium, force: bool) -> Result<(), TargetError> {
        self.device.bus.set_medium(target, medium, force)?;
        self.device.tell(bit::CHANGE, event::PARAMETER_CHANGE, target, event::MEDIUM, &mut self.transport);
        Ok(())
    }

    fn attach(&mut self, target: usize, drive: Drive) -> Result<(), TargetError> {
        self.device.bus.attach(target, drive)?;
        self.device.tell(bit::HOTPLUG, event::TRANSPORT_RESET, target, event::RESCAN, &mut self.transport);
        Ok(())
    }

    fn detach(&mut self, target: usize) -> Result<(), TargetError> {
        let was_there = self.device.bus.is_present(target);
        let ended = self.device.bus.detach(target)?;
        self.device.end(ended, response::BAD_TARGET, &mut self.transport);
        if was_there {
            self.device.tell(
                bit::HOTPLUG,
                event::TRANSPORT_RESET,
                target,
                event::REMOVED,
                &mut self.transport,
            );
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.device.bus.is_idle()
    }
}
