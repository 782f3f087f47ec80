//! A machine that was found without a broker, on its actor's side.
//!
//! ```text
//!   found ── its start was half done ──▶ undone; started again, if it is wanted to run
//!     │ ── it lives, or was being ended ──▶ taken over ──▶ a run like any other
//!     └── it cannot be taken over, and lives ──▶ stranded: tried again; can be killed
//! ```

use super::{Actor, Live, Reply};
use crate::api::time::now_ms;
use crate::api::{ApiError, Code, Degraded, Process, State};
use crate::registry::{Desired, VmRecord};
use crate::serve::machine::Machine;
use crate::vm::adopt::Orphan;
use crate::vm::record::{Phase, Record, since_boot_ms};
use crate::vm::session::{Command, Ending, Finished, RunError};
use crate::vm::state::Verdict;
use bulkhead_ipc::protocol::birth::HugePages;
use serde_json::json;
use std::time::{Duration, Instant};

/// Pauses before it is tried again to take a machine over.
const AGAIN_AFTER_MIN: Duration = Duration::from_secs(2);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(60);
/// Name of the missing broker among what a machine lacks.
const BROKER: &str = "broker";

/// A machine that lives and cannot be taken over.
#[derive(Debug)]
pub(super) struct Stranded {
    /// Why not.
    reason: String,
    /// When to try again.
    next: Instant,
    pause: Duration,
}

impl Actor {
    /// Takes the machine over that was found, unless it is this actor's already.
    pub(super) async fn found(&mut self, orphan: Orphan, reply: Reply<()>) {
        let waits = self.stranded.as_ref().map(|stranded| stranded.next);
        if self.live.is_none() && waits.is_none_or(|next| next <= Instant::now()) {
            self.write_end().await;
            match orphan.record.phase {
                Phase::Starting => self.undo_start(&orphan.record).await,
                _ => self.take_over(&orphan).await,
            }
        }
        let _answered = reply.send(Ok(()));
    }

    /// A machine that another broker has begun to start is ended, and started again if it is still
    /// wanted to run.
    async fn undo_start(&mut self, record: &Record) {
        let name = self.name();
        let (wanted, mine) = self.wish_for(record);
        if let Err(error) = crate::vm::clear(&record.options.runtime, &name).await {
            tracing::error!(vm = name, %error, "a start that was half done cannot be undone");
            return;
        }
        tracing::warn!(vm = name, "a start that was half done is undone");
        self.journal.event("start_undone", json!({}));
        if !mine {
            return;
        }
        match wanted {
            Desired::Running => {
                if let Err(error) = self.start().await {
                    tracing::error!(vm = name, %error, "not started again");
                }
            }
            // It was killed while it was starting.
            Desired::Stopped => self.ended(Ok(killed())).await,
        }
    }

    async fn take_over(&mut self, orphan: &Orphan) {
        let (name, record) = (self.name(), &orphan.record);
        let (wanted, mine) = self.wish_for(record);
        let runtime = self.shared.places.runtime.clone();
        let id = self.view.borrow().record.id.clone();
        let users = self.shared.config.host.users;
        let networks = self.shared.networks.clone();
        let machine = match Machine::take_over(runtime, name.clone(), id, users, networks) {
            Ok(machine) => machine,
            Err(error) => return self.strand(format!("no thread: {error}")),
        };
        tracing::info!(vm = name, alive = orphan.is_alive, "taking over");
        let memory = match record.spec.huge_pages {
            HugePages::Reserved => 0,
            _ => record.spec.memory_bytes,
        };
        let kill = mine && wanted == Desired::Stopped && record.phase == Phase::Running;
        if kill {
            // What the last broker was asked for and had no time to do.
            let _room_in_a_new_channel = machine.commands.try_send(Command::Kill);
        }
        self.stranded_before = self.stranded.take();
        self.live = Some(Live {
            machine,
            consoles: None,
            _share: self.shared.budget.keep(&name, memory),
            told_all: false,
            found: true,
        });
        self.show(orphan, kill);
        if wanted == Desired::Stopped && !mine {
            let running = |record: &mut VmRecord| record.desired = Desired::Running;
            if let Err(error) = self.edit(running).await {
                tracing::warn!(vm = name, %error, "runs without a record of it");
            }
        }
    }

    /// What the machine is wanted to do, and whether the one that was found is the registry's or
    /// another one with its name.
    fn wish_for(&self, found: &Record) -> (Desired, bool) {
        let view = self.view.borrow();
        let mine = found.options.id.as_ref() == Some(&view.record.id);
        (view.record.desired, mine)
    }

    /// Shows what is on record until its processes say more.
    fn show(&self, orphan: &Orphan, kill: bool) {
        let record = &orphan.record;
        let own_place = self.directory == record.options.state;
        let age_ms = since_boot_ms().saturating_sub(record.began_ms);
        self.view.send_modify(|view| {
            view.state = match record.phase {
                Phase::Running if kill => State::Stopping,
                Phase::Running if orphan.is_alive => State::Running,
                Phase::Stopping(Verdict::Finished(_)) => State::Stopping,
                _ => State::Starting,
            };
            view.run += 1;
            view.taking_over = true;
            view.started_at_ms = Some(now_ms().saturating_sub(age_ms));
            view.processes = processes(record);
            view.devices.found(record);
            view.degraded = degraded(record);
            view.restarts = record.restarts;
            view.failure = None;
            view.rings = (!own_place).then(|| record.options.state.clone());
        });
    }

    /// A machine that was found has ended, or could not be taken over.
    pub(super) async fn found_over(&mut self, result: Result<Finished, RunError>) {
        let (runtime, name) = (self.shared.places.runtime.clone(), self.name());
        match &result {
            Err(error) if Orphan::find(&runtime, &name).is_some_and(|o| o.is_alive) => {
                self.live = None;
                self.strand(error.to_string());
            }
            _ => {
                self.stranded_before = None;
                self.ended(result).await;
            }
        }
    }

    fn strand(&mut self, reason: String) {
        let before = self.stranded_before.take();
        let pause = before.map_or(AGAIN_AFTER_MIN, |b| (b.pause * 2).min(AGAIN_AFTER_MAX));
        let name = self.name();
        tracing::error!(vm = name, reason, ?pause, "lives and cannot be taken over");
        self.journal
            .event("not_taken_over", json!({ "reason": reason }));
        self.view.send_modify(|view| {
            view.taking_over = false;
            view.state = State::Running;
            view.degraded.retain(|d| d.device != BROKER);
            view.degraded.push(Degraded {
                device: BROKER.to_owned(),
                reason: reason.clone(),
            });
        });
        self.stranded = Some(Stranded {
            reason,
            next: Instant::now() + pause,
            pause,
        });
    }

    /// Ends a machine that cannot be taken over; nothing else can be asked of it.
    pub(super) async fn command_stranded(&mut self, command: Command) -> Result<(), ApiError> {
        let name = self.name();
        let Some(stranded) = self.stranded.take() else {
            let line = format!("{name} is not running");
            return Err(ApiError::new(Code::Conflict, line));
        };
        if command != Command::Kill {
            let reason = &stranded.reason;
            let line = format!("{name} runs and cannot be taken over: {reason}; kill ends it");
            self.stranded = Some(stranded);
            return Err(ApiError::new(Code::Conflict, line));
        }
        if let Err(error) = crate::vm::clear(&self.shared.places.runtime, &name).await {
            self.stranded = Some(stranded);
            return Err(ApiError::new(Code::Host, format!("{name}: {error}")));
        }
        self.ended(Ok(killed())).await;
        Ok(())
    }
}

fn killed() -> Finished {
    Finished {
        ending: Ending::Killed,
        report: None,
        degraded: Vec::new(),
        restarts: Vec::new(),
    }
}

fn processes(record: &Record) -> Vec<Process> {
    let alive = record.processes.iter().filter(|p| p.is_alive());
    let shown = alive.map(|process| Process {
        kind: process.id.kind.name().to_owned(),
        index: process.id.index,
        generation: process.id.generation,
        name: process.name.clone(),
        pid: process.pid,
        locked: true,
        users: process.users,
    });
    shown.collect()
}

fn degraded(record: &Record) -> Vec<Degraded> {
    let lost = record.degraded.iter().cloned();
    lost.map(|(device, reason)| Degraded { device, reason })
        .collect()
}
