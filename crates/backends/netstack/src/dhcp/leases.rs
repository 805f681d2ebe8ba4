//! Who has which address, and the file that remembers it. The file is VirtualBox's:
//!
//! ```xml
//! <Leases version="1.0">
//!   <Lease mac="08:00:27:12:34:56" id="01080027123456" network="0.0.0.0" state="acked">
//!     <Address value="192.168.56.101"/>
//!     <Time issued="1700000000" expiration="600"/>
//!   </Lease>
//! </Leases>
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use crate::mac::Mac;

/// Addresses that are remembered; a /16 of clients is more than a virtual network has.
const MOST: usize = 65_536;
/// A file beyond this is none of ours.
const LARGEST_FILE: u64 = 32 << 20;

/// What a lease is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeaseState {
    Free,
    Released,
    Expired,
    Offered,
    Acked,
}

impl LeaseState {
    const NAMES: [(Self, &'static str); 5] = [
        (Self::Free, "free"),
        (Self::Released, "released"),
        (Self::Expired, "expired"),
        (Self::Offered, "offered"),
        (Self::Acked, "acked"),
    ];

    /// The word in the file.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(state, _)| *state)
    }
}

/// An address and who has, or had, it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub address: Ipv4Addr,
    pub mac: Mac,
    /// The client identifier, which counts instead of the hardware address if there is one.
    pub id: Option<Vec<u8>>,
    pub state: LeaseState,
    /// Seconds since 1970.
    pub issued: i64,
    /// Seconds from then on.
    pub time: u32,
}

impl Lease {
    pub fn expires(&self) -> i64 {
        self.issued.saturating_add(self.time.into())
    }

    fn belongs_to(&self, mac: Mac, id: Option<&[u8]>) -> bool {
        match (&self.id, id) {
            (Some(own), Some(id)) => own == id,
            (None, None) => self.mac == mac,
            _ => false,
        }
    }
}

/// Why leases cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("cannot read \"{}\"", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("\"{}\" is no file of leases", path.display())]
    Content { path: PathBuf },
    #[error("cannot write \"{}\"", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Every lease of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    all: Vec<Lease>,
}

impl Leases {
    /// Reads a file; one that is not there has no leases. What is wrong in a file that can be read is left out.
    pub fn load(path: &Path) -> Result<Self, LeaseError> {
        let failed = |source| LeaseError::Read { path: path.to_owned(), source };
        match fs::metadata(path) {
            Ok(meta) if meta.len() > LARGEST_FILE => {
                return Err(LeaseError::Content { path: path.to_owned() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            _ => {}
        }
        let text = fs::read_to_string(path).map_err(failed)?;
        Self::parse(&text).ok_or_else(|| LeaseError::Content { path: path.to_owned() })
    }

    /// Reads the text of a file.
    pub fn parse(text: &str) -> Option<Self> {
        let mut reader = Reader::from_str(text);
        let mut leases = Self::default();
        let mut root = false;
        let mut current: Option<Draft> = None;
        loop {
            let event = reader.read_event().ok()?;
            match &event {
                Event::Eof => break,
                Event::Start(element) | Event::Empty(element) => {
                    match (element.name().as_ref(), &mut current) {
                        ("Leases", None) => root = true,
                        ("Lease", None) if root => {
                            current = Some(Draft {
                                mac: attribute(element, "mac").and_then(|m| m.parse().ok()),
                                id: attribute(element, "id").and_then(|id| unhex(&id)),
                                state: attribute(element, "state").and_then(|s| LeaseState::from_name(&s)),
                                ..Draft::default()
                            });
                        }
                        ("Address", Some(draft)) => {
                            draft.address = attribute(element, "value").and_then(|a| a.parse().ok());
                        }
                        ("Time", Some(draft)) => {
                            draft.issued = attribute(element, "issued").and_then(|t| t.parse().ok());
                            draft.time = attribute(element, "expiration").and_then(|t| t.parse().ok());
                        }
                        _ => {}
                    }
                }
                Event::End(element) if element.name().as_ref() == "Lease" => {
                    let lease = current.take().and_then(Draft::finish);
                    if let Some(lease) =
                        lease.filter(|l| leases.at(l.address).is_none() && leases.all.len() < MOST)
                    {
                        leases.all.push(lease);
                    }
                }
                _ => {}
            }
        }
        root.then_some(leases)
    }

    /// The text of the file.
    pub fn text(&self) -> String {
        let mut text = "<?xml version=\"1.0\"?>\n<Leases version=\"1.0\">\n".to_owned();
        for lease in &self.all {
            let id = lease.id.as_ref().map_or_else(String::new, |id| {
                format!(" id=\"{}\"", id.iter().map(|b| format!("{b:02x}")).collect::<String>())
            });
            text.push_str(&format!(
                "  <Lease mac=\"{}\"{id} network=\"0.0.0.0\" state=\"{}\">\n    <Address value=\"{}\"/>\n    \
                 <Time issued=\"{}\" expiration=\"{}\"/>\n  </Lease>\n",
                lease.mac,
                lease.state.name(),
                lease.address,
                lease.issued,
                lease.time
            ));
        }
        text.push_str("</Leases>\n");
        text
    }

    /// Writes the file in one step: whoever reads it finds the old or the new one, whole.
    pub fn save(&self, path: &Path) -> Result<(), LeaseError> {
        let write = || -> io::Result<()> {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push("-tmp");
            let temporary = path.with_file_name(name);
            let mut file = File::create(&temporary)?;
            file.write_all(self.text().as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().map_err(|source| LeaseError::Write { path: path.to_owned(), source })
    }

    pub fn all(&self) -> &[Lease] {
        &self.all
    }

    /// The newest lease of the card `mac`.
    pub fn of_card(&self, mac: Mac) -> Option<&Lease> {
        self.all.iter().filter(|l| l.mac == mac).max_by_key(|l| (l.state, l.issued))
    }

    pub(super) fn at(&self, address: Ipv4Addr) -> Option<&Lease> {
        self.all.iter().find(|l| l.address == address)
    }

    pub(super) fn of_client(&mut self, mac: Mac, id: Option<&[u8]>) -> Option<&mut Lease> {
        self.all.iter_mut().find(|l| l.belongs_to(mac, id))
    }

    pub(super) fn expire(&mut self, now: i64) {
        for lease in self.all.iter_mut().filter(|l| l.expires() < now) {
            lease.state = match lease.state {
                LeaseState::Offered => LeaseState::Free,
                LeaseState::Acked => LeaseState::Expired,
                state => state,
            };
        }
    }

    pub(super) fn put(&mut self, lease: Lease) {
        match self.all.iter_mut().find(|l| l.address == lease.address) {
            Some(old) => *old = lease,
            None => self.all.push(lease),
        }
    }

    pub(super) fn remove(&mut self, address: Ipv4Addr) {
        self.all.retain(|l| l.address != address);
    }

    pub(super) fn retain(&mut self, keep: impl FnMut(&Lease) -> bool) {
        self.all.retain(keep);
    }
}

#[derive(Default)]
struct Draft {
    mac: Option<Mac>,
    id: Option<Vec<u8>>,
    state: Option<LeaseState>,
    address: Option<Ipv4Addr>,
    issued: Option<i64>,
    time: Option<u32>,
}

impl Draft {
    fn finish(self) -> Option<Lease> {
        Some(Lease {
            address: self.address?,
            mac: self.mac?,
            id: self.id,
            // Files of old versions have no states: their leases are over.
            state: self.state.unwrap_or(LeaseState::Expired),
            issued: self.issued?,
            time: self.time?,
        })
    }
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Option<String> {
    let found = element.attributes().flatten().find(|a| a.key.as_ref() == name)?;
    Some(found.value.into_owned())
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let text = text.replace(':', "");
    if !text.is_ascii() || !text.len().is_multiple_of(2) || text.is_empty() || text.len() > 510 {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_as_it_was_written() {
        let mut leases = Leases::default();
        leases.put(Lease {
            address: Ipv4Addr::new(192, 168, 56, 101),
            mac: Mac([8, 0, 0x27, 1, 2, 3]),
            id: Some(vec![1, 8, 0, 0x27, 1, 2, 3]),
            state: LeaseState::Acked,
            issued: 1_700_000_000,
            time: 600,
        });
        leases.put(Lease {
            address: Ipv4Addr::new(192, 168, 56, 102),
            mac: Mac([8, 0, 0x27, 1, 2, 4]),
            id: None,
            state: LeaseState::Released,
            issued: 1_700_000_001,
            time: 60,
        });
        let text = leases.text();
        assert!(text.contains(
            "<Lease mac=\"08:00:27:01:02:03\" id=\"01080027010203\" network=\"0.0.0.0\" state=\"acked\">"
        ));
        assert_eq!(Leases::parse(&text).unwrap(), leases);
    }

    #[test]
    fn a_damaged_lease_is_left_out_and_another_document_is_refused() {
        let good = "<Lease mac='08:00:27:01:02:03' state='acked'><Address value='10.0.0.1'/><Time issued='1' expiration='2'/></Lease>";
        let text = format!(
            "<Leases>{good}{good}<Lease mac='x' state='acked'><Address value='10.0.0.2'/><Time issued='1' expiration='2'/></Lease>\
             <Lease mac='08:00:27:01:02:04'><Time issued='1' expiration='2'/></Lease></Leases>"
        );
        assert_eq!(Leases::parse(&text).unwrap().all().len(), 1);
        assert_eq!(Leases::parse("<Else/>"), None);
        assert_eq!(Leases::parse("<Leases><Lease"), None);
    }
}
