//! Claims about the server, made by a FUSE client of bytes.

use crate::wire::{self, op};
use crate::{Access, Ids, Server, Terms};
use nix::errno::Errno;
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::{FromBytes, IntoBytes};

struct Client(Server);

type Answer = Result<Vec<u8>, Errno>;

impl Client {
    fn with(folder: &Path, access: Access, ids: Ids) -> Self {
        let terms = Terms { ids, cache_ms: 0 };
        let folder = fs::File::open(folder).unwrap().into();
        let server = Server::new(folder, access, terms, None).unwrap();
        let mut client = Self(server);
        let init = wire::InitIn {
            major: 7,
            minor: 38,
            readahead: 1 << 17,
            flags: u32::MAX,
        };
        client.ask(op::INIT, 0, init.as_bytes()).unwrap();
        client
    }

    fn new(folder: &Path) -> Self {
        Self::with(folder, Access::ReadWrite, Ids::default())
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let len = u32::try_from(40 + body.len()).unwrap();
        let header = wire::InHeader {
            len,
            opcode,
            node,
            unique: 77,
            ..Default::default()
        };
        let mut answer = Vec::new();
        let request = [header.as_bytes(), body].concat();
        self.0.serve(&request, 1 << 21, &mut answer);
        let (out, rest) = wire::OutHeader::read_from_prefix(&answer).unwrap();
        assert_eq!((out.len as usize, out.unique), (answer.len(), 77));
        if out.error == 0 {
            Ok(rest.to_vec())
        } else {
            assert!(rest.is_empty());
            Err(Errno::from_raw(-out.error))
        }
    }

    fn named(&mut self, opcode: u32, node: u64, head: &[u8], names: &[&str]) -> Answer {
        let mut body = head.to_vec();
        for name in names {
            body.extend_from_slice(name.as_bytes());
            body.push(0);
        }
        self.ask(opcode, node, &body)
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<wire::EntryOut, Errno> {
        let answer = self.named(op::LOOKUP, parent, &[], &[name])?;
        Ok(wire::EntryOut::read_from_bytes(&answer).unwrap())
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let flags = flags.cast_unsigned();
        let answer = self.ask(op::OPEN, node, wire::OpenIn { flags, extra: 0 }.as_bytes())?;
        Ok(wire::OpenOut::read_from_bytes(&answer).unwrap().handle)
    }

    fn read(&mut self, handle: u64, size: u32) -> Answer {
        let asked = wire::ReadIn {
            handle,
            size,
            ..Default::default()
        };
        self.ask(op::READ, 0, asked.as_bytes())
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Answer {
        let size = u32::try_from(data.len()).unwrap();
        let asked = wire::WriteIn {
            handle,
            offset,
            size,
            ..Default::default()
        };
        self.ask(op::WRITE, 0, &[asked.as_bytes(), data].concat())
    }

    fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), Errno> {
        let flags = 0o2;
        let asked = wire::CreateIn {
            flags,
            mode,
            ..Default::default()
        };
        let answer = self.named(op::CREATE, parent, asked.as_bytes(), &[name])?;
        let (entry, rest) = wire::EntryOut::read_from_prefix(&answer).unwrap();
        Ok((
            entry.node,
            wire::OpenOut::read_from_bytes(rest).unwrap().handle,
        ))
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Answer {
        self.named(op::RENAME, from.0, to.0.as_bytes(), &[from.1, to.1])
    }

    fn list(&mut self, node: u64, size: u32) -> Vec<String> {
        let answer = self.ask(op::OPENDIR, node, &[0; 8]).unwrap();
        let handle = wire::OpenOut::read_from_bytes(&answer).unwrap().handle;
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let asked = wire::ReadIn {
                handle,
                offset,
                size,
                ..Default::default()
            };
            let part = self.ask(op::READDIR, node, asked.as_bytes()).unwrap();
            if part.is_empty() {
                return names;
            }
            let mut rest = part.as_slice();
            while let Ok((dirent, after)) = wire::Dirent::read_from_prefix(rest) {
                let len = dirent.name_bytes as usize;
                names.push(String::from_utf8(after[..len].to_vec()).unwrap());
                offset = dirent.next;
                rest = &after[len.next_multiple_of(8)..];
            }
        }
    }
}

#[test]
fn what_one_guest_writes_the_host_and_another_guest_read() {
    let folder = tempfile::tempdir().unwrap();
    let (mut a, mut b) = (Client::new(folder.path()), Client::new(folder.path()));
    let made = a
        .named(op::MKDIR, 1, &[0xff, 1, 0, 0, 0, 0, 0, 0], &["d"])
        .unwrap();
    let dir = wire::EntryOut::read_from_bytes(&made).unwrap().node;
    let (_, handle) = a.create(dir, "f", 0o644).unwrap();
    let data: Vec<u8> = (0..300_000u32).map(|n| (n * 7 % 251) as u8).collect();
    a.write(handle, 5, &data).unwrap();
    let on_host = fs::read(folder.path().join("d/f")).unwrap();
    assert_eq!((&on_host[..5], &on_host[5..]), (&[0; 5][..], &data[..]));
    let dir = b.lookup(1, "d").unwrap().node;
    let file = b.lookup(dir, "f").unwrap();
    assert_eq!(file.attr.size, 300_005);
    let handle = b.open(file.node, 0).unwrap();
    assert_eq!(b.read(handle, 1 << 20).unwrap(), on_host);
    // The one renames, and the other's node is stale until it looks again.
    a.rename((1, "d"), (1, "e")).unwrap();
    assert_eq!(b.open(file.node, 0), Err(Errno::ESTALE));
    let dir = b.lookup(1, "e").unwrap().node;
    assert_eq!(b.lookup(dir, "f").unwrap().node, file.node);
    b.open(file.node, 0).unwrap();
}

#[test]
fn nodes_follow_what_the_guest_itself_renames() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    fs::write(folder.path().join("d/f"), "deep").unwrap();
    let mut guest = Client::new(folder.path());
    let dir = guest.lookup(1, "d").unwrap().node;
    let file = guest.lookup(dir, "f").unwrap().node;
    guest.rename((1, "d"), (1, "e")).unwrap();
    guest.rename((dir, "f"), (1, "g")).unwrap();
    let handle = guest.open(file, 0).unwrap();
    assert_eq!(guest.read(handle, 10).unwrap(), b"deep");
}

#[test]
fn read_only_folder_is_never_changed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "kept").unwrap();
    let mut guest = Client::with(folder.path(), Access::ReadOnly, Ids::default());
    let file = guest.lookup(1, "f").unwrap().node;
    for flags in [libc_flags::WRONLY, libc_flags::RDWR, libc_flags::TRUNC] {
        assert_eq!(guest.open(file, flags), Err(Errno::EROFS));
    }
    for opcode in [
        op::SETATTR,
        op::SYMLINK,
        op::MKNOD,
        op::MKDIR,
        op::UNLINK,
        op::RMDIR,
        op::RENAME,
        op::RENAME2,
        op::LINK,
        op::CREATE,
        op::WRITE,
    ] {
        let refused = guest.named(opcode, 1, &[], &["f", "g"]);
        assert_eq!(refused, Err(Errno::EROFS), "operation {opcode}");
    }
    let handle = guest.open(file, 0).unwrap();
    assert_eq!(guest.read(handle, 10).unwrap(), b"kept");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

mod libc_flags {
    pub(super) const WRONLY: i32 = 0o1;
    pub(super) const RDWR: i32 = 0o2;
    pub(super) const TRUNC: i32 = 0o1000;
}

#[test]
fn names_that_are_paths_are_refused_in_every_operation() {
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("secret"), "s").unwrap();
    let shared = outer.path().join("shared");
    fs::create_dir_all(shared.join("d")).unwrap();
    let mut guest = Client::new(&shared);
    let long = "x".repeat(256);
    for name in [
        "",
        ".",
        "..",
        "../secret",
        "d/..",
        "/",
        "/etc/passwd",
        &long,
    ] {
        assert!(guest.lookup(1, name).is_err(), "{name}");
        assert!(guest.create(1, name, 0o644).is_err(), "{name}");
        assert!(guest.rename((1, "d"), (1, name)).is_err(), "{name}");
        assert!(guest.rename((1, name), (1, "new")).is_err(), "{name}");
        for (opcode, head) in [
            (op::UNLINK, 0),
            (op::RMDIR, 0),
            (op::SYMLINK, 0),
            (op::MKDIR, 8),
            (op::MKNOD, 16),
        ] {
            let refused = guest.named(opcode, 1, &vec![0; head], &[name, "target"]);
            assert!(refused.is_err(), "operation {opcode} of {name}");
        }
    }
    assert_eq!(
        fs::read_to_string(outer.path().join("secret")).unwrap(),
        "s"
    );
    assert_eq!(fs::read_dir(&shared).unwrap().count(), 1);
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
}

#[test]
fn links_are_told_and_never_followed() {
    let outer = tempfile::tempdir().unwrap();
    fs::write(outer.path().join("secret"), "s").unwrap();
    let shared = outer.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let mut guest = Client::new(&shared);
    guest.named(op::SYMLINK, 1, &[], &["up", ".."]).unwrap();
    guest
        .named(op::SYMLINK, 1, &[], &["file", "../secret"])
        .unwrap();
    let up = guest.lookup(1, "up").unwrap();
    assert_eq!(up.attr.mode & 0o170_000, 0o120_000);
    assert_eq!(guest.ask(op::READLINK, up.node, &[]).unwrap(), b"..");
    assert!(guest.lookup(up.node, "secret").is_err());
    assert!(guest.create(up.node, "new", 0o644).is_err());
    let file = guest.lookup(1, "file").unwrap().node;
    assert_eq!(guest.open(file, 0), Err(Errno::EPERM));
    assert!(guest.create(1, "file", 0o644).is_err());
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
}

#[test]
fn folders_that_the_host_swaps_for_links_or_moves_out_never_lead_outside() {
    let outer = tempfile::tempdir().unwrap();
    let (shared, secrets) = (outer.path().join("shared"), outer.path().join("secrets"));
    fs::create_dir_all(shared.join("d")).unwrap();
    fs::create_dir(&secrets).unwrap();
    fs::write(shared.join("d/f"), "public").unwrap();
    fs::write(secrets.join("f"), "secret").unwrap();
    symlink(&secrets, shared.join("link")).unwrap();
    let mut leaked = false;
    let (done, mut read, mut missed) = (AtomicBool::new(false), 0, 0);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
            let root = fs::File::open(&shared).unwrap();
            while !done.load(Ordering::Relaxed) {
                nix::fcntl::renameat2(&root, "d", &root, "link", flags).unwrap();
            }
        });
        let mut guest = Client::new(&shared);
        for _ in 0..20_000 {
            let Ok(dir) = guest.lookup(1, "d") else {
                missed += 1;
                continue;
            };
            let Ok(file) = guest.lookup(dir.node, "f") else {
                missed += 1;
                continue;
            };
            let Ok(handle) = guest.open(file.node, 0) else {
                missed += 1;
                continue;
            };
            leaked |= guest.read(handle, 10) != Ok(b"public".to_vec());
            guest
                .ask(
                    op::RELEASE,
                    file.node,
                    wire::HandleIn {
                        handle,
                        ..Default::default()
                    }
                    .as_bytes(),
                )
                .unwrap();
            read += 1;
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(!leaked, "the guest has read what is outside");
    assert!(
        read > 0 && missed > 0,
        "no race: {read} read, {missed} missed"
    );
    // Moved out as a whole: the node that the guest holds is stale.
    let inside = shared.join("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(inside.join("f"), "x").unwrap();
    let mut guest = Client::new(&shared);
    let dir = guest.lookup(1, "inside").unwrap().node;
    let file = guest.lookup(dir, "f").unwrap().node;
    fs::rename(&inside, outer.path().join("outside")).unwrap();
    assert_eq!(guest.open(file, 0), Err(Errno::ESTALE));
    assert_eq!(guest.lookup(dir, "f").unwrap_err(), Errno::ESTALE);
    assert_eq!(guest.create(dir, "new", 0o644), Err(Errno::ESTALE));
}

#[test]
fn replaced_file_is_stale_and_not_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "old").unwrap();
    fs::write(folder.path().join("other"), "new").unwrap();
    let mut guest = Client::new(folder.path());
    let file = guest.lookup(1, "f").unwrap().node;
    let kept_open = guest.open(file, 0).unwrap();
    fs::rename(folder.path().join("other"), folder.path().join("f")).unwrap();
    assert_eq!(guest.open(file, 0), Err(Errno::ESTALE));
    assert_eq!(guest.read(kept_open, 10).unwrap(), b"old");
    // Open, it can still be asked for its attributes.
    assert_eq!(guest.ask(op::GETATTR, file, &[0; 16]).unwrap().len(), 104);
    assert_ne!(guest.lookup(1, "f").unwrap().node, file);
}

#[test]
fn special_files_are_neither_made_nor_opened() {
    let folder = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut guest = Client::new(folder.path());
    let pipe = guest.lookup(1, "pipe").unwrap().node;
    assert_eq!(guest.open(pipe, 0), Err(Errno::EPERM));
    for kind in [0o020_000, 0o060_000, 0o010_000, 0o140_000] {
        let asked = wire::MknodIn {
            mode: kind | 0o644,
            ..Default::default()
        };
        let refused = guest.named(op::MKNOD, 1, asked.as_bytes(), &["node"]);
        assert_eq!(refused, Err(Errno::EPERM));
    }
    let (node, _) = guest.create(1, "f", 0o6755).unwrap();
    let set = wire::SetattrIn {
        valid: 1,
        mode: 0o6711,
        ..Default::default()
    };
    guest.ask(op::SETATTR, node, set.as_bytes()).unwrap();
    let mode = fs::metadata(folder.path().join("f"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o711);
}

#[test]
fn owners_are_translated_and_unmapped_ones_cannot_be_given() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "").unwrap();
    let own = fs::metadata(folder.path()).unwrap();
    let ids = Ids {
        users: format!("500:{}:1", own.uid()).parse().unwrap(),
        groups: format!("600:{}:1", own.gid()).parse().unwrap(),
    };
    let mut guest = Client::with(folder.path(), Access::ReadWrite, ids);
    let file = guest.lookup(1, "f").unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (500, 600));
    let set = |uid| wire::SetattrIn {
        valid: 2,
        uid,
        ..Default::default()
    };
    assert_eq!(
        guest.ask(op::SETATTR, file.node, set(0).as_bytes()),
        Err(Errno::EPERM)
    );
    guest
        .ask(op::SETATTR, file.node, set(500).as_bytes())
        .unwrap();
}

#[test]
fn size_and_times_are_set_and_files_and_folders_removed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "0123456789").unwrap();
    fs::create_dir(folder.path().join("d")).unwrap();
    let mut guest = Client::new(folder.path());
    let file = guest.lookup(1, "f").unwrap().node;
    let set = wire::SetattrIn {
        valid: 0b11_1000,
        size: 4,
        atime: 5,
        mtime: 9,
        mtime_ns: u32::MAX,
        ..Default::default()
    };
    guest.ask(op::SETATTR, file, set.as_bytes()).unwrap();
    let meta = fs::metadata(folder.path().join("f")).unwrap();
    assert_eq!(
        (meta.len(), meta.atime(), meta.mtime(), meta.mtime_nsec()),
        (4, 5, 9, 999_999_999)
    );
    guest.named(op::LINK, 1, file.as_bytes(), &["g"]).unwrap();
    assert_eq!(fs::metadata(folder.path().join("g")).unwrap().nlink(), 2);
    assert_eq!(guest.named(op::RMDIR, 1, &[], &["f"]), Err(Errno::ENOTDIR));
    assert_eq!(guest.named(op::UNLINK, 1, &[], &["d"]), Err(Errno::EISDIR));
    guest.named(op::UNLINK, 1, &[], &["f"]).unwrap();
    guest.named(op::RMDIR, 1, &[], &["d"]).unwrap();
    assert_eq!(guest.list(1, 4096), ["g"]);
}

#[test]
fn large_folder_is_listed_in_parts_each_name_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected: Vec<String> = (0..500).map(|n| format!("file-{n:03}")).collect();
    for name in &expected {
        fs::write(folder.path().join(name), "").unwrap();
    }
    let mut listed = Client::new(folder.path()).list(1, 200);
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
}

proptest! {
    #[test]
    fn any_request_is_answered_and_stays_in_the_folder(
        requests in prop::collection::vec((0u32..50, 0u64..6, prop::collection::vec(
            prop_oneof![Just(0u8), Just(b'.'), Just(b'/'), Just(b'a'), 1u8..4, any::<u8>()], 0..160)), 1..30),
        room in 0usize..400,
    ) {
        let outer = tempfile::tempdir().unwrap();
        let shared = outer.path().join("shared");
        fs::create_dir_all(shared.join("a/a")).unwrap();
        let mut guest = Client::new(&shared);
        for (opcode, node, body) in requests {
            let len = u32::try_from(40 + body.len()).unwrap();
            let header = wire::InHeader { len, opcode, node, ..Default::default() };
            let mut answer = Vec::new();
            guest.0.serve(&[header.as_bytes(), &body].concat(), room, &mut answer);
            prop_assert!(answer.len() <= room);
            let silent = matches!(opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
            prop_assert_eq!(answer.is_empty(), silent || room < 16);
        }
        let beside: Vec<_> = fs::read_dir(outer.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        prop_assert_eq!(beside, ["shared"]);
    }

    #[test]
    fn any_bytes_are_answered_or_dropped(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let folder = tempfile::tempdir().unwrap();
        let mut answer = Vec::new();
        Client::new(folder.path()).0.serve(&bytes, 4096, &mut answer);
        prop_assert!(answer.is_empty() || answer.len() >= 16);
    }
}

/// Asks for permissions and times by the node alone, as Linux does also of what is open.
fn set_by_node(guest: &mut Client, node: u64, mode: u32, mtime: u64) -> Answer {
    let asked = wire::SetattrIn {
        valid: 1 | 1 << 5,
        mode,
        mtime,
        ..Default::default()
    };
    guest.ask(op::SETATTR, node, asked.as_bytes())
}

#[test]
fn attributes_of_open_files_are_set_when_their_name_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Client::new(folder.path());
    let (node, handle) = guest.create(1, "f", 0o644).unwrap();
    guest.named(op::UNLINK, 1, &[], &["f"]).unwrap();
    // Another of that name is another.
    fs::write(folder.path().join("f"), "other").unwrap();
    let told = set_by_node(&mut guest, node, 0o604, 5).unwrap();
    let attr = wire::AttrOut::read_from_bytes(&told).unwrap().attr;
    assert_eq!((attr.mode & 0o7777, attr.mtime), (0o604, 5));
    assert_eq!(attr.nlink, 0);
    let other = fs::metadata(folder.path().join("f")).unwrap();
    assert_ne!((other.mode() & 0o777, other.mtime()), (0o604, 5));
    let asked = wire::HandleIn {
        handle,
        ..Default::default()
    };
    guest.ask(op::RELEASE, node, asked.as_bytes()).unwrap();
    let refused = set_by_node(&mut guest, node, 0o600, 6);
    assert_eq!(refused, Err(Errno::ESTALE));
}

#[test]
fn link_that_is_left_is_changed_and_linked() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Client::new(folder.path());
    let (node, _) = guest.create(1, "f", 0o644).unwrap();
    let link = |guest: &mut Client, name| guest.named(op::LINK, 1, node.as_bytes(), &[name]);
    link(&mut guest, "l").unwrap();
    guest.named(op::UNLINK, 1, &[], &["f"]).unwrap();
    set_by_node(&mut guest, node, 0o604, 5).unwrap();
    let left = fs::metadata(folder.path().join("l")).unwrap();
    assert_eq!((left.mode() & 0o777, left.mtime()), (0o604, 5));
    // ESTALE, and not ENOENT: Linux looks the other name up then.
    assert_eq!(link(&mut guest, "m"), Err(Errno::ESTALE));
    assert_eq!(guest.lookup(1, "l").unwrap().node, node);
    link(&mut guest, "m").unwrap();
}

#[test]
fn file_that_is_opened_to_read_is_truncated_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "data").unwrap();
    let mut guest = Client::new(folder.path());
    let node = guest.lookup(1, "f").unwrap().node;
    let handle = guest.open(node, libc_flags::TRUNC).unwrap();
    assert_eq!(guest.read(handle, 10).unwrap(), b"");
    assert!(guest.write(handle, 0, b"x").is_err());
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"");
    // As Linux does it, after it has opened.
    fs::write(folder.path().join("f"), "data").unwrap();
    let asked = wire::SetattrIn {
        valid: 1 << 3 | 1 << 6,
        handle,
        ..Default::default()
    };
    guest.ask(op::SETATTR, node, asked.as_bytes()).unwrap();
    assert_eq!(fs::read(folder.path().join("f")).unwrap(), b"");
}

#[test]
fn linux_is_not_to_truncate_before_it_knows_that_it_may() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Client::new(folder.path());
    let init = wire::InitIn {
        major: 7,
        minor: 38,
        flags: u32::MAX,
        ..Default::default()
    };
    let told = guest.ask(op::INIT, 0, init.as_bytes()).unwrap();
    let told = wire::InitOut::read_from_bytes(&told).unwrap();
    assert_eq!(told.flags & 1 << 3, 0);
}

#[test]
fn only_what_a_program_appends_goes_to_the_end() {
    const APPEND: u32 = 0o2000;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("f");
    fs::write(&file, "0123").unwrap();
    let mut guest = Client::new(folder.path());
    let node = guest.lookup(1, "f").unwrap().node;
    let write = |guest: &mut Client, handle, write_flags, flags, data: &[u8]| {
        let asked = wire::WriteIn {
            handle,
            offset: 1,
            size: u32::try_from(data.len()).unwrap(),
            write_flags,
            flags,
            ..Default::default()
        };
        let body = [asked.as_bytes(), data].concat();
        guest.ask(op::WRITE, node, &body).unwrap();
        fs::read(&file).unwrap()
    };
    let appender = APPEND.cast_signed() | libc_flags::RDWR;
    let appender = guest.open(node, appender).unwrap();
    assert_eq!(write(&mut guest, appender, 0, APPEND, b"4"), b"01234");
    // A page of a map, and a file whose program has stopped to append.
    assert_eq!(write(&mut guest, appender, 1, APPEND, b"a"), b"0a234");
    assert_eq!(write(&mut guest, appender, 0, 0, b"b"), b"0b234");
    // And one whose program has begun to.
    let other = guest.open(node, libc_flags::RDWR).unwrap();
    assert_eq!(write(&mut guest, other, 0, APPEND, b"5"), b"0b2345");
}
