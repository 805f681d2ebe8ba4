//! Reads guest code and decides, instruction by instruction, how it is translated.

mod sort;

use iced_x86::{
    CpuidFeature, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpKind, Register, RflagsBits,
};
use iem::unit::Features;

use crate::emit::verify::{Immediate, Verify, reads_immediate};
use crate::groups::{self, Group};
use crate::swap::{self, Swap};
pub(crate) use sort::high_number;
use sort::{flag_effects, names_high, near_target, sort};

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
    /// MOVS or STOS, repeated or not; element size as power of two.
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
        // A loop that wants registers which others do not need (see `swap`) ends where it goes back.
        let back = |item: &Item| matches!(item.kind, Kind::Jcc(t) if t == i64::from(start));
        if mode.long
            && !mode.plain
            && !fleeting
            && let Some(n) = items.iter().position(back)
            && items[..n].iter().any(|item| names_high(&item.insn) || item.moves)
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
