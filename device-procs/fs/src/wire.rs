//! What FUSE requests and answers look like (Linux `include/uapi/linux/fuse.h`, protocol 7.31), little
//! endian. Requests are copied out of here once, as checked types.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of data that one read or write may have.
pub(crate) const DATA_BYTES_MAX: u32 = 1 << 20;
/// Bytes that a request may have: the data of the largest write and its headers.
pub const REQUEST_BYTES_MAX: usize = DATA_BYTES_MAX as usize + 4096;
/// The version that is spoken.
pub(crate) const MAJOR: u32 = 7;
pub(crate) const MINOR: u32 = 31;

/// Operations, by their numbers.
pub(crate) mod op {
    macro_rules! ops { ($($name:ident = $value:expr;)*) => { $(pub(crate) const $name: u32 = $value;)* } }
    ops! {
        LOOKUP = 1; FORGET = 2; GETATTR = 3; SETATTR = 4; READLINK = 5; SYMLINK = 6; MKNOD = 8;
        MKDIR = 9; UNLINK = 10; RMDIR = 11; RENAME = 12; LINK = 13; OPEN = 14; READ = 15; WRITE = 16;
        STATFS = 17; RELEASE = 18; FSYNC = 20; FLUSH = 25; INIT = 26; OPENDIR = 27; READDIR = 28;
        RELEASEDIR = 29; FSYNCDIR = 30; CREATE = 35; INTERRUPT = 36; DESTROY = 38; BATCH_FORGET = 42;
        FALLOCATE = 43; READDIRPLUS = 44; RENAME2 = 45; LSEEK = 46;
    }
}

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $type),* }
    )* };
}

wire! {
    InHeader { len: u32, opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, pid: u32, extra: u32 }
    OutHeader { len: u32, error: i32, unique: u64 }
    InitIn { major: u32, minor: u32, readahead: u32, flags: u32 }
    InitOut { major: u32, minor: u32, readahead: u32, flags: u32, background: u16, congestion: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, unused: [u32; 8] }
    Attr { ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atime_ns: u32,
        mtime_ns: u32, ctime_ns: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        block_bytes: u32, flags: u32 }
    EntryOut { node: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_ns: u32,
        attr_valid_ns: u32, attr: Attr }
    AttrOut { valid: u64, valid_ns: u32, pad: u32, attr: Attr }
    SetattrIn { valid: u32, pad: u32, handle: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atime_ns: u32, mtime_ns: u32, ctime_ns: u32, mode: u32, unused: u32, uid: u32,
        gid: u32, unused2: u32 }
    MknodIn { mode: u32, rdev: u32, umask: u32, pad: u32 }
    MkdirIn { mode: u32, umask: u32 }
    RenameIn { new_parent: u64 }
    Rename2In { new_parent: u64, flags: u32, pad: u32 }
    LinkIn { node: u64 }
    OpenIn { flags: u32, extra: u32 }
    CreateIn { flags: u32, mode: u32, umask: u32, extra: u32 }
    OpenOut { handle: u64, flags: u32, pad: u32 }
    ReadIn { handle: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, pad: u32 }
    WriteIn { handle: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, pad: u32 }
    WriteOut { size: u32, pad: u32 }
    HandleIn { handle: u64, flags: u32, more: u32 }
    ForgetIn { count: u64 }
    BatchForgetIn { count: u32, pad: u32 }
    ForgetOne { node: u64, count: u64 }
    StatfsOut { blocks: u64, free: u64, available: u64, files: u64, files_free: u64, block_bytes: u32,
        name_bytes_max: u32, fragment_bytes: u32, pad: u32, spare: [u32; 6] }
    FallocateIn { handle: u64, offset: u64, length: u64, mode: u32, pad: u32 }
    LseekIn { handle: u64, offset: u64, whence: u32, pad: u32 }
    LseekOut { offset: u64 }
    Dirent { ino: u64, next: u64, name_bytes: u32, kind: u32 }
}

const _: () = assert!(size_of::<InHeader>() == 40);
const _: () = assert!(size_of::<OutHeader>() == 16);
const _: () = assert!(size_of::<InitOut>() == 64);
const _: () = assert!(size_of::<Attr>() == 88);
const _: () = assert!(size_of::<EntryOut>() == 128);
const _: () = assert!(size_of::<SetattrIn>() == 88);
const _: () = assert!(size_of::<ReadIn>() == 40);
const _: () = assert!(size_of::<StatfsOut>() == 80);

/// The rest of a request that is not yet read.
#[derive(Debug)]
pub(crate) struct Body<'a>(pub(crate) &'a [u8]);

impl<'a> Body<'a> {
    /// The next structure, or EINVAL.
    pub(crate) fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (bytes, rest) = self
            .0
            .split_at_checked(size_of::<T>())
            .ok_or(Errno::EINVAL)?;
        self.0 = rest;
        T::read_from_bytes(bytes).map_err(|_| Errno::EINVAL)
    }

    /// The next text, which a zero ends, without the zero.
    pub(crate) fn text(&mut self) -> Result<&'a [u8], Errno> {
        let end = self.0.iter().position(|&b| b == 0).ok_or(Errno::EINVAL)?;
        let (text, rest) = self.0.split_at_checked(end).ok_or(Errno::EINVAL)?;
        self.0 = rest.get(1..).unwrap_or_default();
        Ok(text)
    }
}
