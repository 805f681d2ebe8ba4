//! Memory accesses that generated code cannot do by itself.
#![allow(unsafe_code)] // called from generated code with pointers to what the run loop borrows

use iem::core::{Who, canonical};
use iem::paging::Kind;

use crate::context::Context;
use crate::run::Rem;

/// Bit of a description: the instruction works on x87, SSE or AVX state.
pub(crate) const FP_SHIFT: u32 = 13;
const WRITES: u32 = 1 << 12;
const FP: u32 = 1 << FP_SHIFT;
pub(crate) const STACK: u32 = 1 << 14;
pub(crate) const GROUP: u32 = 1 << 15;
pub(crate) const SIZE_SHIFT: u32 = 16;
pub(crate) const SIZE_MASK: u32 = 0xfff;
/// Number of low bits that an aligned address has clear.
pub(crate) const ALIGN_SHIFT: u32 = 28;

/// Describes an access: the page offset of its instruction, its size, its alignment (a power of two), and what kind it is.
pub(crate) fn describe(offset: u16, size: u16, align: u16, writes: bool, fp: bool) -> u32 {
    u32::from(offset)
        | if writes { WRITES } else { 0 }
        | if fp { FP } else { 0 }
        | u32::from(size) << SIZE_SHIFT
        | align.trailing_zeros() << ALIGN_SHIFT
}

/// Describes a check of the stack page.
pub(crate) fn describe_stack(offset: u16, span: u16, writes: bool) -> u32 {
    describe(offset, span, 1, writes, false) | STACK
}

/// Describes a check of the page that a group of accesses lies in.
pub(crate) fn describe_group(offset: u16, span: u16, writes: bool) -> u32 {
    describe(offset, span, 1, writes, false) | GROUP
}

/// Kept pages change this often between two questions whether it is worth keeping them: a power of two, at most 256.
pub(crate) const MOVES: u32 = 64;
/// Cycles between two changes below which it is not, if that is so this often in a row for the same check.
const DENSE: u64 = 80;
const DENSE_ROW: u8 = 4;

/// Describes that question; the check's number takes the place of the address.
pub(crate) fn describe_moves(offset: u16, fp: bool) -> u32 {
    describe(offset, 0, 1, false, fp) | STACK | GROUP
}

/// Try the check again.
const RETRY: u64 = 0;
/// Have the instruction interpreted.
const INTERPRET: u64 = 1;
/// Leave: a fault was delivered.
pub(crate) const LEAVE: u64 = 2;
/// The page cannot be kept (any value above `LEAVE` goes on behind the call).
const NOT_KEPT: u64 = 3;

/// What generated code calls when a check fails: [`RETRY`], [`INTERPRET`], [`LEAVE`], or the host address to use this once.
pub(crate) extern "sysv64" fn access(rem: *mut Rem, address: u64, description: u32) -> u64 {
    // SAFETY: generated code passes the pointer that the run loop put into the context; the loop does not touch the engine
    // until generated code has returned.
    let rem = unsafe { &mut *rem };
    rem.follow_native_mode();
    if description & (STACK | GROUP) == STACK | GROUP {
        rem.places_move(address as u32)
    } else if description & STACK != 0 {
        rem.stack_page(address, description)
    } else if description & GROUP != 0 {
        rem.group_page(address, description)
    } else {
        rem.slow_access(address, description)
    }
}

/// When generated code told last that kept pages change often.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moves {
    /// The host's time-stamp counter.
    at: u64,
    /// The check it was, and how often in a row they changed densely there.
    number: u32,
    row: u8,
}

impl Rem {
    /// Tells the interpreter's memory access path of changes of the mode that generated code made.
    fn follow_native_mode(&mut self) {
        let context: *mut Context = self.context();
        // SAFETY: the context lives as long as the engine; the CPU state is the run loop's, which waits for generated code.
        unsafe {
            if (*context).resync != 0 {
                self.iem.core().update_mode(&*(*context).cpu);
            }
        }
    }

    fn slow_access(&mut self, address: u64, description: u32) -> u64 {
        self.stats.slow_accesses += 1;
        let size = u64::from(description >> SIZE_SHIFT & SIZE_MASK);
        let writes = description & WRITES != 0;
        let aligned = address & ((1 << (description >> ALIGN_SHIFT)) - 1) == 0;
        if !aligned || (address & 0xfff) + size > 0x1000 || self.iem.core().long && !canonical(address) {
            return INTERPRET;
        }
        let kind = if writes { Kind::Write } else { Kind::Read };
        // SAFETY: the run loop lent the state to generated code, which has handed it on to here.
        let cpu = unsafe { &mut *(*self.context()).cpu };
        let core = self.iem.core();
        let bank = core.bank;
        let (physical, frame) = match core.place(cpu, address, kind, Who::Explicit) {
            Ok((physical, Some(frame))) => (physical, frame),
            Ok((_, None)) => return INTERPRET,
            // Some stores take effect on registers before they fault.
            Err(_) if writes && description & FP != 0 => return INTERPRET,
            Err(fault) => {
                self.raise(cpu, fault);
                return LEAVE;
            }
        };
        if core.tlb.holds(bank, address, writes) {
            return if self.last_slow == (address, description) {
                INTERPRET
            } else {
                self.again(address, description)
            };
        }
        if writes && frame.writable {
            // A page with translated code: data between the code may be written as it is.
            let (memory, page) = core.frames.memory(frame);
            let at = physical & 0xfff;
            if memory.code_page(page).is_some_and(|c| !c.hits(at, at + size)) {
                memory.mark_dirty(page);
                self.stats.data_beside_code += 1;
                return core.frames.host_address(frame, at);
            }
        }
        INTERPRET
    }

    fn again(&mut self, address: u64, description: u32) -> u64 {
        self.last_slow = (address, description);
        RETRY
    }

    /// Kept pages have changed often. If they do so densely, the check that changed last is to go through the TLB.
    fn places_move(&mut self, number: u32) -> u64 {
        // SAFETY: the instruction has no preconditions.
        let now = unsafe { core::arch::x86_64::_rdtsc() };
        let dense = now.wrapping_sub(self.last_moves.at) < u64::from(MOVES) * DENSE;
        self.last_moves.at = now;
        if !dense {
            self.last_moves.row = 0;
            return RETRY;
        }
        if self.last_moves.number != number {
            self.last_moves.number = number;
            self.last_moves.row = 0;
        }
        self.last_moves.row += 1;
        if self.last_moves.row < DENSE_ROW {
            return RETRY;
        }
        self.last_moves.row = 0;
        self.without_place(number);
        // Leaves the loop.
        INTERPRET
    }

    /// Whether the bytes that a check is about lie in two pages, or in none.
    fn astride(&mut self, address: u64, description: u32) -> bool {
        let span = u64::from(description >> SIZE_SHIFT & SIZE_MASK);
        if (address & 0xfff) + span > 0x1000 {
            // SAFETY: the context lives as long as the engine.
            let number = unsafe { (*self.context()).check };
            self.not_kept(number as u32);
            return true;
        }
        self.iem.core().long && !canonical(address)
    }

    /// Fills the TLB for a group of accesses, if that can be done without a fault: which of them is made is not known yet.
    fn group_page(&mut self, address: u64, description: u32) -> u64 {
        self.stats.group_pages += 1;
        if self.astride(address, description) {
            return NOT_KEPT;
        }
        // SAFETY: as in `slow_access`.
        let cpu = unsafe { &*(*self.context()).cpu };
        let core = self.iem.core();
        let (bank, writes) = (core.bank, description & WRITES != 0);
        let kind = if writes { Kind::Write } else { Kind::Read };
        if !core.tlb.holds(bank, address, writes)
            && (core.place(cpu, address, kind, Who::Explicit).is_err()
                || !core.tlb.holds(bank, address, writes))
        {
            // SAFETY: the context lives as long as the engine.
            let number = unsafe { (*self.context()).check };
            self.not_kept(number as u32);
            return NOT_KEPT;
        }
        RETRY
    }

    fn stack_page(&mut self, address: u64, description: u32) -> u64 {
        self.stats.stack_pages += 1;
        if self.astride(address, description) {
            return NOT_KEPT;
        }
        let context: *mut Context = self.context();
        // SAFETY: as in `slow_access`.
        let cpu = unsafe { &*(*context).cpu };
        let core = self.iem.core();
        let bank = core.bank;
        if !core.tlb.holds(bank, address, true) {
            // Reads alone must not mark a page as written.
            let placed = description & WRITES != 0
                && core.place(cpu, address, Kind::Write, Who::Explicit).is_ok()
                && core.tlb.holds(bank, address, true);
            if !placed {
                return NOT_KEPT;
            }
        }
        let page = address & !0xfff;
        let Some(host) = core.tlb.host_page(bank, page) else { return NOT_KEPT };
        // SAFETY: the context lives as long as the engine; generated code is in this call.
        unsafe {
            (*context).stack_page = page;
            (*context).delta = host.wrapping_sub(page);
        }
        RETRY
    }
}
