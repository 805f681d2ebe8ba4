//! New image files.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;
use vbox_types::ByteSize;

use crate::error::Error;
use crate::file::{FileIo, HostFile};
use crate::format::{Format, NewParent, Variant};
use crate::image::{Image, MediumInfo, OpenMode, info};
use crate::raw::Raw;
use crate::vdi::{self, CreateError, NewVdi};
use crate::vhd;
use crate::vmdk::{self, NewVmdk};

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

/// Creates a new base image; an existing file is never touched. A stream-optimized one holds zeros for good.
pub fn create(path: &Path, options: &CreateOptions) -> Result<MediumInfo, Error> {
    if options.variant == Variant::Differencing {
        return Err(Error::NoSuchVariant { format: options.format, variant: options.variant });
    }
    create_with(path, path, options, None)
}

/// As [`create`], for a file that will be renamed to `name`.
pub(crate) fn create_as(path: &Path, name: &Path, options: &CreateOptions) -> Result<MediumInfo, Error> {
    create_with(path, name, options, None)
}

/// Creates a VMDK image that stands for a disk of the host, or for a file as for a disk: a descriptor alone, all data stay in `disk`.
/// The disk's size is the image's.
pub fn create_raw_disk(path: &Path, disk: &Path, uuid: Option<Uuid>) -> Result<MediumInfo, Error> {
    // Where it is looked for does not depend on where the descriptor lies.
    let disk = std::path::absolute(disk).map_err(|e| Error::host("find", disk, e))?;
    let size = crate::image::open_file(&disk, OpenMode::ReadOnly)?
        .len()
        .map_err(|e| Error::host("read the size of", &disk, e))?;
    let name = disk.to_str().filter(|name| !name.contains(['"', '\n']));
    let Some(name) = name else {
        let what = "a disk whose name cannot stand in a descriptor; give it another name".into();
        return Err(Error::Unsupported { path: disk, what });
    };
    if size == 0 || !size.is_multiple_of(512) {
        let why = "the disk's size is not a multiple of 512 bytes";
        return Err(Error::BadSize { format: Format::Vmdk, size, why });
    }
    let created = RefCell::new(Vec::new());
    let file = HostFile::new(create_file(path, &created)?).map_err(|e| Error::host("create", path, e))?;
    let new = NewVmdk {
        variant: Variant::Fixed,
        size,
        uuid: uuid.unwrap_or_else(Uuid::new_v4),
        parent: None,
        comment: String::new(),
    };
    let written = vmdk::create_raw_disk(&file, &new, name);
    if let Err(error) = written.map_err(|e| Error::host("write to", path, e)) {
        // Ours: it was created just now.
        let _ = rustix::fs::unlink(path);
        return Err(error);
    }
    sync_directory(path);
    info(path, Some(Format::Vmdk))
}

/// Creates a differencing image of the parent's size. The parent must not be written any more.
pub fn create_child(
    path: &Path,
    format: Format,
    parent: &Image,
    uuid: Option<Uuid>,
) -> Result<MediumInfo, Error> {
    let facts = parent.facts();
    let options = CreateOptions {
        format,
        variant: Variant::Differencing,
        size: parent.size(),
        uuid,
        comment: String::new(),
    };
    let below = NewParent {
        uuid: facts.uuid.unwrap_or_default(),
        modification: facts.modification.unwrap_or_default(),
        content: facts.content,
        path: parent.path().to_owned(),
        format: parent.format(),
    };
    create_with(path, path, &options, Some(below))
}

/// Whether images of this format and variant can be created.
pub fn can_create(format: Format, variant: Variant) -> bool {
    match format {
        Format::Vdi | Format::Vhd | Format::Vhdx => {
            matches!(variant, Variant::Dynamic | Variant::Fixed | Variant::Differencing)
        }
        Format::Raw => matches!(variant, Variant::Dynamic | Variant::Fixed),
        Format::Parallels => variant == Variant::Dynamic,
        Format::Vmdk => true,
        Format::Qcow => matches!(variant, Variant::Dynamic | Variant::Differencing),
        Format::Qed | Format::Dmg | Format::Iscsi => false,
    }
}

fn create_with(
    path: &Path,
    name: &Path,
    options: &CreateOptions,
    parent: Option<NewParent>,
) -> Result<MediumInfo, Error> {
    let bad_size = |why| Err(Error::BadSize { format: options.format, size: options.size.0, why });
    if options.size.0 == 0 {
        return bad_size("it must not be empty");
    }
    if !options.size.0.is_multiple_of(512) {
        return bad_size("the size is not a multiple of 512 bytes");
    }
    if !can_create(options.format, options.variant) {
        return Err(Error::NoSuchVariant { format: options.format, variant: options.variant });
    }
    let created = RefCell::new(Vec::new());
    let result = fill(path, name, options, parent, &created);
    if result.is_err() {
        // Ours: they were created just now. Should the removal fail too, the first error is the one to tell.
        for path in created.into_inner() {
            let _ = rustix::fs::unlink(&path);
        }
    }
    result
}

/// Creates a file that must not exist, noting that it is ours.
fn create_file(path: &Path, created: &RefCell<Vec<PathBuf>>) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::from_raw_mode(0o600)) {
        Ok(fd) => {
            created.borrow_mut().push(path.to_owned());
            Ok(fd)
        }
        Err(Errno::EXIST) => Err(Error::Exists { path: path.to_owned() }),
        Err(error) => Err(Error::host("create", path, error)),
    }
}

fn fill(
    path: &Path,
    name: &Path,
    options: &CreateOptions,
    parent: Option<NewParent>,
    created: &RefCell<Vec<PathBuf>>,
) -> Result<MediumInfo, Error> {
    let host = |e: std::io::Error| Error::host("write to", path, e);
    let file = HostFile::new(create_file(path, created)?).map_err(host)?;
    let size = options.size.0;
    let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
    let too_large = |why| Err(Error::BadSize { format: options.format, size, why });
    match options.format {
        Format::Raw => Raw::create(&file, size, options.variant).map_err(host)?,
        Format::Vmdk => {
            let new =
                NewVmdk { variant: options.variant, size, uuid, parent, comment: options.comment.clone() };
            let further = |path: &Path| -> Result<Box<dyn FileIo>, Error> {
                let file = HostFile::new(create_file(path, created)?);
                Ok(Box::new(file.map_err(|e| Error::host("create", path, e))?))
            };
            if !vmdk::create(&file, name, &new, &further)? {
                return too_large("the limit is 4 TiB");
            }
        }
        Format::Vhd => {
            if !vhd::create(&file, options.variant, size, uuid, parent.as_ref()).map_err(host)? {
                return too_large("the limit is 2040 GiB");
            }
        }
        Format::Vdi => {
            let new = NewVdi {
                variant: options.variant,
                size,
                uuid,
                parent: parent.map(|p| (p.uuid, p.modification)),
                comment: options.comment.clone(),
            };
            match vdi::create(&file, &new) {
                Ok(()) => {}
                Err(CreateError::Host(e)) => return Err(host(e)),
                Err(CreateError::TooLarge) => return too_large("the limit is 64 TiB"),
            }
        }
        Format::Qcow => {
            let backing = parent.as_ref().map(|p| (p, p.format));
            if !crate::qcow::create(&file, size, backing).map_err(host)? {
                return too_large("the limit is 1 PiB");
            }
        }
        Format::Vhdx => {
            if !crate::vhdx::create(&file, size, options.variant, parent.as_ref()).map_err(host)? {
                return too_large("the limit is 64 TiB");
            }
        }
        Format::Parallels => {
            if !crate::parallels::create(&file, size).map_err(host)? {
                return too_large("the limit is 2 TiB");
            }
        }
        // Refused above.
        Format::Qed | Format::Dmg | Format::Iscsi => {
            return Err(Error::NoSuchVariant { format: options.format, variant: options.variant });
        }
    }
    sync_directory(path);
    info(path, Some(options.format))
}

/// Makes a new directory entry durable. Not every file system can; the file itself is safe already.
pub(crate) fn sync_directory(path: &Path) {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let opened = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    if let Err(error) = opened.and_then(rustix::fs::fsync) {
        tracing::debug!(target: "vd", dir = %dir.display(), %error, "directory not synchronised");
    }
}
