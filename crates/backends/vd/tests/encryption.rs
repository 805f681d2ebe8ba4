//! Encrypted images: what is stored, what is read, and how they come about.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Dir, MIB, Random, create, random_load};
use vd::{Algorithm, Dek, Format, Image, OpenMode, Recrypted, Variant};

const SIZE: u64 = 12 * MIB;
/// What no ciphertext holds by chance.
const WORDS: &[u8] = b"a sentence that everybody may read ";

fn dek() -> Dek {
    Dek::random(Algorithm::AesXts256).unwrap()
}

fn open(path: &Path, format: Format, dek: Option<&Dek>) -> Image {
    let image = Image::open(path, OpenMode::ReadWrite, format).unwrap();
    image.set_key(dek);
    image
}

fn content(image: &Image) -> Vec<u8> {
    let mut all = vec![1; image.size().0 as usize];
    image.read(0, &mut all).unwrap();
    all
}

fn recrypt(path: &Path, format: Format, old: Option<&Dek>, new: Option<&Dek>) {
    let folder = path.with_extension("recrypt");
    Recrypted::make(path, format, &folder, old, new, &mut |_, _| true).unwrap().install().unwrap();
    assert!(!folder.exists() && Recrypted::is_there(&folder));
    Recrypted::forget(&folder);
    assert!(!Recrypted::is_there(&folder));
}

fn shows(path: &Path, words: &[u8]) -> bool {
    std::fs::read(path).unwrap().windows(words.len()).any(|w| w == words)
}

const FORMATS: [(Format, Variant); 9] = [
    (Format::Raw, Variant::Fixed),
    (Format::Vdi, Variant::Dynamic),
    (Format::Vdi, Variant::Fixed),
    (Format::Vmdk, Variant::Dynamic),
    (Format::Vhd, Variant::Dynamic),
    (Format::Vhd, Variant::Fixed),
    (Format::Vhdx, Variant::Dynamic),
    (Format::Qcow, Variant::Dynamic),
    (Format::Parallels, Variant::Dynamic),
];

#[test]
fn random_writes_are_read_back_and_shown_by_no_file() {
    for (format, variant) in FORMATS {
        let dir = Dir::new();
        let path = dir.file("d");
        create(&path, format, variant, SIZE);
        let (key, mut model) = (dek(), vec![0; SIZE as usize]);
        let image = open(&path, format, Some(&key));
        if variant != Variant::Dynamic || format == Format::Raw {
            // What a fixed image holds was not encrypted.
            image.write(0, &model).unwrap();
        }
        random_load(&image, &mut model, 11, 60);
        let words = WORDS.repeat(300);
        let mut random = Random(5);
        // Anywhere, not only where sectors begin.
        for _ in 0..20 {
            let at = random.below(SIZE - words.len() as u64) as usize;
            model[at..at + words.len()].copy_from_slice(&words);
            image.write(at as u64, &words).unwrap();
            let mut piece = vec![0; 777];
            image.read(at as u64 + 3, &mut piece).unwrap();
            assert!(piece == model[at + 3..at + 780], "{format} {variant}");
        }
        image.discard(0, MIB).unwrap();
        drop(image);
        let again = open(&path, format, Some(&key));
        assert!(content(&again) == model, "{format} {variant}");
        again.set_key(Some(&dek()));
        assert!(content(&again) != model, "{format} {variant}: another key shows the same");
        drop(again);
        assert!(!shows(&path, WORDS), "{format} {variant}: the text is in the file");
    }
}

#[test]
fn images_are_encrypted_encrypted_anew_and_decrypted_with_all_they_hold() {
    for (format, variant) in FORMATS {
        let dir = Dir::new();
        let path = dir.file("d");
        create(&path, format, variant, SIZE);
        let mut model = vec![0; SIZE as usize];
        let image = open(&path, format, None);
        random_load(&image, &mut model, 3, 60);
        model[5000..5000 + WORDS.len()].copy_from_slice(WORDS);
        image.write(5000, WORDS).unwrap();
        let ids = image.info().unwrap();
        drop(image);
        let (one, two) = (Dek::random(Algorithm::AesXts128).unwrap(), dek());
        recrypt(&path, format, None, Some(&one));
        assert!(!shows(&path, WORDS), "{format} {variant}");
        assert!(content(&open(&path, format, Some(&one))) == model, "{format} {variant}");
        recrypt(&path, format, Some(&one), Some(&two));
        let image = open(&path, format, Some(&two));
        assert!(content(&image) == model, "{format} {variant}");
        // A new part of the disk is encrypted with the same key.
        random_load(&image, &mut model, 4, 20);
        drop(image);
        recrypt(&path, format, Some(&two), None);
        let image = open(&path, format, None);
        assert!(content(&image) == model, "{format} {variant}");
        let now = image.info().unwrap();
        assert_eq!((now.uuid, now.logical_size), (ids.uuid, ids.logical_size), "{format} {variant}");
    }
}

#[test]
fn split_images_are_encrypted_with_all_their_files() {
    let dir = Dir::new();
    let path = dir.file("d.vmdk");
    create(&path, Format::Vmdk, Variant::SplitFixed, SIZE);
    open(&path, Format::Vmdk, None).write(MIB, WORDS).unwrap();
    let key = dek();
    recrypt(&path, Format::Vmdk, None, Some(&key));
    for file in vd::files(&path, Format::Vmdk).unwrap() {
        assert!(!shows(&file, WORDS));
    }
    let image = open(&path, Format::Vmdk, Some(&key));
    assert!(content(&image)[MIB as usize..].starts_with(WORDS));
    // A disk of the host stays what it is.
    let (disk, raw) = (dir.file("disk"), dir.path().join("other"));
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    std::fs::create_dir(&raw).unwrap();
    let raw = raw.join("raw.vmdk");
    vd::create_raw_disk(&raw, &disk, None).unwrap();
    let folder = dir.file("new");
    let refused = Recrypted::make(&raw, Format::Vmdk, &folder, None, Some(&key), &mut |_, _| true);
    assert!(refused.is_err() && !folder.exists());
    assert!(std::fs::read(&disk).unwrap().iter().all(|b| *b == 0), "the host's disk was touched");
}

#[test]
fn chains_have_one_key_from_the_base_up() {
    for format in [Format::Vdi, Format::Vmdk, Format::Vhd, Format::Vhdx, Format::Qcow] {
        let dir = Dir::new();
        let (base, top) = (dir.file("base"), dir.file("top"));
        create(&base, format, Variant::Dynamic, SIZE);
        let mut model = vec![0; SIZE as usize];
        random_load(&open(&base, format, None), &mut model, 7, 40);
        let below = Image::open(&base, OpenMode::ReadOnly, format).unwrap();
        vd::create_child(&top, format, &below, None).unwrap();
        drop(below);
        let chain = [(base.clone(), format), (top.clone(), format)];
        let opened = |dek: Option<&Dek>| -> Arc<Image> {
            let image = vd::open_chain(&chain, OpenMode::ReadWrite).unwrap();
            image.set_key(dek);
            image
        };
        random_load(&opened(None), &mut model, 8, 40);
        let key = dek();
        recrypt(&base, format, None, Some(&key));
        recrypt(&top, format, None, Some(&key));
        let image = opened(Some(&key));
        assert!(content(&image) == model, "{format}");
        random_load(&image, &mut model, 9, 40);
        drop(image);
        assert!(content(&opened(Some(&key))) == model, "{format}");
    }
}

#[test]
fn compressed_clusters_are_encrypted_as_others() {
    let dir = Dir::new();
    let (raw, path) = (dir.file("raw"), dir.file("d.qcow2"));
    let mut model: Vec<u8> = WORDS.repeat((4 * MIB) as usize / WORDS.len());
    model.resize(4 << 20, 9);
    std::fs::write(&raw, &model).unwrap();
    let words = ["convert", "-c", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()];
    let Some((true, _)) = common::qemu_img(&words) else { return };
    let key = dek();
    recrypt(&path, Format::Qcow, None, Some(&key));
    assert!(content(&open(&path, Format::Qcow, Some(&key))) == model);
    assert!(content(&open(&path, Format::Qcow, None)) != model);
    recrypt(&path, Format::Qcow, Some(&key), None);
    let (ok, text) = common::qemu_img(&["compare", raw.to_str().unwrap(), path.to_str().unwrap()]).unwrap();
    assert!(ok, "{text}");
}

#[test]
fn zero_blocks_of_a_vdi_are_stored_when_it_is_encrypted() {
    let dir = Dir::new();
    let (base, top) = (dir.file("base"), dir.file("top"));
    create(&base, Format::Vdi, Variant::Dynamic, SIZE);
    open(&base, Format::Vdi, None).write(0, &vec![7; SIZE as usize]).unwrap();
    let below = Image::open(&base, OpenMode::ReadOnly, Format::Vdi).unwrap();
    vd::create_child(&top, Format::Vdi, &below, None).unwrap();
    let chain = [(base.clone(), Format::Vdi), (top.clone(), Format::Vdi)];
    drop(below);
    vd::open_chain(&chain, OpenMode::ReadWrite).unwrap().write(MIB, &vec![0; 2 << 20]).unwrap();
    // Zeros that hide a parent become zero blocks.
    let below = Arc::new(Image::open(&base, OpenMode::ReadOnly, Format::Vdi).unwrap());
    vd::compact(&top, Format::Vdi, Some(below), &mut |_, _| true).unwrap();
    let before = std::fs::metadata(&top).unwrap().len();
    let key = dek();
    recrypt(&base, Format::Vdi, None, Some(&key));
    recrypt(&top, Format::Vdi, None, Some(&key));
    assert_eq!(std::fs::metadata(&top).unwrap().len(), before + (2 << 20));
    let image = vd::open_chain(&chain, OpenMode::ReadOnly).unwrap();
    image.set_key(Some(&key));
    let all = content(&image);
    assert!(
        all[..MIB as usize].iter().all(|b| *b == 7) && all[MIB as usize..3 << 20].iter().all(|b| *b == 0)
    );
}

#[test]
fn a_switch_that_was_cut_short_is_completed_and_one_that_failed_leaves_nothing() {
    let dir = Dir::new();
    let path = dir.file("d.vmdk");
    create(&path, Format::Vmdk, Variant::SplitFixed, SIZE);
    open(&path, Format::Vmdk, None).write(0, WORDS).unwrap();
    let (key, folder) = (dek(), dir.file("new"));
    let make = |progress: &mut dyn FnMut(u64, u64) -> bool| {
        Recrypted::make(&path, Format::Vmdk, &folder, None, Some(&key), progress)
    };
    assert!(matches!(make(&mut |_, _| false), Err(vd::Error::Cancelled { .. })));
    assert!(!folder.exists());
    // Killed before anything was noted: the next run begins anew.
    drop(make(&mut |_, _| true).unwrap());
    assert!(content(&Image::open(&path, OpenMode::ReadOnly, Format::Vmdk).unwrap()).starts_with(WORDS));
    let one = folder.join("d.vmdk");
    assert!(one.exists());
    // Killed between two files of the switch.
    std::fs::rename(&one, &path).unwrap();
    assert!(Recrypted::finish(&folder).unwrap());
    assert!(content(&open(&path, Format::Vmdk, Some(&key))).starts_with(WORDS));
    assert!(!Recrypted::finish(&folder).unwrap());
}
