//! The formats, how files are told apart, and what a format module provides.

use std::fmt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use uuid::Uuid;
use vbox_types::ByteSize;

use crate::error::Error;
use crate::file::{FileIo, HostFile};

/// An image format, by the name VirtualBox uses for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Plain sectors: disks, ISO images, floppies, host devices.
    Raw,
    Vdi,
    Vmdk,
    Vhd,
    Vhdx,
    Parallels,
    Qcow,
    Qed,
    Dmg,
    /// A disk of an iSCSI target, no file.
    Iscsi,
}

impl Format {
    /// The name as settings files and the command line have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "RAW",
            Self::Vdi => "VDI",
            Self::Vmdk => "VMDK",
            Self::Vhd => "VHD",
            Self::Vhdx => "VHDX",
            Self::Parallels => "Parallels",
            Self::Qcow => "QCOW",
            Self::Qed => "QED",
            Self::Dmg => "DMG",
            Self::Iscsi => "iSCSI",
        }
    }

    /// The format with this name in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        const ALL: [Format; 10] = [
            Format::Raw,
            Format::Vdi,
            Format::Vmdk,
            Format::Vhd,
            Format::Vhdx,
            Format::Parallels,
            Format::Qcow,
            Format::Qed,
            Format::Dmg,
            Format::Iscsi,
        ];
        ALL.into_iter().find(|f| f.name().eq_ignore_ascii_case(name))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How an image of a format is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Grows as it is written.
    Dynamic,
    /// Takes its full size from the start.
    Fixed,
    /// Holds only what differs from its parent.
    Differencing,
    /// VMDK: grows, in files of at most 2 GB.
    Split,
    /// VMDK: full size from the start, in files of at most 2 GB.
    SplitFixed,
    /// VMDK: compressed, written once from start to end, as appliances carry it.
    StreamOptimized,
    /// VMDK: full size from the start, as VMware ESX has it.
    Esx,
}

impl Variant {
    /// Whether all storage is there from the start.
    pub const fn is_fixed(self) -> bool {
        matches!(self, Self::Fixed | Self::SplitFixed | Self::Esx)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Differencing => "differencing",
            Self::Split => "split2G",
            Self::SplitFixed => "fixed split2G",
            Self::StreamOptimized => "streamOptimized",
            Self::Esx => "ESX",
        })
    }
}

/// Tells a file's format by its content; what has no signature is [`Format::Raw`]. For files that a user names for the
/// first time, never for a file whose format is already on record.
pub fn probe(path: &Path) -> Result<Format, Error> {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .map_err(|e| Error::host("open", path, e))?;
    let file = HostFile::new(fd).map_err(|e| Error::host("open", path, e))?;
    probe_file(&file).map_err(|e| Error::host("read from", path, e))
}

pub(crate) fn probe_file(file: &dyn FileIo) -> std::io::Result<Format> {
    let mut head = [0; 512];
    file.read_at(0, &mut head)?;
    let starts: [(&[u8], Format); 9] = [
        (b"conectix", Format::Vhd),
        (b"KDMV", Format::Vmdk),
        (b"COWD", Format::Vmdk),
        (b"# Disk DescriptorFile", Format::Vmdk),
        (b"vhdxfile", Format::Vhdx),
        (b"WithoutFreeSpace", Format::Parallels),
        (b"WithouFreSpacExt", Format::Parallels),
        (b"QFI\xfb", Format::Qcow),
        (b"QED\0", Format::Qed),
    ];
    if let Some((_, format)) = starts.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Ok(*format);
    }
    if crate::vdi::is_vdi(&head) {
        return Ok(Format::Vdi);
    }
    // VHD and UDIF keep their signatures in the last 512 bytes.
    let len = file.len()?;
    if len >= 512 {
        let mut tail = [0; 512];
        file.read_at(len - 512, &mut tail)?;
        if tail.starts_with(b"conectix") {
            return Ok(Format::Vhd);
        }
        if tail.starts_with(b"koly") {
            return Ok(Format::Dmg);
        }
    }
    Ok(Format::Raw)
}

/// Where a virtual range lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the file, from this offset on.
    File(u64),
    /// In a compressed unit, `skip` bytes from its start on. [`Layout::unpack`] gives the whole unit by its number, which is not 0.
    Packed { unit: u64, skip: u64 },
    /// Nowhere: it reads as zeros, whatever a parent holds.
    Zero,
    /// Not in this image: the parent has it; without a parent it reads as zeros.
    Absent,
}

/// A virtual range of `len` bytes with one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) place: Place,
    pub(crate) len: u64,
}

/// The start of a write to a range that has no place in the file yet.
pub(crate) enum Begin<'a> {
    /// It got one meanwhile: map it again.
    Mapped,
    /// Storage was set aside; dropping the guard gives it back.
    Allocated(Box<dyn Allocation + 'a>),
}

/// Storage set aside for one unit of a layout, in the file but not yet part of the image.
pub(crate) trait Allocation {
    /// The virtual offset of the unit's first byte.
    fn start(&self) -> u64;
    /// Bytes in the unit; the last one may reach past the image's end.
    fn len(&self) -> u64;
    /// The file offset of the unit's first byte. The storage reads as zeros.
    fn file_offset(&self) -> u64;
    /// Makes the unit part of the image, once its content has been written.
    fn commit(self: Box<Self>);
}

/// What an image's metadata say about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) variant: Variant,
    pub(crate) size: ByteSize,
    pub(crate) uuid: Option<Uuid>,
    pub(crate) modification: Option<Uuid>,
    pub(crate) parent: Option<Uuid>,
    pub(crate) parent_modification: Option<Uuid>,
    /// VMware's identifier of the content, which changes with it.
    pub(crate) content: Option<u32>,
    /// Where the file says its parent lies: a hint, never followed by itself.
    pub(crate) parent_hint: Option<String>,
    pub(crate) comment: String,
}

impl Facts {
    /// A base image without names.
    pub(crate) fn new(variant: Variant, size: u64) -> Self {
        Self {
            variant,
            size: ByteSize(size),
            uuid: None,
            modification: None,
            parent: None,
            parent_modification: None,
            content: None,
            parent_hint: None,
            comment: String::new(),
        }
    }
}

/// Told how many bytes of how many are done; `false` to stop.
pub(crate) type Step<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// UUIDs that are to be changed; those that are `None` stay.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ids {
    pub uuid: Option<Uuid>,
    pub modification: Option<Uuid>,
    pub parent: Option<Uuid>,
    pub parent_modification: Option<Uuid>,
}

/// What a new differencing image records of its parent.
#[derive(Clone, Debug)]
pub(crate) struct NewParent {
    pub(crate) uuid: Uuid,
    pub(crate) modification: Uuid,
    /// VMware's identifier of the content, if the parent has one.
    pub(crate) content: Option<u32>,
    pub(crate) path: std::path::PathBuf,
    pub(crate) format: Format,
}

/// A format at work: maps virtual ranges to file ranges. All methods may be called from several threads at once.
/// Ranges passed in lie inside the image.
pub(crate) trait Layout: Send + Sync {
    fn facts(&self) -> Facts;

    /// Where the range from `offset` on lies; the answer covers at least one and at most `len` bytes. Formats with large
    /// maps read the part they need.
    fn map(&self, file: &dyn FileIo, offset: u64, len: u64) -> std::io::Result<Extent>;

    /// The range at `offset`, which lies in the file, is about to be written, for formats that note it.
    fn before_write(&self, file: &dyn FileIo, offset: u64) -> std::io::Result<()>;

    /// Sets storage aside for the `len` bytes at `offset`, which [`Layout::map`] had nowhere or in a compressed unit.
    fn begin(&self, file: &dyn FileIo, offset: u64, len: u64) -> std::io::Result<Begin<'_>>;

    /// The content of a compressed unit; formats without such units fail.
    fn unpack(&self, file: &dyn FileIo, unit: u64) -> std::io::Result<Vec<u8>>;

    /// Why the image can only be read, if so.
    fn read_only_reason(&self) -> Option<&'static str>;

    /// The image is about to be changed for the first time since it was opened: gives it a new modification UUID.
    fn modified(&self, file: &dyn FileIo) -> std::io::Result<()>;

    /// Makes what was committed durable: data first, then the metadata that finds it.
    fn flush(&self, file: &dyn FileIo) -> std::io::Result<()>;

    /// Whether commits wait for a flush.
    fn is_dirty(&self) -> bool;

    /// Gives back the storage of units that hold zeros, and moves others so that the file becomes shorter. `child` tells that
    /// there is something below that zeros have to hide. Nobody else uses the image meanwhile, and it is opened anew
    /// afterwards. `false` if the format cannot do it in place; then nothing has changed.
    fn compact(&self, _file: &dyn FileIo, _child: bool, _step: Step<'_>) -> std::io::Result<bool> {
        Ok(false)
    }

    /// Makes the disk larger. Use and result as for [`Layout::compact`].
    fn grow(&self, _file: &dyn FileIo, _size: u64) -> std::io::Result<bool> {
        Ok(false)
    }

    /// Changes the UUIDs that are given. `false` if the format, or this file, has no place for one of them.
    fn set_ids(&self, _file: &dyn FileIo, _ids: &Ids) -> std::io::Result<bool> {
        Ok(false)
    }
}
/// Whether a checksum is the one that is stored. It tells accidents, not attacks, so a fuzzer need not find the right one.
pub(crate) fn sums_agree(stored: u32, computed: u32) -> bool {
    cfg!(fuzzing) || stored == computed
}
