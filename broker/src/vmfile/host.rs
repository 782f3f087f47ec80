//! What the host has to offer a machine, and what the files that it names are.

use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Memory that the host can give to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// Bytes that can be had without swapping; `None` when the kernel does not say.
    pub available: Option<u64>,
    /// Free 2 MiB pages of the reserved pool in bytes.
    pub huge_pages_free: u64,
}

impl HostMemory {
    /// Reads `/proc/meminfo` and `/sys/kernel/mm` below `root`.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let meminfo = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
        let pool = root.join("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let pages: u64 = fs::read_to_string(pool)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        Self {
            available: meminfo_bytes(&meminfo, "MemAvailable"),
            huge_pages_free: pages.saturating_mul(2 << 20),
        }
    }
}

/// One line of `/proc/meminfo` in bytes.
#[must_use]
pub fn meminfo_bytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What makes two paths the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity(u64, u64, bool);

/// What a file is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) identity: Identity,
    pub(super) bytes: u64,
    pub(super) is_block: bool,
}

/// Looks at a file that a machine wants to use. Follows links and opens nothing.
///
/// # Errors
/// What was expected instead of what was found.
pub(super) fn inspect(
    path: &Path,
    expected: &str,
    may_be_block: bool,
    writable: bool,
) -> Result<Facts, String> {
    let found = fs::metadata(path).map_err(|e| format!("expected {expected}: {}", reason(&e)))?;
    let kind = found.file_type();
    let is_block = kind.is_block_device();
    if !(kind.is_file() || is_block && may_be_block) {
        let what = if kind.is_dir() {
            "a directory"
        } else if is_block {
            "a block device"
        } else if kind.is_char_device() {
            "a character device"
        } else if kind.is_fifo() {
            "a pipe"
        } else {
            "a socket"
        };
        return Err(format!("expected {expected}, found {what}"));
    }
    if !is_block && found.len() == 0 {
        return Err(format!("expected {expected}, found an empty file"));
    }
    let mut access = AccessFlags::R_OK;
    if writable {
        access |= AccessFlags::W_OK;
    }
    faccessat(nix::fcntl::AT_FDCWD, path, access, AtFlags::AT_EACCESS).map_err(|errno| {
        let how = if writable { "read and write" } else { "read" };
        format!("expected a file that this user may {how}: {}", errno.desc())
    })?;
    let identity = if is_block {
        Identity(found.rdev(), 0, true)
    } else {
        Identity(found.dev(), found.ino(), false)
    };
    Ok(Facts {
        identity,
        bytes: found.len(),
        is_block,
    })
}

/// Looks at a directory that a machine wants to share. Follows links and opens nothing.
///
/// # Errors
/// What was expected instead of what was found.
pub(super) fn inspect_directory(path: &Path) -> Result<(), String> {
    let found = fs::metadata(path).map_err(|e| format!("expected a directory: {}", reason(&e)))?;
    match found.is_dir() {
        true => Ok(()),
        false => Err("expected a directory, found something else".to_owned()),
    }
}

fn reason(error: &std::io::Error) -> String {
    error
        .raw_os_error()
        .map(nix::errno::Errno::from_raw)
        .map_or_else(|| error.to_string(), |errno| errno.desc().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_given_root() {
        let root = tempfile::tempdir().unwrap();
        let none = HostMemory::read(root.path());
        assert_eq!((none.available, none.huge_pages_free), (None, 0));
        fs::create_dir_all(root.path().join("proc")).unwrap();
        let text = "MemTotal: 10 kB\nMemAvailable:      4 kB\n";
        fs::write(root.path().join("proc/meminfo"), text).unwrap();
        let pool = root.path().join("sys/kernel/mm/hugepages/hugepages-2048kB");
        fs::create_dir_all(&pool).unwrap();
        fs::write(pool.join("free_hugepages"), "3\n").unwrap();
        let memory = HostMemory::read(root.path());
        assert_eq!(memory.available, Some(4096));
        assert_eq!(memory.huge_pages_free, 6 << 20);
    }
}
