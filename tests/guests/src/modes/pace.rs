//! `pace`: tells when this CPU stood still. It does nothing but look at the time; moments that it did not
//! see are published, with their lengths, for a host that reads its memory.

use super::changing::PUBLISHED;
use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::{phys, time};

const MAGIC: u64 = u64::from_le_bytes(*b"BHPACE01");
/// Places for gaps, overwritten in turn.
const GAPS: u64 = 240;
/// Where the first one is, behind six words.
const FIRST: u64 = PUBLISHED + 6 * 8;
/// Shortest gap that is published, in microseconds.
const LEAST_US: u64 = 250;

/// Looks at the time for `seconds=`.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seconds = machine.number("seconds", 0)?;
    let khz = time::khz();
    let least = LEAST_US * khz / 1000;
    let word = |index: u64, value: u64| phys::write(PUBLISHED + 8 * index, value);
    for (index, value) in (1..).zip([0, 0, khz, least, GAPS]) {
        word(index, value);
    }
    word(0, MAGIC);
    say!("pace address={PUBLISHED:#x} khz={khz} seconds={seconds}");
    let start = time::cycles();
    let (mut before, mut gaps) = (start, 0_u64);
    while seconds == 0 || before.wrapping_sub(start) < seconds.saturating_mul(1000 * khz) {
        let now = time::cycles();
        let gap = now.wrapping_sub(before);
        if gap >= least {
            let place = FIRST + gaps % GAPS * 16;
            phys::write(place, now);
            phys::write(place + 8, gap);
            gaps += 1;
            word(1, gaps);
        }
        word(2, now);
        before = now;
    }
    say!("pace.end gaps={gaps}");
    Ok(())
}
