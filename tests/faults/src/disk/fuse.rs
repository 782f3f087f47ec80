//! The file system: one directory with one file. Nothing is cached by the kernel, so that what it asks for
//! is what the file's users ask for.

use super::NAME;
use super::served::{Asker, Job, Served};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, SessionACL, WriteFlags,
};
use nix::fcntl::FallocateFlags;
use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

const IMAGE: INodeNo = INodeNo(2);
/// Nothing is kept by the kernel.
const TTL: Duration = Duration::ZERO;
const THREADS: usize = 4;

pub(super) fn mount(served: Arc<Served>, place: &Path) -> io::Result<fuser::BackgroundSession> {
    let mut config = Config::default();
    // The disk's process is another user.
    config.acl = SessionACL::All;
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    fuser::spawn_mount(Server(served), place, &config)
}

struct Server(Arc<Served>);

fn attributes(kind: FileType, ino: INodeNo, size: u64) -> FileAttr {
    let is_directory = kind == FileType::Directory;
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: if is_directory { 0o755 } else { 0o600 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Server {
    fn about_image(&self) -> FileAttr {
        let size = self.0.state().model.bytes();
        attributes(FileType::RegularFile, IMAGE, size)
    }
}

fn asker(handle: FileHandle, offset: u64) -> Asker {
    let handle = handle.0;
    Asker { handle, offset }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match parent == INodeNo::ROOT && name == NAME {
            true => reply.entry(&TTL, &self.about_image(), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let about = match ino {
            INodeNo::ROOT => attributes(FileType::Directory, ino, 0),
            _ => self.about_image(),
        };
        reply.attr(&TTL, &about);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // One write that hangs keeps no other waiting.
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(self.0.open()), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.0.serve(asker(handle, offset), Job::Read(size, reply));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let job = Job::Write(Cow::Borrowed(data), reply);
        self.0.serve(asker(handle, offset), job);
    }

    /// A descriptor is closed: nothing that a disk would notice.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.serve(asker(handle, 0), Job::Flush(reply));
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        let mode = FallocateFlags::from_bits_retain(mode);
        if mode == keep | punch || mode == keep | zero {
            return self
                .0
                .serve(asker(handle, offset), Job::Zero(length, reply));
        }
        reply.error(Errno::EOPNOTSUPP);
    }
}
