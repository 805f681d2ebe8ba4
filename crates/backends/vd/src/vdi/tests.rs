//! Damaged files, and power cuts between any two writes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::header::{Header, kind};
use super::{FREE, Vdi};
use crate::error::Error;
use crate::file::{FileIo, MemoryFile};
use crate::format::Format;
use crate::image::{Image, OpenMode};

const SECTOR: usize = 512;
const MAP: u64 = 0x200;
const DATA: u64 = 0x1000;

/// An empty image of `blocks` blocks of 4 KiB, small enough to be cut a thousand times.
fn small_image(blocks: u32) -> Vec<u8> {
    let header = Header {
        kind: kind::DYNAMIC,
        flags: 0,
        comment: String::new(),
        map_offset: MAP as u32,
        data_offset: DATA as u32,
        disk_size: u64::from(blocks) * 4096,
        block_size: 4096,
        block_extra: 0,
        blocks,
        blocks_allocated: 0,
        uuid: Uuid::from_u128(1),
        modification: Uuid::from_u128(2),
        parent: Uuid::nil(),
        parent_modification: Uuid::nil(),
    };
    let mut file = header.to_bytes().to_vec();
    file.resize(DATA as usize, 0);
    for block in 0..blocks as usize {
        put_word(&mut file, block, FREE);
    }
    file
}

fn put_word(file: &mut [u8], block: usize, word: u32) {
    let at = MAP as usize + 4 * block;
    file[at..at + 4].copy_from_slice(&word.to_le_bytes());
}

fn open(file: &[u8]) -> Result<Vdi, Error> {
    Vdi::open(&MemoryFile::new(file), Path::new("test.vdi"))
}

/// The offset at which opening finds the file damaged.
fn damage(file: &[u8]) -> Option<u64> {
    match open(file).err() {
        Some(Error::Damaged { offset, .. }) => Some(offset),
        other => panic!("{:?}", other.map(|e| e.to_string())),
    }
}

#[test]
fn map_words_past_the_end_or_shared_are_damage() {
    let mut file = small_image(8);
    file.resize(DATA as usize + 2 * 4096, 0);
    put_word(&mut file, 3, 0);
    put_word(&mut file, 5, 1);
    assert!(open(&file).is_ok());
    put_word(&mut file, 5, 2);
    assert_eq!(damage(&file), Some(MAP + 20));
    put_word(&mut file, 5, 0);
    assert_eq!(damage(&file), Some(MAP + 20));
}

#[test]
fn a_map_larger_than_the_file_is_refused_before_it_is_loaded() {
    let mut file = small_image(8);
    // 2^30 blocks; offsets moved along so that the header agrees with itself.
    file[0x180..0x184].copy_from_slice(&(1u32 << 29).to_le_bytes());
    file[0x158..0x15c].copy_from_slice(&0xf000_0000u32.to_le_bytes());
    assert_eq!(damage(&file), Some(MAP));
    file.truncate(0x100);
    assert!(open(&file).is_err());
}

#[test]
fn a_wrong_count_in_the_header_does_no_harm() {
    let mut bytes = small_image(8);
    bytes.resize(DATA as usize + 4096, 7);
    put_word(&mut bytes, 2, 0);
    let file = Box::new(MemoryFile::new(&bytes));
    let image = Image::from_file(file, Path::new("t"), OpenMode::ReadWrite, Format::Vdi, None).unwrap();
    image.write(0, &[9; SECTOR]).unwrap();
    let mut out = [0; SECTOR];
    image.read(2 * 4096, &mut out).unwrap();
    assert_eq!(out, [7; SECTOR], "the new block does not lie on the old one");
}

#[test]
fn leftovers_of_an_unfinished_write_are_not_seen() {
    let mut bytes = small_image(8);
    bytes.resize(DATA as usize + 4096 + 100, 0xee);
    let file = Box::new(MemoryFile::new(&bytes));
    let image = Image::from_file(file, Path::new("t"), OpenMode::ReadWrite, Format::Vdi, None).unwrap();
    image.write(1024, &[9; SECTOR]).unwrap();
    image.write(8192, &[8; SECTOR]).unwrap();
    let mut out = [1; 3 * 4096];
    image.read(0, &mut out).unwrap();
    let nonzero: Vec<usize> = (0..out.len()).filter(|&i| out[i] != 0).collect();
    assert_eq!(nonzero, (1024..1536).chain(8192..8704).collect::<Vec<_>>());
}

/// A disk whose cache loses power: writes reach the platter at a flush, and before it in any number.
#[derive(Default)]
struct Disk {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Since the last flush: new length, or bytes at an offset.
    pending: Vec<Pending>,
    /// File operations so far, and after which one the power goes.
    operations: usize,
    cut_after: usize,
}

enum Pending {
    Len(usize),
    Bytes(usize, Vec<u8>),
}

impl Disk {
    fn step(&mut self) -> io::Result<()> {
        if self.operations >= self.cut_after {
            return Err(io::Error::other("no power"));
        }
        self.operations += 1;
        Ok(())
    }

    /// What is on the platter: each sector of each write since the last flush may be there or not.
    fn platter(&self, random: &mut Random) -> Vec<u8> {
        let mut out = self.durable.clone();
        // From "nearly all" to "nearly none".
        let odds = random.below(9) + 1;
        for pending in &self.pending {
            match pending {
                Pending::Len(len) => {
                    if random.below(10) < odds {
                        out.resize(*len, 0);
                    }
                }
                Pending::Bytes(offset, bytes) => {
                    let mut at = *offset;
                    while at < offset + bytes.len() {
                        let end = ((at / SECTOR + 1) * SECTOR).min(offset + bytes.len());
                        if random.below(10) < odds {
                            out.resize(out.len().max(end), 0);
                            out[at..end].copy_from_slice(&bytes[at - offset..end - offset]);
                        }
                        at = end;
                    }
                }
            }
        }
        out
    }
}

struct DiskFile(Arc<Mutex<Disk>>);

impl FileIo for DiskFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().now.len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        MemoryFile::new(&self.0.lock().now).read_at(offset, out)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.step()?;
        let start = offset as usize;
        let end = start + data.len();
        let len = disk.now.len().max(end);
        disk.now.resize(len, 0);
        disk.now[start..end].copy_from_slice(data);
        disk.pending.push(Pending::Bytes(start, data.to_vec()));
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.step()?;
        disk.now.resize(len as usize, 0);
        disk.pending.push(Pending::Len(len as usize));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.step()?;
        disk.durable = disk.now.clone();
        disk.pending.clear();
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(offset, &vec![0; len as usize])
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.set_len(offset + len)
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// What each sector may hold after a cut: what the last flush covered, or anything written since.
struct Model {
    flushed: Vec<u8>,
    since: Vec<Vec<u8>>,
}

impl Model {
    fn allows(&self, sector: usize, value: u8) -> bool {
        self.flushed[sector] == value || self.since[sector].contains(&value)
    }
}

/// Writes, flushes and discards at random until done or until the power goes.
fn load(image: &Image, model: &mut Model, random: &mut Random, steps: usize) {
    let sectors = model.flushed.len() as u64;
    for _ in 0..steps {
        let first = random.below(sectors);
        let count = (1 + random.below(12)).min(sectors - first);
        let range = first as usize..(first + count) as usize;
        let result = match random.below(10) {
            0 | 1 => {
                let result = image.flush();
                if result.is_ok() {
                    for (flushed, since) in model.flushed.iter_mut().zip(&mut model.since) {
                        *flushed = since.pop().unwrap_or(*flushed);
                        since.clear();
                    }
                }
                result
            }
            2 => {
                // A discarded sector reads as before or as zeros; then as zeros, unless it lies in part of a unit.
                image.discard(first * 512, count * 512).inspect(|()| {
                    for sector in range {
                        let mut out = [0; SECTOR];
                        image.read(sector as u64 * 512, &mut out).unwrap();
                        model.since[sector].push(out[0]);
                    }
                })
            }
            _ => {
                let value = random.below(256) as u8;
                for sector in range.clone() {
                    model.since[sector].push(value);
                }
                image.write(first * 512, &vec![value; range.len() * SECTOR])
            }
        };
        if result.is_err() {
            return;
        }
    }
}

#[test]
fn after_a_power_cut_the_image_opens_and_holds_what_was_flushed() {
    let sectors = 24 * 8;
    let mut cuts = 0;
    for seed in 1..=12 {
        for cut_after in (0..160).step_by(3) {
            let mut random = Random(seed * 1000 + cut_after as u64 + 1);
            let bytes = small_image(24);
            let disk = Arc::new(Mutex::new(Disk {
                now: bytes.clone(),
                durable: bytes,
                cut_after,
                ..Disk::default()
            }));
            let mut model = Model { flushed: vec![0; sectors], since: vec![Vec::new(); sectors] };
            let file = Box::new(DiskFile(disk.clone()));
            let path = Path::new("cut.vdi");
            let image = Image::from_file(file, path, OpenMode::ReadWrite, Format::Vdi, None).unwrap();
            load(&image, &mut model, &mut random, 60);
            disk.lock().cut_after = 0;
            drop(image);
            let platter = disk.lock().platter(&mut random);

            let file = Box::new(MemoryFile::new(&platter));
            let image = Image::from_file(file, path, OpenMode::ReadWrite, Format::Vdi, None)
                .unwrap_or_else(|e| panic!("seed {seed}, cut after {cut_after}: {e}"));
            let mut after = vec![0; sectors * SECTOR];
            image.read(0, &mut after).unwrap();
            for (sector, bytes) in after.chunks(SECTOR).enumerate() {
                assert!(
                    bytes.iter().all(|&b| b == bytes[0]),
                    "seed {seed}, cut {cut_after}: torn sector {sector}"
                );
                assert!(
                    model.allows(sector, bytes[0]),
                    "seed {seed}, cut after {cut_after}: sector {sector} holds {}, flushed was {}, written since {:?}",
                    bytes[0],
                    model.flushed[sector],
                    model.since[sector]
                );
            }
            // The image goes on working: nothing left behind shows up in new blocks.
            let values: Vec<u8> = after.chunks(SECTOR).map(|s| s[0]).collect();
            for sector in (0..sectors).step_by(7) {
                image.write((sector * SECTOR) as u64, &[0x3c; SECTOR]).unwrap();
            }
            image.read(0, &mut after).unwrap();
            for (sector, bytes) in after.chunks(SECTOR).enumerate() {
                let expected = if sector % 7 == 0 { 0x3c } else { values[sector] };
                assert_eq!(bytes, [expected; SECTOR], "sector {sector}");
            }
            cuts += 1;
        }
    }
    assert!(cuts > 600);
}
