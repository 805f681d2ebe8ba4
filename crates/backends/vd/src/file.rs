//! The file under an image: positioned I/O without a file pointer.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{Advice, FallocateFlags, FileType, SeekFrom};
use rustix::io::Errno;

/// Largest piece of zeros written at a time where the file system cannot make holes.
const ZEROS: usize = 1 << 20;

/// What an image asks of its file. Tests put a recorder in its place.
pub(crate) trait FileIo: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Fills `out` from `offset` on; bytes past the end are zero.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Writes all pieces, which follow each other, from `offset` on.
    fn write_pieces_at(&self, mut offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        for piece in pieces {
            self.write_at(offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Cuts or extends (by zeros, without storage) the file.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable, with the length.
    fn sync(&self) -> io::Result<()>;
    /// Makes the range read as zeros without changing the length, giving its storage back if the file system can.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves storage for the range, extending the file.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Gives storage of the range back where that costs little; each of its bytes reads as zero or as before.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len)
    }

    /// The first stretch of the range that may hold something else than zeros. Files that cannot tell name all of it.
    fn data(&self, offset: u64, len: u64) -> io::Result<Option<Range<u64>>> {
        Ok((len > 0).then_some(offset..offset + len))
    }

    /// The host's descriptor behind `len` bytes from `offset` on, which will be read now, and the offset in that; files that have none
    /// are read by [`FileIo::read_at`] alone.
    fn located(&self, _offset: u64, _len: u64) -> Option<Located<'_>> {
        None
    }

    /// Whether the host's page cache may keep what is read and written, as it does to begin with.
    fn set_cached(&self, _on: bool) {}
}

/// A place in a file of the host.
#[derive(Clone, Copy)]
pub(crate) struct Located<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) at: u64,
}

/// A file or block device of the host.
pub(crate) struct HostFile {
    fd: OwnedFd,
    /// A block device has a fixed length that `fstat` does not tell.
    device: bool,
    cached: AtomicBool,
    behind: Mutex<Behind>,
}

/// What of a file was read and written, and may lie in the host's page cache, in extents of 2 MiB: the kernel
/// forgets none of its large folios in part.
///
/// Opening with `O_DIRECT` would keep it out altogether, but takes whole sectors of the host's disk, which the guest's sectors and the
/// images' maps are not always, and gives up reading ahead.
#[derive(Default)]
struct Behind {
    /// Since extents were dropped last, and their bytes.
    now: BTreeSet<u64>,
    bytes: u64,
    /// Those of the time before. A read may have been on its way then, or what was written not yet in storage.
    before: BTreeSet<u64>,
}

impl Behind {
    const SHIFT: u32 = 21;
    /// Bytes and extents after which they are dropped.
    const BYTES: u64 = 32 << 20;
    const EXTENTS: usize = 4096;

    fn is_due(&self) -> bool {
        self.bytes >= Self::BYTES || self.now.len() >= Self::EXTENTS
    }
}

impl HostFile {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        let device = kind == FileType::BlockDevice;
        if !device && kind != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        Ok(Self { fd, device, cached: AtomicBool::new(true), behind: Mutex::default() })
    }

    /// Takes note of bytes that are read or written, if the host is not to keep them.
    fn touch(&self, offset: u64, len: usize) {
        if len == 0 || self.cached.load(Ordering::Relaxed) {
            return;
        }
        let mut behind = self.behind.lock();
        let last = offset.saturating_add(len as u64 - 1);
        behind.now.extend(offset >> Behind::SHIFT..=last >> Behind::SHIFT);
        behind.bytes += len as u64;
        if behind.is_due() {
            self.drop_behind(behind);
        }
    }

    /// Has the host write what it has of the file, if need be, and forget it; what it still writes is forgotten the next time.
    fn drop_behind(&self, mut behind: MutexGuard<'_, Behind>) {
        let now = std::mem::take(&mut behind.now);
        let mut extents = std::mem::replace(&mut behind.before, now.clone());
        behind.bytes = 0;
        drop(behind);
        extents.extend(now);
        for extent in extents {
            let len = NonZeroU64::new(1 << Behind::SHIFT);
            // The host may keep it all the same.
            let _ = rustix::fs::fadvise(&self.fd, extent << Behind::SHIFT, len, Advice::DontNeed);
        }
    }
}

/// Writes zeros to the range.
pub(crate) fn write_zeros(file: &dyn FileIo, offset: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; ZEROS.min(usize::try_from(len).unwrap_or(ZEROS))];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(zeros.len() as u64);
        file.write_at(offset + done, &zeros[..count as usize])?;
        done += count;
    }
    Ok(())
}

impl Drop for HostFile {
    /// A process that another thread is just starting may hold a copy of the descriptor until it executes its program. The lock must not
    /// outlive the image for that.
    fn drop(&mut self) {
        self.drop_behind(self.behind.lock());
        let _ = rustix::fs::flock(&self.fd, rustix::fs::FlockOperation::Unlock);
    }
}

impl FileIo for HostFile {
    fn len(&self) -> io::Result<u64> {
        if self.device {
            return Ok(rustix::fs::seek(&self.fd, SeekFrom::End(0))?);
        }
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0))
    }

    fn read_at(&self, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
        self.touch(offset, out.len());
        while !out.is_empty() {
            match rustix::io::pread(&self.fd, &mut *out, offset) {
                Ok(0) => {
                    out.fill(0);
                    return Ok(());
                }
                Ok(count) => {
                    offset += count as u64;
                    out = &mut out[count..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_at(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        self.touch(offset, data.len());
        while !data.is_empty() {
            match rustix::io::pwrite(&self.fd, data, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    data = &data[count..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_pieces_at(&self, mut offset: u64, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.touch(offset, pieces.iter().map(|piece| piece.len()).sum());
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            match rustix::io::pwritev(&self.fd, pieces, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    IoSlice::advance_slices(&mut pieces, count);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.fd, len)?)
    }

    fn sync(&self) -> io::Result<()> {
        rustix::fs::fdatasync(&self.fd)?;
        if !self.cached.load(Ordering::Relaxed) {
            self.drop_behind(self.behind.lock());
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.fd, hole, offset, len) {
            Ok(()) => Ok(()),
            // What the file has of the range is overwritten; what lies past its end reads as zero anyway.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
                write_zeros(self, offset, len.min(self.len()?.saturating_sub(offset)))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeros(self, offset, len),
            Err(error) => Err(error.into()),
        }
    }

    fn data(&self, offset: u64, len: u64) -> io::Result<Option<Range<u64>>> {
        let end = offset + len;
        if len == 0 {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(start) if start >= end => return Ok(None),
            Ok(start) => start.max(offset),
            // No data from here to the end of the file.
            Err(Errno::NXIO) => return Ok(None),
            // A device, or a file system without holes.
            Err(_) => return Ok(Some(offset..end)),
        };
        let stop = rustix::fs::seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(end);
        Ok(Some(start..stop.clamp(start, end)))
    }

    fn located(&self, offset: u64, len: u64) -> Option<Located<'_>> {
        self.touch(offset, usize::try_from(len).ok()?);
        Some(Located { fd: self.fd.as_fd(), at: offset })
    }

    fn set_cached(&self, on: bool) {
        self.cached.store(on, Ordering::Relaxed);
    }
}

/// The files of an image that has several, as one: the number of the file stands above bit [`FileSet::SHIFT`] of an offset.
pub(crate) struct FileSet {
    files: Vec<Box<dyn FileIo>>,
}

impl FileSet {
    const SHIFT: u32 = 48;

    pub(crate) fn new(files: Vec<Box<dyn FileIo>>) -> Self {
        Self { files }
    }

    /// The set's offset for one in file number `index`.
    pub(crate) fn at(index: usize, offset: u64) -> u64 {
        (index as u64) << Self::SHIFT | offset
    }

    pub(crate) fn file(&self, index: usize) -> io::Result<&dyn FileIo> {
        self.files.get(index).map(|f| &**f).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn split(&self, offset: u64) -> io::Result<(&dyn FileIo, u64)> {
        Ok((self.file((offset >> Self::SHIFT) as usize)?, offset & ((1 << Self::SHIFT) - 1)))
    }
}

impl FileIo for Arc<FileSet> {
    /// Of all files together.
    fn len(&self) -> io::Result<u64> {
        self.files.iter().try_fold(0u64, |sum, file| Ok(sum.saturating_add(file.len()?)))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (file, offset) = self.split(offset)?;
        file.read_at(offset, out)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (file, offset) = self.split(offset)?;
        file.write_at(offset, data)
    }

    fn write_pieces_at(&self, offset: u64, pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        let (file, offset) = self.split(offset)?;
        file.write_pieces_at(offset, pieces)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let (file, len) = self.split(len)?;
        file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| file.sync())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let (file, offset) = self.split(offset)?;
        file.zero(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let (file, offset) = self.split(offset)?;
        file.reserve(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let (file, offset) = self.split(offset)?;
        file.discard(offset, len)
    }

    fn data(&self, offset: u64, len: u64) -> io::Result<Option<Range<u64>>> {
        let (file, inner) = self.split(offset)?;
        let base = offset - inner;
        Ok(file.data(inner, len)?.map(|r| base + r.start..base + r.end))
    }

    fn located(&self, offset: u64, len: u64) -> Option<Located<'_>> {
        let (file, offset) = self.split(offset).ok()?;
        file.located(offset, len)
    }

    fn set_cached(&self, on: bool) {
        self.files.iter().for_each(|file| file.set_cached(on));
    }
}

/// Bytes in memory as a file, for tests.
#[cfg(test)]
#[derive(Default)]
pub(crate) struct MemoryFile {
    pub(crate) bytes: Mutex<Vec<u8>>,
}

#[cfg(test)]
impl MemoryFile {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self { bytes: Mutex::new(bytes.to_vec()) }
    }
}

#[cfg(test)]
impl FileIo for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock();
        let have = bytes.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let count = have.len().min(out.len());
        out[..count].copy_from_slice(&have[..count]);
        out[count..].fill(0);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(data.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        let mut bytes = self.bytes.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes.lock().resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let end = usize::try_from(offset.saturating_add(len)).unwrap_or(usize::MAX).min(bytes.len());
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(end);
        bytes[start..end].fill(0);
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        if self.len()? < end { self.set_len(end) } else { Ok(()) }
    }
}

/// A file in memory of which only the pages that hold something take memory, for fuzzing.
#[derive(Clone, Default)]
pub(crate) struct SparseFile {
    inner: Arc<Mutex<SparsePages>>,
}

#[derive(Default)]
struct SparsePages {
    len: u64,
    pages: std::collections::BTreeMap<u64, Box<[u8; SparseFile::PAGE]>>,
}

impl SparseFile {
    const PAGE: usize = 4096;
    /// Memory, not disk space, is what a fuzzer runs out of.
    const MOST: usize = 4096;

    pub(crate) fn new(len: u64) -> Self {
        let file = Self::default();
        file.inner.lock().len = len;
        file
    }

    /// The same content, apart from this one from now on.
    pub(crate) fn fork(&self) -> Self {
        let inner = self.inner.lock();
        let pages = SparsePages { len: inner.len, pages: inner.pages.clone() };
        Self { inner: Arc::new(Mutex::new(pages)) }
    }
}

impl FileIo for SparseFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.lock().len)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let inner = self.inner.lock();
        let mut done = 0;
        while done < out.len() {
            let at = offset.saturating_add(done as u64);
            let within = (at % Self::PAGE as u64) as usize;
            let count = (Self::PAGE - within).min(out.len() - done);
            let piece = &mut out[done..done + count];
            match inner.pages.get(&(at / Self::PAGE as u64)) {
                Some(page) => piece.copy_from_slice(&page[within..within + count]),
                None => piece.fill(0),
            }
            done += count;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).ok_or(io::ErrorKind::FileTooLarge)?;
        let mut inner = self.inner.lock();
        inner.len = inner.len.max(end);
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % Self::PAGE as u64) as usize;
            let count = (Self::PAGE - within).min(data.len() - done);
            if inner.pages.len() >= Self::MOST {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let page = inner.pages.entry(at / Self::PAGE as u64);
            let page = page.or_insert_with(|| Box::new([0; Self::PAGE]));
            page[within..within + count].copy_from_slice(&data[done..done + count]);
            done += count;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.inner.lock();
        let keep = len.div_ceil(Self::PAGE as u64);
        inner.pages.retain(|page, _| *page < keep);
        let within = (len % Self::PAGE as u64) as usize;
        if within > 0
            && let Some(page) = inner.pages.get_mut(&(len / Self::PAGE as u64))
        {
            page[within..].fill(0);
        }
        inner.len = len;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        for (page, bytes) in &mut self.inner.lock().pages {
            let start = page * Self::PAGE as u64;
            let from = offset.saturating_sub(start).min(Self::PAGE as u64) as usize;
            let to = end.saturating_sub(start).min(Self::PAGE as u64) as usize;
            if from < to {
                bytes[from..to].fill(0);
            }
        }
        Ok(())
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut inner = self.inner.lock();
        inner.len = inner.len.max(offset.saturating_add(len));
        Ok(())
    }
}

#[cfg(test)]
impl FileIo for Arc<MemoryFile> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, out)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, data)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        (**self).set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).zero(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).reserve(offset, len)
    }
}
