//! Makes programs up, from iced's instruction tables.

use cpum::state::XsaveArea;
use cpum::state::{rflags, seg};
use iced_x86::{
    Code, CodeSize, CpuidFeature, Encoder, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register,
};
use iem::unit::{Features, classify};

use super::mode::*;
use super::program::{Case, Group, Item, SCRATCH, Start, absolute};
use crate::allowance::Allowance;
use crate::random::Random;

/// What to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    All,
    Integer,
    Vector,
    X87,
}

impl Focus {
    pub fn parse(name: &str) -> Option<Self> {
        [Self::All, Self::Integer, Self::Vector, Self::X87]
            .into_iter()
            .find(|f| format!("{f:?}").eq_ignore_ascii_case(name))
    }
}

pub struct Generator {
    pub random: Random,
    pub(super) mode: Mode,
    focus: Focus,
    pub(super) allowance: Allowance,
    integer: Vec<Code>,
    sse: Vec<Code>,
    avx: Vec<Code>,
    x87: Vec<Code>,
    mmx: Vec<Code>,
}

/// A register that holds an address, for more than one access.
#[derive(Clone, Copy)]
pub(super) struct Base {
    pub(super) register: Register,
    /// Offset in the segment.
    value: u64,
    segment: usize,
}

/// A group in the making.
pub(super) struct Draft {
    pub(super) items: Vec<Item>,
    pub(super) base: Option<Base>,
    marks: u8,
    pub(super) slots: u64,
}

impl Draft {
    pub(super) fn new() -> Self {
        Self { items: Vec::new(), base: None, marks: 0, slots: 0 }
    }
    pub(super) fn insn(&mut self, insn: Instruction) {
        self.items.push(Item::Insn(insn));
    }
    pub(super) fn mark(&mut self) -> u8 {
        self.marks += 1;
        self.marks
    }
}

pub(super) fn general(n: usize, bytes: usize) -> Register {
    let n = n as u32;
    match bytes {
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

impl Generator {
    pub fn new(mode: Mode, seed: u64, focus: Focus, allowance: Allowance) -> Self {
        let mut generator = Self {
            random: Random(seed),
            mode,
            focus,
            allowance,
            integer: Vec::new(),
            sse: Vec::new(),
            avx: Vec::new(),
            x87: Vec::new(),
            mmx: Vec::new(),
        };
        for code in Code::values() {
            let op = code.op_code();
            let valid = match mode.bits() {
                16 => op.mode16(),
                32 => op.mode32(),
                _ => op.mode64(),
            };
            let vex = op.encoding() == EncodingKind::VEX;
            if !valid
                || !(vex && mode != Mode::Real && allowance.vex(mode.bits())
                    || op.encoding() == EncodingKind::Legacy)
                || excluded(code)
                || !allowance.form(code)
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
                    Kind::Mmx if allowance.mmx() => generator.mmx.push(code),
                    Kind::Mmx => {}
                    Kind::Sse => {
                        if (0..op.op_count())
                            .any(|i| matches!(op.op_kind(i), K::mm_reg | K::mm_or_mem | K::mm_rm))
                        {
                            if allowance.mmx() {
                                generator.mmx.push(code);
                            }
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

    pub(super) fn bits(&self) -> u32 {
        self.mode.bits()
    }

    /// Bytes of the default operand.
    pub(super) fn word(&self) -> usize {
        (self.bits() / 8) as usize
    }

    pub fn case(&mut self, groups: usize) -> Case {
        let start = self.start();
        let groups = (0..groups).map(|_| self.group()).collect();
        let functions = (0..2).map(|_| self.function()).collect();
        Case { mode: self.mode, start, groups, functions, own_time: self.allowance.kvm }
    }

    fn start(&mut self) -> Start {
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
        let unmask = self.allowance.unmasks();
        if random.percent(4) && unmask {
            mxcsr &= !(random.word() as u32 & 0x1f80);
        }
        if random.percent(20) {
            mxcsr |= random.word() as u32 & 0x3f & (mxcsr >> 7);
        }
        xsave.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        let mut control = 0x37fu16;
        if random.percent(20) {
            control = control & !0xf00 | random.pick(&[0, 0x200, 0x300]) | (random.word() as u16 & 0xc00);
        }
        if random.percent(4) && unmask {
            control &= !(random.word() as u16 & 0x3f);
        }
        xsave.0[..2].copy_from_slice(&control.to_le_bytes());
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
        let mut flags = random.word() & rflags::ARITH | rflags::FIXED | rflags::IF;
        if self.mode != Mode::Real && random.percent(30) {
            flags |= random.word() & rflags::IOPL;
        }
        if self.mode.paged() && random.percent(3) {
            flags |= rflags::AC;
        }
        let mut data = vec![0; DATA_LEN as usize / 2];
        // A fresh quarter is enough to vary; the rest repeats it.
        let fresh = data.len() / 4;
        for lane in data[..fresh].chunks_exact_mut(8) {
            lane.copy_from_slice(&random.lane().to_le_bytes());
        }
        for i in 1..4 {
            data.copy_within(..fresh, i * fresh);
        }
        let rounds = random.pick(&[1, 1, 2, 3, 5, 20, 60]);
        let offset = 0x300 + random.below(0xd00) as u64;
        Start { gpr, rflags: flags, xsave, data, rounds, offset, filler: random.pick(&[0x90, 0xcc, 0xf4, 0]) }
    }

    fn function(&mut self) -> Group {
        let mut d = Draft::new();
        self.some(&mut d, 4);
        Group { items: d.items }
    }

    /// At least one random instruction.
    pub(super) fn some(&mut self, d: &mut Draft, most: usize) {
        for _ in 0..1 + self.random.below(most) {
            self.one(d);
        }
    }

    pub(super) fn one(&mut self, d: &mut Draft) {
        let weights: [usize; 5] = match self.focus {
            Focus::All => [64, 13, 13, 6, 4],
            Focus::Integer => [100, 0, 0, 0, 0],
            Focus::Vector => [8, 42, 50, 0, 0],
            Focus::X87 => [8, 0, 0, 86, 6],
        };
        if self.random.percent(22) {
            return self.plain(d);
        }
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
            let list = match class {
                0 => &self.integer,
                1 => &self.sse,
                2 => &self.avx,
                3 => &self.x87,
                _ => &self.mmx,
            };
            if list.is_empty() {
                continue;
            }
            let code = list[self.random.below(list.len())];
            if self.instruction(code, d).is_some() {
                return;
            }
        }
    }

    /// The instructions that programs are made of: moves, additions and comparisons with a good address.
    fn plain(&mut self, d: &mut Draft) {
        use Code::*;
        let narrow: [Code; 12] = match self.bits() {
            16 => [
                Mov_r16_rm16,
                Mov_rm16_r16,
                Add_r16_rm16,
                Add_rm16_r16,
                Cmp_rm16_r16,
                Cmp_r16_rm16,
                Test_rm16_r16,
                Inc_rm16,
                Dec_r16,
                Sub_r16_rm16,
                Adc_r16_rm16,
                And_rm16_r16,
            ],
            32 => [
                Mov_r32_rm32,
                Mov_rm32_r32,
                Add_r32_rm32,
                Add_rm32_r32,
                Cmp_rm32_r32,
                Cmp_r32_rm32,
                Test_rm32_r32,
                Inc_rm32,
                Dec_r32,
                Sub_r32_rm32,
                Adc_r32_rm32,
                And_rm32_r32,
            ],
            _ => [
                Mov_r64_rm64,
                Mov_rm64_r64,
                Add_r64_rm64,
                Add_rm64_r64,
                Cmp_rm64_r64,
                Cmp_r64_rm64,
                Test_rm64_r64,
                Inc_rm64,
                Dec_rm64,
                Sub_r64_rm64,
                Adc_r64_rm64,
                And_rm64_r64,
            ],
        };
        let code = if self.random.percent(25) {
            self.random.pick(&[
                Mov_r8_rm8,
                Mov_rm8_r8,
                Movzx_r32_rm8,
                Movsx_r32_rm16,
                Mov_r32_rm32,
                Mov_rm32_r32,
                Lea_r32_m,
                Cmp_rm8_r8,
            ])
        } else {
            self.random.pick(&narrow)
        };
        let _ = self.instruction(code, d);
    }

    // ---- operands ----

    pub(super) fn gpr(&mut self, bytes: usize) -> Register {
        let long = self.bits() == 64;
        let n = loop {
            let n = self.random.below(if long { 16 } else { 8 });
            // The stack pointer is kept out of this.
            if n != 4 || bytes == 1 {
                break n;
            }
        };
        if bytes > 1 {
            return general(n, bytes);
        }
        if !long || self.random.percent(12) {
            return Register::AL + self.random.below(8) as u32;
        }
        self.random.pick(&[
            Register::AL,
            Register::CL,
            Register::DL,
            Register::BL,
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

    fn vector(&mut self, first: Register) -> Register {
        let all = if self.bits() == 64 { 16 } else { 8 };
        let n = if self.random.percent(70) { self.random.below(5) } else { self.random.below(all) };
        first + n as u32
    }

    /// Fills in operands for a form and appends it with what it needs.
    fn instruction(&mut self, code: Code, d: &mut Draft) -> Option<()> {
        let op = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        insn.set_code_size(match self.bits() {
            16 => CodeSize::Code16,
            32 => CodeSize::Code32,
            _ => CodeSize::Code64,
        });
        let mut setup = Vec::new();
        let mut memory = false;
        let mut vsib = None;
        let mut base = d.base;
        for i in 0..op.op_count() {
            let as_memory = self.random.percent(55);
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
                    insn.set_memory_displ_size(self.word() as u32);
                    let at = self.plain_spot(8);
                    let offset = self.mode.linear() + at - self.mode.segment(seg::DS).base;
                    insn.set_memory_displacement64(offset);
                    continue;
                }
                K::r8_or_mem | K::r8_reg | K::r8_opcode => self.gpr(1),
                K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => self.gpr(2),
                K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => self.gpr(4),
                K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => self.gpr(8),
                K::mm_or_mem | K::mm_reg | K::mm_rm => Register::MM0 + self.random.below(8) as u32,
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
                K::sti_opcode => Register::ST0 + self.random.below(8) as u32,
                K::imm8 => {
                    let second = (0..i).any(|j| insn.op_kind(j) == OpKind::Immediate8);
                    let value = self.random.word() as u8;
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
                    insn.set_immediate8to16(i16::from(self.random.word() as i8));
                    continue;
                }
                K::imm8sex32 => {
                    insn.set_op_kind(i, OpKind::Immediate8to32);
                    insn.set_immediate8to32(i32::from(self.random.word() as i8));
                    continue;
                }
                K::imm8sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate8to64);
                    insn.set_immediate8to64(i64::from(self.random.word() as i8));
                    continue;
                }
                K::imm16 => {
                    insn.set_op_kind(i, OpKind::Immediate16);
                    insn.set_immediate16(self.random.integer() as u16);
                    continue;
                }
                K::imm32 => {
                    insn.set_op_kind(i, OpKind::Immediate32);
                    insn.set_immediate32(self.random.integer() as u32);
                    continue;
                }
                K::imm32sex64 => {
                    insn.set_op_kind(i, OpKind::Immediate32to64);
                    insn.set_immediate32to64(i64::from(self.random.integer() as i32));
                    continue;
                }
                K::imm64 => {
                    insn.set_op_kind(i, OpKind::Immediate64);
                    insn.set_immediate64(self.random.integer());
                    continue;
                }
                K::seg_rDI | K::seg_rBX_al => {
                    let at = self.mode.linear() + self.plain_spot(16);
                    let value = at - self.mode.segment(seg::DS).base;
                    let n = if kind == K::seg_rDI { 7 } else { 3 };
                    let register = general(n, self.word());
                    setup.push(self.set(register, value));
                    if kind == K::seg_rDI {
                        insn.set_op_kind(
                            i,
                            [OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI]
                                [self.word() / 4],
                        );
                    } else {
                        insn.set_op_kind(i, OpKind::Memory);
                        insn.set_memory_base(register);
                        insn.set_memory_index(Register::AL);
                    }
                    continue;
                }
                _ => return None,
            };
            insn.set_op_kind(i, OpKind::Register);
            insn.set_op_register(i, register);
        }
        if memory {
            base = self.address(&mut insn, &mut setup, base);
        }
        if let Some(kind) = vsib {
            self.gather_address(&mut insn, &mut setup, kind)?;
        }
        self.tame(&mut insn, &mut setup);
        if insn.code().op_code().can_use_lock_prefix()
            && insn.op0_kind() == OpKind::Memory
            && self.random.percent(20)
            && self.allowance.locks()
        {
            insn.set_has_lock_prefix(true);
        }
        // AH to BH exclude REX; such combinations have no encoding.
        let mut encoder = Encoder::new(self.bits());
        for i in setup.iter().chain([&insn]) {
            encoder.encode(i, self.mode.linear() + PROGRAM).ok()?;
        }
        d.items.extend(setup.into_iter().map(Item::Insn));
        d.insn(insn);
        d.base = base;
        Some(())
    }

    /// `mov register, value`.
    pub(super) fn set(&self, register: Register, value: u64) -> Instruction {
        let made = match register.size() {
            2 => Instruction::with2(Code::Mov_r16_imm16, register, value as u32 & 0xffff),
            4 => Instruction::with2(Code::Mov_r32_imm32, register, value as u32),
            _ => Instruction::with2(Code::Mov_r64_imm64, register, value),
        };
        made.expect("a move")
    }

    /// An offset in RAM in the data's ordinary pages.
    pub(super) fn plain_spot(&mut self, margin: u64) -> u64 {
        DATA + self.random.below((0x8000 - margin) as usize) as u64
    }

    /// An offset in RAM for an operand of `size` bytes.
    pub(super) fn spot(&mut self, size: u64) -> u64 {
        let random = &mut self.random;
        let within = |random: &mut Random, page: u64| {
            DATA + page * 0x1000 + random.below((0x1000 - size) as usize) as u64
        };
        match random.below(100) {
            0..9 => {
                // Across a page boundary.
                // Not into the one behind which the program's code can be reached.
                let page = 1 + random.below(13) as u64;
                DATA + page * 0x1000 - random.below(size.max(2) as usize) as u64
            }
            9..13 => within(random, 8),
            13..16 => within(random, 9),
            16..20 => within(random, 11),
            20..22 => within(random, 12),
            22..26 => within(random, 13),
            26..29 => DATA + 14 * 0x1000 + 0xc00 + random.below((0x400 - size) as usize) as u64,
            29..32 => PROGRAM + SCRATCH + 0x40 + random.below((0x3c0 - size) as usize) as u64,
            32..34 => PROGRAM + random.below((0x2c0 - size) as usize) as u64,
            _ => {
                let at = DATA + random.below(0x8000 - size as usize) as u64;
                if random.percent(60) { at & !(size.next_power_of_two() - 1) } else { at }
            }
        }
    }

    /// Which segment register reaches an offset in RAM.
    fn segment_for(&mut self, spot: u64) -> usize {
        if self.mode.flat() {
            return match self.random.below(12) {
                0 => seg::ES,
                1 => seg::CS,
                2 => seg::SS,
                3 => seg::FS,
                4 => seg::GS,
                _ => seg::DS,
            };
        }
        if spot < DATA {
            return seg::FS;
        }
        match self.random.below(6) {
            0 if spot >= DATA + 0x8000 => seg::GS,
            1 => seg::ES,
            _ => seg::DS,
        }
    }

    /// Chooses an addressing form. Gives the base register that later accesses may use again.
    fn address(
        &mut self,
        insn: &mut Instruction,
        setup: &mut Vec<Instruction>,
        reuse: Option<Base>,
    ) -> Option<Base> {
        let size = (insn.memory_size().size().max(1) as u64).min(128);
        if let Some(base) = reuse
            && self.random.percent(60)
        {
            let far = if self.random.percent(10) { 0x1000 } else { 0 };
            let displacement = self.random.below(160) as i64 - 64 + far;
            self.place(insn, base.register, None, displacement, base.segment);
            return Some(base);
        }
        let mut spot = self.spot(size);
        if classify(insn).is_some_and(|c| c.align > 1) && self.random.percent(95) {
            spot &= !(size.next_power_of_two() - 1);
        }
        let mut segment = self.segment_for(spot);
        // A segment prefix without effect: stores through CS are refused outside 64-bit mode.
        if segment == seg::CS && self.bits() != 64 && self.random.percent(90) {
            segment = seg::DS;
        }
        let linear = self.mode.linear() + spot;
        let offset = linear.wrapping_sub(self.mode.segment(segment).base);
        let form = self.random.below(10);
        if form == 0 && (self.bits() != 64 || !matches!(segment, seg::FS | seg::GS)) {
            let operand = absolute(self.mode, segment, linear);
            insn.set_memory_base(operand.base);
            insn.set_memory_displ_size(operand.displ_size);
            insn.set_memory_displacement64(operand.displacement as u64);
            if self.bits() != 64 && segment != seg::DS {
                insn.set_segment_prefix(operand.segment_prefix);
            }
            return reuse;
        }
        if self.bits() != 64 && offset <= 0xffff && (self.bits() == 16) != self.random.percent(15) {
            return self.address16(insn, setup, offset, segment);
        }
        let width =
            if self.bits() == 64 && (!self.random.percent(6) || offset > 0xffff_ffff) { 8 } else { 4 };
        let base = self.gpr(width);
        let mut rest = offset;
        let displacement = match self.random.below(3) {
            0 => 0,
            1 => i64::from(self.random.word() as i8),
            _ => i64::from(self.random.word() as i32 >> self.random.below(20)),
        };
        rest = rest.wrapping_sub(displacement as u64);
        let mut index = None;
        if form > 5 {
            let register = self.gpr(width);
            if register != base {
                let scale = self.random.pick(&[1u64, 2, 4, 8]);
                let value = if self.random.percent(50) {
                    self.random.below(1 << 12) as u64
                } else {
                    self.random.word()
                };
                rest = rest.wrapping_sub(value.wrapping_mul(scale));
                index = Some((register, scale, value));
            }
        }
        if width == 4 {
            rest &= 0xffff_ffff;
        }
        setup.push(self.set(base, rest));
        if let Some((register, _, value)) = index {
            let value = if width == 4 { value & 0xffff_ffff } else { value };
            setup.push(self.set(register, value));
        }
        self.place(insn, base, index.map(|(r, s, _)| (r, s)), displacement, segment);
        // Code and what lies around it is reached by known addresses only, through its alias too.
        (index.is_none() && displacement.abs() < 0x1000 && (DATA..DATA + 0x9000).contains(&spot))
            .then_some(Base { register: base, value: rest, segment })
            .filter(|b| b.value != 0)
    }

    /// Writes base, index and displacement into an instruction.
    fn place(
        &mut self,
        insn: &mut Instruction,
        base: Register,
        index: Option<(Register, u64)>,
        displacement: i64,
        segment: usize,
    ) {
        insn.set_memory_base(base);
        if let Some((register, scale)) = index {
            insn.set_memory_index(register);
            insn.set_memory_index_scale(scale as u32);
        }
        let size = base.size();
        let displacement = match size {
            2 => i64::from(displacement as i16),
            4 => i64::from(displacement as i32),
            _ => displacement,
        };
        insn.set_memory_displacement64(match size {
            2 => displacement as u64 & 0xffff,
            4 => displacement as u64 & 0xffff_ffff,
            _ => displacement as u64,
        });
        if displacement != 0 {
            let short = i8::try_from(displacement).is_ok();
            insn.set_memory_displ_size(if short { 1 } else { size as u32 });
        }
        let stack = matches!(base.full_register(), Register::RBP);
        let default = if stack { seg::SS } else { seg::DS };
        // In 64-bit mode the prefixes of the first four have no effect.
        let quiet = self.bits() == 64 && !matches!(segment, seg::FS | seg::GS);
        let flat = self.mode.flat() && matches!(segment, seg::DS | seg::SS);
        if segment != default && !(flat || quiet && self.random.percent(80)) || self.random.percent(2) {
            insn.set_segment_prefix(
                [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS][segment],
            );
        }
    }

    fn address16(
        &mut self,
        insn: &mut Instruction,
        setup: &mut Vec<Instruction>,
        offset: u64,
        segment: usize,
    ) -> Option<Base> {
        let (base, index) = self.random.pick(&[
            (Register::BX, Some(Register::SI)),
            (Register::BX, Some(Register::DI)),
            (Register::BP, Some(Register::SI)),
            (Register::BP, Some(Register::DI)),
            (Register::SI, None),
            (Register::DI, None),
            (Register::BP, None),
            (Register::BX, None),
        ]);
        let displacement = match self.random.below(3) {
            0 => 0,
            1 => i64::from(self.random.word() as i8),
            _ => i64::from(self.random.word() as i16),
        };
        let mut rest = offset.wrapping_sub(displacement as u64);
        if let Some(index) = index {
            let value = self.random.word() & 0xffff;
            setup.push(self.set(index, value));
            rest = rest.wrapping_sub(value);
        }
        setup.push(self.set(base, rest & 0xffff));
        self.place(insn, base, index.map(|i| (i, 1)), displacement, segment);
        if base == Register::BP && displacement == 0 {
            insn.set_memory_displ_size(1);
        }
        let linear = self.mode.segment(segment).base.wrapping_add(offset);
        let at = linear.wrapping_sub(self.mode.linear() + DATA);
        (index.is_none() && at < 0x9000).then_some(Base { register: base, value: rest & 0xffff, segment })
    }

    fn gather_address(
        &mut self,
        insn: &mut Instruction,
        setup: &mut Vec<Instruction>,
        kind: K,
    ) -> Option<()> {
        let wide = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
        let first = if wide { Register::YMM0 } else { Register::XMM0 };
        let n = self.random.below(8) as u32;
        let base = self.gpr(if self.bits() == 64 { 8 } else { 4 });
        let ymm = Register::YMM0 + n;
        // All indexes 0 or -1.
        let code = self.random.pick(&[Code::VEX_Vpxor_ymm_ymm_ymmm256, Code::VEX_Vpcmpeqd_ymm_ymm_ymmm256]);
        setup.push(Instruction::with3(code, ymm, ymm, ymm).ok()?);
        let at = self.mode.linear() + self.plain_spot(64);
        setup.push(self.set(base, at.wrapping_sub(self.mode.segment(seg::DS).base)));
        insn.set_memory_base(base);
        if base.full_register() == Register::RBP {
            insn.set_segment_prefix(Register::DS);
        }
        insn.set_memory_index(first + n);
        insn.set_memory_index_scale(1 << self.random.below(4));
        Some(())
    }

    /// Prepares operands of instructions that would mostly fault or whose results are undefined with random ones.
    fn tame(&mut self, insn: &mut Instruction, setup: &mut Vec<Instruction>) {
        use Mnemonic::*;
        let address = [insn.memory_base(), insn.memory_index()].map(Register::full_register);
        match insn.mnemonic() {
            // The bit offset moves the address.
            Bt | Bts | Btr | Btc
                if insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register =>
            {
                let register = insn.op1_register();
                let offset = self.random.below(512) as i64 - 256;
                if !address.contains(&register.full_register()) {
                    setup.push(self.set(register, offset as u64));
                } else {
                    insn.set_op0_kind(OpKind::Register);
                    insn.set_op0_register(register);
                    insn.set_memory_base(Register::None);
                    insn.set_memory_index(Register::None);
                    insn.set_memory_displ_size(0);
                    insn.set_segment_prefix(Register::None);
                }
            }
            Div | Idiv if self.random.percent(85) => {
                let small = self.random.below(3) as u64;
                let size = if self.bits() == 64 { 8 } else { 4 };
                for (n, value) in [(2, small), (0, self.random.integer())] {
                    let register = general(n, size);
                    if !address.contains(&register.full_register())
                        && (n == 2 || insn.op0_register().size() < 4)
                    {
                        setup.push(self.set(register, value));
                    }
                }
            }
            // 16-bit double shifts by more than 16 are undefined.
            Shld | Shrd if insn.op1_register().size() == 2 => {
                if insn.op2_kind() == OpKind::Immediate8 {
                    insn.set_immediate8(insn.immediate8() & 15);
                } else if address.contains(&Register::RCX) || insn.op1_register() == Register::CX {
                    insn.set_code(if insn.mnemonic() == Shld {
                        Code::Shld_rm16_r16_imm8
                    } else {
                        Code::Shrd_rm16_r16_imm8
                    });
                    insn.set_op2_kind(OpKind::Immediate8);
                    insn.set_immediate8(3);
                } else {
                    let count = self.random.below(16) as u64;
                    setup.push(self.set(Register::CX, count));
                }
            }
            _ => {}
        }
    }
}

/// Forms whose results depend on more than the program, change what the program needs, or need preparation.
fn excluded(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Rdpmc | Rdrand | Rdseed | Wrfsbase | Wrgsbase | Lss | Lfs | Lgs | Lds | Les
            | Syscall | Sysenter | Sysexit | Sysret | Sysretq | Sysexitq
            | Int | Int1 | Int3 | Into | Iret | Iretd | Iretq | Retf | Ret | Call | Jmp
            | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
            // Their images hold addresses of host code.
            | Fnsave | Fsave | Fnstenv | Fstenv | Fldenv | Frstor
            // Prepared by `stack`.
            | Push | Pop | Pushf | Pushfd | Pushfq | Popf | Popfd | Popfq | Enter | Leave
            | Pusha | Pushad | Popa | Popad
            | Ud0 | Ud1 | Ud2 | Reservednop
            // Random control words would unmask everything; the starting state varies them.
            | Ldmxcsr | Vldmxcsr | Fldcw
            | Sti | Cli | Hlt | Clts | Invd | Wbinvd | Clac | Stac | Monitor | Mwait | Cpuid
    )
        // Undefined; and AMD's CPUs read four bytes where Intel's read two.
        || matches!(code, Code::Bswap_r16 | Code::Movsxd_r16_rm16)
}

/// Integer forms that programs at privilege 3 may have, without branches and prepared ones.
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
                | K::farbr2_2
                | K::farbr4_2
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
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::CMPXCHG16B => true,
        F::SSE
        | F::SSE2
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::PREFETCHW
        | F::CLFSH
        | F::TSC
        | F::RDTSCP
        | F::RDPID
        | F::FSGSBASE => true,
        _ => false,
    };
    code.cpuid_features().iter().all(host)
}
