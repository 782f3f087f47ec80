//! Kernel and initial RAM disk out of the file system of a guest.
//!
//! ```text
//!   chain of images ── Reader ── volumes (MBR, GPT, whole disk) ── ext4 ── kernel, initrd ── two files
//! ```
//!
//! Everything read here was written by a guest. The process that reads it holds the images for
//! reading and two empty files of the broker's, which fixes their sizes; the broker never sees more than
//! those files, and ends the process when it takes too long. What would make the parser of the file system
//! ask for more memory than a disk can justify is refused before it is called.

mod kernel;
mod partition;

use crate::ImageError;
use crate::offline::{Offline, PART_BYTES, Readable, write_all};
use bulkhead_ipc::protocol::image::{BootFile, BootReport, INITRD_BYTES_MAX, KERNEL_BYTES_MAX};
use ext4_view::{Ext4, Ext4Error, Ext4Read, PathBuf};
use nix::errno::Errno;
use partition::Volume;
use std::error::Error;
use std::fs::File;
use std::rc::Rc;

/// Where an ext4 file system has its superblock, and its magic number in it.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: [u8; 2] = [0x53, 0xef];
/// Largest block as the power of two that 1 KiB is multiplied with: 64 KiB, the largest of Linux.
const BLOCK_LOG_MAX: u32 = 6;
/// Most groups of blocks; each takes some bytes of memory. 128 TiB with blocks of 4 KiB.
const GROUPS_MAX: u64 = 1 << 20;

/// What a disk is read through.
pub trait Reader {
    /// Size of the disk in bytes.
    fn bytes(&self) -> u64;

    /// Reads; the range is inside of the disk.
    ///
    /// # Errors
    /// The kernel's errno, and EIO where an image is damaged.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno>;
}

impl Reader for Offline {
    fn bytes(&self) -> u64 {
        Readable::bytes(self)
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        Readable::read(self, at, to)
    }
}

impl Reader for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(at).map_err(|_| Errno::EIO)?;
        let from = self.get(at..).and_then(|from| from.get(..to.len()));
        to.copy_from_slice(from.ok_or(Errno::EIO)?);
        Ok(())
    }
}

/// Why nothing can be booted from a disk. Fit for whoever wants to boot it.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// There is no such file, or no file system that could have it.
    #[error("{0}")]
    NotFound(String),
    /// A file is there and cannot be used.
    #[error("{volume}: {path}: {what}")]
    File {
        /// Where.
        volume: String,
        /// Which file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// The disk cannot be read, or the result not written.
    #[error("{what}: {errno}")]
    Io {
        /// Which of them.
        what: &'static str,
        /// Why.
        errno: Errno,
    },
}

/// What is looked for.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Path of the kernel.
    pub kernel: Option<String>,
    /// Path of the initial RAM disk.
    pub initrd: Option<String>,
}

/// A volume as its file system is read.
struct Window {
    disk: Rc<dyn Reader>,
    volume: Volume,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        let end = start_byte.checked_add(dst.len() as u64);
        if end.is_none_or(|end| end > self.volume.bytes) {
            return Err("it reaches behind the end of its partition".into());
        }
        let at = self.volume.start.checked_add(start_byte);
        let at = at.ok_or(Errno::EIO).map_err(Box::new)?;
        Ok(self.disk.read(at, dst).map_err(Box::new)?)
    }
}

/// Looks for kernel and initial RAM disk, and writes them to files of the broker's.
///
/// # Errors
/// [`BootError`].
pub fn take_out(
    disk: Rc<dyn Reader>,
    wish: &Wish,
    kernel: &File,
    initrd: &File,
    mut progress: impl FnMut(u64, u64),
) -> Result<BootReport, BootError> {
    let (volume, fs, found) = find(&disk, wish)?;
    let total = found.kernel.1 + found.initrd.as_ref().map_or(0, |(_, bytes)| *bytes);
    let mut done = 0;
    let mut copy = |(path, bytes): &(PathBuf, u64), to: &File| {
        copy(&fs, volume, path, *bytes, to, |part| {
            done += part;
            progress(done, total);
        })
    };
    Ok(BootReport {
        volume: volume.to_string(),
        kernel: copy(&found.kernel, kernel)?,
        initrd: found.initrd.map(|file| copy(&file, initrd)).transpose()?,
    })
}

/// The first volume whose file system has what is wished for.
fn find(disk: &Rc<dyn Reader>, wish: &Wish) -> Result<(Volume, Ext4, kernel::Found), BootError> {
    let io = |errno| BootError::Io {
        what: "the disk cannot be read",
        errno,
    };
    let volumes = partition::volumes(disk.as_ref()).map_err(io)?;
    let partitioned = volumes.len() > 1;
    let mut seen = Vec::new();
    for volume in volumes {
        let fs = match mount(disk, volume).map_err(io)? {
            Mount::Found(fs) => fs,
            // That a partitioned disk is not a file system goes without saying.
            Mount::None if partitioned && volume.number.is_none() => continue,
            Mount::None => {
                seen.push(format!("{volume}: no ext4 file system"));
                continue;
            }
            Mount::Damaged(what) => {
                seen.push(format!(
                    "{volume}: an ext4 file system that cannot be read: {what}"
                ));
                continue;
            }
        };
        match kernel::look(&fs, wish) {
            Ok(Some(found)) => {
                check_size(volume, "kernel", &found.kernel, KERNEL_BYTES_MAX)?;
                if let Some(initrd) = &found.initrd {
                    check_size(volume, "initial RAM disk", initrd, INITRD_BYTES_MAX)?;
                }
                return Ok((volume, fs, found));
            }
            Ok(None) => seen.push(format!("{volume}: an ext4 file system without it")),
            Err((path, error)) => {
                return Err(BootError::File {
                    volume: volume.to_string(),
                    path,
                    what: explain(&error),
                });
            }
        }
    }
    let expected = match &wish.kernel {
        Some(path) => format!("the kernel {path}"),
        None => "a kernel (/vmlinuz, /boot/vmlinuz or /boot/vmlinuz-VERSION)".to_owned(),
    };
    Err(BootError::NotFound(format!(
        "expected {expected} in an ext4 file system, found {}",
        seen.join("; ")
    )))
}

fn check_size(
    volume: Volume,
    what: &str,
    (path, bytes): &(PathBuf, u64),
    limit: u64,
) -> Result<(), BootError> {
    if (1..=limit).contains(bytes) {
        return Ok(());
    }
    let mib = limit >> 20;
    Err(BootError::File {
        volume: volume.to_string(),
        path: path.display().to_string(),
        what: format!("has {bytes} bytes, expected a {what} of 1 byte to {mib} MiB"),
    })
}

/// What is in a volume.
enum Mount {
    Found(Ext4),
    None,
    Damaged(String),
}

fn mount(disk: &Rc<dyn Reader>, volume: Volume) -> Result<Mount, Errno> {
    let mut superblock = [0; SUPERBLOCK_BYTES];
    let enough = volume.bytes >= SUPERBLOCK + SUPERBLOCK_BYTES as u64;
    if !enough {
        return Ok(Mount::None);
    }
    disk.read(volume.start + SUPERBLOCK, &mut superblock)?;
    if superblock.get(56..58) != Some(&MAGIC[..]) {
        return Ok(Mount::None);
    }
    if let Err(what) = check_superblock(&superblock, volume.bytes) {
        return Ok(Mount::Damaged(what));
    }
    let window = Window {
        disk: Rc::clone(disk),
        volume,
    };
    Ok(match Ext4::load(Box::new(window)) {
        Ok(fs) => Mount::Found(fs),
        Err(error) => Mount::Damaged(explain(&error)),
    })
}

/// Whether the numbers from which the parser works out how much memory it needs can be true.
fn check_superblock(superblock: &[u8; SUPERBLOCK_BYTES], bytes: u64) -> Result<(), String> {
    let field = |at: usize| {
        let field = superblock.get(at..at + 4).and_then(|b| b.try_into().ok());
        u32::from_le_bytes(field.unwrap_or_default())
    };
    let log = field(24);
    if log > BLOCK_LOG_MAX {
        return Err(format!(
            "its block size is 2^{log} KiB, expected at most 64 KiB"
        ));
    }
    const IS_64BIT: u32 = 0x80;
    let high = match field(96) & IS_64BIT {
        0 => 0,
        _ => field(336),
    };
    let blocks = (u64::from(high) << 32) | u64::from(field(4));
    let needed = blocks.checked_mul(1024 << log);
    if needed.is_none_or(|needed| needed > bytes) {
        return Err(format!(
            "it has {blocks} blocks of {} KiB, expected no more than fit {bytes} bytes",
            1 << log
        ));
    }
    let group = u64::from(field(32)).max(1);
    if blocks / group > GROUPS_MAX {
        return Err(format!(
            "it has groups of {group} blocks, expected fewer than {GROUPS_MAX} groups"
        ));
    }
    Ok(())
}

/// An error of the parser, with what to do about it where that is known.
fn explain(error: &Ext4Error) -> String {
    match error {
        Ext4Error::NotFound => "there is no such file".to_owned(),
        Ext4Error::TooManySymlinks => {
            "too many symbolic links, expected a path that leads to a file".to_owned()
        }
        Ext4Error::IsADirectory | Ext4Error::IsASpecialFile => "expected a regular file".to_owned(),
        Ext4Error::Incompatible(_) => format!(
            "{error}; expected what mkfs.ext4 makes by default, unmounted or with checksums in its journal"
        ),
        Ext4Error::Corrupt(_) => format!("{error}; expected a sound file system (see e2fsck)"),
        _ => error.to_string(),
    }
}

fn copy(
    fs: &Ext4,
    volume: Volume,
    path: &PathBuf,
    bytes: u64,
    to: &File,
    mut progress: impl FnMut(u64),
) -> Result<BootFile, BootError> {
    let fault = |error: Ext4Error| BootError::File {
        volume: volume.to_string(),
        path: path.display().to_string(),
        what: explain(&error),
    };
    let mut file = fs.open(path.as_path()).map_err(fault)?;
    let mut buffer = vec![0; PART_BYTES];
    let mut done = 0;
    while done < bytes {
        let left = usize::try_from(bytes - done).map_or(PART_BYTES, |left| left.min(PART_BYTES));
        let mut filled = 0;
        // One block at a time is what comes.
        while let Some(rest) = buffer.get_mut(filled..left)
            && !rest.is_empty()
        {
            match file.read_bytes(rest).map_err(fault)? {
                0 => break,
                read => filled += read,
            }
        }
        let part = buffer.get(..filled).unwrap_or_default();
        if part.is_empty() {
            break;
        }
        write_all(to, done, part).map_err(|errno| BootError::Io {
            what: "there is no room for the kernel",
            errno,
        })?;
        done += filled as u64;
        progress(filled as u64);
    }
    if done != bytes {
        return Err(BootError::File {
            volume: volume.to_string(),
            path: path.display().to_string(),
            what: format!("ends after {done} of {bytes} bytes"),
        });
    }
    Ok(BootFile {
        path: path.display().to_string(),
        bytes,
    })
}

impl From<BootError> for ImageError {
    fn from(error: BootError) -> Self {
        Self::Chain {
            file: "disk".to_owned(),
            what: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests;
