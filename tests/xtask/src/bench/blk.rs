//! `blk.*`: the block device on tmpfs, driven by a guest program in ring 3 that polls.
//!
//! `blk.cpu_per_request_*` is the CPU time of all processes of the VM for each completed request, as `cpu.rs` counts
//! it: the guest polls, so one vCPU is busy all the while on both sides. `blk.host_cpu_per_request_*` leaves the
//! time inside of the guest out, on both sides.
//!
//! Figures that end with `_busy` are taken while a second VM, which is Bulkhead's beside either, keeps all CPUs
//! busy.

use super::Print;
use super::cpu;
use super::figure::Figure;
use super::guest::{Bench, Cpus, Running, Vmm, value};
use anyhow::{Result, ensure};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

const DISK_MIB: usize = 512;
const SECONDS: u32 = 1;
/// How long the load is whose CPU time is watched, and how long that is: from a while after its begin until a
/// while before its end, on busy CPUs too.
const CPU_SECONDS: u32 = 2;
const WATCHED: Duration = Duration::from_millis(1400);
/// How long all that is measured on busy CPUs may take.
const BUSY_TIMEOUT_S: u64 = 3600;

pub(super) struct Load {
    name: &'static str,
    pub(super) unit: &'static str,
    arguments: &'static str,
    /// What figures of CPU time end with, if they are taken.
    cpu: Option<&'static str>,
}

pub(super) const SEQ_READ_QD32: Load = Load {
    name: "blk.seq_read_qd32",
    unit: "MB/s",
    arguments: "op=seq_read qd=32 bs=128k",
    cpu: None,
};

pub(super) const RAND_READ_QD32: Load = Load {
    name: "blk.rand_read_qd32",
    unit: "IOPS",
    arguments: "op=rand_read qd=32 bs=4k",
    cpu: Some("qd32"),
};

const LOADS: [Load; 5] = [
    Load {
        name: "blk.seq_read_qd1",
        unit: "MB/s",
        arguments: "op=seq_read qd=1 bs=128k",
        cpu: None,
    },
    SEQ_READ_QD32,
    Load {
        name: "blk.seq_write_qd32",
        unit: "MB/s",
        arguments: "op=seq_write qd=32 bs=128k",
        cpu: None,
    },
    Load {
        name: "blk.rand_read_qd1",
        unit: "IOPS",
        arguments: "op=rand_read qd=1 bs=4k",
        cpu: Some("qd1"),
    },
    RAND_READ_QD32,
];

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let disk = bench.directory().join("disk.img");
    fill(&disk)?;
    all(bench, Cpus::Free, &disk, print)?;
    let mut neighbour = bench.spawn(bench.neighbour("mode=busy", BUSY_TIMEOUT_S))?;
    neighbour.record("busy")?;
    all(bench, Cpus::Busy, &disk, print)?;
    ensure!(neighbour.is_alive()?, "the second VM has ended");
    Ok(())
}

/// Measures all loads.
fn all(bench: &Bench, cpus: Cpus, disk: &Path, print: &mut Print<'_>) -> Result<()> {
    let suffix = match cpus {
        Cpus::Free => "",
        Cpus::Busy => "_busy",
    };
    for load in &LOADS {
        let (ours, peer) = bench.alternate_on(cpus, |vmm| measure(bench, vmm, load, disk))?;
        let name = format!("{}{suffix}", load.name);
        print(Figure::new(name, load.unit, ours, peer))?;
    }
    for load in &LOADS {
        let Some(depth) = load.cpu else {
            continue;
        };
        let (ours, peer) =
            bench.alternate_on(cpus, |vmm| cpu_per_request_us(bench, vmm, load, disk))?;
        let (ours, ours_host): (Vec<_>, Vec<_>) = ours.into_iter().unzip();
        let (peer, peer_host): (Vec<_>, Vec<_>) = peer.into_iter().unzip();
        let name = |what| format!("blk.{what}_per_request_{depth}{suffix}");
        print(Figure::new(name("cpu"), "us", ours, peer))?;
        print(Figure::new(name("host_cpu"), "us", ours_host, peer_host))?;
    }
    Ok(())
}

/// Every page exists, so that reads copy data and not holes.
pub(super) fn fill(disk: &Path) -> Result<()> {
    let mut file = File::create(disk)?;
    let mut word = 0x9e37_79b9_7f4a_7c15u64;
    let mut block = Vec::with_capacity(1 << 20);
    while block.len() < 1 << 20 {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        block.extend_from_slice(&word.to_le_bytes());
    }
    for _ in 0..DISK_MIB {
        file.write_all(&block)?;
    }
    Ok(())
}

pub(super) fn measure(bench: &Bench, vmm: Vmm, load: &Load, disk: &Path) -> Result<f64> {
    let one = if load.unit == "IOPS" {
        ("requests", 1.0)
    } else {
        ("bytes", 1e6)
    };
    let mut running = start(bench, vmm, load, SECONDS, disk)?;
    let (begin, _) = running.record("bench-blk.begin")?;
    let (elapsed, done) = ended(running, begin, one.0)?;
    Ok(done / one.1 / elapsed)
}

/// CPU time for each request in microseconds: all of it, and what was spent outside of the guest.
fn cpu_per_request_us(bench: &Bench, vmm: Vmm, load: &Load, disk: &Path) -> Result<(f64, f64)> {
    let mut running = start(bench, vmm, load, CPU_SECONDS, disk)?;
    let (begin, _) = running.record("bench-blk.begin")?;
    let cores = cpu::watch(running.pid(), WATCHED);
    let watched_until = Instant::now();
    let (elapsed, requests) = ended(running, begin, "requests")?;
    let load_end = begin + Duration::from_secs_f64(elapsed);
    ensure!(
        watched_until < load_end,
        "the load ended while it was watched"
    );
    let us = elapsed * 1e6 / requests;
    Ok((cores.all * us, cores.host * us))
}

fn start(bench: &Bench, vmm: Vmm, load: &Load, seconds: u32, disk: &Path) -> Result<Running> {
    let arguments = format!(
        "mode=bench-blk {} seconds={seconds} end=debug:0",
        load.arguments
    );
    bench.start(vmm, &arguments, Some(disk))
}

/// Waits for the load's end: its seconds since `begin`, and what was counted under `key`.
#[expect(
    clippy::cast_precision_loss,
    reason = "counts of seconds are far below 2^52"
)]
fn ended(mut running: Running, begin: Instant, key: &str) -> Result<(f64, f64)> {
    let (end, keys) = running.record("bench-blk.end")?;
    let _exit_code = running.finish()?;
    ensure!(value(&keys, "failed")? == 0, "requests failed: {keys}");
    Ok(((end - begin).as_secs_f64(), value(&keys, key)? as f64))
}
