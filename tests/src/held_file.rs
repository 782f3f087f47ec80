//! A disk image on a file system that takes its time: one write is held until the test lets it go, and a
//! log is kept of who did what to the image, in order.

use bulkhead_faults::disk::{DiskAction, DiskOp, DiskRule, DiskRules, FaultyDisk, SECTOR_BYTES};
use std::path::PathBuf;
use std::time::Duration;

/// How long the test waits for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Something that was done to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Which opening of the file: each generation of a disk's process has its own.
    pub handle: u64,
    /// Whether the image was changed; it was read otherwise.
    pub write: bool,
    /// Where.
    pub offset: u64,
}

/// The image. Dropping it lets everything go and takes the file system away.
#[derive(Debug)]
pub struct HeldFile(FaultyDisk);

impl HeldFile {
    /// An image of `bytes` zero bytes, which holds the first write to the sector at `offset`.
    ///
    /// # Panics
    /// When the file system cannot be mounted.
    #[must_use]
    pub fn new(bytes: usize, offset: u64) -> Self {
        let sector = offset / SECTOR_BYTES;
        let hold = DiskRule {
            sectors: Some(sector..sector + 1),
            ..DiskRule::next(DiskOp::Write, DiskAction::Hang)
        };
        let rules = DiskRules::new().with(hold).expect("a write may hang");
        let disk = FaultyDisk::mount(bytes as u64, rules, |_| {}).expect("FUSE, for root");
        disk.keep_log();
        Self(disk)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.0.path()
    }

    /// Waits until the write is held.
    ///
    /// # Panics
    /// When that does not come within a minute.
    pub fn until_held(&self) {
        assert!(self.0.until_hung(PATIENCE), "nobody writes there");
    }

    /// Lets the write go.
    pub fn let_go(&self) {
        self.0.heal();
        self.0.let_go();
    }

    /// What was done to the image so far, in order. A write that is held is not there yet.
    #[must_use]
    pub fn log(&self) -> Vec<Access> {
        let log = self.0.log().into_iter();
        let log = log.filter(|access| access.op != DiskOp::Flush);
        log.map(|access| Access {
            handle: access.handle,
            write: access.op == DiskOp::Write,
            offset: access.offset,
        })
        .collect()
    }

    /// The image as it is now.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        self.0.image()
    }
}
