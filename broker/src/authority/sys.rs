//! System calls that look at other processes and that no crate wraps: duplicates of their
//! descriptors, and their seccomp filters.
#![allow(
    unsafe_code,
    reason = "pidfd_getfd and PTRACE_SECCOMP_GET_FILTER have no safe interface"
)]

use bulkhead_policies::evaluate::Instruction;
use nix::errno::Errno;
use nix::sys::ptrace::Options;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// A handle of process `pid`.
pub(crate) fn open_process(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: plain integers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A duplicate of descriptor `number` of another process.
///
/// # Errors
/// EBADF when the process has none of that number, EPERM when we may not look.
pub(crate) fn duplicate(process: BorrowedFd<'_>, number: RawFd) -> Result<OwnedFd, Errno> {
    let process = process.as_raw_fd();
    // SAFETY: plain integers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, number, 0u32) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A thread that is stopped under ptrace until this is dropped.
#[derive(Debug)]
pub(super) struct Stopped(i32);

impl Stopped {
    pub(super) fn seize(thread: i32, options: Options) -> Result<Self, Errno> {
        nix::sys::ptrace::seize(Pid::from_raw(thread), options)?;
        let stopped = Self(thread);
        request(libc::PTRACE_INTERRUPT, thread, 0, ptr::null_mut())?;
        waitpid(Pid::from_raw(thread), Some(WaitPidFlag::__WALL))?;
        Ok(stopped)
    }

    /// Filter number `index`, the oldest first; none past the newest. Needs CAP_SYS_ADMIN.
    pub(super) fn filter(&self, index: usize) -> Result<Option<Vec<Instruction>>, Errno> {
        const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
        let get = |to| request(PTRACE_SECCOMP_GET_FILTER, self.0, index, to);
        let len = match get(ptr::null_mut()) {
            Ok(len) => usize::try_from(len).map_err(|_| Errno::EOVERFLOW)?,
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        let empty = libc::sock_filter {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        };
        let mut raw = vec![empty; len];
        get(raw.as_mut_ptr().cast())?;
        let decode = |f: libc::sock_filter| Instruction {
            code: f.code,
            if_true: f.jt,
            if_false: f.jf,
            operand: f.k,
        };
        Ok(Some(raw.into_iter().map(decode).collect()))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended meanwhile; there is nothing to let go of then.
        let _gone = request(libc::PTRACE_DETACH, self.0, 0, ptr::null_mut());
    }
}

fn request(
    request: libc::c_uint,
    thread: i32,
    address: usize,
    data: *mut libc::c_void,
) -> Result<libc::c_long, Errno> {
    // SAFETY: `data` is null or points to as many records as the kernel said it will write; no
    // other request used here touches our memory.
    let result = unsafe { libc::ptrace(request, thread, address, data) };
    Errno::result(result)
}
