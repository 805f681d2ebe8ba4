//! A program of groups, and its encoding.

use std::collections::HashMap;

use cpum::state::XsaveArea;
use cpum::state::{rflags, seg};
use iced_x86::{
    Code, Encoder, FlowControl, Instruction, MemoryOperand, Mnemonic, OpKind, Register, RflagsBits,
};

use super::mode::*;

/// Where a branch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// A mark in the same group.
    Mark(u8),
    /// The start of the group that many groups ahead; past the last it is the end.
    Ahead(usize),
    /// A function.
    Function(usize),
}

/// A piece of a group.
#[derive(Clone, Copy, Debug)]
pub enum Item {
    Insn(Instruction),
    /// A near branch.
    Branch(Code, To),
    /// Moves an offset in the code segment into a register of the code's width, or pushes it (no register).
    Address(Register, To),
    /// An instruction whose memory operand is the byte so far behind the place: it patches code.
    Patch(Instruction, To, u64),
    Mark(u8),
    /// A comparison, if any flag is undefined here.
    Define,
}

#[derive(Clone, Debug, Default)]
pub struct Group {
    pub items: Vec<Item>,
}

/// What a program starts from.
#[derive(Clone)]
pub struct Start {
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub xsave: XsaveArea,
    /// Half of the data; the other half repeats it.
    pub data: Vec<u8>,
    /// How often the program runs.
    pub rounds: u32,
    /// Offset of the program in its two pages.
    pub offset: u64,
    /// Fills the pages around the program.
    pub filler: u8,
}

#[derive(Clone)]
pub struct Case {
    pub mode: Mode,
    pub start: Start,
    pub groups: Vec<Group>,
    pub functions: Vec<Group>,
    /// The time-stamp counter is not the board's: programs throw away what they read of it.
    pub own_time: bool,
}

/// An instruction's place.
#[derive(Clone, Copy)]
pub struct Placed {
    /// Offset in CS.
    pub ip: u64,
    pub len: u64,
    pub insn: Instruction,
    /// Flags (RFLAGS bits) undefined before it.
    pub undefined: u64,
}

pub struct Assembled {
    /// The two pages.
    pub image: Vec<u8>,
    /// Offset in CS of the first instruction.
    pub entry: u64,
    pub placed: Vec<Placed>,
    /// The program leaves AF undefined somewhere.
    pub loose_af: bool,
}

/// Room that the program has in its two pages.
pub const ROOM: usize = 0xc00;
/// Data in the program's pages: at the end of the second, and at the start of the first.
pub const SCRATCH: u64 = 0x1c00;

/// `mov` with the same address as the RIP-relative or absolute reference `reference` makes.
pub fn resume_operand(mode: Mode) -> MemoryOperand {
    absolute(mode, seg::SS, mode.linear() + RESUME)
}

/// An operand for a fixed linear address through a segment register.
pub fn absolute(mode: Mode, segment: usize, linear: u64) -> MemoryOperand {
    let prefix =
        [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS][segment];
    match mode.bits() {
        64 => MemoryOperand::new(Register::RIP, Register::None, 1, linear as i64, 8, false, Register::None),
        bits => {
            let offset = linear.wrapping_sub(mode.segment(segment).base);
            // In 16-bit code too, offsets may need 32 bits: never where the segment's limit is 64 KiB.
            let size = if bits == 16 && offset <= 0xffff { 2 } else { 4 };
            MemoryOperand::new(Register::None, Register::None, 1, offset as i64, size, false, prefix)
        }
    }
}

/// iced's flag set as RFLAGS bits.
pub fn rflags_of(bits: u32) -> u64 {
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

/// The flags an instruction leaves undefined.
fn leaves_undefined(insn: &Instruction) -> u64 {
    let mut bits = rflags_of(insn.rflags_undefined());
    let once = insn.op1_kind() == OpKind::Immediate8 && insn.immediate8() & 31 == 1;
    if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && !once {
        // iced takes counts that are multiples of the size plus one for no rotation at all.
        bits |= rflags::OF;
    }
    bits
}

fn reads_flags(insn: &Instruction) -> u64 {
    match insn.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq | Mnemonic::Lahf => rflags::ARITH,
        _ => rflags_of(insn.rflags_read()),
    }
}

struct Assembler<'a> {
    case: &'a Case,
    encoder: Encoder,
    /// Offsets in CS of groups, functions and marks, from the round before.
    groups: Vec<u64>,
    functions: Vec<u64>,
    marks: HashMap<(usize, u8), u64>,
    base: u64,
    bytes: Vec<u8>,
    placed: Vec<Placed>,
    undefined: u64,
    loose_af: bool,
    /// Undefined flags on the way to each mark of the group at work.
    joins: HashMap<u8, u64>,
}

impl Assembler<'_> {
    fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    fn emit(&mut self, insn: &Instruction) {
        let ip = self.here();
        // RIP-relative operands and branches are relative to linear addresses; CS is flat where they matter.
        let len = self.encoder.encode(insn, ip).expect("encodable");
        self.bytes.extend(self.encoder.take_buffer());
        self.placed.push(Placed { ip, len: len as u64, insn: *insn, undefined: self.undefined });
    }

    fn target(&self, owner: usize, group: usize, to: To) -> u64 {
        match to {
            To::Mark(m) => self.marks.get(&(owner, m)).copied().unwrap_or(self.here()),
            To::Ahead(n) => {
                let n = (group + n).min(self.groups.len().saturating_sub(1));
                self.groups.get(n).copied().unwrap_or(self.here())
            }
            To::Function(n) => {
                let n = n % self.functions.len().max(1);
                self.functions.get(n).copied().unwrap_or(self.here())
            }
        }
    }

    /// A comparison that defines every flag.
    fn define(&mut self) {
        if self.undefined != 0 {
            let code = match self.case.mode.bits() {
                16 => Code::Cmp_rm16_imm8,
                32 => Code::Cmp_rm32_imm8,
                _ => Code::Cmp_rm64_imm8,
            };
            let register = match self.case.mode.bits() {
                16 => Register::CX,
                32 => Register::ECX,
                _ => Register::RCX,
            };
            let insn = Instruction::with2(code, register, 5).expect("a comparison");
            self.emit(&insn);
            self.undefined = 0;
        }
    }

    fn account(&mut self, insn: &Instruction) {
        if always_writes_flags(insn) {
            self.undefined &= !rflags_of(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
        }
        let bits = leaves_undefined(insn);
        // Logic and shifts leave AF undefined all the time: it is not compared then, so that the others stay live across groups.
        self.loose_af |= bits & rflags::AF != 0;
        self.undefined |= bits & !rflags::AF;
    }

    fn body(&mut self, owner: usize, group: usize, items: &[Item]) {
        self.joins.clear();
        let bits = self.case.mode.bits();
        for item in items {
            match item {
                Item::Insn(insn) => {
                    let read = reads_flags(insn);
                    if read & self.undefined != 0 || insn.flow_control() != FlowControl::Next {
                        self.define();
                    }
                    if read & rflags::AF != 0 && self.loose_af_possible() {
                        self.undefined |= rflags::AF;
                        self.define();
                    }
                    self.emit(insn);
                    self.account(insn);
                    if self.case.own_time && matches!(insn.mnemonic(), Mnemonic::Rdtsc | Mnemonic::Rdtscp) {
                        for register in [Register::EAX, Register::EDX] {
                            self.emit(&Instruction::with2(Code::Mov_r32_imm32, register, 0).expect("a move"));
                        }
                    }
                }
                Item::Branch(code, to) => {
                    let target = self.target(owner, group, *to);
                    // A comparison only where a flag that decides is undefined: the branch must go the same way on both sides.
                    let probe = Instruction::with_branch(*code, target).expect("a branch");
                    // All flags are defined at the start of groups and functions.
                    let leaves = !matches!(to, To::Mark(_));
                    if reads_flags(&probe) & self.undefined != 0 || leaves {
                        self.define();
                    }
                    let target = self.target(owner, group, *to);
                    let insn = Instruction::with_branch(*code, target).expect("a branch");
                    // Short branches cannot always reach what they aim at in the first round.
                    let ip = self.here();
                    let insn = if self.encoder.encode(&insn, ip).is_ok() {
                        insn
                    } else {
                        Instruction::with_branch(*code, ip + 2).expect("a branch")
                    };
                    let _ = self.encoder.take_buffer();
                    self.emit(&insn);
                    if let To::Mark(m) = to {
                        *self.joins.entry(*m).or_default() |= self.undefined;
                    }
                }
                Item::Address(register, to) => {
                    let target = self.target(owner, group, *to);
                    let insn = match (bits, *register) {
                        (16, Register::None) => Instruction::with1(Code::Push_imm16, target as u32),
                        (32, Register::None) => Instruction::with1(Code::Pushd_imm32, target as u32),
                        (_, Register::None) => Instruction::with1(Code::Pushq_imm32, target as i32),
                        (16, r) => Instruction::with2(Code::Mov_r16_imm16, r, target as u32),
                        (32, r) => Instruction::with2(Code::Mov_r32_imm32, r, target as u32),
                        (_, r) => Instruction::with2(Code::Mov_r64_imm64, r, target),
                    }
                    .expect("an address");
                    self.emit(&insn);
                }
                Item::Patch(insn, to, offset) => {
                    let mode = self.case.mode;
                    let target = self.target(owner, group, *to) + offset;
                    let linear = mode.segment(seg::CS).base.wrapping_add(target);
                    let operand = absolute(mode, seg::FS, linear);
                    let mut insn = *insn;
                    insn.set_memory_base(operand.base);
                    insn.set_memory_displ_size(operand.displ_size);
                    insn.set_memory_displacement64(operand.displacement as u64);
                    insn.set_segment_prefix(operand.segment_prefix);
                    self.emit(&insn);
                    // An engine may have dropped flags that the code as it stood would not have read.
                    self.undefined = rflags::ARITH;
                    self.define();
                }
                Item::Define => self.define(),
                Item::Mark(m) => {
                    self.undefined |= self.joins.get(m).copied().unwrap_or(0);
                    let here = self.here();
                    self.marks.insert((owner, *m), here);
                }
            }
        }
        self.define();
    }

    fn loose_af_possible(&self) -> bool {
        // Rounds repeat: what comes later in the program has run before, too.
        true
    }

    fn round(&mut self) {
        let case = self.case;
        let mode = case.mode;
        self.bytes.clear();
        self.placed.clear();
        self.undefined = 0;
        let mut groups = Vec::new();
        let mut functions = Vec::new();
        // Faults may have left the stack pointer anywhere.
        let top = mode.linear() + STACK_TOP - mode.segment(seg::SS).base;
        let reset = match mode.bits() {
            64 => Instruction::with2(Code::Mov_r64_imm64, Register::RSP, top),
            _ => Instruction::with2(Code::Mov_r32_imm32, Register::ESP, top as u32),
        };
        self.emit(&reset.expect("a move"));
        for (n, group) in case.groups.iter().enumerate() {
            groups.push(self.here());
            let next = self.target(n, n, To::Ahead(1));
            self.note_resume(next);
            self.body(n, n, &group.items);
        }
        groups.push(self.here());
        // The rounds, then the end. A comparison with memory counts, as no register is sure to be free.
        let counter = absolute(mode, seg::SS, mode.linear() + ROUNDS);
        self.emit(&Instruction::with1(Code::Dec_rm32, counter).expect("a counter"));
        let first = self.base;
        let again = match mode.bits() {
            16 => Code::Jne_rel16,
            32 => Code::Jne_rel32_32,
            _ => Code::Jne_rel32_64,
        };
        self.emit(&Instruction::with_branch(again, first).expect("a branch"));
        self.emit(&Instruction::with1(Code::Int_imm8, u32::from(END)).expect("an interrupt"));
        let owners = case.groups.len() + 1;
        for (n, function) in case.functions.iter().enumerate() {
            functions.push(self.here());
            self.undefined = 0;
            self.body(owners + n, 0, &function.items);
            let ret = match mode.bits() {
                16 => Code::Retnw,
                32 => Code::Retnd,
                _ => Code::Retnq,
            };
            self.emit(&Instruction::with(ret));
        }
        self.groups = groups;
        self.functions = functions;
    }

    fn note_resume(&mut self, next: u64) {
        let mode = self.case.mode;
        let operand = resume_operand(mode);
        let insn = Instruction::with2(Code::Mov_rm32_imm32, operand, next as u32).expect("a store");
        self.emit(&insn);
    }
}

impl Case {
    /// A program of one group that runs `rounds` times, from registers at zero.
    pub fn of(mode: Mode, items: Vec<Item>, rounds: u32) -> Self {
        let start = Start {
            gpr: [0; 16],
            rflags: rflags::FIXED | rflags::IF,
            xsave: XsaveArea::reset(),
            data: vec![0; DATA_LEN as usize / 2],
            rounds,
            offset: 0x800,
            filler: 0x90,
        };
        Self { mode, start, groups: vec![Group { items }], functions: Vec::new(), own_time: false }
    }

    /// Encodes the program. `None` if it does not fit into its room.
    pub fn assemble(&self) -> Option<Assembled> {
        let mode = self.mode;
        let base = mode.linear() + PROGRAM + self.start.offset - mode.segment(seg::CS).base;
        let mut assembler = Assembler {
            case: self,
            encoder: Encoder::new(mode.bits()),
            groups: Vec::new(),
            functions: Vec::new(),
            marks: HashMap::new(),
            base,
            bytes: Vec::new(),
            placed: Vec::new(),
            undefined: 0,
            loose_af: false,
            joins: HashMap::new(),
        };
        // Places settle at once, because all encodings have fixed lengths; the second round uses those of the first.
        assembler.round();
        let len = assembler.bytes.len();
        assembler.round();
        if assembler.bytes.len() != len {
            assembler.round();
        }
        if assembler.bytes.len() > ROOM {
            return None;
        }
        let mut image = vec![self.start.filler; PROGRAM_LEN as usize];
        let at = self.start.offset as usize;
        image[at..at + assembler.bytes.len()].copy_from_slice(&assembler.bytes);
        Some(Assembled { image, entry: base, placed: assembler.placed, loose_af: assembler.loose_af })
    }
}

impl Assembled {
    /// The instruction at an offset in CS.
    pub fn at(&self, ip: u64) -> Option<&Instruction> {
        self.placed.iter().find(|p| p.ip == ip).map(|p| &p.insn)
    }

    /// Flags that are undefined before the instruction at `ip`.
    pub fn undefined_at(&self, ip: u64) -> u64 {
        let at = self.placed.iter().rev().find(|p| p.ip <= ip);
        let loose = if self.loose_af { rflags::AF } else { 0 };
        at.map_or(0, |p| p.undefined) | loose
    }
}
