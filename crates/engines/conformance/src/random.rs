//! A small, seedable generator of random numbers (SplitMix64).

#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n.max(1) as u64) as usize
    }

    pub fn percent(&mut self, p: usize) -> bool {
        self.below(100) < p
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// An integer likely to meet corner cases.
    pub fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.word() & 0xff,
            1 => (self.word() & 0xff).wrapping_neg(),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.pick(&[
                0,
                1,
                u64::MAX,
                1 << 63,
                0x7fff_ffff_ffff_ffff,
                0x8000_0000,
                0x7fff_ffff,
                0xffff_ffff,
                0x8000,
                0x80,
            ]),
            5 => self.word() & 0xffff_ffff,
            _ => self.word(),
        }
    }

    /// Eight bytes that mean something as f64, as two f32, or as integers.
    pub fn lane(&mut self) -> u64 {
        match self.below(10) {
            0..3 => self.double(),
            3..6 => u64::from(self.single()) | u64::from(self.single()) << 32,
            6 => self.integer(),
            7 => 0,
            _ => self.word(),
        }
    }

    fn double(&mut self) -> u64 {
        match self.below(12) {
            0 => f64::INFINITY.to_bits() | self.sign(),
            1 => self.sign(),
            2 => self.word() & 0x000f_ffff_ffff_ffff | self.sign(), // denormal
            3 => 0x7ff8_0000_0000_0000 | self.word() & 0x7_ffff_ffff_ffff, // quiet NaN
            4 => 0x7ff0_0000_0000_0001 | self.word() & 0x3_ffff_ffff_ffff, // signalling NaN
            5 => (self.below(2000) as f64 - 1000.0).to_bits(),
            6 => (f64::MAX.to_bits() - self.word() % 100) | self.sign(),
            7 => (f64::MIN_POSITIVE.to_bits() + self.word() % 100) | self.sign(),
            8 => ((self.word() as i64) as f64).to_bits(),
            _ => (self.word() & 0x800f_ffff_ffff_ffff) | (1023 - 40 + self.below(80) as u64) << 52,
        }
    }

    fn single(&mut self) -> u32 {
        let sign = (self.word() as u32) & 0x8000_0000;
        match self.below(12) {
            0 => f32::INFINITY.to_bits() | sign,
            1 => sign,
            2 => self.word() as u32 & 0x007f_ffff | sign,
            3 => 0x7fc0_0000 | self.word() as u32 & 0x3f_ffff,
            4 => 0x7f80_0001 | self.word() as u32 & 0x1f_ffff,
            5 => (self.below(2000) as f32 - 1000.0).to_bits(),
            6 => (f32::MAX.to_bits() - self.word() as u32 % 100) | sign,
            7 => (f32::MIN_POSITIVE.to_bits() + self.word() as u32 % 100) | sign,
            8 => ((self.word() as i32) as f32).to_bits(),
            _ => (self.word() as u32 & 0x807f_ffff) | (127 - 30 + self.below(60) as u32) << 23,
        }
    }

    fn sign(&mut self) -> u64 {
        self.word() & 1 << 63
    }
}
