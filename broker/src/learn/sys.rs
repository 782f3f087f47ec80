//! Starting a program under ptrace, waiting for tracees, and letting them go on: with signals as plain
//! numbers, since processes use real-time signals, for which `nix` has no names.
#![allow(
    unsafe_code,
    reason = "a child asks to be traced between fork and exec; waitpid and ptrace"
)]

use nix::errno::Errno;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Starts `command` as a tracee of the calling thread; it stops behind `exec`.
pub(super) fn spawn_traced(command: &mut Command) -> io::Result<Child> {
    let ask = || nix::sys::ptrace::traceme().map_err(io::Error::from);
    // SAFETY: the hook makes one system call and allocates nothing.
    unsafe { command.pre_exec(ask) }.spawn()
}

/// Why a tracee has stopped or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It has ended with this exit code.
    Exited(i32),
    /// A signal has ended it.
    Killed(i32),
    /// It is at the beginning or end of a system call.
    SystemCall,
    /// It has stopped for this PTRACE_EVENT.
    Event(i32),
    /// It is about to get this signal.
    Signal(i32),
}

/// Waits for news of any tracee. `None` when none is left.
pub(super) fn wait() -> Result<Option<(i32, News)>, Errno> {
    let mut status = 0;
    let pid = loop {
        // SAFETY: the kernel writes one number into a local variable.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        match Errno::result(pid) {
            Ok(pid) => break pid,
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(None),
            Err(errno) => return Err(errno),
        }
    };
    Ok(Some((pid, news(status))))
}

fn news(status: i32) -> News {
    if libc::WIFEXITED(status) {
        return News::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return News::Killed(libc::WTERMSIG(status));
    }
    match (libc::WSTOPSIG(status), status >> 16) {
        (libc::SIGTRAP, event) if event != 0 => News::Event(event),
        // PTRACE_O_TRACESYSGOOD
        (signal, _) if signal == libc::SIGTRAP | 0x80 => News::SystemCall,
        (signal, _) => News::Signal(signal),
    }
}

/// Lets a tracee go on, to its next system call or not; `signal` is delivered, 0 for none.
pub(super) fn resume(pid: i32, to_system_call: bool, signal: i32) -> Result<(), Errno> {
    let request = match to_system_call {
        true => libc::PTRACE_SYSCALL,
        false => libc::PTRACE_CONT,
    };
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: plain integers; these requests touch no memory of ours.
    let result = unsafe { libc::ptrace(request, pid, none, i64::from(signal)) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_news() {
        for (status, expected) in [
            (0x0700, News::Exited(7)),
            (9, News::Killed(9)),
            (0x857f, News::SystemCall),
            (0x0004_057f, News::Event(libc::PTRACE_EVENT_EXEC)),
            // SIGRTMIN, for which there are no names.
            (0x227f, News::Signal(34)),
        ] {
            assert_eq!(news(status), expected, "{status:#x}");
        }
    }
}
