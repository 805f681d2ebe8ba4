//! The run loop.
#![allow(unsafe_code)] // shares the context and the CPU state with generated code, and enters it

mod translate;

use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cpum::state::{XsaveArea, cr0, cr4, efer, rflags, seg};
use cpum::{Activity, CpuState, VcpuLink};
use em::{Engine, Event, Exit, VmContext};
use iced_x86::{CpuidFeature, Encoder, InstructionInfoFactory};
use iem::Iem;
use iem::tlb::{Bank, SPACES};
use iem::unit::Features as UnitFeatures;
use pgm::CodeWrites;
use vbox_types::VcpuId;

use crate::asm::Asm;
use crate::cache::{Cache, IntHasher, Page, PageJumps, Placed, Recent};
use crate::code::CodeBuffer;
use crate::context::{
    CodeSegments, Context, JUMP_BANKS, JUMPS, JUMPS_AT, Jump, LIVE_SITES_AT, NO_STACK, SITES, SITES_AT, Site,
    linear_part,
};
use crate::emit::Host;
use crate::host::{self, Features};
use crate::plan::{self, Machine, Mode, Segments};
use crate::slow::{self, Moves};
use crate::thunks::{self, Thunks, reason};

/// Code memory of one vCPU, in bytes.
const CODE_BYTES: usize = 64 << 20;
/// Longest instruction, in bytes.
const MAX_INSN: usize = 15;
/// No block's code is longer.
const MAX_BLOCK_CODE: usize = 64 << 10;

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stats {
    pub(crate) translated: u64,
    pub(crate) translated_instructions: u64,
    pub(crate) translated_bytes: u64,
    pub(crate) entered: u64,
    pub(crate) interpreted: u64,
    pub(crate) interpreted_fp: u64,
    pub(crate) unknown_jumps: u64,
    pub(crate) linked: u64,
    pub(crate) slow_accesses: u64,
    pub(crate) stack_pages: u64,
    pub(crate) group_pages: u64,
    pub(crate) places_given_up: u64,
    pub(crate) data_beside_code: u64,
    pub(crate) pages_dropped: u64,
    pub(crate) pages_warm: u64,
    pub(crate) pages_hot: u64,
    pub(crate) fleeting: u64,
    pub(crate) blocks_stale: u64,
    pub(crate) cache_flushes: u64,
    pub(crate) unit_moves: u64,
}

/// How guest code runs in the current mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One by one, with debug checks.
    Step,
    /// By the interpreter, block by block.
    Interpret,
    Native(Mode),
}

/// The recompiler for one vCPU.
pub struct Rem {
    pub(crate) iem: Iem,
    link: Arc<VcpuLink>,
    features: Features,
    host: Host,
    machine: Machine,
    code: CodeBuffer,
    /// Ends of the thunks in the code buffer.
    kept: (usize, usize),
    thunks: Thunks,
    cache: Cache,
    way: Way,
    /// The link by which generated code was left.
    pending_link: Option<u32>,
    /// Generated code was left because the jump cache did not know RIP.
    unknown: bool,
    /// The next block is to have plain stack accesses.
    plain: bool,
    /// The guest's x87, SSE and AVX state is in the host unit and the context.
    unit_live: bool,
    /// All floating-point exceptions are masked.
    masked: bool,
    /// What the host's time-stamp counter lacks to the virtual machine's, if they run at the same rate.
    tsc: Option<u64>,
    ctx: Arc<VmContext>,
    code_writes_seen: u64,
    losses_seen: u64,
    /// Address spaces whose part of the jump cache was set up.
    views: usize,
    /// What code in the jump cache was translated for: in common, and by bank.
    common: u32,
    own: [(bool, bool); JUMP_BANKS],
    segments: CodeSegments,
    /// Base and number of the code segment at work, if it is not flat.
    code_base: u64,
    code_number: u64,
    /// STAR, LSTAR and SFMASK as the context knows them.
    syscall_msrs: [u64; 3],
    pub(crate) last_slow: (u64, u32),
    pub(crate) last_moves: Moves,
    /// What the delivery of a fault led to, if not to its handler.
    raised: Option<Exit>,
    encoder: Encoder,
    info: InstructionInfoFactory,
    /// Room for a page's bytes and an instruction's, and for code.
    bytes: Vec<u8>,
    room: (Asm, Asm),
    pub(crate) stats: Stats,
}

// SAFETY: the raw pointers are in the context's memory, which belongs to the engine and is set anew at every `run`.
unsafe impl Send for Rem {}

impl Rem {
    /// A recompiler for vCPU `id`; fails if the host gives no memory for code.
    pub fn new(ctx: Arc<VmContext>, id: VcpuId) -> std::io::Result<Self> {
        host::handle_signals()?;
        let features = Features::detect();
        let general = plan::GENERAL
            .iter()
            .enumerate()
            .filter(|(_, f)| announced(&ctx.cpuid, **f))
            .fold(0, |mask, (bit, _)| mask | 1 << bit);
        let unit = UnitFeatures::announced(&ctx.cpuid).intersection(UnitFeatures::host());
        let link = ctx.links[id.index()].clone();
        let iem = Iem::new(ctx.clone(), id)?;
        let mut code = CodeBuffer::new(CODE_BYTES)?;
        let (bytes, thunks) = thunks::build(code.base(), features.avx, slow::access as *const () as u64)
            .map_err(std::io::Error::other)?;
        code.append(&bytes, &[]);
        let kept = code.next();
        let mut rem = Self {
            iem,
            link,
            features,
            host: Host { bmi2: features.bmi2, alone: ctx.links.len() == 1 },
            machine: Machine { unit, general, xsave: host::has_xsave() },
            code,
            kept,
            thunks,
            cache: Cache::default(),
            way: Way::Interpret,
            pending_link: None,
            unknown: false,
            plain: false,
            unit_live: false,
            masked: false,
            tsc: None,
            ctx,
            code_writes_seen: CodeWrites::get().count(),
            losses_seen: 0,
            views: 1,
            common: 0,
            own: [(false, false); JUMP_BANKS],
            segments: CodeSegments::default(),
            code_base: 0,
            code_number: 0,
            syscall_msrs: [u64::MAX; 3],
            last_slow: (0, 0),
            last_moves: Moves::default(),
            raised: None,
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            bytes: vec![0; 4096 + MAX_INSN],
            room: Default::default(),
            stats: Stats::default(),
        };
        rem.clear_view(0, 0..JUMP_BANKS);
        let sites = rem.iem.core().tlb.area().as_ptr();
        for n in 0..SITES {
            // SAFETY: the sites lie within the engine's part of the area.
            unsafe { sites.add(SITES_AT).cast::<Site>().add(n).write([NO_STACK, 0]) };
        }
        Ok(rem)
    }

    pub(crate) fn context(&mut self) -> *mut Context {
        self.iem.core().tlb.area().as_ptr().cast()
    }

    /// What stands in a slot of the jump cache that holds nothing.
    fn no_jump(&self) -> Jump {
        Jump { tag: 0, code: self.thunks.unknown }
    }

    /// A slot of the jump cache as an address space sees it.
    fn jump_slot(&mut self, space: usize, bank: usize, slot: usize) -> *mut Jump {
        assert!(bank < JUMP_BANKS && slot < JUMPS);
        let tlb = &mut self.iem.core().tlb;
        let area = tlb.area_of(space).unwrap_or_else(|| tlb.area());
        // SAFETY: the slot lies within the engine's part of the area.
        unsafe { area.as_ptr().add(JUMPS_AT).cast::<Jump>().add(bank * JUMPS + slot) }
    }

    /// Empties the jump cache as an address space sees it.
    fn clear_view(&mut self, space: usize, banks: std::ops::Range<usize>) {
        let none = self.no_jump();
        for bank in banks {
            for slot in 0..JUMPS {
                let at = self.jump_slot(space, bank, slot);
                // SAFETY: a valid slot; generated code does not run now.
                unsafe { at.write(none) }
            }
        }
    }

    fn set_jump(&mut self, bank: usize, slot: usize, jump: Jump) {
        let space = self.iem.core().tlb.space();
        let at = self.jump_slot(space, bank, slot);
        // SAFETY: a valid slot; generated code does not run now.
        unsafe { at.write(jump) }
    }

    fn run_inner(&mut self, cpu: &mut CpuState) -> Exit {
        loop {
            if self.link.kick_word().load(Ordering::Acquire) != 0 {
                self.link.clear_kick();
            }
            let pending = self.link.pending();
            if !pending.is_empty()
                && let Some(exit) = self.iem.attend(cpu, pending)
            {
                return exit;
            }
            self.follow();
            if self.iem.core().resync {
                self.iem.core().update_mode(cpu);
                self.iem.core().drop_resume_flag(cpu);
                self.way = self.find_way(cpu);
            }
            let result = match self.way {
                Way::Step => {
                    self.unit_to_memory(cpu);
                    self.iem.step(cpu)
                }
                Way::Interpret => {
                    self.unit_to_memory(cpu);
                    self.iem.run_block(cpu)
                }
                Way::Native(mode) => self.native(cpu, mode),
            };
            if let Err(exit) = result {
                return exit;
            }
            let core = self.iem.core();
            if core.stop
                && let Some(exit) = core.exit.take()
            {
                return exit;
            }
        }
    }

    /// Drops what was derived from translations and code that are no more.
    #[inline(always)]
    fn follow(&mut self) {
        let core = self.iem.core();
        if core.flushed.any() {
            self.follow_flushes();
        }
        let losses = self.iem.core().tlb.losses();
        if losses != self.losses_seen {
            self.losses_seen = losses;
            let context = self.context();
            // SAFETY: the context lives as long as the engine, and generated code does not run now.
            unsafe {
                (*context).stacks = [[NO_STACK, 0]; JUMP_BANKS];
            }
            self.clear_sites();
        }
        if CodeWrites::get().count() != self.code_writes_seen {
            self.follow_code_writes();
        }
    }

    /// No site holds a page any more.
    fn clear_sites(&mut self) {
        let area = self.iem.core().tlb.area();
        let context = self.context();
        // SAFETY: the context lives as long as the engine, and generated code does not run now. It counts each site that it
        // puts a page in once, so there are no more than there are sites.
        unsafe {
            let count = std::mem::take(&mut (*context).live_sites) as usize;
            for n in 0..count.min(SITES) {
                let number = *area.as_ptr().add(LIVE_SITES_AT).cast::<u16>().add(n);
                (*area.as_ptr().add(SITES_AT).cast::<Site>().add(number.into()))[0] = NO_STACK;
            }
        }
    }

    #[cold]
    fn follow_flushes(&mut self) {
        let flushed = std::mem::take(&mut self.iem.core().flushed);
        if flushed.changed {
            let space = self.iem.core().tlb.space();
            while self.views <= space {
                self.clear_view(self.views, 1..2);
                self.views += 1;
            }
            let area = self.context();
            self.features.set_gs(area as u64);
        }
        if flushed.all {
            let jumps = std::mem::take(&mut self.cache.jumps);
            for (&(place, page), entry) in &jumps {
                self.clear_jumps(place, page, entry);
            }
            self.cache.local.clear();
            self.cache.users = Default::default();
        }
        if flushed.not_global {
            for (place, page) in std::mem::take(&mut self.cache.local) {
                self.clear_jump_page(place, page);
            }
        }
        for space in 0..SPACES {
            if flushed.spaces & 1 << space != 0 {
                self.clear_space(space);
            }
        }
        for (space, page) in flushed.pages {
            for place in [Placed::KERNEL, Placed::user(space.into()), Placed::OVERRIDE] {
                self.clear_jump_page(place, page);
            }
        }
    }

    /// Clears the slots that hold addresses of user code of an address space.
    fn clear_space(&mut self, space: usize) {
        let mut pages = std::mem::take(&mut self.cache.users[space]);
        for page in pages.drain(..) {
            self.clear_jump_page(Placed::user(space), page);
        }
        self.cache.users[space] = pages;
    }

    fn clear_jump_page(&mut self, place: Placed, page: u64) {
        if let Some(entry) = self.cache.jumps.remove(&(place, page)) {
            self.clear_jumps(place, page, &entry);
        }
    }

    fn clear_jumps(&mut self, place: Placed, page: u64, entry: &PageJumps) {
        let none = self.no_jump();
        for &slot in &entry.slots {
            let at = self.jump_slot(place.space(), place.bank(), slot.into());
            // SAFETY: a valid slot; generated code does not run now.
            unsafe {
                // Code that crosses into the page has an address in the one before.
                if page.wrapping_sub(linear_part((*at).tag.wrapping_neg()) & !0xfff) <= 0x1000 {
                    at.write(none);
                }
            }
        }
    }

    #[cold]
    fn follow_code_writes(&mut self) {
        match CodeWrites::get().since(&mut self.code_writes_seen) {
            Some(pages) => {
                for (page, stored) in pages {
                    if self.cache.pages.get(&page).is_some_and(Page::stale) {
                        self.drop_page(page);
                        if stored {
                            self.cache.rewritten.entry(page).or_default().stable = false;
                        }
                    }
                }
            }
            None => {
                let stale: Vec<u64> =
                    self.cache.pages.iter().filter(|(_, p)| p.stale()).map(|(&key, _)| key).collect();
                for page in stale {
                    self.drop_page(page);
                }
            }
        }
    }

    /// Forgets the translations of a page that was written.
    fn drop_page(&mut self, key: u64) {
        let Some(page) = self.cache.pages.remove(&key) else { return };
        self.stats.pages_dropped += 1;
        for index in page.blocks {
            self.drop_block(index);
        }
        if page.fleeting.is_none() {
            // Until code is translated from it again it can be written directly.
            page.source.memory.forget_code(page.source.page);
        }
    }

    /// Forgets one block.
    fn drop_block(&mut self, index: u32) {
        let block = &mut self.cache.blocks[index as usize];
        let place = (block.page + u64::from(block.start), block.mode);
        self.cache.recent.forget(place.0);
        if self.cache.by_place.get(&place) == Some(&index) {
            self.cache.by_place.remove(&place);
        }
        let (checked, incoming) = (block.checked.take(), std::mem::take(&mut block.incoming));
        if let Some(entry) = checked {
            self.code.put(entry as usize, &[0xe9]);
            self.code.aim(entry as usize + 1, (self.thunks.unknown - self.code.base()) as usize);
        }
        for link in incoming {
            let link = self.cache.links[link as usize];
            self.code.aim(link.site as usize, link.stub as usize);
        }
    }

    /// A verifying block found other bytes than its own.
    fn block_stale(&mut self, index: u32) {
        let Some(key) = self.cache.blocks.get(index as usize).map(|b| b.page) else { return };
        self.stats.blocks_stale += 1;
        self.drop_block(index);
        if let Some(page) = self.cache.pages.get_mut(&key) {
            page.blocks.retain(|&b| b != index);
            if let Some(fleeting) = &page.fleeting {
                let known = self.cache.rewritten.get(&key).copied().unwrap_or_default();
                fleeting.left.store(known.patience(), Ordering::Relaxed);
            }
        }
    }

    /// Blocks of a page have found their own bytes for long. If immediate operands have not changed either, its writes are noticed
    /// again from now on.
    fn page_settled(&mut self, index: u32) {
        let Some(page) = self.cache.blocks.get(index as usize).map(|b| b.page) else { return };
        let known = self.cache.rewritten.entry(page).or_default();
        if let Some(Page { source, fleeting: Some(fleeting), .. }) = self.cache.pages.get_mut(&page) {
            let (from, to) = fleeting.extent;
            let now = &mut self.bytes[from.into()..to.into()];
            source.memory.read((source.page << 12) + u64::from(from), now);
            let mut hasher = IntHasher::default();
            hasher.write(now);
            if hasher.finish() != std::mem::replace(&mut fleeting.seen, hasher.finish()) {
                fleeting.left.store(known.patience(), Ordering::Relaxed);
                return;
            }
        }
        self.drop_page(page);
        let known = self.cache.rewritten.entry(page).or_default();
        known.settled = known.settled.saturating_add(1);
        known.stable = true;
    }

    /// Forgets everything, because the code memory is full.
    #[cold]
    fn drop_all(&mut self) {
        self.stats.cache_flushes += 1;
        let jumps = std::mem::take(&mut self.cache.jumps);
        for ((place, page), entry) in &jumps {
            self.clear_jumps(*place, *page, entry);
        }
        self.cache = Cache::default();
        self.clear_sites();
        self.code.truncate(self.kept.0, self.kept.1);
        self.pending_link = None;
    }

    // ---- modes ----

    fn find_way(&mut self, cpu: &CpuState) -> Way {
        if !self.unit_live {
            let area = &cpu.xsave.0;
            let control = u16::from_le_bytes([area[0], area[1]]);
            let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
            self.masked = control & 0x3f == 0x3f && mxcsr >> 7 & 0x3f == 0x3f;
        }
        let core = self.iem.core();
        if core.special {
            return Way::Step;
        }
        // What is translated for the kernel runs at privilege 0.
        if matches!(cpu.cpl(), 1 | 2) {
            return Way::Interpret;
        }
        let bank = match core.bank {
            Bank::Supervisor => 0,
            Bank::User => 1,
            Bank::Override => 2,
            Bank::Slow => return Way::Interpret,
        };
        let long = core.long;
        let flat = |s: usize| {
            let segment = &cpu.seg[s];
            segment.limit == u32::MAX
                && !segment.attr.unusable()
                && (s == seg::CS || segment.attr.kind() & 0xe == 2)
        };
        let mut segments = None;
        if !long {
            let code = &cpu.seg[seg::CS];
            let flat = cpu.is_protected()
                && code.attr.big()
                && cpu.seg[seg::SS].attr.big()
                && [seg::CS, seg::SS, seg::DS, seg::ES].iter().all(|&s| flat(s) && cpu.seg[s].base == 0);
            if !flat {
                segments = Some(Segments {
                    big: code.attr.big(),
                    big_stack: cpu.seg[seg::SS].attr.big(),
                    real: loads_as_real(cpu),
                    ip: 0,
                });
            }
            // Offsets in translated code wrap as the limit wants it, or have none.
            let limit = if code.attr.big() { u32::MAX } else { 0xffff };
            if code.limit < limit || cpu.rip > u32::MAX.into() {
                return Way::Interpret;
            }
        }
        let no_em_ts = cpu.cr0 & (cr0::EM | cr0::TS) == 0 && self.masked;
        let mode = Mode {
            long,
            bank,
            x87: no_em_ts,
            sse: no_em_ts && cpu.cr4 & cr4::OSFXSR != 0,
            avx: no_em_ts
                && cpu.is_protected()
                && cpu.cr4 & cr4::OSXSAVE != 0
                && cpu.xcr0 & 6 == 6
                && self.features.avx,
            fs_gs: long || flat(seg::FS) && flat(seg::GS),
            plain: false,
            smap: cpu.cr4 & cr4::SMAP != 0,
            tsc: self.tsc.is_some() && (bank != 1 || cpu.cr4 & cr4::TSD == 0),
            fsgsbase: cpu.cr4 & cr4::FSGSBASE != 0,
            segments,
        };
        self.follow_mode(cpu, mode);
        Way::Native(mode)
    }

    /// Sees to it that the jump cache holds code of this mode only, and that generated code knows what it may do.
    fn follow_mode(&mut self, cpu: &CpuState, mode: Mode) {
        let (common, own, bank) = (mode.common(), mode.own(), usize::from(mode.bank));
        let stale: [bool; JUMP_BANKS] = if common != self.common {
            self.common = common;
            [true; JUMP_BANKS]
        } else if mode.segments.is_none() && own != self.own[bank] {
            std::array::from_fn(|b| b == bank || bank != 1 && b != 1)
        } else {
            [false; JUMP_BANKS]
        };
        if stale.contains(&true) {
            let mut jumps = std::mem::take(&mut self.cache.jumps);
            jumps.retain(|&(place, page), entry| {
                let stale = stale[place.bank()];
                if stale {
                    self.clear_jumps(place, page, entry);
                }
                !stale
            });
            self.cache.jumps = jumps;
            for (b, kept) in self.own.iter_mut().enumerate() {
                if stale[b] && mode.segments.is_none() && (b == 1) == (bank == 1) {
                    *kept = own;
                }
            }
        }
        let msrs = [cpu.msr.star, cpu.msr.lstar, cpu.msr.sfmask];
        let (kernel, user) = (self.own[0], self.own[1]);
        let context = self.context();
        // SAFETY: the context lives as long as the engine, and generated code does not run now.
        unsafe {
            if msrs != self.syscall_msrs {
                (*context).lstar = cpu.msr.lstar;
                (*context).syscall_keeps = !cpu.msr.sfmask & !rflags::RF | rflags::FIXED;
                let (cs, ss) = iem::syscall_segments(cpu.msr.star);
                (*context).kernel_segments = [cs, ss];
                let (cs, ss) = iem::sysret_segments(cpu.msr.star);
                (*context).user_segments = [cs, ss];
            }
            let enabled = cpu.msr.efer & efer::SCE != 0;
            let masks = rflags::TF | rflags::AC | rflags::IF;
            (*context).syscall_ok =
                u64::from(enabled && kernel == (true, true) && cpu.msr.sfmask & masks == masks);
            (*context).sysret_ok = u64::from(enabled && user == (true, true));
            // IRET to the segments of SYSRET, if their descriptors are as usual (which it looks at itself), and no segment
            // has to be dropped.
            let [cs, ss] = (*context).user_segments;
            let droppable = |s: usize| {
                let attr = cpu.seg[s].attr;
                !attr.unusable() && attr.dpl() < 3
            };
            let inner = [seg::ES, seg::DS, seg::FS, seg::GS].into_iter().any(droppable);
            let table = u64::from(cpu.gdtr.limit) >= u64::from(cs.selector | 7) && ss.selector & 4 == 0;
            (*context).iret_ok = u64::from(
                user == (true, true) && !inner && table && ss.selector & !7 != 0 && !cpu.nmi_blocked,
            );
            (*context).iret_descriptors = cpu.gdtr.base.wrapping_add(u64::from(ss.selector & !7));
            (*context).iret_selectors = [cs.selector.into(), ss.selector.into()];
        }
        self.syscall_msrs = msrs;
    }

    // ---- floating-point state ----

    /// What to add to the host's time-stamp counter, if the machine's clock follows it at the rate of the guest's.
    fn host_tsc(&self) -> Option<u64> {
        let anchor = self.ctx.clock.anchor()?;
        let same = self.ctx.clock.counter_hz() == Some(self.ctx.tsc_frequency.0);
        same.then(|| tm::ticks(anchor.time, self.ctx.tsc_frequency.0).wrapping_sub(anchor.counter))
    }

    fn unit_to_memory(&mut self, cpu: &mut CpuState) {
        if !self.unit_live {
            return;
        }
        self.stats.unit_moves += 1;
        self.unit_live = false;
        let avx = self.features.avx;
        // SAFETY: the context lives as long as the engine, and generated code does not run now.
        let area = unsafe { &mut (*self.context()).xsave };
        host::save_unit(area);
        host::reset_unit();
        // SAFETY: as above.
        let vectors = unsafe { &(*self.context()).vectors };
        for (i, vector) in vectors.iter().enumerate() {
            area.0[160 + 16 * i..][..16].copy_from_slice(&vector.0[..16]);
            if avx {
                area.0[576 + 16 * i..][..16].copy_from_slice(&vector.0[16..]);
            }
        }
        // Header: x87 and SSE always, AVX where its registers were kept; without them it is as it was loaded.
        area.0[512] = if avx { 7 } else { area.0[512] & 4 | 3 };
        cpu.xsave.clone_from(area);
        // The masks may change behind this.
        self.iem.core().resync = true;
    }

    fn unit_to_host(&mut self, cpu: &CpuState) {
        self.unit_live = true;
        // SAFETY: as in `unit_to_memory`.
        let area = unsafe { &mut (*self.context()).xsave };
        area.clone_from(&cpu.xsave);
        if area.0[512] & 4 == 0 {
            area.0[576..XsaveArea::SIZE].fill(0);
        }
        host::load_unit(area);
        // SAFETY: as above.
        let vectors = unsafe { &mut (*self.context()).vectors };
        for (i, vector) in vectors.iter_mut().enumerate() {
            vector.0[..16].copy_from_slice(&area.0[160 + 16 * i..][..16]);
            vector.0[16..].copy_from_slice(&area.0[576 + 16 * i..][..16]);
        }
    }

    // ---- native ----

    fn interpret(&mut self, cpu: &mut CpuState, fp: bool) -> Result<(), Exit> {
        if fp {
            self.stats.interpreted_fp += 1;
            self.unit_to_memory(cpu);
        } else {
            self.stats.interpreted += 1;
        }
        let pc = Iem::pc(self.iem.core(), cpu);
        let result = if self.is_fleeting(pc) { self.iem.step_fleeting(cpu) } else { self.iem.step(cpu) };
        self.iem.core().sync_flags(cpu);
        result
    }

    /// The code at `pc` lies in a page whose writes are not noticed.
    fn is_fleeting(&mut self, pc: u64) -> bool {
        if self.cache.rewritten.is_empty() {
            return false;
        }
        let core = self.iem.core();
        let bank = core.code_bank();
        let Some(at) = core.tlb.fetch(bank, pc) else { return false };
        self.cache.pages.get(&(at & !0xfff)).is_some_and(|page| page.fleeting.is_some())
    }

    fn native(&mut self, cpu: &mut CpuState, mode: Mode) -> Result<(), Exit> {
        let mut mode = Mode { plain: std::mem::take(&mut self.plain), ..mode };
        self.iem.core().sync_flags(cpu);
        let pc = Iem::pc(self.iem.core(), cpu);
        let inside = self.in_segment(cpu, pc, &mut mode);
        if self.unknown
            && inside
            && let Some(recent) = self.recent(pc, mode)
        {
            self.unknown = false;
            self.enter_jump(pc, mode, recent.checked, None);
            return self.enter(cpu, pc, mode, self.code.base() + u64::from(recent.entry));
        }
        let Some(index) = inside.then(|| self.find(cpu, pc, mode)).flatten() else {
            self.pending_link = None;
            self.unknown = false;
            return self.interpret(cpu, true);
        };
        let pending = self.pending_link.take();
        let unknown = std::mem::take(&mut self.unknown);
        let block = &self.cache.blocks[index as usize];
        if let Some(fp) = block.interpret {
            let page = block.page;
            if self.cache.pages.get(&page).is_some_and(|page| page.fleeting.is_some()) {
                // Nothing verifies that it still is what it was.
                self.drop_block(index);
            }
            return self.interpret(cpu, fp);
        }
        let entry = self.code.base() + u64::from(block.entry);
        if let Some(number) = pending
            && let Some(&link) = self.cache.links.get(number as usize)
            && link.page == block.page
            && link.target == block.start
            && link.mode.number() == block.mode
            && block.second.is_none()
        {
            self.stats.linked += 1;
            self.code.aim(link.site as usize, block.entry as usize);
            self.cache.blocks[index as usize].incoming.push(number);
        }
        if unknown && !mode.plain {
            self.remember(pc, mode, index);
        }
        let losses = self.iem.core().tlb.losses();
        if losses != self.losses_seen {
            self.follow();
        }
        self.enter(cpu, pc, mode, entry)
    }

    /// The block at `pc`, if a jump through the jump cache led to it before, and nothing has to be looked at again.
    fn recent(&mut self, pc: u64, mode: Mode) -> Option<Recent> {
        if mode.plain || self.pending_link.is_some() {
            return None;
        }
        let core = self.iem.core();
        let bank = core.code_bank();
        let at = core.tlb.fetch(bank, pc)?;
        self.cache.recent.get(at, mode.number())
    }

    /// Sees to what code in segments needs; false if the instruction pointer is outside.
    fn in_segment(&mut self, cpu: &CpuState, pc: u64, mode: &mut Mode) -> bool {
        let Some(segments) = &mut mode.segments else {
            self.code_number = 0;
            return true;
        };
        if !segments.big {
            if cpu.rip > 0xffff {
                return false;
            }
            segments.ip = cpu.rip as i32 - (pc & 0xfff) as i32;
        }
        let base = cpu.seg[seg::CS].base;
        let (number, anew) = self.segments.number(base, segments.kind());
        if anew {
            let jumps = std::mem::take(&mut self.cache.jumps);
            for (&(place, page), entry) in &jumps {
                self.clear_jumps(place, page, entry);
            }
        }
        (self.code_base, self.code_number) = (base, number);
        true
    }

    /// Where generated code said how far it came in a segment, makes that an offset.
    pub(crate) fn settle_rip(&self, cpu: &mut CpuState) {
        if cpu.rip >> 62 == 1 {
            cpu.rip = linear_part(cpu.rip).wrapping_sub(self.code_base) & 0xffff_ffff;
        }
    }

    /// The accesses behind a check lie in two pages, or in one that needs more than a copy. Where that happens time and again the
    /// check goes straight to the code with plain accesses, which is right wherever they go.
    pub(crate) fn not_kept(&mut self, number: u32) {
        const OFTEN: u8 = 16;
        let Some(link) = self.cache.links.get_mut(number as usize) else { return };
        link.failures = link.failures.saturating_add(1);
        if link.failures == OFTEN
            && let Some((site, plain)) = link.check
        {
            self.code.aim(site as usize, plain as usize);
        }
    }

    /// Has the block with the check of a kept page with this number translated anew, so that it goes through the TLB.
    pub(crate) fn without_place(&mut self, number: u32) {
        let Some(&(at, block)) = self.cache.places.get(number as usize) else { return };
        self.stats.places_given_up += 1;
        let page = self.cache.blocks[block as usize].page;
        self.cache.moving.insert(page + u64::from(at));
        self.drop_block(block);
    }

    /// Runs generated code from `entry` on.
    fn enter(&mut self, cpu: &mut CpuState, pc: u64, mode: Mode, entry: u64) -> Result<(), Exit> {
        if self.masked && !self.unit_live {
            self.unit_to_host(cpu);
        }
        self.stats.entered += 1;
        let bank = usize::from(mode.bank);
        let rem: *mut Self = self;
        let context = self.context();
        // SAFETY: the context lives as long as the engine. Generated code reaches the engine (in `slow`) and the CPU state through
        // the pointers in it while nothing here uses them; `Thunks::enter` keeps to the calling convention.
        let why = unsafe {
            (*context).rem = rem;
            (*context).cpu = cpu;
            (*context).entry = entry;
            (*context).area = context.expose_provenance() as u64;
            (*context).page = pc & !0xfff | (*rem).code_number;
            if mode.segments.is_some() {
                (*context).code_base = (*rem).code_base;
                (*context).code_number = (*rem).code_number;
                for s in 0..6 {
                    (*context).seg_base[s] = cpu.seg[s].base;
                    ((*context).seg_read[s], (*context).seg_write[s]) = reach(cpu, s);
                }
            }
            (*context).fs_base = cpu.seg[seg::FS].base;
            (*context).gs_base = cpu.seg[seg::GS].base;
            [(*context).stack_page, (*context).delta] = (*context).stacks[bank];
            (*context).bank = bank as u64;
            (*context).resync = 0;
            (*context).tsc_add = (*rem).tsc.map_or(0, |add| add.wrapping_add(cpu.msr.tsc_offset));
            let thunk: extern "sysv64" fn() -> u64 =
                std::mem::transmute((*rem).thunks.enter as usize as *const ());
            thunk()
        };
        // SAFETY: as above.
        unsafe {
            (*context).stacks[((*context).bank as usize).min(JUMP_BANKS - 1)] =
                [(*context).stack_page, (*context).delta];
            if (*context).resync != 0 {
                self.iem.core().update_mode(cpu);
                self.way = self.find_way(cpu);
            }
        }
        self.settle_rip(cpu);
        if !mode.long && !cpu.is_64bit() {
            cpu.rip &= 0xffff_ffff;
        }
        let why_now = why & 7;
        if matches!(why_now, reason::GO_ON | reason::UNKNOWN)
            && self.link.kick_word().load(Ordering::Relaxed) != 0
        {
            let pc = Iem::pc(self.iem.core(), cpu);
            self.sample(pc);
        }
        match why_now {
            reason::INTERPRET => self.after_native(cpu, false),
            reason::INTERPRET_FP => self.after_native(cpu, true),
            reason::LINK => {
                let number = (why >> 3) as u32;
                self.pending_link = Some(number);
                self.plain = self.cache.links.get(number as usize).is_some_and(|l| l.mode.plain);
                Ok(())
            }
            reason::STALE => {
                self.block_stale((why >> 3) as u32);
                Ok(())
            }
            reason::SETTLED => {
                self.page_settled((why >> 3) as u32);
                Ok(())
            }
            reason::UNKNOWN => {
                self.stats.unknown_jumps += 1;
                self.unknown = true;
                Ok(())
            }
            _ => match self.raised.take() {
                Some(exit) => Err(exit),
                None => Ok(()),
            },
        }
    }

    /// Delivers a fault that a memory access of generated code met.
    pub(crate) fn raise(&mut self, cpu: &mut CpuState, fault: iem::Fault) {
        self.settle_rip(cpu);
        self.iem.core().sync_flags(cpu);
        self.raised = self.iem.raise_fault(cpu, fault).err();
    }

    /// Has the instruction at RIP interpreted, unless somebody wants attention first.
    fn after_native(&mut self, cpu: &mut CpuState, fp: bool) -> Result<(), Exit> {
        self.last_slow = (0, 0);
        if self.link.kick_word().load(Ordering::Acquire) != 0 {
            return Ok(());
        }
        self.interpret(cpu, fp)
    }
}

/// The highest offsets of a segment that may be read and written outside 64-bit code; below zero if none may be, or if that takes a
/// closer look.
fn reach(cpu: &CpuState, s: usize) -> (i64, i64) {
    let segment = &cpu.seg[s];
    let attr = segment.attr;
    let (code, down) = (attr.kind() & 8 != 0, attr.kind() & 0xc == 4);
    if down || attr.unusable() {
        return (-1, -1);
    }
    let limit = i64::from(segment.limit);
    if !cpu.is_protected() {
        return (limit, limit);
    }
    let may = attr.kind() & 2 != 0;
    (if may || !code { limit } else { -1 }, if may && !code { limit } else { -1 })
}

/// Whether loading a segment register other than CS changes nothing but selector and base.
fn loads_as_real(cpu: &CpuState) -> bool {
    !cpu.is_protected()
        && cpu.rflags & rflags::VM == 0
        && [seg::DS, seg::ES, seg::FS, seg::GS, seg::SS].iter().all(|&s| {
            let attr = cpu.seg[s].attr;
            attr.kind() == 3 && attr.code_or_data() && attr.present() && !attr.unusable() && attr.dpl() == 0
        })
}

fn announced(cpuid: &cpum::CpuidTable, feature: CpuidFeature) -> bool {
    use cpum::cpuid::bit;
    match feature {
        CpuidFeature::BMI1 => cpuid.has(bit::BMI1) && std::is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => cpuid.has(bit::BMI2) && std::is_x86_feature_detected!("bmi2"),
        CpuidFeature::LZCNT => cpuid.has(bit::LZCNT) && std::is_x86_feature_detected!("lzcnt"),
        CpuidFeature::POPCNT => cpuid.has(bit::POPCNT) && std::is_x86_feature_detected!("popcnt"),
        CpuidFeature::MOVBE => cpuid.has(bit::MOVBE) && std::is_x86_feature_detected!("movbe"),
        CpuidFeature::ADX => cpuid.has(bit::ADX) && std::is_x86_feature_detected!("adx"),
        CpuidFeature::CX8 => cpuid.has(bit::CX8),
        CpuidFeature::SSE4_2 => cpuid.has(bit::SSE42) && std::is_x86_feature_detected!("sse4.2"),
        CpuidFeature::CMPXCHG16B => cpuid.has(bit::CX16) && std::is_x86_feature_detected!("cmpxchg16b"),
        _ => false,
    }
}

impl Engine for Rem {
    fn name(&self) -> &'static str {
        "REM"
    }

    fn run(&mut self, cpu: &mut CpuState) -> Exit {
        match cpu.activity {
            Activity::Running => {}
            Activity::Halted => return Exit::Halt,
            Activity::WaitForSipi => return Exit::Attention,
            Activity::Shutdown => return Exit::TripleFault,
        }
        self.link.enter_guest();
        self.iem.core().resync = true;
        let area = self.context();
        // SAFETY: the link lives as long as the engine.
        unsafe {
            (*area).kick = self.link.kick_word();
            (*area).actions = self.link.actions_word();
        }
        self.tsc = self.host_tsc();
        self.features.set_gs(area as u64);
        host::announce(self.code.base(), self.code.len() as u64, self.thunks.host_fault);
        let exit = self.run_inner(cpu);
        self.unit_to_memory(cpu);
        self.iem.core().sync_flags(cpu);
        self.pending_link = None;
        self.unknown = false;
        self.plain = false;
        self.link.leave_guest();
        self.iem.core().stats.exits += 1;
        exit
    }

    fn inject(&mut self, cpu: &mut CpuState, what: Event) -> Result<(), Exit> {
        self.iem.inject(cpu, what)
    }

    fn state_changed(&mut self, cpu: &CpuState) {
        self.iem.state_changed(cpu);
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let s = &self.stats;
        let mut all = vec![
            ("blocks translated", s.translated),
            ("instructions translated", s.translated_instructions),
            ("bytes translated", s.translated_bytes),
            ("code bytes used", self.code.used() as u64),
            ("blocks held", self.cache.by_place.len() as u64),
            ("native entries", s.entered),
            ("instructions interpreted from native code", s.interpreted),
            ("floating-point instructions interpreted", s.interpreted_fp),
            ("moves of the floating-point state", s.unit_moves),
            ("jumps not in the jump cache", s.unknown_jumps),
            ("links made", s.linked),
            ("slow memory accesses", s.slow_accesses),
            ("stack pages looked up", s.stack_pages),
            ("pages of groups of accesses looked up", s.group_pages),
            ("kept pages given up", s.places_given_up),
            ("data writes beside code", s.data_beside_code),
            ("code pages dropped", s.pages_dropped),
            ("code pages found warm", s.pages_warm),
            ("code pages found hot", s.pages_hot),
            ("blocks that verify their bytes translated", s.fleeting),
            ("blocks that found other bytes", s.blocks_stale),
            ("code cache flushes", s.cache_flushes),
        ];
        all.extend(self.iem.statistics());
        all
    }
}
