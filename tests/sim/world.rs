//! Everything around the two state machines: processes that live and die, delays, an owner, and what
//! the broker's driver does with each action (`broker/src/vm/driver.rs`). Time is a number.

use bulkhead::supervisor::state::{self as supervision, Action, Moment, Rule, Supervisor};
use bulkhead::vm::session::Command;
use bulkhead::vm::spec::{Lifecycle, OnEnd};
use bulkhead::vm::state::{Input, Life, Output, Verdict};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::vcpu::{Outcome, ToVcpu};
use bulkhead_policies::schema::{FaultsEntry, HeartbeatEntry, OnDeath, RestartEntry};
use bulkhead_tests::prng::Prng;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const RESTART: RestartEntry = RestartEntry {
    restarts_max: 5,
    window_ms: 10_000,
    backoff_ms_min: 10,
    backoff_ms_max: 50,
};
const FAULTS: FaultsEntry = FaultsEntry {
    max: 2,
    window_ms: 600_000,
};
const HEARTBEAT: HeartbeatEntry = HeartbeatEntry {
    interval_ms: 1000,
    misses_max: 3,
};
const SHUTDOWN: Duration = Duration::from_secs(2);
/// Everything is over this long after it was told to end, however bad the processes are.
const END_WITHIN: Duration = Duration::from_secs(60);
/// How long a process that cannot be killed hangs in the kernel.
const HANGS_MS: u64 = 20_000;

const VCPU: Slot = (ProcKind::Vcpu, 0);
const DEVICES: [Slot; 5] = [
    (ProcKind::Blk, 0),
    (ProcKind::Blk, 1),
    (ProcKind::Console, 0),
    (ProcKind::Rng, 0),
    (ProcKind::Legacy, 0),
];

type Slot = (ProcKind, u16);

const fn slot(id: ProcId) -> Slot {
    (id.kind, id.index)
}

/// How much goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Nothing.
    Quiet,
    /// Devices die again and again once the machine runs, and nothing else happens.
    Deadly,
    /// Everything that can.
    Wild,
}

/// A process as it is, which the supervisor does not see.
#[derive(Debug)]
struct Process {
    id: ProcId,
    alive: bool,
    /// Says and does nothing any more, but can be killed.
    stuck: bool,
    /// Waits in the kernel and does not die.
    hangs: bool,
}

/// What happens later.
#[derive(Debug, Clone)]
enum Later {
    /// A process is locked, and serves its slot if it follows another.
    Lock(ProcId),
    Serve(ProcId),
    /// A process dies.
    Die(ProcId, bool),
    /// Its death is seen.
    DeathSeen(ProcId, bool),
    /// The successor was started, or could not be.
    Launch(ProcId, LaunchResult),
    Pong(ProcId, u64),
    Vcpu(Input),
}

#[derive(Debug, Clone, Copy)]
enum LaunchResult {
    Started,
    Failed,
    Hopeless,
}

pub(crate) struct World {
    prng: Prng,
    mood: Mood,
    now: Moment,
    steps: u64,
    supervisor: Supervisor,
    life: Life,
    processes: BTreeMap<Slot, Process>,
    later: BTreeMap<(Moment, u64), Later>,
    sequence: u64,
    inputs: VecDeque<Input>,
    /// Revivals asked for and not done, by slot.
    reviving: BTreeMap<Slot, ProcId>,
    restarts: BTreeMap<Slot, Vec<Moment>>,
    lost: BTreeMap<Slot, ProcId>,
    /// Every process has been locked.
    running: bool,
    verdict: Option<Verdict>,
    ending_since: Option<Moment>,
    /// What the end that has begun is to lead to.
    ends_with: Option<Verdict>,
    /// The last things that happened, for whoever has to find out.
    trace: VecDeque<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for line in &self.trace {
                println(line);
            }
        }
    }
}

#[expect(clippy::print_stdout, reason = "what a failed schedule did")]
fn println(line: &str) {
    println!("{line}");
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with_mood(seed, Mood::Wild)
    }

    pub(crate) fn with_mood(seed: u64, mood: Mood) -> Self {
        let mut prng = Prng::new(seed);
        let ends = [OnEnd::Destroy, OnEnd::Restart, OnEnd::Preserve];
        let lifecycle = Lifecycle {
            on_poweroff: *prng.pick(&ends),
            on_reboot: *prng.pick(&ends),
            on_crash: *prng.pick(&ends),
            ..Lifecycle::default()
        };
        let may_restart = prng.one_in(2);
        let mut world = Self {
            prng,
            mood,
            now: Duration::ZERO,
            steps: 0,
            supervisor: Supervisor::new(SHUTDOWN),
            life: Life::new(lifecycle, may_restart),
            processes: BTreeMap::new(),
            later: BTreeMap::new(),
            sequence: 0,
            inputs: VecDeque::new(),
            reviving: BTreeMap::new(),
            restarts: BTreeMap::new(),
            lost: BTreeMap::new(),
            running: false,
            verdict: None,
            ending_since: None,
            ends_with: None,
            trace: VecDeque::new(),
        };
        for (kind, index) in [VCPU].into_iter().chain(DEVICES) {
            let id = ProcId {
                kind,
                index,
                generation: 1,
            };
            let rule = world.rule(kind);
            world.supervisor.add(id, rule, Duration::ZERO);
            world.born(id);
        }
        world
    }

    fn rule(&mut self, kind: ProcKind) -> Rule {
        let on_death = match kind {
            ProcKind::Vcpu => OnDeath::EndMachine,
            _ if self.mood == Mood::Wild && self.prng.one_in(6) => OnDeath::Degrade,
            _ => OnDeath::Restart,
        };
        Rule {
            on_death,
            birth_timeout: Duration::from_secs(10),
            restart: (on_death == OnDeath::Restart).then_some(RESTART),
            heartbeat: (kind != ProcKind::Vcpu).then_some(HEARTBEAT),
            faults: (kind == ProcKind::Legacy).then_some(FAULTS),
        }
    }

    pub(crate) const fn steps(&self) -> u64 {
        self.steps
    }

    /// Does the next thing. False when nothing will ever happen again.
    pub(crate) fn step(&mut self) -> bool {
        if self.verdict.is_some() {
            return false;
        }
        self.steps += 1;
        let begins = self.mood == Mood::Wild || self.running;
        if self.mood != Mood::Quiet && begins && self.ending_since.is_none() {
            self.misfortune();
        }
        let tick = self.supervisor.next_deadline();
        let next = self.later.keys().next().copied();
        match (tick, next) {
            (None, None) => {
                assert!(
                    self.ending_since.is_none(),
                    "the machine never ends: {:?}",
                    self.processes
                );
                return self.mood == Mood::Wild;
            }
            (Some(at), None) => self.tick(at),
            (Some(at), Some((then, _))) if at <= then => self.tick(at),
            (_, Some(key)) => {
                self.now = self.now.max(key.0);
                if let Some(later) = self.later.remove(&key) {
                    self.note(format!("{later:?}"));
                    self.happen(later);
                }
            }
        }
        if let Some(since) = self.ending_since {
            assert!(self.now < since + END_WITHIN, "ending takes too long");
        }
        true
    }

    fn tick(&mut self, at: Moment) {
        self.now = self.now.max(at);
        self.supervise(supervision::Event::Tick);
    }

    fn note(&mut self, what: String) {
        if self.trace.len() == 200 {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{:>12?} {what}", self.now));
    }

    fn after(&mut self, least_ms: u64, most_ms: u64, later: Later) {
        let us = least_ms * 1000 + self.prng.below((most_ms - least_ms).max(1) * 1000);
        self.sequence += 1;
        let at = self.now + Duration::from_micros(us);
        self.later.insert((at, self.sequence), later);
    }

    /// A process begins to live.
    fn born(&mut self, id: ProcId) {
        let before = self.processes.get(&slot(id));
        assert!(
            before.is_none_or(|p| !p.alive),
            "two processes of {id} are alive"
        );
        assert!(
            before.is_none_or(|p| p.id.generation < id.generation),
            "{id} comes again"
        );
        let wild = self.mood == Mood::Wild;
        let process = Process {
            id,
            alive: true,
            stuck: wild && self.prng.one_in(100),
            hangs: false,
        };
        let stuck = process.stuck;
        let follows = before.is_some();
        self.processes.insert(slot(id), process);
        if !stuck {
            self.after(1, 20, Later::Lock(id));
            if follows {
                self.after(1, 30, Later::Serve(id));
            }
        }
    }

    /// Something that nobody wanted.
    fn misfortune(&mut self) {
        let device = *self.prng.pick(&DEVICES);
        let chance = if self.mood == Mood::Deadly { 8 } else { 30 };
        if self.prng.one_in(chance) {
            let id = self.processes[&device].id;
            let killed = self.prng.one_in(2);
            self.after(0, 5, Later::Die(id, killed));
        }
        if self.mood == Mood::Deadly {
            return;
        }
        if self.prng.one_in(100)
            && let Some(process) = self.processes.get_mut(&device)
        {
            process.stuck = true;
        }
        if self.prng.one_in(300)
            && let Some(process) = self.processes.get_mut(&device)
        {
            process.hangs = true;
        }
        if self.prng.one_in(60) {
            let id = self.processes[&device].id;
            let reason = "broke a ring".to_owned();
            self.supervise(supervision::Event::Broke { id, reason });
        }
        if self.prng.one_in(80)
            && let Some(id) = self.supervisor.current(self.processes[&device].id)
        {
            self.note(format!("owner: replace {id}"));
            if self.supervisor.can_replace(id) {
                self.restarts.remove(&device);
            }
            self.supervise(supervision::Event::Replace(id));
        }
        if self.prng.one_in(50) {
            self.old_news(device);
        }
        if self.prng.one_in(200) {
            self.after(0, 5, Later::Die(self.processes[&VCPU].id, true));
        }
        if self.prng.one_in(100) {
            let inputs = [
                Input::Command(Command::Pause),
                Input::Command(Command::Resume),
                Input::Command(Command::PowerButton),
                Input::NoRoom,
                Input::HasRoom,
            ];
            let input = self.prng.pick(&inputs).clone();
            self.inputs.push_back(input);
            self.drain();
        }
        if self.prng.one_in(150) {
            let outcomes = [
                Outcome::PowerOff,
                Outcome::Reset,
                Outcome::GuestPanic,
                Outcome::TripleFault,
                Outcome::DebugExit(3),
            ];
            let outcome = *self.prng.pick(&outcomes);
            self.after(0, 5, Later::Vcpu(Input::Ended(outcome)));
        }
    }

    /// News of a generation that is long gone, or not born.
    fn old_news(&mut self, device: Slot) {
        let mut id = self.processes[&device].id;
        id.generation = if self.prng.one_in(2) {
            id.generation - 1
        } else {
            id.generation + 7
        };
        let event = match self.prng.below(4) {
            0 => supervision::Event::Locked(id),
            1 => supervision::Event::Serving(id),
            2 => supervision::Event::Pong { id, number: 1 },
            _ => supervision::Event::Died {
                id,
                reason: "old".to_owned(),
                killed: false,
            },
        };
        let actions = self.supervisor.step(event, self.now);
        assert!(actions.is_empty(), "old news of {id} caused {actions:?}");
    }

    fn alive(&self, id: ProcId) -> bool {
        self.processes
            .get(&slot(id))
            .is_some_and(|p| p.id == id && p.alive)
    }

    fn responsive(&self, id: ProcId) -> bool {
        self.alive(id) && !self.processes[&slot(id)].stuck && !self.processes[&slot(id)].hangs
    }

    fn happen(&mut self, later: Later) {
        match later {
            Later::Lock(id) if self.responsive(id) => {
                self.supervise(supervision::Event::Locked(id));
            }
            Later::Serve(id) if self.responsive(id) => {
                self.supervise(supervision::Event::Serving(id));
            }
            Later::Pong(id, number) if self.responsive(id) => {
                self.supervise(supervision::Event::Pong { id, number });
            }
            Later::Die(id, killed) => self.die(id, killed),
            Later::DeathSeen(id, killed) => {
                let reason = "died".to_owned();
                self.supervise(supervision::Event::Died { id, reason, killed });
            }
            Later::Launch(id, result) => self.launch(id, result),
            Later::Vcpu(input) if self.responsive(self.processes[&VCPU].id) => {
                self.inputs.push_back(input);
                self.drain();
            }
            Later::Lock(_) | Later::Serve(_) | Later::Pong(..) | Later::Vcpu(_) => {}
        }
    }

    fn die(&mut self, id: ProcId, killed: bool) {
        if !self.alive(id) {
            return;
        }
        let Some(process) = self.processes.get_mut(&slot(id)) else {
            return;
        };
        if std::mem::take(&mut process.hangs) {
            // Later, when the kernel lets go of it.
            return self.after(HANGS_MS, HANGS_MS + 1000, Later::Die(id, killed));
        }
        process.alive = false;
        self.after(0, 2, Later::DeathSeen(id, killed));
    }

    fn launch(&mut self, id: ProcId, result: LaunchResult) {
        if self.reviving.get(&slot(id)) != Some(&id) {
            // The driver has forgotten it: the machine ends.
            return;
        }
        self.reviving.remove(&slot(id));
        match result {
            LaunchResult::Started => {
                self.born(id);
                self.supervise(supervision::Event::Launched(id));
            }
            LaunchResult::Failed | LaunchResult::Hopeless => {
                let hopeless = matches!(result, LaunchResult::Hopeless);
                let reason = "cannot be started".to_owned();
                self.supervise(supervision::Event::NotRevived {
                    id,
                    reason,
                    hopeless,
                });
            }
        }
    }

    fn supervise(&mut self, event: supervision::Event) {
        let actions = self.supervisor.step(event, self.now);
        for action in actions {
            self.note(format!("  -> {action:?}"));
            self.act(action);
        }
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            if self.verdict.is_some() {
                return;
            }
            self.note(format!("life: {input:?}"));
            for output in self.life.step(input) {
                self.note(format!("  => {output:?}"));
                self.carry_out(output);
            }
        }
    }

    fn carry_out(&mut self, output: Output) {
        match output {
            Output::Tell(ToVcpu::Pause) => self.after(0, 5, Later::Vcpu(Input::Paused)),
            Output::Tell(ToVcpu::Resume) => self.after(0, 5, Later::Vcpu(Input::Resumed)),
            Output::Tell(ToVcpu::PowerButton) if self.prng.one_in(2) => {
                self.after(1, 500, Later::Vcpu(Input::Ended(Outcome::PowerOff)));
            }
            Output::Tell(_) => {}
            Output::End => {
                let verdict = self.life.verdict().cloned();
                if self.ending_since.is_none() {
                    self.ending_since = Some(self.now);
                } else {
                    // Its owner does not want the next life any more, which the driver puts on record.
                    let before = &self.ends_with;
                    assert_eq!(before, &Some(Verdict::Restart), "it ends twice");
                    assert_ne!(&verdict, before, "it ends twice in the same way");
                }
                self.ends_with = verdict;
                self.reviving.clear();
                self.supervise(supervision::Event::End);
            }
            Output::Over(verdict) => {
                assert!(self.verdict.is_none(), "it is over twice");
                assert_eq!(
                    self.ends_with.as_ref(),
                    Some(&verdict),
                    "it is over otherwise"
                );
                self.verdict = Some(verdict);
            }
        }
    }

    fn act(&mut self, action: Action) {
        let ending = self.ending_since.is_some();
        match action {
            Action::AllLocked => {
                self.running = true;
                self.inputs.push_back(Input::AllLocked);
            }
            Action::StartFailed { id, reason } => {
                self.inputs
                    .push_back(Input::StartFailed(id.to_string(), reason));
            }
            Action::MachineLost { reason, .. } => {
                assert!(!ending, "a planned end is no loss");
                self.inputs.push_back(Input::Lost(reason));
            }
            Action::Revive { id, .. } => {
                assert!(!ending, "{id} is restarted while the machine ends");
                self.revive(id);
            }
            Action::Revived { id, .. } => {
                assert!(
                    self.processes[&slot(id)].id == id,
                    "{id} serves and was never started"
                );
                self.lost.remove(&slot(id));
            }
            Action::Degraded { id, .. } => {
                assert!(!ending, "a planned end is no loss");
                let before = self.lost.insert(slot(id), id);
                assert!(before != Some(id), "{id} is lost twice");
            }
            Action::Ping { id, number } => {
                assert!(
                    self.processes[&slot(id)].id == id,
                    "an old generation is pinged"
                );
                self.after(0, 50, Later::Pong(id, number));
            }
            Action::Ask(id) => {
                if self.responsive(id) {
                    self.after(0, 300, Later::Die(id, false));
                }
            }
            Action::Kill(id) => self.after(0, 2, Later::Die(id, true)),
            Action::AllGone => self.inputs.push_back(Input::AllGone),
        }
    }

    fn revive(&mut self, id: ProcId) {
        let device = slot(id);
        assert!(
            !self.alive(self.processes[&device].id),
            "{id}: the one before is alive"
        );
        assert!(
            self.reviving.insert(device, id).is_none(),
            "{device:?} is revived twice"
        );
        let restarts = self.restarts.entry(device).or_default();
        restarts.push(self.now);
        // A restart counts from the death before it; the pause in between may put one restart more
        // into a window. One that the owner asked for does not count.
        let window = Duration::from_millis(RESTART.window_ms.into());
        let recent = restarts
            .iter()
            .filter(|&&at| at + window > self.now)
            .count();
        let most = usize::from(RESTART.restarts_max) + 2;
        assert!(
            recent <= most,
            "{device:?} is restarted {recent} times in {window:?}"
        );
        let result = match self.prng.below(40) {
            0 if self.mood == Mood::Wild => LaunchResult::Hopeless,
            1 | 2 if self.mood == Mood::Wild => LaunchResult::Failed,
            _ => LaunchResult::Started,
        };
        self.after(1, 30, Later::Launch(id, result));
    }

    /// The owner wants it to end now.
    pub(crate) fn end(&mut self) {
        if self.verdict.is_none() {
            self.inputs.push_back(Input::Command(Command::Kill));
            self.drain();
        }
    }

    pub(crate) fn check_end(&self) {
        assert!(self.verdict.is_some(), "the machine is not over");
        let left: Vec<_> = self.processes.values().filter(|p| p.alive).collect();
        assert!(left.is_empty(), "it is over, and these are alive: {left:?}");
        assert!(self.supervisor.all_gone());
    }

    pub(crate) const fn calm_down(&mut self) {
        self.mood = Mood::Quiet;
    }

    /// The owner asks for every device that was given up.
    pub(crate) fn bring_back(&mut self) {
        for device in self.lost.clone().into_values() {
            let id = self.supervisor.current(device).unwrap_or(device);
            assert!(
                self.supervisor.can_replace(id),
                "{id} cannot be brought back"
            );
            self.restarts.remove(&slot(id));
            self.supervise(supervision::Event::Replace(id));
        }
    }

    fn serves(&self, device: Slot) -> bool {
        let process = &self.processes[&device];
        let current = self.supervisor.current(process.id);
        process.alive && current == Some(process.id) && !self.lost.contains_key(&device)
    }

    pub(crate) fn is_serving(&self) -> bool {
        DEVICES.into_iter().all(|device| self.serves(device))
    }

    pub(crate) fn is_serving_or_given_up(&self) -> bool {
        let fine = |device: Slot| self.serves(device) != self.lost.contains_key(&device);
        DEVICES.into_iter().all(fine)
    }
}
