//! Registers, commands and data structures. Source: NVM Express 1.2, sections 3 to 6; for the doorbell buffers 1.3, section 5.7.

use bitfield_struct::bitfield;

/// Size of BAR 0: registers, then doorbells from 0x1000 on.
pub(super) const BAR_SIZE: u64 = 0x4000;
pub(super) const DOORBELLS: u64 = 0x1000;
/// Pairs of I/O queues.
pub(super) const IO_QUEUES: u16 = 16;
/// Most entries of an I/O queue.
pub(super) const MAX_ENTRIES: u32 = 1024;
/// Most entries of the admin queues.
pub(super) const MAX_ADMIN_ENTRIES: u32 = 4096;
pub(super) const SQ_ENTRY: u64 = 64;
pub(super) const CQ_ENTRY: u64 = 16;
pub(super) const SECTOR: u64 = 512;
/// Largest transfer: 2^7 pages of 4 KiB.
pub(super) const MDTS: u8 = 7;
pub(super) const MAX_TRANSFER: usize = 4096 << MDTS;
/// NVM Express 1.2.
pub(super) const VERSION: u32 = 0x0001_0200;
/// Outstanding asynchronous event requests.
pub(super) const EVENT_REQUESTS: usize = 4;
/// Entries of the error log.
pub(super) const ERROR_ENTRIES: usize = 4;
/// Greatest page size: 4 KiB times two to this power.
pub(super) const MAX_PAGE_SHIFT: u8 = 4;

/// Controller registers.
pub(super) mod reg {
    pub(crate) const CAP: u64 = 0x00;
    pub(crate) const VS: u64 = 0x08;
    pub(crate) const INTMS: u64 = 0x0c;
    pub(crate) const INTMC: u64 = 0x10;
    pub(crate) const CC: u64 = 0x14;
    pub(crate) const CSTS: u64 = 0x1c;
    pub(crate) const AQA: u64 = 0x24;
    pub(crate) const ASQ: u64 = 0x28;
    pub(crate) const ACQ: u64 = 0x30;

    /// Entries, contiguous queues, ten seconds to become ready, NVM commands, pages of 4 to 64 KiB.
    pub(crate) const CAPABILITIES: u64 =
        (super::MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37 | (super::MAX_PAGE_SHIFT as u64) << 52;
}

/// Controller configuration.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Cc {
    pub(super) en: bool,
    #[bits(3)]
    __: u8,
    #[bits(3)]
    pub(super) css: u8,
    #[bits(4)]
    pub(super) mps: u8,
    #[bits(3)]
    pub(super) ams: u8,
    #[bits(2)]
    pub(super) shn: u8,
    #[bits(4)]
    pub(super) iosqes: u8,
    #[bits(4)]
    pub(super) iocqes: u8,
    #[bits(8)]
    __: u8,
}

/// Controller status.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub(super) struct Csts {
    pub(super) rdy: bool,
    /// Fatal: the configuration makes no sense.
    pub(super) cfs: bool,
    #[bits(2)]
    pub(super) shst: u8,
    #[bits(28)]
    __: u32,
}

/// Shutdown status.
pub(super) mod shutdown {
    pub(crate) const UNDER_WAY: u8 = 1;
    pub(crate) const COMPLETE: u8 = 2;
}

/// Admin commands.
pub(super) mod admin {
    pub(crate) const DELETE_SQ: u8 = 0x00;
    pub(crate) const CREATE_SQ: u8 = 0x01;
    pub(crate) const GET_LOG: u8 = 0x02;
    pub(crate) const DELETE_CQ: u8 = 0x04;
    pub(crate) const CREATE_CQ: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
    pub(crate) const SET_FEATURES: u8 = 0x09;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
    pub(crate) const ASYNC_EVENT: u8 = 0x0c;
    pub(crate) const DOORBELL_BUFFERS: u8 = 0x7c;
}

/// Commands of I/O queues.
pub(super) mod io {
    pub(crate) const FLUSH: u8 = 0x00;
    pub(crate) const WRITE: u8 = 0x01;
    pub(crate) const READ: u8 = 0x02;
    pub(crate) const WRITE_ZEROES: u8 = 0x08;
    pub(crate) const DATASET: u8 = 0x09;
}

/// Feature identifiers.
pub(super) mod feature {
    pub(crate) const ARBITRATION: u8 = 0x01;
    pub(crate) const POWER: u8 = 0x02;
    pub(crate) const TEMPERATURE: u8 = 0x04;
    pub(crate) const ERROR_RECOVERY: u8 = 0x05;
    pub(crate) const WRITE_CACHE: u8 = 0x06;
    pub(crate) const QUEUES: u8 = 0x07;
    pub(crate) const COALESCING: u8 = 0x08;
    pub(crate) const VECTOR: u8 = 0x09;
    pub(crate) const ATOMICITY: u8 = 0x0a;
    pub(crate) const EVENTS: u8 = 0x0b;
    /// Those that keep one dword, in the order in which it is kept.
    pub(crate) const KEPT: [u8; 8] =
        [ARBITRATION, POWER, TEMPERATURE, ERROR_RECOVERY, WRITE_CACHE, COALESCING, ATOMICITY, EVENTS];
    /// Their values after reset: no burst limit, warm at 343 K, the write cache on.
    pub(crate) const RESET: [u32; 8] = [7, 0, 0x157, 0, 1, 0, 0, 0];
    /// The bits that each keeps.
    pub(crate) const BITS: [u32; 8] = [0xffff_ff07, 0x1f, 0x003f_ffff, 0x1_ffff, 1, 0xffff, 1, 0xff];
}

/// Status codes: the type in bits 8 to 10, the code below.
pub(super) mod status {
    pub(crate) const SUCCESS: u16 = 0;
    pub(crate) const INVALID_OPCODE: u16 = 0x001;
    pub(crate) const INVALID_FIELD: u16 = 0x002;
    pub(crate) const INTERNAL: u16 = 0x006;
    pub(crate) const ABORT_REQUESTED: u16 = 0x007;
    pub(crate) const INVALID_NAMESPACE: u16 = 0x00b;
    pub(crate) const SEQUENCE: u16 = 0x00c;
    pub(crate) const PRP_OFFSET: u16 = 0x013;
    pub(crate) const LBA_RANGE: u16 = 0x080;
    pub(crate) const INVALID_CQ: u16 = 0x100;
    pub(crate) const INVALID_QUEUE: u16 = 0x101;
    pub(crate) const QUEUE_SIZE: u16 = 0x102;
    pub(crate) const EVENT_LIMIT: u16 = 0x105;
    pub(crate) const INVALID_VECTOR: u16 = 0x108;
    pub(crate) const INVALID_LOG: u16 = 0x109;
    pub(crate) const QUEUE_DELETION: u16 = 0x10c;
    pub(crate) const NOT_SAVEABLE: u16 = 0x10d;
    pub(crate) const READ_ONLY: u16 = 0x182;
    pub(crate) const WRITE_FAULT: u16 = 0x280;
    pub(crate) const READ_ERROR: u16 = 0x281;
    /// The command would fail again.
    pub(crate) const DO_NOT_RETRY: u16 = 1 << 14;
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sqe {
    pub(super) opcode: u8,
    /// Fused operation and data transfer kind.
    pub(super) flags: u8,
    pub(super) cid: u16,
    pub(super) nsid: u32,
    pub(super) prp1: u64,
    pub(super) prp2: u64,
    pub(super) dw10: u32,
    pub(super) dw11: u32,
    pub(super) dw12: u32,
}

impl Sqe {
    pub(super) fn parse(raw: &[u8; SQ_ENTRY as usize]) -> Self {
        let (dwords, _) = raw.as_chunks::<4>();
        let dw = |n: usize| dwords.get(n).map_or(0, |d| u32::from_le_bytes(*d));
        let qw = |n: usize| u64::from(dw(n)) | u64::from(dw(n + 1)) << 32;
        Self {
            opcode: dw(0) as u8,
            flags: (dw(0) >> 8) as u8,
            cid: (dw(0) >> 16) as u16,
            nsid: dw(1),
            prp1: qw(6),
            prp2: qw(8),
            dw10: dw(10),
            dw11: dw(11),
            dw12: dw(12),
        }
    }

    /// First block and number of blocks.
    pub(super) fn blocks(&self) -> (u64, u64) {
        (u64::from(self.dw10) | u64::from(self.dw11) << 32, u64::from(self.dw12 & 0xffff) + 1)
    }

    /// Force unit access.
    pub(super) fn fua(&self) -> bool {
        self.dw12 & 1 << 30 != 0
    }
}
