//! What a process keeps for the broker after this one, and how it hands it over.
//!
//! The far end of its control channel is kept by the process itself, so the channel outlives the
//! broker: what was said and not heard waits in it, and the descriptor that the process sleeps on
//! stays the same. Holding both ends gives a process nothing: it could only talk to itself.

use bulkhead_ipc::adoption::{AdoptionSocket, Knock, close};
use bulkhead_ipc::ident::ProcId;
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::adopt::Adopted;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Datagrams that are looked at before the process's own work has its turn again. The kernel holds
/// back senders beyond a few (the sysctl net.unix.max_dgram_qlen), and a broker asks again.
const KNOCKS_PER_TURN: usize = 16;

/// The adoption socket with all that goes to the next broker.
#[derive(Debug)]
pub struct Adoption {
    socket: AdoptionSocket,
    token: [u8; 32],
    id: ProcId,
    landlock_abi: u8,
    kept: Vec<OwnedFd>,
}

impl AsFd for Adoption {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Adoption {
    /// Of process `id`, for brokers who know `token`. `kept` is what every process keeps, in the order
    /// of [`Adopted`].
    pub(crate) const fn new(
        socket: AdoptionSocket,
        token: [u8; 32],
        id: ProcId,
        landlock_abi: u8,
        kept: Vec<OwnedFd>,
    ) -> Self {
        Self {
            socket,
            token,
            id,
            landlock_abi,
            kept,
        }
    }

    /// Keeps further descriptors for the next broker; they follow in this order.
    pub fn keep(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.kept.extend(fds);
    }

    /// Answers whoever proves to be a broker. Never blocks, keeps nothing of strangers.
    pub fn answer(&self) {
        for _ in 0..KNOCKS_PER_TURN {
            let (version, reply) = match self.socket.next(&self.token) {
                Knock::Nothing => return,
                Knock::Stranger => continue,
                Knock::Broker { version, reply } => (version, reply),
            };
            let adopted = Adopted {
                version: PROTOCOL_VERSION,
                id: self.id,
                landlock_abi: self.landlock_abi,
            };
            let kept: Vec<BorrowedFd<'_>> = match version {
                PROTOCOL_VERSION => self.kept.iter().map(AsFd::as_fd).collect(),
                _ => Vec::new(),
            };
            match reply.send(&adopted, &kept) {
                Ok(()) => tracing::info!(version, "a broker asks for this process"),
                Err(error) => tracing::warn!(%error, "the answer to a broker is lost"),
            }
            close(reply);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::adoption::{bind_in, knock};
    use bulkhead_ipc::channel::{Channel, ChannelError};
    use bulkhead_ipc::ident::ProcKind;
    use bulkhead_ipc::protocol::adopt::Adopt;
    use std::fs::File;
    use std::time::Duration;

    const TOKEN: [u8; 32] = [9; 32];
    const WITHIN: Duration = Duration::from_secs(5);

    fn adoption(directory: &File, kept: Vec<OwnedFd>) -> Adoption {
        let id = ProcId {
            kind: ProcKind::Rng,
            index: 0,
            generation: 3,
        };
        let socket = bind_in(directory.as_fd(), "s").unwrap();
        Adoption::new(socket, TOKEN, id, 0, kept)
    }

    #[test]
    fn far_end_is_handed_over_with_what_was_not_heard() {
        let dir = tempfile::tempdir().unwrap();
        let directory = File::open(dir.path()).unwrap();
        let (near, far) = Channel::pair().unwrap();
        let adoption = adoption(&directory, vec![far.into()]);
        near.send(&7u32, &[]).unwrap();
        for _ in 0..3 {
            let version = PROTOCOL_VERSION;
            let adopt = Adopt {
                version,
                token: TOKEN,
            };
            let answer = knock(directory.as_fd(), "s", &adopt).unwrap();
            adoption.answer();
            let (adopted, mut fds) = answer.recv_within::<Adopted>(WITHIN).unwrap();
            assert_eq!(adopted.id.generation, 3);
            let channel = Channel::from(fds.pop().unwrap());
            assert_eq!(channel.recv_within::<u32>(WITHIN).unwrap().0, 7);
            near.send(&7u32, &[]).unwrap();
        }
    }

    #[test]
    fn broker_of_another_version_learns_that_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let directory = File::open(dir.path()).unwrap();
        let adoption = adoption(&directory, vec![File::open("/dev/null").unwrap().into()]);
        let adopt = Adopt {
            version: PROTOCOL_VERSION + 1,
            token: TOKEN,
        };
        let answer = knock(directory.as_fd(), "s", &adopt).unwrap();
        adoption.answer();
        let (adopted, fds) = answer.recv_within::<Adopted>(WITHIN).unwrap();
        assert_eq!(adopted.version, PROTOCOL_VERSION);
        assert!(fds.is_empty());
    }

    #[test]
    fn flood_of_strangers_is_looked_at_in_turns_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let directory = File::open(dir.path()).unwrap();
        let adoption = adoption(&directory, Vec::new());
        let adopt = Adopt {
            version: PROTOCOL_VERSION,
            token: [0; 32],
        };
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = descriptors();
        for _ in 0..200 {
            match knock(directory.as_fd(), "s", &adopt) {
                Ok(_) => {}
                Err(ChannelError::Full) => adoption.answer(),
                Err(error) => panic!("{error}"),
            }
        }
        adoption.answer();
        assert_eq!(descriptors(), before);
    }
}
