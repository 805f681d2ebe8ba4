//! Registers and messages of MPT Fusion controllers. Source: LSI Fusion-MPT Message Passing Interface Specification 1.2 and 1.5.

use bitfield_struct::bitfield;

/// Offsets of the registers, in ports and memory alike.
pub(super) mod reg {
    pub(in super::super) const DOORBELL: u32 = 0x00;
    pub(in super::super) const WRITE_SEQUENCE: u32 = 0x04;
    pub(in super::super) const HOST_DIAGNOSTIC: u32 = 0x08;
    pub(in super::super) const INTERRUPT_STATUS: u32 = 0x30;
    pub(in super::super) const INTERRUPT_MASK: u32 = 0x34;
    pub(in super::super) const REQUEST_QUEUE: u32 = 0x40;
    pub(in super::super) const REPLY_QUEUE: u32 = 0x44;
}

/// Bits of interrupt status and mask.
pub(super) mod interrupt {
    pub(in super::super) const DOORBELL: u32 = 1 << 0;
    pub(in super::super) const REPLY: u32 = 1 << 3;
    pub(in super::super) const MASK: u32 = DOORBELL | REPLY;
}

/// What software writes in turn to have the diagnostic register unlocked.
pub(super) const KEYS: [u8; 5] = [0x4, 0xb, 0x2, 0x7, 0xd];

/// Host diagnostic register.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct HostDiagnostic {
    #[bits(2)]
    __: u8,
    pub(super) reset_adapter: bool,
    #[bits(4)]
    __: u8,
    /// The register can be written.
    pub(super) write_enabled: bool,
    #[bits(24)]
    __: u32,
}

/// Doorbell register as it is read.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Doorbell {
    /// A reply's word, or a fault's code.
    pub(super) data: u16,
    #[bits(8)]
    __: u8,
    #[bits(3)]
    pub(super) who_init: u8,
    /// A function of the doorbell is under way.
    pub(super) active: bool,
    #[bits(4)]
    pub(super) state: u8,
}

/// Functions of the doorbell, in its upper byte.
pub(super) mod doorbell {
    pub(in super::super) const MESSAGE_UNIT_RESET: u8 = 0x40;
    pub(in super::super) const IO_UNIT_RESET: u8 = 0x41;
    pub(in super::super) const HANDSHAKE: u8 = 0x42;
    pub(in super::super) const REPLY_FRAME_REMOVAL: u8 = 0x43;
}

/// Functions of messages.
pub(super) mod function {
    pub(in super::super) const SCSI_IO: u8 = 0x00;
    pub(in super::super) const TASK_MANAGEMENT: u8 = 0x01;
    pub(in super::super) const IOC_INIT: u8 = 0x02;
    pub(in super::super) const IOC_FACTS: u8 = 0x03;
    pub(in super::super) const CONFIG: u8 = 0x04;
    pub(in super::super) const PORT_FACTS: u8 = 0x05;
    pub(in super::super) const PORT_ENABLE: u8 = 0x06;
    pub(in super::super) const EVENT_NOTIFICATION: u8 = 0x07;
    pub(in super::super) const EVENT_ACK: u8 = 0x08;
    pub(in super::super) const SAS_IO_UNIT_CONTROL: u8 = 0x1b;
}

/// Status of a message.
pub(super) mod ioc_status {
    pub(in super::super) const SUCCESS: u16 = 0x0000;
    pub(in super::super) const INVALID_FUNCTION: u16 = 0x0001;
    pub(in super::super) const INVALID_SGL: u16 = 0x0003;
    pub(in super::super) const INVALID_FIELD: u16 = 0x0007;
    pub(in super::super) const CONFIG_INVALID_ACTION: u16 = 0x0020;
    pub(in super::super) const CONFIG_INVALID_PAGE: u16 = 0x0022;
    pub(in super::super) const CONFIG_CANT_COMMIT: u16 = 0x0025;
    pub(in super::super) const INVALID_BUS: u16 = 0x0041;
    pub(in super::super) const INVALID_TARGET: u16 = 0x0042;
    pub(in super::super) const DEVICE_NOT_THERE: u16 = 0x0043;
    pub(in super::super) const DATA_UNDERRUN: u16 = 0x0045;
    pub(in super::super) const TASK_TERMINATED: u16 = 0x0048;
}

/// SCSI state of an error reply.
pub(super) mod scsi_state {
    pub(in super::super) const AUTOSENSE_VALID: u8 = 0x01;
    pub(in super::super) const NO_STATUS: u8 = 0x04;
    pub(in super::super) const TERMINATED: u8 = 0x08;
}

/// Task management.
pub(super) mod task {
    pub(in super::super) const ABORT_TASK: u8 = 1;
    pub(in super::super) const ABORT_TASK_SET: u8 = 2;
    pub(in super::super) const TARGET_RESET: u8 = 3;
    pub(in super::super) const BUS_RESET: u8 = 4;
    pub(in super::super) const UNIT_RESET: u8 = 5;
}

/// Events that the controller tells of.
pub(super) mod event {
    pub(in super::super) const CHANGE: u32 = 0x0a;
    pub(in super::super) const SAS_DEVICE_STATUS: u32 = 0x0f;
    /// Reasons of a change of a SAS device's status.
    pub(in super::super) const ADDED: u8 = 0x03;
    pub(in super::super) const NOT_RESPONDING: u8 = 0x04;
}

/// Flags of an element of a scatter/gather list, in the upper byte of its first word.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub(super) struct SgFlags {
    pub(super) end_of_list: bool,
    /// The address has 64 bits.
    pub(super) wide: bool,
    __: bool,
    __: bool,
    /// 1 for a piece of memory, 3 for the address of further elements.
    #[bits(2)]
    pub(super) kind: u8,
    pub(super) end_of_buffer: bool,
    pub(super) last_element: bool,
}

pub(super) const SG_SIMPLE: u8 = 1;
pub(super) const SG_CHAIN: u8 = 3;

/// A message as it lies in memory.
pub(super) struct Message([u8; Self::SIZE]);

impl Message {
    /// The longest request without its list: a task management request.
    pub(super) const SIZE: usize = 52;

    pub(super) fn new(bytes: [u8; Self::SIZE]) -> Self {
        Self(bytes)
    }

    pub(super) fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    pub(super) fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[at + i])
    }

    pub(super) fn function(&self) -> u8 {
        self.u8(3)
    }

    pub(super) fn context(&self) -> u32 {
        self.u32(8)
    }
}

/// A reply under construction: 20 bytes that all replies have, then what is added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply(pub(super) Vec<u8>);

impl Reply {
    /// A reply to `request`, of `words` words, with the request's first, fourth and fifth to eighth bytes.
    pub(super) fn to(request: &Message, words: usize, status: u16) -> Self {
        let mut bytes = vec![0; 4 * words.max(5)];
        bytes[..12].copy_from_slice(&request.bytes::<12>(0));
        bytes[2] = words as u8;
        bytes[14..16].copy_from_slice(&status.to_le_bytes());
        Self(bytes)
    }

    pub(super) fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
}
