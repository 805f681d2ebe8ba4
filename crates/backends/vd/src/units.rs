//! Growing images in general: a map with one 32-bit word for each *unit* (block, grain) of the virtual disk, and units in the
//! file in the order in which they were first written. VDI, VMDK and VHD differ in what a word means and where the map
//! lies ([`UnitFormat`]); how units are found, allocated and made durable is the same and lives here.
//!
//! **Order of writes.** A new unit's content is written first. Its map word goes to the file with the next flush, after the data
//! have been made durable, and is made durable before the flush returns. So the map in the file never names a unit
//! that does not exist.
//!
//! Units never move while an image is open, so readers take no lock: a map word changes once, from "nowhere" to its place,
//! after the content is there. New units are filled by several threads at once; only taking the place for one is done one after
//! the other. A place whose unit was not filled after all stays unused until the image is compacted, unless it is the last one.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::file::FileIo;
use crate::format::{Allocation, Begin, Extent, Place, Step};
use crate::image::is_zero;

/// What a format's map words mean.
pub(crate) trait UnitFormat: Send + Sync {
    /// Bytes of the virtual disk that a word stands for.
    fn unit(&self) -> u64;

    /// Where the unit with this word lies; `File` gives the offset of its first byte.
    fn place(&self, word: u32) -> Place;

    /// The part of the file that the unit with this word takes, with whatever stands in front of its data.
    fn storage(&self, word: u32) -> Range<u64>;

    /// The word of a unit stored from file offset `end` on or a little later; `None` when the format has no more.
    fn word_from(&self, end: u64) -> Option<u32>;

    /// The word of a unit that is not in the image.
    fn free_word(&self) -> u32;

    /// The word of a unit that reads as zeros whatever is below; `None` if the format has none.
    fn zero_word(&self) -> Option<u32> {
        None
    }

    /// Bytes that stand behind the last unit.
    fn tail(&self) -> u64 {
        0
    }

    /// Writes what stands in front of a new unit's data.
    fn prepare(&self, _file: &dyn FileIo, _word: u32) -> io::Result<()> {
        Ok(())
    }

    /// Makes the map in the file take these words, from the one for unit number `first` on.
    fn write_words(&self, file: &dyn FileIo, first: u32, words: &[u32]) -> io::Result<()>;

    /// Writes what depends on where the units end, at file offset `end`: counts, footers. Runs before the map is written and made
    /// durable together with it.
    fn write_end(&self, _file: &dyn FileIo, _end: u64) -> io::Result<()> {
        Ok(())
    }
}

/// The units of an opened image.
pub(crate) struct Units<F> {
    format: F,
    /// Where units begin in the file.
    first: u64,
    map: Box<[AtomicU32]>,
    alloc: Mutex<Alloc>,
    /// A unit left `Alloc::filling`.
    filled: Condvar,
    flush: Mutex<FlushState>,
    dirty: AtomicBool,
}

struct Alloc {
    /// File offset behind the last unit, with those that are being filled.
    end: u64,
    /// Numbers of units that have a place and are being filled.
    filling: Vec<u32>,
    /// Length of the file as far as we wrote it.
    file_len: u64,
    /// Numbers of units whose map words are not in the file yet.
    pending: Vec<u32>,
}

#[derive(Default)]
struct FlushState {
    /// The host lost data it had accepted: nothing can be promised any more.
    failed: bool,
}

/// Why a map was refused: the number of a word, the word, and what is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MapFault {
    /// It names a place in front of the first unit or past the end of the file.
    Outside { unit: usize, at: u64 },
    /// It names what another word names, in part or whole.
    Shared { unit: usize, at: u64 },
}

impl<F: UnitFormat> Units<F> {
    /// Checks `words` against the file: units lie in `first..file_len`, apart from one another. The last unit may be cut
    /// short by the file's end; what is missing reads as zeros.
    pub(crate) fn open(format: F, words: Vec<u32>, first: u64, file_len: u64) -> Result<Self, MapFault> {
        let mut used: Vec<(u32, u32)> = Vec::new();
        for (unit, &word) in words.iter().enumerate() {
            if let Place::File(_) = format.place(word) {
                let storage = format.storage(word);
                if storage.start < first || storage.start >= file_len {
                    return Err(MapFault::Outside { unit, at: storage.start });
                }
                used.push((word, unit as u32));
            }
        }
        used.sort_unstable();
        for pair in used.windows(2) {
            let (before, after) = (format.storage(pair[0].0), format.storage(pair[1].0));
            if before.end > after.start {
                return Err(MapFault::Shared { unit: pair[0].1.max(pair[1].1) as usize, at: after.start });
            }
        }
        let end = used.last().map_or(first, |&(word, _)| format.storage(word).end);
        Ok(Self {
            format,
            first,
            map: words.into_iter().map(AtomicU32::new).collect(),
            alloc: Mutex::new(Alloc { end, filling: Vec::new(), file_len, pending: Vec::new() }),
            filled: Condvar::new(),
            flush: Mutex::default(),
            dirty: AtomicBool::new(false),
        })
    }

    /// File offset behind the last unit.
    pub(crate) fn end(&self) -> u64 {
        self.alloc.lock().end
    }

    /// New units go behind `end`: something else is stored there.
    pub(crate) fn keep_until(&self, end: u64) {
        let mut alloc = self.alloc.lock();
        alloc.end = alloc.end.max(end);
    }

    pub(crate) fn format(&self) -> &F {
        &self.format
    }

    fn word(&self, index: u64) -> Option<u32> {
        self.map.get(usize::try_from(index).ok()?).map(|word| word.load(Ordering::Acquire))
    }

    pub(crate) fn map(&self, offset: u64, len: u64) -> Extent {
        let size = self.format.unit();
        let (index, within) = (offset / size, offset % size);
        let mut have = size - within;
        let place = match self.word(index).map(|word| self.format.place(word)) {
            Some(Place::File(at)) => {
                // Units that follow one another in the file, too, are one stretch.
                let mut next = index + 1;
                while have < len
                    && let Some(word) = self.word(next)
                    && self.format.place(word) == Place::File(at + within + have)
                {
                    have += size;
                    next += 1;
                }
                Place::File(at + within)
            }
            Some(other) => other,
            None => Place::Absent,
        };
        Extent { place, len: len.min(have) }
    }

    pub(crate) fn begin(&self, file: &dyn FileIo, offset: u64) -> io::Result<Begin<'_>> {
        let unit = (offset / self.format.unit()) as u32;
        let mut alloc = self.alloc.lock();
        loop {
            match self.word(unit.into()).map(|word| self.format.place(word)) {
                Some(Place::File(_)) => return Ok(Begin::Mapped),
                None => return Err(io::ErrorKind::InvalidInput.into()),
                // Whoever fills it has it in a moment.
                _ if alloc.filling.contains(&unit) => self.filled.wait(&mut alloc),
                _ => break,
            }
        }
        let Some(word) = self.format.word_from(alloc.end) else {
            return Err(io::ErrorKind::StorageFull.into());
        };
        let Range { start, end } = self.format.storage(word);
        // Beyond the file's end there are zeros; its length follows with the flush.
        if alloc.file_len > start {
            // Left behind by a write that was not finished, or a footer that moves on.
            file.zero(start, alloc.file_len.min(end) - start)?;
        }
        alloc.file_len = alloc.file_len.max(end);
        let before = std::mem::replace(&mut alloc.end, end);
        alloc.filling.push(unit);
        drop(alloc);
        let new = NewUnit { units: self, unit, word, before, filled: false };
        self.format.prepare(file, word)?;
        Ok(Begin::Allocated(Box::new(new)))
    }

    pub(crate) fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        let mut state = self.flush.lock();
        if state.failed {
            return Err(io::Error::other("an earlier flush failed"));
        }
        let mut pending = {
            let mut alloc = self.alloc.lock();
            self.dirty.store(false, Ordering::Release);
            // Under the lock nobody takes a place behind the end; what is being written there is never longer.
            if !alloc.pending.is_empty() && file.len()? < alloc.end {
                file.set_len(alloc.end)?;
            }
            std::mem::take(&mut alloc.pending)
        };
        let result = file.sync().and_then(|()| {
            if pending.is_empty() {
                return Ok(());
            }
            self.finish(file)?;
            self.write_pending(file, &mut pending)?;
            file.sync()
        });
        state.failed = result.is_err();
        result
    }

    /// Writes what stands behind the units.
    fn finish(&self, file: &dyn FileIo) -> io::Result<()> {
        // Under the lock, so that no new unit is put where it is written.
        let mut alloc = self.alloc.lock();
        self.format.write_end(file, alloc.end)?;
        alloc.file_len = alloc.file_len.max(alloc.end + self.format.tail());
        Ok(())
    }

    fn write_pending(&self, file: &dyn FileIo, pending: &mut [u32]) -> io::Result<()> {
        pending.sort_unstable();
        for run in pending.chunk_by(|a, b| a + 1 == *b) {
            let words: Vec<u32> =
                run.iter().map(|&unit| self.map[unit as usize].load(Ordering::Acquire)).collect();
            self.format.write_words(file, run[0], &words)?;
        }
        Ok(())
    }

    /// See [`crate::format::Layout::compact`].
    pub(crate) fn compact(&self, file: &dyn FileIo, child: bool, step: Step<'_>) -> io::Result<()> {
        let stopped = || io::Error::from(io::ErrorKind::Interrupted);
        let total = self.map.len() as u64 * self.format.unit();
        let empty = if child { self.format.zero_word() } else { Some(self.format.free_word()) };
        let mut buffer = vec![0; self.format.unit() as usize];
        for (unit, word) in self.map.iter().enumerate() {
            // Reading takes the first half of the way.
            if !step(unit as u64 * self.format.unit() / 2, total) {
                return Err(stopped());
            }
            let Place::File(at) = self.format.place(word.load(Ordering::Acquire)) else { continue };
            let Some(empty) = empty else { break };
            let data = file.data(at, self.format.unit())?;
            if data.is_some() {
                file.read_at(at, &mut buffer)?;
            }
            if data.is_none() || is_zero(&buffer) {
                word.store(empty, Ordering::Release);
                self.alloc.lock().pending.push(unit as u32);
            }
        }
        // From here on nothing in the file names the places that are free.
        self.flush(file)?;
        let mut used: Vec<(Range<u64>, u32)> = Vec::new();
        for (unit, word) in self.map.iter().enumerate() {
            let word = word.load(Ordering::Acquire);
            if let Place::File(_) = self.format.place(word) {
                used.push((self.format.storage(word), unit as u32));
            }
        }
        used.sort_unstable_by_key(|(range, _)| range.start);
        let mut moves = self.moves(&used);
        let count = moves.len() as u64;
        for (done, (from, word, _)) in moves.iter().enumerate() {
            if !step(total / 2 + done as u64 * (total / 2) / count, total) {
                // Copies that nothing names yet do no harm.
                return Err(stopped());
            }
            let to = self.format.storage(*word).start;
            let mut at = from.start;
            while at < from.end {
                let len = (from.end - at).min(buffer.len() as u64) as usize;
                file.read_at(at, &mut buffer[..len])?;
                file.write_at(to + (at - from.start), &buffer[..len])?;
                at += len as u64;
            }
        }
        file.sync()?;
        moves.sort_unstable_by_key(|(_, _, unit)| *unit);
        for (_, word, unit) in &moves {
            self.map[*unit as usize].store(*word, Ordering::Release);
            self.format.write_words(file, *unit, &[*word])?;
        }
        file.sync()?;
        // Only now is what follows the new end free.
        let storages = self.map.iter().map(|word| word.load(Ordering::Acquire));
        let stored = storages.filter(|&word| matches!(self.format.place(word), Place::File(_)));
        let end = stored.map(|word| self.format.storage(word).end).max().unwrap_or(self.first);
        file.set_len(end + self.format.tail())?;
        self.format.write_end(file, end)?;
        self.alloc.lock().end = end;
        file.sync()
    }

    /// Which units go to which places so that the file ends earlier: storage now, new word, number.
    fn moves(&self, used: &[(Range<u64>, u32)]) -> Vec<(Range<u64>, u32, u32)> {
        let mut slots = Vec::with_capacity(used.len());
        let mut end = self.first;
        for _ in used {
            let Some(word) = self.format.word_from(end) else { return Vec::new() };
            let storage = self.format.storage(word);
            end = storage.end;
            slots.push((storage, word));
        }
        let (stay, go): (Vec<_>, Vec<_>) = used.iter().partition(|(range, _)| range.end <= end);
        let mut stay = stay.into_iter().peekable();
        let free = slots.into_iter().filter(|(slot, _)| {
            while stay.next_if(|(range, _)| range.end <= slot.start).is_some() {}
            stay.peek().is_none_or(|(range, _)| range.start >= slot.end)
        });
        // What stands across the new end is not a place to move to.
        let limit = go.first().map_or(end, |(range, _)| range.start);
        let free = free.filter(|(slot, _)| slot.end <= limit).map(|(_, word)| word);
        go.iter().rev().zip(free).map(|((range, unit), word)| (range.clone(), word, *unit)).collect()
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }
}

/// A unit that no map word names yet.
struct NewUnit<'a, F: UnitFormat> {
    units: &'a Units<F>,
    unit: u32,
    word: u32,
    /// Where the units ended without this one.
    before: u64,
    filled: bool,
}

impl<F: UnitFormat> Allocation for NewUnit<'_, F> {
    fn start(&self) -> u64 {
        u64::from(self.unit) * self.len()
    }

    fn len(&self) -> u64 {
        self.units.format.unit()
    }

    fn file_offset(&self) -> u64 {
        match self.units.format.place(self.word) {
            Place::File(at) => at,
            // `word_from` gives words of stored units.
            _ => self.units.format.storage(self.word).start,
        }
    }

    fn commit(mut self: Box<Self>) {
        self.filled = true;
    }
}

impl<F: UnitFormat> Drop for NewUnit<'_, F> {
    fn drop(&mut self) {
        let (units, unit) = (self.units, self.unit);
        let mut alloc = units.alloc.lock();
        if self.filled {
            alloc.pending.push(unit);
            units.dirty.store(true, Ordering::Release);
            units.map[unit as usize].store(self.word, Ordering::Release);
        } else if alloc.end == units.format.storage(self.word).end {
            alloc.end = self.before;
        }
        alloc.filling.retain(|&other| other != unit);
        drop(alloc);
        units.filled.notify_all();
    }
}

/// Little-endian words.
pub(crate) fn words_from(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect()
}

/// Words as little-endian bytes.
pub(crate) fn words_to(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}
