//! What is done to the machines of a soak, and when: chosen by a seed.

use super::life::name;
use crate::bench::prng::Prng;
use crate::daemon::{Daemon, Place};
use anyhow::Result;
use bulkhead::api::{Details, Process, State};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Kinds of process that are replaced when they die.
const KINDS: [&str; 5] = ["blk", "console", "legacy", "rng", "vsock"];
/// Longest time between two faults.
const PAUSE_MS_MAX: u64 = 400;
/// Longest time for which a process is stopped: it is found out when it misses heartbeats.
const STOP_MS_MAX: u64 = 300;
/// How long a machine may not be running before faults that need it running are given up: one is removed
/// and created between its lives.
const PATIENCE: Duration = Duration::from_secs(20);

/// One thing that happens to a machine or its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Fault {
    /// SIGKILL to a device process.
    KillDevice,
    /// SIGSTOP to a device process, and SIGCONT a while later.
    StopDevice,
    /// `device restart`.
    RestartDevice,
    /// `device upgrade`.
    UpgradeDevices,
    /// `pause`, and `resume` a while later.
    Pause,
    /// SIGKILL to the daemon; another one is started at once.
    KillDaemon,
}

/// Out of sixteen.
const FAULTS: [Fault; 16] = [
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::KillDevice,
    Fault::StopDevice,
    Fault::StopDevice,
    Fault::RestartDevice,
    Fault::UpgradeDevices,
    Fault::Pause,
    Fault::KillDaemon,
    Fault::KillDaemon,
    Fault::KillDaemon,
];

/// What has been injected.
#[derive(Debug, Clone, Default)]
pub(super) struct Injected {
    /// How often each was; 0 for one that was tried and found no machine that it could be done to.
    pub(super) counts: BTreeMap<Fault, u64>,
    /// From the kill of a daemon to the first answer of the next one.
    pub(super) daemon_back_ms: Vec<f64>,
}

pub(super) struct Injector<'a> {
    place: &'a Place,
    prng: Prng,
    machines: u64,
    injected: Injected,
}

impl<'a> Injector<'a> {
    pub(super) fn new(place: &'a Place, seed: u64, machines: u64) -> Self {
        Self {
            place,
            prng: Prng::new(seed),
            machines,
            injected: Injected::default(),
        }
    }

    pub(super) fn injected(&self) -> Injected {
        self.injected.clone()
    }

    /// Waits for a while, then injects one fault into a machine that runs.
    pub(super) fn inject(&mut self, daemon: &mut Daemon) -> Result<()> {
        sleep(Duration::from_millis(self.prng.below(PAUSE_MS_MAX)));
        let fault = *self.prng.pick(&FAULTS);
        let machine = name(self.prng.below(self.machines));
        let kind = *self.prng.pick(&KINDS);
        let while_ms = Duration::from_millis(self.prng.below(STOP_MS_MAX));
        let is_injected = match fault {
            Fault::KillDevice => self.signal(&machine, kind, &[Signal::SIGKILL], while_ms)?,
            Fault::StopDevice => self.signal(
                &machine,
                kind,
                &[Signal::SIGSTOP, Signal::SIGCONT],
                while_ms,
            )?,
            // A machine may end, or be gone between two lives: its verbs are refused then.
            Fault::RestartDevice => self.process(&machine, kind).is_some_and(|process| {
                let device = format!("{machine}/{}", process.name);
                self.place.run(&["device", "restart", &device]).is_ok()
            }),
            Fault::UpgradeDevices => self.place.run(&["device", "upgrade", &machine]).is_ok(),
            Fault::Pause => {
                let is_paused = self.place.run(&["pause", &machine]).is_ok();
                sleep(while_ms);
                if is_paused {
                    self.place.insist(&["resume", &machine])?;
                }
                is_paused
            }
            Fault::KillDaemon => {
                let back = daemon.replace()?;
                self.injected.daemon_back_ms.push(back.as_secs_f64() * 1e3);
                true
            }
        };
        *self.injected.counts.entry(fault).or_default() += u64::from(is_injected);
        Ok(())
    }

    /// Sends `signals`, `between` apart, to the process of `kind`. False when there is none now.
    fn signal(
        &self,
        machine: &str,
        kind: &str,
        signals: &[Signal],
        between: Duration,
    ) -> Result<bool> {
        let Some(process) = self.process(machine, kind) else {
            return Ok(false);
        };
        for (number, signal) in signals.iter().enumerate() {
            if number > 0 {
                sleep(between);
            }
            match kill(Pid::from_raw(process.pid), *signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(true)
    }

    fn process(&self, machine: &str, kind: &str) -> Option<Process> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let text = self.place.run(&["inspect", machine, "--json"]).ok();
            let about: Option<Details> = text.and_then(|text| serde_json::from_str(&text).ok());
            let process = about
                .filter(|about| about.summary.state == State::Running)
                .and_then(|about| {
                    about
                        .processes
                        .into_iter()
                        .find(|p| p.kind == kind && p.locked)
                });
            if process.is_some() {
                return process;
            }
            sleep(Duration::from_millis(50));
        }
        None
    }
}
