//! The notation of a policy file. Unknown keys are errors, and every error names file, line, key.
//!
//! These types say only what may be written; [`crate::check`] holds the rules, [`crate::plan`] the
//! meaning.

use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::FdRole;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use toml::Spanned;

/// `policies/KIND.toml`: everything that processes of one kind are granted.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// The kind of process.
    #[schemars(with = "String")]
    pub kind: ProcKind,
    /// What such a process is for, in one sentence.
    pub purpose: String,
    /// The descriptors it is born with, besides log pipe, control socket and control page.
    #[serde(default)]
    pub fd: Vec<FdEntry>,
    /// The descriptors that it makes for itself while it starts, and keeps.
    #[serde(default)]
    pub made: Vec<MadeEntry>,
    /// System calls of the start-up phase; those of the locked phase need not be repeated.
    pub startup: Phase,
    /// System calls of the locked phase by kind of thread: `main`, `vcpu`, `gate`.
    pub locked: BTreeMap<String, Phase>,
    /// The io_uring that is made during start-up, if any.
    #[serde(default)]
    pub io_uring: Uring,
    /// Namespaces, root file system, Landlock.
    pub sandbox: SandboxEntry,
    /// Limits that the kernel enforces on the process.
    pub limits: LimitsEntry,
    /// What its death means.
    pub supervision: SupervisionEntry,
}

/// One descriptor, or several of one role.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FdEntry {
    /// What it is for.
    #[schemars(with = "String")]
    pub role: Spanned<FdRole>,
    /// What it is.
    pub is: FdType,
    /// What may be done with it.
    pub access: Access,
    /// Path of a character device.
    #[serde(default)]
    pub path: Option<String>,
    /// Whether the locked process still has it.
    #[serde(default)]
    pub held: Held,
    /// Fewest of this role.
    #[serde(default = "one")]
    pub min: u16,
    /// Most of this role.
    #[serde(default = "one")]
    pub max: u16,
    /// Why the process needs it.
    pub why: String,
}

const fn one() -> u16 {
    1
}

/// Whether a locked process still has a descriptor that it was born with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Held {
    /// It has.
    #[default]
    Always,
    /// It closes the descriptor before it locks itself.
    UntilLock,
    /// That depends on what it was given.
    Maybe,
}

/// A descriptor, or several, that a process makes for itself while it starts, and keeps.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MadeEntry {
    /// What it is.
    #[schemars(with = "MadeType")]
    pub is: Spanned<MadeType>,
    /// Fewest.
    #[serde(default = "one")]
    pub min: u16,
    /// Most.
    #[serde(default = "one")]
    pub max: u16,
    /// Whether `min` and `max` are for each vCPU.
    #[serde(default)]
    pub per_vcpu: bool,
    /// Why the process makes it.
    pub why: String,
}

/// What a descriptor is that a process makes for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MadeType {
    /// A set of descriptors that are waited for.
    Epoll,
    /// A doorbell of its own.
    Eventfd,
    /// The ring of `io_uring`.
    IoUring,
    /// The virtual machine of KVM.
    KvmVm,
    /// A virtual processor of KVM.
    KvmVcpu,
    /// A second descriptor of a window that it was born with.
    WindowCopy,
    /// A connected SOCK_STREAM socket. It comes and goes while the process serves.
    StreamSocket,
    /// A file or directory below the folder that it was born with.
    BelowFolder,
    /// The memory of a port, which it is given while it serves.
    Port,
    /// A queue of a TAP interface, which it is given while it serves.
    Tap,
    /// One end of a pipe, which it is given while it serves.
    Pipe,
}

/// What kind of file a descriptor refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FdType {
    /// Sealed shared memory.
    Memfd,
    /// A doorbell.
    Eventfd,
    /// A regular file.
    File,
    /// A regular file or a block device.
    FileOrBlock,
    /// A character device.
    CharDevice,
    /// A connected SOCK_SEQPACKET socket.
    Seqpacket,
    /// A SOCK_STREAM socket that listens at a path.
    ListeningSocket,
    /// A connected SOCK_STREAM socket.
    StreamSocket,
    /// A directory: where the broker may mount, the root of a mount of its own, on which nothing is executed
    /// and no device opened.
    Folder,
}

/// The access mode a descriptor is opened with.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// O_RDONLY.
    Read,
    /// O_WRONLY.
    Write,
    /// O_RDWR.
    ReadWrite,
}

/// The system calls of one phase or thread.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// The hosts on which there is such a thread; `None` for all.
    #[serde(default)]
    pub host: Option<HostKvm>,
    /// The system calls.
    #[serde(default)]
    pub call: Vec<Call>,
}

/// One permitted system call.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Its name.
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// For `ioctl`: the request codes, by the names of [`crate::constants`].
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub request: Vec<Spanned<String>>,
    /// Conditions on arguments; all must hold.
    #[serde(default)]
    pub arg: Vec<ArgCondition>,
    /// The hosts that need it; `None` for all.
    #[serde(default)]
    pub host: Option<HostKvm>,
    /// The build that needs it; `None` for all.
    #[serde(default)]
    pub build: Option<Build>,
    /// Whether only a start that fails needs it, to give up what it has got so far and tell why.
    #[serde(default)]
    pub on_failure: bool,
    /// Why the process needs it.
    #[serde(default)]
    pub why: String,
}

/// A build that alone needs a grant, which a check of another cannot show to be needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Build {
    /// One with debug assertions: the standard library looks at descriptors before it closes them.
    Debug,
}

/// Hosts by their KVM. A grant that only hosts of one sort need says so, since a check on another
/// host cannot show that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HostKvm {
    /// KVM runs every instruction of a guest.
    Complete,
    /// KVM lacks instructions, which are completed outside of it (`kvm_pvm`).
    Incomplete,
}

/// A condition on one argument. Exactly one of `is`, `bits_clear` and `at_most` is given.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ArgCondition {
    /// Which argument, from 0.
    pub index: u8,
    /// It has one of these values (compared as 32 bits, like the kernel's `int` arguments).
    #[serde(default)]
    pub is: Option<Vec<Number>>,
    /// None of these bits is set (of 64).
    #[serde(default)]
    pub bits_clear: Option<Number>,
    /// It is at most this (as 64 bits).
    #[serde(default)]
    pub at_most: Option<Number>,
}

/// A number, or the name of one in [`crate::constants`].
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Number {
    /// A number.
    Value(u32),
    /// A name.
    Name(String),
}

/// The io_uring of a kind. No opcodes: no ring.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Uring {
    /// The only operations that the ring is registered for.
    #[serde(default)]
    pub opcode: Vec<Opcode>,
}

/// One permitted io_uring operation.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Opcode {
    /// Its name without `IORING_OP_`.
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// Why the process needs it.
    #[serde(default)]
    pub why: String,
}

/// What surrounds the process.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SandboxEntry {
    /// Namespaces of its own.
    pub namespaces: Vec<Namespace>,
    /// Its network.
    pub network: Network,
    /// Its root file system.
    pub root: Root,
    /// What Landlock denies: everything, but for a process with a folder what is below that.
    pub landlock: Vec<LandlockDeny>,
    /// Capabilities that it keeps: none.
    pub capabilities: Vec<String>,
    /// Its user.
    pub user: User,
    /// Speculation of the processor that is switched off while it runs, for good.
    #[serde(default)]
    pub speculation: Vec<Speculation>,
}

/// A kind of speculative execution that a process can give up (prctl(2), PR_SET_SPECULATION_CTRL).
/// Where the processor or the kernel has no switch for it, nothing is done.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Speculation {
    /// Loads that pass older stores.
    StoreBypass,
    /// Targets of indirect branches that others have trained; costs at each switch of processes.
    IndirectBranch,
}

/// A namespace.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Namespace {
    /// Users and capabilities.
    User,
    /// Process ids.
    Pid,
    /// Mounts.
    Mount,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Control groups.
    Cgroup,
}

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A network namespace without any interface in use, shared with other processes that have none.
    Empty,
}

/// A root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Root {
    /// An empty read-only directory.
    Empty,
}

/// What Landlock denies.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum LandlockDeny {
    /// Every access to files by path.
    Filesystem,
    /// The same, but for reading, writing, making, renaming and removing below its folder.
    FilesystemOutsideFolder,
    /// Binding and connecting TCP sockets.
    Network,
    /// Connecting to abstract Unix sockets outside.
    AbstractUnixSocket,
    /// Signals to processes outside.
    Signal,
}

/// Whom the process runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum User {
    /// A user id that no other process has, where the broker may choose; the broker's own id,
    /// wrapped in a user namespace, otherwise.
    Own,
}

/// Limits. Sizes are strings with a unit.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsEntry {
    /// RLIMIT_NOFILE.
    pub open_files: u32,
    /// RLIMIT_MEMLOCK.
    pub locked_memory: Size,
    /// RLIMIT_STACK.
    pub stack: Size,
    /// RLIMIT_FSIZE; absent for no limit.
    #[serde(default)]
    pub file_size: Option<Size>,
    /// Whether RLIMIT_FSIZE is the size of the disk image that it is given, so that it cannot grow it.
    #[serde(default)]
    pub file_size_of_disk: bool,
    /// RLIMIT_AS; absent for no limit (the process maps guest memory).
    #[serde(default)]
    pub address_space: Option<Size>,
    /// Memory of its control group, besides guest memory.
    pub memory: Size,
    /// Whether guest memory is added to `memory`.
    #[serde(default)]
    pub plus_guest_memory: bool,
    /// Tasks of its control group, besides one for each vCPU.
    pub tasks: u32,
    /// Whether one task for each vCPU is added to `tasks`.
    #[serde(default)]
    pub plus_vcpus: bool,
    /// How much rather than others the host ends it when memory runs out, 1 to 1000: a machine goes
    /// before a broker, which has 0 or less.
    pub oom_score_adj: u16,
    /// Processor time of its control group in percent of one processor, 1 to 6400; absent for no limit
    /// (and no CPU group, which would change when the scheduler lets the process run).
    #[serde(default)]
    pub cpu_percent: Option<u32>,
    /// Bytes a second that a `blk` process reads from each host disk that the machine's images are on, at
    /// least 4KiB; absent for no limit.
    #[serde(default)]
    pub disk_read_per_s: Option<Size>,
    /// The same for writes.
    #[serde(default)]
    pub disk_write_per_s: Option<Size>,
    /// Reads a second of each of these disks, at least 1; absent for no limit.
    #[serde(default)]
    pub disk_read_iops: Option<u32>,
    /// The same for writes.
    #[serde(default)]
    pub disk_write_iops: Option<u32>,
}

/// A size in bytes, written as a number with a unit: `"64KiB"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
#[schemars(transparent)]
pub struct Size(#[schemars(with = "String")] pub u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let expected = "expected a size with a unit, such as \"64KiB\"";
        let split = text.find(|c: char| !c.is_ascii_digit());
        let (digits, unit) = text.split_at(split.unwrap_or(text.len()));
        let shift = match unit {
            "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => {
                return Err(serde::de::Error::custom(format!(
                    "size {text:?}: {expected}"
                )));
            }
        };
        digits
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(format!("size {text:?}: {expected}")))
    }
}

/// What the death of such a process means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SupervisionEntry {
    /// What is done.
    pub on_death: OnDeath,
    /// Time it has from its start to being locked, in milliseconds.
    pub birth_timeout_ms: u32,
    /// How often and how soon; given exactly when it is restarted.
    #[serde(default)]
    pub restart: Option<RestartEntry>,
    /// How it is found out to be stuck; absent for a process that is never asked.
    #[serde(default)]
    pub heartbeat: Option<HeartbeatEntry>,
    /// How often it may be at fault; absent where each fault costs the guest no more than a restart.
    #[serde(default)]
    pub faults: Option<FaultsEntry>,
}

/// How often a process may be killed for what it did or left undone: being late, silent, or talking
/// nonsense. Each time the guest has waited for it, for longer than a restart takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FaultsEntry {
    /// Most faults within `window_ms`; one more and the machine goes on without the device.
    pub max: u16,
    /// Time in which faults are counted, in milliseconds.
    pub window_ms: u32,
}

/// How a process is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RestartEntry {
    /// Most restarts within `window_ms`; one more and the machine goes on without the device.
    pub restarts_max: u16,
    /// Time in which restarts are counted, in milliseconds.
    pub window_ms: u32,
    /// Pause before a restart when the process before died within this time of serving, or never
    /// served, in milliseconds. Doubled each time.
    pub backoff_ms_min: u32,
    /// Longest pause in milliseconds.
    pub backoff_ms_max: u32,
}

/// How a process shows that it is not stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeartbeatEntry {
    /// Time between two questions in milliseconds.
    pub interval_ms: u32,
    /// Questions in a row without an answer after which it is killed.
    pub misses_max: u16,
}

/// What is done when a process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnDeath {
    /// Another process takes its place; when that has been tried too often, the machine goes on
    /// without the device.
    Restart,
    /// The machine goes on without the device.
    Degrade,
    /// The machine has ended.
    EndMachine,
}

/// `policies.d/KIND.toml`: what an operator changes. Without permission for looser policies, only
/// what takes away is accepted.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OverrideFile {
    /// The kind of process.
    #[schemars(with = "String")]
    pub kind: ProcKind,
    /// System calls taken away.
    #[serde(default)]
    pub deny: Vec<DenyEntry>,
    /// io_uring operations taken away.
    #[serde(default)]
    pub deny_opcode: Vec<String>,
    /// System calls added to a thread's locked phase (looser).
    #[serde(default)]
    pub allow: BTreeMap<String, Phase>,
    /// Limits replaced.
    #[serde(default)]
    pub limits: LimitsChange,
}

/// A system call that an operator takes away.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DenyEntry {
    /// Its name.
    #[schemars(with = "String")]
    pub name: Spanned<String>,
    /// A thread, which loses the call once it is locked; or `startup`, for what only the start-up is
    /// granted; or every thread and phase.
    #[serde(default)]
    pub thread: Option<String>,
    /// For `ioctl`: only these request codes.
    #[serde(default)]
    pub request: Vec<String>,
    /// Only these values (`is`) of these arguments.
    #[serde(default)]
    pub arg: Vec<ArgCondition>,
}

/// Limits that an operator replaces. What is absent stays as it is; no limit can be taken away.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsChange {
    /// As [`LimitsEntry::open_files`].
    pub open_files: Option<u32>,
    /// As [`LimitsEntry::file_size`].
    pub file_size: Option<Size>,
    /// As [`LimitsEntry::address_space`].
    pub address_space: Option<Size>,
    /// As [`LimitsEntry::memory`].
    pub memory: Option<Size>,
    /// As [`LimitsEntry::tasks`].
    pub tasks: Option<u32>,
    /// As [`LimitsEntry::cpu_percent`].
    pub cpu_percent: Option<u32>,
    /// As [`LimitsEntry::disk_read_per_s`].
    pub disk_read_per_s: Option<Size>,
    /// As [`LimitsEntry::disk_write_per_s`].
    pub disk_write_per_s: Option<Size>,
    /// As [`LimitsEntry::disk_read_iops`].
    pub disk_read_iops: Option<u32>,
    /// As [`LimitsEntry::disk_write_iops`].
    pub disk_write_iops: Option<u32>,
}

/// The JSON schema of policy files.
#[must_use]
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(PolicyFile).into()
}
