//! Directories of process binaries that tests change: other versions, damaged files, programs of their
//! own in the place of a device's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What stands before the version in every program.
const MARK: &[u8] = b"bulkhead-program=";

/// The processes of Bulkhead in a directory of their own, which vanishes with the test.
#[derive(Debug)]
pub struct Programs(tempfile::TempDir);

impl Programs {
    /// Copies of all.
    ///
    /// # Panics
    /// When they cannot be copied.
    #[must_use]
    pub fn copied() -> Self {
        let binaries = super::path("BULKHEAD_BIN_DIR");
        let folder = tempfile::tempdir().expect("a directory");
        for kind in [
            "blk", "console", "fs", "legacy", "net", "rng", "switch", "vcpu", "vsock",
        ] {
            let name = format!("bulkhead-{kind}");
            fs::copy(binaries.join(&name), folder.path().join(&name)).expect("room for programs");
        }
        Self(folder)
    }

    /// Copies of all, with another program of the build in the place of one.
    #[must_use]
    pub fn with(kind: &str, program: &str) -> Self {
        let programs = Self::copied();
        programs.put(kind, &read(&super::path("BULKHEAD_BIN_DIR").join(program)));
        programs
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The directory, as an argument.
    ///
    /// # Panics
    /// When its name is not UTF-8.
    #[must_use]
    pub fn argument(&self) -> &str {
        self.path().to_str().expect("a UTF-8 path")
    }

    fn place(&self, kind: &str) -> PathBuf {
        self.path().join(format!("bulkhead-{kind}"))
    }

    /// The program of `kind`.
    #[must_use]
    pub fn read(&self, kind: &str) -> Vec<u8> {
        read(&self.place(kind))
    }

    /// Puts a new file in the place of the program of `kind`, as a package manager does.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn put(&self, kind: &str, program: &[u8]) {
        use std::os::unix::fs::PermissionsExt;
        let new = self.path().join("new");
        fs::write(&new, program).expect("room for a program");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("a file of ours");
        fs::rename(&new, self.place(kind)).expect("a file of ours");
    }

    /// Removes the program of `kind`.
    ///
    /// # Panics
    /// When there is none.
    pub fn remove(&self, kind: &str) {
        fs::remove_file(self.place(kind)).expect("a file of ours");
    }

    /// The number of the file that is the program of `kind` now.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn inode(&self, kind: &str) -> u64 {
        fs::metadata(self.place(kind)).expect("a program").ino()
    }
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The same program with another version: of as many bytes as the one that it has.
///
/// # Panics
/// When the program has no version, or one of another length.
#[must_use]
pub fn with_version(mut program: Vec<u8>, version: &str) -> Vec<u8> {
    let places: Vec<usize> = (0..program.len().saturating_sub(MARK.len()))
        .filter(|&at| program[at..].starts_with(MARK))
        .map(|at| at + MARK.len())
        .collect();
    let mut changed = 0;
    for place in places {
        let version_there = program.get_mut(place..place + version.len());
        // The mark by itself, without a version, is what it is looked for by.
        if let Some(bytes) = version_there.filter(|bytes| bytes[0].is_ascii_digit()) {
            bytes.copy_from_slice(version.as_bytes());
            changed += 1;
        }
    }
    assert!(changed > 0, "the program has no version");
    program
}
