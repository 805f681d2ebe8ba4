//! Finds the memory accesses of a block that one check can serve: those with the same base and index, a few bytes apart.
//!
//! The first access of a group checks the page for all; what it finds, the distance from linear to host addresses in that page, is
//! kept in [`crate::context::Context::places`] for the others. In a block that is a loop of its own or belongs to a page that runs
//! much, pages are kept at sites in the context from one time to the next, also for accesses that stand alone. A page stays where it is while generated code does not
//! leave: whoever takes translations away has the vCPU leave first, and sites are cleared then.

use smallvec::{SmallVec, smallvec};

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use crate::context::{PLACES, SITES};
use crate::plan::{Change, Item, Kind, Memory, Mode, stack_change};

/// How an access finds its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// Where the page is kept.
    pub(crate) slot: Slot,
    /// This access checks it.
    pub(crate) check: Option<Check>,
}

/// Where a page is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// In this entry of [`crate::context::Context::places`], until the block ends.
    Block(u8),
    /// At this site, until translations are taken away.
    Site(u16),
}

/// What a check covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// Lowest byte, relative to the address of the access that checks.
    pub(crate) low: i32,
    pub(crate) span: u16,
    pub(crate) writes: bool,
    /// It is about this access only.
    pub(crate) alone: bool,
}

/// Most bytes between the ends of a group: the more, the more often it lies in two pages.
const SPAN: i64 = 256;

struct Open {
    base: Register,
    index: Register,
    scale: u32,
    /// By how much the base has grown since the check.
    grown: i64,
    low: i64,
    high: i64,
    /// Offset of the access that checks.
    first: i64,
    writes: bool,
    /// The block may have been left since the check.
    exits: bool,
    members: SmallVec<[usize; 4]>,
}

impl Open {
    fn uses(&self, register: Register) -> bool {
        let same = |r: Register| r != Register::None && r != Register::RIP && r.full_register() == register;
        same(self.base) || same(self.index)
    }
}

/// Groups the accesses of a block. `sites`, if it is to keep pages, counts the sites that are taken.
pub(crate) fn find(
    items: &mut [Item],
    mode: Mode,
    sites: Option<&mut usize>,
    info: &mut InstructionInfoFactory,
) {
    if !mode.long {
        return;
    }
    let mut open: Vec<Open> = Vec::new();
    let mut free = Free { places: 0, sites };
    for n in 0..items.len() {
        if items[n].joined {
            // Who comes here may not have met the checks before.
            for closed in std::mem::take(&mut open) {
                free.settle(items, &closed);
            }
        }
        let item = &items[n];
        if groupable(item) {
            let disp = item.insn.memory_displacement64() as i64;
            let (base, index) = (item.insn.memory_base(), item.insn.memory_index());
            let scale = item.insn.memory_index_scale();
            let size = i64::from(item.size);
            // PUSH and calls write to the stack only.
            let writes = item.writes && matches!(item.kind, Kind::Copy | Kind::Divide);
            let known = open.iter().position(|o| o.base == base && o.index == index && o.scale == scale);
            let joins = known.is_some_and(|k| {
                let o = &open[k];
                let at = disp + o.grown;
                o.high.max(at + size) - o.low.min(at) <= SPAN
                    && item.align <= 1
                    && items[o.members[0]].align <= 1
                    // A page must not be marked as written by an access that is not made.
                    && (!writes || o.writes || !o.exits)
            });
            match known {
                Some(k) if joins => {
                    let o = &mut open[k];
                    let at = disp + o.grown;
                    (o.low, o.high) = (o.low.min(at), o.high.max(at + size));
                    o.writes |= writes;
                    o.members.push(n);
                }
                _ => {
                    if let Some(k) = known {
                        let closed = open.swap_remove(k);
                        free.settle(items, &closed);
                    }
                    open.push(Open {
                        base,
                        index,
                        scale,
                        grown: 0,
                        low: disp,
                        high: disp + size,
                        first: disp,
                        writes,
                        exits: false,
                        members: smallvec![n],
                    });
                }
            }
        }
        if open.is_empty() {
            continue;
        }
        let item = &items[n];
        match item.kind {
            Kind::Copy | Kind::Divide | Kind::BitString | Kind::Lea | Kind::Push | Kind::Pop => {
                let (insn, kind, known) = (item.insn, item.kind, item.immediate.is_none());
                let mut written = |register: Register| {
                    let growth = growth(&insn, kind, register).filter(|_| known);
                    let mut k = 0;
                    while k < open.len() {
                        let o = &mut open[k];
                        if !o.uses(register) {
                            k += 1;
                            continue;
                        }
                        match growth {
                            Some(v) if o.base == register && o.index.full_register() != register => {
                                o.grown += v;
                                k += 1;
                            }
                            _ => {
                                let closed = open.swap_remove(k);
                                free.settle(items, &closed);
                            }
                        }
                    }
                };
                if kind == Kind::Copy && writes_first_only(&insn) {
                    if insn.op_kind(0) == OpKind::Register && insn.op_register(0).is_gpr() {
                        written(insn.op_register(0).full_register());
                    }
                } else {
                    for used in info.info(&insn).used_registers() {
                        let kept =
                            matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
                        if !kept && used.register().is_gpr() {
                            written(used.register().full_register());
                        }
                    }
                }
            }
            Kind::Nop => {}
            Kind::Jcc(_) | Kind::Jcxz(_) => open.iter_mut().for_each(|o| o.exits = true),
            _ => {
                for closed in std::mem::take(&mut open) {
                    free.settle(items, &closed);
                }
            }
        }
    }
    for closed in open {
        free.settle(items, &closed);
    }
}

/// Whether the instruction is known to write no register but its first operand: most do not, and need no closer look.
fn writes_first_only(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Add
            | Sub
            | Adc
            | Sbb
            | And
            | Or
            | Xor
            | Inc
            | Dec
            | Neg
            | Not
            | Shl
            | Shr
            | Sar
    )
}

fn groupable(item: &Item) -> bool {
    let insn = &item.insn;
    let full = |r: Register| r == Register::None || r == Register::RIP || r.is_gpr64();
    let (base, index) = (insn.memory_base(), insn.memory_index());
    matches!(
        item.kind,
        Kind::Copy | Kind::Divide | Kind::Push | Kind::JmpIndirect | Kind::CallIndirect
    ) && item.memory == Memory::Checked
        && full(base)
        && full(index)
        // An address of 32 bits wraps.
        && (base != Register::None || index != Register::None || insn.memory_displ_size() != 4)
        && !matches!(insn.memory_segment(), Register::FS | Register::GS)
        && (insn.memory_displacement64() as i64).abs() < 1 << 30
}

/// By how much the instruction makes a register grow, if that is known.
fn growth(insn: &Instruction, kind: Kind, register: Register) -> Option<i64> {
    if register == Register::RSP {
        return match stack_change(insn, kind, 8) {
            Change::By(v) => Some(v.into()),
            _ => None,
        };
    }
    if insn.op_kind(0) != OpKind::Register || insn.op_register(0) != register {
        return None;
    }
    let immediate = insn.op_count() == 2
        && !matches!(insn.op_kind(1), OpKind::Register | OpKind::Memory)
        && matches!(insn.mnemonic(), Mnemonic::Add | Mnemonic::Sub);
    let by = match insn.mnemonic() {
        Mnemonic::Add if immediate => insn.immediate(1) as i64,
        Mnemonic::Sub if immediate => (insn.immediate(1) as i64).wrapping_neg(),
        Mnemonic::Inc => 1,
        Mnemonic::Dec => -1,
        Mnemonic::Lea if insn.memory_base() == register && insn.memory_index() == Register::None => {
            insn.memory_displacement64() as i64
        }
        _ => return None,
    };
    (by.abs() < 1 << 20).then_some(by)
}

/// Where pages can still be kept.
struct Free<'a> {
    places: u8,
    sites: Option<&'a mut usize>,
}

impl Free<'_> {
    fn settle(&mut self, items: &mut [Item], group: &Open) {
        let alone = group.members.len() == 1;
        let slot = match &mut self.sites {
            Some(taken) if !items[group.members[0]].moves && **taken < SITES => {
                **taken += 1;
                Slot::Site((**taken - 1) as u16)
            }
            _ if alone || usize::from(self.places) == PLACES => return,
            _ => {
                self.places += 1;
                Slot::Block(self.places - 1)
            }
        };
        for (k, &n) in group.members.iter().enumerate() {
            let check = (k == 0).then(|| Check {
                low: (group.low - group.first) as i32,
                span: (group.high - group.low) as u16,
                writes: group.writes,
                alone,
            });
            items[n].group = Some(Group { slot, check });
        }
    }
}
