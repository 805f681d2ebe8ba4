//! A logical unit: a disk or a CD drive, and what each command means to it. Sources: SPC-3, SBC-3.
//!
//! A command either ends at once or becomes a [`Job`], which asks the medium piece by piece ([`Job::next`]). Nothing here waits.
//!
//! **As in VirtualBox**, START STOP UNIT does not stop a disk; reservations are granted, as there is one initiator. The write cache can
//! be switched off by MODE SELECT: every write is then made durable before it ends.

use std::collections::VecDeque;

use pdm::connector::{BlockOp, Medium};
use pgm::Pgm;
use ssm::{Error, Reader, Writer};

use super::cd::{self, Answer, CD_SECTOR, CdMedium, CdState, be16, be32};
use super::inquiry::{self, MAX_TRANSFER, MAX_UNMAP, MAX_UNMAP_RANGES, Product};
use super::sense::{Alerts, Sense};
use super::sg::SgList;
use crate::ide::{Drive, Geometry};

/// Bytes in a block of a disk.
pub(crate) const BLOCK: u64 = 512;
/// Bytes of one request to the medium at most.
const CHUNK: u64 = 1 << 20;
/// Bytes of parameter data that a command may bring at most.
const MAX_PARAMETERS: usize = 8 + 16 * MAX_UNMAP_RANGES as usize;

/// Header of standard INQUIRY data of a disk: SPC-3, commands are queued.
const DISK_HEADER: [u8; 8] = [0, 0, 5, 2, 31, 0, 0, 2];
/// The same of a CD drive: removable.
const CD_HEADER: [u8; 8] = [5, 0x80, 5, 2, 31, 0, 0, 2];
/// What is told of logical units that do not exist.
const ABSENT: u8 = 0x7f;

/// Operation codes beside those of CD drives.
mod op {
    pub(super) use super::cd::op::*;
    pub(super) const REZERO_UNIT: u8 = 0x01;
    pub(super) const READ_6: u8 = 0x08;
    pub(super) const WRITE_6: u8 = 0x0a;
    pub(super) const MODE_SELECT_6: u8 = 0x15;
    pub(super) const RESERVE_6: u8 = 0x16;
    pub(super) const RELEASE_6: u8 = 0x17;
    pub(super) const SEND_DIAGNOSTIC: u8 = 0x1d;
    pub(super) const WRITE_10: u8 = 0x2a;
    pub(super) const WRITE_VERIFY_10: u8 = 0x2e;
    pub(super) const VERIFY_10: u8 = 0x2f;
    pub(super) const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub(super) const WRITE_SAME_10: u8 = 0x41;
    pub(super) const UNMAP: u8 = 0x42;
    pub(super) const MODE_SELECT_10: u8 = 0x55;
    pub(super) const RESERVE_10: u8 = 0x56;
    pub(super) const RELEASE_10: u8 = 0x57;
    pub(super) const READ_16: u8 = 0x88;
    pub(super) const WRITE_16: u8 = 0x8a;
    pub(super) const WRITE_VERIFY_16: u8 = 0x8e;
    pub(super) const VERIFY_16: u8 = 0x8f;
    pub(super) const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub(super) const WRITE_SAME_16: u8 = 0x93;
    pub(super) const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub(super) const WRITE_12: u8 = 0xaa;
    pub(super) const WRITE_VERIFY_12: u8 = 0xae;
    pub(super) const VERIFY_12: u8 = 0xaf;
}

/// A command descriptor block, padded with zeros.
pub(crate) type Cdb = [u8; 16];

/// A command's data in guest memory.
pub(crate) struct Buffers<'a> {
    pub(crate) memory: &'a Pgm,
    /// What the unit reads.
    pub(crate) out: &'a SgList,
    /// What the unit writes.
    pub(crate) into: &'a SgList,
}

impl Buffers<'_> {
    /// Parameter data of `len` bytes; too short a list, or more than any command has, is none.
    fn parameters(&self, len: usize) -> Option<Vec<u8>> {
        if len > MAX_PARAMETERS || self.out.len() < len as u64 {
            return None;
        }
        let mut bytes = vec![0; len];
        self.out.read(self.memory, 0, &mut bytes);
        Some(bytes)
    }
}

/// What a command leads to.
#[derive(Debug)]
pub(crate) enum Plan {
    Good,
    Data(Vec<u8>),
    Fail(Sense),
    Work(Job),
}

/// A command that needs the medium. Offsets and lengths are in bytes on the medium.
#[derive(Debug)]
pub(crate) enum Job {
    /// `raw`: the host gets 2352 bytes for each sector.
    Read {
        next: u64,
        left: u64,
        raw: bool,
    },
    Write {
        next: u64,
        left: u64,
        /// The data must be durable before the command ends.
        durable: bool,
    },
    /// `compare`: with the host's data.
    Verify {
        next: u64,
        left: u64,
        compare: bool,
    },
    /// The same block over and over.
    Fill {
        next: u64,
        left: u64,
        block: Vec<u8>,
    },
    Discard {
        ranges: VecDeque<(u64, u64)>,
    },
    Flush,
    /// All is asked; the command ends with the answer.
    Last,
}

impl Job {
    /// Whether data go between host and medium; else those of the host were parameters.
    pub(crate) fn moves_data(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Write { .. } | Self::Verify { .. })
    }

    /// The next request for the medium; none if the command has ended well. `moved` is how many bytes of the host's data have been
    /// used up.
    pub(crate) fn next(&mut self, host: &Buffers<'_>, moved: &mut u64) -> Option<BlockOp> {
        let take = |next: &mut u64, left: &mut u64| {
            let (offset, len) = (*next, (*left).min(CHUNK));
            *next += len;
            *left -= len;
            (offset, len)
        };
        match self {
            Self::Read { left: 0, .. }
            | Self::Verify { left: 0, .. }
            | Self::Fill { left: 0, .. }
            | Self::Last => None,
            Self::Write { left: 0, durable: false, .. } => None,
            Self::Write { left: 0, durable: true, .. } | Self::Flush => {
                *self = Self::Last;
                Some(BlockOp::Flush)
            }
            Self::Read { next, left, .. } | Self::Verify { next, left, .. } => {
                let (offset, len) = take(next, left);
                Some(BlockOp::Read { offset, buffer: vec![0; len as usize] })
            }
            Self::Write { next, left, .. } => {
                let (offset, len) = take(next, left);
                let mut buffer = vec![0; len as usize];
                *moved += host.out.read(host.memory, *moved, &mut buffer) as u64;
                Some(BlockOp::Write { offset, buffer })
            }
            Self::Fill { next, left, block } => {
                let (offset, len) = take(next, left);
                Some(BlockOp::Write { offset, buffer: block.repeat(len as usize / block.len().max(1)) })
            }
            Self::Discard { ranges } => {
                let (offset, len) = ranges.pop_front()?;
                Some(BlockOp::Discard { offset, len })
            }
        }
    }

    /// Takes what the medium gave for the last request.
    pub(crate) fn take(&self, host: &Buffers<'_>, moved: &mut u64, data: &[u8]) -> Result<(), Sense> {
        match self {
            Self::Read { next, raw: true, .. } => {
                let first = (next - data.len() as u64) / CD_SECTOR;
                let sectors = cd::raw_sectors(first as u32, data);
                *moved += host.into.write(host.memory, *moved, &sectors) as u64;
            }
            Self::Read { .. } => *moved += host.into.write(host.memory, *moved, data) as u64,
            Self::Verify { compare: true, .. } => {
                let mut theirs = vec![0; data.len()];
                *moved += host.out.read(host.memory, *moved, &mut theirs) as u64;
                if theirs != data {
                    return Err(Sense::MISCOMPARE);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What it means that the medium failed.
    pub(crate) fn failure(&self) -> Sense {
        match self {
            Self::Read { .. } | Self::Verify { .. } => Sense::READ_ERROR,
            _ => Sense::WRITE_ERROR,
        }
    }
}

/// What of a disk never changes.
struct Disk {
    blocks: u64,
    read_only: bool,
    non_rotational: bool,
    discard: bool,
    geometry: Geometry,
}

/// What a guest can see of a unit. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) alerts: Alerts,
    pub(crate) cd: CdState,
    /// Writes end before they are durable.
    write_cache: bool,
}

impl State {
    fn power_on() -> Self {
        Self { alerts: Alerts::NONE, cd: CdState::power_on(), write_cache: true }
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let Self {
            alerts: Alerts { sense, attention },
            cd: CdState { locked, tray_open, event },
            write_cache,
        } = self;
        sense.save(out);
        attention.save(out);
        [*locked, *tray_open, *write_cache].into_iter().for_each(|flag| out.put_bool(flag));
        out.put_u8(*event);
    }

    pub(crate) fn load(input: &mut Reader<'_>) -> Result<Self, Error> {
        let alerts = Alerts { sense: Sense::load(input)?, attention: Sense::load(input)? };
        let (locked, tray_open, write_cache) = (input.take_bool()?, input.take_bool()?, input.take_bool()?);
        Ok(Self { alerts, cd: CdState { locked, tray_open, event: input.take_u8()? }, write_cache })
    }
}

/// A disk or CD drive with what is in it.
pub(crate) struct Unit {
    vendor: String,
    product: String,
    revision: String,
    serial: String,
    /// None for a CD drive.
    disk: Option<Disk>,
    pub(crate) medium: Medium,
    pub(crate) state: State,
}

impl Unit {
    pub(crate) fn new(drive: Drive) -> Self {
        let state = State::power_on();
        match drive {
            Drive::Disk { identity, medium } => {
                let blocks = medium.size().0 / BLOCK;
                let (vendor, product) = identity.model.split_once(' ').unwrap_or(("", &identity.model));
                Self {
                    vendor: vendor.to_owned(),
                    product: product.to_owned(),
                    revision: identity.firmware.clone(),
                    serial: identity.serial.clone(),
                    disk: Some(Disk {
                        blocks,
                        read_only: medium.is_read_only(),
                        non_rotational: identity.non_rotational,
                        discard: identity.discard,
                        geometry: identity.geometry(blocks),
                    }),
                    medium: Some(medium),
                    state,
                }
            }
            Drive::Cd { identity, medium } => Self {
                vendor: identity.vendor,
                product: identity.product,
                revision: identity.revision,
                serial: identity.serial,
                disk: None,
                medium,
                state,
            },
        }
    }

    pub(crate) fn is_cd(&self) -> bool {
        self.disk.is_none()
    }

    /// Whether the guest has opened the tray with a disc in it: the disc is to be let go.
    pub(crate) fn has_ejected(&self) -> bool {
        self.is_cd() && self.state.cd.tray_open && self.medium.is_some()
    }

    /// The host puts another disc in, or takes it out.
    pub(crate) fn set_disc(&mut self, medium: Medium) {
        self.state.cd.medium_changed(medium.is_some());
        if medium.is_some() {
            self.state.alerts.attention = Sense::MEDIUM_CHANGED;
        }
        self.medium = medium;
    }

    /// Power-on and system reset.
    pub(crate) fn power_on(&mut self) {
        self.state = State::power_on();
    }

    /// Reset by the bus or a task management function.
    pub(crate) fn reset(&mut self) {
        self.state = State {
            alerts: Alerts { sense: Sense::NONE, attention: Sense::RESET },
            cd: CdState { locked: false, ..self.state.cd },
            write_cache: true,
        };
    }

    /// Ends a command: what REQUEST SENSE will tell.
    pub(crate) fn ended(&mut self, operation: u8, sense: Sense) {
        if !matches!(operation, op::INQUIRY | op::REPORT_LUNS) || sense != Sense::NONE {
            self.state.alerts.sense = sense;
        }
    }

    /// Begins a command to this unit.
    pub(crate) fn start(&mut self, cdb: &Cdb, host: &Buffers<'_>) -> Plan {
        if let Err(attention) = self.state.alerts.admit(cdb[0]) {
            return Plan::Fail(attention);
        }
        match cdb[0] {
            op::INQUIRY => self.inquiry(cdb),
            op::REQUEST_SENSE => request_sense(self.state.alerts.report(), cdb),
            op::REPORT_LUNS => report_luns(cdb),
            op::RESERVE_6 | op::RELEASE_6 | op::RESERVE_10 | op::RELEASE_10 => Plan::Good,
            _ => match &self.disk {
                Some(disk) => disk.start(&mut self.state, cdb, host),
                None => self.start_cd(cdb, host),
            },
        }
    }

    /// Begins a command to a unit that this target does not have.
    pub(crate) fn start_absent(cdb: &Cdb) -> Plan {
        match cdb[0] {
            op::INQUIRY => {
                data(inquiry::standard([ABSENT, 0, 5, 2, 31, 0, 0, 0], "", "", ""), be16(&cdb[3..]).into())
            }
            op::REQUEST_SENSE => request_sense(Sense::NO_SUCH_UNIT, cdb),
            op::REPORT_LUNS => report_luns(cdb),
            _ => Plan::Fail(Sense::NO_SUCH_UNIT),
        }
    }

    fn inquiry(&self, cdb: &Cdb) -> Plan {
        let room = be16(&cdb[3..]).into();
        let kind = if self.is_cd() { 5 } else { 0 };
        match (cdb[1] & 1 != 0, cdb[2]) {
            (false, 0) => {
                let header = if self.is_cd() { CD_HEADER } else { DISK_HEADER };
                data(inquiry::standard(header, &self.vendor, &self.product, &self.revision), room)
            }
            (true, number) => {
                let product = Product {
                    kind,
                    vendor: &self.vendor,
                    product: &self.product,
                    serial: &self.serial,
                    disk: self.disk.as_ref().map(|d| (!d.non_rotational, d.discard)),
                };
                inquiry::page(number, &product)
                    .map_or(Plan::Fail(Sense::INVALID_FIELD), |page| data(page, room))
            }
            _ => Plan::Fail(Sense::INVALID_FIELD),
        }
    }

    fn start_cd(&mut self, cdb: &Cdb, host: &Buffers<'_>) -> Plan {
        let medium = CdMedium::of(&self.medium);
        let Some(packet) = cdb.first_chunk::<12>() else { return Plan::Fail(Sense::INVALID_COMMAND) };
        match cd::command(&mut self.state.cd, medium, packet) {
            Answer::Done => Plan::Good,
            Answer::Data(bytes) => Plan::Data(bytes),
            Answer::Fail(sense) => Plan::Fail(sense),
            Answer::Read { first, count, raw } => {
                let left = u64::from(count) * CD_SECTOR;
                Plan::Work(Job::Read {
                    next: u64::from(first) * CD_SECTOR,
                    left: fitting(left, CD_SECTOR, host),
                    raw,
                })
            }
        }
    }
}

/// What of `left` bytes the host has room for, in whole blocks.
fn fitting(left: u64, block: u64, host: &Buffers<'_>) -> u64 {
    left.min(host.into.len().next_multiple_of(block))
}

fn data(mut bytes: Vec<u8>, room: usize) -> Plan {
    bytes.truncate(room);
    Plan::Data(bytes)
}

fn request_sense(sense: Sense, cdb: &Cdb) -> Plan {
    let bytes = if cdb[1] & 1 == 0 { sense.fixed().to_vec() } else { sense.descriptor().to_vec() };
    data(bytes, cdb[4].into())
}

/// One unit, number 0.
fn report_luns(cdb: &Cdb) -> Plan {
    let mut bytes = vec![0; 16];
    match cdb[2] {
        0 | 2 => bytes[3] = 8,
        // Well-known units: none.
        1 => bytes.truncate(8),
        _ => return Plan::Fail(Sense::INVALID_FIELD),
    }
    data(bytes, be32(&cdb[6..]) as usize)
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from(be32(bytes)) << 32 | u64::from(be32(&bytes[4..]))
}

/// First block and number of blocks of a command.
fn range(cdb: &Cdb) -> (u64, u64) {
    match cdb[0] >> 5 {
        0 => {
            let first = u32::from_be_bytes([0, cdb[1] & 0x1f, cdb[2], cdb[3]]);
            let count = if cdb[4] == 0 { 256 } else { u64::from(cdb[4]) };
            (first.into(), count)
        }
        4 => (be64(&cdb[2..]), be32(&cdb[10..]).into()),
        5 => (be32(&cdb[2..]).into(), be32(&cdb[6..]).into()),
        _ => (be32(&cdb[2..]).into(), be16(&cdb[7..]).into()),
    }
}

impl Disk {
    fn start(&self, state: &mut State, cdb: &Cdb, host: &Buffers<'_>) -> Plan {
        match cdb[0] {
            op::TEST_UNIT_READY | op::REZERO_UNIT | op::SEEK | op::PREVENT_ALLOW => Plan::Good,
            op::SEND_DIAGNOSTIC if cdb[1] & 4 != 0 => Plan::Good,
            // Flushes, so that a guest that stops its disk finds all of it there.
            op::START_STOP_UNIT if !self.read_only => Plan::Work(Job::Flush),
            op::START_STOP_UNIT => Plan::Good,
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 if self.read_only => Plan::Good,
            op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => Plan::Work(Job::Flush),
            op::READ_CAPACITY => {
                let last = self.blocks.saturating_sub(1);
                let mut bytes = u32::try_from(last).unwrap_or(u32::MAX).to_be_bytes().to_vec();
                bytes.extend_from_slice(&(BLOCK as u32).to_be_bytes());
                Plan::Data(bytes)
            }
            op::SERVICE_ACTION_IN_16 if cdb[1] & 0x1f == 0x10 => {
                let mut bytes = self.blocks.saturating_sub(1).to_be_bytes().to_vec();
                bytes.extend_from_slice(&(BLOCK as u32).to_be_bytes());
                bytes.resize(32, 0);
                // Ranges can be given up; what is then read of them is not told.
                bytes[14] = u8::from(self.discard) << 7;
                data(bytes, be32(&cdb[10..]) as usize)
            }
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => self.mode_sense(state, cdb),
            op::MODE_SELECT_6 | op::MODE_SELECT_10 => self.mode_select(state, cdb, host),
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => self.on_range(cdb, |next, left| {
                Plan::Work(Job::Read { next, left: fitting(left, BLOCK, host), raw: false })
            }),
            op::WRITE_6
            | op::WRITE_10
            | op::WRITE_12
            | op::WRITE_16
            | op::WRITE_VERIFY_10
            | op::WRITE_VERIFY_12
            | op::WRITE_VERIFY_16 => {
                // Force unit access: not in the six-byte command, and what is verified has to be there.
                let verified =
                    matches!(cdb[0], op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16);
                let durable = verified || cdb[0] != op::WRITE_6 && cdb[1] & 8 != 0 || !state.write_cache;
                self.on_range(cdb, |next, left| {
                    if self.read_only {
                        Plan::Fail(Sense::WRITE_PROTECTED)
                    } else if host.out.len() < left {
                        Plan::Fail(Sense::INVALID_FIELD)
                    } else {
                        Plan::Work(Job::Write { next, left, durable })
                    }
                })
            }
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => {
                self.on_range(cdb, |next, left| match cdb[1] >> 1 & 3 {
                    0 => Plan::Work(Job::Verify { next, left, compare: false }),
                    1 if host.out.len() >= left => Plan::Work(Job::Verify { next, left, compare: true }),
                    _ => Plan::Fail(Sense::INVALID_FIELD),
                })
            }
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => self.write_same(cdb, host),
            op::UNMAP if self.discard => self.unmap(cdb, host),
            _ => Plan::Fail(Sense::INVALID_COMMAND),
        }
    }

    /// Leads to `plan` with offset and length in bytes if the command's range is on the disk.
    fn on_range(&self, cdb: &Cdb, plan: impl FnOnce(u64, u64) -> Plan) -> Plan {
        let (first, count) = range(cdb);
        if first > self.blocks || count > self.blocks - first {
            return Plan::Fail(Sense::OUT_OF_RANGE);
        }
        if count == 0 {
            return Plan::Good;
        }
        plan(first * BLOCK, count * BLOCK)
    }

    fn write_same(&self, cdb: &Cdb, host: &Buffers<'_>) -> Plan {
        let (_, count) = range(cdb);
        let (unmap, no_data) = (cdb[1] & 8 != 0, cdb[0] == op::WRITE_SAME_16 && cdb[1] & 1 != 0);
        if self.read_only {
            return Plan::Fail(Sense::WRITE_PROTECTED);
        }
        if count == 0 || count > MAX_UNMAP.into() || unmap && !self.discard || cdb[1] & 0xe6 != 0 {
            return Plan::Fail(Sense::INVALID_FIELD);
        }
        let block = match no_data {
            true => Some(vec![0; BLOCK as usize]),
            false => host.parameters(BLOCK as usize),
        };
        let Some(block) = block else { return Plan::Fail(Sense::INVALID_FIELD) };
        // What a given-up range reads as is not told, so any data may be given up.
        self.on_range(cdb, |next, left| match unmap {
            true => Plan::Work(Job::Discard { ranges: [(next, left)].into() }),
            false => Plan::Work(Job::Fill { next, left, block }),
        })
    }

    fn unmap(&self, cdb: &Cdb, host: &Buffers<'_>) -> Plan {
        let len = usize::from(be16(&cdb[7..]));
        if self.read_only {
            return Plan::Fail(Sense::WRITE_PROTECTED);
        }
        if len == 0 {
            return Plan::Good;
        }
        let Some(list) = host.parameters(len) else { return Plan::Fail(Sense::INVALID_FIELD) };
        if len < 8 {
            return Plan::Fail(Sense::PARAMETER_LIST_LENGTH);
        }
        let described = usize::from(be16(&list[2..])).min(len - 8);
        let mut ranges = VecDeque::new();
        for entry in list[8..8 + described].chunks_exact(16) {
            let (first, count) = (be64(entry), u64::from(be32(&entry[8..])));
            if first > self.blocks || count > self.blocks - first {
                return Plan::Fail(Sense::OUT_OF_RANGE);
            }
            if count > 0 {
                ranges.push_back((first * BLOCK, count * BLOCK));
            }
        }
        Plan::Work(Job::Discard { ranges })
    }

    fn mode_sense(&self, state: &State, cdb: &Cdb) -> Plan {
        let control = cdb[2] >> 6;
        if control == 3 {
            return Plan::Fail(Sense::SAVING_NOT_SUPPORTED);
        }
        if !matches!(cdb[3], 0 | 0xff) {
            return Plan::Fail(Sense::INVALID_FIELD);
        }
        let (wanted, short, long_block) = (cdb[2] & 0x3f, cdb[0] == op::MODE_SENSE_6, cdb[1] & 0x10 != 0);
        let mut pages = Vec::new();
        for page in [0x01u8, 0x04, 0x08, 0x0a] {
            if wanted == page || wanted == 0x3f {
                self.mode_page(page, control, state, &mut pages);
            }
        }
        if pages.is_empty() {
            return Plan::Fail(Sense::INVALID_FIELD);
        }
        // The block descriptor, unless the host does not want one.
        let mut blocks = Vec::new();
        if cdb[1] & 8 == 0 {
            if !short && long_block {
                blocks.extend_from_slice(&self.blocks.to_be_bytes());
                blocks.extend_from_slice(&[0; 4]);
            } else {
                blocks.extend_from_slice(&u32::try_from(self.blocks).unwrap_or(u32::MAX).to_be_bytes());
            }
            blocks.extend_from_slice(&(BLOCK as u32).to_be_bytes());
        }
        // Write protection; durable writes and cache bypass are understood.
        let flags = u8::from(self.read_only) << 7 | 0x10;
        let (mut bytes, room) = if short {
            let len = 3 + blocks.len() + pages.len();
            (vec![len as u8, 0, flags, blocks.len() as u8], usize::from(cdb[4]))
        } else {
            let [high, low] = ((6 + blocks.len() + pages.len()) as u16).to_be_bytes();
            (
                vec![high, low, 0, flags, u8::from(long_block), 0, 0, blocks.len() as u8],
                be16(&cdb[7..]).into(),
            )
        };
        bytes.append(&mut blocks);
        bytes.append(&mut pages);
        data(bytes, room)
    }

    /// Appends a mode page: its current or default values, or (`control` 1) which of them can be changed.
    fn mode_page(&self, page: u8, control: u8, state: &State, out: &mut Vec<u8>) {
        const WRITE_CACHE: u8 = 4;
        let mut body = match page {
            // Error recovery: as the drive likes.
            0x01 => vec![0; 10],
            // Rigid disk geometry.
            0x04 => {
                let mut body = vec![0; 22];
                body[1..3].copy_from_slice(&self.geometry.cylinders.to_be_bytes());
                body[3] = self.geometry.heads;
                body
            }
            // Caching.
            0x08 => {
                let on = match control {
                    1 => true,
                    2 => true,
                    _ => state.write_cache,
                };
                let mut body = vec![0; 18];
                body[0] = if on { WRITE_CACHE } else { 0 };
                body
            }
            // Control: commands may be carried out in any order.
            _ => vec![0, 0x10, 0, 0, 0, 0, 0xff, 0xff, 0, 0],
        };
        if control == 1 && page != 0x08 {
            body.fill(0);
        }
        out.extend_from_slice(&[page, body.len() as u8]);
        out.append(&mut body);
    }

    fn mode_select(&self, state: &mut State, cdb: &Cdb, host: &Buffers<'_>) -> Plan {
        let short = cdb[0] == op::MODE_SELECT_6;
        let len = if short { cdb[4].into() } else { usize::from(be16(&cdb[7..])) };
        // Pages in SCSI-2 format only, and nothing can be saved.
        if cdb[1] & 0x11 != 0x10 {
            return Plan::Fail(Sense::INVALID_FIELD);
        }
        if len == 0 {
            return Plan::Good;
        }
        let Some(list) = host.parameters(len) else { return Plan::Fail(Sense::INVALID_FIELD) };
        let header = if short { 4 } else { 8 };
        let blocks = match short {
            true => list.get(3).copied().map(usize::from),
            false => list.get(6..8).map(|len| be16(len).into()),
        };
        let Some(mut pages) = blocks.and_then(|blocks| list.get(header + blocks..)) else {
            return Plan::Fail(Sense::PARAMETER_LIST_LENGTH);
        };
        let mut write_cache = state.write_cache;
        while let [page, len, rest @ ..] = pages {
            let Some((body, after)) = rest.split_at_checked((*len).into()) else {
                return Plan::Fail(Sense::PARAMETER_LIST_LENGTH);
            };
            let mut current = Vec::new();
            match page & 0x3f {
                number @ (0x01 | 0x04 | 0x08 | 0x0a) => self.mode_page(number, 0, state, &mut current),
                _ => return Plan::Fail(Sense::INVALID_PARAMETER),
            }
            let mut wanted = body.to_vec();
            if page & 0x3f == 0x08 && !wanted.is_empty() {
                write_cache = wanted[0] & 4 != 0;
                wanted[0] = wanted[0] & !4 | current[2] & 4;
            }
            if current[2..] != wanted {
                return Plan::Fail(Sense::INVALID_PARAMETER);
            }
            pages = after;
        }
        let switched_off = state.write_cache && !write_cache;
        state.write_cache = write_cache;
        // What is in the cache has to leave it.
        if switched_off && !self.read_only { Plan::Work(Job::Flush) } else { Plan::Good }
    }
}

const _: () = assert!(CHUNK.is_multiple_of(BLOCK) && CHUNK.is_multiple_of(CD_SECTOR) && MAX_TRANSFER > 0);
