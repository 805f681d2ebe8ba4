//! Opened images: moves data between callers, files and parents, as the layout says.

use std::io::IoSlice;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;
use vbox_types::ByteSize;

use crate::crypt::{Dek, DiskCipher, SECTOR};
use crate::dmg::{self, Dmg};
use crate::error::Error;
use crate::file::{FileIo, HostFile, Located, SparseFile};
use crate::format::{Begin, Extent, Facts, Format, Layout, Place, Variant, probe_file};
use crate::iscsi::{Disk, Target};
use crate::parallels::{self, Parallels};
use crate::qcow::{self, Qcow};
use crate::qed::{self, Qed};
use crate::raw::Raw;
use crate::vdi::{self, Vdi};
use crate::vhd::{self, Vhd};
use crate::vhdx::{self, Vhdx};
use crate::vmdk;

/// Discards are cut to whole units of this size in the file: holes smaller than a page of the host give nothing back.
const DISCARD_UNIT: u64 = 4096;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Reading; other readers are let in, writers are not.
    ReadOnly,
    /// Reading and writing, alone.
    ReadWrite,
    /// Reading and writing beside others that open it the same way (media of the type "shareable"; fixed images only).
    Shareable,
}

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file; a name for messages where there is a target.
    pub path: PathBuf,
    pub format: Format,
    /// Of the format iSCSI: what to log in to.
    pub target: Option<Target>,
}

impl From<(PathBuf, Format)> for Source {
    fn from((path, format): (PathBuf, Format)) -> Self {
        Self { path, format, target: None }
    }
}

impl Source {
    /// A disk of an iSCSI target, with VirtualBox's properties of such media.
    pub fn iscsi<'a>(path: &Path, property: impl Fn(&str) -> Option<&'a str>) -> Result<Self, Error> {
        let target =
            Target::new(property).map_err(|source| Error::Settings { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), format: Format::Iscsi, target: Some(target) })
    }

    /// As [`info`]; a target is asked for its disk.
    pub fn info(&self) -> Result<MediumInfo, Error> {
        match self.target {
            Some(_) => Image::open_source(self, OpenMode::ReadOnly, None)?.info(),
            None => info(&self.path, Some(self.format)),
        }
    }
}

/// Refuses what can be done with files alone.
pub(crate) fn check_file(path: &Path, format: Format) -> Result<(), Error> {
    match format {
        Format::Iscsi => Err(Error::unsupported(path, "this for a disk of an iSCSI target")),
        _ => Ok(()),
    }
}

/// What is known about an image without opening it for use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediumInfo {
    pub format: Format,
    pub variant: Variant,
    /// The UUID in the file; formats without one leave naming to the media registry.
    pub uuid: Option<Uuid>,
    pub modification_uuid: Option<Uuid>,
    pub parent_uuid: Option<Uuid>,
    /// The modification UUID that the parent had when it was last known to be the right one.
    pub parent_modification_uuid: Option<Uuid>,
    /// What a guest sees.
    pub logical_size: ByteSize,
    /// Length of the file.
    pub size_on_disk: ByteSize,
    pub comment: String,
    /// Where the file says its parent lies. Only a hint for a message: parents are found by their UUIDs.
    pub parent_hint: Option<String>,
}

/// An opened image. All methods take `&self` and may run at once on several threads; what overlapping requests that run at
/// once leave behind is one of their results for each sector.
pub struct Image {
    path: PathBuf,
    format: Format,
    file: Box<dyn FileIo>,
    layout: Box<dyn Layout>,
    size: u64,
    writable: bool,
    /// Whether the modification UUID was renewed since the image was opened.
    modified: AtomicBool,
    /// Held while it is renewed.
    modifying: Mutex<()>,
    parent: Option<Arc<Image>>,
    /// The compressed unit that was read last: its number and content.
    unpacked: Mutex<(u64, Vec<u8>)>,
    /// What the content is encrypted with.
    cipher: RwLock<Option<Arc<DiskCipher>>>,
}

pub(crate) fn open_file(path: &Path, mode: OpenMode) -> Result<HostFile, Error> {
    let access = if mode == OpenMode::ReadOnly { OFlags::RDONLY } else { OFlags::RDWR };
    // NONBLOCK: a FIFO given by mistake must not hang.
    let fd = rustix::fs::open(path, access | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .map_err(|e| Error::host("open", path, e))?;
    let how = match mode {
        OpenMode::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        OpenMode::ReadOnly | OpenMode::Shareable => FlockOperation::NonBlockingLockShared,
    };
    match rustix::fs::flock(&fd, how) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(Error::InUse { path: path.to_owned() }),
        // Some network file systems have no locks; the media registry still guards against ourselves.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => {
            tracing::warn!(target: "vd", path = %path.display(), "the file system has no locks");
        }
        Err(error) => return Err(Error::host("lock", path, error)),
    }
    HostFile::new(fd).map_err(|e| Error::host("open", path, e))
}

/// The layout of the image in `file`, and the file or files that its offsets mean.
fn layout(
    file: Box<dyn FileIo>,
    path: &Path,
    mode: OpenMode,
    format: Format,
) -> Result<(Box<dyn FileIo>, Box<dyn Layout>), Error> {
    let further =
        |further: &Path| -> Result<Box<dyn FileIo>, Error> { Ok(Box::new(open_file(further, mode)?)) };
    layout_with(file, path, mode, format, &further)
}

/// As [`layout`], with further files of the image from `further`.
fn layout_with(
    file: Box<dyn FileIo>,
    path: &Path,
    mode: OpenMode,
    format: Format,
    further: vmdk::Opener<'_>,
) -> Result<(Box<dyn FileIo>, Box<dyn Layout>), Error> {
    let layout: Box<dyn Layout> = match format {
        Format::Raw | Format::Iscsi => {
            Box::new(Raw::open(&*file).map_err(|e| Error::host("read from", path, e))?)
        }
        Format::Vdi => Box::new(Vdi::open(&*file, path)?),
        Format::Vmdk => return vmdk::open(file, path, further),
        Format::Vhd => Box::new(Vhd::open(&*file, path)?),
        Format::Qcow => Box::new(Qcow::open(&*file, path, mode != OpenMode::ReadOnly)?),
        Format::Qed => Box::new(Qed::open(&*file, path)?),
        Format::Vhdx => Box::new(Vhdx::open(&*file, path, mode != OpenMode::ReadOnly)?),
        Format::Parallels => Box::new(Parallels::open(&*file, path)?),
        Format::Dmg => Box::new(Dmg::open(&*file, path)?),
    };
    Ok((file, layout))
}

impl Image {
    /// Opens an image that has no parent. `format` is what is on record for the file, or what [`crate::probe`] told
    /// when the user named it first.
    pub fn open(path: &Path, mode: OpenMode, format: Format) -> Result<Self, Error> {
        Self::open_with(path, mode, format, None)
    }

    /// Opens a differencing image on top of its opened parent.
    pub fn open_child(
        path: &Path,
        mode: OpenMode,
        format: Format,
        parent: Arc<Image>,
    ) -> Result<Self, Error> {
        Self::open_with(path, mode, format, Some(parent))
    }

    /// Opens an image without its parent, for its metadata.
    pub(crate) fn open_alone(path: &Path, mode: OpenMode, format: Format) -> Result<Self, Error> {
        check_file(path, format)?;
        let file = open_file(path, mode)?;
        let (file, layout) = layout(Box::new(file), path, mode, format)?;
        Ok(Self::from_layout(file, layout, path, mode, format, None))
    }

    /// As [`Image::open_alone`], for writing, if all files of the image lie in `folder`.
    pub(crate) fn open_within(path: &Path, format: Format, folder: &Path) -> Result<Self, Error> {
        check_file(path, format)?;
        let mode = OpenMode::ReadWrite;
        let further = |file: &Path| -> Result<Box<dyn FileIo>, Error> {
            if file.parent() != Some(folder) {
                let what = "this for an image whose data lie elsewhere; clone it first".to_owned();
                return Err(Error::Unsupported { path: file.to_owned(), what });
            }
            Ok(Box::new(open_file(file, mode)?))
        };
        let file = Box::new(open_file(path, mode)?);
        let (file, layout) = layout_with(file, path, mode, format, &further)?;
        Ok(Self::from_layout(file, layout, path, mode, format, None))
    }

    pub(crate) fn open_with(
        path: &Path,
        mode: OpenMode,
        format: Format,
        parent: Option<Arc<Image>>,
    ) -> Result<Self, Error> {
        check_file(path, format)?;
        let file = open_file(path, mode)?;
        Self::from_file(Box::new(file), path, mode, format, parent)
    }

    /// Opens an image, on top of its opened parent if it has one.
    pub fn open_source(source: &Source, mode: OpenMode, parent: Option<Arc<Image>>) -> Result<Self, Error> {
        let path = &source.path;
        let Some(target) = source.target.as_ref().filter(|_| source.format == Format::Iscsi) else {
            return Self::open_with(path, mode, source.format, parent);
        };
        let disk =
            Disk::open(target, mode != OpenMode::ReadOnly).map_err(|e| Error::host("open", path, e))?;
        Self::from_file(Box::new(disk), path, mode, source.format, parent)
    }

    pub(crate) fn from_file(
        file: Box<dyn FileIo>,
        path: &Path,
        mode: OpenMode,
        format: Format,
        parent: Option<Arc<Image>>,
    ) -> Result<Self, Error> {
        let (file, layout) = layout(file, path, mode, format)?;
        let facts = layout.facts();
        check_parent(path, &facts, parent.as_deref())?;
        if mode != OpenMode::ReadOnly
            && let Some(reason) = layout.read_only_reason()
        {
            return Err(Error::Unsupported { path: path.to_owned(), what: reason.to_owned() });
        }
        if mode == OpenMode::Shareable && !facts.variant.is_fixed() && format != Format::Raw {
            let what = format!("sharing a {} image; only fixed images can be shared", facts.variant);
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        Ok(Self::from_layout(file, layout, path, mode, format, parent))
    }

    fn from_layout(
        file: Box<dyn FileIo>,
        layout: Box<dyn Layout>,
        path: &Path,
        mode: OpenMode,
        format: Format,
        parent: Option<Arc<Image>>,
    ) -> Self {
        Self {
            path: path.to_owned(),
            format,
            size: layout.facts().size.0,
            file,
            layout,
            writable: mode != OpenMode::ReadOnly,
            modified: AtomicBool::new(false),
            modifying: Mutex::new(()),
            parent,
            unpacked: Mutex::default(),
            cipher: RwLock::default(),
        }
    }

    /// What was stored and is stored by this image and those below it is encrypted with the key; with none it is taken as it
    /// lies in the file. To be called while no request runs.
    pub fn set_key(&self, dek: Option<&Dek>) {
        let cipher = dek.map(|dek| Arc::new(dek.cipher()));
        let mut image = Some(self);
        while let Some(own) = image {
            own.cipher.write().clone_from(&cipher);
            image = own.parent.as_deref();
        }
    }

    /// Whether the host's page cache may keep what is read and written through this image and those below it. If not, it is dropped
    /// behind the requests, after some 32 MiB of them and at each flush.
    pub fn set_cached(&self, on: bool) {
        let mut image = Some(self);
        while let Some(own) = image {
            own.file.set_cached(on);
            image = own.parent.as_deref();
        }
    }

    fn cipher(&self) -> Option<Arc<DiskCipher>> {
        self.cipher.read().clone()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size a guest sees.
    pub fn size(&self) -> ByteSize {
        ByteSize(self.size)
    }

    pub fn is_read_only(&self) -> bool {
        !self.writable
    }

    pub fn parent(&self) -> Option<&Arc<Image>> {
        self.parent.as_ref()
    }

    pub fn info(&self) -> Result<MediumInfo, Error> {
        let len = self.file.len().map_err(|e| Error::host("read the size of", &self.path, e))?;
        Ok(medium_info(self.format, self.layout.facts(), len))
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), Error> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(Error::OutOfRange { path: self.path.clone(), offset, len, size: self.size });
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Error> {
        if self.writable { Ok(()) } else { Err(Error::ReadOnly { path: self.path.clone() }) }
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub(crate) fn layout(&self) -> (&dyn FileIo, &dyn Layout) {
        (&*self.file, &*self.layout)
    }

    pub(crate) fn facts(&self) -> Facts {
        self.layout.facts()
    }

    fn map(&self, offset: u64, len: u64) -> Result<Extent, Error> {
        self.layout.map(&*self.file, offset, len).map_err(|e| Error::host("read the map of", &self.path, e))
    }

    /// The next stretch from `offset` on, up to `end`, that may hold something else than zeros, in this image or below it.
    pub fn next_data(&self, offset: u64, end: u64) -> Result<Option<Range<u64>>, Error> {
        let end = end.min(self.size);
        // Zeros in the file are something else when they are decrypted.
        let encrypted = self.cipher.read().is_some();
        let mut at = offset;
        while at < end {
            let extent = self.map(at, end - at)?;
            let stop = at + extent.len;
            let found = match extent.place {
                Place::File(_) if encrypted => Some(at..stop),
                Place::File(from) => self
                    .file
                    .data(from, extent.len)
                    .map_err(|e| Error::host("read from", &self.path, e))?
                    .map(|r| at + (r.start - from)..at + (r.end - from)),
                Place::Packed { .. } => Some(at..stop),
                Place::Zero => None,
                Place::Absent => match &self.parent {
                    Some(parent) => parent.next_data(at, stop)?,
                    None => None,
                },
            };
            if found.is_some() {
                return Ok(found);
            }
            at = stop;
        }
        Ok(None)
    }

    /// The next stretch from `offset` on that this image itself holds, whatever is below it. Zeros may be among it.
    pub fn next_own(&self, offset: u64) -> Result<Option<Range<u64>>, Error> {
        let mut at = offset;
        while at < self.size {
            let extent = self.map(at, self.size - at)?;
            if extent.place != Place::Absent {
                return Ok(Some(at..at + extent.len));
            }
            at += extent.len;
        }
        Ok(None)
    }

    /// Fills `out` from virtual byte `offset` on.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        self.check(offset, out.len() as u64)?;
        let cipher = self.cipher();
        if cipher.is_some() && !in_sectors(offset, out.len()) {
            // Only whole sectors can be decrypted.
            let range = sectors_around(offset, out.len());
            let mut whole = vec![0; (range.end - range.start) as usize];
            self.read(range.start, &mut whole)?;
            let skip = (offset - range.start) as usize;
            out.copy_from_slice(&whole[skip..skip + out.len()]);
            return Ok(());
        }
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let extent = self.map(at, (out.len() - done) as u64)?;
            let piece = &mut out[done..done + extent.len as usize];
            match extent.place {
                Place::File(from) => {
                    self.file.read_at(from, piece).map_err(|e| Error::host("read from", &self.path, e))?;
                }
                Place::Packed { unit, skip } => self.read_packed(unit, skip, piece)?,
                Place::Zero => piece.fill(0),
                Place::Absent => self.read_parent(at, piece)?,
            }
            if let Some(cipher) = &cipher
                && matches!(extent.place, Place::File(_) | Place::Packed { .. })
            {
                cipher.decrypt(at / SECTOR as u64, piece);
            }
            done += extent.len as usize;
        }
        Ok(())
    }

    /// Where the whole range lies in one stretch of a file of the host, in this image or below it. `None` if [`Image::read`] has to
    /// put it together.
    pub(crate) fn locate(&self, offset: u64, len: u64) -> Option<Located<'_>> {
        self.check(offset, len).ok()?;
        if self.cipher.read().is_some() {
            return None;
        }
        let extent = self.map(offset, len).ok().filter(|extent| extent.len == len)?;
        match (extent.place, &self.parent) {
            (Place::File(at), _) => self.file.located(at, len),
            (Place::Absent, Some(parent)) => parent.locate(offset, len),
            _ => None,
        }
    }

    /// Reads inside one compressed unit, keeping the unit for the reads that usually follow.
    fn read_packed(&self, unit: u64, skip: u64, out: &mut [u8]) -> Result<(), Error> {
        let mut unpacked = self.unpacked.lock();
        if unpacked.0 != unit {
            let content = self.layout.unpack(&*self.file, unit);
            *unpacked = (unit, content.map_err(|e| Error::host("unpack data of", &self.path, e))?);
        }
        // The last unit may be stored short.
        let have = unpacked.1.get(skip as usize..).unwrap_or_default();
        let count = have.len().min(out.len());
        out[..count].copy_from_slice(&have[..count]);
        out[count..].fill(0);
        Ok(())
    }

    /// Reads what lies below this image; past the parent's end there are zeros.
    fn read_parent(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let Some(parent) = &self.parent else {
            out.fill(0);
            return Ok(());
        };
        let count = parent.size.saturating_sub(offset).min(out.len() as u64) as usize;
        let (inside, outside) = out.split_at_mut(count);
        outside.fill(0);
        if inside.is_empty() { Ok(()) } else { parent.read(offset, inside) }
    }

    /// Writes `data` at virtual byte `offset`. Durable after the next [`Image::flush`] that starts later.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.write_with(offset, data, true)
    }

    /// As [`Image::write`], also where zeros would be left out because zeros are there already.
    pub(crate) fn write_all(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.write_with(offset, data, false)
    }

    /// Whether the host carries out one write to the image at a time, so that more threads only stand in each other's way.
    pub(crate) fn writes_in_turns(&self) -> bool {
        self.file.located(0, 0).is_some() && self.cipher.read().is_none()
    }

    /// Writes `buffers`, which follow each other, at virtual byte `offset` if they can be written at once; false if nothing, or not
    /// all of it, was done: then [`Image::write`] tells why.
    pub(crate) fn write_together(&self, offset: u64, buffers: &[Vec<u8>]) -> bool {
        let len = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        let file = &*self.file;
        let ready = self.check_writable().is_ok()
            && self.check(offset, len).is_ok()
            && self.cipher.read().is_none()
            && self.note_modified().is_ok();
        let Some(Extent { place: Place::File(to), .. }) =
            ready.then(|| self.map(offset, len).ok()).flatten().filter(|extent| extent.len == len)
        else {
            return false;
        };
        let mut pieces: Vec<_> = buffers.iter().map(|buffer| IoSlice::new(buffer)).collect();
        self.layout.before_write(file, offset).and_then(|()| file.write_pieces_at(to, &mut pieces)).is_ok()
    }

    fn write_with(&self, offset: u64, data: &[u8], sparse: bool) -> Result<(), Error> {
        self.check_writable()?;
        self.check(offset, data.len() as u64)?;
        self.note_modified()?;
        let cipher = self.cipher();
        if cipher.is_some() && !in_sectors(offset, data.len()) {
            let range = sectors_around(offset, data.len());
            let mut whole = vec![0; (range.end - range.start) as usize];
            self.read(range.start, &mut whole)?;
            let skip = (offset - range.start) as usize;
            whole[skip..skip + data.len()].copy_from_slice(data);
            return self.write_with(range.start, &whole, sparse);
        }
        // Where zeros are written is nobody's business on an encrypted disk.
        let skip_zeros = cipher.is_none();
        let cipher = cipher.as_deref();
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let extent = self.map(at, (data.len() - done) as u64)?;
            let mut piece = &data[done..done + extent.len as usize];
            match extent.place {
                Place::File(to) => {
                    let write = |bytes: &[u8]| {
                        self.layout.before_write(&*self.file, at).and_then(|()| self.file.write_at(to, bytes))
                    };
                    let written = match cipher {
                        None => write(piece),
                        Some(cipher) => {
                            let mut hidden = piece.to_vec();
                            cipher.encrypt(at / SECTOR as u64, &mut hidden);
                            write(&hidden)
                        }
                    };
                    written.map_err(|e| Error::host("write to", &self.path, e))?;
                }
                // Zeros onto zeros: nothing changes, and the image stays small.
                Place::Zero if skip_zeros && is_zero(piece) => {}
                Place::Absent if skip_zeros && sparse && self.parent.is_none() && is_zero(piece) => {}
                Place::Packed { .. } | Place::Zero | Place::Absent => {
                    let count = self.write_new(at, piece, extent.place, cipher)?;
                    piece = &piece[..count];
                }
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Writes the start of `data` into a unit that is not in the file yet. How many bytes; 0 if it is there by now.
    fn write_new(
        &self,
        offset: u64,
        data: &[u8],
        place: Place,
        cipher: Option<&DiskCipher>,
    ) -> Result<usize, Error> {
        let host = |e| Error::host("write to", &self.path, e);
        let allocation = match self.layout.begin(&*self.file, offset, data.len() as u64).map_err(host)? {
            Begin::Mapped => return Ok(0),
            Begin::Allocated(allocation) => allocation,
        };
        let skip = offset - allocation.start();
        let data = &data[..data.len().min((allocation.len() - skip) as usize)];
        let packed = matches!(place, Place::Packed { .. });
        let below = packed || place == Place::Absent && self.parent.is_some();
        // What is zeros by default is not what zeros are encrypted to.
        if cipher.is_some() || below && (data.len() as u64) < allocation.len() {
            let mut unit = vec![0; allocation.len() as usize];
            let inside = (self.size - allocation.start()).min(allocation.len()) as usize;
            match place {
                Place::Packed { unit: number, .. } => {
                    self.read_packed(number, 0, &mut unit[..inside])?;
                    if let Some(cipher) = cipher {
                        cipher.decrypt(allocation.start() / SECTOR as u64, &mut unit[..inside]);
                    }
                }
                Place::Absent => self.read_parent(allocation.start(), &mut unit[..inside])?,
                Place::File(_) | Place::Zero => {}
            }
            unit[skip as usize..skip as usize + data.len()].copy_from_slice(data);
            if let Some(cipher) = cipher {
                cipher.encrypt(allocation.start() / SECTOR as u64, &mut unit[..inside]);
            }
            self.file.write_at(allocation.file_offset(), &unit).map_err(host)?;
        } else {
            self.file.write_at(allocation.file_offset() + skip, data).map_err(host)?;
        }
        allocation.commit();
        Ok(data.len())
    }

    fn note_modified(&self) -> Result<(), Error> {
        if self.modified.load(Ordering::Acquire) {
            return Ok(());
        }
        let _modifying = self.modifying.lock();
        if !self.modified.load(Ordering::Acquire) {
            self.layout.modified(&*self.file).map_err(|e| Error::host("write to", &self.path, e))?;
            self.modified.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Makes every write that has returned durable, with the metadata that finds it.
    pub fn flush(&self) -> Result<(), Error> {
        if !self.writable {
            return Ok(());
        }
        self.layout.flush(&*self.file).map_err(|e| Error::host("flush", &self.path, e))
    }

    /// Whether new blocks are known only to this process. Whoever runs the image flushes such an image now and then, so that
    /// little is lost if the process is killed.
    pub fn is_dirty(&self) -> bool {
        self.writable && self.layout.is_dirty()
    }

    /// The range's content is not needed any more; it may read as zeros or as before.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), Error> {
        self.check_writable()?;
        self.check(offset, len)?;
        // A hole in the file would not read as zeros, nor as before.
        if self.cipher.read().is_some() {
            return Ok(());
        }
        self.note_modified()?;
        let mut done = 0;
        while done < len {
            let extent = self.map(offset + done, len - done)?;
            if let Place::File(at) = extent.place {
                let start = at.next_multiple_of(DISCARD_UNIT);
                let end = (at + extent.len) / DISCARD_UNIT * DISCARD_UNIT;
                if start < end {
                    self.file
                        .discard(start, end - start)
                        .map_err(|e| Error::host("discard in", &self.path, e))?;
                }
            }
            done += extent.len;
        }
        Ok(())
    }
}

/// Whether the range is one of whole sectors.
fn in_sectors(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(SECTOR as u64) && len.is_multiple_of(SECTOR)
}

/// The sectors in which the range lies. Encrypted images end with a whole one.
fn sectors_around(offset: u64, len: usize) -> Range<u64> {
    let sector = SECTOR as u64;
    offset / sector * sector..(offset + len as u64).next_multiple_of(sector)
}

impl Image {
    /// Decrypts all that the image itself holds with `old` and encrypts it with `new`. The image is nobody else's, and nothing can
    /// be done with it if this fails. Its UUIDs stay.
    pub(crate) fn recrypt(
        &self,
        old: Option<&DiskCipher>,
        new: Option<&DiskCipher>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<(), Error> {
        const PIECE: u64 = 1 << 20;
        let host = |e| Error::host("write to", &self.path, e);
        let mut buffer = Vec::new();
        let mut at = 0;
        while at < self.size {
            if !progress(at, self.size) {
                return Err(Error::Cancelled { path: self.path.clone() });
            }
            let extent = self.map(at, (self.size - at).min(PIECE))?;
            buffer.resize(extent.len as usize, 0);
            let sector = at / SECTOR as u64;
            match extent.place {
                Place::File(from) => {
                    self.file
                        .read_at(from, &mut buffer)
                        .map_err(|e| Error::host("read from", &self.path, e))?;
                }
                Place::Packed { unit, skip } => self.read_packed(unit, skip, &mut buffer)?,
                // VirtualBox decrypts these, too, so an encrypted image must have none.
                Place::Zero if new.is_some() && self.format == Format::Vdi => {
                    let begun = self.layout.begin(&*self.file, at, 1).map_err(host)?;
                    if let Begin::Allocated(allocation) = begun {
                        buffer.clear();
                        buffer.resize((self.size - allocation.start()).min(allocation.len()) as usize, 0);
                        if let Some(new) = new {
                            new.encrypt(allocation.start() / SECTOR as u64, &mut buffer);
                        }
                        self.file.write_at(allocation.file_offset(), &buffer).map_err(host)?;
                        at = allocation.start() + allocation.len();
                        allocation.commit();
                    }
                    continue;
                }
                Place::Zero | Place::Absent => {
                    at += extent.len;
                    continue;
                }
            }
            if let Some(old) = old {
                old.decrypt(sector, &mut buffer);
            }
            if let Some(new) = new {
                new.encrypt(sector, &mut buffer);
            }
            at += match extent.place {
                Place::File(to) => {
                    self.file.write_at(to, &buffer).map_err(host)?;
                    extent.len
                }
                place => self.write_new(at, &buffer, place, None)? as u64,
            };
        }
        self.flush()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.is_dirty()
            && let Err(error) = self.flush()
        {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(target: "vd", %error, %cause, "closing an image failed: writes since its last flush are lost");
        }
    }
}

pub(crate) fn is_zero(data: &[u8]) -> bool {
    // Whole words first: the compiler makes wide compares of them.
    let words = data.chunks_exact(16);
    let tail = words.remainder();
    let mut words = words.map(|w| u128::from_ne_bytes(w.try_into().unwrap_or([1; 16])));
    words.all(|w| w == 0) && tail.iter().all(|&b| b == 0)
}

fn check_parent(path: &Path, facts: &Facts, parent: Option<&Image>) -> Result<(), Error> {
    let nil = Uuid::nil();
    let parent = match (facts.variant, parent) {
        (Variant::Differencing, Some(parent)) => parent,
        (Variant::Differencing, None) => {
            let parent = facts.parent.unwrap_or(nil);
            return Err(Error::ParentNeeded { path: path.to_owned(), parent });
        }
        (_, None) => return Ok(()),
        (_, Some(parent)) => {
            let found = parent.layout.facts().uuid.unwrap_or(nil);
            return Err(Error::WrongParent { path: path.to_owned(), expected: nil, found });
        }
    };
    let below = parent.layout.facts();
    // Formats without UUIDs are known by the registry alone.
    if let (Some(expected), Some(found)) = (facts.parent, below.uuid)
        && found != expected
    {
        return Err(Error::WrongParent { path: path.to_owned(), expected, found });
    }
    match (facts.parent_modification, below.modification) {
        (Some(expected), Some(found)) if expected != found => {
            Err(Error::ParentChanged { path: path.to_owned(), expected, found })
        }
        _ => Ok(()),
    }
}

fn medium_info(format: Format, facts: Facts, len: u64) -> MediumInfo {
    MediumInfo {
        format,
        variant: facts.variant,
        uuid: facts.uuid,
        modification_uuid: facts.modification,
        parent_uuid: facts.parent,
        parent_modification_uuid: facts.parent_modification,
        logical_size: facts.size,
        size_on_disk: ByteSize(len),
        comment: facts.comment,
        parent_hint: facts.parent_hint,
    }
}

/// Opens a chain of images, the base first. All but the last are opened for reading, the last one in `mode`.
pub fn open_chain<S: Clone + Into<Source>>(images: &[S], mode: OpenMode) -> Result<Arc<Image>, Error> {
    let mut below: Option<Arc<Image>> = None;
    for (number, image) in images.iter().enumerate() {
        let mode = if number + 1 == images.len() { mode } else { OpenMode::ReadOnly };
        below = Some(Arc::new(Image::open_source(&image.clone().into(), mode, below.take())?));
    }
    below.ok_or_else(|| Error::host("open", "", std::io::Error::from(std::io::ErrorKind::InvalidInput)))
}

/// Tells what a file is. Works while a VM uses it. `format` as for [`Image::open`]; `None` probes.
pub fn info(path: &Path, format: Option<Format>) -> Result<MediumInfo, Error> {
    format.map_or(Ok(()), |format| check_file(path, format))?;
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .map_err(|e| Error::host("open", path, e))?;
    let file = HostFile::new(fd).map_err(|e| Error::host("open", path, e))?;
    let host = |e| Error::host("read from", path, e);
    let format = match format {
        Some(format) => format,
        None => probe_file(&file).map_err(host)?,
    };
    let mut len = file.len().map_err(host)?;
    let facts = match format {
        Format::Raw | Format::Iscsi => Raw::open(&file).map_err(host)?.facts(),
        Format::Vdi => vdi::read_facts(&file, path)?,
        Format::Vmdk => {
            for further in vmdk::further_files(&file, path)? {
                len += std::fs::metadata(&further).map_or(0, |m| m.len());
            }
            vmdk::read_facts(&file, path)?
        }
        Format::Vhd => vhd::read_facts(&file, path)?,
        Format::Qcow => qcow::read_facts(&file, path)?,
        Format::Qed => qed::read_facts(&file, path)?,
        Format::Vhdx => vhdx::read_facts(&file, path)?,
        Format::Parallels => parallels::read_facts(&file, path)?,
        Format::Dmg => dmg::read_facts(&file, path)?,
    };
    Ok(medium_info(format, facts, len))
}

/// Every file of an image, the one that names it first.
pub fn files(path: &Path, format: Format) -> Result<Vec<PathBuf>, Error> {
    check_file(path, format)?;
    let mut files = vec![path.to_owned()];
    if format == Format::Vmdk {
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|e| Error::host("open", path, e))?;
        let file = HostFile::new(fd).map_err(|e| Error::host("open", path, e))?;
        files.extend(vmdk::further_files(&file, path)?);
    }
    Ok(files)
}

/// Deletes an image with all its files. A file whose further files cannot be told goes alone.
pub fn delete(path: &Path, format: Format) -> Result<(), Error> {
    check_file(path, format)?;
    let mut files = files(path, format).unwrap_or_else(|_| vec![path.to_owned()]);
    // The one that names the others last.
    files.reverse();
    for file in files {
        rustix::fs::unlink(&file).map_err(|e| Error::host("delete", &file, e))?;
    }
    Ok(())
}

/// See [`crate::exercise`].
pub(crate) fn exercise(format: Format, len: u64, pieces: &[(u64, &[u8])]) {
    // Nothing lies there, so that descriptors lead nowhere.
    let path = Path::new("/nonexistent/of/a/fuzzer/image");
    let whole = SparseFile::new(len);
    for (at, bytes) in pieces {
        let _ = whole.write_at(*at, bytes);
    }
    let _ = whole.set_len(len);
    let open = |file: &SparseFile, mode| -> Result<Image, Error> {
        let further = |_: &Path| -> Result<Box<dyn FileIo>, Error> { Ok(Box::new(whole.fork())) };
        let (file, layout) = layout_with(Box::new(file.clone()), path, mode, format, &further)?;
        Ok(Image::from_layout(file, layout, path, mode, format, None))
    };
    let file = whole.fork();
    let image = open(&file, OpenMode::ReadWrite);
    if let Ok(image) = image.or_else(|_| open(&file, OpenMode::ReadOnly)) {
        let mut sector = [0x5a; 1024];
        let last = image.size.saturating_sub(1024);
        for offset in [0, 65024, image.size / 2, last] {
            let _ = image.read(offset, &mut sector);
            let _ = image.next_data(offset, offset.saturating_add(1 << 24));
            sector.fill(0x5a);
            if image.layout.read_only_reason().is_none() {
                let _ = image.write(offset, &sector);
            }
            let _ = image.discard(offset, 1024);
        }
        let _ = image.flush();
        drop(image);
        let _ = open(&file, OpenMode::ReadOnly).and_then(|image| image.read(0, &mut sector));
    }
    let _ = crate::maintain::repair_file(&whole, path, format);
    let _ = open(&whole, OpenMode::ReadOnly).and_then(|image| image.read(0, &mut [0; 512]));
}
