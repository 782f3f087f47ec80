//! Runs a machine: carries out what [`super::state`] and the supervisor decide.
//!
//! The broker is on no data path: all it does while a guest runs is to sleep on control channels,
//! pidfds, logs, its owner's commands and deadlines.

mod medium;
mod revival;
mod room;
mod takeover;

pub use takeover::{adopt, adopt_and_keep, clear};

use super::consoles::Rings;
use super::devices;
use super::group_limits;
use super::household::{Household, Member, Nursery, Positions};
use super::keeper::Keeper;
use super::record::{Phase, since_boot_ms};
use super::report::Report;
use super::resources::{Fence, Resources};
use super::session::{Command, Event, Finished, Restart, RunError, RunOptions};
use super::spec::{KernelSource, VmSpec};
use super::state::{Input, Life, Output, Verdict};
use crate::launch::{Launched, Launcher};
use crate::supervisor::driver::{NOTICES_CAPACITY, Notice, watch};
use crate::supervisor::fault;
use crate::supervisor::state::{self as supervision, Action, Supervisor};
use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::birth::DiskLimits;
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use bulkhead_ipc::protocol::vcpu::{FromVcpu, ToVcpu};
use bulkhead_policies::cache::Compiled;
use revival::{LateLock, Revival, Trial};
use room::NoRoom;
use serde::Serialize;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long the kernel may take to give up the disks of dead processes.
const FENCE_TIMEOUT: Duration = Duration::from_secs(5);
const FENCE_POLL: Duration = Duration::from_millis(1);
/// How long after lock processes are put into their control groups: the kernel may hold up every
/// process of the host that starts meanwhile, the guest's first steps among them.
const GROUPS_AFTER: Duration = Duration::from_millis(10);

/// Runs the machine until it is over. Runs in a current-thread runtime with I/O and time.
///
/// # Errors
/// When it cannot be started; what happens to it later is an [`super::session::Ending`].
pub async fn run(
    spec: &VmSpec,
    options: &RunOptions,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) -> Result<Finished, RunError> {
    run_and_keep(spec, options, commands, events).await.close()
}

/// As [`run`]; what is on record stays until the caller has noted how it ended.
pub async fn run_and_keep(
    spec: &VmSpec,
    options: &RunOptions,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
) -> Over {
    match begin(spec, options) {
        Ok((mut keeper, launcher, compiled)) => {
            let how = Begin::First;
            let result = run_at(&mut keeper, launcher, &compiled, commands, events, how).await;
            // Whatever was started has ended or been killed.
            Over {
                result,
                keeper: Some(keeper),
            }
        }
        Err(error) => Over {
            result: Err(error),
            keeper: None,
        },
    }
}

/// A run that is over. As long as it is held the machine is this broker's and on record, so that the
/// next broker hears how it ended if this one is killed before it has told anybody.
#[derive(Debug)]
pub struct Over {
    /// How it ended.
    pub result: Result<Finished, RunError>,
    /// Its place in the runtime directory; `None` when it has none or is left to others.
    pub keeper: Option<Keeper>,
}

impl Over {
    /// Removes what is on record.
    ///
    /// # Errors
    /// Why the machine could not be run.
    pub fn close(self) -> Result<Finished, RunError> {
        if let Some(keeper) = self.keeper {
            keeper.close();
        }
        self.result
    }
}

/// Everything that is needed before the first process.
fn begin(spec: &VmSpec, options: &RunOptions) -> Result<(Keeper, Launcher, Compiled), RunError> {
    let configuration = |e: &dyn std::fmt::Display| RunError::Configuration(e.to_string());
    let spec = &*crate::seed::with_disk(spec, options)
        .map_err(|e| RunError::Configuration(format!("cloud_init: {e}")))?;
    spec.check().map_err(|e| configuration(&e))?;
    // First of all, since it makes namespaces while the rest is being prepared.
    let mut launcher =
        Launcher::new(&options.binaries, options.users).map_err(|e| RunError::Host {
            lacks: e.to_string(),
        })?;
    let compiled = policies(options)?;
    find_programs(&mut launcher, spec)?;
    let keeper = Keeper::begin(spec, options).map_err(|e| configuration(&e))?;
    Ok((keeper, launcher, compiled))
}

fn find_programs(launcher: &mut Launcher, spec: &VmSpec) -> Result<(), RunError> {
    let devices = devices::plan(spec);
    let kinds = devices.iter().map(|device| device.kind.proc_kind());
    let reader = matches!(spec.kernel, KernelSource::Disk(_)).then_some(ProcKind::Image);
    let first = [ProcKind::Vcpu, ProcKind::Legacy].into_iter().chain(reader);
    for kind in first.chain(kinds) {
        launcher.find_program(kind).map_err(|e| RunError::Start {
            who: kind.name().to_owned(),
            reason: e.to_string(),
        })?;
    }
    Ok(())
}

/// How a run begins.
enum Begin {
    /// With the machine's first processes.
    First,
    /// The same, of a machine that was to be started again: its consoles go on.
    Again,
    /// With what another broker has started.
    Over(Found),
}

/// Runs a machine that this broker owns.
async fn run_at(
    keeper: &mut Keeper,
    mut launcher: Launcher,
    compiled: &Compiled,
    mut commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
    begin: Begin,
) -> Result<Finished, RunError> {
    let options = &keeper.record().options.clone();
    let mut spec = keeper.record().spec_now();
    let mut devices = devices::plan(&spec);
    let host = |cause: std::io::Error| RunError::Host {
        lacks: cause.to_string(),
    };
    if !matches!(begin, Begin::Over(_)) {
        group_limits::check(&spec, &devices, compiled, options.reach)?;
    }
    let (mut resources, mut found, (rings, consoles)) = match begin {
        Begin::Over(Found { processes, kept }) => {
            let rings = Rings::adopt(&spec, &options.state, kept).map_err(host)?;
            (None, Some(processes), rings)
        }
        Begin::Again => {
            let resources = Resources::open(&spec, options, &mut launcher, compiled)?;
            let kept = Rings::adopt(&spec, &options.state, Vec::new());
            let rings = kept.or_else(|_| Rings::make(&spec, &options.state))?;
            (Some(resources), None, rings)
        }
        Begin::First => {
            let resources = Resources::open(&spec, options, &mut launcher, compiled)?;
            (Some(resources), None, Rings::make(&spec, &options.state)?)
        }
    };
    let mut tell = Teller { events, dropped: 0 };
    tell.event(Event::Consoles(Box::new(consoles)));

    let timeout = spec.limits.run_timeout;
    let lived = since_boot_ms().saturating_sub(keeper.record().began_ms);
    let until = timeout.map(|after| {
        let left = after.saturating_sub(Duration::from_millis(lived));
        (tokio::time::Instant::now() + left, after)
    });
    let mut degraded = keeper.record().degraded.clone();
    let mut replaced = VecDeque::new();
    let mut restarts = keeper.record().restarts;
    let mut generation = keeper.record().generation;
    loop {
        let may_restart = options.reboot && restarts < spec.limits.restarts_max;
        let fence = match &resources {
            Some(resources) => Fence::new(&spec, resources),
            None => Ok(Fence::around(&spec)),
        };
        let fence = fence.map_err(|cause| RunError::Host {
            lacks: format!("a way to watch the disks: {cause}"),
        })?;
        let mut nursery = Nursery {
            launcher: &mut launcher,
            compiled,
            policies: options.policies.as_deref(),
            spec: &spec,
            devices: &devices,
            rings: &rings,
            keeper,
            reach: options.reach,
        };
        // No process has the identity of one of an earlier life.
        generation += 1;
        let (household, dead) = match (resources.take(), found.take()) {
            (Some(resources), _) => {
                let started = Household::start(&mut nursery, resources, generation)?;
                (started, None)
            }
            (None, processes) => {
                let (processes, dead) = processes.unwrap_or_default();
                let household = Household::adopt(&nursery, options, processes)?;
                (household, Some(dead))
            }
        };
        let (notices, heard) = mpsc::channel(NOTICES_CAPACITY);
        let record = nursery.keeper.record();
        let (pause_wanted, no_room) = (record.pause_wanted, !record.no_room.is_empty());
        let life = Life::new(spec.lifecycle, may_restart).found(pause_wanted, no_room);
        let mut machine = Machine {
            nursery,
            began: Instant::now(),
            life,
            no_room: NoRoom::default(),
            supervisor: Supervisor::new(spec.limits.shutdown_timeout),
            household,
            report: Report::default(),
            degraded: &mut degraded,
            replaced: &mut replaced,
            revivals: Vec::new(),
            unlocked: Vec::new(),
            trials: Vec::new(),
            size: None,
            watchers: notices.downgrade(),
            tell: &mut tell,
            inputs: VecDeque::new(),
            notices: Some(notices),
            groups_at: None,
            all_locked_after: None,
            taking_over: None,
        };
        machine.watch_from(0)?;
        if let Some(dead) = dead {
            machine.go_on(&dead);
        }
        let verdict = machine.live(heard, &mut commands, until).await;
        generation = machine.household.newest_generation();
        let report = machine.report.finish();
        drop(machine);
        free_disks(&fence).await;
        match verdict {
            Verdict::Finished(ending) => {
                return Ok(Finished {
                    ending,
                    report,
                    degraded,
                    restarts: replaced.into(),
                });
            }
            Verdict::StartFailed(who, reason) => return Err(RunError::Start { who, reason }),
            Verdict::Restart => {
                restarts += 1;
                keeper.start_again();
                tell.event(Event::Restarting { count: restarts });
                // With its disks as they are now.
                spec = keeper.record().spec_now();
                devices = devices::plan(&spec);
                resources = Some(Resources::open(&spec, options, &mut launcher, compiled)?);
            }
        }
    }
}

/// Waits until the dead processes have left nothing in the kernel that holds a disk.
async fn free_disks(fence: &Fence) {
    let until = tokio::time::Instant::now() + FENCE_TIMEOUT;
    while !fence.is_free() && tokio::time::Instant::now() < until {
        tokio::time::sleep(FENCE_POLL).await;
    }
}

fn policies(options: &RunOptions) -> Result<Compiled, RunError> {
    let directory = options.policies.as_deref();
    let looser = options.allow_looser_policy;
    let compiled = match &options.cache {
        Some(cache) => Compiled::cached(directory, looser, cache),
        None => Compiled::fresh(directory, looser),
    };
    compiled.map_err(|e| RunError::Configuration(e.to_string()))
}

/// Passes events on without ever waiting for whoever listens.
struct Teller {
    events: mpsc::Sender<Event>,
    dropped: u64,
}

impl Teller {
    fn event(&mut self, event: Event) {
        match self.events.try_send(event) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(event)) => {
                self.dropped += 1;
                if self.dropped.is_power_of_two() {
                    let dropped = self.dropped;
                    tracing::warn!(dropped, ?event, "nobody listens to the machine's events");
                }
            }
        }
    }
}

/// One life of the machine.
struct Machine<'a> {
    nursery: Nursery<'a>,
    began: Instant,
    life: Life,
    no_room: NoRoom,
    supervisor: Supervisor,
    household: Household,
    report: Report,
    degraded: &'a mut Vec<(String, String)>,
    replaced: &'a mut VecDeque<Restart>,
    /// Processes on their way into the place of dead ones.
    revivals: Vec<Revival>,
    unlocked: Vec<LateLock>,
    /// Programs that have not served yet.
    trials: Vec<Trial>,
    /// The terminal's size, once it was told.
    size: Option<(u16, u16)>,
    /// For watchers of processes that are started later. It keeps nobody waiting who listens.
    watchers: mpsc::WeakSender<(ProcId, Notice)>,
    tell: &'a mut Teller,
    /// What the life has still to be told.
    inputs: VecDeque<Input>,
    /// For the watchers of processes that are not started yet.
    notices: Option<mpsc::Sender<(ProcId, Notice)>>,
    /// When processes get their control groups.
    groups_at: Option<tokio::time::Instant>,
    /// Time from the start until every process was locked.
    all_locked_after: Option<Duration>,
    /// When this broker took the machine over, until the vCPU process has answered it.
    taking_over: Option<Instant>,
}

/// The processes of a machine that another broker has started; and which of them are dead, and how.
type Processes = (Vec<Launched>, Vec<(ProcId, String)>);

/// What is found of a machine that another broker has started.
struct Found {
    processes: Processes,
    /// The consoles' descriptors.
    kept: Vec<OwnedFd>,
}

impl Machine<'_> {
    /// Watches the members from number `first` on.
    fn watch_from(&mut self, first: usize) -> Result<(), RunError> {
        let now = self.began.elapsed();
        let members = self.household.members.iter().skip(first);
        let born: Vec<_> = members.map(|m| (m.launched.id, m.rule)).collect();
        for (id, rule) in born {
            self.supervisor.add(id, rule, now);
            self.watch(id)?;
        }
        Ok(())
    }

    /// Watches one process.
    fn watch(&mut self, id: ProcId) -> Result<(), RunError> {
        let notices = self.notices.clone().or_else(|| self.watchers.upgrade());
        let (Some(notices), Some(member)) = (notices, self.household.member(id)) else {
            return Ok(());
        };
        if member.launched.is_dead() {
            return Ok(());
        }
        let name = &self.nursery.spec.name;
        watch(&member.launched, name, notices).map_err(|cause| RunError::Host {
            lacks: format!("a way to watch processes: {cause}"),
        })?;
        if !member.launched.is_adopted() {
            self.tell.event(Event::Started {
                id,
                name: member.name.clone(),
                pid: member.launched.pid,
                program: member.program.into(),
                users: member.launched.users,
            });
        }
        Ok(())
    }

    /// The vCPU process needs nothing more to run its guest: now the devices.
    fn start_devices(&mut self) {
        if self.notices.is_none() || self.life.is_stopping() {
            return;
        }
        let first = self.household.members.len();
        let started = self.household.start_devices(&mut self.nursery);
        // Those that were started before one that could not be are watched until they are gone.
        let done = self.watch_from(first).and(started);
        self.notices = None;
        if let Err(error) = done {
            let (who, reason) = match error {
                RunError::Start { who, reason } => (who, reason),
                error => ("a device".to_owned(), error.to_string()),
            };
            self.inputs.push_back(Input::StartFailed(who, reason));
        }
    }

    fn make_groups(&mut self) {
        self.groups_at = None;
        self.household
            .limit(self.nursery.spec, self.nursery.reach, self.nursery.keeper);
        if let Some(after) = self.all_locked_after.take() {
            bulkhead_ipc::shed::start_up_code();
            bulkhead_ipc::shed::free_heap();
            self.tell.event(Event::AllLocked { after });
        }
    }

    async fn live(
        &mut self,
        mut heard: mpsc::Receiver<(ProcId, Notice)>,
        commands: &mut mpsc::Receiver<Command>,
        until: Option<(tokio::time::Instant, Duration)>,
    ) -> Verdict {
        let mut commanding = true;
        let mut timed_out = false;
        loop {
            while let Some(input) = self.inputs.pop_front() {
                if let Some(verdict) = self.advance(input) {
                    return verdict;
                }
            }
            let tick = self.supervisor.next_deadline().map(|at| self.began + at);
            tokio::select! {
                notice = heard.recv() => match notice {
                    Some((id, notice)) => self.notice(id, notice),
                    // Every watcher has ended, so every process has.
                    None => self.inputs.push_back(Input::AllGone),
                },
                command = commands.recv(), if commanding => match command {
                    Some(command) => self.command(command),
                    None => commanding = false,
                },
                () = sleep_until(tick.map(Into::into)) => {
                    self.supervise(supervision::Event::Tick);
                }
                () = sleep_until(self.next_push()) => self.push_revivals(),
                () = sleep_until(self.groups_at) => self.make_groups(),
                () = sleep_until(self.no_room.next_try()) => self.try_again(),
                () = sleep_until(until.map(|(at, _)| at)), if !timed_out => {
                    timed_out = true;
                    let after = until.map(|(_, after)| after).unwrap_or_default();
                    self.inputs.push_back(Input::TimedOut(after));
                }
            }
        }
    }

    fn advance(&mut self, input: Input) -> Option<Verdict> {
        let before = self.life.is_preserved();
        let outputs = self.life.step(input);
        if self.life.is_preserved() && !before {
            self.tell.event(Event::Preserved);
        }
        for output in outputs {
            match output {
                Output::Tell(message) => self.tell_vcpu(&message),
                Output::End => {
                    if let Some(verdict) = self.life.verdict() {
                        self.nursery.keeper.phase(Phase::Stopping(verdict.clone()));
                    }
                    self.revivals.clear();
                    self.unlocked.clear();
                    self.end_trials();
                    self.supervise(supervision::Event::End);
                }
                Output::Over(verdict) => return Some(verdict),
            }
        }
        None
    }

    fn command(&mut self, command: Command) {
        match &command {
            Command::Resize { columns, rows } => {
                let (columns, rows) = (*columns, *rows);
                self.size = Some((columns, rows));
                if let Some(console) = self.household.of_kind(ProcKind::Console) {
                    let id = console.launched.id;
                    self.send(id, &ToDevice::Resize { columns, rows });
                }
            }
            Command::RestartDevice(name) => self.replace(name, false),
            Command::UpgradeDevice(name) => self.replace(name, true),
            Command::LimitDevice { device, limits } => self.limit(device, *limits),
            Command::ChangeDisk { device, change } => self.change_disk(device, change),
            Command::LinkDevice { device, up } => self.link(device, *up),
            Command::Pause => self.note_pause(true),
            Command::Resume => {
                self.note_pause(false);
                self.try_again();
            }
            _ => {}
        }
        self.inputs.push_back(Input::Command(command));
    }

    /// For the process that serves the disk now, and for all that come after it.
    fn limit(&mut self, device: &str, limits: DiskLimits) {
        let mut members = self.household.members.iter();
        let limited = |kind| matches!(kind, ProcKind::Blk | ProcKind::Net);
        let member = members.find(|m| m.name == device && limited(m.launched.id.kind));
        let Some(id) = member.map(|m| m.launched.id) else {
            return self.tell.event(Event::Refused {
                device: device.to_owned(),
                command: format!("limit {device}"),
                reason: "there is no such disk or network device".to_owned(),
            });
        };
        self.nursery.keeper.note(|record| {
            record.limits.retain(|(name, _)| name != device);
            record.limits.push((device.to_owned(), limits));
        });
        self.send(id, &ToDevice::Limits(limits));
    }

    /// For the process that serves the network device now, and for all that come after it.
    fn link(&mut self, device: &str, up: bool) {
        let mut members = self.household.members.iter();
        let member = members.find(|m| m.name == device && m.launched.id.kind == ProcKind::Net);
        let Some(id) = member.map(|m| m.launched.id) else {
            return self.tell.event(Event::Refused {
                device: device.to_owned(),
                command: format!("link {device}"),
                reason: "there is no such network device".to_owned(),
            });
        };
        self.nursery.keeper.note(|record| {
            record.links.retain(|(name, _)| name != device);
            record.links.push((device.to_owned(), up));
        });
        self.send(id, &ToDevice::Link(up));
    }

    fn notice(&mut self, id: ProcId, notice: Notice) {
        match notice {
            Notice::Locked(landlock_abi, program) => {
                let after = self.began.elapsed();
                tracing::debug!(proc = %id, after_us = after.as_micros(), "locked");
                self.tell.event(Event::Locked {
                    id,
                    after,
                    landlock_abi,
                    program: program.clone(),
                });
                self.start_devices();
                self.supervise(supervision::Event::Locked(id));
                self.learn_version(id, program);
            }
            Notice::Broke(reason) => self.supervise(supervision::Event::Broke { id, reason }),
            Notice::Died { reason, killed } => {
                tracing::debug!(proc = %id, reason, "gone");
                self.tell_of_denial(id);
                if !self.life.is_stopping() {
                    let (name, reason) = (self.name(id), reason.clone());
                    self.tell.event(Event::Died { id, name, reason });
                }
                self.supervise(supervision::Event::Died { id, reason, killed });
            }
            Notice::Device(FromDevice::Pong(number)) => {
                self.supervise(supervision::Event::Pong { id, number });
            }
            Notice::Device(FromDevice::Fault { reason }) => {
                let name = self.name(id);
                let reason = fault::said(&reason);
                tracing::warn!(proc = %id, name, reason, "device fault");
                self.tell.event(Event::DeviceFault { name, reason });
            }
            Notice::Device(FromDevice::Dial {
                id: dial,
                port,
                asked_ms,
            }) => self.dial(id, dial, port, asked_ms),
            Notice::Device(FromDevice::Traffic(traffic)) => {
                self.tell.event(Event::Traffic { id, traffic });
            }
            Notice::Device(FromDevice::NoRoom) => self.lacks_room(id),
            Notice::Device(FromDevice::HasRoom) => self.has_room(&self.name(id)),
            Notice::Vcpu(message, descriptors) => self.hear_vcpu(message, descriptors),
            // No machine has one.
            Notice::Switch(_) => {}
        }
    }

    /// A socket device wants a connection to the listener of `port`. Whoever is reached or not, it is told.
    fn dial(&mut self, id: ProcId, dial: u64, port: u32, asked_ms: u64) {
        let (Some(member), Some(socket)) = (self.household.member(id), self.household.vsock())
        else {
            return;
        };
        if id.kind != ProcKind::Vsock {
            return self.broke(Some(id), "asks for what only sockets need".to_owned());
        }
        let answer = ToDevice::Dialled { id: dial };
        let Some(connecting) = socket.dial(port, asked_ms) else {
            return self.send(id, &answer);
        };
        let launched = std::sync::Arc::clone(&member.launched);
        tokio::spawn(async move {
            let connected = connecting.await;
            let connected: Vec<_> = connected.iter().map(AsFd::as_fd).collect();
            // A device that does not listen is found out by its heartbeat.
            if let Err(error) = launched.control.send(&answer, &connected) {
                tracing::debug!(proc = %id, %error, "a connection is not taken");
            }
        });
    }

    fn tell_of_denial(&mut self, id: ProcId) {
        let denial = self.household.member(id);
        let denial = denial.and_then(|m| fault::denial(&m.launched, self.nursery.policies));
        if let Some(denial) = denial {
            let name = self.name(id);
            tracing::error!(proc = %id, name, %denial, "denied");
            let denial = Box::new(denial);
            self.tell.event(Event::Denied { id, name, denial });
        }
    }

    fn hear_vcpu(&mut self, message: FromVcpu, descriptors: Vec<OwnedFd>) {
        match message {
            FromVcpu::Pong(_) => {}
            FromVcpu::Paused => {
                self.tell.event(Event::Paused);
                self.inputs.push_back(Input::Paused);
                self.is_taken_over();
            }
            FromVcpu::Resumed => {
                // One that has run all the time has not resumed.
                if !self.is_taken_over() {
                    self.tell.event(Event::Resumed);
                }
                self.inputs.push_back(Input::Resumed);
            }
            FromVcpu::SlotPrepared {
                slot,
                generation,
                output_position,
                input_position,
            } => {
                let positions = Positions {
                    output: output_position,
                    input: input_position,
                };
                self.prepared(Some(slot), generation, positions, descriptors);
            }
            FromVcpu::SlotServing { slot, generation } => {
                let mut members = self.household.members.iter();
                let serving = members
                    .find(|m| m.slot == Some(slot) && m.launched.id.generation == generation);
                if let Some(id) = serving.map(|m| m.launched.id) {
                    self.supervise(supervision::Event::Serving(id));
                }
            }
            FromVcpu::LegacyPrepared {
                generation,
                output_position,
                input_position,
            } => {
                let positions = Positions {
                    output: output_position,
                    input: input_position,
                };
                self.prepared(None, generation, positions, descriptors);
            }
            FromVcpu::LegacyServing { generation } => {
                let id = ProcId {
                    kind: ProcKind::Legacy,
                    index: 0,
                    generation,
                };
                self.supervise(supervision::Event::Serving(id));
            }
            FromVcpu::RequestGivenUp { slot, reason } => {
                let (name, reason) = (self.name_of_slot(slot), fault::said(&reason));
                tracing::error!(name, reason, "a request is given up");
                self.tell.event(Event::RequestGivenUp { name, reason });
            }
            FromVcpu::DeviceFault { slot, reason } => {
                let (name, reason) = (self.name_of_slot(slot), fault::said(&reason));
                let mut members = self.household.members.iter();
                let device = members.find(|m| m.slot == Some(slot));
                let id = device.map(|m| m.launched.id);
                self.tell.event(Event::DeviceFault {
                    name,
                    reason: reason.clone(),
                });
                if let Some(id) = id {
                    // It was heard in its window, so it is locked. Its own word of that comes by another
                    // channel, and may come later: that is no failed start.
                    self.supervise(supervision::Event::Locked(id));
                }
                self.broke(id, reason);
            }
            FromVcpu::LegacyFault { reason } => {
                let legacy = self.household.of_kind(ProcKind::Legacy);
                let id = legacy.map(|m| m.launched.id);
                self.broke(id, fault::said(&reason));
            }
            FromVcpu::GuestFault { slot, reason } => {
                let (name, reason) = (self.name_of_slot(slot), fault::said(&reason));
                self.tell.event(Event::GuestFault { name, reason });
            }
            FromVcpu::Report { text } => self.report.add(&text),
            FromVcpu::Ended(outcome) => {
                tracing::info!(?outcome, "the machine has ended");
                self.tell.event(Event::Ended(outcome));
                self.inputs.push_back(Input::Ended(outcome));
                self.is_taken_over();
            }
        }
    }

    /// A process that serves nobody any more must not stay and keep its resource.
    fn broke(&mut self, id: Option<ProcId>, reason: String) {
        if let Some(id) = id {
            self.supervise(supervision::Event::Broke { id, reason });
        }
    }

    fn supervise(&mut self, event: supervision::Event) {
        let now = self.began.elapsed();
        for action in self.supervisor.step(event, now) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::AllLocked => {
                self.all_locked_after = Some(self.began.elapsed());
                self.nursery.keeper.phase(Phase::Running);
                self.groups_at = Some(tokio::time::Instant::now() + GROUPS_AFTER);
                self.inputs.push_back(Input::AllLocked);
            }
            Action::StartFailed { id, reason } => {
                let name = self.name(id);
                self.inputs.push_back(Input::StartFailed(name, reason));
            }
            Action::Revive { id, reason, blame } => {
                tracing::warn!(proc = %id, reason, "a device process is dead; the next one takes its place");
                self.take_back(id, &reason);
                self.revive(id, blame);
            }
            Action::Revived { id, reason, after } => {
                // That the program was taken back is told first: whoever waits for another process
                // to serve must not take this one for what was asked for.
                self.end_trial(id, None);
                self.revived(id, reason, after);
            }
            Action::Ping { id, number } => self.send(id, &ToDevice::Ping(number)),
            Action::Degraded { id, reason } => self.degrade(id, reason),
            Action::MachineLost { id, reason } => {
                tracing::error!(proc = %id, reason, "lost");
                self.inputs.push_back(Input::Lost(reason));
            }
            Action::Ask(id) => match id.kind {
                ProcKind::Vcpu => self.send(id, &ToVcpu::Kill),
                _ => self.send(id, &ToDevice::Shutdown),
            },
            Action::Kill(id) => {
                if let Some(member) = self.household.member(id) {
                    // Already dead is as good; its pidfd says so.
                    let _killed = member.launched.kill();
                }
            }
            Action::AllGone => self.inputs.push_back(Input::AllGone),
        }
    }

    fn degrade(&mut self, id: ProcId, reason: String) {
        let Some(member) = self.household.in_place_of(id) else {
            return;
        };
        let (name, slot) = (member.name.clone(), member.slot);
        self.end_trial(id, Some(&reason));
        tracing::error!(proc = %id, name, reason, "device lost; the machine goes on degraded");
        match slot {
            Some(slot) => self.tell_vcpu(&ToVcpu::DeviceLost { slot }),
            None => self.tell_vcpu(&ToVcpu::LegacyLost),
        }
        let lost = (name.clone(), reason.clone());
        self.degraded.retain(|(before, _)| *before != name);
        self.degraded.push(lost.clone());
        self.nursery.keeper.note(|record| {
            record.degraded.retain(|(before, _)| *before != lost.0);
            record.degraded.push(lost);
        });
        // Nothing of it waits for room any more.
        self.has_room(&name);
        self.household.unplug(id);
        self.tell.event(Event::Degraded { id, name, reason });
    }

    fn tell_vcpu(&mut self, message: &ToVcpu) {
        if let Some(vcpu) = self.household.of_kind(ProcKind::Vcpu) {
            let id = vcpu.launched.id;
            self.send(id, message);
        }
    }

    fn send<T: Serialize>(&mut self, id: ProcId, message: &T) {
        let Some(member) = self.household.member(id) else {
            return;
        };
        match member.launched.control.send(message, &[]) {
            // Its death is told by its pidfd.
            Ok(()) | Err(ChannelError::Closed) => {}
            Err(error) => {
                let reason = format!("cannot be told anything: {error}");
                self.supervise(supervision::Event::Broke { id, reason });
            }
        }
    }

    fn name(&self, id: ProcId) -> String {
        let mut members = self.household.members.iter();
        let same = |m: &&Member| (m.launched.id.kind, m.launched.id.index) == (id.kind, id.index);
        let member = members.find(same);
        member.map_or_else(|| id.kind.name().to_owned(), |m| m.name.clone())
    }

    fn name_of_slot(&self, slot: u8) -> String {
        let device = self
            .nursery
            .devices
            .iter()
            .find(|device| device.slot == slot);
        device.map_or_else(|| format!("slot {slot}"), |device| device.name.clone())
    }
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
