//! All memory of a guest, read from outside while it runs, and told apart from what it has to be.
//!
//! The test guest fills the memory that it does not use (`fill=1` of mode `beside`, see
//! `tests/guests/README.md`) and publishes what it uses. Everything else stays as it is.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::pattern::{SECTOR, first_wrong_byte};

/// Host addresses of guest memory are multiples of this (`vcpu-proc/src/memory.rs`).
const ALIGNMENT: u64 = 2 << 20;
/// Where a guest publishes what it has filled, and what is there first.
const PUBLISHED: u64 = 0x1f_f000;
const MAGIC: u64 = u64::from_le_bytes(*b"BHSPARE1");
/// How much is read at once.
const CHUNK: usize = 1 << 20;
/// Between two looks at the same memory.
const PAUSE: Duration = Duration::from_millis(100);

/// The memory of a living guest, for root.
#[derive(Debug)]
pub struct GuestMemory {
    process: File,
    host_address: u64,
    bytes: usize,
}

/// A byte that differs from what it has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Its guest-physical address.
    pub address: u64,
    /// What it is.
    pub is: u8,
    /// What it was.
    pub was: u8,
}

/// What a look at memory has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Every byte is what it was.
    Same,
    /// The first byte that is not.
    Differs(Difference),
    /// The process is gone, and its memory with it.
    Ended,
}

impl GuestMemory {
    /// The guest memory of the `bulkhead-vcpu` that is process `pid`: its one mapping of this size that is
    /// private, anonymous and aligned as guest memory is.
    ///
    /// # Panics
    /// When it has none of this kind, or several.
    #[must_use]
    pub fn of(pid: u32, bytes: usize) -> Self {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process is alive");
        let found: Vec<u64> = maps.lines().filter_map(|l| backing(l, bytes)).collect();
        let [host_address] = found[..] else {
            panic!(
                "{} mappings of process {pid} look like guest memory of {bytes} bytes:\n{maps}",
                found.len()
            );
        };
        Self {
            process: super::spoil::memory_of(pid),
            host_address,
            bytes,
        }
    }

    /// Reads memory at a guest-physical address. Returns whether the process is still there.
    ///
    /// # Panics
    /// When the address is not in guest memory.
    #[must_use]
    pub fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let mut done = 0;
        while done < into.len() {
            let place = self.host_address + address + done as u64;
            match self.process.read_at(&mut into[done..], place) {
                Ok(0) => return false,
                Ok(bytes) => done += bytes,
                Err(error) => panic!("guest memory at {address:#x} + {done:#x}: {error}"),
            }
        }
        true
    }

    /// Inverts the bits of one byte.
    ///
    /// # Panics
    /// When the address is not in guest memory, or the guest is gone.
    pub fn spoil(&self, address: u64) {
        let mut byte = [0];
        assert!(self.read(address, &mut byte), "the guest is gone");
        let place = self.host_address + address;
        let written = self.process.write_at(&[!byte[0]], place);
        assert_eq!(written.expect("guest memory"), 1, "the guest is gone");
    }
}

/// The start of a mapping of `/proc/PID/maps`, when it looks like guest memory of so many bytes.
fn backing(line: &str, bytes: usize) -> Option<u64> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (address(start)?, address(end)?);
    let is_private = fields.next()? == "rw-p";
    let is_anonymous = fields.nth(2)? == "0" && fields.next().is_none();
    let fits = end - start == bytes as u64 && start.is_multiple_of(ALIGNMENT);
    (fits && is_private && is_anonymous).then_some(start)
}

/// What memory has to be: all of it but what the guest itself uses.
#[derive(Debug)]
pub struct Expected {
    bytes: Vec<u8>,
    filled: Vec<Range<usize>>,
    compared: Vec<Range<usize>>,
}

/// What a guest has published about its memory.
#[derive(Debug)]
struct Published {
    seed: u64,
    filled: Vec<Range<usize>>,
    used: Vec<Range<usize>>,
}

impl Published {
    /// Of the page that a guest with memory of so many bytes has published.
    fn parse(page: &[u8], bytes: usize) -> Self {
        let words = page.chunks_exact(8).map(|word| {
            let word = word.try_into().expect("eight bytes");
            u64::from_le_bytes(word)
        });
        let words: Vec<u64> = words.collect();
        let [MAGIC, seed, filled, used, ref ends @ ..] = words[..] else {
            panic!("the guest has published nothing: {:x?}", &words[..4]);
        };
        let (filled_ends, others) = split(ends, filled);
        let (used_ends, _) = split(others, used);
        Self {
            seed,
            filled: ranges(filled_ends, bytes),
            used: ranges(used_ends, bytes),
        }
    }
}

impl Expected {
    /// Takes the memory of a guest that works: what it says to have filled is checked, what it says not to
    /// use is taken as it is.
    ///
    /// # Panics
    /// When it has not filled its memory, or a byte is not what it says, or it is gone.
    #[must_use]
    pub fn of(memory: &GuestMemory) -> Self {
        let mut bytes = vec![0; memory.bytes];
        assert!(memory.read(0, &mut bytes), "the guest is gone");
        let page = usize::try_from(PUBLISHED).expect("an address");
        let Published { seed, filled, used } =
            Published::parse(&bytes[page..page + 4096], bytes.len());
        let compared = others(&used, bytes.len());
        for range in &filled {
            let is_compared = |c: &Range<usize>| c.start <= range.start && range.end <= c.end;
            assert!(compared.iter().any(is_compared), "{range:x?} is used");
            let sector = (range.start / SECTOR) as u64;
            if let Some(at) = first_wrong_byte(seed, sector, &bytes[range.clone()]) {
                panic!("{:#x} does not hold the pattern", range.start + at);
            }
        }
        Self {
            bytes,
            filled,
            compared,
        }
    }

    /// The share of all memory that is compared.
    #[must_use]
    pub fn compared(&self) -> f64 {
        share(&self.compared, self.bytes.len())
    }

    /// The share of all memory that was compared with the pattern as well.
    #[must_use]
    pub fn filled(&self) -> f64 {
        share(&self.filled, self.bytes.len())
    }

    /// Compares the memory of a guest, which may end meanwhile.
    #[must_use]
    pub fn look(&self, memory: &GuestMemory) -> Look {
        let mut chunk = vec![0; CHUNK];
        for range in &self.compared {
            for start in range.clone().step_by(CHUNK) {
                let was = &self.bytes[start..range.end.min(start + CHUNK)];
                let is = &mut chunk[..was.len()];
                if !memory.read(start as u64, is) {
                    return Look::Ended;
                }
                if let Some(difference) = first_difference(start, is, was) {
                    return Look::Differs(difference);
                }
            }
        }
        Look::Same
    }

    /// Waits until a guest that has just been started has filled its memory.
    ///
    /// # Panics
    /// When that does not come within two minutes.
    pub fn await_filled(&self, memory: &GuestMemory) {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            match self.look(memory) {
                Look::Same => return,
                other => assert!(
                    Instant::now() < deadline,
                    "never as it has to be: {other:?}"
                ),
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Compares again and again until the guest has ended. Returns how often all was the same.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn watch(&self, memory: &GuestMemory) -> Result<usize, Difference> {
        let mut looks = 0;
        loop {
            match self.look(memory) {
                Look::Same => looks += 1,
                Look::Differs(difference) => return Err(difference),
                Look::Ended => return Ok(looks),
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn first_difference(start: usize, is: &[u8], was: &[u8]) -> Option<Difference> {
    // The comparison of whole slices is quick in every build.
    if is == was {
        return None;
    }
    let at = is.iter().zip(was).position(|(is, was)| is != was)?;
    Some(Difference {
        address: (start + at) as u64,
        is: is[at],
        was: was[at],
    })
}

/// The ends of so many ranges, and what follows them.
fn split(ends: &[u64], count: u64) -> (&[u64], &[u64]) {
    let at = usize::try_from(count).ok().and_then(|c| c.checked_mul(2));
    let parts = at.and_then(|at| ends.split_at_checked(at));
    parts.unwrap_or_else(|| panic!("{count} ranges do not fit into a page"))
}

/// Ascending ranges, each by its start and its end, within memory of so many bytes.
fn ranges(ends: &[u64], bytes: usize) -> Vec<Range<usize>> {
    let address = |end: u64| usize::try_from(end).expect("an address");
    let found: Vec<_> = ends
        .chunks_exact(2)
        .map(|pair| address(pair[0])..address(pair[1]))
        .collect();
    assert!(
        found.is_sorted_by(|a, b| a.end <= b.start)
            && found.iter().all(|r| r.start < r.end && r.end <= bytes),
        "not ascending ranges within {bytes:#x} bytes: {found:x?}"
    );
    found
}

/// What ascending ranges leave of memory.
fn others(taken: &[Range<usize>], bytes: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(taken.iter().map(|r| r.end));
    let ends = taken.iter().map(|r| r.start).chain([bytes]);
    let between = starts.zip(ends).map(|(start, end)| start..end);
    between.filter(|range| !range.is_empty()).collect()
}

#[allow(
    clippy::cast_precision_loss,
    reason = "a guest of 2^53 bytes is no test's"
)]
fn share(ranges: &[Range<usize>], bytes: usize) -> f64 {
    ranges.iter().map(Range::len).sum::<usize>() as f64 / bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_the_used_ranges_is_compared() {
        let used = ranges(&[0x1000, 0x2000, 0x2000, 0x3000, 0x7000, 0x8000], 0x8000);
        assert_eq!(others(&used, 0x8000), [0..0x1000, 0x3000..0x7000]);
        assert_eq!(others(&used, 0x9000).last(), Some(&(0x8000..0x9000)));
    }

    #[test]
    #[should_panic(expected = "not ascending ranges")]
    fn used_ranges_that_overlap_are_refused() {
        let _overlapping = ranges(&[0x1000, 0x3000, 0x2000, 0x4000], 0x8000);
    }

    #[test]
    fn published_ranges_are_read_in_their_order() {
        let words = [MAGIC, 5, 1, 2, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0];
        let page: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        let published = Published::parse(&page, 0x8000);
        assert_eq!(published.seed, 5);
        assert_eq!(published.filled.first(), Some(&(0..0x1000)));
        assert_eq!(published.filled.len(), 1);
        assert_eq!(published.used, [0x2000..0x3000, 0x4000..0x5000]);
    }

    #[test]
    fn the_first_different_byte_has_its_address() {
        let was = [7; 0x100];
        let mut is = was;
        assert_eq!(first_difference(0x4000, &is, &was), None);
        is[0xff] = 8;
        is[0xfe] = 9;
        let expected = Difference {
            address: 0x40fe,
            is: 9,
            was: 7,
        };
        assert_eq!(first_difference(0x4000, &is, &was), Some(expected));
    }

    #[test]
    fn guest_memory_is_told_from_other_mappings() {
        let line = |range: &str, rest: &str| backing(&format!("{range} {rest}"), 0x40_0000);
        let plain = "rw-p 00000000 00:00 0";
        assert_eq!(
            line("7f0000200000-7f0000600000", plain),
            Some(0x7f00_0020_0000)
        );
        assert_eq!(line("7f0000201000-7f0000601000", plain), None);
        assert_eq!(line("7f0000200000-7f0000601000", plain), None);
        let window = "rw-s 00000000 00:01 7  /memfd:bulkhead-window (deleted)";
        assert_eq!(line("7f0000200000-7f0000600000", window), None);
        let heap = "rw-p 00000000 00:00 0 [heap]";
        assert_eq!(line("7f0000200000-7f0000600000", heap), None);
    }
}
