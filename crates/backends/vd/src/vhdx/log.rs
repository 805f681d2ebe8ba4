//! The log: updates of metadata that a writer that ended early had made durable, but perhaps not carried out.
//!
//! Entries start at multiples of 4 KiB in a ring: signature "loge", checksum (4), length (8), tail (12), sequence number (16),
//! descriptors (24), log GUID (32), least file lengths (48, 56). From 64 on descriptors of 32 bytes: "zero", length (8), file offset (16),
//! sequence number (24); or "desc", last four bytes (4), first eight bytes (8), file offset (16), sequence number (24), with a
//! sector "data", sequence number's upper half (4), 4084 bytes (8), lower half, after all descriptors.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::crc32c::crc32c;
use crate::file::FileIo;
use crate::format::sums_agree;
use crate::two_level::invalid;

const SECTOR: u64 = 4096;
/// Largest log that is read.
pub(super) const MAX_LOG: u64 = 64 << 20;

pub(super) struct Log {
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) guid: [u8; 16],
}

struct Entry {
    at: u64,
    len: u64,
    tail: u64,
    sequence: u64,
    bytes: Vec<u8>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Log {
    /// Reads from the ring.
    fn read(&self, ring: &[u8], at: u64, len: u64) -> Vec<u8> {
        let (start, len) = ((at % self.len) as usize, len as usize);
        let first = len.min(ring.len() - start);
        let mut out = ring[start..start + first].to_vec();
        out.extend_from_slice(&ring[..len - first]);
        out
    }

    /// The valid entry at `at`. `budget` is how many more bytes are looked at for it and for others.
    fn entry(&self, ring: &[u8], at: u64, budget: &mut u64) -> Option<Entry> {
        let head = self.read(ring, at, 64);
        let len = u64::from(u32_at(&head, 8));
        if !head.starts_with(b"loge")
            || head[32..48] != self.guid
            || len < SECTOR
            || len > self.len
            || !len.is_multiple_of(SECTOR)
        {
            return None;
        }
        *budget = budget.checked_sub(len)?;
        let bytes = self.read(ring, at, len);
        let tail = u64::from(u32_at(&bytes, 12));
        let descriptors = u64::from(u32_at(&bytes, 24));
        let sound = sums_agree(u32_at(&bytes, 4), crc32c(&bytes, 4))
            && tail < self.len
            && tail.is_multiple_of(SECTOR)
            && 64 + 32 * descriptors <= len;
        sound.then(|| Entry { at, len, tail, sequence: u64_at(&bytes, 16), bytes })
    }

    /// The entries to be carried out: the sequence with the highest number that is whole.
    fn active(&self, ring: &[u8]) -> Vec<Entry> {
        let mut best: Vec<Entry> = Vec::new();
        // Entries do not overlap, and each is looked at twice at most. A hostile log could have a long bad one at every sector.
        let mut budget = 4 * self.len;
        let mut start = 0;
        while start < self.len {
            let mut run: Vec<Entry> = Vec::new();
            let (mut at, mut used) = (start, 0);
            while let Some(entry) = self.entry(ring, at % self.len, &mut budget) {
                used += entry.len;
                let follows = run.last().is_none_or(|last| entry.sequence == last.sequence.wrapping_add(1));
                if !follows || used > self.len {
                    break;
                }
                at += entry.len;
                run.push(entry);
            }
            let end = run.last().map_or(start + SECTOR, |_| at);
            if let Some(last) = run.last() {
                // Whole, if it reaches back to the tail that its last entry names.
                let from = run.iter().position(|entry| entry.at % self.len == last.tail);
                let newer = best.last().is_none_or(|b| b.sequence < last.sequence);
                if let (Some(from), true) = (from, newer) {
                    best = run.split_off(from);
                }
            }
            start = end.max(start + SECTOR);
        }
        best
    }

    /// What the log asks for: sectors of 4 KiB and ranges of zeros, and the least length of the file.
    pub(super) fn updates(&self, file: &dyn FileIo) -> io::Result<Updates> {
        let mut ring = vec![0; self.len as usize];
        file.read_at(self.at, &mut ring)?;
        let mut updates = Updates::default();
        let entries = self.active(&ring);
        if entries.is_empty() {
            return Err(invalid("the log holds no whole sequence of entries".into()));
        }
        let file_len = file.len()?;
        for entry in &entries {
            // Entries tell how long the file was when they were written.
            if u64_at(&entry.bytes, 48) > file_len {
                return Err(invalid("the file is shorter than its log says".into()));
            }
            updates.len = updates.len.max(u64_at(&entry.bytes, 56));
            updates.take(entry)?;
        }
        if updates.len > file_len.saturating_add(1 << 40) {
            return Err(invalid("the log asks for a file that is too long".into()));
        }
        let end = updates.len.max(file_len);
        if updates.sectors.last_key_value().is_some_and(|(at, _)| at.saturating_add(SECTOR) > end) {
            return Err(invalid("the log has a sector behind the end of the file".into()));
        }
        Ok(updates)
    }
}

/// What a log asks for.
#[derive(Default)]
pub(super) struct Updates {
    sectors: BTreeMap<u64, Vec<u8>>,
    zeros: Vec<Range<u64>>,
    len: u64,
}

impl Updates {
    fn take(&mut self, entry: &Entry) -> io::Result<()> {
        let bytes = &entry.bytes;
        let count = u32_at(bytes, 24) as usize;
        let mut data = (64 + 32 * count).next_multiple_of(SECTOR as usize);
        for descriptor in bytes[64..64 + 32 * count].chunks_exact(32) {
            let at = u64_at(descriptor, 16);
            if u64_at(descriptor, 24) != entry.sequence || !at.is_multiple_of(SECTOR) {
                return Err(invalid(format!("a bad descriptor in the log entry at 0x{:x}", entry.at)));
            }
            if descriptor.starts_with(b"zero") {
                let Some(end) = at.checked_add(u64_at(descriptor, 8)) else {
                    return Err(invalid("a log entry zeroes past all bounds".into()));
                };
                let covered: Vec<u64> = self.sectors.range(at..end).map(|(at, _)| *at).collect();
                for sector in covered {
                    self.sectors.remove(&sector);
                }
                self.zeros.push(at..end);
                continue;
            }
            let sector = bytes.get(data..data + SECTOR as usize);
            let Some(sector) = sector.filter(|s| descriptor.starts_with(b"desc") && s.starts_with(b"data"))
            else {
                return Err(invalid(format!("a bad sector in the log entry at 0x{:x}", entry.at)));
            };
            let sequence = u64::from(u32_at(sector, 4)) << 32 | u64::from(u32_at(sector, 4092));
            if sequence != entry.sequence {
                return Err(invalid(format!("an old sector in the log entry at 0x{:x}", entry.at)));
            }
            let mut content = descriptor[8..16].to_vec();
            content.extend_from_slice(&sector[8..4092]);
            content.extend_from_slice(&descriptor[4..8]);
            self.sectors.insert(at, content);
            data += SECTOR as usize;
        }
        Ok(())
    }

    /// Carries the updates out and makes them durable.
    pub(super) fn apply(&self, file: &dyn FileIo) -> io::Result<()> {
        if file.len()? < self.len {
            file.set_len(self.len)?;
        }
        let end = file.len()?;
        for range in &self.zeros {
            let stop = range.end.min(end);
            if range.start < stop {
                file.zero(range.start, stop - range.start)?;
            }
        }
        for (at, bytes) in &self.sectors {
            file.write_at(*at, bytes)?;
        }
        file.sync()
    }
}

/// A file seen as if the updates had been carried out, for reading an image that must not be written.
pub(super) struct Replayed<'a> {
    pub(super) file: &'a dyn FileIo,
    pub(super) updates: Updates,
}

impl FileIo for Replayed<'_> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.len()?.max(self.updates.len))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, out)?;
        let end = offset + out.len() as u64;
        let mut put = |at: u64, len: u64, bytes: Option<&[u8]>| {
            let (start, stop) = (at.max(offset), at.saturating_add(len).min(end));
            if start < stop {
                let target = &mut out[(start - offset) as usize..(stop - offset) as usize];
                match bytes {
                    Some(bytes) => {
                        target.copy_from_slice(&bytes[(start - at) as usize..(stop - at) as usize])
                    }
                    None => target.fill(0),
                }
            }
        };
        for range in &self.updates.zeros {
            put(range.start, range.end - range.start, None);
        }
        for (at, bytes) in self.updates.sectors.range(offset.saturating_sub(SECTOR)..end) {
            put(*at, SECTOR, Some(bytes));
        }
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::MemoryFile;

    const GUID: [u8; 16] = [3; 16];

    /// An entry with one sector of `fill` for file offset `at`.
    fn entry(sequence: u64, tail: u32, at: u64, fill: u8, len: u64) -> Vec<u8> {
        let mut out = vec![0; 8192];
        out[..4].copy_from_slice(b"loge");
        let put =
            |out: &mut Vec<u8>, at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(&mut out, 8, &8192u32.to_le_bytes());
        put(&mut out, 12, &tail.to_le_bytes());
        put(&mut out, 16, &sequence.to_le_bytes());
        put(&mut out, 24, &1u32.to_le_bytes());
        put(&mut out, 32, &GUID);
        put(&mut out, 48, &len.to_le_bytes());
        put(&mut out, 56, &len.to_le_bytes());
        put(&mut out, 64, b"desc");
        out[68..80].fill(fill);
        put(&mut out, 80, &at.to_le_bytes());
        put(&mut out, 88, &sequence.to_le_bytes());
        out[4096..].fill(fill);
        put(&mut out, 4096, b"data");
        put(&mut out, 4100, &((sequence >> 32) as u32).to_le_bytes());
        put(&mut out, 8188, &(sequence as u32).to_le_bytes());
        let sum = crc32c(&out, 4);
        put(&mut out, 4, &sum.to_le_bytes());
        out
    }

    fn ring(entries: &[(usize, Vec<u8>)]) -> MemoryFile {
        let mut bytes = vec![0xee; 65536 + 32768];
        for (at, entry) in entries {
            for (i, byte) in entry.iter().enumerate() {
                bytes[65536 + (at + i) % 32768] = *byte;
            }
        }
        MemoryFile::new(&bytes)
    }

    fn log() -> Log {
        Log { at: 65536, len: 32768, guid: GUID }
    }

    #[test]
    fn a_log_that_wraps_is_carried_out_in_order() {
        let len = 65536 + 32768;
        let file = ring(&[
            (0x6000, entry(7, 0x6000, 4096, 1, len)),
            (0, entry(8, 0x6000, 4096, 2, len)),
            // Older, of a sequence that has ended.
            (0x2000, entry(3, 0x2000, 8192, 9, len)),
        ]);
        let updates = log().updates(&file).unwrap();
        let mut seen = vec![0; 8192];
        let replayed = Replayed { file: &file, updates };
        replayed.read_at(4000, &mut seen).unwrap();
        assert!(seen[..96].iter().all(|&b| b == 0xee) && seen[4192..].iter().all(|&b| b == 0xee));
        assert!(seen[96..4192].iter().all(|&b| b == 2), "the last entry counts");
        replayed.updates.apply(&file).unwrap();
        let mut now = vec![0; 8192];
        file.read_at(4000, &mut now).unwrap();
        assert_eq!(now, seen);
    }

    #[test]
    fn hostile_entries_are_refused_before_they_cost_much() {
        let len = 65536 + 32768;
        assert!(log().updates(&ring(&[(0, entry(8, 0, len - 4096, 2, len))])).is_ok());
        assert!(log().updates(&ring(&[(0, entry(8, 0, len, 2, len))])).is_err(), "behind the end");
        // The numbers of entries may go round.
        let last = [(0, entry(u64::MAX, 0, 4096, 2, len)), (8192, entry(0, 0, 4096, 2, len))];
        assert!(log().updates(&ring(&last)).is_ok());
        // A head at every sector, each of an entry as long as the log.
        let mut bytes = vec![0; len as usize];
        for head in bytes[65536..].chunks_mut(4096) {
            head[..64].copy_from_slice(&entry(8, 0, 4096, 2, len)[..64]);
            head[8..12].copy_from_slice(&32768u32.to_le_bytes());
        }
        let mut budget = 4 * 32768;
        let log = log();
        let looked = (0..8).filter(|_| {
            let before = budget;
            assert!(log.entry(&bytes[65536..], 0, &mut budget).is_none());
            budget != before
        });
        assert_eq!(looked.count(), 4);
        assert!(log.updates(&MemoryFile::new(&bytes)).is_err());
    }

    #[test]
    fn a_sequence_without_its_start_or_with_a_torn_sector_is_none() {
        let len = 65536 + 32768;
        assert!(log().updates(&ring(&[(0, entry(8, 0x6000, 4096, 2, len))])).is_err());
        let mut torn = entry(8, 0, 4096, 2, len);
        torn[6000] = 9;
        assert!(log().updates(&ring(&[(0, torn)])).is_err());
        assert!(log().updates(&ring(&[(0, entry(8, 0, 4096, 2, len + 1))])).is_err(), "cut short");
    }
}
