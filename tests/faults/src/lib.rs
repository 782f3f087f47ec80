//! Faults at named points of a running Bulkhead, on purpose and by seed.
//!
//! The harness drives the real programs through the real command line and injects faults from
//! outside: into the control messages and the system calls that it sees by seccomp user
//! notification, into processes by signals and cgroups, into the disk that it serves itself. Nothing
//! of the code under test is changed, and nothing of the product depends on this crate.

pub mod api;
#[path = "../../guests/src/blocks.rs"]
pub mod blocks;
pub mod disk;
pub mod hosts;
pub mod inject;
pub mod matrix;
pub mod messages;
pub mod network;
pub mod notify;
#[path = "../../guests/src/pattern.rs"]
pub mod pattern;
pub mod points;
#[allow(
    clippy::cast_possible_truncation,
    reason = "the test guest's own, for whose CPU the width is known"
)]
#[path = "../../guests/src/prng.rs"]
pub mod prng;
pub mod random;
pub mod run;
pub mod scenario;
pub mod shrink;
pub mod soak;
pub mod timeline;
pub mod verdict;
pub mod who;
pub mod workload;

/// Version of the JSON objects that are printed.
pub const SCHEMA_VERSION: u32 = 1;
