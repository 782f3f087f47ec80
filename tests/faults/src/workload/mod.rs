//! What guests do during a run, and the checkers that judge what came of it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Where the guests are.
#[derive(Debug, Clone)]
pub struct Guests {
    /// The freestanding test guest.
    pub test: PathBuf,
}

/// What a checker found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// How many things were verified; none is a failure.
    pub count: u64,
    /// What was wrong.
    pub errors: Vec<String>,
}

/// Judges what a guest says and what its disk holds.
pub trait Checker: Send {
    /// One line of the guest's console, `at` the time since the run began.
    fn record(&mut self, at: Duration, line: &str);
    /// The disk's final image.
    fn image(&mut self, bytes: &[u8]);
    /// The verdict.
    fn finish(self: Box<Self>) -> Verified;
}

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// A pattern with checksums on a disk.
    Blocks,
}

impl Workload {
    /// Arguments of `bulkhead create`.
    #[must_use]
    pub fn arguments(&self, seconds: u64, guests: &Guests) -> Vec<OsString> {
        let cmdline = format!("mode=blk-load seconds={seconds}");
        let mut arguments: Vec<OsString> = vec!["--kernel".into(), guests.test.clone().into()];
        arguments.extend(["--cmdline".into(), cmdline.into()]);
        arguments
    }
}
