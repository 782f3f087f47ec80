//! The descriptors a process was born with, handed out once each by role.
//!
//! The set is exact: a role that is missing, comes twice, is of the wrong kind, or is left over when
//! the process has set itself up stops its birth.

use crate::sys;
use bulkhead_ipc::protocol::birth::{FIRST_GRANT_FD, FdRole, GRANTS_MAX, Grant};
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What is wrong with the descriptors.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// More than [`GRANTS_MAX`].
    #[error("{got} descriptors granted, at most {GRANTS_MAX} expected")]
    TooMany {
        /// How many.
        got: usize,
    },
    /// A number outside of the range for grants, or named twice.
    #[error(
        "grant {role:?}/{index} names descriptor {fd}, expected one of its own from {FIRST_GRANT_FD} on"
    )]
    Number {
        /// Its role.
        role: FdRole,
        /// Its index.
        index: u16,
        /// The number.
        fd: RawFd,
    },
    /// Two grants have the same role and index.
    #[error("{role:?}/{index} is granted twice")]
    Twice {
        /// Its role.
        role: FdRole,
        /// Its index.
        index: u16,
    },
    /// The process needs it and does not have it.
    #[error("{role:?}/{index} is not granted")]
    Missing {
        /// Its role.
        role: FdRole,
        /// Its index.
        index: u16,
    },
    /// It has it and does not need it.
    #[error("{role:?}/{index} is granted, but this process has no use for it")]
    Unused {
        /// Its role.
        role: FdRole,
        /// Its index.
        index: u16,
    },
    /// Its kind of file is not the role's.
    #[error("{role:?}/{index} has file type {got:#o}, expected {expected}")]
    Kind {
        /// Its role.
        role: FdRole,
        /// Its index.
        index: u16,
        /// Type bits of its mode.
        got: u32,
        /// What the role needs.
        expected: &'static str,
    },
    /// The kernel refused.
    #[error("descriptor {fd}: {errno}")]
    Os {
        /// The number.
        fd: RawFd,
        /// Why.
        errno: Errno,
    },
}

/// The grants that have not been taken yet.
#[derive(Debug, Default)]
pub struct Grants {
    held: Vec<(FdRole, u16, OwnedFd)>,
}

impl Grants {
    /// Takes ownership of the descriptors that the birth message names and closes all others from
    /// [`FIRST_GRANT_FD`] on but `kept`.
    ///
    /// # Errors
    /// [`GrantError`] when the list is not sound.
    pub fn adopt(list: &[Grant], kept: &[OwnedFd]) -> Result<Self, GrantError> {
        if list.len() > GRANTS_MAX {
            return Err(GrantError::TooMany { got: list.len() });
        }
        let mut sorted: Vec<Grant> = list.to_vec();
        sorted.sort_by_key(|g| g.fd);
        let mut grants = Self::default();
        let mut kept: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
        kept.sort_unstable();
        let close_between = |first, end| close_between(first, end, &kept);
        let mut next = FIRST_GRANT_FD;
        for Grant { role, index, fd } in sorted {
            if fd < next || kept.contains(&fd) {
                return Err(GrantError::Number { role, index, fd });
            }
            if grants.position(role, index).is_some() {
                return Err(GrantError::Twice { role, index });
            }
            close_between(next, fd)?;
            let owned = sys::adopt(fd).map_err(|errno| GrantError::Os { fd, errno })?;
            check_kind(role, index, &owned)?;
            grants.held.push((role, index, owned));
            next = fd.saturating_add(1);
        }
        close_between(next, RawFd::MAX)?;
        Ok(grants)
    }

    /// Hands out one descriptor.
    ///
    /// # Errors
    /// [`GrantError::Missing`] when it was not granted or has been taken.
    pub fn take(&mut self, role: FdRole, index: u16) -> Result<OwnedFd, GrantError> {
        let place = self
            .position(role, index)
            .ok_or(GrantError::Missing { role, index })?;
        Ok(self.held.swap_remove(place).2)
    }

    /// Looks at one descriptor that has not been taken.
    ///
    /// # Errors
    /// As [`Grants::take`].
    pub fn look(&self, role: FdRole, index: u16) -> Result<BorrowedFd<'_>, GrantError> {
        let missing = GrantError::Missing { role, index };
        let held = self.position(role, index).and_then(|n| self.held.get(n));
        held.map(|held| held.2.as_fd()).ok_or(missing)
    }

    /// Whether it is granted and has not been taken: for roles that a policy may leave out.
    #[must_use]
    pub fn has(&self, role: FdRole, index: u16) -> bool {
        self.position(role, index).is_some()
    }

    /// Ends the set-up: everything granted must have been taken.
    ///
    /// # Errors
    /// [`GrantError::Unused`] names one that was not.
    pub fn finish(&self) -> Result<(), GrantError> {
        match self.held.first() {
            Some(&(role, index, _)) => Err(GrantError::Unused { role, index }),
            None => Ok(()),
        }
    }

    /// Grants made of descriptors in hand, for tests of devices.
    #[cfg(any(test, feature = "testing"))]
    #[must_use]
    pub fn of(held: Vec<(FdRole, u16, OwnedFd)>) -> Self {
        Self { held }
    }

    fn position(&self, role: FdRole, index: u16) -> Option<usize> {
        self.held.iter().position(|h| (h.0, h.1) == (role, index))
    }
}

/// Closes what is open from `first` on and below `end`, but for `keep`, which is sorted.
fn close_between(first: RawFd, end: RawFd, keep: &[RawFd]) -> Result<(), GrantError> {
    let range = first..end;
    let kept = keep.iter().copied().filter(|fd| range.contains(fd));
    let mut next = first;
    for stop in kept.chain([end]) {
        if next < stop {
            let last = if stop == RawFd::MAX { stop } else { stop - 1 };
            sys::close_range(next, last).map_err(|errno| GrantError::Os { fd: next, errno })?;
        }
        next = stop.saturating_add(1);
    }
    Ok(())
}

fn check_kind(role: FdRole, index: u16, fd: &OwnedFd) -> Result<(), GrantError> {
    let stat = fstat(fd).map_err(|errno| GrantError::Os { fd: -1, errno })?;
    let got = type_bits(&stat);
    let (allowed, expected): (&[SFlag], _) = match role {
        FdRole::Kvm | FdRole::Entropy | FdRole::Tap => (&[SFlag::S_IFCHR], "a character device"),
        FdRole::Disk | FdRole::Image | FdRole::Backing | FdRole::Target => {
            (&[SFlag::S_IFREG, SFlag::S_IFBLK], "a file or block device")
        }
        FdRole::Folder => (&[SFlag::S_IFDIR], "a directory"),
        FdRole::Kernel
        | FdRole::Initrd
        | FdRole::Core
        | FdRole::Output
        | FdRole::Window
        | FdRole::Port
        | FdRole::LegacyPage
        | FdRole::Input => (&[SFlag::S_IFREG], "a regular file"),
        FdRole::Listener | FdRole::Frames => (&[SFlag::S_IFSOCK], "a socket"),
        FdRole::Kick
        | FdRole::Call
        | FdRole::PortKick
        | FdRole::PortCall
        | FdRole::LegacyKick
        | FdRole::LegacyInterrupt
        | FdRole::LegacyReply
        | FdRole::OutputBell
        | FdRole::InputBell => (&[SFlag::empty()], "an eventfd"),
    };
    if allowed.contains(&got) {
        return Ok(());
    }
    Err(GrantError::Kind {
        role,
        index,
        got: got.bits(),
        expected,
    })
}

fn type_bits(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::shared::sealed_memfd;
    use std::fs::File;

    fn eventfd() -> OwnedFd {
        nix::sys::eventfd::EventFd::new().unwrap().into()
    }

    #[test]
    fn grant_is_handed_out_once() {
        let mut grants = Grants::of(vec![(FdRole::Kick, 0, eventfd())]);
        assert!(grants.has(FdRole::Kick, 0));
        assert!(grants.take(FdRole::Kick, 0).is_ok());
        assert!(matches!(
            grants.take(FdRole::Kick, 0),
            Err(GrantError::Missing { .. })
        ));
        grants.finish().unwrap();
    }

    #[test]
    fn grant_without_use_is_refused() {
        let grants = Grants::of(vec![(FdRole::Kick, 3, eventfd())]);
        assert!(matches!(
            grants.finish(),
            Err(GrantError::Unused {
                role: FdRole::Kick,
                index: 3
            })
        ));
    }

    #[test]
    fn kind_of_file_must_be_the_roles() {
        let memfd = sealed_memfd("g", 4096).unwrap();
        assert!(check_kind(FdRole::Window, 0, &memfd).is_ok());
        assert!(check_kind(FdRole::Kick, 0, &memfd).is_err());
        assert!(check_kind(FdRole::Call, 0, &eventfd()).is_ok());
        assert!(check_kind(FdRole::Window, 0, &eventfd()).is_err());
        let null: OwnedFd = File::open("/dev/null").unwrap().into();
        assert!(check_kind(FdRole::Entropy, 0, &null).is_ok());
        assert!(check_kind(FdRole::Disk, 0, &null).is_err());
        let socket: OwnedFd = std::os::unix::net::UnixStream::pair().unwrap().0.into();
        assert!(check_kind(FdRole::Listener, 0, &socket).is_ok());
        assert!(check_kind(FdRole::Listener, 0, &null).is_err());
    }

    #[test]
    fn numbers_below_the_grants_and_repeated_ones_are_refused() {
        let grant = |fd| Grant {
            role: FdRole::Kick,
            index: 0,
            fd,
        };
        for list in [vec![grant(2)], vec![grant(-1)]] {
            assert!(matches!(
                Grants::adopt(&list, &[]),
                Err(GrantError::Number { .. })
            ));
        }
        let many = vec![grant(7); GRANTS_MAX + 1];
        assert!(matches!(
            Grants::adopt(&many, &[]),
            Err(GrantError::TooMany { .. })
        ));
        let own = eventfd();
        assert!(matches!(
            Grants::adopt(&[grant(own.as_raw_fd())], &[own]),
            Err(GrantError::Number { .. })
        ));
    }
}
