//! Copies between host and guest, as seen from either end.
//!
//! Whoever receives says how much may be under way, so that whoever sends hears of a failure before it has
//! sent everything, and never has to be read while it is being written to.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::tree::{Plant, TreeError, Walk, weight};
use crate::wire::{Wire, WireError};
use bulkhead_ipc::protocol::agent::{
    COPY_BYTES_MAX, Copied, Entry, Failure, FailureKind, FromAgent, ToAgent,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// How long the other side of a copy may do nothing. A disk may take its time.
pub const COPY_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a copy has not been made.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The connection.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// This side's files, or what the other side says of its own.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The other side gave up.
    #[error("{}", .0.text)]
    Refused(Failure),
    /// The other side says something that has no place here.
    #[error("the other side does not keep to the protocol of copies")]
    Protocol,
}

impl CopyError {
    /// What the other side is told, unless it knows or is gone.
    #[must_use]
    pub fn to_tell(&self) -> Option<Failure> {
        match self {
            Self::Tree(error) => Some(Failure::new(error.kind(), error.to_string())),
            Self::Protocol => Some(Failure::new(FailureKind::Invalid, self.to_string())),
            Self::Wire(_) | Self::Refused(_) => None,
        }
    }
}

/// What one end hears of the other in a copy.
#[derive(Debug)]
pub enum Heard {
    /// A part.
    Entry(Entry),
    /// Room for more.
    Room(u32),
    /// All has been sent, or received.
    End(Option<Copied>),
    /// It will not be.
    Failed(Failure),
    /// Something else.
    Other,
}

/// One end of a copy.
pub trait End {
    /// What it sends.
    type Says: Serialize;
    /// What it receives.
    type Hears: DeserializeOwned;
    /// Wraps a part.
    fn entry(entry: Entry) -> Self::Says;
    /// Wraps room for more.
    fn room(bytes: u32) -> Self::Says;
    /// Unwraps.
    fn heard(message: Self::Hears) -> Heard;
}

/// The host's end.
#[derive(Debug)]
pub struct HostEnd;

impl End for HostEnd {
    type Says = ToAgent;
    type Hears = FromAgent;

    fn entry(entry: Entry) -> ToAgent {
        ToAgent::Entry(entry)
    }

    fn room(bytes: u32) -> ToAgent {
        ToAgent::CopyRoom(bytes)
    }

    fn heard(message: FromAgent) -> Heard {
        match message {
            FromAgent::Entry(entry) => Heard::Entry(entry),
            FromAgent::CopyRoom(bytes) => Heard::Room(bytes),
            FromAgent::Copied(copied) => Heard::End(Some(copied)),
            FromAgent::Failed(failure) => Heard::Failed(failure),
            _ => Heard::Other,
        }
    }
}

/// The guest's end.
#[derive(Debug)]
pub struct GuestEnd;

impl End for GuestEnd {
    type Says = FromAgent;
    type Hears = ToAgent;

    fn entry(entry: Entry) -> FromAgent {
        FromAgent::Entry(entry)
    }

    fn room(bytes: u32) -> FromAgent {
        FromAgent::CopyRoom(bytes)
    }

    fn heard(message: ToAgent) -> Heard {
        match message {
            ToAgent::Entry(entry) => Heard::Entry(entry),
            ToAgent::CopyRoom(bytes) => Heard::Room(bytes),
            ToAgent::End => Heard::End(None),
            _ => Heard::Other,
        }
    }
}

/// Sends everything that `walk` finds. What is to be said at the end is left to the caller.
///
/// # Errors
/// When something cannot be read, or the other side does not take it.
pub fn send<E: End>(
    wire: &mut Wire,
    walk: &mut Walk,
    mut watch: impl FnMut(&Entry),
) -> Result<(), CopyError> {
    let mut room = COPY_BYTES_MAX;
    while let Some(entry) = walk.next_entry()? {
        let weight = weight(&entry);
        loop {
            let message = match wire.receive_now()? {
                Some(message) => message,
                None if room >= weight => break,
                None => wire.receive(COPY_TIMEOUT)?,
            };
            match E::heard(message) {
                // What costs the other side nothing could come for ever.
                Heard::Room(0) => return Err(CopyError::Protocol),
                Heard::Room(more) => {
                    room = room.saturating_add(more.into());
                    // Nobody can have that much room who keeps to the protocol.
                    if room > COPY_BYTES_MAX {
                        return Err(CopyError::Protocol);
                    }
                }
                Heard::Failed(failure) => return Err(CopyError::Refused(failure)),
                Heard::Entry(_) | Heard::End(_) | Heard::Other => return Err(CopyError::Protocol),
            }
        }
        room -= weight;
        watch(&entry);
        wire.send(&E::entry(entry))?;
    }
    Ok(())
}

/// Receives into `plant` until the other side says that this was all.
///
/// # Errors
/// When the other side lies or gives up, or something cannot be written.
pub fn receive<E: End>(
    wire: &mut Wire,
    mut plant: Plant,
    mut watch: impl FnMut(&Entry),
) -> Result<Copied, CopyError> {
    let (mut room, mut done) = (COPY_BYTES_MAX, 0);
    loop {
        match E::heard(wire.receive(COPY_TIMEOUT)?) {
            Heard::Entry(entry) => {
                let weight = weight(&entry);
                room = room.checked_sub(weight).ok_or(CopyError::Protocol)?;
                watch(&entry);
                plant.add(entry)?;
                done += weight;
            }
            Heard::End(_) => return Ok(plant.finish()?),
            Heard::Failed(failure) => return Err(CopyError::Refused(failure)),
            Heard::Room(_) | Heard::Other => return Err(CopyError::Protocol),
        }
        if done >= COPY_BYTES_MAX / 2 {
            let more = u32::try_from(done).map_err(|_| CopyError::Protocol)?;
            room += done;
            done = 0;
            wire.send(&E::room(more))?;
        }
    }
}
