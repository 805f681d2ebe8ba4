//! The split virtqueue (section 2.7): a table of descriptors, a ring of chains that the driver makes available, and a ring of
//! those that the device has used.

use std::sync::atomic::{Ordering, fence};

use pgm::Pgm;
use ssm::{Error, Reader, Writer};
use vbox_types::GuestPhys;

/// Most descriptors that one chain may have, tables of indirect ones included.
const MAX_CHAIN: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// In the available ring's flags: no interrupts, please.
const NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: no notifications, please.
const NO_NOTIFY: u16 = 1;

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub address: u64,
    pub len: u32,
}

/// A chain that the driver has made available: what the device reads, then what it writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Index of the first descriptor, by which the chain is given back.
    pub head: u16,
    pub readable: Vec<Region>,
    pub writable: Vec<Region>,
}

impl Chain {
    fn total(regions: &[Region]) -> usize {
        regions.iter().fold(0usize, |sum, r| sum.saturating_add(r.len as usize))
    }

    /// Bytes that the device reads.
    pub fn readable_len(&self) -> usize {
        Self::total(&self.readable)
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        Self::total(&self.writable)
    }

    /// Appends all that the device reads from `skip` bytes on to `out`, at most `limit` bytes; false if there is more.
    pub fn gather(&self, memory: &Pgm, skip: usize, limit: usize, out: &mut Vec<u8>) -> bool {
        let mut skip = skip;
        for region in &self.readable {
            let len = region.len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = len - skip;
            let start = out.len();
            if take > limit.saturating_sub(start) {
                return false;
            }
            out.resize(start + take, 0);
            memory.read(GuestPhys(region.address.wrapping_add(skip as u64)), &mut out[start..]);
            skip = 0;
        }
        true
    }

    /// Copies what the device reads from `skip` bytes on into `out`. Returns how many bytes there were.
    pub fn fill(&self, memory: &Pgm, skip: usize, out: &mut [u8]) -> usize {
        let (mut skip, mut done) = (skip, 0);
        for region in &self.readable {
            let len = region.len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = (len - skip).min(out.len() - done);
            memory.read(GuestPhys(region.address.wrapping_add(skip as u64)), &mut out[done..done + take]);
            done += take;
            skip = 0;
            if done == out.len() {
                break;
            }
        }
        done
    }

    /// Copies `data` into what the device writes, from `skip` bytes on. Returns how many bytes found room.
    pub fn scatter(&self, memory: &Pgm, skip: usize, data: &[u8]) -> usize {
        let (mut skip, mut done) = (skip, 0);
        for region in &self.writable {
            let len = region.len as usize;
            if skip >= len {
                skip -= len;
                continue;
            }
            let take = (len - skip).min(data.len() - done);
            memory.write(GuestPhys(region.address.wrapping_add(skip as u64)), &data[done..done + take]);
            done += take;
            skip = 0;
            if done == data.len() {
                break;
            }
        }
        done
    }
}

/// One queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    max_size: u16,
    /// A power of two, at most `max_size`.
    pub(crate) size: u16,
    pub(crate) ready: bool,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// Counts chains taken and given back, as the rings' indexes do.
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was told last.
    told: u16,
    pub(crate) event_index: bool,
    /// The guest made something of it that is no queue.
    broken: bool,
}

impl Queue {
    pub(crate) fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, ..Self::default() }
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// Where legacy drivers have everything: at one page, behind one another.
    pub(crate) fn set_legacy_page(&mut self, page: u32) {
        let base = u64::from(page) << 12;
        let size = u64::from(self.size);
        self.descriptors = base;
        self.available = base + 16 * size;
        self.used = (self.available + 4 + 2 * size + 2).next_multiple_of(4096);
        self.ready = page != 0;
    }

    pub(crate) fn legacy_page(&self) -> u32 {
        if self.ready { (self.descriptors >> 12) as u32 } else { 0 }
    }

    pub(crate) fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Takes the driver's size, if it is one.
    pub(crate) fn set_size(&mut self, size: u16) {
        if size.is_power_of_two() && size <= self.max_size {
            self.size = size;
        }
    }

    /// Whether the driver has set the queue up and it still makes sense.
    pub fn is_usable(&self) -> bool {
        self.ready && !self.broken
    }

    pub fn is_broken(&self) -> bool {
        self.broken
    }

    fn read_u16(memory: &Pgm, address: u64) -> u16 {
        let mut bytes = [0; 2];
        memory.read(GuestPhys(address), &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn write_u16(memory: &Pgm, address: u64, value: u16) {
        memory.write(GuestPhys(address), &value.to_le_bytes());
    }

    /// Number of chains that the driver has made available and the device has not taken.
    pub fn waiting(&mut self, memory: &Pgm) -> u16 {
        let index = Self::read_u16(memory, self.available.wrapping_add(2));
        // What the index covers was written before it.
        fence(Ordering::SeqCst);
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.size {
            self.broken = true;
            return 0;
        }
        waiting
    }

    /// Whether a chain is available.
    pub fn has_chain(&mut self, memory: &Pgm) -> bool {
        self.is_usable() && self.waiting(memory) > 0
    }

    /// Takes the next chain.
    pub fn pop(&mut self, memory: &Pgm) -> Option<Chain> {
        if !self.has_chain(memory) {
            return None;
        }
        let slot = u64::from(self.next_available & (self.size - 1));
        let head = Self::read_u16(memory, self.available.wrapping_add(4 + 2 * slot));
        let chain = self.walk(memory, head);
        if chain.is_none() {
            self.broken = true;
        }
        self.next_available = self.next_available.wrapping_add(1);
        chain
    }

    /// Puts the chain that was taken last back, as if it had never been taken.
    pub fn undo_pop(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    fn walk(&self, memory: &Pgm, head: u16) -> Option<Chain> {
        let mut chain = Chain { head, ..Chain::default() };
        let (mut table, mut count, mut index) = (self.descriptors, u32::from(self.size), u32::from(head));
        let mut indirect = false;
        let mut seen = 0;
        loop {
            if index >= count || seen >= MAX_CHAIN {
                return None;
            }
            seen += 1;
            let mut bytes = [0; 16];
            memory.read(GuestPhys(table.wrapping_add(16 * u64::from(index))), &mut bytes);
            let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
            let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            let len = u32::from_le_bytes([l0, l1, l2, l3]);
            let flags = u16::from_le_bytes([f0, f1]);
            if flags & INDIRECT != 0 {
                // One table, which ends the chain, and none inside it.
                if indirect || flags & NEXT != 0 || len == 0 || len % 16 != 0 {
                    return None;
                }
                (table, count, index, indirect) = (address, len / 16, 0, true);
                continue;
            }
            let region = Region { address, len };
            if flags & WRITE != 0 {
                chain.writable.push(region);
            } else if chain.writable.is_empty() {
                chain.readable.push(region);
            } else {
                // What the device reads comes first.
                return None;
            }
            if flags & NEXT == 0 {
                return Some(chain);
            }
            index = u16::from_le_bytes([n0, n1]).into();
        }
    }

    /// Gives a chain back, of which the device has written `len` bytes. The driver sees it with the next [`Self::publish`].
    pub fn push(&mut self, memory: &Pgm, head: u16, len: u32) {
        if !self.is_usable() {
            return;
        }
        let slot = u64::from(self.next_used & (self.size - 1));
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        entry[4..].copy_from_slice(&len.to_le_bytes());
        memory.write(GuestPhys(self.used.wrapping_add(4 + 8 * slot)), &entry);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Lets the driver see what was given back; whether it wants an interrupt for it.
    #[must_use]
    pub fn publish(&mut self, memory: &Pgm) -> bool {
        if !self.is_usable() || self.told == self.next_used {
            return false;
        }
        fence(Ordering::SeqCst);
        Self::write_u16(memory, self.used.wrapping_add(2), self.next_used);
        // The driver may ask for an interrupt and then look for more once; one of the two has to see the other.
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.next_used);
        self.told = new;
        if self.event_index {
            let event = Self::read_u16(memory, self.available.wrapping_add(4 + 2 * u64::from(self.size)));
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        Self::read_u16(memory, self.available) & NO_INTERRUPT == 0
    }

    /// Tells the driver whether to notify of further chains. After switching it on, look for chains once more.
    pub fn want_notifications(&mut self, memory: &Pgm, on: bool) {
        if !self.is_usable() {
            return;
        }
        if self.event_index {
            // On: with the next chain, whether or not some wait already. Off: an index that comes around after all others.
            let event = match on {
                true => Self::read_u16(memory, self.available.wrapping_add(2)),
                false => self.next_available.wrapping_sub(1),
            };
            Self::write_u16(memory, self.used.wrapping_add(4 + 8 * u64::from(self.size)), event);
        } else {
            Self::write_u16(memory, self.used, if on { 0 } else { NO_NOTIFY });
        }
        fence(Ordering::SeqCst);
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let Self {
            max_size,
            size,
            ready,
            descriptors,
            available,
            used,
            next_available,
            next_used,
            told,
            event_index,
            broken,
        } = self;
        [*max_size, *size, *next_available, *next_used, *told].into_iter().for_each(|v| out.put_u16(v));
        [*ready, *event_index, *broken].into_iter().for_each(|v| out.put_bool(v));
        [*descriptors, *available, *used].into_iter().for_each(|v| out.put_u64(v));
    }

    pub(crate) fn load(&self, input: &mut Reader<'_>) -> Result<Self, Error> {
        let max_size = input.take_u16()?;
        let size = input.take_u16()?;
        if max_size != self.max_size || !size.is_power_of_two() || size > max_size {
            return Err(input.invalid(format!("a queue has {size} entries of at most {max_size}")));
        }
        Ok(Self {
            max_size,
            size,
            next_available: input.take_u16()?,
            next_used: input.take_u16()?,
            told: input.take_u16()?,
            ready: input.take_bool()?,
            event_index: input.take_bool()?,
            broken: input.take_bool()?,
            descriptors: input.take_u64()?,
            available: input.take_u64()?,
            used: input.take_u64()?,
        })
    }
}
