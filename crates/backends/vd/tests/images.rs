//! Images as callers see them, and as QEMU's tools see them.

mod common;

use std::path::Path;
use std::sync::{Arc, mpsc};

use common::{Dir, MIB, Random, create, qemu_img, qemu_name, random_load};
use uuid::Uuid;
use vbox_types::ByteSize;
use vd::{CreateOptions, Error, Format, Image, Op, OpenMode, Queue, Variant};

#[test]
fn a_new_vdi_reads_zeros_and_tells_what_it_is() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    let uuid = Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0);
    let options = CreateOptions {
        format: Format::Vdi,
        variant: Variant::Dynamic,
        size: ByteSize(5 * MIB + 512),
        uuid: Some(uuid),
        comment: "grüße".into(),
    };
    let info = vd::create(&path, &options).unwrap();
    assert_eq!((info.format, info.variant, info.uuid), (Format::Vdi, Variant::Dynamic, Some(uuid)));
    assert_eq!((info.logical_size.0, info.size_on_disk.0), (5 * MIB + 512, 2 * MIB));
    assert_eq!((info.parent_uuid, info.comment.as_str()), (None, "grüße"));
    assert_eq!(vd::probe(&path).unwrap(), Format::Vdi);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
    let mut out = [1; 1024];
    image.read(5 * MIB - 512, &mut out).unwrap();
    assert_eq!(out, [0; 1024]);
    assert!(matches!(vd::create(&path, &options), Err(Error::Exists { .. })));
}

#[test]
fn vdi_keeps_random_writes_over_closing() {
    let dir = Dir::new();
    for (name, variant) in [("dynamic", Variant::Dynamic), ("fixed", Variant::Fixed)] {
        let path = dir.file(name);
        create(&path, Format::Vdi, variant, 9 * MIB + 512);
        let mut model = vec![0; (9 * MIB + 512) as usize];
        for seed in 1..4 {
            let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
            random_load(&image, &mut model, seed, 60);
        }
        let image = Image::open(&path, OpenMode::ReadOnly, Format::Vdi).unwrap();
        let mut all = vec![1; model.len()];
        image.read(0, &mut all).unwrap();
        assert!(all == model, "{name}");
    }
}

#[test]
fn a_vmdk_tells_its_uuid_and_a_compressed_one_is_read() {
    let dir = Dir::new();
    let path = dir.file("a.vmdk");
    create(&path, Format::Vmdk, Variant::Dynamic, 100 * MIB);
    let before = vd::info(&path, None).unwrap();
    assert_eq!((before.format, before.variant), (Format::Vmdk, Variant::Dynamic));
    assert_eq!(before.logical_size.0, 100 * MIB);
    assert!(before.uuid.is_some());
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vmdk).unwrap();
    image.write(99 * MIB, &[3; 4096]).unwrap();
    drop(image);
    let after = vd::info(&path, None).unwrap();
    assert_eq!(after.uuid, before.uuid);
    assert_ne!(after.modification_uuid, before.modification_uuid);
    let packed = dir.file("packed.vmdk");
    let convert = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized"];
    let files = [path.to_str().unwrap(), packed.to_str().unwrap()];
    let Some((ok, text)) = qemu_img(&[&convert[..], &files[..]].concat()) else { return };
    assert!(ok, "{text}");
    assert!(Image::open(&packed, OpenMode::ReadWrite, Format::Vmdk).is_err(), "not for writing");
    let image = Image::open(&packed, OpenMode::ReadOnly, Format::Vmdk).unwrap();
    assert_eq!(image.size().0, 100 * MIB);
    let mut out = vec![1; (2 * MIB) as usize];
    image.read(98 * MIB, &mut out).unwrap();
    let written = MIB as usize..MIB as usize + 4096;
    assert!(out.iter().enumerate().all(|(i, &b)| b == if written.contains(&i) { 3 } else { 0 }));
}

#[test]
fn a_stream_optimized_copy_equals_its_source_for_qemu_and_for_us() {
    let dir = Dir::new();
    let (source, packed, raw) = (dir.file("a.vdi"), dir.file("packed.vmdk"), dir.file("model.img"));
    let size = 90 * MIB + 512;
    create(&source, Format::Vdi, Variant::Dynamic, size);
    let mut model = vec![0; size as usize];
    let image = Image::open(&source, OpenMode::ReadWrite, Format::Vdi).unwrap();
    random_load(&image, &mut model, 21, 40);
    let last = (size - 512) as usize;
    image.write(last as u64, &[9; 512]).unwrap();
    model[last..].fill(9);
    let options = CreateOptions {
        format: Format::Vmdk,
        variant: Variant::StreamOptimized,
        size: ByteSize(size),
        uuid: Some(Uuid::from_u128(77)),
        comment: String::new(),
    };
    let mut last_told = (0, 0);
    let info = vd::clone(&image, &packed, &options, &mut |done, of| {
        assert!(done >= last_told.0, "progress does not go back");
        last_told = (done, of);
        true
    })
    .unwrap();
    assert_eq!(last_told, (size, size));
    assert_eq!((info.variant, info.uuid), (Variant::StreamOptimized, options.uuid));
    let copy = Image::open(&packed, OpenMode::ReadOnly, Format::Vmdk).unwrap();
    let mut out = vec![1; size as usize];
    copy.read(0, &mut out).unwrap();
    assert!(out == model);
    std::fs::write(&raw, &model).unwrap();
    let files = [packed.to_str().unwrap(), raw.to_str().unwrap()];
    let Some((ok, text)) = qemu_img(&["check", "-f", "vmdk", files[0]]) else { return };
    assert!(ok, "{text}");
    let (ok, text) = qemu_img(&[&["compare", "-f", "vmdk", "-F", "raw"], &files[..]].concat()).unwrap();
    assert!(ok, "{text}");
    let cancelled = vd::clone(&image, &dir.file("b.vmdk"), &options, &mut |_, _| false);
    assert!(matches!(cancelled, Err(Error::Cancelled { .. })));
    assert!(!dir.file("b.vmdk").exists());
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let dir = Dir::new();
    let (raw, path) = (dir.file("model.img"), dir.file("a.qcow2"));
    let size = (9 * MIB) as usize;
    let mut model: Vec<u8> = (0..size).map(|i| (i / 3000) as u8).collect();
    model[3 << 20..5 << 20].fill(0);
    std::fs::write(&raw, &model).unwrap();
    let (raw, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
    for kind in ["zlib", "zstd"] {
        let options = format!("compression_type={kind}");
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, raw, name];
        let Some((ok, text)) = qemu_img(&convert) else { return };
        assert!(ok, "{text}");
        let image = Image::open(&path, OpenMode::ReadWrite, Format::Qcow).unwrap();
        let mut out = vec![1; size];
        image.read(0, &mut out).unwrap();
        assert!(out == model, "{kind}");
        random_load(&image, &mut model, 31, 60);
        drop(image);
        std::fs::write(raw, &model).unwrap();
        let (ok, text) = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name, raw]).unwrap();
        assert!(ok, "{kind}: {text}");
        let (ok, text) = qemu_img(&["check", "-f", "qcow2", name]).unwrap();
        assert!(ok, "{kind}: {text}");
    }
}

#[test]
fn qcow_images_of_version_1_are_read_and_written() {
    let dir = Dir::new();
    let (raw, path) = (dir.file("model.img"), dir.file("a.qcow"));
    let size = (9 * MIB) as usize;
    let mut start: Vec<u8> = (0..size).map(|i| (i / 3000) as u8).collect();
    start[3 << 20..5 << 20].fill(0);
    let (raw, name) = (raw.to_str().unwrap(), path.to_str().unwrap());
    for compressed in [false, true] {
        let mut model = start.clone();
        std::fs::write(raw, &model).unwrap();
        let more: &[_] = if compressed { &["-c"] } else { &[] };
        let convert = [&["convert"], more, &["-f", "raw", "-O", "qcow", raw, name]].concat();
        let Some((ok, text)) = qemu_img(&convert) else { return };
        // QEMU 7.2 writes compressed ones whole, and fails without a word.
        assert!(ok || compressed && text.is_empty(), "{text}");
        let image = Image::open(&path, OpenMode::ReadWrite, Format::Qcow).unwrap();
        let mut out = vec![1; size];
        image.read(0, &mut out).unwrap();
        assert!(out == model, "compressed {compressed}");
        for seed in 1..4 {
            random_load(&image, &mut model, seed, 40);
            image.flush().unwrap();
        }
        drop(image);
        std::fs::write(raw, &model).unwrap();
        let (ok, text) = qemu_img(&["compare", "-f", "qcow", "-F", "raw", name, raw]).unwrap();
        assert!(ok, "compressed {compressed}: {text}");
    }
}

#[test]
fn a_raw_disk_is_read_and_written_through_its_descriptor() {
    let dir = Dir::new();
    let (disk, path) = (dir.file("disk"), dir.file("sub.vmdk"));
    std::fs::write(&disk, vec![3; MIB as usize]).unwrap();
    let info = vd::create_raw_disk(&path, &disk, None).unwrap();
    assert_eq!((info.variant, info.logical_size), (Variant::Fixed, ByteSize(MIB)));
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vmdk).unwrap();
    let mut out = [0; 512];
    image.read(MIB - 512, &mut out).unwrap();
    assert_eq!(out, [3; 512]);
    image.write(4096, &[7; 512]).unwrap();
    image.flush().unwrap();
    drop(image);
    assert_eq!(std::fs::read(&disk).unwrap()[4096..4608], [7; 512]);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("createType=\"fullDevice\"") && text.contains(disk.to_str().unwrap()), "{text}");
    // The disk is not the image's: it stays.
    vd::delete(&path, Format::Vmdk).unwrap();
    assert!(disk.exists() && !path.exists());
    std::fs::write(&disk, [1; 100]).unwrap();
    assert!(vd::create_raw_disk(&path, &disk, None).is_err());
    assert!(!path.exists());
}

#[test]
fn images_of_formats_for_reading_only_are_read() {
    let dir = Dir::new();
    let raw = dir.file("model.img");
    let mut model = vec![0; (9 * MIB) as usize];
    for (i, piece) in model.chunks_mut(1 << 16).enumerate().filter(|(i, _)| i % 3 == 0) {
        piece.fill(i as u8);
    }
    std::fs::write(&raw, &model).unwrap();
    for (format, qemu, more) in
        [(Format::Qed, "qed", &[][..]), (Format::Qed, "qed", &["-o", "cluster_size=4096,table_size=2"][..])]
    {
        let path = dir.file("qemu.image");
        let files = ["-f", "raw", "-O", qemu, raw.to_str().unwrap(), path.to_str().unwrap()];
        let Some((ok, text)) = qemu_img(&[&["convert"], more, &files].concat()) else { return };
        assert!(ok, "{text}");
        assert_eq!(vd::probe(&path).unwrap(), format);
        assert!(Image::open(&path, OpenMode::ReadWrite, format).is_err(), "not for writing");
        let image = Image::open(&path, OpenMode::ReadOnly, format).unwrap();
        let mut out = vec![1; model.len()];
        image.read(0, &mut out).unwrap();
        assert!(out == model, "{qemu} {more:?}");
    }
}

#[test]
fn a_split_image_has_pieces_of_two_gigabytes_and_goes_with_all_of_them() {
    let dir = Dir::new();
    let path = dir.file("a.vmdk");
    create(&path, Format::Vmdk, Variant::Split, 5 << 30);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vmdk).unwrap();
    // Across the border of two pieces.
    let border = 2047 << 20;
    image.write(border - 70_144, &[6; 140_288]).unwrap();
    drop(image);
    let files = vd::files(&path, Format::Vmdk).unwrap();
    let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["a.vmdk", "a-s001.vmdk", "a-s002.vmdk", "a-s003.vmdk"]);
    let image = Image::open(&path, OpenMode::ReadOnly, Format::Vmdk).unwrap();
    let mut out = [0; 140_288];
    image.read(border - 70_144, &mut out).unwrap();
    assert!(out == [6; 140_288]);
    drop(image);
    vd::delete(&path, Format::Vmdk).unwrap();
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
}

#[test]
fn a_descriptor_does_not_reach_files_outside_its_directory() {
    let dir = Dir::new();
    let path = dir.file("a.vmdk");
    std::fs::write(dir.file("secret"), [5; 512]).unwrap();
    for name in [dir.file("secret").to_str().unwrap(), "../secret", ".."] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 1 FLAT \"{name}\" 0\n"
        );
        std::fs::write(&path, text).unwrap();
        let opened = Image::open(&path, OpenMode::ReadOnly, Format::Vmdk);
        assert!(matches!(opened, Err(Error::Unsupported { .. })), "{name}");
    }
}

#[test]
fn the_first_write_renews_the_modification_uuid() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    create(&path, Format::Vdi, Variant::Dynamic, MIB);
    let before = vd::info(&path, None).unwrap();
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
    assert_eq!(image.info().unwrap(), before);
    image.write(0, &[1; 512]).unwrap();
    drop(image);
    let after = vd::info(&path, None).unwrap();
    assert_eq!(after.uuid, before.uuid);
    assert_ne!(after.modification_uuid, before.modification_uuid);
}

#[test]
fn zeros_on_an_empty_image_take_no_space() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    create(&path, Format::Vdi, Variant::Dynamic, 64 * MIB);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
    image.write(0, &vec![0; 4 << 20]).unwrap();
    image.flush().unwrap();
    assert_eq!(image.info().unwrap().size_on_disk.0, 2 * MIB);
}

#[test]
fn a_writer_keeps_others_out_and_readers_share() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    create(&path, Format::Vdi, Variant::Dynamic, MIB);
    let writer = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
    assert!(matches!(Image::open(&path, OpenMode::ReadWrite, Format::Vdi), Err(Error::InUse { .. })));
    assert!(matches!(Image::open(&path, OpenMode::ReadOnly, Format::Vdi), Err(Error::InUse { .. })));
    assert!(vd::info(&path, None).is_ok());
    drop(writer);
    let reader = Image::open(&path, OpenMode::ReadOnly, Format::Vdi).unwrap();
    assert!(Image::open(&path, OpenMode::ReadOnly, Format::Vdi).is_ok());
    assert!(matches!(reader.write(0, &[0]), Err(Error::ReadOnly { .. })));
}

#[test]
fn ranges_past_the_end_are_refused() {
    let dir = Dir::new();
    let path = dir.file("a.img");
    create(&path, Format::Raw, Variant::Dynamic, MIB);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Raw).unwrap();
    assert!(matches!(image.read(MIB - 1, &mut [0; 2]), Err(Error::OutOfRange { .. })));
    assert!(matches!(image.write(u64::MAX, &[0; 2]), Err(Error::OutOfRange { .. })));
    assert!(image.discard(0, MIB + 1).is_err());
}

#[test]
fn a_raw_disk_is_opened_as_what_it_is_on_record() {
    let dir = Dir::new();
    let path = dir.file("a.img");
    create(&path, Format::Raw, Variant::Fixed, MIB);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Raw).unwrap();
    image.write(0x40, &[0x7f, 0x10, 0xda, 0xbe]).unwrap();
    drop(image);
    assert_eq!(vd::probe(&path).unwrap(), Format::Vdi);
    let image = Image::open(&path, OpenMode::ReadOnly, Format::Raw).unwrap();
    assert_eq!(image.size(), ByteSize(MIB));
}

#[test]
fn a_discarded_range_reads_zeros_and_its_neighbours_stay() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    create(&path, Format::Vdi, Variant::Dynamic, 4 * MIB);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
    image.write(0, &vec![7; 3 << 20]).unwrap();
    image.discard(MIB - 4096, MIB).unwrap();
    let mut out = vec![1; 3 << 20];
    image.read(0, &mut out).unwrap();
    let (start, end) = ((MIB - 4096) as usize, (2 * MIB - 4096) as usize);
    assert!(out[..start].iter().chain(&out[end..]).all(|&b| b == 7));
    assert!(out[start..end].iter().all(|&b| b == 0));
}

#[test]
fn a_child_shows_its_parent_until_it_is_written() {
    let dir = Dir::new();
    let (base, child) = (dir.file("base.vdi"), dir.file("child.vdi"));
    for format in [Format::Vmdk, Format::Vhd, Format::Vhdx, Format::Qcow] {
        child_of(&dir.file(&format!("base.{format}")), &dir.file(&format!("child.{format}")), format);
    }
    create(&base, Format::Vdi, Variant::Dynamic, 3 * MIB);
    let mut model = vec![0; (3 * MIB) as usize];
    let image = Image::open(&base, OpenMode::ReadWrite, Format::Vdi).unwrap();
    random_load(&image, &mut model, 7, 20);
    drop(image);
    let parent = Arc::new(Image::open(&base, OpenMode::ReadOnly, Format::Vdi).unwrap());
    let info = vd::create_child(&child, Format::Vdi, &parent, None).unwrap();
    assert_eq!((info.variant, info.parent_uuid), (Variant::Differencing, parent.info().unwrap().uuid));
    assert!(matches!(
        Image::open(&child, OpenMode::ReadWrite, Format::Vdi),
        Err(Error::ParentNeeded { parent: p, .. }) if Some(p) == info.parent_uuid
    ));
    let image = Image::open_child(&child, OpenMode::ReadWrite, Format::Vdi, parent.clone()).unwrap();
    random_load(&image, &mut model, 8, 20);
    // Zeros must hide what the parent has.
    model[..MIB as usize].fill(0);
    image.write(0, &model[..MIB as usize]).unwrap();
    let mut out = vec![1; model.len()];
    image.read(0, &mut out).unwrap();
    assert!(out == model);
    drop((image, parent));
    let image = Image::open(&base, OpenMode::ReadWrite, Format::Vdi).unwrap();
    image.write(0, &[9; 512]).unwrap();
    drop(image);
    let parent = Arc::new(Image::open(&base, OpenMode::ReadOnly, Format::Vdi).unwrap());
    let opened = Image::open_child(&child, OpenMode::ReadWrite, Format::Vdi, parent);
    assert!(matches!(opened, Err(Error::ParentChanged { .. })));
}

/// Loads a child of the format with writes around what its parent holds.
fn child_of(base: &Path, child: &Path, format: Format) {
    create(base, format, Variant::Dynamic, 5 * MIB);
    let mut model = vec![0; (5 * MIB) as usize];
    let image = Image::open(base, OpenMode::ReadWrite, format).unwrap();
    random_load(&image, &mut model, 7, 20);
    drop(image);
    let below = model.clone();
    let parent = Arc::new(Image::open(base, OpenMode::ReadOnly, format).unwrap());
    let info = vd::create_child(child, format, &parent, None).unwrap();
    assert_eq!((info.variant, info.parent_uuid), (Variant::Differencing, parent.info().unwrap().uuid));
    assert!(info.parent_hint.is_some_and(|hint| hint.ends_with(base.file_name().unwrap().to_str().unwrap())));
    for seed in 8..11 {
        let image = Image::open_child(child, OpenMode::ReadWrite, format, parent.clone()).unwrap();
        random_load(&image, &mut model, seed, 7);
        let zeros = seed as usize * 4096..seed as usize * 4096 + 9 * 512;
        model[zeros.clone()].fill(0);
        image.write(zeros.start as u64, &model[zeros]).unwrap();
    }
    let image = Image::open_child(child, OpenMode::ReadOnly, format, parent.clone()).unwrap();
    let mut out = vec![1; model.len()];
    image.read(0, &mut out).unwrap();
    assert!(out == model, "{format}");
    parent.read(0, &mut out).unwrap();
    assert!(out == below, "{format}");
}

#[test]
fn threads_that_write_one_new_block_lose_nothing() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    create(&path, Format::Vdi, Variant::Dynamic, 8 * MIB);
    let image = Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap();
    std::thread::scope(|scope| {
        for t in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for sector in (t..8 * MIB / 4096).step_by(4) {
                    image.write(sector * 4096, &[t as u8 + 1; 4096]).unwrap();
                    if sector % 64 == 0 {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    drop(image);
    let image = Image::open(&path, OpenMode::ReadOnly, Format::Vdi).unwrap();
    let mut out = vec![0; (8 * MIB) as usize];
    image.read(0, &mut out).unwrap();
    for (sector, bytes) in out.chunks(4096).enumerate() {
        assert!(bytes.iter().all(|&b| usize::from(b) == sector % 4 + 1), "sector {sector}");
    }
}

#[test]
fn a_queue_answers_every_request_and_records_new_blocks_when_dropped() {
    let dir = Dir::new();
    let path = dir.file("a.vdi");
    create(&path, Format::Vdi, Variant::Dynamic, 64 * MIB);
    let queue = Queue::new(Image::open(&path, OpenMode::ReadWrite, Format::Vdi).unwrap(), 3).unwrap();
    let (tx, rx) = mpsc::channel();
    for i in 0..64 {
        let tx = tx.clone();
        let op = Op::Write { offset: i * MIB, buffer: vec![i as u8 + 1; 512] };
        queue.submit(op, Box::new(move |result| tx.send(result.map(|b| b.len())).unwrap()));
    }
    queue.drain();
    assert!(rx.try_iter().take(64).all(|r| matches!(r, Ok(512))));
    let (tx, rx) = mpsc::channel();
    let op = Op::Read { offset: 64 * MIB, buffer: vec![0; 512] };
    queue.submit(op, Box::new(move |result| tx.send(result.is_err()).unwrap()));
    assert!(rx.recv().unwrap());
    drop(queue);
    let image = Image::open(&path, OpenMode::ReadOnly, Format::Vdi).unwrap();
    let mut out = [0; 1];
    image.read(63 * MIB, &mut out).unwrap();
    assert_eq!(out, [64]);
}

#[test]
fn qemu_finds_our_images_sound_and_equal() {
    let dir = Dir::new();
    for (name, format, variant) in [
        ("dynamic.vdi", Format::Vdi, Variant::Dynamic),
        ("fixed.vdi", Format::Vdi, Variant::Fixed),
        ("sparse.vmdk", Format::Vmdk, Variant::Dynamic),
        ("flat.vmdk", Format::Vmdk, Variant::Fixed),
        ("split.vmdk", Format::Vmdk, Variant::Split),
        ("split flat.vmdk", Format::Vmdk, Variant::SplitFixed),
        ("esx.vmdk", Format::Vmdk, Variant::Esx),
        ("dynamic.vhd", Format::Vhd, Variant::Dynamic),
        ("fixed.vhd", Format::Vhd, Variant::Fixed),
        ("a.qcow2", Format::Qcow, Variant::Dynamic),
        ("dynamic.vhdx", Format::Vhdx, Variant::Dynamic),
        ("fixed.vhdx", Format::Vhdx, Variant::Fixed),
        ("a.hdd", Format::Parallels, Variant::Dynamic),
    ] {
        let (path, raw) = (dir.file(name), dir.file("model.img"));
        let size = 40 * MIB + 512;
        create(&path, format, variant, size);
        let mut model = vec![0; size as usize];
        for seed in [11, 12] {
            let image = Image::open(&path, OpenMode::ReadWrite, format).unwrap();
            random_load(&image, &mut model, seed, 30);
        }
        std::fs::write(&raw, &model).unwrap();
        let (path, raw) = (path.to_str().unwrap(), raw.to_str().unwrap());
        // QEMU has no check for VHD, and takes the size from the geometry unless told.
        let name = if format == Format::Vhd {
            format!("driver=vpc,file.filename={path},force_size_calc=current_size")
        } else {
            format!("driver={},file.filename={path}", qemu_name(format))
        };
        if format != Format::Vhd {
            let Some((ok, text)) = qemu_img(&["check", "--image-opts", &name]) else { return };
            assert!(ok, "{text}");
        }
        let model = format!("driver=raw,file.filename={raw}");
        let Some((ok, text)) = qemu_img(&["compare", "--image-opts", &name, &model]) else { return };
        assert!(ok, "{text}");
    }
}

#[test]
fn we_read_and_write_qemus_images() {
    let dir = Dir::new();
    let (raw, path) = (dir.file("model.img"), dir.file("qemu.vdi"));
    let size = (13 * MIB + 1024) as usize;
    let mut model = vec![0; size];
    let mut random = Random(3);
    for _ in 0..20 {
        let at = random.below(size as u64 - 70_000) as usize;
        model[at..at + 66_000].fill(random.next() as u8);
    }
    std::fs::write(&raw, &model).unwrap();
    for (format, options) in [
        (Format::Vdi, "static=off"),
        (Format::Vdi, "static=on"),
        (Format::Vmdk, "subformat=monolithicSparse"),
        (Format::Vmdk, "subformat=monolithicFlat"),
        (Format::Vmdk, "subformat=twoGbMaxExtentSparse"),
        (Format::Vmdk, "subformat=twoGbMaxExtentFlat"),
        (Format::Vhd, "subformat=dynamic,force_size=on"),
        (Format::Vhd, "subformat=fixed,force_size=on"),
        (Format::Vhdx, "subformat=dynamic,block_size=1048576"),
        (Format::Vhdx, "subformat=fixed"),
        (Format::Parallels, "cluster_size=65536"),
        (Format::Qcow, "compat=0.10"),
        (Format::Qcow, "compat=1.1,cluster_size=512"),
        (Format::Qcow, "compat=1.1,cluster_size=4096,refcount_bits=64"),
        (Format::Qcow, "compat=1.1,lazy_refcounts=on,refcount_bits=1"),
        (Format::Qcow, "compat=1.1,preallocation=metadata"),
    ] {
        let (raw, path) = (raw.to_str().unwrap(), path.to_str().unwrap());
        let qemu = qemu_name(format);
        let convert = ["convert", "-f", "raw", "-O", qemu, "-o", options, raw, path];
        let Some((ok, text)) = qemu_img(&convert) else { return };
        assert!(ok, "{text}");
        assert_eq!(vd::probe(Path::new(path)).unwrap(), format);
        let image = Image::open(Path::new(path), OpenMode::ReadWrite, format).unwrap();
        let mut out = vec![1; size];
        image.read(0, &mut out).unwrap();
        assert!(out == model, "{options}");
        let mut changed = model.clone();
        random_load(&image, &mut changed, 5, 40);
        drop(image);
        let other = dir.file("changed.img");
        std::fs::write(&other, &changed).unwrap();
        let (ok, text) =
            qemu_img(&["compare", "-f", qemu, "-F", "raw", path, other.to_str().unwrap()]).unwrap();
        assert!(ok, "{text}");
        if format != Format::Vhd {
            let (ok, text) = qemu_img(&["check", "-f", qemu, path]).unwrap();
            assert!(ok, "{text}");
        }
    }
}
