//! `counter` and `dirty`: memory that keeps changing in ways that can be checked, for snapshots,
//! clones and migration.

use bulkhead_guest::prng;

use crate::machine::Machine;
use crate::report::{Failure, fail, say};
use crate::sys::phys::{self, Dma};
use crate::sys::{irq, time};

/// Where `counter` and `pace` publish; the host may read it at any time.
pub(super) const PUBLISHED: u64 = 0x1f_f000;
const MAGIC: u64 = u64::from_le_bytes(*b"BHCOUNT1");
const PAGE: usize = 4096;
const MIB: u64 = 1 << 20;

/// Writes the words of one page, all a function of seed, page and generation.
pub(super) fn fill_page(memory: Dma, page: usize, seed: u64, generation: u64) {
    let mut memory = memory.part(page * PAGE, PAGE);
    let key = prng::at(seed ^ generation << 32, page as u64);
    for (index, word) in memory.all_mut().chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&key.wrapping_add(index as u64).to_le_bytes());
    }
}

pub(super) fn page_is_right(memory: Dma, page: usize, seed: u64, generation: u64) -> bool {
    let key = prng::at(seed ^ generation << 32, page as u64);
    let memory = memory.part(page * PAGE, PAGE);
    let mut words = memory.all().chunks_exact(8).enumerate();
    words.all(|(index, word)| word == key.wrapping_add(index as u64).to_le_bytes())
}

pub(super) fn working_memory(machine: &Machine, default: u64) -> Result<Dma, Failure> {
    let size = machine.number("size", default)?;
    if size < PAGE as u64 || size > phys::heap_left() {
        return Err(Failure::Parameter("size"));
    }
    Ok(phys::allocate(size as usize & !(PAGE - 1)))
}

/// Counts rounds; each verifies all of the working memory and gives it a new generation.
pub fn counter(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let seconds = machine.number("seconds", 0)?;
    let interval_ms = machine.number("interval", 1000)?;
    let memory = working_memory(machine, 16 * MIB)?;
    let pages = memory.len / PAGE;
    for page in 0..pages {
        fill_page(memory, page, seed, 0);
    }
    say!("counter address={PUBLISHED:#x} pages={pages} seed={seed} seconds={seconds}");
    let khz = time::khz();
    let start = time::cycles();
    let (mut round, mut bad_pages, mut said) = (0_u64, 0_u64, start);
    phys::write(PUBLISHED + 8, round);
    phys::write(PUBLISHED, MAGIC);
    loop {
        for page in 0..pages {
            if !page_is_right(memory, page, seed, round) {
                bad_pages += 1;
                fail!("counter", "kind=data page={page} round={round}");
            }
            fill_page(memory, page, seed, round + 1);
        }
        round += 1;
        let now = time::cycles();
        phys::write(PUBLISHED + 16, now);
        phys::write(PUBLISHED + 24, bad_pages);
        phys::write(PUBLISHED + 32, pages as u64);
        phys::write(PUBLISHED + 8, round);
        if now.wrapping_sub(said) > interval_ms * khz {
            said = now;
            say!(
                "counter.round value={round} bad_pages={bad_pages} cycles={}",
                now - start
            );
        }
        if seconds != 0 && now.wrapping_sub(start) > seconds.saturating_mul(1000 * khz) {
            say!("counter.end value={round} bad_pages={bad_pages}");
            return Ok(());
        }
    }
}

/// Writes to pages one after the other at `rate=` MiB a second.
pub fn dirty(machine: &Machine) -> Result<(), Failure> {
    let rate = machine.number("rate", 64)?;
    let seconds = machine.number("seconds", 10)?;
    if rate == 0 {
        return Err(Failure::Parameter("rate"));
    }
    let memory = working_memory(machine, 64 * MIB)?;
    let pages = (memory.len / PAGE) as u64;
    say!(
        "dirty address={:#x} pages={pages} rate_mib={rate} seconds={seconds}",
        memory.address
    );
    let khz = time::khz();
    let start = time::cycles();
    let mut written = 0_u64;
    loop {
        let elapsed_ms = time::cycles().wrapping_sub(start) / khz;
        if seconds != 0 && elapsed_ms >= seconds.saturating_mul(1000) {
            break;
        }
        let due = elapsed_ms * rate * (MIB / PAGE as u64) / 1000;
        while written < due {
            memory.write((written % pages) as usize * PAGE, written);
            written += 1;
        }
        irq::sleep_ms(1);
    }
    // Every page still holds the number of the last write to it.
    let wrong = (0..pages.min(written)).filter(|page| {
        let last = (written - 1 - page) / pages * pages + page;
        memory.read::<u64>(*page as usize * PAGE) != last
    });
    let wrong = wrong.count();
    say!("dirty.end pages_written={written} wrong={wrong}");
    crate::report::expect("wrong_pages", wrong as u64, 0)
}
