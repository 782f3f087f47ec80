//! A machine that runs: the very code of `bulkhead run`, on a thread of its own.
//!
//! A thread for each machine, because starting one copies disks, compiles filters and waits for
//! the kernel: nothing of that may hold up another machine or the API. The daemon's end does not
//! end these threads in an orderly way, on purpose: the machines outlive it.

use crate::vm::session::{Command, EVENTS_CAPACITY, Event, Finished, RunError, RunOptions};
use crate::vm::spec::VmSpec;
use std::io;
use tokio::sync::{mpsc, oneshot};

/// Commands that may wait to be carried out.
const COMMANDS_CAPACITY: usize = 64;

/// A run and how to talk to it.
#[derive(Debug)]
pub(super) struct Machine {
    /// What to do.
    pub(super) commands: mpsc::Sender<Command>,
    /// What happens. Closed when it is over.
    pub(super) events: mpsc::Receiver<Event>,
    /// How it went.
    pub(super) done: oneshot::Receiver<Result<Finished, RunError>>,
}

impl Machine {
    /// Starts a machine.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn start(spec: VmSpec, options: RunOptions) -> io::Result<Self> {
        let (commands, to_machine) = mpsc::channel(COMMANDS_CAPACITY);
        let (from_machine, events) = mpsc::channel(EVENTS_CAPACITY);
        let (tell, done) = oneshot::channel();
        let name = spec.name.clone();
        std::thread::Builder::new()
            .name("machine".to_owned())
            .spawn(move || {
                let finished = run(&spec, &options, to_machine, from_machine);
                // Nobody listens only while the daemon goes down.
                let _told = tell.send(finished);
            })
            .inspect_err(|error| tracing::error!(vm = name, %error, "no thread"))?;
        Ok(Self {
            commands,
            events,
            done,
        })
    }
}

fn run(
    spec: &VmSpec,
    options: &RunOptions,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) -> Result<Finished, RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|cause| RunError::Host {
            lacks: format!("an event loop: {cause}"),
        })?;
    runtime.block_on(crate::vm::run(spec, options, commands, events))
}
