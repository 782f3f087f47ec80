//! What the end-to-end tests share: starting the real `bulkhead` as a user would, reading what it
//! prints, typing at its console, and looking at its processes in /proc.
//!
//! Everything is found in the environment that `cargo xtask test` prepares. Nothing is built here,
//! and whatever a test starts ends with it, also when it fails.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "test support: a failure here is a failed test"
)]

mod daemon;
mod groups;
mod guest_memory;
mod held_file;
mod intruder;
mod machine;
pub mod network;
#[path = "../guests/src/pattern.rs"]
pub mod pattern;
#[allow(
    clippy::cast_possible_truncation,
    reason = "the test guest's own, for whose CPU the width is known"
)]
#[path = "../guests/src/prng.rs"]
pub mod prng;
mod programs;
mod ram_disk;
mod restart;
mod small_disk;
mod spoil;

pub use daemon::{Daemon, Done};
pub use groups::Groups;
pub use guest_memory::{Difference, Expected, GuestMemory, Look};
pub use held_file::HeldFile;
pub use intruder::{Fate, Intruder};
pub use machine::{Ended, Machine, Processes, bulkhead, is_alive};
pub use programs::{Programs, with_version};
pub use ram_disk::RamDisk;
pub use restart::Restart;
pub use small_disk::SmallDisk;
pub use spoil::{kill, signal_process, window_of};

use std::path::PathBuf;

/// A path from the environment that `cargo xtask test` prepares.
///
/// # Panics
/// When the variable is not set: these tests are run by `cargo xtask test`.
#[must_use]
pub fn path(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("{variable} is not set; run `cargo xtask test`"))
}

/// Whether the slow suites run too.
#[must_use]
pub fn slow() -> bool {
    std::env::var_os("BULKHEAD_SLOW").is_some()
}

/// What test guests that are Linux need on their command line to be quick on a host whose KVM
/// emulates ring 0.
#[must_use]
pub fn linux_cmdline() -> String {
    std::env::var("BULKHEAD_TEST_LINUX_CMDLINE").unwrap_or_default()
}

/// A disk image of `bytes` zero bytes, which vanishes with the test.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn disk(bytes: u64) -> tempfile::NamedTempFile {
    let disk = tempfile::NamedTempFile::new().expect("a temporary file");
    disk.as_file().set_len(bytes).expect("room for a disk");
    disk
}

/// Runs a tool of the host and returns what it printed.
///
/// # Panics
/// When it cannot be run or fails.
#[expect(
    clippy::disallowed_methods,
    reason = "tests use the host's file system tools"
)]
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = std::process::Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
