//! Reference counts of QCOW2 clusters: a table of blocks of counters. Counters are changed in memory and written by a flush.

use std::collections::BTreeMap;
use std::io;

use super::header::Header;
use crate::file::FileIo;
use crate::two_level::{Order, invalid};

/// Most words of a refcount table: QEMU's limit of 8 MiB.
const MAX_WORDS: u64 = 1 << 20;
const OFFSET: u64 = !0x1ff;

struct Block {
    bytes: Vec<u8>,
    dirty: bool,
}

pub(super) struct Refcounts {
    cluster_bits: u32,
    order: u32,
    table: Vec<u64>,
    /// Where the table lies, and whether the file has it as it is here.
    at: u64,
    moved: bool,
    dirty: bool,
    blocks: BTreeMap<usize, Block>,
}

impl Refcounts {
    pub(super) fn open(file: &dyn FileIo, header: &Header) -> io::Result<Self> {
        let mut bytes = vec![0; (header.refcounts_len << header.cluster_bits) as usize];
        file.read_at(header.refcounts, &mut bytes)?;
        Ok(Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table: Order::Big.words(&bytes).collect(),
            at: header.refcounts,
            moved: false,
            dirty: false,
            blocks: BTreeMap::new(),
        })
    }

    /// An empty table that is to be written at `at`.
    pub(super) fn new(header: &Header, at: u64, clusters: u64) -> Self {
        let words = (clusters << header.cluster_bits) / 8;
        Self {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            table: vec![0; words as usize],
            at,
            moved: true,
            dirty: true,
            blocks: BTreeMap::new(),
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Counters in a block.
    fn counters(&self) -> u64 {
        (self.cluster() * 8) >> self.order
    }

    /// Adds `change` to the counter of each cluster in `clusters`. New blocks, and a larger table, take clusters from `end` on.
    pub(super) fn add(
        &mut self,
        file: &dyn FileIo,
        clusters: std::ops::Range<u64>,
        change: i64,
        end: &mut u64,
    ) -> io::Result<()> {
        for number in clusters {
            let index = (number / self.counters()) as usize;
            self.load(file, index, end)?;
            let (order, within) = (self.order, number % self.counters());
            if let Some(block) = self.blocks.get_mut(&index) {
                let old = counter(&block.bytes, order, within);
                let most = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
                let new = old.saturating_add_signed(change).min(most);
                set_counter(&mut block.bytes, order, within, new);
                block.dirty = true;
            }
        }
        Ok(())
    }

    /// Reads the block, or makes a new one.
    fn load(&mut self, file: &dyn FileIo, index: usize, end: &mut u64) -> io::Result<()> {
        if self.blocks.contains_key(&index) {
            return Ok(());
        }
        if index >= self.table.len() {
            // Half as much again, so that it does not happen often.
            let words = (index as u64 + 1) * 3 / 2;
            if words > MAX_WORDS {
                return Err(invalid(format!(
                    "a refcount table of {words} words, where {MAX_WORDS} are the limit"
                )));
            }
            let clusters = (words * 8).div_ceil(self.cluster());
            self.at = *end;
            *end += clusters * self.cluster();
            self.table.resize((clusters * self.cluster() / 8) as usize, 0);
            (self.moved, self.dirty) = (true, true);
        }
        let mut bytes = vec![0; self.cluster() as usize];
        let at = self.table[index] & OFFSET;
        let new = at == 0;
        if new {
            self.table[index] = *end;
            *end += self.cluster();
            self.dirty = true;
        } else {
            if !at.is_multiple_of(self.cluster()) || at >= file.len()? {
                return Err(invalid(format!("the refcount block at 0x{at:x} lies outside the file")));
            }
            file.read_at(at, &mut bytes)?;
        }
        self.blocks.insert(index, Block { bytes, dirty: new });
        Ok(())
    }

    /// Writes what has changed, the table last. If the table has moved, the header has to be told: offset and clusters.
    pub(super) fn write(&mut self, file: &dyn FileIo) -> io::Result<Option<(u64, u32)>> {
        for (index, block) in &mut self.blocks {
            if block.dirty {
                file.write_at(self.table[*index] & OFFSET, &block.bytes)?;
                block.dirty = false;
            }
        }
        // The last blocks are those that go on changing.
        while self.blocks.len() > 64 {
            self.blocks.pop_first();
        }
        if self.dirty {
            let bytes: Vec<u8> = self.table.iter().flat_map(|w| w.to_be_bytes()).collect();
            file.write_at(self.at, &bytes)?;
            self.dirty = false;
        }
        if !std::mem::take(&mut self.moved) {
            return Ok(None);
        }
        let clusters = (self.table.len() as u64 * 8) >> self.cluster_bits;
        Ok(Some((self.at, u32::try_from(clusters).map_err(io::Error::other)?)))
    }
}

/// Counters of less than a byte start at the lowest bit; longer ones are big endian.
fn counter(bytes: &[u8], order: u32, index: u64) -> u64 {
    if order < 3 {
        let bit = index << order;
        let byte = bytes.get((bit / 8) as usize).copied().unwrap_or(0);
        return u64::from(byte >> (bit % 8)) & ((1 << (1 << order)) - 1);
    }
    let len = 1usize << (order - 3);
    let start = index as usize * len;
    bytes.get(start..start + len).unwrap_or_default().iter().fold(0, |sum, &b| sum << 8 | u64::from(b))
}

fn set_counter(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = ((1u16 << (1 << order)) - 1) as u8;
        if let Some(byte) = bytes.get_mut((bit / 8) as usize) {
            *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
        }
        return;
    }
    let len = 1usize << (order - 3);
    let start = index as usize * len;
    if let Some(place) = bytes.get_mut(start..start + len) {
        place.copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_every_width_keep_to_their_place() {
        for order in 0..=6 {
            let mut bytes = vec![0; 64];
            let most = if order == 6 { u64::MAX } else { (1u64 << (1 << order)) - 1 };
            set_counter(&mut bytes, order, 5, most);
            set_counter(&mut bytes, order, 6, 1);
            let read: Vec<u64> = (4..8).map(|i| counter(&bytes, order, i)).collect();
            assert_eq!(read, [0, most, 1, 0], "2^{order} bits");
        }
        let mut bytes = vec![0; 4];
        set_counter(&mut bytes, 4, 1, 0x102);
        assert_eq!(bytes, [0, 0, 1, 2]);
    }

    #[test]
    fn a_table_beyond_the_limit_is_refused_before_memory_is_taken() {
        let mut counts = Refcounts {
            cluster_bits: 9,
            order: 6,
            table: vec![0; 64],
            at: 512,
            moved: false,
            dirty: false,
            blocks: BTreeMap::new(),
        };
        let mut end = 1 << 20;
        // 64 counters in each block: the first cluster that only a table of more than 8 MiB would count.
        let far = MAX_WORDS * 64;
        let refused = counts.add(&crate::file::MemoryFile::new(&[]), far..far + 1, 1, &mut end);
        assert!(refused.is_err_and(|e| e.to_string().contains("refcount table")));
        assert_eq!((counts.table.len(), end), (64, 1 << 20));
        counts.add(&crate::file::MemoryFile::new(&[]), 100..101, 1, &mut end).unwrap();
    }
}
