//! Lists of pieces of guest memory that a command's data go to or come from.

use pgm::Pgm;
use vbox_types::GuestPhys;

/// Guest memory in pieces, taken for one run of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SgList {
    /// Addresses and lengths.
    pieces: Vec<(u64, u32)>,
    len: u64,
}

impl SgList {
    pub(crate) fn push(&mut self, address: u64, len: u32) {
        if len > 0 {
            self.pieces.push((address, len));
            self.len += u64::from(len);
        }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Leaves out all beyond `len` bytes.
    pub(crate) fn truncate(&mut self, len: u64) {
        while self.len > len {
            let over = self.len - len;
            let Some((_, last)) = self.pieces.last_mut() else { return };
            let cut = over.min(u64::from(*last));
            *last -= cut as u32;
            self.len -= cut;
            if *last == 0 {
                self.pieces.pop();
            }
        }
    }

    /// Calls `each` with the pieces of `count` bytes from `at` on: guest address, and range in those bytes. Returns how many bytes
    /// there were.
    fn walk(&self, at: u64, count: usize, mut each: impl FnMut(GuestPhys, std::ops::Range<usize>)) -> usize {
        let (mut skip, mut done) = (at, 0);
        for &(address, len) in &self.pieces {
            if done == count {
                break;
            }
            if skip >= u64::from(len) {
                skip -= u64::from(len);
                continue;
            }
            let take = ((u64::from(len) - skip) as usize).min(count - done);
            each(GuestPhys(address.wrapping_add(skip)), done..done + take);
            done += take;
            skip = 0;
        }
        done
    }

    /// Reads from `at` bytes on; returns how many bytes there were.
    pub(crate) fn read(&self, memory: &Pgm, at: u64, out: &mut [u8]) -> usize {
        self.walk(at, out.len(), |address, range| memory.read(address, &mut out[range]))
    }

    /// Writes from `at` bytes on; returns how many bytes found room.
    pub(crate) fn write(&self, memory: &Pgm, at: u64, data: &[u8]) -> usize {
        self.walk(at, data.len(), |address, range| memory.write(address, &data[range]))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgm::{Backing, HostMemory, Layer};
    use vbox_types::ByteSize;

    use super::*;

    fn memory() -> Arc<Pgm> {
        let pgm = Pgm::new(vec![]);
        let ram = Arc::new(HostMemory::new("ram", ByteSize(0x1000)).unwrap());
        pgm.map(GuestPhys(0), 0x1000, Layer::Ram, Backing::ram(ram, 0));
        pgm
    }

    #[test]
    fn data_cross_pieces_and_end_with_them() {
        let pgm = memory();
        let mut list = SgList::default();
        list.push(0x100, 3);
        list.push(0x900, 0);
        list.push(0x200, 5);
        assert_eq!((list.len(), list.pieces.len()), (8, 2));
        assert_eq!(list.write(&pgm, 2, &[1, 2, 3, 4, 5, 6, 7]), 6);
        let mut out = [0; 8];
        assert_eq!(list.read(&pgm, 0, &mut out), 8);
        assert_eq!(out, [0, 0, 1, 2, 3, 4, 5, 6]);
        let mut byte = [0];
        pgm.read(GuestPhys(0x200), &mut byte);
        assert_eq!(byte, [2]);
    }

    #[test]
    fn a_list_is_cut_in_the_middle_of_a_piece() {
        let mut list = SgList::default();
        list.push(0, 4);
        list.push(0x100, 4);
        list.truncate(3);
        assert_eq!((list.len(), list.pieces.len()), (3, 1));
    }
}
