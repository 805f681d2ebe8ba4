//! A decoded operation, and the ways its handler reaches registers and memory operands.

use cpum::CpuState;
use cpum::state::seg;
use iced_x86::Instruction;

use crate::Fault;
use crate::core::Core;
use crate::flags::Int;
use crate::tlb::Cell;

/// Executes an operation. RIP is the instruction's; a handler of [`Ends::Branch`] sets RIP, for all others the run loop steps on.
/// On a fault nothing has changed.
pub(crate) type Handler = fn(&mut Core, &mut CpuState, &Op) -> Result<(), Fault>;

/// How an effective address is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Form {
    /// 64-bit: base + displacement.
    Base,
    /// 64-bit: base + index × scale + displacement.
    BaseIndex,
    /// 64-bit: index × scale + displacement.
    Index,
    /// Displacement alone.
    Absolute,
    /// RIP at the start of the instruction + displacement.
    Rip,
    /// 32 bits of any of these.
    Short32,
    /// 16 bits of any of these.
    Short16,
}

/// No base or index register.
pub(crate) const NONE: u8 = 0xff;
/// RIP as base, in [`Form::Short32`].
pub(crate) const BASE_RIP: u8 = 0xfe;

/// 64-bit code.
pub(crate) const LONG: u8 = 1;
/// A segment base must be added in 64-bit code (FS, GS).
pub(crate) const SEG_BASE: u8 = 2;
/// REP or REPE.
pub(crate) const REP: u8 = 4;
/// REPNE.
pub(crate) const REPNE: u8 = 8;
/// LOCK.
pub(crate) const LOCK: u8 = 16;
/// An explicit memory operand that goes through SS, or a stack access.
pub(crate) const VIA_SS: u8 = 32;
/// Virtual-8086, real or protected code without L.
pub(crate) const MEMORY: u8 = 64;

/// A decoded operation.
pub(crate) struct Op {
    pub(crate) run: Handler,
    pub(crate) disp: u64,
    pub(crate) imm: u64,
    /// First and second register operand.
    pub(crate) a: u8,
    pub(crate) b: u8,
    pub(crate) base: u8,
    pub(crate) index: u8,
    pub(crate) scale: u8,
    pub(crate) seg: u8,
    pub(crate) form: Form,
    pub(crate) flags: u8,
    /// Operand size in bytes.
    pub(crate) size: u8,
    /// Address size in bytes.
    pub(crate) address_size: u8,
    pub(crate) len: u8,
    /// The instruction itself, for those handlers that need more.
    pub(crate) full: Option<Box<Full>>,
}

/// What rare handlers need.
pub(crate) struct Full {
    pub(crate) insn: Instruction,
    pub(crate) class: Option<crate::unit::Class>,
    pub(crate) stub: std::cell::Cell<crate::unit::StubId>,
    /// The handler behind a check of the mode.
    pub(crate) inner: Option<Handler>,
}

/// How an operation ends its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    /// It does not.
    No,
    /// It sets RIP.
    Branch,
    /// Execution goes on behind it, but modes or state may have changed.
    System,
    /// It sets RIP, and modes may have changed.
    SystemBranch,
}

impl Op {
    #[inline(always)]
    pub(crate) fn long(&self) -> bool {
        self.flags & LONG != 0
    }

    #[inline(always)]
    pub(crate) fn memory(&self) -> bool {
        self.flags & MEMORY != 0
    }
}

#[inline(always)]
fn gpr(cpu: &CpuState, r: u8) -> u64 {
    cpu.gpr[usize::from(r & 15)]
}

/// Reads register operand `r` at size `T`. AH to BH are numbers 0x80 to 0x83.
#[inline(always)]
pub(crate) fn reg<T: Int>(cpu: &CpuState, r: u8) -> T {
    let v = cpu.gpr[usize::from(r & 15)];
    T::from_u64(if T::BYTES == 1 { v >> (r >> 4) } else { v })
}

/// Writes register operand `r` at size `T`; 32-bit results clear the upper half.
#[inline(always)]
pub(crate) fn set_reg<T: Int>(cpu: &mut CpuState, r: u8, value: T) {
    let slot = &mut cpu.gpr[usize::from(r & 15)];
    *slot = match T::BYTES {
        1 => *slot & !(0xff << (r >> 4)) | value.to_u64() << (r >> 4),
        2 => *slot & !0xffff | value.to_u64(),
        _ => value.to_u64(),
    };
}

/// The effective address (offset in its segment).
#[inline(always)]
pub(crate) fn ea(cpu: &CpuState, op: &Op) -> u64 {
    match op.form {
        Form::Base => gpr(cpu, op.base).wrapping_add(op.disp),
        Form::BaseIndex => {
            gpr(cpu, op.base).wrapping_add(gpr(cpu, op.index) << (op.scale & 3)).wrapping_add(op.disp)
        }
        Form::Index => (gpr(cpu, op.index) << (op.scale & 3)).wrapping_add(op.disp),
        Form::Absolute => op.disp,
        Form::Rip => cpu.rip.wrapping_add(op.disp),
        Form::Short32 => short(cpu, op) & 0xffff_ffff,
        Form::Short16 => short(cpu, op) & 0xffff,
    }
}

#[inline(always)]
fn short(cpu: &CpuState, op: &Op) -> u64 {
    let mut a = op.disp;
    if op.base < 16 {
        a = a.wrapping_add(gpr(cpu, op.base));
    } else if op.base == BASE_RIP {
        a = a.wrapping_add(cpu.rip);
    }
    if op.index < 16 {
        a = a.wrapping_add(gpr(cpu, op.index) << (op.scale & 3));
    }
    a
}

/// The linear address of `offset` in the operation's segment, checked outside 64-bit code.
#[inline(always)]
pub(crate) fn linear_of(cpu: &CpuState, op: &Op, offset: u64, size: u64, write: bool) -> Result<u64, Fault> {
    if op.long() {
        Ok(if op.flags & SEG_BASE != 0 {
            let segment = if op.seg as usize == seg::FS { seg::FS } else { seg::GS };
            offset.wrapping_add(cpu.seg[segment].base)
        } else {
            offset
        })
    } else {
        Core::legacy_linear(cpu, usize::from(op.seg).min(5), offset, size, write)
    }
}

#[inline(always)]
pub(crate) fn linear<T: Int>(cpu: &CpuState, op: &Op, write: bool) -> Result<u64, Fault> {
    linear_of(cpu, op, ea(cpu, op), T::BYTES as u64, write)
}

/// Reads the memory operand.
#[inline(always)]
pub(crate) fn load<T: Cell>(core: &mut Core, cpu: &CpuState, op: &Op) -> Result<T, Fault> {
    let at = linear::<T>(cpu, op, false)?;
    core.read(cpu, at)
}

/// Writes the memory operand.
#[inline(always)]
pub(crate) fn store<T: Cell>(core: &mut Core, cpu: &CpuState, op: &Op, value: T) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    core.write(cpu, at, value)
}

/// Reads the operand that is register `r` or memory.
#[inline(always)]
pub(crate) fn load_rm<T: Cell>(core: &mut Core, cpu: &CpuState, op: &Op, r: u8) -> Result<T, Fault> {
    if op.memory() { load(core, cpu, op) } else { Ok(reg(cpu, r)) }
}

/// Writes the operand that is register `r` or memory.
#[inline(always)]
pub(crate) fn store_rm<T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
    r: u8,
    value: T,
) -> Result<(), Fault> {
    if op.memory() {
        store(core, cpu, op, value)
    } else {
        set_reg(cpu, r, value);
        Ok(())
    }
}

/// Sets RIP to the instruction behind.
#[inline(always)]
pub(crate) fn step_over(cpu: &mut CpuState, op: &Op) {
    let next = cpu.rip.wrapping_add(op.len.into());
    cpu.rip = if op.long() { next } else { next & 0xffff_ffff };
}

/// A handler for each size of operand.
#[macro_export]
#[doc(hidden)]
macro_rules! by_size {
    ($size:expr, $f:ident $(, $g:tt)*) => {
        match $size {
            1 => $f::<$($g,)* u8>,
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
    (wide $size:expr, $f:ident $(, $g:tt)*) => {
        match $size {
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}
