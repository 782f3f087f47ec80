//! Random numbers that a seed repeats (SplitMix64).

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A well mixed function of one number.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The number at a place of the sequence that a seed starts.
pub fn at(seed: u64, index: u64) -> u64 {
    mix(seed.wrapping_add(index.wrapping_add(1).wrapping_mul(STEP)))
}

/// A generator.
#[derive(Debug, Clone, Copy)]
pub struct Prng {
    state: u64,
}

impl Prng {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Prng {
        Prng { state: seed }
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// A number below `limit`; 0 when that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        let wide = u128::from(self.draw()) * u128::from(limit);
        (wide >> 64) as u64
    }

    /// A number of `low..=high`.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True once in `chances`.
    pub fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, values: &'a [T]) -> &'a T {
        &values[self.below(values.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_that_of_the_published_algorithm() {
        let mut prng = Prng::new(1_234_567);
        assert_eq!(prng.draw(), 6_457_827_717_110_365_317);
        assert_eq!(prng.draw(), 3_203_168_211_198_807_973);
        assert_eq!(at(1_234_567, 1), 3_203_168_211_198_807_973);
    }

    #[test]
    fn limits_hold() {
        let mut prng = Prng::new(7);
        assert_eq!(prng.below(0), 0);
        for _ in 0..10_000 {
            assert!((3..=5).contains(&prng.within(3, 5)));
        }
    }
}
