//! Addition, subtraction, logic, comparison, multiplication, division and decimal adjustment.

use cpum::CpuState;
use cpum::state::{gpr, rflags};

use crate::Fault;
use crate::core::Core;
use crate::flags::{self, Int, Lazy};
use crate::op::{Op, linear, load, load_rm, reg, set_reg};
use crate::tlb::Cell;

/// A two-operand operation that sets the arithmetic flags.
pub(crate) trait Alu {
    /// CMP and TEST keep the destination.
    const WRITES: bool = true;
    const CARRY: bool = false;
    fn apply<T: Int>(a: T, b: T, carry: bool) -> (T, Lazy);
}

macro_rules! alu {
    ($($name:ident $writes:literal $carry:literal |$a:ident, $b:ident, $c:ident| $e:expr;)*) => { $(
        pub(crate) struct $name;
        impl Alu for $name {
            const WRITES: bool = $writes;
            const CARRY: bool = $carry;
            #[inline(always)]
            fn apply<T: Int>($a: T, $b: T, $c: bool) -> (T, Lazy) { $e }
        }
    )* };
}

#[inline(always)]
fn logic<T: Int>(value: u64) -> (T, Lazy) {
    let r = T::from_u64(value);
    (r, flags::logic(r))
}

alu! {
    Add true false |a, b, _c| flags::add(a, b, false);
    Adc true true |a, b, c| flags::add(a, b, c);
    Sub true false |a, b, _c| flags::sub(a, b, false);
    Sbb true true |a, b, c| flags::sub(a, b, c);
    Cmp false false |a, b, _c| flags::sub(a, b, false);
    And true false |a, b, _c| logic(a.to_u64() & b.to_u64());
    Or true false |a, b, _c| logic(a.to_u64() | b.to_u64());
    Xor true false |a, b, _c| logic(a.to_u64() ^ b.to_u64());
    Test false false |a, b, _c| logic(a.to_u64() & b.to_u64());
}

#[inline(always)]
fn carry<A: Alu>(core: &Core, cpu: &CpuState) -> bool {
    A::CARRY && core.cf(cpu)
}

pub(crate) fn rr<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (r, f) = A::apply(reg::<T>(cpu, op.a), reg::<T>(cpu, op.b), carry::<A>(core, cpu));
    core.set_flags(f);
    if A::WRITES {
        set_reg(cpu, op.a, r);
    }
    Ok(())
}

pub(crate) fn ri<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (r, f) = A::apply(reg::<T>(cpu, op.a), T::from_u64(op.imm), carry::<A>(core, cpu));
    core.set_flags(f);
    if A::WRITES {
        set_reg(cpu, op.a, r);
    }
    Ok(())
}

/// Register destination, memory source.
pub(crate) fn rm<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = load::<T>(core, cpu, op)?;
    let (r, f) = A::apply(reg::<T>(cpu, op.a), b, carry::<A>(core, cpu));
    core.set_flags(f);
    if A::WRITES {
        set_reg(cpu, op.a, r);
    }
    Ok(())
}

#[inline(always)]
fn to_memory<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, b: T) -> Result<(), Fault> {
    if !A::WRITES {
        let a = load::<T>(core, cpu, op)?;
        core.set_flags(A::apply(a, b, false).1);
        return Ok(());
    }
    let at = linear::<T>(cpu, op, true)?;
    let c = carry::<A>(core, cpu);
    let mut f = Lazy::default();
    core.update(cpu, at, |a| {
        let (r, flags) = A::apply(a, b, c);
        f = flags;
        r
    })?;
    core.set_flags(f);
    Ok(())
}

pub(crate) fn mr<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = reg::<T>(cpu, op.b);
    to_memory::<A, T>(core, cpu, op, b)
}

pub(crate) fn mi<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    to_memory::<A, T>(core, cpu, op, T::from_u64(op.imm))
}

#[inline(always)]
fn locked<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, b: T) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    let c = carry::<A>(core, cpu);
    let old = core.atomic(cpu, at, |a| A::apply(a, b, c).0)?;
    core.set_flags(A::apply(old, b, c).1);
    Ok(())
}

pub(crate) fn lock_mr<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = reg::<T>(cpu, op.b);
    locked::<A, T>(core, cpu, op, b)
}

pub(crate) fn lock_mi<A: Alu, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    locked::<A, T>(core, cpu, op, T::from_u64(op.imm))
}

/// A one-operand operation.
pub(crate) trait Unary {
    fn apply<T: Int>(a: T, cf: bool) -> (T, Option<Lazy>);
}

macro_rules! unary {
    ($($name:ident |$a:ident, $c:ident| $e:expr;)*) => { $(
        pub(crate) struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Int>($a: T, $c: bool) -> (T, Option<Lazy>) { $e }
        }
    )* };
}

#[inline(always)]
fn with_flags<T: Int>((r, f): (T, Lazy)) -> (T, Option<Lazy>) {
    (r, Some(f))
}

unary! {
    Inc |a, c| with_flags(flags::inc(a, c));
    Dec |a, c| with_flags(flags::dec(a, c));
    Neg |a, _c| with_flags(flags::sub(T::from_u64(0), a, false));
    Not |a, _c| (T::from_u64(!a.to_u64()), None);
}

pub(crate) fn unary_r<U: Unary, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (r, f) = U::apply(reg::<T>(cpu, op.a), core.cf(cpu));
    set_reg(cpu, op.a, r);
    if let Some(f) = f {
        core.set_flags(f);
    }
    Ok(())
}

pub(crate) fn unary_m<U: Unary, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    let c = core.cf(cpu);
    let mut f = None;
    core.update(cpu, at, |a: T| {
        let (r, flags) = U::apply(a, c);
        f = flags;
        r
    })?;
    if let Some(f) = f {
        core.set_flags(f);
    }
    Ok(())
}

pub(crate) fn lock_unary<U: Unary, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    let c = core.cf(cpu);
    let old = core.atomic(cpu, at, |a: T| U::apply(a, c).0)?;
    if let Some(f) = U::apply(old, c).1 {
        core.set_flags(f);
    }
    Ok(())
}

/// XADD with a register.
pub(crate) fn xadd_r<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (a, b) = (reg::<T>(cpu, op.a), reg::<T>(cpu, op.b));
    let (r, f) = flags::add(a, b, false);
    set_reg(cpu, op.b, a);
    set_reg(cpu, op.a, r);
    core.set_flags(f);
    Ok(())
}

pub(crate) fn xadd_m<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    let b = reg::<T>(cpu, op.b);
    let old = core.atomic(cpu, at, |a: T| flags::add(a, b, false).0)?;
    set_reg(cpu, op.b, old);
    core.set_flags(flags::add(old, b, false).1);
    Ok(())
}

/// CMPXCHG with a register.
pub(crate) fn cmpxchg_r<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let (a, acc) = (reg::<T>(cpu, op.a), reg::<T>(cpu, 0));
    if a == acc {
        let b = reg::<T>(cpu, op.b);
        set_reg(cpu, op.a, b);
    } else {
        set_reg(cpu, 0, a);
    }
    core.set_flags(flags::sub(acc, a, false).1);
    Ok(())
}

pub(crate) fn cmpxchg_m<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear::<T>(cpu, op, true)?;
    let (acc, b) = (reg::<T>(cpu, 0), reg::<T>(cpu, op.b));
    let old = core.atomic(cpu, at, |a: T| if a == acc { b } else { a })?;
    if old != acc {
        set_reg(cpu, 0, old);
    }
    core.set_flags(flags::sub(acc, old, false).1);
    Ok(())
}

pub(crate) fn cmpxchg8b(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear::<u64>(cpu, op, true)?;
    let pair = |hi: usize, lo: usize| cpu.gpr[hi] << 32 | cpu.gpr[lo] & 0xffff_ffff;
    let (want, new) = (pair(gpr::RDX, gpr::RAX), pair(gpr::RCX, gpr::RBX));
    let old = core.atomic(cpu, at, |a: u64| if a == want { new } else { a })?;
    core.sync_flags(cpu);
    if old == want {
        cpu.rflags |= rflags::ZF;
    } else {
        cpu.rflags &= !rflags::ZF;
        cpu.gpr[gpr::RAX] = old & 0xffff_ffff;
        cpu.gpr[gpr::RDX] = old >> 32;
    }
    Ok(())
}

pub(crate) fn cmpxchg16b(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let at = linear::<u64>(cpu, op, true)?;
    if at % 16 != 0 {
        return Err(Fault::GP0);
    }
    let pair = |hi: usize, lo: usize| u128::from(cpu.gpr[hi]) << 64 | u128::from(cpu.gpr[lo]);
    let (want, new) = (pair(gpr::RDX, gpr::RAX), pair(gpr::RCX, gpr::RBX));
    let result = core.compare_exchange_16(cpu, at, want, new)?;
    core.sync_flags(cpu);
    match result {
        Ok(()) => cpu.rflags |= rflags::ZF,
        Err(found) => {
            cpu.rflags &= !rflags::ZF;
            cpu.gpr[gpr::RAX] = found as u64;
            cpu.gpr[gpr::RDX] = (found >> 64) as u64;
        }
    }
    Ok(())
}

/// Writes the double-width result of MUL, IMUL or the operands of DIV: AX for bytes, else rDX:rAX.
fn set_double<T: Int>(cpu: &mut CpuState, low: T, high: T) {
    if T::BYTES == 1 {
        set_reg::<u16>(cpu, 0, (high.to_u64() << 8 | low.to_u64()) as u16);
    } else {
        set_reg(cpu, 0, low);
        set_reg(cpu, 2, high);
    }
}

fn double<T: Int>(cpu: &CpuState) -> u128 {
    if T::BYTES == 1 {
        u128::from(reg::<u16>(cpu, 0))
    } else {
        u128::from(reg::<T>(cpu, 2).to_u64()) << T::BITS | u128::from(reg::<T>(cpu, 0).to_u64())
    }
}

pub(crate) fn mul<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = load_rm::<T>(core, cpu, op, op.a)?;
    let wide = u128::from(reg::<T>(cpu, 0).to_u64()) * u128::from(b.to_u64());
    let (low, high) = (T::from_u64(wide as u64), T::from_u64((wide >> T::BITS) as u64));
    let over = high.to_u64() != 0;
    set_double(cpu, low, high);
    core.set_flags(Lazy::new(low, over, over));
    Ok(())
}

pub(crate) fn imul_1<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = load_rm::<T>(core, cpu, op, op.a)?;
    let wide = i128::from(reg::<T>(cpu, 0).sext() as i64) * i128::from(b.sext() as i64);
    let (low, high) = (T::from_u64(wide as u64), T::from_u64((wide >> T::BITS) as u64));
    let over = i128::from(low.sext() as i64) != wide;
    set_double(cpu, low, high);
    core.set_flags(Lazy::new(low, over, over));
    Ok(())
}

/// IMUL register, register/memory.
pub(crate) fn imul_2<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = load_rm::<T>(core, cpu, op, op.b)?;
    let (r, f) = flags::imul(reg::<T>(cpu, op.a), b);
    set_reg(cpu, op.a, r);
    core.set_flags(f);
    Ok(())
}

/// IMUL register, register/memory, immediate.
pub(crate) fn imul_3<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = load_rm::<T>(core, cpu, op, op.b)?;
    let (r, f) = flags::imul(b, T::from_u64(op.imm));
    set_reg(cpu, op.a, r);
    core.set_flags(f);
    Ok(())
}

pub(crate) fn div<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = load_rm::<T>(core, cpu, op, op.a)?.to_u64();
    let a = double::<T>(cpu);
    if b == 0 || a >> T::BITS >= u128::from(b) {
        return Err(Fault::DE);
    }
    // The quotient fits, as just checked; most dividends fit into 64 bits.
    let (q, r) = match u64::try_from(a) {
        Ok(a) => (a / b, a % b),
        Err(_) => ((a / u128::from(b)) as u64, (a % u128::from(b)) as u64),
    };
    set_double(cpu, T::from_u64(q), T::from_u64(r));
    Ok(())
}

pub(crate) fn idiv<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let b = i128::from(load_rm::<T>(core, cpu, op, op.a)?.sext() as i64);
    let shift = 128 - 2 * T::BITS;
    let a = (double::<T>(cpu) << shift) as i128 >> shift;
    let (Some(q), Some(r)) = (a.checked_div(b), a.checked_rem(b)) else { return Err(Fault::DE) };
    let low = T::from_u64(q as u64);
    if i128::from(low.sext() as i64) != q {
        return Err(Fault::DE);
    }
    set_double(cpu, low, T::from_u64(r as u64));
    Ok(())
}

// ---- decimal ----

fn al(cpu: &CpuState) -> u8 {
    reg::<u8>(cpu, 0)
}

pub(crate) fn daa(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    decimal(core, cpu, u8::wrapping_add);
    Ok(())
}

pub(crate) fn das(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    decimal(core, cpu, u8::wrapping_sub);
    Ok(())
}

fn decimal(core: &mut Core, cpu: &mut CpuState, step: fn(u8, u8) -> u8) {
    core.sync_flags(cpu);
    let old = al(cpu);
    let (old_cf, old_af) = (cpu.rflags & rflags::CF != 0, cpu.rflags & rflags::AF != 0);
    let mut v = old;
    let af = old & 15 > 9 || old_af;
    let mut cf = false;
    if af {
        let add = step(0, 1) == 1;
        cf = old_cf || if add { old > 0xf9 } else { old < 6 };
        v = step(v, 6);
    }
    if old > 0x99 || old_cf {
        v = step(v, 0x60);
        cf = true;
    }
    set_reg(cpu, 0, v);
    finish_decimal(core, cpu, v, cf, af);
}

/// Flags of an adjusted byte; OF is undefined and cleared.
fn finish_decimal(core: &mut Core, cpu: &mut CpuState, v: u8, cf: bool, af: bool) {
    core.set_flags(Lazy::new(v, cf, false));
    core.sync_flags(cpu);
    if af {
        cpu.rflags |= rflags::AF;
    }
}

pub(crate) fn aaa(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    ascii(core, cpu, 0x106);
    Ok(())
}

pub(crate) fn aas(core: &mut Core, cpu: &mut CpuState, _op: &Op) -> Result<(), Fault> {
    ascii(core, cpu, 0x106u16.wrapping_neg());
    Ok(())
}

fn ascii(core: &mut Core, cpu: &mut CpuState, step: u16) {
    core.sync_flags(cpu);
    let adjust = al(cpu) & 15 > 9 || cpu.rflags & rflags::AF != 0;
    let ax = reg::<u16>(cpu, 0).wrapping_add(if adjust { step } else { 0 });
    set_reg(cpu, 0, ax & 0xff0f);
    finish_decimal(core, cpu, ax as u8 & 15, adjust, adjust);
}

pub(crate) fn aam(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let base = op.imm as u8;
    if base == 0 {
        return Err(Fault::DE);
    }
    let v = al(cpu);
    set_reg(cpu, 0, u16::from(v / base) << 8 | u16::from(v % base));
    finish_decimal(core, cpu, v % base, false, false);
    Ok(())
}

pub(crate) fn aad(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let ax = reg::<u16>(cpu, 0);
    let v = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.imm as u8));
    set_reg(cpu, 0, u16::from(v));
    finish_decimal(core, cpu, v, false, false);
    Ok(())
}
