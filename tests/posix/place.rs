//! Where a check works, and how it says what it has found.

use rustix::fs::{CWD, Mode, OFlags, Stat, lstat, openat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Users and groups that own nothing, besides root.
pub(crate) const ALICE: u32 = 64_001;
pub(crate) const BOB: u32 = 64_002;

/// Why a check is not good.
pub(crate) enum Failure {
    /// It cannot be made here.
    Skipped(String),
    /// It did not find what it expects.
    Failed(String),
}

/// What a check comes to.
pub(crate) type Outcome = Result<(), Failure>;
/// One check, in a directory of its own.
pub(crate) type Check = fn(&Place) -> Outcome;

/// What is to succeed.
macro_rules! ok {
    ($what:expr) => {
        match $what {
            Ok(done) => done,
            Err(e) => {
                return Err($crate::place::Failure::Failed(format!(
                    "{}:{}: {}: {e}",
                    file!().rsplit('/').next().unwrap_or_default(),
                    line!(),
                    stringify!($what)
                )));
            }
        }
    };
}

/// What is to be equal.
macro_rules! same {
    ($found:expr, $expected:expr) => {
        match (&$found, &$expected) {
            (found, expected) => {
                if found != expected {
                    return Err($crate::place::Failure::Failed(format!(
                        "{}:{}: {}: {found:?} and not {expected:?}",
                        file!().rsplit('/').next().unwrap_or_default(),
                        line!(),
                        stringify!($found)
                    )));
                }
            }
        }
    };
}

/// What is to be true.
macro_rules! want {
    ($what:expr) => {
        if !$what {
            return Err($crate::place::Failure::Failed(format!(
                "{}:{}: not {}",
                file!().rsplit('/').next().unwrap_or_default(),
                line!(),
                stringify!($what)
            )));
        }
    };
}

/// What is to fail, with one of these errors.
macro_rules! fails {
    ($what:expr, $($error:ident)|+) => {{
        let done = $what.map(|_| ());
        if !matches!(done, $(Err(rustix::io::Errno::$error))|+) {
            return Err($crate::place::Failure::Failed(format!(
                "{}:{}: {}: {done:?} and not {}",
                file!().rsplit('/').next().unwrap_or_default(),
                line!(),
                stringify!($what),
                stringify!($($error)|+)
            )));
        }
    }};
}

pub(crate) use {fails, ok, same, want};

/// A directory of a check's own, which vanishes with it.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn make(directory: &Path) -> Result<Self, Failure> {
        let new = ok!(tempfile::tempdir_in(directory));
        ok!(rustix::fs::chmod(new.path(), Mode::from_raw_mode(0o755)));
        Ok(Self(new))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// The path of a name in it.
    pub(crate) fn at(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.path().join(name.as_ref())
    }

    /// A new file, of mode 0644 and with this content.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> Result<PathBuf, Failure> {
        let path = self.at(name);
        let file = ok!(open_as(
            &path,
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL,
            0o644
        ));
        ok!(std::io::Write::write_all(
            &mut fs::File::from(file),
            content
        ));
        Ok(path)
    }

    /// A new directory, of mode 0755.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.at(name);
        ok!(rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)));
        Ok(path)
    }
}

/// Opens, and makes with `mode` if `flags` say so.
pub(crate) fn open_as(path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
    openat(
        CWD,
        path,
        flags | OFlags::CLOEXEC,
        Mode::from_raw_mode(mode),
    )
}

/// Opens.
pub(crate) fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    open_as(path, flags, 0)
}

/// What is at the path, without following it.
pub(crate) fn stat(path: &Path) -> Result<Stat, Failure> {
    Ok(ok!(lstat(path)))
}

/// Permissions of what is at the path.
pub(crate) fn mode(path: &Path) -> Result<u32, Failure> {
    Ok(stat(path)?.st_mode & 0o7777)
}

/// Long enough for the clock of file systems to have gone on.
pub(crate) fn nap() {
    std::thread::sleep(std::time::Duration::from_millis(25));
}
