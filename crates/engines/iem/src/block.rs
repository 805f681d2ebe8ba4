//! Decoded blocks: straight-line code of one page, kept by where its bytes lie in host memory, and valid while nobody writes
//! there.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use pgm::HostMemory;

use crate::decode;
use crate::op::{Ends, Op};

/// Most operations in a block.
const MAX_OPS: usize = 64;
/// Blocks kept before all are dropped.
const MAX_BLOCKS: usize = 1 << 16;
/// Longest instruction.
pub(crate) const MAX_LEN: usize = 15;

/// A page of code and the write count at which it was decoded.
pub struct Source {
    pub memory: Arc<HostMemory>,
    pub page: u64,
    pub generation: u32,
}

impl Source {
    /// Whether no write has hit code of the page since.
    #[inline(always)]
    pub fn valid(&self) -> bool {
        self.memory.code_page(self.page).is_some_and(|c| c.generation() == self.generation)
    }
}

/// A run of decoded instructions.
pub(crate) struct Block {
    /// Operations that go on to the next.
    pub(crate) body: Box<[Op]>,
    /// The last one, if it sets RIP itself.
    pub(crate) branch: Option<Op>,
    /// Modes may have changed behind it.
    pub(crate) system: bool,
    /// It goes on at one of at most two places.
    pub(crate) direct: bool,
    /// The blocks found there, by linear address and mode.
    links: [Cell<Jump>; 2],
    /// Bytes of code.
    pub(crate) len: u64,
    /// Where the bytes lie; none for code outside memory, which is not kept.
    pub(crate) source: Option<Source>,
    /// The frame key of the second page and its source, for the one instruction of a block that crosses pages.
    pub(crate) second: Option<(u64, Source)>,
}

impl Block {
    #[inline(always)]
    pub(crate) fn valid(&self) -> bool {
        self.source.as_ref().is_some_and(Source::valid) && self.second.as_ref().is_none_or(|(_, s)| s.valid())
    }
}

impl Block {
    /// The block that followed this one at `pc` before.
    #[inline(always)]
    pub(crate) fn next(&self, pc: u64, key: u64) -> Option<u32> {
        self.links.iter().map(Cell::get).find(|l| l.pc == pc && l.key == key).map(|l| l.block)
    }

    /// Remembers which block follows at `pc`.
    pub(crate) fn link(&self, pc: u64, key: u64, block: u32) {
        if self.direct {
            let free = self.links[0].get().key != key;
            self.links[usize::from(!free)].set(Jump { pc, key, block });
        }
    }
}

/// What decoding found.
pub(crate) struct Decoded {
    pub(crate) block: Block,
    /// The first instruction needs bytes of the next page.
    pub(crate) crosses: bool,
}

/// Decodes as far as the bytes, which end with the page or (`whole`) hold the one instruction that is wanted.
pub(crate) fn decode_block(bytes: &[u8], bits: u32, cpuid: &cpum::CpuidTable, single: bool) -> Decoded {
    let mut body = Vec::new();
    let mut branch = None;
    let mut system = false;
    let mut direct = true;
    let mut at = 0;
    let mut crosses = false;
    let mut decoder = Decoder::new(bits, bytes, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while at < bytes.len() && body.len() < MAX_OPS {
        if decoder.try_set_position(at).is_err() {
            break;
        }
        decoder.set_ip(0);
        decoder.decode_out(&mut insn);
        if decoder.last_error() == DecoderError::NoMoreBytes {
            if bytes.len() - at < MAX_LEN {
                crosses = body.is_empty();
                if crosses && single {
                    // Fifteen bytes were not enough: too long.
                    system = true;
                    branch = None;
                    body.push(decode::invalid(1));
                }
                break;
            }
        }
        if insn.is_invalid() {
            system = true;
            body.push(decode::invalid(insn.len().clamp(1, MAX_LEN) as u8));
            at += insn.len().max(1);
            break;
        }
        let (op, ends) = decode::decode(&insn, bits, cpuid);
        at += insn.len();
        match ends {
            Ends::No => body.push(op),
            Ends::System => {
                body.push(op);
                system = true;
                break;
            }
            Ends::Branch | Ends::SystemBranch => {
                branch = Some(op);
                direct = insn.near_branch_target() != 0;
                system = ends == Ends::SystemBranch;
                break;
            }
        }
        if single {
            break;
        }
    }
    let block = Block {
        body: body.into(),
        branch,
        system,
        direct,
        links: [const { Cell::new(NO_JUMP) }; 2],
        len: at as u64,
        source: None,
        second: None,
    };
    Decoded { block, crosses }
}

/// Hashes one integer key.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(b.into());
        }
    }

    fn write_u64(&mut self, v: u64) {
        let x = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = x ^ x >> 29;
    }
}

/// A guess where the block at a linear address is.
#[derive(Clone, Copy)]
struct Jump {
    pc: u64,
    key: u64,
    block: u32,
}

const JUMPS: usize = 8192;

/// The decoded blocks of one vCPU.
pub(crate) struct Blocks {
    pub(crate) list: Vec<Block>,
    by_key: HashMap<(u64, u64), u32, BuildHasherDefault<KeyHasher>>,
    jumps: Box<[Jump; JUMPS]>,
}

const NO_JUMP: Jump = Jump { pc: 0, key: u64::MAX, block: 0 };

impl Default for Blocks {
    fn default() -> Self {
        let jumps: Box<[Jump]> = vec![NO_JUMP; JUMPS].into();
        let Ok(jumps) = jumps.try_into() else { unreachable!("the length is the array's") };
        Self { list: Vec::new(), by_key: HashMap::default(), jumps }
    }
}

#[inline(always)]
fn jump_slot(pc: u64) -> usize {
    (pc ^ pc >> 13) as usize % JUMPS
}

impl Blocks {
    /// The valid block that was last run at `pc` in the mode `key`.
    #[inline(always)]
    pub(crate) fn jump(&self, pc: u64, key: u64) -> Option<u32> {
        let j = &self.jumps[jump_slot(pc)];
        if j.pc == pc
            && j.key == key
            && self.list.get(j.block as usize).is_some_and(|b| b.valid() && b.second.is_none())
        {
            Some(j.block)
        } else {
            None
        }
    }

    pub(crate) fn remember(&mut self, pc: u64, key: u64, block: u32) {
        self.jumps[jump_slot(pc)] = Jump { pc, key, block };
    }

    /// The block whose bytes start at host address `at` in code of size `size`, valid or not.
    pub(crate) fn find(&self, at: u64, size: u64) -> Option<u32> {
        self.by_key.get(&(at, size)).copied()
    }

    /// Keeps a block, in place of the one at the same bytes if there is one.
    pub(crate) fn insert(&mut self, at: u64, size: u64, block: Block) -> u32 {
        if let Some(&index) = self.by_key.get(&(at, size)) {
            self.list[index as usize] = block;
            return index;
        }
        if self.list.len() >= MAX_BLOCKS {
            self.clear();
        }
        let index = self.list.len() as u32;
        self.list.push(block);
        self.by_key.insert((at, size), index);
        index
    }

    pub(crate) fn clear(&mut self) {
        self.list.clear();
        self.by_key.clear();
        self.jumps.fill(NO_JUMP);
    }
}
