//! `cargo xtask soak`: machines that verify what they do, for as long as asked for, while everything
//! goes wrong. For a third of the time two machines live side by side under one daemon: their processes
//! are killed, stopped, replaced and upgraded, they are paused, and their daemon is killed. For the
//! rest the fault-injection harness draws scenarios with all of its faults.
//!
//! Responsible for the verdict: every guest ends by itself and has counted no error, nothing is left behind,
//! the daemon has not grown, every drawn scenario has held. A soak that verified nothing, or that injected a
//! kind of fault fewer than twenty times, fails.

mod draws;
mod faults;
mod life;
mod report;

use crate::daemon::{Daemon, Place};
use crate::guest::Image;
use crate::{process, suite};
use anyhow::{Context, Result, bail};
use faults::Injector;
use life::Lives;
use report::Report;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Of the time, machines live under one daemon for one part in so many.
const LIVING: u64 = 3;

/// `cargo xtask soak …`
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long. In fewer than ten not every kind of fault comes often enough.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: u64,
    /// Chooses the faults and their times. The same seed chooses the same ones.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Machines at once.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    machines: u64,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the soak. Fails when anything was wrong.
pub(crate) fn run(options: &Options) -> Result<()> {
    suite::require_kvm()?;
    let binaries = suite::release_binaries()?;
    let guest = Image::TestGuest.path()?;
    let directory = tempfile::Builder::new()
        .prefix("bulkhead-soak-")
        .tempdir()?;
    let place = Place::new(&binaries, directory.path());
    let before = processes_of(&binaries);

    let report = {
        let mut daemon = Daemon::start(&place)?;
        let growth = Growth::of(daemon.pid())?;
        let mut report = soak(options, &place, &guest, &mut daemon)?;
        // The daemon that is there now is younger than the soak: what it has grown to is compared with a
        // fresh one that had no machine yet.
        report.daemon_growth_kib = Growth::of(daemon.pid())?.kib - growth.kib;
        report.daemon_descriptors_growth =
            Growth::of(daemon.pid())?.descriptors - growth.descriptors;
        report
    };
    let left = processes_of(&binaries);
    let report = report.with_left(left.difference(&before).count());
    let minutes = options.minutes - options.minutes / LIVING;
    let report = report.with_draws(draws::draw(&binaries, options.seed, minutes)?);
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    match report.failures() {
        none if none.is_empty() => Ok(()),
        failures => bail!("{}", failures.join("; ")),
    }
}

/// Lets machines live on threads of their own and injects faults until the time is over.
fn soak(options: &Options, place: &Place, guest: &Path, daemon: &mut Daemon) -> Result<Report> {
    let until = Instant::now() + Duration::from_secs(60 * options.minutes / LIVING);
    let is_over = AtomicBool::new(false);
    let lives = Lives::new(place, guest, options.seed);
    let (lives, over) = (&lives, &is_over);
    std::thread::scope(|scope| {
        let machines: Vec<_> = (0..options.machines)
            .map(|number| scope.spawn(move || lives.live(number, over)))
            .collect();
        let mut injector = Injector::new(place, options.seed, options.machines);
        let mut injected = Ok(());
        while Instant::now() < until
            && injected.is_ok()
            && !machines.iter().any(|m| m.is_finished())
        {
            injected = injector.inject(daemon);
        }
        over.store(true, Ordering::Relaxed);
        // A machine that failed says more than the fault that found it gone.
        let mut report = Report::new(options.seed, injector.injected());
        for machine in machines {
            let lived = machine
                .join()
                .ok()
                .context("a machine's thread panicked")??;
            report.add(&lived);
        }
        injected?;
        Ok(report)
    })
}

/// What a daemon must not use more and more of.
struct Growth {
    kib: i64,
    descriptors: i64,
}

impl Growth {
    fn of(pid: u32) -> Result<Self> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Self {
            kib: process::unbacked_kib(pid)?.cast_signed(),
            descriptors: i64::try_from(descriptors)?,
        })
    }
}

/// Living processes whose program is one of `binaries`.
fn processes_of(binaries: &Path) -> BTreeSet<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|program| program.starts_with(binaries))
    })
    .collect()
}
