//! VMDK images. Source: VMware "Virtual Disk Format 5.0", VirtualBox `src/VBox/Storage/VMDK.cpp`.
//!
//! * `monolithicSparse`, in this module: one file with a header, a text descriptor, two copies of a directory with tables of sector
//!   numbers ([`header`]), then grains of usually 64 KiB.
//! * Images in several files and ones on raw disks ([`extents`]): the descriptor is a file of its own.
//! * `streamOptimized` ([`stream`]): compressed, for reading; written once from start to end.
//!
//! Sparse extents of VMware ESX ("COWD") are refused by name.

mod descriptor;
mod extents;
mod header;
mod stream;

use std::io;
use std::path::Path;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Ids, Layout, Step, Variant};
use crate::units::Units;
pub(crate) use descriptor::NewVmdk;
use descriptor::{Descriptor, ExtentKind, new_descriptor};
use header::{SECTOR, Tables, create_sparse, damaged, open_units, read_header};
pub(crate) use stream::{GRAIN, StreamWriter, pack};

/// How further files of an image are opened or created.
pub(crate) type Opener<'a> = &'a dyn Fn(&Path) -> Result<Box<dyn FileIo>, Error>;

/// A VMDK image in one file at work.
struct Vmdk {
    units: Units<Tables>,
    descriptor: Descriptor,
    modification: Mutex<Option<Uuid>>,
}

/// What the descriptor says of an image of `size` bytes.
fn facts(descriptor: &Descriptor, size: u64) -> Facts {
    let parent = descriptor.uuid("ddb.uuid.parent");
    let child = descriptor.content("parentCID").is_some_and(|cid| cid != u32::MAX);
    let kind = descriptor.value("createType").unwrap_or_default();
    let variant = match kind {
        _ if parent.is_some() || child => Variant::Differencing,
        "streamOptimized" => Variant::StreamOptimized,
        "twoGbMaxExtentSparse" => Variant::Split,
        "twoGbMaxExtentFlat" => Variant::SplitFixed,
        "vmfs" => Variant::Esx,
        "monolithicFlat" | "fullDevice" | "partitionedDevice" => Variant::Fixed,
        _ => Variant::Dynamic,
    };
    Facts {
        uuid: descriptor.uuid("ddb.uuid.image"),
        modification: descriptor.uuid("ddb.uuid.modification"),
        parent,
        parent_modification: descriptor.uuid("ddb.uuid.parentmodification"),
        content: descriptor.content("CID"),
        parent_hint: descriptor.value("parentFileNameHint").map(str::to_owned),
        comment: descriptor.value("ddb.comment").unwrap_or_default().to_owned(),
        ..Facts::new(variant, size)
    }
}

/// The facts in a VMDK file's header and descriptor, without its tables.
pub(crate) fn read_facts(file: &dyn FileIo, path: &Path) -> Result<Facts, Error> {
    if extents::is_descriptor(file, path)? {
        return extents::read_facts(file, path);
    }
    let (header, descriptor) = read_header(file, path)?;
    let size = header.capacity * SECTOR;
    Ok(match header.compressed {
        // Not every maker says so in the descriptor.
        true => Facts { variant: Variant::StreamOptimized, ..facts(&descriptor, size) },
        false => facts(&descriptor, size),
    })
}

/// The files beside the descriptor, as far as they lie in its directory and belong to the image alone.
pub(crate) fn further_files(file: &dyn FileIo, path: &Path) -> Result<Vec<std::path::PathBuf>, Error> {
    if extents::is_descriptor(file, path)? { extents::files(file, path) } else { Ok(Vec::new()) }
}

/// Reads and checks header, descriptor, directory and tables. Images of several files replace `file` by all of them.
pub(crate) fn open(
    file: Box<dyn FileIo>,
    path: &Path,
    open: Opener<'_>,
) -> Result<(Box<dyn FileIo>, Box<dyn Layout>), Error> {
    if extents::is_descriptor(&*file, path)? {
        return extents::open(file, path, open);
    }
    let (header, descriptor) = read_header(&*file, path)?;
    match descriptor.extents() {
        Ok(extents) if extents.len() == 1 && extents[0].kind == ExtentKind::Sparse => {}
        Ok(extents) => {
            let kinds: Vec<_> = extents.iter().map(|e| format!("{:?}", e.kind)).collect();
            return Err(Error::unsupported(path, format!("VMDK extents {}", kinds.join(", "))));
        }
        Err(line) => {
            return Err(damaged(path, header.descriptor.start, format!("bad extent line \"{line}\"")));
        }
    }
    if header.compressed {
        let layout = stream::open(&*file, path, header, descriptor)?;
        return Ok((file, layout));
    }
    let modification = descriptor.uuid("ddb.uuid.modification");
    let units = open_units(&*file, path, header)?;
    Ok((file, Box::new(Vmdk { units, descriptor, modification: Mutex::new(modification) })))
}

/// The name of a file as descriptors have it.
fn plain_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().replace(['"', '\n'], "_")
}

/// Writes a new image into an empty file, with further files from `create`; `Ok(false)` if it would be too large.
pub(crate) fn create(
    file: &dyn FileIo,
    path: &Path,
    new: &NewVmdk,
    create: Opener<'_>,
) -> Result<bool, Error> {
    let host = |e| Error::host("write to", path, e);
    let sectors = new.size / SECTOR;
    let line = format!("RW {sectors} SPARSE \"{}\"", plain_name(path));
    match new.variant {
        Variant::Dynamic | Variant::Differencing => {
            create_sparse(file, sectors, Some(&new_descriptor(new, &[line]))).map_err(host)
        }
        Variant::StreamOptimized => {
            let mut out = FileWriter { file, at: 0 };
            let writer = StreamWriter::new(&mut out, path, new).map_err(host)?;
            if let Some(writer) = writer {
                writer.finish().map_err(host)?;
                file.sync().map_err(host)?;
                return Ok(true);
            }
            Ok(false)
        }
        _ => extents::create(file, path, new, create),
    }
}

/// Writes the descriptor of an image whose data are the host's disk `name`.
pub(crate) fn create_raw_disk(file: &dyn FileIo, new: &NewVmdk, name: &str) -> io::Result<()> {
    let line = format!("RW {} FLAT \"{name}\" 0", new.size / SECTOR);
    file.write_at(0, descriptor::descriptor_of(new, "fullDevice", &[line]).as_bytes())?;
    file.sync()
}

/// Writes one after the other into a file.
struct FileWriter<'a> {
    file: &'a dyn FileIo,
    at: u64,
}

impl io::Write for FileWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.write_at(self.at, data)?;
        self.at += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Renews modification UUID and content identifier, by which VMware tells that a parent has changed, in the descriptor at file
/// offset `start`. The UUID, if there is a place for it.
fn renew(file: &dyn FileIo, descriptor: &Descriptor, start: u64) -> io::Result<Option<Uuid>> {
    let uuid = Uuid::new_v4();
    let content = format!("{:08x}", uuid.as_fields().0 & 0x7fff_ffff);
    let mut renewed = None;
    for (key, value) in [("CID", content), ("ddb.uuid.modification", uuid.to_string())] {
        // Other makers' descriptors may lack the key, or write it at another length.
        if descriptor.value(key).is_some_and(|old| old.len() == value.len())
            && let Some(at) = descriptor.value_offset(key)
        {
            file.write_at(start + at as u64, value.as_bytes())?;
            if key != "CID" {
                renewed = Some(uuid);
            }
        }
    }
    Ok(renewed)
}

/// Replaces UUIDs in the descriptor at file offset `start`; `false` if there is no place for one.
fn set_ids(file: &dyn FileIo, descriptor: &Descriptor, start: u64, ids: &Ids) -> io::Result<bool> {
    let fields = [
        ("ddb.uuid.image", ids.uuid),
        ("ddb.uuid.modification", ids.modification),
        ("ddb.uuid.parent", ids.parent),
        ("ddb.uuid.parentmodification", ids.parent_modification),
    ];
    let mut changes = Vec::new();
    for (key, uuid) in fields {
        let Some(uuid) = uuid else { continue };
        let text = uuid.to_string();
        match (descriptor.value(key), descriptor.value_offset(key)) {
            (Some(old), Some(at)) if old.len() == text.len() => changes.push((at, text)),
            _ => return Ok(false),
        }
    }
    for (at, text) in changes {
        file.write_at(start + at as u64, text.as_bytes())?;
    }
    Ok(true)
}

impl Layout for Vmdk {
    fn facts(&self) -> Facts {
        let facts = facts(&self.descriptor, self.units.format().header.capacity * SECTOR);
        Facts { modification: *self.modification.lock(), ..facts }
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
        let start = self.units.format().header.descriptor.start;
        if let Some(uuid) = renew(file, &self.descriptor, start)? {
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
        self.units.flush(file)
    }

    fn is_dirty(&self) -> bool {
        self.units.is_dirty()
    }

    fn compact(&self, file: &dyn FileIo, child: bool, step: Step<'_>) -> io::Result<bool> {
        self.units.compact(file, child, step)?;
        Ok(true)
    }

    fn set_ids(&self, file: &dyn FileIo, ids: &Ids) -> io::Result<bool> {
        set_ids(file, &self.descriptor, self.units.format().header.descriptor.start, ids)
    }
}
