//! `VBoxIntNetSwitch`: the process of one network (see [`netstack::process`]). The service starts it; users have no reason to.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use netstack::process::{LINGER, Process};
use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

const USAGE: &str = "\
Usage: VBoxIntNetSwitch --network <name> --socket <path> [--log <file>] [--linger <milliseconds>]

  --network <name>   the network's name
  --socket <path>    where machines and the service find it
  --log <file>       where it tells what it does
  --linger <ms>      how long it stays when no machine is in the network

VBoxSVC starts this program when a machine joins a network; there is no need to start it by hand. Host-only and bridged networks need
capabilities that users do not have by themselves; give them to the program:

  setcap cap_net_admin,cap_net_raw+ep VBoxIntNetSwitch
";

#[derive(Default)]
struct Options {
    network: String,
    socket: PathBuf,
    log: Option<PathBuf>,
    linger: Option<Duration>,
}

fn main() -> ExitCode {
    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_default();
        match arg.as_str() {
            "--network" => options.network = value(),
            "--socket" => options.socket = value().into(),
            "--log" => options.log = Some(value().into()),
            "--linger" => options.linger = value().parse().ok().map(Duration::from_millis),
            "--help" | "-h" => {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("VBoxIntNetSwitch: error: Unknown option '{other}'\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    if options.network.is_empty() || options.socket.as_os_str().is_empty() {
        eprintln!("VBoxIntNetSwitch: error: a network and a socket must be named\n{USAGE}");
        return ExitCode::from(2);
    }
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, for the service that started this.
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> std::io::Result<()> {
    // A terminal's Ctrl-C for a client is none for the network.
    let _ = rustix::process::setsid();
    if let Some(path) = &options.log
        && let Ok(file) = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(path)
    {
        tracing_subscriber::fmt().with_ansi(false).with_writer(std::sync::Mutex::new(file)).init();
    }
    let socket = &options.socket;
    // Held as long as the process lives: one process for each socket.
    let lock = lock(&socket.with_extension("lock"))?;
    // Whoever left this behind is dead: the lock is ours.
    let _ = std::fs::remove_file(socket);
    let listener = listener(socket)?;
    let own = std::fs::metadata(socket)?.ino();
    let process = Process::new(listener, &options.network, options.linger.unwrap_or(LINGER))?;
    let mut out = std::io::stdout();
    let _ = writeln!(out, "ready");
    let _ = out.flush();
    if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    let _ = std::env::set_current_dir("/");
    process.run();
    if std::fs::metadata(socket).is_ok_and(|meta| meta.ino() == own) {
        let _ = std::fs::remove_file(socket);
    }
    drop(lock);
    Ok(())
}

fn lock(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(path)?;
    // A process that is about to end gives it back soon.
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

fn listener(path: &Path) -> std::io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 64)?;
    Ok(socket)
}
