//! Kill -9 of the service, of VM processes and of clients at random moments, while machines are made, changed, started
//! and removed. Whatever dies, every settings file parses, and states are told truthfully.
//!
//! `BOXWOOD_KILLS` sets the number of kills: 20 by default, 200 in the long run.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::*;
use main_api::enums::*;
use main_api::error::ApiResult;
use main_api::idl::*;
use main_api::{Client, Proxy};
use settings::{GlobalFile, MachineFile};

/// Not a test: what runs as VBoxHeadless.
#[test]
#[ignore = "the fake VM process of the other tests"]
fn fake_vm_process() {
    fake_vm();
}

/// Not a test: a client that works without end and takes no heed of errors, as the service may die under it.
#[test]
#[ignore = "a client process of the other tests"]
fn busy_client() {
    let Ok(config) = std::env::var("TEST_CONFIG") else { return };
    let number = std::env::var("TEST_NUMBER").unwrap();
    for round in 0u32.. {
        let Ok(client) = Client::connect_to(config.as_ref()) else { continue };
        let _ = work(&client, &number, round);
    }
}

/// Makes a machine if it is missing, changes it, renames it there and back, starts it and powers it off.
fn work(client: &Client, number: &str, round: u32) -> ApiResult<()> {
    let vbox = client.virtual_box();
    let names = [format!("vm {number}"), format!("renamed {number}")];
    let found = names.iter().find_map(|n| client.find_machine(n).ok());
    let machine = match found {
        Some(machine) => machine,
        None => {
            let text = String::new;
            let flags = "forceOverwrite=1".to_owned();
            let args = (text(), names[0].clone(), vec![], "Debian".to_owned(), flags, text(), text(), text());
            let machine = client.at(vbox.call(IVirtualBox::CreateMachine, args)?);
            machine.call(IMachine::SaveSettings, ())?;
            vbox.call(IVirtualBox::RegisterMachine, (machine.reference(),))?;
            client.find_machine(&names[0])?
        }
    };
    let session = client.lock_machine(&machine, LockType::Shared)?;
    if machine.read(IMachine::State)? == MachineState::Running {
        let console = session.console()?;
        return console.at(console.call(IConsole::PowerDown, ())?).wait(|_| {});
    }
    let m = session.machine()?;
    m.write(IMachine::MemorySize, 64 + round % 1000)?;
    m.write(IMachine::Name, names[round as usize % 2].clone())?;
    m.call(IMachine::SaveSettings, ())?;
    machine.call(IMachine::SetExtraData, ("round".to_owned(), round.to_string()))?;
    drop(session);
    if round % 5 == 4 {
        machine.call(IMachine::Unregister, (CleanupMode::Full,))?;
        let progress = machine.at(machine.call(IMachine::DeleteConfig, (vec![],))?);
        return progress.wait(|_| {});
    }
    let session = client.create_session()?;
    let args = (session.reference(), "headless".to_owned(), vec![]);
    machine.at(machine.call(IMachine::LaunchVMProcess, args)?).wait(|_| {})?;
    let console = session.console()?;
    console.at(console.call(IConsole::PowerDown, ())?).wait(|_| {})
}

/// A generator of moments and victims that needs no crate (xorshift, G. Marsaglia 2003).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn busy(home: &Home, number: usize) -> Child {
    let mut command = helper("busy_client");
    command.env("TEST_CONFIG", home.config()).env("TEST_NUMBER", number.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null()).spawn().unwrap()
}

/// Every settings file below `dir` that is under its final name.
fn check_files(home: &Home) {
    let global = home.config().join("VirtualBox.xml");
    if global.exists() {
        GlobalFile::open(&global).unwrap();
    }
    for folder in fs::read_dir(home.dir.join("vms")).into_iter().flatten().flatten() {
        for file in fs::read_dir(folder.path()).into_iter().flatten().flatten() {
            let path = file.path();
            if path.extension().is_some_and(|e| e == "vbox")
                && let Err(error) = MachineFile::open(&path)
            {
                // It may have been moved or removed since it was listed; what is there is whole.
                assert!(!path.exists(), "{error}");
            }
        }
    }
}

/// Ids of the VM processes that live, by the files that they hold.
fn vm_pids(home: &Home) -> Vec<i32> {
    let files = fs::read_dir(home.config().join("VMs")).into_iter().flatten().flatten();
    let text = files.filter_map(|f| fs::read_to_string(f.path()).ok());
    text.filter_map(|t| t.split_whitespace().nth(1)?.parse().ok()).collect()
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim().starts_with('Z'))
}

/// States agree with the processes.
fn check_states(machines: &[Proxy<IMachine>]) {
    for machine in machines {
        wait_until("the state is that of the process", || {
            let read = || -> ApiResult<bool> {
                assert!(machine.read(IMachine::Accessible)?, "{} is inaccessible", machine.path());
                let online = machine.read(IMachine::State)?.is_online();
                let pid = machine.read(IMachine::SessionPID)?;
                Ok(online == (pid != 0 && is_alive(pid)))
            };
            read().unwrap()
        });
    }
}

#[test]
fn random_kills_leave_whole_files_and_true_states() {
    let kills: u64 = std::env::var("BOXWOOD_KILLS").ok().and_then(|t| t.parse().ok()).unwrap_or(20);
    let seed = std::env::var("BOXWOOD_SEED").ok().and_then(|t| t.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    eprintln!("BOXWOOD_SEED={seed}");
    let mut random = Random(seed);
    let home = Home::new("kills");
    drop(home.client());
    let mut clients: Vec<Child> = (0..2).map(|n| busy(&home, n)).collect();
    for kill_number in 0..kills {
        std::thread::sleep(Duration::from_millis(20 + random.below(250)));
        match random.below(3) {
            0 => {
                let pid = home.service_pid();
                if pid != 0 {
                    kill(pid);
                }
            }
            1 => {
                let pids = vm_pids(&home);
                if let Some(pid) = pids.get(random.below(pids.len().max(1) as u64) as usize) {
                    kill(*pid);
                }
            }
            _ => {
                let victim = random.below(clients.len() as u64) as usize;
                clients[victim].kill().unwrap();
                clients[victim].wait().unwrap();
                clients[victim] = busy(&home, victim);
            }
        }
        if kill_number % 5 == 0 {
            check_files(&home);
        }
    }
    for client in &mut clients {
        client.kill().unwrap();
        client.wait().unwrap();
    }
    check_files(&home);
    let client = Client::connect_to(&home.config()).unwrap();
    let machines = client.virtual_box().read(IVirtualBox::Machines).unwrap();
    let machines: Vec<_> = machines.into_iter().map(|m| client.at(m)).collect();
    check_states(&machines);
    // Everything still works.
    for machine in &machines {
        let file = machine.read(IMachine::SettingsFilePath).unwrap();
        assert!(Path::new(&file).exists(), "{file}");
        if machine.read(IMachine::State).unwrap().is_online() {
            let session = client.lock_machine(machine, LockType::Shared).unwrap();
            let console = session.console().unwrap();
            console.at(console.call(IConsole::PowerDown, ()).unwrap()).wait(|_| {}).unwrap();
            wait_until("it is off", || !state(machine).is_online());
        }
        start(&client, machine);
        kill(machine.read(IMachine::SessionPID).unwrap() as i32);
        wait_until("it is aborted", || state(machine) == MachineState::Aborted);
    }
}
