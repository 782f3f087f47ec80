//! A lock that the kernel holds for as long as its owner lives.

use super::{ServeError, os};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A locked file with the owner's pid in it.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock, without waiting.
    ///
    /// # Errors
    /// [`ServeError::InUse`] with the owner's pid, or the kernel's error.
    pub fn take(path: &Path) -> Result<Self, ServeError> {
        let shown = path.display().to_string();
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(os(shown.clone()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // For people who find the file; the lock does not depend on it, so that a full
                // disk keeps nobody from serving.
                let _told = file.set_len(0).and_then(|()| {
                    let pid = std::process::id();
                    file.write_all(format!("{pid}\n").as_bytes())
                });
                Ok(Self { _file: file })
            }
            Err((file, Errno::EWOULDBLOCK)) => Err(ServeError::InUse {
                what: path.to_owned(),
                holder: holder(file),
            }),
            Err((_, errno)) => Err(os(shown)(io::Error::from(errno))),
        }
    }
}

fn holder(file: File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!(" (process {pid})"),
        _ => String::new(),
    }
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
}
