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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn connections_are_taken_one_by_one_and_do_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(accept(&listener).unwrap().is_none());
        let _clients = [(); 2].map(|()| UnixStream::connect(&path).unwrap());
        for _ in 0..2 {
            let mut taken = UnixStream::from(accept(&listener).unwrap().unwrap());
            let nothing = taken.read(&mut [0; 1]).unwrap_err();
            assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
        }
        assert!(accept(&listener).unwrap().is_none());
    }
}
