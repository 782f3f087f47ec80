//! Machines whose broker is gone: finding them, and taking them over.
//!
//! Nothing in a runtime directory is believed but what the kernel confirms: who owns a machine is who has the
//! lock, and a process is who has the pid *and* the start time of the record.

use super::home::{MACHINES, owner_of};
use super::record::{Record, RecordError};
use bulkhead_ipc::ident::ProcKind;
use std::fs;
use std::io;
use std::path::Path;

/// Most machines that one runtime directory is searched for.
const MACHINES_MAX: usize = 4096;

/// A machine that no broker owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// What its last broker has left on record.
    pub record: Record,
    /// Whether its vCPU process is alive, and so its guest.
    pub is_alive: bool,
}

impl Orphan {
    /// The processes of it that are alive.
    #[must_use]
    pub fn alive(&self) -> Vec<i32> {
        let processes = self.record.processes.iter();
        let alive = processes.filter(|process| process.is_alive());
        alive.map(|process| process.pid).collect()
    }
}

/// The machines below `runtime` that no broker owns now, by name. Those whose record cannot be
/// believed are named in the log. Takes no lock, so that a broker may take one over at any time.
///
/// # Errors
/// When the directory cannot be read; one that is not there holds none.
pub fn orphans(runtime: &Path) -> io::Result<Vec<Orphan>> {
    let entries = match fs::read_dir(runtime.join(MACHINES)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries.take(MACHINES_MAX) {
        let home = entry?.path();
        if owner_of(&home).is_some() {
            continue;
        }
        match Record::read(&home) {
            Ok(record) => {
                let mut processes = record.processes.iter();
                let vcpu = processes.find(|process| process.id.kind == ProcKind::Vcpu);
                let is_alive = vcpu.is_some_and(|vcpu| vcpu.is_alive());
                found.push(Orphan { record, is_alive });
            }
            // Nothing can be alive.
            Err(RecordError::Missing | RecordError::OtherBoot) => {}
            Err(error) => tracing::warn!(?home, %error, "a machine's record is not believed"),
        }
    }
    found.sort_by(|a, b| a.record.spec.name.cmp(&b.record.spec.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::keeper::{BeginError, Keeper};
    use super::super::record::{ProcessRecord, start_time};
    use super::super::session::RunOptions;
    use super::super::spec::{KernelSource, VmSpec};
    use super::*;
    use bulkhead_ipc::ident::ProcId;

    fn options(runtime: &Path) -> RunOptions {
        RunOptions {
            binaries: "/b".into(),
            policies: None,
            allow_looser_policy: false,
            cache: None,
            state: "/s".into(),
            runtime: runtime.into(),
            core: None,
            reboot: true,
        }
    }

    fn spec(name: &str) -> VmSpec {
        VmSpec::new(name, KernelSource::File("k".into()))
    }

    /// This test as a machine's vCPU process.
    fn me() -> ProcessRecord {
        let pid = i32::try_from(std::process::id()).unwrap();
        ProcessRecord {
            id: ProcId {
                kind: ProcKind::Vcpu,
                index: 0,
                generation: 1,
            },
            name: "vcpu".into(),
            slot: None,
            token: [1; 32],
            pid,
            start_time: start_time(pid).unwrap(),
            program: (0, 0),
            groups: vec![],
        }
    }

    #[test]
    fn machine_is_an_orphan_when_its_owner_is_gone_and_not_before() {
        let runtime = tempfile::tempdir().unwrap();
        assert_eq!(orphans(runtime.path()).unwrap(), []);
        let options = options(runtime.path());
        let mut keeper = Keeper::begin(&spec("web"), &options).unwrap();
        keeper.put(me()).unwrap();
        assert_eq!(orphans(runtime.path()).unwrap(), []);
        // As when the broker is killed: the kernel gives the lock up, everything else stays.
        drop(keeper);
        let found = orphans(runtime.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].is_alive);
        assert_eq!(
            found[0].alive(),
            [i32::try_from(std::process::id()).unwrap()]
        );
        let again = Keeper::begin(&spec("web"), &options).unwrap_err();
        assert!(matches!(again, BeginError::Orphaned { .. }), "{again}");
        assert!(again.to_string().contains("bulkhead kill web"), "{again}");
        Keeper::begin(&spec("other"), &options).unwrap().close();
    }

    #[test]
    fn name_of_a_machine_whose_processes_are_dead_is_free() {
        let runtime = tempfile::tempdir().unwrap();
        let options = options(runtime.path());
        let mut keeper = Keeper::begin(&spec("web"), &options).unwrap();
        keeper
            .put(ProcessRecord {
                start_time: 1,
                ..me()
            })
            .unwrap();
        drop(keeper);
        assert!(!orphans(runtime.path()).unwrap()[0].is_alive);
        let keeper = Keeper::begin(&spec("web"), &options).unwrap();
        assert!(keeper.record().processes.is_empty());
        keeper.close();
        assert_eq!(orphans(runtime.path()).unwrap(), []);
    }
}
