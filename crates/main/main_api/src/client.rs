//! The client half: a connection to the service, and proxies of its objects. Blocking calls, for programs that do one
//! thing after another; share a [`Client`] between threads by cloning it.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::os::fd::OwnedFd as StdFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vbox_types::ResultCode;
use zbus::blocking::{Connection, MessageIterator, connection};
use zbus::zvariant::{OwnedObjectPath, OwnedValue, Value};

use crate::enums::{LockType, SessionState};
use crate::error::{ApiError, ApiResult};
use crate::idl::{
    IClientSupport, IConsole, IEventSource, IMachine, INTERFACE_PREFIX, IProgress, ISession, IVirtualBox,
};
use crate::server::{self, BULK_INTERFACE};
use crate::types::{ApiType, Attr, InterfaceType, Method, ObjRef, ReturnShape, Values};
use crate::{ipc, paths};

/// A connection to VBoxSVC, or to a VM process.
#[derive(Clone)]
pub struct Client {
    connection: Connection,
    config_dir: Arc<PathBuf>,
}

impl Client {
    /// Connects to the service of the user's configuration directory; starts it if none runs.
    pub fn connect() -> ApiResult<Self> {
        Self::connect_to(&ipc::config_dir()?)
    }

    /// Connects to the service of `config_dir`; starts it if none runs.
    pub fn connect_to(config_dir: &Path) -> ApiResult<Self> {
        ipc::connect_or_start(config_dir, |stream| Self::handshake(stream, config_dir))
    }

    /// Connects to the service of `config_dir` if one runs.
    pub fn connect_if_running(config_dir: &Path) -> Option<Self> {
        ipc::connect_running(config_dir).and_then(|stream| Self::handshake(stream, config_dir).ok())
    }

    pub(crate) fn handshake(stream: UnixStream, config_dir: &Path) -> ApiResult<Self> {
        let connection = connection::Builder::async_io_unix_stream(stream).p2p().build()?;
        let client = Self { connection, config_dir: Arc::new(config_dir.to_owned()) };
        // Authentication may pass on a service that is about to exit; only an answered call proves that it serves us.
        client.ping()?;
        Ok(client)
    }

    fn ping(&self) -> ApiResult<()> {
        self.connection.call_method(
            None::<()>,
            paths::ROOT,
            Some("org.freedesktop.DBus.Peer"),
            "Ping",
            &(),
        )?;
        Ok(())
    }

    /// The configuration directory whose service this is.
    pub fn config_dir(&self) -> &Path {
        &self.config_dir
    }

    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The object that `reference` names, whether or not it exists.
    pub fn at<I: InterfaceType>(&self, reference: ObjRef<I>) -> Proxy<I> {
        Proxy { client: self.clone(), reference }
    }

    pub fn virtual_box(&self) -> Proxy<IVirtualBox> {
        self.at(ObjRef::new(paths::VIRTUAL_BOX))
    }

    /// A registered machine, by name or UUID.
    pub fn find_machine(&self, name_or_id: &str) -> ApiResult<Proxy<IMachine>> {
        let vbox = self.virtual_box();
        Ok(self.at(vbox.call(IVirtualBox::FindMachine, (name_or_id.to_owned(),))?))
    }

    /// A session object, not locked yet.
    pub fn create_session(&self) -> ApiResult<Session> {
        let support = self.at::<IClientSupport>(ObjRef::new(paths::ROOT));
        let reference = support.call(IClientSupport::CreateSession, ())?;
        Ok(Session { proxy: self.at(reference) })
    }

    /// Locks `machine` through a new session. The lock ends with [`Session::unlock`], when the session is dropped, or
    /// when this process ends in any way; unsaved changes are lost then.
    pub fn lock_machine(&self, machine: &Proxy<IMachine>, lock: LockType) -> ApiResult<Session> {
        let session = self.create_session()?;
        machine.call(IMachine::LockMachine, (session.proxy.reference(), lock))?;
        Ok(session)
    }

    /// Reads `attributes` of many objects in one round trip; the answers are in the order of `objects`.
    pub fn read_many<I: InterfaceType>(
        &self,
        objects: &[ObjRef<I>],
        attributes: &[&str],
    ) -> ApiResult<Vec<Attributes<I>>> {
        let interface = format!("{INTERFACE_PREFIX}{}", I::NAME);
        let names: Vec<String> = attributes.iter().map(|s| (*s).to_owned()).collect();
        let args = vec![objects.to_vec().into_value(), interface.into_value(), names.into_value()];
        let Some(body) = server::body(args) else {
            return Ok(Vec::new());
        };
        let reply =
            self.connection.call_method(None::<()>, paths::ROOT, Some(BULK_INTERFACE), "GetMany", &body)?;
        let all: Vec<HashMap<String, OwnedValue>> = reply.body().deserialize()?;
        Ok(all.into_iter().map(Attributes::new).collect())
    }

    /// The object at `path` and everything below it, with all attributes, in one round trip.
    pub fn tree(&self, path: &str) -> ApiResult<Tree> {
        let reply = self.connection.call_method(
            None::<()>,
            path,
            Some("org.freedesktop.DBus.ObjectManager"),
            "GetManagedObjects",
            &(),
        )?;
        let objects: HashMap<OwnedObjectPath, HashMap<String, HashMap<String, OwnedValue>>> =
            reply.body().deserialize()?;
        Ok(Tree { objects: objects.into_iter().map(|(path, i)| (path.as_str().to_owned(), i)).collect() })
    }

    /// Events from now on. Holds a stream of messages: consume it, or drop it.
    pub fn events(&self) -> ApiResult<Events> {
        let messages = MessageIterator::from(&self.connection);
        self.at::<IEventSource>(ObjRef::new(paths::EVENT_SOURCE)).call(IEventSource::RegisterListener, ())?;
        Ok(Events { messages })
    }
}

/// A client-side stand-in of an object with interface `I`.
#[derive(Clone)]
pub struct Proxy<I> {
    client: Client,
    reference: ObjRef<I>,
}

impl<I: InterfaceType> Proxy<I> {
    pub fn reference(&self) -> ObjRef<I> {
        self.reference.clone()
    }

    pub fn path(&self) -> &str {
        self.reference.path()
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Another object of the same connection.
    pub fn at<J: InterfaceType>(&self, reference: ObjRef<J>) -> Proxy<J> {
        self.client.at(reference)
    }

    /// Reads one attribute.
    pub fn read<T: ApiType>(&self, attr: Attr<I, T>) -> ApiResult<T> {
        let interface = format!("{INTERFACE_PREFIX}{}", I::NAME);
        let reply = self.client.connection.call_method(
            None::<()>,
            self.path(),
            Some("org.freedesktop.DBus.Properties"),
            "Get",
            &(interface.as_str(), attr.name),
        )?;
        let mut values = server::values(&reply)?;
        T::from_value(values.pop().ok_or_else(|| ApiError::fail("Empty reply"))?)
    }

    /// Reads an attribute that refers to another object and returns that object.
    pub fn object<J: InterfaceType>(&self, attr: Attr<I, ObjRef<J>>) -> ApiResult<Proxy<J>> {
        Ok(self.at(self.read(attr)?))
    }

    /// Writes one attribute.
    pub fn write<T: ApiType>(&self, attr: Attr<I, T>, value: T) -> ApiResult<()> {
        let interface = format!("{INTERFACE_PREFIX}{}", I::NAME);
        self.client.connection.call_method(
            None::<()>,
            self.path(),
            Some("org.freedesktop.DBus.Properties"),
            "Set",
            &(interface.as_str(), attr.name, value.into_value()),
        )?;
        Ok(())
    }

    /// Calls a method.
    pub fn call<A: Values, R: ReturnShape>(&self, method: Method<I, A, R>, args: A) -> ApiResult<R::Out> {
        R::from_values(server::call_values(
            &self.client.connection,
            self.path(),
            I::NAME,
            method.name,
            args.into_values(),
        )?)
    }

    /// Every attribute of the object, in one round trip.
    pub fn attributes(&self) -> ApiResult<Attributes<I>> {
        let interface = format!("{INTERFACE_PREFIX}{}", I::NAME);
        let reply = self.client.connection.call_method(
            None::<()>,
            self.path(),
            Some("org.freedesktop.DBus.Properties"),
            "GetAll",
            &interface,
        )?;
        Ok(Attributes::new(reply.body().deserialize()?))
    }

    /// The object and everything below it, in one round trip.
    pub fn tree(&self) -> ApiResult<Tree> {
        self.client.tree(self.path())
    }
}

fn take<T: ApiType>(values: &HashMap<String, OwnedValue>, name: &str) -> ApiResult<T> {
    let value =
        values.get(name).ok_or_else(|| ApiError::fail(format!("The attribute {name} cannot be read")))?;
    let value = value.try_clone().map_err(|e| ApiError::fail(e.to_string()))?;
    T::from_value(Value::from(value))
}

/// Attributes of an object, as they were when it was read.
pub struct Attributes<I> {
    values: HashMap<String, OwnedValue>,
    interface: PhantomData<fn() -> I>,
}

impl<I: InterfaceType> Attributes<I> {
    fn new(values: HashMap<String, OwnedValue>) -> Self {
        Self { values, interface: PhantomData }
    }

    /// The attribute's value; an error if it was not asked for or could not be read.
    pub fn read<T: ApiType>(&self, attr: Attr<I, T>) -> ApiResult<T> {
        take(&self.values, attr.name)
    }
}

/// An object and those below it, as they were when they were read.
pub struct Tree {
    objects: HashMap<String, HashMap<String, HashMap<String, OwnedValue>>>,
}

impl Tree {
    /// An attribute of an object of the tree.
    pub fn read<I: InterfaceType, T: ApiType>(&self, object: &ObjRef<I>, attr: Attr<I, T>) -> ApiResult<T> {
        let interface = format!("{INTERFACE_PREFIX}{}", I::NAME);
        let values = self.objects.get(object.path()).and_then(|i| i.get(&interface));
        take(values.ok_or_else(|| ApiError::fail(format!("No object {object:?}")))?, attr.name)
    }

    /// Whether the tree has the object, with interface `I`.
    pub fn contains<I: InterfaceType>(&self, object: &ObjRef<I>) -> bool {
        let interface = format!("{INTERFACE_PREFIX}{}", I::NAME);
        self.objects.get(object.path()).is_some_and(|i| i.contains_key(&interface))
    }
}

/// A session object of this client. Dropping it unlocks its machine.
pub struct Session {
    proxy: Proxy<ISession>,
}

impl Session {
    pub fn proxy(&self) -> &Proxy<ISession> {
        &self.proxy
    }

    pub fn state(&self) -> ApiResult<SessionState> {
        self.proxy.read(ISession::State)
    }

    /// The machine as this session sees it; mutable under a write lock.
    pub fn machine(&self) -> ApiResult<Proxy<IMachine>> {
        self.proxy.object(ISession::Machine)
    }

    /// Gives the lock back. Unsaved changes are lost.
    pub fn unlock(&self) -> ApiResult<()> {
        self.proxy.call(ISession::UnlockMachine, ())
    }

    /// A connection to the VM process and the console there. Needs a shared lock on a machine that is online.
    pub fn console(&self) -> ApiResult<Console> {
        let (fd, reference) = self.proxy.call(ISession::OpenConsole, ())?;
        let fd: StdFd = fd.into();
        let client = Client::handshake(UnixStream::from(fd), self.proxy.client.config_dir())?;
        Ok(Console { proxy: client.at(reference) })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let support = self.proxy.client.at::<IClientSupport>(ObjRef::new(paths::ROOT));
        // The service drops the session with the connection anyway.
        let _ = support.call(IClientSupport::DropSession, (self.proxy.reference(),));
    }
}

/// A VM process's console, on a connection of its own.
pub struct Console {
    proxy: Proxy<IConsole>,
}

impl Console {
    pub fn proxy(&self) -> &Proxy<IConsole> {
        &self.proxy
    }
}

impl std::ops::Deref for Console {
    type Target = Proxy<IConsole>;

    fn deref(&self) -> &Self::Target {
        &self.proxy
    }
}

impl std::ops::Deref for Session {
    type Target = Proxy<ISession>;

    fn deref(&self) -> &Self::Target {
        &self.proxy
    }
}

/// How far an operation has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgressState {
    pub completed: bool,
    pub canceled: bool,
    pub percent: u32,
    pub operation: u32,
    pub operation_count: u32,
    pub operation_description: String,
    pub operation_percent: u32,
    pub cancelable: bool,
    pub result_code: i32,
}

impl Proxy<IProgress> {
    /// The operation's state, in one round trip.
    pub fn state(&self) -> ApiResult<ProgressState> {
        let all = self.attributes()?;
        let completed = all.read(IProgress::Completed)?;
        Ok(ProgressState {
            completed,
            canceled: all.read(IProgress::Canceled)?,
            percent: all.read(IProgress::Percent)?,
            operation: all.read(IProgress::Operation)?,
            operation_count: all.read(IProgress::OperationCount)?,
            operation_description: all.read(IProgress::OperationDescription)?,
            operation_percent: all.read(IProgress::OperationPercent)?,
            cancelable: all.read(IProgress::Cancelable)?,
            result_code: if completed { all.read(IProgress::ResultCode)? } else { 0 },
        })
    }

    /// Waits for the end, telling `each` about every step (at most ten times a second). The operation's own error
    /// comes back as the error of this call.
    pub fn wait(&self, mut each: impl FnMut(&ProgressState)) -> ApiResult<()> {
        let mut last = None;
        loop {
            self.call(IProgress::WaitForCompletion, (100,))?;
            let state = self.state()?;
            if last.as_ref() != Some(&state) {
                each(&state);
            }
            if state.completed && state.result_code == 0 {
                // No further question: a VM process that has been told to end may do so now.
                return Ok(());
            }
            if state.completed {
                return self.result();
            }
            last = Some(state);
        }
    }

    /// The outcome of a completed operation.
    pub fn result(&self) -> ApiResult<()> {
        use crate::idl::IVirtualBoxErrorInfo as Info;
        let code = self.read(IProgress::ResultCode)?;
        if code == 0 {
            return Ok(());
        }
        let reference = self.read(IProgress::ErrorInfo)?;
        if reference.is_null() {
            return Err(ApiError {
                code: code as u32,
                text: "The operation failed".into(),
                component: String::new(),
                interface: String::new(),
            });
        }
        let info = self.at(reference).attributes()?;
        Err(ApiError {
            code: info.read(Info::ResultCode)? as u32,
            text: info.read(Info::Text)?,
            component: info.read(Info::Component)?,
            interface: info.read(Info::InterfaceID)?,
        })
    }
}

/// An event of the service.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// For example `OnMachineStateChanged`; its arguments are those of [`IEventSource`]'s table.
    pub name: String,
    pub args: Vec<Value<'static>>,
}

impl Event {
    /// The arguments, if this is an event of the kind `signal`.
    pub fn as_signal<A: Values>(&self, signal: crate::types::Signal<IEventSource, A>) -> Option<A> {
        if self.name != signal.name {
            return None;
        }
        let args = self.args.iter().map(|v| v.try_clone()).collect::<Result<Vec<_>, _>>().ok()?;
        A::from_values(args).ok()
    }
}

/// The stream of events of a connection; ends with the connection.
pub struct Events {
    messages: MessageIterator,
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        loop {
            let message = self.messages.next()?.ok()?;
            if message.message_type() != zbus::message::Type::Signal {
                continue;
            }
            let header = message.header();
            if header.path().is_none_or(|p| p.as_str() != paths::EVENT_SOURCE) {
                continue;
            }
            let name = header.member().map(|m| m.as_str().to_owned()).unwrap_or_default();
            if let Ok(args) = server::values(&message) {
                return Some(Event { name, args });
            }
        }
    }
}

/// Waits until `machine`'s session is unlocked, as scripts need after a power-off. `false` when the time is over.
pub fn wait_until_unlocked(machine: &Proxy<IMachine>, limit: Duration) -> ApiResult<bool> {
    let end = std::time::Instant::now() + limit;
    loop {
        match machine.read(IMachine::SessionState) {
            Ok(SessionState::Unlocked) => return Ok(true),
            Ok(_) => {}
            Err(error) if error.is(ResultCode::ObjectNotFound) => return Ok(true),
            Err(error) => return Err(error),
        }
        if std::time::Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
