//! `blk-load`: rounds of writing, flushing and verifying a disk for a given time. What happens to the
//! device's process meanwhile must not show. Leaves the pattern of the last round's seed.

use bulkhead_guest::prng::Prng;

use super::blk_sweep::{self, Op, QD_MAX, Sweep};
use crate::machine::Machine;
use crate::report::{Failure, expect, say};
use crate::sys::time::Deadline;
use crate::virtio::blk::{Blk, WANTED, answer, kind};

const SECTORS: u64 = 4096;

/// Runs rounds until the time is over.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let first_seed = machine.number("seed", 1)?;
    let qd = machine.number("qd", 16)? as usize;
    if qd == 0 || qd > QD_MAX {
        return Err(Failure::Parameter("qd"));
    }
    let seconds = machine.number("seconds", 5)?;
    let mut blk = Blk::open(machine, machine.number("disk", 0)?, WANTED)?;
    let sectors = machine.number("sectors", SECTORS)?.min(blk.capacity);
    let timeout_ms = super::timeout_ms(machine)?;
    let mut prng = Prng::new(first_seed);
    say!("blk-load.begin sectors={sectors} qd={qd} seconds={seconds}");
    let end = Deadline::after_ms(seconds.saturating_mul(1000));
    let (mut rounds, mut requests) = (0, 0);
    let mut seed = first_seed;
    while rounds == 0 || !end.passed() {
        seed = first_seed + rounds;
        let sweep = Sweep {
            op: Op::Write,
            sectors,
            seed,
            qd,
            timeout_ms,
            poison: None,
        };
        let mark = crate::sys::phys::heap_mark();
        let written = blk_sweep::run(&mut blk, sweep, &mut prng)?;
        let (status, _) = blk.request(0, kind::FLUSH, 0, None, Deadline::after_ms(timeout_ms))?;
        expect("flush_status", u64::from(status), u64::from(answer::OK))?;
        let sweep = Sweep {
            op: Op::Verify,
            ..sweep
        };
        let read = blk_sweep::run(&mut blk, sweep, &mut prng)?;
        crate::sys::phys::heap_release(mark);
        expect("checksum", read.checksum, written.checksum)?;
        requests += written.requests + read.requests + 1;
        rounds += 1;
    }
    say!("blk-load.end rounds={rounds} requests={requests} seed={seed} sectors={sectors}");
    Ok(())
}
