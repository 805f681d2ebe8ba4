//! VM processes: starting them, hearing from them, and knowing when they have ended.
//!
//! A VM process's end is known by its liveness file ([`main_api::liveness`]): a thread waits in `flock` for each VM. What
//! the connection does is of no account for that, so that neither a broken connection nor a restart of this
//! service mistakes a living VM for a dead one.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use main_api::enums::{SessionState, SessionType};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::{IConsole, IEventSource, IProgress, IVMProcess};
use main_api::liveness::{self, Found, Line};
use main_api::progress::Progress;
use main_api::server::Peer;
use main_api::types::ObjRef;
use main_api::{ipc, paths};
use parking_lot::MutexGuard;
use uuid::Uuid;
use vbox_types::{MachineState, ResultCode};
use zbus::zvariant::OwnedFd;

use crate::attrs_machine::log_folder;
use crate::sessions::{self, already_locked, busy_session};
use crate::svc::{Held, Lock, Owner, State, Svc, VmLink, now_ms};
use crate::view::gone;

/// How long a start waits for the VM process before it to exit.
const EXIT_LIMIT: Duration = Duration::from_secs(10);
/// How long a console request waits for a VM process to register again with this service.
const REGISTER_LIMIT: Duration = Duration::from_secs(3);

/// States that a VM process leaves its machine in on purpose.
fn is_final(state: MachineState) -> bool {
    matches!(
        state,
        MachineState::PoweredOff
            | MachineState::Saved
            | MachineState::Aborted
            | MachineState::AbortedSaved
            | MachineState::Teleported
    )
}

impl Svc {
    /// IMachine::launchVMProcess.
    pub(crate) fn launch(
        self: &Arc<Self>,
        peer: &Peer,
        id: Uuid,
        session: u32,
        frontend: &str,
        environment: &[String],
    ) -> ApiResult<ObjRef<IProgress>> {
        let mut state = self.state.lock();
        let frontend = match frontend {
            "" => default_frontend(&state, id)?,
            name => name.to_owned(),
        };
        if frontend == "emergencystop" {
            return self.emergency_stop(&mut state, id);
        }
        let free = state.sessions.get(&session).filter(|s| s.peer == peer.id).ok_or_else(gone)?;
        if free.state != SessionState::Unlocked {
            return Err(busy_session());
        }
        self.wait_for(&mut state, EXIT_LIMIT, |s| {
            s.machines.get(&id).is_none_or(|m| m.session_state() != SessionState::Unlocking)
        });
        let program = match frontend.as_str() {
            "headless" | "vrdp" | "capture" => "VBoxHeadless",
            "gui" | "separate" | "GUI/Qt" => "VirtualBoxVM",
            "sdl" => "VBoxSDL",
            other => return Err(ApiError::invalid_arg(format!("Invalid frontend name: '{other}'"))),
        };
        let machine = state.machine(id)?;
        if let Some(error) = &machine.access_error {
            return Err(error.clone());
        }
        let name = machine.display_name();
        match machine.lock {
            Lock::None => {}
            _ => {
                return Err(ApiError::new(
                    ResultCode::InvalidObjectState,
                    format!(
                        "The machine '{name}' is already locked by a session (or being locked or unlocked)"
                    ),
                ));
            }
        }
        let settings = machine.settings.clone();
        // Children of immutable media forget what the last run wrote.
        for (medium, _) in state.media.attached(&settings) {
            let medium = state.media.medium(medium)?;
            if medium.auto_reset && medium.parent.is_some() {
                let medium = medium.id;
                crate::calls_media::reset_diff(&mut state, medium)?;
            }
        }
        // Refused here already, so that no process starts in vain; the lock itself comes with the registration.
        state.media.lock_for(id, &settings)?;
        state.media.unlock_for(id);
        let child = self.spawn(&state, id, program, &frontend, environment)?;
        tracing::info!(machine = %id, name, program, pid = child.id(), "VM process started");
        let progress = Arc::new(Progress::new("Starting VM", 1, false));
        let pid = child.id();
        let spawning = Lock::Spawning { pid, session, progress: progress.clone(), frontend };
        state.machine_mut(id)?.lock = spawning;
        if let Some(session) = state.sessions.get_mut(&session) {
            session.state = SessionState::Spawning;
        }
        state.emit(IEventSource::OnSessionStateChanged, (id.to_string(), SessionState::Spawning));
        let path = state.add_progress(progress);
        drop(state);
        let svc = self.clone();
        let watch = move || svc.wait_for_child(id, name, child);
        std::thread::Builder::new()
            .name("vm-process".into())
            .spawn(watch)
            .map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))?;
        self.changed.notify_all();
        Ok(ObjRef::new(path))
    }

    fn spawn(
        &self,
        state: &State,
        id: Uuid,
        program: &str,
        frontend: &str,
        environment: &[String],
    ) -> ApiResult<Child> {
        let machine = state.machine(id)?;
        let failed = |why: &dyn std::fmt::Display| {
            ApiError::new(
                ResultCode::IprtError,
                format!(
                    "Could not launch the VM process for the machine '{}' ({why})",
                    machine.display_name()
                ),
            )
        };
        let path = ipc::find_program(program)
            .ok_or_else(|| failed(&format!("the program {program} is neither beside VBoxSVC nor in PATH")))?;
        let logs = log_folder(&machine.file);
        let _ = std::fs::create_dir_all(&logs);
        let output = File::create(logs.join("VBoxHeadless.log"));
        let (stdout, stderr) = match output.and_then(|file| Ok((file.try_clone()?, file))) {
            Ok((out, err)) => (Stdio::from(out), Stdio::from(err)),
            Err(_) => (Stdio::null(), Stdio::null()),
        };
        let mut command = Command::new(path);
        command
            .arg("--comment")
            .arg(machine.display_name())
            .arg("--startvm")
            .arg(id.to_string())
            .env("VBOX_USER_HOME", &self.config_dir)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr);
        match frontend {
            "headless" => {
                command.args(["--vrde", "config"]);
            }
            "capture" => {
                command.arg("--capture");
            }
            "separate" => {
                command.arg("--separate");
            }
            _ => {}
        }
        for change in environment {
            match change.split_once('=') {
                Some((name, value)) if !name.is_empty() => command.env(name, value),
                _ => command.env_remove(change),
            };
        }
        command.spawn().map_err(|e| failed(&e))
    }

    /// Reaps the child; if it never registered, the start has failed.
    fn wait_for_child(self: &Arc<Self>, id: Uuid, name: String, mut child: Child) {
        let pid = child.id();
        let status = child.wait();
        let mut state = self.state.lock();
        let Some(machine) = state.machines.get_mut(&id) else { return };
        let (session, progress) = match &machine.lock {
            Lock::Spawning { pid: spawned, session, progress, .. } if *spawned == pid => {
                (*session, progress.clone())
            }
            _ => return,
        };
        let code = status.as_ref().ok().and_then(|s| s.code());
        let how = match (&status, code) {
            (_, Some(code)) => format!("with exit code {code} ({code:#x})"),
            (Ok(status), None) => {
                use std::os::unix::process::ExitStatusExt;
                format!("because of signal {}", status.signal().unwrap_or(0))
            }
            (Err(error), None) => format!("({error})"),
        };
        let log = log_folder(&machine.file).join("VBoxHeadless.log");
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        let said = said.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or_default().trim().to_owned();
        let mut text =
            format!("The virtual machine '{name}' has terminated unexpectedly during startup {how}");
        if !said.is_empty() {
            text.push_str(&format!(": {said}"));
        }
        text.push_str(&format!(".  More details may be available in '{}'", log.display()));
        machine.lock = Lock::None;
        sessions::detach(&mut state, session);
        progress.complete(Err(ApiError::fail(text).on("IMachine")));
        // It may have died between taking its liveness file and registering.
        if let Ok(Found::Ended { .. }) = liveness::look(&self.config_dir, id) {
            liveness::remove(&self.config_dir, id);
        }
        state.emit(IEventSource::OnSessionStateChanged, (id.to_string(), SessionState::Unlocked));
        drop(state);
        self.changed.notify_all();
        self.wake_main();
    }

    /// `startvm --type emergencystop`: kills the VM process.
    fn emergency_stop(&self, state: &mut State, id: Uuid) -> ApiResult<ObjRef<IProgress>> {
        let machine = state.machine(id)?;
        let pid = match &machine.lock {
            Lock::Held(Held { owner: Owner::Vm(_), pid, .. }) | Lock::Spawning { pid, .. } => *pid,
            _ => {
                return Err(ApiError::new(
                    ResultCode::InvalidObjectState,
                    format!("The machine '{}' has no VM process", machine.display_name()),
                ));
            }
        };
        if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).map_err(|e| {
                ApiError::new(ResultCode::IprtError, format!("Could not kill the VM process ({e})"))
            })?;
        }
        let progress = Arc::new(Progress::new("Stopping VM", 1, false));
        progress.complete(Ok(()));
        Ok(ObjRef::new(state.add_progress(progress)))
    }

    /// IVMProcessControl::registerVM: the caller becomes the machine's VM process.
    pub(crate) fn register_vm(
        self: &Arc<Self>,
        peer: &Peer,
        id: Uuid,
        vm_state: MachineState,
    ) -> ApiResult<(String, String, String, String)> {
        let mut state = self.state.lock();
        let machine = state.machine(id)?;
        if let Some(error) = &machine.access_error {
            return Err(error.clone());
        }
        let Found::Alive { file, .. } = liveness::look(&self.config_dir, id)
            .map_err(|e| ApiError::fail(format!("Cannot look at the VM's lock file ({e})")))?
        else {
            return Err(ApiError::new(
                ResultCode::AccessDenied,
                "The caller does not hold the VM's lock file",
            ));
        };
        let (frontend, progress, launcher, again) = match &machine.lock {
            Lock::None => ("headless".to_owned(), None, None, false),
            Lock::Spawning { pid, session, progress, frontend } if *pid == peer.pid => {
                (frontend.clone(), Some(progress.clone()), Some(*session), false)
            }
            Lock::Spawning { pid, .. } => {
                return Err(ApiError::new(
                    ResultCode::AccessDenied,
                    format!(
                        "An unexpected process (PID=0x{:08X}) has tried to lock the machine '{}', while only the process \
                         started by LaunchVMProcess (PID=0x{pid:08X}) is allowed",
                        peer.pid,
                        machine.display_name()
                    ),
                ));
            }
            // A VM that this service found alive when it started.
            Lock::Held(Held { owner: Owner::Vm(VmLink { peer: None, .. }), pid, name, .. })
                if *pid == peer.pid =>
            {
                (name.clone(), None, None, true)
            }
            Lock::Held(_) => return Err(already_locked(&machine.display_name())),
        };
        let settings = machine.settings.clone();
        if !again {
            state.media.lock_for(id, &settings)?;
        }
        let effective = self.effective_settings(&state, id)?;
        let machine = state.machine_mut(id)?;
        let answer = (
            id.to_string(),
            machine.file.display().to_string(),
            effective,
            log_folder(&machine.file).display().to_string(),
        );
        if again {
            if let Some(vm) = machine.vm() {
                vm.peer = Some(peer.clone());
            }
        } else {
            let vm = VmLink { peer: Some(peer.clone()), ended: false, progress };
            let held = Held { owner: Owner::Vm(vm), copy: settings, name: frontend, pid: peer.pid };
            machine.lock = Lock::Held(held);
            self.watch(id, file)?;
        }
        if let Some(session) = launcher {
            let _ = sessions::attach(&mut state, session, id, SessionType::Remote);
        }
        tracing::info!(machine = %id, pid = peer.pid, state = vm_state.name(), again, "VM process registered");
        if !again {
            state.emit(IEventSource::OnSessionStateChanged, (id.to_string(), SessionState::Locked));
        }
        self.enter(&mut state, id, vm_state);
        self.changed.notify_all();
        Ok(answer)
    }

    /// Waits on a thread for the VM process that holds `file` to end.
    pub(crate) fn watch(self: &Arc<Self>, id: Uuid, file: File) -> ApiResult<()> {
        let svc = self.clone();
        let wait = move || {
            let line = liveness::wait_for_end(&file).unwrap_or_else(|error| {
                tracing::error!(machine = %id, %error, "cannot wait for the VM process");
                None
            });
            svc.vm_ended(id, line);
        };
        std::thread::Builder::new()
            .name("vm-liveness".into())
            .spawn(wait)
            .map(drop)
            .map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))
    }

    /// IVMProcessControl::setState.
    pub(crate) fn vm_state(
        &self,
        peer: &Peer,
        vm_state: MachineState,
        error: Option<ApiError>,
    ) -> ApiResult<()> {
        let mut state = self.state.lock();
        let id = vm_of(&state, peer)?;
        let frontend_error = error.clone();
        if let Some(vm) = state.machine_mut(id)?.vm() {
            let outcome = match (vm_state, error) {
                (MachineState::Running | MachineState::Paused, _) => Some(Ok(())),
                (s, Some(error)) if is_final(s) => Some(Err(error)),
                (s, None) if is_final(s) => {
                    Some(Err(ApiError::fail("The virtual machine has ended while it started")))
                }
                _ => None,
            };
            if let Some(outcome) = outcome
                && let Some(progress) = vm.progress.take()
            {
                progress.complete(outcome);
            }
            vm.ended |= is_final(vm_state);
        }
        if let Some(error) = frontend_error {
            tracing::warn!(machine = %id, state = vm_state.name(), text = error.text, "VM process reports");
        }
        self.enter(&mut state, id, vm_state);
        if is_final(vm_state) {
            state.media.unlock_for(id);
            sessions::detach_all(&mut state, id);
            state.emit(IEventSource::OnSessionStateChanged, (id.to_string(), SessionState::Unlocking));
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// IVMProcessControl::setProgress.
    pub(crate) fn vm_progress(&self, peer: &Peer, percent: u32, operation: &str) -> ApiResult<()> {
        let mut state = self.state.lock();
        let id = vm_of(&state, peer)?;
        if let Some(progress) = state.machine_mut(id)?.vm().and_then(|vm| vm.progress.clone()) {
            progress.set(percent, operation);
        }
        Ok(())
    }

    /// IVMProcessControl::setExtraData.
    pub(crate) fn vm_extra_data(&self, peer: &Peer, key: &str, value: &str) -> ApiResult<()> {
        let mut state = self.state.lock();
        let id = vm_of(&state, peer)?;
        self.set_machine_extra_data(&mut state, id, key, value)
    }

    /// IVMProcessControl::runtimeError.
    pub(crate) fn vm_runtime_error(
        &self,
        peer: &Peer,
        fatal: bool,
        kind: String,
        message: String,
    ) -> ApiResult<()> {
        let mut state = self.state.lock();
        let id = vm_of(&state, peer)?;
        tracing::warn!(machine = %id, fatal, id = kind, "{message}");
        state.emit(IEventSource::OnRuntimeError, (id.to_string(), fatal, kind, message));
        Ok(())
    }

    /// IVMProcessControl::mediumEjected. Unless the drive is set up for temporary ejects, the settings file loses the medium too.
    pub(crate) fn vm_medium_ejected(
        &self,
        peer: &Peer,
        controller: &str,
        port: i32,
        device: i32,
    ) -> ApiResult<()> {
        let mut state = self.state.lock();
        let id = vm_of(&state, peer)?;
        self.eject_medium(&mut state, id, controller, port, device)
    }

    /// Takes note of a state of the machine; what outlives the VM goes into its settings file.
    fn enter(&self, state: &mut State, id: Uuid, new: MachineState) {
        let Some(machine) = state.machines.get_mut(&id) else { return };
        if machine.state == new {
            return;
        }
        tracing::info!(machine = %id, from = machine.state.name(), to = new.name(), "machine state");
        machine.state = new;
        machine.last_change = now_ms();
        if is_final(new) {
            machine.settings = crate::guest_properties::drop_transient(&machine.settings);
            crate::machines::forget_ejects(&mut machine.settings);
            if let Lock::Held(held) = &mut machine.lock {
                held.copy = crate::guest_properties::drop_transient(&held.copy);
            }
            // What was changed at run time and not saved is gone with the VM.
            if let Err(error) = self.store_state(state, id) {
                tracing::error!(machine = %id, %error, "cannot store the machine's state");
            }
        }
        state.emit(IEventSource::OnMachineStateChanged, (id.to_string(), new));
    }

    /// The VM process has ended; `line` is the last that it noted in its liveness file.
    fn vm_ended(&self, id: Uuid, line: Option<Line>) {
        let mut state = self.state.lock();
        self.end_vm(&mut state, id, line);
        liveness::remove(&self.config_dir, id);
        drop(state);
        self.changed.notify_all();
        self.wake_main();
    }

    pub(crate) fn end_vm(&self, state: &mut State, id: Uuid, line: Option<Line>) {
        let end = match line.map(|l| l.state) {
            Some(state) if is_final(state) => state,
            _ => MachineState::Aborted,
        };
        let Some(machine) = state.machines.get_mut(&id) else { return };
        let name = machine.display_name();
        let told = machine.state;
        if let Some(progress) = machine.vm().and_then(|vm| vm.progress.take()) {
            progress.complete(Err(ApiError::fail(format!(
                "The virtual machine '{name}' has terminated unexpectedly during startup"
            ))
            .on("IMachine")));
        }
        machine.lock = Lock::None;
        if !is_final(told) || told != end {
            self.enter(state, id, end);
        }
        if end == MachineState::Aborted {
            tracing::warn!(machine = %id, name, "the VM process died");
        }
        state.media.unlock_for(id);
        sessions::detach_all(state, id);
        state.emit(IEventSource::OnSessionStateChanged, (id.to_string(), SessionState::Unlocked));
    }

    /// A connection ended that may have been a VM process's. The VM itself lives as long as its liveness file is held.
    pub(crate) fn vm_peer_gone(&self, state: &mut MutexGuard<'_, State>, peer: u64) {
        for machine in state.machines.values_mut() {
            if let Some(vm) = machine.vm()
                && vm.peer.as_ref().is_some_and(|p| p.id == peer)
            {
                vm.peer = None;
            }
        }
    }

    /// What a service finds when it starts: VMs that live on, and VMs that ended without a service.
    pub(crate) fn adopt_vms(self: &Arc<Self>) {
        let mut state = self.state.lock();
        for id in state.order.clone() {
            match liveness::look(&self.config_dir, id) {
                Ok(Found::None) => {}
                Ok(Found::Alive { file, line }) => self.adopt(&mut state, id, file, line),
                Ok(Found::Ended { line, .. }) => {
                    tracing::info!(machine = %id, ?line, "a VM ended while no VBoxSVC ran");
                    self.end_vm(&mut state, id, line);
                    liveness::remove(&self.config_dir, id);
                }
                Err(error) => tracing::error!(machine = %id, %error, "cannot look at the VM's lock file"),
            }
        }
    }

    fn adopt(self: &Arc<Self>, state: &mut State, id: Uuid, file: File, line: Option<Line>) {
        let Ok(machine) = state.machine_mut(id) else { return };
        let settings = machine.settings.clone();
        let line = line.unwrap_or(Line { state: MachineState::Starting, pid: 0, since: now_ms() / 1000 });
        machine.state = line.state;
        machine.last_change = line.since.saturating_mul(1000);
        let vm = VmLink { peer: None, ended: is_final(line.state), progress: None };
        let held =
            Held { owner: Owner::Vm(vm), copy: settings.clone(), name: "headless".into(), pid: line.pid };
        machine.lock = Lock::Held(held);
        tracing::info!(machine = %id, pid = line.pid, state = line.state.name(), "a VM is running already");
        if let Err(error) = state.media.lock_for(id, &settings) {
            tracing::error!(machine = %id, %error, "media of a running VM");
        }
        if let Err(error) = self.watch(id, file) {
            tracing::error!(machine = %id, %error, "cannot watch the VM");
        }
    }

    /// ISession's console: a connection to the VM process.
    pub(crate) fn open_console(&self, session: u32) -> ApiResult<(OwnedFd, ObjRef<IConsole>)> {
        let mut state = self.state.lock();
        let not_running = |state: &State| {
            let known =
                state.sessions.get(&session).and_then(|s| s.machine).and_then(|id| state.machines.get(&id));
            match known {
                Some(machine) => ApiError::new(
                    ResultCode::InvalidVmState,
                    format!(
                        "Invalid machine state: {} (the machine '{}' is not running)",
                        machine.state.name(),
                        machine.display_name()
                    ),
                ),
                None => ApiError::new(ResultCode::InvalidSessionState, "The session is not locked"),
            }
        };
        let vm_peer = |state: &mut State| {
            let id = state.sessions.get(&session)?.machine?;
            state.machines.get_mut(&id)?.vm()?.peer.clone()
        };
        let has_vm = |state: &mut State| {
            let id = state.sessions.get(&session).and_then(|s| s.machine);
            id.and_then(|id| state.machines.get_mut(&id)).is_some_and(|m| m.vm().is_some())
        };
        self.wait_for(&mut state, REGISTER_LIMIT, |s| vm_peer(s).is_some() || !has_vm(s));
        let Some(peer) = vm_peer(&mut state) else { return Err(not_running(&state)) };
        drop(state);
        let pair =
            UnixStream::pair().map_err(|e| ApiError::fail(format!("Cannot make a socket pair: {e}")))?;
        let theirs = OwnedFd::from(std::os::fd::OwnedFd::from(pair.0));
        peer.call(paths::ROOT, IVMProcess::AddConsoleClient, (theirs,))?;
        Ok((OwnedFd::from(std::os::fd::OwnedFd::from(pair.1)), ObjRef::new(paths::CONSOLE)))
    }
}

/// The machine whose VM process `peer` is.
pub(crate) fn vm_of(state: &State, peer: &Peer) -> ApiResult<Uuid> {
    let is_peer = |lock: &Lock| match lock {
        Lock::Held(Held { owner: Owner::Vm(VmLink { peer: Some(vm), .. }), .. }) => vm.id == peer.id,
        _ => false,
    };
    let found = state.machines.values().find(|m| is_peer(&m.lock)).map(|m| m.id);
    found.ok_or_else(|| ApiError::new(ResultCode::AccessDenied, "The caller is no VM process"))
}

fn default_frontend(state: &State, id: Uuid) -> ApiResult<String> {
    let machine = &state.machine(id)?.settings.hardware.default_frontend;
    let global = &state.global.settings.system_properties.default_frontend;
    Ok([machine, global].into_iter().find(|f| !f.is_empty()).cloned().unwrap_or_else(|| "gui".into()))
}
