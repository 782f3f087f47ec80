//! Writes a file or a tree that somebody else describes, who may lie.
//!
//! A file is written under a name of ours and gets its own when it is complete. What was begun and not
//! completed is removed; of a program that is killed, a hidden `.bulkhead-….partial` stays.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{TreeError, is_name, lossy};
use bulkhead_ipc::protocol::agent::{
    Copied, DATA_BYTES_MAX, DEPTH_MAX, ENTRIES_MAX, Entry, UNSIZED_BYTES_MAX,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

const FOLDER: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);
const PARTIAL: OFlag = OFlag::O_WRONLY
    .union(OFlag::O_CREAT)
    .union(OFlag::O_EXCL)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);
/// Names that are tried for a file that is being written.
const ATTEMPTS: u32 = 100;

/// What a tree may be at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files and folders.
    pub entries: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: ENTRIES_MAX,
            bytes: u64::MAX,
        }
    }
}

#[derive(Debug)]
struct Level {
    folder: Rc<OwnedFd>,
    /// Permissions that it gets in the end; `None` of one that was there before.
    mode: Option<Mode>,
}

#[derive(Debug)]
struct Partial {
    folder: Rc<OwnedFd>,
    name: OsString,
    hidden: OsString,
    file: OwnedFd,
    mode: Mode,
    announced: Option<u64>,
    written: u64,
    complete: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.complete {
            // A name that is left behind is hidden, and no part of what was wanted.
            let _left = unlinkat(
                &*self.folder,
                self.hidden.as_os_str(),
                UnlinkatFlags::NoRemoveDir,
            );
        }
    }
}

/// A file or a tree that is being written.
#[derive(Debug)]
pub struct Plant {
    /// Where the first entry goes, under which name.
    top: Rc<OwnedFd>,
    top_name: Vec<u8>,
    begun: bool,
    levels: Vec<Level>,
    file: Option<Partial>,
    limits: Limits,
    copied: Copied,
}

impl Plant {
    /// Prepares to write to `path`. If that is a folder, what comes goes into it under the name `name`;
    /// otherwise it becomes `path` itself.
    ///
    /// # Errors
    /// When there is no folder to write to, or no name.
    pub fn new(path: &Path, name: &[u8], limits: Limits) -> Result<Self, TreeError> {
        let (folder, name) = match path.metadata() {
            Ok(found) if found.is_dir() => (path.to_owned(), name.to_vec()),
            _ => {
                let name = path.file_name().filter(|_| !ends_with_slash(path));
                let name = name.map(OsStrExt::as_bytes).unwrap_or_default();
                (parent(path), name.to_vec())
            }
        };
        if !is_name(&name) {
            return Err(TreeError::Name(lossy(&name)));
        }
        let opened = open(&folder, FOLDER, Mode::empty());
        let top = opened.map_err(|e| TreeError::os(&lossy(folder.as_os_str().as_bytes()), e))?;
        Ok(Self {
            top: Rc::new(top),
            top_name: name,
            begun: false,
            levels: Vec::new(),
            file: None,
            limits,
            copied: Copied::default(),
        })
    }

    /// Writes what comes next.
    ///
    /// # Errors
    /// When it makes no sense, is too much, or cannot be written. Nothing may follow.
    pub fn add(&mut self, entry: Entry) -> Result<(), TreeError> {
        match entry {
            Entry::Folder { name, mode } => self.folder(name, mode),
            Entry::Leave => self.leave(),
            Entry::File { name, mode, bytes } => self.begin(name, mode, bytes),
            Entry::Data(bytes) => self.write(&bytes),
            Entry::FileEnd => self.end(),
            Entry::Skipped { name } => {
                self.place(name)?;
                self.copied.skipped += 1;
                Ok(())
            }
        }
    }

    /// What was written, once that is complete.
    ///
    /// # Errors
    /// When something is missing.
    pub fn finish(self) -> Result<Copied, TreeError> {
        if !self.begun || self.file.is_some() || !self.levels.is_empty() {
            return Err(TreeError::Order("it ends too early"));
        }
        Ok(self.copied)
    }

    /// What was written so far.
    #[must_use]
    pub const fn copied(&self) -> Copied {
        self.copied
    }

    /// The folder in which the next entry is, and its name there.
    fn place(&mut self, name: Vec<u8>) -> Result<(Rc<OwnedFd>, OsString), TreeError> {
        if self.file.is_some() {
            return Err(TreeError::Order("a file in a file"));
        }
        let (folder, name) = match self.levels.last() {
            Some(level) => (Rc::clone(&level.folder), name),
            None if !self.begun => (Rc::clone(&self.top), self.top_name.clone()),
            None => return Err(TreeError::Order("more than one tree")),
        };
        self.begun = true;
        if !is_name(&name) {
            return Err(TreeError::Name(lossy(&name)));
        }
        let Copied {
            files,
            folders,
            skipped,
            ..
        } = self.copied;
        if files + folders + skipped >= self.limits.entries {
            return Err(TreeError::Many(self.limits.entries));
        }
        Ok((folder, OsStr::from_bytes(&name).to_owned()))
    }

    fn folder(&mut self, name: Vec<u8>, mode: u32) -> Result<(), TreeError> {
        let (folder, name) = self.place(name)?;
        let fault = |errno| TreeError::os(&lossy(name.as_bytes()), errno);
        if self.levels.len() >= DEPTH_MAX {
            return Err(TreeError::Deep(lossy(name.as_bytes())));
        }
        // Nobody else's until it is complete.
        let mode = match mkdirat(&*folder, name.as_os_str(), Mode::S_IRWXU) {
            Ok(()) => Some(permissions(mode)),
            Err(Errno::EEXIST) => None,
            Err(errno) => return Err(fault(errno)),
        };
        let flags = FOLDER | OFlag::O_NOFOLLOW;
        let opened = openat(&*folder, name.as_os_str(), flags, Mode::empty()).map_err(fault)?;
        self.copied.folders += 1;
        self.levels.push(Level {
            folder: Rc::new(opened),
            mode,
        });
        Ok(())
    }

    fn leave(&mut self) -> Result<(), TreeError> {
        if self.file.is_some() {
            return Err(TreeError::Order("a folder that ends in a file"));
        }
        let level = self.levels.pop();
        let level = level.ok_or(TreeError::Order("a folder that ends and has not begun"))?;
        if let Some(mode) = level.mode {
            fchmod(&*level.folder, mode).map_err(|e| TreeError::os("a folder", e))?;
        }
        Ok(())
    }

    fn begin(&mut self, name: Vec<u8>, mode: u32, bytes: Option<u64>) -> Result<(), TreeError> {
        let (folder, name) = self.place(name)?;
        // Room is not taken for what was only announced, but it is refused before it is sent.
        if self.copied.bytes.saturating_add(bytes.unwrap_or(0)) > self.limits.bytes {
            return Err(TreeError::Large(self.limits.bytes));
        }
        let (hidden, file) =
            partial(folder.as_fd()).map_err(|e| TreeError::os(&lossy(name.as_bytes()), e))?;
        self.file = Some(Partial {
            folder,
            name,
            hidden,
            file,
            mode: permissions(mode),
            announced: bytes,
            written: 0,
            complete: false,
        });
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), TreeError> {
        let open = self.file.as_mut();
        let open = open.ok_or(TreeError::Order("data of no file"))?;
        if bytes.is_empty() || bytes.len() > DATA_BYTES_MAX {
            return Err(TreeError::Order("a piece of data of no legal size"));
        }
        let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let after = open.written.saturating_add(more);
        if after > open.announced.unwrap_or(UNSIZED_BYTES_MAX) {
            return Err(TreeError::Changed(lossy(open.name.as_bytes())));
        }
        if self.copied.bytes.saturating_add(more) > self.limits.bytes {
            return Err(TreeError::Large(self.limits.bytes));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match nix::unistd::write(&open.file, rest) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(TreeError::os(&lossy(open.name.as_bytes()), errno)),
            }
        }
        open.written = after;
        self.copied.bytes += more;
        Ok(())
    }

    fn end(&mut self) -> Result<(), TreeError> {
        let open = self.file.take();
        let mut open = open.ok_or(TreeError::Order("a file that ends and has not begun"))?;
        if open.announced.is_some_and(|bytes| bytes != open.written) {
            return Err(TreeError::Changed(lossy(open.name.as_bytes())));
        }
        let fault = |errno| TreeError::os(&lossy(open.name.as_bytes()), errno);
        fchmod(&open.file, open.mode).map_err(fault)?;
        let (folder, hidden) = (&*open.folder, open.hidden.as_os_str());
        // A link of that name is replaced and not followed.
        renameat(folder, hidden, folder, open.name.as_os_str()).map_err(fault)?;
        open.complete = true;
        self.copied.files += 1;
        Ok(())
    }
}

/// Permissions alone: a program of somebody else does not get anybody's rights here.
const fn permissions(mode: u32) -> Mode {
    Mode::from_bits_truncate(mode & 0o777)
}

fn ends_with_slash(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(b"/")
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => ".".into(),
        Some(parent) => parent.to_owned(),
        None => "/".into(),
    }
}

fn partial(folder: BorrowedFd<'_>) -> Result<(OsString, OwnedFd), Errno> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    for _ in 0..ATTEMPTS {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let hidden = format!(".bulkhead-{}-{count}.partial", std::process::id());
        match openat(
            folder,
            hidden.as_str(),
            PARTIAL,
            Mode::S_IRUSR | Mode::S_IWUSR,
        ) {
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
            Ok(file) => return Ok((hidden.into(), file)),
        }
    }
    Err(Errno::EEXIST)
}
