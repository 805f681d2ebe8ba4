//! What was translated: blocks by the place of their bytes in host memory, their pages, and the links between them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use iem::Source;

use crate::plan::Mode;

/// Hashes integers.
#[derive(Default)]
pub(crate) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b.into());
        }
    }
    fn write_u8(&mut self, v: u8) {
        self.write_u64(v.into());
    }
    fn write_u16(&mut self, v: u16) {
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
    pub(crate) mode: u16,
    /// Host address of the next page, if its one instruction reaches into that.
    pub(crate) second: Option<u64>,
    /// Offset of the entry in the code buffer.
    pub(crate) entry: u32,
    /// Offset of the entry for jumps through the jump cache; zero while there is none.
    pub(crate) checked: u32,
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
    /// How often stack accesses behind the check lay in two pages.
    pub(crate) straddles: u8,
}

/// A guest page with translations.
pub(crate) struct Page {
    pub(crate) source: Source,
    pub(crate) blocks: Vec<u32>,
}

/// Which slots of the jump cache hold addresses of one page.
pub(crate) struct PageJumps {
    pub(crate) global: bool,
    pub(crate) slots: Vec<u16>,
}

#[derive(Default)]
pub(crate) struct Cache {
    pub(crate) blocks: Vec<Block>,
    pub(crate) links: Vec<Link>,
    pub(crate) by_place: IntMap<(u64, u16), u32>,
    pub(crate) pages: IntMap<u64, Page>,
    /// By bank and linear page address.
    pub(crate) jumps: IntMap<(u8, u64), PageJumps>,
}
