//! One FUSE request in, one answer out.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod change;
mod content;

use crate::folder::{self, Folder};
use crate::ids::IdMap;
use crate::nodes::{Nodes, ROOT};
use crate::wire::{self, Body, op};
use nix::errno::Errno;
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use zerocopy::IntoBytes;

/// Whether the guest may change the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Changes are answered with EROFS.
    ReadOnly,
    /// The guest may change what the process may change.
    ReadWrite,
}

/// How owners are translated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ids {
    /// Users.
    pub users: IdMap,
    /// Groups.
    pub groups: IdMap,
}

/// Files and directories that a guest may have open at a time; it is told ENFILE past that.
const HANDLES_MAX: usize = 1024;

#[derive(Debug)]
struct Handle {
    node: u64,
    file: File,
    /// The entries of a directory, as they were when it was read from its start.
    entries: Vec<content::Entry>,
}

/// The server of one folder for one guest.
#[derive(Debug)]
pub struct Server {
    folder: Folder,
    access: Access,
    ids: Ids,
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
    ready: bool,
}

impl Server {
    /// Serves the directory `folder`, which may be an O_PATH descriptor.
    ///
    /// # Errors
    /// That of `fstat`.
    pub fn new(folder: OwnedFd, access: Access, ids: Ids) -> std::io::Result<Self> {
        let folder = Folder::new(folder);
        let nodes = Nodes::new(folder::identity(&folder.stat()?));
        let handles = HashMap::new();
        Ok(Self {
            folder,
            access,
            ids,
            nodes,
            handles,
            next_handle: 1,
            ready: false,
        })
    }

    /// Serves one request and puts the answer into `answer` (what it held is dropped), of at most
    /// `room` bytes. It stays empty where FUSE has no answer (forgetting, or a request without a
    /// whole header). Blocks as long as the host's file system does.
    pub fn serve(&mut self, request: &[u8], room: usize, answer: &mut Vec<u8>) {
        answer.clear();
        let mut body = Body(request);
        let Ok(header) = body.take::<wire::InHeader>() else {
            return;
        };
        if room < size_of::<wire::OutHeader>()
            && !matches!(header.opcode, op::FORGET | op::BATCH_FORGET)
        {
            return;
        }
        let mut out = wire::OutHeader {
            unique: header.unique,
            ..Default::default()
        };
        answer.extend_from_slice(out.as_bytes());
        let whole = usize::try_from(header.len).is_ok_and(|len| len == request.len());
        let done = if !whole || request.len() > wire::REQUEST_BYTES_MAX {
            Err(Errno::EINVAL)
        } else {
            self.operate(&header, &mut body, room, answer)
        };
        if matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            answer.clear();
            return;
        }
        if let Err(error) = done {
            answer.truncate(size_of::<wire::OutHeader>());
            out.error = -(error as i32);
        }
        // What is done is done, but an answer that has no room is none (the guest gave the room).
        if answer.len() > room {
            answer.truncate(size_of::<wire::OutHeader>());
            out.error = -(Errno::EIO as i32);
        }
        out.len = u32::try_from(answer.len()).unwrap_or(u32::MAX);
        if let Some(place) = answer.get_mut(..size_of::<wire::OutHeader>()) {
            place.copy_from_slice(out.as_bytes());
        }
    }

    fn operate(
        &mut self,
        header: &wire::InHeader,
        body: &mut Body<'_>,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if header.opcode == op::INIT {
            return self.init(body, answer);
        }
        if !self.ready {
            return Err(Errno::EIO);
        }
        let node = header.node;
        match header.opcode {
            op::LOOKUP => {
                let name = folder::name(body.text()?)?;
                self.enter(node, name, answer)
            }
            op::FORGET => {
                self.nodes
                    .forget(node, body.take::<wire::ForgetIn>()?.count);
                Ok(())
            }
            op::BATCH_FORGET => {
                for _ in 0..body.take::<wire::BatchForgetIn>()?.count {
                    let one: wire::ForgetOne = body.take()?;
                    self.nodes.forget(one.node, one.count);
                }
                Ok(())
            }
            op::GETATTR => {
                let stat = self.stat(node)?;
                self.tell_attr(&stat, answer);
                Ok(())
            }
            op::READLINK => self.read_link(node, answer),
            op::OPEN | op::OPENDIR => self.open(node, body, header.opcode == op::OPENDIR, answer),
            op::READ => self.read(body, room, answer),
            op::READDIR => self.read_dir(body, room, answer),
            op::STATFS => self.statfs(answer),
            op::RELEASE | op::RELEASEDIR => {
                self.handles.remove(&body.take::<wire::HandleIn>()?.handle);
                Ok(())
            }
            op::FLUSH => Ok(()),
            op::FSYNC | op::FSYNCDIR => self.sync(body),
            op::DESTROY => {
                self.ready = false;
                Ok(())
            }
            op::SETATTR
            | op::SYMLINK
            | op::MKNOD
            | op::MKDIR
            | op::UNLINK
            | op::RMDIR
            | op::RENAME
            | op::RENAME2
            | op::LINK
            | op::CREATE
            | op::WRITE => {
                if self.access == Access::ReadOnly {
                    return Err(Errno::EROFS);
                }
                self.change(header, body, answer)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn init(&mut self, body: &mut Body<'_>, answer: &mut Vec<u8>) -> Result<(), Errno> {
        const BIG_WRITES: u32 = 1 << 5;
        const MAX_PAGES: u32 = 1 << 22;
        let asked: wire::InitIn = body.take()?;
        if asked.major < wire::MAJOR || (asked.major == wire::MAJOR && asked.minor < wire::MINOR) {
            return Err(Errno::EPROTO);
        }
        // A guest that boots anew knows nothing of what it had.
        self.handles.clear();
        self.nodes = Nodes::new(folder::identity(&self.folder.stat()?));
        self.ready = asked.major == wire::MAJOR;
        let told = wire::InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR,
            readahead: asked.readahead.min(wire::DATA_BYTES_MAX),
            flags: asked.flags & (BIG_WRITES | MAX_PAGES),
            background: 64,
            congestion: 48,
            max_write: wire::DATA_BYTES_MAX,
            time_gran: 1,
            max_pages: 256,
            ..Default::default()
        };
        answer.extend_from_slice(told.as_bytes());
        Ok(())
    }

    /// The directory that the node is, to use names in.
    fn directory(&self, node: u64) -> Result<OwnedFd, Errno> {
        let (fd, _) = self
            .folder
            .locate(&self.nodes.path(node)?, self.nodes.identity(node)?)?;
        Ok(fd)
    }

    /// A node that is no longer at its name can still be open.
    fn stat(&self, node: u64) -> Result<FileStat, Errno> {
        let found = self
            .folder
            .locate(&self.nodes.path(node)?, self.nodes.identity(node)?);
        match found {
            Ok((_, stat)) => Ok(stat),
            Err(Errno::ESTALE) => {
                let open = self
                    .handles
                    .values()
                    .find(|h| h.node == node)
                    .ok_or(Errno::ESTALE)?;
                nix::sys::stat::fstat(&open.file)
            }
            Err(error) => Err(error),
        }
    }

    /// Tells the guest what is at `name` in `parent`.
    fn enter(&mut self, parent: u64, name: &OsStr, answer: &mut Vec<u8>) -> Result<(), Errno> {
        let stat = Folder::look(&self.directory(parent)?, name)?;
        self.tell_entry(parent, name, &stat, answer)
    }

    fn tell_entry(
        &mut self,
        parent: u64,
        name: &OsStr,
        stat: &FileStat,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let node = self.nodes.told(parent, name, folder::identity(stat))?;
        // Nothing is cached: another guest or the host may change it at any time.
        let entry = wire::EntryOut {
            node,
            attr: self.attr(stat),
            ..Default::default()
        };
        answer.extend_from_slice(entry.as_bytes());
        Ok(())
    }

    fn tell_attr(&self, stat: &FileStat, answer: &mut Vec<u8>) {
        let out = wire::AttrOut {
            attr: self.attr(stat),
            ..Default::default()
        };
        answer.extend_from_slice(out.as_bytes());
    }

    fn attr(&self, stat: &FileStat) -> wire::Attr {
        let short = |n: i64| u32::try_from(n).unwrap_or(0);
        wire::Attr {
            ino: stat.st_ino,
            size: stat.st_size.cast_unsigned(),
            blocks: stat.st_blocks.cast_unsigned(),
            atime: stat.st_atime.cast_unsigned(),
            mtime: stat.st_mtime.cast_unsigned(),
            ctime: stat.st_ctime.cast_unsigned(),
            atime_ns: short(stat.st_atime_nsec),
            mtime_ns: short(stat.st_mtime_nsec),
            ctime_ns: short(stat.st_ctime_nsec),
            mode: stat.st_mode,
            nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
            uid: self.ids.users.to_guest(stat.st_uid),
            gid: self.ids.groups.to_guest(stat.st_gid),
            // Numbers of the host's device nodes mean nothing to the guest.
            rdev: 0,
            block_bytes: short(stat.st_blksize),
            flags: 0,
        }
    }

    fn keep(&mut self, node: u64, file: File, answer: &mut Vec<u8>) -> Result<(), Errno> {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Errno::ENFILE);
        }
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(
            handle,
            Handle {
                node,
                file,
                entries: Vec::new(),
            },
        );
        answer.extend_from_slice(
            wire::OpenOut {
                handle,
                ..Default::default()
            }
            .as_bytes(),
        );
        Ok(())
    }
}

const _: () = assert!(ROOT == 1);
