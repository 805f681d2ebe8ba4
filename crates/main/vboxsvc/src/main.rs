//! VBoxSVC: the service that owns settings, media and sessions.
//!
//! Started by the first client (see [`main_api::ipc`]), one per configuration directory; ends five seconds after the last
//! client and the last VM process have gone.

mod appliance;
mod attrs_devices;
mod attrs_global;
mod attrs_machine;
mod calls;
mod calls_machine;
mod calls_media;
mod calls_networks;
mod calls_storage;
mod clone;
mod descriptors;
mod encryption;
mod export;
mod guest_properties;
mod host;
mod images;
mod import;
mod limits;
mod logfile;
mod machines;
mod media;
mod mirror;
mod networks;
mod objects;
mod sessions;
mod store;
mod svc;
mod view;
mod vm;

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use main_api::error::ApiResult;
use main_api::ipc::{self, ServiceEndpoint};
use main_api::server::{self, Service};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vbox_types::version;

use crate::svc::{ApiService, State, Svc};

/// How long the service stays after the last user has gone.
const LINGER: Duration = Duration::from_secs(5);

const USAGE: &str = "\
Usage: VBoxSVC [--auto-shutdown] [--version] [--help]

  --auto-shutdown  end five seconds after the last client and VM process have gone
  --version        print the version
  --help           print this text

The service is started by the first client; there is no need to start it by hand.
";

fn main() -> ExitCode {
    let mut auto_shutdown = false;
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            ipc::AUTO_SHUTDOWN | "-auto-shutdown" => auto_shutdown = true,
            "--version" | "-V" => {
                println!("{}r{}", version::VERSION, version::REVISION);
                return ExitCode::SUCCESS;
            }
            "--help" | "-h" => {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("VBoxSVC: error: Unknown option '{other}'\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    match run(auto_shutdown) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "VBoxSVC cannot go on");
            // One line, for the client that started the service.
            println!("error: {}", error.text.replace('\n', " "));
            eprintln!("VBoxSVC: error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(auto_shutdown: bool) -> ApiResult<()> {
    descriptors::close_inherited();
    // A terminal's Ctrl-C for the client is none for the service.
    let _ = rustix::process::setsid();
    let config_dir = ipc::config_dir()?;
    let Some(mut endpoint) = ServiceEndpoint::claim(&config_dir)? else {
        return announce();
    };
    let config_dir = config_dir.canonicalize().unwrap_or(config_dir);
    if let Err(error) = logfile::init(&config_dir) {
        eprintln!("VBoxSVC: warning: no log file ({error})");
    }
    tracing::info!(
        version = version::VERSION,
        product = version::PRODUCT,
        pid = std::process::id(),
        config_dir = %config_dir.display(),
        "VBoxSVC started"
    );
    let state = State::load(&config_dir)?;
    let svc = Svc::new(config_dir, state).map_err(|e| main_api::ApiError::fail(e.to_string()))?;
    svc.adopt_vms();
    let _ = std::env::set_current_dir("/");
    announce()?;
    let service: Arc<dyn Service> = Arc::new(ApiService(svc.clone()));
    accept_loop(&mut endpoint, &svc, &service, auto_shutdown);
    tracing::info!("VBoxSVC ends");
    Ok(())
}

/// Tells the client that started this process that the service can be reached, and lets go of its pipe.
fn announce() -> ApiResult<()> {
    let mut out = io::stdout();
    let _ = writeln!(out, "{}", ipc::READY);
    let _ = out.flush();
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    Ok(())
}

/// Serves clients until no one needs the service any more.
fn accept_loop(
    endpoint: &mut ServiceEndpoint,
    svc: &Arc<Svc>,
    service: &Arc<dyn Service>,
    auto_shutdown: bool,
) {
    // Connections are counted from their acceptance on, before their threads have authenticated them.
    let pending = Arc::new(());
    let mut idle_since = Some(Instant::now());
    loop {
        let used = Arc::strong_count(&pending) > 1 || svc.state.lock().in_use();
        idle_since = if used { None } else { idle_since.or(Some(Instant::now())) };
        let left = idle_since.filter(|_| auto_shutdown).map(|since| LINGER.saturating_sub(since.elapsed()));
        if left == Some(Duration::ZERO) {
            match endpoint.withdraw() {
                Ok(late) if late.is_empty() => return,
                Ok(late) => {
                    tracing::debug!("a client came at the last moment");
                    late.into_iter().for_each(|s| serve(s, service, svc, pending.clone()));
                    if let Err(error) = endpoint.reopen() {
                        tracing::error!(%error, "cannot become reachable again");
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "cannot withdraw");
                    return;
                }
            }
            continue;
        }
        let timeout =
            left.map(|d| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) + 1 });
        let mut fds = [
            PollFd::from_borrowed_fd(endpoint.listener().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(svc.idle.as_fd(), PollFlags::IN),
        ];
        if let Err(error) = poll(&mut fds, timeout.as_ref())
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "poll");
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        if !fds[1].revents().is_empty() {
            let _ = rustix::io::read(&svc.idle, &mut [0u8; 8]);
        }
        if !fds[0].revents().is_empty() {
            match endpoint.listener().accept() {
                Ok((stream, _)) => serve(stream, service, svc, pending.clone()),
                Err(error) => {
                    tracing::error!(%error, "accept");
                    // Out of descriptors, most likely: give clients time to go.
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }
}

/// Serves one connection on a thread of its own. `count` lives as long as the thread.
fn serve(stream: UnixStream, service: &Arc<dyn Service>, svc: &Arc<Svc>, count: Arc<()>) {
    if let Err(error) = ipc::check_peer(&stream) {
        tracing::warn!(%error, "connection refused");
        return;
    }
    let (service, svc) = (service.clone(), svc.clone());
    let spawned = std::thread::Builder::new().name("client".into()).spawn(move || {
        if let Err(error) = server::serve(stream, &service) {
            tracing::debug!(%error, "connection not set up");
        }
        drop(count);
        svc.wake_main();
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for a client");
    }
}
