//! The I82078 floppy controller with up to two drives: ports 0x3f0–0x3f5 and 0x3f7, IRQ 6, DMA channel 2. Source: Intel
//! 290474-003 (82078 datasheet).
//!
//! **Media** are raw images of the usual layouts from 160 KB to 2.88 MB with sectors of 512 bytes. The layout follows from the
//! size; reading at another data rate than the medium's finds no address mark, so guests that try formats find the right one.
//!
//! **Left out.** Time: seeks and transfers end at once. SCAN commands are invalid, FORMAT fills a track but changes no layout,
//! deleted address marks are not kept, and of the second drive pair nothing is there. VirtualBox ends a transfer that runs into the
//! end of the cylinder without terminal count as a success; here it has the "end of cylinder" status of the datasheet.
//!
//! Requests to the medium are asynchronous: the controller is busy until they complete. Saving requires that they have.

mod chip;
mod saved;
mod spec;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pdm::connector::{BlockError, BlockOp, Medium};
use pdm::dma::IsaDma;
use pdm::iom::Iom;
use pdm::irq::IrqLine;
use pdm::{Device, PortIo, Width};
use vbox_types::Port;

use chip::{Chip, DriveFacts, MediumFacts, Phase, Request, SECTOR};
use spec::{Dor, MediaGeometry};

/// The DMA channel of PCs' floppy controllers.
const DMA_CHANNEL: u8 = 2;

/// Drive types, with the numbers CMOS and the ACPI tables know them by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DriveType {
    Kb360 = 1,
    Mb1_2 = 2,
    Kb720 = 3,
    Mb1_44 = 4,
    Mb2_88 = 5,
}

/// A drive to build in.
pub struct FloppyDrive {
    pub drive_type: DriveType,
    pub medium: Medium,
}

/// What the controller is wired to.
pub struct Wiring {
    /// IRQ 6.
    pub irq: IrqLine,
    pub dma: Arc<dyn IsaDma>,
}

/// A medium was given to a drive that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no floppy drive {0}")]
pub struct NoDrive(pub usize);

/// The floppy controller.
pub struct Floppy {
    wiring: Wiring,
    me: Weak<Mutex<Self>>,
    types: [Option<DriveType>; 2],
    media: [Medium; 2],
    chip: Chip,
    /// Numbers the requests; answers to any but the latest are dropped.
    ticket: u64,
    in_flight: u32,
}

fn facts(medium: &Medium) -> Option<MediumFacts> {
    let medium = medium.as_ref()?;
    let geometry = MediaGeometry::of(medium.size().0 / SECTOR as u64);
    Some(MediumFacts { geometry, read_only: medium.is_read_only() })
}

impl Floppy {
    pub fn new(wiring: Wiring, drives: [Option<FloppyDrive>; 2]) -> Arc<Mutex<Self>> {
        let mut all = [DriveFacts::default(); 4];
        let mut types = [None; 2];
        let mut media: [Medium; 2] = [None, None];
        for (index, drive) in drives.into_iter().enumerate() {
            if let Some(drive) = drive {
                all[index] = DriveFacts { present: true, medium: facts(&drive.medium) };
                types[index] = Some(drive.drive_type);
                media[index] = drive.medium;
            }
        }
        Arc::new_cyclic(|me| {
            Mutex::new(Self {
                wiring,
                me: me.clone(),
                types,
                media,
                chip: Chip::new(all),
                ticket: 0,
                in_flight: 0,
            })
        })
    }

    /// Plugs the controller into the machine. Port 0x3f6 belongs to the IDE controller.
    pub fn register(this: &Arc<Mutex<Self>>, iom: &Iom) {
        iom.register(Port(0x3f0), 6, Width::Byte, this.clone());
        iom.register(Port(0x3f7), 1, Width::Byte, this.clone());
    }

    /// The drive types, for CMOS byte 0x10 and the ACPI tables.
    pub fn drive_types(&self) -> [Option<DriveType>; 2] {
        self.types
    }

    /// Puts another medium into a drive, or takes it out.
    pub fn set_medium(&mut self, drive: usize, medium: Medium) -> Result<(), NoDrive> {
        if self.types.get(drive).is_none_or(Option::is_none) {
            return Err(NoDrive(drive));
        }
        self.chip.medium_changed(drive, facts(&medium));
        self.media[drive] = medium;
        Ok(())
    }

    /// Whether no request is with a medium.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Carries on after anything has changed: requests, DMA, interrupt line.
    fn sync(&mut self) {
        loop {
            if self.in_flight == 0
                && let Some((drive, request)) = self.chip.take_request()
            {
                self.submit(drive, request);
            }
            if !self.move_dma() {
                break;
            }
        }
        self.wiring.irq.set(self.chip.irq_level());
    }

    fn submit(&mut self, drive: usize, request: Request) {
        let Some(medium) = self.media.get(drive).cloned().flatten() else {
            self.chip.completed(Err(()));
            return;
        };
        self.ticket += 1;
        self.in_flight += 1;
        let ticket = self.ticket;
        let me = self.me.clone();
        let op = match request {
            Request::Read { offset, buffer } => BlockOp::Read { offset, buffer },
            Request::Write { offset, buffer } => BlockOp::Write { offset, buffer },
        };
        medium.submit(
            op,
            Box::new(move |result| {
                if let Some(me) = me.upgrade() {
                    me.lock().answered(drive, ticket, result);
                }
            }),
        );
    }

    fn answered(&mut self, drive: usize, ticket: u64, result: Result<Vec<u8>, BlockError>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if ticket == self.ticket && self.chip.has_asked() {
            if let Err(error) = &result {
                tracing::warn!(target: "floppy", drive, %error, "the medium failed a request");
            }
            self.chip.completed(result.map_err(|_| ()));
        }
        self.sync();
    }

    /// Moves the buffer through the DMA channel; true if the controller can go on.
    fn move_dma(&mut self) -> bool {
        if !Dor::from(self.chip.state.dor).gate() {
            return false;
        }
        let buffer = &mut self.chip.state.buffer;
        let outcome = match self.chip.state.phase {
            Phase::DmaIn => self.wiring.dma.write_memory(DMA_CHANNEL, buffer),
            Phase::DmaOut => self.wiring.dma.read_memory(DMA_CHANNEL, buffer),
            _ => return false,
        };
        let bytes = outcome.bytes.min(buffer.len());
        self.chip.moved(bytes, outcome.terminal_count);
        true
    }
}

impl PortIo for Floppy {
    fn port_read(&mut self, port: Port, _width: Width) -> u32 {
        let value = match port.0 & 7 {
            0 => self.chip.sra(),
            1 => self.chip.srb(),
            2 => self.chip.state.dor,
            3 => self.chip.state.tape,
            4 => self.chip.msr(),
            5 => {
                let value = self.chip.read_fifo();
                self.sync();
                value
            }
            _ => self.chip.dir(),
        };
        value.into()
    }

    fn port_write(&mut self, port: Port, _width: Width, value: u32) {
        let value = value as u8;
        match port.0 & 7 {
            2 => self.chip.write_dor(value),
            3 => self.chip.state.tape = value & 3,
            4 => self.chip.write_dsr(value),
            5 => self.chip.write_fifo(value),
            // Configuration control register.
            7 => self.chip.state.rate = value & 3,
            _ => {}
        }
        self.sync();
    }
}

impl Device for Floppy {
    fn reset(&mut self) {
        self.chip.reset();
        self.sync();
    }
}
