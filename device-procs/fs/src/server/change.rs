//! Requests that change the folder. They are refused before they come here when it is read-only.

use super::content::{open_flags, raw};
use super::data::Transfer;
use super::{HANDLES_MAX, Server};
use crate::folder::{self, Folder};
use crate::nodes::Identity;
use crate::wire::{self, Body, op};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use rustix::fs::{FallocateFlags, RenameFlags, Timespec, Timestamps, renameat_with};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

/// Flag of a write: what is written comes from the guest's cache.
const WRITE_CACHE: u32 = 1;

const SET_MODE: u32 = 1;
const SET_UID: u32 = 1 << 1;
const SET_GID: u32 = 1 << 2;
const SET_SIZE: u32 = 1 << 3;
const SET_ATIME: u32 = 1 << 4;
const SET_MTIME: u32 = 1 << 5;
const SET_ATIME_NOW: u32 = 1 << 7;
const SET_MTIME_NOW: u32 = 1 << 8;

/// Permissions that a guest may give: never set-user-id and set-group-id, which would mean something
/// on the host.
fn mode(asked: u32, umask: u32) -> Mode {
    Mode::from_bits_truncate(asked & 0o1777 & !umask)
}

impl Server {
    pub(super) fn change(
        &mut self,
        header: &wire::InHeader,
        body: &mut Body<'_>,
        transfer: &Transfer<'_>,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let node = header.node;
        match header.opcode {
            op::SETATTR => self.set_attr(node, body, answer),
            op::WRITE => self.write(body, transfer, answer),
            op::CREATE => self.create(node, body, answer),
            op::FALLOCATE => self.allocate(body),
            op::MKNOD => {
                let asked: wire::MknodIn = body.take()?;
                let name = folder::name(body.text()?)?;
                // Device nodes, pipes and sockets would be the host's as well.
                if asked.mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
                    return Err(Errno::EPERM);
                }
                let mode = mode(asked.mode, asked.umask);
                self.make(node, name, answer, |dir| {
                    Folder::create(dir, name, OFlag::O_WRONLY, mode).map(drop)
                })
            }
            op::MKDIR => {
                let asked: wire::MkdirIn = body.take()?;
                let name = folder::name(body.text()?)?;
                let mode = mode(asked.mode, asked.umask);
                self.make(node, name, answer, |dir| mkdirat(dir, name, mode))
            }
            op::SYMLINK => {
                let name = folder::name(body.text()?)?;
                let target = body.text()?;
                let target = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(target);
                self.make(node, name, answer, |dir| symlinkat(target, dir, name))
            }
            op::LINK => {
                let old: wire::LinkIn = body.take()?;
                let name = folder::name(body.text()?)?;
                let expected = self.nodes.identity(old.node)?;
                let (parent, old_name) = self.nodes.place(old.node)?;
                let (from, old_name) = (self.directory(parent)?, old_name.to_owned());
                // By another of its names, the guest finds it when it looks again.
                if identity_at(&from, &old_name) != Some(expected) {
                    return Err(Errno::ESTALE);
                }
                self.make(node, name, answer, |dir| {
                    linkat(&from, old_name.as_os_str(), dir, name, LinkatFlags::empty())
                })?;
                // It stays where it was: the new name may be the first to go.
                self.nodes.moved(expected, parent, &old_name);
                self.journal.moved(expected, parent, &old_name);
                Ok(())
            }
            op::UNLINK => self.remove(node, body, UnlinkatFlags::NoRemoveDir),
            op::RMDIR => self.remove(node, body, UnlinkatFlags::RemoveDir),
            op::RENAME => {
                let asked: wire::RenameIn = body.take()?;
                self.rename(node, asked.new_parent, RenameFlags::empty(), body)
            }
            op::RENAME2 => {
                let asked: wire::Rename2In = body.take()?;
                // A whiteout is a device node.
                let allowed = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
                let flags = RenameFlags::from_bits(asked.flags)
                    .filter(|flags| allowed.contains(*flags))
                    .ok_or(Errno::EINVAL)?;
                self.rename(node, asked.new_parent, flags, body)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    /// Makes something at `name`, unless a predecessor did before it died.
    fn make(
        &mut self,
        parent: u64,
        name: &OsStr,
        answer: &mut Vec<u8>,
        make: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let dir = self.directory(parent)?;
        let now = identity_at(&dir, name);
        let before = self.announce([now, None]);
        let was_made = before.is_some_and(|before| before[0].is_none()) && now.is_some();
        if !was_made {
            make(&dir)?;
        }
        self.enter(parent, name, answer)
    }

    fn create(
        &mut self,
        parent: u64,
        body: &mut Body<'_>,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::CreateIn = body.take()?;
        let name = folder::name(body.text()?)?;
        if self.handles.len() >= HANDLES_MAX || self.nodes.len() >= crate::nodes::NODES_MAX {
            return Err(Errno::ENFILE);
        }
        let flags = open_flags(asked.flags);
        let exclusive =
            OFlag::from_bits_truncate(asked.flags.cast_signed()).contains(OFlag::O_EXCL);
        let dir = self.directory(parent)?;
        let now = identity_at(&dir, name);
        let before = self.announce([now, None]);
        let was_made = before.is_some_and(|before| before[0].is_none()) && now.is_some();
        let made = Folder::create(
            &dir,
            name,
            flags - OFlag::O_TRUNC,
            mode(asked.mode, asked.umask),
        );
        match made {
            Ok(file) => {
                let start = answer.len();
                self.tell_entry(parent, name, &fstat(&file)?, answer)?;
                let node = told_node(answer, start)?;
                self.keep(node, file, asked.flags, false, answer)
            }
            // Another guest, the host, or a predecessor was faster.
            Err(Errno::EEXIST) if !exclusive || was_made => {
                let start = answer.len();
                self.enter(parent, name, answer)?;
                let node = told_node(answer, start)?;
                // The guest does not learn of the node, so it will not forget it.
                let opened = self.open_node(node, flags);
                let file = opened.inspect_err(|_| self.forget(node, 1))?;
                self.keep(node, file, asked.flags, false, answer)
            }
            Err(error) => Err(error),
        }
    }

    /// Room for data, or a hole, or zeroes. What moves data is not done.
    fn allocate(&mut self, body: &mut Body<'_>) -> Result<(), Errno> {
        let asked: wire::FallocateIn = body.take()?;
        let allowed =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let flags = FallocateFlags::from_bits(asked.mode)
            .filter(|flags| allowed.contains(*flags))
            .ok_or(Errno::EOPNOTSUPP)?;
        let file = self.file(asked.handle)?;
        rustix::fs::fallocate(file, flags, asked.offset, asked.length).map_err(raw)
    }

    fn write(
        &mut self,
        body: &mut Body<'_>,
        transfer: &Transfer<'_>,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::WriteIn = body.take()?;
        let size =
            usize::try_from(asked.size.min(wire::DATA_BYTES_MAX)).map_err(|_| Errno::EINVAL)?;
        if size > transfer.data.given() {
            return Err(Errno::EINVAL);
        }
        let held = self.handles.get(&asked.handle).ok_or(Errno::EBADF)?;
        let (opened, appender) = (held.opened, OFlag::O_APPEND);
        // Pages that were changed in a map have their place, and whether a program appends can change while it
        // has the file open.
        let from_cache = asked.write_flags & WRITE_CACHE != 0;
        let appends = open_flags(asked.flags).contains(appender) && !from_cache;
        let written = if appends {
            self.append(asked.handle, transfer, size)?
        } else if open_flags(opened.flags).contains(appender) {
            // With O_APPEND the host knows no other place than the end.
            let file = self.open_node(opened.node, OFlag::O_WRONLY)?;
            transfer.drain(&file, asked.offset, size)?
        } else {
            transfer.drain(self.file(asked.handle)?, asked.offset, size)?
        };
        let size = u32::try_from(written).map_err(|_| Errno::EIO)?;
        answer.extend_from_slice(wire::WriteOut { size, pad: 0 }.as_bytes());
        Ok(())
    }

    /// Appends, unless a predecessor did: then the data is where the file ended before.
    fn append(
        &mut self,
        handle: u64,
        transfer: &Transfer<'_>,
        size: usize,
    ) -> Result<usize, Errno> {
        let end = fstat(self.file(handle)?)?.st_size.cast_unsigned();
        // The word for an inode number is that of the end here, counted from 1.
        let mark = |end: u64| {
            Some(Identity {
                dev: 0,
                ino: end + 1,
            })
        };
        let before = self.announce([mark(end), None]);
        let began_at = before.and_then(|before| before[0]);
        let began_at = began_at.map(|mark| mark.ino.saturating_sub(1));
        let opened = self.handles.get(&handle).map(|held| held.opened);
        let opened = opened.ok_or(Errno::EBADF)?;
        match began_at {
            Some(began_at) if end > began_at => {
                // Its own file cannot be read if it was opened for writing alone.
                let file = self.open_node(opened.node, OFlag::O_RDONLY);
                let file = file.map_err(|_| Errno::EIO)?;
                let (mut there, mut data) = (vec![0; size], vec![0; size]);
                transfer.data.copy(&mut data);
                let read = file.read_exact_at(&mut there, began_at);
                // A part, or something else: nobody knows.
                match read.is_ok() && there == data {
                    true => Ok(size),
                    false => Err(Errno::EIO),
                }
            }
            // The offset means nothing: the file ends there, wherever that is.
            _ => transfer.drain(self.file(handle)?, end, size),
        }
    }

    fn remove(
        &mut self,
        parent: u64,
        body: &mut Body<'_>,
        flags: UnlinkatFlags,
    ) -> Result<(), Errno> {
        let name = folder::name(body.text()?)?;
        let dir = self.directory(parent)?;
        let (now, has_others) = identity_and_names(&dir, name);
        let before = self.announce([now, None]).and_then(|before| before[0]);
        let was_removed = before.is_some() && before != now;
        if !was_removed {
            unlinkat(&dir, name, flags)?;
        }
        if let Some(gone) = before.or(now).filter(|_| !has_others) {
            self.nodes.removed(parent, name, gone);
            self.journal.removed(parent, name, gone);
        }
        Ok(())
    }

    fn rename(
        &mut self,
        parent: u64,
        new_parent: u64,
        flags: RenameFlags,
        body: &mut Body<'_>,
    ) -> Result<(), Errno> {
        let (name, new_name) = (folder::name(body.text()?)?, folder::name(body.text()?)?);
        let (from, to) = (self.directory(parent)?, self.directory(new_parent)?);
        let (target, has_others) = identity_and_names(&to, new_name);
        let now = [identity_at(&from, name), target];
        let before = self.announce(now);
        let [old, replaced] = before.unwrap_or(now);
        // What was at the old name is at the new one, and no longer at the old one.
        let was_renamed = before.is_some() && old.is_some() && now[1] == old && now[0] != old;
        if !was_renamed {
            renameat_with(&from, name, &to, new_name, flags).map_err(raw)?;
        }
        if let Some(gone) = replaced
            && !flags.contains(RenameFlags::EXCHANGE)
            // Two names of one file stay as they are.
            && replaced != old
            && !has_others
        {
            self.nodes.removed(new_parent, new_name, gone);
            self.journal.removed(new_parent, new_name, gone);
        }
        for (dir, at, name) in [(&from, parent, name), (&to, new_parent, new_name)] {
            if let Some(of) = identity_at(dir, name) {
                self.nodes.moved(of, at, name);
                self.journal.moved(of, at, name);
            }
        }
        Ok(())
    }

    fn set_attr(
        &mut self,
        node: u64,
        body: &mut Body<'_>,
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let asked: wire::SetattrIn = body.take()?;
        let has = |bit| asked.valid & bit != 0;
        if has(SET_SIZE) {
            // What was opened to read alone is truncated by its name, as when it is opened with O_TRUNC.
            let held = self.handles.get(&asked.handle).is_some_and(|held| {
                let access = open_flags(held.opened.flags) & OFlag::O_ACCMODE;
                held.opened.node == node && access != OFlag::O_RDONLY
            });
            let done = match held {
                true => self.file(asked.handle)?.set_len(asked.size),
                false => self.open_node(node, OFlag::O_WRONLY)?.set_len(asked.size),
            };
            done.map_err(|e| folder::errno(&e))?;
        }
        let owner = |bit, id, map: &crate::IdMap| match has(bit) {
            true => map.to_host(id).map(Some).ok_or(Errno::EPERM),
            false => Ok(None),
        };
        let user = owner(SET_UID, asked.uid, &self.terms.ids.users)?.map(Uid::from_raw);
        let group = owner(SET_GID, asked.gid, &self.terms.ids.groups)?.map(Gid::from_raw);
        let times = SET_ATIME | SET_MTIME;
        if asked.valid & (SET_MODE | SET_UID | SET_GID | times) != 0 {
            self.reach(node, |fd| {
                if user.is_some() || group.is_some() {
                    let flags = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
                    fchownat(fd, "", user, group, flags)?;
                }
                if has(SET_MODE) {
                    bulkhead_runtime::change_mode(fd, mode(asked.mode, 0).bits())?;
                }
                if asked.valid & times != 0 {
                    let (access, change) =
                        ((asked.atime, asked.atime_ns), (asked.mtime, asked.mtime_ns));
                    let times = Timestamps {
                        last_access: time(has(SET_ATIME), has(SET_ATIME_NOW), access),
                        last_modification: time(has(SET_MTIME), has(SET_MTIME_NOW), change),
                    };
                    let flags = rustix::fs::AtFlags::EMPTY_PATH;
                    rustix::fs::utimensat(fd, "", &times, flags).map_err(raw)?;
                }
                Ok(())
            })?;
        }
        let stat = self.stat(node)?;
        self.tell_attr(&stat, answer);
        Ok(())
    }
}

const fn time(set: bool, now: bool, (seconds, ns): (u64, u32)) -> Timespec {
    match (set, now) {
        (false, _) => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_OMIT,
        },
        (true, true) => Timespec {
            tv_sec: 0,
            tv_nsec: rustix::fs::UTIME_NOW,
        },
        // Past a second, the kernel would take some numbers for "now" or "as it is".
        (true, false) => {
            let ns = if ns < 1_000_000_000 { ns } else { 999_999_999 };
            Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: ns as i64,
            }
        }
    }
}

/// Which file is at `name`, if there is one, and whether it has other names as well: then it is not gone with
/// this one.
fn identity_and_names(dir: &OwnedFd, name: &OsStr) -> (Option<Identity>, bool) {
    let found = Folder::look(dir, name).ok();
    let others = |stat: &FileStat| folder::kind(stat) != SFlag::S_IFDIR && stat.st_nlink > 1;
    (
        found.as_ref().map(folder::identity),
        found.as_ref().is_some_and(others),
    )
}

/// Which file is at `name`, if there is one.
fn identity_at(dir: &OwnedFd, name: &OsStr) -> Option<Identity> {
    Folder::look(dir, name)
        .ok()
        .map(|stat| folder::identity(&stat))
}

/// The number of the node that the entry at `start` of the answer tells of.
fn told_node(answer: &[u8], start: usize) -> Result<u64, Errno> {
    let bytes = answer
        .get(start..start + 8)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map(u64::from_le_bytes).ok_or(Errno::EIO)
}
