//! One FUSE request in, one answer out.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod change;
mod content;
mod data;

use crate::folder::{self, Folder};
use crate::ids::IdMap;
use crate::journal::{Begun, Journal, Left, Opened};
use crate::nodes::{Identity, Nodes, ROOT};
use crate::wire::{self, Body, op};
use bulkhead_runtime::Kept;
use data::Transfer;
pub use data::{Data, Held, front_bytes};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::FileStat;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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
pub(crate) const HANDLES_MAX: usize = 1024;

#[derive(Debug)]
struct Handle {
    opened: Opened,
    /// None for one that a predecessor opened, until it is used.
    file: Option<File>,
}

/// How the guest is served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    /// How owners are translated.
    pub ids: Ids,
    /// How long the guest may believe names and attributes without asking, in milliseconds. What others
    /// change meanwhile it sees late.
    pub cache_ms: u32,
}

/// The server of one folder for one guest.
#[derive(Debug)]
pub struct Server {
    folder: Folder,
    access: Access,
    terms: Terms,
    root: Identity,
    journal: Journal,
    /// Number of the request that is being done; 0 for none.
    number: u64,
    /// What a predecessor died in the middle of, and what it had done.
    left_begun: Option<Begun>,
    left_done: Option<(u64, Vec<u8>)>,
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
    ready: bool,
}

impl Server {
    /// Serves the directory `folder`, which may be an O_PATH descriptor. What is kept goes on where a predecessor
    /// stopped.
    ///
    /// # Errors
    /// That of `fstat`.
    pub fn new(
        folder: OwnedFd,
        access: Access,
        terms: Terms,
        kept: Option<Kept>,
    ) -> std::io::Result<Self> {
        let folder = Folder::new(folder);
        let root = folder::identity(&folder.stat()?);
        let mut journal = Journal::new(kept);
        let left = journal.recall(root);
        if left.is_none() {
            journal.clear();
        }
        let left = left.unwrap_or_else(|| Left {
            ready: false,
            nodes: Nodes::new(root),
            handles: Vec::new(),
            next_handle: 1,
            begun: None,
            done: None,
        });
        let handles = left.handles.into_iter().map(|opened| {
            let handle = Handle { opened, file: None };
            (opened.handle, handle)
        });
        Ok(Self {
            folder,
            access,
            terms,
            root,
            journal,
            number: 0,
            left_begun: left.begun,
            left_done: left.done,
            nodes: left.nodes,
            handles: handles.collect(),
            next_handle: left.next_handle,
            ready: left.ready,
        })
    }

    /// The guest's driver is gone, and with it everything that it knew.
    pub fn forget_all(&mut self) {
        if self.ready || self.nodes.len() > 0 || !self.handles.is_empty() {
            self.begin_session(false);
            self.journal.publish();
        }
    }

    fn begin_session(&mut self, ready: bool) {
        self.handles.clear();
        self.nodes = Nodes::new(self.root);
        self.ready = ready;
        self.journal.session(ready);
    }

    /// Serves the request with this number, from 1, as [`Server::serve_in_place`]. One that a predecessor has
    /// done is answered as it was; a change in the middle of which it died is made if it was not.
    pub fn serve_numbered(
        &mut self,
        number: u64,
        request: &[u8],
        data: &mut dyn Data,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> usize {
        if let Some((done, told)) = &self.left_done
            && *done == number
            && number > 0
        {
            answer.clear();
            answer.extend_from_slice(told.get(..told.len().min(room)).unwrap_or_default());
            return 0;
        }
        if self.journal.is_long() {
            let opened = self.handles.values().map(|handle| handle.opened);
            self.journal
                .renew(self.ready, &self.nodes, opened, self.next_handle);
        }
        self.number = number;
        let filled = self.serve_in_place(request, data, room, answer);
        self.number = 0;
        if self.left_begun.is_some_and(|begun| begun.number == number) {
            self.left_begun = None;
        }
        if self.journal.has_news() {
            // What has data has read them, and a successor reads them again.
            match filled {
                0 => self.journal.done(number, answer),
                _ => self.journal.done(0, &[]),
            }
        }
        filled
    }

    /// Announces a change that must not be made twice, whose names mean `before` now. Returns what they
    /// meant before a predecessor began with it, if it died in the middle of it.
    fn announce(&mut self, before: [Option<Identity>; 2]) -> Option<[Option<Identity>; 2]> {
        let begun = self.left_begun.filter(|begun| begun.number == self.number);
        if self.number > 0 {
            // Its end is noted, whatever comes of it.
            self.journal.changes();
            if begun.is_none() {
                self.journal.begin(self.number, before);
            }
        }
        begun.map(|begun| begun.before)
    }

    /// Serves one request, all of which is in `request`, as [`Server::serve_in_place`]. Data that are read are
    /// in `answer`, too.
    pub fn serve(&mut self, request: &[u8], room: usize, answer: &mut Vec<u8>) {
        let (request, given) = request.split_at(front_bytes(request).min(request.len()));
        let mut data = Held::new(given);
        let filled = self.serve_in_place(request, &mut data, room, answer);
        answer.extend_from_slice(data.got.get(..filled).unwrap_or_default());
    }

    /// Serves one request and puts the answer into `answer` (what it held is dropped). It stays empty where FUSE
    /// has no answer (forgetting, or a request without a whole header). Of a request that is longer than
    /// [`front_bytes`], only so many are in `request`, the others in `data`. Data that are read are put into `data`;
    /// returns how many: with them the answer has at most `room` bytes. Blocks as long as the host's file system
    /// does.
    pub fn serve_in_place(
        &mut self,
        request: &[u8],
        data: &mut dyn Data,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> usize {
        answer.clear();
        let mut body = Body(request);
        let Ok(header) = body.take::<wire::InHeader>() else {
            return 0;
        };
        if room < size_of::<wire::OutHeader>()
            && !matches!(header.opcode, op::FORGET | op::BATCH_FORGET)
        {
            return 0;
        }
        let mut out = wire::OutHeader {
            unique: header.unique,
            ..Default::default()
        };
        answer.extend_from_slice(out.as_bytes());
        let bytes = request.len().saturating_add(data.given());
        let whole = usize::try_from(header.len).is_ok_and(|len| len == bytes);
        let mut transfer = Transfer { data, filled: 0 };
        let done = if !whole || bytes > wire::REQUEST_BYTES_MAX {
            Err(Errno::EINVAL)
        } else {
            self.operate(&header, &mut body, &mut transfer, room, answer)
        };
        let mut filled = transfer.filled;
        if matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
            answer.clear();
            return 0;
        }
        if let Err(error) = done {
            answer.truncate(size_of::<wire::OutHeader>());
            out.error = -(error as i32);
            filled = 0;
        }
        // What is done is done, but an answer that has no room is none (the guest gave the room).
        if answer.len().saturating_add(filled) > room {
            answer.truncate(size_of::<wire::OutHeader>());
            out.error = -(Errno::EIO as i32);
            filled = 0;
        }
        out.len = u32::try_from(answer.len().saturating_add(filled)).unwrap_or(u32::MAX);
        if let Some(place) = answer.get_mut(..size_of::<wire::OutHeader>()) {
            place.copy_from_slice(out.as_bytes());
        }
        filled
    }

    fn operate(
        &mut self,
        header: &wire::InHeader,
        body: &mut Body<'_>,
        transfer: &mut Transfer<'_>,
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
                let count = body.take::<wire::ForgetIn>()?.count;
                self.forget(node, count);
                Ok(())
            }
            op::BATCH_FORGET => {
                for _ in 0..body.take::<wire::BatchForgetIn>()?.count {
                    let one: wire::ForgetOne = body.take()?;
                    self.forget(one.node, one.count);
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
            op::READ => self.read(body, transfer, room - answer.len().min(room)),
            op::READDIR => self.read_dir(None, body, room, answer),
            op::READDIRPLUS => self.read_dir(Some(node), body, room, answer),
            op::LSEEK => self.seek(body, answer),
            op::STATFS => self.statfs(answer),
            op::RELEASE | op::RELEASEDIR => {
                let handle = body.take::<wire::HandleIn>()?.handle;
                if self.handles.remove(&handle).is_some() {
                    self.journal.released(handle);
                }
                Ok(())
            }
            op::FLUSH => Ok(()),
            op::FSYNC | op::FSYNCDIR => self.sync(body),
            op::DESTROY => {
                self.begin_session(false);
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
            | op::FALLOCATE
            | op::WRITE => {
                if self.access == Access::ReadOnly {
                    return Err(Errno::EROFS);
                }
                self.change(header, body, transfer, answer)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn init(&mut self, body: &mut Body<'_>, answer: &mut Vec<u8>) -> Result<(), Errno> {
        /// What the guest's kernel may do: read several pages at a time, write more than a page, notice by the
        /// time of a change that its pages are old, read directories together with what their entries are, look
        /// names up side by side, and use large requests. Not to truncate while it opens (1 << 3): Linux does so
        /// before it finds that a file is executed, which may not be truncated.
        const WANTED: u32 = 1 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22;
        let asked: wire::InitIn = body.take()?;
        if asked.major < wire::MAJOR || (asked.major == wire::MAJOR && asked.minor < wire::MINOR) {
            return Err(Errno::EPROTO);
        }
        // A guest that boots anew knows nothing of what it had.
        self.begin_session(asked.major == wire::MAJOR);
        let told = wire::InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR,
            readahead: asked.readahead.min(wire::DATA_BYTES_MAX),
            flags: asked.flags & WANTED,
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
            Err(Errno::ESTALE) => nix::sys::stat::fstat(self.open_file(node)?),
            Err(error) => Err(error),
        }
    }

    /// Does something with the node, which is found by its name, or else by what is open.
    fn reach(
        &self,
        node: u64,
        act: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let found = self
            .folder
            .locate(&self.nodes.path(node)?, self.nodes.identity(node)?);
        match found {
            Ok((fd, _)) => act(fd.as_fd()),
            Err(Errno::ESTALE) => act(self.open_file(node)?.as_fd()),
            Err(error) => Err(error),
        }
    }

    /// A file that the guest has open as the node; ESTALE when there is none.
    fn open_file(&self, node: u64) -> Result<&File, Errno> {
        let open = self.handles.values().filter(|h| h.opened.node == node);
        open.filter_map(|h| h.file.as_ref())
            .next()
            .ok_or(Errno::ESTALE)
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
        let entry = self.entry(parent, name, stat)?;
        answer.extend_from_slice(entry.as_bytes());
        Ok(())
    }

    /// The guest is told of what is at `name` in `parent`.
    fn entry(
        &mut self,
        parent: u64,
        name: &OsStr,
        stat: &FileStat,
    ) -> Result<wire::EntryOut, Errno> {
        let of = folder::identity(stat);
        let node = self.nodes.told(parent, name, of)?;
        self.journal.told(parent, name, of);
        let (seconds, ns) = self.validity();
        Ok(wire::EntryOut {
            node,
            entry_valid: seconds,
            attr_valid: seconds,
            entry_valid_ns: ns,
            attr_valid_ns: ns,
            attr: self.attr(stat),
            ..Default::default()
        })
    }

    fn forget(&mut self, node: u64, count: u64) {
        self.nodes.forget(node, count);
        self.journal.forgot(node, count);
    }

    /// How long the guest may believe what it is told.
    fn validity(&self) -> (u64, u32) {
        let ms = self.terms.cache_ms;
        (u64::from(ms / 1000), ms % 1000 * 1_000_000)
    }

    fn tell_attr(&self, stat: &FileStat, answer: &mut Vec<u8>) {
        let (valid, valid_ns) = self.validity();
        let out = wire::AttrOut {
            valid,
            valid_ns,
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
            uid: self.terms.ids.users.to_guest(stat.st_uid),
            gid: self.terms.ids.groups.to_guest(stat.st_gid),
            // Numbers of the host's device nodes mean nothing to the guest.
            rdev: 0,
            block_bytes: short(stat.st_blksize),
            flags: 0,
        }
    }

    /// Takes the file behind a handle, to be put back by [`Server::put_back`].
    fn take_file(&mut self, handle: u64) -> Result<File, Errno> {
        self.file(handle)?;
        let held = self.handles.get_mut(&handle).ok_or(Errno::EBADF)?;
        held.file.take().ok_or(Errno::EBADF)
    }

    fn put_back(&mut self, handle: u64, file: File) {
        if let Some(held) = self.handles.get_mut(&handle) {
            held.file = Some(file);
        }
    }

    /// The file behind a handle. One that a predecessor had opened is opened again; EIO when it is gone.
    fn file(&mut self, handle: u64) -> Result<&File, Errno> {
        let held = self.handles.get(&handle).ok_or(Errno::EBADF)?;
        if held.file.is_none() {
            let opened = held.opened;
            let flags = match opened.directory {
                true => OFlag::O_RDONLY | OFlag::O_DIRECTORY,
                false => content::open_flags(opened.flags) - OFlag::O_TRUNC,
            };
            let file = self.open_node(opened.node, flags).map_err(|error| {
                tracing::warn!(%error, "a file that was open is lost");
                Errno::EIO
            })?;
            let held = self.handles.get_mut(&handle).ok_or(Errno::EBADF)?;
            held.file = Some(file);
        }
        let held = self.handles.get(&handle).and_then(|h| h.file.as_ref());
        held.ok_or(Errno::EBADF)
    }

    fn open_node(&self, node: u64, flags: OFlag) -> Result<File, Errno> {
        let (path, identity) = (self.nodes.path(node)?, self.nodes.identity(node)?);
        self.folder.open(&path, identity, flags)
    }

    fn keep(
        &mut self,
        node: u64,
        file: File,
        flags: u32,
        directory: bool,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Errno::ENFILE);
        }
        let handle = self.next_handle;
        self.next_handle += 1;
        let opened = Opened {
            handle,
            node,
            flags,
            directory,
        };
        self.journal.opened(&opened);
        let file = Some(file);
        self.handles.insert(handle, Handle { opened, file });
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
