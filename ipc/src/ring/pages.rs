//! Which pages of a window's data area are in use. The lowest free range is taken first, so that a
//! lightly loaded window keeps reusing the same few pages, which stay hot in the cache.

use crate::window::DATA_PAGE_BYTES;

/// A run of pages in the data area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    first: u32,
    pages: u32,
}

impl PageRange {
    /// Offset of the first byte from the start of the data area.
    #[must_use]
    pub const fn offset(self) -> usize {
        self.first as usize * DATA_PAGE_BYTES
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        self.pages as usize * DATA_PAGE_BYTES
    }

    /// Whether it has no pages (it never does).
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.pages == 0
    }
}

/// The allocator: one bit a page, set when taken. Lives in the gate's private memory.
#[derive(Debug)]
pub struct WindowPages {
    taken: Vec<u64>,
    total: u32,
    free: u32,
}

impl WindowPages {
    /// An allocator over `total` free pages.
    #[must_use]
    pub fn new(total: usize) -> Self {
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        let words = total.div_ceil(64) as usize;
        let mut taken = vec![0u64; words];
        if let (Some(last), rest @ 1..) = (taken.last_mut(), total % 64) {
            *last = u64::MAX << rest;
        }
        Self {
            taken,
            total,
            free: total,
        }
    }

    /// Pages that are free.
    #[must_use]
    pub const fn free_pages(&self) -> u32 {
        self.free
    }

    /// Pages there are.
    #[must_use]
    pub const fn total_pages(&self) -> u32 {
        self.total
    }

    /// Takes the lowest contiguous run that holds `bytes` (at least one page), if there is one.
    pub fn take(&mut self, bytes: usize) -> Option<PageRange> {
        let pages = u32::try_from(bytes.div_ceil(DATA_PAGE_BYTES).max(1)).ok()?;
        if pages > self.free {
            return None;
        }
        let first = if pages == 1 {
            self.first_free()?
        } else {
            self.first_run(pages)?
        };
        self.mark(first, pages, true);
        self.free -= pages;
        Some(PageRange { first, pages })
    }

    /// Gives a run back.
    pub fn give(&mut self, range: PageRange) {
        self.mark(range.first, range.pages, false);
        self.free += range.pages;
    }

    fn first_free(&self) -> Option<u32> {
        let (word, bits) = self
            .taken
            .iter()
            .enumerate()
            .find(|(_, bits)| **bits != u64::MAX)?;
        Some(u32::try_from(word).ok()? * 64 + bits.trailing_ones())
    }

    fn first_run(&self, pages: u32) -> Option<u32> {
        let mut start = 0;
        let mut run = 0;
        let mut at = 0;
        while at < self.total {
            let bits = self.taken.get(at as usize / 64)? >> (at % 64);
            let left = 64 - at % 64;
            if bits & 1 == 1 {
                at += bits.trailing_ones().min(left);
                start = at;
                run = 0;
            } else {
                let free = bits.trailing_zeros().min(left);
                at += free;
                run += free;
                if run >= pages {
                    return (start + pages <= self.total).then_some(start);
                }
            }
        }
        None
    }

    fn mark(&mut self, first: u32, pages: u32, taken: bool) {
        let mut at = first;
        let end = first + pages;
        while at < end {
            let n = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - n)) << (at % 64);
            if let Some(word) = self.taken.get_mut(at as usize / 64) {
                assert_eq!(
                    *word & mask,
                    if taken { 0 } else { mask },
                    "page accounting"
                );
                *word ^= mask;
            }
            at += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lowest_run_is_taken_first() {
        let mut p = WindowPages::new(10);
        let a = p.take(1).unwrap();
        let b = p.take(3 * 4096).unwrap();
        assert_eq!((a.offset(), b.offset(), b.len()), (0, 4096, 3 * 4096));
        p.give(a);
        assert_eq!(p.take(4096).unwrap().offset(), 0);
        assert_eq!(p.take(7 * 4096), None);
        assert!(p.take(6 * 4096).is_some());
        assert_eq!(p.free_pages(), 0);
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_come_back(
            total in 1usize..300,
            steps in prop::collection::vec((any::<bool>(), 1usize..80), 1..200),
        ) {
            let mut p = WindowPages::new(total);
            let mut held: Vec<PageRange> = Vec::new();
            for (take, n) in steps {
                if take {
                    if let Some(r) = p.take(n * DATA_PAGE_BYTES) {
                        prop_assert!(r.offset() + r.len() <= total * DATA_PAGE_BYTES);
                        for h in &held {
                            prop_assert!(r.offset() >= h.offset() + h.len()
                                || h.offset() >= r.offset() + r.len());
                        }
                        held.push(r);
                    }
                } else if !held.is_empty() {
                    let r = held.swap_remove(n % held.len());
                    p.give(r);
                }
            }
            for r in held {
                p.give(r);
            }
            prop_assert_eq!(p.free_pages() as usize, total);
            prop_assert!(p.take(total * DATA_PAGE_BYTES).is_some());
        }
    }
}
