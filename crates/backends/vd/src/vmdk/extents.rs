//! Images whose descriptor is a file of its own: split ones, flat ones, raw disks of the host.
//!
//! The files of extents lie in the descriptor's directory. Other places are followed only to devices, and to files where the
//! descriptor says that it stands for a raw disk: a descriptor that came with a download must not reach the user's files.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::descriptor::{Descriptor, ExtentKind, ExtentLine, NewVmdk, new_descriptor};
use super::header::{MAX_DESCRIPTOR, SECTOR, Tables, damaged, open_units, read_header};
use super::{Opener, create_sparse, facts, renew};
use crate::error::Error;
use crate::file::{FileIo, FileSet};
use crate::format::{Allocation, Begin, Extent, Facts, Ids, Layout, Place, Variant};
use crate::units::Units;

const MAGIC: &[u8] = b"# Disk DescriptorFile";
/// Largest piece of a split image.
const SPLIT: u64 = 2047 << 20;
/// Most files of an image: 4 TiB in pieces.
const MAX_EXTENTS: usize = 2100;

/// A stretch of the disk.
struct Piece {
    start: u64,
    end: u64,
    store: Store,
}

enum Store {
    Zero,
    /// Number of the file in the set, and where the stretch starts in it.
    Flat {
        file: usize,
        offset: u64,
    },
    Sparse {
        file: usize,
        units: Units<Tables>,
    },
}

/// An image of several files at work.
struct Extents {
    set: Arc<FileSet>,
    /// In the order of their places, without gaps.
    pieces: Vec<Piece>,
    descriptor: Descriptor,
    modification: Mutex<Option<Uuid>>,
}

pub(super) fn is_descriptor(file: &dyn FileIo, path: &Path) -> Result<bool, Error> {
    let mut head = [0; MAGIC.len()];
    file.read_at(0, &mut head).map_err(|e| Error::host("read from", path, e))?;
    // Some makers write the line in lower case, or blanks in front.
    Ok(head.eq_ignore_ascii_case(MAGIC))
}

fn read(file: &dyn FileIo, path: &Path) -> Result<(Descriptor, Vec<ExtentLine>), Error> {
    let host = |e| Error::host("read from", path, e);
    let len = file.len().map_err(host)?;
    if len > MAX_DESCRIPTOR {
        return Err(damaged(path, 0, format!("a descriptor of {len} bytes")));
    }
    let mut text = vec![0; len as usize];
    file.read_at(0, &mut text).map_err(host)?;
    let descriptor = Descriptor::parse(&text);
    let lines =
        descriptor.extents().map_err(|line| damaged(path, 0, format!("bad extent line \"{line}\"")))?;
    if lines.is_empty() || lines.len() > MAX_EXTENTS {
        return Err(damaged(path, 0, format!("{} extents", lines.len())));
    }
    let sum = lines.iter().try_fold(0u64, |sum, line| sum.checked_add(line.sectors));
    if sum.is_none_or(|sectors| sectors > 1 << 44) {
        return Err(damaged(path, 0, "extents that are too large".into()));
    }
    Ok((descriptor, lines))
}

pub(super) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    let (descriptor, lines) = read(file, path)?;
    Ok(facts(&descriptor, lines.iter().map(|l| l.sectors * SECTOR).sum()))
}

fn is_raw_disk(descriptor: &Descriptor) -> bool {
    let kind = descriptor.value("createType").unwrap_or_default();
    ["fullDevice", "partitionedDevice"].iter().any(|k| kind.eq_ignore_ascii_case(k))
}

/// Where the file of an extent lies.
fn place(path: &Path, descriptor: &Descriptor, line: &ExtentLine) -> Result<PathBuf, Error> {
    let name = Path::new(&line.file);
    let full = path.parent().unwrap_or(Path::new("")).join(name);
    let beside =
        name.components().count() == 1 && matches!(name.components().next(), Some(Component::Normal(_)));
    let device = || std::fs::metadata(&full).is_ok_and(|m| m.file_type().is_block_device());
    if beside || is_raw_disk(descriptor) || device() {
        return Ok(full);
    }
    Err(Error::unsupported(
        path,
        format!("the extent \"{}\" outside the descriptor's directory; move it there", line.file),
    ))
}

/// The files beside the descriptor that belong to the image.
pub(super) fn files(file: &dyn FileIo, path: &Path) -> Result<Vec<PathBuf>, Error> {
    let (descriptor, lines) = read(file, path)?;
    if is_raw_disk(&descriptor) {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for line in lines.iter().filter(|line| line.kind != ExtentKind::Zero) {
        let place = place(path, &descriptor, line)?;
        if std::fs::symlink_metadata(&place).is_ok_and(|m| m.is_file())
            && place != path
            && !out.contains(&place)
        {
            out.push(place);
        }
    }
    Ok(out)
}

pub(super) fn open(
    file: Box<dyn FileIo>,
    path: &Path,
    open: Opener<'_>,
) -> Result<(Box<dyn FileIo>, Box<dyn Layout>), Error> {
    let (descriptor, lines) = read(&*file, path)?;
    // File 0 is the descriptor.
    let mut files: Vec<Box<dyn FileIo>> = vec![file];
    let mut opened: Vec<PathBuf> = Vec::new();
    let mut pieces = Vec::new();
    let mut start = 0;
    for line in &lines {
        let end = start + line.sectors * SECTOR;
        let store = match line.kind {
            ExtentKind::Zero => Store::Zero,
            ExtentKind::Flat => {
                let at = place(path, &descriptor, line)?;
                // Extents of a partitioned disk share their device.
                let index = match opened.iter().position(|known| *known == at) {
                    Some(index) => index,
                    None => {
                        files.push(open(&at)?);
                        opened.push(at.clone());
                        opened.len() - 1
                    }
                };
                let len = files[index + 1].len().map_err(|e| Error::host("read from", &at, e))?;
                let offset = line.offset.checked_mul(SECTOR);
                match offset.filter(|o| o.checked_add(end - start).is_some_and(|e| e <= len)) {
                    Some(offset) => Store::Flat { file: index + 1, offset },
                    None => {
                        let what = format!(
                            "the extent of {} sectors from sector {} on is cut short",
                            line.sectors, line.offset
                        );
                        return Err(damaged(&at, len, what));
                    }
                }
            }
            ExtentKind::Sparse => {
                let at = place(path, &descriptor, line)?;
                if opened.contains(&at) {
                    return Err(damaged(path, 0, format!("the extent \"{}\" is named twice", line.file)));
                }
                files.push(open(&at)?);
                opened.push(at.clone());
                let index = opened.len();
                let (header, _) = read_header(&*files[index], &at)?;
                if header.compressed {
                    return Err(Error::unsupported(&at, "compressed extents of an image in several files"));
                }
                if header.capacity < line.sectors {
                    let what = format!("{} sectors instead of {}", header.capacity, line.sectors);
                    return Err(damaged(&at, 12, what));
                }
                Store::Sparse { file: index, units: open_units(&*files[index], &at, header)? }
            }
            ExtentKind::Other(ref kind) => {
                return Err(Error::unsupported(path, format!("VMDK extents of the kind {kind}")));
            }
        };
        if end > start {
            pieces.push(Piece { start, end, store });
        }
        start = end;
    }
    let set = Arc::new(FileSet::new(files));
    let modification = Mutex::new(descriptor.uuid("ddb.uuid.modification"));
    let layout = Extents { set: set.clone(), pieces, descriptor, modification };
    Ok((Box::new(set), Box::new(layout)))
}

/// Writes a new image: its extents, then the descriptor into `file`.
pub(super) fn create(
    file: &dyn FileIo,
    path: &Path,
    new: &NewVmdk,
    create: Opener<'_>,
) -> Result<bool, Error> {
    let split = matches!(new.variant, Variant::Split | Variant::SplitFixed);
    let fixed = new.variant.is_fixed();
    let pieces = if split { new.size.div_ceil(SPLIT) } else { 1 };
    if pieces > MAX_EXTENTS as u64 {
        return Ok(false);
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().replace(['"', '\n'], "_");
    let (access, kind) = match new.variant {
        Variant::Esx => ("RW", "VMFS"),
        _ if fixed => ("RW", "FLAT"),
        _ => ("RW", "SPARSE"),
    };
    let mut lines = Vec::new();
    for number in 0..pieces {
        let len = (new.size - number * SPLIT).min(if split { SPLIT } else { u64::MAX });
        let name = match new.variant {
            Variant::SplitFixed => format!("{stem}-f{:03}.vmdk", number + 1),
            Variant::Split => format!("{stem}-s{:03}.vmdk", number + 1),
            _ => format!("{stem}-flat.vmdk"),
        };
        let place = path.with_file_name(&name);
        let host = |e| Error::host("write to", &place, e);
        let extent = create(&place)?;
        if fixed {
            extent.reserve(0, len).map_err(host)?;
            extent.sync().map_err(host)?;
        } else if !create_sparse(&*extent, len / SECTOR, None).map_err(host)? {
            return Ok(false);
        }
        let offset = if kind == "FLAT" { " 0" } else { "" };
        lines.push(format!("{access} {} {kind} \"{name}\"{offset}", len / SECTOR));
    }
    let host = |e| Error::host("write to", path, e);
    file.write_at(0, new_descriptor(new, &lines).as_bytes()).map_err(host)?;
    file.sync().map_err(host)?;
    Ok(true)
}

impl Extents {
    fn piece(&self, offset: u64) -> io::Result<&Piece> {
        let index = self.pieces.partition_point(|piece| piece.end <= offset);
        self.pieces.get(index).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn sparse(&self) -> impl Iterator<Item = (usize, &Units<Tables>)> {
        self.pieces.iter().filter_map(|piece| match &piece.store {
            Store::Sparse { file, units } => Some((*file, units)),
            _ => None,
        })
    }
}

/// An allocation of one extent, as the whole image has it.
struct Shifted<'a> {
    inner: Box<dyn Allocation + 'a>,
    start: u64,
    file: usize,
}

impl Allocation for Shifted<'_> {
    fn start(&self) -> u64 {
        self.start + self.inner.start()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn file_offset(&self) -> u64 {
        FileSet::at(self.file, self.inner.file_offset())
    }

    fn commit(self: Box<Self>) {
        self.inner.commit();
    }
}

impl Layout for Extents {
    fn facts(&self) -> Facts {
        let facts = facts(&self.descriptor, self.pieces.last().map_or(0, |piece| piece.end));
        Facts { modification: *self.modification.lock(), ..facts }
    }

    fn map(&self, _file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        let piece = self.piece(offset)?;
        let len = len.min(piece.end - offset);
        let within = offset - piece.start;
        Ok(match &piece.store {
            Store::Zero => Extent { place: Place::Zero, len },
            Store::Flat { file, offset } => {
                Extent { place: Place::File(FileSet::at(*file, offset + within)), len }
            }
            Store::Sparse { file, units } => {
                let extent = units.map(within, len);
                let place = match extent.place {
                    Place::File(at) => Place::File(FileSet::at(*file, at)),
                    other => other,
                };
                Extent { place, ..extent }
            }
        })
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, _file: &dyn FileIo, offset: u64, _len: u64) -> io::Result<Begin<'_>> {
        let piece = self.piece(offset)?;
        match &piece.store {
            Store::Flat { .. } => Ok(Begin::Mapped),
            // Partitions that the guest must not see are zeros and stay so.
            Store::Zero => Err(io::ErrorKind::PermissionDenied.into()),
            Store::Sparse { file, units } => {
                Ok(match units.begin(self.set.file(*file)?, offset - piece.start)? {
                    Begin::Mapped => Begin::Mapped,
                    Begin::Allocated(inner) => {
                        Begin::Allocated(Box::new(Shifted { inner, start: piece.start, file: *file }))
                    }
                })
            }
        }
    }

    fn modified(&self, _file: &dyn FileIo) -> io::Result<()> {
        if let Some(uuid) = renew(self.set.file(0)?, &self.descriptor, 0)? {
            *self.modification.lock() = Some(uuid);
        }
        Ok(())
    }

    fn unpack(&self, _file: &dyn FileIo, _at: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        None
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        if self.sparse().next().is_none() {
            return file.sync();
        }
        // The extents do not depend on one another.
        for (index, units) in self.sparse() {
            units.flush(self.set.file(index)?)?;
        }
        if self.pieces.iter().any(|piece| matches!(piece.store, Store::Flat { .. })) {
            return file.sync();
        }
        // The descriptor, with its modification UUID.
        self.set.file(0)?.sync()
    }

    fn set_ids(&self, _file: &dyn FileIo, ids: &Ids) -> io::Result<bool> {
        super::set_ids(self.set.file(0)?, &self.descriptor, 0, ids)
    }

    fn is_dirty(&self) -> bool {
        self.sparse().any(|(_, units)| units.is_dirty())
    }
}
