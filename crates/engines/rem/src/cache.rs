//! What was translated: blocks by the place of their bytes in host memory, their pages, and the links between them.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::AtomicU32;

use iem::Source;
use iem::tlb::SPACES;

use crate::plan::Mode;

/// Hashes integers.
#[derive(Default)]
pub(crate) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            self.write_u64(piece.iter().fold(0, |v, &b| v << 8 | u64::from(b)));
        }
    }
    fn write_u8(&mut self, v: u8) {
        self.write_u64(v.into());
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(v.into());
    }
    fn write_u64(&mut self, v: u64) {
        let x = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = x ^ x >> 29;
    }
}

pub(crate) type IntMap<K, V> = HashMap<K, V, BuildHasherDefault<IntHasher>>;

/// A translated block.
pub(crate) struct Block {
    /// Host address of the guest page and offset in it.
    pub(crate) page: u64,
    pub(crate) start: u16,
    pub(crate) mode: u32,
    /// Host address of the next page, if its one instruction reaches into that.
    pub(crate) second: Option<u64>,
    /// Offset of the entry in the code buffer.
    pub(crate) entry: u32,
    /// Offset of the entry for jumps through the jump cache, if there is one.
    pub(crate) checked: Option<u32>,
    /// Flags matter at its start.
    pub(crate) live: bool,
    /// Its first instruction is interpreted: there is nothing to enter. True inside if that works on floating-point state.
    pub(crate) interpret: Option<bool>,
    /// Links aimed at it.
    pub(crate) incoming: Vec<u32>,
}

/// A direct jump of a block.
#[derive(Clone, Copy)]
pub(crate) struct Link {
    pub(crate) site: u32,
    pub(crate) stub: u32,
    pub(crate) page: u64,
    pub(crate) target: u16,
    pub(crate) mode: Mode,
    pub(crate) check: Option<(u32, u32)>,
    /// How often the accesses behind the check could not be made by it.
    pub(crate) failures: u8,
}

/// A guest page with translations.
pub(crate) struct Page {
    pub(crate) source: Source,
    pub(crate) blocks: Vec<u32>,
    /// Its writes are not noticed, and its blocks verify their bytes.
    pub(crate) fleeting: Option<Fleeting>,
}

impl Page {
    /// Code that blocks were made from was overwritten, and they do not see that themselves.
    pub(crate) fn stale(&self) -> bool {
        self.fleeting.is_none() && !self.source.valid()
    }
}

/// What is known of a page whose blocks verify their bytes.
pub(crate) struct Fleeting {
    /// Entries of blocks until the page is looked at as a whole. Generated code counts it down.
    pub(crate) left: Box<AtomicU32>,
    /// Offsets between which its blocks lie.
    pub(crate) extent: (u16, u16),
    /// A hash of what stood there when the page was looked at last.
    pub(crate) seen: u64,
}

/// What is known of a page whose code was overwritten by single stores.
#[derive(Clone, Copy, Default)]
pub(crate) struct Rewritten {
    /// How often its code stayed the same for long afterwards.
    pub(crate) settled: u8,
    /// It does so now.
    pub(crate) stable: bool,
}

impl Rewritten {
    /// Entries of verifying blocks without a change after which the page counts as stable.
    pub(crate) fn patience(self) -> u32 {
        1024 << self.settled.min(6)
    }
}

/// Which slots of the jump cache hold addresses of one page.
pub(crate) struct PageJumps {
    /// The kernel's code in it is global. The user's is looked at as the address space's own.
    pub(crate) global: bool,
    pub(crate) slots: Vec<u16>,
}

/// A bank of the jump cache: the user's exists once for each address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Placed(u8);

impl Placed {
    pub(crate) const KERNEL: Self = Self(0);
    pub(crate) const OVERRIDE: Self = Self(2);

    pub(crate) fn new(bank: u8, space: usize) -> Self {
        if bank == 1 { Self::user(space) } else { Self(bank) }
    }

    pub(crate) fn user(space: usize) -> Self {
        Self((space as u8) << 2 | 1)
    }

    pub(crate) fn bank(self) -> usize {
        usize::from(self.0 & 3)
    }

    pub(crate) fn space(self) -> usize {
        usize::from(self.0 >> 2)
    }
}

/// A block that a jump through the jump cache led to, in one piece of memory: what is known of it otherwise lies in several.
#[derive(Clone, Copy, Default)]
pub(crate) struct Recent {
    /// As in [`Block`]: host address of its first byte, and its mode. No byte lies at 0.
    at: u64,
    mode: u32,
    pub(crate) entry: u32,
    pub(crate) checked: u32,
}

/// Blocks that lie in one page and have something to enter, by their places: the last ones found.
pub(crate) struct Recents(Box<[Recent]>);

impl Default for Recents {
    fn default() -> Self {
        Self(vec![Recent::default(); 1 << Self::BITS].into_boxed_slice())
    }
}

impl Recents {
    const BITS: u32 = 15;

    fn slot(at: u64) -> usize {
        (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - Self::BITS)) as usize
    }

    pub(crate) fn get(&self, at: u64, mode: u32) -> Option<Recent> {
        let recent = self.0[Self::slot(at)];
        (recent.at == at && recent.mode == mode).then_some(recent)
    }

    pub(crate) fn put(&mut self, block: &Block) {
        if let (None, None, Some(checked)) = (block.second, block.interpret, block.checked) {
            let at = block.page + u64::from(block.start);
            self.0[Self::slot(at)] = Recent { at, mode: block.mode, entry: block.entry, checked };
        }
    }

    pub(crate) fn forget(&mut self, at: u64) {
        self.0[Self::slot(at)] = Recent::default();
    }
}

#[derive(Default)]
pub(crate) struct Cache {
    pub(crate) blocks: Vec<Block>,
    pub(crate) links: Vec<Link>,
    /// Checks of kept pages: page offset of the instruction, and block.
    pub(crate) places: Vec<(u16, u32)>,
    /// How often code of a page was seen at work, by host address.
    pub(crate) heat: IntMap<u64, u8>,
    /// Sites taken.
    pub(crate) sites: usize,
    /// Instructions whose memory operands move from page to page too often for that, by host address.
    pub(crate) moving: HashSet<u64, BuildHasherDefault<IntHasher>>,
    pub(crate) by_place: IntMap<(u64, u32), u32>,
    pub(crate) recent: Recents,
    pub(crate) pages: IntMap<u64, Page>,
    pub(crate) rewritten: IntMap<u64, Rewritten>,
    /// By bank and linear page address.
    pub(crate) jumps: IntMap<(Placed, u64), PageJumps>,
    /// Those of the kernel's banks that are not global.
    pub(crate) local: Vec<(Placed, u64)>,
    /// The user's pages, by address space.
    pub(crate) users: [Vec<u64>; SPACES],
}
