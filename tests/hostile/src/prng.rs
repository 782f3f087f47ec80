//! splitmix64: the same seed attacks the same way.

#[derive(Debug)]
pub(crate) struct Prng(u64);

impl Prng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).unwrap_or(u64::MAX);
        usize::try_from(self.next() % limit).unwrap_or(0)
    }

    /// A 16-bit number: often one of those at which checks go wrong.
    pub(crate) fn edge16(&mut self) -> u16 {
        let random = u16::try_from(self.next() & 0xffff).unwrap_or(0);
        *[
            0, 1, 255, 256, 0x7fff, 0x8000, 0xfffe, 0xffff, random, random,
        ]
        .get(self.below(10))
        .unwrap_or(&random)
    }

    /// The same of 32 bits.
    pub(crate) fn edge32(&mut self) -> u32 {
        let random = u32::try_from(self.next() & 0xffff_ffff).unwrap_or(0);
        let small = random % 1024;
        *[
            0,
            1,
            4,
            0x7fff_ffff,
            0x8000_0000,
            u32::MAX,
            small,
            small,
            random,
            random,
        ]
        .get(self.below(10))
        .unwrap_or(&random)
    }
}
