//! The notation of a scenario. Unknown keys are errors; `check.rs` holds the rules.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A scenario file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it is called in reports.
    pub name: String,
    /// What it shows, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    /// Seed of everything that is drawn; --seed wins.
    #[serde(default = "one")]
    pub seed: u64,
    /// Length of the workload in seconds, 1 to 3600.
    #[serde(default = "three")]
    pub seconds: u64,
    /// The hosts; one named `host` when none is given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host: Vec<Host>,
    /// Traffic between hosts, which must arrive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub link: Vec<Link>,
    /// The machines.
    pub vm: Vec<Vm>,
    /// What the operator does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub step: Vec<Step>,
    /// What goes wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fault: Vec<Fault>,
    /// What goes wrong besides, drawn by the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub random: Option<Random>,
}

const fn one() -> u64 {
    1
}

const fn three() -> u64 {
    3
}

/// A host: a daemon with directories and a network namespace of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name.
    pub name: String,
}

/// Traffic from one host to another: records over TCP, and datagrams that show how bad the network is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The host that sends.
    pub from: String,
    /// The host that receives; each receives from one other at most.
    pub to: String,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its host; the first one by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// What its guest does.
    pub workload: Work,
    /// Number of virtual processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u8>,
    /// The virtual network of its host that it has a card in, which is made for the scenario.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its disk; 16 MiB in memory by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// What the faults may do to the guest.
    #[serde(default)]
    pub expect: Expect,
}

/// What a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Patterns on its disk, with checksums and flushes.
    Blocks,
    /// Memory that keeps changing and is verified.
    Memory,
    /// Clocks that are compared with one outside.
    Clock,
    /// Numbered lines on the serial port; typed ones too, unless a fault may hit the broker.
    Transcript,
    /// Files that the small Linux creates, renames and synchronises.
    Files,
    /// Serves data in its network, for longer than the others work.
    Serve,
    /// Leases an address and takes verified data from the machine of its network that serves, again and again.
    Take,
}

/// What the faults may do to a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Expect {
    /// Nothing: it does its whole work without an error.
    #[default]
    Unharmed,
    /// It may be told of errors, and tells of them. What is on its disk is right.
    Errors,
    /// What a device holds of it may be spoiled, or its processor: anything may be wrong within it.
    Harmed,
    /// It may end at any moment. What it said until then was true.
    Lost,
}

/// A machine's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its size, such as `16MiB`.
    pub size: String,
    /// Where it is.
    #[serde(default)]
    pub on: DiskPlace,
}

/// Where a disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskPlace {
    /// In memory: system calls read and write it.
    #[default]
    Tmpfs,
    /// On the file system of temporary files: an `io_uring` reads and writes it.
    File,
    /// Served by the harness, for faults of the disk itself.
    Faulty,
}

/// Something that the operator does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// When, in milliseconds after the guests work.
    pub at_ms: u64,
    /// What.
    #[serde(rename = "do")]
    pub deed: Deed,
    /// On which machine; the first one by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// On which of its devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// What an operator can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Deed {
    /// `device restart`.
    RestartDevice,
    /// `device upgrade`.
    Upgrade,
    /// Ends the broker in an orderly way and starts another.
    RestartBroker,
    /// `pause`.
    Pause,
    /// `resume`.
    Resume,
    /// `reset`.
    Reset,
    /// `stop`: the power button; `kill` when the guest does not listen.
    Stop,
    /// `kill`.
    Kill,
    /// Starts a second broker with the directories of the first, which must refuse to serve.
    Twin,
    /// `inspect`, `list` and `stats`: which must answer.
    Look,
}

/// A fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Where: a name that `bulkhead fault points` lists.
    pub point: String,
    /// What happens there.
    #[serde(rename = "do")]
    pub action: Action,
    /// Only for this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Only for this process, such as `blk0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<String>,
    /// Only on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// At the N-th time that the point is reached, from 1 (the default when no time is given).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nth: Option<u64>,
    /// At this time in milliseconds after the guests work, or the first time later that the point is
    /// reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<u64>,
    /// As `at_ms`, at a time that the seed draws between these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub between_ms: Option<[u64; 2]>,
    /// As `at_ms`, again and again with this distance, `times` times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_ms: Option<u64>,
    /// How often; 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u64>,
    /// How long, for actions that take time; how long a killed broker or host stays away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<u64>,
    /// The error, such as `EIO`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    /// Bytes of a short count, of a message or write that is cut, of a window that is spoiled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Whom a fault on a message hits; the sender by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// First and last sector of the disk that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sectors: Option<[u64; 2]>,
    /// Seed of what the fault itself draws (bits, bytes); by default it is drawn too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// By how many milliseconds a clock jumps; negative: back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jump_ms: Option<i64>,
    /// By how many milliseconds each frame of a network is late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    /// Share in percent: of the CPU that is left, or of the frames of a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u8>,
}

/// Whom a fault on a message hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// Who sends it.
    Sender,
    /// Who is to get it.
    Receiver,
    /// The broker, whichever of the two it is.
    Broker,
}

/// What goes wrong.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// SIGKILL.
    Kill,
    /// Stands still for `ms`.
    Stop,
    /// Runs half of the time for `ms`.
    Slow,
    /// Gets `percent` of a CPU for `ms`.
    Starve,
    /// The machine may have no more memory than it has, for `ms`.
    MemoryPressure,
    /// A message or frame never arrives.
    Drop,
    /// A message, call or disk request takes `ms` longer.
    Delay,
    /// A message or frame arrives twice.
    Duplicate,
    /// A message arrives after the next one of its channel, a frame after others.
    Reorder,
    /// Bits of a message, a frame or of a window are flipped.
    Corrupt,
    /// What stands in a window changes and changes back for `ms`, while it is read.
    Shake,
    /// A message loses its end.
    Truncate,
    /// A system call fails with `errno`.
    Fail,
    /// A system call does no more than `bytes`.
    Short,
    /// A disk request fails with EIO.
    Error,
    /// A disk write fails with ENOSPC.
    Full,
    /// A disk request is not answered for `ms`.
    Hang,
    /// Of a disk write, only the first `bytes` outlive a death of the host.
    Torn,
    /// A flush says yes and does nothing.
    Lie,
    /// Nothing of a host's network arrives for `ms`, neither way.
    Partition,
    /// A guest gets a non-maskable interrupt.
    Nmi,
    /// The time of day is `jump_ms` later, or earlier, from one moment to the next.
    Jump,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Kill,
        Self::Stop,
        Self::Slow,
        Self::Starve,
        Self::MemoryPressure,
        Self::Drop,
        Self::Delay,
        Self::Duplicate,
        Self::Reorder,
        Self::Corrupt,
        Self::Shake,
        Self::Truncate,
        Self::Fail,
        Self::Short,
        Self::Error,
        Self::Full,
        Self::Hang,
        Self::Torn,
        Self::Lie,
        Self::Partition,
        Self::Nmi,
        Self::Jump,
    ];
}

/// Faults that the seed draws.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Random {
    /// How many.
    pub count: u32,
    /// Of which families; all by default.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub families: Vec<Family>,
}

/// A family of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// On control messages.
    Message,
    /// On processes.
    Process,
    /// On system calls.
    Call,
    /// On disks.
    Disk,
    /// Death of a broker.
    Broker,
    /// Death of a host.
    Host,
}

/// The JSON schema of a scenario.
#[must_use]
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(Scenario).to_value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_schema_is_current() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../docs/fault-scenario.schema.json"
        );
        let current = serde_json::to_string_pretty(&json_schema()).unwrap() + "\n";
        if std::env::var_os("BULKHEAD_UPDATE_SCHEMA").is_some() {
            std::fs::write(path, &current).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(
            committed, current,
            "run with BULKHEAD_UPDATE_SCHEMA=1 to write docs/fault-scenario.schema.json"
        );
    }
}
