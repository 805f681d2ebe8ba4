//! Stubs: one guest instruction, wrapped in loads and stores of the guest registers that it names.
//!
//! In a stub RDI holds the [`CpuState`], RSI the operand's bytes, R8 the [`Frame`]. Explicit general registers of the instruction
//! are renamed to R9–R11, implicit ones (PCMPESTRI's RAX, RCX, RDX) keep their place. Vector registers keep their numbers.

use std::mem::offset_of;

use cpum::CpuState;
use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess, OpKind, Register,
};

use super::fast::{self, Plan};
use super::legacy::Action;
use super::{Class, Kind, Route, area};

/// What a stub exchanges with its caller besides the guest's state.
#[repr(C, align(64))]
pub(super) struct Frame {
    /// The x87 state in FXSAVE format; MXCSR in it is the host's.
    pub(super) x87: Image,
    /// MXCSR to run under.
    pub(super) mxcsr_in: u32,
    /// MXCSR after the instruction.
    pub(super) mxcsr_out: u32,
    mxcsr_host: u32,
    /// FCW between stubs.
    pub(super) control_host: u16,
    /// FSW after a short x87 stub, which also leaves a pushed register here.
    pub(super) status: [u8; 2],
    pub(super) pushed: [u8; 16],
    /// Arithmetic flags, in and out.
    pub(super) flags: u64,
}

#[repr(C, align(64))]
pub(super) struct Image(pub(super) [u8; 512]);

impl Frame {
    pub(super) fn new() -> Self {
        let mut image = [0; 512];
        image[area::MXCSR..area::MXCSR + 4].copy_from_slice(&super::MXCSR_DEFAULT.to_le_bytes());
        Self {
            x87: Image(image),
            mxcsr_in: super::MXCSR_DEFAULT,
            mxcsr_out: 0,
            mxcsr_host: super::MXCSR_DEFAULT,
            control_host: 0x37f,
            status: [0; 2],
            pushed: [0; 16],
            flags: 0,
        }
    }
}

/// How a stub is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recipe {
    /// SSE, AVX, MMX: the code loads registers one by one.
    Vector,
    /// The code loads and saves the frame's x87 image.
    X87,
    /// Not by code: state and control instructions.
    Legacy(Action),
    /// Only through `Unit::execute_memory`.
    Memory,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Stub {
    /// Offset in code memory.
    pub(super) entry: u32,
    pub(super) recipe: Recipe,
    /// Bytes of the memory operand.
    pub(super) size: u16,
    /// x87 opcode field, 11 bits.
    pub(super) fop: u16,
    /// Segment of the memory operand, if there is one.
    pub(super) segment: Option<u8>,
    /// The code loads and stores MXCSR.
    pub(super) mxcsr: bool,
    /// The code takes and returns flags.
    pub(super) flags: bool,
    /// The instruction switches the x87 unit to MMX.
    pub(super) mmx: bool,
    /// VCVTPS2PH, which ignores flush mode: where its results are.
    pub(super) halves: Option<Halves>,
    /// The short way through an x87 instruction.
    pub(super) fast: Option<Plan>,
}

/// Half-precision results: how many, in a register or (`None`) in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Halves {
    pub(super) count: usize,
    pub(super) register: Option<u8>,
}

fn halves(insn: &Instruction) -> Option<Halves> {
    (insn.mnemonic() == Mnemonic::Vcvtps2ph).then(|| Halves {
        count: if insn.op1_register().is_ymm() { 8 } else { 4 },
        register: (insn.op0_kind() == OpKind::Register).then(|| insn.op0_register().number() as u8),
    })
}

pub(super) struct Built {
    pub(super) stub: Stub,
    pub(super) code: Vec<u8>,
}

fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// The identity of the stub for an instruction: with its memory operand reduced to `[rsi]`.
pub(super) fn key(insn: &Instruction, kind: Kind) -> super::Key {
    let mut key = *insn;
    let mut fop = 0;
    if matches!(kind, Kind::X87) {
        // The operand's segment decides FDP in real mode; it stays part of the key through `fop`'s spare bits.
        fop = opcode_field(insn);
        if has_memory(insn) {
            fop |= (insn.memory_segment().number() as u16 & 7) << 11;
        }
    }
    if has_memory(insn) {
        key.set_memory_base(Register::RSI);
        key.set_memory_index(Register::None);
        key.set_memory_index_scale(1);
        key.set_memory_displacement64(0);
        key.set_memory_displ_size(0);
    }
    key.set_segment_prefix(Register::None);
    key.set_has_lock_prefix(false);
    key.set_has_rep_prefix(false);
    key.set_has_repne_prefix(false);
    key.set_code_size(iced_x86::CodeSize::Code64);
    (key, fop)
}

/// The x87 opcode field: low three bits of the first byte and the ModRM byte (SDM volume 1, 8.1.9).
fn opcode_field(insn: &Instruction) -> u16 {
    let bitness = match insn.code_size() {
        iced_x86::CodeSize::Code16 => 16,
        iced_x86::CodeSize::Code32 => 32,
        _ => 64,
    };
    let mut encoder = Encoder::new(bitness);
    if encoder.encode(insn, insn.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    let Some(at) = bytes.iter().position(|b| (0xd8..=0xdf).contains(b)) else { return 0 };
    let modrm = bytes.get(at + 1).copied().unwrap_or(0);
    u16::from(bytes[at] & 7) << 8 | u16::from(modrm)
}

pub(super) struct Assembler {
    encoder: Encoder,
    failed: bool,
}

impl Assembler {
    pub(super) fn emit(&mut self, insn: Result<Instruction, iced_x86::IcedError>) {
        match insn {
            Ok(insn) if self.encoder.encode(&insn, 0).is_ok() => {}
            _ => self.failed = true,
        }
    }

    fn load(&mut self, code: Code, register: Register, base: Register, offset: usize) {
        self.emit(Instruction::with2(code, register, at(base, offset)));
    }

    pub(super) fn store(&mut self, code: Code, base: Register, offset: usize, register: Register) {
        self.emit(Instruction::with2(code, at(base, offset), register));
    }

    pub(super) fn memory(&mut self, code: Code, base: Register, offset: usize) {
        self.emit(Instruction::with1(code, at(base, offset)));
    }
}

fn at(base: Register, offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(base, offset as i64, if offset < 128 { 1 } else { 8 })
}

pub(super) fn xsave(offset: usize) -> usize {
    offset_of!(CpuState, xsave) + offset
}

fn gpr(register: Register) -> usize {
    offset_of!(CpuState, gpr) + register.full_register().number() * 8
}

pub(super) const STATE: Register = Register::RDI;
pub(super) const FRAME: Register = Register::R8;

/// Builds the stub for a key. `None`: there is no 64-bit encoding.
pub(super) fn build(key: &Instruction, original: &Instruction, class: &Class, fop: u16) -> Option<Built> {
    let mut stub = Stub {
        entry: 0,
        recipe: Recipe::Memory,
        size: class.size,
        fop: fop & 0x7ff,
        segment: has_memory(original).then(|| (original.memory_segment().number() & 7) as u8),
        mxcsr: false,
        flags: false,
        mmx: class.kind == Kind::Mmx,
        halves: halves(key),
        fast: None,
    };
    if class.route == Route::Memory {
        return Some(Built { stub, code: Vec::new() });
    }
    if let Some(action) = Action::of(key) {
        stub.recipe = Recipe::Legacy(action);
        return Some(Built { stub, code: Vec::new() });
    }
    stub.flags = class.flags;
    let mut asm = Assembler { encoder: Encoder::new(64), failed: false };
    if class.kind == Kind::X87 {
        stub.recipe = Recipe::X87;
        x87_code(&mut asm, key, stub.flags);
        let start = asm.encoder.take_buffer();
        let long = asm.failed;
        stub.fast = fast::build(&mut asm, key, stub.flags).filter(|_| !asm.failed);
        let short = asm.encoder.take_buffer();
        if let Some(plan) = &mut stub.fast {
            plan.start = u16::try_from(start.len()).ok()?;
        }
        return (!long).then(|| Built { stub, code: [start, short].concat() });
    } else {
        stub.recipe = Recipe::Vector;
        stub.mxcsr = uses_mxcsr(key.mnemonic());
        vector_code(&mut asm, key, class.kind, &stub);
    }
    (!asm.failed).then(|| Built { stub, code: asm.encoder.take_buffer() })
}

pub(super) fn flags_in(asm: &mut Assembler) {
    asm.memory(Code::Push_rm64, FRAME, offset_of!(Frame, flags));
    asm.emit(Ok(Instruction::with(Code::Popfq)));
}

pub(super) fn flags_out(asm: &mut Assembler) {
    asm.emit(Ok(Instruction::with(Code::Pushfq)));
    asm.memory(Code::Pop_rm64, FRAME, offset_of!(Frame, flags));
}

fn x87_code(asm: &mut Assembler, insn: &Instruction, flags: bool) {
    let image = offset_of!(Frame, x87);
    asm.memory(Code::Fxrstor64_m512byte, FRAME, image);
    if flags {
        flags_in(asm);
    }
    asm.emit(Ok(*insn));
    if flags {
        flags_out(asm);
    }
    asm.memory(Code::Fxsave64_m512byte, FRAME, image);
    asm.emit(Ok(Instruction::with(Code::Fninit)));
    asm.emit(Ok(Instruction::with(Code::Retnq)));
}

fn vector_code(asm: &mut Assembler, key: &Instruction, kind: Kind, stub: &Stub) {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(key);
    let vex = kind == Kind::Avx;
    let wide =
        vex && (0..key.op_count()).any(|i| key.op_kind(i) == OpKind::Register && key.op_register(i).is_ymm());

    // Registers by number: what is named, and what is written.
    let (mut xmm, mut xmm_out, mut mm, mut mm_out) = (0u32, 0u32, 0u32, 0u32);
    let (mut implicit, mut implicit_out) = (Vec::new(), Vec::new());
    let string = matches!(
        key.mnemonic(),
        Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
            | Mnemonic::Vpcmpestri
            | Mnemonic::Vpcmpestri64
            | Mnemonic::Vpcmpestrm
            | Mnemonic::Vpcmpestrm64
            | Mnemonic::Vpcmpistri
            | Mnemonic::Vpcmpistrm
    );
    for used in info.used_registers() {
        let register = used.register();
        let written = writes(used.access());
        let bit = 1u32 << (register.number() & 31);
        if register.is_vector_register() {
            xmm |= bit;
            xmm_out |= if written { bit } else { 0 };
        } else if register.is_mm() {
            mm |= bit;
            mm_out |= if written { bit } else { 0 };
        } else if string && register.is_gpr() && register.full_register() != Register::RSI {
            implicit.push(register.full_register());
            if written {
                implicit_out.push(register.full_register());
            }
        }
    }

    let mut insn = *key;
    let mut renamed = Vec::new();
    for i in 0..key.op_count() {
        if key.op_kind(i) == OpKind::Register && key.op_register(i).is_gpr() {
            let Some(&scratch) = [Register::R9, Register::R10, Register::R11].get(renamed.len()) else {
                asm.failed = true;
                return;
            };
            let original = key.op_register(i);
            insn.set_op_register(i, if original.is_gpr64() { scratch } else { scratch.full_register32() });
            renamed.push((scratch, original, info.op_access(i)));
        }
    }

    for n in numbers(xmm) {
        let (low, high) = (xsave(area::XMM + 16 * n), xsave(area::YMM + 16 * n));
        if vex {
            asm.load(Code::VEX_Vmovaps_xmm_xmmm128, Register::XMM0 + n as u32, STATE, low);
            if wide {
                asm.emit(Instruction::with4(
                    Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8,
                    Register::YMM0 + n as u32,
                    Register::YMM0 + n as u32,
                    at(STATE, high),
                    1,
                ));
            }
        } else {
            asm.load(Code::Movaps_xmm_xmmm128, Register::XMM0 + n as u32, STATE, low);
        }
    }
    for n in numbers(mm) {
        asm.load(Code::Movq_mm_mmm64, Register::MM0 + n as u32, STATE, xsave(area::ST + 16 * n));
    }
    for &register in &implicit {
        asm.load(Code::Mov_r64_rm64, register, STATE, gpr(register));
    }
    for &(scratch, original, access) in &renamed {
        if access != OpAccess::Write {
            asm.load(Code::Mov_r64_rm64, scratch, STATE, gpr(original));
        }
    }
    if stub.mxcsr {
        asm.memory(Code::Ldmxcsr_m32, FRAME, offset_of!(Frame, mxcsr_in));
    }
    if stub.flags {
        flags_in(asm);
    }
    asm.emit(Ok(insn));
    if stub.flags {
        flags_out(asm);
    }
    if stub.mxcsr {
        asm.memory(Code::Stmxcsr_m32, FRAME, offset_of!(Frame, mxcsr_out));
        asm.memory(Code::Ldmxcsr_m32, FRAME, offset_of!(Frame, mxcsr_host));
    }
    for &register in &implicit_out {
        asm.store(Code::Mov_rm64_r64, STATE, gpr(register), register);
    }
    for &(scratch, original, access) in &renamed {
        if writes(access) {
            asm.store(Code::Mov_rm64_r64, STATE, gpr(original), scratch);
        }
    }
    for n in numbers(mm_out) {
        asm.store(Code::Movq_mmm64_mm, STATE, xsave(area::ST + 16 * n), Register::MM0 + n as u32);
        asm.emit(Instruction::with2(Code::Mov_rm16_imm16, at(STATE, xsave(area::ST + 16 * n + 8)), 0xffff));
    }
    for n in numbers(xmm_out) {
        let (low, high) = (xsave(area::XMM + 16 * n), xsave(area::YMM + 16 * n));
        if vex {
            asm.store(Code::VEX_Vmovaps_xmmm128_xmm, STATE, low, Register::XMM0 + n as u32);
            asm.emit(Instruction::with3(
                Code::VEX_Vextractf128_xmmm128_ymm_imm8,
                at(STATE, high),
                Register::YMM0 + n as u32,
                1,
            ));
        } else {
            asm.store(Code::Movaps_xmmm128_xmm, STATE, low, Register::XMM0 + n as u32);
        }
    }
    if mm != 0 {
        asm.emit(Ok(Instruction::with(Code::Emms)));
    }
    if vex {
        asm.emit(Instruction::with2(Code::Or_rm8_imm8, at(STATE, xsave(area::XSTATE_BV)), 4));
        asm.emit(Ok(Instruction::with(Code::VEX_Vzeroupper)));
    }
    asm.emit(Ok(Instruction::with(Code::Retnq)));
}

fn numbers(set: u32) -> impl Iterator<Item = usize> {
    (0..16).filter(move |n| set & (1 << n) != 0)
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// Whether an instruction reads MXCSR's control bits or sets its flags. Too many is harmless.
fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}").to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    const ARITHMETIC: [&str; 21] = [
        "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "comis", "ucomis", "cvt", "round", "dp",
        "hadd", "hsub", "rcp", "rsqrt", "fmadd", "fmsub", "fnmadd", "fnmsub",
    ];
    ARITHMETIC.iter().any(|prefix| name.starts_with(prefix))
}
