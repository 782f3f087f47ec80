//! Every control message, one file per boundary. Plain data: fixed-width integers, stated maximum
//! sizes, no I/O. Each message says who sends it and whether it may be sent again (*idempotent*).

pub mod adopt;
pub mod agent;
pub mod birth;
pub mod device;
pub mod image;
pub mod switch;
pub mod vcpu;

/// Version of all control messages; both sides must have the same one.
pub const PROTOCOL_VERSION: u32 = 4;
/// Longest text in a message in bytes, so that any message fits a packet.
pub const TEXT_BYTES_MAX: usize = 48 * 1024;
