//! Small file systems of a test's own.

use super::tool;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A file system that is soon full. Dropping it unmounts it.
#[derive(Debug)]
pub struct SmallDisk {
    place: PathBuf,
    /// Its directories, if they are its own; they go after it is unmounted.
    _own: Option<TempDir>,
}

impl SmallDisk {
    /// In memory, of `size` as mount(8) takes it, at `place`.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn memory_at(place: PathBuf, size: &str) -> Self {
        let options = format!("size={size},mode=0700");
        tool(
            "mount",
            &["-t", "tmpfs", "-o", &options, "tmpfs", text(&place)],
        );
        Self { place, _own: None }
    }

    /// In memory, of `size` as mount(8) takes it.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn memory(size: &str) -> Self {
        let own = tempfile::tempdir().expect("a directory");
        let mut disk = Self::memory_at(own.path().to_owned(), size);
        disk._own = Some(own);
        disk
    }

    /// An ext4 of `bytes` bytes, in a file.
    ///
    /// # Panics
    /// When it cannot be made or mounted.
    #[must_use]
    pub fn ext4(bytes: u64) -> Self {
        let own = tempfile::tempdir().expect("a directory");
        let (image, place) = (own.path().join("image"), own.path().join("files"));
        fs::create_dir(&place).expect("a directory");
        let file = File::create(&image).expect("a file");
        file.set_len(bytes).expect("a sparse file");
        let options = ["-q", "-m", "0", "-O", "^has_journal"];
        tool("mkfs.ext4", &[&options[..], &[text(&image)]].concat());
        tool("mount", &["-o", "loop", text(&image), text(&place)]);
        Self {
            place,
            _own: Some(own),
        }
    }

    /// Its root directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place
    }

    /// Gives one in memory another size.
    ///
    /// # Panics
    /// When it cannot.
    pub fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        tool("mount", &["-o", &options, text(&self.place)]);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: whoever uses it is still there when a test has failed.
        let _gone = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}
