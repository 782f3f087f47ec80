//! Names of processes. An identity carries a generation, so that nothing of a dead process is
//! mistaken for its successor's.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The kinds of sandboxed process. One policy file each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProcKind {
    /// All vCPUs of a VM, its guest memory and its DMA gates.
    Vcpu,
    /// Serial port, real-time clock, keyboard controller, debug console.
    Legacy,
    /// One virtio console.
    Console,
    /// One virtio block device.
    Blk,
    /// One virtio entropy source.
    Rng,
    /// One virtio socket device.
    Vsock,
    /// One shared folder.
    Fs,
    /// One virtio network device.
    Net,
    /// One piece of work on disk images. It belongs to no VM.
    Image,
    /// The switch of one virtual network. It belongs to no VM.
    Switch,
}

impl ProcKind {
    /// Every kind, in the order in which tables show them.
    pub const ALL: [Self; 10] = [
        Self::Vcpu,
        Self::Legacy,
        Self::Console,
        Self::Blk,
        Self::Rng,
        Self::Net,
        Self::Vsock,
        Self::Fs,
        Self::Image,
        Self::Switch,
    ];

    /// The kinds that every virtual machine with a disk has a process of.
    pub const OF_EVERY_MACHINE: [Self; 5] = [
        Self::Vcpu,
        Self::Legacy,
        Self::Console,
        Self::Blk,
        Self::Rng,
    ];

    /// The kinds that a virtual machine may consist of: all but [`Self::Image`] and [`Self::Switch`].
    pub const OF_MACHINES: [Self; 8] = [
        Self::Vcpu,
        Self::Legacy,
        Self::Console,
        Self::Blk,
        Self::Rng,
        Self::Net,
        Self::Vsock,
        Self::Fs,
    ];

    /// The name used in policies, file names and messages, such as `blk`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Legacy => "legacy",
            Self::Console => "console",
            Self::Blk => "blk",
            Self::Rng => "rng",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Net => "net",
            Self::Image => "image",
            Self::Switch => "switch",
        }
    }
}

impl fmt::Display for ProcKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One process of one VM: `blk0.3` is the third start of the first disk's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcId {
    /// What the process does.
    pub kind: ProcKind,
    /// Number among the processes of its kind in the VM, from 0.
    pub index: u16,
    /// Counts the starts of this process, from 1.
    pub generation: u32,
}

impl fmt::Display for ProcId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}.{}", self.kind, self.index, self.generation)
    }
}
