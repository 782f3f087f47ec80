//! The listener: notifications come in, answers go out.
#![allow(unsafe_code, reason = "the ioctls of a seccomp listener")]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

mod ioctl {
    nix::ioctl_readwrite!(receive, b'!', 0, libc::seccomp_notif);
    nix::ioctl_readwrite!(send, b'!', 1, libc::seccomp_notif_resp);
    nix::ioctl_write_ptr!(is_valid, b'!', 2, u64);
}

/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`.
const CONTINUE: u32 = 1;

/// A system call that waits for our answer. Dropped without one, it goes on as if nobody had looked.
#[derive(Debug)]
pub struct Notification {
    listener: Arc<OwnedFd>,
    id: u64,
    answered: bool,
    /// The thread, in our pid namespace.
    pub thread: i32,
    /// Number of the call.
    pub number: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

impl Notification {
    /// Whether the call still waits: memory that was read before is that of this thread.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        // SAFETY: the kernel reads one integer of ours.
        unsafe { ioctl::is_valid(self.listener.as_raw_fd(), &raw const self.id) }.is_ok()
    }

    /// Lets the call happen.
    pub fn go_on(mut self) {
        self.answer(0, 0, CONTINUE);
    }

    /// The call returns `value` and does not happen.
    pub fn returns(mut self, value: i64) {
        self.answer(value, 0, 0);
    }

    /// The call fails and does not happen.
    pub fn fails(mut self, errno: Errno) {
        self.answer(0, -(errno as i32), 0);
    }

    fn answer(&mut self, val: i64, error: i32, flags: u32) {
        self.answered = true;
        let mut response = libc::seccomp_notif_resp {
            id: self.id,
            val,
            error,
            flags,
        };
        // Whoever was killed meanwhile needs none.
        // SAFETY: the kernel reads one structure of ours.
        let _gone = unsafe { ioctl::send(self.listener.as_raw_fd(), &raw mut response) };
    }
}

impl Drop for Notification {
    fn drop(&mut self) {
        if !self.answered {
            self.answer(0, 0, CONTINUE);
        }
    }
}

fn receive(listener: &Arc<OwnedFd>) -> Result<Notification, Errno> {
    // SAFETY: integers alone, which the kernel wants to be zero.
    let mut got: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills one structure of ours.
    unsafe { ioctl::receive(listener.as_raw_fd(), &raw mut got) }?;
    Ok(Notification {
        listener: Arc::clone(listener),
        id: got.id,
        answered: false,
        thread: i32::try_from(got.pid).unwrap_or(0),
        number: got.data.nr.cast_unsigned(),
        arguments: got.data.args,
    })
}

/// Serves a listener until no process has its filter any more. `handle` must not wait: all others do
/// meanwhile.
pub fn serve(listener: OwnedFd, handle: impl Fn(Notification)) {
    let listener = Arc::new(listener);
    loop {
        let mut wanted = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wanted, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(_) => return,
        }
        let seen = wanted[0].revents().unwrap_or(PollFlags::POLLHUP);
        if seen.contains(PollFlags::POLLIN) {
            // Killed before it was looked at: ENOENT.
            if let Ok(notification) = receive(&listener) {
                handle(notification);
            }
        } else if seen.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL) {
            return;
        }
    }
}
