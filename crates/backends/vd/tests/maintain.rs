//! Compacting, resizing, merging, other UUIDs, moving, repair.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Dir, MIB, Random, create, random_load};
use uuid::Uuid;
use vbox_types::ByteSize;
use vd::{Error, Format, Ids, Image, OpenMode, Variant};

fn quiet(_: u64, _: u64) -> bool {
    true
}

fn content(image: &Image) -> Vec<u8> {
    let mut out = vec![1; image.size().0 as usize];
    image.read(0, &mut out).unwrap();
    out
}

fn open(path: &Path, format: Format) -> Image {
    Image::open(path, OpenMode::ReadWrite, format).unwrap()
}

const GROWING: [Format; 6] =
    [Format::Vdi, Format::Vmdk, Format::Vhd, Format::Vhdx, Format::Parallels, Format::Qcow];

#[test]
fn compacting_gives_back_what_zeros_take_and_keeps_the_rest() {
    let dir = Dir::new();
    for format in GROWING {
        let path = dir.file(&format!("a.{format}"));
        create(&path, format, Variant::Dynamic, 100 * MIB);
        let mut model = vec![0; (100 * MIB) as usize];
        let image = open(&path, format);
        let mut random = Random(3);
        for _ in 0..60 {
            let at = random.below(100) * MIB;
            let piece = &mut model[at as usize..(at + MIB) as usize];
            piece.fill(random.next() as u8);
            image.write(at, piece).unwrap();
        }
        // Zeros over what was written, in whole and in part.
        for at in (0..100 * MIB).step_by(3 << 20).chain([0, 50 * MIB]) {
            model[at as usize..(at + MIB) as usize].fill(0);
            image.write(at, &model[at as usize..(at + MIB) as usize]).unwrap();
        }
        for at in (70 * MIB..100 * MIB).step_by(1 << 20) {
            model[at as usize..(at + MIB) as usize].fill(0);
            image.write(at, &vec![0; MIB as usize]).unwrap();
        }
        drop(image);
        let before = vd::info(&path, Some(format)).unwrap();
        let mut last = 0;
        vd::compact(&path, format, None, &mut |done, of| {
            assert!(done >= last && done <= of);
            last = done;
            true
        })
        .unwrap();
        let after = vd::info(&path, Some(format)).unwrap();
        assert!(after.size_on_disk.0 + 8 * MIB <= before.size_on_disk.0, "{format}: {before:?} {after:?}");
        assert_eq!(after.uuid, before.uuid, "{format}");
        let image = open(&path, format);
        assert!(content(&image) == model, "{format}");
        // It goes on working.
        random_load(&image, &mut model, 4, 40);
        drop(image);
        assert!(content(&open(&path, format)) == model, "{format}");
    }
}

#[test]
fn a_compacted_child_hides_its_parent_with_zeros() {
    let dir = Dir::new();
    let (base, child) = (dir.file("base.vdi"), dir.file("child.vdi"));
    create(&base, Format::Vdi, Variant::Dynamic, 4 * MIB);
    open(&base, Format::Vdi).write(0, &vec![5; (4 * MIB) as usize]).unwrap();
    let parent = Arc::new(Image::open(&base, OpenMode::ReadOnly, Format::Vdi).unwrap());
    vd::create_child(&child, Format::Vdi, &parent, None).unwrap();
    let image = Image::open_child(&child, OpenMode::ReadWrite, Format::Vdi, parent.clone()).unwrap();
    image.write(MIB, &vec![0; MIB as usize]).unwrap();
    image.write(2 * MIB, &vec![6; MIB as usize]).unwrap();
    drop(image);
    vd::compact(&child, Format::Vdi, Some(parent.clone()), &mut quiet).unwrap();
    assert_eq!(vd::info(&child, None).unwrap().size_on_disk.0, 3 * MIB);
    let image = Image::open_child(&child, OpenMode::ReadOnly, Format::Vdi, parent).unwrap();
    let seen: Vec<u8> = content(&image).chunks(MIB as usize).map(|c| c[0]).collect();
    assert_eq!(seen, [5, 0, 6, 5]);
}

#[test]
fn growing_adds_zeros_and_keeps_the_rest() {
    let dir = Dir::new();
    let kinds = GROWING.map(|format| (format, Variant::Dynamic));
    let fixed = [(Format::Vdi, Variant::Fixed), (Format::Raw, Variant::Fixed), (Format::Vhd, Variant::Fixed)];
    for (format, variant) in kinds.into_iter().chain(fixed) {
        let path = dir.file(&format!("{variant}.{format}"));
        create(&path, format, variant, 5 * MIB + 512);
        let mut model = vec![0; (5 * MIB + 512) as usize];
        let image = open(&path, format);
        random_load(&image, &mut model, 7, 20);
        drop(image);
        let smaller = vd::resize(&path, format, None, ByteSize(MIB), &mut quiet);
        assert!(matches!(smaller, Err(Error::BadSize { .. })), "{format}");
        for size in [6 * MIB, 40 * MIB + 1024] {
            vd::resize(&path, format, None, ByteSize(size), &mut quiet).unwrap();
            model.resize(size as usize, 0);
            let image = open(&path, format);
            assert_eq!(image.size().0, size, "{format} {variant}");
            assert!(content(&image) == model, "{format} {variant}");
            image.write(size - 512, &[8; 512]).unwrap();
            model[size as usize - 512..].fill(8);
            drop(image);
            assert!(content(&open(&path, format)) == model, "{format} {variant}");
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 9, "no copies are left behind");
}

/// A chain of five images with what each shows.
fn chain(dir: &Dir, format: Format) -> (Vec<std::path::PathBuf>, Vec<Vec<u8>>) {
    let size = 6 * MIB;
    let mut paths = vec![dir.file(&format!("0.{format}"))];
    create(&paths[0], format, Variant::Dynamic, size);
    let mut model = vec![0; size as usize];
    let image = open(&paths[0], format);
    random_load(&image, &mut model, 1, 12);
    drop(image);
    let mut models = vec![model.clone()];
    for number in 1..5 {
        let below = open_chain(&paths, OpenMode::ReadOnly, format);
        let path = dir.file(&format!("{number}.{format}"));
        vd::create_child(&path, format, &below, None).unwrap();
        paths.push(path);
        drop(below);
        let image = open_chain(&paths, OpenMode::ReadWrite, format);
        random_load(&image, &mut model, number + 1, 8);
        let zero = random_place(number);
        model[zero..zero + 65536].fill(0);
        image.write(zero as u64, &vec![0; 65536]).unwrap();
        models.push(model.clone());
    }
    (paths, models)
}

fn random_place(seed: u64) -> usize {
    (Random(seed + 77).below(5 * MIB) as usize) & !511
}

fn open_chain(paths: &[std::path::PathBuf], top: OpenMode, format: Format) -> Arc<Image> {
    let mut below: Option<Arc<Image>> = None;
    for (number, path) in paths.iter().enumerate() {
        let mode = if number + 1 == paths.len() { top } else { OpenMode::ReadOnly };
        let image = match below.take() {
            Some(parent) => Image::open_child(path, mode, format, parent).unwrap(),
            None => Image::open(path, mode, format).unwrap(),
        };
        below = Some(Arc::new(image));
    }
    below.unwrap()
}

#[test]
fn chains_of_five_show_what_was_written_through_each() {
    let dir = Dir::new();
    for format in [Format::Vdi, Format::Vhd, Format::Vmdk, Format::Qcow] {
        let (paths, models) = chain(&dir, format);
        for (number, model) in models.iter().enumerate() {
            let image = open_chain(&paths[..=number], OpenMode::ReadOnly, format);
            assert!(content(&image) == *model, "{format} {number}");
        }
    }
}

#[test]
fn merging_down_makes_the_target_show_what_the_top_shows() {
    let dir = Dir::new();
    for format in [Format::Vdi, Format::Vhd, Format::Vmdk, Format::Qcow] {
        let (paths, models) = chain(&dir, format);
        // 3 into 1; 4 would stand on 1 then.
        let base = open_chain(&paths[..1], OpenMode::ReadOnly, format);
        let target = Image::open_child(&paths[1], OpenMode::ReadWrite, format, base.clone()).unwrap();
        let target = Arc::new(target);
        let mut top = target.clone();
        for path in &paths[2..4] {
            top = Arc::new(Image::open_child(path, OpenMode::ReadOnly, format, top).unwrap());
        }
        let outside = vd::merge_down(&base, &target, &mut quiet);
        assert!(matches!(outside, Err(Error::Unsupported { .. })), "not below it");
        vd::merge_down(&top, &target, &mut quiet).unwrap();
        assert!(content(&target) == models[3], "{format}");
        drop((top, target));
        let image = open_chain(&paths[..2], OpenMode::ReadOnly, format);
        assert!(content(&image) == models[3], "{format}");
        drop(image);
        for path in paths {
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn merging_up_makes_the_top_independent_of_what_is_between() {
    let dir = Dir::new();
    let format = Format::Vdi;
    let (paths, models) = chain(&dir, format);
    let top = open_chain(&paths, OpenMode::ReadWrite, format);
    vd::merge_up(&top, Some(&paths[0]), &mut quiet).unwrap();
    drop(top);
    let base = vd::info(&paths[0], None).unwrap();
    let ids = Ids { parent: base.uuid, parent_modification: base.modification_uuid, ..Ids::default() };
    vd::set_ids(&paths[4], format, &ids).unwrap();
    let image = open_chain(&[paths[0].clone(), paths[4].clone()], OpenMode::ReadOnly, format);
    assert!(content(&image) == models[4]);
}

#[test]
fn uuids_are_changed_where_the_format_has_them() {
    let dir = Dir::new();
    for format in [Format::Vdi, Format::Vmdk, Format::Vhd] {
        let path = dir.file(&format!("a.{format}"));
        create(&path, format, Variant::Dynamic, MIB);
        let ids = Ids { uuid: Some(Uuid::from_u128(42)), ..Ids::default() };
        vd::set_ids(&path, format, &ids).unwrap();
        assert_eq!(vd::info(&path, Some(format)).unwrap().uuid, ids.uuid, "{format}");
        open(&path, format);
    }
    let path = dir.file("a.qcow2");
    create(&path, Format::Qcow, Variant::Dynamic, MIB);
    let ids = Ids { uuid: Some(Uuid::from_u128(42)), ..Ids::default() };
    assert!(matches!(vd::set_ids(&path, Format::Qcow, &ids), Err(Error::Unsupported { .. })));
}

#[test]
fn an_image_moves_with_all_its_files_and_replaces_none() {
    let dir = Dir::new();
    let path = dir.file("a.vmdk");
    create(&path, Format::Vmdk, Variant::Split, 3 << 30);
    std::fs::create_dir(dir.file("there")).unwrap();
    std::fs::write(dir.file("there/a-s002.vmdk"), "mine").unwrap();
    let to = dir.file("there/a.vmdk");
    assert!(matches!(vd::rename(&path, &to, Format::Vmdk), Err(Error::Exists { .. })));
    assert!(path.exists());
    std::fs::remove_file(dir.file("there/a-s002.vmdk")).unwrap();
    assert!(
        vd::rename(&path, &dir.file("there/b.vmdk"), Format::Vmdk).is_err(),
        "its descriptor has its name"
    );
    vd::rename(&path, &to, Format::Vmdk).unwrap();
    assert_eq!(open(&to, Format::Vmdk).size().0, 3 << 30);
    assert!(!path.exists() && !dir.file("a-s001.vmdk").exists());
}

#[test]
fn repair_frees_what_names_nothing() {
    let dir = Dir::new();
    for (format, word_at) in [(Format::Vdi, 0x10_0004), (Format::Qcow, 0x4_0008)] {
        let path = dir.file(&format!("a.{format}"));
        create(&path, format, Variant::Dynamic, 4 * MIB);
        open(&path, format).write(0, &vec![3; (3 * MIB) as usize]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let word = if format == Format::Vdi { vec![0xff, 0, 0, 0] } else { vec![0x80, 0, 0, 1, 0, 0, 0, 0] };
        bytes[word_at..word_at + word.len()].copy_from_slice(&word);
        std::fs::write(&path, &bytes).unwrap();
        let broken = Image::open(&path, OpenMode::ReadWrite, format)
            .and_then(|image| image.read(0, &mut vec![0; (3 * MIB) as usize]));
        assert!(broken.is_err(), "{format}");
        assert_eq!(vd::repair(&path, format).unwrap(), 1, "{format}");
        let image = open(&path, format);
        let seen = content(&image);
        let lost = seen.iter().take((3 * MIB) as usize).filter(|&&b| b == 0).count();
        assert_eq!(lost, if format == Format::Vdi { MIB as usize } else { 65536 }, "{format}");
        assert_eq!(vd::repair(&path, format).err().map(|e| matches!(e, Error::InUse { .. })), Some(true));
    }
}
