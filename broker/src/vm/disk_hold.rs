//! A disk between two of its processes.
//!
//! Each process gets a file description of its own, with a lock on it. The kernel gives a lock up with the
//! last reference to its file description, and an operation in progress holds one. So whoever has
//! the next lock knows that nothing of the process before it can reach the disk any more.
//!
//! That is more than an image file needs, and it takes long: a ring gives its registered files back only
//! after a grace period of the kernel (20 to 40 ms). Reads and writes of a file without O_DIRECT are
//! carried out by threads of the process, the ring's workers included, and a process is not dead
//! before its last thread is. So a file may be used as soon as the process is dead, and the lock is
//! taken when the ring has gone. A block device is always waited for.
//!
//! Meanwhile nobody else gets the disk: the broker holds a part of the lock by itself.

use super::resources::{Part, lock};
use super::spec::DiskSpec;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

/// A disk of the machine, for as long as the machine lives.
#[derive(Debug)]
pub(super) struct DiskHold {
    /// By it the same file is found again, whatever its name has become.
    guard: File,
    writes: bool,
    block: bool,
}

/// A file description for the next process.
#[derive(Debug)]
pub(super) struct Claimed {
    /// It.
    pub(super) file: File,
    /// The same again while its lock is still to be taken.
    pub(super) unlocked: Option<Unlocked>,
}

/// A file description whose lock an old one still has.
#[derive(Debug)]
pub(super) struct Unlocked {
    file: File,
    writes: bool,
}

impl Unlocked {
    /// Tries to take the lock.
    ///
    /// # Errors
    /// The kernel's error, which will not go away.
    pub(super) fn lock(&self) -> io::Result<bool> {
        match lock(&self.file, Part::Use, self.writes) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl DiskHold {
    /// Of a disk that was opened and locked for its first process.
    ///
    /// # Errors
    /// The kernel's error; EAGAIN when another machine has the disk.
    pub(super) fn new(spec: &DiskSpec, file: &File) -> io::Result<Self> {
        let writes = !spec.read_only;
        let guard = open(file, writes, 0)?;
        lock(&guard, Part::Guard, writes)?;
        Ok(Self {
            block: guard.metadata()?.file_type().is_block_device(),
            guard,
            writes,
        })
    }

    /// Tries to have the disk for the next process. `None` while the last one may still reach it.
    ///
    /// # Errors
    /// The kernel's error, which will not go away.
    pub(super) fn claim(&self) -> io::Result<Option<Claimed>> {
        let exclusive = if self.block && self.writes {
            libc::O_EXCL
        } else {
            0
        };
        let file = match open(&self.guard, self.writes, exclusive) {
            // A block device belongs to its last opener until that is closed.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
            opened => opened?,
        };
        let unlocked = Unlocked {
            file: file.try_clone()?,
            writes: self.writes,
        };
        let unlocked = match unlocked.lock()? {
            true => None,
            false if self.block => return Ok(None),
            false => Some(unlocked),
        };
        Ok(Some(Claimed { file, unlocked }))
    }
}

/// Another file description of the same file. Without O_DIRECT: see above.
fn open(file: &File, writes: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(writes)
        .custom_flags(flags)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    fn image(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("d.img");
        std::fs::write(&path, [7; 512]).unwrap();
        path
    }

    /// A disk as its first process has it.
    fn first(path: &Path, writes: bool) -> (File, DiskHold) {
        let file = OpenOptions::new()
            .read(true)
            .write(writes)
            .open(path)
            .unwrap();
        lock(&file, Part::Use, writes).unwrap();
        let hold = DiskHold::new(&DiskSpec::for_test(path, !writes), &file).unwrap();
        (file, hold)
    }

    #[test]
    fn lock_is_had_when_the_last_reference_of_the_last_process_is_gone_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let (old, hold) = first(&image(&dir), true);
        // As a ring or an operation in progress would hold it.
        let in_flight = old.try_clone().unwrap();
        drop(old);
        let claimed = hold.claim().unwrap().unwrap();
        let unlocked = claimed.unlocked.unwrap();
        assert!(!unlocked.lock().unwrap());
        drop(in_flight);
        assert!(unlocked.lock().unwrap());
        drop(unlocked);
        let next = hold.claim().unwrap().unwrap();
        assert!(next.unlocked.is_some(), "the new process has it");
        claimed.file.write_all_at(&[2], 0).unwrap();
    }

    #[test]
    fn block_device_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (old, hold) = first(&image(&dir), true);
        let hold = DiskHold {
            block: true,
            ..hold
        };
        // O_EXCL means nothing for the file that plays the device.
        assert!(hold.claim().unwrap().is_none());
        drop(old);
        assert!(hold.claim().unwrap().unwrap().unlocked.is_none());
    }

    #[test]
    fn nobody_else_gets_the_disk_between_two_processes() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir);
        let (old, hold) = first(&path, true);
        drop(old);
        for writes in [true, false] {
            let other = OpenOptions::new()
                .read(true)
                .write(writes)
                .open(&path)
                .unwrap();
            lock(&other, Part::Use, writes).unwrap();
            assert!(DiskHold::new(&DiskSpec::for_test(&path, !writes), &other).is_err());
        }
        drop(hold);
        first(&path, true);
    }

    #[test]
    fn same_file_is_found_again_when_its_name_is_another_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir);
        let (old, hold) = first(&path, true);
        drop(old);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, [9; 512]).unwrap();
        let new = hold.claim().unwrap().unwrap();
        let mut byte = [0];
        new.file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn read_only_disk_is_shared_and_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir);
        let (_old, hold) = first(&path, false);
        let (_other, _another_machine) = first(&path, false);
        let new = hold.claim().unwrap().unwrap();
        assert!(new.unlocked.is_none());
        assert!(new.file.write_all_at(&[1], 0).is_err());
    }
}
