//! Control channels: one SOCK_SEQPACKET pair per process, one message per packet.
//!
//! A packet is a postcard-encoded value of at most [`MESSAGE_BYTES_MAX`] bytes, with at most
//! [`FDS_MAX`] file descriptors. Sending never blocks (MSG_DONTWAIT): a peer that does not read is
//! reported as [`ChannelError::Full`], and the owner decides what that peer is worth. Receiving
//! either does not block or has a deadline.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Largest encoded message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest number of file descriptors in one message.
pub const FDS_MAX: usize = 16;

/// Why a control message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer has closed its end (usually: it died).
    #[error("the peer closed the control channel")]
    Closed,
    /// The peer does not read; nothing was sent.
    #[error("the control channel is full: the peer does not read")]
    Full,
    /// Nothing arrived in time.
    #[error("no control message within {0:?}")]
    TimedOut(Duration),
    /// A packet longer than allowed, or with more descriptors than allowed.
    #[error("control message too large: {got} bytes or descriptors, at most {limit}")]
    TooLarge {
        /// What arrived or was to be sent.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// The bytes are no message of the expected type.
    #[error("malformed control message: {0}")]
    Malformed(postcard::Error),
    /// The kernel refused.
    #[error("control channel: {0}")]
    Os(#[from] Errno),
}

/// A message with what came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// Descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// Process id of the sender in the receiver's pid namespace, where the socket asks for it.
    pub sender: Option<i32>,
}

/// One end of a control channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Makes a connected pair; both ends are close-on-exec and non-blocking in use.
    ///
    /// # Errors
    /// The kernel's errno (EMFILE, ENFILE, ENOMEM).
    pub fn pair() -> Result<(Self, Self), Errno> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Sends one message with descriptors attached. Never blocks.
    ///
    /// # Errors
    /// [`ChannelError::Full`] when the peer does not read, [`ChannelError::Closed`] when it is gone.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = postcard::to_stdvec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(ChannelError::TooLarge {
                got: bytes.len(),
                limit: MESSAGE_BYTES_MAX,
            });
        }
        if fds.len() > FDS_MAX {
            return Err(ChannelError::TooLarge {
                got: fds.len(),
                limit: FDS_MAX,
            });
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            let sent = sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                flags,
                None,
            );
            return match sent {
                Ok(_) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN | Errno::ENOBUFS) => Err(ChannelError::Full),
                Err(Errno::EPIPE | Errno::ECONNRESET) => Err(ChannelError::Closed),
                Err(e) => Err(e.into()),
            };
        }
    }

    /// Receives one message if there is one. Never blocks. Descriptors arrive close-on-exec.
    ///
    /// # Errors
    /// As [`ChannelError`]; after [`ChannelError::Malformed`] or [`ChannelError::TooLarge`] the
    /// packet is gone and its descriptors are closed.
    pub fn try_recv<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        let received = self.try_recv_from()?;
        Ok(received.map(|received| (received.message, received.fds)))
    }

    /// As [`Channel::try_recv`], with what the kernel says about the sender where the socket is set
    /// to ask for it (SO_PASSCRED).
    ///
    /// # Errors
    /// As [`Channel::try_recv`].
    pub fn try_recv_from<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, ChannelError> {
        // Room for what is there and no more: a process that never hears long messages shall not
        // have the longest in its memory.
        let Some(waiting) = self.next_len()? else {
            return Ok(None);
        };
        let mut buffer = vec![0u8; waiting.min(MESSAGE_BYTES_MAX)];
        let (len, Ancillary { fds, sender }, truncated) = loop {
            let mut space = nix::cmsg_space!([RawFd; FDS_MAX], nix::sys::socket::UnixCredentials);
            let mut iov = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
                Ok(message) => {
                    let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
                    let (len, truncated) = (message.bytes, message.flags.intersects(cut));
                    break (len, take_control(&space), truncated);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(e) => return Err(e.into()),
            }
        };
        // The room for the sender's name would hold a few descriptors too.
        if truncated || fds.len() > FDS_MAX {
            return Err(ChannelError::TooLarge {
                got: len,
                limit: MESSAGE_BYTES_MAX,
            });
        }
        if len == 0 {
            return Err(ChannelError::Closed);
        }
        let bytes = buffer.get(..len).unwrap_or_default();
        let (message, rest) = postcard::take_from_bytes(bytes).map_err(ChannelError::Malformed)?;
        if !rest.is_empty() {
            return Err(ChannelError::Malformed(
                postcard::Error::DeserializeBadEncoding,
            ));
        }
        Ok(Some(Received {
            message,
            fds,
            sender,
        }))
    }

    /// Length in bytes of the next packet: 0 at the end of the connection, `None` when there is none.
    fn next_len(&self) -> Result<Option<usize>, ChannelError> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        loop {
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut [], None, flags) {
                Ok(message) => return Ok(Some(message.bytes)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives one message, waiting at most `within`.
    ///
    /// # Errors
    /// [`ChannelError::TimedOut`] when nothing came; otherwise as [`Channel::try_recv`].
    pub fn recv_within<T: DeserializeOwned>(
        &self,
        within: Duration,
    ) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(message) = self.try_recv()? {
                return Ok(message);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::TimedOut(within));
            }
            let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1))
                .unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// What comes with a packet besides its bytes.
#[derive(Debug, Default)]
pub(crate) struct Ancillary {
    pub(crate) fds: Vec<OwnedFd>,
    /// Process id of the sender in our pid namespace, as the kernel says.
    pub(crate) sender: Option<i32>,
}

/// Takes ownership of every descriptor that the kernel has just put into `control`, a buffer that was
/// zero before. `nix` shows none of them when the peer sent more than fit, and they would stay open.
#[expect(
    unsafe_code,
    reason = "descriptors that the kernel just installed become owned"
)]
pub(crate) fn take_control(control: &[u8]) -> Ancillary {
    const HEADER_BYTES: usize = size_of::<libc::cmsghdr>();
    let mut taken = Ancillary::default();
    let mut rest = control;
    while let Some((header, _)) = rest.split_first_chunk::<HEADER_BYTES>() {
        let [length @ .., l0, l1, l2, l3, t0, t1, t2, t3] = *header;
        let length = usize::from_ne_bytes(length);
        let Some(data) = rest.get(HEADER_BYTES..length) else {
            break;
        };
        let level = i32::from_ne_bytes([l0, l1, l2, l3]);
        match (level, i32::from_ne_bytes([t0, t1, t2, t3])) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for &fd in data.as_chunks::<{ size_of::<RawFd>() }>().0 {
                    let fd = RawFd::from_ne_bytes(fd);
                    // SAFETY: the kernel made this descriptor for us in recvmsg; nobody else knows it.
                    taken.fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
            // struct ucred begins with the pid.
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                taken.sender = data.first_chunk().copied().map(i32::from_ne_bytes);
            }
            _ => {}
        }
        rest = rest
            .get(length.next_multiple_of(align_of::<libc::cmsghdr>())..)
            .unwrap_or_default();
    }
    taken
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_and_descriptor_arrive_together() {
        let (a, b) = Channel::pair().unwrap();
        let (_other, extra) = Channel::pair().unwrap();
        a.send(&(7u32, "seven".to_owned()), &[extra.as_fd()])
            .unwrap();
        let ((n, s), fds) = b
            .recv_within::<(u32, String)>(Duration::from_secs(1))
            .unwrap();
        assert_eq!((n, s.as_str(), fds.len()), (7, "seven", 1));
        assert!(b.try_recv::<u32>().unwrap().is_none());
    }

    #[test]
    fn peer_that_does_not_read_is_full_and_does_not_block() {
        let (a, _b) = Channel::pair().unwrap();
        let big = vec![0u8; 32 * 1024];
        let full = (0..100).any(|_| matches!(a.send(&big, &[]), Err(ChannelError::Full)));
        assert!(full);
    }

    #[test]
    fn closed_and_malformed_are_told_apart() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&"text".to_owned(), &[]).unwrap();
        assert!(matches!(
            b.try_recv::<(u64, u64, u64)>(),
            Err(ChannelError::Malformed(_))
        ));
        a.send(&(1u8, 2u8), &[]).unwrap();
        assert!(matches!(
            b.try_recv::<u8>(),
            Err(ChannelError::Malformed(_))
        ));
        drop(a);
        assert!(matches!(b.try_recv::<u8>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn oversized_message_is_refused_before_it_is_sent() {
        let (a, _b) = Channel::pair().unwrap();
        let big = vec![0u8; MESSAGE_BYTES_MAX + 1];
        assert!(matches!(
            a.send(&big, &[]),
            Err(ChannelError::TooLarge { .. })
        ));
    }

    #[test]
    fn descriptors_of_a_message_with_too_many_are_closed() {
        let (a, b) = Channel::pair().unwrap();
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let many = vec![write.as_raw_fd(); FDS_MAX + 5];
        let sent = sendmsg::<()>(
            a.as_raw_fd(),
            &[IoSlice::new(&[7])],
            &[ControlMessage::ScmRights(&many)],
            MsgFlags::empty(),
            None,
        );
        assert_eq!(sent, Ok(1));
        drop(write);
        assert!(matches!(
            b.try_recv::<u8>(),
            Err(ChannelError::TooLarge { .. })
        ));
        // The end of the pipe: nobody holds a writing end any more.
        assert_eq!(nix::unistd::read(&read, &mut [0; 1]), Ok(0));
        assert!(b.try_recv::<u8>().unwrap().is_none());
    }

    #[test]
    fn silence_times_out() {
        let (_a, b) = Channel::pair().unwrap();
        let r = b.recv_within::<u8>(Duration::from_millis(5));
        assert!(matches!(r, Err(ChannelError::TimedOut(_))));
    }
}
