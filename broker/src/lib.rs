//! The broker: everything behind the `bulkhead` command.
//!
//! The broker opens every resource on behalf of the processes of a virtual machine, starts them
//! ([`launch`]), watches over them ([`supervisor`]) and runs the machine's life ([`vm`]). It never
//! maps guest memory, never keeps a KVM descriptor after handing it over, and parses nothing that
//! a guest wrote.

pub mod agent;
pub mod api;
pub mod authority;
pub mod cli;
pub mod console;
pub mod doctor;
pub mod escape;
pub mod image;
pub mod launch;
pub mod learn;
pub mod network;
mod random;
pub mod registry;
pub mod remains;
pub mod seed;
pub mod serve;
pub mod supervisor;
pub mod vm;
pub mod vmfile;
