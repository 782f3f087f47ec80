//! `clone3`, and what the child does until `exec`: raw system calls only.
//!
//! The child is a copy of a process that may have had other threads, so it must not allocate, lock
//! or panic. It works through the [`Step`]s of a plan on data that the parent has prepared, and
//! reports the step that failed through a pipe that `exec` closes.
#![allow(
    unsafe_code,
    reason = "clone3 and the child's raw system calls; the only such module of the broker"
)]

use super::plan::{NewUser, Step};
use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// First number of the descriptors that the child sets aside while it places the others.
const ASIDE_FD: RawFd = 512;
/// Exit status of a child that could not execute.
const EXIT_UNBORN: i64 = 127;
/// Version 3 of the capability interface.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
/// prctl(2), since Linux 6.4.
const PR_SET_MEMORY_MERGE: i32 = 67;
/// One more than the largest capability number that may exist.
const CAPABILITIES: u64 = 64;

/// Everything that the child needs, made before it is born.
#[derive(Debug)]
pub(super) struct Prepared<'a> {
    /// CLONE_NEW* flags.
    pub clone_flags: u32,
    /// What to do.
    pub steps: &'a [Step],
    /// Shared empty network namespace; -1 without.
    pub network: RawFd,
    /// Shared empty mount namespace; -1 without.
    pub root: RawFd,
    /// The host's `/proc`.
    pub proc_dir: RawFd,
    /// User and group of the broker.
    pub broker_ids: (u32, u32),
    /// The descriptors to have at exec: number `n` is `descriptors[n]`.
    pub descriptors: &'a [RawFd],
    /// The program.
    pub program: RawFd,
    /// Its name, `argv[0]`.
    pub name: &'a CStr,
    /// User and group that the process is inside of its user namespace.
    pub inside: (u32, u32),
    /// The folder that it shares, for [`Step::TakeFolder`].
    pub folder: Option<Folder<'a>>,
    /// Where failures are reported.
    pub report: RawFd,
}

/// A folder that a newborn mounts for itself.
#[derive(Debug)]
pub(super) struct Folder<'a> {
    /// Its path.
    pub path: &'a CStr,
    /// Its descriptor among [`Prepared::descriptors`], which the mount takes the place of.
    pub fd: RawFd,
    /// Whether nothing is to be changed in it.
    pub read_only: bool,
}

/// `struct mount_attr` (mount_setattr(2)).
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

impl MountAttributes {
    /// No set-user-id bits, no device nodes, no programs, and nothing of what is mounted below later.
    fn of_folder(read_only: bool) -> Self {
        const NOSUID_NODEV_NOEXEC: u64 = 2 | 4 | 8;
        const RDONLY: u64 = 1;
        Self {
            set: NOSUID_NODEV_NOEXEC | if read_only { RDONLY } else { 0 },
            propagation: libc::MS_PRIVATE,
            ..Self::default()
        }
    }
}

/// Both are from the kernel's headers, and the same on every architecture.
const OPEN_TREE_CLONE: u32 = 1;
const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;

/// A mount of the directory `fd` alone, which nothing leads to but the descriptor: `..` ends at its root.
///
/// # Errors
/// The kernel's errno.
pub(super) fn mount_of(fd: BorrowedFd<'_>, read_only: bool) -> Result<OwnedFd, Errno> {
    let flags =
        OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned() | libc::AT_EMPTY_PATH.cast_unsigned();
    let number = fd.as_raw_fd();
    // SAFETY: the path is a constant with a zero at its end; the rest are plain integers.
    let made = unsafe { libc::syscall(libc::SYS_open_tree, number, c"".as_ptr(), flags) };
    let made = RawFd::try_from(Errno::result(made)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let mount = unsafe { OwnedFd::from_raw_fd(made) };
    set_attributes(&mount, &MountAttributes::of_folder(read_only))?;
    Ok(mount)
}

/// Has a mount translate owners by the map of a user namespace: what the namespace calls an id is that id
/// on disk.
///
/// # Errors
/// The kernel's errno; EINVAL where the file system cannot.
pub(super) fn translate_owners(
    mount: &OwnedFd,
    user_namespace: BorrowedFd<'_>,
) -> Result<(), Errno> {
    let namespace = user_namespace.as_raw_fd();
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP,
        user_namespace: u64::try_from(namespace).map_err(|_| Errno::EBADF)?,
        ..MountAttributes::default()
    };
    set_attributes(mount, &attributes)
}

fn set_attributes(mount: &OwnedFd, attributes: &MountAttributes) -> Result<(), Errno> {
    let (number, flags) = (mount.as_raw_fd(), libc::AT_EMPTY_PATH);
    let size = size_of::<MountAttributes>();
    // SAFETY: the path is a constant with a zero at its end, the structure has the size that is named and
    // outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            number,
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size,
        )
    };
    Errno::result(result).map(drop)
}

/// A child.
#[derive(Debug)]
pub(super) struct Cloned {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Makes the child and lets it work through its steps.
///
/// # Errors
/// Why `clone3` failed. What fails in the child is reported through the pipe.
pub(super) fn spawn(prepared: &Prepared<'_>) -> Result<Cloned, Errno> {
    const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: u64::from(prepared.clone_flags)
            | u64::from(libc::CLONE_PIDFD.cast_unsigned())
            | CLONE_CLEAR_SIGHAND,
        pidfd: (&raw mut pidfd).addr() as u64,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM the child works on a copy of this address space, and `live` never
    // returns; the kernel writes the pidfd into the local variable.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match Errno::result(pid)? {
        0 => live(prepared),
        pid => Ok(Cloned {
            pid: i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?,
            // SAFETY: the kernel has just made this descriptor for us.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// Sends SIGKILL to the process behind `pidfd`, and to no other that may have its pid by now.
///
/// # Errors
/// ESRCH when it is dead.
pub(super) fn kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let (fd, info) = (pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: plain integers and a null pointer, which the call allows.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0u32) };
    Errno::result(result).map(drop)
}

/// What is asked of core scheduling (PR_SCHED_CORE_*).
#[derive(Debug, Clone, Copy)]
pub(super) enum CoreCommand {
    /// Whether it is there.
    Ask,
    /// A new cookie for a process.
    CreateFor(i32),
    /// The cookie of a process for the calling thread.
    TakeFrom(i32),
    /// The calling thread's cookie for a process.
    GiveTo(i32),
}

/// prctl(PR_SCHED_CORE).
///
/// # Errors
/// EINVAL from a kernel without it, ENODEV on processors without siblings.
pub(super) fn core_scheduling(command: CoreCommand) -> Result<(), Errno> {
    const PR_SCHED_CORE: i32 = 62;
    let (one_thread, whole_process) = (0u64, 1u64);
    let mut cookie = 0u64;
    let out = (&raw mut cookie).addr() as u64;
    // The number of the command, the process, whom it is about, and where an answer goes.
    let (number, pid, scope, out) = match command {
        CoreCommand::Ask => (0u64, 0, one_thread, out),
        CoreCommand::CreateFor(pid) => (1, pid, whole_process, 0),
        CoreCommand::GiveTo(pid) => (2, pid, whole_process, 0),
        CoreCommand::TakeFrom(pid) => (3, pid, one_thread, 0),
    };
    // SAFETY: integers, and for `Ask` the address of eight writable bytes.
    let result = unsafe { libc::syscall(libc::SYS_prctl, PR_SCHED_CORE, number, pid, scope, out) };
    Errno::result(result).map(drop)
}

/// A system call's result in the child.
type Done = Result<i64, Errno>;

macro_rules! call {
    ($number:ident $(, $arg:expr)*) => {{
        // SAFETY: in the child between clone and exec; pointers among the arguments refer to data
        // that outlives the call, and the call is one of those listed in this file.
        let result = unsafe { libc::syscall(libc::$number $(, $arg)*) };
        Errno::result(result)
    }};
}

fn live(prepared: &Prepared<'_>) -> ! {
    let mut report = prepared.report;
    for (n, step) in prepared.steps.iter().enumerate() {
        if let Err(errno) = perform(step, prepared, &mut report) {
            let words = [u32::try_from(n).unwrap_or(u32::MAX), errno as u32];
            // Nothing can be done when the report itself fails: the exit status remains.
            let _told = call!(SYS_write, report, words.as_ptr(), size_of_val(&words));
            break;
        }
    }
    loop {
        let _ended = call!(SYS_exit_group, EXIT_UNBORN);
    }
}

fn perform(step: &Step, prepared: &Prepared<'_>, report: &mut RawFd) -> Done {
    match *step {
        Step::NewSession => new_session(),
        Step::OutOfMemory { adjust } => {
            let mut text = [0u8; 10];
            let text = decimal(adjust.into(), &mut text);
            write_file(prepared.proc_dir, c"self/oom_score_adj", text)
        }
        Step::NeverMerge => {
            let never = call!(SYS_prctl, PR_SET_MEMORY_MERGE, 0u64, 0u64, 0u64, 0u64);
            // A kernel that does not know the call merges nothing that was not advised.
            never.or_else(|errno| unless(errno, &[Errno::EINVAL]))
        }
        Step::GiveUpSpeculation { which } => {
            let (which, off) = (u64::from(which), u64::from(libc::PR_SPEC_FORCE_DISABLE));
            let given = call!(
                SYS_prctl,
                libc::PR_SET_SPECULATION_CTRL,
                which,
                off,
                0u64,
                0u64
            );
            // No switch, or one that the host's administrator has set for good.
            let without = [Errno::ENXIO, Errno::EPERM, Errno::ENODEV, Errno::EINVAL];
            given.or_else(|errno| unless(errno, &without))
        }
        Step::JoinNetwork => call!(SYS_setns, prepared.network, libc::CLONE_NEWNET),
        Step::JoinEmptyRoot => call!(SYS_setns, prepared.root, libc::CLONE_NEWNS),
        Step::BecomeUser(user) => become_user(id_of(user, prepared.proc_dir)?),
        Step::Unshare { flags } => call!(SYS_unshare, flags),
        Step::MapUser => map_user(prepared),
        Step::TakeFolder => take_folder(prepared.folder.as_ref()),
        Step::EmptyRoot => empty_root(),
        Step::Limit { resource, value } => set_limit(resource, value),
        Step::DropCapabilities => drop_capabilities(),
        Step::NoNewPrivileges => {
            call!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1u64, 0u64, 0u64, 0u64)
        }
        Step::PlaceDescriptors => place_descriptors(prepared, report),
        Step::Execute => {
            let argv = [prepared.name.as_ptr(), std::ptr::null()];
            let envp = [std::ptr::null::<libc::c_char>()];
            // The program's descriptor was placed right behind the granted ones.
            let program = program_number(prepared);
            let (argv, envp) = (argv.as_ptr(), envp.as_ptr());
            call!(
                SYS_execveat,
                program,
                c"".as_ptr(),
                argv,
                envp,
                libc::AT_EMPTY_PATH
            )
        }
    }
}

/// Nothing happened, when that is for one of the reasons that do not matter.
fn unless(errno: Errno, harmless: &[Errno]) -> Done {
    match harmless.contains(&errno) {
        true => Ok(0),
        false => Err(errno),
    }
}

/// `number` in decimal digits, in `text`.
fn decimal(number: u32, text: &mut [u8; 10]) -> &[u8] {
    let mut rest = number;
    let mut first = text.len();
    for place in text.iter_mut().rev() {
        *place = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        first -= 1;
        if rest == 0 {
            break;
        }
    }
    text.get(first..).unwrap_or(&[])
}

fn new_session() -> Done {
    call!(SYS_setsid)?;
    let none = 0u64;
    let old = std::ptr::null_mut::<u64>();
    call!(
        SYS_rt_sigprocmask,
        libc::SIG_SETMASK,
        &raw const none,
        old,
        size_of::<u64>()
    )
}

/// Its pid on the host, from the host's `/proc`: inside its pid namespace it would be 1.
fn host_pid(proc_dir: RawFd) -> Result<u32, Errno> {
    let mut text = [0u8; 16];
    let len = call!(
        SYS_readlinkat,
        proc_dir,
        c"self".as_ptr(),
        text.as_mut_ptr(),
        text.len()
    )?;
    let len = usize::try_from(len).unwrap_or(0);
    let digits = text.get(..len).unwrap_or(&[]);
    let pid = digits.iter().try_fold(0u32, |pid, &digit| {
        let digit = u32::from(digit.checked_sub(b'0')?);
        pid.checked_mul(10)?.checked_add(digit)
    });
    pid.filter(|&pid| pid > 0).ok_or(Errno::ESRCH)
}

/// The new user's id. ERANGE when the kernel gives larger pids than when the range was checked.
fn id_of(user: NewUser, proc_dir: RawFd) -> Result<u32, Errno> {
    user.id(host_pid(proc_dir)?).ok_or(Errno::ERANGE)
}

fn become_user(id: u32) -> Done {
    call!(SYS_setgroups, 0u64, std::ptr::null::<u32>())?;
    call!(SYS_setresgid, id, id, id)?;
    call!(SYS_setresuid, id, id, id)?;
    // Its files in /proc belong to root otherwise, and it could not map its user.
    call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1u64, 0u64, 0u64, 0u64)
}

fn write_file(directory: RawFd, name: &CStr, text: &[u8]) -> Done {
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    let fd = call!(SYS_openat, directory, name.as_ptr(), flags, 0)?;
    let written = call!(SYS_write, fd, text.as_ptr(), text.len());
    call!(SYS_close, fd)?;
    written
}

/// Writes "inside outside 1" into `text` and returns its length.
fn map_line(inside: u32, outside: u32, text: &mut [u8; 32]) -> usize {
    let mut len = 0;
    let mut put = |byte: u8| {
        if let Some(place) = text.get_mut(len) {
            *place = byte;
            len += 1;
        }
    };
    for number in [inside, outside, 1] {
        let mut digits = [0u8; 10];
        decimal(number, &mut digits).iter().for_each(|&b| put(b));
        put(b' ');
    }
    len
}

fn map_user(prepared: &Prepared<'_>) -> Done {
    let became = prepared.steps.iter().find_map(|step| match *step {
        Step::BecomeUser(user) => Some(user),
        _ => None,
    });
    let (user, group) = match became {
        Some(user) => {
            let id = id_of(user, prepared.proc_dir)?;
            (id, id)
        }
        None => prepared.broker_ids,
    };
    let mut text = [0u8; 32];
    write_file(prepared.proc_dir, c"self/setgroups", b"deny")?;
    let len = map_line(prepared.inside.0, user, &mut text);
    write_file(
        prepared.proc_dir,
        c"self/uid_map",
        text.get(..len).unwrap_or(&[]),
    )?;
    let len = map_line(prepared.inside.1, group, &mut text);
    write_file(
        prepared.proc_dir,
        c"self/gid_map",
        text.get(..len).unwrap_or(&[]),
    )
}

/// The folder's path leads to the same directory in this mount namespace, unless it was moved since: then the
/// process is not born.
fn take_folder(folder: Option<&Folder<'_>>) -> Done {
    let Some(folder) = folder else {
        return Err(Errno::EBADF);
    };
    let path = folder.path.as_ptr();
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned();
    let recursive = libc::AT_RECURSIVE.cast_unsigned();
    let open = |flags: u32| call!(SYS_open_tree, libc::AT_FDCWD, path, flags);
    // What is mounted below may hide what an unprivileged user must not see, so it comes along then.
    let (mount, below) = match open(flags) {
        Err(Errno::EINVAL) => (open(flags | recursive)?, recursive),
        mount => (mount?, 0),
    };
    let attributes = MountAttributes::of_folder(folder.read_only);
    call!(
        SYS_mount_setattr,
        mount,
        c"".as_ptr(),
        libc::AT_EMPTY_PATH.cast_unsigned() | below,
        &raw const attributes,
        size_of::<MountAttributes>()
    )?;
    let mut identities = [(0u64, 0u64); 2];
    for (fd, identity) in [mount, folder.fd.into()].into_iter().zip(&mut identities) {
        let mut about = std::mem::MaybeUninit::<libc::stat>::zeroed();
        let (empty, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
        call!(SYS_newfstatat, fd, empty, about.as_mut_ptr(), flags)?;
        // SAFETY: all zeroes are a `stat`, and the kernel has filled it.
        let about = unsafe { about.assume_init() };
        *identity = (about.st_dev, about.st_ino);
    }
    let [made, meant] = identities;
    if made != meant {
        return Err(Errno::ESTALE);
    }
    call!(SYS_dup3, mount, folder.fd, libc::O_CLOEXEC)
}

fn empty_root() -> Done {
    let none = std::ptr::null::<libc::c_char>();
    let private = libc::MS_REC | libc::MS_PRIVATE;
    call!(SYS_mount, none, c"/".as_ptr(), none, private, none)?;
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let (kind, options) = (c"tmpfs".as_ptr(), c"size=4k,nr_inodes=2,mode=0555".as_ptr());
    call!(
        SYS_mount,
        c"hollow".as_ptr(),
        c"/proc".as_ptr(),
        kind,
        flags,
        options
    )?;
    call!(SYS_chdir, c"/proc".as_ptr())?;
    call!(SYS_pivot_root, c".".as_ptr(), c".".as_ptr())?;
    call!(SYS_umount2, c".".as_ptr(), libc::MNT_DETACH)
}

/// Sets both limits to `value`, or to the host's hard limit where that is lower and we may not raise
/// it: the host's own word is the tighter one then.
fn set_limit(resource: libc::__rlimit_resource_t, value: u64) -> Done {
    let mut host = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let keep = std::ptr::null::<libc::rlimit64>();
    let get = |host: *mut libc::rlimit64| call!(SYS_prlimit64, 0, resource, keep, host);
    let set = |value: u64| {
        let limit = libc::rlimit64 {
            rlim_cur: value,
            rlim_max: value,
        };
        let old = std::ptr::null_mut::<libc::rlimit64>();
        call!(SYS_prlimit64, 0, resource, &raw const limit, old)
    };
    match set(value) {
        Err(Errno::EPERM) => {
            get(&raw mut host)?;
            set(value.min(host.rlim_max))
        }
        done => done,
    }
}

fn drop_capabilities() -> Done {
    for capability in 0..CAPABILITIES {
        match call!(
            SYS_prctl,
            libc::PR_CAPBSET_DROP,
            capability,
            0u64,
            0u64,
            0u64
        ) {
            // The first number that the kernel does not know ends the list.
            Err(Errno::EINVAL) => break,
            other => other?,
        };
    }
    let clear = i64::from(libc::PR_CAP_AMBIENT_CLEAR_ALL);
    call!(SYS_prctl, libc::PR_CAP_AMBIENT, clear, 0u64, 0u64, 0u64)?;
    let header = [CAPABILITY_VERSION, 0];
    let nothing = [0u32; 6];
    call!(SYS_capset, header.as_ptr(), nothing.as_ptr())
}

/// Number of the program's descriptor once the others are placed.
fn program_number(prepared: &Prepared<'_>) -> RawFd {
    RawFd::try_from(prepared.descriptors.len()).unwrap_or(RawFd::MAX)
}

fn place_descriptors(prepared: &Prepared<'_>, report: &mut RawFd) -> Done {
    // Set every source aside first, so that placing one cannot overwrite another.
    let last = [prepared.program, *report];
    let sources = || prepared.descriptors.iter().chain(&last);
    let mut aside = [-1 as RawFd; super::DESCRIPTORS_MAX + 2];
    for (place, &source) in aside.iter_mut().zip(sources()) {
        let fd = call!(SYS_fcntl, source, libc::F_DUPFD_CLOEXEC, ASIDE_FD)?;
        *place = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    }
    let program = program_number(prepared);
    for (number, &source) in (0..).zip(aside.iter().take_while(|&&fd| fd >= 0)) {
        let flags = if number >= program {
            libc::O_CLOEXEC
        } else {
            0
        };
        call!(SYS_dup3, source, number, flags)?;
    }
    *report = program + 1;
    call!(SYS_close_range, program + 2, u32::MAX, 0)
}
