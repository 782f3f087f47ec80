//! A granted descriptor as imago wants its storage to be.
//!
//! Plain positioned reads and writes, each at once. Nothing is opened by a name.
#![allow(
    unsafe_code,
    reason = "imago marks the operations that it wraps as unsafe to call; implementing them takes no unsafe operation"
)]

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One file of a chain.
#[derive(Debug)]
pub(crate) struct Extent {
    file: Arc<File>,
    /// [`super::Source::number`].
    pub(crate) number: u32,
    name: String,
    /// Its size: nobody else changes it while it is open for writing.
    bytes: AtomicU64,
    helper: CommonStorageHelper,
}

impl Extent {
    /// Takes a file over.
    ///
    /// # Errors
    /// The kernel's error; a block device's size is asked by seeking.
    pub(crate) fn new(source: super::Source) -> io::Result<Self> {
        let super::Source { file, number, name } = source;
        let bytes = AtomicU64::new(file.as_ref().seek(SeekFrom::End(0))?);
        Ok(Self {
            file,
            number,
            name,
            bytes,
            helper: CommonStorageHelper::default(),
        })
    }

    /// The same as if the file had no bytes: for one whose contents do not matter.
    pub(crate) fn blank(source: super::Source) -> io::Result<Self> {
        let mut extent = Self::new(source)?;
        *extent.bytes.get_mut() = 0;
        Ok(extent)
    }

    fn grew_to(&self, end: u64) {
        self.bytes.fetch_max(end, Ordering::Relaxed);
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn offset(at: u64) -> io::Result<i64> {
    i64::try_from(at).map_err(|_| Errno::EFBIG.into())
}

impl Storage for Extent {
    fn open(_options: StorageOpenOptions) -> io::Result<Self> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.load(Ordering::Relaxed))
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        // Good for messages; nothing can be opened by it.
        Ok(Path::new("/").join(relative))
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, at: u64) -> io::Result<()> {
        let mut at = at;
        for mut part in bufv.into_inner() {
            let mut part: &mut [u8] = &mut part;
            while !part.is_empty() {
                match pread(self.file.as_ref(), part, offset(at)?) {
                    Ok(0) => {
                        part.fill(0);
                        at += part.len() as u64;
                        break;
                    }
                    Ok(n) => {
                        at += n as u64;
                        part = part.get_mut(n..).unwrap_or_default();
                    }
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, at: u64) -> io::Result<()> {
        let mut at = at;
        for part in bufv.into_inner() {
            let mut part: &[u8] = &part;
            while !part.is_empty() {
                match pwrite(self.file.as_ref(), part, offset(at)?) {
                    Ok(0) => return Err(Errno::EIO.into()),
                    Ok(n) => {
                        at += n as u64;
                        self.grew_to(at);
                        part = part.get(n..).unwrap_or_default();
                    }
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Nothing: whoever has the image synchronises its files when that is asked for.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, bytes: u64, _mode: PreallocateMode) -> io::Result<()> {
        self.file.set_len(bytes)?;
        self.bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }
}
