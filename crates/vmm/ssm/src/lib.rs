//! SSM, the saved-state manager: how devices and the VMM put their state into a stream and take it back.
//!
//! A stream is a sequence of *units*. Each carries a name, an instance number, a version and its payload:
//!
//! ```text
//! "BXSS" | format u32 | unit*            unit = name_len u16 | name | instance u32 | version u32 | len u64 | payload | crc32 u32
//! ```
//!
//! Integers are little endian. The payload is written field by field in an order fixed by the unit's version;
//! a reader must consume it to the last byte. Restoring parses and validates first and commits afterwards.

use std::fmt;

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("saved state of {unit} ends {missing} bytes too early")]
    Truncated { unit: String, missing: usize },
    #[error("saved state of {unit} has {extra} bytes that version {version} does not define")]
    Trailing { unit: String, version: u32, extra: usize },
    #[error("saved state of {unit} is of version {found}, newer than the {known} this program knows")]
    Newer { unit: String, found: u32, known: u32 },
    #[error("saved state of {unit}: {what}")]
    Invalid { unit: String, what: String },
    #[error("not a saved state: {0}")]
    Stream(String),
    #[error("saved state lacks the unit {0}")]
    Missing(String),
}

/// Collects one unit's payload.
#[derive(Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

macro_rules! integers {
    ($($put:ident $take:ident $ty:ty;)*) => {
        impl Writer { $(#[doc = concat!("Appends a little-endian `", stringify!($ty), "`.")]
            pub fn $put(&mut self, value: $ty) { self.bytes.extend_from_slice(&value.to_le_bytes()); })* }
        impl Reader<'_> { $(#[doc = concat!("Takes a little-endian `", stringify!($ty), "`.")]
            pub fn $take(&mut self) -> Result<$ty, Error> {
                const N: usize = size_of::<$ty>();
                let bytes = self.take(N)?;
                let mut array = [0; N];
                array.copy_from_slice(bytes);
                Ok(<$ty>::from_le_bytes(array))
            })* }
    };
}

integers! {
    put_u8 take_u8 u8;
    put_u16 take_u16 u16;
    put_u32 take_u32 u32;
    put_u64 take_u64 u64;
}

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a flag as one byte, 0 or 1.
    pub fn put_bool(&mut self, value: bool) {
        self.put_u8(u8::from(value));
    }

    /// Appends bytes whose number both sides know.
    pub fn put_bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a 32-bit length and that many bytes.
    pub fn put_blob(&mut self, bytes: &[u8]) {
        self.put_u32(u32::try_from(bytes.len()).expect("a unit's blobs stay below 4 GiB"));
        self.put_bytes(bytes);
    }

    /// What was written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Hands out one unit's payload.
pub struct Reader<'a> {
    unit: String,
    version: u32,
    bytes: &'a [u8],
}

impl fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({} v{}, {} bytes left)", self.unit, self.version, self.bytes.len())
    }
}

impl<'a> Reader<'a> {
    /// A reader over `bytes`, the payload of `unit` written in `version`.
    pub fn new(unit: &str, version: u32, bytes: &'a [u8]) -> Self {
        Self { unit: unit.to_owned(), version, bytes }
    }

    /// The version in which the payload was written.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Takes `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        if count > self.bytes.len() {
            return Err(Error::Truncated { unit: self.unit.clone(), missing: count - self.bytes.len() });
        }
        let (head, tail) = self.bytes.split_at(count);
        self.bytes = tail;
        Ok(head)
    }

    /// Takes a flag; anything but 0 and 1 is refused.
    pub fn take_bool(&mut self) -> Result<bool, Error> {
        match self.take_u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.invalid(format!("flag has the value {other}"))),
        }
    }

    /// Fills `out`.
    pub fn take_into(&mut self, out: &mut [u8]) -> Result<(), Error> {
        out.copy_from_slice(self.take(out.len())?);
        Ok(())
    }

    /// Takes what [`Writer::put_blob`] wrote, if it is not longer than `limit` bytes.
    pub fn take_blob(&mut self, limit: usize) -> Result<&'a [u8], Error> {
        let len = self.take_u32()? as usize;
        if len > limit {
            return Err(self.invalid(format!("a field of {len} bytes exceeds its limit of {limit}")));
        }
        self.take(len)
    }

    /// An error that names this unit.
    pub fn invalid(&self, what: impl Into<String>) -> Error {
        Error::Invalid { unit: self.unit.clone(), what: what.into() }
    }

    /// Checks that nothing is left.
    pub fn finish(self) -> Result<(), Error> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(Error::Trailing { unit: self.unit, version: self.version, extra: self.bytes.len() })
        }
    }
}

/// Something whose state belongs into a saved state. Every device implements it.
pub trait Saveable {
    /// The unit's name, fixed for ever.
    fn unit_name(&self) -> &'static str;

    /// The version that [`Saveable::save`] writes.
    fn unit_version(&self) -> u32;

    /// Writes the guest-visible state. Called with every vCPU stopped and all I/O drained.
    fn save(&self, out: &mut Writer);

    /// Takes the state back: parse and validate everything, then commit. On an error the object is unchanged.
    /// Called with every vCPU stopped, on a freshly reset object. Must consume `input` entirely.
    fn load(&mut self, input: Reader<'_>) -> Result<(), Error>;
}

/// Refuses a unit newer than `known`.
pub fn check_version(input: &Reader<'_>, known: u32) -> Result<(), Error> {
    if input.version > known {
        return Err(Error::Newer { unit: input.unit.clone(), found: input.version, known });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_taken_back() {
        let mut w = Writer::new();
        w.put_u16(0x1234);
        w.put_bool(true);
        w.put_blob(b"abc");
        let bytes = w.into_bytes();
        let mut r = Reader::new("test", 1, &bytes);
        assert_eq!(r.take_u16(), Ok(0x1234));
        assert_eq!(r.take_bool(), Ok(true));
        assert_eq!(r.take_blob(3), Ok(&b"abc"[..]));
        assert_eq!(r.finish(), Ok(()));
    }

    #[test]
    fn short_and_long_payloads_are_refused() {
        let mut r = Reader::new("test", 1, &[1]);
        assert_eq!(r.take_u16(), Err(Error::Truncated { unit: "test".into(), missing: 1 }));
        assert_eq!(r.finish(), Err(Error::Trailing { unit: "test".into(), version: 1, extra: 1 }));
    }

    #[test]
    fn a_flag_of_two_is_refused() {
        assert!(Reader::new("test", 1, &[2]).take_bool().is_err());
    }
}
