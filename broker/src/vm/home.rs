//! A machine's runtime directory, and the lock by which one broker owns the machine.
//!
//! ```text
//!   RUNTIME/vms/NAME/          0700
//!     lock                     an OFD lock on it is the ownership; it holds the owner's pid
//!     record                   what a later broker must know (`record.rs`)
//!     blk0.1.sock, …           adoption sockets, one for each process
//! ```
//!
//! The kernel holds the lock: it ends with the broker, however that ends, and two brokers never have
//! it at once. Whatever is in the directory is a file and is believed only after a check.

use crate::escape::escaped;
use crate::remains::Remains;
use bulkhead_ipc::adoption::{AdoptionSocket, bind_in};
use bulkhead_ipc::ident::ProcId;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The directory of all machines below the runtime directory.
pub(super) const MACHINES: &str = "vms";
const LOCK: &str = "lock";
/// Attempts to take a lock whose directory is being removed by its last owner.
const ATTEMPTS: u32 = 100;
/// Longest content of the lock file that is read.
const OWNER_BYTES_MAX: u64 = 16;

/// Why a machine cannot be owned.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Another broker owns it.
    #[error("a machine named {name} is running already{}", .owner.map(|pid| format!(": process {pid} is its broker")).unwrap_or_default())]
    Owned {
        /// The machine's name.
        name: String,
        /// Process id of the other broker, as it said itself.
        owner: Option<u32>,
    },
    /// The directory or a file in it cannot be used.
    #[error("runtime directory {path}: {cause}")]
    Io {
        /// Where, escaped.
        path: String,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// The runtime directory of a machine that this broker owns, for as long as it is alive.
#[derive(Debug)]
pub struct Home {
    path: PathBuf,
    directory: File,
    _lock: File,
}

/// Where the machine `name` lives.
#[must_use]
pub fn path_of(runtime: &Path, name: &str) -> PathBuf {
    runtime.join(MACHINES).join(name)
}

impl Home {
    /// Makes the directory of machine `name` if it is not there, and takes its lock. Waits only for
    /// what is left of an owner that is dead, at most [`crate::remains::LONGEST`].
    ///
    /// # Errors
    /// [`HomeError::Owned`] when another broker has the lock.
    pub fn claim(runtime: &Path, name: &str) -> Result<Self, HomeError> {
        Self::lock(runtime, name, true)
    }

    /// As [`Home::claim`], of a machine that is there.
    ///
    /// # Errors
    /// As [`Home::claim`]; [`HomeError::Io`] when there is none.
    pub fn take_over(runtime: &Path, name: &str) -> Result<Self, HomeError> {
        Self::lock(runtime, name, false)
    }

    fn lock(runtime: &Path, name: &str, make: bool) -> Result<Self, HomeError> {
        let path = path_of(runtime, name);
        let fault = |cause: io::Error| HomeError::Io {
            path: escaped(path.as_os_str().as_encoded_bytes()).to_string(),
            cause,
        };
        let remains = Remains::begin();
        let mut attempts = 0..ATTEMPTS;
        while attempts.next().is_some() {
            if make {
                let mut builder = DirBuilder::new();
                let made = builder.recursive(true).mode(0o700).create(&path);
                made.map_err(fault)?;
            }
            let Some((directory, mut lock)) = open(&path, make).map_err(fault)? else {
                continue;
            };
            match fcntl(lock.as_fd(), FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    let owner = owner(&lock);
                    if remains.wait(owner) {
                        attempts = 0..ATTEMPTS;
                        continue;
                    }
                    let name = name.to_owned();
                    return Err(HomeError::Owned { name, owner });
                }
                Err(errno) => return Err(fault(errno.into())),
            }
            // The last owner may have removed both between our opening and locking them.
            if !is_still(&path, &directory) || !is_still(&path.join(LOCK), &lock) {
                continue;
            }
            let said = lock.set_len(0);
            let said = said.and_then(|()| write!(lock, "{}", std::process::id()));
            said.map_err(fault)?;
            return Ok(Self {
                path,
                directory,
                _lock: lock,
            });
        }
        Err(fault(io::Error::other("is being removed again and again")))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory itself.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Makes the adoption socket of a process that is about to be started.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn adoption_socket(&self, id: ProcId) -> io::Result<AdoptionSocket> {
        let name = socket_name(id);
        match bind_in(self.directory(), &name) {
            // Of a process that was to be started before, and never was or is dead.
            Err(Errno::EADDRINUSE) => {
                fs::remove_file(self.path.join(&name))?;
                Ok(bind_in(self.directory(), &name)?)
            }
            made => Ok(made?),
        }
    }

    /// Removes the adoption socket of a process that is gone.
    pub fn forget(&self, id: ProcId) {
        // One that is left behind leads nowhere, and goes with the directory.
        let _removed = fs::remove_file(self.path.join(socket_name(id)));
    }

    /// Removes the directory: the machine is over.
    pub fn remove(self) {
        let left = |error: &io::Error| error.kind() != io::ErrorKind::NotFound;
        // The lock file goes last, while the lock is held: whoever comes now finds all or nothing.
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name());
        for name in names.filter(|name| name != LOCK).collect::<Vec<_>>() {
            let _removed = fs::remove_file(self.path.join(name));
        }
        let removed = fs::remove_file(self.path.join(LOCK));
        let removed = removed.and_then(|()| fs::remove_dir(&self.path));
        if let Err(error) = removed.or_else(|e| if left(&e) { Err(e) } else { Ok(()) }) {
            tracing::warn!(path = ?self.path, %error, "the machine's runtime directory stays");
        }
    }
}

/// The name of a process's adoption socket in the directory of its machine.
#[must_use]
pub fn socket_name(id: ProcId) -> String {
    format!("{id}.sock")
}

/// Whether a broker owns the machine at `path` now: its pid, where it is known. Waits as
/// [`Home::claim`].
#[must_use]
pub fn owner_of(path: &Path) -> Option<Option<u32>> {
    let remains = Remains::begin();
    loop {
        let lock = File::open(path.join(LOCK)).ok()?;
        let mut asked = whole_file();
        let held = fcntl(lock.as_fd(), FcntlArg::F_OFD_GETLK(&mut asked)).is_ok()
            && i32::from(asked.l_type) != libc::F_UNLCK;
        let owner = held.then(|| owner(&lock))?;
        if !remains.wait(owner) {
            return Some(owner);
        }
    }
}

fn open(path: &Path, make: bool) -> io::Result<Option<(File, File)>> {
    let open = || -> io::Result<(File, File)> {
        let mut directory = OpenOptions::new();
        directory.read(true).custom_flags(libc::O_DIRECTORY);
        let directory = directory.open(path)?;
        let mut lock = OpenOptions::new();
        lock.read(true).write(true).create(make).mode(0o600);
        lock.custom_flags(libc::O_NOFOLLOW);
        Ok((directory, lock.open(path.join(LOCK))?))
    };
    match open() {
        Err(e) if make && e.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

fn is_still(path: &Path, file: &File) -> bool {
    let (there, held) = (fs::symlink_metadata(path), file.metadata());
    let (Ok(there), Ok(held)) = (there, held) else {
        return false;
    };
    (there.dev(), there.ino()) == (held.dev(), held.ino())
}

fn owner(lock: &File) -> Option<u32> {
    let mut text = String::new();
    let mut content = lock.take(OWNER_BYTES_MAX);
    content.read_to_string(&mut text).ok()?;
    text.parse().ok()
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::ident::ProcKind;

    #[test]
    fn machine_has_one_owner_who_is_named() {
        let runtime = tempfile::tempdir().unwrap();
        let home = Home::claim(runtime.path(), "web").unwrap();
        let error = Home::claim(runtime.path(), "web").unwrap_err();
        let me = format!("process {} is its broker", std::process::id());
        assert!(error.to_string().contains(&me), "{error}");
        assert!(Home::take_over(runtime.path(), "web").is_err());
        assert_eq!(owner_of(home.path()), Some(Some(std::process::id())));
        Home::claim(runtime.path(), "other").unwrap();
        let path = home.path().to_owned();
        drop(home);
        assert_eq!(owner_of(&path), None);
        Home::take_over(runtime.path(), "web").unwrap();
    }

    #[test]
    fn what_is_left_of_a_dead_owner_is_waited_for() {
        type Seen = fn(&Path) -> bool;
        let asks: [Seen; 2] = [
            |runtime| owner_of(&path_of(runtime, "web")).is_none(),
            |runtime| Home::claim(runtime, "web").is_ok(),
        ];
        for ask in asks {
            let runtime = tempfile::tempdir().unwrap();
            let left = Home::claim(runtime.path(), "web").unwrap();
            // No pid is as large as this.
            fs::write(left.path().join(LOCK), "99999999").unwrap();
            let path = runtime.path().to_owned();
            let waiting = std::thread::spawn(move || ask(&path));
            std::thread::sleep(20 * crate::remains::POLL);
            assert!(!waiting.is_finished());
            drop(left);
            assert!(waiting.join().unwrap());
        }
    }

    #[test]
    fn nothing_is_left_of_a_machine_that_is_over() {
        let runtime = tempfile::tempdir().unwrap();
        let home = Home::claim(runtime.path(), "web").unwrap();
        let id = ProcId {
            kind: ProcKind::Blk,
            index: 0,
            generation: 1,
        };
        let _socket = home.adoption_socket(id).unwrap();
        let _again = home.adoption_socket(id).unwrap();
        let path = home.path().to_owned();
        assert!(path.join("blk0.1.sock").exists());
        home.remove();
        assert!(!path.exists());
        assert!(Home::take_over(runtime.path(), "web").is_err());
    }

    #[test]
    fn owners_that_come_and_go_at_once_never_share() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let runtime = tempfile::tempdir().unwrap();
        let (owners, owned) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Ok(home) = Home::claim(runtime.path(), "web") else {
                            continue;
                        };
                        assert_eq!(owners.fetch_add(1, Ordering::SeqCst), 0);
                        owned.fetch_add(1, Ordering::SeqCst);
                        owners.fetch_sub(1, Ordering::SeqCst);
                        home.remove();
                    }
                });
            }
        });
        assert!(owned.load(Ordering::SeqCst) > 0);
    }
}
