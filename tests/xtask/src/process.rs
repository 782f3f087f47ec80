//! What /proc tells about a tree of processes.

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};

/// `root` and all its descendants.
pub(crate) fn tree(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(&pid) = tree.get(next) {
        tree.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == pid)
                .map(|(child, _)| child),
        );
        next += 1;
    }
    tree
}

/// The process of `kind` below `root` that is alive.
pub(crate) fn of_kind(root: u32, kind: &str) -> Option<u32> {
    let name = format!("bulkhead-{kind}");
    let is = |pid: &u32| {
        // Empty for one that is dead and not reaped yet.
        let cmdline = fs::read(format!("/proc/{pid}/cmdline"));
        cmdline.is_ok_and(|line| line.split(|byte| *byte == 0).next() == Some(name.as_bytes()))
    };
    tree(root).into_iter().find(is)
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, parentheses included.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Proportional set size of `pid` in KiB, without and within mappings of at least `guest_bytes`,
/// which back guest memory.
pub(crate) fn pss_kib(pid: u32, guest_bytes: u64) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("process {pid}"))?;
    let (mut own, mut guest) = (0, 0);
    let mut is_guest = false;
    for line in smaps.lines() {
        if let Some(size) = mapping_bytes(line) {
            is_guest = size >= guest_bytes;
        } else if let Some(kib) = line.strip_prefix("Pss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
            *(if is_guest { &mut guest } else { &mut own }) += kib;
        }
    }
    Ok((own, guest))
}

/// Memory of `pid` in KiB that no file backs, guest memory included, shared parts divided: what it
/// takes away from MemAvailable.
pub(crate) fn unbacked_kib(pid: u32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .with_context(|| format!("process {pid}"))?;
    let mut sum = 0;
    for line in rollup.lines() {
        let kib = line
            .strip_prefix("Pss_Anon:")
            .or_else(|| line.strip_prefix("Pss_Shmem:"));
        if let Some(kib) = kib {
            sum += kib.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// The size of the mapping that a heading line of smaps names.
fn mapping_bytes(line: &str) -> Option<u64> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    u64::from_str_radix(end, 16).ok()?.checked_sub(start)
}

/// CPU time that `pid` with all its threads has used.
pub(crate) fn cpu_time(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse().ok())
        .map(Duration::from_nanos)
        .sum()
}

/// CPU time that vCPU threads of `pid` have spent in their guest, which is part of [`cpu_time`].
///
/// The kernel counts it in ticks. Those find a thread that seldom sleeps too often, and the kernel corrects a
/// thread's user time for that, but not the part of it that is the guest's: at most all of it is taken.
pub(crate) fn guest_time(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let ticks: u64 = threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok())
        .filter_map(|stat| guest_ticks(&stat))
        .sum();
    Duration::from_secs(ticks) / TICKS_PER_SECOND
}

/// What /proc counts in on every architecture that KVM runs x86 guests on.
const TICKS_PER_SECOND: u32 = 100;

/// The least of fields 14 (user time) and 43 (guest time) of a thread's stat.
fn guest_ticks(stat: &str) -> Option<u64> {
    // The name in parentheses is field 2.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let guest: u64 = fields.nth(28)?.parse().ok()?;
    Some(guest.min(user))
}

/// MemAvailable in KiB, with the free pages that each CPU keeps for itself: the kernel counts those as used,
/// and they are tens of MiB.
pub(crate) fn available_kib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let available: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .context("/proc/meminfo has no MemAvailable")?;
    let kept = kept_pages(&fs::read_to_string("/proc/zoneinfo")?);
    Ok(available + kept * PAGE_KIB)
}

const PAGE_KIB: u64 = 4;

/// Free pages on the lists of CPUs, from `/proc/zoneinfo`.
fn kept_pages(zoneinfo: &str) -> u64 {
    let counts = zoneinfo
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:"));
    counts.filter_map(|n| n.trim().parse::<u64>().ok()).sum()
}

/// Ends `root` with SIGTERM, and what is left of its tree after `patience` with SIGKILL.
pub(crate) fn end_tree(root: u32, patience: Duration) {
    let pids = tree(root);
    let send = |pid: u32, signal| {
        if let Ok(pid) = i32::try_from(pid) {
            // A process that has ended meanwhile is what is wanted.
            let _gone = kill(Pid::from_raw(pid), signal);
        }
    };
    send(root, Signal::SIGTERM);
    let start = Instant::now();
    while start.elapsed() < patience && pids.iter().any(|pid| is_alive(*pid)) {
        std::thread::sleep(Duration::from_millis(5));
    }
    pids.iter()
        .filter(|pid| is_alive(**pid))
        .for_each(|pid| send(*pid, Signal::SIGKILL));
}

fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, s)| !s.starts_with(" Z"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_is_at_most_the_user_time_whatever_the_name_is() {
        let stat = |user: u64, guest: u64| {
            let mut fields: Vec<u64> = (3..=52).collect();
            (fields[14 - 3], fields[43 - 3]) = (user, guest);
            let fields = fields.iter().map(u64::to_string).collect::<Vec<_>>();
            format!("1 (a ) b) {}\n", fields.join(" "))
        };
        assert_eq!(guest_ticks(&stat(700, 600)), Some(600));
        assert_eq!(guest_ticks(&stat(700, 900)), Some(700));
        assert_eq!(guest_ticks(""), None);
    }

    #[test]
    fn pages_that_cpus_keep_are_counted_over_all_zones() {
        let text = "Node 0, zone DMA\n  pagesets\n    cpu: 0\n              count:    1400\n              high:     6\n\
                    Node 0, zone Normal\n  pagesets\n    cpu: 0\n              count:    85\n";
        assert_eq!(kept_pages(text), 1485);
        assert_eq!(kept_pages(""), 0);
    }
}
