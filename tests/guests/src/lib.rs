//! The parts of the test guest that need no hardware: the command line, the line protocol, data
//! patterns, ways to split a request, and the tables that a VMM leaves in memory.
//!
//! They are tested on the host (`cargo test --lib`), and host programs use [`pattern`] to check a
//! disk image that the guest has written.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod args;
pub mod blocks;
pub mod frames;
pub mod pattern;
pub mod prng;
pub mod pvh;
pub mod record;
pub mod split;
