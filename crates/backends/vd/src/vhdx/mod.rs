//! VHDX images of the types fixed, dynamic and differencing. All integers are little endian. Source: Microsoft "MS-VHDX: Virtual Hard Disk v2 File
//! Format".
//!
//! ```text
//! 0      "vhdxfile"
//! 64K, 128K    header: "head", checksum, sequence number u64 (8), file GUID (16), data GUID (32), log GUID (48), log version u16,
//!              version u16 (66), log length u32 (68), log offset u64 (72)                             (the newer one counts)
//! 192K, 256K   regions: "regi", checksum, count; each GUID, offset u64, length u32, required u32
//! ```
//!
//! A block table word holds a state (bits 0 to 2) and an offset in MiB (from bit 20 on); after the words of every 4 GiB or so there
//! is one for a bitmap block of 1 MiB, which only differencing images use: it has a bit for each sector (lowest first) that tells, in
//! blocks that are partially present, whether the image has it or its parent. New blocks of ours are present as a whole; sectors of
//! blocks that others left in parts get their bits as they are written. A parent is known by its data GUID, which changes whenever
//! it is written; it stands in the metadata item "parent locator", with paths that are hints. We change words in place, each of which is whole in its sector, after
//! the data it names have become durable, and so never write the log; one that another program has left is carried out before an
//! image is written, and taken into account when it is read.

mod crc32c;
mod log;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::Range;
use std::path::Path;

use parking_lot::Mutex;
use uuid::{Uuid, uuid};

use crate::bitmaps::{Bitmaps, First};
use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Format, Ids, Layout, NewParent, Place, Step, Variant, sums_agree};
use crate::units::{MapFault, UnitFormat, Units};
use crc32c::crc32c;
use log::{Log, MAX_LOG, Replayed};

const MIB: u64 = 1 << 20;
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
const REGION_LEN: usize = 64 << 10;
const HEADER_LEN: usize = 4096;
/// The format's limit.
const MAX_SIZE: u64 = 64 << 40;
const NEW_BLOCK: u64 = 8 * MIB;
/// Of differencing images: what a first write to a block copies.
const NEW_CHILD_BLOCK: u64 = MIB;
/// Largest parent locator that is read.
const MAX_LOCATOR: usize = 64 << 10;
const LOG_LEN: u64 = MIB;
const RESTORE: &str = "restore the file from a copy";

const BLOCK_TABLE: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const PHYSICAL_SECTOR_SIZE: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const PARENT_LOCATOR: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");
/// The only type of parent locators.
const VHDX_LOCATOR: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
const LINKAGE: &str = "parent_linkage";

/// States of a block.
mod state {
    pub(super) const NOT_PRESENT: u32 = 0;
    pub(super) const UNDEFINED: u32 = 1;
    pub(super) const ZERO: u32 = 2;
    pub(super) const UNMAPPED: u32 = 3;
    pub(super) const PRESENT: u32 = 6;
    pub(super) const PARTIAL: u32 = 7;
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn guid_at(bytes: &[u8], at: usize) -> Uuid {
    let mut raw = [0; 16];
    if let Some(found) = bytes.get(at..at + 16) {
        raw.copy_from_slice(found);
    }
    Uuid::from_bytes_le(raw)
}

fn damaged(path: &Path, offset: u64, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend: RESTORE }
}

/// The newer of the two headers that are sound, and which one it is.
fn read_header(file: &dyn FileIo, path: &Path) -> Result<(usize, Vec<u8>), Error> {
    let host = |e| Error::host("read from", path, e);
    let mut magic = [0; 8];
    file.read_at(0, &mut magic).map_err(host)?;
    if &magic != b"vhdxfile" {
        let what = "the signature at offset 0x0 is missing".into();
        return Err(Error::WrongFormat { path: path.to_owned(), format: Format::Vhdx, what });
    }
    let mut found: Option<(usize, Vec<u8>)> = None;
    for (index, at) in HEADERS.into_iter().enumerate() {
        let mut raw = vec![0; HEADER_LEN];
        file.read_at(at, &mut raw).map_err(host)?;
        let sound = raw.starts_with(b"head") && sums_agree(u32_at(&raw, 4), crc32c(&raw, 4));
        if sound && found.as_ref().is_none_or(|(_, other)| u64_at(other, 8) < u64_at(&raw, 8)) {
            found = Some((index, raw));
        }
    }
    let (index, raw) = found.ok_or_else(|| damaged(path, HEADERS[0], "neither header is sound".into()))?;
    if raw[66..68] != [1, 0] {
        return Err(Error::unsupported(path, "VHDX images of another version than 1"));
    }
    Ok((index, raw))
}

/// The log that has to be carried out.
fn pending_log(header: &[u8], file: &dyn FileIo, path: &Path) -> Result<Option<Log>, Error> {
    let guid: [u8; 16] = header[48..64].try_into().unwrap_or_default();
    let (len, at) = (u64::from(u32_at(header, 68)), u64_at(header, 72));
    if guid == [0; 16] || len == 0 {
        return Ok(None);
    }
    let file_len = file.len().map_err(|e| Error::host("read from", path, e))?;
    if header[64..66] != [0, 0] || len > MAX_LOG || !len.is_multiple_of(4096) {
        return Err(damaged(path, 68, format!("a log of {len} bytes, or of another version than 0")));
    }
    if !at.is_multiple_of(MIB) || at.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(damaged(path, 72, format!("the log at 0x{at:x} lies outside the file")));
    }
    Ok(Some(Log { at, len, guid }))
}

/// What the metadata say.
#[derive(Clone, Debug)]
struct Meta {
    block: u64,
    fixed: bool,
    size: u64,
    table: u64,
    table_len: u64,
    /// Block words between two words for bitmaps.
    ratio: u64,
    /// Behind everything that is no block.
    data: u64,
    sector: u64,
    /// Of differencing images.
    parent: Option<Parent>,
}

/// What a differencing image says of its parent.
#[derive(Clone, Debug)]
struct Parent {
    /// The parent's data GUID.
    linkage: Option<Uuid>,
    /// Where the text of that lies in the file, and its length.
    linkage_at: u64,
    linkage_len: usize,
    hint: Option<String>,
}

/// Reads a parent locator: type (16), two bytes, count of entries u16 (18); entries from 20 on: offsets of name and value u32, their
/// lengths u16; texts in UTF-16. `at` is where it lies in the file.
fn read_locator(raw: &[u8], at: u64, path: &Path) -> Result<Parent, Error> {
    if guid_at(raw, 0) != VHDX_LOCATOR {
        return Err(Error::unsupported(path, format!("the parent locator {{{}}}", guid_at(raw, 0))));
    }
    let count = usize::from(raw.get(18..20).map_or(0, |b| u16::from_le_bytes([b[0], b[1]])));
    let text = |at: u32, len: u16| -> Option<String> {
        let bytes = raw.get(at as usize..)?.get(..usize::from(len))?;
        let units: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        Some(String::from_utf16_lossy(&units))
    };
    let mut parent = Parent { linkage: None, linkage_at: 0, linkage_len: 0, hint: None };
    let mut relative = None;
    for entry in raw.get(20..).unwrap_or_default().chunks_exact(12).take(count) {
        let len = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        let value_at = u32_at(entry, 4);
        let (Some(name), Some(value)) = (text(u32_at(entry, 0), len(8)), text(value_at, len(10))) else {
            return Err(damaged(path, at, "an entry of the parent locator lies outside it".into()));
        };
        match name.as_str() {
            LINKAGE => {
                parent.linkage =
                    Uuid::try_parse(value.trim_matches(['{', '}'])).ok().filter(|id| !id.is_nil());
                (parent.linkage_at, parent.linkage_len) = (at + u64::from(value_at), len(10).into());
            }
            "relative_path" => relative = Some(value),
            "absolute_win32_path" | "volume_path" if parent.hint.is_none() => parent.hint = Some(value),
            _ => {}
        }
    }
    parent.hint = parent.hint.or(relative);
    Ok(parent)
}

/// The parent locator of a new image.
fn new_locator(parent: &NewParent) -> Vec<u8> {
    let path = parent.path.display().to_string();
    let name = parent.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = [
        (LINKAGE, linkage_text(parent.modification)),
        ("relative_path", format!(".\\{name}")),
        ("absolute_win32_path", path),
    ];
    let wide =
        |text: &str| text.encode_utf16().take(16 << 10).flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let (mut head, mut texts) = (VHDX_LOCATOR.to_bytes_le().to_vec(), Vec::new());
    head.extend_from_slice(&[0, 0, entries.len() as u8, 0]);
    let start = head.len() + 12 * entries.len();
    for (name, value) in entries {
        let (name, value) = (wide(name), wide(&value));
        let at = start + texts.len();
        head.extend_from_slice(&(at as u32).to_le_bytes());
        head.extend_from_slice(&((at + name.len()) as u32).to_le_bytes());
        head.extend_from_slice(&(name.len() as u16).to_le_bytes());
        head.extend_from_slice(&(value.len() as u16).to_le_bytes());
        texts.extend(name);
        texts.extend(value);
    }
    head.extend(texts);
    head
}

fn linkage_text(id: Uuid) -> String {
    format!("{{{id}}}")
}

fn regions(file: &dyn FileIo, path: &Path) -> Result<Vec<u8>, Error> {
    for at in REGIONS {
        let mut raw = vec![0; REGION_LEN];
        file.read_at(at, &mut raw).map_err(|e| Error::host("read from", path, e))?;
        if raw.starts_with(b"regi") && sums_agree(u32_at(&raw, 4), crc32c(&raw, 4)) {
            return Ok(raw);
        }
    }
    Err(damaged(path, REGIONS[0], "neither region table is sound".into()))
}

fn read_meta(file: &dyn FileIo, path: &Path, header: &[u8]) -> Result<Meta, Error> {
    let host = |e| Error::host("read from", path, e);
    let file_len = file.len().map_err(host)?;
    let raw = regions(file, path)?;
    let (mut table, mut metadata) = (None, None);
    let mut data = (REGIONS[1] + REGION_LEN as u64)
        .max(u64_at(header, 72).saturating_add(u64::from(u32_at(header, 68))));
    for entry in raw[16..].chunks_exact(32).take(u32_at(&raw, 8) as usize) {
        let (at, len) = (u64_at(entry, 16), u64::from(u32_at(entry, 24)));
        if at < MIB || !at.is_multiple_of(MIB) || at.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(damaged(path, REGIONS[0], format!("a region at 0x{at:x} lies outside the file")));
        }
        match guid_at(entry, 0) {
            BLOCK_TABLE => table = Some((at, len)),
            METADATA => metadata = Some((at, len)),
            other if u32_at(entry, 28) & 1 != 0 => {
                return Err(Error::unsupported(path, format!("the VHDX region {{{other}}}")));
            }
            _ => {}
        }
        data = data.max(at + len);
    }
    let (Some((table, table_len)), Some((metadata, metadata_len))) = (table, metadata) else {
        return Err(damaged(path, REGIONS[0], "the block table or the metadata are missing".into()));
    };
    let mut raw = vec![0; REGION_LEN.min(metadata_len as usize)];
    file.read_at(metadata, &mut raw).map_err(host)?;
    if !raw.starts_with(b"metadata") || raw.len() < 32 {
        return Err(damaged(
            path,
            metadata,
            "the metadata's signature is missing, or their table is cut short".into(),
        ));
    }
    let count = usize::from(u16::from_le_bytes([raw[10], raw[11]]));
    let (mut parameters, mut size, mut sector, mut locator) = (None, None, None, None);
    for entry in raw.get(32..).unwrap_or_default().chunks_exact(32).take(count) {
        let (at, len, flags) = (u64::from(u32_at(entry, 16)), u32_at(entry, 20), u32_at(entry, 24));
        let mut item = [0; 16];
        let short = &mut item[..len.min(16) as usize];
        if at + u64::from(len) > metadata_len {
            return Err(damaged(path, metadata + at, "a metadata item lies outside the region".into()));
        }
        file.read_at(metadata + at, short).map_err(host)?;
        match guid_at(entry, 0) {
            FILE_PARAMETERS => parameters = Some((u64::from(u32_at(&item, 0)), u32_at(&item, 4))),
            DISK_SIZE => size = Some(u64_at(&item, 0)),
            SECTOR_SIZE => sector = Some(u64::from(u32_at(&item, 0))),
            PARENT_LOCATOR => {
                let mut bytes = vec![0; (len as usize).min(MAX_LOCATOR)];
                file.read_at(metadata + at, &mut bytes).map_err(host)?;
                locator = Some((metadata + at, bytes));
            }
            DISK_ID | PHYSICAL_SECTOR_SIZE => {}
            // Flag 2: who does not know the item must not open the file.
            other if flags & 4 != 0 => {
                return Err(Error::unsupported(path, format!("the VHDX metadata item {{{other}}}")));
            }
            _ => {}
        }
    }
    let (Some((block, flags)), Some(size), Some(sector)) = (parameters, size, sector) else {
        return Err(damaged(path, metadata, "the disk's size or its parameters are missing".into()));
    };
    let parent = match (flags & 2 != 0, locator) {
        (false, _) => None,
        (true, Some((at, raw))) => Some(read_locator(&raw, at, path)?),
        (true, None) => return Err(damaged(path, metadata, "the parent locator is missing".into())),
    };
    if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
        return Err(damaged(path, metadata, format!("blocks of {block} bytes")));
    }
    if sector != 512 && sector != 4096 {
        return Err(damaged(path, metadata, format!("sectors of {sector} bytes")));
    }
    if size > MAX_SIZE || !size.is_multiple_of(512) {
        return Err(damaged(path, metadata, format!("a disk of {size} bytes")));
    }
    let ratio = (sector << 23) / block;
    let meta = Meta { block, fixed: flags & 1 != 0, size, table, table_len, ratio, data, sector, parent };
    let needed = meta.word_index(size.div_ceil(block).saturating_sub(1)) + 1;
    if 8 * needed > table_len {
        return Err(damaged(path, table, format!("a block table of {table_len} bytes for {needed} words")));
    }
    Ok(meta)
}

impl Meta {
    /// Place of a block's word in the table.
    fn word_index(&self, block: u64) -> u64 {
        block + block / self.ratio
    }

    /// Place of the word for the bitmap of a block.
    fn bitmap_word(&self, block: u64) -> u64 {
        (block / self.ratio) * (self.ratio + 1) + self.ratio
    }

    fn facts(&self, header: &[u8]) -> Facts {
        let variant = match (&self.parent, self.fixed) {
            (Some(_), _) => Variant::Differencing,
            (None, true) => Variant::Fixed,
            (None, false) => Variant::Dynamic,
        };
        let mut facts = Facts::new(variant, self.size);
        // The format has no name for an image; the registry has.
        facts.modification = Some(guid_at(header, 32)).filter(|id| !id.is_nil());
        if let Some(parent) = &self.parent {
            facts.parent_modification = parent.linkage;
            facts.parent_hint.clone_from(&parent.hint);
        }
        facts
    }
}

pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    let (_, header) = read_header(file, path)?;
    let meta = match pending_log(&header, file, path)? {
        None => read_meta(file, path, &header)?,
        Some(log) => {
            let updates = log.updates(file).map_err(|e| Error::host("read the log of", path, e))?;
            read_meta(&Replayed { file, updates }, path, &header)?
        }
    };
    Ok(meta.facts(&header))
}

/// In memory a word is 32 bits: the place in MiB above bit 3, and the state.
impl UnitFormat for Meta {
    fn unit(&self) -> u64 {
        self.block
    }

    fn place(&self, word: u32) -> Place {
        match word & 7 {
            state::PRESENT | state::PARTIAL => Place::File(u64::from(word >> 3) * MIB),
            state::NOT_PRESENT | state::UNDEFINED => Place::Absent,
            _ => Place::Zero,
        }
    }

    fn storage(&self, word: u32) -> Range<u64> {
        let start = u64::from(word >> 3) * MIB;
        start..start + self.block
    }

    fn word_from(&self, end: u64) -> Option<u32> {
        let place = u32::try_from(end.div_ceil(MIB)).ok().filter(|&at| at < 1 << 29)?;
        Some(place << 3 | state::PRESENT)
    }

    fn free_word(&self) -> u32 {
        state::NOT_PRESENT
    }

    fn zero_word(&self) -> Option<u32> {
        Some(state::ZERO)
    }

    fn write_words(&self, file: &dyn FileIo, first: u32, words: &[u32]) -> io::Result<()> {
        let first = u64::from(first);
        // Words for bitmaps stand between.
        let mut at = 0;
        while at < words.len() {
            let block = first + at as u64;
            let count = (self.ratio - block % self.ratio).min((words.len() - at) as u64) as usize;
            let wide = words[at..at + count].iter();
            let bytes: Vec<u8> =
                wide.flat_map(|&w| (u64::from(w & 7) | u64::from(w >> 3) << 20).to_le_bytes()).collect();
            file.write_at(self.table + 8 * self.word_index(block), &bytes)?;
            at += count;
        }
        Ok(())
    }
}

/// A VHDX image at work.
pub(crate) struct Vhdx {
    units: Units<Meta>,
    partial: Option<Partial>,
    /// The header that counts, and which of the two it is.
    header: Mutex<(usize, Vec<u8>)>,
}

/// The blocks of a differencing image of which it has a part.
struct Partial {
    bitmaps: Bitmaps,
    /// Where their bitmaps lie.
    places: HashMap<u64, u64>,
}

impl Vhdx {
    /// Reads and checks the metadata. A log is carried out if the image is to be written.
    pub(crate) fn open(file: &dyn FileIo, path: &Path, writable: bool) -> Result<Self, Error> {
        let replay = |e| Error::host("carry out the log of", path, e);
        let (index, mut header) = read_header(file, path)?;
        let meta;
        let (units, partial) = match pending_log(&header, file, path)? {
            Some(log) if writable => {
                log.updates(file).and_then(|updates| updates.apply(file)).map_err(replay)?;
                header[48..64].fill(0);
                let next = write_header(file, index, &mut header).map_err(replay)?;
                meta = read_meta(file, path, &header)?;
                let (units, partial) = open_units(file, path, meta)?;
                return Ok(Self { units, partial, header: Mutex::new((next, header)) });
            }
            Some(log) => {
                let updates = log.updates(file).map_err(replay)?;
                let file = Replayed { file, updates };
                meta = read_meta(&file, path, &header)?;
                open_units(&file, path, meta)?
            }
            None => {
                meta = read_meta(file, path, &header)?;
                open_units(file, path, meta)?
            }
        };
        Ok(Self { units, partial, header: Mutex::new((index, header)) })
    }
}

fn open_units(file: &dyn FileIo, path: &Path, meta: Meta) -> Result<(Units<Meta>, Option<Partial>), Error> {
    let host = |e| Error::host("read from", path, e);
    let file_len = file.len().map_err(host)?;
    let blocks = meta.size.div_ceil(meta.block);
    let table_words = meta.word_index(blocks).max(meta.bitmap_word(blocks.saturating_sub(1))) + 1;
    let mut bytes = vec![0; meta.table_len.min(8 * table_words) as usize];
    file.read_at(meta.table, &mut bytes).map_err(host)?;
    let mut words = Vec::with_capacity(blocks as usize);
    let bitmap_len = meta.block / meta.sector / 8;
    let (mut places, mut bitmap_blocks) = (HashMap::new(), BTreeSet::new());
    for block in 0..blocks {
        let at = 8 * meta.word_index(block);
        let word = u64_at(&bytes, at as usize);
        let (state, place) = ((word & 7) as u32, word >> 20);
        let known = [state::NOT_PRESENT, state::UNDEFINED, state::ZERO, state::UNMAPPED, state::PRESENT];
        let partial = state == state::PARTIAL && meta.parent.is_some();
        if !(known.contains(&state) || partial) || place >= 1 << 29 {
            let what = format!("block {block} has the state {state} at MiB {place}");
            return Err(damaged(path, meta.table + at, what));
        }
        // Where a block without content once lay does not matter.
        if partial {
            let at = 8 * meta.bitmap_word(block);
            let word = u64_at(&bytes, at as usize);
            let bitmap = (word >> 20) * MIB;
            if (word & 7) as u32 != state::PRESENT
                || bitmap < meta.data
                || bitmap.saturating_add(MIB) > file_len
            {
                let what =
                    format!("block {block} is present in parts, and its bitmap at 0x{bitmap:x} is not there");
                return Err(damaged(path, meta.table + at, what));
            }
            bitmap_blocks.insert(bitmap);
            places.insert(block, bitmap + (block % meta.ratio) * bitmap_len);
        }
        let here = [state::PRESENT, state::PARTIAL].contains(&state);
        words.push(if here { (place as u32) << 3 | state } else { state });
    }
    // No block may lie where a bitmap does.
    let stored = words.iter().filter(|word| matches!(meta.place(**word), Place::File(_)));
    if let Some(word) = stored.into_iter().find(|word| {
        let Range { start, end } = meta.storage(**word);
        bitmap_blocks.range(start.saturating_sub(MIB - 1)..end).next().is_some()
    }) {
        let what = format!("the block at 0x{:x} shares its place with a bitmap", meta.storage(*word).start);
        return Err(damaged(path, meta.table, what));
    }
    let partial = (!places.is_empty()).then(|| Partial {
        bitmaps: Bitmaps::new(meta.block, meta.sector, bitmap_len, First::Lowest),
        places,
    });
    let (table, start) = (meta.table, meta.data);
    let index = meta.clone();
    let units = Units::open(meta, words, start, file_len).map_err(|fault| {
        let (unit, what) = match fault {
            MapFault::Outside { unit, at } => {
                (unit, format!("block {unit} at 0x{at:x} lies outside the data of the file"))
            }
            MapFault::Shared { unit, at } => {
                (unit, format!("block {unit} shares its place at 0x{at:x} with another one"))
            }
        };
        damaged(path, table + 8 * index.word_index(unit as u64), what)
    })?;
    if let Some(last) = bitmap_blocks.last() {
        units.keep_until(last + MIB);
    }
    Ok((units, partial))
}

/// Writes `header` as the newer one into the place of the older; which place that is.
fn write_header(file: &dyn FileIo, index: usize, header: &mut [u8]) -> io::Result<usize> {
    let sequence = u64_at(header, 8).wrapping_add(1);
    header[8..16].copy_from_slice(&sequence.to_le_bytes());
    let sum = crc32c(header, 4);
    header[4..8].copy_from_slice(&sum.to_le_bytes());
    let next = 1 - index;
    file.write_at(HEADERS[next], header)?;
    file.sync()?;
    Ok(next)
}

/// Writes a new image into an empty file; `Ok(false)` if it would be too large.
pub(crate) fn create(
    file: &dyn FileIo,
    size: u64,
    variant: Variant,
    parent: Option<&NewParent>,
) -> io::Result<bool> {
    if size > MAX_SIZE {
        return Ok(false);
    }
    let fixed = variant.is_fixed();
    let new_block = if parent.is_some() { NEW_CHILD_BLOCK } else { NEW_BLOCK };
    let ratio = (512u64 << 23) / new_block;
    let blocks = size.div_ceil(new_block);
    let words = match parent {
        // Every bitmap has its word.
        Some(_) => blocks.div_ceil(ratio) * (ratio + 1),
        None => blocks + (blocks - 1) / ratio,
    };
    let log_at = MIB;
    let metadata_at = log_at + LOG_LEN;
    let table_at = metadata_at + MIB;
    let table_len = (8 * words).next_multiple_of(MIB);
    let data = table_at + table_len;
    let end = if fixed { data + blocks * new_block } else { data };
    if fixed {
        file.reserve(0, end)?;
        let mut bytes = vec![0; 8 * words as usize];
        for block in 0..blocks {
            let at = 8 * (block + block / ratio) as usize;
            let word = (data + block * new_block) | u64::from(state::PRESENT);
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        file.write_at(table_at, &bytes)?;
    } else {
        file.set_len(end)?;
    }
    // Metadata: a table of five items or six, which lie 64 KiB behind it.
    let mut table = vec![0; 32];
    table[..8].copy_from_slice(b"metadata");
    table[10] = if parent.is_some() { 6 } else { 5 };
    let mut items = Vec::new();
    let mut item = |guid: Uuid, flags: u32, bytes: &[u8]| {
        table.extend_from_slice(&guid.to_bytes_le());
        for word in [REGION_LEN as u32 + items.len() as u32, bytes.len() as u32, flags, 0] {
            table.extend_from_slice(&word.to_le_bytes());
        }
        items.extend_from_slice(bytes);
    };
    // Flags: 2 about the virtual disk, 4 required.
    let parameters = (new_block as u32, u32::from(fixed) | u32::from(parent.is_some()) << 1);
    item(FILE_PARAMETERS, 4, &[parameters.0.to_le_bytes(), parameters.1.to_le_bytes()].concat());
    item(DISK_SIZE, 6, &size.to_le_bytes());
    item(DISK_ID, 6, &Uuid::new_v4().to_bytes_le());
    item(SECTOR_SIZE, 6, &512u32.to_le_bytes());
    item(PHYSICAL_SECTOR_SIZE, 6, &4096u32.to_le_bytes());
    if let Some(parent) = parent {
        item(PARENT_LOCATOR, 4, &new_locator(parent));
    }
    file.write_at(metadata_at, &table)?;
    file.write_at(metadata_at + REGION_LEN as u64, &items)?;
    let mut regions = vec![0; REGION_LEN];
    let mut put = |at: usize, bytes: &[u8]| regions[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"regi");
    put(8, &2u32.to_le_bytes());
    for (i, (guid, at, len)) in
        [(BLOCK_TABLE, table_at, table_len), (METADATA, metadata_at, MIB)].into_iter().enumerate()
    {
        put(16 + 32 * i, &guid.to_bytes_le());
        put(32 + 32 * i, &at.to_le_bytes());
        put(40 + 32 * i, &(len as u32).to_le_bytes());
        put(44 + 32 * i, &1u32.to_le_bytes());
    }
    let sum = crc32c(&regions, 4);
    regions[4..8].copy_from_slice(&sum.to_le_bytes());
    for at in REGIONS {
        file.write_at(at, &regions)?;
    }
    let mut header = vec![0; HEADER_LEN];
    header[..4].copy_from_slice(b"head");
    header[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
    header[32..48].copy_from_slice(&Uuid::new_v4().to_bytes_le());
    header[66] = 1;
    header[68..72].copy_from_slice(&(LOG_LEN as u32).to_le_bytes());
    header[72..80].copy_from_slice(&log_at.to_le_bytes());
    write_header(file, 1, &mut header)?;
    write_header(file, 0, &mut header)?;
    // The signature comes last: a file that was not finished is no image.
    let mut identifier = b"vhdxfile".to_vec();
    identifier.extend("Boxwood".encode_utf16().flat_map(u16::to_le_bytes));
    file.write_at(0, &identifier)?;
    file.sync()?;
    Ok(true)
}

impl Layout for Vhdx {
    fn facts(&self) -> Facts {
        self.units.format().facts(&self.header.lock().1)
    }

    fn map(&self, file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        let Some(Partial { bitmaps, places }) = &self.partial else { return Ok(self.units.map(offset, len)) };
        let block = self.units.format().block;
        let within = offset % block;
        let extent = self.units.map(offset, len.min(block - within));
        match (extent.place, places.get(&(offset / block))) {
            (Place::File(at), Some(&bitmap)) => {
                let (own, len) = bitmaps.run(file, offset / block, bitmap, within, extent.len)?;
                Ok(Extent { place: if own { Place::File(at) } else { Place::Absent }, len })
            }
            _ => Ok(extent),
        }
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        None
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Begin<'_>> {
        let block = self.units.format().block;
        let (number, within) = (offset / block, offset % block);
        if let Some(Partial { bitmaps, places }) = &self.partial
            && let Some(&bitmap) = places.get(&number)
            && let Place::File(data) = self.units.map(offset - within, 1).place
        {
            return bitmaps.begin(file, number, bitmap, data, within, len);
        }
        self.units.begin(file, offset)
    }

    /// Both GUIDs are renewed, by which children and caches tell that the file has changed.
    fn modified(&self, file: &dyn FileIo) -> io::Result<()> {
        let mut header = self.header.lock();
        let (index, raw) = &mut *header;
        raw[16..32].copy_from_slice(&Uuid::new_v4().to_bytes_le());
        raw[32..48].copy_from_slice(&Uuid::new_v4().to_bytes_le());
        *index = write_header(file, *index, raw)?;
        Ok(())
    }

    fn unpack(&self, _file: &dyn FileIo, _unit: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        if let Some(partial) = &self.partial {
            partial.bitmaps.flush(file)?;
        }
        self.units.flush(file)
    }

    fn is_dirty(&self) -> bool {
        self.units.is_dirty() || self.partial.as_ref().is_some_and(|p| p.bitmaps.is_dirty())
    }

    /// The parent is known by its data GUID alone.
    fn set_ids(&self, file: &dyn FileIo, ids: &Ids) -> io::Result<bool> {
        let parent = self.units.format().parent.as_ref();
        if ids.uuid.is_some()
            || (ids.parent.is_some() || ids.parent_modification.is_some()) && parent.is_none()
        {
            return Ok(false);
        }
        if let (Some(id), Some(parent)) = (ids.parent_modification, parent) {
            let text: Vec<u8> = linkage_text(id).encode_utf16().flat_map(u16::to_le_bytes).collect();
            if parent.linkage_len != text.len() {
                return Ok(false);
            }
            file.write_at(parent.linkage_at, &text)?;
        }
        if let Some(id) = ids.modification {
            let mut header = self.header.lock();
            let (index, raw) = &mut *header;
            raw[32..48].copy_from_slice(&id.to_bytes_le());
            *index = write_header(file, *index, raw)?;
        }
        Ok(true)
    }

    fn compact(&self, file: &dyn FileIo, child: bool, step: Step<'_>) -> io::Result<bool> {
        // Blocks in parts do not move: what is zeros in them may be the parent's.
        let growing = !self.units.format().fixed && self.partial.is_none();
        if growing {
            self.units.compact(file, child, step)?;
        }
        Ok(growing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::MemoryFile;

    /// What a new image says when `change` was made at `at` in the structure of `len` bytes that lies there, with its checksum put right.
    fn opened(places: &[u64], len: usize, at: usize, change: &[u8]) -> Result<(), Error> {
        let file = MemoryFile::default();
        assert!(create(&file, 16 * MIB, Variant::Dynamic, None).unwrap());
        for place in places {
            let mut raw = vec![0; len];
            file.read_at(*place, &mut raw).unwrap();
            raw[at..at + change.len()].copy_from_slice(change);
            let sum = crc32c(&raw, 4);
            raw[4..8].copy_from_slice(&sum.to_le_bytes());
            file.write_at(*place, &raw).unwrap();
        }
        Vhdx::open(&file, Path::new("t"), true).map(drop)
    }

    #[test]
    fn structures_with_right_checksums_and_impossible_places_are_refused() {
        // As it was made.
        opened(&REGIONS, REGION_LEN, 12, &[0; 4]).unwrap();
        let metadata_len = 16 + 32 + 24;
        for len in [0, 7, 8, 11, 31] {
            let error = opened(&REGIONS, REGION_LEN, metadata_len, &u32::to_le_bytes(len)).unwrap_err();
            assert!(error.to_string().contains("metadata"), "{error}");
        }
        // A log without an id is not read, wherever it lies, but data cannot lie behind it.
        let _ = opened(&HEADERS, HEADER_LEN, 72, &[0xff; 8]);
        let pending = [&[1; 16][..], &[0, 0, 1, 0], &(MIB as u32).to_le_bytes(), &[0xff; 8]].concat();
        assert!(opened(&HEADERS, HEADER_LEN, 48, &pending).is_err());
    }
}
