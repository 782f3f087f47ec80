//! A machine that runs: the very code of `bulkhead run`, on a thread of its own.
//!
//! A thread for each machine, because starting one copies disks, compiles filters and waits for
//! the kernel: nothing of that may hold up another machine or the API. The daemon's end does not
//! end these threads in an orderly way, on purpose: the machines outlive it.

use crate::launch::users::UserRange;
use crate::network::board::Switchboard;
use crate::vm::Over;
use crate::vm::session::{Command, EVENTS_CAPACITY, Event, RunError, RunOptions};
use crate::vm::spec::VmSpec;
use std::io;
use std::path::PathBuf;
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
    pub(super) done: oneshot::Receiver<Over>,
}

impl Machine {
    /// Starts a machine.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn start(spec: VmSpec, options: RunOptions) -> io::Result<Self> {
        Self::on_a_thread(move |commands, events| {
            in_a_loop(crate::vm::run_and_keep(&spec, &options, commands, events))
        })
    }

    /// Takes the machine `name` over, which is called `id` in the registry. Processes that are started later
    /// have users of the range `users`, and cards are plugged into `networks`.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn take_over(
        runtime: PathBuf,
        name: String,
        id: String,
        users: UserRange,
        networks: Switchboard,
    ) -> io::Result<Self> {
        Self::on_a_thread(move |commands, events| {
            let id = Some(id);
            in_a_loop(crate::vm::adopt_and_keep(
                &runtime, &name, id, users, networks, commands, events,
            ))
        })
    }

    fn on_a_thread(
        run: impl FnOnce(mpsc::Receiver<Command>, mpsc::Sender<Event>) -> Over + Send + 'static,
    ) -> io::Result<Self> {
        let (commands, to_machine) = mpsc::channel(COMMANDS_CAPACITY);
        let (from_machine, events) = mpsc::channel(EVENTS_CAPACITY);
        let (tell, done) = oneshot::channel();
        std::thread::Builder::new()
            .name("machine".to_owned())
            .spawn(move || {
                let finished = run(to_machine, from_machine);
                // Nobody listens only while the daemon goes down.
                let _told = tell.send(finished);
            })?;
        Ok(Self {
            commands,
            events,
            done,
        })
    }
}

fn in_a_loop(machine: impl Future<Output = Over>) -> Over {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(machine),
        Err(cause) => Over {
            result: Err(RunError::Host {
                lacks: format!("an event loop: {cause}"),
            }),
            keeper: None,
        },
    }
}
