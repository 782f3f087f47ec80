//! `memory.*` and `idle.cpu`: what a VM costs the host beside the guest's own memory.

use super::Print;
use super::figure::Figure;
use super::guest::{Bench, MEMORY_MIB, Running, Vmm};
use super::kernel_memory;
use crate::process;
use anyhow::{Context, Result};
use std::fs::File;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time for start-up to be over after the guest has gone idle.
pub(super) const SETTLE: Duration = Duration::from_millis(700);
/// How long the CPU time of what is idle is watched.
pub(super) const IDLE: Duration = Duration::from_secs(3);

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let disk = disk(bench, 0)?;
    let mut without_broker = Vec::new();
    let (ours, peer) = bench.alternate(|vmm| {
        let running = idle(bench, vmm, &disk)?;
        let (root, rest) = user_kib(&running)?;
        if vmm == Vmm::Bulkhead {
            without_broker.push(rest);
        }
        Ok(root + rest)
    })?;
    without_broker.remove(0);
    print(Figure::new("memory.overhead", "KiB", ours, peer))?;
    print(Figure::new(
        "memory.overhead_per_vm",
        "KiB",
        without_broker,
        Vec::new(),
    ))?;
    kernel_memory::run(bench, print)?;
    let (ours, peer) = bench.alternate(|vmm| {
        let running = idle(bench, vmm, &disk)?;
        Ok(idle_percent(&running))
    })?;
    print(Figure::new("idle.cpu", "%", ours, peer))
}

/// A sparse disk on tmpfs.
pub(super) fn disk(bench: &Bench, number: u64) -> Result<PathBuf> {
    let path = bench.directory().join(format!("idle{number}.img"));
    File::create(&path)?.set_len(16 << 20)?;
    Ok(path)
}

fn idle(bench: &Bench, vmm: Vmm, disk: &std::path::Path) -> Result<Running> {
    let mut running = bench.start(vmm, "mode=idle", Some(disk))?;
    running.record("idle")?;
    sleep(SETTLE);
    Ok(running)
}

/// User memory without guest memory, in KiB: of the first process, and of all the others.
#[expect(clippy::cast_precision_loss, reason = "KiB of a few processes")]
fn user_kib(running: &Running) -> Result<(f64, f64)> {
    let mut values = Vec::new();
    for pid in process::tree(running.pid()) {
        values.push(process::pss_kib(pid, MEMORY_MIB << 20)?.0);
    }
    let (root, rest) = values.split_first().context("the VMM is gone")?;
    Ok((*root as f64, rest.iter().sum::<u64>() as f64))
}

/// CPU time of all processes in percent of one core.
fn idle_percent(running: &Running) -> f64 {
    let used = || -> Duration {
        process::tree(running.pid())
            .into_iter()
            .map(process::cpu_time)
            .sum()
    };
    let (start, before) = (Instant::now(), used());
    sleep(IDLE);
    let spent = used().saturating_sub(before);
    spent.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0
}
