//! `memory.kernel_per_vm*`: what the kernel itself holds for a VM.
//!
//! Nothing tells this directly, so it is measured in two ways that check each other:
//!
//! - `memory.kernel_per_vm`: how far MemAvailable falls while a crowd of idle VMs lives, less what of it
//!   their processes own (anonymous and shared memory; the page cache stays available), for each VM.
//!   MemAvailable is the whole machine's, and a compiler beside the benchmark moves it by more than
//!   twenty VMs do, in either direction. A round therefore counts only when the machine was calm: before,
//!   with and after the crowd MemAvailable stands still, and afterwards it is back where it was. The free pages
//!   that each CPU keeps for itself count as available, which the kernel's own figure lacks. What
//!   drifts slowly cancels, because the mean of before and after is the baseline. The first crowd is not
//!   counted: it leaves slabs, caches and per-CPU lists behind that later ones use again.
//! - `memory.kernel_per_vm_charged`: what the kernel has charged to the crowd's control group as its
//!   own (page tables, stacks, slabs, KVM's structures), for each VM. Others do not disturb it, but it
//!   lacks the little that is charged to nobody, such as the control groups themselves.
//!
//! Where no round was calm, or there is no memory controller, that figure is left out and a line on
//! standard error says why: a wrong figure is worse than none.

use super::Print;
use super::figure::Figure;
use super::guest::{Bench, Running, Vmm};
use super::memory::{SETTLE, disk};
use crate::process;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// VMs alive at once.
const CROWD: u32 = 20;
/// MemAvailable stands still when it moves by no more than this, in KiB …
const STILL_KIB: u64 = 512;
/// … over so many looks …
const LOOKS: usize = 8;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
/// … within this time.
const PATIENCE: Duration = Duration::from_secs(4);
/// How far MemAvailable may be from where it was when the crowd has gone: 64 KiB a VM.
const RETURN_KIB: u64 = 64 * CROWD as u64;

/// Measures and prints both figures.
pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let disks: Vec<PathBuf> = (0..CROWD)
        .map(|n| disk(bench, n.into()))
        .collect::<Result<_>>()?;
    let (mut dropped, mut charged) = (Vec::new(), Vec::new());
    round(bench, &disks)?;
    for number in 0..bench.runs * 2 {
        // Where it was never calm, it is not going to be.
        if dropped.len() >= bench.runs as usize || (number >= bench.runs && dropped.is_empty()) {
            break;
        }
        let round = round(bench, &disks)?;
        dropped.extend(round.dropped_kib);
        charged.extend(round.charged_kib);
    }
    publish(print, "memory.kernel_per_vm", dropped, bench.runs, CALM)?;
    let why = "there is no memory controller that this process may use";
    publish(
        print,
        "memory.kernel_per_vm_charged",
        charged,
        bench.runs,
        why,
    )
}

const CALM: &str = "other work moved this machine's MemAvailable in the other rounds";

fn publish(
    print: &mut Print<'_>,
    name: &'static str,
    values: Vec<f64>,
    wanted: u32,
    why: &str,
) -> Result<()> {
    if values.len() < wanted as usize {
        eprintln!("{name}: {} of {wanted} rounds: {why}", values.len());
    }
    if values.is_empty() {
        return Ok(());
    }
    print(Figure::new(name, "KiB", values, Vec::new()))
}

/// What one crowd told, for each VM.
struct Round {
    /// None when the machine was not calm.
    dropped_kib: Option<f64>,
    /// None without a memory controller.
    charged_kib: Option<f64>,
}

fn round(bench: &Bench, disks: &[PathBuf]) -> Result<Round> {
    let group = Group::make();
    let before = calm_kib()?;
    let crowd = start(bench, disks, group.as_ref())?;
    sleep(SETTLE);
    let with = calm_kib()?;
    let user = user_kib(&crowd)?;
    let charged = group.as_ref().map(Group::kernel_kib).transpose()?;
    drop(crowd);
    sleep(SETTLE);
    let after = calm_kib()?;
    let each = |kib: f64| kib / f64::from(CROWD);
    Ok(Round {
        dropped_kib: drop_kib(before, with, after).map(|kib| each(kib - user)),
        charged_kib: charged.map(each),
    })
}

fn start(bench: &Bench, disks: &[PathBuf], group: Option<&Group>) -> Result<Vec<Running>> {
    let _charged = group.map(Group::enter).transpose()?;
    let mut crowd = Vec::new();
    for disk in disks {
        let mut running = bench.start(Vmm::Bulkhead, "mode=idle", Some(disk))?;
        running.record("idle")?;
        crowd.push(running);
    }
    Ok(crowd)
}

#[expect(clippy::cast_precision_loss, reason = "KiB of a few processes")]
fn user_kib(crowd: &[Running]) -> Result<f64> {
    let mut kib = 0;
    for running in crowd {
        for pid in process::tree(running.pid()) {
            kib += process::unbacked_kib(pid)?;
        }
    }
    Ok(kib as f64)
}

/// How far MemAvailable fell, when all three values are there and the last is near the first.
#[expect(clippy::cast_precision_loss, reason = "KiB of a machine's memory")]
fn drop_kib(before: Option<u64>, with: Option<u64>, after: Option<u64>) -> Option<f64> {
    let (before, with, after) = (before?, with?, after?);
    (before.abs_diff(after) <= RETURN_KIB)
        .then(|| f64::midpoint(before as f64, after as f64) - with as f64)
}

/// MemAvailable once it stands still; None when it does not.
fn calm_kib() -> Result<Option<u64>> {
    let start = Instant::now();
    let mut seen = Vec::new();
    while start.elapsed() < PATIENCE {
        seen.push(process::available_kib()?);
        if let Some(still) = still_kib(&seen) {
            return Ok(Some(still));
        }
        sleep(BETWEEN_LOOKS);
    }
    Ok(None)
}

/// The last value, when the last ones are near each other.
fn still_kib(seen: &[u64]) -> Option<u64> {
    let last = seen.get(seen.len().checked_sub(LOOKS)?..)?;
    let (least, most) = (last.iter().min()?, last.iter().max()?);
    (most - least <= STILL_KIB)
        .then(|| last.last().copied())
        .flatten()
}

/// A control group of the memory controller for one crowd. Dropped, it is removed.
struct Group {
    directory: PathBuf,
    home: PathBuf,
    is_unified: bool,
}

impl Group {
    /// None where there is no controller, or no right to make groups of it.
    fn make() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let (root, path, is_unified) = memory_hierarchy(&mounts, &own)?;
        let home = root.join(path.trim_start_matches('/'));
        // A group of a unified hierarchy that holds processes cannot have limited children.
        let parent = if is_unified { &root } else { &home };
        let directory = parent.join(format!("bench-of-bulkhead-{}", std::process::id()));
        fs::create_dir(&directory).ok()?;
        Some(Self {
            directory,
            home,
            is_unified,
        })
    }

    /// Has what this process starts from here on charged to the group, until dropped.
    fn enter(&self) -> Result<Stay<'_>> {
        join(&self.directory)?;
        Ok(Stay { home: &self.home })
    }

    #[expect(clippy::cast_precision_loss, reason = "KiB of a few processes")]
    fn kernel_kib(&self) -> Result<f64> {
        let bytes = if self.is_unified {
            let text = fs::read_to_string(self.directory.join("memory.stat"))?;
            text.lines()
                .find_map(|line| line.strip_prefix("kernel ")?.parse::<u64>().ok())
                .context("memory.stat has no `kernel`")?
        } else {
            let file = self.directory.join("memory.kmem.usage_in_bytes");
            fs::read_to_string(file)?.trim().parse()?
        };
        Ok(bytes as f64 / 1024.0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Groups of processes that were still ending when their broker removed its own.
        let children = fs::read_dir(&self.directory).into_iter().flatten();
        for child in children
            .flatten()
            .filter(|c| c.file_type().is_ok_and(|t| t.is_dir()))
        {
            let _busy = fs::remove_dir(child.path());
        }
        if let Err(error) = fs::remove_dir(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

/// This process in a crowd's group.
struct Stay<'a> {
    home: &'a Path,
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if let Err(error) = join(self.home) {
            eprintln!("{error:#}");
        }
    }
}

fn join(directory: &Path) -> Result<()> {
    fs::write(
        directory.join("cgroup.procs"),
        std::process::id().to_string(),
    )
    .with_context(|| format!("cannot enter {}", directory.display()))
}

/// Where the memory controller is mounted, this process's group there, and whether the hierarchy is
/// the unified one.
fn memory_hierarchy(mounts: &str, own: &str) -> Option<(PathBuf, String, bool)> {
    let mounted = |kind: &str, option: Option<&str>| {
        mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let [_, at, found, options, ..] = fields.as_slice() else {
                return None;
            };
            let has = option.is_none_or(|wanted| options.split(',').any(|o| o == wanted));
            (*found == kind && has).then(|| PathBuf::from(at))
        })
    };
    let group = |wanted: &str| {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers
                .split(',')
                .any(|c| c == wanted)
                .then(|| path.to_owned())
        })
    };
    if let (Some(root), Some(path)) = (mounted("cgroup", Some("memory")), group("memory")) {
        return Some((root, path, false));
    }
    let root = mounted("cgroup2", None)?;
    let controllers = fs::read_to_string(root.join("cgroup.subtree_control")).ok()?;
    let has = controllers.split_whitespace().any(|c| c == "memory");
    has.then_some((root, group("")?, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_counts_only_when_memory_comes_back() {
        assert_eq!(
            drop_kib(Some(90_000), Some(50_000), Some(90_000)),
            Some(40_000.0)
        );
        assert_eq!(
            drop_kib(Some(90_000), Some(50_000), Some(89_000)),
            Some(39_500.0)
        );
        assert_eq!(drop_kib(Some(90_000), Some(50_000), Some(99_000)), None);
        assert_eq!(drop_kib(Some(90_000), None, Some(90_000)), None);
    }

    #[test]
    fn memory_stands_still_when_the_last_looks_agree() {
        assert_eq!(still_kib(&[7; LOOKS]), Some(7));
        assert_eq!(still_kib(&[7; LOOKS - 1]), None);
        let mut moved = vec![1000; LOOKS];
        moved.push(1000 + STILL_KIB + 1);
        assert_eq!(still_kib(&moved), None);
        moved.extend([1513; LOOKS]);
        assert_eq!(still_kib(&moved), Some(1513));
    }

    #[test]
    fn separate_memory_hierarchy_is_found() {
        let mounts = "cgroup /c/cpu cgroup rw,cpu 0 0\ncgroup /c/mem cgroup rw,memory 0 0\n";
        let own = "4:memory:/a/b\n1:cpu:/\n0::/\n";
        let expected = (PathBuf::from("/c/mem"), "/a/b".to_owned(), false);
        assert_eq!(memory_hierarchy(mounts, own), Some(expected));
        assert_eq!(
            memory_hierarchy("cgroup /c/cpu cgroup rw,cpu 0 0\n", own),
            None
        );
    }
}
