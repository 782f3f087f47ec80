//! `blk-poison`: rounds of writing, flushing and verifying a disk that refuses one sector. Each request for
//! that sector must end in one I/O error, and every other sector must be as it was written.

use bulkhead_guest::prng::Prng;

use super::blk_sweep::{self, Op, QD_MAX, Sweep};
use crate::machine::Machine;
use crate::report::{Failure, expect, say};
use crate::sys::phys;
use crate::sys::time::Deadline;
use crate::virtio::blk::{Blk, WANTED, answer, kind};

/// Runs `count` rounds.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let first_seed = machine.number("seed", 1)?;
    let qd = machine.number("qd", 16)? as usize;
    if qd == 0 || qd > QD_MAX {
        return Err(Failure::Parameter("qd"));
    }
    let rounds = machine.number("count", 3)?.max(1);
    let mut blk = Blk::open(machine, machine.number("disk", 0)?, WANTED)?;
    let sectors = machine.number("sectors", 4096)?.min(blk.capacity);
    let poison = machine.number("sector", 0)?;
    if poison >= sectors {
        return Err(Failure::Parameter("sector"));
    }
    let timeout_ms = super::timeout_ms(machine)?;
    let mut prng = Prng::new(first_seed);
    let (mut requests, mut refused) = (0, 0);
    let mut seed = first_seed;
    for round in 0..rounds {
        seed = first_seed + round;
        let sweep = Sweep {
            op: Op::Write,
            sectors,
            seed,
            qd,
            timeout_ms,
            poison: Some(poison),
        };
        let mark = phys::heap_mark();
        let written = blk_sweep::run(&mut blk, sweep, &mut prng)?;
        expect("refused_writes", written.refused, 1)?;
        let (status, _) = blk.request(0, kind::FLUSH, 0, None, Deadline::after_ms(timeout_ms))?;
        expect("flush_status", u64::from(status), u64::from(answer::OK))?;
        let sweep = Sweep {
            op: Op::Verify,
            ..sweep
        };
        let read = blk_sweep::run(&mut blk, sweep, &mut prng)?;
        phys::heap_release(mark);
        expect("refused_reads", read.refused, 1)?;
        expect("checksum", read.checksum, written.checksum)?;
        requests += written.requests + read.requests + 1;
        refused += written.refused + read.refused;
    }
    say!(
        "blk-poison.end rounds={rounds} requests={requests} refused={refused} seed={seed} sectors={sectors}"
    );
    Ok(())
}
