//! A run as the user lives through it: the console is attached, signals become commands, events
//! become notices, and the end becomes an exit code.

use super::SCHEMA_VERSION;
use super::failure::{Failure, START, print_json};
use crate::console::attach::{Attachment, Streams, Summary, UserEvent, attach, notice};
use crate::console::keys::Keys;
use crate::vm::session::{
    Command, Consoles, EVENTS_CAPACITY, Event, Finished, Restart, RunError, RunOptions,
};
use crate::vm::spec::{ConsoleChoice, VmSpec};
use serde::Serialize;
use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Commands that may wait to be carried out.
const COMMANDS_CAPACITY: usize = 64;

/// How a run meets its user.
#[derive(Debug, Clone, Copy)]
pub(super) struct Session {
    /// Whether the result is printed as JSON and the console is not shown.
    pub(super) json: bool,
    /// The key that leaves the console.
    pub(super) escape: Option<u8>,
}

/// The signals that end a run in an orderly way.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> Command {
        tokio::select! {
            _ = self.interrupt.recv() => Command::Interrupt,
            _ = self.quit.recv() => Command::Interrupt,
            _ = self.terminate.recv() => Command::Kill,
            _ = self.hangup.recv() => Command::Kill,
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    schema_version: u32,
    name: &'a str,
    ending: &'static str,
    exit_code: u8,
    message: Option<String>,
    report: Option<&'a str>,
    degraded: Vec<Degraded<'a>>,
    restarts: Vec<Restarted<'a>>,
}

#[derive(Serialize)]
struct Restarted<'a> {
    device: &'a str,
    kind: &'static str,
    generation: u32,
    pid: i32,
    program: &'a str,
    reason: &'a str,
    after_us: u64,
}

impl<'a> From<&'a Restart> for Restarted<'a> {
    fn from(restart: &'a Restart) -> Self {
        Self {
            device: &restart.name,
            kind: restart.id.kind.name(),
            generation: restart.id.generation,
            pid: restart.pid,
            program: &restart.program,
            reason: &restart.reason,
            after_us: restart.after.as_micros().try_into().unwrap_or(u64::MAX),
        }
    }
}

#[derive(Serialize)]
struct Degraded<'a> {
    device: &'a str,
    reason: &'a str,
}

impl Session {
    /// Runs a machine by `machine` until it has ended, and returns the exit code.
    ///
    /// # Errors
    /// When it could not be started.
    pub(super) fn run(
        self,
        spec: &VmSpec,
        options: &RunOptions,
        machine: impl AsyncFnOnce(
            &VmSpec,
            &RunOptions,
            Receiver<Command>,
            Sender<Event>,
        ) -> Result<Finished, RunError>,
    ) -> Result<u8, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::because(START, "starting the event loop", &error))?;
        let finished = runtime.block_on(self.live(spec, options, machine))?;
        self.conclude(spec, &finished)
    }

    async fn live(
        self,
        spec: &VmSpec,
        options: &RunOptions,
        machine: impl AsyncFnOnce(
            &VmSpec,
            &RunOptions,
            Receiver<Command>,
            Sender<Event>,
        ) -> Result<Finished, RunError>,
    ) -> Result<Finished, Failure> {
        // Before the terminal is attached, so that its own handlers leave these alone.
        let mut signals =
            Signals::new().map_err(|error| Failure::because(START, "handling signals", &error))?;
        let (commands, to_machine) = channel(COMMANDS_CAPACITY);
        let (from_machine, mut events) = channel(EVENTS_CAPACITY);
        let mut watcher = Watcher {
            session: self,
            attach: spec.console.attach,
            commands: commands.clone(),
            attached: None,
            other: None,
        };
        let running = machine(spec, options, to_machine, from_machine);
        tokio::pin!(running);
        let finished = loop {
            tokio::select! {
                finished = &mut running => break finished,
                Some(event) = events.recv() => watcher.hear(event)?,
                command = signals.next() => {
                    // A full queue holds commands that end the machine already.
                    let _queued = commands.try_send(command);
                }
            }
        };
        while let Ok(event) = events.try_recv() {
            watcher.hear(event)?;
        }
        watcher.finish();
        finished.map_err(|error| Failure::because(error.exit_code(), "", &error))
    }

    /// Tells how it ended.
    fn conclude(self, spec: &VmSpec, finished: &Finished) -> Result<u8, Failure> {
        let exit_code = finished.ending.exit_code();
        let (ending, message) = finished.ending.describe();
        if self.json {
            print_json(&Report {
                schema_version: SCHEMA_VERSION,
                name: &spec.name,
                ending,
                exit_code,
                message,
                report: finished.report.as_deref(),
                degraded: finished
                    .degraded
                    .iter()
                    .map(|(device, reason)| Degraded { device, reason })
                    .collect(),
                restarts: finished.restarts.iter().map(Restarted::from).collect(),
            })?;
            return Ok(exit_code);
        }
        if let Some(report) = &finished.report {
            for line in report.lines() {
                notice(line);
            }
        }
        if let Some(message) = message {
            notice(&format!("bulkhead: {}: {message}", spec.name));
        }
        Ok(exit_code)
    }
}

/// Listens to a machine.
struct Watcher {
    session: Session,
    attach: ConsoleChoice,
    commands: Sender<Command>,
    attached: Option<Attachment>,
    /// The console that is not shown; its history is on disk.
    other: Option<Consoles>,
}

impl Watcher {
    fn hear(&mut self, event: Event) -> Result<(), Failure> {
        match event {
            Event::Consoles(consoles) => self.attach(*consoles)?,
            Event::Degraded { name, reason, .. } => {
                notice(&format!("bulkhead: degraded: {name} is lost: {reason}"));
            }
            Event::NoRoom { name } => {
                let line = "the host has no room for what the guest writes to";
                notice(&format!("bulkhead: paused: {line} {name}"));
            }
            Event::HasRoom { name } => {
                notice(&format!("bulkhead: the host has room for {name} again"));
            }
            Event::Denied { id, name, denial } => {
                notice(&format!("bulkhead: {id} ({name}): {denial}"));
            }
            Event::DeviceFault { name, reason } => {
                notice(&format!("bulkhead: device {name} failed: {reason}"));
            }
            Event::GuestFault { name, reason } => {
                notice(&format!("bulkhead: the guest misused {name}: {reason}"));
            }
            Event::Restarted(restart) => {
                notice(&format!(
                    "bulkhead: restarted: {} is served by process {} (generation {}, version {}) after {} us: {}",
                    restart.name,
                    restart.pid,
                    restart.id.generation,
                    restart.program,
                    restart.after.as_micros(),
                    restart.reason
                ));
            }
            Event::RequestGivenUp { name, reason } => {
                notice(&format!("bulkhead: {name} gave up {reason}"));
            }
            Event::Refused {
                command, reason, ..
            } => {
                notice(&format!("bulkhead: {command}: {reason}"));
            }
            Event::Restarting { count } => {
                notice(&format!("bulkhead: the machine restarts (number {count})"));
            }
            Event::Started { .. }
            | Event::Traffic { .. }
            | Event::Died { .. }
            | Event::Locked { .. }
            | Event::AllLocked { .. }
            | Event::TakenOver { .. }
            | Event::Paused
            | Event::Resumed
            | Event::Preserved
            | Event::Ended(_) => {}
        }
        Ok(())
    }

    fn attach(&mut self, consoles: Consoles) -> Result<(), Failure> {
        if self.session.json {
            self.other = Some(consoles);
            return Ok(());
        }
        let ends = match (self.attach, consoles.virtio) {
            (ConsoleChoice::Virtio, Some(virtio)) => virtio,
            _ => consoles.serial,
        };
        let commands = self.commands.clone();
        let attached = Streams::standard().and_then(|streams| {
            let keys = Keys::new(self.session.escape);
            attach(ends, streams, keys, move |event| {
                let command = match event {
                    UserEvent::Resize { columns, rows } => Command::Resize { columns, rows },
                    UserEvent::Leave | UserEvent::OutputClosed | UserEvent::Over => {
                        Command::Interrupt
                    }
                };
                // A queue that is full of commands needs no further one; keys can be pressed again.
                let _queued = commands.try_send(command);
            })
        });
        let attached =
            attached.map_err(|error| Failure::because(START, "attaching the console", &error))?;
        self.attached = Some(attached);
        Ok(())
    }

    fn finish(&mut self) -> Summary {
        self.attached
            .take()
            .map(Attachment::finish)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::cgroup::Reach;
    use crate::vm::session::Ending;
    use crate::vm::spec::KernelSource;
    use std::time::Duration;

    fn run_with(result: Result<Finished, RunError>) -> Result<u8, Failure> {
        let spec = VmSpec::new("vm", KernelSource::File("k".into()));
        let options = RunOptions {
            binaries: "/".into(),
            policies: None,
            allow_looser_policy: false,
            cache: None,
            state: "/".into(),
            runtime: "/".into(),
            core: None,
            reach: Reach::Within,
            reboot: true,
            id: None,
            users: crate::launch::users::UserRange::DEFAULT,
            networks: crate::network::board::Switchboard::default(),
        };
        let session = Session {
            json: false,
            escape: None,
        };
        session.run(&spec, &options, async |_, _, _commands, events| {
            let full = || Event::Paused;
            // A machine never waits for whoever listens, and here nobody has had time to.
            while events.try_send(full()).is_ok() {}
            result
        })
    }

    fn ended(ending: Ending) -> u8 {
        let finished = Finished {
            ending,
            report: None,
            degraded: vec![],
            restarts: vec![],
        };
        run_with(Ok(finished)).unwrap()
    }

    #[test]
    fn end_of_the_machine_is_the_exit_code() {
        assert_eq!(ended(Ending::PoweredOff), 0);
        assert_eq!(ended(Ending::DebugExit(3)), 7);
        assert_eq!(ended(Ending::TimedOut(Duration::from_secs(1))), 124);
    }

    #[test]
    fn failure_to_start_keeps_its_code() {
        let lacks = "KVM".to_owned();
        assert_eq!(run_with(Err(RunError::Host { lacks })).unwrap_err().code, 4);
    }
}
