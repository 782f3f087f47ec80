//! The program's standard streams, written without ever blocking.
//!
//! O_NONBLOCK belongs to the open file description, which a terminal shares with the shell and a
//! pipe with its other writers; setting it there would break them. So pipes and terminals are
//! opened a second time through /proc, sockets are written with MSG_DONTWAIT, and what cannot be
//! opened again is written in pieces small enough for poll's promise.

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// POSIX lets a pipe that polls writable take this much without blocking (PIPE_BUF).
const SAFE_BYTES: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Its own open file description, non-blocking.
    Own,
    /// A socket.
    Socket,
    /// A regular file, or something that cannot be opened again.
    Shared,
}

/// A stream to write to.
#[derive(Debug)]
pub(crate) struct OutStream {
    fd: OwnedFd,
    how: How,
}

impl OutStream {
    /// A stream to where `fd` leads.
    pub(crate) fn new(fd: impl AsFd) -> io::Result<Self> {
        let fd = fd.as_fd();
        let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFIFO || kind == SFlag::S_IFCHR {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            if let Ok(fd) = open(path.as_str(), flags, Mode::empty()) {
                return Ok(Self { fd, how: How::Own });
            }
        }
        let how = if kind == SFlag::S_IFSOCK {
            How::Socket
        } else {
            How::Shared
        };
        let fd = fd.try_clone_to_owned()?;
        Ok(Self { fd, how })
    }

    /// Writes what can be written now; call when poll says so. `None`: nothing, try later.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let result = match self.how {
            How::Own => nix::unistd::write(&self.fd, bytes),
            How::Socket => send(
                self.fd.as_raw_fd(),
                bytes,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            ),
            How::Shared => {
                let piece = bytes.get(..SAFE_BYTES).unwrap_or(bytes);
                nix::unistd::write(&self.fd, piece)
            }
        };
        match result {
            Ok(n) => Ok(Some(n)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for OutStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
