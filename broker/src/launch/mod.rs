//! From a policy to a sandboxed process.
//!
//! ```text
//!   policy ──▶ LaunchPlan (data) ──▶ clone3 ──▶ steps in the child ──▶ exec of a static binary
//!                                       │                                   │
//!                         pidfd, log, control, page ◀── Birth ──────────────┘
//! ```
//!
//! A process is born with exactly the descriptors of its policy, into namespaces with nothing in
//! them, as a user that nobody else is, without capabilities. The launcher is the only part of
//! the project that starts Bulkhead's programs; `network/passt.rs` starts one that is not. It never
//! waits for a newborn: what goes wrong between clone and exec is read from a pipe when the process has died ([`Launched::unborn`]).
//!
//! Processes are not killed when the broker dies (no PR_SET_PDEATHSIG): they outlive it, from the
//! moment at which they have their birth message ([`Launched::bear`]).

pub mod cgroup;
pub mod cores;
pub mod hollow;
pub mod plan;
mod sys;
pub mod users;

use bulkhead_ipc::adoption::AdoptionSocket;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::control_page::{CONTROL_PAGE_BYTES, ControlPage};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::birth::{
    ADOPTION_FD, Birth, CONTROL_FD, FIRST_GRANT_FD, FdRole, GRANTS_MAX, Grant, KindConfig, PAGE_FD,
};
use bulkhead_ipc::shared::{SharedError, sealed_memfd};
use bulkhead_policies::schema::{Access, FdType};
use bulkhead_policies::{Filters, Policy};
use hollow::{Hollow, HollowMaker};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::pipe2;
use plan::{INSIDE_ID, LaunchPlan, Means, Step};
use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use users::UserRange;

/// What tells sealed shared memory from a file of a tmpfs, which has F_SEAL_SEAL alone.
const SEALS: i32 = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
/// Most descriptors of a process at exec.
const DESCRIPTORS_MAX: usize = FIRST_GRANT_FD.unsigned_abs() as usize + GRANTS_MAX;

/// How long a newborn may take until it executes its program, where that is waited for.
const EXECUTED_WITHIN: Duration = Duration::from_secs(5);

/// Why a process could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Its program is not there.
    #[error("program {path}: {cause}")]
    Program {
        /// Where it was expected.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The descriptors are not those of the policy.
    #[error("descriptors of {kind}: {role} {fault}")]
    Grant {
        /// The kind of process.
        kind: ProcKind,
        /// The role.
        role: String,
        /// What is wrong.
        fault: String,
    },
    /// The kernel refused.
    #[error("{what}: {cause}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        cause: io::Error,
    },
    /// Shared memory could not be made.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// The first message could not be sent.
    #[error("birth message: {0}")]
    Channel(#[from] ChannelError),
}

fn os(what: &'static str) -> impl Fn(Errno) -> LaunchError {
    move |errno| LaunchError::Os {
        what,
        cause: errno.into(),
    }
}

/// A descriptor for a newborn.
#[derive(Debug)]
pub struct Gift<'a> {
    /// What it is for.
    pub role: FdRole,
    /// Which of several of its role.
    pub index: u16,
    /// The descriptor; the newborn gets a copy.
    pub fd: BorrowedFd<'a>,
}

impl<'a> Gift<'a> {
    /// The only descriptor of its role.
    #[must_use]
    pub const fn new(role: FdRole, fd: BorrowedFd<'a>) -> Self {
        Self { role, index: 0, fd }
    }

    /// One of several of its role.
    #[must_use]
    pub const fn numbered(role: FdRole, index: u16, fd: BorrowedFd<'a>) -> Self {
        Self { role, index, fd }
    }
}

/// How a folder is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FolderTerms {
    /// User and group on the host whose files the process may use as if they were its own.
    pub owner: (u32, u32),
    /// Whether nothing is to be changed in it.
    pub read_only: bool,
}

/// A process that has been started.
#[derive(Debug)]
pub struct Launched {
    /// Who.
    pub id: ProcId,
    /// Its pid on the host.
    pub pid: i32,
    /// Readable when it has died.
    pub pidfd: OwnedFd,
    /// The control channel.
    pub control: Channel,
    /// The control page.
    pub page: ControlPage,
    /// Its log lines.
    pub log: OwnedFd,
    /// What it was born with.
    pub grants: Vec<Grant>,
    /// The range that its user is of; `None` when it has no user of its own.
    pub users: Option<UserRange>,
    steps: Vec<Step>,
    /// Where it says why it could not be executed; `None` for one that another broker has started.
    report: Option<OwnedFd>,
    dead: bool,
}

/// Starts processes. One for each broker.
#[derive(Debug)]
pub struct Launcher {
    binaries: PathBuf,
    means: Means,
    maker: Option<HollowMaker>,
    hollow: Option<Hollow>,
    proc_dir: OwnedFd,
    null: OwnedFd,
    programs: HashMap<ProcKind, OwnedFd>,
    /// Programs of processes that have another than their kind's.
    upgraded: HashMap<Slot, OwnedFd>,
}

/// What process it is, whichever its generation.
type Slot = (ProcKind, u16);

/// The program that a process had before [`Launcher::renew_program`].
#[derive(Debug)]
pub struct Before(Option<OwnedFd>);

impl Launcher {
    /// A launcher for the programs in `binaries`, whose processes have users of the range `users` where
    /// that exists. Begins to make the shared empty namespaces.
    ///
    /// # Errors
    /// When the kernel refuses what every process needs.
    pub fn new(binaries: &Path, users: UserRange) -> Result<Self, LaunchError> {
        let os = |what| move |cause| LaunchError::Os { what, cause };
        let root = nix::unistd::geteuid().is_root();
        let maker = match root {
            true => Some(HollowMaker::begun().map_err(os("starting a thread"))?),
            false => None,
        };
        let means = Means {
            root,
            users: users.exists().then_some(users),
        };
        let open = |path: &str, flags: i32| {
            OpenOptions::new()
                .read(true)
                .write(flags == 0)
                .custom_flags(flags)
                .open(path)
                .map(OwnedFd::from)
        };
        Ok(Self {
            binaries: binaries.to_owned(),
            means,
            maker,
            hollow: None,
            proc_dir: open("/proc", libc::O_PATH | libc::O_DIRECTORY).map_err(os("/proc"))?,
            null: open("/dev/null", 0).map_err(os("/dev/null"))?,
            programs: HashMap::new(),
            upgraded: HashMap::new(),
        })
    }

    /// What the broker may do on this host.
    #[must_use]
    pub const fn means(&self) -> Means {
        self.means
    }

    /// Opens the program of `kind`, so that a missing one is known before anything is started.
    ///
    /// # Errors
    /// [`LaunchError::Program`].
    pub fn find_program(&mut self, kind: ProcKind) -> Result<(), LaunchError> {
        if self.programs.contains_key(&kind) {
            return Ok(());
        }
        let program = self.open_program(kind)?;
        self.programs.insert(kind, program);
        Ok(())
    }

    fn open_program(&self, kind: ProcKind) -> Result<OwnedFd, LaunchError> {
        let path = program_path(&self.binaries, kind);
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&path);
        match opened {
            Ok(file) => Ok(file.into()),
            Err(cause) => Err(LaunchError::Program { path, cause }),
        }
    }

    /// Opens the program that is on disk now, for the processes after `id` in its place and nobody else.
    ///
    /// # Errors
    /// [`LaunchError::Program`]; the program is then the one that it was.
    pub fn renew_program(&mut self, id: ProcId) -> Result<Before, LaunchError> {
        let program = self.open_program(id.kind)?;
        Ok(Before(self.upgraded.insert((id.kind, id.index), program)))
    }

    /// Takes [`Launcher::renew_program`] back.
    pub fn revert_program(&mut self, id: ProcId, before: Before) {
        let slot = (id.kind, id.index);
        match before.0 {
            Some(program) => self.upgraded.insert(slot, program),
            None => self.upgraded.remove(&slot),
        };
    }

    fn program_of(&self, id: ProcId) -> Option<&OwnedFd> {
        let own = self.upgraded.get(&(id.kind, id.index));
        own.or_else(|| self.programs.get(&id.kind))
    }

    /// Device and inode of the program that `id` is or would be started from, once it is open.
    #[must_use]
    pub fn program(&self, id: ProcId) -> Option<(u64, u64)> {
        let about = fstat(self.program_of(id)?).ok()?;
        Some((about.st_dev, about.st_ino))
    }

    /// Starts a process of `policy` that is given `gifts` and can be found at `adoption` later. Does
    /// not wait for it.
    ///
    /// # Errors
    /// When the gifts are not those of the policy, or the kernel refuses.
    pub fn launch(
        &mut self,
        id: ProcId,
        policy: &Policy,
        gifts: &[Gift<'_>],
        adoption: &AdoptionSocket,
    ) -> Result<Launched, LaunchError> {
        self.launch_with(id, policy, gifts, adoption, None)
    }

    /// User and group that a process with this folder is inside of its user namespace.
    #[must_use]
    pub const fn inside(&self, folder: &FolderTerms) -> (u32, u32) {
        match self.means.root {
            true => folder.owner,
            false => (INSIDE_ID, INSIDE_ID),
        }
    }

    /// As [`Launcher::launch`], for a process that shares a folder: what is handed over is a mount of it alone.
    /// Where the broker is root, waits until the process has its user, so that the mount can
    /// translate the owner's files to it.
    ///
    /// # Errors
    /// As [`Launcher::launch`].
    pub fn launch_with(
        &mut self,
        id: ProcId,
        policy: &Policy,
        gifts: &[Gift<'_>],
        adoption: &AdoptionSocket,
        terms: Option<FolderTerms>,
    ) -> Result<Launched, LaunchError> {
        check_gifts(policy, gifts)?;
        let folder = gifts.iter().find(|gift| gift.role == FdRole::Folder);
        let folder = folder.zip(terms);
        let mount = match (folder, self.means.root) {
            (Some((gift, terms)), true) => {
                let what = "a mount of the folder";
                Some(sys::mount_of(gift.fd, terms.read_only).map_err(os(what))?)
            }
            _ => None,
        };
        let path = match (folder, &mount) {
            (Some((gift, _)), None) => Some(path_of(gift.fd)?),
            _ => None,
        };
        self.find_program(id.kind)?;
        self.finish_hollow()?;
        let plan = LaunchPlan::new(policy, image_bytes(gifts)?, self.means);
        let (control, childs_control) = Channel::pair().map_err(os("control channel"))?;
        let page_fd =
            sealed_memfd("bulkhead-page", CONTROL_PAGE_BYTES).map_err(os("control page"))?;
        let nonblocking = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let (log, childs_log) = pipe2(nonblocking).map_err(os("log pipe"))?;
        let (report, childs_report) = pipe2(nonblocking).map_err(os("report pipe"))?;

        let null = self.null.as_raw_fd();
        let mut descriptors = vec![null, null, childs_log.as_raw_fd()];
        descriptors.extend([childs_control.as_raw_fd(), page_fd.as_raw_fd()]);
        descriptors.push(adoption.as_fd().as_raw_fd());
        const { assert!(CONTROL_FD == 3 && PAGE_FD == 4 && ADOPTION_FD == 5 && FIRST_GRANT_FD == 6) };
        let handed_over = |gift: &Gift<'_>| match &mount {
            Some(mount) if gift.role == FdRole::Folder => mount.as_raw_fd(),
            _ => gift.fd.as_raw_fd(),
        };
        descriptors.extend(gifts.iter().map(handed_over));
        let grants = gifts.iter().zip(FIRST_GRANT_FD..);
        let grants = grants.map(|(gift, fd)| Grant {
            role: gift.role,
            index: gift.index,
            fd,
        });
        let name = CString::new(format!("bulkhead-{}", id.kind)).unwrap_or_default();
        let hollow = self.hollow.as_ref();
        let raw = |fd: Option<&OwnedFd>| fd.map_or(-1, AsRawFd::as_raw_fd);
        let cloned = sys::spawn(&sys::Prepared {
            clone_flags: plan.clone_flags,
            steps: &plan.steps,
            network: raw(hollow.map(|h| &h.network)),
            root: raw(hollow.map(|h| &h.root)),
            proc_dir: self.proc_dir.as_raw_fd(),
            broker_ids: (
                nix::unistd::geteuid().as_raw(),
                nix::unistd::getegid().as_raw(),
            ),
            descriptors: &descriptors,
            program: raw(self.program_of(id)),
            name: &name,
            inside: terms.map_or((INSIDE_ID, INSIDE_ID), |terms| self.inside(&terms)),
            folder: folder
                .zip(path.as_deref())
                .map(|((gift, terms), path)| sys::Folder {
                    path,
                    fd: gift.fd.as_raw_fd(),
                    read_only: terms.read_only,
                }),
            report: childs_report.as_raw_fd(),
        })
        .map_err(os("clone3"))?;
        drop(childs_report);
        let launched = Launched {
            id,
            pid: cloned.pid,
            pidfd: cloned.pidfd,
            control,
            page: ControlPage::map(page_fd)?,
            log,
            grants: grants.collect(),
            users: self.means.users,
            steps: plan.steps,
            report: Some(report),
            dead: false,
        };
        if let Some(mount) = mount
            && let Err(cause) = self.give_folder(&launched, &mount)
        {
            // Dead already is as good.
            let _killed = launched.kill();
            return Err(cause);
        }
        Ok(launched)
    }

    /// Has the mount of a folder translate the owner's files to the user that the process is.
    fn give_folder(&self, launched: &Launched, mount: &OwnedFd) -> Result<(), LaunchError> {
        let Some(report) = &launched.report else {
            return Ok(());
        };
        let mut executed = [PollFd::new(report.as_fd(), PollFlags::POLLIN)];
        let within = PollTimeout::try_from(EXECUTED_WITHIN).unwrap_or(PollTimeout::MAX);
        if poll(&mut executed, within).map_err(os("waiting for a newborn"))? == 0 {
            return Err(os("waiting for a newborn")(Errno::ETIMEDOUT));
        }
        let [executed] = executed;
        if executed
            .revents()
            .is_some_and(|r| r.contains(PollFlags::POLLIN))
        {
            // It has failed before, and tells why when it is dead.
            return Ok(());
        }
        let path = format!("{}/ns/user", launched.pid);
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let users = openat(&self.proc_dir, path.as_str(), flags, Mode::empty());
        let users = users.map_err(os("the user namespace of a newborn"))?;
        let what = "translating the owners of files (the file system must have idmapped mounts)";
        sys::translate_owners(mount, users.as_fd()).map_err(os(what))
    }

    fn finish_hollow(&mut self) -> Result<(), LaunchError> {
        if let Some(maker) = self.maker.take() {
            let what = "making empty network and mount namespaces";
            let made = maker.finish();
            self.hollow = Some(made.map_err(|cause| LaunchError::Os { what, cause })?);
        }
        Ok(())
    }
}

impl Launched {
    /// Second descriptors of everything that the process has open under this name of the host.
    ///
    /// # Errors
    /// The kernel's error, as when we may not look.
    pub fn descriptors_of(&self, path: &Path) -> io::Result<Vec<OwnedFd>> {
        let directory = format!("/proc/{}/fd", self.pid);
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let same = std::fs::read_link(entry.path()).is_ok_and(|target| target == path);
            let number = entry.file_name();
            let number = number.to_str().and_then(|name| name.parse::<i32>().ok());
            numbers.extend(number.filter(|_| same));
        }
        numbers.sort_unstable();
        let handle = self.pidfd.as_fd();
        let duplicate = |number| Ok(crate::authority::sys::duplicate(handle, number)?);
        numbers.into_iter().map(duplicate).collect()
    }

    /// A process that another broker has started and this one has adopted.
    #[must_use]
    pub const fn adopted(
        id: ProcId,
        pid: i32,
        pidfd: OwnedFd,
        control: Channel,
        page: ControlPage,
        log: OwnedFd,
    ) -> Self {
        Self {
            id,
            pid,
            pidfd,
            control,
            page,
            log,
            grants: Vec::new(),
            users: None,
            steps: Vec::new(),
            report: None,
            dead: false,
        }
    }

    /// Whether another broker has started it, so that it was locked when this one found it.
    #[must_use]
    pub const fn is_adopted(&self) -> bool {
        self.report.is_none()
    }

    /// The place of a process that another broker has started and that is dead: nothing of it answers.
    ///
    /// # Errors
    /// When there are no descriptors to be had.
    pub fn found_dead(id: ProcId, pid: i32) -> Result<Self, LaunchError> {
        let (control, _closed) = Channel::pair().map_err(os("control channel"))?;
        let page = sealed_memfd("bulkhead-page", CONTROL_PAGE_BYTES).map_err(os("page"))?;
        let (log, _closed) = pipe2(OFlag::O_CLOEXEC).map_err(os("log pipe"))?;
        // No process: what is sent to it is refused.
        let pidfd = log.try_clone().map_err(|cause| LaunchError::Os {
            what: "a descriptor",
            cause,
        })?;
        let page = ControlPage::map(page)?;
        Ok(Self {
            dead: true,
            ..Self::adopted(id, pid, pidfd, control, page, log)
        })
    }

    /// Whether it was found dead.
    #[must_use]
    pub const fn is_dead(&self) -> bool {
        self.dead
    }

    /// What it is told at birth, as a process of `vm` with these filters.
    #[must_use]
    pub fn birth(
        &self,
        vm: String,
        token: [u8; 32],
        filters: &Filters,
        config: KindConfig,
    ) -> Birth {
        Birth {
            version: PROTOCOL_VERSION,
            id: self.id,
            vm,
            token,
            grants: self.grants.clone(),
            startup: filters.startup.clone(),
            locked: filters.locked.clone(),
            uring: filters.uring.clone(),
            config,
        }
    }

    /// Sends its birth message. From then on the process lives without its broker.
    ///
    /// # Errors
    /// As [`Channel::send`].
    pub fn bear(&self, birth: &Birth) -> Result<(), ChannelError> {
        self.control
            .send(birth, &[self.control.as_fd(), self.log.as_fd()])
    }

    /// Kills it at once.
    ///
    /// # Errors
    /// ESRCH when it is dead already.
    pub fn kill(&self) -> Result<(), Errno> {
        sys::kill(self.pidfd.as_fd())
    }

    /// Why the process died before `exec`, if it did.
    #[must_use]
    pub fn unborn(&self) -> Option<String> {
        let mut words = [0u8; 8];
        let report = File::from(self.report.as_ref()?.try_clone().ok()?);
        (&report).read_exact(&mut words).ok()?;
        let [a, b, c, d, errno @ ..] = words;
        let step = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
        let errno = Errno::from_raw(i32::from_ne_bytes(errno));
        let step = self.steps.get(step)?;
        Some(format!("{step:?} before exec: {errno}"))
    }
}

/// Where the program of `kind` is.
#[must_use]
pub fn program_path(binaries: &Path, kind: ProcKind) -> PathBuf {
    binaries.join(format!("bulkhead-{kind}"))
}

/// The size of the largest file of a disk among the gifts; None for none, for a block device, and for one
/// that grows.
fn image_bytes(gifts: &[Gift<'_>]) -> Result<Option<u64>, LaunchError> {
    let mut largest = None;
    for disk in gifts.iter().filter(|gift| gift.role == FdRole::Disk) {
        let stat = fstat(disk.fd).map_err(os("fstat"))?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        if kind == SFlag::S_IFREG {
            largest = largest.max(u64::try_from(stat.st_size).ok());
        }
    }
    Ok(largest)
}

/// Where a directory is now.
fn path_of(fd: BorrowedFd<'_>) -> Result<CString, LaunchError> {
    let what = "the path of the folder";
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let path = std::fs::read_link(link).map_err(|cause| LaunchError::Os { what, cause })?;
    CString::new(path.into_os_string().into_encoded_bytes()).map_err(|_| os(what)(Errno::EINVAL))
}

/// Kills the process of a pidfd.
///
/// # Errors
/// ESRCH when it is dead already.
pub fn kill_process(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    sys::kill(pidfd)
}

/// Checks that the gifts are exactly what the policy grants: role, number, kind and access.
fn check_gifts(policy: &Policy, gifts: &[Gift<'_>]) -> Result<(), LaunchError> {
    let fault = |role: FdRole, fault: String| LaunchError::Grant {
        kind: policy.kind,
        role: bulkhead_policies::role_name(role),
        fault,
    };
    for gift in gifts {
        let Some(grant) = policy.fd(gift.role) else {
            return Err(fault(gift.role, "is not granted".to_owned()));
        };
        let kind = kind_of(gift.fd).map_err(os("fstat"))?;
        let fits = kind == grant.is
            || (grant.is == FdType::FileOrBlock && kind == FdType::File)
            // A kernel inside this program comes as sealed memory.
            || (grant.is == FdType::File && kind == FdType::Memfd);
        if !fits {
            let what = format!("is a {kind:?}, expected a {:?}", grant.is);
            return Err(fault(gift.role, what));
        }
        let mode = access_of(gift.fd).map_err(os("fcntl"))?;
        if mode != grant.access && grant.access != Access::ReadWrite {
            let what = format!("is open for {mode:?}, expected {:?}", grant.access);
            return Err(fault(gift.role, what));
        }
    }
    for grant in &policy.fds {
        let count = gifts.iter().filter(|gift| gift.role == grant.role).count();
        if count < usize::from(grant.min) || count > usize::from(grant.max) {
            let what = format!(
                "is given {count} times, expected {} to {}",
                grant.min, grant.max
            );
            return Err(fault(grant.role, what));
        }
    }
    Ok(())
}

fn kind_of(fd: BorrowedFd<'_>) -> Result<FdType, Errno> {
    let mode = fstat(fd)?.st_mode & SFlag::S_IFMT.bits();
    Ok(match SFlag::from_bits_truncate(mode) {
        SFlag::S_IFCHR => FdType::CharDevice,
        SFlag::S_IFBLK => FdType::FileOrBlock,
        SFlag::S_IFSOCK if getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false) => {
            FdType::ListeningSocket
        }
        SFlag::S_IFSOCK if getsockopt(&fd, sockopt::SockType)? == SockType::Stream => {
            FdType::StreamSocket
        }
        SFlag::S_IFSOCK => FdType::Seqpacket,
        SFlag::S_IFDIR => FdType::Folder,
        SFlag::S_IFREG
            if fcntl(fd, FcntlArg::F_GET_SEALS).is_ok_and(|seals| seals & SEALS == SEALS) =>
        {
            FdType::Memfd
        }
        SFlag::S_IFREG => FdType::File,
        // An eventfd has no type bits at all.
        _ => FdType::Eventfd,
    })
}

fn access_of(fd: BorrowedFd<'_>) -> Result<Access, Errno> {
    let flags = OFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    Ok(match flags & OFlag::O_ACCMODE {
        OFlag::O_WRONLY => Access::Write,
        OFlag::O_RDWR => Access::ReadWrite,
        _ => Access::Read,
    })
}
