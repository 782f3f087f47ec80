//! The seccomp filters of each thread of a process, as the kernel has them.

use super::status::field;
use super::sys;
use bulkhead_policies::evaluate::{EvaluateError, Instruction, Permitted, permitted};
use nix::errno::Errno;
use nix::sys::ptrace::Options;
use serde::{Serialize, Serializer};
use std::collections::BTreeSet;
use std::fs;
use std::io;

/// PF_IO_WORKER and PF_USER_WORKER: tasks that the kernel made for itself in the process. They run
/// no code of it.
const KERNEL_WORKER: u64 = 0x10 | 0x4000;

/// A thread and what it may ask of the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Thread {
    /// Thread id on the host.
    pub tid: i32,
    /// Its name, which it may have chosen before it was locked.
    pub name: String,
    /// Whether it is a task of the kernel's own.
    pub is_kernel_worker: bool,
    /// Number of filters.
    pub filters: usize,
    /// The filters, oldest first; `None` where they are not measurable (that needs root).
    #[serde(skip)]
    pub programs: Option<Vec<Vec<Instruction>>>,
    /// What they permit together; `None` where that is not measurable.
    #[serde(serialize_with = "by_name")]
    pub permitted: Option<BTreeSet<Permitted>>,
}

fn by_name<S: Serializer>(
    permitted: &Option<BTreeSet<Permitted>>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match permitted {
        Some(set) => to.collect_seq(set.iter().map(ToString::to_string)),
        None => to.serialize_none(),
    }
}

/// Measures all threads of `pid`. Each is stopped for a moment, if that is permitted.
///
/// # Errors
/// When the process is gone, or its filters cannot be evaluated.
pub fn measure(pid: i32) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = entry?.file_name();
        let Some(tid) = name.to_str().and_then(|tid| tid.parse().ok()) else {
            continue;
        };
        match thread(pid, tid) {
            // It has ended since it was listed.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            measured => threads.push(measured?),
        }
    }
    threads.sort_by_key(|thread| (thread.tid != pid, thread.tid));
    Ok(threads)
}

fn thread(pid: i32, tid: i32) -> io::Result<Thread> {
    let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{name}"));
    let status = file("status")?;
    let stat = file("stat")?;
    let flags = stat.rsplit_once(')').and_then(|(_, rest)| {
        let field = rest.split_ascii_whitespace().nth(6)?;
        field.parse::<u64>().ok()
    });
    let flags = flags.ok_or_else(|| io::Error::other("stat has no flags"))?;
    let filters = field(&status, "Seccomp_filters").and_then(|n| n.parse().ok());
    let filters: usize = filters.ok_or_else(|| io::Error::other("status has no filters"))?;
    let programs = match read(tid, filters) {
        Ok(programs) => Some(programs),
        Err(Errno::EPERM | Errno::EACCES) => None,
        Err(errno) => return Err(errno.into()),
    };
    let permitted = match programs.as_deref().map(permitted) {
        None | Some(Err(EvaluateError::None)) => None,
        Some(Ok(set)) => Some(set),
        Some(Err(error)) => return Err(io::Error::other(error)),
    };
    Ok(Thread {
        tid,
        name: field(&status, "Name").unwrap_or_default().to_owned(),
        is_kernel_worker: flags & KERNEL_WORKER != 0,
        filters,
        programs,
        permitted,
    })
}

fn read(tid: i32, count: usize) -> Result<Vec<Vec<Instruction>>, Errno> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let stopped = match sys::Stopped::seize(tid, Options::empty()) {
        Err(Errno::ESRCH) => return Err(Errno::ENOENT),
        stopped => stopped?,
    };
    let mut filters = Vec::new();
    while let Some(filter) = stopped.filter(filters.len())? {
        filters.push(filter);
    }
    Ok(filters)
}
