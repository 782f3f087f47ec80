//! Requests that change the folder. They are refused before they come here when it is read-only.

use super::content::open_flags;
use super::{HANDLES_MAX, Server};
use crate::folder::{self, Folder};
use crate::wire::{self, Body, op};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, renameat2};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstat, mkdirat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use zerocopy::IntoBytes;

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
        answer: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let node = header.node;
        match header.opcode {
            op::SETATTR => self.set_attr(node, body, answer),
            op::WRITE => self.write(body, answer),
            op::CREATE => self.create(node, body, answer),
            op::MKNOD => {
                let asked: wire::MknodIn = body.take()?;
                let name = folder::name(body.text()?)?;
                // Device nodes, pipes and sockets would be the host's as well.
                if asked.mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
                    return Err(Errno::EPERM);
                }
                let dir = self.directory(node)?;
                Folder::create(&dir, name, OFlag::O_WRONLY, mode(asked.mode, asked.umask))?;
                self.enter(node, name, answer)
            }
            op::MKDIR => {
                let asked: wire::MkdirIn = body.take()?;
                let name = folder::name(body.text()?)?;
                mkdirat(&self.directory(node)?, name, mode(asked.mode, asked.umask))?;
                self.enter(node, name, answer)
            }
            op::SYMLINK => {
                let name = folder::name(body.text()?)?;
                let target = body.text()?;
                let target = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(target);
                symlinkat(target, &self.directory(node)?, name)?;
                self.enter(node, name, answer)
            }
            op::LINK => {
                let old: wire::LinkIn = body.take()?;
                let name = folder::name(body.text()?)?;
                let expected = self.nodes.identity(old.node)?;
                let (parent, old_name) = self.nodes.place(old.node)?;
                let (from, to) = (self.directory(parent)?, self.directory(node)?);
                if folder::identity(&Folder::look(&from, old_name)?) != expected {
                    return Err(Errno::ESTALE);
                }
                linkat(&from, old_name, &to, name, LinkatFlags::empty())?;
                self.enter(node, name, answer)
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
                let allowed = RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE;
                let flags = RenameFlags::from_bits(asked.flags)
                    .filter(|flags| allowed.contains(*flags))
                    .ok_or(Errno::EINVAL)?;
                self.rename(node, asked.new_parent, flags, body)
            }
            _ => Err(Errno::ENOSYS),
        }
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
        match Folder::create(
            &dir,
            name,
            flags - OFlag::O_TRUNC,
            mode(asked.mode, asked.umask),
        ) {
            Ok(file) => {
                let start = answer.len();
                self.tell_entry(parent, name, &fstat(&file)?, answer)?;
                let node = told_node(answer, start)?;
                self.keep(node, file, answer)
            }
            // Another guest or the host was faster.
            Err(Errno::EEXIST) if !exclusive => {
                let start = answer.len();
                self.enter(parent, name, answer)?;
                let node = told_node(answer, start)?;
                let opened = self
                    .nodes
                    .path(node)
                    .and_then(|path| self.folder.open(&path, self.nodes.identity(node)?, flags));
                // The guest does not learn of the node, so it will not forget it.
                let file = opened.inspect_err(|_| self.nodes.forget(node, 1))?;
                self.keep(node, file, answer)
            }
            Err(error) => Err(error),
        }
    }

    fn write(&self, body: &mut Body<'_>, answer: &mut Vec<u8>) -> Result<(), Errno> {
        let asked: wire::WriteIn = body.take()?;
        let handle = self.handles.get(&asked.handle).ok_or(Errno::EBADF)?;
        let size =
            usize::try_from(asked.size.min(wire::DATA_BYTES_MAX)).map_err(|_| Errno::EINVAL)?;
        let data = body.0.get(..size).ok_or(Errno::EINVAL)?;
        let written = loop {
            match handle.file.write_at(data, asked.offset) {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                done => break done.map_err(|e| folder::errno(&e))?,
            }
        };
        let size = u32::try_from(written).map_err(|_| Errno::EIO)?;
        answer.extend_from_slice(wire::WriteOut { size, pad: 0 }.as_bytes());
        Ok(())
    }

    fn remove(
        &mut self,
        parent: u64,
        body: &mut Body<'_>,
        flags: UnlinkatFlags,
    ) -> Result<(), Errno> {
        let name = folder::name(body.text()?)?;
        let dir = self.directory(parent)?;
        let gone = Folder::look(&dir, name)?;
        unlinkat(&dir, name, flags)?;
        self.nodes.removed(parent, name, folder::identity(&gone));
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
        let replaced = Folder::look(&to, new_name).ok();
        renameat2(&from, name, &to, new_name, flags)?;
        if let Some(stat) = &replaced
            && !flags.contains(RenameFlags::RENAME_EXCHANGE)
        {
            self.nodes
                .removed(new_parent, new_name, folder::identity(stat));
        }
        for (dir, at, name) in [(&from, parent, name), (&to, new_parent, new_name)] {
            if let Ok(stat) = Folder::look(dir, name) {
                self.nodes.moved(folder::identity(&stat), at, name);
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
        let (path, expected) = (self.nodes.path(node)?, self.nodes.identity(node)?);
        let has = |bit| asked.valid & bit != 0;
        if has(SET_SIZE) {
            let by_node = |n: u64| self.handles.get(&asked.handle).filter(|h| h.node == n);
            let done = match by_node(node) {
                Some(handle) => handle.file.set_len(asked.size),
                None => self
                    .folder
                    .open(&path, expected, OFlag::O_WRONLY)?
                    .set_len(asked.size),
            };
            done.map_err(|e| folder::errno(&e))?;
        }
        let owner = |bit, id, map: &crate::IdMap| match has(bit) {
            true => map.to_host(id).map(Some).ok_or(Errno::EPERM),
            false => Ok(None),
        };
        let user = owner(SET_UID, asked.uid, &self.ids.users)?.map(Uid::from_raw);
        let group = owner(SET_GID, asked.gid, &self.ids.groups)?.map(Gid::from_raw);
        let times = SET_ATIME | SET_MTIME;
        if asked.valid & (SET_MODE | SET_UID | SET_GID | times) != 0 {
            let (fd, _) = self.folder.locate(&path, expected)?;
            if user.is_some() || group.is_some() {
                fchownat(
                    &fd,
                    "",
                    user,
                    group,
                    AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW,
                )?;
            }
            // Mode and times go by name: there is no call for them on a descriptor without rights.
            let (dir, name) = match self.nodes.place(node) {
                Ok((parent, name)) => (self.directory(parent)?, name),
                Err(_) => (fd, OsStr::new(".")),
            };
            if has(SET_MODE) {
                fchmodat(
                    &dir,
                    name,
                    mode(asked.mode, 0),
                    FchmodatFlags::NoFollowSymlink,
                )?;
            }
            if asked.valid & times != 0 {
                let at = time(
                    has(SET_ATIME),
                    has(SET_ATIME_NOW),
                    asked.atime,
                    asked.atime_ns,
                );
                let mt = time(
                    has(SET_MTIME),
                    has(SET_MTIME_NOW),
                    asked.mtime,
                    asked.mtime_ns,
                );
                utimensat(&dir, name, &at, &mt, UtimensatFlags::NoFollowSymlink)?;
            }
        }
        let stat = self.stat(node)?;
        self.tell_attr(&stat, answer);
        Ok(())
    }
}

const fn time(set: bool, now: bool, seconds: u64, ns: u32) -> TimeSpec {
    match (set, now) {
        (false, _) => TimeSpec::UTIME_OMIT,
        (true, true) => TimeSpec::UTIME_NOW,
        // Past a second, the kernel would take some numbers for "now" or "as it is".
        (true, false) => {
            let ns = if ns < 1_000_000_000 { ns } else { 999_999_999 };
            TimeSpec::new(seconds.cast_signed(), ns as i64)
        }
    }
}

/// The number of the node that the entry at `start` of the answer tells of.
fn told_node(answer: &[u8], start: usize) -> Result<u64, Errno> {
    let bytes = answer
        .get(start..start + 8)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map(u64::from_le_bytes).ok_or(Errno::EIO)
}
