//! The data that the guest writes to disks and memory: a function of a seed and a place, so that
//! any sector can be checked alone, by the guest or by a host program that reads the image.

use crate::prng::at;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const WORDS: u64 = (SECTOR / 8) as u64;

/// The 64-bit little-endian word `word` of sector `sector`.
pub fn word(seed: u64, sector: u64, word: u64) -> u64 {
    at(seed, sector.wrapping_mul(WORDS).wrapping_add(word))
}

/// Fills whole sectors, the first of which is number `sector`.
pub fn fill(seed: u64, sector: u64, data: &mut [u8]) {
    for (index, bytes) in data.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&word(seed, sector, index as u64).to_le_bytes());
    }
}

/// The offset of the first byte that is not what `fill` puts there.
pub fn first_wrong_byte(seed: u64, sector: u64, data: &[u8]) -> Option<usize> {
    let right = |index| word(seed, sector, index as u64).to_le_bytes();
    let mut words = data.chunks_exact(8).enumerate();
    let (index, bytes) = words.find(|(index, bytes)| *bytes != right(*index))?;
    let byte = bytes.iter().zip(right(index)).position(|(a, b)| *a != b)?;
    Some(8 * index + byte)
}

/// The number of the first sector that does not hold what `fill` puts there.
pub fn first_difference(seed: u64, sector: u64, data: &[u8]) -> Option<u64> {
    let byte = first_wrong_byte(seed, sector, data)?;
    Some(sector + (byte / SECTOR) as u64)
}

/// The byte at `place` of a stream of bytes.
pub fn stream_byte(seed: u64, place: u64) -> u8 {
    let word = seed
        .wrapping_add(place >> 3)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let at = usize::try_from(place % 8).unwrap_or(0);
    word.to_le_bytes()[at]
}

/// A sum over 64-bit words that depends on their order. Goes on from `start` (0 at first).
pub fn checksum(start: u64, data: &[u8]) -> u64 {
    data.chunks(8).fold(start, |sum, bytes| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        sum.rotate_left(5)
            .wrapping_add(u64::from_le_bytes(word))
            .wrapping_mul(0x100_0000_01b3)
    })
}

/// The sum over whole sectors of each one's checksum: the order of the sectors does not matter.
pub fn sectors_checksum(data: &[u8]) -> u64 {
    data.chunks(SECTOR)
        .fold(0, |sum, sector| sum.wrapping_add(checksum(0, sector)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_does_not_depend_on_where_a_request_began() {
        let mut long = vec![0; 4 * SECTOR];
        fill(9, 100, &mut long);
        let mut short = vec![0; SECTOR];
        fill(9, 102, &mut short);
        assert_eq!(long[2 * SECTOR..3 * SECTOR], short);
    }

    #[test]
    fn a_changed_byte_is_found_in_its_sector() {
        let mut data = vec![0; 4 * SECTOR];
        fill(9, 100, &mut data);
        assert_eq!(first_difference(9, 100, &data), None);
        data[3 * SECTOR - 1] ^= 1;
        assert_eq!(first_difference(9, 100, &data), Some(102));
        assert_eq!(first_wrong_byte(9, 100, &data), Some(3 * SECTOR - 1));
        data[SECTOR + 3] ^= 0x80;
        assert_eq!(first_wrong_byte(9, 100, &data), Some(SECTOR + 3));
    }

    #[test]
    fn the_checksum_sees_order_and_can_be_continued() {
        let data: Vec<u8> = (0..64).collect();
        let whole = checksum(0, &data);
        assert_eq!(checksum(checksum(0, &data[..24]), &data[24..]), whole);
        let mut swapped = data.clone();
        swapped.swap(0, 8);
        assert_ne!(checksum(0, &swapped), whole);
    }
}
