//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Broadcast or multicast.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// An address of VirtualBox's range (08:00:27) that stands for `name`: the same each time.
    pub fn derived(name: &str) -> Self {
        // FNV-1a: the value must not change between versions of the program.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [.., a, b, c] = hash.to_be_bytes();
        Self([0x08, 0x00, 0x27, a, b, c])
    }

    /// The destination of a frame; `None` for one that is too short to be one.
    pub(crate) fn destination(frame: &[u8]) -> Option<Self> {
        frame.first_chunk().map(|address| Self(*address)).filter(|_| frame.len() >= 14)
    }

    /// The source of a frame.
    pub(crate) fn source(frame: &[u8]) -> Option<Self> {
        frame.get(6..)?.first_chunk().map(|address| Self(*address))
    }
}

/// Six bytes in hexadecimal, with colons.
impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The text is no Ethernet address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an Ethernet address like 08:00:27:12:34:56")]
pub struct MacError(String);

/// Twelve hexadecimal digits, or six bytes with colons or dashes between them.
impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut address = [0; 6];
        if text.contains([':', '-']) {
            let mut parts = text.split([':', '-']);
            for byte in &mut address {
                let part = parts.next().ok_or_else(wrong)?;
                if part.is_empty() || part.len() > 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(wrong());
                }
                *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
            }
            return if parts.next().is_none() { Ok(Self(address)) } else { Err(wrong()) };
        }
        if text.len() != 12 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let value = u64::from_str_radix(text, 16).map_err(|_| wrong())?;
        address.copy_from_slice(&value.to_be_bytes()[2..]);
        Ok(Self(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_each_spelling_and_shown_in_one() {
        for text in ["080027A1B2C3", "08:00:27:a1:b2:c3", "8-0-27-a1-b2-c3"] {
            assert_eq!(text.parse::<Mac>().unwrap().to_string(), "08:00:27:a1:b2:c3", "{text}");
        }
        for text in
            ["", "080027A1B2C", "08:00:27:a1:b2", "08:00:27:a1:b2:c3:d4", "0g:00:27:a1:b2:c3", "+80027A1B2C3"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_derived_address_is_single_and_always_the_same() {
        assert_eq!(Mac::derived("intnet"), Mac::derived("intnet"));
        assert_ne!(Mac::derived("intnet"), Mac::derived("intnet2"));
        assert!(!Mac::derived("").is_group());
    }
}
