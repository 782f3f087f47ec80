//! The switch of one virtual network: what happens to a frame between the port that it came from and
//! those that it goes to.
//!
//! ```text
//!   Ports (rings, a TAP, a socket) ── Switch::pass ── budget for each port, in turn
//!     frame ── vlan ── guard ── offload ── table ──┬── other ports (checksums, segments) ── Ports
//!                                                  └── gateway: ARP, echo, DHCP, DNS ── back to its port
//! ```
//!
//! Nothing here but [`process`] waits, opens anything or reads a clock: packets and the time are given by the caller
//! ([`Ports`]). Every byte of a frame is hostile, also those that come by an uplink: it is copied once, read
//! with checked accesses, and what it can make the switch keep is bounded by port. It must never let a
//! frame of one machine reach a port that the machine may not talk to, nor send what a machine says in
//! another's name.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)
)]

mod bindings;
mod bucket;
pub mod capture;
mod checksum;
pub mod counters;
mod dhcp;
mod dns;
mod gateway;
mod guard;
mod leases;
pub mod offload;
mod process;
pub mod settings;
mod switch;
mod table;
pub mod terms;
pub mod wire;
pub mod wires;

pub use bulkhead_ipc::protocol::birth::Rate;
pub use counters::{Cause, Counters};
pub use leases::Lease;
pub use process::{Server, live, run};
pub use settings::{
    Guard, Isolation, Limits, NetworkSettings, PortSettings, Role, SettingsError, Subnet, Vlan,
};
pub use switch::{FRAMES_PER_TURN, PORTS_MAX, Passed, PortId, Ports, Sent, Switch, mac_of};

#[cfg(test)]
mod testing;
