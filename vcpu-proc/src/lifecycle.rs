//! The life of the VM as the control thread decides it, without doing anything: events in, actions
//! out.
//!
//! ```text
//!   Running <-> Pausing -> Paused          a pause may be undone at any time
//!      \___________|_________/
//!                  v
//!              Stopping -> Ended           for good; the first outcome counts
//! ```
//!
//! It never waits, and it never asks anything of a vCPU but through a [`Directive`]. A broker that is
//! gone is no event: the VM goes on, and one that has ended waits for the next broker to hear of it.

use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};

use crate::gate::Successor;
use crate::group::{Directive, Ending};

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The broker said something.
    Message(ToVcpu),
    /// Every vCPU holds.
    AllHold,
    /// The guest has ended.
    GuestEnded(Ending),
    /// Every vCPU thread has left its loop.
    AllStopped,
    /// The broker has been told of the end and has not let go for a while.
    Unheard,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Give the vCPUs a directive.
    Direct(Directive),
    /// Tell the broker.
    Send(FromVcpu),
    /// Press the power button.
    PressPowerButton,
    /// Make this slot ready for another device process.
    PrepareSlot(u8, Successor),
    /// Answer the requests of this slot with errors.
    LoseDevice(u8),
    /// Make the legacy page ready for a process of this generation.
    PrepareLegacy(u32),
    /// Let the legacy registers read as all ones.
    LoseLegacy,
    /// Report the end: a crash report where the outcome calls for one, then the outcome.
    Conclude(Ending),
    /// End the process.
    Exit,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Running,
    Pausing,
    Paused,
    Stopping(Ending),
    Ended(Outcome),
}

/// The state machine.
#[derive(Debug)]
pub struct Lifecycle {
    phase: Phase,
    /// The process ends with the VM, without waiting to be told.
    leave: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            phase: Phase::Running,
            leave: false,
        }
    }
}

impl Lifecycle {
    /// Whether vCPUs are being waited for, so that they have to be kicked again.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Pausing | Phase::Stopping(_))
    }

    /// Whether the VM has ended and the broker is to let it go.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// Takes one event.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Message(message) => self.hear(message),
            Event::AllHold if self.phase == Phase::Pausing => {
                self.phase = Phase::Paused;
                vec![Action::Send(FromVcpu::Paused)]
            }
            Event::AllHold => Vec::new(),
            Event::GuestEnded(ending) => self.stop(ending),
            Event::AllStopped => self.conclude(),
            Event::Unheard if self.has_ended() => self.tell(),
            Event::Unheard => Vec::new(),
        }
    }

    fn hear(&mut self, message: ToVcpu) -> Vec<Action> {
        match message {
            ToVcpu::Kill => self.kill(),
            ToVcpu::Ping(number) => vec![Action::Send(FromVcpu::Pong(number))],
            ToVcpu::PowerButton => vec![Action::PressPowerButton],
            ToVcpu::PrepareSlot {
                slot,
                generation,
                blame,
                fields_change,
            } => vec![Action::PrepareSlot(
                slot,
                Successor {
                    generation,
                    blame,
                    fields_change,
                },
            )],
            ToVcpu::Tell => self.tell(),
            ToVcpu::DeviceLost { slot } => vec![Action::LoseDevice(slot)],
            ToVcpu::PrepareLegacy { generation } => vec![Action::PrepareLegacy(generation)],
            ToVcpu::LegacyLost => vec![Action::LoseLegacy],
            ToVcpu::Pause => match self.phase {
                Phase::Running => {
                    self.phase = Phase::Pausing;
                    vec![Action::Direct(Directive::Hold)]
                }
                Phase::Paused => vec![Action::Send(FromVcpu::Paused)],
                Phase::Pausing | Phase::Stopping(_) | Phase::Ended(_) => Vec::new(),
            },
            ToVcpu::Resume => match self.phase {
                Phase::Pausing | Phase::Paused => {
                    self.phase = Phase::Running;
                    vec![
                        Action::Direct(Directive::Run),
                        Action::Send(FromVcpu::Resumed),
                    ]
                }
                Phase::Running => vec![Action::Send(FromVcpu::Resumed)],
                Phase::Stopping(_) | Phase::Ended(_) => Vec::new(),
            },
        }
    }

    /// What a new broker has to know. One that is about to change says so by itself.
    fn tell(&self) -> Vec<Action> {
        match &self.phase {
            Phase::Running => vec![Action::Send(FromVcpu::Resumed)],
            Phase::Paused => vec![Action::Send(FromVcpu::Paused)],
            Phase::Ended(outcome) => vec![Action::Send(FromVcpu::Ended(*outcome))],
            Phase::Pausing | Phase::Stopping(_) => Vec::new(),
        }
    }

    fn kill(&mut self) -> Vec<Action> {
        self.leave = true;
        if matches!(self.phase, Phase::Ended(_)) {
            return vec![Action::Exit];
        }
        self.stop(Ending {
            outcome: Outcome::Killed,
            vcpu: 0,
            detail: String::new(),
        })
    }

    fn stop(&mut self, ending: Ending) -> Vec<Action> {
        match self.phase {
            Phase::Running | Phase::Pausing | Phase::Paused => {
                self.phase = Phase::Stopping(ending);
                vec![Action::Direct(Directive::Stop)]
            }
            Phase::Stopping(_) | Phase::Ended(_) => Vec::new(),
        }
    }

    fn conclude(&mut self) -> Vec<Action> {
        let Phase::Stopping(ending) = &self.phase else {
            return Vec::new();
        };
        let ending = ending.clone();
        self.phase = Phase::Ended(ending.outcome);
        let mut actions = vec![Action::Conclude(ending)];
        if self.leave {
            actions.push(Action::Exit);
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ended(outcome: Outcome) -> Event {
        Event::GuestEnded(Ending {
            outcome,
            vcpu: 1,
            detail: String::new(),
        })
    }

    fn outcome_of(actions: &[Action]) -> Option<Outcome> {
        actions.iter().find_map(|action| match action {
            Action::Conclude(ending) => Some(ending.outcome),
            _ => None,
        })
    }

    #[test]
    fn pause_is_answered_when_every_vcpu_holds() {
        let mut life = Lifecycle::default();
        let actions = life.step(Event::Message(ToVcpu::Pause));
        assert_eq!(actions, [Action::Direct(Directive::Hold)]);
        assert!(life.is_waiting());
        assert_eq!(life.step(Event::AllHold), [Action::Send(FromVcpu::Paused)]);
        assert!(!life.is_waiting());
        assert_eq!(life.step(Event::AllHold), []);
    }

    #[test]
    fn first_outcome_counts_and_a_later_kill_only_ends_the_process() {
        let mut life = Lifecycle::default();
        let actions = life.step(ended(Outcome::TripleFault));
        assert_eq!(actions, [Action::Direct(Directive::Stop)]);
        assert_eq!(life.step(ended(Outcome::PowerOff)), []);
        assert_eq!(life.step(Event::Message(ToVcpu::Kill)), []);
        let actions = life.step(Event::AllStopped);
        assert_eq!(outcome_of(&actions), Some(Outcome::TripleFault));
        assert_eq!(actions.last(), Some(&Action::Exit));
    }

    #[test]
    fn ended_machine_waits_for_the_broker_to_let_it_go() {
        let mut life = Lifecycle::default();
        life.step(ended(Outcome::PowerOff));
        let actions = life.step(Event::AllStopped);
        assert_eq!(outcome_of(&actions), Some(Outcome::PowerOff));
        assert!(!actions.contains(&Action::Exit));
        let kill = Event::Message(ToVcpu::Kill);
        assert_eq!(life.step(kill), [Action::Exit]);
    }

    #[test]
    fn end_that_nobody_has_heard_of_is_told_again() {
        let mut life = Lifecycle::default();
        assert_eq!(life.step(Event::Unheard), []);
        life.step(ended(Outcome::PowerOff));
        assert_eq!(life.step(Event::Unheard), []);
        life.step(Event::AllStopped);
        let again = Action::Send(FromVcpu::Ended(Outcome::PowerOff));
        assert_eq!(life.step(Event::Unheard), [again]);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Message(ToVcpu::Kill)),
            Just(Event::Message(ToVcpu::Pause)),
            Just(Event::Message(ToVcpu::Resume)),
            Just(Event::Message(ToVcpu::PowerButton)),
            Just(Event::AllHold),
            Just(Event::AllStopped),
            Just(Event::Unheard),
            Just(ended(Outcome::Reset)),
        ]
    }

    proptest! {
        #[test]
        fn machine_is_concluded_once_and_never_run_after_a_stop(
            events in proptest::collection::vec(any_event(), 0..40),
        ) {
            let mut life = Lifecycle::default();
            let (mut stopped, mut concluded) = (false, 0);
            for event in events {
                // The vCPUs can only have stopped when they were told to.
                if event == Event::AllStopped && !stopped {
                    continue;
                }
                for action in life.step(event) {
                    match action {
                        Action::Direct(Directive::Stop) => stopped = true,
                        Action::Direct(_) => prop_assert!(!stopped),
                        Action::Conclude(_) => concluded += 1,
                        Action::Exit => prop_assert_eq!(concluded, 1),
                        _ => {}
                    }
                }
            }
            prop_assert!(concluded <= 1);
        }
    }
}
