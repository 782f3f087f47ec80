//! Broker and a process that works on disk images, after birth. It has one job, told at birth, says how
//! far it is, and ends.

use super::birth::{ImageFormat, ImageLayer};
use serde::{Deserialize, Serialize};

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageJob {
    /// Tell what the header of the first image says. Nothing else is looked at.
    Info,
    /// Make the target an image of `bytes` zero bytes, or on top of the chain that is given, with its size
    /// unless `bytes` says another.
    Create {
        /// Size of the disk.
        bytes: Option<u64>,
        /// What the image is to call its backing image.
        backing_name: Option<String>,
    },
    /// Copy what the chain shows to the target.
    Convert,
    /// Count the uses of clusters.
    Check {
        /// Put refcounts right.
        repair: bool,
    },
    /// Give the first image another size.
    Resize {
        /// In bytes.
        bytes: u64,
        /// Whether what is behind the new end may be lost.
        shrink: bool,
    },
    /// Have the first image of the chain name another backing image: that whose chain is the target chain, or
    /// none. What the disk shows stays the same.
    Rebase {
        /// What the image is to call it, and its format.
        onto: Option<(String, ImageFormat)>,
        /// Change the name alone: the contents are the same, says the user.
        name_only: bool,
    },
    /// Write what is in the first image into the one below it, and empty the first.
    Commit,
    /// Look for a kernel and its initial RAM disk in the ext4 file systems of the disk, and write the kernel to
    /// the first target and the RAM disk to the second. Both are regular files of at most
    /// [`KERNEL_BYTES_MAX`] and [`INITRD_BYTES_MAX`] bytes; the images are only read.
    BootFiles {
        /// Path of the kernel in its file system; `None` for the newest.
        kernel: Option<String>,
        /// Path of the initial RAM disk; `None` for the kernel's own, if there is one.
        initrd: Option<String>,
    },
}

/// Largest kernel that is taken out of a disk, in bytes.
pub const KERNEL_BYTES_MAX: u64 = 256 << 20;
/// Largest initial RAM disk that is taken out of a disk, in bytes.
pub const INITRD_BYTES_MAX: u64 = 1 << 30;

/// Format of an image that is read once, to be converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForeignFormat {
    /// Microsoft Virtual Hard Disk, fixed or dynamic.
    Vhd,
    /// VMDK with grain tables, compressed ones included.
    VmdkSparse,
}

/// Configuration of `bulkhead-image`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What is to be done.
    pub job: ImageJob,
    /// The chain, first image first.
    pub layers: Vec<ImageLayer>,
    /// Format of the only file of `layers`, where it is one that is only read to be converted.
    pub foreign: Option<ForeignFormat>,
    /// What is made, or for [`ImageJob::Rebase`] the new chain below.
    pub target: Vec<ImageLayer>,
}

/// Sender: the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromImage {
    /// So many of so many bytes are done.
    Progress {
        /// Done.
        done: u64,
        /// All.
        total: u64,
    },
    /// It is done.
    Done(Box<ImageReport>),
    /// It cannot be done.
    Failed {
        /// One line.
        reason: String,
    },
}

/// What is known of an image afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageReport {
    /// Size of the disk in bytes.
    pub bytes: u64,
    /// Size of a cluster in bytes.
    pub cluster_bytes: Option<u64>,
    /// Version of the format.
    pub version: Option<u32>,
    /// What the image calls its backing image.
    pub backing_name: Option<String>,
    /// The format that it says that has.
    pub backing_format: Option<String>,
    /// Names of its extents.
    pub extents: Vec<String>,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Whether somebody has marked it as corrupt.
    pub corrupt: bool,
    /// Clusters that are counted and not used; `None` when that was not looked at.
    pub leaks: Option<u64>,
    /// Clusters that are used and not counted, or used twice.
    pub corruptions: Option<u64>,
    /// Clusters in use.
    pub used: Option<u64>,
    /// Bytes that were written.
    pub written: u64,
    /// What was taken out of a disk to boot from it.
    pub boot: Option<BootReport>,
}

/// Kernel and initial RAM disk of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootReport {
    /// Where on the disk their file system is, in words.
    pub volume: String,
    /// The kernel.
    pub kernel: BootFile,
    /// The initial RAM disk, if there is one.
    pub initrd: Option<BootFile>,
}

/// A file of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFile {
    /// Its path, without symbolic links; what is not UTF-8 is replaced.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}
