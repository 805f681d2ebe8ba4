//! Every format with QEMU's tools on the other side, at sizes up to 2 TiB. Slow: `tools/test-heavy` runs it.

mod common;

use std::process::Command;

use common::{Dir, MIB, Random, create, qemu_img, qemu_name};
use vd::{Format, Image, OpenMode, Variant};

/// Bytes of a write.
const LEN: u64 = 12 * 1024;

/// Runs qemu-io's commands on an image; `None`, loudly, where it is not installed.
fn qemu_io(image: &str, commands: &[String]) -> Option<(bool, String)> {
    let mut command = Command::new("qemu-io");
    for c in commands {
        command.args(["-c", c]);
    }
    match command.args(["--image-opts", image]).output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
            // A pattern that is not there is told in words only.
            Some((out.status.success() && !text.contains("Pattern verification failed"), text.into_owned()))
        }
        Err(error) => {
            eprintln!("SKIPPED: qemu-io cannot run ({error}); install the package qemu-utils");
            None
        }
    }
}

/// Places with a byte for each, apart from one another: both ends, and some between.
fn places(size: u64, seed: u64) -> Vec<(u64, u8)> {
    let mut random = Random(seed);
    let mut out = vec![(0, 1), (size - LEN, 2)];
    let slots = size / LEN - 2;
    for i in 0..24.min(slots / 2) {
        let slot = 1 + (slots / 24.min(slots / 2)) * i + random.below(2.min(slots / 24 + 1));
        out.push((slot * LEN, 3 + i as u8));
    }
    out
}

fn name(format: Format, path: &str) -> String {
    match format {
        Format::Vhd => format!("driver=vpc,file.filename={path},force_size_calc=current_size"),
        _ => format!("driver={},file.filename={path}", qemu_name(format)),
    }
}

#[test]
#[ignore = "slow; tools/test-heavy runs it"]
fn qemu_reads_what_we_write_and_we_read_what_qemu_writes() {
    let dir = Dir::new();
    let kinds = [
        (Format::Vdi, Variant::Dynamic, 2 << 40, ""),
        (Format::Vmdk, Variant::Dynamic, 2 << 40, "subformat=monolithicSparse"),
        (Format::Vmdk, Variant::Split, 64 << 30, "subformat=twoGbMaxExtentSparse"),
        (Format::Vhd, Variant::Dynamic, 2000 << 30, "subformat=dynamic,force_size=on"),
        (Format::Vhdx, Variant::Dynamic, 2 << 40, "subformat=dynamic"),
        (Format::Qcow, Variant::Dynamic, 2 << 40, "compat=1.1"),
        (Format::Qcow, Variant::Dynamic, 8 << 30, "cluster_size=512"),
        (Format::Parallels, Variant::Dynamic, 1 << 40, ""),
        (Format::Raw, Variant::Dynamic, 2 << 40, ""),
    ];
    for (format, variant, largest, options) in kinds {
        for size in [MIB, 700 * MIB + 12 * 1024, largest] {
            let path = dir.file("image");
            let text = path.to_str().unwrap();
            // Ours, read by QEMU.
            create(&path, format, variant, size);
            let image = Image::open(&path, OpenMode::ReadWrite, format).unwrap();
            for (at, byte) in places(size, size) {
                image.write(at, &vec![byte; LEN as usize]).unwrap();
            }
            drop(image);
            let reads: Vec<String> =
                places(size, size).iter().map(|(at, byte)| format!("read -P {byte} {at} {LEN}")).collect();
            let Some((ok, out)) = qemu_io(&name(format, text), &reads) else { return };
            assert!(ok, "{format} {variant} {size}: {out}");
            if !matches!(format, Format::Vhd | Format::Raw | Format::Vhdx) {
                let (ok, out) = qemu_img(&["check", "--image-opts", &name(format, text)]).unwrap();
                assert!(ok, "{format} {variant} {size}: {out}");
            }
            vd::delete(&path, format).unwrap();
            // QEMU's, read and written by us, read again by QEMU.
            let size_text = size.to_string();
            let mut args = vec!["create", "-f", qemu_name(format), text, &size_text];
            if !options.is_empty() {
                args.extend(["-o", options]);
            }
            let (ok, out) = qemu_img(&args).unwrap();
            assert!(ok, "{format} {variant} {size}: {out}");
            let writes: Vec<String> =
                places(size, 9).iter().map(|(at, byte)| format!("write -P {byte} {at} {LEN}")).collect();
            let (ok, out) = qemu_io(&name(format, text), &writes).unwrap();
            assert!(ok, "{format} {variant} {size}: {out}");
            let image = Image::open(&path, OpenMode::ReadWrite, format).unwrap();
            let mut buffer = vec![0; LEN as usize];
            for (at, byte) in places(size, 9) {
                image.read(at, &mut buffer).unwrap();
                assert!(buffer.iter().all(|&b| b == byte), "{format} {variant} {size} at {at}");
                image.write(at, &vec![byte + 100; LEN as usize]).unwrap();
            }
            drop(image);
            let reads: Vec<String> = places(size, 9)
                .iter()
                .map(|(at, byte)| format!("read -P {} {at} {LEN}", byte + 100))
                .collect();
            let (ok, out) = qemu_io(&name(format, text), &reads).unwrap();
            assert!(ok, "{format} {variant} {size}: {out}");
            vd::delete(&path, format).unwrap();
        }
    }
}
