//! Questions that only the kernel itself can answer. Nothing is changed by asking.
#![allow(
    unsafe_code,
    reason = "KVM's and Landlock's version queries have no safe wrappers"
)]

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use std::os::fd::{AsRawFd, OwnedFd};

/// Capabilities of KVM that machines cannot do without, with their numbers (linux/kvm.h).
pub const CAPABILITIES: [(&str, i32); 10] = [
    ("KVM_CAP_IRQCHIP", 0),
    ("KVM_CAP_USER_MEMORY", 3),
    ("KVM_CAP_SET_TSS_ADDR", 4),
    ("KVM_CAP_EXT_CPUID", 7),
    ("KVM_CAP_MP_STATE", 14),
    ("KVM_CAP_IRQFD", 32),
    ("KVM_CAP_PIT2", 33),
    ("KVM_CAP_IOEVENTFD", 36),
    ("KVM_CAP_SYNC_REGS", 74),
    ("KVM_CAP_IMMEDIATE_EXIT", 136),
];
const KVM_CAP_MAX_VCPUS: i32 = 66;

nix::ioctl_write_int_bad!(
    /// KVM_GET_API_VERSION
    kvm_get_api_version,
    nix::request_code_none!(0xae, 0x00)
);
nix::ioctl_write_int_bad!(
    /// KVM_CHECK_EXTENSION
    kvm_check_extension,
    nix::request_code_none!(0xae, 0x03)
);

/// What KVM says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kvm {
    /// API version; 12 since 2007.
    pub api_version: i32,
    /// Names of [`CAPABILITIES`] that it lacks.
    pub lacking: Vec<&'static str>,
    /// Most vCPUs of one machine.
    pub vcpus_max: i32,
}

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// KVM, or why it cannot be opened.
    pub kvm: Result<Kvm, Errno>,
    /// Best Landlock ABI, 0 for none.
    pub landlock_abi: i64,
    /// Whether core scheduling is there: `Ok`, or why not.
    pub core_scheduling: Result<(), Errno>,
    /// Whether a user namespace with pid, mount, ipc, uts and net namespaces can be made.
    pub user_namespace: Result<(), Errno>,
    /// Whether an io_uring can be made.
    pub io_uring: Result<(), Errno>,
    /// Whether random numbers are there without waiting.
    pub entropy: Result<(), Errno>,
    /// Whether this is root.
    pub is_root: bool,
}

impl Probed {
    /// Asks the running kernel. Call while the program has one thread: it forks a child.
    #[must_use]
    pub fn running_kernel() -> Self {
        Self {
            kvm: kvm(),
            landlock_abi: landlock_abi(),
            core_scheduling: core_scheduling(),
            user_namespace: user_namespace(),
            io_uring: io_uring(),
            entropy: entropy(),
            is_root: nix::unistd::geteuid().is_root(),
        }
    }
}

fn kvm() -> Result<Kvm, Errno> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let device: OwnedFd = open("/dev/kvm", flags, Mode::empty())?;
    // SAFETY: both requests take an integer and touch no memory of this process.
    let api_version = unsafe { kvm_get_api_version(device.as_raw_fd(), 0) }?;
    let check = |number: i32| {
        // SAFETY: as above.
        unsafe { kvm_check_extension(device.as_raw_fd(), number) }.unwrap_or(0)
    };
    let missing = CAPABILITIES
        .iter()
        .filter(|(_, number)| check(*number) <= 0);
    Ok(Kvm {
        api_version,
        lacking: missing.map(|(name, _)| *name).collect(),
        vcpus_max: check(KVM_CAP_MAX_VCPUS),
    })
}

fn landlock_abi() -> i64 {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_ulong = 1;
    // SAFETY: with this flag the call takes no pointer and only returns a number.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    }
    .max(0)
}

fn core_scheduling() -> Result<(), Errno> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_GET: libc::c_ulong = 0;
    let mut cookie = 0u64;
    // SAFETY: the call writes eight bytes to `cookie`.
    let result = unsafe {
        libc::prctl(
            PR_SCHED_CORE,
            PR_SCHED_CORE_GET,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
            &raw mut cookie,
        )
    };
    Errno::result(result).map(drop)
}

/// Makes the namespaces in a child that exits at once.
fn user_namespace() -> Result<(), Errno> {
    // SAFETY: this program has one thread here, and the child calls async-signal-safe functions.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let flags = CloneFlags::CLONE_NEWUSER
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWNET;
            let code = unshare(flags).err().map_or(0, |errno| errno as i32);
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, errno) => Err(Errno::from_raw(errno)),
            _ => Err(Errno::ECHILD),
        },
    }
}

fn io_uring() -> Result<(), Errno> {
    let mut parameters = [0u8; 120];
    // SAFETY: io_uring_params has 120 bytes, all of which may be zero.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, parameters.as_mut_ptr()) };
    let fd = Errno::result(fd)?;
    if let Ok(fd) = i32::try_from(fd) {
        // SAFETY: the descriptor was made above and belongs to nobody else.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

fn entropy() -> Result<(), Errno> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer has eight bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), 8, libc::GRND_NONBLOCK) };
    Errno::result(got).map(drop)
}
