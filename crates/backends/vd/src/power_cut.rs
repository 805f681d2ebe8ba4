//! Power cuts between any two writes, and damage anywhere, for every format that allocates.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::file::{FileIo, MemoryFile};
use crate::format::{Format, Variant};
use crate::image::{Image, OpenMode};

const SECTOR: usize = 512;

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

/// Runs random loads on an image in `bytes`, cuts the power after so many file operations, and checks what is left.
fn cut_power(format: Format, bytes: &[u8], seeds: u64, cuts: std::iter::StepBy<std::ops::Range<usize>>) {
    let path = Path::new("cut.image");
    let open = |file: Box<dyn FileIo>| Image::from_file(file, path, OpenMode::ReadWrite, format, None);
    let sectors = (open(Box::new(MemoryFile::new(bytes))).unwrap().size().0 / 512) as usize;
    for seed in 1..=seeds {
        for cut_after in cuts.clone() {
            let mut random = Random(seed * 1000 + cut_after as u64 + 1);
            let disk = Arc::new(Mutex::new(Disk {
                now: bytes.to_vec(),
                durable: bytes.to_vec(),
                cut_after,
                ..Disk::default()
            }));
            let mut model = Model { flushed: vec![0; sectors], since: vec![Vec::new(); sectors] };
            let image = open(Box::new(DiskFile(disk.clone()))).unwrap();
            load(&image, &mut model, &mut random, 60);
            disk.lock().cut_after = 0;
            drop(image);
            let platter = disk.lock().platter(&mut random);

            let image = open(Box::new(MemoryFile::new(&platter)))
                .unwrap_or_else(|e| panic!("seed {seed}, cut after {cut_after}: {e}"));
            let mut after = vec![0; sectors * SECTOR];
            image.read(0, &mut after).unwrap();
            for (sector, bytes) in after.chunks(SECTOR).enumerate() {
                assert!(
                    bytes.iter().all(|&b| b == bytes[0]),
                    "seed {seed}, cut after {cut_after}: torn sector {sector}"
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
        }
    }
}

#[test]
fn after_a_power_cut_a_vdi_opens_and_holds_what_was_flushed() {
    cut_power(Format::Vdi, &crate::vdi::tests::small_image(24), 12, (0..160).step_by(3));
}

fn new_vmdk(file: &MemoryFile, size: u64) {
    let new = crate::vmdk::NewVmdk {
        variant: Variant::Dynamic,
        size,
        uuid: Uuid::from_u128(1),
        parent: None,
        comment: String::new(),
    };
    let alone = |_: &Path| panic!("no further file");
    assert!(crate::vmdk::create(file, Path::new("cut.vmdk"), &new, &alone).unwrap());
}

#[test]
fn after_a_power_cut_a_vmdk_opens_and_holds_what_was_flushed() {
    let file = MemoryFile::default();
    let size = 10 * 0x1_0000;
    new_vmdk(&file, size);
    let bytes = file.bytes.lock().clone();
    cut_power(Format::Vmdk, &bytes, 3, (0..160).step_by(5));
}

#[test]
fn after_a_power_cut_a_vhd_opens_and_holds_what_was_flushed() {
    let file = MemoryFile::default();
    let size = (2 << 20) + 0x4_0000;
    assert!(crate::vhd::create(&file, Variant::Dynamic, size, Uuid::from_u128(1), None).unwrap());
    let bytes = file.bytes.lock().clone();
    cut_power(Format::Vhd, &bytes, 1, (0..120).step_by(7));
}

#[test]
fn after_a_power_cut_a_qcow2_opens_and_holds_what_was_flushed() {
    let file = MemoryFile::default();
    assert!(crate::qcow::create(&file, 10 * 0x1_0000, None).unwrap());
    let bytes = file.bytes.lock().clone();
    cut_power(Format::Qcow, &bytes, 2, (0..160).step_by(7));
}

#[test]
fn after_a_power_cut_a_qcow_of_version_1_opens_and_holds_what_was_flushed() {
    // Clusters of 4 KiB, second tables of 64 words, three of them; the first table follows the header.
    let mut bytes = vec![0; 72];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x01");
    bytes[24..32].copy_from_slice(&0xa_0000u64.to_be_bytes());
    bytes[32..34].copy_from_slice(&[12, 6]);
    bytes[40..48].copy_from_slice(&48u64.to_be_bytes());
    cut_power(Format::Qcow, &bytes, 2, (0..160).step_by(7));
}

#[test]
fn after_a_power_cut_a_parallels_image_opens_and_holds_what_was_flushed() {
    let file = MemoryFile::default();
    assert!(crate::parallels::create(&file, (2 << 20) + 0x4_0000).unwrap());
    let bytes = file.bytes.lock().clone();
    cut_power(Format::Parallels, &bytes, 1, (0..120).step_by(9));
}

#[test]
fn after_a_power_cut_a_vhdx_opens_and_holds_what_was_flushed() {
    let file = MemoryFile::default();
    assert!(crate::vhdx::create(&file, 0x8_0000, Variant::Dynamic, None).unwrap());
    let bytes = file.bytes.lock().clone();
    cut_power(Format::Vhdx, &bytes, 1, (0..120).step_by(11));
}

/// As whatever its first bytes say it is.
fn exercise(file: &[u8]) {
    if let Ok(format) = crate::format::probe_file(&MemoryFile::new(file)) {
        crate::exercise(format, file.len() as u64, &[(0, file)]);
    }
}

#[test]
fn damage_anywhere_in_the_metadata_does_no_harm() {
    let (vmdk, vhd) = (MemoryFile::default(), MemoryFile::default());
    new_vmdk(&vmdk, 0x8_0000);
    crate::vhd::create(&vhd, Variant::Dynamic, 0x8_0000, Uuid::from_u128(1), None).unwrap();
    let vdi = crate::vdi::tests::small_image(24);
    let qcow = MemoryFile::default();
    crate::qcow::create(&qcow, 0x8_0000, None).unwrap();
    let parallels = MemoryFile::default();
    crate::parallels::create(&parallels, 0x8_0000).unwrap();
    let mut random = Random(9);
    for sound in [
        vdi,
        vmdk.bytes.into_inner(),
        vhd.bytes.into_inner(),
        qcow.bytes.into_inner(),
        parallels.bytes.into_inner(),
    ] {
        for _ in 0..3000 {
            let mut file = sound.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(file.len().min(0x6000) as u64) as usize;
                file[at] = [0, 1, 2, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(7) as usize];
            }
            if random.below(8) == 0 {
                file.truncate(random.below(sound.len() as u64) as usize);
            }
            exercise(&file);
        }
    }
}

/// A QED image of 32 KiB: header, first table, second table, two clusters.
fn small_qed() -> Vec<u8> {
    let mut file = vec![0; 5 * 4096];
    file[..4].copy_from_slice(b"QED\0");
    for (at, value) in [
        (4, 4096u32),
        (8, 1),
        (12, 1),
        (40, 4096),
        (48, 32768),
        (4096, 8192),
        (8192, 12288),
        (8208, 16384),
        (8216, 1),
    ] {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    file
}

#[test]
fn damage_in_the_metadata_of_other_formats_does_no_harm() {
    let vhdx = MemoryFile::default();
    crate::vhdx::create(&vhdx, 0x8_0000, Variant::Dynamic, None).unwrap();
    let vhdx = vhdx.bytes.into_inner();
    let dmg = crate::dmg::sample::sample(0x8000_0005).0;
    let qed = small_qed();
    let open = |bytes: &[u8], format| {
        Image::from_file(Box::new(MemoryFile::new(bytes)), Path::new("t"), OpenMode::ReadOnly, format, None)
            .unwrap()
            .read(0, &mut [0; 512])
            .unwrap();
    };
    open(&qed, Format::Qed);
    open(&dmg, Format::Dmg);
    let mut random = Random(11);
    // Where each file's metadata lie.
    let places: [(&[u8], &[(usize, u64)], u32); 3] = [
        (&vhdx, &[(0x1_0000, 80), (0x3_0000, 100), (0x20_0000, 256), (0x21_0000, 64), (0x30_0000, 64)], 150),
        (&qed, &[(0, 64), (4096, 64), (8192, 64)], 4000),
        (&dmg, &[(0, dmg.len() as u64)], 6000),
    ];
    for (sound, ranges, rounds) in places {
        for _ in 0..rounds {
            let mut file = sound.to_vec();
            for _ in 0..=random.below(3) {
                let (start, len) = ranges[random.below(ranges.len() as u64) as usize];
                let at = start + random.below(len) as usize;
                file[at] = [0, 1, 2, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(7) as usize];
            }
            if random.below(16) == 0 {
                file.truncate(random.below(sound.len() as u64) as usize);
            }
            exercise(&file);
        }
    }
}
