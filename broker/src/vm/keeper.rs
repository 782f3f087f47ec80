//! The owner's hand on a machine: its runtime directory with the lock, and the record that is kept
//! there. Every change of the record is a change of the file.

use super::home::{Home, HomeError};
use super::record::{HelperRecord, Phase, ProcessRecord, Record, RecordError};
use super::session::RunOptions;
use super::spec::VmSpec;
use super::vsock;
use crate::escape::escaped;
use bulkhead_ipc::ident::ProcId;
use std::path::Path;

/// A machine that this broker owns, and what a later one will read of it.
#[derive(Debug)]
pub struct Keeper {
    home: Home,
    record: Record,
}

/// Why a machine cannot be begun.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// It cannot be owned.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// Its processes run, and their broker is gone.
    #[error(
        "a machine named {name} is running without a broker, with process {pid}: \
         bulkhead serve takes it over, and bulkhead kill {name} ends it then"
    )]
    Orphaned {
        /// Its name.
        name: String,
        /// One of its processes, its vCPU process if that is alive.
        pid: i32,
    },
    /// What is on record cannot be used.
    #[error("the record of machine {name} in {path}: {cause}")]
    Record {
        /// Its name.
        name: String,
        /// Its runtime directory, escaped.
        path: String,
        /// What is wrong with it.
        cause: RecordError,
    },
}

impl Keeper {
    /// Takes the ownership of a machine that is about to be started, and begins its record.
    ///
    /// # Errors
    /// When another broker owns it, or it is alive.
    pub fn begin(spec: &VmSpec, options: &RunOptions) -> Result<Self, BeginError> {
        let home = Home::claim(&options.runtime, &spec.name)?;
        let path = home.path().to_owned();
        let fault = |cause| BeginError::Record {
            name: spec.name.clone(),
            path: escaped(path.as_os_str().as_encoded_bytes()).to_string(),
            cause,
        };
        match Record::read(home.path()) {
            Ok(old) => {
                if let Some(alive) = old.processes.iter().find(|p| p.is_alive()) {
                    return Err(BeginError::Orphaned {
                        name: spec.name.clone(),
                        pid: alive.pid,
                    });
                }
                old.helpers.iter().for_each(HelperRecord::kill);
                old.remove_groups();
            }
            Err(RecordError::Missing | RecordError::OtherBoot) => {}
            Err(cause) => return Err(fault(cause)),
        }
        let record = Record::new(spec, options).map_err(RecordError::from);
        let written = record.and_then(|record| {
            record.write(home.directory())?;
            Ok(record)
        });
        match written {
            Ok(record) => Ok(Self { home, record }),
            Err(cause) => {
                home.remove();
                Err(fault(cause))
            }
        }
    }

    /// Takes the ownership of a machine that another broker has started.
    ///
    /// # Errors
    /// When another broker owns it, or its record cannot be believed.
    pub fn take_over(runtime: &Path, name: &str) -> Result<Self, BeginError> {
        let home = Home::take_over(runtime, name)?;
        let record = Record::read(home.path()).map_err(|cause| BeginError::Record {
            name: name.to_owned(),
            path: escaped(home.path().as_os_str().as_encoded_bytes()).to_string(),
            cause,
        })?;
        Ok(Self { home, record })
    }

    /// Where the machine lives.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// What is on record.
    #[must_use]
    pub const fn record(&self) -> &Record {
        &self.record
    }

    /// Puts a process on record. It must not get its birth message before this has succeeded.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn put(&mut self, process: ProcessRecord) -> Result<(), RecordError> {
        if let Some(before) = self.record.in_place_of(process.id) {
            self.home.forget(before.id);
        }
        self.record.put(process);
        self.record.write(self.home.directory())
    }

    /// Notes that the machine is started again: what was on record is gone.
    pub fn start_again(&mut self) {
        for process in &self.record.processes {
            self.home.forget(process.id);
        }
        self.note(|record| {
            record.phase = Phase::Starting;
            record.restarts += 1;
            record.processes.clear();
            record.helpers.clear();
            record.pause_wanted = false;
            record.no_room.clear();
        });
    }

    /// Notes the version of a process. While the machine starts, the next change is the time to write
    /// it down.
    pub fn learn(&mut self, id: ProcId, version: String) {
        let mut processes = self.record.processes.iter_mut();
        if let Some(process) = processes.find(|process| process.id == id) {
            process.version = Some(version);
        }
        if self.record.phase == Phase::Running {
            self.note(|_| {});
        }
    }

    /// Notes how far the machine is, unless that is on record.
    pub fn phase(&mut self, phase: Phase) {
        if self.record.phase != phase {
            self.note(|record| record.phase = phase);
        }
    }

    /// Changes the record. When the file cannot be written the machine goes on: a later broker then
    /// knows less, and undoes or repeats more.
    pub fn note(&mut self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record);
        if let Err(error) = self.record.write(self.home.directory()) {
            let vm = &self.record.spec.name;
            tracing::error!(vm, %error, "the machine's record is out of date");
        }
    }

    /// The machine is over: nothing of it stays on record.
    pub fn close(self) {
        // The one in its runtime directory goes with that.
        let vsock = self.record.spec.vsock.as_ref();
        if let Some(path) = vsock.and_then(|vsock| vsock.path.as_deref()) {
            vsock::remove(path);
        }
        self.home.remove();
    }
}
