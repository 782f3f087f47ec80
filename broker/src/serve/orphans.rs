//! Machines without a broker: every one in the runtime directory becomes this daemon's, whoever has
//! started it, and what removals have left half done is finished or undone.

use super::actor::Ask;
use super::host::{Host, random_id};
use super::view::View;
use crate::api::time::now_ms;
use crate::registry::{Desired, VmRecord};
use crate::vm::adopt::{self, Orphan};
use crate::vm::record::{Phase, Record, since_boot_ms};
use crate::vmfile;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::task::JoinSet;

/// How often it is looked for machines whose broker has gone meanwhile.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long others wait for machines that are being taken over.
const PATIENCE: Duration = Duration::from_secs(5);

impl Host {
    /// Takes over every machine that no broker owns. Returns their names; those that do not answer
    /// are waited for only a moment.
    pub(super) async fn gather(&self) -> BTreeSet<String> {
        let runtime = self.shared.places.runtime.clone();
        let found = tokio::task::spawn_blocking(move || {
            adopt::sweep(&runtime);
            adopt::orphans(&runtime)
        });
        let found = match found.await.unwrap_or_else(|e| Err(io::Error::other(e))) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "the runtime directory cannot be searched");
                return BTreeSet::new();
            }
        };
        let names = found.iter().map(|o| o.record.spec.name.clone()).collect();
        let mut settling = JoinSet::new();
        for orphan in found {
            let name = orphan.record.spec.name.clone();
            let Some(vm) = self.known_or_new(&orphan).await else {
                continue;
            };
            settling.spawn(async move {
                let orphan = Box::new(orphan);
                if let Err(error) = vm.ask(|reply| Ask::Found(orphan, reply)).await {
                    tracing::debug!(vm = name, %error, "gone meanwhile");
                    return;
                }
                let mut view = vm.view.clone();
                let settled = view.wait_for(|view: &View| !view.taking_over);
                // One that takes longer goes on by itself.
                let _settled = tokio::time::timeout(PATIENCE, settled).await;
            });
        }
        settling.join_all().await;
        names
    }

    /// The machine that was found, as the registry knows it from now on.
    async fn known_or_new(&self, orphan: &Orphan) -> Option<Arc<super::actor::Vm>> {
        let record = &orphan.record;
        let name = &record.spec.name;
        if let Some(vm) = self.known(name) {
            return Some(vm);
        }
        // A machine of that name may just be made or removed: it is found again in a moment.
        let _one_at_a_time = self.changing.try_lock().ok()?;
        if record.phase == Phase::Starting {
            // Nobody has a use for it: who started it is gone.
            match crate::vm::clear(&self.shared.places.runtime, name).await {
                Ok(()) => tracing::warn!(vm = name, "a start that was half done is undone"),
                Err(error) => tracing::error!(vm = name, %error, "half started, and stays"),
            }
            return None;
        }
        let new = match record_of(record) {
            Ok(new) => new,
            Err(error) => {
                tracing::error!(vm = name, %error, "random numbers");
                return None;
            }
        };
        let kept = new.clone();
        let added = self.shared.registry(move |registry| registry.add(&kept));
        if let Err(error) = added.await {
            tracing::warn!(vm = name, %error, "taken over without a record in the registry");
        }
        Some(self.know(new))
    }
}

/// Looks for machines whose broker has gone, for as long as the host is served.
pub(super) async fn keep_looking(host: Weak<Host>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(host) = host.upgrade() else { return };
        host.gather().await;
    }
}

/// What the registry is to remember of a machine that it does not know.
fn record_of(found: &Record) -> io::Result<VmRecord> {
    let spec = &found.spec;
    let vm_file = vmfile::print(spec).unwrap_or_else(|error| {
        tracing::warn!(vm = spec.name, %error, "it cannot be started again");
        String::new()
    });
    let age_ms = since_boot_ms().saturating_sub(found.began_ms);
    Ok(VmRecord {
        name: spec.name.clone(),
        id: random_id()?,
        vm_file,
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        autostart: spec.autostart,
        created_at_ms: now_ms().saturating_sub(age_ms),
        desired: Desired::Running,
        start_with_host: false,
        last: None,
    })
}

/// Where the state of machine `id` waits to be removed.
pub(super) fn condemned(state: &Path, name: &str, id: &str) -> PathBuf {
    state.join(CONDEMNED).join(format!("{name}.{id}"))
}

const CONDEMNED: &str = "removed";

/// Finishes removals that a daemon had begun: state whose machine is in the registry no more goes, and
/// that of one that is comes back.
pub(super) fn finish_removals(state: &Path, records: &[VmRecord]) {
    for entry in fs::read_dir(state.join(CONDEMNED))
        .into_iter()
        .flatten()
        .flatten()
    {
        let from = entry.path();
        let owner = records
            .iter()
            .find(|record| condemned(state, &record.name, &record.id) == from);
        let done = match owner {
            None => fs::remove_dir_all(&from),
            Some(record) => fs::rename(&from, state.join("vms").join(&record.name)),
        };
        if let Err(error) = done {
            tracing::warn!(path = ?from, %error, "a removal stays half done");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::session::RunOptions;
    use crate::vm::spec::{KernelSource, VmSpec};

    fn found(name: &str) -> Record {
        let options = RunOptions::for_test("/r".as_ref());
        Record::new(
            &VmSpec::new(name, KernelSource::File("/k".into())),
            &options,
        )
        .unwrap()
    }

    #[test]
    fn machine_of_run_is_remembered_with_its_vm_file() {
        let record = record_of(&found("web")).unwrap();
        assert_eq!(
            (record.name.as_str(), record.desired),
            ("web", Desired::Running)
        );
        assert!(
            record.vm_file.contains("kernel = \"/k\""),
            "{}",
            record.vm_file
        );
    }

    #[test]
    fn removal_is_finished_or_undone_by_what_the_registry_says() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        fs::create_dir(state.join("vms")).unwrap();
        let stays = record_of(&found("stays")).unwrap();
        for (name, id) in [("stays", stays.id.as_str()), ("goes", "17")] {
            let place = condemned(state, name, id);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join("events.jsonl"), "x").unwrap();
        }
        finish_removals(state, &[stays]);
        assert!(state.join("vms/stays/events.jsonl").exists());
        assert!(!state.join("vms/goes").exists());
        assert_eq!(fs::read_dir(state.join(CONDEMNED)).unwrap().count(), 0);
    }
}
