//! The faulty disk: a machine's disk image in a FUSE file that the harness serves.
//!
//! [`model`] knows what the disk holds and what a power cut leaves of it, [`rules`] which operation meets
//! which fault, [`served`] brings both together and keeps what waits, and [`fuse`] is the file system. No
//! operation waits in a thread that others need: what is delayed or hangs is put aside, and one thread answers
//! it when its time has come. Whatever waits is answered when the disk is dropped, so that no process and no
//! unmount hangs on a harness that is gone.

mod fuse;
mod model;
mod rules;
mod served;

pub use model::{CACHE_BYTES_MAX, Cut, Model, OffDisk, SECTOR_BYTES};
pub use rules::{DiskAction, DiskOp, DiskRule, DiskRules};

use served::Served;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Its name, in a directory of its own.
const NAME: &str = "disk.img";

/// Why there is no such disk, or no such fault.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file system cannot be mounted.
    #[error("cannot mount the faulty disk: {0}")]
    Mount(io::Error),
    /// The fault is none of this operation.
    #[error("{0:?} cannot have the fault {1:?}")]
    Senseless(DiskOp, DiskAction),
    /// A rule that no operation ever meets.
    #[error(
        "a disk rule is about nothing: `nth` and `times` count from 1, and sectors are not empty"
    )]
    Never,
}

/// A fault that an operation has met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskEvent {
    /// When, since the disk was mounted.
    pub at: Duration,
    /// What was done.
    pub op: DiskOp,
    /// Where; 0 for a flush.
    pub offset: u64,
    /// How many bytes; 0 for a flush.
    pub bytes: u64,
    /// Which opening of the file: each generation of a disk's process has its own.
    pub handle: u64,
    /// What happens to it.
    pub action: DiskAction,
}

/// Something that was done to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Which opening of the file.
    pub handle: u64,
    /// What.
    pub op: DiskOp,
    /// Where.
    pub offset: u64,
}

/// A mounted disk image with faults. Dropping it answers everything that waits, and takes it away.
pub struct FaultyDisk {
    served: Arc<Served>,
    clock: Option<JoinHandle<()>>,
    session: Option<fuser::BackgroundSession>,
    mountpoint: tempfile::TempDir,
}

impl fmt::Debug for FaultyDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyDisk")
            .field("path", &self.path())
            .finish_non_exhaustive()
    }
}

impl FaultyDisk {
    /// A disk of `bytes` zero bytes. Each fault is told before the operation that has it is answered; `tell`
    /// may be called by several threads at once, and may use the disk.
    ///
    /// # Errors
    /// When it cannot be mounted: that needs root and FUSE.
    pub fn mount(
        bytes: u64,
        rules: DiskRules,
        tell: impl Fn(DiskEvent) + Send + Sync + 'static,
    ) -> Result<Self, DiskError> {
        let bytes = usize::try_from(bytes);
        let bytes = bytes.map_err(|_| DiskError::Mount(io::ErrorKind::OutOfMemory.into()))?;
        Self::mount_image(vec![0; bytes], rules, tell)
    }

    /// As [`FaultyDisk::mount`], of a disk that holds `image`.
    ///
    /// # Errors
    /// As [`FaultyDisk::mount`].
    pub fn mount_image(
        image: Vec<u8>,
        rules: DiskRules,
        tell: impl Fn(DiskEvent) + Send + Sync + 'static,
    ) -> Result<Self, DiskError> {
        let served = Arc::new(Served::new(Model::new(image), rules, Box::new(tell)));
        let mountpoint = tempfile::Builder::new().prefix("bulkhead-disk-").tempdir();
        let mountpoint = mountpoint.map_err(DiskError::Mount)?;
        let session = fuse::mount(Arc::clone(&served), mountpoint.path());
        let mut disk = Self {
            served,
            clock: None,
            session: Some(session.map_err(DiskError::Mount)?),
            mountpoint,
        };
        let served = Arc::clone(&disk.served);
        let clock = std::thread::Builder::new().name("disk-clock".into());
        let clock = clock.spawn(move || served.answer_in_time());
        disk.clock = Some(clock.map_err(DiskError::Mount)?);
        Ok(disk)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.mountpoint.path().join(NAME)
    }

    /// One more fault that it is to have.
    ///
    /// # Errors
    /// When no operation can ever have it.
    pub fn add(&self, rule: DiskRule) -> Result<(), DiskError> {
        self.served.state().rules.add(rule)
    }

    /// No further faults. What hangs goes on hanging.
    pub fn heal(&self) {
        self.served.state().rules.clear();
    }

    /// Answers what hangs, and returns how many operations that were.
    pub fn let_go(&self) -> usize {
        self.served.let_go()
    }

    /// How many operations hang.
    #[must_use]
    pub fn hung(&self) -> usize {
        self.served.state().hung()
    }

    /// Waits until an operation hangs. Returns whether one does.
    #[must_use]
    pub fn until_hung(&self, patience: Duration) -> bool {
        self.served.until_hung(patience)
    }

    /// The host's power is cut: what was not flushed is lost but for the first bytes of torn writes, what
    /// waits fails, and whoever had the file open has nothing of it any more.
    pub fn power_cut(&self) {
        self.power_cut_as(Cut::Everything);
    }

    /// As [`FaultyDisk::power_cut`], with another choice of what survives.
    pub fn power_cut_as(&self, cut: Cut) {
        self.served.power_cut(cut);
    }

    /// What is read from it.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        self.served.state().model.content().to_vec()
    }

    /// What has been flushed.
    #[must_use]
    pub fn flushed_image(&self) -> Vec<u8> {
        self.served.state().model.medium().to_vec()
    }

    /// Remembers what is done to it from now on.
    pub fn keep_log(&self) {
        self.served.state().log.get_or_insert_default();
    }

    /// What was done to it since [`FaultyDisk::keep_log`], in order. What waits is not there yet.
    #[must_use]
    pub fn log(&self) -> Vec<Access> {
        self.served.state().log.clone().unwrap_or_default()
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        self.served.close();
        if let Some(clock) = self.clock.take() {
            let _ended = clock.join();
        }
        // Somebody may have it open still; that gets errors, and the kernel takes it away after that.
        let place = self.mountpoint.path();
        let _gone = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
        drop(self.session.take());
    }
}

#[cfg(test)]
mod tests;
