//! Shared memory that is mapped, with checked accesses.

use super::{SEALS, SharedError, pieces};
use crate::sync::Ordering;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice,
};

/// Keeps guests' bytes out of core files, whoever may make one.
#[expect(unsafe_code, reason = "madvise on a mapping of our own")]
fn keep_out_of_dumps(map: &MmapRegion) -> Result<(), Errno> {
    // SAFETY: the range is exactly this mapping, and the advice changes no content.
    let result = unsafe { libc::madvise(map.as_ptr().cast(), map.size(), libc::MADV_DONTDUMP) };
    Errno::result(result).map(drop)
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
        keep_out_of_dumps(&map)?;
        Ok(Self { map })
    }

    /// The memfd, to be handed to a successor of the peer.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.map.file_offset().map(|file| file.file().as_fd())
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

    /// Sets `bits` of the u32 at `offset`.
    ///
    /// # Panics
    /// As [`SharedMemory::load`].
    pub fn set_bits(&self, offset: usize, bits: u32, order: Ordering) {
        self.atomic_u32(offset).fetch_or(bits, order);
    }

    /// Takes the u32 at `offset` and leaves zero.
    ///
    /// # Panics
    /// As [`SharedMemory::load`].
    #[must_use]
    pub fn take_bits(&self, offset: usize, order: Ordering) -> u32 {
        self.atomic_u32(offset).swap(0, order)
    }

    /// Copies `bytes` in.
    ///
    /// # Panics
    /// As [`SharedMemory::slice`].
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let to = self.slice(offset, bytes.len());
        for (at, len) in pieces([bytes.as_ptr(), to.ptr_guard().as_ptr()], bytes.len()) {
            if let (Ok(to), Some(from)) = (to.subslice(at, len), bytes.get(at..at + len)) {
                to.copy_from(from);
            }
        }
    }

    /// Fills `bytes` from what is there.
    ///
    /// # Panics
    /// As [`SharedMemory::slice`].
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.slice(offset, bytes.len());
        for (at, len) in pieces([from.ptr_guard().as_ptr(), bytes.as_ptr()], bytes.len()) {
            if let (Ok(from), Some(to)) = (from.subslice(at, len), bytes.get_mut(at..at + len)) {
                from.copy_to(to);
            }
        }
    }

    fn atomic_u32(&self, offset: usize) -> &std::sync::atomic::AtomicU32 {
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
