//! Disk images: where in which file a range of a disk is.
//!
//! ```text
//!   raw, flat VMDK ── Flat: a table of pieces ───────────────┐
//!                                                            ├── Image::locate ── the caller does the I/O
//!   qcow2 ────────── imago: L1, L2, refcounts, backing chain ┘
//! ```
//!
//! Everything here works on descriptors that somebody else has opened. A name inside of an image is
//! compared with what was granted and never opened, so whoever can write an image gains no file.
//! Formats are told and never probed.
//!
//! Blocking: metadata of a qcow2 image is read and written with plain system calls, a table at a time.

mod backing_name;
pub mod boot;
mod create;
mod extent;
mod flat;
pub mod header;
mod import;
mod offline;
mod process;
mod qcow2;
mod refcounts;
mod vmdk;

pub use bulkhead_ipc::protocol::birth::ImageFormat;
pub use create::{CLUSTER_BYTES, create_qcow2};
pub use process::{granted, run};
pub use qcow2::Allocated;
pub use refcounts::{Count, Repair, check, repair};
pub use vmdk::Descriptor;

use flat::Flat;
use nix::errno::Errno;
use qcow2::Qcow2Image;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Most layers of a chain, the writable one included.
pub const LAYERS_MAX: usize = 32;
/// Most bytes that the tables of all layers may take in memory together.
pub const TABLES_BYTES_MAX: u64 = 192 << 20;

/// What is to be done with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It is read.
    Read,
    /// It is read and written.
    Write,
    /// The same, and it ends with its user: its file is empty at first, and is made a qcow2 image on top of
    /// the other layers.
    Scratch,
}

/// An open file of an image.
#[derive(Debug)]
pub struct Source {
    /// It. Read only where nothing may be written. Several parts of an image use it, and a locked
    /// process makes no second descriptor.
    pub file: Arc<File>,
    /// Its number among all files of the chain, by which [`Place`] names it.
    pub number: u32,
    /// Its name without directories, for messages and to compare with what images say.
    pub name: String,
}

/// One image of a chain.
#[derive(Debug)]
pub struct Layer {
    /// Its format, as it was told.
    pub format: ImageFormat,
    /// Its files: the image or descriptor first, then the extents in the order of the descriptor.
    pub files: Vec<Source>,
}

/// What is wrong with an image. One line each, fit for the person who named the image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The kernel refused, or the image is damaged.
    #[error("{file}: {cause}")]
    Io {
        /// Name of the file.
        file: String,
        /// Why.
        cause: io::Error,
    },
    /// A field of the image that cannot be used.
    #[error("{file}: {field}: got {got}, expected {expected}")]
    Field {
        /// Name of the file.
        file: String,
        /// Which field.
        field: &'static str,
        /// What it says.
        got: String,
        /// What would do.
        expected: String,
    },
    /// The chain that was told is not the one that the images tell of.
    #[error("{file}: {what}")]
    Chain {
        /// Name of the file.
        file: String,
        /// What does not fit, and what to do about it.
        what: String,
    },
}

impl ImageError {
    pub(crate) fn io(file: &str, cause: impl Into<io::Error>) -> Self {
        Self::Io {
            file: file.to_owned(),
            cause: cause.into(),
        }
    }
}

/// Where a range of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a file as it is.
    File {
        /// [`Source::number`].
        number: u32,
        /// Byte of the file.
        at: u64,
        /// Whether writing there changes this disk and nothing else.
        writable: bool,
    },
    /// Nowhere: it reads as zeroes.
    Zeroes,
    /// In a file, compressed: [`Image::read`] decodes it.
    Encoded,
}

/// An open disk image with everything below it.
#[derive(Debug)]
pub enum Image {
    /// A table of pieces: raw, and flat VMDK.
    Flat(Flat),
    /// A qcow2 image and its backing chain.
    Qcow2(Box<Qcow2Image>),
}

impl Image {
    /// Opens a chain, the layer that the disk shows first. Reads its metadata; where it is written, what a
    /// killed writer has left in the refcounts of the first layer is repaired.
    ///
    /// # Errors
    /// [`ImageError`] when an image is damaged, is not of its format, or has another chain than this.
    pub fn open(layers: Vec<Layer>, how: Use) -> Result<Self, ImageError> {
        let count = layers.len();
        let mut layers = layers.into_iter();
        let first = match layers.next() {
            Some(first) if count <= LAYERS_MAX => first,
            _ => {
                return Err(ImageError::Field {
                    file: "disk".to_owned(),
                    field: "layers",
                    got: count.to_string(),
                    expected: format!("1 to {LAYERS_MAX}"),
                });
            }
        };
        match first.format {
            ImageFormat::Qcow2 => {
                Qcow2Image::open(first, layers.collect(), how).map(|i| Self::Qcow2(Box::new(i)))
            }
            ImageFormat::Raw | ImageFormat::Vmdk => {
                if let Some(below) = layers.next() {
                    return Err(ImageError::Chain {
                        file: name_of(&first).to_owned(),
                        what: format!(
                            "a {} image has no backing image; {} was given as such",
                            first.format,
                            name_of(&below)
                        ),
                    });
                }
                Flat::open(first, how != Use::Read).map(Self::Flat)
            }
        }
    }

    /// Grows the disk to `bytes` bytes, unless it has as many. Blocks. The new size is the kernel's when this
    /// returns: who opens the image after a death finds the old size or the new one.
    ///
    /// # Errors
    /// [`ImageError`] when the image cannot grow, or the host has no room for its tables.
    pub fn grow(&mut self, bytes: u64) -> Result<(), ImageError> {
        if bytes <= self.bytes() {
            return Ok(());
        }
        match self {
            Self::Flat(_) => Err(ImageError::Field {
                file: "disk".to_owned(),
                field: "size",
                got: format!("{} bytes", self.bytes()),
                expected: format!("at least {bytes}: only raw and qcow2 images grow"),
            }),
            Self::Qcow2(image) => {
                image.resize(bytes)?;
                let done = image.commit();
                done.map_err(|errno| ImageError::io("disk", errno))
            }
        }
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Flat(flat) => flat.bytes(),
            Self::Qcow2(image) => image.bytes(),
        }
    }

    /// Where the disk's bytes from `at` on are, and for how many of `bytes` bytes that holds: at
    /// least one. May read a table of the image, which blocks.
    ///
    /// # Errors
    /// The kernel's errno; EIO for damaged tables and for what lies behind the disk's end.
    pub fn locate(&self, at: u64, bytes: u64) -> Result<(Place, u64), Errno> {
        match self {
            Self::Flat(flat) => flat.locate(at, bytes).ok_or(Errno::EIO),
            Self::Qcow2(image) => image.locate(at, bytes),
        }
    }

    /// Reads, decoding what is compressed. Blocks.
    ///
    /// # Errors
    /// As [`Image::locate`].
    pub fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        match self {
            Self::Flat(_) => Err(Errno::EIO),
            Self::Qcow2(image) => image.read(at, to),
        }
    }

    /// Has room made for the disk's bytes from `at` on and has them written by `write`, which is given
    /// the number of a file, a byte of it, and how many of `bytes` bytes go there. What was written is
    /// the disk's when [`Image::commit`] has succeeded.
    ///
    /// # Errors
    /// What `write` says, or as [`Image::locate`]; ENOSPC when the host has no room. Nothing is changed then.
    pub fn allocate(
        &self,
        at: u64,
        bytes: u64,
        write: impl FnOnce(u32, u64, u64) -> Result<(), Errno>,
    ) -> Result<Allocated, Errno> {
        match self {
            // Every byte of a flat image has its place.
            Self::Flat(_) => Err(Errno::EROFS),
            Self::Qcow2(image) => image.allocate(at, bytes, write),
        }
    }

    /// Makes a range read as zeroes that is in no file of this layer. Needs [`Image::commit`].
    ///
    /// # Errors
    /// As [`Image::allocate`].
    pub fn zero(&self, at: u64, bytes: u64) -> Result<Allocated, Errno> {
        match self {
            Self::Flat(_) => Err(Errno::EROFS),
            Self::Qcow2(image) => image.zero(at, bytes),
        }
    }

    /// Gives changed tables to the kernel, so that they outlive this process. What counts clusters goes
    /// before what refers to them: a process that is killed in between leaves clusters that nobody
    /// uses, never clusters that two use.
    ///
    /// # Errors
    /// The kernel's errno. What could not be written is kept, and written the next time.
    pub fn commit(&self) -> Result<(), Errno> {
        match self {
            Self::Flat(_) => Ok(()),
            Self::Qcow2(image) => image.commit(),
        }
    }

    /// Whether the first layer itself says what is at `at`, and for how many of `bytes` bytes that holds.
    ///
    /// # Errors
    /// As [`Image::locate`].
    pub fn has_own(&self, at: u64, bytes: u64) -> Result<(bool, u64), Errno> {
        match self {
            Self::Flat(_) => Ok((true, bytes)),
            Self::Qcow2(image) => image.has_own(at, bytes),
        }
    }

    /// Most bytes that the first layer's file can come to have, where it grows.
    #[must_use]
    pub fn file_bytes_max(&self) -> Option<u64> {
        match self {
            Self::Flat(_) => None,
            Self::Qcow2(image) => Some(image.file_bytes_max()),
        }
    }

    /// Whether a file of an image may end before the disk's data does, which then reads as zeroes.
    #[must_use]
    pub const fn files_may_end_early(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }
}

pub(crate) fn name_of(layer: &Layer) -> &str {
    layer.files.first().map_or("disk", |source| &source.name)
}

/// The errno behind an error of a library that may have wrapped it.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    if let Some(raw) = error.raw_os_error() {
        return Errno::from_raw(raw);
    }
    match error.kind() {
        io::ErrorKind::StorageFull => Errno::ENOSPC,
        io::ErrorKind::QuotaExceeded => Errno::EDQUOT,
        io::ErrorKind::FileTooLarge => Errno::EFBIG,
        io::ErrorKind::PermissionDenied => Errno::EACCES,
        io::ErrorKind::Interrupted => Errno::EINTR,
        io::ErrorKind::Unsupported => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    }
}
