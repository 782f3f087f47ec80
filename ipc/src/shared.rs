//! Memory that two processes map: a sealed memfd, and doorbells.
//!
//! Both sides access it with volatile or atomic operations only (`vm-memory`), so no reference to
//! memory that a peer may change ever exists.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use vmm_sys_util::eventfd::EventFd;

#[cfg_attr(loom, path = "shared/modelled.rs")]
mod memory;
mod pieces;

pub use memory::SharedMemory;
use pieces::pieces;

/// Why shared memory could not be made or mapped.
#[derive(Debug, thiserror::Error)]
pub enum SharedError {
    /// The kernel refused.
    #[error("shared memory: {0}")]
    Os(#[from] Errno),
    /// The mapping failed.
    #[error("mapping shared memory: {0}")]
    Map(String),
    /// The descriptor is not a sealed memfd of the agreed size.
    #[error("shared memory has {got} bytes or seals {seals:#x}, expected {expected} sealed bytes")]
    NotSealed {
        /// Its size in bytes.
        got: u64,
        /// Its seals (F_SEAL_*).
        seals: i32,
        /// The agreed size in bytes.
        expected: u64,
    },
}

const SEALS: SealFlag = SealFlag::F_SEAL_GROW
    .union(SealFlag::F_SEAL_SHRINK)
    .union(SealFlag::F_SEAL_SEAL);

/// Makes a memfd of `bytes` zero bytes that can be neither resized nor executed.
///
/// # Errors
/// The kernel's errno.
pub fn sealed_memfd(name: &str, bytes: u64) -> Result<OwnedFd, Errno> {
    // MFD_NOEXEC_SEAL (Linux 6.3) forbids executable mappings through /proc and exec; older
    // kernels answer EINVAL and rely on the system call filter alone.
    let noexec = MFdFlags::from_bits_retain(0x0008);
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = match memfd_create(name, flags | noexec) {
        Err(Errno::EINVAL) => memfd_create(name, flags)?,
        other => other?,
    };
    ftruncate(&fd, i64::try_from(bytes).map_err(|_| Errno::EFBIG)?)?;
    fcntl(&fd, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(fd)
}

/// A doorbell: a non-blocking eventfd. Ringing a full one succeeds, since it has been rung already.
#[derive(Debug)]
pub struct Doorbell(EventFd);

impl Doorbell {
    /// Makes a doorbell that has not been rung.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new() -> std::io::Result<Self> {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }

    /// Rings it. Never blocks, as long as the descriptor is non-blocking, which no device process
    /// can change: `fcntl` is denied to every kind.
    pub fn ring(&self) {
        // A peer can fill the counter; that means 'already rung'. No other error is possible on
        // a live eventfd, and nothing could be done about one here.
        let _already_rung = self.0.write(1);
    }

    /// Takes all rings so far. Returns whether there were any.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// The eventfd itself, for epoll, io_uring, ioeventfd or irqfd.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }

    /// A second descriptor of the same doorbell.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl From<EventFd> for Doorbell {
    fn from(eventfd: EventFd) -> Self {
        Self(eventfd)
    }
}

impl From<OwnedFd> for Doorbell {
    #[expect(
        unsafe_code,
        reason = "EventFd has no constructor from an owned descriptor"
    )]
    fn from(fd: OwnedFd) -> Self {
        use std::os::fd::{FromRawFd, IntoRawFd};
        // SAFETY: the descriptor is owned and given up here; wrong kinds only make calls fail.
        Self(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
    }
}

impl From<Doorbell> for OwnedFd {
    #[expect(
        unsafe_code,
        reason = "EventFd gives its descriptor up as a number only"
    )]
    fn from(bell: Doorbell) -> Self {
        use std::os::fd::{FromRawFd, IntoRawFd};
        // SAFETY: `into_raw_fd` gave the ownership of an open descriptor to us.
        unsafe { Self::from_raw_fd(bell.0.into_raw_fd()) }
    }
}

impl AsFd for Doorbell {
    #[expect(unsafe_code, reason = "EventFd cannot be borrowed as a descriptor")]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd stays open for as long as the doorbell is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Copies between two volatile slices, as far as both go, without looking at the bytes.
pub fn copy<A: BitmapSlice, B: BitmapSlice>(
    from: &VolatileSlice<'_, A>,
    to: &VolatileSlice<'_, B>,
) {
    let len = from.len().min(to.len());
    let places = [from.ptr_guard().as_ptr(), to.ptr_guard().as_ptr()];
    for (at, len) in pieces(places, len) {
        if let (Ok(from), Ok(to)) = (from.subslice(at, len), to.subslice(at, len)) {
            from.copy_to_volatile_slice(to);
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::sync::Ordering;
    use std::os::fd::AsFd;

    #[test]
    fn sealed_memory_cannot_be_resized() {
        let fd = sealed_memfd("t", 8192).unwrap();
        assert_eq!(ftruncate(fd.as_fd(), 0), Err(Errno::EPERM));
        assert_eq!(ftruncate(fd.as_fd(), 16384), Err(Errno::EPERM));
        let memory = SharedMemory::map(fd, 8192).unwrap();
        memory.store(8, 5u32, Ordering::Release);
        assert_eq!(memory.load::<u32>(8, Ordering::Acquire), 5);
    }

    #[test]
    fn unsealed_or_wrongly_sized_memory_is_refused() {
        let fd = memfd_create("t", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        ftruncate(&fd, 8192).unwrap();
        assert!(matches!(
            SharedMemory::map(fd, 8192),
            Err(SharedError::NotSealed { .. })
        ));
        let fd = sealed_memfd("t", 4096).unwrap();
        assert!(matches!(
            SharedMemory::map(fd, 8192),
            Err(SharedError::NotSealed { .. })
        ));
    }

    #[test]
    fn full_doorbell_counts_as_rung() {
        let bell = Doorbell::new().unwrap();
        bell.eventfd().write(u64::MAX - 1).unwrap();
        bell.ring();
        assert!(bell.take());
        assert!(!bell.take());
    }
}
