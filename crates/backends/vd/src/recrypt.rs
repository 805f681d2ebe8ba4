//! Encrypting, decrypting and encrypting anew: an image's files are copied into a folder beside it, and there the content is
//! changed. The image itself stays as it was until everything is done and durable; then the new files take the places of the old.
//!
//! Key and content lie in different files, so whoever keeps the key notes the new one durably between the two steps, with where
//! the new files are: as long as one of them is in its folder the switch is not complete, and [`Recrypted::finish`] completes it.

use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::copy::Progress;
use crate::create::sync_directory;
use crate::crypt::{Dek, SECTOR};
use crate::error::Error;
use crate::file::{FileIo, HostFile};
use crate::format::Format;
use crate::image::{Image, OpenMode, open_file};

/// Bytes that are copied at a time.
const PIECE: u64 = 4 << 20;

/// The files of an image with the content encrypted otherwise, in a folder beside it.
pub struct Recrypted {
    folder: PathBuf,
    /// Keeps others from the old files.
    _old: Vec<HostFile>,
}

impl Recrypted {
    /// Makes `folder`, which must lie on the file system of the image and is replaced if a run that was killed has left it, with
    /// the image's files encrypted by `new` instead of `old`. A differencing image is taken by itself: each one of its chain has
    /// to be treated so. Returns when all is durable.
    pub fn make(
        path: &Path,
        format: Format,
        folder: &Path,
        old: Option<&Dek>,
        new: Option<&Dek>,
        progress: Progress<'_>,
    ) -> Result<Self, Error> {
        let made = Self::try_make(path, format, folder, old, new, progress);
        if made.is_err() {
            // Ours; it may not be there at all.
            let _ = std::fs::remove_dir_all(folder);
        }
        made
    }

    fn try_make(
        path: &Path,
        format: Format,
        folder: &Path,
        old: Option<&Dek>,
        new: Option<&Dek>,
        progress: Progress<'_>,
    ) -> Result<Self, Error> {
        let files = crate::files(path, format)?;
        if files.iter().any(|file| file.parent() != path.parent()) {
            let what = "encrypting an image whose data lie elsewhere, or a disk of the host; clone it to an image first";
            return Err(Error::unsupported(path, what));
        }
        let kept: Vec<HostFile> =
            files.iter().map(|file| open_file(file, OpenMode::ReadWrite)).collect::<Result<_, _>>()?;
        Self::forget(folder);
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::host("remove", folder, error));
            }
            _ => {}
        }
        rustix::fs::mkdir(folder, Mode::from_raw_mode(0o700))
            .map_err(|e| Error::host("create", folder, e))?;
        for (file, from) in files.iter().zip(&kept) {
            let to = folder.join(file.file_name().unwrap_or_default());
            copy_file(from, file, &to, &mut || progress(0, 1))?;
        }
        let name = folder.join(path.file_name().unwrap_or_default());
        // The parent is not needed: what the image does not hold itself does not change.
        let image = Image::open_within(&name, format, folder)?;
        if let (_, layout) = image.layout()
            && let Some(reason) = layout.read_only_reason()
        {
            return Err(Error::unsupported(path, reason));
        }
        if !image.size().0.is_multiple_of(SECTOR as u64) {
            return Err(Error::unsupported(path, "encrypting a disk that does not end with a whole sector"));
        }
        let ciphers = [old, new].map(|dek| dek.map(Dek::cipher));
        image.recrypt(ciphers[0].as_ref(), ciphers[1].as_ref(), progress)?;
        drop(image);
        for file in &files {
            let to = folder.join(file.file_name().unwrap_or_default());
            let synced = std::fs::File::open(&to).and_then(|file| file.sync_all());
            synced.map_err(|e| Error::host("write to", &to, e))?;
        }
        sync_directory(&name);
        sync_directory(folder);
        Ok(Self { folder: folder.to_owned(), _old: kept })
    }

    /// Puts the new files into the places of the old ones. The mark of that ([`Recrypted::finish`]) stays.
    pub fn install(self) -> Result<(), Error> {
        Self::finish(&self.folder).map(drop)
    }

    /// Where a folder goes when its files are in their places: it tells whoever finds it that the switch was made.
    fn mark(folder: &Path) -> PathBuf {
        let mut name = folder.as_os_str().to_owned();
        name.push(".done");
        PathBuf::from(name)
    }

    /// Removes the mark of a switch, when the new key is on record for good.
    pub fn forget(folder: &Path) {
        let _ = std::fs::remove_dir(Self::mark(folder));
    }

    /// Whether a switch to the files in `folder` can be, or was, made.
    pub fn is_there(folder: &Path) -> bool {
        folder.exists() || Self::mark(folder).exists()
    }

    /// Completes a switch: moves every file that is still in `folder` out of it, and the folder itself away. Whether there was
    /// something to do.
    pub fn finish(folder: &Path) -> Result<bool, Error> {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::host("read", folder, error)),
        };
        let place = folder.parent().unwrap_or(Path::new("."));
        for entry in entries {
            let entry = entry.map_err(|e| Error::host("read", folder, e))?;
            let to = place.join(entry.file_name());
            rustix::fs::rename(entry.path(), &to).map_err(|e| Error::host("replace", &to, e))?;
        }
        // The files are in their places for good before the folder, which tells of the switch, goes.
        sync_strictly(place)?;
        let mark = Self::mark(folder);
        rustix::fs::rename(folder, &mark).map_err(|e| Error::host("rename", folder, e))?;
        sync_strictly(place)?;
        Ok(true)
    }

    /// Takes the new files away again.
    pub fn discard(self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Makes the entries of a directory durable. Some file systems have nothing to do for that, and say so.
fn sync_strictly(folder: &Path) -> Result<(), Error> {
    let opened =
        rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    match opened.and_then(rustix::fs::fsync) {
        Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(Error::host("write to", folder, error)),
    }
}

/// Copies a file with its holes.
fn copy_file(from: &HostFile, name: &Path, to: &Path, go_on: &mut dyn FnMut() -> bool) -> Result<(), Error> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd =
        rustix::fs::open(to, flags, Mode::from_raw_mode(0o600)).map_err(|e| Error::host("create", to, e))?;
    // As the old one could be opened, so can the new.
    if let Ok(old) = rustix::fs::stat(name) {
        let _ = rustix::fs::fchmod(&fd, Mode::from_raw_mode(old.st_mode & 0o777));
    }
    let reading = |e| Error::host("read from", name, e);
    let writing = |e| Error::host("write to", to, e);
    let target = HostFile::new(fd).map_err(writing)?;
    let len = from.len().map_err(reading)?;
    target.set_len(len).map_err(writing)?;
    let mut buffer = Vec::new();
    let mut at = 0;
    while at < len {
        let Some(data) = from.data(at, len - at).map_err(reading)? else { break };
        at = data.start;
        while at < data.end {
            if !go_on() {
                return Err(Error::Cancelled { path: name.to_owned() });
            }
            buffer.resize((data.end - at).min(PIECE) as usize, 0);
            from.read_at(at, &mut buffer).map_err(reading)?;
            target.write_at(at, &buffer).map_err(writing)?;
            at += buffer.len() as u64;
        }
    }
    Ok(())
}
