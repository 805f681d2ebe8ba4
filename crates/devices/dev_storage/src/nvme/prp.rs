//! Physical region pages: where in guest memory a command's data lies (section 4.3).

use pgm::Pgm;
use vbox_types::GuestPhys;

/// A piece of guest memory.
pub(super) type Region = (GuestPhys, usize);

/// An entry that does not begin where it has to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadOffset;

/// The memory that two entries describe for `len` bytes, with pages of `page` bytes. The second entry is a page if one is enough for
/// the rest, else a list; each list's last entry leads to the next list.
pub(super) fn walk(pgm: &Pgm, prp1: u64, prp2: u64, len: usize, page: u64) -> Result<Vec<Region>, BadOffset> {
    let mut regions = Vec::new();
    if len == 0 {
        return Ok(regions);
    }
    if prp1 & 3 != 0 {
        return Err(BadOffset);
    }
    let first = ((page - prp1 % page) as usize).min(len);
    regions.push((GuestPhys(prp1), first));
    let mut left = len - first;
    if left == 0 {
        return Ok(regions);
    }
    if left <= page as usize {
        if !prp2.is_multiple_of(page) {
            return Err(BadOffset);
        }
        regions.push((GuestPhys(prp2), left));
        return Ok(regions);
    }
    if prp2 & 7 != 0 {
        return Err(BadOffset);
    }
    let mut at = prp2;
    // A list of one entry leads nowhere but to the next: only so many of them make sense.
    let mut steps = 2 * (left / page as usize) + 16;
    while left > 0 {
        steps = steps.checked_sub(1).ok_or(BadOffset)?;
        let mut raw = [0; 8];
        pgm.read(GuestPhys(at), &mut raw);
        let entry = u64::from_le_bytes(raw);
        let last_of_list = at % page == page - 8;
        if last_of_list && left > page as usize {
            if entry & 7 != 0 {
                return Err(BadOffset);
            }
            at = entry;
            continue;
        }
        if !entry.is_multiple_of(page) {
            return Err(BadOffset);
        }
        let take = left.min(page as usize);
        regions.push((GuestPhys(entry), take));
        left -= take;
        at = at.wrapping_add(8);
    }
    Ok(regions)
}

/// Copies what the regions hold.
pub(super) fn gather(pgm: &Pgm, regions: &[Region]) -> Vec<u8> {
    let mut data = vec![0; regions.iter().map(|r| r.1).sum()];
    let mut rest = &mut data[..];
    for &(at, len) in regions {
        let (head, tail) = rest.split_at_mut(len);
        pgm.read(at, head);
        rest = tail;
    }
    data
}

/// Fills the regions with `data`, as far as it goes.
pub(super) fn scatter(pgm: &Pgm, regions: &[Region], data: &[u8]) {
    let mut rest = data;
    for &(at, len) in regions {
        let (head, tail) = rest.split_at(len.min(rest.len()));
        pgm.write(at, head);
        rest = tail;
    }
}
