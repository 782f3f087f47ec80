//! One process slot of a machine, from its first process to the last: the transitions of
//! [`super::state`] that concern nobody else.

use super::state::{Action, Moment, Rule};
use bulkhead_ipc::ident::ProcId;
use bulkhead_policies::schema::{OnDeath, RestartEntry};
use std::collections::VecDeque;
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Alive, until it serves.
    Starting { until: Moment },
    /// Alive.
    Serving,
    /// It was asked to make way for another, or killed for what it did. Alive, for a moment.
    Dying { until: Moment, killed: bool },
    /// Was killed, does not die, and is given up.
    Undead,
    /// Dead. The next one is started then.
    Waiting { until: Moment, blame: bool },
    /// Dead. The next one is being started.
    Reviving,
    /// Dead, and given up.
    Lost,
    /// The machine ends.
    Ending { until: Moment, killed: bool },
    /// Dead, and the machine ends.
    Gone,
}

/// A death whose place is not filled yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vacancy {
    pub(super) since: Moment,
    pub(super) reason: String,
}

#[derive(Debug)]
pub(super) struct Beat {
    pub(super) next: Moment,
    pub(super) number: u64,
    pub(super) answered: bool,
    pub(super) misses: u16,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: ProcId,
    pub(super) rule: Rule,
    pub(super) phase: Phase,
    /// Why it is being killed, if it broke something before it died.
    pub(super) broke: Option<String>,
    pub(super) vacancy: Option<Vacancy>,
    /// Its end was asked for.
    pub(super) planned: bool,
    /// What follows one whose end was asked for may fail once without counting: it may be of a
    /// program that does not work, and the one before it did.
    pub(super) spare: bool,
    /// Restarts within the window of the policy.
    pub(super) restarts: VecDeque<Moment>,
    /// Faults within the window of the policy.
    pub(super) faults: VecDeque<Moment>,
    pub(super) pause: Duration,
    pub(super) serving_since: Option<Moment>,
    pub(super) beat: Beat,
}

impl Entry {
    /// A process that was just started.
    pub(super) const fn new(id: ProcId, rule: Rule, now: Moment) -> Self {
        Self {
            id,
            rule,
            phase: Phase::Starting {
                until: now.saturating_add(rule.birth_timeout),
            },
            broke: None,
            vacancy: None,
            planned: false,
            spare: false,
            restarts: VecDeque::new(),
            faults: VecDeque::new(),
            pause: Duration::ZERO,
            serving_since: None,
            beat: Beat {
                next: Duration::ZERO,
                number: 0,
                answered: true,
                misses: 0,
            },
        }
    }

    pub(super) const fn is_dead(&self) -> bool {
        matches!(
            self.phase,
            Phase::Waiting { .. } | Phase::Reviving | Phase::Lost | Phase::Gone
        )
    }

    pub(super) fn deadline(&self) -> Option<Moment> {
        match self.phase {
            Phase::Starting { until }
            | Phase::Waiting { until, .. }
            | Phase::Dying { until, .. }
            | Phase::Ending {
                until,
                killed: false,
            } => Some(until),
            Phase::Serving => self.rule.heartbeat.map(|_| self.beat.next),
            Phase::Reviving
            | Phase::Undead
            | Phase::Lost
            | Phase::Ending { killed: true, .. }
            | Phase::Gone => None,
        }
    }

    pub(super) fn serve(&mut self, now: Moment, actions: &mut Vec<Action>) {
        self.phase = Phase::Serving;
        self.spare = false;
        self.serving_since = Some(now);
        self.beat = Beat {
            next: next_beat(self.rule, now),
            number: self.beat.number,
            answered: true,
            misses: 0,
        };
        if let Some(Vacancy { since, reason }) = self.vacancy.take() {
            actions.push(Action::Revived {
                id: self.id,
                reason,
                after: now.saturating_sub(since),
            });
        }
    }

    /// It is dead: another takes its place, unless that has been tried too often.
    pub(super) fn vacate(
        &mut self,
        reason: String,
        blame: bool,
        now: Moment,
        actions: &mut Vec<Action>,
    ) {
        let planned = std::mem::take(&mut self.planned);
        let spared = !planned && std::mem::take(&mut self.spare);
        let pause = self.pause;
        self.broke = None;
        let first = self.vacancy.take();
        let since = first.as_ref().map_or(now, |vacancy| vacancy.since);
        self.vacancy = Some(Vacancy {
            since,
            reason: reason.clone(),
        });
        self.pause = Duration::ZERO;
        if !planned && !spared {
            let Some(rule) = self.rule.restart else {
                return self.lose(reason, actions);
            };
            if let Some(often) = self.is_at_fault_too_often(now) {
                return self.lose(format!("{reason}; {often}"), actions);
            }
            let window = Duration::from_millis(rule.window_ms.into());
            let often = within(window, &mut self.restarts, now);
            if often >= usize::from(rule.restarts_max) {
                let reason = format!("{reason}; it was restarted {often} times within {window:?}");
                return self.lose(reason, actions);
            }
            self.restarts.push_back(now);
            self.pause = self.next_pause(rule, pause, now);
        }
        self.serving_since = None;
        self.phase = Phase::Waiting {
            until: now + self.pause,
            blame,
        };
        self.revive_in_time(now, actions);
    }

    /// Says so if it has been killed for what it did more often than the policy allows.
    fn is_at_fault_too_often(&mut self, now: Moment) -> Option<String> {
        // Without a rule nobody counts, and nothing grows.
        let window = self.rule.faults.map_or(0, |rule| rule.window_ms);
        let window = Duration::from_millis(window.into());
        let often = within(window, &mut self.faults, now);
        let most = usize::from(self.rule.faults?.max);
        (often > most).then(|| format!("it was at fault {often} times within {window:?}"))
    }

    /// None for one that has served for a while.
    fn next_pause(&self, rule: RestartEntry, before: Duration, now: Moment) -> Duration {
        let least = Duration::from_millis(rule.backoff_ms_min.into());
        let most = Duration::from_millis(rule.backoff_ms_max.into());
        match self.serving_since {
            Some(since) if now.saturating_sub(since) >= least => Duration::ZERO,
            _ => (before * 2).clamp(least, most),
        }
    }

    pub(super) fn revive_in_time(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let Phase::Waiting { until, blame } = self.phase else {
            return;
        };
        if until > now {
            return;
        }
        self.id.generation = self.id.generation.saturating_add(1);
        self.phase = Phase::Reviving;
        let reason = self.vacancy.as_ref().map(|v| v.reason.clone());
        actions.push(Action::Revive {
            id: self.id,
            reason: reason.unwrap_or_default(),
            blame,
        });
    }

    pub(super) fn lose(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.phase = Phase::Lost;
        self.spare = false;
        self.vacancy = None;
        self.pause = Duration::ZERO;
        actions.push(Action::Degraded {
            id: self.id,
            reason,
        });
    }
}

/// How many of `moments` are within `window` before now; the others are forgotten.
fn within(window: Duration, moments: &mut VecDeque<Moment>, now: Moment) -> usize {
    while moments.front().is_some_and(|&at| at + window <= now) {
        moments.pop_front();
    }
    moments.len()
}

/// The next moment at which processes of this rule are asked for a sign of life: all at once, so that
/// the broker wakes up once.
fn next_beat(rule: Rule, now: Moment) -> Moment {
    let interval = rule.heartbeat.map_or(0, |beat| beat.interval_ms).max(1);
    let rounds = now.as_millis() / u128::from(interval) + 1;
    Duration::from_millis(u64::try_from(rounds).unwrap_or(u64::MAX) * u64::from(interval))
}

impl Entry {
    /// Whether another takes its place when it dies.
    pub(super) fn is_replaceable(&self) -> bool {
        let started = !matches!(self.phase, Phase::Starting { .. }) || self.vacancy.is_some();
        started && (self.rule.restart.is_some() || self.planned || self.vacancy.is_some())
    }

    pub(super) fn consequence(&self, before: Phase, reason: String, actions: &mut Vec<Action>) {
        let id = self.id;
        actions.push(match (before, self.rule.on_death) {
            (Phase::Starting { .. }, _) => Action::StartFailed { id, reason },
            (Phase::Serving | Phase::Dying { .. }, OnDeath::EndMachine) => {
                Action::MachineLost { id, reason }
            }
            (Phase::Serving | Phase::Dying { .. }, _) => Action::Degraded { id, reason },
            _ => return,
        });
    }

    /// Asks for a sign of life. Returns what is wrong when there has been none for too long.
    pub(super) fn beat(
        &mut self,
        now: Moment,
        actions: &mut Vec<Action>,
    ) -> Option<(ProcId, String)> {
        let misses_max = self.rule.heartbeat?.misses_max;
        if !self.beat.answered {
            self.beat.misses = self.beat.misses.saturating_add(1);
            if self.beat.misses >= misses_max {
                let reason = format!("did not answer {misses_max} heartbeats in a row");
                return Some((self.id, reason));
            }
        }
        self.beat.answered = false;
        self.beat.number += 1;
        self.beat.next = next_beat(self.rule, now);
        actions.push(Action::Ping {
            id: self.id,
            number: self.beat.number,
        });
        None
    }
}
