//! Registers and commands of the 82078. Source: Intel 290474-003 (82078 datasheet) sections 2, 5 and 6.

use bitfield_struct::bitfield;

/// Digital output register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct Dor {
    #[bits(2)]
    pub(crate) drive: u8,
    /// Low while the controller is held in reset.
    pub(crate) not_reset: bool,
    /// DMA requests and interrupts leave the chip.
    pub(crate) gate: bool,
    #[bits(4)]
    pub(crate) motors: u8,
}

/// Main status register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct Msr {
    /// Drives that are seeking.
    #[bits(4)]
    pub(crate) seeking: u8,
    pub(crate) command_busy: bool,
    /// The execution phase moves data without DMA.
    pub(crate) non_dma: bool,
    /// The host is to read the FIFO, not to write it.
    pub(crate) to_host: bool,
    /// The FIFO is ready.
    pub(crate) request: bool,
}

/// Status register 0.
pub(crate) mod st0 {
    /// The command was started and failed.
    pub(crate) const ABNORMAL: u8 = 0x40;
    pub(crate) const INVALID: u8 = 0x80;
    /// The drive's state changed while it was polled.
    pub(crate) const POLLED: u8 = 0xc0;
    pub(crate) const SEEK_END: u8 = 0x20;
    /// No track 0 signal: there is no drive.
    pub(crate) const EQUIPMENT_CHECK: u8 = 0x10;
}

/// Status register 1.
pub(crate) mod st1 {
    pub(crate) const MISSING_ADDRESS_MARK: u8 = 0x01;
    pub(crate) const NOT_WRITABLE: u8 = 0x02;
    pub(crate) const NO_DATA: u8 = 0x04;
    pub(crate) const OVERRUN: u8 = 0x10;
    pub(crate) const DATA_ERROR: u8 = 0x20;
    /// The transfer went past the last sector without terminal count.
    pub(crate) const END_OF_CYLINDER: u8 = 0x80;
}

/// Status register 2.
pub(crate) mod st2 {
    pub(crate) const DATA_ERROR: u8 = 0x20;
    pub(crate) const WRONG_CYLINDER: u8 = 0x10;
    /// A deleted sector where a normal one was wanted, or the other way round.
    pub(crate) const CONTROL_MARK: u8 = 0x40;
}

/// Status register 3.
pub(crate) mod st3 {
    pub(crate) const WRITE_PROTECTED: u8 = 0x40;
    pub(crate) const TRACK_0: u8 = 0x10;
    /// Bits that always read as one: ready, two sides.
    pub(crate) const ALWAYS: u8 = 0x28;
}

/// CONFIGURE: implied seek, disable FIFO, disable polling; FIFO threshold.
pub(crate) const CONFIGURE_IMPLIED_SEEK: u8 = 0x40;
pub(crate) const CONFIGURE_NO_FIFO: u8 = 0x20;
pub(crate) const CONFIGURE_NO_POLL: u8 = 0x10;

/// Answer to VERSION: enhanced controller.
pub(crate) const VERSION: u8 = 0x90;
/// Answer to PART ID.
pub(crate) const PART_ID: u8 = 0x41;

/// What a command byte asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    ReadTrack,
    Specify,
    SenseDriveStatus,
    Write,
    Read,
    Recalibrate,
    SenseInterrupt,
    WriteDeleted,
    ReadId,
    ReadDeleted,
    Format,
    DumpRegisters,
    Seek,
    /// The flag: towards higher cylinders.
    RelativeSeek(bool),
    Version,
    Perpendicular,
    Configure,
    /// The flag: lock, not unlock.
    Lock(bool),
    Verify,
    PowerDown,
    PartId,
    Option,
    Save,
    Restore,
    DriveSpecification,
    Invalid,
}

impl Command {
    /// Decodes a command byte; the multi-track, MFM and skip bits are free where a command has them.
    pub(crate) fn decode(byte: u8) -> Self {
        match byte {
            0x03 => Self::Specify,
            0x04 => Self::SenseDriveStatus,
            0x07 => Self::Recalibrate,
            0x08 => Self::SenseInterrupt,
            0x0e => Self::DumpRegisters,
            0x0f => Self::Seek,
            0x8f => Self::RelativeSeek(false),
            0xcf => Self::RelativeSeek(true),
            0x10 => Self::Version,
            0x12 => Self::Perpendicular,
            0x13 => Self::Configure,
            0x14 => Self::Lock(false),
            0x94 => Self::Lock(true),
            0x17 => Self::PowerDown,
            0x18 => Self::PartId,
            0x33 => Self::Option,
            0x2e => Self::Save,
            0x4e => Self::Restore,
            0x8e => Self::DriveSpecification,
            _ => match byte & 0x1f {
                0x02 if byte & 0x80 == 0 => Self::ReadTrack,
                0x05 if byte & 0x20 == 0 => Self::Write,
                0x06 => Self::Read,
                0x09 if byte & 0x20 == 0 => Self::WriteDeleted,
                0x0a if byte & 0xa0 == 0 => Self::ReadId,
                0x0c => Self::ReadDeleted,
                0x0d if byte & 0xa0 == 0 => Self::Format,
                0x16 => Self::Verify,
                _ => Self::Invalid,
            },
        }
    }

    /// Bytes of the command, the first one included.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::ReadTrack
            | Self::Write
            | Self::Read
            | Self::WriteDeleted
            | Self::ReadDeleted
            | Self::Verify => 9,
            Self::Format => 6,
            Self::Configure => 4,
            Self::Specify | Self::Seek | Self::RelativeSeek(_) => 3,
            Self::SenseDriveStatus
            | Self::Recalibrate
            | Self::ReadId
            | Self::Perpendicular
            | Self::PowerDown
            | Self::Option => 2,
            Self::Restore => 17,
            // One drive's worth; its last byte says "done".
            Self::DriveSpecification => 2,
            Self::SenseInterrupt
            | Self::DumpRegisters
            | Self::Version
            | Self::Lock(_)
            | Self::PartId
            | Self::Save
            | Self::Invalid => 1,
        }
    }
}

/// How a medium is laid out. All sectors have 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MediaGeometry {
    pub(crate) cylinders: u8,
    pub(crate) heads: u8,
    pub(crate) sectors: u8,
    pub(crate) density: Density,
}

/// What data rate a medium is recorded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Density {
    /// 250 kb/s, or 300 kb/s in a drive of 360 turns a minute.
    Double,
    /// 500 kb/s.
    High,
    /// 1 Mb/s.
    Extra,
}

impl Density {
    /// Whether the rate selected in CCR or DSR (0: 500, 1: 300, 2: 250 kb/s, 3: 1 Mb/s) reads it.
    pub(crate) fn matches(self, rate: u8) -> bool {
        match self {
            Self::Double => matches!(rate, 1 | 2),
            Self::High => rate == 0,
            Self::Extra => rate == 3,
        }
    }
}

const fn geometry(cylinders: u8, heads: u8, sectors: u8, density: Density) -> MediaGeometry {
    MediaGeometry { cylinders, heads, sectors, density }
}

/// The known layouts, smallest first.
const LAYOUTS: [MediaGeometry; 13] = [
    geometry(40, 1, 8, Density::Double),
    geometry(40, 1, 9, Density::Double),
    geometry(40, 2, 8, Density::Double),
    geometry(40, 2, 9, Density::Double),
    geometry(80, 2, 9, Density::Double),
    geometry(80, 2, 10, Density::Double),
    geometry(82, 2, 10, Density::Double),
    geometry(80, 2, 15, Density::High),
    geometry(80, 2, 18, Density::High),
    geometry(80, 2, 20, Density::High),
    geometry(80, 2, 21, Density::High),
    geometry(82, 2, 21, Density::High),
    geometry(80, 2, 36, Density::Extra),
];

impl MediaGeometry {
    pub(crate) const fn total(self) -> u32 {
        self.cylinders as u32 * self.heads as u32 * self.sectors as u32
    }

    /// The layout of a medium of so many sectors: the exact one, else the smallest that holds it, else the largest.
    pub(crate) fn of(sectors: u64) -> Self {
        *LAYOUTS.iter().find(|g| u64::from(g.total()) >= sectors).unwrap_or(&LAYOUTS[LAYOUTS.len() - 1])
    }
}
