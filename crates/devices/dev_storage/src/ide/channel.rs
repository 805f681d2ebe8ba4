//! One IDE channel: task files of two drives, the data phase of the command at work, and the bus master's registers.
//!
//! A command is a [`Job`]; its data phase is a [`Phase`]. What needs the outside is left in the channel for the shell to
//! fetch: a request for the medium ([`Channel::take_request`]), or a DMA phase that waits for memory to be moved.

use std::collections::VecDeque;

use super::spec::{Control, DeviceHead, error, reason, status};
use super::{CdIdentity, DiskIdentity};
use crate::scsi::cd::{CdMedium, CdState};
use crate::scsi::sense::Alerts;

pub(crate) const SECTOR: u64 = 512;
/// Sectors of one PIO request to the medium.
pub(crate) const PIO_CHUNK: u32 = 256;
/// Sectors of one DMA request to the medium.
pub(crate) const DMA_CHUNK: u32 = 2048;
/// Most bytes the transfer buffer ever holds.
pub(crate) const MAX_BUFFER: usize = 1 << 20;

/// What a drive is, and what is in it.
pub(crate) enum DriveKind {
    Disk { identity: DiskIdentity, sectors: u64, read_only: bool },
    Cd { identity: CdIdentity, medium: Option<CdMedium> },
}

/// A register that remembers its content before the last write (ATA-6, 48-bit addresses).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Deep {
    pub(crate) now: u8,
    pub(crate) before: u8,
}

impl Deep {
    fn write(&mut self, value: u8) {
        *self = Self { now: value, before: self.now };
    }

    pub(crate) fn word(self) -> u16 {
        u16::from_be_bytes([self.before, self.now])
    }

    fn read(self, hob: bool) -> u8 {
        if hob { self.before } else { self.now }
    }
}

impl From<u8> for Deep {
    fn from(now: u8) -> Self {
        Self { now, before: 0 }
    }
}

/// Guest-visible state of one drive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DriveState {
    pub(crate) status: u8,
    pub(crate) error: u8,
    pub(crate) features: Deep,
    pub(crate) count: Deep,
    /// LBA low, mid, high; or sector, cylinder low, cylinder high; or -, byte count low, byte count high.
    pub(crate) lba: [Deep; 3],
    pub(crate) device: u8,
    /// INTRQ is asserted inside the drive (nIEN and selection decide what leaves it).
    pub(crate) interrupt: bool,
    /// Sectors in a block of READ/WRITE MULTIPLE; 0 while off.
    pub(crate) multiple: u8,
    /// Current translation of cylinder addresses.
    pub(crate) heads: u8,
    pub(crate) sectors_per_track: u8,
    /// Transfer mode as SET FEATURES takes it: 0x20–0x22 multiword DMA, 0x40–0x46 ultra DMA.
    pub(crate) mode: u8,
    pub(crate) write_cache: bool,
    pub(crate) look_ahead: bool,
    pub(crate) standby: bool,
    /// What a packet device has to tell.
    pub(crate) alerts: Alerts,
    pub(crate) cd: CdState,
    /// The byte count limit of the packet command at work.
    pub(crate) byte_limit: u16,
}

impl DriveState {
    pub(crate) fn power_on(kind: Option<&DriveKind>) -> Self {
        let (heads, sectors_per_track) = match kind {
            Some(DriveKind::Disk { identity, sectors, .. }) => {
                let geometry = identity.geometry(*sectors);
                (geometry.heads, geometry.sectors_per_track)
            }
            _ => (16, 63),
        };
        let mut state = Self {
            status: 0,
            error: 0,
            features: Deep::default(),
            count: Deep::default(),
            lba: [Deep::default(); 3],
            device: 0,
            interrupt: false,
            multiple: 0,
            heads,
            sectors_per_track,
            mode: 0x40,
            write_cache: true,
            look_ahead: true,
            standby: false,
            alerts: Alerts::NONE,
            cd: CdState::power_on(),
            byte_limit: 0,
        };
        state.signature(kind);
        state
    }

    /// The registers after reset and diagnostics (ATA-6 section 9.12).
    pub(crate) fn signature(&mut self, kind: Option<&DriveKind>) {
        self.error = error::DIAGNOSTIC_PASSED;
        self.count = 1.into();
        self.device &= 0x10;
        let (low, mid, high) = match kind {
            Some(DriveKind::Disk { .. }) => (1, 0, 0),
            Some(DriveKind::Cd { .. }) => (1, 0x14, 0xeb),
            None => (0, 0, 0),
        };
        self.lba = [low.into(), mid.into(), high.into()];
        // A packet device shows no DRDY until its first command.
        self.status = if matches!(kind, Some(DriveKind::Disk { .. })) { status::READY } else { 0 };
    }

    /// Byte count registers of a packet device.
    pub(crate) fn set_byte_count(&mut self, count: u16) {
        let [low, high] = count.to_le_bytes();
        self.lba[1] = low.into();
        self.lba[2] = high.into();
    }

    pub(crate) fn byte_count(&self) -> u16 {
        u16::from_le_bytes([self.lba[1].now, self.lba[2].now])
    }
}

/// How the sectors of a disk command go to or come from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sectors {
    /// The first sector not yet asked of the medium.
    pub(crate) next: u64,
    /// Sectors not yet asked of the medium.
    pub(crate) left: u32,
    /// Sectors that the medium was asked for last.
    pub(crate) chunk: u32,
    /// Sectors in one DRQ block.
    pub(crate) block: u8,
    pub(crate) dma: bool,
    /// The command gave a 48-bit address: results are told the same way.
    pub(crate) wide: bool,
}

/// The command at work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    None,
    /// One block of data that the drive made up.
    Reply,
    Read(Sectors),
    Write {
        sectors: Sectors,
        /// The data must be durable before the command ends.
        fua: bool,
    },
    Verify(Sectors),
    Flush,
    /// Ranges to discard: first sector and count. Before the data phase it holds none.
    Trim {
        ranges: VecDeque<(u64, u64)>,
    },
    /// A command packet is on its way in.
    Packet {
        dma: bool,
    },
    /// The answer of a packet command, from the drive itself.
    PacketReply {
        dma: bool,
    },
    /// Sectors of a disc.
    PacketRead {
        next: u32,
        left: u32,
        /// Give 2352 bytes for each sector instead of 2048.
        raw: bool,
        dma: bool,
    },
}

/// Where the command at work stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle,
    /// The host reads the buffer through the data port.
    PioIn,
    /// The host fills the buffer through the data port.
    PioOut,
    /// The buffer waits for the bus master to take it.
    DmaIn,
    /// The buffer waits for the bus master to fill it.
    DmaOut,
    /// A request is with the medium.
    Busy,
}

/// What to do with the medium. Offsets and lengths in bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read { offset: u64, buffer: Vec<u8> },
    Write { offset: u64, buffer: Vec<u8> },
    Flush,
    Discard { offset: u64, len: u64 },
}

/// The bus master's registers for this channel, and its place in the descriptor table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BusMaster {
    pub(crate) command: u8,
    pub(crate) status: u8,
    pub(crate) table: u32,
    /// Offset of the next descriptor.
    pub(crate) entry: u32,
    /// What is left of the current descriptor.
    pub(crate) address: u32,
    pub(crate) left: u32,
    /// The current descriptor is the last one.
    pub(crate) last: bool,
}

/// Guest-visible state of a channel. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) drives: [DriveState; 2],
    pub(crate) selected: u8,
    pub(crate) control: u8,
    /// The drive that `job` belongs to.
    pub(crate) active: u8,
    pub(crate) job: Job,
    pub(crate) phase: Phase,
    pub(crate) buffer: Vec<u8>,
    /// Bytes of the buffer that have been moved.
    pub(crate) pos: usize,
    /// End of the present DRQ block in the buffer.
    pub(crate) block_end: usize,
    pub(crate) bm: BusMaster,
}

pub(crate) struct Channel {
    pub(crate) kinds: [Option<DriveKind>; 2],
    pub(crate) state: State,
    request: Option<Request>,
}

impl Channel {
    pub(crate) fn new(kinds: [Option<DriveKind>; 2]) -> Self {
        let state = Self::power_on(&kinds);
        Self { kinds, state, request: None }
    }

    fn power_on(kinds: &[Option<DriveKind>; 2]) -> State {
        State {
            drives: [0, 1].map(|i: usize| DriveState::power_on(kinds[i].as_ref())),
            selected: 0,
            control: 0,
            active: 0,
            job: Job::None,
            phase: Phase::Idle,
            buffer: Vec::new(),
            pos: 0,
            block_end: 0,
            bm: BusMaster::default(),
        }
    }

    /// Power-on and system reset.
    pub(crate) fn reset(&mut self) {
        self.state = Self::power_on(&self.kinds);
        self.request = None;
    }

    /// The request that the shell is to hand to the medium of the drive it belongs to.
    pub(crate) fn take_request(&mut self) -> Option<(usize, Request)> {
        let request = self.request.take()?;
        Some((self.state.active.into(), request))
    }

    /// Whether the request that was taken last is still wanted.
    pub(crate) fn has_asked(&self) -> bool {
        self.state.phase == Phase::Busy && self.request.is_none()
    }

    pub(crate) fn selected(&self) -> usize {
        self.state.selected.into()
    }

    /// The drive that the job at work belongs to.
    pub(crate) fn active(&mut self) -> &mut DriveState {
        &mut self.state.drives[usize::from(self.state.active & 1)]
    }

    pub(crate) fn is_present(&self, drive: usize) -> bool {
        self.kinds[drive].is_some()
    }

    /// Level of the channel's INTRQ.
    pub(crate) fn irq_level(&self) -> bool {
        let selected = self.selected();
        self.is_present(selected)
            && self.state.drives[selected].interrupt
            && !Control::from(self.state.control).nien()
    }

    /// Reads register 1–7 of the command block. Reading the status takes the interrupt back.
    pub(crate) fn read(&mut self, register: u16) -> u8 {
        let selected = self.selected();
        if !self.is_present(selected) {
            // Device 0 answers for a missing device 1, with a status of zero; the device register tells who is selected.
            return if register == 6 && self.is_present(selected ^ 1) {
                self.state.drives[selected].device
            } else {
                0
            };
        }
        let hob = Control::from(self.state.control).hob();
        let drive = &mut self.state.drives[selected];
        match register {
            1 => drive.error,
            2 => drive.count.read(hob),
            3..=5 => drive.lba[usize::from(register) - 3].read(hob),
            6 => drive.device,
            _ => {
                drive.interrupt = false;
                drive.status
            }
        }
    }

    /// Reads the alternate status.
    pub(crate) fn alternate_status(&self) -> u8 {
        let selected = self.selected();
        if self.is_present(selected) { self.state.drives[selected].status } else { 0 }
    }

    /// Writes register 1–6 of the command block. Both drives take it.
    pub(crate) fn write(&mut self, register: u16, value: u8) {
        self.state.control = Control::from(self.state.control).with_hob(false).into();
        let selected = self.selected();
        if self.is_present(selected) && self.state.drives[selected].status & status::BSY != 0 {
            return;
        }
        for drive in &mut self.state.drives {
            match register {
                1 => drive.features.write(value),
                2 => drive.count.write(value),
                3..=5 => drive.lba[usize::from(register) - 3].write(value),
                // Bits 7 and 5 are obsolete and read as they were written.
                _ => drive.device = value,
            }
        }
        if register == 6 {
            self.state.selected = DeviceHead::from(value).dev().into();
        }
    }

    /// Writes the device control register.
    pub(crate) fn write_control(&mut self, value: u8) {
        let before = Control::from(self.state.control);
        let after = Control::from(value);
        self.state.control = value;
        if after.srst() && !before.srst() {
            self.abandon();
            for (drive, kind) in self.state.drives.iter_mut().zip(&self.kinds) {
                if kind.is_some() {
                    drive.status = status::BSY;
                }
            }
        } else if before.srst() && !after.srst() {
            self.software_reset();
        }
    }

    fn software_reset(&mut self) {
        self.state.selected = 0;
        for (index, kind) in self.kinds.iter().enumerate() {
            let drive = &mut self.state.drives[index];
            drive.device = 0;
            drive.interrupt = false;
            drive.standby = false;
            drive.multiple = 0;
            drive.signature(kind.as_ref());
        }
    }

    /// Ends the job at work without a result.
    pub(crate) fn abandon(&mut self) {
        self.request = None;
        self.state.job = Job::None;
        self.state.phase = Phase::Idle;
        self.state.buffer.clear();
        self.state.pos = 0;
        self.state.block_end = 0;
    }

    /// Takes a command.
    pub(crate) fn command(&mut self, command: u8) {
        let selected = self.selected();
        let Some(kind) = &self.kinds[selected] else { return };
        let is_cd = matches!(kind, DriveKind::Cd { .. });
        let device_reset = is_cd && command == super::spec::command::DEVICE_RESET;
        let own = usize::from(self.state.active) == selected;
        if self.state.phase == Phase::Busy && !(device_reset && own) {
            return;
        }
        if self.state.phase != Phase::Idle {
            if own && !device_reset {
                return;
            }
            // The other drive was left in the middle of a transfer.
            self.active().status = status::READY;
            self.abandon();
        }
        self.state.active = selected as u8;
        let drive = self.active();
        drive.interrupt = false;
        drive.error = 0;
        drive.status = status::READY;
        if is_cd { self.cd_command(command) } else { self.disk_command(command) }
    }

    /// Ends the job well.
    pub(crate) fn succeed(&mut self) {
        self.abandon();
        let drive = self.active();
        drive.status = status::READY;
        drive.interrupt = true;
    }

    /// Ends the job with error bits.
    pub(crate) fn fail(&mut self, bits: u8) {
        self.abandon();
        let drive = self.active();
        drive.status = status::READY | status::ERR;
        drive.error = bits;
        drive.interrupt = true;
    }

    /// Hands a request to the medium; the drive is busy until [`Channel::completed`].
    pub(crate) fn ask(&mut self, request: Request) {
        self.state.phase = Phase::Busy;
        self.active().status = status::BSY;
        self.request = Some(request);
    }

    /// A buffer of `len` bytes, reusing the transfer buffer's memory.
    pub(crate) fn take_buffer(&mut self, len: usize) -> Vec<u8> {
        debug_assert!(len <= MAX_BUFFER);
        let mut buffer = std::mem::take(&mut self.state.buffer);
        buffer.clear();
        buffer.resize(len, 0);
        buffer
    }

    /// Offers the buffer to the host by PIO in blocks of `block` bytes, the first with an interrupt.
    pub(crate) fn start_pio_in(&mut self) {
        self.state.phase = Phase::PioIn;
        self.state.pos = 0;
        self.state.block_end = 0;
        self.next_block_in();
    }

    fn next_block_in(&mut self) {
        let rest = self.state.buffer.len() - self.state.pos;
        let count = rest.min(self.block_len());
        self.state.block_end = self.state.pos + count;
        let packet = matches!(self.state.job, Job::PacketReply { .. } | Job::PacketRead { .. });
        let drive = self.active();
        drive.status = status::READY | status::DRQ;
        drive.interrupt = true;
        if packet {
            drive.count = reason::IO.into();
            drive.set_byte_count(count as u16);
        }
    }

    /// Bytes in a DRQ block of the job.
    fn block_len(&mut self) -> usize {
        match &self.state.job {
            Job::Read(sectors) | Job::Write { sectors, .. } => usize::from(sectors.block) * SECTOR as usize,
            Job::PacketReply { .. } | Job::PacketRead { .. } => {
                // An odd limit is rounded down, except for the last block; zero stands for the maximum.
                match self.active().byte_limit {
                    0 | 0xffff => 0xfffe,
                    1 => 2,
                    limit => usize::from(limit & !1),
                }
            }
            _ => usize::MAX,
        }
    }

    /// Asks the host for `len` bytes by PIO; `interrupt` unless it is a command's first block.
    pub(crate) fn start_pio_out(&mut self, len: usize, interrupt: bool) {
        let buffer = self.take_buffer(len);
        self.state.buffer = buffer;
        self.state.pos = 0;
        self.state.phase = Phase::PioOut;
        self.next_block_out(interrupt);
    }

    fn next_block_out(&mut self, interrupt: bool) {
        let rest = self.state.buffer.len() - self.state.pos;
        let count = rest.min(self.block_len());
        self.state.block_end = self.state.pos + count;
        let drive = self.active();
        drive.status = status::READY | status::DRQ;
        drive.interrupt |= interrupt;
    }

    pub(crate) fn start_dma(&mut self, phase: Phase) {
        self.state.phase = phase;
        self.state.pos = 0;
        self.state.block_end = 0;
        self.active().status = status::READY | status::DRQ;
    }

    /// Moves bytes to the host in accesses of `width` bytes. What the drive does not have reads as zeros.
    pub(crate) fn data_read(&mut self, width: usize, mut out: &mut [u8]) {
        while !out.is_empty() {
            if self.state.phase != Phase::PioIn || self.state.active != self.state.selected {
                out.fill(0);
                return;
            }
            let State { buffer, pos, block_end, .. } = &mut self.state;
            let have = *block_end - *pos;
            // An access that is wider than what is left of the block does not reach into the next one.
            let taken = out.len().min(have.next_multiple_of(width));
            let (now, rest) = out.split_at_mut(taken);
            let count = taken.min(have);
            now[..count].copy_from_slice(&buffer[*pos..*pos + count]);
            now[count..].fill(0);
            *pos += count;
            out = rest;
            if self.state.pos == self.state.block_end {
                if self.state.pos < self.state.buffer.len() {
                    self.next_block_in();
                } else {
                    self.data_in_done();
                }
            }
        }
    }

    /// Moves bytes from the host in accesses of `width` bytes.
    pub(crate) fn data_write(&mut self, width: usize, mut data: &[u8]) {
        while !data.is_empty() {
            if self.state.phase != Phase::PioOut || self.state.active != self.state.selected {
                return;
            }
            let State { buffer, pos, block_end, .. } = &mut self.state;
            let room = *block_end - *pos;
            let (now, rest) = data.split_at(data.len().min(room.next_multiple_of(width)));
            let count = now.len().min(room);
            buffer[*pos..*pos + count].copy_from_slice(&now[..count]);
            *pos += count;
            data = rest;
            if *pos == *block_end {
                if *pos < buffer.len() {
                    self.next_block_out(true);
                } else {
                    self.data_out_done();
                }
            }
        }
    }

    /// The bus master took the whole buffer, or filled it.
    pub(crate) fn dma_done(&mut self) {
        match self.state.phase {
            Phase::DmaIn => self.data_in_done(),
            Phase::DmaOut => self.data_out_done(),
            _ => {}
        }
    }

    /// The bus master's descriptors ended before the transfer: the command ends without an interrupt, as chips do it.
    pub(crate) fn dma_short(&mut self) {
        self.abandon();
        self.active().status = status::READY;
    }

    /// The host has taken the whole buffer.
    fn data_in_done(&mut self) {
        let (left, dma) = match &self.state.job {
            Job::Read(sectors) => (sectors.left, sectors.dma),
            Job::PacketRead { left, .. } => {
                let left = *left;
                return if left > 0 { self.cd_read_next() } else { self.packet_succeed() };
            }
            Job::PacketReply { .. } => return self.packet_succeed(),
            _ => (0, false),
        };
        if left > 0 {
            self.disk_read_next();
        } else if dma {
            self.succeed();
        } else {
            // The last block of a PIO read ends the command without another interrupt.
            self.abandon();
            self.active().status = status::READY;
        }
    }

    /// The host has filled the whole buffer.
    fn data_out_done(&mut self) {
        match &self.state.job {
            Job::Packet { dma } => {
                let dma = *dma;
                let mut packet = [0; 12];
                packet.copy_from_slice(&self.state.buffer[..12]);
                self.packet_command(packet, dma);
            }
            Job::Write { .. } => self.disk_write_chunk(),
            Job::Trim { .. } => self.disk_trim_ranges(),
            _ => self.abandon(),
        }
    }

    /// The medium has answered. `Err` is a failure of the medium; buffers come back with `Ok`.
    pub(crate) fn completed(&mut self, result: Result<Vec<u8>, ()>) {
        if self.state.phase != Phase::Busy {
            return;
        }
        if matches!(self.state.job, Job::PacketRead { .. }) {
            self.cd_completed(result);
        } else {
            self.disk_completed(result);
        }
    }
}
