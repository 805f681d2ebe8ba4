//! Turns a plan into host code.

mod cold;
mod copy;
mod memory;
mod raw;
mod segmented;
mod system;
pub(crate) mod verify;

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};
use iem::tlb::{ENTRIES, Entry};

use crate::asm::{Alu, Asm, M, cc, r};
use crate::context::{JUMPS, JUMPS_AT, Jump, TLB_AT, cpu, off};
use crate::groups::Slot;
use crate::plan::{Item, Kind, Memory, Mode, Plan, high_number};
use crate::swap::{AREA, Swap};
use crate::thunks::{StringForm, Thunks, reason};

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
    pub(crate) hot: Asm,
    pub(crate) cold: Asm,
    /// Offset within `hot` of the entry for those who know the page.
    pub(crate) entry: usize,
    pub(crate) checked: Option<u32>,
    pub(crate) links: Vec<NewLink>,
    /// Page offsets of instructions whose checks keep pages at sites.
    pub(crate) places: Vec<u16>,
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

/// Jumps to the same place: mostly one or two.
pub(crate) type Sites = smallvec::SmallVec<[usize; 2]>;

/// Code that stands apart, and the jumps in the block that lead there.
enum Cold {
    Slow {
        sites: Sites,
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
    Group {
        site: usize,
        retry: usize,
        description: u32,
        saved: bool,
        at: u16,
        tag: i32,
    },
    Place(memory::Place),
    Link {
        site: usize,
        target: u16,
        mode: Mode,
    },
    Interpret {
        sites: Sites,
        offset: u16,
        saved: bool,
    },
    Stale {
        sites: Sites,
        start: u16,
        why: u32,
    },
    /// The same of an instruction on x87, SSE or AVX state; with `reset` the unit gets masks that are safe for host code.
    InterpretFp {
        sites: Sites,
        offset: u16,
        saved: bool,
        reset: bool,
    },
    Far {
        site: usize,
        target: i64,
    },
    /// `exchanged`: guest RCX is in r14; `carry`: CF is in the context.
    Poll {
        site: usize,
        target: i64,
        exchanged: bool,
        carry: bool,
    },
}

/// What code may make use of.
pub(crate) struct Host {
    pub(crate) bmi2: bool,
    /// There is one vCPU: nobody else does atomic operations on guest memory.
    pub(crate) alone: bool,
}

pub(crate) struct Emitter<'a> {
    hot: Asm,
    cold: Asm,
    hot_at: usize,
    cold_at: usize,
    base: u64,
    /// Host address of the guest's page.
    page: u64,
    /// Its bytes, as far as they are known.
    code: &'a [u8],
    thunks: &'a Thunks,
    host: &'a Host,
    mode: Mode,
    flags: Flags,
    colds: Vec<Cold>,
    links: Vec<NewLink>,
    first_link: u32,
    places: Vec<u16>,
    first_place: u32,
    /// Where the block's loop starts, and its offset in the page.
    round: Option<(usize, u16)>,
    swaps: Vec<Swap>,
    /// The slot in the context whose distance r14 holds.
    kept: Option<Slot>,
    /// r14 was overwritten since the instruction's start.
    s14: bool,
    /// The item that the branch at work goes to, if that is in the block.
    inner: Option<usize>,
    /// Jumps to items to come.
    joins: Vec<(usize, usize)>,
    encoder: &'a mut Encoder,
    info: &'a mut InstructionInfoFactory,
}

const HIGH: [i32; 4] = [off::HIGH, off::HIGH + 8, off::HIGH + 16, off::HIGH + 24];
/// Where only this flag matters it is moved alone.
const CARRY: u32 = iced_x86::RflagsBits::CF;
const READ_TAG: i32 = std::mem::offset_of!(Entry, read) as i32;
const WRITE_TAG: i32 = std::mem::offset_of!(Entry, write) as i32;
const TLB_DELTA: i32 = std::mem::offset_of!(Entry, delta) as i32;

/// The register of a size with a number.
pub(crate) fn sized(number: u8, size: usize) -> Register {
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

/// Where blocks are placed and what numbers their links and replaceable checks get.
pub(crate) struct Place<'a> {
    pub(crate) base: u64,
    /// Host address of the guest's page, and its bytes as far as they are known.
    pub(crate) page: u64,
    pub(crate) code: &'a [u8],
    pub(crate) hot: usize,
    pub(crate) cold: usize,
    pub(crate) first_link: u32,
    pub(crate) first_place: u32,
}

impl<'a> Emitter<'a> {
    pub(crate) fn new(
        place: &Place<'a>,
        thunks: &'a Thunks,
        host: &'a Host,
        mode: Mode,
        room: (Asm, Asm),
        encoder: &'a mut Encoder,
        info: &'a mut InstructionInfoFactory,
    ) -> Self {
        Self {
            hot: room.0,
            cold: room.1,
            hot_at: place.hot,
            cold_at: place.cold,
            base: place.base,
            page: place.page,
            code: place.code,
            thunks,
            host,
            mode,
            flags: Flags::Here,
            colds: Vec::new(),
            links: Vec::new(),
            first_link: place.first_link,
            places: Vec::new(),
            first_place: place.first_place,
            round: None,
            swaps: Vec::new(),
            kept: None,
            s14: false,
            inner: None,
            joins: Vec::new(),
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

    /// A field of the TLB's entry whose offset is in r14, for code that runs while registers are swapped.
    fn field(&self, at: i32) -> M {
        match self.swaps.iter().find(|swap| swap.high == AREA) {
            Some(area) => M::Index(r::S14, area.host, 0, at),
            None => M::CtxAt(r::S14, at),
        }
    }

    fn tlb(&self) -> i32 {
        TLB_AT + (usize::from(self.mode.bank) * ENTRIES * size_of::<Entry>()) as i32
    }

    /// Translates; `checked` puts an entry for jumps through the jump cache in front.
    pub(crate) fn block(mut self, plan: &Plan, start: u16, checked: bool) -> Output {
        let live = plan.flags_matter();
        let checked = checked.then(|| self.checked_entry(start, live));
        let entry = self.hot.at();
        if let Some(verify) = &plan.verify {
            self.verify(verify, start);
        }
        if plan.looped {
            self.swaps.clone_from(&plan.swaps);
            Self::swap_in(&mut self.hot, &self.swaps);
            self.round = Some((self.hot.at(), start));
        }
        let mut ended = false;
        let (rounds, last) = plan.rounds();
        let mut out = Vec::new();
        for _ in 1..rounds {
            for item in &plan.items[..last] {
                self.guarded(item);
            }
            // Another round follows at once, unless this was the last one.
            let item = &plan.items[last];
            self.here(item.live_in);
            out.push(self.hot.jcc((item.insn.condition_code() as u8 - 1) ^ 1));
            self.flags = Flags::Here;
            self.kept = None;
        }
        for (n, item) in plan.items.iter().enumerate() {
            if item.joined {
                self.here(item.live_in);
                self.flags = Flags::Here;
                self.kept = None;
                let (here, others) =
                    std::mem::take(&mut self.joins).into_iter().partition(|j: &(usize, usize)| j.1 == n);
                self.joins = others;
                for (site, _) in here {
                    self.hot.aim(site);
                }
            }
            self.inner = plan.inner_target(n);
            ended = self.guarded(item);
            if ended {
                break;
            }
            if n == last && !out.is_empty() {
                for site in std::mem::take(&mut out) {
                    self.hot.aim(site);
                }
                self.flags = Flags::Here;
                self.kept = None;
            }
        }
        if !ended {
            if plan.crosses {
                // Only the jump cache knows code that depends on two pages.
                Self::linear(&mut self.hot, self.mode, plan.end.into());
                self.jump_away(crate::plan::ARITH);
            } else {
                self.here(plan.items.last().map_or(crate::plan::ARITH, |i| i.live_out));
                self.go(plan.end.into(), false);
            }
        }
        self.finish();
        Output { hot: self.hot, cold: self.cold, entry, checked, links: self.links, places: self.places }
    }

    /// An entry alone, for a block at `entry` in the buffer.
    pub(crate) fn entry_for(mut self, start: u16, live: bool, entry: usize) -> Output {
        let checked = Some(self.checked_entry(start, live));
        let site = self.hot.jmp();
        let here = self.hot_at + site + 4;
        self.hot.code[site..].copy_from_slice(&((entry as i64 - here as i64) as i32).to_le_bytes());
        self.finish();
        Output { hot: self.hot, cold: self.cold, entry: 0, checked, links: self.links, places: self.places }
    }

    // ---- flags ----

    /// Before RFLAGS is overwritten: `live` flags must survive.
    fn clobber(&mut self, live: u32) {
        if live == 0 {
            self.flags = Flags::Here;
            return;
        }
        if self.flags == Flags::Here {
            if live == CARRY {
                self.hot.save_carry(r::S14, off::FLAGS);
            } else {
                self.hot.save_flags(r::S14, off::FLAGS);
            }
            self.s14 = true;
        }
        self.flags = Flags::Saved;
    }

    /// Has `live` flags in RFLAGS.
    fn here(&mut self, live: u32) {
        if self.flags == Flags::Saved {
            if live == 0 {
                self.flags = Flags::Here;
            } else {
                if live == CARRY {
                    self.hot.restore_carry(off::FLAGS);
                } else {
                    self.hot.restore_flags(r::S14, off::FLAGS);
                    self.s14 = true;
                }
                self.flags = Flags::Both;
            }
        }
    }

    /// The instruction works on flags.
    fn needs_flags(&self, item: &Item) -> bool {
        item.modifies != 0 || item.insn.rflags_read() & crate::plan::ARITH != 0
    }

    /// Before a copied instruction.
    fn before(&mut self, item: &Item) {
        if self.needs_flags(item) {
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

    /// Puts r12 to r15 into the host registers that they have in the loop.
    fn swap_in(asm: &mut Asm, swaps: &[Swap]) {
        for swap in swaps {
            asm.store(M::Ctx(off::SWAPPED + 8 * i32::from(swap.high)), swap.host);
            let held = if swap.high == AREA { off::AREA } else { HIGH[usize::from(swap.high)] };
            asm.load(swap.host, M::Ctx(held));
        }
    }

    /// Puts all registers back where code outside the loop has them. Leaves flags, r14 and r15 alone.
    fn swap_out(asm: &mut Asm, swaps: &[Swap]) {
        for swap in swaps {
            if swap.high != AREA {
                asm.store(M::Ctx(HIGH[usize::from(swap.high)]), swap.host);
            }
            asm.load(swap.host, M::Ctx(off::SWAPPED + 8 * i32::from(swap.high)));
        }
    }

    /// Leaves for the run loop. Flags must be in RFLAGS.
    fn exit(&mut self, offset: u16, why: u64) {
        Self::swap_out(&mut self.hot, &self.swaps);
        self.hot.mov_imm32(r::S14, offset.into());
        self.hot.mov_imm32(r::DELTA, why as u32);
        self.hot_thunk(self.thunks.exit);
    }

    /// Goes to the code at r15; flags that matter are in the context.
    fn jump_indirect(asm: &mut Asm, jumps: i32) {
        const { assert!(size_of::<Jump>() == 2 * 8) };
        asm.rr(false, &[0x0f, 0xb7], r::S14, r::S15); // movzx r14d, r15w
        asm.lea32(r::S14, M::Index(r::S14, r::S14, 0, 0));
        asm.rm(false, None, &[0xff], 4, M::CtxAt8(r::S14, jumps + 8)); // jmp
    }

    /// Has the jump at `site` aimed at code of this mode; plain stack accesses go on being plain in loops only.
    fn link(&mut self, site: usize, target: u16, back: bool) {
        let mode = Mode { plain: back && self.mode.plain, ..self.mode };
        self.colds.push(Cold::Link { site, target, mode });
    }

    /// Goes to the code at r15 with `live` flags, wherever they are.
    fn jump_away(&mut self, live: u32) {
        Self::swap_out(&mut self.hot, &self.swaps);
        self.clobber(live);
        let jumps = self.jumps();
        Self::jump_indirect(&mut self.hot, jumps);
    }

    /// The address of code at page offset `target` into r15; may use r14.
    fn linear(asm: &mut Asm, mode: Mode, target: i64) {
        asm.load(r::S15, M::Ctx(off::PAGE));
        if mode.long {
            asm.lea(r::S15, M::At(r::S15, target as i32));
            return;
        }
        asm.lea32(r::S15, M::At(r::S15, target as i32));
        if mode.segments.is_some() {
            asm.load(r::S14, M::Ctx(off::CODE_NUMBER));
            asm.lea(r::S15, M::Index(r::S15, r::S14, 0, 0));
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
                self.jump_near(offset, poll);
            }
            None => {
                Self::linear(&mut self.hot, self.mode, target);
                self.jump_away(crate::plan::ARITH);
            }
        }
    }

    /// Goes on at a known place with `live` flags.
    fn go_from(&mut self, target: i64, live: u32) {
        if Self::near(target).is_some() {
            self.here(live);
            self.go(target, false);
        } else {
            Self::linear(&mut self.hot, self.mode, target);
            self.jump_away(live);
        }
    }

    /// A jump within the page: to the start of the block's own loop, or to a block by a link.
    fn jump_near(&mut self, offset: u16, back: bool) {
        let site = self.hot.jmp();
        match self.round {
            Some((label, start)) if start == offset => {
                let distance = label as i64 - (site + 4) as i64;
                self.hot.put32(site, distance as i32);
            }
            _ => self.link(site, offset, back),
        }
    }

    /// Leaves if somebody wants something of this vCPU. Overwrites RFLAGS.
    fn poll(&mut self, target: i64) {
        let site = Self::kicked(&mut self.hot);
        self.colds.push(Cold::Poll { site, target, exchanged: false, carry: false });
    }

    /// Goes back to a known place, looking for requests, with `live` flags in RFLAGS.
    fn go_back(&mut self, target: i64, live: u32) {
        if Self::near(target).is_none() || live == 0 {
            self.go(target, true);
            return;
        }
        if live == CARRY {
            self.hot.save_carry(r::S14, off::FLAGS);
            let site = Self::kicked(&mut self.hot);
            self.colds.push(Cold::Poll { site, target, exchanged: false, carry: true });
            self.hot.restore_carry(off::FLAGS);
            self.go(target, false);
            return;
        }
        self.hot.load(r::S14, M::Ctx(off::KICK));
        self.hot.load32(r::S14, M::At(r::S14, 0));
        self.hot.rr(true, &[0x87], r::S14, r::RCX); // xchg
        self.hot.bytes(&[0xe3, 5]); // jrcxz over the jump
        let site = self.hot.jmp();
        self.colds.push(Cold::Poll { site, target, exchanged: true, carry: false });
        self.hot.mov(r::RCX, r::S14);
        self.go(target, false);
    }

    /// The entry for jumps through the jump cache; gives its offset in the buffer. `live`: flags matter.
    fn checked_entry(&mut self, start: u16, live: bool) -> u32 {
        let entry = (self.hot_at + self.hot.at()) as u32;
        self.hot.load(r::S14, M::CtxAt8(r::S14, self.jumps()));
        self.hot.rr(true, &[0x03], r::S14, r::S15); // add
        let unknown = self.hot.jcc(cc::NE);
        let wanted = Self::kicked(&mut self.hot);
        for site in [unknown, wanted] {
            let from = self.base + (self.hot_at + site + 4) as u64;
            self.hot.put32(site, self.thunks.unknown.wrapping_sub(from) as i32);
        }
        if live {
            self.hot.restore_flags(r::S14, off::FLAGS);
        }
        self.hot.lea(r::S15, M::At(r::S15, -i32::from(start)));
        self.hot.store(M::Ctx(off::PAGE), r::S15);
        entry
    }

    /// Jumps if somebody wants something of this vCPU; gives the jump. Overwrites r14 and RFLAGS.
    fn kicked(asm: &mut Asm) -> usize {
        asm.load(r::S14, M::Ctx(off::KICK));
        asm.rm(false, None, &[0x83], Alu::Cmp as u8, M::At(r::S14, 0));
        asm.byte(0);
        asm.jcc(cc::NE)
    }

    // ---- helpers ----

    fn word(&self) -> i32 {
        if self.mode.long { 8 } else { 4 }
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

    /// Translates one instruction, and the check of the stack page before it; true if it ends the block.
    fn guarded(&mut self, item: &Item) -> bool {
        self.s14 = false;
        if let Some(check) = item.check {
            self.stack_check(item, check);
            // Its slow part overwrites r14.
            self.kept = None;
        }
        let ended = self.item(item);
        if self.s14 || !matches!(item.kind, Kind::Copy | Kind::Nop | Kind::Jcc(_)) {
            self.kept = None;
        }
        ended
    }

    /// Translates one instruction; true if it ends the block.
    fn item(&mut self, item: &Item) -> bool {
        if let Some(ended) = self.segmented(item) {
            return ended;
        }
        let insn = &item.insn;
        let next = i64::from(item.offset) + insn.len() as i64;
        match item.kind {
            Kind::Nop | Kind::LoadSegment => {}
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
                if t <= i64::from(item.offset) && Self::near(t).is_some() {
                    self.here(item.live_out);
                    self.go_back(t, item.live_out)
                } else {
                    self.go_from(t, item.live_out)
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
                self.go_from(t, item.live_out);
                return true;
            }
            Kind::Ret => {
                let m = self.stack_operand(item, 0, false);
                self.load_word(r::S15, m);
                let drop = if insn.op_count() == 1 { insn.immediate16().into() } else { 0 };
                self.move_sp(self.word() + drop);
                self.jump_away(item.live_out);
                return true;
            }
            Kind::JmpIndirect => {
                self.target(item);
                self.jump_away(item.live_out);
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
                self.jump_away(item.live_out);
                return true;
            }
            Kind::Cli => self.set_interrupts(item, false),
            Kind::Sti => {
                self.clobber(item.live_in);
                let site = self.wanted();
                self.cold_interpret(smallvec::smallvec![site], item);
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
            Kind::Selector => self.selector(item),
            Kind::ReadBase(gs) => self.read_base(insn, gs),
            Kind::WriteBase(gs) => self.write_base(item, gs),
            Kind::Xsave(compact) => self.xsave(item, compact),
            Kind::Xrstor => self.xrstor(item),
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
                let form = StringForm {
                    stos: matches!(item.kind, Kind::Stos(_)),
                    once: !item.insn.has_rep_prefix(),
                    narrow: !self.mode.long,
                };
                let thunk = self.thunks.strings[self.mode.bank as usize][form.number()][size as usize];
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
                        let mode = Mode { bank, plain: false, ..self.mode };
                        self.colds.push(Cold::Link { site, target, mode });
                    }
                    None => {
                        Self::linear(&mut self.hot, self.mode, next);
                        self.clobber(item.live_out);
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
            Kind::Iret => {
                self.iret(item);
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
        if let Some(inner) = self.inner {
            self.joins.push((site, inner));
            return;
        }
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
            let m = self.access(&read, false);
            self.load_word(r::S15, m);
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
                let m = self.access(&read, false);
                self.load_word(r::S15, m);
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
}

/// The host register that holds a guest register.
fn home(register: Register) -> u8 {
    match register.full_register() {
        Register::RSP => r::GUEST_SP,
        full => full.number() as u8,
    }
}
