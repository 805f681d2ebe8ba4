//! Sorts instructions by how they are translated.

use iced_x86::{Code, ConditionCode, FlowControl, Instruction, Mnemonic, OpKind, Register};
use iem::unit::{self, Access, Route};

use super::{ARITH, GENERAL, Kind, Machine, Mode, XSAVE_BYTES};

/// Flags an instruction reads, sets whatever happens, and may change.
pub(super) fn flag_effects(insn: &Instruction) -> (u32, u32, u32) {
    let read = insn.rflags_read() & ARITH;
    // Calls of the hypervisor leave the flags alone, and the handler of #UD finds them where there is none: what VMX says of its
    // instructions is for hypervisors of its own.
    if is_vmx(insn.mnemonic()) {
        return (read, 0, 0);
    }
    let modified = insn.rflags_modified() & ARITH;
    let by_count = match insn.mnemonic() {
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr => Some(1),
        Mnemonic::Shld | Mnemonic::Shrd => Some(2),
        _ => None,
    };
    if insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix()) {
        // With a count of zero nothing is compared.
        return (read | modified, 0, modified);
    }
    if let Some(op) = by_count {
        let sure = insn.op_kind(op) != OpKind::Register && insn.immediate(op) & 31 != 0;
        if !sure {
            return (read | modified, 0, modified);
        }
    }
    (read, modified, modified)
}

fn is_vmx(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vmcall
            | Vmclear
            | Vmlaunch
            | Vmptrld
            | Vmptrst
            | Vmread
            | Vmresume
            | Vmwrite
            | Vmxoff
            | Vmxon
            | Invept
            | Invvpid
    )
}

fn is_plain_gpr(register: Register) -> bool {
    register.is_gpr()
}

/// Whether an instruction of the general kind may be copied.
fn copyable(insn: &Instruction, machine: &Machine) -> bool {
    use Mnemonic::*;
    let ok = matches!(
        insn.mnemonic(),
        Add | Adc
            | Sub
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Mov
            | Movzx
            | Movsx
            | Movsxd
            | Inc
            | Dec
            | Neg
            | Not
            | Mul
            | Imul
            | Div
            | Idiv
            | Shl
            | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Andn
            | Bextr
            | Blsi
            | Blsr
            | Blsmsk
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Adcx
            | Adox
            | Xchg
            | Xadd
            | Cmpxchg
            | Cmpxchg8b
            | Cmpxchg16b
            | Bswap
            | Movbe
            | Crc32
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Clc
            | Stc
            | Cmc
            | Lahf
            | Sahf
            | Movnti
            | Mfence
            | Lfence
            | Sfence
            | Prefetchnta
            | Prefetcht0
            | Prefetcht1
            | Prefetcht2
            | Prefetchw
    ) || insn.is_setcc()
        || insn.is_cmovcc();
    if !ok {
        return false;
    }
    let announced = insn.cpuid_features().iter().all(|f| match GENERAL.iter().position(|g| g == f) {
        Some(bit) => machine.general & 1 << bit != 0,
        None => true,
    });
    announced
        && (0..insn.op_count())
            .all(|i| insn.op_kind(i) != OpKind::Register || is_plain_gpr(insn.op_register(i)))
}

trait CmovSetcc {
    fn is_setcc(&self) -> bool;
    fn is_cmovcc(&self) -> bool;
}

impl CmovSetcc for Instruction {
    fn is_setcc(&self) -> bool {
        self.condition_code() != ConditionCode::None && is_set(self.code())
    }
    fn is_cmovcc(&self) -> bool {
        self.condition_code() != ConditionCode::None
            && !is_set(self.code())
            && self.flow_control() == FlowControl::Next
            && self.op_count() == 2
            && self.op_kind(0) == OpKind::Register
            && self.op_register(0).is_gpr()
    }
}

fn is_set(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Seto_rm8
            | Setno_rm8
            | Setb_rm8
            | Setae_rm8
            | Sete_rm8
            | Setne_rm8
            | Setbe_rm8
            | Seta_rm8
            | Sets_rm8
            | Setns_rm8
            | Setp_rm8
            | Setnp_rm8
            | Setl_rm8
            | Setge_rm8
            | Setle_rm8
            | Setg_rm8
    )
}

/// Control registers of the floating-point units change by these, or host addresses would show.
fn fp_by_interpreter(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Ldmxcsr
            | Vldmxcsr
            | Fldcw
            | Fldenv
            | Frstor
            | Fxrstor
            | Fxrstor64
            | Xrstor
            | Xrstor64
            | Fxsave
            | Fxsave64
            | Fnstenv
            | Fstenv
            | Fnsave
            | Fsave
            | Fnclex
            | Fclex
    )
}

fn has_high_byte(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| {
        insn.op_kind(i) == OpKind::Register
            && matches!(insn.op_register(i), Register::AH | Register::BH | Register::CH | Register::DH)
    })
}

/// Number of r12 to r15 within that family, if it is one of them.
pub(crate) fn high_number(register: Register) -> Option<u8> {
    let number = register.is_gpr().then(|| register.full_register().number())?;
    (12..16).contains(&number).then(|| number as u8 - 12)
}

/// Whether r12 to r15 are among the operands.
pub(super) fn names_high(insn: &Instruction) -> bool {
    (0..insn.op_count())
        .any(|i| insn.op_kind(i) == OpKind::Register && high_number(insn.op_register(i)).is_some())
        || high_number(insn.memory_base()).is_some()
        || high_number(insn.memory_index()).is_some()
}

/// Whether the memory operand's address can be computed here.
fn addressable(insn: &Instruction, mode: Mode) -> bool {
    let base = insn.memory_base();
    let index = insn.memory_index();
    if mode.segments.is_some() {
        return base.size() <= 4 && index.size() <= 4 && insn.memory_segment() != Register::None;
    }
    let size_ok = |r: Register| {
        r == Register::None || r.is_gpr64() && mode.long || r.is_gpr32() || r == Register::RIP && mode.long
    };
    let segment = match insn.memory_segment() {
        Register::FS | Register::GS => mode.long || mode.fs_gs,
        Register::ES | Register::CS | Register::SS | Register::DS => {
            // Code segments may be written in no mode but 64-bit.
            mode.long || insn.segment_prefix() != Register::CS
        }
        _ => false,
    };
    size_ok(base) && size_ok(index) && segment && insn.memory_displ_size() != 2
}

pub(super) struct Sorted {
    pub(super) kind: Kind,
    pub(super) memory: bool,
    pub(super) size: u16,
    pub(super) writes: bool,
    pub(super) align: u16,
    pub(super) fp: bool,
}

impl Sorted {
    fn plain(kind: Kind) -> Self {
        Self { kind, memory: false, size: 0, writes: false, align: 1, fp: false }
    }
}

/// How an instruction is translated.
pub(super) fn sort(insn: &Instruction, mode: Mode, machine: &Machine) -> Sorted {
    let interpret = Sorted::plain(Kind::Interpret(false));
    let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let word = mode.bits() as u16 / 8;
    if mode.segments.is_some()
        && let Some(sorted) = sort_segmented(insn, mode)
    {
        return sorted;
    }
    if let Some(kind) = sort_system(insn, mode) {
        if kind == Kind::Selector && has_memory {
            if !addressable(insn, mode) {
                return interpret;
            }
            return Sorted { memory: true, size: 2, writes: true, ..Sorted::plain(kind) };
        }
        let stack = matches!(kind, Kind::Pushf | Kind::Popf);
        return Sorted {
            size: if stack { word } else { 0 },
            writes: kind == Kind::Pushf,
            ..Sorted::plain(kind)
        };
    }
    match insn.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch if insn.is_jmp_short_or_near() => {
            return Sorted::plain(match near_target(insn, mode) {
                Some(t) => Kind::Jmp(t),
                None => Kind::Interpret(false),
            });
        }
        FlowControl::ConditionalBranch => {
            let Some(t) = near_target(insn, mode) else { return interpret };
            return Sorted::plain(match insn.mnemonic() {
                Mnemonic::Jrcxz if mode.long => Kind::Jcxz(t),
                Mnemonic::Jecxz => Kind::Jcxz(t),
                Mnemonic::Loop if matches!(insn.code(), Code::Loop_rel8_64_RCX | Code::Loop_rel8_32_ECX) => {
                    Kind::Loop(t)
                }
                Mnemonic::Loop if insn.code() == Code::Loop_rel8_16_CX => Kind::Loop(t),
                _ if insn.is_jcc_short_or_near() => Kind::Jcc(t),
                _ => Kind::Interpret(false),
            });
        }
        FlowControl::Call if insn.is_call_near() => {
            return match near_target(insn, mode) {
                Some(t) => Sorted { size: word, writes: true, ..Sorted::plain(Kind::Call(t)) },
                None => interpret,
            };
        }
        FlowControl::Return
            if matches!(
                (insn.code(), word),
                (Code::Retnq | Code::Retnq_imm16, 8)
                    | (Code::Retnd | Code::Retnd_imm16, 4)
                    | (Code::Retnw | Code::Retnw_imm16, 2)
            ) =>
        {
            return Sorted { size: word, ..Sorted::plain(Kind::Ret) };
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall
            if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() =>
        {
            let wanted = usize::from(word);
            let operand_ok = match insn.op_kind(0) {
                OpKind::Register => insn.op_register(0).size() == wanted,
                OpKind::Memory => insn.memory_size().size() == wanted && addressable(insn, mode),
                _ => false,
            };
            if !operand_ok {
                return interpret;
            }
            let kind = if insn.is_jmp_near_indirect() { Kind::JmpIndirect } else { Kind::CallIndirect };
            return Sorted { memory: has_memory, size: word, ..Sorted::plain(kind) };
        }
        _ => return interpret,
    }
    match insn.mnemonic() {
        Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => return Sorted::plain(Kind::Nop),
        Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw => return Sorted::plain(Kind::Nop),
        Mnemonic::Lea => {
            let sizes = |r: Register| {
                r == Register::None || r.is_gpr64() || r.is_gpr32() || r == Register::RIP && mode.long
            };
            return if sizes(insn.memory_base())
                && sizes(insn.memory_index())
                && insn.memory_displ_size() != 2
                && insn.op_register(0).size() >= 4
            {
                Sorted::plain(Kind::Lea)
            } else {
                interpret
            };
        }
        Mnemonic::Push => {
            let operand = match insn.op_kind(0) {
                OpKind::Register => {
                    insn.op_register(0).size() == word as usize && insn.op_register(0).is_gpr()
                }
                OpKind::Immediate8to64 | OpKind::Immediate32to64 => mode.long,
                OpKind::Immediate8to32 | OpKind::Immediate32 => !mode.long,
                OpKind::Memory => {
                    insn.memory_size().size() == word as usize && addressable(insn, mode) && !mode.plain
                }
                _ => false,
            };
            return if operand {
                Sorted { memory: has_memory, size: word, writes: true, ..Sorted::plain(Kind::Push) }
            } else {
                interpret
            };
        }
        Mnemonic::Pop => {
            let operand = insn.op_kind(0) == OpKind::Register
                && insn.op_register(0).is_gpr()
                && insn.op_register(0).size() == word as usize;
            return if operand { Sorted { size: word, ..Sorted::plain(Kind::Pop) } } else { interpret };
        }
        Mnemonic::Leave if matches!(insn.code(), Code::Leaveq | Code::Leaved) => {
            return Sorted { size: word, memory: true, ..Sorted::plain(Kind::Leave) };
        }
        _ => {}
    }
    if let Some(class) = unit::classify(insn) {
        if class.kind == unit::Kind::Xsave
            && mode.avx
            && mode.long
            && machine.xsave
            && machine.unit.contains(class.features)
            && addressable(insn, mode)
        {
            let kind = match insn.mnemonic() {
                Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => {
                    Kind::Xsave(false)
                }
                Mnemonic::Xsavec | Mnemonic::Xsavec64 => Kind::Xsave(true),
                Mnemonic::Xrstor | Mnemonic::Xrstor64 => Kind::Xrstor,
                _ => Kind::Interpret(true),
            };
            let writes = matches!(kind, Kind::Xsave(_));
            return Sorted { kind, memory: true, size: XSAVE_BYTES, writes, align: 64, fp: true };
        }
        let allowed = match class.kind {
            unit::Kind::X87 | unit::Kind::X87NoWait | unit::Kind::Wait | unit::Kind::Mmx => {
                mode.x87 && mode.sse
            }
            unit::Kind::Sse => mode.sse,
            unit::Kind::Avx => mode.avx,
            unit::Kind::Fxsave | unit::Kind::Xsave => false,
        };
        let ok = allowed
            && class.route == Route::Operand
            && machine.unit.contains(class.features)
            && !fp_by_interpreter(insn.mnemonic())
            // Outside 64-bit mode they leave the upper eight registers alone.
            && (mode.long || !matches!(insn.mnemonic(), Mnemonic::Vzeroall | Mnemonic::Vzeroupper))
            && (!has_memory || addressable(insn, mode) && matches!(class.size, 1..=32));
        if !ok {
            return Sorted::plain(Kind::Interpret(true));
        }
        let access = if has_memory { class.access } else { Access::None };
        return Sorted {
            kind: Kind::Copy,
            memory: has_memory,
            size: class.size,
            writes: access.writes(),
            align: class.align,
            fp: true,
        };
    }
    if !copyable(insn, machine) || (has_memory && (!addressable(insn, mode) || has_high_byte(insn))) {
        return interpret;
    }
    let mut kind = match insn.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv => Kind::Divide,
        _ => Kind::Copy,
    };
    let mut size = if has_memory { insn.memory_size().size() as u16 } else { 0 };
    if has_memory
        && matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op_kind(1) == OpKind::Register
    {
        size = insn.op_register(1).size() as u16;
        let narrow = insn.memory_base().is_gpr32() || insn.memory_index().is_gpr32();
        // An address of 32 bits wraps before the segment's base is added.
        if size < 4
            || mode.plain && insn.op_register(1).full_register() == Register::RSP
            || mode.long && narrow
        {
            return interpret;
        }
        kind = Kind::BitString;
    }
    if has_memory && !matches!(size, 1..=16) {
        return interpret;
    }
    // Registers without a home of their own take temporaries: one beside a checked address, else two.
    let mut high = 0u8;
    for i in 0..insn.op_count() {
        if insn.op_kind(i) == OpKind::Register
            && let Some(n) = high_number(insn.op_register(i))
        {
            high |= 1 << n;
        }
    }
    let temporaries = if has_memory { 1 } else { 2 };
    if high.count_ones() > temporaries {
        return interpret;
    }
    let writes = has_memory && writes_memory(insn);
    let align = if insn.mnemonic() == Mnemonic::Cmpxchg16b { 16 } else { 1 };
    Sorted { kind, memory: has_memory, size, writes, align, fp: false }
}

/// System instructions that are translated.
fn sort_system(insn: &Instruction, mode: Mode) -> Option<Kind> {
    let kernel = !mode.user();
    let flat = mode.segments.is_none();
    let element = |code| match code {
        Code::Movsb_m8_m8 | Code::Stosb_m8_AL => Some(0),
        Code::Movsw_m16_m16 | Code::Stosw_m16_AX => Some(1),
        Code::Movsd_m32_m32 | Code::Stosd_m32_EAX => Some(2),
        Code::Movsq_m64_m64 | Code::Stosq_m64_RAX => Some(3),
        _ => None,
    };
    Some(match insn.mnemonic() {
        Mnemonic::Cli if kernel => Kind::Cli,
        Mnemonic::Sti if kernel => Kind::Sti,
        Mnemonic::Cld => Kind::Cld,
        Mnemonic::Pushfq if mode.long => Kind::Pushf,
        Mnemonic::Pushfd if !mode.long && flat => Kind::Pushf,
        Mnemonic::Popfq if mode.long && kernel => Kind::Popf,
        Mnemonic::Popfd if !mode.long && flat && kernel => Kind::Popf,
        Mnemonic::Swapgs if mode.long && kernel => Kind::Swapgs,
        Mnemonic::Rdtsc if mode.tsc => Kind::Rdtsc,
        Mnemonic::Rdtscp if mode.tsc => Kind::Rdtscp,
        Mnemonic::Stac if kernel && flat && mode.smap => Kind::SetAc(true),
        Mnemonic::Clac if kernel && flat && mode.smap => Kind::SetAc(false),
        Mnemonic::Syscall if mode.long && mode.user() => Kind::Syscall,
        Mnemonic::Sysretq if mode.long && mode.bank == 0 => Kind::Sysret,
        Mnemonic::Mov
            if matches!(insn.code(), Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg) =>
        {
            Kind::Selector
        }
        Mnemonic::Iretq if mode.long && mode.bank == 0 => Kind::Iret,
        Mnemonic::Rdfsbase if mode.long && mode.fsgsbase => Kind::ReadBase(false),
        Mnemonic::Rdgsbase if mode.long && mode.fsgsbase => Kind::ReadBase(true),
        Mnemonic::Wrfsbase if mode.long && mode.fsgsbase => Kind::WriteBase(false),
        Mnemonic::Wrgsbase if mode.long && mode.fsgsbase => Kind::WriteBase(true),
        Mnemonic::Mov
            if kernel
                && insn.code() == Code::Mov_r64_cr
                && matches!(
                    insn.op1_register(),
                    Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4
                ) =>
        {
            Kind::ReadControl
        }
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq
            if flat
                && !insn.has_repne_prefix()
                && insn.op1_kind() == if mode.long { OpKind::MemorySegRSI } else { OpKind::MemorySegESI }
                && !matches!(insn.memory_segment(), Register::FS | Register::GS) =>
        {
            Kind::Movs(element(insn.code())?)
        }
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq
            if flat
                && !insn.has_repne_prefix()
                && insn.op0_kind() == if mode.long { OpKind::MemoryESRDI } else { OpKind::MemoryESEDI } =>
        {
            Kind::Stos(element(insn.code())?)
        }
        _ => return None,
    })
}

/// What is translated in another way outside flat segments, or left to the interpreter there.
fn sort_segmented(insn: &Instruction, mode: Mode) -> Option<Sorted> {
    use Code::*;
    let segments = mode.segments?;
    let interpret = Some(Sorted::plain(Kind::Interpret(false)));
    let has_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    if has_memory && !addressable(insn, mode) {
        return Some(Sorted::plain(Kind::Interpret(unit::classify(insn).is_some())));
    }
    let names_sp =
        |n: u32| insn.op_kind(n) == OpKind::Register && insn.op_register(n).full_register() == Register::RSP;
    let kind = match insn.flow_control() {
        FlowControl::Call if insn.is_call_near() => match near_target(insn, mode) {
            Some(t) => Kind::Call(t),
            None => return interpret,
        },
        FlowControl::Return => Kind::Ret,
        FlowControl::IndirectBranch => Kind::JmpIndirect,
        FlowControl::IndirectCall => Kind::CallIndirect,
        _ => Kind::Nop,
    };
    if kind != Kind::Nop {
        let size = match insn.code() {
            Call_rel16 | Retnw | Retnw_imm16 | Jmp_rm16 | Call_rm16 => 2,
            Call_rel32_32 | Retnd | Retnd_imm16 | Jmp_rm32 | Call_rm32 => 4,
            _ => return interpret,
        };
        if size == 2 && segments.big {
            return interpret;
        }
        let writes = matches!(kind, Kind::Call(_));
        return Some(Sorted { memory: has_memory, size, writes, ..Sorted::plain(kind) });
    }
    match insn.mnemonic() {
        Mnemonic::Lea => Some(Sorted::plain(if names_sp(0) { Kind::Interpret(false) } else { Kind::Lea })),
        Mnemonic::Push => {
            let size = match insn.code() {
                Push_r16 | Push_rm16 | Push_imm16 | Pushw_imm8 => 2,
                Push_r32 | Push_rm32 | Pushd_imm32 | Pushd_imm8 => 4,
                _ => return interpret,
            };
            Some(Sorted { memory: has_memory, size, writes: true, ..Sorted::plain(Kind::Push) })
        }
        Mnemonic::Pop => {
            let to = insn.op0_register();
            let real =
                segments.real && matches!(insn.code(), Popw_DS | Popw_ES | Popw_FS | Popw_GS | Popw_SS);
            Some(match insn.code() {
                Pop_r16 | Pop_rm16 if !has_memory && !names_sp(0) => {
                    Sorted { size: 2, ..Sorted::plain(Kind::Pop) }
                }
                Pop_r32 | Pop_rm32 if !has_memory && !names_sp(0) => {
                    Sorted { size: to.size() as u16, ..Sorted::plain(Kind::Pop) }
                }
                _ if real => Sorted { size: 2, ..Sorted::plain(Kind::LoadSegment) },
                _ => return interpret,
            })
        }
        Mnemonic::Mov if matches!(insn.code(), Mov_Sreg_rm16 | Mov_Sreg_r32m16) => {
            if !segments.real || insn.op0_register() == Register::CS {
                return interpret;
            }
            Some(Sorted { memory: has_memory, size: 2, ..Sorted::plain(Kind::LoadSegment) })
        }
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if has_memory && insn.op_kind(1) == OpKind::Register =>
        {
            interpret
        }
        Mnemonic::Leave => interpret,
        _ => None,
    }
}

/// Whether a general instruction writes its memory operand.
fn writes_memory(insn: &Instruction) -> bool {
    use Mnemonic::*;
    if insn.op_kind(0) != OpKind::Memory {
        // XCHG's and XADD's operands may stand either way round.
        return matches!(insn.mnemonic(), Xchg | Xadd);
    }
    !matches!(insn.mnemonic(), Cmp | Test | Bt | Mul | Imul | Div | Idiv)
}

/// The target of a near branch relative to the page, if code addresses are of the mode's width.
pub(super) fn near_target(insn: &Instruction, mode: Mode) -> Option<i64> {
    match insn.op_kind(0) {
        OpKind::NearBranch64 if mode.long => Some(insn.near_branch64() as i64),
        OpKind::NearBranch32 if mode.bits() == 32 => Some(i64::from(insn.near_branch32() as i32)),
        // Offsets in the code segment wrap, not those in the page.
        OpKind::NearBranch16 if mode.bits() == 16 => {
            Some(i64::from(insn.near_branch16()) - i64::from(mode.ip()))
        }
        OpKind::NearBranch32 if mode.bits() == 16 && insn.near_branch32() <= 0xffff => {
            Some(i64::from(insn.near_branch32()) - i64::from(mode.ip()))
        }
        _ => None,
    }
}
