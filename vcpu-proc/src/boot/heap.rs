//! Giving memory back to the host before the guest runs.
//!
//! Unpacking a kernel frees everything that it allocated, but the C library keeps freed pages for
//! later. Nothing of that size is ever needed again, and every VM would carry it for its life.
#![allow(unsafe_code, reason = "malloc_trim is a C function")]

/// Returns all free pages of the heap to the host.
pub(super) fn release() {
    // SAFETY: malloc_trim takes a number and touches only free memory of the allocator.
    unsafe { libc::malloc_trim(0) };
}
