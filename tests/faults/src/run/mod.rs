//! One run of a scenario: hosts and machines are made, the guests work, faults and the operator come
//! at their times, and everything is judged.

mod abort;
mod keeper;
mod operator;
mod remains;
mod strike;
mod watch;

pub use abort::clean_up_at_signals;

use crate::disk::{DiskError, DiskRules, FaultyDisk};
use crate::hosts::{Done, Host, HostError, Places};
use crate::inject::{Engine, host_names};
use crate::network::{Link, LinkReport, Namespace, Network, NetworkError};
use crate::random::Planned;
use crate::scenario::{Deed, Disk, DiskPlace, Expect, Link as LinkOf, Scenario, Vm};
use crate::timeline::{Part, Timeline};
use crate::verdict::Outcome;
use crate::workload::{Guests, Workload, WorkloadError};
use bulkhead_ipc::output_ring::OutputReader;
use keeper::Keeper;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use watch::Watched;

/// How long a command may take that no fault holds up.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long guests may take to begin, and to end after their time is over. A Linux takes a minute to boot where ring 0
/// is emulated on a busy host.
const GUESTS: Duration = Duration::from_secs(120);
/// Disk of a machine that names none.
const DISK_BYTES: u64 = 16 << 20;
/// Where disks in memory are.
const IN_MEMORY: &str = "/dev/shm";

/// What a run needs besides its scenario.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Directory of the programs.
    pub programs: PathBuf,
    /// The guests.
    pub guests: Guests,
}

/// Why a run could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A disk of the harness's own.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A guest, or what it needs.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The network of the hosts.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The host has no room.
    #[error("{0}: {1}")]
    Io(String, io::Error),
    /// The kernel or the user lacks something.
    #[error("{0}")]
    Lacking(String),
}

/// A machine of the run.
#[derive(Debug)]
struct Machine {
    vm: Vm,
    host: usize,
    image: PathBuf,
    /// The disk, when the harness serves it.
    disk: Option<FaultyDisk>,
    /// Whether the operator has ended it.
    is_ended: AtomicBool,
    /// Whether it could not be started.
    is_unborn: AtomicBool,
    /// What its guest said in starts that failed, and that nobody has heard yet.
    unheard: Mutex<String>,
}

impl Machine {
    fn unheard(&self) -> MutexGuard<'_, String> {
        self.unheard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything of a run.
#[derive(Debug)]
struct Run {
    scenario: Scenario,
    seed: u64,
    hosts: Vec<Host>,
    network: Option<Network>,
    machines: Vec<Machine>,
    engine: Arc<Engine>,
    timeline: Arc<Timeline>,
    errors: Mutex<Vec<String>>,
    /// Whether the run is over for whoever watches.
    is_over: AtomicBool,
}

impl Run {
    fn errors(&self) -> MutexGuard<'_, Vec<String>> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: impl Into<String>) {
        let what = what.into();
        self.timeline.note(format!("ERROR {what}"));
        self.errors().push(what);
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    fn machine(&self, name: Option<&str>) -> Option<&Machine> {
        match name {
            Some(name) => self.machines.iter().find(|m| m.vm.name == name),
            None => self.machines.first(),
        }
    }

    fn host_of(&self, machine: &Machine) -> Option<&Host> {
        self.hosts.get(machine.host)
    }

    /// Runs a command of the operator's, again when a fault came in between.
    fn command(&self, host: &Host, arguments: &[&str]) -> Done {
        self.insist(host, arguments, || {})
    }

    /// The same; `failed` is called after each attempt that failed.
    fn insist(&self, host: &Host, arguments: &[&str], failed: impl Fn()) -> Done {
        let until = Instant::now() + PATIENCE;
        let mut last = None;
        loop {
            let done = host.run(arguments, PATIENCE);
            if done.is_overdue {
                self.error(format!("`bulkhead {}` does not end", arguments.join(" ")));
                return done;
            }
            let excused = !self.engine.rules().injected().is_empty();
            let is_gone = done.errors.contains("is stopped");
            if done.is_good() || !excused || is_gone || Instant::now() > until || self.is_over() {
                return done;
            }
            failed();
            let why = done.errors.trim().to_owned();
            if last.as_ref() != Some(&why) {
                let command = arguments.join(" ");
                self.timeline
                    .note(format!("`bulkhead {command}` failed: {why}"));
                last = Some(why);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Runs a scenario once with a plan.
///
/// # Errors
/// When it could not be run at all; what goes wrong in it is in the outcome.
pub fn run(
    scenario: &Scenario,
    seed: u64,
    plan: &[Planned],
    setting: &Setting,
) -> Result<Outcome, RunError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(RunError::Lacking("faults need root".to_owned()));
    }
    let io = |what: &str| {
        let what = what.to_owned();
        |cause| RunError::Io(what, cause)
    };
    let directory = |place: Option<&str>| {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("bulkhead-fault-");
        place.map_or_else(|| builder.tempdir(), |place| builder.tempdir_in(place))
    };
    let scratch = directory(None).map_err(io("a directory"))?;
    let memory = directory(Some(IN_MEMORY)).map_err(io(IN_MEMORY))?;
    abort::directory(scratch.path());
    abort::directory(memory.path());
    let timeline = Arc::new(Timeline::default());
    let names = host_names(scenario);
    let scratches: Vec<PathBuf> = names.iter().map(|name| scratch.path().join(name)).collect();
    let runtimes = scratches.iter().map(|s| Host::runtime_of(s)).collect();
    let engine = Engine::new(plan, runtimes, Arc::clone(&timeline));
    engine.rules().set_hosts(names.clone());
    let calls = Engine::calls_of(plan);
    let network = network(scenario, &engine)?;
    let mut hosts = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let places = Places {
            scratch: scratches[index].clone(),
            programs: setting.programs.clone(),
        };
        let namespace = network.as_ref().and_then(|net| net.namespace(index));
        hosts.push(Host::new(index, name, &places, &calls, &engine, namespace)?);
    }
    let mut machines = Vec::new();
    for vm in &scenario.vm {
        let place = match vm.disk.as_ref().map(|disk| disk.on).unwrap_or_default() {
            DiskPlace::File => scratch.path(),
            _ => memory.path(),
        };
        machines.push(machine(vm, &names, place.join(&vm.name), &engine)?);
    }
    let run = Run {
        scenario: scenario.clone(),
        seed,
        hosts,
        network,
        machines,
        engine,
        timeline,
        errors: Mutex::default(),
        is_over: AtomicBool::new(false),
    };
    let outcome = run.go(plan, setting);
    drop(memory);
    drop(scratch);
    abort::forget();
    outcome
}

/// Connects the hosts that a scenario names, if it names any.
fn network(scenario: &Scenario, engine: &Arc<Engine>) -> Result<Option<Network>, NetworkError> {
    if scenario.host.is_empty() {
        return Ok(None);
    }
    let made = |namespace: &Namespace| abort::namespace(&namespace.path());
    let engine = Arc::clone(engine);
    let hit = move |fault| strike::frame_fault(&engine, fault);
    Network::connect(scenario.host.len(), made, hit).map(Some)
}

/// Makes a machine's disk.
fn machine(
    vm: &Vm,
    hosts: &[String],
    image: PathBuf,
    engine: &Arc<Engine>,
) -> Result<Machine, RunError> {
    let bytes = vm.disk.as_ref().map_or(Ok(DISK_BYTES), Disk::bytes);
    let bytes = bytes.unwrap_or(DISK_BYTES);
    let name = vm.host.as_deref();
    let host = hosts.iter().position(|host| Some(host.as_str()) == name);
    let content = Workload::from(vm.workload).disk(bytes)?;
    let mut machine = Machine {
        vm: vm.clone(),
        host: host.unwrap_or(0),
        image,
        disk: None,
        is_ended: AtomicBool::new(false),
        is_unborn: AtomicBool::new(false),
        unheard: Mutex::default(),
    };
    if vm
        .disk
        .as_ref()
        .is_some_and(|disk| disk.on == DiskPlace::Faulty)
    {
        let (engine, name) = (Arc::clone(engine), vm.name.clone());
        let tell = move |event| strike::disk_fault(&engine, &name, &event);
        let disk = FaultyDisk::mount_image(content, DiskRules::default(), tell)?;
        machine.image = disk.path();
        machine.image.parent().inspect(|place| abort::mount(place));
        machine.disk = Some(disk);
    } else {
        let made = std::fs::write(&machine.image, content);
        made.map_err(|cause| RunError::Io(machine.image.display().to_string(), cause))?;
    }
    Ok(machine)
}

impl Run {
    fn go(self, plan: &[Planned], setting: &Setting) -> Result<Outcome, RunError> {
        for host in &self.hosts {
            host.serve()?;
        }
        let keeper = Keeper::new(&self);
        let mut verified = Vec::new();
        std::thread::scope(|scope| {
            let keeping = scope.spawn(|| keeper.keep());
            verified = self.with_brokers(plan, setting, &keeper);
            self.is_over.store(true, Ordering::SeqCst);
            let _panicked = keeping.join();
        });
        self.take_down(&keeper);
        self.errors().extend(self.engine.wrongs());
        let rules = self.engine.rules();
        let (injected, missing) = (rules.injected(), rules.missing());
        drop(rules);
        Ok(Outcome {
            name: self.scenario.name.clone(),
            seed: self.seed,
            errors: self.errors().clone(),
            verified,
            injected,
            missing,
            entries: self.timeline.entries(),
        })
    }

    fn with_brokers(
        &self,
        plan: &[Planned],
        setting: &Setting,
        keeper: &Keeper<'_>,
    ) -> Vec<(String, u64)> {
        for (host, network) in self.networks() {
            let created = self.command(host, &["network", "create", network]);
            if !created.is_good() {
                let why = created.errors.trim();
                self.error(format!("network create {network}: {why}"));
            }
        }
        for machine in &self.machines {
            self.create(machine, setting);
        }
        let watched: Vec<Watched<'_>> = self
            .machines
            .iter()
            .map(|m| Watched::new(self, m))
            .collect();
        std::thread::scope(|scope| {
            for one in &watched {
                scope.spawn(|| one.watch());
            }
            let until = Instant::now() + GUESTS;
            while !watched.iter().all(Watched::works) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            for one in watched.iter().filter(|one| !one.works()) {
                self.error(format!("the guest of {} does not begin", one.name()));
            }
            let links = self.links();
            self.timeline.zero();
            self.timeline.note("the guests work");
            scope.spawn(|| self.operate());
            self.strike_all(plan, keeper);
            let patience = Duration::from_secs(self.scenario.seconds) + GUESTS;
            let until = Instant::now() + patience;
            while !watched.iter().all(Watched::is_done) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(10));
            }
            for one in watched.iter().filter(|one| !one.is_done()) {
                self.error(format!("the guest of {} does not end", one.name()));
            }
            for one in &watched {
                one.end();
            }
            for (link, traffic) in links {
                self.judge_link(link, traffic.end());
            }
        });
        self.engine.rules().end();
        self.engine.settle();
        for machine in &self.machines {
            self.tell_events(machine);
        }
        watched.into_iter().map(Watched::verdict).collect()
    }

    /// Starts the traffic between hosts.
    fn links(&self) -> Vec<(&LinkOf, Link)> {
        let mut started = Vec::new();
        for (link, number) in self.scenario.link.iter().zip(1..) {
            let index = |name: &str| self.hosts.iter().position(|host| host.name == name);
            let namespace = |name| self.network.as_ref()?.namespace(index(name)?);
            let (Some(from), Some(to)) = (namespace(&link.from), namespace(&link.to)) else {
                self.error(format!("{} → {}: no such hosts", link.from, link.to));
                continue;
            };
            match Link::start(&from, &to, self.seed.wrapping_add(number)) {
                Ok(traffic) => started.push((link, traffic)),
                Err(error) => self.error(format!("{} → {}: {error}", link.from, link.to)),
            }
        }
        started
    }

    fn judge_link(&self, link: &LinkOf, report: LinkReport) {
        let name = format!("{} → {}", link.from, link.to);
        self.timeline.note(format!(
            "{name}: {} records as they were sent; {} of {} datagrams, {} again, {} late, silence of {} ms at most",
            report.records,
            report.arrived,
            report.sent,
            report.again,
            report.late,
            report.silence.as_millis(),
        ));
        for error in report.errors {
            self.error(format!("{name}: {error}"));
        }
    }

    /// The virtual networks of the hosts, each once.
    fn networks(&self) -> impl Iterator<Item = (&Host, &str)> {
        let named = self.machines.iter().filter_map(|machine| {
            let network = machine.vm.network.as_deref()?;
            Some((machine.host, network))
        });
        let named: BTreeSet<_> = named.collect();
        let host = |(host, network)| Some((self.hosts.get(host)?, network));
        named.into_iter().filter_map(host)
    }

    /// Creates a machine and starts it.
    fn create(&self, machine: &Machine, setting: &Setting) {
        let Some(host) = self.host_of(machine) else {
            return;
        };
        let workload = Workload::from(machine.vm.workload);
        let server = self.scenario.server_of(&machine.vm);
        let server = server.zip(machine.vm.network.as_deref());
        let server = server.map(|(vm, network)| format!("{}.{network}.internal", vm.name));
        let work = workload.arguments(
            self.scenario.seconds,
            self.seed,
            &setting.guests,
            server.as_deref(),
        );
        let work = work.unwrap_or_else(|error| {
            self.error(error.to_string());
            Vec::new()
        });
        let work: Vec<String> = work
            .into_iter()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect();
        let (name, disk) = (
            machine.vm.name.as_str(),
            machine.image.display().to_string(),
        );
        let cpus = machine.vm.cpus.unwrap_or(1).to_string();
        // Nobody uses it, and its process is there to be hit.
        let folder = host.folder().display().to_string().replace(',', ",,");
        let folder = format!("{folder},readonly");
        let mut arguments = vec!["create", "--name", name, "--disk", &disk, "--cpus", &cpus];
        arguments.push("--vsock");
        arguments.extend(["--share", &folder]);
        let card = machine.vm.network.as_ref();
        let card = card.map(|network| format!("network={network}"));
        if let Some(card) = &card {
            arguments.extend(["--net", card]);
        }
        arguments.extend(work.iter().map(String::as_str));
        let created = self.command(host, &arguments);
        if !created.is_good() && !created.errors.contains("already") {
            self.error(format!("create {name}: {}", created.errors.trim()));
        }
        self.start(machine);
    }

    /// Starts a machine; a start that a fault made fail is tried again.
    fn start(&self, machine: &Machine) {
        let Some(host) = self.host_of(machine) else {
            return;
        };
        self.timeline.note(format!("start {}", machine.vm.name));
        let name = machine.vm.name.as_str();
        // The guest may have begun before its start was given up, and its next console begins anew.
        let histories = Mutex::new(BTreeMap::new());
        let histories = || histories.lock().unwrap_or_else(PoisonError::into_inner);
        let started = self.insist(host, &["start", name], || {
            histories().extend(host.serial_history(name));
        });
        // One that was given up by a broker that died went on until the next one came.
        let present = host.serial_history(name).map(|(inode, _)| inode);
        for (inode, history) in std::mem::take(&mut *histories()) {
            if Some(inode) != present {
                machine.unheard().push_str(&all_of(history));
            }
        }
        if !started.is_good() && !started.errors.contains("already") {
            let why = started.errors.trim().to_owned();
            self.error(format!("start {name}: {why}"));
            machine.is_unborn.store(true, Ordering::SeqCst);
        }
    }

    /// Puts the events of a machine's log on the time line.
    fn tell_events(&self, machine: &Machine) {
        let Some(host) = self.host_of(machine) else {
            return;
        };
        let log = host.run(&["logs", &machine.vm.name, "--json"], PATIENCE);
        for line in log.output.lines() {
            watch::tell_event(&self.timeline, &machine.vm.name, line);
        }
    }

    /// Whether no fault can cut the operator off from a machine's console.
    fn keeps_consoles(&self) -> bool {
        let of_devices = ["process.", "window.", "disk.", "call.blk", "call.rng"];
        let mut faults = self.engine.rules().points();
        let mut steps = self.scenario.step.iter();
        faults.all(|point| of_devices.iter().any(|head| point.starts_with(head)))
            && steps.all(|step| step.deed != Deed::RestartBroker)
    }

    /// Whether a machine may have ended before its guest was done.
    fn may_be_lost(&self, machine: &Machine) -> bool {
        let name = machine.vm.name.as_str();
        let deeds = self.scenario.step.iter().filter(|step| {
            let named = step.vm.as_deref();
            named == Some(name) || named.is_none() && self.machines[0].vm.name == name
        });
        let ends = |deed| matches!(deed, Deed::Stop | Deed::Kill | Deed::Reset);
        machine.vm.expect == Expect::Lost || deeds.into_iter().any(|step| ends(step.deed))
    }
}

/// Everything that a history holds.
fn all_of(history: File) -> String {
    let mut all = Vec::new();
    if let Ok(mut reader) = OutputReader::new(history) {
        let mut buffer = [0; 4096];
        while let Ok(got) = reader.read(&mut buffer)
            && got.bytes > 0
        {
            all.extend_from_slice(buffer.get(..got.bytes).unwrap_or_default());
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// A line of a guest's console that is worth a place on the time line: not each of the many that say how
/// far the work is.
fn is_telling(line: &str) -> bool {
    let record = line.strip_prefix("BH ").unwrap_or_default();
    let name = record.split(' ').next().unwrap_or_default();
    match name.rsplit_once('.') {
        Some((_, what)) => matches!(what, "begin" | "end"),
        None => !matches!(name, "" | "hello"),
    }
}

/// What there is to tell of a line: an exception may have come in the middle of another record, which has no end then.
fn whole_record(line: &str) -> &str {
    let exception = line.rfind("BH exception ");
    exception.and_then(|at| line.get(at..)).unwrap_or(line)
}

/// Puts what a guest says on the time line.
fn tell_guest(timeline: &Timeline, vm: &str, line: &str) {
    let line = whole_record(line);
    if is_telling(line) {
        timeline.tell(
            Part::Guest,
            format!("{vm}: {line}"),
            serde_json::Value::Null,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exception_is_told_wherever_it_has_come() {
        for line in [
            "BH exception vector=2 error=0x0",
            "BH blocks.done fiBH exception vector=2 error=0x0",
            "BBH exception vector=2 error=0x0",
        ] {
            assert_eq!(whole_record(line), "BH exception vector=2 error=0x0");
            assert!(is_telling(whole_record(line)));
        }
        let usual = "BH blocks.done first=3 sectors=8";
        assert_eq!(whole_record(usual), usual);
        assert!(!is_telling(usual));
    }
}
