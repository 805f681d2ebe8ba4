//! The service's state, and how calls reach it.
//!
//! One lock guards everything ([`Svc::state`]). It is held for the length of a call's own work, file writes included, never
//! while waiting for a peer: events go through a queue and a thread per listener, replies are sent after the lock is
//! given back, and methods that wait (see [`crate::calls::may_block`]) do so on [`Svc::changed`].

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use main_api::enums::{SessionState, SessionType};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::paths;
use main_api::progress::{self, Progress, ProgressObject};
use main_api::server::{self, CallTable, Peer, ReadTable, Service, WriteTable};
use main_api::types::{AttrDesc, Interface, MethodDesc, Signal, Values};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::event::{EventfdFlags, eventfd};
use settings::MachineSettings;
use uuid::Uuid;
use vbox_types::{MachineState, ResultCode};
use zbus::zvariant::Value;

use crate::appliance::Appliance;
use crate::media::MediaPool;
use crate::networks::Started;
use crate::objects::{self, DhcpScope, MachineRef, Object, Part};
use crate::store::{GlobalStore, MachineStore};
use crate::view::{Meta, View, gone};
use crate::{attrs_devices, attrs_global, attrs_machine, calls, calls_networks};

/// How long the result of a finished operation can be asked for.
const PROGRESS_AFTERLIFE: Duration = Duration::from_secs(30);
/// Events that a listener may be behind before it loses some.
const EVENT_QUEUE: usize = 1024;

pub(crate) struct Svc {
    pub(crate) config_dir: PathBuf,
    pub(crate) state: Mutex<State>,
    /// Signalled when a machine's lock or state changes.
    pub(crate) changed: Condvar,
    /// Held while the process of a network is looked for, started and told what the network is to be.
    pub(crate) starting_network: Mutex<()>,
    /// Written to when the last user of the service may have gone.
    pub(crate) idle: rustix::fd::OwnedFd,
}

pub(crate) struct State {
    pub(crate) global: GlobalStore,
    /// In the order of registration.
    pub(crate) order: Vec<Uuid>,
    pub(crate) machines: HashMap<Uuid, Machine>,
    /// Machines that a client has made, opened or unregistered, with the client that may use them.
    pub(crate) unregistered: HashMap<Uuid, (u64, Machine)>,
    pub(crate) media: MediaPool,
    pub(crate) sessions: BTreeMap<u32, Session>,
    pub(crate) progress: BTreeMap<u32, Arc<Progress>>,
    pub(crate) appliances: BTreeMap<u32, Appliance>,
    pub(crate) networks: Started,
    peers: HashMap<u64, Option<SyncSender<Event>>>,
    next_session: u32,
    next_progress: u32,
    pub(crate) next_appliance: u32,
}

struct Event {
    name: &'static str,
    args: Vec<Value<'static>>,
}

/// A machine with its committed settings.
pub(crate) struct Machine {
    pub(crate) id: Uuid,
    pub(crate) file: PathBuf,
    pub(crate) settings: Arc<MachineSettings>,
    pub(crate) store: Option<MachineStore>,
    pub(crate) access_error: Option<ApiError>,
    pub(crate) state: MachineState,
    /// Milliseconds since 1970.
    pub(crate) last_change: i64,
    pub(crate) lock: Lock,
}

/// Who has a machine locked.
pub(crate) enum Lock {
    None,
    /// A VM process is starting.
    Spawning {
        pid: u32,
        session: u32,
        progress: Arc<Progress>,
        frontend: String,
    },
    Held(Held),
}

/// A write lock, with the copy of the settings that it may change.
pub(crate) struct Held {
    pub(crate) owner: Owner,
    pub(crate) copy: Arc<MachineSettings>,
    /// The client's or the front end's name.
    pub(crate) name: String,
    pub(crate) pid: u32,
}

pub(crate) enum Owner {
    Session(u32),
    Vm(VmLink),
}

/// The VM process of a machine.
pub(crate) struct VmLink {
    /// None while the VM process has not (or not again) registered.
    pub(crate) peer: Option<Peer>,
    /// It has told a final state and is about to exit.
    pub(crate) ended: bool,
    /// The operation that started it, until it runs.
    pub(crate) progress: Option<Arc<Progress>>,
}

/// A client's ISession.
pub(crate) struct Session {
    pub(crate) peer: u64,
    pub(crate) name: String,
    pub(crate) kind: SessionType,
    pub(crate) state: SessionState,
    pub(crate) machine: Option<Uuid>,
}

impl Machine {
    pub(crate) fn session_state(&self) -> SessionState {
        match &self.lock {
            Lock::None => SessionState::Unlocked,
            Lock::Spawning { .. } => SessionState::Spawning,
            Lock::Held(Held { owner: Owner::Vm(VmLink { ended: true, .. }), .. }) => SessionState::Unlocking,
            Lock::Held(_) => SessionState::Locked,
        }
    }

    /// The name for texts: the machine's, or its id if the name is not known.
    pub(crate) fn display_name(&self) -> String {
        if self.settings.name.is_empty() { self.id.to_string() } else { self.settings.name.clone() }
    }

    pub(crate) fn vm(&mut self) -> Option<&mut VmLink> {
        match &mut self.lock {
            Lock::Held(Held { owner: Owner::Vm(vm), .. }) => Some(vm),
            _ => None,
        }
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

impl State {
    pub(crate) fn new(global: GlobalStore) -> Self {
        Self {
            global,
            order: Vec::new(),
            machines: HashMap::new(),
            unregistered: HashMap::new(),
            media: MediaPool::default(),
            sessions: BTreeMap::new(),
            progress: BTreeMap::new(),
            appliances: BTreeMap::new(),
            networks: Started::default(),
            peers: HashMap::new(),
            next_session: 1,
            next_progress: 1,
            next_appliance: 1,
        }
    }

    pub(crate) fn machine(&self, id: Uuid) -> ApiResult<&Machine> {
        self.machines.get(&id).ok_or_else(|| not_registered(id))
    }

    pub(crate) fn machine_mut(&mut self, id: Uuid) -> ApiResult<&mut Machine> {
        self.machines.get_mut(&id).ok_or_else(|| not_registered(id))
    }

    /// The machine that `reference` leads to. `peer` is the client that asks.
    pub(crate) fn resolve(&self, peer: u64, reference: MachineRef) -> ApiResult<&Machine> {
        let unregistered = |id: &Uuid| {
            self.unregistered.get(id).filter(|(owner, _)| *owner == peer).map(|(_, m)| m).ok_or_else(gone)
        };
        match reference {
            MachineRef::Registered(id) => self.machines.get(&id).map_or_else(|| unregistered(&id), Ok),
            MachineRef::Unregistered(id) => unregistered(&id).or_else(|_| self.machine(id)),
            MachineRef::Session(number) => {
                let session = self.sessions.get(&number).ok_or_else(gone)?;
                self.machine(session.machine.ok_or_else(gone)?)
            }
        }
    }

    /// What a client sees of a part of a machine.
    pub(crate) fn view(&self, peer: u64, reference: MachineRef, part: Part) -> ApiResult<View> {
        let machine = self.resolve(peer, reference)?;
        let copy = match (&machine.lock, reference) {
            (Lock::Held(held), MachineRef::Session(_)) => Some(&held.copy),
            _ => None,
        };
        let (session_name, session_pid) = match &machine.lock {
            Lock::None => (String::new(), 0),
            Lock::Spawning { frontend, pid, .. } => (frontend.clone(), *pid),
            Lock::Held(held) => (held.name.clone(), held.pid),
        };
        let settings = copy.unwrap_or(&machine.settings).clone();
        if part != Part::AccessError && !part.exists(&settings) {
            return Err(gone());
        }
        Ok(View {
            machine: reference,
            part,
            meta: Meta {
                state: machine.state,
                last_state_change: machine.last_change,
                session_state: machine.session_state(),
                session_name,
                session_pid,
                settings_file: machine.file.clone(),
                modified: copy.is_some_and(|c| **c != *machine.settings),
                access_error: machine.access_error.clone(),
            },
            settings,
        })
    }

    /// Whether a client may change the machine through `reference` now. `at_run_time`: the change is one that a
    /// running VM allows.
    pub(crate) fn check_mutable(&self, peer: u64, reference: MachineRef, at_run_time: bool) -> ApiResult<()> {
        let machine = self.resolve(peer, reference)?;
        if let Some(error) = &machine.access_error {
            return Err(error.clone());
        }
        let locked = match reference {
            MachineRef::Session(_) => true,
            _ => !self.machines.contains_key(&machine.id),
        };
        let state_allows = at_run_time || !machine.state.is_online();
        if locked && state_allows {
            return Ok(());
        }
        Err(ApiError::new(
            ResultCode::InvalidVmState,
            format!("The machine is not mutable (state is {})", machine.state.name()),
        ))
    }

    /// Makes the changed copy in `view` the machine's.
    pub(crate) fn put_back(&mut self, peer: u64, view: View) -> ApiResult<()> {
        let id = self.resolve(peer, view.machine)?.id;
        match self.machines.get_mut(&id) {
            Some(machine) => match &mut machine.lock {
                Lock::Held(held) => held.copy = view.settings,
                _ => return Err(gone()),
            },
            None => {
                let (_, machine) = self.unregistered.get_mut(&id).ok_or_else(gone)?;
                machine.settings = view.settings;
            }
        }
        Ok(())
    }

    /// Changes a machine's settings: checks, lets `change` work on a copy, and keeps the copy if it succeeds.
    pub(crate) fn edit<T>(
        &mut self,
        peer: u64,
        reference: MachineRef,
        part: Part,
        at_run_time: bool,
        change: impl FnOnce(&mut Self, &mut View) -> ApiResult<T>,
    ) -> ApiResult<T> {
        self.check_mutable(peer, reference, at_run_time)?;
        let mut view = self.view(peer, reference, part)?;
        let result = change(self, &mut view)?;
        self.put_back(peer, view)?;
        Ok(result)
    }

    /// Sends an event to every listener.
    pub(crate) fn emit<A: Values>(&mut self, signal: Signal<IEventSource, A>, args: A) {
        let args = args.into_values();
        for queue in self.peers.values_mut() {
            let Some(sender) = queue else { continue };
            let event =
                Event { name: signal.name, args: args.iter().filter_map(|v| v.try_clone().ok()).collect() };
            match sender.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => {
                    tracing::warn!(event = signal.name, "a listener does not keep up")
                }
                Err(TrySendError::Disconnected(_)) => *queue = None,
            }
        }
    }

    /// Starts to send events to `peer`.
    pub(crate) fn listen(&mut self, peer: &Peer) -> ApiResult<()> {
        let (sender, receiver) = sync_channel::<Event>(EVENT_QUEUE);
        let connection = peer.clone();
        std::thread::Builder::new()
            .name("events".into())
            .spawn(move || {
                for event in receiver {
                    connection.signal(paths::EVENT_SOURCE, "IEventSource", event.name, event.args);
                }
            })
            .map_err(|e| ApiError::fail(format!("Cannot start a thread: {e}")))?;
        self.peers.insert(peer.id, Some(sender));
        Ok(())
    }

    pub(crate) fn stop_listening(&mut self, peer: u64) {
        self.peers.insert(peer, None);
    }

    pub(crate) fn add_session(&mut self, peer: &Peer) -> u32 {
        let number = self.next_session;
        self.next_session += 1;
        let name = std::fs::read_to_string(format!("/proc/{}/comm", peer.pid)).unwrap_or_default();
        self.sessions.insert(
            number,
            Session {
                peer: peer.id,
                name: name.trim().to_owned(),
                kind: SessionType::Null,
                state: SessionState::Unlocked,
                machine: None,
            },
        );
        number
    }

    /// Makes an operation known to clients and returns its object's path.
    pub(crate) fn add_progress(&mut self, operation: Arc<Progress>) -> String {
        let expired =
            |p: &Arc<Progress>| p.outcome().is_some_and(|(_, end)| end.elapsed() > PROGRESS_AFTERLIFE);
        self.progress.retain(|_, p| !expired(p));
        let number = self.next_progress;
        self.next_progress += 1;
        self.progress.insert(number, operation);
        objects::progress_path(number)
    }

    /// Whether someone needs the service: a client, a VM, or an operation.
    pub(crate) fn in_use(&self) -> bool {
        !self.peers.is_empty()
            || self.machines.values().any(|m| match &m.lock {
                // A VM that lives but has not registered again comes back to whichever service runs.
                Lock::Held(Held { owner: Owner::Vm(vm), .. }) => vm.peer.is_some() || vm.ended,
                Lock::Spawning { .. } => true,
                _ => false,
            })
            || self.progress.values().any(|p| p.outcome().is_none())
    }
}

fn not_registered(id: Uuid) -> ApiError {
    ApiError::not_found(format!("Could not find a registered machine with UUID {{{id}}}"))
}

impl Svc {
    pub(crate) fn new(config_dir: PathBuf, state: State) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            config_dir,
            state: Mutex::new(state),
            changed: Condvar::new(),
            starting_network: Mutex::default(),
            idle: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        }))
    }

    /// Wakes the main thread to look whether anyone needs the service.
    pub(crate) fn wake_main(&self) {
        let _ = rustix::io::write(&self.idle, &1u64.to_ne_bytes());
    }

    /// Waits for `done`, at most for `limit`. Gives the lock back meanwhile.
    pub(crate) fn wait_for(
        &self,
        state: &mut MutexGuard<'_, State>,
        limit: Duration,
        mut done: impl FnMut(&mut State) -> bool,
    ) -> bool {
        let deadline = Instant::now() + limit;
        while !done(state) {
            if self.changed.wait_until(state, deadline).timed_out() {
                return done(state);
            }
        }
        true
    }
}

/// What a call of an object other than an attribute of a machine works on.
pub(crate) struct Context {
    pub(crate) svc: Arc<Svc>,
    pub(crate) peer: Peer,
    pub(crate) object: Object,
}

/// The service as connections see it.
pub(crate) struct ApiService(pub(crate) Arc<Svc>);

pub(crate) static MACHINE_READS: LazyLock<ReadTable<View>> = LazyLock::new(|| tables().0);
static MACHINE_WRITES: LazyLock<WriteTable<View>> = LazyLock::new(|| tables().1);
static GLOBAL_READS: LazyLock<ReadTable<Context>> = LazyLock::new(attrs_global::reads);
static GLOBAL_WRITES: LazyLock<WriteTable<Context>> = LazyLock::new(attrs_global::writes);
static CALLS: LazyLock<CallTable<Context>> = LazyLock::new(calls::table);
static PROGRESS_READS: LazyLock<ReadTable<ProgressObject>> = LazyLock::new(progress::reads);
static PROGRESS_CALLS: LazyLock<CallTable<ProgressObject>> = LazyLock::new(progress::calls);

fn tables() -> (ReadTable<View>, WriteTable<View>) {
    let (mut reads, mut writes) = (ReadTable::default(), WriteTable::default());
    attrs_machine::add(&mut reads, &mut writes);
    attrs_devices::add(&mut reads, &mut writes);
    (reads, writes)
}

/// Attributes of a machine whose settings file cannot be used that can still be read.
const WITHOUT_SETTINGS: [&str; 9] = [
    "Accessible",
    "AccessError",
    "Id",
    "SettingsFilePath",
    "State",
    "LastStateChange",
    "SessionState",
    "SessionName",
    "SessionPID",
];

macro_rules! table {
    ($name:ident) => {{
        static TABLE: Interface = $name::INTERFACE;
        &TABLE
    }};
}

/// What a DHCP server, or a part of one, can be asked.
fn dhcp_interfaces(state: &State, object: &Object) -> Option<Vec<&'static Interface>> {
    let server = |name: &String| state.global.settings.dhcp_servers.iter().find(|s| s.network_name == *name);
    match object {
        Object::DhcpServer(name) => server(name).map(|_| vec![table!(IDHCPServer)]),
        Object::DhcpConfig(name, scope) => {
            calls_networks::config_of(server(name)?, scope)?;
            Some(match scope {
                DhcpScope::Global => vec![table!(IDHCPConfig)],
                DhcpScope::Group(_) => vec![table!(IDHCPConfig), table!(IDHCPGroupConfig)],
                DhcpScope::Client(_) => vec![table!(IDHCPConfig), table!(IDHCPIndividualConfig)],
            })
        }
        Object::DhcpCondition(name, group, at) => {
            let group = server(name)?.groups.iter().find(|g| g.name == *group)?;
            group.conditions.get(*at).map(|_| vec![table!(IDHCPGroupCondition)])
        }
        _ => None,
    }
}

impl ApiService {
    fn context(&self, peer: &Peer, object: Object) -> Context {
        Context { svc: self.0.clone(), peer: peer.clone(), object }
    }

    fn progress(&self, object: &Object) -> Option<ProgressObject> {
        let (Object::Progress(number) | Object::ProgressError(number)) = object else { return None };
        let progress = self.0.state.lock().progress.get(number)?.clone();
        Some(ProgressObject { progress, path: objects::progress_path(*number) })
    }
}

impl Service for ApiService {
    fn interfaces(&self, peer: &Peer, path: &str) -> Option<Vec<&'static Interface>> {
        let object = objects::parse(path)?;
        let state = self.0.state.lock();
        Some(match object {
            Object::Root => vec![table!(IClientSupport), table!(IVMProcessControl)],
            Object::VirtualBox => vec![table!(IVirtualBox)],
            Object::EventSource => vec![table!(IEventSource)],
            Object::SystemProperties => vec![table!(ISystemProperties)],
            Object::Host => vec![table!(IHost)],
            Object::GuestOsType(_) => vec![table!(IGuestOSType)],
            Object::Medium(id) => state.media.find(id).map(|_| vec![table!(IMedium)])?,
            Object::Progress(number) => state.progress.get(&number).map(|_| vec![table!(IProgress)])?,
            Object::ProgressError(number) => {
                let failed = state.progress.get(&number)?.outcome().is_some_and(|(r, _)| r.is_err());
                failed.then(|| vec![table!(IVirtualBoxErrorInfo)])?
            }
            Object::Session(number) => {
                state.sessions.get(&number).filter(|s| s.peer == peer.id).map(|_| vec![table!(ISession)])?
            }
            Object::Appliance(number) => state
                .appliances
                .get(&number)
                .filter(|a| a.peer == peer.id)
                .map(|_| vec![table!(IAppliance)])?,
            Object::SystemDescription(number, index) => {
                let own = state.appliances.get(&number).filter(|a| a.peer == peer.id)?;
                own.descriptions.get(index).map(|_| vec![table!(IVirtualSystemDescription)])?
            }
            Object::DhcpServer(_) | Object::DhcpConfig(..) | Object::DhcpCondition(..) => {
                return dhcp_interfaces(&state, &object);
            }
            Object::NatNetwork(name) => {
                let known = state.global.settings.nat_networks.iter().any(|n| n.network_name == name);
                known.then(|| vec![table!(INATNetwork)])?
            }
            Object::HostOnlyNetwork(id) => {
                let known = state.global.settings.host_only_networks.iter().any(|n| n.uuid == id);
                known.then(|| vec![table!(IHostOnlyNetwork)])?
            }
            Object::HostInterface(name) => {
                netstack::host::interface(&name).ok().map(|_| vec![table!(IHostNetworkInterface)])?
            }
            Object::Machine(reference, part) => {
                if let MachineRef::Session(number) = reference
                    && state.sessions.get(&number).is_none_or(|s| s.peer != peer.id)
                {
                    return None;
                }
                let interface = part.interface();
                state.view(peer.id, reference, part).ok().map(|_| vec![interface])?
            }
        })
    }

    fn children(&self, peer: &Peer, path: &str) -> Vec<String> {
        let state = self.0.state.lock();
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        match path {
            "/" => return owned(&["org"]),
            "/org" => return owned(&["virtualbox"]),
            paths::ROOT => {
                return owned(&[
                    "VirtualBox",
                    "GuestOSTypes",
                    "Media",
                    "Progress",
                    "Machines",
                    "Unregistered",
                    "Sessions",
                    "Appliances",
                    "DHCPServers",
                    "NATNetworks",
                    "HostOnlyNetworks",
                    "HostInterfaces",
                ]);
            }
            paths::VIRTUAL_BOX => return owned(&["EventSource", "SystemProperties", "Host"]),
            paths::GUEST_OS_TYPES => {
                return settings::OsType::all().iter().map(|t| paths::escape(t.id)).collect();
            }
            paths::MEDIA => return state.media.ids().map(objects::uuid_element).collect(),
            paths::PROGRESS => return state.progress.keys().map(u32::to_string).collect(),
            paths::MACHINES => return state.order.iter().map(|id| objects::uuid_element(*id)).collect(),
            paths::UNREGISTERED => {
                let own = state.unregistered.iter().filter(|(_, (owner, _))| *owner == peer.id);
                return own.map(|(id, _)| objects::uuid_element(*id)).collect();
            }
            paths::APPLIANCES => {
                let own = state.appliances.iter().filter(|(_, a)| a.peer == peer.id);
                return own.map(|(number, _)| number.to_string()).collect();
            }
            paths::SESSIONS => {
                let own = state.sessions.iter().filter(|(_, s)| s.peer == peer.id);
                return own.map(|(number, _)| number.to_string()).collect();
            }
            _ => {}
        }
        if let Some(children) = calls_networks::children(&state, path) {
            return children;
        }
        match objects::parse(path) {
            Some(Object::Appliance(number)) => {
                let own = state.appliances.get(&number).filter(|a| a.peer == peer.id);
                (0..own.map_or(0, |a| a.descriptions.len())).map(|i| i.to_string()).collect()
            }
            Some(Object::Session(number)) => match state.sessions.get(&number) {
                Some(session) if session.machine.is_some() => owned(&["Machine"]),
                _ => Vec::new(),
            },
            Some(Object::Machine(reference, part)) => {
                let Ok(view) = state.view(peer.id, reference, part) else { return Vec::new() };
                objects::children_of_machine(&reference.path(), path, &objects::parts(&view.settings))
            }
            // A node between a machine and its parts, such as …/NetworkAdapters.
            None => {
                let mut base = path;
                while let Some((parent, _)) = base.rsplit_once('/') {
                    base = parent;
                    if let Some(Object::Machine(reference, Part::Machine)) = objects::parse(base) {
                        let Ok(view) = state.view(peer.id, reference, Part::Machine) else { break };
                        return objects::children_of_machine(base, path, &objects::parts(&view.settings));
                    }
                }
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn read(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
        attr: &'static AttrDesc,
    ) -> ApiResult<Value<'static>> {
        let object = objects::parse(path).ok_or_else(gone)?;
        if let Some(progress) = self.progress(&object) {
            return PROGRESS_READS.read(&progress, interface, attr);
        }
        match object {
            Object::Machine(reference, part) => {
                let whole = part == Part::Machine;
                if whole && attr.name == IMachine::Accessible.name {
                    self.0.state.lock().retry(peer.id, reference);
                }
                let view = self.0.state.lock().view(peer.id, reference, part)?;
                if view.meta.access_error.is_some() && whole && !WITHOUT_SETTINGS.contains(&attr.name) {
                    return Err(ApiError::new(
                        ResultCode::AccessDenied,
                        "The object functionality is limited",
                    ));
                }
                MACHINE_READS.read(&view, interface, attr)
            }
            object => GLOBAL_READS.read(&self.context(peer, object), interface, attr),
        }
    }

    fn read_all(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
    ) -> HashMap<&'static str, Value<'static>> {
        let attrs = interface.attributes.iter();
        // One look at the machine for all of its attributes: they belong together, and it is quicker.
        if let Some(Object::Machine(reference, part)) = objects::parse(path)
            && let Ok(view) = self.0.state.lock().view(peer.id, reference, part)
            && view.meta.access_error.is_none()
        {
            let read = |a: &'static AttrDesc| Some((a.name, MACHINE_READS.read(&view, interface, a).ok()?));
            return attrs.filter_map(read).collect();
        }
        attrs.filter_map(|a| Some((a.name, self.read(peer, path, interface, a).ok()?))).collect()
    }

    fn subtree(&self, peer: &Peer, path: &str) -> Vec<String> {
        let machine = match objects::parse(path) {
            Some(Object::Machine(reference, Part::Machine)) => {
                self.0.state.lock().view(peer.id, reference, Part::Machine).ok()
            }
            _ => None,
        };
        match machine {
            Some(view) => {
                let below =
                    objects::parts(&view.settings).into_iter().map(|p| format!("{path}{}", p.suffix()));
                std::iter::once(path.to_owned()).chain(below).collect()
            }
            None => server::walk(self, peer, path),
        }
    }

    fn write(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
        attr: &'static AttrDesc,
        value: Value<'static>,
    ) -> ApiResult<()> {
        match objects::parse(path).ok_or_else(gone)? {
            Object::Machine(reference, part) => {
                let at_run_time = attrs_machine::writable_at_run_time(interface.name, attr.name);
                let changed = part.clone();
                let mut state = self.0.state.lock();
                state.edit(peer.id, reference, part, at_run_time, |_, view| {
                    MACHINE_WRITES.write(view, interface, attr, value)
                })?;
                drop(state);
                self.0.tell_vm(peer.id, reference, &changed, attr.name)
            }
            object => GLOBAL_WRITES.write(&mut self.context(peer, object), interface, attr, value),
        }
    }

    fn call(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
        method: &'static MethodDesc,
        args: Vec<Value<'static>>,
    ) -> ApiResult<Vec<Value<'static>>> {
        let object = objects::parse(path).ok_or_else(gone)?;
        if let Some(progress) = self.progress(&object) {
            return PROGRESS_CALLS.call(&progress, interface, method, args);
        }
        let changed = match &object {
            Object::Machine(reference, part) if calls::changes_adapter(interface.name, method.name) => {
                Some((*reference, part.clone()))
            }
            _ => None,
        };
        let result = CALLS.call(&self.context(peer, object), interface, method, args)?;
        if let Some((reference, part)) = changed {
            self.0.tell_vm(peer.id, reference, &part, "")?;
        }
        Ok(result)
    }

    fn may_block(&self, interface: &Interface, method: &MethodDesc) -> bool {
        calls::may_block(interface.name, method.name)
    }

    fn attached(&self, peer: &Peer) {
        tracing::debug!(peer = peer.id, pid = peer.pid, "client connected");
        self.0.state.lock().peers.insert(peer.id, None);
    }

    fn detached(&self, peer: &Peer) {
        tracing::debug!(peer = peer.id, pid = peer.pid, "client gone");
        let mut state = self.0.state.lock();
        self.0.drop_peer(&mut state, peer.id);
        state.peers.remove(&peer.id);
        drop(state);
        self.0.changed.notify_all();
        self.0.wake_main();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every member that the tables announce is served.
    #[test]
    fn no_member_is_announced_that_no_one_serves() {
        let machine_parts = [
            "IMachine",
            "ISnapshot",
            "INetworkAdapter",
            "INATEngine",
            "ISerialPort",
            "IParallelPort",
            "IAudioSettings",
            "IAudioAdapter",
            "IGraphicsAdapter",
            "IBIOSSettings",
            "IVRDEServer",
            "IUSBController",
            "IUSBDeviceFilters",
            "IUSBDeviceFilter",
            "ISharedFolder",
            "IBandwidthControl",
            "IBandwidthGroup",
            "IRecordingSettings",
            "IRecordingScreenSettings",
            "ITrustedPlatformModule",
            "IGuestDebugControl",
            "INvramStore",
            "IMediumAttachment",
            "IStorageController",
            "IVirtualBoxErrorInfo",
        ];
        let elsewhere =
            ["IVMProcess", "IProgress", "IConsole", "IKeyboard", "IMouse", "IDisplay", "IMachineDebugger"];
        let mut missing = Vec::new();
        for interface in ALL.iter().filter(|i| !elsewhere.contains(&i.name)) {
            let on_machine = machine_parts.contains(&interface.name);
            for attr in interface.attributes {
                let (read, write) = match on_machine {
                    true => (MACHINE_READS.has(interface, attr), MACHINE_WRITES.has(interface, attr)),
                    false => (GLOBAL_READS.has(interface, attr), GLOBAL_WRITES.has(interface, attr)),
                };
                if !read || (attr.writable && !write) {
                    missing.push(format!("{}.{}", interface.name, attr.name));
                }
            }
            for method in interface.methods {
                if !CALLS.has(interface, method) {
                    missing.push(format!("{}.{}()", interface.name, method.name));
                }
            }
        }
        assert!(missing.is_empty(), "{missing:#?}");
    }
}
