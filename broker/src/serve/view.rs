//! What is known of a machine at a moment: written by its actor alone, read by everybody.

use super::devices::Known;
use crate::api::time::rfc3339;
use crate::api::{
    ApiError, Changed, Degraded, Denial, Details, LastRun, Process, SCHEMA_VERSION, State, Summary,
    Vsock,
};
use crate::registry::{Ended, VmRecord};
use crate::vm::spec::VsockSpec;
use crate::vmfile;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

/// One machine.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// What the registry says.
    pub(super) record: VmRecord,
    pub(super) state: State,
    /// Counts the runs since the daemon began to know the machine.
    pub(super) run: u64,
    /// When the present run began, in milliseconds since 1970.
    pub(super) started_at_ms: Option<u64>,
    pub(super) processes: Vec<Process>,
    pub(super) devices: Known,
    pub(super) degraded: Vec<Degraded>,
    /// Disks for which the host has no room.
    pub(super) no_room: Vec<String>,
    /// Restarts of the whole machine within the run.
    pub(super) restarts: u32,
    /// The latest denials of the present run or the last.
    pub(super) denials: VecDeque<Denial>,
    /// Why the last start failed.
    pub(super) failure: Option<ApiError>,
    /// Whether it was found without a broker and is still being taken over.
    pub(super) taking_over: bool,
    /// Where its consoles' rings are, when that is not its own place among the daemon's state.
    pub(super) rings: Option<PathBuf>,
    /// Whether the machine was removed.
    pub(super) removed: bool,
}

/// Most denials that are kept.
const DENIALS_MAX: usize = 16;

/// How a run ended, as the API tells it.
pub(super) fn last_run(ended: &Ended) -> LastRun {
    LastRun {
        ending: ended.ending.clone(),
        exit_code: ended.exit_code,
        message: ended.message.clone(),
        ended_at: rfc3339(ended.at_ms),
    }
}

impl View {
    /// Of a machine that does not run.
    pub(super) fn new(record: VmRecord) -> Self {
        Self {
            record,
            state: State::Stopped,
            run: 0,
            started_at_ms: None,
            processes: Vec::new(),
            devices: Known::default(),
            degraded: Vec::new(),
            no_room: Vec::new(),
            restarts: 0,
            denials: VecDeque::new(),
            failure: None,
            taking_over: false,
            rings: None,
            removed: false,
        }
    }

    pub(super) fn summary(&self) -> Summary {
        let record = &self.record;
        Summary {
            schema_version: SCHEMA_VERSION,
            name: record.name.clone(),
            id: record.id.clone(),
            state: self.state,
            desired: record.desired,
            autostart: record.autostart,
            vcpus: record.vcpus,
            memory_bytes: record.memory_bytes,
            created_at: rfc3339(record.created_at_ms),
            started_at: self.started_at_ms.map(rfc3339),
            last_run: record.last.as_ref().map(last_run),
            degraded: self.degraded.clone(),
            no_room: self.no_room.clone(),
        }
    }

    /// `runtime` is where machines run.
    pub(super) fn details(&self, runtime: &Path) -> Details {
        Details {
            summary: self.summary(),
            vm_file: self.record.vm_file.clone(),
            vsock: self.vsock(runtime),
            processes: self.processes.clone(),
            restarts: self.restarts,
            denials: self.denials.iter().cloned().collect(),
        }
    }

    fn vsock(&self, runtime: &Path) -> Option<Vsock> {
        // What is kept has absolute paths and was checked when the machine was created.
        let draft = vmfile::parse("", Path::new("/"), &self.record.vm_file).ok()?;
        let draft = draft.vsock?;
        let spec = VsockSpec {
            cid: draft.cid.map_or(VsockSpec::default().cid, |cid| cid.value),
            path: draft.path.map(|path| path.value),
        };
        let path = spec.socket(runtime, &self.record.name);
        Some(Vsock {
            cid: spec.cid,
            path: path.display().to_string(),
        })
    }

    /// Keeps a denial, in the place of the oldest if there are many.
    pub(super) fn deny(&mut self, denial: Denial) {
        while self.denials.len() >= DENIALS_MAX {
            self.denials.pop_front();
        }
        self.denials.push_back(denial);
    }

    pub(super) fn changed(&self, changed: bool) -> Changed {
        Changed {
            schema_version: SCHEMA_VERSION,
            name: self.record.name.clone(),
            changed,
            state: (!self.removed).then_some(self.state),
        }
    }
}
