//! A broker that is new to a living process, and the process's answer.
//!
//! [`Adopt`] is one datagram to the process's adoption socket ([`crate::adoption`]), with one
//! descriptor: a socket for the answer. The process answers [`Adopted`] there, with the descriptors
//! that it has kept for this, or says nothing to whoever does not know its token.

use crate::ident::ProcId;
use serde::{Deserialize, Serialize};

/// Descriptors that come with every [`Adopted`] of the same version, in this order: the broker's end
/// of the control channel, the control page, the reading end of the log pipe. Those that a kind
/// keeps besides follow.
pub const ADOPTED_FDS: usize = 3;

/// Sender: broker, with one descriptor. Idempotent: each one is answered, and what it asks for is
/// the same.
///
/// The first two fields are those of every version, so that versions can tell each other what they
/// are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopt {
    /// [`super::PROTOCOL_VERSION`].
    pub version: u32,
    /// The token of the process's birth message.
    pub token: [u8; 32],
}

/// Answer to [`Adopt`]. Sender: the process, with descriptors; without any when the versions
/// differ, since it would understand nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// [`super::PROTOCOL_VERSION`] of the process.
    pub version: u32,
    /// Who it is.
    pub id: ProcId,
    /// Landlock ABI in force, 0 for none.
    pub landlock_abi: u8,
}
