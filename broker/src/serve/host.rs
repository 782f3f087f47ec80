//! Every machine of this host, by name.

use super::actor::{Vm, registry_error};
use super::life::spec_of;
use super::network::Networks;
use super::orphans::{finish_removals, keep_looking};
use super::{ServeError, Shared};
use crate::api::time::now_ms;
use crate::api::{ApiError, Changed, Code, Create};
use crate::launch::cgroup::{Place, Reach};
use crate::registry::{Desired, Ended, Registry, RegistryError, VmRecord};
use crate::vm::home::path_of;
use crate::vm::session::Ending;
use crate::vmfile::{self, HostMemory, Surroundings};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The host.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) shared: Arc<Shared>,
    /// Its virtual networks.
    pub(super) networks: Networks,
    vms: Mutex<BTreeMap<String, Arc<Vm>>>,
    /// Machines are made and removed one after the other.
    pub(super) changing: tokio::sync::Mutex<()>,
    /// Whether the host shuts down, so that nothing is started any more.
    pub(super) going_down: AtomicBool,
    /// Consoles that may be attached.
    pub(super) consoles: Arc<tokio::sync::Semaphore>,
    /// Connections to guests that may be passed through.
    pub(super) sockets: Arc<tokio::sync::Semaphore>,
}

impl Host {
    /// Knows every machine of the registry, and starts those that are to run.
    pub(super) async fn load(shared: Arc<Shared>) -> Result<Arc<Self>, ServeError> {
        let fresh = is_fresh_boot(&shared.places.runtime);
        let runtime = shared.places.runtime.clone();
        let records = shared.registry(move |registry| match fresh {
            true => ended_with_host(registry, &runtime),
            false => registry.all(),
        });
        let records = records.await?;
        let (state, kept) = (shared.places.state.clone(), records.clone());
        let removals = tokio::task::spawn_blocking(move || finish_removals(&state, &kept));
        // A removal that stays half done is in the log, and nobody's obstacle.
        let _logged = removals.await;
        let networks = Networks::load(Arc::clone(&shared)).await?;
        let host = Arc::new(Self {
            networks,
            vms: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            going_down: AtomicBool::new(false),
            consoles: Arc::new(tokio::sync::Semaphore::new(shared.config.limits.consoles)),
            sockets: Arc::new(tokio::sync::Semaphore::new(shared.config.limits.sockets)),
            shared,
        });
        for record in records.clone() {
            host.know(record);
        }
        let found = host.gather().await;
        Place::find(Reach::Outside).sweep();
        for record in records {
            // One that was found runs, or its actor knows what is to become of it.
            if found.contains(&record.name) || !starts_now(&record, fresh) {
                continue;
            }
            let Some(vm) = host.known(&record.name) else {
                continue;
            };
            tokio::spawn(async move {
                if let Err(error) = vm.start().await {
                    let name = &vm.view.borrow().record.name;
                    tracing::error!(vm = %name, %error, "not started");
                }
            });
        }
        remember_boot(&host.shared.places.runtime);
        tokio::spawn(keep_looking(Arc::downgrade(&host)));
        Ok(host)
    }

    /// Begins to know a machine.
    pub(super) fn know(&self, record: VmRecord) -> Arc<Vm> {
        let name = record.name.clone();
        let vm = Arc::new(Vm::new(Arc::clone(&self.shared), record));
        self.vms().insert(name, Arc::clone(&vm));
        vm
    }

    fn vms(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every machine, by name.
    pub(super) fn all(&self) -> Vec<Arc<Vm>> {
        self.vms().values().cloned().collect()
    }

    /// The machine of that name, if it is known already.
    pub(super) fn known(&self, name: &str) -> Option<Arc<Vm>> {
        self.vms().get(name).cloned()
    }

    /// The machine of that name; it may just have lost its broker.
    pub(super) async fn vm(&self, name: &str) -> Result<Arc<Vm>, ApiError> {
        if let Some(vm) = self.known(name) {
            return Ok(vm);
        }
        self.gather().await;
        self.known(name).ok_or_else(|| ApiError::no_machine(name))
    }

    /// Refuses to start anything while the host goes down.
    pub(super) fn check_up(&self) -> Result<(), ApiError> {
        if self.going_down.load(Ordering::Relaxed) {
            let line = "the host is shutting down: nothing is started any more";
            return Err(ApiError::new(Code::Unavailable, line));
        }
        Ok(())
    }

    /// Adds a machine; one that is there already and is the same is left alone.
    pub(super) async fn create(&self, wish: Create) -> Result<Changed, ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        let record = super::blocking(move || record_of(&wish)).await?;
        let name = record.name.clone();
        if let Some(vm) = self.known(&name) {
            let view = vm.view.borrow();
            if view.record.vm_file == record.vm_file {
                return Ok(view.changed(false));
            }
            let line = format!("there is a machine {name} already, and it is another one");
            return Err(ApiError::new(Code::Conflict, line));
        }
        let limit = self.shared.config.limits.machines;
        if self.vms().len() >= limit {
            let line = format!("there are {limit} machines already (limits.machines)");
            return Err(ApiError::new(Code::Limit, line));
        }
        let new = record.clone();
        let added = self
            .shared
            .registry(move |registry| registry.add(&new))
            .await;
        added.map_err(registry_error)?;
        let vm = self.know(record);
        let changed = vm.view.borrow().changed(true);
        Ok(changed)
    }

    /// Removes a machine.
    pub(super) async fn remove(&self, name: &str, force: bool) -> Result<Changed, ApiError> {
        let vm = self.vm(name).await?;
        let _one_at_a_time = self.changing.lock().await;
        let changed = vm.remove(force).await?;
        self.vms().remove(name);
        Ok(changed)
    }
}

/// Every record. Machines that ran when the host went down have ended with it.
fn ended_with_host(registry: &Registry, runtime: &Path) -> Result<Vec<VmRecord>, RegistryError> {
    let mut records = registry.all()?;
    let ran = records.iter_mut().filter(|r| r.desired == Desired::Running);
    for record in ran.filter(|r| !path_of(runtime, &r.name).exists()) {
        let lost = Ending::Lost {
            reason: "the host went down".to_owned(),
        };
        let (word, message) = lost.describe();
        let ended = Ended {
            ending: word.to_owned(),
            exit_code: lost.exit_code(),
            message,
            at_ms: now_ms(),
        };
        *record = registry.edit(&record.name, |record| {
            record.desired = Desired::Stopped;
            record.last = Some(ended);
        })?;
    }
    Ok(records)
}

/// Whether a machine that has no processes is to be started as the daemon starts: with the host's
/// first daemon those that start with the host, later those whose start was not carried out.
fn starts_now(record: &VmRecord, fresh_boot: bool) -> bool {
    match fresh_boot {
        true => record.autostart || record.start_with_host,
        false => record.desired == Desired::Running,
    }
}

/// The host empties the runtime directory when it starts, so a mark that is not there says that
/// this is the first daemon since.
const BOOT_MARK: &str = "autostarted";

fn is_fresh_boot(runtime: &Path) -> bool {
    !runtime.join(BOOT_MARK).exists()
}

fn remember_boot(runtime: &Path) {
    if let Err(error) = File::create(runtime.join(BOOT_MARK)) {
        tracing::warn!(%error, "machines that start with the host start again with the next daemon");
    }
}

/// The record of a machine to be: its VM file is parsed, checked against this host, and written out
/// in full.
fn record_of(wish: &Create) -> Result<VmRecord, ApiError> {
    let wrong = |problems: vmfile::Problems| {
        let lines: Vec<_> = problems.0.iter().map(ToString::to_string).collect();
        ApiError::new(Code::Configuration, lines.join("\n"))
    };
    let directory = Path::new(&wish.directory);
    if !directory.is_absolute() {
        let line = "expected an absolute directory";
        return Err(ApiError::new(Code::BadRequest, line));
    }
    let file = crate::escape::excerpt(&wish.file_name, 256);
    let draft = vmfile::parse(&file, directory, &wish.vm_file).map_err(wrong)?;
    let around = Surroundings {
        name: wish.default_name.clone(),
        kernel: None,
        memory: HostMemory::read(Path::new("/")),
        // What is available is looked at when it starts.
        overcommit: true,
    };
    let spec = vmfile::check(draft, &around).map_err(wrong)?;
    let vm_file = vmfile::print(&spec)
        .map_err(|error| ApiError::new(Code::Configuration, error.to_string()))?;
    let record = VmRecord {
        name: spec.name.clone(),
        id: random_id().map_err(|e| ApiError::new(Code::Host, format!("random numbers: {e}")))?,
        vm_file,
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        autostart: spec.autostart,
        created_at_ms: now_ms(),
        desired: Desired::Stopped,
        start_with_host: false,
        last: None,
    };
    // What is kept must mean the same when it is read back.
    let again = spec_of(&record, true)?;
    if again != spec {
        let line = "this machine cannot be written as a VM file";
        return Err(ApiError::new(Code::Internal, line));
    }
    Ok(record)
}

/// 128 random bits in hexadecimal digits.
pub(super) fn random_id() -> io::Result<String> {
    let number = u128::from_be_bytes(crate::random::bytes()?);
    Ok(format!("{number:032x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_starts_with_the_daemon_depends_on_the_host_having_started() {
        let record = |autostart, start_with_host, desired| VmRecord {
            name: "web".into(),
            id: String::new(),
            vm_file: String::new(),
            vcpus: 1,
            memory_bytes: 0,
            autostart,
            created_at_ms: 0,
            desired,
            start_with_host,
            last: None,
        };
        let (run, stop) = (Desired::Running, Desired::Stopped);
        assert!(starts_now(&record(true, false, stop), true));
        assert!(starts_now(&record(false, true, stop), true));
        assert!(!starts_now(&record(false, false, run), true));
        assert!(!starts_now(&record(true, true, stop), false));
        assert!(starts_now(&record(false, false, run), false));
    }

    #[test]
    fn host_that_has_started_is_noticed_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_fresh_boot(dir.path()));
        remember_boot(dir.path());
        assert!(!is_fresh_boot(dir.path()));
    }

    #[test]
    fn record_keeps_the_machine_in_full_with_absolute_paths() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("vmlinuz"), [1; 64]).unwrap();
        let wish = |text: &str| Create {
            vm_file: text.into(),
            file_name: "web.toml".into(),
            directory: dir.path().to_str().unwrap().into(),
            default_name: "web".into(),
        };
        let record = record_of(&wish("autostart = true\n[boot]\nkernel = \"vmlinuz\"\n")).unwrap();
        let path = dir.path().join("vmlinuz");
        assert!(record.vm_file.contains(path.to_str().unwrap()));
        assert_eq!((record.name.as_str(), record.autostart), ("web", true));
        assert_eq!(record.id.len(), 32);
        let error = record_of(&wish("nonsense = 1\n")).unwrap_err();
        assert_eq!(error.code, Code::Configuration);
        assert!(error.message.contains("web.toml:1:1"), "{error}");
    }
}
