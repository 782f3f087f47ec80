//! The host's entropy source: `/dev/urandom`, opened by the broker.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use vm_memory::{ReadVolatile, VolatileSlice};

/// The source.
#[derive(Debug)]
pub(crate) struct Entropy {
    file: File,
}

impl From<OwnedFd> for Entropy {
    fn from(fd: OwnedFd) -> Self {
        Self { file: fd.into() }
    }
}

impl Entropy {
    /// Fills `buffer`, straight from the kernel, and returns how many bytes it got: less than its
    /// length only when the source fails, and then an error if none at all.
    pub(crate) fn fill(&mut self, buffer: &VolatileSlice<'_>) -> io::Result<u32> {
        let mut filled = 0;
        while filled < buffer.len() {
            let mut rest = buffer.offset(filled).map_err(io::Error::other)?;
            match self.file.read_volatile(&mut rest) {
                Ok(n) if n > 0 => filled += n,
                Err(vm_memory::VolatileMemoryError::IOError(e))
                    if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if filled == 0 => return Err(io::Error::other(e)),
                Ok(_) if filled == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(_) => break,
            }
        }
        Ok(u32::try_from(filled).unwrap_or(u32::MAX))
    }
}
