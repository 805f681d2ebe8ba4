//! Register bits, commands and field layouts. Sources: ATA/ATAPI-6 (T13 1410D) sections 6–8, SFF-8020i and MMC-5 for packet
//! commands, Intel 82371FB/SB datasheet section 2.7 for the bus master.

use bitfield_struct::bitfield;

/// Status register bits.
pub(crate) mod status {
    pub(crate) const ERR: u8 = 1 << 0;
    pub(crate) const DRQ: u8 = 1 << 3;
    /// Seek complete.
    pub(crate) const DSC: u8 = 1 << 4;
    pub(crate) const DRDY: u8 = 1 << 6;
    pub(crate) const BSY: u8 = 1 << 7;
    /// What an idle drive shows.
    pub(crate) const READY: u8 = DRDY | DSC;
}

/// Error register bits.
pub(crate) mod error {
    pub(crate) const ABRT: u8 = 1 << 2;
    /// Sector not found: the address is outside the disk.
    pub(crate) const IDNF: u8 = 1 << 4;
    /// Uncorrectable data; for writes: write protected.
    pub(crate) const UNC: u8 = 1 << 6;
    /// Diagnostic code: device 0 passed (and device 1 passed or is not there).
    pub(crate) const DIAGNOSTIC_PASSED: u8 = 1;
}

/// Device control register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct Control {
    __: bool,
    /// Interrupts disabled.
    pub(crate) nien: bool,
    /// Software reset.
    pub(crate) srst: bool,
    #[bits(4)]
    __: u8,
    /// Reads show the previous content of the two-deep registers.
    pub(crate) hob: bool,
}

/// Device register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct DeviceHead {
    /// Head, or LBA bits 27–24.
    #[bits(4)]
    pub(crate) head: u8,
    /// Device 1 is selected.
    pub(crate) dev: bool,
    __: bool,
    pub(crate) lba: bool,
    __: bool,
}

/// Interrupt reason (the count register of packet devices).
pub(crate) mod reason {
    /// The transfer is a command packet.
    pub(crate) const COD: u8 = 1 << 0;
    /// The transfer goes to the host.
    pub(crate) const IO: u8 = 1 << 1;
}

/// Bus master command register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct BmCommand {
    pub(crate) start: bool,
    #[bits(2)]
    __: u8,
    /// Device to memory.
    pub(crate) to_memory: bool,
    #[bits(4)]
    __: u8,
}

/// Bus master status register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(crate) struct BmStatus {
    pub(crate) active: bool,
    pub(crate) error: bool,
    pub(crate) interrupt: bool,
    #[bits(2)]
    __: u8,
    /// Software's notes: drives set up for DMA.
    #[bits(2)]
    pub(crate) capable: u8,
    __: bool,
}

/// ATA commands.
pub(crate) mod command {
    pub(crate) const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub(crate) const DEVICE_RESET: u8 = 0x08;
    pub(crate) const READ_SECTORS: u8 = 0x20;
    pub(crate) const READ_SECTORS_ONCE: u8 = 0x21;
    pub(crate) const READ_SECTORS_EXT: u8 = 0x24;
    pub(crate) const READ_DMA_EXT: u8 = 0x25;
    pub(crate) const READ_NATIVE_MAX_EXT: u8 = 0x27;
    pub(crate) const READ_MULTIPLE_EXT: u8 = 0x29;
    pub(crate) const WRITE_SECTORS: u8 = 0x30;
    pub(crate) const WRITE_SECTORS_ONCE: u8 = 0x31;
    pub(crate) const WRITE_SECTORS_EXT: u8 = 0x34;
    pub(crate) const WRITE_DMA_EXT: u8 = 0x35;
    pub(crate) const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub(crate) const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub(crate) const VERIFY: u8 = 0x40;
    pub(crate) const VERIFY_ONCE: u8 = 0x41;
    pub(crate) const VERIFY_EXT: u8 = 0x42;
    pub(crate) const EXECUTE_DIAGNOSTIC: u8 = 0x90;
    pub(crate) const INITIALIZE_DEVICE_PARAMETERS: u8 = 0x91;
    pub(crate) const PACKET: u8 = 0xa0;
    pub(crate) const IDENTIFY_PACKET_DEVICE: u8 = 0xa1;
    pub(crate) const READ_MULTIPLE: u8 = 0xc4;
    pub(crate) const WRITE_MULTIPLE: u8 = 0xc5;
    pub(crate) const SET_MULTIPLE_MODE: u8 = 0xc6;
    pub(crate) const READ_DMA: u8 = 0xc8;
    pub(crate) const READ_DMA_ONCE: u8 = 0xc9;
    pub(crate) const WRITE_DMA: u8 = 0xca;
    pub(crate) const WRITE_DMA_ONCE: u8 = 0xcb;
    pub(crate) const WRITE_MULTIPLE_FUA_EXT: u8 = 0xce;
    pub(crate) const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub(crate) const IDLE_IMMEDIATE: u8 = 0xe1;
    pub(crate) const STANDBY: u8 = 0xe2;
    pub(crate) const IDLE: u8 = 0xe3;
    pub(crate) const CHECK_POWER_MODE: u8 = 0xe5;
    pub(crate) const SLEEP: u8 = 0xe6;
    pub(crate) const FLUSH_CACHE: u8 = 0xe7;
    pub(crate) const FLUSH_CACHE_EXT: u8 = 0xea;
    pub(crate) const IDENTIFY_DEVICE: u8 = 0xec;
    pub(crate) const SET_FEATURES: u8 = 0xef;
    pub(crate) const READ_NATIVE_MAX: u8 = 0xf8;
}
