//! What mode `blocks` writes: sectors that say themselves which round wrote them, and where. Both the
//! places and the contents of a round are functions of seed and round, so that a host program knows from
//! the last round that was flushed what each sector of a disk has to hold.

use crate::pattern::{SECTOR, checksum};
use crate::prng::{self, Prng};

/// Most sectors of one extent.
pub const EXTENT_SECTORS_MAX: u64 = 32;
/// Most extents of one round.
pub const EXTENTS_MAX: u64 = 24;

const MAGIC: u64 = u64::from_le_bytes(*b"BHBLOCK1");
const WORDS: usize = SECTOR / 8;
/// Behind magic, seed, sector and round.
const HEADER_WORDS: usize = 4;

/// Sectors that are written by one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first one.
    pub sector: u64,
    /// How many.
    pub count: u64,
}

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes.
    Blank,
    /// What this round has written there.
    Round(u64),
    /// Something that no round of this seed has ever written there.
    Foreign,
}

/// Where a round writes, on a disk of so many sectors; extents may overlap.
pub fn extents(seed: u64, round: u64, sectors: u64) -> impl Iterator<Item = Extent> {
    let mut prng = Prng::new(prng::at(seed, round));
    let mut left = prng.within(1, EXTENTS_MAX);
    core::iter::from_fn(move || {
        left = left.checked_sub(1)?;
        let sector = prng.below(sectors);
        let count = prng.within(1, EXTENT_SECTORS_MAX.min(sectors - sector));
        Some(Extent { sector, count })
    })
}

fn word(seed: u64, round: u64, sector: u64, index: usize) -> u64 {
    match index {
        0 => MAGIC,
        1 => seed,
        2 => sector,
        3 => round,
        _ => prng::at(prng::at(seed ^ round << 32, sector), index as u64),
    }
}

/// Fills whole sectors, the first of which is number `sector`.
pub fn fill(seed: u64, round: u64, sector: u64, data: &mut [u8]) {
    for (bytes, sector) in data.chunks_exact_mut(SECTOR).zip(sector..) {
        let (body, sum) = bytes.split_at_mut(SECTOR - 8);
        for (index, bytes) in body.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&word(seed, round, sector, index).to_le_bytes());
        }
        sum.copy_from_slice(&checksum(seed, body).to_le_bytes());
    }
}

/// What a sector holds.
pub fn content(seed: u64, sector: u64, data: &[u8]) -> Content {
    if data.iter().all(|byte| *byte == 0) {
        return Content::Blank;
    }
    let at = |index: usize| {
        let bytes = data.get(8 * index..8 * index + 8);
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let round = at(HEADER_WORDS - 1);
    let is_right = data.len() == SECTOR
        && (0..WORDS - 1).all(|index| at(index) == word(seed, round, sector, index))
        && at(WORDS - 1) == checksum(seed, &data[..SECTOR - 8]);
    if is_right {
        Content::Round(round)
    } else {
        Content::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sector_tells_its_round() {
        let mut data = [0; 3 * SECTOR];
        assert_eq!(content(7, 5, &data[..SECTOR]), Content::Blank);
        fill(7, 9, 5, &mut data);
        for (sector, data) in (5..).zip(data.chunks_exact(SECTOR)) {
            assert_eq!(content(7, sector, data), Content::Round(9));
        }
    }

    #[test]
    fn sector_of_another_place_seed_or_with_any_bit_wrong_is_foreign() {
        let mut data = [0; SECTOR];
        fill(7, 9, 5, &mut data);
        assert_eq!(content(7, 6, &data), Content::Foreign);
        assert_eq!(content(8, 5, &data), Content::Foreign);
        for at in 0..SECTOR {
            data[at] ^= 0x10;
            assert_eq!(content(7, 5, &data), Content::Foreign, "{at}");
            data[at] ^= 0x10;
        }
        assert_eq!(content(7, 5, &data[..SECTOR - 8]), Content::Foreign);
    }

    #[test]
    fn sector_that_is_half_of_one_round_and_half_of_another_is_foreign() {
        let (mut old, mut new) = ([0; SECTOR], [0; SECTOR]);
        fill(7, 1, 5, &mut old);
        fill(7, 2, 5, &mut new);
        old[..100].copy_from_slice(&new[..100]);
        assert_eq!(content(7, 5, &old), Content::Foreign);
    }

    #[test]
    fn extents_are_on_the_disk_and_repeat() {
        for round in 0..200 {
            assert!(extents(3, round, 40).all(|e| e.count > 0 && e.sector + e.count <= 40));
            assert!(extents(3, round, 40).eq(extents(3, round, 40)));
        }
        assert!(!extents(3, 1, 4096).eq(extents(3, 2, 4096)));
    }
}
