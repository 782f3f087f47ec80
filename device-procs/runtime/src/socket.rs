//! Sockets of a process that serves: taking connections of the listener that it was born with.

use crate::sys;
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};

/// Takes the next connection of `listener`, which does not block. `None` when there is none.
///
/// # Errors
/// The kernel's errno; that of a client which is gone already is none.
pub fn accept(listener: impl AsFd) -> Result<Option<OwnedFd>, Errno> {
    loop {
        return match sys::accept(listener.as_fd()) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno),
        };
    }
}
