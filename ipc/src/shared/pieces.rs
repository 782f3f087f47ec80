//! In which pieces memory is best copied.
//!
//! `memmove` of the C library copies more than about two KiB with `rep movsb`, which on processors of AMD takes fifteen times as
//! long when what is written begins 1 to 31 bytes behind what is read, pages left aside (64 KiB in 1.4 or in
//! 23 microseconds). Frames behind headers are like that. Smaller pieces it copies in other ways.

/// Size of what is left aside.
const PAGE_BYTES: usize = 4096;
/// Distances from 1 that are slow, with as much again to be sure.
const NEAR: usize = 64;
/// Most bytes of a piece then.
const PIECE_BYTES: usize = 2048;

/// The pieces, as offset and length, in which to copy `len` bytes from the first place to the second.
pub(super) fn pieces(
    [from, to]: [*const u8; 2],
    len: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let ahead = to.addr().wrapping_sub(from.addr()) % PAGE_BYTES;
    let most = match ahead {
        1..NEAR => PIECE_BYTES,
        _ => len.max(1),
    };
    (0..len)
        .step_by(most)
        .map(move |at| (at, most.min(len - at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces_of(from: usize, to: usize, len: usize) -> Vec<(usize, usize)> {
        let at = std::ptr::without_provenance;
        pieces([at(from), at(to)], len).collect()
    }

    #[test]
    fn only_what_is_slow_is_cut() {
        let places: [(usize, usize); 6] = [
            (0, 0),
            (0, 64),
            (16, 4096),
            (8192, 100),
            (1, 0),
            (4095, 1 << 20),
        ];
        for (from, to) in places {
            let cut = (1..64).contains(&(to.wrapping_sub(from) % 4096));
            let count = pieces_of(from, to, 64 * 1024).len();
            assert_eq!(count, if cut { 32 } else { 1 }, "{from} to {to}");
        }
        assert!(pieces_of(0, 12, 0).is_empty() && pieces_of(0, 0, 0).is_empty());
    }

    #[test]
    fn pieces_are_the_whole() {
        for len in [1, 7, 2047, 2048, 2049, 65_565] {
            let mut next = 0;
            for (at, n) in pieces_of(0, 12, len) {
                assert_eq!(at, next);
                assert!((1..=2048).contains(&n));
                next += n;
            }
            assert_eq!(next, len);
        }
    }
}
