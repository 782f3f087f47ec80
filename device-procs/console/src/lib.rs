//! `bulkhead-console`: one virtio console with one port (virtio 1.2, section 5.3).
//!
//! It holds the console's output file, its input ring and its window. It must never interpret what
//! passes through: escape sequences are the terminal's business, and readers' to filter.
#![forbid(unsafe_code)]

mod backend;
mod device;
mod request;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    bulkhead_runtime::run::<device::Console>()
}
