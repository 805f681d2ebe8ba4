//! System instructions: flags, privilege changes, segment and control registers.

use iced_x86::Register;

use super::{Cold, Emitter, Flags, HIGH, home};
use crate::asm::{Alu, M, cc, r};
use crate::context::{cpu, off};
use crate::plan::{Item, high_number};

impl Emitter<'_> {
    pub(super) fn byte_op(&mut self, op: Alu, m: M, value: u8) {
        self.hot.rm(false, None, &[0x80], op as u8, m);
        self.hot.byte(value);
    }

    /// Jumps if anything is raised for this vCPU; gives the jump. Overwrites RFLAGS.
    pub(super) fn wanted(&mut self) -> usize {
        self.hot.load(r::S14, M::Ctx(off::ACTIONS));
        self.hot.rm(false, None, &[0x83], Alu::Cmp as u8, M::At(r::S14, 0));
        self.hot.byte(0);
        self.hot.jcc(cc::NE)
    }

    pub(super) fn cold_interpret(&mut self, sites: Vec<usize>, item: &Item) {
        self.colds.push(Cold::Interpret { sites, offset: item.offset, saved: self.flags == Flags::Saved });
    }

    pub(super) fn set_interrupts(&mut self, item: &Item, on: bool) {
        self.clobber(item.live_in);
        self.hot.load(r::S14, M::Ctx(off::CPU));
        if on {
            self.byte_op(Alu::Or, M::At(r::S14, cpu::RFLAGS + 1), 2);
        } else {
            self.byte_op(Alu::And, M::At(r::S14, cpu::RFLAGS + 1), !2);
        }
    }

    /// The host register to put a guest register's new value in.
    pub(super) fn destination(&mut self, register: Register) -> u8 {
        if high_number(register).is_some() { r::S14 } else { home(register) }
    }

    /// Stores the value if the register has no home.
    pub(super) fn settle(&mut self, register: Register, from: u8) {
        if let Some(n) = high_number(register) {
            self.hot.store(M::Ctx(HIGH[n as usize]), from);
        }
    }

    /// The RFLAGS image in r14, from the saved arithmetic flags and the rest; overwrites r15 and RFLAGS.
    pub(super) fn rflags_image(&mut self) {
        const ARITH: i32 = 0x8d5;
        const RF_VM: i32 = 0x3_0000;
        self.hot.rm(false, None, &[0x0f, 0xb6], r::S14, M::Ctx(off::FLAGS + 1));
        self.hot.alu_imm(Alu::And, false, r::S14, ARITH & 0xff);
        self.hot.rm(false, None, &[0x0f, 0xb6], r::S15, M::Ctx(off::FLAGS));
        self.hot.shift_imm(4, false, r::S15, 11);
        self.hot.rr(false, &[0x0b], r::S14, r::S15);
        self.hot.load(r::S15, M::Ctx(off::CPU));
        self.hot.load(r::S15, M::At(r::S15, cpu::RFLAGS));
        self.hot.alu_imm(Alu::And, true, r::S15, !(ARITH | RF_VM));
        self.hot.rr(true, &[0x0b], r::S14, r::S15);
    }

    /// Moves the arithmetic flags of an RFLAGS image in r15 to the context; overwrites r14, r15 and RFLAGS.
    fn keep_arith(&mut self) {
        self.hot.rr(false, &[0x0f, 0xb6], r::S14, r::S15); // movzx r14d, r15b
        self.hot.shift_imm(4, false, r::S14, 8);
        self.hot.shift_imm(5, false, r::S15, 11);
        self.hot.alu_imm(Alu::And, false, r::S15, 1);
        self.hot.rr(false, &[0x0b], r::S15, r::S14);
        self.hot.store16(M::Ctx(off::FLAGS), r::S15);
        self.flags = Flags::Saved;
    }

    pub(super) fn pushf(&mut self, item: &Item) {
        self.here(crate::plan::ARITH);
        if self.flags == Flags::Here {
            self.hot.save_flags(r::S14, off::FLAGS);
        }
        self.flags = Flags::Saved;
        if item.covered {
            self.rflags_image();
            self.store_word(M::Index(r::GUEST_SP, r::DELTA, 0, -self.word()), r::S14);
        } else {
            self.checked_stack(item, -self.word(), true);
            self.hot.store(M::Ctx(off::TMP + 16), r::S15);
            self.rflags_image();
            self.hot.load(r::S15, M::Ctx(off::TMP + 16));
            self.store_word(M::At(r::S15, 0), r::S14);
        }
        self.move_sp(-self.word());
    }

    pub(super) fn popf(&mut self, item: &Item) {
        const QUIET: i32 = 0x8d5 | 0x202;
        let m = self.stack_operand(item, 0, false);
        self.hot.load32(r::S15, m);
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.load32(r::S14, M::At(r::S14, cpu::RFLAGS));
        self.hot.rr(false, &[0x33], r::S14, r::S15);
        self.hot.bytes(&[0x41, 0xf7, 0xc6]); // test r14d, imm32
        self.hot.i32(!QUIET);
        let mut sites = vec![self.hot.jcc(cc::NE)];
        self.hot.bytes(&[0x41, 0xf7, 0xc7]); // test r15d, imm32
        self.hot.i32(0x200);
        let off_skip = self.hot.jcc_short(cc::E);
        sites.push(self.wanted());
        self.hot.aim_short(off_skip);
        self.colds.push(Cold::Interpret { sites, offset: item.offset, saved: false });
        self.hot.rr(false, &[0x83], 1, r::S15); // or r15d, 2
        self.hot.byte(2);
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.store(M::At(r::S14, cpu::RFLAGS), r::S15);
        self.keep_arith();
        self.move_sp(self.word());
    }

    /// Puts the stack page that is kept for the running bank away. r13 is free until [`Emitter::enter_bank`].
    pub(super) fn leave_bank(&mut self, to: u8) {
        let from = i32::from(self.mode.bank);
        self.hot.load(r::S14, M::Ctx(off::STACK_PAGE));
        self.hot.store(M::Ctx(off::STACKS + 16 * from), r::S14);
        self.hot.store(M::Ctx(off::STACKS + 16 * from + 8), r::DELTA);
        self.hot.store_imm32(M::Ctx(off::BANK), to.into());
        self.hot.store_imm32(M::Ctx(off::RESYNC), 1);
    }

    pub(super) fn enter_bank(&mut self, to: u8) {
        let to = i32::from(to);
        self.hot.load(r::S14, M::Ctx(off::STACKS + 16 * to));
        self.hot.load(r::DELTA, M::Ctx(off::STACKS + 16 * to + 8));
        self.hot.store(M::Ctx(off::STACK_PAGE), r::S14);
        self.hot.store(M::Ctx(off::DELTA), r::DELTA);
    }

    /// Loads CS and SS of the CPU state at r14 from a pair in the context, through r13.
    pub(super) fn load_segments(&mut self, from: i32) {
        for (at, from) in [(cpu::CS, from), (cpu::SS, from + cpu::SEGMENT)] {
            for part in (0..cpu::SEGMENT).step_by(8) {
                self.hot.load(r::DELTA, M::Ctx(from + part));
                self.hot.store(M::At(r::S14, at + part), r::DELTA);
            }
        }
    }

    pub(super) fn syscall(&mut self, item: &Item, next: i64) {
        self.here(crate::plan::ARITH);
        if self.flags == Flags::Here {
            self.hot.save_flags(r::S14, off::FLAGS);
        }
        self.flags = Flags::Saved;
        self.hot.rm(false, None, &[0x83], Alu::Cmp as u8, M::Ctx(off::SYSCALL_OK));
        self.hot.byte(0);
        let site = self.hot.jcc(cc::E);
        self.cold_interpret(vec![site], item);
        self.rflags_image();
        self.hot.mov(11, r::S14);
        self.hot.load(r::RCX, M::Ctx(off::PAGE));
        self.hot.lea(r::RCX, M::At(r::RCX, next as i32));
        self.hot.alu(Alu::And, r::S14, M::Ctx(off::SYSCALL_KEEPS));
        self.hot.mov(r::S15, r::S14);
        self.leave_bank(0);
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.store(M::At(r::S14, cpu::RFLAGS), r::S15);
        self.load_segments(off::KERNEL_SEGMENTS);
        self.keep_arith();
        self.enter_bank(0);
        self.hot.load(r::S15, M::Ctx(off::LSTAR));
        Self::jump_indirect(&mut self.hot, Self::jumps_of(0));
    }

    pub(super) fn sysret(&mut self, item: &Item) {
        /// What R11 may hold here: arithmetic flags, IF, DF, IOPL, ID.
        const PLAIN: i32 = 0x8d5 | 0x202 | 0x400 | 0x3000 | 0x20_0000;
        let mut sites = Vec::new();
        self.hot.rm(false, None, &[0x83], Alu::Cmp as u8, M::Ctx(off::SYSRET_OK));
        self.hot.byte(0);
        sites.push(self.hot.jcc(cc::E));
        self.hot.mov(r::S15, 11);
        self.hot.bytes(&[0x41, 0xf7, 0xc7]); // test r15d, imm32
        self.hot.i32(!PLAIN);
        sites.push(self.hot.jcc(cc::NE));
        self.hot.bytes(&[0x41, 0xf7, 0xc7]);
        self.hot.i32(0x200);
        let skip = self.hot.jcc_short(cc::E);
        sites.push(self.wanted());
        self.hot.aim_short(skip);
        self.hot.mov(r::S14, r::RCX);
        self.hot.shift_imm(7, true, r::S14, 47);
        sites.push(self.hot.jcc(cc::NE));
        self.colds.push(Cold::Interpret { sites, offset: item.offset, saved: false });
        self.hot.alu_imm(Alu::And, false, r::S15, PLAIN);
        self.hot.rr(false, &[0x83], 1, r::S15); // or r15d, 2
        self.hot.byte(2);
        self.leave_bank(1);
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.store(M::At(r::S14, cpu::RFLAGS), r::S15);
        self.load_segments(off::USER_SEGMENTS);
        self.keep_arith();
        self.enter_bank(1);
        self.hot.mov(r::S15, r::RCX);
        Self::jump_indirect(&mut self.hot, Self::jumps_of(1));
    }
}
