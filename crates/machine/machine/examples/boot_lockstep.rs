//! Boots an ISO image on the interpreter, the same in every run, and compares the recompiler with it on windows of what the guest does.
//!
//!     cargo run --release -p machine --example boot_lockstep -- IMAGE.iso [--instructions N] [--windows N] [--least N] [--seed N]
//!         [--memory MIB] [--serial FILE] [--type TEXT]... [--idle MS] [--no-media]
//!
//! Virtual time follows the count of instructions, four nanoseconds each; a halted CPU waits for no host. Timers fire and requests to media complete
//! between stretches of a thousand instructions. `--type` types a line on the keyboard whenever the guest has been idle for a while (`--idle`,
//! in milliseconds of its time); the lines come round again until the guest has executed the instructions. `--windows` windows of at least
//! `--least` instructions each are spread over them at random (`conformance::windows`). Exit status 1 if anything differs.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use anyhow::{Context, Result};
use conformance::Kind;
use conformance::random::Random;
use conformance::windows::{Failure, Window, Windows};
use cpum::cpuid::{FeatureBit, bit};
use cpum::state::rflags;
use cpum::{CpuState, ForcedActions, VcpuLink};
use em::{Engine, Event, Exit, MachineHooks, RunState, VmContext};
use iem::Iem;
use machine::config::{DriveConfig, DriveKind, IdeModel, MachineConfig, MediumConfig, UartConfig, UartMode};
use machine::engine::{Backend, Bench, Between};
use machine::machine::Machine;
use parking_lot::{Condvar, Mutex};
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp};
use tm::{Clock, TimerQueue};
use uuid::Uuid;
use vbox_types::{ByteSize, Hz, Port, VcpuId};

/// Instructions between two looks at timers and media.
const STRETCH: u64 = 1000;
/// Virtual time that an instruction takes, in nanoseconds.
const INSTRUCTION: u64 = 4;
/// Rate of the guest's time-stamp counter.
const TSC: Hz = Hz(1_000_000_000);
/// The guest's date: 2024-01-01.
const UTC: i64 = 1_704_067_200_000_000_000;
/// Differences after which to stop.
const MOST: usize = 3;

/// What to do.
#[derive(Clone)]
struct Request {
    instructions: u64,
    windows: u64,
    least: usize,
    seed: u64,
    /// Lines to type.
    lines: Vec<String>,
    /// Virtual time after which a guest that does nothing is idle.
    idle: u64,
}

/// What came of it.
#[derive(Default)]
struct Report {
    instructions: u64,
    windows: u64,
    compared: u64,
    /// Windows by mode: 16-bit, 32-bit, kernel, user.
    by_mode: [u64; 4],
    with_devices: u64,
    with_exceptions: u64,
    longest: u64,
    endless: u64,
    failures: Vec<String>,
    /// A hash of what the CPU did, to compare runs.
    course: u64,
    done: bool,
}

/// Requests to media, which complete when the guest comes to the end of a stretch.
#[derive(Default)]
struct Completions {
    state: Mutex<Outstanding>,
    changed: Condvar,
}

#[derive(Default)]
struct Outstanding {
    next: u64,
    waiting: usize,
    done: Vec<(u64, BlockDone, Result<Vec<u8>, BlockError>)>,
}

impl Completions {
    /// Completes everything that was asked for, in the order of asking. True if there was anything.
    fn complete(&self) -> bool {
        let mut state = self.state.lock();
        while state.done.len() < state.waiting {
            self.changed.wait(&mut state);
        }
        let mut done = std::mem::take(&mut state.done);
        state.waiting = 0;
        drop(state);
        done.sort_by_key(|d| d.0);
        let any = !done.is_empty();
        for (_, done, result) in done {
            done(result);
        }
        any
    }
}

struct Ordered {
    inner: Arc<dyn BlockDriver>,
    completions: Arc<Completions>,
}

impl BlockDriver for Ordered {
    fn size(&self) -> ByteSize {
        self.inner.size()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        let completions = self.completions.clone();
        let number = {
            let mut state = completions.state.lock();
            state.next += 1;
            state.waiting += 1;
            state.next
        };
        self.inner.submit(
            op,
            Box::new(move |result| {
                completions.state.lock().done.push((number, done, result));
                completions.changed.notify_all();
            }),
        );
    }
}

/// What the engine needs of the machine, once there is one.
#[derive(Default)]
struct Later {
    machine: OnceLock<Weak<Machine>>,
}

struct Setup {
    request: Request,
    clock: Arc<Clock>,
    completions: Arc<Completions>,
    later: Arc<Later>,
    report: Arc<Mutex<Report>>,
}

impl Bench for Setup {
    fn features(&self) -> Vec<FeatureBit> {
        iem::cpuid_features().into_iter().filter(|f| ![bit::RDRAND, bit::RDSEED].contains(f)).collect()
    }

    fn clock(&self) -> Arc<Clock> {
        self.clock.clone()
    }

    fn tsc_frequency(&self) -> Hz {
        TSC
    }

    fn utc(&self) -> i64 {
        UTC
    }

    fn between(&self) -> Between {
        let completions = self.completions.clone();
        Arc::new(move |inner| Arc::new(Ordered { inner, completions: completions.clone() }))
    }

    fn engines(
        self: Box<Self>,
        context: &Arc<VmContext>,
        timers: &Arc<TimerQueue>,
    ) -> io::Result<Vec<Box<dyn Engine>>> {
        let mut random = Random(self.request.seed);
        let mut at: Vec<u64> =
            (0..self.request.windows).map(|_| random.word() % self.request.instructions).collect();
        at.sort_unstable();
        Ok(vec![Box::new(Sampler {
            iem: Iem::new(context.clone(), VcpuId(0))?,
            windows: Windows::new(context, Kind::Recompiler)?,
            link: context.links[0].clone(),
            timers: timers.clone(),
            lines: Vec::new(),
            typed: 0,
            typing: VecDeque::new(),
            idle_since: 0,
            busy: 0,
            at: at.into(),
            setup: *self,
        })])
    }
}

/// The interpreter, which owns time, and compares now and then.
struct Sampler {
    setup: Setup,
    iem: Iem,
    windows: Windows,
    link: Arc<VcpuLink>,
    timers: Arc<TimerQueue>,
    lines: Vec<String>,
    typed: usize,
    /// Scan codes that the keyboard has no room for yet.
    typing: VecDeque<u8>,
    /// Since when the guest has done little.
    idle_since: u64,
    busy: u64,
    /// Where windows begin, in instructions.
    at: VecDeque<u64>,
}

impl Sampler {
    fn count(&mut self) -> u64 {
        self.iem.core().instructions()
    }

    /// Whether EM has something to do before guest code goes on.
    fn wanted(&self, cpu: &CpuState) -> bool {
        let pending = self.link.pending();
        let always = ForcedActions::EM.union(ForcedActions::INIT).union(ForcedActions::SIPI);
        pending.intersects(always)
            || pending.contains(ForcedActions::NMI) && !cpu.nmi_blocked
            || pending.contains(ForcedActions::INTERRUPT) && cpu.rflags & rflags::IF != 0
    }

    /// Lets time pass and what is due happen.
    fn pass(&mut self, time: u64) {
        self.setup.clock.advance(time);
        self.setup.completions.complete();
        self.timers.fire_due();
        if !self.typing.is_empty() {
            self.type_on();
        }
    }

    fn type_on(&mut self) {
        let Some(machine) = self.setup.later.machine.get().and_then(Weak::upgrade) else { return };
        let codes: Vec<u8> = self.typing.iter().take(8).copied().collect();
        let taken = machine.put_scancodes(&codes);
        self.typing.drain(..taken);
    }

    /// The CPU has halted: goes on to whatever wakes it. False if nothing will.
    fn sleep(&mut self, cpu: &CpuState) -> bool {
        while !self.wanted(cpu) {
            if self.setup.completions.complete() {
                continue;
            }
            match self.timers.fire_due() {
                Some(deadline) => {
                    let now = self.setup.clock.now();
                    self.pass(deadline.saturating_sub(now));
                }
                None if !self.typing.is_empty() => self.pass(1_000_000),
                None => return false,
            }
            self.look_for_idleness();
        }
        true
    }

    /// Types the next line if the guest does little.
    fn look_for_idleness(&mut self) {
        let (now, count) = (self.setup.clock.now(), self.count());
        // Up to a twentieth of the time is what ticks cost.
        if (count - self.busy) * INSTRUCTION * 20 > now - self.idle_since {
            (self.idle_since, self.busy) = (now, count);
        } else if now - self.idle_since > self.setup.request.idle && self.typing.is_empty() {
            (self.idle_since, self.busy) = (now, count);
            let lines = &self.setup.request.lines;
            if !lines.is_empty() {
                let line = &lines[self.typed % lines.len()];
                self.typed += 1;
                self.typing.extend(scan_codes(line));
                self.lines.push(line.clone());
            }
        }
    }

    fn sample(&mut self, cpu: &CpuState, count: u64) {
        while self.at.front().is_some_and(|&at| at <= count) {
            self.at.pop_front();
            let result = self.windows.compare(cpu, self.setup.request.least);
            let mut report = self.setup.report.lock();
            report.windows += 1;
            match result {
                Ok(window) => report.take(&window),
                Err(Failure::Endless) => report.endless += 1,
                Err(Failure::Differs(text)) => {
                    let title =
                        format!("window {} at instruction {count}, RIP {:#x}", report.windows, cpu.rip);
                    println!("{title}\n{text}");
                    report.failures.push(title);
                }
            }
        }
    }
}

impl Report {
    fn take(&mut self, window: &Window) {
        self.compared += window.instructions;
        let mode = match (window.bits, window.user) {
            (16, _) => 0,
            (32, false) => 1,
            (_, false) => 2,
            (_, true) => 3,
        };
        self.by_mode[mode] += 1;
        self.with_devices += u64::from(window.accesses > 0);
        self.with_exceptions += u64::from(window.exceptions > 0);
        self.longest = self.longest.max(window.instructions);
    }
}

impl Engine for Sampler {
    fn name(&self) -> &'static str {
        "lockstep"
    }

    fn run(&mut self, cpu: &mut CpuState) -> Exit {
        loop {
            let before = self.count();
            let exit = self.iem.run_counted(cpu, STRETCH);
            let count = self.count();
            self.pass((count - before) * INSTRUCTION);
            let ready = cpu.inhibit_rip.is_none() && cpu.rflags & (rflags::TF | rflags::RF) == 0;
            {
                let mut report = self.setup.report.lock();
                report.instructions = count;
                let hash = cpu.gpr.iter().fold(cpu.rip ^ cpu.rflags, |h, r| h.rotate_left(7) ^ r);
                report.course = (report.course ^ hash).wrapping_mul(0x0100_0000_01b3);
            }
            if exit.is_none() && ready {
                self.sample(cpu, count);
            }
            self.look_for_idleness();
            let full = {
                let report = self.setup.report.lock();
                count >= self.setup.request.instructions || report.failures.len() >= MOST
            };
            if full {
                self.setup.report.lock().done = true;
                if let Some(machine) = self.setup.later.machine.get().and_then(Weak::upgrade) {
                    machine.em().power_off();
                }
                return Exit::Attention;
            }
            match exit {
                Some(Exit::Halt) => {
                    if !self.sleep(cpu)
                        && let Some(machine) = self.setup.later.machine.get().and_then(Weak::upgrade)
                    {
                        machine.em().power_off();
                    }
                    return Exit::Halt;
                }
                Some(other) => return other,
                None if self.wanted(cpu) => return Exit::Attention,
                None => {}
            }
        }
    }

    fn inject(&mut self, cpu: &mut CpuState, event: Event) -> Result<(), Exit> {
        self.iem.inject(cpu, event)
    }

    fn state_changed(&mut self, cpu: &CpuState) {
        self.iem.state_changed(cpu);
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.windows.statistics()
    }
}

/// Set-1 scan codes of a US keyboard for a line and its end.
fn scan_codes(line: &str) -> Vec<u8> {
    const ROWS: [(u8, &str, &str); 4] = [
        (0x02, "1234567890-=", "!@#$%^&*()_+"),
        (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
        (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
        (0x2b, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    ];
    let mut codes = Vec::new();
    for c in line.chars().chain(['\n']) {
        let found = match c {
            ' ' => Some((0x39, false)),
            '\n' => Some((0x1c, false)),
            _ => ROWS.iter().find_map(|(first, plain, shifted)| {
                let place = |row: &str| row.chars().position(|k| k == c).map(|n| first + n as u8);
                place(plain).map(|code| (code, false)).or_else(|| place(shifted).map(|code| (code, true)))
            }),
        };
        let Some((code, shift)) = found else { continue };
        if shift {
            codes.push(0x2a);
        }
        codes.extend([code, code | 0x80]);
        if shift {
            codes.push(0xaa);
        }
    }
    codes
}

struct Hooks(Arc<Machine>);

impl MachineHooks for Hooks {
    fn reset_devices(&self) {
        self.0.reset_devices();
    }

    fn state_changed(&self, state: RunState, why: Option<&str>) {
        if let Some(why) = why {
            eprintln!("[{state:?}] {why}");
        }
        if state == RunState::Stuck {
            self.0.em().power_off();
        }
    }
}

fn drive(path: PathBuf) -> DriveConfig {
    DriveConfig {
        kind: DriveKind::Dvd,
        controller: "IDE".into(),
        port: 1,
        device: 0,
        medium: Some(MediumConfig {
            path,
            format: "RAW".into(),
            read_only: true,
            parents: Vec::new(),
            target: None,
            shareable: false,
            host_cache: true,
            uuid: Uuid::nil(),
            encryption: None,
        }),
        non_rotational: false,
        discard: false,
        hot_pluggable: false,
        bootable: true,
        bandwidth_group: String::new(),
    }
}

fn main() -> Result<ExitCode> {
    let mut config = MachineConfig::bare("lockstep", ByteSize::mib(256));
    let mut request = Request {
        instructions: 2_000_000_000,
        windows: 2_000,
        least: 10_000,
        seed: 1,
        lines: Vec::new(),
        idle: 500_000_000,
    };
    let mut serial = PathBuf::from("/dev/null");
    let mut drives = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--instructions" => request.instructions = value()?.parse()?,
            "--windows" => request.windows = value()?.parse()?,
            "--least" => request.least = value()?.parse()?,
            "--seed" => request.seed = value()?.parse()?,
            "--memory" => config.ram = ByteSize::mib(value()?.parse()?),
            "--serial" => serial = value()?.into(),
            "--type" => request.lines.push(value()?),
            "--idle" => request.idle = value()?.parse::<u64>()? * 1_000_000,
            "--no-media" => {}
            _ => drives.push(drive(arg.into())),
        }
    }
    anyhow::ensure!(request.instructions > 0, "--instructions must not be 0");
    config.ide = Some((IdeModel::Piix4, drives));
    config.uarts.push(UartConfig { io_base: Port(0x3f8), irq: 4, mode: UartMode::File(serial) });

    let report = Arc::new(Mutex::new(Report::default()));
    let later = Arc::new(Later::default());
    let setup = Setup {
        request: request.clone(),
        clock: Clock::manual(),
        completions: Arc::default(),
        later: later.clone(),
        report: report.clone(),
    };
    let began = Instant::now();
    let machine = Machine::build_on(&config, Backend::Bench(Box::new(setup)))?;
    let _ = later.machine.set(Arc::downgrade(&machine));
    machine.em().power_on(Arc::new(Hooks(machine.clone())))?;
    machine.em().resume();
    machine.em().wait_for_power_off();
    machine.close()?;
    let report = report.lock();
    let [real, flat, kernel, user] = report.by_mode;
    println!(
        "{} instructions of the guest, {} windows with {} of them, {:.0} s (seed {}, course {:016x})",
        report.instructions,
        report.windows,
        report.compared,
        began.elapsed().as_secs_f64(),
        request.seed,
        report.course
    );
    println!(
        "windows: {real} 16-bit, {flat} 32-bit, {kernel} kernel, {user} user; {} with device accesses, {} with exceptions; the longest had {} \
         instructions; {} found no end",
        report.with_devices, report.with_exceptions, report.longest, report.endless
    );
    for (name, value) in machine.em().statistics().iter().flatten() {
        println!("  {name} {value}");
    }
    for failure in &report.failures {
        println!("differs: {failure}");
    }
    if !report.done {
        println!("the guest ended before it had executed {} instructions", request.instructions);
    }
    Ok(if report.failures.is_empty() && report.done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
