//! The file under an image: positioned I/O without a file pointer.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, FileType, SeekFrom};
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
    /// Cuts or extends (by zeros, without storage) the file.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable, with the length.
    fn sync(&self) -> io::Result<()>;
    /// Makes the range read as zeros without changing the length, giving its storage back if the file system can.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Reserves storage for the range, extending the file.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A file or block device of the host.
pub(crate) struct HostFile {
    fd: OwnedFd,
    /// A block device has a fixed length that `fstat` does not tell.
    device: bool,
}

impl HostFile {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        let device = kind == FileType::BlockDevice;
        if !device && kind != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        Ok(Self { fd, device })
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS.min(usize::try_from(len).unwrap_or(ZEROS))];
        let mut done = 0;
        while done < len {
            let count = (len - done).min(zeros.len() as u64);
            self.write_at(offset + done, &zeros[..count as usize])?;
            done += count;
        }
        Ok(())
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

    fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(&self.fd, len)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.fd)?)
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
                self.write_zeros(offset, len.min(self.len()?.saturating_sub(offset)))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(offset, len),
            Err(error) => Err(error.into()),
        }
    }
}

/// Bytes in memory as a file, for tests and fuzzing.
#[derive(Default)]
pub(crate) struct MemoryFile {
    pub(crate) bytes: parking_lot::Mutex<Vec<u8>>,
}

impl MemoryFile {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self { bytes: parking_lot::Mutex::new(bytes.to_vec()) }
    }
}

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

#[cfg(test)]
impl FileIo for std::sync::Arc<MemoryFile> {
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
