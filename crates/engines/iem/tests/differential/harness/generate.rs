//! Random instruction sequences, from iced's instruction tables.
//!
//! A sequence is a list of groups: the instruction under test with the moves that put its address registers in place. Groups can
//! be removed without changing what the others do to addresses, which is what minimising needs. Flags that an
//! instruction leaves undefined (SDM volume 1, appendix A, as iced's tables have it) are defined again before they are used.

use cpum::state::{XsaveArea, rflags};
use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, Instruction, MemoryOperand, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register, RflagsBits,
};
use iem::unit::{Features, classify};

use super::{CODE, CODE_LEN, DATA, DATA_LEN, State, TABLE, TABLE_LEN, USER_CODE, USER_STACK};
use conformance::random::Random;

/// Room left at the ends of the data for operands that reach further than their address.
const MARGIN: u64 = 1024;

#[derive(Clone, Debug)]
pub struct Group {
    pub setup: Vec<Instruction>,
    pub insn: Instruction,
    /// The instruction is a branch over the next group.
    pub skips: bool,
    /// The setup instruction whose 64-bit immediate becomes the address behind the group.
    pub target: Option<usize>,
}

impl Group {
    fn plain(setup: Vec<Instruction>, insn: Instruction) -> Self {
        Self { setup, insn, skips: false, target: None }
    }
}

/// A test case.
#[derive(Clone)]
pub struct Case {
    pub start: State,
    pub groups: Vec<Group>,
    pub data: Vec<u8>,
    pub table: Vec<u8>,
}

/// An instruction's place in the assembled code.
pub struct Placed {
    pub ip: u64,
    pub insn: Instruction,
    /// iced's set of flags that are undefined before it.
    undefined: u32,
}

pub struct Assembled {
    pub bytes: Vec<u8>,
    pub placed: Vec<Placed>,
    /// Instructions under test.
    pub count: usize,
}

/// What to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    All,
    Integer,
    Vector,
    X87,
}

pub struct Generator {
    pub random: Random,
    integer: Vec<Code>,
    sse: Vec<Code>,
    avx: Vec<Code>,
    x87: Vec<Code>,
    mmx: Vec<Code>,
    focus: Focus,
}

impl Generator {
    pub fn new(seed: u64, focus: Focus) -> Self {
        let mut generator = Self {
            random: Random(seed),
            integer: Vec::new(),
            sse: Vec::new(),
            avx: Vec::new(),
            x87: Vec::new(),
            mmx: Vec::new(),
            focus,
        };
        for code in Code::values() {
            let op = code.op_code();
            if !op.mode64()
                || !matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                || excluded(code)
            {
                continue;
            }
            let mut insn = Instruction::default();
            insn.set_code(code);
            if let Some(class) = classify(&insn) {
                if !Features::host().contains(class.features) {
                    continue;
                }
                use iem::unit::Kind;
                match class.kind {
                    Kind::X87 | Kind::X87NoWait | Kind::Wait => generator.x87.push(code),
                    Kind::Avx => generator.avx.push(code),
                    Kind::Mmx => generator.mmx.push(code),
                    Kind::Sse => {
                        if (0..op.op_count())
                            .any(|i| matches!(op.op_kind(i), K::mm_reg | K::mm_or_mem | K::mm_rm))
                        {
                            generator.mmx.push(code);
                        } else {
                            generator.sse.push(code);
                        }
                    }
                    Kind::Fxsave | Kind::Xsave => {}
                }
            } else if integer(code) {
                generator.integer.push(code);
            }
        }
        generator
    }

    /// How many forms each class has: integer, SSE, AVX, x87, MMX.
    pub fn sizes(&self) -> [usize; 5] {
        [self.integer.len(), self.sse.len(), self.avx.len(), self.x87.len(), self.mmx.len()]
    }

    pub fn case(&mut self, groups: usize) -> Case {
        let start = self.start();
        let groups = (0..groups).map(|_| self.group()).collect();
        let mut data = vec![0; DATA_LEN];
        // A fresh quarter is enough to vary; the rest repeats it.
        for lane in data[..DATA_LEN / 4].chunks_exact_mut(8) {
            lane.copy_from_slice(&self.random.lane().to_le_bytes());
        }
        for i in 1..4 {
            data.copy_within(..DATA_LEN / 4, i * DATA_LEN / 4);
        }
        // Small signed numbers: 32-bit in the first half, 64-bit in the second.
        let mut table = vec![0; TABLE_LEN];
        let (narrow, wide) = table.split_at_mut(TABLE_LEN / 2);
        for word in narrow.chunks_exact_mut(4) {
            word.copy_from_slice(&(self.random.below(64) as i32 - 32).to_le_bytes());
        }
        for word in wide.chunks_exact_mut(8) {
            word.copy_from_slice(&(self.random.below(64) as i64 - 32).to_le_bytes());
        }
        Case { start, groups, data, table }
    }

    fn start(&mut self) -> State {
        let random = &mut self.random;
        let gpr = std::array::from_fn(|_| random.integer());
        let mut xsave = XsaveArea::reset();
        for at in (160..416).chain(576..832).step_by(8) {
            xsave.0[at..at + 8].copy_from_slice(&random.lane().to_le_bytes());
        }
        let mut mxcsr = 0x1f80u32;
        if random.percent(20) {
            mxcsr |= (random.word() as u32) & 0xe040;
        }
        if random.percent(4) {
            mxcsr &= !(random.word() as u32 & 0x1f80);
        }
        if random.percent(20) {
            // Sticky flags; only masked ones, since unmasked ones are not an architectural starting point to care about.
            mxcsr |= random.word() as u32 & 0x3f & (mxcsr >> 7);
        }
        xsave.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        let mut control = 0x37fu16;
        if random.percent(20) {
            control = control & !0xf00 | random.pick(&[0, 0x200, 0x300]) | (random.word() as u16 & 0xc00);
        }
        if random.percent(4) {
            control &= !(random.word() as u16 & 0x3f);
        }
        xsave.0[..2].copy_from_slice(&control.to_le_bytes());
        // Some registers on the x87 stack.
        let count = random.below(9);
        let top = (8 - count) % 8;
        xsave.0[2..4].copy_from_slice(&((top as u16) << 11).to_le_bytes());
        xsave.0[4] = (0xff00u16 >> count) as u8;
        for i in 0..count {
            let at = 32 + 16 * i;
            let (mantissa, exponent) = match random.below(8) {
                0 => (0, 0),
                1 => (1 << 63, 0x7fff),
                2 => (random.word() | 3 << 62, 0x7fff),
                3 => (random.word() >> 1, 0),
                4 => (random.word(), random.word() as u16),
                _ => (random.word() | 1 << 63, 16383 - 70 + random.below(140) as u16),
            };
            let sign = random.word() as u16 & 0x8000;
            xsave.0[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
            xsave.0[at + 8..at + 10].copy_from_slice(&(exponent | sign).to_le_bytes());
        }
        let flags = random.word() & rflags::ARITH;
        State { gpr, rip: CODE, rflags: flags | rflags::FIXED | rflags::IF, xsave }
    }

    fn group(&mut self) -> Group {
        let weights: [usize; 7] = match self.focus {
            Focus::All => [40, 17, 20, 8, 5, 7, 3],
            Focus::Integer => [80, 0, 0, 0, 0, 15, 5],
            Focus::Vector => [0, 40, 50, 0, 5, 0, 0],
            Focus::X87 => [0, 0, 0, 90, 8, 0, 0],
        };
        loop {
            let mut draw = self.random.below(weights.iter().sum());
            let class = weights
                .iter()
                .position(|&w| {
                    let hit = draw < w;
                    draw = draw.wrapping_sub(w);
                    hit
                })
                .unwrap_or(0);
            let group = match class {
                5 => self.special(),
                6 => Some(self.branch()),
                _ => {
                    let list = match class {
                        0 => &self.integer,
                        1 => &self.sse,
                        2 => &self.avx,
                        3 => &self.x87,
                        _ => &self.mmx,
                    };
                    let code = list[self.random.below(list.len())];
                    self.instruction(code)
                }
            };
            if let Some(group) = group {
                return group;
            }
        }
    }

    fn branch(&mut self) -> Group {
        use Code::*;
        let code = self.random.pick(&[
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
        ]);
        Group { skips: true, ..Group::plain(Vec::new(), Instruction::with_branch(code, CODE).unwrap()) }
    }

    /// Strings, stack and flags instructions, whose registers have to be prepared.
    fn special(&mut self) -> Option<Group> {
        use Code::*;
        let mut setup = Vec::new();
        let middle = DATA + DATA_LEN as u64 / 2;
        let spot = |random: &mut Random| {
            if random.percent(3) {
                // At the ends of what is mapped.
                let end = random.pick(&[DATA, TABLE + TABLE_LEN as u64]);
                return end - 64 + random.below(128) as u64;
            }
            middle - 2048 + random.below(4096) as u64
        };
        if self.random.percent(25) {
            return self.transfer();
        }
        if self.random.percent(2) {
            return Some(self.forbidden());
        }
        let insn = match self.random.below(3) {
            0 => {
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
                let narrow = self.random.percent(15);
                let mut insn = Instruction::default();
                insn.set_code(code);
                let op = code.op_code();
                for i in 0..op.op_count() {
                    match op.op_kind(i) {
                        K::seg_rSI => insn
                            .set_op_kind(i, if narrow { OpKind::MemorySegESI } else { OpKind::MemorySegRSI }),
                        K::es_rDI => insn
                            .set_op_kind(i, if narrow { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI }),
                        K::al => insn.set_op_register(i, Register::AL),
                        K::ax => insn.set_op_register(i, Register::AX),
                        K::eax => insn.set_op_register(i, Register::EAX),
                        K::rax => insn.set_op_register(i, Register::RAX),
                        _ => return None,
                    }
                }
                let from = spot(&mut self.random);
                // Often close to each other, so that they overlap.
                let to = if self.random.percent(30) {
                    from.wrapping_add(self.random.below(64) as u64).wrapping_sub(32)
                } else {
                    spot(&mut self.random)
                };
                setup.push(mov(Register::RSI, from));
                setup.push(mov(Register::RDI, to));
                if self.random.percent(60) {
                    setup.push(mov(Register::RCX, self.random.below(200) as u64));
                    if self.random.percent(70) {
                        insn.set_has_rep_prefix(true)
                    } else {
                        insn.set_has_repne_prefix(true)
                    }
                }
                insn
            }
            1 => {
                setup.push(mov(Register::RSP, spot(&mut self.random)));
                match self.random.below(12) {
                    0 => Instruction::with(Pushfq),
                    1 => Instruction::with(Pushfw),
                    2 => {
                        // POPF takes what is pushed here: arithmetic flags, DF, and IF and IOPL, which it must not change.
                        // AC would hit the signal handler; NT and ID would stay set on the host.
                        let value = self.random.word() as i32 & 0x3ed5;
                        setup.push(Instruction::with1(Pushq_imm32, value).ok()?);
                        Instruction::with(Popfq)
                    }
                    3 => Instruction::with2(Enterq_imm16_imm8, self.random.below(64) as u32, 0).ok()?,
                    4 => {
                        setup.push(mov(Register::RBP, spot(&mut self.random)));
                        let nesting = self.random.below(5) as u32;
                        Instruction::with2(Enterq_imm16_imm8, self.random.below(256) as u32, nesting).ok()?
                    }
                    5 => {
                        setup.push(mov(Register::RBP, spot(&mut self.random)));
                        Instruction::with(Leaveq)
                    }
                    6 => Instruction::with1(Push_r64, self.gpr(8)).ok()?,
                    7 => Instruction::with1(Pop_r64, self.gpr(8)).ok()?,
                    8 => Instruction::with1(Push_r16, self.gpr(2)).ok()?,
                    9 => Instruction::with1(Pop_r16, self.gpr(2)).ok()?,
                    10 => {
                        let mut memory =
                            Instruction::with1(Pop_rm64, MemoryOperand::with_base(Register::RSP)).ok()?;
                        memory.set_memory_displacement64(self.random.below(64) as u64 * 8);
                        memory.set_memory_displ_size(8);
                        memory
                    }
                    _ => Instruction::with1(Pushq_imm8, self.random.below(256) as i32 - 128).ok()?,
                }
            }
            _ => Instruction::with(
                self.random.pick(&[Cld, Std, Cld, Clc, Stc, Cmc, Lahf, Sahf, Cbw, Cwde, Cdqe, Cwd, Cdq, Cqo]),
            ),
        };
        Some(Group::plain(setup, insn))
    }

    /// Jumps, calls and returns to the instruction behind.
    fn transfer(&mut self) -> Option<Group> {
        use Code::*;
        let register = loop {
            let register = self.gpr(8);
            if register != Register::RSP {
                break register;
            }
        };
        let stack = DATA + DATA_LEN as u64 / 2 + self.random.below(2048) as u64;
        let push = |value: u64| Instruction::with1(Pushq_imm32, value as i32);
        let mut setup = vec![mov(register, 0)];
        let kind = self.random.below(8);
        if kind > 1 {
            setup.push(mov(Register::RSP, stack));
        }
        let insn = match kind {
            0 => Instruction::with1(Jmp_rm64, register).ok()?,
            1 => {
                let code = self.random.pick(&[
                    Loop_rel8_64_RCX,
                    Loope_rel8_64_RCX,
                    Loopne_rel8_64_RCX,
                    Jrcxz_rel8_64,
                ]);
                return Some(Group::plain(Vec::new(), Instruction::with_branch(code, CODE).ok()?));
            }
            2 => Instruction::with1(Call_rm64, register).ok()?,
            3 => {
                return Some(Group::plain(
                    vec![mov(Register::RSP, stack)],
                    Instruction::with_branch(Call_rel32_64, CODE).ok()?,
                ));
            }
            4 => {
                setup.push(Instruction::with1(Push_r64, register).ok()?);
                Instruction::with(Retnq)
            }
            5 => {
                setup.push(Instruction::with1(Push_r64, register).ok()?);
                Instruction::with1(Retnq_imm16, self.random.below(64) as u32).ok()?
            }
            6 => {
                setup.push(push(USER_CODE.into()).ok()?);
                setup.push(Instruction::with1(Push_r64, register).ok()?);
                Instruction::with(Retfq)
            }
            _ => {
                setup.push(push(USER_STACK.into()).ok()?);
                setup.push(push(stack - 1024).ok()?);
                setup.push(push(self.random.word() & 0xcd5 | rflags::FIXED | rflags::IF).ok()?);
                setup.push(push(USER_CODE.into()).ok()?);
                setup.push(Instruction::with1(Push_r64, register).ok()?);
                Instruction::with(Iretq)
            }
        };
        Some(Group { target: Some(0), ..Group::plain(setup, insn) })
    }

    /// What user code may not do.
    fn forbidden(&mut self) -> Group {
        use Code::*;
        let simple = [
            Cli, Sti, Hlt, Clts, Invd, Wbinvd, Wrmsr, Rdmsr, Swapgs, Sysretq, Ud2, In_AL_DX, Out_DX_EAX,
            Iretq,
        ];
        let insn = match self.random.below(4) {
            0 => Instruction::with2(
                Mov_r64_cr,
                Register::RAX,
                self.random.pick(&[Register::CR0, Register::CR2, Register::CR3]),
            ),
            1 => Instruction::with2(
                Mov_dr_r64,
                self.random.pick(&[Register::DR0, Register::DR7]),
                Register::RBX,
            ),
            2 => Instruction::with1(Lgdt_m1664, MemoryOperand::with_displ(DATA + MARGIN, 8)),
            _ => {
                let code = self.random.pick(&simple);
                return match code {
                    In_AL_DX => Group::plain(
                        Vec::new(),
                        Instruction::with2(code, Register::AL, Register::DX).unwrap(),
                    ),
                    Out_DX_EAX => Group::plain(
                        Vec::new(),
                        Instruction::with2(code, Register::DX, Register::EAX).unwrap(),
                    ),
                    // Returns to whatever lies on the stack: an address that is not canonical.
                    Iretq => Group::plain(vec![mov(Register::RSP, 1 << 60)], Instruction::with(code)),
                    _ => Group::plain(Vec::new(), Instruction::with(code)),
                };
            }
        };
        Group::plain(Vec::new(), insn.unwrap())
    }

    fn gpr(&mut self, bytes: usize) -> Register {
        let n = self.random.below(16) as u32;
        match bytes {
            // Without and with REX: AL, CL, DL, BL, SPL … R15B.
            1 => {
                if self.random.percent(12) {
                    Register::AH + n % 4
                } else {
                    self.random.pick(&[
                        Register::AL,
                        Register::CL,
                        Register::DL,
                        Register::BL,
                        Register::SPL,
                        Register::BPL,
                        Register::SIL,
                        Register::DIL,
                        Register::R8L,
                        Register::R9L,
                        Register::R10L,
                        Register::R11L,
                        Register::R12L,
                        Register::R13L,
                        Register::R14L,
                        Register::R15L,
                    ])
                }
            }
            2 => Register::AX + n,
            4 => Register::EAX + n,
            _ => Register::RAX + n,
        }
    }

    fn vector(&mut self, first: Register) -> Register {
        // Few registers, so that results meet.
        let n = if self.random.percent(70) { self.random.below(5) } else { self.random.below(16) };
        first + n as u32
    }

    /// Fills in operands for a form.
    fn instruction(&mut self, code: Code) -> Option<Group> {
        let op = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_code_size(iced_x86::CodeSize::Code64);
        let mut setup = Vec::new();
        let mut memory = false;
        let mut vsib = None;
        for i in 0..op.op_count() {
            let random = &mut self.random;
            let as_memory = random.percent(50);
            let kind = op.op_kind(i);
            let register = match kind {
                K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::mm_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                    if as_memory =>
                {
                    memory = true;
                    insn.set_op_kind(i, OpKind::Memory);
                    continue;
                }
                K::mem => {
                    memory = true;
                    insn.set_op_kind(i, OpKind::Memory);
                    continue;
                }
                K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                    vsib = Some(kind);
                    insn.set_op_kind(i, OpKind::Memory);
                    continue;
                }
                K::mem_offs => {
                    insn.set_op_kind(i, OpKind::Memory);
                    insn.set_memory_displ_size(8);
                    insn.set_memory_displacement64(
                        DATA + MARGIN + random.below(DATA_LEN - 2 * MARGIN as usize) as u64,
                    );
                    continue;
                }
                K::r8_or_mem | K::r8_reg | K::r8_opcode => self.gpr(1),
                K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => self.gpr(2),
                K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => self.gpr(4),
                K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => self.gpr(8),
                K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + random.below(8) as u32,
                K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                    self.vector(Register::XMM0)
                }
                K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                    self.vector(Register::YMM0)
                }
                K::al => Register::AL,
                K::cl => Register::CL,
                K::ax => Register::AX,
                K::eax => Register::EAX,
                K::rax => Register::RAX,
                K::st0 => Register::ST0,
                K::sti_opcode => Register::ST0 + random.below(8) as u32,
                K::imm8 => {
                    let second = (0..i).any(|j| insn.op_kind(j) == OpKind::Immediate8);
                    let value = random.word() as u8;
                    if second {
                        insn.set_op_kind(i, OpKind::Immediate8_2nd);
                        insn.set_immediate8_2nd(value);
                    } else {
                        insn.set_op_kind(i, OpKind::Immediate8);
                        insn.set_immediate8(value);
                    }
                    continue;
                }
                K::imm8_const_1 => {
                    insn.set_op_kind(i, OpKind::Immediate8);
                    insn.set_immediate8(1);
                    continue;
                }
                K::imm8sex16 => {
                    insn.set_op_kind(i, OpKind::Immediate8to16);
                    insn.set_immediate8to16(i16::from(random.word() as i8));
                    continue;
                }
                K::imm8sex32 => {
                    insn.set_op_kind(i, OpKind::Immediate8to32);
                    insn.set_immediate8to32(i32::from(random.word() as i8));
                    continue;
                }
                K::imm8sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate8to64);
                    insn.set_immediate8to64(i64::from(random.word() as i8));
                    continue;
                }
                K::imm16 => {
                    insn.set_op_kind(i, OpKind::Immediate16);
                    insn.set_immediate16(random.integer() as u16);
                    continue;
                }
                K::imm32 => {
                    insn.set_op_kind(i, OpKind::Immediate32);
                    insn.set_immediate32(random.integer() as u32);
                    continue;
                }
                K::imm32sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate32to64);
                    insn.set_immediate32to64(i64::from(random.integer() as i32));
                    continue;
                }
                K::imm64 => {
                    insn.set_op_kind(i, OpKind::Immediate64);
                    insn.set_immediate64(random.integer());
                    continue;
                }
                K::seg_rDI => {
                    insn.set_op_kind(i, OpKind::MemorySegRDI);
                    setup.push(mov(
                        Register::RDI,
                        DATA + MARGIN + random.below(DATA_LEN - 2 * MARGIN as usize) as u64,
                    ));
                    continue;
                }
                K::seg_rBX_al => {
                    insn.set_op_kind(i, OpKind::Memory);
                    insn.set_memory_base(Register::RBX);
                    insn.set_memory_index(Register::AL);
                    setup.push(mov(
                        Register::RBX,
                        DATA + MARGIN + random.below(DATA_LEN - 2 * MARGIN as usize) as u64,
                    ));
                    continue;
                }
                _ => return None,
            };
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register);
        }
        if memory {
            self.address(&mut insn, &mut setup);
        }
        if let Some(kind) = vsib {
            self.gather_address(&mut insn, &mut setup, kind);
        }
        self.tame(&mut insn, &mut setup);
        // AH to BH exclude REX; such combinations have no encoding.
        Encoder::new(64).encode(&insn, CODE).ok()?;
        Some(Group::plain(setup, insn))
    }

    /// Chooses an addressing form that reaches the data.
    fn address(&mut self, insn: &mut Instruction, setup: &mut Vec<Instruction>) {
        let size = insn.memory_size().size().max(1) as u64;
        let mut target = DATA + MARGIN + self.random.below(DATA_LEN - 2 * MARGIN as usize) as u64;
        let natural = size.next_power_of_two();
        if self.random.percent(50) || classify(insn).is_some_and(|c| c.align > 1) || size == 16 {
            target &= !(natural - 1);
            if natural == 16 && self.random.percent(2) {
                target += 8;
            }
        } else if self.random.percent(10) {
            // Across a page boundary.
            target = (target | 0xfff) + 1 - self.random.below(size as usize) as u64;
            target = target.min(DATA + DATA_LEN as u64 - MARGIN);
        }
        let random = &mut self.random;
        let mut form = random.below(10);
        if random.percent(2) {
            // Somewhere that faults, in whole or in part.
            target = match random.below(6) {
                0 => DATA - random.below(64) as u64,
                1 => TABLE + TABLE_LEN as u64 - random.below(64) as u64,
                2 => CODE + random.below(CODE_LEN) as u64,
                3 => random.below(4096) as u64,
                _ => (1 << 47) + (random.word() >> 18),
            };
            form = form.max(2);
        }
        match form {
            0 => {
                insn.set_memory_base(Register::RIP);
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(target);
            }
            1 => {
                insn.set_memory_displ_size(8);
                insn.set_memory_displacement64(target);
            }
            form => {
                let narrow = random.percent(8);
                let base = random.below(16) as u32;
                let first = if narrow { Register::EAX } else { Register::RAX };
                let mut rest = target;
                let displacement = match random.below(3) {
                    0 => 0,
                    1 => i64::from(random.word() as i8),
                    _ => i64::from(random.word() as i32 >> random.below(20)),
                };
                rest = rest.wrapping_sub(displacement as u64);
                let mut index = None;
                if form > 5 {
                    let n = random.below(16) as u32;
                    if n != 4 && n != base {
                        let scale = random.pick(&[1u64, 2, 4, 8]);
                        let value =
                            if random.percent(50) { random.below(1 << 12) as u64 } else { random.word() };
                        rest = rest.wrapping_sub(value.wrapping_mul(scale));
                        index = Some((n, scale, value));
                    }
                }
                if narrow {
                    rest &= 0xffff_ffff;
                }
                setup.push(mov(Register::RAX + base, rest));
                insn.set_memory_base(first + base);
                if let Some((n, scale, value)) = index {
                    setup.push(mov(Register::RAX + n, value));
                    insn.set_memory_index(first + n);
                    insn.set_memory_index_scale(scale as u32);
                }
                insn.set_memory_displacement64(displacement as u64);
                if displacement != 0 {
                    insn.set_memory_displ_size(1);
                    if i8::try_from(displacement).is_err() {
                        insn.set_memory_displ_size(if narrow { 4 } else { 8 });
                        if narrow {
                            insn.set_memory_displacement64(displacement as u64 & 0xffff_ffff);
                        }
                    }
                }
            }
        }
        if self.random.percent(5) {
            // Without effect in 64-bit mode.
            insn.set_segment_prefix(self.random.pick(&[
                Register::ES,
                Register::CS,
                Register::SS,
                Register::DS,
            ]));
        }
        if insn.code().op_code().can_use_lock_prefix()
            && insn.op0_kind() == OpKind::Memory
            && self.random.percent(20)
        {
            insn.set_has_lock_prefix(true);
        }
    }

    fn gather_address(&mut self, insn: &mut Instruction, setup: &mut Vec<Instruction>, kind: K) {
        let (first, wide) = match kind {
            K::mem_vsib32x => (Register::XMM0, false),
            K::mem_vsib64x => (Register::XMM0, true),
            K::mem_vsib32y => (Register::YMM0, false),
            _ => (Register::YMM0, true),
        };
        let n = self.random.below(16) as u32;
        let base = self.random.below(16) as u32;
        let at = TABLE + if wide { TABLE_LEN as u64 / 2 } else { 0 } + self.random.below(32) as u64 * 32;
        let load = Instruction::with2(
            Code::VEX_Vmovdqu_ymm_ymmm256,
            Register::YMM0 + n,
            MemoryOperand::with_displ(at, 8),
        );
        setup.extend(load);
        setup.push(mov(Register::RAX + base, DATA + DATA_LEN as u64 / 2 + self.random.below(2048) as u64));
        insn.set_memory_base(Register::RAX + base);
        insn.set_memory_index(first + n);
        insn.set_memory_index_scale(1 << self.random.below(4));
    }

    /// Prepares operands of instructions that would mostly fault or whose results are undefined with random ones.
    fn tame(&mut self, insn: &mut Instruction, setup: &mut Vec<Instruction>) {
        use Mnemonic::*;
        match insn.mnemonic() {
            // The bit offset moves the address.
            Bt | Bts | Btr | Btc
                if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
            {
                let offset = self.random.below(4096) as i64 - 2048;
                let register = insn.op1_register().full_register();
                let address = [insn.memory_base(), insn.memory_index()].map(Register::full_register);
                // If it is also an address register, only the low byte of its value counts here.
                if !address.contains(&register) {
                    setup.push(mov(register, offset as u64));
                } else {
                    insn.set_op1_register(match insn.op1_register().size() {
                        2 => Register::AX,
                        4 => Register::EAX,
                        _ => Register::RAX,
                    });
                    if address.contains(&Register::RAX) {
                        // Give up on the memory form.
                        insn.set_op0_kind(OpKind::Register);
                        insn.set_op0_register(insn.op1_register());
                        insn.set_memory_base(Register::None);
                        insn.set_memory_index(Register::None);
                        insn.set_memory_displ_size(0);
                        insn.set_has_lock_prefix(false);
                    } else {
                        setup.push(mov(Register::RAX, offset as u64));
                    }
                }
            }
            Div | Idiv if self.random.percent(85) => {
                let address = [insn.memory_base(), insn.memory_index()].map(Register::full_register);
                let small = self.random.below(3) as u64;
                for (register, value) in [(Register::RDX, small), (Register::RAX, self.random.integer())] {
                    if !address.contains(&register)
                        && (register == Register::RDX || insn.op0_register().size() < 4)
                    {
                        setup.push(mov(register, value));
                    }
                }
            }
            // 16-bit double shifts by more than 16 are undefined.
            Shld | Shrd if insn.op1_register().size() == 2 => {
                if insn.op2_kind() == OpKind::Immediate8 {
                    insn.set_immediate8(insn.immediate8() & 15);
                } else {
                    let address = [insn.memory_base(), insn.memory_index()].map(Register::full_register);
                    if address.contains(&Register::RCX) {
                        insn.set_code(if insn.mnemonic() == Shld {
                            Code::Shld_rm16_r16_imm8
                        } else {
                            Code::Shrd_rm16_r16_imm8
                        });
                        insn.set_op2_kind(OpKind::Immediate8);
                        insn.set_immediate8(3);
                    } else {
                        setup.push(mov(Register::RCX, self.random.below(16) as u64));
                    }
                }
            }
            Ldmxcsr | Vldmxcsr => {}
            _ => {}
        }
    }
}

/// `mov register, value` in the form that fits any 64-bit value.
fn mov(register: Register, value: u64) -> Instruction {
    Instruction::with2(Code::Mov_r64_imm64, register, value).unwrap()
}

impl Case {
    /// Encodes the groups one after another, INT3 last.
    pub fn assemble(&self) -> Assembled {
        let mut encoder = Encoder::new(64);
        let mut placed = Vec::new();
        let mut at = CODE;
        let mut undefined = 0u32;
        let mut pending: Option<(usize, u64)> = None;
        let mut bytes: Vec<u8> = Vec::new();
        let mut emit = |insn: &Instruction,
                        undefined: u32,
                        at: &mut u64,
                        bytes: &mut Vec<u8>,
                        placed: &mut Vec<Placed>| {
            let len = encoder.encode(insn, *at).expect("encodable");
            bytes.extend(encoder.take_buffer());
            placed.push(Placed { ip: *at, insn: *insn, undefined });
            *at += len as u64;
        };
        for group in &self.groups {
            let skip = pending.take();
            let mut read = group.insn.rflags_read();
            if matches!(group.insn.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Lahf) {
                read = u32::MAX;
            }
            let before = undefined;
            if read & undefined != 0 {
                let define = Instruction::with2(Code::Cmp_rm64_imm8, Register::RCX, 5).unwrap();
                emit(&define, undefined, &mut at, &mut bytes, &mut placed);
                undefined = 0;
            }
            let mut setup_at = None;
            for (i, insn) in group.setup.iter().enumerate() {
                emit(insn, undefined, &mut at, &mut bytes, &mut placed);
                if group.target == Some(i) {
                    setup_at = Some(bytes.len());
                }
            }
            let start = bytes.len();
            let mut insn = group.insn;
            if insn.is_loop() || insn.is_loopcc() || insn.is_jcx_short() {
                insn.set_near_branch64(at + 2);
            } else if insn.is_call_near() {
                insn.set_near_branch64(at + 5);
            }
            emit(&insn, undefined, &mut at, &mut bytes, &mut placed);
            if let Some(end) = setup_at {
                bytes[end - 8..end].copy_from_slice(&at.to_le_bytes());
            }
            if always_writes_flags(&group.insn) {
                undefined &=
                    !(group.insn.rflags_written() | group.insn.rflags_cleared() | group.insn.rflags_set());
            }
            let once = group.insn.op1_kind() == OpKind::Immediate8 && group.insn.immediate8() & 31 == 1;
            if matches!(group.insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && !once {
                // iced takes counts that are multiples of the size plus one for no rotation at all.
                undefined |= RflagsBits::OF;
            }
            undefined |= group.insn.rflags_undefined();
            if let Some((field, end)) = skip {
                // The branch before this group lands here.
                let distance = (at - end) as u32;
                bytes[field..field + 4].copy_from_slice(&distance.to_le_bytes());
                undefined |= before;
            }
            if group.skips {
                let len = bytes.len() - start;
                pending = Some((start + len - 4, at));
            }
        }
        if let Some((field, _)) = pending {
            bytes[field..field + 4].copy_from_slice(&0u32.to_le_bytes());
        }
        let count = self.groups.len();
        emit(&Instruction::with(Code::Int3), undefined, &mut at, &mut bytes, &mut placed);
        assert!(bytes.len() <= CODE_LEN);
        Assembled { bytes, placed, count }
    }
}

impl Assembled {
    /// How many instructions lie before `rip`, those that prepare registers included.
    pub fn reached(&self, rip: u64) -> usize {
        self.placed.iter().filter(|p| p.ip < rip).count()
    }

    /// Flags (RFLAGS bits) that are undefined when a sequence has ended with `rip`: at a fault, or past the final INT3.
    pub fn undefined_at(&self, rip: u64) -> u64 {
        // A fault can be inside: FSTCW is WAIT and FNSTCW.
        let at = self.placed.iter().rev().find(|p| p.ip <= rip);
        rflags_of(at.map_or(0, |p| p.undefined))
    }
}

/// False for shifts by a count that may be zero and repeated comparisons, which may leave all flags alone.
fn always_writes_flags(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd => {
            let count = insn.op_count() - 1;
            insn.op_kind(count) == OpKind::Immediate8 && insn.immediate8() & 31 != 0
        }
        Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq => {
            !insn.has_rep_prefix() && !insn.has_repne_prefix()
        }
        _ => true,
    }
}

/// iced's flag set as RFLAGS bits.
fn rflags_of(bits: u32) -> u64 {
    [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ]
    .iter()
    .filter(|(iced, _)| bits & iced != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

/// Forms that a test of user-mode results cannot use.
fn excluded(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        // Depend on the system or the moment, or change what the process needs.
        Rdtsc | Rdtscp | Rdpmc | Cpuid | Rdrand | Rdseed | Rdpid | Xgetbv | Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Sgdt | Sidt
            | Sldt | Str | Smsw | Lar | Lsl | Verr | Verw | Lss | Lfs | Lgs | Syscall | Sysenter | Sysexit | Sysret
            | Int | Int1 | Int3 | Into | Iret | Iretd | Iretq | Retf | Ret | Call | Jmp | Sysretq | Sysexitq
            | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
            // Their images hold the code selector, which this unit does not.
            | Fnsave | Fsave | Fnstenv | Fstenv | Fldenv | Frstor
            // Prepared by `special`.
            | Push | Pop | Pushf | Pushfq | Popf | Popfq | Enter | Leave
            // Undefined results.
            | Ud0 | Ud1 | Ud2 | Reservednop
            // Random control words would unmask everything; the starting state varies them.
            | Ldmxcsr | Vldmxcsr | Fldcw
            | Sti | Cli | Hlt | Clts | Invd | Wbinvd | Clac | Stac | Monitor | Mwait
    )
        // Undefined; and AMD's CPUs read four bytes where Intel's read two.
        || matches!(code, Code::Bswap_r16 | Code::Movsxd_r16_rm16 | Code::Wait)
}

/// Integer forms that user code may have, without branches.
fn integer(code: Code) -> bool {
    use CpuidFeature as F;
    let op = code.op_code();
    if matches!(
        code,
        Code::DeclareByte
            | Code::DeclareWord
            | Code::DeclareDword
            | Code::DeclareQword
            | Code::Zero_bytes
            | Code::INVALID
    ) {
        return false;
    }
    if !op.cpl3() || op.is_privileged() || op.is_input_output() {
        return false;
    }
    let op_kinds = (0..op.op_count()).map(|i| op.op_kind(i));
    for kind in op_kinds {
        if matches!(
            kind,
            K::br16_1
                | K::br32_1
                | K::br64_1
                | K::br16_2
                | K::br32_4
                | K::br64_4
                | K::seg_reg
                | K::seg_rSI
                | K::es_rDI
        ) {
            return false;
        }
    }
    let host = |feature: &F| match feature {
        F::BMI1 => std::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::is_x86_feature_detected!("bmi2"),
        F::LZCNT => std::is_x86_feature_detected!("lzcnt"),
        F::POPCNT => std::is_x86_feature_detected!("popcnt"),
        F::MOVBE => std::is_x86_feature_detected!("movbe"),
        F::ADX => std::is_x86_feature_detected!("adx"),
        F::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::CMPXCHG16B => true,
        F::SSE | F::SSE2 | F::MULTIBYTENOP | F::PAUSE | F::PREFETCHW | F::CLFSH => true,
        _ => false,
    };
    code.cpuid_features().iter().all(host)
}
