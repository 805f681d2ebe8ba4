//! What generated code works on besides guest memory: one block of memory for each vCPU, reached through GS.
//!
//! The block starts with a [`Context`], goes on with the jump cache, and ends with the entries of the software TLB
//! (`iem::tlb`), which the interpreter uses, too.

use std::mem::offset_of;
use std::sync::atomic::AtomicU32;

use cpum::state::XsaveArea;
use cpum::{CpuState, Segment};
use iem::tlb::{ENGINE_BYTES, ENGINE_OWN, Entry};

/// A vector register: XMM, then the upper half of YMM where the host has that.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Vector(pub(crate) [u8; 32]);

/// Everything but tables.
#[repr(C)]
pub(crate) struct Context {
    /// Where state goes to and comes from memory in the XSAVE format.
    pub(crate) xsave: XsaveArea,
    /// The vector registers while Rust code runs; the x87 state stays in the unit.
    pub(crate) vectors: [Vector; 16],
    pub(crate) cpu: *mut CpuState,
    pub(crate) rem: *mut crate::run::Rem,
    /// `VcpuLink::kick_word`.
    pub(crate) kick: *const AtomicU32,
    /// The stack of the run loop, to return to.
    pub(crate) host_rsp: u64,
    /// Where to enter.
    pub(crate) entry: u64,
    /// Linear address of the page that the running code lies in.
    pub(crate) page: u64,
    /// Arithmetic flags as LAHF and SETO give them: AH is SF, ZF, AF, PF, CF; AL is OF.
    pub(crate) flags: u64,
    /// Guest r12 to r15.
    pub(crate) high: [u64; 4],
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    /// Page offset of the instruction that may raise a host exception.
    pub(crate) fault_offset: u64,
    /// Linear address of the stack page whose distance to host memory is `delta`, for reads and writes; or an address that no stack
    /// access has.
    pub(crate) stack_page: u64,
    pub(crate) delta: u64,
    pub(crate) tmp: [u64; 4],
    /// `VcpuLink::actions_word`.
    pub(crate) actions: *const AtomicU32,
    /// Not zero: the CPU's mode changed in generated code.
    pub(crate) resync: u64,
    /// Bank of TLB and jump cache that the running code uses.
    pub(crate) bank: u64,
    /// Stack pages and their distances, of the banks that are not in use.
    pub(crate) stacks: [[u64; 2]; JUMP_BANKS],
    /// Added to the host's time-stamp counter for the guest's.
    pub(crate) tsc_add: u64,
    /// Not zero: SYSCALL and SYSRET can be done in generated code.
    pub(crate) syscall_ok: u64,
    pub(crate) sysret_ok: u64,
    pub(crate) lstar: u64,
    /// RFLAGS bits that SYSCALL keeps.
    pub(crate) syscall_keeps: u64,
    /// The code and stack segments that SYSCALL and SYSRET load.
    pub(crate) kernel_segments: [Segment; 2],
    pub(crate) user_segments: [Segment; 2],
    /// Not zero: IRET can be done in generated code if it goes to code and stack of these selectors and the descriptors at this
    /// linear address are flat ones.
    pub(crate) iret_ok: u64,
    pub(crate) iret_selectors: [u64; 2],
    pub(crate) iret_descriptors: u64,
    /// Not zero: RAX and RDX are in `tmp[2]` and `tmp[3]` if the host raises an exception.
    pub(crate) masked: u64,
    /// Control registers of the floating-point units, for a look at them: MXCSR, FCW.
    pub(crate) control: [u32; 2],
    /// The link by which the code goes on if the check of a page at work fails.
    pub(crate) check: u64,
    /// Pages that groups of accesses of the block at work lie in: the distance to host memory is the second value.
    pub(crate) places: [[u64; 2]; PLACES],
    /// How often another page had to be kept at a site.
    pub(crate) moves: u64,
    /// Sites that hold a page.
    pub(crate) live_sites: u64,
    /// Bases of the guest's segments outside flat and 64-bit code, and the highest offsets that may be read and written: below zero
    /// if there are none.
    pub(crate) seg_base: [u64; 6],
    pub(crate) seg_read: [i64; 6],
    pub(crate) seg_write: [i64; 6],
    /// Base of the code segment there, and its number as in `page`: see [`CodeSegments`].
    pub(crate) code_base: u64,
    pub(crate) code_number: u64,
    /// Guest registers whose host registers hold r12 to r15, or `area`, while the loop at work runs, by those.
    pub(crate) swapped: [u64; 5],
    /// Address of this in the view at work.
    pub(crate) area: u64,
}

/// Groups of accesses that one block may have.
pub(crate) const PLACES: usize = 16;
/// Sites, at each of which a loop keeps the page that an access went to last: its linear address and the distance to host memory.
pub(crate) const SITES: usize = 1 << 14;

/// Offsets of the fields.
pub(crate) mod off {
    use super::{Context, offset_of};
    pub(crate) const VECTORS: i32 = offset_of!(Context, vectors) as i32;
    pub(crate) const CPU: i32 = offset_of!(Context, cpu) as i32;
    pub(crate) const REM: i32 = offset_of!(Context, rem) as i32;
    pub(crate) const KICK: i32 = offset_of!(Context, kick) as i32;
    pub(crate) const HOST_RSP: i32 = offset_of!(Context, host_rsp) as i32;
    pub(crate) const ENTRY: i32 = offset_of!(Context, entry) as i32;
    pub(crate) const PAGE: i32 = offset_of!(Context, page) as i32;
    pub(crate) const FLAGS: i32 = offset_of!(Context, flags) as i32;
    pub(crate) const HIGH: i32 = offset_of!(Context, high) as i32;
    pub(crate) const FS_BASE: i32 = offset_of!(Context, fs_base) as i32;
    pub(crate) const GS_BASE: i32 = offset_of!(Context, gs_base) as i32;
    pub(crate) const FAULT_OFFSET: i32 = offset_of!(Context, fault_offset) as i32;
    pub(crate) const STACK_PAGE: i32 = offset_of!(Context, stack_page) as i32;
    pub(crate) const DELTA: i32 = offset_of!(Context, delta) as i32;
    pub(crate) const TMP: i32 = offset_of!(Context, tmp) as i32;
    pub(crate) const CHECK: i32 = offset_of!(Context, check) as i32;
    pub(crate) const SWAPPED: i32 = offset_of!(Context, swapped) as i32;
    pub(crate) const SEG_BASE: i32 = offset_of!(Context, seg_base) as i32;
    pub(crate) const SEG_READ: i32 = offset_of!(Context, seg_read) as i32;
    pub(crate) const SEG_WRITE: i32 = offset_of!(Context, seg_write) as i32;
    pub(crate) const CODE_BASE: i32 = offset_of!(Context, code_base) as i32;
    pub(crate) const CODE_NUMBER: i32 = offset_of!(Context, code_number) as i32;
    pub(crate) const AREA: i32 = offset_of!(Context, area) as i32;
    pub(crate) const LIVE_SITES: i32 = offset_of!(Context, live_sites) as i32;
    pub(crate) const MOVES: i32 = offset_of!(Context, moves) as i32;
    pub(crate) const PLACES: i32 = offset_of!(Context, places) as i32;
    pub(crate) const ACTIONS: i32 = offset_of!(Context, actions) as i32;
    pub(crate) const RESYNC: i32 = offset_of!(Context, resync) as i32;
    pub(crate) const BANK: i32 = offset_of!(Context, bank) as i32;
    pub(crate) const STACKS: i32 = offset_of!(Context, stacks) as i32;
    pub(crate) const TSC_ADD: i32 = offset_of!(Context, tsc_add) as i32;
    pub(crate) const SYSCALL_OK: i32 = offset_of!(Context, syscall_ok) as i32;
    pub(crate) const SYSRET_OK: i32 = offset_of!(Context, sysret_ok) as i32;
    pub(crate) const LSTAR: i32 = offset_of!(Context, lstar) as i32;
    pub(crate) const SYSCALL_KEEPS: i32 = offset_of!(Context, syscall_keeps) as i32;
    pub(crate) const IRET_OK: i32 = offset_of!(Context, iret_ok) as i32;
    pub(crate) const IRET_SELECTORS: i32 = offset_of!(Context, iret_selectors) as i32;
    pub(crate) const IRET_DESCRIPTORS: i32 = offset_of!(Context, iret_descriptors) as i32;
    pub(crate) const MASKED: i32 = offset_of!(Context, masked) as i32;
    pub(crate) const CONTROL: i32 = offset_of!(Context, control) as i32;
    pub(crate) const KERNEL_SEGMENTS: i32 = offset_of!(Context, kernel_segments) as i32;
    pub(crate) const USER_SEGMENTS: i32 = offset_of!(Context, user_segments) as i32;
}

/// Offsets in the CPU state.
pub(crate) mod cpu {
    use cpum::state::{Segment, seg};

    use super::{CpuState, offset_of};
    pub(crate) const RFLAGS: i32 = offset_of!(CpuState, rflags) as i32;
    pub(crate) const SEGMENTS: i32 = offset_of!(CpuState, seg) as i32;
    pub(crate) const SEGMENT: i32 = size_of::<Segment>() as i32;
    pub(crate) const SELECTOR: i32 = offset_of!(Segment, selector) as i32;
    pub(crate) const BASE: i32 = offset_of!(Segment, base) as i32;
    pub(crate) const CS: i32 = SEGMENTS + seg::CS as i32 * SEGMENT;
    pub(crate) const SS: i32 = SEGMENTS + seg::SS as i32 * SEGMENT;
    pub(crate) const FS_BASE: i32 = SEGMENTS + seg::FS as i32 * SEGMENT + offset_of!(Segment, base) as i32;
    pub(crate) const GS_BASE: i32 = SEGMENTS + seg::GS as i32 * SEGMENT + offset_of!(Segment, base) as i32;
    const MSR: usize = offset_of!(CpuState, msr);
    pub(crate) const KERNEL_GS_BASE: i32 = (MSR + offset_of!(cpum::state::Msrs, kernel_gs_base)) as i32;
    pub(crate) const TSC_AUX: i32 = (MSR + offset_of!(cpum::state::Msrs, tsc_aux)) as i32;
    pub(crate) const CR0: i32 = offset_of!(CpuState, cr0) as i32;
    pub(crate) const CR2: i32 = offset_of!(CpuState, cr2) as i32;
    pub(crate) const CR3: i32 = offset_of!(CpuState, cr3) as i32;
    pub(crate) const CR4: i32 = offset_of!(CpuState, cr4) as i32;
}

/// An address that no stack access of fewer than a page's bytes has in its page.
pub(crate) const NO_STACK: u64 = 0x8000_0000_0000_0000;

/// One slot of the jump cache: code that was found at a linear address.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Jump {
    /// Linear address, negated.
    pub(crate) tag: u64,
    /// Host address of the block's checked entry, which compares the tag. Flags that matter are in the context.
    pub(crate) code: u64,
}

/// Set in addresses of code in segments, which have the segment's number and this above their 32 bits: no flat address has it alone.
pub(crate) const SEGMENTED: u64 = 1 << 62;

/// The linear address of a code address.
pub(crate) fn linear_part(address: u64) -> u64 {
    if address >> 62 == 1 { address & 0xffff_ffff } else { address }
}

/// Code segments by number.
#[derive(Default)]
pub(crate) struct CodeSegments {
    known: Vec<(u64, u16)>,
}

impl CodeSegments {
    const MOST: usize = 1 << 12;

    /// What is added to linear addresses of code in the segment with a base, for code of a kind. True if numbers start anew.
    pub(crate) fn number(&mut self, base: u64, kind: u16) -> (u64, bool) {
        let mut anew = false;
        // Those in use are few, and the last ones come again.
        let n = self.known.iter().rposition(|&k| k == (base, kind)).unwrap_or_else(|| {
            anew = self.known.len() == Self::MOST;
            if anew {
                self.known.clear();
            }
            self.known.push((base, kind));
            self.known.len() - 1
        });
        (SEGMENTED | (n as u64) << 32, anew)
    }
}

/// A page that an access went to: linear address ([`NO_STACK`] if none), and distance to host memory.
pub(crate) type Site = [u64; 2];

/// Slots in a bank of the jump cache; the index is the low 16 bits of the address.
pub(crate) const JUMPS: usize = 1 << 16;
/// Banks: as the TLB's, without the one that is never filled.
pub(crate) const JUMP_BANKS: usize = 3;
/// Offset of the jump cache in the block.
pub(crate) const JUMPS_AT: usize = 4096;
/// Offset of the sites, and of the numbers of those that hold a page.
pub(crate) const SITES_AT: usize = JUMPS_AT + JUMP_BANKS * JUMPS * size_of::<Jump>();
pub(crate) const LIVE_SITES_AT: usize = SITES_AT + SITES * size_of::<Site>();
/// Offset of the TLB's entries.
pub(crate) const TLB_AT: i32 = ENGINE_BYTES as i32;
/// Shift from a linear address to the offset of its entry, and the mask of that.
pub(crate) const TLB_SHIFT: u8 = 7;
pub(crate) const TLB_MASK: i32 = ((iem::tlb::ENTRIES - 1) * size_of::<Entry>()) as i32;

const _: () = {
    assert!(size_of::<Context>() <= JUMPS_AT);
    assert!(LIVE_SITES_AT + SITES * size_of::<u16>() <= ENGINE_BYTES);
    assert!(SITES <= 1 << 16);
    // The user's bank of the jump cache exists once for each address space.
    assert!(ENGINE_OWN.start == JUMPS_AT + JUMPS * size_of::<Jump>());
    assert!(ENGINE_OWN.end == JUMPS_AT + 2 * JUMPS * size_of::<Jump>());
    assert!(cpu::SEGMENT == 24);
    assert!(size_of::<Entry>() == 1 << (12 - TLB_SHIFT));
};
