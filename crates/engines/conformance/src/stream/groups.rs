//! The kinds of groups that programs are made of.

use cpum::state::{rflags, seg};
use iced_x86::{Code, Instruction, MemoryOperand, OpCodeOperandKind as K, OpKind, Register};

use super::generate::{Draft, Generator, general};
use super::mode::*;
use super::program::{Group, Item, To, absolute};
use crate::board::TEST_PORT;

impl Generator {
    pub(super) fn group(&mut self) -> Group {
        let mut d = Draft::new();
        let weights = [46, 10, 6, 9, 7, 6, 7, 7, 6, 2, 3, 2];
        let mut draw = self.random.below(weights.iter().sum());
        let kind = weights
            .iter()
            .position(|&w| {
                let hit = draw < w;
                draw = draw.wrapping_sub(w);
                hit
            })
            .unwrap_or(0);
        match kind {
            1 => {
                self.some(&mut d, 3);
                let (near, _) = self.condition();
                let ahead = 1 + self.random.below(3);
                d.items.push(Item::Branch(near, To::Ahead(ahead)));
                self.some(&mut d, 3);
            }
            2 => self.skip(&mut d),
            3 => self.repeat(&mut d),
            4 => self.transfer(&mut d),
            5 if self.allowance.patches() => self.patch(&mut d),
            6 => self.string(&mut d),
            7 => self.stack(&mut d),
            8 => self.system(&mut d),
            9 => self.stepping(&mut d),
            10 => self.segment_load(&mut d),
            11 => self.interrupt(&mut d),
            _ => self.some(&mut d, 7),
        }
        Group { items: d.items }
    }

    /// A condition: its near and its short form.
    fn condition(&mut self) -> (Code, Code) {
        use Code::*;
        let n = self.random.below(17);
        let (near, short): ([Code; 17], [Code; 17]) = match self.bits() {
            16 => (
                [
                    Jo_rel16, Jno_rel16, Jb_rel16, Jae_rel16, Je_rel16, Jne_rel16, Jbe_rel16, Ja_rel16,
                    Js_rel16, Jns_rel16, Jp_rel16, Jnp_rel16, Jl_rel16, Jge_rel16, Jle_rel16, Jg_rel16,
                    Jmp_rel16,
                ],
                [
                    Jo_rel8_16,
                    Jno_rel8_16,
                    Jb_rel8_16,
                    Jae_rel8_16,
                    Je_rel8_16,
                    Jne_rel8_16,
                    Jbe_rel8_16,
                    Ja_rel8_16,
                    Js_rel8_16,
                    Jns_rel8_16,
                    Jp_rel8_16,
                    Jnp_rel8_16,
                    Jl_rel8_16,
                    Jge_rel8_16,
                    Jle_rel8_16,
                    Jg_rel8_16,
                    Jmp_rel8_16,
                ],
            ),
            32 => (
                [
                    Jo_rel32_32,
                    Jno_rel32_32,
                    Jb_rel32_32,
                    Jae_rel32_32,
                    Je_rel32_32,
                    Jne_rel32_32,
                    Jbe_rel32_32,
                    Ja_rel32_32,
                    Js_rel32_32,
                    Jns_rel32_32,
                    Jp_rel32_32,
                    Jnp_rel32_32,
                    Jl_rel32_32,
                    Jge_rel32_32,
                    Jle_rel32_32,
                    Jg_rel32_32,
                    Jmp_rel32_32,
                ],
                [
                    Jo_rel8_32,
                    Jno_rel8_32,
                    Jb_rel8_32,
                    Jae_rel8_32,
                    Je_rel8_32,
                    Jne_rel8_32,
                    Jbe_rel8_32,
                    Ja_rel8_32,
                    Js_rel8_32,
                    Jns_rel8_32,
                    Jp_rel8_32,
                    Jnp_rel8_32,
                    Jl_rel8_32,
                    Jge_rel8_32,
                    Jle_rel8_32,
                    Jg_rel8_32,
                    Jmp_rel8_32,
                ],
            ),
            _ => (
                [
                    Jo_rel32_64,
                    Jno_rel32_64,
                    Jb_rel32_64,
                    Jae_rel32_64,
                    Je_rel32_64,
                    Jne_rel32_64,
                    Jbe_rel32_64,
                    Ja_rel32_64,
                    Js_rel32_64,
                    Jns_rel32_64,
                    Jp_rel32_64,
                    Jnp_rel32_64,
                    Jl_rel32_64,
                    Jge_rel32_64,
                    Jle_rel32_64,
                    Jg_rel32_64,
                    Jmp_rel32_64,
                ],
                [
                    Jo_rel8_64,
                    Jno_rel8_64,
                    Jb_rel8_64,
                    Jae_rel8_64,
                    Je_rel8_64,
                    Jne_rel8_64,
                    Jbe_rel8_64,
                    Ja_rel8_64,
                    Js_rel8_64,
                    Jns_rel8_64,
                    Jp_rel8_64,
                    Jnp_rel8_64,
                    Jl_rel8_64,
                    Jge_rel8_64,
                    Jle_rel8_64,
                    Jg_rel8_64,
                    Jmp_rel8_64,
                ],
            ),
        };
        (near[n], short[n])
    }

    /// A branch over an instruction or two.
    fn skip(&mut self, d: &mut Draft) {
        use Code::*;
        self.some(d, 2);
        let over = d.mark();
        let (near, short) = self.condition();
        let loops: [Code; 4] = match self.bits() {
            16 => [Loop_rel8_16_CX, Loope_rel8_16_CX, Loopne_rel8_16_CX, Jcxz_rel8_16],
            32 => [Loop_rel8_32_ECX, Loope_rel8_32_ECX, Loopne_rel8_32_ECX, Jecxz_rel8_32],
            _ => [Loop_rel8_64_RCX, Loope_rel8_64_RCX, Loopne_rel8_64_RCX, Jrcxz_rel8_64],
        };
        let code = match self.random.below(3) {
            0 => near,
            1 => short,
            _ => {
                if self.random.percent(40) {
                    let value = self.random.below(2) as u64;
                    let register = general(1, self.word());
                    let set = self.set(register, value);
                    d.insn(set);
                }
                self.random.pick(&loops)
            }
        };
        d.items.push(Item::Branch(code, To::Mark(over)));
        self.one(d);
        d.items.push(Item::Mark(over));
        // What was skipped did not set its base register.
        d.base = None;
        self.one(d);
    }

    /// A loop with a counter in memory, often stepping an address through pages.
    fn repeat(&mut self, d: &mut Draft) {
        use Code::*;
        let slot = STACK + 0x120 + 8 * (d.slots % 4);
        d.slots += 1;
        let counter = absolute(self.mode, seg::SS, self.mode.linear() + slot);
        let rounds = 1 + self.random.below(14) as u32;
        d.insn(Instruction::with2(Mov_rm32_imm32, counter, rounds).expect("a store"));
        self.one(d);
        let top = d.mark();
        d.items.push(Item::Mark(top));
        if let Some(base) = d.base
            && self.random.percent(70)
        {
            let step = self.random.pick(&[1, 4, 8, -8, 0x40, 0x200]);
            let code = match base.register.size() {
                2 => Add_rm16_imm16,
                4 => Add_rm32_imm32,
                _ => Add_rm64_imm32,
            };
            d.items.extend(Instruction::with2(code, base.register, step).map(Item::Insn));
        }
        self.some(d, 3);
        d.items.push(Item::Define);
        d.insn(Instruction::with1(Dec_rm32, counter).expect("a counter"));
        let again = match self.bits() {
            16 => Jne_rel16,
            32 => Jne_rel32_32,
            _ => Jne_rel32_64,
        };
        d.items.push(Item::Branch(again, To::Mark(top)));
    }

    /// Calls, returns and indirect jumps.
    fn transfer(&mut self, d: &mut Draft) {
        use Code::*;
        let word = self.word();
        let register = self.gpr(word);
        let pick = |codes: [Code; 3]| codes[word / 4];
        let function = To::Function(self.random.below(2));
        let over = d.mark();
        let slot = absolute(self.mode, seg::SS, self.mode.linear() + STACK + 0x140);
        match self.random.below(8) {
            0 | 1 => d.items.push(Item::Branch(pick([Call_rel16, Call_rel32_32, Call_rel32_64]), function)),
            2 => {
                d.items.push(Item::Address(register, function));
                d.items.extend(
                    Instruction::with1(pick([Call_rm16, Call_rm32, Call_rm64]), register).map(Item::Insn),
                );
            }
            3 => {
                d.items.push(Item::Address(register, To::Mark(over)));
                d.items.extend(
                    Instruction::with1(pick([Jmp_rm16, Jmp_rm32, Jmp_rm64]), register).map(Item::Insn),
                );
                self.one(d);
                d.items.push(Item::Mark(over));
            }
            4 => {
                d.items.push(Item::Address(register, To::Mark(over)));
                d.items.extend(
                    Instruction::with1(pick([Push_r16, Push_r32, Push_r64]), register).map(Item::Insn),
                );
                d.insn(Instruction::with(pick([Retnw, Retnd, Retnq])));
                self.one(d);
                d.items.push(Item::Mark(over));
            }
            5 => {
                d.items.push(Item::Address(register, function));
                let store = pick([Mov_rm16_r16, Mov_rm32_r32, Mov_rm64_r64]);
                d.items.extend(Instruction::with2(store, slot, register).map(Item::Insn));
                d.items.extend(
                    Instruction::with1(pick([Call_rm16, Call_rm32, Call_rm64]), slot).map(Item::Insn),
                );
            }
            6 => {
                // A far return to the same segment.
                let cs = self.mode.segment(seg::CS).selector;
                let push = pick([Push_imm16, Pushd_imm32, Pushq_imm32]);
                d.items.extend(
                    match word {
                        8 => Instruction::with1(push, i32::from(cs)),
                        _ => Instruction::with1(push, u32::from(cs)),
                    }
                    .map(Item::Insn),
                );
                d.items.push(Item::Address(register, To::Mark(over)));
                d.items.extend(
                    Instruction::with1(pick([Push_r16, Push_r32, Push_r64]), register).map(Item::Insn),
                );
                d.insn(Instruction::with(pick([Retfw, Retfd, Retfq])));
                self.one(d);
                d.items.push(Item::Mark(over));
            }
            _ => {
                // A jump through a target that alternates.
                let other = d.mark();
                d.items.push(Item::Address(register, To::Mark(over)));
                let (_, short) = self.condition();
                d.items.push(Item::Branch(short, To::Mark(other)));
                let second = d.mark();
                d.items.push(Item::Address(register, To::Mark(second)));
                d.items.push(Item::Mark(other));
                d.items.extend(
                    Instruction::with1(pick([Jmp_rm16, Jmp_rm32, Jmp_rm64]), register).map(Item::Insn),
                );
                d.items.push(Item::Mark(over));
                self.one(d);
                d.items.push(Item::Mark(second));
            }
        }
        d.base = None;
    }

    /// Code that changes code.
    fn patch(&mut self, d: &mut Draft) {
        use Code::*;
        let place = d.mark();
        let early = self.random.percent(50);
        let target = self.gpr(4);
        // An instruction of one byte, or the immediate of `mov r32, imm32`.
        let byte = self.random.percent(50);
        let operand = MemoryOperand::with_displ(0, 4);
        let prefix = u64::from(self.bits() == 16) + u64::from(target >= Register::R8D);
        let (patch, offset) = if byte {
            let new = self.random.pick(&[0x90u32, 0xf8, 0xf9, 0xf5, 0xfc]);
            (Instruction::with2(Mov_rm8_imm8, operand, new).expect("a patch"), 0)
        } else if self.random.percent(50) {
            (
                Instruction::with2(Add_rm32_imm8, operand, 1 + self.random.below(100) as i32)
                    .expect("a patch"),
                1 + prefix,
            )
        } else {
            (
                Instruction::with2(Mov_rm8_imm8, operand, self.random.below(256) as u32).expect("a patch"),
                1 + prefix + self.random.below(4) as u64,
            )
        };
        let patched = if byte {
            Instruction::with(self.random.pick(&[Nopd, Clc, Stc, Cmc]))
        } else {
            Instruction::with2(Mov_r32_imm32, target, self.random.word() as u32).expect("a move")
        };
        if early {
            d.items.push(Item::Patch(patch, To::Mark(place), offset));
            if self.random.percent(60) {
                self.some(d, 2);
            }
        }
        d.items.push(Item::Define);
        d.items.push(Item::Mark(place));
        d.insn(patched);
        self.some(d, 2);
        if !early {
            // In the next round, if there is one.
            d.items.push(Item::Patch(patch, To::Mark(place), offset));
        }
    }

    fn string(&mut self, d: &mut Draft) {
        use Code::*;
        let code = self.random.pick(&[
            Movsb_m8_m8,
            Movsw_m16_m16,
            Movsd_m32_m32,
            Movsq_m64_m64,
            Cmpsb_m8_m8,
            Cmpsw_m16_m16,
            Cmpsd_m32_m32,
            Cmpsq_m64_m64,
            Stosb_m8_AL,
            Stosw_m16_AX,
            Stosd_m32_EAX,
            Stosq_m64_RAX,
            Lodsb_AL_m8,
            Lodsw_AX_m16,
            Lodsd_EAX_m32,
            Lodsq_RAX_m64,
            Scasb_AL_m8,
            Scasw_AX_m16,
            Scasd_EAX_m32,
            Scasq_RAX_m64,
        ]);
        let op = code.op_code();
        if self.bits() != 64 && !op.mode32() || !self.allowance.form(code) {
            return self.string(d);
        }
        let mut insn = Instruction::default();
        insn.set_code(code);
        let narrow = self.random.percent(10);
        let address = match (self.bits(), narrow) {
            (16, false) | (32, true) => 2,
            (64, false) => 8,
            _ => 4,
        };
        let mut item = 1;
        for i in 0..op.op_count() {
            let kind = match op.op_kind(i) {
                K::seg_rSI => [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI][address / 4],
                K::es_rDI => [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI][address / 4],
                K::al => {
                    insn.set_op_register(i, Register::AL);
                    OpKind::Register
                }
                K::ax => {
                    insn.set_op_register(i, Register::AX);
                    OpKind::Register
                }
                K::eax => {
                    insn.set_op_register(i, Register::EAX);
                    OpKind::Register
                }
                _ => {
                    insn.set_op_register(i, Register::RAX);
                    OpKind::Register
                }
            };
            insn.set_op_kind(i, kind);
            item = item.max(insn.memory_size().size() as u64);
        }
        let spot = |me: &mut Self| {
            let offset = loop {
                let spot = me.spot(64);
                if (DATA..DATA + 0xd000).contains(&spot) {
                    break spot;
                }
            };
            me.mode.linear() + offset - me.mode.segment(seg::DS).base
        };
        let from = spot(self);
        // Often close to each other, so that they overlap.
        let to = if self.random.percent(30) {
            from.wrapping_add(self.random.below(64) as u64).wrapping_sub(32)
        } else {
            spot(self)
        };
        let fill = general(0, self.word());
        if self.random.percent(50) {
            let value = self.random.integer();
            let set = self.set(fill, value);
            d.insn(set);
        }
        // Long ones only where addresses are sure to be good: wild ones fault soon.
        let most = if self.random.percent(10) { 2000 } else { 80 };
        let count = self.random.below(most) as u64 / item.max(1);
        for (n, value) in [(6, from), (7, to), (1, count)] {
            let set = self.set(general(n, address), value);
            d.insn(set);
        }
        if self.random.percent(20) {
            d.insn(Instruction::with(if self.random.percent(50) { Std } else { Cld }));
        }
        if self.random.percent(75) {
            if self.random.percent(70) {
                insn.set_has_rep_prefix(true)
            } else {
                insn.set_has_repne_prefix(true)
            }
        }
        d.insn(insn);
        if self.random.percent(60) {
            d.insn(Instruction::with(Cld));
        }
    }

    /// Pushes and pops, in balance.
    fn stack(&mut self, d: &mut Draft) {
        use Code::*;
        let word = self.word();
        let pick = |codes: [Code; 3]| codes[word / 4];
        let mut push = |codes: [Code; 3], register: Register| {
            d.items.extend(Instruction::with1(codes[word / 4], register).map(Item::Insn));
        };
        match self.random.below(8) {
            0 | 1 => {
                let registers: Vec<_> = (0..1 + self.random.below(4)).map(|_| self.gpr(word)).collect();
                for r in &registers {
                    push([Push_r16, Push_r32, Push_r64], *r);
                }
                for r in registers.iter().rev() {
                    push([Pop_r16, Pop_r32, Pop_r64], *r);
                }
            }
            2 => {
                d.insn(Instruction::with(pick([Pushfw, Pushfd, Pushfq])));
                let register = self.gpr(word);
                d.items
                    .extend(Instruction::with1(pick([Pop_r16, Pop_r32, Pop_r64]), register).map(Item::Insn));
            }
            3 => {
                // Arithmetic flags, DF and IF; IOPL, which privilege 3 must not change.
                let value = self.random.word() & 0x3cd5 & !rflags::TF;
                let register = self.gpr(word);
                let set = self.set(register, value);
                d.insn(set);
                d.items.extend(
                    Instruction::with1(pick([Push_r16, Push_r32, Push_r64]), register).map(Item::Insn),
                );
                d.insn(Instruction::with(pick([Popfw, Popfd, Popfq])));
            }
            4 => {
                let size = self.random.below(64) as u32;
                let level = if self.random.percent(60) { 0 } else { self.random.below(4) as u32 };
                d.items.extend(
                    Instruction::with2(
                        pick([Enterw_imm16_imm8, Enterd_imm16_imm8, Enterq_imm16_imm8]),
                        size,
                        level,
                    )
                    .map(Item::Insn),
                );
                self.one(d);
                // The frame's pointer may have been changed.
                let fetch = pick([Leavew, Leaved, Leaveq]);
                let back = general(5, word);
                let sp = general(4, word);
                let up = (size + level * word as u32) as i32;
                let lea = Instruction::with2(
                    pick([Lea_r16_m, Lea_r32_m, Lea_r64_m]),
                    back,
                    if word == 2 {
                        // SP is no base register in 16-bit addresses.
                        MemoryOperand::with_base_displ_size(Register::ESP, i64::from(up), 4)
                    } else {
                        MemoryOperand::with_base_displ_size(sp, i64::from(up), if word == 8 { 8 } else { 4 })
                    },
                );
                d.items.extend(lea.map(Item::Insn));
                d.insn(Instruction::with(fetch));
                d.base = None;
            }
            5 if word != 8 => {
                d.insn(Instruction::with(if word == 2 { Pushaw } else { Pushad }));
                self.one(d);
                d.insn(Instruction::with(if word == 2 { Popaw } else { Popad }));
                d.base = None;
            }
            6 => {
                // Through memory: relative to the stack pointer, and elsewhere.
                let spot = self.mode.linear() + self.plain_spot(8);
                let operand = absolute(self.mode, seg::DS, spot);
                d.items.extend(
                    Instruction::with1(pick([Push_rm16, Push_rm32, Push_rm64]), operand).map(Item::Insn),
                );
                if word != 2 {
                    let top = MemoryOperand::with_base(general(4, word));
                    let add = if word == 4 { Add_rm32_imm8 } else { Add_rm64_imm8 };
                    d.items.extend(Instruction::with2(add, top, 5).map(Item::Insn));
                }
                let spot = self.mode.linear() + self.spot(8);
                let segment = if spot - self.mode.linear() < DATA { seg::FS } else { seg::DS };
                let operand = absolute(self.mode, segment, spot);
                d.items.extend(
                    Instruction::with1(pick([Pop_rm16, Pop_rm32, Pop_rm64]), operand).map(Item::Insn),
                );
            }
            _ => {
                let value = self.random.word() as i8;
                let (short, flags) = (pick([Pushw_imm8, Pushd_imm8, Pushq_imm8]), self.gpr(word));
                d.items.extend(Instruction::with1(short, i32::from(value)).map(Item::Insn));
                d.items.extend(Instruction::with1(pick([Pop_r16, Pop_r32, Pop_r64]), flags).map(Item::Insn));
            }
        }
    }

    /// System instructions, allowed or not.
    fn system(&mut self, d: &mut Draft) {
        use Code::*;
        let long = self.bits() == 64;
        let wide = if long { 8 } else { 4 };
        let register = self.gpr(wide);
        let control = |n: u32| Register::CR0 + n;
        let from_cr = if long { Mov_r64_cr } else { Mov_r32_cr };
        let to_cr = if long { Mov_cr_r64 } else { Mov_cr_r32 };
        match self.random.below(16) {
            0 => {
                d.insn(Instruction::with(self.random.pick(&[Cli, Sti, Cli, Sti])));
                self.one(d);
                if self.random.percent(60) {
                    d.insn(Instruction::with(Sti));
                }
            }
            1 => {
                let cr = control(self.random.pick(&[0, 2, 3, 4, 8, 5]));
                let other =
                    cr == Register::CR8 && !long || cr == Register::CR5 && !self.allowance.control_5();
                let cr = if other { Register::CR0 } else { cr };
                d.items.extend(Instruction::with2(from_cr, register, cr).map(Item::Insn));
            }
            2 | 3 => {
                // The same value again: what depends on it is derived anew.
                let cr = control(self.random.pick(&[0, 3, 4]));
                d.items.extend(Instruction::with2(from_cr, register, cr).map(Item::Insn));
                d.items.extend(Instruction::with2(to_cr, cr, register).map(Item::Insn));
            }
            4 => {
                let spot = self.mode.linear() + self.spot(8);
                let segment = if spot - self.mode.linear() < DATA { seg::FS } else { seg::DS };
                let operand = absolute(self.mode, segment, spot);
                d.items.extend(Instruction::with1(Invlpg_m, operand).map(Item::Insn));
            }
            5 | 6 => {
                let port = Register::DX;
                let number = u64::from(TEST_PORT) + self.random.below(4) as u64;
                let set = self.set(port, number);
                d.insn(set);
                d.items.extend(
                    match self.random.below(6) {
                        0 => Instruction::with2(In_AL_DX, Register::AL, port),
                        1 => Instruction::with2(In_AX_DX, Register::AX, port),
                        2 => Instruction::with2(In_EAX_DX, Register::EAX, port),
                        3 => Instruction::with2(Out_DX_AL, port, Register::AL),
                        4 => Instruction::with2(Out_DX_AX, port, Register::AX),
                        _ => Instruction::with2(Out_DX_EAX, port, Register::EAX),
                    }
                    .map(Item::Insn),
                );
            }
            7 => {
                let value = self.random.pick(&[0u64, 1, 7, 0xd, 0x8000_0001, 0x8000_0008]);
                for (n, value) in [(0, value), (1, self.random.below(3) as u64)] {
                    let set = self.set(general(n, 4), value);
                    d.insn(set);
                }
                d.insn(Instruction::with(self.random.pick(&[Cpuid, Rdtsc, Xgetbv, Rdtscp])));
            }
            8 => {
                let msr =
                    self.random.pick(&[0x10u64, 0x174, 0x277, 0xc000_0080, 0xc000_0082, 0xc000_0102, 0x1234]);
                let set = self.set(Register::ECX, msr);
                d.insn(set);
                let counter = msr == 0x10;
                if !(counter && self.allowance.kvm) {
                    d.insn(Instruction::with(Rdmsr));
                }
                if !counter && self.random.percent(40) {
                    d.insn(Instruction::with(Wrmsr));
                }
            }
            9 => {
                let n = self.random.below(4) as u32;
                let (from, to) = if long { (Mov_r64_dr, Mov_dr_r64) } else { (Mov_r32_dr, Mov_dr_r32) };
                if self.random.percent(50) {
                    d.items.extend(Instruction::with2(from, register, Register::DR0 + n).map(Item::Insn));
                } else {
                    d.items.extend(Instruction::with2(to, Register::DR0 + n, register).map(Item::Insn));
                }
            }
            10 => d.insn(Instruction::with(self.random.pick(&[Clts, Wbinvd, Invd, Ud2, Wait]))),
            11 if long => {
                let (read, write) =
                    self.random.pick(&[(Rdfsbase_r64, Wrfsbase_r64), (Rdgsbase_r64, Wrgsbase_r64)]);
                d.items.extend(Instruction::with1(read, register).map(Item::Insn));
                d.items.extend(Instruction::with1(write, register).map(Item::Insn));
            }
            12 if long => {
                // In pairs, or refused.
                d.insn(Instruction::with(Swapgs));
                d.insn(Instruction::with(Swapgs));
            }
            13 => {
                let spot = self.mode.linear() + self.plain_spot(16);
                let operand = absolute(self.mode, seg::DS, spot);
                let code = if long { Sgdt_m1664 } else { Sgdt_m1632 };
                d.items.extend(Instruction::with1(code, operand).map(Item::Insn));
            }
            14 => {
                let selector = self.selector();
                let register = self.gpr(4);
                let set = self.set(register, selector.into());
                d.insn(set);
                let other = self.gpr(4);
                let code = self.random.pick(&[Lar_r32_r32m16, Lsl_r32_r32m16]);
                d.items.extend(Instruction::with2(code, other, register).map(Item::Insn));
            }
            _ => {
                let word = self.word();
                let code = [Smsw_rm16, Smsw_r32m16, Smsw_r64m16][word / 4];
                let target = self.gpr(word);
                d.items.extend(Instruction::with1(code, target).map(Item::Insn));
            }
        }
        self.one(d);
    }

    fn selector(&mut self) -> u16 {
        let odd = (ODD_LAST - ODD_FIRST) / 8;
        let rpl = self.random.pick(&[0, 3, 3, 1]);
        match self.random.below(5) {
            0 => 0,
            1 => (ODD_FIRST + 8 * self.random.below(odd.into()) as u16) | rpl,
            2 => (8 + 8 * self.random.below(31) as u16) | rpl,
            3 => self.mode.segment(seg::DS).selector,
            _ => (0x1000 + 8 * self.random.below(100) as u16) | rpl,
        }
    }

    /// Loads data segment registers with good and bad selectors, and good ones again.
    fn segment_load(&mut self, d: &mut Draft) {
        use Code::*;
        let which = self.random.pick(&[seg::ES, seg::DS, seg::FS, seg::GS]);
        let name = [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
        let register = self.gpr(4);
        let selector = self.selector();
        let good = self.mode.segment(which).selector;
        // FS and GS have bases of their own in 64-bit mode, which a load would lose.
        let keep = self.bits() == 64 && matches!(which, seg::FS | seg::GS);
        for value in if keep { vec![0xfffc] } else { vec![selector, good] } {
            let set = self.set(register, value.into());
            d.insn(set);
            d.items.extend(Instruction::with2(Mov_Sreg_r32m16, name[which], register).map(Item::Insn));
            if value == selector && self.random.percent(60) {
                self.one(d);
                // A base register for this segment is good no more.
                d.base = None;
            }
        }
        if self.random.percent(20) {
            // The stack segment again, and the shadow that follows.
            let value = self.mode.segment(seg::SS).selector;
            let set = self.set(register, value.into());
            d.insn(set);
            d.items.extend(Instruction::with2(Mov_Sreg_r32m16, Register::SS, register).map(Item::Insn));
            self.one(d);
        }
    }

    /// Single steps.
    fn stepping(&mut self, d: &mut Draft) {
        use Code::*;
        let word = self.word();
        let pick = |codes: [Code; 3]| codes[word / 4];
        let register = self.gpr(word);
        for on in [true, false] {
            d.insn(Instruction::with(pick([Pushfw, Pushfd, Pushfq])));
            d.items.extend(Instruction::with1(pick([Pop_r16, Pop_r32, Pop_r64]), register).map(Item::Insn));
            let (code, value) = if on {
                (pick([Or_rm16_imm16, Or_rm32_imm32, Or_rm64_imm32]), 0x100)
            } else {
                (pick([And_rm16_imm16, And_rm32_imm32, And_rm64_imm32]), !0x100)
            };
            d.items.extend(
                if word == 2 {
                    Instruction::with2(code, register, value as u32 & 0xffff)
                } else {
                    Instruction::with2(code, register, value)
                }
                .map(Item::Insn),
            );
            d.items
                .extend(Instruction::with1(pick([Push_r16, Push_r32, Push_r64]), register).map(Item::Insn));
            d.insn(Instruction::with(pick([Popfw, Popfd, Popfq])));
            if on {
                self.some(d, 4);
            }
        }
    }

    fn interrupt(&mut self, d: &mut Draft) {
        use Code::*;
        self.one(d);
        let insn = match self.random.below(5) {
            0 => Instruction::with(Int3),
            1 if self.allowance.form(Int1) => Instruction::with(Int1),
            2 if self.bits() != 64 => Instruction::with(Into),
            3 => Instruction::with(Ud2),
            _ => {
                let vector = self.random.pick(&[0x80u32, 0x80, 0x20, 3, 13]);
                // An error code is not pushed by INT n: not those whose stubs expect one.
                let vector = if vector == 13 && self.mode != Mode::Real { 0x20 } else { vector };
                Instruction::with1(Int_imm8, vector).expect("an interrupt")
            }
        };
        d.insn(insn);
        self.one(d);
    }
}
