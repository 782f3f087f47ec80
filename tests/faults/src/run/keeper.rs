//! Watches the brokers: one that a fault has killed is followed by another, one that ends by itself is
//! an error.

use super::Run;
use crate::hosts::Host;
use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Memory in bytes by which a broker may have grown when all machines are gone.
const GROWTH_BYTES: u64 = 16 << 20;

/// What a broker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holds {
    descriptors: usize,
    bytes: u64,
}

impl Holds {
    /// What a process holds now.
    fn of(pid: i32) -> Option<Self> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
        Some(Self {
            descriptors,
            bytes: kib << 10,
        })
    }
}

/// Watches the brokers of all hosts.
#[derive(Debug)]
pub(super) struct Keeper<'a> {
    run: &'a Run,
    /// What the first broker of each host held before there were machines.
    before: Mutex<BTreeMap<usize, Holds>>,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(run: &'a Run) -> Self {
        let holds = |host: &Host| Some((host.index, Holds::of(host.pid()?)?));
        let before = run.hosts.iter().filter_map(holds).collect();
        Self {
            run,
            before: Mutex::new(before),
        }
    }

    /// Until the run is over.
    pub(super) fn keep(&self) {
        while !self.run.is_over() {
            for host in &self.run.hosts {
                self.look(host);
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    fn look(&self, host: &Host) {
        let Some(status) = host.ended() else { return };
        let run = self.run;
        let Some(away) = run.engine.was_doomed(host.index) else {
            let log: Vec<_> = host
                .log()
                .lines()
                .rev()
                .take(5)
                .map(str::to_owned)
                .collect();
            run.error(format!(
                "the broker of {} ended by itself: {status}: {}",
                host.name,
                log.into_iter().rev().collect::<Vec<_>>().join(" | ")
            ));
            return self.again(host);
        };
        run.timeline
            .note(format!("the broker of {} is gone ({status})", host.name));
        std::thread::sleep(away);
        self.again(host);
    }

    fn again(&self, host: &Host) {
        match host.serve() {
            Ok(()) => self
                .run
                .timeline
                .note(format!("another broker of {} serves", host.name)),
            Err(error) => self.run.error(error.to_string()),
        }
    }

    /// Compares what the broker of a host holds with what its first one held before it had machines.
    pub(super) fn compare(&self, host: &Host) {
        let before = self.before.lock();
        let before = before.map(|before| before.get(&host.index).copied());
        let Ok(Some(before)) = before else { return };
        // Connections of the last commands are closed a moment later.
        let until = Instant::now() + Duration::from_secs(3);
        loop {
            let Some(now) = host.pid().and_then(Holds::of) else {
                return;
            };
            if now.descriptors <= before.descriptors && now.bytes <= before.bytes + GROWTH_BYTES {
                return;
            }
            if Instant::now() > until {
                let name = &host.name;
                return self.run.error(format!(
                    "the broker of {name} holds {now:?} without machines, {before:?} before"
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
