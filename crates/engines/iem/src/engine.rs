//! The run loop behind [`em::Engine`].

use std::sync::Arc;

use cpum::state::{rflags, seg};
use cpum::{Activity, CpuState, ForcedActions};
use em::{Engine, Event, Exit, VmContext};
use vbox_types::VcpuId;

use crate::block::{Block, Blocks, MAX_LEN, Source, decode_block};
use crate::core::Core;
use crate::op::{Op, VIA_SS};
use crate::tlb::Frame;
use crate::unit::Unit;
use crate::{Fault, Vector, debug, event};

/// The interpreter for one vCPU.
pub struct Iem {
    core: Core,
    blocks: Blocks,
}

/// Where the block to run is.
enum Found {
    Kept(u32),
    /// For once: code outside memory, or at the end of a segment.
    Single(Box<Block>),
    /// Translations must be looked up again.
    Retry,
}

/// A fault and whether its operation works on the stack segment.
struct Raised {
    fault: Fault,
    via_ss: bool,
}

impl Iem {
    /// An interpreter for vCPU `id`; fails if the host gives no memory for the execution unit's code.
    pub fn new(ctx: Arc<VmContext>, id: VcpuId) -> std::io::Result<Self> {
        let unit = Unit::new(&ctx.cpuid)?;
        Ok(Self { core: Core::new(ctx, id, unit), blocks: Blocks::default() })
    }

    /// The engine's state and memory access path.
    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// One round of the run loop.
    #[inline(always)]
    fn run_once<const ONE: bool>(&mut self, cpu: &mut CpuState) -> Option<Exit> {
        let pending = self.core.link.pending();
        if !pending.is_empty()
            && let Some(exit) = self.attend(cpu, pending)
        {
            return Some(exit);
        }
        if self.core.resync {
            self.core.update_mode(cpu);
            self.core.drop_resume_flag(cpu);
        }
        let result = if self.core.special { self.step(cpu) } else { self.run_blocks::<ONE>(cpu) };
        match result {
            Err(exit) => Some(exit),
            Ok(()) if self.core.stop => self.core.exit.take(),
            Ok(()) => None,
        }
    }

    /// Has `run` run guest code, in guest.
    fn run_guest<R>(&mut self, cpu: &mut CpuState, run: impl FnOnce(&mut Self, &mut CpuState) -> R) -> R {
        self.core.link.enter_guest();
        self.core.resync = true;
        let result = run(self, cpu);
        self.core.sync_flags(cpu);
        self.core.link.leave_guest();
        result
    }

    /// Executes the one instruction at the CPU's place, or delivers the fault that it raises. `None`: EM has nothing to decide.
    pub fn run_instruction(&mut self, cpu: &mut CpuState) -> Option<Exit> {
        self.run_guest(cpu, |iem, cpu| {
            iem.core.take_flush_requests();
            iem.core.update_mode(cpu);
            match iem.step(cpu) {
                Err(exit) => Some(exit),
                Ok(()) if iem.core.stop => iem.core.exit.take(),
                Ok(()) => None,
            }
        })
    }

    /// Delivers an exception that another engine's CPU has raised: CR2 and DR6 are as it left them.
    pub fn deliver_exception(&mut self, cpu: &mut CpuState, fault: Fault) -> Result<(), Exit> {
        self.deliver(cpu, |core, cpu| {
            core.fault_address = cpu.cr2;
            event::raise(core, cpu, fault)
        })
    }

    /// Has `deliver` deliver an event between two instructions.
    fn deliver<R>(&mut self, cpu: &mut CpuState, deliver: impl FnOnce(&mut Core, &mut CpuState) -> R) -> R {
        self.core.link.enter_guest();
        self.core.take_flush_requests();
        self.core.update_mode(cpu);
        let result = deliver(&mut self.core, cpu);
        self.core.resync = true;
        self.core.link.leave_guest();
        result
    }

    /// Looks at what other threads want; gives the exit if EM must act.
    #[cold]
    pub fn attend(&mut self, cpu: &CpuState, pending: ForcedActions) -> Option<Exit> {
        self.core.take_flush_requests();
        let always = ForcedActions::INIT.union(ForcedActions::SIPI).union(ForcedActions::EM);
        let inhibited = cpu.inhibit_rip == Some(cpu.rip);
        let wanted = pending.intersects(always)
            || pending.contains(ForcedActions::NMI) && !cpu.nmi_blocked && !inhibited
            || pending.contains(ForcedActions::INTERRUPT) && cpu.rflags & rflags::IF != 0 && !inhibited;
        wanted.then_some(Exit::Attention)
    }

    #[inline(always)]
    pub fn pc(core: &Core, cpu: &CpuState) -> u64 {
        if core.long { cpu.rip } else { cpu.seg[seg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff }
    }

    /// Runs guest code until about `count` more instructions were executed: to the end of the block that reaches the count. `None`: EM has
    /// nothing to decide. For tools that need the same boundaries in every run.
    pub fn run_counted(&mut self, cpu: &mut CpuState, count: u64) -> Option<Exit> {
        let end = self.core.stats.instructions.saturating_add(count);
        self.run_guest(cpu, |iem, cpu| {
            while iem.core.stats.instructions < end {
                if let Some(exit) = iem.run_once::<true>(cpu) {
                    return Some(exit);
                }
            }
            None
        })
    }

    /// Runs the block at the CPU's place and those that follow it until somebody wants attention.
    #[inline(always)]
    pub fn run_block(&mut self, cpu: &mut CpuState) -> Result<(), Exit> {
        self.run_blocks::<false>(cpu)
    }

    /// Runs the block at the CPU's place, and unless `ONE` those that follow it until somebody wants attention.
    #[inline(always)]
    fn run_blocks<const ONE: bool>(&mut self, cpu: &mut CpuState) -> Result<(), Exit> {
        let pc = Self::pc(&self.core, cpu);
        let found = match self.blocks.jump(pc, self.core.key) {
            Some(index) => Ok(Found::Kept(index)),
            None => find(&mut self.core, &mut self.blocks, cpu, pc, false),
        };
        let Self { core, blocks } = self;
        let result = match &found {
            Ok(Found::Kept(index)) => match chain::<ONE>(core, blocks, cpu, *index) {
                Some(result) => result,
                None => return self.step(cpu),
            },
            Ok(Found::Single(block)) => execute(core, cpu, block),
            Ok(Found::Retry) => Ok(()),
            Err(fault) => Err(Raised { fault: *fault, via_ss: false }),
        };
        match result {
            Ok(()) if core.breakpoints == 0 => Ok(()),
            Ok(()) => {
                let bits = std::mem::take(&mut core.breakpoints);
                event::debug_trap(core, cpu, bits)
            }
            Err(raised) => self.raise(cpu, raised),
        }
    }

    #[cold]
    #[inline(never)]
    fn raise(&mut self, cpu: &mut CpuState, raised: Raised) -> Result<(), Exit> {
        let core = &mut self.core;
        core.resync = true;
        core.breakpoints = 0;
        let mut fault = raised.fault;
        if core.noncanonical && fault == Fault::GP0 && raised.via_ss {
            fault = Fault::SS0;
        }
        core.noncanonical = false;
        event::raise(core, cpu, fault)
    }

    /// Runs one instruction as [`Iem::step`] does, from a page that is written so often that its writes are not to be noticed.
    pub fn step_fleeting(&mut self, cpu: &mut CpuState) -> Result<(), Exit> {
        self.core.fleeting = true;
        let result = self.step(cpu);
        self.core.fleeting = false;
        result
    }

    /// Delivers a fault of the instruction at the CPU's place.
    pub fn raise_fault(&mut self, cpu: &mut CpuState, fault: Fault) -> Result<(), Exit> {
        self.raise(cpu, Raised { fault, via_ss: false })
    }

    /// Runs one instruction with all that single-stepping, breakpoints and interrupt shadows ask for.
    #[cold]
    #[inline(never)]
    pub fn step(&mut self, cpu: &mut CpuState) -> Result<(), Exit> {
        self.core.resync = true;
        let pc = Self::pc(&self.core, cpu);
        let in_stack_shadow = std::mem::take(&mut self.core.no_trap) && cpu.inhibit_rip == Some(cpu.rip);
        if cpu.rflags & rflags::RF == 0 && !in_stack_shadow {
            let hits = debug::match_instruction(cpu, pc);
            if hits != 0 {
                cpu.dr6 |= hits;
                return event::raise(&mut self.core, cpu, Fault::DB);
            }
        }
        let found = find(&mut self.core, &mut self.blocks, cpu, pc, true);
        let Self { core, blocks } = self;
        let block = match &found {
            Ok(Found::Kept(index)) => &blocks.list[*index as usize],
            Ok(Found::Single(block)) => block,
            Ok(Found::Retry) => return Ok(()),
            Err(fault) => {
                let fault = *fault;
                return self.raise(cpu, Raised { fault, via_ss: false });
            }
        };
        let stepping = cpu.rflags & rflags::TF != 0;
        // The shadow and the resume flag last for this instruction only, unless it sets them anew.
        cpu.inhibit_rip = None;
        let resumed = cpu.rflags & rflags::RF;
        cpu.rflags &= !rflags::RF;
        if let Err(raised) = execute_one(core, cpu, block) {
            cpu.rflags |= resumed;
            return self.raise(cpu, raised);
        }
        let mut bits = std::mem::take(&mut core.breakpoints);
        if stepping && !core.no_trap {
            bits |= debug::BS;
        }
        if cpu.inhibit_rip.is_none() {
            core.no_trap = false;
        }
        if bits != 0 && core.exit.is_none() { event::debug_trap(core, cpu, bits) } else { Ok(()) }
    }
}

#[inline(always)]
fn raised(op: &Op, fault: Fault) -> Raised {
    Raised { fault, via_ss: op.flags & VIA_SS != 0 }
}

/// Runs a valid block and those that follow it, as long as they are known and nobody wants attention. `None`: the block reaches
/// past its segment.
#[inline(always)]
fn chain<const ONE: bool>(
    core: &mut Core,
    blocks: &Blocks,
    cpu: &mut CpuState,
    mut index: u32,
) -> Option<Result<(), Raised>> {
    let mut first = true;
    loop {
        let block = &blocks.list[index as usize];
        if !core.long && cpu.rip + (block.len - 1) > cpu.seg[seg::CS].limit.into() {
            return if first { None } else { Some(Ok(())) };
        }
        first = false;
        let result = execute(core, cpu, block);
        if ONE || result.is_err() || core.stop || core.resync || !core.link.pending().is_empty() {
            return Some(result);
        }
        let pc = Iem::pc(core, cpu);
        index = match block.next(pc, core.key) {
            Some(next) if blocks.list[next as usize].valid() => next,
            _ => match blocks.jump(pc, core.key) {
                Some(next) => {
                    block.link(pc, core.key, next);
                    next
                }
                None => return Some(Ok(())),
            },
        };
    }
}

/// Runs a block to its end, or until an instruction asks to stop.
#[inline(always)]
fn execute(core: &mut Core, cpu: &mut CpuState, block: &Block) -> Result<(), Raised> {
    core.stop = false;
    core.stats.blocks += 1;
    let mut rip = cpu.rip;
    for (n, op) in block.body.iter().enumerate() {
        cpu.rip = rip;
        if let Err(fault) = (op.run)(core, cpu, op) {
            core.stats.instructions += n as u64;
            return Err(raised(op, fault));
        }
        rip = rip.wrapping_add(op.len.into());
        if core.stop {
            core.stats.instructions += n as u64 + 1;
            core.resync = true;
            cpu.rip = if core.long { rip } else { rip & 0xffff_ffff };
            return Ok(());
        }
    }
    cpu.rip = rip;
    core.stats.instructions += block.body.len() as u64;
    if let Some(op) = &block.branch {
        if let Err(fault) = (op.run)(core, cpu, op) {
            return Err(raised(op, fault));
        }
        core.stats.instructions += 1;
    } else if !core.long {
        cpu.rip = rip & 0xffff_ffff;
    }
    core.resync |= block.system;
    Ok(())
}

/// Runs the first instruction of a block.
fn execute_one(core: &mut Core, cpu: &mut CpuState, block: &Block) -> Result<(), Raised> {
    core.stop = false;
    core.stats.instructions += 1;
    match (block.body.first(), &block.branch) {
        (Some(op), _) => {
            let rip = cpu.rip;
            (op.run)(core, cpu, op).map_err(|fault| raised(op, fault))?;
            let next = rip.wrapping_add(op.len.into());
            cpu.rip = if core.long { next } else { next & 0xffff_ffff };
        }
        (None, Some(op)) => (op.run)(core, cpu, op).map_err(|fault| raised(op, fault))?,
        (None, None) => {}
    }
    Ok(())
}

/// Finds or decodes the block at linear address `pc`. With `single`, only the first instruction will run, and blocks that reach
/// past the end of the code segment are cut to it.
#[inline(never)]
fn find(core: &mut Core, blocks: &mut Blocks, cpu: &CpuState, pc: u64, single: bool) -> Result<Found, Fault> {
    let limit = u64::from(cpu.seg[seg::CS].limit);
    if !core.long && cpu.rip > limit {
        return Err(Fault::GP0);
    }
    let size = core.key & 3;
    let room = if core.long { u64::MAX } else { limit - cpu.rip };
    if let Some(at) = core.tlb.fetch(core.code_bank(), pc)
        && let Some(index) = blocks.find(at, size)
    {
        let block = &blocks.list[index as usize];
        let fits = !single || block.len - 1 <= room;
        if fits && block.valid() {
            match &block.second {
                None => {
                    blocks.remember(pc, core.key, index);
                    return Ok(Found::Kept(index));
                }
                Some((key, _)) => {
                    let key = *key;
                    let next = (pc & !0xfff).wrapping_add(0x1000);
                    let (_, frame) = core.place_code(cpu, next)?;
                    if frame.is_some_and(|f| f.key() == key) {
                        return Ok(Found::Kept(index));
                    }
                }
            }
        }
    }
    // Instructions that are stepped over time and again keep their blocks as others do; only at the end of a segment must one
    // stand alone.
    build(core, blocks, cpu, pc, single && (room < 0x1000 || core.fleeting), room)
}

fn build(
    core: &mut Core,
    blocks: &mut Blocks,
    cpu: &CpuState,
    pc: u64,
    single: bool,
    room: u64,
) -> Result<Found, Fault> {
    let size = core.key & 3;
    let bits = 16 << size;
    let (physical, frame) = core.place_code(cpu, pc)?;
    let offset = physical & 0xfff;
    let left = (0x1000 - offset) as usize;
    let mut bytes = vec![0; if frame.is_some() && !single { left } else { left.min(MAX_LEN) }];
    let Some(frame) = frame else {
        core.phys_read(physical, &mut bytes);
        let mut decoded = decode_block(&bytes, bits, &core.ctx.cpuid, true);
        if decoded.crosses {
            let rest = (pc & !0xfff).wrapping_add(0x1000);
            let (second, _) = core.place_code(cpu, rest)?;
            let mut tail = vec![0; MAX_LEN - bytes.len()];
            core.phys_read(second, &mut tail);
            bytes.extend_from_slice(&tail);
            decoded = decode_block(&bytes, bits, &core.ctx.cpuid, true);
        }
        return within(decoded.block, room);
    };
    loop {
        core.frames.read_bytes(frame, offset, &mut bytes);
        let decoded = decode_block(&bytes, bits, &core.ctx.cpuid, single);
        if decoded.crosses {
            return build_crossing(core, blocks, cpu, pc, frame, offset, room);
        }
        let mut block = decoded.block;
        if core.fleeting && single {
            return within(block, room);
        }
        let len = block.len as usize;
        let Some(source) = mark(core, frame, offset, len as u64) else { return Ok(Found::Retry) };
        // What was decoded must be what stands there now that writes are noticed.
        let mut again = vec![0; len];
        core.frames.read_bytes(frame, offset, &mut again);
        if again != bytes[..len] {
            continue;
        }
        core.stats.decoded += 1;
        core.stats.decoded_bytes += len as u64;
        if single {
            return within(block, room);
        }
        block.source = Some(source);
        let index = blocks.insert(frame.key() + offset, size, block);
        blocks.remember(pc, core.key, index);
        return Ok(Found::Kept(index));
    }
}

/// A block for once, which must lie within its segment.
fn within(block: Block, room: u64) -> Result<Found, Fault> {
    if block.len.saturating_sub(1) > room { Err(Fault::GP0) } else { Ok(Found::Single(Box::new(block))) }
}

/// Decodes the one instruction at `pc` that reaches into the next page.
fn build_crossing(
    core: &mut Core,
    blocks: &mut Blocks,
    cpu: &CpuState,
    pc: u64,
    first: Frame,
    offset: u64,
    room: u64,
) -> Result<Found, Fault> {
    let size = core.key & 3;
    let bits = 16 << size;
    let head = (0x1000 - offset) as usize;
    let next = (pc & !0xfff).wrapping_add(0x1000);
    // The next page is touched only as far as the segment goes.
    if room < head as u64 {
        return Err(Fault::GP0);
    }
    let (physical, second) = core.place_code(cpu, next)?;
    loop {
        let mut bytes = vec![0; MAX_LEN];
        core.frames.read_bytes(first, offset, &mut bytes[..head]);
        match second {
            Some(frame) => core.frames.read_bytes(frame, 0, &mut bytes[head..]),
            None => core.phys_read(physical, &mut bytes[head..]),
        }
        let mut block = decode_block(&bytes, bits, &core.ctx.cpuid, true).block;
        if block.len.saturating_sub(1) > room {
            return Err(Fault::GP0);
        }
        let Some(second) = second else { return Ok(Found::Single(Box::new(block))) };
        let tail = (block.len as usize).saturating_sub(head);
        if tail == 0 {
            return Ok(Found::Single(Box::new(block)));
        }
        let Some(one) = mark(core, first, offset, head as u64) else { return Ok(Found::Retry) };
        let Some(two) = mark(core, second, 0, tail as u64) else { return Ok(Found::Retry) };
        let mut again = vec![0; head + tail];
        core.frames.read_bytes(first, offset, &mut again[..head]);
        core.frames.read_bytes(second, 0, &mut again[head..]);
        if again != bytes[..head + tail] {
            continue;
        }
        core.stats.decoded += 1;
        block.source = Some(one);
        block.second = Some((second.key(), two));
        let index = blocks.insert(first.key() + offset, size, block);
        return Ok(Found::Kept(index));
    }
}

/// Marks bytes as decoded so that writes to them are noticed; `None` if translations must be looked up again first.
pub fn mark(core: &mut Core, frame: Frame, offset: u64, len: u64) -> Option<Source> {
    let (memory, page) = core.frames.memory(frame);
    let memory = memory.clone();
    let code = memory.code_page(page)?;
    let generation = code.generation();
    if code.mark(offset, offset + len.max(1)) {
        core.tlb.drop_writes(frame);
        if core.ctx.links.len() > 1 {
            core.ctx.pgm.shoot_down(Some(core.id));
            if core.link.pending().intersects(ForcedActions::TLB_FLUSH.union(ForcedActions::REMAP)) {
                return None;
            }
        }
    }
    Some(Source { memory, page, generation })
}

impl Engine for Iem {
    fn name(&self) -> &'static str {
        "IEM"
    }

    fn run(&mut self, cpu: &mut CpuState) -> Exit {
        match cpu.activity {
            Activity::Running => {}
            Activity::Halted => return Exit::Halt,
            Activity::WaitForSipi => return Exit::Attention,
            Activity::Shutdown => return Exit::TripleFault,
        }
        let exit = self.run_guest(cpu, |iem, cpu| {
            loop {
                if let Some(exit) = iem.run_once::<false>(cpu) {
                    return exit;
                }
            }
        });
        self.core.stats.exits += 1;
        exit
    }

    fn inject(&mut self, cpu: &mut CpuState, what: Event) -> Result<(), Exit> {
        if cpu.activity == Activity::Halted {
            cpu.activity = Activity::Running;
        }
        self.deliver(cpu, |core, cpu| match what {
            Event::Interrupt(vector) => event::interrupt(core, cpu, vector),
            Event::Nmi => {
                cpu.nmi_blocked = true;
                event::interrupt(core, cpu, Vector::Nmi as u8)
            }
        })
    }

    fn state_changed(&mut self, _cpu: &CpuState) {
        self.core.reset_derived();
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let s = &self.core.stats;
        vec![
            ("instructions", s.instructions),
            ("blocks run", s.blocks),
            ("blocks decoded", s.decoded),
            ("bytes decoded", s.decoded_bytes),
            ("blocks kept", self.blocks.list.len() as u64),
            ("read misses", s.read_misses),
            ("write misses", s.write_misses),
            ("fetch misses", s.fetch_misses),
            ("TLB flushes", s.flushes),
            ("address space changes", s.space_changes),
            ("writes to code pages", s.code_writes),
            ("MMIO accesses", s.mmio),
            ("exceptions", s.exceptions),
            ("interrupts", s.interrupts),
            ("exits", s.exits),
        ]
    }
}
