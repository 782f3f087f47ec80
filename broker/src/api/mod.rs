//! The daemon's API: what travels over the Unix socket as HTTP and JSON under `/v1`.
//!
//! Plain data, shared by the server ([`crate::serve`]) and the command line's client
//! ([`client`]). Every object begins with `schema_version`; fields are added, never renamed.
//! Sizes are in bytes, times RFC 3339 or named by their unit. `docs/api.md` lists the requests.

pub mod client;
mod device;
mod error;
pub mod frame;
mod network;
pub mod time;

pub use device::{
    BackingFile, ChangeMedium, Device, DeviceChanged, DeviceState, Devices, LimitDevice, Limited,
    LinkDevice, Linked, NetworkStats, ResizeDevice,
};
pub use error::{ApiError, Code};
pub use network::{
    NetworkCounters, NetworkDetails, NetworkLease, NetworkPort, NetworkState, NetworkSummary,
    NetworkUplink,
};

use crate::launch::users::UserRange;
use crate::registry::Desired;
use serde::{Deserialize, Serialize};

/// Version of every JSON object that the API and the commands print.
pub const SCHEMA_VERSION: u32 = 1;
/// File name of the socket in the runtime directory.
pub const SOCKET_NAME: &str = "bulkhead.sock";
/// The protocol that an attached console is upgraded to ([`frame`]).
pub const CONSOLE_PROTOCOL: &str = "bulkhead-console";
/// What a connection to a machine's vsock socket is upgraded to.
pub const VSOCK_PROTOCOL: &str = "bulkhead-vsock";
/// Largest body of a request in bytes: a VM file of the largest size, escaped.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;

/// What a machine does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing; it has no processes.
    Stopped,
    /// Its processes come up.
    Starting,
    /// Its guest runs.
    Running,
    /// Its vCPUs are stopped, its memory is kept.
    Paused,
    /// Its guest has ended and everything is kept as it was.
    Preserved,
    /// Its processes are being ended.
    Stopping,
}

impl State {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Preserved => "preserved",
            Self::Stopping => "stopping",
        }
    }

    /// Whether it has processes.
    #[must_use]
    pub const fn is_live(self) -> bool {
        !matches!(self, Self::Stopped)
    }
}

/// `GET /v1/version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Version of the program.
    pub version: String,
    /// Pid of the daemon.
    pub pid: u32,
}

/// `POST /v1/vms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// The VM file's text.
    pub vm_file: String,
    /// Its name in error messages.
    pub file_name: String,
    /// Absolute directory that relative paths start from.
    pub directory: String,
    /// Name of the machine if the VM file has none.
    pub default_name: String,
}

/// One machine in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Its name.
    pub name: String,
    /// Tells it from another machine that had its name.
    pub id: String,
    /// What it does now.
    pub state: State,
    /// What it is wanted to do.
    pub desired: Desired,
    /// Whether it starts with the host.
    pub autostart: bool,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory_bytes: u64,
    /// When it was created.
    pub created_at: String,
    /// When its present run began.
    pub started_at: Option<String>,
    /// How its last run ended.
    pub last_run: Option<LastRun>,
    /// Devices that are lost.
    pub degraded: Vec<Degraded>,
    /// Disks for which the host has no room: the machine is paused until it has.
    #[serde(default)]
    pub no_room: Vec<String>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRun {
    /// A stable word, such as `powered_off`.
    pub ending: String,
    /// The exit code of `wait`.
    pub exit_code: u8,
    /// What there is to say about it.
    pub message: Option<String>,
    /// When.
    pub ended_at: String,
}

/// A lost device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degraded {
    /// Its name.
    pub device: String,
    /// What happened to it.
    pub reason: String,
}

/// `GET /v1/vms/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// What a list tells.
    #[serde(flatten)]
    pub summary: Summary,
    /// Its VM file in full.
    pub vm_file: String,
    /// Its socket device, if it has one.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// Its processes.
    pub processes: Vec<Process>,
    /// Restarts of the whole machine within the present run.
    pub restarts: u32,
    /// The latest system calls that the kernel denied its processes, in the present run or the last, oldest
    /// first. At most 16; the log has all.
    #[serde(default)]
    pub denials: Vec<Denial>,
}

/// A machine's socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// Context id of the guest.
    pub cid: u32,
    /// The Unix socket at which clients ask for connections to the guest; there while the machine runs.
    pub path: String,
}

/// A denied system call, as the process claims that made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// When.
    pub at: String,
    /// The process, such as `blk0.1`.
    pub process: String,
    /// Its name in the VM file, or the kind's.
    pub name: String,
    /// The call with its arguments.
    pub call: String,
    /// The thread by its name in the policy, or `start-up`.
    pub thread: String,
    /// The policy file that would allow it.
    pub policy: String,
    /// The line in it.
    pub line: usize,
    /// All of that in a sentence, with what the line is.
    pub said: String,
}

/// One process of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Kind, such as `blk`.
    pub kind: String,
    /// Number among those of its kind.
    pub index: u16,
    /// Counts its starts, from 1.
    pub generation: u32,
    /// Name in the VM file, or the kind's.
    pub name: String,
    /// Process id on the host.
    pub pid: i32,
    /// Whether it is locked and serves.
    pub locked: bool,
    /// The range of which its user is the first id plus its pid, as `FIRST-LAST`; absent of one that has
    /// no user of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<UserRange>,
}

/// `GET /v1/vms/NAME/stats`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Whose.
    pub name: String,
    /// What it does now.
    pub state: State,
    /// Age of the present run.
    pub uptime_ms: Option<u64>,
    /// CPU time of all processes.
    pub cpu_time_us: u64,
    /// Proportional share of memory of all processes, guest memory included; those that could not
    /// be measured are left out.
    pub pss_bytes: u64,
    /// Each process.
    pub processes: Vec<ProcessStats>,
    /// Each network device.
    #[serde(default)]
    pub networks: Vec<NetworkStats>,
}

/// What one process has used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStats {
    /// Which.
    #[serde(flatten)]
    pub process: Process,
    /// Starts of it after the first.
    pub restarts: u32,
    /// CPU time, user and system.
    pub cpu_time_us: u64,
    /// Proportional share of memory; `None` where the kernel does not let the daemon look.
    pub pss_bytes: Option<u64>,
    /// Bytes that it has had from the kernel by reading.
    pub read_bytes: Option<u64>,
    /// Bytes that it has given the kernel by writing.
    pub written_bytes: Option<u64>,
    /// Read and write system calls; what an io_uring does is in the bytes only.
    pub read_calls: Option<u64>,
    /// See [`ProcessStats::read_calls`].
    pub write_calls: Option<u64>,
}

/// What a request that changes something answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Whose.
    pub name: String,
    /// Whether anything had to be done.
    pub changed: bool,
    /// What the machine does now; `None` when it is no more.
    pub state: Option<State>,
}

/// `POST /v1/vms/NAME/stop` and `/restart`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// How long the guest has to go off.
    pub timeout_ms: u64,
    /// Whether its power is cut when it has not.
    pub force: bool,
}

/// `GET /v1/vms/NAME/wait`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Whose.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub last_run: LastRun,
}

/// `POST /v1/host/shutdown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostShutdown {
    /// How long the guests have to go off.
    pub deadline_ms: u64,
}

/// What became of one machine at a host shutdown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostShutdownVm {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Whose.
    pub name: String,
    /// `powered_off`, `power_cut` or `left_running`.
    pub outcome: String,
}

/// One of a machine's consoles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleName {
    /// The serial port.
    Serial,
    /// The virtio console.
    Virtio,
}
