//! Bit tests and scans, counts, BMI1, BMI2, ADX and CRC32.

use cpum::CpuState;
use cpum::state::rflags;

use crate::Fault;
use crate::core::Core;
use crate::flags::{self, Int, Lazy};
use crate::op::{LOCK, Op, ea, linear_of, load_rm, reg, set_reg};
use crate::tlb::Cell;

fn set_bit_flag(core: &mut Core, cpu: &mut CpuState, flag: u64, on: bool) {
    core.sync_flags(cpu);
    cpu.rflags = cpu.rflags & !flag | if on { flag } else { 0 };
}

#[inline(always)]
fn change<const HOW: u8, T: Int>(value: T, bit: u64) -> T {
    let mask = 1u64 << bit;
    T::from_u64(match HOW {
        0 => value.to_u64(),
        1 => value.to_u64() | mask,
        2 => value.to_u64() & !mask,
        _ => value.to_u64() ^ mask,
    })
}

/// BT (0), BTS (1), BTR (2), BTC (3) on a register. The bit number is in a register, or in `imm` if `IMM`.
pub(crate) fn bt_r<const HOW: u8, const IMM: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let bit = (if IMM { op.imm } else { reg::<T>(cpu, op.b).to_u64() }) & u64::from(T::BITS - 1);
    let v = reg::<T>(cpu, op.a);
    set_bit_flag(core, cpu, rflags::CF, v.to_u64() >> bit & 1 != 0);
    if HOW != 0 {
        set_reg(cpu, op.a, change::<HOW, T>(v, bit));
    }
    Ok(())
}

/// The same in memory; a register bit number is signed and reaches beyond the operand.
pub(crate) fn bt_m<const HOW: u8, const IMM: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let mut offset = ea(cpu, op);
    let number = if IMM { op.imm & u64::from(T::BITS - 1) } else { reg::<T>(cpu, op.b).sext() };
    let bit = number & u64::from(T::BITS - 1);
    if !IMM {
        let elements = number as i64 >> T::BITS.trailing_zeros();
        offset = offset.wrapping_add((elements * T::BYTES as i64) as u64) & super::string::address_mask(op);
    }
    let at = linear_of(cpu, op, offset, T::BYTES as u64, HOW != 0)?;
    let mut old = T::from_u64(0);
    if HOW == 0 {
        old = core.read(cpu, at)?;
    } else if op.flags & LOCK != 0 {
        old = core.atomic(cpu, at, |v: T| change::<HOW, T>(v, bit))?;
    } else {
        core.update(cpu, at, |v: T| {
            old = v;
            change::<HOW, T>(v, bit)
        })?;
    }
    set_bit_flag(core, cpu, rflags::CF, old.to_u64() >> bit & 1 != 0);
    Ok(())
}

/// BSF, or BSR if `REVERSE`. A zero source leaves the destination unchanged.
pub(crate) fn bit_scan<const REVERSE: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    if v != 0 {
        let n = if REVERSE { 63 - v.leading_zeros() } else { v.trailing_zeros() };
        set_reg(cpu, op.a, T::from_u64(n.into()));
    }
    set_bit_flag(core, cpu, rflags::ZF, v == 0);
    Ok(())
}

/// TZCNT, or LZCNT if `LEADING`.
pub(crate) fn count_zeros<const LEADING: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    let n = if v == 0 {
        T::BITS
    } else if LEADING {
        v.leading_zeros() - (64 - T::BITS)
    } else {
        v.trailing_zeros()
    };
    set_reg(cpu, op.a, T::from_u64(n.into()));
    set_bit_flag(core, cpu, rflags::CF, v == 0);
    set_bit_flag(core, cpu, rflags::ZF, n == 0);
    Ok(())
}

pub(crate) fn popcnt<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    set_reg(cpu, op.a, T::from_u64(v.count_ones().into()));
    core.sync_flags(cpu);
    cpu.rflags = cpu.rflags & !rflags::ARITH | if v == 0 { rflags::ZF } else { 0 };
    Ok(())
}

fn logic_with_cf<T: Int>(core: &mut Core, result: T, cf: bool) {
    core.set_flags(Lazy::new(result, cf, false));
}

/// ANDN: `b` is the inverted operand, the other is register/memory in `imm`'s place.
pub(crate) fn andn<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.imm as u8)?.to_u64();
    let r = T::from_u64(!reg::<T>(cpu, op.b).to_u64() & v);
    set_reg(cpu, op.a, r);
    logic_with_cf(core, r, false);
    Ok(())
}

/// BLSR (0), BLSMSK (1), BLSI (2).
pub(crate) fn bls<const HOW: u8, T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    let (r, cf) = match HOW {
        0 => (v & v.wrapping_sub(1), v == 0),
        1 => (v ^ v.wrapping_sub(1), v == 0),
        _ => (v & v.wrapping_neg(), v != 0),
    };
    let r = T::from_u64(r);
    set_reg(cpu, op.a, r);
    logic_with_cf(core, r, cf);
    Ok(())
}

/// BEXTR: start and length come from the register in `imm`.
pub(crate) fn bextr<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    let control = reg::<u64>(cpu, op.imm as u8);
    let (start, len) = (control as u8, (control >> 8) as u8);
    let shifted = if u32::from(start) >= T::BITS { 0 } else { v >> start };
    let r = T::from_u64(if len >= 64 { shifted } else { shifted & ((1 << len) - 1) });
    set_reg(cpu, op.a, r);
    logic_with_cf(core, r, false);
    Ok(())
}

pub(crate) fn bzhi<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    let n = u32::from(reg::<u64>(cpu, op.imm as u8) as u8);
    let r = T::from_u64(if n >= T::BITS { v } else { v & ((1 << n) - 1) });
    set_reg(cpu, op.a, r);
    logic_with_cf(core, r, n >= T::BITS);
    Ok(())
}

/// MULX: `a` gets the high half, `b` the low half, the factor is register/memory in `imm`'s place.
pub(crate) fn mulx<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.imm as u8)?.to_u64();
    let wide = u128::from(reg::<T>(cpu, 2).to_u64()) * u128::from(v);
    set_reg(cpu, op.b, T::from_u64(wide as u64));
    set_reg(cpu, op.a, T::from_u64((wide >> T::BITS) as u64));
    Ok(())
}

/// PDEP, or PEXT if `EXTRACT`: `b` is the source, the mask is register/memory in `imm`'s place.
pub(crate) fn deposit<const EXTRACT: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let mut mask = load_rm::<T>(core, cpu, op, op.imm as u8)?.to_u64();
    let source = reg::<T>(cpu, op.b).to_u64();
    let (mut r, mut n) = (0u64, 0);
    while mask != 0 {
        let bit = mask & mask.wrapping_neg();
        if EXTRACT {
            r |= u64::from(source & bit != 0) << n;
        } else if source >> n & 1 != 0 {
            r |= bit;
        }
        mask ^= bit;
        n += 1;
    }
    set_reg(cpu, op.a, T::from_u64(r));
    Ok(())
}

/// ADCX, or ADOX if `OVERFLOW`.
pub(crate) fn adx<const OVERFLOW: bool, T: Cell>(
    core: &mut Core,
    cpu: &mut CpuState,
    op: &Op,
) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?;
    core.sync_flags(cpu);
    let flag = if OVERFLOW { rflags::OF } else { rflags::CF };
    let (r, f) = flags::add(reg::<T>(cpu, op.a), v, cpu.rflags & flag != 0);
    set_reg(cpu, op.a, r);
    set_bit_flag(core, cpu, flag, f.cf());
    Ok(())
}

/// CRC32 (polynomial 0x11edc6f41, bits reflected) of an operand of size `T` into a 32-bit value.
pub(crate) fn crc32<T: Cell>(core: &mut Core, cpu: &mut CpuState, op: &Op) -> Result<(), Fault> {
    let v = load_rm::<T>(core, cpu, op, op.b)?.to_u64();
    let mut crc = reg::<u32>(cpu, op.a);
    for byte in v.to_le_bytes().into_iter().take(T::BYTES) {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    set_reg(cpu, op.a, crc);
    Ok(())
}
