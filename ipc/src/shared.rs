//! Memory that two processes map: a sealed memfd, and doorbells.
//!
//! Both sides access it with volatile or atomic operations only (`vm-memory`), so no reference to
//! memory that a peer may change ever exists.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice,
};
use vmm_sys_util::eventfd::EventFd;

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

/// A mapped piece of shared memory. Offsets are checked on every access; an access out of range is
/// a bug of the caller, since offsets come from the agreed layout and never from the memory.
#[derive(Debug)]
pub struct SharedMemory {
    map: MmapRegion,
}

impl SharedMemory {
    /// Maps `fd`, which must be a memfd of exactly `bytes` bytes sealed against resizing.
    ///
    /// # Errors
    /// [`SharedError::NotSealed`] when the peer could shrink it under us.
    pub fn map(fd: OwnedFd, bytes: u64) -> Result<Self, SharedError> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)?;
        let file = File::from(fd);
        let got = nix::sys::stat::fstat(file.as_fd())?.st_size;
        let got = u64::try_from(got).unwrap_or(0);
        if got != bytes || seals & SEALS.bits() != SEALS.bits() {
            return Err(SharedError::NotSealed {
                got,
                seals,
                expected: bytes,
            });
        }
        let len = usize::try_from(bytes).map_err(|_| Errno::EFBIG)?;
        let map = MmapRegion::from_file(FileOffset::new(file, 0), len)
            .map_err(|e| SharedError::Map(e.to_string()))?;
        Ok(Self { map })
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.size()
    }

    /// Whether it has no bytes (it never does).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes `offset..offset + len`.
    ///
    /// # Panics
    /// When the range is outside: a layout bug of this side.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> VolatileSlice<'_> {
        match self.map.get_slice(offset, len) {
            Ok(slice) => slice,
            Err(_) => outside(offset, len, self.len()),
        }
    }

    /// Reads one atomic value (little-endian host: the layout's byte order is the CPU's).
    ///
    /// # Panics
    /// As [`SharedMemory::slice`], or when unaligned.
    #[must_use]
    pub fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> T {
        match self.whole().load(offset, order) {
            Ok(value) => value,
            Err(_) => outside(offset, size_of::<T>(), self.len()),
        }
    }

    /// Writes one atomic value.
    ///
    /// # Panics
    /// As [`SharedMemory::load`].
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) {
        if self.whole().store(value, offset, order).is_err() {
            outside(offset, size_of::<T>(), self.len())
        }
    }

    /// Copies a plain value out.
    ///
    /// # Panics
    /// As [`SharedMemory::slice`].
    #[must_use]
    pub fn read<T: ByteValued>(&self, offset: usize) -> T {
        match self.whole().read_obj(offset) {
            Ok(value) => value,
            Err(_) => outside(offset, size_of::<T>(), self.len()),
        }
    }

    /// Copies a plain value in.
    ///
    /// # Panics
    /// As [`SharedMemory::slice`].
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) {
        if self.whole().write_obj(value, offset).is_err() {
            outside(offset, size_of::<T>(), self.len())
        }
    }

    /// The mapping, for a `vm-memory` region over the whole of it.
    #[must_use]
    pub fn into_region(self) -> MmapRegion {
        self.map
    }

    /// An atomic u32 inside, for read-modify-write operations.
    ///
    /// # Panics
    /// As [`SharedMemory::load`].
    #[must_use]
    pub fn atomic_u32(&self, offset: usize) -> &std::sync::atomic::AtomicU32 {
        match self.map.get_atomic_ref(offset) {
            Ok(value) => value,
            Err(_) => outside(offset, 4, self.len()),
        }
    }

    fn whole(&self) -> VolatileSlice<'_> {
        self.map.as_volatile_slice()
    }
}

#[expect(
    clippy::panic,
    reason = "a layout bug of this side, never a peer's doing"
)]
fn outside(offset: usize, len: usize, size: usize) -> ! {
    panic!("layout bug: {len} bytes at {offset:#x} in shared memory of {size:#x} bytes");
}

/// Copies between two volatile slices of equal length without looking at the bytes.
pub fn copy<A: BitmapSlice, B: BitmapSlice>(from: &VolatileSlice<'_, A>, to: VolatileSlice<'_, B>) {
    from.copy_to_volatile_slice(to);
}

#[cfg(test)]
mod tests {
    use super::*;
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
