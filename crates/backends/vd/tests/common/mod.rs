//! What the tests of images share.

// Each test program uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use vbox_types::ByteSize;
use vd::{CreateOptions, Format, Image, Variant};

pub const MIB: u64 = 1 << 20;

/// A directory that goes with the test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vd-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn create(path: &Path, format: Format, variant: Variant, size: u64) {
    let options = CreateOptions { format, variant, size: ByteSize(size), uuid: None, comment: String::new() };
    vd::create(path, &options).unwrap();
}

/// Runs qemu-img; `None`, loudly, where it is not installed.
pub fn qemu_img(args: &[&str]) -> Option<(bool, String)> {
    match Command::new("qemu-img").args(args).output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
            Some((out.status.success(), text.into_owned()))
        }
        Err(error) => {
            eprintln!("SKIPPED: qemu-img cannot run ({error}); install the package qemu-utils");
            None
        }
    }
}

/// QEMU's name of a format.
pub fn qemu_name(format: Format) -> &'static str {
    match format {
        Format::Raw | Format::Iscsi => "raw",
        Format::Vdi => "vdi",
        Format::Vmdk => "vmdk",
        Format::Vhd => "vpc",
        Format::Vhdx => "vhdx",
        Format::Parallels => "parallels",
        Format::Qcow => "qcow2",
        Format::Qed => "qed",
        Format::Dmg => "dmg",
    }
}

/// A reproducible sequence (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Writes at random places through `image` and into a model; afterwards both must agree.
pub fn random_load(image: &Image, model: &mut [u8], seed: u64, rounds: u32) {
    let mut random = Random(seed);
    let size = model.len() as u64;
    for _ in 0..rounds {
        let offset = random.below(size / 512) * 512;
        let len = (1 + random.below(400)) * 512;
        let len = len.min(size - offset) as usize;
        let fill = random.below(4) as u8 * 85;
        let range = offset as usize..offset as usize + len;
        model[range.clone()].fill(fill);
        image.write(offset, &model[range]).unwrap();
        if random.below(16) == 0 {
            image.flush().unwrap();
        }
    }
    let mut all = vec![1; model.len()];
    image.read(0, &mut all).unwrap();
    assert!(all == model, "the image differs from what was written");
}
