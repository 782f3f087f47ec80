//! What a port has sent and received, and what of it was not passed on, by cause.

/// Why a frame was not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// It is no frame: too short, or its headers contradict it.
    Malformed,
    /// It is longer than the network's MTU.
    TooLong,
    /// It has a VLAN tag that the port may not use.
    Vlan,
    /// Its sender is another's Ethernet address.
    Mac,
    /// Its sender is another's IP address.
    Address,
    /// It claims to be a router or a DHCP server.
    Role,
    /// It is for bridges, not for machines.
    Control,
    /// Its offload header is nonsense.
    Offload,
    /// The port has sent too many frames to everybody.
    Storm,
    /// Its receiver is one that the port may not talk to.
    Isolated,
    /// It is for the gateway, which has no such service, or was asked too often.
    Unserved,
    /// The receiver's queue is full. Counted at the receiver.
    NoRoom,
}

impl Cause {
    /// All of them, in the order of [`Counters::dropped`].
    pub const ALL: [Self; 12] = [
        Self::Malformed,
        Self::TooLong,
        Self::Vlan,
        Self::Mac,
        Self::Address,
        Self::Role,
        Self::Control,
        Self::Offload,
        Self::Storm,
        Self::Isolated,
        Self::Unserved,
        Self::NoRoom,
    ];

    /// As tables and JSON name it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TooLong => "too_long",
            Self::Vlan => "vlan",
            Self::Mac => "spoofed_mac",
            Self::Address => "spoofed_address",
            Self::Role => "spoofed_role",
            Self::Control => "link_control",
            Self::Offload => "offload",
            Self::Storm => "storm",
            Self::Isolated => "isolated",
            Self::Unserved => "unserved",
            Self::NoRoom => "no_room",
        }
    }
}

/// Counters of one port, from its birth on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Frames that came from the port.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Frames that went to the port.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Frames that were dropped, by [`Cause::ALL`].
    pub dropped: [u64; Cause::ALL.len()],
}

impl Counters {
    /// So many frames were dropped for `cause`.
    #[must_use]
    pub fn of(&self, cause: Cause) -> u64 {
        self.dropped.get(cause as usize).copied().unwrap_or(0)
    }

    pub(crate) fn drop(&mut self, cause: Cause) {
        if let Some(count) = self.dropped.get_mut(cause as usize) {
            *count = count.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_a_counter_of_its_own_and_a_name() {
        let mut counters = Counters::default();
        for (n, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, n);
            counters.drop(cause);
            assert_eq!(counters.of(cause), 1);
        }
        let names: std::collections::BTreeSet<_> = Cause::ALL.map(Cause::name).into();
        assert_eq!(names.len(), Cause::ALL.len());
    }
}
