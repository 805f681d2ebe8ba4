//! Reads guest code and decides, instruction by instruction, how it is translated.

use iced_x86::{
    Code, ConditionCode, CpuidFeature, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction,
    InstructionInfoFactory, Mnemonic, OpKind, Register, RflagsBits,
};
use iem::unit::{self, Access, Features, Route};

use crate::emit::verify::{Immediate, Verify, reads_immediate};
use crate::groups::{self, Group};
use crate::swap::{self, Swap};

/// Bytes of an XSAVE image with all that guests have.
const XSAVE_BYTES: u16 = cpum::state::XsaveArea::SIZE as u16;
/// Most instructions in a block, and in one that verifies its bytes.
const MAX_INSNS: usize = 96;
const MAX_VERIFIED: usize = 256;
/// How often code of a page must have been seen at work so that its blocks overlap, and for pages to be kept everywhere in it.
pub(crate) const WARM: u8 = 1;
pub(crate) const HOT: u8 = 8;
/// The arithmetic flags, as `iced-x86` names them.
pub(crate) const ARITH: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What makes translations of the same bytes differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mode {
    /// 64-bit code; else 32-bit code in flat segments.
    pub(crate) long: bool,
    /// Bank of TLB and jump cache (0 to 2).
    pub(crate) bank: u8,
    /// x87 and MMX, SSE, AVX instructions may run without further checks.
    pub(crate) x87: bool,
    pub(crate) sse: bool,
    pub(crate) avx: bool,
    /// FS and GS are usable, writable and without a limit, so that only their base matters.
    pub(crate) fs_gs: bool,
    /// Memory accesses are checked one by one.
    pub(crate) plain: bool,
    /// STAC and CLAC change what the kernel may touch.
    pub(crate) smap: bool,
    /// RDTSC reads the host's counter.
    pub(crate) tsc: bool,
    /// RDFSBASE and relatives are enabled.
    pub(crate) fsgsbase: bool,
    /// Segments are not flat, or code has 16 bits.
    pub(crate) segments: Option<Segments>,
}

/// Code outside flat segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Segments {
    /// Code has 32 bits.
    pub(crate) big: bool,
    /// The stack pointer has 32 bits.
    pub(crate) big_stack: bool,
    /// Segment registers are loaded as in real mode.
    pub(crate) real: bool,
    /// Of 16-bit code: the offset in the code segment of the page's first byte.
    pub(crate) ip: i32,
}

impl Segments {
    /// What code segments of the same base may differ in.
    pub(crate) fn kind(self) -> u16 {
        u16::from(self.big) | u16::from(self.big_stack) << 1 | u16::from(self.real) << 2
    }
}

impl Mode {
    /// A number for it.
    pub(crate) fn number(self) -> u32 {
        let segments = self.segments.map_or(0, |s| {
            // Page offsets that belong to the segment are in the page.
            1 | u32::from(s.kind()) << 1 | ((s.ip + 4096) as u32 & 0x1_ffff) << 4
        });
        u32::from(self.bank)
            | u32::from(self.long) << 2
            | u32::from(self.x87) << 3
            | u32::from(self.sse) << 4
            | u32::from(self.avx) << 5
            | u32::from(self.fs_gs) << 6
            | u32::from(self.plain) << 7
            | u32::from(self.smap) << 8
            | u32::from(self.tsc) << 9
            | u32::from(self.fsgsbase) << 10
            | segments << 11
    }

    /// What code of all banks has in common.
    pub(crate) fn common(self) -> u32 {
        Self { bank: 0, long: false, fs_gs: false, plain: false, segments: None, ..self }.number()
    }

    /// The width of code, in bits.
    pub(crate) fn bits(self) -> u32 {
        match self.segments {
            _ if self.long => 64,
            Some(Segments { big: false, .. }) => 16,
            _ => 32,
        }
    }

    /// The offset in the code segment of the page's first byte, as far as it matters.
    fn ip(self) -> i32 {
        self.segments.map_or(0, |s| s.ip)
    }

    /// What is a bank's own.
    pub(crate) fn own(self) -> (bool, bool) {
        (self.long, self.fs_gs)
    }

    pub(crate) fn user(self) -> bool {
        self.bank == 1
    }
}

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Copied, with its operands replaced.
    Copy,
    /// Copied; the host may raise #DE.
    Divide,
    Lea,
    Nop,
    Push,
    Pop,
    Leave,
    /// BT and relatives on memory with a bit offset in a register.
    BitString,
    Jmp(i64),
    Jcc(i64),
    /// JRCXZ, JECXZ.
    Jcxz(i64),
    Loop(i64),
    Call(i64),
    JmpIndirect,
    CallIndirect,
    Ret,
    Cli,
    Sti,
    Cld,
    Pushf,
    Popf,
    Swapgs,
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
    /// MOV from a segment register, to a register or memory.
    Selector,
    /// MOV or POP to a segment register other than CS, in real mode.
    LoadSegment,
    /// MOV from a control register.
    ReadControl,
    /// Repeated MOVS or STOS; element size as power of two.
    Movs(u8),
    Stos(u8),
    /// STAC, CLAC.
    SetAc(bool),
    Syscall,
    Sysret,
    /// IRET in 64-bit code.
    Iret,
    /// RDFSBASE, RDGSBASE; WRFSBASE, WRGSBASE. True for GS.
    ReadBase(bool),
    WriteBase(bool),
    /// XSAVE and XSAVEOPT; XSAVEC if true.
    Xsave(bool),
    Xrstor,
    /// Left to the interpreter; true if it works on x87, SSE or AVX state.
    Interpret(bool),
}

/// How the memory operand is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    None,
    /// Through the TLB.
    Checked,
    /// Within the stack page that was checked before.
    Stack,
}

/// One instruction of a block.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) insn: Instruction,
    /// Offset in the page.
    pub(crate) offset: u16,
    pub(crate) kind: Kind,
    pub(crate) memory: Memory,
    /// Bytes of the memory operand, whether it is written, its alignment rule.
    pub(crate) size: u16,
    pub(crate) writes: bool,
    pub(crate) align: u16,
    pub(crate) fp: bool,
    /// Flags that matter before it.
    pub(crate) live_in: u32,
    pub(crate) live_out: u32,
    /// Flags it sets whatever happens.
    pub(crate) kills: u32,
    pub(crate) modifies: u32,
    /// RSP before it, relative to the start of its stretch.
    pub(crate) depth: i32,
    /// Its stack access lies in what a check covers.
    pub(crate) covered: bool,
    /// Its immediate operand is read from the guest's code when it runs.
    pub(crate) immediate: Option<Immediate>,
    /// Its memory operand was seen to move from page to page.
    pub(crate) moves: bool,
    /// How its memory operand's page is found, if not by a check of its own.
    pub(crate) group: Option<Group>,
    /// A check of the stack page stands before it: lowest offset from RSP, bytes, whether anything is written.
    pub(crate) check: Option<StackCheck>,
    /// Branches of the block come here.
    pub(crate) joined: bool,
    /// Its registers were replaced by others.
    pub(crate) renamed: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct StackCheck {
    pub(crate) low: i32,
    pub(crate) span: i32,
    pub(crate) writes: bool,
}

/// A block to translate.
pub(crate) struct Plan {
    pub(crate) items: Vec<Item>,
    /// Offset behind the last instruction, where the block goes on if that does not end it.
    pub(crate) end: u16,
    /// The instruction at `end` reaches into the next page.
    pub(crate) crosses: bool,
    /// Ranges of the page that the translation depends on.
    pub(crate) ranges: Vec<(u16, u16)>,
    /// Its branches forward stay in it where they can; else each of their targets is a block.
    pub(crate) joins: bool,
    /// It jumps back to its own start.
    pub(crate) looped: bool,
    /// Registers that change places while it runs.
    pub(crate) swaps: Vec<Swap>,
    /// For a page whose writes are not noticed.
    pub(crate) verify: Option<Verify>,
}

/// What is known of the pages that accesses keep.
pub(crate) struct Kept<'a> {
    /// Sites taken.
    pub(crate) sites: &'a mut usize,
    /// Whether the memory operand of the instruction at a page offset moves from page to page too often.
    pub(crate) moving: &'a dyn Fn(u16) -> bool,
    /// How often the page's code was seen at work.
    pub(crate) heat: u8,
}

/// What a block is planned for.
#[derive(Clone, Copy)]
pub(crate) struct Aim {
    pub(crate) mode: Mode,
    pub(crate) machine: Machine,
    /// Writes to the page will not be noticed: the block must verify its own bytes, depend on no others, and end where it writes.
    pub(crate) fleeting: bool,
}

/// Features that instructions of the general kind need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) unit: Features,
    /// Features of general instructions that are announced (`general_features`).
    pub(crate) general: u32,
    /// The host has XSAVE, XSAVEC and XRSTOR.
    pub(crate) xsave: bool,
}

/// `CpuidFeature`s of general instructions beyond the base set, in the order of the bits of [`Machine::general`].
pub(crate) const GENERAL: [CpuidFeature; 9] = [
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::LZCNT,
    CpuidFeature::POPCNT,
    CpuidFeature::MOVBE,
    CpuidFeature::ADX,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::SSE4_2,
];

/// Flags an instruction reads, sets whatever happens, and may change.
fn flag_effects(insn: &Instruction) -> (u32, u32, u32) {
    let modified = insn.rflags_modified() & ARITH;
    let read = insn.rflags_read() & ARITH;
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
fn names_high(insn: &Instruction) -> bool {
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

struct Sorted {
    kind: Kind,
    memory: bool,
    size: u16,
    writes: bool,
    align: u16,
    fp: bool,
}

impl Sorted {
    fn plain(kind: Kind) -> Self {
        Self { kind, memory: false, size: 0, writes: false, align: 1, fp: false }
    }
}

fn sort(insn: &Instruction, mode: Mode, machine: &Machine) -> Sorted {
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
            if mode.long
                && insn.has_rep_prefix()
                && insn.op1_kind() == OpKind::MemorySegRSI
                && !matches!(insn.memory_segment(), Register::FS | Register::GS) =>
        {
            Kind::Movs(element(insn.code())?)
        }
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq
            if mode.long && insn.has_rep_prefix() && insn.op0_kind() == OpKind::MemoryESRDI =>
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
fn near_target(insn: &Instruction, mode: Mode) -> Option<i64> {
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

/// How RSP changes.
pub(crate) enum Change {
    Same,
    By(i32),
    Unknown,
}

pub(crate) fn stack_change(insn: &Instruction, kind: Kind, word: i32) -> Change {
    match kind {
        Kind::Push | Kind::Pushf | Kind::Call(_) | Kind::CallIndirect => return Change::By(-word),
        Kind::Popf => return Change::By(word),
        Kind::Selector if insn.op0_kind() != OpKind::Register => return Change::Same,
        Kind::Selector | Kind::ReadControl | Kind::ReadBase(_) => {
            let sp = insn.op0_register().full_register() == Register::RSP;
            return if sp { Change::Unknown } else { Change::Same };
        }
        Kind::Pop if insn.op_register(0).full_register() == Register::RSP => return Change::Unknown,
        Kind::Pop => return Change::By(word),
        Kind::Leave => return Change::Unknown,
        Kind::Ret => return Change::By(word),
        _ => {}
    }
    let names_sp = (0..insn.op_count().min(2)).any(|i| {
        insn.op_kind(i) == OpKind::Register
            && insn.op_register(i).is_gpr()
            && insn.op_register(i).full_register() == Register::RSP
    });
    if !names_sp || matches!(insn.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push | Mnemonic::Bt)
    {
        return Change::Same;
    }
    let writes_first = insn.op_kind(0) == OpKind::Register
        && insn.op_register(0).is_gpr()
        && insn.op_register(0).full_register() == Register::RSP;
    if !writes_first {
        // A source, unless both operands are written.
        return match insn.mnemonic() {
            Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Mulx => Change::Unknown,
            _ => Change::Same,
        };
    }
    if insn.op_register(0).size() != word as usize {
        return Change::Unknown;
    }
    let small = |v: i64| i32::try_from(v).ok().filter(|v| v.abs() < 1 << 20);
    match insn.mnemonic() {
        Mnemonic::Add | Mnemonic::Sub
            if insn.op_kind(1) != OpKind::Register && insn.op_kind(1) != OpKind::Memory =>
        {
            let v = insn.immediate(1) as i64;
            let v = if word == 4 { i64::from(v as i32) } else { v };
            match small(if insn.mnemonic() == Mnemonic::Sub { v.wrapping_neg() } else { v }) {
                Some(v) => Change::By(v),
                None => Change::Unknown,
            }
        }
        Mnemonic::Lea
            if insn.memory_base() == insn.op_register(0) && insn.memory_index() == Register::None =>
        {
            match small(insn.memory_displacement64() as i64) {
                Some(v) => Change::By(v),
                None => Change::Unknown,
            }
        }
        _ => Change::Unknown,
    }
}

/// The offset from RSP and the size of the stack access an instruction makes, if it makes one that a check of the page covers.
fn stack_access(item: &Item, word: i32) -> Option<(i32, i32)> {
    match item.kind {
        Kind::Push | Kind::Pushf | Kind::Call(_) | Kind::CallIndirect => Some((-word, word)),
        Kind::Pop | Kind::Popf | Kind::Ret => Some((0, word)),
        Kind::Copy | Kind::Divide | Kind::JmpIndirect if explicit_stack(item, word) => {
            let disp = i32::try_from(item.insn.memory_displacement64() as i64).ok()?;
            Some((disp, item.size.into()))
        }
        _ => None,
    }
}

/// The memory operand is RSP and a displacement, without an alignment rule.
fn explicit_stack(item: &Item, word: i32) -> bool {
    let base = item.insn.memory_base();
    item.memory == Memory::Checked
        && item.align <= 1
        && base.is_gpr()
        && base.full_register() == Register::RSP
        && base.size() == word as usize
        && item.insn.memory_index() == Register::None
        && !matches!(item.insn.memory_segment(), Register::FS | Register::GS)
}

impl Plan {
    /// Plans the block that starts at `start` of a page, of which bytes are known from `known` on. Bytes of the next page follow
    /// where one instruction that needs them is to be planned.
    pub(crate) fn new(
        page: &[u8],
        known: u16,
        start: u16,
        aim: Aim,
        info: &mut InstructionInfoFactory,
        kept: Kept<'_>,
    ) -> Self {
        let Aim { mode, machine, fleeting } = aim;
        let mut decoder = Decoder::new(mode.bits(), page, DecoderOptions::NONE);
        let mut items = Vec::with_capacity(24);
        let mut at = start;
        let mut crosses = false;
        let mut ended = false;
        let most = if fleeting { MAX_VERIFIED } else { MAX_INSNS };
        while items.len() < most && at < 4096 {
            let Some(insn) = decode(&mut decoder, at, mode) else {
                crosses = page.len() >= 4096;
                break;
            };
            let s = sort(&insn, mode, &machine);
            let (reads, kills, modifies) = flag_effects(&insn);
            items.push(Item {
                insn,
                offset: at,
                kind: s.kind,
                memory: if s.memory { Memory::Checked } else { Memory::None },
                size: s.size,
                writes: s.writes,
                align: s.align,
                fp: s.fp,
                live_in: reads,
                live_out: 0,
                kills,
                modifies,
                depth: 0,
                covered: false,
                immediate: None,
                moves: (kept.moving)(at),
                group: None,
                check: None,
                joined: false,
                renamed: false,
            });
            if fleeting && let Some(item) = items.last_mut().filter(|item| reads_immediate(item)) {
                let place = decoder.get_constant_offsets(&insn);
                item.immediate = Some(Immediate {
                    offset: at + place.immediate_offset() as u16,
                    size: place.immediate_size() as u16,
                });
            }
            at += insn.len() as u16;
            ended = matches!(
                s.kind,
                Kind::Jmp(_)
                    | Kind::Call(_)
                    | Kind::JmpIndirect
                    | Kind::CallIndirect
                    | Kind::Ret
                    | Kind::Syscall
                    | Kind::Sysret
                    | Kind::Iret
                    | Kind::SetAc(_)
                    | Kind::Interpret(_)
            );
            if ended || fleeting && (s.writes || matches!(s.kind, Kind::Movs(_) | Kind::Stos(_))) {
                break;
            }
        }
        // The instruction behind STI runs before interrupts are looked at: it must be in the block, and run natively. Behind a load of
        // SS nothing must keep it from that, for the stack pointer does not fit the segment yet.
        let exposed = |n: usize| {
            let next: Option<&Item> = items.get(n + 1);
            match items[n].kind {
                Kind::Sti => next.is_none_or(|next| {
                    matches!(next.kind, Kind::Interpret(_) | Kind::Movs(_) | Kind::Stos(_))
                }),
                Kind::LoadSegment if items[n].insn.op0_register() == Register::SS => {
                    next.is_none_or(|next| {
                        next.memory != Memory::None
                            || next.fp
                            || !matches!(next.kind, Kind::Copy | Kind::Lea | Kind::Nop)
                    })
                }
                _ => false,
            }
        };
        if let Some(n) = (0..items.len()).find(|&n| exposed(n)) {
            items.truncate(n + 1);
            items[n].kind = Kind::Interpret(false);
            at = items[n].offset + items[n].insn.len() as u16;
            ended = true;
            crosses = false;
        }
        // A loop with registers that have no homes ends where it goes back, so that these can be given some.
        let back = |item: &Item| matches!(item.kind, Kind::Jcc(t) if t == i64::from(start));
        if mode.long
            && !mode.plain
            && !fleeting
            && let Some(n) = items.iter().position(back)
            && items[..n].iter().any(|item| names_high(&item.insn))
            && n + 1 < items.len()
        {
            items.truncate(n + 1);
            at = items[n].offset + items[n].insn.len() as u16;
            ended = false;
            crosses = false;
        }
        let mut plan = Self {
            items,
            end: at,
            crosses,
            ranges: vec![(start, at.max(start + 1))],
            joins: false,
            looped: false,
            swaps: Vec::new(),
            verify: None,
        };
        if crosses {
            plan.ranges[0].1 = 4096;
        }
        if at > 4096 {
            // The part in the next page is its own range.
            plan.ranges[0].1 = 4096;
        }
        if !mode.plain {
            plan.looped = mode.long && !fleeting && plan.loops(start);
            // Where code runs much, what follows a branch is worth a copy for each way to it: a check before it holds on.
            plan.joins = kept.heat < WARM && plan.rounds().0 == 1;
            if plan.joins {
                plan.join();
            }
        }
        plan.liveness(&mut decoder, known, mode, ended, fleeting);
        if !mode.plain {
            if mode.segments.is_none() {
                plan.stack(if mode.long { 8 } else { 4 });
            }
            if plan.looped {
                plan.swaps = swap::apply(&mut plan.items, info);
            }
            let sites = (plan.looped || kept.heat >= HOT).then_some(kept.sites);
            groups::find(&mut plan.items, mode, sites, info);
        }
        plan
    }

    /// Plans one instruction that reaches into the next page; `None` if it is left to the interpreter.
    pub(crate) fn one(bytes: &[u8], start: u16, aim: Aim, info: &mut InstructionInfoFactory) -> Option<Self> {
        let kept = Kept { sites: &mut 0, moving: &|_| false, heat: 0 };
        let mut plan = Self::new(bytes, start, start, aim, info, kept);
        let first = plan.items.first()?;
        let native = !matches!(first.kind, Kind::Interpret(_));
        (plan.items.len() == 1 && plan.end > 4096 && native).then(|| {
            plan.ranges.retain(|r| r.0 < 4096);
            plan
        })
    }

    /// The item that the branch at item `n` goes to within the block.
    pub(crate) fn inner_target(&self, n: usize) -> Option<usize> {
        match self.items[n].kind {
            Kind::Jcc(t) | Kind::Jcxz(t) if self.joins => self.joined_at(n, t),
            _ => None,
        }
    }

    /// How often a loop's body is to be laid out, so that requests are looked for once in so many rounds, and the item that jumps back.
    pub(crate) fn rounds(&self) -> (usize, usize) {
        let Some(start) = self.looped.then(|| self.items[0].offset) else { return (1, 0) };
        let back = |item: &Item| match item.kind {
            Kind::Jmp(t) | Kind::Jcc(t) | Kind::Loop(t) => t == i64::from(start),
            _ => false,
        };
        let mut backs = self.items.iter().enumerate().filter(|(_, item)| back(item));
        match (backs.next(), backs.next()) {
            (Some((n, Item { kind: Kind::Jcc(_), .. })), None) if n < 5 => (4, n),
            (Some((n, Item { kind: Kind::Jcc(_), .. })), None) if n < 12 => (2, n),
            _ => (1, 0),
        }
    }

    /// Whether flags must be right at the start. What code a verifying block is followed by if it finds other bytes is not known.
    pub(crate) fn flags_matter(&self) -> bool {
        self.verify.is_some() || self.items.first().is_none_or(|item| item.live_in != 0)
    }

    /// The bytes that the translation depends on, of a page's.
    pub(crate) fn fixed(&self, page: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut fixed: Vec<(u16, Vec<u8>)> = Vec::new();
        let mut add = |from: u16, to: u16| {
            if from >= to {
                return;
            }
            let bytes = &page[usize::from(from)..usize::from(to)];
            match fixed.last_mut() {
                Some((start, known)) if usize::from(*start) + known.len() == usize::from(from) => {
                    known.extend_from_slice(bytes);
                }
                _ => fixed.push((from, bytes.to_vec())),
            }
        };
        for item in &self.items {
            let end = item.offset + item.insn.len() as u16;
            match item.immediate {
                Some(Immediate { offset, size }) => {
                    add(item.offset, offset);
                    add(offset + size, end);
                }
                None => add(item.offset, end),
            }
        }
        fixed
    }

    /// Whether the block jumps back to its own start.
    fn loops(&self, start: u16) -> bool {
        self.items.iter().any(|item| match item.kind {
            Kind::Jmp(t) | Kind::Jcc(t) | Kind::Loop(t) => t == i64::from(start),
            _ => false,
        })
    }

    /// Has branches go to instructions of the block itself where those follow.
    fn join(&mut self) {
        let mut target = 0;
        for n in 0..self.items.len() {
            let (Kind::Jcc(t) | Kind::Jcxz(t)) = self.items[n].kind else { continue };
            if let Some(m) = self.joined_at(n, t) {
                self.items[m].joined = true;
                target = target.max(m);
            }
        }
        self.joins = target > 0;
    }

    /// The instruction that a branch forward from item `n` goes to, if it is one of the block's.
    fn joined_at(&self, n: usize, target: i64) -> Option<usize> {
        let target = u16::try_from(target).ok()?;
        let behind = &self.items[n + 1..];
        let m = behind.binary_search_by_key(&target, |item| item.offset).ok()?;
        Some(n + 1 + m)
    }

    fn liveness(&mut self, decoder: &mut Decoder<'_>, known: u16, mode: Mode, ended: bool, fleeting: bool) {
        let (joins, count) = (self.joins, self.items.len());
        let mut ranges = std::mem::take(&mut self.ranges);
        let mut look = |target: i64| {
            if fleeting { ARITH } else { live_at(decoder, target, known, mode, 12, 2, &mut ranges) }
        };
        let mut live = if ended || self.crosses || self.end >= 4096 { ARITH } else { look(self.end.into()) };
        for n in (0..count).rev() {
            let item = &self.items[n];
            let reads = item.live_in;
            match item.kind {
                Kind::Jmp(t) => live = look(t),
                Kind::Jcc(t) | Kind::Jcxz(t) | Kind::Loop(t) => {
                    live |= match self.joined_at(n, t).filter(|_| joins) {
                        Some(m) => self.items[m].live_in,
                        None => look(t),
                    }
                }
                Kind::Call(t) => live = look(t),
                Kind::Interpret(_) | Kind::JmpIndirect | Kind::CallIndirect | Kind::Ret | Kind::Syscall => {
                    live = ARITH;
                }
                Kind::Sysret | Kind::Iret => live = 0,
                Kind::SetAc(_) => live = look(i64::from(item.offset) + item.insn.len() as i64),
                _ => {}
            }
            let item = &mut self.items[n];
            item.live_out = live;
            live = live & !item.kills | reads;
            item.live_in = live;
        }
        self.ranges = ranges;
    }

    /// Groups stack accesses between unknown changes of RSP, and places one check before each group.
    fn stack(&mut self, word: i32) {
        let items = &mut self.items;
        let mut first = 0;
        let mut depth = 0;
        let mut n = 0;
        while n <= items.len() {
            let ends = n == items.len();
            if !ends && items[n].joined {
                // Who comes here may not have met the checks before.
                Self::place_check(&mut items[first..n], word);
                (first, depth) = (n, 0);
            }
            let change = if ends {
                Change::Unknown
            } else {
                items[n].depth = depth;
                stack_change(&items[n].insn, items[n].kind, word)
            };
            match change {
                Change::Same => {}
                Change::By(v) => depth += v,
                Change::Unknown => {
                    let last = if ends { n } else { n + 1 };
                    Self::place_check(&mut items[first..last], word);
                    first = last;
                    depth = 0;
                }
            }
            n += 1;
        }
    }

    fn place_check(items: &mut [Item], word: i32) {
        let mut low = i32::MAX;
        let mut high = i32::MIN;
        let mut writes = false;
        let mut start = None;
        for (n, item) in items.iter_mut().enumerate() {
            let Some((offset, size)) = stack_access(item, word) else { continue };
            let at = item.depth + offset;
            let (new_low, new_high) = (low.min(at), high.max(at + size));
            if new_high - new_low > 1024 {
                continue;
            }
            (low, high) = (new_low, new_high);
            writes |= item.writes;
            start.get_or_insert(n);
            item.covered = true;
            if item.memory == Memory::Checked
                && matches!(item.kind, Kind::Copy | Kind::Divide | Kind::JmpIndirect)
            {
                item.memory = Memory::Stack;
            }
        }
        let Some(first) = start else {
            return;
        };
        // The check is best where no flags are alive.
        let at = (0..=first).rev().find(|&n| items[n].live_in == 0).unwrap_or(first);
        items[at].check = Some(StackCheck { low: low - items[at].depth, span: high - low, writes });
    }
}

fn decode(decoder: &mut Decoder<'_>, at: u16, mode: Mode) -> Option<Instruction> {
    decoder.set_position(at.into()).ok()?;
    decoder.set_ip(i64::from(mode.ip() + i32::from(at)) as u64);
    let insn = decoder.decode();
    (decoder.last_error() != DecoderError::NoMoreBytes).then_some(insn)
}

/// Flags that may be read at `target` before they are set; what was looked at is added to `ranges`.
fn live_at(
    decoder: &mut Decoder<'_>,
    target: i64,
    known: u16,
    mode: Mode,
    budget: u32,
    forks: u32,
    ranges: &mut Vec<(u16, u16)>,
) -> u32 {
    let mut live = 0;
    let mut killed = 0;
    let Some(mut at) = u16::try_from(target).ok().filter(|t| (known..4096).contains(t)) else { return ARITH };
    let mut from = at;
    for _ in 0..budget {
        if at >= 4096 {
            break;
        }
        let Some(insn) = decode(decoder, at, mode) else { break };
        let next = at + insn.len() as u16;
        if next > 4096 {
            break;
        }
        let (reads, kills, _) = flag_effects(&insn);
        live |= reads & !killed;
        let target = near_target(&insn, mode);
        match insn.flow_control() {
            FlowControl::Next if insn.mnemonic() != Mnemonic::Hlt && !insn.is_invalid() => {
                killed |= kills;
                at = next;
            }
            FlowControl::UnconditionalBranch
                if let Some(t) = target.and_then(|t| u16::try_from(t).ok()).filter(|&t| t >= known) =>
            {
                note(ranges, from, next);
                (at, from) = (t, t);
            }
            FlowControl::ConditionalBranch if let Some(t) = target => {
                let other = if forks == 0 {
                    ARITH
                } else {
                    live_at(decoder, t, known, mode, budget / 2, forks - 1, ranges)
                };
                live |= other & !killed;
                at = next;
            }
            _ => {
                note(ranges, from, next);
                return live | ARITH & !killed;
            }
        }
        if killed == ARITH {
            break;
        }
    }
    if at > from {
        note(ranges, from, at);
    }
    live | ARITH & !killed
}

fn note(ranges: &mut Vec<(u16, u16)>, from: u16, to: u16) {
    if let Some(known) = ranges.iter_mut().find(|r| from >= r.0 && from <= r.1) {
        known.1 = known.1.max(to);
    } else {
        ranges.push((from, to));
    }
}
