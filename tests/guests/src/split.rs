//! Splitting a buffer into the segments of a descriptor chain within a device's limits.

use crate::prng::Prng;

/// Most segments that one request of ours has.
pub const SEGMENTS_MAX: usize = 64;

/// What a device accepts for the data of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest segment in bytes (VIRTIO_BLK_F_SIZE_MAX).
    pub size_max: u32,
    /// Most data segments (VIRTIO_BLK_F_SEG_MAX).
    pub seg_max: u32,
}

impl Limits {
    /// Most bytes that fit in one request.
    pub fn bytes_max(&self) -> u64 {
        u64::from(self.size_max) * u64::from(self.segments_max())
    }

    fn segments_max(&self) -> u32 {
        self.seg_max.clamp(1, SEGMENTS_MAX as u32)
    }
}

/// Lengths of segments, in order.
#[derive(Debug, Clone, Copy)]
pub struct Segments {
    lens: [u32; SEGMENTS_MAX],
    count: usize,
}

impl Segments {
    /// The lengths.
    pub fn lens(&self) -> &[u32] {
        &self.lens[..self.count]
    }
}

/// The fewest segments; `None` when the limits do not allow so many bytes.
pub fn fewest(len: u32, limits: Limits) -> Option<Segments> {
    cut(len, limits, |left, _| left)
}

/// Segments of random lengths, down to one byte.
pub fn random(len: u32, limits: Limits, prng: &mut Prng) -> Option<Segments> {
    let wanted = prng.within(1, u64::from(limits.segments_max()).min(8)) as u32;
    let typical = (len / wanted).max(1);
    cut(len, limits, |_, _| {
        prng.within(1, u64::from(typical) * 2) as u32
    })
}

fn cut(len: u32, limits: Limits, mut propose: impl FnMut(u32, usize) -> u32) -> Option<Segments> {
    if u64::from(len) > limits.bytes_max() {
        return None;
    }
    let mut segments = Segments {
        lens: [0; SEGMENTS_MAX],
        count: 0,
    };
    let mut left = len;
    while left > 0 {
        let after = u64::from(limits.segments_max()) - segments.count as u64 - 1;
        // What the remaining segments cannot carry has to go into this one.
        let least = u64::from(left)
            .saturating_sub(after * u64::from(limits.size_max))
            .max(1);
        let most = left.min(limits.size_max);
        let size = propose(left, segments.count).clamp(least as u32, most);
        segments.lens[segments.count] = size;
        segments.count += 1;
        left -= size;
    }
    Some(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_segment_is_enough_where_it_fits() {
        let limits = Limits {
            size_max: 1 << 20,
            seg_max: 126,
        };
        assert_eq!(fewest(131_072, limits).unwrap().lens(), [131_072]);
    }

    #[test]
    fn size_max_cuts_segments() {
        let limits = Limits {
            size_max: 4096,
            seg_max: 3,
        };
        assert_eq!(fewest(10_000, limits).unwrap().lens(), [4096, 4096, 1808]);
        assert!(fewest(12_289, limits).is_none());
    }

    #[test]
    fn random_segments_keep_to_the_limits_and_add_up() {
        let mut prng = Prng::new(3);
        for _ in 0..20_000 {
            let limits = Limits {
                size_max: prng.within(1, 5000) as u32,
                seg_max: prng.within(1, 70) as u32,
            };
            let len = prng.within(1, limits.bytes_max()) as u32;
            let segments = random(len, limits, &mut prng).unwrap();
            assert!(segments.lens().len() <= limits.seg_max as usize);
            assert!(
                segments
                    .lens()
                    .iter()
                    .all(|&size| size > 0 && size <= limits.size_max)
            );
            assert_eq!(segments.lens().iter().sum::<u32>(), len);
        }
    }
}
