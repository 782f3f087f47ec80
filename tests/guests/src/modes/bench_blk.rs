//! `bench-blk`: requests of one kind at a constant depth, completions polled from ring 3.
//!
//! Chains are built once and offered again and again, so that a request costs the guest a few
//! stores; only a random read writes a new sector into its header.

use bulkhead_guest::pattern::SECTOR;
use bulkhead_guest::prng::Prng;
use bulkhead_guest::split;

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::time::{self, Deadline};
use crate::virtio::blk::{Blk, Slot, WANTED, answer, kind};
use crate::virtio::mmio::feature;
use crate::virtio::queue::QUEUE_SIZE_MAX;

const QD_MAX: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    SeqRead,
    SeqWrite,
    RandRead,
    RandWrite,
}

/// When to stop offering.
#[derive(Debug, Clone, Copy)]
enum Until {
    Requests(u64),
    Cycles(u64),
}

/// Measures one run.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let name = machine.args().text("op").unwrap_or("seq_read");
    let op = match name {
        "seq_read" => Op::SeqRead,
        "seq_write" => Op::SeqWrite,
        "rand_read" => Op::RandRead,
        "rand_write" => Op::RandWrite,
        _ => return Err(Failure::Parameter("op")),
    };
    let bs = machine.number("bs", 131_072)? as usize;
    let qd = machine.number("qd", 1)? as usize;
    if bs == 0 || !bs.is_multiple_of(SECTOR) {
        return Err(Failure::Parameter("bs"));
    }
    if qd == 0 || qd > QD_MAX {
        return Err(Failure::Parameter("qd"));
    }
    let mut blk = Blk::open(machine, machine.number("disk", 0)?, WANTED)?;
    let per_request = (bs / SECTOR) as u64;
    let places = blk.capacity / per_request;
    if places == 0 {
        return Err(Failure::Parameter("bs"));
    }
    let segments = split::fewest(bs as u32, blk.limits).ok_or(Failure::Parameter("bs"))?;
    // Measured now if CPUID does not tell: nothing may come between the last request and its record.
    let khz = time::khz();
    let until = match (
        machine.number("requests", 0)?,
        machine.number("seconds", 0)?,
    ) {
        (0, 0) => Until::Requests(10_000),
        (0, seconds) => Until::Cycles(seconds.saturating_mul(1000 * khz)),
        (requests, _) => Until::Requests(requests.max(qd as u64)),
    };

    // A descriptor index finds its slot.
    let mut slots: [Option<Slot>; QUEUE_SIZE_MAX] = [None; QUEUE_SIZE_MAX];
    let mut heads = [0_u16; QD_MAX];
    let reads = matches!(op, Op::SeqRead | Op::RandRead);
    let indirect = blk.has(feature::INDIRECT_DESC);
    for head in &mut heads[..qd] {
        let mut slot = Slot::new(bs);
        if !reads {
            bulkhead_guest::pattern::fill(1, 0, slot.data.all_mut());
        }
        slot.prepare(if reads { kind::IN } else { kind::OUT }, 0);
        let (chain, count) = slot.chain(&segments, reads);
        let chain = &chain[..count];
        let queue = blk.queue(0);
        let built = if indirect {
            queue.build_indirect(chain, slot.table())
        } else {
            queue.build(chain)
        };
        *head = built.ok_or(Failure::Parameter("qd"))?;
        slots[usize::from(*head)] = Some(slot);
    }

    let mut prng = Prng::new(machine.number("seed", 1)?);
    let mut place = 0;
    let mut next_sector = move || {
        let chosen = match op {
            Op::SeqRead | Op::SeqWrite => {
                place = if place + 1 >= places { 0 } else { place + 1 };
                place
            }
            Op::RandRead | Op::RandWrite => prng.below(places),
        };
        chosen * per_request
    };
    let timeout = super::timeout_ms(machine)?;
    say!(
        "bench-blk.begin op={name} qd={qd} bs={bs} segments={} indirect={} capacity_sectors={}",
        segments.lens().len(),
        u8::from(indirect),
        blk.capacity
    );
    let queue = blk.queue(0);
    let start = time::cycles();
    for head in &heads[..qd] {
        if let Some(slot) = slots[usize::from(*head)] {
            slot.set_sector(next_sector());
        }
        queue.offer(*head);
    }
    queue.kick();
    let (mut offered, mut done, mut failed) = (qd as u64, 0_u64, 0_u64);
    let mut deadline = Deadline::after_ms(timeout);
    let mut last_done = 0;
    let mut spins = 0_u32;
    while done < offered {
        let more = match until {
            Until::Requests(requests) => offered < requests,
            Until::Cycles(cycles) => time::cycles() - start < cycles,
        };
        let mut batch = false;
        while let Some(used) = queue.poll()? {
            done += 1;
            let Some(slot) = slots[usize::from(used.head)] else {
                let got = u64::from(used.head);
                return Err(Failure::Wrong {
                    what: "used_id",
                    got,
                    expected: 0,
                });
            };
            failed += u64::from(slot.status() != answer::OK);
            if more && !matches!(until, Until::Requests(requests) if offered >= requests) {
                slot.set_sector(next_sector());
                queue.offer(used.head);
                offered += 1;
                batch = true;
            }
        }
        if batch {
            queue.kick();
            spins = 0;
        } else {
            spins += 1;
            if spins & 0xffff == 0 && done != last_done {
                deadline = Deadline::after_ms(timeout);
                last_done = done;
            } else if spins & 0xffff == 0 && deadline.passed() {
                return Err(Failure::Timeout("used_ring"));
            }
            core::hint::spin_loop();
        }
        if done & 0xfff < qd as u64 {
            queue.suppress_interrupts();
        }
    }
    let cycles = time::cycles() - start;
    let kicks = blk.kicks();
    say!(
        "bench-blk.end op={name} qd={qd} bs={bs} requests={done} bytes={} failed={failed} kicks={kicks} cycles={cycles} tsc_khz={khz}",
        done * bs as u64
    );
    crate::report::expect("failed_requests", failed, 0)
}
