//! The Main API's types: how an IDL type is called, how it travels on D-Bus, and which Rust type stands for it.
//!
//! Numbers travel as D-Bus numbers of the same width, enumerations by the Main API's value names (`PoweredOff`),
//! as SOAP does; object references as object paths, where `/` is the null object; UUIDs as lower-case text.

use std::fmt;
use std::marker::PhantomData;

use zbus::zvariant::{self, Array, ObjectPath, Signature, Value};

use crate::error::{ApiError, ApiResult};

/// An IDL type, as the interface tables name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ty {
    Bool,
    Octet,
    Short,
    UShort,
    Long,
    ULong,
    LongLong,
    ULongLong,
    Str,
    /// A byte string, sent in one piece.
    Octets,
    /// A file descriptor (no IDL type; the D-Bus form of a connection).
    Fd,
    /// An enumeration; the name of the IDL type.
    Enum(&'static str),
    /// A reference to an object with the named interface.
    Object(&'static str),
    Array(&'static Ty),
}

impl Ty {
    /// The D-Bus signature, as introspection data prints it.
    pub fn signature(self) -> String {
        match self {
            Ty::Bool => "b".into(),
            Ty::Octet => "y".into(),
            Ty::Short => "n".into(),
            Ty::UShort => "q".into(),
            Ty::Long => "i".into(),
            Ty::ULong => "u".into(),
            Ty::LongLong => "x".into(),
            Ty::ULongLong => "t".into(),
            Ty::Str | Ty::Enum(_) => "s".into(),
            Ty::Octets => "ay".into(),
            Ty::Fd => "h".into(),
            Ty::Object(_) => "o".into(),
            Ty::Array(inner) => format!("a{}", inner.signature()),
        }
    }
}

/// A Rust type that stands for an IDL type.
pub trait ApiType: Sized {
    const TY: Ty;

    fn into_value(self) -> Value<'static>;

    /// Reads a value that came over the wire. The error names the type wanted.
    fn from_value(value: Value<'static>) -> ApiResult<Self>;
}

/// The error for a value of the wrong type.
fn mismatch(want: Ty, got: &Value<'_>) -> ApiError {
    ApiError::invalid_arg(format!(
        "Wrong type of value: expected '{}', found '{}'",
        want.signature(),
        got.value_signature()
    ))
}

macro_rules! plain {
    ($($rust:ty => $ty:ident, $variant:ident;)*) => {$(
        impl ApiType for $rust {
            const TY: Ty = Ty::$ty;

            fn into_value(self) -> Value<'static> {
                Value::$variant(self)
            }

            fn from_value(value: Value<'static>) -> ApiResult<Self> {
                match value {
                    Value::$variant(v) => Ok(v),
                    Value::Value(inner) => Self::from_value(*inner),
                    other => Err(mismatch(Self::TY, &other)),
                }
            }
        }
    )*};
}

plain! {
    bool => Bool, Bool;
    u8 => Octet, U8;
    i16 => Short, I16;
    u16 => UShort, U16;
    i32 => Long, I32;
    u32 => ULong, U32;
    i64 => LongLong, I64;
    u64 => ULongLong, U64;
}

impl ApiType for String {
    const TY: Ty = Ty::Str;

    fn into_value(self) -> Value<'static> {
        // A NUL cannot travel in a D-Bus string; nothing that the API carries has a meaning with one.
        let text = if self.contains('\0') { self.replace('\0', "") } else { self };
        Value::Str(text.into())
    }

    fn from_value(value: Value<'static>) -> ApiResult<Self> {
        match value {
            Value::Str(v) => Ok(v.as_str().to_owned()),
            Value::Value(inner) => Self::from_value(*inner),
            other => Err(mismatch(Self::TY, &other)),
        }
    }
}

/// Bytes that travel in one piece, such as a screen shot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Octets(pub Vec<u8>);

impl ApiType for Octets {
    const TY: Ty = Ty::Octets;

    fn into_value(self) -> Value<'static> {
        Value::Array(Array::from(self.0))
    }

    fn from_value(value: Value<'static>) -> ApiResult<Self> {
        match value {
            Value::Array(array) => Vec::<u8>::try_from(array)
                .map(Octets)
                .map_err(|_| ApiError::invalid_arg("Wrong type of value: expected 'ay'")),
            Value::Value(inner) => Self::from_value(*inner),
            other => Err(mismatch(Self::TY, &other)),
        }
    }
}

impl ApiType for zvariant::OwnedFd {
    const TY: Ty = Ty::Fd;

    fn into_value(self) -> Value<'static> {
        Value::Fd(zvariant::Fd::Owned(self.into()))
    }

    fn from_value(value: Value<'static>) -> ApiResult<Self> {
        match value {
            Value::Fd(zvariant::Fd::Owned(fd)) => Ok(fd.into()),
            Value::Value(inner) => Self::from_value(*inner),
            other => Err(mismatch(Self::TY, &other)),
        }
    }
}

impl<T: ApiType + ConstTy> ApiType for Vec<T> {
    const TY: Ty = Ty::Array(T::STATIC_TY);

    fn into_value(self) -> Value<'static> {
        let text = T::TY.signature();
        let element = Signature::try_from(text.as_str()).unwrap_or(Signature::Variant);
        let mut array = Array::new(&element);
        for item in self {
            // The element's signature is T's own, so that the append cannot fail.
            let _ = array.append(item.into_value());
        }
        Value::Array(array)
    }

    fn from_value(value: Value<'static>) -> ApiResult<Self> {
        match value {
            Value::Array(array) => array
                .iter()
                .map(|item| {
                    let item = item.try_to_owned().map_err(|e| ApiError::invalid_arg(e.to_string()))?;
                    T::from_value(item.into())
                })
                .collect(),
            Value::Value(inner) => Self::from_value(*inner),
            other => Err(mismatch(Self::TY, &other)),
        }
    }
}

/// [`ApiType::TY`] by reference, which the element type of an array needs.
pub trait ConstTy {
    const STATIC_TY: &'static Ty;
}

impl<T: ApiType> ConstTy for T {
    const STATIC_TY: &'static Ty = &T::TY;
}

/// An interface of the Main API: the marker types that [`crate::idl`] declares.
pub trait InterfaceType: 'static {
    const NAME: &'static str;
}

/// A reference to an object with interface `I`: its path, or null.
pub struct ObjRef<I> {
    path: String,
    interface: PhantomData<fn() -> I>,
}

impl<I> ObjRef<I> {
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), interface: PhantomData }
    }

    /// The null object.
    pub fn null() -> Self {
        Self::new("/")
    }

    pub fn is_null(&self) -> bool {
        self.path == "/"
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The reference, or `None` for the null object.
    pub fn non_null(self) -> Option<Self> {
        if self.is_null() { None } else { Some(self) }
    }
}

impl<I> Clone for ObjRef<I> {
    fn clone(&self) -> Self {
        Self::new(self.path.clone())
    }
}

impl<I> PartialEq for ObjRef<I> {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl<I> fmt::Debug for ObjRef<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl<I: InterfaceType> ApiType for ObjRef<I> {
    const TY: Ty = Ty::Object(I::NAME);

    fn into_value(self) -> Value<'static> {
        match ObjectPath::try_from(self.path) {
            Ok(path) => Value::ObjectPath(path),
            Err(_) => Value::ObjectPath(ObjectPath::from_static_str_unchecked("/")),
        }
    }

    fn from_value(value: Value<'static>) -> ApiResult<Self> {
        match value {
            Value::ObjectPath(path) => Ok(Self::new(path.as_str())),
            Value::Value(inner) => Self::from_value(*inner),
            other => Err(mismatch(Self::TY, &other)),
        }
    }
}

/// The arguments or results of a method: a tuple of [`ApiType`]s, in the order of the interface table.
pub trait Values: Sized {
    fn into_values(self) -> Vec<Value<'static>>;
    fn from_values(values: Vec<Value<'static>>) -> ApiResult<Self>;
}

fn count_mismatch(want: usize, got: usize) -> ApiError {
    ApiError::invalid_arg(format!("Wrong number of values: expected {want}, found {got}"))
}

macro_rules! tuples {
    ($($count:literal: $($name:ident)*;)*) => {$(
        impl<$($name: ApiType),*> Values for ($($name,)*) {
            #[allow(non_snake_case)]
            fn into_values(self) -> Vec<Value<'static>> {
                let ($($name,)*) = self;
                vec![$($name.into_value()),*]
            }

            #[allow(unused_mut, unused_variables)]
            fn from_values(values: Vec<Value<'static>>) -> ApiResult<Self> {
                let count = values.len();
                if count != $count {
                    return Err(count_mismatch($count, count));
                }
                let mut values = values.into_iter();
                Ok(($($name::from_value(values.next().ok_or_else(|| count_mismatch($count, count))?)?,)*))
            }
        }
    )*};
}

tuples! {
    0: ;
    1: A;
    2: A B;
    3: A B C;
    4: A B C D;
    5: A B C D E;
    6: A B C D E F;
    7: A B C D E F G;
    8: A B C D E F G H;
    9: A B C D E F G H I;
    10: A B C D E F G H I J;
}

/// What the table says of an attribute.
#[derive(Debug)]
pub struct AttrDesc {
    pub name: &'static str,
    pub ty: Ty,
    pub writable: bool,
}

/// What the table says of a method.
#[derive(Debug)]
pub struct MethodDesc {
    pub name: &'static str,
    pub args: &'static [(&'static str, Ty)],
    pub returns: &'static [(&'static str, Ty)],
}

/// What the table says of a signal (the D-Bus form of an event).
#[derive(Debug)]
pub struct SignalDesc {
    pub name: &'static str,
    pub args: &'static [(&'static str, Ty)],
}

/// One interface of the Main API.
#[derive(Debug)]
pub struct Interface {
    /// As the Main API calls it, for example `IMachine`.
    pub name: &'static str,
    /// As D-Bus calls it, for example `org.virtualbox.IMachine`.
    pub dbus_name: &'static str,
    pub attributes: &'static [AttrDesc],
    pub methods: &'static [MethodDesc],
    pub signals: &'static [SignalDesc],
}

impl Interface {
    pub fn attribute(&self, name: &str) -> Option<&'static AttrDesc> {
        self.attributes.iter().find(|a| a.name == name)
    }

    pub fn method(&self, name: &str) -> Option<&'static MethodDesc> {
        self.methods.iter().find(|m| m.name == name)
    }
}

/// A typed handle of an attribute: `IMachine::MemorySize`.
pub struct Attr<I, T> {
    pub name: &'static str,
    marker: PhantomData<fn() -> (I, T)>,
}

impl<I, T> Attr<I, T> {
    pub const fn new(name: &'static str) -> Self {
        Self { name, marker: PhantomData }
    }
}

impl<I, T> Clone for Attr<I, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I, T> Copy for Attr<I, T> {}

/// A typed handle of a method: `IVirtualBox::FindMachine`. `A` is the tuple of arguments, `R` that of results.
pub struct Method<I, A, R> {
    pub name: &'static str,
    marker: PhantomData<fn(A) -> (I, R)>,
}

impl<I, A, R> Method<I, A, R> {
    pub const fn new(name: &'static str) -> Self {
        Self { name, marker: PhantomData }
    }
}

impl<I, A, R> Clone for Method<I, A, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I, A, R> Copy for Method<I, A, R> {}

/// A typed handle of a signal: `IEventSource::OnMachineStateChanged`.
pub struct Signal<I, A> {
    pub name: &'static str,
    marker: PhantomData<fn(A) -> I>,
}

impl<I, A> Signal<I, A> {
    pub const fn new(name: &'static str) -> Self {
        Self { name, marker: PhantomData }
    }
}

impl<I, A> Clone for Signal<I, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I, A> Copy for Signal<I, A> {}

/// Maps the table's list of results to the type that callers see.
pub trait ReturnShape {
    type Out;
    fn into_values(out: Self::Out) -> Vec<Value<'static>>;
    fn from_values(values: Vec<Value<'static>>) -> ApiResult<Self::Out>;
}

impl ReturnShape for () {
    type Out = ();

    fn into_values(_out: ()) -> Vec<Value<'static>> {
        Vec::new()
    }

    fn from_values(_values: Vec<Value<'static>>) -> ApiResult<()> {
        Ok(())
    }
}

impl<T: ApiType> ReturnShape for (T,) {
    type Out = T;

    fn into_values(out: T) -> Vec<Value<'static>> {
        vec![out.into_value()]
    }

    fn from_values(values: Vec<Value<'static>>) -> ApiResult<T> {
        <(T,) as Values>::from_values(values).map(|(value,)| value)
    }
}

macro_rules! return_tuples {
    ($($($name:ident)*;)*) => {$(
        impl<$($name: ApiType),*> ReturnShape for ($($name,)*) {
            type Out = Self;

            fn into_values(out: Self) -> Vec<Value<'static>> {
                Values::into_values(out)
            }

            fn from_values(values: Vec<Value<'static>>) -> ApiResult<Self> {
                Values::from_values(values)
            }
        }
    )*};
}

return_tuples! {
    A B;
    A B C;
    A B C D;
    A B C D E;
    A B C D E F;
    A B C D E F G;
    A B C D E F G H;
}
