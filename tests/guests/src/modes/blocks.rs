//! `blocks`: rounds of writing places of a disk that each round draws anew, flushing, and reading back.
//! Each sector says which round wrote it. A round is told before its first write and after its flush, and
//! the record has reached the host before the guest goes on: what a host finds on the disk after its power
//! was cut can be judged by the records alone. Requests that the device refuses are told and change nothing
//! of that.

use bulkhead_guest::blocks::{self, Content, EXTENT_SECTORS_MAX, Extent};
use bulkhead_guest::pattern::SECTOR;
use bulkhead_guest::prng::Prng;
use bulkhead_guest::split;

use super::blk_sweep::QD_MAX;
use crate::machine::Machine;
use crate::report::{Failure, fail, say};
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::sys::{irq, port};
use crate::virtio::blk::{Blk, Slot, WANTED, answer, kind};
use crate::virtio::mmio::feature;

const SECTORS: u64 = 4096;
/// The 8250's scratch register: reading it waits until what was written to the line has left.
const SCR: u16 = 0x3ff;
/// Places of earlier rounds that are read after each one.
const ELSEWHERE: u64 = 4;
/// Among the rounds that sectors are known to hold: anything.
const UNKNOWN: u64 = u64::MAX;
/// The same: zeroes.
const BLANK: u64 = 0;

struct Flight {
    slot: Slot,
    /// Queue, descriptor, place; `None` while free.
    request: Option<(usize, u16, Extent)>,
}

struct Rounds<'a> {
    blk: &'a mut Blk,
    seed: u64,
    sectors: u64,
    timeout_ms: u64,
    flights: &'a mut [Option<Flight>],
    /// For each sector the round that wrote it last.
    known: Dma,
    refused: u64,
}

/// Runs rounds until the time is over.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let qd = machine.number("qd", 16)? as usize;
    if qd == 0 || qd > QD_MAX {
        return Err(Failure::Parameter("qd"));
    }
    let seconds = machine.number("seconds", 5)?;
    let interval_ms = machine.number("interval", 0)?;
    let mut blk = Blk::open(machine, machine.number("disk", 0)?, WANTED)?;
    let sectors = machine.number("sectors", SECTORS)?.min(blk.capacity);
    if sectors == 0 || blk.limits.bytes_max() < EXTENT_SECTORS_MAX * SECTOR as u64 {
        return Err(Failure::Parameter("sectors"));
    }
    let mut flights = [const { None }; QD_MAX];
    for flight in &mut flights[..qd] {
        let slot = Slot::new(EXTENT_SECTORS_MAX as usize * SECTOR);
        let request = None;
        *flight = Some(Flight { slot, request });
    }
    let mut rounds = Rounds {
        blk: &mut blk,
        seed,
        sectors,
        timeout_ms: super::timeout_ms(machine)?,
        flights: &mut flights[..qd],
        known: phys::allocate(sectors as usize * 8),
        refused: 0,
    };
    let first = rounds.take_stock()? + 1;
    say!("blocks.begin sectors={sectors} seed={seed} first={first} seconds={seconds}");
    let end = Deadline::after_ms(seconds.saturating_mul(1000));
    let (mut round, mut flushed) = (first, 0_u64);
    loop {
        flushed += u64::from(rounds.round(round)?);
        if end.passed() {
            break;
        }
        round += 1;
        if interval_ms > 0 {
            irq::sleep_ms(interval_ms);
        }
    }
    let refused = rounds.refused;
    say!("blocks.end last={round} flushed={flushed} refused={refused}");
    Ok(())
}

/// Waits until what was said has left the machine.
fn until_said() {
    let _scratch = port::read_u8(SCR);
}

impl Rounds<'_> {
    /// Finds out what the disk holds. Returns the last round that it knows.
    fn take_stock(&mut self) -> Result<u64, Failure> {
        let (sectors, mut last) = (self.sectors, 0);
        let starts = (0..sectors).step_by(EXTENT_SECTORS_MAX as usize);
        let whole = starts.map(|sector| Extent {
            sector,
            count: EXTENT_SECTORS_MAX.min(sectors - sector),
        });
        self.requests(0, kind::IN, whole, |rounds, sector, data| {
            let found = match blocks::content(rounds.seed, sector, data) {
                Content::Blank => BLANK,
                Content::Round(round) => {
                    last = last.max(round);
                    round
                }
                Content::Foreign => {
                    fail!("blocks", "kind=foreign sector={sector}");
                    UNKNOWN
                }
            };
            rounds.know(sector, found);
        })?;
        Ok(last)
    }

    fn know(&self, sector: u64, round: u64) {
        self.known.write(sector as usize * 8, round);
    }

    /// One round. Returns whether it was flushed.
    fn round(&mut self, round: u64) -> Result<bool, Failure> {
        let (seed, sectors) = (self.seed, self.sectors);
        let extents = || blocks::extents(seed, round, sectors);
        say!("blocks.round round={round} whole=1");
        until_said();
        self.requests(round, kind::OUT, extents(), |_, _, _| {})?;
        let deadline = Deadline::after_ms(self.timeout_ms);
        let (status, _) = self.blk.request(0, kind::FLUSH, 0, None, deadline)?;
        let is_flushed = status == answer::OK;
        if is_flushed {
            say!(
                "blocks.flushed round={round} refused={} whole=1",
                self.refused
            );
        } else {
            let whole = Extent {
                sector: 0,
                count: 0,
            };
            self.tell_refused(round, "flush", whole, status);
        }
        until_said();
        let mut prng = Prng::new(!seed ^ round);
        let elsewhere = (0..ELSEWHERE).map(move |_| {
            let sector = prng.below(sectors);
            let count = EXTENT_SECTORS_MAX.min(sectors - sector);
            Extent { sector, count }
        });
        let read = extents().chain(elsewhere);
        self.requests(round, kind::IN, read, |rounds, sector, data| {
            let known: u64 = rounds.known.read(sector as usize * 8);
            let found = match blocks::content(rounds.seed, sector, data) {
                Content::Blank => BLANK,
                Content::Round(found) => found,
                Content::Foreign => UNKNOWN,
            };
            if known != UNKNOWN && known != found {
                fail!(
                    "blocks",
                    "kind=data sector={sector} expected={known} found={found}"
                );
            }
        })?;
        Ok(is_flushed)
    }

    fn tell_refused(&mut self, round: u64, what: &str, at: Extent, status: u8) {
        self.refused += 1;
        let Extent { sector, count } = at;
        say!(
            "blocks.refused round={round} op={what} sector={sector} count={count} status={status} whole=1"
        );
        until_said();
    }

    /// Writes what a round writes to some places, or reads them and shows each sector.
    fn requests(
        &mut self,
        round: u64,
        op: u32,
        mut places: impl Iterator<Item = Extent>,
        mut show: impl FnMut(&Self, u64, &[u8]),
    ) -> Result<(), Failure> {
        let mut waiting = None;
        let mut in_flight = 0_usize;
        let mut deadline = Deadline::after_ms(self.timeout_ms);
        loop {
            for index in 0..self.flights.len() {
                if self.flights[index].as_ref().is_some_and(is_busy) {
                    continue;
                }
                let Some(place) = waiting.take().or_else(|| places.next()) else {
                    break;
                };
                if !self.submit(index, round, op, place)? {
                    waiting = Some(place);
                    break;
                }
                in_flight += 1;
            }
            for queue in 0..self.blk.queue_count() {
                self.blk.queue(queue).kick();
            }
            if in_flight == 0 {
                return Ok(());
            }
            let mut progress = 0;
            for queue in 0..self.blk.queue_count() {
                while let Some(used) = self.blk.queue(queue).poll()? {
                    self.blk.queue(queue).release(used.head);
                    let (place, slot) = self.finished(queue, used.head)?;
                    self.complete(round, op, place, slot, &mut show);
                    progress += 1;
                }
            }
            in_flight -= progress;
            if progress > 0 {
                deadline = Deadline::after_ms(self.timeout_ms);
            } else if deadline.passed() {
                return Err(Failure::Timeout("blocks"));
            }
        }
    }

    fn submit(
        &mut self,
        index: usize,
        round: u64,
        op: u32,
        place: Extent,
    ) -> Result<bool, Failure> {
        let queues = self.blk.queue_count();
        let can = self.blk.has(feature::INDIRECT_DESC);
        let Some(flight) = &mut self.flights[index] else {
            return Ok(false);
        };
        let slot = &mut flight.slot;
        let len = place.count as usize * SECTOR;
        let data = &mut slot.data.all_mut()[..len];
        match op {
            kind::OUT => blocks::fill(self.seed, round, place.sector, data),
            _ => data.fill(0xdd),
        }
        slot.prepare(op, place.sector);
        let segments = split::fewest(len as u32, self.blk.limits);
        let segments = segments.ok_or(Failure::Parameter("sectors"))?;
        let (chain, used) = slot.chain(&segments, op == kind::IN);
        let queue = self.blk.queue(index % queues);
        let head = match queue.build(&chain[..used]) {
            None if can => queue.build_indirect(&chain[..used], slot.table()),
            head => head,
        };
        let Some(head) = head else { return Ok(false) };
        queue.offer(head);
        flight.request = Some((index % queues, head, place));
        Ok(true)
    }

    /// The request that a used descriptor ends.
    fn finished(&mut self, queue: usize, head: u16) -> Result<(Extent, Slot), Failure> {
        for flight in self.flights.iter_mut().flatten() {
            if let Some((q, h, place)) = flight.request
                && (q, h) == (queue, head)
            {
                flight.request = None;
                return Ok((place, flight.slot));
            }
        }
        let (what, got, expected) = ("used_id", u64::from(head), 0);
        Err(Failure::Wrong {
            what,
            got,
            expected,
        })
    }

    fn complete(
        &mut self,
        round: u64,
        op: u32,
        place: Extent,
        slot: Slot,
        show: &mut impl FnMut(&Self, u64, &[u8]),
    ) {
        let Extent { sector, count } = place;
        let status = slot.status();
        if op == kind::OUT {
            let known = if status == answer::OK { round } else { UNKNOWN };
            (sector..sector + count).for_each(|sector| self.know(sector, known));
        }
        if status != answer::OK {
            let what = if op == kind::OUT { "write" } else { "read" };
            self.tell_refused(round, what, place, status);
        } else if op == kind::IN {
            let data = slot.data.all().chunks_exact(SECTOR).take(count as usize);
            (sector..)
                .zip(data)
                .for_each(|(sector, data)| show(self, sector, data));
        }
    }
}

fn is_busy(flight: &Flight) -> bool {
    flight.request.is_some()
}
