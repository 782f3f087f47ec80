//! What guests do during a run, and the checkers that judge what came of it.

mod blocks;
mod clock;
mod files;
mod frames;
mod memory;
mod record;
mod transcript;

pub use blocks::Blocks;
pub use clock::Clock;
pub use files::{Files, Tree};
pub use frames::{Serving, Taking};
pub use memory::Memory;
pub use transcript::Transcript;

use record::Findings;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Memory that [`Workload::Memory`] works on.
const MEMORY_BYTES: u64 = 8 << 20;

/// What a machine sends to another at once. All of it fits the guest's window: smoltcp 0.14 takes the end of a stream
/// from a segment whose last bytes it has cut, for they were beyond its window.
const STREAM_BYTES: u64 = 192 << 10;
/// How much longer a machine serves than others ask it, in seconds.
const SERVES_LONGER_S: u64 = 6;

/// Where the guests are.
#[derive(Debug, Clone)]
pub struct Guests {
    /// The freestanding test guest.
    pub test: PathBuf,
    /// The small Linux, for [`Workload::Files`].
    pub linux: Option<Linux>,
}

/// The small Linux.
#[derive(Debug, Clone)]
pub struct Linux {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// What makes it quick on hosts that emulate ring 0.
    pub cmdline: String,
}

impl Linux {
    /// The one that `BULKHEAD_TEST_LINUX_…` names.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
        Some(Self {
            kernel: path("BULKHEAD_TEST_LINUX_BZIMAGE")?,
            initrd: path("BULKHEAD_TEST_LINUX_INITRD")?,
            cmdline: std::env::var("BULKHEAD_TEST_LINUX_CMDLINE").unwrap_or_default(),
        })
    }
}

/// Why there is no such workload.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// The workload needs the small Linux.
    #[error("the workload needs the small Linux guest")]
    NoLinux,
    /// A tool of the host is missing or has failed.
    #[error("{0}")]
    Tool(String),
    /// A file of the workload cannot be written or read.
    #[error("a file of the workload: {0}")]
    File(#[from] std::io::Error),
}

/// What a checker found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// How many things were verified; none is an error.
    pub count: u64,
    /// Requests of the guest that ended in an error: wrong unless a fault explains them.
    pub refused: u64,
    /// What was wrong.
    pub errors: Vec<String>,
    /// Exceptions that the guest has told of: wrong unless a fault explains them.
    pub told: Vec<String>,
}

impl Verified {
    fn new(count: u64, refused: u64, mut found: Findings) -> Self {
        if count == 0 {
            found.add("nothing was verified");
        }
        let (errors, told) = found.into_errors();
        Self {
            count,
            refused,
            errors,
            told,
        }
    }

    /// Whether the guest did its work unharmed.
    #[must_use]
    pub fn held(&self) -> bool {
        self.count > 0 && self.refused == 0 && self.errors.is_empty() && self.told.is_empty()
    }
}

/// Judges what a guest says and what its disk holds.
pub trait Checker: Send {
    /// One line of the guest's console, `at` the time since the run began. Every line, in order, once.
    fn record(&mut self, at: Duration, line: &str);

    /// What is on the disk now that everything that used it has ended: after a power cut, after which the
    /// guest may be started again, and at the end. Everything that the guest said until then was recorded.
    fn image(&mut self, bytes: &[u8]) {
        let _not_used = bytes;
    }

    /// A line that is to be typed now, exactly once. To be asked every few milliseconds.
    fn typing(&mut self, at: Duration) -> Option<String> {
        let _never = at;
        None
    }

    /// The verdict.
    fn finish(self: Box<Self>) -> Verified;
}

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Workload {
    /// A pattern with checksums on a disk, flushed round after round. Needs a blank disk.
    Blocks,
    /// Memory that keeps changing and is verified.
    Memory,
    /// Clocks that are told.
    Clock,
    /// Numbered lines on the serial port, both ways.
    Transcript,
    /// Files in an ext4 of the small Linux, created, renamed and synchronised. Needs the disk that
    /// [`Workload::disk`] makes.
    Files,
    /// Data for another machine.
    Serve,
    /// Data from another machine.
    Take,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Blocks,
        Self::Memory,
        Self::Clock,
        Self::Transcript,
        Self::Files,
        Self::Serve,
        Self::Take,
    ];

    /// Whether the machine needs a disk, and the checker its image.
    #[must_use]
    pub const fn needs_disk(self) -> bool {
        matches!(self, Self::Blocks | Self::Files)
    }

    /// What a disk of so many bytes holds at first.
    ///
    /// # Errors
    /// When the host cannot make a file system.
    pub fn disk(self, bytes: u64) -> Result<Vec<u8>, WorkloadError> {
        match self {
            Self::Files => files::disk(bytes),
            _ => Ok(vec![0; usize::try_from(bytes).unwrap_or(0)]),
        }
    }

    /// Arguments of `bulkhead create` but for the name and the disk: a guest that works for so long after it
    /// has booted. One that takes data does so from the machine `server`.
    ///
    /// # Errors
    /// When the guest is missing.
    pub fn arguments(
        self,
        seconds: u64,
        seed: u64,
        guests: &Guests,
        server: Option<&str>,
    ) -> Result<Vec<OsString>, WorkloadError> {
        let mut seconds = seconds;
        let mode = match self {
            Self::Blocks => "blocks interval=10".to_owned(),
            Self::Memory => format!("counter interval=250 size={MEMORY_BYTES}"),
            Self::Clock => "clock interval=50".to_owned(),
            Self::Transcript => "serial interval=10".to_owned(),
            Self::Serve => {
                seconds += SERVES_LONGER_S;
                format!("net ip=dhcp offload=1 size={STREAM_BYTES}")
            }
            Self::Take => {
                let server = server.unwrap_or_default();
                format!("net-peer ip=dhcp offload=1 peer={server}")
            }
            Self::Files => return files::arguments(seconds, seed, guests),
        };
        let cmdline = format!("mode={mode} seconds={seconds} seed={seed} timeout=100");
        let mut arguments: Vec<OsString> = vec!["--kernel".into(), guests.test.clone().into()];
        arguments.extend(["--cmdline".into(), cmdline.into()]);
        arguments.extend(["-m".into(), "64MiB".into()]);
        Ok(arguments)
    }

    /// Who judges it.
    #[must_use]
    pub fn checker(self, seed: u64) -> Box<dyn Checker> {
        match self {
            Self::Blocks => Box::new(Blocks::new(seed)),
            Self::Memory => Box::new(Memory::new(seed, MEMORY_BYTES)),
            Self::Clock => Box::new(Clock::new()),
            Self::Transcript => Box::new(Transcript::new(seed)),
            Self::Files => Box::new(Files::new(seed)),
            Self::Serve => Box::new(Serving::new(STREAM_BYTES)),
            Self::Take => Box::new(Taking::new(STREAM_BYTES)),
        }
    }
}

impl From<crate::scenario::Work> for Workload {
    fn from(work: crate::scenario::Work) -> Self {
        use crate::scenario::Work;
        match work {
            Work::Blocks => Self::Blocks,
            Work::Memory => Self::Memory,
            Work::Clock => Self::Clock,
            Work::Transcript => Self::Transcript,
            Work::Files => Self::Files,
            Work::Serve => Self::Serve,
            Work::Take => Self::Take,
        }
    }
}
