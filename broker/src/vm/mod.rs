//! One virtual machine: what it is ([`spec`]), what its owner says and hears ([`session`])
//! and, by and by, how it lives.

pub mod session;
pub mod spec;
