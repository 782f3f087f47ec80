//! `cargo xtask bench`: the figures that the README publishes.
//!
//! Responsible for: running the same test guest under Bulkhead and under QEMU's microvm in turns, in
//! one run, and printing medians and their ratio. This machine's absolute times mean little; the
//! ratios do. Nothing is asserted here; a human, or the README, compares.
//!
//! Standard output carries figures alone: a table, or with `--json` one JSON object a line.

mod blk;
mod boot;
mod broker;
mod calm;
mod cpu;
mod faults;
mod figure;
mod fs;
mod gate;
mod guest;
mod kernel_memory;
mod memory;
mod mmio;
mod net;
#[allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "the test guest's own, for whose CPU the width is known"
)]
#[path = "../../../guests/src/prng.rs"]
pub(crate) mod prng;
mod virtiofsd;

use crate::{packages, suite};
use anyhow::Result;
use clap::ValueEnum;
use figure::Figure;
use guest::Bench;

/// `cargo xtask bench …`
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which figures; all of them when none is named.
    suites: Vec<Suite>,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(11..))]
    runs: u32,
    /// Do not run QEMU beside it (figures then have no ratio).
    #[arg(long)]
    no_peer: bool,
    /// Measure Bulkhead and QEMU again where others used the CPUs before or after, and wait until they do not.
    #[arg(long)]
    calm: bool,
}

/// A group of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// From exec to the guest's first byte.
    Boot,
    /// Memory and idle CPU beside the guest's own.
    Memory,
    /// Device registers, read by the guest's kernel.
    Mmio,
    /// Block device throughput, latency and CPU time, also while another VM keeps all CPUs busy.
    Blk,
    /// A shared folder's operations and throughput.
    Fs,
    /// Frames between two machines of one virtual network: round trips and throughput.
    Net,
    /// Block device throughput through the gates, and without them.
    Gate,
    /// Device processes killed at random under load: time to service, and what the guest saw.
    Faults,
    /// The daemon killed under load: time until its machines are the next one's, and what a guest
    /// notices.
    Broker,
}

/// Runs the suites asked for.
pub(crate) fn run(options: &Options) -> Result<()> {
    suite::require_kvm()?;
    if !options.no_peer {
        packages::ensure(&["qemu-system-x86"])?;
    }
    let bench = Bench::prepare(options.runs, !options.no_peer, options.calm)?;
    let suites = match options.suites.as_slice() {
        [] => Suite::value_variants(),
        some => some,
    };
    if !options.json {
        println!("{}", Figure::heading());
    }
    let mut print = |figure: Figure| -> Result<()> {
        if options.json {
            println!("{}", serde_json::to_string(&figure)?);
        } else {
            println!("{}", figure.row());
        }
        Ok(())
    };
    for suite in suites {
        match suite {
            Suite::Boot => boot::run(&bench, &mut print)?,
            Suite::Memory => memory::run(&bench, &mut print)?,
            Suite::Mmio => mmio::run(&bench, &mut print)?,
            Suite::Blk => blk::run(&bench, &mut print)?,
            Suite::Fs => fs::run(&bench, &mut print)?,
            Suite::Net => net::run(&bench, &mut print)?,
            Suite::Gate => gate::run(&bench, &mut print)?,
            Suite::Faults => faults::run(&bench, &mut print)?,
            Suite::Broker => broker::run(&bench, &mut print)?,
        }
    }
    Ok(())
}

/// Receives each figure as soon as it is known.
type Print<'a> = dyn FnMut(Figure) -> Result<()> + 'a;
