//! Writing or reading a range of a disk with many requests of random sizes, splits, queues and
//! descriptor layouts in flight. Used by `blk`.

use bulkhead_guest::pattern::{self, SECTOR};
use bulkhead_guest::prng::Prng;
use bulkhead_guest::split;

use crate::report::{Failure, fail};
use crate::sys::time::Deadline;
use crate::virtio::blk::{Blk, Slot, answer, kind};
use crate::virtio::mmio::feature;

/// Most requests in flight.
pub const QD_MAX: usize = 64;
/// Most sectors of one request.
const SECTORS_MAX: u64 = 64;
/// Prime to the number of chunks more often than not; visits them out of order.
const STRIDE: u64 = 7919;

/// What to do to each sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Write the pattern of the seed.
    Write,
    /// Read, and compare with the pattern.
    Verify,
}

/// One pass over a range that starts at sector 0.
#[derive(Debug, Clone, Copy)]
pub struct Sweep {
    /// What to do.
    pub op: Op,
    /// How many sectors.
    pub sectors: u64,
    /// Seed of the pattern.
    pub seed: u64,
    /// Requests in flight.
    pub qd: usize,
    /// Time for one request.
    pub timeout_ms: u64,
    /// A sector that the device refuses. It gets requests of its own.
    pub poison: Option<u64>,
}

/// What a pass did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Requests completed.
    pub requests: u64,
    /// Data segments used.
    pub segments: u64,
    /// Requests with an indirect table.
    pub indirect: u64,
    /// Sum over the sectors, but for a poisoned one.
    pub checksum: u64,
    /// Requests for the poisoned sector that ended in an I/O error, as they have to.
    pub refused: u64,
}

/// Pieces of the range: chunks out of order, cut at random.
struct Pieces {
    chunks: u64,
    chunk: u64,
    at: u64,
    sectors: u64,
    /// A sector that is a piece by itself.
    alone: Option<u64>,
}

impl Pieces {
    fn new(sectors: u64, alone: Option<u64>) -> Pieces {
        Pieces {
            chunks: sectors.div_ceil(SECTORS_MAX),
            chunk: 0,
            at: 0,
            sectors,
            alone,
        }
    }

    fn next(&mut self, prng: &mut Prng, most: u64) -> Option<(u64, u64)> {
        if self.chunk >= self.chunks {
            return None;
        }
        let stride = if self.chunks.is_multiple_of(STRIDE) {
            1
        } else {
            STRIDE
        };
        let start = (self.chunk * stride % self.chunks) * SECTORS_MAX;
        let len = SECTORS_MAX.min(self.sectors - start);
        let mut count = prng.within(1, len - self.at).min(most);
        if let Some(before) = self.alone.and_then(|s| s.checked_sub(start + self.at)) {
            count = count.min(before.max(1));
        }
        let piece = (start + self.at, count);
        self.at += count;
        if self.at == len {
            self.chunk += 1;
            self.at = 0;
        }
        Some(piece)
    }
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    slot: Slot,
    /// Queue, descriptor, first sector, sectors; `None` while free.
    request: Option<(usize, u16, u64, u64)>,
}

/// Does one pass.
pub fn run(blk: &mut Blk, sweep: Sweep, prng: &mut Prng) -> Result<Outcome, Failure> {
    let free = || Flight {
        slot: Slot::new(SECTORS_MAX as usize * SECTOR),
        request: None,
    };
    let mut flights: [Option<Flight>; QD_MAX] = [None; QD_MAX];
    flights[..sweep.qd].fill_with(|| Some(free()));
    let most = (blk.limits.bytes_max() / SECTOR as u64).max(1);
    let mut pieces = Pieces::new(sweep.sectors, sweep.poison);
    let mut outcome = Outcome::default();
    let mut in_flight = 0_usize;
    let mut exhausted = false;
    // A piece for which the chosen queue had no room.
    let mut waiting = None;
    let mut deadline = Deadline::after_ms(sweep.timeout_ms);
    loop {
        for flight in flights[..sweep.qd].iter_mut().flatten() {
            if flight.request.is_some() || exhausted {
                continue;
            }
            let Some(piece) = waiting.take().or_else(|| pieces.next(prng, most)) else {
                exhausted = true;
                break;
            };
            if !submit(blk, sweep, flight, piece, prng, &mut outcome)? {
                waiting = Some(piece);
                break;
            }
            in_flight += 1;
        }
        for queue in 0..blk.queue_count() {
            blk.queue(queue).kick();
        }
        if in_flight == 0 && exhausted {
            return Ok(outcome);
        }
        let mut progress = false;
        for index in 0..blk.queue_count() {
            while let Some(used) = blk.queue(index).poll()? {
                let flight = flights[..sweep.qd].iter_mut().flatten().find(|flight| {
                    flight
                        .request
                        .is_some_and(|(q, head, ..)| q == index && head == used.head)
                });
                let Some(flight) = flight else {
                    let got = u64::from(used.head);
                    return Err(Failure::Wrong {
                        what: "used_id",
                        got,
                        expected: 0,
                    });
                };
                blk.queue(index).release(used.head);
                complete(sweep, flight, used.len, &mut outcome);
                in_flight -= 1;
                progress = true;
            }
        }
        if progress {
            deadline = Deadline::after_ms(sweep.timeout_ms);
        } else if deadline.passed() {
            let reset = blk.device.needs_reset();
            return Err(if reset {
                Failure::NeedsReset("sweep")
            } else {
                Failure::Timeout("sweep")
            });
        }
    }
}

fn submit(
    blk: &mut Blk,
    sweep: Sweep,
    flight: &mut Flight,
    (sector, count): (u64, u64),
    prng: &mut Prng,
    outcome: &mut Outcome,
) -> Result<bool, Failure> {
    let len = count as usize * SECTOR;
    let slot = &mut flight.slot;
    let mut sum = 0;
    match sweep.op {
        Op::Write => {
            let data = &mut slot.data.all_mut()[..len];
            pattern::fill(sweep.seed, sector, data);
            if sweep.poison != Some(sector) {
                sum = pattern::sectors_checksum(data);
            }
        }
        Op::Verify => slot.data.all_mut()[..len].fill(0xdd),
    }
    slot.prepare(
        if sweep.op == Op::Write {
            kind::OUT
        } else {
            kind::IN
        },
        sector,
    );
    let segments = split::random(len as u32, blk.limits, prng).ok_or(Failure::Parameter("bs"))?;
    let (chain, used) = slot.chain(&segments, sweep.op == Op::Verify);
    let chain = &chain[..used];
    let index = prng.below(blk.queue_count() as u64) as usize;
    let can = blk.has(feature::INDIRECT_DESC);
    let queue = blk.queue(index);
    // A chain that does not fit directly goes into a table, and the other way round.
    let direct = if can && prng.one_in(2) {
        None
    } else {
        queue.build(chain)
    };
    let indirect = direct.is_none() && can;
    let head = match direct {
        None if can => queue.build_indirect(chain, slot.table()),
        direct => direct,
    };
    let Some(head) = head else { return Ok(false) };
    queue.offer(head);
    outcome.checksum = outcome.checksum.wrapping_add(sum);
    outcome.segments += segments.lens().len() as u64;
    outcome.indirect += u64::from(indirect);
    flight.request = Some((index, head, sector, count));
    Ok(true)
}

fn complete(sweep: Sweep, flight: &mut Flight, used_len: u32, outcome: &mut Outcome) {
    let Some((_, _, sector, count)) = flight.request.take() else {
        return;
    };
    outcome.requests += 1;
    let len = count as usize * SECTOR;
    let status = flight.slot.status();
    if sweep.poison == Some(sector) && status == answer::IOERR {
        outcome.refused += 1;
        return;
    }
    if status != answer::OK {
        fail!(
            "blk",
            "kind=status sector={sector} count={count} status={status}"
        );
        return;
    }
    let expected = if sweep.op == Op::Verify {
        len as u32 + 1
    } else {
        1
    };
    if used_len != expected {
        fail!(
            "blk",
            "kind=used_len sector={sector} got={used_len} expected={expected}"
        );
    }
    if sweep.op == Op::Verify {
        let data = &flight.slot.data.all()[..len];
        outcome.checksum = outcome
            .checksum
            .wrapping_add(pattern::sectors_checksum(data));
        if let Some(bad) = pattern::first_difference(sweep.seed, sector, data) {
            fail!("blk", "kind=data sector={bad} request={sector}+{count}");
        }
    }
}
