//! Windows of a running machine on two engines.
//!
//! A machine runs somewhere, on whatever engine. At any boundary of its instructions [`Windows::compare`] takes its state, and memory as
//! it is then, to two copies of the machine without its devices. The interpreter goes ahead for some thousand instructions, one by one, until it
//! comes to one that was not executed in this window. That is where the window ends: a VMCALL is written over it in the other copy, and
//! the engine under test runs from the same state until it meets that. Then all registers, the accesses to devices and every page that
//! either wrote must be the same. Ports and device registers give made-up values, which depend only on the place and on how many reads there
//! were. Virtual time stands still.
//!
//! A window that differs is made small by starting later and ending earlier, and told with its instructions.
//!
//! The engine under test keeps what it has translated from window to window; what changes in memory between them reaches it as writes of a
//! device do. Engines need not keep flags that nothing reads before they are written again: those that differ at the end are
//! followed until they are gone, and in images that exceptions leave in memory they are not compared.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cpum::state::{rflags, seg};
use cpum::{Activity, CpuState, CpuidTable, ForcedActions, VcpuLink};
use em::{Engine, Exit, Gim, VmContext};
use iced_x86::{Decoder, DecoderOptions, Instruction, RflagsBits};
use iem::Iem;
use iem::testing::NoInterrupts;
use parking_lot::{Condvar, Mutex};
use pdm::{InterruptController, Iom, Width};
use pgm::{Backing, HostMemory, Layer, Layout, MapHandle, MmioHandler, PAGE_SIZE, Pgm, Target};
use vbox_types::{ByteSize, GuestPhys, Port, VcpuId};

use crate::board::{Kind, Recorder};
use crate::stream::compare;

/// The instruction that ends a window.
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
/// How long the engine under test may take for a window.
const PATIENCE: Duration = Duration::from_secs(20);
/// Instructions of a window that are looked through for an end.
const MOST: usize = 400_000;
/// Instructions after which a flag that differs must have been overwritten.
const FLAGS_LIVE: usize = 64;
/// Instructions of a listing.
const LISTED: usize = 48;

/// What a window came through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub instructions: u64,
    pub accesses: u64,
    pub exceptions: u64,
    /// It began in user mode.
    pub user: bool,
    /// Bits of the code it began in.
    pub bits: u32,
    /// Pages written.
    pub pages: u64,
}

/// Why a window was not compared, or what differed.
#[derive(Debug)]
pub enum Failure {
    /// No instruction was new for too long: a loop.
    Endless,
    Differs(String),
}

/// A piece of the machine's memory and its copies.
struct Copied {
    origin: Arc<HostMemory>,
    copies: [Arc<HostMemory>; 2],
    /// Pages in which a copy may differ from the original, one bit each.
    touched: Vec<u64>,
}

struct Side {
    ctx: Arc<VmContext>,
    link: Arc<VcpuLink>,
    irq: Arc<NoInterrupts>,
    recorder: Arc<Mutex<Recorder>>,
    handles: Vec<MapHandle>,
}

/// Device registers from a physical address on.
struct Registers(Arc<Mutex<Recorder>>, u64);

impl MmioHandler for Registers {
    fn mmio_read(&self, _: VcpuId, offset: u64, data: &mut [u8]) {
        self.0.lock().mmio_read(self.1 + offset, data);
    }
    fn mmio_write(&self, _: VcpuId, offset: u64, data: &[u8]) {
        self.0.lock().mmio_write(self.1 + offset, data);
    }
}

/// Takes the VMCALL.
struct Trap {
    link: Arc<VcpuLink>,
    armed: AtomicBool,
    hit: AtomicBool,
}

impl Gim for Trap {
    fn read_msr(&self, _: VcpuId, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _: &CpuState, _: u32, _: u64) -> bool {
        false
    }
    fn hypercall(&self, _: &mut CpuState) -> bool {
        let armed = self.armed.load(Ordering::SeqCst);
        if armed {
            self.hit.store(true, Ordering::SeqCst);
            self.link.raise(ForcedActions::EM);
        }
        armed
    }
    fn tsc_moved(&self, _: &CpuState) {}
    fn about_to_run(&self, _: VcpuId) {}
}

/// Ends runs that take too long.
struct Watch {
    shared: Arc<(Mutex<Guarded>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Guarded {
    until: Option<Instant>,
    expired: bool,
    quit: bool,
}

impl Watch {
    fn new(link: Arc<VcpuLink>) -> Self {
        let shared = Arc::new((Mutex::new(Guarded::default()), Condvar::new()));
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || {
            let (state, changed) = &*theirs;
            let mut state = state.lock();
            while !state.quit {
                match state.until {
                    None => changed.wait(&mut state),
                    Some(until) if Instant::now() >= until => {
                        state.expired = true;
                        state.until = None;
                        link.raise(ForcedActions::EM);
                    }
                    Some(until) => {
                        changed.wait_until(&mut state, until);
                    }
                }
            }
        });
        Self { shared, thread: Some(thread) }
    }

    fn set(&self, until: Option<Instant>) {
        let mut state = self.shared.0.lock();
        state.until = until;
        state.expired = false;
        self.shared.1.notify_all();
    }

    fn expired(&self) -> bool {
        self.shared.0.lock().expired
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.0.lock().quit = true;
        self.shared.1.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where a window ends.
#[derive(Clone, Copy, Debug)]
struct End {
    steps: usize,
    /// The memory and the offset of the instruction there; `None` where the CPU halts or shuts down.
    place: Option<(usize, u64)>,
}

/// What the interpreter did in a window.
struct Course {
    cpu: CpuState,
    exceptions: u64,
    /// Places where windows can end, in ascending order of their steps.
    ends: Vec<End>,
}

/// Two copies of a machine.
pub struct Windows {
    origin: Arc<VmContext>,
    layout: Option<Layout>,
    memories: Vec<Copied>,
    sides: [Side; 2],
    iem: Iem,
    engine: Box<dyn Engine>,
    trap: Arc<Trap>,
    watch: Watch,
}

impl Side {
    fn new(
        origin: &VmContext,
        cpuid: CpuidTable,
        gim: impl FnOnce(&Arc<VcpuLink>) -> Option<Arc<dyn Gim>>,
    ) -> Self {
        let link = Arc::new(VcpuLink::default());
        let irq = Arc::new(NoInterrupts::default());
        let recorder = Arc::new(Mutex::new(Recorder::default()));
        let iom = Iom::new();
        for first in [0, 0x8000] {
            iom.register(Port(first), 0x8000, Width::Dword, recorder.clone());
        }
        let ctx = Arc::new(VmContext {
            pgm: Pgm::new(vec![link.clone()]),
            iom,
            irq: irq.clone(),
            clock: tm::Clock::manual(),
            tsc_frequency: origin.tsc_frequency,
            links: vec![link.clone()],
            cpuid,
            gim: gim(&link),
        });
        Self { ctx, link, irq, recorder, handles: Vec::new() }
    }

    /// Forgets what the devices were asked.
    fn clear(&self) {
        self.recorder.lock().clear();
        self.irq.write_cr8(VcpuId(0), 0);
        let _ = self.irq.write_msr(VcpuId(0), 0x6e0, 0);
    }
}

impl Windows {
    /// Copies of the machine behind `origin`, which has one vCPU, whose CPUID announces no random numbers, and of whose memory nobody has
    /// taken dirty pages yet; `engine` is put to the test.
    pub fn new(origin: &Arc<VmContext>, engine: Kind) -> std::io::Result<Self> {
        Self::with_cpuid(origin, engine, origin.cpuid.clone())
    }

    /// The same, with another CPUID for the engine under test: a difference on purpose.
    pub fn with_cpuid(origin: &Arc<VmContext>, engine: Kind, cpuid: CpuidTable) -> std::io::Result<Self> {
        let mut trap = None;
        let a = Side::new(origin, origin.cpuid.clone(), |_| None);
        let b = Side::new(origin, cpuid, |link| {
            let made = Arc::new(Trap {
                link: link.clone(),
                armed: AtomicBool::new(false),
                hit: AtomicBool::new(false),
            });
            trap = Some(made.clone());
            Some(made)
        });
        let trap = trap.ok_or_else(|| std::io::Error::other("no trap"))?;
        let iem = Iem::new(a.ctx.clone(), VcpuId(0))?;
        let engine = engine.engine(&b.ctx, VcpuId(0))?;
        let watch = Watch::new(b.link.clone());
        Ok(Self {
            origin: origin.clone(),
            layout: None,
            memories: Vec::new(),
            sides: [a, b],
            iem,
            engine,
            trap,
            watch,
        })
    }

    /// The counters of the engine under test.
    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.engine.statistics()
    }

    /// Runs at least `least` instructions from `cpu` on both sides. The machine's own engine is out of the guest.
    pub fn compare(&mut self, cpu: &CpuState, least: usize) -> Result<Window, Failure> {
        self.restore();
        let course = self.course(cpu, least, least + MOST, 1);
        let Some(&end) = course.ends.first() else { return Err(Failure::Endless) };
        let window = Window {
            instructions: end.steps as u64,
            accesses: self.sides[0].recorder.lock().accesses.len() as u64,
            exceptions: course.exceptions,
            user: cpu.cpl() == 3,
            bits: if cpu.is_64bit() {
                64
            } else if cpu.seg[seg::CS].attr.big() {
                32
            } else {
                16
            },
            pages: 0,
        };
        let (found, pages) = self.check(cpu, end, &course);
        if found.is_empty() {
            return Ok(Window { pages, ..window });
        }
        Err(Failure::Differs(self.explain(cpu, end, &found)))
    }

    // ---- memory ----

    /// Makes both copies equal to the machine.
    fn restore(&mut self) {
        let layout = self.origin.pgm.layout();
        if !self.layout.as_ref().is_some_and(|old| old.is_same(&layout)) {
            self.lay_out(&layout);
            self.layout = Some(layout);
        }
        let a20 = self.origin.pgm.a20();
        for (side, s) in self.sides.iter().enumerate() {
            s.ctx.pgm.set_a20(a20);
            s.clear();
            for memory in &mut self.memories {
                merge(&mut memory.touched, &s.ctx.pgm.take_dirty(None, &memory.copies[side]));
            }
        }
        let (mut page, mut own) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        for memory in &mut self.memories {
            merge(&mut memory.touched, &self.origin.pgm.take_dirty(None, &memory.origin));
            for at in pages(&memory.touched) {
                memory.origin.read(at, &mut page);
                for copy in &memory.copies {
                    copy.read(at, &mut own);
                    if own != page {
                        copy.write(at, &page);
                    }
                }
            }
            memory.touched.fill(0);
        }
    }

    fn lay_out(&mut self, layout: &Layout) {
        let mut plan = Vec::new();
        for (start, len, backing) in layout.ranges() {
            plan.push((start, len, self.target(start, &backing.read), self.target(start, &backing.write)));
        }
        for (n, side) in self.sides.iter_mut().enumerate() {
            for handle in side.handles.drain(..) {
                side.ctx.pgm.unmap(handle);
            }
            for (start, len, read, write) in &plan {
                let (read, write) = (read[n].clone(), write[n].clone());
                side.handles.push(side.ctx.pgm.map(
                    *start,
                    *len,
                    Layer::Ram,
                    Backing { read, write, posted: false },
                ));
            }
        }
    }

    /// What stands for a target on each side.
    fn target(&mut self, start: GuestPhys, target: &Target) -> [Target; 2] {
        match target {
            Target::Open => [Target::Open, Target::Open],
            Target::Mmio { offset, .. } => [0, 1].map(|n| {
                let recorder = self.sides[n].recorder.clone();
                Target::Mmio {
                    handler: Arc::new(Registers(recorder, start.0.wrapping_sub(*offset))),
                    offset: *offset,
                }
            }),
            Target::Memory { memory, offset } => {
                let known = self.memories.iter().position(|m| Arc::ptr_eq(&m.origin, memory));
                let index = known.unwrap_or_else(|| {
                    let make = || {
                        Arc::new(HostMemory::new("copy", ByteSize(memory.len())).expect("memory for a copy"))
                    };
                    let touched = vec![0; (memory.len() / PAGE_SIZE).div_ceil(64) as usize];
                    self.memories.push(Copied { origin: memory.clone(), copies: [make(), make()], touched });
                    self.memories.len() - 1
                });
                [0, 1].map(|n| Target::Memory {
                    memory: self.memories[index].copies[n].clone(),
                    offset: *offset,
                })
            }
        }
    }

    // ---- the interpreter's side ----

    /// Runs the interpreter for at least `least` and fewer than `most` instructions, up to the last of `wanted` places where a window can
    /// end.
    fn course(&mut self, cpu: &CpuState, least: usize, most: usize, wanted: usize) -> Course {
        let mut cpu = cpu.clone();
        self.iem.state_changed(&cpu);
        let before = self.iem.core().stats.exceptions;
        let mut executed: HashMap<(usize, u64), [u64; 64]> = HashMap::new();
        let mut ends = Vec::new();
        for steps in 0..most {
            let place = self.place(&cpu);
            if steps >= least
                && let Some((memory, at)) = place
                && self.can_end(&cpu, &executed, memory, at)
            {
                ends.push(End { steps, place });
                if ends.len() >= wanted {
                    break;
                }
            }
            if let Some((memory, at)) = place {
                let len = u64::from(self.instruction(&cpu, memory, at).len() as u8);
                let map = executed.entry((memory, at / PAGE_SIZE)).or_insert([0; 64]);
                for byte in at % PAGE_SIZE..(at % PAGE_SIZE + len.max(1)).min(PAGE_SIZE) {
                    map[(byte / 64) as usize] |= 1 << (byte % 64);
                }
            }
            match self.iem.run_instruction(&mut cpu) {
                None => {}
                Some(_) => {
                    if cpu.activity != Activity::Running {
                        ends.push(End { steps: steps + 1, place: None });
                    }
                    break;
                }
            }
        }
        let exceptions = self.iem.core().stats.exceptions - before;
        Course { cpu, exceptions, ends }
    }

    /// The memory and the offset that hold the instruction at the CPU's place, on the interpreter's side.
    fn place(&mut self, cpu: &CpuState) -> Option<(usize, u64)> {
        let core = self.iem.core();
        core.take_flush_requests();
        core.update_mode(cpu);
        let pc = Iem::pc(core, cpu);
        let (_, frame) = core.place_code(cpu, pc).ok()?;
        let (memory, page) = core.frames.memory(frame?);
        let index = self.memories.iter().position(|m| Arc::ptr_eq(&m.copies[0], memory))?;
        Some((index, page * PAGE_SIZE + (pc & (PAGE_SIZE - 1))))
    }

    fn can_end(
        &self,
        cpu: &CpuState,
        executed: &HashMap<(usize, u64), [u64; 64]>,
        memory: usize,
        at: u64,
    ) -> bool {
        let offset = at % PAGE_SIZE;
        let quiet =
            cpu.rflags & (rflags::TF | rflags::RF) == 0 && cpu.inhibit_rip.is_none() && cpu.dr7 & 0xff == 0;
        if !quiet || offset + VMCALL.len() as u64 > PAGE_SIZE {
            return false;
        }
        let new = executed.get(&(memory, at / PAGE_SIZE)).is_none_or(|map| {
            (offset..offset + VMCALL.len() as u64).all(|b| map[(b / 64) as usize] >> (b % 64) & 1 == 0)
        });
        // The window must not write what stands there.
        let (mut then, mut now) = ([0; VMCALL.len()], [0; VMCALL.len()]);
        new && self.memories[memory].copies[1].read(at, &mut then)
            && self.memories[memory].copies[0].read(at, &mut now)
            && then == now
    }

    fn instruction(&self, cpu: &CpuState, memory: usize, at: u64) -> Instruction {
        let mut bytes = [0x90; 15];
        let len = (PAGE_SIZE - at % PAGE_SIZE).min(15) as usize;
        self.memories[memory].copies[0].read(at, &mut bytes[..len]);
        let bits = if cpu.is_64bit() {
            64
        } else if cpu.seg[seg::CS].attr.big() {
            32
        } else {
            16
        };
        Decoder::with_ip(bits, &bytes, cpu.rip, DecoderOptions::NONE).decode()
    }

    // ---- the other side ----

    /// Runs the engine under test from `cpu` to `end`.
    fn run_other(&mut self, cpu: &CpuState, end: End) -> (CpuState, Result<(), String>) {
        let mut cpu = cpu.clone();
        let mut original = [0; VMCALL.len()];
        if let Some((memory, at)) = end.place {
            let memory = &self.memories[memory].copies[1];
            memory.read(at, &mut original);
            memory.write(at, &VMCALL);
        }
        self.trap.armed.store(end.place.is_some(), Ordering::SeqCst);
        self.trap.hit.store(false, Ordering::SeqCst);
        self.engine.state_changed(&cpu);
        self.watch.set(Some(Instant::now() + PATIENCE));
        let result = loop {
            let exit = self.engine.run(&mut cpu);
            self.sides[1].link.clear(ForcedActions::EM);
            if self.trap.hit.load(Ordering::SeqCst) {
                let len = VMCALL.len() as u64;
                cpu.rip = cpu.rip.wrapping_sub(len);
                break Ok(());
            }
            if self.watch.expired() {
                break Err("the end was not reached".to_owned());
            }
            match exit {
                Exit::Attention => {}
                Exit::Halt | Exit::TripleFault if end.place.is_none() => break Ok(()),
                other => break Err(format!("the end was not reached: {other:?}")),
            }
        };
        self.watch.set(None);
        self.engine.complete(&mut cpu);
        self.trap.armed.store(false, Ordering::SeqCst);
        if let Some((memory, at)) = end.place {
            self.memories[memory].copies[1].write(at, &original);
        }
        (cpu, result)
    }

    /// Runs the engine under test and compares it with the interpreter, which is at the end. Gives what differs, and the number of pages
    /// written.
    fn check(&mut self, start: &CpuState, end: End, course: &Course) -> (Vec<String>, u64) {
        let mut list = Vec::new();
        let (other, result) = self.run_other(start, end);
        let own = &course.cpu;
        if let Err(why) = result {
            list.push(why);
        }
        compare::state(own, &other, &mut |what, a, b| {
            if a != b && what != "rflags" {
                list.push(format!("{what}: {a} | {b}"));
            }
        });
        {
            let (a, b) = (self.sides[0].recorder.lock(), self.sides[1].recorder.lock());
            if a.accesses != b.accesses {
                let n = a.accesses.iter().zip(&b.accesses).take_while(|(x, y)| x == y).count();
                list.push(format!("device access {n}: {:x?} | {:x?}", a.accesses.get(n), b.accesses.get(n)));
            }
        }
        let written = self.compare_memory(course.exceptions > 0, &mut list);
        let flags = own.rflags ^ other.rflags;
        if flags & !rflags::ARITH != 0 || flags != 0 && list.is_empty() && self.reads_flags(own, flags) {
            list.push(format!("rflags: {:#x} | {:#x}", own.rflags, other.rflags));
        }
        (list, written)
    }

    fn compare_memory(&mut self, images: bool, list: &mut Vec<String>) -> u64 {
        let mut written = 0;
        let (mut a, mut b) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        let mut told = 0;
        let mut words = Vec::new();
        for memory in &mut self.memories {
            for (n, side) in self.sides.iter().enumerate() {
                merge(&mut memory.touched, &side.ctx.pgm.take_dirty(None, &memory.copies[n]));
            }
            for at in pages(&memory.touched) {
                written += 1;
                memory.copies[0].read(at, &mut a);
                memory.copies[1].read(at, &mut b);
                if a == b {
                    continue;
                }
                let (x, y) = (a.as_chunks::<8>().0, b.as_chunks::<8>().0);
                for (n, (x, y)) in x.iter().zip(y).enumerate() {
                    let (x, y) = (u64::from_le_bytes(*x), u64::from_le_bytes(*y));
                    if x != y && !(images && is_flags_image(x, y)) {
                        words.push((at + 8 * n as u64, x, y));
                    }
                }
            }
            let read = |side: usize, at: u64, out: &mut [u8]| memory.copies[side].read(at, out);
            drop_unused_components(&mut words, read);
            for (at, x, y) in words.drain(..) {
                told += 1;
                if told <= 4 {
                    list.push(format!("{} at 0x{at:x}: {x:016x} | {y:016x}", memory.origin.name()));
                }
            }
        }
        if told > 4 {
            list.push(format!("and {} more words of memory", told - 4));
        }
        written
    }

    /// Whether one of `flags` is read after `cpu` before it is written again. Goes on with the interpreter's copy.
    fn reads_flags(&mut self, cpu: &CpuState, mut flags: u64) -> bool {
        let mut cpu = cpu.clone();
        for _ in 0..FLAGS_LIVE {
            let Some((memory, at)) = self.place(&cpu) else { return true };
            let instruction = self.instruction(&cpu, memory, at);
            if rflags_of(instruction.rflags_read()) & flags != 0 {
                return true;
            }
            flags &= !rflags_of(instruction.rflags_modified());
            if flags == 0 {
                return false;
            }
            let before = self.iem.core().stats.exceptions;
            if self.iem.run_instruction(&mut cpu).is_some() {
                return true;
            }
            if self.iem.core().stats.exceptions != before {
                // They are in the exception's frame, which images in memory need not match.
                return false;
            }
        }
        true
    }

    // ---- making it small ----

    /// Whether the window from instruction `prefix` of the course from `cpu` to `end` differs, and how.
    fn attempt(&mut self, cpu: &CpuState, prefix: usize, end: End) -> Option<Vec<String>> {
        self.restore();
        let mut start = cpu.clone();
        self.iem.state_changed(&start);
        for _ in 0..prefix {
            let _ = self.iem.run_instruction(&mut start);
        }
        // The other side starts from what the interpreter has made of memory, and neither has asked the devices for anything.
        let mut page = [0; PAGE_SIZE as usize];
        for memory in &mut self.memories {
            merge(&mut memory.touched, &self.sides[0].ctx.pgm.take_dirty(None, &memory.copies[0]));
            for at in pages(&memory.touched) {
                memory.copies[0].read(at, &mut page);
                memory.copies[1].write(at, &page);
            }
        }
        self.sides.iter().for_each(Side::clear);
        let mut now = start.clone();
        let before = self.iem.core().stats.exceptions;
        for _ in prefix..end.steps {
            let _ = self.iem.run_instruction(&mut now);
        }
        let exceptions = self.iem.core().stats.exceptions - before;
        let course = Course { cpu: now, exceptions, ends: Vec::new() };
        let (found, _) = self.check(&start, end, &course);
        (!found.is_empty()).then_some(found)
    }

    fn explain(&mut self, cpu: &CpuState, end: End, found: &[String]) -> String {
        let told = |what: &str, found: &[String]| format!("{what}\n  {}\n", found.join("\n  "));
        let mut text = told("interpreter | engine under test, at the window's end:", found);
        if self.attempt(cpu, 0, end).is_none() {
            text += "The same window did not differ again: it depends on what the engine had kept. Around its end:\n";
            return text + &self.listing(cpu, end.steps.saturating_sub(LISTED / 2), end.steps + LISTED / 2);
        }
        // The earliest end at which it differs.
        self.restore();
        let mut ends = self.course(cpu, 1, end.steps, usize::MAX).ends;
        ends.retain(|e| e.steps < end.steps);
        ends.push(end);
        let (mut low, mut high) = (0, ends.len() - 1);
        while low < high {
            let middle = (low + high) / 2;
            if self.attempt(cpu, 0, ends[middle]).is_some() {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        let end = ends[high];
        // The latest start.
        let (mut low, mut high) = (0, end.steps.saturating_sub(1));
        while low < high {
            let middle = (low + high).div_ceil(2);
            if self.attempt(cpu, middle, end).is_some() {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        let Some(found) = self.attempt(cpu, low, end) else { return text };
        text += &told(&format!("Made small, instructions {low} to {} of the window:", end.steps), &found);
        text + &self.listing(cpu, low, end.steps.min(low + LISTED))
    }

    /// Instructions `from` to `to` of what the interpreter does from `cpu` on.
    fn listing(&mut self, cpu: &CpuState, from: usize, to: usize) -> String {
        self.restore();
        let mut text = String::new();
        let mut at = cpu.clone();
        self.iem.state_changed(&at);
        for step in 0..to {
            if step >= from {
                match self.place(&at) {
                    Some((memory, offset)) => {
                        let instruction = self.instruction(&at, memory, offset);
                        text += &format!("  {:#x}: {instruction}\n", at.rip);
                    }
                    None => text += &format!("  {:#x}: not in memory\n", at.rip),
                }
                if step == from {
                    text += &format!("    from {:x?} rflags {:#x}\n", at.gpr, at.rflags);
                }
            }
            let _ = self.iem.run_instruction(&mut at);
        }
        text
    }
}

/// Whether two words are the flags of one moment, apart from those that nothing reads.
fn is_flags_image(a: u64, b: u64) -> bool {
    let possible = rflags::ARITH
        | rflags::FIXED
        | rflags::TF
        | rflags::IF
        | rflags::DF
        | rflags::IOPL
        | rflags::NT
        | rflags::RF
        | rflags::AC
        | rflags::ID;
    (a ^ b) & !rflags::ARITH == 0 && a & rflags::FIXED != 0 && a & !possible == 0
}

/// Takes words from a list of those that differ: XSTATE_BV fields of XSAVE images that tell a component as in use on one side, where it
/// holds its initial values, and as not in use on the other, and what the images hold of such components. Which of the two a processor
/// tells is its own affair (Intel SDM volume 1, 13.6). `read` reads memory of either side.
fn drop_unused_components(words: &mut Vec<(u64, u64, u64)>, read: impl Fn(usize, u64, &mut [u8]) -> bool) {
    /// Offsets in an image: of the header, and of the components x87, SSE and AVX.
    const HEADER: u64 = 512;
    const COMPONENTS: [&[(u64, u64)]; 3] = [&[(0, 24), (32, 160)], &[(160, 416)], &[(576, 832)]];
    let mut excused: Vec<std::ops::Range<u64>> = Vec::new();
    for &(at, x, y) in words.iter() {
        let Some(image) = at.checked_sub(HEADER).filter(|image| image % 64 == 0 && x | y <= 7) else {
            continue;
        };
        let mut areas = Vec::new();
        let initial =
            COMPONENTS.iter().enumerate().filter(|(n, _)| (x ^ y) >> n & 1 != 0).all(|(n, component)| {
                let side = usize::from(x >> n & 1 == 0);
                component.iter().all(|&(from, to)| {
                    let mut bytes = vec![0; (to - from) as usize];
                    let known = read(side, image + from, &mut bytes);
                    if from == 0 {
                        // The control word, 0x37f.
                        known && bytes[..2] == [0x7f, 3] && bytes[2..].iter().all(|&b| b == 0)
                    } else {
                        known && bytes.iter().all(|&b| b == 0)
                    }
                }) && {
                    areas.extend(component.iter().map(|&(from, to)| image + from..image + to));
                    true
                }
            });
        if initial {
            excused.push(at..at + 8);
            excused.append(&mut areas);
        }
    }
    words.retain(|(at, ..)| !excused.iter().any(|range| range.contains(at)));
}

fn rflags_of(bits: u32) -> u64 {
    [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ]
    .into_iter()
    .filter(|(theirs, _)| bits & theirs != 0)
    .fold(0, |all, (_, ours)| all | ours)
}

fn merge(into: &mut [u64], bits: &[u64]) {
    into.iter_mut().zip(bits).for_each(|(all, new)| *all |= new);
}

/// The offsets of the pages of a bitmap.
fn pages(bits: &[u64]) -> Vec<u64> {
    let mut all = Vec::new();
    for (n, &word) in bits.iter().enumerate() {
        let mut word = word;
        while word != 0 {
            all.push((n as u64 * 64 + u64::from(word.trailing_zeros())) * PAGE_SIZE);
            word &= word - 1;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::drop_unused_components;

    #[test]
    fn components_in_use_with_initial_values_are_as_those_that_are_not() {
        let mut images = [[0u8; 4096]; 2];
        for image in &mut images {
            image[0x400..0x402].copy_from_slice(&[0x7f, 3]);
            image[0x400 + 160] = 9;
        }
        // One side tells SSE only, and has left older values of AVX in the image; the other tells all three.
        images[0][0x400 + 600] = 5;
        let header = 0x400 + 512;
        let found = |images: &[[u8; 4096]; 2]| {
            let mut words = vec![(header, 2, 7), (0x400 + 600, 5, 0), (0x100, 1, 2)];
            drop_unused_components(&mut words, |side, at, out| {
                out.copy_from_slice(&images[side][at as usize..][..out.len()]);
                true
            });
            words.len()
        };
        assert_eq!(found(&images), 1);
        // A register that is told as in use and holds something is not the same as one that is not.
        images[1][0x400 + 576] = 1;
        assert_eq!(found(&images), 3);
    }
}
