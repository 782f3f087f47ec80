//! Starts the process of a network's switch, and ends that of a daemon before this one.
//!
//! A switch lives on when its daemon dies. The next daemon does not go on with it: it hears from it which addresses
//! are leased, ends it and starts another, since the ports that it has are known to nobody any more.

use super::book::KEPT_MAX;
use crate::launch::cgroup::{Group, GroupLimits, Place, Reach};
use crate::launch::users::UserRange;
use crate::launch::{Launched, Launcher, cores};
use crate::serve::Places;
use crate::vm::adopt::meet;
use crate::vm::home::socket_name;
use crate::vm::record::{ProcessRecord, start_time};
use crate::vm::spec::HostShare;
use bulkhead_ipc::adoption::bind_in;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::birth::KindConfig;
use bulkhead_ipc::protocol::switch::{FromSwitch, LEASES_MAX, LeaseTerms, SwitchConfig, ToSwitch};
use bulkhead_policies::cache::Compiled;
use bulkhead_policies::plan::Policy;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Directory of networks in the runtime directory.
const NETWORKS: &str = "networks";
/// The record of a switch in its network's directory.
const RECORD: &str = "switch";
const NEW_RECORD: &str = "switch.new";
/// How long an old switch may take to tell what it knows.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Most messages that are heard of it.
const LAST_WORDS_MAX: usize = 4096;
/// How long the kernel may take to end a process.
const DEATH: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(1);

/// Where the switch of `network` has its record and its socket.
pub(super) fn directory_of(runtime: &Path, network: &str) -> PathBuf {
    runtime.join(NETWORKS).join(network)
}

/// What is left of the switch of a daemon before this one.
#[derive(Debug, Default)]
pub(super) struct Predecessor {
    /// Its generation; 0 when there was none.
    pub(super) generation: u32,
    /// What it had leased.
    pub(super) leases: Vec<LeaseTerms>,
}

fn record_in(directory: &Path) -> Option<ProcessRecord> {
    let text = fs::read(directory.join(RECORD)).ok()?;
    serde_json::from_slice(&text).ok()
}

impl Predecessor {
    /// Hears and ends the switch that is on record in `directory`. Blocks for some seconds at most.
    pub(super) fn end(directory: &Path) -> Self {
        let Some(record) = record_in(directory) else {
            return Self::default();
        };
        let mut leases = Vec::new();
        let met = File::open(directory).map(|directory| meet(directory.as_fd(), &record));
        match met {
            Ok(Ok(met)) => leases = last_words(&met.launched.control),
            Ok(Err(error)) => {
                tracing::info!(proc = %record.id, %error, "the old switch says nothing")
            }
            Err(error) => tracing::warn!(%error, "the old switch cannot be found"),
        }
        record.kill();
        let until = Instant::now() + DEATH;
        while record.is_alive() && Instant::now() < until {
            std::thread::sleep(POLL);
        }
        Self {
            generation: record.id.generation,
            leases,
        }
    }
}

/// The leases that a switch tells of, in the order in which it does.
fn last_words(control: &Channel) -> Vec<LeaseTerms> {
    let mut leases = Vec::new();
    if control.send(&ToSwitch::Report, &[]).is_err() {
        return leases;
    }
    let until = Instant::now() + LAST_WORDS;
    for _ in 0..LAST_WORDS_MAX {
        let left = until.saturating_duration_since(Instant::now());
        // It may have more to say than there is to hear.
        if left.is_zero() || leases.len() >= KEPT_MAX {
            break;
        }
        match control.recv_within::<FromSwitch>(left) {
            Ok((FromSwitch::Leased(told), _)) if told.len() <= LEASES_MAX => leases.extend(told),
            Ok((FromSwitch::Ports(_) | FromSwitch::Leased(_), _)) => break,
            // What it had told the daemon before, which has not heard it.
            Ok(_) | Err(ChannelError::Malformed(_) | ChannelError::TooLarge { .. }) => {}
            Err(_) => break,
        }
    }
    leases
}

/// Ends every switch that is on record below a runtime directory.
pub fn end_switches(runtime: &Path) {
    let entries = fs::read_dir(runtime.join(NETWORKS)).into_iter().flatten();
    for entry in entries.flatten() {
        if let Some(record) = record_in(&entry.path()) {
            record.kill();
        }
    }
}

/// Everything that the start of a switch needs.
#[derive(Debug)]
pub(super) struct Nest {
    network: String,
    directory: PathBuf,
    launcher: Launcher,
    compiled: Compiled,
}

impl Nest {
    /// For `network`.
    pub(super) fn new(places: &Places, users: UserRange, network: &str) -> Result<Self, String> {
        let cache = places.state.join("cache");
        let looser = places.allow_looser_policy;
        let compiled = Compiled::cached(places.policies.as_deref(), looser, &cache);
        let mut launcher =
            Launcher::new(&places.binaries, users).map_err(|error| error.to_string())?;
        let found = launcher.find_program(ProcKind::Switch);
        found.map_err(|error| error.to_string())?;
        Ok(Self {
            network: network.to_owned(),
            directory: directory_of(&places.runtime, network),
            launcher,
            compiled: compiled.map_err(|error| error.to_string())?,
        })
    }

    /// Its policy.
    pub(super) fn policy(&self) -> Option<&Policy> {
        self.compiled
            .get(ProcKind::Switch)
            .map(|(policy, _)| policy)
    }

    /// Starts a switch. It is on record before it is told anything.
    pub(super) fn launch(&mut self, id: ProcId, config: SwitchConfig) -> Result<Launched, String> {
        let said = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
        let Some((policy, filters)) = self.compiled.get(ProcKind::Switch) else {
            return Err("there is no policy for a switch".to_owned());
        };
        crate::serve::make_private(&self.directory).map_err(said("its directory"))?;
        let directory = File::open(&self.directory).map_err(said("its directory"))?;
        // Of generations that are dead, which are all.
        for old in sockets(&self.directory) {
            let _gone_or_not = fs::remove_file(old);
        }
        let adoption = bind_in(directory.as_fd(), &socket_name(id));
        let adoption = adoption.map_err(|errno| format!("its adoption socket: {errno}"))?;
        let launched = self.launcher.launch(id, policy, &[], &adoption);
        let launched = launched.map_err(|error| error.to_string())?;
        if let Err(errno) = cores::create(launched.pid) {
            tracing::warn!(proc = %id, %errno, "no core-scheduling cookie");
        }
        let born = self.bear(&launched, id, config, filters);
        if born.is_err() {
            // Nobody would ever know of its end.
            let _already_dead = launched.kill();
        }
        born.map(|()| launched)
    }

    fn bear(
        &self,
        launched: &Launched,
        id: ProcId,
        config: SwitchConfig,
        filters: &bulkhead_policies::Filters,
    ) -> Result<(), String> {
        let token = crate::random::bytes().map_err(|error| format!("random numbers: {error}"))?;
        let record = ProcessRecord {
            id,
            name: self.network.clone(),
            slot: None,
            token,
            pid: launched.pid,
            start_time: start_time(launched.pid).unwrap_or(0),
            program: self.launcher.program(id).unwrap_or_default(),
            version: None,
            groups: Vec::new(),
            users: launched.users,
        };
        self.note(&record)
            .map_err(|error| format!("its record: {error}"))?;
        let config = KindConfig::Switch(config);
        let birth = launched.birth(self.network.clone(), token, filters, config);
        launched.bear(&birth).map_err(|error| error.to_string())
    }

    fn note(&self, record: &ProcessRecord) -> io::Result<()> {
        let new = self.directory.join(NEW_RECORD);
        fs::write(&new, serde_json::to_vec(record)?)?;
        fs::rename(new, self.directory.join(RECORD))
    }

    /// Puts a switch into a control group with the limits of its policy.
    pub(super) fn limit(&self, launched: &Launched) -> io::Result<Option<Group>> {
        let Some(policy) = self.policy() else {
            return Ok(None);
        };
        let limits = GroupLimits {
            memory_bytes: policy.limits.memory_bytes,
            tasks: policy.limits.tasks.into(),
            share: HostShare {
                cpu_percent: policy.limits.cpu_percent,
                ..HostShare::default()
            },
        };
        let name = format!("network-{}-{}-{}", self.network, launched.id, launched.pid);
        let place = Place::find(Reach::Outside);
        place.put(&name, launched, limits, &[]).map(Some)
    }

    /// The network is idle: nothing of its switch is needed any more.
    pub(super) fn forget(directory: &Path) {
        for gone in sockets(directory).chain([directory.join(RECORD)]) {
            let _gone_or_not = fs::remove_file(gone);
        }
    }
}

fn sockets(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "sock")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_record_is_no_predecessor() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Predecessor::end(dir.path()).generation, 0);
        fs::write(dir.path().join(RECORD), b"{\"id\":").unwrap();
        assert_eq!(Predecessor::end(dir.path()).generation, 0);
        // A process that is no more: its number is not used again, and nobody else is killed.
        let gone = ProcessRecord {
            id: ProcId {
                kind: ProcKind::Switch,
                index: 0,
                generation: 7,
            },
            name: "lab".into(),
            slot: None,
            token: [1; 32],
            pid: i32::try_from(std::process::id()).unwrap(),
            start_time: 1,
            program: (0, 0),
            version: None,
            groups: vec![],
            users: None,
        };
        fs::write(dir.path().join(RECORD), serde_json::to_vec(&gone).unwrap()).unwrap();
        let predecessor = Predecessor::end(dir.path());
        assert_eq!((predecessor.generation, predecessor.leases.len()), (7, 0));
        Nest::forget(dir.path());
        assert_eq!(Predecessor::end(dir.path()).generation, 0);
    }

    #[test]
    fn old_switch_is_heard_to_the_end_of_what_it_knows() {
        let lease = |n| LeaseTerms {
            mac: [2, 0, 0, 0, 0, n],
            address: [10, 0, 0, n].into(),
            left_s: 5,
        };
        let (near, far) = Channel::pair().unwrap();
        for message in [
            FromSwitch::Pong(1),
            FromSwitch::Leased(vec![lease(1)]),
            FromSwitch::Leased(vec![lease(2), lease(3)]),
            FromSwitch::Ports(vec![]),
            FromSwitch::Leased(vec![lease(9)]),
        ] {
            far.send(&message, &[]).unwrap();
        }
        assert_eq!(last_words(&near), [lease(1), lease(2), lease(3)]);
        assert_eq!(
            far.try_recv::<ToSwitch>().unwrap().unwrap().0,
            ToSwitch::Report
        );
        let begun = Instant::now();
        assert_eq!(last_words(&near), [lease(9)]);
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
