//! Broker and device processes (`legacy`, `console`, `blk`, `rng`, `net`), after birth.

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
    /// What the device may do in a second from now on (disks and network devices only).
    Limits(DiskLimits),
    /// Whether the cable is plugged in (network devices only).
    Link(bool),
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
    /// What a network device has done since its process started. Said after a [`FromDevice::Pong`] when it has
    /// changed.
    Traffic(Traffic),
}

/// Counters of a network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// What the guest was given.
    pub received: Direction,
    /// What the guest has sent.
    pub sent: Direction,
}

/// Counters of one direction. A frame that the guest has the host cut up, or the other way round, is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Direction {
    /// Frames.
    pub packets: u64,
    /// Bytes of frames.
    pub bytes: u64,
    /// Frames that got lost: not sound, too large for the guest's buffers, or refused by the host.
    pub dropped: u64,
}
