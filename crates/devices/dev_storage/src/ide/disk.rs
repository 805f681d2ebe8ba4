//! ATA commands of hard disks.

use std::collections::VecDeque;

use super::channel::{Channel, DMA_CHUNK, Deep, DriveKind, Job, PIO_CHUNK, Phase, Request, SECTOR, Sectors};
use super::spec::{DeviceHead, command, error};
use super::{DiskIdentity, Geometry};

/// Largest block of READ/WRITE MULTIPLE.
const MAX_MULTIPLE: u8 = 128;
/// Most 512-byte blocks of ranges that one DATA SET MANAGEMENT takes.
const MAX_TRIM_BLOCKS: u16 = 8;

impl DiskIdentity {
    /// The translation that the drive reports: as configured, else the usual one for large disks.
    pub(crate) fn geometry(&self, sectors: u64) -> Geometry {
        self.geometry.unwrap_or_else(|| Geometry {
            cylinders: (sectors / (16 * 63)).clamp(1, 16383) as u16,
            heads: 16,
            sectors_per_track: 63,
        })
    }
}

/// Text in IDENTIFY data: padded with spaces, the first character of each pair in the word's upper byte.
pub(crate) fn put_text(data: &mut [u8], word: usize, words: usize, text: &str) {
    let field = &mut data[2 * word..2 * (word + words)];
    for (i, byte) in field.iter_mut().enumerate() {
        *byte = text.as_bytes().get(i ^ 1).copied().filter(|b| b.is_ascii()).unwrap_or(b' ');
    }
}

pub(crate) fn put_word(data: &mut [u8], word: usize, value: u16) {
    data[2 * word..2 * word + 2].copy_from_slice(&value.to_le_bytes());
}

/// Supported and selected modes for the words 63 (multiword DMA, base 0x20) and 88 (ultra DMA, base 0x40).
pub(crate) fn mode_word(supported: u16, base: u8, mode: u8) -> u16 {
    let selected = if mode & 0xf8 == base { 1 << (mode & 7) & supported } else { 0 };
    supported | selected << 8
}

impl Channel {
    fn disk_size(&self) -> u64 {
        match &self.kinds[usize::from(self.state.active & 1)] {
            Some(DriveKind::Disk { sectors, .. }) => *sectors,
            _ => 0,
        }
    }

    pub(crate) fn disk_command(&mut self, command: u8) {
        let pio = |block| Sectors { next: 0, left: 0, chunk: 0, block, dma: false, wide: false };
        let dma = Sectors { next: 0, left: 0, chunk: 0, block: 1, dma: true, wide: false };
        let wide = |sectors| Sectors { wide: true, ..sectors };
        let multiple = self.active().multiple;
        match command {
            command::READ_SECTORS | command::READ_SECTORS_ONCE => self.disk_read(pio(1)),
            command::READ_SECTORS_EXT => self.disk_read(wide(pio(1))),
            command::READ_DMA | command::READ_DMA_ONCE => self.disk_read(dma),
            command::READ_DMA_EXT => self.disk_read(wide(dma)),
            command::READ_MULTIPLE if multiple > 0 => self.disk_read(pio(multiple)),
            command::READ_MULTIPLE_EXT if multiple > 0 => self.disk_read(wide(pio(multiple))),
            command::WRITE_SECTORS | command::WRITE_SECTORS_ONCE => self.disk_write(pio(1), false),
            command::WRITE_SECTORS_EXT => self.disk_write(wide(pio(1)), false),
            command::WRITE_DMA | command::WRITE_DMA_ONCE => self.disk_write(dma, false),
            command::WRITE_DMA_EXT => self.disk_write(wide(dma), false),
            command::WRITE_DMA_FUA_EXT => self.disk_write(wide(dma), true),
            command::WRITE_MULTIPLE if multiple > 0 => self.disk_write(pio(multiple), false),
            command::WRITE_MULTIPLE_EXT if multiple > 0 => self.disk_write(wide(pio(multiple)), false),
            command::WRITE_MULTIPLE_FUA_EXT if multiple > 0 => self.disk_write(wide(pio(multiple)), true),
            command::VERIFY | command::VERIFY_ONCE => self.disk_verify(pio(1)),
            command::VERIFY_EXT => self.disk_verify(wide(pio(1))),
            command::FLUSH_CACHE | command::FLUSH_CACHE_EXT => {
                self.state.job = Job::Flush;
                self.ask(Request::Flush);
            }
            command::DATA_SET_MANAGEMENT => self.disk_trim(),
            command::IDENTIFY_DEVICE => self.disk_identify(),
            command::SET_FEATURES => self.set_features(),
            command::SET_MULTIPLE_MODE => {
                let count = self.active().count.now;
                if count > MAX_MULTIPLE || count != 0 && !count.is_power_of_two() {
                    return self.fail(error::ABRT);
                }
                self.active().multiple = count;
                self.succeed();
            }
            command::INITIALIZE_DEVICE_PARAMETERS => {
                let drive = self.active();
                let heads = DeviceHead::from(drive.device).head() + 1;
                if drive.count.now == 0 {
                    return self.fail(error::ABRT);
                }
                drive.heads = heads;
                drive.sectors_per_track = drive.count.now;
                self.succeed();
            }
            command::READ_NATIVE_MAX | command::READ_NATIVE_MAX_EXT => {
                let wide = command == command::READ_NATIVE_MAX_EXT;
                let last = self.disk_size().saturating_sub(1);
                self.active().device |= 0x40;
                self.set_address(if wide { last } else { last.min(0x0fff_ffff) }, wide);
                self.succeed();
            }
            command::EXECUTE_DIAGNOSTIC => self.execute_diagnostic(),
            // RECALIBRATE and SEEK: there is no arm to move.
            0x10..=0x1f | 0x70..=0x7f => self.succeed(),
            _ => self.power_command(command),
        }
    }

    /// EXECUTE DEVICE DIAGNOSTIC: both drives leave their signatures; device 0 answers.
    pub(crate) fn execute_diagnostic(&mut self) {
        for (drive, kind) in self.state.drives.iter_mut().zip(&self.kinds) {
            drive.device = 0;
            drive.signature(kind.as_ref());
        }
        self.state.selected = 0;
        if self.is_present(0) {
            self.state.active = 0;
        }
        self.active().interrupt = true;
    }

    /// Power management (also of packet devices); whatever else is unknown is aborted.
    pub(crate) fn power_command(&mut self, command: u8) {
        match command {
            command::STANDBY_IMMEDIATE | command::STANDBY | command::SLEEP | 0x94 | 0x96 | 0x99 => {
                self.active().standby = true;
                self.succeed();
            }
            command::IDLE_IMMEDIATE | command::IDLE | 0x95 | 0x97 => {
                self.active().standby = false;
                self.succeed();
            }
            command::CHECK_POWER_MODE | 0x98 => {
                let drive = self.active();
                drive.count = if drive.standby { 0 } else { 0xff }.into();
                self.succeed();
            }
            _ => self.fail(error::ABRT),
        }
    }

    /// SET FEATURES, for both kinds of devices.
    pub(crate) fn set_features(&mut self) {
        let drive = self.active();
        let (feature, value) = (drive.features.now, drive.count.now);
        match feature {
            0x02 => drive.write_cache = true,
            0x82 => drive.write_cache = false,
            0x55 => drive.look_ahead = false,
            0xaa => drive.look_ahead = true,
            // Transfer mode: PIO modes need no memory, DMA modes are told by IDENTIFY.
            0x03 => match value {
                0x00 | 0x01 | 0x08..=0x0c => {}
                0x20..=0x22 | 0x40..=0x46 => drive.mode = value,
                _ => return self.fail(error::ABRT),
            },
            // Power-on defaults kept or restored at software reset, advanced power management, release interrupts.
            0x66 | 0xcc | 0x05 | 0x85 => {}
            _ => return self.fail(error::ABRT),
        }
        self.succeed();
    }

    /// The address in the registers: first sector and count.
    fn address(&mut self, wide: bool) -> Option<(u64, u32)> {
        let drive = self.active();
        let device = DeviceHead::from(drive.device);
        let [low, mid, high] = drive.lba;
        let count = if wide {
            match drive.count.word() {
                0 => 0x1_0000,
                n => n.into(),
            }
        } else {
            match drive.count.now {
                0 => 256,
                n => n.into(),
            }
        };
        let first = if wide {
            u64::from_be_bytes([0, 0, high.before, mid.before, low.before, high.now, mid.now, low.now])
        } else if device.lba() {
            u64::from(u32::from_be_bytes([device.head(), high.now, mid.now, low.now]))
        } else {
            let cylinder = u64::from(u16::from_be_bytes([high.now, mid.now]));
            let sector = u64::from(low.now.checked_sub(1)?);
            if device.head() >= drive.heads || low.now > drive.sectors_per_track {
                return None;
            }
            (cylinder * u64::from(drive.heads) + u64::from(device.head()))
                * u64::from(drive.sectors_per_track)
                + sector
        };
        Some((first, count))
    }

    /// Tells the host an address in the form in which it gave one.
    fn set_address(&mut self, sector: u64, wide: bool) {
        let drive = self.active();
        let bytes = sector.to_le_bytes();
        if wide {
            let [low, mid, high, low_before, mid_before, high_before, ..] = bytes;
            drive.lba = [
                Deep { now: low, before: low_before },
                Deep { now: mid, before: mid_before },
                Deep { now: high, before: high_before },
            ];
        } else if DeviceHead::from(drive.device).lba() {
            let [low, mid, high, top, ..] = bytes;
            drive.lba = [low.into(), mid.into(), high.into()];
            drive.device = drive.device & 0xf0 | top & 0x0f;
        } else {
            let track = sector / u64::from(drive.sectors_per_track.max(1));
            let cylinder = (track / u64::from(drive.heads.max(1))).to_le_bytes();
            let head = (track % u64::from(drive.heads.max(1))) as u8;
            let number = (sector % u64::from(drive.sectors_per_track.max(1))) as u8 + 1;
            drive.lba = [number.into(), cylinder[0].into(), cylinder[1].into()];
            drive.device = drive.device & 0xf0 | head & 0x0f;
        }
    }

    /// Puts the addressed range into `sectors`; if it is outside the disk, the command fails and the answer is `None`.
    fn addressed(&mut self, sectors: Sectors) -> Option<Sectors> {
        self.active().standby = false;
        let size = self.disk_size();
        match self.address(sectors.wide) {
            Some((next, left)) if next < size && u64::from(left) <= size - next => {
                Some(Sectors { next, left, ..sectors })
            }
            _ => {
                self.fail(error::IDNF);
                None
            }
        }
    }

    fn disk_read(&mut self, sectors: Sectors) {
        let Some(sectors) = self.addressed(sectors) else { return };
        self.state.job = Job::Read(sectors);
        self.disk_read_next();
    }

    /// The next piece of a range: first sector and count. Takes it off the range.
    fn take_chunk(sectors: &mut Sectors) -> (u64, u32) {
        let most = if sectors.dma {
            DMA_CHUNK
        } else {
            // Whole DRQ blocks, so that only the command's last block is short.
            PIO_CHUNK / u32::from(sectors.block.max(1)) * u32::from(sectors.block.max(1))
        };
        let (first, count) = (sectors.next, sectors.left.min(most));
        sectors.next += u64::from(count);
        sectors.left -= count;
        sectors.chunk = count;
        (first, count)
    }

    pub(crate) fn disk_read_next(&mut self) {
        let (Job::Read(sectors) | Job::Verify(sectors)) = &mut self.state.job else { return };
        let (first, count) = Self::take_chunk(sectors);
        let buffer = self.take_buffer(count as usize * SECTOR as usize);
        self.ask(Request::Read { offset: first * SECTOR, buffer });
    }

    fn disk_verify(&mut self, sectors: Sectors) {
        let Some(sectors) = self.addressed(sectors) else { return };
        self.state.job = Job::Verify(sectors);
        self.disk_read_next();
    }

    fn disk_write(&mut self, sectors: Sectors, fua: bool) {
        if let Some(DriveKind::Disk { read_only: true, .. }) = self.kinds[usize::from(self.state.active & 1)]
        {
            return self.fail(error::ABRT | error::UNC);
        }
        let Some(sectors) = self.addressed(sectors) else { return };
        self.state.job = Job::Write { sectors, fua };
        self.disk_write_next(false);
    }

    /// Asks the host for the next piece.
    fn disk_write_next(&mut self, interrupt: bool) {
        let Job::Write { sectors, .. } = &self.state.job else { return };
        // Only looked at: the piece is taken off when its data are here.
        let mut sectors = *sectors;
        let (_, count) = Self::take_chunk(&mut sectors);
        let len = count as usize * SECTOR as usize;
        if sectors.dma {
            self.state.buffer = self.take_buffer(len);
            self.start_dma(Phase::DmaOut);
        } else {
            self.start_pio_out(len, interrupt);
        }
    }

    /// The host has delivered the piece: off to the medium.
    pub(crate) fn disk_write_chunk(&mut self) {
        let Job::Write { sectors, .. } = &mut self.state.job else { return };
        let (first, _) = Self::take_chunk(sectors);
        let buffer = std::mem::take(&mut self.state.buffer);
        self.ask(Request::Write { offset: first * SECTOR, buffer });
    }

    fn disk_trim(&mut self) {
        let discard = match &self.kinds[usize::from(self.state.active & 1)] {
            Some(DriveKind::Disk { identity, read_only, .. }) => identity.discard && !read_only,
            _ => false,
        };
        let drive = self.active();
        let blocks = drive.count.word();
        if !discard || drive.features.now & 1 == 0 || !(1..=MAX_TRIM_BLOCKS).contains(&blocks) {
            return self.fail(error::ABRT);
        }
        self.state.job = Job::Trim { ranges: VecDeque::new() };
        self.state.buffer = self.take_buffer(usize::from(blocks) * SECTOR as usize);
        self.start_dma(Phase::DmaOut);
    }

    /// The ranges have arrived: eight bytes each, 48 bits of address and 16 of count.
    pub(crate) fn disk_trim_ranges(&mut self) {
        let size = self.disk_size();
        let mut ranges = VecDeque::new();
        let mut outside = false;
        for entry in self.state.buffer.chunks_exact(8) {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(entry);
            let value = u64::from_le_bytes(bytes);
            let (first, count) = (value & 0xffff_ffff_ffff, value >> 48);
            if count > 0 {
                outside |= first >= size || count > size - first;
                ranges.push_back((first, count));
            }
        }
        if outside {
            return self.fail(error::IDNF);
        }
        self.state.job = Job::Trim { ranges };
        self.disk_trim_next();
    }

    fn disk_trim_next(&mut self) {
        let Job::Trim { ranges } = &mut self.state.job else { return };
        match ranges.pop_front() {
            Some((first, count)) => {
                self.ask(Request::Discard { offset: first * SECTOR, len: count * SECTOR });
            }
            None => self.succeed(),
        }
    }

    pub(crate) fn disk_completed(&mut self, result: Result<Vec<u8>, ()>) {
        let done = match &self.state.job {
            Job::Read(s) | Job::Verify(s) | Job::Write { sectors: s, .. } => Some(*s),
            _ => None,
        };
        let Ok(buffer) = result else {
            if let Some(s) = done {
                // Which sector of the piece failed is not known: the first of it is told.
                self.set_address(s.next.saturating_sub(s.chunk.into()), s.wide);
            }
            let read = matches!(self.state.job, Job::Read(_) | Job::Verify(_));
            return self.fail(if read { error::UNC } else { error::ABRT });
        };
        self.state.buffer = buffer;
        match &self.state.job {
            Job::Read(s) => {
                let s = *s;
                if s.left == 0 {
                    self.told(s);
                }
                if s.dma { self.start_dma(Phase::DmaIn) } else { self.start_pio_in() }
            }
            Job::Verify(s) if s.left > 0 => self.disk_read_next(),
            Job::Verify(s) => {
                let s = *s;
                self.told(s);
                self.succeed();
            }
            Job::Write { sectors, .. } if sectors.left > 0 => self.disk_write_next(true),
            Job::Write { sectors, fua } => {
                let (s, fua) = (*sectors, *fua);
                self.told(s);
                if fua {
                    self.state.job = Job::Flush;
                    self.ask(Request::Flush);
                } else {
                    self.succeed();
                }
            }
            Job::Trim { .. } => self.disk_trim_next(),
            _ => self.succeed(),
        }
    }

    /// After the last sector the registers tell its address and that none are left.
    fn told(&mut self, sectors: Sectors) {
        self.set_address(sectors.next.saturating_sub(1), sectors.wide);
        self.active().count = 0.into();
    }

    fn disk_identify(&mut self) {
        let Some(DriveKind::Disk { identity, sectors, .. }) = &self.kinds[usize::from(self.state.active & 1)]
        else {
            return;
        };
        let drive = &self.state.drives[usize::from(self.state.active & 1)];
        let sectors = *sectors;
        let mut data = vec![0; SECTOR as usize];
        let d = &mut data[..];
        let geometry = identity.geometry(sectors);
        put_word(d, 0, 0x0040);
        put_word(d, 1, geometry.cylinders);
        put_word(d, 3, geometry.heads.into());
        put_word(d, 4, 512 * u16::from(geometry.sectors_per_track));
        put_word(d, 5, 512);
        put_word(d, 6, geometry.sectors_per_track.into());
        put_text(d, 10, 10, &identity.serial);
        // Dual-ported buffer with read caching, of 256 KiB.
        put_word(d, 20, 3);
        put_word(d, 21, 512);
        put_word(d, 22, 4);
        put_text(d, 23, 4, &identity.firmware);
        put_text(d, 27, 20, &identity.model);
        put_word(d, 47, 0x8000 | u16::from(MAX_MULTIPLE));
        put_word(d, 48, 1);
        // LBA, DMA, IORDY.
        put_word(d, 49, 0x0b00);
        put_word(d, 50, 0x4000);
        put_word(d, 51, 0x0240);
        put_word(d, 52, 0x0240);
        put_word(d, 53, 7);
        let (heads, track) = (u64::from(drive.heads), u64::from(drive.sectors_per_track));
        let cylinders = (sectors / (heads * track).max(1)).min(0xffff);
        put_word(d, 54, cylinders as u16);
        put_word(d, 55, drive.heads.into());
        put_word(d, 56, drive.sectors_per_track.into());
        let capacity = (cylinders * heads * track).min(u64::from(u32::MAX)) as u32;
        put_word(d, 57, capacity as u16);
        put_word(d, 58, (capacity >> 16) as u16);
        put_word(d, 59, if drive.multiple > 0 { 0x100 | u16::from(drive.multiple) } else { 0 });
        let short = sectors.min(0x0fff_ffff) as u32;
        put_word(d, 60, short as u16);
        put_word(d, 61, (short >> 16) as u16);
        put_word(d, 63, mode_word(0x07, 0x20, drive.mode));
        put_word(d, 64, 3);
        for word in 65..=68 {
            put_word(d, word, 120);
        }
        // ATA-1 to ATA-6.
        put_word(d, 80, 0x7e);
        put_word(d, 81, 0x22);
        // Power management, write cache, look-ahead; 48-bit addresses, flushes; FUA.
        let cache = u16::from(drive.write_cache) << 5 | u16::from(drive.look_ahead) << 6;
        put_word(d, 82, 0x0068);
        put_word(d, 83, 0x7400);
        put_word(d, 84, 0x4040);
        put_word(d, 85, 0x0008 | cache);
        put_word(d, 86, 0x3400);
        put_word(d, 87, 0x4040);
        put_word(d, 88, mode_word(0x7f, 0x40, drive.mode));
        // 80-conductor cable; device number by jumper.
        put_word(d, 93, if self.state.active == 0 { 0x600b } else { 0x6b00 });
        for (i, word) in (100..104).enumerate() {
            put_word(d, word, (sectors >> (16 * i)) as u16);
        }
        if identity.discard {
            put_word(d, 105, MAX_TRIM_BLOCKS);
            put_word(d, 169, 1);
        }
        put_word(d, 217, u16::from(identity.non_rotational));
        self.state.job = Job::Reply;
        self.state.buffer = data;
        self.start_pio_in();
    }
}
