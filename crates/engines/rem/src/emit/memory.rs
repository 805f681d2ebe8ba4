//! Guest memory: addresses, checks, and the host operands that they give.
//!
//! A check has the linear address in r15 and, if it passes, leaves in r14 the distance from linear to host addresses of the page:
//!
//! ```text
//! lea   r15, [address]                     lea   r15, [lowest address]
//! rorx  r14d, r15d, 7                      xor   r15, gs:[kept page]
//! and   r14d, index mask                   cmp   r15, 4096 - span
//! xor   r15, gs:[r14 + tag]                ja    cold
//! cmp   r15, 4096 - size                   mov   r14, gs:[kept distance]
//! ja    cold
//! mov   r14, gs:[r14 + distance]
//! ```
//!
//! The access then is at `[base + r14 + displacement]`, so that its address depends on the check's outcome only.

use iced_x86::{Instruction, Register};

use super::{Cold, Emitter, Flags, HIGH, READ_TAG, Sites, TLB_DELTA, WRITE_TAG, home};
use crate::asm::{Alu, Asm, M, cc, r};
use crate::context::{LIVE_SITES_AT, NO_STACK, SITES_AT, TLB_MASK, TLB_SHIFT, off};
use crate::groups::{Check, Group, Slot};
use crate::plan::{Item, StackCheck, high_number};
use crate::slow;

/// Code behind a check of a page that is kept from one round of a loop to the next.
pub(super) struct Place {
    site: usize,
    /// The jump of the alignment check.
    crooked: Option<usize>,
    retry: usize,
    access: usize,
    description: u32,
    saved: bool,
    /// Number of the site where the page is kept.
    number: u16,
    check: Check,
    at: u16,
    fp: bool,
    tag: i32,
}

/// Where a kept page's linear address stands in the context; the distance follows it.
fn slot_of(slot: Slot) -> i32 {
    match slot {
        Slot::Block(n) => off::PLACES + 16 * i32::from(n),
        Slot::Site(n) => SITES_AT as i32 + 16 * i32::from(n),
    }
}

impl Emitter<'_> {
    /// Brings a guest register's value to a host register; the one that holds it already, or `tmp`.
    pub(super) fn value(&mut self, register: Register, tmp: u8) -> u8 {
        Self::value_in(&mut self.hot, register, tmp)
    }

    fn value_in(asm: &mut Asm, register: Register, tmp: u8) -> u8 {
        match high_number(register) {
            Some(n) => {
                asm.load(tmp, M::Ctx(HIGH[n as usize]));
                tmp
            }
            None => home(register),
        }
    }

    /// Computes the memory operand's linear address plus `extra` into r15. Uses r14, and RFLAGS if there is a segment base.
    pub(super) fn address(&mut self, insn: &Instruction, extra: i32) {
        Self::address_in(&mut self.hot, self.mode.long, insn, extra);
    }

    fn address_in(asm: &mut Asm, long: bool, insn: &Instruction, extra: i32) {
        let base = insn.memory_base();
        let index = insn.memory_index();
        let disp = (insn.memory_displacement64() as i64).wrapping_add(extra.into());
        let wide = long && !base.is_gpr32() && !index.is_gpr32() && insn.memory_displ_size() != 4
            || long && base == Register::None && index == Register::None && insn.memory_displ_size() != 4;
        if base == Register::RIP {
            asm.load(r::S15, M::Ctx(off::PAGE));
            asm.lea(r::S15, M::At(r::S15, disp as i32));
        } else if base == Register::None && index == Register::None {
            Self::constant_in(asm, r::S15, if wide { disp as u64 } else { disp as u64 & 0xffff_ffff });
        } else {
            let m = match (base, index) {
                (_, Register::None) => M::At(Self::value_in(asm, base, r::S15), disp as i32),
                (Register::None, _) => {
                    let i = Self::value_in(asm, index, r::S14);
                    M::Scaled(i, insn.memory_index_scale().trailing_zeros() as u8, disp as i32)
                }
                _ => {
                    let b = Self::value_in(asm, base, r::S15);
                    let i = Self::value_in(asm, index, r::S14);
                    M::Index(b, i, insn.memory_index_scale().trailing_zeros() as u8, disp as i32)
                }
            };
            match m {
                M::At(b, 0) if wide => asm.mov(r::S15, b),
                _ if wide => asm.lea(r::S15, m),
                _ => asm.lea32(r::S15, m),
            }
        }
        let Some(segment) = segment_base(insn) else { return };
        asm.alu(Alu::Add, r::S15, M::Ctx(segment));
        if !long {
            asm.mov32(r::S15, r::S15);
        }
    }

    pub(super) fn constant(&mut self, to: u8, value: u64) {
        Self::constant_in(&mut self.hot, to, value);
    }

    fn constant_in(asm: &mut Asm, to: u8, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            asm.mov_imm32(to, v);
        } else if let Ok(v) = i32::try_from(value as i64) {
            asm.rr(true, &[0xc7], 0, to);
            asm.i32(v);
        } else {
            asm.bytes(&[0x48 | to >> 3, 0xb8 | to & 7]);
            asm.bytes(&value.to_le_bytes());
        }
    }

    /// The offset of the TLB entry for the address in `from` into r14.
    fn entry_in(asm: &mut Asm, bmi2: bool, from: u8) {
        if bmi2 {
            asm.rorx32(r::S14, from, TLB_SHIFT);
        } else {
            asm.mov32(r::S14, from);
            asm.shift_imm(5, false, r::S14, TLB_SHIFT);
        }
        asm.alu_imm(Alu::And, false, r::S14, TLB_MASK);
    }

    fn tag(&self, writes: bool) -> i32 {
        self.tlb() + if writes { WRITE_TAG } else { READ_TAG }
    }

    /// Looks the page at r15 up; gives the jumps taken if it is not there. r14 is the entry's offset, r15 that in the page.
    /// `from` holds the address, too.
    fn look_up(&mut self, from: u8, size: u16, align: u16, tag: i32) -> Sites {
        Self::entry_in(&mut self.hot, self.host.bmi2, from);
        let field = self.field(tag);
        self.hot.alu(Alu::Xor, r::S15, field);
        let mut sites = Sites::new();
        if align > 1 {
            sites.push(Self::crooked(&mut self.hot, align));
        }
        self.hot.alu_imm(Alu::Cmp, true, r::S15, 0x1000 - i32::from(size));
        sites.push(self.hot.jcc(cc::A));
        sites
    }

    /// Jumps if r15 is not aligned.
    fn crooked(asm: &mut Asm, align: u16) -> usize {
        asm.bytes(&[0x41, 0xf6, 0xc7, (align - 1) as u8]); // test r15b, align - 1
        asm.jcc(cc::NE)
    }

    /// Turns the linear address in r15 into a host address, for an access that `item` describes. `retry` is where its
    /// computation starts. Flags must have been taken care of.
    pub(super) fn translate(&mut self, item: &Item, retry: usize, size: u16, writes: bool, align: u16) {
        let tag = self.tag(writes);
        let sites = self.look_up(r::S15, size, align, tag);
        let field = self.field(tag);
        self.hot.alu(Alu::Xor, r::S15, field);
        let field = self.field(self.tlb() + TLB_DELTA);
        self.hot.alu(Alu::Add, r::S15, field);
        let access = self.hot.at();
        self.colds.push(Cold::Slow {
            sites,
            retry,
            access,
            description: slow::describe(item.offset, size, align, writes, item.fp),
            saved: self.flags == Flags::Saved,
            tag,
        });
    }

    /// Checks an access of the instruction's own and gives its host operand, in r15 alone if r14 is wanted for something else.
    pub(super) fn access(&mut self, item: &Item, r14_wanted: bool) -> M {
        if !self.near_form(&item.insn) {
            self.s14 = true;
            if self.mode.segments.is_some() {
                self.segment_access(item, item.size, item.writes);
                return M::At(r::S15, 0);
            }
            self.clobber(item.live_in);
            let retry = self.hot.at();
            self.address(&item.insn, 0);
            self.translate(item, retry, item.size, item.writes, item.align);
            return M::At(r::S15, 0);
        }
        match item.group {
            Some(group) => {
                match group.check {
                    Some(check) => match group.slot {
                        Slot::Site(site) => self.check_place(item, site, check),
                        Slot::Block(_) => self.check_group(item, group, check),
                    },
                    None if self.kept == Some(group.slot) => {}
                    None => self.hot.load(r::S14, M::Ctx(slot_of(group.slot) + 8)),
                }
                self.kept = Some(group.slot);
            }
            None => {
                self.check_one(item);
                self.kept = None;
                self.s14 = true;
            }
        }
        let m = self.operand(&item.insn);
        if r14_wanted {
            self.s14 = true;
            self.hot.lea(r::S15, m);
            return M::At(r::S15, 0);
        }
        m
    }

    /// The operand's address is of 64 bits, and its displacement of 32.
    fn near_form(&self, insn: &Instruction) -> bool {
        let full = |r: Register| r == Register::None || r == Register::RIP || r.is_gpr64();
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let none = base == Register::None && index == Register::None;
        self.mode.long
            && full(base)
            && full(index)
            && !(none && insn.memory_displ_size() == 4)
            && i32::try_from(insn.memory_displacement64() as i64).is_ok()
    }

    /// The host operand of an access in the page whose distance is in r14. May use r15, and change r14.
    fn operand(&mut self, insn: &Instruction) -> M {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64() as i32;
        if let Some(segment) = segment_base(insn) {
            // Only behind a check of its own: RFLAGS is free.
            self.hot.alu(Alu::Add, r::S14, M::Ctx(segment));
        }
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        match (base, index) {
            (Register::None, Register::None) => M::At(r::S14, disp),
            (Register::RIP, _) => {
                self.hot.load(r::S15, M::Ctx(off::PAGE));
                M::Index(r::S15, r::S14, 0, disp)
            }
            (_, Register::None) => {
                let b = self.value(base, r::S15);
                M::Index(b, r::S14, 0, disp)
            }
            (Register::None, _) => {
                let i = self.value(index, r::S15);
                M::Index(r::S14, i, scale, disp)
            }
            _ => {
                self.s14 = true;
                let b = self.value(base, r::S15);
                self.hot.lea(r::S14, M::Index(r::S14, b, 0, 0));
                let i = self.value(index, r::S15);
                M::Index(r::S14, i, scale, disp)
            }
        }
    }

    fn check_one(&mut self, item: &Item) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn, 0);
        let tag = self.tag(item.writes);
        let sites = self.look_up(plain_base(&item.insn, 0), item.size, item.align, tag);
        let field = self.field(self.tlb() + TLB_DELTA);
        self.hot.load(r::S14, field);
        let access = self.hot.at();
        self.colds.push(Cold::Slow {
            sites,
            retry,
            access,
            description: slow::describe(item.offset, item.size, item.align, item.writes, item.fp),
            saved: self.flags == Flags::Saved,
            tag,
        });
    }

    /// Finds the page of a group.
    fn check_group(&mut self, item: &Item, group: Group, check: Check) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn, check.low);
        let tag = self.tag(check.writes);
        let sites = self.look_up(plain_base(&item.insn, check.low), check.span, 1, tag);
        let field = self.field(self.tlb() + TLB_DELTA);
        self.hot.load(r::S14, field);
        self.hot.store(M::Ctx(slot_of(group.slot) + 8), r::S14);
        for site in sites {
            self.colds.push(Cold::Group {
                site,
                retry,
                description: slow::describe_group(item.offset, check.span, check.writes),
                saved: self.flags == Flags::Saved,
                at: item.offset,
                tag,
            });
        }
    }

    /// Finds the page of a group, or of one access, that is mostly the same in each round of the loop.
    fn check_place(&mut self, item: &Item, number: u16, check: Check) {
        let slot = slot_of(Slot::Site(number));
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn, check.low);
        self.hot.alu(Alu::Xor, r::S15, M::Ctx(slot));
        let crooked = (item.align > 1).then(|| Self::crooked(&mut self.hot, item.align));
        self.hot.alu_imm(Alu::Cmp, true, r::S15, 0x1000 - i32::from(check.span));
        let site = self.hot.jcc(cc::A);
        self.hot.load(r::S14, M::Ctx(slot + 8));
        let access = self.hot.at();
        let description = if check.alone {
            slow::describe(item.offset, item.size, item.align, item.writes, item.fp)
        } else {
            slow::describe_group(item.offset, check.span, check.writes)
        };
        self.colds.push(Cold::Place(Place {
            site,
            crooked,
            retry,
            access,
            description,
            saved: self.flags == Flags::Saved,
            number,
            check,
            at: item.offset,
            fp: item.fp,
            tag: self.tag(check.writes),
        }));
    }

    /// What stands behind a check of a kept page: looks the page up in the TLB and keeps it.
    pub(super) fn place_cold(&mut self, place: Place) {
        let Place { site, crooked, retry, access, description, saved, number, check, at, fp, tag } = place;
        let delta = self.tlb() + TLB_DELTA;
        let slot = slot_of(Slot::Site(number));
        let askew = crooked.map(|site| {
            self.aim_hot(site);
            self.cold.alu(Alu::Xor, r::S15, M::Ctx(slot));
            self.cold.jmp()
        });
        self.aim_hot(site);
        self.cold.alu(Alu::Xor, r::S15, M::Ctx(slot));
        Self::entry_in(&mut self.cold, self.host.bmi2, r::S15);
        self.cold.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, tag));
        self.cold.alu_imm(Alu::Cmp, true, r::S15, 0x1000 - i32::from(check.span));
        let missed = self.cold.jcc(cc::A);
        // A site that held no page goes on the list of those that do.
        self.cold.rm(false, None, &[0x81], Alu::Cmp as u8, M::Ctx(slot + 4));
        self.cold.i32((NO_STACK >> 32) as i32);
        let held = self.cold.jcc_short(cc::NE);
        self.cold.load(r::S15, M::Ctx(off::LIVE_SITES));
        self.cold.rm(false, Some(0x66), &[0xc7], 0, M::CtxAt2(r::S15, LIVE_SITES_AT as i32));
        self.cold.bytes(&number.to_le_bytes());
        self.cold.rm(false, None, &[0xff], 0, M::Ctx(off::LIVE_SITES)); // inc dword
        self.cold.aim_short(held);
        self.cold.load(r::S15, M::CtxAt(r::S14, tag));
        self.cold.store(M::Ctx(slot), r::S15);
        self.cold.load(r::S14, M::CtxAt(r::S14, delta));
        self.cold.store(M::Ctx(slot + 8), r::S14);
        // Every so often the engine is asked whether keeping the page is worth it.
        self.cold.rm(false, None, &[0xff], 0, M::Ctx(off::MOVES)); // inc dword
        self.cold.rm(false, None, &[0xf6], 0, M::Ctx(off::MOVES)); // test byte, imm8
        self.cold.byte(slow::MOVES as u8 - 1);
        let often = self.cold.jcc(cc::E);
        self.cold_to_hot(access);

        let asked = self.first_place + self.places.len() as u32;
        self.cold.aim(often);
        self.cold.mov_imm32(r::S15, asked);
        self.slow_call(slow::describe_moves(at, fp), saved);
        self.slow_return(retry, None);

        self.places.push(at);
        self.cold.aim(missed);
        self.cold.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, tag));
        if let Some(site) = askew {
            self.cold.aim(site);
        }
        if check.alone {
            self.slow_call(description, saved);
            self.slow_return(retry, Some(access));
        } else {
            self.group_slow(description, saved);
            let beyond = self.slow_return(retry, None);
            self.plainly((self.hot_at + site) as u32, at, saved, beyond);
        }
    }

    pub(super) fn slow_call(&mut self, description: u32, saved: bool) {
        Self::swap_out(&mut self.cold, &self.swaps);
        self.cold.mov_imm32(r::S14, description);
        let thunk = if saved { self.thunks.slow_saved } else { self.thunks.slow_dead };
        self.cold_thunk(thunk, true);
    }

    /// What stands behind a slow call: where it returns to, and five bytes further on the way to the access, if it gives an address.
    /// Else the jump is given that stands there with registers in their places, if there is one.
    pub(super) fn slow_return(&mut self, retry: usize, access: Option<usize>) -> Option<usize> {
        if self.swaps.is_empty() {
            self.cold_to_hot(retry);
            if let Some(access) = access {
                self.cold_to_hot(access);
            }
            return None;
        }
        let again = self.cold.jmp();
        let beyond = match access {
            Some(access) => {
                Self::swap_in(&mut self.cold, &self.swaps);
                self.cold_to_hot(access);
                None
            }
            None => Some(self.cold.jmp()),
        };
        self.cold.aim(again);
        Self::swap_in(&mut self.cold, &self.swaps);
        self.cold_to_hot(retry);
        beyond
    }

    /// Asks for the page at r15, on behalf of the link that comes next.
    pub(super) fn group_slow(&mut self, description: u32, saved: bool) {
        let number = self.first_link + self.links.len() as u32;
        self.cold.store_imm32(M::Ctx(off::CHECK), number as i32);
        self.slow_call(description, saved);
    }

    /// Where a page cannot be kept: goes on at offset `at` with plain accesses. `check` is the displacement of the check's jump,
    /// `beyond` a jump to here with registers in their places.
    pub(super) fn plainly(&mut self, check: u32, at: u16, saved: bool, beyond: Option<usize>) {
        let plain = (self.cold_at + self.cold.at()) as u32;
        Self::swap_out(&mut self.cold, &self.swaps);
        if let Some(beyond) = beyond {
            self.cold.aim(beyond);
        }
        if saved {
            self.cold.restore_flags(r::S14, off::FLAGS);
        }
        let site = self.cold.jmp();
        debug_assert_eq!(site + 4, self.cold.at());
        let mode = crate::plan::Mode { plain: true, ..self.mode };
        self.link_stub(at, (self.cold_at + site) as u32, mode);
        if let Some(link) = self.links.last_mut() {
            link.check = Some((check, plain));
        }
    }

    /// Checks a stack access at RSP plus `offset`, and leaves its host address in r15.
    pub(super) fn checked_stack(&mut self, item: &Item, offset: i32, writes: bool) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        if self.mode.long {
            self.hot.lea(r::S15, M::At(r::GUEST_SP, offset));
        } else {
            self.hot.lea32(r::S15, M::At(r::GUEST_SP, offset));
        }
        self.translate(item, retry, self.word() as u16, writes, 1);
    }

    /// Makes sure that the kept stack page covers the accesses that follow.
    pub(super) fn stack_check(&mut self, item: &Item, check: StackCheck) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.hot.lea(r::S15, M::At(r::GUEST_SP, check.low));
        self.hot.alu(Alu::Xor, r::S15, M::Ctx(off::STACK_PAGE));
        self.hot.alu_imm(Alu::Cmp, true, r::S15, 0x1000 - check.span);
        let site = self.hot.jcc(cc::A);
        self.colds.push(Cold::Stack {
            site,
            retry,
            description: slow::describe_stack(item.offset, check.span as u16, check.writes),
            saved: self.flags == Flags::Saved,
            low: check.low,
            at: item.offset,
        });
    }

    /// The host operand of a stack access: covered by a check, or r15 after one of its own.
    pub(super) fn stack_operand(&mut self, item: &Item, offset: i32, writes: bool) -> M {
        if item.covered {
            M::Index(r::GUEST_SP, r::DELTA, 0, offset)
        } else {
            self.checked_stack(item, offset, writes);
            M::At(r::S15, 0)
        }
    }
}

/// A register that holds the operand's address plus `extra`: the guest's base itself if it is that, so that nothing waits for a copy.
fn plain_base(insn: &Instruction, extra: i32) -> u8 {
    let base = insn.memory_base();
    let alone = insn.memory_index() == Register::None
        && (insn.memory_displacement64() as i64).wrapping_add(extra.into()) == 0
        && segment_base(insn).is_none();
    if alone && base.is_gpr64() && high_number(base).is_none() { home(base) } else { r::S15 }
}

/// Where the base of the operand's segment stands in the context, if it has one.
fn segment_base(insn: &Instruction) -> Option<i32> {
    match insn.memory_segment() {
        Register::FS => Some(off::FS_BASE),
        Register::GS => Some(off::GS_BASE),
        _ => None,
    }
}
