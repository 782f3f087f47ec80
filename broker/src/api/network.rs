//! Virtual networks as the API tells of them.

use crate::launch::users::UserRange;
use crate::network::spec::NetworkSpec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

/// What the switch of a network does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkState {
    /// There is none: no machine is in the network.
    Idle,
    /// Its process comes up, for the first time or again.
    Starting,
    /// It carries frames.
    Serving,
    /// It has died too often, or cannot be started.
    Lost,
}

impl NetworkState {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Lost => "lost",
        }
    }
}

/// One network in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSummary {
    /// [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Its name.
    pub name: String,
    /// What its switch does.
    pub state: NetworkState,
    /// Its IPv4 addresses, such as `10.87.0.0/24`.
    pub subnet: Option<String>,
    /// Cards of machines that are in it.
    pub ports: usize,
    /// When it was created.
    pub created_at: String,
}

/// `GET /v1/networks/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDetails {
    /// What a list tells.
    #[serde(flatten)]
    pub summary: NetworkSummary,
    /// What it was told to be.
    pub spec: NetworkSpec,
    /// Pid of its switch.
    pub pid: Option<i32>,
    /// The range of which its user is the first id plus its pid, as `FIRST-LAST`; absent of one that has
    /// no user of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<UserRange>,
    /// Which of its switches that is.
    pub generation: u32,
    /// How often a switch that was dead has been replaced since the daemon's start.
    pub restarts: u64,
    /// Why there is no switch.
    pub failure: Option<String>,
    /// Cards of machines.
    pub cards: Vec<NetworkPort>,
    /// Ways out.
    pub uplinks: Vec<NetworkUplink>,
    /// Addresses that machines have taken.
    pub leases: Vec<NetworkLease>,
    /// Whether somebody captures.
    pub capturing: bool,
}

/// What a port has carried, as its switch counts; lost with the switch.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetworkCounters {
    /// Frames that came from it.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Frames that went to it.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Frames that were dropped, by cause; causes that have none are left out.
    pub dropped: BTreeMap<String, u64>,
}

/// A machine's card in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPort {
    /// Number of the port, by which a capture names it.
    pub port: u16,
    /// Name of the machine.
    pub machine: String,
    /// Which of its cards.
    pub card: u16,
    /// The card's address.
    pub mac: String,
    /// Whose it is.
    pub tenant: Option<String>,
    /// The addresses that it was given.
    pub addresses: Vec<IpAddr>,
    /// Its VLAN, where it is not the network's.
    pub vlan: Option<u16>,
    /// Its VLANs, where it sees their tags; none means all.
    pub trunk: Option<Vec<u16>>,
    /// The address that it has taken.
    pub address: Option<Ipv4Addr>,
    /// Whether card and switch have met.
    pub connected: bool,
    /// What is wrong with it.
    pub trouble: Option<String>,
    /// What it has carried; `None` when the switch does not tell.
    pub counters: Option<NetworkCounters>,
}

/// A way out of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkUplink {
    /// Number of the port, by which a capture names it.
    pub port: u16,
    /// The TAP interface.
    pub interface: String,
    /// What is wrong with it.
    pub trouble: Option<String>,
    /// What it has carried; `None` when the switch does not tell.
    pub counters: Option<NetworkCounters>,
}

/// An address that a machine has taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLease {
    /// The card's address.
    pub mac: String,
    /// The address that it was leased.
    pub address: Ipv4Addr,
    /// When that is over.
    pub until: String,
}
