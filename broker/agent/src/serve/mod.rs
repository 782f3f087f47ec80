//! The agent: listens, and gives each connection a thread.
//!
//! Only the host may connect. Vsock has a loopback, by which any user of the guest would otherwise get
//! commands run as root; so the kernel is asked who the peer is.

mod exec;
pub mod freeze;
mod identity;
mod power;
mod session;
mod stats;
mod sys;
mod users;

use bulkhead_ipc::protocol::agent::AGENT_PORT;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen,
    socket,
};
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 32;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;
/// A thread keeps little on its stack.
const STACK_BYTES: usize = 256 << 10;
/// How long a listener that cannot accept rests.
const REST: Duration = Duration::from_millis(100);
/// What a client of `--unix` says first, as to the socket of a machine.
const GREETING_BYTES_MAX: usize = 32;
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// Where the agent listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A vsock port of a guest.
    Vsock(u32),
    /// A Unix socket, for tests.
    Unix(PathBuf),
}

/// Writes one line to standard error.
pub fn log(line: &str) {
    // Whoever does not want to know has closed it.
    let _unheard = writeln!(io::stderr(), "bulkhead-agent: {line}");
}

/// Serves for ever.
///
/// # Errors
/// When it cannot listen.
pub fn serve(place: &Place) -> io::Result<Infallible> {
    let connections = Arc::new(AtomicUsize::new(0));
    match place {
        Place::Unix(path) => {
            let listener = UnixListener::bind(path)?;
            loop {
                match listener.accept() {
                    Ok((stream, _)) => begin(stream, false, &connections),
                    Err(error) => rest(&error),
                }
            }
        }
        Place::Vsock(port) => {
            let listener = listen_on(*port)?;
            loop {
                match accept_host(&listener) {
                    Ok(Some(stream)) => begin(stream, true, &connections),
                    Ok(None) => {}
                    Err(error) => rest(&error),
                }
            }
        }
    }
}

fn rest(error: &io::Error) {
    log(&format!("cannot accept a connection: {error}"));
    std::thread::sleep(REST);
}

fn listen_on(port: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    let address = VsockAddr::new(libc::VMADDR_CID_ANY, port);
    bind(listener.as_raw_fd(), &address)?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}

/// The next connection, if it is the host's.
fn accept_host(listener: &OwnedFd) -> io::Result<Option<UnixStream>> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    let accepted = sys::owned(fd);
    let peer: VsockAddr = getpeername(accepted.as_raw_fd())?;
    if peer.cid() != libc::VMADDR_CID_HOST {
        log(&format!("refused a connection from context {}", peer.cid()));
        return Ok(None);
    }
    Ok(Some(accepted.into()))
}

fn begin(stream: UnixStream, in_guest: bool, connections: &Arc<AtomicUsize>) {
    let one = Counted::new(connections);
    if one.number > CONNECTIONS_MAX {
        log("too many connections");
        return;
    }
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    let started = thread.spawn(move || {
        let _one = one;
        if in_guest {
            session::run(stream, true);
        } else if let Ok(stream) = greeted(stream) {
            session::run(stream, false);
        }
    });
    if let Err(error) = started {
        log(&format!("no thread for a connection: {error}"));
    }
}

/// A connection that counts until it is dropped.
struct Counted {
    connections: Arc<AtomicUsize>,
    number: usize,
}

impl Counted {
    fn new(connections: &Arc<AtomicUsize>) -> Self {
        Self {
            connections: Arc::clone(connections),
            number: connections.fetch_add(1, Ordering::AcqRel) + 1,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Answers the greeting of a client that takes this for the socket of a machine.
fn greeted(mut stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(GREETING_TIMEOUT))?;
    let mut line = Vec::new();
    // Byte by byte: what is behind the line is not ours to read.
    while line.last() != Some(&b'\n') && line.len() < GREETING_BYTES_MAX {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    if line != format!("CONNECT {AGENT_PORT}\n").into_bytes() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    stream.write_all(b"OK 1073741824\n")?;
    Ok(stream)
}
