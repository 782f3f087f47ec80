//! `bulkhead-blk`: one virtio block device (virtio 1.2, section 5.2) on a raw image or block device.
//!
//! It holds its disk, its window and an io_uring that can do nothing but read, write, synchronise and
//! allocate on that disk. A write is completed when it is in the kernel, so nothing is lost with
//! this process, and every request can be done again.
#![forbid(unsafe_code)]

mod backend;
mod device;
mod job;
mod request;

pub use device::Blk;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    bulkhead_runtime::run::<Blk>()
}
