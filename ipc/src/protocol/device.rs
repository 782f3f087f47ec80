//! Broker and device processes (`legacy`, `console`, `blk`, `rng`), after birth.

use super::birth::DiskLimits;
use serde::{Deserialize, Serialize};

/// Sender: broker. All are idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDevice {
    /// Finish what is in flight and exit with code 0.
    Shutdown,
    /// Answer with the same number.
    Ping(u64),
    /// The attached terminal's size (consoles only).
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Do again what the host's disk had no room for (disks only). Answered with
    /// [`FromDevice::HasRoom`] or [`FromDevice::NoRoom`].
    TryAgain,
    /// What the device may do in a second from now on (disks only).
    Limits(DiskLimits),
}

/// Sender: device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDevice {
    /// Answer to [`ToDevice::Ping`].
    Pong(u64),
    /// It cannot serve any more and exits now.
    Fault {
        /// One line.
        reason: String,
    },
    /// The host's disk has no room for what the guest writes; those requests wait for
    /// [`ToDevice::TryAgain`]. Said once until then.
    NoRoom,
    /// Everything that waited for room has been done.
    HasRoom,
}
