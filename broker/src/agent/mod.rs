//! The host's side of the guest agent (`docs/agent.md`). It runs in the user's own process: what a guest
//! answers is never parsed by the daemon, which only passes bytes on (`crate::serve::vsock`).

pub mod exec;
mod plain;

use bulkhead_agent::copy::CopyError;
use bulkhead_agent::wire::{Wire, WireError, poll_timeout};
use bulkhead_ipc::protocol::agent::{AGENT_PORT, Ask, Failure, FailureKind, FromAgent, ToAgent};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a machine's socket device and its guest may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the agent may take for an answer that costs it little.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take for one that has the kernel write out everything or a program make keys.
pub const SLOW_TIMEOUT: Duration = Duration::from_secs(180);
/// Longest answer of a machine's socket to `CONNECT`.
const ACCEPTED_BYTES_MAX: usize = 32;

/// Why the agent has not done something.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The machine's socket does not answer as it should.
    #[error(
        "nothing in the guest answers on vsock port {AGENT_PORT}; does bulkhead-agent run in it?"
    )]
    NoAgent,
    /// The machine's socket.
    #[error("the machine's vsock socket: {0}")]
    Socket(#[from] io::Error),
    /// The connection.
    #[error("the guest agent: {0}")]
    Wire(#[from] WireError),
    /// What the agent says itself. It may be a lie, and hold anything.
    #[error("the guest agent: {}", .0.text)]
    Refused(Failure),
    /// The agent has not kept to the protocol.
    #[error("the guest agent does not keep to its protocol")]
    Nonsense,
}

impl From<CopyError> for AgentError {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Wire(error) => Self::Wire(error),
            CopyError::Refused(failure) => Self::Refused(failure),
            CopyError::Protocol => Self::Nonsense,
            CopyError::Tree(error) => {
                Self::Refused(Failure::new(FailureKind::Other, error.to_string()))
            }
        }
    }
}

/// Connects to the agent through a machine's socket, to which `stream` leads.
///
/// # Errors
/// When there is none.
pub fn connect(mut stream: UnixStream) -> Result<Wire, AgentError> {
    stream.set_nonblocking(true)?;
    let greeting = format!("CONNECT {AGENT_PORT}\n");
    let until = Instant::now() + CONNECT_TIMEOUT;
    // A socket that has just been connected has room for it.
    match stream.write_all(greeting.as_bytes()) {
        Err(error) if hung_up(&error) => return Err(AgentError::NoAgent),
        said => said?,
    }
    let mut line = Vec::new();
    // Byte by byte: what is behind the line belongs to the agent.
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(AgentError::NoAgent),
            Ok(_) if line.len() < ACCEPTED_BYTES_MAX => line.extend(byte),
            Ok(_) => return Err(AgentError::NoAgent),
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => wait(&stream, until)?,
                _ if hung_up(&error) => return Err(AgentError::NoAgent),
                _ => return Err(error.into()),
            },
        }
    }
    if !line.starts_with(b"OK ") {
        return Err(AgentError::NoAgent);
    }
    let mut wire = Wire::new(stream)?;
    match wire.shake_hands() {
        // A guest that nobody listens in may accept and hang up.
        Err(WireError::Closed) => Err(AgentError::NoAgent),
        done => Ok(done.map(|()| wire)?),
    }
}

fn hung_up(error: &io::Error) -> bool {
    let kind = error.kind();
    matches!(
        kind,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn wait(stream: &UnixStream, until: Instant) -> Result<(), AgentError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(AgentError::NoAgent);
    }
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, poll_timeout(left)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(AgentError::Socket(errno.into())),
    }
}

/// Asks a question that has one answer.
///
/// # Errors
/// When it is refused or not answered.
pub fn ask(wire: &mut Wire, question: Ask, within: Duration) -> Result<FromAgent, AgentError> {
    wire.send(&ToAgent::Ask(question))?;
    match wire.receive(within)? {
        FromAgent::Failed(failure) => Err(AgentError::Refused(failure)),
        answer => Ok(answer),
    }
}
