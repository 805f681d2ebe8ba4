//! QCOW2 and QCOW images; VirtualBox calls both QCOW. See [`header`] for layout and source.
//!
//! **Order of writes.** New clusters are always taken from the end of the file. A flush makes data, new tables and the counters of all
//! new clusters durable first, and only then writes the words that name them: a power cut leaves at worst clusters that are counted and
//! not used, which cost space and nothing else. QCOW images have no counters.
//!
//! Images with internal snapshots are for reading. Encryption, external data files and extended tables are
//! refused by name. Compressed clusters are read, by deflate and by zstd. New images are of version 2 with clusters of 64 KiB.

mod header;
mod refcounts;
mod repair;

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};
use ruzstd::decoding::StreamingDecoder;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Allocation, Begin, Extent, Facts, Format, Layout, NewParent, Place};
use crate::two_level::{Order, TwoLevel, invalid};
use header::{CORRUPT, DIRTY, Header, MAGIC, OFFSET};
use refcounts::Refcounts;
pub(crate) use repair::repair;

/// Words of both tables: this is the only reference to the cluster. Version 1: it is compressed.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Version 3: the cluster reads as zeros.
const ZERO: u64 = 1;

const NEW_CLUSTER_BITS: u32 = 16;
/// Largest image that is made, so that the first table stays within what other implementations read.
const MAX_SIZE: u64 = 1 << 50;

pub(crate) struct Qcow {
    header: Header,
    tables: TwoLevel,
    /// File offset behind the last cluster.
    end: AtomicU64,
    alloc: Mutex<Alloc>,
    flush: Mutex<FlushState>,
    dirty: AtomicBool,
}

struct Alloc {
    /// Bytes of the file as far as it may hold something.
    file_len: u64,
    /// Up to here clusters have been counted.
    counted: u64,
    /// Numbers of clusters whose words in the file are old.
    pending: Vec<u64>,
    /// Numbers of second tables that the file does not have.
    new_tables: BTreeSet<usize>,
    /// Words of compressed clusters that are not used any more.
    released: Vec<u64>,
}

struct FlushState {
    refcounts: Option<Refcounts>,
    /// The host lost data it had accepted: nothing can be promised any more.
    failed: bool,
}

/// What a word of a second table means.
enum Word {
    Absent,
    /// Reads as zeros; there may be a cluster for it.
    Zero(u64),
    Packed,
    File(u64),
}

pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    Header::read(file, path).map(|header| header.facts())
}

/// Writes a new image into an empty file; `Ok(false)` if it would be too large.
pub(crate) fn create(
    file: &dyn FileIo,
    size: u64,
    backing: Option<(&NewParent, Format)>,
) -> io::Result<bool> {
    if size > MAX_SIZE {
        return Ok(false);
    }
    let cluster = 1u64 << NEW_CLUSTER_BITS;
    let first_entries = size.div_ceil(cluster * (cluster / 8));
    let first_clusters = (first_entries * 8).div_ceil(cluster);
    // Header, refcount table, refcount block, first table.
    let used = 3 + first_clusters;
    if used > cluster / 2 {
        return Ok(false);
    }
    let mut raw = vec![0; cluster as usize];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(4, &2u32.to_be_bytes());
    put(20, &NEW_CLUSTER_BITS.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &(first_entries as u32).to_be_bytes());
    put(40, &(3 * cluster).to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if let Some((parent, format)) = backing {
        // Extensions: the parent's format, then the end.
        let kind: &[u8] = match format {
            Format::Qcow => b"qcow2",
            Format::Vhd => b"vpc",
            Format::Vdi => b"vdi",
            Format::Vmdk => b"vmdk",
            Format::Vhdx => b"vhdx",
            Format::Parallels => b"parallels",
            Format::Qed => b"qed",
            Format::Dmg => b"dmg",
            Format::Raw | Format::Iscsi => b"raw",
        };
        put(72, &0xe279_2acau32.to_be_bytes());
        put(76, &(kind.len() as u32).to_be_bytes());
        put(80, kind);
        let name_at = 80 + kind.len().next_multiple_of(8) + 8;
        let name = parent.path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.len() > 1023 {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        put(8, &(name_at as u64).to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(name_at, name);
    }
    let mut block = vec![0; cluster as usize];
    for counter in block.chunks_exact_mut(2).take(used as usize) {
        counter.copy_from_slice(&1u16.to_be_bytes());
    }
    file.set_len(used * cluster)?;
    file.write_at(2 * cluster, &block)?;
    file.write_at(cluster, &(2 * cluster).to_be_bytes())?;
    // The signature comes last: a file that was not finished is no image.
    file.sync()?;
    file.write_at(0, &raw)?;
    file.sync()?;
    Ok(true)
}

fn load_tables(file: &dyn FileIo, header: &Header) -> io::Result<TwoLevel> {
    let mut first = vec![0; (header.first_entries * 8) as usize];
    file.read_at(header.first, &mut first)?;
    let mask = if header.version == 1 { u64::MAX } else { OFFSET };
    Ok(TwoLevel::new(Order::Big, header.second_entries, mask, Order::Big.words(&first)))
}

impl Qcow {
    /// Reads and checks header and first table. Counters that an unclean end has left wrong are computed anew if the image is to
    /// be written.
    pub(crate) fn open(file: &dyn FileIo, path: &Path, writable: bool) -> Result<Self, Error> {
        let host = |e| Error::host("read from", path, e);
        let mut header = Header::read(file, path)?;
        if writable && header.incompatible & DIRTY != 0 && header.snapshots == 0 {
            repair(file, path)?;
            header = Header::read(file, path)?;
        }
        let tables = load_tables(file, &header).map_err(host)?;
        let refcounts = match header.version {
            1 => None,
            _ => Some(Refcounts::open(file, &header).map_err(host)?),
        };
        let file_len = file.len().map_err(host)?;
        let end = file_len.next_multiple_of(header.cluster());
        let alloc = Alloc {
            file_len,
            counted: end,
            pending: Vec::new(),
            new_tables: BTreeSet::new(),
            released: Vec::new(),
        };
        Ok(Self {
            header,
            tables,
            end: AtomicU64::new(end),
            alloc: Mutex::new(alloc),
            flush: Mutex::new(FlushState { refcounts, failed: false }),
            dirty: AtomicBool::new(false),
        })
    }

    fn classify(&self, word: u64) -> io::Result<Word> {
        let end = self.end.load(Ordering::Acquire);
        let at = match self.header.version {
            1 if word & COPIED != 0 => return Ok(Word::Packed),
            1 => word,
            _ if word & COMPRESSED != 0 => return Ok(Word::Packed),
            _ => word & OFFSET,
        };
        if at >= end || !at.is_multiple_of(self.header.cluster()) && self.header.version > 1 {
            return Err(invalid(format!("a cluster at 0x{at:x} lies outside the file")));
        }
        Ok(match at {
            at if self.header.version == 3 && word & ZERO != 0 => Word::Zero(at),
            0 => Word::Absent,
            at => Word::File(at),
        })
    }

    /// File offset and length of the compressed cluster that the word names.
    fn packed_range(&self, word: u64) -> (u64, u64) {
        packed_range(&self.header, word)
    }

    /// Takes clusters for so many bytes.
    fn take(&self, bytes: u64) -> u64 {
        self.end.fetch_add(bytes.next_multiple_of(self.header.cluster()), Ordering::AcqRel)
    }

    /// The word for what lies at an offset, and nowhere else.
    fn word(&self, at: u64) -> u64 {
        if self.header.version == 1 { at } else { at | COPIED }
    }
}

/// Unpacks zstd frames until `out` is full: a cluster may be several.
fn unpack_zstd(mut packed: &[u8], mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        let mut frame = StreamingDecoder::new(&mut packed).map_err(io::Error::other)?;
        let mut had = false;
        while !out.is_empty() {
            match frame.read(out)? {
                0 => break,
                count => {
                    out = &mut out[count..];
                    had = true;
                }
            }
        }
        if !had {
            return Err(invalid("a compressed cluster ends early".into()));
        }
    }
    Ok(())
}

fn packed_range(header: &Header, word: u64) -> (u64, u64) {
    let bits = header.cluster_bits;
    if header.version == 1 {
        let shift = 63 - bits;
        return (word & ((1 << shift) - 1), word >> shift & (header.cluster() - 1));
    }
    let shift = 62 - (bits - 8);
    let at = word & ((1 << shift) - 1);
    let sectors = (word >> shift & ((1 << (bits - 8)) - 1)) + 1;
    (at, sectors * 512 - (at & 511))
}

/// A cluster behind the others that no word names yet, or one that was set aside for zeros. Holds the allocation lock.
struct NewCluster<'a> {
    image: &'a Qcow,
    alloc: MutexGuard<'a, Alloc>,
    number: u64,
    at: u64,
    /// The word it had.
    old: u64,
}

impl Allocation for NewCluster<'_> {
    fn start(&self) -> u64 {
        self.number << self.image.header.cluster_bits
    }

    fn len(&self) -> u64 {
        self.image.header.cluster()
    }

    fn file_offset(&self) -> u64 {
        self.at
    }

    fn commit(mut self: Box<Self>) {
        let end = self.at + self.len();
        self.image.end.fetch_max(end, Ordering::AcqRel);
        self.alloc.file_len = self.alloc.file_len.max(end);
        if self.image.header.version > 1 && self.old & COMPRESSED != 0 {
            let old = self.old;
            self.alloc.released.push(old);
        }
        let number = self.number;
        self.alloc.pending.push(number);
        let (index, within) = (number / self.image.tables.entries(), number % self.image.tables.entries());
        self.image.dirty.store(true, Ordering::Release);
        if let Ok(table) = self.image.tables.add(index as usize) {
            table[within as usize].store(self.image.word(self.at), Ordering::Release);
        }
    }
}

impl Layout for Qcow {
    fn facts(&self) -> Facts {
        self.header.facts()
    }

    fn map(&self, file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        let cluster = self.header.cluster();
        let number = offset >> self.header.cluster_bits;
        let (word, rest) = self.tables.word(file, number)?;
        let within = offset % cluster;
        let (place, whole) = match self.classify(word)? {
            Word::File(at) => (Place::File(at + within), cluster),
            Word::Zero(_) => (Place::Zero, cluster),
            Word::Packed => (Place::Packed { unit: word, skip: within }, cluster),
            // Without a table all of its range is absent.
            Word::Absent if self.tables.first((number / self.tables.entries()) as usize) == 0 => {
                (Place::Absent, rest * cluster)
            }
            Word::Absent => (Place::Absent, cluster),
        };
        Ok(Extent { place, len: len.min(whole - within) })
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, file: &dyn FileIo, offset: u64, _len: u64) -> io::Result<Begin<'_>> {
        let cluster = self.header.cluster();
        let number = offset >> self.header.cluster_bits;
        let mut alloc = self.alloc.lock();
        let (old, _) = self.tables.word(file, number)?;
        let reuse = match self.classify(old)? {
            Word::File(_) => return Ok(Begin::Mapped),
            Word::Zero(at) if at != 0 => Some(at),
            _ => None,
        };
        let index = (number / self.tables.entries()) as usize;
        if self.tables.table(file, index)?.is_none() {
            let at = self.take(self.tables.entries() * 8);
            self.tables.add(index)?;
            self.tables.set_first(index, self.word(at));
            alloc.new_tables.insert(index);
            self.dirty.store(true, Ordering::Release);
        }
        // Without a commit the next one takes the same place.
        let at = reuse.unwrap_or_else(|| self.end.load(Ordering::Acquire));
        if at < alloc.file_len {
            file.zero(at, cluster.min(alloc.file_len - at))?;
        }
        Ok(Begin::Allocated(Box::new(NewCluster { image: self, alloc, number, at, old })))
    }

    fn modified(&self, _file: &dyn FileIo) -> io::Result<()> {
        Ok(())
    }

    /// The unit's number is its word.
    fn unpack(&self, file: &dyn FileIo, unit: u64) -> io::Result<Vec<u8>> {
        let (at, len) = self.packed_range(unit);
        let file_len = file.len()?;
        if at >= file_len {
            return Err(invalid(format!("a compressed cluster at 0x{at:x} lies past the file's end")));
        }
        let mut packed = vec![0; len.min(file_len - at) as usize];
        file.read_at(at, &mut packed)?;
        let mut out = vec![0; self.header.cluster() as usize];
        // What follows the stream in the last sector belongs to others.
        if self.header.zstd {
            unpack_zstd(&packed, &mut out)?;
        } else {
            flate2::read::DeflateDecoder::new(&packed[..]).read_exact(&mut out)?;
        }
        Ok(out)
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        match &self.header {
            Header { snapshots: 1.., .. } => Some(
                "writing to a QCOW2 image with internal snapshots; clone it, or delete them with qemu-img",
            ),
            header if header.incompatible & CORRUPT != 0 => {
                Some("writing to a QCOW2 image that is marked as damaged; repair or clone it")
            }
            _ => None,
        }
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        let mut state = self.flush.lock();
        if state.failed {
            return Err(io::Error::other("an earlier flush failed"));
        }
        let result = self.write_out(file, &mut state);
        state.failed = result.is_err();
        result
    }

    fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }
}

impl Qcow {
    fn write_out(&self, file: &dyn FileIo, state: &mut FlushState) -> io::Result<()> {
        let mut refcounts = state.refcounts.as_mut();
        let mut alloc = self.alloc.lock();
        self.dirty.store(false, Ordering::Release);
        let mut pending = std::mem::take(&mut alloc.pending);
        let new_tables = std::mem::take(&mut alloc.new_tables);
        let released = std::mem::take(&mut alloc.released);
        if pending.is_empty() && new_tables.is_empty() {
            drop(alloc);
            return file.sync();
        }
        // Everything is as of now: what is committed from here on waits for the next flush.
        let bits = self.header.cluster_bits;
        let mut end = self.end.load(Ordering::Acquire);
        if let Some(refcounts) = &mut refcounts {
            while alloc.counted < end {
                let clusters = alloc.counted >> bits..end >> bits;
                alloc.counted = end;
                refcounts.add(file, clusters, 1, &mut end)?;
            }
        }
        self.end.store(end, Ordering::Release);
        alloc.file_len = alloc.file_len.max(end);
        let words = self.pending_words(file, &mut pending, &new_tables)?;
        for &index in &new_tables {
            if let Some(table) = self.tables.table(file, index)? {
                let bytes: Vec<u8> =
                    table.iter().flat_map(|w| w.load(Ordering::Acquire).to_be_bytes()).collect();
                file.write_at(self.tables.offset(index), &bytes)?;
            }
        }
        // Under the lock nobody writes behind the end, so this never cuts anything off.
        if file.len()? < end {
            file.set_len(end)?;
        }
        drop(alloc);
        let moved = refcounts.as_mut().map_or(Ok(None), |refcounts| refcounts.write(file))?;
        file.sync()?;
        if let Some((at, clusters)) = moved {
            let mut place = at.to_be_bytes().to_vec();
            place.extend_from_slice(&clusters.to_be_bytes());
            file.write_at(48, &place)?;
            file.sync()?;
        }
        for (at, bytes) in words {
            file.write_at(at, &bytes)?;
        }
        for index in new_tables {
            let word = self.tables.first(index).to_be_bytes();
            file.write_at(self.header.first + 8 * index as u64, &word)?;
        }
        file.sync()?;
        let Some(refcounts) = refcounts.filter(|_| !released.is_empty()) else { return Ok(()) };
        // Late, so that a cut leaves too high counts rather than too low ones.
        for word in &released {
            let (at, len) = self.packed_range(*word);
            let clusters = at >> bits..((at + len - 1) >> bits) + 1;
            let mut none = self.end.load(Ordering::Acquire);
            refcounts.add(file, clusters, -1, &mut none)?;
        }
        refcounts.write(file)?;
        Ok(())
    }

    /// Runs of words to be written into tables that the file has.
    fn pending_words(
        &self,
        file: &dyn FileIo,
        pending: &mut Vec<u64>,
        new_tables: &BTreeSet<usize>,
    ) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let entries = self.tables.entries();
        pending.retain(|number| !new_tables.contains(&((number / entries) as usize)));
        pending.sort_unstable();
        pending.dedup();
        let mut out = Vec::new();
        for run in pending.chunk_by(|a, b| a + 1 == *b && a / entries == b / entries) {
            let (index, within) = ((run[0] / entries) as usize, run[0] % entries);
            let Some(table) = self.tables.table(file, index)? else { continue };
            let words = &table[within as usize..within as usize + run.len()];
            let bytes = words.iter().flat_map(|w| w.load(Ordering::Acquire).to_be_bytes()).collect();
            out.push((self.tables.offset(index) + 8 * within, bytes));
        }
        Ok(out)
    }
}
