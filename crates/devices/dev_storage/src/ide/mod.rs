//! The IDE function of the PIIX3 (82371SB), PIIX4 (82371AB) and ICH6 (as 631xESB) south bridges: two channels at their
//! legacy places (0x1f0, 0x3f6, IRQ 14 and 0x170, 0x376, IRQ 15) with two drives each, and the bus master behind BAR 4.
//! Sources: Intel 290550-002 section 2.7 (82371SB), ATA/ATAPI-6.
//!
//! **Left out.** Timing registers keep what is written and change nothing; the decode-enable bits of IDETIM and the
//! bus-master enable bit of the PCI command register are not looked at, as in VirtualBox. Native mode does not exist.
//! Overlapped commands, security, SMART and the host protected area are aborted, and IDENTIFY says so.
//!
//! **Asynchrony.** A command that needs the medium leaves its drive busy until the medium has answered. A reset drops the
//! answer of a request under way, but the next request waits until it has come, so that an abandoned write cannot
//! overtake a later one.
//!
//! **Saved state.** Saving requires that all requests have completed (the machine stops the vCPUs and drains its media first).

mod cd;
pub(crate) mod channel;
pub(crate) mod disk;
pub(crate) mod saved;
pub(crate) mod spec;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{BlockDriver, BlockError, BlockOp, Medium};
use pdm::iom::{Iom, PortHandler};
use pdm::irq::IrqLine;
use pdm::pci::{Bar, ConfigSpace, DevFn, Identity, PciBus, PciDevice};
use pdm::{Device, PortIo, Width};
use pgm::Pgm;
use vbox_types::{GuestPhys, Port};

use channel::{Channel, DriveKind, Phase, Request, SECTOR, State};
use spec::{BmCommand, BmStatus};

use crate::scsi::cd::CdMedium;

/// Which south bridge the function belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    Piix3,
    Piix4,
    Ich6,
}

impl Model {
    const fn device_id(self) -> u16 {
        match self {
            Self::Piix3 => 0x7010,
            Self::Piix4 => 0x7111,
            Self::Ich6 => 0x269e,
        }
    }
}

/// Cylinders, heads and sectors that a disk reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub cylinders: u16,
    pub heads: u8,
    pub sectors_per_track: u8,
}

/// What a hard disk tells about itself.
#[derive(Clone, Debug)]
pub struct DiskIdentity {
    pub model: String,
    pub serial: String,
    pub firmware: String,
    /// The usual one for the disk's size if `None`.
    pub geometry: Option<Geometry>,
    pub non_rotational: bool,
    /// Accept DATA SET MANAGEMENT (TRIM) and hand it to the medium.
    pub discard: bool,
}

impl DiskIdentity {
    /// The identity VirtualBox gives a disk with the medium UUID whose first field and last four bytes (as two little-endian
    /// words) are `first` and `last`.
    pub fn virtualbox(first: u32, last: u32) -> Self {
        Self {
            model: "VBOX HARDDISK".into(),
            serial: format!("VB{first:08x}-{last:08x}"),
            firmware: "1.0".into(),
            geometry: None,
            non_rotational: false,
            discard: false,
        }
    }
}

/// What a CD drive tells about itself.
#[derive(Clone, Debug)]
pub struct CdIdentity {
    /// IDENTIFY's model.
    pub model: String,
    pub serial: String,
    /// INQUIRY's vendor, product and revision.
    pub vendor: String,
    pub product: String,
    pub revision: String,
}

impl CdIdentity {
    /// VirtualBox's CD drive at port `number` of an AHCI controller, with the serial number of drives whose medium has no UUID.
    pub fn virtualbox_ahci(number: u32) -> Self {
        Self { serial: format!("VB{number:x}-1a2b3c4d"), ..Self::virtualbox(0) }
    }

    /// VirtualBox's CD drive in place `number` (0–3), with the serial number of drives whose medium has no UUID.
    pub fn virtualbox(number: u32) -> Self {
        let ports = if number < 2 { "01f003f6" } else { "01700376" };
        Self {
            model: "VBOX CD-ROM".into(),
            serial: format!("VB{number:x}-{ports}"),
            vendor: "VBOX".into(),
            product: "CD-ROM".into(),
            revision: "1.0".into(),
        }
    }
}

/// A drive to build in.
pub enum Drive {
    Disk { identity: DiskIdentity, medium: Arc<dyn BlockDriver> },
    Cd { identity: CdIdentity, medium: Medium },
}

/// Told when a guest ejects a disc. Called with the controller's lock held: it may only queue.
pub trait EjectSink: Send + Sync {
    /// The medium of drive `drive` (0 or 1) on `channel` has been let go.
    fn ejected(&self, channel: usize, drive: usize);
}

/// What the controller is wired to.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    /// IRQ 14 and 15.
    pub irqs: [IrqLine; 2],
    pub ejected: Option<Arc<dyn EjectSink>>,
}

/// Why the host cannot take a disc out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MediumError {
    #[error("there is no CD drive at channel {0}, device {1}")]
    NoDrive(usize, usize),
    #[error("the guest has locked the medium in the drive")]
    Locked,
}

/// One IDE controller.
pub struct Ide {
    model: Model,
    wiring: Wiring,
    me: Weak<Mutex<Self>>,
    media: [[Medium; 2]; 2],
    channels: [Channel; 2],
    /// Numbers the requests of each channel; answers to any but the latest are dropped.
    ticket: [u64; 2],
    /// Requests of each channel that have not been answered.
    in_flight: [u32; 2],
    irq_levels: [bool; 2],
}

impl Ide {
    /// Builds a controller with its drives: primary master, primary slave, secondary master, secondary slave.
    pub fn new(model: Model, wiring: Wiring, drives: [Option<Drive>; 4]) -> Arc<Mutex<Self>> {
        let mut media: [[Medium; 2]; 2] = Default::default();
        let mut kinds: [[Option<DriveKind>; 2]; 2] = Default::default();
        for (index, drive) in drives.into_iter().enumerate() {
            let (channel, drive_number) = (index / 2, index % 2);
            let Some(drive) = drive else { continue };
            let (kind, medium) = match drive {
                Drive::Disk { identity, medium } => {
                    let sectors = medium.size().0 / SECTOR;
                    let read_only = medium.is_read_only();
                    (DriveKind::Disk { identity, sectors, read_only }, Some(medium))
                }
                Drive::Cd { identity, medium } => {
                    (DriveKind::Cd { identity, medium: CdMedium::of(&medium) }, medium)
                }
            };
            media[channel][drive_number] = medium;
            kinds[channel][drive_number] = Some(kind);
        }
        Arc::new_cyclic(|me| {
            Mutex::new(Self {
                model,
                wiring,
                me: me.clone(),
                media,
                channels: kinds.map(Channel::new),
                ticket: [0; 2],
                in_flight: [0; 2],
                irq_levels: [false; 2],
            })
        })
    }

    /// Plugs the controller into the machine at `at`.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom, bus: &PciBus, at: DevFn) {
        for (base, control) in [(0x1f0, 0x3f6), (0x170, 0x376)] {
            iom.register(Port(base), 8, Width::Byte, this.clone());
            // The data port alone is wider.
            iom.register(Port(base), 1, Width::Dword, this.clone());
            iom.register(Port(control), 1, Width::Byte, this.clone());
        }
        let model = this.lock().model;
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x8086,
            device: model.device_id(),
            revision: if model == Model::Piix4 { 1 } else { 0 },
            // IDE controller with bus master; both channels in legacy mode, said to be switchable as VirtualBox says.
            class: [0x01, 0x01, 0x8a],
            ..Identity::default()
        });
        // IDETIM of both channels, decoding enabled; slave timing, ultra DMA control and timing, I/O configuration.
        space.set_u16(0x40, 0x8000);
        space.set_u16(0x42, 0x8000);
        space.allow(0x40, &[0xff; 5]);
        space.allow(0x48, &[0x0f, 0, 0x33, 0x33]);
        space.allow(0x54, &[0xff; 4]);
        if model == Model::Ich6 {
            // 80-conductor cables everywhere; the write buffer on.
            space.set_u16(0x54, 0x04f0);
        }
        let ports: Arc<dyn PortHandler> = Arc::new(BusMasterPorts(this.clone()));
        let bar = Bar::Io { size: 16, widest: Width::Dword, handler: ports };
        bus.add(at, "ide", space, vec![(4, bar)], this.clone());
    }

    /// Puts another disc into a CD drive, or takes it out. Unless `force`, a disc the guest has locked stays, and the guest is
    /// told that somebody pressed the eject button.
    pub fn set_medium(
        &mut self,
        channel: usize,
        drive: usize,
        medium: Medium,
        force: bool,
    ) -> Result<(), MediumError> {
        let missing = MediumError::NoDrive(channel, drive);
        let c = self.channels.get_mut(channel).ok_or(missing)?;
        let Some(Some(DriveKind::Cd { medium: present, .. })) = c.kinds.get(drive) else {
            return Err(missing);
        };
        if present.is_some() && c.state.drives[drive].cd.locked && !force {
            c.cd_eject_request(drive);
            return Err(MediumError::Locked);
        }
        c.cd_medium_changed(drive, CdMedium::of(&medium));
        self.media[channel][drive] = medium;
        Ok(())
    }

    /// Whether no request is with a medium.
    pub fn is_idle(&self) -> bool {
        self.in_flight == [0; 2]
    }

    /// Carries on after anything has changed: requests, DMA, interrupt line.
    fn sync(&mut self, channel: usize) {
        loop {
            if self.in_flight[channel] == 0
                && let Some((drive, request)) = self.channels[channel].take_request()
            {
                self.submit(channel, drive, request);
            }
            if !self.move_dma(channel) {
                break;
            }
        }
        for drive in 0..2 {
            if self.channels[channel].cd_ejected(drive) {
                self.media[channel][drive] = None;
                self.channels[channel].cd_medium_changed(drive, None);
                if let Some(sink) = &self.wiring.ejected {
                    sink.ejected(channel, drive);
                }
            }
        }
        // The command is over: the bus master stops if its table is, too.
        let State { phase, bm, .. } = &mut self.channels[channel].state;
        if *phase == Phase::Idle && bm.last && bm.left == 0 {
            bm.status = BmStatus::from(bm.status).with_active(false).into();
        }
        let level = self.channels[channel].irq_level();
        if level != self.irq_levels[channel] {
            self.irq_levels[channel] = level;
            if level {
                let bm = &mut self.channels[channel].state.bm;
                bm.status = BmStatus::from(bm.status).with_interrupt(true).into();
            }
            self.wiring.irqs[channel].set(level);
        }
    }

    fn submit(&mut self, channel: usize, drive: usize, request: Request) {
        let Some(medium) = self.media[channel][drive].clone() else {
            self.channels[channel].completed(Err(()));
            return;
        };
        self.ticket[channel] += 1;
        self.in_flight[channel] += 1;
        let ticket = self.ticket[channel];
        let me = self.me.clone();
        let op = match request {
            Request::Read { offset, buffer } => BlockOp::Read { offset, buffer },
            Request::Write { offset, buffer } => BlockOp::Write { offset, buffer },
            Request::Flush => BlockOp::Flush,
            Request::Discard { offset, len } => BlockOp::Discard { offset, len },
        };
        medium.submit(
            op,
            Box::new(move |result| {
                if let Some(me) = me.upgrade() {
                    me.lock().answered(channel, drive, ticket, result);
                }
            }),
        );
    }

    fn answered(&mut self, channel: usize, drive: usize, ticket: u64, result: Result<Vec<u8>, BlockError>) {
        self.in_flight[channel] = self.in_flight[channel].saturating_sub(1);
        if ticket == self.ticket[channel] && self.channels[channel].has_asked() {
            if let Err(error) = &result {
                tracing::warn!(target: "ide", channel, drive, %error, "the medium failed a request");
            }
            self.channels[channel].completed(result.map_err(|_| ()));
        }
        self.sync(channel);
    }

    /// Moves what the drive has ready between buffer and memory; true if the drive can go on.
    fn move_dma(&mut self, channel: usize) -> bool {
        let c = &mut self.channels[channel];
        let to_memory = match c.state.phase {
            Phase::DmaIn => true,
            Phase::DmaOut => false,
            _ => return false,
        };
        let state = &mut c.state;
        if !BmCommand::from(state.bm.command).start() || !BmStatus::from(state.bm.status).active() {
            return false;
        }
        while state.pos < state.buffer.len() {
            let bm = &mut state.bm;
            if bm.left == 0 {
                // A table lies within 64 KiB, so a table without an end has one after all.
                if bm.last || bm.entry >= 0x1_0000 {
                    bm.status = BmStatus::from(bm.status).with_active(false).into();
                    c.dma_short();
                    return true;
                }
                let mut entry = [0; 8];
                self.wiring.pgm.read(GuestPhys(u64::from(bm.table) + u64::from(bm.entry)), &mut entry);
                bm.entry += 8;
                bm.address = u32::from_le_bytes([entry[0] & !1, entry[1], entry[2], entry[3]]);
                bm.left = match u16::from_le_bytes([entry[4] & !1, entry[5]]) {
                    0 => 0x1_0000,
                    count => count.into(),
                };
                bm.last = entry[7] & 0x80 != 0;
            }
            let count = (bm.left as usize).min(state.buffer.len() - state.pos);
            let piece = &mut state.buffer[state.pos..state.pos + count];
            let address = GuestPhys(bm.address.into());
            if to_memory {
                self.wiring.pgm.write(address, piece);
            } else {
                self.wiring.pgm.read(address, piece);
            }
            state.pos += count;
            bm.address = bm.address.wrapping_add(count as u32);
            bm.left -= count as u32;
        }
        c.dma_done();
        true
    }

    fn bus_master_read(&self, offset: u16) -> u8 {
        let bm = &self.channels[usize::from(offset >> 3 & 1)].state.bm;
        match offset & 7 {
            0 => bm.command,
            2 => bm.status,
            at @ 4..=7 => bm.table.to_le_bytes()[usize::from(at) - 4],
            _ => 0xff,
        }
    }

    fn bus_master_write(&mut self, offset: u16, value: u8) {
        let bm = &mut self.channels[usize::from(offset >> 3 & 1)].state.bm;
        match offset & 7 {
            0 => {
                let before = BmCommand::from(bm.command);
                let after = BmCommand::new().with_start(value & 1 != 0).with_to_memory(value & 8 != 0);
                bm.command = after.into();
                if after.start() && !before.start() {
                    (bm.entry, bm.left, bm.last) = (0, 0, false);
                    bm.status = BmStatus::from(bm.status).with_active(true).into();
                } else if !after.start() {
                    bm.status = BmStatus::from(bm.status).with_active(false).into();
                }
            }
            2 => {
                let written = BmStatus::from(value);
                let now = BmStatus::from(bm.status);
                bm.status = now
                    .with_capable(written.capable())
                    .with_error(now.error() && !written.error())
                    .with_interrupt(now.interrupt() && !written.interrupt())
                    .into();
            }
            at @ 4..=7 => {
                let mut bytes = bm.table.to_le_bytes();
                bytes[usize::from(at) - 4] = value;
                bm.table = u32::from_le_bytes(bytes) & !3;
            }
            _ => {}
        }
    }
}

/// A port's channel and register: 0–7 in the command block, 8 the control block.
fn decode(port: Port) -> (usize, u16) {
    let channel = usize::from(port.0 & 0x80 == 0);
    (channel, if port.0 & 0x200 != 0 { 8 } else { port.0 & 7 })
}

impl PortIo for Ide {
    fn port_read(&mut self, port: Port, width: Width) -> u32 {
        let (channel, register) = decode(port);
        let value = match register {
            0 => {
                let mut bytes = [0; 4];
                let len = usize::from(width.bytes());
                self.channels[channel].data_read(len, &mut bytes[..len]);
                u32::from_le_bytes(bytes)
            }
            8 => return self.channels[channel].alternate_status().into(),
            _ => self.channels[channel].read(register).into(),
        };
        self.sync(channel);
        value
    }

    fn port_write(&mut self, port: Port, width: Width, value: u32) {
        let (channel, register) = decode(port);
        let c = &mut self.channels[channel];
        match register {
            0 => {
                let len = usize::from(width.bytes());
                c.data_write(len, &value.to_le_bytes()[..len]);
            }
            7 => c.command(value as u8),
            8 => c.write_control(value as u8),
            _ => c.write(register, value as u8),
        }
        self.sync(channel);
    }

    fn port_read_string(&mut self, port: Port, width: Width, out: &mut [u8]) {
        let (channel, register) = decode(port);
        if register != 0 {
            for item in out.chunks_mut(width.bytes().into()) {
                let value = self.port_read(port, width).to_le_bytes();
                item.copy_from_slice(&value[..item.len()]);
            }
            return;
        }
        self.channels[channel].data_read(width.bytes().into(), out);
        self.sync(channel);
    }

    fn port_write_string(&mut self, port: Port, width: Width, data: &[u8]) {
        let (channel, register) = decode(port);
        if register != 0 {
            for item in data.chunks(width.bytes().into()) {
                let mut value = [0; 4];
                value[..item.len()].copy_from_slice(item);
                self.port_write(port, width, u32::from_le_bytes(value));
            }
            return;
        }
        self.channels[channel].data_write(width.bytes().into(), data);
        self.sync(channel);
    }
}

/// The bus master's ports; their place is the guest's choice.
struct BusMasterPorts(Arc<Mutex<Ide>>);

impl PortHandler for BusMasterPorts {
    fn read(&self, port: Port, width: Width) -> u32 {
        let ide = self.0.lock();
        let mut bytes = [0; 4];
        for (i, byte) in bytes.iter_mut().enumerate().take(width.bytes().into()) {
            *byte = ide.bus_master_read((port.0 & 15).wrapping_add(i as u16) & 15);
        }
        u32::from_le_bytes(bytes)
    }

    fn write(&self, port: Port, width: Width, value: u32) {
        let mut ide = self.0.lock();
        for (i, byte) in value.to_le_bytes().into_iter().enumerate().take(width.bytes().into()) {
            ide.bus_master_write((port.0 & 15).wrapping_add(i as u16) & 15, byte);
        }
        for channel in 0..2 {
            ide.sync(channel);
        }
    }

    fn read_string(&self, port: Port, width: Width, out: &mut [u8]) {
        for item in out.chunks_mut(width.bytes().into()) {
            let value = self.read(port, width).to_le_bytes();
            item.copy_from_slice(&value[..item.len()]);
        }
    }

    fn write_string(&self, port: Port, width: Width, data: &[u8]) {
        for item in data.chunks(width.bytes().into()) {
            let mut value = [0; 4];
            value[..item.len()].copy_from_slice(item);
            self.write(port, width, u32::from_le_bytes(value));
        }
    }
}

impl PciDevice for Ide {
    fn config_written(&mut self, _offset: u8, _width: Width, _space: &mut ConfigSpace) {}
}

impl Device for Ide {
    fn reset(&mut self) {
        for channel in 0..2 {
            self.channels[channel].reset();
            self.sync(channel);
        }
    }
}
