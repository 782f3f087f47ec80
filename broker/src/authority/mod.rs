//! The authority graph: what each process of a machine can reach, measured from the kernel while it
//! runs, and compared with what its policy grants.
//!
//! Nothing here is filled from a policy or from what a process says. What the kernel does not tell this
//! reader is `None`, shown as "not measurable here": without root those are the instructions of seccomp
//! filters, and Landlock, which is tried out (see [`landlock`]). Descriptors and mappings are measured
//! without root too (see [`descriptors`]).
//!
//! ```text
//!   pids ──▶ measure ──▶ Authority ──┬─▶ compare (with the policies) ──▶ differences
//!                                    ├─▶ table, JSON
//!                                    └─▶ Graph ──▶ DOT, SVG
//! ```

pub mod compare;
pub mod descriptors;
pub mod filters;
pub mod graph;
pub mod guided;
pub mod landlock;
pub mod memory;
mod peers;
pub mod status;
pub mod svg;
pub(crate) mod sys;
pub mod table;

use crate::launch::users::UserRange;
use bulkhead_ipc::ident::ProcId;
use descriptors::Descriptor;
use filters::Thread;
use landlock::Landlock;
use memory::Memory;
use serde::Serialize;
use status::Status;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// A process to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// Who it is; `None` for the broker.
    pub id: Option<ProcId>,
    /// Its pid.
    pub pid: i32,
    /// The range that its user is to be of; `None` when it has no user of its own.
    pub users: Option<UserRange>,
}

/// What a process can reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// Who it is, such as `blk0.1`; `broker` for the broker.
    pub name: String,
    /// The same, for the comparison.
    #[serde(skip)]
    pub id: Option<ProcId>,
    /// Its pid.
    pub pid: i32,
    /// The range that its user is to be of, for the comparison.
    #[serde(skip)]
    pub users: Option<UserRange>,
    /// Device (as in `/proc/PID/maps`) and inode of its program.
    #[serde(skip)]
    pub program: Option<(String, u64)>,
    /// What Landlock denies it; `None` where that is not measurable, and for the broker.
    pub landlock: Option<Landlock>,
    /// Who it is and what surrounds it.
    pub status: Status,
    /// Its descriptors; `None` where they are not measurable.
    pub descriptors: Option<Vec<Descriptor>>,
    /// Its mappings; `None` where they are not measurable.
    pub memory: Option<Memory>,
    /// Its threads and their filters.
    pub threads: Vec<Thread>,
}

/// What all processes of a machine can reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Authority {
    /// The processes, in the order in which they were asked for.
    pub processes: Vec<Measured>,
}

/// A process that could not be measured.
#[derive(Debug, thiserror::Error)]
#[error("process {pid} ({name}): {what}: {cause}")]
pub struct MeasureError {
    /// Who it is.
    pub name: String,
    /// Its pid.
    pub pid: i32,
    /// What was looked at.
    pub what: &'static str,
    /// What the kernel said.
    pub cause: io::Error,
}

/// Measures `subjects`. With root each of their threads is stopped for a moment.
///
/// # Errors
/// When one is gone, or something that everybody may see cannot be read.
pub fn measure(subjects: &[Subject]) -> Result<Authority, MeasureError> {
    let processes = subjects.iter().map(one).collect::<Result<_, _>>()?;
    Ok(Authority { processes })
}

fn one(subject: &Subject) -> Result<Measured, MeasureError> {
    let pid = subject.pid;
    let name = subject
        .id
        .map_or_else(|| "broker".to_owned(), |id| id.to_string());
    let failed = |what| {
        let name = name.clone();
        move |cause| MeasureError {
            name,
            pid,
            what,
            cause,
        }
    };
    let status = status::measure(pid).map_err(failed("status"))?;
    let descriptors = if_permitted(descriptors::measure(pid)).map_err(failed("descriptors"))?;
    let memory = if_permitted(memory::measure(pid)).map_err(failed("mappings"))?;
    let threads = filters::measure(pid).map_err(failed("threads"))?;
    let landlock = match subject.id {
        Some(_) => if_permitted(landlock::measure(pid)).map_err(failed("Landlock"))?,
        // Nothing of Bulkhead confines its broker, and it may be the caller itself.
        None => None,
    };
    Ok(Measured {
        name,
        id: subject.id,
        pid,
        users: subject.users,
        program: program(pid),
        landlock,
        status,
        descriptors,
        memory,
        threads,
    })
}

/// `None` where the kernel says that it is none of our business, or cannot tell.
fn if_permitted<T>(measured: io::Result<T>) -> io::Result<Option<T>> {
    use io::ErrorKind::{PermissionDenied, Unsupported};
    match measured {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.kind(), PermissionDenied | Unsupported) => Ok(None),
        Err(e) => Err(e),
    }
}

fn program(pid: i32) -> Option<(String, u64)> {
    let about = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    let (major, minor) = (
        nix::sys::stat::major(about.dev()),
        nix::sys::stat::minor(about.dev()),
    );
    Some((format!("{major:02x}:{minor:02x}"), about.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_gone_is_an_error_and_not_an_empty_row() {
        let subject = Subject {
            id: None,
            // No pid is as large as this.
            pid: i32::MAX,
            users: None,
        };
        let error = measure(&[subject]).unwrap_err();
        assert_eq!((error.pid, error.what), (i32::MAX, "status"));
    }
}
