//! `faults.*`: device processes are killed at random while a guest verifies a disk, its memory and the
//! bytes around every buffer in flight (mode `beside` of the test guest).

use super::Print;
use super::figure::Figure;
use super::guest::{Bench, value};
use super::prng::Prng;
use crate::process;
use crate::restart::Restart;
use anyhow::{Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Processes to be killed in all.
const KILLS: usize = 1000;
/// How long one guest runs before the next one does.
const GUEST_S: u64 = 30;
/// How long a process may take to be back.
const BACK_WITHIN: Duration = Duration::from_secs(20);
/// Longest pause between a restart and the next kill. With it a kind is killed some 65 times in ten seconds; at a
/// hundred its policy gives the device up.
const PAUSE_MAX: Duration = Duration::from_millis(60);
/// Kinds that are killed: all devices.
const KINDS: [&str; 4] = ["blk", "console", "legacy", "rng"];

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let mut after_ms = Vec::new();
    let (mut guest_errors, mut seed) = (0, 0);
    while after_ms.len() < KILLS {
        seed += 1;
        guest_errors += one_guest(bench, seed, &mut after_ms)?;
    }
    print(Figure::new("faults.restart", "ms", after_ms, Vec::new()))?;
    let errors = f64::from(guest_errors);
    print(Figure::new(
        "faults.guest_errors",
        "",
        vec![errors],
        Vec::new(),
    ))
}

/// Kills its processes until the guest ends. Returns the errors that the guest counted.
fn one_guest(bench: &Bench, seed: u64, after_ms: &mut Vec<f64>) -> Result<u32> {
    let disk = bench.directory().join("faults.img");
    File::create(&disk)?.set_len(8 << 20)?;
    let cmdline = format!("mode=beside seconds={GUEST_S} seed={seed} qd=16 timeout=60");
    let mut running = bench.spawn(bench.bulkhead(&cmdline, Some(&disk), 4 * GUEST_S))?;
    running.record("beside")?;
    let until = Instant::now() + Duration::from_secs(GUEST_S - 2);
    let mut prng = Prng::new(seed);
    let mut killed = 0;
    while Instant::now() < until && after_ms.len() + killed < KILLS {
        let kind = *prng.pick(&KINDS);
        let Some(victim) = process::of_kind(running.pid(), kind) else {
            bail!("no {kind} process: {}", running.errors());
        };
        kill(Pid::from_raw(i32::try_from(victim)?), Signal::SIGKILL)?;
        killed += 1;
        let deadline = Instant::now() + BACK_WITHIN;
        while times(&running.errors()).len() < killed {
            let errors = running.errors();
            ensure!(
                Instant::now() < deadline && !errors.contains("bulkhead: degraded"),
                "{kind} is not served again: {errors}"
            );
            sleep(Duration::from_millis(1));
        }
        let most = u64::try_from(PAUSE_MAX.as_micros())?;
        sleep(Duration::from_micros(prng.below(most)));
    }
    after_ms.extend(times(&running.errors()));
    let (_, keys) = running.record("beside.end")?;
    ensure!(value(&keys, "rounds")? > 0, "nothing was verified: {keys}");
    let (_, keys) = running.record("done")?;
    let errors = u32::try_from(value(&keys, "errors")?)?;
    let code = running.finish()?;
    ensure!(
        code == Some(0) || errors > 0,
        "the machine ended with {code:?}"
    );
    Ok(errors)
}

/// Time from death to service of each restart so far, in milliseconds.
fn times(errors: &str) -> Vec<f64> {
    let restarts = errors.lines().filter_map(Restart::parse);
    restarts.map(|restart| restart.after_ms()).collect()
}
