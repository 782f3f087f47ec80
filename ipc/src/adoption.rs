//! Adoption sockets: how a broker finds a process that another broker has started.
//!
//! Every process is born with a datagram socket that its broker has bound to a name in the machine's
//! runtime directory. A new broker sends the process's token there, with a socket for the answer
//! ([`crate::protocol::adopt`]). A datagram is whole or not there, so the process keeps no half-known
//! stranger, waits for none and needs no system call beyond those that receive control messages:
//!
//! ```text
//!   look at the datagram, taking no descriptor ── wrong token ─▶ drop it with all that came with it
//!     └ right token: take it with its one descriptor ─▶ answer there, close it
//! ```
//!
//! Whoever may write to the socket can make the process look at datagrams and nothing else: none is
//! answered, kept or logged unless it proves to come from a broker of the machine.

use crate::channel::{Channel, ChannelError, take_control};
use crate::protocol::adopt::Adopt;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, recvmsg, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use subtle::ConstantTimeEq;

/// Longest datagram that is looked at: an encoded [`Adopt`] is shorter.
const DATAGRAM_BYTES_MAX: usize = 64;

/// What was at an adoption socket.
#[derive(Debug)]
pub enum Knock {
    /// Nothing.
    Nothing,
    /// Somebody who does not know the token. It is gone.
    Stranger,
    /// A broker of this machine.
    Broker {
        /// Its protocol version.
        version: u32,
        /// Where it wants the answer.
        reply: Channel,
    },
}

/// The process's end.
#[derive(Debug)]
pub struct AdoptionSocket {
    socket: OwnedFd,
}

impl From<OwnedFd> for AdoptionSocket {
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl AsFd for AdoptionSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AdoptionSocket {
    /// Takes the next datagram, if there is one. Never blocks.
    #[must_use]
    pub fn next(&self, token: &[u8; 32]) -> Knock {
        let mut bytes = [0; DATAGRAM_BYTES_MAX];
        let looked = self.receive(&mut bytes, None, MsgFlags::MSG_PEEK);
        let Ok(len) = looked else {
            return Knock::Nothing;
        };
        if !bytes
            .get(..len)
            .is_some_and(|datagram| knows(datagram, token))
        {
            // Without room for descriptors the kernel closes those that came with it.
            let _gone = self.receive(&mut [], None, MsgFlags::empty());
            return Knock::Stranger;
        }
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let taken = self.receive(&mut bytes, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC);
        let mut fds = take_control(&space).fds;
        // The datagram that was looked at, since nobody else reads here.
        let adopt = taken.ok().and_then(|len| read(bytes.get(..len)?));
        let reply = fds.pop();
        fds.into_iter().for_each(close);
        match (adopt, reply) {
            (Some(adopt), Some(reply)) => Knock::Broker {
                version: adopt.version,
                reply: Channel::from(reply),
            },
            (_, reply) => {
                reply.into_iter().for_each(close);
                Knock::Stranger
            }
        }
    }

    /// Length of the datagram, which may be more than fits into `bytes`.
    fn receive(
        &self,
        bytes: &mut [u8],
        mut space: Option<&mut [u8]>,
        flags: MsgFlags,
    ) -> Result<usize, Errno> {
        let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let mut iov = [IoSliceMut::new(bytes)];
        loop {
            let space = space.as_deref_mut();
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, space, flags) {
                Ok(message) => return Ok(message.bytes),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// Closes a descriptor by that system call and no other: dropping one asks first whether it is open
/// where debug assertions are on, which a locked process may not.
pub fn close(fd: impl Into<OwnedFd>) {
    // It was open, and nothing could be done about an error.
    let _closed = nix::unistd::close(fd.into());
}

fn read(datagram: &[u8]) -> Option<Adopt> {
    let (adopt, rest) = postcard::take_from_bytes::<Adopt>(datagram).ok()?;
    rest.is_empty().then_some(adopt)
}

fn knows(datagram: &[u8], token: &[u8; 32]) -> bool {
    read(datagram).is_some_and(|adopt| adopt.token.ct_eq(token).into())
}

/// The address of `name` in `directory`: by way of the descriptor, since an address holds 107 bytes
/// and directories may have longer names.
fn address(directory: BorrowedFd<'_>, name: &str) -> Result<UnixAddr, Errno> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    UnixAddr::new(&path.join(name))
}

/// Broker: makes the socket of a process to come and binds it to `name` in `directory`, for the
/// broker's user alone.
///
/// # Errors
/// The kernel's errno: EADDRINUSE when the name is taken.
pub fn bind_in(directory: BorrowedFd<'_>, name: &str) -> Result<AdoptionSocket, Errno> {
    let socket = datagram_socket()?;
    // The name gets the mode that the socket has.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &address(directory, name)?)?;
    Ok(AdoptionSocket { socket })
}

fn datagram_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::Datagram, flags, None)
}

/// Broker: asks the process behind `name` in `directory` to be adopted. Does not wait for the answer,
/// which comes over the channel ([`Channel::try_recv_from`]): an
/// [`Adopted`](crate::protocol::adopt::Adopted), or the end of the channel when the token is wrong.
///
/// # Errors
/// [`ChannelError::Closed`] when no process has the socket, [`ChannelError::Full`] when too many
/// datagrams wait there; asking again is harmless.
pub fn knock(
    directory: BorrowedFd<'_>,
    name: &str,
    message: &Adopt,
) -> Result<Channel, ChannelError> {
    let bytes = postcard::to_stdvec(message).map_err(ChannelError::Malformed)?;
    let (ours, theirs) = Channel::pair()?;
    setsockopt(&ours, sockopt::PassCred, &true)?;
    let socket = datagram_socket()?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        &[ControlMessage::ScmRights(&[theirs.as_raw_fd()])],
        flags,
        Some(&address(directory, name)?),
    );
    match sent {
        Ok(_) => Ok(ours),
        Err(Errno::EAGAIN | Errno::ENOBUFS) => Err(ChannelError::Full),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Err(ChannelError::Closed),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ident::{ProcId, ProcKind};
    use crate::protocol::adopt::Adopted;
    use std::fs::File;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::time::Duration;

    const TOKEN: [u8; 32] = [7; 32];

    fn rendezvous() -> (tempfile::TempDir, File, AdoptionSocket) {
        let dir = tempfile::tempdir().unwrap();
        let directory = File::open(dir.path()).unwrap();
        let socket = bind_in(directory.as_fd(), "p").unwrap();
        (dir, directory, socket)
    }

    fn adopt(token: [u8; 32]) -> Adopt {
        Adopt { version: 1, token }
    }

    /// Those of other tests in this process that share memory meanwhile do not count.
    fn open_sockets() -> usize {
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        targets
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    }

    #[test]
    fn broker_with_the_token_is_answered_and_knows_who_answers() {
        let (_dir, directory, socket) = rendezvous();
        assert!(matches!(socket.next(&TOKEN), Knock::Nothing));
        let answer = knock(directory.as_fd(), "p", &adopt(TOKEN)).unwrap();
        let Knock::Broker { version: 1, reply } = socket.next(&TOKEN) else {
            panic!("no broker");
        };
        let adopted = Adopted {
            version: 1,
            id: ProcId {
                kind: ProcKind::Blk,
                index: 0,
                generation: 2,
            },
            landlock_abi: 6,
        };
        reply.send(&adopted, &[reply.as_fd()]).unwrap();
        let received = answer.try_recv_from::<Adopted>().unwrap().unwrap();
        assert_eq!(received.message, adopted);
        assert_eq!(received.fds.len(), 1);
        assert_eq!(received.sender, i32::try_from(std::process::id()).ok());
    }

    #[test]
    fn strangers_are_dropped_with_everything_they_bring() {
        let (_dir, directory, socket) = rendezvous();
        let before = open_sockets();
        for n in 0..100u8 {
            let mut wrong = TOKEN;
            wrong[usize::from(n) % 32] ^= 1 << (n % 8);
            let answer = knock(directory.as_fd(), "p", &adopt(wrong)).unwrap();
            assert!(matches!(socket.next(&TOKEN), Knock::Stranger));
            let refused = answer.recv_within::<Adopted>(Duration::from_secs(5));
            assert!(matches!(refused, Err(ChannelError::Closed)), "{refused:?}");
        }
        assert!(matches!(socket.next(&TOKEN), Knock::Nothing));
        assert_eq!(open_sockets(), before);
    }

    #[test]
    fn nonsense_of_any_length_is_a_stranger() {
        let (_dir, directory, socket) = rendezvous();
        let good = postcard::to_stdvec(&adopt(TOKEN)).unwrap();
        let mut long = good.clone();
        long.push(0);
        let cases: [&[u8]; 5] = [&[], &[0], &good[..good.len() - 1], &long, &[1; 60_000]];
        for bytes in cases {
            let from = datagram_socket().unwrap();
            let to = address(directory.as_fd(), "p").unwrap();
            let flags = MsgFlags::empty();
            sendmsg(
                from.as_raw_fd(),
                &[IoSlice::new(bytes)],
                &[],
                flags,
                Some(&to),
            )
            .unwrap();
            assert!(matches!(socket.next(&TOKEN), Knock::Stranger));
        }
        // The token without a socket for the answer.
        let from = datagram_socket().unwrap();
        let to = address(directory.as_fd(), "p").unwrap();
        let flags = MsgFlags::empty();
        sendmsg(
            from.as_raw_fd(),
            &[IoSlice::new(&good)],
            &[],
            flags,
            Some(&to),
        )
        .unwrap();
        assert!(matches!(socket.next(&TOKEN), Knock::Stranger));
        assert!(matches!(socket.next(&TOKEN), Knock::Nothing));
    }

    #[test]
    fn name_is_the_brokers_alone_and_may_lie_deep() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let directory = File::open(&deep).unwrap();
        let _socket = bind_in(directory.as_fd(), "p").unwrap();
        let about = std::fs::metadata(deep.join("p")).unwrap();
        assert!(about.file_type().is_socket());
        assert_eq!(about.permissions().mode() & 0o777, 0o600);
        let again = bind_in(directory.as_fd(), "p");
        assert_eq!(again.unwrap_err(), Errno::EADDRINUSE);
    }

    #[test]
    fn dead_process_is_told_from_a_busy_one() {
        let (_dir, directory, socket) = rendezvous();
        let full = (0..10_000).any(|_| {
            let knocked = knock(directory.as_fd(), "p", &adopt(TOKEN));
            matches!(knocked, Err(ChannelError::Full))
        });
        assert!(full, "a queue without an end");
        drop(socket);
        for name in ["p", "never"] {
            let knocked = knock(directory.as_fd(), name, &adopt(TOKEN));
            assert!(matches!(knocked, Err(ChannelError::Closed)));
        }
    }
}
