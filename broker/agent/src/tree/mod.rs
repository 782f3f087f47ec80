//! Files and folders as a sequence of entries: [`Walk`] reads them, [`Plant`] writes them.
//!
//! Every name on the way is one component, looked up in a folder that is held open, and never followed if it
//! is a symbolic link. So nothing that the other side sends, and nothing that somebody does to the folders
//! meanwhile, leads out of the place that this side's user has named.

mod plant;
mod walk;

pub use plant::{Limits, Plant};
pub use walk::Walk;

use bulkhead_ipc::protocol::agent::{ENTRY_BYTES, Entry, FailureKind, NAME_BYTES_MAX};
use nix::errno::Errno;

/// Why a tree cannot be read or written. Names in it are the other side's: escape them before they are shown.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The kernel's error.
    #[error("{path}: {}", .errno.desc())]
    Os {
        /// Where.
        path: String,
        /// What.
        errno: Errno,
    },
    /// It is a folder, and none was asked for.
    #[error("{0} is a folder")]
    Folder(String),
    /// It is neither file nor folder.
    #[error("{0} is neither a file nor a folder")]
    Special(String),
    /// A name that is no name of a file.
    #[error("{0:?} is no name of a file")]
    Name(String),
    /// Folders inside each other without an end.
    #[error("{0}: too many folders inside each other")]
    Deep(String),
    /// Too many files and folders.
    #[error("more than {0} files and folders")]
    Many(u64),
    /// More bytes than allowed.
    #[error("more than {0} bytes")]
    Large(u64),
    /// A file that changed while it was read, or does not have the size that was announced.
    #[error("{0}: its size has changed")]
    Changed(String),
    /// Entries in an order that makes no tree.
    #[error("what was sent is no tree: {0}")]
    Order(&'static str),
}

impl TreeError {
    fn os(path: &str, errno: Errno) -> Self {
        let path = path.to_owned();
        Self::Os { path, errno }
    }

    /// What kind of failure it is.
    #[must_use]
    pub const fn kind(&self) -> FailureKind {
        match self {
            Self::Os { errno, .. } => kind_of(*errno),
            Self::Folder(_) | Self::Special(_) | Self::Name(_) | Self::Order(_) => {
                FailureKind::Invalid
            }
            Self::Deep(_) | Self::Many(_) | Self::Large(_) | Self::Changed(_) => FailureKind::Other,
        }
    }
}

/// What kind of failure an error of the kernel is.
#[must_use]
pub const fn kind_of(errno: Errno) -> FailureKind {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => FailureKind::NotFound,
        Errno::EACCES | Errno::EPERM | Errno::EROFS => FailureKind::Denied,
        Errno::EBUSY | Errno::ETXTBSY => FailureKind::Busy,
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY => FailureKind::Unsupported,
        Errno::EINVAL => FailureKind::Invalid,
        _ => FailureKind::Other,
    }
}

/// Whether bytes are one name of a file.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && !matches!(name, b"." | b"..")
        && !name.iter().any(|&b| b == 0 || b == b'/')
}

/// What an entry counts for while it is under way.
#[must_use]
pub fn weight(entry: &Entry) -> u64 {
    let data = match entry {
        Entry::Data(bytes) => bytes.len(),
        _ => 0,
    };
    ENTRY_BYTES.saturating_add(u64::try_from(data).unwrap_or(u64::MAX))
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests;
