//! Reading the kernel and initrd files: positioned, exact, straight into guest memory.
//!
//! `pread` only: the open file description may be shared with other processes, so its offset is
//! never used. A file that shrinks while it is read gives an error, as nothing is mapped.
#![allow(
    unsafe_code,
    reason = "pread into guest memory needs the raw pointer of a volatile slice"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::error::BootError;
use super::recognise;

/// A regular file of known length.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    file: &'a File,
    what: &'static str,
    length: u64,
}

impl<'a> Source<'a> {
    /// Takes the length of `file`; `what` names it in errors. Only regular files have one.
    pub(super) fn new(file: &'a File, what: &'static str) -> Result<Self, BootError> {
        let metadata = file.metadata().map_err(|source| BootError::Read {
            what,
            offset: 0,
            source,
        })?;
        if let Some(recognised) = recognise::special(metadata.file_type()) {
            return Err(BootError::NotAFile { what, recognised });
        }
        Ok(Self {
            file,
            what,
            length: metadata.len(),
        })
    }

    /// The length of the file in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Reads at most `bytes.len()` bytes from `offset`; fewer only at the end of the file.
    pub(super) fn read_up_to(&self, offset: u64, bytes: &mut [u8]) -> Result<usize, BootError> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            match self.file.read_at(rest, at) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.read_error(at, source)),
            }
        }
        Ok(done)
    }

    /// Reads exactly `count` bytes from `offset`; `field` names them when they are not there.
    ///
    /// The caller bounds `count`; it is checked against the length of the file before anything is
    /// allocated.
    pub(super) fn read_exact(
        &self,
        field: &'static str,
        offset: u64,
        count: usize,
    ) -> Result<Vec<u8>, BootError> {
        self.check(field, offset, count as u64)?;
        let mut bytes = vec![0; count];
        let read = self.read_up_to(offset, &mut bytes)?;
        if read < count {
            Err(self.truncated(field, offset, count as u64))
        } else {
            Ok(bytes)
        }
    }

    /// Copies `count` bytes from `offset` of the file to guest address `address`, which the caller
    /// has checked to be memory.
    pub(super) fn read_into_guest(
        &self,
        field: &'static str,
        offset: u64,
        memory: &GuestMemoryMmap,
        address: u64,
        count: u64,
    ) -> Result<(), BootError> {
        self.check(field, offset, count)?;
        let length = usize::try_from(count).map_err(|_| self.truncated(field, offset, count))?;
        let mut at = offset;
        for slice in memory.get_slices(GuestAddress(address), length) {
            let slice = slice.map_err(|error| {
                self.read_error(at, io::Error::other(format!("guest memory: {error}")))
            })?;
            let mut done = 0;
            while done < slice.len() {
                let rest = slice
                    .offset(done)
                    .map_err(|error| self.read_error(at, io::Error::other(error)))?;
                match pread(self.file, &rest, at) {
                    Ok(0) => return Err(self.truncated(field, offset, count)),
                    Ok(read) => {
                        done += read;
                        at = at.saturating_add(read as u64);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(source) => return Err(self.read_error(at, source)),
                }
            }
        }
        Ok(())
    }

    /// Fails unless `count` bytes from `offset` lie within the file.
    pub(super) fn check(
        &self,
        field: &'static str,
        offset: u64,
        count: u64,
    ) -> Result<(), BootError> {
        match offset.checked_add(count) {
            Some(end) if end <= self.length => Ok(()),
            _ => Err(self.truncated(field, offset, count)),
        }
    }

    fn truncated(&self, field: &'static str, offset: u64, bytes: u64) -> BootError {
        BootError::Truncated {
            what: self.what,
            field,
            offset,
            bytes,
            length: self.length,
        }
    }

    fn read_error(&self, offset: u64, source: io::Error) -> BootError {
        BootError::Read {
            what: self.what,
            offset,
            source,
        }
    }
}

/// One `pread` to the start of `slice`.
fn pread(file: &File, slice: &VolatileSlice<'_>, offset: u64) -> io::Result<usize> {
    let offset = i64::try_from(offset)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "offset beyond 2^63"))?;
    let guard = slice.ptr_guard_mut();
    // SAFETY: the guard keeps `slice.len()` writable bytes of guest memory mapped at this pointer,
    // and guest memory may be written by anybody at any time, so no reference is invalidated.
    let read = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), slice.len(), offset) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}
