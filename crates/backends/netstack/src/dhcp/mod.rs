//! The DHCP server of a virtual network: RFC 2131 as far as VirtualBox's has it, with its configuration by network, group and client.
//!
//! [`Server::receive`] takes an Ethernet frame and the time and returns the frames that answer it: no sockets, no clock. It also answers
//! ARP and pings for its own address. Relays, `DHCPINFORM` without a list of options and options in the `sname`/`file` fields of a request
//! are not served.

mod leases;
pub mod options;
mod packet;
mod server;
mod wire;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use leases::{Lease, LeaseError, LeaseState, Leases};
pub use server::Server;

use crate::mac::Mac;

/// Seconds of a lease, of which a client may ask for less or more within limits.
pub const DEFAULT_TIMES: (u32, u32, u32) = (300, 600, 43_200);

/// What a server is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub address: Ipv4Addr,
    pub mask: Ipv4Addr,
    /// The range that addresses are taken from, both ends included.
    pub lower: Ipv4Addr,
    pub upper: Ipv4Addr,
    /// Where leases are kept.
    pub leases: PathBuf,
    pub global: Scope,
    pub groups: Vec<Group>,
    pub clients: Vec<Client>,
}

/// Options and times at one level. What a client's own scope does not say, its groups' and then the network's do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// Seconds; 0 if the next level decides.
    pub min_time: u32,
    pub default_time: u32,
    pub max_time: u32,
    /// Options that are sent though nobody asked.
    pub forced: Vec<u8>,
    /// Options of this level and those below it in the order that are not sent.
    pub suppressed: Vec<u8>,
    /// Values as they are sent, by number.
    pub options: BTreeMap<u8, Vec<u8>>,
}

/// Clients with something in common: at least one of the inclusive conditions, and none of the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub name: String,
    pub conditions: Vec<Condition>,
    pub scope: Scope,
}

/// A condition on a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub inclusive: bool,
    pub kind: ConditionKind,
    pub value: String,
}

/// What a condition looks at; wildcards are `*` and `?`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionKind {
    Mac,
    MacWildcard,
    VendorClass,
    VendorClassWildcard,
    UserClass,
    UserClassWildcard,
}

/// One client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Client {
    pub mac: Mac,
    pub fixed: Option<Ipv4Addr>,
    pub scope: Scope,
}

/// Why a configuration makes no server.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("invalid netmask: {0}")]
    Mask(Ipv4Addr),
    #[error("invalid server address: {0} (mask {1})")]
    Address(Ipv4Addr, Ipv4Addr),
    #[error("invalid range: {0} to {1} (mask {2})")]
    Range(Ipv4Addr, Ipv4Addr, Ipv4Addr),
}

impl Config {
    /// Whether the addresses fit together.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mask = u32::from(self.mask);
        if mask == 0 || mask.leading_ones() + mask.trailing_zeros() != 32 {
            return Err(ConfigError::Mask(self.mask));
        }
        let network = u32::from(self.address) & mask;
        let single = |address: Ipv4Addr| {
            let host = u32::from(address) & !mask;
            !address.is_multicast() && u32::from(address) & mask == network && host != 0 && host != !mask
        };
        if !single(self.address) {
            return Err(ConfigError::Address(self.address, self.mask));
        }
        if !single(self.lower) || !single(self.upper) || self.lower > self.upper {
            return Err(ConfigError::Range(self.lower, self.upper, self.mask));
        }
        Ok(())
    }

    fn contains(&self, address: Ipv4Addr) -> bool {
        (self.lower..=self.upper).contains(&address)
    }
}

/// `*` stands for any text, `?` for one character; letters count alike in either case only where they are the same.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    // Greedy with one point to come back to: linear in practice, quadratic at worst, and both are short.
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while let Some(c) = text.get(t) {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(q) if *q == '?' || q == c => {
                p += 1;
                t += 1;
            }
            _ => match &mut star {
                Some((at, from)) => {
                    *from += 1;
                    (p, t) = (*at + 1, *from);
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_shells_do() {
        for (pattern, text, expected) in [
            ("08:00:27:*", "08:00:27:01:02:03", true),
            ("*:03", "08:00:27:01:02:03", true),
            ("08:??:27*3", "08:00:27:01:02:03", true),
            ("08:00:28*", "08:00:27:01:02:03", false),
            ("", "", true),
            ("*", "", true),
            ("?", "", false),
            ("PXEClient*", "PXEClient:Arch:00000", true),
            ("a*b*c", "axxbxxb", false),
        ] {
            assert_eq!(matches_pattern(pattern, text), expected, "{pattern} {text}");
        }
    }
}
