//! Registers and FIS layouts. Sources: Serial ATA AHCI 1.1 sections 3 and 4, Serial ATA 2.6 section 10.3.

use bitfield_struct::bitfield;

/// Size of BAR 5: the global registers, and 128 bytes for each of 32 ports.
pub(super) const ABAR_SIZE: u64 = 0x2000;
/// Most ports, as in VirtualBox.
pub(super) const MAX_PORTS: usize = 30;
/// Command slots of each port.
pub(super) const SLOTS: u8 = 32;
/// First port's registers.
pub(super) const PORTS_AT: u32 = 0x100;
/// Bytes of registers of a port.
pub(super) const PORT_SIZE: u32 = 0x80;

/// Global registers.
pub(super) mod hba {
    pub(crate) const CAP: u32 = 0x00;
    pub(crate) const GHC: u32 = 0x04;
    pub(crate) const IS: u32 = 0x08;
    pub(crate) const PI: u32 = 0x0c;
    pub(crate) const VS: u32 = 0x10;

    /// 64-bit addresses, native command queuing, AHCI only, 3 Gb/s, 32 slots. The number of ports less one comes into the lowest
    /// bits. VirtualBox announces staggered spin-up, too, for which Linux looks at one port after another, a third of a second
    /// each.
    pub(crate) const CAPABILITIES: u32 = 1 << 31 | 1 << 30 | 1 << 18 | 2 << 20 | 31 << 8;
    /// AHCI 1.1.
    pub(crate) const VERSION: u32 = 0x0001_0100;
}

/// Global host control.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Ghc {
    /// Reset of the whole controller; reads as zero.
    pub(super) hr: bool,
    pub(super) ie: bool,
    #[bits(29)]
    __: u32,
    /// AHCI is enabled, always.
    pub(super) ae: bool,
}

/// Registers of a port.
pub(super) mod px {
    pub(crate) const CLB: u32 = 0x00;
    pub(crate) const CLBU: u32 = 0x04;
    pub(crate) const FB: u32 = 0x08;
    pub(crate) const FBU: u32 = 0x0c;
    pub(crate) const IS: u32 = 0x10;
    pub(crate) const IE: u32 = 0x14;
    pub(crate) const CMD: u32 = 0x18;
    pub(crate) const TFD: u32 = 0x20;
    pub(crate) const SIG: u32 = 0x24;
    pub(crate) const SSTS: u32 = 0x28;
    pub(crate) const SCTL: u32 = 0x2c;
    pub(crate) const SERR: u32 = 0x30;
    pub(crate) const SACT: u32 = 0x34;
    pub(crate) const CI: u32 = 0x38;
}

/// Interrupt status and enable bits of a port.
pub(super) mod interrupt {
    /// Device to host register FIS.
    pub(crate) const DHRS: u32 = 1 << 0;
    /// PIO setup FIS.
    pub(crate) const PSS: u32 = 1 << 1;
    /// Set device bits FIS.
    pub(crate) const SDBS: u32 = 1 << 3;
    /// Descriptor processed.
    pub(crate) const DPS: u32 = 1 << 5;
    /// Port connect change: shows DIAG.X of the error register.
    pub(crate) const PCS: u32 = 1 << 6;
    /// PhyRdy change: shows DIAG.N of the error register.
    pub(crate) const PRCS: u32 = 1 << 22;
    /// The device had more data than the table has room.
    pub(crate) const OFS: u32 = 1 << 24;
    /// Interface fatal error.
    pub(crate) const IFS: u32 = 1 << 27;
    /// Task file error.
    pub(crate) const TFES: u32 = 1 << 30;
    /// Bits of the enable register.
    pub(crate) const ENABLES: u32 = 0xfdc0_00ff;
}

/// Port command and status.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Cmd {
    pub(super) st: bool,
    pub(super) sud: bool,
    pub(super) pod: bool,
    /// Command list override: not offered by the capabilities.
    clo: bool,
    pub(super) fre: bool,
    #[bits(3)]
    __: u8,
    /// Slot of the command issued last.
    #[bits(5)]
    pub(super) ccs: u8,
    mpss: bool,
    pub(super) fr: bool,
    pub(super) cr: bool,
    #[bits(2)]
    __: u8,
    /// The port can be hot-plugged.
    pub(super) hpcp: bool,
    #[bits(13)]
    __: u16,
}

/// Bits of the command register that keep what software writes: ST, POD, FRE, ATAPI, DLAE, ALPE, ASP. SUD is always set (AHCI 1.3.1,
/// 3.3.7).
pub(super) const CMD_WRITABLE: u32 = 0x0f00_0015;

/// Error register: PhyRdy changed.
pub(super) const SERR_N: u32 = 1 << 16;
/// Error register: a device was found.
pub(super) const SERR_X: u32 = 1 << 26;
/// Error register: data did not fit (protocol error).
pub(super) const SERR_P: u32 = 1 << 10;

/// SStatus with a device at 3 Gb/s, active.
pub(super) const LINK_UP: u32 = 0x123;
/// Task file while nothing is there.
pub(super) const TFD_ABSENT: u32 = 0x7f;
/// Signature while nothing is there.
pub(super) const SIG_ABSENT: u32 = 0xffff_ffff;

/// FIS types.
pub(super) mod fis {
    pub(crate) const HOST_TO_DEVICE: u8 = 0x27;
    pub(crate) const DEVICE_TO_HOST: u8 = 0x34;
    pub(crate) const PIO_SETUP: u8 = 0x5f;
    pub(crate) const SET_DEVICE_BITS: u8 = 0xa1;
    /// In byte 1: the FIS is a command (host), raises an interrupt (device).
    pub(crate) const COMMAND: u8 = 0x80;
    pub(crate) const INTERRUPT: u8 = 0x40;
    pub(crate) const TO_HOST: u8 = 0x20;

    /// Places in the received-FIS structure.
    pub(crate) const PIO_SETUP_AT: u64 = 0x20;
    pub(crate) const DEVICE_TO_HOST_AT: u64 = 0x40;
    pub(crate) const SET_DEVICE_BITS_AT: u64 = 0x58;
}

/// Places in a command table.
pub(super) const ACMD_AT: u64 = 0x40;
pub(super) const PRDT_AT: u64 = 0x80;

/// First word of a command header.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Header {
    /// Length of the command FIS in dwords.
    #[bits(5)]
    pub(super) cfl: u8,
    #[bits(11)]
    __: u16,
    /// Entries of the descriptor table.
    #[bits(16)]
    pub(super) prdtl: u16,
}

/// ATA commands that only Serial ATA devices know.
pub(super) mod command {
    pub(crate) const READ_LOG_EXT: u8 = 0x2f;
    pub(crate) const READ_FPDMA_QUEUED: u8 = 0x60;
    pub(crate) const WRITE_FPDMA_QUEUED: u8 = 0x61;
}
