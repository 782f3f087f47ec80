//! Waiting for descriptors, always with a deadline or a kick in reach: one system call, `ppoll`.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// Waits until `fd` can be read, `within` is over or a signal arrives. Returns whether it can.
#[must_use]
pub fn readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    any_ready([(fd, false)], Some(within)) == [true]
}

/// Waits until one of `fds` can be read (or has been closed by its peer), or written where that is
/// wanted too (`true`), `within` is over or a signal arrives. Returns which can.
#[must_use]
pub fn any_ready<const N: usize>(
    fds: [(BorrowedFd<'_>, bool); N],
    within: Option<Duration>,
) -> [bool; N] {
    let mut polled = fds.map(|(fd, write)| {
        let wanted = match write {
            true => PollFlags::POLLIN | PollFlags::POLLOUT,
            false => PollFlags::POLLIN,
        };
        PollFd::new(fd, wanted)
    });
    match ppoll(&mut polled, within.map(TimeSpec::from_duration), None) {
        Ok(ready) if ready > 0 => polled.map(|fd| fd.any().unwrap_or(true)),
        // Nothing, or EINTR; other errors cannot happen with open descriptors.
        _ => [false; N],
    }
}

/// Borrows the descriptor of an object that does not lend it itself.
#[expect(unsafe_code, reason = "EventFd cannot be borrowed as a descriptor")]
pub fn lend<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: owners of descriptors keep them open; this one is borrowed meanwhile.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
