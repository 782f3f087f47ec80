//! Guest memory: private anonymous memory of this process that no file descriptor refers to. So are the registers that the guest
//! reads.
//!
//! It is mapped once, at start, and stays mapped until the process ends; it is never given to a
//! device process, never in a core dump of this process, and never a source of references, since
//! the guest changes it at any time.
#![allow(unsafe_code, reason = "mappings are made, advised and handed to KVM")]

use bulkhead_ipc::platform::VIRTIO_MMIO_BASE;
use bulkhead_ipc::protocol::birth::HugePages;
use nix::errno::Errno;
use vm_memory::{
    GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::boot::layout;
use crate::kvm::{Access, KvmError, Vm};
use crate::virtio::registers::RegisterFile;

/// Size of a huge page. Host and guest addresses agree modulo this, so that KVM can map them whole.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why a guest cannot have its memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space or pages for it.
    #[error("mapping {bytes} bytes of guest memory ({huge_pages:?} huge pages): {errno}")]
    Map {
        /// Length of the range.
        bytes: u64,
        /// The backing that was asked for.
        huge_pages: HugePages,
        /// The kernel's errno.
        errno: Errno,
    },
    /// The ranges make no guest memory.
    #[error("guest memory of {bytes} bytes: {reason}")]
    Layout {
        /// Size of the guest.
        bytes: u64,
        /// What is wrong.
        reason: String,
    },
    /// KVM refused a range.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Maps `bytes` bytes of zeroed guest memory around the MMIO hole.
///
/// # Errors
/// If the host has not enough; with [`HugePages::Reserved`] that is found here and not later.
pub fn map(bytes: u64, huge_pages: HugePages) -> Result<GuestMemoryMmap, MemoryError> {
    let layout_error = |reason: String| MemoryError::Layout { bytes, reason };
    let regions = layout::memory_ranges(bytes)
        .into_iter()
        .map(|(start, length)| {
            let region = map_range(length, huge_pages).map_err(|errno| MemoryError::Map {
                bytes: length,
                huge_pages,
                errno,
            })?;
            GuestRegionMmap::new(region, start)
                .ok_or_else(|| layout_error(format!("range at {:#x} ends beyond 2^64", start.0)))
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(|error| layout_error(error.to_string()))
}

/// Memory of this process that the guest may be let read. The mapping is never removed.
///
/// # Errors
/// The kernel's errno.
pub(crate) fn map_registers(bytes: usize) -> Result<MmapRegion, Errno> {
    map_range(bytes as u64, HugePages::Off)
}

/// Gives the memory to the VM, and lets its guest read the registers where KVM has memory that can only be read. Called
/// before the interrupt controllers exist: afterwards each range takes milliseconds.
///
/// # Errors
/// KVM's errno.
pub fn register(
    vm: &Vm,
    memory: &GuestMemoryMmap,
    registers: &RegisterFile,
) -> Result<(), MemoryError> {
    let mut slots = 0u32..;
    for (region, slot) in memory.iter().zip(slots.by_ref()) {
        let guest = region.start_addr();
        let host = region
            .get_host_address(vm_memory::MemoryRegionAddress(0))
            .map_err(|error| MemoryError::Layout {
                bytes: region.len(),
                reason: error.to_string(),
            })?;
        // SAFETY: `map_range` never unmaps, and guest memory is only accessed by volatile copies.
        unsafe { vm.add_memory(slot, guest.0, host, region.len(), Access::ReadWrite) }?;
    }
    if let Some(slot) = slots.next() {
        let (host, bytes) = registers.memory();
        // SAFETY: `map_range` never unmaps, and registers are only accessed as atomics and by volatile copies.
        let added = unsafe { vm.add_memory(slot, VIRTIO_MMIO_BASE, host, bytes, Access::Read) };
        match added {
            // The flag is unknown.
            Err(error) if error.errno.errno() == libc::EINVAL => {
                tracing::warn!(%error, "no memory that can only be read: reads of registers exit");
            }
            added => added?,
        }
    }
    Ok(())
}

/// Maps one range at a multiple of the huge page size. The mapping is never removed.
fn map_range(bytes: u64, huge_pages: HugePages) -> Result<MmapRegion, Errno> {
    let size = usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let address = if huge_pages == HugePages::Reserved {
        flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        mmap(size, protection, flags)?
    } else {
        flags |= libc::MAP_NORESERVE;
        let whole = size.checked_add(HUGE_PAGE_BYTES).ok_or(Errno::ENOMEM)?;
        let start = mmap(whole, protection, flags)?;
        let head = start.addr().next_multiple_of(HUGE_PAGE_BYTES) - start.addr();
        let aligned = start.wrapping_byte_add(head);
        unmap(start, head)?;
        unmap(aligned.wrapping_byte_add(size), HUGE_PAGE_BYTES - head)?;
        aligned
    };
    if huge_pages == HugePages::Transparent {
        // EINVAL says that the kernel has none; then the guest runs on small pages.
        let _without_huge_pages = advise(address, size, libc::MADV_HUGEPAGE);
    }
    advise(address, size, libc::MADV_DONTDUMP)?;
    // SAFETY: the mapping above has this size, protection and these flags, and stays.
    unsafe { MmapRegion::build_raw(address.cast(), size, protection, flags) }
        .map_err(|_| Errno::EINVAL)
}

fn mmap(size: usize, protection: i32, flags: i32) -> Result<*mut libc::c_void, Errno> {
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(address)
    }
}

fn unmap(address: *mut libc::c_void, size: usize) -> Result<(), Errno> {
    if size == 0 {
        return Ok(());
    }
    // SAFETY: only called for parts of a fresh mapping that nobody knows of yet.
    Errno::result(unsafe { libc::munmap(address, size) }).map(drop)
}

fn advise(address: *mut libc::c_void, size: usize, advice: i32) -> Result<(), Errno> {
    // SAFETY: only called for a fresh mapping, with advice that keeps its content.
    Errno::result(unsafe { libc::madvise(address, size, advice) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::platform;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn memory_surrounds_the_hole_and_is_aligned_for_huge_pages() {
        let bytes = 5 << 30;
        let memory = map(bytes, HugePages::Transparent).unwrap();
        let top = platform::MMIO_HOLE_END + bytes - platform::MMIO_HOLE_START;
        let is_memory = |address| memory.address_in_range(GuestAddress(address));
        assert!(is_memory(platform::MMIO_HOLE_START - 1));
        assert!(!is_memory(platform::MMIO_HOLE_START));
        assert!(is_memory(platform::MMIO_HOLE_END));
        assert!(is_memory(top - 1) && !is_memory(top));
        for region in memory.iter() {
            let host = region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .unwrap();
            assert_eq!(host.addr() % HUGE_PAGE_BYTES, 0);
        }
        memory.write_obj(7u64, GuestAddress(top - 8)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(top - 8)).unwrap(), 7);
    }

    #[test]
    fn more_reserved_pages_than_the_host_has_are_refused_at_once() {
        let error = map(1 << 40, HugePages::Reserved).unwrap_err();
        assert!(matches!(error, MemoryError::Map { .. }), "{error}");
    }
}
