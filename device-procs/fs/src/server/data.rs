//! Where the data of reads and writes are: they go between a file and the guest's buffers without being copied
//! here.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::wire::{InHeader, REQUEST_BYTES_MAX, WriteIn, op};
use nix::errno::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use zerocopy::FromBytes;

/// Bytes of a request whose header is at the beginning of `request` that are looked at: all of it, but of a write
/// only what stands before the data.
#[must_use]
pub fn front_bytes(request: &[u8]) -> usize {
    let header = InHeader::read_from_prefix(request);
    match header {
        Ok((header, _)) if header.opcode == op::WRITE => {
            size_of::<InHeader>() + size_of::<WriteIn>()
        }
        _ => REQUEST_BYTES_MAX,
    }
}

/// The data of one request. Whoever gave the buffers may change what is in them at any time.
pub trait Data {
    /// Bytes that the request has behind its front.
    fn given(&self) -> usize;

    /// Copies of them what fits.
    fn copy(&self, to: &mut [u8]);

    /// Writes of them once to a file, at `offset`: from byte `at` on, at most `len`. Blocks if the file does.
    ///
    /// # Errors
    /// The kernel's errno.
    fn drain(&self, file: &File, offset: u64, at: usize, len: usize) -> Result<usize, Errno>;

    /// Reads once from a file, at `offset`, to byte `at` of the answer's data on: at most `len` bytes, for which
    /// there is room. Blocks if the file does.
    ///
    /// # Errors
    /// The kernel's errno.
    fn fill(&mut self, file: &File, offset: u64, at: usize, len: usize) -> Result<usize, Errno>;
}

/// The data of the request that is being done, and how much was read.
pub(super) struct Transfer<'a> {
    pub(super) data: &'a mut dyn Data,
    pub(super) filled: usize,
}

impl Transfer<'_> {
    /// Reads from `offset` as much of `size` bytes as the file has: an error only when that is nothing.
    pub(super) fn fill(&mut self, file: &File, offset: u64, size: usize) -> Result<(), Errno> {
        self.filled = all_of(size, |done| {
            let offset = offset.checked_add(done as u64).ok_or(Errno::EINVAL)?;
            self.data.fill(file, offset, done, size - done)
        })?;
        Ok(())
    }

    /// Writes as much of `size` bytes as the host takes. Returns how much: an error only when that is nothing.
    pub(super) fn drain(&self, file: &File, offset: u64, size: usize) -> Result<usize, Errno> {
        all_of(size, |done| {
            let offset = offset.checked_add(done as u64).ok_or(Errno::EFBIG)?;
            self.data.drain(file, offset, done, size - done)
        })
    }
}

/// Goes on with `step`, which is told how much is done and returns how much it has done, until `size` is done, or
/// nothing more is.
fn all_of(
    size: usize,
    mut step: impl FnMut(usize) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut done = 0;
    while done < size {
        match step(done) {
            Ok(0) => break,
            Ok(n) => done += n.min(size - done),
            Err(Errno::EINTR) => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Data in memory of the process.
#[derive(Debug)]
pub struct Held<'a> {
    given: &'a [u8],
    /// What was read.
    pub got: Vec<u8>,
}

impl<'a> Held<'a> {
    /// Of a request that has these bytes behind its front.
    #[must_use]
    pub const fn new(given: &'a [u8]) -> Self {
        let got = Vec::new();
        Self { given, got }
    }
}

impl Data for Held<'_> {
    fn given(&self) -> usize {
        self.given.len()
    }

    fn copy(&self, to: &mut [u8]) {
        for (to, from) in to.iter_mut().zip(self.given) {
            *to = *from;
        }
    }

    fn drain(&self, file: &File, offset: u64, at: usize, len: usize) -> Result<usize, Errno> {
        let data = self.given.get(at..).unwrap_or_default();
        let data = data.get(..len).unwrap_or(data);
        file.write_at(data, offset)
            .map_err(|e| crate::folder::errno(&e))
    }

    fn fill(&mut self, file: &File, offset: u64, at: usize, len: usize) -> Result<usize, Errno> {
        self.got.resize(at + len, 0);
        let place = self.got.get_mut(at..).unwrap_or_default();
        file.read_at(place, offset)
            .map_err(|e| crate::folder::errno(&e))
    }
}
