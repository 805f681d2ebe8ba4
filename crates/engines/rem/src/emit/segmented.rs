//! Code outside flat segments: 16-bit code, and 32-bit code in segments with bases or limits.
//!
//! Addresses are offsets that are checked against limits in the context and get a base from there, so that the same translation
//! serves whatever the segment registers hold. Instruction pointers are offsets, too; what stands in
//! [`Context::page`](crate::context::Context::page) and goes through the jump cache is the linear address, with a number for the
//! code segment above its 32 bits.
//!
//! ```text
//! lea   r15d, [offset]          movzx r15d, r15w if addresses have 16 bits
//! lea   r14, [r15 + size - 1]
//! cmp   r14, gs:[limit]         of the segment, for reads or writes; below zero if there are none
//! jg    cold
//! add   r15, gs:[base]
//! mov   r15d, r15d
//! ```

use iced_x86::{Code, Instruction, OpKind, Register};

use super::{Cold, Emitter, Sites, home};
use crate::asm::{Alu, M, cc, r};
use crate::context::{cpu, off};
use crate::plan::{Item, Kind};

/// The number of a segment register in the CPU state.
fn number(segment: Register) -> i32 {
    segment as i32 - Register::ES as i32
}

/// Whether the operand's address has 16 bits.
fn narrow(insn: &Instruction) -> bool {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    base.is_gpr16()
        || index.is_gpr16()
        || base == Register::None && index == Register::None && insn.memory_displ_size() == 2
}

impl Emitter<'_> {
    /// The operand's offset into r15, or its low 16 bits into r15w with the rest undefined; true if it has 16 bits.
    fn offset(&mut self, insn: &Instruction) -> bool {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement32() as i32;
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        match (base, index) {
            (Register::None, Register::None) => self.constant(r::S15, disp as u32 as u64),
            (_, Register::None) => self.hot.lea32(r::S15, M::At(home(base), disp)),
            (Register::None, _) => self.hot.lea32(r::S15, M::Scaled(home(index), scale, disp)),
            _ => self.hot.lea32(r::S15, M::Index(home(base), home(index), scale, disp)),
        }
        narrow(insn)
    }

    fn movzx16(&mut self, to: u8, from: u8) {
        self.hot.rr(false, &[0x0f, 0xb7], to, from);
    }

    fn mov16(&mut self, to: u8, from: u8) {
        self.hot.byte(0x66);
        self.hot.rr(false, &[0x8b], to, from);
    }

    /// Turns the offset in r15 into a linear address, checked for `size` bytes. Overwrites r14; flags must have been taken care of.
    fn in_segment(&mut self, item: &Item, segment: i32, size: u16, writes: bool) {
        let limits = if writes { off::SEG_WRITE } else { off::SEG_READ };
        self.hot.lea(r::S14, M::At(r::S15, i32::from(size) - 1));
        self.hot.alu(Alu::Cmp, r::S14, M::Ctx(limits + 8 * segment));
        let site = self.hot.jcc(cc::G);
        self.beyond(item, site);
        self.hot.alu(Alu::Add, r::S15, M::Ctx(off::SEG_BASE + 8 * segment));
        self.hot.mov32(r::S15, r::S15);
    }

    /// Has the instruction interpreted if the jump is taken.
    fn beyond(&mut self, item: &Item, site: usize) {
        let (sites, offset, saved) =
            (Sites::from_slice(&[site]), item.offset, self.flags == super::Flags::Saved);
        self.colds.push(if item.fp {
            Cold::InterpretFp { sites, offset, saved, reset: false }
        } else {
            Cold::Interpret { sites, offset, saved }
        });
    }

    /// The host address of the memory operand into r15.
    pub(super) fn segment_access(&mut self, item: &Item, size: u16, writes: bool) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        if self.offset(&item.insn) {
            self.movzx16(r::S15, r::S15);
        }
        self.in_segment(item, number(item.insn.memory_segment()), size, writes);
        self.translate(item, retry, size, writes, item.align);
    }

    /// The host address of `size` bytes on the stack into r15.
    fn on_stack(&mut self, item: &Item, offset: i32, size: u16, writes: bool) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.hot.lea32(r::S15, M::At(r::GUEST_SP, offset));
        if !self.big_stack() {
            self.movzx16(r::S15, r::S15);
        }
        self.in_segment(item, 2, size, writes);
        self.translate(item, retry, size, writes, 1);
    }

    fn big_stack(&self) -> bool {
        self.mode.segments.is_some_and(|s| s.big_stack)
    }

    fn move_stack(&mut self, by: i32) {
        let m = M::At(r::GUEST_SP, by);
        if self.big_stack() {
            self.hot.lea32(r::GUEST_SP, m);
        } else {
            self.hot.lea32(r::S14, m);
            self.mov16(r::GUEST_SP, r::S14);
        }
    }

    /// Stores r14 or another register, of 2 or 4 bytes, at r15.
    fn store_sized(&mut self, size: u16, from: u8) {
        if size == 2 {
            self.hot.store16(M::At(r::S15, 0), from)
        } else {
            self.hot.store32(M::At(r::S15, 0), from)
        }
    }

    /// Loads 2 or 4 bytes at r15, extended with zeros.
    fn load_sized(&mut self, to: u8, size: u16) {
        if size == 2 {
            self.hot.rm(false, None, &[0x0f, 0xb7], to, M::At(r::S15, 0)); // movzx
        } else {
            self.hot.load32(to, M::At(r::S15, 0));
        }
    }

    /// Makes sure that the offset in r15 is in the code segment.
    fn in_code(&mut self, item: &Item) {
        if item.size == 4 && self.mode.segments.is_some_and(|s| !s.big) {
            self.clobber(item.live_in);
            self.hot.alu_imm(Alu::Cmp, false, r::S15, 0xffff);
            let site = self.hot.jcc(cc::A);
            self.beyond(item, site);
        }
    }

    /// Goes to the offset in r15, which is inside the code segment; flags that matter are in the context.
    fn far_from_page(&mut self, live: u32) {
        self.clobber(live);
        self.hot.alu(Alu::Add, r::S15, M::Ctx(off::CODE_BASE));
        self.hot.mov32(r::S15, r::S15);
        self.hot.alu(Alu::Add, r::S15, M::Ctx(off::CODE_NUMBER));
        let jumps = self.jumps();
        Self::jump_indirect(&mut self.hot, jumps);
    }

    /// The offset of the instruction behind this one into r14.
    fn return_offset(&mut self, item: &Item, ip: i32) {
        let next = i32::from(item.offset) + item.insn.len() as i32;
        if self.mode.segments.is_some_and(|s| s.big) {
            self.hot.load32(r::S14, M::Ctx(off::PAGE));
            self.hot.lea32(r::S14, M::At(r::S14, next));
            self.hot.rm(false, None, &[0x2b], r::S14, M::Ctx(off::CODE_BASE)); // sub
        } else {
            self.hot.mov_imm32(r::S14, (ip + next) as u32);
        }
    }

    /// Translates an instruction that differs in segments; `None` for others. True if it ends the block.
    pub(super) fn segmented(&mut self, item: &Item) -> Option<bool> {
        let segments = self.mode.segments?;
        let insn = &item.insn;
        let size = item.size;
        match item.kind {
            Kind::Lea => {
                let to = insn.op0_register();
                let narrow = self.offset(insn);
                if to.size() == 2 {
                    self.mov16(home(to), r::S15);
                } else if narrow {
                    self.movzx16(home(to), r::S15);
                } else {
                    self.hot.mov32(home(to), r::S15);
                }
            }
            Kind::Push => {
                match insn.op0_kind() {
                    OpKind::Register => {
                        self.on_stack(item, -i32::from(size), size, true);
                        self.store_sized(size, home(insn.op0_register()));
                    }
                    OpKind::Memory => {
                        self.segment_access(item, size, false);
                        self.load_sized(r::S14, size);
                        self.hot.store(M::Ctx(off::TMP + 16), r::S14);
                        self.on_stack(item, -i32::from(size), size, true);
                        self.hot.load(r::S14, M::Ctx(off::TMP + 16));
                        self.store_sized(size, r::S14);
                    }
                    _ => {
                        self.on_stack(item, -i32::from(size), size, true);
                        self.hot.mov_imm32(r::S14, insn.immediate(0) as u32);
                        self.store_sized(size, r::S14);
                    }
                }
                self.move_stack(-i32::from(size));
            }
            Kind::Pop => {
                self.on_stack(item, 0, size, false);
                self.load_sized(r::S15, size);
                let to = home(insn.op0_register());
                if size == 2 {
                    self.mov16(to, r::S15)
                } else {
                    self.hot.mov32(to, r::S15)
                }
                self.move_stack(size.into());
            }
            Kind::Call(t) => {
                self.on_stack(item, -i32::from(size), size, true);
                self.return_offset(item, segments.ip);
                self.store_sized(size, r::S14);
                self.move_stack(-i32::from(size));
                self.go_from(t, item.live_out);
                return Some(true);
            }
            Kind::Ret => {
                self.on_stack(item, 0, size, false);
                self.load_sized(r::S15, size);
                self.in_code(item);
                let drop: i32 = if insn.op_count() == 1 { insn.immediate16().into() } else { 0 };
                self.move_stack(i32::from(size) + drop);
                self.far_from_page(item.live_out);
                return Some(true);
            }
            Kind::JmpIndirect | Kind::CallIndirect => {
                if insn.op0_kind() == OpKind::Register {
                    let from = home(insn.op0_register());
                    if size == 2 { self.movzx16(r::S15, from) } else { self.hot.mov32(r::S15, from) }
                } else {
                    self.segment_access(item, size, false);
                    self.load_sized(r::S15, size);
                }
                self.in_code(item);
                if item.kind == Kind::CallIndirect {
                    self.hot.store(M::Ctx(off::TMP + 16), r::S15);
                    self.on_stack(item, -i32::from(size), size, true);
                    self.return_offset(item, segments.ip);
                    self.store_sized(size, r::S14);
                    self.move_stack(-i32::from(size));
                    self.hot.load(r::S15, M::Ctx(off::TMP + 16));
                }
                self.far_from_page(item.live_out);
                return Some(true);
            }
            Kind::Loop(t) if insn.code() == Code::Loop_rel8_16_CX => {
                self.here(item.live_out);
                self.hot.lea32(r::S14, M::At(r::RCX, -1));
                self.mov16(r::RCX, r::S14);
                self.hot.mov(r::S14, r::RCX);
                self.movzx16(r::RCX, r::RCX);
                self.hot.bytes(&[0xe3, 0]); // jrcxz
                let skip = self.hot.at() - 1;
                self.hot.mov(r::RCX, r::S14);
                self.go_back(t, item.live_out);
                self.hot.aim_short(skip);
                self.hot.mov(r::RCX, r::S14);
            }
            Kind::LoadSegment => self.load_segment(item),
            _ => return None,
        }
        Some(false)
    }

    /// Loads a segment register other than CS in real mode: the base is the selector times sixteen, and the rest stays.
    fn load_segment(&mut self, item: &Item) {
        let insn = &item.insn;
        self.clobber(item.live_in);
        let segment = number(insn.op0_register());
        if insn.op_count() == 1 {
            // POP
            self.on_stack(item, 0, item.size, false);
            self.load_sized(r::S15, 2);
            self.move_stack(item.size.into());
        } else if insn.op1_kind() == OpKind::Memory {
            self.segment_access(item, 2, false);
            self.load_sized(r::S15, 2);
        } else {
            let from = home(insn.op1_register());
            self.movzx16(r::S15, from);
        }
        let at = cpu::SEGMENTS + segment * cpu::SEGMENT;
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.store16(M::At(r::S14, at + cpu::SELECTOR), r::S15);
        self.hot.shift_imm(4, false, r::S15, 4);
        self.hot.store(M::At(r::S14, at + cpu::BASE), r::S15);
        self.hot.store(M::Ctx(off::SEG_BASE + 8 * segment), r::S15);
    }
}
