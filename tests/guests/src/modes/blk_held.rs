//! `blk-held`: one write to `sector=` that may take long, with entropy read and told of meanwhile; then
//! another write to the same place, which must be what is read back. A first write that comes late
//! would be found there.

use bulkhead_guest::pattern::{self, SECTOR};
use bulkhead_guest::split;

use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::phys;
use crate::sys::time::Deadline;
use crate::virtio::blk::{Blk, Slot, WANTED, answer, kind};
use crate::virtio::mmio::{self, id};
use crate::virtio::queue::{Queue, Segment};

const SECTORS: usize = 8;
/// Requests to the entropy source between two records.
const TELL_EVERY: u64 = 4096;

/// Writes, waits, writes, reads.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let sector = machine.number("sector", 2048)?;
    let timeout_ms = super::timeout_ms(machine)?;
    let mut blk = Blk::open(machine, machine.number("disk", 0)?, WANTED)?;
    let source = mmio::find(machine, id::RNG, 0)?;
    let features = source.negotiate(0)?;
    let mut entropy = source.queue(0, features)?;
    source.start()?;

    let mut slot = Slot::new(SECTORS * SECTOR);
    pattern::fill(seed, sector, slot.data.all_mut());
    slot.prepare(kind::OUT, sector);
    let segments = split::fewest((SECTORS * SECTOR) as u32, blk.limits);
    let segments = segments.ok_or(Failure::Parameter("size_max"))?;
    let (chain, used) = slot.chain(&segments, false);
    let chain = &chain[..used];
    let queue = blk.queue(0);
    let head = queue.build(chain).ok_or(Failure::Parameter("queue_size"))?;
    queue.offer(head);
    queue.kick();
    let beside = beside(queue, &mut entropy, timeout_ms)?;
    expect(
        "held_status",
        u64::from(slot.status()),
        u64::from(answer::OK),
    )?;

    let deadline = || Deadline::after_ms(timeout_ms);
    pattern::fill(seed + 1, sector, slot.data.all_mut());
    let data = Some(Segment::readable(slot.data));
    let (status, _) = blk.request(0, kind::OUT, sector, data, deadline())?;
    expect("write_status", u64::from(status), u64::from(answer::OK))?;
    let mut read = phys::allocate(SECTORS * SECTOR);
    read.all_mut().fill(0xdd);
    let data = Some(Segment::writable(read));
    let (status, _) = blk.request(0, kind::IN, sector, data, deadline())?;
    expect("read_status", u64::from(status), u64::from(answer::OK))?;
    if let Some(bad) = pattern::first_difference(seed + 1, sector, read.all()) {
        fail!("blk-held", "kind=data sector={bad}");
    }
    say!("blk-held.end beside={beside} seed={}", seed + 1);
    Ok(())
}

/// Reads entropy until the request in flight is answered. Returns how often.
fn beside(disk: &mut Queue, entropy: &mut Queue, timeout_ms: u64) -> Result<u64, Failure> {
    let buffer = phys::allocate(64);
    let deadline = Deadline::after_ms(timeout_ms);
    let mut beside = 0_u64;
    loop {
        if let Some(used) = disk.poll()? {
            disk.release(used.head);
            return Ok(beside);
        }
        if deadline.passed() {
            return Err(Failure::Timeout("held"));
        }
        entropy.transfer(&[Segment::writable(buffer)], Deadline::after_ms(timeout_ms))?;
        beside += 1;
        if beside.is_multiple_of(TELL_EVERY) {
            say!("blk-held.beside requests={beside}");
        }
    }
}
