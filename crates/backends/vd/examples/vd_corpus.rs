//! Writes small images of every format as seeds for the fuzz targets, in the form that `fuzz::image` reads: lengths and pieces instead
//! of mostly zeros.
//!
//! ```text
//! vd_corpus DIRECTORY
//! ```
//!
//! For `vd_iscsi`, what a target says while its disk is looked at, read, and written.
//!
//! QED images are made by `qemu-img`; where that is not installed their seeds stay as they are.

#[path = "../src/dmg/sample.rs"]
mod dmg;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use vbox_types::ByteSize;
use vd::{CreateOptions, Format, Image, OpenMode, Variant};

const SIZE: u64 = 3 << 20;
/// Pieces are whole units of this size.
const UNIT: usize = 64;

/// The file's length, then its pieces that are not zeros.
fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u32).to_le_bytes().to_vec();
    let mut at = 0;
    let units: Vec<&[u8]> = bytes.chunks(UNIT).collect();
    for run in units.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = run.iter().map(|unit| unit.len()).sum();
        if !is_zero(run[0]) {
            for (number, piece) in bytes[at..at + len].chunks(0x8000).enumerate() {
                out.extend_from_slice(&((at + number * 0x8000) as u32).to_le_bytes());
                out.extend_from_slice(&(piece.len() as u16).to_le_bytes());
                out.extend_from_slice(piece);
            }
        }
        at += len;
    }
    out
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

fn save(out: &Path, target: &str, name: &str, image: &Path) -> Result<()> {
    let folder = out.join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(name), encode(&std::fs::read(image)?))?;
    Ok(())
}

/// What a target of iSCSI says in a session without faults, as records that `vd::exercise_iscsi` makes PDUs of.
fn iscsi_session(eager: bool) -> Vec<u8> {
    const NOP_IN: u8 = 0;
    const RESPONSE: u8 = 1;
    const DATA_IN: u8 = 3;
    const R2T: u8 = 5;
    let mut out = vec![if eager { 7 } else { 5 }];
    let mut put = |opcode: u8, flags: u8, tag: u8, words: [u32; 3], data: &[u8]| {
        out.extend([opcode, flags, 0, tag, data.len() as u8]);
        out.extend(words.map(u32::to_be_bytes).concat());
        out.extend(data);
    };
    // Inquiry, readiness, capacity (8 blocks, thin), mode, provisioning, limits.
    let (mut capacity, mut limits) = ([0; 32], [0; 64]);
    (capacity[7], capacity[10], capacity[14]) = (7, 2, 0xc0);
    (limits[1], limits[23], limits[27]) = (0xb0, 16, 1);
    put(DATA_IN, 0x81, 2, [0; 3], &[0; 36]);
    put(RESPONSE, 0x80, 3, [0; 3], &[]);
    put(DATA_IN, 0x81, 4, [0; 3], &capacity);
    put(DATA_IN, 0x81, 5, [0; 3], &[3, 0, 0, 0]);
    put(DATA_IN, 0x81, 6, [0; 3], &[0, 0xb2, 0, 4, 0, 0x80, 0, 0]);
    put(DATA_IN, 0x81, 7, [0; 3], &limits);
    // A read in eight parts, a write, a discard, a flush.
    put(NOP_IN, 0x80, 0xff, [0; 3], b"ping");
    for part in 0..8 {
        put(DATA_IN, if part == 7 { 0x81 } else { 0 }, 8, [part, part * 128, 0], &[part as u8; 128]);
    }
    let first = if eager { 1024 } else { 0 };
    put(R2T, 0x80, 9, [0, first, 1024], &[]);
    put(R2T, 0x80, 9, [1, 1024, 1024], &[]);
    for tag in 9..12 {
        put(RESPONSE, 0x80, tag, [0; 3], &[]);
    }
    out
}

/// A differencing VHDX image as Hyper-V leaves it: its first block of 1 MiB is present in parts, by a bitmap behind it. The block table
/// of our images lies at 3 MiB.
fn with_a_block_in_parts(child: &Path) -> Result<std::path::PathBuf> {
    const TABLE: usize = 3 << 20;
    let mut bytes = std::fs::read(child)?;
    let data = bytes.len().next_multiple_of(1 << 20);
    for (word, at, state) in [(0, data, 7), (4096, data + (1 << 20), 6)] {
        let word = TABLE + 8 * word;
        let place = bytes.get_mut(word..word + 8).context("the block table is not where it was")?;
        place.copy_from_slice(&(at as u64 | state).to_le_bytes());
    }
    bytes.resize(data + (2 << 20), 0);
    bytes[data..data + 512].fill(0x44);
    bytes[data + (1 << 20)] = 1;
    let path = child.with_extension("parts");
    std::fs::write(&path, bytes)?;
    Ok(path)
}

fn main() -> Result<()> {
    let out = std::env::args().nth(1).context("which directory?")?;
    let out = Path::new(&out);
    let dir = std::env::temp_dir().join(format!("vd-corpus-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let formats = [
        ("vd_vdi", Format::Vdi),
        ("vd_vmdk", Format::Vmdk),
        ("vd_vhd", Format::Vhd),
        ("vd_vhdx", Format::Vhdx),
        ("vd_parallels", Format::Parallels),
        ("vd_qcow", Format::Qcow),
    ];
    for (target, format) in formats {
        for (name, variant) in
            [("dynamic", Variant::Dynamic), ("stream", Variant::StreamOptimized), ("split", Variant::Split)]
        {
            if !vd::can_create(format, variant) {
                continue;
            }
            let path = dir.join(format!("{target}-{name}"));
            let options = CreateOptions {
                format,
                variant,
                size: ByteSize(SIZE),
                uuid: Some("6b5f0a53-5a5a-4a11-8a11-000000000001".parse()?),
                comment: String::new(),
            };
            vd::create(&path, &options)?;
            save(out, target, &format!("{name}-empty"), &path)?;
            if variant == Variant::StreamOptimized {
                continue;
            }
            let image = Image::open(&path, OpenMode::ReadWrite, format)?;
            image.write(0, &[0x11; 512])?;
            image.write(SIZE / 2 + 4096, &[0x22; 512])?;
            image.write(SIZE - 512, &[0x33; 512])?;
            image.flush()?;
            drop(image);
            save(out, target, &format!("{name}-written"), &path)?;
        }
        if vd::can_create(format, Variant::Differencing) {
            let parent = Image::open(&dir.join(format!("{target}-dynamic")), OpenMode::ReadOnly, format)?;
            let path = dir.join(format!("{target}-child"));
            vd::create_child(&path, format, &parent, None)?;
            save(out, target, "child", &path)?;
            if format == Format::Vhdx {
                let path = with_a_block_in_parts(&path)?;
                save(out, target, "child-parts", &path)?;
            }
        }
    }
    for (target, format, options) in [
        ("vd_qed", "qed", "cluster_size=4096,table_size=1"),
        ("vd_qcow", "qcow2", "compat=1.1,cluster_size=512,lazy_refcounts=on"),
        ("vd_qcow", "qcow", ""),
    ] {
        let path = dir.join(format!("{target}-{format}-qemu"));
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", format]).arg(&path).arg("1M");
        if format != "qcow" {
            make.args(["-o", options]);
        }
        if make.status().is_ok_and(|status| status.success()) {
            save(out, target, &format!("{format}-qemu"), &path)?;
            let write = Command::new("qemu-io")
                .args(["-f", format, "-c", "write -P 5 0 1k", "-c", "write -P 6 700k 1k"])
                .arg(&path)
                .output();
            if write.is_ok_and(|out| out.status.success()) {
                save(out, target, &format!("{format}-qemu-written"), &path)?;
            }
        }
    }
    let path = dir.join("dmg");
    std::fs::write(&path, dmg::sample(0x8000_0005).0)?;
    save(out, "vd_dmg", "sample", &path)?;
    std::fs::create_dir_all(out.join("vd_iscsi"))?;
    for (name, eager) in [("asked", false), ("eager", true)] {
        std::fs::write(out.join("vd_iscsi").join(name), iscsi_session(eager))?;
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
