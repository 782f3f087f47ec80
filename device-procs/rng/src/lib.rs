//! `bulkhead-rng`: one virtio entropy device (virtio 1.2, section 5.4). The device to read first.
//!
//! It holds the host's entropy source and its window, and fills the guest's buffers from the one
//! through the other. It must never keep, mix or reuse what it has read.
#![forbid(unsafe_code)]

mod backend;
mod device;
mod request;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    bulkhead_runtime::run::<device::EntropyDevice>()
}
