//! Turns a plan into host code.

mod system;

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use iem::tlb::{ENTRIES, Entry};

use crate::asm::{Alu, Asm, M, cc, r};
use crate::context::{JUMPS, JUMPS_AT, Jump, TLB_AT, TLB_MASK, TLB_SHIFT, cpu, off};
use crate::plan::{Item, Kind, Memory, Mode, Plan, high_number};
use crate::slow;
use crate::thunks::{Thunks, reason};

/// A direct way out of a block that can be aimed at other code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewLink {
    /// Offset in the buffer of the jump's displacement.
    pub(crate) site: u32,
    /// Offset of the stub that the jump goes to while it is not aimed.
    pub(crate) stub: u32,
    /// Page offset of the target.
    pub(crate) target: u16,
    /// The mode that it is to be translated for.
    pub(crate) mode: Mode,
    /// Of a failed check of the stack page: the displacement of the check's jump, and where that can go to leave the check's
    /// slow part out.
    pub(crate) check: Option<(u32, u32)>,
}

/// A translated block, to be placed in the buffer.
pub(crate) struct Output {
    pub(crate) hot: Vec<u8>,
    pub(crate) cold: Vec<u8>,
    /// Offset within `hot` of the entry for those who know the page.
    pub(crate) entry: usize,
    pub(crate) links: Vec<NewLink>,
    /// Instructions translated.
    pub(crate) count: usize,
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flags {
    /// In RFLAGS, if they matter at all.
    Here,
    /// In the context.
    Saved,
    Both,
}

/// Code that stands apart, and the jumps in the block that lead there.
enum Cold {
    Slow {
        sites: Vec<usize>,
        retry: usize,
        access: usize,
        description: u32,
        saved: bool,
        tag: i32,
    },
    Stack {
        site: usize,
        retry: usize,
        description: u32,
        saved: bool,
        low: i32,
        at: u16,
    },
    Link {
        site: usize,
        target: u16,
        mode: Mode,
    },
    Interpret {
        sites: Vec<usize>,
        offset: u16,
        saved: bool,
    },
    Far {
        site: usize,
        target: i64,
    },
    /// `exchanged`: guest RCX is in r14.
    Poll {
        site: usize,
        target: i64,
        exchanged: bool,
    },
    Unknown {
        unknown: usize,
        wanted: usize,
        saved: bool,
    },
}

pub(crate) struct Host {
    pub(crate) bmi2: bool,
}

pub(crate) struct Emitter<'a> {
    hot: Asm,
    cold: Asm,
    hot_at: usize,
    cold_at: usize,
    base: u64,
    thunks: &'a Thunks,
    host: &'a Host,
    mode: Mode,
    flags: Flags,
    colds: Vec<Cold>,
    links: Vec<NewLink>,
    first_link: u32,
    encoder: &'a mut Encoder,
    info: &'a mut InstructionInfoFactory,
}

const HIGH: [i32; 4] = [off::HIGH, off::HIGH + 8, off::HIGH + 16, off::HIGH + 24];
const READ_TAG: i32 = std::mem::offset_of!(Entry, read) as i32;
const WRITE_TAG: i32 = std::mem::offset_of!(Entry, write) as i32;
const HOST: i32 = std::mem::offset_of!(Entry, host) as i32;

/// The register of a size with a number.
fn sized(number: u8, size: usize) -> Register {
    let base = match size {
        1 => return BYTE[number as usize],
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + u32::from(number)
}

const BYTE: [Register; 16] = [
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
];

/// Where blocks are placed and what numbers their links get.
pub(crate) struct Place {
    pub(crate) base: u64,
    pub(crate) hot: usize,
    pub(crate) cold: usize,
    pub(crate) first_link: u32,
}

impl<'a> Emitter<'a> {
    pub(crate) fn new(
        place: &Place,
        thunks: &'a Thunks,
        host: &'a Host,
        mode: Mode,
        encoder: &'a mut Encoder,
        info: &'a mut InstructionInfoFactory,
    ) -> Self {
        Self {
            hot: Asm::default(),
            cold: Asm::default(),
            hot_at: place.hot,
            cold_at: place.cold,
            base: place.base,
            thunks,
            host,
            mode,
            flags: Flags::Here,
            colds: Vec::new(),
            links: Vec::new(),
            first_link: place.first_link,
            encoder,
            info,
        }
    }

    fn jumps(&self) -> i32 {
        Self::jumps_of(self.mode.bank)
    }

    fn jumps_of(bank: u8) -> i32 {
        (JUMPS_AT + usize::from(bank) * JUMPS * size_of::<Jump>()) as i32
    }

    fn tlb(&self) -> i32 {
        TLB_AT + (usize::from(self.mode.bank) * ENTRIES * size_of::<Entry>()) as i32
    }

    /// Translates; `checked` puts an entry for jumps through the jump cache in front.
    pub(crate) fn block(mut self, plan: &Plan, start: u16, checked: bool) -> Output {
        let live = plan.items.first().map_or(crate::plan::ARITH, |i| i.live_in);
        if checked {
            self.checked_entry(start, live != 0);
        }
        let entry = self.hot.at();
        let mut ended = false;
        let mut count = 0;
        for item in &plan.items {
            count += 1;
            if let Some(check) = item.check {
                self.stack_check(item, check);
            }
            ended = self.item(item);
            if ended {
                break;
            }
        }
        if !ended {
            if plan.crosses {
                // Only the jump cache knows code that depends on two pages.
                self.here(crate::plan::ARITH);
                Self::linear(&mut self.hot, self.mode.long, plan.end.into());
                self.jump_away();
            } else {
                self.here(plan.items.last().map_or(crate::plan::ARITH, |i| i.live_out));
                self.go(plan.end.into(), false);
            }
        }
        self.finish();
        Output { hot: self.hot.code, cold: self.cold.code, entry, links: self.links, count }
    }

    /// An entry alone, for a block at `entry` in the buffer.
    pub(crate) fn entry_for(mut self, start: u16, live: bool, entry: usize) -> Output {
        self.checked_entry(start, live);
        let site = self.hot.jmp();
        let here = self.hot_at + site + 4;
        self.hot.code[site..].copy_from_slice(&((entry as i64 - here as i64) as i32).to_le_bytes());
        self.finish();
        Output { hot: self.hot.code, cold: self.cold.code, entry: 0, links: self.links, count: 0 }
    }

    // ---- flags ----

    /// Before RFLAGS is overwritten: `live` flags must survive.
    fn clobber(&mut self, live: u32) {
        if live == 0 {
            self.flags = Flags::Here;
            return;
        }
        if self.flags == Flags::Here {
            self.hot.save_flags(r::S14, off::FLAGS);
        }
        self.flags = Flags::Saved;
    }

    /// Has `live` flags in RFLAGS.
    fn here(&mut self, live: u32) {
        if self.flags == Flags::Saved {
            if live == 0 {
                self.flags = Flags::Here;
            } else {
                self.hot.restore_flags(r::S14, off::FLAGS);
                self.flags = Flags::Both;
            }
        }
    }

    /// Before a copied instruction.
    fn before(&mut self, item: &Item) {
        if item.modifies != 0 || item.insn.rflags_read() & crate::plan::ARITH != 0 {
            self.here(item.live_in);
        }
    }

    fn after(&mut self, item: &Item) {
        if item.modifies != 0 {
            self.flags = Flags::Here;
        }
    }

    // ---- ways out ----

    fn thunk_jump(asm: &mut Asm, at: usize, base: u64, thunk: u64, call: bool) {
        let site = if call { asm.call() } else { asm.jmp() };
        let from = base + (at + site + 4) as u64;
        asm.code[site..site + 4].copy_from_slice(&(thunk.wrapping_sub(from) as i32).to_le_bytes());
    }

    fn hot_thunk(&mut self, thunk: u64) {
        Self::thunk_jump(&mut self.hot, self.hot_at, self.base, thunk, false);
    }

    fn cold_thunk(&mut self, thunk: u64, call: bool) {
        Self::thunk_jump(&mut self.cold, self.cold_at, self.base, thunk, call);
    }

    /// Leaves for the run loop. Flags must be in RFLAGS.
    fn exit(&mut self, offset: u16, why: u64) {
        self.hot.mov_imm32(r::S14, offset.into());
        self.hot.mov_imm32(r::DELTA, why as u32);
        self.hot_thunk(self.thunks.exit);
    }

    /// Goes to the code at r15.
    fn jump_indirect(asm: &mut Asm, jumps: i32) {
        asm.rr(false, &[0x0f, 0xb7], r::S14, r::S15); // movzx r14d, r15w
        asm.lea32(r::S14, M::Index(r::S14, r::S14, 0, 0));
        asm.rm(false, None, &[0xff], 4, M::CtxAt8(r::S14, jumps + 8)); // jmp
    }

    /// Has the jump at `site` aimed at code of this mode; plain stack accesses go on being plain in loops only.
    fn link(&mut self, site: usize, target: u16, back: bool) {
        let mode = Mode { plain_stack: back && self.mode.plain_stack, ..self.mode };
        self.colds.push(Cold::Link { site, target, mode });
    }

    fn jump_away(&mut self) {
        let jumps = self.jumps();
        Self::jump_indirect(&mut self.hot, jumps);
    }

    fn linear(asm: &mut Asm, long: bool, target: i64) {
        asm.load(r::S15, M::Ctx(off::PAGE));
        if long {
            asm.lea(r::S15, M::At(r::S15, target as i32));
        } else {
            asm.lea32(r::S15, M::At(r::S15, target as i32));
        }
    }

    fn near(target: i64) -> Option<u16> {
        u16::try_from(target).ok().filter(|&t| t < 4096)
    }

    /// Goes on at a known place; flags are where they should be. A loop looks for requests first (`poll`).
    fn go(&mut self, target: i64, poll: bool) {
        match Self::near(target) {
            Some(offset) => {
                if poll {
                    self.poll(target);
                }
                let site = self.hot.jmp();
                self.link(site, offset, poll);
            }
            None => {
                Self::linear(&mut self.hot, self.mode.long, target);
                self.jump_away();
            }
        }
    }

    /// Leaves if somebody wants something of this vCPU. Overwrites RFLAGS.
    fn poll(&mut self, target: i64) {
        self.hot.load(r::S14, M::Ctx(off::KICK));
        self.hot.rm(false, None, &[0x83], Alu::Cmp as u8, M::At(r::S14, 0));
        self.hot.byte(0);
        let site = self.hot.jcc(cc::NE);
        self.colds.push(Cold::Poll { site, target, exchanged: false });
    }

    /// Goes back to a known place, looking for requests, with `live` flags in RFLAGS.
    fn go_back(&mut self, target: i64, live: u32) {
        if Self::near(target).is_none() || live == 0 {
            self.go(target, true);
            return;
        }
        self.hot.load(r::S14, M::Ctx(off::KICK));
        self.hot.load32(r::S14, M::At(r::S14, 0));
        self.hot.rr(true, &[0x87], r::S14, r::RCX); // xchg
        self.hot.bytes(&[0xe3, 5]); // jrcxz over the jump
        let site = self.hot.jmp();
        self.colds.push(Cold::Poll { site, target, exchanged: true });
        self.hot.mov(r::RCX, r::S14);
        self.go(target, false);
    }

    /// The entry for jumps through the jump cache. Until the address has been found right, flags are not touched: the jump may
    /// have been meant for code elsewhere to which they matter.
    fn checked_entry(&mut self, start: u16, live: bool) {
        self.hot.load(r::S14, M::CtxAt8(r::S14, self.jumps()));
        self.hot.lea(r::S14, M::Index(r::S14, r::S15, 0, 0));
        self.hot.rr(true, &[0x87], r::S14, r::RCX); // xchg
        self.hot.bytes(&[0xe3, 5]); // jrcxz over the jump
        let unknown = self.hot.jmp();
        self.hot.mov(r::RCX, r::S14);
        if live {
            self.hot.save_flags_apart(off::TMP, off::FLAGS);
        }
        self.hot.load(r::S14, M::Ctx(off::KICK));
        self.hot.rm(false, None, &[0x83], Alu::Cmp as u8, M::At(r::S14, 0));
        self.hot.byte(0);
        let wanted = self.hot.jcc(cc::NE);
        if live {
            self.hot.restore_flags_apart(off::TMP, off::FLAGS);
        }
        self.hot.lea(r::S15, M::At(r::S15, -i32::from(start)));
        self.hot.store(M::Ctx(off::PAGE), r::S15);
        self.colds.push(Cold::Unknown { unknown, wanted, saved: live });
    }

    // ---- memory ----

    /// Brings a guest register's value to a host register; the one that holds it already, or `tmp`.
    fn value(&mut self, register: Register, tmp: u8) -> u8 {
        match high_number(register) {
            Some(n) => {
                self.hot.load(tmp, M::Ctx(HIGH[n as usize]));
                tmp
            }
            None => home(register),
        }
    }

    /// Computes the memory operand's linear address into r15. Uses r14, and RFLAGS if there is a segment base.
    fn address(&mut self, insn: &Instruction) {
        let base = insn.memory_base();
        let index = insn.memory_index();
        let disp = insn.memory_displacement64() as i64;
        let wide = self.mode.long && !base.is_gpr32() && !index.is_gpr32() && insn.memory_displ_size() != 4
            || self.mode.long
                && base == Register::None
                && index == Register::None
                && insn.memory_displ_size() != 4;
        if base == Register::RIP {
            Self::linear(&mut self.hot, true, disp);
        } else if base == Register::None && index == Register::None {
            self.constant(r::S15, if wide { disp as u64 } else { disp as u64 & 0xffff_ffff });
        } else {
            let m = match (base, index) {
                (_, Register::None) => {
                    let b = self.value(base, r::S15);
                    M::At(b, disp as i32)
                }
                (Register::None, _) => {
                    let i = self.value(index, r::S14);
                    M::Scaled(i, insn.memory_index_scale().trailing_zeros() as u8, disp as i32)
                }
                _ => {
                    let b = self.value(base, r::S15);
                    let i = self.value(index, r::S14);
                    M::Index(b, i, insn.memory_index_scale().trailing_zeros() as u8, disp as i32)
                }
            };
            if wide {
                self.hot.lea(r::S15, m);
            } else {
                self.hot.lea32(r::S15, m);
            }
        }
        let segment = match insn.memory_segment() {
            Register::FS => off::FS_BASE,
            Register::GS => off::GS_BASE,
            _ => return,
        };
        self.hot.alu(Alu::Add, r::S15, M::Ctx(segment));
        if !self.mode.long {
            self.hot.mov32(r::S15, r::S15);
        }
    }

    fn constant(&mut self, to: u8, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            self.hot.mov_imm32(to, v);
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.hot.rr(true, &[0xc7], 0, to);
            self.hot.i32(v);
        } else {
            self.hot.bytes(&[0x48 | to >> 3, 0xb8 | to & 7]);
            self.hot.bytes(&value.to_le_bytes());
        }
    }

    /// Turns the linear address in r15 into a host address, for an access that `item` describes. `retry` is where its
    /// computation starts. Flags must have been taken care of.
    fn translate(&mut self, item: &Item, retry: usize, size: u16, writes: bool, align: u16) {
        let tag = self.tlb() + if writes { WRITE_TAG } else { READ_TAG };
        if self.host.bmi2 {
            self.hot.rorx32(r::S14, r::S15, TLB_SHIFT);
        } else {
            self.hot.mov32(r::S14, r::S15);
            self.hot.shift_imm(5, false, r::S14, TLB_SHIFT);
        }
        self.hot.alu_imm(Alu::And, false, r::S14, TLB_MASK);
        self.hot.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, tag));
        let mut sites = Vec::with_capacity(2);
        if align > 1 {
            self.hot.bytes(&[0x41, 0xf6, 0xc7, (align - 1) as u8]); // test r15b, align - 1
            sites.push(self.hot.jcc(cc::NE));
        }
        self.hot.alu_imm(Alu::Cmp, true, r::S15, 0x1000 - i32::from(size));
        sites.push(self.hot.jcc(cc::A));
        self.hot.alu(Alu::Add, r::S15, M::CtxAt(r::S14, self.tlb() + HOST));
        let access = self.hot.at();
        self.colds.push(Cold::Slow {
            sites,
            retry,
            access,
            description: slow::describe(item.offset, size, align, writes, item.fp),
            saved: self.flags == Flags::Saved,
            tag,
        });
    }

    /// Checks an access of the instruction's own and leaves its host address in r15.
    fn checked(&mut self, item: &Item) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn);
        self.translate(item, retry, item.size, item.writes, item.align);
    }

    /// Checks a stack access at RSP plus `offset`, and leaves its host address in r15.
    fn checked_stack(&mut self, item: &Item, offset: i32, writes: bool) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        if self.mode.long {
            self.hot.lea(r::S15, M::At(r::GUEST_SP, offset));
        } else {
            self.hot.lea32(r::S15, M::At(r::GUEST_SP, offset));
        }
        self.translate(item, retry, self.word() as u16, writes, 1);
    }

    fn word(&self) -> i32 {
        if self.mode.long { 8 } else { 4 }
    }

    /// Makes sure that the kept stack page covers the accesses that follow.
    fn stack_check(&mut self, item: &Item, check: crate::plan::StackCheck) {
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.hot.lea(r::S15, M::At(r::GUEST_SP, check.low));
        self.hot.alu(Alu::Xor, r::S15, M::Ctx(off::STACK_PAGE));
        self.hot.alu_imm(Alu::Cmp, true, r::S15, 0x1000 - check.span);
        let site = self.hot.jcc(cc::A);
        self.colds.push(Cold::Stack {
            site,
            retry,
            description: slow::describe_stack(item.offset, check.span as u16, check.writes),
            saved: self.flags == Flags::Saved,
            low: check.low,
            at: item.offset,
        });
    }

    /// The host operand of a stack access: covered by a check, or r15 after one of its own.
    fn stack_operand(&mut self, item: &Item, offset: i32, writes: bool) -> M {
        if item.covered {
            M::Index(r::GUEST_SP, r::DELTA, 0, offset)
        } else {
            self.checked_stack(item, offset, writes);
            M::At(r::S15, 0)
        }
    }

    fn move_sp(&mut self, by: i32) {
        let m = M::At(r::GUEST_SP, by);
        if self.mode.long {
            self.hot.lea(r::GUEST_SP, m);
        } else {
            self.hot.lea32(r::GUEST_SP, m);
        }
    }

    fn load_word(&mut self, to: u8, m: M) {
        if self.mode.long {
            self.hot.load(to, m);
        } else {
            self.hot.load32(to, m);
        }
    }

    fn store_word(&mut self, m: M, from: u8) {
        if self.mode.long {
            self.hot.store(m, from);
        } else {
            self.hot.store32(m, from);
        }
    }

    // ---- instructions ----

    /// Translates one instruction; true if it ends the block.
    fn item(&mut self, item: &Item) -> bool {
        let insn = &item.insn;
        let next = i64::from(item.offset) + insn.len() as i64;
        match item.kind {
            Kind::Nop => {}
            Kind::Copy | Kind::Divide | Kind::BitString => {
                if !self.copy(item) {
                    self.here(crate::plan::ARITH);
                    self.exit(item.offset, if item.fp { reason::INTERPRET_FP } else { reason::INTERPRET });
                    return true;
                }
            }
            Kind::Lea => self.lea(insn),
            Kind::Push => self.push(item),
            Kind::Pop => {
                let m = self.stack_operand(item, 0, false);
                let register = insn.op0_register();
                if register.full_register() == Register::RSP {
                    self.load_word(r::GUEST_SP, m);
                } else if let Some(n) = high_number(register) {
                    self.load_word(r::S14, m);
                    self.hot.store(M::Ctx(HIGH[n as usize]), r::S14);
                    self.move_sp(self.word());
                } else {
                    self.load_word(home(register), m);
                    self.move_sp(self.word());
                }
            }
            Kind::Leave => {
                self.clobber(item.live_in);
                let retry = self.hot.at();
                self.hot.mov(r::S15, r::RBP);
                if !self.mode.long {
                    self.hot.mov32(r::S15, r::S15);
                }
                self.translate(item, retry, item.size, false, 1);
                let m = M::At(r::RBP, self.word());
                if self.mode.long {
                    self.hot.lea(r::GUEST_SP, m);
                } else {
                    self.hot.lea32(r::GUEST_SP, m);
                }
                self.load_word(r::RBP, M::At(r::S15, 0));
            }
            Kind::Jmp(t) => {
                self.here(item.live_out);
                if t <= i64::from(item.offset) {
                    self.go_back(t, item.live_out)
                } else {
                    self.go(t, false)
                }
                return true;
            }
            Kind::Jcc(t) => {
                self.here(item.live_in);
                let cond = insn.condition_code() as u8 - 1;
                if t <= i64::from(item.offset) && Self::near(t).is_some() {
                    let skip = self.hot.jcc_short(cond ^ 1);
                    self.go_back(t, item.live_out);
                    self.hot.aim_short(skip);
                } else {
                    let site = self.hot.jcc(cond);
                    self.branch(site, t);
                }
            }
            Kind::Jcxz(t) => {
                self.here(item.live_out);
                if insn.mnemonic() == Mnemonic::Jecxz {
                    self.hot.byte(0x67);
                }
                self.hot.bytes(&[0xe3, 2, 0xeb, 5]);
                let site = self.hot.jmp();
                self.branch(site, t);
            }
            Kind::Loop(t) => {
                self.here(item.live_out);
                if insn.code() == Code::Loop_rel8_64_RCX {
                    self.hot.lea(r::RCX, M::At(r::RCX, -1));
                } else {
                    self.hot.lea32(r::RCX, M::At(r::RCX, -1));
                    self.hot.byte(0x67);
                }
                self.hot.bytes(&[0xe3, 0]);
                let skip = self.hot.at() - 1;
                self.go_back(t, item.live_out);
                self.hot.aim_short(skip);
            }
            Kind::Call(t) => {
                let m = self.stack_operand(item, -self.word(), true);
                self.return_address(next);
                self.store_word(m, r::S14);
                self.move_sp(-self.word());
                self.here(item.live_out);
                self.go(t, false);
                return true;
            }
            Kind::Ret => {
                let m = self.stack_operand(item, 0, false);
                self.load_word(r::S15, m);
                let drop = if insn.op_count() == 1 { insn.immediate16().into() } else { 0 };
                self.move_sp(self.word() + drop);
                self.here(item.live_out);
                self.jump_away();
                return true;
            }
            Kind::JmpIndirect => {
                self.target(item);
                self.here(item.live_out);
                self.jump_away();
                return true;
            }
            Kind::CallIndirect => {
                self.target(item);
                if item.covered {
                    self.return_address(next);
                    self.store_word(M::Index(r::GUEST_SP, r::DELTA, 0, -self.word()), r::S14);
                } else {
                    self.hot.store(M::Ctx(off::TMP + 16), r::S15);
                    self.checked_stack(item, -self.word(), true);
                    self.return_address(next);
                    self.store_word(M::At(r::S15, 0), r::S14);
                    self.hot.load(r::S15, M::Ctx(off::TMP + 16));
                }
                self.move_sp(-self.word());
                self.here(item.live_out);
                self.jump_away();
                return true;
            }
            Kind::Cli => self.set_interrupts(item, false),
            Kind::Sti => {
                self.clobber(item.live_in);
                let site = self.wanted();
                self.cold_interpret(vec![site], item);
                self.set_interrupts(item, true);
            }
            Kind::Cld => {
                self.clobber(item.live_in);
                self.hot.load(r::S14, M::Ctx(off::CPU));
                self.byte_op(Alu::And, M::At(r::S14, cpu::RFLAGS + 1), !4);
            }
            Kind::Pushf => self.pushf(item),
            Kind::Popf => self.popf(item),
            Kind::Swapgs => {
                self.hot.load(r::S15, M::Ctx(off::GS_BASE));
                self.hot.load(r::S14, M::Ctx(off::CPU));
                self.hot.store(M::Ctx(off::TMP + 16), r::RAX);
                self.hot.load(r::RAX, M::At(r::S14, cpu::KERNEL_GS_BASE));
                self.hot.store(M::At(r::S14, cpu::KERNEL_GS_BASE), r::S15);
                self.hot.store(M::At(r::S14, cpu::GS_BASE), r::RAX);
                self.hot.store(M::Ctx(off::GS_BASE), r::RAX);
                self.hot.load(r::RAX, M::Ctx(off::TMP + 16));
            }
            Kind::Rdtsc | Kind::Rdtscp => {
                self.clobber(item.live_in);
                if item.kind == Kind::Rdtscp {
                    self.hot.bytes(&[0x0f, 0x01, 0xf9]);
                    self.hot.load(r::S14, M::Ctx(off::CPU));
                    self.hot.load32(r::RCX, M::At(r::S14, cpu::TSC_AUX));
                } else {
                    self.hot.bytes(&[0x0f, 0x31]);
                }
                self.hot.shift_imm(4, true, r::RDX, 32);
                self.hot.rr(true, &[0x0b], r::RAX, r::RDX);
                self.hot.alu(Alu::Add, r::RAX, M::Ctx(off::TSC_ADD));
                self.hot.mov(r::RDX, r::RAX);
                self.hot.shift_imm(5, true, r::RDX, 32);
                self.hot.mov32(r::RAX, r::RAX);
            }
            Kind::Selector => {
                let at = cpu::SEGMENTS + insn.op1_register().number() as i32 * cpu::SEGMENT + cpu::SELECTOR;
                self.hot.load(r::S15, M::Ctx(off::CPU));
                let to = self.destination(insn.op0_register());
                self.hot.rm(false, None, &[0x0f, 0xb7], to, M::At(r::S15, at));
                self.settle(insn.op0_register(), to);
            }
            Kind::ReadControl => {
                let at = match insn.op1_register() {
                    Register::CR0 => cpu::CR0,
                    Register::CR2 => cpu::CR2,
                    Register::CR3 => cpu::CR3,
                    _ => cpu::CR4,
                };
                self.hot.load(r::S15, M::Ctx(off::CPU));
                let to = self.destination(insn.op0_register());
                self.hot.load(to, M::At(r::S15, at));
                self.settle(insn.op0_register(), to);
            }
            Kind::Movs(size) | Kind::Stos(size) => {
                self.here(item.live_in);
                self.hot.store_imm32(M::Ctx(off::FAULT_OFFSET), item.offset.into());
                let stos = usize::from(matches!(item.kind, Kind::Stos(_)));
                let thunk = self.thunks.strings[self.mode.bank as usize][stos][size as usize];
                Self::thunk_jump(&mut self.hot, self.hot_at, self.base, thunk, true);
            }
            Kind::SetAc(on) => {
                self.clobber(item.live_in);
                self.hot.load(r::S14, M::Ctx(off::CPU));
                if on {
                    self.byte_op(Alu::Or, M::At(r::S14, cpu::RFLAGS + 2), 4);
                } else {
                    self.byte_op(Alu::And, M::At(r::S14, cpu::RFLAGS + 2), !4);
                }
                self.here(item.live_out);
                let bank = if on { 2 } else { 0 };
                self.leave_bank(bank);
                self.enter_bank(bank);
                match Self::near(next) {
                    Some(target) => {
                        let site = self.hot.jmp();
                        let mode = Mode { bank, plain_stack: false, ..self.mode };
                        self.colds.push(Cold::Link { site, target, mode });
                    }
                    None => {
                        Self::linear(&mut self.hot, self.mode.long, next);
                        Self::jump_indirect(&mut self.hot, Self::jumps_of(bank));
                    }
                }
                return true;
            }
            Kind::Syscall => {
                self.syscall(item, next);
                return true;
            }
            Kind::Sysret => {
                self.sysret(item);
                return true;
            }
            Kind::Interpret(fp) => {
                self.here(crate::plan::ARITH);
                self.exit(item.offset, if fp { reason::INTERPRET_FP } else { reason::INTERPRET });
                return true;
            }
        }
        false
    }

    /// Aims a conditional jump at a place that flags go to as they are.
    fn branch(&mut self, site: usize, target: i64) {
        match Self::near(target) {
            Some(offset) => self.link(site, offset, false),
            None => self.colds.push(Cold::Far { site, target }),
        }
    }

    /// Computes the linear address of page offset `next` into r14.
    fn return_address(&mut self, next: i64) {
        self.hot.load(r::S14, M::Ctx(off::PAGE));
        self.hot.lea(r::S14, M::At(r::S14, next as i32));
    }

    /// Brings the target of an indirect jump or call to r15.
    fn target(&mut self, item: &Item) {
        let insn = &item.insn;
        if insn.op0_kind() == OpKind::Register {
            let from = self.value(insn.op0_register(), r::S15);
            if self.mode.long {
                self.hot.mov(r::S15, from);
            } else {
                self.hot.mov32(r::S15, from);
            }
        } else if item.memory == Memory::Stack {
            let m = M::Index(r::GUEST_SP, r::DELTA, 0, insn.memory_displacement64() as i32);
            self.load_word(r::S15, m);
        } else {
            let read = Item { writes: false, ..item.clone() };
            self.checked(&read);
            self.load_word(r::S15, M::At(r::S15, 0));
        }
    }

    fn push(&mut self, item: &Item) {
        let insn = &item.insn;
        match insn.op0_kind() {
            OpKind::Register => {
                let m = self.stack_operand(item, -self.word(), true);
                let from = self.value(insn.op0_register(), r::S14);
                self.store_word(m, from);
            }
            OpKind::Memory => {
                let read = Item { writes: false, ..item.clone() };
                self.checked(&read);
                self.load_word(r::S15, M::At(r::S15, 0));
                if item.covered {
                    self.store_word(M::Index(r::GUEST_SP, r::DELTA, 0, -self.word()), r::S15);
                } else {
                    self.hot.store(M::Ctx(off::TMP + 16), r::S15);
                    self.checked_stack(item, -self.word(), true);
                    self.hot.load(r::S14, M::Ctx(off::TMP + 16));
                    self.store_word(M::At(r::S15, 0), r::S14);
                }
            }
            _ => {
                let m = self.stack_operand(item, -self.word(), true);
                self.hot.rm(self.mode.long, None, &[0xc7], 0, m);
                self.hot.i32(insn.immediate(0) as i32);
            }
        }
        self.move_sp(-self.word());
    }

    fn lea(&mut self, insn: &Instruction) {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let to = insn.op0_register();
        let number = match high_number(to) {
            Some(_) => r::S15,
            None => home(to),
        };
        let wide = to.size() == 8;
        let narrow_address = !self.mode.long || base.is_gpr32() || index.is_gpr32();
        let disp = insn.memory_displacement64() as i64;
        if base == Register::RIP {
            self.hot.load(r::S15, M::Ctx(off::PAGE));
            let m = M::At(r::S15, disp as i32);
            if wide { self.hot.lea(number, m) } else { self.hot.lea32(number, m) }
        } else if base == Register::None && index == Register::None {
            let value = if wide && !narrow_address && insn.memory_displ_size() != 4 {
                disp as u64
            } else {
                disp as u64 & 0xffff_ffff
            };
            self.constant(number, value);
        } else {
            let m = match (base, index) {
                (_, Register::None) => M::At(self.value(base, r::S15), disp as i32),
                (Register::None, _) => {
                    let i = self.value(index, r::S14);
                    M::Scaled(i, insn.memory_index_scale().trailing_zeros() as u8, disp as i32)
                }
                _ => {
                    let b = self.value(base, r::S15);
                    let i = self.value(index, r::S14);
                    M::Index(b, i, insn.memory_index_scale().trailing_zeros() as u8, disp as i32)
                }
            };
            if wide && !narrow_address {
                self.hot.lea(number, m);
            } else {
                self.hot.lea32(number, m);
            }
        }
        if let Some(n) = high_number(to) {
            self.hot.store(M::Ctx(HIGH[n as usize]), r::S15);
        }
    }

    /// Copies an instruction with its operands replaced; false if it cannot be encoded.
    fn copy(&mut self, item: &Item) -> bool {
        let mut insn = item.insn;
        widen(&mut insn);
        let mut spare: &[u8] = &[r::S14, r::S15];
        match item.memory {
            Memory::None => {}
            Memory::Stack => {
                let disp = insn.memory_displacement64() as i64 as i32;
                insn.set_memory_base(Register::R12);
                insn.set_memory_index(Register::R13);
                insn.set_memory_index_scale(1);
                insn.set_memory_displacement64(i64::from(disp) as u64);
                insn.set_memory_displ_size(if disp == 0 { 0 } else { 1 });
                insn.set_segment_prefix(Register::None);
            }
            Memory::Checked => {
                if item.kind == Kind::BitString {
                    self.bit_string(item);
                    insn.set_op1_register(sized(r::S14, item.size.into()));
                } else {
                    self.checked(item);
                }
                insn.set_memory_base(Register::R15);
                insn.set_memory_index(Register::None);
                insn.set_memory_index_scale(1);
                insn.set_memory_displacement64(0);
                insn.set_memory_displ_size(0);
                insn.set_segment_prefix(Register::None);
                spare = &[r::S14];
            }
        }
        if item.kind != Kind::BitString {
            self.before(item);
        }
        if item.kind == Kind::Divide {
            self.hot.store_imm32(M::Ctx(off::FAULT_OFFSET), item.offset.into());
        }
        let mut homes: [(u8, u8, OpAccess); 2] = [(0, 0, OpAccess::None); 2];
        let mut used = 0;
        if item.kind != Kind::BitString {
            for i in 0..insn.op_count() {
                if insn.op_kind(i) != OpKind::Register {
                    continue;
                }
                let register = insn.op_register(i);
                if !register.is_gpr() {
                    continue;
                }
                if register.full_register() == Register::RSP {
                    insn.set_op_register(i, sized(r::GUEST_SP, register.size()));
                } else if let Some(n) = high_number(register) {
                    let tmp = match homes[..used].iter().find(|h| h.0 == n) {
                        Some(h) => h.1,
                        None => {
                            let tmp = spare[used];
                            homes[used] = (n, tmp, OpAccess::None);
                            used += 1;
                            self.hot.load(tmp, M::Ctx(HIGH[n as usize]));
                            tmp
                        }
                    };
                    insn.set_op_register(i, sized(tmp, register.size()));
                }
            }
        }
        self.encoder.set_buffer(std::mem::take(&mut self.hot.code));
        let encoded = self.encoder.encode(&insn, 0).is_ok();
        self.hot.code = self.encoder.take_buffer();
        if !encoded {
            return false;
        }
        if used > 0 {
            let info = self.info.info(&item.insn);
            for &(n, tmp, _) in &homes[..used] {
                let written = (0..item.insn.op_count()).any(|i| {
                    item.insn.op_kind(i) == OpKind::Register
                        && high_number(item.insn.op_register(i)) == Some(n)
                        && !matches!(info.op_access(i), OpAccess::Read | OpAccess::CondRead | OpAccess::None)
                });
                if written {
                    self.hot.store(M::Ctx(HIGH[n as usize]), tmp);
                }
            }
        }
        self.after(item);
        true
    }

    /// Computes the host address that a bit string instruction works on into r15, and the bit's number into r14.
    fn bit_string(&mut self, item: &Item) {
        let register = item.insn.op1_register();
        let wide = item.size == 8;
        self.clobber(item.live_in);
        let retry = self.hot.at();
        self.address(&item.insn);
        let from = self.value(register, r::S14);
        if wide {
            self.hot.mov(r::S14, from);
        } else {
            self.hot.rr(true, &[0x63], r::S14, from); // movsxd
        }
        self.hot.shift_imm(7, true, r::S14, if wide { 6 } else { 5 });
        let m = M::Index(r::S15, r::S14, if wide { 3 } else { 2 }, 0);
        let narrow =
            !self.mode.long || item.insn.memory_base().is_gpr32() || item.insn.memory_index().is_gpr32();
        if narrow {
            self.hot.lea32(r::S15, m)
        } else {
            self.hot.lea(r::S15, m)
        }
        self.translate(item, retry, item.size, item.writes, 1);
        let from = self.value(register, r::S14);
        self.hot.mov32(r::S14, from);
        self.hot.alu_imm(Alu::And, false, r::S14, if wide { 63 } else { 31 });
        if self.flags == Flags::Saved && item.live_in != 0 {
            self.hot.store(M::Ctx(off::TMP + 16), r::S14);
            self.here(item.live_in);
            self.hot.load(r::S14, M::Ctx(off::TMP + 16));
        }
    }

    // ---- what stands apart ----

    fn aim_hot(&mut self, site: usize) {
        let target = self.cold_at + self.cold.at();
        let from = self.hot_at + site + 4;
        self.hot.code[site..site + 4].copy_from_slice(&((target as i64 - from as i64) as i32).to_le_bytes());
    }

    /// A jump in the cold part to a place in the hot one.
    fn cold_to_hot(&mut self, hot: usize) {
        let site = self.cold.jmp();
        let from = self.cold_at + site + 4;
        let target = self.hot_at + hot;
        self.cold.code[site..site + 4].copy_from_slice(&((target as i64 - from as i64) as i32).to_le_bytes());
    }

    fn link_stub(&mut self, target: u16, site: u32, mode: Mode) {
        let number = self.first_link + self.links.len() as u32;
        let stub = (self.cold_at + self.cold.at()) as u32;
        self.links.push(NewLink { site, stub, target, mode, check: None });
        self.cold.mov_imm32(r::S14, target.into());
        self.cold.mov_imm32(r::DELTA, number << 3 | reason::LINK as u32);
        self.cold_thunk(self.thunks.exit, false);
    }

    fn finish(&mut self) {
        for cold in std::mem::take(&mut self.colds) {
            match cold {
                Cold::Slow { sites, retry, access, description, saved, tag } => {
                    for site in sites {
                        self.aim_hot(site);
                    }
                    self.cold.alu(Alu::Xor, r::S15, M::CtxAt(r::S14, tag));
                    self.cold.mov_imm32(r::S14, description);
                    let thunk = if saved { self.thunks.slow_saved } else { self.thunks.slow_dead };
                    self.cold_thunk(thunk, true);
                    self.cold_to_hot(retry);
                    self.cold_to_hot(access);
                }
                Cold::Stack { site, retry, description, saved, low, at } => {
                    self.aim_hot(site);
                    let check = (self.hot_at + site) as u32;
                    self.cold.lea(r::S15, M::At(r::GUEST_SP, low));
                    self.cold.mov_imm32(r::S14, description);
                    let number = self.first_link + self.links.len() as u32;
                    self.cold.store_imm32(M::Ctx(off::CHECK), number as i32);
                    let thunk = if saved { self.thunks.slow_saved } else { self.thunks.slow_dead };
                    self.cold_thunk(thunk, true);
                    self.cold_to_hot(retry);
                    // The page cannot be kept: the same code with plain stack accesses.
                    let plain = (self.cold_at + self.cold.at()) as u32;
                    if saved {
                        self.cold.restore_flags(r::S14, off::FLAGS);
                    }
                    let site = self.cold.jmp();
                    debug_assert_eq!(site + 4, self.cold.at());
                    let mode = Mode { plain_stack: true, ..self.mode };
                    self.link_stub(at, (self.cold_at + site) as u32, mode);
                    if let Some(link) = self.links.last_mut() {
                        link.check = Some((check, plain));
                    }
                }
                Cold::Link { site, target, mode } => {
                    self.aim_hot(site);
                    self.link_stub(target, (self.hot_at + site) as u32, mode);
                }
                Cold::Interpret { sites, offset, saved } => {
                    for site in sites {
                        self.aim_hot(site);
                    }
                    if saved {
                        self.cold.restore_flags(r::S14, off::FLAGS);
                    }
                    self.cold.mov_imm32(r::S14, offset.into());
                    self.cold.mov_imm32(r::DELTA, reason::INTERPRET as u32);
                    self.cold_thunk(self.thunks.exit, false);
                }
                Cold::Far { site, target } => {
                    self.aim_hot(site);
                    let (long, jumps) = (self.mode.long, self.jumps());
                    Self::linear(&mut self.cold, long, target);
                    Self::jump_indirect(&mut self.cold, jumps);
                }
                Cold::Poll { site, target, exchanged } => {
                    self.aim_hot(site);
                    if exchanged {
                        self.cold.mov(r::RCX, r::S14);
                    }
                    self.cold.mov_imm32(r::S14, target as u32);
                    self.cold.mov_imm32(r::DELTA, reason::GO_ON as u32);
                    self.cold_thunk(self.thunks.exit, false);
                }
                Cold::Unknown { unknown, wanted, saved } => {
                    self.aim_hot(unknown);
                    self.cold.mov(r::RCX, r::S14);
                    self.cold_thunk(self.thunks.unknown, false);
                    self.aim_hot(wanted);
                    if saved {
                        self.cold.restore_flags_apart(off::TMP, off::FLAGS);
                    }
                    self.cold_thunk(self.thunks.unknown, false);
                }
            }
        }
    }
}

/// The host register that holds a guest register.
fn home(register: Register) -> u8 {
    match register.full_register() {
        Register::RSP => r::GUEST_SP,
        full => full.number() as u8,
    }
}

/// Gives short and doubled forms of 32-bit code, and those with an absolute address, the form that 64-bit code has.
fn widen(insn: &mut Instruction) {
    use Code::*;
    let code = match insn.code() {
        Inc_r16 => Inc_rm16,
        Inc_r32 => Inc_rm32,
        Dec_r16 => Dec_rm16,
        Dec_r32 => Dec_rm32,
        Mov_AL_moffs8 => Mov_r8_rm8,
        Mov_AX_moffs16 => Mov_r16_rm16,
        Mov_EAX_moffs32 => Mov_r32_rm32,
        Mov_RAX_moffs64 => Mov_r64_rm64,
        Mov_moffs8_AL => Mov_rm8_r8,
        Mov_moffs16_AX => Mov_rm16_r16,
        Mov_moffs32_EAX => Mov_rm32_r32,
        Mov_moffs64_RAX => Mov_rm64_r64,
        Add_rm8_imm8_82 => Add_rm8_imm8,
        Or_rm8_imm8_82 => Or_rm8_imm8,
        Adc_rm8_imm8_82 => Adc_rm8_imm8,
        Sbb_rm8_imm8_82 => Sbb_rm8_imm8,
        And_rm8_imm8_82 => And_rm8_imm8,
        Sub_rm8_imm8_82 => Sub_rm8_imm8,
        Xor_rm8_imm8_82 => Xor_rm8_imm8,
        Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
        _ => return,
    };
    insn.set_code(code);
}
