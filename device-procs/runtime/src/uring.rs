//! An io_uring that can do nothing but what the policy grants.
//!
//! A ring made before lock bypasses seccomp, so it is made disabled, given its files, restricted to
//! the granted operations on those files, and only then enabled; after that nothing can be registered
//! any more. There is no kernel thread that polls it.
//!
//! The operations are safe to call: they name a registered file by its place and window memory by a
//! [`Span`], and the ring keeps the window mapped for as long as it exists.
#![allow(
    unsafe_code,
    reason = "submission entries carry raw addresses; this module makes them only of window spans"
)]

use crate::birth::Stillbirth;
use crate::queues::{Span, WindowMemory};
use bulkhead_ipc::protocol::birth::UringGrant;
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vm_memory::MmapRegion;

/// Most operations in progress.
pub const ENTRIES_MAX: u32 = 1024;

/// Most zero bytes that one operation writes.
pub const ZEROES_BYTES: u32 = 64 * 1024;

/// A registered file, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedFile(pub u32);

/// One operation that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// The token it was submitted with.
    pub token: u64,
    /// What the system call of the same name would return, or its errno.
    pub result: Result<u32, Errno>,
}

/// The ring.
pub struct Uring {
    ring: IoUring,
    memory: WindowMemory,
    /// Never touched by this process, so that it costs no memory.
    zeroes: MmapRegion,
    _files: Vec<OwnedFd>,
    unsubmitted: u32,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Uring");
        shown.field("unsubmitted", &self.unsubmitted);
        shown.finish_non_exhaustive()
    }
}

impl Uring {
    /// Makes a ring for `entries` operations in progress on `files`, restricted to `grant`.
    ///
    /// # Errors
    /// [`Stillbirth::Setup`] when the kernel refuses; io_uring may be switched off on the host.
    pub fn new(
        grant: &UringGrant,
        entries: u32,
        files: Vec<OwnedFd>,
        memory: WindowMemory,
    ) -> Result<Self, Stillbirth> {
        let entries = entries.clamp(1, ENTRIES_MAX).next_power_of_two();
        let failed = |what: &str, e: std::io::Error| {
            Stillbirth::setup(format_args!("io_uring, {what}: {e}"))
        };
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_submit_all()
            .build(entries)
            .map_err(|e| failed("setup (see the sysctl kernel.io_uring_disabled)", e))?;
        let raw: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let submitter = ring.submitter();
        submitter
            .register_files(&raw)
            .map_err(|e| failed("files", e))?;
        let mut limits: Vec<Restriction> = grant
            .opcodes
            .iter()
            .map(|&op| Restriction::sqe_op(op))
            .collect();
        limits.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
        submitter
            .register_restrictions(&mut limits)
            .map_err(|e| failed("restrictions", e))?;
        submitter
            .register_enable_rings()
            .map_err(|e| failed("enabling", e))?;
        Ok(Self {
            ring,
            memory,
            zeroes: MmapRegion::new(ZEROES_BYTES as usize).map_err(Stillbirth::setup)?,
            _files: files,
            unsubmitted: 0,
        })
    }

    /// Reads file bytes into the window. Returns whether there was room for the operation.
    pub fn read(&mut self, file: FixedFile, at: u64, to: Span, token: u64) -> bool {
        let guard = self.memory.slice(to).ptr_guard_mut();
        let entry = opcode::Read::new(types::Fixed(file.0), guard.as_ptr(), to.len())
            .offset(at)
            .build();
        self.push(entry, token)
    }

    /// Writes window bytes to a file. Returns whether there was room for the operation.
    pub fn write(&mut self, file: FixedFile, at: u64, from: Span, token: u64) -> bool {
        let guard = self.memory.slice(from).ptr_guard();
        let entry = opcode::Write::new(types::Fixed(file.0), guard.as_ptr(), from.len())
            .offset(at)
            .build();
        self.push(entry, token)
    }

    /// Writes `bytes` zero bytes, at most [`ZEROES_BYTES`], to a file.
    pub fn write_zeroes(&mut self, file: FixedFile, at: u64, bytes: u32, token: u64) -> bool {
        let bytes = bytes.min(ZEROES_BYTES);
        let entry = opcode::Write::new(types::Fixed(file.0), self.zeroes.as_ptr(), bytes)
            .offset(at)
            .build();
        self.push(entry, token)
    }

    /// Makes what has been written survive a power failure (fdatasync).
    pub fn sync_data(&mut self, file: FixedFile, token: u64) -> bool {
        let entry = opcode::Fsync::new(types::Fixed(file.0))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        self.push(entry, token)
    }

    /// Changes the allocation of a range of a file (`mode` as for fallocate).
    pub fn allocate(
        &mut self,
        file: FixedFile,
        mode: i32,
        at: u64,
        bytes: u64,
        token: u64,
    ) -> bool {
        let entry = opcode::Fallocate::new(types::Fixed(file.0), bytes)
            .offset(at)
            .mode(mode)
            .build();
        self.push(entry, token)
    }

    fn push(&mut self, entry: Entry, token: u64) -> bool {
        let entry = entry.user_data(token);
        // SAFETY: addresses in entries are those of window spans, which stay mapped as long as the
        // ring and are only ever accessed as volatile, or of the ring's own zeroes, which the
        // kernel only reads.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.unsubmitted += u32::from(pushed);
        pushed
    }

    /// Hands what was prepared to the kernel: one system call, none when there is nothing.
    ///
    /// # Errors
    /// The kernel's errno; what was not taken stays prepared.
    pub fn submit(&mut self) -> Result<(), Errno> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(taken) => {
                    let taken = u32::try_from(taken).unwrap_or(u32::MAX);
                    self.unsubmitted = self.unsubmitted.saturating_sub(taken);
                    if taken == 0 {
                        return Ok(());
                    }
                }
                Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                    Errno::EINTR => {}
                    // Completions must be taken, or memory freed, before more is accepted.
                    Errno::EAGAIN | Errno::EBUSY => return Ok(()),
                    errno => return Err(errno),
                },
            }
        }
        Ok(())
    }

    /// Operations that the kernel has not accepted yet.
    #[must_use]
    pub const fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    /// Takes the next operation that is done.
    pub fn done(&mut self) -> Option<Done> {
        let entry = self.ring.completion().next()?;
        let result = entry.result();
        Some(Done {
            token: entry.user_data(),
            result: u32::try_from(result).map_err(|_| Errno::from_raw(result.saturating_neg())),
        })
    }

    /// How often [`Uring::done`] would return something.
    #[must_use]
    pub fn count_done(&self) -> usize {
        // SAFETY: only the owner of the ring calls this, in one thread, and the view is dropped
        // before any other is made.
        let view = unsafe { self.ring.completion_shared() };
        view.len()
    }
}

impl AsFd for Uring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor stays open for as long as the ring is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}
