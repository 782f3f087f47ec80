//! Faults on what a device process shares with the gate: random bytes, as a process that has lost its
//! mind would write them, and what changes while it is read.

use crate::random::Dice;
use bulkhead_ipc::shared::SharedMemory;
use bulkhead_ipc::window::{QueueLayout, WindowLayout};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Names of the shared memory, as they stand in a process's map.
const NAMES: [&str; 2] = ["bulkhead-window", "bulkhead-legacy"];

/// Bytes at the begin of a window that hold its header and most of its rings.
const RINGS: u64 = 16 << 10;

/// Used elements before the newest one that are shaken with it.
const SHAKEN: u16 = 4;
/// How long a shaken element holds nonsense, in turns of an idle loop: long enough for another processor to see it.
const NONSENSE_TURNS: u32 = 40;

/// How often the index is shaken: one turn in so many.
const INDEX_ONE_IN: u64 = 8;
/// How long an element is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where a process has its window: first address and the one after the last.
fn range(pid: i32) -> io::Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let window = maps
        .lines()
        .find(|line| NAMES.iter().any(|name| line.contains(name)));
    let range = window.and_then(|line| line.split(' ').next()?.split_once('-'));
    let (first, end) = range.ok_or_else(|| io::Error::other("it has no window"))?;
    let number = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
    Ok((number(first)?, number(end)?))
}

/// Spoils `bytes` of the window of a device process, one byte at a place that the seed draws.
///
/// # Errors
/// When it has no window or is gone.
pub fn spoil(pid: i32, bytes: u64, seed: u64) -> io::Result<u64> {
    let (first, end) = range(pid)?;
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    let mut dice = Dice::new(seed);
    for n in 0..bytes {
        // Half of them where headers and rings are, which are small.
        let last = if n % 2 == 0 {
            end
        } else {
            end.min(first + RINGS)
        } - 1;
        let at = dice.between(first, last);
        let byte = u8::try_from(dice.between(0, 255)).unwrap_or(0);
        match memory.write_all_at(&[byte], at) {
            // The first ones may end the process.
            Err(_) if n > 0 => break,
            written => written?,
        }
    }
    Ok(end - first)
}

/// For `time`, the lengths in the newest used elements of a virtio device's queues are nonsense and right
/// again, again and again, and now and then the used index: whoever looks twice sees two things. Blocks, at least until there is an element,
/// for [`PATIENCE`] at most; returns how often.
///
/// # Errors
/// When the process has no window with queues of these sizes, or is gone.
pub fn shake(pid: i32, queue_sizes: &[u16], time: Duration, seed: u64) -> io::Result<u64> {
    let (first, end) = range(pid)?;
    let bytes = usize::try_from(end - first).map_err(io::Error::other)?;
    let layout = WindowLayout::new(bytes, queue_sizes).map_err(io::Error::other)?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/map_files/{first:x}-{end:x}"))?;
    let memory = SharedMemory::map(file.into(), end - first).map_err(io::Error::other)?;
    let until = Instant::now() + time;
    let mut shaken = 0;
    let has_time = |shaken| {
        let now = Instant::now();
        now < until || shaken == 0 && now < until + PATIENCE
    };
    let mut dice = Dice::new(seed);
    while has_time(shaken) {
        for queue in &layout.queues {
            if shaken > 0 && dice.between(1, INDEX_ONE_IN) == 1 {
                shake_index(&memory, queue);
            }
            for back in 0..SHAKEN {
                shaken += u64::from(shake_one(&memory, queue, back));
            }
        }
    }
    Ok(shaken)
}

/// Shakes the used index of a queue: more than can be in flight are done, and then not.
fn shake_index(memory: &SharedMemory, queue: &QueueLayout) {
    let at = queue.used_ring + 2;
    let right = memory.load::<u16>(at, Ordering::Acquire);
    let nonsense = right.wrapping_add(queue.slots + 1);
    memory.store(at, nonsense, Ordering::Release);
    for _ in 0..NONSENSE_TURNS {
        std::hint::spin_loop();
    }
    // Whoever has moved on meanwhile has its own there.
    if memory.load::<u16>(at, Ordering::Relaxed) == nonsense {
        memory.store(at, right, Ordering::Release);
    }
}

/// Shakes the used element `back` before the newest one, if there is one.
fn shake_one(memory: &SharedMemory, queue: &QueueLayout, back: u16) -> bool {
    let index = memory.load::<u16>(queue.used_ring + 2, Ordering::Acquire);
    if index <= back {
        return false;
    }
    let place = usize::from((index - 1 - back) & (queue.descriptors - 1));
    let at = queue.used_ring + 4 + 8 * place + 4;
    let right = memory.load::<u32>(at, Ordering::Relaxed);
    memory.store(at, u32::MAX, Ordering::Release);
    for _ in 0..NONSENSE_TURNS {
        std::hint::spin_loop();
    }
    // Whoever has renewed the rings meanwhile has its own there.
    if memory.load::<u32>(at, Ordering::Relaxed) == u32::MAX {
        memory.store(at, right, Ordering::Release);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::shared::sealed_memfd;

    #[test]
    fn shaken_element_is_right_again_afterwards() {
        let layout = WindowLayout::new(1 << 20, &[64]).unwrap();
        let memory = sealed_memfd("t", 1 << 20).unwrap();
        let memory = SharedMemory::map(memory, 1 << 20).unwrap();
        let queue = layout.queues[0];
        assert!(!shake_one(&memory, &queue, 0));
        memory.store(queue.used_ring + 2, 2u16, Ordering::Relaxed);
        memory.store(queue.used_ring + 4 + 8 + 4, 513u32, Ordering::Relaxed);
        assert!(shake_one(&memory, &queue, 0) && shake_one(&memory, &queue, 1));
        assert!(!shake_one(&memory, &queue, 2));
        let after = memory.load::<u32>(queue.used_ring + 4 + 8 + 4, Ordering::Relaxed);
        assert_eq!(after, 513);
    }
}
