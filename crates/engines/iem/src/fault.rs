//! What an instruction raises instead of completing.

/// An exception's vector (Intel SDM volume 3, table 6-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Vector {
    De = 0,
    Db = 1,
    Nmi = 2,
    Bp = 3,
    Of = 4,
    Br = 5,
    Ud = 6,
    Nm = 7,
    Df = 8,
    Ts = 10,
    Np = 11,
    Ss = 12,
    Gp = 13,
    Pf = 14,
    Mf = 16,
    Ac = 17,
    Mc = 18,
    Xm = 19,
}

impl Vector {
    /// The exception with this vector, if there is one.
    pub fn of(number: u8) -> Option<Self> {
        use Vector::*;
        let all = [De, Db, Nmi, Bp, Of, Br, Ud, Nm, Df, Ts, Np, Ss, Gp, Pf, Mf, Ac, Mc, Xm];
        all.into_iter().find(|vector| *vector as u8 == number)
    }

    /// Whether the exception pushes an error code.
    pub const fn has_error_code(self) -> bool {
        matches!(self, Self::Df | Self::Ts | Self::Np | Self::Ss | Self::Gp | Self::Pf | Self::Ac)
    }
}

/// A fault: the instruction had no effect, and RIP stays at it. Small, so that results stay in registers. The linear address of a
/// page fault is kept by whoever raised it (`Core::fault_address`) until CR2 takes it at delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub vector: Vector,
    /// The error code; zero where the vector has none.
    pub code: u16,
}

impl Fault {
    /// #DE: divide error.
    pub const DE: Self = Self::new(Vector::De, 0);
    /// #DB raised before the instruction (instruction breakpoint, general detect); DR6 is set by then.
    pub const DB: Self = Self::new(Vector::Db, 0);
    /// #BR: BOUND range exceeded.
    pub const BR: Self = Self::new(Vector::Br, 0);
    /// #UD: invalid opcode.
    pub const UD: Self = Self::new(Vector::Ud, 0);
    /// #NM: device not available.
    pub const NM: Self = Self::new(Vector::Nm, 0);
    /// #MF: x87 floating-point error.
    pub const MF: Self = Self::new(Vector::Mf, 0);
    /// #XM: SIMD floating-point error.
    pub const XM: Self = Self::new(Vector::Xm, 0);
    /// #AC: alignment check.
    pub const AC: Self = Self::new(Vector::Ac, 0);
    /// #GP(0).
    pub const GP0: Self = Self::new(Vector::Gp, 0);
    /// #SS(0).
    pub const SS0: Self = Self::new(Vector::Ss, 0);

    pub const fn new(vector: Vector, code: u16) -> Self {
        Self { vector, code }
    }

    /// #GP with a selector (or IDT) error code.
    pub const fn gp(code: u16) -> Self {
        Self::new(Vector::Gp, code)
    }

    /// #SS with a selector error code.
    pub const fn ss(code: u16) -> Self {
        Self::new(Vector::Ss, code)
    }

    /// #NP with a selector error code.
    pub const fn np(code: u16) -> Self {
        Self::new(Vector::Np, code)
    }

    /// #TS with a selector error code.
    pub const fn ts(code: u16) -> Self {
        Self::new(Vector::Ts, code)
    }

    /// #PF with the error code of `paging`.
    pub const fn pf(code: u16) -> Self {
        Self::new(Vector::Pf, code)
    }
}
