//! The initial RAM disk of the small Linux, with more in it.

use std::path::Path;

/// What can be in it, as the mode of each.
const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// The initial RAM disk of the small Linux, and an archive behind it, which its kernel unpacks over the first.
#[derive(Debug)]
pub struct RamDisk(Vec<u8>);

impl RamDisk {
    /// The one that `cargo xtask test` prepares.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn linux() -> Self {
        let original = crate::path("BULKHEAD_TEST_LINUX_INITRD");
        let mut bytes = std::fs::read(&original).expect("the RAM disk of the small Linux");
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Self(bytes)
    }

    /// Adds a folder.
    #[must_use]
    pub fn folder(self, path: &str) -> Self {
        self.entry(path, FOLDER, &[])
    }

    /// Adds a file that everybody may read and execute.
    #[must_use]
    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(path, PROGRAM, content)
    }

    /// Adds a file with what is in one here.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn copy(self, path: &str, from: &Path) -> Self {
        let content = std::fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        self.file(path, &content)
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn link(self, path: &str, target: &str) -> Self {
        self.entry(path, LINK, target.as_bytes())
    }

    /// Writes it.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(self, to: &Path) {
        let whole = self.entry("TRAILER!!!", 0, &[]);
        std::fs::write(to, whole.0).expect("room for a RAM disk");
    }

    /// In the format `newc`.
    fn entry(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        let size = |bytes| u32::try_from(bytes).expect("less than 4 GiB");
        let fields = [
            1,
            mode,
            0,
            0,
            1,
            0,
            size(content.len()),
            0,
            0,
            0,
            0,
            size(path.len() + 1),
            0,
        ];
        self.0.extend(b"070701");
        for field in fields {
            self.0.extend(format!("{field:08x}").into_bytes());
        }
        for part in [&[path.as_bytes(), &[0]].concat(), content] {
            self.0.extend(part);
            self.0.resize(self.0.len().next_multiple_of(4), 0);
        }
        self
    }
}
