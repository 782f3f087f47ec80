//! `bulkhead-vsock`: one virtio socket device (virtio 1.2, section 5.10): connections between programs
//! of the guest and Unix sockets of the host, in the manner of Firecracker.
//!
//! ```text
//!   guest ── packets ── Exchange ── Link (one for each connection) ── Stream (a Unix socket)
//! ```
//!
//! The process holds the machine's listening socket, at which clients of the host ask for connections
//! to the guest, and is given a connected socket by the broker for each connection to a listener of the
//! host that the guest asks for: it can open no path itself.
//!
//! Nothing in the exchange waits, opens anything or reads a clock: packets, streams and the time are
//! given by [`device`]. What comes from the guest or from a client on the host is checked before use,
//! and what either may make the exchange keep is bounded. It must never interpret what passes through
//! after the greeting of a client.
#![forbid(unsafe_code)]

mod client;
mod credit;
mod device;
mod dials;
pub mod exchange;
pub mod greeting;
pub mod link;
pub mod packet;
mod request;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    bulkhead_runtime::run::<device::Sockets>()
}
