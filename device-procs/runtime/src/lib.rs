//! The shell in which every sandboxed process runs.
//!
//! It owns the way from `exec` to the locked phase ([`birth`], [`grants`], [`confine`]), the log
//! lines on descriptor 2 ([`log`]), waiting ([`wait`], [`spin`]), the control channel ([`control`])
//! that outlives brokers ([`adoption`]) and, for virtio devices, the loop that serves shadow virtqueues ([`device`], [`queues`],
//! [`uring`]). A kind of process adds what it does with its one resource and nothing else.
//!
//! It must never open anything by name: whatever a process holds was handed to it at birth.
//! Everything read from a window or a control channel is checked here before a device sees it.

pub mod adoption;
pub mod birth;
pub mod confine;
pub mod control;
pub mod device;
pub mod grants;
pub mod limits;
pub mod log;
pub mod queues;
mod serve;
pub mod socket;
pub mod spin;
mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transcript;
pub mod uring;
pub mod used;
pub mod wait;

pub use birth::{Newborn, Stillbirth, live_out};
pub use device::{Device, DeviceFault, Room, Setup, live, run};
pub use grants::Grants;
pub use queues::{Chain, Kept, Queues, Span};
pub use sys::{change_mode, cpus, leave};
