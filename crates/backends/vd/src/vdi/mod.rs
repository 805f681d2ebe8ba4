//! VDI, VirtualBox's own image format: a header, a map with one 32-bit word for each block, then the blocks in the
//! order in which they were first written.
//!
//! **What we write.** Version 1.1, map and data aligned to 1 MiB, blocks of 1 MiB, as VirtualBox does.
//!
//! The header's count of allocated blocks is only a hint to us: the next free block follows from the map. How blocks are
//! allocated and made durable is told in [`crate::units`].

mod header;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::ops::Range;
use std::path::Path;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Format, Ids, Layout, Place, Step, Variant};
use crate::units::{MapFault, UnitFormat, Units, words_from, words_to};
pub(crate) use header::is_vdi;
use header::{BLOCKS_ALLOCATED_AT, HEADER_END, Header, MODIFICATION_AT, kind};

/// Map word: not in this image.
const FREE: u32 = u32::MAX;
/// Map word: reads as zeros.
const ZERO: u32 = u32::MAX - 1;

const BLOCK_SIZE: u32 = 1 << 20;
const ALIGN: u64 = 1 << 20;
/// Most words of a map that we load: 64 TiB in blocks of 1 MiB.
const MAX_BLOCKS: u32 = 1 << 26;

const RESTORE: &str = "restore the file from a copy";

/// A VDI image at work.
pub(crate) struct Vdi {
    units: Units<Header>,
    modification: Mutex<Uuid>,
}

impl Header {
    /// Bytes of the file from one block to the next.
    fn stride(&self) -> u64 {
        u64::from(self.block_size) + u64::from(self.block_extra)
    }
}

impl UnitFormat for Header {
    fn unit(&self) -> u64 {
        self.block_size.into()
    }

    fn place(&self, word: u32) -> Place {
        match word {
            FREE => Place::Absent,
            ZERO => Place::Zero,
            word => Place::File(self.storage(word).start + u64::from(self.block_extra)),
        }
    }

    fn storage(&self, word: u32) -> Range<u64> {
        let start = u64::from(self.data_offset) + u64::from(word) * self.stride();
        start..start + self.stride()
    }

    fn word_from(&self, end: u64) -> Option<u32> {
        let word = end.checked_sub(self.data_offset.into())?.div_ceil(self.stride());
        u32::try_from(word).ok().filter(|&word| word < ZERO)
    }

    fn free_word(&self) -> u32 {
        FREE
    }

    fn zero_word(&self) -> Option<u32> {
        Some(ZERO)
    }

    fn write_words(&self, file: &dyn FileIo, first: u32, words: &[u32]) -> io::Result<()> {
        file.write_at(u64::from(self.map_offset) + 4 * u64::from(first), &words_to(words))
    }

    fn write_end(&self, file: &dyn FileIo, end: u64) -> io::Result<()> {
        let count = self.word_from(end).unwrap_or(ZERO);
        file.write_at(BLOCKS_ALLOCATED_AT, &count.to_le_bytes())
    }
}

fn damaged(path: &Path, offset: u64, what: String, mend: &'static str) -> Error {
    Error::Damaged { path: path.to_owned(), offset, what, mend }
}

fn read_header(file: &dyn FileIo, path: &Path) -> Result<Header, Error> {
    let mut bytes = [0; HEADER_END];
    file.read_at(0, &mut bytes).map_err(|e| Error::host("read from", path, e))?;
    if !is_vdi(&bytes) {
        return Err(Error::WrongFormat {
            path: path.to_owned(),
            format: Format::Vdi,
            what: "the signature at offset 0x40 is missing".into(),
        });
    }
    Header::parse(&bytes).map_err(|refusal| {
        if refusal.unsupported {
            Error::Unsupported { path: path.to_owned(), what: refusal.what }
        } else {
            damaged(path, refusal.at, refusal.what, RESTORE)
        }
    })
}

fn some(uuid: Uuid) -> Option<Uuid> {
    (!uuid.is_nil()).then_some(uuid)
}

fn facts(header: &Header) -> Facts {
    let variant = match header.kind {
        kind::FIXED => Variant::Fixed,
        kind::UNDO | kind::DIFFERENCING => Variant::Differencing,
        _ => Variant::Dynamic,
    };
    Facts {
        uuid: some(header.uuid),
        modification: some(header.modification),
        parent: some(header.parent),
        parent_modification: some(header.parent_modification),
        comment: header.comment.clone(),
        ..Facts::new(variant, header.disk_size)
    }
}

/// Frees map words that name no place, or one that another word names; how many.
pub(crate) fn repair(file: &dyn FileIo, path: &Path) -> Result<u64, Error> {
    let host = |e| Error::host("repair", path, e);
    let header = read_header(file, path)?;
    let file_len = file.len().map_err(host)?;
    let map_offset = u64::from(header.map_offset);
    if map_offset + 4 * u64::from(header.blocks) > file_len || header.blocks > MAX_BLOCKS {
        return Err(damaged(path, map_offset, "the block map is cut short".into(), RESTORE));
    }
    let mut bytes = vec![0; 4 * header.blocks as usize];
    file.read_at(map_offset, &mut bytes).map_err(host)?;
    let mut taken = std::collections::HashSet::new();
    let mut bad = 0;
    for (block, word) in words_from(&bytes).into_iter().enumerate() {
        let Place::File(_) = header.place(word) else { continue };
        if header.storage(word).start >= file_len || !taken.insert(word) {
            header.write_words(file, block as u32, &[FREE]).map_err(host)?;
            bad += 1;
        }
    }
    file.sync().map_err(host)?;
    Ok(bad)
}

/// The facts in a VDI file's header, without its map.
pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    read_header(file, path).map(|h| facts(&h))
}

/// What a new VDI file is to be.
pub(crate) struct NewVdi {
    pub(crate) variant: Variant,
    pub(crate) size: u64,
    pub(crate) uuid: Uuid,
    /// UUID and modification UUID of the parent.
    pub(crate) parent: Option<(Uuid, Uuid)>,
    pub(crate) comment: String,
}

/// Writes a new image into an empty file.
pub(crate) fn create(file: &dyn FileIo, new: &NewVdi) -> Result<(), CreateError> {
    let blocks = new.size.div_ceil(BLOCK_SIZE.into());
    let Some(blocks) = u32::try_from(blocks).ok().filter(|&b| b <= MAX_BLOCKS) else {
        return Err(CreateError::TooLarge);
    };
    let map_offset = ALIGN;
    let data_offset = (map_offset + 4 * u64::from(blocks)).next_multiple_of(ALIGN);
    let fixed = new.variant == Variant::Fixed;
    let (parent, parent_modification) = new.parent.unwrap_or_default();
    let header = Header {
        kind: match new.variant {
            Variant::Differencing => kind::DIFFERENCING,
            v if v.is_fixed() => kind::FIXED,
            _ => kind::DYNAMIC,
        },
        flags: 0,
        comment: new.comment.clone(),
        map_offset: map_offset as u32,
        data_offset: u32::try_from(data_offset).map_err(|_| CreateError::TooLarge)?,
        disk_size: new.size,
        block_size: BLOCK_SIZE,
        block_extra: 0,
        blocks,
        blocks_allocated: if fixed { blocks } else { 0 },
        uuid: new.uuid,
        modification: Uuid::new_v4(),
        parent,
        parent_modification,
    };
    if fixed {
        file.reserve(0, data_offset + u64::from(blocks) * u64::from(BLOCK_SIZE))
            .map_err(CreateError::Host)?;
    } else {
        file.set_len(data_offset).map_err(CreateError::Host)?;
    }
    let mut words = Vec::with_capacity(1 << 20);
    let mut first = 0;
    while first < blocks {
        let end = blocks.min(first + (1 << 18));
        words.clear();
        for block in first..end {
            words.extend_from_slice(&if fixed { block } else { FREE }.to_le_bytes());
        }
        file.write_at(map_offset + 4 * u64::from(first), &words).map_err(CreateError::Host)?;
        first = end;
    }
    // The signature comes last: a file that was not finished is no image.
    file.sync().map_err(CreateError::Host)?;
    file.write_at(0, &header.to_bytes()).map_err(CreateError::Host)?;
    file.sync().map_err(CreateError::Host)
}

/// Why [`create`] failed.
pub(crate) enum CreateError {
    TooLarge,
    Host(io::Error),
}

impl Vdi {
    /// Reads and checks header and map.
    pub(crate) fn open(file: &dyn FileIo, path: &Path) -> Result<Self, Error> {
        let header = read_header(file, path)?;
        let host = |e| Error::host("read from", path, e);
        let file_len = file.len().map_err(host)?;
        let map_offset = u64::from(header.map_offset);
        let map_len = 4 * u64::from(header.blocks);
        // The file's size bounds what is allocated below.
        if map_offset + map_len > file_len {
            let what =
                format!("the block map of {map_len} bytes reaches past the file's end at 0x{file_len:x}");
            return Err(damaged(path, map_offset, what, RESTORE));
        }
        if header.blocks > MAX_BLOCKS {
            let what = format!("a block map of {} words, more than {MAX_BLOCKS}", header.blocks);
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        let mut bytes = vec![0; map_len as usize];
        file.read_at(map_offset, &mut bytes).map_err(host)?;
        let units = Units::open(header.clone(), words_from(&bytes), header.data_offset.into(), file_len);
        let units = units.map_err(|fault| {
            let (unit, what) = match fault {
                MapFault::Outside { unit, at } => (
                    unit,
                    format!("block {unit} should lie at 0x{at:x}, past the file's end at 0x{file_len:x}"),
                ),
                MapFault::Shared { unit, at } => {
                    (unit, format!("block {unit} shares its place at 0x{at:x} with another one"))
                }
            };
            damaged(path, map_offset + 4 * unit as u64, what, RESTORE)
        })?;
        Ok(Self { units, modification: Mutex::new(header.modification) })
    }
}

impl Layout for Vdi {
    fn facts(&self) -> Facts {
        Facts { modification: some(*self.modification.lock()), ..facts(self.units.format()) }
    }

    fn map(&self, _file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        Ok(self.units.map(offset, len))
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, file: &dyn FileIo, offset: u64, _len: u64) -> io::Result<Begin<'_>> {
        self.units.begin(file, offset)
    }

    fn modified(&self, file: &dyn FileIo) -> io::Result<()> {
        let uuid = Uuid::new_v4();
        file.write_at(MODIFICATION_AT, &uuid.to_bytes_le())?;
        *self.modification.lock() = uuid;
        Ok(())
    }

    fn unpack(&self, _file: &dyn FileIo, _at: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        None
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        self.units.flush(file)
    }

    fn is_dirty(&self) -> bool {
        self.units.is_dirty()
    }

    fn compact(&self, file: &dyn FileIo, child: bool, step: Step<'_>) -> io::Result<bool> {
        // The blocks of a fixed image stay where they are.
        let growing = self.units.format().kind != kind::FIXED;
        if growing {
            self.units.compact(file, child, step)?;
        }
        Ok(growing)
    }

    /// As long as the map has room in front of the data.
    fn grow(&self, file: &dyn FileIo, size: u64) -> io::Result<bool> {
        let header = self.units.format();
        let Ok(blocks) = u32::try_from(size.div_ceil(header.block_size.into())) else { return Ok(false) };
        let map_end = u64::from(header.map_offset) + 4 * u64::from(blocks);
        if size < header.disk_size || map_end > header.data_offset.into() || blocks > MAX_BLOCKS {
            return Ok(false);
        }
        let mut words = Vec::new();
        let mut end = self.units.end();
        for _ in header.blocks..blocks {
            words.push(match header.kind {
                kind::FIXED => {
                    let Some(word) = header.word_from(end) else { return Ok(false) };
                    let storage = header.storage(word);
                    file.reserve(storage.start, storage.end - storage.start)?;
                    file.zero(storage.start, storage.end - storage.start)?;
                    end = storage.end;
                    word
                }
                _ => FREE,
            });
        }
        header.write_words(file, header.blocks, &words)?;
        file.sync()?;
        // Size and number of blocks lie in one sector.
        let new = Header { disk_size: size, blocks: blocks.max(header.blocks), ..header.clone() };
        file.write_at(0, &new.to_bytes()[..512.min(HEADER_END)])?;
        file.sync()?;
        Ok(true)
    }

    fn set_ids(&self, file: &dyn FileIo, ids: &Ids) -> io::Result<bool> {
        let fields = [
            (MODIFICATION_AT - 16, ids.uuid),
            (MODIFICATION_AT, ids.modification),
            (MODIFICATION_AT + 16, ids.parent),
            (MODIFICATION_AT + 32, ids.parent_modification),
        ];
        for (at, uuid) in fields {
            if let Some(uuid) = uuid {
                file.write_at(at, &uuid.to_bytes_le())?;
            }
        }
        Ok(true)
    }
}
