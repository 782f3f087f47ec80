//! Raw images: sparse files of whole sectors, and block devices.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Size of a sector in bytes; images consist of whole ones.
pub const SECTOR_BYTES: u64 = 512;

/// Why an image could not be made or inspected.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The size is not a whole number of sectors, or none.
    #[error(
        "the size is {0} bytes, expected a multiple of {SECTOR_BYTES} bytes, and more than none"
    )]
    Size(u64),
    /// It is neither a file nor a block device.
    #[error("expected a regular file or a block device, found {0}")]
    Kind(&'static str),
    /// The file system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What can be said of an image without looking into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Info {
    /// Size that a guest sees in bytes.
    pub apparent_bytes: u64,
    /// Bytes that it takes on the host; `None` for block devices.
    pub allocated_bytes: Option<u64>,
    /// Whether it is a block device.
    pub is_block_device: bool,
}

/// Makes a sparse image of zeros. An existing file is replaced only if `replace` says so.
///
/// # Errors
/// The file system's error; nothing is left behind then.
pub fn create(path: &Path, bytes: u64, replace: bool) -> Result<Info, ImageError> {
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(ImageError::Size(bytes));
    }
    let mut options = OpenOptions::new();
    options.write(true);
    if replace {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    let file = options.open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(ImageError::Kind("something else"));
    }
    if let Err(error) = file.set_len(bytes) {
        if !replace {
            // The file is ours and empty; the first error is the one that matters.
            let _second = std::fs::remove_file(path);
        }
        return Err(error.into());
    }
    Ok(facts(&file.metadata()?))
}

fn facts(found: &std::fs::Metadata) -> Info {
    Info {
        apparent_bytes: found.len(),
        allocated_bytes: Some(found.blocks().saturating_mul(512)),
        is_block_device: false,
    }
}

/// Tells the sizes of an image.
///
/// # Errors
/// The file system's error, or what was found instead of an image.
pub fn info(path: &Path) -> Result<Info, ImageError> {
    let found = std::fs::metadata(path)?;
    let kind = found.file_type();
    if kind.is_file() {
        return Ok(facts(&found));
    }
    if !kind.is_block_device() {
        return Err(ImageError::Kind(if kind.is_dir() {
            "a directory"
        } else {
            "a special file"
        }));
    }
    let mut device = File::open(path)?;
    Ok(Info {
        apparent_bytes: device.seek(SeekFrom::End(0))?,
        allocated_bytes: None,
        is_block_device: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_image_is_sparse_and_never_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        let made = create(&path, 1 << 30, false).unwrap();
        assert_eq!(made.apparent_bytes, 1 << 30);
        assert!(made.allocated_bytes.unwrap() < 1 << 20);
        assert_eq!(info(&path).unwrap(), made);
        let again = create(&path, 512, false).unwrap_err();
        assert!(matches!(again, ImageError::Io(e) if e.kind() == io::ErrorKind::AlreadyExists));
        assert_eq!(create(&path, 512, true).unwrap().apparent_bytes, 512);
    }

    #[test]
    fn impossible_sizes_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        for bytes in [0, 1, 513, (1 << 63) - 512] {
            assert!(create(&path, bytes, false).is_err(), "{bytes}");
            assert!(!path.exists(), "{bytes}");
        }
        assert!(matches!(
            info(dir.path()),
            Err(ImageError::Kind("a directory"))
        ));
    }
}
