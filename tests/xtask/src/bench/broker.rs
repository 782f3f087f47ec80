//! `faults.readopt`, `faults.broker_pause`: the daemon is killed again and again while one guest verifies a
//! disk and its memory (mode `beside`) and another looks for moments at which it stood still (mode `pace`).
//!
//! A kill is followed by the next daemon at once. `readopt` is the time from its exec until it answers a
//! request with both machines running, which it does not before their vCPU processes have answered
//! it. A service manager's pause before it starts the daemon comes on top.
//!
//! The pace is read from the guest's memory through `/proc`, past every broker. Windows of equal length take
//! turns: in one a daemon is killed and started, in the other nothing happens. That guest has a CPU of its own
//! where there are two: what a new daemon takes of the guest's CPU is the scheduler's affair. Of each the longest
//! gap counts, 0 if none was of 250 µs; `broker_pause` is the 99th percentile of those with a kill less that of those without,
//! since a shared host has gaps of its own. Both are printed too.

use super::Print;
use super::figure::{Figure, quantile};
use super::guest::Bench;
use super::prng::Prng;
use crate::daemon::{Daemon, Place};
use anyhow::{Context, Result, bail, ensure};
use bulkhead::api::State;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Kills in all.
const KILLS: usize = 200;
/// Length of a window.
const WINDOW: Duration = Duration::from_millis(400);
/// How often the guest's gaps are read: it keeps 240.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long one verifying guest runs before the next one does.
const GUEST_S: u64 = 60;
/// For how much of that daemons are killed: a guest's seconds are as right as its clock.
const KILLED_FOR: Duration = Duration::from_secs(40);
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_micros(200);
/// Guest memory; the pace is below its second MiB.
const MEMORY: &str = "64MiB";
const MEMORY_BYTES: u64 = 64 << 20;
/// Where a guest publishes, as `tests/guests/README.md` says.
const PUBLISHED: u64 = 0x1f_f000;
const MAGIC: &[u8; 8] = b"BHPACE01";
/// Words before the gaps.
const HEAD_WORDS: usize = 6;

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    let mut host = Host::start(bench)?;
    let pace = host.process("pace", "vcpu")?;
    let _alone = Alone::with(pace)?;
    let mut pace = Pace::of(pace)?;
    let mut prng = Prng::new(1);
    let (mut readopt_ms, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    let mut load_until = Instant::now();
    while readopt_ms.len() < KILLS {
        if load_until <= Instant::now() {
            host.verified()?;
            host.place.run(&["start", "load"])?;
            load_until = Instant::now() + KILLED_FOR;
        }
        without.push(pace.longest_gap_ms(|| Ok(()))?);
        with.push(pace.longest_gap_ms(|| {
            readopt_ms.push(host.kill_and_start()?);
            Ok(())
        })?);
        // So that kills do not keep step with whatever the guest does.
        sleep(Duration::from_micros(prng.below(20_000)));
    }
    host.verified()?;
    print(Figure::new("faults.readopt", "ms", readopt_ms, Vec::new()))?;
    let p99 = |gaps: &[f64]| {
        let mut sorted = gaps.to_vec();
        sorted.sort_by(f64::total_cmp);
        quantile(&sorted, 99)
    };
    let pause = p99(&with) - p99(&without);
    print(Figure::new("faults.gap_with_kill", "ms", with, Vec::new()))?;
    print(Figure::new("faults.gap_without", "ms", without, Vec::new()))?;
    print(Figure::new(
        "faults.broker_pause",
        "ms",
        vec![pause],
        Vec::new(),
    ))
}

/// A daemon with both machines. Dropped, it ends them.
struct Host {
    place: Place,
    daemon: Daemon,
}

impl Host {
    fn start(bench: &Bench) -> Result<Self> {
        let disk = bench.directory().join("load.img");
        File::create(&disk)?.set_len(8 << 20)?;
        let place = bench.place();
        let daemon = Daemon::start(&place)?;
        let host = Self { place, daemon };
        let kernel = bench.guest().display().to_string();
        let load = format!("mode=beside seconds={GUEST_S} qd=16 timeout=60");
        let disk = disk.display().to_string();
        for (name, cmdline, more) in [
            ("load", load.as_str(), &["--disk", &disk][..]),
            ("pace", "mode=pace", &[]),
        ] {
            let all = ["create", "--name", name, "--kernel", &kernel, "-m", MEMORY];
            host.place
                .run(&[&all[..], &["--cmdline", cmdline], more].concat())?;
        }
        host.place.run(&["start", "pace"])?;
        let until = Instant::now() + PATIENCE;
        while !host
            .place
            .run(&["logs", "pace", "--console"])?
            .contains("BH pace ")
        {
            ensure!(Instant::now() < until, "the guest says nothing");
            sleep(LOOK_EVERY);
        }
        Ok(host)
    }

    fn process(&self, name: &str, kind: &str) -> Result<i32> {
        let mut processes = self.place.inspect(name)?.processes.into_iter();
        let one = processes.find(|process| process.kind == kind);
        one.map(|process| process.pid).context("no such process")
    }

    /// Waits for the end of the verifying guest, if one was started, which must have found nothing.
    fn verified(&self) -> Result<()> {
        let about = self.place.inspect("load")?.summary;
        if about.last_run.is_none() && about.state == State::Stopped {
            return Ok(());
        }
        self.place.run(&["wait", "load"])?;
        let output = self.place.run(&["logs", "load", "--console"])?;
        ensure!(output.contains("BH done errors=0"), "{output}");
        Ok(())
    }

    /// Kills the daemon and starts the next one. Returns the time from its exec until both machines are
    /// its own, in milliseconds.
    fn kill_and_start(&mut self) -> Result<f64> {
        self.daemon.kill()?;
        let began = Instant::now();
        self.daemon.start_again()?;
        self.answers(2)?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// Waits until the daemon answers and has this many machines that run.
    fn answers(&self, running: usize) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let socket = self.place.directory().join("run/bulkhead.sock");
        loop {
            let answer = ask(&socket).unwrap_or_default();
            if answer.starts_with("HTTP/1.1 200")
                && answer.matches("\"state\":\"running\"").count() >= running
            {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("the daemon has no {running} machines: {answer}");
            }
            sleep(POLL);
        }
    }
}

/// A process has the last CPU for itself, as far as this benchmark goes. Dropped, this process may use all again.
struct Alone(CpuSet);

impl Alone {
    /// This process, and so everything that it starts from now on, leaves the last CPU to all threads of `pid`.
    fn with(pid: i32) -> Result<Self> {
        let myself = Pid::from_raw(0);
        let all = sched_getaffinity(myself)?;
        let mut cpus = (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu).unwrap_or(false));
        let last = cpus.next_back().context("no CPU")?;
        if cpus.next().is_none() {
            eprintln!("there is one CPU: a new daemon takes its time from the guest");
            return Ok(Self(all));
        }
        let (mut others, mut own) = (all, CpuSet::new());
        others.unset(last)?;
        own.set(last)?;
        sched_setaffinity(myself, &others)?;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.file_name().to_string_lossy().parse()?;
            sched_setaffinity(Pid::from_raw(task), &own)?;
        }
        Ok(Self(all))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.0) {
            eprintln!("the CPUs of this process: {error}");
        }
    }
}

fn ask(socket: &Path) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /v1/vms HTTP/1.1\r\nhost: bench\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// What a guest in mode `pace` publishes.
struct Pace {
    memory: File,
    address: u64,
    khz: u64,
    /// Gaps that have been seen.
    seen: u64,
}

impl Pace {
    /// Of the guest in vCPU process `pid`.
    fn of(pid: i32) -> Result<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            for start in maps.lines().filter_map(large_mapping) {
                let mut pace = Self {
                    memory: memory.try_clone()?,
                    address: start + PUBLISHED,
                    khz: 0,
                    seen: 0,
                };
                let words = pace.words().unwrap_or_default();
                if words.first() == Some(&u64::from_le_bytes(*MAGIC)) {
                    pace.khz = word(&words, 3)?;
                    return Ok(pace);
                }
            }
            sleep(LOOK_EVERY);
        }
        bail!("no guest publishes its pace in process {pid}")
    }

    fn words(&self) -> Result<Vec<u64>> {
        let mut page = [0; 4096];
        self.memory.read_exact_at(&mut page, self.address)?;
        let (words, _) = page.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }

    /// The gaps since the last time, in cycles.
    fn gaps(&mut self) -> Result<Vec<u64>> {
        let words = self.words()?;
        let (count, places) = (word(&words, 1)?, word(&words, 5)?);
        ensure!(
            count - self.seen < places,
            "gaps were lost: it is looked too seldom"
        );
        let places = usize::try_from(places)?;
        let mut gaps = Vec::new();
        for number in self.seen..count {
            let place = HEAD_WORDS + usize::try_from(number)? % places * 2;
            gaps.push(word(&words, place + 1)?);
        }
        self.seen = count;
        Ok(gaps)
    }

    /// The longest gap of a window in which `event` happens, in milliseconds.
    fn longest_gap_ms(&mut self, event: impl FnOnce() -> Result<()>) -> Result<f64> {
        // Those of before are nobody's.
        self.seen = word(&self.words()?, 1)?;
        let until = Instant::now() + WINDOW;
        event()?;
        let mut longest = 0;
        loop {
            longest = self.gaps()?.into_iter().fold(longest, u64::max);
            if Instant::now() >= until {
                #[expect(clippy::cast_precision_loss, reason = "cycles of less than a second")]
                return Ok(longest as f64 / self.khz as f64);
            }
            sleep(LOOK_EVERY);
        }
    }
}

fn word(words: &[u64], index: usize) -> Result<u64> {
    words.get(index).copied().context("a short page")
}

/// The start of a mapping that can be guest memory.
fn large_mapping(line: &str) -> Option<u64> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    let (start, end) = (
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    );
    (end.checked_sub(start)? >= MEMORY_BYTES).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_found_by_its_size() {
        let line = "7f0000000000-7f0004000000 rw-s 00000000 00:01 12 /memfd:x (deleted)";
        assert_eq!(large_mapping(line), Some(0x7f00_0000_0000));
        assert_eq!(
            large_mapping("7f0000000000-7f0003fff000 rw-p 0 00:00 0"),
            None
        );
        assert_eq!(large_mapping("nonsense"), None);
    }
}
