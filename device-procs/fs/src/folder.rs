//! The folder on the host. Every way from a path or a name to a file is here.
//!
//! A directory is resolved from the folder's descriptor with nothing followed, then one name is used in
//! it by a call that does not follow links either. When the host moves the directory out of the folder
//! between the two, the name is still used in that directory, and never above it.

use crate::nodes::Identity;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Bytes of one name (NAME_MAX).
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// The shared folder.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

/// Which file `stat` is about.
pub(crate) const fn identity(stat: &FileStat) -> Identity {
    Identity {
        dev: stat.st_dev,
        ino: stat.st_ino,
    }
}

/// The type bits of a file.
pub(crate) const fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// Checks one name of the guest: one component, and not `.` or `..`.
pub(crate) fn name(bytes: &[u8]) -> Result<&OsStr, Errno> {
    match bytes {
        b"" | b"." | b".." => Err(Errno::EINVAL),
        _ if bytes.len() > NAME_BYTES_MAX => Err(Errno::ENAMETOOLONG),
        _ if bytes.iter().any(|&b| b == b'/' || b == 0) => Err(Errno::EINVAL),
        _ => Ok(OsStr::from_bytes(bytes)),
    }
}

impl Folder {
    pub(crate) const fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(crate) fn stat(&self) -> Result<FileStat, Errno> {
        fstat(&self.0)
    }

    /// Opens `path` below `dir` with nothing followed.
    fn open_below(dir: impl AsFd, path: &Path, flags: OFlag, mode: Mode) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        // O_PATH with O_NOFOLLOW gives the link itself as the last component.
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(flags).mode(mode).resolve(resolve);
        // RESOLVE_BENEATH says EAGAIN when a rename anywhere raced with `..`, which no path has.
        openat2(dir.as_fd(), path, how)
    }

    /// The file at `path`, without any right to its content, if it is still `expected`.
    pub(crate) fn locate(
        &self,
        path: &Path,
        expected: Identity,
    ) -> Result<(OwnedFd, FileStat), Errno> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let gone = |e| {
            if matches!(e, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) {
                Errno::ESTALE
            } else {
                e
            }
        };
        let fd = Self::open_below(&self.0, path, OFlag::O_PATH, Mode::empty()).map_err(gone)?;
        let stat = fstat(&fd)?;
        if identity(&stat) == expected {
            Ok((fd, stat))
        } else {
            Err(Errno::ESTALE)
        }
    }

    /// What is at `name` in the directory.
    pub(crate) fn look(dir: impl AsFd, name: &OsStr) -> Result<FileStat, Errno> {
        fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Opens the content of `path`, if it is still `expected` and a file or directory: opening
    /// anything else could wait or have an effect.
    pub(crate) fn open(
        &self,
        path: &Path,
        expected: Identity,
        flags: OFlag,
    ) -> Result<File, Errno> {
        let (_, stat) = self.locate(path, expected)?;
        if !matches!(kind(&stat), SFlag::S_IFREG | SFlag::S_IFDIR) {
            return Err(Errno::EPERM);
        }
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let open = |flags| {
            let flags = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            let fd = Self::open_below(&self.0, path, flags, Mode::empty())?;
            match identity(&fstat(&fd)?) == expected {
                true => Ok(File::from(fd)),
                false => Err(Errno::ESTALE),
            }
        };
        // Truncation waits until the file is known to be the right one.
        let file = open(flags - OFlag::O_TRUNC)?;
        if flags.contains(OFlag::O_TRUNC) {
            // What is opened to read alone cannot be truncated by that.
            let writer = match flags & OFlag::O_ACCMODE == OFlag::O_RDONLY {
                true => &open(OFlag::O_WRONLY)?,
                false => &file,
            };
            writer.set_len(0).map_err(|e| errno(&e))?;
        }
        Ok(file)
    }

    /// Makes the file `name`, which must not be there, in the directory.
    pub(crate) fn create(
        dir: &OwnedFd,
        name: &OsStr,
        flags: OFlag,
        mode: Mode,
    ) -> Result<File, Errno> {
        let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        Self::open_below(dir, Path::new(name), flags, mode).map(File::from)
    }
}

/// The error number of what std says; EIO when it has none.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
