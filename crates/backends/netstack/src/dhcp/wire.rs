//! BOOTP messages with DHCP options: reading a client's, writing a server's.
//!
//! ```text
//! 0 op, htype, hlen, hops   4 xid   8 secs   10 flags   12 ciaddr   16 yiaddr   20 siaddr   24 giaddr
//! 28 chaddr (16)   44 sname (64)   108 file (128)   236 magic cookie   240 options: code, length, value …, 255
//! ```

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::mac::Mac;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
const OPTIONS: usize = 240;
/// The shortest message that every client takes.
const SHORTEST: usize = 300;

pub(super) mod code {
    pub(crate) const SUBNET_MASK: u8 = 1;
    pub(crate) const REQUESTED_ADDRESS: u8 = 50;
    pub(crate) const LEASE_TIME: u8 = 51;
    pub(crate) const MESSAGE_TYPE: u8 = 53;
    pub(crate) const SERVER: u8 = 54;
    pub(crate) const PARAMETERS: u8 = 55;
    pub(crate) const MESSAGE: u8 = 56;
    pub(crate) const MAX_SIZE: u8 = 57;
    pub(crate) const RENEWAL_TIME: u8 = 58;
    pub(crate) const REBINDING_TIME: u8 = 59;
    pub(crate) const VENDOR_CLASS: u8 = 60;
    pub(crate) const CLIENT_ID: u8 = 61;
    pub(crate) const TFTP_SERVER: u8 = 66;
    pub(crate) const BOOT_FILE: u8 = 67;
    pub(crate) const USER_CLASS: u8 = 77;
    pub(crate) const RAPID_COMMIT: u8 = 80;
}

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Decline = 4,
    Ack = 5,
    Nak = 6,
    Release = 7,
    Inform = 8,
}

/// A client's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) xid: [u8; 4],
    pub(super) broadcast: bool,
    pub(super) flags: [u8; 2],
    pub(super) client: Ipv4Addr,
    pub(super) relay: Ipv4Addr,
    pub(super) mac: Mac,
    options: BTreeMap<u8, Vec<u8>>,
}

impl Request {
    /// Reads a message; `None` for anything but a DHCP client's on Ethernet.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(OPTIONS)?;
        // A request, over Ethernet, with addresses of six bytes.
        if head.get(..3)? != [1, 1, 6] || !head.ends_with(&COOKIE) {
            return None;
        }
        let four = |at: usize| head.get(at..at + 4).and_then(|b| b.first_chunk::<4>().copied());
        let mut options: BTreeMap<u8, Vec<u8>> = BTreeMap::new();
        let mut rest = rest;
        while let [option, tail @ ..] = rest {
            match option {
                0 => rest = tail,
                255 => break,
                option => {
                    let (length, tail) = tail.split_first()?;
                    let (value, tail) = tail.split_at_checked(usize::from(*length))?;
                    // An option that comes in parts is their concatenation (RFC 3396).
                    options.entry(*option).or_default().extend(value);
                    rest = tail;
                }
            }
        }
        let kind = match options.get(&code::MESSAGE_TYPE)?.as_slice() {
            [1] => Kind::Discover,
            [3] => Kind::Request,
            [4] => Kind::Decline,
            [7] => Kind::Release,
            [8] => Kind::Inform,
            _ => return None,
        };
        let flags = [*head.get(10)?, *head.get(11)?];
        Some(Self {
            kind,
            xid: four(4)?,
            broadcast: flags[0] & 0x80 != 0,
            flags,
            client: four(12)?.into(),
            relay: four(24)?.into(),
            mac: Mac(*head.get(28..34)?.first_chunk()?),
            options,
        })
    }

    pub(super) fn option(&self, code: u8) -> Option<&[u8]> {
        self.options.get(&code).map(Vec::as_slice)
    }

    pub(super) fn address(&self, code: u8) -> Option<Ipv4Addr> {
        <[u8; 4]>::try_from(self.option(code)?).ok().map(Ipv4Addr::from)
    }

    pub(super) fn number(&self, code: u8) -> Option<u32> {
        <[u8; 4]>::try_from(self.option(code)?).ok().map(u32::from_be_bytes)
    }

    /// Bytes of the longest answer that the client takes: the message alone, without IP and UDP.
    pub(super) fn room(&self) -> usize {
        let said =
            self.option(code::MAX_SIZE).and_then(|v| <[u8; 2]>::try_from(v).ok()).map(u16::from_be_bytes);
        usize::from(said.unwrap_or(576).clamp(576, 1500)) - 28
    }
}

/// A server's message.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) kind: Kind,
    pub(super) yours: Ipv4Addr,
    pub(super) server: Ipv4Addr,
    /// In the order in which they are sent.
    pub(super) options: Vec<(u8, Vec<u8>)>,
}

impl Answer {
    /// The message. Options that the client has no room for are left out, the last ones first.
    pub(super) fn bytes(&self, to: &Request) -> Vec<u8> {
        let mut out = vec![0; OPTIONS];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[2, 1, 6, 0]);
        put(4, &to.xid);
        put(10, &to.flags);
        if self.kind != Kind::Nak {
            put(12, &to.client.octets());
        }
        put(16, &self.yours.octets());
        put(28, &to.mac.0);
        let option =
            |code: u8| self.options.iter().find(|(c, _)| *c == code).map(|(_, value)| value.as_slice());
        if let Some(name) = option(code::TFTP_SERVER) {
            // Boot ROMs look here for the next server and its file.
            let address: Option<Ipv4Addr> = std::str::from_utf8(name).ok().and_then(|n| n.parse().ok());
            put(20, &address.unwrap_or(self.server).octets());
            put(44, &name[..name.len().min(63)]);
        }
        if let Some(file) = option(code::BOOT_FILE) {
            put(108, &file[..file.len().min(127)]);
        }
        put(236, &COOKIE);
        out.extend([code::MESSAGE_TYPE, 1, self.kind as u8, code::SERVER, 4]);
        out.extend(self.server.octets());
        let room = to.room() - 1;
        for (code, value) in &self.options {
            let Ok(length) = u8::try_from(value.len()) else { continue };
            if out.len() + 2 + value.len() <= room {
                out.extend([*code, length]);
                out.extend(value);
            } else {
                tracing::debug!(target: "dhcp", "option {code} does not fit into the answer to {}", to.mac);
            }
        }
        out.push(255);
        out.resize(out.len().max(SHORTEST), 0);
        out
    }
}
