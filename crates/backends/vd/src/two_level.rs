//! Maps of two levels, as QCOW, QCOW2 and QED have them: a first table names second tables, each of which names clusters.
//! Second tables are read when they are first needed and kept.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::file::FileIo;

/// Byte order of the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Big,
    Little,
}

impl Order {
    pub(crate) fn words(self, bytes: &[u8]) -> impl Iterator<Item = u64> {
        bytes.chunks_exact(8).map(move |w| {
            let word = [w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]];
            match self {
                Self::Big => u64::from_be_bytes(word),
                Self::Little => u64::from_le_bytes(word),
            }
        })
    }
}

/// The words of a second table.
pub(crate) type Table = Box<[AtomicU64]>;

pub(crate) struct TwoLevel {
    order: Order,
    /// Words in a second table.
    entries: u64,
    /// Bits of a word of the first table that are an offset.
    mask: u64,
    first: Box<[AtomicU64]>,
    second: Box<[OnceLock<Table>]>,
}

impl TwoLevel {
    pub(crate) fn new(order: Order, entries: u64, mask: u64, first: impl Iterator<Item = u64>) -> Self {
        let first: Box<[AtomicU64]> = first.map(AtomicU64::new).collect();
        let second = first.iter().map(|_| OnceLock::new()).collect();
        Self { order, entries, mask, first, second }
    }

    /// Words in a second table.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Second tables there may be.
    pub(crate) fn len(&self) -> usize {
        self.first.len()
    }

    /// The word of the first table.
    pub(crate) fn first(&self, index: usize) -> u64 {
        self.first.get(index).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Where the second table lies.
    pub(crate) fn offset(&self, index: usize) -> u64 {
        self.first(index) & self.mask
    }

    pub(crate) fn set_first(&self, index: usize, word: u64) {
        if let Some(slot) = self.first.get(index) {
            slot.store(word, Ordering::Release);
        }
    }

    /// The second table number `index`, which is read if need be; `None` if there is none.
    pub(crate) fn table(&self, file: &dyn FileIo, index: usize) -> io::Result<Option<&Table>> {
        let Some(slot) = self.second.get(index) else { return Ok(None) };
        if let Some(table) = slot.get() {
            return Ok(Some(table));
        }
        let at = self.offset(index);
        if at == 0 {
            return Ok(None);
        }
        let len = self.entries * 8;
        if at.checked_add(len).is_none_or(|end| end > file.len().unwrap_or(0).next_multiple_of(4096)) {
            return Err(invalid(format!("table {index} at 0x{at:x} lies past the file's end")));
        }
        let mut bytes = vec![0; len as usize];
        file.read_at(at, &mut bytes)?;
        let table: Table = self.order.words(&bytes).map(AtomicU64::new).collect();
        Ok(Some(slot.get_or_init(|| table)))
    }

    /// Adds an empty second table; the one that is there if there is one.
    pub(crate) fn add(&self, index: usize) -> io::Result<&Table> {
        let slot = self.second.get(index).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(slot.get_or_init(|| (0..self.entries).map(|_| AtomicU64::new(0)).collect()))
    }

    /// The word for cluster number `cluster`, with the number of words behind it in its table. Without a table the word is 0.
    pub(crate) fn word(&self, file: &dyn FileIo, cluster: u64) -> io::Result<(u64, u64)> {
        let within = cluster % self.entries;
        let rest = self.entries - within;
        let index = usize::try_from(cluster / self.entries).map_err(io::Error::other)?;
        match self.table(file, index)? {
            Some(table) => Ok((table[within as usize].load(Ordering::Acquire), rest)),
            None => Ok((0, rest)),
        }
    }
}

pub(crate) fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
