//! What can be wrong with a kernel, an initrd or a command line.
//!
//! Every variant names the field, its value and what was expected, because the message is what a
//! user sees who gave the wrong file.

use std::borrow::Cow;

/// The files that [`super::load`] accepts, as error messages list them.
pub const ACCEPTED_KERNELS: &str = "a Linux bzImage (vmlinuz), an ELF vmlinux with or without a \
     PVH note, or a Multiboot 1 or Multiboot 2 kernel, for x86";

/// Why a guest cannot be prepared for its first instruction.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The host refused to read a file.
    #[error("cannot read the {what} at byte {offset}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// First byte of the read.
        offset: u64,
        /// What the host said.
        source: std::io::Error,
    },
    /// The file has no contents that could be read as a whole.
    #[error("the {what} is {recognised}, expected a regular file")]
    NotAFile {
        /// Which file.
        what: &'static str,
        /// What it is.
        recognised: &'static str,
    },
    /// The file is something else than a kernel.
    #[error("the kernel file is {recognised}; accepted are {ACCEPTED_KERNELS}")]
    NotAKernel {
        /// What the file looks like.
        recognised: Cow<'static, str>,
    },
    /// A part that the file's own headers promise lies beyond its end.
    #[error(
        "the {what} is truncated: {field} takes {bytes} bytes from byte {offset}, \
         but the file ends at byte {length}"
    )]
    Truncated {
        /// Which file.
        what: &'static str,
        /// The part that is missing.
        field: &'static str,
        /// Where the part begins in the file.
        offset: u64,
        /// How long the part is.
        bytes: u64,
        /// The length of the file.
        length: u64,
    },
    /// A header field has a value that cannot be right or is not supported.
    #[error("{field} is {value:#x}, expected {expected}")]
    Field {
        /// The field, with the structure that holds it.
        field: &'static str,
        /// The value found.
        value: u64,
        /// The values that would do.
        expected: Cow<'static, str>,
    },
    /// A part of the kernel would be placed where the guest has no memory.
    #[error(
        "{what} takes guest addresses {start:#x} to {end:#x}, expected a range of the guest's \
         memory ({available}); a larger `memory` may help"
    )]
    OutsideMemory {
        /// The part.
        what: Cow<'static, str>,
        /// Its first guest-physical address.
        start: u64,
        /// The address after its last byte.
        end: u64,
        /// The ranges of memory that the guest has.
        available: String,
    },
    /// Two parts would be placed at the same address.
    #[error(
        "{what} takes guest addresses {start:#x} to {end:#x}, which overlap {other} at \
         {other_start:#x} to {other_end:#x}; expected disjoint ranges"
    )]
    Overlap {
        /// The later part.
        what: Cow<'static, str>,
        /// Its first guest-physical address.
        start: u64,
        /// The address after its last byte.
        end: u64,
        /// The earlier part.
        other: Cow<'static, str>,
        /// The earlier part's first guest-physical address.
        other_start: u64,
        /// The address after the earlier part's last byte.
        other_end: u64,
    },
    /// The initrd does not fit.
    #[error(
        "the initrd has {bytes} bytes, but only {available} bytes of guest memory are free for it \
         below address {limit:#x}; give the guest more `memory` or a smaller initrd"
    )]
    InitrdTooLarge {
        /// Size of the initrd.
        bytes: u64,
        /// Largest free range for it.
        available: u64,
        /// Lowest address at which it may not be.
        limit: u64,
    },
    /// The initrd is an empty file.
    #[error("the initrd is empty (0 bytes), expected a cpio archive or a module")]
    InitrdEmpty,
    /// The kernel's command line buffer is shorter than the command line.
    #[error("the kernel command line has {bytes} bytes, expected at most {limit}")]
    CommandLineTooLong {
        /// Length of the command line.
        bytes: usize,
        /// Longest that this kernel takes.
        limit: usize,
    },
    /// A NUL ends a command line, so one inside would silently cut it.
    #[error("byte {position} of the kernel command line is NUL, expected text")]
    CommandLineNul {
        /// Where the NUL is.
        position: usize,
    },
    /// The memory that the process mapped is smaller than the size that it was told.
    #[error("{bytes} bytes at guest address {address:#x} are not backed by memory")]
    Unbacked {
        /// First address.
        address: u64,
        /// Length.
        bytes: u64,
    },
}

impl BootError {
    /// A field that has another value than it should.
    pub(super) fn field(
        field: &'static str,
        value: impl Into<u64>,
        expected: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Field {
            field,
            value: value.into(),
            expected: expected.into(),
        }
    }
}
