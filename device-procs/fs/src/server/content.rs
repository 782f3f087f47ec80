//! Requests that only look: content, directories, links.

use super::data::Transfer;
use super::{Access, HANDLES_MAX, Server};
use crate::folder::{self, Folder};
use crate::wire::{self, Body};
use nix::errno::Errno;
use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::SFlag;
use nix::sys::statvfs::fstatvfs;
use rustix::fs::{FileType, RawDir, SeekFrom};
use std::ffi::OsStr;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use zerocopy::IntoBytes;

/// Bytes of a directory that are read at a time, at most.
const LISTING_BYTES: usize = 64 << 10;

impl Server {
    pub(super) fn open(
        &mut self,
        node: u64,
        body: &mut Body<'_>,
        directory: bool,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::OpenIn = body.take()?;
        if self.handles.len() >= HANDLES_MAX {
            return Err(Errno::ENFILE);
        }
        let flags = if directory {
            OFlag::O_RDONLY | OFlag::O_DIRECTORY
        } else {
            open_flags(asked.flags)
        };
        let changes = flags.intersects(OFlag::O_WRONLY | OFlag::O_RDWR | OFlag::O_TRUNC);
        if changes && self.access == Access::ReadOnly {
            return Err(Errno::EROFS);
        }
        let file = self.open_node(node, flags)?;
        self.keep(node, file, asked.flags, directory, answer)
    }

    pub(super) fn read(
        &mut self,
        body: &mut Body<'_>,
        transfer: &mut Transfer<'_>,
        room: usize,
    ) -> Result<(), Errno> {
        let asked: wire::ReadIn = body.take()?;
        let file = self.file(asked.handle)?;
        let size = usize::try_from(asked.size.min(wire::DATA_BYTES_MAX)).unwrap_or(0);
        transfer.fill(file, asked.offset, size.min(room))
    }

    /// Entries of a directory from the place that the host's file system has given: nothing is remembered of
    /// it here. With `plus`, the directory's node, also what each entry is.
    pub(super) fn read_dir(
        &mut self,
        plus: Option<u64>,
        body: &mut Body<'_>,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::ReadIn = body.take()?;
        let directory = self.take_file(asked.handle)?;
        let done = self.list(&directory, plus, &asked, room, answer);
        self.put_back(asked.handle, directory);
        done
    }

    fn list(
        &mut self,
        directory: &File,
        plus: Option<u64>,
        asked: &wire::ReadIn,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let start = answer.len();
        let size = usize::try_from(asked.size).unwrap_or(usize::MAX);
        let end = room.min(start.saturating_add(size));
        rustix::fs::seek(directory, SeekFrom::Start(asked.offset)).map_err(raw)?;
        let mut buffer = vec![MaybeUninit::uninit(); size.clamp(4096, LISTING_BYTES)];
        let mut entries = RawDir::new(directory, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                // What was told is told.
                Err(_) if answer.len() > start => break,
                entry => entry.map_err(raw)?,
            };
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            // What is above the folder is none of the guest's business.
            if name == "." || name == ".." {
                continue;
            }
            let front = if plus.is_some() {
                size_of::<wire::EntryOut>()
            } else {
                0
            };
            let bytes = front + size_of::<wire::Dirent>() + name.len().next_multiple_of(8);
            if answer.len() + bytes > end {
                break;
            }
            if let Some(node) = plus {
                // What is gone or cannot be told is listed without: the guest looks it up if it wants to.
                let stat = Folder::look(directory, name);
                let told = stat.and_then(|stat| self.entry(node, name, &stat));
                answer.extend_from_slice(told.unwrap_or_default().as_bytes());
            }
            let dirent = wire::Dirent {
                ino: entry.ino(),
                next: entry.next_entry_cookie(),
                name_bytes: u32::try_from(name.len()).map_err(|_| Errno::EIO)?,
                kind: kind_of(entry.file_type()),
            };
            answer.extend_from_slice(dirent.as_bytes());
            answer.extend_from_slice(name.as_bytes());
            answer.resize(answer.len().next_multiple_of(8), 0);
        }
        Ok(())
    }

    /// Where the next data, or the next hole, begins.
    pub(super) fn seek(&mut self, body: &mut Body<'_>, answer: &mut Vec<u8>) -> Result<(), Errno> {
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let asked: wire::LseekIn = body.take()?;
        let to = match asked.whence {
            SEEK_DATA => SeekFrom::Data(asked.offset),
            SEEK_HOLE => SeekFrom::Hole(asked.offset),
            // The guest's kernel does all others by itself.
            _ => return Err(Errno::EINVAL),
        };
        let offset = rustix::fs::seek(self.file(asked.handle)?, to).map_err(raw)?;
        answer.extend_from_slice(wire::LseekOut { offset }.as_bytes());
        Ok(())
    }

    pub(super) fn read_link(&self, node: u64, answer: &mut Vec<u8>) -> Result<(), Errno> {
        let (fd, stat) = self
            .folder
            .locate(&self.nodes.path(node)?, self.nodes.identity(node)?)?;
        if folder::kind(&stat) != SFlag::S_IFLNK {
            return Err(Errno::EINVAL);
        }
        answer.extend_from_slice(&readlinkat(&fd, "")?.into_vec());
        Ok(())
    }

    pub(super) fn statfs(&self, answer: &mut Vec<u8>) -> Result<(), Errno> {
        let told = fstatvfs(&self.directory(crate::nodes::ROOT)?)?;
        let out = wire::StatfsOut {
            blocks: told.blocks(),
            free: told.blocks_free(),
            available: told.blocks_available(),
            files: told.files(),
            files_free: told.files_free(),
            block_bytes: u32::try_from(told.block_size()).unwrap_or(4096),
            name_bytes_max: u32::try_from(told.name_max()).unwrap_or(255),
            fragment_bytes: u32::try_from(told.fragment_size()).unwrap_or(4096),
            ..Default::default()
        };
        answer.extend_from_slice(out.as_bytes());
        Ok(())
    }

    pub(super) fn sync(&mut self, body: &mut Body<'_>) -> Result<(), Errno> {
        let asked: wire::HandleIn = body.take()?;
        let file = self.file(asked.handle)?;
        let done = if asked.flags & 1 == 1 {
            file.sync_data()
        } else {
            file.sync_all()
        };
        done.map_err(|e| folder::errno(&e))
    }
}

/// Of the guest's flags, those that mean something here. With O_APPEND the host gives the offset, so that nobody
/// who appends at the same time is overwritten.
pub(super) const fn open_flags(flags: u32) -> OFlag {
    let known = OFlag::O_ACCMODE
        .union(OFlag::O_TRUNC)
        .union(OFlag::O_APPEND)
        .union(OFlag::O_SYNC)
        .union(OFlag::O_DSYNC);
    OFlag::from_bits_truncate(flags.cast_signed()).intersection(known)
}

/// The error number of another crate's.
pub(super) fn raw(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// As readdir(3) numbers them.
const fn kind_of(kind: FileType) -> u32 {
    match kind {
        FileType::Fifo => 1,
        FileType::CharacterDevice => 2,
        FileType::Directory => 4,
        FileType::BlockDevice => 6,
        FileType::RegularFile => 8,
        FileType::Symlink => 10,
        FileType::Socket => 12,
        FileType::Unknown => 0,
    }
}
