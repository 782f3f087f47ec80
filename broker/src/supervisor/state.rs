//! The processes of one machine, from birth to the last one gone: a pure state machine.
//!
//! ```text
//!            locked              end                gone
//!   Starting ──────▶ Serving ──────────▶ Ending ──────────▶ Gone
//!      │ dies, fails,   │ dies, breaks protocol     ▲ dies, or is killed after its time
//!      ▼ overdue        ▼                           │
//!   the start fails   degraded, or the machine is lost
//! ```
//!
//! Invariants: every process that was added is reported gone exactly once; after
//! [`Event::End`] nothing is reported as degraded or lost; nothing waits without a deadline.
//! A restart will be a new generation of a gone entry that is added again.

use bulkhead_ipc::ident::ProcId;
use bulkhead_policies::schema::OnDeath;
use std::time::Duration;

/// A moment: time since the machine was started.
pub type Moment = Duration;

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process says that it is locked.
    Locked(ProcId),
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
    },
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
    /// Ask the process to end.
    Ask(ProcId),
    /// Kill the process.
    Kill(ProcId),
    /// Every process is gone.
    AllGone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting { until: Moment },
    Serving,
    Ending { until: Moment, killed: bool },
    Gone,
}

#[derive(Debug)]
struct Entry {
    id: ProcId,
    on_death: OnDeath,
    phase: Phase,
    /// Why it is being killed, if it broke something before it died.
    broke: Option<String>,
}

/// The processes of one machine.
#[derive(Debug)]
pub struct Supervisor {
    entries: Vec<Entry>,
    ending: bool,
    all_locked: bool,
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
            shutdown_timeout,
        }
    }

    /// Adds a process that was just started and has to be locked until `until`.
    pub fn add(&mut self, id: ProcId, on_death: OnDeath, until: Moment) {
        self.entries.push(Entry {
            id,
            on_death,
            phase: Phase::Starting { until },
            broke: None,
        });
    }

    /// When [`Event::Tick`] is wanted next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Moment> {
        let deadlines = self.entries.iter().filter_map(|entry| match entry.phase {
            Phase::Starting { until }
            | Phase::Ending {
                until,
                killed: false,
            } => Some(until),
            Phase::Serving | Phase::Ending { killed: true, .. } | Phase::Gone => None,
        });
        deadlines.min()
    }

    /// Whether every process is gone.
    #[must_use]
    pub fn all_gone(&self) -> bool {
        self.entries.iter().all(|e| e.phase == Phase::Gone)
    }

    /// Takes one event at `now`.
    pub fn step(&mut self, event: Event, now: Moment) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Locked(id) => self.locked(id, &mut actions),
            Event::Broke { id, reason } => self.broke(id, reason, now, &mut actions),
            Event::Died { id, reason } => self.died(id, reason, &mut actions),
            Event::End => self.end(now, &mut actions),
            Event::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    fn entry(&mut self, id: ProcId) -> Option<&mut Entry> {
        // An old generation's news find no entry.
        self.entries
            .iter_mut()
            .find(|entry| entry.id == id && entry.phase != Phase::Gone)
    }

    fn locked(&mut self, id: ProcId, actions: &mut Vec<Action>) {
        let Some(entry) = self.entry(id) else { return };
        if !matches!(entry.phase, Phase::Starting { .. }) {
            return;
        }
        entry.phase = Phase::Serving;
        let all = self.entries.iter().all(|e| e.phase == Phase::Serving);
        if all && !self.all_locked && !self.ending {
            self.all_locked = true;
            actions.push(Action::AllLocked);
        }
    }

    fn broke(&mut self, id: ProcId, reason: String, now: Moment, actions: &mut Vec<Action>) {
        let timeout = self.shutdown_timeout;
        let Some(entry) = self.entry(id) else { return };
        if entry.broke.is_some() {
            return;
        }
        entry.broke = Some(reason.clone());
        let (before, on_death) = (entry.phase, entry.on_death);
        entry.phase = Phase::Ending {
            until: now + timeout,
            killed: true,
        };
        actions.push(Action::Kill(id));
        self.consequence(id, before, on_death, reason, actions);
    }

    fn died(&mut self, id: ProcId, reason: String, actions: &mut Vec<Action>) {
        let Some(entry) = self.entry(id) else { return };
        let (before, on_death) = (entry.phase, entry.on_death);
        entry.phase = Phase::Gone;
        self.consequence(id, before, on_death, reason, actions);
        if self.all_gone() {
            actions.push(Action::AllGone);
        }
    }

    fn consequence(
        &self,
        id: ProcId,
        before: Phase,
        on_death: OnDeath,
        reason: String,
        actions: &mut Vec<Action>,
    ) {
        if self.ending {
            return;
        }
        actions.push(match (before, on_death) {
            (Phase::Starting { .. }, _) => Action::StartFailed { id, reason },
            (Phase::Serving, OnDeath::Degrade) => Action::Degraded { id, reason },
            (Phase::Serving, OnDeath::EndMachine) => Action::MachineLost { id, reason },
            (Phase::Ending { .. } | Phase::Gone, _) => return,
        });
    }

    fn end(&mut self, now: Moment, actions: &mut Vec<Action>) {
        if self.ending {
            return;
        }
        self.ending = true;
        for entry in &mut self.entries {
            match entry.phase {
                // One that is still starting finds the message when it serves: what the guest has
                // posted to it before it ended is not lost.
                Phase::Starting { .. } | Phase::Serving => {
                    actions.push(Action::Ask(entry.id));
                    entry.phase = Phase::Ending {
                        until: now + self.shutdown_timeout,
                        killed: false,
                    };
                }
                Phase::Ending { .. } | Phase::Gone => {}
            }
        }
        if self.all_gone() {
            actions.push(Action::AllGone);
        }
    }

    fn tick(&mut self, now: Moment, actions: &mut Vec<Action>) {
        let overdue: Vec<ProcId> = self
            .entries
            .iter()
            .filter(|e| matches!(e.phase, Phase::Starting { until } if until <= now))
            .map(|e| e.id)
            .collect();
        for id in overdue {
            let reason = "was not ready in time".to_owned();
            self.broke(id, reason, now, actions);
        }
        for entry in &mut self.entries {
            if let Phase::Ending { until, killed } = &mut entry.phase
                && !*killed
                && *until <= now
            {
                *killed = true;
                actions.push(Action::Kill(entry.id));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::ident::ProcKind;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn id(n: u16) -> ProcId {
        ProcId {
            kind: match n {
                0 => ProcKind::Vcpu,
                _ => ProcKind::Blk,
            },
            index: n,
            generation: 1,
        }
    }

    fn supervisor(count: u16) -> Supervisor {
        let mut s = Supervisor::new(SECOND);
        for n in 0..count {
            let on_death = match n {
                0 => OnDeath::EndMachine,
                _ => OnDeath::Degrade,
            };
            s.add(id(n), on_death, 10 * SECOND);
        }
        s
    }

    fn died(n: u16) -> Event {
        Event::Died {
            id: id(n),
            reason: "x".into(),
        }
    }

    #[test]
    fn machine_is_up_when_the_last_process_is_locked() {
        let mut s = supervisor(3);
        assert_eq!(s.step(Event::Locked(id(0)), SECOND), []);
        assert_eq!(s.step(Event::Locked(id(2)), SECOND), []);
        assert_eq!(s.step(Event::Locked(id(1)), SECOND), [Action::AllLocked]);
        assert_eq!(s.next_deadline(), None);
    }

    #[test]
    fn process_that_is_not_ready_in_time_fails_the_start() {
        let mut s = supervisor(2);
        s.step(Event::Locked(id(0)), SECOND);
        assert_eq!(s.next_deadline(), Some(10 * SECOND));
        let actions = s.step(Event::Tick, 10 * SECOND);
        assert_eq!(actions[0], Action::Kill(id(1)));
        assert!(matches!(actions[1], Action::StartFailed { .. }));
    }

    #[test]
    fn dead_device_degrades_and_dead_vcpu_ends() {
        let mut s = supervisor(2);
        s.step(Event::Locked(id(0)), SECOND);
        s.step(Event::Locked(id(1)), SECOND);
        assert!(matches!(
            s.step(died(1), SECOND)[..],
            [Action::Degraded { .. }]
        ));
        let actions = s.step(died(0), SECOND);
        assert!(matches!(
            actions[..],
            [Action::MachineLost { .. }, Action::AllGone]
        ));
    }

    #[test]
    fn news_of_an_old_generation_change_nothing() {
        let mut s = supervisor(1);
        let mut old = id(0);
        old.generation = 0;
        assert_eq!(s.step(Event::Locked(old), SECOND), []);
        let reason = String::new();
        assert_eq!(s.step(Event::Died { id: old, reason }, SECOND), []);
    }

    #[test]
    fn process_that_does_not_end_is_killed() {
        let mut s = supervisor(1);
        s.step(Event::Locked(id(0)), SECOND);
        assert_eq!(s.step(Event::End, SECOND), [Action::Ask(id(0))]);
        assert_eq!(s.next_deadline(), Some(2 * SECOND));
        assert_eq!(s.step(Event::Tick, 2 * SECOND), [Action::Kill(id(0))]);
        assert_eq!(s.step(died(0), 3 * SECOND), [Action::AllGone]);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let who = (0u16..5).prop_map(id);
        prop_oneof![
            4 => who.clone().prop_map(Event::Locked),
            1 => who.clone().prop_map(|id| Event::Broke { id, reason: "b".into() }),
            2 => who.prop_map(|id| Event::Died { id, reason: "d".into() }),
            1 => Just(Event::End),
            3 => Just(Event::Tick),
        ]
    }

    proptest! {
        #[test]
        fn in_any_order_everything_ends_and_nothing_is_told_twice(
            events in prop::collection::vec((any_event(), 0u64..5), 0..60)
        ) {
            let mut s = supervisor(5);
            let mut now = Duration::ZERO;
            let mut said = Vec::new();
            let mut ended = false;
            for (event, seconds) in events {
                now += Duration::from_secs(seconds);
                ended |= event == Event::End;
                let actions = s.step(event, now);
                let told = actions.iter().any(|a| matches!(
                    a,
                    Action::Degraded { .. } | Action::MachineLost { .. } | Action::AllLocked
                ));
                prop_assert!(!(ended && told), "a planned end is no loss");
                said.extend(actions);
            }
            said.extend(s.step(Event::End, now));
            // Whoever is told to end or killed dies, sooner or later.
            while let Some(deadline) = s.next_deadline() {
                said.extend(s.step(Event::Tick, deadline));
            }
            for n in 0..5 {
                said.extend(s.step(died(n), now));
            }
            prop_assert!(s.all_gone());
            let count = |f: &dyn Fn(&Action) -> bool| said.iter().filter(|a| f(a)).count();
            prop_assert!(count(&|a| *a == Action::AllLocked) <= 1);
            prop_assert!(count(&|a| *a == Action::AllGone) >= 1);
            for n in 0..5 {
                let lost = |a: &Action| matches!(
                    a,
                    Action::Degraded { id: who, .. } | Action::MachineLost { id: who, .. }
                        | Action::StartFailed { id: who, .. } if *who == id(n)
                );
                prop_assert!(count(&lost) <= 1);
            }
        }
    }
}
