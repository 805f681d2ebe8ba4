//! Shifts and rotates.

use cpum::CpuState;

use crate::Fault;
use crate::core::Core;
use crate::flags::{self, Int, Lazy};
use crate::op::{Op, linear, load_rm, reg, set_reg};
use crate::tlb::Cell;

/// What a shift or rotate leaves of the flags.
pub(crate) enum Effect {
    Nothing,
    All(Lazy),
    /// Rotates change CF and OF only.
    CarryOverflow(bool, bool),
}

pub(crate) trait Shift {
    /// `n` is masked, not zero.
    fn apply<T: Int>(a: T, n: u32, cf: bool) -> (T, Effect);
}

macro_rules! shift {
    ($($name:ident |$a:ident, $n:ident, $c:ident| $e:expr;)*) => { $(
        pub(crate) struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn apply<T: Int>($a: T, $n: u32, $c: bool) -> (T, Effect) { $e }
        }
    )* };
}

#[inline(always)]
fn all<T>((r, f): (T, Lazy)) -> (T, Effect) {
    (r, Effect::All(f))
}

#[inline(always)]
fn two<T>((r, cf, of): (T, bool, bool)) -> (T, Effect) {
    (r, Effect::CarryOverflow(cf, of))
}

shift! {
    Shl |a, n, _c| all(flags::shl(a, n));
    Shr |a, n, _c| all(flags::shr(a, n));
    Sar |a, n, _c| all(flags::sar(a, n));
    Rol |a, n, _c| two(flags::rol(a, n));
    Ror |a, n, _c| two(flags::ror(a, n));
    Rcl |a, n, c| flags::rcl(a, n, c).map_or((a, Effect::Nothing), two);
    Rcr |a, n, c| flags::rcr(a, n, c).map_or((a, Effect::Nothing), two);
}

#[inline(always)]
fn finish(core: &mut Core, cpu: &mut CpuState, effect: Effect) {
    use cpum::state::rflags::{CF, OF};
    match effect {
        Effect::Nothing => {}
        Effect::All(f) => core.set_flags(f),
        Effect::CarryOverflow(cf, of) => {
            core.sync_flags(cpu);
            cpu.rflags = cpu.rflags & !(CF | OF) | if cf { CF } else { 0 } | if of { OF } else { 0 };
        }
    }
}

#[inline(always)]
fn shift_r<S: Shift, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, count: u64) {
    let n = flags::shift_count::<T>(count);
    let a = reg::<T>(cpu, op.a);
    if n == 0 {
        // The upper half is cleared even so.
        set_reg(cpu, op.a, a);
        return;
    }
    let (r, effect) = S::apply(a, n, core.cf(cpu));
    set_reg(cpu, op.a, r);
    finish(core, cpu, effect);
}

pub(crate) fn r_imm<S: Shift, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    shift_r::<S, T>(core, cpu, op, op.imm);
    Ok(())
}

pub(crate) fn r_cl<S: Shift, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let count = cpu.gpr[1];
    shift_r::<S, T>(core, cpu, op, count);
    Ok(())
}

fn shift_m<S: Shift, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op, count: u64) -> Result<(), Fault> {
    let n = flags::shift_count::<T>(count);
    let at = linear::<T>(cpu, op, true)?;
    let cf = core.cf(cpu);
    let mut effect = Effect::Nothing;
    core.update(cpu, at, |a: T| {
        if n == 0 {
            return a;
        }
        let (r, e) = S::apply(a, n, cf);
        effect = e;
        r
    })?;
    finish(core, cpu, effect);
    Ok(())
}

pub(crate) fn m_imm<S: Shift, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    shift_m::<S, T>(core, cpu, op, op.imm)
}

pub(crate) fn m_cl<S: Shift, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let count = cpu.gpr[1];
    shift_m::<S, T>(core, cpu, op, count)
}

/// SHLD and SHRD; the count is an immediate unless `CL`.
pub(crate) fn double<const LEFT: bool, const CL: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let n = flags::shift_count::<T>(if CL { cpu.gpr[1] } else { op.imm });
    let b = reg::<T>(cpu, op.b);
    let apply = |a: T| if LEFT { flags::shld(a, b, n) } else { flags::shrd(a, b, n) };
    if n == 0 {
        // Nothing changes, but memory must be writable and the upper half of a 32-bit register is cleared.
        if op.memory() {
            let at = linear::<T>(cpu, op, true)?;
            core.update(cpu, at, |a: T| a)?;
        } else {
            set_reg(cpu, op.a, reg::<T>(cpu, op.a));
        }
        return Ok(());
    }
    let mut f = Lazy::default();
    if op.memory() {
        let at = linear::<T>(cpu, op, true)?;
        core.update(cpu, at, |a: T| {
            let (r, flags) = apply(a);
            f = flags;
            r
        })?;
    } else {
        let (r, flags) = apply(reg::<T>(cpu, op.a));
        f = flags;
        set_reg(cpu, op.a, r);
    }
    core.set_flags(f);
    Ok(())
}

/// RORX.
pub(crate) fn rorx<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?;
    let n = flags::shift_count::<T>(op.imm);
    set_reg(cpu, op.a, if n == 0 { v } else { flags::ror(v, n).0 });
    Ok(())
}

/// SHLX (0), SHRX (1), SARX (2). The count register is in `scale`'s place of the operation's immediate.
pub(crate) fn shift_x<const HOW: u8, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?;
    let n = flags::shift_count::<T>(reg::<u64>(cpu, op.imm as u8));
    let r = match HOW {
        0 => v.to_u64() << n,
        1 => v.to_u64() >> n,
        _ => (v.sext() as i64 >> n) as u64,
    };
    set_reg(cpu, op.a, T::from_u64(r));
    Ok(())
}
