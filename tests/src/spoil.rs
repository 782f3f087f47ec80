//! Ways to kill or spoil a process of a machine.

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::fs::{self, File};

/// Sends a signal to a process, which may be dead already.
pub fn signal_process(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
    let _already_dead = nix::sys::signal::kill(pid, signal);
}

/// Kills a process.
pub fn kill(pid: u32) {
    signal_process(pid, Signal::SIGKILL);
}

/// The memory of a process, and the address of its window.
///
/// # Panics
/// When it has none.
#[must_use]
pub fn window_of(pid: u32) -> (File, u64) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process is alive");
    let line = maps
        .lines()
        .find(|line| line.contains("bulkhead-window"))
        .expect("a device process has a window");
    let start = line.split('-').next().expect("a range of addresses");
    let start = u64::from_str_radix(start, 16).expect("an address");
    (memory_of(pid), start)
}

/// The memory of a process, at its own addresses.
pub(crate) fn memory_of(pid: u32) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .expect("memory of a process, for root")
}
