//! `bulkhead-net`: one virtio network device (virtio 1.2, section 5.1).
//!
//! It holds one end of a wire ([`backend`]) and its window, and carries frames from the one to the other.
//! It must never look into a frame further than it has to: only where a driver cannot take what the wire
//! delivers are checksums filled in and large segments cut up ([`offload`]).
#![forbid(unsafe_code)]

mod backend;
pub mod control;
mod device;
#[cfg(test)]
mod device_tests;
mod inbox;
pub mod offload;
mod port;
#[cfg(test)]
mod port_tests;
pub mod request;
mod stream;
#[cfg(test)]
mod stream_tests;

pub use device::Net;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    bulkhead_runtime::run::<Net>()
}
