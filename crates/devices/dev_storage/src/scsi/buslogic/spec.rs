//! Registers, commands and structures of MultiMaster host adapters. Source: BusLogic BT-948/958/958D Technical Reference Manual.

use bitfield_struct::bitfield;

/// Offsets of the registers.
pub(super) mod reg {
    /// Control, as written.
    pub(in super::super) const CONTROL: u8 = 0;
    /// Status, as read.
    pub(in super::super) const STATUS: u8 = 0;
    /// Command and parameters; data as read.
    pub(in super::super) const COMMAND: u8 = 1;
    pub(in super::super) const DATA_IN: u8 = 1;
    pub(in super::super) const INTERRUPT: u8 = 2;
}

/// Control register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(super) struct Control {
    #[bits(4)]
    __: u8,
    pub(super) bus_reset: bool,
    pub(super) interrupt_reset: bool,
    pub(super) soft_reset: bool,
    pub(super) hard_reset: bool,
}

/// Status register.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(super) struct Status {
    /// The last command was none, or had wrong parameters.
    pub(super) command_invalid: bool,
    __: bool,
    pub(super) data_in_ready: bool,
    pub(super) command_busy: bool,
    pub(super) ready: bool,
    /// There are no mailboxes.
    pub(super) initialization_required: bool,
    pub(super) diagnostic_failure: bool,
    pub(super) diagnostic_active: bool,
}

/// Interrupt register: one cause at a time.
pub(super) mod interrupt {
    pub(in super::super) const MAILBOX_LOADED: u8 = 1 << 0;
    pub(in super::super) const MAILBOX_FREE: u8 = 1 << 1;
    pub(in super::super) const COMMAND_COMPLETE: u8 = 1 << 2;
    pub(in super::super) const VALID: u8 = 1 << 7;
}

/// Geometry register: extended translation.
pub(super) const GEOMETRY: u8 = 0x80;

/// Adapter commands.
pub(super) mod command {
    pub(in super::super) const TEST_INTERRUPT: u8 = 0x00;
    pub(in super::super) const INITIALIZE_MAILBOX: u8 = 0x01;
    pub(in super::super) const EXECUTE_MAILBOX: u8 = 0x02;
    pub(in super::super) const INQUIRE_BOARD_ID: u8 = 0x04;
    pub(in super::super) const ENABLE_MAILBOX_FREE: u8 = 0x05;
    pub(in super::super) const SET_SELECTION_TIMEOUT: u8 = 0x06;
    pub(in super::super) const SET_PREEMPT_TIME: u8 = 0x07;
    pub(in super::super) const SET_TIME_OFF: u8 = 0x08;
    pub(in super::super) const SET_TRANSFER_RATE: u8 = 0x09;
    pub(in super::super) const INQUIRE_DEVICES_LOW: u8 = 0x0a;
    pub(in super::super) const INQUIRE_CONFIGURATION: u8 = 0x0b;
    pub(in super::super) const INQUIRE_SETUP: u8 = 0x0d;
    pub(in super::super) const ECHO: u8 = 0x1f;
    pub(in super::super) const SET_OPTIONS: u8 = 0x21;
    pub(in super::super) const INQUIRE_DEVICES_HIGH: u8 = 0x23;
    pub(in super::super) const INQUIRE_TARGETS: u8 = 0x24;
    pub(in super::super) const ENABLE_INTERRUPT: u8 = 0x25;
    pub(in super::super) const INITIALIZE_EXTENDED_MAILBOX: u8 = 0x81;
    pub(in super::super) const INQUIRE_VERSION_THIRD: u8 = 0x84;
    pub(in super::super) const INQUIRE_VERSION_LETTER: u8 = 0x85;
    pub(in super::super) const INQUIRE_PCI: u8 = 0x86;
    pub(in super::super) const INQUIRE_MODEL: u8 = 0x8b;
    pub(in super::super) const INQUIRE_SYNC_PERIOD: u8 = 0x8c;
    pub(in super::super) const INQUIRE_EXTENDED_SETUP: u8 = 0x8d;
    pub(in super::super) const STRICT_ROUND_ROBIN: u8 = 0x8f;
    pub(in super::super) const FETCH_LOCAL_RAM: u8 = 0x91;
    pub(in super::super) const MODIFY_IO_ADDRESS: u8 = 0x95;
    pub(in super::super) const SET_CCB_FORMAT: u8 = 0x96;

    /// Parameters of a command; none if there is no such command. SET OPTIONS has as many more as the first says.
    pub(in super::super) fn parameters(command: u8) -> Option<usize> {
        Some(match command {
            TEST_INTERRUPT
            | EXECUTE_MAILBOX
            | INQUIRE_BOARD_ID
            | INQUIRE_DEVICES_LOW
            | INQUIRE_CONFIGURATION => 0,
            INQUIRE_DEVICES_HIGH
            | INQUIRE_TARGETS
            | INQUIRE_VERSION_THIRD
            | INQUIRE_VERSION_LETTER
            | INQUIRE_PCI => 0,
            ENABLE_MAILBOX_FREE | SET_PREEMPT_TIME | SET_TIME_OFF | SET_TRANSFER_RATE | INQUIRE_SETUP
            | ECHO => 1,
            SET_OPTIONS | ENABLE_INTERRUPT | INQUIRE_MODEL | INQUIRE_SYNC_PERIOD | INQUIRE_EXTENDED_SETUP => {
                1
            }
            STRICT_ROUND_ROBIN | MODIFY_IO_ADDRESS | SET_CCB_FORMAT => 1,
            FETCH_LOCAL_RAM => 2,
            INITIALIZE_MAILBOX | SET_SELECTION_TIMEOUT => 4,
            INITIALIZE_EXTENDED_MAILBOX => 5,
            _ => return None,
        })
    }
}

/// What is to be done with an outgoing mailbox.
pub(super) mod action {
    pub(in super::super) const FREE: u8 = 0;
    pub(in super::super) const START: u8 = 1;
    pub(in super::super) const ABORT: u8 = 2;
}

/// What an incoming mailbox says of a command.
pub(super) mod completion {
    pub(in super::super) const FREE: u8 = 0;
    pub(in super::super) const GOOD: u8 = 1;
    pub(in super::super) const ABORTED: u8 = 2;
    pub(in super::super) const NOT_FOUND: u8 = 3;
    pub(in super::super) const ERROR: u8 = 4;
    pub(in super::super) const INVALID_CCB: u8 = 5;
}

/// Host adapter status of a command.
pub(super) mod adapter_status {
    pub(in super::super) const COMPLETED: u8 = 0x00;
    pub(in super::super) const SELECTION_TIMEOUT: u8 = 0x11;
    pub(in super::super) const INVALID_ACTION: u8 = 0x15;
    pub(in super::super) const INVALID_OPERATION: u8 = 0x16;
    pub(in super::super) const INVALID_PARAMETER: u8 = 0x1a;
    pub(in super::super) const DEVICE_RESET: u8 = 0x25;
    pub(in super::super) const ABORTED: u8 = 0x26;
}

/// Operation codes of command control blocks.
pub(super) mod operation {
    pub(in super::super) const INITIATOR: u8 = 0x00;
    pub(in super::super) const SCATTER_GATHER: u8 = 0x02;
    pub(in super::super) const RESIDUAL: u8 = 0x03;
    pub(in super::super) const RESIDUAL_SCATTER_GATHER: u8 = 0x04;
    pub(in super::super) const DEVICE_RESET: u8 = 0x81;
}

/// Bytes of a command control block with 32-bit addresses; those with 24 have 30, the same in many places.
pub(super) const CCB_SIZE: usize = 40;
/// Where both have adapter and device status, and the command descriptor block.
pub(super) const CCB_STATUS: u64 = 14;
pub(super) const CCB_CDB: usize = 18;
pub(super) const CDB_SIZE: usize = 12;

/// An address or length of three bytes, the highest first.
pub(super) fn be24(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]])
}

pub(super) fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The adapter's configuration, as FETCH HOST ADAPTER LOCAL RAM gives it from byte 64 on ("AutoSCSI").
pub(super) fn local_ram() -> [u8; 256] {
    let mut ram = [0; 256];
    let auto = &mut ram[64..128];
    auto[..3].copy_from_slice(b"FA\x40");
    auto[3..9].copy_from_slice(b"958D  ");
    // Level-sensitive interrupt; id 7; parity, fast negotiation, bus reset, active negotiation, terminated.
    auto[10] = 0x04;
    auto[14] = 7;
    auto[15] = 0xb7;
    (auto[16], auto[17]) = (7, 4);
    // BIOS with extended translation and more than two drives.
    auto[18] = 0x25;
    // Every device is enabled, and may use wide, fast and synchronous transfers, disconnect, and be started.
    auto[19..31].fill(0xff);
    // Ultra.
    auto[34..36].fill(0xff);
    auto[41] = 7;
    ram
}
