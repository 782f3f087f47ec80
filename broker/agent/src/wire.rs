//! A stream socket with frames on it. Every wait has a deadline, whatever the peer does.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_ipc::agent_frames::{FrameError, Frames, put};
use bulkhead_ipc::protocol::agent::{AGENT_VERSION, HELLO_BYTES, hello, version_of};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a peer may take to take one message.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a peer may take for its first message.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that are read at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The peer has hung up.
    #[error("the other side has hung up")]
    Closed,
    /// Nothing came, or nothing was taken, in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// The peer speaks something else.
    #[error("the other side does not speak the protocol of the guest agent")]
    Stranger,
    /// The peer speaks another version.
    #[error("the other side speaks version {0} of the protocol, this one version {AGENT_VERSION}")]
    Version(u32),
    /// The peer sent nonsense.
    #[error("the other side sent nonsense: {0}")]
    Frame(#[from] FrameError),
    /// The kernel's error.
    #[error("the connection broke: {0}")]
    Os(#[from] io::Error),
}

/// One end of a connection. The socket is of any family: a `UnixStream` is only its reader and writer.
#[derive(Debug)]
pub struct Wire {
    stream: UnixStream,
    frames: Frames,
    chunk: Vec<u8>,
    out: Vec<u8>,
}

impl Wire {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            frames: Frames::default(),
            chunk: vec![0; CHUNK_BYTES],
            out: Vec::new(),
        })
    }

    /// Says hello and hears the other's.
    ///
    /// # Errors
    /// [`WireError::Stranger`] and [`WireError::Version`] besides those of every message.
    pub fn shake_hands(&mut self) -> Result<(), WireError> {
        self.out.extend(hello(AGENT_VERSION));
        self.write_out(SEND_TIMEOUT)?;
        let (mut heard, mut filled) = ([0; HELLO_BYTES], 0);
        let until = Instant::now() + HELLO_TIMEOUT;
        while let Some(rest) = heard.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.stream.read(rest) {
                Ok(0) => return Err(WireError::Closed),
                Ok(n) => filled += n,
                Err(error) => self.wait_after(&error, PollFlags::POLLIN, until, HELLO_TIMEOUT)?,
            }
        }
        match version_of(&heard) {
            Some(AGENT_VERSION) => Ok(()),
            Some(other) => Err(WireError::Version(other)),
            None => Err(WireError::Stranger),
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the peer does not take it.
    pub fn send<T: Serialize>(&mut self, message: &T) -> Result<(), WireError> {
        self.queue(message)?;
        self.write_out(SEND_TIMEOUT)
    }

    /// Puts a message behind those that wait to be sent.
    ///
    /// # Errors
    /// When it is too long.
    pub fn queue<T: Serialize>(&mut self, message: &T) -> Result<(), WireError> {
        Ok(put(message, &mut self.out)?)
    }

    /// Bytes that wait to be sent.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.out.len()
    }

    /// Sends what the socket takes now.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn flush_now(&mut self) -> Result<(), WireError> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(())
    }

    fn write_out(&mut self, within: Duration) -> Result<(), WireError> {
        let until = Instant::now() + within;
        loop {
            self.flush_now()?;
            if self.out.is_empty() {
                return Ok(());
            }
            self.wait(PollFlags::POLLOUT, until, within)?;
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn receive<T: DeserializeOwned>(&mut self, within: Duration) -> Result<T, WireError> {
        let until = Instant::now() + within;
        loop {
            if let Some(message) = self.receive_now()? {
                return Ok(message);
            }
            self.wait(PollFlags::POLLIN, until, within)?;
        }
    }

    /// The next message if it is here already.
    ///
    /// # Errors
    /// When the peer is gone or sends nonsense.
    pub fn receive_now<T: DeserializeOwned>(&mut self) -> Result<Option<T>, WireError> {
        loop {
            if let Some(message) = self.frames.take()? {
                return Ok(Some(message));
            }
            match self.stream.read(&mut self.chunk) {
                Ok(0) => return Err(WireError::Closed),
                Ok(n) => self.frames.add(self.chunk.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(broken(error)),
            }
        }
    }

    /// Waits until the peer has hung up, and throws away what it still sends: whoever closes a socket with
    /// unread bytes takes from the peer what was said last.
    pub fn linger(&mut self, within: Duration) {
        let until = Instant::now() + within;
        // Nothing more is to be said; a socket that is gone already needs no end.
        let _gone = self.stream.shutdown(std::net::Shutdown::Write);
        while Instant::now() < until {
            match self.stream.read(&mut self.chunk) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    if self
                        .wait_after(&error, PollFlags::POLLIN, until, within)
                        .is_err()
                    {
                        return;
                    }
                }
            }
        }
    }

    fn wait_after(
        &self,
        error: &io::Error,
        what: PollFlags,
        until: Instant,
        within: Duration,
    ) -> Result<(), WireError> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::WouldBlock => self.wait(what, until, within),
            kind => Err(broken(kind.into())),
        }
    }

    fn wait(&self, what: PollFlags, until: Instant, within: Duration) -> Result<(), WireError> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(WireError::TimedOut(within));
        }
        let mut fds = [PollFd::new(self.stream.as_fd(), what)];
        match poll(&mut fds, poll_timeout(left)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(WireError::Os(errno.into())),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A duration for poll, rounded up: one that is rounded down to nothing would spin.
#[must_use]
pub fn poll_timeout(left: Duration) -> PollTimeout {
    let millis = left.as_micros().div_ceil(1000);
    PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
}

fn broken(error: io::Error) -> WireError {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    match error.kind() {
        BrokenPipe | ConnectionReset | ConnectionAborted | NotConnected => WireError::Closed,
        _ => WireError::Os(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::protocol::agent::{Ask, FromAgent, ToAgent};

    fn pair() -> (Wire, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Wire::new(near).unwrap(), far)
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart() {
        let (mut wire, mut far) = pair();
        far.write_all(b"SSH-2.0-OpenSSH_9\r\n").unwrap();
        assert!(matches!(wire.shake_hands(), Err(WireError::Stranger)));
        let (mut wire, mut far) = pair();
        far.write_all(&hello(9)).unwrap();
        assert!(matches!(wire.shake_hands(), Err(WireError::Version(9))));
        let (mut wire, far) = pair();
        drop(far);
        assert!(matches!(wire.shake_hands(), Err(WireError::Closed)));
    }

    #[test]
    fn messages_cross() {
        let (mut near, far) = pair();
        let mut far = Wire::new(far).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| near.shake_hands().unwrap());
            far.shake_hands().unwrap();
        });
        near.send(&ToAgent::Ask(Ask::Ping)).unwrap();
        let heard: ToAgent = far.receive(HELLO_TIMEOUT).unwrap();
        assert_eq!(heard, ToAgent::Ask(Ask::Ping));
        assert!(near.receive_now::<FromAgent>().unwrap().is_none());
    }

    #[test]
    fn a_peer_that_says_nothing_is_not_waited_for_for_ever() {
        let (mut wire, _far) = pair();
        let within = Duration::from_millis(20);
        let error = wire.receive::<FromAgent>(within).unwrap_err();
        assert!(matches!(error, WireError::TimedOut(_)));
    }

    #[test]
    fn last_words_arrive_though_the_peer_has_not_listened() {
        let (mut near, far) = pair();
        let mut far = Wire::new(far).unwrap();
        far.send(&ToAgent::Ask(Ask::Stats)).unwrap();
        far.send(&ToAgent::End).unwrap();
        let _ask: ToAgent = near.receive(HELLO_TIMEOUT).unwrap();
        near.send(&FromAgent::Done).unwrap();
        let waiting = std::thread::spawn(move || near.linger(HELLO_TIMEOUT));
        let heard: FromAgent = far.receive(HELLO_TIMEOUT).unwrap();
        assert_eq!(heard, FromAgent::Done);
        drop(far);
        waiting.join().unwrap();
    }
}
