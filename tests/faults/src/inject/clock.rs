//! Clocks that jump: for one process the time of day is another from one moment to the next, as when
//! somebody sets the host's clock.
//!
//! Processes read clocks without a system call, from the vDSO. Its function is replaced in the one process
//! (its pages are the process's own once they are written) by one that asks the kernel, and so the
//! harness, which answers with a time of day that is off. Other clocks are the kernel's.

use super::{Engine, locked};
use crate::notify::{Notification, read, write};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSymbol};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

/// Every name of the function.
const NAME: &str = "__vdso_clock_gettime";
/// `mov eax, 228; syscall; ret`: its arguments are where the kernel wants them.
const ASKS: [u8; 8] = [0xb8, 0xe4, 0x00, 0x00, 0x00, 0x0f, 0x05, 0xc3];
const NS_PER_S: i128 = 1_000_000_000;

/// From now on the time of day of process `pid` is `by_ms` later than it was, or earlier.
///
/// # Errors
/// When it is gone, or has no vDSO of this sort.
pub(super) fn jump(engine: &Engine, pid: i32, by_ms: i64) -> io::Result<()> {
    let mut offsets = locked(&engine.clocks);
    let is_first = !offsets.contains_key(&pid);
    let offset = offsets.entry(pid).or_default();
    *offset = offset.saturating_add(by_ms);
    drop(offsets);
    if is_first && let Err(error) = ask(pid) {
        locked(&engine.clocks).remove(&pid);
        return Err(error);
    }
    Ok(())
}

/// Has the process ask for each time that it wants to know.
fn ask(pid: i32) -> io::Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]"));
    let range = line.and_then(|line| line.split(' ').next()?.split_once('-'));
    let (first, end) = range.ok_or_else(|| io::Error::other("it has no vDSO"))?;
    let number = |text| u64::from_str_radix(text, 16).map_err(io::Error::other);
    let (first, end) = (number(first)?, number(end)?);
    let len = usize::try_from(end - first).map_err(io::Error::other)?;
    let vdso = read(pid, first, len)?;
    let offset = function(&vdso)?;
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    memory.write_all_at(&ASKS, first + offset)
}

/// Where the function is in a vDSO.
fn function(vdso: &[u8]) -> io::Result<u64> {
    let elf = ElfFile64::<object::LittleEndian>::parse(vdso).map_err(io::Error::other)?;
    let symbol = elf.dynamic_symbols().find(|s| s.name() == Ok(NAME));
    let symbol = symbol.ok_or_else(|| io::Error::other("its vDSO has no clock"))?;
    Ok(symbol.address())
}

/// Whether the clock shows the time of day.
const fn is_time_of_day(clock: i32) -> bool {
    matches!(
        clock,
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE | libc::CLOCK_TAI
    )
}

/// A process asks what time it is.
pub(super) fn asked(engine: &Engine, pid: i32, n: Notification) {
    let offset = locked(&engine.clocks).get(&pid).copied();
    let clock = i32::try_from(n.arguments[0]).unwrap_or(-1);
    let Some(offset) = offset.filter(|_| is_time_of_day(clock)) else {
        return n.go_on();
    };
    match tell(&n, clock, offset) {
        Ok(()) => n.returns(0),
        Err(errno) => n.fails(errno),
    }
}

fn tell(n: &Notification, clock: i32, offset_ms: i64) -> Result<(), Errno> {
    let now = clock_gettime(ClockId::from_raw(clock))?;
    let ns = i128::from(now.tv_sec()) * NS_PER_S + i128::from(now.tv_nsec());
    let ns = (ns + i128::from(offset_ms) * 1_000_000).max(0);
    let seconds = i64::try_from(ns / NS_PER_S).map_err(|_| Errno::EOVERFLOW)?;
    let rest = i64::try_from(ns % NS_PER_S).map_err(|_| Errno::EOVERFLOW)?;
    let bytes = [seconds.to_ne_bytes(), rest.to_ne_bytes()].concat();
    write(n.thread, n.arguments[1], &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_of_this_kernels_vdso_is_found_and_code_fits() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
        let (first, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let (first, end) = (number(first), number(end));
        let pid = std::process::id().cast_signed();
        let vdso = read(pid, first, usize::try_from(end - first).unwrap()).unwrap();
        let at = usize::try_from(function(&vdso).unwrap()).unwrap();
        assert!(at + ASKS.len() < vdso.len());
    }
}
