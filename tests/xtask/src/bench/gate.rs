//! `gate.*`: what the gates cost. The same guest, transport and block device once through a gate and once,
//! in a program of the benchmark's own (`tests/direct`), on guest memory itself. What that program
//! reaches is compared with QEMU, so that it is no straw man.

use super::Print;
use super::blk::{self, Load};
use super::figure::Figure;
use super::guest::{Bench, Vmm};
use anyhow::Result;

/// A load, and the names of its figures.
struct Compared {
    load: Load,
    ratio: &'static str,
    direct: &'static str,
}

const LOADS: [Compared; 2] = [
    Compared {
        load: blk::SEQ_READ_QD32,
        ratio: "gate.seq_ratio",
        direct: "gate.seq_direct",
    },
    Compared {
        load: blk::RAND_READ_QD32,
        ratio: "gate.rand_ratio",
        direct: "gate.rand_direct",
    },
];

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let disk = bench.directory().join("disk.img");
    blk::fill(&disk)?;
    for Compared {
        load,
        ratio,
        direct,
    } in &LOADS
    {
        let measure = |vmm| blk::measure(bench, vmm, load, &disk);
        let (mut ratios, mut directs, mut peers) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..=bench.runs {
            let gated = measure(Vmm::Bulkhead)?;
            let ungated = measure(Vmm::Direct)?;
            let peer = bench.has_peer().then(|| measure(Vmm::Qemu)).transpose()?;
            // The first round warms caches.
            if run > 0 {
                ratios.push(gated / ungated);
                directs.push(ungated);
                peers.extend(peer);
            }
        }
        print(Figure::new(*ratio, "", ratios, Vec::new()))?;
        print(Figure::new(*direct, load.unit, directs, peers))?;
    }
    Ok(())
}
