//! From `iced-x86` instructions to operations.
//!
//! Instructions are decoded with instruction pointer zero, so that RIP-relative operands and branch targets come out relative to
//! the instruction, wherever it is mapped.

use cpum::cpuid::{CpuidTable, FeatureBit, bit};
use cpum::state::{rflags, seg};
use iced_x86::{Code, ConditionCode, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::by_size;
use crate::op::{
    BASE_RIP, Ends, Form, Full, Handler, LOCK, LONG, MEMORY, NONE, Op, REP, REPNE, SEG_BASE, VIA_SS,
};
use crate::ops::alu::*;
use crate::ops::bits::*;
use crate::ops::data::*;
use crate::ops::flow::*;
use crate::ops::io::*;
use crate::ops::shift::{self, Rcl, Rcr, Rol, Ror, Sar, Shl, Shr, rorx, shift_x};
use crate::ops::string::*;
use crate::ops::system::*;
use crate::ops::units;
use crate::unit::{self, Route, StubId};

/// The operation's encoding of a general register.
fn number(r: Register) -> u8 {
    match r {
        Register::AH => 0x80,
        Register::CH => 0x81,
        Register::DH => 0x82,
        Register::BH => 0x83,
        // Numbers of 8-bit registers count AH to BH in.
        _ if r.is_gpr() => r.full_register().number() as u8,
        _ => 0,
    }
}

fn segment_number(r: Register) -> u8 {
    match r {
        Register::ES => seg::ES as u8,
        Register::CS => seg::CS as u8,
        Register::SS => seg::SS as u8,
        Register::FS => seg::FS as u8,
        Register::GS => seg::GS as u8,
        _ => seg::DS as u8,
    }
}

fn is_memory(insn: &Instruction, n: u32) -> bool {
    n < insn.op_count() && insn.op_kind(n) == OpKind::Memory
}

fn is_register(insn: &Instruction, n: u32) -> bool {
    n < insn.op_count() && insn.op_kind(n) == OpKind::Register
}

fn is_immediate(insn: &Instruction, n: u32) -> bool {
    n < insn.op_count()
        && matches!(
            insn.op_kind(n),
            OpKind::Immediate8
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64
                | OpKind::Immediate8_2nd
        )
}

/// Size of operand `n` in bytes.
fn size_of_operand(insn: &Instruction, n: u32) -> u8 {
    match insn.op_kind(n) {
        OpKind::Register => insn.op_register(n).size() as u8,
        OpKind::NearBranch16 | OpKind::FarBranch16 => 2,
        OpKind::NearBranch32 | OpKind::FarBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => insn.memory_size().size() as u8,
    }
}

fn address(insn: &Instruction, op: &mut Op) {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let by_register = |r: Register| if r == Register::None { 0 } else { r.size() as u8 };
    op.address_size = match by_register(base).max(by_register(index)) {
        0 => match insn.memory_displ_size() {
            2 => 2,
            8 => 8,
            _ => 4,
        },
        n => n,
    };
    op.disp = insn.memory_displacement64();
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    op.base = if base == Register::None { NONE } else { base.number() as u8 };
    op.index = if index == Register::None { NONE } else { index.number() as u8 };
    if base == Register::RIP || base == Register::EIP {
        op.base = BASE_RIP;
    }
    op.form = match op.address_size {
        8 => match (op.base, op.index) {
            (BASE_RIP, _) => Form::Rip,
            (NONE, NONE) => Form::Absolute,
            (NONE, _) => Form::Index,
            (_, NONE) => Form::Base,
            _ => Form::BaseIndex,
        },
        4 if op.base == NONE && op.index == NONE => Form::Absolute,
        4 => Form::Short32,
        _ => Form::Short16,
    };
    if op.form == Form::Absolute && op.flags & LONG == 0 {
        op.disp &= 0xffff_ffff;
    }
}

/// The segment of the memory operand. In 64-bit mode prefixes other than FS and GS change nothing, not even whether a bad
/// address is #GP or #SS.
pub(crate) fn effective_segment(insn: &Instruction, long: bool) -> Register {
    if long && matches!(insn.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS) {
        let mut bare = *insn;
        bare.set_segment_prefix(Register::None);
        return bare.memory_segment();
    }
    insn.memory_segment()
}

fn segment_of(insn: &Instruction, op: &mut Op) {
    op.seg = segment_number(effective_segment(insn, op.flags & LONG != 0));
    if op.seg >= seg::FS as u8 {
        op.flags |= SEG_BASE;
    }
    if op.seg == seg::SS as u8 {
        op.flags |= VIA_SS;
    }
}

/// An operation that is #UD, `len` bytes long.
pub(crate) fn invalid(len: u8) -> Op {
    Op {
        run: undefined,
        disp: 0,
        imm: 0,
        a: 0,
        b: 0,
        base: NONE,
        index: NONE,
        scale: 0,
        seg: seg::DS as u8,
        form: Form::Absolute,
        flags: 0,
        size: 0,
        address_size: 8,
        len,
        full: None,
    }
}

/// A handler for each condition.
macro_rules! by_condition {
    ($cc:expr, $f:ident) => {
        by_condition!(@ $cc, $f, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14, 15)
    };
    (@ $cc:expr, $f:ident, $($n:literal)*, $last:literal) => {
        match $cc { $($n => $f::<$n>,)* _ => $f::<$last> }
    };
    (sized $cc:expr, $size:expr, $f:ident) => {
        by_condition!(@@ $cc, $size, $f, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14, 15)
    };
    (@@ $cc:expr, $size:expr, $f:ident, $($n:literal)*, $last:literal) => {
        match $cc { $($n => by_size!(wide $size, $f, $n),)* _ => by_size!(wide $size, $f, $last) }
    };
}

/// The six forms of a two-operand arithmetic instruction.
macro_rules! alu_forms {
    ($insn:expr, $op:expr, $name:ident) => {{
        let size = $op.size;
        if is_memory($insn, 0) {
            if is_immediate($insn, 1) {
                $op.imm = $insn.immediate(1);
                if $op.flags & LOCK != 0 { by_size!(size, lock_mi, $name) } else { by_size!(size, mi, $name) }
            } else {
                $op.b = number($insn.op_register(1));
                if $op.flags & LOCK != 0 { by_size!(size, lock_mr, $name) } else { by_size!(size, mr, $name) }
            }
        } else {
            $op.a = number($insn.op_register(0));
            if is_immediate($insn, 1) {
                $op.imm = $insn.immediate(1);
                by_size!(size, ri, $name)
            } else if is_memory($insn, 1) {
                by_size!(size, rm, $name)
            } else {
                $op.b = number($insn.op_register(1));
                by_size!(size, rr, $name)
            }
        }
    }};
}

macro_rules! unary_forms {
    ($insn:expr, $op:expr, $name:ident) => {{
        let size = $op.size;
        if is_memory($insn, 0) {
            if $op.flags & LOCK != 0 {
                by_size!(size, lock_unary, $name)
            } else {
                by_size!(size, unary_m, $name)
            }
        } else {
            $op.a = number($insn.op_register(0));
            by_size!(size, unary_r, $name)
        }
    }};
}

macro_rules! shift_forms {
    ($insn:expr, $op:expr, $name:ident) => {{
        use shift::{m_cl, m_imm, r_cl, r_imm};
        let size = $op.size;
        $op.a = if is_register($insn, 0) { number($insn.op_register(0)) } else { 0 };
        let by_cl = is_register($insn, 1);
        if !by_cl {
            $op.imm = $insn.immediate(1);
        }
        match (is_memory($insn, 0), by_cl) {
            (false, false) => by_size!(size, r_imm, $name),
            (false, true) => by_size!(size, r_cl, $name),
            (true, false) => by_size!(size, m_imm, $name),
            (true, true) => by_size!(size, m_cl, $name),
        }
    }};
}

macro_rules! bit_forms {
    ($insn:expr, $op:expr, $how:literal) => {{
        let size = $op.size;
        let by_imm = is_immediate($insn, 1);
        if by_imm {
            $op.imm = $insn.immediate(1);
        } else {
            $op.b = number($insn.op_register(1));
        }
        if is_register($insn, 0) {
            $op.a = number($insn.op_register(0));
        }
        match (is_memory($insn, 0), by_imm) {
            (false, false) => by_size!(wide size, bt_r, $how, false),
            (false, true) => by_size!(wide size, bt_r, $how, true),
            (true, false) => by_size!(wide size, bt_m, $how, false),
            (true, true) => by_size!(wide size, bt_m, $how, true),
        }
    }};
}

macro_rules! string_forms {
    ($op:expr, $size:expr, $single:ident, $repeated:ident) => {{
        if $op.flags & (REP | REPNE) != 0 {
            (by_size!($size, $repeated), Ends::Branch)
        } else {
            (by_size!($size, $single), Ends::No)
        }
    }};
}

/// The feature an integer instruction needs.
fn feature(insn: &Instruction) -> Option<FeatureBit> {
    Some(match insn.mnemonic() {
        Mnemonic::Movbe => bit::MOVBE,
        Mnemonic::Popcnt => bit::POPCNT,
        Mnemonic::Crc32 => bit::SSE42,
        Mnemonic::Andn | Mnemonic::Bextr | Mnemonic::Blsi | Mnemonic::Blsmsk | Mnemonic::Blsr => bit::BMI1,
        Mnemonic::Bzhi
        | Mnemonic::Mulx
        | Mnemonic::Pdep
        | Mnemonic::Pext
        | Mnemonic::Rorx
        | Mnemonic::Sarx
        | Mnemonic::Shlx
        | Mnemonic::Shrx => bit::BMI2,
        Mnemonic::Adcx | Mnemonic::Adox => bit::ADX,
        Mnemonic::Cmpxchg16b => bit::CX16,
        Mnemonic::Cmpxchg8b => bit::CX8,
        Mnemonic::Clflushopt => bit::CLFLUSHOPT,
        Mnemonic::Clwb => bit::CLWB,
        Mnemonic::Sysenter | Mnemonic::Sysexit | Mnemonic::Sysexitq => bit::SEP,
        _ => return None,
    })
}

/// Turns an instruction of 16-, 32- or 64-bit code (`bits`) into an operation.
pub(crate) fn decode(insn: &Instruction, bits: u32, cpuid: &CpuidTable) -> (Op, Ends) {
    let mut op = invalid(insn.len() as u8);
    if bits == 64 {
        op.flags |= LONG;
    }
    op.address_size = (bits / 8) as u8;
    if insn.has_lock_prefix() {
        op.flags |= LOCK;
    }
    if insn.has_rep_prefix() {
        op.flags |= REP;
    }
    if insn.has_repne_prefix() {
        op.flags |= REPNE;
    }
    if (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory) {
        op.flags |= MEMORY;
        address(insn, &mut op);
        segment_of(insn, &mut op);
    }
    if insn.op_count() > 0 {
        op.size = size_of_operand(insn, 0);
    }
    if insn.is_invalid() || feature(insn).is_some_and(|f| !cpuid.has(f)) {
        return (op, Ends::System);
    }
    let (run, ends) = if insn.is_string_instruction() {
        string(insn, &mut op)
    } else {
        general(insn, &mut op, cpuid).unwrap_or_else(|| from_unit(insn, &mut op))
    };
    op.run = run;
    if insn.encoding() == EncodingKind::VEX && op.full.is_none() && bits != 64 {
        op.full = Some(Box::new(Full {
            insn: *insn,
            class: None,
            stub: std::cell::Cell::new(StubId::NONE),
            inner: Some(run),
        }));
        op.run = protected_only;
    }
    if !op.memory() && insn.is_stack_instruction() {
        op.flags |= VIA_SS;
    }
    (op, ends)
}

fn from_unit(insn: &Instruction, op: &mut Op) -> (Handler, Ends) {
    let Some(class) = unit::classify(insn) else { return (undefined, Ends::System) };
    op.full = Some(Box::new(Full {
        insn: *insn,
        class: Some(class),
        stub: std::cell::Cell::new(StubId::NONE),
        inner: None,
    }));
    let run: Handler = match class.route {
        Route::Memory => units::pieces,
        Route::Operand if !class.access.reads() && !class.access.writes() => units::registers,
        Route::Operand if class.size <= 32 => units::operand::<32>,
        Route::Operand => units::operand::<576>,
    };
    (run, Ends::No)
}

fn string(insn: &Instruction, op: &mut Op) -> (Handler, Ends) {
    for n in 0..insn.op_count() {
        op.address_size = match insn.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 8,
            _ => continue,
        };
    }
    segment_of(insn, op);
    match insn.mnemonic() {
        Mnemonic::Movsb => string_forms!(op, 1, movs, rep_movs),
        Mnemonic::Movsw => string_forms!(op, 2, movs, rep_movs),
        Mnemonic::Movsd => string_forms!(op, 4, movs, rep_movs),
        Mnemonic::Movsq => string_forms!(op, 8, movs, rep_movs),
        Mnemonic::Stosb => string_forms!(op, 1, stos, rep_stos),
        Mnemonic::Stosw => string_forms!(op, 2, stos, rep_stos),
        Mnemonic::Stosd => string_forms!(op, 4, stos, rep_stos),
        Mnemonic::Stosq => string_forms!(op, 8, stos, rep_stos),
        Mnemonic::Lodsb => string_forms!(op, 1, lods, rep_lods),
        Mnemonic::Lodsw => string_forms!(op, 2, lods, rep_lods),
        Mnemonic::Lodsd => string_forms!(op, 4, lods, rep_lods),
        Mnemonic::Lodsq => string_forms!(op, 8, lods, rep_lods),
        Mnemonic::Scasb => string_forms!(op, 1, scas, rep_scas),
        Mnemonic::Scasw => string_forms!(op, 2, scas, rep_scas),
        Mnemonic::Scasd => string_forms!(op, 4, scas, rep_scas),
        Mnemonic::Scasq => string_forms!(op, 8, scas, rep_scas),
        Mnemonic::Cmpsb => string_forms!(op, 1, cmps, rep_cmps),
        Mnemonic::Cmpsw => string_forms!(op, 2, cmps, rep_cmps),
        Mnemonic::Cmpsd => string_forms!(op, 4, cmps, rep_cmps),
        Mnemonic::Cmpsq => string_forms!(op, 8, cmps, rep_cmps),
        Mnemonic::Insb => (ins::<u8>, Ends::SystemBranch),
        Mnemonic::Insw => (ins::<u16>, Ends::SystemBranch),
        Mnemonic::Insd => (ins::<u32>, Ends::SystemBranch),
        Mnemonic::Outsb => (outs::<u8>, Ends::SystemBranch),
        Mnemonic::Outsw => (outs::<u16>, Ends::SystemBranch),
        Mnemonic::Outsd => (outs::<u32>, Ends::SystemBranch),
        _ => (undefined, Ends::System),
    }
}

/// MOV between general registers, memory, and special registers.
fn mov(insn: &Instruction, op: &mut Op) -> (Handler, Ends) {
    let special = |n: u32| is_register(insn, n).then(|| insn.op_register(n));
    if let Some(r) = special(0) {
        if r.is_segment_register() {
            op.a = segment_number(r);
            op.b = special(1).map_or(0, number);
            if r == Register::CS {
                return (undefined, Ends::System);
            }
            let ends = if r == Register::SS { Ends::System } else { Ends::No };
            return (mov_to_seg, ends);
        }
        if r.is_cr() || r.is_dr() {
            op.a = r.number() as u8;
            op.b = special(1).map_or(0, number);
            let wide = special(1).is_some_and(|r| r.size() == 8);
            let run: Handler = match (r.is_cr(), wide) {
                (true, true) => mov_to_cr::<u64>,
                (true, false) => mov_to_cr::<u32>,
                (false, true) => mov_to_dr::<u64>,
                (false, false) => mov_to_dr::<u32>,
            };
            return (run, Ends::System);
        }
        if r.is_tr() {
            return (undefined, Ends::System);
        }
    }
    if let Some(r) = special(1) {
        if r.is_segment_register() {
            op.b = segment_number(r);
            op.a = special(0).map_or(0, number);
            return (by_size!(op.size, mov_from_seg), Ends::No);
        }
        if r.is_cr() || r.is_dr() {
            op.b = r.number() as u8;
            op.a = special(0).map_or(0, number);
            let wide = op.size == 8;
            let run: Handler = match (r.is_cr(), wide) {
                (true, true) => mov_from_cr::<u64>,
                (true, false) => mov_from_cr::<u32>,
                (false, true) => mov_from_dr::<u64>,
                (false, false) => mov_from_dr::<u32>,
            };
            return (run, Ends::System);
        }
        if r.is_tr() {
            return (undefined, Ends::System);
        }
    }
    let size = op.size;
    let run = if is_memory(insn, 0) {
        if is_immediate(insn, 1) {
            op.imm = insn.immediate(1);
            by_size!(size, mov_mi)
        } else {
            op.b = number(insn.op_register(1));
            by_size!(size, mov_mr)
        }
    } else {
        op.a = number(insn.op_register(0));
        if is_immediate(insn, 1) {
            op.imm = insn.immediate(1);
            by_size!(size, mov_ri)
        } else if is_memory(insn, 1) {
            by_size!(size, mov_rm)
        } else {
            op.b = number(insn.op_register(1));
            by_size!(size, mov_rr)
        }
    };
    (run, Ends::No)
}

fn extend(insn: &Instruction, op: &mut Op, signed: bool) -> Handler {
    op.a = number(insn.op_register(0));
    let memory = is_memory(insn, 1);
    if !memory {
        op.b = number(insn.op_register(1));
    }
    let from = size_of_operand(insn, 1);
    match (signed, memory, from) {
        (false, false, 1) => by_size!(wide op.size, movzx_r, u8),
        (false, false, _) => by_size!(wide op.size, movzx_r, u16),
        (false, true, 1) => by_size!(wide op.size, movzx_m, u8),
        (false, true, _) => by_size!(wide op.size, movzx_m, u16),
        (true, false, 1) => by_size!(wide op.size, movsx_r, u8),
        (true, false, 2) => by_size!(wide op.size, movsx_r, u16),
        (true, false, _) => by_size!(wide op.size, movsx_r, u32),
        (true, true, 1) => by_size!(wide op.size, movsx_m, u8),
        (true, true, 2) => by_size!(wide op.size, movsx_m, u16),
        (true, true, _) => by_size!(wide op.size, movsx_m, u32),
    }
}

/// Register in operand 0, register/memory in operand 1.
fn reg_rm(insn: &Instruction, op: &mut Op) {
    op.a = number(insn.op_register(0));
    if is_register(insn, 1) {
        op.b = number(insn.op_register(1));
    }
}

/// Registers in operands 0 and 1, register/memory in operand 2.
fn reg_reg_rm(insn: &Instruction, op: &mut Op) {
    op.a = number(insn.op_register(0));
    op.b = number(insn.op_register(1));
    if is_register(insn, 2) {
        op.imm = number(insn.op_register(2)).into();
    }
}

/// Register in operands 0 and 2, register/memory in operand 1.
fn reg_rm_reg(insn: &Instruction, op: &mut Op) {
    reg_rm(insn, op);
    op.imm = number(insn.op_register(2)).into();
}

/// Register/memory in operand 0, register in operand 1.
fn rm_reg(insn: &Instruction, op: &mut Op) {
    if is_register(insn, 0) {
        op.a = number(insn.op_register(0));
    }
    if is_register(insn, 1) {
        op.b = number(insn.op_register(1));
    }
}

fn one(insn: &Instruction, op: &mut Op) {
    if is_register(insn, 0) {
        op.a = number(insn.op_register(0));
    }
}

fn stack_size(insn: &Instruction) -> u8 {
    insn.stack_pointer_increment().unsigned_abs() as u8
}

fn general(insn: &Instruction, op: &mut Op, cpuid: &CpuidTable) -> Option<(Handler, Ends)> {
    use Ends::{Branch, No, System, SystemBranch};
    use Mnemonic as M;
    let size = op.size;
    Some(match insn.mnemonic() {
        M::Add => (alu_forms!(insn, op, Add), No),
        M::Or => (alu_forms!(insn, op, Or), No),
        M::Adc => (alu_forms!(insn, op, Adc), No),
        M::Sbb => (alu_forms!(insn, op, Sbb), No),
        M::And => (alu_forms!(insn, op, And), No),
        M::Sub => (alu_forms!(insn, op, Sub), No),
        M::Xor => (alu_forms!(insn, op, Xor), No),
        M::Cmp => (alu_forms!(insn, op, Cmp), No),
        M::Test => (alu_forms!(insn, op, Test), No),
        M::Inc => (unary_forms!(insn, op, Inc), No),
        M::Dec => (unary_forms!(insn, op, Dec), No),
        M::Neg => (unary_forms!(insn, op, Neg), No),
        M::Not => (unary_forms!(insn, op, Not), No),
        M::Mov => mov(insn, op),
        M::Movzx => (extend(insn, op, false), No),
        M::Movsx | M::Movsxd => {
            let same = size_of_operand(insn, 1) == size;
            if same {
                // MOVSXD without REX.W moves.
                reg_rm(insn, op);
                let run = if is_memory(insn, 1) { by_size!(size, mov_rm) } else { by_size!(size, mov_rr) };
                return Some((run, No));
            }
            (extend(insn, op, true), No)
        }
        M::Lea => {
            op.a = number(insn.op_register(0));
            (by_size!(wide size, lea), No)
        }
        M::Nop
        | M::Reservednop
        | M::Endbr64
        | M::Endbr32
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Cldemote => (nop, No),
        M::Pause => (pause, System),
        M::Lfence => (nop, No),
        M::Movnti => {
            op.b = number(insn.op_register(1));
            (by_size!(wide size, mov_mr), No)
        }
        M::Mfence | M::Sfence => (full_fence, No),
        M::Xchg => {
            rm_reg(insn, op);
            if is_memory(insn, 1) {
                op.b = number(insn.op_register(0));
            }
            let memory = op.memory();
            (if memory { by_size!(size, xchg_mr) } else { by_size!(size, xchg_rr) }, No)
        }
        M::Xadd => {
            rm_reg(insn, op);
            (if op.memory() { by_size!(size, xadd_m) } else { by_size!(size, xadd_r) }, No)
        }
        M::Cmpxchg => {
            rm_reg(insn, op);
            (if op.memory() { by_size!(size, cmpxchg_m) } else { by_size!(size, cmpxchg_r) }, No)
        }
        M::Cmpxchg8b => (cmpxchg8b, No),
        M::Cmpxchg16b => (cmpxchg16b, No),
        M::Bswap => {
            one(insn, op);
            (by_size!(wide size, bswap), No)
        }
        M::Movbe => {
            rm_reg(insn, op);
            let load = is_memory(insn, 1);
            (if load { by_size!(wide size, movbe_load) } else { by_size!(wide size, movbe_store) }, No)
        }
        M::Cbw => (sign_extend_a::<u16>, No),
        M::Cwde => (sign_extend_a::<u32>, No),
        M::Cdqe => (sign_extend_a::<u64>, No),
        M::Cwd => (sign_extend_d::<u16>, No),
        M::Cdq => (sign_extend_d::<u32>, No),
        M::Cqo => (sign_extend_d::<u64>, No),
        M::Xlatb => {
            op.address_size = match insn.memory_base() {
                Register::BX => 2,
                Register::EBX => 4,
                _ => 8,
            };
            segment_of(insn, op);
            (xlat, No)
        }
        M::Mul => {
            one(insn, op);
            (by_size!(size, mul), No)
        }
        M::Imul => match insn.op_count() {
            1 => {
                one(insn, op);
                (by_size!(size, imul_1), No)
            }
            2 => {
                reg_rm(insn, op);
                (by_size!(wide size, imul_2), No)
            }
            _ => {
                reg_rm(insn, op);
                op.imm = insn.immediate(2);
                (by_size!(wide size, imul_3), No)
            }
        },
        M::Div => {
            one(insn, op);
            (by_size!(size, div), No)
        }
        M::Idiv => {
            one(insn, op);
            (by_size!(size, idiv), No)
        }
        M::Daa => (daa, No),
        M::Das => (das, No),
        M::Aaa => (aaa, No),
        M::Aas => (aas, No),
        M::Aam => {
            op.imm = insn.immediate(0);
            (aam, No)
        }
        M::Aad => {
            op.imm = insn.immediate(0);
            (aad, No)
        }
        M::Shl | M::Sal => (shift_forms!(insn, op, Shl), No),
        M::Shr => (shift_forms!(insn, op, Shr), No),
        M::Sar => (shift_forms!(insn, op, Sar), No),
        M::Rol => (shift_forms!(insn, op, Rol), No),
        M::Ror => (shift_forms!(insn, op, Ror), No),
        M::Rcl => (shift_forms!(insn, op, Rcl), No),
        M::Rcr => (shift_forms!(insn, op, Rcr), No),
        M::Shld | M::Shrd => {
            use crate::ops::shift::double;
            rm_reg(insn, op);
            let by_cl = is_register(insn, 2);
            if !by_cl {
                op.imm = insn.immediate(2);
            }
            let run: Handler = match (insn.mnemonic() == M::Shld, by_cl) {
                (true, true) => by_size!(wide size, double, true, true),
                (true, false) => by_size!(wide size, double, true, false),
                (false, true) => by_size!(wide size, double, false, true),
                (false, false) => by_size!(wide size, double, false, false),
            };
            (run, No)
        }
        M::Rorx => {
            reg_rm(insn, op);
            op.imm = insn.immediate(2);
            (by_size!(wide size, rorx), No)
        }
        M::Shlx => {
            reg_rm_reg(insn, op);
            (by_size!(wide size, shift_x, 0), No)
        }
        M::Shrx => {
            reg_rm_reg(insn, op);
            (by_size!(wide size, shift_x, 1), No)
        }
        M::Sarx => {
            reg_rm_reg(insn, op);
            (by_size!(wide size, shift_x, 2), No)
        }
        M::Bt => (bit_forms!(insn, op, 0), No),
        M::Bts => (bit_forms!(insn, op, 1), No),
        M::Btr => (bit_forms!(insn, op, 2), No),
        M::Btc => (bit_forms!(insn, op, 3), No),
        M::Bsf => {
            reg_rm(insn, op);
            (by_size!(wide size, bit_scan, false), No)
        }
        M::Bsr => {
            reg_rm(insn, op);
            (by_size!(wide size, bit_scan, true), No)
        }
        // Without the feature the prefix means nothing.
        M::Tzcnt => {
            reg_rm(insn, op);
            let counts = cpuid.has(bit::BMI1);
            let run: Handler = if counts {
                by_size!(wide size, count_zeros, false)
            } else {
                by_size!(wide size, bit_scan, false)
            };
            (run, No)
        }
        M::Lzcnt => {
            reg_rm(insn, op);
            let counts = cpuid.has(bit::LZCNT);
            let run: Handler = if counts {
                by_size!(wide size, count_zeros, true)
            } else {
                by_size!(wide size, bit_scan, true)
            };
            (run, No)
        }
        M::Popcnt => {
            reg_rm(insn, op);
            (by_size!(wide size, popcnt), No)
        }
        M::Andn => {
            reg_reg_rm(insn, op);
            (by_size!(wide size, andn), No)
        }
        M::Blsr => {
            reg_rm(insn, op);
            (by_size!(wide size, bls, 0), No)
        }
        M::Blsmsk => {
            reg_rm(insn, op);
            (by_size!(wide size, bls, 1), No)
        }
        M::Blsi => {
            reg_rm(insn, op);
            (by_size!(wide size, bls, 2), No)
        }
        M::Bextr => {
            if !is_register(insn, 2) {
                return None;
            }
            reg_rm_reg(insn, op);
            (by_size!(wide size, bextr), No)
        }
        M::Bzhi => {
            reg_rm_reg(insn, op);
            (by_size!(wide size, bzhi), No)
        }
        M::Mulx => {
            reg_reg_rm(insn, op);
            (by_size!(wide size, mulx), No)
        }
        M::Pdep => {
            reg_reg_rm(insn, op);
            (by_size!(wide size, deposit, false), No)
        }
        M::Pext => {
            reg_reg_rm(insn, op);
            (by_size!(wide size, deposit, true), No)
        }
        M::Adcx => {
            reg_rm(insn, op);
            (by_size!(wide size, adx, false), No)
        }
        M::Adox => {
            reg_rm(insn, op);
            (by_size!(wide size, adx, true), No)
        }
        M::Crc32 => {
            reg_rm(insn, op);
            let from = size_of_operand(insn, 1);
            (by_size!(from, crc32), No)
        }
        M::Push => match insn.op_kind(0) {
            OpKind::Register if insn.op_register(0).is_segment_register() => {
                op.a = segment_number(insn.op_register(0));
                (by_size!(wide stack_size(insn), push_seg), No)
            }
            OpKind::Register => {
                one(insn, op);
                (by_size!(wide size, push_r), No)
            }
            OpKind::Memory => (by_size!(wide size, push_m), No),
            _ => {
                op.imm = insn.immediate(0);
                (by_size!(wide stack_size(insn), push_i), No)
            }
        },
        M::Pop => match insn.op_kind(0) {
            OpKind::Register if insn.op_register(0).is_segment_register() => {
                op.a = segment_number(insn.op_register(0));
                let ends = if insn.op_register(0) == Register::SS { System } else { No };
                (by_size!(wide stack_size(insn), pop_seg), ends)
            }
            OpKind::Register => {
                one(insn, op);
                (by_size!(wide size, pop_r), No)
            }
            _ => (by_size!(wide size, pop_m), No),
        },
        M::Pusha => (pusha::<u16>, No),
        M::Pushad => (pusha::<u32>, No),
        M::Popa => (popa::<u16>, No),
        M::Popad => (popa::<u32>, No),
        M::Pushf => (pushf::<u16>, No),
        M::Pushfd => (pushf::<u32>, No),
        M::Pushfq => (pushf::<u64>, No),
        M::Popf => (popf::<u16>, System),
        M::Popfd => (popf::<u32>, System),
        M::Popfq => (popf::<u64>, System),
        M::Enter => {
            op.imm = insn.immediate(0) & 0xffff;
            op.scale = insn.immediate8_2nd() & 31;
            let run: Handler = match insn.code() {
                Code::Enterw_imm16_imm8 => enter::<u16>,
                Code::Enterd_imm16_imm8 => enter::<u32>,
                _ => enter::<u64>,
            };
            (run, No)
        }
        M::Leave => {
            let run: Handler = match insn.code() {
                Code::Leavew => leave::<u16>,
                Code::Leaved => leave::<u32>,
                _ => leave::<u64>,
            };
            (run, No)
        }
        M::Bound => {
            op.a = number(insn.op_register(0));
            let run: Handler = if insn.op_register(0).size() == 2 { bound::<u16> } else { bound::<u32> };
            (run, No)
        }
        M::Arpl => {
            rm_reg(insn, op);
            (arpl, No)
        }
        // Control flow.
        M::Jmp => match insn.op_kind(0) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = insn.near_branch_target();
                (jmp, Branch)
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                far(insn, op);
                (jmp_far, SystemBranch)
            }
            _ => match insn.code() {
                Code::Jmp_m1616 => (jmp_far_m::<u16>, SystemBranch),
                Code::Jmp_m1632 => (jmp_far_m::<u32>, SystemBranch),
                Code::Jmp_m1664 => (jmp_far_m::<u64>, SystemBranch),
                _ => {
                    one(insn, op);
                    (by_size!(wide size, jmp_rm), Branch)
                }
            },
        },
        M::Call => match insn.op_kind(0) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = insn.near_branch_target();
                (by_size!(wide size, call_rel), Branch)
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                far(insn, op);
                (call_far, SystemBranch)
            }
            _ => match insn.code() {
                Code::Call_m1616 => (call_far_m::<u16>, SystemBranch),
                Code::Call_m1632 => (call_far_m::<u32>, SystemBranch),
                Code::Call_m1664 => (call_far_m::<u64>, SystemBranch),
                _ => {
                    one(insn, op);
                    (by_size!(wide size, call_rm), Branch)
                }
            },
        },
        M::Ret => {
            if insn.op_count() > 0 {
                op.imm = insn.immediate(0) & 0xffff;
            }
            op.size = match insn.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            (by_size!(wide op.size, ret), Branch)
        }
        M::Retf => {
            if insn.op_count() > 0 {
                op.imm = insn.immediate(0) & 0xffff;
            }
            op.size = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            (ret_far, SystemBranch)
        }
        M::Iret | M::Iretd | M::Iretq => {
            op.size = match insn.mnemonic() {
                M::Iret => 2,
                M::Iretd => 4,
                _ => 8,
            };
            (iret, SystemBranch)
        }
        M::Jcxz | M::Jecxz | M::Jrcxz => {
            op.imm = insn.near_branch_target();
            op.address_size = match insn.mnemonic() {
                M::Jcxz => 2,
                M::Jecxz => 4,
                _ => 8,
            };
            (jcxz, Branch)
        }
        M::Loop | M::Loope | M::Loopne => {
            op.imm = insn.near_branch_target();
            op.address_size = loop_counter(insn.code());
            let run: Handler = match insn.mnemonic() {
                M::Loop => loops::<0>,
                M::Loope => loops::<1>,
                _ => loops::<2>,
            };
            (run, Branch)
        }
        M::Salc => (salc, No),
        M::Lahf if op.long() && !cpuid.has(bit::LAHF64) => (undefined, System),
        M::Sahf if op.long() && !cpuid.has(bit::LAHF64) => (undefined, System),
        M::Lahf => (lahf, No),
        M::Sahf => (sahf, No),
        M::Clc => flag(op, rflags::CF, change_flag::<0>),
        M::Stc => flag(op, rflags::CF, change_flag::<1>),
        M::Cmc => flag(op, rflags::CF, change_flag::<2>),
        M::Cld => flag(op, rflags::DF, change_flag::<0>),
        M::Std => flag(op, rflags::DF, change_flag::<1>),
        M::Cli => (cli, No),
        M::Sti => (sti, System),
        M::Clac => (access_flag::<false>, System),
        M::Stac => (access_flag::<true>, System),
        // Interrupts.
        M::Int => {
            op.imm = insn.immediate(0);
            (int, SystemBranch)
        }
        M::Int3 => (int3, SystemBranch),
        M::Int1 => (int1, SystemBranch),
        M::Into => (into, SystemBranch),
        M::Hlt => (hlt, System),
        M::Ud0 | M::Ud1 | M::Ud2 => (undefined, System),
        // Ports.
        M::In => {
            let imm = is_immediate(insn, 1);
            if imm {
                op.imm = insn.immediate(1);
            }
            let run: Handler = if imm { by_size!(size, input, true) } else { by_size!(size, input, false) };
            (run, System)
        }
        M::Out => {
            let imm = is_immediate(insn, 0);
            let size = size_of_operand(insn, 1);
            if imm {
                op.imm = insn.immediate(0);
            }
            let run: Handler = if imm { by_size!(size, output, true) } else { by_size!(size, output, false) };
            (run, System)
        }
        // System.
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            op.a = number(insn.op_register(0));
            op.b = match insn.mnemonic() {
                M::Lds => seg::DS,
                M::Les => seg::ES,
                M::Lfs => seg::FS,
                M::Lgs => seg::GS,
                _ => seg::SS,
            } as u8;
            (by_size!(wide size, load_pointer), if insn.mnemonic() == M::Lss { System } else { No })
        }
        M::Clts => (clts, System),
        M::Lmsw => {
            one(insn, op);
            (lmsw, System)
        }
        M::Smsw => {
            one(insn, op);
            (by_size!(wide size, smsw), No)
        }
        M::Invlpg => (invlpg, System),
        M::Invpcid => {
            op.a = number(insn.op_register(0));
            (invpcid, System)
        }
        M::Invd | M::Wbinvd | M::Wbnoinvd => (write_back, No),
        M::Clflush | M::Clflushopt | M::Clwb => (cache_line, No),
        M::Lgdt | M::Lidt => {
            let short = matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
            op.size = if short { 2 } else { 4 };
            let run: Handler =
                if insn.mnemonic() == M::Lidt { load_table::<true> } else { load_table::<false> };
            (run, System)
        }
        M::Sgdt => (store_table::<false>, No),
        M::Sidt => (store_table::<true>, No),
        M::Sldt => {
            one(insn, op);
            (by_size!(wide size, store_selector, false), No)
        }
        M::Str => {
            one(insn, op);
            (by_size!(wide size, store_selector, true), No)
        }
        M::Lldt => {
            one(insn, op);
            (load_system::<false>, System)
        }
        M::Ltr => {
            one(insn, op);
            (load_system::<true>, System)
        }
        M::Lar => {
            reg_rm(insn, op);
            (by_size!(wide size, look_up, false), No)
        }
        M::Lsl => {
            reg_rm(insn, op);
            (by_size!(wide size, look_up, true), No)
        }
        M::Verr => {
            one(insn, op);
            (verify::<false>, No)
        }
        M::Verw => {
            one(insn, op);
            (verify::<true>, No)
        }
        M::Cpuid => (cpuid_op, No),
        M::Rdtsc => (rdtsc::<false>, No),
        M::Rdtscp => (rdtsc::<true>, No),
        M::Rdpid => {
            one(insn, op);
            (rdpid, No)
        }
        M::Rdpmc => (rdpmc, No),
        M::Rdmsr => (rdmsr, No),
        M::Wrmsr => (wrmsr, System),
        // Guests take the one that they believe to fit; both are served.
        M::Vmcall | M::Vmmcall => (hypercall, System),
        M::Rdrand => {
            one(insn, op);
            (by_size!(wide size, random, false), No)
        }
        M::Rdseed => {
            one(insn, op);
            (by_size!(wide size, random, true), No)
        }
        M::Xgetbv => (xgetbv, No),
        M::Xsetbv => (xsetbv, System),
        M::Syscall => (syscall, SystemBranch),
        M::Sysret | M::Sysretq => {
            op.size = if insn.code() == Code::Sysretq { 8 } else { 4 };
            (sysret, SystemBranch)
        }
        M::Sysenter => (sysenter, SystemBranch),
        M::Sysexit | M::Sysexitq => {
            op.size = if insn.code() == Code::Sysexitq { 8 } else { 4 };
            (sysexit, SystemBranch)
        }
        M::Swapgs => (swapgs, No),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => {
            one(insn, op);
            let gs = matches!(insn.mnemonic(), M::Rdgsbase | M::Wrgsbase);
            op.b = if gs { seg::GS } else { seg::FS } as u8;
            let run: Handler = if matches!(insn.mnemonic(), M::Rdfsbase | M::Rdgsbase) {
                by_size!(wide size, read_base)
            } else {
                by_size!(wide size, write_base)
            };
            (run, No)
        }
        _ => {
            let cc = match insn.condition_code() {
                ConditionCode::None => return None,
                cc => cc as u8 - 1,
            };
            if insn.is_jcc_short_or_near() {
                op.imm = insn.near_branch_target();
                return Some((by_condition!(cc, jcc), Branch));
            }
            match insn.op_count() {
                1 => {
                    one(insn, op);
                    (by_condition!(cc, setcc), No)
                }
                2 if insn.op_register(0).is_gpr() => {
                    reg_rm(insn, op);
                    let memory = is_memory(insn, 1);
                    let run: Handler = if memory {
                        by_condition!(sized cc, size, cmov_m)
                    } else {
                        by_condition!(sized cc, size, cmov_r)
                    };
                    (run, No)
                }
                _ => return None,
            }
        }
    })
}

fn flag(op: &mut Op, bit: u64, run: Handler) -> (Handler, Ends) {
    op.imm = bit;
    (run, Ends::No)
}

/// A far pointer in the instruction.
fn far(insn: &Instruction, op: &mut Op) {
    op.disp = insn.far_branch_selector().into();
    op.imm = match insn.op_kind(0) {
        OpKind::FarBranch16 => insn.far_branch16().into(),
        _ => insn.far_branch32().into(),
    };
}

/// The counter's size in bytes of LOOP and relatives.
fn loop_counter(code: Code) -> u8 {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}
