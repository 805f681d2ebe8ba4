//! The paravirtual disk (virtio-blk), one PCI function for each, as QEMU has it. VirtualBox has none: its virtio controller is
//! virtio-scsi. Source: OASIS Virtual I/O Device (VIRTIO) Version 1.2, section 5.2.
//!
//! Offered are flushes, a write cache that the driver can switch off, discard where the image takes it, write zeroes, and four queues.
//! Transitional: SeaBIOS and guests with drivers of virtio 0.9.5 find it too.
//!
//! **Left out.** Secure erase, lifetime reports, zones, the legacy SCSI pass-through: not offered.
//!
//! **Asynchrony.** Requests run side by side and complete when the medium has answered; long ones go to it in pieces. A reset drops
//! requests under way; later ones wait until the medium has answered those, so that an abandoned write cannot overtake a later one.
//!
//! **Saved state.** Saving requires that all requests have completed (the machine stops the vCPUs and drains its media first).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use dev_virtio_core::{Chain, Transport, VirtioDevice, VirtioPci, Wiring};
use parking_lot::Mutex;
use pdm::connector::{BlockDriver, BlockError, BlockOp};
use ssm::{Error, Reader, Writer};

use crate::pieces::{PIECE, zero_piece};

/// Feature bits.
mod bit {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const QUEUES: &[u16] = &[256; 4];
const SECTOR: u64 = 512;
/// Bytes of a request's header: type, priority, sector.
const HEADER: usize = 16;
/// Bytes of a segment of a discard or write-zeroes request: sector, count, flags.
const SEGMENT: usize = 16;
const MAX_SEGMENTS: usize = 64;
/// Sectors of one segment: 1 GiB for discard, 32 MiB for zeroes, which are written.
const MAX_DISCARD: u32 = 1 << 21;
const MAX_ZEROES: u32 = 1 << 16;
/// Write zeroes: the range may be unmapped.
const UNMAP: u32 = 1;
/// Where the write cache's switch is in the configuration.
const WRITEBACK_AT: usize = 32;
/// Bytes of the serial number.
const ID: usize = 20;
/// Requests under way at once, and the bytes that they may hold.
const MAX_REQUESTS: usize = 1024;
const MAX_BUFFERED: usize = 32 << 20;

/// A disk in a machine.
pub type Card = VirtioPci<VirtioBlk>;

/// What a disk is built with.
pub struct Disk {
    pub medium: Arc<dyn BlockDriver>,
    /// The serial number, of which the guest sees 20 characters.
    pub serial: String,
    /// Hand discarded ranges to the medium.
    pub discard: bool,
}

/// A part of a request for the medium. `skip` counts the data's bytes before it.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read { offset: u64, skip: usize, len: usize },
    Write { offset: u64, skip: usize, len: usize },
    Zero { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
    Flush,
}

/// A request under way: one step after the other.
struct Request {
    queue: usize,
    chain: Chain,
    steps: VecDeque<Step>,
    /// Where what is being read goes in the data.
    at: usize,
    /// Bytes that the request holds now.
    held: usize,
    /// Bytes that the guest was given.
    written: usize,
}

/// The disk behind its transport.
pub struct VirtioBlk {
    disk: Disk,
    sectors: u64,
    read_only: bool,
    me: Weak<Mutex<Card>>,
    /// The write cache is on: what completes is durable with the next flush only. The driver's wish.
    writeback: bool,
    requests: BTreeMap<u64, Request>,
    next: u64,
    buffered: usize,
    /// Requests that a reset has dropped and the medium has not answered.
    stale: usize,
    generation: u64,
    /// Chains were left in the queues, for one of the limits or for stale requests.
    held_up: bool,
}

impl VirtioBlk {
    /// Builds a disk.
    pub fn create(disk: Disk, wiring: Wiring) -> Arc<Mutex<Card>> {
        let blk = Self {
            sectors: disk.medium.size().0 / SECTOR,
            read_only: disk.medium.is_read_only(),
            disk,
            me: Weak::new(),
            writeback: true,
            requests: BTreeMap::new(),
            next: 0,
            buffered: 0,
            stale: 0,
            generation: 0,
            held_up: false,
        };
        let card = VirtioPci::new(blk, wiring);
        card.lock().device.me = Arc::downgrade(&card);
        card
    }

    /// Whether no request is with the medium.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.stale == 0
    }

    /// Takes requests from all queues until they are empty or enough is under way.
    fn run(&mut self, transport: &mut Transport) {
        for queue in 0..QUEUES.len() {
            self.run_queue(queue, transport);
        }
    }

    fn run_queue(&mut self, index: usize, transport: &mut Transport) {
        if !transport.is_active() {
            return;
        }
        loop {
            if self.stale > 0 || self.requests.len() >= MAX_REQUESTS || self.buffered >= MAX_BUFFERED {
                self.held_up = true;
                break;
            }
            let Some((queue, memory)) = transport.queue(index) else { return };
            let Some(chain) = queue.pop(memory) else {
                queue.want_notifications(memory, true);
                // One may have come before the driver saw that it has to tell.
                if queue.has_chain(memory) {
                    continue;
                }
                break;
            };
            self.take(index, chain, transport);
        }
        // Also takes note of a queue that makes no sense.
        transport.publish(index);
    }

    /// Takes one request.
    fn take(&mut self, queue: usize, chain: Chain, transport: &mut Transport) {
        let memory = transport.memory();
        let mut header = [0; HEADER];
        let whole = chain.fill(&memory, 0, &mut header) == HEADER;
        // The status byte is the last that the device writes.
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Self::give_back(queue, &chain, 0, transport);
        };
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let what = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        let data = chain.readable_len().saturating_sub(HEADER);
        let mut written = 0;
        let steps = match what {
            _ if !whole => Err(IOERR),
            kind::IN => self.range(sector, room).map(|offset| {
                (0..room)
                    .step_by(PIECE)
                    .map(|skip| Step::Read {
                        offset: offset + skip as u64,
                        skip,
                        len: PIECE.min(room - skip),
                    })
                    .collect()
            }),
            kind::OUT if self.read_only => Err(IOERR),
            kind::OUT => self.range(sector, data).map(|offset| {
                (0..data)
                    .step_by(PIECE)
                    .map(|skip| Step::Write {
                        offset: offset + skip as u64,
                        skip,
                        len: PIECE.min(data - skip),
                    })
                    .collect()
            }),
            kind::FLUSH => Ok(VecDeque::from([Step::Flush])),
            kind::GET_ID => {
                let mut id = [0; ID];
                for (to, from) in id.iter_mut().zip(self.disk.serial.bytes()) {
                    *to = from;
                }
                written = chain.scatter(&memory, 0, &id[..ID.min(room)]);
                Ok(VecDeque::new())
            }
            kind::DISCARD if self.disk.discard => self.segments(&chain, &memory, data, what),
            kind::WRITE_ZEROES => self.segments(&chain, &memory, data, what),
            _ => Err(UNSUPP),
        };
        match steps {
            Ok(mut steps) => {
                let writes = steps.iter().any(|s| matches!(s, Step::Write { .. } | Step::Zero { .. }));
                if writes && !self.is_cached(transport) {
                    steps.push_back(Step::Flush);
                }
                self.next += 1;
                let request = Request { queue, chain, steps, at: 0, held: 0, written };
                self.requests.insert(self.next, request);
                self.advance(self.next, transport);
            }
            Err(status) => {
                chain.scatter(&memory, room, &[status]);
                Self::give_back(queue, &chain, 1, transport);
            }
        }
    }

    /// Whether writes may complete before they are durable: the driver flushes, and has not switched the cache off.
    fn is_cached(&self, transport: &Transport) -> bool {
        transport.has(bit::FLUSH) && (self.writeback || !transport.has(bit::CONFIG_WCE))
    }

    /// The place of `len` bytes from a sector on.
    fn range(&self, sector: u64, len: usize) -> Result<u64, u8> {
        let len = len as u64;
        let end = sector.checked_add(len / SECTOR);
        if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.sectors) {
            return Err(IOERR);
        }
        Ok(sector * SECTOR)
    }

    /// The ranges of a discard or write-zeroes request.
    fn segments(
        &self,
        chain: &Chain,
        memory: &pgm::Pgm,
        len: usize,
        what: u32,
    ) -> Result<VecDeque<Step>, u8> {
        if self.read_only || len == 0 || !len.is_multiple_of(SEGMENT) || len / SEGMENT > MAX_SEGMENTS {
            return Err(IOERR);
        }
        let mut data = vec![0; len];
        chain.fill(memory, HEADER, &mut data);
        let (segments, _) = data.as_chunks::<SEGMENT>();
        let step = |segment: &[u8; SEGMENT]| {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let (allowed, most) = if what == kind::DISCARD { (0, MAX_DISCARD) } else { (UNMAP, MAX_ZEROES) };
            if u32::from_le_bytes(flags) & !allowed != 0 {
                return Err(UNSUPP);
            }
            if count > most {
                return Err(IOERR);
            }
            let len = u64::from(count) * SECTOR;
            let offset = self.range(sector, len as usize)?;
            Ok(match what {
                kind::DISCARD => Step::Discard { offset, len },
                _ => Step::Zero { offset, len },
            })
        };
        segments.iter().map(step).collect()
    }

    /// Hands a request's next step to the medium, or ends it.
    fn advance(&mut self, id: u64, transport: &mut Transport) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Some(step) = request.steps.pop_front() else { return self.end(id, OK, transport) };
        let op = match step {
            Step::Read { offset, skip, len } => {
                (request.at, request.held) = (skip, len);
                BlockOp::Read { offset, buffer: vec![0; len] }
            }
            Step::Write { offset, skip, len } => {
                request.held = len;
                let mut buffer = vec![0; len];
                request.chain.fill(&transport.memory(), HEADER + skip, &mut buffer);
                BlockOp::Write { offset, buffer }
            }
            Step::Zero { offset, len } => {
                let (op, done) = zero_piece(offset, len);
                request.held = done as usize;
                if done < len {
                    request.steps.push_front(Step::Zero { offset: offset + done, len: len - done });
                }
                op
            }
            Step::Discard { offset, len } => BlockOp::Discard { offset, len },
            Step::Flush => BlockOp::Flush,
        };
        self.buffered += request.held;
        let (me, generation) = (self.me.clone(), self.generation);
        self.disk.medium.submit(
            op,
            Box::new(move |result| {
                if let Some(me) = me.upgrade() {
                    let card = &mut *me.lock();
                    card.device.answered(id, generation, result, &mut card.transport);
                }
            }),
        );
    }

    /// The medium has answered.
    fn answered(
        &mut self,
        id: u64,
        generation: u64,
        result: Result<Vec<u8>, BlockError>,
        transport: &mut Transport,
    ) {
        if let Err(error) = &result {
            tracing::warn!(target: "virtio-blk", %error, "the medium failed a request");
        }
        if generation != self.generation {
            self.stale = self.stale.saturating_sub(1);
        } else if let Some(request) = self.requests.get_mut(&id) {
            self.buffered = self.buffered.saturating_sub(std::mem::take(&mut request.held));
            match result {
                // A flush, a discard and what was written give nothing to the guest; its data has no room then.
                Ok(data) => {
                    if request.chain.writable_len() > 1 {
                        request.written += request.chain.scatter(&transport.memory(), request.at, &data);
                    }
                    self.advance(id, transport);
                }
                Err(_) => self.end(id, IOERR, transport),
            }
        }
        if std::mem::take(&mut self.held_up) {
            self.run(transport);
        }
    }

    fn end(&mut self, id: u64, status: u8, transport: &mut Transport) {
        let Some(request) = self.requests.remove(&id) else { return };
        let Request { queue, chain, written, .. } = request;
        chain.scatter(&transport.memory(), chain.writable_len().saturating_sub(1), &[status]);
        Self::give_back(queue, &chain, written + 1, transport);
        transport.publish(queue);
    }

    fn give_back(queue: usize, chain: &Chain, written: usize, transport: &mut Transport) {
        if let Some((queue, memory)) = transport.queue(queue) {
            queue.push(memory, chain.head, u32::try_from(written).unwrap_or(u32::MAX));
        }
    }
}

impl VirtioDevice for VirtioBlk {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn id(&self) -> u16 {
        2
    }

    /// Mass storage, as legacy drivers and BIOSes expect it: SCSI.
    fn class(&self) -> [u8; 3] {
        [0x01, 0x00, 0x00]
    }

    fn features(&self) -> u64 {
        bit::SEG_MAX
            | bit::BLK_SIZE
            | bit::FLUSH
            | bit::CONFIG_WCE
            | bit::MQ
            | bit::WRITE_ZEROES
            | if self.read_only { bit::RO } else { 0 }
            | if self.disk.discard { bit::DISCARD } else { 0 }
    }

    fn queues(&self) -> &'static [u16] {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(60);
        config.extend_from_slice(&self.sectors.to_le_bytes());
        // No limit of a segment's size; two descriptors are the header's and the status's.
        config.extend_from_slice(&0u32.to_le_bytes());
        config.extend_from_slice(&(u32::from(QUEUES[0]) - 2).to_le_bytes());
        // Geometry: not offered.
        config.extend_from_slice(&[0; 4]);
        config.extend_from_slice(&(SECTOR as u32).to_le_bytes());
        // Topology: not offered.
        config.extend_from_slice(&[0; 8]);
        config.extend_from_slice(&[u8::from(self.writeback), 0]);
        config.extend_from_slice(&(QUEUES.len() as u16).to_le_bytes());
        for value in [MAX_DISCARD, MAX_SEGMENTS as u32, 1, MAX_ZEROES, MAX_SEGMENTS as u32] {
            config.extend_from_slice(&value.to_le_bytes());
        }
        // Write zeroes does not unmap.
        config.extend_from_slice(&[0; 4]);
        config
    }

    fn config_written(&mut self, offset: usize, data: &[u8]) {
        if let (WRITEBACK_AT, [on]) = (offset, data) {
            self.writeback = on & 1 != 0;
        }
    }

    fn activate(&mut self, transport: &mut Transport) {
        // Legacy drivers may have filled queues before they said that they are ready.
        self.run(transport);
    }

    fn notified(&mut self, queue: usize, transport: &mut Transport) {
        self.run_queue(queue, transport);
    }

    fn reset(&mut self, _transport: &mut Transport) {
        self.stale += self.requests.len();
        self.requests.clear();
        self.buffered = 0;
        self.generation += 1;
        self.writeback = true;
    }

    fn save(&self, out: &mut Writer) {
        let Self {
            disk: _,
            sectors,
            read_only,
            me: _,
            writeback,
            requests: _,
            next: _,
            buffered: _,
            stale: _,
            generation: _,
            held_up: _,
        } = self;
        if !self.is_idle() {
            tracing::error!(target: "virtio-blk", "saved while a disk request is under way: the state cannot be restored");
        }
        out.put_u64(*sectors);
        out.put_bool(*read_only);
        out.put_bool(*writeback);
    }

    fn load(&mut self, input: &mut Reader<'_>) -> Result<(), Error> {
        let (sectors, read_only) = (input.take_u64()?, input.take_bool()?);
        if (sectors, read_only) != (self.sectors, self.read_only) {
            return Err(input.invalid("the machine has another disk than the saved state"));
        }
        self.writeback = input.take_bool()?;
        Ok(())
    }
}
