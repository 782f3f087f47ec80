//! What a soak has done and seen, and whether that is well.

use super::draws::Draws;
use super::faults::{Fault, Injected};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// How often each kind of fault must have been injected.
const FEWEST: u64 = 20;
/// How much more memory a daemon may use than a fresh one without machines: what its machines need.
const GROWTH_KIB_MAX: i64 = 4096;
/// The same for descriptors, of which each process of a machine costs a few.
const DESCRIPTORS_GROWTH_MAX: i64 = 256;

/// What one machine went through, all its lives together.
#[derive(Debug, Default)]
pub(super) struct Lived {
    pub(super) lives: u64,
    /// Verified rounds of its guests.
    pub(super) rounds: u64,
    pub(super) guest_errors: u64,
    /// Lives that did not end with the guest's own power-off.
    pub(super) deaths: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    seed: u64,
    injected: BTreeMap<Fault, u64>,
    lives: u64,
    verified_rounds: u64,
    guest_errors: u64,
    vm_deaths: Vec<String>,
    daemon_back_ms_median: f64,
    daemon_back_ms_max: f64,
    pub(super) daemon_growth_kib: i64,
    pub(super) daemon_descriptors_growth: i64,
    processes_left: usize,
    draws: Draws,
}

impl Report {
    pub(super) fn new(seed: u64, injected: Injected) -> Self {
        let mut back = injected.daemon_back_ms;
        back.sort_by(f64::total_cmp);
        Self {
            seed,
            injected: injected.counts,
            lives: 0,
            verified_rounds: 0,
            guest_errors: 0,
            vm_deaths: Vec::new(),
            daemon_back_ms_median: back.get(back.len() / 2).copied().unwrap_or(0.0),
            daemon_back_ms_max: back.last().copied().unwrap_or(0.0),
            daemon_growth_kib: 0,
            daemon_descriptors_growth: 0,
            processes_left: 0,
            draws: Draws::default(),
        }
    }

    pub(super) fn add(&mut self, lived: &Lived) {
        self.lives += lived.lives;
        self.verified_rounds += lived.rounds;
        self.guest_errors += lived.guest_errors;
        self.vm_deaths.extend(lived.deaths.iter().cloned());
    }

    pub(super) fn with_left(mut self, processes: usize) -> Self {
        self.processes_left = processes;
        self
    }

    pub(super) fn with_draws(mut self, draws: Draws) -> Self {
        self.draws = draws;
        self
    }

    /// Everything that is wrong; empty when all is well.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = self.vm_deaths.clone();
        let wrong = [
            (
                self.verified_rounds == 0,
                "no guest has verified anything".to_owned(),
            ),
            (self.injected.is_empty(), "nothing was injected".to_owned()),
            (
                self.draws.verified == 0,
                "no drawn scenario has verified anything".to_owned(),
            ),
            (
                self.guest_errors > 0,
                format!("{} guest errors", self.guest_errors),
            ),
            (
                self.processes_left > 0,
                format!("{} processes are left", self.processes_left),
            ),
            (
                self.daemon_growth_kib > GROWTH_KIB_MAX,
                format!("the daemon has grown by {} KiB", self.daemon_growth_kib),
            ),
            (
                self.daemon_descriptors_growth > DESCRIPTORS_GROWTH_MAX,
                format!(
                    "the daemon has {} more descriptors",
                    self.daemon_descriptors_growth
                ),
            ),
        ];
        for (fault, count) in self.injected.iter().filter(|(_, count)| **count < FEWEST) {
            failures.push(format!("{fault:?} was injected {count} times only"));
        }
        let drawn = self.draws.injected.iter();
        for (kind, count) in drawn.filter(|(_, count)| **count < FEWEST) {
            failures.push(format!("{kind} was injected {count} times only"));
        }
        failures.extend(
            self.draws
                .failed
                .iter()
                .map(|name| format!("{name} failed")),
        );
        failures.extend(
            wrong
                .into_iter()
                .filter_map(|(is, what)| is.then_some(what)),
        );
        failures
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed                    {}", self.seed)?;
        for (fault, count) in &self.injected {
            writeln!(f, "injected                {count:>6} {fault:?}")?;
        }
        writeln!(f, "machines lived          {:>6}", self.lives)?;
        writeln!(f, "rounds verified         {:>6}", self.verified_rounds)?;
        writeln!(f, "guest errors            {:>6}", self.guest_errors)?;
        writeln!(f, "machines lost           {:>6}", self.vm_deaths.len())?;
        writeln!(
            f,
            "daemon back after       {:>6.0} ms median, {:.0} ms at most",
            self.daemon_back_ms_median, self.daemon_back_ms_max
        )?;
        writeln!(
            f,
            "daemon has grown by     {:>6} KiB",
            self.daemon_growth_kib
        )?;
        writeln!(f, "processes left          {:>6}", self.processes_left)?;
        for (kind, count) in &self.draws.injected {
            writeln!(f, "drawn                   {count:>6} {kind}")?;
        }
        let draws = &self.draws;
        writeln!(f, "drawn scenarios         {:>6}", draws.runs)?;
        writeln!(f, "of which failed         {:>6}", draws.failed.len())?;
        writeln!(f, "things verified         {:>6}", draws.verified)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn injected() -> Injected {
        Injected {
            counts: BTreeMap::from([(Fault::KillDevice, FEWEST)]),
            daemon_back_ms: vec![3.0, 1.0, 2.0],
        }
    }

    fn draws(count: u64) -> Draws {
        Draws {
            runs: 1,
            verified: 1,
            failed: Vec::new(),
            injected: BTreeMap::from([("host.kill".to_owned(), count)]),
        }
    }

    fn sound() -> Report {
        let mut report = Report::new(7, injected()).with_draws(draws(FEWEST));
        report.add(&Lived {
            lives: 1,
            rounds: 5,
            ..Lived::default()
        });
        report
    }

    #[test]
    fn soak_that_verified_nothing_or_lost_anything_fails() {
        let idle = Report::new(7, injected()).with_draws(draws(FEWEST));
        assert_eq!(idle.failures(), ["no guest has verified anything"]);
        let mut report = sound();
        assert!(report.failures().is_empty());
        assert_eq!(report.daemon_back_ms_median, 2.0);
        report.add(&Lived {
            guest_errors: 2,
            deaths: vec!["soak0: lost".to_owned()],
            ..Lived::default()
        });
        assert_eq!(report.failures(), ["soak0: lost", "2 guest errors"]);
        assert_eq!(sound().with_left(1).failures(), ["1 processes are left"]);
    }

    #[test]
    fn soak_that_injected_too_little_or_whose_scenarios_fail_fails() {
        let seldom = sound().with_draws(draws(FEWEST - 1)).failures();
        assert_eq!(seldom, ["host.kill was injected 19 times only"]);
        let mut tried = injected();
        tried.counts.insert(Fault::Pause, 0);
        let failures = Report::new(7, tried).failures();
        assert!(failures.contains(&"Pause was injected 0 times only".to_owned()));
        let failed = Draws {
            failed: vec!["soak-1-2-lost".to_owned()],
            ..draws(FEWEST)
        };
        let failures = sound().with_draws(failed).failures();
        assert_eq!(failures, ["soak-1-2-lost failed"]);
        let nothing = sound().with_draws(Draws::default()).failures();
        assert_eq!(nothing, ["no drawn scenario has verified anything"]);
    }
}
