//! Making a thread return from whatever system call it is in: a signal that does nothing.
//!
//! The control thread kicks vCPU threads, nobody else. The handler is installed before the process
//! is locked, since `rt_sigaction` is denied afterwards.
#![allow(
    unsafe_code,
    reason = "signal dispositions and tgkill have no safe wrapper"
)]

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet};
use nix::unistd::{Pid, getpid, gettid};

/// Name of a thread for [`Kick::thread`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadId(Pid);

impl ThreadId {
    /// The calling thread.
    #[must_use]
    pub fn current() -> Self {
        Self(gettid())
    }
}

/// The right to kick threads of this process: the handler is installed.
#[derive(Debug, Clone, Copy)]
pub struct Kick {
    process: Pid,
}

extern "C" fn do_nothing(_signal: libc::c_int) {}

impl Kick {
    /// Installs the handler. System calls are not restarted after it.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn install() -> Result<Self, Errno> {
        let action = SigAction::new(
            SigHandler::Handler(do_nothing),
            SaFlags::empty(),
            SigSet::empty(),
        );
        let mut raw: libc::sigaction = action.into();
        // SAFETY: the structure is complete and the handler touches nothing.
        let done = unsafe { libc::sigaction(libc::SIGRTMIN(), &raw mut raw, std::ptr::null_mut()) };
        Errno::result(done)?;
        Ok(Self { process: getpid() })
    }

    /// Sends the signal. A thread that has ended cannot be kicked, which is fine.
    pub fn thread(&self, thread: ThreadId) {
        // SAFETY: the call takes three integers.
        unsafe {
            libc::syscall(
                libc::SYS_tgkill,
                self.process.as_raw(),
                thread.0.as_raw(),
                libc::SIGRTMIN(),
            )
        };
    }
}
