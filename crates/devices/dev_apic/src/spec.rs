//! Registers of the local APIC (Intel SDM volume 3, chapter 10 "Advanced Programmable Interrupt Controller") and of the
//! 82093AA I/O APIC (datasheet 290566, section 3).

use bitfield_struct::bitfield;

/// Offsets into the local APIC's page (table 10-1). An x2APIC MSR is 0x800 plus the offset divided by 16.
pub mod reg {
    pub const ID: u32 = 0x020;
    pub const VERSION: u32 = 0x030;
    pub const TPR: u32 = 0x080;
    pub const APR: u32 = 0x090;
    pub const PPR: u32 = 0x0a0;
    pub const EOI: u32 = 0x0b0;
    pub const RRD: u32 = 0x0c0;
    pub const LDR: u32 = 0x0d0;
    pub const DFR: u32 = 0x0e0;
    pub const SVR: u32 = 0x0f0;
    /// Eight registers of 32 bits each, 16 bytes apart; so are TMR and IRR.
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR_LOW: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERF: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    /// x2APIC only.
    pub const SELF_IPI: u32 = 0x3f0;
}

/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First and last x2APIC MSR.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
pub const MSR_X2APIC_LAST: u32 = 0x8ff;

/// Version register: an integrated APIC (0x14) with six LVT entries, as VirtualBox shows.
pub const LOCAL_VERSION: u32 = 5 << 16 | 0x14;

/// IA32_APIC_BASE bits.
pub mod base {
    pub const BSP: u64 = 1 << 8;
    /// EXTD: x2APIC mode.
    pub const X2APIC: u64 = 1 << 10;
    /// EN: the APIC is on.
    pub const ENABLE: u64 = 1 << 11;
    /// Physical address bits that can be set (a 40-bit CPU at least).
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Error status bits (10.5.3).
pub mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Spurious-interrupt vector register: software enable and focus checking; there is no EOI-broadcast suppression.
pub mod svr {
    pub const ENABLE: u32 = 1 << 8;
    pub const WRITABLE: u32 = 0x3ff;
    pub const RESET: u32 = 0xff;
}

/// Delivery modes, as they stand in LVT entries, the ICR and redirection entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    Fixed,
    LowestPriority,
    Smi,
    Reserved,
    Nmi,
    Init,
    StartUp,
    ExtInt,
}

impl DeliveryMode {
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }

    pub const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// What the timer's LVT entry selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl TimerMode {
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    pub const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// An entry of the local vector table (figure 10-8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Lvt {
    pub vector: u8,
    #[bits(3)]
    pub mode: DeliveryMode,
    _r0: bool,
    pub send_pending: bool,
    pub active_low: bool,
    pub remote_irr: bool,
    pub level: bool,
    pub masked: bool,
    #[bits(2)]
    pub timer_mode: TimerMode,
    #[bits(13)]
    _r1: u16,
}

/// Who gets an inter-processor interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    None,
    Me,
    All,
    Others,
}

impl Shorthand {
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::None,
            1 => Self::Me,
            2 => Self::All,
            _ => Self::Others,
        }
    }

    pub const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// The interrupt command register (figures 10-12 and 10-28).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Icr {
    pub vector: u8,
    #[bits(3)]
    pub mode: DeliveryMode,
    pub logical: bool,
    /// Delivery status: always idle, since delivery is immediate.
    pub busy: bool,
    _r0: bool,
    pub assert: bool,
    pub level: bool,
    #[bits(2)]
    _r1: u8,
    #[bits(2)]
    pub shorthand: Shorthand,
    #[bits(12)]
    _r2: u16,
    /// 32 bits in x2APIC mode; the top 8 in xAPIC mode.
    pub destination: u32,
}

/// Bits of the low half of the ICR that can be written.
pub const ICR_LOW_WRITABLE: u32 = 0x000c_cfff;

/// An entry of the I/O APIC's redirection table (82093AA, 3.2.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Redirection {
    pub vector: u8,
    #[bits(3)]
    pub mode: DeliveryMode,
    pub logical: bool,
    pub busy: bool,
    pub active_low: bool,
    pub remote_irr: bool,
    pub level: bool,
    pub masked: bool,
    #[bits(39)]
    _r: u64,
    pub destination: u8,
}

impl Redirection {
    /// Bits that the guest can write.
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
    /// Bits that have a meaning, for checking saved states.
    pub const DEFINED: u64 = Self::WRITABLE | 1 << 14;
}
