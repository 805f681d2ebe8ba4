//! One port: its registers, the command list, and the drive behind it.
//!
//! Commands other than queued ones run one at a time on the ATA layer of the IDE channels ([`Channel`], drive 0): the command FIS is
//! the task file, and each data phase is moved through the command's descriptor table. Queued commands (NCQ) are this module's
//! own and run side by side. Nothing here waits: requests for the medium are handed out, and answers come back by
//! [`Port::completed`].

use pgm::Pgm;
use vbox_types::GuestPhys;

use super::spec::{
    self, ACMD_AT, Cmd, Header, LINK_UP, PRDT_AT, SERR_N, SERR_P, SERR_X, SIG_ABSENT, SLOTS, TFD_ABSENT, fis,
    interrupt, px,
};
use crate::ide::channel::{Channel, Deep, DriveKind, Job, Phase, Request, SECTOR, State};
use crate::ide::disk::put_word;
use crate::ide::spec::{Control, command, error, status};

/// Sectors of one request of a queued command.
const QUEUED_CHUNK: u32 = 1024;
/// Most pages of one READ LOG EXT.
const MAX_LOG_PAGES: u16 = 16;

/// Whose request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The command on the ATA layer.
    Command,
    /// The queued command with this tag.
    Queued(u8),
}

/// A request for the medium.
pub(super) struct Ask {
    pub(super) owner: Owner,
    /// The port's generation when the request was made.
    pub(super) generation: u64,
    pub(super) request: Request,
}

/// A queued command that failed, until the log that tells about it is read or the drive is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) tag: u8,
    pub(super) status: u8,
    pub(super) error: u8,
    pub(super) lba: u64,
}

/// Guest-visible registers. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Regs {
    pub(super) clb: u64,
    pub(super) fb: u64,
    /// Without the bits that show the error register.
    pub(super) is: u32,
    pub(super) ie: u32,
    pub(super) cmd: u32,
    pub(super) tfd: u32,
    pub(super) sig: u32,
    pub(super) ssts: u32,
    pub(super) sctl: u32,
    pub(super) serr: u32,
    pub(super) sact: u32,
    pub(super) ci: u32,
    /// An error stopped the command list; clearing ST lets it go on.
    pub(super) halted: bool,
    /// The drive's signature has not been received yet.
    pub(super) signature_due: bool,
    pub(super) failed: Option<Failed>,
}

/// A place in guest memory described by a command's descriptor table, and how far it has been used.
#[derive(Clone, Copy, Debug)]
struct Table {
    at: GuestPhys,
    entries: u16,
    /// The descriptor in use, and the bytes of it that are done.
    entry: u16,
    offset: u32,
}

impl Table {
    /// Moves bytes between `data` and the memory described. Returns how many, and whether a descriptor that asks for an interrupt
    /// was used up.
    fn transfer(&mut self, pgm: &Pgm, data: &mut [u8], to_memory: bool) -> (usize, bool) {
        let (mut done, mut tell) = (0, false);
        while done < data.len() && self.entry < self.entries {
            let mut raw = [0; 16];
            pgm.read(self.at.wrapping_add(16 * u64::from(self.entry)), &mut raw);
            let [a0, a1, a2, a3, a4, a5, a6, a7, _, _, _, _, c0, c1, c2, c3] = raw;
            let address = u64::from_le_bytes([a0 & !1, a1, a2, a3, a4, a5, a6, a7]);
            // Bits 21–0 are the count less one, which is odd.
            let len = (u32::from_le_bytes([c0, c1, c2, 0]) & 0x3f_ffff | 1) + 1;
            let count = (len.saturating_sub(self.offset) as usize).min(data.len() - done);
            let place = GuestPhys(address).wrapping_add(self.offset.into());
            let piece = &mut data[done..done + count];
            if to_memory {
                pgm.write(place, piece);
            } else {
                pgm.read(place, piece);
            }
            done += count;
            self.offset = self.offset.saturating_add(count as u32);
            if self.offset >= len {
                tell |= c3 & 0x80 != 0;
                self.entry += 1;
                self.offset = 0;
            }
        }
        (done, tell)
    }
}

/// The command on the ATA layer.
struct Running {
    slot: u8,
    table: Table,
    packet: [u8; 12],
    is_packet: bool,
    /// The last data phase was PIO to the host: it ended with its setup FIS.
    pio_in: bool,
    moved: u32,
}

/// A queued command that was accepted.
struct Queued {
    table: Table,
    /// The first sector not asked of the medium yet, and how many are left.
    next: u64,
    left: u32,
    /// The sectors asked for last.
    chunk: u32,
    write: bool,
    fua: bool,
    flushing: bool,
}

pub(super) struct Port {
    pub(super) channel: Channel,
    pub(super) regs: Regs,
    hot_pluggable: bool,
    running: Option<Running>,
    queued: [Option<Queued>; SLOTS as usize],
    /// Changes whenever the requests under way become worthless: their answers are dropped.
    generation: u64,
    /// Requests under way, and how many of them are worthless. While there are such, none follows, so that an abandoned write
    /// cannot overtake a later one.
    pub(super) in_flight: u32,
    stale: u32,
}

impl Port {
    pub(super) fn new(kind: Option<DriveKind>, hot_pluggable: bool) -> Self {
        let channel = Channel::new([kind, None]);
        let regs = Self::power_on(channel.is_present(0), hot_pluggable);
        let mut port = Self {
            channel,
            regs,
            hot_pluggable,
            running: None,
            queued: Default::default(),
            generation: 0,
            in_flight: 0,
            stale: 0,
        };
        port.link_up();
        port
    }

    fn power_on(present: bool, hot_pluggable: bool) -> Regs {
        Regs {
            clb: 0,
            fb: 0,
            is: 0,
            ie: 0,
            cmd: Cmd::new().with_sud(true).with_pod(true).with_hpcp(hot_pluggable).into(),
            tfd: TFD_ABSENT,
            sig: SIG_ABSENT,
            ssts: 0,
            sctl: 0,
            serr: 0,
            sact: 0,
            ci: 0,
            halted: false,
            signature_due: present,
            failed: None,
        }
    }

    /// Power-on, system reset and controller reset.
    pub(super) fn reset(&mut self) {
        self.cancel();
        self.channel.reset();
        self.regs = Self::power_on(self.is_present(), self.hot_pluggable);
        self.link_up();
    }

    pub(super) fn is_present(&self) -> bool {
        self.channel.is_present(0)
    }

    fn cmd(&self) -> Cmd {
        self.regs.cmd.into()
    }

    /// The interrupt status as it reads.
    pub(super) fn interrupts(&self) -> u32 {
        let connect = if self.regs.serr & SERR_X != 0 { interrupt::PCS } else { 0 };
        let ready = if self.regs.serr & SERR_N != 0 { interrupt::PRCS } else { 0 };
        self.regs.is | connect | ready
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        let r = &self.regs;
        match register {
            px::CLB => r.clb as u32,
            px::CLBU => (r.clb >> 32) as u32,
            px::FB => r.fb as u32,
            px::FBU => (r.fb >> 32) as u32,
            px::IS => self.interrupts(),
            px::IE => r.ie,
            px::CMD => r.cmd,
            px::TFD => r.tfd,
            px::SIG => r.sig,
            px::SSTS => r.ssts,
            px::SCTL => r.sctl,
            px::SERR => r.serr,
            px::SACT => r.sact,
            px::CI => r.ci,
            _ => 0,
        }
    }

    /// Writes the bits of `mask` of a register.
    pub(super) fn write(&mut self, pgm: &Pgm, register: u32, value: u32, mask: u32) {
        let merged = self.read(register) & !mask | value & mask;
        let set = value & mask;
        let r = &mut self.regs;
        match register {
            px::CLB => r.clb = r.clb & !0xffff_ffff | u64::from(merged & !0x3ff),
            px::CLBU => r.clb = r.clb & 0xffff_ffff | u64::from(merged) << 32,
            px::FB => r.fb = r.fb & !0xffff_ffff | u64::from(merged & !0xff),
            px::FBU => r.fb = r.fb & 0xffff_ffff | u64::from(merged) << 32,
            px::IS => r.is &= !set,
            px::IE => r.ie = merged & interrupt::ENABLES,
            px::CMD => self.write_cmd(pgm, merged),
            px::SCTL => self.write_sctl(pgm, merged),
            px::SERR => r.serr &= !set,
            px::SACT if self.cmd().st() => self.regs.sact |= set,
            px::CI if self.cmd().st() => self.regs.ci |= set,
            _ => {}
        }
    }

    fn write_cmd(&mut self, pgm: &Pgm, value: u32) {
        let before = self.cmd();
        let merged = self.regs.cmd & !spec::CMD_WRITABLE | value & spec::CMD_WRITABLE;
        let mut after = Cmd::from(merged);
        after = after.with_cr(after.st()).with_fr(after.fre());
        if before.st() && !after.st() {
            self.cancel();
            (self.regs.ci, self.regs.sact) = (0, 0);
            self.regs.halted = false;
            after = after.with_ccs(0);
            if self.is_present() && self.regs.ssts == LINK_UP {
                // What was under way is given up; the drive is ready again.
                let tfd = u32::from(self.channel.state.drives[0].status);
                self.regs.tfd = self.regs.tfd & 0xff00 | tfd;
            }
        } else if !before.st() && after.st() {
            // The slot after this one is the first to be looked at.
            after = after.with_ccs(SLOTS - 1);
        }
        self.regs.cmd = after.into();
        self.post_signature(pgm);
    }

    fn write_sctl(&mut self, pgm: &Pgm, value: u32) {
        let (before, after) = (self.regs.sctl & 0xf, value & 0xf);
        self.regs.sctl = value & 0xfff;
        match after {
            // COMRESET, as long as it is there.
            1 => {
                self.cancel();
                self.link_down(0);
            }
            // Interface off.
            4 => {
                self.cancel();
                self.link_down(4);
            }
            _ if matches!(before, 1 | 4) => {
                self.channel.reset();
                self.regs.failed = None;
                self.link_up();
                if self.is_present() {
                    self.regs.serr |= SERR_X;
                }
                self.post_signature(pgm);
            }
            _ => {}
        }
    }

    fn link_down(&mut self, detection: u32) {
        (self.regs.ci, self.regs.sact) = (0, 0);
        self.regs.halted = false;
        self.regs.ssts = detection;
        self.regs.sig = SIG_ABSENT;
        self.regs.tfd = TFD_ABSENT;
        self.regs.signature_due = false;
    }

    /// The drive, if there is one, answers after power-on or a reset.
    fn link_up(&mut self) {
        if !self.is_present() {
            return self.link_down(0);
        }
        self.regs.ssts = LINK_UP;
        self.regs.signature_due = true;
        self.take_signature();
    }

    fn take_signature(&mut self) {
        let drive = &self.channel.state.drives[0];
        self.regs.sig =
            u32::from_le_bytes([drive.count.now, drive.lba[0].now, drive.lba[1].now, drive.lba[2].now]);
        self.regs.tfd = u32::from(drive.error) << 8 | u32::from(drive.status);
    }

    /// Puts the signature FIS into memory once the guest receives FISes.
    fn post_signature(&mut self, pgm: &Pgm) {
        if self.regs.signature_due && self.cmd().fre() {
            self.regs.signature_due = false;
            self.post_register_fis(pgm, false);
        }
    }

    /// A drive is plugged in, or pulled out.
    pub(super) fn plug(&mut self, pgm: &Pgm, kind: Option<DriveKind>) {
        self.cancel();
        self.channel.kinds[0] = kind;
        self.channel.reset();
        self.regs.failed = None;
        self.link_down(0);
        self.link_up();
        self.regs.serr |= SERR_N | if self.is_present() { SERR_X } else { 0 };
        self.post_signature(pgm);
    }

    /// Takes back a saved state, in which no command is under way.
    pub(super) fn restore(&mut self, regs: Regs, state: State) {
        self.cancel();
        self.channel.abandon();
        self.channel.state = state;
        self.regs = regs;
    }

    /// Gives up every command; answers under way will be dropped.
    fn cancel(&mut self) {
        if self.running.is_some() || self.channel.state.phase != Phase::Idle {
            self.channel.abandon();
            self.channel.active().status = status::READY;
        }
        self.running = None;
        self.queued = Default::default();
        self.generation += 1;
        self.stale = self.in_flight;
    }

    /// Carries on with whatever can go on. Requests for the medium come into `out`.
    pub(super) fn run(&mut self, pgm: &Pgm, out: &mut Vec<Ask>) {
        while self.stale == 0 && !self.regs.halted {
            if self.running.is_some() {
                if !self.pump(pgm, out) {
                    return;
                }
            } else if !self.cmd().st()
                || self.regs.ssts != LINK_UP
                || self.regs.ci == 0
                || !self.start(pgm, out)
            {
                return;
            }
        }
    }

    /// Takes the next command from the list; false if it has to wait.
    fn start(&mut self, pgm: &Pgm, out: &mut Vec<Ask>) -> bool {
        // Round-robin from the slot after the last one.
        let first = (u32::from(self.cmd().ccs()) + 1) % u32::from(SLOTS);
        let slot = ((self.regs.ci.rotate_right(first).trailing_zeros() + first) % u32::from(SLOTS)) as u8;
        let header_at = self.header(slot);
        let mut raw = [0; 16];
        pgm.read(header_at, &mut raw);
        let [h0, h1, h2, h3, _, _, _, _, t0, t1, t2, t3, t4, t5, t6, t7] = raw;
        let header = Header::from(u32::from_le_bytes([h0, h1, h2, h3]));
        let at = GuestPhys(u64::from_le_bytes([t0 & 0x80, t1, t2, t3, t4, t5, t6, t7]));
        let mut cfis = [0; 20];
        pgm.read(at, &mut cfis);
        let is_queued = cfis[1] & fis::COMMAND != 0
            && matches!(cfis[2], spec::command::READ_FPDMA_QUEUED | spec::command::WRITE_FPDMA_QUEUED)
            && matches!(self.channel.kinds[0], Some(DriveKind::Disk { .. }));
        if !is_queued && self.queued.iter().any(Option::is_some) {
            return false;
        }
        self.regs.cmd = self.cmd().with_ccs(slot).into();
        let table = Table { at: at.wrapping_add(PRDT_AT), entries: header.prdtl(), entry: 0, offset: 0 };
        if header.cfl() < 4 || cfis[0] != fis::HOST_TO_DEVICE {
            // The device does not understand the FIS.
            self.regs.is |= interrupt::IFS;
            self.regs.serr |= SERR_P;
            self.regs.halted = true;
        } else if cfis[1] & fis::COMMAND == 0 {
            self.control(pgm, slot, cfis[15]);
        } else if is_queued {
            self.accept(pgm, slot, table, &cfis, out);
        } else {
            let mut packet = [0; 12];
            pgm.read(at.wrapping_add(ACMD_AT), &mut packet);
            let is_packet = cfis[2] == command::PACKET;
            self.running = Some(Running { slot, table, packet, is_packet, pio_in: false, moved: 0 });
            self.issue(&cfis);
        }
        true
    }

    fn header(&self, slot: u8) -> GuestPhys {
        GuestPhys(self.regs.clb).wrapping_add(32 * u64::from(slot))
    }

    /// A FIS that writes the device control register: software reset.
    fn control(&mut self, pgm: &Pgm, slot: u8, value: u8) {
        let was_reset = Control::from(self.channel.state.control).srst();
        self.channel.write_control(value);
        self.regs.ci &= !(1 << slot);
        if was_reset && !Control::from(value).srst() {
            self.regs.failed = None;
            self.take_signature();
            self.post_register_fis(pgm, false);
        }
    }

    /// Puts the task file into the drive and starts the command.
    fn issue(&mut self, cfis: &[u8; 20]) {
        let deep = |now: usize, before: usize| Deep { now: cfis[now], before: cfis[before] };
        let c = &mut self.channel;
        let drive = &mut c.state.drives[0];
        drive.features = deep(3, 11);
        drive.lba = [deep(4, 8), deep(5, 9), deep(6, 10)];
        // There is no second device that bit 4 could select.
        drive.device = cfis[7] & !0x10;
        drive.count = deep(12, 13);
        self.regs.tfd = u32::from(status::BSY);
        let is_disk = matches!(c.kinds[0], Some(DriveKind::Disk { .. }));
        match cfis[2] {
            spec::command::READ_LOG_EXT if is_disk => self.read_log(cfis),
            code => {
                c.command(code);
                if c.state.phase == Phase::PioIn
                    && matches!(code, command::IDENTIFY_DEVICE | command::IDENTIFY_PACKET_DEVICE)
                {
                    serial_ata_words(&mut c.state.buffer, is_disk);
                }
            }
        }
    }

    /// READ LOG EXT: the directory of logs, and the one that tells which queued command failed.
    fn read_log(&mut self, cfis: &[u8; 20]) {
        let pages = u16::from_le_bytes([cfis[12], cfis[13]]);
        let first = u16::from_le_bytes([cfis[5], cfis[9]]);
        let c = &mut self.channel;
        (c.state.selected, c.state.active) = (0, 0);
        c.active().error = 0;
        c.active().status = status::READY;
        if first != 0 || !(1..=MAX_LOG_PAGES).contains(&pages) {
            return c.fail(error::ABRT);
        }
        let mut data = vec![0; usize::from(pages) * SECTOR as usize];
        match cfis[4] {
            0x00 => {
                put_word(&mut data, 0, 1);
                put_word(&mut data, 0x10, 1);
            }
            0x10 => match self.regs.failed.take() {
                None => {
                    // No queued command failed.
                    data[0] = 0x80;
                    data[511] = 0x80;
                }
                Some(Failed { tag, status, error, lba }) => {
                    let [l0, l1, l2, l3, l4, l5, ..] = lba.to_le_bytes();
                    data[..11].copy_from_slice(&[tag, 0, status, error, l0, l1, l2, 0x40, l3, l4, l5]);
                    // The bytes of the page add up to zero.
                    data[511] = data.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
                }
            },
            _ => return c.fail(error::ABRT),
        }
        c.state.job = Job::Reply;
        c.state.buffer = data;
        c.start_pio_in();
    }

    /// One step of the command on the ATA layer; false if it waits for the medium.
    fn pump(&mut self, pgm: &Pgm, out: &mut Vec<Ask>) -> bool {
        let Some(running) = &mut self.running else { return false };
        let state = &mut self.channel.state;
        match state.phase {
            Phase::Busy => {
                if let Some((_, request)) = self.channel.take_request() {
                    self.in_flight += 1;
                    out.push(Ask { owner: Owner::Command, generation: self.generation, request });
                }
                return false;
            }
            phase @ (Phase::PioIn | Phase::DmaIn) => {
                let (moved, tell) = running.table.transfer(pgm, &mut state.buffer, true);
                let len = state.buffer.len();
                running.moved = running.moved.saturating_add(moved as u32);
                let tell_end = !running.is_packet;
                running.pio_in = phase == Phase::PioIn && tell_end;
                state.pos = len;
                state.phase = Phase::DmaIn;
                self.channel.dma_done();
                self.note(tell, moved < len);
                if phase == Phase::PioIn {
                    self.post_pio_setup(pgm, len, tell_end);
                }
            }
            Phase::PioOut | Phase::DmaOut => {
                let whole = if matches!(state.job, Job::Packet { .. }) {
                    let len = state.buffer.len().min(12);
                    state.buffer[..len].copy_from_slice(&running.packet[..len]);
                    true
                } else {
                    let (moved, tell) = running.table.transfer(pgm, &mut state.buffer, false);
                    running.moved = running.moved.saturating_add(moved as u32);
                    let whole = moved == state.buffer.len();
                    if tell {
                        self.regs.is |= interrupt::DPS;
                    }
                    whole
                };
                running.pio_in = false;
                if whole {
                    state.pos = state.buffer.len();
                    state.phase = Phase::DmaOut;
                    self.channel.dma_done();
                } else {
                    // A device would wait for the missing data for ever.
                    self.channel.fail(error::ABRT);
                }
            }
            Phase::Idle => self.finish(pgm),
        }
        true
    }

    fn note(&mut self, tell: bool, overflow: bool) {
        if tell {
            self.regs.is |= interrupt::DPS;
        }
        if overflow {
            self.regs.is |= interrupt::OFS;
        }
    }

    /// The command on the ATA layer has ended.
    fn finish(&mut self, pgm: &Pgm) {
        let Some(Running { slot, moved, pio_in, .. }) = self.running.take() else { return };
        let drive = &self.channel.state.drives[0];
        let failed = drive.status & status::ERR != 0;
        self.regs.tfd = u32::from(drive.error) << 8 | u32::from(drive.status);
        pgm.write(self.header(slot).wrapping_add(4), &moved.to_le_bytes());
        if pio_in && !failed {
            self.regs.is |= interrupt::PSS;
        } else {
            self.post_register_fis(pgm, true);
        }
        if failed {
            self.regs.is |= interrupt::TFES;
            self.regs.halted = true;
        } else {
            self.regs.ci &= !(1 << slot);
        }
    }

    fn receive(&self, pgm: &Pgm, at: u64, bytes: &[u8]) {
        if self.cmd().fre() {
            pgm.write(GuestPhys(self.regs.fb).wrapping_add(at), bytes);
        }
    }

    /// The drive's task file as FISes carry it.
    fn task_file(&self, kind: u8, flags: u8) -> [u8; 20] {
        let d = &self.channel.state.drives[0];
        let [low, mid, high] = d.lba;
        let mut bytes = [0; 20];
        bytes[..14].copy_from_slice(&[
            kind,
            flags,
            d.status,
            d.error,
            low.now,
            mid.now,
            high.now,
            d.device,
            low.before,
            mid.before,
            high.before,
            0,
            d.count.now,
            d.count.before,
        ]);
        bytes
    }

    fn post_register_fis(&mut self, pgm: &Pgm, tell: bool) {
        let flags = if tell { fis::INTERRUPT } else { 0 };
        self.receive(pgm, fis::DEVICE_TO_HOST_AT, &self.task_file(fis::DEVICE_TO_HOST, flags));
        if tell {
            self.regs.is |= interrupt::DHRS;
        }
    }

    fn post_pio_setup(&self, pgm: &Pgm, len: usize, tell: bool) {
        let flags = fis::TO_HOST | if tell { fis::INTERRUPT } else { 0 };
        let mut bytes = self.task_file(fis::PIO_SETUP, flags);
        // The status at the end of the transfer is what the task file has by now.
        bytes[15] = bytes[2];
        bytes[2] = status::READY | status::DRQ;
        bytes[16..18].copy_from_slice(&(len.min(0xffff) as u16).to_le_bytes());
        self.receive(pgm, fis::PIO_SETUP_AT, &bytes);
    }

    /// Accepts a queued command.
    fn accept(&mut self, pgm: &Pgm, slot: u8, table: Table, cfis: &[u8; 20], out: &mut Vec<Ask>) {
        let Some(DriveKind::Disk { sectors, read_only, .. }) = &self.channel.kinds[0] else { return };
        let (sectors, read_only) = (*sectors, *read_only);
        let write = cfis[2] == spec::command::WRITE_FPDMA_QUEUED;
        let lba = u64::from_le_bytes([cfis[4], cfis[5], cfis[6], cfis[8], cfis[9], cfis[10], 0, 0]);
        let count = match u16::from_le_bytes([cfis[3], cfis[11]]) {
            0 => 0x1_0000,
            n => u32::from(n),
        };
        self.regs.ci &= !(1 << slot);
        self.regs.failed = None;
        self.queued[usize::from(slot)] = Some(Queued {
            table,
            next: lba,
            left: count,
            chunk: 0,
            write,
            fua: cfis[7] & 0x80 != 0,
            flushing: false,
        });
        if cfis[12] >> 3 != slot || write && read_only {
            return self.fail_queued(pgm, slot, error::ABRT);
        }
        if lba >= sectors || u64::from(count) > sectors - lba {
            return self.fail_queued(pgm, slot, error::IDNF);
        }
        self.next_piece(pgm, slot, out);
    }

    /// Asks the medium for the next piece of a queued command, or ends it.
    fn next_piece(&mut self, pgm: &Pgm, slot: u8, out: &mut Vec<Ask>) {
        let Some(q) = &mut self.queued[usize::from(slot)] else { return };
        let request = if q.left > 0 {
            q.chunk = q.left.min(QUEUED_CHUNK);
            let offset = q.next * SECTOR;
            let mut buffer = vec![0; q.chunk as usize * SECTOR as usize];
            q.next += u64::from(q.chunk);
            q.left -= q.chunk;
            if q.write {
                let (moved, tell) = q.table.transfer(pgm, &mut buffer, false);
                if moved < buffer.len() {
                    return self.fail_queued(pgm, slot, error::ABRT);
                }
                if tell {
                    self.regs.is |= interrupt::DPS;
                }
                Request::Write { offset, buffer }
            } else {
                Request::Read { offset, buffer }
            }
        } else if q.write && q.fua && !q.flushing {
            q.flushing = true;
            Request::Flush
        } else {
            self.queued[usize::from(slot)] = None;
            self.regs.sact &= !(1 << slot);
            self.regs.tfd = status::READY.into();
            return self.post_device_bits(pgm, status::READY, 0, 1 << slot);
        };
        self.in_flight += 1;
        out.push(Ask { owner: Owner::Queued(slot), generation: self.generation, request });
    }

    /// A queued command fails: the list stops, and every other queued command is given up by the drive.
    fn fail_queued(&mut self, pgm: &Pgm, slot: u8, bits: u8) {
        let lba =
            self.queued[usize::from(slot)].as_ref().map_or(0, |q| q.next.saturating_sub(q.chunk.into()));
        self.cancel();
        let status = status::READY | status::ERR;
        self.regs.failed = Some(Failed { tag: slot, status, error: bits, lba });
        self.regs.tfd = u32::from(bits) << 8 | u32::from(status);
        self.regs.is |= interrupt::TFES;
        self.regs.halted = true;
        self.post_device_bits(pgm, status, bits, 0);
    }

    fn post_device_bits(&mut self, pgm: &Pgm, status: u8, error: u8, done: u32) {
        let [d0, d1, d2, d3] = done.to_le_bytes();
        let bytes = [fis::SET_DEVICE_BITS, fis::INTERRUPT, status & 0x77, error, d0, d1, d2, d3];
        self.receive(pgm, fis::SET_DEVICE_BITS_AT, &bytes);
        self.regs.is |= interrupt::SDBS;
    }

    /// A request was answered; `generation` is the port's when the request was made. `Err` is a failure of the medium.
    pub(super) fn completed(
        &mut self,
        pgm: &Pgm,
        owner: Owner,
        generation: u64,
        result: Result<Vec<u8>, ()>,
        out: &mut Vec<Ask>,
    ) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if generation != self.generation {
            self.stale = self.stale.saturating_sub(1);
            return;
        }
        let slot = match owner {
            Owner::Command => return self.channel.completed(result),
            Owner::Queued(slot) => slot,
        };
        let Some(q) = &mut self.queued[usize::from(slot)] else { return };
        match result {
            Err(()) => {
                let bits = if q.write { error::ABRT } else { error::UNC };
                return self.fail_queued(pgm, slot, bits);
            }
            Ok(mut buffer) if !q.write => {
                let (moved, tell) = q.table.transfer(pgm, &mut buffer, true);
                let overflow = moved < buffer.len();
                self.note(tell, overflow);
            }
            Ok(_) => {}
        }
        self.next_piece(pgm, slot, out);
    }
}

/// What IDENTIFY of a Serial ATA drive tells beyond that of a parallel one.
fn serial_ata_words(data: &mut [u8], disk: bool) {
    if data.len() < 512 {
        return;
    }
    // Generations 1 and 2; queued commands.
    put_word(data, 76, 0x0006 | if disk { 0x0100 } else { 0 });
    if disk {
        put_word(data, 75, u16::from(SLOTS) - 1);
        // General purpose logging, which tells about failed queued commands.
        put_word(data, 84, 0x4060);
        put_word(data, 87, 0x4060);
    }
    // No cable to detect.
    put_word(data, 93, 0);
}
