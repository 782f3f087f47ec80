//! The processes of one machine, from birth to the last one gone: a pure state machine.
//!
//! ```text
//!            locked              end                gone
//!   Starting ──────▶ Serving ──────────▶ Ending ──────────▶ Gone
//!      │ dies, fails,   │ dies, breaks protocol, is stuck   ▲ dies, or is killed after its time
//!      ▼ overdue        ▼                                   │
//!   the start fails   its policy says: the machine is lost, or goes on without it (Lost), or
//!
//!   Dying ──dead──▶ Waiting ──pause over──▶ Reviving ──launched──▶ Starting ──serves──▶ Serving
//!                      ▲ dies or fails again, unless too often: Lost ◀───────┘
//! ```
//!
//! Invariants: of each slot at most one process is alive; every death is handled once; restarts never
//! exceed the policy's intensity; after [`Event::End`] nothing is reported as degraded or lost and
//! nothing is restarted; nothing waits here without a deadline, except for a revival, whose steps
//! have deadlines of their own.

use super::entry::{Entry, Phase};
use bulkhead_ipc::ident::ProcId;
use bulkhead_policies::plan::Policy;
use bulkhead_policies::schema::{FaultsEntry, HeartbeatEntry, OnDeath, RestartEntry};
use std::time::Duration;

/// A moment: time since the machine was started.
pub type Moment = Duration;

/// What the policy says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// What its death means.
    pub on_death: OnDeath,
    /// Time from start to lock.
    pub birth_timeout: Duration,
    /// How it is restarted.
    pub restart: Option<RestartEntry>,
    /// How it shows that it is not stuck.
    pub heartbeat: Option<HeartbeatEntry>,
    /// How often it may be killed for what it did or left undone.
    pub faults: Option<FaultsEntry>,
}

impl Rule {
    /// The rule of `policy`; births may take `longest` at most.
    #[must_use]
    pub fn of(policy: &Policy, longest: Duration) -> Self {
        Self {
            on_death: policy.on_death,
            birth_timeout: longest.min(Duration::from_millis(policy.birth_timeout_ms.into())),
            restart: policy.restart,
            heartbeat: policy.heartbeat,
            faults: policy.faults,
        }
    }
}

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process says that it is locked.
    Locked(ProcId),
    /// A process has taken its predecessor's place.
    Serving(ProcId),
    /// A process says that it cannot start, or broke its protocol; it is still there.
    Broke {
        /// Who.
        id: ProcId,
        /// What it said or did.
        reason: String,
    },
    /// A process is dead.
    Died {
        /// Who.
        id: ProcId,
        /// How, in words.
        reason: String,
        /// Whether SIGKILL ended it.
        killed: bool,
    },
    /// A process answered a heartbeat.
    Pong {
        /// Who.
        id: ProcId,
        /// Which.
        number: u64,
    },
    /// The successor that [`Action::Revive`] asked for was started.
    Launched(ProcId),
    /// It could not be.
    NotRevived {
        /// Who.
        id: ProcId,
        /// Why.
        reason: String,
        /// Whether trying again makes no sense.
        hopeless: bool,
    },
    /// The owner wants another process in the place of this one, whether it is alive or given up. If
    /// that one fails before it serves, one more is started without counting as a restart.
    Replace(ProcId),
    /// The machine is to end.
    End,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Every process is locked.
    AllLocked,
    /// The machine cannot start.
    StartFailed {
        /// Which process failed.
        id: ProcId,
        /// Why.
        reason: String,
    },
    /// Start this process in the place of the generation before it, which is dead.
    Revive {
        /// The new process.
        id: ProcId,
        /// Why the one before is dead.
        reason: String,
        /// Whether what it was working on may have killed it.
        blame: bool,
    },
    /// A restart is complete.
    Revived {
        /// The new process.
        id: ProcId,
        /// Why the one before had died.
        reason: String,
        /// Time from the first death to service.
        after: Duration,
    },
    /// A device is lost and the machine goes on.
    Degraded {
        /// Which process.
        id: ProcId,
        /// How it was lost.
        reason: String,
    },
    /// The machine cannot go on.
    MachineLost {
        /// Which process was lost.
        id: ProcId,
        /// How.
        reason: String,
    },
    /// Ask the process for a sign of life.
    Ping {
        /// Who.
        id: ProcId,
        /// To be repeated in the answer.
        number: u64,
    },
    /// Ask the process to end.
    Ask(ProcId),
    /// Kill the process.
    Kill(ProcId),
    /// Every process is gone.
    AllGone,
}

/// The processes of one machine.
#[derive(Debug)]
pub struct Supervisor {
    entries: Vec<Entry>,
    ending: bool,
    all_locked: bool,
    /// Whether a process was lost before it served: the machine is never up.
    start_failed: bool,
    shutdown_timeout: Duration,
}

impl Supervisor {
    /// Of a machine without processes yet, which have `shutdown_timeout` to end when asked.
    #[must_use]
    pub const fn new(shutdown_timeout: Duration) -> Self {
        Self {
            entries: Vec::new(),
            ending: false,
            all_locked: false,
            start_failed: false,
            shutdown_timeout,
        }
    }

    /// Adds a process that was just started.
    pub fn add(&mut self, id: ProcId, rule: Rule, now: Moment) {
        self.entries.push(Entry::new(id, rule, now));
    }

    /// When [`Event::Tick`] is wanted next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        self.entries.iter().filter_map(Entry::deadline).min()
    }

    /// The newest process in the place of `id`.
    #[must_use]
    pub fn current(&self, id: ProcId) -> Option<ProcId> {
        let mut ids = self.entries.iter().map(|entry| entry.id);
        ids.find(|other| (other.kind, other.index) == (id.kind, id.index))
    }

    /// Whether [`Event::Replace`] would do anything.
    #[must_use]
    pub fn can_replace(&self, id: ProcId) -> bool {
        let mut entries = self.entries.iter();
        let entry = entries.find(|entry| entry.id == id);
        !self.ending
            && self.all_locked
            && entry.is_some_and(|entry| {
                entry.rule.on_death != OnDeath::EndMachine
                    && matches!(entry.phase, Phase::Serving | Phase::Lost)
            })
    }

    /// Whether no process is left, and none will be started.
    #[must_use]
    pub fn all_gone(&self) -> bool {
        self.entries
            .iter()
            .all(|e| matches!(e.phase, Phase::Gone | Phase::Lost))
    }

    /// Takes one event at `now`.
    pub fn step(&mut self, event: Event, now: Moment) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Locked(id) => self.locked(id, now, &mut actions),
            Event::Serving(id) => self.serving(id, now, &mut actions),
            Event::Broke { id, reason } => self.broke(id, reason, now, &mut actions),
            Event::Died { id, reason, killed } => {
                self.died(id, reason, killed, now, &mut actions);
            }
            Event::Pong { id, number } => self.pong(id, number),
            Event::Launched(id) => self.launched(id, now),
            Event::NotRevived {
                id,
                reason,
                hopeless,
            } => self.not_revived(id, reason, hopeless, now, &mut actions),
            Event::Replace(id) => self.replace(id, now, &mut actions),
            Event::End => self.end(now, &mut actions),
            Event::Tick => self.tick(now, &mut actions),
        }
        let failed = |action: &Action| matches!(action, Action::StartFailed { .. });
        self.start_failed |= actions.iter().any(failed);
        self.may_be_up(&mut actions);
        actions
    }

    /// Every process serves, but for those that the machine has lost already.
    fn may_be_up(&mut self, actions: &mut Vec<Action>) {
        let is_up = |entry: &Entry| matches!(entry.phase, Phase::Serving | Phase::Lost);
        let serves = |entry: &Entry| entry.phase == Phase::Serving;
        if !self.all_locked
            && !self.start_failed
            && !self.ending
            && self.entries.iter().all(is_up)
            && self.entries.iter().any(serves)
        {
            self.all_locked = true;
            actions.push(Action::AllLocked);
        }
    }

    fn entry(&mut self, id: ProcId) -> Option<&mut Entry> {
        // An old generation's news find no entry.
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    fn living(&mut self, id: ProcId) -> Option<&mut Entry> {
        self.entry(id).filter(|entry| !entry.is_dead())
    }

    fn locked(&mut self, id: ProcId, now: Moment, actions: &mut Vec<Action>) {
        let Some(entry) = self.living(id) else { return };
        // One that follows another serves when it has taken its place, and not before.
        if !matches!(entry.phase, Phase::Starting { .. }) || entry.vacancy.is_some() {
            return;
        }
        entry.serve(now, actions);
    }

    fn serving(&mut self, id: ProcId, now: Moment, actions: &mut Vec<Action>) {
        let Some(entry) = self.living(id) else { return };
        if matches!(entry.phase, Phase::Starting { .. }) && entry.vacancy.is_some() {
            entry.serve(now, actions);
        }
    }

    fn pong(&mut self, id: ProcId, number: u64) {
        if let Some(entry) = self.living(id)
            && entry.beat.number == number
        {
            entry.beat.answered = true;
            entry.beat.misses = 0;
        }
    }

    fn broke(&mut self, id: ProcId, reason: String, now: Moment, actions: &mut Vec<Action>) {
        let timeout = self.shutdown_timeout;
        let ending = self.ending;
        let Some(entry) = self.living(id) else { return };
        if entry.broke.is_some() || entry.phase == Phase::Undead {
            return;
        }
        entry.broke = Some(reason.clone());
        entry.faults.push_back(now);
        let before = entry.phase;
        let until = now + timeout;
        let killed = true;
        actions.push(Action::Kill(id));
        if ending {
            entry.phase = Phase::Ending { until, killed };
        } else if entry.is_replaceable() {
            entry.phase = Phase::Dying { until, killed };
        } else {
            // What its death means is known, and it must not be waited for.
            entry.phase = Phase::Ending { until, killed };
            entry.consequence(before, reason, actions);
        }
    }

    fn died(
        &mut self,
        id: ProcId,
        reason: String,
        killed: bool,
        now: Moment,
        actions: &mut Vec<Action>,
    ) {
        let ending = self.ending;
        let Some(entry) = self.living(id) else { return };
        let before = entry.phase;
        if before == Phase::Undead {
            entry.phase = Phase::Lost;
        } else if !ending && entry.is_replaceable() {
            // Whoever kills it from outside does not do so for what it is working on.
            let outside = killed && entry.broke.is_none();
            let blame = !outside && !entry.planned;
            let reason = entry.broke.take().unwrap_or(reason);
            entry.vacate(reason, blame, now, actions);
        } else {
            let lost = !ending && entry.rule.on_death != OnDeath::EndMachine;
            entry.phase = if lost { Phase::Lost } else { Phase::Gone };
            if !ending {
                entry.consequence(before, reason, actions);
            }
        }
        if self.all_gone() {
            actions.push(Action::AllGone);
        }
    }

    fn launched(&mut self, id: ProcId, now: Moment) {
        let (ending, timeout) = (self.ending, self.shutdown_timeout);
        let Some(entry) = self.entry(id) else { return };
        if ending {
            entry.phase = Phase::Ending {
                until: now + timeout,
                killed: false,
            };
        } else if entry.phase == Phase::Reviving {
            entry.phase = Phase::Starting {
                until: now + entry.rule.birth_timeout,
            };
        }
    }

    fn not_revived(
        &mut self,
        id: ProcId,
        reason: String,
        hopeless: bool,
        now: Moment,
        actions: &mut Vec<Action>,
    ) {
        let Some(entry) = self.entry(id) else { return };
        if entry.phase != Phase::Reviving {
            return;
        }
        if hopeless {
            entry.lose(reason, actions);
        } else {
            entry.vacate(reason, false, now, actions);
        }
    }

    fn replace(&mut self, id: ProcId, now: Moment, actions: &mut Vec<Action>) {
        let until = now + self.shutdown_timeout;
        if !self.can_replace(id) {
            return;
        }
        let Some(entry) = self.entry(id) else { return };
        (entry.planned, entry.spare) = (true, true);
        match entry.phase {
            Phase::Serving => {
                actions.push(Action::Ask(id));
                entry.phase = Phase::Dying {
                    until,
                    killed: false,
                };
            }
            Phase::Lost => {
                entry.restarts.clear();
                entry.faults.clear();
                entry.vacate("a restart was asked for".to_owned(), false, now, actions);
            }
            _ => {}
        }
    }

    fn end(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.ending {
            return;
        }
        self.ending = true;
        let until = now + self.shutdown_timeout;
        for entry in &mut self.entries {
            match entry.phase {
                // One that is still starting finds the message when it serves: what the guest has
                // posted to it before it ended is not lost.
                Phase::Starting { .. } | Phase::Serving => {
                    actions.push(Action::Ask(entry.id));
                    entry.phase = Phase::Ending {
                        until,
                        killed: false,
                    };
                }
                Phase::Undead => {
                    entry.phase = Phase::Ending {
                        until,
                        killed: true,
                    };
                }
                Phase::Dying { killed, .. } => entry.phase = Phase::Ending { until, killed },
                Phase::Waiting { .. } | Phase::Reviving | Phase::Lost => entry.phase = Phase::Gone,
                Phase::Ending { .. } | Phase::Gone => {}
            }
        }
        if self.all_gone() {
            actions.push(Action::AllGone);
        }
    }

    fn tick(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let mut faults = Vec::new();
        for entry in &mut self.entries {
            if entry.deadline().is_none_or(|deadline| deadline > now) {
                continue;
            }
            match &mut entry.phase {
                Phase::Starting { .. } => {
                    faults.push((entry.id, "was not ready in time".to_owned()));
                }
                Phase::Serving => faults.extend(entry.beat(now, actions)),
                Phase::Waiting { .. } => entry.revive_in_time(now, actions),
                Phase::Dying { until, killed } if !*killed => {
                    (*until, *killed) = (now + self.shutdown_timeout, true);
                    actions.push(Action::Kill(entry.id));
                }
                Phase::Dying { .. } => {
                    entry.lose("was killed and does not die".to_owned(), actions);
                    entry.phase = Phase::Undead;
                }
                Phase::Ending { killed, .. } => {
                    *killed = true;
                    actions.push(Action::Kill(entry.id));
                }
                Phase::Reviving | Phase::Undead | Phase::Lost | Phase::Gone => {}
            }
        }
        for (id, reason) in faults {
            self.broke(id, reason, now, actions);
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
