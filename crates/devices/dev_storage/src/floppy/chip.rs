//! The chip: registers, command, execution and result phases. It takes no lock and does no I/O; requests for
//! the medium and DMA phases are left for the shell.

use super::spec::{
    CONFIGURE_IMPLIED_SEEK, CONFIGURE_NO_FIFO, CONFIGURE_NO_POLL, Command, Dor, MediaGeometry, Msr, PART_ID,
    VERSION, st0, st1, st2, st3,
};

pub(crate) const SECTOR: usize = 512;
/// Sector size code of 512 bytes.
const N_512: u8 = 2;
/// Longest command (RESTORE) and longest result (SAVE).
pub(crate) const FIFO: usize = 17;
/// Most bytes of a transfer at once: one track.
pub(crate) const MAX_BUFFER: usize = 256 * SECTOR;

/// Where the controller stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Held in reset by the DOR.
    Reset,
    /// Takes command bytes.
    Command,
    /// A request is with the medium.
    Busy,
    /// The buffer waits for the DMA channel to take it.
    DmaIn,
    /// The buffer waits for the DMA channel to fill it.
    DmaOut,
    /// The host reads the buffer through the FIFO.
    PioIn,
    /// The host fills the buffer through the FIFO.
    PioOut,
    /// The host reads the result bytes.
    Result,
}

/// What a transfer does with the sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    ReadDeleted,
    Write,
    /// Reads without giving the data to the host; ends after so many sectors, or at the end of the track.
    Verify {
        left: Option<u8>,
    },
    Format {
        fill: u8,
    },
}

/// A transfer at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) kind: Kind,
    pub(crate) drive: u8,
    /// Go on with head 1 after head 0.
    pub(crate) multi_track: bool,
    /// Address of the sector at work; told to the host at the end.
    pub(crate) cylinder: u8,
    pub(crate) head: u8,
    pub(crate) sector: u8,
    /// The last sector of a track.
    pub(crate) last: u8,
    /// Terminal count came: nothing follows what is at work.
    pub(crate) ending: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DriveState {
    pub(crate) track: u8,
    /// The disk change line: a medium was put in or taken out since the head last moved.
    pub(crate) changed: bool,
    /// What SENSE INTERRUPT has to tell about the drive.
    pub(crate) sense: Option<u8>,
}

/// Guest-visible state. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) dor: u8,
    pub(crate) tape: u8,
    /// Data rate code.
    pub(crate) rate: u8,
    pub(crate) phase: Phase,
    /// Command bytes taken, or result bytes to give.
    pub(crate) fifo: [u8; FIFO],
    pub(crate) fifo_len: u8,
    pub(crate) fifo_pos: u8,
    /// The interrupt output inside the chip.
    pub(crate) interrupt: bool,
    pub(crate) drives: [DriveState; 4],
    /// SPECIFY: step rate and head unload time, head load time.
    pub(crate) specify: [u8; 2],
    /// SPECIFY: transfers do without DMA.
    pub(crate) non_dma: bool,
    /// CONFIGURE.
    pub(crate) configure: u8,
    pub(crate) precompensation: u8,
    pub(crate) lock: bool,
    pub(crate) perpendicular: u8,
    pub(crate) transfer: Option<Transfer>,
    pub(crate) buffer: Vec<u8>,
    pub(crate) pos: u32,
}

/// A drive and what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DriveFacts {
    pub(crate) present: bool,
    pub(crate) medium: Option<MediumFacts>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MediumFacts {
    pub(crate) geometry: MediaGeometry,
    pub(crate) read_only: bool,
}

/// What to do with the medium of a drive. Offsets in bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read { offset: u64, buffer: Vec<u8> },
    Write { offset: u64, buffer: Vec<u8> },
}

pub(crate) struct Chip {
    pub(crate) facts: [DriveFacts; 4],
    pub(crate) state: State,
    request: Option<Request>,
}

impl State {
    pub(crate) fn power_on() -> Self {
        Self {
            // Out of reset, as the BIOS of a PC finds it.
            dor: Dor::new().with_not_reset(true).with_gate(true).into(),
            tape: 0,
            rate: 2,
            phase: Phase::Command,
            fifo: [0; FIFO],
            fifo_len: 0,
            fifo_pos: 0,
            interrupt: false,
            drives: [DriveState { track: 0, changed: true, sense: None }; 4],
            specify: [0; 2],
            non_dma: false,
            configure: CONFIGURE_NO_FIFO,
            precompensation: 0,
            lock: false,
            perpendicular: 0,
            transfer: None,
            buffer: Vec::new(),
            pos: 0,
        }
    }
}

impl Chip {
    pub(crate) fn new(facts: [DriveFacts; 4]) -> Self {
        Self { facts, state: State::power_on(), request: None }
    }

    pub(crate) fn reset(&mut self) {
        self.state = State::power_on();
        self.request = None;
    }

    /// The request that the shell is to hand to the medium of the drive given.
    pub(crate) fn take_request(&mut self) -> Option<(usize, Request)> {
        let drive = self.state.transfer?.drive;
        Some((drive.into(), self.request.take()?))
    }

    /// Whether the request that was taken last is still wanted.
    pub(crate) fn has_asked(&self) -> bool {
        self.state.phase == Phase::Busy && self.request.is_none()
    }

    pub(crate) fn irq_level(&self) -> bool {
        self.state.interrupt && Dor::from(self.state.dor).gate()
    }

    pub(crate) fn medium_changed(&mut self, drive: usize, medium: Option<MediumFacts>) {
        self.facts[drive].medium = medium;
        self.state.drives[drive].changed = true;
    }

    /// Main status register.
    pub(crate) fn msr(&self) -> u8 {
        let busy = Msr::new().with_command_busy(true);
        match self.state.phase {
            Phase::Reset => Msr::new(),
            Phase::Command => Msr::new().with_request(true).with_command_busy(self.state.fifo_len > 0),
            Phase::Busy | Phase::DmaIn | Phase::DmaOut => busy,
            Phase::PioIn => busy.with_request(true).with_to_host(true).with_non_dma(true),
            Phase::PioOut => busy.with_request(true).with_non_dma(true),
            Phase::Result => busy.with_request(true).with_to_host(true),
        }
        .into()
    }

    /// Status register A: interrupt pending, and no second drive's signal (active low).
    pub(crate) fn sra(&self) -> u8 {
        u8::from(self.state.interrupt) << 7 | 0x40
    }

    /// Status register B: motors and the selected drive.
    pub(crate) fn srb(&self) -> u8 {
        let dor = Dor::from(self.state.dor);
        0xc0 | dor.motors() & 3 | (dor.drive() & 1) << 5
    }

    /// Digital input register: the disk change line of the selected drive, if its motor is on.
    pub(crate) fn dir(&self) -> u8 {
        let dor = Dor::from(self.state.dor);
        let drive = usize::from(dor.drive());
        let changed = self.state.drives[drive].changed || self.facts[drive].medium.is_none();
        u8::from(changed && dor.motors() & 1 << drive != 0) << 7
    }

    pub(crate) fn write_dor(&mut self, value: u8) {
        let before = Dor::from(self.state.dor);
        let after = Dor::from(value);
        self.state.dor = value;
        if !after.not_reset() {
            self.enter_reset();
        } else if !before.not_reset() {
            self.leave_reset();
        }
    }

    /// Data rate select register.
    pub(crate) fn write_dsr(&mut self, value: u8) {
        self.state.rate = value & 3;
        if value & 0x80 != 0 && self.state.phase != Phase::Reset {
            self.enter_reset();
            self.leave_reset();
        }
    }

    fn enter_reset(&mut self) {
        self.request = None;
        let s = &mut self.state;
        s.phase = Phase::Reset;
        s.interrupt = false;
        s.transfer = None;
        s.buffer.clear();
        (s.pos, s.fifo_len, s.fifo_pos) = (0, 0, 0);
        for drive in &mut s.drives {
            drive.sense = None;
        }
        if !s.lock {
            s.configure = s.configure & CONFIGURE_IMPLIED_SEEK | CONFIGURE_NO_FIFO;
            s.precompensation = 0;
        }
        s.perpendicular &= 0x3c;
    }

    fn leave_reset(&mut self) {
        self.state.phase = Phase::Command;
        // Polling finds that each drive's ready line has changed.
        if self.state.configure & CONFIGURE_NO_POLL == 0 {
            for (number, drive) in self.state.drives.iter_mut().enumerate() {
                drive.sense = Some(st0::POLLED | number as u8);
            }
            self.state.interrupt = true;
        }
    }

    /// The host reads the data register.
    pub(crate) fn read_fifo(&mut self) -> u8 {
        match self.state.phase {
            Phase::PioIn => {
                let s = &mut self.state;
                s.interrupt = false;
                let byte = s.buffer.get(s.pos as usize).copied().unwrap_or(0);
                s.pos += 1;
                if s.pos as usize >= s.buffer.len() {
                    let moved = s.buffer.len();
                    self.moved(moved, false);
                }
                byte
            }
            Phase::Result => {
                let s = &mut self.state;
                s.interrupt = false;
                let byte = s.fifo[usize::from(s.fifo_pos) % FIFO];
                s.fifo_pos += 1;
                if s.fifo_pos >= s.fifo_len {
                    self.await_command();
                }
                byte
            }
            _ => 0,
        }
    }

    /// The host writes the data register.
    pub(crate) fn write_fifo(&mut self, value: u8) {
        match self.state.phase {
            Phase::PioOut => {
                let s = &mut self.state;
                s.interrupt = false;
                if let Some(slot) = s.buffer.get_mut(s.pos as usize) {
                    *slot = value;
                }
                s.pos += 1;
                if s.pos as usize >= s.buffer.len() {
                    let moved = s.buffer.len();
                    self.moved(moved, false);
                }
            }
            Phase::Command => {
                let s = &mut self.state;
                s.fifo[usize::from(s.fifo_len) % FIFO] = value;
                s.fifo_len += 1;
                let command = Command::decode(s.fifo[0]);
                if usize::from(s.fifo_len) >= command.len() {
                    self.execute(command);
                }
            }
            _ => {}
        }
    }

    fn await_command(&mut self) {
        self.state.phase = Phase::Command;
        self.state.fifo_len = 0;
        self.state.fifo_pos = 0;
    }

    fn result(&mut self, bytes: &[u8]) {
        let s = &mut self.state;
        s.fifo[..bytes.len()].copy_from_slice(bytes);
        s.fifo_len = bytes.len() as u8;
        s.fifo_pos = 0;
        s.phase = Phase::Result;
    }

    fn execute(&mut self, command: Command) {
        let p = self.state.fifo;
        let unit = usize::from(p[1] & 3);
        let s = &mut self.state;
        match command {
            Command::Specify => {
                s.specify = [p[1], p[2]];
                s.non_dma = p[2] & 1 != 0;
                self.await_command();
            }
            Command::SenseDriveStatus => {
                let mut value = st3::ALWAYS | p[1] & 7;
                if s.drives[unit].track == 0 {
                    value |= st3::TRACK_0;
                }
                if self.facts[unit].medium.is_some_and(|m| m.read_only) {
                    value |= st3::WRITE_PROTECTED;
                }
                self.result(&[value]);
            }
            Command::Recalibrate => {
                // The 82078 gives up after 79 steps; no medium has so many tracks that it matters.
                let there = self.facts[unit].present;
                self.step(unit, 0);
                let failure = if there { 0 } else { st0::ABNORMAL | st0::EQUIPMENT_CHECK };
                self.seek_done(unit, p[1] & 3 | failure);
            }
            Command::Seek => {
                self.step(unit, p[2]);
                self.seek_done(unit, p[1] & 7);
            }
            Command::RelativeSeek(up) => {
                let track = s.drives[unit].track;
                let to = if up { track.saturating_add(p[2]) } else { track.saturating_sub(p[2]) };
                self.step(unit, to);
                self.seek_done(unit, p[1] & 7);
            }
            Command::SenseInterrupt => self.sense_interrupt(),
            Command::DumpRegisters => {
                let tracks = s.drives.map(|d| d.track);
                let bytes = [
                    tracks[0],
                    tracks[1],
                    tracks[2],
                    tracks[3],
                    s.specify[0],
                    s.specify[1],
                    // Sectors on a track, as the command before gave it: not kept.
                    0,
                    u8::from(s.lock) << 7 | s.perpendicular & 0x7f,
                    s.configure,
                    s.precompensation,
                ];
                self.result(&bytes);
            }
            Command::Version => self.result(&[VERSION]),
            Command::PartId => self.result(&[PART_ID]),
            Command::Perpendicular => {
                // Bit 7 allows the drive bits to be changed.
                let drives = if p[1] & 0x80 != 0 { p[1] & 0x3c } else { s.perpendicular & 0x3c };
                s.perpendicular = drives | p[1] & 3;
                self.await_command();
            }
            Command::Configure => {
                s.configure = p[2] & 0x7f;
                s.precompensation = p[3];
                self.await_command();
            }
            Command::Lock(lock) => {
                s.lock = lock;
                self.result(&[u8::from(lock) << 4]);
            }
            Command::PowerDown => self.result(&[p[1]]),
            Command::Option => self.result(&[p[1]]),
            Command::Save => {
                let mut bytes = [0; 16];
                bytes[2] = s.precompensation;
                bytes[4..6].copy_from_slice(&s.specify);
                bytes[7] = u8::from(s.lock) << 7 | s.perpendicular & 0x7f;
                bytes[8] = s.configure;
                for (byte, drive) in bytes[12..].iter_mut().zip(&s.drives) {
                    *byte = drive.track;
                }
                self.result(&bytes);
            }
            Command::Restore => {
                s.precompensation = p[3];
                s.specify = [p[5], p[6]];
                s.lock = p[8] & 0x80 != 0;
                s.perpendicular = p[8] & 0x3f;
                s.configure = p[9] & 0x7f;
                for (byte, drive) in p[13..17].iter().zip(&mut s.drives) {
                    drive.track = *byte;
                }
                self.await_command();
            }
            Command::DriveSpecification => {
                if p[1] & 0x80 != 0 {
                    // "Done" with or without the table as a result.
                    if p[1] & 0x40 == 0 { self.result(&[0; 4]) } else { self.await_command() }
                } else {
                    // Another drive's byte follows.
                    s.fifo_len = 1;
                }
            }
            Command::ReadId => self.read_id(),
            Command::Read
            | Command::ReadDeleted
            | Command::Write
            | Command::WriteDeleted
            | Command::ReadTrack
            | Command::Verify
            | Command::Format => self.start_transfer(command),
            Command::Invalid => self.result(&[st0::INVALID]),
        }
    }

    /// Moves a drive's head. Movement with a medium in the drive takes the disk change line back.
    fn step(&mut self, unit: usize, track: u8) {
        let drive = &mut self.state.drives[unit];
        drive.track = track;
        if self.facts[unit].medium.is_some() {
            drive.changed = false;
        }
    }

    fn seek_done(&mut self, unit: usize, st0_bits: u8) {
        self.state.drives[unit].sense = Some(st0::SEEK_END | st0_bits);
        self.state.interrupt = true;
        self.await_command();
    }

    fn sense_interrupt(&mut self) {
        let s = &mut self.state;
        let found = s.drives.iter_mut().find_map(|d| d.sense.take().map(|sense| (sense, d.track)));
        s.interrupt =
            s.drives.iter().any(|d| d.sense.is_some_and(|sense| sense & st0::POLLED != st0::POLLED));
        match found {
            Some((sense, track)) => self.result(&[sense, track]),
            None => self.result(&[st0::INVALID]),
        }
    }

    /// The medium in a drive, or the status bits that tell why it cannot be read.
    fn readable(&self, unit: usize) -> Result<MediumFacts, (u8, u8)> {
        let unreadable = (st1::MISSING_ADDRESS_MARK, 0);
        let medium = self.facts[unit].medium.ok_or(unreadable)?;
        if medium.geometry.density.matches(self.state.rate) { Ok(medium) } else { Err(unreadable) }
    }

    fn read_id(&mut self) {
        let byte = self.state.fifo[1];
        let (unit, head) = (byte & 3, byte >> 2 & 1);
        let track = self.state.drives[usize::from(unit)].track;
        let transfer = Transfer {
            kind: Kind::Read,
            drive: unit,
            multi_track: false,
            cylinder: track,
            head,
            sector: 1,
            last: 0,
            ending: false,
        };
        self.state.transfer = Some(transfer);
        match self.readable(unit.into()) {
            Ok(m) if track < m.geometry.cylinders && head < m.geometry.heads => self.finish(0, 0, 0),
            Ok(_) => self.finish(st0::ABNORMAL, st1::MISSING_ADDRESS_MARK, 0),
            Err((one, two)) => self.finish(st0::ABNORMAL, one, two),
        }
    }

    fn start_transfer(&mut self, command: Command) {
        let p = self.state.fifo;
        let unit = usize::from(p[1] & 3);
        let kind = match command {
            Command::Write | Command::WriteDeleted => Kind::Write,
            Command::ReadDeleted => Kind::ReadDeleted,
            Command::Verify => Kind::Verify { left: (p[1] & 0x80 != 0).then_some(p[8]) },
            Command::Format => Kind::Format { fill: p[5] },
            _ => Kind::Read,
        };
        let mut transfer = Transfer {
            kind,
            drive: p[1] & 3,
            multi_track: p[0] & 0x80 != 0,
            cylinder: p[2],
            head: p[3],
            sector: p[4],
            last: p[6],
            ending: false,
        };
        let size_code = match command {
            Command::Format => {
                transfer = Transfer {
                    multi_track: false,
                    cylinder: self.state.drives[unit].track,
                    head: p[1] >> 2 & 1,
                    sector: 1,
                    last: p[3],
                    ..transfer
                };
                p[2]
            }
            Command::ReadTrack => {
                transfer = Transfer { sector: 1, multi_track: false, ..transfer };
                p[5]
            }
            _ => p[5],
        };
        self.state.transfer = Some(transfer);
        let medium = match self.readable(unit) {
            Ok(medium) => medium,
            Err((one, two)) => return self.finish(st0::ABNORMAL, one, two),
        };
        if self.state.configure & CONFIGURE_IMPLIED_SEEK != 0 && command != Command::Format {
            self.step(unit, transfer.cylinder);
        }
        let g = medium.geometry;
        if transfer.cylinder != self.state.drives[unit].track {
            return self.finish(st0::ABNORMAL, st1::NO_DATA, st2::WRONG_CYLINDER);
        }
        if transfer.cylinder >= g.cylinders
            || transfer.head >= g.heads
            || transfer.head != p[1] >> 2 & 1
            || !(1..=g.sectors).contains(&transfer.sector)
            || size_code != N_512
        {
            return self.finish(st0::ABNORMAL, st1::NO_DATA, 0);
        }
        if matches!(kind, Kind::Write | Kind::Format { .. }) && medium.read_only {
            return self.finish(st0::ABNORMAL, st1::NOT_WRITABLE, 0);
        }
        self.next_run();
    }

    /// Sectors from the one at work to the end of its track, as far as the medium has them.
    fn run(&self, transfer: &Transfer) -> usize {
        let sectors = self.facts[usize::from(transfer.drive)].medium.map_or(0, |m| m.geometry.sectors);
        let run = (transfer.last.min(sectors) + 1).saturating_sub(transfer.sector);
        let run = match transfer.kind {
            Kind::Verify { left: Some(left) } => run.min(left),
            _ => run,
        };
        run.into()
    }

    fn offset(&self, transfer: &Transfer) -> u64 {
        let Some(medium) = self.facts[usize::from(transfer.drive)].medium else { return 0 };
        let g = medium.geometry;
        let track = u64::from(transfer.cylinder) * u64::from(g.heads) + u64::from(transfer.head);
        (track * u64::from(g.sectors) + u64::from(transfer.sector.max(1)) - 1) * SECTOR as u64
    }

    /// Starts on the sectors from the one at work to the end of the track.
    fn next_run(&mut self) {
        let Some(transfer) = self.state.transfer else { return };
        let run = self.run(&transfer);
        if run == 0 {
            return self.finish(st0::ABNORMAL, st1::NO_DATA, 0);
        }
        match transfer.kind {
            Kind::Read | Kind::ReadDeleted | Kind::Verify { .. } => {
                let buffer = vec![0; run * SECTOR];
                self.request = Some(Request::Read { offset: self.offset(&transfer), buffer });
                self.state.phase = Phase::Busy;
            }
            Kind::Write => self.ask_host(run * SECTOR),
            // Four bytes of address for each sector.
            Kind::Format { .. } => self.ask_host(usize::from(transfer.last) * 4),
        }
    }

    fn ask_host(&mut self, len: usize) {
        let s = &mut self.state;
        s.buffer.clear();
        s.buffer.resize(len, 0);
        s.pos = 0;
        s.phase = if s.non_dma { Phase::PioOut } else { Phase::DmaOut };
        s.interrupt = s.non_dma;
    }

    /// The medium has answered.
    pub(crate) fn completed(&mut self, result: Result<Vec<u8>, ()>) {
        let Some(transfer) = self.state.transfer.filter(|_| self.state.phase == Phase::Busy) else { return };
        let Ok(buffer) = result else {
            return self.finish(st0::ABNORMAL, st1::DATA_ERROR, st2::DATA_ERROR);
        };
        match transfer.kind {
            Kind::Read | Kind::ReadDeleted => {
                let s = &mut self.state;
                s.buffer = buffer;
                s.pos = 0;
                s.phase = if s.non_dma { Phase::PioIn } else { Phase::DmaIn };
                s.interrupt = s.non_dma;
            }
            Kind::Verify { left } => {
                let done = (buffer.len() / SECTOR) as u8;
                let left = left.map(|left| left.saturating_sub(done));
                if let Some(t) = &mut self.state.transfer {
                    t.kind = Kind::Verify { left };
                }
                self.advance(done, left == Some(0));
            }
            Kind::Write => self.advance((buffer.len() / SECTOR) as u8, transfer.ending),
            Kind::Format { .. } => self.finish(0, 0, 0),
        }
    }

    /// The host took or gave `bytes` of the buffer; `terminal_count`: it wants no more.
    pub(crate) fn moved(&mut self, bytes: usize, terminal_count: bool) {
        let Some(transfer) = self.state.transfer else { return };
        let whole = bytes >= self.state.buffer.len();
        match (self.state.phase, transfer.kind) {
            (Phase::DmaIn | Phase::PioIn, _) => {
                self.state.buffer.clear();
                if !whole && !terminal_count {
                    return self.finish(st0::ABNORMAL, st1::OVERRUN, 0);
                }
                self.advance(bytes.div_ceil(SECTOR) as u8, terminal_count);
            }
            (Phase::DmaOut | Phase::PioOut, Kind::Format { fill }) => {
                if !whole {
                    return self.finish(st0::ABNORMAL, st1::OVERRUN, 0);
                }
                self.state.buffer.clear();
                let buffer = vec![fill; self.run(&transfer) * SECTOR];
                self.request = Some(Request::Write { offset: self.offset(&transfer), buffer });
                self.state.phase = Phase::Busy;
            }
            (Phase::DmaOut | Phase::PioOut, _) => {
                if !whole && !terminal_count {
                    return self.finish(st0::ABNORMAL, st1::OVERRUN, 0);
                }
                // What the host did not give of the last sector is zeros.
                let mut buffer = std::mem::take(&mut self.state.buffer);
                buffer.truncate(bytes.next_multiple_of(SECTOR).max(SECTOR));
                if let Some(t) = &mut self.state.transfer {
                    t.ending = terminal_count;
                }
                self.request = Some(Request::Write { offset: self.offset(&transfer), buffer });
                self.state.phase = Phase::Busy;
            }
            _ => {}
        }
    }

    /// `done` sectors of the track are through.
    fn advance(&mut self, done: u8, ending: bool) {
        let Some(t) = &mut self.state.transfer else { return };
        let multi = t.multi_track;
        let mut track_done = false;
        t.sector = t.sector.saturating_add(done);
        if t.sector > t.last {
            t.sector = 1;
            track_done = true;
            if multi {
                t.head ^= 1;
            }
            // A command without multi-track ends with its track, one with it after head 1.
            if !multi || t.head == 0 {
                t.cylinder = t.cylinder.wrapping_add(1);
            }
        }
        let (head, kind) = (t.head, t.kind);
        let mark = if kind == Kind::ReadDeleted { st2::CONTROL_MARK } else { 0 };
        if ending {
            self.finish(0, 0, mark);
        } else if !track_done || multi && head == 1 {
            self.next_run();
        } else if matches!(kind, Kind::Verify { left: None }) {
            // Its end at the last sector is the good one.
            self.finish(0, 0, 0);
        } else {
            self.finish(st0::ABNORMAL, st1::END_OF_CYLINDER, mark);
        }
    }

    /// Ends the execution phase; the result bytes and an interrupt tell how.
    fn finish(&mut self, zero: u8, one: u8, two: u8) {
        let Some(t) = self.state.transfer.take() else { return };
        self.request = None;
        self.state.buffer.clear();
        self.state.pos = 0;
        self.state.interrupt = true;
        let place = t.drive | (t.head & 1) << 2;
        self.result(&[zero | place, one, two, t.cylinder, t.head, t.sector, N_512]);
    }
}
