//! Requests that only look: content, directories, links.

use super::{Access, HANDLES_MAX, Server};
use crate::folder;
use crate::wire::{self, Body};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::{Mode, SFlag};
use nix::sys::statvfs::fstatvfs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

/// Entries that a directory may have; reading a larger one is EOVERFLOW.
const ENTRIES_MAX: usize = 1 << 17;

/// An entry of a directory.
#[derive(Debug)]
pub(super) struct Entry {
    ino: u64,
    kind: u32,
    name: Vec<u8>,
}

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
        let file = self
            .folder
            .open(&self.nodes.path(node)?, self.nodes.identity(node)?, flags)?;
        self.keep(node, file, answer)
    }

    pub(super) fn read(
        &self,
        body: &mut Body<'_>,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::ReadIn = body.take()?;
        let handle = self.handles.get(&asked.handle).ok_or(Errno::EBADF)?;
        let start = answer.len();
        let size = usize::try_from(asked.size.min(wire::DATA_BYTES_MAX)).unwrap_or(0);
        answer.resize(start + size.min(room.saturating_sub(start)), 0);
        let mut filled = start;
        while let Some(rest) = answer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let done = (filled - start) as u64;
            let offset = asked.offset.checked_add(done).ok_or(Errno::EINVAL)?;
            match handle.file.read_at(rest, offset) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) if filled > start => break,
                Err(e) => return Err(folder::errno(&e)),
            }
        }
        answer.truncate(filled);
        Ok(())
    }

    pub(super) fn read_dir(
        &mut self,
        body: &mut Body<'_>,
        room: usize,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::ReadIn = body.take()?;
        let handle = self.handles.get_mut(&asked.handle).ok_or(Errno::EBADF)?;
        if asked.offset == 0 {
            handle.entries = entries(&handle.file)?;
        }
        let size = usize::try_from(asked.size).unwrap_or(usize::MAX);
        let end = room.min(answer.len().saturating_add(size));
        let from = usize::try_from(asked.offset).map_err(|_| Errno::EINVAL)?;
        for (at, entry) in handle.entries.iter().enumerate().skip(from) {
            let bytes = size_of::<wire::Dirent>() + entry.name.len().next_multiple_of(8);
            if answer.len() + bytes > end {
                break;
            }
            let name_bytes = u32::try_from(entry.name.len()).map_err(|_| Errno::EIO)?;
            let next = at as u64 + 1;
            let dirent = wire::Dirent {
                ino: entry.ino,
                next,
                name_bytes,
                kind: entry.kind,
            };
            answer.extend_from_slice(dirent.as_bytes());
            answer.extend_from_slice(&entry.name);
            answer.resize(answer.len().next_multiple_of(8), 0);
        }
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

    pub(super) fn sync(&self, body: &mut Body<'_>) -> Result<(), Errno> {
        let asked: wire::HandleIn = body.take()?;
        let handle = self.handles.get(&asked.handle).ok_or(Errno::EBADF)?;
        let done = if asked.flags & 1 == 1 {
            handle.file.sync_data()
        } else {
            handle.file.sync_all()
        };
        done.map_err(|e| folder::errno(&e))
    }
}

/// Of the guest's flags, those that mean something here. O_APPEND does not: the guest's kernel gives
/// the offset.
pub(super) const fn open_flags(flags: u32) -> OFlag {
    let known = OFlag::O_ACCMODE
        .union(OFlag::O_TRUNC)
        .union(OFlag::O_SYNC)
        .union(OFlag::O_DSYNC);
    OFlag::from_bits_truncate(flags.cast_signed()).intersection(known)
}

fn entries(directory: &std::fs::File) -> Result<Vec<Entry>, Errno> {
    // A stream of its own, so that no position is shared.
    let mut stream = Dir::openat(
        directory,
        ".",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    let mut entries = Vec::new();
    for entry in stream.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        // What is above the folder is none of the guest's business.
        if name == b"." || name == b".." {
            continue;
        }
        if entries.len() == ENTRIES_MAX {
            return Err(Errno::EOVERFLOW);
        }
        let kind = entry.file_type().map_or(0, |kind| match kind {
            nix::dir::Type::Fifo => 1,
            nix::dir::Type::CharacterDevice => 2,
            nix::dir::Type::Directory => 4,
            nix::dir::Type::BlockDevice => 6,
            nix::dir::Type::File => 8,
            nix::dir::Type::Symlink => 10,
            nix::dir::Type::Socket => 12,
        });
        let name = std::ffi::OsStr::from_bytes(name).as_bytes().to_vec();
        entries.push(Entry {
            ino: entry.ino(),
            kind,
            name,
        });
    }
    Ok(entries)
}
