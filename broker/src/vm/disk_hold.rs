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

use super::resources::{DiskFiles, Hold, Part, lock};
use super::spec::DiskSpec;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

/// A disk of the machine, for as long as the machine lives.
#[derive(Debug)]
pub(super) struct DiskHold {
    own: Vec<FileHold>,
    below: Vec<FileHold>,
    grows: bool,
}

/// One of its files.
#[derive(Debug)]
struct FileHold {
    /// By it the same file is found again, whatever its name has become.
    guard: File,
    hold: Hold,
    block: bool,
}

/// File descriptions for the next process.
#[derive(Debug)]
pub(super) struct Claimed {
    /// They.
    pub(super) files: DiskFiles,
    /// Those again whose locks are still to be taken.
    pub(super) unlocked: Option<Unlocked>,
}

/// File descriptions whose locks old ones still have.
#[derive(Debug)]
pub(super) struct Unlocked {
    files: Vec<File>,
}

impl Unlocked {
    /// Tries to take the locks.
    ///
    /// # Errors
    /// The kernel's error, which will not go away.
    pub(super) fn lock(&self) -> io::Result<bool> {
        for file in &self.files {
            if !try_lock(file, Hold::Write)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn try_lock(file: &File, hold: Hold) -> io::Result<bool> {
    match lock(file, Part::Use, hold) {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl DiskHold {
    /// Of a disk that was opened and locked for its first process.
    ///
    /// # Errors
    /// The kernel's error; EAGAIN when another machine has the disk.
    pub(super) fn new(spec: &DiskSpec, files: &DiskFiles) -> io::Result<Self> {
        let hold = |hold| move |file| FileHold::new(file, hold);
        let own = files.own.iter().map(hold(own_hold(spec)));
        Ok(Self {
            own: own.collect::<io::Result<_>>()?,
            below: files
                .below
                .iter()
                .map(hold(Hold::Read))
                .collect::<io::Result<_>>()?,
            grows: files.grows,
        })
    }

    /// Has a raw image have `bytes` bytes at least, and returns how many it has. A block device has what
    /// it has.
    ///
    /// # Errors
    /// The kernel's error; a block device that is too small.
    pub(super) fn grow(&self, bytes: u64) -> io::Result<u64> {
        let [FileHold { guard, block, .. }] = self.own.as_slice() else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        // The length of a block device is where its end is.
        let has = (&mut &*guard).seek(SeekFrom::End(0))?;
        if has >= bytes {
            return Ok(has);
        }
        if *block {
            return Err(io::Error::other(format!(
                "its block device has {has} bytes, expected {bytes}: that has to grow first"
            )));
        }
        guard.set_len(bytes)?;
        Ok(bytes)
    }

    /// Tries to have the disk for the next process. `None` while the last one may still reach it.
    ///
    /// # Errors
    /// The kernel's error, which will not go away.
    pub(super) fn claim(&self) -> io::Result<Option<Claimed>> {
        let (mut own, mut below, mut unlocked) = (Vec::new(), Vec::new(), Vec::new());
        for (holds, files) in [(&self.own, &mut own), (&self.below, &mut below)] {
            for hold in holds {
                let Some((file, late)) = hold.claim()? else {
                    return Ok(None);
                };
                files.push(file);
                unlocked.extend(late);
            }
        }
        Ok(Some(Claimed {
            files: DiskFiles {
                own,
                below,
                grows: self.grows,
            },
            unlocked: (!unlocked.is_empty()).then_some(Unlocked { files: unlocked }),
        }))
    }
}

/// What is written to an ephemeral disk is the machine's alone.
const fn own_hold(spec: &DiskSpec) -> Hold {
    match spec.ephemeral {
        true => Hold::Write,
        false => Hold::of(spec),
    }
}

impl FileHold {
    fn new(file: &File, hold: Hold) -> io::Result<Self> {
        let guard = open(file, hold.writes(), 0)?;
        lock(&guard, Part::Guard, hold)?;
        Ok(Self {
            block: guard.metadata()?.file_type().is_block_device(),
            guard,
            hold,
        })
    }

    /// A file description, and the same again if its lock is still to be taken.
    fn claim(&self) -> io::Result<Option<(File, Option<File>)>> {
        let exclusive = if self.block && self.hold == Hold::Write {
            libc::O_EXCL
        } else {
            0
        };
        let file = match open(&self.guard, self.hold.writes(), exclusive) {
            // A block device belongs to its last opener until that is closed.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(None),
            opened => opened?,
        };
        // Others share their locks, so only a writer's can still be with its predecessor.
        match try_lock(&file, self.hold)? {
            true => Ok(Some((file, None))),
            false if self.block || self.hold != Hold::Write => Ok(None),
            false => {
                let again = file.try_clone()?;
                Ok(Some((file, Some(again))))
            }
        }
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
    fn hold_of(writes: bool) -> Hold {
        if writes { Hold::Write } else { Hold::Read }
    }

    fn first(path: &Path, writes: bool) -> (File, FileHold) {
        let file = OpenOptions::new()
            .read(true)
            .write(writes)
            .open(path)
            .unwrap();
        lock(&file, Part::Use, hold_of(writes)).unwrap();
        let hold = FileHold::new(&file, hold_of(writes)).unwrap();
        (file, hold)
    }

    #[test]
    fn lock_is_had_when_the_last_reference_of_the_last_process_is_gone_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let (old, hold) = first(&image(&dir), true);
        // As a ring or an operation in progress would hold it.
        let in_flight = old.try_clone().unwrap();
        drop(old);
        let (claimed, unlocked) = hold.claim().unwrap().unwrap();
        let unlocked = Unlocked {
            files: vec![unlocked.unwrap()],
        };
        assert!(!unlocked.lock().unwrap());
        drop(in_flight);
        assert!(unlocked.lock().unwrap());
        drop(unlocked);
        let (_, late) = hold.claim().unwrap().unwrap();
        assert!(late.is_some(), "the new process has it");
        claimed.write_all_at(&[2], 0).unwrap();
    }

    #[test]
    fn block_device_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (old, hold) = first(&image(&dir), true);
        let hold = FileHold {
            block: true,
            ..hold
        };
        // O_EXCL means nothing for the file that plays the device.
        assert!(hold.claim().unwrap().is_none());
        drop(old);
        assert!(hold.claim().unwrap().unwrap().1.is_none());
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
            lock(&other, Part::Use, hold_of(writes)).unwrap();
            assert!(FileHold::new(&other, hold_of(writes)).is_err());
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
        let (new, _) = hold.claim().unwrap().unwrap();
        let mut byte = [0];
        new.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn read_only_disk_is_shared_and_cannot_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir);
        let (_old, hold) = first(&path, false);
        let (_other, _another_machine) = first(&path, false);
        let (new, late) = hold.claim().unwrap().unwrap();
        assert!(late.is_none());
        assert!(new.write_all_at(&[1], 0).is_err());
    }
}
