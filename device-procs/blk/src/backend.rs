//! The disk: its size, and the operations on it through the ring.

use crate::request::{Geometry, SECTOR_BYTES};
use bulkhead_ipc::protocol::birth::UringGrant;
use bulkhead_runtime::device::Setup;
use bulkhead_runtime::uring::{Done, FixedFile, Uring, ZEROES_BYTES};
use bulkhead_runtime::{Queues, Span, Stillbirth};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;

const DISK: FixedFile = FixedFile(0);

/// What the ring is to do next for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Read {
        at: u64,
        to: Span,
    },
    Write {
        at: u64,
        from: Span,
    },
    Sync,
    /// Deallocate; the range reads as zeroes afterwards.
    Punch {
        at: u64,
        bytes: u64,
    },
    /// Zero and keep allocated.
    Zero {
        at: u64,
        bytes: u64,
    },
    /// The same by writing, where the file system cannot.
    WriteZeroes {
        at: u64,
        bytes: u64,
    },
}

impl Step {
    /// Whether it may be done again when the file system had no room for it. A failed synchronisation has
    /// lost what it was for, and would only seem to succeed.
    pub(crate) const fn takes_room(self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Sync)
    }

    /// The operation of the ring that does it, as policies name it.
    pub(crate) const fn operation(self) -> &'static str {
        match self {
            Self::Read { .. } => "READ",
            Self::Write { .. } | Self::WriteZeroes { .. } => "WRITE",
            Self::Sync => "FSYNC",
            Self::Punch { .. } | Self::Zero { .. } => "FALLOCATE",
        }
    }
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Disk {
    ring: Uring,
    /// The disk again, when it is a file in memory. There the ring would hand reads and writes to
    /// a kernel thread, although they cannot block: a plain system call takes a tenth of the time.
    in_memory: Option<OwnedFd>,
}

impl Disk {
    /// Takes over a disk, with room for `jobs` operations in progress.
    pub(crate) fn open(
        disk: OwnedFd,
        jobs: u32,
        setup: &Setup<'_>,
        token: u8,
    ) -> Result<(Self, u64), Stillbirth> {
        let mut file = File::from(disk);
        // The end of a block device is its size, too.
        let bytes = file
            .seek(SeekFrom::End(0))
            .map_err(|e| Stillbirth::setup(format_args!("size of the disk: {e}")))?;
        let file_system = fstatfs(&file)
            .map_err(|e| Stillbirth::setup(format_args!("file system of the disk: {e}")))?;
        let in_memory = (file_system.filesystem_type() == TMPFS_MAGIC)
            .then(|| file.try_clone().map_err(Stillbirth::setup))
            .transpose()?
            .map(OwnedFd::from);
        let grant: &UringGrant = setup.uring;
        let ring = Uring::new(grant, jobs, vec![file.into()], setup.memory.clone())?;
        setup.watch(&ring, token)?;
        Ok((Self { ring, in_memory }, bytes / SECTOR_BYTES))
    }

    /// Does a step that cannot block, if it is one.
    pub(crate) fn at_once(&self, step: Step, queues: &Queues) -> Option<Result<u32, Errno>> {
        let file = self.in_memory.as_ref()?;
        match step {
            Step::Read { at, to } => Some(queues.read_file(file, at, to)),
            Step::Write { at, from } => Some(queues.write_file(file, at, from)),
            // Memory has nothing to synchronise with.
            Step::Sync => Some(Ok(0)),
            Step::Punch { .. } | Step::Zero { .. } | Step::WriteZeroes { .. } => None,
        }
    }

    /// Prepares a step for job `token`. The ring has room for one step of each job.
    pub(crate) fn prepare(&mut self, step: Step, token: u64) {
        let ring = &mut self.ring;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let prepared = match step {
            Step::Read { at, to } => ring.read(DISK, at, to, token),
            Step::Write { at, from } => ring.write(DISK, at, from, token),
            Step::Sync => ring.sync_data(DISK, token),
            Step::Punch { at, bytes } => ring.allocate(DISK, hole.bits(), at, bytes, token),
            Step::Zero { at, bytes } => ring.allocate(DISK, zero.bits(), at, bytes, token),
            Step::WriteZeroes { at, bytes } => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(ZEROES_BYTES);
                ring.write_zeroes(DISK, at, bytes, token)
            }
        };
        assert!(prepared, "the ring has an entry for each job");
    }

    /// Hands prepared steps to the kernel.
    pub(crate) fn submit(&mut self) -> Result<(), Errno> {
        self.ring.submit()
    }

    /// Whether steps wait for being handed over.
    pub(crate) const fn has_unsubmitted(&self) -> bool {
        self.ring.unsubmitted() > 0
    }

    /// The next step that is done.
    pub(crate) fn done(&mut self) -> Option<Done> {
        self.ring.done()
    }

    /// Steps that are done and have not been taken.
    pub(crate) fn count_done(&self) -> usize {
        self.ring.count_done()
    }
}

/// What the disk is to its requests: limits from the configuration image that the guest sees.
pub(crate) fn geometry(sectors: u64, read_only: bool, features: u64, config: &[u8]) -> Geometry {
    let limit = |feature: u64, at: usize| {
        let bytes = config.get(at..at + 4).and_then(|b| b.try_into().ok());
        let in_image = u32::from_le_bytes(bytes.unwrap_or_default());
        if features & feature == 0 { 0 } else { in_image }
    };
    Geometry {
        sectors,
        read_only,
        discard_sectors_max: limit(crate::device::F_DISCARD, 36),
        zeroes_sectors_max: limit(crate::device::F_WRITE_ZEROES, 48),
    }
}
