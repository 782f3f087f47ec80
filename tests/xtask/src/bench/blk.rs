//! `blk.*`: the block device on tmpfs, driven by a guest program in ring 3 that polls.

use super::Print;
use super::figure::Figure;
use super::guest::{Bench, Vmm, value};
use anyhow::{Result, ensure};
use std::fs::File;
use std::io::Write;
use std::path::Path;

const DISK_MIB: usize = 512;
const SECONDS: u32 = 1;

pub(super) struct Load {
    name: &'static str,
    pub(super) unit: &'static str,
    arguments: &'static str,
}

pub(super) const SEQ_READ_QD32: Load = Load {
    name: "blk.seq_read_qd32",
    unit: "MB/s",
    arguments: "op=seq_read qd=32 bs=128k",
};

pub(super) const RAND_READ_QD32: Load = Load {
    name: "blk.rand_read_qd32",
    unit: "IOPS",
    arguments: "op=rand_read qd=32 bs=4k",
};

const LOADS: [Load; 5] = [
    Load {
        name: "blk.seq_read_qd1",
        unit: "MB/s",
        arguments: "op=seq_read qd=1 bs=128k",
    },
    SEQ_READ_QD32,
    Load {
        name: "blk.seq_write_qd32",
        unit: "MB/s",
        arguments: "op=seq_write qd=32 bs=128k",
    },
    Load {
        name: "blk.rand_read_qd1",
        unit: "IOPS",
        arguments: "op=rand_read qd=1 bs=4k",
    },
    RAND_READ_QD32,
];

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let disk = bench.directory().join("disk.img");
    fill(&disk)?;
    for load in &LOADS {
        let (ours, peer) = bench.alternate(|vmm| measure(bench, vmm, load, &disk))?;
        print(Figure::new(load.name, load.unit, ours, peer))?;
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

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one second are far below 2^52"
)]
pub(super) fn measure(bench: &Bench, vmm: Vmm, load: &Load, disk: &Path) -> Result<f64> {
    let arguments = format!(
        "mode=bench-blk {} seconds={SECONDS} end=debug:0",
        load.arguments
    );
    let mut running = bench.start(vmm, &arguments, Some(disk))?;
    let (begin, _) = running.record("bench-blk.begin")?;
    let (end, keys) = running.record("bench-blk.end")?;
    let _exit_code = running.finish()?;
    ensure!(value(&keys, "failed")? == 0, "requests failed: {keys}");
    let elapsed = (end - begin).as_secs_f64();
    let done = if load.unit == "IOPS" {
        value(&keys, "requests")? as f64
    } else {
        value(&keys, "bytes")? as f64 / 1e6
    };
    Ok(done / elapsed)
}
