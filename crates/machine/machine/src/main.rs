//! `VBoxHeadless`: runs one virtual machine without a window.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::{Context, Result};
use em::{MachineHooks, RunState};
use machine::config::MachineConfig;
use machine::console::Console;
use machine::engine::Backend;
use machine::log::LogFile;
use machine::machine::Machine;
use machine::network::Networks;
use main_api::vm_process::VmProcess;
use main_api::{ApiError, runtime_error};
use parking_lot::Mutex;
use settings::MachineSettings;
use vbox_types::{MachineState, ResultCode, version};

const USAGE: &str = "\
Usage: VBoxHeadless --startvm <name|uuid> [options]

  -s, -startvm, --startvm <name|uuid>   Start the given VM (required)
  -v, -vrde, --vrde on|off|config       Remote display: not available yet, taken for compatibility
  -e, -vrdeproperty, --vrdeproperty <name=value>
                                        Set a property of the remote display, taken for compatibility
      --start-paused                    Start the VM in the paused state
      --comment <text>                  A text for the process list
      --describe-engine                 Tell what guests run on here by default, and why
  -h, -?, --help                        Show this text
  -V, --version                         Show the version
";

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    machine: String,
    paused: bool,
}

enum Command {
    Start(Request),
    DescribeEngine,
    Help,
    Version,
}

fn parse(args: &[String]) -> Result<Command, String> {
    let mut request = Request::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (arg.as_str(), None),
        };
        let mut value =
            || inline.clone().or_else(|| args.next().cloned()).ok_or_else(|| format!("{name} needs a value"));
        match name {
            "-s" | "-startvm" | "--startvm" => request.machine = value()?,
            "-v" | "-vrde" | "--vrde" | "-vrdp" | "--vrdp" | "-e" | "-vrdeproperty" | "--vrdeproperty"
            | "--comment" | "-comment" | "--settingspw" | "--settingspwfile" => drop(value()?),
            "--start-paused" | "-start-paused" => request.paused = true,
            "-h" | "-?" | "--help" | "-help" => return Ok(Command::Help),
            "--describe-engine" => return Ok(Command::DescribeEngine),
            "-V" | "--version" | "-version" => return Ok(Command::Version),
            other => return Err(format!("unknown option: {other}")),
        }
    }
    if request.machine.is_empty() {
        return Err("no virtual machine is named: use --startvm".into());
    }
    Ok(Command::Start(request))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match parse(&args) {
        Ok(Command::Help) => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("{}r{}", version::VERSION, version::REVISION);
            ExitCode::SUCCESS
        }
        Ok(Command::DescribeEngine) => {
            println!("{}", Backend::default_here().describe());
            ExitCode::SUCCESS
        }
        Ok(Command::Start(request)) => match run(&request) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("VBoxHeadless: error: {error:#}");
                ExitCode::FAILURE
            }
        },
        Err(why) => {
            eprintln!("VBoxHeadless: error: {why}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// Passes EM's states on to the console.
struct Hooks {
    machine: Arc<Machine>,
    console: Arc<Console>,
}

impl MachineHooks for Hooks {
    fn reset_devices(&self) {
        self.machine.reset_devices();
    }

    fn state_changed(&self, state: RunState, why: Option<&str>) {
        if let Some(why) = why {
            tracing::error!(target: "em", "Guru Meditation: {why}");
        }
        self.console.run_state_changed(state);
    }
}

fn run(request: &Request) -> Result<()> {
    let (process, given) = VmProcess::open(&request.machine)?;
    let process = Arc::new(process);
    let outcome = start(&process, &given, request);
    let (machine, console) = match outcome {
        Ok(running) => running,
        Err(error) => {
            tracing::error!(target: "main", "{error:#}");
            let told = ApiError::new(ResultCode::VmError, format!("{error:#}"));
            finish(process, Some(told));
            return Err(error);
        }
    };
    machine.em().wait_for_power_off();
    let closed = machine.close();
    if let Err(error) = &closed {
        tracing::error!(target: "main", "{error:#}");
    }
    for machine::stam::Sample { name, value, .. } in machine.statistics() {
        tracing::info!(target: "stam", "{name} {value}");
    }
    tracing::info!(target: "main", "power off");
    console.is_down();
    drop(console);
    finish(process, closed.as_ref().err().map(|e| ApiError::fail(format!("{e:#}"))));
    closed
}

/// Tells that the machine is off. Threads of the console may hold the process's handle a little longer.
fn finish(process: Arc<VmProcess>, error: Option<ApiError>) {
    process.finish(MachineState::PoweredOff, error);
}

fn start(
    process: &Arc<VmProcess>,
    given: &main_api::vm_process::MachineConfig,
    request: &Request,
) -> Result<(Arc<Machine>, Arc<Console>)> {
    let log = LogFile::create(&given.log_folder, machine::log::HISTORY)
        .with_context(|| format!("cannot write the log in \"{}\"", given.log_folder.display()))?;
    machine::log::install(log);
    tracing::info!(
        target: "main",
        "{} {} r{} (interface of VirtualBox {})",
        version::PRODUCT, env!("CARGO_PKG_VERSION"), version::REVISION, version::VERSION
    );
    let document = settings::Document::parse(given.settings.as_bytes()).context("the machine's settings")?;
    let (settings, _) = MachineSettings::load(&document).context("the machine's settings")?;
    let folder = given.settings_file.parent().unwrap_or(Path::new("/"));
    let config = MachineConfig::from_settings(&settings, folder)
        .map_err(|reasons| anyhow::anyhow!("the machine cannot start: {}", reasons.join("; ")))?;
    for note in &config.notes {
        tracing::warn!(target: "main", "{note}");
    }
    let machine = Machine::build(&config)?;
    let networks: Arc<dyn Networks> = process.clone();
    machine.connect_networks(&networks)?;
    let console = Console::new(machine.clone(), process.clone());
    let hooks = Arc::new(Hooks { machine: machine.clone(), console: console.clone() });
    machine.em().power_on(hooks).context("cannot start the vCPU threads")?;
    process.serve_console(console.clone());
    tell_ejects(&machine, process)?;
    tell_crashes(&machine, process)?;
    pause_for_keys(&machine, process)?;
    end_by_signal(&machine)?;
    if request.paused {
        console.run_state_changed(RunState::Paused);
    } else {
        machine.em().resume();
    }
    Ok((machine, console))
}

/// Tells the service of discs that the guest ejects. While there is none, the next one hears of them.
fn tell_ejects(machine: &Arc<Machine>, process: &Arc<VmProcess>) -> Result<()> {
    const TURN: Duration = Duration::from_millis(500);
    let (machine, process) = (Arc::downgrade(machine), Arc::downgrade(process));
    std::thread::Builder::new().name("ejects".into()).spawn(move || {
        let mut untold = Vec::new();
        // Neither handle is held longer than one turn.
        while let (Some(machine), Some(process)) = (machine.upgrade(), process.upgrade()) {
            untold.extend(machine.storage().ejects(TURN));
            untold.retain(|(controller, port, device): &(String, u8, u8)| {
                let told = process.medium_ejected(controller, (*port).into(), (*device).into());
                if let Err(error) = &told {
                    tracing::warn!(target: "storage", %error, "an eject was not told");
                }
                told.is_err_and(|e| e.is_connection_lost())
            });
        }
    })?;
    Ok(())
}

/// Tells clients of something that has happened to the machine. Those of a service to come do not hear of it: VBox.log has it.
fn tell(process: &VmProcess, fatal: bool, id: &str, message: &str) {
    if let Err(error) = process.runtime_error(fatal, id, message) {
        tracing::warn!(target: "main", %error, "{id} was not told to clients");
    }
}

/// Tells clients when the guest says that it has crashed.
fn tell_crashes(machine: &Arc<Machine>, process: &Arc<VmProcess>) -> Result<()> {
    const TURN: Duration = Duration::from_millis(500);
    let (machine, process) = (Arc::downgrade(machine), Arc::downgrade(process));
    std::thread::Builder::new().name("crashes".into()).spawn(move || {
        while let (Some(machine), Some(process)) = (machine.upgrade(), process.upgrade()) {
            match machine.guest_crash(TURN) {
                Ok(crash) => tell(&process, false, runtime_error::GUEST_CRASH, &crash.to_string()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    })?;
    Ok(())
}

/// Pauses the machine when the guest asks for an encrypted disk whose password was not given.
fn pause_for_keys(machine: &Arc<Machine>, process: &Arc<VmProcess>) -> Result<()> {
    const TURN: Duration = Duration::from_millis(500);
    let (machine, process) = (Arc::downgrade(machine), Arc::downgrade(process));
    std::thread::Builder::new().name("keys".into()).spawn(move || {
        while let (Some(machine), Some(process)) = (machine.upgrade(), process.upgrade()) {
            // It may have come in between.
            if machine.storage().key_missing(TURN) && machine.storage().waits_for_key() {
                tracing::warn!(
                    target: "storage",
                    "VD: The DEK for this disk is missing (DrvVD_DEKMISSING): the machine is paused until its password comes \
                     by 'controlvm addencpassword'"
                );
                machine.em().pause();
                tell(
                    &process,
                    false,
                    runtime_error::KEY_MISSING,
                    "The password of an encrypted disk is missing: the machine is paused until it comes by 'controlvm addencpassword'",
                );
                if !machine.storage().waits_for_key() {
                    machine.em().resume();
                }
            }
        }
    })?;
    Ok(())
}

/// SIGINT and SIGTERM pull the plug, as with VirtualBox.
fn end_by_signal(machine: &Arc<Machine>) -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    let machine = Mutex::new(Arc::downgrade(machine));
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            tracing::info!(target: "main", "signal {signal}: powering off");
            match machine.lock().upgrade() {
                Some(machine) => machine.em().power_off(),
                None => return,
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn virtualbox_spellings_are_understood() {
        for line in ["--startvm x", "-startvm x", "-s x --vrde off", "--startvm=x --comment y"] {
            match parse(&words(line)) {
                Ok(Command::Start(request)) => assert_eq!(request.machine, "x"),
                _ => panic!("{line}"),
            }
        }
    }

    #[test]
    fn a_missing_machine_and_unknown_options_are_refused() {
        assert!(parse(&words("--vrde off")).is_err());
        assert!(parse(&words("--startvm x --bogus")).is_err());
    }
}
