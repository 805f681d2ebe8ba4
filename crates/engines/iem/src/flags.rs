//! The arithmetic of integer instructions as pure functions, and flags kept as result and carries until somebody asks.
//!
//! [`Lazy`] holds what the last arithmetic instruction left: the result, sign-extended to 64 bits, for ZF, SF and PF, and a word
//! of carries for the rest: bit 63 is CF, bit 62 is CF xor OF (the carry into the sign bit), bit 3 is AF.

use cpum::state::rflags;

/// An unsigned integer of an operand size.
pub trait Int: Copy + Eq + Ord + Send + Sync + 'static {
    const BITS: u32;
    const BYTES: usize;
    fn from_u64(value: u64) -> Self;
    fn to_u64(self) -> u64;
    /// Sign-extended to 64 bits.
    fn sext(self) -> u64;
}

macro_rules! int {
    ($($t:ty, $s:ty;)*) => { $(
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn from_u64(value: u64) -> Self { value as $t }
            #[inline(always)]
            fn to_u64(self) -> u64 { self as u64 }
            #[inline(always)]
            fn sext(self) -> u64 { self as $s as i64 as u64 }
        }
    )* };
}
int!(u8, i8; u16, i16; u32, i32; u64, i64;);

const CARRY: u64 = 1 << 63;
const CARRY_XOR_OVERFLOW: u64 = 1 << 62;
const ADJUST: u64 = 1 << 3;

/// Arithmetic flags in the form described above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lazy {
    pub result: u64,
    pub carries: u64,
}

impl Lazy {
    /// Flags of `result` with the carries of each bit position in `carries`, both of size `T`.
    #[inline(always)]
    fn of_carries<T: Int>(result: T, carries: u64) -> Self {
        Self { result: result.sext(), carries: carries << (64 - T::BITS) | carries & ADJUST }
    }

    /// Flags of `result` with CF and OF given and AF clear.
    #[inline(always)]
    pub fn new<T: Int>(result: T, cf: bool, of: bool) -> Self {
        Self { result: result.sext(), carries: u64::from(cf) << 63 | u64::from(cf ^ of) << 62 }
    }

    #[inline(always)]
    pub fn cf(self) -> bool {
        self.carries & CARRY != 0
    }

    #[inline(always)]
    pub fn of(self) -> bool {
        (self.carries ^ self.carries << 1) & CARRY != 0
    }

    #[inline(always)]
    pub fn af(self) -> bool {
        self.carries & ADJUST != 0
    }

    #[inline(always)]
    pub fn zf(self) -> bool {
        self.result == 0
    }

    #[inline(always)]
    pub fn sf(self) -> bool {
        self.result >> 63 != 0
    }

    #[inline(always)]
    pub fn pf(self) -> bool {
        (self.result as u8).count_ones() & 1 == 0
    }

    /// The same with another CF.
    #[inline(always)]
    pub fn with_cf(self, cf: bool) -> Self {
        let flip = (u64::from(cf) << 63 ^ self.carries) & CARRY;
        Self { carries: self.carries ^ flip ^ flip >> 1, ..self }
    }

    /// The six flags at their places in RFLAGS.
    #[inline]
    pub fn to_rflags(self) -> u64 {
        (u64::from(self.cf()) * rflags::CF)
            | (u64::from(self.pf()) * rflags::PF)
            | (u64::from(self.af()) * rflags::AF)
            | (u64::from(self.zf()) * rflags::ZF)
            | (u64::from(self.sf()) * rflags::SF)
            | (u64::from(self.of()) * rflags::OF)
    }
}

const _: () = assert!(CARRY_XOR_OVERFLOW == CARRY >> 1);

/// `a + b + carry`.
#[inline(always)]
pub fn add<T: Int>(a: T, b: T, carry: bool) -> (T, Lazy) {
    let (a, b) = (a.to_u64(), b.to_u64());
    let r = a.wrapping_add(b).wrapping_add(carry.into());
    let result = T::from_u64(r);
    (result, Lazy::of_carries(result, a & b | (a | b) & !r))
}

/// `a - b - borrow`.
#[inline(always)]
pub fn sub<T: Int>(a: T, b: T, borrow: bool) -> (T, Lazy) {
    let (a, b) = (a.to_u64(), b.to_u64());
    let r = a.wrapping_sub(b).wrapping_sub(borrow.into());
    let result = T::from_u64(r);
    (result, Lazy::of_carries(result, !a & b | (!a | b) & r))
}

/// Flags of AND, OR, XOR, TEST.
#[inline(always)]
pub fn logic<T: Int>(result: T) -> Lazy {
    Lazy { result: result.sext(), carries: 0 }
}

/// `a + 1` with CF kept.
#[inline(always)]
pub fn inc<T: Int>(a: T, cf: bool) -> (T, Lazy) {
    let (r, flags) = add(a, T::from_u64(1), false);
    (r, flags.with_cf(cf))
}

/// `a - 1` with CF kept.
#[inline(always)]
pub fn dec<T: Int>(a: T, cf: bool) -> (T, Lazy) {
    let (r, flags) = sub(a, T::from_u64(1), false);
    (r, flags.with_cf(cf))
}

/// The number of bits that a shift of size `T` by `count` moves.
#[inline(always)]
pub fn shift_count<T: Int>(count: u64) -> u32 {
    (count & if T::BITS == 64 { 63 } else { 31 }) as u32
}

/// SHL by `n`, 1 to 63.
#[inline(always)]
pub fn shl<T: Int>(a: T, n: u32) -> (T, Lazy) {
    let wide = u128::from(a.to_u64()) << n;
    let r = T::from_u64(wide as u64);
    let cf = wide >> T::BITS & 1 != 0;
    (r, Lazy::new(r, cf, (r.sext() >> 63 != 0) ^ cf))
}

/// SHR by `n`, 1 to 63.
#[inline(always)]
pub fn shr<T: Int>(a: T, n: u32) -> (T, Lazy) {
    let r = T::from_u64(a.to_u64() >> n);
    let cf = a.to_u64() >> (n - 1) & 1 != 0;
    // OF of a one-bit shift is the sign bit shifted out; for others it is undefined and the same formula serves.
    (r, Lazy::new(r, cf, a.sext() >> 63 != 0 && n == 1))
}

/// SAR by `n`, 1 to 63.
#[inline(always)]
pub fn sar<T: Int>(a: T, n: u32) -> (T, Lazy) {
    let signed = a.sext() as i64;
    let r = T::from_u64((signed >> n) as u64);
    (r, Lazy::new(r, signed >> (n - 1) & 1 != 0, false))
}

/// ROL by the masked count `n` (not zero); gives result, CF and OF.
#[inline(always)]
pub fn rol<T: Int>(a: T, n: u32) -> (T, bool, bool) {
    let k = n % T::BITS;
    let v = a.to_u64();
    let r = if k == 0 { a } else { T::from_u64(v << k | v >> (T::BITS - k)) };
    let cf = r.to_u64() & 1 != 0;
    (r, cf, (r.sext() >> 63 != 0) ^ cf)
}

/// ROR by the masked count `n` (not zero); gives result, CF and OF.
#[inline(always)]
pub fn ror<T: Int>(a: T, n: u32) -> (T, bool, bool) {
    let k = n % T::BITS;
    let v = a.to_u64();
    let r = if k == 0 { a } else { T::from_u64(v >> k | v << (T::BITS - k)) };
    let top = r.to_u64() >> (T::BITS - 1) & 1 != 0;
    let next = r.to_u64() >> (T::BITS - 2) & 1 != 0;
    (r, top, top ^ next)
}

/// RCL by the masked count `n`; gives result, CF and OF, or `None` if nothing rotates.
#[inline(always)]
pub fn rcl<T: Int>(a: T, n: u32, cf: bool) -> Option<(T, bool, bool)> {
    let k = n % (T::BITS + 1);
    if k == 0 {
        return None;
    }
    let v = u128::from(a.to_u64()) | u128::from(cf) << T::BITS;
    let r = v << k | v >> (T::BITS + 1 - k);
    let cf = r >> T::BITS & 1 != 0;
    let r = T::from_u64(r as u64);
    Some((r, cf, (r.sext() >> 63 != 0) ^ cf))
}

/// RCR by the masked count `n`; gives result, CF and OF, or `None` if nothing rotates.
#[inline(always)]
pub fn rcr<T: Int>(a: T, n: u32, cf: bool) -> Option<(T, bool, bool)> {
    let k = n % (T::BITS + 1);
    if k == 0 {
        return None;
    }
    let v = u128::from(a.to_u64()) | u128::from(cf) << T::BITS;
    let r = v >> k | v << (T::BITS + 1 - k);
    let cf = r >> T::BITS & 1 != 0;
    let r = T::from_u64(r as u64);
    let top = r.to_u64() >> (T::BITS - 1) & 1 != 0;
    let next = r.to_u64() >> (T::BITS - 2) & 1 != 0;
    Some((r, cf, top ^ next))
}

/// SHLD by `n` (masked, not zero): `a` shifted left, filled from the top of `b`.
#[inline(always)]
pub fn shld<T: Int>(a: T, b: T, n: u32) -> (T, Lazy) {
    // A 16-bit operand shifted by more than its size is undefined; the concatenation a:b:a matches common hardware.
    let wide = match T::BITS {
        16 => (u128::from(a.to_u64()) << 32 | u128::from(b.to_u64()) << 16 | u128::from(a.to_u64())) << 32,
        32 => (u128::from(a.to_u64()) << 32 | u128::from(b.to_u64())) << 32,
        _ => u128::from(a.to_u64()) << 64 | u128::from(b.to_u64()),
    };
    let top = if T::BITS == 16 {
        80
    } else if T::BITS == 32 {
        96
    } else {
        128
    };
    let cf = wide >> (top - n) & 1 != 0;
    let r = T::from_u64(((wide << n) >> (top - T::BITS)) as u64);
    (r, Lazy::new(r, cf, (r.sext() ^ a.sext()) >> 63 != 0))
}

/// SHRD by `n` (masked, not zero): `a` shifted right, filled from the bottom of `b`.
#[inline(always)]
pub fn shrd<T: Int>(a: T, b: T, n: u32) -> (T, Lazy) {
    let wide = match T::BITS {
        16 => u128::from(a.to_u64()) << 32 | u128::from(b.to_u64()) << 16 | u128::from(a.to_u64()),
        32 => u128::from(b.to_u64()) << 32 | u128::from(a.to_u64()),
        _ => u128::from(b.to_u64()) << 64 | u128::from(a.to_u64()),
    };
    let cf = wide >> (n - 1) & 1 != 0;
    let r = T::from_u64((wide >> n) as u64);
    (r, Lazy::new(r, cf, (r.sext() ^ a.sext()) >> 63 != 0))
}

/// Signed multiplication truncated to `T`, with CF = OF = overflow.
#[inline(always)]
pub fn imul<T: Int>(a: T, b: T) -> (T, Lazy) {
    let wide = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
    let r = T::from_u64(wide as u64);
    let lost = i128::from(r.sext() as i64) != wide;
    (r, Lazy::new(r, lost, lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARITH: u64 = rflags::ARITH;

    #[test]
    fn addition_sets_carry_overflow_and_adjust() {
        let (r, f) = add(0xffu8, 1, false);
        assert_eq!((r, f.to_rflags() & ARITH), (0, rflags::CF | rflags::PF | rflags::AF | rflags::ZF));
        let (r, f) = add(0x7fff_ffffu32, 0, true);
        assert_eq!((r, f.of(), f.cf(), f.sf()), (0x8000_0000, true, false, true));
        let (r, f) = add(u64::MAX, u64::MAX, true);
        assert_eq!((r, f.cf(), f.of()), (u64::MAX, true, false));
    }

    #[test]
    fn subtraction_borrows_at_every_size() {
        let (r, f) = sub(0u16, 1, false);
        assert_eq!((r, f.cf(), f.of(), f.af()), (0xffff, true, false, true));
        let (r, f) = sub(0x80u8, 1, false);
        assert_eq!((r, f.of(), f.cf()), (0x7f, true, false));
        let (r, f) = sub(1u64 << 63, 0, true);
        assert_eq!((r, f.of()), (i64::MAX as u64, true));
    }

    #[test]
    fn increments_keep_carry() {
        let (r, f) = inc(0x7fu8, true);
        assert_eq!((r, f.cf(), f.of()), (0x80, true, true));
        let (r, f) = dec(0u32, false);
        assert_eq!((r, f.cf(), f.of(), f.sf()), (u32::MAX, false, false, true));
    }

    #[test]
    fn rotates_through_carry_have_one_more_bit() {
        assert_eq!(rcl(0x80u8, 9, false), None);
        assert_eq!(rcl(0x80u8, 1, true), Some((1, true, true)));
        assert_eq!(rcr(1u64, 1, true), Some((1 << 63, true, true)));
    }

    #[test]
    fn double_shifts_take_bits_from_the_second_operand() {
        assert_eq!(shld(0x1234_5678u32, 0xabcd_0000, 8).0, 0x3456_78ab);
        assert_eq!(shrd(0x1234u16, 0xabcd, 4).0, 0xd123);
        assert_eq!(shld(1u64, 1 << 63, 1), (3, Lazy::new(3u64, false, false)));
    }
}
