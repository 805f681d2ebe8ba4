//! Differencing VHDX images: what no other program at hand writes is made and checked byte by byte.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Dir, MIB, create, random_load};
use uuid::{Uuid, uuid};
use vd::{Error, Format, Ids, Image, MediumInfo, OpenMode, Variant};

const SIZE: u64 = 24 * MIB;
const BLOCK_TABLE: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The file offset of a region.
fn region(bytes: &[u8], id: Uuid) -> usize {
    let entries = bytes[(192 << 10) + 16..].chunks(32).take(2);
    let entry = entries.into_iter().find(|entry| entry[..16] == id.to_bytes_le()).unwrap();
    u64_at(entry, 16) as usize
}

/// Offset and length of a metadata item in the file.
fn item(bytes: &[u8], id: Uuid) -> (usize, usize) {
    let at = region(bytes, METADATA);
    let count = usize::from(bytes[at + 10]);
    let entries = bytes[at + 32..].chunks(32).take(count);
    let entry = entries.into_iter().find(|entry| entry[..16] == id.to_bytes_le()).unwrap();
    (at + u32_at(entry, 16), u32_at(entry, 20))
}

fn data_guid(bytes: &[u8]) -> Uuid {
    let header = |at: usize| (u64_at(bytes, at + 8), Uuid::from_slice_le(&bytes[at + 32..at + 48]).unwrap());
    header(64 << 10).max(header(128 << 10)).1
}

fn read(image: &Image) -> Vec<u8> {
    let mut all = vec![1; image.size().0 as usize];
    image.read(0, &mut all).unwrap();
    all
}

/// A loaded base with an empty child; what both show.
fn family(dir: &Dir) -> (std::path::PathBuf, std::path::PathBuf, MediumInfo, Vec<u8>) {
    let (base, child) = (dir.file("base.vhdx"), dir.file("child.vhdx"));
    create(&base, Format::Vhdx, Variant::Dynamic, SIZE);
    let mut model = vec![0; SIZE as usize];
    random_load(&Image::open(&base, OpenMode::ReadWrite, Format::Vhdx).unwrap(), &mut model, 5, 40);
    let parent = Image::open(&base, OpenMode::ReadOnly, Format::Vhdx).unwrap();
    let info = vd::create_child(&child, Format::Vhdx, &parent, None).unwrap();
    (base, child, info, model)
}

fn opened(base: &Path, child: &Path, mode: OpenMode) -> Result<Image, Error> {
    let parent = Image::open(base, OpenMode::ReadOnly, Format::Vhdx)?;
    Image::open_child(child, mode, Format::Vhdx, Arc::new(parent))
}

#[test]
fn a_new_child_names_its_parent_as_the_format_has_it() {
    let dir = Dir::new();
    let (base, child, info, model) = family(&dir);
    let (parent, bytes) = (std::fs::read(&base).unwrap(), std::fs::read(&child).unwrap());
    assert_eq!(info.variant, Variant::Differencing);
    assert_eq!(info.parent_modification_uuid, Some(data_guid(&parent)));
    assert_eq!(info.parent_hint.as_deref(), base.to_str());
    let (at, _) = item(&bytes, FILE_PARAMETERS);
    assert_eq!((u32_at(&bytes, at), u32_at(&bytes, at + 4)), (1 << 20, 2), "block size, has a parent");
    let (at, len) = item(&bytes, PARENT_LOCATOR);
    let locator = &bytes[at..at + len];
    assert_eq!(locator[..16], uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913").to_bytes_le());
    let text = |at: usize, len: usize| {
        let units = locator[at..at + len].chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        String::from_utf16(&units.collect::<Vec<_>>()).unwrap()
    };
    let entries: Vec<(String, String)> = locator[20..]
        .chunks(12)
        .take(usize::from(locator[18]))
        .map(|e| {
            let (name, value) =
                (usize::from(e[8]) + usize::from(e[9]) * 256, usize::from(e[10]) + usize::from(e[11]) * 256);
            (text(u32_at(e, 0), name), text(u32_at(e, 4), value))
        })
        .collect();
    assert_eq!(entries[0], ("parent_linkage".to_owned(), format!("{{{}}}", data_guid(&parent))));
    assert_eq!(entries[1], ("relative_path".to_owned(), ".\\base.vhdx".to_owned()));
    assert!(matches!(Image::open(&child, OpenMode::ReadOnly, Format::Vhdx), Err(Error::ParentNeeded { .. })));
    assert!(read(&opened(&base, &child, OpenMode::ReadOnly).unwrap()) == model);
}

#[test]
fn a_child_takes_writes_and_a_parent_that_was_written_is_told() {
    let dir = Dir::new();
    let (base, child, _, mut model) = family(&dir);
    let before = model.clone();
    for seed in 6..9 {
        let image = opened(&base, &child, OpenMode::ReadWrite).unwrap();
        random_load(&image, &mut model, seed, 20);
        // Zeros hide what the parent has.
        model[seed as usize * 70_000..seed as usize * 70_000 + 5000].fill(0);
        image.write(seed * 70_000, &vec![0; 5000]).unwrap();
    }
    vd::compact(
        &child,
        Format::Vhdx,
        Some(Arc::new(Image::open(&base, OpenMode::ReadOnly, Format::Vhdx).unwrap())),
        &mut |_, _| true,
    )
    .unwrap();
    assert!(read(&opened(&base, &child, OpenMode::ReadOnly).unwrap()) == model);
    assert!(read(&Image::open(&base, OpenMode::ReadOnly, Format::Vhdx).unwrap()) == before);
    Image::open(&base, OpenMode::ReadWrite, Format::Vhdx).unwrap().write(0, &[9; 512]).unwrap();
    assert!(matches!(opened(&base, &child, OpenMode::ReadOnly), Err(Error::ParentChanged { .. })));
    // As after a merge: the new content is what the child is made for.
    let now = vd::info(&base, None).unwrap().modification_uuid;
    vd::set_ids(&child, Format::Vhdx, &Ids { parent_modification: now, ..Ids::default() }).unwrap();
    opened(&base, &child, OpenMode::ReadOnly).unwrap();
}

/// A child as Hyper-V leaves it: its first block is present in parts, by a bitmap, the third one as a whole.
fn with_parts(child: &Path) {
    let mut bytes = std::fs::read(child).unwrap();
    let table = region(&bytes, BLOCK_TABLE);
    let data = bytes.len().next_multiple_of(1 << 20);
    let mut word = |index: usize, at: usize, state: u64| {
        bytes[table + 8 * index..table + 8 * index + 8].copy_from_slice(&(at as u64 | state).to_le_bytes());
    };
    // Blocks of 1 MiB, 4096 in a chunk; then comes the word of the bitmap, which lies behind the blocks.
    word(0, data, 7);
    word(2, data + (1 << 20), 6);
    word(4096, data + (2 << 20), 6);
    bytes.resize(data + (3 << 20), 0);
    bytes[data..data + (2 << 20)].fill(0xaa);
    // Sectors 0, 3 and 8 to 15 of the first block.
    bytes[data + (2 << 20)] = 0b0000_1001;
    bytes[data + (2 << 20) + 1] = 0xff;
    std::fs::write(child, bytes).unwrap();
}

fn expect_parts(model: &mut [u8]) {
    for sector in [0, 3, 8, 9, 10, 11, 12, 13, 14, 15] {
        model[sector * 512..sector * 512 + 512].fill(0xaa);
    }
    model[2 << 20..3 << 20].fill(0xaa);
}

#[test]
fn blocks_that_are_present_in_parts_are_read_and_written_by_the_sector() {
    let dir = Dir::new();
    let (base, child, _, mut model) = family(&dir);
    with_parts(&child);
    expect_parts(&mut model);
    let image = opened(&base, &child, OpenMode::ReadWrite).unwrap();
    assert!(read(&image) == model);
    // Over own and missing sectors, and not up to their ends.
    for (at, len) in
        [(700usize, 300usize), (1500, 3000), (9000, 512), (500_000, 70_000), ((1 << 20) - 512, 1024)]
    {
        model[at..at + len].fill(0x55);
        image.write(at as u64, &vec![0x55; len]).unwrap();
    }
    assert!(read(&image) == model);
    image.flush().unwrap();
    drop(image);
    assert!(read(&opened(&base, &child, OpenMode::ReadOnly).unwrap()) == model);
    let bytes = std::fs::read(&child).unwrap();
    let table = region(&bytes, BLOCK_TABLE);
    assert_eq!(bytes[table] & 7, 7, "the block is present in parts as before");
    let bitmap = (u64_at(&bytes, table + 8 * 4096) >> 20 << 20) as usize;
    // Sector 1 by the first write, 2 to 8 by the second, 17 and 18 by the third.
    assert_eq!(bytes[bitmap..bitmap + 3], [0xff, 0xff, 0b0000_0110]);
    let second = (u64_at(&bytes, table + 8) >> 20 << 20) as usize;
    assert!(second >= bitmap + (1 << 20), "the new block lies where the bitmap does");
    let mut image = opened(&base, &child, OpenMode::ReadWrite).unwrap();
    for seed in 30..33 {
        random_load(&image, &mut model, seed, 25);
        drop(image);
        image = opened(&base, &child, OpenMode::ReadWrite).unwrap();
    }
    assert!(read(&image) == model);
}

#[test]
fn chains_are_merged_down_and_up() {
    for up in [false, true] {
        let dir = Dir::new();
        let (base, child, _, mut model) = family(&dir);
        with_parts(&child);
        expect_parts(&mut model);
        let top = dir.file("top.vhdx");
        let middle = opened(&base, &child, OpenMode::ReadWrite).unwrap();
        random_load(&middle, &mut model, 21, 15);
        drop(middle);
        vd::create_child(&top, Format::Vhdx, &opened(&base, &child, OpenMode::ReadOnly).unwrap(), None)
            .unwrap();
        let files = |names: &[&std::path::PathBuf]| -> Vec<_> {
            names.iter().map(|name| ((*name).clone(), Format::Vhdx)).collect()
        };
        let whole = files(&[&base, &child, &top]);
        random_load(&vd::open_chain(&whole, OpenMode::ReadWrite).unwrap(), &mut model, 22, 15);
        if up {
            let image = vd::open_chain(&whole, OpenMode::ReadWrite).unwrap();
            vd::merge_up(&image, Some(&base), &mut |_, _| true).unwrap();
            drop(image);
            let parent_modification = vd::info(&base, None).unwrap().modification_uuid;
            vd::set_ids(&top, Format::Vhdx, &Ids { parent_modification, ..Ids::default() }).unwrap();
            let image = vd::open_chain(&files(&[&base, &top]), OpenMode::ReadOnly).unwrap();
            assert!(read(&image) == model);
        } else {
            let below = Image::open(&base, OpenMode::ReadOnly, Format::Vhdx).unwrap();
            let target =
                Image::open_child(&child, OpenMode::ReadWrite, Format::Vhdx, Arc::new(below)).unwrap();
            let image = Image::open_child(&top, OpenMode::ReadOnly, Format::Vhdx, Arc::new(target)).unwrap();
            let target = image.parent().unwrap().clone();
            vd::merge_down(&image, &target, &mut |_, _| true).unwrap();
            drop((image, target));
            assert!(read(&opened(&base, &child, OpenMode::ReadOnly).unwrap()) == model);
        }
    }
}

#[test]
fn damaged_bitmaps_and_locators_are_refused() {
    let dir = Dir::new();
    let (base, child, _, _) = family(&dir);
    with_parts(&child);
    let good = std::fs::read(&child).unwrap();
    let table = region(&good, BLOCK_TABLE);
    let (locator, _) = item(&good, PARENT_LOCATOR);
    let refused = |what: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&child, bytes).unwrap();
        let error = opened(&base, &child, OpenMode::ReadWrite).map(drop).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused("its bitmap at 0x0 is not there", &|bytes| bytes[table + 8 * 4096..][..8].fill(0));
    refused("is not there", &|bytes| bytes[table + 8 * 4096 + 5] = 0x7f);
    refused("shares its place with a bitmap", &|bytes| {
        let block = u64_at(bytes, table + 16);
        bytes[table + 8 * 4096..][..8].copy_from_slice(&block.to_le_bytes());
    });
    refused("the parent locator {", &|bytes| bytes[locator] ^= 1);
    refused("lies outside it", &|bytes| bytes[locator + 23] = 0x7f);
}
