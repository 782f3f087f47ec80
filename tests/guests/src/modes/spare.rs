//! Memory that a mode leaves alone, filled with a pattern that others can compute. Whoever reads all of
//! guest memory from outside can then tell which byte of it has been written.

use bulkhead_guest::pattern::{self, SECTOR};
use bulkhead_guest::pvh::{self, Range};

use super::changing::PUBLISHED;
use crate::machine::{self, Machine};
use crate::report::{Failure, fail};
use crate::sys::phys::{self, Dma};

/// Makes the pattern another one than those of disks with the same seed: a sector of a disk that ends up
/// in spare memory has to be a difference.
const SEED: u64 = 0x5b17_e000_ffee_1dea;
const PARTS_MAX: usize = 8;
/// The page at address 0 stays what it is: Rust has no reference to it.
const FIRST: u64 = 0x1000;
const MODULES_MAX: usize = 5;
const MAGIC: u64 = u64::from_le_bytes(*b"BHSPARE1");

/// Filled memory. Dropping it gives the heap all of its memory back.
#[derive(Debug)]
pub struct Spare {
    parts: [Dma; PARTS_MAX],
    count: usize,
    seed: u64,
    heap_end: u64,
}

impl Spare {
    /// Leaves the heap `room` bytes, fills all other memory that nobody uses, and publishes what is filled
    /// and what is used. What is neither is written by nobody from then on.
    pub fn fill(machine: &Machine, room: u64, seed: u64) -> Result<Spare, Failure> {
        if room > phys::heap_left() {
            return Err(Failure::Parameter("size"));
        }
        let heap = Range {
            start: phys::heap_mark(),
            len: room,
            kind: 0,
        };
        let mut taken = [Range::default(); 3 + MODULES_MAX];
        let modules = machine.modules();
        taken[0] = machine::image();
        taken[1] = heap;
        taken[2] = Range {
            start: PUBLISHED,
            len: 4096,
            kind: 0,
        };
        let kept = taken.get_mut(3..3 + modules.len());
        kept.ok_or(Failure::Parameter("modules"))?
            .copy_from_slice(modules);
        let heap_end = phys::heap_end();
        phys::limit_heap(room);
        let mut spare = Spare {
            parts: [phys::claim(0, 0); PARTS_MAX],
            count: 0,
            seed: seed ^ SEED,
            heap_end,
        };
        pvh::each_free(machine.memory(), &taken, FIRST, |start, end| {
            spare.add(phys::claim(start, end));
        });
        spare.publish(&[machine::variable(), heap]);
        Ok(spare)
    }

    fn add(&mut self, mut part: Dma) {
        assert!(
            self.count < PARTS_MAX,
            "memory in more than {PARTS_MAX} parts"
        );
        pattern::fill(self.seed, part.address / SECTOR as u64, part.all_mut());
        self.parts[self.count] = part;
        self.count += 1;
    }

    /// Nothing is printed: a hostile serial port takes seconds for each line.
    fn publish(&self, used: &[Range]) {
        let ends = |start, len| [start, start + len];
        let filled = self.parts().iter();
        let filled = filled.flat_map(|part| ends(part.address, part.len as u64));
        let used_ends = used.iter().flat_map(|range| ends(range.start, range.len));
        let counts = [self.seed, self.count as u64, used.len() as u64];
        let words = counts.into_iter().chain(filled).chain(used_ends);
        for (address, word) in (PUBLISHED + 8..).step_by(8).zip(words) {
            phys::write(address, word);
        }
        phys::write(PUBLISHED, MAGIC);
    }

    fn parts(&self) -> &[Dma] {
        &self.parts[..self.count]
    }

    /// Fails, in the name of `mode`, with the first address in each part that does not hold what was
    /// put there.
    pub fn verify(&self, mode: &str) {
        for part in self.parts() {
            let sector = part.address / SECTOR as u64;
            if let Some(at) = pattern::first_wrong_byte(self.seed, sector, part.all()) {
                let address = part.address + at as u64;
                fail!(mode, "kind=spare address={address:#x}");
            }
        }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        phys::set_heap(phys::heap_mark(), self.heap_end);
    }
}
