//! Computes the counters of a QCOW2 image anew, and mends words that name no cluster.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::header::{Header, OFFSET};
use super::refcounts::Refcounts;
use super::{COMPRESSED, COPIED, load_tables, packed_range};
use crate::error::Error;
use crate::file::FileIo;
use crate::two_level::TwoLevel;

/// Most clusters that are counted: memory of 512 MiB.
const MAX_CLUSTERS: u64 = 1 << 28;

/// Mends the image; returns how many words named no cluster, or one that another word had: those ranges are absent from now on.
pub(crate) fn repair(file: &dyn FileIo, path: &Path) -> Result<u64, Error> {
    let header = Header::read(file, path)?;
    if header.version == 1 {
        return Ok(0);
    }
    let unsupported = |what: &str| Error::Unsupported { path: path.to_owned(), what: what.to_owned() };
    if header.snapshots != 0 {
        return Err(unsupported("repairing a QCOW2 image with internal snapshots; use qemu-img check -r"));
    }
    let file_len = file.len().map_err(|e| Error::host("read from", path, e))?;
    if file_len >> header.cluster_bits > MAX_CLUSTERS {
        return Err(unsupported("repairing a QCOW2 image with so many clusters; use qemu-img check -r"));
    }
    mend(file, &header, file_len).map_err(|e| Error::host("repair", path, e))
}

struct Counts(Vec<u16>);

impl Counts {
    /// Counts the clusters; whether all lie in the file.
    fn mark(&mut self, first: u64, count: u64) -> bool {
        let Some(end) = first.checked_add(count).filter(|&end| end <= self.0.len() as u64) else {
            return false;
        };
        for counter in &mut self.0[first as usize..end as usize] {
            *counter = counter.saturating_add(1);
        }
        true
    }

    fn used(&self, cluster: u64) -> bool {
        self.0.get(cluster as usize).is_some_and(|&c| c > 0)
    }
}

fn mend(file: &dyn FileIo, header: &Header, file_len: u64) -> io::Result<u64> {
    let bits = header.cluster_bits;
    let cluster = header.cluster();
    let tables = load_tables(file, header)?;
    let mut counts = Counts(vec![0; file_len.div_ceil(cluster) as usize]);
    counts.mark(0, 1);
    counts.mark(header.first >> bits, (header.first_entries * 8).div_ceil(cluster));
    let mut bad = 0;
    for index in 0..tables.len() {
        let at = tables.first(index) & OFFSET;
        if at == 0 {
            continue;
        }
        if !at.is_multiple_of(cluster) || counts.used(at >> bits) || !counts.mark(at >> bits, 1) {
            bad += 1;
            tables.set_first(index, 0);
            file.write_at(header.first + 8 * index as u64, &[0; 8])?;
        }
    }
    // Tables are marked before data, so that no data cluster can lie on a table.
    for index in 0..tables.len() {
        bad += mend_table(file, header, &tables, index, &mut counts)?;
    }
    let end = file_len.next_multiple_of(cluster);
    write_counts(file, header, &counts, end)?;
    Ok(bad)
}

fn mend_table(
    file: &dyn FileIo,
    header: &Header,
    tables: &TwoLevel,
    index: usize,
    counts: &mut Counts,
) -> io::Result<u64> {
    let bits = header.cluster_bits;
    let at = tables.first(index) & OFFSET;
    let Some(table) = tables.table(file, index)? else { return Ok(0) };
    let mut bad = 0;
    for (within, slot) in table.iter().enumerate() {
        let word = slot.load(Ordering::Acquire);
        let sound = if word & COMPRESSED != 0 {
            let (start, len) = packed_range(header, word);
            // The last one may end before its last sector does.
            let last = ((start + len - 1) >> bits).min(counts.0.len() as u64 - 1);
            counts.mark(start >> bits, (last + 1).saturating_sub(start >> bits)) && start >> bits <= last
        } else {
            match word & OFFSET {
                0 => true,
                data => {
                    data.is_multiple_of(header.cluster())
                        && !counts.used(data >> bits)
                        && counts.mark(data >> bits, 1)
                }
            }
        };
        let mended = match sound {
            false => 0,
            // Now that it is known to be the only one.
            true if word & COMPRESSED == 0 && word & OFFSET != 0 => word | COPIED,
            true => word & !COPIED,
        };
        bad += u64::from(!sound);
        if mended != word {
            slot.store(mended, Ordering::Release);
            file.write_at(at + 8 * within as u64, &mended.to_be_bytes())?;
        }
    }
    Ok(bad)
}

/// Writes new counters behind the file's end and makes the header name them.
fn write_counts(file: &dyn FileIo, header: &Header, counts: &Counts, start: u64) -> io::Result<()> {
    let bits = header.cluster_bits;
    let cluster = header.cluster();
    let per_block = (cluster * 8) >> header.refcount_order;
    // Room for twice what there is.
    let words = (2 * (start >> bits)).div_ceil(per_block) + 2;
    let table_clusters = (words * 8).div_ceil(cluster);
    let mut refcounts = Refcounts::new(header, start, table_clusters);
    let mut end = start + table_clusters * cluster;
    for (number, &count) in counts.0.iter().enumerate() {
        if count > 0 {
            refcounts.add(file, number as u64..number as u64 + 1, count.into(), &mut end)?;
        }
    }
    let mut counted = start;
    while counted < end {
        let clusters = counted >> bits..end >> bits;
        counted = end;
        refcounts.add(file, clusters, 1, &mut end)?;
    }
    let moved = refcounts.write(file)?;
    file.sync()?;
    if let Some((at, clusters)) = moved {
        let mut place = at.to_be_bytes().to_vec();
        place.extend_from_slice(&clusters.to_be_bytes());
        file.write_at(48, &place)?;
    }
    if header.version == 3 {
        // Neither dirty nor damaged any more.
        file.write_at(72, &0u64.to_be_bytes())?;
    }
    file.sync()
}
