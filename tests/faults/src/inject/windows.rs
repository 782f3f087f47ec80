//! Faults on what a device process shares with the gate: random bytes, as a process that has lost its
//! mind would write them.

use crate::random::Dice;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

/// Names of the shared memory, as they stand in a process's map.
const NAMES: [&str; 2] = ["bulkhead-window", "bulkhead-legacy"];

/// Bytes at the begin of a window that hold its header and most of its rings.
const RINGS: u64 = 16 << 10;

/// Spoils `bytes` of the window of a device process, one byte at a place that the seed draws.
///
/// # Errors
/// When it has no window or is gone.
pub fn spoil(pid: i32, bytes: u64, seed: u64) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let window = maps
        .lines()
        .find(|line| NAMES.iter().any(|name| line.contains(name)));
    let range = window.and_then(|line| line.split(' ').next()?.split_once('-'));
    let (first, end) = range.ok_or_else(|| io::Error::other("it has no window"))?;
    let number = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
    let (first, end) = (number(first)?, number(end)?);
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
        memory.write_all_at(&[byte], at)?;
    }
    Ok(end - first)
}
