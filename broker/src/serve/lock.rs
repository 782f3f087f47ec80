//! A lock that the kernel holds for as long as its owner lives.

use super::{ServeError, os};
use crate::remains::Remains;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// A locked file with the owner's pid in it.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock. Waits only for what is left of an owner that is dead, at most
    /// [`crate::remains::LONGEST`].
    ///
    /// # Errors
    /// [`ServeError::InUse`] with the owner's pid, or the kernel's error.
    pub fn take(path: &Path) -> Result<Self, ServeError> {
        let shown = path.display().to_string();
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(os(shown.clone()))?;
        let remains = Remains::begin();
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    // For people who find the file, and those who wait: the lock does not depend on it, so
                    // that a full disk keeps nobody from serving.
                    let pid = format!("{}\n", std::process::id());
                    let _told = file
                        .set_len(0)
                        .and_then(|()| file.write_all_at(pid.as_bytes(), 0));
                    return Ok(Self { _file: file });
                }
                Err((held, Errno::EWOULDBLOCK)) => {
                    let holder = holder(&held);
                    if !remains.wait(holder) {
                        return Err(ServeError::InUse {
                            what: path.to_owned(),
                            holder: holder
                                .map_or_else(String::new, |pid| format!(" (process {pid})")),
                        });
                    }
                    file = held;
                }
                Err((_, errno)) => return Err(os(shown)(io::Error::from(errno))),
            }
        }
    }
}

fn holder(file: &File) -> Option<u32> {
    let mut text = [0; 32];
    let len = file.read_at(&mut text, 0).ok()?;
    let text = str::from_utf8(text.get(..len)?).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_owner_is_refused_and_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.lock");
        let first = Lock::take(&path).unwrap();
        let told = Lock::take(&path).unwrap_err().to_string();
        let pid = std::process::id();
        assert!(told.contains(&format!("(process {pid})")), "{told}");
        drop(first);
        Lock::take(&path).unwrap();
    }

    #[test]
    fn what_is_left_of_a_dead_owner_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.lock");
        let left = Lock::take(&path).unwrap();
        // No pid is as large as this.
        std::fs::write(&path, "99999999\n").unwrap();
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || Lock::take(&path).map(drop)
        });
        std::thread::sleep(20 * crate::remains::POLL);
        assert!(!waiting.is_finished());
        drop(left);
        waiting.join().unwrap().unwrap();
    }
}
