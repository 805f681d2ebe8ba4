//! Image files: whatever the bytes, opening, reading, writing, discarding and flushing neither panics nor takes memory
//! that the file's size does not justify.
#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// A sound VDI file of eight blocks of 4 KiB, two of them in the file.
fn vdi() -> Vec<u8> {
    let mut file = vec![0; 0x3000];
    for (at, value) in [
        (0x40, 0xbeda_107fu32),
        (0x44, 0x0001_0001),
        (0x48, 0x190),
        (0x4c, 1),
        (0x154, 0x200),
        (0x158, 0x1000),
        (0x168, 512),
        (0x170, 8 * 4096),
        (0x178, 4096),
        (0x180, 8),
        (0x184, 2),
        (0x188, 1),
        (0x208, 1),
        (0x210, 0),
    ] {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    for block in [0, 1, 3, 5, 6, 7] {
        file[0x200 + 4 * block..0x204 + 4 * block].fill(0xff);
    }
    file
}

/// A sound VMDK file of eight grains of 4 KiB, two of them in the file: header, descriptor, directory, table, grains.
fn vmdk() -> Vec<u8> {
    let mut file = vec![0; 0x4000];
    file[..4].copy_from_slice(b"KDMV");
    for (at, value) in [
        (4, 1u32),
        (8, 3),
        (12, 64),
        (20, 8),
        (28, 1),
        (36, 1),
        (44, 512),
        (56, 2),
        (64, 16),
        // Directory and table.
        (0x400, 3),
        (0x604, 16),
        (0x60c, 24),
    ] {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let text =
        b"version=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 64 SPARSE \"a\"\n";
    file[0x200..0x200 + text.len()].copy_from_slice(text);
    file
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    // A sound file with words changed, cut or extended.
    let mut file = match input.byte() % 3 {
        0 => return vd::exercise(input.0),
        1 => vdi(),
        _ => vmdk(),
    };
    file.resize(usize::from(input.word()), 0xee);
    while !input.is_empty() {
        let at = usize::from(input.word());
        for (i, byte) in input.bytes(4).iter().enumerate() {
            if let Some(slot) = file.get_mut(at + i) {
                *slot = *byte;
            }
        }
    }
    vd::exercise(&file);
});
