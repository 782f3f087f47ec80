//! Numbers that hit where checks go wrong.

use crate::prng::Prng;

/// A number below `limit`; 0 when that is 0.
pub(crate) fn below(prng: &mut Prng, limit: usize) -> usize {
    usize::try_from(prng.below(limit as u64)).unwrap_or(0)
}

/// A 16-bit number: often one of those at which checks go wrong.
pub(crate) fn edge16(prng: &mut Prng) -> u16 {
    let random = u16::try_from(prng.draw() & 0xffff).unwrap_or(0);
    *prng.pick(&[
        0, 1, 255, 256, 0x7fff, 0x8000, 0xfffe, 0xffff, random, random,
    ])
}

/// The same of 32 bits; small ones are likelier.
pub(crate) fn edge32(prng: &mut Prng) -> u32 {
    let random = u32::try_from(prng.draw() & 0xffff_ffff).unwrap_or(0);
    let small = random % 1024;
    let edges = [
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
    ];
    *prng.pick(&edges)
}
