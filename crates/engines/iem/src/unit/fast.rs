//! The common x87 instructions without FXRSTOR and FXSAVE: only the registers at work are loaded.
//!
//! The host's unit is empty and has FCW 0x37f between stubs. A stub loads the guest's control word and ST(i) and ST(0) into an
//! empty stack, executes the instruction (with ST(i) renamed to ST(1)), takes the status word, and stores what changed. It is good only while
//! all exceptions are masked and no stack fault can arise ([`Plan::applies`]); everything else goes the long way.

use std::mem::offset_of;

use cpum::state::XsaveArea;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::stub::{Assembler, FRAME, Frame, STATE, flags_in, flags_out, xsave};
use super::{area, set_u16, u16_at};

/// Condition codes.
const C1: u16 = 0x200;
const C_ALL: u16 = 0x4700;
/// Exception flags.
const EXCEPTIONS: u16 = 0x3f;

/// What a short stub needs and does to the stack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Offset of the stub's code, relative to the long stub's.
    pub(super) start: u16,
    /// Stack registers that must not be empty, by distance from the top.
    needs: u8,
    /// A register is pushed: the one above the top must be empty.
    push: bool,
    pops: u8,
    /// A stack register that is not empty afterwards.
    fills: Option<u8>,
    /// Condition codes that the instruction sets.
    conditions: u16,
}

/// What becomes of a host stack register, from the top on, after the instruction.
#[derive(Clone, Copy)]
enum Put {
    Slot(u8),
    /// The frame's `pushed`.
    Pushed,
    Discard,
}

impl Plan {
    /// Whether the stub gives the right result in the present state.
    pub(super) fn applies(&self, state: &XsaveArea) -> bool {
        if u16_at(state, area::FCW) & EXCEPTIONS != EXCEPTIONS {
            return false;
        }
        let top = super::x87::top(state) as u32;
        // Bit i: ST(i) is not empty.
        let used = state.0[area::FTW].rotate_right(top);
        used & self.needs == self.needs && !(self.push && used & 0x80 != 0)
    }

    /// Takes over what the stub left in the frame.
    pub(super) fn finish(&self, state: &mut XsaveArea, frame: &Frame) {
        let status = u16_at(state, area::FSW);
        let mut top = (status >> 11) & 7;
        let mut used = state.0[area::FTW].rotate_right(top.into());
        if let Some(i) = self.fills {
            used |= 1 << i;
        }
        if self.push {
            state.0[area::ST..area::XMM].rotate_right(16);
            state.0[area::ST..area::ST + 16].copy_from_slice(&frame.pushed);
            used = used << 1 | 1;
            top = top.wrapping_sub(1) & 7;
        }
        for _ in 0..self.pops {
            state.0[area::ST..area::XMM].rotate_left(16);
            used >>= 1;
            top = (top + 1) & 7;
        }
        state.0[area::FTW] = used.rotate_left(top.into());
        let kept = status & !(7 << 11) & !self.conditions;
        let new = u16::from_le_bytes(frame.status) & (self.conditions | EXCEPTIONS);
        set_u16(state, area::FSW, kept | new | top << 11);
    }
}

/// Appends the short stub for an instruction; `None` if it has to go the long way.
pub(super) fn build(asm: &mut Assembler, insn: &Instruction, flags: bool) -> Option<Plan> {
    use Mnemonic::*;
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let mut plan = Plan { start: 0, needs: 1, push: false, pops: 0, fills: None, conditions: C1 };
    let mut renamed = *insn;
    // Slots to load, deepest first; and what the host's stack holds afterwards, from the top on.
    let (mut loads, mut puts) = (vec![0u8], vec![Put::Slot(0)]);
    let mut execute = true;
    if memory {
        match insn.mnemonic() {
            Fadd | Fmul | Fsub | Fsubr | Fdiv | Fdivr | Fiadd | Fimul | Fisub | Fisubr | Fidiv | Fidivr => {}
            Fcom | Ficom => (puts, plan.conditions) = (vec![Put::Discard], C_ALL),
            Fcomp | Ficomp => (puts, plan.conditions, plan.pops) = (vec![], C_ALL, 1),
            Fst | Fist => puts = vec![Put::Discard],
            Fstp | Fistp | Fisttp => (puts, plan.pops) = (vec![], 1),
            Fld | Fild => {
                (loads, puts) = (vec![], vec![Put::Pushed]);
                (plan.needs, plan.push) = (0, true);
            }
            _ => return None,
        }
    } else {
        let deep = (0..insn.op_count())
            .map(|i| insn.op_register(i))
            .find(|&r| r != Register::ST0 && r.is_st())
            .map(|r| r.number() as u8);
        let two = |i: u8| (vec![i, 0], 1 | 1 << i);
        match (insn.mnemonic(), deep) {
            (Fchs | Fabs | Fsqrt | Frndint, None) => {}
            (Ftst | Fxam, None) => (puts, plan.conditions) = (vec![Put::Discard], C_ALL),
            (Fld1 | Fldz | Fldpi | Fldl2t | Fldl2e | Fldlg2 | Fldln2, None) => {
                (loads, puts) = (vec![], vec![Put::Pushed]);
                (plan.needs, plan.push) = (0, true);
            }
            (Fld, source) => {
                // Load the source itself once more.
                let i = source.unwrap_or(0);
                (loads, puts) = (vec![i], vec![Put::Pushed]);
                (plan.needs, plan.push) = (1 << i, true);
                execute = false;
            }
            (Fstp | Fst, target) => {
                let i = target.unwrap_or(0);
                puts = vec![Put::Slot(i)];
                plan.fills = Some(i);
                plan.pops = u8::from(insn.mnemonic() == Fstp);
                execute = false;
            }
            (Fadd | Fmul | Fsub | Fsubr | Fdiv | Fdivr, Some(i)) => {
                (loads, plan.needs) = two(i);
                puts = if insn.op0_register() == Register::ST0 {
                    vec![Put::Slot(0), Put::Discard]
                } else {
                    vec![Put::Discard, Put::Slot(i)]
                };
            }
            (Faddp | Fmulp | Fsubp | Fsubrp | Fdivp | Fdivrp, Some(i)) => {
                (loads, plan.needs) = two(i);
                (puts, plan.pops) = (vec![Put::Slot(i)], 1);
            }
            (Fxch, Some(i)) => {
                (loads, plan.needs) = two(i);
                puts = vec![Put::Slot(0), Put::Slot(i)];
            }
            (Fcom | Fucom, Some(i)) => {
                (loads, plan.needs) = two(i);
                (puts, plan.conditions) = (vec![Put::Discard, Put::Discard], C_ALL);
            }
            (Fcomp | Fucomp, Some(i)) => {
                (loads, plan.needs) = two(i);
                (puts, plan.conditions, plan.pops) = (vec![Put::Discard], C_ALL, 1);
            }
            (Fcompp | Fucompp, None) => {
                (loads, plan.needs) = two(1);
                (puts, plan.conditions, plan.pops) = (vec![], C_ALL, 2);
            }
            (Fcomi | Fucomi, Some(i)) => {
                (loads, plan.needs) = two(i);
                // C1 stays as it is, on Intel's CPUs, too, whatever SDM volume 2 says.
                (puts, plan.conditions) = (vec![Put::Discard, Put::Discard], 0);
            }
            (Fcomip | Fucomip, Some(i)) => {
                (loads, plan.needs) = two(i);
                plan.conditions = 0;
                (puts, plan.pops) = (vec![Put::Discard], 1);
            }
            _ => return None,
        }
        for i in 0..insn.op_count() {
            if insn.op_register(i).is_st() && insn.op_register(i) != Register::ST0 {
                renamed.set_op_register(i, Register::ST1);
            }
        }
    }
    asm.memory(Code::Fldcw_m2byte, STATE, xsave(area::FCW));
    for &slot in &loads {
        asm.memory(Code::Fld_m80fp, STATE, xsave(area::ST + 16 * usize::from(slot)));
    }
    if flags {
        flags_in(asm);
    }
    if execute {
        asm.emit(Ok(renamed));
    }
    if flags {
        flags_out(asm);
    }
    asm.emit(Instruction::with1(Code::Fnstsw_AX, Register::AX));
    asm.store(Code::Mov_rm16_r16, FRAME, offset_of!(Frame, status), Register::AX);
    for put in puts {
        match put {
            Put::Slot(slot) => asm.memory(Code::Fstp_m80fp, STATE, xsave(area::ST + 16 * usize::from(slot))),
            Put::Pushed => asm.memory(Code::Fstp_m80fp, FRAME, offset_of!(Frame, pushed)),
            Put::Discard => asm.emit(Instruction::with1(Code::Fstp_sti, Register::ST0)),
        }
    }
    // Sticky flags must not reach the next instruction.
    asm.emit(Instruction::with2(Code::Test_rm8_imm8, Register::AL, 0x7f));
    asm.emit(Instruction::with_branch(Code::Je_rel8_64, 4));
    asm.emit(Ok(Instruction::with(Code::Fnclex)));
    asm.memory(Code::Fldcw_m2byte, FRAME, offset_of!(Frame, control_host));
    asm.emit(Ok(Instruction::with(Code::Retnq)));
    Some(plan)
}
