//! What the caller of [`super::run`] gives and gets: options, commands, events, the console's
//! ends, and how a run ended. Plain types; the command line and, later, the API are the callers.

use super::any_path;
use super::spec::{BackingSpec, DiskSpec, FileSpec};
use crate::launch::cgroup::Reach;
use crate::launch::users::UserRange;
use crate::network::board::Switchboard;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcId;
use bulkhead_ipc::input_ring::InputWriter;
use bulkhead_ipc::output_ring::OutputReader;
use bulkhead_ipc::protocol::birth::{DiskLimits, ImageFormat};
use bulkhead_ipc::protocol::device::Traffic;
use bulkhead_ipc::protocol::vcpu::Outcome;
use bulkhead_ipc::shared::Doorbell;
use bulkhead_policies::explain::Explanation;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Capacity that suits the channel of events. An event that does not fit is dropped and counted in
/// the log, because a caller that does not listen must not hold up the machine.
pub const EVENTS_CAPACITY: usize = 256;
/// Restarts that [`Finished`] tells of.
pub const RESTARTS_KEPT_MAX: usize = 1000;
/// Longest crash report that is kept, in bytes.
pub const REPORT_BYTES_MAX: usize = 1 << 20;

/// Where things are, and what this run is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunOptions {
    /// Directory of the process binaries (`bulkhead-vcpu`, `bulkhead-blk`, …).
    #[serde(with = "any_path")]
    pub binaries: PathBuf,
    /// Directory of policy overrides; missing means none.
    #[serde(with = "any_path::option")]
    pub policies: Option<PathBuf>,
    /// Whether overrides may grant more than the built-in policies.
    pub allow_looser_policy: bool,
    /// Directory for compiled filters; `None` compiles each time.
    #[serde(with = "any_path::option")]
    pub cache: Option<PathBuf>,
    /// Directory for this run's ring files; made if missing. Files in it are replaced.
    #[serde(with = "any_path")]
    pub state: PathBuf,
    /// The runtime directory of all machines: locks, records and sockets are below it.
    #[serde(with = "any_path")]
    pub runtime: PathBuf,
    /// ELF core to write when the machine crashes.
    #[serde(with = "any_path::option")]
    pub core: Option<PathBuf>,
    /// Where its control groups are.
    pub reach: Reach,
    /// Whether a reset starts the machine again as its life cycle says (`--no-reboot` clears it).
    pub reboot: bool,
    /// What the registry calls it; `None` of one that is not in it.
    #[serde(default)]
    pub id: Option<String>,
    /// Users of its processes: those of the broker that starts them.
    #[serde(default)]
    pub users: UserRange,
    /// The networks that its cards can be plugged into: those of the broker that starts them.
    #[serde(skip)]
    pub networks: Switchboard,
}

#[cfg(test)]
impl RunOptions {
    /// Those of a machine that a test only writes about.
    pub(crate) fn for_test(runtime: &std::path::Path) -> Self {
        Self {
            binaries: "/b".into(),
            policies: None,
            allow_looser_policy: false,
            cache: None,
            state: "/s".into(),
            runtime: runtime.to_owned(),
            core: None,
            reach: Reach::Within,
            reboot: true,
            id: None,
            users: UserRange::DEFAULT,
            networks: Switchboard::default(),
        }
    }
}

/// What a caller may ask of a running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Press the ACPI power button. A guest that powers itself off after this is not started again,
    /// whatever its life cycle says.
    PowerButton,
    /// The owner no longer waits for what [`Command::PowerButton`] asked: the machine runs on.
    RunOn,
    /// Cut the power: ends with [`Ending::Killed`].
    Kill,
    /// Press the reset button: the machine starts again from the beginning, in new processes.
    Reset,
    /// The user interrupted the program: as [`Command::Kill`], ends with [`Ending::Interrupted`].
    Interrupt,
    /// Stop the vCPUs, keep everything.
    Pause,
    /// Undo [`Command::Pause`].
    Resume,
    /// Have another process serve this device (its name in the VM file, or its kind): the one that
    /// serves it finishes what it is doing and goes, or there is none any more. The guest sees a delay.
    RestartDevice(String),
    /// The same with the program that is on disk now. If that does not serve, the program that did is
    /// started again, and [`Event::Refused`] says so.
    UpgradeDevice(String),
    /// Whether the cable of a network device is plugged in.
    LinkDevice {
        /// Its name in the VM file.
        device: String,
        /// Whether it is.
        up: bool,
    },
    /// What a disk or network device may do in a second from now on, until the machine ends.
    LimitDevice {
        /// Its name in the VM file.
        device: String,
        /// What it may do.
        limits: DiskLimits,
    },
    /// Another size or medium for a disk, until the machine ends. If it cannot be served, the disk is what
    /// it was, and [`Event::Refused`] says so.
    ChangeDisk {
        /// Its name in the VM file.
        device: String,
        /// What it is to be.
        change: DiskChange,
    },
    /// The attached terminal has this size.
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
}

/// What a disk of a running machine is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskChange {
    /// As large as this; a multiple of 512. It is never made smaller.
    Size {
        /// In bytes.
        bytes: u64,
    },
    /// Made of other files.
    Medium(Medium),
}

impl DiskChange {
    /// What a person calls it.
    #[must_use]
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::Size { .. } => "resize",
            Self::Medium(_) => "medium",
        }
    }
}

/// The files of a disk, as in a VM file. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Medium {
    /// The image.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// The files with the data of a VMDK image.
    pub extents: Vec<FileSpec>,
    /// The images below it.
    pub backing: Vec<BackingSpec>,
}

impl Medium {
    /// The disk `now` with this medium.
    pub(super) fn in_place_of(&self, now: &DiskSpec) -> DiskSpec {
        let Self {
            path,
            format,
            extents,
            backing,
        } = self.clone();
        DiskSpec {
            path,
            format,
            extents,
            backing,
            bytes_min: 0,
            ..now.clone()
        }
    }
}

/// What happens to a machine, for whoever watches. Text is one line and free of control characters,
/// whatever a process wrote.
#[derive(Debug)]
pub enum Event {
    /// The consoles can be read and typed at. Sent once, first; they survive restarts.
    Consoles(Box<Consoles>),
    /// A process was started and has this pid.
    Started {
        /// Who.
        id: ProcId,
        /// Name in the VM file, or the kind's.
        name: String,
        /// Process id on the host.
        pid: i32,
        /// Its program.
        program: ProgramFile,
        /// The range that its user is of; `None` when it has no user of its own.
        users: Option<UserRange>,
    },
    /// A process of a machine that goes on is dead.
    Died {
        /// Who.
        id: ProcId,
        /// Name in the VM file, or the kind's.
        name: String,
        /// How, in words.
        reason: String,
    },
    /// A process is locked and serves.
    Locked {
        /// Who.
        id: ProcId,
        /// Time from its start.
        after: Duration,
        /// Landlock ABI in force, 0 for none.
        landlock_abi: u8,
        /// Version of its program, as it says.
        program: String,
    },
    /// A device is served again, by another process.
    Restarted(Restart),
    /// A request that three processes of a device died with was answered with an error.
    RequestGivenUp {
        /// Name in the VM file.
        name: String,
        /// Which request.
        reason: String,
    },
    /// A command was not carried out, or was undone.
    Refused {
        /// The device that it was about.
        device: String,
        /// What was wanted of what.
        command: String,
        /// Why not.
        reason: String,
    },
    /// The machine has a new broker, which hears its vCPUs again.
    TakenOver {
        /// Time from the first process met.
        after: Duration,
    },
    /// Every process is locked.
    AllLocked {
        /// Time from the first process's start.
        after: Duration,
    },
    /// The vCPUs are stopped.
    Paused,
    /// The vCPUs run again.
    Resumed,
    /// What a network device has done since its process started.
    Traffic {
        /// The process.
        id: ProcId,
        /// Its counters.
        traffic: Traffic,
    },
    /// The host has no room for what the guest writes to a disk: the machine is paused until there is.
    NoRoom {
        /// The disk's name in the VM file.
        name: String,
    },
    /// There is room again, or nothing waits for it any more.
    HasRoom {
        /// The disk's name in the VM file.
        name: String,
    },
    /// A process was lost; the machine goes on without its device.
    Degraded {
        /// Who.
        id: ProcId,
        /// Name in the VM file.
        name: String,
        /// What happened to it.
        reason: String,
    },
    /// A process is dead because the kernel denied it a system call, as it claims itself. Comes
    /// before what its death means.
    Denied {
        /// Who.
        id: ProcId,
        /// Name in the VM file.
        name: String,
        /// The call, and the line of the policy that would allow it.
        denial: Box<Explanation>,
    },
    /// A device broke its protocol, or said that it failed.
    DeviceFault {
        /// Name in the VM file.
        name: String,
        /// What it did.
        reason: String,
    },
    /// The guest broke the protocol of a device.
    GuestFault {
        /// Name in the VM file.
        name: String,
        /// What it did.
        reason: String,
    },
    /// The guest has ended in this way.
    Ended(Outcome),
    /// What has ended is kept as it is, until it is killed or reset.
    Preserved,
    /// The machine is started again, for the `count`th time.
    Restarting {
        /// How often so far.
        count: u32,
    },
}

/// What tells a program from any other while a process of it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramFile {
    /// The host's number of the file system that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

impl From<(u64, u64)> for ProgramFile {
    fn from((device, inode): (u64, u64)) -> Self {
        Self { device, inode }
    }
}

/// One process that took another's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// The new process; its generation counts.
    pub id: ProcId,
    /// Name of the device in the VM file, or the kind's.
    pub name: String,
    /// Process id of the new process on the host.
    pub pid: i32,
    /// Version of its program, as it says.
    pub program: String,
    /// Why the one before had died.
    pub reason: String,
    /// Time from the death until the device served again.
    pub after: Duration,
}

/// The consoles' ends on the broker's side.
#[derive(Debug)]
pub struct Consoles {
    /// The 8250.
    pub serial: ConsoleEnds,
    /// The virtio console, if there is one.
    pub virtio: Option<ConsoleEnds>,
}

/// One console: a reader and a writer that never block its guest.
#[derive(Debug)]
pub struct ConsoleEnds {
    /// The output, from its oldest byte.
    pub output: OutputReader,
    /// Rung when there is new output.
    pub output_bell: Doorbell,
    /// The keyboard.
    pub input: InputWriter,
    /// To be rung after typing.
    pub input_bell: Doorbell,
}

/// How a run ended, with what is known about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// How.
    pub ending: Ending,
    /// The crash report, if the vCPU process wrote one. Guest bytes in it are escaped.
    pub report: Option<String>,
    /// Devices that were lost on the way: name and reason.
    pub degraded: Vec<(String, String)>,
    /// Processes that took another's place, the last [`RESTARTS_KEPT_MAX`] of them.
    pub restarts: Vec<Restart>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The guest switched itself off, or reset itself where that ends the run.
    PoweredOff,
    /// The guest reported a panic.
    GuestPanic,
    /// A vCPU took a triple fault.
    TripleFault,
    /// The guest wrote this byte to the debug exit port.
    DebugExit(u8),
    /// KVM could not run the guest.
    InternalError,
    /// Killed by command.
    Killed,
    /// Interrupted by the user.
    Interrupted,
    /// The run's time-out passed.
    TimedOut(Duration),
    /// A process that the machine cannot do without was lost.
    Lost {
        /// Which, and what happened to it.
        reason: String,
    },
}

impl Ending {
    /// The exit code of `run` and `wait`.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::GuestPanic => 8,
            Self::TripleFault => 10,
            Self::Killed => 12,
            Self::Lost { .. } => 14,
            Self::InternalError => 16,
            Self::TimedOut(_) => 124,
            Self::Interrupted => 130,
            Self::DebugExit(value) => (*value << 1) | 1,
        }
    }

    /// A stable word for it, and what there is to say about it.
    #[must_use]
    pub fn describe(&self) -> (&'static str, Option<String>) {
        let (word, message) = match self {
            Self::PoweredOff => return ("powered_off", None),
            Self::GuestPanic => ("guest_panic", "the guest panicked".to_owned()),
            Self::TripleFault => ("triple_fault", "a vCPU took a triple fault".to_owned()),
            Self::DebugExit(value) => {
                let message = format!("the guest wrote {value:#04x} to the debug exit port");
                ("debug_exit", message)
            }
            Self::InternalError => ("internal_error", "KVM could not run the guest".to_owned()),
            Self::Killed => ("killed", "killed".to_owned()),
            Self::Interrupted => ("interrupted", "interrupted".to_owned()),
            Self::TimedOut(after) => {
                let message = format!("killed, since the time-out of {after:?} has passed");
                ("timed_out", message)
            }
            Self::Lost { reason } => ("lost", format!("a process was lost: {reason}")),
        };
        (word, Some(message))
    }
}

/// Why a machine could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The specification, a policy or a file it names is wrong: exit code 2.
    #[error("{0}")]
    Configuration(String),
    /// The host lacks something: exit code 4.
    #[error("{lacks} (see 'bulkhead doctor')")]
    Host {
        /// What, and what the kernel said.
        lacks: String,
    },
    /// A process could not be started or did not become ready: exit code 6.
    #[error("{who} could not be started: {reason}")]
    Start {
        /// Which process.
        who: String,
        /// Why.
        reason: String,
    },
}

impl RunError {
    /// The exit code of `run`.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => 2,
            Self::Host { .. } => 4,
            Self::Start { .. } => 6,
        }
    }
}

/// The name under which a virtio device without one appears in messages.
#[must_use]
pub const fn default_name(kind: VirtioKind) -> &'static str {
    match kind {
        VirtioKind::Blk => "disk",
        VirtioKind::Console => "console",
        VirtioKind::Rng => "rng",
        VirtioKind::Vsock => "vsock",
        VirtioKind::Fs => "share",
        VirtioKind::Net => "net",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_promised_ones_and_never_one() {
        let debug = (0..=255u8).map(|v| Ending::DebugExit(v).exit_code());
        assert!(debug.clone().all(|code| code % 2 == 1));
        assert_eq!(Ending::DebugExit(0x31).exit_code(), 0x63);
        let codes = [
            Ending::PoweredOff,
            Ending::GuestPanic,
            Ending::TripleFault,
            Ending::Killed,
        ]
        .map(|e| e.exit_code());
        assert_eq!(codes, [0, 8, 10, 12]);
        let lost = Ending::Lost {
            reason: String::new(),
        };
        assert_eq!(lost.exit_code(), 14);
        assert_eq!(Ending::TimedOut(Duration::ZERO).exit_code(), 124);
        assert_eq!(Ending::Interrupted.exit_code(), 130);
    }
}
