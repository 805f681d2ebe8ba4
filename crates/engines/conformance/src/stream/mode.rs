//! The modes programs run in, and the machine's layout in each.

use cpum::Descriptor;
use cpum::state::seg;

/// A processor mode with its way of paging and privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    Real,
    /// 16-bit segments at privilege 0.
    Protected16,
    /// 32-bit code in flat segments at privilege 0, without paging.
    Flat32,
    /// 32-bit code in segments with bases and limits at privilege 0.
    Segmented32,
    /// Flat 32-bit code at privilege 0 with two-level paging.
    Paged32,
    /// Flat 32-bit code at privilege 3 with PAE paging.
    User32,
    Kernel64,
    User64,
    /// Flat 32-bit code at privilege 3 in long mode.
    Compat32,
    /// 16-bit code at privilege 3 in long mode.
    Compat16,
}

// Layout of RAM.
pub const RAM: u64 = 0x10_0000;
/// Page tables, up to the monitor.
pub const TABLES: u64 = 0x1000;
/// The monitor's code: a stub of 16 bytes for each vector, then what they share.
pub const MONITOR: u64 = 0x1_0000;
pub const GDT: u64 = 0x1_8000;
pub const IDT: u64 = 0x1_9000;
pub const TSS: u64 = 0x1_a000;
/// What the next case starts from.
pub const STATE: u64 = 0x1_b000;
/// Tops of the stacks for privilege 0 and of interrupt stack 1.
pub const STACK0: u64 = 0x1_e000;
pub const IST: u64 = 0x1_f000;
/// Two pages of code, with data before and behind.
pub const PROGRAM: u64 = 0x2_0000;
pub const PROGRAM_LEN: u64 = 0x2000;
/// Sixteen pages of data.
pub const DATA: u64 = 0x3_0000;
pub const DATA_LEN: u64 = 0x1_0000;
pub const STACK: u64 = 0x5_0000;
pub const STACK_LEN: u64 = 0x4000;
/// Where the program goes on after a fault: written before each group, an offset in CS.
pub const RESUME: u64 = STACK + 0x100;
/// Rounds left.
pub const ROUNDS: u64 = STACK + 0x110;
/// Initial stack pointer.
pub const STACK_TOP: u64 = STACK + 0x3000;
/// The device's registers where there is paging.
pub const REGISTERS: u64 = 0xc_0000;

/// What a page of the data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    Plain,
    ReadOnly,
    Absent,
    Registers,
    Supervisor,
    /// The same memory as the data's first page.
    Alias,
    /// The same memory as the program's second page.
    CodeAlias,
}

/// Vector of the monitor's entry for the next case, and of the end of one.
pub const NEXT: u8 = 0xf0;
pub const END: u8 = 0x81;

// Selectors.
pub const MONITOR_CODE: u16 = 0x08;
pub const MONITOR_DATA: u16 = 0x10;
pub const CODE: u16 = 0x18;
pub const DATA_SELECTOR: u16 = 0x20;
pub const STACK_SELECTOR: u16 = 0x28;
pub const FS: u16 = 0x30;
pub const GS: u16 = 0x38;
pub const TASK: u16 = 0x40;
/// Selectors that programs try to load, first and last.
pub const ODD_FIRST: u16 = 0x50;
pub const ODD_LAST: u16 = 0x78;

/// A segment of the program.
#[derive(Clone, Copy, Debug)]
pub struct Seg {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
}

impl Mode {
    pub const ALL: [Self; 10] = [
        Self::Real,
        Self::Protected16,
        Self::Flat32,
        Self::Segmented32,
        Self::Paged32,
        Self::User32,
        Self::Kernel64,
        Self::User64,
        Self::Compat32,
        Self::Compat16,
    ];

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| format!("{m:?}").eq_ignore_ascii_case(name))
    }

    /// Width of the program's code.
    pub fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Protected16 | Self::Compat16 => 16,
            Self::Kernel64 | Self::User64 => 64,
            _ => 32,
        }
    }

    /// Width of the monitor's code.
    pub fn monitor_bits(self) -> u32 {
        match self {
            Self::Real => 16,
            _ if self.long() => 64,
            _ => 32,
        }
    }

    pub fn long(self) -> bool {
        matches!(self, Self::Kernel64 | Self::User64 | Self::Compat32 | Self::Compat16)
    }

    pub fn user(self) -> bool {
        matches!(self, Self::User32 | Self::User64 | Self::Compat32 | Self::Compat16)
    }

    pub fn cpl(self) -> u8 {
        if self.user() { 3 } else { 0 }
    }

    pub fn paged(self) -> bool {
        self.long() || matches!(self, Self::Paged32 | Self::User32)
    }

    /// Every segment starts at zero and reaches everywhere.
    pub fn flat(self) -> bool {
        matches!(
            self,
            Self::Flat32 | Self::Paged32 | Self::User32 | Self::Kernel64 | Self::User64 | Self::Compat32
        )
    }

    /// Exceptions push their frames on the program's own stack.
    pub fn shares_stack(self) -> bool {
        !self.long() && !self.user()
    }

    /// Linear address of the RAM's first byte.
    pub fn linear(self) -> u64 {
        match self {
            Self::Kernel64 => 0xffff_8a12_4000_0000,
            Self::User64 => 0x0000_6a12_4000_0000,
            Self::Flat32 | Self::Paged32 | Self::User32 | Self::Compat32 | Self::Compat16 => 0x5a80_0000,
            Self::Real | Self::Protected16 | Self::Segmented32 => 0,
        }
    }

    /// Physical address of the RAM's first byte.
    pub fn physical(self) -> u64 {
        if self == Self::Flat32 { 0x5a80_0000 } else { 0 }
    }

    /// The program's segment registers, by number; in 64-bit mode the bases that count.
    pub fn segment(self, which: usize) -> Seg {
        let rpl = u16::from(self.cpl());
        let selector = [DATA_SELECTOR, CODE, STACK_SELECTOR, DATA_SELECTOR, FS, GS][which] | rpl;
        let at = [DATA, PROGRAM, STACK, DATA, PROGRAM, DATA + 0x8000][which];
        let base = self.linear() + at;
        if self == Self::Real {
            return Seg { selector: (at >> 4) as u16, base: at, limit: 0xffff };
        }
        if self.bits() == 64 {
            let base = if matches!(which, seg::FS | seg::GS) { base } else { 0 };
            return Seg { selector, base, limit: u32::MAX };
        }
        if self.flat() {
            return Seg { selector, base: 0, limit: u32::MAX };
        }
        let limit = match (self, which) {
            (Self::Segmented32, seg::SS) => STACK_LEN as u32 - 1,
            (Self::Segmented32, seg::GS) => 0x7fff,
            (Self::Segmented32, seg::FS) => PROGRAM_LEN as u32 - 1,
            _ => 0xffff,
        };
        Seg { selector, base, limit }
    }

    /// Attributes of a program segment.
    pub fn attributes(self, which: usize) -> Descriptor {
        let code = which == seg::CS;
        let long = code && self.bits() == 64;
        Descriptor::new()
            .with_kind(if code { 11 } else { 3 })
            .with_code_or_data(true)
            .with_dpl(self.cpl())
            .with_present(true)
            .with_long(long)
            .with_big(!long && self.bits() != 16)
            .with_granular(self.flat())
    }

    /// What page `n` of the data is.
    pub fn page(self, n: u64) -> Page {
        match (n, self.paged()) {
            (8, _) => Page::ReadOnly,
            (11, _) => Page::Registers,
            (9, true) => Page::Absent,
            (12, true) if self.user() => Page::Supervisor,
            (13, true) => Page::Alias,
            // Wild addresses in 16-bit segments would reach the code through it.
            (14, true) if self.flat() => Page::CodeAlias,
            _ => Page::Plain,
        }
    }
}
