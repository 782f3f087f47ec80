//! One virtual machine: what it is ([`spec`]) and, by and by, how it lives.

pub mod spec;
