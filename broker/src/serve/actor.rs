//! The actor of one machine: the only one who starts it, talks to its run, and writes its record,
//! its log and its [`View`]. Everybody else asks through a bounded channel and watches the view.

mod takeover;

use super::Shared;
use super::budget::Share;
use super::consoles::{Attachable, Hubs};
use super::journal::{Journal, Line};
use super::life::{self, ended_record};
use super::machine::Machine;
use super::orphans::condemned;
use super::view::View;
use crate::api::time::now_ms;
use crate::api::{ApiError, Code, ConsoleName, State};
use crate::registry::{Desired, Ended, RegistryError, VmRecord};
use crate::vm::Over;
use crate::vm::adopt::Orphan;
use crate::vm::home::{owner_of, path_of};
use crate::vm::keeper::Keeper;
use crate::vm::session::{Command, Event, Finished, RunError};
use serde_json::json;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use takeover::Stranded;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// Questions that may wait for one machine.
const ASKS_CAPACITY: usize = 32;
/// How often a record that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(2);

type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// What can be asked of a machine.
#[derive(Debug)]
pub(super) enum Ask {
    /// Begin to start it, unless it is live.
    Start(Reply<Begun>),
    /// Tell its run something; a conflict when there is none.
    Command(Command, Reply<()>),
    /// Whether it starts once more with the host.
    StartWithHost(bool, Reply<()>),
    /// Take it over: it was found without a broker.
    Found(Box<Orphan>, Reply<()>),
    /// Attach to a console.
    Attach(ConsoleName, Reply<Attachable>),
    /// The log's lines from now on.
    Follow(Reply<broadcast::Receiver<Line>>),
    /// Forget it, with its state on disk.
    Remove(Reply<()>),
}

/// A start that has begun, or had.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    /// Number of the run.
    pub(super) run: u64,
    /// Whether it was this request that began it.
    pub(super) changed: bool,
}

/// A machine, for those who ask.
#[derive(Debug)]
pub(super) struct Vm {
    asks: mpsc::Sender<Ask>,
    /// Held by who replaces a device's process.
    pub(super) replacing: tokio::sync::Mutex<()>,
    /// What is known of it.
    pub(super) view: watch::Receiver<View>,
}

impl Vm {
    /// Starts the actor of the machine that `record` describes.
    pub(super) fn new(shared: Arc<Shared>, record: VmRecord) -> Self {
        let (asks, asked) = mpsc::channel(ASKS_CAPACITY);
        let directory = shared.places.vm_state(&record.name);
        let journal = Journal::new(directory.clone(), &record.name, shared.config.log_bytes());
        let (view, seen) = watch::channel(View::new(record));
        let actor = Actor {
            shared,
            directory,
            view,
            journal,
            live: None,
            unwritten: None,
            closing: None,
            stranded: None,
            stranded_before: None,
        };
        tokio::spawn(actor.run(asked));
        Self {
            asks,
            replacing: tokio::sync::Mutex::default(),
            view: seen,
        }
    }

    /// Asks, and waits for the answer.
    pub(super) async fn ask<T>(
        &self,
        question: impl FnOnce(Reply<T>) -> Ask,
    ) -> Result<T, ApiError> {
        let gone = || ApiError::no_machine(&self.view.borrow().record.name);
        let (reply, answer) = oneshot::channel();
        let sent = self.asks.send(question(reply)).await;
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A run, and what goes with it.
#[derive(Debug)]
struct Live {
    machine: Machine,
    consoles: Option<Hubs>,
    /// Freed at its end.
    _share: Share,
    /// Whether its events are over, so that only its result is waited for.
    told_all: bool,
    /// Whether another broker had begun it.
    found: bool,
}

struct Actor {
    shared: Arc<Shared>,
    /// Its state on disk.
    directory: PathBuf,
    view: watch::Sender<View>,
    journal: Journal,
    live: Option<Live>,
    /// An end that the registry does not know yet.
    unwritten: Option<Ended>,
    /// The machine's place in the runtime directory until the registry knows.
    closing: Option<Keeper>,
    /// It lives and cannot be taken over.
    stranded: Option<Stranded>,
    /// The same while it is tried again.
    stranded_before: Option<Stranded>,
}

/// What an actor wakes up for.
enum Woken {
    Asked(Option<Ask>),
    Event(Event),
    ToldAll,
    Done(Box<Over>),
    Retry,
}

impl Actor {
    async fn run(mut self, mut asked: mpsc::Receiver<Ask>) {
        loop {
            match self.next(&mut asked).await {
                Woken::Asked(None) => return,
                Woken::Asked(Some(Ask::Remove(reply))) => {
                    let removed = self.remove().await;
                    let over = removed.is_ok();
                    let _answered = reply.send(removed);
                    if over {
                        return;
                    }
                }
                Woken::Asked(Some(ask)) => self.answer(ask).await,
                Woken::Event(event) => self.hear(event),
                Woken::ToldAll => {
                    if let Some(live) = &mut self.live {
                        live.told_all = true;
                    }
                }
                Woken::Done(over) => {
                    let Over { result, keeper } = *over;
                    // Still on record: what is not in the registry yet is not forgotten.
                    self.closing = keeper;
                    match self.live.as_ref().is_some_and(|live| live.found) {
                        true => self.found_over(result).await,
                        false => self.ended(result).await,
                    }
                }
                Woken::Retry => {
                    self.write_end().await;
                    if self.unwritten.is_none() {
                        tracing::info!(vm = self.name(), "its end is recorded now");
                    }
                }
            }
        }
    }

    async fn next(&mut self, asked: &mut mpsc::Receiver<Ask>) -> Woken {
        let (live, unwritten) = (&mut self.live, self.unwritten.is_some());
        let run = async {
            match live {
                Some(live) if !live.told_all => match live.machine.events.recv().await {
                    Some(event) => Woken::Event(event),
                    None => Woken::ToldAll,
                },
                Some(live) => {
                    let done = (&mut live.machine.done).await;
                    Woken::Done(Box::new(done.unwrap_or_else(|_| {
                        let (who, reason) =
                            ("its thread".to_owned(), "ended without a word".into());
                        let result = Err(RunError::Start { who, reason });
                        Over {
                            result,
                            keeper: None,
                        }
                    })))
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ask = asked.recv() => Woken::Asked(ask),
            woken = run => woken,
            () = tokio::time::sleep(RETRY), if unwritten => Woken::Retry,
        }
    }

    /// A caller that has gone away does not need its answer.
    async fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Start(reply) => {
                let _answered = reply.send(self.start().await);
            }
            Ask::Command(command, reply) => {
                let _answered = reply.send(self.command(command).await);
            }
            Ask::StartWithHost(on, reply) => {
                let edit = self.edit(move |record| record.start_with_host = on).await;
                let _answered = reply.send(edit.map_err(registry_error));
            }
            Ask::Found(orphan, reply) => self.found(*orphan, reply).await,
            Ask::Attach(name, reply) => {
                let _answered = reply.send(self.attach(name));
            }
            Ask::Follow(reply) => {
                let _answered = reply.send(Ok(self.journal.follow()));
            }
            // Answered by the loop, which it ends.
            Ask::Remove(_) => {}
        }
    }

    fn name(&self) -> String {
        self.view.borrow().record.name.clone()
    }

    /// Changes the record, on disk first.
    async fn edit(
        &self,
        edit: impl FnOnce(&mut VmRecord) + Send + 'static,
    ) -> Result<(), RegistryError> {
        let name = self.name();
        let record = self
            .shared
            .registry(move |registry| registry.edit(&name, edit))
            .await?;
        self.view.send_modify(|view| view.record = record);
        Ok(())
    }

    async fn start(&mut self) -> Result<Begun, ApiError> {
        let (state, run) = {
            let view = self.view.borrow();
            (view.state, view.run)
        };
        match state {
            State::Starting | State::Running | State::Paused => {
                return Ok(Begun {
                    run,
                    changed: false,
                });
            }
            State::Preserved | State::Stopping => {
                let (name, word) = (self.name(), state.word());
                let line = format!("{name} is {word}: kill it before it is started again");
                return Err(ApiError::new(Code::Conflict, line));
            }
            State::Stopped => {}
        }
        self.write_end().await;
        let record = self.view.borrow().record.clone();
        let (share, spec) = life::prepare(&self.shared, &record).await?;
        let desired = |record: &mut VmRecord| {
            record.desired = Desired::Running;
            record.start_with_host = false;
        };
        self.edit(desired).await.map_err(registry_error)?;
        self.close();
        let places = &self.shared.places;
        let users = self.shared.config.host.users;
        let networks = self.shared.networks.clone();
        let options = places.run_options(&record.name, &record.id, users, networks);
        let machine = Machine::start(spec, options)
            .map_err(|error| ApiError::new(Code::Host, format!("no thread: {error}")))?;
        self.live = Some(Live {
            machine,
            consoles: None,
            _share: share,
            told_all: false,
            found: false,
        });
        self.view.send_modify(|view| {
            view.state = State::Starting;
            view.taking_over = false;
            view.rings = None;
            view.run += 1;
            view.started_at_ms = Some(now_ms());
            view.processes.clear();
            view.devices.clear();
            view.degraded.clear();
            view.no_room.clear();
            view.restarts = 0;
            view.denials.clear();
            view.failure = None;
        });
        self.journal.event("starting", json!({}));
        Ok(Begun {
            run: run + 1,
            changed: true,
        })
    }

    async fn command(&mut self, command: Command) -> Result<(), ApiError> {
        let not_running = |name: String| {
            let line = format!("{name} is not running");
            ApiError::new(Code::Conflict, line)
        };
        if self.live.is_none() {
            return self.command_stranded(command).await;
        }
        if command == Command::Kill {
            // First on disk: a daemon that dies now must not take its end for a crash.
            let stopped = |record: &mut VmRecord| record.desired = Desired::Stopped;
            if let Err(error) = self.edit(stopped).await {
                tracing::warn!(vm = self.name(), %error, "killed without a record of it");
            }
        }
        let Some(live) = &self.live else {
            return Err(not_running(self.name()));
        };
        let (asked, kills) = (life::asked(&command), command == Command::Kill);
        let sent = live.machine.commands.try_send(command);
        sent.map_err(|_| not_running(self.name()))?;
        if let Some(asked) = asked {
            self.journal.event("asked", asked);
        }
        if kills {
            self.view.send_modify(|view| view.state = State::Stopping);
        }
        Ok(())
    }

    fn attach(&self, name: ConsoleName) -> Result<Attachable, ApiError> {
        let conflict = |what: &str| {
            let line = format!("{} {what}", self.name());
            Err(ApiError::new(Code::Conflict, line))
        };
        let Some(live) = &self.live else {
            return conflict("is not running");
        };
        match live.consoles.as_ref().map(|hubs| hubs.attach(name)) {
            Some(Some(attachable)) => Ok(attachable),
            Some(None) => conflict("has no virtio console"),
            None => conflict("is only just starting"),
        }
    }

    fn hear(&mut self, event: Event) {
        let event = match event {
            Event::Consoles(consoles) => {
                let rings = self.view.borrow().rings.clone();
                let rings = rings.as_deref().unwrap_or(&self.directory);
                let hubs = Hubs::new(rings, *consoles);
                let hubs = hubs.inspect_err(|error| {
                    tracing::warn!(vm = self.name(), %error, "consoles cannot be attached to");
                });
                if let Some(live) = &mut self.live {
                    live.consoles = hubs.ok();
                }
                return;
            }
            event => event,
        };
        if let Some((word, about)) = life::line_of(&event) {
            self.journal.event(word, about);
        }
        self.view.send_modify(|view| life::apply(view, event));
    }

    /// The run is over.
    async fn ended(&mut self, result: Result<Finished, RunError>) {
        self.live = None;
        self.stranded = None;
        let (ended, failure) = ended_record(result);
        let about = json!({
            "ending": ended.ending,
            "exit_code": ended.exit_code,
            "message": ended.message,
        });
        self.journal.event("ended", about);
        self.unwritten = Some(ended.clone());
        self.write_end().await;
        self.view.send_modify(|view| {
            view.state = State::Stopped;
            view.taking_over = false;
            view.record.desired = Desired::Stopped;
            view.record.last = Some(ended);
            view.processes.clear();
            view.devices.clear();
            view.degraded.clear();
            view.no_room.clear();
            view.started_at_ms = None;
            view.failure = failure;
        });
    }

    /// Tells the registry how the last run ended, if it does not know yet.
    async fn write_end(&mut self) {
        let Some(ended) = self.unwritten.clone() else {
            return;
        };
        let written = self
            .edit(move |record| {
                record.desired = Desired::Stopped;
                record.last = Some(ended);
            })
            .await;
        match written {
            Ok(()) => {
                self.unwritten = None;
                self.close();
            }
            Err(error) => tracing::warn!(vm = self.name(), %error, "an end is not recorded yet"),
        }
    }

    /// Nothing of the last run is needed any more.
    fn close(&mut self) {
        if let Some(keeper) = self.closing.take() {
            keeper.close();
        }
    }

    async fn remove(&mut self) -> Result<(), ApiError> {
        let name = self.name();
        if self.live.is_some() || self.stranded.is_some() {
            let line = format!("{name} is running: stop it first, or remove it with --force");
            return Err(ApiError::new(Code::Conflict, line));
        }
        // One of `run` with this name has its consoles where this one would have them.
        let home = path_of(&self.shared.places.runtime, &name);
        if let (None, Some(owner)) = (&self.closing, owner_of(&home)) {
            let owner =
                owner.map_or_else(String::new, |pid| format!(": process {pid} is its broker"));
            let line = format!("a machine named {name} is running{owner}");
            return Err(ApiError::new(Code::Conflict, line));
        }
        let id = self.view.borrow().record.id.clone();
        let condemned = condemned(&self.shared.places.state, &name, &id);
        let (from, to) = (self.directory.clone(), condemned.clone());
        // Out of the way first: a daemon that dies now finds it there, and the registry says whether
        // it is to come back.
        let moved = tokio::task::spawn_blocking(move || {
            super::make_private(to.parent().unwrap_or(&to))?;
            std::fs::rename(from, to)
        });
        let moved = moved.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        if let Err(error) = &moved
            && error.kind() != io::ErrorKind::NotFound
        {
            let line = format!("the state of {name} cannot be moved away: {error}");
            return Err(ApiError::new(Code::Host, line));
        }
        let gone = name.clone();
        let removed = self
            .shared
            .registry(move |registry| registry.remove(&gone))
            .await;
        if let Err(error) = removed {
            if moved.is_ok()
                && let Err(error) = std::fs::rename(&condemned, &self.directory)
            {
                tracing::warn!(vm = name, %error, "its state is not back in its place");
            }
            return Err(registry_error(error));
        }
        self.close();
        let cleared = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(condemned)).await;
        if let Ok(Err(error)) = cleared
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(vm = name, %error, "state is left on disk");
        }
        self.view.send_modify(|view| view.removed = true);
        Ok(())
    }
}

/// As the API tells it.
pub(super) fn registry_error(error: RegistryError) -> ApiError {
    let code = match error {
        RegistryError::Exists(_) | RegistryError::NetworkExists(_) => Code::Conflict,
        RegistryError::Missing(_) => Code::NotFound,
        _ => Code::Registry,
    };
    ApiError::new(code, error.to_string())
}
