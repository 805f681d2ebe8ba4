//! Commands of disks (SPC-4, SBC-3) and what they answer.

use std::time::Duration;

use super::session::{Command, Data, Outcome};

const GOOD: u8 = 0x00;
const CHECK_CONDITION: u8 = 0x02;
const BUSY: u8 = 0x08;
const TASK_SET_FULL: u8 = 0x28;
const TASK_ABORTED: u8 = 0x40;

/// Sense keys.
const NOT_READY: u8 = 2;
const ILLEGAL_REQUEST: u8 = 5;
const UNIT_ATTENTION: u8 = 6;
const ABORTED_COMMAND: u8 = 11;

/// What follows from how a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Good,
    /// The same command may go well after this time.
    Again(Duration),
    /// The target does not know the command, or not with these values.
    Unknown,
    Bad(String),
}

impl Outcome {
    pub(super) fn verdict(&self) -> Verdict {
        match self.status {
            GOOD => Verdict::Good,
            BUSY | TASK_SET_FULL => Verdict::Again(Duration::from_millis(100)),
            TASK_ABORTED => Verdict::Again(Duration::ZERO),
            CHECK_CONDITION => {
                let (key, code, qualifier) = self.sense();
                match (key, code) {
                    // Something has happened that one is told once.
                    (UNIT_ATTENTION | ABORTED_COMMAND, _) => Verdict::Again(Duration::ZERO),
                    // Becoming ready.
                    (NOT_READY, 0x04) if matches!(qualifier, 0x01 | 0x0a) => {
                        Verdict::Again(Duration::from_millis(500))
                    }
                    // Invalid command, invalid field in it.
                    (ILLEGAL_REQUEST, 0x20 | 0x24) => Verdict::Unknown,
                    _ => Verdict::Bad(format!(
                        "it reports the sense key 0x{key:x} with the code 0x{code:02x}/0x{qualifier:02x}{}",
                        meaning(key, code)
                    )),
                }
            }
            status => Verdict::Bad(format!("it reports the status 0x{status:02x}")),
        }
    }

    /// Key, code and qualifier, of either format.
    fn sense(&self) -> (u8, u8, u8) {
        let at = |index: usize| self.sense.get(index).copied().unwrap_or(0);
        match at(0) & 0x7f {
            0x72 | 0x73 => (at(1) & 0x0f, at(2), at(3)),
            _ => (at(2) & 0x0f, at(12), at(13)),
        }
    }

    /// A power cycle or a reset, after which what was not flushed may be gone.
    pub(super) fn is_reset(&self) -> bool {
        let (key, code, qualifier) = self.sense();
        self.status == CHECK_CONDITION && (key, code) == (UNIT_ATTENTION, 0x29) && qualifier < 7
    }
}

fn meaning(key: u8, code: u8) -> &'static str {
    match (key, code) {
        (_, 0x25) => ": it has no such LUN",
        (2, _) => ": the disk is not ready",
        (3, _) => ": the medium is damaged",
        (4, _) => ": the hardware failed",
        (7, 0x27) => ": the disk is write-protected",
        _ => "",
    }
}

fn command<const N: usize>(bytes: [u8; N], data: Data) -> Command {
    let mut cdb = [0; 16];
    cdb[..N].copy_from_slice(&bytes);
    Command { cdb, data }
}

pub(super) fn test_unit_ready() -> Command {
    command([0; 6], Data::None)
}

/// Standard data, or a page of vital product data.
pub(super) fn inquiry(page: Option<u8>) -> Command {
    const LEN: u8 = 96;
    command([0x12, u8::from(page.is_some()), page.unwrap_or(0), 0, LEN, 0], Data::In(LEN.into()))
}

pub(super) fn read_capacity_10() -> Command {
    command([0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::In(8))
}

pub(super) fn read_capacity_16() -> Command {
    const LEN: u8 = 32;
    command([0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, LEN, 0, 0], Data::In(LEN.into()))
}

/// The header of the mode parameters, with all pages that fit.
pub(super) fn mode_sense() -> Command {
    const LEN: u8 = 4;
    command([0x1a, 0, 0x3f, 0, LEN, 0], Data::In(LEN.into()))
}

pub(super) fn synchronize_cache() -> Command {
    command([0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::None)
}

/// Reads `blocks` of `size` bytes.
pub(super) fn read(block: u64, blocks: u32, size: u32) -> Command {
    transfer([0x28, 0x88], block, blocks, Data::In(blocks as usize * size as usize))
}

pub(super) fn write(block: u64, blocks: u32, data: Vec<u8>) -> Command {
    transfer([0x2a, 0x8a], block, blocks, Data::Out(data))
}

/// The form of 10 bytes where it reaches, else that of 16.
fn transfer([ten, sixteen]: [u8; 2], block: u64, blocks: u32, data: Data) -> Command {
    match (u32::try_from(block), u16::try_from(blocks)) {
        (Ok(block), Ok(blocks)) => {
            let ([a, b, c, d], [e, f]) = (block.to_be_bytes(), blocks.to_be_bytes());
            command([ten, 0, a, b, c, d, 0, e, f, 0], data)
        }
        _ => {
            let mut bytes = [0; 16];
            bytes[0] = sixteen;
            bytes[2..10].copy_from_slice(&block.to_be_bytes());
            bytes[10..14].copy_from_slice(&blocks.to_be_bytes());
            command(bytes, data)
        }
    }
}

/// Gives blocks back; one range.
pub(super) fn unmap(block: u64, blocks: u32) -> Command {
    const LEN: u8 = 24;
    let mut list = vec![0, LEN - 2, 0, 16, 0, 0, 0, 0];
    list.extend(block.to_be_bytes());
    list.extend(blocks.to_be_bytes());
    list.extend([0; 4]);
    command([0x42, 0, 0, 0, 0, 0, 0, 0, LEN, 0], Data::Out(list))
}

fn be<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A disk's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capacity {
    pub(super) blocks: u64,
    pub(super) block: u32,
    /// Blocks can be given back, and read as zeros then.
    pub(super) thin: bool,
}

impl Capacity {
    /// From the answer to [`read_capacity_16`].
    pub(super) fn parse_16(data: &[u8]) -> Option<Self> {
        let last = u64::from_be_bytes(be(data, 0)?);
        let flags = data.get(14).copied().unwrap_or(0);
        Self::new(last, u32::from_be_bytes(be(data, 8)?), flags & 0xc0 == 0xc0)
    }

    /// From the answer to [`read_capacity_10`].
    pub(super) fn parse_10(data: &[u8]) -> Option<Self> {
        Self::new(u32::from_be_bytes(be(data, 0)?).into(), u32::from_be_bytes(be(data, 4)?), false)
    }

    fn new(last: u64, block: u32, thin: bool) -> Option<Self> {
        let blocks = last.checked_add(1)?;
        let bytes = blocks.checked_mul(block.into())?;
        let sound = block.is_power_of_two() && (512..=65536).contains(&block) && bytes <= i64::MAX as u64;
        sound.then_some(Self { blocks, block, thin })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block)
    }
}

/// Most blocks of one UNMAP, by the page of block limits (0xb0); 0 if the disk takes none.
pub(super) fn unmap_limit(page: &[u8]) -> u32 {
    let most = be(page, 20).map_or(0, u32::from_be_bytes);
    let ranges = be(page, 24).map_or(0, u32::from_be_bytes);
    if page.get(1) == Some(&0xb0) && ranges > 0 { most } else { 0 }
}

/// Whether UNMAP is there, by the page of logical block provisioning (0xb2).
pub(super) fn has_unmap(page: &[u8]) -> bool {
    page.get(1) == Some(&0xb2) && page.get(5).is_some_and(|flags| flags & 0x80 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_as_short_as_they_reach() {
        assert_eq!(read(0x01020304, 5, 512).cdb, [0x28, 0, 1, 2, 3, 4, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(write(1 << 32, 2, vec![]).cdb, [0x8a, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(read(0, 65536, 512).cdb[0], 0x88);
        let Data::Out(list) = unmap(0x55, 3).data else { panic!() };
        assert_eq!(list, [0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x55, 0, 0, 0, 3, 0, 0, 0, 0]);
    }

    #[test]
    fn capacities_are_sound_or_none() {
        let mut data = [0; 32];
        data[7] = 9;
        data[10] = 2;
        data[14] = 0xc0;
        assert_eq!(Capacity::parse_16(&data), Some(Capacity { blocks: 10, block: 512, thin: true }));
        assert_eq!(Capacity::parse_16(&data[..11]), None);
        data[10] = 3;
        assert_eq!(Capacity::parse_16(&data), None);
        data[10] = 2;
        data[0] = 0xff;
        assert_eq!(Capacity::parse_16(&data), None);
        assert_eq!(Capacity::parse_10(&[0, 0, 0, 1, 0, 0, 16, 0]).unwrap().bytes(), 8192);
        assert_eq!(Capacity::parse_10(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), None);
    }

    #[test]
    fn sense_data_of_both_formats_are_judged() {
        let fixed = |key, code, qualifier| {
            let mut sense = vec![0; 18];
            (sense[0], sense[2], sense[12], sense[13]) = (0x70, key, code, qualifier);
            Outcome { status: CHECK_CONDITION, sense, ..Default::default() }
        };
        assert_eq!(fixed(6, 0x29, 0).verdict(), Verdict::Again(Duration::ZERO));
        assert!(
            fixed(6, 0x29, 0).is_reset() && !fixed(6, 0x29, 7).is_reset() && !fixed(6, 0x2a, 0).is_reset()
        );
        assert_eq!(fixed(5, 0x20, 0).verdict(), Verdict::Unknown);
        assert!(matches!(fixed(2, 4, 1).verdict(), Verdict::Again(_)));
        let Verdict::Bad(text) = fixed(5, 0x25, 0).verdict() else { panic!() };
        assert!(text.contains("no such LUN"));
        let described =
            Outcome { status: CHECK_CONDITION, sense: vec![0x72, 3, 0x11, 1], ..Default::default() };
        let Verdict::Bad(text) = described.verdict() else { panic!() };
        assert!(text.contains("0x11/0x01") && text.contains("damaged"));
        assert!(matches!(
            Outcome { status: CHECK_CONDITION, ..Default::default() }.verdict(),
            Verdict::Bad(_)
        ));
        assert!(matches!(Outcome { status: 0x18, ..Default::default() }.verdict(), Verdict::Bad(_)));
    }
}
