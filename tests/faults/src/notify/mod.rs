//! seccomp user notification: the processes of a host ask the harness before the system calls that a
//! scenario needs. The kernel's interface, and the only unsafe code of this crate.
//!
//! The product's own filters are untouched: they stop a call with SECCOMP_RET_TRAP, which has
//! precedence over a notification, so that nothing is allowed here that the product denies.

mod filter;
mod listener;
mod memory;

pub use filter::{NotifyError, spawn};
pub use listener::{Notification, serve};
pub use memory::{read, take_descriptor, thread_group, write};
