//! Programs that are killed at any moment leave settings that can be read and states that are true.
//!
//! Each round lets several commands work on the same machines at once and kills, at a random moment, a random process
//! among `VBoxSVC`, `VBoxManage` and `VBoxHeadless` (where that is built), without notice. Then every settings file must
//! parse as a whole and every machine must be in a state that fits the processes that there are.
//!
//! `BOXWOOD_KILL_ROUNDS` sets the number of rounds; ten are the sample of a normal run, 200 the heavy one.
//! `BOXWOOD_KILL_SEED` repeats a run's choices (not its timing); `BOXWOOD_ENGINE` chooses the machines' execution engine
//! by `modifyvm`'s name for it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{Home, Process, eventually, finish, programs, value};

const MACHINES: usize = 3;
/// Longest wait for the moment of the kill.
const LONGEST_MICROS: u64 = 150_000;

/// Marsaglia's xorshift: enough to vary a test, and repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len() as u64) as usize)
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A command that changes something.
fn work(home: &Home, random: &mut Random, headless: bool) -> Child {
    let vm = format!("vm{}", random.below(MACHINES as u64));
    let number = random.below(1000).to_string();
    let words: Vec<String> = match random.below(if headless { 9 } else { 7 }) {
        0 => vec!["modifyvm".into(), vm, "--memory".into(), (64 + random.below(64)).to_string()],
        1 => vec!["modifyvm".into(), vm, "--description".into(), "x".repeat(random.below(20_000) as usize)],
        2 => vec!["setextradata".into(), vm, format!("key{}", random.below(5)), number],
        3 => vec!["setextradata".into(), "global".into(), format!("key{}", random.below(5)), number],
        4 => vec!["createvm".into(), "--name".into(), format!("extra{number}"), "--register".into()],
        5 => vec!["unregistervm".into(), format!("extra{number}"), "--delete".into()],
        6 => vec!["storagectl".into(), vm, "--name".into(), number, "--add".into(), "sata".into()],
        7 => vec!["startvm".into(), vm, "--type".into(), "headless".into()],
        _ => vec!["controlvm".into(), vm, "poweroff".into()],
    };
    home.spawn(words)
}

/// Every settings file below `dir`, apart from the copies that are kept beside them.
fn settings_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            settings_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "vbox") {
            found.push(path);
        }
    }
}

fn check_files(home: &Home) {
    let global = home.path("config/VirtualBox.xml");
    settings::GlobalFile::open(&global).unwrap_or_else(|error| panic!("{}: {error}", global.display()));
    let mut files = Vec::new();
    settings_files(&home.path("vms"), &mut files);
    for file in files {
        settings::MachineFile::open(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}

/// Whether `process` is the VM process of the machine with this name and id.
fn runs(process: &Process, name: &str, id: &str) -> bool {
    process.name == "VBoxHeadless" && process.arguments.iter().any(|word| word == name || word == id)
}

/// The machine's state must fit its process, or come to fit it: a death may be a moment older than its discovery.
fn check_states(home: &Home) {
    let list = home.manage("list vms").ok();
    assert!(!list.contains("<inaccessible>"), "{list}");
    for line in list.lines() {
        let (name, id) = line.rsplit_once(' ').unwrap();
        let (name, id) = (name.trim_matches('"'), id.trim_matches(['{', '}']));
        let mut seen = String::new();
        eventually("a state that fits the processes", || {
            let text = home.run(["showvminfo", id, "--machinereadable"]);
            if text.status != 0 {
                seen = text.stderr;
                return false;
            }
            let state = value(&text.stdout, "VMState").unwrap_or_default();
            let alive = home.processes().iter().any(|process| runs(process, name, id));
            seen = format!("{name} is {state}, its process {}", if alive { "lives" } else { "is gone" });
            match state.as_str() {
                "poweroff" | "aborted" => !alive,
                "running" | "paused" | "gurumeditation" => alive,
                // On the way somewhere.
                _ => false,
            }
        });
        assert!(!seen.is_empty());
    }
}

/// Kills one process, and tells which.
fn strike(home: &Home, random: &mut Random) -> Option<Process> {
    let wanted = ["VBoxSVC", "VBoxManage", "VBoxHeadless"];
    let candidates: Vec<Process> = home
        .processes()
        .into_iter()
        .filter(|process| wanted.iter().any(|name| process.name == *name))
        .collect();
    // First the kind, so that the many do not hide the one.
    let kinds: Vec<&str> =
        wanted.into_iter().filter(|name| candidates.iter().any(|process| process.name == *name)).collect();
    let kind = random.pick(&kinds)?;
    let of_kind: Vec<Process> = candidates.into_iter().filter(|process| process.name == *kind).collect();
    let victim = random.pick(&of_kind)?.clone();
    home.kill(&victim);
    Some(victim)
}

#[test]
fn settings_and_states_survive_a_kill_at_any_moment() {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    let seed = setting("BOXWOOD_KILL_SEED", clock | 1);
    let rounds = setting("BOXWOOD_KILL_ROUNDS", 10);
    let headless = programs().join("VBoxHeadless").is_file();
    println!("seed {seed}, {rounds} rounds, {} VBoxHeadless", if headless { "with" } else { "without" });
    let mut random = Random(seed);
    let home = Home::new();
    let engine = std::env::var("BOXWOOD_ENGINE").unwrap_or_else(|_| "default".into());
    for number in 0..MACHINES {
        home.manage(&format!("createvm --name vm{number} --ostype Linux_64 --register")).ok();
        home.manage(&format!("modifyvm vm{number} --memory 64 --vram 8 --vm-execution-engine {engine}")).ok();
    }
    let mut killed = std::collections::BTreeMap::<String, u32>::new();
    for round in 0..rounds {
        let workers: Vec<Child> =
            (0..1 + random.below(3)).map(|_| work(&home, &mut random, headless)).collect();
        std::thread::sleep(Duration::from_micros(random.below(LONGEST_MICROS)));
        if let Some(victim) = strike(&home, &mut random) {
            *killed.entry(victim.name).or_default() += 1;
        }
        for worker in workers {
            // Whatever became of it, it must come to an end and not panic.
            let ran = finish(worker);
            assert!(!ran.stderr.contains("panicked"), "round {round}: {ran:?}");
        }
        check_files(&home);
        check_states(&home);
        if round % 20 == 19 {
            println!("{} rounds, killed {killed:?}", round + 1);
        }
    }
    println!("killed {killed:?}");
    assert_eq!(
        home.manage("list vms").ok().lines().filter(|line| line.starts_with("\"vm")).count(),
        MACHINES
    );
}
