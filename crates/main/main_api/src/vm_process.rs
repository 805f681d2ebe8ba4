//! The VM process's side: becoming the VM of a machine, telling its state, and serving console clients.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use main_api::vm_process::{ConsoleBackend, VmProcess};
//! # use vbox_types::MachineState;
//! # fn build(settings: &str) -> Arc<dyn ConsoleBackend> { unimplemented!() }
//! # fn main() -> Result<(), main_api::ApiError> {
//! let (vm, machine) = VmProcess::open("my machine")?;    // takes the VM lock; starts VBoxSVC if none runs
//! vm.set_state(MachineState::Starting)?;
//! let backend = build(&machine.settings);                // a .vbox text, parsed with the crate `settings`
//! vm.serve_console(backend);                             // from here on clients get consoles
//! vm.set_state(MachineState::Running)?;                  // `startvm` returns now
//! // … run until the guest powers off or ConsoleBackend::power_down is called …
//! vm.set_state(MachineState::Stopping)?;
//! vm.finish(MachineState::PoweredOff, None);             // returns when pending console answers are out
//! # Ok(())
//! # }
//! ```
//!
//! - When the start fails, call `finish(MachineState::PoweredOff, Some(error))`: the error is what `startvm` prints.
//! - When the process ends in any other way, the machine becomes `Aborted`.
//! - When the service goes (killed), the VM goes on. The library tries twice a second to find its successor, which
//!   the next client starts, and registers again with the state of that moment; meanwhile the liveness file
//!   ([`crate::liveness`]) tells every new service the truth. Existing console connections are direct and stay.
//! - States may be told from any thread; they are told in the order of the calls.

use std::collections::HashMap;
use std::os::fd::OwnedFd as StdFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vbox_types::{MachineState, ResultCode};
use zbus::blocking::{Connection, MessageIterator, connection};
use zbus::zvariant::Value;

use crate::enums::{
    BitmapFormat, GuestMonitorStatus, NetworkAdapterPromiscModePolicy, NetworkAttachmentType,
    VMExecutionEngine,
};
use crate::error::{ApiError, ApiResult};
use crate::idl::*;
use crate::liveness::{Held, HoldError};
use crate::progress::{self, Progress, ProgressObject};
use crate::server::{self, CallTable, Peer, ReadTable, Service};
use crate::types::{AttrDesc, Interface, MethodDesc, ObjRef, Octets};
use crate::{ipc, paths};

/// What a running VM can do for console clients. Called from several threads at once. An operation that is not legal in the
/// VM's state is refused with `VBOX_E_INVALID_VM_STATE` (see [`invalid_state`]).
pub trait ConsoleBackend: Send + Sync + 'static {
    /// The VM's state now.
    fn state(&self) -> MachineState;

    /// Stops the virtual CPUs. Returns when they stand. Running → Paused.
    fn pause(&self) -> ApiResult<()>;

    /// Lets the virtual CPUs go on. Paused → Running.
    fn resume(&self) -> ApiResult<()>;

    /// The reset button. Running.
    fn reset(&self) -> ApiResult<()>;

    /// Pulls the plug. Returns when the VM stands and its images are flushed; the process then ends soon by
    /// [`VmProcess::finish`]. Running, Paused, Stuck and while starting.
    fn power_down(&self) -> ApiResult<()>;

    /// The ACPI power button. Running, Paused.
    fn power_button(&self) -> ApiResult<()>;

    /// The ACPI sleep button. Running, Paused.
    fn sleep_button(&self) -> ApiResult<()>;

    /// Whether the guest took the last press of the power button.
    fn power_button_handled(&self) -> ApiResult<bool>;

    /// Whether the guest has switched ACPI on.
    fn guest_entered_acpi_mode(&self) -> ApiResult<bool>;

    /// Scan codes of set 1 for the keyboard. Returns how many it took. Running, Paused, Stuck.
    fn put_scancodes(&self, codes: &[u8]) -> ApiResult<usize>;

    /// Lets go of every key that is down.
    fn release_keys(&self) -> ApiResult<()>;

    /// Whether the guest takes absolute pointer positions.
    fn mouse_absolute_supported(&self) -> bool;

    /// Motion of a relative pointer. Buttons: bit 0 left, 1 right, 2 middle, 3 and 4 the side buttons.
    fn put_mouse_event(&self, dx: i32, dy: i32, dz: i32, dw: i32, buttons: i32) -> ApiResult<()>;

    /// A pointer position in pixels, counted from 1.
    fn put_mouse_event_absolute(&self, x: i32, y: i32, dz: i32, dw: i32, buttons: i32) -> ApiResult<()>;

    /// Size and place of a screen.
    fn screen_resolution(&self, screen: u32) -> ApiResult<ScreenResolution>;

    /// The screen's picture as a PNG file, scaled to `width` by `height`; 0 and 0 for its own size.
    fn take_screenshot_png(&self, screen: u32, width: u32, height: u32) -> ApiResult<Vec<u8>>;

    /// Asks the guest for another size.
    fn set_video_mode_hint(&self, screen: u32, width: u32, height: u32, bits_per_pixel: u32)
    -> ApiResult<()>;

    /// Which engine runs the guest.
    fn execution_engine(&self) -> VMExecutionEngine;

    /// The statistics whose names match `pattern`, one line each.
    fn statistics(&self, pattern: &str, with_descriptions: bool) -> ApiResult<String>;

    /// Sets the statistics whose names match `pattern` to zero.
    fn reset_statistics(&self, pattern: &str) -> ApiResult<()>;

    /// The registers of a virtual CPU with their values.
    fn registers(&self, cpu: u32) -> ApiResult<Vec<(String, String)>>;

    /// Sets registers of a virtual CPU: all of them, or none and an error.
    fn set_registers(&self, cpu: u32, values: &[(String, String)]) -> ApiResult<()>;

    /// Sends a non-maskable interrupt to every virtual CPU.
    fn inject_nmi(&self) -> ApiResult<()>;

    /// The text of an information handler (`VBoxManage debugvm VM info NAME ARGS`).
    fn info(&self, name: &str, args: &str) -> ApiResult<String>;

    /// How long the VM has run.
    fn uptime(&self) -> Duration;

    /// Drives or media have changed at run time: carries out what differs in `settings`, the text of a `.vbox` file whose
    /// relative locations are those in `folder`. Unless `force`, media that the guest has locked stay, and that is an error.
    fn storage_changed(&self, force: bool, settings: &str, folder: &str) -> ApiResult<()>;

    /// The settings of a network adapter have changed at run time; `settings` is the text of a `.vbox` file. What the VM cannot
    /// change while it runs is an error, and stays as it was.
    fn network_adapter_changed(&self, slot: u32, settings: &str) -> ApiResult<()>;

    /// What a bandwidth group may have per second has changed; 0 is no limit.
    fn set_bandwidth(&self, group: &str, bytes_per_second: u64) -> ApiResult<()>;

    /// Plugs a virtual CPU in or out. Takes until the guest has let it go; where it does not, that is an error.
    fn plug_cpu(&self, cpu: u32, plugged: bool) -> ApiResult<()>;

    /// Keeps a password for the encrypted disks that have this id, and unlocks them. All or none where one does not fit.
    fn add_encryption_password(&self, id: &str, password: &str, clear_on_suspend: bool) -> ApiResult<()>;

    /// Forgets a password. Disks that it has unlocked stay so until the machine is paused or off.
    fn remove_encryption_password(&self, id: &str) -> ApiResult<()>;

    /// Forgets all passwords.
    fn clear_encryption_passwords(&self);

    /// Lets guest code run for `percent` of the time.
    fn set_execution_cap(&self, percent: u32) -> ApiResult<()>;
}

/// Size and place of a screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScreenResolution {
    pub width: u32,
    pub height: u32,
    pub bits_per_pixel: u32,
    pub x_origin: i32,
    pub y_origin: i32,
    pub status: GuestMonitorStatus,
}

/// VirtualBox's refusal of an operation in the wrong state.
pub fn invalid_state(state: MachineState) -> ApiError {
    ApiError::new(
        ResultCode::InvalidVmState,
        format!("Invalid machine state: {} (must be Running, Paused or Stuck)", state.name()),
    )
}

/// What a VM process learns of its machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    pub id: Uuid,
    /// The `.vbox` file; its directory is the machine folder.
    pub settings_file: PathBuf,
    /// The effective settings as the text of a `.vbox` file. Locations of media are absolute.
    pub settings: String,
    pub log_folder: PathBuf,
}

/// The running VM as the service knows it.
pub struct VmProcess {
    shared: Arc<Shared>,
}

struct Shared {
    config_dir: PathBuf,
    id: Uuid,
    held: Held,
    state: Mutex<State>,
    backend: Mutex<Option<Arc<dyn ConsoleBackend>>>,
    backend_set: Condvar,
    /// Console calls that are being answered, and operations whose outcome their client has not asked for yet.
    pending: AtomicUsize,
    finished: AtomicBool,
}

struct State {
    machine: MachineState,
    /// None while no service is connected.
    service: Option<Connection>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often a VM process without a service looks for one.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(500);

impl VmProcess {
    /// Becomes the VM process of the machine `name_or_id` of the user's configuration directory.
    pub fn open(name_or_id: &str) -> ApiResult<(Self, MachineConfig)> {
        Self::open_in(&ipc::config_dir()?, name_or_id)
    }

    /// As [`Self::open`], with a given configuration directory.
    pub fn open_in(config_dir: &Path, name_or_id: &str) -> ApiResult<(Self, MachineConfig)> {
        let client = crate::client::Client::connect_to(config_dir)?;
        let id = client.find_machine(name_or_id)?.read(IMachine::Id)?;
        let id = Uuid::parse_str(&id).map_err(|e| ApiError::fail(format!("Bad machine id: {e}")))?;
        let held = Held::take(config_dir, id).map_err(|error| match error {
            HoldError::Busy => ApiError::new(
                ResultCode::InvalidObjectState,
                format!(
                    "The machine '{name_or_id}' is already locked by a session (or being locked or unlocked)"
                ),
            ),
            HoldError::Io(error) => ApiError::new(
                ResultCode::FileError,
                format!("Could not hold the machine's lock file ({error})"),
            ),
        })?;
        let note = held.note(MachineState::Starting);
        note.map_err(|e| {
            ApiError::new(ResultCode::FileError, format!("Could not write the lock file ({e})"))
        })?;
        let shared = Arc::new(Shared {
            config_dir: config_dir.to_owned(),
            id,
            held,
            state: Mutex::new(State { machine: MachineState::Starting, service: None }),
            backend: Mutex::new(None),
            backend_set: Condvar::new(),
            pending: AtomicUsize::new(0),
            finished: AtomicBool::new(false),
        });
        let stream = ipc::connect_running(config_dir)
            .ok_or_else(|| ApiError::connection_lost("VBoxSVC ended while the VM started"))?;
        let (messages, config) = shared.register(stream)?;
        drop(client);
        let keeper = shared.clone();
        std::thread::Builder::new()
            .name("service".into())
            .spawn(move || keeper.keep_connected(messages))
            .map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))?;
        Ok((Self { shared }, config))
    }

    /// The machine's state as last told.
    pub fn state(&self) -> MachineState {
        lock(&self.shared.state).machine
    }

    /// Lets clients have consoles.
    pub fn serve_console(&self, backend: Arc<dyn ConsoleBackend>) {
        *lock(&self.shared.backend) = Some(backend);
        self.shared.backend_set.notify_all();
    }

    /// Tells that the VM has entered a state. An error means that the state could not be put into the liveness
    /// file; a missing service is none.
    pub fn set_state(&self, state: MachineState) -> ApiResult<()> {
        self.shared.tell(state, None)
    }

    /// Tells that the guest has ejected the medium of a drive.
    pub fn medium_ejected(&self, controller: &str, port: i32, device: i32) -> ApiResult<()> {
        let service = lock(&self.shared.state).service.clone();
        let service = service.ok_or_else(|| ApiError::connection_lost("no VBoxSVC"))?;
        call(&service, IVMProcessControl::MediumEjected, (controller.to_owned(), port, device))
    }

    /// Tells clients of something that has happened to the machine; `id` is one of [`crate::runtime_error`]'s.
    pub fn runtime_error(&self, fatal: bool, id: &str, message: &str) -> ApiResult<()> {
        let service = lock(&self.shared.state).service.clone();
        let service = service.ok_or_else(|| ApiError::connection_lost("no VBoxSVC"))?;
        call(&service, IVMProcessControl::RuntimeError, (fatal, id.to_owned(), message.to_owned()))
    }

    /// Tells how far the start has come, for `startvm`'s progress.
    pub fn set_progress(&self, percent: u32, operation: &str) {
        let service = lock(&self.shared.state).service.clone();
        if let Some(service) = service {
            let args = (percent, operation.to_owned());
            if let Err(error) = call(&service, IVMProcessControl::SetProgress, args) {
                tracing::debug!(%error, "progress not told");
            }
        }
    }

    /// Stores an extra-data value of the machine.
    pub fn set_extra_data(&self, key: &str, value: &str) -> ApiResult<()> {
        let service = lock(&self.shared.state).service.clone();
        let service = service.ok_or_else(|| ApiError::connection_lost("no VBoxSVC"))?;
        call(&service, IVMProcessControl::SetExtraData, (key.to_owned(), value.to_owned()))
    }

    /// A cable into a network that machines share (see [`IVMProcessControl::OpenNetwork`]). While no service runs, one is started.
    pub fn open_network(
        &self,
        slot: u32,
        attachment: NetworkAttachmentType,
        name: &str,
        mac: &str,
        policy: NetworkAdapterPromiscModePolicy,
    ) -> ApiResult<StdFd> {
        let service = || lock(&self.shared.state).service.clone();
        let mut connection = service();
        if connection.is_none() && !self.shared.finished.load(Ordering::SeqCst) {
            // The keeper's thread registers with the new service.
            let client = crate::client::Client::connect_to(&self.shared.config_dir)?;
            let deadline = Instant::now() + 4 * RECONNECT_INTERVAL;
            while connection.is_none() && Instant::now() < deadline {
                std::thread::sleep(RECONNECT_INTERVAL / 10);
                connection = service();
            }
            drop(client);
        }
        let connection = connection.ok_or_else(|| ApiError::connection_lost("no VBoxSVC"))?;
        let args = (slot, attachment, name.to_owned(), mac.to_owned(), policy);
        call(&connection, IVMProcessControl::OpenNetwork, args).map(StdFd::from)
    }

    /// Tells the final state, with the reason if it was not wanted, and waits (five seconds at most) until the answers
    /// that console clients wait for are out. The caller ends the process then.
    pub fn finish(&self, state: MachineState, error: Option<ApiError>) {
        self.shared.finished.store(true, Ordering::SeqCst);
        if let Err(error) = self.shared.tell(state, error) {
            tracing::error!(%error, "final state not stored");
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.shared.pending.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn call<A: crate::types::Values, R: crate::types::ReturnShape>(
    service: &Connection,
    method: crate::types::Method<IVMProcessControl, A, R>,
    args: A,
) -> ApiResult<R::Out> {
    let name = <IVMProcessControl as crate::types::InterfaceType>::NAME;
    R::from_values(server::call_values(service, paths::ROOT, name, method.name, args.into_values())?)
}

impl Shared {
    /// Connects and registers with the service at `stream`.
    fn register(self: &Arc<Self>, stream: UnixStream) -> ApiResult<(MessageIterator, MachineConfig)> {
        let messages = connection::Builder::async_io_unix_stream(stream).p2p().build_message_iterator()?;
        let service = Connection::from(&messages);
        // Held across the call, so that no state change falls between the state told and the connection's use.
        let mut state = lock(&self.state);
        let (id, settings_file, settings, log_folder) =
            call(&service, IVMProcessControl::RegisterVM, (self.id.to_string(), state.machine))?;
        state.service = Some(service);
        let id = Uuid::parse_str(&id).map_err(|e| ApiError::fail(format!("Bad machine id: {e}")))?;
        let config = MachineConfig {
            id,
            settings_file: settings_file.into(),
            settings,
            log_folder: log_folder.into(),
        };
        Ok((messages, config))
    }

    /// Serves the service's calls; finds the next service when this one goes. Ends with the VM.
    fn keep_connected(self: Arc<Self>, messages: MessageIterator) {
        let service: Arc<dyn Service> = Arc::new(ProcessService(self.clone()));
        let mut connected = Some(messages);
        loop {
            match connected.take() {
                Some(messages) => {
                    server::serve_messages(messages, 0, &service);
                    lock(&self.state).service = None;
                    if !self.finished.load(Ordering::SeqCst) {
                        tracing::warn!("VBoxSVC is gone; the VM goes on and waits for the next one");
                    }
                }
                None => std::thread::sleep(RECONNECT_INTERVAL),
            }
            if self.finished.load(Ordering::SeqCst) {
                return;
            }
            connected =
                ipc::connect_running(&self.config_dir).and_then(|stream| match self.register(stream) {
                    Ok((messages, _)) => {
                        tracing::info!("registered with a new VBoxSVC");
                        Some(messages)
                    }
                    Err(error) => {
                        tracing::debug!(%error, "not registered");
                        None
                    }
                });
        }
    }

    fn tell(&self, machine: MachineState, error: Option<ApiError>) -> ApiResult<()> {
        let mut state = lock(&self.state);
        state.machine = machine;
        let noted = self.held.note(machine);
        if let Some(service) = &state.service {
            let e = error.unwrap_or(ApiError {
                code: 0,
                text: String::new(),
                component: String::new(),
                interface: String::new(),
            });
            let args = (machine, e.code, e.text, e.component, e.interface);
            if let Err(error) = call(service, IVMProcessControl::SetState, args) {
                tracing::debug!(%error, "state not told");
            }
        }
        noted
            .map_err(|e| ApiError::new(ResultCode::FileError, format!("Could not write the lock file ({e})")))
    }

    /// The back end; waits for it while the VM is being built.
    fn backend(&self) -> ApiResult<Arc<dyn ConsoleBackend>> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut backend = lock(&self.backend);
        loop {
            if let Some(backend) = backend.as_ref() {
                return Ok(backend.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.finished.load(Ordering::SeqCst) {
                return Err(ApiError::new(ResultCode::InvalidVmState, "The machine is not powered up yet"));
            }
            let step = left.min(Duration::from_millis(200));
            backend = self.backend_set.wait_timeout(backend, step).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What the service may call here.
struct ProcessService(Arc<Shared>);

impl Service for ProcessService {
    fn interfaces(&self, _peer: &Peer, path: &str) -> Option<Vec<&'static Interface>> {
        static OWN: Interface = IVMProcess::INTERFACE;
        (path == paths::ROOT).then(|| vec![&OWN])
    }

    fn children(&self, _peer: &Peer, _path: &str) -> Vec<String> {
        Vec::new()
    }

    fn read(
        &self,
        _: &Peer,
        _: &str,
        i: &'static Interface,
        a: &'static AttrDesc,
    ) -> ApiResult<Value<'static>> {
        Err(server::not_implemented(i, a.name))
    }

    fn write(
        &self,
        _: &Peer,
        _: &str,
        i: &'static Interface,
        a: &'static AttrDesc,
        _: Value<'static>,
    ) -> ApiResult<()> {
        Err(server::not_implemented(i, a.name))
    }

    /// The back end may still be in the making.
    fn may_block(&self, _interface: &Interface, method: &MethodDesc) -> bool {
        [IVMProcess::NetworkAdapterChange.name, IVMProcess::CPUChange.name].contains(&method.name)
    }

    fn call(
        &self,
        _peer: &Peer,
        _path: &str,
        interface: &'static Interface,
        method: &'static MethodDesc,
        args: Vec<Value<'static>>,
    ) -> ApiResult<Vec<Value<'static>>> {
        static CALLS: LazyLock<CallTable<Arc<Shared>>> = LazyLock::new(|| {
            let mut t = CallTable::default();
            t.add(IVMProcess::AddConsoleClient, |shared: &Arc<Shared>, (fd,)| {
                let stream = UnixStream::from(StdFd::from(fd));
                let console: Arc<dyn Service> = Arc::new(ConsoleService::new(shared.clone()));
                let spawned = std::thread::Builder::new().name("console".into()).spawn(move || {
                    if let Err(error) = server::serve(stream, &console) {
                        tracing::debug!(%error, "console connection");
                    }
                });
                spawned.map(drop).map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))
            })
            .add(IVMProcess::StorageChange, |shared, (force, settings, folder)| {
                shared.backend()?.storage_changed(force, &settings, &folder)
            })
            .add(IVMProcess::NetworkAdapterChange, |shared, (slot, settings)| {
                shared.backend()?.network_adapter_changed(slot, &settings)
            })
            .add(IVMProcess::BandwidthGroupChange, |shared, (group, bytes_per_second)| {
                shared.backend()?.set_bandwidth(&group, bytes_per_second)
            })
            .add(IVMProcess::CPUChange, |shared, (cpu, plugged)| shared.backend()?.plug_cpu(cpu, plugged))
            .add(IVMProcess::CPUExecutionCapChange, |shared, (cap,)| {
                shared.backend()?.set_execution_cap(cap)
            });
            t
        });
        CALLS.call(&self.0, interface, method, args)
    }
}

/// One console connection.
struct ConsoleService {
    shared: Arc<Shared>,
    operations: Mutex<HashMap<u32, Operation>>,
    next_progress: AtomicU32,
}

/// An operation of a console client.
struct Operation {
    progress: Arc<Progress>,
    /// Keeps the process from ending before the client has learnt the outcome.
    unknown: Option<Pending>,
}

/// Counts in [`Shared::pending`].
struct Pending(Arc<Shared>);

impl Pending {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.pending.fetch_add(1, Ordering::SeqCst);
        Self(shared.clone())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::SeqCst);
    }
}

const OBJECTS: [(&str, &Interface); 5] = [
    ("", &IConsole::INTERFACE),
    ("Display", &IDisplay::INTERFACE),
    ("Keyboard", &IKeyboard::INTERFACE),
    ("Mouse", &IMouse::INTERFACE),
    ("Debugger", &IMachineDebugger::INTERFACE),
];

impl ConsoleService {
    fn new(shared: Arc<Shared>) -> Self {
        Self { shared, operations: Mutex::new(HashMap::new()), next_progress: AtomicU32::new(1) }
    }

    fn progress(&self, path: &str) -> Option<(ProgressObject, &'static Interface)> {
        let rest = path.strip_prefix(paths::CONSOLE)?.strip_prefix("/Progress/")?;
        let (number, interface): (_, &'static Interface) = match rest.split_once('/') {
            None => (rest, &IProgress::INTERFACE),
            Some((number, "ErrorInfo")) => (number, &IVirtualBoxErrorInfo::INTERFACE),
            Some(_) => return None,
        };
        let progress = lock(&self.operations).get(&number.parse().ok()?)?.progress.clone();
        let path = format!("{}/Progress/{number}", paths::CONSOLE);
        Some((ProgressObject { progress, path }, interface))
    }

    /// The client has read the outcome: the result code of a success, the text of a failure.
    fn outcome_known(&self, object: &ProgressObject, interface: &Interface, attr: &AttrDesc) {
        let Some((outcome, _)) = object.progress.outcome() else { return };
        let last = match outcome {
            Ok(()) => (IProgress::INTERFACE.name, IProgress::ResultCode.name),
            Err(_) => (IVirtualBoxErrorInfo::INTERFACE.name, IVirtualBoxErrorInfo::Text.name),
        };
        if last == (interface.name, attr.name) {
            let mut operations = lock(&self.operations);
            if let Some(operation) =
                operations.values_mut().find(|o| Arc::ptr_eq(&o.progress, &object.progress))
            {
                operation.unknown = None;
            }
        }
    }

    /// Runs `operation` on a thread of its own.
    fn run(
        &self,
        description: &str,
        operation: impl FnOnce() -> ApiResult<()> + Send + 'static,
    ) -> ApiResult<ObjRef<IProgress>> {
        let number = self.next_progress.fetch_add(1, Ordering::Relaxed);
        let progress = Arc::new(Progress::new(description, 1, false));
        let unknown = Some(Pending::new(&self.shared));
        lock(&self.operations).insert(number, Operation { progress: progress.clone(), unknown });
        let spawned = std::thread::Builder::new()
            .name("operation".into())
            .spawn(move || progress.complete(operation()));
        spawned.map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))?;
        Ok(ObjRef::new(format!("{}/Progress/{number}", paths::CONSOLE)))
    }
}

type Backend = Arc<dyn ConsoleBackend>;

static PROGRESS_READS: LazyLock<ReadTable<ProgressObject>> = LazyLock::new(progress::reads);
static PROGRESS_CALLS: LazyLock<CallTable<ProgressObject>> = LazyLock::new(progress::calls);

static READS: LazyLock<ReadTable<Backend>> = LazyLock::new(|| {
    let mut t = ReadTable::<Backend>::default();
    t.add(IConsole::State, |b| b.state())
        .add(IConsole::Display, |_| ObjRef::new(format!("{}/Display", paths::CONSOLE)))
        .add(IConsole::Keyboard, |_| ObjRef::new(format!("{}/Keyboard", paths::CONSOLE)))
        .add(IConsole::Mouse, |_| ObjRef::new(format!("{}/Mouse", paths::CONSOLE)))
        .add(IConsole::Debugger, |_| ObjRef::new(format!("{}/Debugger", paths::CONSOLE)))
        .add(IMouse::AbsoluteSupported, |b| b.mouse_absolute_supported())
        .add(IMouse::RelativeSupported, |_| true)
        .add(IMouse::NeedsHostCursor, |_| false)
        .add(IMachineDebugger::ExecutionEngine, |b| b.execution_engine())
        .add(IMachineDebugger::HWVirtExEnabled, |b| {
            matches!(b.execution_engine(), VMExecutionEngine::HwVirt | VMExecutionEngine::NativeApi)
        })
        .add(IMachineDebugger::HWVirtExNestedPagingEnabled, |b| {
            matches!(b.execution_engine(), VMExecutionEngine::HwVirt | VMExecutionEngine::NativeApi)
        })
        .add(IMachineDebugger::OSName, |_| String::new())
        .add(IMachineDebugger::OSVersion, |_| String::new())
        .add(IMachineDebugger::Uptime, |b| i64::try_from(b.uptime().as_millis()).unwrap_or(i64::MAX));
    t
});

static CALLS: LazyLock<CallTable<Backend>> = LazyLock::new(|| {
    let mut t = CallTable::<Backend>::default();
    t.add(IConsole::Reset, |b, ()| b.reset())
        .add(IConsole::Pause, |b, ()| b.pause())
        .add(IConsole::Resume, |b, ()| b.resume())
        .add(IConsole::PowerButton, |b, ()| b.power_button())
        .add(IConsole::SleepButton, |b, ()| b.sleep_button())
        .add(IConsole::GetPowerButtonHandled, |b, ()| b.power_button_handled())
        .add(IConsole::GetGuestEnteredACPIMode, |b, ()| b.guest_entered_acpi_mode())
        .add(IConsole::AddEncryptionPassword, |b, (id, password, clear)| {
            b.add_encryption_password(&id, &password, clear)
        })
        .add(IConsole::AddEncryptionPasswords, |b, (ids, passwords, clear)| {
            if ids.len() != passwords.len() || ids.is_empty() {
                return Err(ApiError::invalid_arg("There must be a password for each id"));
            }
            let mut all = ids.iter().zip(&passwords);
            all.try_for_each(|(id, password)| b.add_encryption_password(id, password, clear))
        })
        .add(IConsole::RemoveEncryptionPassword, |b, (id,)| b.remove_encryption_password(&id))
        .add(IConsole::ClearAllEncryptionPasswords, |b, ()| {
            b.clear_encryption_passwords();
            Ok(())
        })
        .add(IKeyboard::PutScancode, |b, (code,)| b.put_scancodes(&[code as u8]).map(drop))
        .add(IKeyboard::PutScancodes, |b, (codes,)| {
            let codes: Vec<u8> = codes.into_iter().map(|c| c as u8).collect();
            Ok(u32::try_from(b.put_scancodes(&codes)?).unwrap_or(u32::MAX))
        })
        // Ctrl, Alt and Delete down; then up in the other order.
        .add(IKeyboard::PutCAD, |b, ()| {
            b.put_scancodes(&[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]).map(drop)
        })
        .add(IKeyboard::ReleaseKeys, |b, ()| b.release_keys())
        .add(IMouse::PutMouseEvent, |b, (dx, dy, dz, dw, buttons)| b.put_mouse_event(dx, dy, dz, dw, buttons))
        .add(IMouse::PutMouseEventAbsolute, |b, (x, y, dz, dw, buttons)| {
            b.put_mouse_event_absolute(x, y, dz, dw, buttons)
        })
        .add(IDisplay::GetScreenResolution, |b, (screen,)| {
            let r = b.screen_resolution(screen)?;
            Ok((r.width, r.height, r.bits_per_pixel, r.x_origin, r.y_origin, r.status))
        })
        .add(IDisplay::TakeScreenShotToArray, |b, (screen, width, height, format)| {
            if format != BitmapFormat::PNG {
                return Err(ApiError::new(ResultCode::NotSupported, "Unsupported screenshot format"));
            }
            Ok(Octets(b.take_screenshot_png(screen, width, height)?))
        })
        .add(
            IDisplay::SetVideoModeHint,
            |b, (screen, _enabled, _move, _x, _y, width, height, bits, _notify)| {
                b.set_video_mode_hint(screen, width, height, bits)
            },
        )
        .add(IMachineDebugger::GetStats, |b, (pattern, descriptions)| b.statistics(&pattern, descriptions))
        .add(IMachineDebugger::ResetStats, |b, (pattern,)| b.reset_statistics(&pattern))
        .add(IMachineDebugger::Info, |b, (name, args)| b.info(&name, &args))
        .add(IMachineDebugger::GetRegister, |b, (cpu, name)| {
            let all = b.registers(cpu)?;
            let found = all.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(&name));
            found.map(|(_, value)| value).ok_or_else(|| {
                ApiError::new(ResultCode::ObjectNotFound, format!("Register '{name}' was not found"))
            })
        })
        .add(IMachineDebugger::GetRegisters, |b, (cpu,)| Ok(b.registers(cpu)?.into_iter().unzip()))
        .add(IMachineDebugger::SetRegister, |b, (cpu, name, value)| b.set_registers(cpu, &[(name, value)]))
        .add(IMachineDebugger::SetRegisters, |b, (cpu, names, values)| {
            if names.len() != values.len() {
                return Err(ApiError::invalid_arg("There must be a value for each register"));
            }
            b.set_registers(cpu, &names.into_iter().zip(values).collect::<Vec<_>>())
        })
        .add(IMachineDebugger::InjectNMI, |b, ()| b.inject_nmi());
    t
});

impl Service for ConsoleService {
    fn interfaces(&self, _peer: &Peer, path: &str) -> Option<Vec<&'static Interface>> {
        if let Some((_, interface)) = self.progress(path) {
            return Some(vec![interface]);
        }
        let rest = path.strip_prefix(paths::CONSOLE)?;
        let name = rest.strip_prefix('/').unwrap_or(rest);
        OBJECTS.iter().find(|(n, _)| *n == name).map(|(_, i)| vec![*i])
    }

    fn children(&self, _peer: &Peer, path: &str) -> Vec<String> {
        if path == paths::CONSOLE {
            return OBJECTS.iter().filter(|(n, _)| !n.is_empty()).map(|(n, _)| (*n).to_owned()).collect();
        }
        Vec::new()
    }

    fn read(
        &self,
        _peer: &Peer,
        path: &str,
        interface: &'static Interface,
        attr: &'static AttrDesc,
    ) -> ApiResult<Value<'static>> {
        let _pending = Pending::new(&self.shared);
        match self.progress(path) {
            Some((progress, _)) => {
                let value = PROGRESS_READS.read(&progress, interface, attr)?;
                self.outcome_known(&progress, interface, attr);
                Ok(value)
            }
            None => READS.read(&self.shared.backend()?, interface, attr),
        }
    }

    fn write(
        &self,
        _peer: &Peer,
        _path: &str,
        interface: &'static Interface,
        attr: &'static AttrDesc,
        _value: Value<'static>,
    ) -> ApiResult<()> {
        Err(server::not_implemented(interface, attr.name))
    }

    fn call(
        &self,
        _peer: &Peer,
        path: &str,
        interface: &'static Interface,
        method: &'static MethodDesc,
        args: Vec<Value<'static>>,
    ) -> ApiResult<Vec<Value<'static>>> {
        let _pending = Pending::new(&self.shared);
        if let Some((progress, _)) = self.progress(path) {
            return PROGRESS_CALLS.call(&progress, interface, method, args);
        }
        let backend = self.shared.backend()?;
        if interface.name == IConsole::INTERFACE.name && method.name == IConsole::PowerDown.name {
            use crate::types::ApiType;
            let progress = self.run("Stopping the virtual machine", move || backend.power_down())?;
            return Ok(vec![progress.into_value()]);
        }
        CALLS.call(&backend, interface, method, args)
    }

    fn detached(&self, _peer: &Peer) {
        lock(&self.operations).clear();
    }

    /// A screen shot or a pause must not hold up the scan codes of the same client.
    fn may_block(&self, interface: &Interface, _method: &MethodDesc) -> bool {
        interface.name != IKeyboard::INTERFACE.name && interface.name != IMouse::INTERFACE.name
    }
}
