//! Ways to kill or spoil a process of a machine, and how `bulkhead run` says what came of it.

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use std::fs::{self, File};

/// A process that took another's place, as `bulkhead run` tells on standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// Name of the device.
    pub name: String,
    /// Pid of the new process.
    pub pid: u32,
    /// Its generation.
    pub generation: u32,
    /// Its program's version.
    pub version: String,
    /// Time from the death to service in microseconds.
    pub after_us: u64,
    /// Why the one before died.
    pub reason: String,
}

impl Restart {
    /// All restarts that `errors` tells of.
    #[must_use]
    pub fn all(errors: &str) -> Vec<Self> {
        errors.lines().filter_map(Self::parse).collect()
    }

    fn parse(line: &str) -> Option<Self> {
        let rest = line.trim().strip_prefix("bulkhead: restarted: ")?;
        let (name, rest) = rest.split_once(" is served by process ")?;
        let (pid, rest) = rest.split_once(" (generation ")?;
        let (generation, rest) = rest.split_once(", version ")?;
        let (version, rest) = rest.split_once(") after ")?;
        let (after_us, reason) = rest.split_once(" us: ")?;
        Some(Self {
            name: name.to_owned(),
            pid: pid.parse().ok()?,
            generation: generation.parse().ok()?,
            version: version.to_owned(),
            after_us: after_us.parse().ok()?,
            reason: reason.to_owned(),
        })
    }
}

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
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .expect("memory of a process, for root");
    let start = u64::from_str_radix(start, 16).expect("an address");
    (memory, start)
}
