//! Opened images: moves data between callers, files and parents, as the layout says.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;
use vbox_types::ByteSize;

use crate::error::Error;
use crate::file::{FileIo, HostFile, MemoryFile};
use crate::format::{Begin, Facts, Format, Layout, Place, Variant, probe_file};
use crate::raw::Raw;
use crate::vdi::{self, CreateError, NewVdi, Vdi};
use crate::vhd::{self, Vhd};
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

/// What is known about an image without opening it for use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediumInfo {
    pub format: Format,
    pub variant: Variant,
    /// The UUID in the file; formats without one leave naming to the media registry.
    pub uuid: Option<Uuid>,
    pub modification_uuid: Option<Uuid>,
    pub parent_uuid: Option<Uuid>,
    /// What a guest sees.
    pub logical_size: ByteSize,
    /// Length of the file.
    pub size_on_disk: ByteSize,
    pub comment: String,
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    pub format: Format,
    pub variant: Variant,
    /// A multiple of 512.
    pub size: ByteSize,
    /// A fresh one if `None`.
    pub uuid: Option<Uuid>,
    pub comment: String,
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
    modified: Mutex<bool>,
    parent: Option<Arc<Image>>,
    /// The compressed unit that was read last: its file offset and content.
    unpacked: Mutex<(u64, Vec<u8>)>,
}

fn open_file(path: &Path, mode: OpenMode) -> Result<HostFile, Error> {
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

fn layout(file: &dyn FileIo, path: &Path, format: Format) -> Result<Box<dyn Layout>, Error> {
    Ok(match format {
        Format::Raw => Box::new(Raw::open(file).map_err(|e| Error::host("read from", path, e))?),
        Format::Vdi => Box::new(Vdi::open(file, path)?),
        Format::Vmdk => vmdk::open(file, path)?,
        Format::Vhd => Box::new(Vhd::open(file, path)?),
        other => return Err(unsupported(path, other)),
    })
}

fn unsupported(path: &Path, format: Format) -> Error {
    Error::Unsupported { path: path.to_owned(), what: format!("the image format {format}") }
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

    fn open_with(
        path: &Path,
        mode: OpenMode,
        format: Format,
        parent: Option<Arc<Image>>,
    ) -> Result<Self, Error> {
        let file = open_file(path, mode)?;
        Self::from_file(Box::new(file), path, mode, format, parent)
    }

    pub(crate) fn from_file(
        file: Box<dyn FileIo>,
        path: &Path,
        mode: OpenMode,
        format: Format,
        parent: Option<Arc<Image>>,
    ) -> Result<Self, Error> {
        let layout = layout(&*file, path, format)?;
        let facts = layout.facts();
        check_parent(path, &facts, parent.as_deref())?;
        if mode != OpenMode::ReadOnly && layout.packed_unit() != 0 {
            let what = "writing to a compressed image; clone it to another variant".into();
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        if mode == OpenMode::Shareable && facts.variant != Variant::Fixed && format != Format::Raw {
            let what = format!("sharing a {} image; only fixed images can be shared", facts.variant);
            return Err(Error::Unsupported { path: path.to_owned(), what });
        }
        Ok(Self {
            path: path.to_owned(),
            format,
            file,
            layout,
            size: facts.size.0,
            writable: mode != OpenMode::ReadOnly,
            modified: Mutex::new(false),
            parent,
            unpacked: Mutex::default(),
        })
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

    /// Fills `out` from virtual byte `offset` on.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        self.check(offset, out.len() as u64)?;
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let extent = self.layout.map(at, (out.len() - done) as u64);
            let piece = &mut out[done..done + extent.len as usize];
            match extent.place {
                Place::File(from) => {
                    self.file.read_at(from, piece).map_err(|e| Error::host("read from", &self.path, e))?;
                }
                Place::Packed(from) => self.read_packed(from, at, piece)?,
                Place::Zero => piece.fill(0),
                Place::Absent => self.read_parent(at, piece)?,
            }
            done += extent.len as usize;
        }
        Ok(())
    }

    /// Reads inside one compressed unit, keeping the unit for the reads that usually follow.
    fn read_packed(&self, from: u64, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let mut unpacked = self.unpacked.lock();
        if unpacked.0 != from {
            let unit = self.layout.unpack(&*self.file, from);
            *unpacked = (from, unit.map_err(|e| Error::host("unpack data of", &self.path, e))?);
        }
        let start = (offset % self.layout.packed_unit().max(1)) as usize;
        // The last unit may be stored short.
        let have = unpacked.1.get(start..).unwrap_or_default();
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
        self.check_writable()?;
        self.check(offset, data.len() as u64)?;
        self.note_modified()?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let extent = self.layout.map(at, (data.len() - done) as u64);
            let piece = &data[done..done + extent.len as usize];
            match extent.place {
                Place::File(to) => {
                    let written = self
                        .layout
                        .before_write(&*self.file, at)
                        .and_then(|()| self.file.write_at(to, piece));
                    written.map_err(|e| Error::host("write to", &self.path, e))?;
                }
                // Zeros onto zeros: nothing changes, and the image stays small.
                Place::Zero if is_zero(piece) => {}
                Place::Absent if self.parent.is_none() && is_zero(piece) => {}
                // Layouts with such units are opened for reading only.
                Place::Packed(_) => return Err(Error::ReadOnly { path: self.path.clone() }),
                Place::Zero | Place::Absent => {
                    if !self.write_new(at, piece, extent.place)? {
                        continue;
                    }
                }
            }
            done += extent.len as usize;
        }
        Ok(())
    }

    /// Writes into a unit that is not in the file yet; false if it is there by now.
    fn write_new(&self, offset: u64, data: &[u8], place: Place) -> Result<bool, Error> {
        let host = |e| Error::host("write to", &self.path, e);
        let allocation = match self.layout.begin(&*self.file, offset).map_err(host)? {
            Begin::Mapped => return Ok(false),
            Begin::Allocated(allocation) => allocation,
        };
        let skip = offset - allocation.start();
        if place == Place::Absent && self.parent.is_some() && (data.len() as u64) < allocation.len() {
            let mut unit = vec![0; allocation.len() as usize];
            let inside = (self.size - allocation.start()).min(allocation.len()) as usize;
            self.read_parent(allocation.start(), &mut unit[..inside])?;
            unit[skip as usize..skip as usize + data.len()].copy_from_slice(data);
            self.file.write_at(allocation.file_offset(), &unit).map_err(host)?;
        } else {
            self.file.write_at(allocation.file_offset() + skip, data).map_err(host)?;
        }
        allocation.commit();
        Ok(true)
    }

    fn note_modified(&self) -> Result<(), Error> {
        let mut modified = self.modified.lock();
        if !*modified {
            self.layout.modified(&*self.file).map_err(|e| Error::host("write to", &self.path, e))?;
            *modified = true;
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
        self.note_modified()?;
        let mut done = 0;
        while done < len {
            let extent = self.layout.map(offset + done, len - done);
            if let Place::File(at) = extent.place {
                let start = at.next_multiple_of(DISCARD_UNIT);
                let end = (at + extent.len) / DISCARD_UNIT * DISCARD_UNIT;
                if start < end {
                    self.file
                        .zero(start, end - start)
                        .map_err(|e| Error::host("discard in", &self.path, e))?;
                }
            }
            done += extent.len;
        }
        Ok(())
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

fn is_zero(data: &[u8]) -> bool {
    // Whole words first: the compiler makes wide compares of them.
    let words = data.chunks_exact(16);
    let tail = words.remainder();
    let mut words = words.map(|w| u128::from_ne_bytes(w.try_into().unwrap_or([1; 16])));
    words.all(|w| w == 0) && tail.iter().all(|&b| b == 0)
}

fn check_parent(path: &Path, facts: &Facts, parent: Option<&Image>) -> Result<(), Error> {
    let wanted = (facts.variant == Variant::Differencing).then(|| facts.parent.unwrap_or_default());
    let (wanted, parent) = match (wanted, parent) {
        (None, None) => return Ok(()),
        (Some(wanted), Some(parent)) => (wanted, parent),
        (Some(parent), None) => return Err(Error::ParentNeeded { path: path.to_owned(), parent }),
        (None, Some(parent)) => {
            let found = parent.layout.facts().uuid.unwrap_or_default();
            return Err(Error::WrongParent { path: path.to_owned(), expected: Uuid::nil(), found });
        }
    };
    let below = parent.layout.facts();
    // Formats without a UUID of their own are known by the registry alone.
    if let Some(found) = below.uuid
        && found != wanted
    {
        return Err(Error::WrongParent { path: path.to_owned(), expected: wanted, found });
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
        logical_size: facts.size,
        size_on_disk: ByteSize(len),
        comment: facts.comment,
    }
}

/// Tells what a file is. Works while a VM uses it. `format` as for [`Image::open`]; `None` probes.
pub fn info(path: &Path, format: Option<Format>) -> Result<MediumInfo, Error> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .map_err(|e| Error::host("open", path, e))?;
    let file = HostFile::new(fd).map_err(|e| Error::host("open", path, e))?;
    let host = |e| Error::host("read from", path, e);
    let format = match format {
        Some(format) => format,
        None => probe_file(&file).map_err(host)?,
    };
    let facts = match format {
        Format::Raw => Raw::open(&file).map_err(host)?.facts(),
        Format::Vdi => vdi::read_facts(&file, path)?,
        Format::Vmdk => vmdk::read_facts(&file, path)?,
        Format::Vhd => vhd::read_facts(&file, path)?,
        other => return Err(unsupported(path, other)),
    };
    Ok(medium_info(format, facts, file.len().map_err(host)?))
}

/// Creates a new base image; an existing file is never touched.
pub fn create(path: &Path, options: &CreateOptions) -> Result<MediumInfo, Error> {
    if options.variant == Variant::Differencing {
        return Err(Error::NoSuchVariant { format: options.format, variant: options.variant });
    }
    create_with(path, options, None)
}

/// Creates a differencing image of the parent's size. The parent must not be written any more.
pub fn create_child(
    path: &Path,
    format: Format,
    parent: &Image,
    uuid: Option<Uuid>,
) -> Result<MediumInfo, Error> {
    let facts = parent.layout.facts();
    let options = CreateOptions {
        format,
        variant: Variant::Differencing,
        size: parent.size(),
        uuid,
        comment: String::new(),
    };
    let below = (facts.uuid.unwrap_or_default(), facts.modification.unwrap_or_default());
    create_with(path, &options, Some(below))
}

fn create_with(
    path: &Path,
    options: &CreateOptions,
    parent: Option<(Uuid, Uuid)>,
) -> Result<MediumInfo, Error> {
    let bad_size = |why| Err(Error::BadSize { format: options.format, size: options.size.0, why });
    if options.size.0 == 0 {
        return bad_size("it must not be empty");
    }
    if !options.size.0.is_multiple_of(512) {
        return bad_size("the size is not a multiple of 512 bytes");
    }
    match (options.format, options.variant) {
        (Format::Vdi, _)
        | (Format::Raw | Format::Vhd, Variant::Dynamic | Variant::Fixed)
        | (Format::Vmdk, Variant::Dynamic) => {}
        (format, variant) => return Err(Error::NoSuchVariant { format, variant }),
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)) {
        Ok(fd) => fd,
        Err(Errno::EXIST) => return Err(Error::Exists { path: path.to_owned() }),
        Err(error) => return Err(Error::host("create", path, error)),
    };
    let result = fill(path, fd, options, parent);
    if result.is_err() {
        // Ours: it was created just now. Should the removal fail too, the first error is the one to tell.
        let _ = rustix::fs::unlink(path);
    }
    result
}

fn fill(
    path: &Path,
    fd: std::os::fd::OwnedFd,
    options: &CreateOptions,
    parent: Option<(Uuid, Uuid)>,
) -> Result<MediumInfo, Error> {
    let host = |e: std::io::Error| Error::host("write to", path, e);
    let file = HostFile::new(fd).map_err(host)?;
    let size = options.size.0;
    match options.format {
        Format::Raw => Raw::create(&file, size, options.variant).map_err(host)?,
        Format::Vmdk => {
            let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
            if !vmdk::create(&file, path, size, uuid).map_err(host)? {
                return Err(Error::BadSize { format: Format::Vmdk, size, why: "the limit is 4 TiB" });
            }
        }
        Format::Vhd => {
            let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
            if !vhd::create(&file, options.variant, size, uuid).map_err(host)? {
                return Err(Error::BadSize { format: Format::Vhd, size, why: "the limit is 2040 GiB" });
            }
        }
        _ => {
            let new = NewVdi {
                variant: options.variant,
                size,
                uuid: options.uuid.unwrap_or_else(Uuid::new_v4),
                parent,
                comment: options.comment.clone(),
            };
            vdi::create(&file, &new).map_err(|error| match error {
                CreateError::Host(e) => host(e),
                CreateError::TooLarge => {
                    Error::BadSize { format: Format::Vdi, size, why: "the limit is 64 TiB" }
                }
            })?;
        }
    }
    sync_directory(path);
    info(path, Some(options.format))
}

/// Makes a new directory entry durable. Not every file system can; the file itself is safe already.
fn sync_directory(path: &Path) {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let opened = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    if let Err(error) = opened.and_then(rustix::fs::fsync) {
        tracing::debug!(target: "vd", dir = %dir.display(), %error, "directory not synchronised");
    }
}

/// See [`crate::exercise`].
pub(crate) fn exercise(bytes: &[u8]) {
    let path = Path::new("memory");
    let Ok(format) = probe_file(&MemoryFile::new(bytes)) else { return };
    let open = |mode| Image::from_file(Box::new(MemoryFile::new(bytes)), path, mode, format, None);
    let Ok(image) = open(OpenMode::ReadWrite).or_else(|_| open(OpenMode::ReadOnly)) else { return };
    // Memory, not disk space, is what a fuzzer runs out of.
    if image.size > 64 << 20 {
        return;
    }
    let mut sector = [0x5a; 1024];
    for offset in [0, image.size / 2, image.size.saturating_sub(1024)] {
        let _ = image.read(offset, &mut sector);
        let _ = image.write(offset, &sector);
        let _ = image.discard(offset, 1024);
    }
    let _ = image.flush();
}
