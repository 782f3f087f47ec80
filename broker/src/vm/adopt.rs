//! Machines whose broker is gone: finding them, and taking them over.
//!
//! Nothing in a runtime directory is believed but what the kernel confirms: who owns a machine is who has the
//! lock, and a process is who has the pid *and* the start time of the record.

use super::home::{Home, MACHINES, owner_of, path_of, socket_name};
use super::record::{ProcessRecord, Record, RecordError};
use crate::authority::sys::open_process;
use crate::launch::Launched;
use bulkhead_ipc::adoption::knock;
use bulkhead_ipc::channel::{Channel, ChannelError, Received};
use bulkhead_ipc::control_page::ControlPage;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::adopt::{Adopt, Adopted};
use bulkhead_ipc::shared::SharedError;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// Most machines that one runtime directory is searched for.
const MACHINES_MAX: usize = 4096;
/// Age of a directory without a record at which nobody is about to write one.
const REMAINS_AFTER: Duration = Duration::from_secs(10);
/// How long a process may take to answer: one that has just been started answers when it serves.
const PATIENCE: Duration = Duration::from_secs(3);
/// When a process that does not answer is asked again.
const KNOCK_AGAIN: Duration = Duration::from_millis(500);
/// How long a process that has closed its channels is expected to die.
const DYING: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_micros(500);

/// A machine that no broker owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// What its last broker has left on record.
    pub record: Record,
    /// Whether its vCPU process is alive, and so its guest.
    pub is_alive: bool,
}

impl Orphan {
    fn of(record: Record) -> Self {
        let mut processes = record.processes.iter();
        let vcpu = processes.find(|process| process.id.kind == ProcKind::Vcpu);
        let is_alive = vcpu.is_some_and(|vcpu| vcpu.is_alive());
        Self { record, is_alive }
    }

    /// The machine `name`, if no broker owns it and there is a record of it that can be believed.
    #[must_use]
    pub fn find(runtime: &Path, name: &str) -> Option<Self> {
        let home = path_of(runtime, name);
        let owned = owner_of(&home).is_some();
        Record::read(&home).ok().filter(|_| !owned).map(Self::of)
    }

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
            Ok(record) => found.push(Orphan::of(record)),
            // Nothing can be alive.
            Err(RecordError::Missing | RecordError::OtherBoot) => {}
            Err(error) => tracing::warn!(?home, %error, "a machine's record is not believed"),
        }
    }
    found.sort_by(|a, b| a.record.spec.name.cmp(&b.record.spec.name));
    Ok(found)
}

/// Removes runtime directories of machines of which nothing can be alive, because they were never begun
/// or the host has been started since.
pub fn sweep(runtime: &Path) {
    let entries = fs::read_dir(runtime.join(MACHINES)).into_iter().flatten();
    for entry in entries.flatten().take(MACHINES_MAX) {
        let home = entry.path();
        let name = entry.file_name();
        // Whoever is just beginning is not disturbed.
        let made = entry.metadata().and_then(|about| about.modified());
        let age = made.ok().and_then(|made| made.elapsed().ok());
        let is_old = age.is_some_and(|age| age > REMAINS_AFTER);
        let (Some(name), true) = (name.to_str(), is_old) else {
            continue;
        };
        let none = || {
            matches!(
                Record::read(&home),
                Err(RecordError::Missing | RecordError::OtherBoot)
            )
        };
        if !none() || owner_of(&home).is_some() {
            continue;
        }
        // What was true before the lock may not be any more.
        match Home::claim(runtime, name) {
            Ok(home) if none() => home.remove(),
            Ok(_) | Err(_) => {}
        }
    }
}

/// Why a process cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum MeetError {
    /// It is dead.
    #[error("it is dead")]
    Dead,
    /// It does not answer.
    #[error("it does not answer within {0:?}")]
    Silent(Duration),
    /// It speaks another version.
    #[error("it speaks protocol version {0}, expected {PROTOCOL_VERSION}")]
    Version(u32),
    /// Its answer is not that of the process on record.
    #[error("{0}")]
    Stranger(&'static str),
    /// A channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The kernel refused.
    #[error(transparent)]
    Os(#[from] Errno),
    /// Its control page is none.
    #[error(transparent)]
    Page(#[from] SharedError),
}

/// A process that was met.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) launched: Launched,
    /// What it keeps besides.
    pub(crate) kept: Vec<OwnedFd>,
}

/// Meets the process on record whose adoption socket is in `directory`. Waits at most [`PATIENCE`].
pub(crate) fn meet(directory: BorrowedFd<'_>, process: &ProcessRecord) -> Result<Met, MeetError> {
    let pidfd = match open_process(process.pid) {
        Err(Errno::ESRCH) => return Err(MeetError::Dead),
        opened => opened?,
    };
    // The handle came first: if the process is alive now, it is the handle's.
    if !process.is_alive() {
        return Err(MeetError::Dead);
    }
    match answer(directory, process) {
        Ok(received) => introduced(process, pidfd, received),
        // A dying process closes its channels before its handle says that it is dead.
        Err(MeetError::Channel(_)) if ends_within(pidfd.as_fd(), DYING)? => Err(MeetError::Dead),
        Err(error) => Err(error),
    }
}

fn answer(
    directory: BorrowedFd<'_>,
    process: &ProcessRecord,
) -> Result<Received<Adopted>, MeetError> {
    let message = Adopt {
        version: PROTOCOL_VERSION,
        token: process.token,
    };
    let until = Instant::now() + PATIENCE;
    let mut knocked: Option<(Channel, Instant)> = None;
    while Instant::now() < until {
        match &knocked {
            Some((answer, at)) => match answer.try_recv_from::<Adopted>()? {
                Some(received) => return Ok(received),
                None if at.elapsed() > KNOCK_AGAIN => knocked = None,
                None => std::thread::sleep(POLL),
            },
            None => match knock(directory, &socket_name(process.id), &message) {
                Ok(answer) => knocked = Some((answer, Instant::now())),
                Err(ChannelError::Full) => std::thread::sleep(POLL),
                Err(error) => return Err(error.into()),
            },
        }
    }
    Err(MeetError::Silent(PATIENCE))
}

/// Whether the process of `handle` is dead within `patience`.
fn ends_within(handle: BorrowedFd<'_>, patience: Duration) -> Result<bool, Errno> {
    let mut ended = [PollFd::new(handle, PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(patience).map_err(|_| Errno::EINVAL)?;
    loop {
        match poll(&mut ended, patience) {
            Err(Errno::EINTR) => {}
            polled => return polled.map(|ready| ready > 0),
        }
    }
}

fn introduced(
    process: &ProcessRecord,
    pidfd: OwnedFd,
    received: Received<Adopted>,
) -> Result<Met, MeetError> {
    let Received {
        message,
        fds,
        sender,
    } = received;
    if message.version != PROTOCOL_VERSION {
        return Err(MeetError::Version(message.version));
    }
    if message.id != process.id || sender != Some(process.pid) {
        return Err(MeetError::Stranger("another process answers in its place"));
    }
    let mut fds = fds.into_iter();
    let (Some(control), Some(page), Some(log)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(MeetError::Stranger("it hands over too little"));
    };
    if getsockopt(&control, sockopt::SockType)? != SockType::SeqPacket {
        return Err(MeetError::Stranger("it hands over no control channel"));
    }
    // Reading it must never wait, whatever it is.
    let flags = OFlag::from_bits_retain(fcntl(&log, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        return Err(MeetError::Stranger("it hands over no log"));
    }
    let page = ControlPage::map(page)?;
    let launched = Launched::adopted(
        process.id,
        process.pid,
        pidfd,
        Channel::from(control),
        page,
        log,
    );
    Ok(Met {
        launched,
        kept: fds.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::keeper::{BeginError, Keeper};
    use super::super::record::{ProcessRecord, start_time};
    use super::super::session::RunOptions;
    use super::super::spec::{KernelSource, VmSpec};
    use super::*;
    use bulkhead_ipc::ident::ProcId;

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
            version: None,
            groups: vec![],
            users: None,
        }
    }

    #[test]
    fn machine_is_an_orphan_when_its_owner_is_gone_and_not_before() {
        let runtime = tempfile::tempdir().unwrap();
        assert_eq!(orphans(runtime.path()).unwrap(), []);
        let options = RunOptions::for_test(runtime.path());
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
        let options = RunOptions::for_test(runtime.path());
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
