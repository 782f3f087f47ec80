//! Giving start-up code back: loaders, decompressors and parsers run once, but the pages of the
//! program that hold them would count as this process's memory for ever.
//!
//! Only mappings of the program file that can never have been written are given back; whatever is
//! needed again comes from the page cache, a few pages at a time. Called once by every kind of
//! process: by sandboxed ones before lock, by the broker when a machine's processes are all locked.
#![allow(
    unsafe_code,
    reason = "the program's own mappings are advised, and malloc_trim is a C function"
)]

use libc::{PF_W, PT_LOAD, c_int, c_void, dl_phdr_info, size_t};

const PAGE_BYTES: usize = 4096;

/// Gives back every page of the program's code and constants. Costs nothing but that the next use
/// of a page finds it in the page cache.
pub fn start_up_code() {
    // SAFETY: the callback has the signature of `dl_iterate_phdr` and keeps nothing.
    unsafe { libc::dl_iterate_phdr(Some(shed), std::ptr::null_mut()) };
}

/// Returns all free pages of the heap to the host: the C library keeps them for later, but nothing of
/// the size of a kernel or a policy is ever needed again.
pub fn free_heap() {
    // SAFETY: malloc_trim takes a number and touches only free memory of the allocator.
    unsafe { libc::malloc_trim(0) };
}

unsafe extern "C" fn shed(info: *mut dl_phdr_info, _size: size_t, _data: *mut c_void) -> c_int {
    // SAFETY: the C library passes a valid structure.
    let info = unsafe { &*info };
    // SAFETY: it says itself how many program headers there are, and they are mapped.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let never_written =
        |header: &&libc::Elf64_Phdr| header.p_type == PT_LOAD && header.p_flags & PF_W == 0;
    for header in headers.iter().filter(never_written) {
        let start = usize::try_from(info.dlpi_addr + header.p_vaddr).unwrap_or(0);
        let end = start + usize::try_from(header.p_memsz).unwrap_or(0);
        let start = start & !(PAGE_BYTES - 1);
        let address = std::ptr::without_provenance_mut(start);
        // SAFETY: the range is mapped read-only from the program file and has no private page, so
        // dropping its pages changes no content. Where it cannot be done nothing is lost.
        unsafe { libc::madvise(address, end - start, libc::MADV_DONTNEED) };
    }
    0
}
