//! CD/DVD drives behind a channel: ATA commands of packet devices, and the transport of packets (ATAPI). What the packets ask for is
//! [`crate::scsi::cd`]'s. Source: SFF-8020i.

use super::CdIdentity;
use super::channel::{Channel, DriveKind, DriveState, Job, MAX_BUFFER, Phase, Request};
use super::disk::{mode_word, put_text, put_word};
use super::spec::{command, error, reason, status};
use crate::scsi::cd::{self, Answer, CD_SECTOR, CdMedium, op};
use crate::scsi::inquiry;
use crate::scsi::sense::Sense;

/// Sectors of one request to the medium.
const CHUNK: u32 = 128;
/// The header of a packet device's INQUIRY data: removable, commands of no standard, ATAPI version 2.
const INQUIRY_HEADER: [u8; 8] = [5, 0x80, 0, 0x21, 31, 0, 0, 0];

impl Channel {
    fn cd(&self) -> Option<(&CdIdentity, Option<CdMedium>)> {
        match &self.kinds[usize::from(self.state.active & 1)] {
            Some(DriveKind::Cd { identity, medium }) => Some((identity, *medium)),
            _ => None,
        }
    }

    /// A disc was put in, changed or taken out by the host.
    pub(crate) fn cd_medium_changed(&mut self, drive: usize, medium: Option<CdMedium>) {
        let Some(Some(DriveKind::Cd { medium: slot, .. })) = self.kinds.get_mut(drive) else { return };
        *slot = medium;
        let state = &mut self.state.drives[drive];
        state.cd.medium_changed(medium.is_some());
        if medium.is_some() {
            state.alerts.attention = Sense::MEDIUM_CHANGED;
        }
    }

    /// The host asks the guest to give the disc free.
    pub(crate) fn cd_eject_request(&mut self, drive: usize) {
        self.state.drives[drive].cd.eject_request();
    }

    pub(crate) fn cd_command(&mut self, command: u8) {
        match command {
            command::PACKET => {
                let drive = self.active();
                let features = drive.features.now;
                drive.byte_limit = drive.byte_count();
                // No overlapped commands; the direction bit is for bridges.
                if features & !0b101 != 0 {
                    return self.fail(error::ABRT);
                }
                self.state.job = Job::Packet { dma: features & 1 != 0 };
                self.start_pio_out(12, false);
                self.active().count = reason::COD.into();
            }
            command::IDENTIFY_PACKET_DEVICE => self.cd_identify(),
            command::DEVICE_RESET => {
                self.abandon();
                let index = usize::from(self.state.active & 1);
                let kind = self.kinds[index].as_ref();
                let drive = &mut self.state.drives[index];
                drive.interrupt = false;
                drive.signature(kind);
            }
            command::SET_FEATURES => self.set_features(),
            command::EXECUTE_DIAGNOSTIC => self.execute_diagnostic(),
            // Disk commands that hosts use to tell the kinds apart: aborted, leaving the signature.
            command::IDENTIFY_DEVICE | command::READ_SECTORS => {
                let index = usize::from(self.state.active & 1);
                let kind = self.kinds[index].as_ref();
                self.state.drives[index].signature(kind);
                self.fail(error::ABRT);
            }
            _ => self.power_command(command),
        }
    }

    /// Ends a packet command well.
    pub(crate) fn packet_succeed(&mut self) {
        self.succeed();
        let drive = self.active();
        drive.count = (reason::IO | reason::COD).into();
        drive.alerts.sense = Sense::NONE;
    }

    fn packet_fail(&mut self, sense: Sense) {
        self.fail(sense.key << 4 | error::ABRT);
        let drive = self.active();
        drive.count = (reason::IO | reason::COD).into();
        drive.alerts.sense = sense;
    }

    /// The packet has arrived.
    pub(crate) fn packet_command(&mut self, packet: [u8; 12], dma: bool) {
        if let Err(attention) = self.active().alerts.admit(packet[0]) {
            return self.packet_fail(attention);
        }
        match self.packet_answer(&packet) {
            Answer::Done => self.packet_succeed(),
            Answer::Fail(sense) => self.packet_fail(sense),
            Answer::Data(mut bytes) => {
                bytes.truncate(MAX_BUFFER);
                if bytes.is_empty() {
                    return self.packet_succeed();
                }
                self.state.job = Job::PacketReply { dma };
                self.state.buffer = bytes;
                if dma { self.start_dma(Phase::DmaIn) } else { self.start_pio_in() }
            }
            Answer::Read { count: 0, .. } => self.packet_succeed(),
            Answer::Read { first, count, raw } => {
                self.state.job = Job::PacketRead { next: first, left: count, raw, dma };
                self.cd_read_next();
            }
        }
    }

    fn packet_answer(&mut self, packet: &[u8; 12]) -> Answer {
        let Some((identity, medium)) = self.cd() else { return Answer::Fail(Sense::INVALID_COMMAND) };
        match packet[0] {
            // Vital product data pages: none.
            op::INQUIRY if packet[1] & 1 != 0 || packet[2] != 0 => Answer::Fail(Sense::INVALID_FIELD),
            op::INQUIRY => cd::data(
                inquiry::standard(INQUIRY_HEADER, &identity.vendor, &identity.product, &identity.revision),
                packet[4].into(),
            ),
            op::REQUEST_SENSE => {
                let sense = self.active().alerts.report();
                cd::data(sense.fixed().to_vec(), packet[4].into())
            }
            _ => cd::command(&mut self.active().cd, medium, packet),
        }
    }

    /// Asks the medium for the next piece of a read.
    pub(crate) fn cd_read_next(&mut self) {
        let Job::PacketRead { next, left, .. } = &mut self.state.job else { return };
        let count = (*left).min(CHUNK);
        let first = *next;
        *next += count;
        *left -= count;
        let buffer = self.take_buffer(count as usize * CD_SECTOR as usize);
        self.ask(Request::Read { offset: u64::from(first) * CD_SECTOR, buffer });
    }

    pub(crate) fn cd_completed(&mut self, result: Result<Vec<u8>, ()>) {
        let Job::PacketRead { next, raw, dma, .. } = self.state.job else { return };
        let Ok(buffer) = result else { return self.packet_fail(Sense::READ_ERROR) };
        self.state.buffer = if raw {
            let first = next - (buffer.len() as u64 / CD_SECTOR) as u32;
            cd::raw_sectors(first, &buffer)
        } else {
            buffer
        };
        if dma { self.start_dma(Phase::DmaIn) } else { self.start_pio_in() }
    }

    /// Whether the guest has opened the tray with a disc in it: the shell then lets go of the medium.
    pub(crate) fn cd_ejected(&self, drive: usize) -> bool {
        matches!(&self.kinds[drive], Some(DriveKind::Cd { medium: Some(_), .. }))
            && self.state.drives[drive].cd.tray_open
    }

    fn cd_identify(&mut self) {
        let Some((identity, _)) = self.cd() else { return };
        let drive: &DriveState = &self.state.drives[usize::from(self.state.active & 1)];
        let mut data = vec![0; 512];
        let d = &mut data[..];
        // Packet device, CD drive, removable, DRQ within 50 µs, 12-byte packets.
        put_word(d, 0, 0x85c0);
        put_text(d, 10, 10, &identity.serial);
        put_word(d, 20, 3);
        put_word(d, 21, 512);
        put_text(d, 23, 4, &identity.revision);
        put_text(d, 27, 20, &identity.model);
        put_word(d, 49, 0x0b00);
        put_word(d, 53, 7);
        put_word(d, 62, 0);
        put_word(d, 63, mode_word(0x07, 0x20, drive.mode));
        put_word(d, 64, 3);
        for word in 65..=68 {
            put_word(d, word, 0x00b4);
        }
        put_word(d, 71, 30);
        put_word(d, 72, 30);
        put_word(d, 80, 0x7e);
        put_word(d, 81, 0x22);
        // PACKET, power management, DEVICE RESET.
        put_word(d, 82, 0x0218);
        put_word(d, 83, 0x4000);
        put_word(d, 84, 0x4000);
        put_word(d, 85, 0x0218);
        put_word(d, 87, 0x4000);
        put_word(d, 88, mode_word(0x7f, 0x40, drive.mode));
        put_word(d, 93, if self.state.active == 0 { 0x600b } else { 0x6b00 });
        self.state.job = Job::Reply;
        self.state.buffer = data;
        self.start_pio_in();
        debug_assert_ne!(self.active().status & status::DRQ, 0);
    }
}
