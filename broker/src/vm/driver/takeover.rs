//! A machine whose broker is gone, and its next one.
//!
//! ```text
//!   lock ── record ── Running:  each process is met, the dead are replaced, and the machine goes on
//!                     Starting: undone: its processes are ended
//!                     Stopping: finished: its processes are ended, and it has ended as it was to
//! ```

use super::{Begin, Found, Machine, Over, find_programs, free_disks, policies, run_at};
use crate::launch::users::UserRange;
use crate::launch::{Launched, Launcher};
use crate::network::board::Switchboard;
use crate::supervisor::state as supervision;
use crate::vm::adopt::{self, MeetError};
use crate::vm::keeper::{BeginError, Keeper};
use crate::vm::record::{Phase, ProcessRecord, Record};
use crate::vm::resources::Fence;
use crate::vm::session::{Command, Event, Finished, RunError};
use crate::vm::spec::NetSource;
use crate::vm::state::Verdict;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::vcpu::ToVcpu;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long a process that was killed may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(1);
const DEATH_POLL: Duration = Duration::from_millis(1);

/// Takes a machine over whose broker is gone, and runs it until it is over. What that broker has left
/// half done is undone (a start) or finished (an end). From now on its record says `id`, if there
/// is one, and processes that are started later have users of the range `users`.
///
/// # Errors
/// When it cannot be taken over: it is left as it is, unless its start was undone.
pub async fn adopt(
    runtime: &Path,
    name: &str,
    id: Option<String>,
    users: UserRange,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) -> Result<Finished, RunError> {
    let networks = Switchboard::default();
    let over = adopt_and_keep(runtime, name, id, users, networks, commands, events).await;
    over.close()
}

/// As [`adopt`]; what is on record stays until the caller has noted how it ended. Cards are plugged into `networks`.
pub async fn adopt_and_keep(
    runtime: &Path,
    name: &str,
    id: Option<String>,
    users: UserRange,
    networks: Switchboard,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) -> Over {
    let mut keeper = match Keeper::take_over(runtime, name) {
        Ok(keeper) => keeper,
        Err(error) => {
            return Over {
                result: Err(RunError::Configuration(error.to_string())),
                keeper: None,
            };
        }
    };
    if id.is_some() && keeper.record().options.id != id {
        keeper.note(|record| record.options.id = id);
    }
    if keeper.record().options.users != users {
        keeper.note(|record| record.options.users = users);
    }
    keeper.note(|record| record.options.networks = networks);
    let result = go_on_with(&mut keeper, commands, events).await;
    // One that could not be taken over stays on record, so that the next broker finds it.
    let left = keeper.record().processes.iter().any(|p| p.is_alive());
    let keeper = (result.is_ok() || !left).then_some(keeper);
    Over { result, keeper }
}

async fn go_on_with(
    keeper: &mut Keeper,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) -> Result<Finished, RunError> {
    let options = keeper.record().options.clone();
    let mut launcher =
        Launcher::new(&options.binaries, options.users).map_err(|e| RunError::Host {
            lacks: e.to_string(),
        })?;
    warn_of_overlap(keeper.record());
    let compiled = policies(&options)?;
    let begin = match keeper.record().phase.clone() {
        Phase::Running => Begin::Over(meet(keeper)?),
        phase => {
            end_all(keeper.record()).await?;
            match phase {
                Phase::Stopping(Verdict::Restart) => {
                    keeper.start_again();
                    Begin::Again
                }
                phase => return ended(keeper.record(), phase),
            }
        }
    };
    match begin {
        Begin::Again => find_programs(&mut launcher, &keeper.record().spec)?,
        // For processes that take the place of dead ones.
        _ => {
            if let Err(error) = find_programs(&mut launcher, &keeper.record().spec) {
                tracing::warn!(%error, "no successor could be started");
            }
        }
    }
    run_at(keeper, launcher, &compiled, commands, events, begin).await
}

/// Two ranges that overlap and do not begin alike may give two processes one user.
fn warn_of_overlap(record: &Record) {
    let now = record.options.users;
    let others = record.processes.iter().filter(|p| p.is_alive());
    let other = others
        .filter_map(|process| process.users)
        .find(|users| users.overlaps(now) && users.first() != now.first());
    if let Some(other) = other {
        let vm = &record.spec.name;
        tracing::warn!(
            vm,
            "users {now} overlap with {other} of processes that were started before: two of them may be \
             the same user until the machine is started again"
        );
    }
}

/// How a machine has ended of which nothing lives any more.
fn ended(record: &Record, phase: Phase) -> Result<Finished, RunError> {
    match phase {
        Phase::Stopping(Verdict::Finished(ending)) => Ok(Finished {
            ending,
            report: None,
            degraded: record.degraded.clone(),
            restarts: Vec::new(),
        }),
        Phase::Stopping(Verdict::StartFailed(who, reason)) => Err(RunError::Start { who, reason }),
        _ => Err(RunError::Start {
            who: record.spec.name.clone(),
            reason: "its broker ended while it was starting; what had been started was ended"
                .to_owned(),
        }),
    }
}

/// Ends whatever lives of a machine whose broker is gone, and forgets the machine.
///
/// # Errors
/// When another broker owns it, or its record cannot be believed, or its processes do not die.
pub async fn clear(runtime: &Path, name: &str) -> Result<(), RunError> {
    let keeper = Keeper::take_over(runtime, name);
    let keeper = keeper.map_err(|e: BeginError| RunError::Configuration(e.to_string()))?;
    end_all(keeper.record()).await?;
    keeper.close();
    Ok(())
}

/// Ends every process on record, and waits until the kernel has given up their disks.
async fn end_all(record: &Record) -> Result<(), RunError> {
    let fence = Fence::around(&record.spec);
    record.kill_all();
    if let Some(process) = record.processes.iter().find(|p| p.is_alive()) {
        return Err(RunError::Start {
            who: process.name.clone(),
            reason: format!("process {} was killed and does not die", process.pid),
        });
    }
    // Newborns that are not on record end with their broker, and give up what they had then.
    free_disks(&fence).await;
    Ok(())
}

/// Meets every process on record. A device process that does not answer is ended; a vCPU process that
/// does not is left alone, since its guest may live.
fn meet(keeper: &Keeper) -> Result<Found, RunError> {
    let record = keeper.record();
    let (mut all, mut dead, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for process in &record.processes {
        let id = process.id;
        let reason = match adopt::meet(keeper.home().directory(), process) {
            Ok(met) => {
                if id.kind == ProcKind::Vcpu {
                    kept = met.kept;
                }
                all.push(met.launched);
                continue;
            }
            Err(MeetError::Dead) => "it died while no broker was there".to_owned(),
            Err(error) if id.kind == ProcKind::Vcpu => {
                return Err(RunError::Start {
                    who: process.name.clone(),
                    reason: format!("it cannot be taken over and was left alone: {error}"),
                });
            }
            Err(error) => {
                kill(process);
                format!("it could not be taken over: {error}")
            }
        };
        keeper.home().forget(id);
        // Its successor gets a generation that the last broker has not asked for, so that an answer
        // to that one is not mistaken for one to this.
        let id = ProcId {
            generation: record.generation,
            ..id
        };
        let gone = Launched::found_dead(id, process.pid).map_err(|e| RunError::Host {
            lacks: e.to_string(),
        })?;
        all.push(gone);
        dead.push((id, reason));
    }
    Ok(Found {
        processes: (all, dead),
        kept,
    })
}

/// Kills a process and waits a moment for its end: its successor gets what it has.
fn kill(process: &ProcessRecord) {
    process.kill();
    let until = Instant::now() + DEATH_PATIENCE;
    while process.is_alive() && Instant::now() < until {
        std::thread::sleep(DEATH_POLL);
    }
}

impl Machine<'_> {
    /// Goes on with processes that another broker has started and that are locked; `dead` are not.
    pub(super) fn go_on(&mut self, dead: &[(ProcId, String)]) {
        // No process is still to be started.
        self.notices = None;
        let members = self.household.members.iter();
        let all: Vec<ProcId> = members.map(|m| m.launched.id).collect();
        for id in all {
            self.supervise(supervision::Event::Locked(id));
        }
        // That was told when they were started.
        self.all_locked_after = None;
        // At once: its last broker may have made groups that are not on record, and the machine may end
        // before others would be made.
        self.make_groups();
        self.taking_over = Some(self.began);
        self.tell_vcpu(&ToVcpu::Tell);
        self.wait_on_for_room();
        for (id, reason) in dead {
            let (id, reason) = (*id, reason.clone());
            let killed = true;
            self.supervise(supervision::Event::Died { id, reason, killed });
        }
        self.plug_in_again();
    }

    /// Cards in networks get other processes: the networks' switches are others, and know of no port that was made before.
    fn plug_in_again(&mut self) {
        let nets = (0..).zip(&self.nursery.spec.nets);
        let ports = nets.filter(|(_, net)| matches!(net.source, NetSource::Network(_)));
        let indexes: Vec<u16> = ports.map(|(index, _)| index).collect();
        for index in indexes {
            let id = ProcId {
                kind: ProcKind::Net,
                index,
                generation: 0,
            };
            // One that is dead is being replaced anyway.
            if let Some(current) = self.supervisor.current(id)
                && self.supervisor.can_replace(current)
            {
                self.supervise(supervision::Event::Replace(current));
            }
        }
    }

    /// The vCPU process has answered: whether this was the first time for this broker.
    pub(super) fn is_taken_over(&mut self) -> bool {
        let Some(since) = self.taking_over.take() else {
            return false;
        };
        let after = since.elapsed();
        self.tell.event(Event::TakenOver { after });
        true
    }
}
