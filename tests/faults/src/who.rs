//! Who is who: which process of which machine a pid or a socket belongs to.
//!
//! A process is known from its `Birth` on: the harness sees the message on the broker's end of the
//! control channel, and its token names the pid on the machine's record, which the broker writes
//! before. The process keeps the broker's end, so that its inode names it for every later broker.

use bulkhead::vm::record::{ProcessRecord, Record};
use bulkhead_ipc::ident::ProcId;
use bulkhead_ipc::protocol::birth::{Birth, KindConfig};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A process of a machine, or the switch of a network.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its host.
    pub host: usize,
    /// Its machine or network.
    pub vm: String,
    /// Which of the machine's processes.
    pub id: ProcId,
    /// Sizes of its queues; empty for those that have none.
    pub queue_sizes: Vec<u16>,
    /// What the broker has on record of it.
    pub record: ProcessRecord,
    /// Inode of its own end of the control channel, once it has said something.
    pub control: Option<u64>,
    /// Whether it has said that it is locked.
    pub is_locked: bool,
}

impl Known {
    /// Its name without the generation, such as `blk0`.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}{}", self.id.kind, self.id.index)
    }
}

#[derive(Debug, Default)]
struct Inner {
    by_token: HashMap<[u8; 32], Known>,
    /// The broker's ends of control channels.
    by_inode: HashMap<u64, [u8; 32]>,
    by_pid: HashMap<i32, [u8; 32]>,
    /// Brokers by host.
    brokers: HashMap<usize, i32>,
}

/// All processes that were seen.
#[derive(Debug, Default)]
pub struct Directory(Mutex<Inner>);

impl Directory {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker of a host is this process from now on.
    pub fn set_broker(&self, host: usize, pid: i32) {
        self.inner().brokers.insert(host, pid);
    }

    /// The broker of a host is gone.
    pub fn no_broker(&self, host: usize) {
        self.inner().brokers.remove(&host);
    }

    /// The broker of a host.
    #[must_use]
    pub fn broker(&self, host: usize) -> Option<i32> {
        self.inner().brokers.get(&host).copied()
    }

    /// Learns of a process from its birth message, sent on `inode`.
    pub fn born(&self, host: usize, runtime: &Path, inode: u64, birth: &Birth) -> Option<Known> {
        let record = on_record(runtime, &birth.token)?;
        let known = Known {
            host,
            vm: birth.vm.clone(),
            id: birth.id,
            queue_sizes: match &birth.config {
                KindConfig::Device(device) => device.queue_sizes.clone(),
                KindConfig::Vcpu(_)
                | KindConfig::Legacy(_)
                | KindConfig::Image(_)
                | KindConfig::Switch(_) => Vec::new(),
            },
            record,
            control: None,
            is_locked: false,
        };
        let mut inner = self.inner();
        inner.by_inode.insert(inode, birth.token);
        inner.by_pid.insert(known.record.pid, birth.token);
        inner.by_token.insert(birth.token, known.clone());
        Some(known)
    }

    /// Other processes that are alive in the place of one: its predecessors must be dead when it is born.
    #[must_use]
    pub fn alive_beside(&self, one: &Known) -> Vec<Known> {
        let inner = self.inner();
        let others = inner.by_token.values().filter(|known| {
            (known.host, &known.vm, known.place()) == (one.host, &one.vm, one.place())
                && known.record.pid != one.record.pid
                && known.record.is_alive()
        });
        others.cloned().collect()
    }

    /// Whose channel the broker's end `inode` is.
    #[must_use]
    pub fn at(&self, inode: u64) -> Option<Known> {
        let inner = self.inner();
        inner.by_token.get(inner.by_inode.get(&inode)?).cloned()
    }

    /// The process with this token.
    #[must_use]
    pub fn with_token(&self, token: &[u8; 32]) -> Option<Known> {
        self.inner().by_token.get(token).cloned()
    }

    /// The process with this pid.
    #[must_use]
    pub fn with_pid(&self, pid: i32) -> Option<Known> {
        let inner = self.inner();
        inner.by_token.get(inner.by_pid.get(&pid)?).cloned()
    }

    /// A process has said something on its control channel for the first time, or that it is locked.
    pub fn said(&self, pid: i32, control: u64, is_locked: bool) {
        let mut inner = self.inner();
        let Some(token) = inner.by_pid.get(&pid).copied() else {
            return;
        };
        if let Some(known) = inner.by_token.get_mut(&token) {
            known.control = Some(control);
            known.is_locked |= is_locked;
        }
    }

    /// The pids of every process that a host ever had.
    #[must_use]
    pub fn pids(&self, host: usize) -> Vec<i32> {
        let inner = self.inner();
        let of_host = inner.by_token.values().filter(|known| known.host == host);
        of_host.map(|known| known.record.pid).collect()
    }

    /// The processes that are alive, of one machine or host or of all, oldest first.
    #[must_use]
    pub fn alive(&self, vm: Option<&str>, host: Option<usize>) -> Vec<Known> {
        let inner = self.inner();
        let wanted = |known: &&Known| {
            vm.is_none_or(|vm| vm == known.vm) && host.is_none_or(|host| host == known.host)
        };
        let found = inner.by_token.values().filter(wanted);
        let mut found: Vec<_> = found.filter(|k| k.record.is_alive()).cloned().collect();
        drop(inner);
        found.sort_by_key(|known| (known.record.start_time, known.record.pid));
        found
    }
}

/// What the records below `runtime` say of the process with this token.
fn on_record(runtime: &Path, token: &[u8; 32]) -> Option<ProcessRecord> {
    let entries = |of: &str| {
        fs::read_dir(runtime.join(of))
            .into_iter()
            .flatten()
            .flatten()
    };
    let of_machines = entries("vms").flat_map(|machine| {
        let record = Record::read(&machine.path()).ok();
        record.map_or_else(Vec::new, |record| record.processes)
    });
    let of_networks = entries("networks").filter_map(|network| {
        let record = fs::read(network.path().join("switch")).ok()?;
        serde_json::from_slice(&record).ok()
    });
    let mut all = of_machines.chain(of_networks);
    all.find(|process| process.token == *token)
}

/// The inode of the socket that is descriptor `fd` of a process; `None` for anything else.
#[must_use]
pub fn socket_inode(pid: i32, fd: i32) -> Option<u64> {
    let link = descriptor(pid, fd)?;
    let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// What descriptor `fd` of a process is, as /proc shows it.
#[must_use]
pub fn descriptor(pid: i32, fd: i32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?;
    Some(link.to_string_lossy().into_owned())
}
