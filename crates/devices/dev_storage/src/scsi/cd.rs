//! The commands of CD/DVD drives, whatever carries them: ATAPI or a SCSI bus. Sources: SFF-8020i, MMC-5, SPC-3.
//!
//! A disc has one data track of mode 1 sectors. READ CD gives whole sectors of 2352 bytes with sync pattern and header; their
//! error-correction bytes read as zeros.
//!
//! INQUIRY, REQUEST SENSE and unit attentions differ with what carries the commands, and are not here.

use pdm::connector::Medium;

use super::sense::Sense;

/// Bytes of user data in a sector.
pub(crate) const CD_SECTOR: u64 = 2048;
const RAW_SECTOR: usize = 2352;
/// A disc of more sectors (80 minutes) is a DVD.
const CD_MAX_SECTORS: u32 = 80 * 60 * 75;
/// Frames between the start of the disc and sector 0.
const PREGAP: u32 = 150;
/// Speed we claim, in kilobytes a second.
const SPEED: u16 = 8467;

/// The disc in a CD drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CdMedium {
    /// Sectors of 2048 bytes.
    pub(crate) sectors: u32,
}

impl CdMedium {
    /// What a guest finds in the drive.
    pub(crate) fn of(medium: &Medium) -> Option<Self> {
        let sectors = medium.as_ref()?.size().0 / CD_SECTOR;
        Some(Self { sectors: u32::try_from(sectors).unwrap_or(u32::MAX) })
    }
}

/// What the drive remembers between commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CdState {
    /// PREVENT MEDIUM REMOVAL.
    pub(crate) locked: bool,
    pub(crate) tray_open: bool,
    /// Event code for GET EVENT STATUS NOTIFICATION: 0 none, 1 eject request, 2 new medium, 3 medium removal.
    pub(crate) event: u8,
}

impl CdState {
    pub(crate) fn power_on() -> Self {
        Self { locked: false, tray_open: false, event: 0 }
    }

    /// A disc was put in or changed (`present`), or taken out by the host. The unit attention is the caller's.
    pub(crate) fn medium_changed(&mut self, present: bool) {
        self.event = if present { 2 } else { 3 };
        self.tray_open &= !present;
    }

    /// The host asks the guest to give the disc free.
    pub(crate) fn eject_request(&mut self) {
        self.event = 1;
    }
}

/// Packet operation codes.
pub(crate) mod op {
    pub(crate) const TEST_UNIT_READY: u8 = 0x00;
    pub(crate) const REQUEST_SENSE: u8 = 0x03;
    pub(crate) const INQUIRY: u8 = 0x12;
    pub(crate) const MODE_SENSE_6: u8 = 0x1a;
    pub(crate) const START_STOP_UNIT: u8 = 0x1b;
    pub(crate) const PREVENT_ALLOW: u8 = 0x1e;
    pub(crate) const READ_CAPACITY: u8 = 0x25;
    pub(crate) const READ_10: u8 = 0x28;
    pub(crate) const SEEK: u8 = 0x2b;
    pub(crate) const READ_SUBCHANNEL: u8 = 0x42;
    pub(crate) const READ_TOC: u8 = 0x43;
    pub(crate) const GET_CONFIGURATION: u8 = 0x46;
    pub(crate) const GET_EVENT_STATUS: u8 = 0x4a;
    pub(crate) const READ_DISC_INFORMATION: u8 = 0x51;
    pub(crate) const MODE_SENSE_10: u8 = 0x5a;
    pub(crate) const REPORT_LUNS: u8 = 0xa0;
    pub(crate) const READ_12: u8 = 0xa8;
    pub(crate) const READ_DVD_STRUCTURE: u8 = 0xad;
    pub(crate) const READ_CD_MSF: u8 = 0xb9;
    pub(crate) const SET_CD_SPEED: u8 = 0xbb;
    pub(crate) const MECHANISM_STATUS: u8 = 0xbd;
    pub(crate) const READ_CD: u8 = 0xbe;
}

/// What a command leads to.
#[derive(Debug)]
pub(crate) enum Answer {
    Done,
    /// Data for the host, not more than it asked for, which may be none.
    Data(Vec<u8>),
    /// Sectors of the disc, all of them there; `raw` for 2352 bytes each.
    Read {
        first: u32,
        count: u32,
        raw: bool,
    },
    Fail(Sense),
}

/// Data as long as they are, and how many bytes of them the host has room for.
pub(crate) fn data(mut bytes: Vec<u8>, allocation: usize) -> Answer {
    bytes.truncate(allocation);
    Answer::Data(bytes)
}

pub(crate) fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

pub(crate) fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Minutes, seconds and frames of a sector.
fn msf(sector: u32) -> [u8; 3] {
    let frames = sector.saturating_add(PREGAP);
    [(frames / (60 * 75)).min(255) as u8, (frames / 75 % 60) as u8, (frames % 75) as u8]
}

/// A disc address in the form asked for.
fn disc_address(sector: u32, as_msf: bool) -> [u8; 4] {
    if as_msf {
        let [m, s, f] = msf(sector);
        [0, m, s, f]
    } else {
        sector.to_be_bytes()
    }
}

/// Carries out a command, up to reading from the disc.
pub(crate) fn command(state: &mut CdState, medium: Option<CdMedium>, p: &[u8; 12]) -> Answer {
    match answer(state, medium, p) {
        Answer::Read { first, count, .. }
            if medium.is_none_or(|m| first > m.sectors || count > m.sectors - first) =>
        {
            Answer::Fail(Sense::OUT_OF_RANGE)
        }
        answer => answer,
    }
}

fn answer(state: &mut CdState, medium: Option<CdMedium>, p: &[u8; 12]) -> Answer {
    let absent = if state.tray_open { Sense::TRAY_OPEN } else { Sense::NO_MEDIUM };
    let medium = medium.ok_or(absent);
    match p[0] {
        op::TEST_UNIT_READY | op::SEEK => match medium {
            Ok(m) if p[0] == op::SEEK && be32(&p[2..]) >= m.sectors => Answer::Fail(Sense::OUT_OF_RANGE),
            Ok(_) => Answer::Done,
            Err(sense) => Answer::Fail(sense),
        },
        op::START_STOP_UNIT => {
            let (load_eject, start) = (p[4] & 2 != 0, p[4] & 1 != 0);
            match (load_eject, start) {
                (true, false) if state.locked => Answer::Fail(Sense::REMOVAL_PREVENTED),
                (true, false) => {
                    state.tray_open = true;
                    Answer::Done
                }
                (true, true) => {
                    state.tray_open = false;
                    Answer::Done
                }
                _ => Answer::Done,
            }
        }
        op::PREVENT_ALLOW => {
            state.locked = p[4] & 1 != 0;
            Answer::Done
        }
        op::SET_CD_SPEED => Answer::Done,
        op::GET_EVENT_STATUS => event_status(state, medium.is_ok(), p),
        op::MECHANISM_STATUS => data(vec![0, 0, 0, 0, 0, 1, 0, 0], be16(&p[8..]).into()),
        op::MODE_SENSE_6 | op::MODE_SENSE_10 => mode_sense(state, medium.ok(), p),
        op::GET_CONFIGURATION => get_configuration(medium.ok(), p),
        op::READ_CAPACITY
        | op::READ_10
        | op::READ_12
        | op::READ_CD
        | op::READ_CD_MSF
        | op::READ_TOC
        | op::READ_SUBCHANNEL
        | op::READ_DISC_INFORMATION
        | op::READ_DVD_STRUCTURE => match medium {
            Ok(medium) => medium_command(medium, p),
            Err(sense) => Answer::Fail(sense),
        },
        _ => Answer::Fail(Sense::INVALID_COMMAND),
    }
}

/// Commands about a disc that is there.
fn medium_command(medium: CdMedium, p: &[u8; 12]) -> Answer {
    match p[0] {
        op::READ_CAPACITY => {
            let mut bytes = medium.sectors.saturating_sub(1).to_be_bytes().to_vec();
            bytes.extend_from_slice(&(CD_SECTOR as u32).to_be_bytes());
            data(bytes, 8)
        }
        op::READ_10 => Answer::Read { first: be32(&p[2..]), count: be16(&p[7..]).into(), raw: false },
        op::READ_12 => Answer::Read { first: be32(&p[2..]), count: be32(&p[6..]), raw: false },
        op::READ_CD => {
            let count = u32::from_be_bytes([0, p[6], p[7], p[8]]);
            read_cd(be32(&p[2..]), count, p)
        }
        op::READ_CD_MSF => {
            let frames =
                |at: usize| (u32::from(p[at]) * 60 + u32::from(p[at + 1])) * 75 + u32::from(p[at + 2]);
            match (frames(3).checked_sub(PREGAP), frames(6).checked_sub(frames(3))) {
                (Some(first), Some(count)) => read_cd(first, count, p),
                _ => Answer::Fail(Sense::INVALID_FIELD),
            }
        }
        op::READ_TOC => read_toc(medium, p),
        op::READ_SUBCHANNEL => {
            let mut bytes = vec![0, 0x15, 0, 0];
            match (p[2] & 0x40 != 0, p[3]) {
                (false, _) => {}
                // Position: at the start of the track.
                (true, 1) => {
                    bytes.extend_from_slice(&[1, 0x14, 1, 1]);
                    bytes.extend_from_slice(&disc_address(0, p[1] & 2 != 0));
                    bytes.extend_from_slice(&disc_address(0, p[1] & 2 != 0));
                }
                // Catalogue number and track code: none recorded.
                (true, format @ 2..=3) => {
                    bytes.extend_from_slice(&[format, 0x14, 1, 0]);
                    bytes.resize(24, 0);
                }
                _ => return Answer::Fail(Sense::INVALID_FIELD),
            }
            bytes[3] = (bytes.len() - 4) as u8;
            data(bytes, be16(&p[7..]).into())
        }
        op::READ_DISC_INFORMATION => {
            if p[1] & 7 != 0 {
                return Answer::Fail(Sense::INVALID_FIELD);
            }
            let mut bytes = vec![0; 34];
            // Complete disc of one complete session with one track, for unrestricted use.
            bytes[..9].copy_from_slice(&[0, 32, 0x0e, 1, 1, 1, 1, 0x20, 0]);
            data(bytes, be16(&p[7..]).into())
        }
        _ => read_dvd_structure(medium, p),
    }
}

fn read_cd(first: u32, count: u32, p: &[u8; 12]) -> Answer {
    // Expected sector type: any or mode 1.
    if !matches!(p[1] >> 2 & 7, 0 | 2) {
        return Answer::Fail(Sense::ILLEGAL_MODE);
    }
    match p[9] & 0xf8 {
        0x00 => Answer::Read { first, count: 0, raw: false },
        0x10 => Answer::Read { first, count, raw: false },
        0xf8 => Answer::Read { first, count, raw: true },
        _ => Answer::Fail(Sense::INVALID_FIELD),
    }
}

/// Whole sectors for those of user data, `first` being the first.
pub(crate) fn raw_sectors(first: u32, data: &[u8]) -> Vec<u8> {
    let bcd = |v: u8| ((v / 10) << 4) | (v % 10);
    let mut out = Vec::with_capacity(data.len() / CD_SECTOR as usize * RAW_SECTOR);
    for (i, sector) in data.chunks_exact(CD_SECTOR as usize).enumerate() {
        let start = out.len();
        out.push(0);
        out.extend_from_slice(&[0xff; 10]);
        out.push(0);
        out.extend_from_slice(&msf(first + i as u32).map(bcd));
        out.push(1);
        out.extend_from_slice(sector);
        out.resize(start + RAW_SECTOR, 0);
    }
    out
}

fn read_toc(medium: CdMedium, p: &[u8; 12]) -> Answer {
    let as_msf = p[1] & 2 != 0;
    // Older hosts put the format into the last byte.
    let format = if p[2] & 0x0f != 0 { p[2] & 0x0f } else { p[9] >> 6 };
    let first_track = p[6];
    let mut bytes = vec![0, 0, 1, 1];
    match format {
        0 => {
            if first_track > 1 && first_track != 0xaa {
                return Answer::Fail(Sense::INVALID_FIELD);
            }
            if first_track <= 1 {
                bytes.extend_from_slice(&[0, 0x14, 1, 0]);
                bytes.extend_from_slice(&disc_address(0, as_msf));
            }
            bytes.extend_from_slice(&[0, 0x16, 0xaa, 0]);
            bytes.extend_from_slice(&disc_address(medium.sectors, as_msf));
        }
        // Sessions: the one there is starts with track 1.
        1 => {
            bytes.extend_from_slice(&[0, 0x14, 1, 0]);
            bytes.extend_from_slice(&disc_address(0, as_msf));
        }
        // The lead-in as recorded: first track, last track, lead-out, track 1.
        2 => {
            let [m, s, f] = msf(medium.sectors);
            for (point, place) in [(0xa0, [1, 0, 0]), (0xa1, [1, 0, 0]), (0xa2, [m, s, f]), (1, msf(0))] {
                bytes.extend_from_slice(&[1, 0x14, 0, point, 0, 0, 0, 0]);
                bytes.extend_from_slice(&place);
            }
        }
        _ => return Answer::Fail(Sense::INVALID_FIELD),
    }
    let len = (bytes.len() - 2) as u16;
    bytes[..2].copy_from_slice(&len.to_be_bytes());
    data(bytes, be16(&p[7..]).into())
}

fn read_dvd_structure(medium: CdMedium, p: &[u8; 12]) -> Answer {
    if medium.sectors <= CD_MAX_SECTORS {
        return Answer::Fail(Sense::INCOMPATIBLE_MEDIUM);
    }
    if p[1] & 0x0f != 0 || p[6] != 0 {
        return Answer::Fail(Sense::INVALID_FIELD);
    }
    let mut bytes = vec![0; 4];
    match p[7] {
        // Physical format: DVD-ROM, 120 mm, one layer.
        0x00 => {
            let end = medium.sectors.saturating_sub(1).saturating_add(0x03_0000).min(0xff_ffff);
            bytes.extend_from_slice(&[1, 0x0f, 1, 0, 0, 0x03, 0, 0, 0]);
            bytes.extend_from_slice(&end.to_be_bytes()[1..]);
            bytes.resize(2052, 0);
        }
        // Copyright: none. Burst cutting area is not there. Manufacturing information: empty.
        0x01 => bytes.resize(8, 0),
        0x04 => bytes.resize(2052, 0),
        // The list of these.
        0xff => {
            for (format, len) in [(0x00u8, 2052u16), (0x01, 8), (0x04, 2052), (0xff, 20)] {
                bytes.extend_from_slice(&[format, 0x40]);
                bytes.extend_from_slice(&len.to_be_bytes());
            }
        }
        _ => return Answer::Fail(Sense::INVALID_FIELD),
    }
    let len = (bytes.len() - 2) as u16;
    bytes[..2].copy_from_slice(&len.to_be_bytes());
    data(bytes, be16(&p[8..]).into())
}

fn event_status(state: &mut CdState, present: bool, p: &[u8; 12]) -> Answer {
    // Only polling.
    if p[1] & 1 == 0 {
        return Answer::Fail(Sense::INVALID_FIELD);
    }
    const MEDIA: u8 = 4;
    let bytes = if p[4] & (1 << MEDIA) != 0 {
        let event = std::mem::take(&mut state.event);
        let there = u8::from(present && !state.tray_open) << 1 | u8::from(state.tray_open);
        vec![0, 6, MEDIA, 1 << MEDIA, event, there, 0, 0]
    } else {
        // No event of a class asked for.
        vec![0, 2, 0x80, 1 << MEDIA]
    };
    data(bytes, be16(&p[7..]).into())
}

fn mode_sense(state: &CdState, medium: Option<CdMedium>, p: &[u8; 12]) -> Answer {
    if p[2] >> 6 == 3 {
        return Answer::Fail(Sense::SAVING_NOT_SUPPORTED);
    }
    // Changeable values: none.
    let changeable = p[2] >> 6 == 1;
    let wanted = p[2] & 0x3f;
    let mut pages = Vec::new();
    for page in [0x01u8, 0x0d, 0x0e, 0x2a] {
        if wanted != page && wanted != 0x3f {
            continue;
        }
        let mut body: Vec<u8> = match page {
            // Error recovery: five retries.
            0x01 => vec![0, 5, 0, 0, 0, 0],
            // 60 seconds in a minute, 75 frames in a second.
            0x0d => vec![0, 0, 0, 60, 0, 75],
            // Audio: two channels at full volume.
            0x0e => vec![4, 0, 0, 0, 0, 75, 1, 0xff, 2, 0xff, 0, 0, 0, 0],
            // Capabilities: reads CD-R, CD-RW, DVD-ROM, DVD-R; mode 2 and multi-session; tray that can be locked.
            _ => {
                let mut b = vec![0x3b, 0, 0x70, 0, 0x29 | u8::from(state.locked) << 1, 0];
                b.extend_from_slice(&SPEED.to_be_bytes());
                b.extend_from_slice(&[0, 2]);
                b.extend_from_slice(&512u16.to_be_bytes());
                b.extend_from_slice(&SPEED.to_be_bytes());
                b.resize(20, 0);
                b
            }
        };
        if changeable {
            body.fill(0);
        }
        pages.push(page);
        pages.push(body.len() as u8);
        pages.extend_from_slice(&body);
    }
    if pages.is_empty() {
        return Answer::Fail(Sense::INVALID_FIELD);
    }
    // Medium type: data disc of 120 mm, or none.
    let kind = if medium.is_some() { 0x01 } else { 0x70 };
    let (mut bytes, allocation) = if p[0] == op::MODE_SENSE_6 {
        (vec![(pages.len() + 3) as u8, kind, 0, 0], usize::from(p[4]))
    } else {
        let len = ((pages.len() + 6) as u16).to_be_bytes();
        (vec![len[0], len[1], kind, 0, 0, 0, 0, 0], be16(&p[7..]).into())
    };
    bytes.extend_from_slice(&pages);
    data(bytes, allocation)
}

fn get_configuration(medium: Option<CdMedium>, p: &[u8; 12]) -> Answer {
    let mode = p[1] & 3;
    let first = be16(&p[2..]);
    if mode == 3 {
        return Answer::Fail(Sense::INVALID_FIELD);
    }
    let dvd = medium.is_some_and(|m| m.sectors > CD_MAX_SECTORS);
    let cd = medium.is_some() && !dvd;
    let profile: u16 = if dvd {
        0x10
    } else if cd {
        0x08
    } else {
        0
    };
    let now = u8::from;
    // Feature code, version and flags (bit 1: persistent, bit 0: current), body.
    let features: [(u16, u8, Vec<u8>); 6] = [
        (0x0000, 0x03, vec![0, 0x10, now(dvd), 0, 0, 0x08, now(cd), 0]),
        (0x0001, 0x0b, vec![0, 0, 0, 2, 1, 0, 0, 0]),
        // Removable medium in a tray that ejects and locks.
        (0x0003, 0x03, vec![0x29, 0, 0, 0]),
        // Random readable, in blocks of 2048 bytes.
        (0x0010, now(medium.is_some()), vec![0, 0, 0x08, 0, 0, 1, 0, 0]),
        (0x001e, 0x08 | now(cd), vec![0, 0, 0, 0]),
        (0x001f, now(dvd), vec![]),
    ];
    let mut bytes = vec![0; 8];
    bytes[6..8].copy_from_slice(&profile.to_be_bytes());
    for (code, flags, body) in features {
        let wanted = match mode {
            0 => code >= first,
            1 => code >= first && flags & 1 != 0,
            _ => code == first,
        };
        if wanted {
            bytes.extend_from_slice(&code.to_be_bytes());
            bytes.push(flags);
            bytes.push(body.len() as u8);
            bytes.extend_from_slice(&body);
        }
    }
    let len = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&len.to_be_bytes());
    data(bytes, be16(&p[7..]).into())
}
