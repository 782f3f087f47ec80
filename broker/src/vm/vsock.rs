//! The machine's Unix socket, and connections to the listeners beside it.
//!
//! The broker binds the socket and gives the listening descriptor to each socket device process in turn, so that
//! clients who come while one takes the other's place wait a moment instead of being refused. A broker
//! that has taken the machine over has no descriptor of it; when it needs one, for a successor, it binds the
//! socket anew (`docs/decisions/0024-socket-device.md`).
//!
//! A process asks for a connection to a listener by its port, and the port in decimal is all that it has a say
//! in. Each is made in a task of its own: nothing else waits for it.

use super::home::path_of;
use super::record::since_boot_ms;
use super::session::RunOptions;
use super::spec::{SOCKET_NAME_BYTES_MAX, VmSpec, VsockSpec};
use bulkhead_ipc::protocol::device::{DIAL_AGE_MS_MAX, DIALS_MAX};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// File name of the socket in the machine's runtime directory.
const DEFAULT_NAME: &str = "vsock.sock";
/// Clients that wait until the device takes their connection.
const BACKLOG: i32 = 128;
/// How long a listener may have no room for another connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two tries meanwhile.
const POLL: Duration = Duration::from_millis(20);

/// Where the socket of a machine is, if it has one.
#[must_use]
pub fn path_for(spec: &VmSpec, options: &RunOptions) -> Option<PathBuf> {
    let vsock = spec.vsock.as_ref()?;
    Some(vsock.socket(&options.runtime, &spec.name))
}

impl VsockSpec {
    /// Where the socket of the machine `name` is, whose runtime directory is below `runtime`.
    #[must_use]
    pub fn socket(&self, runtime: &Path, name: &str) -> PathBuf {
        let default = || path_of(runtime, name).join(DEFAULT_NAME);
        self.path.clone().unwrap_or_else(default)
    }
}

/// Why there is no such socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Its path names none.
    #[error("expected the path of a socket whose name has at most {SOCKET_NAME_BYTES_MAX} bytes")]
    Path,
    /// Something else is there.
    #[error("something that is no socket is there")]
    Taken,
    /// Somebody listens there.
    #[error("is in use: somebody listens there")]
    InUse,
    /// The kernel refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// The socket of a machine.
#[derive(Debug)]
pub struct MachineSocket {
    beside: Arc<Beside>,
    /// `None` when another broker has bound it.
    listener: Option<OwnedFd>,
    dials: Arc<Semaphore>,
}

/// Where listeners for connections from the guest are.
#[derive(Debug)]
struct Beside {
    directory: File,
    name: OsString,
}

impl MachineSocket {
    /// The socket that is at `path`, or will be when it is needed.
    ///
    /// # Errors
    /// When its directory cannot be found.
    pub fn at(path: &Path) -> Result<Self, SocketError> {
        Ok(Self {
            beside: Arc::new(Beside::of(path)?),
            listener: None,
            dials: Arc::new(Semaphore::new(DIALS_MAX)),
        })
    }

    /// The listening descriptor. Binds the socket, unless that was done: one that is there is replaced if
    /// nobody listens at it.
    ///
    /// # Errors
    /// When the place is taken, or the kernel refuses.
    pub fn listener(&mut self) -> Result<BorrowedFd<'_>, SocketError> {
        let listener = match self.listener.take() {
            Some(bound) => bound,
            None => self.beside.listen()?,
        };
        let held: &OwnedFd = self.listener.insert(listener);
        Ok(held.as_fd())
    }

    /// Connects to the listener of `port`, for a process that asked at `asked_ms`. `None` when there is none
    /// to wait for: too many are being made, or it is too late.
    pub(super) fn dial(
        &self,
        port: u32,
        asked_ms: u64,
    ) -> Option<impl Future<Output = Option<OwnedFd>> + Send + use<>> {
        let age = since_boot_ms().checked_sub(asked_ms);
        if age.is_none_or(|age| age > DIAL_AGE_MS_MAX) {
            return None;
        }
        let permit = Arc::clone(&self.dials).try_acquire_owned().ok()?;
        let (beside, permit) = (Arc::clone(&self.beside), Arc::new(permit));
        Some(async move {
            let until = Instant::now() + PATIENCE;
            loop {
                // Even the look-up of a name may block, where the directory is on a network. The permit is given
                // up with the last try, however long that takes.
                let (beside, permit) = (Arc::clone(&beside), Arc::clone(&permit));
                let tried = tokio::task::spawn_blocking(move || {
                    let _held = permit;
                    beside.connect(port)
                });
                let tried = tokio::time::timeout_at(until, tried).await;
                match tried.ok()?.ok()? {
                    Ok(connected) => return Some(connected),
                    // Its backlog is full.
                    Err(Errno::EAGAIN) if Instant::now() + POLL < until => {
                        tokio::time::sleep(POLL).await;
                    }
                    Err(errno) => {
                        tracing::debug!(port, %errno, "nobody is reached");
                        return None;
                    }
                }
            }
        })
    }
}

/// Removes the socket at `path`, unless somebody listens there.
pub(super) fn remove(path: &Path) {
    let removed = Beside::of(path).and_then(|beside| beside.remove_stale());
    if let Err(error) = removed {
        tracing::debug!(?path, %error, "the machine's socket stays");
    }
}

fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

impl Beside {
    fn of(path: &Path) -> Result<Self, SocketError> {
        let name = path.file_name().ok_or(SocketError::Path)?;
        if name.len() > SOCKET_NAME_BYTES_MAX {
            return Err(SocketError::Path);
        }
        let directory = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY);
        Ok(Self {
            directory: options.open(directory.unwrap_or(Path::new(".")))?,
            name: name.to_owned(),
        })
    }

    /// By way of the directory's descriptor, since an address holds 107 bytes and directories may have longer
    /// names.
    fn place(&self, name: &OsStr) -> PathBuf {
        let directory = format!("/proc/self/fd/{}", self.directory.as_raw_fd());
        Path::new(&directory).join(name)
    }

    fn listen(&self) -> Result<OwnedFd, SocketError> {
        let made = unix_socket()?;
        // The file gets the mode that the socket has.
        fchmod(&made, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let address = UnixAddr::new(&self.place(&self.name))?;
        match bind(made.as_raw_fd(), &address) {
            Err(Errno::EADDRINUSE) => {
                self.remove_stale()?;
                bind(made.as_raw_fd(), &address)?;
            }
            bound => bound?,
        }
        listen(&made, Backlog::new(BACKLOG)?)?;
        Ok(made)
    }

    fn remove_stale(&self) -> Result<(), SocketError> {
        let place = self.place(&self.name);
        if !fs::symlink_metadata(&place)?.file_type().is_socket() {
            return Err(SocketError::Taken);
        }
        let probe = unix_socket()?;
        match connect(probe.as_raw_fd(), &UnixAddr::new(&place)?) {
            Err(Errno::ECONNREFUSED) => Ok(fs::remove_file(&place)?),
            // A full backlog is one of somebody.
            Ok(()) | Err(Errno::EAGAIN) => Err(SocketError::InUse),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Tries once to connect to the listener of `port`. Does not wait for it.
    fn connect(&self, port: u32) -> Result<OwnedFd, Errno> {
        let mut name = self.name.clone();
        name.push(format!("_{port}"));
        debug_assert!(name.as_bytes().len() <= SOCKET_NAME_BYTES_MAX + 11);
        let made = unix_socket()?;
        connect(made.as_raw_fd(), &UnixAddr::new(&self.place(&name))?)?;
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    }

    fn dial(socket: &MachineSocket, port: u32) -> Option<UnixStream> {
        let connected = socket.dial(port, since_boot_ms())?;
        Some(runtime().block_on(connected)?.into())
    }

    #[test]
    fn socket_is_its_owners_alone_and_replaced_when_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock.sock");
        let mut first = MachineSocket::at(&path).unwrap();
        first.listener().unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let client = UnixStream::connect(&path).unwrap();
        let mut second = MachineSocket::at(&path).unwrap();
        assert!(matches!(second.listener(), Err(SocketError::InUse)));
        remove(&path);
        assert!(path.exists(), "somebody listens");
        drop((first, client));
        second.listener().unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
        remove(&path);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "text").unwrap();
        let mut socket = MachineSocket::at(&path).unwrap();
        assert!(matches!(socket.listener(), Err(SocketError::Taken)));
        remove(&path);
        assert_eq!(fs::read(&path).unwrap(), b"text");
        let long = dir.path().join("x".repeat(SOCKET_NAME_BYTES_MAX + 1));
        assert!(matches!(MachineSocket::at(&long), Err(SocketError::Path)));
        assert!(matches!(
            MachineSocket::at(Path::new("/")),
            Err(SocketError::Path)
        ));
    }

    #[test]
    fn directory_may_have_a_name_that_no_address_holds() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        let path = deep.join("n".repeat(SOCKET_NAME_BYTES_MAX));
        let mut socket = MachineSocket::at(&path).unwrap();
        socket.listener().unwrap();
        assert!(path.exists());
        assert!(dial(&socket, u32::MAX - 1).is_none());
    }

    #[test]
    fn listener_beside_the_socket_is_reached_by_its_port() {
        let dir = tempfile::tempdir().unwrap();
        let socket = MachineSocket::at(&dir.path().join("s")).unwrap();
        assert!(dial(&socket, 52).is_none(), "nobody listens");
        let listener = UnixListener::bind(dir.path().join("s_52")).unwrap();
        let mut near = dial(&socket, 52).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.write_all(b"x").unwrap();
        near.read_exact(&mut [0; 1]).unwrap();
        let nothing = near.read(&mut [0; 1]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        assert!(dial(&socket, 53).is_none());
        drop(listener);
        assert!(dial(&socket, 52).is_none(), "nobody listens any more");
    }

    #[test]
    fn old_questions_and_too_many_are_not_worth_a_try() {
        let dir = tempfile::tempdir().unwrap();
        let socket = MachineSocket::at(&dir.path().join("s")).unwrap();
        let now = since_boot_ms();
        assert!(
            socket
                .dial(1, now.saturating_sub(DIAL_AGE_MS_MAX + 100))
                .is_none()
        );
        assert!(socket.dial(1, now + 100_000).is_none(), "nobody asks later");
        let under_way: Vec<_> = (0..DIALS_MAX).map(|_| socket.dial(1, now)).collect();
        assert!(under_way.iter().all(Option::is_some));
        assert!(socket.dial(1, now).is_none());
        drop(under_way);
        assert!(socket.dial(1, now).is_some());
    }

    #[test]
    fn listener_without_room_is_tried_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let socket = MachineSocket::at(&dir.path().join("s")).unwrap();
        let full = unix_socket().unwrap();
        let path = dir.path().join("s_9");
        bind(full.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&full, Backlog::new(0).unwrap()).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let begun = std::time::Instant::now();
        assert!(dial(&socket, 9).is_none());
        assert!((PATIENCE / 2..PATIENCE * 2).contains(&begun.elapsed()));
    }
}
