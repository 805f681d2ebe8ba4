//! One side of the lockstep: a machine in a mode, its engine, and what a case leaves in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cpum::cpuid::FeatureBit;
use cpum::state::{TableRegister, cr0, cr4, efer, gpr, rflags, seg};
use cpum::{Activity, CpuState, Descriptor, ForcedActions, Segment};
use em::{Engine, Event, Exit};
use iem::testing::{descriptor, gate};
use vbox_types::VcpuId;

use super::mode::*;
use super::monitor;
use super::program::{Assembled, Start};
use crate::board::{Board, Kind};

/// What a case leaves.
pub struct Outcome {
    pub cpu: CpuState,
    /// Whether the case ended where it should; else how.
    pub end: Result<(), String>,
    pub log: Vec<u32>,
    pub accesses: Vec<(u8, u64, u64)>,
    pub program: Vec<u8>,
    pub data: Vec<u8>,
    pub stack: Vec<u8>,
    pub tables: Vec<u8>,
}

/// What disturbs a run without changing what it computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Disturbance {
    #[default]
    None,
    /// Another thread asks for the engine's attention all the time; each time an interrupt is delivered whose handler returns.
    Interrupts,
    /// The same, and each time another engine goes on.
    Switches,
}

impl Disturbance {
    /// Whether a mode's programs cannot tell. IRET to a 16-bit stack segment leaves the upper half of the handler's stack
    /// pointer in ESP, so programs on one can.
    pub fn fits(self, mode: Mode) -> bool {
        self == Self::None || mode != Mode::Compat16
    }
}

/// Vector of the interrupts that disturb: its handler returns at once.
pub const DISTURB: u8 = 0x90;

/// How the end of a case that takes too long is told.
pub const HANGS: &str = "still running";

/// How long a case may take before it counts as one that hangs, and how often it is disturbed: in software, and under KVM, where entering and
/// leaving guest code takes its time, the more so where that is nested.
const SOFTWARE: Pace = Pace { limit: Duration::from_secs(3), period: Duration::from_micros(60) };
const KVM: Pace = Pace { limit: Duration::from_secs(30), period: Duration::from_millis(1) };

#[derive(Clone, Copy)]
struct Pace {
    limit: Duration,
    period: Duration,
}

pub struct Guest {
    pub board: Board,
    mode: Mode,
    engines: Vec<(Kind, Box<dyn Engine>)>,
    active: usize,
    cpu: CpuState,
    pub disturbance: Disturbance,
    kicker: Option<Kicker>,
    /// Runs that the kicker interrupted.
    pub disturbed: u64,
}

/// A thread that asks for attention now and then while a case runs, and at the end of its time.
struct Kicker {
    /// Zero while nothing runs; else the number of the case.
    running: Arc<AtomicU64>,
    quit: Arc<AtomicU64>,
    expired: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Kicker {
    fn new(link: Arc<cpum::VcpuLink>, disturbs: bool, Pace { limit, period }: Pace) -> Self {
        let running = Arc::new(AtomicU64::new(0));
        let quit = Arc::new(AtomicU64::new(0));
        let expired = Arc::new(AtomicU64::new(0));
        let (r, q, e) = (running.clone(), quit.clone(), expired.clone());
        let thread = std::thread::spawn(move || {
            let nap = if disturbs { period } else { Duration::from_millis(50) };
            let (mut last, mut since) = (0, std::time::Instant::now());
            while q.load(Ordering::Relaxed) == 0 {
                std::thread::sleep(nap);
                let now = r.load(Ordering::SeqCst);
                if now != last {
                    (last, since) = (now, std::time::Instant::now());
                }
                if now != 0 && (disturbs || since.elapsed() > limit) {
                    if since.elapsed() > limit {
                        e.store(now, Ordering::SeqCst);
                    }
                    link.raise(ForcedActions::EM);
                }
            }
        });
        Self { running, quit, expired, thread: Some(thread) }
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        self.quit.store(1, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Guest {
    /// A machine in `mode`, waiting for its first case. CPUID is without the `hidden` features.
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn new(mode: Mode, kind: Kind, hidden: &[FeatureBit]) -> Self {
        let board = Board::new(1, mode.physical(), RAM, hidden);
        let page = |n: u64| mode.physical() + DATA + n * 0x1000;
        if mode.paged() {
            board.map_registers(REGISTERS);
        } else {
            board.map_registers(page(11));
            board.map_read_only(page(8), DATA + 8 * 0x1000);
        }
        board.put(MONITOR, &monitor::assemble(mode));
        let cpu = start_state(mode);
        tables(mode, &board);
        let engine = kind.engine(&board.ctx, VcpuId(0)).expect("an engine");
        Self {
            board,
            mode,
            engines: vec![(kind, engine)],
            active: 0,
            cpu,
            disturbance: Disturbance::None,
            kicker: None,
            disturbed: 0,
        }
    }

    /// Disturbs the runs to come; `kinds` are further engines for [`Disturbance::Switches`].
    ///
    /// # Panics
    /// If the host gives no memory.
    pub fn disturb(&mut self, disturbance: Disturbance, kinds: &[Kind]) {
        self.disturbance = disturbance;
        for kind in kinds {
            let engine = kind.engine(&self.board.ctx, VcpuId(0)).expect("an engine");
            self.engines.push((*kind, engine));
        }
        self.kicker = None;
    }

    /// Counters of the engine.
    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.engines[self.active].1.statistics()
    }

    /// Runs a case to its end.
    pub fn run(&mut self, start: &Start, assembled: &Assembled) -> Outcome {
        let board = &self.board;
        board.recorder.lock().clear();
        board.put(PROGRAM, &assembled.image);
        for page in [&start.data[..], &start.data[..]].iter().enumerate() {
            board.put(DATA + page.0 as u64 * start.data.len() as u64, page.1);
        }
        board.put(STACK, &vec![0; STACK_LEN as usize]);
        board.put(ROUNDS, &start.rounds.to_le_bytes());
        board.put(STATE, &state_block(self.mode, start, assembled.entry));
        let end = self.run_to_end();
        let board = &self.board;
        let recorder = board.recorder.lock();
        Outcome {
            cpu: self.cpu.clone(),
            end,
            log: recorder.log.clone(),
            accesses: recorder.accesses.clone(),
            program: board.bytes(PROGRAM, PROGRAM_LEN as usize),
            data: board.bytes(DATA, DATA_LEN as usize),
            stack: board.bytes(STACK, STACK_LEN as usize),
            tables: board.bytes(TABLES, 0x8000),
        }
    }

    fn run_to_end(&mut self) -> Result<(), String> {
        let link = self.board.ctx.links[0].clone();
        let disturbs = self.disturbance != Disturbance::None;
        let pace = if self.engines.iter().any(|(kind, _)| *kind == Kind::Kvm) { KVM } else { SOFTWARE };
        let kicker = self.kicker.get_or_insert_with(|| Kicker::new(link.clone(), disturbs, pace));
        let running = kicker.running.clone();
        let expired = kicker.expired.clone();
        let number = CASES.fetch_add(1, Ordering::Relaxed);
        running.store(number, Ordering::SeqCst);
        let result = self.run_guarded(&link, &expired, number);
        running.store(0, Ordering::SeqCst);
        result
    }

    fn run_guarded(&mut self, link: &cpum::VcpuLink, expired: &AtomicU64, number: u64) -> Result<(), String> {
        let cpu = &mut self.cpu;
        let engine = &mut self.engines[self.active].1;
        engine.inject(cpu, Event::Interrupt(NEXT)).map_err(|e| format!("entry: {e:?}"))?;
        loop {
            let engine = &mut self.engines[self.active].1;
            let exit = engine.run(cpu);
            engine.complete(cpu);
            let at = |cpu: &CpuState| format!("0x{:x}:0x{:x}", cpu.seg[seg::CS].selector, cpu.rip);
            match exit {
                Exit::Halt => {
                    let cs = cpu.seg[seg::CS].base;
                    let wanted = self.mode.linear() + MONITOR + u64::from(END) * 16 + 1;
                    if cs.wrapping_add(cpu.rip) == wanted {
                        return Ok(());
                    }
                    let place = at(cpu);
                    return Err(format!("halted at {place}"));
                }
                Exit::Attention => {
                    link.clear(ForcedActions::EM);
                    if expired.load(Ordering::SeqCst) == number {
                        let place = at(cpu);
                        self.recover();
                        return Err(format!("{HANGS} at {place}"));
                    }
                    self.disturbed += 1;
                    if self.disturbance == Disturbance::Switches {
                        if self.engines[self.active].0 == Kind::Kvm {
                            // What guest code wrote there was not noted.
                            self.board.forget_code();
                        }
                        self.active = (self.active + 1) % self.engines.len();
                        self.engines[self.active].1.state_changed(cpu);
                    }
                    // Not inside the monitor, whose stacks are not made for it.
                    let inside = cpu.seg[seg::CS].selector == self.mode.segment(seg::CS).selector;
                    let shadow = cpu.inhibit_rip == Some(cpu.rip);
                    let engine = &mut self.engines[self.active].1;
                    if inside && !shadow && cpu.rflags & rflags::IF != 0 {
                        engine
                            .inject(cpu, Event::Interrupt(DISTURB))
                            .map_err(|e| format!("disturbance: {e:?}"))?;
                    }
                }
                exit => {
                    let place = at(cpu);
                    self.recover();
                    return Err(format!("{exit:?} at {place}"));
                }
            }
        }
    }

    /// Back to the initial state, after a case that did not end.
    fn recover(&mut self) {
        self.cpu = start_state(self.mode);
        for (_, engine) in &mut self.engines {
            engine.state_changed(&self.cpu);
        }
    }
}

static CASES: AtomicU64 = AtomicU64::new(1);

/// The state block for the monitor's entry.
fn state_block(mode: Mode, start: &Start, entry: u64) -> Vec<u8> {
    let mut block = vec![0; monitor::REGISTERS_AT as usize];
    block[..start.xsave.0.len()].copy_from_slice(&start.xsave.0);
    block[512] = 7;
    let stack = mode.segment(seg::SS);
    let code = mode.segment(seg::CS);
    let sp = mode.linear() + STACK_TOP - stack.base;
    let mut flags = start.rflags;
    if mode.monitor_bits() == 64 {
        for n in [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 3, 2, 1, 0] {
            let value = if mode.bits() == 64 { start.gpr[n] } else { start.gpr[n] & 0xffff_ffff };
            block.extend(value.to_le_bytes());
        }
        for value in [entry, code.selector.into(), flags, sp, stack.selector.into()] {
            block.extend(value.to_le_bytes());
        }
        return block;
    }
    if mode == Mode::Real {
        flags &= 0xffff;
    }
    let g = |n: usize| start.gpr[n];
    let s = |n: usize| u64::from(mode.segment(n).selector);
    for value in [
        g(gpr::RDI),
        g(gpr::RSI),
        g(gpr::RBP),
        g(gpr::RBX),
        g(gpr::RDX),
        g(gpr::RCX),
        g(gpr::RAX),
        sp,
        entry,
        s(seg::CS),
        flags,
        s(seg::SS),
        s(seg::DS),
        s(seg::ES),
        s(seg::FS),
        s(seg::GS),
    ] {
        block.extend((value as u32).to_le_bytes());
    }
    block
}

/// The monitor's processor state, as if it had halted.
fn start_state(mode: Mode) -> CpuState {
    let mut cpu = CpuState::reset(0);
    let linear = mode.linear();
    cpu.activity = Activity::Halted;
    cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.xcr0 = 7;
    cpu.cr0 = cr0::ET | cr0::NE | cr0::MP;
    if mode == Mode::Real {
        cpu.seg = [Segment::real(0, 3); 6];
        cpu.seg[seg::CS] = Segment::real((MONITOR >> 4) as u16, 11);
        cpu.seg[seg::SS] = Segment::real((STACK >> 4) as u16, 3);
        cpu.gpr[gpr::RSP] = STACK_TOP - STACK;
        cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
        return cpu;
    }
    cpu.cr0 |= cr0::PE;
    if mode.paged() {
        cpu.cr0 |= cr0::PG | cr0::WP | cr0::AM;
        cpu.cr3 = TABLES;
    }
    if mode.long() || mode == Mode::User32 {
        cpu.cr4 |= cr4::PAE;
        cpu.msr.efer |= efer::NXE;
    }
    if mode == Mode::User32 {
        cpu.pdpte = std::array::from_fn(|n| if n == 1 { (TABLES + 0x1000) | 1 } else { 0 });
    }
    if mode.long() {
        cpu.cr4 |= cr4::FSGSBASE | cr4::PGE;
        cpu.msr.efer |= efer::LME | efer::LMA | efer::SCE;
    }
    let flat = |code: bool, selector: u16| Segment {
        base: 0,
        limit: u32::MAX,
        attr: Descriptor::new()
            .with_kind(if code { 11 } else { 3 })
            .with_code_or_data(true)
            .with_present(true)
            .with_long(code && mode.long())
            .with_big(!(code && mode.long()))
            .with_granular(true),
        selector,
    };
    cpu.seg = [flat(false, MONITOR_DATA); 6];
    cpu.seg[seg::CS] = flat(true, MONITOR_CODE);
    // No LDT.
    cpu.ldtr = Segment { base: 0, limit: 0, attr: Descriptor::new().with_unusable(true), selector: 0 };
    cpu.gdtr = TableRegister { base: linear + GDT, limit: 0xff };
    cpu.idtr = TableRegister { base: linear + IDT, limit: 0xfff };
    cpu.tr = Segment {
        base: linear + TSS,
        limit: 0x67,
        attr: Descriptor::new().with_kind(11).with_present(true),
        selector: TASK,
    };
    cpu.gpr[gpr::RSP] = linear + STACK0;
    cpu
}

/// Descriptor tables, task state, page tables.
fn tables(mode: Mode, board: &Board) {
    let linear = mode.linear();
    if mode == Mode::Real {
        for vector in 0..256u64 {
            let entry = ((MONITOR >> 4) << 16) | (vector * 16);
            board.put(vector * 4, &(entry as u32).to_le_bytes());
        }
        board.put(MONITOR + u64::from(DISTURB) * 16, &[0xcf]);
        return;
    }
    let iret: &[u8] = if mode.long() { &[0x48, 0xcf] } else { &[0xcf] };
    board.put(MONITOR + u64::from(DISTURB) * 16, iret);
    let entry = |selector: u16, value: u64| board.put(GDT + u64::from(selector), &value.to_le_bytes());
    entry(MONITOR_CODE, descriptor(0, 0xf_ffff, 0x9b, if mode.long() { 0xa } else { 0xc }));
    entry(MONITOR_DATA, descriptor(0, 0xf_ffff, 0x93, 0xc));
    for which in [seg::CS, seg::SS, seg::DS, seg::FS, seg::GS] {
        let s = mode.segment(which);
        let attr = mode.attributes(which);
        let access = u8::from(attr.code_or_data()) << 4 | attr.kind() | attr.dpl() << 5 | 0x80;
        let flags = u8::from(attr.granular()) << 3 | u8::from(attr.big()) << 2 | u8::from(attr.long()) << 1;
        let limit = if attr.granular() { s.limit >> 12 } else { s.limit };
        entry(s.selector & !7, descriptor(s.base as u32, limit, access, flags));
    }
    entry(TASK, descriptor((linear + TSS) as u32, 0x67, 0x8b, 0));
    board.put(GDT + u64::from(TASK) + 8, &((linear + TSS) >> 32).to_le_bytes());
    // What programs try to load: read-only data, execute-only code, not present, expand-down, conforming code, privilege 0 data.
    let data = mode.linear() as u32 + DATA as u32;
    for (n, d) in [
        descriptor(data, 0xffff, 0xf0, 0),
        descriptor(data, 0xffff, 0xf9, 0),
        descriptor(data, 0xffff, 0x72, 0),
        descriptor(data, 0x7fff, 0xf6, 4),
        descriptor(data, 0xffff, 0xff, 0),
        descriptor(data, 0xffff, 0x92, 0),
    ]
    .into_iter()
    .enumerate()
    {
        entry(ODD_FIRST + 8 * n as u16, d);
    }
    for vector in 0..256u64 {
        let handler = linear + MONITOR + 16 * vector;
        let g = gate(MONITOR_CODE, handler as u32, 0xee, u8::from(mode.long()));
        if mode.long() {
            board.put(IDT + 16 * vector, &g.to_le_bytes());
            board.put(IDT + 16 * vector + 8, &(handler >> 32).to_le_bytes());
        } else {
            board.put(IDT + 8 * vector, &g.to_le_bytes());
        }
    }
    // No I/O permission map.
    board.put(TSS + 0x64, &(0x68u32 << 16).to_le_bytes());
    if mode.long() {
        board.put(TSS + 4, &(linear + STACK0).to_le_bytes());
        board.put(TSS + 0x24, &(linear + IST).to_le_bytes());
    } else {
        board.put(TSS + 4, &((linear + STACK0) as u32).to_le_bytes());
        board.put(TSS + 8, &u32::from(MONITOR_DATA).to_le_bytes());
    }
    if mode.paged() {
        page_tables(mode, board);
    }
}

fn page_tables(mode: Mode, board: &Board) {
    let linear = mode.linear();
    let user = if mode.user() { 4 } else { 0 };
    let wide = mode != Mode::Paged32;
    let last = if wide {
        let mut table = TABLES;
        let levels: &[u32] = if mode.long() { &[39, 30, 21] } else { &[30, 21] };
        for (n, shift) in levels.iter().enumerate() {
            let next = TABLES + 0x1000 * (n as u64 + 1);
            // The entries of PAE's first level have no permissions.
            let flags = if !mode.long() && n == 0 { 1 } else { 3 | user };
            board.put(table + (linear >> shift & 0x1ff) * 8, &(next | flags).to_le_bytes());
            table = next;
        }
        table
    } else {
        let next = TABLES + 0x1000;
        board.put(TABLES + (linear >> 22 & 0x3ff) * 4, &((next | 3 | user) as u32).to_le_bytes());
        next
    };
    for n in 0..RAM >> 12 {
        let at = n << 12;
        let mut entry = at | 3;
        if at >= PROGRAM {
            entry |= user;
        }
        if (DATA..DATA + DATA_LEN).contains(&at) {
            entry = match mode.page((at - DATA) >> 12) {
                Page::Plain => entry,
                Page::ReadOnly => entry & !2,
                Page::Absent => 0,
                Page::Supervisor => entry & !4,
                Page::Registers => REGISTERS | 3 | user,
                Page::Alias => DATA | 3 | user,
                Page::CodeAlias => (PROGRAM + 0x1000) | 3 | user,
            };
        }
        let index = (linear + at) >> 12;
        if wide {
            board.put(last + (index & 0x1ff) * 8, &entry.to_le_bytes());
        } else {
            board.put(last + (index & 0x3ff) * 4, &(entry as u32).to_le_bytes());
        }
    }
}
