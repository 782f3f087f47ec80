//! `memory`: whether all of the memory in the map is there, once. Writes a word at about `count=`
//! places all over it and near the end of each range, lets the entropy device write at the very end,
//! then reads all back. (Every page is too much: a host may need 20 ms to provide 2 MiB.)

use bulkhead_guest::prng;
use bulkhead_guest::pvh::MEMORY_RAM;

use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::phys::{self, LARGE_PAGE};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, feature, id};
use crate::virtio::queue::Segment;

const FOUR_GIB: u64 = 1 << 32;
/// How many places are tested, at most about so many.
const COUNT: u64 = 256;
const DMA_LEN: u64 = 64;

/// Where one step of a range is tested: a word that differs from step to step.
fn spot(address: u64) -> u64 {
    address + prng::mix(address) % (LARGE_PAGE / 8) * 8
}

/// Writes, then reads.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let ram = || {
        machine
            .memory()
            .iter()
            .filter(|range| range.kind == MEMORY_RAM)
    };
    let end = ram()
        .map(|range| range.start + range.len)
        .max()
        .unwrap_or(0);
    phys::map_beyond_4_gib(end);
    let device = mmio::find(machine, id::RNG, 0).ok();
    let queue = match device {
        Some(device) => {
            let queue = device.queue(0, device.negotiate(feature::EVENT_IDX)?)?;
            device.start()?;
            Some(queue)
        }
        None => None,
    };
    // What has been allocated by now is not free.
    let start = phys::heap_mark();
    let free = |address: u64| address >= FOUR_GIB || (start..phys::heap_end()).contains(&address);
    let count = machine.number("count", COUNT)?.max(1);
    let stride = (super::hello::ram_bytes(machine) / count).next_multiple_of(LARGE_PAGE);
    let spots = || {
        ram().flat_map(|range| {
            let first = range.start.next_multiple_of(LARGE_PAGE);
            let whole = (range.start + range.len).saturating_sub(first) / LARGE_PAGE * LARGE_PAGE;
            let last = (whole > 0).then(|| spot(first + whole - LARGE_PAGE));
            let steps = whole.saturating_sub(LARGE_PAGE).div_ceil(stride);
            (0..steps)
                .map(move |step| spot(first + step * stride))
                .chain(last)
        })
    };
    let (mut touched, mut wrong) = (0_u64, 0_u64);
    for address in spots().filter(|address| free(*address)) {
        phys::write(address, prng::mix(address));
        touched += 1;
    }
    if let Some(mut queue) = queue {
        let target = Segment {
            address: end - DMA_LEN,
            len: DMA_LEN as u32,
            write: true,
        };
        let used = queue.transfer(&[target], Deadline::after_ms(super::timeout_ms(machine)?))?;
        let words = (0..DMA_LEN / 8).map(|word| phys::read::<u64>(target.address + 8 * word));
        let zeros = words.filter(|word| *word == 0).count();
        say!(
            "memory.dma address={:#x} bytes={} zero_words={zeros}",
            target.address,
            used.len
        );
        expect("dma_bytes", u64::from(used.len), DMA_LEN)?;
        expect("dma_zero_words", zeros as u64, 0)?;
    }
    for address in spots().filter(|address| free(*address)) {
        if phys::read::<u64>(address) != prng::mix(address) {
            wrong += 1;
            if wrong <= 8 {
                fail!("memory", "kind=data address={address:#x}");
            }
        }
    }
    say!(
        "memory ranges={} end={end:#x} touched={touched} wrong={wrong} stride={stride}",
        ram().count()
    );
    expect("wrong_words", wrong, 0)
}
