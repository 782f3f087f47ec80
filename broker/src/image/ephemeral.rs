//! Files for what guests write to ephemeral disks: without a name, so that the kernel frees them with
//! their last descriptor, however the machine ends.
//!
//! Such a file becomes a layer on top of the disk's own image, in the process that serves the disk.

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io;
use std::path::Path;

/// An empty file without a name in the file system of `directory`, open for reading and writing.
///
/// # Errors
/// The file system's error; some have no files without names.
pub fn unnamed_file(directory: &Path) -> io::Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    Ok(File::from(open(directory, flags, mode)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn file_has_no_name_and_nothing_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = unnamed_file(dir.path()).unwrap();
        let about = file.metadata().unwrap();
        assert_eq!((about.nlink(), about.len()), (0, 0));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(unnamed_file(&dir.path().join("missing")).is_err());
    }
}
