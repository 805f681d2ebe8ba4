//! Instructions that are copied, with the operands that they have in the host.

use iced_x86::{Code, Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::{CARRY, Emitter, Flags, HIGH, home, sized};
use crate::asm::{Alu, M, r};
use crate::context::off;
use crate::plan::{Item, Kind, Memory, high_number};

impl Emitter<'_> {
    /// Copies an instruction with its operands replaced; false if it cannot be encoded.
    pub(super) fn copy(&mut self, item: &Item) -> bool {
        if let Some(immediate) = item.immediate {
            self.with_immediate(item, immediate);
            return true;
        }
        let mut insn = item.insn;
        widen(&mut insn);
        let mut spare: &[u8] = &[r::S14, r::S15];
        let high = (0..insn.op_count())
            .any(|i| insn.op_kind(i) == OpKind::Register && high_number(insn.op_register(i)).is_some());
        let mut operand = None;
        match item.memory {
            Memory::None => self.s14 |= high,
            Memory::Stack => {
                self.s14 |= high;
                let disp = insn.memory_displacement64() as i64 as i32;
                let m = M::Index(r::GUEST_SP, r::DELTA, 0, disp);
                set_memory(&mut insn, m);
                operand = Some(m);
            }
            Memory::Checked => {
                let m = if item.kind == Kind::BitString {
                    self.bit_string(item);
                    insn.set_op1_register(sized(r::S14, item.size.into()));
                    M::At(r::S15, 0)
                } else {
                    // Taking the flags back needs r14, unless it is CF alone.
                    let flags = self.needs_flags(item) && item.live_in & !CARRY != 0;
                    self.access(item, high || flags)
                };
                if self.exchange(item, m, high) {
                    return true;
                }
                set_memory(&mut insn, m);
                operand = Some(m);
                spare = &[r::S14];
            }
        }
        let unlocked = self.host.alone && insn.has_lock_prefix() && !is_barrier(&item.insn);
        if unlocked {
            insn.set_has_lock_prefix(false);
        }
        if item.kind != Kind::BitString {
            self.before(item);
        }
        if item.kind == Kind::Divide {
            self.hot.store_imm32(M::Ctx(off::FAULT_OFFSET), item.offset.into());
        }
        if item.kind != Kind::BitString && self.copy_raw(item, operand, unlocked) {
            self.after(item);
            return true;
        }
        let mut homes: [(u8, u8, OpAccess); 2] = [(0, 0, OpAccess::None); 2];
        let mut used = 0;
        if item.kind != Kind::BitString {
            for i in 0..insn.op_count() {
                if insn.op_kind(i) != OpKind::Register {
                    continue;
                }
                let register = insn.op_register(i);
                if !register.is_gpr() {
                    continue;
                }
                if register.full_register() == Register::RSP {
                    insn.set_op_register(i, sized(r::GUEST_SP, register.size()));
                } else if let Some(n) = high_number(register) {
                    let tmp = match homes[..used].iter().find(|h| h.0 == n) {
                        Some(h) => h.1,
                        None => {
                            let tmp = spare[used];
                            homes[used] = (n, tmp, OpAccess::None);
                            used += 1;
                            // What is overwritten whole need not be loaded.
                            let accesses = (0..item.insn.op_count()).filter(|&j| {
                                item.insn.op_kind(j) == OpKind::Register
                                    && high_number(item.insn.op_register(j)) == Some(n)
                            });
                            let info = self.info.info(&item.insn);
                            let whole = accesses.clone().count() == 1
                                && register.size() >= 4
                                && accesses.into_iter().all(|j| info.op_access(j) == OpAccess::Write);
                            if !whole {
                                self.hot.load(tmp, M::Ctx(HIGH[n as usize]));
                            }
                            tmp
                        }
                    };
                    insn.set_op_register(i, sized(tmp, register.size()));
                }
            }
        }
        self.encoder.set_buffer(std::mem::take(&mut self.hot.code));
        let encoded = self.encoder.encode(&insn, 0).is_ok();
        self.hot.code = self.encoder.take_buffer();
        if !encoded {
            return false;
        }
        if used > 0 {
            let info = self.info.info(&item.insn);
            for &(n, tmp, _) in &homes[..used] {
                let written = (0..item.insn.op_count()).any(|i| {
                    item.insn.op_kind(i) == OpKind::Register
                        && high_number(item.insn.op_register(i)) == Some(n)
                        && !matches!(info.op_access(i), OpAccess::Read | OpAccess::CondRead | OpAccess::None)
                });
                if written {
                    self.hot.store(M::Ctx(HIGH[n as usize]), tmp);
                }
            }
        }
        self.after(item);
        true
    }

    /// With one vCPU, XCHG with memory is done without the lock that it has by itself; true if so. Its operand of two bytes keeps it:
    /// Linux's virtio rings use that as a barrier against the device.
    fn exchange(&mut self, item: &Item, m: M, high: bool) -> bool {
        let insn = &item.insn;
        let size = insn.op0_register().size().max(insn.op1_register().size());
        if !self.host.alone || insn.mnemonic() != Mnemonic::Xchg || high || size < 4 || is_barrier(insn) {
            return false;
        }
        let m = match m {
            M::Index(base, index, ..) if base != r::S15 && index != r::S15 => m,
            // r15 is wanted for the value.
            _ => {
                self.s14 = true;
                self.hot.lea(r::S14, m);
                M::At(r::S14, 0)
            }
        };
        let register =
            home(if insn.op0_kind() == OpKind::Register { insn.op0_register() } else { insn.op1_register() });
        if size == 8 {
            self.hot.load(r::S15, m);
            self.hot.store(m, register);
            self.hot.mov(register, r::S15);
        } else {
            self.hot.load32(r::S15, m);
            self.hot.store32(m, register);
            self.hot.mov32(register, r::S15);
        }
        true
    }

    /// Computes the host address that a bit string instruction works on into r15, and the bit's number into r14.
    fn bit_string(&mut self, item: &Item) {
        let register = item.insn.op1_register();
        let wide = item.size == 8;
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn, 0);
        let from = self.value(register, r::S14);
        if wide {
            self.hot.mov(r::S14, from);
        } else {
            self.hot.rr(true, &[0x63], r::S14, from); // movsxd
        }
        self.hot.shift_imm(7, true, r::S14, if wide { 6 } else { 5 });
        let m = M::Index(r::S15, r::S14, if wide { 3 } else { 2 }, 0);
        let narrow =
            !self.mode.long || item.insn.memory_base().is_gpr32() || item.insn.memory_index().is_gpr32();
        if narrow {
            self.hot.lea32(r::S15, m)
        } else {
            self.hot.lea(r::S15, m)
        }
        self.translate(item, retry, item.size, item.writes, 1);
        let from = self.value(register, r::S14);
        self.hot.mov32(r::S14, from);
        self.hot.alu_imm(Alu::And, false, r::S14, if wide { 63 } else { 31 });
        if self.flags == Flags::Saved && item.live_in != 0 {
            self.hot.store(M::Ctx(off::TMP + 16), r::S14);
            self.here(item.live_in);
            self.hot.load(r::S14, M::Ctx(off::TMP + 16));
        }
    }
}

/// A locked instruction on the top of the stack: systems use it as a barrier, also against devices.
fn is_barrier(insn: &Instruction) -> bool {
    insn.memory_base().is_gpr() && insn.memory_base().full_register() == Register::RSP
}

/// Puts a memory operand of 64-bit host code in the place of the guest's.
fn set_memory(insn: &mut Instruction, m: M) {
    let (base, index, scale, disp) = match m {
        M::At(base, disp) => (base, None, 0, disp),
        M::Index(base, index, scale, disp) => (base, Some(index), scale, disp),
        M::Ctx(_) | M::CtxAt(..) | M::CtxAt2(..) | M::CtxAt8(..) | M::Scaled(..) => {
            unreachable!("guest memory is reached by a base")
        }
    };
    insn.set_memory_base(sized(base, 8));
    insn.set_memory_index(index.map_or(Register::None, |i| sized(i, 8)));
    insn.set_memory_index_scale(1 << scale);
    insn.set_memory_displacement64(i64::from(disp) as u64);
    insn.set_memory_displ_size(if disp == 0 { 0 } else { 1 });
    insn.set_segment_prefix(Register::None);
}

/// Gives short and doubled forms of 32-bit code, and those with an absolute address, the form that 64-bit code has.
fn widen(insn: &mut Instruction) {
    use Code::*;
    let code = match insn.code() {
        Inc_r16 => Inc_rm16,
        Inc_r32 => Inc_rm32,
        Dec_r16 => Dec_rm16,
        Dec_r32 => Dec_rm32,
        Mov_AL_moffs8 => Mov_r8_rm8,
        Mov_AX_moffs16 => Mov_r16_rm16,
        Mov_EAX_moffs32 => Mov_r32_rm32,
        Mov_RAX_moffs64 => Mov_r64_rm64,
        Mov_moffs8_AL => Mov_rm8_r8,
        Mov_moffs16_AX => Mov_rm16_r16,
        Mov_moffs32_EAX => Mov_rm32_r32,
        Mov_moffs64_RAX => Mov_rm64_r64,
        Add_rm8_imm8_82 => Add_rm8_imm8,
        Or_rm8_imm8_82 => Or_rm8_imm8,
        Adc_rm8_imm8_82 => Adc_rm8_imm8,
        Sbb_rm8_imm8_82 => Sbb_rm8_imm8,
        And_rm8_imm8_82 => And_rm8_imm8,
        Sub_rm8_imm8_82 => Sub_rm8_imm8,
        Xor_rm8_imm8_82 => Xor_rm8_imm8,
        Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
        _ => return,
    };
    insn.set_code(code);
}
