//! Broker and the switch of one virtual network, after birth.
//!
//! Everything that a switch has of its network comes in these messages: its ports, one by one, and what the
//! switch before it had leased. The same messages bring a switch up and change it while it serves.

use super::birth::Rate;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr};

/// Leases in one message.
pub const LEASES_MAX: usize = 1024;
/// Descriptors of [`ToSwitch::SetPort`]: the port's memory, the bell that wakes the switch, the bell that wakes the
/// card.
pub const PORT_FDS: usize = 3;
/// Longest name of a port in bytes.
pub const PORT_NAME_BYTES_MAX: usize = 63;
/// Most ports of a network.
pub const PORTS_MAX: usize = 256;
/// Reasons for which frames are dropped, each with a counter.
pub const CAUSES: usize = 12;

/// Configuration of `bulkhead-switch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchConfig {
    /// Longest IP packet in bytes.
    pub mtu: u16,
    /// The services of the switch itself; without them it only switches.
    pub subnet: Option<SubnetTerms>,
    /// The domain of the network's machines, at most 128 bytes.
    pub domain: String,
    /// DNS servers for other names, at most 4.
    pub dns: Vec<Ipv4Addr>,
}

/// The IPv4 addresses of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetTerms {
    /// The switch's own address.
    pub gateway: Ipv4Addr,
    /// Bits of the network part.
    pub prefix: u8,
    /// The gateway's Ethernet address.
    pub mac: [u8; 6],
    /// First and last address that are leased.
    pub pool: (Ipv4Addr, Ipv4Addr),
    /// The router that machines are told of.
    pub router: Option<Ipv4Addr>,
    /// How long a lease holds in seconds.
    pub lease_s: u32,
}

/// Which VLANs a port has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VlanTerms {
    /// One, whose tag the port never sees; 0 is the network without tags.
    Access(u16),
    /// Those named (none means all), with their tags; at most 64.
    Trunk(Vec<u16>),
}

/// Whom a machine may talk to besides uplinks and the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IsolationTerms {
    /// All that are open.
    Open,
    /// Those of the same tenant.
    Tenant(u32),
    /// Nobody.
    Alone,
}

/// What a port is and may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortTerms {
    /// Name of the machine, also in DNS, or of the uplink; at most [`PORT_NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Ethernet address of the machine's card.
    pub mac: [u8; 6],
    /// Addresses that the machine has whether or not it asks for a lease, at most 16.
    pub addresses: Vec<IpAddr>,
    /// Its VLANs.
    pub vlan: VlanTerms,
    /// Whom it may talk to.
    pub isolation: IsolationTerms,
    /// Whether it is held to its Ethernet address and to its IP addresses.
    pub guard: (bool, bool),
    /// Bytes of frames that it may send.
    pub bytes: Option<Rate>,
    /// Frames that it may send.
    pub frames: Option<Rate>,
    /// Frames to everybody that it may send; `None` for what every port may.
    pub storm: Option<Rate>,
}

/// A lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseTerms {
    /// Whose it is.
    pub mac: [u8; 6],
    /// Its address.
    pub address: Ipv4Addr,
    /// For how many seconds it holds from now on; 0 when it has run out, or was given back.
    pub left_s: u32,
}

/// Sender: broker. The first two are those of [`super::device::ToDevice`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSwitch {
    /// Exit with code 0. Idempotent.
    Shutdown,
    /// Answer with the same number. Idempotent.
    Ping(u64),
    /// What the switch before this one had leased, at most [`LEASES_MAX`] at a time; sent before the first port. Idempotent.
    Restore(Vec<LeaseTerms>),
    /// The port of a machine's card, with [`PORT_FDS`] descriptors. It takes the place of one that has the
    /// same number. Answered with [`FromSwitch::Refused`] when it cannot be. Not idempotent: the port begins anew.
    SetPort {
        /// Number of the port.
        id: u16,
        /// Generation of its memory.
        generation: u32,
        /// Its settings.
        terms: PortTerms,
    },
    /// A port to the world outside, with one descriptor: a queue of a TAP interface. As [`ToSwitch::SetPort`].
    SetUplink {
        /// Number of the port.
        id: u16,
        /// Which of those that have had this number.
        generation: u32,
        /// Its settings.
        terms: PortTerms,
    },
    /// The port is gone. Idempotent.
    RemovePort(u16),
    /// Write a capture to the descriptor that comes with it, a pipe, in the place of one that goes on. Its end is
    /// told with [`FromSwitch::Captured`]. Not idempotent.
    Capture {
        /// One port, or all.
        port: Option<u16>,
        /// Bytes of each frame that are kept.
        snap_bytes: u32,
        /// Bytes of the whole.
        file_bytes: u64,
        /// How long it goes on, in milliseconds.
        within_ms: u64,
    },
    /// End the capture. Idempotent.
    EndCapture,
    /// Tell how the ports are: [`FromSwitch::Ports`]. Idempotent.
    Report,
}

/// Sender: the switch. The first is that of [`super::device::FromDevice`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromSwitch {
    /// Answer to [`ToSwitch::Ping`].
    Pong(u64),
    /// A machine has taken an address, keeps it, or has given it back. Said before the machine is told, so that a successor
    /// knows of every lease that a machine knows of; at most [`LEASES_MAX`] at a time.
    Leased(Vec<LeaseTerms>),
    /// A port cannot be as it was to be, and is not there.
    Refused {
        /// Number of the port.
        id: u16,
        /// Its generation.
        generation: u32,
        /// One line.
        reason: String,
    },
    /// The other end of a port broke the ring protocol: nothing passes there until the port is set anew.
    Broke {
        /// Number of the port.
        id: u16,
        /// Its generation.
        generation: u32,
        /// One line.
        reason: String,
    },
    /// Answer to [`ToSwitch::Report`], at most [`PORTS_MAX`].
    Ports(Vec<PortReport>),
    /// A capture is over.
    Captured {
        /// Frames that were not kept because nobody read fast enough.
        missed: u64,
    },
}

/// How a port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortReport {
    /// Number of the port.
    pub id: u16,
    /// Its generation.
    pub generation: u32,
    /// Whether somebody is at the other end.
    pub is_met: bool,
    /// Frames that came from it.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Frames that went to it.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Frames that were dropped, by cause.
    pub dropped: [u64; CAUSES],
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::MESSAGE_BYTES_MAX;
    use crate::protocol::device::{FromDevice, ToDevice};

    #[test]
    fn longest_messages_fit_a_packet() {
        let report = PortReport {
            id: u16::MAX,
            generation: u32::MAX,
            is_met: true,
            frames_in: u64::MAX,
            bytes_in: u64::MAX,
            frames_out: u64::MAX,
            bytes_out: u64::MAX,
            dropped: [u64::MAX; CAUSES],
        };
        let lease = LeaseTerms {
            mac: [255; 6],
            address: Ipv4Addr::BROADCAST,
            left_s: u32::MAX,
        };
        let ports = postcard::to_stdvec(&FromSwitch::Ports(vec![report; PORTS_MAX])).unwrap();
        let leases = postcard::to_stdvec(&ToSwitch::Restore(vec![lease; LEASES_MAX])).unwrap();
        assert!(ports.len() <= MESSAGE_BYTES_MAX && leases.len() <= MESSAGE_BYTES_MAX);
    }

    #[test]
    fn signs_of_life_are_those_of_every_process() {
        let same = [
            (
                postcard::to_stdvec(&ToSwitch::Shutdown).unwrap(),
                postcard::to_stdvec(&ToDevice::Shutdown).unwrap(),
            ),
            (
                postcard::to_stdvec(&ToSwitch::Ping(7)).unwrap(),
                postcard::to_stdvec(&ToDevice::Ping(7)).unwrap(),
            ),
            (
                postcard::to_stdvec(&FromSwitch::Pong(7)).unwrap(),
                postcard::to_stdvec(&FromDevice::Pong(7)).unwrap(),
            ),
        ];
        for (own, others) in same {
            assert_eq!(own, others);
        }
    }
}
