//! Broker and device processes (`legacy`, `console`, `blk`, `rng`, `net`, `fs`, `vsock`), after birth.

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
    /// Answer to [`FromDevice::Dial`], with one descriptor if a listener was reached and none
    /// otherwise (sockets only). Not idempotent: the descriptor is another one each time.
    Dialled {
        /// Number of the question.
        id: u64,
    },
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
    /// The guest asks for a connection to the listener of this port: a connected socket is wanted
    /// (sockets only). At most [`DIALS_MAX`] wait for an answer, and [`DIALS_PER_S`] are asked in a
    /// second. Not idempotent: each is a connection.
    Dial {
        /// Number of the question, which its answer has.
        id: u64,
        /// The port on the host's side.
        port: u32,
        /// When the device asked, on the clock that counts milliseconds since the host's start: nobody
        /// waits for the answer to an old question any more.
        asked_ms: u64,
    },
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

/// Questions of one device for connections that may wait for their answers.
pub const DIALS_MAX: usize = 64;
/// Questions of one device for connections in a second, beside [`DIALS_MAX`] at once.
pub const DIALS_PER_S: u32 = 200;
/// Age in milliseconds at which nobody waits for the answer to a question any more.
pub const DIAL_AGE_MS_MAX: u64 = 5000;
