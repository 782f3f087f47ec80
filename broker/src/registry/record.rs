//! What the registry remembers of a machine. Stored as JSON, so that old records can be read by new
//! programs and by people.

use serde::{Deserialize, Serialize};

/// A machine that somebody has created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its name, the key.
    pub name: String,
    /// 128 random bits in hexadecimal digits: tells it from another machine that had its name.
    pub id: String,
    /// The VM file in full: every default written out, every path absolute.
    pub vm_file: String,
    /// Number of vCPUs, as in the VM file.
    pub vcpus: u8,
    /// Guest memory in bytes, as in the VM file.
    pub memory_bytes: u64,
    /// Whether it starts with the host, as in the VM file.
    pub autostart: bool,
    /// When it was created, in milliseconds since 1970.
    pub created_at_ms: u64,
    /// What it is wanted to do.
    pub desired: Desired,
    /// Whether it starts once more with the host, because the host's shutdown ended it.
    #[serde(default)]
    pub start_with_host: bool,
    /// How its last run ended; `None` before the first end.
    pub last: Option<Ended>,
}

/// What a machine is wanted to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// Run. Written before a start begins.
    Running,
    /// Nothing.
    Stopped,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// A stable word, such as `powered_off`.
    pub ending: String,
    /// The exit code of `wait`.
    pub exit_code: u8,
    /// What there is to say about it, on one line.
    pub message: Option<String>,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}
