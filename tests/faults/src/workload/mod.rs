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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
        let cmdline = format!("mode=blk-load seconds={seconds} timeout=60");
        let mut arguments: Vec<OsString> = vec!["--kernel".into(), guests.test.clone().into()];
        arguments.extend(["--memory".into(), "64MiB".into()]);
        arguments.extend(["--cmdline".into(), cmdline.into()]);
        arguments
    }

    /// Judges it.
    #[must_use]
    pub fn checker(&self, _seed: u64) -> Box<dyn Checker> {
        Box::new(Requests(Verified::default()))
    }
}

/// Believes the test guest, which compares what it reads with what it has written.
struct Requests(Verified);

impl Checker for Requests {
    fn record(&mut self, _at: Duration, line: &str) {
        if let Some(rest) = line.strip_prefix("BH blk-load.end ") {
            let number = rest
                .split(' ')
                .find_map(|word| word.strip_prefix("requests="));
            self.0.count += number.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        }
        if line.starts_with("BH error ") {
            self.0.errors.push(line.to_owned());
        }
    }

    fn image(&mut self, _bytes: &[u8]) {}

    fn finish(self: Box<Self>) -> Verified {
        self.0
    }
}

impl From<crate::scenario::Work> for Workload {
    fn from(work: crate::scenario::Work) -> Self {
        match work {
            crate::scenario::Work::Blocks => Self::Blocks,
        }
    }
}
