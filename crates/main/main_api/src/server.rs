//! The serving half of a connection: reads D-Bus method calls, checks them against the interface tables, hands them to
//! a [`Service`], and answers. Properties, introspection, the object manager and the peer interface are answered here,
//! from the tables, so that a service only knows attributes and methods.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zbus::blocking::{Connection, MessageIterator, connection};
use zbus::message::{Flags, Message, Type};
use zbus::zvariant::{ObjectPath, Structure, StructureBuilder, Value};

use crate::error::{ApiError, ApiResult};
use crate::idl;
use crate::types::{
    ApiType, Attr, AttrDesc, Interface, InterfaceType, Method, MethodDesc, ReturnShape, Values,
};

/// Not of the Main API: reads attributes of many objects in one round trip.
pub const BULK_INTERFACE: &str = "org.virtualbox.Bulk";

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const INTROSPECTABLE: &str = "org.freedesktop.DBus.Introspectable";
const OBJECT_MANAGER: &str = "org.freedesktop.DBus.ObjectManager";
const PEER: &str = "org.freedesktop.DBus.Peer";

/// The other end of a connection.
#[derive(Clone)]
pub struct Peer {
    /// Unique within this process.
    pub id: u64,
    /// The process at the other end when the connection was made; 0 if the kernel does not tell.
    pub pid: u32,
    pub connection: Connection,
}

impl Peer {
    /// Sends a signal to this peer. A broken connection is noticed by its reader; it is no error here.
    pub fn signal(&self, path: &str, interface: &str, member: &str, args: Vec<Value<'static>>) {
        let interface = format!("{}{interface}", idl::INTERFACE_PREFIX);
        let sent = match body(args) {
            Some(body) => self.connection.emit_signal(None::<()>, path, interface.as_str(), member, &body),
            None => self.connection.emit_signal(None::<()>, path, interface.as_str(), member, &()),
        };
        if let Err(error) = sent {
            tracing::debug!(peer = self.id, member, %error, "signal not sent");
        }
    }

    /// Calls a method of an object that the peer serves.
    pub fn call<I: InterfaceType, A: Values, R: ReturnShape>(
        &self,
        path: &str,
        method: Method<I, A, R>,
        args: A,
    ) -> ApiResult<R::Out> {
        R::from_values(call_values(&self.connection, path, I::NAME, method.name, args.into_values())?)
    }
}

/// A message body of any number of values; `None` for none.
pub(crate) fn body(args: Vec<Value<'static>>) -> Option<Structure<'static>> {
    if args.is_empty() {
        return None;
    }
    let builder = args.into_iter().fold(StructureBuilder::new(), StructureBuilder::append_field);
    builder.build().ok()
}

/// The values of a message's body.
pub(crate) fn values(message: &Message) -> ApiResult<Vec<Value<'static>>> {
    let body = message.body();
    if body.is_empty() {
        return Ok(Vec::new());
    }
    let structure: Structure<'_> =
        body.deserialize().map_err(|e| ApiError::invalid_arg(format!("Malformed message body: {e}")))?;
    structure
        .into_fields()
        .into_iter()
        .map(|v| {
            v.try_to_owned()
                .map(Value::from)
                .map_err(|e| ApiError::fail(format!("Cannot keep a message value: {e}")))
        })
        .collect()
}

/// Calls `interface`'s `member` on `path` at the other end.
pub(crate) fn call_values(
    connection: &Connection,
    path: &str,
    interface: &str,
    member: &str,
    args: Vec<Value<'static>>,
) -> ApiResult<Vec<Value<'static>>> {
    let interface = format!("{}{interface}", idl::INTERFACE_PREFIX);
    let reply = match body(args) {
        Some(body) => connection.call_method(None::<()>, path, Some(interface.as_str()), member, &body),
        None => connection.call_method(None::<()>, path, Some(interface.as_str()), member, &()),
    }?;
    values(&reply)
}

/// What a connection serves. Calls arrive in order on the connection's own thread, except those that
/// [`Service::may_block`] names, which get a thread each.
pub trait Service: Send + Sync + 'static {
    /// The interfaces of the object at `path`; `None` if there is no such object.
    fn interfaces(&self, peer: &Peer, path: &str) -> Option<Vec<&'static Interface>>;

    /// The last elements of the paths of the objects (or path nodes) directly below `path`.
    fn children(&self, peer: &Peer, path: &str) -> Vec<String>;

    fn read(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
        attr: &'static AttrDesc,
    ) -> ApiResult<Value<'static>>;

    /// Every attribute of one interface that can be read now.
    fn read_all(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
    ) -> HashMap<&'static str, Value<'static>> {
        let attrs = interface.attributes.iter();
        attrs.filter_map(|a| self.read(peer, path, interface, a).ok().map(|v| (a.name, v))).collect()
    }

    /// The paths of `path` and of every object (or path node) below it.
    fn subtree(&self, peer: &Peer, path: &str) -> Vec<String> {
        walk(self, peer, path)
    }

    /// `value` may have the wrong type; converting it is the service's part.
    fn write(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
        attr: &'static AttrDesc,
        value: Value<'static>,
    ) -> ApiResult<()>;

    fn call(
        &self,
        peer: &Peer,
        path: &str,
        interface: &'static Interface,
        method: &'static MethodDesc,
        args: Vec<Value<'static>>,
    ) -> ApiResult<Vec<Value<'static>>>;

    /// Whether the method may wait for something, so that it must not hold up the connection's other calls.
    fn may_block(&self, _interface: &Interface, _method: &MethodDesc) -> bool {
        false
    }

    /// A peer has connected. Called before any of its calls.
    fn attached(&self, _peer: &Peer) {}

    /// The peer has gone. Called once, after its last call has come in.
    fn detached(&self, _peer: &Peer) {}
}

/// [`Service::subtree`] by way of [`Service::children`].
pub fn walk<S: Service + ?Sized>(service: &S, peer: &Peer, path: &str) -> Vec<String> {
    let mut all = vec![path.to_owned()];
    let mut next = 0;
    while next < all.len() {
        let prefix = if all[next] == "/" { "" } else { &all[next] };
        let below = service.children(peer, &all[next]).into_iter();
        let below: Vec<String> = below.map(|child| format!("{prefix}/{child}")).collect();
        all.extend(below);
        next += 1;
    }
    all
}

static NEXT_PEER: AtomicU64 = AtomicU64::new(1);

/// Authenticates the peer on `stream` as a D-Bus server does and serves it until it goes. Blocks; run it on a thread.
pub fn serve(stream: UnixStream, service: &Arc<dyn Service>) -> ApiResult<()> {
    let pid = peer_pid(&stream);
    let guid = zbus::Guid::generate();
    let messages =
        connection::Builder::async_io_unix_stream(stream).server(guid)?.p2p().build_message_iterator()?;
    serve_messages(messages, pid, service);
    Ok(())
}

/// The process at the other end of a socket, 0 if unknown.
pub(crate) fn peer_pid(stream: &UnixStream) -> u32 {
    rustix::net::sockopt::socket_peercred(stream).map_or(0, |c| c.pid.as_raw_nonzero().get() as u32)
}

/// Serves a connection that is set up already. Blocks until the peer goes.
pub(crate) fn serve_messages(messages: MessageIterator, pid: u32, service: &Arc<dyn Service>) {
    let connection = Connection::from(&messages);
    let peer = Peer { id: NEXT_PEER.fetch_add(1, Ordering::Relaxed), pid, connection };
    service.attached(&peer);
    for message in messages {
        let Ok(message) = message else { break };
        if message.message_type() == Type::MethodCall {
            dispatch(&peer, service, message);
        }
    }
    service.detached(&peer);
}

/// Answers one call, on this thread or, if it may block, on its own.
fn dispatch(peer: &Peer, service: &Arc<dyn Service>, message: Message) {
    let blocking = {
        let header = message.header();
        header.interface().zip(header.member()).is_some_and(|(interface, member)| {
            idl::by_dbus_name(interface.as_str())
                .and_then(|i| i.method(member.as_str()).map(|m| service.may_block(i, m)))
                .unwrap_or(false)
        })
    };
    if !blocking {
        answer(peer, service.as_ref(), &message);
        return;
    }
    let (peer, service) = (peer.clone(), service.clone());
    let spawned = std::thread::Builder::new()
        .name("blocking-call".into())
        .spawn(move || answer(&peer, service.as_ref(), &message));
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for a blocking call");
    }
}

/// What a call returns: the API's values, or a body that only the D-Bus interfaces have.
enum Reply {
    Values(Vec<Value<'static>>),
    Body(Structure<'static>),
}

fn answer(peer: &Peer, service: &dyn Service, message: &Message) {
    let header = message.header();
    let result = handle(peer, service, message);
    if message.primary_header().flags().contains(Flags::NoReplyExpected) {
        return;
    }
    let sent = match result {
        Ok(Reply::Values(values)) => match body(values) {
            Some(body) => peer.connection.reply(&header, &body),
            None => peer.connection.reply(&header, &()),
        },
        Ok(Reply::Body(body)) => peer.connection.reply(&header, &body),
        Err(Failure::Api(error)) => peer.connection.reply_error(
            &header,
            error.dbus_name(),
            &(error.text.as_str(), error.code, error.component.as_str(), error.interface.as_str()),
        ),
        Err(Failure::DBus(name, text)) => {
            peer.connection.reply_error(&header, format!("org.freedesktop.DBus.Error.{name}"), &text)
        }
    };
    if let Err(error) = sent {
        tracing::debug!(peer = peer.id, %error, "reply not sent");
    }
}

enum Failure {
    Api(ApiError),
    /// An error of D-Bus itself: unknown object, interface or member.
    DBus(&'static str, String),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

fn handle(peer: &Peer, service: &dyn Service, message: &Message) -> Result<Reply, Failure> {
    let header = message.header();
    let path = header.path().map(|p| p.as_str().to_owned()).unwrap_or_default();
    let member = header.member().map(|m| m.as_str().to_owned()).unwrap_or_default();
    let interface = header.interface().map(|i| i.as_str().to_owned()).unwrap_or_default();
    let args = values(message)?;
    match interface.as_str() {
        PEER => return peer_interface(&member),
        INTROSPECTABLE => return Ok(Reply::Values(vec![introspect(peer, service, &path).into_value()])),
        OBJECT_MANAGER => return Ok(Reply::Body(managed_objects(peer, service, &path)?)),
        BULK_INTERFACE => return Ok(Reply::Body(read_many(peer, service, args)?)),
        _ => {}
    }
    let Some(interfaces) = service.interfaces(peer, &path) else {
        return Err(no_object(&path));
    };
    if interface == PROPERTIES {
        return properties(peer, service, &path, &interfaces, &member, args);
    }
    let found = interfaces
        .iter()
        .filter(|i| interface.is_empty() || i.dbus_name == interface)
        .find_map(|i| i.method(&member).map(|m| (*i, m)));
    let Some((interface, method)) = found else {
        return Err(Failure::DBus("UnknownMethod", format!("no method {interface}.{member} on {path}")));
    };
    if args.len() != method.args.len() {
        let text = format!("{} takes {} arguments, not {}", method.name, method.args.len(), args.len());
        return Err(ApiError::invalid_arg(text).on(interface.name).into());
    }
    let started = std::time::Instant::now();
    let result = service.call(peer, &path, interface, method, args).map_err(|e| e.on(interface.name));
    match &result {
        Ok(_) => tracing::trace!(
            peer = peer.id,
            path,
            method = method.name,
            us = started.elapsed().as_micros(),
            "ok"
        ),
        Err(error) => tracing::debug!(
            peer = peer.id,
            path,
            method = method.name,
            code = error.code_name(),
            text = error.text
        ),
    }
    Ok(Reply::Values(result?))
}

fn no_object(path: &str) -> Failure {
    // A path that was once valid names an object that is gone, which COM reports as E_ACCESSDENIED ("not ready").
    Failure::Api(ApiError::new(
        vbox_types::ResultCode::AccessDenied,
        format!("The object is not ready ({path})"),
    ))
}

fn peer_interface(member: &str) -> Result<Reply, Failure> {
    match member {
        "Ping" => Ok(Reply::Values(Vec::new())),
        "GetMachineId" => {
            let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
            Ok(Reply::Values(vec![id.trim().to_owned().into_value()]))
        }
        _ => Err(Failure::DBus("UnknownMethod", format!("no method {PEER}.{member}"))),
    }
}

fn properties(
    peer: &Peer,
    service: &dyn Service,
    path: &str,
    interfaces: &[&'static Interface],
    member: &str,
    args: Vec<Value<'static>>,
) -> Result<Reply, Failure> {
    let mut args = args.into_iter();
    let mut next_text = || args.next().map(String::from_value).transpose().map(Option::unwrap_or_default);
    let wanted = next_text()?;
    let interface = |name: &str| {
        interfaces
            .iter()
            .find(|i| {
                i.dbus_name == wanted
                    || (wanted.is_empty() && (name.is_empty() || i.attribute(name).is_some()))
            })
            .copied()
            .ok_or_else(|| Failure::DBus("UnknownInterface", format!("no interface {wanted} on {path}")))
    };
    let attribute = |name: &str| {
        let interface = interface(name)?;
        let attr = interface.attribute(name);
        let attr =
            attr.ok_or_else(|| Failure::DBus("UnknownProperty", format!("no property {wanted}.{name}")))?;
        Ok::<_, Failure>((interface, attr))
    };
    match member {
        "Get" => {
            let name = next_text()?;
            let (interface, attr) = attribute(&name)?;
            let value = service.read(peer, path, interface, attr).map_err(|e| e.on(interface.name))?;
            Ok(Reply::Values(vec![Value::Value(Box::new(value))]))
        }
        "Set" => {
            let name = next_text()?;
            let value = args.next().ok_or_else(|| ApiError::invalid_arg("Set takes three arguments"))?;
            let (interface, attr) = attribute(&name)?;
            if !attr.writable {
                return Err(Failure::DBus("PropertyReadOnly", format!("property {name} is read-only")));
            }
            let value = match value {
                Value::Value(inner) => *inner,
                other => other,
            };
            service.write(peer, path, interface, attr, value).map_err(|e| e.on(interface.name))?;
            Ok(Reply::Values(Vec::new()))
        }
        "GetAll" => {
            let all: HashMap<&str, Value<'static>> = service.read_all(peer, path, interface("")?);
            Ok(Reply::Body(one(all)?))
        }
        _ => Err(Failure::DBus("UnknownMethod", format!("no method {PROPERTIES}.{member}"))),
    }
}

/// A body of one container that is no [`ApiType`].
fn one<T>(value: T) -> Result<Structure<'static>, Failure>
where
    Value<'static>: From<T>,
{
    StructureBuilder::new()
        .append_field(Value::from(value))
        .build()
        .map_err(|e| ApiError::fail(format!("Cannot encode a reply: {e}")).into())
}

type Interfaces = HashMap<&'static str, HashMap<&'static str, Value<'static>>>;

/// The object at `path` and every object below it, with every attribute (ObjectManager.GetManagedObjects; unlike the D-Bus
/// specification's, the answer has the object itself too).
fn managed_objects(peer: &Peer, service: &dyn Service, path: &str) -> Result<Structure<'static>, Failure> {
    let mut objects: HashMap<ObjectPath<'static>, Interfaces> = HashMap::new();
    for path in service.subtree(peer, path) {
        if let Some(interfaces) = service.interfaces(peer, &path)
            && let Ok(object) = ObjectPath::try_from(path.clone())
        {
            let read = |i: &'static Interface| (i.dbus_name, service.read_all(peer, &path, i));
            objects.insert(object, interfaces.into_iter().map(read).collect());
        }
    }
    one(objects)
}

/// `Bulk.GetMany(ao objects, s interface, as attributes) -> aa{sv}`: for each object, in order, those of the attributes
/// that can be read; an object that is gone has none.
fn read_many(
    peer: &Peer,
    service: &dyn Service,
    args: Vec<Value<'static>>,
) -> Result<Structure<'static>, Failure> {
    let [objects, interface, names] = <[Value<'static>; 3]>::try_from(args)
        .map_err(|_| ApiError::invalid_arg("GetMany takes three arguments"))?;
    let objects = Vec::<crate::types::ObjRef<idl::IVirtualBox>>::from_value(objects)?;
    let interface = String::from_value(interface)?;
    let names = Vec::<String>::from_value(names)?;
    let interface = idl::by_dbus_name(&interface)
        .ok_or_else(|| Failure::DBus("UnknownInterface", format!("no interface {interface}")))?;
    let attrs: Vec<&'static AttrDesc> = names.iter().filter_map(|n| interface.attribute(n)).collect();
    let read = |path: &str| -> HashMap<&'static str, Value<'static>> {
        let has =
            service.interfaces(peer, path).is_some_and(|all| all.iter().any(|i| i.name == interface.name));
        let attrs = attrs.iter().filter(|_| has);
        attrs.filter_map(|a| service.read(peer, path, interface, a).ok().map(|v| (a.name, v))).collect()
    };
    let all: Vec<HashMap<&'static str, Value<'static>>> = objects.iter().map(|o| read(o.path())).collect();
    one(all)
}

/// Introspection data of an object (D-Bus specification, "Introspection Data Format").
fn introspect(peer: &Peer, service: &dyn Service, path: &str) -> String {
    let mut xml = String::from(
        "<!DOCTYPE node PUBLIC \"-//freedesktop//DTD D-BUS Object Introspection 1.0//EN\"\n \
         \"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd\">\n<node>\n",
    );
    for interface in service.interfaces(peer, path).unwrap_or_default() {
        interface_xml(&mut xml, interface);
    }
    xml.push_str(
        "  <interface name=\"org.freedesktop.DBus.Properties\">\n    \
         <method name=\"Get\"><arg name=\"interface\" type=\"s\" direction=\"in\"/>\
         <arg name=\"name\" type=\"s\" direction=\"in\"/><arg name=\"value\" type=\"v\" direction=\"out\"/></method>\n    \
         <method name=\"Set\"><arg name=\"interface\" type=\"s\" direction=\"in\"/>\
         <arg name=\"name\" type=\"s\" direction=\"in\"/><arg name=\"value\" type=\"v\" direction=\"in\"/></method>\n    \
         <method name=\"GetAll\"><arg name=\"interface\" type=\"s\" direction=\"in\"/>\
         <arg name=\"values\" type=\"a{sv}\" direction=\"out\"/></method>\n  </interface>\n  \
         <interface name=\"org.freedesktop.DBus.ObjectManager\">\n    <method name=\"GetManagedObjects\">\
         <arg name=\"objects\" type=\"a{oa{sa{sv}}}\" direction=\"out\"/></method>\n  </interface>\n",
    );
    for child in service.children(peer, path) {
        let _ = writeln!(xml, "  <node name=\"{child}\"/>");
    }
    xml.push_str("</node>\n");
    xml
}

fn interface_xml(xml: &mut String, interface: &Interface) {
    // Names and signatures come from the tables: they need no escaping.
    let _ = writeln!(xml, "  <interface name=\"{}\">", interface.dbus_name);
    for method in interface.methods {
        let _ = writeln!(xml, "    <method name=\"{}\">", method.name);
        for (direction, list) in [("in", method.args), ("out", method.returns)] {
            for (name, ty) in list {
                let _ = writeln!(
                    xml,
                    "      <arg name=\"{name}\" type=\"{}\" direction=\"{direction}\"/>",
                    ty.signature()
                );
            }
        }
        xml.push_str("    </method>\n");
    }
    for signal in interface.signals {
        let _ = writeln!(xml, "    <signal name=\"{}\">", signal.name);
        for (name, ty) in signal.args {
            let _ = writeln!(xml, "      <arg name=\"{name}\" type=\"{}\"/>", ty.signature());
        }
        xml.push_str("    </signal>\n");
    }
    for attr in interface.attributes {
        let access = if attr.writable { "readwrite" } else { "read" };
        let _ = writeln!(
            xml,
            "    <property name=\"{}\" type=\"{}\" access=\"{access}\"/>",
            attr.name,
            attr.ty.signature()
        );
    }
    xml.push_str("  </interface>\n");
}

type Key = (&'static str, &'static str);

/// How the attributes of some interfaces are read from a `C`: typed on the way in, by name on the way out.
pub struct ReadTable<C: ?Sized>(HashMap<Key, Box<dyn Fn(&C) -> ApiResult<Value<'static>> + Send + Sync>>);

impl<C: ?Sized> Default for ReadTable<C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<C: ?Sized> ReadTable<C> {
    /// An attribute that can always be read.
    pub fn add<I: InterfaceType, T: ApiType>(
        &mut self,
        attr: Attr<I, T>,
        read: impl Fn(&C) -> T + Send + Sync + 'static,
    ) -> &mut Self {
        self.add_fallible(attr, move |c| Ok(read(c)))
    }

    pub fn add_fallible<I: InterfaceType, T: ApiType>(
        &mut self,
        attr: Attr<I, T>,
        read: impl Fn(&C) -> ApiResult<T> + Send + Sync + 'static,
    ) -> &mut Self {
        self.0.insert((I::NAME, attr.name), Box::new(move |c| read(c).map(T::into_value)));
        self
    }

    pub fn read(&self, context: &C, interface: &Interface, attr: &AttrDesc) -> ApiResult<Value<'static>> {
        match self.0.get(&(interface.name, attr.name)) {
            Some(read) => read(context),
            None => Err(not_implemented(interface, attr.name)),
        }
    }

    pub fn has(&self, interface: &Interface, attr: &AttrDesc) -> bool {
        self.0.contains_key(&(interface.name, attr.name))
    }
}

/// How the writable attributes of some interfaces are written to a `C`.
pub struct WriteTable<C: ?Sized>(
    HashMap<Key, Box<dyn Fn(&mut C, Value<'static>) -> ApiResult<()> + Send + Sync>>,
);

impl<C: ?Sized> Default for WriteTable<C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<C: ?Sized> WriteTable<C> {
    pub fn add<I: InterfaceType, T: ApiType>(
        &mut self,
        attr: Attr<I, T>,
        write: impl Fn(&mut C, T) -> ApiResult<()> + Send + Sync + 'static,
    ) -> &mut Self {
        self.0.insert((I::NAME, attr.name), Box::new(move |c, v| write(c, T::from_value(v)?)));
        self
    }

    pub fn write(
        &self,
        context: &mut C,
        interface: &Interface,
        attr: &AttrDesc,
        value: Value<'static>,
    ) -> ApiResult<()> {
        match self.0.get(&(interface.name, attr.name)) {
            Some(write) => write(context, value),
            None => Err(not_implemented(interface, attr.name)),
        }
    }

    pub fn has(&self, interface: &Interface, attr: &AttrDesc) -> bool {
        self.0.contains_key(&(interface.name, attr.name))
    }
}

/// How the methods of some interfaces are called on a `C`.
pub struct CallTable<C: ?Sized>(
    HashMap<Key, Box<dyn Fn(&C, Vec<Value<'static>>) -> ApiResult<Vec<Value<'static>>> + Send + Sync>>,
);

impl<C: ?Sized> Default for CallTable<C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<C: ?Sized> CallTable<C> {
    pub fn add<I: InterfaceType, A: Values, R: ReturnShape>(
        &mut self,
        method: Method<I, A, R>,
        call: impl Fn(&C, A) -> ApiResult<R::Out> + Send + Sync + 'static,
    ) -> &mut Self {
        self.0.insert(
            (I::NAME, method.name),
            Box::new(move |c, args| call(c, A::from_values(args)?).map(R::into_values)),
        );
        self
    }

    pub fn call(
        &self,
        context: &C,
        interface: &Interface,
        method: &MethodDesc,
        args: Vec<Value<'static>>,
    ) -> ApiResult<Vec<Value<'static>>> {
        match self.0.get(&(interface.name, method.name)) {
            Some(call) => call(context, args),
            None => Err(not_implemented(interface, method.name)),
        }
    }

    pub fn has(&self, interface: &Interface, method: &MethodDesc) -> bool {
        self.0.contains_key(&(interface.name, method.name))
    }
}

pub(crate) fn not_implemented(interface: &Interface, member: &str) -> ApiError {
    ApiError::new(
        vbox_types::ResultCode::NotImpl,
        format!("Method {}::{member} is not implemented", interface.name),
    )
}
