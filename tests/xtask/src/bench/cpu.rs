//! CPU time of all processes of a VM, over an interval in which its load is steady.
//!
//! Counted is what the scheduler gave to any thread of any process below the one that was started: for Bulkhead
//! the broker, the vCPU process and every device process, for QEMU its one process with all its threads, which
//! are those of vCPU, iothread and io_uring's workers. Spinning counts, the guest's own included. Nothing is
//! subtracted in [`Cores::all`]. From [`Cores::host`] the time is left out, on both sides, in which a vCPU was
//! in the guest, as well as the kernel knows that (see [`process::guest_time`]). Kernel threads that belong to no
//! process are counted on neither side.

use crate::process;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How many CPUs were busy with a VM, on average.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cores {
    /// In all.
    pub(super) all: f64,
    /// Outside of the guest.
    pub(super) host: f64,
}

/// Watches the processes below `root` for so long.
pub(super) fn watch(root: u32, interval: Duration) -> Cores {
    // Looked for once: a walk through all of /proc takes a while.
    let pids = process::tree(root);
    let sum = |of: fn(u32) -> Duration| -> Duration { pids.iter().copied().map(of).sum() };
    let spent = || (sum(process::cpu_time), sum(process::guest_time));
    let (start, before) = (Instant::now(), spent());
    sleep(interval);
    let (elapsed, after) = (start.elapsed(), spent());
    cores(before, after, elapsed)
}

fn cores(before: (Duration, Duration), after: (Duration, Duration), elapsed: Duration) -> Cores {
    let all = after.0.saturating_sub(before.0);
    let guest = after.1.saturating_sub(before.1);
    let elapsed = elapsed.as_secs_f64();
    Cores {
        all: all.as_secs_f64() / elapsed,
        host: all.saturating_sub(guest).as_secs_f64() / elapsed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_the_guest_is_part_of_all_and_not_of_the_hosts() {
        let ms = Duration::from_millis;
        let cores = cores((ms(1000), ms(400)), (ms(2500), ms(1400)), ms(1000));
        assert!((cores.all - 1.5).abs() < 1e-9);
        assert!((cores.host - 0.5).abs() < 1e-9);
    }
}
