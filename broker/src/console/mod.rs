//! The attached terminal: keys to the guest, the guest's output to the user.
//!
//! It runs in a thread of its own with poll(2), so that neither a slow terminal nor a guest that
//! floods its console can hold up the broker's event loop; the guest itself cannot be held up at
//! all, because it writes to a bounded ring ([`bulkhead_ipc::output_ring`]) that this only reads.
//! Bytes of the guest pass unchanged here and nowhere else in this program.
//!
//! [`keys`] decides what keys mean; [`terminal`] is raw mode and every way out of it; [`attach`]
//! is the thread, and [`link`] what it is attached to. Called by the command line's `run` and `console`.

pub mod attach;
pub mod keys;
pub mod link;
pub(crate) mod stream;
pub mod terminal;
#[cfg(test)]
mod tests;
