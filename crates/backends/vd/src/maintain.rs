//! What is done to images that no machine uses: compacting, resizing, merging, other UUIDs, repair.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;
use vbox_types::ByteSize;

use crate::copy::{Progress, copy};
use crate::create::{CreateOptions, create_as, sync_directory};
use crate::error::Error;
use crate::file::FileIo;
use crate::format::{Format, Ids, Layout, Variant};
use crate::image::{Image, OpenMode};
use crate::parallels::Parallels;
use crate::vhd::Vhd;
use crate::vhdx::Vhdx;

/// Bytes that are moved at a time.
const PIECE: u64 = 4 << 20;

/// Gives storage that holds zeros back to the host. A differencing image needs its opened parent.
pub fn compact(
    path: &Path,
    format: Format,
    parent: Option<Arc<Image>>,
    progress: Progress<'_>,
) -> Result<(), Error> {
    let child = parent.is_some();
    let image = Image::open_with(path, OpenMode::ReadWrite, format, parent)?;
    let size = image.size();
    let (file, layout) = image.layout();
    let done = layout.compact(file, child, &mut *progress).map_err(|e| match e.kind() {
        std::io::ErrorKind::Interrupted => Error::Cancelled { path: path.to_owned() },
        _ => Error::host("compact", path, e),
    })?;
    if !done && !child && !image.facts().variant.is_fixed() {
        return rewrite(image, size, progress);
    }
    progress(size.0, size.0);
    Ok(())
}

/// Makes the disk larger. The new part reads as zeros.
pub fn resize(
    path: &Path,
    format: Format,
    parent: Option<Arc<Image>>,
    size: ByteSize,
    progress: Progress<'_>,
) -> Result<(), Error> {
    let child = parent.is_some();
    let image = Image::open_with(path, OpenMode::ReadWrite, format, parent)?;
    if size.0 < image.size().0 {
        return Err(Error::BadSize { format, size: size.0, why: "images are never made smaller" });
    }
    if !size.0.is_multiple_of(512) {
        return Err(Error::BadSize { format, size: size.0, why: "the size is not a multiple of 512 bytes" });
    }
    let (file, layout) = image.layout();
    if layout.grow(file, size.0).map_err(|e| Error::host("resize", path, e))? {
        progress(size.0, size.0);
        return Ok(());
    }
    if child {
        return Err(Error::unsupported(path, "resizing this differencing image; resize its base"));
    }
    rewrite(image, size, progress)
}

/// Replaces the image by a copy of the given size. Until the copy is whole the file stays as it was.
fn rewrite(image: Image, size: ByteSize, progress: Progress<'_>) -> Result<(), Error> {
    let (path, format) = (image.path().to_owned(), image.format());
    let facts = image.facts();
    if crate::files(&path, format)?.len() > 1 || facts.variant == Variant::StreamOptimized {
        return Err(Error::unsupported(&path, "this for an image of this kind; clone it"));
    }
    let options =
        CreateOptions { format, variant: facts.variant, size, uuid: facts.uuid, comment: facts.comment };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", Uuid::new_v4().simple()));
    let new = path.with_file_name(name);
    let mut replace = || -> Result<(), Error> {
        create_as(&new, &path, &options)?;
        let target = Image::open(&new, OpenMode::ReadWrite, format)?;
        copy(&image, &target, progress)?;
        drop(target);
        rustix::fs::rename(&new, &path).map_err(|e| Error::host("replace", &path, e))?;
        sync_directory(&path);
        Ok(())
    };
    let result = replace();
    if result.is_err() {
        // Ours; it may not be there at all.
        let _ = rustix::fs::unlink(&new);
    }
    result
}

/// Changes UUIDs in the file.
pub fn set_ids(path: &Path, format: Format, ids: &Ids) -> Result<(), Error> {
    // The parent is not needed for this, nor need it exist.
    let image = Image::open_alone(path, OpenMode::ReadWrite, format)?;
    let (file, layout) = image.layout();
    let done = layout.set_ids(file, ids).and_then(|done| file.sync().map(|()| done));
    if done.map_err(|e| Error::host("write to", path, e))? {
        return Ok(());
    }
    Err(Error::unsupported(path, "changing its UUIDs: its format, or this file, has no place for them"))
}

/// Mends what can be mended without guessing; returns how many places were mended. What they held reads as zeros, or as the parent's.
pub fn repair(path: &Path, format: Format) -> Result<u64, Error> {
    crate::image::check_file(path, format)?;
    if format == Format::Vmdk {
        // Its files are several.
        let image = Image::open_alone(path, OpenMode::ReadWrite, format)?;
        let (file, layout) = image.layout();
        return layout.flush(file).map(|()| 0).map_err(|e| Error::host("repair", path, e));
    }
    repair_file(&crate::image::open_file(path, OpenMode::ReadWrite)?, path, format)
}

/// [`repair`] for an image in one file.
pub(crate) fn repair_file(file: &dyn FileIo, path: &Path, format: Format) -> Result<u64, Error> {
    let flushed =
        |layout: &dyn Layout| layout.flush(file).map(|()| 0).map_err(|e| Error::host("repair", path, e));
    match format {
        Format::Vdi => crate::vdi::repair(file, path),
        Format::Qcow => crate::qcow::repair(file, path),
        // Opening for writing carries out what a log asks for, and takes the copy of a lost footer.
        Format::Vhd => flushed(&Vhd::open(file, path)?),
        Format::Vhdx => flushed(&Vhdx::open(file, path, true)?),
        Format::Parallels => flushed(&Parallels::open(file, path)?),
        Format::Raw | Format::Vmdk | Format::Qed | Format::Dmg | Format::Iscsi => Ok(0),
    }
}

/// The images from `top` down to the one above `base`, the lowest first.
fn above<'a>(top: &'a Image, base: &Path) -> Result<Vec<&'a Image>, Error> {
    let mut chain = Vec::new();
    let mut image = top;
    while image.path() != base {
        chain.push(image);
        image = image
            .parent()
            .ok_or_else(|| Error::unsupported(top.path(), "merging into an image that is not below it"))?;
    }
    chain.reverse();
    Ok(chain)
}

/// Writes what the images above `target` hold, up to and including `top`, into `target`, the image of the chain below `top` that was
/// opened for writing. Afterwards `target` shows what `top` shows, and those above it are of no use any more.
pub fn merge_down(top: &Image, target: &Image, progress: Progress<'_>) -> Result<(), Error> {
    let chain = above(top, target.path())?;
    let size = top.size().0.min(target.size().0);
    let mut buffer = Vec::new();
    // What any of them holds is taken from the top, so that each byte is written once.
    let mut at = 0;
    while at < size {
        if !progress(at, size) {
            return Err(Error::Cancelled { path: target.path().to_owned() });
        }
        let mut next: Option<std::ops::Range<u64>> = None;
        for image in &chain {
            if let Some(own) = image.next_own(at)?
                && next.as_ref().is_none_or(|n| own.start < n.start)
            {
                next = Some(own);
            }
        }
        let Some(range) = next else { break };
        let end = range.end.min(size).min(range.start + PIECE);
        if range.start >= end {
            break;
        }
        buffer.resize((end - range.start) as usize, 0);
        top.read(range.start, &mut buffer)?;
        target.write(range.start, &buffer)?;
        at = end;
    }
    target.flush()?;
    progress(size, size);
    Ok(())
}

/// Takes into `top`, which is opened for writing on its chain, what the images between it and `base` hold. Afterwards `top` shows the
/// same on `base` alone: its UUIDs are to be changed then ([`set_ids`]). With `base` none, `top` holds everything.
pub fn merge_up(top: &Image, base: Option<&Path>, progress: Progress<'_>) -> Result<(), Error> {
    let mut between: Vec<&Image> = Vec::new();
    let mut image = top.parent();
    while let Some(below) = image.filter(|i| base != Some(i.path())) {
        between.push(below);
        image = below.parent();
    }
    let size = top.size().0;
    let mut buffer = Vec::new();
    for (number, below) in between.iter().enumerate() {
        let mut at = 0;
        while let Some(range) = below.next_own(at)? {
            let done = (number as u64 * size + range.start) / between.len() as u64;
            if !progress(done, size) {
                return Err(Error::Cancelled { path: top.path().to_owned() });
            }
            let end = range.end.min(size).min(range.start + PIECE);
            if range.start >= end {
                break;
            }
            take_absent(top, range.start..end, &mut buffer)?;
            at = end;
        }
    }
    top.flush()?;
    progress(size, size);
    Ok(())
}

/// Writes into `top` what it shows in the parts of the range that it does not hold itself.
fn take_absent(top: &Image, range: std::ops::Range<u64>, buffer: &mut Vec<u8>) -> Result<(), Error> {
    let mut at = range.start;
    while at < range.end {
        let own = top.next_own(at)?.filter(|own| own.start < range.end);
        let stop = own.as_ref().map_or(range.end, |own| own.start);
        if at < stop {
            buffer.resize((stop - at) as usize, 0);
            top.read(at, buffer)?;
            top.write_all(at, buffer)?;
        }
        at = own.map_or(range.end, |own| own.end.min(range.end));
    }
    Ok(())
}

/// Where a medium's file goes when it is moved: all files of an image, with their new places.
pub(crate) fn moved(path: &Path, to: &Path, format: Format) -> Result<Vec<(PathBuf, PathBuf)>, Error> {
    let files = crate::files(path, format)?;
    if files.len() > 1 && path.file_name() != to.file_name() {
        return Err(Error::unsupported(path, "renaming an image of several files; clone it"));
    }
    let place = |file: &PathBuf| match file == path {
        true => to.to_owned(),
        false => to.with_file_name(file.file_name().unwrap_or_default()),
    };
    Ok(files.iter().map(|file| (file.clone(), place(file))).collect())
}

/// Moves an image with all its files, over file systems if need be. No file is replaced.
pub fn rename(path: &Path, to: &Path, format: Format) -> Result<(), Error> {
    let moves = moved(path, to, format)?;
    if let Some((_, taken)) = moves.iter().find(|(_, to)| std::fs::symlink_metadata(to).is_ok()) {
        return Err(Error::Exists { path: taken.clone() });
    }
    // Nobody may have it open for writing.
    drop(crate::image::open_file(path, OpenMode::ReadOnly)?);
    for (from, to) in &moves {
        match rustix::fs::rename(from, to) {
            Ok(()) => {}
            Err(rustix::io::Errno::XDEV) => {
                let copied = std::fs::copy(from, to).and_then(|_| std::fs::File::open(to)?.sync_all());
                if let Err(error) = copied {
                    let _ = rustix::fs::unlink(to);
                    return Err(Error::host("copy", from, error));
                }
            }
            Err(error) => return Err(Error::host("move", from, error)),
        }
    }
    sync_directory(to);
    for (from, _) in moves {
        // Copied ones only: the others are gone.
        let _ = rustix::fs::unlink(&from);
    }
    sync_directory(path);
    Ok(())
}
