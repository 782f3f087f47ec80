//! The life of a machine: a pure state machine over what its processes and its owner say.
//!
//! ```text
//!   Starting ──▶ Running ◀──▶ Paused
//!       │           │            │
//!       ▼           ▼            ▼       Preserved: ended, kept as it is until it is killed
//!      Stopping ◀───┴────────────┴── Preserved
//!       │ every process gone
//!       ▼
//!      Over(verdict): finished, restart, or the start failed
//! ```
//!
//! The first reason to stop is the one that counts.

use super::session::{Command, Ending};
use super::spec::{Lifecycle, OnEnd};
use bulkhead_ipc::protocol::vcpu::{Outcome, ToVcpu};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Every process is locked.
    AllLocked,
    /// A process could not start: its name and why.
    StartFailed(String, String),
    /// A process that the machine cannot do without was lost.
    Lost(String),
    /// The vCPU process says that the machine has ended.
    Ended(Outcome),
    /// The vCPUs are stopped.
    Paused,
    /// The vCPUs run again.
    Resumed,
    /// The host has no room for what the guest writes.
    NoRoom,
    /// It has.
    HasRoom,
    /// The owner wants something.
    Command(Command),
    /// The run's time-out has passed.
    TimedOut(Duration),
    /// Every process is gone.
    AllGone,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Tell the vCPU process.
    Tell(ToVcpu),
    /// End every process.
    End,
    /// Nothing is left.
    Over(Verdict),
}

/// How it went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The run is over.
    Finished(Ending),
    /// The machine is to be started again.
    Restart,
    /// The machine could not start: which process, and why.
    StartFailed(String, String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Starting,
    Running,
    Paused,
    Preserved(Ending),
    Stopping(Verdict),
    Over,
}

/// The state machine.
#[derive(Debug)]
pub struct Life {
    state: State,
    lifecycle: Lifecycle,
    may_restart: bool,
    /// Whether the owner has pressed the power button and waits for the guest to go off.
    off_wanted: bool,
    /// Whether the owner has paused it.
    pause_wanted: bool,
    /// Whether it waits for room on the host.
    no_room: bool,
    /// Whether the vCPUs were paused before every process was locked.
    paused_early: bool,
    /// Whether the vCPU process was told to resume and has not answered.
    resuming: bool,
}

impl Life {
    /// Of a machine that is being started; `may_restart` is whether [`OnEnd::Restart`] counts.
    #[must_use]
    pub const fn new(lifecycle: Lifecycle, may_restart: bool) -> Self {
        Self {
            state: State::Starting,
            lifecycle,
            may_restart,
            off_wanted: false,
            pause_wanted: false,
            no_room: false,
            paused_early: false,
            resuming: false,
        }
    }

    /// The same of a machine that another broker has started, and may have paused.
    #[must_use]
    pub fn found(self, pause_wanted: bool, no_room: bool) -> Self {
        Self {
            pause_wanted,
            no_room,
            ..self
        }
    }

    /// Whether the owner has paused it.
    #[must_use]
    pub const fn is_pause_wanted(&self) -> bool {
        self.pause_wanted
    }

    /// Whether processes are being ended on purpose.
    #[must_use]
    pub const fn is_stopping(&self) -> bool {
        matches!(self.state, State::Stopping(_) | State::Over)
    }

    /// Whether the machine has ended and is kept as it is.
    #[must_use]
    pub const fn is_preserved(&self) -> bool {
        matches!(self.state, State::Preserved(_))
    }

    /// How it ends, while processes are being ended for it.
    #[must_use]
    pub const fn verdict(&self) -> Option<&Verdict> {
        match &self.state {
            State::Stopping(verdict) => Some(verdict),
            _ => None,
        }
    }

    /// Takes one input.
    pub fn step(&mut self, input: Input) -> Vec<Output> {
        let outputs = self.decide(input);
        let resumes = |output: &Output| *output == Output::Tell(ToVcpu::Resume);
        self.resuming |= outputs.iter().any(resumes);
        outputs
    }

    fn decide(&mut self, input: Input) -> Vec<Output> {
        match input {
            Input::AllLocked => {
                if self.state == State::Starting {
                    self.state = match self.paused_early {
                        true => State::Paused,
                        false => State::Running,
                    };
                }
                Vec::new()
            }
            Input::StartFailed(who, why) => self.stop(Verdict::StartFailed(who, why)),
            Input::Lost(reason) => self.lost(reason),
            Input::Ended(outcome) => self.ended(outcome),
            Input::Paused => {
                self.paused_early = true;
                self.change(State::Running, State::Paused)
            }
            Input::Resumed => {
                (self.paused_early, self.resuming) = (false, false);
                self.change(State::Paused, State::Running)
            }
            Input::NoRoom => self.wait_for_room(),
            Input::HasRoom => self.go_on(),
            Input::Command(command) => self.command(command),
            Input::TimedOut(after) => self.stop_as(Ending::TimedOut(after)),
            Input::AllGone => self.all_gone(),
        }
    }

    fn change(&mut self, from: State, to: State) -> Vec<Output> {
        if self.state == from {
            self.state = to;
        }
        Vec::new()
    }

    fn wait_for_room(&mut self) -> Vec<Output> {
        self.no_room = true;
        match self.may_run() {
            true => vec![Output::Tell(ToVcpu::Pause)],
            false => Vec::new(),
        }
    }

    /// Whether the vCPUs run, or do so in a moment.
    const fn may_run(&self) -> bool {
        match self.state {
            State::Starting | State::Running => true,
            State::Paused => self.resuming,
            _ => false,
        }
    }

    fn go_on(&mut self) -> Vec<Output> {
        let waited = std::mem::replace(&mut self.no_room, false);
        match self.state {
            State::Starting | State::Running | State::Paused if waited && !self.pause_wanted => {
                vec![Output::Tell(ToVcpu::Resume)]
            }
            _ => Vec::new(),
        }
    }

    fn stop(&mut self, verdict: Verdict) -> Vec<Output> {
        if self.is_stopping() {
            return Vec::new();
        }
        self.state = State::Stopping(verdict);
        vec![Output::End]
    }

    /// Stops where it was about to start again.
    fn stop_instead(&mut self, ending: Ending) -> Vec<Output> {
        self.state = State::Stopping(Verdict::Finished(ending));
        vec![Output::End]
    }

    /// Stops; a machine that was preserved has ended as it ended.
    fn stop_as(&mut self, ending: Ending) -> Vec<Output> {
        let ending = match &self.state {
            State::Preserved(preserved) => preserved.clone(),
            _ => ending,
        };
        self.stop(Verdict::Finished(ending))
    }

    fn ended(&mut self, outcome: Outcome) -> Vec<Output> {
        if self.is_stopping() || matches!(self.state, State::Preserved(_)) {
            return Vec::new();
        }
        let life = self.lifecycle;
        let (ending, then) = match outcome {
            Outcome::PowerOff => (Ending::PoweredOff, life.on_poweroff),
            Outcome::Reset => (Ending::PoweredOff, life.on_reboot),
            Outcome::GuestPanic => (Ending::GuestPanic, life.on_crash),
            Outcome::TripleFault => (Ending::TripleFault, life.on_crash),
            Outcome::InternalError => (Ending::InternalError, life.on_crash),
            Outcome::DebugExit(value) => (Ending::DebugExit(value), OnEnd::Destroy),
            Outcome::Killed => (Ending::Killed, OnEnd::Destroy),
        };
        let off = self.off_wanted && outcome == Outcome::PowerOff && then == OnEnd::Restart;
        match then {
            OnEnd::Restart if off => self.stop(Verdict::Finished(ending)),
            OnEnd::Restart if self.may_restart => self.stop(Verdict::Restart),
            OnEnd::Preserve => {
                self.state = State::Preserved(ending);
                Vec::new()
            }
            OnEnd::Restart | OnEnd::Destroy => self.stop(Verdict::Finished(ending)),
        }
    }

    fn lost(&mut self, reason: String) -> Vec<Output> {
        let restart = self.lifecycle.on_crash == OnEnd::Restart && self.may_restart;
        if restart && !matches!(self.state, State::Preserved(_)) {
            return self.stop(Verdict::Restart);
        }
        self.stop_as(Ending::Lost { reason })
    }

    fn command(&mut self, command: Command) -> Vec<Output> {
        match command {
            Command::Pause => self.pause_wanted = true,
            Command::Resume => self.pause_wanted = false,
            _ => {}
        }
        match (command, &self.state) {
            // Between two lives, too: the next one is not wanted any more.
            (Command::Kill, State::Stopping(Verdict::Restart)) => self.stop_instead(Ending::Killed),
            (Command::Interrupt, State::Stopping(Verdict::Restart)) => {
                self.stop_instead(Ending::Interrupted)
            }
            (Command::Kill, _) => self.stop_as(Ending::Killed),
            (Command::Interrupt, _) => self.stop_as(Ending::Interrupted),
            (Command::PowerButton, State::Starting | State::Running | State::Paused) => {
                self.off_wanted = true;
                vec![Output::Tell(ToVcpu::PowerButton)]
            }
            (Command::RunOn, _) => {
                self.off_wanted = false;
                Vec::new()
            }
            (Command::Reset, _) => self.stop(Verdict::Restart),
            (Command::Pause, _) if self.may_run() => vec![Output::Tell(ToVcpu::Pause)],
            (Command::Resume, State::Starting | State::Running | State::Paused)
                if !self.no_room =>
            {
                vec![Output::Tell(ToVcpu::Resume)]
            }
            // These concern device processes, of which the driver knows.
            (
                Command::Resize { .. }
                | Command::RestartDevice(_)
                | Command::UpgradeDevice(_)
                | Command::LimitDevice { .. }
                | Command::ChangeDisk { .. }
                | Command::LinkDevice { .. },
                _,
            )
            | (Command::PowerButton | Command::Pause | Command::Resume, _) => Vec::new(),
        }
    }

    fn all_gone(&mut self) -> Vec<Output> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Stopping(verdict) => vec![Output::Over(verdict)],
            State::Preserved(ending) => vec![Output::Over(Verdict::Finished(ending))],
            State::Over => Vec::new(),
            State::Starting | State::Running | State::Paused => {
                let reason = "every process is gone".to_owned();
                vec![Output::Over(Verdict::Finished(Ending::Lost { reason }))]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn life(on_reboot: OnEnd, may_restart: bool) -> Life {
        let lifecycle = Lifecycle {
            on_reboot,
            ..Lifecycle::default()
        };
        let mut life = Life::new(lifecycle, may_restart);
        life.step(Input::AllLocked);
        life
    }

    fn verdict(mut life: Life, inputs: &[Input]) -> Verdict {
        for input in inputs {
            life.step(input.clone());
        }
        match life.step(Input::AllGone).as_slice() {
            [Output::Over(verdict)] => verdict.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn finished(ending: Ending) -> Verdict {
        Verdict::Finished(ending)
    }

    #[test]
    fn outcomes_are_distinct() {
        let cases = [
            (Outcome::PowerOff, Ending::PoweredOff),
            (Outcome::GuestPanic, Ending::GuestPanic),
            (Outcome::TripleFault, Ending::TripleFault),
            (Outcome::InternalError, Ending::InternalError),
            (Outcome::DebugExit(3), Ending::DebugExit(3)),
        ];
        for (outcome, ending) in cases {
            let life = life(OnEnd::Restart, true);
            assert_eq!(verdict(life, &[Input::Ended(outcome)]), finished(ending));
        }
    }

    #[test]
    fn reset_restarts_unless_told_otherwise() {
        let reset = [Input::Ended(Outcome::Reset)];
        assert_eq!(
            verdict(life(OnEnd::Restart, true), &reset),
            Verdict::Restart
        );
        let off = finished(Ending::PoweredOff);
        assert_eq!(verdict(life(OnEnd::Restart, false), &reset), off);
        assert_eq!(verdict(life(OnEnd::Destroy, true), &reset), off);
    }

    #[test]
    fn guest_that_ends_before_every_process_is_up_has_ended_all_the_same() {
        let life = Life::new(Lifecycle::default(), true);
        let inputs = [
            Input::Ended(Outcome::PowerOff),
            Input::StartFailed("rng".into(), "late".into()),
        ];
        assert_eq!(verdict(life, &inputs), finished(Ending::PoweredOff));
    }

    #[test]
    fn preserved_machine_waits_to_be_killed_and_ends_as_it_ended() {
        let mut life = life(OnEnd::Preserve, true);
        assert_eq!(life.step(Input::Ended(Outcome::Reset)), []);
        assert_eq!(life.step(Input::Command(Command::Pause)), []);
        assert_eq!(
            life.step(Input::Command(Command::Kill)),
            [Output::End],
            "killing ends it"
        );
        assert_eq!(
            life.step(Input::AllGone),
            [Output::Over(finished(Ending::PoweredOff))]
        );
    }

    #[test]
    fn machine_that_is_killed_between_two_lives_stays_dead() {
        for (command, ending) in [
            (Command::Kill, Ending::Killed),
            (Command::Interrupt, Ending::Interrupted),
        ] {
            let inputs = [Input::Ended(Outcome::Reset), Input::Command(command)];
            assert_eq!(
                verdict(life(OnEnd::Restart, true), &inputs),
                finished(ending)
            );
        }
    }

    #[test]
    fn guest_that_was_told_to_go_off_stays_off_whatever_its_life_cycle_says() {
        let lifecycle = Lifecycle {
            on_poweroff: OnEnd::Restart,
            ..Lifecycle::default()
        };
        let off = [Input::Ended(Outcome::PowerOff)];
        let button = Input::Command(Command::PowerButton);
        let running_on = [button.clone(), Input::Command(Command::RunOn)];
        let pressed = |inputs: &[Input]| verdict(Life::new(lifecycle, true), inputs);
        assert_eq!(pressed(&off), Verdict::Restart);
        let wanted = [&[button][..], &off].concat();
        assert_eq!(pressed(&wanted), finished(Ending::PoweredOff));
        let given_up = [&running_on[..], &off].concat();
        assert_eq!(pressed(&given_up), Verdict::Restart);
    }

    #[test]
    fn reset_button_starts_the_machine_again_even_if_resets_of_the_guest_end_it() {
        let reset = [Input::Command(Command::Reset)];
        assert_eq!(
            verdict(life(OnEnd::Destroy, false), &reset),
            Verdict::Restart
        );
        let preserved = [Input::Ended(Outcome::Reset), reset[0].clone()];
        assert_eq!(
            verdict(life(OnEnd::Preserve, true), &preserved),
            Verdict::Restart
        );
    }

    #[test]
    fn machine_without_room_goes_on_by_itself_unless_its_owner_has_paused_it() {
        let pause = [Output::Tell(ToVcpu::Pause)];
        let resume = [Output::Tell(ToVcpu::Resume)];
        let mut machine = life(OnEnd::Restart, true);
        assert_eq!(machine.step(Input::NoRoom), pause);
        machine.step(Input::Paused);
        assert_eq!(machine.step(Input::Command(Command::Resume)), []);
        assert_eq!(machine.step(Input::HasRoom), resume);
        machine.step(Input::Resumed);
        assert_eq!(machine.step(Input::HasRoom), [], "only once");

        assert_eq!(machine.step(Input::NoRoom), pause);
        machine.step(Input::Paused);
        assert_eq!(machine.step(Input::Command(Command::Pause)), []);
        assert_eq!(machine.step(Input::HasRoom), []);
        assert_eq!(machine.step(Input::Command(Command::Resume)), resume);
    }

    #[test]
    fn machine_that_was_found_without_room_goes_on_when_there_is() {
        let found = |wanted| {
            let mut found = life(OnEnd::Restart, true).found(wanted, true);
            found.step(Input::Paused);
            found.step(Input::HasRoom)
        };
        assert_eq!(found(false), [Output::Tell(ToVcpu::Resume)]);
        assert_eq!(found(true), []);
    }

    #[test]
    fn pause_that_comes_before_the_answer_to_a_resume_is_told() {
        let pause = [Output::Tell(ToVcpu::Pause)];
        for again in [Input::NoRoom, Input::Command(Command::Pause)] {
            let mut life = life(OnEnd::Restart, true);
            assert_eq!(life.step(Input::NoRoom), pause);
            life.step(Input::Paused);
            assert_eq!(life.step(Input::HasRoom), [Output::Tell(ToVcpu::Resume)]);
            // The vCPUs run, or are about to.
            assert_eq!(life.step(again), pause);
            life.step(Input::Resumed);
            life.step(Input::Paused);
            assert_eq!(life.step(Input::Command(Command::Pause)), []);
        }
    }

    #[test]
    fn machine_that_is_paused_before_every_process_is_up_is_paused_then() {
        let mut life = Life::new(Lifecycle::default(), true);
        life.step(Input::NoRoom);
        life.step(Input::Paused);
        life.step(Input::AllLocked);
        assert_eq!(life.state, State::Paused);
        let mut life = Life::new(Lifecycle::default(), true);
        life.step(Input::Paused);
        life.step(Input::Resumed);
        life.step(Input::AllLocked);
        assert_eq!(life.state, State::Running);
    }

    #[test]
    fn first_reason_counts() {
        let inputs = [
            Input::TimedOut(Duration::from_secs(1)),
            Input::Ended(Outcome::Killed),
            Input::Lost("x".into()),
        ];
        let expected = finished(Ending::TimedOut(Duration::from_secs(1)));
        assert_eq!(verdict(life(OnEnd::Restart, true), &inputs), expected);
    }

    fn any_input() -> impl Strategy<Value = Input> {
        let commands = [
            Command::PowerButton,
            Command::RunOn,
            Command::Kill,
            Command::Reset,
            Command::Interrupt,
            Command::Pause,
            Command::Resume,
        ];
        let outcomes = [
            Outcome::PowerOff,
            Outcome::Reset,
            Outcome::TripleFault,
            Outcome::Killed,
        ];
        prop_oneof![
            Just(Input::AllLocked),
            Just(Input::StartFailed("p".into(), "r".into())),
            Just(Input::Lost("r".into())),
            prop::sample::select(outcomes.to_vec()).prop_map(Input::Ended),
            Just(Input::Paused),
            Just(Input::Resumed),
            Just(Input::NoRoom),
            Just(Input::HasRoom),
            prop::sample::select(commands.to_vec()).prop_map(Input::Command),
            Just(Input::TimedOut(Duration::ZERO)),
        ]
    }

    proptest! {
        #[test]
        fn every_life_ends_once_and_tells_nothing_afterwards(
            inputs in prop::collection::vec(any_input(), 0..40),
            preserve: bool,
        ) {
            let on_reboot = if preserve { OnEnd::Preserve } else { OnEnd::Restart };
            let mut life = life(on_reboot, true);
            let mut ends = 0;
            for input in inputs {
                let restarts = life.verdict() == Some(&Verdict::Restart);
                let outputs = life.step(input);
                let changed = restarts && life.verdict() != Some(&Verdict::Restart);
                if ends > 0 && changed {
                    // The owner does not want the next life any more; that is to be on record.
                    prop_assert_eq!(&outputs, &[Output::End]);
                } else if ends > 0 {
                    prop_assert!(outputs.is_empty(), "{outputs:?}");
                }
                ends += outputs.iter().filter(|o| **o == Output::End).count();
            }
            prop_assert!(ends <= 2);
            let over = life.step(Input::AllGone);
            prop_assert!(matches!(over.as_slice(), [Output::Over(_)]));
            prop_assert!(life.step(Input::AllGone).is_empty());
        }
    }
}
