//! System instructions: flags, privilege changes, segment and control registers.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Cold, Emitter, Flags, HIGH, Sites, home};
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

    pub(super) fn cold_interpret(&mut self, sites: Sites, item: &Item) {
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
        let mut sites = smallvec::smallvec![self.hot.jcc(cc::NE)];
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
        self.cold_interpret(smallvec::smallvec![site], item);
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
        let mut sites = Sites::new();
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

    /// Checks an access of the instruction's own and leaves its host address in r15.
    fn alone(&mut self, item: &Item) {
        if self.mode.segments.is_some() {
            self.segment_access(item, item.size, item.writes);
            return;
        }
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn, 0);
        self.translate(item, retry, item.size, item.writes, item.align);
    }

    /// Compares r14d with an immediate and jumps if it differs.
    fn unless(&mut self, value: i32) -> usize {
        self.hot.bytes(&[0x41, 0x81, 0xfe]);
        self.hot.i32(value);
        self.hot.jcc(cc::NE)
    }

    /// Compares r14 with memory and jumps if it differs.
    fn unless_equal(&mut self, m: M) -> usize {
        self.hot.rm(true, None, &[0x3b], r::S14, m);
        self.hot.jcc(cc::NE)
    }

    /// Tests bits of a byte in memory; gives a short jump over what follows if all are clear.
    fn if_any(&mut self, m: M, bits: u8) -> usize {
        self.hot.rm(false, None, &[0xf6], 0, m);
        self.hot.byte(bits);
        self.hot.jcc_short(cc::E)
    }

    /// IRET to 64-bit code at privilege 3.
    pub(super) fn iret(&mut self, item: &Item) {
        /// What the flags may hold: arithmetic flags, IF, DF, IOPL, ID; and RF, for which nobody asks in generated code.
        const PLAIN: i32 = 0x8d5 | 0x202 | 0x400 | 0x3000 | 0x20_0000;
        const RF: i32 = 0x1_0000;
        /// Flat data and 64-bit code segments at privilege 3, accessed.
        const DESCRIPTORS: [u64; 2] = [0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        self.flags = Flags::Here;
        let mut sites = Sites::new();
        self.hot.rm(false, None, &[0x83], Alu::Cmp as u8, M::Ctx(off::IRET_OK));
        self.hot.byte(0);
        sites.push(self.hot.jcc(cc::E));
        let retry = self.hot.at();
        self.hot.load(r::S15, M::Ctx(off::IRET_DESCRIPTORS));
        self.translate(item, retry, 16, false, 1);
        for (n, descriptor) in DESCRIPTORS.into_iter().enumerate() {
            self.constant(r::S14, descriptor);
            sites.push(self.unless_equal(M::At(r::S15, 8 * n as i32)));
        }
        let retry = self.hot.at();
        self.hot.mov(r::S15, r::GUEST_SP);
        self.translate(item, retry, 40, false, 1);
        for (n, at) in [8, 32].into_iter().enumerate() {
            self.hot.load(r::S14, M::At(r::S15, at));
            sites.push(self.unless_equal(M::Ctx(off::IRET_SELECTORS + 8 * n as i32)));
        }
        self.hot.load(r::S14, M::At(r::S15, 0));
        self.hot.shift_imm(5, true, r::S14, 47);
        sites.push(self.hot.jcc(cc::NE));
        self.hot.load32(r::S14, M::At(r::S15, 16));
        self.hot.bytes(&[0x41, 0xf7, 0xc6]); // test r14d, imm32
        self.hot.i32(!(PLAIN | RF));
        sites.push(self.hot.jcc(cc::NE));
        let skip = self.if_any(M::At(r::S15, 17), 2);
        sites.push(self.wanted());
        self.hot.aim_short(skip);
        self.colds.push(Cold::Interpret { sites, offset: item.offset, saved: false });
        self.leave_bank(1);
        self.hot.load(r::S14, M::At(r::S15, 0));
        self.hot.store(M::Ctx(off::TMP + 16), r::S14);
        self.hot.load(r::GUEST_SP, M::At(r::S15, 24));
        self.hot.load32(r::S15, M::At(r::S15, 16));
        self.hot.alu_imm(Alu::And, false, r::S15, PLAIN);
        self.hot.rr(false, &[0x83], 1, r::S15); // or r15d, 2
        self.hot.byte(2);
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.store(M::At(r::S14, cpu::RFLAGS), r::S15);
        self.load_segments(off::USER_SEGMENTS);
        self.keep_arith();
        self.enter_bank(1);
        self.hot.load(r::S15, M::Ctx(off::TMP + 16));
        Self::jump_indirect(&mut self.hot, Self::jumps_of(1));
    }

    /// MOV from a segment register.
    pub(super) fn selector(&mut self, item: &Item) {
        let insn = &item.insn;
        let at = cpu::SEGMENTS + insn.op1_register().number() as i32 * cpu::SEGMENT + cpu::SELECTOR;
        if insn.op0_kind() == OpKind::Memory {
            self.alone(item);
            self.hot.load(r::S14, M::Ctx(off::CPU));
            self.hot.rm(false, None, &[0x0f, 0xb7], r::S14, M::At(r::S14, at)); // movzx
            self.hot.store16(M::At(r::S15, 0), r::S14);
            return;
        }
        let register = insn.op0_register();
        self.hot.load(r::S15, M::Ctx(off::CPU));
        if register.size() > 2 {
            let to = self.destination(register);
            self.hot.rm(false, None, &[0x0f, 0xb7], to, M::At(r::S15, at));
            self.settle(register, to);
        } else if let Some(n) = high_number(register) {
            self.hot.rm(false, None, &[0x0f, 0xb7], r::S14, M::At(r::S15, at));
            self.hot.store16(M::Ctx(HIGH[n as usize]), r::S14);
        } else {
            self.hot.rm(false, Some(0x66), &[0x8b], home(register), M::At(r::S15, at));
        }
    }

    pub(super) fn read_base(&mut self, insn: &Instruction, gs: bool) {
        let register = insn.op0_register();
        let to = self.destination(register);
        let m = M::Ctx(if gs { off::GS_BASE } else { off::FS_BASE });
        if register.size() == 8 {
            self.hot.load(to, m)
        } else {
            self.hot.load32(to, m)
        }
        self.settle(register, to);
    }

    pub(super) fn write_base(&mut self, item: &Item, gs: bool) {
        let register = item.insn.op0_register();
        self.clobber(item.live_in);
        let from = self.value(register, r::S15);
        if register.size() == 8 {
            self.hot.mov(r::S15, from);
            self.hot.mov(r::S14, from);
            self.hot.shift_imm(4, true, r::S14, 16);
            self.hot.shift_imm(7, true, r::S14, 16);
            self.hot.rr(true, &[0x3b], r::S14, r::S15);
            let site = self.hot.jcc(cc::NE);
            self.cold_interpret(smallvec::smallvec![site], item);
        } else {
            self.hot.mov32(r::S15, from);
        }
        self.hot.load(r::S14, M::Ctx(off::CPU));
        self.hot.store(M::At(r::S14, if gs { cpu::GS_BASE } else { cpu::FS_BASE }), r::S15);
        self.hot.store(M::Ctx(if gs { off::GS_BASE } else { off::FS_BASE }), r::S15);
    }

    /// Has RAX and RDX, which are kept in the context, name no state components but those that guests have.
    fn mask_components(&mut self) {
        self.hot.store(M::Ctx(off::TMP + 16), r::RAX);
        self.hot.store(M::Ctx(off::TMP + 24), r::RDX);
        self.hot.alu_imm(Alu::And, false, r::RAX, 7);
        self.hot.rr(false, &[0x31], r::RDX, r::RDX);
    }

    fn unmask_components(&mut self) {
        self.hot.load(r::RAX, M::Ctx(off::TMP + 16));
        self.hot.load(r::RDX, M::Ctx(off::TMP + 24));
    }

    fn is_wide(insn: &Instruction) -> bool {
        matches!(
            insn.mnemonic(),
            Mnemonic::Xsave64 | Mnemonic::Xsaveopt64 | Mnemonic::Xsavec64 | Mnemonic::Xrstor64
        )
    }

    /// XSAVE and its variants: the state is in the host's unit. What tells of the host is overwritten.
    pub(super) fn xsave(&mut self, item: &Item, compact: bool) {
        const STATE_BV: i32 = 512;
        self.alone(item);
        self.mask_components();
        let opcode: &[u8] = if compact { &[0x0f, 0xc7] } else { &[0x0f, 0xae] };
        self.hot.rm(Self::is_wide(&item.insn), None, opcode, 4, M::At(r::S15, 0));
        let written = |e: &mut Self, bits: u8| {
            if compact {
                // Components in their initial state are not written.
                e.if_any(M::At(r::S15, STATE_BV), bits & 3)
            } else {
                e.hot.bytes(&[0xa8, bits]); // test al, bits
                e.hot.jcc_short(cc::E)
            }
        };
        // FOP, FIP, FDP.
        let skip = written(self, 1);
        self.hot.rm(false, Some(0x66), &[0xc7], 0, M::At(r::S15, 6));
        self.hot.bytes(&[0, 0]);
        for at in [8, 16] {
            self.hot.rm(true, None, &[0xc7], 0, M::At(r::S15, at));
            self.hot.i32(0);
        }
        self.hot.aim_short(skip);
        let skip = written(self, 6);
        self.hot.store_imm32(M::At(r::S15, 28), iem::unit::MXCSR_MASK as i32);
        self.hot.aim_short(skip);
        self.unmask_components();
    }

    /// XRSTOR of images that the host takes as the guest's CPU would and that leave all exceptions masked.
    pub(super) fn xrstor(&mut self, item: &Item) {
        const STATE_BV: i32 = 512;
        const LAYOUT: i32 = 520;
        const MASKS: i32 = 0x1f80;
        self.alone(item);
        let mut sites = Sites::new();
        let only_known = |e: &mut Self| {
            e.hot.bytes(&[0x49, 0xf7, 0xc6]); // test r14, imm32
            e.hot.i32(!7);
            e.hot.jcc(cc::NE)
        };
        self.hot.load(r::S14, M::At(r::S15, STATE_BV));
        sites.push(only_known(self));
        self.hot.load(r::S14, M::At(r::S15, LAYOUT));
        self.hot.rr(true, &[0x85], r::S14, r::S14); // test r14, r14
        let standard = self.hot.jcc_short(cc::E);
        self.hot.shift_imm(4, true, r::S14, 1);
        self.hot.shift_imm(5, true, r::S14, 1);
        sites.push(only_known(self));
        let initial = self.if_any(M::At(r::S15, STATE_BV), 2);
        self.hot.aim_short(standard);
        self.hot.load32(r::S14, M::At(r::S15, 24));
        self.hot.alu_imm(Alu::And, false, r::S14, !(iem::unit::MXCSR_MASK as i32) | MASKS);
        sites.push(self.unless(MASKS));
        self.hot.aim_short(initial);
        let initial = self.if_any(M::At(r::S15, STATE_BV), 1);
        self.hot.load32(r::S14, M::At(r::S15, 0));
        self.hot.alu_imm(Alu::And, false, r::S14, 0x3f);
        sites.push(self.unless(0x3f));
        self.hot.aim_short(initial);
        let saved = self.flags == Flags::Saved;
        self.colds.push(Cold::InterpretFp { sites, offset: item.offset, saved, reset: false });
        // The host raises what is wrong otherwise.
        self.hot.store_imm32(M::Ctx(off::FAULT_OFFSET), item.offset.into());
        self.hot.store_imm32(M::Ctx(off::MASKED), 1);
        self.mask_components();
        self.hot.rm(Self::is_wide(&item.insn), None, &[0x0f, 0xae], 5, M::At(r::S15, 0));
        self.hot.store_imm32(M::Ctx(off::MASKED), 0);
        self.unmask_components();
        // Another vCPU may have changed the image meanwhile.
        self.hot.rm(false, None, &[0x0f, 0xae], 3, M::Ctx(off::CONTROL)); // stmxcsr
        self.hot.rm(false, None, &[0xd9], 7, M::Ctx(off::CONTROL + 4)); // fnstcw
        self.hot.load32(r::S14, M::Ctx(off::CONTROL));
        self.hot.alu_imm(Alu::And, false, r::S14, MASKS);
        let mut sites = smallvec::smallvec![self.unless(MASKS)];
        self.hot.load32(r::S14, M::Ctx(off::CONTROL + 4));
        self.hot.alu_imm(Alu::And, false, r::S14, 0x3f);
        sites.push(self.unless(0x3f));
        self.colds.push(Cold::InterpretFp { sites, offset: item.offset, saved, reset: true });
    }
}
