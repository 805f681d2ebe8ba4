//! Gives guest registers that have no home in a host register the place of registers that a loop does not use.
//!
//! While such a loop runs, the host register holds the other guest register's value and its own is in the context
//! ([`crate::context::Context::swapped`]). Wherever the block is left, also for a slow access, they are put back.

use iced_x86::{Instruction, InstructionInfoFactory, OpKind, Register};

use crate::plan::{Item, Kind, high_number};

/// In the place of a guest register: the address of the context. Reaching the TLB's entries by it instead of by GS takes a cycle less,
/// which counts where each access waits for the one before.
pub(crate) const AREA: u8 = 4;

/// A guest register and the one whose host register it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Swap {
    /// Number of r12 to r15, counted from r12, or [`AREA`].
    pub(crate) high: u8,
    /// Number of the host register.
    pub(crate) host: u8,
}

/// Registers that may be idle, those first that need no REX prefix.
const HOMED: [Register; 11] = [
    Register::RBX,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::RDX,
    Register::RCX,
    Register::RAX,
    Register::R11,
    Register::R10,
    Register::R9,
    Register::R8,
];

/// Rewrites the instructions of a loop so that r12 to r15 are in registers that it leaves alone.
pub(crate) fn apply(items: &mut [Item], info: &mut InstructionInfoFactory) -> Vec<Swap> {
    let allowed = |kind: Kind| {
        matches!(
            kind,
            Kind::Copy | Kind::Lea | Kind::Nop | Kind::Jcc(_) | Kind::BitString | Kind::Push | Kind::Pop
        )
    };
    if !items.iter().all(|item| allowed(item.kind)) {
        return Vec::new();
    }
    let mut used = [false; 16];
    let mut uses = [0u32; 4];
    for item in items.iter() {
        for register in info.info(&item.insn).used_registers() {
            let register = register.register();
            if !register.is_gpr() {
                continue;
            }
            match high_number(register) {
                Some(n) => uses[usize::from(n)] += 1,
                None => used[register.full_register().number()] = true,
            }
        }
    }
    let mut idle = HOMED.into_iter().filter(|r| !used[r.number()]);
    let mut order = [0u8, 1, 2, 3];
    order.sort_by_key(|&n| std::cmp::Reverse(uses[usize::from(n)]));
    let mut swaps: Vec<Swap> = order
        .into_iter()
        .filter(|&n| uses[usize::from(n)] > 0)
        .map_while(|high| Some(Swap { high, host: idle.next()?.number() as u8 }))
        .collect();
    for item in items.iter_mut() {
        for swap in &swaps {
            rename(&mut item.insn, *swap);
            item.renamed = true;
        }
    }
    if items.iter().any(|item| item.moves)
        && let Some(register) = idle.next()
    {
        swaps.push(Swap { high: AREA, host: register.number() as u8 });
    }
    swaps
}

fn rename(insn: &mut Instruction, swap: Swap) {
    let renamed = |register: Register| -> Option<Register> {
        (high_number(register)? == swap.high).then(|| crate::emit::sized(swap.host, register.size()))
    };
    for n in 0..insn.op_count() {
        if insn.op_kind(n) == OpKind::Register
            && let Some(register) = renamed(insn.op_register(n))
        {
            insn.set_op_register(n, register);
        }
    }
    if let Some(register) = renamed(insn.memory_base()) {
        insn.set_memory_base(register);
    }
    if let Some(register) = renamed(insn.memory_index()) {
        insn.set_memory_index(register);
    }
}
