//! Raw images: virtual bytes are the file's bytes.

use std::io;

use crate::file::FileIo;
use crate::format::{Begin, Extent, Facts, Layout, Place, Variant};

pub(crate) struct Raw {
    size: u64,
}

impl Raw {
    pub(crate) fn open(file: &dyn FileIo) -> io::Result<Self> {
        Ok(Self { size: file.len()? })
    }

    pub(crate) fn create(file: &dyn FileIo, size: u64, variant: Variant) -> io::Result<()> {
        if variant == Variant::Fixed && size > 0 {
            file.reserve(0, size)?;
        }
        file.set_len(size)?;
        file.sync()
    }
}

impl Layout for Raw {
    fn facts(&self) -> Facts {
        // Whether the file is sparse is the file system's business.
        Facts::new(Variant::Fixed, self.size)
    }

    fn map(&self, _file: &dyn FileIo, offset: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { place: Place::File(offset), len })
    }

    fn before_write(&self, _file: &dyn FileIo, _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn begin(&self, _file: &dyn FileIo, _offset: u64, _len: u64) -> io::Result<Begin<'_>> {
        Ok(Begin::Mapped)
    }

    fn modified(&self, _file: &dyn FileIo) -> io::Result<()> {
        Ok(())
    }

    fn unpack(&self, _file: &dyn FileIo, _at: u64) -> io::Result<Vec<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read_only_reason(&self) -> Option<&'static str> {
        None
    }

    fn flush(&self, file: &dyn FileIo) -> io::Result<()> {
        file.sync()
    }

    fn is_dirty(&self) -> bool {
        false
    }

    fn grow(&self, file: &dyn FileIo, size: u64) -> io::Result<bool> {
        // A device has the size that it has.
        if size < self.size || file.set_len(size).is_err() {
            return Ok(false);
        }
        file.sync()?;
        Ok(true)
    }
}
