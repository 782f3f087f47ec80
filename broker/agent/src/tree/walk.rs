//! Reads a file or a tree as entries.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{TreeError, lossy};
use bulkhead_ipc::protocol::agent::{
    DATA_BYTES_MAX, DEPTH_MAX, ENTRIES_MAX, Entry, UNSIZED_BYTES_MAX,
};
use nix::dir::{Dir, OwningIter};
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Nothing that is opened blocks, becomes a terminal of ours or leads elsewhere.
const INSIDE: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_NOCTTY)
    .union(OFlag::O_CLOEXEC);

struct Level {
    folder: OwnedFd,
    names: OwningIter,
}

struct Open {
    file: OwnedFd,
    name: Vec<u8>,
    /// What is still to come; `None` while it is not known.
    left: Option<u64>,
    read: u64,
}

/// A file or a tree that is being read.
pub struct Walk {
    first: Option<(OwnedFd, Vec<u8>)>,
    recursive: bool,
    levels: Vec<Level>,
    file: Option<Open>,
    entries: u64,
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Walk");
        shown.field("entries", &self.entries);
        shown.finish_non_exhaustive()
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn permissions(stat: &FileStat) -> u32 {
    stat.st_mode & 0o777
}

impl Walk {
    /// Opens what `path` names; a symbolic link at its end is followed, since this side's user has named it.
    ///
    /// # Errors
    /// When it cannot be opened, or is a folder and none was asked for.
    pub fn new(path: &Path, recursive: bool) -> Result<Self, TreeError> {
        let shown = lossy(path.as_os_str().as_bytes());
        let flags = INSIDE.difference(OFlag::O_NOFOLLOW);
        // A device may do something when it is opened, so that is found out before.
        let stat = nix::sys::stat::stat(path).map_err(|e| TreeError::os(&shown, e))?;
        if !matches!(kind(&stat), SFlag::S_IFREG | SFlag::S_IFDIR) {
            return Err(TreeError::Special(shown));
        }
        let opened = open(path, flags, Mode::empty()).map_err(|e| TreeError::os(&shown, e))?;
        let stat = fstat(&opened).map_err(|e| TreeError::os(&shown, e))?;
        match kind(&stat) {
            SFlag::S_IFDIR if !recursive => return Err(TreeError::Folder(shown)),
            SFlag::S_IFDIR | SFlag::S_IFREG => {}
            _ => return Err(TreeError::Special(shown)),
        }
        let name = path.file_name().unwrap_or(OsStr::new("folder"));
        Ok(Self {
            first: Some((opened, name.as_bytes().to_vec())),
            recursive,
            levels: Vec::new(),
            file: None,
            entries: 0,
        })
    }

    /// The next entry; `None` at the end.
    ///
    /// # Errors
    /// When something cannot be read. The walk is over then.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TreeError> {
        if let Some((opened, name)) = self.first.take() {
            return self.enter(opened, name).map(Some);
        }
        if let Some(open) = self.file.take() {
            return self.read_on(open).map(Some);
        }
        let Some(level) = self.levels.last_mut() else {
            return Ok(None);
        };
        let name = loop {
            match level.names.next() {
                None => {
                    self.levels.pop();
                    return Ok(Some(Entry::Leave));
                }
                Some(Err(errno)) => return Err(TreeError::os("a folder", errno)),
                Some(Ok(found)) => {
                    let name = found.file_name().to_bytes();
                    if !matches!(name, b"." | b"..") {
                        break name.to_vec();
                    }
                }
            }
        };
        let fault = |errno| TreeError::os(&lossy(&name), errno);
        let path = OsStr::from_bytes(&name);
        let found = fstatat(&level.folder, path, AtFlags::AT_SYMLINK_NOFOLLOW);
        let stat = found.map_err(fault)?;
        if !matches!(kind(&stat), SFlag::S_IFREG | SFlag::S_IFDIR) {
            self.count()?;
            return Ok(Some(Entry::Skipped { name }));
        }
        let opened = openat(&level.folder, path, INSIDE, Mode::empty()).map_err(fault)?;
        self.enter(opened, name).map(Some)
    }

    fn count(&mut self) -> Result<(), TreeError> {
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(TreeError::Many(ENTRIES_MAX));
        }
        Ok(())
    }

    fn enter(&mut self, opened: OwnedFd, name: Vec<u8>) -> Result<Entry, TreeError> {
        self.count()?;
        let fault = |errno| TreeError::os(&lossy(&name), errno);
        let stat = fstat(&opened).map_err(fault)?;
        let mode = permissions(&stat);
        match kind(&stat) {
            SFlag::S_IFDIR if self.recursive => {
                if self.levels.len() >= DEPTH_MAX {
                    return Err(TreeError::Deep(lossy(&name)));
                }
                let listed = opened.as_fd().try_clone_to_owned();
                let listed = listed.map_err(|e| {
                    fault(nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(0)))
                })?;
                let names = Dir::from_fd(listed).map_err(fault)?.into_iter();
                let folder = opened;
                self.levels.push(Level { folder, names });
                Ok(Entry::Folder { name, mode })
            }
            SFlag::S_IFREG => {
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                // Files of /proc and the like say that they are empty.
                let left = (size > 0).then_some(size);
                let entry = Entry::File {
                    name: name.clone(),
                    mode,
                    bytes: left,
                };
                self.file = Some(Open {
                    file: opened,
                    name,
                    left,
                    read: 0,
                });
                Ok(entry)
            }
            // It was replaced since it was looked at.
            _ => Ok(Entry::Skipped { name }),
        }
    }

    fn read_on(&mut self, mut open: Open) -> Result<Entry, TreeError> {
        let most = open.left.map_or(DATA_BYTES_MAX, |left| {
            usize::try_from(left).map_or(DATA_BYTES_MAX, |left| left.min(DATA_BYTES_MAX))
        });
        if most == 0 {
            return Ok(Entry::FileEnd);
        }
        let mut bytes = vec![0; most];
        let read = loop {
            match nix::unistd::read(&open.file, &mut bytes) {
                Err(nix::errno::Errno::EINTR) => {}
                read => break read,
            }
        };
        let n = read.map_err(|errno| TreeError::os(&lossy(&open.name), errno))?;
        bytes.truncate(n);
        match (n, open.left) {
            (0, None) => return Ok(Entry::FileEnd),
            (0, Some(_)) => return Err(TreeError::Changed(lossy(&open.name))),
            _ => {}
        }
        let n = u64::try_from(n).unwrap_or(u64::MAX);
        open.read = open.read.saturating_add(n);
        open.left = open.left.map(|left| left.saturating_sub(n));
        if open.left.is_none() && open.read > UNSIZED_BYTES_MAX {
            return Err(TreeError::Large(UNSIZED_BYTES_MAX));
        }
        self.file = Some(open);
        Ok(Entry::Data(bytes))
    }
}
