//! The exchange of a virtio socket device (virtio 1.2, section 5.10): connections between programs
//! of the guest and Unix sockets of the host, in the manner of Firecracker.
//!
//! ```text
//!   guest ── packets ── Exchange ── Link (one for each connection) ── Stream (a Unix socket)
//! ```
//!
//! Nothing here waits, opens anything or reads a clock: packets, streams and the time are given by
//! the caller. What comes from the guest or from a client on the host is checked before use, and
//! what either may make the exchange keep is bounded. It must never interpret what passes through
//! after the greeting of a client.
#![forbid(unsafe_code)]

mod credit;
pub mod exchange;
pub mod greeting;
pub mod link;
pub mod packet;
