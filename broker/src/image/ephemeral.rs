//! Private copies for ephemeral disks: the guest writes to a file without a name, which the kernel
//! frees with its last descriptor, however the machine ends.
//!
//! Until images can be layered this copies: by reference where the file system can (btrfs, XFS),
//! else the data without the holes, after checking that there is room.

use crate::vmfile::show_size;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{Whence, lseek64};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

/// Why there is no private copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The directory's file system has too little room.
    #[error("an ephemeral disk needs a copy of {} but only {} are free in the state directory", show_size(*.needed), show_size(*.free))]
    Room {
        /// Bytes of data in the image.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// It is neither a file nor a block device.
    #[error("expected an image file or a block device")]
    Kind,
    /// The file system's error.
    #[error("copying an ephemeral disk: {0}")]
    Io(#[from] io::Error),
}

/// Makes a private copy of `image`, open for reading and writing, in the file system of `directory`.
///
/// # Errors
/// Why there is none; nothing is left behind.
pub fn private_copy(image: &File, directory: &Path) -> Result<File, CopyError> {
    let found = image.metadata()?;
    let is_file = found.is_file();
    if !is_file && !found.file_type().is_block_device() {
        return Err(CopyError::Kind);
    }
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let copy = File::from(open(directory, flags, mode).map_err(io::Error::from)?);
    if is_file && sys::clone_file(&copy, image).is_ok() {
        return Ok(copy);
    }
    // The end of a block device is where its size is.
    let bytes = u64::try_from(lseek64(image, 0, Whence::SeekEnd).map_err(io::Error::from)?);
    let bytes = bytes.unwrap_or(0);
    let needed = if is_file {
        found.blocks().saturating_mul(512).min(bytes)
    } else {
        bytes
    };
    let room = fstatvfs(&copy).map_err(io::Error::from)?;
    let free = room.blocks_available().saturating_mul(room.fragment_size());
    if needed > free {
        return Err(CopyError::Room { needed, free });
    }
    copy.set_len(bytes)?;
    copy_data(image, &copy, bytes)?;
    Ok(copy)
}

/// Copies everything but the holes.
fn copy_data(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    let end = i64::try_from(bytes).map_err(|_| Errno::EFBIG)?;
    let mut at = 0;
    while at < end {
        let start = match lseek64(from, at, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            // A block device has no holes.
            Err(Errno::EINVAL) => at,
            found => found?,
        };
        let stop = lseek64(from, start, Whence::SeekHole).map_or(end, |hole| hole.min(end));
        copy_range(from, to, start, stop)?;
        at = stop;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: i64, stop: i64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = u64::try_from(start).unwrap_or(0);
    let stop = u64::try_from(stop).unwrap_or(0);
    while at < stop {
        let left = usize::try_from(stop - at).unwrap_or(usize::MAX);
        let part = buffer.len().min(left);
        let Some(part) = buffer.get_mut(..part) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let n = from.read_at(part, at)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(part.get(..n).unwrap_or(&[]), at)?;
        at += n as u64;
    }
    Ok(())
}

mod sys {
    #![allow(unsafe_code, reason = "the FICLONE ioctl has no safe wrapper")]
    use std::fs::File;
    use std::os::fd::AsRawFd;

    nix::ioctl_write_int_bad!(ficlone, nix::request_code_write!(0x94, 9, 4));

    /// Makes `to` share all of `from`'s data until one of them is written.
    pub(super) fn clone_file(to: &File, from: &File) -> nix::Result<i32> {
        // SAFETY: FICLONE takes a descriptor by value and touches no memory of this process.
        unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_holds_the_data_keeps_the_holes_and_leaves_the_image_alone() {
        let dir = tempfile::tempdir().unwrap();
        let image = tempfile::tempfile_in(dir.path()).unwrap();
        image.set_len(64 << 20).unwrap();
        image.write_all_at(b"begin", 0).unwrap();
        image.write_all_at(b"end", (64 << 20) - 512).unwrap();
        let copy = private_copy(&image, dir.path()).unwrap();
        assert_eq!(copy.metadata().unwrap().len(), 64 << 20);
        assert!(
            copy.metadata().unwrap().blocks() * 512 < 1 << 20,
            "not sparse"
        );
        assert_eq!(copy.metadata().unwrap().nlink(), 0, "it has a name");
        let mut buffer = [0; 5];
        copy.read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(&buffer, b"begin");
        copy.read_exact_at(&mut buffer[..3], (64 << 20) - 512)
            .unwrap();
        assert_eq!(&buffer[..3], b"end");
        copy.write_all_at(b"BEGIN", 0).unwrap();
        image.read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(&buffer, b"begin");
    }

    #[test]
    fn other_file_systems_are_copied_from() {
        let Ok(image) = tempfile::tempfile_in("/dev/shm") else {
            return;
        };
        image.write_all_at(&[7; 1024], 0).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let copy = private_copy(&image, dir.path()).unwrap();
        let mut buffer = [0; 1024];
        copy.read_exact_at(&mut buffer, 0).unwrap();
        assert_eq!(buffer, [7; 1024]);
    }

    #[test]
    fn other_files_are_refused() {
        let null = File::open("/dev/null").unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            private_copy(&null, dir.path()),
            Err(CopyError::Kind)
        ));
    }
}
