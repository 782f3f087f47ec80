//! Memory and descriptors of a process that waits for our answer.
#![allow(
    unsafe_code,
    reason = "pidfd_open and pidfd_getfd, whose results become owned"
)]

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn remote(address: u64, len: usize) -> Result<RemoteIoVec, Errno> {
    let base = usize::try_from(address).map_err(|_| Errno::EFAULT)?;
    Ok(RemoteIoVec { base, len })
}

/// `len` bytes of a process at `address`.
///
/// # Errors
/// EFAULT when not all of them are mapped, ESRCH when the process is gone.
pub fn read(pid: i32, address: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; len];
    if len == 0 {
        return Ok(bytes);
    }
    let from = [remote(address, len)?];
    let into = &mut [IoSliceMut::new(&mut bytes)];
    match process_vm_readv(Pid::from_raw(pid), into, &from)? {
        n if n == len => Ok(bytes),
        _ => Err(Errno::EFAULT),
    }
}

/// Writes to a process's memory at `address`.
///
/// # Errors
/// EFAULT when not all of it is mapped and writable, ESRCH when the process is gone.
pub fn write(pid: i32, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    if bytes.is_empty() {
        return Ok(());
    }
    let into = [remote(address, bytes.len())?];
    match process_vm_writev(Pid::from_raw(pid), &[IoSlice::new(bytes)], &into)? {
        n if n == bytes.len() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// The process that a thread belongs to.
#[must_use]
pub fn thread_group(thread: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

/// A duplicate of descriptor `fd` of process `pid`.
///
/// # Errors
/// ESRCH when the process is gone, EBADF when it has no such descriptor.
pub fn take_descriptor(pid: i32, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: plain integers.
    let handle = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let handle = i32::try_from(handle).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let handle = unsafe { OwnedFd::from_raw_fd(handle) };
    let raw = handle.as_raw_fd();
    // SAFETY: plain integers.
    let taken = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, raw, fd, 0) })?;
    let taken = i32::try_from(taken).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(taken) })
}
