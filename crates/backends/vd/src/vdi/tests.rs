//! Damaged files.

use std::path::Path;

use uuid::Uuid;

use super::header::{Header, kind};
use super::{FREE, Vdi};
use crate::error::Error;
use crate::file::MemoryFile;
use crate::format::Format;
use crate::image::{Image, OpenMode};

const SECTOR: usize = 512;
const MAP: u64 = 0x200;
const DATA: u64 = 0x1000;

/// An empty image of `blocks` blocks of 4 KiB, small enough to be cut a thousand times.
pub(crate) fn small_image(blocks: u32) -> Vec<u8> {
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
