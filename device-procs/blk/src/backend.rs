//! The disk: where its bytes are, and the operations on its files through the ring.
//!
//! ```text
//!   step ── Image::locate ──┬─ in a file, and nothing but that is to change ── the ring
//!                           ├─ nowhere, or compressed: read here
//!                           └─ written for the first time: room is made and filled here,
//!                              and the disk has changed when [`Disk::commit`] has said so
//! ```

use crate::request::{Geometry, SECTOR_BYTES};
use bulkhead_image::{Allocated, Image, ImageFormat, Place, Use, granted};
use bulkhead_ipc::protocol::birth::{ImageLayer, UringGrant};
use bulkhead_runtime::device::Setup;
use bulkhead_runtime::uring::{Done, FixedFile, Uring, ZEROES_BYTES};
use bulkhead_runtime::{Queues, Span, Stillbirth};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use std::fs::File;
use std::os::fd::OwnedFd;

/// Token of the synchronisation that [`Disk::commit`] waits for; no job has it.
pub(crate) const TOKEN_COMMIT: u64 = u64::MAX;
/// Bytes that are decoded at once.
const DECODED_BYTES: u32 = 64 * 1024;
static ZEROES: [u8; 16 * 1024] = [0; 16 * 1024];

/// What is to be done next for a job.
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
    /// Synchronise the file that is number `.0` among those that are written.
    Sync(usize),
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
        !matches!(self, Self::Read { .. } | Self::Sync(_))
    }

    /// The operation of the ring that does it, as policies name it.
    pub(crate) const fn operation(self) -> &'static str {
        match self {
            Self::Read { .. } => "READ",
            Self::Write { .. } | Self::WriteZeroes { .. } => "WRITE",
            Self::Sync(_) => "FSYNC",
            Self::Punch { .. } | Self::Zero { .. } => "FALLOCATE",
        }
    }
}

/// How a step ended: for how many of its bytes it was done, where that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Bytes that are done, or the errno.
    pub(crate) result: Result<u64, Errno>,
}

/// What becomes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The ring has it, for this many bytes.
    InRing(u64),
    /// It has ended.
    Ended(Ended),
    /// It would change the image while that is being committed; try it after that.
    Held,
}

/// How far a change of the image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// There is none.
    None,
    /// Tables are changed in memory. With `copied`, data of a layer below were copied.
    Made { copied: bool },
    /// The copied data are being made durable.
    Syncing,
    /// They are.
    Synced,
}

/// What [`Disk::commit`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Commit {
    /// Every change of the image is the kernel's.
    Done,
    /// The ring has to do something first.
    Waits,
    /// It did not work.
    Failed(Errno),
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Disk {
    ring: Uring,
    image: Image,
    /// The files again that are in memory, by their number. There the ring would hand reads and writes to
    /// a kernel thread, although they cannot block: a plain system call takes a tenth of the time.
    in_memory: Vec<Option<OwnedFd>>,
    /// The files again, by their number, for writing into room that was just made. Empty for images
    /// whose bytes all have their place.
    files: Vec<File>,
    /// Numbers of the files that are written.
    written: Vec<u32>,
    change: Change,
    /// Why copied data could not be made durable, until somebody has been told.
    sync_failed: Option<Errno>,
}

impl Disk {
    /// Takes over a disk of at least `bytes_min` bytes, with room for `jobs` operations in progress.
    pub(crate) fn open(
        layers: &[ImageLayer],
        how: Use,
        bytes_min: u64,
        jobs: u32,
        setup: &mut Setup<'_>,
        token: u8,
    ) -> Result<Self, Stillbirth> {
        let chain = granted(layers, |role, index| setup.grants.take(role, index))?;
        let (mut files, mut written) = (Vec::new(), Vec::new());
        for (depth, layer) in chain.iter().enumerate() {
            for (place, source) in layer.files.iter().enumerate() {
                files.push(source.file.try_clone().map_err(Stillbirth::setup)?);
                // The descriptor of a VMDK image is never written, and what is scratch need not last.
                let is_data = place > 0 || layer.format != ImageFormat::Vmdk;
                if depth == 0 && is_data && how == Use::Write {
                    written.push(source.number);
                }
            }
        }
        let mut image = Image::open(chain, how).map_err(Stillbirth::setup)?;
        if how == Use::Write {
            image.grow(bytes_min).map_err(Stillbirth::setup)?;
        }
        if let Some(bytes) = image.file_bytes_max() {
            // A raw image ends where it ends. How far this one may grow, only its header tells.
            setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)
                .map_err(|e| Stillbirth::setup(format_args!("limit of the image's size: {e}")))?;
        }
        let mut in_memory = Vec::new();
        for file in &files {
            let file_system = fstatfs(file)
                .map_err(|e| Stillbirth::setup(format_args!("file system of the disk: {e}")))?;
            let in_memory_file = (file_system.filesystem_type() == TMPFS_MAGIC)
                .then(|| file.try_clone().map_err(Stillbirth::setup))
                .transpose()?;
            in_memory.push(in_memory_file.map(OwnedFd::from));
        }
        let grant: &UringGrant = setup.uring;
        let mut again = Vec::new();
        if image.files_may_end_early() && how != Use::Read {
            for file in &files {
                again.push(file.try_clone().map_err(Stillbirth::setup)?);
            }
        }
        let registered = files.into_iter().map(OwnedFd::from).collect();
        let ring = Uring::new(grant, jobs, registered, setup.memory.clone())?;
        setup.watch(&ring, token)?;
        Ok(Self {
            ring,
            image,
            in_memory,
            files: again,
            written,
            change: Change::None,
            sync_failed: None,
        })
    }

    /// Size in sectors; what does not fill one is not shown.
    pub(crate) fn sectors(&self) -> u64 {
        self.image.bytes() / SECTOR_BYTES
    }

    /// Files that a flush synchronises.
    pub(crate) const fn files_written(&self) -> usize {
        self.written.len()
    }

    /// Begins a step for job `token`. The ring has room for one step of each job.
    pub(crate) fn begin(&mut self, step: Step, token: u64, queues: &Queues) -> Begun {
        match self.try_begin(step, token, queues) {
            Ok(begun) => begun,
            Err(errno) => ended(Err(errno)),
        }
    }

    fn try_begin(&mut self, step: Step, token: u64, queues: &Queues) -> Result<Begun, Errno> {
        match step {
            Step::Read { at, to } => {
                let (place, bytes) = self.image.locate(at, to.len().into())?;
                let to = part(to, bytes);
                match place {
                    Place::File { number, at, .. } => Ok(self.read(number, at, to, token, queues)),
                    Place::Zeroes => Ok(ended(Ok(fill(to, queues)))),
                    Place::Encoded => self.decode(at, to, queues),
                }
            }
            Step::Write { at, from } => {
                let (place, bytes) = self.image.locate(at, from.len().into())?;
                match place {
                    Place::File {
                        number,
                        at,
                        writable: true,
                    } => Ok(self.write(number, at, part(from, bytes), token, queues)),
                    _ if self.is_committing() => Ok(Begun::Held),
                    _ => self.write_anew(at, from, queues),
                }
            }
            Step::Sync(n) => match self.written.get(n) {
                // Memory has nothing to synchronise with.
                Some(&number) if self.memory(number).is_none() => {
                    let ring = &mut self.ring;
                    Ok(in_ring(ring.sync_data(FixedFile(number), token), 0))
                }
                _ => Ok(ended(Ok(0))),
            },
            Step::Punch { at, bytes }
            | Step::Zero { at, bytes }
            | Step::WriteZeroes { at, bytes } => {
                let (place, has) = self.image.locate(at, bytes)?;
                match place {
                    Place::File {
                        number,
                        at,
                        writable: true,
                    } => Ok(self.clear(step, number, at, has, token)),
                    Place::Zeroes => Ok(ended(Ok(has))),
                    _ if self.is_committing() => Ok(Begun::Held),
                    _ => {
                        let Allocated { bytes, copied } = self.image.zero(at, has)?;
                        self.changed(copied);
                        Ok(ended(Ok(bytes)))
                    }
                }
            }
        }
    }

    fn memory(&self, number: u32) -> Option<&OwnedFd> {
        self.in_memory.get(number as usize).and_then(Option::as_ref)
    }

    fn read(&mut self, number: u32, at: u64, to: Span, token: u64, queues: &Queues) -> Begun {
        if let Some(file) = self.memory(number) {
            let result = queues.read_file(file, at, to);
            return self.read_ended(result, to, queues);
        }
        let ring = &mut self.ring;
        in_ring(ring.read(FixedFile(number), at, to, token), to.len().into())
    }

    fn write(&mut self, number: u32, at: u64, from: Span, token: u64, queues: &Queues) -> Begun {
        if let Some(file) = self.memory(number) {
            return ended(queues.write_file(file, at, from).map(u64::from));
        }
        let ring = &mut self.ring;
        in_ring(
            ring.write(FixedFile(number), at, from, token),
            from.len().into(),
        )
    }

    /// Where a file of an image ends before the image's data do, they are zeroes.
    fn read_ended(&self, result: Result<u32, Errno>, to: Span, queues: &Queues) -> Begun {
        ended(match result {
            Ok(0) if self.image.files_may_end_early() => Ok(fill(to, queues)),
            result => result.map(u64::from),
        })
    }

    /// What a read of the ring for `to` has come to.
    pub(crate) fn after_read(
        &self,
        result: Result<u32, Errno>,
        to: Span,
        queues: &Queues,
    ) -> Ended {
        match self.read_ended(result, to, queues) {
            Begun::Ended(ended) => ended,
            _ => Ended { result: Ok(0) },
        }
    }

    fn decode(&self, at: u64, to: Span, queues: &Queues) -> Result<Begun, Errno> {
        let to = to.part(0, DECODED_BYTES);
        let mut bytes = vec![0; to.len() as usize];
        self.image.read(at, &mut bytes)?;
        queues.write(to, &bytes);
        Ok(ended(Ok(to.len().into())))
    }

    /// Writes what has no place in this layer yet.
    fn write_anew(&mut self, at: u64, from: Span, queues: &Queues) -> Result<Begun, Errno> {
        let files = &self.files;
        let write = |number: u32, at: u64, bytes: u64| {
            let file = files.get(number as usize).ok_or(Errno::EBADF)?;
            let (mut at, mut rest) = (at, part(from, bytes));
            while !rest.is_empty() {
                match queues.write_file(file, at, rest) {
                    Ok(0) => return Err(Errno::EIO),
                    Ok(n) => {
                        at += u64::from(n);
                        rest = rest.part(n, u32::MAX);
                    }
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            Ok(())
        };
        let Allocated { bytes, copied } = self.image.allocate(at, from.len().into(), write)?;
        self.changed(copied);
        Ok(ended(Ok(bytes)))
    }

    fn clear(&mut self, step: Step, number: u32, at: u64, bytes: u64, token: u64) -> Begun {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (ring, file) = (&mut self.ring, FixedFile(number));
        match step {
            Step::Punch { .. } => {
                in_ring(ring.allocate(file, hole.bits(), at, bytes, token), bytes)
            }
            Step::Zero { .. } => in_ring(ring.allocate(file, zero.bits(), at, bytes, token), bytes),
            _ => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(ZEROES_BYTES);
                in_ring(ring.write_zeroes(file, at, bytes, token), bytes.into())
            }
        }
    }

    const fn changed(&mut self, copied: bool) {
        let before = matches!(self.change, Change::Made { copied: true });
        self.change = Change::Made {
            copied: copied || before,
        };
    }

    /// Whether what was written is the disk's only when [`Disk::commit`] says so.
    pub(crate) fn is_changed(&self) -> bool {
        self.change != Change::None
    }

    fn is_committing(&self) -> bool {
        matches!(self.change, Change::Syncing | Change::Synced)
    }

    /// Gives changes of the image to the kernel. Where data of a layer below were copied, the copies are
    /// made durable before: a power failure must not leave the image with their place alone.
    pub(crate) fn commit(&mut self) -> Commit {
        match self.change {
            Change::None => return Commit::Done,
            Change::Syncing => return Commit::Waits,
            Change::Made { copied: true } => {
                let first = self.written.first().copied().unwrap_or(0);
                if self.memory(first).is_none() {
                    if self.ring.sync_data(FixedFile(first), TOKEN_COMMIT) {
                        self.change = Change::Syncing;
                    }
                    return Commit::Waits;
                }
            }
            Change::Made { copied: false } | Change::Synced => {}
        }
        match self.image.commit() {
            Ok(()) => {
                self.change = Change::None;
                self.sync_failed.take().map_or(Commit::Done, Commit::Failed)
            }
            Err(errno) => Commit::Failed(errno),
        }
    }

    /// The synchronisation of [`TOKEN_COMMIT`] has ended.
    pub(crate) fn synced(&mut self, result: Result<u32, Errno>) {
        self.change = match result {
            Ok(_) => Change::Synced,
            Err(Errno::EINTR | Errno::EAGAIN) => Change::Made { copied: true },
            Err(errno) => {
                // Another try would only seem to succeed.
                self.sync_failed = Some(errno);
                Change::Synced
            }
        };
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

const fn ended(result: Result<u64, Errno>) -> Begun {
    Begun::Ended(Ended { result })
}

fn in_ring(prepared: bool, bytes: u64) -> Begun {
    assert!(prepared, "the ring has an entry for each job");
    Begun::InRing(bytes)
}

fn part(span: Span, bytes: u64) -> Span {
    span.part(0, u32::try_from(bytes).unwrap_or(u32::MAX))
}

fn fill(to: Span, queues: &Queues) -> u64 {
    let mut rest = to;
    while !rest.is_empty() {
        let n = queues.write(rest, &ZEROES);
        rest = rest.part(u32::try_from(n).unwrap_or(u32::MAX), u32::MAX);
    }
    to.len().into()
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
