//! What the processes of Bulkhead say to each other, and how.
//!
//! Two kinds of traffic exist. *Control* messages ([`protocol`]) travel over one SOCK_SEQPACKET pair
//! per process ([`channel`]) and are rare; a broker that is new to a process finds it by its
//! [`adoption`] socket. *Data* travels through shared memory that both sides map:
//! a device's [`window`] with its shadow virtqueues ([`ring`]), the [`legacy_page`], the console
//! rings ([`output_ring`], [`input_ring`]), the [`port`] between a network card and its switch; eventfds
//! are the doorbells.
//!
//! Everything that a peer can write is hostile: it is read once into local memory, range-checked and
//! then used. Nothing here blocks on a peer without a deadline and nothing here panics on what a
//! peer wrote.

pub mod adoption;
pub mod agent_frames;
pub mod channel;
pub mod control_page;
pub mod device_kind;
pub mod host;
pub mod ident;
pub mod input_ring;
pub mod legacy_page;
#[cfg(test)]
#[cfg(loom)]
mod models;
pub mod output_ring;
pub mod platform;
pub mod port;
pub mod protocol;
pub mod ring;
pub mod shared;
pub mod shed;
mod sync;
pub mod window;
