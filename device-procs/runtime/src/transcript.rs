//! The writing end of a console's output ring file, as device processes use it.
//!
//! Output that cannot be stored (a full disk) is lost, said once, and never stops a guest.

use bulkhead_ipc::output_ring::OutputRing;
use bulkhead_ipc::shared::Doorbell;

/// An output ring with the doorbell of its readers.
#[derive(Debug)]
pub struct Transcript {
    ring: OutputRing,
    bell: Doorbell,
    failing: bool,
}

impl Transcript {
    /// Takes over a ring.
    #[must_use]
    pub const fn new(ring: OutputRing, bell: Doorbell) -> Self {
        Self {
            ring,
            bell,
            failing: false,
        }
    }

    /// Stores `bytes` at a position of the stream and tells readers.
    pub fn put(&mut self, position: u64, bytes: &[u8]) {
        match self.ring.write_at(position, bytes) {
            Ok(()) => self.failing = false,
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, position, "console output is being lost");
                }
            }
        }
        self.bell.ring();
    }
}
