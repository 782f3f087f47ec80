//! Access to physical memory: device registers, tables from the VMM, and memory for DMA.
//!
//! The first 4 GiB are mapped one to one, so that every 32-bit address can be read without a
//! fault. What must not be touched is this image itself; memory for DMA comes from [`allocate`].

use core::sync::atomic::{AtomicU64, Ordering};

static HEAP_NEXT: AtomicU64 = AtomicU64::new(0);
static HEAP_END: AtomicU64 = AtomicU64::new(0);

/// Reads a value that the VMM or a device may change.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: identity mapped; T is one of the unsigned integers.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes a device register or memory shared with a device.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: identity mapped; callers write registers and memory from `allocate` only.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Borrows memory that the VMM filled before it started us.
pub fn bytes(address: u64, len: usize) -> &'static [u8] {
    // SAFETY: identity mapped, and nobody writes the tables from the VMM.
    unsafe { core::slice::from_raw_parts(address as *const u8, len) }
}

/// Gives `allocate` its memory. Called once, by `machine`.
pub fn set_heap(start: u64, end: u64) {
    HEAP_NEXT.store(start, Ordering::Relaxed);
    HEAP_END.store(end, Ordering::Relaxed);
}

/// Leaves [`allocate`] the first `bytes` of what it has left. The rest is the caller's.
pub fn limit_heap(bytes: u64) {
    assert!(bytes <= heap_left(), "out of memory: {bytes} bytes wanted");
    HEAP_END.store(heap_mark() + bytes, Ordering::Relaxed);
}

/// Where the memory for [`allocate`] ends.
pub fn heap_end() -> u64 {
    HEAP_END.load(Ordering::Relaxed)
}

unsafe extern "C" {
    static pdpt: u8;
}

/// Maps what lies between 4 GiB and `end` one to one, with 2 MiB pages. Never undone: the tables are
/// taken from the end of the heap.
pub fn map_beyond_4_gib(end: u64) {
    const GIB: u64 = 1 << 30;
    for gib in 4..end.div_ceil(GIB).min(512) {
        let entry = &raw const pdpt as u64 + 8 * gib;
        if read::<u64>(entry) != 0 {
            continue;
        }
        let address = heap_end() - 4096;
        assert!(heap_left() >= 4096, "out of memory for page tables");
        HEAP_END.store(address, Ordering::Relaxed);
        let directory = Dma { address, len: 4096 };
        for page in 0..512 {
            directory.write(8 * page, (gib * GIB + page as u64 * LARGE_PAGE) | 0xe7);
        }
        write(entry, directory.address | 0x27);
    }
}

/// Size of the pages of every mapping.
pub const LARGE_PAGE: u64 = 2 << 20;

/// Bytes that are left for [`allocate`].
pub fn heap_left() -> u64 {
    HEAP_END
        .load(Ordering::Relaxed)
        .saturating_sub(HEAP_NEXT.load(Ordering::Relaxed))
}

/// What is handed out since is free again. The caller has reset the devices that knew it.
pub fn heap_mark() -> u64 {
    HEAP_NEXT.load(Ordering::Relaxed)
}

/// Frees everything that was allocated since `mark`.
pub fn heap_release(mark: u64) {
    HEAP_NEXT.store(mark, Ordering::Relaxed);
}

/// Zeroed memory of whole pages; panics when there is none.
pub fn allocate(len: usize) -> Dma {
    let len = len.next_multiple_of(4096);
    let address = HEAP_NEXT.load(Ordering::Relaxed);
    assert!(
        len as u64 <= heap_left(),
        "out of memory: {len} bytes wanted"
    );
    HEAP_NEXT.store(address + len as u64, Ordering::Relaxed);
    let mut dma = Dma { address, len };
    dma.all_mut().fill(0);
    dma
}

/// Memory that neither the image nor [`allocate`] uses, to be written from now on.
pub fn claim(start: u64, end: u64) -> Dma {
    Dma {
        address: start,
        len: (end - start) as usize,
    }
}

/// A piece of memory that devices may be told about.
#[derive(Debug, Clone, Copy)]
pub struct Dma {
    /// Its physical address.
    pub address: u64,
    /// Its size in bytes.
    pub len: usize,
}

impl Dma {
    /// A part of it; panics when it reaches beyond.
    pub fn part(&self, offset: usize, len: usize) -> Dma {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "part beyond a buffer"
        );
        Dma {
            address: self.address + offset as u64,
            len,
        }
    }

    /// Its bytes, to be read while no device writes them.
    pub fn all(&self) -> &[u8] {
        // SAFETY: the range came from `allocate` or `claim`, is mapped and initialised.
        unsafe { core::slice::from_raw_parts(self.address as *const u8, self.len) }
    }

    /// Its bytes, to be written while no device uses them.
    pub fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; one owner at a time by construction of the modes.
        unsafe { core::slice::from_raw_parts_mut(self.address as *mut u8, self.len) }
    }

    /// Reads an integer that a device may change.
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        read(self.part(offset, size_of::<T>()).address)
    }

    /// Writes an integer that a device may read.
    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        write(self.part(offset, size_of::<T>()).address, value);
    }
}
