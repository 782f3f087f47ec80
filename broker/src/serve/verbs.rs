//! What people ask of machines: each verb is a question to the actor and a wait for the view, with
//! a deadline.

use super::actor::{Ask, Begun, Vm};
use super::view::View;
use crate::api::{ApiError, Changed, Code, SCHEMA_VERSION, State, Stop, Waited};
use crate::vm::session::Command;
use std::time::Duration;

/// How long a start may take until every process is locked; the run's own deadlines are shorter.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long killing may take.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the vCPUs may take to stop or to run again.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that `stop` waits.
const STOP_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

impl Vm {
    fn name(&self) -> String {
        self.view.borrow().record.name.clone()
    }

    fn state(&self) -> State {
        self.view.borrow().state
    }

    fn changed(&self, changed: bool) -> Changed {
        self.view.borrow().changed(changed)
    }

    fn conflict(&self, what: &str) -> ApiError {
        ApiError::new(Code::Conflict, format!("{} {what}", self.name()))
    }

    /// Waits until `found` finds what it looks for.
    pub(super) async fn wait_until<T>(
        &self,
        within: Duration,
        what: &str,
        mut found: impl FnMut(&View) -> Option<T>,
    ) -> Result<T, ApiError> {
        let mut view = self.view.clone();
        let look = async {
            loop {
                if let Some(result) = found(&view.borrow_and_update()) {
                    return Ok(result);
                }
                if view.changed().await.is_err() {
                    return Err(ApiError::no_machine(&self.name()));
                }
            }
        };
        match tokio::time::timeout(within, look).await {
            Ok(result) => result,
            Err(_) => {
                let line = format!("{} {what} within {within:?}", self.name());
                Err(ApiError::new(Code::TimedOut, line))
            }
        }
    }

    pub(super) async fn start(&self) -> Result<Changed, ApiError> {
        let Begun { run, changed } = self.ask(Ask::Start).await?;
        let done = |view: &View| match view.state {
            _ if view.run > run => Some(Ok(())),
            State::Running | State::Paused | State::Preserved => Some(Ok(())),
            State::Stopped => Some(view.failure.clone().map_or(Ok(()), Err)),
            State::Starting | State::Stopping => None,
        };
        self.wait_until(START_TIMEOUT, "did not come up", done)
            .await??;
        Ok(self.changed(changed))
    }

    async fn command(&self, command: Command) -> Result<(), ApiError> {
        self.ask(|reply| Ask::Command(command, reply)).await
    }

    /// Waits until the present run is over.
    async fn wait_off(&self, within: Duration, what: &str) -> Result<(), ApiError> {
        let run = self.view.borrow().run;
        let off = |view: &View| (view.run != run || view.state == State::Stopped).then_some(());
        self.wait_until(within, what, off).await
    }

    pub(super) async fn kill(&self) -> Result<Changed, ApiError> {
        if self.state() == State::Stopped {
            return Ok(self.changed(false));
        }
        match self.command(Command::Kill).await {
            // It ended by itself a moment ago.
            Err(error) if error.code == Code::Conflict => {}
            other => other?,
        }
        self.wait_off(KILL_TIMEOUT, "did not end").await?;
        Ok(self.changed(true))
    }

    pub(super) async fn stop(&self, how: Stop) -> Result<Changed, ApiError> {
        match (self.state(), how.force) {
            (State::Stopped, _) => return Ok(self.changed(false)),
            // There is no guest that could hear the button.
            (State::Preserved, _) | (State::Paused, true) => return self.kill().await,
            (State::Paused, false) => {
                let what =
                    "is paused and hears no power button: resume it, or stop it with --force";
                return Err(self.conflict(what));
            }
            _ => {}
        }
        match self.command(Command::PowerButton).await {
            Err(error) if error.code == Code::Conflict => {}
            other => other?,
        }
        let timeout = Duration::from_millis(how.timeout_ms).min(STOP_TIMEOUT_MAX);
        match self.wait_off(timeout, "did not power off").await {
            Ok(()) => Ok(self.changed(true)),
            Err(_) if how.force => self.kill().await,
            Err(error) if error.code == Code::TimedOut => {
                // It may have ended just now, which is as good.
                let _run_on = self.command(Command::RunOn).await;
                let line = format!("{error} and runs on (--force cuts its power)");
                Err(ApiError::new(Code::TimedOut, line))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) async fn restart(&self, how: Stop) -> Result<Changed, ApiError> {
        self.stop(how).await?;
        self.start().await
    }

    pub(super) async fn reset(&self) -> Result<Changed, ApiError> {
        let before = self.view.borrow().restarts;
        self.command(Command::Reset).await?;
        let again = |view: &View| match view.state {
            State::Stopped => Some(view.failure.clone().map_or(Ok(()), Err)),
            State::Running | State::Paused | State::Preserved if view.restarts != before => {
                Some(Ok(()))
            }
            _ => None,
        };
        self.wait_until(START_TIMEOUT, "did not come up again", again)
            .await??;
        Ok(self.changed(true))
    }

    pub(super) async fn pause(&self) -> Result<Changed, ApiError> {
        if self.state() == State::Paused {
            // It stays paused when there is room, too, and if it has just been told to go on.
            self.command(Command::Pause).await?;
        }
        self.turn(State::Running, State::Paused, Command::Pause)
            .await
    }

    pub(super) async fn resume(&self) -> Result<Changed, ApiError> {
        let turned = self
            .turn(State::Paused, State::Running, Command::Resume)
            .await;
        let disks = self.lacks_room();
        match turned {
            Err(error) if error.code == Code::TimedOut && !disks.is_empty() => {
                let disks = disks.join(", ");
                let what = format!("goes on when the host has room for {disks}");
                Err(self.conflict(&what))
            }
            other => other,
        }
    }

    fn lacks_room(&self) -> Vec<String> {
        self.view.borrow().no_room.clone()
    }

    /// Brings it from one state to another; it may be there already.
    async fn turn(&self, from: State, to: State, by: Command) -> Result<Changed, ApiError> {
        let state = self.state();
        if state == to {
            return Ok(self.changed(false));
        }
        if state == State::Starting {
            let up = |view: &View| (view.state != State::Starting).then_some(());
            self.wait_until(START_TIMEOUT, "did not come up", up)
                .await?;
        }
        let state = self.state();
        if state != from && state != to {
            return Err(self.conflict(&format!("is {}, not {}", state.word(), from.word())));
        }
        self.command(by).await?;
        let there = |view: &View| (view.state == to || !view.state.is_live()).then_some(());
        let what = format!("is not {}", to.word());
        self.wait_until(PAUSE_TIMEOUT, &what, there).await?;
        if self.state() == State::Stopped {
            return Err(self.conflict("has ended"));
        }
        Ok(self.changed(true))
    }

    pub(super) async fn remove(&self, force: bool) -> Result<Changed, ApiError> {
        if force {
            self.kill().await?;
        }
        self.ask(Ask::Remove).await?;
        Ok(self.changed(true))
    }

    /// Waits for the end of the present run; the last one's, if there is none.
    pub(super) async fn wait(&self) -> Result<Waited, ApiError> {
        let run = self.view.borrow().run;
        let over = |view: &View| {
            let over = view.run != run || view.state == State::Stopped || view.removed;
            over.then(|| view.record.last.clone())
        };
        let last = self.wait_until(Duration::MAX, "did not end", over).await?;
        let last = last.ok_or_else(|| self.conflict("has not been started yet"))?;
        Ok(Waited {
            schema_version: SCHEMA_VERSION,
            name: self.name(),
            last_run: super::view::last_run(&last),
        })
    }
}
